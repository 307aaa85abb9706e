"""Flags, the run directory, resuming, guards; and one finished run of the smoke preset, looked at from all sides."""

import contextlib
import csv
import dataclasses
import json
import math
import os
import random
import re
import shlex
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from conftest import ROOT
from PIL import Image
from safetensors.torch import load_file
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

import eval as evaluation
import reward
import train
from data import HELDOUT_PAIRS, IMAGE, PAD, PROMPT_PAIRS, SPECIAL, TEMPLATES, World, pairs_of, parse_caption, pictures_of
from grpo import combine_rewards, group_advantages, pairwise_advantages
from train import Config, Stopped, Trainer, make_config, parse_flags, schedule

FIELDS = dataclasses.fields(Config)
TINY = dict(preset="smoke", device="cpu")


def rows(folder, name="metrics"):
    with (folder / f"{name}.csv").open(newline="", encoding="utf-8") as f:
        return list(csv.DictReader(f))


def prepared(smoke, folder, **changes):
    """The Config of a tiny run whose folder holds what the codebook stage of the smoke run left, and nothing else."""
    config = make_config(**TINY | changes, out=str(folder), resume=True)
    folder.mkdir()
    for name in ("codebook.safetensors", "tokenizer.json", "words.json"):
        shutil.copy(smoke / name, folder)
    Trainer(config).save_config()
    return config


def stored_config(folder):
    stored = json.loads((folder / "config.json").read_text(encoding="utf-8"))
    return Config(**{k: v for k, v in stored.items() if k != "environment"})


@pytest.fixture
def trainer(smoke, tmp_path):
    """A Trainer whose run has its codebook and words."""
    trainer = Trainer(prepared(smoke, tmp_path / "run"))
    trainer.load_tokens()
    return trainer


# ---------------------------------------------------------------- flags


def other_value(field):
    """A legal value that is not the default, as it would be typed."""
    if field.name in train.CHOICES:
        return {"preset": "smoke", "device": "cpu"}.get(field.name, next(v for v in train.CHOICES[field.name] if v != field.default))
    if field.type is str:
        return {"data": "fashion_mnist", "stage": "eval", "tasks": "draw,story"}.get(field.name, "elsewhere")
    return str(2 * field.default or 1)


@pytest.mark.parametrize("field", FIELDS, ids=lambda f: f.name)
def test_every_field_is_a_flag(field):
    flag = "--" + field.name.replace("_", "-")
    if field.type is bool:
        assert getattr(parse_flags([flag]), field.name) is True
        assert getattr(parse_flags(["--no-" + flag[2:]]), field.name) is False
    else:
        value = other_value(field)
        assert getattr(parse_flags([flag, value]), field.name) == field.type(value) != field.default


def test_help_explains_every_flag_with_its_default(capsys):
    with pytest.raises(SystemExit) as end:
        parse_flags(["--help"])
    text = " ".join(capsys.readouterr().out.split())
    assert end.value.code == 0
    source = (ROOT / "train.py").read_text(encoding="utf-8")
    for field in FIELDS:
        comment = re.search(rf"^    {field.name}: \w+ = .*?  # (.+)$", source, re.M)[1]
        assert "--" + field.name.replace("_", "-") in text and len(comment) > 10
        assert f"{' '.join(comment.split())} [{field.default}]" in text, field.name


@pytest.mark.parametrize("preset", train.PRESETS)
def test_a_flag_overrides_its_preset_and_the_preset_its_default(preset):
    plain, wide = parse_flags(["--preset", preset]), parse_flags(["--width", "192", "--preset", preset])
    assert all(getattr(plain, name) == value for name, value in train.PRESETS[preset].items())
    assert dataclasses.replace(wide, width=plain.width) == plain and wide.width == 192


def test_the_automatic_preset_follows_the_device_and_names_the_run():
    config = parse_flags(["--device", "cpu", "--seed", "3"])
    assert config.preset == "cpu" and config.out == "runs/lvrpo-cpu-3"
    assert parse_flags(["--preset", "smoke", "--method", "unified"]).out == "runs/unified-smoke-0"


@pytest.mark.parametrize("flags, legal", [
    (["--group-size", "1"], "--group-size 1: expected at least 2"),
    (["--width", "100"], "--width 100: expected a multiple of 2 x heads = 8"),
    (["--heads", "5"], "expected a multiple of 2 x heads = 10"), (["--lr", "nan"], "--lr nan: expected more than 0"),
    (["--patch", "5"], "--patch 5: expected 4, 8 or 16"), (["--kl-coef", "-0.1"], "--kl-coef -0.1: expected 0 or more"),
    (["--clip-low", "1"], "--clip-low 1.0: expected between 0 and 1"), (["--batch", "0"], "--batch 0: expected more than 0"),
    (["--data", "synthetick"], "--data synthetick: expected names from synthetic, fashion_mnist, .*did you mean synthetic?"),
    (["--data", "synthetic,"], "--data synthetic,: expected names"),
    (["--tasks", "draw,storys"], "--tasks draw,storys: expected all, or names from draw, caption, .*, comma-separated"),
    (["--tasks", "storie"], "did you mean story?"), (["--tasks", "text"], "--tasks text: expected a task beside text"),
    (["--tasks", "caption,story"], "--tasks caption,story: expected draw beside story and plan"),
    (["--stage", "bake"], "--stage bake: expected all, or names from codebook"),
    (["--method", "unified", "--stage", "grpo"], "--stage grpo: expected all, or names from codebook, pretrain, clip, preference, unified"),
    pytest.param(["--threads", "-1"], "--threads -1"),
    pytest.param(["--extra-steps", "-1"], "--extra-steps -1")])  # fmt: skip
def test_a_value_that_cannot_work_is_an_error_with_the_legal_ones(flags, legal):
    with pytest.raises(ValueError, match=legal) as error:
        parse_flags(flags)
    assert "\n" not in str(error.value)


@pytest.mark.parametrize("line", re.findall(r"^    \$ python (train.py.*)$", train.__doc__, re.M))
def test_the_commands_in_the_docstring_parse(line):
    script, *flags = shlex.split(line, comments=True)
    assert parse_flags([{"cuda": "cpu"}.get(flag, flag) for flag in flags])  # whether there is a GPU is another question


def test_all_tasks_are_those_of_the_templates_and_the_default_ones_are_the_worlds_first():
    assert set(make_config(tasks="all").tasks.split(",")) == set(TEMPLATES) and tuple(Config.tasks.split(",")) == World.tasks
    assert set(train.TASK_MIX) == set(TEMPLATES)
    assert set(train.GRPO_TASKS) == set(train.GRPO_PROMPTS) == set(reward.Rewards.parts) == set(TEMPLATES) - {"text"}


def test_a_config_can_be_made_from_arguments_as_from_flags():
    assert make_config(preset="smoke", group_size=8) == parse_flags(["--preset", "smoke", "--group-size", "8"])
    with pytest.raises(ValueError, match="--scale rows: expected one of group, batch, none"):
        make_config(scale="rows")


# ---------------------------------------------------------------- the smoke run


def test_the_run_leaves_the_files_of_the_design(smoke):
    there = {str(p.relative_to(smoke)) for p in smoke.rglob("*") if p.is_file()}
    assert there == {
        "config.json", "tokenizer.json", "words.json", "codebook.safetensors", "base.safetensors", "clip.safetensors",
        "clip_report.safetensors", "aligned.safetensors", "reward_validity.json", "metrics.csv", "timing.csv", "curves.png",
        "reward_validity_aligned.json", "eval.json", "items.json", "report.html", "samples.gif", "samples/base.png", "samples/aligned.png",
        "samples/before_after.png",
        "samples/grpo_0001.png", "samples/grpo_0004.png"}  # fmt: skip
    for picture in (name for name in there if name.endswith(("png", "gif"))):
        with Image.open(smoke / picture) as image:
            image.load()
            assert min(image.size) > 100 and len(image.convert("RGB").getcolors(2**24)) > 3
    assert Image.open(smoke / "samples.gif").n_frames == 2


def test_the_logs_have_one_row_a_step(smoke):
    steps = [(stage, str(step)) for stage, n in (("pretrain", 60), ("clip", 25), ("clip_report", 10), ("grpo", 4)) for step in range(n)]
    for name in ("metrics", "timing"):
        assert [(r["stage"], r["step"]) for r in rows(smoke, name)] == steps
    assert all(math.isfinite(float(r["loss"])) and float(r["grad_norm"]) > 0 and r["skipped"] == "0" for r in rows(smoke))
    assert all(float(r["seconds"]) > 0 and float(r["peak_mb"]) > 0 for r in rows(smoke, "timing"))
    losses = [float(r["loss"]) for r in rows(smoke) if r["stage"] == "pretrain"]
    assert np.mean(losses[-10:]) < 0.5 * np.mean(losses[:3])


def test_alignment_logs_reward_spread_kl_entropy_length_clipping_and_gradients_of_every_task(smoke):
    for row in (r for r in rows(smoke) if r["stage"] == "grpo"):
        for task in ("draw", "caption", "ask", "reason"):
            values = {k: float(row[f"{k}_{task}"]) for k in "reward zero_spread kl entropy length ratio clip_low clip_high k3 grad".split()}
            assert values["kl"] > -1e-6 and values["k3"] >= 0 and values["entropy"] > 0 and 0.5 < values["ratio"] < 2
            assert all(0 <= values[k] <= 1 for k in ("zero_spread", "clip_low", "clip_high"))
        assert float(row["length_draw"]) == 16 and 1 <= float(row["length_ask"]) <= 3


def test_the_pretraining_loss_pulls_in_every_alignment_step(smoke):
    grpo = [r for r in rows(smoke) if r["stage"] == "grpo"]
    assert all(float(r["grad_ptx"]) > 0.05 and float(r["nll"]) > 0 and float(r["ptx_tokens"]) > 0 for r in grpo)


def test_the_first_alignment_step_starts_at_the_base(smoke):
    first = next(r for r in rows(smoke) if r["stage"] == "grpo")
    assert all(abs(float(first[f"kl_{task}"])) < 1e-6 for task in ("draw", "caption", "ask", "reason"))


def test_an_aligned_checkpoint_holds_the_transformer_and_nothing_else(smoke):
    config, codebook, vocab = evaluation.load_run(smoke)
    width, layers, V = config["width"], config["layers"], vocab.n_text + len(codebook.entries)
    block = {"norm1.gain": width, "norm2.gain": width, "qkv.weight": 3 * width**2, "out.weight": width**2,
             "up.weight": 4 * width**2, "down.weight": 4 * width**2}  # fmt: skip
    expected = {"embed.weight": V * width, "row.weight": 4 * width, "column.weight": 4 * width, "norm.gain": width}
    expected |= {f"blocks.{i}.{name}": size for i in range(layers) for name, size in block.items()}
    for name in ("base", "aligned"):
        assert {k: t.numel() for k, t in load_file(str(smoke / f"{name}.safetensors")).items()} == expected


def test_alignment_moved_the_weights_a_little(smoke):
    base, aligned = (load_file(str(smoke / f"{name}.safetensors")) for name in ("base", "aligned"))
    moved = {k: float((aligned[k] - base[k]).norm() / base[k].norm()) for k in base}
    assert all(0 < m < 0.1 for m in moved.values()), moved


DESIGN_KEYS = {"understanding": {"vqa", "retrieval_i2t_r1", "retrieval_t2i_r1", "caption"},
               "generation": {"compose", "compose_heldout", "clip_score", "frechet", "story", "diversity"},
               "reasoning": {"visual", "multihop"}, "language": {"text_nll"}}  # fmt: skip
RATES = ("vqa", "caption", "compose", "compose_heldout", "compose_unprompted", "multihop")


def test_eval_json_has_the_keys_that_others_rely_on_and_nulls_where_there_is_nothing(smoke):
    result = json.loads((smoke / "eval.json").read_text(encoding="utf-8"))
    for name in ("base", "aligned"):
        assert set(result[name]) == set(DESIGN_KEYS)
        for group, keys in DESIGN_KEYS.items():
            assert keys <= set(result[name][group])
            for metric, cell in result[name][group].items():
                chance = {"chance"} if metric.startswith("retrieval") else set()
                assert cell is None or set(cell) == {"value", "low", "high", "n"} | chance
                if metric in RATES:
                    assert 0 <= cell["low"] <= cell["value"] <= cell["high"] <= 1 and cell["n"] == (128 if metric == "compose" else 64)
        assert [row["temperature"] for row in result["sweep"][name]] == list(evaluation.TEMPERATURES)
        assert all({"temperature", "compose", "diversity"} <= set(row) for row in result["sweep"][name])
        assert result[name]["language"]["text_nll"]["value"] > 0
    meta = result["meta"]
    assert {"preset", "method", "data", "seed", "seconds", "machine", "versions", "commit", "command"} <= set(meta)
    assert (meta["preset"], meta["method"], meta["data"], meta["seed"]) == ("smoke", "lvrpo", "synthetic", 0)
    assert set(meta["seconds"]) >= {"pretrain", "clip", "grpo", "eval"} and "train.py --preset smoke" in meta["command"]


def test_reward_validity_is_a_share_for_each_kind_of_statement(smoke):
    found = json.loads((smoke / "reward_validity.json").read_text())
    assert all(key.startswith("synthetic compose") and 0 <= value <= 1 for key, value in found.items())
    assert not any("unprompted" in key for key in found)


def test_the_stored_configuration_is_the_one_that_ran(smoke):
    stored = stored_config(smoke)
    assert stored == make_config(**TINY, out=str(smoke))


def test_stages_whose_results_are_there_are_not_done_again(smoke, tmp_path, command):
    copy = shutil.copytree(smoke, tmp_path / "copy")
    done = command("train.py", "--resume", "--out", copy)
    assert done.status == 0 and done.out.count("already there") == 5
    assert all((copy / p.name).read_bytes() == p.read_bytes() for p in smoke.glob("*.*"))


# ---------------------------------------------------------------- resuming


def interrupt_at(monkeypatch, stage, step, number=signal.SIGTERM):
    """Send this process a signal while a step is being logged, as someone else might."""
    add = train.Log.add

    def add_and_interrupt(log, name, row):
        add(log, name, row)
        if (name, row["stage"], row["step"]) == ("timing", stage, step):
            signal.raise_signal(number)

    monkeypatch.setattr(train.Log, "add", add_and_interrupt)


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_a_pretraining_that_was_interrupted_and_resumed_equals_one_that_was_not(smoke, tmp_path, handlers, monkeypatch, number):
    whole, parts = tmp_path / "whole", tmp_path / "parts"
    train.main(prepared(smoke, whole, pretrain_steps=6, stage="pretrain"))
    message = rf"interrupted in pretrain at step 3; .*--resume --out {parts}"
    with monkeypatch.context() as patch, pytest.raises(Stopped, match=message) as stopped:
        interrupt_at(patch, "pretrain", 2, number)
        train.main(prepared(smoke, parts, pretrain_steps=6, stage="pretrain"))
    assert stopped.value.status == 128 + number
    assert not (parts / "base.safetensors").exists() and len(rows(parts)) == 3
    train.main(parse_flags(f"--preset smoke --device cpu --out {parts} --resume --stage pretrain".split()))
    assert (parts / "base.safetensors").read_bytes() == (whole / "base.safetensors").read_bytes()
    assert (parts / "metrics.csv").read_bytes() == (whole / "metrics.csv").read_bytes()
    assert not list(parts.glob("state_*")) and not list(parts.glob("*.tmp"))


def test_an_alignment_that_was_interrupted_and_resumed_equals_the_smoke_run(smoke, tmp_path):
    """Samples, rewards, updates and what the watcher draws: all the same bits, in another process, with a stop in between."""
    copy = shutil.copytree(smoke, tmp_path / "copy", ignore=shutil.ignore_patterns("aligned*", "eval.json", "samples*", "curves.png"))
    config = make_config(**TINY, out=str(copy))
    for interrupted in (signal.SIGTERM, None):
        trainer = Trainer(config)
        trainer.load_tokens()
        trainer.interrupted = interrupted
        if interrupted:
            with pytest.raises(Stopped, match="interrupted in grpo at step 1"):
                trainer.grpo_stage()
        else:
            trainer.grpo_stage()
    assert (copy / "metrics.csv").read_bytes() == (smoke / "metrics.csv").read_bytes()
    ours, theirs = (load_file(str(folder / "aligned.safetensors")) for folder in (copy, smoke))
    assert all(torch.equal(ours[k], theirs[k]) for k in theirs)
    for name in ("grpo_0001.png", "grpo_0004.png"):
        assert (np.asarray(Image.open(copy / "samples" / name)) == np.asarray(Image.open(smoke / "samples" / name))).all()


def test_an_interrupt_in_the_last_step_loses_nothing(smoke, tmp_path, handlers, monkeypatch):
    folder = tmp_path / "run"
    interrupt_at(monkeypatch, "pretrain", 2)
    with contextlib.suppress(Stopped):
        train.main(prepared(smoke, folder, pretrain_steps=3, stage="pretrain"))
    assert (folder / "base.safetensors").exists() or (folder / "state_pretrain.safetensors").exists()


def test_signals_mean_again_what_they_meant_before(smoke, tmp_path, handlers):
    train.main(prepared(smoke, tmp_path / "run", pretrain_steps=1, stage="pretrain"))
    assert {number: signal.getsignal(number) for number in handlers} == handlers


def test_resuming_takes_the_stored_configuration_and_only_place_and_device_from_the_flags(smoke, tmp_path):
    copy = shutil.copytree(smoke, tmp_path / "moved")
    config = parse_flags(["--resume", "--out", str(copy), "--preset", "smoke", "--threads", "1", "--stage", "eval"])
    stored = stored_config(smoke)
    assert config == dataclasses.replace(stored, out=str(copy), resume=True, threads=1, stage="eval")
    (copy / "config.json").write_text(json.dumps(dataclasses.asdict(dataclasses.replace(stored, threads=2, device="cpu"))))
    config = parse_flags(["--resume", "--out", str(copy)])
    assert (config.threads, config.device, config.stage) == (2, "cpu", "all")  # another number of threads sums in another order
    with pytest.raises(ValueError, match=r"--grpo-steps 9: the run in .* has 4; leave it out to go on"):
        parse_flags(["--resume", "--out", str(copy), "--grpo-steps", "9"])


def test_the_same_seed_gives_the_same_weights_and_batches_and_another_seed_others(smoke, trainer):
    def start(seed):
        other = Trainer(make_config(**TINY, seed=seed, out=trainer.config.out))
        other.load_tokens()
        return other.policy().head, next(other.batches(other.packed(other.pretraining_rows(other.rng("pretrain", 0), 8)))).target

    (weights, batch), (same, again), (different, others) = start(0), start(0), start(1)
    assert torch.equal(weights, same) and torch.equal(batch, again)
    assert not torch.equal(weights, different) and not torch.equal(batch, others)


def test_saving_replaces_a_file_whole_and_leaves_no_temporary_one(tmp_path):
    path = tmp_path / "x.safetensors"
    for value in (1.0, 2.0):
        train.save_atomically({"a": torch.full((3,), value), "b": torch.eye(3).T[1:]}, path)
        assert load_file(str(path))["a"].tolist() == [value] * 3
    assert [p.name for p in tmp_path.iterdir()] == ["x.safetensors"]


def test_muon_takes_the_steps_of_the_one_in_torch():
    shapes = [(6, 4), (4, 6), (4, 4), (8, 4)]
    ours, theirs = ([torch.nn.Parameter(torch.full(s, 0.5)) for s in shapes] for _ in range(2))
    optimizers = train.Muon(ours, 0.1), torch.optim.Muon(theirs, 0.1, weight_decay=0.0, adjust_lr_fn="match_rms_adamw")
    for seed in range(3):
        for ps, optimizer in zip((ours, theirs), optimizers):
            generator = torch.Generator().manual_seed(seed)
            for p in ps:
                p.grad = torch.randn(p.shape, generator=generator)
            optimizer.step()
    for p, q in zip(ours, theirs):
        assert torch.allclose(p, q, atol=0.004) and (p - 0.5).abs().max() > 0.05  # bfloat16 has two digits


def test_a_state_that_is_loaded_is_the_state_that_was_saved(trainer, tmp_path):
    model = trainer.policy()
    optimizers = train.make_optimizers(model, 0.01)
    for step in range(2):
        model.zero_grad()
        trainer.next_token_loss(model, trainer.packed(trainer.pretraining_rows(trainer.rng("x", step), 4)))[0].backward()
        for optimizer in optimizers:
            optimizer.step()
    train.save_state(model, optimizers, [2, 0, 0, 0], tmp_path / "s.safetensors")
    again = trainer.policy()
    others = train.make_optimizers(again, 0.01)
    assert train.newest_state(again, others, tmp_path / "s.safetensors") == [2, 0, 0, 0]
    one, other = (train.flat_state(*pair, [2]) for pair in ((model, optimizers), (again, others)))
    assert one.keys() == other.keys() and all(torch.equal(one[k], other[k]) for k in one)
    assert sum(k.startswith("optimizer") for k in one) >= 2 * 5 + 8  # AdamW: two moments and a step for 5 tensors or more; Muon: 8 momenta


def test_a_machine_without_git_can_finish_a_run(monkeypatch):
    monkeypatch.setenv("PATH", "")
    assert not train.describe(make_config(**TINY))["commit"]


# ---------------------------------------------------------------- what pre-training may see


@pytest.fixture
def paired(vocab, codebook, tmp_path):
    """A Trainer that can make pre-training batches, without any run."""
    trainer = Trainer(make_config(**TINY, out=str(tmp_path)))
    trainer.vocab, trainer.codebook = vocab, codebook
    return trainer


def test_no_picture_of_three_objects_or_of_a_special_pair_comes_with_its_words(paired):
    lengths, alone = set(), {"<draw>": 0, "<caption>": 0}
    every = (paired.packed(paired.pretraining_rows(paired.rng("pretrain", step), 64)) for step in range(12))
    for batch in (b for packed in every for b in paired.batches(packed)):
        for given, target in zip(batch.tokens.tolist(), batch.target.tolist()):
            task = SPECIAL[given[1]]
            if task == "<draw>":
                caption = parse_caption(paired.vocab.decode(given[2 : given.index(IMAGE)]))
                blank = caption is None
            elif task == "<caption>":
                caption = parse_caption(paired.vocab.decode([t for t, g in zip(target, given) if g < 0]))
                blank = set(given[3:19]) == {PAD}
            else:
                continue
            alone[task] += blank
            if not blank:
                lengths.add(len(caption.mentions))
                assert not pairs_of(caption.kinds) & (HELDOUT_PAIRS | PROMPT_PAIRS)
    assert lengths == {1, 2} and min(alone.values()) > 10  # what comes alone has nothing but padding on the other side


def test_batches_made_ahead_by_other_processes_are_those_made_here(paired, capfd):
    for kind, part in (("pretrain", {}), ("masked", train.MORE["masked"])):
        make = paired.next_token(kind, None, **part)["make"]
        here, there = (list(train.ahead(make, range(3, 8), workers)) for workers in (0, 2))
        assert len(here) == 5
        for (packed, labels, seen), (packed2, labels2, seen2) in zip(here, there):
            flat, flat2 = ([x for part in p for x in part] for p in (packed, packed2))
            assert labels == labels2 and len(flat) == len(flat2) > 0 and all(np.array_equal(a, b) for a, b in zip(flat, flat2))
            assert (seen is None) == (seen2 is None) == (kind == "pretrain")
            if seen:
                assert seen[1] == seen2[1] and seen[2].random() == seen2[2].random() and np.array_equal(seen[0], seen2[0])
    assert not capfd.readouterr().err  # no warning of threads that a fork would lose


@pytest.mark.skipif(sys.platform != "linux", reason="only Linux has such processes: they are made by a fork")
def test_the_processes_that_make_batches_end_with_the_one_they_work_for():
    script = """import multiprocessing, time, numpy, train
made = train.ahead(lambda step: numpy.zeros(10**6), range(100), 2)  # more than a pipe holds: they wait to be read
next(made), print(*(p.pid for p in multiprocessing.active_children()), flush=True), time.sleep(60)"""
    parent = subprocess.Popen([sys.executable, "-c", script], cwd=ROOT, stdout=subprocess.PIPE, text=True)
    children = [Path(f"/proc/{pid}/cmdline") for pid in parent.stdout.readline().split()]
    assert len(children) == 2 and all(child.read_bytes() for child in children)
    parent.kill()
    parent.wait()
    ended = lambda child: not child.exists() or not child.read_bytes()  # a process that nobody has waited for yet has no command
    for _ in range(100):
        if all(map(ended, children)):
            break
        time.sleep(0.1)
    assert all(map(ended, children))


@pytest.mark.skipif(sys.platform != "linux", reason="only Linux has such processes: they are made by a fork")
@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_a_signal_to_all_processes_of_a_run_that_makes_batches_ahead_saves_it(tmp_path, number):
    script = f"""import sys, train
begin = train.Trainer.__init__
def with_workers(self, config):
    begin(self, config)
    self.workers = 2
train.Trainer.__init__ = with_workers
try:
    train.main(train.make_config(preset="smoke", device="cpu", threads=1, pretrain_steps=5000, batch=256, out={str(tmp_path / "run")!r}))
except train.Stopped as stopped:
    sys.exit(stopped.status)"""
    run = subprocess.Popen([sys.executable, "-c", script], cwd=ROOT, start_new_session=True, stderr=subprocess.PIPE, text=True)
    for _ in range(600):
        if (tmp_path / "run" / "metrics.csv").is_file() and len(rows(tmp_path / "run")) > 2:
            break
        time.sleep(0.1)
    os.killpg(run.pid, number)
    _, errors = run.communicate(timeout=60)
    assert run.returncode == 128 + number and "Traceback" not in errors, errors[-2000:]
    assert (tmp_path / "run" / "state_pretrain.safetensors").is_file()


def test_an_error_in_what_is_made_ahead_ends_the_run():
    with pytest.raises(ZeroDivisionError):
        list(train.ahead(lambda step: 1 // (2 - step), range(4), 2))


def test_a_batch_made_of_numbered_patches_has_the_codes_of_the_pictures(paired):
    rng = random.Random(0)
    examples = [paired.sources[0].example(rng, task) for task in ("draw", "caption", "ask", "text") for _ in range(8)]
    expected = paired.vocab.batch(examples, paired.codebook.encode(pictures_of(examples))).trim()
    (batch,) = paired.batches(paired.packed([(None, e, False) for e in examples]))
    assert all(torch.equal(a, b) for a, b in zip(batch, expected)) and batch.mask.any()


def test_the_filter_never_judges_by_words_that_no_one_may_see(paired):
    judged = []

    def believed(sources, examples, rng):
        judged.extend(examples)
        return torch.ones(len(examples), dtype=torch.bool)

    for step in range(5):
        paired.pretraining_rows(paired.rng("pretrain", step), 64, believed)
    assert judged and all(len(e.truth[0]) < 3 for e in judged if e.task in ("draw", "caption"))


# ---------------------------------------------------------------- logs and the schedule


def test_opening_a_log_drops_the_rows_of_its_stage_from_that_step_on(tmp_path):
    log = train.Log(tmp_path, "a", 0)
    for stage, step in (("a", 0), ("a", 1), ("a", 2), ("b", 0), ("b", 1), ("b", 2)):
        log.add("metrics", {"stage": stage, "step": step, "loss": 0.5} | ({"extra": 1 / 3} if stage == "b" else {}))
    train.Log(tmp_path, "b", 1)
    kept = [(r["stage"], r["step"], r["extra"]) for r in rows(tmp_path)]
    assert kept == [("a", "0", ""), ("a", "1", ""), ("a", "2", ""), ("b", "0", "0.333333")]
    train.Log(tmp_path, "a", 0)
    assert [(r["stage"], r["step"]) for r in rows(tmp_path)] == [("b", "0")]


@pytest.mark.parametrize("steps", [4, 100, 700])
def test_the_learning_rate_rises_stays_and_falls_and_is_never_zero(steps):
    shares = [schedule(step, steps) for step in range(steps)]
    peak = max(shares)
    rise, fall = shares[: shares.index(peak) + 1], shares[len(shares) - shares[::-1].index(peak) - 1 :]
    assert rise == sorted(rise) and fall == sorted(fall, reverse=True) and min(shares) > 0
    if steps >= 100:
        assert peak == 1 and len(rise) == min(30, round(steps / 10))
        assert schedule(round(0.6 * steps), steps) == 1 and schedule(steps - 1, steps) < 0.03


# ---------------------------------------------------------------- the step and its guards


def toy(model, values):
    """losses(step) for Trainer.optimise: a quadratic in the weights, times the value of the step."""

    def losses(step):
        yield {"loss": values[step] * sum(p.square().sum() for p in model.parameters())}, {"kl_draw": 0.0}

    return losses


def test_a_step_whose_loss_is_not_finite_is_skipped_and_counted(trainer):
    whole, model = trainer.policy(), trainer.policy()
    trainer.optimise("whole", whole, 4, 0.01, toy(whole, [1.0, 1.0, 1.0, 1.0]))
    seen = []
    trainer.optimise("holes", model, 4, 0.01, toy(model, [1.0, math.nan, math.inf, 1.0]), lambda step, m: seen.append(m.head.clone()) or {})
    assert torch.equal(seen[0], seen[1]) and torch.equal(seen[1], seen[2]) and not torch.equal(seen[2], seen[3])
    assert all(p.isfinite().all() for p in model.parameters()) and not torch.equal(model.head, whole.head)
    logged = rows(trainer.folder)
    assert [r["skipped"] for r in logged if r["stage"] == "holes"] == ["0", "1", "2", "2"]
    assert [r["skipped"] for r in logged if r["stage"] == "whole"] == ["0"] * 4


def test_training_stops_with_advice_after_a_few_steps_that_are_not_finite(trainer):
    model = trainer.policy()
    before = model.head.clone()
    message = "toy: the loss or gradient was not finite 6 times, last at step 5; start again with a lower learning rate than 0.01"
    with pytest.raises(Stopped, match=message) as stopped:
        trainer.optimise("toy", model, 50, 0.01, toy(model, [math.nan] * 50))
    assert stopped.value.status == 1 and torch.equal(model.head, before) and len(rows(trainer.folder)) == 5


class NoFloat64(TorchDispatchMode):
    """A device without float64, as Apple's GPUs are: an operation that makes such a tensor fails."""

    def __torch_dispatch__(self, operation, types, arguments=(), keywords=None):
        result = operation(*arguments, **(keywords or {}))
        assert all(t.dtype != torch.float64 for t in tree_leaves(result) if isinstance(t, torch.Tensor)), operation
        return result


def test_no_stage_needs_float64_which_apple_gpus_do_not_have(trainer, smoke):
    small = dict(pretrain_steps=1, clip_steps=3, grpo_steps=1, prompts=2, group_size=2, batch=4, clip_batch=4)
    trainer.config = dataclasses.replace(trainer.config, **small)
    trainer.check_reward, trainer.watcher = lambda mix: {}, lambda: None  # what only reads results may count in float64, on the CPU
    with NoFloat64():
        trainer.pretrain_stage()
        trainer.clip_stage()
        trainer.grpo_stage()
    assert [r["stage"] for r in rows(trainer.folder)] == ["pretrain", "clip", "clip", "clip", "clip_report", "grpo"]


def test_training_stops_when_the_kl_stays_out_of_range_for_five_steps_on_end(trainer):
    model, kl = trainer.policy(), [3.0, 3.0, 3.0, 3.0, 0.1, 3.0, 0.1, *[3.0] * 20]  # at step 6 another is not a number

    def losses(step):
        yield {"loss": model.head.square().sum()}, {"kl_draw": kl[step], "kl_ask": math.nan if step == 6 else 0.0}

    with pytest.raises(Stopped, match="the KL to the base passed 2.0 nats a token for five steps, last at step 9; raise --kl-coef"):
        trainer.optimise("toy", model, 25, 1e-4, losses)


@pytest.mark.parametrize("bad", [math.nan, math.inf])
def test_a_gradient_that_is_not_finite_is_skipped_even_if_the_loss_is(trainer, bad):
    model, moved = trainer.policy(), []

    def losses(step):
        gain = model.norm.gain * 1.0
        gain.register_hook(lambda gradient: gradient * (bad if step == 1 else 1.0))
        yield {"loss": gain.sum()}, {}

    trainer.optimise("toy", model, 3, 0.01, losses, lambda step, m: moved.append(m.norm.gain[0].item()) or {})
    assert moved[0] == moved[1] != moved[2] and [r["skipped"] for r in rows(trainer.folder)] == ["0", "1", "1"]
    assert [math.isfinite(float(r["grad_norm"])) for r in rows(trainer.folder)] == [True, False, True]


def aligned_with(trainer, smoke, monkeypatch, reward, **changes):
    """Align in tiny steps whose rewards go through reward(tensor): what stopped it, "" if nothing did, and the rows of its log."""
    for name in ("base", "clip"):
        shutil.copy(smoke / f"{name}.safetensors", trainer.folder)
    plain = train.Rewards.total
    monkeypatch.setattr(train.Rewards, "total", lambda self, parts: reward(plain(self, parts)))
    trainer.config = dataclasses.replace(trainer.config, epochs=1, prompts=2, group_size=2, batch=4, **changes)
    trainer.watcher = lambda: None
    try:
        trainer.grpo_stage()
    except Stopped as stopped:
        return str(stopped), rows(trainer.folder)
    return "", rows(trainer.folder)


@pytest.mark.parametrize("bad", [math.nan, math.inf])
def test_a_reward_that_is_not_finite_skips_the_step_and_six_of_them_stop_the_run(trainer, smoke, monkeypatch, bad):
    spoil = lambda r: torch.where(r == r.max(), bad, r)  # noqa: E731
    said, logged = aligned_with(trainer, smoke, monkeypatch, spoil, grpo_steps=9, ptx_coef=0.0)
    assert "grpo: the loss or gradient was not finite 6 times, last at step 5; start again with a lower" in said
    assert [r["skipped"] for r in logged] == list("12345") and not math.isfinite(float(logged[0]["reward_draw"]))
    assert not (trainer.folder / "aligned.safetensors").exists() and (trainer.folder / "base.safetensors").exists()


def test_a_constant_reward_is_seen_in_the_log_and_stops_the_run_after_twenty_steps(trainer, smoke, monkeypatch):
    said, logged = aligned_with(trainer, smoke, monkeypatch, lambda r: r * 0 + 0.5, grpo_steps=30, ptx_coef=0.0)
    assert "grpo: for twenty steps, last at step 19, all candidates of a prompt had equal rewards: there is nothing to learn" in said
    assert len(logged) == 20 and all(float(r["zero_spread_draw"]) == float(r["zero_spread_ask"]) == 1 for r in logged)


def test_a_learning_rate_a_hundred_times_too_high_is_stopped_by_the_kl_and_the_state_before_it_is_kept(trainer, smoke, monkeypatch):
    monkeypatch.setattr(train, "SAVE_SECONDS", 0)
    free = dict(kl_coef=0.0, ptx_coef=0.0)  # nothing else holds the policy back
    said, logged = aligned_with(trainer, smoke, monkeypatch, lambda r: r, grpo_steps=40, grpo_lr=0.2, **free)
    assert "grpo: the KL to the base passed 2.0 nats a token for five steps" in said and "lower --grpo-lr, from the same base" in said
    worst = [max(float(v) for k, v in r.items() if k.startswith("kl_") and v) for r in logged]
    assert all(kl > 2 for kl in worst[-5:])
    kept = train.read_tensors(trainer.folder / "state_grpo.safetensors")["progress"].tolist()
    assert kept[0] == max(i + 1 for i, kl in enumerate(worst) if kl <= 2) and kept[2] == 0  # the last step within the range


def test_the_gradient_of_a_step_is_that_of_the_sum_of_its_parts_and_each_share_is_measured():
    layer = torch.nn.Linear(2, 1, bias=False)
    x = torch.tensor([[3.0, 4.0], [1.0, 0.0]])
    layer.weight.grad = torch.ones(1, 2)  # what an earlier step left must not count
    norms = Trainer.backward(train.loss_of(layer), {"draw": layer(x[0]).sum(), "ptx": 2 * layer(x[1]).sum()})
    assert layer.weight.grad.tolist() == [[5.0, 4.0]] and norms == {"grad_draw": 5.0, "grad_ptx": 2.0}
    assert Trainer.backward(train.loss_of(layer), {"loss": layer(x[0]).sum()}) == {} and layer.weight.grad.tolist() == [[3.0, 4.0]]


def test_updates_are_clipped_to_gradients_of_norm_one(trainer):
    model, norms = trainer.policy(), []

    def losses(step):
        yield {"loss": 1e4 * model.norm.gain.sum()}, {}

    trainer.optimise("toy", model, 1, 1e-3, losses, lambda step, m: norms.append(float(m.norm.gain.grad.norm())) or {})
    assert norms == [pytest.approx(1.0, abs=1e-4)]
    assert float(rows(trainer.folder)[0]["grad_norm"]) == pytest.approx(1e4 * math.sqrt(32))


@pytest.mark.parametrize("advantage, scale", [
    ("mean", "batch"), ("mean", "group"), ("mean", "none"), ("pairwise", "batch"), ("parts", "batch")])  # fmt: skip
def test_advantages_are_those_that_the_flags_name(trainer, advantage, scale):
    torch.manual_seed(0)
    parts = {"exact": torch.randint(0, 2, (3, 4)).float(), "format": torch.randint(0, 2, (3, 4)).float()}
    weights = {"clip": 1.0, "exact": 1.0, "format": 0.2}
    total = parts["exact"] + 0.2 * parts["format"]
    trainer.config = dataclasses.replace(trainer.config, advantage=advantage, scale=scale)
    expected = {"mean": lambda: group_advantages(total, scale), "pairwise": lambda: pairwise_advantages(total),
                "parts": lambda: combine_rewards(parts, {"exact": 1.0, "format": 0.2}, "normalize_then_sum")}[advantage]()  # fmt: skip
    assert torch.equal(trainer.advantages(SimpleNamespace(rewards=total, parts=parts), weights), expected.flatten())


# ---------------------------------------------------------------- the alternative from the same base


def test_the_alternative_starts_from_the_base_of_another_run_and_takes_its_further_steps(smoke, tmp_path, handlers):
    flags = "--preset smoke --device cpu --method unified --extra-steps 3 --stage unified"
    folder = train.main(parse_flags([*flags.split(), "--base", str(smoke), "--out", str(tmp_path / "unified")]))
    assert [(r["stage"], r["step"]) for r in rows(folder)] == [("unified", "0"), ("unified", "1"), ("unified", "2")]
    for name in ("codebook.safetensors", "tokenizer.json", "base.safetensors", "clip.safetensors", "clip_report.safetensors"):
        assert (folder / name).read_bytes() == (smoke / name).read_bytes()
    base, aligned = (load_file(str(folder / f"{name}.safetensors")) for name in ("base", "aligned"))
    assert base.keys() == aligned.keys() and not torch.equal(base["embed.weight"], aligned["embed.weight"])
    assert float(rows(folder)[0]["loss"]) < 2.5  # goes on from the base: a fresh model starts above 5


def test_without_a_number_the_alternative_gets_the_steps_that_fit_the_seconds_of_reward_and_alignment(smoke, tmp_path, handlers):
    seconds = {}
    for r in rows(smoke, "timing"):
        seconds[r["stage"]] = seconds.get(r["stage"], 0) + float(r["seconds"])
    config = make_config(**TINY | {"extra_steps": 0}, method="unified", base=str(smoke), out=str(tmp_path / "unified"))
    train.take_over(config, tmp_path / "unified")
    fitting = 60 * (seconds["clip"] + seconds["grpo"]) / seconds["pretrain"]
    assert config.fitting_steps == pytest.approx(fitting, rel=0.05) and config.extra_steps == 0
    flags = "--preset smoke --device cpu --method unified --stage unified --extra-steps 0 --fitting-steps 4.4"
    folder = train.main(parse_flags([*flags.split(), "--base", str(smoke), "--out", str(tmp_path / "again")]))
    assert len(rows(folder)) == 4 and json.loads((folder / "config.json").read_text())["extra_steps"] == 4  # a resumed run takes as many


@pytest.mark.parametrize("method, stage", [
    ("clip", "contrast"), ("beit", "masked"), ("labels", "labels"), ("reject", "reject"), ("dpo", "dpo")])  # fmt: skip
def test_every_baseline_and_control_takes_its_steps_from_the_base(smoke, tmp_path, handlers, method, stage):
    flags = f"--preset smoke --device cpu --method {method} --extra-steps 2 --grpo-steps 2 --stage {stage}"
    folder = train.main(parse_flags([*flags.split(), "--base", str(smoke), "--out", str(tmp_path / method)]))
    logged = rows(folder)
    assert [(r["stage"], r["step"]) for r in logged] == [(stage, "0"), (stage, "1")]
    base, aligned = (load_file(str(folder / f"{name}.safetensors")) for name in ("base", "aligned"))
    assert base.keys() == aligned.keys() and not torch.equal(base["embed.weight"], aligned["embed.weight"])
    used = train.ledger(folder)[stage]
    assert used["steps"] == 2 and used["operations"] > 1e8 and used["tokens"] > 0
    assert (used["labels"] > 0) == (method in ("labels", "reject", "dpo"))  # the web's answers are not sure to be right
    extra = {"clip": "grad_contrast", "beit": "grad_masked", "reject": "grad_draw", "dpo": "grad_draw"}.get(method)
    assert extra is None or all(float(r[extra]) > 0 for r in logged)


def test_best_of_n_is_the_base_asked_several_times(smoke, tmp_path, handlers):
    flags = "--preset smoke --device cpu --method best --stage best"
    folder = train.main(parse_flags([*flags.split(), "--base", str(smoke), "--out", str(tmp_path / "best")]))
    assert (folder / "aligned.safetensors").read_bytes() == (smoke / "base.safetensors").read_bytes()


def test_a_slower_objective_gets_fewer_steps_for_the_same_seconds(trainer, smoke):
    shutil.copy(smoke / "base.safetensors", trainer.folder)
    slow = {"objective": lambda model, *rest: time.sleep(0.3) or model.head.sum() * 0}
    assert trainer.slowness("unified", {}) == 1.0 and trainer.slowness("slow", slow, steps=2) > 2


def test_processes_that_would_have_too_little_to_do_are_refused(monkeypatch):
    monkeypatch.setattr(train, "WORLD", 2)
    with pytest.raises(ValueError, match="--batch 8: fewer than 8 rows for each of 2 processes"):
        train.join(make_config(batch=8))
    with pytest.raises(ValueError, match="--prompts 3: 2 processes cannot share 3 prompts of draw"):
        train.join(make_config(prompts=3))


DRIVER = """
import sys, torch, data, grpo, train

def sample(model, batch, vocab, generator, temperature, group):
    # a candidate depends on its prompt alone, so that a share of a batch gets those that the whole batch would have
    rows = batch.repeat(group)
    tokens = rows.target.clone()
    for i, (row, chosen) in enumerate(zip(tokens, rows.tokens < 0)):
        own = torch.Generator().manual_seed(100 * int(row[~chosen].sum()) + i % group)
        if torch.rand((), generator=own) < 0.5:
            row[chosen] = torch.randint(data.EOS, vocab.n_text, (int(chosen.sum()),), generator=own)
    return tokens

grpo.sample, train.GRPO_PROMPTS = sample, dict.fromkeys(train.GRPO_PROMPTS, (1, 1))
train.main(train.parse_flags(sys.argv[1:]))
"""


@pytest.mark.parametrize("method, stage", [("unified", "unified"), ("lvrpo", "grpo")])
def test_two_processes_take_the_step_that_one_takes_with_the_same_batch(tmp_path, handlers, method, stage):
    (tmp_path / "driver.py").write_text(DRIVER)
    flags = "--preset smoke --device cpu --tasks ask,reason,text --threads 1 --pretrain-steps 1 --extra-steps 1 --grpo-steps 1 --epochs 1"
    flags = flags.split()
    train.main(parse_flags([*flags, "--out", str(tmp_path / "base"), "--stage", "codebook,pretrain,clip"]))
    launchers = {"one": (), "two": ("-m", "torch.distributed.run", "--standalone", "--nproc_per_node=2")}
    for name, launcher in launchers.items():
        where = ("--method", method, "--stage", stage, "--base", str(tmp_path / "base"), "--out", str(tmp_path / name))
        command = [sys.executable, *launcher, str(tmp_path / "driver.py"), *flags, *where]
        env = os.environ | {"PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"}
        done = subprocess.run(command, capture_output=True, text=True, timeout=300, env=env)
        assert done.returncode == 0, done.stderr
    one, two = (load_file(str(tmp_path / name / "aligned.safetensors")) for name in launchers)
    base = load_file(str(tmp_path / "base" / "base.safetensors"))
    assert max(float((one[k] - base[k]).abs().max()) for k in base) > 1e-3
    assert max(float((one[k] - two[k]).abs().max()) for k in base) < 1e-5
    alone, both = (rows(tmp_path / name)[0] for name in launchers)  # one writer, of the means over both
    near = lambda k: float(alone[k]) == pytest.approx(float(both[k]), rel=5e-3, abs=1e-5)  # noqa: E731  (a mean of two means over tokens)
    assert {k: (alone[k], both[k]) for k in alone if k != "stage" and not near(k)} == {}


def test_the_ledger_counts_clean_labels_and_all_operations(smoke):
    used = train.ledger(smoke)
    assert set(used) == {"pretrain", "clip", "clip_report", "grpo"} and used["pretrain"]["steps"] == 60
    assert used["pretrain"]["labels"] == used["clip"]["labels"] == 0  # the web's answers are not sure to be right
    assert used["grpo"]["labels"] > 4 * 5 and all(u["operations"] > 1e9 for u in used.values())


def test_the_pairs_kept_in_a_grpo_step_are_those_that_the_reward_believes(smoke):
    trainer = Trainer(make_config(**TINY, out=str(smoke)))
    trainer.load_tokens()
    kept, all_of_them = (trainer.pretraining_rows(trainer.rng("x", 0), 256, believed) for believed in (trainer.rewards().believes, None))
    captioned = lambda rows: sum(e.task in ("draw", "caption") for _, e, _ in rows)  # noqa: E731
    assert 0 < captioned(kept) < captioned(all_of_them) and len(all_of_them) - len(kept) == captioned(all_of_them) - captioned(kept)


def test_control_with_labels_has_clean_answers_about_three_objects_and_pretraining_has_neither(paired):
    for labelled, most in ((False, 2), (True, 3)):
        rows = [e for step in range(8) for _, e, _ in paired.pretraining_rows(paired.rng("x", step), 64, labelled=labelled)]
        assert max(len(e.truth) for e in rows if e.task in ("ask", "reason")) == most
        places = [e.answer for e in rows if e.prompt.startswith("where")]
        assert all("-" in a for a in places) if labelled else 0.5 < np.mean(["-" not in a for a in places]) < 0.9


@pytest.mark.parametrize("labelled", [False, True])
def test_no_one_is_ever_shown_the_steps_of_three_hops_and_their_answers_are_seen_without_steps(vocab, tmp_path, labelled):
    trainer, hops = Trainer(make_config(**TINY, tasks="all", out=str(tmp_path))), {"hops": set(), "steps": set()}
    for _, e, _ in (row for step in range(6) for row in trainer.pretraining_rows(trainer.rng("x", step), 64, labelled=labelled)):
        if e.task in hops:
            hops[e.task].add(e.truth[1])
            assert ("<think> </think>" in e.answer) == (e.truth[1] == 3 and e.task == "steps")
    assert hops == {"hops": {1, 2, 3}, "steps": {1, 2, 3} if labelled else {1, 2}}


def test_stories_told_with_their_pictures_show_two_objects_at_most(vocab, tmp_path):
    trainer = Trainer(make_config(**TINY, tasks="all", out=str(tmp_path)))
    every = [e for step in range(6) for _, e, _ in trainer.pretraining_rows(trainer.rng("x", step), 64)]
    rows = [e for e in every if e.task in ("story", "tell", "plan")]
    frames = [scene for e in rows for scene in (e.truth[:1] if e.task == "plan" else e.truth.scenes)]
    assert len(frames) > 60 and {*map(len, frames)} == {1, 2}
    assert not any(pairs_of(o.kind for o in scene) & (HELDOUT_PAIRS | PROMPT_PAIRS) for scene in frames)


@pytest.mark.slow
def test_a_run_with_all_tasks_learns_rewards_and_measures_each(tmp_path, handlers):
    config = make_config(**TINY, tasks="all", out=str(tmp_path / "run"), pretrain_steps=6, clip_steps=5, grpo_steps=2, eval_items=32)
    folder = train.main(config)
    result = json.loads((folder / "eval.json").read_text(encoding="utf-8"))
    for name in ("base", "aligned"):
        missing = [metric for group in result[name].values() for metric, cell in group.items() if cell is None]
        alone = ["vqa_val", "visual_val", "visual_consistency", "multihop_val", "multihop_consistency"]
        assert missing == alone  # SHAPES and NLVR alone have them
    last = rows(folder)[-1]
    for task in train.GRPO_TASKS:
        assert {f"reward_{task}", f"kl_{task}", f"grad_{task}"} <= {k for k, v in last.items() if v}
    thoughts = (folder / "samples" / "transcripts.txt").read_text(encoding="utf-8")
    assert thoughts.count("worked out: ") == thoughts.count("base: ") == thoughts.count("aligned: ") == 16
    assert Image.open(folder / "samples" / "stories.png").size == (330 + 6 * 70 + 2 * 12, 20 + 8 * 70)
    page = (folder / "report.html").read_text(encoding="utf-8")
    assert "Questions of three hops" in page and page.count("data:image/png") == 3


def test_a_contact_sheet_frames_what_the_judge_found_right_green_and_the_rest_red():
    picture, green, red = np.full((32, 32, 3), 7, np.uint8), [40, 160, 60], [210, 60, 50]
    sheet = np.asarray(train.contact_sheet([("a red circle", [picture, picture], [True, False]), ("two", [picture], [True])], words=100))
    assert sheet.shape == (2 * 70, 100 + 2 * 70, 3)
    assert sheet[0, 100].tolist() == sheet[70, 100].tolist() == green and sheet[0, 170].tolist() == red
    assert (sheet[2:66, 102:166] == 7).all() and (sheet[72:136, 172:236] == 255).all()  # the second line has one picture
    assert (sheet[:70, :100] < 100).any()  # the words
    titled = np.asarray(train.contact_sheet([("a red circle", [picture, picture], [True, False])], ("before", "after"), words=100))
    assert titled[20, 100].tolist() == green and titled[20, 182].tolist() == red  # a line for the titles, a gap between the blocks


# ---------------------------------------------------------------- the preference stage


def test_the_preference_stage_learns_a_reward_that_alignment_can_mix_with_the_clip_score(smoke, tmp_path, handlers):
    flags = "--preset smoke --device cpu --reward mix --preference-steps 3 --grpo-steps 1 --stage preference,grpo --epochs 1"
    folder = train.main(parse_flags([*flags.split(), "--base", str(smoke), "--out", str(tmp_path / "mixed")]))
    logged = rows(folder)
    assert [(r["stage"], r["step"]) for r in logged] == [("preference", "0"), ("preference", "1"), ("preference", "2"), ("grpo", "0")]
    assert all(float(r["pairs"]) == 32 and float(r["loss"]) > 0 for r in logged[:3])
    clip, preference, total = (float(logged[3][k]) for k in ("draw_clip", "draw_preference", "reward_draw"))
    assert total == pytest.approx(0.5 * clip + 0.5 * preference, abs=1e-4) and -6 <= preference < 0
    found = json.loads((folder / "preference_validity.json").read_text())
    assert 0 <= found["synthetic"]["accuracy"]["all"] <= 1 and found["synthetic"]["calibration"] and "drawings" in found
    assert train.ledger(folder)["preference"]["pairs"] == 3 * 32


def test_a_limit_of_pairs_repeats_the_same_ones(trainer, smoke, monkeypatch):
    for name in ("base", "clip"):
        shutil.copy(smoke / f"{name}.safetensors", trainer.folder)
    seen = []

    def noted(source, rng, n, **options):
        seen.append(rng.random())
        return reward.make_pairs(source, rng, n, **options)

    monkeypatch.setattr(train, "make_pairs", noted)
    trainer.config = dataclasses.replace(trainer.config, pair_limit=60, preference_steps=5)
    trainer.preference_stage()
    a, b, *rest = seen[:5]
    assert a != b and rest == [a, b, a]  # 32 pairs a step: two steps hold 60


# ---------------------------------------------------------------- health


def warnings(folder):
    return [check["says"] for check in evaluation.health(folder) if check["mark"] != "green"]


@pytest.mark.parametrize("reward_end, compose_end, diversity_end, spread, words", [
    (-1.0, 0.55, 0.6, 0.2, []),
    (-1.0, 0.30, 0.6, 0.2, ["is being hacked"]),
    (-1.0, 0.55, 0.2, 0.2, ["the policy collapses"]),
    (-3.0, 0.30, 0.2, 0.2, []),  # all of it worse: no reward is being followed
    (-1.0, 0.55, 0.6, 0.95, ["95% of the last groups to ask"]),
])  # fmt: skip
def test_a_run_is_warned_of_when_its_reward_rises_alone(tmp_path, reward_end, compose_end, diversity_end, spread, words):
    lines = ["stage,step,reward_draw,val_compose,val_diversity,zero_spread_ask", "pretrain,0,,,,"]
    for step in range(10):
        part, watched = step / 9, step in (0, 9)
        values = (-2.0 + part * (reward_end + 2.0), 0.5 + part * (compose_end - 0.5), 0.6 + part * (diversity_end - 0.6))
        lines.append(f"grpo,{step},{values[0]},{values[1] if watched else ''},{values[2] if watched else ''},{spread}")
    (tmp_path / "metrics.csv").write_text("\n".join(lines) + "\n")
    found = warnings(tmp_path)
    assert len(found) == len(words) and all(w in f for w, f in zip(words, found))


@pytest.mark.parametrize("column, values, mark, words", [
    ("kl_ask", (0.0, 0.1), "green", "0.1 nats a token from the base, to ask the furthest"),
    ("kl_ask", (0.0, 1.0), "amber", "raise --kl-coef"),
    ("kl_ask", (0.0, 3.0), "red", "raise --kl-coef"), ("entropy_draw", (2.0, 1.5), "green", "from 2.00 to 1.50 nats"),
    ("entropy_draw", (2.0, 0.9), "amber", "explores nothing"), ("entropy_draw", (2.0, 0.3), "red", "explores nothing"),
    ("clip_low_draw", (0.1, 0.1), "green", "20% of the ratios"), ("clip_low_draw", (0.2, 0.2), "amber", "fewer --epochs"),
    ("clip_low_draw", (0.4, 0.4), "red", "fewer --epochs"), ("zero_spread_ask", (1.0, 0.5), "green", "50% to ask"),
    ("zero_spread_ask", (0.0, 1.0), "amber", "harder prompts"), ("skipped", (0, 0), "green", "0 of 8 steps"),
    ("skipped", (0, 2), "amber", "2 of 8 steps (grpo) were skipped")])  # fmt: skip
def test_every_check_has_a_mark_and_says_what_to_do(tmp_path, column, values, mark, words):
    row = {"stage": "grpo", "step": 0, "reward_draw": -1.0, "clip_high_draw": 0.1, column: 0}
    lines = [",".join(row)] + [",".join(map(str, (row | {"step": i, column: values[i >= 4]}).values())) for i in range(8)]
    (tmp_path / "metrics.csv").write_text("\n".join(lines) + "\n")
    what = {"kl": "KL", "entropy": "entropy", "clip": "clipping", "zero": "spread", "skipped": "skipped steps"}[column.split("_")[0]]
    (found,) = [check for check in evaluation.health(tmp_path) if check["what"] == what]
    assert found["mark"] == mark and words in found["says"] + found["do"] and bool(found["do"]) == (mark != "green")


def test_faults_that_the_reward_does_not_see_are_named(tmp_path):
    found = {"synthetic compose": 0.8, "synthetic compose count": 0.71, "synthetic compose color": 0.99}
    (tmp_path / "reward_validity_aligned.json").write_text(json.dumps(found))
    assert warnings(tmp_path) == [
        "the reward sees only 71% of the faults of this kind in the aligned model's drawings: synthetic compose count"]  # fmt: skip


def test_a_run_without_alignment_has_nothing_to_warn_of(tmp_path):
    assert evaluation.health(tmp_path) == []


def test_what_the_base_run_measured_is_taken_over_if_it_is_the_same(smoke, tmp_path, handlers):
    flags = "--preset smoke --device cpu --method unified --extra-steps 2 --grpo-steps 2"
    folder = train.main(parse_flags([*flags.split(), "--base", str(smoke), "--out", str(tmp_path / "more")]))
    ours, theirs = (json.loads((f / "eval.json").read_text()) for f in (folder, smoke))
    assert ours["base"] == theirs["base"] and ours["sweep"]["base"] == theirs["sweep"]["base"] and ours["aligned"] != theirs["aligned"]
    items, other = (json.loads((f / "items.json").read_text())["synthetic"] for f in (folder, smoke))
    assert items["base"] == other["base"] and len(items["aligned"]["vqa"]) == 64
    assert np.mean(items["aligned"]["vqa"]) == pytest.approx(ours["aligned"]["understanding"]["vqa"]["value"], abs=1e-4)
    trainer = Trainer(make_config(**TINY, base=str(smoke), out=str(folder)))
    assert set(trainer.base_results()) == {"synthetic"}
    trainer.config.seed = 1
    assert trainer.base_results() == {}  # other scenes


@pytest.mark.slow
def test_the_gpu_preset_takes_a_step_of_every_stage(tmp_path, handlers):
    """On the CPU, with few sequences: the same model, tokens and code as on a GPU, but for float32."""
    few = "--batch 8 --clip-batch 8 --prompts 4 --group-size 2 --pretrain-steps 1 --clip-steps 3 --grpo-steps 1"
    stages = "--stage codebook,pretrain,clip,grpo"  # to measure it would take a GPU
    folder = train.main(parse_flags([*f"--preset gpu --device cpu {few} {stages} --out {tmp_path / 'gpu'}".split()]))
    assert [(r["stage"], r["step"]) for r in rows(folder)][-2:] == [("clip_report", "0"), ("grpo", "0")]
    assert all(math.isfinite(float(r["loss"])) and r["skipped"] == "0" for r in rows(folder))
    weights = load_file(str(folder / "aligned.safetensors"))
    assert sum(w.numel() for w in weights.values()) > 1e7 and weights["row.weight"].shape == (8, 384)


# ---------------------------------------------------------------- real data


def run_on(asked, out, data, **changes):
    """A whole run of a few steps on the tiny files."""
    few = dict(pretrain_steps=2, clip_steps=5, grpo_steps=1, group_size=2, prompts=2, epochs=1, eval_items=6, eval_prompts=2, codes=64)
    folder = train.main(make_config(**TINY, **few | changes, data=data, data_dir=str(asked), out=str(out)))
    return folder, json.loads((folder / "eval.json").read_text())


def test_data_sets_without_captions_train_align_and_are_measured_without_a_clip(asked, tmp_path, handlers, capsys):
    folder, found = run_on(asked, tmp_path / "run", "shapes,nlvr")
    assert "clip: nothing to learn" in capsys.readouterr().out and not list(folder.glob("clip*"))
    assert list(found["sources"]) == ["shapes", "nlvr"] and found["aligned"]["understanding"]["vqa"]["n"] == 6
    visual = found["sources"]["nlvr"]["aligned"]["reasoning"]["visual"]
    assert visual["n"] == 3 and visual["chance"] == 0.6667 and found["sources"]["nlvr"]["aligned"]["generation"]["compose"] is None
    (step,) = [r for r in rows(folder) if r["stage"] == "grpo"]
    assert {k for k in step if re.fullmatch("reward_[a-z]+", k)} == {"reward_ask", "reward_judge", "reward_reason"}
    assert 0 <= float(step["val_right"]) <= 1
    after = train.main(make_config(**TINY, data="shapes,nlvr", data_dir=str(asked), codes=64, method="unified", base=str(folder),
                                   extra_steps=1, eval_items=6, eval_prompts=2, out=str(tmp_path / "more")))  # fmt: skip
    assert json.loads((after / "eval.json").read_text())["sources"]["shapes"]["base"] == found["sources"]["shapes"]["base"]


@pytest.mark.slow
def test_one_model_learns_all_data_sets(asked, clothes, tmp_path, handlers):
    folder, found = run_on(asked, tmp_path / "run", "synthetic,fashion_mnist,shapes,nlvr", tasks="draw,caption,ask,judge", reward="mix",
                           preference_steps=2, method="lvrpo")  # fmt: skip
    cells = {name: {m for group in part["aligned"].values() for m, c in group.items() if c} for name, part in found["sources"].items()}
    assert cells["synthetic"] >= {"compose", "vqa", "visual", "visual_three", "caption"} and "visual_val" not in cells["synthetic"]
    assert cells["fashion_mnist"] >= {"compose", "vqa", "caption"} and "visual" not in cells["fashion_mnist"]
    assert cells["shapes"] == {"vqa", "vqa_val"} and cells["nlvr"] == {"visual", "visual_val", "visual_consistency"}  # no reason: no steps
    assert (folder / "samples" / "before_after.png").is_file()
