"""Task arithmetic (Ilharco et al. 2022): add up what each expert learned."""
from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from m2rl_core.merging.average import total_of, weighted_sum


def merge(base: np.ndarray, rows: tuple[np.ndarray, ...], weights: Sequence[float], normalize: bool,
          out: np.ndarray) -> None:
    """out := sum_i w_i shift_i, divided by sum_i w_i where `normalize`; float32 (P,). The driver multiplies by lambda.

    The paper adds (it does not average): lambda 1.0, weights 1, no division.
    """
    weighted_sum(base, rows, weights, total_of(weights) if normalize else 1.0, out)
