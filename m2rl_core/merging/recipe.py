"""What a merge is: a method and the value of every choice that the literature leaves open.

A preset is nothing but such values. `paper` follows M2RL (section 3.2); `released-code` differs in DARE's
drop rate and in what SCE's selection masks; `mergekit` gives the meaning that mergekit gives to its names.

weight        one number or one per expert            density      share of shifts that TIES keeps
normalize     divide by the sum of weights            threshold    TIES' cut: global | tensor
scale         lambda                                  ties         equals at the cut: kept | exact (lowest index)
drop_rate     DARE's p, one or one per expert         trim_rescale after the trim: none | l1
drop_rescale  inverse (1/(1-p)) | l1 | none           vote         unweighted | weighted sum elects the sign
select        SCE's share by variance                 zero_sign    sign of a zero vote: majority | positive
select_masks  deltas | weights                        uniform_below  SCE's limit for uniform weights
average_of    shifts | weights (last bit only)        divisor_floor  least sum of weights that SCE divides by
"""
from __future__ import annotations

import difflib
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

METHODS = ("average", "ta", "ties", "sce", "ties-dare", "ta-dare")
MERGEKIT_NAMES = {"linear": "average", "task_arithmetic": "ta", "ties": "ties", "sce": "sce",
                  "dare_ties": "ties-dare", "dare_linear": "ta-dare"}
CHOICES = {"threshold": ("global", "tensor"), "ties": ("kept", "exact"), "trim_rescale": ("none", "l1"),
           "drop_rescale": ("inverse", "l1", "none"), "vote": ("unweighted", "weighted"),
           "zero_sign": ("majority", "positive"), "select_masks": ("deltas", "weights"),
           "average_of": ("shifts", "weights"), "normalize": (True, False)}
OUT_DTYPES = ("", "float32", "bfloat16", "float16")


def _preset(average, ta, ties, sce, dare, ties_dare=None) -> dict[str, dict]:
    return {"average": average, "ta": ta, "ties": ties, "sce": sce,
            "ties-dare": ties | dare | (ties_dare or {}), "ta-dare": ta | dare}


_TA = {"weight": 1.0, "normalize": False, "scale": 1.0}
_TIES = {"weight": 1.0, "density": 0.2, "threshold": "global", "ties": "kept", "trim_rescale": "none",
         "vote": "unweighted", "zero_sign": "majority", "normalize": True, "scale": 1.0}
_AVERAGE = {"weight": 1.0, "normalize": True, "average_of": "shifts"}
_SCE = {"select": 1.0, "select_masks": "deltas", "uniform_below": 0.0, "divisor_floor": 0.0}
PRESETS = {
    "paper": _preset(_AVERAGE, _TA, _TIES, _SCE, {"drop_rate": 0.8, "drop_rescale": "inverse"}),
    "released-code": _preset(_AVERAGE, _TA, _TIES, _SCE | {"select_masks": "weights"},
                             {"drop_rate": 0.2, "drop_rescale": "inverse"}),
    "mergekit": _preset(
        _AVERAGE | {"average_of": "weights"}, _TA,
        _TIES | {"density": 1.0, "threshold": "tensor", "ties": "exact", "vote": "weighted", "zero_sign": "positive"},
        _SCE | {"uniform_below": 1e-6, "divisor_floor": 1e-6}, {"drop_rate": 0.0, "drop_rescale": "l1"},
        {"normalize": False}),
}


@dataclass(frozen=True)
class Recipe:
    """A method with all its parameters; `experts` empty means all that are given, in their order.

    `seed` is DARE's. `out_dtype` "" means the base's own type, tensor by tensor. Arithmetic is float32.
    """

    method: str
    preset: str
    parameters: Mapping[str, object]
    experts: tuple[str, ...] = ()
    seed: int = 0
    out_dtype: str = ""

    def each(self, name: str, n: int) -> list[float]:
        """A parameter that may be one number or one per expert, as one per expert."""
        value = self.parameters[name]
        if isinstance(value, (int, float)):
            return [float(value)] * n
        if len(value) != n:
            raise ValueError(f"{name} has {len(value)} values for {n} experts: give one, or one for each")
        return [float(v) for v in value]


def make(
    method: str, preset: str = "paper", *, experts: Sequence[str] = (), seed: int = 0, out_dtype: str = "",
    **parameters,
) -> Recipe:
    """A recipe from a preset and the parameters that differ; ValueError names an unknown or impossible one."""
    method = MERGEKIT_NAMES.get(method, method)
    known(method, METHODS, "merge method")
    known(preset, PRESETS, "preset")
    known(out_dtype, OUT_DTYPES, "out_dtype")
    values = dict(PRESETS[preset][method])
    for name, value in parameters.items():
        known(name, values, f"parameter of {method}")
        values[name] = _checked(name, value)
    return Recipe(method, preset, values, tuple(experts), seed, out_dtype)


def known(name, names, what: str) -> None:
    """Raises ValueError, with the nearest of `names`, unless `name` is one of them."""
    names = list(names)  # a list, as a name from YAML may be unhashable
    if name not in names:
        close = difflib.get_close_matches(str(name), names, 1, 0.4)
        hint = f"did you mean {close[0]!r}? " if close else ""
        raise ValueError(f"unknown {what} {name!r}; {hint}there are: {', '.join(n for n in names if n) or 'none'}")


def _checked(name: str, value):
    if name in CHOICES:
        if value not in CHOICES[name] or isinstance(value, bool) != (name == "normalize"):
            raise ValueError(f"{name} must be one of {', '.join(map(str, CHOICES[name]))}, not {value!r}")
        return value
    values = list(value) if isinstance(value, (list, tuple)) and name in ("weight", "density", "drop_rate") else [value]
    for number in values:
        if isinstance(number, bool) or not isinstance(number, (int, float)) or not math.isfinite(number):
            raise ValueError(f"{name} must be a finite number, not {number!r}")
        if name in ("density", "select") and not 0 < number <= 1:
            raise ValueError(f"{name} must be above 0 and at most 1, not {number!r}")
        if name in ("uniform_below", "divisor_floor") and number < 0:
            raise ValueError(f"{name} must be at least 0, not {number!r}")
        if name == "drop_rate" and not 0 <= number < 1:
            raise ValueError(f"drop_rate must be at least 0 and below 1, not {number!r}")
    return tuple(map(float, values)) if isinstance(value, (list, tuple)) else float(value)
