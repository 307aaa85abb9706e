# %% [markdown]
# # 04 · Rewards, and why a judge stands apart
#
# **You will see** a small CLIP learn from noisy pairs which words belong to which picture; how its score becomes a reward
# that knows when to stop rising; a reward learned from preferences alone; and the mistakes that the reward cannot see, which
# is where a policy that is trained on it will go.
#
# From `reward.py`; the judge is the first third of `eval.py`.

# %%
import random

import course
import matplotlib.pyplot as plt
import numpy as np
import torch
from course import BLUE, GREY, RED

from data import NOISE, World, parse_caption, render, scene_edits
from eval import WorldJudge
from reward import CLIP, SURE, clip_loss, make_pairs, match_logprob, text_ids
from train import make_optimizers, schedule

course.start(minutes=1.3)

# %% [markdown]
# ## CLIP: which text belongs to which picture?
#
# N pictures and their N captions give N × N similarities; the right ones stand on the diagonal. (R2) asks of every row "which
# text?" and of every column "which picture?": two cross-entropies.

# %%
def info_nce(scores):
    """Exercise 1. Scaled similarities (N, N), pictures by texts -> the mean of the two cross-entropies, a number."""
    raise NotImplementedError


course.check(info_nce)

# %% [markdown]
# The root file adds three things: equal captions in a batch are *not* each other's negatives; every caption also competes
# against small **edits** of itself ("a red circle" against "a blue circle"); and similarity is counted part by part, every
# word looking for its patch and every patch for its word (R1).

# %%
world = World()
_, vocab = course.tokens_of(world)
torch.manual_seed(0)
clip = CLIP(vocab.n_text, width=48)
sample = [world.example(random.Random(f"heat/{i}"), "draw") for i in range(7)]


@torch.no_grad()
def heat():
    words = clip.text(text_ids(vocab, [e.prompt for e in sample]))
    return clip.similarity(clip.image(np.stack([e.picture for e in sample])), words)


def train_clip(steps=400, batch=40, lr=3e-3):
    """As train.Trainer.clip_stage: noisy pairs, each caption with four false edits."""
    optimizers, ranks = make_optimizers(clip, lr), []
    for step in range(steps):
        rng = random.Random(f"clip/{step}")
        examples = [world.example(rng, "draw", noise=NOISE) for _ in range(batch)]
        edited = [text for e in examples for text in world.negatives(rng, e.prompt, 4, longest=2)]
        ids, false = (text_ids(vocab, texts) for texts in ([e.prompt for e in examples], edited))
        loss, first = clip_loss(clip, np.stack([e.picture for e in examples]), ids, false)
        course.update(clip, optimizers, loss, lr * schedule(step, steps))
        ranks.append(float(first))
    return ranks


# %% [markdown]
# > **Predict.** One caption in six is false. How often will a picture's own caption come first among 40 captions and 4 edits?

# %%
course.show([e.picture for e in sample], [f"{i}: {e.prompt}" for i, e in enumerate(sample)], columns=7)
before, ranks, after = heat(), train_clip(), heat()
figure, axes = plt.subplots(1, 2, figsize=(6.6, 2.9))
for ax, (x, title) in zip(axes, ((before, "untrained: nothing stands out"), (after, "trained: the diagonal does"))):
    ax.imshow(x, cmap="Blues")
    ax.set(title=title, xlabel="text", ylabel="picture")
plt.show()
print(f"own caption first: {np.mean(ranks[:10]):.0%} in the first ten steps, {np.mean(ranks[-20:]):.0%} in the last twenty")

# %% [markdown]
# **Check.** It stays well below 100%, and it must: where the caption is wrong, coming first would be a mistake.
#
# ## Which patch does a word look for?

# %%
e = world.example(random.Random(12), "draw")
words = [w for w in e.prompt.split() if w not in ("a", "at", "the", "and")]
with torch.no_grad():
    looks = (clip.text(text_ids(vocab, [e.prompt]))[0] @ clip.image(e.picture[None])[0].T).reshape(-1, 4, 4)
positions = [i for i, w in enumerate(e.prompt.split()) if w in words]  # every word of this world is one token
figure, axes = plt.subplots(1, len(words) + 1, figsize=(1.25 * (len(words) + 1), 1.6))
for ax, x, title in zip(axes, [e.picture, *looks[positions]], ["the picture", *words]):
    ax.imshow(x, **({} if title == "the picture" else {"cmap": "Oranges"}))
    ax.set_title(title, loc="center")
    ax.axis("off")
plt.show()

# %% [markdown]
# Dark: the patches whose vector is most like the word's. Nobody told the model where anything is; it only knew which caption
# came with which picture. The maps are blunt: words have read their neighbours, patches have seen the others, and half
# a minute of training is not much. This is what a learned reward looks like inside.
#
# ## A reward that knows when to stop
#
# The raw similarity never stops rising, and a policy would chase its last decimals. (R3) asks instead: *how likely is the
# prompt, among itself and its own edits?* (R9) is flat once that is likelier than not.

# %%
def reward(picture, text, rng):
    return float(match_logprob(clip, vocab, picture[None], [text], [world.negatives(rng, text, 12)]))


rng, caption = random.Random(0), parse_caption("a red circle left of a blue square")
scene = next(e.truth[0] for e in (world.example(random.Random(i), "draw") for i in range(100000)) if caption.holds(e.truth[0]))
candidates = {"as asked": scene}
for kind, edited in rng.sample(changed := scene_edits(scene), len(changed)):
    if kind not in candidates and not caption.holds(edited):
        candidates[kind] = edited
scores = {kind: reward(render(s), caption.text(), random.Random(1)) for kind, s in candidates.items()}
shown, names = [render(s) for s in candidates.values()], list(candidates)
course.show(shown, names, columns=len(names), right=[k == "as asked" for k in names])

# %%
figure, ax = plt.subplots(figsize=(5.6, 2.5))
ax.bar(list(scores), list(scores.values()), color=[BLUE if k == "as asked" else RED for k in scores])
ax.axhline(np.log(SURE), color=GREY, linestyle="--")
ax.text(len(scores) - 0.4, np.log(SURE), " flat above:\n sure enough", color=GREY, va="center", fontsize=8)
ax.set(ylabel="log-probability (R3)", ylim=(-6.2, 0.4), title="“a red circle left of a blue square”: what each edit costs")
ax.tick_params(axis="x", rotation=30)
plt.show()

# %% [markdown]
# Colour, shape and a missing object cost a lot. But an object too many costs next to nothing here: every word still finds its patch.
# And this small CLIP is not sure even of the right picture (its bar does not reach the line).
#
# One picture is an anecdote. Validity is a *share*: of all (right, wrong) pairs of drawings for the same prompt, how many
# does the reward put in order? (R5)

# %%
def agreement(rewards, right):
    """Exercise 2. rewards (B, G), right (B, G) bool -> share of (right, wrong) pairs of the same prompt in which the right one
    has the higher reward, ties counting half."""
    raise NotImplementedError


course.check(agreement)

# %% [markdown]
# ## Why a judge stands apart
#
# We take true pictures, spoil each by one small edit, and ask whether the reward prefers the true one. The **judge** of
# `eval.py` reads pixels and checks every statement; it is exact here, so we could simply train on it. We do not: real tasks
# have no such judge, and *a judge that is trained on is no longer a judge*.
#
# > **Predict.** Which edits will the reward see best, which worst? (`twice`: one of the objects is there two times.)

# %%
truth, spoiled = [], {}
for i in range(200):
    e = world.example(random.Random(f"blind/{i}"), "draw", split="val")
    false = [(kind, s) for kind, s in scene_edits(e.truth[0]) if not e.truth[1].holds(s)]
    for kind in sorted({kind for kind, _ in false}):
        spoiled.setdefault(kind, []).append((e, random.Random(i).choice([s for k, s in false if k == kind])))
judge, seen = WorldJudge(), {}
for kind, pairs in spoiled.items():
    examples = [e for e, _ in pairs]
    others = [world.negatives(random.Random(f"{kind}/{j}"), e.prompt, 12) for j, e in enumerate(examples)]
    texts, sides = [e.prompt for e in examples], (np.stack([e.picture for e in examples]), np.stack([render(s) for _, s in pairs]))
    true, false = (match_logprob(clip, vocab, side, texts, others) for side in sides)
    seen[kind] = float(((true > false).float() + 0.5 * (true == false)).mean())
    assert judge.draw(examples, sides[0])[0].all() and not judge.draw(examples, sides[1])[0].any()  # the judge sees them all

# %%
order = sorted(seen, key=seen.get)
figure, ax = plt.subplots(figsize=(5.6, 2.6))
ax.barh([f"{k} ({len(spoiled[k])})" for k in order], [seen[k] for k in order], color=[RED if seen[k] < 0.8 else BLUE for k in order])
ax.axvline(0.5, color=GREY, linestyle="--")
ax.text(0.5, len(order) - 0.3, " a coin", color=GREY, fontsize=8, va="center")
ax.set(xlim=(0, 1), ylim=(-0.6, len(order)), xlabel="share of spoiled pictures that the reward ranks below the true one",
       title=f"The reward's weakest spot: “{order[0]}”")
plt.show()

# %% [markdown]
# **Check.** Colours, shapes and sizes are seen nearly always. *Where* things stand is seen less often, and least whether one
# of the right objects is there twice: in six or seven cases of ten, where a coin would see five. A policy that is trained on
# this reward will find out. That is why every quoted number of this repository comes from the judge, and why `train.py`
# measures this share (by kinds of fault) before *and after* alignment.
#
# ## Rewards from preferences
#
# Often nobody can say how good a picture is, but anybody can say which of two is better. **Bradley-Terry**:
# P(i beats j) = sigmoid(R_i − R_j). Learn R by maximum likelihood.

# %%
def bradley_terry(better, worse):
    """Exercise 3. (R6): the rewards of the better and of the worse sides, (M,) each -> the mean of -log P(better wins)."""
    raise NotImplementedError


course.check(bradley_terry)

# %% [markdown]
# > **Predict.** Eight players with known strengths play 1,500 games; we learn the strengths from the results alone. Will we
# > find the true numbers? And if a fifth of the results is written down the wrong way round?

# %%
def fitted(strengths, games, flipped, seed=0):
    g = torch.Generator().manual_seed(seed)
    i, j = (torch.randint(0, len(strengths), (games,), generator=g) for _ in range(2))
    i_wins = torch.rand(games, generator=g) < torch.sigmoid(strengths[i] - strengths[j])
    i_wins ^= torch.rand(games, generator=g) < flipped
    better, worse = torch.where(i_wins, i, j), torch.where(i_wins, j, i)
    r = torch.zeros(len(strengths), requires_grad=True)
    optimizer = torch.optim.LBFGS([r], max_iter=100)

    def closure():
        optimizer.zero_grad()
        loss = -torch.nn.functional.logsigmoid(r[better] - r[worse]).mean()
        loss.backward()
        return loss

    optimizer.step(closure)
    return r.detach()


strengths = torch.linspace(-2, 3, 8)
found = {share: fitted(strengths, 1500, share) for share in (0.0, 0.2)}

# %%
figure, ax = plt.subplots(figsize=(4, 2.8))
for (share, r), color in zip(found.items(), (BLUE, RED)):
    ax.plot(strengths, r, "o-", color=color, label=f"{share:.0%} of the labels wrong")
ax.plot(strengths, strengths - strengths.mean(), ":", color=GREY, label="true, moved to mean 0")
ax.set(xlabel="true strength", ylabel="learned R", title="Order survives noise, the scale does not")
ax.legend(fontsize=8)
plt.show()

# %% [markdown]
# **Check.** The level is lost (only differences of R count; `reward.py` sets it afterwards by an *anchor*, R7). Wrong
# labels shrink the differences: a model that is told the weaker one sometimes wins becomes careful. The order is what a
# group-relative method needs.
#
# Where do pairs come from here? By turns a caption or a picture is spoiled by one edit, and, in `train.py`, samples of
# the base are ranked by the CLIP score.

# %%
pairs = make_pairs(world, random.Random(4), 6)
tiles = [side[0] for p in pairs for side in (p.better, p.worse)]
words = [f"{mark}: {side[1]}" for p in pairs for mark, side in (("better", p.better), (f"worse ({p.kind})", p.worse))]
course.show(tiles, words, columns=6, right=[True, False] * len(pairs), size=1.35)
print("labels that are wrong, because the caption was noise:", sum(not p.clean for p in pairs), "of", len(pairs))

# %% [markdown]
# ## The check cell

# %%
course.final(info_nce, agreement, bradley_terry)
