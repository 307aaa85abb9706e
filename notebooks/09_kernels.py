# %% [markdown]
# # 09 · Kernels: memory, rooflines, fusing
#
# **You will see** that the logits are the largest tensor a language model makes; how a softmax is
# computed in pieces, without ever holding all logits; which operations are limited by arithmetic
# and which wait for memory; and how `kernels.py` uses all this.
#
# The code is in `kernels.py`. Everything runs on a CPU; the ideas also hold on a GPU, whose numbers
# are 100 times larger.

# %%
import functools
import time

import course
import matplotlib.pyplot as plt
import torch
from course import BLUE, GREY, RED
from torch.utils._python_dispatch import TorchDispatchMode

from grpo import grpo_loss
from kernels import fused_linear_grpo_loss

course.start(minutes=0.5)
course.map(9)

# %% [markdown]
# ## The largest tensor
#
# N sequences of T tokens, hidden states of width C, a vocabulary of V. The loss needs *one*
# log-prob per token, but the plain way computes V logits to get it. In the backward pass autograd
# holds three float32 numbers for each logit: the log-softmax, its gradient, and the gradient of the
# logits.

# %%
def logits_bytes(n, t, v):
    """Exercise 1. Bytes that the backward pass of the plain way holds for the logits of N sequences
    of T tokens, V ids."""
    raise NotImplementedError


course.check(logits_bytes)

# %% [markdown]
# > **Predict.** How many GB is that for this repository's GPU preset (512 pictures of 64 codes,
# > 1,500 ids)? For a model of 8 billion parameters on 16 texts of 1,024 tokens, with 128,256 ids?
# > Is the latter more than the model's weights, or more than the state of its optimizer?

# %%
held, rest = course.use(logits_bytes), 0.0
for name, n, t, v in (("cpu preset", 128, 16, 100), ("gpu preset", 512, 64, 1500),
                      ("8 B model", 16, 1024, 128256)):
    print(f"{name:11}{n * t:7,} tokens x {v:7,} ids: {held(n, t, v) / 1e9:8.3f} GB for the logits")
for what, numbers, size in (("weights, bf16", 8e9, 2), ("gradients, bf16", 8e9, 2),
                            ("two moments of Adam, float32", 2 * 8e9, 4),
                            ("states of 32 layers, bf16", 32 * 16 * 1024 * 4096, 2)):
    rest += numbers * size / 1e9
    print(f"{'':11}{what:36}{numbers * size / 1e9:8.3f} GB")
logits = held(16, 1024, 128256) / 1e9
print(f"the 8 B model: logits {logits:.0f} GB, the rest {rest:.0f} GB")

# %% [markdown]
# **Check.** One layer, the last, takes more than all weights, and more than the hidden states of
# all layers together; the optimizer's moments are larger still. But weights and moments are needed,
# and the logits are not: of V numbers per token the loss uses one. (With LoRA or a sharded
# optimizer the logits *are* the largest part.)
#
# ## A softmax in pieces
#
# The log-normaliser of a softmax is log Σ exp(z). It can be computed piece by piece: keep the
# largest logit so far, and the sum relative to it.

# %%
def online_logsumexp(chunks):
    """Exercise 2. An iterable of logits (m, v), pieces of the same rows one after another -> log
    sum exp over all of them, (m,). Only one piece is in memory at a time.

    Keep two numbers per row: the maximum so far, and the sum of exp(z - maximum). When the maximum
    moves, rescale the sum."""
    raise NotImplementedError


course.check(online_logsumexp)

# %% [markdown]
# Next, the gradient. How must each logit change to raise the log-prob of the chosen id? (K3)
# answers without autograd, from the probabilities alone.

# %%
def logprob_gradient(logits, tokens):
    """Exercise 3. logits (m, V), chosen ids (m,) -> the derivative of the sum of their log-probs
    with respect to the logits, (m, V)."""
    raise NotImplementedError


course.check(logprob_gradient)

# %% [markdown]
# ## Which tensors are really created
#
# We watch every tensor that PyTorch creates while it computes loss and gradients in two ways.
# `plain` is what autograd does. `fused` works through the tokens in chunks, computes the gradient
# of a chunk at once (a token's gradient depends on that token alone) and drops the chunk's logits.
#
# > **Predict.** A vocabulary of 4,000, and batches of 64 to 4,096 tokens: how does the largest
# > tensor grow in each?

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


# %%
def plain_loss(hidden, weight, tokens, *rest):
    """All logits at once, and autograd."""
    logprobs = (hidden @ weight.T).log_softmax(-1).gather(2, tokens[..., None])[..., 0]
    return grpo_loss(logprobs, *rest)


def loss_and_gradients(loss_of, hidden, weight, *rest):
    hidden, weight = hidden.clone().requires_grad_(), weight.clone().requires_grad_()
    loss, _ = loss_of(hidden, weight, *rest)
    loss.backward()
    return loss.detach(), hidden.grad, weight.grad


def inputs(n, t=64, c=64, v=4000):
    """What both ways take: hidden, weight, tokens, old and reference log-probs, advantages,
    mask."""
    g = torch.Generator().manual_seed(n)
    hidden, weight = torch.randn(n, t, c, generator=g), torch.randn(v, c, generator=g) / c**0.5
    tokens, old = torch.randint(0, v, (n, t), generator=g), torch.full((n, t), -6.0)
    return hidden, weight, tokens, old, old, torch.randn(n, generator=g), torch.ones(n, t)


# %%
ways, batches, apart = {"plain": plain_loss, "fused": fused_linear_grpo_loss}, (1, 4, 16, 64), []
made, spent = {k: [] for k in ways}, {k: [] for k in ways}
for n in batches:
    arguments, results = inputs(n), []
    for name, way in ways.items():
        with Largest() as watch:
            results.append(loss_and_gradients(way, *arguments))
        begin = time.perf_counter()
        loss_and_gradients(way, *arguments)
        spent[name].append(time.perf_counter() - begin)
        made[name].append(4 * watch.numbers / 1e6)
    apart.append(max(float((a - b).abs().max()) for a, b in zip(*results)))

# %%
figure, axes = plt.subplots(1, 2, figsize=(7, 2.7))
for ax, table, label in ((axes[0], made, "largest tensor, MB"),
                         (axes[1], spent, "seconds, loss and gradients")):
    for (name, y), color in zip(table.items(), (RED, BLUE)):
        ax.loglog([64 * n for n in batches], y, "o-", color=color, label=name)
    ax.set(xlabel="tokens in the batch", ylabel=label)
    ax.legend()
axes[0].set_title(f"4,096 tokens: {made['plain'][-1]:.0f} MB or {made['fused'][-1]:.0f} MB")
axes[1].set_title(f"... in {spent['fused'][-1] / spent['plain'][-1]:.1f} times the time")
plt.show()
print("largest difference of loss and gradients:", *(f"{x:.0e}" for x in apart))

# %% [markdown]
# **Check.** The results agree up to rounding. The plain way creates tensors that grow with the
# batch; the fused way never creates more than a chunk, whatever the batch. Whether it is also
# faster depends on the machine and the size: the work is the same, but large tensors have to go
# through memory several times, and small chunks do not keep the machine busy.
#
# ## The roofline
#
# A machine can do only so many operations per second and move only so many bytes per second. The
# **intensity** of a computation is the number of operations for every byte it moves; below a
# certain intensity the arithmetic units wait for memory.

# %%
def attainable(intensity, peak, bandwidth):
    """Exercise 4. The most operations per second that a computation of this intensity (operations
    per byte) can reach, on a machine with this peak (operations per second) and bandwidth (bytes
    per second)."""
    raise NotImplementedError


course.check(attainable)

# %% [markdown]
# > **Predict.** Order by intensity: multiplying two 1,024 × 1,024 matrices; a matrix and one vector
# > (one token is sampled); a softmax; exp.

# %%
def best_seconds(function, repeats=5):
    times = []
    for _ in range(repeats):
        begin = time.perf_counter()
        function()
        times.append(time.perf_counter() - begin)
    return min(times)


square, wide, out = torch.randn(1024, 1024), torch.randn(4096, 4096), torch.empty(4096, 4096)
peak = 2 * 1024**3 / best_seconds(lambda: square @ square)
bandwidth = 2 * 4 * wide.numel() / best_seconds(lambda: out.copy_(wide))
moved = 8 * wide.numel()
work = {"exp": (functools.partial(torch.exp, wide, out=out), wide.numel(), moved),
        "softmax": (functools.partial(torch.softmax, wide, 1, out=out), 4 * wide.numel(), moved)}
for rows in (1, 8, 64, 512):
    x, y = torch.randn(rows, 4096), torch.empty(rows, 4096)
    product = functools.partial(torch.mm, x, wide, out=y)
    moved = 4 * (wide.numel() + 2 * x.numel())
    work[f"{rows} token{'s' * (rows > 1)}"] = product, 2 * rows * wide.numel(), moved
points = {name: (flops / moved, flops / best_seconds(function))
          for name, (function, flops, moved) in work.items()}

# %%
roof, x = course.use(attainable), torch.logspace(-1.3, 3.4, 100).tolist()
y = [roof(intensity, peak, bandwidth) / 1e9 for intensity in x]
figure, ax = plt.subplots(figsize=(5.6, 3.2))
ax.loglog(x, y, color=GREY)
ax.fill_between(x, y, 1e4, color="#f1efe9")
for name, (intensity, reached) in points.items():
    color = BLUE if "token" in name else RED
    ax.loglog(intensity, reached / 1e9, "o", color=color)
    ax.annotate(name, (intensity, reached / 1e9), xytext=(6, -14 if name == "1 token" else -8),
                textcoords="offset points", fontsize=8, color=color)
ax.set(xlabel="intensity, operations per byte", ylabel="billion operations a second",
       ylim=(0.1, peak / 1e9 * 3), xlim=(0.05, 2000),
       title=f"Below {peak / bandwidth:.0f} operations per byte, memory decides")
plt.show()
print(f"per second: {peak / 1e9:.0f} billion operations, or {bandwidth / 1e9:.1f} billion bytes")
slow = [name for name, (intensity, _) in points.items() if intensity < peak / bandwidth]
print("left of the bend:", ", ".join(slow))

# %% [markdown]
# **Check.** A blue point is a matrix of 4,096 × 4,096 times that many tokens. One token is a matrix
# *times a vector*: every weight is read for two operations, so the point lies on the slope, the
# processor waits for memory, and a faster one would not help. That is why sampling is slow, and why
# a group helps: the weights are read once for 64 candidates. (A point may lie a little above the
# roof: the slope was measured by copying, and reading alone is faster. `exp` is far below it: we
# count as one operation what takes a processor about twenty.) On a GPU of the H100 class the bend
# lies at a few hundred operations per byte, so nearly everything except large products waits for
# memory.
#
# ## Fusing
#
# The GRPO objective itself is elementwise: ratio, clip, min, mask. On a GPU every such operation
# is a *kernel*: start it, read everything, do one thing, write everything.
#
# > **Predict.** How many operations does `grpo_loss` start, given the (N, T) log-probs? Forward
# > pass only.

# %%
logprobs = torch.randn(512, 64)
with Largest() as watch:
    grpo_loss(logprobs, logprobs, logprobs, torch.randn(512), torch.ones(512, 64))
need = 5 * 4 * logprobs.numel() / 1e6
print(f"{watch.operations} operations; one that did all of it would read {need:.2f} MB once")

# %% [markdown]
# **Check.** Many operations, most of which read and write tensors of that size. On a small batch a
# GPU spends its time starting them. `kernels.py` fuses the *large* ones by hand (logits, softmax,
# gradient), and lets `torch.compile` turn the steps of a softmax into one GPU kernel. Try `python
# kernels.py --device cpu`: it prints its errors against float64, since a fast kernel with wrong
# results is worth nothing.
#
# ## The check cell

# %%
course.final(logits_bytes, online_logsumexp, logprob_gradient, attainable)
