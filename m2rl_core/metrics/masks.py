"""Section 3.3 by its definitions: masks of changed weights, their overlap, its nulls; of whole tensors, in torch.

`weights` counts the same of models of any size in one read; its tests hold it against what stands here.
"""
from __future__ import annotations

import math

import numpy as np
import torch
from torch import Tensor

ETA = 1e-3  # the paper's; section 3.3
BINS = 64  # quantile bins of |w| for the conditioned null


def changed(a: Tensor, b: Tensor, eta: float = ETA) -> Tensor:
    """|a - b| > eta max(|a|, |b|), the paper's test; bool, the inputs' shape. Computed in float32."""
    a, b = a.float(), b.float()
    return (a - b).abs() > eta * torch.maximum(a.abs(), b.abs())


def changed_bits(a: Tensor, b: Tensor) -> Tensor:
    """Whether two bfloat16 tensors differ at all: the same mask as `changed` for every eta below 2^-8.

    Neighbouring bfloat16 numbers differ by at least 2^-8 of the larger, so eta never decides; +0 and -0 are
    equal to both. ValueError for other types, where that is not so.
    """
    if a.dtype != torch.bfloat16 or b.dtype != torch.bfloat16:
        raise ValueError(f"changed_bits compares bfloat16 tensors, not {a.dtype} and {b.dtype}: cast first")
    return a != b


def jaccard(a: Tensor, b: Tensor) -> float:
    """|a and b| / |a or b| of two bool masks; NaN where both are empty."""
    return _ratio(int((a & b).sum()), int((a | b).sum()))


def jaccard_random(share_a: float, share_b: float) -> float:
    """The overlap expected of independent masks with these shares: pA pB / (pA + pB - pA pB)."""
    return _ratio(share_a * share_b, share_a + share_b - share_a * share_b)


def jaccard_by_magnitude(a: Tensor, b: Tensor, weights: Tensor, bins: int = BINS) -> float:
    """The overlap expected of masks that are independent given |w|: sum pA pB / sum (pA + pB - pA pB).

    pA, pB are the masks' shares in about `bins` equally filled bins of |weights|; values that are equal to
    16 bits share a bin. All three tensors have one shape.
    """
    bins_of = magnitude_bins(weights, bins)
    size, in_a, in_b = (np.bincount(bins_of, weights=x, minlength=bins) for x in (None, _flat(a), _flat(b)))
    filled = size > 0
    both = in_a[filled] * in_b[filled] / size[filled]
    return _ratio(both.sum(), (in_a[filled] + in_b[filled] - both).sum())


def magnitude_bins(weights: Tensor, bins: int) -> np.ndarray:
    """The quantile bin of each |weight|: int (n,), 0 .. bins-1, by the upper 16 bits of its float32 pattern."""
    codes = weights.float().abs().reshape(-1).view(torch.int32) >> 16  # grows with the magnitude
    counts = torch.bincount(codes, minlength=1 << 15)
    middle = torch.cumsum(counts, 0).double() - counts.double() / 2
    return (middle / codes.numel() * bins).long().clamp(max=bins - 1)[codes].numpy()


def cosine(a: Tensor, b: Tensor) -> float:
    """The cosine of two tensors taken as vectors, in float64; NaN where one is zero."""
    a, b = a.double().reshape(-1), b.double().reshape(-1)
    return _ratio(float(a @ b), math.sqrt(float(a @ a) * float(b @ b)))


def _flat(mask: Tensor) -> np.ndarray:
    return mask.reshape(-1).numpy()


def _ratio(part: float, whole: float) -> float:
    return part / whole if whole else math.nan
