"""Solutions of notebook 06."""

import torch


def advantages(rewards):
    return (rewards - rewards.mean(1, keepdim=True)) / (rewards.std(1, keepdim=True) + 1e-4)


def clipped_objective(ratio, advantage, low, high):
    """The bug: `max` in place of `min`."""
    clipped = ratio.clamp(1 - low, 1 + high)
    return torch.min(ratio * advantage, clipped * advantage)


def k3(logprobs, ref_logprobs):
    d = ref_logprobs - logprobs
    return torch.exp(d) - d - 1


def zero_spread(p, group_size):
    return p**group_size + (1 - p) ** group_size


def token_mean(per_token, mask):
    """Two bugs in one: padding counts in the denominator, and 0 * nan is nan."""
    return torch.where(mask, per_token, 0.0).sum() / mask.sum().clamp(min=1)
