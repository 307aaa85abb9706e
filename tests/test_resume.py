"""Runs that are interrupted or killed at any moment and go on to the same bits; two processes."""

import json
import os
import random
import shlex
import shutil
import signal
import socket
import subprocess
import sys

import numpy as np
import pytest
import torch
from conftest import ROOT
from safetensors.torch import load_file
from test_train import SHORT, TINY, read_csv, read_json, run_like

import train
from train import Stopped, make_config, parse_flags

PRETENDED = ROOT.parent / "shared/tools/pretend_cuda.py"
ENVIRONMENT = os.environ | {"PYTHONPATH": str(ROOT)}
posix = pytest.mark.skipif(not hasattr(os, "fork"), reason="this system has no fork to kill")

# Runs a folder in child processes, each of which sends itself a signal before the n-th time that it
# opens, renames or removes a file of the folder. Between two of these nothing on the disk changes,
# so no other moment is different. No result is ever written under its final name.
SCRIPT = """
import json, os, pathlib, sys, traceback
import train

def attempt(folder, number, left, flags):
    def count(event, arguments):
        nonlocal left
        files = ("open", "os.rename", "os.remove", "os.mkdir", "shutil.copyfile")
        if event not in files or folder.name not in str(arguments[0]):
            return
        path = pathlib.Path(str(arguments[0]))
        if event == "open" and set(str(arguments[1])) & set("wax"):
            whole = path.name.startswith("writing-") or path.name == "lock"
            assert whole or path.suffix == ".png", path  # pictures are drawn again
        left -= 1
        if left == 0:
            os.kill(os.getpid(), number)
    sys.addaudithook(count)
    try:
        train.main(train.parse_flags(flags))
        os._exit(0)
    except train.Stopped as stopped:
        os._exit(stopped.status)
    except KeyboardInterrupt:
        os._exit(130)
    except BaseException:
        traceback.print_exc()
    os._exit(1)

for out, attempts, flags in json.loads(sys.argv[1]):
    for number, moment, train.SAVE_SECONDS in attempts:
        folder = pathlib.Path(out)
        where = ["--out", out, "--resume"] if (folder / "config.json").exists() else ["--out", out]
        if os.fork() == 0:
            attempt(folder, number, moment, [*flags, *where])
        print(out, os.waitstatus_to_exitcode(os.wait()[1]))
"""


def attempts_of(seed, n, last):
    """n times (a signal, its moment, seconds between two states), and once to the end."""
    rng, ways = random.Random(seed), (signal.SIGKILL, signal.SIGTERM, signal.SIGINT)
    return [(rng.choice(ways), rng.randrange(1, last), 60 * (rng.random() < 0.3)) for _ in range(n)] + [(0, 0, 60)]


def go_through(*folders):
    """Run (folder, attempts, flags); the exit status of every attempt by folder."""
    work = json.dumps([(str(folder), *rest) for folder, *rest in folders])
    done = subprocess.run([sys.executable, "-c", SCRIPT, work], capture_output=True, text=True,
                          env=ENVIRONMENT)  # fmt: skip
    assert done.returncode == 0 and "Traceback" not in done.stderr, done.stderr[-3000:]
    lines = [line.split() for line in done.stdout.splitlines() if line.startswith("/")]
    return {folder: [int(status) for out, status in lines if out == str(folder)] for folder, *_ in folders}


def assert_same(ours, theirs):
    """All files of two runs are equal, but for what tells of time and place."""
    names = [sorted(str(p.relative_to(f)) for p in f.rglob("*") if p.is_file()) for f in (ours, theirs)]
    assert names[0] == names[1]
    for name in set(names[0]) - {"timing.csv", "config.json", "eval.json"}:
        assert (ours / name).read_bytes() == (theirs / name).read_bytes(), name
    results = [read_json(folder / "eval.json") for folder in (ours, theirs)]
    assert [result.pop("meta")["seed"] for result in results] == [0, 0] and results[0] == results[1]


FLAGS = "--preset smoke --device cpu --eval-items 2 --eval-prompts 2 --batch 8 --clip-batch 8 "


@posix
@pytest.mark.parametrize("flags, last", [
    ("--method rejection --tasks draw,vqa --pretrain-steps 4 --clip-steps 5 --grpo-steps 2", 60),
    ("--method beit --extra-steps 4 --base", 40),
])  # fmt: skip
def test_a_run_stopped_at_three_moments_equals_one_that_was_not(smoke, tmp_path, flags, last):
    folders = tmp_path / "whole", tmp_path / "stopped"
    flags = (FLAGS + flags).split() + [str(smoke)] * flags.endswith("base")
    for folder in folders if "--base" not in flags else ():
        folder.mkdir()  # the codebook is the smoke run's
        for name in ("codebook.safetensors", "tokenizer.json"):
            shutil.copy(smoke / name, folder)
    statuses = go_through((folders[0], attempts_of(0, 0, 1), flags),
                          (folders[1], attempts_of(1, 3, last), flags))  # fmt: skip
    print(statuses)
    assert 0 not in statuses[folders[1]][:3] and statuses[folders[1]][3] == 0
    assert_same(*folders)
