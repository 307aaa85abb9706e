"""grpo.py: advantages, the clip, the KL, the reductions, the controls and the baselines."""

import functools
import math
import random

import pytest
import torch
from conftest import TOLERANCE, WORLD, lively, rows_of

import grpo
from data import PAD, pictures_of
from grpo import combine_rewards, group_advantages, grpo_loss, kl_k3, pairwise_advantages
from model import completion, sample

F64, MODES = torch.float64, ("sum_then_normalize", "normalize_then_sum")
DTYPES = F64, torch.float32, torch.bfloat16, torch.float16
LEVELS, REDUCTIONS = ("token", "sequence"), ("token", "sequence", "constant")


def random_inputs(seed=0, n=6, t=5):
    """log-probs, old, ref, advantages and a ragged mask whose last row is empty; float64."""
    g = torch.Generator().manual_seed(seed)
    new, old, ref = -0.1 - torch.rand(3, n, t, generator=g, dtype=F64)
    lengths = torch.randint(1, t + 1, (n, 1), generator=g)
    lengths[-1] = 0
    return new, old, ref, torch.randn(n, generator=g, dtype=F64), torch.arange(t) < lengths


def loss_and_gradient(new, *inputs, **options):
    new = new.clone().requires_grad_()
    loss, metrics = grpo_loss(new, *inputs, **options)
    return loss.detach(), torch.autograd.grad(loss, new)[0], metrics


def close(a, b):
    torch.testing.assert_close(a, b, rtol=TOLERANCE[a.dtype], atol=TOLERANCE[a.dtype])


# ---------------------------------------------------------------- advantages


def test_the_std_is_the_sample_std_and_scale_chooses_whose():
    rewards = torch.tensor([[0.0, 2.0], [0.0, 20.0]], dtype=F64)
    centred = torch.tensor([[-1.0, 1.0], [-10.0, 10.0]], dtype=F64)
    close(group_advantages(rewards, "none"), centred)
    close(group_advantages(rewards, "batch"), centred / (rewards.std() + 1e-4))
    close(group_advantages(rewards, eps=0.5), centred / (rewards.std(1, keepdim=True) + 0.5))


@pytest.mark.parametrize("value", [0.1, 1e8, -3.7])
def test_equal_rewards_give_advantage_exactly_zero(value):
    rewards = torch.stack([torch.full((7,), value), torch.arange(7.0)])  # sum(7 * [0.1]) != 0.7
    results = [group_advantages(rewards, scale) for scale in ("group", "batch", "none")]
    results += [combine_rewards({"a": rewards, "b": rewards}, {"a": 1, "b": 0.3}, m) for m in MODES]
    for result in (*results, pairwise_advantages(rewards)):
        assert (result[0] == 0).all() and (result[1] != 0).any()


def test_a_pairwise_advantage_is_the_mean_bradley_terry_preference_over_the_others():
    rewards, *_ = random_inputs(n=3)
    preferred = ((rewards[:, :, None] - rewards[:, None]) / 0.7).sigmoid()
    others = preferred.sum(2) - 0.5  # without the preference to itself
    close(pairwise_advantages(rewards, temperature=0.7), 2 * others / 4 - 1)


def test_rewards_are_combined_by_weight_and_only_normalize_then_sum_ignores_their_unit():
    a, b, *_ = random_inputs()
    total = group_advantages(a) + 2 * group_advantages(b)
    whitened = (total - total.mean()) / (total.std() + 1e-4)
    for mode, expected in zip(MODES, (group_advantages(a + 2 * b), whitened)):
        close(combine_rewards({"a": a, "b": b}, {"a": 1.0, "b": 2.0}, mode), expected)
        minutes = combine_rewards({"a": 60 * a, "b": b}, {"a": 1.0, "b": 2.0}, mode)
        assert torch.allclose(minutes, expected, atol=1e-2) == (mode == "normalize_then_sum")


# ---------------------------------------------------------------- the objective and the KL

CORNERS = [  # ratio, A, loss, gradient for the log-prob; clip_low 0.2, clip_high 0.4
    (1.5, 1.0, -1.4, 0.0),  # better and already much more likely: clipped
    (1.5, -1.0, 1.5, 1.5),  # worse, yet much more likely: the full push back
    (0.5, 1.0, -0.5, -0.5),  # better, yet much less likely: the full pull
    (0.5, -1.0, 0.8, 0.0),  # worse and already much less likely: clipped
    (1.3, 1.0, -1.3, -1.3),  # inside the range, above 1 + clip_low
]


@pytest.mark.parametrize("ratio, advantage, loss, gradient", CORNERS)
@pytest.mark.parametrize("level", LEVELS)
def test_the_four_corners_of_the_clip(ratio, advantage, loss, gradient, level):
    new, old = torch.tensor([[ratio]], dtype=F64).log(), torch.zeros(1, 1)
    inputs = new, old, None, torch.tensor([advantage]), torch.ones(1, 1)
    result = loss_and_gradient(*inputs, clip_low=0.2, clip_high=0.4, level=level)
    assert (result[0].item(), result[1].item()) == pytest.approx((loss, gradient))
    assert grpo_loss(*inputs, clip_low=0.1)[0] == grpo_loss(*inputs, clip_low=0.1, clip_high=0.1)[0]


def test_equal_rewards_give_zero_policy_gradient_and_the_kl_still_pulls():
    new, old, ref, _, mask = random_inputs()
    advantages = group_advantages(torch.full((2, 3), 0.7, dtype=F64)).flatten()
    _, policy, _ = loss_and_gradient(new, old, ref, advantages, mask, kl_coef=0.0)
    _, pulled, _ = loss_and_gradient(new, old, ref, advantages, mask)
    assert (policy == 0).all() and (pulled[mask] != 0).all()


def test_in_the_first_step_the_ratio_is_one_and_the_loss_zero_but_the_gradient_is_not():
    new, *_ = random_inputs(n=4)
    advantages = group_advantages(torch.tensor([[1.0, 0.0, 0.0, 0.0]], dtype=F64)).flatten()
    loss, gradient, metrics = loss_and_gradient(new, new, new, advantages, torch.ones(4, 5))
    assert metrics["ratio"] == 1 and metrics["kl"] == 0 and loss.abs() < 1e-12
    close(gradient, -advantages[:, None].expand(4, 5) / 20)  # REINFORCE with a baseline


def loop_loss(new, old, ref, advantages, mask, reduction, level):
    """The objective sequence by sequence, with clip 0.1 and 0.25, KL 0.3, T = 5."""
    rows = []
    for a, valid, x, y, z in zip(advantages, mask, new, old, ref, strict=True):
        ratio, d = (x - y)[valid].exp(), (z - x)[valid]
        ratio = ratio.log().mean().exp().expand(len(d)) if level == "sequence" else ratio
        surrogate = torch.stack((ratio * a, ratio.clamp(0.9, 1.25) * a)).amin(0)
        rows.append(0.3 * (d.exp() - d - 1) - surrogate)
    if reduction == "sequence":
        return sum(row.mean() for row in rows if len(row)) / len(rows)
    return torch.cat(rows).sum() / (mask.sum() if reduction == "token" else 5 * len(rows))


@pytest.mark.parametrize("reduction", REDUCTIONS)
@pytest.mark.parametrize("level", LEVELS)
def test_the_loss_is_a_loop_over_sequences_and_its_gradient_exact(reduction, level):
    new, *rest = random_inputs()
    how = dict(clip_low=0.1, clip_high=0.25, kl_coef=0.3, level=level, reduction=reduction)
    close(grpo_loss(new, *rest, **how)[0], loop_loss(new, *rest, reduction, level))
    assert torch.autograd.gradcheck(lambda x: grpo_loss(x, *rest, **how)[0], new.requires_grad_())


def test_reductions_by_hand():
    x = torch.tensor([[1.0, 2.0, 3.0], [5.0, 9.0, torch.nan], [9.0, 9.0, torch.inf]])
    mask = torch.tensor([[2, 1, 0.5], [1, -1, 0], [0, 0, 0]])  # > 0 is valid; the last counts in N
    means = [grpo.reduce_tokens(x, m, how).item() for m in (mask, mask > 0) for how in REDUCTIONS]
    assert means == pytest.approx([11 / 4, (2 + 5 + 0) / 3, 11 / 9] * 2)
    assert grpo.reduce_tokens(x, mask, "constant", max_tokens=10).item() == pytest.approx(11 / 30)


def test_metrics_are_means_over_valid_tokens():
    ratio = torch.tensor([[0.5, 1.0, 1.5], [1.3, 9.0, 9.0]], dtype=F64)
    mask, zero = torch.tensor([[1, 1, 1], [1, 0, 0]]), torch.zeros(2, 3)
    _, metrics = grpo_loss(ratio.log(), zero, zero, torch.ones(2), mask, clip_high=0.4)
    kl = sum(1 / r - 1 + math.log(r) for r in (0.5, 1.0, 1.5, 1.3)) / 4
    expected = {"ratio": 4.3 / 4, "clip_low": 0.25, "clip_high": 0.25, "kl": kl}
    assert {name: value.item() for name, value in metrics.items()} == pytest.approx(expected)


@pytest.mark.parametrize("reduction", REDUCTIONS)
@pytest.mark.parametrize("level", LEVELS)
@pytest.mark.parametrize("junk", [math.nan, math.inf, -math.inf, 1e30])
def test_what_stands_at_invalid_positions_moves_nothing(junk, level, reduction):
    *clean, advantages, mask = random_inputs()
    dirty, options = [x.where(mask, junk) for x in clean], dict(level=level, reduction=reduction)
    a = loss_and_gradient(*clean, advantages, mask, **options)
    b = loss_and_gradient(*dirty, advantages.where(mask.any(1), junk), mask, **options)
    assert torch.equal(a[0], b[0]) and torch.equal(a[1], b[1]) and a[2] == b[2]
    assert a[1].isfinite().all() and (a[1][~mask] == 0).all() and (a[1][mask] != 0).any()
    loss, gradient, metrics = loss_and_gradient(*dirty, advantages * junk, 0 * mask, **options)
    assert loss == 0 and (gradient == 0).all() and not any(metrics.values())


@pytest.mark.parametrize("dtype", DTYPES)
def test_float64_is_kept_and_half_precision_is_computed_in_float32(dtype):
    *inputs, mask = random_inputs()
    inputs, wide = [x.to(dtype) for x in inputs], F64 if dtype == F64 else torch.float32
    loss, metrics = grpo_loss(*inputs, mask)
    assert loss == grpo_loss(*(x.to(wide) for x in inputs), mask)[0]
    results = loss, *metrics.values(), kl_k3(*inputs[:2]), group_advantages(inputs[0])
    assert {x.dtype for x in results} == {wide}


def test_only_the_new_logprobs_get_a_gradient():
    *inputs, mask = random_inputs()
    leaves = [x.clone().requires_grad_() for x in inputs]
    loss, metrics = grpo_loss(*leaves, mask)
    (loss + kl_k3(*leaves[:2]).sum()).backward()
    assert leaves[0].grad.abs().sum() > 0 and all(x.grad is None for x in leaves[1:])
    advantages = group_advantages(leaves[1]), pairwise_advantages(leaves[1])
    assert not any(x.requires_grad for x in (*metrics.values(), *advantages))


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("log_ratio", [60, 94, 1000, -60, -94, -1000])  # exp(89) is infinite
def test_a_ratio_that_would_overflow_gives_a_finite_loss_and_gradient(log_ratio, dtype):
    new, old = (torch.tensor([[min(x, 0.0)]], dtype=dtype) for x in (log_ratio, -log_ratio))
    for advantage in (1.0, -1.0):
        inputs = new, old, old, torch.tensor([advantage]), torch.ones(1, 1)
        loss, gradient, metrics = loss_and_gradient(*inputs)
        assert all(x.isfinite().all() for x in (loss, gradient, *metrics.values()))
    kl = kl_k3(new.requires_grad_(), old)
    assert kl.isfinite() and kl > 18 and torch.autograd.grad(kl, new)[0].isfinite()


def test_k3_is_unbiased_and_its_on_policy_gradient_is_that_of_kl_ref_policy():
    theta = torch.tensor([0.3, -0.5, 1.0], dtype=F64, requires_grad=True)  # of three tokens
    p, q = theta.softmax(0), torch.tensor([0.2, 0.5, 0.3], dtype=F64)
    k3, forward, reverse = kl_k3(p.log(), q.log()), p @ (p / q).log(), q @ (q / p).log()
    close(p @ k3, forward)
    losses = p.detach() @ k3, reverse, forward  # tokens are drawn, not differentiated
    gradients = [torch.autograd.grad(x, theta, retain_graph=True)[0] for x in losses]
    close(gradients[0], gradients[1])
    assert (gradients[0] - gradients[2]).abs().max() > 0.01 and (k3 > 0).all()
    d = torch.tensor([0.0, 1e-3, -1e-3])  # where exp(d) - d - 1 would be 10% off
    torch.testing.assert_close(kl_k3(-d, 0 * d), d**2 / 2 + d**3 / 6, rtol=1e-3, atol=0)


@pytest.mark.parametrize("task", ["draw", "vqa"])
def test_look_back_is_the_softmax_over_allowed_ids_at_the_temperature(model, vocab, codebook, task):
    base, layout = lively(vocab, codebook, seed=1).double(), vocab.layout(task)
    tokens, states, p = sample(model, layout, rows_of(vocab, codebook, task, 2), 3), [], []
    for m in (model, base):
        hidden, targets, mask = completion(m, layout, tokens)
        odds = (m(tokens, layout.patch)[:, layout.start - 1 : -1] @ m.head.T / 0.7).exp()
        odds = odds[:, : mask.shape[1], layout.first : layout.last][mask]
        p.append(odds / odds.sum(1, keepdim=True))
        states.append(hidden)
    results = grpo.look_back(model, base, layout, *states, targets, temperature=0.7)
    chosen = torch.arange(len(odds)), targets[mask]
    kl, entropy = (p[0] * (p[0] / p[1]).log()).sum(1), (p[0] * (1 / p[0]).log()).sum(1)
    for result, by_hand in zip(results, (*(x[chosen].log() for x in p), kl, entropy), strict=True):
        close(result[mask], by_hand)
        assert not result.requires_grad


R, BAD = torch.zeros(2, 3), torch.tensor([[0.0, math.nan], [math.inf, 1.0]])
WRONG = [  # what the message names, call, arguments
    ("scale='std'.*'group', 'batch', 'none'", group_advantages, (R, "std")),
    (r"\(4, 1\), expected .*G >= 2", group_advantages, (torch.zeros(4, 1),)),
    ("2 of 4 values are not finite", group_advantages, (BAD,)),
    ("'a': 2 of 4 values are not finite", combine_rewards, ({"a": BAD}, {"a": 1.0})),
    ("temperature=0.0: expected a number > 0", pairwise_advantages, (R, 0.0)),
    ("mode='sum'.*'normalize_then_sum'", combine_rewards, ({"a": R}, {"a": 1.0}, "sum")),
    (r"\['a'\].*\['b'\]", combine_rewards, ({"a": R}, {"b": 1.0})),
    (r"'b'.*\(3, 2\).*\(2, 3\)", combine_rewards, ({"a": R, "b": R.T}, {"a": 1.0, "b": 1.0})),
    ("'mean'.*'token', 'sequence', 'constant'", grpo.reduce_tokens, (R, R, "mean")),
    ("level='word': expected one of 'token', 'sequence'",
     functools.partial(grpo_loss, level="word"), (R, R, R, R[:, 0], R)),
    (r"mask .*\(3, 2\), expected \(2, 3\)", grpo_loss, (R, R, R, R[:, 0], R.T)),
    (r"advantages .*\(2, 3\), expected \(2,\)", grpo_loss, (R, R, R, R, R)),
]


@pytest.mark.parametrize("message, function, arguments", WRONG)
def test_a_wrong_argument_is_named_with_what_is_legal(message, function, arguments):
    with pytest.raises(ValueError, match=message):
        function(*arguments)


# ---------------------------------------------------------------- controls and baselines

REWARDS = torch.tensor([[0.0, 2.0, 1.0], [5.0, 0.0, 1.0], [3.0, 3.0, 3.05]])  # the last: no spread


def test_controls_are_their_formulas_on_the_groups_with_a_spread():
    new, _, ref, _, mask = random_inputs(n=9)
    gain = [(new[n] - ref[n])[mask[n]].sum().item() for n in range(9)]
    pairs = [math.log1p(math.exp(0.3 * (gain[w] - gain[b]))) for b, w in ((1, 0), (3, 4))]
    best = torch.cat([new[1][mask[1]], new[3][mask[3]]]).mean().item()
    dirty, ref = new.masked_fill(~mask, math.nan).requires_grad_(), ref.masked_fill(~mask, math.inf)
    rejection = grpo.rejection_loss(dirty, ref, REWARDS, mask)
    dpo = grpo.dpo_loss(dirty, ref, REWARDS, mask, beta=0.3)
    assert (rejection.item(), dpo.item()) == pytest.approx((-best, sum(pairs) / 2))
    (rejection + dpo).backward()
    assert dirty.grad.isfinite().all() and (dirty.grad[[2, 5, 6, 7, 8]] == 0).all()


def pairs_of(codebook, n):
    examples = [WORLD.example(random.Random(i), "draw") for i in range(n)]
    return examples, codebook.encode(pictures_of(examples))


def test_contrast_reads_no_padding_and_equal_texts_are_no_negatives(vocab, codebook):
    model, (examples, codes) = lively(vocab, codebook), pairs_of(codebook, 4)
    loss = grpo.contrastive_loss(model, vocab, examples, codes)
    model.embed.weight.data[PAD] += 1
    close(grpo.contrastive_loss(model, vocab, examples, codes), loss)
    equal = [e._replace(prompt="a red circle") for e in examples]
    assert loss > 0.1 and grpo.contrastive_loss(model, vocab, equal, codes).abs() < 1e-6


def test_a_masked_code_is_not_visible_but_the_codes_on_both_sides_are(model, vocab, codebook):
    examples, codes = pairs_of(codebook, 1)

    def loss(place, code):
        torch.manual_seed(3)
        other = codes.index_fill(1, torch.tensor(place), code)
        return grpo.masked_code_loss(model, vocab, examples, other, share=0.05).item()

    torch.manual_seed(3)
    (at,) = (torch.rand(1, 18)[0, 2:] < 0.05).nonzero()[:, 0].tolist()  # the seed hides one code
    likelihoods = [math.exp(-loss(at, k)) for k in range(len(codebook.entries))]
    assert sum(likelihoods) == pytest.approx(1)  # of one distribution, whichever code was there
    for place in {*range(16)} - {at}:
        assert loss(place, 0) != loss(place, 1)
