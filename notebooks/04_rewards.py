# %% [markdown]
# # 04 · Rewards, and why a judge stands apart
#
# **You will see** a small CLIP learn from noisy pairs which words belong to which picture; how its
# score becomes a reward that saturates; a reward learned from preferences alone; and the mistakes
# that the reward cannot see, which are the ones that a policy trained on it will make.
#
# The code is in `reward.py`; the judge is the first part of `eval.py`.

# %%
import random

import course
import matplotlib.pyplot as plt
import numpy as np
import torch
from course import BLUE, GREY, RED

from data import NOISE, World, parse_caption, pictures_of, render, scene_edits
from eval import T_QUANTILES, WorldJudge
from reward import CLIP, SURE, clip_loss, make_pairs, match_logprob, text_ids
from train import make_optimizers, schedule

course.start(minutes=1)
course.map(4)

# %% [markdown]
# ## CLIP: which text belongs to which picture?
#
# N pictures and their N captions give N × N similarities; the right ones are on the diagonal.
# (R2) asks for every row "which text?" and for every column "which picture?": two cross-entropies.

# %%
def info_nce(scores):
    """Exercise 1. Scaled similarities (N, N), pictures by texts -> the mean of the two
    cross-entropies, a number."""
    raise NotImplementedError


course.check(info_nce)

# %% [markdown]
# `reward.py` adds three things: equal captions in a batch are *not* each other's negatives; every
# caption also competes with small **edits** of itself ("a red circle" against "a blue circle"), its
# hard negatives; and similarity uses *late interaction*: every word looks for its best patch, and
# every patch for its best word (R1).

# %%
world = World()
_, vocab = course.tokens_of(world)
torch.manual_seed(0)
clip = CLIP(vocab.n_text, width=48)
seven = [world.example(random.Random(f"heat/{i}"), "draw") for i in range(7)]


@torch.no_grad()
def similarities(examples):
    words = clip.text(text_ids(vocab, [e.prompt for e in examples]))
    return clip.similarity(clip.image(pictures_of(examples)), words)


# %%
def train_clip(steps=300, batch=40, lr=3e-3):
    """Like train.fit_clip: noisy pairs, and four false edits of each caption."""
    optimizers, first = make_optimizers(clip, lr), []
    for step in range(steps):
        rng, edits = random.Random(f"clip/{step}"), []
        examples = [world.example(rng, "draw", noise=NOISE) for _ in range(batch)]
        for e in examples:
            false = world.negatives(rng, e.prompt, 4, longest=2)
            edits += false + [rng.choice(false) for _ in range(4 - len(false))]
        ids, edited = text_ids(vocab, [e.prompt for e in examples]), text_ids(vocab, edits)
        loss, r1 = clip_loss(clip, pictures_of(examples), ids, edited)
        course.update(clip, optimizers, loss, lr * schedule(step, steps))
        first.append(float(r1))
    return first

# %% [markdown]
# > **Predict.** One caption in six is false. How often will a picture's own caption come first
# > among 40 captions and 4 edits?

# %%
course.show(pictures_of(seven), [f"{i}: {e.prompt}" for i, e in enumerate(seven)], columns=7)
before, first, after = similarities(seven), train_clip(), similarities(seven)
figure, axes = plt.subplots(1, 2, figsize=(6.6, 2.9))
for ax, (x, when) in zip(axes, ((before, "untrained"), (after, "trained"))):
    image = ax.imshow(x, cmap="Blues")
    best = int((x.argmax(1) == torch.arange(7)).sum())
    figure.colorbar(image, label="similarity (R1)", shrink=0.85)
    ax.set(title=f"{when}: {best} of 7 right", xlabel="text", ylabel="picture", xticks=range(7))
plt.show()
print(f"own caption first: {np.mean(first[:10]):.0%} in the first ten steps, "
      f"{np.mean(first[-20:]):.0%} in the last twenty")

# %% [markdown]
# **Check.** The share stays well below 100%, and it should: where the caption is false, ranking it
# first would be a mistake.
#
# ## Which patch does a word look for?

# %%
e = world.example(random.Random(12), "draw")
words = e.prompt.split()  # every word of this world is one token
kept = [i for i, w in enumerate(words) if w not in ("a", "at", "the", "and")]
with torch.no_grad():
    word, patch = clip.text(text_ids(vocab, [e.prompt]))[0], clip.image(e.pictures)[0]
    maps = (word @ patch.T).reshape(-1, 4, 4)
figure, axes = plt.subplots(1, len(kept) + 1, figsize=(1.25 * (len(kept) + 1) + 0.6, 1.9))
axes[0].imshow(e.pictures[0])
axes[0].set_title("the picture", loc="center")
scale = dict(vmin=float(maps[kept].min()), vmax=float(maps[kept].max()))
for ax, i in zip(axes[1:], kept):
    image = ax.imshow(maps[i], cmap="Oranges", **scale)
    ax.set_title(words[i], loc="center")
    y, x = divmod(int(maps[i].argmax()), 4)
    ax.plot(x, y, "k+", markersize=7)
for ax in axes:
    ax.axis("off")
figure.colorbar(image, ax=axes, label="cosine of word\nand patch", shrink=0.8)
figure.suptitle(f"“{e.prompt}”   +: the word's best patch", fontsize=9)
plt.show()

# %% [markdown]
# Dark patches are those whose vector is most similar to the word's. Nobody labelled where anything
# is; the model only knew which caption came with which picture. The maps are coarse: each word has
# attended to its neighbours, each patch to the others, and half a minute of training is not much.
# This is what a learned reward looks like inside.
#
# ## A reward that knows when to stop
#
# The raw similarity can always rise further, and a policy would chase its last decimals. (R3) asks
# instead: *how likely is the prompt, against its own edits?* (R8) is flat once the prompt is
# likelier than all of them together.

# %%
rng, caption = random.Random(0), parse_caption("a red circle left of a blue square")
scene = next(e.truth[0] for e in (world.example(random.Random(i), "draw") for i in range(100000))
             if caption.holds(e.truth[0]))
candidates, edits = {"as asked": scene}, list(scene_edits(scene))
for kind, edited in rng.sample(edits, len(edits)):
    if kind not in candidates and not caption.holds(edited):
        candidates[kind] = edited
negatives = world.negatives(random.Random(1), caption.text(), 12)
views = np.stack([render(s) for s in candidates.values()])
scores = match_logprob(clip, vocab, views, [caption.text()], [negatives])
course.show(views, list(candidates), columns=len(views),
            right=[kind == "as asked" for kind in candidates])

# %%
cheapest, own = list(candidates)[1:][int(scores[1:].argmax())], float(scores[0])
difference, order = float(scores[1:].max()) - own, np.argsort(-np.array(scores))
names = [list(candidates)[i] for i in order]
figure, ax = plt.subplots(figsize=(6, 2.6))
colors = [BLUE if name == "as asked" else RED for name in names]
ax.scatter(np.array(scores)[order], names, color=colors, zorder=3)
ax.hlines(names, own, np.array(scores)[order], color=colors, linewidth=1)
ax.axvline(own, color=BLUE, linewidth=0.8)
ax.axvline(np.log(SURE), color=GREY, linestyle="--")
ax.text(np.log(SURE), len(names) - 1, " flat above:\n sure enough", color=GREY, fontsize=8)
ax.invert_yaxis()
ax.set(xlabel="log-probability of the prompt given the picture (R3), nats", xlim=(-6.2, 0.4),
       ylabel="edit of the picture",
       title=f"“{caption.text()}”: {(scores[1:] > own).sum()} edits score higher")
plt.show()
print(f"the cheapest edit: “{cheapest}”, {difference:+.2f} against the right picture")
print(f"the right picture itself reaches {own:.2f}; the reward is flat above {np.log(SURE):.2f}")

# %% [markdown]
# Every edit makes the picture wrong, but some cost nothing: they even score higher. One picture is
# an anecdote. *Validity* is a share: of all (right, wrong) pairs of drawings for the same prompt,
# in how many does the reward prefer the right one? (R5)

# %%
def agreement(rewards, right):
    """Exercise 2. rewards (B, G), right (B, G) bool -> share of (right, wrong) pairs of the same
    prompt in which the right one has the higher reward, ties counting half."""
    raise NotImplementedError


course.check(agreement)

# %% [markdown]
# ## Why a judge stands apart
#
# We take true pictures, spoil each by one small edit, and ask whether the reward prefers the true
# one. The **judge** of `eval.py` reads pixels and checks every statement; it is exact here, so we
# could simply train on it. We do not: real tasks have no such judge, and *a judge that is trained
# on is no longer a judge*.
#
# > **Predict.** Which edits will the reward see best, which worst? (`drop`: one object less; `add`:
# > one more; `twice`: one more of a kind that is there; `swap`: two objects exchange their
# > colours.)

# %%
spoiled = {}
for i in range(200):
    e = world.example(random.Random(f"blind/{i}"), "draw", split="val")
    false = [(kind, s) for kind, s in scene_edits(e.truth[0]) if not e.truth[1].holds(s)]
    for kind in sorted({kind for kind, _ in false}):
        scene = random.Random(i).choice([s for k, s in false if k == kind])
        spoiled.setdefault(kind, []).append((e, render(scene)))
judge, measure, seen = WorldJudge(), course.use(agreement), {}
for kind, pairs in spoiled.items():
    examples = [e for e, _ in pairs]
    texts = [e.prompt for e in examples]
    others = [world.negatives(random.Random(f"{kind}/{j}"), t, 12) for j, t in enumerate(texts)]
    sides = np.stack([(e.pictures[0], wrong) for e, wrong in pairs])  # (N, 2, S, S, 3)
    rewards = match_logprob(clip, vocab, sides.reshape(-1, 32, 32, 3), texts, others).view(-1, 2)
    seen[kind] = float(measure(rewards, torch.tensor([[True, False]] * len(pairs))))
    verdicts = [judge.draw(examples, sides[:, side, None]) for side in (0, 1)]
    assert verdicts[0].all() and not verdicts[1].any()  # the judge sees every fault

# %%
order = sorted(seen, key=seen.get)
figure, ax = plt.subplots(figsize=(5.6, 2.6))
reach = course.reach([np.arange(n := len(spoiled[k])) < round(seen[k] * n) for k in order])
ax.barh([f"{k} ({len(spoiled[k])})" for k in order], [seen[k] for k in order], xerr=reach,
        color=[RED if seen[k] < 0.8 else BLUE for k in order], error_kw={"linewidth": 0.8})
ax.axvline(0.5, color=GREY, linestyle="--")
ax.text(0.5, len(order) - 0.3, " chance", color=GREY, fontsize=8, va="center")
ax.set(xlim=(0, 1), ylim=(-0.6, len(order)), title=f"The reward's weakest spot: “{order[0]}”",
       ylabel="edit (pairs)",
       xlabel="share of spoiled pictures that the reward ranks below the true one (bars: 95%)")
plt.show()
print("seen in 95% or more:", ", ".join(k for k in order if seen[k] >= 0.95) or "none")
print("missed in more than a fifth:", ", ".join(k for k in order if seen[k] < 0.8) or "none")

# %% [markdown]
# **Check.** The judge sees every one of these faults (the `assert` says so); the reward does not. A
# policy that is trained on this reward will find out which faults go unseen. That is why the scores
# of drawings in this repository come from the judge, and why `train.py` measures this share, for
# each kind of fault, before *and after* alignment.
#
# ## Rewards from preferences
#
# Often nobody can say how good a picture is, but anybody can say which of two is better.
# **Bradley-Terry**: P(i beats j) = sigmoid(R_i − R_j). Learn R by maximum likelihood.

# %%
def bradley_terry(better, worse):
    """Exercise 3. (R6): the rewards of the better and of the worse sides, (M,) each -> the mean of
    -log P(better wins)."""
    raise NotImplementedError


course.check(bradley_terry)

# %% [markdown]
# > **Predict.** Eight players with known strengths play 5,000 games; we learn the strengths from
# > the results alone. Will we find the true numbers? Their order? What if a fifth of the results
# > are recorded the wrong way round, or if there are only 500 games?

# %%
loss_of = course.use(bradley_terry)


def fitted(strengths, games, flipped, seed=0):
    """Strengths R (8,), learned from the results of random games."""
    g = torch.Generator().manual_seed(seed)
    i, j = (torch.randint(0, len(strengths), (games,), generator=g) for _ in range(2))
    i_wins = torch.rand(games, generator=g) < torch.sigmoid(strengths[i] - strengths[j])
    i_wins ^= torch.rand(games, generator=g) < flipped
    better, worse = torch.where(i_wins, i, j), torch.where(i_wins, j, i)
    r = torch.zeros(len(strengths), requires_grad=True)
    optimizer = torch.optim.LBFGS([r], max_iter=100)

    def closure():
        optimizer.zero_grad()
        loss = loss_of(r[better], r[worse])
        loss.backward()
        return loss

    optimizer.step(closure)
    return r.detach()


# %%
strengths, seeds, fits = torch.linspace(-2, 3, 8), 30, {}
for games in (500, 5000):
    for share in (0.0, 0.2):
        some = torch.stack([fitted(strengths, games, share, seed) for seed in range(seeds)])
        fits[games, share] = some - some.mean(1, keepdim=True)  # the level is free: mean 0
        whole = int((some.diff(dim=1) > 0).all(1).sum())
        print(f"{games:5} games, {share:3.0%} wrong: order right in {whole} of {seeds} seeds")
figure, ax = plt.subplots(figsize=(4.8, 3))
true = strengths - strengths.mean()
for share, color in ((0.0, BLUE), (0.2, RED)):
    some = fits[5000, share]
    slope = float((some.mean(0) @ true) / (true @ true))
    half = T_QUANTILES[seeds - 2] * some.std(0) / seeds**0.5
    ax.errorbar(strengths, some.mean(0), half, fmt="o-", color=color, markersize=4,
                label=f"{share:.0%} of the results wrong: slope {slope:.2f}")
ax.plot(strengths, true, ":", color="black", zorder=3, label="true, moved to mean 0: slope 1")
ax.set(xlabel="true strength, nats", ylabel="learned R, nats",
       title=f"5,000 games, {seeds} seeds; 95% intervals are smaller than the dots")
ax.legend(fontsize=8)
plt.show()

# %% [markdown]
# **Check.** The level is lost: only differences of R count (`reward.py` sets it afterwards by an
# *anchor*, R7). Wrong labels shrink the differences: a model that sees the weaker player win too
# often becomes cautious. The order, which is what a group-relative method needs, survives **if
# there are enough games**; with few, neighbours change places, and wrong labels make that worse.
#
# Where do our pairs come from? One edit spoils the caption or the picture, in turn; in `train.py`,
# samples of the base ranked by the CLIP score are added.

# %%
pairs, tiles, words = make_pairs(world, random.Random(4), 6), [], []
for p in pairs:
    tiles += [p.better[0], p.worse[0]]
    words += [f"better: {p.better[1]}", f"worse ({p.kind}): {p.worse[1]}"]
course.show(tiles, words, columns=6, right=[True, False] * len(pairs), size=1.35)
wrong = sum(not p.clean for p in make_pairs(world, random.Random(5), 600))
print(f"of 600 such pairs, {wrong} come from a false caption: their label may be wrong")

# %% [markdown]
# ## The check cell

# %%
course.final(info_nce, agreement, bradley_terry)
