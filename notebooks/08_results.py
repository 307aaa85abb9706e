# %% [markdown]
# # 08 · Reading the results, and how one fools oneself
#
# **You will see** the committed results of this repository (`results/`) the way a careful referee reads them: every claim
# about drawing as quality *against* diversity, at the same cost, over several seeds; and five ways to get a wrong answer
# from right numbers.
#
# Uses the functions of `eval.py`. Nothing is trained; every number is read from the files, so the text has none.

# %%
import json
from collections import defaultdict

import course
import matplotlib.pyplot as plt
import numpy as np
from course import BLUE, GOLD, GREEN, GREY, RED, ROOT

import eval as evaluation
from eval import quality_at, rate

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


def front(method, seed):
    """Rows of temperature, compose (drawings right) and diversity; "base" is the model before alignment."""
    return runs["lvrpo" if method == "base" else method][seed]["sweep"]["base" if method == "base" else "aligned"]


METHODS = {"base": GREY, "unified": GOLD, "lvrpo": GREEN}  # before · more next-token training · alignment
assert set(METHODS) - {"base"} <= set(runs)

# %% [markdown]
# `base`: the pre-trained model. `lvrpo`: the same after reward training and GRPO. `unified`: the same after *more
# pre-training for the same seconds*, the obvious alternative. Each has three objects' prompts too, whose pictures were
# never shown with a caption.
#
# ## 1. One temperature
#
# > **Predict.** At temperature 1, by how many points is `lvrpo` better than `base` on drawings of one or two objects? And
# > when each may choose its own best temperature?

# %%
def mean_front(method, column=""):
    """(T, 3): temperature, diversity and quality of a method, means over the seeds."""
    keys = ("temperature", f"diversity{column}", f"compose{column}")
    values = [[[np.nan if row[k] is None else row[k] for k in keys] for row in front(method, s)] for s in seeds]
    return np.nanmean(np.array(values), 0)


def plot_fronts(ax, column, title):
    for method, color in METHODS.items():
        t, x, y = mean_front(method, column).T
        ax.plot(x, y, "o-", color=color, label=method, markersize=4)
        ax.annotate(f"T={t[-1]:g}", (x[-1], y[-1]), xytext=(4, -10), textcoords="offset points", fontsize=7, color=color)
    ax.set(xlabel="diversity", title=title, ylim=(-0.03, 1.03))


figure, axes = plt.subplots(1, 2, figsize=(7.4, 3), sharey=True)
plot_fronts(axes[0], "", "One or two objects: nothing is gained")
plot_fronts(axes[1], "_heldout", "Three objects: one front alone")
axes[0].set_ylabel("drawings right (judge)")
axes[0].legend(loc="lower left")
plt.show()

# %%
gain = {}
for name, pick in {"at T = 1": lambda f: f[-1]["compose"], "at each one's best T": lambda f: max(r["compose"] for r in f)}.items():
    gain[name] = {m: np.mean([pick(front(m, s)) for s in seeds]) for m in METHODS}
    print(f"{name:22}" + "   ".join(f"{m} {v:.3f}" for m, v in gain[name].items())
          + f"   lvrpo - base {gain[name]['lvrpo'] - gain[name]['base']:+.3f}")

# %% [markdown]
# **Check.** On the left the gain at temperature 1 shrinks to little or nothing once everybody may sample colder, as notebook 03
# let us expect (the two lines printed above). On the right no temperature helps the base: it hardly ever draws three
# objects. That is where alignment really does something. *One number at one temperature shows neither.*
#
# (Here the best temperature was chosen on the numbers that are shown, which flatters everybody a little. The README's table
# chooses it on validation prompts: `best_temperature` in `eval.json`.)
#
# ## 2. Quality without variety
#
# A method that always draws the same right picture scores 100%. A fair question: how good is each *at the same diversity*?

# %%
def equal_diversity(points, diversity):
    """Exercise 1. points: a list of (diversity, quality), in any order -> the quality at this diversity, on the straight line between
    the two points around it; None where the front does not reach (never extrapolate)."""
    raise NotImplementedError


course.check(equal_diversity)

# %%
levels = np.linspace(0.2, 0.6, 9)
figure, ax = plt.subplots(figsize=(4.8, 2.6))
for method, color in METHODS.items():
    y = [np.mean(v) if None not in (v := [quality_at(front(method, s), d) for s in seeds]) else np.nan for d in levels]
    ax.plot(levels, y, "o-", color=color, label=method, markersize=4)
ax.set(xlabel="diversity that is demanded", ylabel="best quality that offers it", title="At equal diversity: who leads depends on how much")
ax.legend()
plt.show()

# %% [markdown]
# A line ends where one of the seeds no longer reaches that diversity at any temperature we measured.
#
# ## 3. Unequal budgets
#
# Alignment is not free: the reward was trained too. What did each method use on top of the base? (`meta.ledger` of
# `eval.json`.)

# %%
for method, by_seed in runs.items():
    ledger = by_seed[seeds[0]]["meta"]["ledger"]
    own = ("clip", "preference", "grpo") if method == "lvrpo" else [stage for stage in ledger if not stage.startswith(("clip", "pre"))]
    print(method)
    for stage, used in ledger.items():
        if stage in own:  # next-token training inherits the reward's files, and does not use them
            print(f"  {stage:12}{used['steps']:6} steps {used['tokens']:12,.0f} tokens {used['labels']:9,.0f} labelled answers "
                  f"{used['operations'] / 1e12:6.2f} tera-operations")

# %% [markdown]
# Equal *seconds* is the rule of this repository, the training of the reward included (`clip_report` only measures, it
# counts for nobody). Equal tokens or equal labels would be other questions, with other answers; so all are printed.
#
# ## 4. Too few seeds, too few items
#
# There are two kinds of luck: the *items* of the test (Wilson's interval) and the *seed* of the training (an interval over
# seeds).

# %%
def wilson(k, n):
    """Exercise 2. (E3): k right of n -> (low, high), the 95% Wilson interval, z = 1.96.

    centre = (p + z²/2n) / (1 + z²/n),   half = z · sqrt(p (1 - p) / n + z²/4n²) / (1 + z²/n)"""
    raise NotImplementedError


course.check(wilson)

# %% [markdown]
# > **Predict.** A model gets 80% right. How wide is the interval with 20, 200, 2,000 items?

# %%
for n in (20, 200, 2000):
    r = rate([True] * int(0.8 * n) + [False] * (n - int(0.8 * n)))
    print(f"{n:5} items: {r['low']:.2f} to {r['high']:.2f}")

# %%
def paired_interval(a, b, t):
    """Exercise 3. Scores of two methods with the same seeds, (n,) each, and Student's t for n - 1 -> (low, high) of the mean
    difference a - b. Pairs share a base and scenes: subtract first."""
    raise NotImplementedError


course.check(paired_interval)

# %%
def score(method, seed, group, metric):
    cells = runs["lvrpo" if method == "base" else method][seed]["base" if method == "base" else "aligned"][group]
    return cells[metric]["value"]


T = {2: 12.706, 3: 4.303, 4: 3.182, 5: 2.776}[len(seeds)]
interval = lambda d: T * np.std(d, ddof=1) / np.sqrt(len(d))
shown = [("generation", "compose"), ("generation", "compose_heldout"), ("understanding", "vqa"), ("understanding", "caption"),
         ("understanding", "caption_three"), ("reasoning", "multihop")]  # fmt: skip
differences = {m: np.array([score("lvrpo", s, g, m) - score("unified", s, g, m) for s in seeds]) for g, m in shown}
figure, ax = plt.subplots(figsize=(6.2, 2.7))
for i, d in enumerate(differences.values()):
    clear = abs(d.mean()) > interval(d)
    ax.errorbar(d.mean(), i, xerr=interval(d), fmt="o", color=BLUE if clear else GREY, capsize=3)
    ax.plot(d, [i + 0.22] * len(d), "|", color=RED, markersize=7)
ax.axvline(0, color="black", linewidth=0.8)
clear = sum(abs(d.mean()) > interval(d) for d in differences.values())
ax.set(yticks=range(len(shown)), yticklabels=differences, xlabel="lvrpo − unified, paired by seed (red ticks: single seeds)",
       title=f"{clear} of {len(shown)} differences are clear with {len(seeds)} seeds")
ax.invert_yaxis()
plt.show()

# %% [markdown]
# **Check.** Grey intervals hold 0: nothing is shown, whatever the mean. Student's t is 4.3 with three seeds and 2.8 with
# five, so one odd seed makes an interval huge; that is not pedantry, it is what so few numbers can tell. Blue ones on the *left*,
# where there are any, are losses: they belong in a table as well.
#
# ## 5. Looking until it shines
#
# Two methods that are *exactly equally good*; five seeds each; the better seed is reported, or the best of twenty metrics.
#
# > **Predict.** How often will the first look clearly better (beyond its 95% interval) on at least one of 20 metrics?

# %%
rng = np.random.default_rng(0)
noise = rng.normal(size=(4000, 20, 5, 2))  # trials, metrics, seeds, methods
d = noise[..., 0] - noise[..., 1]
t_values = d.mean(2) / (d.std(2, ddof=1) / np.sqrt(5))
metrics, clear = np.arange(1, 21), t_values > 2.776
chance = [float(clear[:, :m].any(1).mean()) for m in metrics]
lucky = float((noise[:, 0, :, 0].max(1) - noise[:, 0, 0, 1]).mean())
figure, ax = plt.subplots(figsize=(4.8, 2.5))
ax.plot(metrics, chance, "o-", color=RED, markersize=4)
ax.set(xlabel="metrics one looks at", ylabel="chance of a “win”", ylim=(0, 0.5), xticks=(1, 5, 10, 15, 20))
ax.set_title(f"20 metrics, no difference: {chance[-1]:.0%} find a win")
plt.show()
print(f"best of five seeds against one seed of an equal method: {lucky:+.2f} standard deviations, for nothing")

# %% [markdown]
# ## 6. A reward is not a score
#
# The run `results/hacked` had no KL penalty and no pre-training loss. Its training curve looks splendid.

# %%
hacked = json.loads((ROOT / "results" / "hacked" / "eval.json").read_text(encoding="utf-8"))
for name in ("base", "aligned"):
    g = hacked[name]["generation"]
    print(f"{name:8} drawings right {g['compose']['value']:.3f}   distinct {g['diversity']['value']:.3f}")
print(*[f"health: {w}" for w in hacked["meta"]["health"]], sep="\n")

# %% [markdown]
# ## And the paper's claims?
#
# `make reproduce` trains every baseline and control and judges each claim by a paired bootstrap: *replicated*, *not
# replicated* or *inconclusive*.

# %%
claims = ROOT / "results" / "claims.json"
if claims.is_file():
    for row in json.loads(claims.read_text(encoding="utf-8"))["claims"]:
        print(f"{row['metric']:20} against {row['against']:10} {row['difference']:+.3f}  {row['verdict']}")
else:
    print("results/claims.json is not there yet: `make reproduce` writes it")

# %%
table = evaluation.compare(sorted((ROOT / "results" / "cpu").glob("*-*"))).splitlines()
print(*[line.replace("    ", "  ") for line in table[:12]], f"... and {len(table) - 12} metrics more", sep="\n")

# %% [markdown]
# ## Before you believe a number
#
# * Which temperature? Show the front. Chosen on what? Not on the test items.
# * Against what, at the same cost? Compare with *more of the same training*, and with best-of-n by the same reward.
# * How many seeds, paired how? Show the interval, and the metrics that got worse.
# * Who judges? Not the reward.
#
# ## The check cell

# %%
course.final(equal_diversity, wilson, paired_interval)
