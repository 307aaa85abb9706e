"""From hidden states to the GRPO loss without ever holding the logits of a whole batch.

The logits are by far the largest tensor of a language model, and of each token's V logits the loss needs one log-prob.
So logits, softmax, loss and gradients are computed for one chunk of tokens, and the chunk is dropped before the next.
Invalid tokens, and ids that no token of the batch may choose, are left out of the matrix products altogether.

For a chunk of m valid tokens, hidden H (m,C), output matrix W (V,C), chosen ids y (m,):
(K1) E = exp(Z - max Z), Z = H W^T / temperature, ids outside [lo, hi) left out      (m,V), the only large tensor
(K2) logprob_i = Z[i, y_i] - max Z_i - log sum E_i
(K3) g_i = dL / dlogprob_i, where L is grpo_loss: the objective stands once, in grpo.py
(K4) D = softmax - onehot(y): E_i / sum E_i, except D[i, y_i] = exp(logprob_i) - 1    dlogprob/dlogits = -D / temperature
(K5) dL/dH = s D W,  s_i = -g_i / temperature
(K6) dL/dW = sum over chunks of D^T (s H)

Symbols: N sequences, T tokens, C width, V vocabulary; M valid tokens in the batch, m in a chunk.

Memory at the size of an LLM (N=16, T=1024, C=4096, V=128256, bf16), which has 2.1e9 logits: autograd's backward pass
holds three float32 numbers for each (log-softmax, its gradient, the logits' gradient), 25.2 GB. Here a chunk of 2.6e8
logits holds Z and D, in float32 and bf16, 1.6 GB (and E, 1.1 GB, where nothing is compiled). dL/dW is 4 V C = 2.1 GB, a
product is added to it in place; dL/dH is 4 N T C = 0.3 GB. Of these 4.0 GB only the last grows with the batch.

The gradients are computed in the forward pass, as in Liger Kernel (arXiv:2410.10989): (K3) of a token depends on that
token alone, so its logits are needed once. With level="sequence" the ratio needs the whole sequence: if there is more
than one chunk, a first pass computes the log-probs.

    python kernels.py --device cpu|cuda    # errors against float64 autograd, then time and memory; on a CPU 40 s, half of it compiling
"""

import argparse
import functools
import importlib.util
import itertools
import math
import os
import shutil
import statistics
import sys
import sysconfig
import time
from dataclasses import dataclass, replace

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from grpo import check_choice, check_shape, checked_rewards, group_advantages, grpo_loss, scaled_advantages
from model import add_matmul, at_least_float32, matmul

CHUNK_BYTES = {"cuda": 2**30, "cpu": 2**23}  # of float32 logits: on a GPU few large products, on a CPU what its caches hold

# ---------------------------------------------------------------- what is compiled on a GPU: one kernel, not one per operation


def softmax_parts(logits: Tensor, tokens: Tensor, lo: Tensor | None, hi: Tensor | None, temperature: float) -> tuple[Tensor, ...]:
    """(m,V) logits -> E = exp(logits - their maximum) of the ids lo <= id < hi, 0 elsewhere; the sums of its rows, (m,1); and
    the (m,1) log-probs of the chosen ids."""
    if temperature != 1:
        logits = logits / temperature
    if lo is not None:
        ids = torch.arange(logits.shape[1], device=logits.device)
        logits = logits.masked_fill((ids < lo[:, None]) | (ids >= hi[:, None]), -torch.inf)
    logits = logits - logits.amax(1, keepdim=True)  # not in place: a compiled function would have to write its input back
    chosen = logits.gather(1, tokens[:, None])
    odds = logits.exp_()  # (K1)
    total = odds.sum(1, keepdim=True)
    return odds, total, chosen - total.log()  # (K2)


def chosen_logprobs(logits: Tensor, tokens: Tensor, *restrictions) -> Tensor:
    """(m,V) logits -> the (m,) log-probs of the chosen ids."""
    return softmax_parts(logits, tokens, *restrictions)[2][:, 0]


def softmax_minus_onehot(logits: Tensor, tokens: Tensor, dtype: torch.dtype, *restrictions) -> tuple[Tensor, Tensor]:
    """(m,V) logits -> D (m,V), minus the derivative of the chosen log-prob by the logits over the temperature, rounded once, at
    the end; and the (m,) log-probs."""
    odds, total, logprobs = softmax_parts(logits, tokens, *restrictions)
    return odds.div_(total).to(dtype).scatter_(1, tokens[:, None], torch.expm1(logprobs).to(dtype)), logprobs[:, 0]  # (K4)


def advantages_and_loss(logprobs, old_logprobs, ref_logprobs, advantages, rewards, mask, scale, **objective):
    """grpo_loss, with the advantages given or made of `rewards` here. Everything stands once, in grpo.py."""
    if rewards is not None:
        advantages = scaled_advantages(rewards, scale).flatten()
    return grpo_loss(logprobs, old_logprobs, ref_logprobs, advantages, mask, **objective)


@functools.cache
def compiled(function):
    """Dynamic, since the number of valid tokens differs in every step."""
    return torch.compile(function, dynamic=True)


def can_compile(device: torch.device) -> bool:
    """On CUDA, when Triton and what it calls are there: a C compiler and Python's headers."""
    has_compiler = any(shutil.which(name) for name in (os.environ.get("CC", "cc"), "gcc", "clang"))
    has_headers = os.path.exists(os.path.join(sysconfig.get_path("include"), "Python.h"))
    return device.type == "cuda" and importlib.util.find_spec("triton") is not None and has_compiler and has_headers


# ---------------------------------------------------------------- one chunk


@dataclass
class Choice:
    """What was chosen at M positions, from which ids, and how it is computed."""

    tokens: Tensor  # (M,)
    lo: Tensor | None  # (M,), None: every id of the matrix
    hi: Tensor | None
    temperature: float
    dtype: torch.dtype  # of the matrix products' factors
    chunk: int  # tokens at a time
    compile: bool

    def rows(self, index: Tensor | slice) -> "Choice":
        lo, hi = (None, None) if self.lo is None else (self.lo[index], self.hi[index])
        return replace(self, tokens=self.tokens[index], lo=lo, hi=hi)

    def slices(self) -> list[slice]:
        return [slice(i, i + self.chunk) for i in range(0, max(len(self.tokens), 1), self.chunk)]

    def run(self, function, *arguments, **options):
        """function(...), compiled where that is asked for."""
        return (compiled(function) if self.compile else function)(*arguments, **options)

    def logprobs(self, hidden: Tensor, weight: Tensor, part: slice) -> Tensor:
        """Of one chunk, the (m,) log-probs."""
        c, logits = self.rows(part), matmul(hidden[part].to(self.dtype), weight.T)
        return self.run(chosen_logprobs, logits, c.tokens, c.lo, c.hi, self.temperature)

    def difference(self, hidden: Tensor, weight: Tensor, part: slice) -> tuple[Tensor, Tensor]:
        """Of one chunk, D (m,V) and the (m,) log-probs."""
        c, logits = self.rows(part), matmul(hidden[part].to(self.dtype), weight.T)
        return self.run(softmax_minus_onehot, logits, c.tokens, self.dtype, c.lo, c.hi, self.temperature)

    def add_gradients(self, dhidden, dweight, difference, g, hidden, weight, part) -> None:
        """Of one chunk, into dL/dhidden (M,C) and dL/dweight (V,C), from D (m,V) and g = dL/dlogprob (M,)."""
        scale = -g[part, None] / self.temperature
        dhidden[part] = matmul(difference, weight) * scale  # (K5)
        add_matmul(dweight, difference.T, (hidden[part] * scale).to(self.dtype))  # (K6)


# ---------------------------------------------------------------- autograd


class SelectedLogprobs(torch.autograd.Function):
    """(M,C), (V,C) -> (M,) log-probs. D of a single chunk is kept for the backward pass, else computed anew."""

    @staticmethod
    def forward(ctx, hidden: Tensor, weight: Tensor, choice: Choice, learns: bool):
        """(K1) and (K2), chunk by chunk."""
        ctx.choice, cast, parts, kept = choice, weight.to(choice.dtype), choice.slices(), None
        if learns and len(parts) == 1:
            kept, logprobs = choice.difference(hidden, cast, parts[0])
        else:
            logprobs = torch.cat([choice.logprobs(hidden, cast, part) for part in parts])
        ctx.save_for_backward(hidden, weight, kept)
        return logprobs

    @staticmethod
    @once_differentiable
    def backward(ctx, g: Tensor):
        """(K4) to (K6), chunk by chunk; g (M,) is the gradient of the log-probs."""
        (hidden, weight, kept), choice = ctx.saved_tensors, ctx.choice
        cast, dweight = weight.to(choice.dtype), torch.zeros_like(weight, dtype=g.dtype)
        size, used = len(g), g.nonzero().squeeze(1)
        if len(used) < size:  # a position that the caller masked out has g = 0, and may hold nan
            g, hidden, choice, kept = g[used], hidden[used], choice.rows(used), None
        dhidden = torch.zeros_like(hidden, dtype=g.dtype)
        for part in choice.slices():
            difference = choice.difference(hidden, cast, part)[0] if kept is None else kept
            choice.add_gradients(dhidden, dweight, difference, g, hidden, cast, part)
        if len(used) < size:
            dhidden = dhidden.new_zeros(size, dhidden.shape[1]).index_copy_(0, used, dhidden)
        return dhidden.to(hidden.dtype), dweight.to(weight.dtype), None, None


class FusedLoss(torch.autograd.Function):
    """(M,C), (V,C) -> what loss_of says of the (M,) log-probs. Gradients are computed in the forward pass."""

    @staticmethod
    def forward(ctx, hidden: Tensor, weight: Tensor, choice: Choice, loss_of, whole_sequences: bool):
        """(K1) to (K6) of a chunk before the next: the loss, its metrics, and both gradients, kept for backward."""
        cast, parts = weight.to(choice.dtype), choice.slices()
        dhidden, dweight = (torch.zeros_like(x, dtype=at_least_float32(cast[:0]).dtype) for x in (hidden, weight))
        logprobs = dhidden.new_zeros(len(hidden))
        if whole_sequences and len(parts) > 1:
            for part in parts:
                logprobs[part] = choice.logprobs(hidden, cast, part)
        for part in parts:
            difference, logprobs[part] = choice.difference(hidden, cast, part)
            # Log-probs of later chunks are still 0 here. A token's gradient does not depend on them, and in the last
            # chunk, whose loss and metrics are the ones returned, there are none.
            leaf = logprobs.detach().requires_grad_()
            with torch.enable_grad():
                loss, metrics = loss_of(leaf)
                (g,) = torch.autograd.grad(loss, leaf)  # (K3)
            choice.add_gradients(dhidden, dweight, difference, g, hidden, cast, part)
        ctx.save_for_backward(dhidden, dweight)
        ctx.dtypes = hidden.dtype, weight.dtype
        return loss.detach(), metrics

    @staticmethod
    @once_differentiable
    def backward(ctx, scale: Tensor, _):
        """The gradients that forward kept, times the gradient of the loss; rounded after that."""
        saved = zip(ctx.saved_tensors, ctx.dtypes, strict=True)
        dhidden, dweight = (torch.mul(x, scale, out=torch.empty_like(x, dtype=dtype)) for x, dtype in saved)
        return dhidden, dweight, None, None, None


# ---------------------------------------------------------------- public functions


def factor_dtype(hidden: Tensor, weight: Tensor) -> torch.dtype:
    """float64 if either is, bf16 if hidden or autocast is, else float32: float16 gradients would underflow."""
    kind, wide = hidden.device.type, torch.promote_types(hidden.dtype, weight.dtype)
    if wide == torch.float64:
        return wide
    dtype = torch.get_autocast_dtype(kind) if torch.is_autocast_enabled(kind) else hidden.dtype
    return dtype if dtype == torch.bfloat16 else torch.float32


def prepare(hidden, weight, tokens, temperature, lo, hi, chunk_tokens, compile) -> tuple[Tensor, Choice, Tensor]:
    """(M,) tokens and ranges -> the rows of the matrix any of them may choose, the Choice, and which tokens are legal.

    A batch of pictures has no use for the rows of words: only ids from the lowest lo to the highest hi are multiplied.
    """
    if not temperature > 0:
        raise ValueError(f"temperature={temperature}: expected a number > 0")
    size, same = len(weight), lo is None and hi is None
    lo = torch.zeros_like(tokens) if lo is None else lo.reshape(-1).clamp(0, size)
    hi = torch.full_like(tokens, size) if hi is None else hi.reshape(-1).clamp(0, size)
    legal, first, last = (tokens >= lo) & (tokens < hi), 0, size
    if not same and len(tokens):
        low, high = torch.where(legal, lo, size), torch.where(legal, hi, 0)
        alike = (~legal | (lo == low.min()) & (hi == high.max())).all()
        *ends, same = torch.stack((low.min(), high.max(), alike.long())).tolist()  # one question to the device, not three
        first, last = ends if ends[0] < ends[1] else (first, last)  # not if no token is legal
    lo, hi = (None, None) if same else (lo - first, hi - first)
    chunk = chunk_tokens or max(1, CHUNK_BYTES["cuda" if hidden.is_cuda else "cpu"] // (4 * (last - first)))
    chunk = math.ceil(len(tokens) / max(1, math.ceil(len(tokens) / chunk))) or 1  # all of about the same size
    compile = can_compile(hidden.device) if compile is None else compile
    tokens = torch.where(legal, tokens - first, 0)
    choice = Choice(tokens, lo, hi, float(temperature), factor_dtype(hidden, weight), chunk, compile)
    return weight if (first, last) == (0, size) else weight[first:last], choice, legal


def gets_gradient(*tensors: Tensor) -> bool:
    return torch.is_grad_enabled() and any(x.requires_grad for x in tensors)


def check_inputs(hidden: Tensor, weight: Tensor, tokens: Tensor, lo: Tensor | None, hi: Tensor | None) -> None:
    if hidden.ndim != 3 or weight.ndim != 2 or hidden.shape[2] != weight.shape[1]:
        raise ValueError(f"hidden {tuple(hidden.shape)}, weight {tuple(weight.shape)}: expected (N, T, C), (V, C)")
    for name, x in {"tokens": tokens, "lo": lo, "hi": hi}.items():
        check_shape(name, x, hidden.shape[:2], "the (N, T) of hidden")


def selected_logprobs(
    hidden: Tensor, weight: Tensor, tokens: Tensor, temperature: float = 1.0, lo: Tensor | None = None,
    hi: Tensor | None = None, *, chunk_tokens: int | None = None, compile: bool | None = None,
) -> Tensor:
    """Log-prob of each token, (N,T), at least float32; gradients for hidden (N,T,C) and weight (V,C).

    hidden[n,t] is the state that predicts tokens[n,t]. The softmax runs over ids lo <= id < hi, (N,T) int64, None means
    all; a token outside has -inf. A position whose result gets no gradient may hold anything, nan included.
    chunk_tokens, compile: None chooses by device. Raises ValueError for shapes that differ or temperature <= 0.

    >>> hidden, weight = torch.zeros(1, 2, 3), torch.zeros(4, 3)  # four equally probable ids, then two
    >>> lo, hi = torch.tensor([[0, 2]]), torch.tensor([[4, 4]])
    >>> selected_logprobs(hidden, weight, torch.tensor([[1, 2]]), lo=lo, hi=hi).exp()
    tensor([[0.2500, 0.5000]])
    """
    check_inputs(hidden, weight, tokens, lo, hi)
    flat = hidden.reshape(-1, hidden.shape[2])
    ids = tokens.reshape(-1).long()
    weight, choice, legal = prepare(flat, weight, ids, temperature, lo, hi, chunk_tokens, compile)
    logprobs = SelectedLogprobs.apply(flat, weight, choice, gets_gradient(flat, weight))
    return torch.where(legal, logprobs, -torch.inf).view(tokens.shape)


def fused_linear_grpo_loss(
    hidden: Tensor, weight: Tensor, tokens: Tensor, old_logprobs: Tensor, ref_logprobs: Tensor | None,
    advantages: Tensor | None, mask: Tensor, *, rewards: Tensor | None = None, scale: str = "group",
    clip_low: float = 0.2, clip_high: float | None = None, kl_coef: float = 0.02, reduction: str = "token",
    level: str = "token", max_tokens: int | None = None, temperature: float = 1.0, lo: Tensor | None = None,
    hi: Tensor | None = None, chunk_tokens: int | None = None, compile: bool | None = None,
) -> tuple[Tensor, dict[str, Tensor]]:
    """Loss, metrics and gradients of grpo_loss(selected_logprobs(...), ...), with both their arguments, in one pass.

    Give advantages (N,), or rewards (B,G) with N = B*G and None: then they are group_advantages(rewards, scale).
    Raises ValueError as these functions do, for both or neither of the two, and for a valid token outside its range.

    >>> hidden, weight, tokens = torch.zeros(2, 1, 3), torch.zeros(4, 3, requires_grad=True), torch.tensor([[1], [2]])
    >>> old = torch.full((2, 1), 0.2).log()  # now 0.25: ratio 1.25, clipped to 1.2 where A = 1, kept where A = -1
    >>> loss, _ = fused_linear_grpo_loss(hidden, weight, tokens, old, None, torch.tensor([1.0, -1.0]), old < 0)
    >>> round(loss.item(), 4)  # (-1.2 + 1.25) / 2
    0.025
    """
    check_inputs(hidden, weight, tokens, lo, hi)
    check_shape("mask", mask, tokens.shape, "the (N, T) of tokens")
    if (advantages is None) == (rewards is None):
        raise ValueError("expected either advantages (N,) or rewards (B, G), the other one None")
    if rewards is not None:
        if rewards.numel() != len(tokens):
            raise ValueError(f"rewards has shape {tuple(rewards.shape)}, expected (B, G) with B*G = {len(tokens)}")
        check_choice("scale", scale, ("group", "batch", "none"))
        rewards = checked_rewards(rewards)
    rows = (mask > 0).flatten().nonzero().squeeze(1)

    def valid_rows(x: Tensor | None) -> Tensor | None:  # no other row enters a product, where nan times 0 would be nan
        flat = None if x is None else x.flatten(0, 1)
        return flat if flat is None or len(rows) == len(flat) else flat.index_select(0, rows)

    def loss_of(logprobs: Tensor) -> tuple[Tensor, dict[str, Tensor]]:
        everywhere = logprobs.new_zeros(mask.numel()).index_copy(0, rows, logprobs).view(mask.shape)
        return choice.run(
            advantages_and_loss, everywhere, old_logprobs, ref_logprobs, advantages, rewards, mask, scale, clip_low=clip_low,
            clip_high=clip_high, kl_coef=kl_coef, reduction=reduction, level=level, max_tokens=max_tokens,
        )

    hidden, ids, lo, hi = valid_rows(hidden), valid_rows(tokens).long(), valid_rows(lo), valid_rows(hi)
    weight, choice, legal = prepare(hidden, weight, ids, temperature, lo, hi, chunk_tokens, compile)
    if not legal.all():
        raise ValueError(f"tokens: {int((~legal).sum())} of {len(ids)} valid ids lie outside their range [lo, hi)")
    if gets_gradient(hidden, weight):
        return FusedLoss.apply(hidden, weight, choice, loss_of, level == "sequence")
    return loss_of(SelectedLogprobs.apply(hidden, weight, choice, False))


# ---------------------------------------------------------------- python kernels.py: is it right, what does it save?


def plain_logprobs(hidden, weight, tokens, temperature=1.0, lo=None, hi=None) -> Tensor:
    """What this file replaces: all logits at once, and autograd."""
    logits = at_least_float32(hidden @ weight.T) / temperature
    if lo is not None:
        ids = torch.arange(len(weight), device=tokens.device)
        logits = logits.masked_fill((ids < lo[..., None]) | (ids >= hi[..., None]), -torch.inf)
    return torch.log_softmax(logits, -1).gather(2, tokens[..., None]).squeeze(2)


def composed_loss(select, hidden, weight, tokens, *rest, temperature=1.0, lo=None, hi=None, **options):
    """grpo_loss of the log-probs that `select` computes: what the fused loss must equal."""
    return grpo_loss(select(hidden, weight, tokens, temperature, lo, hi), *rest, **options)


def loss_and_gradients(function, hidden, weight, *rest, **options) -> tuple[Tensor, Tensor, Tensor]:
    hidden, weight = hidden.detach().requires_grad_(), weight.detach().requires_grad_()
    loss, _ = function(hidden, weight, *rest, **options)
    loss.backward()
    return loss.detach(), hidden.grad, weight.grad


def random_batch(rows, width, channels, size, dtype, device="cpu", temperature=1.0, ranged=True) -> tuple[list, dict]:
    """The loss's arguments up to mask, and ranges, for V = size. Rows have random lengths, the last one has 0; invalid
    positions hold nan and an impossible id."""
    hidden = torch.randn(rows, width, channels, device=device).to(dtype)
    weight = (torch.randn(size, channels, device=device) / channels**0.5).to(dtype)
    lo = torch.randint(0, size // 2, (rows, width), device=device)
    hi = torch.randint(size // 2, size, (rows, width), device=device) + 1
    tokens = lo + (torch.rand(rows, width, device=device) * (hi - lo)).long()
    lengths = torch.randint(1, width + 1, (rows, 1), device=device)
    lengths[-1] = 0
    mask = torch.arange(width, device=device) < lengths
    hidden, tokens = torch.where(mask[..., None], hidden, torch.nan), torch.where(mask, tokens, -7)
    ranges = {"lo": lo, "hi": hi} if ranged else {}
    new = selected_logprobs(hidden, weight, tokens, temperature, **ranges, compile=False)
    noise = 0.1 * torch.randint(-5, 5, (2, rows, width), device=device) + 0.05  # no ratio at a clip edge
    return [hidden, weight, tokens, *(new + noise), torch.randn(rows, device=device), mask.float()], ranges


def cleaned(inputs: list[Tensor]) -> list[Tensor]:
    """For the plain path, which nan and impossible ids would break."""
    return [inputs[0].nan_to_num(0.0), inputs[1], inputs[2].clamp(min=0), *inputs[3:]]


def largest_error(got, expected) -> float:
    """Of the loss, absolute; of the gradients, relative to the largest entry."""
    sizes = [1.0, expected[1].abs().max(), expected[2].abs().max()]
    errors = [(a.double() - b).abs().max() / size for a, b, size in zip(got, expected, sizes, strict=True)]
    return torch.stack(errors).max().item()  # unlike Python's max, nan if any is


def errors_of(dtype, device, reduction, level, with_ref, ranged, chunk, compile=False) -> tuple[float, float]:
    """The largest errors of selected_logprobs and of the fused loss (given rewards) against autograd in float64."""
    inputs, ranges = random_batch(8, 33, 64, 300, dtype, device, 0.8, ranged)
    rewards = torch.randn(2, 4, device=device)
    inputs[4], inputs[5] = inputs[4] if with_ref else None, group_advantages(rewards).flatten()
    options = dict(reduction=reduction, level=level, temperature=0.8, clip_high=0.3, **ranges)
    exact = [x if x is None or x.dtype == torch.long else x.double() for x in cleaned(inputs)]
    expected = loss_and_gradients(functools.partial(composed_loss, plain_logprobs), *exact, **options)
    how = dict(chunk_tokens=chunk, compile=compile)
    composed = loss_and_gradients(functools.partial(composed_loss, functools.partial(selected_logprobs, **how)), *inputs, **options)
    inputs[5] = None
    fused = loss_and_gradients(fused_linear_grpo_loss, *inputs, rewards=rewards, **how, **options)
    return largest_error(composed, expected), largest_error(fused, expected)


def check(device: str) -> bool:
    """Both public functions over all their options, and compiled over a few; prints the largest errors, returns whether they are small."""
    every = list(itertools.product(["token", "sequence", "constant"], ["token", "sequence"], [True, False], [True, False], [None, 37]))
    few = [("token", "token", True, False, None), ("sequence", "sequence", False, True, 37), ("constant", "token", True, True, 37)]
    print(f"{'largest error':20}{'selected_logprobs':>20}{'fused loss':>14}{'allowed':>12}")
    passed = True
    for dtype, allowed in {torch.float64: 1e-10, torch.float32: 1e-4, torch.bfloat16: 2e-2}.items():
        for compile in (False, True)[: 1 + can_compile(torch.device(device))]:
            found = []
            for option in few if compile else every:
                if compile:
                    torch._dynamo.reset()  # or the many variants would end in none of them being compiled
                found.append(errors_of(dtype, device, *option, compile))
            selected, fused = torch.tensor(found).amax(0).tolist()
            name = str(dtype).removeprefix("torch.") + ", compiled" * compile
            print(f"{name:20}{selected:20.1e}{fused:14.1e}{allowed:12.0e}")
            passed = passed and selected < allowed and fused < allowed  # a nan is not
    return passed


def measured(function, device: str) -> tuple[float, float]:
    """Milliseconds of one call, and the GB it needed on a GPU on top of what was there before, nan on a CPU."""
    if device == "cpu":
        start = time.perf_counter()
        function()
        return 1000 * (time.perf_counter() - start), math.nan
    before, (start, end) = torch.cuda.memory_allocated(), (torch.cuda.Event(enable_timing=True) for _ in range(2))
    torch.cuda.reset_peak_memory_stats()
    start.record()
    function()
    end.record()
    end.synchronize()
    return start.elapsed_time(end), (torch.cuda.max_memory_allocated() - before) / 1e9


def compare(functions: dict, device: str, repeats: int = 15) -> dict[str, tuple[float, float]]:
    """{name: function} -> {name: (median milliseconds, GB of the last call)}. They take turns, since a machine is not equally fast
    at all times. What does not fit the memory has nan and infinity."""
    times, peaks = {name: [] for name in functions}, dict.fromkeys(functions, math.nan)
    for _ in range(repeats + 2):  # the first two are warm-up
        for name in (name for name in functions if peaks[name] != math.inf):
            try:
                ms, peaks[name] = measured(functions[name], device)
                times[name].append(ms)
            except torch.cuda.OutOfMemoryError:
                times[name], peaks[name] = [math.nan], math.inf
                torch.cuda.empty_cache()
    return {name: (statistics.median(spent[2:] or spent), peaks[name]) for name, spent in times.items()}


def paths(device: str, width: int) -> dict:
    """{name: function with the arguments of fused_linear_grpo_loss}: ours, and what else there is. Liger Kernel (pip install
    liger-kernel) is timed where it is installed: its chunked loss, and its Triton kernel, which takes all logits."""
    plain = functools.partial(composed_loss, plain_logprobs)
    found = {"plain": plain}
    if can_compile(torch.device(device)) or (device == "cpu" and shutil.which("g++")):
        found["plain, compiled"] = torch.compile(plain)
    found["ours"] = fused_linear_grpo_loss
    if importlib.util.find_spec("liger_kernel"):
        liger = importlib.import_module("liger_kernel.chunked_loss")
        chunked = liger.LigerFusedLinearGRPOLoss(beta=0.02, loss_type="dapo", max_completion_length=width)
        found["Liger, chunked"] = lambda hidden, weight, tokens, old, ref, advantages, mask: chunked(
            hidden, weight, tokens, mask, advantages, ref_per_token_logps=ref, old_per_token_logps=old)  # fmt: skip
        if device == "cuda":
            triton = importlib.import_module("liger_kernel.transformers.grpo_loss")
            found["Liger, Triton"] = lambda hidden, weight, tokens, old, ref, advantages, mask: triton.triton_grpo_loss(
                torch.nn.functional.pad(hidden, (0, 0, 0, 1)) @ weight.T,  # it leaves the last position out
                old, ref, tokens, advantages, mask, temperature=1.0, beta=0.02, eps_high=0.2, reduce=True)  # fmt: skip
    return found


def three_products(hidden: Tensor, weight: Tensor) -> Tensor:
    """The matrix products that no way to this loss can do without: the roofline."""
    hidden = hidden.flatten(0, 1)
    logits = hidden @ weight.T
    return (logits @ weight).sum() + (logits.T @ hidden).sum()


SIZES = {  # name: N, T, C, V and the dtype of hidden states and matrix
    "cpu": {"ours / 8": (64, 64, 384, 1500, torch.float32)},
    "cuda": {
        "ours": (512, 64, 384, 1500, torch.float32),
        "middle": (64, 512, 1024, 32000, torch.bfloat16),
        "LLM": (16, 1024, 4096, 128256, torch.bfloat16),
    },
}


def benchmark(device: str, sizes: dict | None = None) -> None:
    """Forward and backward over full masks and all ids, in turns; all must agree on the loss."""
    sizes = sizes or SIZES[device]
    print(f"\n{'size':10}{'N':>4}{'T':>6}{'C':>6}{'V':>8}  {'path':16}{'ms':>9}{'peak, GB':>10}{'of roofline':>13}{'loss':>12}")
    for name, (rows, width, channels, size, dtype) in sizes.items():
        torch._dynamo.reset()
        inputs = cleaned(random_batch(rows, width, channels, size, dtype, device, ranged=False)[0])
        inputs[6] = torch.ones_like(inputs[6])
        inputs[3] = selected_logprobs(*inputs[:3])
        inputs[4] = inputs[3] + 0.1 * torch.randn_like(inputs[3])
        runs = {path: functools.partial(loss_and_gradients, f, *inputs) for path, f in paths(device, width).items()}
        found = compare({"three products": functools.partial(three_products, *inputs[:2])} | runs, device)
        for path, (ms, peak) in found.items():
            loss = f"{runs[path]()[0]:12.6f}" if path in runs and math.isfinite(ms) else ""
            shape = f"{name:10}{rows:4}{width:6}{channels:6}{size:8}"
            print(f"{shape}  {path:16}{ms:9.1f}{peak:10.2f}{found['three products'][0] / ms:13.0%}{loss}", flush=True)


def main(arguments: list[str] | None = None) -> int:
    """The check, then the table of time and memory; 1 if the check fails."""
    parser = argparse.ArgumentParser(description="Check the fused loss, then compare its time and memory.")
    parser.add_argument("--device", choices=["cpu", "cuda"], default="cpu")
    parser.add_argument("--seed", type=int, help="of the random inputs; default: a new one")
    options = parser.parse_args(arguments)
    if options.device == "cuda" and not torch.cuda.is_available():
        print("kernels.py: --device cuda, but PyTorch sees no GPU here; use --device cpu", file=sys.stderr)
        return 2
    seed = torch.seed() % 2**32 if options.seed is None else options.seed
    torch.manual_seed(seed)
    compiles = "on" if can_compile(torch.device(options.device)) else "off"
    print(f"torch {torch.__version__}, {options.device}, torch.compile {compiles}, seed {seed}")
    if not check(options.device):
        print("kernels.py: an error is larger than allowed", file=sys.stderr)
        return 1
    benchmark(options.device)
    return 0


if __name__ == "__main__":
    sys.exit(main())
