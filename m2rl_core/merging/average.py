"""Average of the experts' weights (Wortsman et al. 2022, model soups; mergekit's `linear`)."""
from __future__ import annotations

from collections.abc import Sequence

from torch import Tensor


def merge(base: Tensor, deltas: Sequence[Tensor], *, weights: Sequence[float], normalize: bool) -> Tensor:
    """The shift from `base` to sum_i w_i theta_i, divided by sum_i w_i where `normalize`; float32, any shape.

    theta_i = base + delta_i. Normalised, the base cancels and what is left is the weighted mean of the
    deltas; otherwise the base itself counts sum_i w_i times, as in mergekit.
    """
    total = sum(weights)
    mixed = sum(weight * delta for weight, delta in zip(weights, deltas, strict=True))
    if normalize:
        return mixed / total
    return mixed + (total - 1.0) * base
