"""The scripts of results/: claims from runs, ablations, a run as a page."""

import csv
import doctest
import importlib
import itertools
import json
import re
import shutil
import subprocess
import sys
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from conftest import ROOT

import data
import eval as evaluation
import train
from train import read_log

sys.path.insert(0, str(ROOT / "results"))
SCRIPTS = "ablate", "check_step", "claims", "dose", "launch", "recompute", "report", "reproduce"
(ablate, check_step, claims, dose, launch, recompute, report,
 reproduce) = map(importlib.import_module, SCRIPTS)  # fmt: skip


def pretend_run(folder, method, seed, right, base=0.25):
    """A finished run with made-up outcomes: a share of 40 items is right in every metric."""
    metrics = [metric for group in evaluation.METRICS.values() for metric in group]
    sweep = [{"temperature": 1.0, "compose": right, "diversity": 0.5, "differ": 0.5}]
    result, items = {"sweep": {}, "best_temperature": {}, "judge_accuracy": 1.0}, {}
    for model, share in {"base": base, "aligned": right}.items():
        items[model] = dict.fromkeys(metrics, [float(i < share * 40) for i in range(40)])
        number = {"value": share, "low": 0.0, "high": 1.0, "n": 40}
        result[model] = {k: dict.fromkeys(group, number) for k, group in evaluation.METRICS.items()}
        result["sweep"][model], result["best_temperature"][model] = sweep, 1.0
    seconds = {"align": 7.0, "evaluate": 9.0} | ({"clip": 5.0} if method == "lvrpo" else {})
    meta = {"data": "synthetic", "method": method, "seed": seed, "seconds": seconds}
    meta |= dict.fromkeys(("preset", "threads", "machine", "versions", "noise", "commit"), "x")
    log = "stage,step,labels,tokens,reward_draw,kl_draw\npretrain,0,0,1000,,\n"
    log += "".join(f"align,{k},3,50,{k},{k / 10}\n" for k in range(8))
    folder.mkdir(parents=True)
    (folder / "metrics.csv").write_text(log)
    (folder / "items.json").write_text(json.dumps({"synthetic": items}))
    (folder / "config.json").write_text(json.dumps({"method": method, "seed": seed}))
    (folder / "new").write_text(json.dumps(result | {"meta": meta}))
    (folder / "new").rename(folder / "eval.json")  # whole, or not there, as train.py writes it


def test_the_examples_run_and_students_t_of_two_seeds_is_wide():
    assert doctest.testmod(claims) == (0, 3)
    assert claims.student_t([0.0, 1.0]) == (0.5 - 6.353, 0.5 + 6.353)  # 12.706 * sqrt(1/2) / sqrt 2
    assert claims.student_t([0.3]) == (None, None)


def test_the_bootstrap_draws_seeds_and_then_items():
    assert claims.bootstrap([np.full(50, 0.2), np.full(50, 0.2)]) == (0.2, 0.2)
    apart = claims.bootstrap([np.full(50, 0.0), np.full(50, 0.4)])
    assert apart == (0.0, 0.4)  # both draws may be the same seed
    normal = [np.random.default_rng(i).normal(0.1, 1.0, 400) for i in range(30)]
    (low, high), seeds = claims.bootstrap(normal), np.var([x.mean() for x in normal])
    half = 1.96 * np.sqrt((1 / 400 + seeds) / 30)  # variance of items, variance of seeds
    assert (high - low) / 2 == pytest.approx(half, rel=0.15)


def test_a_verdict_needs_an_interval_without_0_and_knows_what_lower_means():
    def runs(values):
        return {str(s): {"numbers": {"frechet_three": v, "vqa": v, "front": []}, "items": {}}
                for s, v in enumerate(values)}

    ours, theirs = runs([0.10, 0.12, 0.11]), runs([0.20, 0.21, 0.22])
    row = claims.judge(ours, theirs, "frechet_three", 0.0)
    assert row["difference"] == -0.1 and row["high"] < 0 and row["verdict"] == "replicated"
    assert claims.judge(ours, theirs, "vqa", 0.03)["verdict"] == "not replicated"
    assert claims.judge(theirs, ours, "vqa", 0.2)["verdict"] == "direction only"
    one = claims.judge(runs([0.5]), runs([0.1]), "vqa", 0.0)
    assert one["low"] is None and one["verdict"] == "undetermined"
    assert claims.judge(ours, theirs, "caption", 0.0) == {}


def test_claims_are_judged_by_pairs_of_the_runs_that_are_there(tmp_path):
    for method, right in {"lvrpo": 0.5, "unified": 0.475, "clip": 0.6, "dpo": 0.5}.items():
        for seed in (0, 1) if method != "dpo" else (0,):
            pretend_run(tmp_path / "runs" / f"{method}-{seed}", method, seed, right)
    done = claims.write(claims.collect(tmp_path / "runs"), tmp_path)
    assert json.loads((tmp_path / "claims.json").read_text()) == done
    assert list(done["methods"]) == ["lvrpo", "base", "unified", "clip", "dpo"]
    assert set(done["information"]) == {"lvrpo", "unified", "clip", "dpo"}
    vqa = {method: numbers["vqa"] for method, numbers in done["methods"].items()}
    assert vqa["lvrpo"]["seeds"] == [0.5, 0.5] and vqa["base"]["mean"] == 0.25
    rows = {(r["metric"], r["against"]): (r["difference"], r["verdict"]) for r in done["claims"]}
    assert rows["vqa", "unified"] == (0.025, "direction only")  # no spread over seeds: no width
    assert rows["vqa", "clip"] == (-0.1, "not replicated")
    assert rows["multihop_three", "base"] == (0.25, "replicated")
    assert rows["compose @ equal diversity", "unified"][0] == 0.025
    # Eight steps of 3 labels and 50 tokens; whom CLIP rewards also pays for its seconds.
    assert done["ledger"]["lvrpo"] == {"labels": 24.0, "tokens": 400.0, "seconds": 12.0}
    assert [done["ledger"][m]["seconds"] for m in ("unified", "dpo")] == [7.0, 12.0]
    text = (tmp_path / "claims.md").read_text()
    assert "vqa | clip (n=2) | -0.100 |" in text and "dpo (n=1)" in text
    assert (tmp_path / "claims.png").stat().st_size > 1000
    assert recompute.recompute(tmp_path) == (text, [])
    (tmp_path / "claims.md").write_text(text.replace("-0.100", "+0.100"))
    assert recompute.recompute(tmp_path)[1] == ["claims.md"]


def test_the_committed_tables_come_out_of_the_committed_outcomes(command):
    done = command("results/recompute.py")
    assert done.status == 0 and "the committed tables come out of it" in done.out


MARKS = {"replicated": "✓", "direction only": "↑", "undetermined": "?", "not replicated": "✗"}


def test_the_readme_says_what_the_study_found():
    done = json.loads((ROOT / "results/claims.json").read_text(encoding="utf-8"))
    text = (ROOT / "README.md").read_text(encoding="utf-8")
    row = r"\| ([^|]+) \| `([\w @]+)` \| ([+−])([\d.]+) ± ([\d.]+) \| ([✓↑?✗ ]+) \|"
    rows = re.findall(row, text)
    assert len(rows) == 5
    for words, metric, sign, difference, half, marks in rows:
        part, others = ("real", ["unified"]) if "clothes" in words else ("claims", claims.BASELINES)
        claims_of = {c["against"]: c for c in done[part] if c["metric"] == metric}
        c = claims_of["unified"]
        assert (sign == "+") == (c["difference"] > 0)
        assert difference == f"{abs(c['difference']):.3f}"
        assert half == f"{c['high'] - c['difference']:.3f}"
        assert marks.split() == [MARKS[claims_of[other]["verdict"]] for other in others]


def test_every_method_starts_from_the_base_of_its_seed(tmp_path, monkeypatch):
    started = {}

    def instead(out, seed, method="lvrpo", **flags):
        started[str(out.relative_to(tmp_path / "runs"))] = flags.get("base", "")
        pretend_run(out, method, seed, 0.5)

    monkeypatch.setattr(reproduce, "trained", instead)
    out, variants = tmp_path / "runs", len(reproduce.ABLATIONS)
    text = reproduce.reproduce(out, tmp_path, "cpu", seeds=2, real_seeds=1)
    assert len(started) == 2 * 8 + 2 + 2 * variants and started["lvrpo-1"] == ""
    assert started["dpo-0"] == started["ablations/kl-0-0"] == str(out / "lvrpo-0")
    assert started["real/unified-0"] == str(out / "real" / "lvrpo-0") and "dpo (n=2)" in text
    done = json.loads((tmp_path / "claims.json").read_text())
    against = dict.fromkeys(row["against"] for row in done["ablations"])
    assert list(against) == sorted(reproduce.ABLATIONS)


def test_a_dose_of_noise_is_that_of_its_own_runs_alone(tmp_path, monkeypatch):
    seen, place = [], [str(tmp_path), 0.4]
    monkeypatch.setitem(data.NOISE, "answer", data.NOISE["answer"])  # both are put back
    monkeypatch.setattr(train, "SHOWN", train.SHOWN)
    monkeypatch.setattr(train, "main", lambda config: seen.append(
        (config, data.NOISE["answer"], train.SHOWN)))  # fmt: skip
    for name in dose.METHODS:
        dose.one(*place, name, 3, "smoke")
    configs, doses, shown = zip(*seen)
    assert doses == (0.4,) * 3 and shown == (0.5, 0.5, 0.0)
    base = str(tmp_path / "lvrpo-0.4-3")
    assert [c.method for c in configs] == ["lvrpo", "unified", "unified"]
    assert [c.base for c in configs] == ["", base, base] and configs[0].out == base
    assert {(c.seed, c.tasks, c.threads) for c in configs} == {(3, "vqa,multihop,text", 1)}
    for name, d in itertools.product(dose.METHODS, dose.DOSES):
        pretend_run(tmp_path / f"{name}-{d}-0", "lvrpo", 0, 0.5 + d / 4 * (name == "lvrpo"))
    dose.one(str(tmp_path), 0.7, "lvrpo", 0, "smoke")  # is finished
    assert len(seen) == 3
    values = dose.collected(tmp_path, 1)
    row = dose.table(values).splitlines()[-4]
    assert row == "| 70% | `vqa` | 0.250 | 0.675 | 0.500 | 0.500 | 0.175 | 0.175 |"
    dose.figure(values, tmp_path / "dose.png")
    assert (tmp_path / "dose.png").stat().st_size > 5000


@pytest.mark.parametrize("task", ["draw", "multihop"])
def test_sampler_and_loss_give_each_token_the_same_probability(smoke, task):
    run = train.Run(train.resumed({"resume": True, "out": str(smoke), "preset": "smoke"}))
    run.load_tokens()
    policy = run.policy("aligned")
    ratios = check_step.ratios(run, policy, task)
    assert len(ratios) > 100 and torch.allclose(ratios, torch.ones(len(ratios)), atol=1e-4)
    run.config.temperature = 0.5  # in both
    assert torch.allclose(check_step.ratios(run, policy, task), torch.tensor(1.0), atol=1e-4)


def test_a_finished_run_is_kept_and_a_started_one_goes_on(tmp_path, monkeypatch):
    calls, done = [], SimpleNamespace(returncode=0)
    monkeypatch.setattr(launch.subprocess, "run", lambda argv, **_: calls.append(argv[2:]) or done)
    out, flags = tmp_path / "run", {"method": "unified", "seed": 0, "threads": 2}
    launch.trained(out, **flags)
    assert calls.pop() == f"--out {out} --method unified --seed 0 --threads 2".split()
    pretend_run(out, "unified", 0, 0.5)
    assert launch.trained(out, **flags) == out and not calls
    with pytest.raises(ValueError, match="has another method, seed"):
        launch.trained(out, method="clip", seed=1)
    (out / "eval.json").unlink()
    launch.trained(out, **flags)
    assert calls.pop() == f"--out {out} --resume --threads 2".split()
    for done.returncode, error in ((1, ValueError), (130, KeyboardInterrupt)):  # 130: Ctrl-C
        with pytest.raises(error):
            launch.trained(out, **flags)


def test_an_ablation_makes_a_table_and_shares_equal_runs(tmp_path, monkeypatch, smoke):
    folders = set()

    def instead(out, seed, kl_coef, **flags):
        folders.add(out)
        if not out.exists():
            pretend_run(out, "lvrpo", seed, 0.5 + 2 * kl_coef)
        return out

    monkeypatch.setattr(ablate, "trained", instead)
    head, *_, last = ablate.ablate("kl", smoke, tmp_path, seeds=2, jobs=2).splitlines()
    assert head.split()[:4] == ["kl", "reward", "KL", "compose"]
    assert last.startswith("0.2 ") and "0.900 ± 0.000" in last
    rows = list(csv.DictReader((tmp_path / "kl.csv").open()))
    assert len(rows) == 10 and rows[-1]["variant"] == "0.2" and float(rows[-1]["reward"]) == 6.5
    assert (tmp_path / "kl.png").stat().st_size > 1000
    ablate.ablate("reward", smoke, tmp_path, seeds=2)
    assert len(folders) == 10 + 8  # one reward's runs are those with a KL coefficient of 0.02
    for name, change in ablate.ABLATIONS["group"].items():
        assert name == f"{change['group_size']} x {change['prompts']} prompts"


@pytest.mark.parametrize("words, message", [
    ("kl", "--run"), ("kl --run nowhere", "nowhere"), ("all --run x", "choose from"),
    ("kl --run x --seeds 0", "--seeds"), ("kl --run x --seed 1", "--seed: give"),
    ("kl --run x --grpo-steps many", "--grpo-steps")])  # fmt: skip
def test_wrong_input_is_one_line(command, words, message):
    done = command("results/ablate.py", *words.split())
    assert done.status == 2 and message in done.err and done.err.count("\n") == 1


def test_the_mean_of_a_group_takes_noise_out_of_the_gradient(smoke):
    noise = ablate.gradient_noise(smoke, groups=(2, 8), samples=32, repeats=6)
    assert len(noise) == 6
    assert 0 < noise[8, "group"][0] < noise[8, "none"][0]  # all rewards are below 0


@pytest.mark.slow
def test_a_tiny_ablation_runs_and_the_second_time_finds_its_runs(smoke, tmp_path):
    flags = "--seeds 1 --grpo-steps 1 --prompts 2 --group-size 2 --eval-items 8 --eval-prompts 2"
    argv = [sys.executable, ROOT / "results/ablate.py", "reward", "--run", smoke, "--out", tmp_path]
    for started in (5, 0):
        done = subprocess.run([*argv, *flags.split()], capture_output=True, text=True)
        assert done.returncode == 0, done.stderr
        assert done.stdout.count("train.py --out") == started and "rule, contrast" in done.stdout


def test_the_report_is_one_page_that_needs_no_other_file(smoke, tmp_path, command):
    run = shutil.copytree(smoke, tmp_path / "run")
    result = json.loads((run / "eval.json").read_text())
    result["meta"]["command"] = 'train.py --out "<script>alert(1)</script>"'
    (run / "eval.json").write_text(json.dumps(result))
    done = command("results/report.py", run)
    assert done.status == 0 and done.out.strip() == str(run / "report.html")
    page = (run / "report.html").read_text(encoding="utf-8")
    assert page.count('src="data:image/png;base64,') == page.count("src=") == 3
    assert not re.search("href|url\\(|@import|<link|<script|http", page)
    assert "&lt;script&gt;" in page and "&quot;grpo_steps&quot;: 4" in page
    assert f"{result['aligned']['understanding']['vqa']['value']:.3f} [" in page
    assert (run / "curves.png").stat().st_size > 10000


def test_panels_have_something_to_show(smoke):
    log = read_log(smoke / "metrics.csv")
    lines = {p.title: [label for label, _, _ in report.lines_of(log, p)] for p in report.PANELS}
    assert lines["next-token loss"] == ["pretrain loss", "align nll"]  # not GRPO's loss
    assert lines["loss of the reward's networks"] == ["clip loss", "clip_report loss"]
    assert lines["exact KL to the base"] == ["kl_draw", "kl_caption", "kl_vqa", "kl_multihop"]
    panel = next(panel for panel in report.PANELS if "clip range" in panel.title)
    zero = [{"stage": "align", "step": "0", "clip_low_draw": "0", "clip_high_draw": "0"}]
    assert report.lines_of(zero, panel) == [] and report.all_zero(zero, panel) and panel.zero
    assert not any(report.all_zero(log, p) and report.lines_of(log, p) for p in report.PANELS)
    assert all(panel.unit for panel in report.PANELS)
    assert all(panel.log for panel in report.PANELS if "loss" in panel.title)


@pytest.mark.parametrize("name, mark, columns", [
    ("reward and judge", "act", {"reward_draw": (-3, -1), "val_compose": (0.7, 0.4)}),
    ("reward and judge", "good", {"reward_draw": (-3, -1), "val_compose": (0.7, 0.9)}),
    ("diversity", "act", {"reward_draw": (-3, -1), "val_diversity_compose": (0.8, 0.2)}),
    ("spread", "look", {"zero_spread_vqa": (0.9, 1)}), ("KL", "act", {"kl_draw": (0, 4)}),
    ("KL", "look", {"kl_draw": (0, 1)}), ("entropy", "act", {"entropy_draw": (1, 0)}),
    ("clipping", "look", {"clip_low_draw": (0.1, 0.1), "clip_high_draw": (0, 0.2)}),
    ("skipped steps", "look", {"skipped": (0, 3)})])  # fmt: skip
def test_health_sees_what_goes_wrong(name, mark, columns):
    log = [{"stage": "align", "step": str(k), "skipped": "0"} for k in range(20)]
    for column, (first, last) in columns.items():
        for k, row in enumerate(log):
            row[column] = str(first + (last - first) * k / 19)
    validity = {"world compose": 0.5, "world compose size": 0.9, "world compose count": 0.6}
    checks = report.health(log, validity)
    assert (name, mark) in {check[:2] for check in checks}
    assert ["count" in text for check, _, text in checks if check == "reward"] == [True]
