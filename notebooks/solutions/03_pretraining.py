"""Solutions of notebook 03."""

import math


def noise_floor(shares):
    return sum(-p * math.log(p) for p in shares if p > 0)


def sharpened(p, temperature):
    p = p ** (1 / temperature)
    return p / p.sum()


def next_token_logprobs(hidden, head, tokens):
    """The bug: `hidden[:, 1:]`, the states after the tokens that they score, in place of `hidden[:,
    :-1]`."""
    logits = hidden[:, :-1] @ head.T
    return logits.log_softmax(-1).gather(2, tokens[:, 1:, None])[..., 0]
