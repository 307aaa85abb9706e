"""Public data in data.py: tiny files, damaged ones, downloads from file:// addresses, the real."""

import gzip
import hashlib
import io
import os
import random
import re
import tarfile
from pathlib import Path

import numpy as np
import pytest
from conftest import ROOT

import data
from data import FASHION_CLASSES, GRID_QUESTIONS, Shapes, load_fashion_mnist, load_shapes

REAL = Path(os.environ.get("LVRPO_DATA") or ROOT.parent / "shared" / "data")


def one_line(call, *args):
    with pytest.raises(ValueError) as error:
        call(*args)
    assert type(error.value) is ValueError and "\n" not in str(error.value)
    return str(error.value)


def npy(array, save=np.save):
    save(file := io.BytesIO(), array)
    return file.getvalue()


def idx(array):
    header = np.array([0x800 + array.ndim, *array.shape], ">u4")
    return header.tobytes() + array.astype(np.uint8).tobytes()


def test_clothes_are_grey_and_centred_in_two_black_pixels(clothes):
    grey = np.random.default_rng(0).integers(1, 256, (20, 28, 28))
    (clothes / "t10k-images-idx3-ubyte.gz").write_bytes(gzip.compress(idx(grey)))
    pictures, labels = load_fashion_mnist(clothes, "test")
    assert pictures.shape == (20, 32, 32, 3) and pictures.dtype == np.uint8
    assert (pictures[:, 2:30, 2:30] == grey[..., None]).all() and pictures.sum() == 3 * grey.sum()
    assert labels.dtype == np.int64 and labels.tolist() == [*range(10)] * 2


def test_shapes_are_stored_blue_green_red_and_read_red_green_blue(grids):
    stored = np.zeros((4, 30, 30, 3), np.uint8)
    stored[0, 0, 0] = 10, 20, 30  # blue, green, red
    (grids / "shapes_dataset/val.input.npy").write_bytes(npy(stored))
    pictures, questions, answers = load_shapes(grids, "val")
    assert pictures.shape == (4, 32, 32, 3) and pictures.dtype == np.uint8
    assert pictures[0, 1, 1].tolist() == [30, 20, 10] and pictures.sum() == 60
    assert questions[1] == "is a square green" and answers.tolist() == [True, False] * 2


IMAGES, LABELS = "train-images-idx3-ubyte.gz", "train-labels-idx1-ubyte.gz"
NPY, OUTPUT = "shapes_dataset/val.input.npy", "shapes_dataset/val.output"
X, Y, STORED = np.zeros((40, 28, 28)), np.arange(40) % 10, np.zeros((4, 30, 30, 3), np.uint8)
DAMAGE = {  # what happened: (file, its bytes; None: no file; what the line says)
    "missing": (IMAGES, None, "No such file"),
    "cut short": (IMAGES, gzip.compress(idx(X))[:-9], "EOFError"),
    "labels for images": (IMAGES, gzip.compress(idx(Y)), "0x801.*expected 0x803"),
    "another size": (IMAGES, gzip.compress(idx(X[:, 1:])), r"\[27, 28\].*\[28, 28\]"),
    "a pixel missing": (IMAGES, gzip.compress(idx(X)[:-1]), "40 items.* in 31375 bytes"),
    "fewer labels": (LABELS, gzip.compress(idx(Y[:39])), "39 labels.*expected 40"),
    "label 10": (LABELS, gzip.compress(idx(Y + 1)), "up to 10.*up to 9"),
    ".npy with pickles": (NPY, npy(np.array([{}])), "Object arrays"),
    ".npz": (NPY, npy(STORED, np.savez), "expected"),
    ".npy of floats": (NPY, npy(STORED / 2), "float64.*uint8"),
    "an answer of yes": (OUTPUT, b"true\nyes\n" * 2, "'yes', expected true or false"),
}


@pytest.mark.parametrize("what", DAMAGE)
def test_a_damaged_file_is_one_line_with_path_finding_and_remedy(clothes, grids, what):
    name, content, says = DAMAGE[what]
    load, root, split = load_fashion_mnist, clothes, "train"
    if "/" in name:
        load, root, split = load_shapes, grids, "val"
    load(root, split)  # good before
    (root / name).unlink()
    if content is not None:
        (root / name).write_bytes(content)
    line = one_line(load, root, split)
    assert line.startswith(f"{root / name}: found ") and re.search(says, line), line
    assert "expected" in line and "add --download" in line
    assert f"'{split}x'; expected one of " in one_line(load, root, f"{split}x")


def test_clothes_are_drawn_named_and_asked_about_by_their_label(clothes):
    source, rng, wrong = data.FashionMNIST(clothes), random.Random(0), []
    for i in range(600):
        split, task = ("train", "val", "test")[i % 3], source.tasks[i // 3 % 4]
        e, noisy = (source.example(rng, task, noise=n, split=split) for n in (None, data.NOISE))
        name = FASHION_CLASSES[e.truth]
        assert e.pictures[0, 16, 16, 0] // 20 - 1 == e.truth  # the fixture's shade of this class
        if task == "vqa" and e.prompt != "what is this ?":
            assert e.answer == ("yes" if e.prompt == f"is this a {name} ?" else "no")
        else:
            assert (e.answer or e.prompt).split()[-1] == name and (task != "draw" or not e.answer)
        if task != "vqa":
            wrong.append(FASHION_CLASSES[noisy.truth] not in noisy.prompt + noisy.answer)
    assert 0.05 < np.mean(wrong) < 0.2
    train, val = ({p.tobytes() for p in source.splits[split][0]} for split in ("train", "val"))
    assert len(train) == len(val) == 20 and not train & val
    names = source.negatives(rng, "a photo of one bag", 12)
    assert sorted(names) == sorted(f"a photo of one {c}" for c in FASHION_CLASSES if c != "bag")


COLORS, MOVES = ("red", "green", "blue"), {"above": 3, "below": -3, "left": 1, "right": -1}


def seen(picture):
    """The nine names of what a grid shows, from its pixels."""
    names = []
    for cell in picture[1:31, 1:31].reshape(3, 10, 3, 10, 3).swapaxes(1, 2).reshape(9, 10, 10, 3):
        shown = cell.any(-1)
        height, width = shown.any(1).sum(), shown.any(0).sum()
        shape = "square" if shown.sum() == height * width else "circle"
        if cell[5:].sum() > 1.3 * cell[:5].sum():
            shape = "triangle"
        names.append(f"{COLORS[cell.sum((0, 1)).argmax()]}-{shape}" if shown.any() else "nothing")
    return names


def leads(names, cell, steps, y):
    """Do the steps of a question lead from this cell to a Y? One step, then the rest."""
    if not steps:
        return y in names[cell]
    to = cell + MOVES[steps[0]]
    inside = 0 <= to < 9 and (abs(MOVES[steps[0]]) == 3 or to // 3 == cell // 3)
    return inside and leads(names, to, steps[1:], y)


def test_a_made_grid_is_read_from_its_picture_and_its_question_answered_by_recursion(grids):
    source, rng = Shapes(grids), random.Random(0)
    for _ in range(400):
        e = source.example(rng, "multihop")
        names = seen(e.pictures[0])
        x, *steps, y = [w for w in e.prompt.split() if w not in ("is", "a", "shape", "of")]
        thought, answer = re.fullmatch("<think> (.*) </think> (no|yes)", e.answer).groups()
        goal = [x in name for name in names]
        right = [c for c in range(9) if goal[c] and leads(names, c, steps, y)]
        assert answer == ("yes" if right else "no") and any(goal), (e.prompt, names)
        expected = [n + "-x" * leads(names, c, [], y) for c, n in enumerate(names)]
        for k in range(max(len(steps), 1)):  # the last step first
            rest, last = steps[len(steps) - k - 1 :] if steps else [], k + 1 >= len(steps)
            for c, name in enumerate(names):
                mark = name + "-x" * goal[c] if last else "x"
                expected.append(mark if leads(names, c, rest, y) else "o")
        assert thought.split() == expected, e.prompt


def test_no_reported_question_is_trained_on_and_every_other_one_can_be(grids):
    source, rng = Shapes(grids), random.Random(0)
    reported = {e.prompt for split in ("val", "test") for e in source.splits[split]}
    trained = {source.example(rng, task).prompt for task in source.tasks * 1500}
    assert not trained & reported and set(source.questions) == set(GRID_QUESTIONS) - reported
    assert len(GRID_QUESTIONS) == 36 * (1 + 4 + 16)
    assert {e.prompt for e in source.splits["train"]} == {"is a circle red", "is a red shape red"}
    words = {word for text in source.texts(rng, 4000) for word in text.split()}
    assert words >= {word for text in GRID_QUESTIONS for word in text.split()}


def tar(files):
    """A packed archive of {path: its bytes}."""
    with tarfile.open(fileobj=(file := io.BytesIO()), mode="w:gz") as archive:
        for path, content in files.items():
            member = tarfile.TarInfo(path)
            member.size = len(content)
            archive.addfile(member, io.BytesIO(content))
    return file.getvalue()


@pytest.fixture
def served(tmp_path, clothes, grids, monkeypatch):
    """Both data sets at file:// addresses. Returns the archive of SHAPES."""
    files = sorted(clothes.iterdir())
    sums = [(p.as_uri(), hashlib.md5(p.read_bytes()).hexdigest()) for p in files]
    monkeypatch.setitem(data.DOWNLOADS, "fashion_mnist", sums)
    with tarfile.open(address := tmp_path / "master", "w:gz") as archive:
        archive.add(grids, "n2nmn-master/exp_shapes")
    monkeypatch.setitem(data.DOWNLOADS, "shapes", ((address.as_uri(), "exp_shapes"),))
    return address


def test_a_download_can_be_loaded_and_is_never_repeated(served, tmp_path):
    new = tmp_path / "deep" / "new"
    (new / "shapes").mkdir(parents=True)  # an empty folder is filled
    for name in data.DOWNLOADS:
        data.download(name, new)
    assert len(load_fashion_mnist(new / "fashion_mnist", "test")[1]) == 20
    assert len(load_shapes(new / "shapes", "val")[1]) == 4
    assert [p.name for p in (new / "shapes").iterdir()] == ["shapes_dataset"]
    assert len([*new.iterdir()]) == 2  # no scratch
    served.unlink()
    data.download("shapes", new)  # nothing is fetched


GOOD = {"n2nmn-master/exp_shapes/1": bytes(np.random.default_rng(0).integers(0, 256, 9999))}
FAILURES = {  # of SHAPES: what the archive is
    "missing": (None, "No such file"),
    "a web page": (b"<html>", "could not be opened|gzip"),
    "cut short": (tar(GOOD)[:-5000], "ended|end of data"),
    "unsafe": (tar(GOOD | {"../../evil": b"?"}), "evil.* outside"),
}


@pytest.mark.parametrize("what", FAILURES)
def test_a_bad_archive_is_one_line_and_leaves_no_file_anywhere(served, tmp_path, what):
    content, says = FAILURES[what]
    served.unlink()
    if content:
        served.write_bytes(content)
    before, new = {*tmp_path.rglob("*")}, tmp_path / "new"
    line = one_line(data.download, "shapes", new)
    assert line.startswith(f"{served.as_uri()}: ") and re.search(says, line), line
    assert {*tmp_path.rglob("*")} - before <= {new, new / "shapes"}  # at most empty folders


def test_one_file_with_another_checksum_and_none_of_the_others_stays(served, clothes, tmp_path):
    last = max(clothes.iterdir())  # the others have arrived by then
    last.write_bytes(last.read_bytes()[:-1])
    assert f"{last.name}: the MD5" in one_line(data.download, "fashion_mnist", tmp_path / "new")
    assert not any(p.is_file() for p in (tmp_path / "new").rglob("*"))
    assert "fashion_mnist, shapes" in one_line(data.download, "cifar", tmp_path)


def real(name):
    path = REAL / name
    return path if path.is_dir() else pytest.skip(f"no {path}; set LVRPO_DATA to its parent")


def test_real_clothes_have_their_published_counts_brightness_and_checksums():
    pictures, labels = load_fashion_mnist(root := real("fashion_mnist"), "train")
    assert FASHION_CLASSES[labels[0]] == "boot" and np.bincount(labels).tolist() == [6000] * 10
    assert pictures[..., 0].mean() / 255 * (32 / 28) ** 2 == pytest.approx(0.2860, abs=5e-5)
    assert len(load_fashion_mnist(root, "test")[1]) in (8000, 10000)  # whole, or the stored part
    for (_, checksum), name in zip(data.DOWNLOADS["fashion_mnist"], (IMAGES, LABELS)):
        assert hashlib.md5((root / name).read_bytes()).hexdigest() == checksum


def test_real_shapes_have_their_published_counts_and_answers_that_follow_from_their_pixels():
    root = real("shapes")
    published = {"train.tiny": [64, 1, 27], "train.small": [640, 10, 195], "val": [1024, 16, 394]}
    for split, counts in published.items():
        pictures, questions, answers = load_shapes(root, split)
        assert [len(pictures), len(set(questions)), answers.sum()] == counts
        for order, legal in ((1, (0.98, 1)), (-1, (0, 0.9))):  # red, green, blue; and the other
            right = []
            for picture, question, answer in zip(pictures[..., ::order], questions, answers):
                cells = [(divmod(c, 3), name.split("-")) for c, name in enumerate(seen(picture))]
                grid = {cell: name for cell, name in cells if name != ["nothing"]}
                right.append(data.grid_answer(grid, question)[0] == answer)
            assert legal[0] < np.mean(right) <= legal[1], (split, order)
