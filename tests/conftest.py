"""Shared by all tests: one thread, a small world, and one finished run of the smoke preset."""

import os
import random
import subprocess
import sys
from pathlib import Path

os.environ.setdefault("OMP_NUM_THREADS", "1")  # before torch is imported; commands that tests start inherit it
import hypothesis  # noqa: E402
import numpy as np  # noqa: E402
import pytest  # noqa: E402

from data import KINDS, Object, Vocabulary, World, render  # noqa: E402
from model import Codebook  # noqa: E402

ROOT = Path(__file__).resolve().parents[1]

# The same examples on every machine, no time limit on any one of them, nothing written beside the sources.
hypothesis.settings.register_profile("repository", derandomize=True, deadline=None, database=None)
hypothesis.settings.load_profile("repository")


@pytest.fixture(scope="session")
def codebook():
    """Every 8x8 patch of the world without jitter: each kind and size in the four cells (they look alike in each)."""
    scenes = [[Object(*kind, size, 0, 0)] for kind in KINDS for size in ("small", "big")]
    return Codebook.fit(np.stack([render(scene) for scene in scenes]), 1024, patch=8)


@pytest.fixture(scope="session")
def vocab(codebook):
    return Vocabulary.train(World().texts(random.Random(0), 3000), len(codebook.entries), codebook.side**2)


@pytest.fixture(scope="session")
def smoke(tmp_path_factory):
    """The folder of one finished `train.py --preset smoke` (about 45 s): tests may read it, and write into a copy."""
    folder = tmp_path_factory.mktemp("runs") / "smoke"
    command = [sys.executable, "train.py", "--preset", "smoke", "--device", "cpu", "--out", str(folder)]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-3000:]
    return folder
