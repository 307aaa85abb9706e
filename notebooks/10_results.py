# %% [markdown]
# # 10 · Reading the results, and how one fools oneself
#
# **You will see** how a careful referee reads real results: every claim about drawing as quality
# *against* diversity, at the same cost, over several seeds; and seven ways to get a wrong answer
# from right numbers.
#
# Sections 1 to 7 read the numbers of the **first edition** of this repository, mistakes included
# (`first_edition.json`), section 8 those of the second (`results/claims.json`). Nothing is
# trained. For runs of your own, `python eval.py --compare RUN RUN ...` shows the same.

# %%
import json
from collections import defaultdict

import course
import matplotlib.pyplot as plt
import numpy as np
from course import BLUE, GOLD, GREEN, GREY, HERE, RED

import eval as evaluation
from data import NOISE

course.start(minutes=0.2)
course.map(10)

# %%
stored = json.loads((HERE / "first_edition.json").read_text(encoding="utf-8"))
print(stored["about"])
runs = defaultdict(dict)  # method: {seed: numbers}
for result in stored["runs"]:
    runs[result["meta"]["method"]][result["meta"]["seed"]] = result
for method, by_seed in runs.items():
    print(f"{method:9} seeds {sorted(by_seed)}, {by_seed[0]['meta']['preset']} preset")
noise, seeds = runs["lvrpo"][0]["meta"]["noise"], sorted(runs["lvrpo"])
further = {name: chance for name, chance in noise.items() if name not in NOISE}
print("noise that today's world does not have, for which see section 7:", further)

# %%
METHODS = {"base": GREY, "unified": GOLD, "lvrpo": GREEN}


def result_of(method, seed):
    """(numbers of a run, the model in them): "base" is the model before alignment."""
    if method == "base":
        return runs["lvrpo"][seed], "base"
    return runs[method][seed], "aligned"


def front(method, seed):
    result, model = result_of(method, seed)
    return result["sweep"][model]

# %% [markdown]
# `base`: the pre-trained model. `lvrpo`: the same after reward training and GRPO. `unified`: the
# base after *more pre-training for the same seconds*, the obvious alternative. A picture of three
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
        for seed in seeds:
            points = [(r[f"diversity{column}"], r[f"compose{column}"]) for r in front(method, seed)]
            ax.plot(*np.array(points, float).T, color=color, linewidth=0.5, alpha=0.5)
        t, x, y = mean_front(method, column).T
        ax.plot(x, y, "o-", color=color, label=method, markersize=4)
        ax.annotate(f"T={t[-1]:g}", (x[-1], y[-1]), xytext=(4, 4), textcoords="offset points",
                    fontsize=7, color=color)
    ax.set(xlabel="diversity: share of distinct drawings among right ones", title=title, ylim=(-0.03, 1.03))
axes[0].set_ylabel("share of drawings right (judge)")
axes[0].legend(loc="lower left", title=f"thick: mean of {len(seeds)} seeds, thin: each")
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
# once every method may sample colder is what notebook 03 leads us to expect: it is a temperature
# effect. A gain that stays is one that no temperature gives. *One number at one temperature cannot
# tell the two apart.*
#
# (Here the best temperature is chosen on the numbers that are shown, which flatters every method a
# little. `eval.py` chooses it on validation prompts.)
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


def qualities(method):
    """(seeds, levels): the quality at each diversity; nan where a front does not reach it."""
    points = [[(r["diversity"], r["compose"]) for r in front(method, s)] for s in seeds]
    return np.array([[at(some, level) for level in levels] for some in points], float)


each = {m: qualities(m) for m in METHODS}
quality = {m: x.mean(0) for m, x in each.items()}  # nan where one seed does not reach
common = ~np.isnan(np.array(list(quality.values()))).any(0)
lead = {m: int((np.argmax([quality[k][common] for k in quality], 0) == i).sum())
        for i, m in enumerate(quality)}
figure, ax = plt.subplots(figsize=(4.8, 2.6))
for method, color in METHODS.items():
    ax.plot(levels, each[method].T, color=color, linewidth=0.5, alpha=0.5)
    ax.plot(levels, quality[method], "o-", color=color, label=method, markersize=4)
ax.set(xlabel="diversity: share of distinct drawings among right ones", ylabel="share of drawings right (judge)",
       title=f"One or two objects: of {common.sum()} levels, lvrpo leads {lead['lvrpo']}")
ax.legend(title=f"thick: mean of {len(seeds)} seeds, thin: each", fontsize=8)
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
for method in ("lvrpo", "unified"):
    spent = [runs[method][seed]["meta"]["seconds"] for seed in seeds]
    parts = [f"{stage} {np.mean([x[stage] for x in spent]):.0f}" for stage in spent[0]]
    total = [sum(x.values()) for x in spent]
    print(f"{method:9}{np.mean(total):5.0f} s ({min(total)} to {max(total)}): {', '.join(parts)}")

# %% [markdown]
# Equal *seconds* is the rule of this repository, the training of the reward included. `unified` got
# as many seconds as the `lvrpo` run of its seed had taken, but a machine that is also doing other
# things varies in speed: look at the ranges before you trust the rule. Equal tokens, or equal
# *labels*, would be other questions with other answers. GRPO has seen the key of every question it
# was rewarded for; `sft`, a control in section 7, learns from the same keys by plain next-token
# training.
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
       xlabel="lvrpo − unified, paired; bars: 95% interval, ticks: seeds",
       title=f"{sum(v != 'open' for v in verdicts.values())} of {len(shown)} differences are clear")
ax.invert_yaxis()
plt.show()
for verdict in ("ahead", "behind", "open"):
    print(f"{verdict:7}", ", ".join(m for m, v in verdicts.items() if v == verdict) or "nothing")

# %% [markdown]
# **Check.** Grey intervals contain 0: they show nothing, whatever the mean. Student's t is 4.3 with
# three seeds and 2.8 with five, so one odd seed makes an interval huge; that is not pedantry, it is
# all that so few numbers can tell us. Red intervals are losses: they belong in a table as well.
#
# ## 5. Looking until something shines
#
# Two methods that are *exactly equally good*, with five seeds each; the author of one reports its
# best seed, or the best of twenty metrics.
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
# One run had no KL penalty and no pre-training loss. Its reward rose, and its training curve
# looked splendid.

# %%
for name in ("base", "aligned"):
    numbers = stored["hacked"][name]["generation"]
    right, distinct = numbers["compose"]["value"], numbers["diversity"]["value"]
    print(f"{name:8} drawings right {right:.3f}   distinct {distinct:.3f}")

# %% [markdown]
# ## 7. And the paper's claims?
#
# `results/reproduce.py` trains every baseline and control and judges each claim. Baselines:
# `unified` (more next-token training), `clip` and `beit` (with a loss on representations).
# Controls with the same prompts and reward: `rejection` (imitate the best of a group), `dpo` (best
# against worst), `best_of_n` (choose, learn nothing); with the same answer keys: `sft`.
#
# The first edition called a difference *replicated* by a bootstrap over seeds and items. With
# three seeds that interval is too narrow; Student's t over the seeds is the honest one.

# %%
claims = stored["claims"]
rows = list(dict.fromkeys(c["metric"] for c in claims))
columns = list(dict.fromkeys(c["against"] for c in claims))
grid = np.zeros((len(rows), len(columns)))
figure, ax = plt.subplots(figsize=(6.8, 0.6 + 0.38 * len(rows)))
for c in claims:
    y, x = rows.index(c["metric"]), columns.index(c["against"])
    grid[y, x] = c["difference"]
    mark = "●" if c["verdict"] == "replicated" else ""
    mark += "○" if mark and c["t_low"] <= 0 else ""
    ax.text(x, y, f"{c['difference']:+.2f} {mark}", ha="center", va="center", fontsize=8)
image = ax.imshow(grid, cmap="RdBu", vmin=-0.4, vmax=0.4, aspect="auto")
figure.colorbar(image, label="lvrpo minus the method below")
ax.set(yticks=range(len(rows)), yticklabels=rows, xticks=range(len(columns)), xticklabels=columns,
       title="● “replicated”   ○ but Student's interval contains 0")
course.show_small(figure, colors=32)

# %%
for name, others in (("baselines", columns[:4]), ("controls", columns[4:])):
    here = [c for c in claims if c["against"] in others]
    won = [c for c in here if c["verdict"] == "replicated"]
    clear = sum(c["t_low"] > 0 for c in won)
    behind = sum(c["t_high"] < 0 for c in here)
    print(f"{name} ({', '.join(others)}): {len(won)} of {len(here)} “replicated”,",
          f"{clear} of them clear by Student's t; clearly behind in {behind}")

# %% [markdown]
# **Check.** Read the map by columns: does what holds against the base also hold against a control
# with the same information? Then look at the noise that the second cell printed. In the first
# edition 70% of the pre-training answers about places and numbers were "vague", so the likeliest
# answer was a wrong one; GRPO alone was given clean keys, and its pre-training pairs were filtered
# by its reward. The gain in `vqa` was entirely in those kinds of questions. So it is real, but it
# says how much that noise cost, not how good the method is: **the dose of noise, and who knows
# what, are part of the claim**. That is why the second edition has no such noise, gives every
# method the same information, and measures again.
#
# ## 8. The same question again, with equal information
#
# The second edition's study (`results/rule.md`, written before its runs) gives every baseline the
# very prompts that GRPO sees: the texts to draw, the pictures to describe, the questions with
# their clean answers. Who learns what from them is the comparison. Read what each method learns
# from before you read a number.

# %%
study = json.loads((HERE.parent / "results" / "claims.json").read_text(encoding="utf-8"))
print(f"commit {study['meta']['commit']}, {study['meta']['preset']} preset")
for method, saw in study["information"].items():
    spent = study["ledger"][method]
    print(f"{method:10}{spent['seconds']:5.0f} s   labelled questions: {saw['labelled questions']}")

# %% [markdown]
# > **Predict.** Before the map: name one thing at which GRPO should be hard to beat with this
# > information, and one at which plain training on the answers should be.

# %%
COLORS = {"replicated": "#2f9d5f", "direction only": "#9fcfae", "undetermined": "#e4e4e0",
          "not replicated": "#d08770"}  # fmt: skip
claims = study["claims"]
rows = list(dict.fromkeys(c["metric"] for c in claims))
columns = list(dict.fromkeys(c["against"] for c in claims))
figure, ax = plt.subplots(figsize=(9.4, 0.8 + 0.3 * len(rows)))
for c in claims:
    y, x = rows.index(c["metric"]), columns.index(c["against"])
    ax.add_patch(plt.Rectangle((x - 0.5, y - 0.5), 1, 1, color=COLORS[c["verdict"]]))
    half = "" if c["low"] is None else f" ± {c['high'] - c['difference']:.2f}"
    ax.text(x, y, f"{c['difference']:+.2f}{half}", ha="center", va="center", fontsize=7)
ax.set(xlim=(-0.5, len(columns) - 0.5), ylim=(len(rows) - 0.5, -0.5), yticks=range(len(rows)),
       yticklabels=rows, xticks=range(len(columns)), xticklabels=columns,
       title="lvrpo minus each method, 95% by Student's t (frechet: lower is better)")
ax.tick_params(labelsize=7)
ax.legend([plt.Rectangle((0, 0), 1, 1, color=c) for c in COLORS.values()], COLORS, fontsize=7,
          ncols=4, loc="upper center", bbox_to_anchor=(0.5, -0.07))  # fmt: skip
course.show_small(figure, colors=32)

# %%
unified = {c["metric"]: c for c in claims if c["against"] == "unified"}
for verdict in COLORS:
    here = [f"{m} {c['difference']:+.2f}" for m, c in unified.items() if c["verdict"] == verdict]
    print(f"{verdict:15} {', '.join(here) or 'nothing'}")

# %% [markdown]
# **Check, and a conclusion.** Read the column `unified` first, then the controls.
#
# * **What nobody labelled, GRPO learns.** Drawings and captions of three objects, and pairs of
#   objects that no caption ever joined, cannot be copied from any pair of text and picture. A
#   reward that knows near misses is enough, and more next tokens are not.
# * **What has a key, plain training on the key learns better**: the same
#   questions, the same answers, the same seconds. A reward of 0 or 1 tells less about an answer
#   than the answer does. GRPO on questions is for cases where nobody knows the key but somebody
#   can check an answer.
# * **At equal diversity**, on ordinary prompts of the made world, alignment is ahead of its own base
#   and level with more training. On real clothes it is ahead of both (printed below).
# * **The controls** `rejection`, `dpo` and `best_of_n` have the same reward. Where they do as well,
#   the reward did it, not the policy gradient. The best of 8 samples is even better on known pairs,
#   at eight times the samples for every drawing; it cannot choose what is never drawn.
# * Look at single seeds, too: exploration can fail. A base that never draws three objects by
#   chance is never rewarded for it, and never learns it.

# %%
for metric in ("compose_heldout", "caption_three"):
    for method in ("lvrpo", "rejection", "dpo"):
        if metric in study["methods"].get(method, {}):
            print(f"{metric:16} {method:10} by seed: {study['methods'][method][metric]['seeds']}")

for c in study["real"]:
    if c["against"] == "unified":
        print(f"clothes {c['metric']:26} {c['difference']:+.2f} "
              f"({c['low']:+.2f} to {c['high']:+.2f}), {c['verdict']}")

# %% [markdown]
# ## 9. How to build a world in which one wins
#
# The last trap is the world itself. Take questions only, and let the answers of pre-training be
# wrong in a share of cases, the *dose*, evenly over the other words of their kind. From that base
# run GRPO, whose reward knows the right answers, and plain training twice: with the same right
# answers, and without them (`results/dose.py`, three seeds; the page is `results/dose.md`).
#
# > **Predict.** Draw two curves over the dose: LVRPO minus plain training with the keys, and
# > without. Where would you stop the dose if you wanted to sell GRPO?

# %%
doses = json.loads((HERE.parent / "results" / "dose.json").read_text(encoding="utf-8"))
figure, axes = plt.subplots(1, 2, figsize=(8, 3), sharey=True)
for ax, metric in zip(axes, ("vqa", "multihop")):
    for other, color, label in (("unified", BLUE, "the same keys"),
                                ("unified, no keys", RED, "no keys for unified")):
        gaps = np.array([np.subtract(row[metric]["lvrpo"], row[metric][other])
                         for row in doses.values()])  # (doses, seeds)
        ax.plot(list(map(float, doses)), gaps.mean(1), "o-", color=color, label=label, markersize=4)
        ax.plot(list(map(float, doses)), gaps, ".", color=color, markersize=3)
    ax.axhline(0, color=GREY, linewidth=0.8)
    ax.set(title=metric, xlabel="dose: share of wrong answers in pre-training")
axes[0].set_ylabel("lvrpo − unified, share right")
axes[0].legend(title="large: mean, small: each seed")
course.show_small(figure)

# %% [markdown]
# **Check.** Without keys for its opponent, GRPO has nothing to show up to a dose of 55%, and at 70%
# it is far ahead on two hops: there the likeliest answer to many questions is a wrong one, and only
# one of the two methods is told so. With the same keys for both the win is gone; no interval over
# the three seeds is above 0. The method never changed: the world and the information did. The first
# edition's `vqa` (section 7) was such a point at 70%. So a fair table says how often its training
# data are wrong, whether the likeliest answer is, and who sees which right answers.
#
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
