"""Runs that are interrupted or killed at any moment go on to the same bits; several processes."""

import json
import os
import random
import re
import shlex
import shutil
import signal
import socket
import subprocess
import sys
from pathlib import Path

import pytest
from conftest import ROOT
from test_train import read_json, rows_of, run_like

import train
from train import Config, Stopped, parse_flags

PRETENDED = ROOT.parent / "shared/tools/pretend_cuda.py"

# Each attempt at a run is a child that sends itself a signal before the n-th time that it opens,
# renames or removes a file of the run (-n: right after a state is renamed). Between two of these
# nothing on the disk changes. No result may ever be written under its final name.
ATTEMPTS = """
import json, os, pathlib, sys
import torch._dynamo  # which every child would import
import train

def count(event, arguments):
    global left, after_state
    path = pathlib.Path(str(arguments[0] if arguments else ""))
    if event in ("open", "os.rename", "os.remove", "os.mkdir") and folder.name in str(path):
        if event == "open" and set(str(arguments[1])) & set("wax"):
            whole = path.name.startswith("writing-") or path.name == "lock"
            assert whole or path.suffix == ".png", path  # pictures are drawn again
        left -= after_state or moment > 0
        after_state = event == "os.rename" and "state" in path.name
        if left == 0:
            os.kill(os.getpid(), number)

folder, attempts, flags = pathlib.Path(sys.argv[1]), json.loads(sys.argv[2]), sys.argv[3:]
for number, moment, train.SAVE_SECONDS in attempts:
    left, after_state = abs(moment), False
    resume = ["--resume"] * (folder / "config.json").exists()
    if os.fork() == 0:
        sys.addaudithook(count)
        try:
            train.main(train.parse_flags([*flags, *resume, "--out", str(folder)]))
        except (train.Stopped, KeyboardInterrupt) as stopped:
            os._exit(getattr(stopped, "status", 130))
        os._exit(0)
    print("status", os.waitstatus_to_exitcode(os.wait()[1]), flush=True)
"""


def python(script, *argv):
    argv, here = [sys.executable, "-c", script, *map(str, argv)], {"PYTHONPATH": str(ROOT)}
    done = subprocess.run(argv, capture_output=True, text=True, env=os.environ | here)
    assert done.returncode == 0 and "Traceback" not in done.stderr, done.stderr[-3000:]
    return done.stdout


def go_through(folder, attempts, flags):
    """Stop a run by (signal, moment, seconds between states), then let it end; all statuses."""
    out = python(ATTEMPTS, folder, json.dumps([*attempts, (0, 0, 60)]), *flags.split())
    return [int(status) for status in re.findall("^status (.*)", out, re.M)]


def assert_same(ours, theirs):
    """All files of two runs are equal, but for what tells of time and place."""
    names = [{p.relative_to(f) for p in f.rglob("*") if p.is_file()} for f in (ours, theirs)]
    assert names[0] == names[1]
    for name in names[0] - set(map(Path, ("timing.csv", "config.json", "eval.json"))):
        assert (ours / name).read_bytes() == (theirs / name).read_bytes(), name
    results = [read_json(folder / "eval.json") | {"meta": None} for folder in (ours, theirs)]
    assert results[0] == results[1]


def test_a_run_stopped_at_three_moments_equals_one_that_was_not(smoke, tmp_path):
    flags = "--preset smoke --device cpu --method rejection --tasks draw,vqa --eval-items 2 --batch"
    flags += " 8 --pretrain-steps 4 --clip-steps 5 --grpo-steps 2 --clip-batch 8 --eval-prompts 2"
    for name in ("whole", "stopped"):
        (tmp_path / name).mkdir()  # the codebook is the smoke run's
        for file in ("codebook.safetensors", "tokenizer.json"):
            shutil.copy(smoke / file, tmp_path / name)
    assert go_through(tmp_path / "whole", [], flags) == [0]
    attempts = (signal.SIGKILL, -2, 0), (signal.SIGTERM, 31, 0), (signal.SIGKILL, 40, 0)
    assert go_through(tmp_path / "stopped", attempts, flags) == [-9, 143, -9, 0]
    assert_same(tmp_path / "stopped", tmp_path / "whole")


@pytest.mark.slow
def test_smoke_runs_stopped_at_twenty_random_moments_equal_one_that_was_not(smoke, tmp_path):
    rng, stopped, ways = random.Random(0), 0, (signal.SIGKILL, signal.SIGTERM, signal.SIGINT)
    while stopped < 20:
        moments = [rng.randrange(1, 200) for _ in range(6)]
        attempts = [(rng.choice(ways), n, 60 * (rng.random() < 0.2)) for n in moments]
        statuses = go_through(tmp_path / str(stopped), attempts, "--preset smoke --device cpu")
        assert set(statuses) <= {-9, -15, 143, 130, 0} and statuses[-1] == 0
        assert_same(tmp_path / str(stopped), smoke)
        stopped += sum(status != 0 for status in statuses)


@pytest.mark.parametrize("method", ["lvrpo", "clip", "beit"])
def test_an_interrupted_stage_says_how_to_go_on_and_ends_the_same(smoke, tmp_path, method):
    few = dict(method=method, extra_steps=3, grpo_steps=3, prompts=2, batch=32)
    whole, parts = (run_like(smoke, tmp_path / name, **few) for name in ("whole", "in two parts"))
    train.align(whole)
    parts.interrupted = signal.SIGTERM  # as if it had come in the first step
    with pytest.raises(Stopped, match="interrupted in align at step 1; go on with: ") as stopped:
        train.align(parts)
    assert stopped.value.status == 128 + signal.SIGTERM
    words = shlex.split(str(stopped.value).split(": ")[1])  # what a shell makes of it
    again = train.Run(parse_flags(words[2:]))
    again.load_tokens()
    train.align(again)
    for name in ("metrics.csv", "aligned.safetensors"):
        assert (whole.folder / name).read_bytes() == (parts.folder / name).read_bytes()


def test_a_log_drops_later_rows_of_its_stage_and_takes_new_columns(smoke, tmp_path):
    run = run_like(smoke, tmp_path / "run")
    for stage, *steps in (("a", 0, 1, 2), ("b", 0, 1, 2), ("b", 1), ("a", 2)):
        with train.Log(run, "metrics", stage, steps[0]) as log:
            for step in steps:
                log.add(step, {stage: len(steps)})
    rows = [" ".join(row.values()) for row in rows_of(run.folder)]
    assert rows == ["a 0 3 ", "a 1 3 ", "b 0  3", "b 1  1", "a 2 1 "]


def test_one_process_at_a_time_resumes_and_a_finished_run_stays(smoke, tmp_path, command):
    resume = "train.py", "--resume", "--out", shutil.copytree(smoke, tmp_path / "run")
    with train.locked(resume[-1]):
        done = command(*resume)
    assert done.status == 2 and done.err.count("\n") == 1 and "another process" in done.err
    assert command(*resume).status == 0  # the lock ended
    files = [p for p in resume[-1].rglob("*") if p.is_file()]
    assert all(p.read_bytes() == (smoke / p.relative_to(resume[-1])).read_bytes() for p in files)


def test_a_resumed_run_keeps_its_flags_but_for_where_it_runs(smoke, clothes, tmp_path):
    folder = shutil.copytree(smoke, tmp_path / "moved")
    stored = read_json(folder / "config.json")
    stored |= {"data": "fashion_mnist", "data_dir": "gone", "tasks": ",".join(train.TASKS)}
    (folder / "config.json").write_text(json.dumps(stored))
    again = ["--resume", "--preset", "smoke", "--tasks", "all", "--out", str(folder)]
    config = parse_flags([*again, "--threads", "1", "--data-dir", str(tmp_path)])
    changed = dict(out=str(folder), resume=True, threads=1, data_dir=str(tmp_path))
    del stored["environment"]
    assert config == Config(**stored | changed) and train.Run(config).sources
    with pytest.raises(ValueError, match="gone"):
        train.Run(parse_flags(again))
    with pytest.raises(ValueError, match=r"--grpo-steps 9: the run in .* has 4"):
        parse_flags([*again, "--grpo-steps", "9"])


RANKS = """
import os, shutil, sys
import torch._dynamo
import train

out, port, *flags = sys.argv[1:]
rank = int(os.fork() == 0)
os.environ |= dict(RANK=str(rank), WORLD_SIZE="2", MASTER_ADDR="127.0.0.1", MASTER_PORT=port)
train.RANK, train.WORLD_SIZE = rank, 2
del train.STAGES[train.evaluate]
if rank == 1:  # a slower machine, which must take as many steps
    train.OBJECTIVES["clip"] = lambda *args: max(train.contrastive_loss(*args) for _ in range(4))
folder = train.main(train.parse_flags([*flags, "--out", out + "/run"]))
shutil.copytree(folder, f"{out}/{rank}")
layers = torch.nn.ModuleDict({name: torch.nn.Linear(2, 2) for name in ("blocks", "others")})
train.Updater("mean", layers, 0.1)(0.1 * (rank + 1) * sum(p.sum() for p in layers.parameters()))
assert all(torch.allclose(p.grad, torch.tensor(0.15)) for p in layers.parameters())
sys.exit(os.waitstatus_to_exitcode(os.wait()[1]) if rank == 0 else 0)
"""


def test_two_processes_with_their_own_data_go_the_same_way(smoke, tmp_path):
    with socket.create_server(("127.0.0.1", 0)) as server:
        port = server.getsockname()[1]
    flags = f"--preset smoke --device cpu --base {smoke} --method clip --extra-steps 0"
    python(RANKS, tmp_path, port, *flags.split())
    ours, theirs = ((tmp_path / rank / "aligned.safetensors").read_bytes() for rank in "01")
    assert ours == theirs
    for mine, other in zip(rows_of(tmp_path / "0"), rows_of(tmp_path / "1"), strict=True):
        assert mine["grad_norm"] == other["grad_norm"] and mine["loss"] != other["loss"]


@pytest.mark.slow
@pytest.mark.skipif(not PRETENDED.exists(), reason="the pretended GPU is not in this repository")
def test_a_gpu_would_run_every_stage(tmp_path):
    few = "--device cuda --preset gpu --width 48 --layers 2 --batch 16 --clip-batch 16 --prompts 4 "
    few += "--pretrain-steps 2 --clip-steps 3 --grpo-steps 1 --eval-items 2 --eval-prompts 2 --out"
    argv = [sys.executable, PRETENDED, "train.py", *few.split(), tmp_path / "run"]
    done = subprocess.run(argv, cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-3000:]
    assert read_json(tmp_path / "run/eval.json")["meta"]["device"].startswith("cuda")
