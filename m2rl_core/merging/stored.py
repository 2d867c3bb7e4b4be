"""Values as they are stored, in numpy: types by safetensors' codes; bfloat16, which numpy lacks, as its 16 bits."""
from __future__ import annotations

import math

import numpy as np
from numba import types
from numba.extending import overload

FLOATS = {"F64": np.float64, "F32": np.float32, "BF16": np.uint16, "F16": np.float16}
DTYPES = {code: np.dtype(dtype) for code, dtype in (FLOATS | {
    "I64": np.int64, "I32": np.int32, "I16": np.int16, "I8": np.int8, "U8": np.uint8, "BOOL": np.bool_}).items()}
CODES = {"float64": "F64", "float32": "F32", "bfloat16": "BF16", "float16": "F16", "int64": "I64", "int32": "I32",
         "int16": "I16", "int8": "I8", "uint8": "U8", "bool": "BOOL"}  # by their names in torch

Meta = tuple[str, tuple[int, ...]]  # (code, shape) of a tensor


def count_of(meta: Meta) -> int:
    """How many values a tensor has."""
    return math.prod(meta[1])


def bytes_of(meta: Meta) -> int:
    return DTYPES[meta[0]].itemsize * count_of(meta)


def wide(x):
    """Within a kernel: a stored value as float32; an uint16 is the bits of a bfloat16."""
    raise NotImplementedError("compiled only")


@overload(wide)
def _wide(x):
    if x == types.uint16:
        return lambda x: np.uint32(np.uint32(x) << np.uint32(16)).view(np.float32)
    return lambda x: np.float32(x)


def shift(x, base):
    """Within a kernel: what was learned, in float32, from a stored bfloat16 and the base's weight; other types are
    shifts already (see `shifts.Shifts.row`)."""
    raise NotImplementedError("compiled only")


@overload(shift)
def _shift(x, base):
    if x == types.uint16:
        return lambda x, base: wide(x) - base
    return lambda x, base: x


def narrow(values: np.ndarray, code: str) -> np.ndarray:
    """Values in another type but bfloat16, to the nearest (of two, the even one), or infinity beyond it."""
    with np.errstate(over="ignore"):  # the caller counts the infinities and refuses them by name
        return values.astype(DTYPES[code], copy=False)


def as_float(values: np.ndarray, code: str) -> np.ndarray:
    """Stored floating-point values as float32, to the nearest."""
    return (values.astype(np.uint32) << 16).view(np.float32) if code == "BF16" else narrow(values, "F32")


def not_finite(values: np.ndarray, code: str) -> tuple[int, int]:
    """(how many are NaN, how many are infinite)."""
    if code == "BF16":
        values = as_float(values, code)
    return int(np.isnan(values).sum()), int(np.isinf(values).sum())
