"""Do the paper's claims hold? Verdicts from finished runs of every method; nothing is trained here.

  difference   lvrpo minus the other method, paired: both see the same test items
  interval     95%, paired bootstrap: seeds are drawn with replacement, then the items of each.
               With 3 to 5 seeds it is too narrow: Student's t over the seeds stands beside it
  verdict      by both intervals, see `verdict`; against controls the least is 0

Writes claims.json, claims.md and claims.png. reproduce.py makes the runs and calls this.

    $ python results/claims.py runs/reproduce      # 30 seconds
"""

import json
import sys
from collections import defaultdict
from pathlib import Path

import numpy as np
from launch import command
from matplotlib.figure import Figure

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from eval import T_QUANTILES, Parser, at_equal_diversity, by_source, numbers, read_result
from model import atomically
from train import read_log

CLAIMS = {  # metric: what the paper says, and the least that it claims. The first four are primary
    "vqa": ("understanding: 3 to 5 points over the baselines", 0.03),
    "clip_score": ("generation: a better CLIP score", 0.0),
    "compose": ("generation: strong controllability", 0.0),
    "multihop_three": ("reasoning: 5 to 8 points over the baselines", 0.05),
    "retrieval_i2t_r1": ("understanding, retrieval: 3 to 5 points", 0.03),
    "retrieval_t2i_r1": ("understanding, retrieval: 3 to 5 points", 0.03),
}
BASELINES, CONTROLS = ("unified", "clip", "beit"), ("sft", "rejection", "dpo", "best_of_n")


def paired_bootstrap(outcomes, draws=1000):
    """{"mean", "low", "high"} of outcomes, one array of items a seed."""
    rng, outcomes = np.random.default_rng(0), [np.asarray(o, float) for o in outcomes]
    seeds = rng.integers(len(outcomes), size=(draws, len(outcomes)))
    means = np.zeros(seeds.shape)
    for seed, items in enumerate(outcomes):
        drawn = seeds == seed
        means[drawn] = items[rng.integers(len(items), size=(drawn.sum(), len(items)))].mean(1)
    values = np.mean([o.mean() for o in outcomes]), *np.quantile(means.mean(1), (0.025, 0.975))
    return {name: round(float(v), 4) for name, v in zip(("mean", "low", "high"), values)}


def student_t(means):
    """(low, high) of the mean over two seeds or more.

    >>> student_t([0.5, 0.6, 0.7])  # 0.6 -+ 4.303 * 0.1 / sqrt 3
    (0.3516, 0.8484)
    """
    half = T_QUANTILES[min(len(means), 30) - 2] * np.std(means, ddof=1) / len(means) ** 0.5
    return tuple(round(float(np.mean(means) + sign * half), 4) for sign in (-1, 1))


def verdict(mean, low, high, least):
    """Does the interval of a difference support a claim of at least `least`?

    >>> verdict(0.06, 0.02, 0.10, 0.05), verdict(0.03, 0.01, 0.05, 0.05)
    ('replicated', 'direction only')
    >>> verdict(0.01, -0.02, 0.04, 0.05), verdict(0.01, -0.02, 0.06, 0.05)
    ('not replicated', 'inconclusive')
    """
    if low > 0:
        return "replicated" if mean >= least else "direction only"
    return "not replicated" if high < least else "inconclusive"


def finished_runs(out):
    """{method: {seed: what its run left}}, of the first data set; base: what all started from."""
    runs, order = defaultdict(dict), ("lvrpo", "base", *BASELINES, *CONTROLS)
    for path in sorted(Path(out).glob("*/eval.json")):
        result = read_result(path.parent)
        items = json.loads((path.parent / "items.json").read_text("utf-8"))
        (source, part), meta = next(iter(by_source(result).items())), result["meta"]
        log = [row for row in read_log(path.parent / "metrics.csv") if row["stage"] == "align"]
        for method, model in ((meta["method"], "aligned"), ("base", "base")):
            run = {"meta": meta, "log": log, "items": items[source][model]}
            values = numbers(part, model)
            runs[method][meta["seed"]] = run | {"front": values.pop("front"), "numbers": values}
    if not runs["lvrpo"]:
        raise ValueError(f"{out}: no run of lvrpo is finished")
    for seed in runs["lvrpo"]:
        fronts = {m: by_seed[seed]["front"] for m, by_seed in runs.items() if seed in by_seed}
        for method, values in at_equal_diversity(fronts).items():
            runs[method][seed]["numbers"] |= values
    return {method: runs[method] for method in order if method in runs}


def values_of(by_seed):
    """{metric: {"mean", "low", "high", "seeds"}} of one method."""
    rows = {}
    for metric in dict.fromkeys(m for run in by_seed.values() for m in run["numbers"]):
        values = [run["numbers"].get(metric) for run in by_seed.values()]
        outcomes = [run["items"][metric] for run in by_seed.values() if metric in run["items"]]
        if values := [v for v in values if v is not None]:
            rows[metric] = paired_bootstrap(outcomes or [[v] for v in values]) | {"seeds": values}
    return rows


def judge(ours, theirs, metric, least):
    """lvrpo's difference to a method, its intervals and verdicts; {} without a pair of runs."""
    pairs = [(ours[seed]["items"][metric], theirs[seed]["items"][metric])
             for seed in ours if seed in theirs and metric in ours[seed]["items"]]
    if not pairs:
        return {}
    assert all(len(a) == len(b) for a, b in pairs), f"{metric}: runs with other test items"
    differences = [np.subtract(a, b) for a, b in pairs]
    d, row = paired_bootstrap(differences), {"seeds": len(pairs)}
    row |= {"difference": d["mean"], "low": d["low"], "high": d["high"]}
    row |= {"verdict": verdict(*d.values(), least), "t_low": None, "t_high": None, "t_verdict": "-"}
    if len(pairs) > 1:
        low, high = student_t([x.mean() for x in differences])
        row |= {"t_low": low, "t_high": high, "t_verdict": verdict(d["mean"], low, high, least)}
    return row


def ledger(runs):
    """{method: seconds, labels, tokens after the base, means over seeds}. Seconds of CLIP, which
    lvrpo's run trains, count for every method that it rewards."""
    used = {}
    clip = np.mean([run["meta"]["seconds"].get("clip", 0) for run in runs["lvrpo"].values()])
    for method in [method for method in runs if method != "base"]:
        every, n = runs[method].values(), len(runs[method])
        totals = {"seconds": clip * (method in ("lvrpo", *CONTROLS[1:]))}
        totals["seconds"] += sum(run["meta"]["seconds"].get("align", 0) for run in every) / n
        for column in ("labels", "tokens"):
            totals[column] = sum(float(row[column]) for run in every for row in run["log"]) / n
        used[method] = {name: round(float(value), 1) for name, value in totals.items()}
    return used


def claims(out, results):
    """Judge every claim by the finished runs in `out`: claims.json, claims.md and claims.png."""
    runs, rows, results = finished_runs(out), [], Path(results)
    for metric, (claim, least) in CLAIMS.items():
        for other in list(runs)[1:]:
            row = judge(runs["lvrpo"], runs[other], metric, least if other in BASELINES else 0.0)
            rows += [{"claim": claim, "metric": metric, "against": other} | row] if row else []
    methods = {method: values_of(by_seed) for method, by_seed in runs.items()}
    meta = next(iter(runs["lvrpo"].values()))["meta"]
    done = {"methods": methods, "claims": rows, "ledger": ledger(runs), "meta": meta}
    results.mkdir(parents=True, exist_ok=True)
    texts = {"claims.json": json.dumps(done, indent=1), "claims.md": tables(done)}
    for name, text in texts.items():
        with atomically(results / name) as new:
            new.write_text(text, encoding="utf-8")
    figure(rows, results / "claims.png")
    return done


# ---------------------------------------------------------------- what is shown


def tables(done):
    """claims.json as Markdown: verdicts, then the methods side by side and what they used."""
    head = "claim | metric | lvrpo minus | difference | bootstrap | | Student's t |"
    lines, interval = [f"| {head} |", "|---" * 8 + "|"], "{:+.3f} to {:+.3f}".format
    for r in done["claims"]:
        t = interval(r["t_low"], r["t_high"]) if r["seeds"] > 1 else "-"
        cells = r["claim"], r["metric"], f"{r['against']} (n={r['seeds']})"
        cells += f"{r['difference']:+.3f}", interval(r["low"], r["high"]), r["verdict"]
        cells += t, r["t_verdict"]
        lines.append(f"| {' | '.join(cells)} |")
    methods, used = done["methods"], done["ledger"]
    lines += ["", f"| | {' | '.join(methods)} |", "|---" * (len(methods) + 1) + "|"]
    for metric in methods["lvrpo"]:
        cells = [m.get(metric) for m in methods.values()]
        cells = ["{mean:.3f} [{low:.3f}, {high:.3f}]".format(**c) if c else "-" for c in cells]
        lines.append(f"| {metric} | {' | '.join(cells)} |")
    for kind in used["lvrpo"]:
        cells = [f"{used[m][kind]:,.0f}" if m in used else "-" for m in methods]
        lines.append(f"| {kind} after the base | {' | '.join(cells)} |")
    return "\n".join(lines) + "\n"


def figure(rows, path):
    """One panel a metric: lvrpo's difference to each other method, with both intervals."""
    image = Figure(figsize=(14, 6.4), layout="constrained")
    for ax, (metric, (_, least)) in zip(image.subplots(2, 3).flat, CLAIMS.items()):
        some = [r for r in rows if r["metric"] == metric][::-1]
        for y, r in enumerate(some):
            if r["seeds"] > 1:
                ax.plot([r["t_low"], r["t_high"]], [y, y], color="0.8", lw=5)
            ax.plot([r["low"], r["high"]], [y, y], color="C0")
            ax.plot(r["difference"], y, "o", color="C0")
        ax.axvline(0, color="black", lw=0.8)
        ax.axvline(least, color="C1", ls="--", lw=0.8)
        ax.set_yticks(range(len(some)), [f"{r['against']} (n={r['seeds']})" for r in some])
        ax.set(title=metric, xlabel="difference (share or score)")
    image.suptitle("lvrpo minus each other method, 95%: blue bootstrap, grey Student's t; "
                   "dashed: the least that the paper claims over its baselines")
    image.savefig(path, dpi=80)


def main():
    parser = Parser(description="The paper's claims, judged by finished runs.")
    parser.add_argument("runs", help="the folder that holds them")
    parser.add_argument("--results", default=Path(__file__).parent, help="for claims.* [here]")
    args = parser.parse_args()
    print(tables(claims(args.runs, args.results)))


if __name__ == "__main__":
    command("claims.py", main)
