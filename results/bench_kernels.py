"""Time and peak memory of several ways from hidden states to the GRPO loss and its gradients.

Forward and backward pass over full masks, medians of fifteen, in turns, because a machine's speed
drifts. All ways must agree on the loss, which is in the last column.

  three products    hidden @ W^T, D @ W and D^T @ hidden: what every way needs (the roofline)
  plain             all logits at once, and autograd
  plain, compiled   the same under torch.compile
  ours              fused_linear_grpo_loss
  Liger, chunked    LigerFusedLinearGRPOLoss, if it is installed: pip install liger-kernel
  Liger, Triton     its Triton kernel, which takes all logits; on CUDA

    $ python results/bench_kernels.py --device cpu    # or cuda; 1 minute, a third of it compiling
"""

import argparse
import functools
import importlib
import math
import shutil
import statistics
import sys
import time
from importlib.util import find_spec
from pathlib import Path

import torch
from torch import Tensor

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))
kernels = importlib.import_module("kernels")

SIZES = {  # N sequences, T tokens, C width, V ids, dtype of hidden states and head
    "cpu": {"ours / 8": (64, 64, 384, 1500, torch.float32)},
    "cuda": {
        "ours": (512, 64, 384, 1500, torch.float32),
        "middle": (64, 512, 1024, 32000, torch.bfloat16),
        "LLM": (16, 1024, 4096, 128256, torch.bfloat16),
    },
}
REPEATS = 15


def make_inputs(rows, width, channels, size, dtype, device) -> list[Tensor]:
    """The arguments of fused_linear_grpo_loss up to mask."""
    hidden = torch.randn(rows, width, channels, device=device).to(dtype)
    weight = (torch.randn(size, channels, device=device) / channels**0.5).to(dtype)
    tokens = torch.randint(size, (rows, width), device=device)
    old = kernels.selected_logprobs(hidden, weight, tokens)
    ref = old + 0.1 * torch.randn_like(old)
    advantages, mask = torch.randn(rows, device=device), torch.ones(rows, width, device=device)
    return [hidden, weight, tokens, old, ref, advantages, mask]


def three_products(hidden: Tensor, weight: Tensor, *_) -> Tensor:
    hidden = hidden.flatten(0, 1)
    logits = hidden @ weight.T
    return (logits @ weight).sum() + (logits.T @ hidden).sum()


def liger_chunked(width: int):
    module = importlib.import_module("liger_kernel.chunked_loss")
    options = dict(beta=0.02, loss_type="dapo", max_completion_length=width)
    loss = module.LigerFusedLinearGRPOLoss(**options)

    def run(hidden, weight, tokens, old, ref, advantages, mask):
        given = dict(ref_per_token_logps=ref, old_per_token_logps=old)
        return loss(hidden, weight, tokens, mask, advantages, **given)

    return run


def liger_triton(hidden, weight, tokens, old, ref, advantages, mask):
    module = importlib.import_module("liger_kernel.transformers.grpo_loss")
    logits = torch.nn.functional.pad(hidden, (0, 0, 0, 1)) @ weight.T  # it drops the last position
    options = dict(temperature=1.0, beta=0.02, eps_high=0.2, reduce=True)
    return module.triton_grpo_loss(logits, old, ref, tokens, advantages, mask, **options)


def losses(device: str, width: int) -> dict:
    """{name: function of fused_linear_grpo_loss's arguments that returns the loss and more}."""
    plain = functools.partial(kernels.composed_loss, kernels.plain_logprobs)
    found = {"plain": plain}
    if device == "cuda" or shutil.which("g++"):
        found["plain, compiled"] = torch.compile(plain)
    found["ours"] = kernels.fused_linear_grpo_loss
    if find_spec("liger_kernel"):
        found["Liger, chunked"] = liger_chunked(width)
        if device == "cuda":
            found["Liger, Triton"] = liger_triton
    return found


def measured(function, device: str) -> tuple[float, float]:
    """Milliseconds of one call, and on CUDA the GB that it needed on top of what was in use."""
    if device == "cpu":
        start = time.perf_counter()
        function()
        return 1000 * (time.perf_counter() - start), math.nan
    before = torch.cuda.memory_allocated()
    start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
    torch.cuda.reset_peak_memory_stats()
    start.record()
    function()
    end.record()
    end.synchronize()
    return start.elapsed_time(end), (torch.cuda.max_memory_allocated() - before) / 1e9


def compare(functions: dict, device: str, repeats: int = REPEATS) -> dict[str, tuple[float, float]]:
    """{name: median milliseconds, GB of the last call}; NaN and infinity if out of memory."""
    times, peaks = {name: [] for name in functions}, dict.fromkeys(functions, math.nan)
    for _ in range(repeats + 2):  # the first two warm up
        for name, function in functions.items():
            if peaks[name] == math.inf:
                continue
            try:
                milliseconds, peaks[name] = measured(function, device)
                times[name].append(milliseconds)
            except torch.cuda.OutOfMemoryError:
                times[name], peaks[name] = [math.nan], math.inf
                torch.cuda.empty_cache()
    medians = {name: statistics.median(spent[2:] or spent) for name, spent in times.items()}
    return {name: (medians[name], peaks[name]) for name in functions}


def table(device: str, sizes: dict, repeats: int = REPEATS) -> None:
    """Print one line per way and size."""
    for name, (*shape, dtype) in sizes.items():
        dimensions = ", ".join(f"{k}={n:,}" for k, n in zip("NTCV", shape))
        print(f"\n{name}: {dimensions}, {dtype}")
        print(f"{'':16}{'ms':>9}{'peak, GB':>10}{'of roofline':>13}{'loss':>12}")
        torch.compiler.reset()
        inputs = make_inputs(*shape, dtype, device)
        runs = {"three products": functools.partial(three_products, *inputs)}
        for way, loss in losses(device, shape[1]).items():
            runs[way] = functools.partial(kernels.loss_and_gradients, loss, *inputs)
        found = compare(runs, device, repeats)
        for way, (milliseconds, peak) in found.items():
            share = found["three products"][0] / milliseconds
            fits = way != "three products" and math.isfinite(milliseconds)
            loss = f"{runs[way]()[0]:12.6f}" if fits else ""
            memory = "-" if math.isnan(peak) else f"{peak:.2f}"  # not measured on a CPU
            print(f"{way:16}{milliseconds:9.1f}{memory:>10}{share:13.0%}{loss}", flush=True)


def main(arguments=None) -> None:
    parser = argparse.ArgumentParser(description="Time and memory of the ways to the GRPO loss.")
    parser.add_argument("--device", choices=["cpu", "cuda"], default="cpu")
    device = parser.parse_args(arguments).device
    if device == "cuda" and not torch.cuda.is_available():
        parser.exit(2, "bench_kernels.py: PyTorch sees no GPU; use --device cpu\n")
    torch.manual_seed(0)
    print(f"torch {torch.__version__}, {device}, {torch.get_num_threads()} threads")
    table(device, SIZES[device])


if __name__ == "__main__":
    main()
