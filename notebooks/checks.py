"""The checks of all exercises: one function each, named like it and given the student's answer.

A check compares the answer with an independent expression on several random inputs, and says what
is wrong: a shape, a value that is close or not close, the largest difference. Advice is in
hints.py. Inputs come from seeded generators, so a check gives the same verdict every time.
"""

import copy
import hashlib
import itertools
import math

import numpy as np
import torch
import torch.nn.functional as F


def draws(count=4):
    """Seeded generators, one per trial."""
    return [torch.Generator().manual_seed(seed) for seed in range(count)]


def rand(g, *shape):
    return torch.randn(*shape, generator=g)


def whole(g, low, high):
    """A random whole number, low <= n < high."""
    return int(torch.randint(low, high, (1,), generator=g))


def same(got, expected, what, tolerance=1e-5):
    """Fails unless got is a tensor or number equal to expected; `what` names what is compared."""
    assert got is not None, f"{what}: nothing is returned"
    got, expected = torch.as_tensor(got).detach(), torch.as_tensor(expected).detach()
    shapes = f"{what}: shape {tuple(got.shape)}, expected {tuple(expected.shape)}"
    assert got.shape == expected.shape, shapes
    apart = (got.double() - expected.double()).abs()
    wrong = int((~(apart < tolerance)).sum())  # nan is wrong as well
    if wrong:
        close = float(apart.max()) < 0.02 * float(expected.double().abs().max())
        words = f"{what}: {'close, but not exact' if close else 'not close'}, "
        words += f"{wrong} of {apart.numel()} numbers differ, " if apart.numel() > 1 else ""
        raise AssertionError(words + f"largest difference {float(apart.max()):.3g}")


def unchanged(answer, *inputs):
    """The answer to some tensors; fails if it modifies them."""
    before = [copy.deepcopy(x) for x in inputs]
    got = answer(*inputs)
    for x, y in zip(inputs, before):
        kept = not torch.is_tensor(x) or torch.equal(x, y)
        assert kept, "it modifies its input, which the caller still needs"
    return got


# ---------------------------------------------------------------- 01 the world and its tokens


def cut_patches(answer):
    for g in draws():
        p, side = whole(g, 1, 4), whole(g, 2, 5)
        picture = torch.randint(0, 256, (p * side, p * side, 3), generator=g)
        corners = [(y, x) for y in range(0, p * side, p) for x in range(0, p * side, p)]
        rows = [picture[y : y + p, x : x + p].reshape(-1) for y, x in corners]
        same(answer(picture, p), torch.stack(rows), "the pixels of the patches", 0.5)


def nearest_code(answer):
    for g in draws():
        patches, entries = rand(g, 7, 5), 3 * rand(g, 11, 5)
        distances = [[float((x - c).square().sum()) for c in entries] for x in patches]
        expected = torch.tensor([row.index(min(row)) for row in distances])
        same(unchanged(answer, patches, entries), expected, "the numbers of the entries", 0.5)


def kmeans_step(answer):
    for g in draws():
        patches, entries = rand(g, 30, 2), rand(g, 5, 2)
        entries[4] = 1000.0  # nobody's nearest
        code = torch.cdist(patches, entries).argmin(1)
        expected = entries.clone()
        for k in code.unique():
            expected[k] = patches[code == k].mean(0)
        got = unchanged(answer, patches, entries)
        assert torch.is_tensor(got), "it returns no tensor"
        assert not got.isnan().any(), "an entry without patches became nan"
        same(got, expected, "the moved entries", 1e-4)


# ---------------------------------------------------------------- 02 one transformer


def causal_attention(answer):
    for g, width in zip(draws(), (4, 3, 8, 16)):
        q, k, v = rand(g, 3, 2, whole(g, 3, 8), width)
        got = answer(q, k, v)
        expected = F.scaled_dot_product_attention(q, k, v, is_causal=True)
        assert torch.is_tensor(got), "it returns no tensor"
        same(got[:, :1], expected[:, :1], "the first position, which sees itself alone")
        same(got, expected, "the later positions")


def attend_next(answer):
    for g, width in zip(draws(), (4, 3, 8, 16)):
        n = whole(g, 1, 6)
        keys, values, (q, k, v) = rand(g, n, width), rand(g, n, width), rand(g, 3, width)
        all_k, all_v = torch.cat((keys, k[None])), torch.cat((values, v[None]))
        expected = torch.softmax(all_k @ q / math.sqrt(width), 0) @ all_v
        got = unchanged(answer, q, k, v, keys, values)
        three = "three things should be returned: the result, the keys and the values to keep"
        assert isinstance(got, tuple) and len(got) == 3, three
        same(got[1], all_k, "the keys to keep")
        same(got[2], all_v, "the values to keep")
        same(got[0], expected, "the result")


def allowed_probs(answer):
    for g in draws():
        logits, first = rand(g, 9), whole(g, 0, 4)
        last, temperature = first + whole(g, 2, 5), 0.3 + float(torch.rand(1, generator=g))
        got = unchanged(answer, logits, first, last, temperature)
        same(got.sum(), 1.0, "the sum of the probabilities")
        expected = torch.zeros(9)
        expected[first:last] = torch.softmax(logits[first:last] / temperature, 0)
        outside = torch.cat((got[:first], got[last:]))
        same(outside, torch.zeros_like(outside), "the probabilities of ids that are not allowed")
        same(got, expected, "the probabilities of the allowed ids")


# ---------------------------------------------------------------- 03 pre-training and noise


def noise_floor(answer):
    for g in draws():
        shares = torch.softmax(rand(g, 5), 0).tolist()
        expected = sum(-p * math.log(p) for p in shares)
        same(answer(shares), expected, "the entropy in nats")
    same(answer([1.0, 0.0]), 0.0, "the entropy where one outcome is certain, [1, 0]")


def sharpened(answer):
    for g in draws():
        p, temperature = torch.softmax(rand(g, 4), 0), 0.2 + float(torch.rand(1, generator=g))
        got = unchanged(answer, p, temperature)
        same(got.sum(), 1.0, "the sum of the probabilities")
        expected = torch.softmax(p.log() / temperature, 0)
        same(got, expected, "the probabilities")


def next_token_logprobs(answer):
    for g in draws():
        hidden, head = rand(g, 2, 5, 3), rand(g, 7, 3)
        tokens = torch.randint(0, 7, (2, 5), generator=g)

        def scored(states):
            columns = []
            for t in range(4):
                every = F.log_softmax(states[:, t] @ head.T, -1)
                columns.append(every.gather(1, tokens[:, t + 1, None])[:, 0])
            return torch.stack(columns, 1)

        got, after = answer(hidden, head, tokens), scored(hidden[:, 1:])
        leak = got.shape == after.shape and torch.allclose(got, after, atol=1e-5)
        assert not leak, "too good to be true: each token is scored by a state that has seen it"
        same(got, scored(hidden), "the log-probs")


# ---------------------------------------------------------------- 04 rewards


def info_nce(answer):
    for g in draws():
        scores = 3 * rand(g, 5, 5)
        rows = -sum(F.log_softmax(scores[i], 0)[i] for i in range(5)) / 5
        columns = -sum(F.log_softmax(scores[:, i], 0)[i] for i in range(5)) / 5
        got = torch.as_tensor(answer(scores))
        for half, asked in ((rows, "which text belongs to a picture"),
                            (columns, "which picture belongs to a text")):  # fmt: skip
            alone = got.shape == half.shape and torch.allclose(got, half, atol=1e-5)
            assert not alone, f"it asks only {asked}: one of the two cross-entropies"
        same(got, (rows + columns) / 2, "the mean of the two cross-entropies")


def bradley_terry(answer):
    for g in draws():
        better, worse = 2 * rand(g, 6), 2 * rand(g, 6)
        expected = torch.log1p(torch.exp(worse - better)).mean()
        turned = torch.log1p(torch.exp(better - worse)).mean()
        got = torch.as_tensor(answer(better, worse))
        upside_down = got.shape == turned.shape and torch.allclose(got, turned)
        assert not upside_down, "the loss is low when the worse side has the higher reward"
        same(got, expected, "the loss")
    far = torch.as_tensor(answer(torch.tensor([0.0]), torch.tensor([200.0])))
    assert far.isfinite(), "the loss is not finite where the worse side is 200 ahead"


def agreement(answer):
    for g in draws():
        rewards = torch.randint(0, 4, (3, 6), generator=g).float()
        right = torch.rand(3, 6, generator=g) < 0.5
        right[:, 0], right[:, 1] = True, False
        won, pairs = 0.0, 0
        for r, ok in zip(rewards.tolist(), right.tolist()):
            for i in range(6):
                for j in range(6):
                    if ok[i] and not ok[j]:
                        won, pairs = won + (r[i] > r[j]) + 0.5 * (r[i] == r[j]), pairs + 1
        same(answer(rewards, right), won / pairs, f"the share, of {pairs} pairs")


# ---------------------------------------------------------------- 05 from a bandit to GRPO


def bandit(g, arms, offset=0.0):
    """Random (logits, rewards, probabilities, scores) and the exact gradient of the expected reward
    by autograd, in float64. Row a of scores: the gradient of log p(a), by autograd as well."""
    theta, rewards = rand(g, arms).double(), 3 * rand(g, arms).double() + offset
    logits = theta.clone().requires_grad_()
    logprobs = logits.log_softmax(0)
    (exact,) = torch.autograd.grad(logprobs.exp() @ rewards, logits, retain_graph=True)
    scores = [torch.autograd.grad(x, logits, retain_graph=True)[0] for x in logprobs]
    return theta, rewards, logprobs.detach().exp(), torch.stack(scores), exact


def reinforce(answer):
    for g in draws():
        theta, rewards, p, scores, exact = bandit(g, 4, offset=1.0)
        each = []
        for arm, r in enumerate(rewards.tolist()):
            each.append(unchanged(answer, theta, arm, r))
            assert torch.is_tensor(each[-1]), "it returns no tensor"
            shape = tuple(each[-1].shape)
            assert shape == (4,), f"an estimate has shape {shape}, expected (4,)"
        mean = p @ torch.stack(each)
        same(mean, exact, "the estimates of all arms, weighted by p, against autograd's gradient")
        same(torch.stack(each), rewards[:, None] * scores, "right on average, but single arms")


def unbiased_advantages(answer):
    for g, size, offset in zip(draws(), (2, 3, 2, 4), (20.0, -20.0, -20.0, 20.0)):
        _, rewards, p, scores, exact = bandit(g, 3, offset)
        mean, second, raw = torch.zeros(3), 0.0, 0.0
        for arms in itertools.product(range(3), repeat=size):  # every group that can occur
            chance, arms = math.prod(p[a] for a in arms), list(arms)
            A = unchanged(answer, rewards[arms])
            assert torch.is_tensor(A), "it returns no tensor"
            assert A.shape == (size,), f"shape {tuple(A.shape)}, expected {(size,)}"
            estimate = A @ scores[arms] / size
            mean = mean + chance * estimate
            second += float(chance * estimate.square().sum())
            raw += float(chance * (rewards[arms] @ scores[arms] / size).square().sum())
        times = float(mean @ exact / exact.square().sum())
        along = float((mean - times * exact).norm()) < 1e-6 * float(exact.norm())
        biased = f"the mean over all {3**size} groups of {size} is {times:.3f} times the gradient"
        assert not along or abs(times - 1) < 1e-6, biased
        same(mean, exact, f"the mean over all {3**size} groups of {size}, against the gradient")
        assert second < raw, f"unbiased, but no less noisy: E|g|² {second:.3g}, raw {raw:.3g}"


def importance_estimate(answer):
    for g in draws():
        values, old = rand(g, 5).double(), torch.softmax(rand(g, 5).double(), 0)
        logits = rand(g, 5).double().requires_grad_()
        new, old = logits.log_softmax(0), old.log()
        one = [answer(new[[a]], old[[a]], values[[a]]) for a in range(5)]  # one sample each
        for x in map(torch.as_tensor, one):
            assert x.shape == (), f"the estimate has shape {tuple(x.shape)}, expected a number"
        mean = sum(p * x for p, x in zip(old.exp(), one))
        exact = new.exp() @ values
        same(mean, exact, "one sample: the mean over all arms of the old policy")
        assert torch.is_tensor(mean) and mean.requires_grad, "no gradient flows into logprobs"
        slopes = [torch.autograd.grad(x, logits, retain_graph=True)[0] for x in (mean, exact)]
        same(*slopes, "one sample: right, but the mean gradient over all arms")
        several = [a for a in range(5) for _ in range(whole(g, 1, 3))]
        expected = sum(one[a] for a in several) / len(several)
        got = answer(new[several], old[several], values[several])
        same(got, expected, f"{len(several)} samples: against the mean of their single estimates")


# ---------------------------------------------------------------- 06 GRPO by hand


def advantages(answer):
    for g in draws():
        rewards = rand(g, 3, 4)
        got = unchanged(answer, rewards)
        assert torch.is_tensor(got), "it returns no tensor"
        same(got.sum(-1), torch.zeros(3), "the sum of each group's advantages", 1e-4)
        expected = (rewards - rewards.mean(1, keepdim=True)) / rewards.std(1, keepdim=True)
        same(got, expected, "the advantages", 1e-2)
    equal = answer(torch.full((2, 4), 0.7))
    same(equal, torch.zeros(2, 4), "the advantages of equal rewards", 1e-2)
    close = answer(torch.tensor([[0.0, 2e-4]]))  # mean 1e-4, std sqrt(2) 1e-4
    expected = torch.tensor([[-1.0, 1.0]]) / (math.sqrt(2) + 1)
    same(close, expected, "the advantages of nearly equal rewards, [0, 0.0002]", 1e-3)


def clipped_objective(answer):
    corners = {(1.5, 1.0): 1.2, (0.5, 1.0): 0.5, (1.5, -1.0): -1.5, (0.5, -1.0): -0.8}
    for (ratio, advantage), value in corners.items():
        r = torch.tensor(ratio, requires_grad=True)
        got = answer(r, torch.tensor(advantage), 0.2, 0.2)
        flat = abs(value) in (1.2, 0.8)
        result = float(torch.as_tensor(got).detach())
        corner = f"ratio {ratio}, A = {advantage:+g}"
        assert abs(result - value) < 1e-5, f"{corner}: {result:.2f}, expected {value:.2f}"
        slope = 0.0
        if got.requires_grad:
            slope = float(torch.autograd.grad(got, r)[0])
        expected = 0.0 if flat else advantage
        uphill = f"{corner}: right, but the gradient is {slope:g}, expected {expected:g}"
        assert slope == expected, uphill
    for g in draws():
        ratio, a = torch.rand(20, generator=g) * 2, rand(g, 20)
        pairs = zip(ratio.tolist(), a.tolist())
        expected = torch.tensor([min(r * x, min(max(r, 0.7), 1.4) * x) for r, x in pairs])
        same(answer(ratio, a, 0.3, 0.4), expected, "the objective, with low = 0.3 and high = 0.4")


def k3(answer):
    for g in draws():
        new, ref = rand(g, 3, 4), rand(g, 3, 4)
        got = unchanged(answer, new, ref)
        assert torch.is_tensor(got), "it returns no tensor"
        assert (got >= -1e-6).all(), "the estimate is negative somewhere"
        same(got, torch.exp(ref - new) - (ref - new) - 1, "the estimate")


def zero_spread(answer):
    for g in draws():
        p, size = float(torch.rand(1, generator=g)), whole(g, 2, 9)
        outcomes = [[(i >> k) & 1 for k in range(size)] for i in range(2**size)]
        alike = [row for row in outcomes if len(set(row)) == 1]
        expected = sum(math.prod(p if x else 1 - p for x in row) for row in alike)
        same(answer(p, size), expected, f"the chance at p = {p:.2f}, G = {size}")


def token_mean(answer):
    for g in draws():
        loss, mask = rand(g, 4, 6), torch.rand(4, 6, generator=g) < 0.6
        mask[0, 0], mask[1] = True, False
        expected = sum(loss[mask].tolist()) / int(mask.sum())
        moved = "the result changes when the padding changes"
        assert abs(float(answer(torch.where(mask, loss, 1e6), mask))) < 1e3, moved
        same(answer(loss, mask), expected, "the mean of the valid tokens")
        nan = torch.as_tensor(answer(torch.where(mask, loss, torch.nan), mask))
        assert not nan.isnan(), "nan in the padding makes the result nan"
    nothing = torch.as_tensor(answer(loss, torch.zeros_like(mask)))
    assert float(nothing) == 0, "a batch without a valid token should give 0, not nan"


# ---------------------------------------------------------------- 07 aligning a model


def color_share(answer):
    rng = np.random.default_rng(0)
    for _ in range(4):
        color = rng.integers(0, 256, 3)
        apart = rng.integers(-45, 46, (256, 3))
        apart[:4] = (20, -20, 20), (59, 0, 0), (60, 0, 0), (30, 30, -30)  # 60, 59, 60 and 90 in all
        picture = np.clip(color + apart, 0, 255).astype(np.uint8).reshape(16, 16, 3)
        before, near = picture.copy(), 0
        for pixel in picture.reshape(-1, 3):
            near += sum(abs(int(a) - int(b)) for a, b in zip(pixel, color)) < 60
        got = float(answer(picture, tuple(int(c) for c in color)))
        same(got, near / 256, "the share of near pixels")
        assert (picture == before).all(), "it modifies the picture"


def frozen_reference(answer):
    for g in draws(2):
        policy = torch.nn.Linear(3, 2)
        with torch.no_grad():
            policy.weight.copy_(rand(g, 2, 3))
        before, reference = copy.deepcopy(policy.weight.detach()), answer(policy)
        same(reference.weight.detach(), before, "the reference's weights, against the policy's")
        assert policy.weight.requires_grad, "the policy can no longer be trained"
        with torch.no_grad():
            policy.weight.add_(1.0)
        same(reference.weight.detach(), before, "the reference, after the policy took a step")
        asks = any(w.requires_grad for w in reference.parameters())
        assert not asks, "the reference requires gradients, and an optimizer would move it"


def best_of_n(answer):
    for g in draws():
        p, n = torch.rand(7, generator=g), whole(g, 2, 12)
        expected = torch.tensor([1 - math.prod(1 - x for _ in range(n)) for x in p.tolist()]).mean()
        got = torch.as_tensor(answer(p, n))
        pooled = torch.allclose(got.double(), 1 - (1 - p.double().mean()) ** n, atol=1e-6)
        assert not pooled, "this is the chance for the average prompt, not the average of the chances"
        same(got, expected, f"the expected share with n = {n}")


# ---------------------------------------------------------------- 09 kernels


def logits_bytes(answer):
    for n, t, v in ((1, 1, 1), (16, 1024, 128256)):
        what = f"the bytes for N, T, V = {n}, {t}, {v}"
        same(float(answer(n, t, v)), 12.0 * n * t * v, what, 0.5)


def passing(chunks):
    """The pieces one at a time: each is gone once the next one is requested."""
    for chunk in chunks:
        piece = chunk.clone()
        yield piece
        piece.fill_(torch.nan)


def online_logsumexp(answer):
    for g in draws():
        logits = 5 * rand(g, 3, 12)
        got = answer(passing(logits.split((4, 3, 5), 1)))
        assert torch.is_tensor(got), "it returns no tensor"
        assert not got.isnan().any(), "a piece was used after the next one was requested"
        same(got, logits.logsumexp(1), "the log of the sum", 1e-4)
    big = torch.tensor([[1000.0, 0.0, 2000.0, 0.0]])
    got = answer(passing(big.split(2, 1)))
    assert got.isfinite().all(), "overflow: not finite for logits of 1000 and 2000"
    same(got, big.logsumexp(1), "the log of the sum for logits of 1000 and 2000")


def logprob_gradient(answer):
    for g in draws():
        logits, tokens = rand(g, 4, 6).requires_grad_(), torch.randint(0, 6, (4,), generator=g)
        F.log_softmax(logits, 1).gather(1, tokens[:, None]).sum().backward()
        got = unchanged(answer, logits.detach(), tokens)
        turned = torch.is_tensor(got) and torch.allclose(got, -logits.grad, atol=1e-5)
        assert not turned, "this is the gradient with the opposite sign"
        same(got, logits.grad, "the gradient")


def attainable(answer):
    same(float(answer(1.0, 100.0, 10.0)), 10.0, "at intensity 1, peak 100, bandwidth 10")
    same(float(answer(50.0, 100.0, 10.0)), 100.0, "at intensity 50, peak 100, bandwidth 10")
    for g in draws():
        x, peak, bandwidth = (float(v) for v in torch.rand(3, generator=g) * 100)
        expected = min(peak, x * bandwidth)
        what = f"at intensity {x:.0f}, peak {peak:.0f}, bandwidth {bandwidth:.0f}"
        same(float(answer(x, peak, bandwidth)), expected, what, 1e-3)


# ---------------------------------------------------------------- 10 reading results


def equal_diversity(answer):
    fronts = {0.4: ([(0.2, 0.9), (0.6, 0.7)], 0.8),
              0.45: ([(0.6, 0.5), (0.1, 0.8), (0.3, 0.8)], 0.65),
              0.5: ([(0.5, 0.4), (0.7, 0.3)], 0.4)}  # fmt: skip
    for diversity, (points, expected) in fronts.items():
        got = answer(list(points), diversity)
        assert got is not None, f"None, though the front {points} reaches diversity {diversity}"
        same(float(got), expected, f"the front {points} at diversity {diversity}")
    for beyond in (0.1, 0.8):
        got = answer([(0.2, 0.9), (0.6, 0.7)], beyond)
        assert got is None, f"{got}, though a front from 0.2 to 0.6 does not reach {beyond}"


def wilson(answer):
    for k, n in ((8, 10), (0, 20), (50, 50), (311, 1024)):
        p, z = k / n, 1.96
        got = answer(k, n)
        assert isinstance(got, tuple) and len(got) == 2, "two numbers should be returned: low, high"
        for edge in got:  # where the observed share is 1.96 standard errors away
            apart = abs(p - edge) - z * math.sqrt(max(edge * (1 - edge), 0.0) / n)
            assert abs(apart) < 1e-6, f"{k} of {n}: {edge:.4f} is no edge of the Wilson interval"
        order = f"{k} of {n}: low comes first, and the observed share lies between low and high"
        assert got[0] <= p + 1e-9 and p - 1e-9 <= got[1] and got[0] < got[1], order


def paired_interval(answer):
    rng = np.random.default_rng(0)
    for n in (3, 5, 8):
        easy = rng.normal(0.6, 0.2, n)
        a, b = easy + rng.normal(0.05, 0.01, n), easy
        d, t = a - b, {3: 4.303, 5: 2.776, 8: 2.365}[n]
        half = t * d.std(ddof=1) / math.sqrt(n)
        got = torch.tensor(answer(a, b, t), dtype=torch.float64)
        edges = torch.tensor([d.mean() - half, d.mean() + half])
        same(got, edges, f"the interval of {n} seeds")


# ---------------------------------------------------------------- sick runs


def first_pass_gap(answer):
    for g in draws():
        old, mask = -3 * torch.rand(4, 6, generator=g), torch.rand(4, 6, generator=g) < 0.6
        mask[0, :2] = True
        new = old + 0.1 * rand(g, 4, 6)
        new[0, 0] = old[0, 0] - 0.7  # the largest difference is a fall
        new[~mask], old[~mask] = torch.nan, -torch.inf
        got = torch.as_tensor(answer(new.clone(), old.clone(), mask.clone()))
        assert not got.isnan(), "nan: the padding got into the result"
        hint = "the largest absolute difference of two log-probs, over the valid tokens only"
        same(got.reshape(()), torch.tensor(0.7), hint)
    nothing = float(answer(new, old, torch.zeros_like(mask)))
    assert nothing == 0, "without a valid token there is no gap: 0"


def alarm(answer):
    cases = [([1, 3, 1, 3, 3, 1], 2, 2, 4), ([1, 3, 1, 3, 1, 3], 2, 2, None), ([3, 3], 2, 1, 0),
             ([2, 2, 2, 2.5, 2.1, 9], 2, 3, 5), ([3, 3], 2, 3, None), ([], 0, 1, None),
             ([-1, -0.2, -0.1, -3], -0.5, 2, 2)]  # fmt: skip
    for values, limit, patience, expected in cases:
        got = answer(list(values), limit, patience)
        hint = f"alarm({values}, {limit}, {patience}) gives {got}: count steps in a row, strictly above"
        assert got is expected or (got == expected and got is not None), hint


# Digests, so that reading this file does not answer the question.
LOGS_OF_CAUSES = set("2589e1d6 42f8d823 5db76cd1 a14763e0 a818eee5 d01111a0".split())
PANELS_OF_CAUSES = set(
    "246bf658 314cfa17 4f52b071 64cb9cd5 7ad4945d b8bb16c2 ca0f91c9 f3986903".split())  # fmt: skip
CAUSES = ("kl", "no spread", "entropy", "temperature", "clip", "hacked")


def digest(*words):
    return hashlib.sha256(" ".join(map(str, words)).encode()).hexdigest()[:8]


def diagnosis(answer):
    got = answer()
    form = 'expected {"A": (cause, panel), ...} with all letters from A to F'
    assert isinstance(got, dict) and sorted(map(str, got)) == list("ABCDEF"), form
    pairs = all(isinstance(pair, (tuple, list)) and len(pair) == 2 for pair in got.values())
    assert pairs, f"{form}, two words each"
    causes = [cause for cause, _ in got.values()]
    assert set(causes) <= set(CAUSES), f"causes are {', '.join(CAUSES)}"
    assert len(set(causes)) == 6, "each cause belongs to one log, but here one is named twice"
    right = sum(digest(letter, cause) in LOGS_OF_CAUSES for letter, (cause, _) in got.items())
    assert right == 6, f"{right} of 6 causes are right: what moves first, and what does not move?"
    shown = sum(digest(*pair) in PANELS_OF_CAUSES for pair in got.values())
    assert shown == 6, f"all causes are right; {shown} of 6 panels distinguish theirs"
