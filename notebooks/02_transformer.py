# %% [markdown]
# # 02 · One transformer for words and pictures
#
# **You will see** that the future never leaks into the past, that with rotary positions only
# distances matter, why a cache makes long pictures cheap to sample, and how to sample tokens from
# the very distribution that will score them.
#
# The code is in `model.py`. Nothing is trained: all of this must hold for any weights.

# %%
import random
import time

import course
import matplotlib.pyplot as plt
import numpy as np
import torch
from course import BLUE, GREY, RED

from data import PAD, Vocabulary, World, pictures_of
from model import Codebook, ModelConfig, Transformer, rotate, rotation, sample

course.start(minutes=0.3)
course.map(2)

# %%
world = World()
book, vocab = course.tokens_of(world)
examples = [world.example(random.Random(i), "draw") for i in range(4)]
layout = vocab.layout("draw")
rows = vocab.rows("draw", examples, book.encode(pictures_of(examples)))
model = Transformer(ModelConfig(vocab.size, book.side, width=48, layers=3))
parts = {"table of words and codes, also the head": [model.embed],
         "rows and columns of a picture": [model.row, model.column],
         "3 blocks": [model.blocks], "last norm": [model.norm]}
for name, modules in parts.items():
    print(f"{name:42}{sum(p.numel() for m in modules for p in m.parameters()):8,} parameters")
print(f"{vocab.n_text} words and markers, {vocab.n_codes} codes: {vocab.size} ids")
course.show_rows({f"row {i}": course.strip(layout, row) for i, row in enumerate(rows)},
                 "Four rows of the task “draw”: every column has one meaning")

# %% [markdown]
# One table embeds words and codes, and the same table scores the next token (*tied head*). Short
# prompts are padded with `<pad>`, an ordinary token: the model attends to it, in the same columns
# in training and in sampling. So the only attention mask is the causal one.
#
# ## The future does not leak
#
# We change one token of a row and see which hidden states move: once in a freshly initialised
# model, once in one with random weights.
#
# > **Predict.** Sketch the pattern of moved states (row: the token that was changed; column: the
# > state) for each model.

# %%
def influence(model, tokens, patch):
    """(L, L): how far state j moves when token i is replaced."""
    changed = tokens.repeat(len(tokens), 1)
    changed.fill_diagonal_(0)
    changed += torch.diag((tokens + 1) % vocab.size)
    with torch.no_grad():
        return (model(changed, patch) - model(tokens[None], patch)).norm(dim=-1)


def random_weights(config):
    """A model in which every layer does something; freshly initialised layers are identities."""
    model = Transformer(config)
    for p in model.parameters():
        if p.dim() == 2:
            torch.nn.init.normal_(p, std=p.shape[1] ** -0.5)
    return model


lively = random_weights(model.config)
maps = {"fresh model": influence(model, rows[0], layout.patch),
        "random weights": influence(lively, rows[0], layout.patch)}

# %%
figure, axes = plt.subplots(1, 2, figsize=(7.6, 3.1))
for ax, (name, x) in zip(axes, maps.items()):
    image = ax.imshow(torch.where(x > 1e-6, x, torch.nan), cmap="Blues", vmin=0)
    figure.colorbar(image, label="distance moved (grey: 0)", shrink=0.8)
    ax.set_facecolor("#f3f1ec")
    before, after = (int((part > 1e-6).sum()) for part in (x.tril(-1), x.triu(1)))
    ax.set(title=f"{name}: {before} earlier, {after} later", xlabel="column of the state",
           ylabel="column of the changed token")
figure.suptitle("States that move when a token is changed", fontsize=10)
plt.show()

# %% [markdown]
# **Check.** There is nothing below the diagonal: a state cannot know what comes after it, so one
# forward pass scores every column of a row fairly. The surprise is on the left: the two matrices
# that write into the residual stream start at zero, so a fresh model does not mix columns *at all*.
# (So a causality test on a fresh model cannot fail, and is worthless.)

# %%
def causal_attention(q, k, v):
    """Exercise 1. Queries, keys, values (N, L, D) -> (N, L, D): each position gathers the values of
    the positions up to its own, weighted by softmax(q·k / sqrt(D))."""
    raise NotImplementedError


course.check(causal_attention)

# %% [markdown]
# ## Only the distance counts
#
# (M4) rotates queries and keys by an angle that grows with the position. Here is the dot product of
# one fixed query and one fixed key, for all pairs of positions.
#
# > **Predict.** What does the 24 × 24 map of these products look like?

# %%
g = torch.Generator().manual_seed(1)
query, key = torch.randn(2, 12, generator=g)
turn = rotation(torch.arange(24), 12)
q, k = (rotate(x.expand(24, 12), turn) for x in (query, key))
figure, ax = plt.subplots(figsize=(4.4, 2.9))
image = ax.imshow(q @ k.T, cmap="RdBu", vmin=-12, vmax=12)
figure.colorbar(image, label="q · k")
spread = max(float((q @ k.T).diagonal(d).std()) for d in range(-20, 21))
ax.set(title=f"Standard deviation along a diagonal: at most {spread:.0e}",
       xlabel="position of the key", ylabel="position of the query")
plt.show()

# %% [markdown]
# **Check.** Stripes: the product depends on how far apart the two are, not on where they are. For
# pictures that is not enough (which patch is *above* which?), so each patch also gets a learned
# vector for its row and one for its column.
#
# ## The cache
#
# To sample token t, a transformer needs the keys and values of all tokens before it. They never
# change (causality!), so they can be cached.

# %%
def attend_next(q, k, v, keys, values):
    """Exercise 2. One step with a cache: the newest token's q, k, v (D,) each, and the cached keys
    and values (n, D).

    Returns three things: what the token gathers (D,), the keys to keep (n + 1, D), the values to
    keep (n + 1, D)."""
    raise NotImplementedError


course.check(attend_next)

# %% [markdown]
# > **Predict.** From 4 to 256 tokens per picture: how does the sampling time grow with the number
# > of tokens, with and without a cache? And do the two draw the same pictures?

# %%
@torch.no_grad()
def sample_uncached(model, layout, prompts, generator):
    """Like model.sample at temperature 1, but the whole row is read again for every token."""
    tokens, head = prompts.masked_fill(layout.chosen, PAD), model.head[layout.first : layout.last]
    for column in layout.columns:
        state = model(tokens[:, :column], layout.patch[:column])[:, -1]
        p = (state @ head.T).softmax(-1)
        noise = torch.empty_like(p).uniform_(generator=generator).log_().neg_()
        tokens[:, column] = (p / noise).argmax(-1) + layout.first
    return tokens


def cached(model, layout, prompts, generator):
    return sample(model, layout, prompts, 1, generator)


# %%
seconds, equal = {"without a cache": [], "with a cache": []}, []
pictures = pictures_of([world.example(random.Random(i), "draw") for i in range(100)])
for patch in (16, 8, 4, 2):
    other = Codebook.fit(pictures, 512, patch)
    words = Vocabulary(vocab.tokenizer, len(other.entries), other.side**2)
    policy = random_weights(ModelConfig(words.size, other.side, width=96, layers=4))
    prompts = words.rows("draw", examples, other.encode(pictures_of(examples)))
    results = []
    for name, sampler in zip(seconds, (sample_uncached, cached)):
        begin, noise = time.process_time(), torch.Generator().manual_seed(0)
        results.append(sampler(policy, words.layout("draw"), prompts, noise))
        seconds[name].append(time.process_time() - begin)
    equal.append(float((results[0] == results[1]).float().mean()))

# %%
figure, ax = plt.subplots(figsize=(4.6, 2.8))
for (name, y), color in zip(seconds.items(), (RED, BLUE)):
    ax.loglog((4, 16, 64, 256), y, "o-", label=name, color=color)
times = seconds["without a cache"][-1] / seconds["with a cache"][-1]
ax.set(xlabel="tokens per picture", ylabel="processor seconds, 4 pictures", xticks=(4, 16, 64, 256),
       xticklabels=(4, 16, 64, 256), title=f"256 tokens: {times:.0f} times faster with a cache")
ax.minorticks_off()
ax.legend()
plt.show()
print("share of tokens that are equal, from the same noise:", *(f"{x:.1%}" for x in equal))

# %% [markdown]
# **Check.** Without a cache the whole row is read again for every token, so the gap widens as
# pictures get longer. Both draw the same pictures from the same noise, and a test of this
# repository checks that for every task. The prompt, too, is read only once for all candidates of a
# group (*prefill*), which makes groups cheap.
#
# ## What is sampled is what is scored
#
# While drawing, the model may choose only codes, however high the head scores a word. (M5) is a
# softmax over the allowed ids alone. Later, the log-prob of the sample is computed with the same
# ids and the same temperature: a ratio between two different distributions would be nonsense.

# %%
def allowed_probs(logits, first, last, temperature):
    """Exercise 3. (M5): logits (V,) -> probabilities (V,), a softmax at a temperature over the ids
    first <= id < last, and 0 elsewhere. Leave `logits` unchanged."""
    raise NotImplementedError


course.check(allowed_probs)

# %% [markdown]
# How does one draw from p? (M6): divide every p by a fresh exponential random number and take the
# largest. All the randomness is in the noise, so *two models can be given the same noise* and their
# drawings compared one by one.
#
# > **Predict.** p = 0.5, 0.3, 0.15, 0.05. How often does each win in 20,000 such races?

# %%
p = torch.tensor([0.5, 0.3, 0.15, 0.05])
noise = torch.empty(20000, 4).exponential_(generator=torch.Generator().manual_seed(0))
won = torch.bincount((p / noise).argmax(1), minlength=4) / 20000
figure, ax = plt.subplots(figsize=(3.8, 2.2))
ax.bar(np.arange(4) - 0.2, p, 0.4, color=GREY, label="p")
ax.bar(np.arange(4) + 0.2, won, 0.4, color=BLUE, label="share of races won")
ax.set(xticks=range(4), xlabel="id", ylabel="probability, share",
       title=f"The race is fair: at most {(won - p).abs().max():.3f} off")
ax.legend()
plt.show()

# %% [markdown]
# **Check.** Each id wins with exactly its probability: if e is the exponential number, e/p is
# exponential with rate p, and among several exponential clocks each rings first with probability
# proportional to its rate.
#
# ## The check cell

# %%
course.final(causal_attention, attend_next, allowed_probs)
