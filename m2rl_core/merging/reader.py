"""Reads one piece of the base and of every expert into memory that each thread uses again and again."""
from __future__ import annotations

import threading
from collections.abc import Mapping, Sequence

import numpy as np

from m2rl_core.merging.pieces import PIECE, Piece, grid
from m2rl_core.merging.pool import cores
from m2rl_core.merging.shifts import Shifts
from m2rl_core.merging.stored import DTYPES, FLOATS, as_float, count_of, not_finite

WIDEST = 8  # bytes of a float64
ROOM = 3 << 28  # bytes that the pieces of all threads together may take


class Reader:
    """base, experts[name]: a `Checkpoint`, entered, or a `states.State`; all of one architecture (`check_shapes`).

    `sizes` has the number of values of each floating-point tensor and 0 for the others, by name.
    """

    def __init__(self, base, experts: Mapping):
        self.base, self.experts, self.meta = base, experts, base.meta
        self.sizes = {name: count_of(meta) if meta[0] in FLOATS else 0 for name, meta in self.meta.items()}
        self._own = threading.local()

    def threads(self) -> int:
        """How many threads there is a core and room for; a piece of a model takes up to 14 bytes a value."""
        return max(1, min(cores(), ROOM // (14 * PIECE * (1 + len(self.experts)))))

    def load(self, piece: Piece, known: Mapping) -> Shifts:
        """The piece of every model, valid until this thread loads the next one."""
        own, models = self._own, [self.base, *self.experts.values()]
        if not hasattr(own, "bytes"):
            own.bytes = np.empty(len(models) * PIECE * WIDEST, np.uint8)
            own.floats = np.empty((3, len(models) * PIECE), np.float32)
        codes = [model.meta[piece.name][0] for model in models]
        raw = self._raw(codes, piece.count, own.bytes)
        for model, values in zip(models, raw, strict=True):
            for first, place in piece.places():
                model.read(piece.name, first, values[place])
        stored = raw
        if not isinstance(raw, np.ndarray) or raw.dtype == np.float16:  # of several types, or one that kernels lack
            stored = own.floats[2, : len(models) * piece.count].reshape(len(models), -1)
            for row, code, values in zip(stored, codes, raw, strict=True):
                row[:] = as_float(values, code)
        return Shifts(piece, list(self.experts), stored, own.floats[:2], known, raw, codes)

    def _raw(self, codes: Sequence[str], count: int, memory: np.ndarray) -> np.ndarray | list[np.ndarray]:
        """Room for `count` values of each model: (models, P) where all are of one type, else a list of (P,)."""
        dtypes = [DTYPES[code] for code in codes]
        if len(set(codes)) == 1:
            return memory[: len(codes) * count * dtypes[0].itemsize].view(dtypes[0]).reshape(len(codes), -1)
        return [memory[i * count * WIDEST :][: count * dtype.itemsize].view(dtype) for i, dtype in enumerate(dtypes)]

    def refuse_nonfinite(self, name: str, so: str = "nothing to merge") -> None:
        """ValueError with the counts where the base or an expert holds NaN or Inf in this tensor; base first."""
        for label, model in {"the base": self.base, **self.experts}.items():
            code, nan, inf = model.meta[name][0], 0, 0
            for piece in grid(name, self.sizes[name]):
                values = np.empty(piece.count, DTYPES[code])
                model.read(name, piece.first, values)
                more = not_finite(values, code)
                nan, inf = nan + more[0], inf + more[1]
            if nan or inf:
                raise ValueError(f"{label}: {name} holds {nan} NaN and {inf} Inf of {self.sizes[name]} values: "
                                 f"{so}")
