"""Shared by all tests: one thread, a small world, and one finished run of the smoke preset."""

import gzip
import itertools
import json
import os
import random
import runpy
import signal
import struct
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

os.environ.setdefault("OMP_NUM_THREADS", "1")  # before torch is imported; commands that tests start inherit it

import hypothesis  # noqa: E402
import numpy as np  # noqa: E402
import pytest  # noqa: E402
from PIL import Image  # noqa: E402

import data  # noqa: E402
from data import KINDS, TEMPLATES, FashionMNIST, Object, Vocabulary, make_sources, render  # noqa: E402
from model import Codebook  # noqa: E402

ROOT = Path(__file__).resolve().parents[1]

# The same examples on every machine, no time limit on any one of them, nothing written beside the sources.
hypothesis.settings.register_profile("repository", derandomize=True, deadline=None, database=None)
hypothesis.settings.load_profile("repository")


(WORLD,) = make_sources("synthetic", "", tasks=TEMPLATES)  # with all its tasks


def example(rng, task):
    """One example of any template."""
    return WORLD.example(rng, task)


@pytest.fixture(scope="session")
def codebook():
    """Every 8x8 patch of the world without jitter: each kind and size in the four cells (they look alike in each)."""
    scenes = [[Object(*kind, size, 0, 0)] for kind in KINDS for size in ("small", "big")]
    return Codebook.fit(np.stack([render(scene) for scene in scenes]), 1024, patch=8)


@pytest.fixture(scope="session")
def vocab(codebook):
    return Vocabulary.train(WORLD.texts(random.Random(0), 3000), len(codebook.entries), codebook.side**2)


@pytest.fixture(scope="session")
def smoke(tmp_path_factory):
    """The folder of one finished `train.py --preset smoke` (about 45 s): tests may read it, and write into a copy."""
    folder = tmp_path_factory.mktemp("runs") / "smoke"
    command = [sys.executable, "train.py", "--preset", "smoke", "--device", "cpu", "--out", str(folder)]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-3000:]
    return folder


@pytest.fixture
def clothes(tmp_path):
    """Fashion-MNIST in tiny files of its format: 40 and 20 pictures, each class of one shade of grey, a little noise."""
    root, rng = tmp_path / "fashion_mnist", np.random.default_rng(0)
    root.mkdir()
    for prefix, n in (("train", 40), ("t10k", 20)):
        labels = np.arange(n, dtype=np.uint8) % 10
        pictures = (20 + 20 * labels[:, None, None] + rng.integers(0, 5, (n, 28, 28))).astype(np.uint8)
        header = struct.pack(">IIII", 0x803, n, 28, 28)
        (root / f"{prefix}-images-idx3-ubyte.gz").write_bytes(gzip.compress(header + pictures.tobytes()))
        (root / f"{prefix}-labels-idx1-ubyte.gz").write_bytes(gzip.compress(struct.pack(">II", 0x801, n) + labels.tobytes()))
    return FashionMNIST(root)


def write_shapes(root, stored, questions, answers, split="val"):
    """SHAPES in its format: pictures (N, 30, 30, 3) uint8 as stored, one question and one "true" or "false" for each."""
    folder = root / "shapes_dataset"
    folder.mkdir(parents=True, exist_ok=True)
    np.save(folder / f"{split}.input.npy", stored)
    (folder / f"{split}.query_str.txt").write_text("".join(q + "\n" for q in questions))
    (folder / f"{split}.output").write_text("".join(a + "\n" for a in answers))


def strip(colors, size=(400, 100)):
    """A picture in NLVR's layout: three boxes of one colour each, with separators between them."""
    picture = Image.new("RGBA", size, (128, 128, 128, 255))
    for x, color in zip((0, 150, 300), colors):
        picture.paste(color, (x, 0, x + 100, 100))
    return picture


def write_nlvr(root, rows, split="dev", file="dev.json", pictures=(((255, 0, 0, 255), (0, 255, 0, 255), (0, 0, 255, 255)),) * 9, order=0):
    """NLVR in its format: rows as in its JSON, and the boxes' colours of each row's picture."""
    for row, colors in zip(rows, pictures):
        path = root / split / "images" / "3" / f"{split}-{row['identifier']}-{order}.png"
        path.parent.mkdir(parents=True, exist_ok=True)
        strip(colors).save(path)
    (root / split / file).write_text("\n".join(map(json.dumps, rows)))  # officially no newline at the end


def every_sentence(rows, slots):
    """All that `data.sample_statement` can make of them: {text: holds}."""
    made = (data.counting_sentence(row, q, dict(zip(found, values)))
            for row in rows for found in [data.slots_of(row, slots)] for q in data.QUANTIFIERS
            for values in itertools.product(*(words.items() for words in found.values())))  # fmt: skip
    return {text: holds for text, _, holds in made}


@pytest.fixture
def asked(tmp_path):
    """The folder of SHAPES and NLVR in tiny files of their formats: train, val or dev, and test share some of what they ask."""
    rng = random.Random(0)
    for split, questions in {"train.tiny": ["is a circle red"], "train.small": ["is a circle above a square", "is a red shape red"],
                             "val": ["is a circle above a square", "is a square green"]}.items():  # fmt: skip
        grids = [data.sample_grid(rng) for _ in range(4 * len(questions))]
        pictures = np.stack([data.render_grid(rng, grid)[1:31, 1:31, ::-1] for grid in grids])
        write_shapes(tmp_path / "shapes", pictures, 4 * questions, ["true", "false"] * (2 * len(questions)), split)
    said = {"train": ["There is a blue tower.", "there are 2 boxes"], "dev": ["there is a bleu tower", "There are 2 boxes"],
            "test": ["there is a tower", "there is a tower."]}  # fmt: skip
    for split, sentences in said.items():
        rows = [{"sentence": s, "label": "true", "identifier": f"{k}-0"} for k, s in enumerate(sentences)]
        write_nlvr(tmp_path / "nlvr", [*rows, dict(rows[0], identifier="9-1", label="false")], split, f"{split}.json")
    return tmp_path


@pytest.fixture
def handlers():
    """The test runner's own handlers of signals, which are put back: main() listens to signals."""
    before = {number: signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM)}
    yield before
    for number, handler in before.items():
        signal.signal(number, handler)


@pytest.fixture
def command(capsys, monkeypatch, handlers):
    """Run a file of ours as a command in this process: command("eval.py", "--run", folder) -> status, out, err."""

    def run(*argv):
        capsys.readouterr()
        monkeypatch.setattr(sys, "argv", [*map(str, argv)])
        try:
            runpy.run_path(str(ROOT / argv[0]), run_name="__main__")
            status = 0
        except SystemExit as end:
            status = end.code or 0
        return SimpleNamespace(status=status, **capsys.readouterr()._asdict())

    return run
