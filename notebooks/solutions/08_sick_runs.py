"""Solutions of the lab of sick runs."""


def first_pass_gap(logprobs, old_logprobs, mask):
    valid = mask > 0
    return (logprobs[valid] - old_logprobs[valid]).abs().max() if valid.any() else 0.0


def alarm(values, limit, patience):
    above = 0
    for step, value in enumerate(values):
        above = above + 1 if value > limit else 0
        if above == patience:
            return step
    return None


def diagnosis():
    return {
        "A": ("clip", "largest ratio"), "B": ("kl", "kl"), "C": ("hacked", "judge"),
        "D": ("temperature", "outside"), "E": ("no spread", "zero spread"),
        "F": ("entropy", "entropy"),
    }  # fmt: skip
