"""Shared by all tests: one thread, a small world, and one finished run of the smoke preset."""

import gzip
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

from data import KINDS, TEMPLATES, Example, FashionMNIST, Object, Vocabulary, make_sources, pictures_of, render  # noqa: E402
from model import Codebook  # noqa: E402

ROOT = Path(__file__).resolve().parents[1]

# The same examples on every machine, no time limit on any one of them, nothing written beside the sources.
hypothesis.settings.register_profile("repository", derandomize=True, deadline=None, database=None)
hypothesis.settings.load_profile("repository")


(WORLD,) = make_sources("synthetic", "", tasks=TEMPLATES)  # with all its tasks


def example(rng, task):
    """One example of any template."""
    if task != "judge":
        return WORLD.example(rng, task)
    shown = [WORLD.example(rng, "caption") for _ in range(rng.choice((2, 3)))]
    return Example(task, pictures_of(shown), shown[0].answer, "yes")


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


@pytest.fixture
def command(capsys, monkeypatch):
    """Run a file of ours as a command in this process: command("eval.py", "--run", folder) -> status, out, err."""
    handlers = {s: signal.getsignal(s) for s in (signal.SIGINT, signal.SIGTERM)}

    def run(*argv):
        capsys.readouterr()
        monkeypatch.setattr(sys, "argv", [*map(str, argv)])
        try:
            runpy.run_path(str(ROOT / argv[0]), run_name="__main__")
            status = 0
        except SystemExit as end:
            status = end.code or 0
        return SimpleNamespace(status=status, **capsys.readouterr()._asdict())

    yield run
    for number, handler in handlers.items():
        signal.signal(number, handler)
