"""The claims: intervals, verdicts, and the files that `make reproduce` writes."""

import doctest
import importlib.util
import json
import subprocess
import sys

import numpy as np
import pytest
from conftest import ROOT

import eval as evaluation

spec = importlib.util.spec_from_file_location("reproduce", ROOT / "results" / "reproduce.py")
reproduce = importlib.util.module_from_spec(spec)
spec.loader.exec_module(reproduce)


def test_the_examples_run():
    assert doctest.testmod(reproduce) == (0, 1)


def test_the_bootstrap_interval_is_that_of_the_normal_approximation_where_that_holds():
    rng = np.random.default_rng(1)
    outcomes = [rng.normal(0.1, 1.0, 400) for _ in range(30)]  # seeds do not differ, only items do
    found = reproduce.paired_bootstrap(outcomes, draws=2000)
    assert found["mean"] == pytest.approx(np.mean(outcomes), abs=1e-4)
    spread = np.sqrt(1 / (30 * 400) + np.var([o.mean() for o in outcomes]) / 30)  # items, and seeds drawn again
    assert (found["high"] - found["low"]) / 2 == pytest.approx(1.96 * spread, rel=0.1)
    same = reproduce.paired_bootstrap([np.full(50, 0.2), np.full(50, 0.2)])
    assert same == {"mean": 0.2, "low": 0.2, "high": 0.2}
    apart = reproduce.paired_bootstrap([np.full(50, 0.0), np.full(50, 0.4)])  # all the spread lies between the seeds
    assert (apart["low"], apart["high"]) == (0.0, 0.4)


def pretend_run(folder, method, seed, right, base=0.25):
    """A finished run whose outcomes are made up: the first share of 40 items is right in every metric."""
    some = lambda share: [float(i < share * 40) for i in range(40)]  # noqa: E731
    cells = {g: {m: {"value": right, "low": 0.0, "high": 1.0, "n": 40} for m in names} for g, names in evaluation.METRICS.items()}
    metrics = [m for names in evaluation.METRICS.values() for m in names]
    sweep = [{"temperature": t, "compose": right, "diversity": 0.5, "distance": 0.1} for t in evaluation.TEMPERATURES]
    stage = dict.fromkeys(("steps", "seconds", "tokens", "labels", "pairs", "operations"), 2.0)
    meta = {"preset": "cpu", "data": "synthetic", "commit": "", "machine": "", "versions": {}, "noise": {}, "config": {}} | {
        "method": method, "seed": seed, "ledger": {"pretrain": stage, "clip": stage, method: stage}}  # fmt: skip
    result = {"base": cells, "aligned": cells, "sweep": {"base": sweep, "aligned": sweep}, "meta": meta}
    result["best_temperature"] = {"base": 0.1, "aligned": 0.1}
    folder.mkdir(parents=True)
    items = {"base": dict.fromkeys(metrics, some(base)), "aligned": dict.fromkeys(metrics, some(right))}
    (folder / "items.json").write_text(json.dumps({"synthetic": items}))
    (folder / "eval.tmp").write_text(json.dumps(result))
    (folder / "eval.tmp").rename(folder / "eval.json")  # last and whole, as train.py does


def test_claims_are_judged_by_paired_items_of_the_runs_that_are_there(tmp_path):
    for seed in (0, 1):
        for method, right in {"lvrpo": 0.5, "unified": 0.475, "clip": 0.6, "best": 0.5}.items():
            pretend_run(tmp_path / "runs" / f"{method}-{seed}", method, seed, right)
    done = reproduce.claims(tmp_path / "runs", tmp_path / "results")
    assert json.loads((tmp_path / "results" / "claims.json").read_text()) == done and set(done) == {"methods", "claims", "ledger", "meta"}
    assert list(done["methods"]) == ["lvrpo", "base", "unified", "clip", "best"]
    assert done["methods"]["base"]["vqa"]["mean"] == 0.25 and done["methods"]["lvrpo"]["vqa"]["seeds"] == [0.5, 0.5]
    found = {(r["metric"], r["against"]): (r["difference"], r["verdict"]) for r in done["claims"]}
    assert found["vqa", "unified"] == (0.025, "inconclusive") and found["vqa", "clip"] == (-0.1, "not replicated")
    assert found["vqa", "best"] == (0.0, "inconclusive") and found["multihop_three", "base"] == (0.25, "replicated")
    assert done["ledger"]["lvrpo"] == dict.fromkeys(("labels", "pairs", "tokens", "operations", "seconds"), 4.0)  # without the base
    table = (tmp_path / "results" / "claims.md").read_text()
    assert "| `vqa` | clip (n=2) | -0.100 |" in table and (tmp_path / "results" / "claims.png").stat().st_size > 1000


def test_every_method_is_trained_from_the_base_of_its_seed(tmp_path, monkeypatch):
    started = []

    def instead(out, method, seed, **flags):
        started.append((out.name, str(flags.get("base", "")), flags["threads"]))
        pretend_run(out, method, seed, 0.5)

    monkeypatch.setattr(reproduce, "trained", instead)
    monkeypatch.setattr(reproduce.os, "cpu_count", lambda: 2)
    text = reproduce.reproduce(tmp_path / "runs", tmp_path, "cpu", seeds=2, control_seeds=1, jobs=2)
    assert len(started) == 12 and {threads for *_, threads in started} == {1}
    assert {name: base for name, base, _ in started}["dpo-0"] == str(tmp_path / "runs" / "lvrpo-0") and "dpo (n=1)" in text
    assert [name for name, *_ in started if name.endswith("1")] == ["lvrpo-1", "unified-1", "clip-1", "beit-1"]


@pytest.mark.slow
def test_the_whole_reproduction_runs_tiny(tmp_path):
    command = [sys.executable, str(ROOT / "results" / "reproduce.py"), "--out", str(tmp_path / "runs"), "--results", str(tmp_path)]
    flags = "--preset smoke --device cpu --seeds 1 --control-seeds 1 --jobs 2".split()
    for _ in range(2):  # the second time finds everything there
        done = subprocess.run(command + flags, capture_output=True, text=True, timeout=900)
        assert done.returncode == 0, done.stderr
    found = json.loads((tmp_path / "claims.json").read_text())
    assert len(found["methods"]) == 9 and len(found["claims"]) == 6 * 8 and "train.py" not in done.stdout
    assert all(used["seconds"] > 0 for m, used in found["ledger"].items() if m != "best")
