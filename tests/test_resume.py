"""Runs that are killed: at any write of any stage, with half a line in a log or a damaged state, and resumed to the same bits."""

import csv
import json
import os
import random
import signal
import subprocess
import sys

import pytest
import torch
from conftest import ROOT
from test_train import prepared, rows, toy

import train
from model import read_tensors, save_atomically

pytestmark = pytest.mark.skipif(not hasattr(signal, "SIGKILL"), reason="this system cannot kill a process")

# A run that saves its state after every step and kills itself, as kill -9 does, before the n-th time that it opens, renames or
# removes a file of its folder. Between two of these nothing on the disk changes, so no other moment is different.
KILLED = """
import os, signal, sys
import train
train.SAVE_SECONDS, left = 0, int(sys.argv[1])
def count(event, arguments):
    global left
    if event in ("open", "os.rename", "os.remove", "os.mkdir", "shutil.copyfile") and sys.argv[2] in str(arguments[0]):
        left -= 1
        if left == 0:
            os.kill(os.getpid(), signal.SIGKILL)
sys.addaudithook(count)
train.main(train.parse_flags(sys.argv[3:]))
"""


def go_on(folder, moment, *flags):
    """Start or resume the run of a folder, to be killed at the moment, 0 for never. Was it killed?"""
    resume = ["--resume"] if (folder / "config.json").exists() else flags
    command = [sys.executable, "-c", KILLED, str(moment), folder.name, *resume, "--out", str(folder)]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, env=os.environ | {"PYTHONPATH": str(ROOT)})
    assert done.returncode in (0, -signal.SIGKILL), done.stderr[-3000:]
    return done.returncode != 0


def half_a_line(folder):
    """What a process may leave that dies while it appends to metrics.csv."""
    path = folder / "metrics.csv"
    if path.exists() and path.read_bytes().endswith(b"\n"):
        with path.open("a", encoding="utf-8", newline="") as file:
            file.write(path.read_text(encoding="utf-8").splitlines()[-1][:30])


def same(ours, theirs):
    """All files of two runs are equal, but for what tells of time and place."""
    names = [sorted(str(p.relative_to(f)) for p in f.rglob("*") if p.is_file()) for f in (ours, theirs)]
    assert names[0] == names[1]
    for name in set(names[0]) - {"timing.csv", "report.html", "config.json", "eval.json"}:
        assert (ours / name).read_bytes() == (theirs / name).read_bytes(), name
    results = [json.loads((f / "eval.json").read_text(encoding="utf-8")) for f in (ours, theirs)]
    assert [r.pop("meta")["seed"] for r in results] == [0, 0] and results[0] == results[1]


SHORT = dict(pretrain_steps=6, clip_steps=5, grpo_steps=2, batch=8, clip_batch=8, eval_items=4, eval_prompts=2)


@pytest.fixture(scope="module")
def whole(smoke, tmp_path_factory):
    """A short run, never interrupted."""
    folder = tmp_path_factory.mktemp("whole") / "run"
    train.main(prepared(smoke, folder, **SHORT))
    return folder


def test_two_runs_of_one_seed_are_equal_even_if_one_is_killed_twice(smoke, whole, tmp_path):
    folder, rng = tmp_path / "killed", random.Random(0)
    prepared(smoke, folder, **SHORT)
    for moment in (rng.randrange(5, 90), rng.randrange(5, 90)):
        assert go_on(folder, moment), "the run ended first"
        half_a_line(folder)
    assert not go_on(folder, 0)
    same(folder, whole)


@pytest.mark.slow
@pytest.mark.parametrize("seed", range(4))
def test_a_smoke_run_killed_at_up_to_five_random_moments_equals_one_that_was_not(smoke, tmp_path, seed):
    folder, rng, killed = tmp_path / "killed", random.Random(seed), 0
    while killed < 5 and go_on(folder, rng.randrange(1, 300), "--preset", "smoke", "--device", "cpu"):
        killed += 1
        half_a_line(folder)
    assert killed > 2, "the run ended first"
    go_on(folder, 0)  # to its end, if it is not there yet
    same(folder, smoke)


# ---------------------------------------------------------------- the states of a stage


@pytest.fixture
def stage(smoke, tmp_path):
    """learn(steps, values) -> the weights after a toy stage of that many steps; its states stay."""
    trainer = train.Trainer(prepared(smoke, tmp_path / "run"))
    trainer.load_tokens()

    def learn(steps, values=(1.0,) * 6, interrupted=None):
        model, trainer.interrupted = trainer.policy(), interrupted
        trainer.optimise("toy", model, steps, 0.01, toy(model, values))
        return model.head

    learn.folder, learn.path = trainer.folder, trainer.folder / "state_toy.safetensors"
    return learn


def flipped(content):
    return content[:-1000] + bytes([content[-1000] ^ 4]) + content[-999:]


DAMAGE = {"cut short": lambda b: b[:-100], "one bit flipped": flipped, "empty": lambda b: b"", "no safetensors": lambda b: b"PK\x03\x04",
          "its checksum flipped": lambda b: b[:40] + bytes([b[40] ^ 1]) + b[41:], "gone": None}  # fmt: skip


@pytest.mark.parametrize("how", DAMAGE)
def test_of_two_states_the_newer_is_used_or_where_it_is_damaged_the_one_before(stage, how, capsys, monkeypatch):
    monkeypatch.setattr(train, "SAVE_SECONDS", 0)
    expected = stage(6)
    previous, saved = stage.path.with_suffix(".previous"), []
    assert [read_tensors(p)["progress"].tolist()[0] for p in (previous, stage.path)] == [5, 6]
    stage.path.unlink(), previous.unlink()
    (stage.folder / "metrics.csv").unlink()
    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        keep = train.save_state

        def save_and_stop(*arguments):
            keep(*arguments)
            saved.append(arguments[2][0])
            if saved == [1, 2, 3]:
                raise KeyboardInterrupt

        patch.setattr(train, "save_state", save_and_stop)
        stage(6)
    content = stage.path.read_bytes()
    stage.path.unlink()
    if DAMAGE[how]:
        stage.path.write_bytes(DAMAGE[how](content))
    capsys.readouterr()
    assert torch.equal(stage(6), expected)
    out = capsys.readouterr().out
    assert "toy: goes on at step 2" in out
    assert how == "gone" or f"{stage.path} cannot be used" in out and "the state before it is looked for" in out
    assert [r["step"] for r in rows(stage.folder)] == list("012345")


def test_two_damaged_states_are_an_error_and_the_work_is_not_silently_begun_again(stage, monkeypatch):
    monkeypatch.setattr(train, "SAVE_SECONDS", 0)
    stage(2)
    for path in (stage.path, stage.path.with_suffix(".previous")):
        path.write_bytes(path.read_bytes()[:-1])
    with pytest.raises(ValueError, match=r"state_toy.previous cannot be used .*; delete it to run its stage again"):
        stage(2)


def test_a_resumed_stage_still_knows_how_many_steps_it_skipped(stage):
    holes = (1.0, float("nan"), 1.0, float("nan"), 1.0, 1.0)
    expected, path = stage(6, holes), stage.folder / "metrics.csv"
    log = path.read_bytes()
    path.unlink(), stage.path.unlink(missing_ok=True)
    with pytest.raises(train.Stopped):
        stage(6, holes, signal.SIGTERM)  # after its first step
    with pytest.raises(train.Stopped):
        stage(6, holes, signal.SIGTERM)
    assert torch.equal(stage(6, holes), expected) and path.read_bytes() == log
    assert [r["skipped"] for r in rows(stage.folder)] == list("011222")


def test_the_second_clip_goes_on_where_it_was_and_the_first_is_not_trained_again(smoke, tmp_path):
    folder, trainers = tmp_path / "run", []
    config = prepared(smoke, folder, clip_steps=5, clip_batch=8)
    for interrupted in (None, signal.SIGTERM, None):
        trainers.append(train.Trainer(config))
        trainers[-1].check_reward = lambda mix: {}  # which would take seconds, and comes after both
        trainers[-1].load_tokens()
        if interrupted is None and len(trainers) == 1:
            trainers[-1].clip_stage()
            log = (folder / "metrics.csv").read_bytes()
            weights = (folder / "clip_report.safetensors").read_bytes()
            (folder / "clip_report.safetensors").unlink()
        elif interrupted:
            trainers[-1].interrupted = interrupted
            with pytest.raises(train.Stopped, match="interrupted in clip_report at step 1"):
                trainers[-1].clip_stage()
        else:
            trainers[-1].clip_stage()
    assert (folder / "metrics.csv").read_bytes() == log and (folder / "clip_report.safetensors").read_bytes() == weights


def test_a_log_that_was_cut_in_a_line_loses_that_line_only(tmp_path):
    log = train.Log(tmp_path, "a", 0)
    for step in range(3):
        log.add("metrics", {"stage": "a", "step": step, "loss": 0.5})
    path = tmp_path / "metrics.csv"
    path.write_bytes(path.read_bytes()[:-4])
    train.Log(tmp_path, "a", 2).add("metrics", {"stage": "a", "step": 2, "loss": 0.5})
    with path.open(newline="", encoding="utf-8") as file:
        assert [r["step"] for r in csv.DictReader(file)] == ["0", "1", "2"]


def test_a_checksum_sees_names_shapes_types_and_every_bit(tmp_path):
    tensors = {"a": torch.arange(6.0).reshape(2, 3), "b": torch.tensor(1, dtype=torch.int64), "c": torch.ones(3, dtype=torch.bfloat16)}
    path = tmp_path / "x.safetensors"
    save_atomically(tensors, path)
    again, content = read_tensors(path), path.read_bytes()
    assert again.keys() == tensors.keys() and all(torch.equal(again[k], tensors[k]) for k in tensors)
    start = len(content) - sum(t.nbytes for t in tensors.values())
    for place in range(start, len(content)):
        path.write_bytes(content[:place] + bytes([content[place] ^ 1]) + content[place + 1 :])
        with pytest.raises(ValueError, match="checksum"):
            read_tensors(path)
    for old, new in ((b'"a"', b'"z"'), (b"[2,3]", b"[3,2]"), (b"I64", b"F64")):
        path.write_bytes(content.replace(old, new))
        with pytest.raises(ValueError, match="checksum"):
            read_tensors(path)


def test_a_configuration_tells_what_a_second_run_needs(whole):
    stored = json.loads((whole / "config.json").read_text(encoding="utf-8"))
    here = stored["environment"]
    assert stored["seed"] == 0 and here["device"].startswith("cpu (as asked)") and here["threads"] == torch.get_num_threads()
    assert here["versions"].keys() == {"python", "torch", "numpy", "tokenizers"} and here["versions"]["torch"] == torch.__version__
    assert {"commit", "machine"} <= here.keys()


def test_deterministic_asks_torch_for_it_and_changes_nothing_on_a_cpu(smoke, tmp_path, monkeypatch):
    monkeypatch.delenv("CUBLAS_WORKSPACE_CONFIG", raising=False)
    small = dict(pretrain_steps=3, batch=8, stage="pretrain")
    train.main(prepared(smoke, tmp_path / "plain", **small))
    assert not torch.are_deterministic_algorithms_enabled()
    try:
        train.main(prepared(smoke, tmp_path / "asked", deterministic=True, **small))
        assert torch.are_deterministic_algorithms_enabled() and os.environ["CUBLAS_WORKSPACE_CONFIG"] == ":4096:8"
    finally:
        torch.use_deterministic_algorithms(False)
    for name in ("base.safetensors", "metrics.csv"):
        assert (tmp_path / "asked" / name).read_bytes() == (tmp_path / "plain" / name).read_bytes()
