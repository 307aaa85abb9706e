"""Shared by all tests: one thread, a small world and model, tiny public data, one smoke run."""

import gzip
import os
import random
import runpy
import signal
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

os.environ.setdefault("OMP_NUM_THREADS", "1")  # before torch; commands that tests start inherit it

import hypothesis
import numpy as np
import pytest
import torch

from data import (KINDS, PAD, Object, Vocabulary, World, pictures_of, render, render_grid,
                  sample_grid)
from model import Codebook, ModelConfig, Transformer

ROOT, WORLD = Path(__file__).resolve().parents[1], World()
TOLERANCE = {torch.float64: 1e-9, torch.float32: 1e-4, torch.bfloat16: 0.15}  # of numbers near 1
hypothesis.settings.register_profile("ours", derandomize=True, deadline=None, database=None)
hypothesis.settings.load_profile("ours")  # the same examples everywhere, and no files


def lively(vocab, codebook, seed=0, layers=2):
    """A small model of random weights: initialised layers are identities, and pass too much."""
    torch.manual_seed(seed)
    model = Transformer(ModelConfig(vocab.size, codebook.side, width=32, layers=layers, heads=4))
    for p in model.parameters():
        torch.nn.init.normal_(p, std=0.3) if p.dim() == 2 else torch.nn.init.uniform_(p, 0.5, 1.5)
    return model


def allowed_logprobs(model, layout, tokens, temperature=1.0):
    """(M5) from a pass over whole rows, without a cache: log-probs of all ids that may be chosen,
    (N, T, ids), in the columns from the first chosen one on."""
    logits = model(tokens, layout.patch)[:, layout.start - 1 : -1] @ model.head.T / temperature
    return logits[..., layout.first : layout.last].log_softmax(-1)


def chosen_logprobs(model, layout, row, temperature=1.0):
    """Those of the tokens that are chosen in a row (L,), one after the other; <pad> is none."""
    every = allowed_logprobs(model, layout, row[None], temperature)[0]
    columns = [c for c in layout.columns if row[c] != PAD]
    return [every[c - layout.start, row[c] - layout.first].item() for c in columns]


def rows_of(vocab, codebook, task, n, seed=0):
    """n examples of a task as rows of tokens (n, L), reference answers included."""
    examples = [WORLD.example(random.Random(1000 * seed + i), task) for i in range(n)]
    return vocab.rows(task, examples, codebook.encode(pictures_of(examples)))


@pytest.fixture(scope="session")
def codebook():
    """Every 8x8 patch of the world without jitter: each kind and size, alike in each cell."""
    scenes = [[Object(*kind, size, 0, 0)] for kind in KINDS for size in ("small", "big")]
    return Codebook.fit(np.stack([render(scene) for scene in scenes]), 1024, patch=8)


@pytest.fixture(scope="session")
def vocab(codebook):
    return Vocabulary.build(WORLD.texts(random.Random(0), 3000), len(codebook.entries), 16)


@pytest.fixture(scope="session")
def model(vocab, codebook):
    """`lively` in float64, where two ways to compute the same thing agree to nine digits."""
    return lively(vocab, codebook).double()


@pytest.fixture(scope="session")
def smoke(tmp_path_factory):
    """The folder of one finished smoke run. Tests may read it, and write into a copy."""
    folder = tmp_path_factory.mktemp("runs") / "smoke"
    argv = [sys.executable, "train.py", "--preset", "smoke", "--device", "cpu", "--out", folder]
    done = subprocess.run(argv, cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-3000:]
    return folder


@pytest.fixture
def clothes(tmp_path):
    """A folder of Fashion-MNIST: 40 and 20 pictures, each class in its own shade of grey."""
    root, rng = tmp_path / "fashion_mnist", np.random.default_rng(0)
    root.mkdir()
    for prefix, n in {"train": 40, "t10k": 20}.items():
        labels = np.arange(n) % 10
        pictures = 20 + 20 * labels[:, None, None] + rng.integers(0, 5, (n, 28, 28))
        for name, content in (("images-idx3", pictures), ("labels-idx1", labels)):
            header = np.array([0x800 + content.ndim, *content.shape], ">u4").tobytes()
            with gzip.open(root / f"{prefix}-{name}-ubyte.gz", "wb") as file:
                file.write(header + content.astype(np.uint8).tobytes())
    return root


@pytest.fixture
def grids(tmp_path):
    """A folder of SHAPES: four questions a split; two of val are also in the training splits."""
    rng, folder = random.Random(0), tmp_path / "shapes/shapes_dataset"
    folder.mkdir(parents=True)
    x = "is a circle red", "is a red shape red", "is a circle above a square", "is a square green"
    y = x[2:] + ("is a triangle blue", "is a circle left of a square")
    for split, questions in {"train.tiny": x, "train.small": x, "val": y}.items():
        pictures = np.stack([render_grid(rng, sample_grid(rng)) for _ in questions])
        np.save(folder / f"{split}.input.npy", pictures[:, 1:31, 1:31, ::-1])  # 30x30; B, G, R
        (folder / f"{split}.query_str.txt").write_text("".join(f"{q}\n" for q in questions))
        (folder / f"{split}.output").write_text("true\nfalse\n" * 2)
    return folder.parent


@pytest.fixture
def command(capsys, monkeypatch):
    """Run a root file as a command in this process: file, *argv -> status, out, err."""

    def run(file, *argv):
        capsys.readouterr()  # what was printed before is not this command's
        monkeypatch.setattr(sys, "argv", [str(file), *map(str, argv)])
        try:
            runpy.run_path(str(ROOT / file), run_name="__main__")
            status = 0
        except SystemExit as end:
            status = end.code or 0
        return SimpleNamespace(status=status, **capsys.readouterr()._asdict())

    handlers = [(number, signal.getsignal(number)) for number in (signal.SIGINT, signal.SIGTERM)]
    yield run
    for handler in handlers:  # train.py listens to both
        signal.signal(*handler)
