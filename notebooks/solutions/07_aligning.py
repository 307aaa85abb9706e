"""Solutions of notebook 07."""

import copy

import numpy as np


def color_share(picture, color):
    return (np.abs(picture.astype(int) - np.array(color)).sum(-1) < 60).mean()


def frozen_reference(policy):
    """Two bugs in one: it is the policy itself and no copy of it, and it can be trained."""
    return copy.deepcopy(policy).eval().requires_grad_(False)


def best_of_n(p, n):
    return (1 - (1 - p) ** n).mean()
