"""Plausible wrong answers to the exercises of the course, which every check has to refuse.

A name is that of the exercise, two underscores, and what is wrong. What takes one expression stands
in a table of its exercise, below what takes more. `right` gives the solution where only one thing
about it is to be spoiled.
"""

import copy
import math

import course
import numpy as np
import torch
import torch.nn.functional as F

right, ANSWERS = course.solution, {}  # {exercise__what: a wrong answer}


def wrong(exercise, **answers):
    """Keep the answers of one exercise."""
    ANSWERS.update({f"{exercise}__{what}": answer for what, answer in answers.items()})


# ---------------------------------------------------------------- 01 the world and its tokens


def cut_patches__no_permute(picture, p):
    side = picture.shape[0] // p
    return picture.reshape(side * side, p * p * 3)


def cut_patches__column_by_column(picture, p):
    side = picture.shape[0] // p
    patches = picture.reshape(side, p, side, p, 3).permute(2, 0, 1, 3, 4)
    return patches.reshape(side * side, p * p * 3)


def cut_patches__channels_first(picture, p):
    rows = right("cut_patches")(picture, p)
    return rows.reshape(len(rows), p * p, 3).transpose(1, 2).reshape(len(rows), -1)


wrong(
    "nearest_code",
    without_the_square=lambda patches, entries: (patches @ entries.T).argmax(1),
    farthest=lambda patches, entries: torch.cdist(patches, entries).argmax(1),
    one_patch_for_each_entry=lambda patches, entries: torch.cdist(patches, entries).argmin(0),
)


def kmeans_step__divides_by_zero(patches, entries):
    onehot = F.one_hot(torch.cdist(patches, entries).argmin(1), len(entries)).float()
    return onehot.T @ patches / onehot.sum(0)[:, None]


def kmeans_step__unused_entries_become_zero(patches, entries):
    onehot = F.one_hot(torch.cdist(patches, entries).argmin(1), len(entries)).float()
    return onehot.T @ patches / onehot.sum(0).clamp(min=1)[:, None]


wrong(
    "kmeans_step",
    in_place=lambda patches, entries: entries.copy_(right("kmeans_step")(patches, entries)),
)


# ---------------------------------------------------------------- 02 one transformer


def causal_attention__not_itself(q, k, v):
    scores = q @ k.mT / q.shape[-1] ** 0.5
    visible = torch.ones_like(scores, dtype=torch.bool).tril(-1)
    return scores.masked_fill(~visible, -1e9).softmax(-1) @ v


wrong(
    "causal_attention",
    width_four=lambda q, k, v: right("causal_attention")(q * q.shape[-1] ** 0.5 / 2, k, v),
    sees_the_future=lambda q, k, v: F.scaled_dot_product_attention(q, k, v),
    masked_after_the_softmax=lambda q, k, v: (
        (q @ k.mT / q.shape[-1] ** 0.5).softmax(-1).tril() @ v),
)  # fmt: skip


def attend_next__not_itself(q, k, v, keys, values):
    result = (keys @ q / len(q) ** 0.5).softmax(0) @ values
    return result, torch.cat((keys, k[None])), torch.cat((values, v[None]))


def attend_next__newest_first(q, k, v, keys, values):
    keys, values = torch.cat((k[None], keys)), torch.cat((v[None], values))
    return (keys @ q / len(q) ** 0.5).softmax(0) @ values, keys, values


def attend_next__forgets_the_root(q, k, v, keys, values):
    keys, values = torch.cat((keys, k[None])), torch.cat((values, v[None]))
    return (keys @ q).softmax(0) @ values, keys, values


def allowed_probs__masked_after_the_softmax(logits, first, last, temperature):
    ids = torch.arange(len(logits))
    return (logits / temperature).softmax(0) * ((ids >= first) & (ids < last))


def allowed_probs__logits_zero_outside(logits, first, last, temperature):
    ids = torch.arange(len(logits))
    return (logits / temperature * ((ids >= first) & (ids < last))).softmax(0)


wrong(
    "allowed_probs",
    in_place=lambda logits, *how: logits.copy_(right("allowed_probs")(logits, *how)),
    last_included=lambda logits, first, last, t: right("allowed_probs")(logits, first, last + 1, t),
)


# ---------------------------------------------------------------- 03 pre-training and noise


def noise_floor__nan_for_zero(shares):
    p = torch.tensor(shares)
    return -(p * p.log()).sum()


def next_token_logprobs__scores_what_was_read(hidden, head, tokens):
    logits = hidden[:, :-1] @ head.T
    return logits.log_softmax(-1).gather(2, tokens[:, :-1, None])[..., 0]


def next_token_logprobs__normalised_over_places(hidden, head, tokens):
    logits = hidden[:, :-1] @ head.T
    return logits.log_softmax(1).gather(2, tokens[:, 1:, None])[..., 0]


wrong(
    "noise_floor",
    in_bits=lambda shares: sum(-p * math.log2(p) for p in shares if p > 0),
    of_the_likeliest_only=lambda shares: -math.log(max(shares)),
)
wrong(
    "sharpened",
    not_normalised=lambda p, temperature: p ** (1 / temperature),
    power_of_the_temperature=lambda p, temperature: p**temperature / (p**temperature).sum(),
    softmax_of_probabilities=lambda p, temperature: (p / temperature).softmax(0),
)
wrong(
    "next_token_logprobs",
    probabilities=lambda *inputs: right("next_token_logprobs")(*inputs).exp(),
)


# ---------------------------------------------------------------- 04 rewards


def agreement__ties_count_as_lost(rewards, right):
    pair = right[:, :, None] & ~right[:, None, :]
    return (rewards[:, :, None] > rewards[:, None, :])[pair].float().mean()


def agreement__across_prompts(rewards, right):
    difference = rewards[right][:, None] - rewards[~right]
    return ((difference > 0).float() + 0.5 * (difference == 0)).mean()


def agreement__mean_of_the_prompts(rewards, right):
    one = course.solution("agreement")
    return torch.stack([one(r[None], ok[None]) for r, ok in zip(rewards, right)]).mean()


wrong(
    "info_nce",
    rows_only=lambda scores: F.cross_entropy(scores, torch.arange(len(scores))),
    sum_of_both=lambda scores: 2 * right("info_nce")(scores),
    one_softmax_over_all_pairs=lambda scores: (
        -scores.flatten().log_softmax(0).view_as(scores).diagonal().mean()),
)  # fmt: skip
wrong(
    "bradley_terry",
    upside_down=lambda better, worse: -F.logsigmoid(worse - better).mean(),
    overflows=lambda better, worse: -torch.sigmoid(better - worse).log().mean(),
    probability=lambda better, worse: 1 - torch.sigmoid(better - worse).mean(),
)


# ---------------------------------------------------------------- 05 from a bandit to GRPO


def onehot(arm, theta):
    return F.one_hot(torch.tensor(arm), len(theta)).to(theta)


def importance_estimate__divided_by_the_weights(logprobs, old_logprobs, values):
    ratio = (logprobs - old_logprobs).exp()
    return (ratio * values).sum() / ratio.sum()


wrong(
    "reinforce",
    only_the_pulled_arm=lambda theta, arm, reward: reward * onehot(arm, theta),
    logits_as_probabilities=lambda theta, arm, reward: reward * (onehot(arm, theta) - theta),
    gradient_of_the_probability=lambda theta, arm, reward: (
        theta.softmax(0)[arm] * right("reinforce")(theta, arm, reward)),
    downhill=lambda theta, arm, reward: -right("reinforce")(theta, arm, reward),
    without_the_reward=lambda theta, arm, reward: right("reinforce")(theta, arm, 1.0),
    another_estimate_with_that_mean=lambda theta, arm, reward: (
        right("reinforce")(theta, arm, reward + 1.0)),
)  # fmt: skip
wrong(
    "unbiased_advantages",
    mean_of_the_whole_group=lambda rewards: rewards - rewards.mean(),
    divided_by_the_std=lambda rewards: (rewards - rewards.mean()) / (rewards.std() + 1e-4),
    best_of_the_group=lambda rewards: rewards - rewards.max(),
    wrong_correction=lambda rewards: (rewards - rewards.mean()) * (1 + 1 / len(rewards)),
    no_baseline=lambda rewards: rewards.clone(),
    a_constant_of_the_wrong_sign=lambda rewards: rewards + 5.0,
)
wrong(
    "importance_estimate",
    old_over_new=lambda new, old, values: ((old - new).exp() * values).mean(),
    detached=lambda new, old, values: ((new.detach() - old).exp() * values).mean(),
    log_ratio=lambda new, old, values: ((new - old) * values).mean(),
    sum=lambda new, old, values: ((new - old).exp() * values).sum(),
)


# ---------------------------------------------------------------- 06 GRPO by hand


def advantages__population_std(rewards):
    std = rewards.std(1, keepdim=True, correction=0)
    return (rewards - rewards.mean(1, keepdim=True)) / (std + 1e-4)


def token_mean__mean_of_the_rows(per_token, mask):
    kept = torch.where(mask, per_token, 0.0)
    return (kept.sum(1) / mask.sum(1).clamp(min=1)).mean()


wrong(
    "advantages",
    other_eps=lambda r: (r - r.mean(1, keepdim=True)) / (r.std(1, keepdim=True) + 1e-8),
    mean_of_the_batch=lambda r: (r - r.mean()) / (r.std() + 1e-4),
)
wrong(
    "clipped_objective",
    detached=lambda *inputs: right("clipped_objective")(*inputs).detach(),
    always_clipped=lambda ratio, a, low, high: ratio.clamp(1 - low, 1 + high) * a,
    one_range=lambda ratio, a, low, high: right("clipped_objective")(ratio, a, low, low),
)
wrong(
    "token_mean",
    nothing_valid=lambda x, mask: torch.where(mask, x, 0.0).sum() / mask.sum(),
    nan_times_zero=lambda x, mask: (x * mask).sum() / mask.sum().clamp(min=1),
)
wrong(
    "k3",
    other_direction=lambda logprobs, ref_logprobs: right("k3")(ref_logprobs, logprobs),
    k1=lambda logprobs, ref_logprobs: logprobs - ref_logprobs,
    k2=lambda logprobs, ref_logprobs: 0.5 * (logprobs - ref_logprobs) ** 2,
)
wrong(
    "zero_spread",
    all_right_only=lambda p, group_size: p**group_size,
    the_opposite=lambda p, group_size: 1 - p**group_size - (1 - p) ** group_size,
)


# ---------------------------------------------------------------- 07 aligning a model


def frozen_reference__freezes_the_policy(policy):
    reference = copy.deepcopy(policy)
    policy.requires_grad_(False)
    return reference.requires_grad_(False)


wrong(
    "color_share",
    every_channel=lambda x, color: (np.abs(x.astype(int) - np.array(color)) < 60).all(-1).mean(),
    uint8=lambda x, color: (np.abs(x - np.array(color, np.uint8)).sum(-1) < 60).mean(),
    sixty_included=lambda x, color: (np.abs(x.astype(int) - color).sum(-1) <= 60).mean(),
)
wrong(
    "frozen_reference",
    trainable=lambda policy: copy.deepcopy(policy).eval(),
    shared_weights=copy.copy,
    fresh_weights=lambda policy: torch.nn.Linear(3, 2).requires_grad_(False),
)
wrong(
    "best_of_n",
    of_the_mean_prompt=lambda p, n: 1 - (1 - p.mean()) ** n,
    all_right=lambda p, n: (p**n).mean(),
    linear=lambda p, n: (n * p).clamp(max=1).mean(),
)


# ---------------------------------------------------------------- 08 sick runs


def alarm__not_on_end(values, limit, patience):
    above = [step for step, value in enumerate(values) if value > limit]
    return above[patience - 1] if len(above) >= patience else None


def alarm__at_the_limit_too(values, limit, patience):
    above = 0
    for step, value in enumerate(values):
        above = above + 1 if value >= limit else 0
        if above == patience:
            return step
    return None


def alarm__the_step_where_it_began(values, limit, patience):
    step = right("alarm")(values, limit, patience)
    return None if step is None else step - patience + 1


def diagnosis__two_logs_exchanged():
    logs = right("diagnosis")()
    return logs | {"B": logs["C"], "C": logs["B"]}


wrong(
    "first_pass_gap",
    with_the_padding=lambda new, old, mask: (new - old).abs().nan_to_num(posinf=9.0).max(),
    upwards_only=lambda new, old, mask: (new - old)[mask].max() if mask.any() else 0.0,
    masked_after_the_subtraction=lambda new, old, mask: ((new - old).abs() * mask).max(),
)
wrong(
    "diagnosis",
    the_reward_shows_everything=lambda: {
        letter: (cause, "reward") for letter, (cause, _) in right("diagnosis")().items()},
)  # fmt: skip


# ---------------------------------------------------------------- 09 kernels


def online_logsumexp__never_rescales(chunks):
    largest, total = None, 0.0
    for z in chunks:
        new = z.amax(1) if largest is None else torch.maximum(largest, z.amax(1))
        total, largest = total + torch.exp(z - new[:, None]).sum(1), new
    return largest + total.log()


wrong(
    "logprob_gradient",
    downhill=lambda logits, tokens: -right("logprob_gradient")(logits, tokens),
    only_the_chosen=lambda logits, tokens: (
        F.one_hot(tokens, logits.shape[1]) * (1 - logits.softmax(1))),
    mean=lambda logits, tokens: right("logprob_gradient")(logits, tokens) / len(logits),
)  # fmt: skip
wrong(
    "logits_bytes",
    one_copy=lambda n, t, v: 4 * n * t * v,
    sixteen_bits=lambda n, t, v: 3 * 2 * n * t * v,
)
wrong(
    "online_logsumexp",
    keeps_all=lambda chunks: torch.cat(list(chunks), 1).logsumexp(1),
    no_maximum=lambda chunks: sum(z.exp().sum(1) for z in chunks).log(),
    maximum_only=lambda chunks: torch.stack([z.amax(1) for z in chunks]).amax(0),
)
wrong(
    "attainable",
    higher_roof=lambda intensity, peak, bandwidth: max(peak, intensity * bandwidth),
    no_peak=lambda intensity, peak, bandwidth: intensity * bandwidth,
    divided=lambda intensity, peak, bandwidth: min(peak, bandwidth / intensity),
)


# ---------------------------------------------------------------- 10 reading results


def equal_diversity__extrapolates(points, diversity):
    (d0, q0), *_, (d1, q1) = sorted(points)
    return q0 + (q1 - q0) * (diversity - d0) / (d1 - d0) if diversity <= d1 else None


def equal_diversity__in_the_order_given(points, diversity):
    for (d0, q0), (d1, q1) in zip(points, points[1:]):
        if min(d0, d1) <= diversity <= max(d0, d1):
            return q0 + (q1 - q0) * (diversity - d0) / (d1 - d0)
    return None


def equal_diversity__nearest_point(points, diversity):
    distances = [abs(d - diversity) for d, _ in points]
    inside = min(points)[0] <= diversity <= max(points)[0]
    return points[distances.index(min(distances))][1] if inside else None


def wilson__normal_approximation(k, n):
    p = k / n
    half = 1.96 * math.sqrt(p * (1 - p) / n)
    return p - half, p + half


def wilson__ninety_percent(k, n):
    p, z = k / n, 1.645
    half = z * math.sqrt(p * (1 - p) / n + z * z / (4 * n * n))
    centre, scale = p + z * z / (2 * n), 1 + z * z / n
    return (centre - half) / scale, (centre + half) / scale


def paired_interval__not_paired(a, b, t):
    half = t * math.sqrt((a.var(ddof=1) + b.var(ddof=1)) / len(a))
    return a.mean() - b.mean() - half, a.mean() - b.mean() + half


def paired_interval__population_std(a, b, t):
    d = a - b
    half = t * d.std() / math.sqrt(len(d))
    return d.mean() - half, d.mean() + half


def paired_interval__of_single_seeds(a, b, t):
    d = a - b
    return d.mean() - t * d.std(ddof=1), d.mean() + t * d.std(ddof=1)


wrong("wilson", high_first=lambda k, n: right("wilson")(k, n)[::-1])


ANSWERS.update({name: value for name, value in globals().items() if "__" in name.strip("_")})
