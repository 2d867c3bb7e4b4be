"""Average of the experts' weights (Wortsman et al. 2022, model soups; mergekit's `linear`)."""
from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor


def of_shifts(base: Tensor, deltas: Sequence[Tensor], *, weights: Sequence[float], normalize: bool) -> Tensor:
    """The shift from `base` to sum_i w_i theta_i, divided by sum_i w_i where `normalize`; flat float32.

    theta_i = base + delta_i. Normalised, the base cancels and what is left is the weighted mean of the
    deltas; otherwise the base itself counts sum_i w_i times, as in mergekit.
    """
    total = sum(weights)
    mixed = weighted_sum(deltas, weights)
    return mixed.div_(total) if normalize else mixed.add_((total - 1.0) * base)


def of_weights(models: Sequence[Tensor], *, weights: Sequence[float], normalize: bool) -> Tensor:
    """sum_i w_i theta_i, divided by sum_i w_i where `normalize`, straight from the formula; flat float32.

    The same as `base + of_shifts` but for the last bit; the operations are mergekit's, so the bits are too.
    """
    weights = torch.tensor(weights, dtype=torch.float32, device=models[0].device)
    mixed = torch.zeros_like(models[0])
    for weight, model in zip(weights, models, strict=True):
        mixed.addcmul_(model, weight)
    return mixed.div_(weights.sum()) if normalize else mixed


def weighted_sum(deltas: Sequence[Tensor], weights: Sequence[float]) -> Tensor:
    """sum_i w_i delta_i in the order given, as a new tensor."""
    mixed = torch.zeros_like(deltas[0])
    for weight, delta in zip(weights, deltas, strict=True):
        mixed += delta if weight == 1 else weight * delta
    return mixed
