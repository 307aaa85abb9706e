"""grpo.py: advantages, the per-token objective, the reductions."""

import ast
import doctest
import itertools
import math
import random
import re
from pathlib import Path

import numpy as np
import pytest
import torch
from conftest import example
from hypothesis import given, settings
from hypothesis import strategies as st

import grpo
from data import IMAGE, SPECIAL, TEMPLATES, World, pictures_of
from grpo import combine_rewards, group_advantages, grpo_loss, kl_k3, pairwise_advantages, reduce_tokens, rollout, rollout_loss
from kernels import fused_linear_grpo_loss
from model import ModelConfig, Transformer, completion_mask

F64 = torch.float64
MODES = ["sum_then_normalize", "normalize_then_sum"]
LEVELS, REDUCTIONS = ["token", "sequence"], ["token", "sequence", "constant"]


def random_inputs(seed=0, n=6, t=5, dtype=F64):
    """log-probs, old, ref, advantages and a ragged mask whose last row is empty."""
    g = torch.Generator().manual_seed(seed)
    new, old, ref = (-0.1 - torch.rand(n, t, generator=g, dtype=dtype) for _ in range(3))
    lengths = torch.randint(1, t + 1, (n, 1), generator=g)
    lengths[-1] = 0
    return new, old, ref, torch.randn(n, generator=g, dtype=dtype), torch.arange(t) < lengths


def one_token(ratio, advantage, **options):
    """Loss and its gradient for the log-prob, of a single token with this ratio."""
    new = torch.tensor([[ratio]], dtype=F64).log().requires_grad_()
    loss, metrics = grpo_loss(new, torch.zeros(1, 1, dtype=F64), None, torch.tensor([advantage]), new > -9, **options)
    loss.backward()
    return loss.item(), new.grad.item(), metrics


def loop_loss(new, old, ref, advantages, mask, low, high, kl_coef, reduction, level, max_tokens):
    """The same objective in plain Python, from the equations."""
    sums, lengths = [], []
    for n in range(len(new)):
        steps = [t for t in range(new.shape[1]) if mask[n, t] > 0]
        log_ratio = [(new[n, t] - old[n, t]).item() for t in steps]
        if level == "sequence" and steps:
            log_ratio = [sum(log_ratio) / len(steps)] * len(steps)
        total = 0.0
        for t, x in zip(steps, log_ratio, strict=True):
            ratio, a, d = torch.tensor(x, dtype=F64).exp().item(), advantages[n].item(), (ref[n, t] - new[n, t]).item()
            total += -min(ratio * a, min(max(ratio, 1 - low), 1 + high) * a)
            total += kl_coef * (torch.tensor(d, dtype=F64).exp().item() - d - 1)
        sums.append(total)
        lengths.append(len(steps))
    if reduction == "token":
        return sum(sums) / sum(lengths)
    if reduction == "sequence":
        return sum(s / max(k, 1) for s, k in zip(sums, lengths, strict=True)) / len(sums)
    return sum(sums) / (len(sums) * (max_tokens or new.shape[1]))


# ---------------------------------------------------------------- advantages


def test_std_is_the_sample_std():
    rewards = torch.tensor([[1.0, 1.0, 0.0, 0.0]])
    assert group_advantages(rewards, eps=0.0)[0, 0].item() == pytest.approx(0.5 / (1 / 3) ** 0.5)  # not 1.00


def test_scale_chooses_what_divides():
    rewards = torch.tensor([[0.0, 2.0], [0.0, 20.0]], dtype=F64)
    centred = torch.tensor([[-1.0, 1.0], [-10.0, 10.0]], dtype=F64)
    assert torch.equal(group_advantages(rewards, "none"), centred)
    torch.testing.assert_close(group_advantages(rewards, "batch"), centred / (rewards.std() + 1e-4))
    torch.testing.assert_close(group_advantages(rewards), centred / (rewards.std(1, keepdim=True) + 1e-4))


@pytest.mark.parametrize("value", [0.1, 1e8, -3.7])
def test_equal_rewards_give_advantage_exactly_zero(value):
    rewards = torch.full((2, 7), value)  # the mean of seven times 0.1 is not 0.1 in float32
    for scale in ("group", "batch", "none"):
        assert (group_advantages(rewards, scale) == 0).all()
    assert (pairwise_advantages(rewards) == 0).all()
    for mode in MODES:
        mixed = torch.cat([rewards, torch.arange(7.0)[None]])
        assert (combine_rewards({"a": mixed, "b": mixed}, {"a": 1.0, "b": 0.3}, mode)[:2] == 0).all()


def test_advantages_keep_float64_and_carry_no_gradient():
    rewards = torch.rand(2, 4, dtype=F64, requires_grad=True)
    combined = [combine_rewards({"a": rewards}, {"a": 1.0}, mode) for mode in MODES]
    for result in (group_advantages(rewards), pairwise_advantages(rewards), *combined):
        assert result.dtype == F64 and not result.requires_grad
    assert group_advantages(torch.tensor([[True, False]])).dtype == torch.float32
    assert group_advantages(torch.rand(2, 4).bfloat16()).dtype == torch.float32


def test_pairwise_advantage_is_the_mean_preference_over_the_others():
    rewards = torch.randn(3, 5, dtype=F64, generator=torch.Generator().manual_seed(1))
    got = pairwise_advantages(rewards, temperature=0.7)
    for b, i in itertools.product(range(3), range(5)):
        wins = [torch.sigmoid((rewards[b, i] - rewards[b, j]) / 0.7) for j in range(5) if j != i]
        torch.testing.assert_close(got[b, i], 2 * torch.stack(wins).mean() - 1)
    torch.testing.assert_close(got.sum(1), torch.zeros(3, dtype=F64))


def test_normalize_then_sum_ignores_the_unit_of_a_reward_and_sum_then_normalize_does_not():
    g = torch.Generator().manual_seed(2)
    a, b = torch.rand(3, 4, generator=g, dtype=F64), torch.rand(3, 4, generator=g, dtype=F64)
    weights = {"a": 1.0, "b": 2.0}
    for mode, same in (("normalize_then_sum", True), ("sum_then_normalize", False)):
        result = [combine_rewards({"a": a * unit, "b": b}, weights, mode, eps=1e-12) for unit in (1, 1000)]
        assert torch.allclose(*result) == same
    z = [(x - x.mean(1, keepdim=True)) / (x.std(1, keepdim=True) + 1e-4) for x in (a, b)]
    total = z[0] + 2 * z[1]
    whitened = (total - total.mean()) / (total.std() + 1e-4)
    torch.testing.assert_close(combine_rewards({"a": a, "b": b}, weights, "normalize_then_sum"), whitened)
    torch.testing.assert_close(combine_rewards({"a": a, "b": b}, weights), group_advantages(a + 2 * b))


# ---------------------------------------------------------------- any rewards


groups = st.tuples(st.integers(1, 4), st.integers(2, 6)).flatmap(lambda shape: st.lists(
    st.lists(st.floats(-9, 9, width=32), min_size=shape[1], max_size=shape[1]), min_size=shape[0], max_size=shape[0]))  # fmt: skip
OPINIONS = {"group": group_advantages, "batch": lambda r: group_advantages(r, "batch"), "none": lambda r: group_advantages(r, "none"),
            "pairwise": pairwise_advantages, "one reward": lambda r: combine_rewards({"a": r}, {"a": 1.0}),
            "parts": lambda r: combine_rewards({"a": r, "b": r.flip(1)}, {"a": 1.0, "b": 0.5}, "normalize_then_sum")}  # fmt: skip


@pytest.mark.parametrize("name", OPINIONS)
@settings(max_examples=20)
@given(rewards=groups, seed=st.integers(0, 999))
def test_any_advantages_sum_to_zero_in_their_group_and_depend_on_differences_alone(name, rewards, seed):
    r, g, opinion = torch.tensor(rewards, dtype=F64), torch.Generator().manual_seed(seed), OPINIONS[name]
    a = opinion(r)
    assert a.shape == r.shape and a.isfinite().all() and torch.allclose(a.sum(1), torch.zeros(len(r), dtype=F64), atol=1e-6)
    same = {"atol": 1e-6, "rtol": 1e-6}
    if name in ("group", "none", "pairwise"):  # each group for itself
        assert torch.allclose(opinion(r + torch.randn(len(r), 1, generator=g, dtype=F64)), a, **same)
    assert torch.allclose(opinion(r + 5.0), a, **same)
    order = torch.randperm(len(r), generator=g)
    assert torch.allclose(opinion(r[order]), a[order], **same)
    if name != "parts":  # whose second reward is the first one flipped
        order = torch.randperm(r.shape[1], generator=g)
        assert torch.allclose(opinion(r[:, order]), a[:, order], **same)
        assert ((a[:, :, None] - a[:, None, :]) * (r[:, :, None] - r[:, None, :]) >= -1e-9).all()  # the order of a group is kept


@settings(max_examples=20)
@given(rewards=groups, unit=st.floats(0.5, 20.0), weight=st.floats(0.1, 3.0))
def test_with_normalize_then_sum_neither_the_unit_of_any_reward_nor_that_of_the_weights_matters(rewards, unit, weight):
    r = torch.tensor(rewards, dtype=F64).round() * 2  # spreads are 0 or far above eps
    both, how = {"a": r, "b": r.roll(1, 1)}, "normalize_then_sum"
    a = combine_rewards(both, {"a": 1.0, "b": 2.0}, how, eps=1e-9)
    assert torch.allclose(combine_rewards(both | {"a": unit * r}, {"a": 1.0, "b": 2.0}, how, eps=1e-9), a, atol=1e-4)
    assert torch.allclose(combine_rewards(both, {"a": weight, "b": 2 * weight}, how, eps=1e-9), a, atol=1e-4)


@pytest.mark.parametrize("reduction", REDUCTIONS)
@pytest.mark.parametrize("level", LEVELS)
@settings(max_examples=15)
@given(seed=st.integers(0, 10**6), more=st.integers(1, 4), shift=st.floats(-5, 5))
def test_any_loss_ignores_the_order_of_its_rows_more_padding_and_a_constant_in_the_rewards(reduction, level, seed, more, shift):
    new, old, ref, _, mask = random_inputs(seed)
    rewards, g = torch.randn(3, 2, dtype=F64, generator=torch.Generator().manual_seed(seed)), torch.Generator().manual_seed(seed)
    how = dict(reduction=reduction, level=level, max_tokens=new.shape[1])

    def gradient(rewards, *inputs):
        new = inputs[0].clone().requires_grad_()
        loss, _ = grpo_loss(new, *inputs[1:3], rewards, inputs[3], **how)
        return loss.detach(), torch.autograd.grad(loss, new)[0]

    advantages = group_advantages(rewards).flatten()
    loss, grad = gradient(advantages, new, old, ref, mask)
    order = torch.randperm(len(new), generator=g)
    other, moved = gradient(advantages[order], *(x[order] for x in (new, old, ref, mask)))
    assert torch.allclose(other, loss) and torch.allclose(moved, grad[order])
    junk = torch.full((len(new), more), math.nan, dtype=F64)
    wide = [torch.cat((x, junk), 1) for x in (new, old, ref)] + [torch.cat((mask, torch.zeros(len(new), more)), 1)]
    other, moved = gradient(advantages, *wide)
    assert torch.allclose(other, loss) and torch.allclose(moved[:, : new.shape[1]], grad) and (moved[:, new.shape[1] :] == 0).all()
    other, moved = gradient(group_advantages(rewards + shift).flatten(), new, old, ref, mask)
    assert torch.allclose(other, loss, atol=1e-6) and torch.allclose(moved, grad, atol=1e-6)


# ---------------------------------------------------------------- the objective


def test_equal_rewards_give_zero_policy_gradient():
    new, old, ref, _, mask = random_inputs()
    advantages = group_advantages(torch.full((2, 3), 0.7, dtype=F64)).flatten()
    gradients = []
    for kl_coef in (0.0, 0.02):
        leaf = new.clone().requires_grad_()
        grpo_loss(leaf, old, ref, advantages, mask, kl_coef=kl_coef)[0].backward()
        gradients.append(leaf.grad)
    assert (gradients[0] == 0).all() and (gradients[1][mask] != 0).all()  # the KL still pulls


# clip_low = 0.2, clip_high = 0.4: the loss is -min(ratio A, clip(ratio) A), its gradient for the log-prob -ratio A or 0
CORNERS = [  # ratio, A, loss, gradient
    (1.5, 1.0, -1.4, 0.0),  # better and already much more likely: clipped
    (1.5, -1.0, 1.5, 1.5),  # worse, yet much more likely: the full push back
    (0.5, 1.0, -0.5, -0.5),  # better, yet much less likely: the full pull
    (0.5, -1.0, 0.8, 0.0),  # worse and already much less likely: clipped
    (1.3, 1.0, -1.3, -1.3),  # inside the range, above 1 + clip_low
    (1.0, 2.0, -2.0, -2.0),  # on-policy
]


@pytest.mark.parametrize("ratio, advantage, loss, gradient", CORNERS)
@pytest.mark.parametrize("level", LEVELS)
def test_clip_four_corners(ratio, advantage, loss, gradient, level):
    got = one_token(ratio, advantage, clip_low=0.2, clip_high=0.4, level=level)
    assert got[:2] == pytest.approx((loss, gradient))


def test_clip_high_defaults_to_clip_low():
    assert one_token(1.5, 1.0, clip_low=0.3)[0] == pytest.approx(-1.3)


@pytest.mark.parametrize("reduction", REDUCTIONS)
@pytest.mark.parametrize("level", LEVELS)
@pytest.mark.parametrize("max_tokens", [None, 9])
def test_loss_equals_a_loop_over_tokens(reduction, level, max_tokens):
    inputs = random_inputs(seed=3)
    expected = loop_loss(*inputs, 0.1, 0.25, 0.3, reduction, level, max_tokens)
    options = dict(clip_low=0.1, clip_high=0.25, kl_coef=0.3, reduction=reduction, level=level, max_tokens=max_tokens)
    assert grpo_loss(*inputs, **options)[0].item() == pytest.approx(expected, rel=1e-12)


def test_reductions_by_hand():
    x = torch.tensor([[1.0, 2.0, 3.0], [5.0, 9.0, torch.nan], [9.0, 9.0, torch.inf]])
    mask = torch.tensor([[2, 1, 0.5], [1, -1, 0], [0, 0, 0]])  # any dtype: > 0 is valid, and the empty row counts in N
    expected = {"token": 11 / 4, "sequence": (2 + 5 + 0) / 3, "constant": 11 / 9}
    for reduction, value in expected.items():
        assert reduce_tokens(x, mask, reduction).item() == pytest.approx(value)
    assert reduce_tokens(x, mask, "constant", max_tokens=10).item() == pytest.approx(11 / 30)


@pytest.mark.parametrize("level", LEVELS)
def test_gradcheck(level):
    new, old, ref, advantages, mask = random_inputs(seed=4, n=4, t=3)
    for reduction in REDUCTIONS:
        def loss(x, reduction=reduction):
            return grpo_loss(x, old, ref, advantages, mask, reduction=reduction, level=level, kl_coef=0.1)[0]
        assert torch.autograd.gradcheck(loss, new.clone().requires_grad_())


def test_only_the_new_logprobs_get_a_gradient():
    new, old, ref, advantages, mask = random_inputs()
    leaves = [x.clone().requires_grad_() for x in (new, old, ref, advantages)]
    grpo_loss(*leaves, mask)[0].backward()
    assert leaves[0].grad.abs().sum() > 0 and all(x.grad is None for x in leaves[1:])


def test_k3_on_policy_gradient_is_that_of_the_reverse_kl():
    """Expectation over a categorical of three, worked out exactly: what k3 descends is KL(ref||policy)."""
    theta = torch.tensor([0.3, -0.5, 1.0], dtype=F64, requires_grad=True)
    p, log_q = theta.softmax(0), torch.tensor([0.2, 0.5, 0.3], dtype=F64).log()

    def gradient(value):
        return torch.autograd.grad(value, theta, retain_graph=True)[0]

    k3 = kl_k3(p.log(), log_q)
    sampled = gradient((p.detach() * k3).sum())  # tokens are drawn, not differentiated
    torch.testing.assert_close((p * k3).sum(), (p * (p.log() - log_q)).sum())  # unbiased as an estimate
    torch.testing.assert_close(sampled, gradient((log_q.exp() * (log_q - p.log())).sum()))
    assert (sampled - gradient((p * (p.log() - log_q)).sum())).abs().max() > 0.01


def test_k3_is_never_negative_and_keeps_its_precision_near_zero():
    new = torch.tensor([-1.0, -1.0, -1.0])
    ref = new + torch.tensor([0.0, 1e-3, -1e-3])
    exact = torch.expm1((ref - new).double()) - (ref - new).double()
    torch.testing.assert_close(kl_k3(new, ref), exact.float(), rtol=1e-3, atol=0)  # exp(d) - d - 1 would be 10% off
    assert (kl_k3(new, ref) >= 0).all()


def test_sequence_level_has_one_ratio_per_sequence():
    new = torch.tensor([[0.3, 0.1, 7.0]], dtype=F64, requires_grad=True)
    mask = torch.tensor([[1, 1, 0]])
    old, options = torch.zeros(1, 3, dtype=F64), dict(level="sequence", clip_low=0.5)
    loss, metrics = grpo_loss(new, old, None, torch.tensor([1.0]), mask, **options)
    assert loss.item() == pytest.approx(-torch.tensor(0.2, dtype=F64).exp().item())
    assert metrics["ratio"].item() == pytest.approx(-loss.item())
    loss.backward()
    assert new.grad[0, 0] == new.grad[0, 1] != 0 and new.grad[0, 2] == 0
    per_token = kl_k3(new.detach(), old)[0, :2].mean()  # the KL stays per token
    assert grpo_loss(new, old, old, torch.tensor([1.0]), mask, **options)[1]["kl"] == per_token


@pytest.mark.parametrize("level, reduction", [*itertools.product(LEVELS, REDUCTIONS)])
@pytest.mark.parametrize("junk", [float("nan"), float("inf"), -float("inf"), 1e30])
def test_invalid_positions_holding_nan_move_nothing(level, reduction, junk):
    for seed in range(3):
        clean = random_inputs(seed)
        mask = clean[-1]
        dirty = [torch.where(mask, x, junk) for x in clean[:3]] + [torch.where(mask.any(1), clean[3], junk), mask]
        results = []
        for new, *rest in (clean, dirty):
            leaf = new.clone().requires_grad_()
            loss, metrics = grpo_loss(leaf, *rest, level=level, reduction=reduction)
            loss.backward()
            results.append([loss, leaf.grad, *(metrics[name] for name in sorted(metrics))])
        for a, b in zip(*results, strict=True):
            assert torch.equal(a, b) and a.isfinite().all()
        assert (results[1][1][~mask] == 0).all()


@pytest.mark.parametrize("reduction", REDUCTIONS)
def test_a_batch_without_valid_tokens_gives_a_finite_zero(reduction):
    new = torch.full((3, 4), float("nan"), requires_grad=True)
    loss, metrics = grpo_loss(new, new, new, torch.full((3,), float("nan")), torch.zeros(3, 4), reduction=reduction)
    loss.backward()
    assert loss == 0 and all(value == 0 for value in metrics.values()) and (new.grad == 0).all()


def test_first_step_after_sampling_has_ratio_one_and_loss_zero_but_a_gradient():
    new = random_inputs()[0][:4].requires_grad_()
    advantages = group_advantages(torch.tensor([[1.0, 0.0, 0.0, 0.0]], dtype=F64)).flatten()
    loss, metrics = grpo_loss(new, new, new, advantages, torch.ones(4, 5))
    loss.backward()
    assert metrics["ratio"] == 1 and metrics["kl"] == 0 and abs(loss.item()) < 1e-12
    torch.testing.assert_close(new.grad, -advantages[:, None].expand(4, 5) / 20)  # REINFORCE with a baseline


def test_metrics_are_masked_token_means():
    ratio = torch.tensor([[0.5, 1.0, 1.5], [1.3, 9.0, 9.0]], dtype=F64)
    mask = torch.tensor([[1, 1, 1], [1, 0, 0]])
    old, ref = torch.zeros(2, 3, dtype=F64), torch.ones(2, 3, dtype=F64)
    new, rest = ratio.log().requires_grad_(), (torch.ones(2), mask)
    options = dict(clip_low=0.2, clip_high=0.4, kl_coef=0)
    assert set(grpo_loss(new, old, None, *rest, **options)[1]) == {"ratio", "clip_low", "clip_high"}
    metrics = grpo_loss(new, old, ref, *rest, **options)[1]
    kl = (kl_k3(new, ref) * mask).sum().item() / 4
    expected = {"ratio": 4.3 / 4, "clip_low": 0.25, "clip_high": 0.25, "kl": kl}
    assert {name: value.item() for name, value in metrics.items()} == pytest.approx(expected)
    assert all(value.ndim == 0 and not value.requires_grad for value in metrics.values())


def test_float64_is_kept_and_low_precision_is_computed_in_float32():
    for dtype, expected in ((F64, F64), (torch.float32, torch.float32), (torch.bfloat16, torch.float32)):
        *inputs, mask = random_inputs(dtype=F64)
        loss, metrics = grpo_loss(*(x.to(dtype) for x in inputs), mask)
        assert {loss.dtype, *(value.dtype for value in metrics.values())} == {expected}


# ---------------------------------------------------------------- errors, documentation

GOOD = (torch.zeros(2, 3), torch.zeros(2, 3), None, torch.zeros(2), torch.ones(2, 3))
WRONG = {  # call -> what its message must name
    "scale": (lambda: group_advantages(torch.zeros(2, 2), "std"), ["'std'", "'group'", "'batch'", "'none'"]),
    "one candidate": (lambda: group_advantages(torch.zeros(4, 1)), ["(4, 1)", "G >= 2"]),
    "one candidate, pairs": (lambda: pairwise_advantages(torch.zeros(4, 1)), ["(4, 1)", "G >= 2"]),
    "flat rewards": (lambda: group_advantages(torch.zeros(4)), ["(4,)", "(B, G)"]),
    "nan reward": (lambda: group_advantages(torch.tensor([[0.0, float("nan")]])), ["1 of 2", "not finite"]),
    "infinite": (lambda: combine_rewards({"a": torch.tensor([[0.0, float("inf")]])}, {"a": 1.0}), ["'a'", "1 of 2"]),
    "temperature": (lambda: pairwise_advantages(torch.zeros(2, 2), 0.0), ["temperature=0.0", "> 0"]),
    "mode": (lambda: combine_rewards({"a": torch.zeros(2, 2)}, {"a": 1.0}, "sum"), ["'sum'", "'normalize_then_sum'"]),
    "names": (lambda: combine_rewards({"a": torch.zeros(2, 2)}, {"b": 1.0}), ["['a']", "['b']"]),
    "reward shapes": (
        lambda: combine_rewards({"a": torch.zeros(2, 2), "b": torch.zeros(2, 3)}, {"a": 1.0, "b": 1.0}),
        ["'b'", "(2, 2)", "(2, 3)"],
    ),
    "reduction": (lambda: grpo_loss(*GOOD, reduction="mean"), ["'mean'", "'token'", "'sequence'", "'constant'"]),
    "level": (lambda: grpo_loss(*GOOD, level="word"), ["'word'", "'token'", "'sequence'"]),
    "max_tokens": (lambda: grpo_loss(*GOOD, reduction="constant", max_tokens=0), ["max_tokens=0"]),
    "mask shape": (lambda: grpo_loss(*GOOD[:4], torch.ones(2, 4)), ["mask", "(2, 3)", "(2, 4)"]),
    "advantages shape": (lambda: grpo_loss(*GOOD[:3], torch.zeros(2, 3), GOOD[4]), ["advantages", "(2, 3)", "(2,)"]),
}


@pytest.mark.parametrize("name", WRONG)
def test_a_wrong_argument_is_named_with_what_is_legal(name):
    call, words = WRONG[name]
    with pytest.raises(ValueError) as error:
        call()
    assert all(word in str(error.value) for word in words), str(error.value)


@pytest.mark.parametrize("name", ["grpo", "kernels"])
def test_every_equation_has_a_line_and_every_tag_an_equation(name):
    source = (Path(grpo.__file__).parent / f"{name}.py").read_text()
    equations = re.findall(r"^\(([GK]\d+)\) ", ast.get_docstring(ast.parse(source)), re.M)
    lines = re.findall(r"\S.*  # \(([GK]\d+)\)$", source, re.M)
    assert len(equations) >= 6 and sorted(set(equations)) == sorted(equations)
    assert set(equations) == set(lines)


def test_doctests():
    failed, attempted = doctest.testmod(grpo)
    assert failed == 0 and attempted >= 12


# ---------------------------------------------------------------- controls


def test_controls_learn_from_the_best_and_the_worst_and_skip_groups_without_spread():
    rewards = torch.tensor([[0.1, 0.9, 0.5], [1.0, 1.0, 1.0], [3.0, 2.0, 1.0]])
    best, worst = grpo.best_and_worst(rewards)
    assert best.tolist() == [1, 6] and worst.tolist() == [0, 8]


def test_rejection_learns_the_mean_token_of_the_best_only():
    new, _, ref, _, mask = random_inputs(n=6)
    new.requires_grad_()
    loss = grpo.rejection_loss(new, ref, torch.tensor([[0.0, 2.0, 1.0], [5.0, 0.0, 1.0]]), mask)
    expected = -(new[1][mask[1]].sum() + new[3][mask[3]].sum()) / (mask[1].sum() + mask[3].sum())
    torch.testing.assert_close(loss, expected)
    loss.backward()
    assert (new.grad[[0, 2, 4, 5]] == 0).all() and (new.grad[1][mask[1]] < 0).all()


def test_dpo_is_the_formula_raises_the_best_lowers_the_worst_and_ignores_what_is_invalid():
    new, _, ref, _, mask = random_inputs(n=6)
    new, ref = new.masked_fill(~mask, torch.nan).requires_grad_(), ref.masked_fill(~mask, torch.inf)
    loss = grpo.dpo_loss(new, ref, torch.tensor([[0.0, 2.0, 1.0], [5.0, 0.0, 1.0]]), mask, beta=0.3)
    gain = [(new[n] - ref[n])[mask[n]].sum().item() for n in range(6)]
    expected = [math.log1p(math.exp(-0.3 * (gain[b] - gain[w]))) for b, w in ((1, 0), (3, 4))]
    assert float(loss.detach()) == pytest.approx(sum(expected) / 2)
    loss.backward()
    assert (new.grad[1][mask[1]] < 0).all() and (new.grad[0][mask[0]] > 0).all() and (new.grad[[2, 5]] == 0).all()
    assert new.grad.isfinite().all()


@pytest.mark.parametrize("loss", [grpo.rejection_loss, grpo.dpo_loss])
def test_controls_are_zero_and_move_nothing_when_no_group_has_a_spread(loss):
    new = torch.zeros(4, 3, requires_grad=True)
    value = loss(new, torch.zeros(4, 3), torch.ones(2, 2), torch.ones(4, 3))
    value.backward()
    assert float(value.detach()) == 0 and (new.grad == 0).all()


# ---------------------------------------------------------------- rollouts: what is sampled is what is scored


def lively_model(vocab, codebook, seed):
    torch.manual_seed(seed)
    model = Transformer(ModelConfig(vocab.size, codebook.side, 32, 2, 4)).double()
    for p in model.parameters():
        torch.nn.init.normal_(p, std=0.3) if p.dim() == 2 else torch.nn.init.uniform_(p, 0.5, 1.5)
    return model


@pytest.fixture
def rolled(vocab, codebook):
    """Three prompts of a task, four candidates each: policy, reference and the rollout."""

    def make(task, temperature=0.8):
        policy, reference = lively_model(vocab, codebook, 0), lively_model(vocab, codebook, 1)
        rng = random.Random(0)
        examples = [example(rng, task) for _ in range(3)]
        batch = vocab.batch(examples, codebook.encode(pictures_of(examples)))
        seen = {}

        def reward(repeated, tokens):
            seen.update(batch=repeated, tokens=tokens)
            return torch.arange(12.0).view(3, 4), {"half": torch.full((3, 4), 0.5)}

        r = rollout(policy, batch, 4, reward, vocab, torch.Generator().manual_seed(0), temperature, task)
        return policy, reference, r, seen["batch"], seen["tokens"]

    return make


def test_a_rollout_keeps_the_prompts_whose_rewards_are_widest_apart(vocab, codebook):
    policy, world, G = lively_model(vocab, codebook, 0), World(), 4
    examples = [world.example(random.Random(i), "ask") for i in range(5)]
    batch = vocab.batch(examples, codebook.encode(np.stack([e.picture for e in examples])))
    spread = torch.tensor([0.0, 3.0, 1.0, 0.0, 2.0])
    given = spread[:, None] * torch.tensor([0.0, 1.0, 0.5, 0.0])

    def reward(repeated, tokens):
        return given, {"exact": 2 * given}

    def sampled(**how):
        return rollout(policy, batch, G, reward, vocab, torch.Generator().manual_seed(0), task="ask", **how)

    everything, r = sampled(), sampled(keep=2)
    rows = [4, 5, 6, 7, 16, 17, 18, 19]  # the groups of prompts 1 and 4, in their order
    assert torch.equal(r.rewards, given[[1, 4]]) and torch.equal(r.parts["exact"], 2 * given[[1, 4]])
    assert torch.equal(r.batch.tokens, batch.tokens[[1, 4]]) and torch.equal(r.tail, everything.tail[rows][:, : r.tail.shape[1]])
    assert r.stats["zero_spread_ask"] == pytest.approx(0.4) and r.stats["tokens"] == everything.stats["tokens"]  # of all five
    assert len(everything.rewards) == len(sampled(keep=9).rewards) == 5


def plain_logprobs(model, batch, tokens, temperature):
    """Log-probs of all ids at every position, (N, L-1, V), from whole sequences: the oracle."""
    logits = model(tokens[:, :-1], batch.patch[:, :-1]) @ model.head.T / temperature
    ids = torch.arange(len(model.head))
    return logits.masked_fill((ids < batch.lo[:, 1:, None]) | (ids >= batch.hi[:, 1:, None]), -1e9).log_softmax(-1)


@pytest.mark.parametrize("task", TEMPLATES)
def test_a_rollout_keeps_the_log_probs_it_was_sampled_with_and_those_of_the_base(rolled, task):
    policy, reference, r, batch, tokens = rolled(task)
    _, metrics = rollout_loss(policy, reference, r, fused_linear_grpo_loss, temperature=0.8)
    batch = batch.pack(tokens)
    tokens = batch.target
    chosen = completion_mask(batch, tokens)[:, 1:]
    assert (r.tail[r.mask] == tokens[:, 1:][chosen]).all() and r.mask.sum() == chosen.sum()
    every, ref = (plain_logprobs(m, batch, tokens, 0.8) for m in (policy, reference))
    for kept, logprobs in ((r.old_logprobs, every), (r.ref_logprobs, ref)):
        expected = logprobs.gather(-1, tokens[:, 1:, None])[..., 0][chosen]
        torch.testing.assert_close(kept[r.mask], expected, check_dtype=False)
    kl = (every.exp() * (every - ref)).sum(-1)[chosen].mean()
    assert r.stats[f"kl_{task}"] == pytest.approx(kl.item()) and r.stats[f"{task}_half"] == 0.5
    assert r.stats[f"reward_{task}"] == 5.5 and r.stats["tokens"] == int(chosen.sum())
    assert metrics["ratio"] == pytest.approx(1) and metrics["clip_low"] == metrics["clip_high"] == 0


@pytest.mark.parametrize("task", ["draw", "reason"])
def test_the_first_loss_is_zero_its_gradient_is_not_and_a_second_pass_sees_the_move(rolled, task):
    policy, reference, r, *_ = rolled(task)
    loss, _ = rollout_loss(policy, reference, r, fused_linear_grpo_loss, temperature=0.8, kl_coef=0.0, reduction="sequence")
    loss.backward()
    assert abs(loss.item()) < 1e-6 and all(p.grad.abs().max() > 1e-5 for p in policy.parameters())
    old = r.old_logprobs.clone()
    with torch.no_grad():
        for p in policy.parameters():
            p -= 1e-2 * p.grad
    moved, metrics = rollout_loss(policy, reference, r, fused_linear_grpo_loss, temperature=0.8, kl_coef=0.0, reduction="sequence")
    assert torch.equal(r.old_logprobs, old) and metrics["ratio"] != 1 and moved < -1e-5


def test_groups_without_spread_are_counted(rolled):
    *_, r, _, _ = rolled("ask")
    assert r.stats["zero_spread_ask"] == 0 and r.rewards.shape == (3, 4)


# ---------------------------------------------------------------- objectives of the baselines


@pytest.fixture
def some_codes(codebook):
    rng, world = random.Random(0), World()
    return codebook.encode(np.stack([world.example(rng, "draw").picture for _ in range(3)]))


def test_the_contrastive_loss_is_infonce_of_mean_states_read_alone_with_equal_captions_as_positives(vocab, codebook, some_codes):
    model, texts = lively_model(vocab, codebook, 0), ["a red circle", "a blue square", "a red circle"]
    loss = grpo.contrastive_loss(model, vocab, some_codes, texts, None)
    image, text = [], []
    for codes, words in zip(some_codes, texts):
        ids = [1, SPECIAL.index("<caption>"), IMAGE, *(codes + vocab.n_text).tolist()]
        patch = torch.tensor([[-1] * 3 + list(range(16))])
        image.append(torch.nn.functional.normalize(model(torch.tensor([ids]), patch)[0, 3:].float().mean(0), dim=0))
        ids = [1, SPECIAL.index("<draw>"), *vocab.encode(words)]
        text.append(torch.nn.functional.normalize(model(torch.tensor([ids]), torch.full((1, len(ids)), -1))[0, 2:].float().mean(0), dim=0))
    s = 10 * torch.stack(image) @ torch.stack(text).T
    right = torch.tensor([[1, 0, 1], [0, 1, 0], [1, 0, 1]]).bool()
    expected = sum(-torch.log((s.exp() * right).sum(d) / s.exp().sum(d)).mean() / 2 for d in (0, 1))
    assert loss.item() == pytest.approx(expected.item(), rel=1e-4)


def test_the_masked_loss_sees_both_sides_of_a_hidden_code_and_never_the_code_itself(vocab, codebook, some_codes):
    """A wrong code elsewhere, before or after, changes the prediction; what is hidden has gradient from its answer only."""
    model, one = lively_model(vocab, codebook, 0), some_codes[:1]

    def loss(codes, share=0.05):
        return grpo.masked_code_loss(model, vocab, codes, [], random.Random(3), share).item()

    hidden = torch.rand((1, 19), generator=torch.Generator().manual_seed(random.Random(3).getrandbits(60)))[0, 3:] < 0.05
    assert hidden.sum() == 1  # the seed hides one code
    at, before = int(hidden.nonzero()), loss(one)
    for place in (0, 15):
        other = one.clone()
        other[0, place] = (other[0, place] + 7) % len(codebook.entries)
        assert (loss(other) != before) or place == at
    every = torch.stack([torch.where(hidden, k, one[0]) for k in range(len(codebook.entries))])
    likelihoods = [math.exp(-loss(codes[None])) for codes in every]
    assert sum(likelihoods) == pytest.approx(1, abs=1e-4)  # the same distribution whichever code was there: it was not seen
