# %% [markdown]
# # 05 · GRPO by hand
#
# **You will see** every part of the loss on numbers small enough to redo on paper: groups, advantages, ratio, clip, KL; why
# the loss is 0 while the model learns; how many groups teach nothing; and which patch of a picture deserves the credit.
#
# From `grpo.py`. Two planted bugs are waiting.

# %%
import copy
import random

import course
import matplotlib.pyplot as plt
import numpy as np
import torch
from course import BLUE, GREEN, GREY, RED

from eval import WorldJudge, decode
from grpo import group_advantages, grpo_loss, kl_k3, rollout, rollout_loss
from kernels import fused_linear_grpo_loss
from model import sample
from train import make_optimizers

course.start(minutes=0.5)

# %% [markdown]
# ## A group grades itself
#
# Four candidates for one prompt, four rewards. (G1): A = (r − mean of the group) / (std of the group + eps). No value network:
# the siblings are the baseline.

# %%
def advantages(rewards):
    """Exercise 1. (G1): rewards (B, G) -> advantages (B, G), with the sample std and eps = 1e-4."""
    raise NotImplementedError


course.check(advantages)

# %% [markdown]
# > **Predict.** Advantages of [1, 1, 0, 0]? Of [1, 0, 0, 0]? Of [5, 5, 5, 5]? Of [0.501, 0.500, 0.500, 0.500]?

# %%
rewards = torch.tensor([[1, 1, 0, 0], [1, 0, 0, 0], [5, 5, 5, 5], [0.501, 0.5, 0.5, 0.5]])
for scale in ("group", "batch", "none"):
    print(f"scale={scale!r}:", *[str([round(a, 3) for a in row]) for row in group_advantages(rewards, scale).tolist()], sep="\n  ")

# %% [markdown]
# **Check.** ±0.87, not ±1: the sample std. A lonely success counts 1.5. Equal rewards: exactly 0. And the last row:
# dividing by the group's std blows a difference of 0.001 up to that of a whole success. That is why this repository divides
# by the std of the batch.
#
# ## The clip
#
# (G4) ratio = new probability / probability when it was sampled. (G7) the objective stops pushing once the ratio has left
# [1 − clip_low, 1 + clip_high] *in the direction of the push*.

# %%
def clipped_objective(ratio, advantage, low, high):
    """Exercise 2: find and mend the planted bug. (G7) without its minus sign: what is to be made large."""
    clipped = ratio.clamp(1 - low, 1 + high)
    return torch.max(ratio * advantage, clipped * advantage)


course.check(clipped_objective)

# %% [markdown]
# > **Predict.** Sketch the objective against the ratio, for A = +1 and for A = −1. Where is it flat?

# %%
ratio = torch.linspace(0.4, 1.8, 281)
figure, axes = plt.subplots(1, 2, figsize=(6.6, 2.5), sharey=True)
for ax, a in zip(axes, (1.0, -1.0)):
    x, one = ratio.log()[:, None].requires_grad_(), torch.ones(281, 1)
    objective = [-grpo_loss(x[i : i + 1], one[:1] * 0, None, torch.tensor([a]), one[:1])[0] for i in range(281)]
    (slope,) = torch.autograd.grad(sum(objective), x)
    y, flat = torch.stack(objective).detach(), slope[:, 0].abs() < 1e-6
    ax.plot(ratio, y, color=BLUE)
    ax.plot(ratio[flat], y[flat], color=RED, linewidth=3, label="gradient 0")
    ax.axvspan(0.8, 1.2, color="#eef1f5", zorder=0)
    ax.set(xlabel="ratio", title=f"A = {a:+.0f}: no more push {'up' if a > 0 else 'down'}")
    ax.legend(loc="upper left" if a > 0 else "upper right")
axes[0].set_ylabel("objective")
plt.show()

# %% [markdown]
# **Check.** One flat side each. The other side is never clipped: a good token that has become *rarer* and a bad one that
# has become *likelier* are mistakes, and keep their full gradient. The planted bug silences exactly the mistakes.
#
# ## The KL penalty
#
# (G6) k3 = exp(d) − d − 1 with d = ref − new, per sampled token. Never negative, and right on average.

# %%
def k3(logprobs, ref_logprobs):
    """Exercise 3. (G6), elementwise."""
    raise NotImplementedError


course.check(k3)

# %% [markdown]
# > **Predict.** The obvious estimate of the KL is log p − log p_ref of the sampled token (k1). Which of the two scatters less?

# %%
g = torch.Generator().manual_seed(0)
ref = torch.randn(50, generator=g)
new = ref + 0.3 * torch.randn(50, generator=g)
logp, logref = new.log_softmax(0), ref.log_softmax(0)
exact = float((logp.exp() * (logp - logref)).sum())
ids = torch.multinomial(logp.exp(), 20000, replacement=True, generator=g)
estimates = {"k1": (logp - logref)[ids], "k3": kl_k3(logp, logref)[ids]}
figure, ax = plt.subplots(figsize=(4.8, 2.3))
for (name, x), color in zip(estimates.items(), (GREY, BLUE)):
    ax.hist(x.numpy(), bins=np.linspace(-0.8, 0.8, 65), color=color, alpha=0.75, label=f"{name}: mean {x.mean():.4f}, std {x.std():.3f}")
ax.axvline(exact, color=RED, linewidth=1.2, label=f"exact KL {exact:.4f}")
ax.set(xlabel="estimate from one token", yticks=[], title="Both are right on average, k3 scatters less")
ax.legend(fontsize=8)
plt.show()

# %% [markdown]
# ## “Why is my loss 0?”
#
# Now a real model: one object a picture, pre-trained in a quarter of a minute by the loop of notebook 03. The reward of this
# demonstration is the share of red pixels: any reward would do.
#
# > **Predict.** Loss and gradient norm of the first update after sampling? And when the *same* samples are used four times?

# %%
base = course.small_base()
prompts = course.batch_of(base, [base.source.example(random.Random(i), "draw") for i in range(8)])


def redness(filled, tokens):
    pictures = torch.as_tensor(np.stack(decode(base.vocab, base.codebook, "draw", filled, tokens))).float()
    return (pictures[..., 0] > 200).float().mean((1, 2)).view(8, -1), {}


policy, rows = copy.deepcopy(base.model), []
optimizers = make_optimizers(policy, 2e-3)
r = rollout(policy, prompts, 8, redness, base.vocab, torch.Generator().manual_seed(0), task="draw")
for _ in range(4):
    loss, metrics = rollout_loss(policy, base.model, r, fused_linear_grpo_loss, kl_coef=0.0)
    norm = course.update(policy, optimizers, loss, 2e-3)
    rows.append((float(loss.detach()), norm, float(metrics["ratio"]), float(metrics["clip_low"] + metrics["clip_high"])))
print("pass     loss   gradient norm   mean ratio   clipped")
for i, (loss, norm, mean, share) in enumerate(rows):
    print(f"{i + 1:4}{loss:9.4f}{norm:16.3f}{mean:13.3f}{share:10.1%}")

# %% [markdown]
# **Check.** First pass: the ratio is exactly 1, so the loss is minus the mean advantage, which is 0 by construction. Its
# *gradient* is the whole learning signal. Watch the reward, not the loss. From the second pass on the policy has moved, the
# loss is negative, and some ratios are outside the clip range.
#
# ## Groups that teach nothing
#
# If all candidates of a group get the same reward, every advantage is 0. With a binary reward that is common.

# %%
def zero_spread(p, group_size):
    """Exercise 4. The chance that all candidates of a group get the same reward, if each is right with probability p."""
    raise NotImplementedError


course.check(zero_spread)

# %% [markdown]
# The task: write the caption of a picture, word for word as in the key; a rule, right or wrong. 160 pictures, 16 captions
# each, which we also read as groups of 8, 4 and 2.
#
# > **Predict.** About one caption in eight is right. Which share of groups has no spread at G = 2, 4, 8, 16?

# %%
shown = [base.source.example(random.Random(f"zero/{i}"), "caption") for i in range(160)]
batch = course.batch_of(base, shown)
tokens = sample(base.model, batch, base.vocab, torch.Generator().manual_seed(0), group=16)
texts = decode(base.vocab, base.codebook, "caption", batch.repeat(16), tokens)
hit = torch.tensor([[texts[16 * i + j] == e.answer for j in range(16)] for i, e in enumerate(shown)]).float()
sizes, p = (2, 4, 8, 16), float(hit.mean())
idle = [float((hit.view(160, -1, n).std(2) == 0).float().mean()) for n in sizes]
alike = [p**n + (1 - p) ** n for n in sizes]
figure, ax = plt.subplots(figsize=(4.6, 2.5))
bars = ax.bar(np.arange(4) - 0.2, idle, 0.4, color=RED, label="measured")
ax.bar(np.arange(4) + 0.2, alike, 0.4, color=GREY, label=f"if each prompt had p = {p:.2f}")
ax.bar_label(bars, [f"{x:.0%}" for x in idle], fontsize=8)
ax.set(xticks=range(4), xticklabels=sizes, xlabel="group size", ylim=(0, 1), title="Groups without any spread: no gradient but the KL's")
ax.legend(fontsize=8)
plt.show()

# %% [markdown]
# **Check.** The larger the group, the rarer the silence, and the dearer the step. Real groups are silent more often than
# the formula with one p says, because prompts differ: the easy and the hopeless ones have no spread. (Two experiments that
# textbooks like show nothing at this size, so they are not here: group size under a *dense* reward, and leaving out the std
# under Adam, which rescales the gradient anyway.)
#
# ## Who deserves the credit?
#
# GRPO gives all 16 tokens of a picture the same advantage. But which token decided? We finish a drawing 128 times from each
# of its prefixes and ask the judge (here it only explains; nothing is trained on it) how often the finished picture is
# right.

# %%
def prefix_values(example, drawing, n=128):
    """(17,): the chance that a drawing (16,) of codes ends right, given its first 0, 1, ..., 16 codes."""
    one, values = course.batch_of(base, [example]), []
    first = int((one.patch[0] >= 0).nonzero()[0])
    for known in range(16):
        template = one._replace(tokens=one.tokens.clone())
        template.tokens[0, first : first + known] = drawing[:known] + base.vocab.n_text
        filled = sample(base.model, template, base.vocab, torch.Generator().manual_seed(known), group=n)
        pictures = np.stack(decode(base.vocab, base.codebook, "draw", template.repeat(n), filled))
        values.append(WorldJudge().draw([example] * n, pictures)[0].mean())
    last = base.codebook.decode(drawing[None]).numpy()
    return np.array(values + [float(WorldJudge().draw([example], last)[0][0])])


example = next(e for e in (base.source.example(random.Random(f"credit/{i}"), "draw") for i in range(99)) if "bottom" in e.prompt)
batch = course.batch_of(base, [example])
tokens = sample(base.model, batch, base.vocab, torch.Generator().manual_seed(3), group=16)
codes = (tokens[:, batch.patch[0] >= 0] - base.vocab.n_text)
pictures = base.codebook.decode(codes).numpy()
right = WorldJudge().draw([example] * 16, pictures)[0]
picked = [int(np.flatnonzero(right)[0]), *np.flatnonzero(~right)[:2].tolist()]
values = [prefix_values(example, codes[i]) for i in picked]

# %%
figure, axes = plt.subplots(2, 4, figsize=(7.4, 3.5), width_ratios=(1, 1, 1, 0.06))
for column, (i, v) in enumerate(zip(picked, values)):
    axes[0, column].imshow(pictures[i])
    title, color = ("right: A > 0 for all 16", GREEN) if right[i] else ("wrong: A < 0 for all 16", RED)
    axes[0, column].set_title(title, loc="center", color=color)
    image = axes[1, column].imshow(np.diff(v).reshape(4, 4), cmap="RdBu", vmin=-0.7, vmax=0.7)
    for y, x in np.ndindex(4, 4):
        step = np.diff(v).reshape(4, 4)[y, x]
        axes[1, column].text(x, y, f"{step:+.1f}" if abs(step) > 0.05 else "·", ha="center", va="center", fontsize=8,
                             color="white" if abs(step) > 0.5 else "black")
for ax in axes.flat:
    ax.axis("off")
figure.colorbar(image, cax=axes[1, 3], label="credit")
axes[1, 3].axis("on")
figure.suptitle(f"“{example.prompt}”: one or two patches decide, all sixteen are paid", fontsize=10, fontweight="bold")
plt.show()

# %% [markdown]
# **Check.** The numbers say by how much each patch changed the chance to end right. Most are 0; the fate of a picture is
# sealed where an object begins (or does not). GRPO knows nothing of this: it pays all tokens alike and leaves it to many
# groups to average the innocent ones out. That is its price for having no value network.
#
# ## Planted bug: the mean
#
# Answers end early, and the rest of the row is padding.

# %%
def token_mean(per_token, mask):
    """Exercise 5: find and mend the planted bug. (G9), "token": the mean loss of the valid tokens; both (N, T)."""
    return (per_token * mask).sum() / mask.numel()


course.check(token_mean)

# %% [markdown]
# > **Predict.** What does the bug do to the size of a step when one long answer joins a batch of short ones?

# %%
for longest in (4, 16, 64):
    mask = torch.arange(longest) < torch.tensor([[3]] * 7 + [[longest]])
    loss = grpo_loss(torch.zeros(8, longest), torch.zeros(8, longest), None, -torch.ones(8), mask)[0]
    print(f"longest row {longest:3}: mean of the valid tokens {loss:.2f}, with the bug {mask.float().mean():.2f}")

# %% [markdown]
# **Check.** Every token's loss is 1 here, so any mean must be 1. With the bug the learning rate depends on how long the
# longest row of a batch happens to be. Nothing crashes, and the curves look fine.
#
# ## The check cell

# %%
course.final(advantages, clipped_objective, k3, zero_spread, token_mean)
