"""Solutions of notebook 05."""


def reinforce(theta, arm, reward):
    score = -theta.softmax(0)
    score[arm] += 1
    return reward * score


def unbiased_advantages(rewards):
    """One of many: the mean of the whole group as baseline, and the factor that it costs. Equal to
    the reward minus the mean of the other samples."""
    group = len(rewards)
    return (rewards - rewards.mean()) * group / (group - 1)


def importance_estimate(logprobs, old_logprobs, values):
    return ((logprobs - old_logprobs).exp() * values).mean()
