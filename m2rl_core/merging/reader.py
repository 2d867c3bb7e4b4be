"""Reads one piece of the base and of every expert into buffers that each thread uses again and again."""
from __future__ import annotations

import math
import threading
from collections.abc import Mapping

import torch
from torch import Tensor

from m2rl_core.merging.checkpoint import Checkpoint
from m2rl_core.merging.pieces import PIECE, Piece
from m2rl_core.merging.shifts import BASE, Shifts

WIDEST = 8  # bytes of a float64


class Reader:
    """base, experts[name]: a `Checkpoint`, entered, or a dict of tensors; all of one architecture (`check_shapes`).

    `sizes` has the number of values of each floating-point tensor and 0 for the others, by name.
    """

    def __init__(self, base: Mapping[str, Tensor], experts: Mapping[str, Mapping[str, Tensor]],
                 device: torch.device):
        self.base, self.experts, self.device = base, experts, device
        self.meta = meta_of(base)
        self.sizes = {name: math.prod(shape) if dtype.is_floating_point else 0
                      for name, (dtype, shape) in self.meta.items()}
        self._own = threading.local()

    def load(self, piece: Piece, known: Mapping) -> Shifts:
        """The piece of every model, valid until this thread loads the next one."""
        own = self._own
        if not hasattr(own, "bytes"):
            own.bytes = torch.empty(len(self.experts) + 1, PIECE * WIDEST, dtype=torch.uint8)
            own.rows = torch.empty(len(self.experts) + 1, PIECE, device=self.device)
        raw, wide = {}, []
        models = {BASE: self.base} | {("expert", name): tensors for name, tensors in self.experts.items()}
        for i, (model, tensors) in enumerate(models.items()):
            raw[model] = stored = self._read(tensors, piece, own.bytes[i])
            wide.append(own.rows[i, : piece.count].copy_(stored))
        for row in wide[1:]:
            row.sub_(wide[0])
        return Shifts(piece, wide[0], dict(zip(self.experts, wide[1:], strict=True)), raw, known)

    def _read(self, tensors: Mapping[str, Tensor], piece: Piece, buffer: Tensor) -> Tensor:
        if isinstance(tensors, Checkpoint):
            return tensors.read(piece.name, piece.first, piece.count, buffer)
        return tensors[piece.name].reshape(-1)[piece.first : piece.first + piece.count]

    def refuse_nonfinite(self, name: str) -> None:
        """ValueError with the counts where the base or an expert holds NaN or Inf in this tensor; base first."""
        for model, tensors in {"the base": self.base, **self.experts}.items():
            nan = inf = 0
            for first in range(0, self.sizes[name], PIECE):
                piece = Piece(name, -1, first, min(PIECE, self.sizes[name] - first))
                values = self._read(tensors, piece, torch.empty(PIECE * WIDEST, dtype=torch.uint8))
                nan, inf = nan + int(values.isnan().sum()), inf + int(values.isinf().sum())
            if nan or inf:
                raise ValueError(f"{model}: {name} holds {nan} NaN and {inf} Inf of {self.sizes[name]} values: "
                                 "nothing to merge")


def meta_of(tensors: Mapping[str, Tensor]) -> dict[str, tuple[torch.dtype, tuple[int, ...]]]:
    """(dtype, shape) of every tensor, from the files' headers where it is a Checkpoint."""
    if isinstance(tensors, Checkpoint):
        return tensors.meta
    return {name: (tensor.dtype, tuple(tensor.shape)) for name, tensor in tensors.items()}
