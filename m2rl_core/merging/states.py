"""Dicts of torch tensors as models that can be merged, for looks by hand and for tests."""
from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence

import numpy as np
import torch
from torch import Tensor

from m2rl_core.merging.blend import code_of
from m2rl_core.merging.driver import Merger
from m2rl_core.merging.pieces import Piece
from m2rl_core.merging.recipe import Recipe, known
from m2rl_core.merging.stored import CODES, DTYPES

TYPES = {code: getattr(torch, name) for name, code in CODES.items()}


class State:
    """What a `Checkpoint` is for files: `meta` and `read`."""

    def __init__(self, tensors: Mapping[str, Tensor]):
        """ValueError for a tensor of a type that cannot be merged."""
        names = {name: str(tensor.dtype).removeprefix("torch.") for name, tensor in tensors.items()}
        for name, dtype in names.items():
            known(dtype, CODES, f"type of {name}")
        self.meta = {name: (CODES[names[name]], tuple(tensor.shape)) for name, tensor in tensors.items()}
        self.flat = {name: flat(tensor) for name, tensor in tensors.items()}

    def read(self, name: str, first: int, out: np.ndarray) -> None:
        """out := the flat tensor's values from `first` on, in its own type."""
        out[:] = self.flat[name][first : first + len(out)]

    def view(self, name: str, first: int, count: int) -> np.ndarray:
        """The same values where they lie."""
        return self.flat[name][first : first + count]


class StateMerger(Merger):
    """A `Merger` of dicts of tensors."""

    def __init__(self, base: Mapping[str, Tensor], experts: Mapping[str, Mapping[str, Tensor]],
                 recipes: Sequence[Recipe], **options):
        self.base = base
        super().__init__(State(base), {name: State(state) for name, state in experts.items()}, recipes, **options)

    def __iter__(self) -> Iterator[tuple[str, list[Tensor]]]:
        """(name, one merged tensor a recipe) in the order of names; what is not floating point is the base's."""
        outs: dict[str, list[np.ndarray]] = {}
        codes = {name: [code_of(recipe, code) for recipe in self.recipes] for name, (code, _) in
                 self.reader.meta.items()}

        def begin(names: Sequence[str]) -> None:
            for name in names:
                outs[name] = [np.empty(self.reader.sizes[name], DTYPES[code]) for code in codes[name]]

        def put(r: int, piece: Piece, part: np.ndarray) -> None:
            outs[piece.name][r][piece.first : piece.first + piece.count] = part

        for name in self.merge(begin, put):
            found, base = outs.pop(name), self.base[name]
            if self.reader.sizes[name]:
                yield name, [tensor_of(values, code).view(base.shape)
                             for values, code in zip(found, codes[name], strict=True)]
            else:
                yield name, [base.to(TYPES[code]) for code in codes[name]]


def flat(tensor: Tensor) -> np.ndarray:
    """The values of a tensor as stored; bfloat16 as uint16."""
    values = tensor.detach().cpu().reshape(-1)
    return values.view(torch.uint16 if values.dtype == torch.bfloat16 else values.dtype).numpy()


def tensor_of(values: np.ndarray, code: str) -> Tensor:
    """The same back; flat, the same memory."""
    return torch.from_numpy(values).view(TYPES[code])
