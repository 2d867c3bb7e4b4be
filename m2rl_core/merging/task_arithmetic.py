"""Task arithmetic (Ilharco et al. 2022): add up what each expert learned."""
from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from m2rl_core.merging.average import weighted_sum


def merge(deltas: Sequence[Tensor], *, weights: Sequence[float], normalize: bool) -> Tensor:
    """sum_i w_i delta_i, divided by sum_i w_i where `normalize`; flat float32. The driver multiplies by lambda.

    The paper adds (it does not average): lambda 1.0, weights 1, no division.
    """
    mixed = weighted_sum(deltas, weights)
    return mixed.div_(float(torch.tensor(weights).sum())) if normalize else mixed  # added in float32, as in mergekit
