"""results/nlvr/nlvr.py, the example of your own data: what it reads, what it makes, its command."""

import json
import random
import re
import subprocess
import sys

import numpy as np
import pytest
import torch
from conftest import ROOT
from PIL import Image

sys.path.insert(0, str(ROOT / "results" / "nlvr"))

import nlvr
from nlvr import data, train

REAL = ROOT.parent / "shared" / "data" / "nlvr"
COLORS = ((255, 0, 0), (0, 255, 0), (0, 0, 255))
ROW = {"sentence": "There is a tower.", "label": "true", "identifier": "7-0", "evals": {}}


def write(root, split, rows, file="json", order=0, colors=COLORS, width=400):
    """NLVR in its format: rows as in its JSON, each with one picture of three plain boxes."""
    folder = root / split / "images" / "3"
    folder.mkdir(parents=True, exist_ok=True)
    picture = Image.new("RGBA", (width, 100), (128, 128, 128, 255))
    for x, color in zip((0, 150, 300), colors):
        picture.paste(color, (x, 0, x + 100, 100))
    for row in rows:
        picture.save(folder / f"{split}-{row['identifier']}-{order}.png")
    (root / split / f"{split}.{file}").write_text("\n".join(map(json.dumps, rows)))


@pytest.fixture
def folder(tmp_path):
    """Tiny files of all splits; train and dev share a sentence, and dev has a typing error."""
    texts = {"train": ["a tower", "a red tower"], "dev": ["A Tower!", "a tovver"], "test": ["red"]}
    for split, sentences in texts.items():
        rows = [ROW | {"sentence": text, "identifier": f"{text}-0"} for text in sentences]
        write(tmp_path / "nlvr", split, rows)
    return tmp_path


def test_boxes_are_cut_apart_and_read_in_the_stated_order_or_else_the_first(tmp_path):
    rows = [ROW | {"permutation": 4}, {"sentence": "no", "label": "false", "identifier": "8-0"}]
    write(tmp_path, "train", rows, "examples.json", 2)
    write(tmp_path, "train", rows, "examples.json", 4, COLORS[::-1])
    (stated, *_), (first, *other) = nlvr.load_nlvr(str(tmp_path), "train")
    assert first.shape == (3, 32, 32, 3) and first.dtype == np.uint8 and other == ["no", False]
    assert all((box == color).all() for box, color in zip(first, COLORS))
    assert (stated == first[::-1]).all()
    write(tmp_path, "train", rows[:1])  # the official file goes before the derived one
    assert len(nlvr.load_nlvr(tmp_path, "train")) == 1


@pytest.mark.parametrize("line, message", [
    (json.dumps(ROW | {"label": "maybe"}), "KeyError.*maybe.* in line 2, expected a JSON object"),
    (json.dumps(ROW)[:30], "JSONDecodeError.* in line 2, expected a JSON object"),
    (json.dumps(ROW | {"identifier": "9-9"}), "found no dev-9-9-0.png, expected a picture"),
    (json.dumps(ROW | {"permutation": 5}), "found ValueError: 300x100 pixels, expected a PNG"),
    (None, "dev.json: found No such file"),
])  # fmt: skip
def test_what_is_damaged_or_missing_is_named_in_one_line(tmp_path, line, message):
    write(tmp_path, "dev", [ROW], order=5, width=300)
    write(tmp_path, "dev", [ROW])
    path = tmp_path / "dev" / "dev.json"
    path.write_text(f"{json.dumps(ROW)}\n{line}\n") if line else path.unlink()
    with pytest.raises(ValueError, match=message) as error:
        nlvr.load_nlvr(tmp_path, "dev")
    assert "\n" not in str(error.value)


def test_a_made_sentence_is_true_as_often_as_false_and_its_steps_prove_it():
    rng, labels = random.Random(0), {}
    for _ in range(3000):
        text, boxes, marks, label = nlvr.sample_statement(rng)
        counts = re.findall(r"([^0-9]*)([0-9])", nlvr.steps(boxes, marks))
        for box, (names, count) in zip(boxes, counts, strict=True):
            assert [n.removesuffix("-x") for n in names.split()] == [f"{o[1]}-{o[0]}" for o in box]
            assert names.count("-x") in (0, int(count))  # no mark where the whole box counts
        (least, most), *_ = [q[2:] for q in nlvr.QUANTIFIERS if text.startswith(q[0] + " ")]
        assert label == data.TRUTH[least <= sum(int(count) for _, count in counts) <= most]
        for key in (text, text[:10], text[:16], text[-10:]):
            labels.setdefault(key, []).append(label == "true")
    for key, values in labels.items():
        assert abs(np.mean(values) - 0.5) < 4.5 * 0.5 / len(values) ** 0.5, key


def test_no_sentence_of_dev_or_test_is_trained_on_and_every_row_fits(folder, monkeypatch):
    tables = data.SOURCES, data.DOWNLOADS, data.LAYOUTS, train.PRESETS
    for table, key in zip(tables, ("nlvr", "nlvr", "verify", "cpu")):
        monkeypatch.setitem(table, key, None)  # put back after the test
    nlvr.register()
    source, rng = data.SOURCES["nlvr"](folder / "nlvr"), random.Random(0)
    prompts = {split: [e.prompt for e in rows] for split, rows in source.splits.items()}
    assert prompts == {"train": ["a red tower"], "val": ["a tower", "a"], "test": ["red"]}
    source.closed |= {source.make(rng).prompt for _ in range(500)}
    examples = [source.example(rng, "verify", pool) for pool in ("paired", "real") * 200]
    assert not source.closed & {e.prompt for e in examples}
    assert {e.answer for e in examples if e.prompt == "a red tower"} == {"<think> </think> true"}
    vocab = data.Vocabulary.build(source.texts(rng, 2000), 1, 16)
    codes = torch.zeros(3 * len(examples), 16, dtype=torch.long)
    assert len(vocab.rows("verify", examples, codes)) == 400


def test_what_nouns_mean():
    box = [nlvr.Item("square", color, 20, 40, 0) for color in ("yellow", "blue", "black")]
    words = {"color": "black", "other": "blue", "number": "three", "end": "top", "over": "on"}
    tower = nlvr.in_tower(box, "s", **words)
    for where in ("on a blue block", "as the top of a tower with three blocks"):
        assert tower[f"black blocks {where}"] == [False, False, True]
    assert (tower["black towers"], tower["towers with three blocks"]) == (False, True)
    box = [nlvr.Item("circle", "blue", 20, x, y) for x, y in ((0, 80), (80, 40), (40, 40))]
    for wall, marks in (("corner", [1, 0, 0]), ("wall", [1, 1, 0]), ("base", [1, 0, 0])):
        words |= {"color": "blue", "shape": "item", "wall": f"touching the {wall}"}
        assert nlvr.in_scatter(box, "", **words)[f"blue item touching the {wall}"] == marks


@pytest.mark.skipif(not REAL.is_dir(), reason=f"NLVR is not at {REAL}")
def test_a_real_box_is_what_is_made_of_its_items():
    items = nlvr.load_nlvr(REAL, "dev")
    assert (len(items), sum(label for *_, label in items)) == (989, 547)  # as published
    rows = map(json.loads, (REAL / "dev" / "dev.json").read_text().split("\n"))
    for (pictures, sentence, _), row in zip(items, rows, strict=True):
        assert sentence == row["sentence"]
        for picture, box in zip(pictures, row["structured_rep"], strict=True):
            looks = [(o["type"], o["color"].lower().replace("#0099ff", "blue")) for o in box]
            places = [(o["size"], o["x_loc"], o["y_loc"]) for o in box]
            made = nlvr.render_box([nlvr.Item(*look, *p) for look, p in zip(looks, places)])
            assert abs(made.astype(int) - picture).mean() < 1.5


@pytest.mark.slow
def test_the_file_is_a_command_that_trains_and_measures_every_item_once(folder):
    argv = [nlvr.__file__, "--preset", "smoke", "--data-dir", folder, "--out", folder / "run"]
    done = subprocess.run([sys.executable, *argv], capture_output=True, text=True, cwd=folder)
    assert done.returncode == 0, done.stderr[-3000:]
    result = json.loads((folder / "run" / "eval.json").read_text())
    assert result["aligned"]["reasoning"]["visual"]["n"] == 1 and "\nnlvr\n" in done.stdout
