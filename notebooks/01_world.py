# %% [markdown]
# # 01 · The world and its tokens
#
# **You will see** how a picture and a sentence become one row of whole numbers, the only thing that
# the model of this course reads or writes; how much of a picture survives that; and how noisy its
# training captions are.
#
# The code is in `data.py`, and the codebook in `model.py`. Nothing is trained except that codebook,
# by k-means.

# %%
import random

import course
import matplotlib.pyplot as plt
import numpy as np
import torch
from course import BLUE, GOLD, GREY, RED

import data
from data import (NOISE, PAD, Vocabulary, World, noisy_caption, pictures_of, sample_scene,
                  true_caption)
from model import Codebook

course.start(minutes=0.3)
course.map(1)

# %% [markdown]
# ## A scene is a small record
#
# It holds one to three coloured shapes on a 2 × 2 grid of cells. Picture, captions, questions and
# answers are all derived from this record, so every answer is known exactly. That is the point of a
# synthetic world: we can always tell who is right.

# %%
rng = random.Random(3)
scene = sample_scene(rng, "paired", count=2)
for o in scene:
    print(o)
course.show([data.render(scene)], [true_caption(rng, scene).text()], columns=1, size=1.6)

# %% [markdown]
# Scenes belong to four *pools*, which decide what a model may learn from them. Pictures of the pool
# `paired` come with captions; those of `prompted` and `three` never do, but alignment uses them for
# prompts; `heldout` has pairs of kinds (colour and shape) that no training text names.

# %%
rng, scenes, titles = random.Random(1), [], []
for pool in data.COUNTS:
    for _ in range(2):
        scenes.append(sample_scene(rng, pool))
        titles.append(f"{pool}: {true_caption(rng, scenes[-1]).text()}")
course.show([data.render(s) for s in scenes], titles, columns=4, size=1.5)

# %% [markdown]
# > **Predict.** We sample `paired` scenes (one or two objects) again and again. How many
# > *different* pictures are there in all: hundreds, thousands, millions? And how many different
# > 8 × 8 patches do they contain?

# %%
def distinct(rows):
    return len({row.tobytes() for row in rows})


sizes = (30, 100, 300, 1000, 3000, 10000)
pictures = np.stack([data.render(sample_scene(rng)) for _ in range(sizes[-1])])
patches = Codebook(None, patch=8).patchify(pictures).byte().numpy()
counts = {"pictures": [distinct(pictures[:n]) for n in sizes],
          "patches of 8 × 8 pixels": [distinct(patches[:n].reshape(-1, 192)) for n in sizes]}
pairs = sum(data.in_pool("paired", pair) for pair in data.pairs_of(data.KINDS))
one, two = 12 * 2 * 4, pairs * 4 * 12
print(f"one object: 12 kinds x 2 sizes x 4 cells = {one}")
print(f"two objects: {pairs} pairs of kinds x 4 pairs of sizes x 12 places = {two:,}")
print(f"{one + two:,} pictures in all, made of {counts['patches of 8 × 8 pixels'][-1]} patches")

# %%
figure, ax = plt.subplots(figsize=(5.2, 2.7))
for (name, values), color in zip(counts.items(), (BLUE, RED)):
    ax.loglog(sizes, values, "o-", color=color)
    ax.text(sizes[-1] * 1.15, values[-1], f"{values[-1]:,} {name}", color=color, va="center")
ax.loglog(sizes, sizes, ":", color=GREY)
ax.text(1800, 3500, "all different", color=GREY, ha="right")
ax.set(xlabel="scenes drawn", ylabel="different ones among them", xlim=(25, 12000),
       title=f"{counts['patches of 8 × 8 pixels'][-1]} patches make {one + two:,} pictures")
plt.show()

# %% [markdown]
# **Check.** The number of pictures keeps growing; the number of patches soon stops. So a picture
# can be written as 16 patch *numbers*, and a list of the patches (the **codebook**) turns numbers
# back into pixels: no image encoder has to be trained. The price: pre-training sees practically
# *all* pictures of the pool, so a fair test must ask for something else (three objects, held-out
# pairs).
#
# ## From pixels to codes
#
# By (M1) a patch gets the number of the nearest codebook entry; by (M2) an entry becomes the mean
# of its patches. Write them yourself first.

# %%
def cut_patches(picture, p):
    """Exercise 1. A picture (S, S, 3) -> its patches (P, p·p·3), row by row, each flattened: a
    reshape, a permute and another reshape."""
    raise NotImplementedError


course.check(cut_patches)

# %%
def nearest_code(patches, entries):
    """Exercise 2. (M1): patches (N, D), entries (K, D) -> (N,) the number of each patch's nearest
    entry.

    |x - c|² = |x|² - 2 x·c + |c|², and |x|² is the same for every entry, so one matrix
    product is enough."""
    raise NotImplementedError


course.check(nearest_code)

# %%
def kmeans_step(patches, entries):
    """Exercise 3. (M2): move each of the entries (K, D) to the mean of the patches (N, D) nearest
    to it; an entry without patches stays where it is. Return a new tensor; leave `entries`
    unchanged."""
    raise NotImplementedError


course.check(kmeans_step)

# %% [markdown]
# > **Predict.** With fewer codes than different patches, something is lost. What goes first: the
# > colours, the shapes, or the small objects?

# %%
some = pictures[:800]
books = {k: Codebook.fit(some, k, patch=8) for k in (4, 8, 16, 32, 64, 128)}
three = np.stack([data.render(sample_scene(random.Random(s), "three")) for s in (1, 2)])
views = [three] + [book.decode(book.encode(three)).numpy() for book in books.values()]
names = ["original"] + [f"{k} codes" for k in books]
course.show([view[i] for i in (0, 1) for view in views], names + [""] * 7, columns=7, size=1.05,
            labels=("scene 1", "scene 2"))
for k, book in books.items():
    db = book.psnr(some)
    lost = f"{db:.1f} dB" if db < float("inf") else "nothing is lost"
    print(f"{k:4} codes asked for, {len(book.entries):3} in use: {lost}")

# %% [markdown]
# **Check.** Reading from right to left, colours go first: an entry that serves several patches is
# their mean, and the mean of red and yellow patches is orange. With 16 codes you can see where an
# object is, but hardly what it is; with 4, small objects are gone. Once every patch has a code of
# its own, nothing is lost.
#
# ## Captions from a careless web
#
# Some pre-training captions are wrong or incomplete, on purpose. `NOISE` gives the chance of each
# kind of accident.
#
# > **Predict.** What share of the captions says something false about its picture?

# %%
def shares(noise, n=3000):
    """Shares of captions that are unchanged, that are true but say less, and that are false."""
    rng, counts = random.Random(0), torch.zeros(3)
    for _ in range(n):
        scene = sample_scene(rng)
        clean = true_caption(rng, scene)
        noisy = noisy_caption(rng, clean, noise=noise)
        counts[0 if noisy == clean else 1 if noisy.holds(scene) else 2] += 1
    return (counts / n).tolist()


accidents = [name for name in NOISE if name != "answer"]  # that one is about questions
table = {}
for accident in accidents:
    alone = {name: chance * (name == accident) for name, chance in NOISE.items()}
    table[f"{accident} ({NOISE[accident]:.0%})"] = shares(alone)
table["all together"] = shares(NOISE)

# %%
figure, ax = plt.subplots(figsize=(5.6, 2.1))
left = np.zeros(len(table))
outcomes = {"unchanged": BLUE, "true, says less": GOLD, "false": RED}
for i, (label, color) in enumerate(outcomes.items()):
    part = np.array([v[i] for v in table.values()])
    ax.barh(list(table), part, left=left, color=color, label=label)
    left += part
ax.invert_yaxis()
ax.set(xlim=(0, 1), xlabel="share of 3,000 captions", ylabel="accident (its chance)",
       title=f"{table['all together'][2]:.0%} of the captions are false")
ax.legend(loc="upper left", bbox_to_anchor=(1, 1))
plt.show()

# %% [markdown]
# **Check.** The chances in brackets apply to captions that *can* suffer the accident; few captions
# state a relation, so `reverse` does less harm than its chance suggests. A caption that says less
# is still true. Notebook 03 asks what a model learns from all this.
#
# ## Every task is a row of fixed columns
#
# Words and codes share one vocabulary: words first, then codes. A task is a row of **spans** of
# fixed width: a marker, a text, or the 16 codes of a picture. So every column has one meaning, and
# the task decides what the model may choose there.

# %%
for task, spans in data.LAYOUTS.items():
    print(f"{task:10}{spans}")

# %% [markdown]
# A number is the width of a text, and `?` marks what the model **chooses**; the rest is **given**.
# A short text is padded with `<pad>` (`·` below); a chosen text ends with `<eos>`.

# %%
world, rng, book = World(), random.Random(5), books[128]
vocab = Vocabulary.build(world.texts(random.Random(0), 2100), len(book.entries), book.side**2)
rows = {}
for task in ("draw", "caption", "vqa", "multihop"):
    examples = [world.example(rng, task)]
    rows[task] = vocab.rows(task, examples, book.encode(pictures_of(examples)))[0]
    print(*("·" if i == PAD else vocab.words[i] if i < vocab.n_text else f"[{i - vocab.n_text}]"
            for i in rows[task].tolist()), "\n")

# %%
strips = {task: course.strip(vocab.layout(task), row) for task, row in rows.items()}
strips |= {task: course.strip(vocab.layout(task)) for task in ("text", "verify", "story")}
course.show_rows(strips, f"{len(strips)} tasks, one format")

# %% [markdown]
# **Check.** The model chooses only the columns in the two saturated colours, and only they are ever
# trained on, scored or rewarded. They form the *completion mask*: the chosen columns that are not
# `<pad>`. When to stop is a choice too, so `<eos>` is part of it. (The last three rows show only
# the widths, without a text.) `draw` and `caption` are mirror images, so one loss can align both
# directions.
#
# ## The check cell

# %%
course.final(cut_patches, nearest_code, kmeans_step)
