"""How long answers are: a distribution of lengths between nothing and the longest that is allowed.

A step of GRPO waits for its longest rollout, so the mean alone does not give its time. Lengths are taken as log-normal
with the spread below, cut at the maximum; the mean after the cut is the one that was asked for.
"""
from __future__ import annotations

from collections.abc import Mapping, Sequence
from functools import lru_cache
from statistics import NormalDist

import numpy as np

SIGMA = 0.7  # of the logarithm: a third of the answers are shorter than half of the median, or longer than twice it
POINTS = 64


@lru_cache
def _normal(points: int) -> np.ndarray:
    return np.array([NormalDist().inv_cdf((i + 0.5) / points) for i in range(points)])


@lru_cache(maxsize=1024)
def quantiles(mean: float, longest: float, points: int = POINTS, sigma: float = SIGMA) -> tuple[float, ...]:
    """`points` equally likely lengths of that mean, none above `longest`; all `longest` where the mean is as large."""
    if mean >= longest * 0.999:
        return (float(longest),) * points
    spread = np.exp(sigma * _normal(points))
    low, high = mean * 1e-3, longest * 1e4  # of the median
    for _ in range(40):
        median = (low * high) ** 0.5
        if np.minimum(longest, median * spread).mean() < mean:
            low = median
        else:
            high = median
    return tuple(np.minimum(longest, low * spread).tolist())


def mixture(parts: Mapping[float, float], longest: float, points: int = 4 * POINTS) -> tuple[float, ...]:
    """About `points` equally likely lengths of a mix, {mean: share}; shares add up to 1."""
    return tuple(sorted(length for mean, share in parts.items() for length in quantiles(
        mean, longest, max(1, round(share * points)))))


def truncated(spread: Sequence[float], longest: float) -> float:
    """The share of answers that reach `longest`."""
    return float(np.mean(np.array(spread) >= longest * 0.999))
