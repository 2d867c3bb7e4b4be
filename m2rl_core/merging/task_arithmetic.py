"""Task arithmetic (Ilharco et al. 2022): add up what each expert learned."""
from __future__ import annotations

from collections.abc import Sequence

from torch import Tensor


def merge(base: Tensor, deltas: Sequence[Tensor], *, weights: Sequence[float], normalize: bool, scale: float) -> Tensor:
    """scale * sum_i w_i delta_i, the sum divided by sum_i w_i where `normalize`; float32, any shape.

    The paper adds (it does not average): scale (lambda) 1.0, weights 1, no division. `base` is not used.
    """
    mixed = sum(weight * delta for weight, delta in zip(weights, deltas, strict=True))
    return scale * (mixed / sum(weights) if normalize else mixed)
