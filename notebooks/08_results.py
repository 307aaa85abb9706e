# %% [markdown]
# # 08 · Reading the results, and how one fools oneself
#
# **You will see** the committed results of this repository (`results/`) the way a careful referee
# reads them: every claim about drawing as quality *against* diversity, at the same cost, over
# several seeds; and six ways to get a wrong answer from right numbers.
#
# Uses the functions of `eval.py`. Nothing is trained; every number is read from the files, so the
# text has none.

# %%
import json
from collections import defaultdict

import course
import matplotlib.pyplot as plt
import numpy as np
from course import BLUE, GOLD, GREEN, GREY, RED, ROOT

import eval as evaluation
from data import NOISE

course.start(minutes=0.2)

# %%
runs = defaultdict(dict)  # method: {seed: eval.json}
for path in sorted((ROOT / "results" / "cpu").glob("*/eval.json")):
    result = json.loads(path.read_text(encoding="utf-8"))
    runs[result["meta"]["method"]][result["meta"]["seed"]] = result
for method, by_seed in runs.items():
    meta = next(iter(by_seed.values()))["meta"]
    print(f"{method:9} seeds {sorted(by_seed)}, {meta['preset']} preset, noise {meta['noise']}")
seeds = sorted(set.intersection(*(set(by_seed) for by_seed in runs.values())))
further = {k: v for k, v in meta["noise"].items() if k not in NOISE}
if further:
    print("these runs had noise that today's world has not, for which see section 7:", further)

# %%
METHODS = {"base": GREY, "unified": GOLD, "lvrpo": GREEN}
assert set(METHODS) - {"base"} <= set(runs)


def result_of(method, seed):
    """(eval.json, the model in it): "base" is the model before alignment."""
    if method == "base":
        return runs["lvrpo"][seed], "base"
    return runs[method][seed], "aligned"


def front(method, seed):
    result, model = result_of(method, seed)
    return result["sweep"][model]

# %% [markdown]
# `base`: the pre-trained model. `lvrpo`: the same after reward training and GRPO. `unified`: the
# same after *more pre-training for the same seconds*, the obvious alternative. A picture of three
# objects never came with a caption, but `lvrpo` was prompted for three in alignment.
#
# ## 1. One temperature
#
# > **Predict.** At temperature 1, by how many points is `lvrpo` better than `base` on drawings of
# > one or two objects? And when each may choose its own best temperature?

# %%
def mean_front(method, column=""):
    """(T, 3): temperature, diversity and quality of a method, means over the seeds."""
    keys = ("temperature", f"diversity{column}", f"compose{column}")
    values = [[[np.nan if row[k] is None else row[k] for k in keys] for row in front(method, seed)]
              for seed in seeds]
    return np.nanmean(np.array(values), 0)


figure, axes = plt.subplots(1, 2, figsize=(7.4, 3), sharey=True)
for ax, column, title in zip(axes, ("", "_heldout"), ("One or two objects", "Three objects")):
    for method, color in METHODS.items():
        t, x, y = mean_front(method, column).T
        ax.plot(x, y, "o-", color=color, label=method, markersize=4)
        ax.annotate(f"T={t[-1]:g}", (x[-1], y[-1]), xytext=(4, -10), textcoords="offset points",
                    fontsize=7, color=color)
    ax.set(xlabel="diversity", title=title, ylim=(-0.03, 1.03))
axes[0].set_ylabel("drawings right (judge)")
axes[0].legend(loc="lower left")
plt.show()

# %%
def at_one(rows, key):
    return rows[-1][key]


def at_best(rows, key):
    return max(row[key] for row in rows)


for objects, key in (("one or two objects", "compose"), ("three objects", "compose_heldout")):
    print(objects)
    for name, pick in (("at T = 1", at_one), ("at each one's best T", at_best)):
        mean = {m: np.mean([pick(front(m, seed), key) for seed in seeds]) for m in METHODS}
        values = "   ".join(f"{m} {v:.3f}" for m, v in mean.items())
        print(f"  {name:22}{values}   lvrpo - base {mean['lvrpo'] - mean['base']:+.3f}")

# %% [markdown]
# **Check.** Compare the two lines of each block. A gain at temperature 1 that shrinks to nothing
# once everybody may sample colder is what notebook 03 let us expect: it is a temperature effect. A
# gain that stays is something no temperature gives. *One number at one temperature cannot tell the
# two apart.*
#
# (Here the best temperature is chosen on the numbers that are shown, which flatters everybody a
# little. The README's table chooses it on validation prompts: `best_temperature` in `eval.json`.)
#
# ## 2. Quality without variety
#
# A method that always draws the same right picture scores 100%. A fair question: how good is each
# *at the same diversity*?

# %%
def equal_diversity(points, diversity):
    """Exercise 1. points: a list of (diversity, quality) in any order -> the quality at this
    diversity, on the straight line between the two points around it; None where the front does not
    reach, on either side (never extrapolate)."""
    raise NotImplementedError


course.check(equal_diversity)

# %%
at, levels = course.use(equal_diversity), np.linspace(0.2, 0.6, 17)


def mean_quality(method, level):
    """Mean over the seeds; nan where one of them does not reach this diversity."""
    values = [at([(r["diversity"], r["compose"]) for r in front(method, s)], level) for s in seeds]
    return np.nan if None in values else np.mean(values)


quality = {m: np.array([mean_quality(m, level) for level in levels]) for m in METHODS}
common = ~np.isnan(np.array(list(quality.values()))).any(0)
lead = {m: int((np.argmax([quality[k][common] for k in quality], 0) == i).sum())
        for i, m in enumerate(quality)}
figure, ax = plt.subplots(figsize=(4.8, 2.6))
for method, color in METHODS.items():
    ax.plot(levels, quality[method], "o-", color=color, label=method, markersize=4)
ax.set(xlabel="diversity", ylabel="drawings right at that diversity",
       title="One or two objects, at equal diversity")
ax.legend()
plt.show()
print(f"of the {common.sum()} levels that all reach in every seed, so many are led by", lead)

# %% [markdown]
# A line ends where one of the seeds does not reach that diversity at any temperature we measured.
#
# ## 3. Unequal budgets
#
# Alignment is not free: the reward was trained too. How many seconds did each method use on top of
# the base?

# %%
def seconds(method):
    """{stage: seconds}, the mean over seeds, of what a method used on top of the base."""
    spent = defaultdict(list)
    for seed in seeds:
        meta = runs[method][seed]["meta"]
        stages = meta["seconds"]
        if "ledger" in meta:  # older files
            stages = {stage: used["seconds"] for stage, used in meta["ledger"].items()}
        for stage in set(stages) - {"pretrain", "clip_report", "eval", "evaluate"}:
            spent[stage].append(stages[stage])
    return {stage: float(np.mean(values)) for stage, values in spent.items()}


for method in ("lvrpo", "unified"):
    stages = seconds(method)
    parts = ", ".join(f"{stage} {value:.0f}" for stage, value in stages.items())
    print(f"{method:9}{sum(stages.values()):5.0f} s: {parts}")

# %% [markdown]
# Equal *seconds* is the rule of this repository, the training of the reward included
# (`clip_report` only measures, it counts for nobody). Seconds depend on the machine and on what
# else it did: equal tokens, or equal *labels*, would be other questions with other answers. GRPO
# has seen the key of every question it was rewarded for; `sft`, the control in section 7, learns
# from the same keys by plain next-token training.
#
# ## 4. Too few seeds, too few items
#
# There are two kinds of luck: the *items* of the test (Wilson's interval) and the *seed* of the
# training (an interval over seeds).

# %%
def wilson(k, n):
    """Exercise 2. (E3): k right of n -> (low, high), the 95% Wilson interval, z = 1.96.

    centre = (p + z²/2n) / (1 + z²/n),   half = z · sqrt(p (1 - p) / n + z²/4n²) / (1 + z²/n)"""
    raise NotImplementedError


course.check(wilson)

# %% [markdown]
# > **Predict.** A model gets 80% right. How wide is the interval with 20, 200, 2,000 items?

# %%
interval_of = course.use(wilson)
for n in (20, 200, 2000):
    low, high = interval_of(8 * n // 10, n)
    print(f"{n:5} items: {low:.2f} to {high:.2f}, {100 * (high - low):.0f} points wide")

# %%
def paired_interval(a, b, t):
    """Exercise 3. Scores of two methods with the same seeds, (n,) each, and Student's t for n - 1
    -> (low, high) of the mean difference a - b. Pairs share a base and scenes: subtract first."""
    raise NotImplementedError


course.check(paired_interval)

# %%
def score(method, seed, group, metric):
    result, model = result_of(method, seed)
    return result[model][group][metric]["value"]


# %%
shown = {"compose": "generation", "compose_heldout": "generation", "vqa": "understanding",
         "retrieval_t2i_r1": "understanding", "caption": "understanding", "multihop": "reasoning"}
t, interval = evaluation.T_QUANTILES[len(seeds) - 2], course.use(paired_interval)
figure, ax = plt.subplots(figsize=(6.2, 2.7))
verdicts = {}
for i, (metric, group) in enumerate(shown.items()):
    ours = np.array([score("lvrpo", seed, group, metric) for seed in seeds])
    theirs = np.array([score("unified", seed, group, metric) for seed in seeds])
    low, high = interval(ours, theirs, t)
    verdicts[metric] = "ahead" if low > 0 else "behind" if high < 0 else "open"
    color = {"ahead": BLUE, "behind": RED, "open": GREY}[verdicts[metric]]
    ax.plot((low, high), (i, i), color=color)
    ax.plot((low + high) / 2, i, "o", color=color)
    ax.plot(ours - theirs, [i + 0.22] * len(seeds), "|", color="black", markersize=6)
ax.axvline(0, color="black", linewidth=0.8)
ax.set(yticks=range(len(shown)), yticklabels=verdicts,
       xlabel="lvrpo − unified, paired (ticks: seeds)",
       title=f"{sum(v != 'open' for v in verdicts.values())} of {len(shown)} differences are clear")
ax.invert_yaxis()
plt.show()
for verdict in ("ahead", "behind", "open"):
    print(f"{verdict:7}", ", ".join(m for m, v in verdicts.items() if v == verdict) or "nothing")

# %% [markdown]
# **Check.** Grey intervals hold 0: nothing is shown, whatever the mean. Student's t is 4.3 with
# three seeds and 2.8 with five, so that one odd seed makes an interval huge; that is not pedantry,
# it is what so few numbers can tell. Red ones are losses: they belong in a table as well.
#
# ## 5. Looking until it shines
#
# Two methods that are *exactly equally good*; five seeds each; one reports the better seed, or the
# best of twenty metrics.
#
# > **Predict.** How often will the first look clearly better (beyond its 95% interval) on at least
# > one of 20 metrics?

# %%
rng = np.random.default_rng(0)
noise = rng.normal(size=(4000, 20, 5, 2))  # trials, metrics, seeds, methods
d = noise[..., 0] - noise[..., 1]
clear = d.mean(2) / (d.std(2, ddof=1) / np.sqrt(5)) > evaluation.T_QUANTILES[3]
metrics = np.arange(1, 21)
chance = [float(clear[:, :m].any(1).mean()) for m in metrics]
lucky = float((noise[:, 0, :, 0].max(1) - noise[:, 0, 0, 1]).mean())
figure, ax = plt.subplots(figsize=(4.8, 2.5))
ax.plot(metrics, chance, "o-", color=RED, markersize=4)
ax.set(xlabel="metrics one looks at", ylabel="chance of a “win”", ylim=(0, 0.5),
       xticks=(1, 5, 10, 15, 20), title=f"20 metrics, no difference: {chance[-1]:.0%} find a win")
plt.show()
print(f"best of five seeds against one seed of an equal method: {lucky:+.2f} standard deviations")

# %% [markdown]
# ## 6. A reward is not a score
#
# The run `results/hacked` had no KL penalty and no pre-training loss. Its training curve looks
# splendid.

# %%
hacked = json.loads((ROOT / "results" / "hacked" / "eval.json").read_text(encoding="utf-8"))
for name in ("base", "aligned"):
    right, distinct = (hacked[name]["generation"][k]["value"] for k in ("compose", "diversity"))
    print(f"{name:8} drawings right {right:.3f}   distinct {distinct:.3f}")

# %% [markdown]
# ## 7. And the paper's claims?
#
# `results/reproduce.py` trains every baseline and control and judges each claim: *replicated*,
# *not replicated* or *inconclusive*. Baselines: `unified` (more next-token training), `clip` and
# `beit` (with a loss on representations). Controls with the same prompts and reward: `rejection`
# (imitate the best of a group), `dpo` (best against worst), `best_of_n` (choose, learn nothing);
# with the same answer keys: `sft`.

# %%
NAMES = {"labels": "sft", "reject": "rejection", "best": "best_of_n"}  # names in older files
claims = json.loads((ROOT / "results" / "claims.json").read_text(encoding="utf-8"))["claims"]
rows = list(dict.fromkeys(c["metric"] for c in claims))
columns = list(dict.fromkeys(c["against"] for c in claims))
grid, marks = np.full((len(rows), len(columns)), np.nan), {"replicated": "●", "not replicated": "○"}
figure, ax = plt.subplots(figsize=(6.6, 0.5 + 0.38 * len(rows)))
for c in claims:
    y, x = rows.index(c["metric"]), columns.index(c["against"])
    grid[y, x] = c["difference"]
    mark = marks.get(c["verdict"], " ")
    ax.text(x, y, f"{c['difference']:+.2f} {mark}", ha="center", va="center", fontsize=8)
image = ax.imshow(grid, cmap="RdBu", vmin=-0.4, vmax=0.4, aspect="auto")
figure.colorbar(image, label="lvrpo minus")
ax.set(yticks=range(len(rows)), yticklabels=rows, xticks=range(len(columns)),
       xticklabels=[NAMES.get(c, c) for c in columns],
       title="● replicated   ○ not replicated   no mark: inconclusive")
plt.show()
for against in columns:
    here = [c["verdict"] for c in claims if c["against"] == against]
    good = here.count("replicated")
    print(f"against {NAMES.get(against, against):10} {good} of {len(here)} replicated")

# %% [markdown]
# Read it by columns: does what holds against the base also hold against a control with the same
# information? If the second cell printed further noise (vague answers, say, that pre-training was
# full of and GRPO's keys were not), then the world was built so that one method could win: the
# gain is real, and says how much that noise cost, not how good the method is. **The dose of noise
# is part of the claim.**

# %%
table = evaluation.compare(sorted((ROOT / "results" / "cpu").glob("*-*"))).splitlines()
lines = [line[:30] + line[30:].replace("    ", "  ") for line in table[:12]]
print(*lines, f"... and {len(table) - 12} lines more", sep="\n")

# %% [markdown]
# ## Before you believe a number
#
# * Which temperature? Show the front. Chosen on what? Not on the test items.
# * Against what, at the same cost and with the same information? Compare with *more of the same
#   training*, with plain training on the same keys, and with best-of-n by the same reward.
# * How many seeds, paired how? Show the interval, and the metrics that got worse.
# * Who judges? Not the reward.
#
# ## The check cell

# %%
course.final(equal_diversity, wilson, paired_interval)
