"""Do the paper's claims hold? Verdicts from finished runs, by the rule of rule.md.

  outcomes     the numbers of every seed, the outcome of every test item, and what each method
               used. outcomes.json.gz keeps them, so that anyone can judge again
  difference   lvrpo minus the other method, seed by seed: the same base, the same test items
  interval     95%, Student's t over seeds. Beside it a paired bootstrap over seeds and items
  verdict      by the interval of Student's t, see `verdict`

Writes outcomes.json.gz, claims.json, claims.md and claims.png. reproduce.py makes the runs and
calls this; recompute.py starts from outcomes.json.gz.

    $ python results/claims.py runs/reproduce      # 30 seconds
"""

import gzip
import json
import sys
from collections import defaultdict
from pathlib import Path

import numpy as np
from launch import command
from matplotlib.figure import Figure

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from eval import T_QUANTILES, Parser, by_source, differences, numbers, read_result
from model import atomically
from train import read_log

CLAIMS = {  # metric: what the paper says, and the least that it claims
    "vqa": ("understanding, questions: 3 to 5 points", 0.03),
    "vqa_three": ("understanding, questions about three objects", 0.03),
    "caption_three": ("understanding, captions of three objects", 0.03),
    "retrieval_i2t_r1": ("understanding, retrieval: 3 to 5 points", 0.03),
    "retrieval_t2i_r1": ("understanding, retrieval: 3 to 5 points", 0.03),
    "compose": ("generation, controllability, T = 1", 0.0),
    "compose @ best T": ("generation, controllability, each at its best T", 0.0),
    "compose @ equal diversity": ("generation, controllability at equal diversity", 0.0),
    "compose @ equal differ": ("generation, controllability at equal diversity", 0.0),
    "compose_pairs": ("generation, pairs never seen with a caption, T = 1", 0.0),
    "compose_pairs @ equal diversity": ("generation, the same at equal diversity", 0.0),
    "compose_pairs @ equal differ": ("generation, the same at equal diversity", 0.0),
    "compose_heldout": ("generation, three objects, never with a caption, T = 1", 0.0),
    "clip_score": ("generation: a better CLIP score", 0.0),
    "frechet_three": ("generation: a better FID, here of three objects", 0.0),
    "multihop": ("reasoning, two hops: 5 to 8 points", 0.05),
    "multihop_three": ("reasoning, two hops among three objects: 5 to 8 points", 0.05),
    "multihop_at_once_three": ("reasoning, the same answered without steps", 0.05),
}
LOWER_IS_BETTER, SECONDARY = ("frechet_three",), ("vqa_three", "multihop_at_once_three")
BASELINES, CONTROLS = ("unified", "clip", "beit"), ("sft", "rejection", "dpo", "best_of_n")
REWARDED = ("lvrpo", "rejection", "dpo", "best_of_n")
# What each method learns from after the base. Same words in two rows: the same items, or the same
# stream. The grammar's knowledge: which text is a near miss of which, what a whole caption names.
SHARED = {
    "noisy pairs": "the pre-training stream goes on",
    "unpaired texts": "the stream, and GRPO's prompts to draw",
    "unpaired pictures": "the stream, and GRPO's pictures to describe",
}
BY_NEXT_TOKEN = {"labelled questions": "GRPO's, answers by next tokens", "grammar": "no"}
BY_REWARD = {"labelled questions": "GRPO's, answers by exact match", "grammar": "in the reward"}
INFORMATION = {method: SHARED | BY_NEXT_TOKEN for method in BASELINES}
INFORMATION |= {method: SHARED | BY_REWARD for method in REWARDED[:3]}
INFORMATION["best_of_n"] = dict.fromkeys(SHARED, "none") | {
    "labelled questions": "none", "grammar": "in the reward"}
INFORMATION["sft"] = SHARED | {
    "unpaired texts": "the stream", "unpaired pictures": "the stream", "grammar": "no",
    "labelled questions": "a new one in every row that asks, with its steps"}


LEDGER = {  # what a method used after the base
    "seconds": "seconds after the base, with the reward's CLIP",
    "labels": "clean answers shown, repeats counted",
    "tokens": "tokens learned from",
}


# ------------------------------------------------ what the runs left


def finished(folder):
    """Yields (name, seed, meta, run) for every finished run NAME-SEED in a folder, on its first
    data set. run: {"numbers", "items"} and, except for its "base", {"used"}."""
    for path in sorted(Path(folder).glob("*/eval.json")):
        result = read_result(path.parent)
        items = json.loads((path.parent / "items.json").read_text("utf-8"))
        (source, part), meta = next(iter(by_source(result).items())), result["meta"]
        used = {f"{k}_seconds": meta["seconds"].get(k, 0.0) for k in ("align", "clip")}
        log = [row for row in read_log(path.parent / "metrics.csv") if row["stage"] == "align"]
        used |= {name: sum(float(row[name]) for row in log) for name in ("labels", "tokens")}
        for name, model in ((path.parent.name.rpartition("-")[0], "aligned"), ("base", "base")):
            run = {"numbers": numbers(part, model), "items": items[source][model]}
            run |= {"used": used} if model == "aligned" else {}
            yield name, str(meta["seed"]), meta, run


def collect(out):
    """{"runs", "real", "ablations": {name: {seed: run}}, "meta"} of all finished runs below a
    folder. ValueError without lvrpo."""
    outcomes, commits = {}, set()
    for part, folder in (("runs", ""), ("real", "real"), ("ablations", "ablations")):
        runs = defaultdict(dict)
        for name, seed, meta, run in finished(Path(out) / folder):
            if part != "ablations" or name != "base":
                runs[name][seed] = run
            commits.add(meta["commit"])
            kept = {key: meta[key] for key in ("preset", "threads", "machine", "versions", "noise")}
        order = [name for name in ("lvrpo", "base", *BASELINES, *CONTROLS) if name in runs]
        outcomes[part] = {name: runs[name] for name in dict.fromkeys([*order, *sorted(runs)])}
    if "lvrpo" not in outcomes["runs"]:
        raise ValueError(f"{out}: no run of lvrpo is finished")
    return outcomes | {"meta": kept | {"commit": ", ".join(sorted(commits))}}


def save_outcomes(outcomes, path):
    """Write outcomes as gzipped JSON; equal outcomes give equal bytes."""
    text = json.dumps(outcomes, separators=(",", ":")).encode()
    with atomically(path) as new:
        new.write_bytes(gzip.compress(text, mtime=0))


def load_outcomes(path):
    return json.loads(gzip.decompress(Path(path).read_bytes()))


# ------------------------------------------------ intervals and verdicts


def bootstrap(outcomes, draws=1000):
    """(low, high) of the mean, from one array of items per seed: resample seeds, then the items of
    each, both with replacement."""
    rng, outcomes = np.random.default_rng(0), [np.asarray(o, float) for o in outcomes]
    seeds = rng.integers(len(outcomes), size=(draws, len(outcomes)))
    means = np.zeros(seeds.shape)
    for seed, items in enumerate(outcomes):
        drawn = seeds == seed
        means[drawn] = items[rng.integers(len(items), size=(drawn.sum(), len(items)))].mean(1)
    return tuple(round(float(v), 4) for v in np.quantile(means.mean(1), (0.025, 0.975)))


def student_t(values):
    """(low, high) of the mean over seeds; (None, None) for a single seed.

    >>> student_t([0.5, 0.6, 0.7])  # 0.6 -+ 4.303 * 0.1 / sqrt 3
    (0.3516, 0.8484)
    """
    if len(values) < 2:
        return None, None
    half = T_QUANTILES[min(len(values), 30) - 2] * np.std(values, ddof=1) / len(values) ** 0.5
    return tuple(round(float(np.mean(values) + sign * half), 4) for sign in (-1, 1))


def verdict(mean, low, high, least):
    """What the interval of a difference says about a claim of at least `least`.

    >>> verdict(0.06, 0.02, 0.10, 0.05), verdict(0.03, 0.01, 0.05, 0.05)
    ('replicated', 'direction only')
    >>> verdict(-0.03, -0.05, -0.01, 0.05), verdict(0.01, -0.02, 0.06, 0.05)
    ('not replicated', 'undetermined')
    """
    if low is None or low <= 0 <= high:
        return "undetermined"
    if high < 0:
        return "not replicated"
    return "replicated" if mean >= least else "direction only"


def judge(ours, theirs, metric, least):
    """lvrpo minus a method, with intervals and verdict; {} without a pair of runs."""
    seeds = [seed for seed in ours if seed in theirs]
    pairs = [(ours[seed]["numbers"], theirs[seed]["numbers"]) for seed in seeds]
    values = [row[metric] for row in (differences(*pair) for pair in pairs) if metric in row]
    if not values:
        return {}
    (low, high), sign = student_t(values), -1 if metric in LOWER_IS_BETTER else 1
    gains = sorted(sign * x for x in (low, high)) if low is not None else (None, None)
    mean = round(float(np.mean(values)), 4)
    row = {"difference": mean, "low": low, "high": high, "seeds": len(values)}
    row["verdict"] = verdict(sign * mean, *gains, least)
    items = [(ours[seed]["items"], theirs[seed]["items"]) for seed in seeds]
    if all(metric in a and metric in b for a, b in items):
        row["bootstrap"] = bootstrap([np.subtract(a[metric], b[metric]) for a, b in items])
    return row


def values_of(by_seed):
    """{metric: {"mean", "low", "high", "seeds"}} of one method, with Student's t."""
    rows = {}
    for metric in dict.fromkeys(m for run in by_seed.values() for m in run["numbers"]):
        values = [run["numbers"].get(metric) for run in by_seed.values()]
        values = [value for value in values if value is not None]
        if values and metric != "front":
            low, high = student_t(values)
            mean = round(float(np.mean(values)), 4)
            rows[metric] = {"mean": mean, "low": low, "high": high, "seeds": values}
    return rows


def ledger(runs):
    """{method: seconds, labels, tokens after the base, means over seeds}. Seconds of CLIP, which
    lvrpo's run trains, count for every method that uses its reward."""
    used = {}
    every = [run["used"] for run in runs["lvrpo"].values()]
    clip = np.mean([used["clip_seconds"] for used in every])
    for method in [method for method in runs if method != "base"]:
        every = [run["used"] for run in runs[method].values()]
        kinds = {"seconds": "align_seconds", "labels": "labels", "tokens": "tokens"}
        totals = {kind: np.mean([some[name] for some in every]) for kind, name in kinds.items()}
        totals["seconds"] += clip * (method in REWARDED)
        used[method] = {name: round(float(value), 1) for name, value in totals.items()}
    return used


def judged(runs, ours, others, claimed=CLAIMS):
    """One row per claim and other method, from {method: {seed: run}}."""
    rows = []
    for metric, (claim, least) in claimed.items():
        for other in others:
            row = judge(runs[ours], runs[other], metric, least if other in BASELINES else 0.0)
            rows += [{"claim": claim, "metric": metric, "against": other} | row] if row else []
    return rows


def claims(outcomes):
    """Judge every claim: {"methods", "claims", "ledger", "information", "real", "ablations",
    "meta"}; an ablation is judged like a claim, lvrpo minus its variant."""
    runs, real = outcomes["runs"], outcomes["real"]
    done = {"methods": {method: values_of(by_seed) for method, by_seed in runs.items()}}
    done["claims"] = judged(runs, "lvrpo", list(runs)[1:])
    done["ledger"] = ledger(runs)
    done["information"] = {m: INFORMATION[m] for m in runs if m in INFORMATION}
    done["real"] = judged(real, "lvrpo", list(real)[1:]) if "lvrpo" in real else []
    variants = {"lvrpo": runs["lvrpo"]} | outcomes["ablations"]
    done["ablations"] = judged(variants, "lvrpo", list(variants)[1:])
    done["meta"] = outcomes["meta"]
    return json.loads(json.dumps(done))  # as when read back


# ------------------------------------------------ tables and the figure


def line(cells):
    return f"| {' | '.join(map(str, cells))} |"


def interval(low, high):
    return "-" if low is None else f"{low:+.3f} to {high:+.3f}"


def verdicts(rows):
    """Lines of a Markdown table of rows as `judge` makes them."""
    head = "claim", "metric", "lvrpo minus", "difference", "Student's t", "verdict", "bootstrap"
    lines = [line(head), line(["---"] * len(head))]
    for r in rows:
        lower, secondary = r["metric"] in LOWER_IS_BETTER, r["metric"] in SECONDARY
        metric = r["metric"] + " (lower is better)" * lower + " (secondary)" * secondary
        cells = [r["claim"], metric, f"{r['against']} (n={r['seeds']})"]
        cells += [f"{r['difference']:+.3f}", interval(r["low"], r["high"]), r["verdict"]]
        lines.append(line([*cells, interval(*r.get("bootstrap", (None, None)))]))
    return lines


def tables(done):
    """Everything as Markdown: verdicts, each method's numbers, what it used and saw, real pictures,
    ablations."""
    methods, used = done["methods"], done["ledger"]
    runs = ", ".join(f"{m} {len(values['vqa']['seeds'])}" for m, values in methods.items())
    lines = ["# The claims, judged", "", f"By [rule.md](rule.md); commit {done['meta']['commit']}. "
             f"Seeds by method: {runs}. A claim over the baselines holds if it is replicated over "
             "each of the three; against the base and the controls the least is 0.", ""]
    lines += [*verdicts(done["claims"]), "", line(["", *methods])]
    lines.append(line(["---"] * (len(methods) + 1)))
    for metric in dict.fromkeys(m for values in methods.values() for m in values):
        cells = [metric]
        for values in methods.values():
            v = values.get(metric)
            half = f" ± {v['high'] - v['mean']:.3f}" if v and v["low"] is not None else ""
            cells.append(f"{v['mean']:.3f}{half}" if v else "-")
        lines.append(line(cells))
    for kind, words in LEDGER.items():
        cells = [f"{used[m][kind]:,.0f}" if m in used else "-" for m in methods]
        lines.append(line([words, *cells]))
    kinds = list(INFORMATION["lvrpo"])
    lines += ["", line(["learns from", *kinds]), line(["---"] * (len(kinds) + 1))]
    lines += [line([m, *(seen[k] for k in kinds)]) for m, seen in done["information"].items()]
    for title, rows in (("Fashion-MNIST", done["real"]), ("Ablations", done["ablations"])):
        lines += ["", f"## {title}", "", *(verdicts(rows) if rows else ["Not run yet."])]
    return "\n".join(lines) + "\n"


def figure(rows, path):
    """One panel per metric: lvrpo minus each other method, with Student's t."""
    image = Figure(figsize=(18, 9), layout="constrained")
    for ax, (metric, (_, least)) in zip(image.subplots(3, 6).flat, CLAIMS.items()):
        some = [r for r in rows if r["metric"] == metric][::-1]
        for y, r in enumerate(some):
            if r["low"] is not None:
                ax.plot([r["low"], r["high"]], [y, y], color="C0")
            ax.plot(r["difference"], y, "o", color="C0")
        ax.axvline(0, color="black", lw=0.8)
        ax.axvline(least, color="C1", ls="--", lw=0.8)
        ax.set_yticks(range(len(some)), [f"{r['against']} (n={r['seeds']})" for r in some])
        lower = " (lower is better)" if metric in LOWER_IS_BETTER else ""
        ax.set_title(metric + lower, fontsize=9)
    image.suptitle("lvrpo minus each other method, 95% by Student's t over seeds; dashed: the "
                   "least that the paper claims over its baselines")
    image.savefig(path, dpi=80)


def write(outcomes, results):
    """Write outcomes.json.gz, claims.json, claims.md, claims.png to a folder; return the claims."""
    results, done = Path(results), claims(outcomes)
    results.mkdir(parents=True, exist_ok=True)
    save_outcomes(outcomes, results / "outcomes.json.gz")
    texts = {"claims.json": json.dumps(done, indent=1), "claims.md": tables(done)}
    for name, text in texts.items():
        with atomically(results / name) as new:
            new.write_text(text, encoding="utf-8")
    figure(done["claims"], results / "claims.png")
    return done


def main():
    parser = Parser(description="The paper's claims, judged by finished runs.")
    parser.add_argument("runs", help="the folder of the runs")
    parser.add_argument("--results", default=Path(__file__).parent, help="for claims.* [here]")
    args = parser.parse_args()
    print(tables(write(collect(args.runs), args.results)))


if __name__ == "__main__":
    command("claims.py", main)
