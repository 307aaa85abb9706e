# %% [markdown]
# # 07 · Aligning a model, and hacking a reward on purpose
#
# **You will see** the whole GRPO loop in twenty lines; a naive reward that is hacked within a
# minute while the true score falls; a KL penalty that holds the policy back; and then a better
# reward, what it costs, and how it compares with the obvious alternative.
#
# The code is in `grpo.py`, `reward.py` and `eval.py`. The base is that of notebook 06: one object
# per picture, noisy captions.

# %%
import copy
import random

import course
import matplotlib.pyplot as plt
import numpy as np
import torch
from course import BLUE, GOLD, GREEN, GREY, RED
from IPython.display import display

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
# One prompt, six drawings, two rewards: the film of this notebook. Each row of a strip keeps its
# noise, so only the policy changes along it; a green frame means that the judge finds the drawing
# right. (The film appears here once the runs below have ended.)

# %%
film = display("two rewards, soon", display_id="film")

# %% [markdown]
# Two numbers are measured throughout, on validation or test prompts, and never trained on: the
# judge's **true score**, and **diversity**, the share of distinct pictures among the right ones of
# a prompt.

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
# Sample groups, reward them, take one step, repeat. You know every line from notebook 06.

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
        seen = watch and (step % 9 == 0 or step == steps - 1)
        history.append(row | (look(policy) if seen else {}))
        course.update(policy, optimizers, loss, lr * schedule(step, steps))
    return policy, history


# %%
def look(policy):
    """What the judge thinks of a policy; its drawings (4, S, S, 3) for four prompts, and six
    drawings for one prompt, always from the same noise."""
    e, one = evaluator(policy), examples[3]
    drawn, six = e.outputs(examples[:4], seed=1), e.outputs([one], group=6, seed=2)
    frames = {"right": WorldJudge().draw(examples[:4], drawn), "drawn": drawn[:, 0],
              "six right": WorldJudge().draw([one] * 6, six), "six": six[:, 0]}
    return front(e, "paired", 64, 6, (1.0,))[0] | frames


# %% [markdown]
# We take one pass over each rollout, so the old log-probs are the new ones, detached.
#
# ## A naive reward
#
# "You asked for red? Then I count the red." It sounds sensible: no red at all is certainly wrong.

# %%
def color_share(picture, color):
    """Exercise 1. picture (S, S, 3) uint8, color (r, g, b) -> share of the pixels that differ from
    it by less than 60 in total, |r - r'| + |g - g'| + |b - b'|."""
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


runs = {f"kl_coef = {kl}": align(counted, kl, watch=True) for kl in (0, 1)}

# %%
def curves(runs, colors):
    """One seed: rewards and KL of the 64 drawings of a step; true score of 64 prompts × 6 drawings,
    with 95% intervals over the prompts alone."""
    figure, axes = plt.subplots(1, 3, figsize=(7.8, 2.5))
    for (name, (_, history)), color in zip(runs.items(), colors):
        for ax, key in zip(axes, ("reward", "compose", "kl")):
            rows = [row for row in history if key in row]
            x, y = [row["step"] for row in rows], [row[key] for row in rows]
            ax.plot(x, y, color=color, label=name)
            if key == "compose":
                shares = [np.arange(64) < round(64 * share) for share in y]
                ax.errorbar(x, y, course.reach(shares), fmt="o", color=color, markersize=4)
    panels = {"reward (seed 0)": "share of pixels counted", "true score": "share right (judge)",
              "KL to the base (k3)": "nats per token"}
    for ax, (title, unit) in zip(axes, panels.items()):
        ax.set(title=title, xlabel="step of training", ylabel=unit)
    axes[0].set_ylim(0, 1)
    axes[1].set_ylim(-0.03, 1)
    axes[2].set_yscale("symlog", linthresh=0.1)
    axes[0].legend(fontsize=8)
    course.show_small(figure)


curves(runs, (RED, BLUE))

# %%
for name, (_, history) in runs.items():
    seen = [row for row in history if "drawn" in row]
    tiles, right = ([row[key][i] for i in range(4) for row in seen] for key in ("drawn", "right"))
    titles = [f"step {row['step']}" for row in seen] + [""] * (3 * len(seen))
    course.show(tiles, titles, columns=len(seen), title=f"counting pixels, {name}", size=0.85,
                right=right, labels=[e.prompt for e in examples[:4]])
for name, (_, history) in runs.items():
    first, last = ([row for row in history if "drawn" in row][i] for i in (0, -1))
    print(f"{name}: reward {first['reward']:.2f} -> {last['reward']:.2f},",
          f"true score {first['compose']:.2f} -> {last['compose']:.2f}")

# %% [markdown]
# **Check.** Without a penalty the policy floods the picture: it found out what was *counted*. The
# reward grows several times over, the true score collapses, and nothing in the training curve looks
# wrong; it looks splendid. The KL penalty keeps the policy near the base, so it gains mostly in
# honest ways (a big object has more red than a small one).
#
# But a penalty cannot tell good changes from bad ones. It buys time; it does not fix the reward.

# %%
def frozen_reference(policy):
    """Exercise 2: find and fix the planted bug. The frozen copy of a policy from which the KL is
    measured."""
    reference = policy
    reference.eval()
    return reference


course.check(frozen_reference)

# %% [markdown]
# The symptom in a real run: the KL column is 0.000 from the first to the last step, and everybody
# is pleased with how stable training is. A KL that never moves is no sign of stability: the penalty
# is missing.
#
# ## A better reward
#
# We train the CLIP of notebook 04 on this world's noisy captions. Its reward asks: is the prompt
# likelier than all its own edits together (R3)? Once it is, the reward is flat (R8).

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
# A fair comparison needs two more things. `train.py` keeps the **pre-training loss** in every step
# (T1), against forgetting. And there is an obvious alternative: the same number of further
# *next-token* steps, with the same schedule, each on 48 examples, where (T1) adds 24 to a GRPO
# step. Three seeds of each, all from the same base.
#
# > **Predict.** Which has the best true score at temperature 1, and which when each may choose its
# > best temperature? And which has the most variety?

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
          "GRPO + pre-training": [align(matched, 0.05, 1.0, seed=seed)[0] for seed in (1, 2)]}
shown, history = align(matched, 0.05, 1.0, seed=0, watch=True)
trials["GRPO + pre-training"].insert(0, shown)
trials = {"base": [base.model]} | trials
aligned = trials["GRPO + pre-training"][0]
before, after = (evaluator(m).outputs(examples, seed=1) for m in (base.model, aligned))
right = WorldJudge().draw(examples * 2, np.concatenate((before, after)))
course.show([*before[:, 0], *after[:, 0]], [e.prompt for e in examples] + [""] * 8, right=right,
            size=0.95, labels=("base", "GRPO + pre-training, seed 0"),
            title=f"the same noise: {right[:8].sum()} of 8 right before, {right[8:].sum()} after")

# %%
strips = {}
for name, log in {"counted pixels, kl_coef = 0": runs["kl_coef = 0"][1],
                  "CLIP reward + pre-training": history}.items():
    seen = [row for row in log if "six" in row]
    steps, pictures, ok = ([row[key] for row in seen] for key in ("step", "six", "six right"))
    title = f"{name}: {ok[0].sum()} → {ok[-1].sum()} of 6 right"
    strips[title] = steps, np.stack(pictures), np.stack(ok)
course.film(strips, film)
print(f"the film at the top of this notebook has the prompt “{examples[3].prompt}”")

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
ax.set(xlabel="diversity: share of the right drawings of a prompt that are distinct",
       ylabel="true score: share right, by the judge", xlim=(0, None), ylim=(0.3, 1),
       title="Quality against diversity, T = 0.1 (left) to 1 (right)")
ax.legend(fontsize=8, loc="lower left", title="(seeds); thick: their mean, thin: each")
course.show_small(figure, 32)

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
# same diversity*. Reward training makes the policy surer of what it draws: that can raise the score
# at T = 1, and it moves the whole line to the left. (T1) matters: compare the lines with and
# without it. On prompts like these, a lower temperature or plain further training gives much of the
# gain for free. Notebook 10 asks where alignment gives more, and how much of a small difference is
# luck.
#
# ## Without any learning
#
# The same reward can simply *choose* (best of n): sample n pictures, keep the best. How far would a
# perfect reward get?

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
chosen, reaches = [], []
ideal = [float(expected(right.float().mean(1), n)) for n in sizes]
for n in sizes:  # every prompt's samples in sets of n: is the one that the reward prefers right?
    best = score.view(-1, n).argmax(1, keepdim=True)
    hits = right.view(-1, n).gather(1, best).view(len(prompts), -1).float().mean(1)  # (96,)
    chosen.append(float(hits.mean()))
    reaches.append(course.reach([hits.numpy()]))

# %%
seeds = cells["GRPO + pre-training"][0]
figure, ax = plt.subplots(figsize=(5.2, 2.8))
ax.plot(sizes, ideal, "o:", color=GREY, label="if the reward were perfect")
ax.errorbar(sizes, chosen, np.concatenate(reaches, 1), fmt="o-", color=GOLD,
            label="chosen by the CLIP reward (95%, 96 prompts)")
ax.axhspan(seeds.min(), seeds.max(), color=GREEN, alpha=0.25, linewidth=0)
ax.axhline(seeds.mean(), color=GREEN, label="GRPO + pre-training, one sample (3 seeds)")
ax.set(xlabel="samples per prompt", ylabel="true score: share right", ylim=(0, 1.02),
       title=f"Best of 8: {chosen[-1]:.2f}, untrained; GRPO, one sample: {seeds.mean():.2f}")
ax.set_xscale("log", base=2)
ax.set_xticks(sizes, sizes)
ax.legend(fontsize=8, loc="lower right")
plt.show()
print(f"of what a perfect reward would gain with 8 samples, this one gains "
      f"{(chosen[-1] - chosen[0]) / (ideal[-1] - ideal[0]):.0%}")

# %% [markdown]
# **Check.** The cheapest way to use a valid reward is not to train at all, if you can afford n
# samples for each answer, every time. Alignment is paid for once. A fair comparison shows both.
#
# ## The check cell

# %%
course.final(color_share, frozen_reference, best_of_n)
