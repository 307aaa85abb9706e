"""The paper's claims, measured again: every method from the same base, seed by seed; `make reproduce`.

A run that is finished stays as it is, so an interrupted reproduction goes on where it was. Writes claims.json, claims.md
and claims.png beside this file, after every seed from what is there.

  interval of a difference: paired bootstrap; seeds are drawn with replacement, then the test items of each
  verdict: replicated = interval above 0 and mean at least what is claimed; direction only = interval above 0, mean below
           that; not replicated = interval below what is claimed; else inconclusive

    $ python results/reproduce.py --out runs/reproduce --seeds 5
"""

import argparse
import json
import os
import sys
import threading
import time
from collections import defaultdict
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))
from eval import numbers, over_seeds, trained  # noqa: E402
from model import pick_device  # noqa: E402

CLAIMS = {  # primary metric, chosen before any run: (what the paper says, the least difference that it claims)
    "vqa": ("understanding: 3 to 5 points over the baselines", 0.03),
    "clip_score": ("generation: a better CLIP score", 0.0),
    "compose": ("generation: strong controllability", 0.0),
    "multihop_three": ("reasoning: 5 to 8 points over the baselines", 0.05),
}
FURTHER = {  # what else the same claims name; not primary, and looked at after the runs
    "retrieval_i2t_r1": ("understanding, retrieval: 3 to 5 points", 0.03),
    "retrieval_t2i_r1": ("understanding, retrieval: 3 to 5 points", 0.03),
}
BASELINES, CONTROLS = ("unified", "clip", "beit"), ("labels", "reject", "dpo", "best")
MINUTES = {"lvrpo": 10, "unified": 5, "clip": 5, "beit": 5, "labels": 5, "reject": 4, "dpo": 4, "best": 2}  # of one core
CLAIM_FLAGS = {"cpu": {"eval_items": 512, "eval_prompts": 24}}  # fewer test items: thirty runs are measured


def paired_bootstrap(outcomes, draws=1000):
    """Mean over seeds and its 95% interval. outcomes: one array of items a seed (differences, when two methods are paired);
    seeds are drawn with replacement, then the items of each. With 3 to 5 seeds that differ, the interval is too narrow: 37 to
    63% as wide as Student's t over the seeds, which stands beside it."""
    rng, outcomes = np.random.default_rng(0), [np.asarray(o, float) for o in outcomes]
    again = lambda o: rng.choice(o, len(o)).mean()  # noqa: E731
    means = [np.mean([again(outcomes[s]) for s in rng.integers(len(outcomes), size=len(outcomes))]) for _ in range(draws)]
    low, high = np.quantile(means, (0.025, 0.975))
    return {"mean": round(float(np.mean([o.mean() for o in outcomes])), 4), "low": round(float(low), 4), "high": round(float(high), 4)}


def verdict(mean, low, high, least):
    """Does the interval of a difference support a claim of at least `least`?

    >>> verdict(0.06, 0.02, 0.10, 0.05), verdict(0.03, 0.01, 0.05, 0.05), verdict(0.01, -0.02, 0.04, 0.05), verdict(0.01, -0.02, 0.06, 0.05)
    ('replicated', 'direction only', 'not replicated', 'inconclusive')
    """
    if low > 0:
        return "replicated" if mean >= least else "direction only"
    return "not replicated" if high < least else "inconclusive"


def claims(out, results):
    """Judge every claim by the finished runs out/METHOD-SEED: claims.json, claims.md and claims.png in `results`."""
    runs, items = defaultdict(dict), defaultdict(dict)
    for path in sorted(Path(out).glob("*/eval.json")):
        result, found = json.loads(path.read_text(encoding="utf-8")), json.loads((path.parent / "items.json").read_text(encoding="utf-8"))
        found = found[next(iter(found))]  # of the first data set
        for method, model in ((result["meta"]["method"], "aligned"), *([("base", "base")] if result["meta"]["method"] == "lvrpo" else [])):
            runs[method][result["meta"]["seed"]] = result | {"model": model}
            items[method][result["meta"]["seed"]] = found[model]
    order = sorted(runs, key=("lvrpo", "base", *BASELINES, *CONTROLS).index)
    methods, rows = {m: {} for m in order}, []
    for method in order:
        flat = {s: numbers(r, r["model"]) for s, r in runs[method].items()}
        for metric in next(iter(flat.values())):
            values = [v[metric] for v in flat.values() if metric != "front" and v[metric] is not None]
            outcomes = [o[metric] for o in items[method].values() if metric in o] or [[v] for v in values]
            if values:
                methods[method][metric] = paired_bootstrap(outcomes) | {"seeds": values}
    for metric, (claim, least) in (CLAIMS | FURTHER).items():
        for other in order[1:]:
            pairs = [np.subtract(ours[metric], items[other][s][metric])
                     for s, ours in items["lvrpo"].items() if s in items[other] and metric in ours]  # fmt: skip
            if not pairs:
                continue
            d = paired_bootstrap(pairs)
            judged = verdict(d["mean"], d["low"], d["high"], least if other in BASELINES else 0.0)
            row = {"claim": claim, "metric": metric, "against": other, "difference": d["mean"], "low": d["low"], "high": d["high"]}
            rows.append(row | {"verdict": judged, "seeds": len(pairs), "t interval": over_seeds([p.mean() for p in pairs])})
    kinds = ("labels", "pairs", "tokens", "operations", "seconds")
    spent = lambda r: [u for stage, u in r["meta"]["ledger"].items() if stage not in ("pretrain", "clip_report")]  # noqa: E731
    ledger = {m: {k: float(np.mean([sum(u[k] for u in spent(r)) for r in by_seed.values()])) for k in kinds}
              for m, by_seed in runs.items() if m != "base"}  # fmt: skip
    first = next(iter(runs["lvrpo"].values()))["meta"]
    meta = {k: first[k] for k in ("preset", "data", "commit", "machine", "versions", "noise", "config")}
    meta |= {"command": "make reproduce", "primary": {m: {"claim": c, "least": x} for m, (c, x) in CLAIMS.items()}}
    Path(results).mkdir(parents=True, exist_ok=True)
    done = {"methods": methods, "claims": rows, "ledger": ledger, "meta": meta}
    (Path(results) / "claims.json").write_text(json.dumps(done, indent=1), encoding="utf-8")
    (Path(results) / "claims.md").write_text(claims_table(done), encoding="utf-8")
    claims_figure(rows, Path(results) / "claims.png")
    return done


def claims_table(done):
    """claims.json as Markdown: the verdicts, the methods, the ledger."""
    shown = ("vqa", "vqa_three", "retrieval_i2t_r1", "retrieval_t2i_r1", "caption", "caption_three", "compose", "compose @ best T",
             "diversity", "compose_heldout", "clip_score", "frechet", "multihop", "multihop_three", "text_nll")  # fmt: skip
    lines = ["| claim | metric | lvrpo minus | difference | 95%, bootstrap | 95%, Student's t over seeds | verdict |", "|---" * 7 + "|"]
    for r in done["claims"]:
        cells = (f"`{r['metric']}`", f"{r['against']} (n={r['seeds']})", f"{r['difference']:+.3f}", f"{r['low']:+.3f} to {r['high']:+.3f}",
                 r["t interval"])  # fmt: skip
        lines.append(f"| {r['claim']} | {' | '.join(cells)} | {r['verdict']} |")
    methods = done["methods"]
    lines += ["", "| | " + " | ".join(methods) + " |", "|---" * (len(methods) + 1) + "|"]
    for metric in shown:
        cells = ["{mean:.3f} [{low:.3f}, {high:.3f}]".format(**m[metric]) if metric in m else "-" for m in methods.values()]
        lines.append(f"| `{metric}` | {' | '.join(cells)} |")
    kinds = next(iter(done["ledger"].values()))
    lines += ["", "| after the base, a seed | " + " | ".join(kinds) + " |", "|---" * (len(kinds) + 1) + "|"]
    for method, used in done["ledger"].items():
        lines.append(f"| {method} | " + " | ".join(f"{v:,.0f}" if v < 1e9 else f"{v:.2e}" for v in used.values()) + " |")
    few = {k: v for k, v in done["meta"]["config"].items() if k in CLAIM_FLAGS["cpu"]}
    lines += ["", f"Test items: {few}. Only lvrpo, labels, reject and dpo had clean answers, and questions about three objects, "
              "in training. best also takes 8 samples, with their rewards, for every drawing and caption it is asked for."]  # fmt: skip
    return "\n".join(lines) + "\n"


def claims_figure(rows, path):
    """One panel a metric: LVRPO's difference to every other method with its interval."""
    from matplotlib.figure import Figure

    figure, panels = Figure(figsize=(14, 6.4), layout="constrained"), CLAIMS | FURTHER
    for ax, (metric, (_, least)) in zip(figure.subplots(2, len(panels) // 2).flat, panels.items()):
        some = [r for r in rows if r["metric"] == metric][::-1]
        for y, r in enumerate(some):
            ax.plot([r["low"], r["high"]], [y, y], color="C0")
            ax.plot(r["difference"], y, "o", color="C0")
        ax.axvline(0, color="black", lw=0.8)
        ax.axvline(least, color="C1", ls="--", lw=0.8)
        ax.set_yticks(range(len(some)), [f"{r['against']} (n={r['seeds']})" for r in some])
        ax.set_title(metric)
    figure.suptitle("LVRPO minus each other method, 95% interval; dashed: the least that the paper claims over its baselines")
    figure.savefig(path, dpi=80)


def reproduce(out, results, preset, seeds=5, control_seeds=3, jobs=2, **flags):
    """Train and measure every method, seed by seed, `jobs` seeds at a time with their share of the cores; judge the claims
    after each seed. Returns the tables as text."""
    plan = {s: ("lvrpo", *BASELINES, *(CONTROLS if s < control_seeds else ())) for s in range(seeds)}
    total, start, lock = sum(MINUTES[m] for methods in plan.values() for m in methods), time.monotonic(), threading.Lock()
    runs, done, failed = sum(map(len, plan.values())), [], []
    flags |= {"threads": max(1, (os.cpu_count() or 1) // jobs)} | CLAIM_FLAGS.get(preset, {})
    print(f"{runs} runs; about {total / jobs:.0f} minutes with the cpu preset. Start again to go on: finished runs are kept.")

    def one_seed(seed):
        for method in plan[seed]:
            base = {} if method == "lvrpo" else {"base": Path(out) / f"lvrpo-{seed}"}
            try:
                trained(Path(out) / f"{method}-{seed}", preset=preset, method=method, seed=seed, **base, **flags)
            except ValueError as error:  # one that diverged: the others go on without it
                failed.append(error)
            with lock:
                done.append(method)
                spent, share = (time.monotonic() - start) / 60, sum(MINUTES[m] for m in done) / total
                left = spent / share - spent
                print(f"{len(done)} of {runs}: {method}, seed {seed}, {spent:.0f} minutes; about {left:.0f} left", flush=True)
        with lock:
            claims(out, results)

    with ThreadPoolExecutor(jobs) as pool:
        list(pool.map(one_seed, plan))  # the list waits for all, and raises what one of them raised
    if failed:
        raise ValueError("; ".join(map(str, failed)))
    return (Path(results) / "claims.md").read_text(encoding="utf-8")


def main():
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--out", default="runs/reproduce", help="where the runs are kept [runs/reproduce]")
    parser.add_argument("--results", default=str(Path(__file__).parent), help="where claims.json goes [beside this file]")
    parser.add_argument("--preset", choices=("auto", "smoke", "cpu", "gpu"), default="auto", help="as in train.py [auto]")
    parser.add_argument("--device", default="auto", help="as in train.py [auto]")
    parser.add_argument("--seeds", type=int, default=5, help="of lvrpo and the baselines [5]")
    parser.add_argument("--control-seeds", type=int, default=3, help="of the controls [3]")
    parser.add_argument("--jobs", type=int, default=0, help="seeds at a time, each with its share of the cores [2; on a GPU 1]")
    args = parser.parse_args()
    preset = args.preset if args.preset != "auto" else "gpu" if pick_device(args.device)[0].type == "cuda" else "cpu"
    jobs = args.jobs or (1 if preset == "gpu" else 2)
    print(reproduce(args.out, args.results, preset, args.seeds, args.control_seeds, jobs, device=args.device))


if __name__ == "__main__":
    try:
        main()
    except (ValueError, OSError) as error:
        sys.exit(print(f"reproduce.py: {error}", file=sys.stderr) or 2)
