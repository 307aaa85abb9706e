"""kernels.py: the chunked log-probs and the fused loss equal autograd on all logits."""

import doctest
import functools
import itertools
import shutil

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode

import kernels
from grpo import group_advantages
from kernels import (
    cleaned,
    composed_loss,
    fused_linear_grpo_loss,
    largest_error,
    loss_and_gradients,
    plain_logprobs,
    random_batch,
    selected_logprobs,
)

F64 = torch.float64
PLAIN = functools.partial(composed_loss, plain_logprobs)
OPTIONS = [dict(zip(("level", "reduction"), pair, strict=True))
           for pair in itertools.product(["token", "sequence"], ["token", "sequence", "constant"])]


def batch(seed=0, rows=6, width=7, channels=5, size=23, dtype=F64, device="cpu"):
    torch.manual_seed(seed)
    return random_batch(rows, width, channels, size, dtype, device)


def test_logprobs_equal_a_softmax_written_out():
    (hidden, weight, tokens, *_, mask), ranges = batch()
    got = selected_logprobs(hidden, weight, tokens, 0.7, **ranges)
    for n, t in mask.nonzero().tolist():
        lo, hi = ranges["lo"][n, t], ranges["hi"][n, t]
        odds = torch.exp(weight[lo:hi] @ hidden[n, t] / 0.7)
        torch.testing.assert_close(got[n, t], torch.log(odds[tokens[n, t] - lo] / odds.sum()))


def test_lo_and_hi_restrict_what_counts():
    hidden, weight = torch.randn(1, 3, 4, dtype=F64), torch.randn(9, 4, dtype=F64)
    tokens, lo, hi = torch.tensor([[2, 5, 8]]), torch.tensor([[2, 4, 0]]), torch.tensor([[3, 6, 8]])
    logprobs = selected_logprobs(hidden, weight, tokens, lo=lo, hi=hi)[0]
    assert logprobs[0] == 0 and logprobs[2] == -torch.inf  # the only legal id; an id outside its range
    leaf = weight.clone().requires_grad_()
    selected_logprobs(hidden, leaf, tokens, lo=lo, hi=hi)[0, 1].backward()
    assert leaf.grad.abs().sum(1).nonzero().flatten().tolist() == [4, 5]
    weight[[0, 1, 6, 7]] = torch.nan  # rows of the matrix that no position may choose
    again = selected_logprobs(hidden[:, :2], weight, tokens[:, :2], lo=lo[:, :2], hi=hi[:, :2])[0]
    assert torch.equal(again, logprobs[:2])


@pytest.mark.parametrize("options", OPTIONS, ids=str)
@pytest.mark.parametrize("with_ref", [True, False])
@pytest.mark.parametrize("ranged", [True, False])
def test_fused_loss_and_gradients_equal_the_plain_path(options, with_ref, ranged):
    inputs, ranges = batch(seed=1)
    inputs[4] = inputs[4] if with_ref else None
    options = options | (ranges if ranged else {}) | dict(clip_high=0.35, kl_coef=0.1, temperature=1.3, max_tokens=11)
    expected = loss_and_gradients(PLAIN, *cleaned(inputs), **options)
    for chunk in (None, 1, 4):  # the tokens of the random batch hold nan: the fused path gets them, the plain one not
        fused = loss_and_gradients(fused_linear_grpo_loss, *inputs, chunk_tokens=chunk, **options)
        assert largest_error(fused, expected) < 1e-12
        select = functools.partial(selected_logprobs, chunk_tokens=chunk)
        composed = loss_and_gradients(functools.partial(composed_loss, select), *inputs, **options)
        assert largest_error(composed, expected) < 1e-12


@pytest.mark.parametrize("dtype, tolerance", [(torch.float32, 2e-5), (torch.bfloat16, 2e-2), (torch.float16, 2e-3)])
def test_low_precision_stays_within_its_tolerance(dtype, tolerance):
    for seed, options in enumerate(OPTIONS):
        inputs, ranges = batch(seed, rows=8, width=12, channels=32, size=90, dtype=dtype)
        exact = [x.double() if x.is_floating_point() else x for x in cleaned(inputs)]
        expected = loss_and_gradients(PLAIN, *exact, **options, **ranges)
        got = loss_and_gradients(fused_linear_grpo_loss, *inputs, chunk_tokens=10, **options, **ranges)
        assert largest_error(got, expected) < tolerance
        assert got[0].dtype == torch.float32 and got[1].dtype == got[2].dtype == dtype


def test_autocast_multiplies_in_bf16_and_returns_gradients_in_the_dtype_of_the_parameters():
    inputs, ranges = batch(rows=8, width=12, channels=32, size=90, dtype=torch.float32)
    with torch.autocast("cpu", torch.bfloat16):
        got = loss_and_gradients(fused_linear_grpo_loss, *inputs, **ranges)
    assert {x.dtype for x in got} == {torch.float32}
    rounded = [x.bfloat16() if i < 2 else x for i, x in enumerate(inputs)]
    expected = loss_and_gradients(fused_linear_grpo_loss, *rounded, **ranges)
    assert got[0] == expected[0] and largest_error(got, [x.double() for x in expected]) < 1e-2


def test_weight_gradients_of_many_bf16_chunks_are_summed_in_float32():
    """Summed in bf16, the later of 500 equal contributions would round away."""
    hidden, weight = torch.ones(1, 500, 1).bfloat16(), torch.zeros(2, 1).bfloat16()
    tokens, old = torch.zeros(1, 500).long(), torch.full((1, 500), 0.5).log()
    inputs = (hidden, weight, tokens, old, None, torch.ones(1), torch.ones(1, 500))
    _, _, gradient = loss_and_gradients(fused_linear_grpo_loss, *inputs, chunk_tokens=1)
    assert gradient.flatten().tolist() == [-0.5, 0.5]


def test_gradcheck():
    inputs, ranges = batch(seed=2, rows=3, width=3, channels=3, size=6)
    hidden, weight, *rest = cleaned(inputs)
    leaves = hidden.requires_grad_(), weight.requires_grad_()
    for options in OPTIONS:
        def loss(h, w, options=options):
            return fused_linear_grpo_loss(h, w, *rest, **options, **ranges, kl_coef=0.1, chunk_tokens=2)[0]
        assert torch.autograd.gradcheck(loss, leaves)


def test_rewards_form_equals_advantages_form():
    for scale in ("group", "batch", "none"):
        inputs, ranges = batch(seed=3)
        rewards = torch.randn(2, 3, dtype=F64)
        inputs[5] = group_advantages(rewards, scale).flatten()  # row n answers prompt n // G
        expected = loss_and_gradients(fused_linear_grpo_loss, *inputs, **ranges)
        inputs[5] = None
        got = loss_and_gradients(fused_linear_grpo_loss, *inputs, rewards=rewards, scale=scale, **ranges)
        assert all(torch.equal(a, b) for a, b in zip(got, expected, strict=True))


@pytest.mark.parametrize("options", OPTIONS, ids=str)
@pytest.mark.parametrize("chunk", [None, 3])
def test_invalid_positions_holding_nan_move_nothing(options, chunk):
    for seed in range(3):
        inputs, ranges = batch(seed)
        hidden, weight, tokens, old, ref, advantages, mask = cleaned(inputs)
        valid = mask > 0
        dirty = [torch.where(valid, x, junk) for x, junk in ((tokens, 10**6), (old, torch.nan), (ref, -torch.inf))]
        dirty_ranges = {"lo": torch.where(valid, ranges["lo"], 99), "hi": torch.where(valid, ranges["hi"], -5)}
        advantages = torch.where(valid.any(1), advantages, torch.nan)
        expected = loss_and_gradients(PLAIN, hidden, weight, tokens, old, ref, advantages, mask, **options, **ranges)
        for junk in (torch.nan, torch.inf, -torch.inf):
            spoilt = torch.where(valid[..., None], hidden, junk)
            arguments = (spoilt, weight, *dirty, advantages, mask)
            got = loss_and_gradients(fused_linear_grpo_loss, *arguments, **options, **dirty_ranges, chunk_tokens=chunk)
            assert largest_error(got, expected) < 1e-12 and (got[1][~valid] == 0).all()
            select = functools.partial(selected_logprobs, chunk_tokens=chunk)
            got = loss_and_gradients(functools.partial(composed_loss, select), *arguments, **options, **dirty_ranges)
            assert largest_error(got, expected) < 1e-12 and (got[1][~valid] == 0).all()


def test_a_batch_without_valid_tokens_gives_a_finite_zero():
    inputs, ranges = batch()
    inputs[6] = torch.zeros_like(inputs[6])
    for options in OPTIONS:
        loss, dhidden, dweight = loss_and_gradients(fused_linear_grpo_loss, *inputs, **options, **ranges)
        assert loss == 0 and (dhidden == 0).all() and (dweight == 0).all()


def test_metrics_equal_those_of_grpo_loss_whatever_the_chunk():
    inputs, ranges = batch(seed=4)
    for options, chunk in itertools.product(OPTIONS, (None, 2)):
        expected = PLAIN(*cleaned(inputs), **options, **ranges)[1]
        leaf = inputs[0].clone().requires_grad_()
        for hidden in (leaf, inputs[0]):  # with a gradient, and without
            loss, got = fused_linear_grpo_loss(hidden, *inputs[1:], chunk_tokens=chunk, **options, **ranges)
            assert loss.requires_grad == hidden.requires_grad and set(got) == {"ratio", "clip_low", "clip_high", "kl"}
            for name, value in got.items():
                assert value.ndim == 0 and not value.requires_grad
                torch.testing.assert_close(value, expected[name])


def test_backward_scales_with_the_loss():
    inputs, ranges = batch(seed=5)
    once = loss_and_gradients(fused_linear_grpo_loss, *inputs, **ranges)
    def thrice(*arguments, **options):
        loss, metrics = fused_linear_grpo_loss(*arguments, **options)
        return 3 * loss, metrics
    for a, b in zip(loss_and_gradients(thrice, *inputs, **ranges), once, strict=True):
        torch.testing.assert_close(a, 3 * b)


def test_only_hidden_and_weight_get_a_gradient():
    inputs, ranges = batch()
    leaves = [x.clone().requires_grad_() if x.is_floating_point() and i < 6 else x for i, x in enumerate(inputs)]
    fused_linear_grpo_loss(*leaves, **ranges)[0].backward()
    assert [x.grad is not None for x in leaves] == [True, True, False, False, False, False, False]


def test_first_step_after_sampling_has_ratio_one_and_loss_zero_but_a_gradient():
    hidden, weight, tokens = torch.randn(4, 3, 5), torch.randn(11, 5), torch.randint(11, (4, 3))
    old = selected_logprobs(hidden, weight, tokens)
    leaf, rewards = hidden.clone().requires_grad_(), torch.tensor([[1.0, 0.0, 0.0, 0.0]])
    loss, metrics = fused_linear_grpo_loss(leaf, weight, tokens, old, old, None, torch.ones(4, 3), rewards=rewards)
    loss.backward()
    assert metrics["ratio"] == 1 and metrics["kl"] == 0 and abs(loss.item()) < 1e-6 and leaf.grad.abs().max() > 1e-3


class LargestResult(TorchDispatchMode):
    """Notes the largest number of entries of any tensor that an operation returns."""

    entries = 0

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        result = function(*args, **(kwargs or {}))
        self.entries = max(self.entries, result.numel() if isinstance(result, torch.Tensor) else 0)
        return result


def test_no_tensor_of_all_logits_is_made():
    inputs = cleaned(batch(rows=20, width=10, channels=2, size=50)[0])
    select = functools.partial(selected_logprobs, chunk_tokens=9)
    fused = functools.partial(fused_linear_grpo_loss, chunk_tokens=9)
    expected = {PLAIN: 20 * 10 * 50, fused: 9 * 50, functools.partial(composed_loss, select): 9 * 50}
    for function, entries in expected.items():
        with LargestResult() as largest:
            loss_and_gradients(function, *inputs)
        assert largest.entries == entries
    ranges = {"lo": torch.full((20, 10), 30), "hi": torch.full((20, 10), 33)}
    inputs[2] = torch.randint(30, 33, (20, 10))
    with LargestResult() as largest:  # 20 x 10 x 2 hidden states are more than 9 x 3 logits
        loss_and_gradients(fused, *inputs, **ranges)
    assert largest.entries == 400


@pytest.mark.skipif(not shutil.which("g++"), reason="needs a C++ compiler: torch.compile makes C++ of what it makes GPU kernels of on CUDA")
def test_the_compiled_path_equals_the_plain_one():
    torch._dynamo.reset()
    torch._dynamo.utils.counters.clear()
    for seed, (name, ranged, chunk) in enumerate([("token", True, 4), ("sequence", False, None)]):
        inputs, ranges = batch(seed)
        options = dict(level=name, reduction=name, temperature=1.3) | (ranges if ranged else {})
        rewards = torch.randn(2, 3, dtype=F64)
        inputs[5] = group_advantages(rewards).flatten()
        expected = loss_and_gradients(PLAIN, *cleaned(inputs), **options)
        inputs[5] = None
        compiled = dict(rewards=rewards, chunk_tokens=chunk, compile=True)
        assert largest_error(loss_and_gradients(fused_linear_grpo_loss, *inputs, **compiled, **options), expected) < 1e-12
    graphs = torch._dynamo.utils.counters["stats"]["unique_graphs"]
    assert graphs >= 3 and not torch._dynamo.utils.counters["graph_break"]  # advantages, objective and reduction are one graph


def test_the_benchmark_times_every_path_that_is_there_on_the_same_loss(capsys, monkeypatch):
    monkeypatch.setattr(shutil, "which", lambda name: None)  # without the compiled one, which takes half a minute
    torch.manual_seed(0)
    kernels.benchmark("cpu", {"tiny": (4, 5, 6, 17, torch.float32)})
    head, *rows = capsys.readouterr().out.strip().split("\n")
    assert [row.split()[5] for row in rows][:3] == ["three", "plain", "ours"] and "of roofline" in head
    losses = {row.split()[-1] for row in rows[1:]}  # Liger's too, where it is installed
    assert len(losses) == 1 and float(losses.pop()) != 0


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA GPU: bf16 products with float32 results")
def test_cuda_passes_its_own_check(capsys):
    assert kernels.check("cuda")


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA GPU: peak memory is measured there")
def test_cuda_peak_memory_is_below_that_of_the_plain_path():
    inputs = cleaned(batch(rows=64, width=256, channels=64, size=60_000, dtype=torch.bfloat16, device="cuda")[0])
    run = {name: functools.partial(loss_and_gradients, f, *inputs) for name, f in (("plain", PLAIN), ("fused", fused_linear_grpo_loss))}
    found = kernels.compare(run, "cuda", 1)
    assert found["fused"][1] < found["plain"][1] / 2


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU here")
def test_command_line_without_a_gpu_says_so_and_exits_with_2(capsys):
    assert kernels.main(["--device", "cuda"]) == 2
    error = capsys.readouterr().err
    assert error.count("\n") == 1 and "--device cpu" in error


def test_wrong_arguments_are_named():
    inputs, ranges = batch()
    hidden, weight, tokens, old, ref, advantages, mask = cleaned(inputs)
    rest, one_too_wide = (old, ref, advantages, mask), torch.zeros(2, 4)
    fused = fused_linear_grpo_loss
    wrong = [
        (lambda: selected_logprobs(hidden, weight[:, :4], tokens), ["(6, 7, 5)", "(23, 4)", "(N, T, C)"]),
        (lambda: selected_logprobs(hidden, weight, tokens[:, :4]), ["tokens", "(6, 4)", "(6, 7)"]),
        (lambda: selected_logprobs(hidden, weight, tokens, temperature=0), ["temperature=0"]),
        (lambda: fused(hidden, weight, tokens, *rest, rewards=torch.zeros(2, 3)), ["either", "rewards"]),
        (lambda: fused(hidden, weight, tokens, old, ref, None, mask), ["either", "rewards"]),
        (lambda: fused(hidden, weight, tokens, old, ref, None, mask, rewards=one_too_wide), ["(2, 4)", "6"]),
        (lambda: fused(hidden, weight, tokens, *rest[:3], mask[:, :2]), ["mask", "(6, 2)", "(6, 7)"]),
        (lambda: fused(hidden, weight, tokens, *rest, level="word"), ["'word'", "'sequence'"]),
        (lambda: fused(hidden, weight, tokens + 99, *rest), ["valid ids", "[lo, hi)"]),
    ]
    for call, words in wrong:
        with pytest.raises(ValueError) as error:
            call()
        assert all(word in str(error.value) for word in words), str(error.value)


def test_the_check_sees_a_gradient_that_is_wrong_or_nan(monkeypatch):
    assert max(kernels.errors_of(F64, "cpu", "token", "token", True, True, None)) < 1e-10
    exact = kernels.softmax_minus_onehot
    for factor in (1.01, torch.nan):
        wrong = lambda *a, factor=factor: (factor * exact(*a)[0], exact(*a)[1])
        monkeypatch.setattr(kernels, "softmax_minus_onehot", wrong)
        assert not any(error < 1e-3 for error in kernels.errors_of(F64, "cpu", "token", "token", True, True, None))


def test_doctests():
    failed, attempted = doctest.testmod(kernels)
    assert failed == 0 and attempted >= 6
