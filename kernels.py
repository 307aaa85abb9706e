"""The GRPO loss from hidden states, without ever holding the logits of a whole batch.

The logits are by far the largest tensor of a language model, yet the loss needs only one log-prob
of each token's V logits. So we compute logits, loss and gradients for one chunk of tokens, and
drop the chunk before the next one. Masked tokens never reach the loss or a gradient.

For a chunk of m tokens with hidden states H (m,C), output matrix W (V,C) and chosen ids y (m,):
(K1) Z = H W^T                                        logits (m,V), the only large tensor
(K2) logprob = log_softmax(Z / temperature)[y]        (m,)
(K3) D = (onehot(y) - softmax(Z / temperature)) / temperature      dlogprob/dZ (m,V)
(K4) g = dL/dlogprob                                  (m,), L is grpo_loss of grpo.py
(K5) dL/dH = g D W                                    (m,C)
(K6) dL/dW = sum over chunks of D^T (g H)             (V,C)

Symbols: N sequences, T tokens, M = N*T, m tokens per chunk, C width, V ids that may be chosen.
W is the slice of the head that may be chosen, `head[first:last]`, and ids count from its first row.

As in Liger Kernel (arXiv:2410.10989), the forward pass computes the gradients: g of a token needs
no other token, so its logits are computed once. With level="sequence" g needs the whole sequence,
and if there is more than one chunk, a first pass computes all log-probs. At the size of an LLM
(N=16, T=1024, C=4096, V=128256), autograd keeps three float32 numbers for each logit, 25 GB; both
gradients and one chunk need about 6. Left out: Triton; on CUDA, torch.compile makes the kernels.

    $ python kernels.py --device cpu      # largest errors against float64 autograd; 5 seconds
"""

import argparse
import functools
import itertools
import os
import shutil
import sysconfig
from importlib.util import find_spec

import torch
from torch.autograd.function import once_differentiable

from grpo import check_choice, check_shape, checked_rewards, grpo_loss, scaled_advantages
from model import add_matmul, at_least_float32, matmul


@functools.cache
def maybe_compile(function, device: torch.device):
    """The function, compiled on CUDA if Triton, a C compiler and Python's headers are there."""
    compiler = any(map(shutil.which, (os.environ.get("CC", "cc"), "gcc", "clang")))
    headers = os.path.exists(os.path.join(sysconfig.get_path("include"), "Python.h"))
    possible = device.type == "cuda" and find_spec("triton") and compiler and headers
    return torch.compile(function, dynamic=True) if possible else function


def softmax_kernel(temperature, dtype, logits, tokens):
    """Logits (m,V), chosen tokens (m,) -> log-probs (m,), and D (m,V) in `dtype`.

    >>> logits, tokens = torch.tensor([[1.0, 3.0]]).log(), torch.tensor([1])  # softmax: 1/4, 3/4
    >>> softmax_kernel(1.0, torch.float32, logits, tokens)[1]
    tensor([[-0.2500,  0.2500]])
    """
    all_logprobs = (logits / temperature).log_softmax(1)
    logprobs = all_logprobs.gather(1, tokens[:, None])  # (K2)
    chosen = logprobs.expm1() / -temperature  # exact even where the softmax is close to 1
    others = all_logprobs.exp_().div_(-temperature)
    return logprobs[:, 0], others.to(dtype).scatter_(1, tokens[:, None], chosen.to(dtype))  # (K3)


def advantages_and_loss(logprobs, old, ref, advantages, rewards, mask, scale, **objective):
    """grpo_loss with advantages (N,), or with those of rewards (B,G), as one compiled function."""
    if rewards is not None:
        advantages = scaled_advantages(rewards, scale).flatten()
    return grpo_loss(logprobs, old, ref, advantages, mask, **objective)


def prepare(hidden, weight, tokens, temperature, chunk_tokens):
    """Check inputs -> H (M,C), W (V,C), kernel(logits, tokens) for (K2, K3), tokens per chunk."""
    check_shape("tokens", tokens, hidden.shape[:2], "the (N, T) of hidden (N, T, C)")
    check_shape("weight", weight, (len(weight), hidden.shape[-1]), "(V, C) with hidden's C")
    if not temperature > 0:
        raise ValueError(f"temperature={temperature}: expected a number > 0")
    device, wide = hidden.device.type, torch.promote_types(hidden.dtype, weight.dtype)
    autocast = torch.is_autocast_enabled(device) and torch.get_autocast_dtype(device)
    half = torch.bfloat16 if torch.bfloat16 in (hidden.dtype, autocast) else torch.float32
    dtype = wide if wide == torch.float64 else half  # never float16, where gradients underflow
    kernel = functools.partial(maybe_compile(softmax_kernel, hidden.device), temperature, dtype)
    room = 2**30 if hidden.is_cuda else 2**23  # bytes of logits; on a CPU they fit its caches
    size = chunk_tokens or max(1, room // (4 * len(weight)))
    return hidden.detach().flatten(0, 1).to(dtype), weight.detach().to(dtype), kernel, size


@torch.no_grad()
def chunked_gradients(hidden, weight, tokens, kernel, chunks, logprobs, g_of):
    """dL/dH (M,C) and dL/dW (V,C), at least float32, and the last result of g_of.

    chunks: indices of the valid rows. g_of(log-probs (M,) so far) -> g (M,) for a chunk, result.
    """
    dhidden, dweight = (at_least_float32(torch.zeros_like(x)) for x in (hidden, weight))
    for rows in chunks:
        h = hidden[rows]
        logprobs[rows], derivative = kernel(matmul(h, weight.T), tokens[rows])  # (K1)
        g, result = g_of(logprobs)
        g = g[rows, None]
        dhidden[rows] = matmul(derivative, weight) * g  # (K5)
        add_matmul(dweight, derivative.T, (h * g).to(h.dtype))  # (K6)
    return (dhidden, dweight), result


class WithGradients(torch.autograd.Function):
    """Return `value`; the backward pass is gradients_of(dL/dvalue) -> dL/dhidden, dL/dweight."""

    @staticmethod
    def forward(ctx, hidden, weight, value, gradients_of):
        ctx.gradients_of = gradients_of
        return value

    @staticmethod
    @once_differentiable
    def backward(ctx, g):
        return *ctx.gradients_of(g), None, None  # autograd rounds once, for bf16 inputs


def selected_logprobs(hidden, weight, tokens, temperature=1.0, *, chunk_tokens=None):
    """Log-prob (N,T) of each token, at least float32. Gradients for hidden (N,T,C), weight (V,C).

    hidden[n,t] is the state that predicts tokens[n,t], an id in [0, V); any other id gets -inf.
    A position whose log-prob gets no gradient may contain anything, even NaN: it affects no other.
    The backward pass recomputes the logits, chunk_tokens at a time (None: 1 GB, or 8 MB on a CPU).
    Raises ValueError for shapes that do not fit and temperature <= 0. Source: (K1) to (K6).

    >>> hidden, weight = torch.tensor([[[0.0], [1.0]]]), torch.tensor([[1.0], [3.0]]).log()
    >>> selected_logprobs(hidden, weight, torch.tensor([[1, 1]])).exp()  # odds 1:1, then 1:3
    tensor([[0.5000, 0.7500]])
    """
    h, w, kernel, size = prepare(hidden, weight, tokens, temperature, chunk_tokens)
    legal = (tokens >= 0) & (tokens < len(weight))
    ids = torch.where(legal, tokens, 0).long().flatten()
    with torch.no_grad():
        chunks = zip(h.split(size), ids.split(size))
        logprobs = torch.cat([kernel(matmul(x, w.T), y)[0] for x, y in chunks])

    def gradients_of(g):
        used = g.nonzero().squeeze(1).split(size)  # what the caller masked may be NaN
        return chunked_gradients(h, w, ids, kernel, used, g.clone(), lambda _: (g, None))[0]

    logprobs = WithGradients.apply(hidden.flatten(0, 1), weight, logprobs, gradients_of)
    return torch.where(legal, logprobs.view(tokens.shape), -torch.inf)


def fused_linear_grpo_loss(
    hidden, weight, tokens, old_logprobs, ref_logprobs, advantages, mask, *, rewards=None,
    scale="group", level="token", temperature=1.0, chunk_tokens=None, **objective,
):
    """Loss and metrics of grpo_loss(selected_logprobs(...), ...) in one pass.

    Pass advantages (N,), or None and rewards (B,G), N = B*G, for group_advantages(rewards, scale).
    objective: clip_low, clip_high, kl_coef, reduction and max_tokens, as in grpo_loss.
    Only hidden (N,T,C) and weight (V,C) get gradients. Masked positions may contain anything.
    Raises ValueError as those functions do, for both or neither of advantages and rewards, and for
    a valid token outside [0, V). Source: (K1) to (K6).

    >>> hidden, weight, tokens = torch.zeros(2, 1, 3), torch.zeros(4, 3), torch.tensor([[1], [2]])
    >>> old = torch.full((2, 1), 0.2).log()  # now 1/4, so the ratio is 1.25
    >>> advantages, mask = torch.tensor([1.0, -1.0]), torch.ones(2, 1)
    >>> loss, _ = fused_linear_grpo_loss(hidden, weight, tokens, old, None, advantages, mask)
    >>> round(loss.item(), 4)  # (-1.2 + 1.25) / 2: clipped to 1.2 only where A = 1
    0.025
    """
    h, w, kernel, size = prepare(hidden, weight, tokens, temperature, chunk_tokens)
    check_shape("mask", mask, tokens.shape, "the (N, T) of tokens")
    if (advantages is None) == (rewards is None):
        raise ValueError("expected either advantages (N,) or rewards (B, G), the other one None")
    check_choice("scale", scale, ("group", "batch", "none"))
    rewards = None if rewards is None else checked_rewards(rewards)
    ids = tokens.flatten().long()
    valid = (mask > 0).flatten().nonzero().squeeze(1)
    if not ((ids[valid] >= 0) & (ids[valid] < len(weight))).all():
        raise ValueError(f"tokens: an id at a valid position is not in [0, {len(weight)})")
    inputs = (old_logprobs, ref_logprobs, advantages, rewards, mask, scale)

    @torch.enable_grad()
    def g_of(logprobs):
        loss_of = maybe_compile(advantages_and_loss, mask.device)
        leaf = logprobs.detach().requires_grad_()
        loss, metrics = loss_of(leaf.view(mask.shape), *inputs, level=level, **objective)
        return torch.autograd.grad(loss, leaf)[0], (loss.detach(), metrics)  # (K4)

    chunks, logprobs = valid.split(size), at_least_float32(h.new_zeros(len(h)))
    if level == "sequence" and len(chunks) > 1:
        logprobs = selected_logprobs(hidden, weight, tokens, temperature, chunk_tokens=size)
    both, (loss, metrics) = chunked_gradients(h, w, ids, kernel, chunks, logprobs.flatten(), g_of)
    flat = hidden.flatten(0, 1)
    return WithGradients.apply(flat, weight, loss, lambda g: [x * g for x in both]), metrics


# ---------------------------------------------------------------- python kernels.py: is it right?


def plain_logprobs(hidden, weight, tokens, temperature=1.0):
    """What this file replaces: all logits at once, and autograd."""
    logits = at_least_float32(hidden @ weight.T) / temperature
    return logits.log_softmax(-1).gather(2, tokens[..., None]).squeeze(2)


def composed_loss(select, hidden, weight, tokens, *rest, temperature=1.0, **options):
    """grpo_loss of the log-probs that `select` computes: what the fused loss must equal."""
    return grpo_loss(select(hidden, weight, tokens, temperature), *rest, **options)


def loss_and_gradients(function, hidden, weight, *rest, **options):
    hidden, weight = hidden.detach().requires_grad_(), weight.detach().requires_grad_()
    loss, _ = function(hidden, weight, *rest, **options)
    return loss.detach(), *torch.autograd.grad(loss, (hidden, weight))


def errors(dtype, device, reduction, level, with_ref, chunk):
    """Yield the largest error of selected_logprobs, then of the fused loss, against autograd in
    float64: absolute for the loss, relative to the largest entry for both gradients."""
    random = functools.partial(torch.randn, device=device)
    hidden, weight = random(8, 33, 64).to(dtype), random(300, 64).to(dtype)
    rewards, mask = random(2, 4).double(), random(8, 33) > 0
    tokens = torch.randint(300, (8, 33), device=device)
    old, ref = selected_logprobs(hidden, weight, tokens, 8.0) + 0.2 * random(2, 8, 33)
    ref, advantages = ref if with_ref else None, scaled_advantages(rewards, "group").flatten()
    options = dict(reduction=reduction, level=level, clip_high=0.3, temperature=8.0)
    plain, rest = functools.partial(composed_loss, plain_logprobs), (tokens, old, ref, advantages)
    exact = loss_and_gradients(plain, hidden.double(), weight.double(), *rest, mask, **options)
    hidden[~mask], tokens[~mask] = torch.nan, -7  # masked positions must not matter
    select = functools.partial(selected_logprobs, chunk_tokens=chunk)
    fused = functools.partial(fused_linear_grpo_loss, rewards=rewards, chunk_tokens=chunk)
    sizes = (1.0, exact[1].abs().max(), exact[2].abs().max())
    for function, a in ((functools.partial(composed_loss, select), advantages), (fused, None)):
        got = loss_and_gradients(function, hidden, weight, tokens, old, ref, a, mask, **options)
        parts = [(x - y).abs().max() / size for x, y, size in zip(got, exact, sizes)]
        yield torch.stack(parts).max().item()  # NaN if one is


def main(arguments=None) -> None:
    """Print the largest errors over all options; exit with 1 if one is too large."""
    parser = argparse.ArgumentParser(description=main.__doc__)
    parser.add_argument("--device", choices=["cpu", "cuda"], default="cpu")
    device = parser.parse_args(arguments).device
    if device == "cuda" and not torch.cuda.is_available():
        parser.exit(2, "kernels.py: --device cuda, but PyTorch sees no GPU; use --device cpu\n")
    torch.manual_seed(0)
    reductions, levels = ("token", "sequence", "constant"), ("token", "sequence")
    every = list(itertools.product(reductions, levels, (True, False), (None, 37)))
    modes = {"eager": every, "compiled": every[::11]} if device == "cuda" else {"eager": every}
    for dtype, limit in ((torch.float64, 1e-10), (torch.float32, 1e-4), (torch.bfloat16, 2e-2)):
        for mode, cases in modes.items():
            with torch.compiler.set_stance("force_eager" if mode == "eager" else "default"):
                worst = torch.tensor([list(errors(dtype, device, *case)) for case in cases]).amax(0)
            print(f"{dtype}, {mode}: selected_logprobs {worst[0]:.0e}, fused loss {worst[1]:.0e}")
            if not (worst < limit).all():  # NaN fails as well
                parser.exit(1, f"kernels.py: expected errors below {limit}\n")


if __name__ == "__main__":
    main()
