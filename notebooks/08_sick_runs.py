# %% [markdown]
# # 08 · Sick runs: six logs, six causes
#
# **You will see** the logs of six short GRPO runs, each with *one* thing wrong, beside a healthy
# run. You say what is wrong, and which panel shows it. Then come the explanations: how each symptom
# follows from its cause.
#
# The logs were recorded by `python notebooks/sick_runs.py`, which changes one thing at a time in
# `train.py`, `grpo.py` or the reward. That file names the causes: open it afterwards. All runs
# start from the base of the notebook “Aligning a model” and take 40 rollouts of 32 prompts × 8
# drawings, with 8 passes over each rollout. Nothing is trained here.

# %%
import io
import json

import course
import matplotlib.pyplot as plt
import torch
from course import BLUE, GREY, HERE, RED
from IPython.display import display
from PIL import Image

course.start(minutes=0.2)
course.map(8)

# %%
LOGS = json.loads((HERE / "sick_runs.json").read_text(encoding="utf-8"))
healthy = LOGS["healthy"]
print(f"logs {', '.join(n for n in LOGS if n != 'about')}; {len(healthy)} columns each")

# %% [markdown]
# ## The panels
#
# | panel | what it shows |
# |---|---|
# | `reward` | mean reward of the samples: what training maximises |
# | `judge` | share of drawings that the judge finds right, on other prompts; never trained on |
# | `kl` | exact KL to the base (G10) |
# | `entropy` | entropy of the policy's choices (G10) |
# | `zero spread` | share of groups in which all rewards are equal |
# | `outside` | share of ratios outside 1 ± 0.1 in the last of the 8 passes; dotted: in the first |
# | `largest ratio` | the largest ratio (G4) of the last pass |
# | `gradient` | norm of the gradient of the last pass, before it is clipped to 1 |

# %%
PANELS = {  # name: (columns of the log, unit, scale)
    "reward": (("reward",), "nats", "linear"),
    "judge": (("judge",), "share right", "linear"),
    "kl": (("kl",), "nats per token", "symlog"),
    "entropy": (("entropy",), "nats per token", "linear"),
    "zero spread": (("zero_spread",), "share of groups", "linear"),
    "outside": (("outside_first", "outside_last"), "share of tokens", "linear"),
    "largest ratio": (("largest_ratio",), "ratio", "log"),
    "gradient": (("gradient",), "norm", "symlog"),
}
LIMITS = {"judge": (-0.03, 1), "zero spread": (-0.03, 1.05), "largest ratio": (0.8, 300)}

# %%
def draw(ax, log, name, color, wide=1.6):
    """The curves of one log in one panel; the first pass is dotted in black."""
    columns, unit, scale = PANELS[name]
    for column in columns:
        seen = [(i, y) for i, y in enumerate(log[column]) if y is not None]
        if column == "outside_first":
            ax.plot(*zip(*seen), ":", color="black", linewidth=1.2, zorder=3)
        else:
            ax.plot(*zip(*seen), color=color, linewidth=wide)
    ax.set_yscale(scale, **({"linthresh": 0.01} if scale == "symlog" else {}))
    ax.set_title(name, fontsize=8)
    ax.set_ylabel(unit, fontsize=7)
    ax.tick_params(labelsize=7)

# %%
def finish(ax, name, logs):
    """The limits of a panel, and a note where the curve of a log is flat."""
    if name in LIMITS:
        ax.set_ylim(*LIMITS[name])
    elif name != "reward":
        ax.set_ylim(bottom=0)
    for log in logs:
        values = set(log[PANELS[name][0][-1]]) - {None}
        if len(values) == 1:
            value = values.pop()
            place = "top" if name == "zero spread" and value == 1 else "bottom"
            words = f"{value:.3g} at all steps"
            away = 0, -3 if place == "top" else 3  # from its line, in points
            ax.annotate(words, (20, value), away, textcoords="offset points", fontsize=7,
                        ha="center", va=place)


def show_light(figure):
    """The figure with 16 colours, a quarter of the bytes."""
    figure.savefig(file := io.BytesIO(), dpi=87)
    plt.close(figure)
    display(Image.open(file).convert("RGB").quantize(16))

# %%
def panels(names, logs, title, columns=4):
    """Panels of {label: (log, color)}, the later ones on top."""
    rows = -(-len(names) // columns)
    figure, axes = plt.subplots(rows, columns, figsize=(2.15 * columns, 0.25 + 1.6 * rows),
                                sharex=True, squeeze=False)
    for ax, name in zip(axes.flat, names):
        for log, color in logs.values():
            draw(ax, log, name, color, 1.2 if color == GREY else 1.8)
        finish(ax, name, [list(logs.values())[-1][0]])
    for ax in axes[-1]:
        ax.set_xlabel("step", fontsize=7)
    lines = [plt.Line2D([], [], color=color) for _, color in logs.values()]
    figure.legend(lines, logs, loc="outside upper right", ncols=len(logs), fontsize=8)
    figure.suptitle(title, x=0.01, ha="left", fontsize=10, fontweight="bold")
    show_light(figure)


panels(PANELS, {"healthy": (healthy, BLUE)}, "the healthy run")

# %% [markdown]
# Study the healthy run first. The reward and the judge rise *together*. KL and entropy stay near
# where they were. The share of groups without spread grows from 3% to almost half: as drawings get
# better, in more groups all are right. In the **first** pass over a rollout nothing is outside the
# clip range (dotted, at 0): the policy has not moved since it sampled, and all ratios are exactly
# equal to 1. In the last pass 5% to 9% are outside, and fewer only at the end, where the learning
# rate goes to 0.
#
# ## Two checks that every trainer should have
#
# The first costs nothing: before the first update after sampling, the ratio must be 1.

# %%
def first_pass_gap(logprobs, old_logprobs, mask):
    """Exercise 1. Log-probs (N, T) of the loss's first pass and of the sampler, mask (N, T) of
    bools -> the largest absolute difference over the valid tokens, a number; 0 if none is valid.
    Padding may hold nan or -inf."""
    raise NotImplementedError


course.check(first_pass_gap)

# %% [markdown]
# > **Predict.** A sampler often computes in bfloat16. How large is the gap to the same log-probs in
# > float32: 0.0001, 0.01 or 1?

# %%
gap_of, g = course.use(first_pass_gap), torch.Generator().manual_seed(0)
logits, valid = 3 * torch.randn(64, 50, generator=g), torch.ones(64, 50, dtype=torch.bool)
exact, rounded = logits.log_softmax(1), logits.bfloat16().float().log_softmax(1)
print(f"the same numbers {gap_of(exact, exact, valid):.4f}",
      f"logits rounded to bfloat16 {gap_of(exact, rounded, valid):.4f}", sep=", ")

# %% [markdown]
# **Check.** Rounding alone makes a gap of a few hundredths, so the check needs a tolerance, not
# “equal to 0”. (In this repository both sides are float32 and computed from the same states: 0.)
#
# The second is an alarm. `train.py` stops a run whose KL is above `--max-kl` for five steps in a
# row: a single spike is no reason to stop.

# %%
def alarm(values, limit, patience):
    """Exercise 2. The first step (counted from 0) at which a value has been above the limit
    `patience` times in a row, this one included; None if there is no such step."""
    raise NotImplementedError


course.check(alarm)

# %% [markdown]
# > **Predict.** Limits are set from the healthy run: half as much again as its largest value. In
# > which panels will most of the six logs raise an alarm? In which will none?

# %%
first_alarm, signs = course.use(alarm), {"entropy": -1, "judge": -1}
watched = [c for columns, _, _ in PANELS.values() for c in columns if c != "reward"]
print(f"{'step of the alarm':18}" + "".join(f"{n:>9}" for n in LOGS if n != "about"))
for column in watched:
    sign, normal = signs.get(column, 1), [y for y in healthy[column] if y is not None]
    limit = 1.5 * max(normal) + 0.01 if sign > 0 else -min(normal) / 2  # below half of its smallest
    steps = []
    for log in (log for name, log in LOGS.items() if name != "about"):
        values = [sign * y for y in log[column] if y is not None]
        steps.append(first_alarm(values, limit, 2 if column == "judge" else 3))
    shown = [("-" if s is None else 4 * s if column == "judge" else s) for s in steps]
    print(f"{column:18}" + "".join(f"{s:>9}" for s in shown))

# %% [markdown]
# **Check.** Several logs raise the same alarm, and no single alarm identifies a cause: you will
# have to look at *which comes first* and at what did **not** move. (The judge looks every 4 steps.)
#
# ## The six logs
#
# The healthy run is grey in all of them. For each log write down: what moves first? What does not
# move that should? Which panel could not look like this in any of the other five runs?

# %%
def look_at(name):
    panels(PANELS, {"healthy": (healthy, GREY), name: (LOGS[name], RED)}, f"log {name}")


look_at("A")

# %%
look_at("B")

# %%
look_at("C")

# %%
look_at("D")

# %%
look_at("E")

# %%
look_at("F")

# %% [markdown]
# ## Your diagnosis
#
# | cause | what was done |
# |---|---|
# | `kl` | the weight of the KL penalty is 0 |
# | `no spread` | every candidate gets the same reward as the others of its group |
# | `entropy` | an entropy bonus has the wrong sign: certainty is rewarded |
# | `temperature` | sampled at one temperature, scored at another |
# | `clip` | `max` instead of `min` in the clipped objective (G7) |
# | `hacked` | the reward can be raised without doing what the prompt asks |
#
# Each cause belongs to one log. Name the panel that distinguishes it from the other five; where two
# panels do, either is accepted.

# %%
def diagnosis():
    """Exercise 3. {"A": (cause, panel), "B": ..., ..., "F": ...}: causes as in the table above,
    panels as in PANELS."""
    raise NotImplementedError


course.check(diagnosis)

# %% [markdown]
# **Stop here until you have written yours.** The explanations below name the logs.
#
# ## The explanations

# %%
answers = course.use(diagnosis)()


def reading(cause, names):
    letter = next(letter for letter, (c, _) in answers.items() if c == cause)
    logs = {"healthy": (healthy, GREY), f"log {letter}": (LOGS[letter], RED)}
    panels(names, logs, cause)


reading("no spread", ("zero spread", "gradient", "kl", "reward"))

# %% [markdown]
# **No spread: nothing ever happens.** Every candidate was given the mean reward of its group. The
# same happens when a reward looks at the prompt only, or when a rule never fires. The advantage is
# r − mean = 0 for all, the loss has no gradient, and the KL penalty has none at the reference
# either. So the policy stays the base to the last bit: KL 0, gradient 0, ratios 1. The reward still
# goes up and down, since every step has different prompts: do not mistake that for learning. The
# run looks *calm*. A calm KL panel is a warning.

# %%
reading("temperature", ("outside", "entropy", "judge", "reward"))

# %% [markdown]
# **Temperature: the first pass gives it away.** The sampler drew at temperature 1.5 and handed
# over its own log-probs; the loss scored the same tokens at 1. The ratio compares two different
# distributions, so a third to a half of the tokens are outside the clip range *before any update*
# (dotted line), where a healthy run has exactly 0. No other cause does that, and exercise 1 finds
# it in the first step. The mean ratio tells you nothing: it is 0.97 to 1.00, since the ratio's
# expectation under the sampler is 1 whatever the two temperatures are.
#
# Why do entropy and KL grow? (G7) suggests an answer. Tokens that are likely at temperature 1 have
# a ratio above 1 and are clipped where their advantage is positive; rare tokens have a ratio below
# 1 and are clipped where it is negative. Good likely tokens are no longer pushed up, bad rare ones
# no longer down: the policy drifts towards the flatter distribution of its samples. The reward
# hardly moves; the judge falls to 0.

# %%
reading("clip", ("largest ratio", "gradient", "outside", "judge"))

# %% [markdown]
# **Clip: the brake is an accelerator.** With `max`, a good token that is already 1.1 times as
# likely is pushed further and further, and one that became rarer by mistake gets no gradient. From
# the first rollout on, the gradient of the last pass is four times the healthy one (0.65 against
# 0.15), because the clip no longer takes any tokens out of it. Single ratios reach 150; in the
# healthy run the largest is about 6. Up to 18% of the tokens are outside, twice as many.
#
# But **reward and judge do not show it.** They are noisy and react late, and end where the healthy
# run ends once the learning rate goes down. In a trial with three passes over each rollout we saw
# no difference at all, and with one pass there is none: the ratio is 1. A test of the four corners
# of the clip (notebook “GRPO by hand”) finds the bug in a millisecond.

# %%
reading("entropy", ("entropy", "zero spread", "judge", "kl"))

# %% [markdown]
# **Entropy: certain, and finished.** Half of the entropy was *added* to the loss; a bonus has to be
# subtracted. After 8 steps the policy has a quarter of its entropy left, after 24 less than 2%. All
# eight candidates of a group are then the same drawing, so groups have no spread (second panel: the
# same symptom as in “no spread”, but here it *develops*; there it was present from the start), and
# the advantage is 0: learning has ended. The reward stops rising, too.
#
# The judge does not fall. Most of the time it is higher than in the healthy run: a sharp policy
# makes fewer slips, as it does for free at a low temperature. What is gone is variety: of the right
# drawings of a prompt, a share of 0.17 is distinct (one in six), against 0.51 in the healthy run.
# Anyone who watches the judge alone will like this run.

# %%
reading("kl", ("kl", "judge", "reward", "entropy"))

# %% [markdown]
# **KL weight 0: drift.** The same reward, the same code, but nothing pulls back. The KL grows to
# 0.38 nats per token, six times that of the healthy run, and wanders. The reward ends a little
# *higher* than in the healthy run. The judge rises as long as the policy is near the base, and then
# falls behind, from 0.69 to between 0.52 and 0.63: the reward was never trained on drawings so far
# from the base, and the policy exploits its mistakes. A penalty would have kept the policy where
# the reward can be trusted.

# %%
reading("hacked", ("reward", "judge", "kl", "entropy"))

# %% [markdown]
# **Hacked: reward up, judge down.** The reward was the log of the share of pixels in the colour
# that the prompt names. It rises by 1.5 nats, while the judge falls from 0.50 to 0.13. It rewards
# colour and area and is blind to shape and position. The KL penalty was on.
#
# This log and the one before are easily confused. Both have a large KL (this one has the larger, in
# spite of the penalty), and in both the reward does well. The difference is *when* the judge falls:
# here from step 8 on, while the KL is still small, and far below the base; there late, and never
# below the base. Without a judge, the curves of a hacked reward look the best of all seven.
#
# ## What to watch
#
# | symptom | first suspect |
# |---|---|
# | ratios differ from 1 in the first pass | sampler and loss disagree: temperature, precision |
# | no spread from the first step | the reward does not see the candidate |
# | groups lose their spread while entropy falls | collapse: check signs, learning rate, KL weight |
# | single ratios of 100, large gradients in late passes | the clip, too many passes, a collapse |
# | KL keeps growing | weight of the penalty, learning rate |
# | reward up, judge down | the reward |
# | a KL of exactly 0 | nothing is learned, or the reference is the policy itself |
#
# These are six runs of one seed on a tiny model. The symptoms follow from the equations; their
# sizes are specific to this example.
#
# ## The check cell

# %%
course.final(first_pass_gap, alarm, diagnosis)
