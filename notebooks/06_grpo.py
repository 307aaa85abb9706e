# %% [markdown]
# # 06 · GRPO by hand
#
# **You will see** every part of the loss on numbers small enough to redo on paper: groups,
# advantages, ratio, clip, KL; why the loss is 0 while the model learns; how many groups are
# uninformative; and which patch of a picture deserves the credit.
#
# The code is in `grpo.py`. Two exercises contain a planted bug.

# %%
import copy
import random

import course
import matplotlib.pyplot as plt
import numpy as np
import torch
from course import BLUE, GREEN, GREY, RED

from eval import WorldJudge
from grpo import group_advantages, grpo_loss, kl_k3
from model import outputs, sample
from train import make_optimizers

course.start(minutes=0.7)
course.map(6)

# %% [markdown]
# ## A group grades itself
#
# Four candidates for one prompt, four rewards. (G1): A = (r − mean of the group) / (std of the
# group + eps). There is no value network: the group is its own baseline, as notebook 05 derives.

# %%
def advantages(rewards):
    """Exercise 1. (G1): rewards (B, G) -> advantages (B, G), with the sample std and eps = 1e-4."""
    raise NotImplementedError


course.check(advantages)

# %% [markdown]
# > **Predict.** Advantages of [1, 1, 0, 0]? Of [1, 0, 0, 0]? Of [5, 5, 5, 5]? Of [0.501, 0.500,
# > 0.500, 0.500]?

# %%
rewards = torch.tensor([[1, 1, 0, 0], [1, 0, 0, 0], [5, 5, 5, 5], [0.501, 0.5, 0.5, 0.5]])
for scale in ("group", "batch", "none"):
    print(f"scale={scale!r}")
    for row in group_advantages(rewards, scale).tolist():
        print("  ", *(f"{a:+7.3f}" for a in row))

# %% [markdown]
# **Check.** With `scale="group"`: ±0.87, not ±1, since the std is the sample std. A single success
# gets 1.5. Equal rewards give exactly 0. And the last row: dividing by the group's own std blows a
# difference of 0.001 up to nearly that of a whole success. `"group"` is the published form and the
# default of `group_advantages`; `train.py` calls it with `"batch"` (its `--scale`), which divides
# all groups by one std, that of all rewards, and so keeps small differences small.
#
# ## The clip
#
# (G4) ratio = new probability / probability when it was sampled. (G7) the objective stops pushing
# once the ratio has left [1 − clip_low, 1 + clip_high] *in the direction of the push*.

# %%
def clipped_objective(ratio, advantage, low, high):
    """Exercise 2: find and fix the planted bug. (G7) without its minus sign: the objective to
    maximise."""
    clipped = ratio.clamp(1 - low, 1 + high)
    return torch.max(ratio * advantage, clipped * advantage)


course.check(clipped_objective)

# %% [markdown]
# > **Predict.** Sketch the objective against the ratio, for A = +1 and for A = −1. Where is it
# > flat?

# %%
ratio, one = torch.linspace(0.4, 1.8, 281), torch.ones(1, 1)
figure, axes = plt.subplots(1, 2, figsize=(6.6, 2.5), sharey=True)
for ax, a in zip(axes, (1.0, -1.0)):
    x = ratio.log()[:, None].requires_grad_()
    A = torch.tensor([a])
    objective = [-grpo_loss(x[i : i + 1], 0 * one, None, A, one)[0] for i in range(281)]
    (slope,) = torch.autograd.grad(sum(objective), x)
    y, flat = torch.stack(objective).detach(), slope[:, 0].abs() < 1e-6
    ax.plot(ratio, y, color=BLUE, label="with a gradient")
    ax.plot(ratio[flat], y[flat], color=RED, linewidth=3, label="gradient 0")
    ax.axvspan(0.8, 1.2, color="#eef1f5", zorder=0, label="1 ± 0.2, the clip range")
    start, end = float(ratio[flat].min()), float(ratio[flat].max())
    ax.set(xlabel="ratio (G4)", title=f"A = {a:+.0f}: flat from {start:.2f} to {end:.2f}")
axes[0].set_ylabel("objective (minus G7)")
figure.legend(*axes[0].get_legend_handles_labels(), ncols=3, loc="outside lower center")
plt.show()

# %% [markdown]
# **Check.** Each curve has one flat side. The other side is never clipped: a good token that has
# become *rarer* and a bad one that has become *likelier* are mistakes, and keep their full
# gradient.
#
# ## The KL penalty
#
# (G6) k3 = exp(d) − d − 1 with d = log p_ref − log p, for each sampled token. It is never negative,
# and right on average.

# %%
def k3(logprobs, ref_logprobs):
    """Exercise 3. (G6), elementwise."""
    raise NotImplementedError


course.check(k3)

# %% [markdown]
# > **Predict.** The obvious estimate of the KL is log p − log p_ref of the sampled token (k1).
# > Which of the two varies less: always the same one?

# %%
g = torch.Generator().manual_seed(0)
ref, direction = torch.randn(2, 50, generator=g)
rows = []
for distance in np.geomspace(0.05, 3, 25):
    logp, logref = (ref + distance * direction).log_softmax(0), ref.log_softmax(0)
    p = logp.exp()
    exact = float((p * (logp - logref)).sum())
    spreads = []
    for estimate in (logp - logref, kl_k3(logp, logref)):  # of all 50 tokens: no sampling needed
        mean = float((p * estimate).sum())
        assert abs(mean - exact) < 1e-4  # both are right on average
        spreads.append(float((p * (estimate - mean) ** 2).sum()) ** 0.5)
    rows.append((exact, *spreads))

# %%
exact, k1_std, k3_std = np.array(rows).T
figure, ax = plt.subplots(figsize=(4.8, 2.5))
ax.loglog(exact, k1_std, color=GREY, label="k1 = log p − log p_ref")
ax.loglog(exact, k3_std, color=BLUE, label="k3 = exp(d) − d − 1")
better = exact[k3_std < k1_std].max()
ax.set(xlabel="exact KL, nats", ylabel="std of one token, nats",
       title=f"k3 varies less near the reference (here: below {better:.1f} nats)")
ax.legend()
plt.show()

# %% [markdown]
# **Check.** Both are right on average (the cell asserts it). Near the reference, where a KL penalty
# keeps the policy, k3 scatters far less. Far from it, k3 scatters *more*: exp(d) is huge where a
# token has become very improbable. That is where the spikes in training curves come from.
#
# ## “Why is my loss 0?”
#
# Now a real model: one object per picture, pre-trained in seconds by the loop of notebook 03. The
# reward of this demonstration is the share of red pixels: any reward would do.
#
# > **Predict.** What are the loss and the gradient norm of the first update after sampling? And
# > when the *same* samples are used four times?

# %%
base = course.small_base()
layout = base.vocab.layout("draw")
examples = [base.source.example(random.Random(i), "draw") for i in range(8)]
prompts = course.rows(base, "draw", examples)  # (8, L)
course.show_rows({"a row": course.strip(layout, prompts[0])}, "What is given, and what is sampled")

# %%
policy, noise = copy.deepcopy(base.model), torch.Generator().manual_seed(0)
tokens = sample(policy, layout, prompts, group=8, generator=noise)  # (64, L)
pictures = outputs(layout, tokens, base.vocab, base.codebook)[:, 0]  # (64, S, S, 3)
rewards = torch.from_numpy((pictures[..., 0] > 200).mean((1, 2))).view(8, 8)
A = group_advantages(rewards, "batch").flatten()
with torch.no_grad():
    old, mask = course.logprobs_of(policy, layout, tokens, group=8)  # (64, 16) each

optimizers = make_optimizers(policy, 2e-3)
print("pass     loss   gradient norm   mean ratio   clipped")
for i in range(4):
    new, _ = course.logprobs_of(policy, layout, tokens, group=8)
    loss, metrics = grpo_loss(new, old, None, A, mask)
    norm = course.update(policy, optimizers, loss, 2e-3)
    clipped = float(metrics["clip_low"] + metrics["clip_high"])
    print(f"{i + 1:4}{loss.item():9.4f}{norm:16.3f}{metrics['ratio']:13.3f}{clipped:10.1%}")

# %% [markdown]
# **Check.** First pass: the ratio is exactly 1, so the loss is minus the mean advantage, which is
# 0 by construction. Its *gradient* is the entire learning signal. Watch the reward, not the loss.
# From the second pass on the policy has moved, the loss is negative, and some ratios are outside
# the clip range.
#
# ## Uninformative groups
#
# If all candidates of a group get the same reward, every advantage is 0: the group is
# *uninformative*. With a binary reward that is common.

# %%
def zero_spread(p, group_size):
    """Exercise 4. The chance that all candidates of a group get the same reward, if each is right
    with probability p."""
    raise NotImplementedError


course.check(zero_spread)

# %% [markdown]
# The task: caption a picture, word for word as in the answer key. The reward is a rule: right or
# wrong. We sample 16 captions for each of 160 pictures, and also read them as groups of 8, 4 and 2.
#
# > **Predict.** About one caption in eight is right. What share of groups has no spread at G = 2,
# > 4, 8, 16? More or less than if every prompt were equally hard?

# %%
shown = [base.source.example(random.Random(f"zero/{i}"), "caption") for i in range(160)]
captions = base.vocab.layout("caption")
tokens = sample(base.model, captions, course.rows(base, "caption", shown), 16, noise)
texts = outputs(captions, tokens, base.vocab, base.codebook)
hit = torch.tensor([text == shown[i // 16].answer for i, text in enumerate(texts)]).float()
sizes, p, chance = (2, 4, 8, 16), float(hit.mean()), course.use(zero_spread)
equal = [(hit.view(-1, n).std(1) == 0).numpy() for n in sizes]  # one bool per group
idle, alike = [float(x.mean()) for x in equal], [chance(p, n) for n in sizes]
figure, ax = plt.subplots(figsize=(5.2, 2.6))
for x, y, yerr, color, label in (
        (-0.2, idle, course.reach(equal), RED, "measured, with 95% intervals"),
        (0.2, alike, None, GREY, f"if each prompt had p = {p:.2f}")):
    bars = ax.bar(np.arange(4) + x, y, 0.4, yerr=yerr, color=color, label=label)
    ax.bar_label(bars, [f"{v:.0%}" for v in y], fontsize=7, padding=2)
ax.set(xticks=range(4), xticklabels=sizes, xlabel="group size G", ylabel="share of groups",
       ylim=(0, 1), title=f"No spread: {idle[0]:.0%} of the groups of 2, {idle[-1]:.0%} of 16")
ax.legend(fontsize=8)
plt.show()

# %% [markdown]
# **Check.** With a larger group fewer groups are uninformative, but each step costs more. Prompts
# of unequal difficulty can only make it worse: your formula is convex in p, so easy and hopeless
# prompts add more uninformative groups than prompts in between save (Jensen). Here prompts differ
# little, since every picture has one object. `train.py` samples more questions than it keeps, and
# keeps the groups with the widest spread.
#
# ## Who deserves the credit?
#
# GRPO gives all 16 tokens of a picture the same advantage. But which token decided? We finish a
# drawing 512 times from each of its prefixes and ask the judge how often the *whole* picture is
# right. (The judge only explains here; nothing is trained on it.)

# %%
def given_prefix(layout, known):
    """The same layout, but the first `known` columns of the picture are given, not chosen."""
    later = copy.copy(layout)
    later.chosen, later.columns = layout.chosen.clone(), layout.columns[known:]
    later.chosen[layout.columns[:known]] = False
    later.start = later.columns[0]
    return later


def prefix_values(example, row, n=512):
    """(17,): the chance that a drawing, a row (L,), ends up right, given its first 0, 1, ..., 16
    codes."""
    values, codes = [], row[layout.chosen]
    for known in range(17):
        finished = row[None].repeat(n, 1)
        if known < 16:
            noise = torch.Generator().manual_seed(known)
            finished = sample(base.model, given_prefix(layout, known), row[None], n, noise)
        assert (finished[:, layout.chosen][:, :known] == codes[:known]).all()  # the prefix is kept
        pictures = outputs(layout, finished, base.vocab, base.codebook)
        assert pictures.shape == (n, 1, 32, 32, 3)  # whole pictures, one for each candidate
        values.append(WorldJudge().draw([example] * n, pictures).mean())
    return np.array(values)

# %%
prefixes = {f"{k} given": given_prefix(layout, k) for k in (0, 5, 15)}
course.show_rows({name: course.strip(later, prompts[0]) for name, later in prefixes.items()},
                 "A prefix is given, the rest is sampled")
samples = (base.source.example(random.Random(f"credit/{i}"), "draw") for i in range(99))
example = next(e for e in samples if "bottom" in e.prompt)
tokens = sample(base.model, layout, course.rows(base, "draw", [example]), 16,
                torch.Generator().manual_seed(3))
pictures = outputs(layout, tokens, base.vocab, base.codebook)
right = WorldJudge().draw([example] * 16, pictures)
picked = [*np.flatnonzero(right)[:1], *np.flatnonzero(~right)[:2]]
values = [prefix_values(example, tokens[i]) for i in picked]
assert all(v[16] == right[i] for i, v in zip(picked, values))  # the credits add up to the outcome

# %%
figure, axes = plt.subplots(2, 4, figsize=(7.8, 3.7), width_ratios=(1, 1, 1, 0.06))
for column, (i, v) in enumerate(zip(picked, values)):
    credit = np.diff(v).reshape(4, 4)
    title = ("right: A > 0", GREEN) if right[i] else ("wrong: A < 0", RED)
    axes[0, column].imshow(pictures[i, 0])
    axes[0, column].set_title(title[0], loc="center", color=title[1])
    axes[1, column].set_title(f"{v[0]:.2f} → {v[16]:.0f}", loc="center", fontweight="normal")
    image = axes[1, column].imshow(credit, cmap="RdBu", vmin=-1, vmax=1)
    for (y, x), c in np.ndenumerate(credit):
        axes[1, column].text(x, y, f"{c:+.2f}" if abs(c) > 0.1 else "·", ha="center", va="center",
                             fontsize=8, color="white" if abs(c) > 0.5 else "black")
for ax in axes.flat:
    ax.axis("off")
for ax, label in zip(axes[:, 0], ("drawing", "credit of\neach patch")):
    ax.text(-0.1, 0.5, label, ha="right", va="center", transform=ax.transAxes)
figure.colorbar(image, cax=axes[1, 3], label="change of the chance\nto end right")
axes[1, 3].axis("on")
figure.suptitle(f"“{example.prompt}”: chance of being right, before → after all tokens", fontsize=10)
plt.show()
for i, v in zip(picked, values):
    steps = np.sort(np.abs(np.diff(v)))
    print(f"{'right' if right[i] else 'wrong'}: from {v[0]:.2f} to {v[16]:.0f};",
          f"2 of the 16 steps make {steps[-2:].sum() / steps.sum():.0%} of all movement")

# %% [markdown]
# **Check.** The numbers say by how much each patch changed the chance to end up right (`·`: by at
# most 0.1); they add up to the outcome minus the chance at the start. Most are near 0; the fate of
# a picture is sealed where an object begins. GRPO knows nothing about this: it gives all tokens the
# same advantage and relies on many groups to average out the tokens that made no difference. That
# is the price of having no value network.
#
# ## Planted bug: the mean
#
# Answers end early, and the rest of the row is `<pad>`.

# %%
def token_mean(per_token, mask):
    """Exercise 5: find and fix the planted bug. (G9), "token": the mean loss of the valid tokens;
    both (N, T). 0 if there is none."""
    return (per_token * mask).sum() / mask.numel()


course.check(token_mean)

# %% [markdown]
# > **Predict.** What does the bug do to the size of a step when one long answer joins a batch of
# > short ones?

# %%
for longest in (4, 16, 64):
    mask = torch.arange(longest) < torch.tensor([[3]] * 7 + [[longest]])
    zero = torch.zeros(8, longest)
    loss, yours = grpo_loss(zero, zero, None, -torch.ones(8), mask)[0], token_mean(zero + 1, mask)
    print(f"longest row {longest:3}: grpo_loss {loss:.2f}, the function above {yours:.2f}")

# %% [markdown]
# **Check.** Every token's loss is 1 here, so any mean must be 1. With the bug the effective
# learning rate depends on how long the longest row of a batch happens to be. Nothing crashes, and
# the curves look fine.
#
# ## The check cell

# %%
course.final(advantages, clipped_objective, k3, zero_spread, token_mean)
