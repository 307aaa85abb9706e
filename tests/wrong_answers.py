"""Plausible wrong answers to the exercises of the course, which every check has to refuse.

A name is that of the exercise, two underscores, and what is wrong. `right` gives the solution where
only one thing about it is to be spoiled.
"""

import copy
import math

import course
import numpy as np
import torch
import torch.nn.functional as F

right = course.solution


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


def nearest_code__without_the_square(patches, entries):
    return (patches @ entries.T).argmax(1)


def nearest_code__farthest(patches, entries):
    return torch.cdist(patches, entries).argmax(1)


def nearest_code__one_patch_for_each_entry(patches, entries):
    return torch.cdist(patches, entries).argmin(0)


def kmeans_step__in_place(patches, entries):
    return entries.copy_(right("kmeans_step")(patches, entries))


def kmeans_step__divides_by_zero(patches, entries):
    onehot = F.one_hot(torch.cdist(patches, entries).argmin(1), len(entries)).float()
    return onehot.T @ patches / onehot.sum(0)[:, None]


def kmeans_step__unused_entries_become_zero(patches, entries):
    onehot = F.one_hot(torch.cdist(patches, entries).argmin(1), len(entries)).float()
    return onehot.T @ patches / onehot.sum(0).clamp(min=1)[:, None]


# ---------------------------------------------------------------- 02 one transformer


def causal_attention__width_four(q, k, v):
    return right("causal_attention")(q * q.shape[-1] ** 0.5 / 2, k, v)


def causal_attention__sees_the_future(q, k, v):
    return F.scaled_dot_product_attention(q, k, v)


def causal_attention__not_itself(q, k, v):
    scores = q @ k.mT / q.shape[-1] ** 0.5
    visible = torch.ones_like(scores, dtype=torch.bool).tril(-1)
    return scores.masked_fill(~visible, -1e9).softmax(-1) @ v


def causal_attention__masked_after_the_softmax(q, k, v):
    return (q @ k.mT / q.shape[-1] ** 0.5).softmax(-1).tril() @ v


def attend_next__not_itself(q, k, v, keys, values):
    result = (keys @ q / len(q) ** 0.5).softmax(0) @ values
    return result, torch.cat((keys, k[None])), torch.cat((values, v[None]))


def attend_next__newest_first(q, k, v, keys, values):
    keys, values = torch.cat((k[None], keys)), torch.cat((v[None], values))
    return (keys @ q / len(q) ** 0.5).softmax(0) @ values, keys, values


def attend_next__forgets_the_root(q, k, v, keys, values):
    keys, values = torch.cat((keys, k[None])), torch.cat((values, v[None]))
    return (keys @ q).softmax(0) @ values, keys, values


def allowed_probs__in_place(logits, first, last, temperature):
    return logits.copy_(right("allowed_probs")(logits, first, last, temperature))


def allowed_probs__masked_after_the_softmax(logits, first, last, temperature):
    ids = torch.arange(len(logits))
    return (logits / temperature).softmax(0) * ((ids >= first) & (ids < last))


def allowed_probs__logits_zero_outside(logits, first, last, temperature):
    ids = torch.arange(len(logits))
    return (logits / temperature * ((ids >= first) & (ids < last))).softmax(0)


def allowed_probs__last_included(logits, first, last, temperature):
    return right("allowed_probs")(logits, first, last + 1, temperature)


# ---------------------------------------------------------------- 03 pre-training and noise


def noise_floor__in_bits(shares):
    return sum(-p * math.log2(p) for p in shares if p > 0)


def noise_floor__of_the_likeliest_only(shares):
    return -math.log(max(shares))


def noise_floor__nan_for_zero(shares):
    p = torch.tensor(shares)
    return -(p * p.log()).sum()


def sharpened__not_normalised(p, temperature):
    return p ** (1 / temperature)


def sharpened__power_of_the_temperature(p, temperature):
    return p**temperature / (p**temperature).sum()


def sharpened__softmax_of_probabilities(p, temperature):
    return (p / temperature).softmax(0)


def next_token_logprobs__scores_what_was_read(hidden, head, tokens):
    logits = hidden[:, :-1] @ head.T
    return logits.log_softmax(-1).gather(2, tokens[:, :-1, None])[..., 0]


def next_token_logprobs__probabilities(hidden, head, tokens):
    return right("next_token_logprobs")(hidden, head, tokens).exp()


def next_token_logprobs__normalised_over_places(hidden, head, tokens):
    logits = hidden[:, :-1] @ head.T
    return logits.log_softmax(1).gather(2, tokens[:, 1:, None])[..., 0]


# ---------------------------------------------------------------- 04 rewards


def info_nce__rows_only(scores):
    return F.cross_entropy(scores, torch.arange(len(scores)))


def info_nce__sum_of_both(scores):
    return 2 * right("info_nce")(scores)


def info_nce__one_softmax_over_all_pairs(scores):
    return -scores.flatten().log_softmax(0).view_as(scores).diagonal().mean()


def agreement__ties_count_as_lost(rewards, right):
    pair = right[:, :, None] & ~right[:, None, :]
    return (rewards[:, :, None] > rewards[:, None, :])[pair].float().mean()


def agreement__across_prompts(rewards, right):
    difference = rewards[right][:, None] - rewards[~right]
    return ((difference > 0).float() + 0.5 * (difference == 0)).mean()


def agreement__mean_of_the_prompts(rewards, right):
    one = course.solution("agreement")
    return torch.stack([one(r[None], ok[None]) for r, ok in zip(rewards, right)]).mean()


def bradley_terry__upside_down(better, worse):
    return -F.logsigmoid(worse - better).mean()


def bradley_terry__overflows(better, worse):
    return -torch.sigmoid(better - worse).log().mean()


def bradley_terry__probability(better, worse):
    return 1 - torch.sigmoid(better - worse).mean()


# ---------------------------------------------------------------- 05 from a bandit to GRPO


def reinforce__only_the_pulled_arm(theta, arm, reward):
    return reward * F.one_hot(torch.tensor(arm), len(theta)).to(theta)


def reinforce__gradient_of_the_probability(theta, arm, reward):
    return theta.softmax(0)[arm] * right("reinforce")(theta, arm, reward)


def reinforce__downhill(theta, arm, reward):
    return -right("reinforce")(theta, arm, reward)


def reinforce__without_the_reward(theta, arm, reward):
    return right("reinforce")(theta, arm, 1.0)


def reinforce__logits_as_probabilities(theta, arm, reward):
    return reward * (F.one_hot(torch.tensor(arm), len(theta)) - theta)


def reinforce__another_estimate_with_that_mean(theta, arm, reward):
    return right("reinforce")(theta, arm, reward + 1.0)


def unbiased_advantages__mean_of_the_whole_group(rewards):
    return rewards - rewards.mean()


def unbiased_advantages__divided_by_the_std(rewards):
    return (rewards - rewards.mean()) / (rewards.std() + 1e-4)


def unbiased_advantages__best_of_the_group(rewards):
    return rewards - rewards.max()


def unbiased_advantages__wrong_correction(rewards):
    return (rewards - rewards.mean()) * (len(rewards) + 1) / len(rewards)


def unbiased_advantages__no_baseline(rewards):
    return rewards.clone()


def unbiased_advantages__a_constant_of_the_wrong_sign(rewards):
    return rewards + 5.0


def importance_estimate__old_over_new(logprobs, old_logprobs, values):
    return ((old_logprobs - logprobs).exp() * values).mean()


def importance_estimate__detached(logprobs, old_logprobs, values):
    return ((logprobs.detach() - old_logprobs).exp() * values).mean()


def importance_estimate__divided_by_the_weights(logprobs, old_logprobs, values):
    ratio = (logprobs - old_logprobs).exp()
    return (ratio * values).sum() / ratio.sum()


def importance_estimate__log_ratio(logprobs, old_logprobs, values):
    return ((logprobs - old_logprobs) * values).mean()


def importance_estimate__sum(logprobs, old_logprobs, values):
    return ((logprobs - old_logprobs).exp() * values).sum()


# ---------------------------------------------------------------- 06 GRPO by hand


def advantages__other_eps(rewards):
    return (rewards - rewards.mean(1, keepdim=True)) / (rewards.std(1, keepdim=True) + 1e-8)


def advantages__population_std(rewards):
    std = rewards.std(1, keepdim=True, correction=0)
    return (rewards - rewards.mean(1, keepdim=True)) / (std + 1e-4)


def advantages__mean_of_the_batch(rewards):
    return (rewards - rewards.mean()) / (rewards.std() + 1e-4)


def clipped_objective__detached(ratio, advantage, low, high):
    return right("clipped_objective")(ratio, advantage, low, high).detach()


def clipped_objective__always_clipped(ratio, advantage, low, high):
    return ratio.clamp(1 - low, 1 + high) * advantage


def clipped_objective__one_range(ratio, advantage, low, high):
    return right("clipped_objective")(ratio, advantage, low, low)


def k3__other_direction(logprobs, ref_logprobs):
    return right("k3")(ref_logprobs, logprobs)


def k3__k1(logprobs, ref_logprobs):
    return logprobs - ref_logprobs


def k3__k2(logprobs, ref_logprobs):
    return 0.5 * (logprobs - ref_logprobs) ** 2


def zero_spread__all_right_only(p, group_size):
    return p**group_size


def zero_spread__the_opposite(p, group_size):
    return 1 - p**group_size - (1 - p) ** group_size


def token_mean__nothing_valid(per_token, mask):
    return torch.where(mask, per_token, 0.0).sum() / mask.sum()


def token_mean__mean_of_the_rows(per_token, mask):
    kept = torch.where(mask, per_token, 0.0)
    return (kept.sum(1) / mask.sum(1).clamp(min=1)).mean()


def token_mean__nan_times_zero(per_token, mask):
    return (per_token * mask).sum() / mask.sum().clamp(min=1)


# ---------------------------------------------------------------- 07 aligning a model


def color_share__every_channel(picture, color):
    return (np.abs(picture.astype(int) - np.array(color)) < 60).all(-1).mean()


def color_share__uint8(picture, color):
    return (np.abs(picture - np.array(color, dtype=np.uint8)).sum(-1) < 60).mean()


def color_share__sixty_included(picture, color):
    return (np.abs(picture.astype(int) - np.array(color)).sum(-1) <= 60).mean()


def frozen_reference__trainable(policy):
    return copy.deepcopy(policy).eval()


def frozen_reference__freezes_the_policy(policy):
    reference = copy.deepcopy(policy)
    policy.requires_grad_(False)
    return reference.requires_grad_(False)


def frozen_reference__shared_weights(policy):
    return copy.copy(policy)


def frozen_reference__fresh_weights(policy):
    return torch.nn.Linear(3, 2).requires_grad_(False)


def best_of_n__of_the_mean_prompt(p, n):
    return 1 - (1 - p.mean()) ** n


def best_of_n__all_right(p, n):
    return (p**n).mean()


def best_of_n__linear(p, n):
    return (n * p).clamp(max=1).mean()


# ---------------------------------------------------------------- 08 sick runs


def first_pass_gap__with_the_padding(logprobs, old_logprobs, mask):
    return (logprobs - old_logprobs).abs().nan_to_num(posinf=9.0).max()


def first_pass_gap__upwards_only(logprobs, old_logprobs, mask):
    return (logprobs[mask] - old_logprobs[mask]).max() if mask.any() else 0.0


def first_pass_gap__masked_after_the_subtraction(logprobs, old_logprobs, mask):
    return ((logprobs - old_logprobs).abs() * mask).max()


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


def diagnosis__the_reward_shows_everything():
    return {letter: (cause, "reward") for letter, (cause, _) in right("diagnosis")().items()}


# ---------------------------------------------------------------- 09 kernels


def logits_bytes__one_copy(n, t, v):
    return 4 * n * t * v


def logits_bytes__sixteen_bits(n, t, v):
    return 3 * 2 * n * t * v


def online_logsumexp__keeps_all(chunks):
    return torch.cat(list(chunks), 1).logsumexp(1)


def online_logsumexp__no_maximum(chunks):
    return sum(z.exp().sum(1) for z in chunks).log()


def online_logsumexp__never_rescales(chunks):
    largest, total = None, 0.0
    for z in chunks:
        new = z.amax(1) if largest is None else torch.maximum(largest, z.amax(1))
        total, largest = total + torch.exp(z - new[:, None]).sum(1), new
    return largest + total.log()


def online_logsumexp__maximum_only(chunks):
    return torch.stack([z.amax(1) for z in chunks]).amax(0)


def logprob_gradient__downhill(logits, tokens):
    return logits.softmax(1) - F.one_hot(tokens, logits.shape[1])


def logprob_gradient__only_the_chosen(logits, tokens):
    onehot = F.one_hot(tokens, logits.shape[1])
    return onehot * (1 - logits.softmax(1))


def logprob_gradient__mean(logits, tokens):
    return right("logprob_gradient")(logits, tokens) / len(logits)


def attainable__higher_roof(intensity, peak, bandwidth):
    return max(peak, intensity * bandwidth)


def attainable__no_peak(intensity, peak, bandwidth):
    return intensity * bandwidth


def attainable__divided(intensity, peak, bandwidth):
    return min(peak, bandwidth / intensity)


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


def wilson__high_first(k, n):
    return right("wilson")(k, n)[::-1]


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
