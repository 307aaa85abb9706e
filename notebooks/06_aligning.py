# %% [markdown]
# # 06 · Aligning a model, and hacking a reward on purpose
#
# **You will see** the whole GRPO loop in twenty lines; a naive reward that is hacked within a minute while the true score
# falls to nothing; a KL penalty that prevents it; and then a reward that deserves the name, before and after, with the
# price it has.
#
# From `grpo.py`, `reward.py` and `eval.py`. The base is that of notebook 05: one object a picture, noisy captions.

# %%
import copy
import random

import course
import matplotlib.pyplot as plt
import numpy as np
import torch
from course import BLUE, GOLD, GREEN, GREY, RED

from data import COLORS, NOISE
from eval import Evaluator, WorldJudge, decode
from grpo import rollout, rollout_loss
from kernels import fused_linear_grpo_loss
from reward import CLIP, Rewards, clip_loss, text_ids
from train import make_optimizers, schedule

course.start(minutes=1.6)
base = course.small_base()

# %% [markdown]
# Two numbers are measured all along, on validation prompts, and never used: the judge's **true score** and **diversity**,
# the share of distinct pictures among the right ones of a prompt.

# %%
def asked(policy, split="val", **more):
    return Evaluator(policy, base.vocab, base.codebook, base.source, WorldJudge(), split, **more)


examples = [base.source.example(random.Random(f"look/{i}"), "draw") for i in range(8)]
drawn = asked(base.model).outputs(examples, seed=1)
right = WorldJudge().draw(examples, drawn)[0]
course.show(drawn, [e.prompt for e in examples], right=right, title="the base, at temperature 1", size=1.05)
print(asked(base.model).front(("paired",), (1.0, 0.3), 64, 8))

# %% [markdown]
# ## The loop
#
# Sample groups, reward them, one clipped step, again. `grpo.rollout` and `grpo.rollout_loss` do what notebook 05 did by hand.

# %%
def align(reward_of, kl_coef, ptx_coef=0.0, scale="group", steps=45, lr=2e-3, prompts=8, group=8):
    """GRPO from the base; reward_of(pictures, examples, rng) -> (prompts, group). Returns the policy and its history.
    ptx_coef: weight of the pre-training loss that is kept in the step (T1)."""
    policy, reference = copy.deepcopy(base.model), copy.deepcopy(base.model).requires_grad_(False)
    optimizers, noise, history = make_optimizers(policy, lr), torch.Generator().manual_seed(0), []
    for step in range(steps + 1):
        rng = random.Random(f"align/{step}")
        examples = [base.source.example(rng, "draw") for _ in range(prompts)]

        def reward(filled, tokens):
            return reward_of(np.stack(decode(base.vocab, base.codebook, "draw", filled, tokens)), examples, rng), {}

        r = rollout(policy, course.batch_of(base, examples), group, reward, base.vocab, noise, task="draw")
        loss, metrics = rollout_loss(policy, reference, r, fused_linear_grpo_loss, kl_coef=kl_coef, scale=scale)
        if ptx_coef:
            loss = loss + ptx_coef * course.next_token_loss(base, policy, rng, 24)
        row = {"step": step, "reward": float(r.rewards.mean()), "kl": float(metrics["kl"])}
        if step % 15 == 0:
            row |= asked(policy).front(("paired",), (1.0,), 64, 6)[0] | {"drawn": asked(policy).outputs(looked_at, seed=1)}
        history.append(row)
        course.update(policy, optimizers, loss, lr * min(1, (step + 1) / 10))
    return policy, history


looked_at = examples[:4]

# %% [markdown]
# ## A naive reward
#
# "You asked for red? Then I count the red." It sounds sensible: no red at all is certainly wrong.

# %%
def color_share(picture, color):
    """Exercise 1. picture (S, S, 3) uint8, color (r, g, b) -> share of the pixels that differ from it by less than 60 in all,
    |r - r'| + |g - g'| + |b - b'|."""
    raise NotImplementedError


course.check(color_share)

# %% [markdown]
# > **Predict.** What will the pictures look like after 45 steps with this reward and *no* KL penalty? And with a strong one
# > (kl_coef = 1)? Write down reward and true score for both.

# %%
def pixels(pictures, examples, rng):
    """The naive reward of B·G pictures, (B, G)."""
    wanted = np.array([COLORS[next(w for w in e.prompt.split() if w in COLORS)] for e in examples])
    groups = pictures.reshape(len(examples), -1, 32, 32, 3).astype(int)
    near = np.abs(groups - wanted[:, None, None, None]).sum(-1) < 60
    return torch.from_numpy(near.mean((2, 3))).float()


runs = {f"KL · {kl}": align(pixels, kl) for kl in (0, 1)}

# %%
def curves(runs, colors):
    figure, axes = plt.subplots(1, 3, figsize=(7.6, 2.4))
    for (name, (_, history)), color in zip(runs.items(), colors):
        seen = [row for row in history if "compose" in row]
        axes[0].plot([row["step"] for row in history], [row["reward"] for row in history], color=color, label=name)
        axes[1].plot([row["step"] for row in seen], [row["compose"] for row in seen], "o-", color=color)
        axes[2].plot([row["step"] for row in history], [row["kl"] for row in history], color=color)
    for ax, title in zip(axes, ("reward", "true score (judge)", "KL to the base (k3)")):
        ax.set(title=title, xlabel="step", ylim=(0, None) if title != "reward" else None)
    axes[1].set_ylim(-0.03, 1)
    axes[0].legend(fontsize=8)
    plt.show()


curves(runs, (RED, BLUE))

# %%
watched = [(name, row) for name, (_, history) in runs.items() for row in history if "drawn" in row]
tiles = [row["drawn"][i] for i in range(4) for _, row in watched]
titles = [f"{name}: step {row['step']}" for name, row in watched] + [""] * (3 * len(watched))
course.show(tiles, titles, columns=len(watched), title="counting pixels: what the policy finds, and what the KL penalty allows")
print("prompts, row by row:", *[e.prompt for e in looked_at], sep="\n  ")
for name, (_, history) in runs.items():
    first, last = (history[i] for i in (0, -1))
    print(f"{name}: reward {first['reward']:.2f} -> {last['reward']:.2f}, true score {first['compose']:.2f} -> {last['compose']:.2f}")

# %% [markdown]
# **Check.** Without a penalty the policy floods the picture: it found what was *counted*. The reward multiplies, the true
# score falls to nothing, and nothing in the training curve looks wrong; it looks splendid. The KL penalty holds the policy
# near the base, so it takes only the honest part of the reward (a big object has more red than a small one), and the true
# score keeps most of what it was (each point is good to ±0.05). The peaks of the KL are k3's: it spikes when a token becomes
# very improbable.
#
# But the penalty cannot tell good changes from bad ones. It buys time; it does not mend a reward.

# %%
def frozen_reference(policy):
    """Exercise 2: find and mend the planted bug. The frozen copy of a policy that the KL penalty holds on to."""
    reference = policy
    reference.eval()
    return reference


course.check(frozen_reference)

# %% [markdown]
# The symptom in a real run: the KL column is 0.000 from the first to the last step, and everybody is pleased with how stable
# training is. A KL that never moves is not a stable run, it is a missing one.
#
# ## A better reward
#
# The CLIP of notebook 04, on this world's noisy captions: is the prompt likelier than all its own edits together (R3), and
# flat above (R9)?

# %%
torch.manual_seed(0)
clip, steps = CLIP(base.vocab.n_text, width=48), 130
optimizers = make_optimizers(clip, 3e-3)
for step in range(steps):
    rng = random.Random(f"clip/{step}")
    pairs = [base.source.example(rng, "draw", noise=NOISE | {"wrong": 0.3}) for _ in range(32)]
    edits = [text for e in pairs for text in base.source.negatives(rng, e.prompt, 4)]
    ids, false = (text_ids(base.vocab, texts) for texts in ([e.prompt for e in pairs], edits))
    loss, _ = clip_loss(clip, np.stack([e.picture for e in pairs]), ids, false)
    course.update(clip, optimizers, loss, 3e-3 * schedule(step, steps))
rewards = Rewards(clip, base.vocab)


def matched(pictures, examples, rng):
    return rewards.total(rewards(base.source, "draw", examples, pictures, rng))


# %% [markdown]
# And the other thing that `train.py` does: it keeps the **pre-training loss** in every step (T1), against forgetting.
#
# > **Predict.** True score and diversity of the aligned model at temperature 1, with and without the pre-training loss?
# > Will it beat the base at temperature 0.1?

# %%
better = {"GRPO": align(matched, 0.05, scale="batch"), "GRPO + pre-training": align(matched, 0.05, 1.0, scale="batch")}
curves(better, (GOLD, GREEN))
aligned = better["GRPO + pre-training"][0]
before, after = (asked(m).outputs(examples, seed=1) for m in (base.model, aligned))
both = [*before, *after]
course.show(both, ["before"] * 8 + ["after"] * 8, right=WorldJudge().draw(examples * 2, np.stack(both))[0], size=0.95,
            title="the same prompts and the same noise")

# %% [markdown]
# A fair comparison needs one more model: the base after as many *plain next-token steps*. And a front, not a number: quality
# against diversity, over temperatures.

# %%
def more_training(steps=46, lr=2e-3):
    """The obvious alternative: the same number of steps, next-token loss only (48 examples a step, where GRPO's took 24)."""
    policy = copy.deepcopy(base.model)
    optimizers = make_optimizers(policy, lr)
    for step in range(steps):
        loss = course.next_token_loss(base, policy, random.Random(f"more/{step}"))
        course.update(policy, optimizers, loss, lr * min(1, (step + 1) / 10))
    return policy


temperatures = (0.1, 0.3, 0.5, 0.7, 1.0)
policies = {"base": base.model, "next-token only": more_training()} | {name: run[0] for name, run in better.items()}
fronts = {name: asked(m, "test").front(("paired",), temperatures, 64, 8) for name, m in policies.items()}

# %%
figure, ax = plt.subplots(figsize=(5, 3.2))
for (name, rows), color in zip(fronts.items(), (GREY, BLUE, GOLD, GREEN)):
    x, y = [r["diversity"] for r in rows], [r["compose"] for r in rows]
    ax.plot(x, y, "o-", color=color, label=name)
ax.set(xlabel="diversity: distinct among the right ones", ylabel="true score", xlim=(0.1, 0.65),
       title="Quality against diversity, T = 0.1 (left) to 1 (right)")
ax.legend(fontsize=8, loc="lower left")
plt.show()

# %% [markdown]
# **Check.** Read it slowly. At temperature 1, the right end of each line, both aligned models are above the base: a
# headline. But the base at a low temperature is as good, for nothing. GRPO alone has bought quality with variety: its whole
# line lies below or left of the base's. With the pre-training loss kept, the line is back at the base's: nothing is lost, and
# on prompts like these nothing is gained that a temperature would not give. Where alignment does give something (three
# objects, answers that the web gets wrong), and how much of a small difference is luck, notebook 08 asks.
#
# ## Without any learning
#
# The same reward can simply *choose*: sample n pictures, keep the best. How far would a perfect reward get?

# %%
def best_of_n(p, n):
    """Exercise 3. p (B,): the chance of each prompt that one sample is right -> the expected share of prompts with at least
    one right sample among n."""
    raise NotImplementedError


course.check(best_of_n)

# %%
one = asked(base.model, "test")
prompts = one.examples("draw", 64)
p = WorldJudge().draw([e for e in prompts for _ in range(16)], one.outputs(prompts, group=16))[0].reshape(64, 16).mean(1)
sizes = (1, 2, 4, 8)
perfect = [float((1 - (1 - p) ** n).mean()) for n in sizes]
chosen = [float(WorldJudge().draw(prompts, asked(base.model, "test", rewards=rewards, n=n).outputs(prompts))[0].mean()) for n in sizes]
figure, ax = plt.subplots(figsize=(4.4, 2.6))
ax.plot(sizes, perfect, "o:", color=GREY, label="if the reward were perfect")
ax.plot(sizes, chosen, "o-", color=GOLD, label="chosen by the CLIP reward")
ax.axhline(fronts["GRPO + pre-training"][-1]["compose"], color=GREEN, label="aligned, one sample")
ax.set(xlabel="samples a prompt", ylabel="true score", xticks=sizes, title="Best of n: the reward without training", ylim=(0.3, 1.02))
ax.legend(fontsize=8, loc="lower right")
plt.show()

# %% [markdown]
# **Check.** On this small world the CLIP chooses as well as a perfect reward would (above the dotted line is the luck of
# different samples). So the reward is valid here, and the cheapest way to use it is not to train at all, if n samples an
# answer can be paid for, every time. Alignment pays once. A fair table shows both.
#
# ## The check cell

# %%
course.final(color_share, frozen_reference, best_of_n)
