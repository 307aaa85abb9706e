"""Solutions of notebook 02."""

import torch


def causal_attention(q, k, v):
    length, width = q.shape[1:]
    future = torch.ones(length, length, dtype=torch.bool).triu(1)
    scores = (q @ k.mT / width**0.5).masked_fill(future, -torch.inf)
    return scores.softmax(-1) @ v


def attend_next(q, k, v, keys, values):
    keys, values = torch.cat((keys, k[None])), torch.cat((values, v[None]))
    return (keys @ q / len(q) ** 0.5).softmax(0) @ values, keys, values


def allowed_probs(logits, first, last, temperature):
    ids = torch.arange(len(logits))
    return (logits / temperature).masked_fill((ids < first) | (ids >= last), -torch.inf).softmax(0)
