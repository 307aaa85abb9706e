"""The checks of all exercises: one function each, of the exercise's name, given the student's.

A check compares the answer with an independent expression on several random inputs and fails with a
hint: the symptom and where to look, not the solution. Inputs come from seeded generators, so that a
check gives the same verdict every time.
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
    shapes = f"the result has shape {tuple(got.shape)}, expected {tuple(expected.shape)}"
    assert got.shape == expected.shape, shapes
    worst = float((got.double() - expected.double()).abs().max()) if expected.numel() else 0.0
    assert worst < tolerance, f"{hint} (largest difference {worst:.3g})"


def unchanged(answer, *inputs):
    """The answer to some tensors; fails where it writes into them."""
    before = [copy.deepcopy(x) for x in inputs]
    got = answer(*inputs)
    for x, y in zip(inputs, before):
        kept = not torch.is_tensor(x) or torch.equal(x, y)
        assert kept, "it writes into its input, which the caller still needs: work on a copy"
    return got


# ---------------------------------------------------------------- 01 the world and its tokens


def cut_patches(answer):
    for g in draws():
        p, side = whole(g, 1, 4), whole(g, 2, 5)
        picture = torch.randint(0, 256, (p * side, p * side, 3), generator=g)
        corners = [(y, x) for y in range(0, p * side, p) for x in range(0, p * side, p)]
        rows = [picture[y : y + p, x : x + p].reshape(-1) for y, x in corners]
        hint = "wrong pixels: split height and width, then bring the two patch numbers together"
        same(answer(picture, p), torch.stack(rows), hint, 0.5)


def nearest_code(answer):
    for g in draws():
        patches, entries = rand(g, 7, 5), 3 * rand(g, 11, 5)
        distances = [[float((x - c).square().sum()) for c in entries] for x in patches]
        expected = torch.tensor([row.index(min(row)) for row in distances])
        hint = "not the nearest entries: is |c|² there, or do long entries always win?"
        same(unchanged(answer, patches, entries), expected, hint, 0.5)


def kmeans_step(answer):
    for g in draws():
        patches, entries = rand(g, 30, 2), rand(g, 5, 2)
        entries[4] = 1000.0  # nobody's nearest
        code = torch.cdist(patches, entries).argmin(1)
        expected = entries.clone()
        for k in code.unique():
            expected[k] = patches[code == k].mean(0)
        got = unchanged(answer, patches, entries)
        lost = "an entry without any patch became nan: keep it where it is"
        assert torch.is_tensor(got) and not got.isnan().any(), lost
        same(got, expected, "an entry moves to the mean of the patches whose code it is", 1e-4)


# ---------------------------------------------------------------- 02 one transformer


def causal_attention(answer):
    for g, width in zip(draws(), (4, 3, 8, 16)):
        q, k, v = rand(g, 3, 2, whole(g, 3, 8), width)
        got = answer(q, k, v)
        hint = "the first position sees itself alone and gets its own value: is the future masked?"
        same(got[:, :1], v[:, :1], hint)
        expected = F.scaled_dot_product_attention(q, k, v, is_causal=True)
        hint = "causal, but other weights: divide by sqrt(D); the softmax runs over the keys"
        same(got, expected, hint)


def attend_next(answer):
    for g, width in zip(draws(), (4, 3, 8, 16)):
        n = whole(g, 1, 6)
        keys, values, (q, k, v) = rand(g, n, width), rand(g, n, width), rand(g, 3, width)
        all_k, all_v = torch.cat((keys, k[None])), torch.cat((values, v[None]))
        expected = torch.softmax(all_k @ q / math.sqrt(width), 0) @ all_v
        got = unchanged(answer, q, k, v, keys, values)
        three = "return three things: the result, the keys and the values to keep"
        assert isinstance(got, tuple) and len(got) == 3, three
        same(got[1], all_k, "the new key belongs at the end of the kept ones")
        same(got[2], all_v, "the new value belongs at the end of the kept ones")
        same(got[0], expected, "the newest token looks at all kept keys and its own; sqrt(D)?")


def allowed_probs(answer):
    for g in draws():
        logits, first = rand(g, 9), whole(g, 0, 4)
        last, temperature = first + whole(g, 2, 5), 0.3 + float(torch.rand(1, generator=g))
        got = unchanged(answer, logits, first, last, temperature)
        same(got.sum(), 1.0, "they should sum to 1: mask before the softmax, not after it")
        expected = torch.zeros(9)
        expected[first:last] = torch.softmax(logits[first:last] / temperature, 0)
        hint = "ids outside first <= id < last get exactly 0; the temperature divides logits"
        same(got, expected, hint)


# ---------------------------------------------------------------- 03 pre-training and noise


def noise_floor(answer):
    for g in draws():
        shares = torch.softmax(rand(g, 5), 0).tolist()
        expected = sum(-p * math.log(p) for p in shares)
        same(answer(shares), expected, "the floor is the entropy - sum p log p (natural log)")
    hint = "an outcome that never happens costs nothing: leave p = 0 out, its log is -inf"
    same(answer([1.0, 0.0]), 0.0, hint)


def sharpened(answer):
    for g in draws():
        p, temperature = torch.softmax(rand(g, 4), 0), 0.2 + float(torch.rand(1, generator=g))
        got = unchanged(answer, p, temperature)
        same(got.sum(), 1.0, "what comes out should be probabilities: divide by their sum")
        expected = torch.softmax(p.log() / temperature, 0)
        same(got, expected, "dividing logits by T raises probabilities to the power 1/T")


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
        assert not leak, "these log-probs are too good to be true: which state scores which token?"
        same(got, scored(hidden), "hidden[:, t] should score tokens[:, t + 1]")


# ---------------------------------------------------------------- 04 rewards


def info_nce(answer):
    for g in draws():
        scores = 3 * rand(g, 5, 5)
        rows = -sum(F.log_softmax(scores[i], 0)[i] for i in range(5)) / 5
        columns = -sum(F.log_softmax(scores[:, i], 0)[i] for i in range(5)) / 5
        got = torch.as_tensor(answer(scores))
        halves = {"columns: which picture belongs to this text": rows,
                  "rows: which text belongs to this picture": columns}
        for missing, half in halves.items():
            assert not torch.allclose(got, half, atol=1e-5), f"one half is missing, the {missing}?"
        hint = "the mean of two cross-entropies whose right answers stand on the diagonal"
        same(got, (rows + columns) / 2, hint)


def bradley_terry(answer):
    for g in draws():
        better, worse = 2 * rand(g, 6), 2 * rand(g, 6)
        expected = torch.log1p(torch.exp(worse - better)).mean()
        turned = torch.log1p(torch.exp(better - worse)).mean()
        got = torch.as_tensor(answer(better, worse))
        sign = "this loss is low when the worse one has the higher reward: the sign"
        assert not torch.allclose(got, turned), sign
        same(got, expected, "P(better wins) = sigmoid(better - worse); the mean of -log P")
    far = torch.as_tensor(answer(torch.tensor([0.0]), torch.tensor([200.0])))
    assert far.isfinite(), "infinite where a pair is badly wrong: use F.logsigmoid"


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
        hint = "over all (right, wrong) pairs of the same prompt; ties count half"
        same(answer(rewards, right), won / pairs, hint)


# ---------------------------------------------------------------- 06 GRPO by hand


def advantages(answer):
    for g in draws():
        rewards = rand(g, 3, 4)
        got = unchanged(answer, rewards)
        hint = "advantages of a group should sum to 0: subtract the mean of the row"
        same(got.sum(1), torch.zeros(3), hint, 1e-4)
        expected = (rewards - rewards.mean(1, keepdim=True)) / rewards.std(1, keepdim=True)
        same(got, expected, "divide by the sample std of the group, plus 1e-4", 1e-2)
    equal = answer(torch.full((2, 4), 0.7))
    same(equal, torch.zeros(2, 4), "equal rewards should give 0: add 1e-4 to the std", 1e-2)
    close = answer(torch.tensor([[0.0, 2e-4]]))  # mean 1e-4, std sqrt(2) 1e-4
    expected = torch.tensor([[-1.0, 1.0]]) / (math.sqrt(2) + 1)
    same(close, expected, "wrong for nearly equal rewards: add 1e-4 to the std, nothing else", 1e-3)


def clipped_objective(answer):
    corners = {(1.5, 1.0): 1.2, (0.5, 1.0): 0.5, (1.5, -1.0): -1.5, (0.5, -1.0): -0.8}
    for (ratio, advantage), value in corners.items():
        r = torch.tensor(ratio, requires_grad=True)
        got = answer(r, torch.tensor(advantage), 0.2, 0.2)
        what = "good" if advantage > 0 else "bad"
        flat = abs(value) in (1.2, 0.8)
        result = float(torch.as_tensor(got).detach())
        hint = f"ratio {ratio}, A = {advantage:+g}: {result:.2f}. A {what} token that is {ratio} "
        hint += f"times as likely: {'may it still push' if flat else 'must the push stop'}?"
        assert abs(result - value) < 1e-5, hint
        slope = 0.0
        if got.requires_grad:
            slope = float(torch.autograd.grad(got, r)[0])
        expected = 0.0 if flat else advantage
        assert slope == expected, f"right value, but its gradient is {slope:g}, not {expected:g}"
    for g in draws():
        ratio, a = torch.rand(20, generator=g) * 2, rand(g, 20)
        pairs = zip(ratio.tolist(), a.tolist())
        expected = torch.tensor([min(r * x, min(max(r, 0.7), 1.4) * x) for r, x in pairs])
        hint = "clip below at 1 - low, above at 1 + high; then the smaller one"
        same(answer(ratio, a, 0.3, 0.4), expected, hint)


def k3(answer):
    for g in draws():
        new, ref = rand(g, 3, 4), rand(g, 3, 4)
        got = unchanged(answer, new, ref)
        negative = "it is negative somewhere: d is ref - new, and the estimate is exp(d) - d - 1"
        assert (got >= -1e-6).all(), negative
        hint = "d is ref - new; the other way round it estimates another divergence"
        same(got, torch.exp(ref - new) - (ref - new) - 1, hint)


def zero_spread(answer):
    for g in draws():
        p, size = float(torch.rand(1, generator=g)), whole(g, 2, 9)
        outcomes = [[(i >> k) & 1 for k in range(size)] for i in range(2**size)]
        alike = [row for row in outcomes if len(set(row)) == 1]
        expected = sum(math.prod(p if x else 1 - p for x in row) for row in alike)
        same(answer(p, size), expected, "all right or all wrong: two ways to have no spread")


def token_mean(answer):
    for g in draws():
        loss, mask = rand(g, 4, 6), torch.rand(4, 6, generator=g) < 0.6
        mask[0, 0], mask[1] = True, False
        expected = sum(loss[mask].tolist()) / int(mask.sum())
        moved = "the answer changes when padding changes: padding must not reach the mean"
        assert abs(float(answer(torch.where(mask, loss, 1e6), mask))) < 1e3, moved
        same(answer(loss, mask), expected, "the mean of the valid tokens: divided by how many?")
        nan = torch.as_tensor(answer(torch.where(mask, loss, torch.nan), mask))
        assert not nan.isnan(), "nan in the padding gets through: nan * 0 is nan; use torch.where"
    nothing = torch.as_tensor(answer(loss, torch.zeros_like(mask)))
    assert float(nothing) == 0, "a batch without a valid token should give 0, not nan: 0 / 0 is nan"


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
        hint = "pixels whose differences add up to less than 60 (mind: uint8 is never below 0)"
        same(got, near / 256, hint)
        assert (picture == before).all(), "it writes into the picture: work on a copy"


def frozen_reference(answer):
    for g in draws(2):
        policy = torch.nn.Linear(3, 2)
        with torch.no_grad():
            policy.weight.copy_(rand(g, 2, 3))
        before, reference = copy.deepcopy(policy.weight.detach()), answer(policy)
        same(reference.weight.detach(), before, "the reference should start as the policy is")
        assert policy.weight.requires_grad, "the policy can't learn any more: freeze only the copy"
        with torch.no_grad():
            policy.weight.add_(1.0)
        hint = "the policy took a step, and the KL is still 0: compare the weights of the two"
        same(reference.weight.detach(), before, hint)
        asks = any(w.requires_grad for w in reference.parameters())
        assert not asks, "the reference asks for gradients: an optimizer may move it"


def best_of_n(answer):
    for g in draws():
        p, n = torch.rand(7, generator=g), whole(g, 2, 12)
        expected = torch.tensor([1 - math.prod(1 - x for _ in range(n)) for x in p.tolist()]).mean()
        got = torch.as_tensor(answer(p, n))
        pooled = torch.allclose(got.double(), 1 - (1 - p.double().mean()) ** n, atol=1e-6)
        assert not pooled, "first the chance of each prompt, then the mean: the order matters"
        same(got, expected, "wrong only if all n are wrong")


# ---------------------------------------------------------------- 09 kernels


def logits_bytes(answer):
    for n, t, v in ((1, 1, 1), (16, 1024, 128256)):
        hint = "three float32 numbers, of 4 bytes each, for each of the N·T·V logits"
        same(float(answer(n, t, v)), 12.0 * n * t * v, hint, 0.5)


def passing(chunks):
    """The pieces one at a time: each is gone once the next one is asked for."""
    for chunk in chunks:
        piece = chunk.clone()
        yield piece
        piece.fill_(torch.nan)


def online_logsumexp(answer):
    for g in draws():
        logits = 5 * rand(g, 3, 12)
        got = answer(passing(logits.split((4, 3, 5), 1)))
        kept = "a piece was used after the next was asked for: keep two numbers a row"
        assert torch.is_tensor(got) and not got.isnan().any(), kept
        same(got, logits.logsumexp(1), "rescale the sum by exp(old maximum - new maximum)", 1e-4)
    big = torch.tensor([[1000.0, 0.0, 2000.0, 0.0]])
    got = answer(passing(big.split(2, 1)))
    assert got.isfinite().all(), "overflow: subtract the maximum before you take exp"
    same(got, big.logsumexp(1), "right for small logits, wrong for large ones")


def logprob_gradient(answer):
    for g in draws():
        logits, tokens = rand(g, 4, 6).requires_grad_(), torch.randint(0, 6, (4,), generator=g)
        F.log_softmax(logits, 1).gather(1, tokens[:, None]).sum().backward()
        got = unchanged(answer, logits.detach(), tokens)
        turned = torch.is_tensor(got) and torch.allclose(got, -logits.grad, atol=1e-5)
        assert not turned, "the sign: the chosen id's logit should go up"
        same(got, logits.grad, "one-hot of the chosen id minus the probabilities")


def attainable(answer):
    same(float(answer(1.0, 100.0, 10.0)), 10.0, "few operations a byte: memory decides")
    same(float(answer(50.0, 100.0, 10.0)), 100.0, "many operations a byte: the peak decides")
    for g in draws():
        x, peak, bandwidth = (float(v) for v in torch.rand(3, generator=g) * 100)
        expected = min(peak, x * bandwidth)
        same(float(answer(x, peak, bandwidth)), expected, "the lower one of two roofs", 1e-3)


# ---------------------------------------------------------------- 10 reading results


def equal_diversity(answer):
    fronts = {0.4: ([(0.2, 0.9), (0.6, 0.7)], 0.8),
              0.45: ([(0.6, 0.5), (0.1, 0.8), (0.3, 0.8)], 0.65),
              0.5: ([(0.5, 0.4), (0.7, 0.3)], 0.4)}  # fmt: skip
    for diversity, (points, expected) in fronts.items():
        got = answer(list(points), diversity)
        assert got is not None, f"the front {points} reaches diversity {diversity}"
        hint = f"the front {points} at diversity {diversity}: a straight line between two points"
        same(float(got), expected, hint)
    for beyond in (0.1, 0.8):
        got = answer([(0.2, 0.9), (0.6, 0.7)], beyond)
        assert got is None, f"a front from 0.2 to 0.6 does not reach {beyond}: return None"


def wilson(answer):
    for k, n in ((8, 10), (0, 20), (50, 50), (311, 1024)):
        p, z = k / n, 1.96
        got = answer(k, n)
        assert isinstance(got, tuple) and len(got) == 2, "return two numbers: low, high"
        for edge in got:  # where the observed share is 1.96 standard errors away
            apart = abs(p - edge) - z * math.sqrt(max(edge * (1 - edge), 0.0) / n)
            hint = f"{k} of {n}: {edge:.4f} is no edge of the Wilson interval; see the docstring"
            assert abs(apart) < 1e-6, hint
        hint = f"{k} of {n}: the interval should hold the observed share, low first"
        assert got[0] <= p + 1e-9 and p - 1e-9 <= got[1] and got[0] < got[1], hint


def paired_interval(answer):
    rng = np.random.default_rng(0)
    for n in (3, 5, 8):
        easy = rng.normal(0.6, 0.2, n)
        a, b = easy + rng.normal(0.05, 0.01, n), easy
        d, t = a - b, {3: 4.303, 5: 2.776, 8: 2.365}[n]
        half = t * d.std(ddof=1) / math.sqrt(n)
        got = torch.tensor(answer(a, b, t), dtype=torch.float64)
        hint = "differences first, seed by seed; then mean ± t · std(ddof=1) / sqrt(n)"
        same(got, torch.tensor([d.mean() - half, d.mean() + half]), hint)
