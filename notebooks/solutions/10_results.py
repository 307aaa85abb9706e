"""Solutions of notebook 10."""

import itertools
import math

import numpy as np


def equal_diversity(points, diversity):
    for (d0, q0), (d1, q1) in itertools.pairwise(sorted(points)):
        if d0 <= diversity <= d1:
            return q0 + (q1 - q0) * (diversity - d0) / (d1 - d0)
    return None


def wilson(k, n):
    p, z = k / n, 1.96
    centre, scale = p + z * z / (2 * n), 1 + z * z / n
    half = z * math.sqrt(p * (1 - p) / n + z * z / (4 * n * n))
    return (centre - half) / scale, (centre + half) / scale


def paired_interval(a, b, t):
    d = a - b
    half = t * np.std(d, ddof=1) / math.sqrt(len(d))
    return d.mean() - half, d.mean() + half
