# %% [markdown]
# # 07 · Kernels: memory, rooflines, fusing
#
# **You will see** that the logits are by far the largest thing a language model makes; how a softmax is computed in pieces,
# without ever holding them; which operations your machine can feed and which starve; and what `kernels.py` makes of all
# this.
#
# From `kernels.py`. Everything runs on a CPU; the ideas are those of a GPU, where the numbers are 100 times larger.

# %%
import functools
import time

import course
import matplotlib.pyplot as plt
import torch
from course import BLUE, GREY, RED
from torch.utils._python_dispatch import TorchDispatchMode

from grpo import grpo_loss
from kernels import composed_loss, fused_linear_grpo_loss, loss_and_gradients, plain_logprobs

course.start(minutes=0.3)

# %% [markdown]
# ## The largest tensor
#
# N sequences of T tokens, hidden states of width C, a vocabulary of V. The loss needs *one* log-prob of each token, but the
# plain way computes V logits for it. In its backward pass autograd holds three float32 numbers for each: the log-softmax,
# its gradient, and the gradient of the logits.

# %%
def logits_bytes(n, t, v):
    """Exercise 1. Bytes that the backward pass of the plain way holds for the logits of N sequences of T tokens, V ids."""
    raise NotImplementedError


course.check(logits_bytes)

# %% [markdown]
# > **Predict.** In GB: this repository's GPU preset (512 pictures of 64 codes, 1,500 ids)? A model of 8 billion parameters
# > on 16 texts of 1,024 tokens, 128,256 ids? For comparison, its hidden states are 16 × 1,024 × 4,096 numbers.

# %%
sizes = {"cpu preset": (128, 16, 272), "gpu preset": (512, 64, 1500), "8 B model": (16, 1024, 128256)}
for name, (n, t, v) in sizes.items():
    print(f"{name:11} {n * t:6,} tokens x {v:7,} ids x 12 bytes = {12 * n * t * v / 1e9:7.3f} GB")
print(f"{'':11} hidden states of the 8 B model in bf16: {16 * 1024 * 4096 * 2 / 1e9:.3f} GB")

# %% [markdown]
# **Check.** 25 GB against 0.13: the last layer costs more memory than all the rest of the step.
#
# ## A softmax in pieces
#
# The normaliser of a softmax is log Σ exp(z). It can be had piece by piece: keep the largest logit so far, and the sum
# relative to it.

# %%
def online_logsumexp(chunks):
    """Exercise 2. A sequence of logits (m, v), pieces of one row after another -> log sum exp over all of them, (m,).

    Keep two numbers a row: the maximum so far, and the sum of exp(z - maximum). When the maximum moves, rescale the sum."""
    raise NotImplementedError


course.check(online_logsumexp)

# %% [markdown]
# Then the gradient. What does a logit have to do to raise the log-prob of the chosen id? (K4) answers without autograd, and
# so nothing needs to be kept.

# %%
def logprob_gradient(logits, tokens):
    """Exercise 3. (K4): logits (m, V), chosen ids (m,) -> d logprob[i, tokens[i]] / d logits, (m, V)."""
    raise NotImplementedError


course.check(logprob_gradient)

# %% [markdown]
# ## What is really made
#
# We watch every tensor that PyTorch makes during loss and gradients, in both ways: `plain` is what autograd does, `fused`
# works through the tokens in chunks of 64, takes the gradient at once (each token's depends on that token alone) and drops
# the chunk.
#
# > **Predict.** A vocabulary of 4,000, and batches of 64 to 4,096 tokens: how does the largest tensor grow in each?

# %%
class Largest(TorchDispatchMode):
    """Counts operations, and remembers the most numbers that any of them returned."""

    numbers = operations = 0

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        result = function(*args, **(kwargs or {}))
        self.operations += 1
        for x in torch.utils._pytree.tree_leaves(result):
            self.numbers = max(self.numbers, x.numel() if torch.is_tensor(x) else 0)
        return result


def inputs(n, t=64, c=64, v=4000):
    g = torch.Generator().manual_seed(n)
    hidden, weight = torch.randn(n, t, c, generator=g), torch.randn(v, c, generator=g) / c**0.5
    old = torch.full((n, t), -6.0)
    return hidden, weight, torch.randint(0, v, (n, t), generator=g), old, old, torch.randn(n, generator=g), torch.ones(n, t)


# %%
ways = {"plain": functools.partial(composed_loss, plain_logprobs), "fused": functools.partial(fused_linear_grpo_loss, chunk_tokens=64)}
batches, made, spent, apart = (1, 4, 16, 64), {k: [] for k in ways}, {k: [] for k in ways}, []
for n in batches:
    some, results = inputs(n), []
    for name, way in ways.items():
        with Largest() as watch:
            results.append(loss_and_gradients(way, *some))
        begin = time.perf_counter()
        loss_and_gradients(way, *some)
        spent[name].append(time.perf_counter() - begin)
        made[name].append(4 * watch.numbers / 1e6)
    apart.append(max(float((a - b).abs().max()) for a, b in zip(*results)))

# %%
figure, axes = plt.subplots(1, 2, figsize=(7, 2.7))
for ax, table, label in zip(axes, (made, spent), ("largest tensor, MB", "seconds, loss and gradients")):
    for (name, y), color in zip(table.items(), (RED, BLUE)):
        ax.loglog([64 * n for n in batches], y, "o-", color=color, label=name)
    ax.set(xlabel="tokens in the batch", ylabel=label)
    ax.legend()
axes[0].set_title(f"4,096 tokens: {made['plain'][-1]:.0f} MB or {made['fused'][-1]:.0f} MB")
axes[1].set_title(f"... in {spent['fused'][-1] / spent['plain'][-1]:.1f} times the time")
plt.show()
print("largest difference of loss and gradients:", *(f"{x:.0e}" for x in apart))

# %% [markdown]
# **Check.** The same numbers up to rounding; the plain way makes tensors as large as the batch, the fused one never more than a
# chunk (or the gradient of the head, V × C). Whether it is also faster depends on the machine and the size: the work is the
# same, but large tensors have to go through memory several times, and small chunks do not fill the machine.
#
# ## The roofline
#
# A machine can do so many operations a second and move so many bytes a second. An operation's **intensity** is how many
# operations it does for every byte it moves; below a certain intensity the arithmetic units wait for memory.

# %%
def attainable(intensity, peak, bandwidth):
    """Exercise 4. Operations a second that an operation of this intensity (operations a byte) can reach at best, on a machine
    with this peak (operations a second) and bandwidth (bytes a second)."""
    raise NotImplementedError


course.check(attainable)

# %% [markdown]
# > **Predict.** Order by intensity: multiplying two 1,024 × 1,024 matrices; a matrix with one vector (one token is
# > sampled); a softmax; exp.

# %%
def rate(function, repeats=5):
    """Best seconds of a few."""
    times = []
    for _ in range(repeats):
        begin = time.perf_counter()
        function()
        times.append(time.perf_counter() - begin)
    return min(times)


square, wide, out = torch.randn(1024, 1024), torch.randn(4096, 4096), torch.empty(4096, 4096)
peak = 2 * 1024**3 / rate(lambda: square @ square)
bandwidth = 2 * 4 * wide.numel() / rate(lambda: out.copy_(wide))
work = {"exp": (lambda: torch.exp(wide, out=out), wide.numel(), 8 * wide.numel()),
        "softmax": (lambda: torch.softmax(wide, 1, out=out), 4 * wide.numel(), 8 * wide.numel())}
for rows in (1, 8, 64, 512):
    x, y = torch.randn(rows, 4096), torch.empty(rows, 4096)
    moved = 4 * (wide.numel() + 2 * x.numel())
    work[f"matrix · {rows} token{'s' * (rows > 1)}"] = (functools.partial(torch.mm, x, wide, out=y), 2 * rows * wide.numel(), moved)
points = {name: (flops / moved, flops / rate(function)) for name, (function, flops, moved) in work.items()}

# %%
x = torch.logspace(-1.3, 3, 100)
figure, ax = plt.subplots(figsize=(5.6, 3.2))
ax.loglog(x, (x * bandwidth).clamp(max=peak) / 1e9, color=GREY)
ax.fill_between(x, (x * bandwidth).clamp(max=peak) / 1e9, 1e4, color="#f1efe9")
for name, (intensity, reached) in points.items():
    color = BLUE if "·" in name else RED
    ax.loglog(intensity, reached / 1e9, "o", color=color)
    ax.annotate(name, (intensity, reached / 1e9), xytext=(6, -10), textcoords="offset points", fontsize=8, color=color)
ax.set(xlabel="intensity, operations a byte", ylabel="billion operations a second", ylim=(0.1, peak / 1e9 * 3), xlim=(0.05, 2000),
       title=f"Below {peak / bandwidth:.0f} operations a byte, memory decides")
plt.show()
print(f"this machine: {peak / 1e9:.0f} billion operations and {bandwidth / 1e9:.1f} billion bytes a second")

# %% [markdown]
# **Check.** `exp` and the softmax lie on the slope: they wait for memory, and a faster processor would not help. One token is a
# matrix *times a vector*: every weight is read for two operations. That is why sampling is slow, and why a group helps: 64
# candidates read the weights once. (A point a little above the roof: its slope was measured by copying, and reading alone is
# faster.) On a GPU of the H100 class the bend lies at a few hundred operations a byte, so still more waits for memory.
#
# ## Fusing
#
# The GRPO objective itself is elementwise: ratio, clip, min, mask. On a GPU every such operation is a *kernel*: start it,
# read everything, do one thing, write everything.
#
# > **Predict.** How many operations does `grpo_loss` start, on (N, T) log-probs that are already there? Forward only.

# %%
logprobs = torch.randn(512, 64)
with Largest() as watch:
    grpo_loss(logprobs, logprobs, logprobs, torch.randn(512), torch.ones(512, 64))
need = 5 * 4 * logprobs.numel() / 1e6
print(f"{watch.operations} operations; one that did all of it would read {need:.2f} MB once")

# %% [markdown]
# **Check.** Dozens of operations, each of which reads and writes tensors of that size. On a small batch a GPU spends its time
# on starting them. `kernels.py` fuses the *large* ones by hand (logits, softmax, gradient), and has `torch.compile` make
# one GPU kernel of a softmax's steps. Try it: `python kernels.py --device cpu` prints errors first, then times: a fast
# wrong kernel is worth nothing.
#
# ## The check cell

# %%
course.final(logits_bytes, online_logsumexp, logprob_gradient, attainable)
