# %% [markdown]
# # 07 · Aligning a model, and hacking a reward on purpose
#
# **You will see** the whole GRPO loop in twenty lines; a naive reward that is hacked within a
# minute while the true score falls; a KL penalty that holds the policy back; and then a reward
# that deserves the name, against the obvious alternative and with its price.
#
# From `grpo.py`, `reward.py` and `eval.py`. The base is that of notebook 06: one object a picture,
# noisy captions.

# %%
import copy
import random

import course
import matplotlib.pyplot as plt
import numpy as np
import torch
from course import BLUE, GOLD, GREEN, GREY, RED

from data import COLORS, NOISE, pictures_of
from eval import Evaluator, WorldJudge, front
from grpo import group_advantages, grpo_loss
from model import outputs, sample
from reward import CLIP, Rewards, clip_loss, text_ids
from train import make_optimizers, schedule

course.start(minutes=1.5)
course.map(7)
base = course.small_base()
layout = base.vocab.layout("draw")

# %% [markdown]
# Two numbers are measured all along, on validation prompts, and never used: the judge's **true
# score**, and **diversity**, the share of distinct pictures among the right ones of a prompt.

# %%
def evaluator(policy, split="val", rewards=None):
    source, judge = base.source, WorldJudge()
    return Evaluator(policy, base.vocab, base.codebook, source, judge, split, rewards=rewards)


examples = [base.source.example(random.Random(f"look/{i}"), "draw") for i in range(8)]
drawn = evaluator(base.model).outputs(examples, seed=1)
right = WorldJudge().draw(examples, drawn)
course.show(drawn[:, 0], [e.prompt for e in examples], right=right, size=1.05,
            title="the base, at temperature 1")
for row in front(evaluator(base.model), "paired", 64, 8, (1.0, 0.3)):
    print(row)

# %% [markdown]
# ## The loop
#
# Sample groups, reward them, take one step; again. Every line is one of notebook 06.

# %%
def align(reward_of, kl_coef, ptx_coef=0.0, steps=45, lr=2e-3, n=8, group=8, seed=0, watch=False):
    """GRPO from the base. reward_of(pictures (n·group, 1, S, S, 3), examples, rng) -> (n, group).
    ptx_coef: weight of the pre-training loss that is kept in the step (T1)."""
    policy, reference = copy.deepcopy(base.model), copy.deepcopy(base.model).requires_grad_(False)
    optimizers, history = make_optimizers(policy, lr), []
    noise = torch.Generator().manual_seed(seed)
    for step in range(steps):
        rng = random.Random(f"align/{seed}/{step}")
        examples = [base.source.example(rng, "draw") for _ in range(n)]
        tokens = sample(policy, layout, course.rows(base, "draw", examples), group, noise)
        rewards = reward_of(outputs(layout, tokens, base.vocab, base.codebook), examples, rng)
        new, mask = course.logprobs_of(policy, layout, tokens, group)
        ref = course.logprobs_of(reference, layout, tokens, group)[0]
        A = group_advantages(rewards, "batch").flatten()
        loss, metrics = grpo_loss(new, new.detach(), ref, A, mask, kl_coef=kl_coef)
        if ptx_coef:
            loss = loss + ptx_coef * course.next_token_loss(base, policy, rng, 24)
        row = {"step": step, "reward": float(rewards.mean()), "kl": float(metrics["kl"])}
        history.append(row | (look(policy) if watch and step % 11 == 0 else {}))
        course.update(policy, optimizers, loss, lr * schedule(step, steps))
    return policy, history


# %%
def look(policy):
    """What the judge thinks of a policy, and what it draws."""
    e = evaluator(policy)
    return front(e, "paired", 64, 6, (1.0,))[0] | {"drawn": e.outputs(examples[:4], seed=1)[:, 0]}


# %% [markdown]
# There is one pass over each rollout, so the old log-probs are the new ones without gradient.
#
# ## A naive reward
#
# "You asked for red? Then I count the red." It sounds sensible: no red at all is certainly wrong.

# %%
def color_share(picture, color):
    """Exercise 1. picture (S, S, 3) uint8, color (r, g, b) -> share of the pixels that differ from
    it by less than 60 in all, |r - r'| + |g - g'| + |b - b'|."""
    raise NotImplementedError


course.check(color_share)

# %% [markdown]
# > **Predict.** What will the pictures look like after 45 steps with this reward and *no* KL
# > penalty? And with a strong one (kl_coef = 1)? Write down reward and true score for both.

# %%
share = course.use(color_share)


def counted(pictures, examples, rng):
    """The naive reward of B·G pictures, (B, G): the share of the first colour that the prompt
    names."""
    group, rewards = len(pictures) // len(examples), []
    for i, picture in enumerate(pictures[:, 0]):
        words = examples[i // group].prompt.split()
        rewards.append(share(picture, COLORS[next(w for w in words if w in COLORS)]))
    return torch.tensor(rewards).view(-1, group)


runs = {f"KL · {kl}": align(counted, kl, watch=True) for kl in (0, 1)}

# %%
def curves(runs, colors):
    figure, axes = plt.subplots(1, 3, figsize=(7.6, 2.4))
    for (name, (_, history)), color in zip(runs.items(), colors):
        for ax, key in zip(axes, ("reward", "compose", "kl")):
            rows = [row for row in history if key in row]
            x, y = [row["step"] for row in rows], [row[key] for row in rows]
            ax.plot(x, y, "o-" if key == "compose" else "-", color=color, label=name)
    for ax, title in zip(axes, ("reward", "true score (judge)", "KL to the base (k3)")):
        ax.set(title=title, xlabel="step")
    axes[1].set_ylim(-0.03, 1)
    axes[2].set_yscale("symlog", linthresh=0.1)
    axes[2].set_ylabel("nats a token")
    axes[0].legend(fontsize=8)
    plt.show()


curves(runs, (RED, BLUE))

# %%
for name, (_, history) in runs.items():
    seen = [row for row in history if "drawn" in row]
    tiles = [row["drawn"][i] for i in range(4) for row in seen]
    titles = [f"step {row['step']}" for row in seen] + [""] * (3 * len(seen))
    course.show(tiles, titles, columns=len(seen), title=f"counting pixels, {name}", size=0.95)
print("prompts, row by row:", *[e.prompt for e in examples[:4]], sep="\n  ")
for name, (_, history) in runs.items():
    first, last = ([row for row in history if "drawn" in row][i] for i in (0, -1))
    print(f"{name}: reward {first['reward']:.2f} -> {last['reward']:.2f},",
          f"true score {first['compose']:.2f} -> {last['compose']:.2f}")

# %% [markdown]
# **Check.** Without a penalty the policy floods the picture: it found what was *counted*. The
# reward multiplies, the true score collapses, and nothing in the training curve looks wrong; it
# looks splendid. The KL penalty holds the policy near the base, so that it takes mostly the honest
# part of the reward (a big object has more red than a small one).
#
# But a penalty cannot tell good changes from bad ones. It buys time; it does not mend a reward.

# %%
def frozen_reference(policy):
    """Exercise 2: find and mend the planted bug. The frozen copy of a policy that the KL penalty
    holds on to."""
    reference = policy
    reference.eval()
    return reference


course.check(frozen_reference)

# %% [markdown]
# The symptom in a real run: the KL column is 0.000 from the first to the last step, and everybody
# is pleased with how stable training is. A KL that never moves is not a stable run, it is a
# missing one.
#
# ## A better reward
#
# The CLIP of notebook 04, on this world's noisy captions: is the prompt likelier than all its own
# edits together (R3)? Flat above (R8).

# %%
torch.manual_seed(0)
clip, steps, noise = CLIP(base.vocab.n_text, width=48), 130, NOISE | {"wrong": 0.3}
optimizers = make_optimizers(clip, 3e-3)
for step in range(steps):
    rng, edits = random.Random(f"clip/{step}"), []
    pairs = [base.source.example(rng, "draw", noise=noise) for _ in range(32)]
    for e in pairs:
        false = base.source.negatives(rng, e.prompt, 4)
        edits += false + [rng.choice(false) for _ in range(4 - len(false))]
    ids, edited = text_ids(base.vocab, [e.prompt for e in pairs]), text_ids(base.vocab, edits)
    loss, _ = clip_loss(clip, pictures_of(pairs), ids, edited)
    course.update(clip, optimizers, loss, 3e-3 * schedule(step, steps))
rewards = Rewards(clip, base.vocab)


def matched(pictures, examples, rng):
    return rewards(base.source, "draw", examples, pictures, rng)[0]

# %% [markdown]
# Two more things make a fair trial. `train.py` keeps the **pre-training loss** in every step (T1),
# against forgetting. And there is an obvious alternative: the same number of further *next-token*
# steps, with the same schedule, each on 48 examples where GRPO's step had 24. Three seeds of each,
# from the one base.
#
# > **Predict.** True score at temperature 1, and at each one's best temperature: which is best?
# > And which has the most variety?

# %%
def more_training(seed, steps=45, lr=2e-3):
    """The obvious alternative: next-token loss only."""
    policy = copy.deepcopy(base.model)
    optimizers = make_optimizers(policy, lr)
    for step in range(steps):
        loss = course.next_token_loss(base, policy, random.Random(f"more/{seed}/{step}"))
        course.update(policy, optimizers, loss, lr * schedule(step, steps))
    return policy


trials = {"next token only": [more_training(seed) for seed in range(3)],
          "GRPO": [align(matched, 0.05, seed=seed)[0] for seed in range(3)],
          "GRPO + pre-training": [align(matched, 0.05, 1.0, seed=seed)[0] for seed in range(3)]}
trials = {"base": [base.model]} | trials
aligned = trials["GRPO + pre-training"][0]
before, after = (evaluator(m).outputs(examples, seed=1) for m in (base.model, aligned))
right = WorldJudge().draw(examples * 2, np.concatenate((before, after)))
course.show([*before[:, 0], *after[:, 0]], ["before"] * 8 + ["after"] * 8, right=right, size=0.95,
            title="the same prompts and the same noise, before and after")

# %%
TEMPERATURES = (0.1, 0.3, 0.5, 0.7, 1.0)
fronts = {name: [front(evaluator(m, "test"), "paired", 48, 8, TEMPERATURES) for m in models]
          for name, models in trials.items()}


def column(name, key):
    """(seeds, temperatures) of a method."""
    return np.array([[row[key] for row in rows] for rows in fronts[name]])


figure, ax = plt.subplots(figsize=(5.4, 3.2))
for name, color in zip(fronts, (GREY, BLUE, GOLD, GREEN)):
    x, y = column(name, "diversity"), column(name, "compose")
    ax.plot(x.mean(0), y.mean(0), "o-", color=color, label=f"{name} ({len(x)})")
    ax.plot(x.T, y.T, color=color, linewidth=0.5, alpha=0.6)
ax.set(xlabel="diversity: distinct among the right ones", ylabel="true score (judge)",
       title="Quality against diversity, T = 0.1 (left) to 1 (right)")
ax.legend(fontsize=8, loc="lower left", title="thick: mean of the seeds")
plt.show()

# %%
print(f"{'':22}{'at T = 1':>20}{'at the best T':>20}{'diversity at T = 1':>22}")
cells = {}
for name in fronts:
    y, d = column(name, "compose"), column(name, "diversity")
    cells[name] = y[:, -1], y.max(1), d[:, -1]
    texts = [f"{v.mean():10.2f} ({v.min():.2f}-{v.max():.2f})" for v in cells[name]]
    print(f"{name:22}" + "".join(texts))
for what, k in (("at T = 1", 0), ("at the best T", 1), ("diversity at T = 1", 2)):
    order = sorted(cells, key=lambda name: -cells[name][k].mean())
    clear = cells[order[0]][k].min() > cells[order[1]][k].max()
    verdict = "in every seed ahead of" if clear else "within the seeds' spread of"
    print(f"{what}: {order[0]} first, {verdict} {order[1]}; last {order[-1]}")

# %% [markdown]
# **Check.** Read it slowly. A score at temperature 1, the right end of each line, is a headline;
# the front says what it cost. A line is better than another only where it lies above it *at the
# same diversity*. Reward training makes the policy surer of what it draws: that can raise the
# score at T = 1, and it moves the whole line to the left. (T1) is no decoration: compare the lines
# with and without it. On prompts like these much of the gain is what a temperature, or plain
# further training, gives for nothing. Where alignment gives more, and how much of a small
# difference is luck, notebook 10 asks.
#
# ## Without any learning
#
# The same reward can simply *choose*: sample n pictures, keep the best. How far would a perfect
# reward get?

# %%
def best_of_n(p, n):
    """Exercise 3. p (B,): the chance of each prompt that one sample is right -> the expected share
    of prompts with at least one right sample among n."""
    raise NotImplementedError


course.check(best_of_n)

# %%
e, sizes, group, expected = evaluator(base.model, "test"), (1, 2, 4, 8), 64, course.use(best_of_n)
prompts = e.examples("draw", 96)
pictures = e.outputs(prompts, group=group)
score = rewards(base.source, "draw", prompts, pictures, random.Random(0))[0]  # (96, 64)
right = WorldJudge().draw([x for x in prompts for _ in range(group)], pictures)
right = torch.from_numpy(right).view(-1, group)
chosen, ideal = [], [float(expected(right.float().mean(1), n)) for n in sizes]
for n in sizes:  # every prompt's samples in sets of n: is the one that the reward prefers right?
    best = score.view(-1, n).argmax(1, keepdim=True)
    chosen.append(float(right.view(-1, n).gather(1, best).float().mean()))

# %%
one = cells["GRPO + pre-training"][0].mean()
figure, ax = plt.subplots(figsize=(4.8, 2.6))
ax.plot(sizes, ideal, "o:", color=GREY, label="if the reward were perfect")
ax.plot(sizes, chosen, "o-", color=GOLD, label="chosen by the CLIP reward")
ax.axhline(one, color=GREEN, label="GRPO + pre-training, one sample")
ax.set(xlabel="samples a prompt", ylabel="true score (judge)", xticks=sizes, ylim=(0.3, 1.02),
       title=f"Best of 8: {chosen[-1]:.2f}, without training; GRPO, one sample: {one:.2f}")
ax.legend(fontsize=8, loc="lower right")
plt.show()
print(f"of what a perfect reward would gain with 8 samples, this one gains "
      f"{(chosen[-1] - chosen[0]) / (ideal[-1] - ideal[0]):.0%}")

# %% [markdown]
# **Check.** The cheapest way to use a valid reward is not to train at all, if n samples an answer
# can be paid for, every time. Alignment pays once. A fair table shows both.
#
# ## The check cell

# %%
course.final(color_share, frozen_reference, best_of_n)
