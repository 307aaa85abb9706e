"""Homework: replace the bodies, and the values that are None; see homework.md.

    $ python notebooks/teaching/autograder.py notebooks/teaching/homework.py --seed 0
    Q1   0/25  dr_grpo_advantages: not written yet; dr_grpo_mean: not written yet
    ...
    total 0/100

Use numpy and the standard library. Do not modify the inputs.
"""

import numpy as np

# ---------------------------------------------------------------- question 1: Dr. GRPO


def dr_grpo_advantages(rewards):
    """rewards (B, G) -> advantages (B, G): minus the mean of the group, not divided by a std."""
    raise NotImplementedError


def dr_grpo_mean(per_token, mask, max_tokens):
    """per_token (N, T), mask (N, T) of bools -> one number: the sum over the valid tokens, divided
    by N * max_tokens, whatever the lengths. Invalid positions may hold nan."""
    raise NotImplementedError


# ---------------------------------------------------------------- question 2: a loophole


def naive_reward(key, answer):
    """The reward with the loophole, given: what share of the key's words does the answer name?
    key, answer: lists of words."""
    return float(np.mean([word in answer for word in key]))


def cheat(vocabulary):
    """An answer (a list of words) that gets naive_reward 1 for every key over a vocabulary (a list
    of words), without knowing the key."""
    raise NotImplementedError


def patched_reward(key, answer):
    """A reward from 0 to 1 without the loophole. 1 if the answer has the words of the key, each as
    often as in the key, in any order; less otherwise. Of two answers as long as the key, the one
    with more right words gets more. Naming all words of a vocabulary of 22 gets less than a
    half-right answer as long as the key, for keys of 4 and 6 words."""
    raise NotImplementedError


# ---------------------------------------------------------------- question 3: two methods

# Student's t for a 95% interval, by the degrees of freedom.
T = {1: 12.706, 2: 4.303, 3: 3.182, 4: 2.776, 5: 2.571, 6: 2.447, 7: 2.365, 8: 2.306, 9: 2.262}


def compare(ours, theirs):
    """Scores of two methods, {seed: score} each -> (low, high, verdict): the 95% interval of the
    mean difference ours - theirs over the seeds that both have, paired by seed; and "better" if it
    lies above 0, "worse" if below, else "undetermined"."""
    raise NotImplementedError


# ---------------------------------------------------------------- question 4: group size

# A prompt is answered right with probability p, a group has G candidates, rewards are 1 or 0.
ZERO_SPREAD = None  # p = 0.4, G = 4: the share of groups in which all rewards are equal
WITH_SPREAD = None  # p = 0.05, 64 samples per step: (groups with spread at G = 4, and at G = 16)
LEAST_GROUP = None  # p = 0.1: the smallest G at which 90% of the groups have a spread

# ---------------------------------------------------------------- question 5: true or false

# What changes with Dr. GRPO? Each True or False.
STATEMENTS = {
    "a": None,  # the rewards [0.501, 0.5, 0.5, 0.5] push as hard as [1, 0, 0, 0]
    "b": None,  # a token of a long answer weighs as much as one of a short answer
    "c": None,  # an advantage can have a different sign than with the std
    "d": None,  # ten times the rewards give ten times the advantages
    "e": None,  # with --reduction sequence, a long wrong answer is punished less for each token
    "f": None,  # for answers of one length, the loss of the first pass is 0, as in GRPO
}
