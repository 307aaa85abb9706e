# %% [markdown]
# # 01 · The world and its tokens
#
# **You will see** how a picture and a sentence become one row of whole numbers, which is all that the model of this course
# ever reads or writes; what of a picture survives that; and how wrong the captions are from which it will learn.
#
# Everything here comes from `data.py` and the first half of `model.py`. Nothing is trained but a k-means.

# %%
import random

import course
import matplotlib.pyplot as plt
import numpy as np
import torch
from course import BLUE, GOLD, GREY, RED

import data
from data import NOISE, PAD, Vocabulary, World, noisy_caption, render, sample_scene, true_caption
from model import Codebook

course.start(minutes=0.5)

# %% [markdown]
# ## A scene is a small record
#
# One to three coloured shapes on a 2 × 2 grid of cells. Picture, captions, questions and answers are all derived from the
# record, so every answer is known exactly. That is the point of a synthetic world: we can always tell who is right.

# %%
rng = random.Random(3)
scene = sample_scene(rng, "paired", count=2)
for thing in scene:
    print(thing)
course.show([render(scene)], [true_caption(rng, scene).text()], columns=1, size=1.6)

# %% [markdown]
# Four *pools* of scenes decide what a model may learn from what. Pictures of the pool `paired` come with captions;
# `prompted` and `three` are only asked for, in alignment; `heldout` shows pairs of kinds that no training text names.

# %%
rng = random.Random(1)
scenes = [sample_scene(rng, pool) for pool in data.COUNTS for _ in range(2)]
words = [f"{pool}: {true_caption(rng, s).text()}" for pool, s in zip((p for p in data.COUNTS for _ in range(2)), scenes)]
course.show([render(s) for s in scenes], words, columns=4, size=1.5)

# %% [markdown]
# > **Predict.** We draw `paired` scenes (one or two objects) again and again. How many *different* pictures are there in all:
# > hundreds, thousands, millions? And how many different 8 × 8 patches do they consist of?

# %%
sizes = (30, 100, 300, 1000, 3000, 10000)
pictures = np.stack([render(sample_scene(rng)) for _ in range(sizes[-1])])
patches = Codebook(None, patch=8).cut(pictures).byte().numpy()
distinct = lambda rows: len({row.tobytes() for row in rows})
counts = {"pictures": [distinct(pictures[:n]) for n in sizes],
          "patches of 8 × 8 pixels": [distinct(patches[:n].reshape(-1, 192)) for n in sizes]}
kinds = sum(data.in_pool("paired", pair) for pair in data.pairs_of(data.KINDS))
print(f"one object: 12 kinds x 2 sizes x 4 cells = {12 * 2 * 4};  two: {kinds} pairs x 4 sizes x 12 places = {kinds * 48}")

# %%
figure, ax = plt.subplots(figsize=(5.2, 2.7))
for (name, values), color in zip(counts.items(), (BLUE, RED)):
    ax.loglog(sizes, values, "o-", color=color)
    ax.text(sizes[-1] * 1.15, values[-1], f"{values[-1]:,} {name}", color=color, va="center")
ax.loglog(sizes, sizes, ":", color=GREY)
ax.set(xlabel="scenes drawn", ylabel="different ones among them", title="A few patches make thousands of pictures", xlim=(25, 12000))
plt.show()

# %% [markdown]
# **Check.** 96 + 2,400 = 2,496 pictures, and about a hundred patches. So a picture can be written as 16 patch *numbers*, and
# a list of the patches (the **codebook**) turns numbers back into pixels: no trained image encoder is needed. The price:
# pre-training sees *all* 2,496 pictures, so a fair test must ask for something else (three objects, pairs held out).

# %% [markdown]
# ## From pixels to codes
#
# (M1) a patch gets the number of the nearest codebook entry; (M2) an entry is the mean of its patches. First yours, by hand.

# %%
def cut_patches(picture, p):
    """Exercise 1. A picture (S, S, 3) -> its patches (P, p·p·3), row by row, each flattened. Two reshapes and a permute."""
    raise NotImplementedError


course.check(cut_patches)

# %%
def nearest_code(patches, entries):
    """Exercise 2. (M1): patches (N, D), entries (K, D) -> (N,) the number of the nearest entry of each patch.

    |x - c|² = |x|² - 2 x·c + |c|², and |x|² is the same for every entry: one matrix product is enough."""
    raise NotImplementedError


course.check(nearest_code)

# %%
def kmeans_step(patches, entries):
    """Exercise 3. (M2): move every entry (K, D) to the mean of the patches (N, D) whose code it is; stay if there is none."""
    raise NotImplementedError


course.check(kmeans_step)

# %% [markdown]
# > **Predict.** With fewer codes than there are different patches, something is lost. What goes first: the colours, the
# > shapes, or the small objects?

# %%
some = pictures[:2000]
books = {k: Codebook.fit(some, k, patch=8) for k in (4, 8, 16, 32, 64, 128)}
quality = {k: book.psnr(some) for k, book in books.items()}
three = np.stack([render(sample_scene(random.Random(s), "three")) for s in (1, 2)])
shown = [three] + [book.decode(book.encode(three)).numpy() for book in books.values()]
names = ["original"] + [f"{k} codes" for k in books]
course.show([pair[i] for i in (0, 1) for pair in shown], names * 2, columns=7, size=1.05)
for k, db in quality.items():
    print(f"{k:4} codes asked for, {len(books[k].entries):3} in use: {db:5.1f} dB" + (", nothing is lost" if db == float("inf") else ""))

# %% [markdown]
# **Check.** Colours go first: an entry that serves several patches is their mean, and the mean of red and yellow patches is
# orange. With 16 codes you can see where something is, but hardly what; even with 64 some entries are shared. As soon
# as there are as many codes as patches, nothing is lost at all.

# %% [markdown]
# ## Captions from a careless web
#
# Pre-training captions are wrong or incomplete on purpose. `NOISE` holds the chance of each accident.
#
# > **Predict.** Which share of the captions says something false of its picture?

# %%
def outcome(noise, n=3000):
    """Shares of captions that are true and as they were, true but say less, and false."""
    rng, found = random.Random(0), np.zeros(3)
    for _ in range(n):
        scene = sample_scene(rng)
        clean = true_caption(rng, scene)
        noisy = noisy_caption(rng, clean, noise=noise)
        found[0 if noisy == clean else 1 if noisy.holds(scene) else 2] += 1
    return found / n


table = {name: outcome({k: v * (k == name) for k, v in NOISE.items()}) for name in NOISE} | {"all together": outcome(NOISE)}

# %%
figure, ax = plt.subplots(figsize=(5.6, 2.3))
left = np.zeros(len(table))
for i, (label, color) in enumerate({"as it was": BLUE, "true, says less": GOLD, "false": RED}.items()):
    part = np.array([v[i] for v in table.values()])
    ax.barh([f"{k} ({NOISE[k]:.0%})" if k in NOISE else k for k in table], part, left=left, color=color, label=label)
    left += part
ax.invert_yaxis()
ax.set(xlim=(0, 1), xlabel="share of the captions", title=f"{table['all together'][2]:.0%} of the captions are false")
ax.legend(loc="upper left", bbox_to_anchor=(1, 1))
plt.show()

# %% [markdown]
# **Check.** The chances in brackets are per caption that *can* have the accident; few captions state a relation, so `reverse`
# hurts fewer than it seems. A caption that says less is still true. Notebook 03 asks what a model learns from all this.

# %% [markdown]
# ## Every task is a template
#
# Words and codes share one numbering: words first, codes after them. A task is a row of tokens in which some are **given**
# and some are **chosen** by the model, each from an allowed range. One sampler fills all of them.

# %%
world, rng = World(), random.Random(5)
book = books[128]
vocab = Vocabulary.train(world.texts(random.Random(0), 1500), len(book.entries), book.side**2)
examples = [world.example(rng, task) for task in world.tasks]
batch = vocab.batch(examples, book.encode(np.stack([e.picture for e in examples])))
for e, row in zip(examples, batch.target):
    text = " ".join(vocab.decode([i]) if i < vocab.n_text else f"[{int(i) - vocab.n_text}]" for i in row.tolist() if i != PAD)
    print(f"{e.task:8}{text}")

# %%
given, code = batch.tokens >= 0, batch.patch >= 0
what = torch.where(given, torch.where(code, 2, 1), torch.where(code, 4, 3))
what[given & (batch.tokens < len(data.SPECIAL))] = 0
what[(batch.target == PAD)] = 5
what[(batch.target == data.EOS)] = 3
labels = ("marker", "word, given", "code, given", "word, chosen", "code, chosen", "room left")
colors = ("#4a4f58", "#d9cba3", "#b9cbe4", GOLD, BLUE, "#f4f4f4")
figure, ax = plt.subplots(figsize=(8.6, 2.1))
ax.pcolormesh(what, cmap=plt.matplotlib.colors.ListedColormap(colors), vmin=-0.5, vmax=5.5, edgecolors="white", linewidth=1.5)
ax.set(yticks=np.arange(5) + 0.5, yticklabels=world.tasks, xlabel="position", title="Five tasks, one format")
ax.invert_yaxis()
squares = [plt.Rectangle((0, 0), 1, 1, color=c) for c in colors]
ax.legend(squares, labels, ncols=6, loc="upper center", bbox_to_anchor=(0.45, -0.35), fontsize=8)
plt.show()

# %% [markdown]
# **Check.** Only the saturated squares are chosen, and only they will ever be trained, scored or rewarded: that is the
# *completion mask*. The first empty square after a text is `<eos>`: when to stop is a choice too. `draw` and `caption` are
# mirror images, so one loss can align both directions.
#
# ## The check cell

# %%
course.final(cut_patches, nearest_code, kmeans_step)
