# %% [markdown]
# # 02 · One transformer for words and pictures
#
# **You will see** that the future never leaks into the past, that positions only matter by their distance, why a cache makes
# drawing 64 tokens cheap, and how a token is sampled so that what is sampled is what will be scored.
#
# From `model.py`, 230 lines. No training: all of this must hold for any weights.

# %%
import random
import time

import course
import matplotlib.pyplot as plt
import numpy as np
import torch
from course import BLUE, GREY, RED

from data import Vocabulary, World
from model import Codebook, ModelConfig, Transformer, rotate, rotation, sample

course.start(minutes=0.3)

# %%
world, rng = World(), random.Random(0)
examples = [world.example(rng, task) for task in ("draw", "caption") * 300]
pictures = np.stack([e.picture for e in examples])
book = Codebook.fit(pictures, 1024, patch=8)
vocab = Vocabulary.train(world.texts(random.Random(0), 1500), len(book.entries), book.side**2)
model = Transformer(ModelConfig(vocab.size, book.side, width=48, layers=3))
batch = vocab.batch(examples[:2], book.encode(pictures[:2]))
for name, part in {"table of words and codes, also the head": model.embed, "rows and columns": (model.row, model.column),
                   "3 blocks": model.blocks, "last norm": model.norm}.items():
    modules = part if isinstance(part, tuple) else (part,)
    print(f"{name:42}{sum(p.numel() for m in modules for p in m.parameters()):8,} parameters")
print(f"{vocab.n_text} words and word pieces, {vocab.n_codes} codes: {vocab.size} ids")

# %% [markdown]
# One table of vectors reads words and codes, and the same table scores the next token (*tied head*). Drawing and captioning
# differ only in the order of the row.
#
# ## The future does not leak
#
# We change one token of a row and see which hidden states move. Once with a fresh model, once after giving it random weights.
#
# > **Predict.** Draw the pattern of moved states (row: the token that was changed; column: the state) for each of the two.

# %%
def influence(model, tokens, patch):
    """(L, L): how far state j moves when token i becomes another one."""
    length = len(tokens)
    changed = tokens.repeat(length, 1)
    changed[range(length), range(length)] = (tokens + 1) % vocab.size
    with torch.no_grad():
        moved = model(changed, patch.repeat(length, 1)) - model(tokens[None], patch[None])
    return moved.norm(dim=-1)


woken = Transformer(model.config)
for p in woken.parameters():
    if p.dim() == 2:
        torch.nn.init.normal_(p, std=p.shape[1] ** -0.5)
row, place = batch.target[0, :28], batch.patch[0, :28]
maps = {"fresh: every layer is an identity": influence(model, row, place),
        "random weights: the past reaches on": influence(woken, row, place)}

# %%
figure, axes = plt.subplots(1, 2, figsize=(6.6, 3.1))
for ax, (title, x) in zip(axes, maps.items()):
    ax.imshow(torch.where(x > 1e-6, x, torch.nan), cmap="Blues", vmin=0)
    ax.set_facecolor("#f3f1ec")
    ax.set(title=title, xlabel="state", ylabel="changed token")
plt.show()
for title, x in maps.items():
    print(f"{title:38} moved before the change: {int((x.tril(-1) > 1e-6).sum())}, after it: {int((x.triu(1) > 1e-6).sum())}")

# %% [markdown]
# **Check.** Never anything below the diagonal: a state cannot know what comes after it, which is what makes one pass over a
# row a fair examination of every position at once. The surprise is on the left: the two matrices that write into the residual
# stream start at zero, so a fresh model does not mix positions *at all*. (A test of causality on a fresh model can't fail.)

# %%
def causal_attention(q, k, v):
    """Exercise 1. Queries, keys, values (N, L, D) -> (N, L, D): softmax(q·k / sqrt(D)) over the positions up to one's own."""
    raise NotImplementedError


course.check(causal_attention)

# %% [markdown]
# ## Only the distance counts
#
# (M4) rotates queries and keys by an angle that grows with the position. Here is the product of one fixed query and one fixed
# key for all pairs of positions.
#
# > **Predict.** What does the 24 × 24 picture of these products look like?

# %%
g = torch.Generator().manual_seed(1)
query, key = torch.randn(2, 12, generator=g)
turn = rotation(torch.arange(24), 12)
q, k = (rotate(x.expand(1, 1, 24, 12), turn)[0, 0] for x in (query, key))
figure, ax = plt.subplots(figsize=(3.9, 2.9))
image = ax.imshow(q @ k.T, cmap="RdBu", vmin=-12, vmax=12)
figure.colorbar(image, label="q · k")
ax.set(title="The same along every diagonal", xlabel="position of the key", ylabel="position of the query")
plt.show()
spread = max(float((q @ k.T).diagonal(d).std()) for d in range(-20, 21))
print(f"largest standard deviation along a diagonal: {spread:.1e}")

# %% [markdown]
# **Check.** Stripes: the product depends on how far apart the two are, not on where. For pictures that is not enough (which
# patch is *above* which?), so picture tokens also get a learned row and column vector.
#
# ## The cache
#
# To sample token t, a transformer needs the keys and values of all tokens before it. They never change (causality!), so they
# can be kept.

# %%
def attend_next(q, k, v, keys, values):
    """Exercise 2. One step with a cache: the newest token's q, k, v (D,) each, and the kept keys, values (n, D).

    Returns (what the token gathers (D,), the keys to keep (n + 1, D), the values to keep (n + 1, D))."""
    raise NotImplementedError


course.check(attend_next)

# %% [markdown]
# > **Predict.** From 4 to 256 tokens a picture: how does the time to sample grow with the number of tokens, with and without
# > a cache? And do the two give the same pictures?

# %%
@torch.no_grad()
def sample_uncached(model, batch, vocab, generator):
    """As model.sample at temperature 1, but every token reads the whole row again."""
    tokens, ids = batch.tokens.clone(), torch.arange(vocab.size)
    for t in range(int((tokens[0] < 0).nonzero()[0]), tokens.shape[1]):
        state = model(tokens[:, :t], batch.patch[:, :t])[:, -1]
        allowed = (ids >= batch.lo[:, t, None]) & (ids < batch.hi[:, t, None])
        p = (state @ model.head.T).masked_fill(~allowed, -torch.inf).softmax(-1)
        tokens[:, t] = (p / torch.empty_like(p).uniform_(generator=generator).log_().neg_()).argmax(-1)
    return tokens


seconds, equal = {"without a cache": [], "with a cache": []}, []
for patch in (16, 8, 4, 2):
    other = Codebook.fit(pictures[:100], 512, patch)
    words = Vocabulary(vocab.tokenizer, vocab.words, len(other.entries), other.side**2)
    policy = Transformer(ModelConfig(words.size, other.side, width=96, layers=4))
    prompts = words.batch([examples[0]] * 4, other.encode(pictures[:4]))
    results = []
    for name, sampler in zip(seconds, (sample_uncached, sample)):
        begin = time.perf_counter()
        results.append(sampler(policy, prompts, words, torch.Generator().manual_seed(0)))
        seconds[name].append(time.perf_counter() - begin)
    equal.append(bool((results[0] == results[1]).all()))

# %%
figure, ax = plt.subplots(figsize=(4.6, 2.8))
for (name, y), color in zip(seconds.items(), (RED, BLUE)):
    ax.loglog((4, 16, 64, 256), y, "o-", label=name, color=color)
ax.set(xlabel="tokens a picture", ylabel="seconds for 4 pictures", xticks=(4, 16, 64, 256), xticklabels=(4, 16, 64, 256),
       title=f"256 tokens: {seconds['without a cache'][-1] / seconds['with a cache'][-1]:.0f} times faster with a cache")
ax.minorticks_off()
ax.legend()
plt.show()
print("token for token the same from the same noise:", equal)

# %% [markdown]
# **Check.** Without a cache every token reads the whole row again, so the lines part as pictures get longer. The results are
# *identical*, token for token, and a test of this repository says so for every task. The prompt is also read only once for
# all candidates of a group, which is what makes groups cheap.
#
# ## What is sampled is what is scored
#
# While drawing, only codes may be chosen, whatever the head thinks of words. (M5) is a softmax over the allowed ids alone.
# The same range and temperature are used later, when the log-prob of the sample is computed; a ratio between two different
# distributions would be nonsense.

# %%
def allowed_probs(logits, lo, hi, temperature):
    """Exercise 3. (M5): logits (V,) -> probabilities (V,), a softmax at a temperature over the ids lo <= id < hi, 0 elsewhere."""
    raise NotImplementedError


course.check(allowed_probs)

# %% [markdown]
# How does one draw from p? (M6): divide every p by a fresh exponential random number and take the largest. All randomness
# is in the noise, so *two models can be given the same noise* and their drawings compared one by one.
#
# > **Predict.** p = 0.5, 0.3, 0.15, 0.05. How often does each win in 20,000 such races?

# %%
p = torch.tensor([0.5, 0.3, 0.15, 0.05])
noise = torch.empty(20000, 4).exponential_(generator=torch.Generator().manual_seed(0))
won = torch.bincount((p / noise).argmax(1), minlength=4) / 20000
figure, ax = plt.subplots(figsize=(3.8, 2.2))
ax.bar(np.arange(4) - 0.2, p, 0.4, color=GREY, label="p")
ax.bar(np.arange(4) + 0.2, won, 0.4, color=BLUE, label="share of races won")
ax.set(xticks=range(4), xlabel="id", title=f"The race is fair: at most {(won - p).abs().max():.3f} off")
ax.legend()
plt.show()

# %% [markdown]
# **Check.** Each id wins exactly with its probability, because e/p is exponential with rate p, and the first of several
# exponential clocks to ring is number i with a chance in proportion to its rate.
#
# ## The check cell

# %%
course.final(causal_attention, attend_next, allowed_probs)
