"""From hidden states to the GRPO loss without ever holding the logits of a whole batch.

The logits are by far the largest tensor of a language model, and of each token's V logits the loss needs one log-prob.
So logits, softmax, loss and gradients are computed for one chunk of tokens, and the chunk is dropped before the next.
Invalid tokens, and ids that no token of the batch may choose, are left out of the matrix products altogether.

For a chunk of m valid tokens, hidden H (m,C), output matrix W (V,C), chosen ids y (m,):
(K1) Z = log_softmax(H W^T / temperature), ids outside [lo, hi) left out        (m,V), the only large tensor
(K2) logprob_i = Z[i, y_i]
(K3) g_i = dL / dlogprob_i, where L is grpo_loss: the objective stands once, in grpo.py
(K4) D = softmax - onehot(y): exp(Z), except D[i, y_i] = exp(logprob_i) - 1     dlogprob/dlogits = -D / temperature
(K5) dL/dH = s D W,  s_i = -g_i / temperature
(K6) dL/dW = sum over chunks of D^T (s H)

Symbols: N sequences, T tokens, C width, V vocabulary; M valid tokens in the batch, m in a chunk.

Memory at the size of an LLM (N=16, T=1024, C=4096, V=128256, bf16), which has 2.1e9 logits: autograd's backward pass
holds three float32 numbers for each (log-softmax, its gradient, the logits' gradient), 25.2 GB. Here a chunk of 2.7e8
logits holds two (logits, log-softmax), 2.1 GB; dL/dW and one chunk's share of it are 2 * 4 V C = 4.2 GB, dL/dH
4 N T C = 0.3 GB. Of these 6.6 GB only the last grows with the batch.

The gradients are computed in the forward pass, as in Liger Kernel (arXiv:2410.10989): (K3) of a token depends on that
token alone, so its logits are needed once. With level="sequence" the ratio needs the whole sequence: if there is more
than one chunk, a first pass computes the log-probs.

    python kernels.py --device cpu|cuda    # errors against float64 autograd, then time and memory; on a CPU 15 s
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

from grpo import check_shape, group_advantages, grpo_loss
from model import at_least_float32, matmul

CHUNK_BYTES = {"cuda": 2**30, "cpu": 2**26}  # of float32 logits

# ---------------------------------------------------------------- one chunk


def log_softmax_rows(logits: Tensor, lo: Tensor | None, hi: Tensor | None, temperature: float) -> Tensor:
    """(m,V) logits -> (m,V) log-probs of the ids lo <= id < hi, -inf elsewhere."""
    if temperature != 1:
        logits = logits / temperature
    if lo is not None:
        ids = torch.arange(logits.shape[1], device=logits.device)
        logits = logits.masked_fill((ids < lo[:, None]) | (ids >= hi[:, None]), -torch.inf)
    return torch.log_softmax(logits, 1)  # (K1)


def softmax_minus_onehot(logs: Tensor, tokens: Tensor, dtype: torch.dtype) -> Tensor:
    """(m,V) log-probs -> minus the derivative of the chosen log-prob by its logits, rounded once, at the end."""
    chosen = torch.expm1(logs.gather(1, tokens[:, None]))
    return logs.exp().to(dtype).scatter_(1, tokens[:, None], chosen.to(dtype))  # (K4)


@functools.cache
def compiled(function):
    """One GPU kernel in place of one per operation; dynamic, since the number of valid tokens differs in every step."""
    return torch.compile(function, dynamic=True)


def can_compile(device: torch.device) -> bool:
    """On CUDA, when Triton and what it calls are there: a C compiler and Python's headers."""
    has_compiler = any(shutil.which(name) for name in (os.environ.get("CC", "cc"), "gcc", "clang"))
    has_headers = os.path.exists(os.path.join(sysconfig.get_path("include"), "Python.h"))
    return device.type == "cuda" and importlib.util.find_spec("triton") is not None and has_compiler and has_headers


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

    def logs(self, hidden: Tensor, weight: Tensor, part: slice) -> tuple[Tensor, Tensor]:
        """Of one chunk, the (m,V) log-probs of all ids and the (m,) log-probs of the chosen ones."""
        chosen = self.rows(part)
        function = compiled(log_softmax_rows) if self.compile else log_softmax_rows
        logs = function(matmul(hidden[part].to(self.dtype), weight.T), chosen.lo, chosen.hi, self.temperature)
        return logs, logs.gather(1, chosen.tokens[:, None]).squeeze(1)  # (K2)

    def gradients(self, logs: Tensor, hidden: Tensor, weight: Tensor, part: slice, g: Tensor) -> tuple[Tensor, Tensor]:
        """Of one chunk, dL/dhidden (m,C) and its share of dL/dweight (V,C), from g = dL/dlogprob (m,)."""
        function = compiled(softmax_minus_onehot) if self.compile else softmax_minus_onehot
        difference = function(logs, self.tokens[part], self.dtype)
        scale = -g[:, None] / self.temperature
        dhidden = matmul(difference, weight) * scale  # (K5)
        return dhidden, matmul(difference.T, (hidden[part] * scale).to(self.dtype))  # (K6)


# ---------------------------------------------------------------- autograd


class SelectedLogprobs(torch.autograd.Function):
    """(M,C), (V,C) -> (M,) log-probs. (K1) of a single chunk is kept for the backward pass, else computed anew."""

    @staticmethod
    def forward(ctx, hidden: Tensor, weight: Tensor, choice: Choice) -> Tensor:
        """(K1) and (K2), chunk by chunk."""
        ctx.choice, cast, logprobs = choice, weight.to(choice.dtype), []
        for part in choice.slices():
            logs, chosen = choice.logs(hidden, cast, part)
            logprobs.append(chosen)
        ctx.save_for_backward(hidden, weight, logs if len(logprobs) == 1 else None)
        return torch.cat(logprobs)

    @staticmethod
    @once_differentiable
    def backward(ctx, g: Tensor):
        """(K4) to (K6), chunk by chunk; g (M,) is the gradient of the log-probs."""
        (hidden, weight, kept), choice = ctx.saved_tensors, ctx.choice
        cast = weight.to(choice.dtype)
        dhidden, dweight = torch.zeros_like(hidden, dtype=g.dtype), torch.zeros_like(weight, dtype=g.dtype)
        used = g.nonzero().squeeze(1)
        if len(used) < len(g):  # a position that the caller masked out has g = 0, and may hold nan
            g, hidden, choice, kept = g[used], hidden[used], choice.rows(used), None
        for part in choice.slices():
            logs = choice.logs(hidden, cast, part)[0] if kept is None else kept
            dhidden[used[part]], share = choice.gradients(logs, hidden, cast, part, g[part])
            dweight += share
        return dhidden.to(hidden.dtype), dweight.to(weight.dtype), None


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
                logprobs[part] = choice.logs(hidden, cast, part)[1]
        for part in parts:
            logs, logprobs[part] = choice.logs(hidden, cast, part)
            # Log-probs of later chunks are still 0 here. A token's gradient does not depend on them, and in the last
            # chunk, whose loss and metrics are the ones returned, there are none.
            leaf = logprobs.detach().requires_grad_()
            with torch.enable_grad():
                loss, metrics = loss_of(leaf)
                (g,) = torch.autograd.grad(loss, leaf)  # (K3)
            dhidden[part], share = choice.gradients(logs, hidden, cast, part, g[part])
            dweight += share
        ctx.save_for_backward(dhidden, dweight)
        ctx.dtypes = hidden.dtype, weight.dtype
        return loss.detach(), metrics

    @staticmethod
    @once_differentiable
    def backward(ctx, scale: Tensor, _):
        """The gradients that forward kept, times the gradient of the loss."""
        dhidden, dweight = (x.mul(scale).to(dtype) for x, dtype in zip(ctx.saved_tensors, ctx.dtypes, strict=True))
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
    size, first, last = len(weight), 0, len(weight)
    lo = torch.zeros_like(tokens) if lo is None else lo.reshape(-1).clamp(0, size)
    hi = torch.full_like(tokens, size) if hi is None else hi.reshape(-1).clamp(0, size)
    legal = (tokens >= lo) & (tokens < hi)
    if legal.any():
        first, last = int(lo[legal].min()), int(hi[legal].max())
    same = bool(((lo == first) & (hi == last)).all())
    lo, hi = (None, None) if same else (lo - first, hi - first)
    budget = CHUNK_BYTES["cuda" if hidden.is_cuda else "cpu"]
    chunk = chunk_tokens or max(1, budget // (4 * (last - first)))
    compile = can_compile(hidden.device) if compile is None else compile
    tokens = torch.where(legal, tokens - first, 0)
    choice = Choice(tokens, lo, hi, float(temperature), factor_dtype(hidden, weight), chunk, compile)
    return weight[first:last], choice, legal


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
    logprobs = SelectedLogprobs.apply(flat, weight, choice)
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
        advantages = group_advantages(rewards, scale).flatten()
    rows = (mask > 0).flatten().nonzero().squeeze(1)

    def valid_rows(x: Tensor | None) -> Tensor | None:  # no other row enters a product, where nan times 0 would be nan
        return None if x is None else x.flatten(0, 1).index_select(0, rows)

    def loss_of(logprobs: Tensor) -> tuple[Tensor, dict[str, Tensor]]:
        everywhere = logprobs.new_zeros(mask.numel()).index_copy(0, rows, logprobs).view(mask.shape)
        return grpo_loss(
            everywhere, old_logprobs, ref_logprobs, advantages, mask, clip_low=clip_low, clip_high=clip_high,
            kl_coef=kl_coef, reduction=reduction, level=level, max_tokens=max_tokens,
        )

    hidden, ids, lo, hi = valid_rows(hidden), valid_rows(tokens).long(), valid_rows(lo), valid_rows(hi)
    weight, choice, legal = prepare(hidden, weight, ids, temperature, lo, hi, chunk_tokens, compile)
    if not legal.all():
        raise ValueError(f"tokens: {int((~legal).sum())} of {len(ids)} valid ids lie outside their range [lo, hi)")
    if torch.is_grad_enabled() and (hidden.requires_grad or weight.requires_grad):
        return FusedLoss.apply(hidden, weight, choice, loss_of, level == "sequence")
    return loss_of(SelectedLogprobs.apply(hidden, weight, choice))


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
    new = selected_logprobs(hidden, weight, tokens, temperature, **ranges)
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


def errors_of(dtype, device, reduction, level, with_ref, ranged, chunk) -> tuple[float, float]:
    """The largest errors of selected_logprobs and of the fused loss (given rewards) against autograd in float64."""
    inputs, ranges = random_batch(8, 33, 64, 300, dtype, device, 0.8, ranged)
    rewards = torch.randn(2, 4, device=device)
    inputs[4], inputs[5] = inputs[4] if with_ref else None, group_advantages(rewards).flatten()
    options = dict(reduction=reduction, level=level, temperature=0.8, clip_high=0.3, **ranges)
    exact = [x if x is None or x.dtype == torch.long else x.double() for x in cleaned(inputs)]
    expected = loss_and_gradients(functools.partial(composed_loss, plain_logprobs), *exact, **options)
    select = functools.partial(selected_logprobs, chunk_tokens=chunk)
    composed = loss_and_gradients(functools.partial(composed_loss, select), *inputs, **options)
    inputs[5] = None
    fused = loss_and_gradients(fused_linear_grpo_loss, *inputs, rewards=rewards, chunk_tokens=chunk, **options)
    return largest_error(composed, expected), largest_error(fused, expected)


def check(device: str) -> bool:
    """Both public functions over all their options; prints the largest errors, returns whether they are small."""
    options = ["token", "sequence", "constant"], ["token", "sequence"], [True, False], [True, False], [None, 37]
    print(f"{'largest error':20}{'selected_logprobs':>20}{'fused loss':>14}{'allowed':>12}")
    passed = True
    for dtype, allowed in {torch.float64: 1e-10, torch.float32: 1e-4, torch.bfloat16: 2e-2}.items():
        errors = [errors_of(dtype, device, *option) for option in itertools.product(*options)]
        selected, fused = torch.tensor(errors).amax(0).tolist()
        print(f"{str(dtype).removeprefix('torch.'):20}{selected:20.1e}{fused:14.1e}{allowed:12.0e}")
        passed = passed and selected < allowed and fused < allowed  # a nan is not
    return passed


def time_and_peak(function, device: str, repeats: int = 9) -> tuple[float, float]:
    """Median milliseconds, and the GPU memory in GB on top of what was there before."""
    times, before = [], torch.cuda.memory_allocated() if device == "cuda" else 0
    for i in range(repeats + 2):
        start = time.perf_counter()
        function()
        if device == "cuda":
            torch.cuda.synchronize()
        times.append(1000 * (time.perf_counter() - start))
        if device == "cuda" and i == 1:  # the first two are warm-up
            torch.cuda.reset_peak_memory_stats()
    peak = torch.cuda.max_memory_allocated() - before if device == "cuda" else math.nan
    return statistics.median(times[2:]), peak / 1e9


def benchmark(device: str) -> None:
    """Forward and backward over full masks and all ids: autograd on all logits against the fused loss."""
    sizes = {
        "ours": (512, 64, 384, 1500, torch.float32),
        "middle": (64, 512, 1024, 32000, torch.bfloat16),
        "LLM": (16, 1024, 4096, 128256, torch.bfloat16),
    }
    if device == "cpu":
        sizes = {"ours / 8": (64, *sizes["ours"][1:])}
    paths = {"plain": functools.partial(composed_loss, plain_logprobs), "fused": fused_linear_grpo_loss}
    print(f"\n{'size':10}{'N':>4}{'T':>6}{'C':>6}{'V':>8}  path {'ms':>10}  peak, GB  float32 logits at a time, MB")
    for name, (rows, width, channels, size, dtype) in sizes.items():
        inputs = cleaned(random_batch(rows, width, channels, size, dtype, device)[0])
        inputs[3:] = [torch.zeros_like(x) for x in inputs[3:5]] + [inputs[5], torch.ones_like(inputs[6])]
        for path, function in paths.items():
            try:
                ms, peak = time_and_peak(functools.partial(loss_and_gradients, function, *inputs), device)
            except torch.cuda.OutOfMemoryError:
                ms, peak = math.nan, math.inf
            held = 4 * rows * width * size if path == "plain" else min(CHUNK_BYTES[device], 4 * rows * width * size)
            memory = f"{peak:10.2f}" if device == "cuda" else "       n/a"
            shape = f"{name:10}{rows:4}{width:6}{channels:6}{size:8}"
            print(f"{shape}  {path}{ms:10.1f}{memory}{held / 1e6:12.0f} (computed)")


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
