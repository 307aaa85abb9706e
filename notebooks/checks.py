"""The checks of all exercises: one function each, of the exercise's name, that is given the student's function.

A check compares the answer with an independent expression on several random inputs and fails with a hint: the symptom and where
to look, not the solution. Inputs come from seeded generators, so a check gives the same verdict every time.
"""

import copy
import math

import numpy as np
import torch
import torch.nn.functional as F


def draws(count=4):
    """Seeded generators, one a trial."""
    return [torch.Generator().manual_seed(seed) for seed in range(count)]


def rand(g, *shape):
    return torch.randn(*shape, generator=g)


def whole(g, low, high):
    """A random whole number, low <= n < high."""
    return int(torch.randint(low, high, (1,), generator=g))


def same(got, expected, hint, tolerance=1e-5):
    """Fails with the hint unless got is a tensor or number like expected."""
    assert got is not None, "it returns nothing: is the `return` there?"
    got, expected = torch.as_tensor(got), torch.as_tensor(expected)
    assert got.shape == expected.shape, f"the result has shape {tuple(got.shape)}, expected {tuple(expected.shape)}"
    worst = float((got.double() - expected.double()).abs().max()) if expected.numel() else 0.0
    assert worst < tolerance, f"{hint} (largest difference {worst:.3g})"


# ---------------------------------------------------------------- 01 the world and its tokens


def cut_patches(answer):
    for g in draws():
        p, side = whole(g, 1, 4), whole(g, 2, 5)
        picture = torch.randint(0, 256, (p * side, p * side, 3), generator=g)
        rows = [picture[y : y + p, x : x + p].reshape(-1) for y in range(0, p * side, p) for x in range(0, p * side, p)]
        hint = "right shape, wrong pixels: split height and width first, then permute the two patch numbers next to each other"
        same(answer(picture, p), torch.stack(rows), hint, 0.5)


def nearest_code(answer):
    for g in draws():
        patches, entries = rand(g, 7, 5), 3 * rand(g, 11, 5)
        expected = [min(range(11), key=lambda k: float((x - entries[k]).square().sum())) for x in patches]
        hint = "not the nearest entries: is |c|² there, or do long entries always win?"
        same(answer(patches, entries), torch.tensor(expected), hint, 0.5)


def kmeans_step(answer):
    for g in draws():
        patches, entries = rand(g, 30, 2), rand(g, 5, 2)
        entries[4] = 1000.0  # nobody's nearest
        code = torch.cdist(patches, entries).argmin(1)
        expected = torch.stack([patches[code == k].mean(0) if (code == k).any() else entries[k] for k in range(5)])
        got = answer(patches, entries)
        assert torch.is_tensor(got) and not got.isnan().any(), "an entry without any patch became nan: keep it where it is"
        same(got, expected, "each entry should move to the mean of the patches whose code it is", 1e-4)


# ---------------------------------------------------------------- 02 one transformer


def causal_attention(answer):
    for g in draws():
        q, k, v = (rand(g, 2, 6, 4) for _ in range(3))
        got = answer(q, k, v)
        same(got[:, :1], v[:, :1], "the first position may look at itself only, so its result is its own value: is the future masked?")
        expected = F.scaled_dot_product_attention(q, k, v, is_causal=True)
        same(got, expected, "causal, but other weights: divide by sqrt(D) before the softmax, which runs over the keys")


def attend_next(answer):
    for g in draws():
        n = whole(g, 1, 6)
        keys, values, q, k, v = rand(g, n, 4), rand(g, n, 4), rand(g, 4), rand(g, 4), rand(g, 4)
        all_k, all_v = torch.cat((keys, k[None])), torch.cat((values, v[None]))
        expected = torch.softmax(all_k @ q / 2, 0) @ all_v
        got = answer(q, k, v, keys, values)
        assert isinstance(got, tuple) and len(got) == 3, "return three things: the result, the keys and the values to keep"
        same(got[1], all_k, "the new key belongs at the end of the kept ones")
        same(got[2], all_v, "the new value belongs at the end of the kept ones")
        same(got[0], expected, "the newest token looks at all kept keys and at its own")


def allowed_probs(answer):
    for g in draws():
        logits, lo, temperature = rand(g, 9), whole(g, 0, 4), 0.3 + float(torch.rand(1, generator=g))
        hi = lo + whole(g, 2, 5)
        got = answer(logits, lo, hi, temperature)
        same(got.sum(), 1.0, "the probabilities of all ids should sum to 1: mask before the softmax, not after it")
        expected = torch.zeros(9)
        expected[lo:hi] = torch.softmax(logits[lo:hi] / temperature, 0)
        same(got, expected, "ids outside lo <= id < hi get exactly 0, and the temperature divides the logits")


# ---------------------------------------------------------------- 03 pre-training and noise


def noise_floor(answer):
    for g in draws():
        shares = torch.softmax(rand(g, 5), 0).tolist()
        expected = sum(-p * math.log(p) for p in shares)
        same(answer(shares), expected, "the floor is the entropy - sum p log p, in nats (natural log)")
    same(answer([1.0, 0.0]), 0.0, "an outcome that never happens costs nothing: leave p = 0 out, its log is -inf")


def sharpened(answer):
    for g in draws():
        p, temperature = torch.softmax(rand(g, 4), 0), 0.2 + float(torch.rand(1, generator=g))
        got = answer(p, temperature)
        same(got.sum(), 1.0, "what comes out should be probabilities: divide by their sum")
        same(got, torch.softmax(p.log() / temperature, 0), "dividing logits by T raises probabilities to the power 1/T")


def next_token_logprobs(answer):
    for g in draws():
        hidden, head, tokens = rand(g, 2, 5, 3), rand(g, 7, 3), torch.randint(0, 7, (2, 5), generator=g)
        got = answer(hidden, head, tokens)
        expected = torch.stack([F.log_softmax(hidden[:, t] @ head.T, -1).gather(1, tokens[:, t + 1, None])[:, 0] for t in range(4)], 1)
        after = torch.stack([F.log_softmax(hidden[:, t + 1] @ head.T, -1).gather(1, tokens[:, t + 1, None])[:, 0] for t in range(4)], 1)
        if got.shape == after.shape and torch.allclose(got, after, atol=1e-5):
            raise AssertionError("each token is scored by the state that has already read it: no wonder that the loss is so low")
        same(got, expected, "hidden[:, t] should score tokens[:, t + 1]")


# ---------------------------------------------------------------- 04 rewards


def info_nce(answer):
    for g in draws():
        scores = 3 * rand(g, 5, 5)
        rows = -sum(F.log_softmax(scores[i], 0)[i] for i in range(5)) / 5
        columns = -sum(F.log_softmax(scores[:, i], 0)[i] for i in range(5)) / 5
        got = torch.as_tensor(answer(scores))
        for one, other in ((rows, "columns: which picture belongs to this text"), (columns, "rows: which text belongs to this picture")):
            assert not torch.allclose(got, one, atol=1e-5), f"one half is missing, the {other}?"
        same(got, (rows + columns) / 2, "the mean of two cross-entropies whose right answers stand on the diagonal")


def bradley_terry(answer):
    for g in draws():
        better, worse = 2 * rand(g, 6), 2 * rand(g, 6)
        expected = torch.log1p(torch.exp(worse - better)).mean()
        assert not torch.allclose(torch.as_tensor(answer(better, worse)), torch.log1p(torch.exp(better - worse)).mean()), (
            "this loss is low when the worse one has the higher reward: the sign")
        same(answer(better, worse), expected, "P(better wins) = sigmoid(better - worse), the loss is the mean of -log P")
    far = answer(torch.tensor([0.0]), torch.tensor([200.0]))
    assert torch.isfinite(far), "infinite where a pair is badly wrong: use F.logsigmoid, not log(sigmoid)"


def agreement(answer):
    for g in draws():
        rewards, right = torch.randint(0, 4, (3, 6), generator=g).float(), torch.rand(3, 6, generator=g) < 0.5
        right[:, 0], right[:, 1] = True, False
        won, pairs = 0.0, 0
        for r, ok in zip(rewards.tolist(), right.tolist()):
            for i in range(6):
                for j in range(6):
                    if ok[i] and not ok[j]:
                        won, pairs = won + (r[i] > r[j]) + 0.5 * (r[i] == r[j]), pairs + 1
        same(answer(rewards, right), won / pairs, "over all (right, wrong) pairs of the same prompt; ties count half")


# ---------------------------------------------------------------- 05 GRPO by hand


def advantages(answer):
    for g in draws():
        rewards = rand(g, 3, 4)
        got = answer(rewards)
        same(got.sum(1), torch.zeros(3), "the advantages of a group should sum to 0: subtract the mean of the row, not of the batch", 1e-4)
        expected = (rewards - rewards.mean(1, keepdim=True)) / rewards.std(1, keepdim=True)
        same(got, expected, "divide by the sample std (torch's default) of the group, plus 1e-4", 1e-2)
    equal = answer(torch.full((2, 4), 0.7))
    same(equal, torch.zeros(2, 4), "equal rewards should give 0, not nan: add 1e-4 to the std", 1e-2)


def k3(answer):
    for g in draws():
        new, ref = rand(g, 3, 4), rand(g, 3, 4)
        got = answer(new, ref)
        assert (got >= -1e-6).all(), "it is negative somewhere: d is ref - new, and the estimate is exp(d) - d - 1"
        same(got, torch.exp(ref - new) - (ref - new) - 1, "d is ref - new; the other way round it estimates another divergence")


def zero_spread(answer):
    for g in draws():
        p, size = float(torch.rand(1, generator=g)), whole(g, 2, 9)
        outcomes = [[(i >> k) & 1 for k in range(size)] for i in range(2**size)]
        expected = sum(math.prod(p if x else 1 - p for x in row) for row in outcomes if len(set(row)) == 1)
        same(answer(p, size), expected, "all right or all wrong: two ways to have no spread")


def clipped_objective(answer):
    names = {(1.5, 1.0): 1.2, (0.5, 1.0): 0.5, (1.5, -1.0): -1.5, (0.5, -1.0): -0.8}
    for (ratio, advantage), value in names.items():
        got = float(answer(torch.tensor(ratio), torch.tensor(advantage), 0.2, 0.2))
        what = "good" if advantage > 0 else "bad"
        hint = f"ratio {ratio}, A = {advantage:+g}: {got:.2f}, expected {value}. A {what} token that is already {ratio} times as likely"
        assert abs(got - value) < 1e-5, hint + (": may it still push?" if abs(value) in (1.2, 0.8) else ": must the push stop?")
    for g in draws():
        ratio, advantage = torch.rand(20, generator=g) * 2, rand(g, 20)
        expected = [min(r * a, min(max(r, 0.7), 1.4) * a) for r, a in zip(ratio.tolist(), advantage.tolist())]
        same(answer(ratio, advantage, 0.3, 0.4), torch.tensor(expected), "clip below at 1 - low, above at 1 + high; then the smaller one")


def token_mean(answer):
    for g in draws():
        loss, mask = rand(g, 4, 6), torch.rand(4, 6, generator=g) < 0.6
        mask[0, 0], mask[1] = True, False
        expected = sum(loss[mask].tolist()) / int(mask.sum())
        junk = torch.where(mask, loss, 1e6)
        assert abs(float(answer(junk, mask))) < 1e3, "the answer changes when padding changes: padding must not reach the mean"
        same(answer(loss, mask), expected, "sum over the valid tokens, divided by how many there are of them")
        nan = answer(torch.where(mask, loss, torch.nan), mask)
        assert not torch.isnan(torch.as_tensor(nan)), "nan in the padding gets through: nan * 0 is nan, choose with torch.where"


# ---------------------------------------------------------------- 06 aligning a model


def color_share(answer):
    rng = np.random.default_rng(0)
    for _ in range(4):
        color, n = rng.integers(0, 256, 3), int(rng.integers(1, 60))
        picture = np.zeros((16, 16, 3), np.uint8)
        near = np.clip(color + rng.integers(-15, 16, (n, 3)), 0, 255)
        picture.reshape(-1, 3)[rng.choice(256, n, replace=False)] = near
        off = (np.abs(picture.astype(int) - color).sum(-1) < 60).mean()
        hint = "share of pixels whose |r| + |g| + |b| difference is below 60 (mind that uint8 cannot go below 0)"
        same(float(answer(picture, tuple(int(c) for c in color))), float(off), hint)


def best_of_n(answer):
    for g in draws():
        p, n = torch.rand(7, generator=g), whole(g, 1, 12)
        expected = torch.tensor([1 - math.prod(1 - x for _ in range(n)) for x in p.tolist()]).mean()
        got = torch.as_tensor(answer(p, n))
        pooled = 1 - (1 - p.mean()) ** n
        assert n == 1 or not torch.allclose(got, pooled, atol=1e-6), "first the chance of each prompt, then the mean: the order matters"
        same(got, expected, "wrong only if all n are wrong")


def frozen_reference(answer):
    for g in draws(2):
        policy = torch.nn.Linear(3, 2)
        with torch.no_grad():
            policy.weight.copy_(rand(g, 2, 3))
        before, reference = copy.deepcopy(policy.weight.detach()), answer(policy)
        same(reference.weight.detach(), before, "the reference should start as the policy is")
        assert policy.weight.requires_grad, "now the policy cannot learn: freeze the reference alone"
        with torch.no_grad():
            policy.weight.add_(1.0)
        hint = "the policy took a step and the reference went along: the KL stays 0 whatever happens"
        same(reference.weight.detach(), before, hint)
        assert not any(w.requires_grad for w in reference.parameters()), "the reference asks for gradients: an optimizer may move it"


# ---------------------------------------------------------------- 07 kernels


def logits_bytes(answer):
    same(float(answer(1, 1, 1)), 12.0, "three float32 numbers of 4 bytes for each of the N·T·V logits", 0.5)
    same(float(answer(16, 1024, 128256)), 12.0 * 16 * 1024 * 128256, "N sequences of T tokens, each with V logits", 0.5)


def online_logsumexp(answer):
    for g in draws():
        logits = 5 * rand(g, 3, 12)
        same(answer(logits.split(4, 1)), logits.logsumexp(1), "rescale the sum so far by exp(old maximum - new maximum)", 1e-4)
    big = torch.tensor([[1000.0, 0.0, 2000.0, 0.0]])
    got = answer(big.split(2, 1))
    assert torch.is_tensor(got) and got.isfinite().all(), "overflow: never take exp of a logit before its maximum is subtracted"
    same(got, big.logsumexp(1), "right for small logits, wrong for large ones")


def logprob_gradient(answer):
    for g in draws():
        logits, tokens = rand(g, 4, 6).requires_grad_(), torch.randint(0, 6, (4,), generator=g)
        F.log_softmax(logits, 1).gather(1, tokens[:, None]).sum().backward()
        got = answer(logits.detach(), tokens)
        assert torch.is_tensor(got) and not torch.allclose(got, -logits.grad, atol=1e-5), "the sign: the chosen id's logit should go up"
        same(got, logits.grad, "one-hot of the chosen id minus the probabilities")


def attainable(answer):
    same(float(answer(1.0, 100.0, 10.0)), 10.0, "few operations a byte: memory decides, intensity times bandwidth")
    same(float(answer(50.0, 100.0, 10.0)), 100.0, "many operations a byte: the arithmetic peak decides")
    for g in draws():
        x, peak, bandwidth = (float(v) for v in torch.rand(3, generator=g) * 100)
        same(float(answer(x, peak, bandwidth)), min(peak, x * bandwidth), "the lower one of two roofs", 1e-3)


# ---------------------------------------------------------------- 08 reading results


def wilson(answer):
    for k, n in ((8, 10), (0, 20), (50, 50), (311, 1024)):
        p, z = k / n, 1.96
        got = answer(k, n)
        assert isinstance(got, tuple) and len(got) == 2, "return two numbers: low, high"
        for edge in got:  # its edges are where the observed share is 1.96 standard errors away
            apart = abs(p - edge) - z * math.sqrt(max(edge * (1 - edge), 0.0) / n)
            assert abs(apart) < 1e-6, f"{k} of {n}: {edge:.4f} is no edge of the Wilson interval; see the docstring's formula"
        assert got[0] <= p <= got[1], f"{k} of {n}: the interval should hold the observed share, low first"


def paired_interval(answer):
    rng = np.random.default_rng(0)
    for n in (3, 5, 8):
        easy = rng.normal(0.6, 0.2, n)
        a, b = easy + rng.normal(0.05, 0.01, n), easy
        d, t = a - b, {3: 4.303, 5: 2.776, 8: 2.365}[n]
        half = t * d.std(ddof=1) / math.sqrt(n)
        got = answer(a, b, t)
        hint = "differences first, seed by seed; then mean ± t · std(ddof=1) / sqrt(n)"
        same(torch.tensor(got, dtype=torch.float64), torch.tensor([d.mean() - half, d.mean() + half]), hint)


def equal_diversity(answer):
    fronts = {0.4: ([(0.2, 0.9), (0.6, 0.7)], 0.8),
              0.45: ([(0.6, 0.5), (0.1, 0.8), (0.3, 0.8)], 0.65), 0.5: ([(0.5, 0.4), (0.7, 0.3)], 0.4)}  # fmt: skip
    for diversity, (points, expected) in fronts.items():
        same(float(answer(points, diversity)), expected, f"the front {points} at diversity {diversity}: a straight line between two points")
    assert answer([(0.2, 0.9), (0.6, 0.7)], 0.8) is None, "no point of the front is as varied as that: return None, do not extrapolate"
