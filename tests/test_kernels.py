"""kernels.py: log-probs and loss, chunk by chunk, equal autograd on all logits."""

import functools
import itertools
import shutil

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode

import kernels
from grpo import group_advantages
from kernels import fused_linear_grpo_loss, loss_and_gradients, selected_logprobs

F64, NAN = torch.float64, torch.nan
TOLERANCE = {F64: 1e-12, torch.float32: 2e-5, torch.bfloat16: 2e-2, torch.float16: 2e-3}
EVERY = itertools.product(("token", "sequence"), ("token", "sequence", "constant"))
OPTIONS = [dict(level=level, reduction=reduction) for level, reduction in EVERY]
plain_loss = functools.partial(kernels.composed_loss, kernels.plain_logprobs)  # by autograd


def batch(seed=1, rows=6, width=7, channels=5, size=23, dtype=F64, junk=0):
    """The loss's arguments, with junk where the mask is 0: the last row; with seed 0, all rows."""
    torch.manual_seed(seed)
    hidden, weight = torch.randn(rows, width, channels), torch.randn(size, channels) / channels**0.5
    hidden, weight, tokens = hidden.to(dtype), weight.to(dtype), torch.randint(size, (rows, width))
    log_ratios = 0.1 * torch.randint(-5, 5, (2, rows, width)) + 0.05  # no ratio at a clip edge
    old, ref = selected_logprobs(hidden, weight, tokens) + log_ratios
    lengths, advantages = torch.randint(1, width + 1, (rows, 1)), torch.randn(rows).double()
    lengths[-1 if seed else 0 :] = 0
    mask = torch.arange(width) < lengths
    hidden[~mask] = old[~mask] = ref[~mask] = advantages[~mask.any(1)] = junk
    tokens[~mask] = -7 if junk else 0
    return [hidden, weight, tokens, old, ref, advantages, mask.float()]


def composed_loss(*inputs, chunk_tokens=None, **options):
    select = functools.partial(selected_logprobs, chunk_tokens=chunk_tokens)
    return kernels.composed_loss(select, *inputs, **options)


def assert_close(got, expected, dtype=F64):
    """The loss absolutely, its gradients relative to their largest entry."""
    for a, b, size in zip(got, expected, (1.0, expected[1].abs().max(), expected[2].abs().max())):
        assert (a.double() - b).abs().max() <= TOLERANCE[dtype] * size


@pytest.mark.parametrize("function", [fused_linear_grpo_loss, composed_loss])
@pytest.mark.parametrize("dtype", TOLERANCE, ids=str)
def test_loss_and_gradients_equal_autograd_on_all_logits_whatever_the_mask_hides(function, dtype):
    more = dict(clip_high=0.35, kl_coef=0.1, temperature=1.3, max_tokens=11)
    cases = itertools.product(((None, NAN), (1, torch.inf), (10, 6e4)), (True, False), OPTIONS)
    for seed, ((chunk, junk), with_ref, options) in enumerate(cases):
        inputs, given = batch(seed, 8, 9, 32, 90, dtype), batch(seed, 8, 9, 32, 90, dtype, junk)
        inputs[4], given[4] = (inputs[4].double(), given[4]) if with_ref else (None, None)
        inputs[:2] = inputs[0].double(), inputs[1].double()
        expected = loss_and_gradients(plain_loss, *inputs, **options, **more)
        got = loss_and_gradients(function, *given, chunk_tokens=chunk, **options, **more)
        assert_close(got, expected, dtype)
        assert got[0].dtype == torch.promote_types(dtype, torch.float32)
        assert got[1].dtype == got[2].dtype == dtype and not got[1][inputs[6] == 0].any()


def test_autocast_multiplies_in_bf16_and_returns_float32_gradients():
    h, w, *rest = batch(1, 8, 12, 32, 90, torch.float32)
    expected = loss_and_gradients(fused_linear_grpo_loss, h.bfloat16(), w.bfloat16(), *rest)
    with torch.autocast("cpu", torch.bfloat16):
        got = loss_and_gradients(fused_linear_grpo_loss, h, w, *rest)
    assert {x.dtype for x in got} == {torch.float32} and got[0] == expected[0]
    assert_close(got, expected, torch.bfloat16)


def test_an_id_outside_the_head_has_logprob_minus_infinity_and_disturbs_no_other():
    hidden, weight, tokens, *_ = batch()
    expected = selected_logprobs(hidden, weight, tokens)
    tokens[0, 0], tokens[1, 1] = -1, 23
    got = selected_logprobs(hidden, weight.requires_grad_(), tokens)
    assert got[0, 0] == got[1, 1] == -torch.inf and (got == expected).sum() == 6 * 7 - 2
    assert torch.autograd.grad(got.sum(), weight)[0].isfinite().all()


@pytest.mark.parametrize("scale", ["group", "batch", "none"])
def test_rewards_given_equal_their_advantages_given(scale):
    inputs, rewards = batch(), torch.randn(2, 3, dtype=F64)  # row n answers prompt n // G
    inputs[5] = group_advantages(rewards, scale).flatten()
    expected = loss_and_gradients(fused_linear_grpo_loss, *inputs)
    inputs[5] = None
    got = loss_and_gradients(fused_linear_grpo_loss, *inputs, rewards=rewards, scale=scale)
    assert all(torch.equal(a, b) for a, b in zip(got, expected))


def test_metrics_are_those_of_grpo_loss_and_only_hidden_and_weight_get_a_gradient():
    inputs = [x.requires_grad_(x.is_floating_point()) for x in batch()]
    loss, metrics = fused_linear_grpo_loss(*inputs, chunk_tokens=2)
    torch.testing.assert_close(metrics, composed_loss(*inputs)[1])
    once = torch.autograd.grad(loss, inputs[:2], retain_graph=True)
    (3 * loss).backward()
    assert [x.grad is not None for x in inputs] == [True, True] + 5 * [False]
    torch.testing.assert_close([inputs[0].grad, inputs[1].grad], [3 * x for x in once])


class LargestResult(TorchDispatchMode):
    entries = 0  # of the largest tensor that any operation returned

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        result = function(*args, **(kwargs or {}))
        self.entries = max(self.entries, result.numel() if torch.is_tensor(result) else 0)
        return result


@pytest.mark.parametrize("level", ["token", "sequence"])
@pytest.mark.parametrize("function", [fused_linear_grpo_loss, composed_loss])
def test_no_tensor_of_all_logits_is_ever_made(function, level):
    inputs = batch(1, 20, 10, 2, 50)  # 200 tokens
    with LargestResult() as largest:
        loss_and_gradients(function, *inputs, level=level, chunk_tokens=9)
    assert largest.entries == 9 * 50


@pytest.mark.slow  # 20 s of compiling
@pytest.mark.skipif(not shutil.which("g++"), reason="needs g++: on a CPU, torch.compile makes C++")
def test_the_compiled_functions_equal_the_plain_ones_without_a_graph_break(monkeypatch):
    compile = functools.cache(lambda function, device: torch.compile(function, dynamic=True))
    monkeypatch.setattr(kernels, "maybe_compile", compile)
    torch._dynamo.utils.counters.clear()
    inputs, given, rewards = batch(), batch(junk=NAN), torch.randn(2, 3, dtype=F64)
    inputs[5], given[5] = group_advantages(rewards).flatten(), None
    got = loss_and_gradients(fused_linear_grpo_loss, *given, rewards=rewards, chunk_tokens=4)
    assert_close(got, loss_and_gradients(plain_loss, *inputs))
    counters = torch._dynamo.utils.counters
    assert counters["stats"]["unique_graphs"] >= 2 and not counters["graph_break"]


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA GPU: bf16 products, Triton")
def test_the_check_passes_on_cuda():
    kernels.main(["--device", "cuda"])


@pytest.mark.parametrize("factor", [1.01, NAN])
def test_the_check_passes_and_exits_with_1_if_a_gradient_is_wrong_or_nan(monkeypatch, factor):
    def wrong(*arguments, exact=kernels.softmax_kernel):
        return exact(*arguments)[0], factor * exact(*arguments)[1]
    kernels.main([])
    monkeypatch.setattr(kernels, "softmax_kernel", wrong)
    with pytest.raises(SystemExit, match="1"):
        kernels.main([])


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU here")
def test_without_a_gpu_the_command_says_so_in_one_line_and_exits_with_2(capsys):
    with pytest.raises(SystemExit, match="2"):
        kernels.main(["--device", "cuda"])
    assert capsys.readouterr().err.count("\n") == 1


@pytest.mark.parametrize("message, wrong", [
    ("expected .23, 5.", dict(weight=torch.zeros(23, 4))), ("=0: expected", dict(temperature=0)),
    ("expected .6, 7.", dict(tokens=torch.zeros(6, 4))), ("or rewards", dict(advantages=None)),
    ("not in .0, 23.", dict(tokens=torch.full((6, 7), 23))), ("'sequence'", dict(level="word")),
    ("expected .6,.", dict(advantages=None, rewards=torch.zeros(2, 4))),
    ("'group'", dict(advantages=None, rewards=torch.zeros(2, 3), scale="row")),
    ("expected either", dict(rewards=torch.zeros(2, 3))),
])
def test_wrong_arguments_are_named(message, wrong):
    names = "hidden weight tokens old_logprobs ref_logprobs advantages mask".split()
    with pytest.raises(ValueError, match=message):
        fused_linear_grpo_loss(**dict(zip(names, batch())) | wrong)
