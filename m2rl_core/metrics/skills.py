"""Section 3.5: do multi-domain models solve what the experts solve? Gain vectors, their union and their cosine.

Cosines of non-negative vectors are positive by construction, and noise lowers them; so each cosine comes with
`chance` (the same gains on shuffled items) and `ceiling` (a model's gains against its own, from two halves of
its samples), which the paper does not show. Both sides subtract the same SFT samples, whose luck then counts as a
gain of everybody: `split` and `split_ceiling` are the two where SFT's samples are halved as well, a half for each
side. A model without any gain has no direction: NaN, and `note` says so.
"""
from __future__ import annotations

from collections.abc import Sequence
from math import nan
from typing import NamedTuple

import numpy as np
import pandas as pd

from m2rl_core.metrics.stats import RESAMPLES

EXPERTS = ("rl-math", "rl-science", "rl-coding", "rl-if", "rl-agent")
SPLITS = 20  # random halves of the samples behind a ceiling


class Halves(NamedTuple):
    """Mean cosines over random halves of the samples: `union` of the experts, all else by model."""

    own: dict[str, float]
    union: float
    split: dict[str, float]
    split_own: dict[str, float]
    split_chance: dict[str, float]


def item_accuracy(rows: pd.DataFrame, benchmark: str, models: Sequence[str]) -> pd.DataFrame:
    """Mean score over samples in [0, 1]: index item, one column a model.

    ValueError, naming both models, where items or numbers of samples differ, and where rows lack.
    """
    part = rows[(rows["benchmark"] == benchmark) & rows["model"].isin(list(models))]
    by = part.groupby(["item", "model"], observed=True)["score"]
    wide, count = by.mean().unstack("model"), by.size().unstack("model")
    absent = [model for model in models if model not in wide]
    if absent:
        raise ValueError(f"{benchmark}: no rows of {', '.join(absent)}; evaluate first what is missing")
    if wide.isna().any(axis=None):
        model = wide.isna().any().idxmax()
        item = wide[model].isna().idxmax()
        raise ValueError(f"{benchmark}: {model} was not measured on item {item!r}, but {wide.loc[item].idxmax()} was; "
                         "evaluate all models on one item set")
    uneven = count.ne(count[models[0]], axis=0)
    if uneven.any(axis=None):  # fewer samples make larger gains by luck
        model = uneven.any().idxmax()
        few = count[[models[0], model]].loc[uneven[model].idxmax()]
        raise ValueError(f"{benchmark}: {models[0]} and {model} have different K ({few.iloc[0]} and {few.iloc[1]} samples an "
                         "item); evaluate both with one K")
    return wide[list(models)]


def gains(accuracy: pd.DataFrame, anchor: str = "sft") -> pd.DataFrame:
    """g_m(i) = max(a_m(i) - a_anchor(i), 0), items x models without the anchor."""
    return accuracy.drop(columns=anchor).sub(accuracy[anchor], axis=0).clip(lower=0)


def union(gain: pd.DataFrame, experts: Sequence[str] = EXPERTS) -> pd.Series:
    """g_union(i): the largest gain of any expert on item i."""
    return gain[list(experts)].max(axis=1)


def cosine(u: np.ndarray, v: np.ndarray) -> np.ndarray:
    """Cosine along the last axis; NaN where one side is zero everywhere."""
    return _ratio((u * v).sum(-1), (u * u).sum(-1), (v * v).sum(-1))


def _chance(u: np.ndarray, v: np.ndarray) -> np.ndarray:
    """The mean cosine over all orders of the items of `v`, along the last axis."""
    return _ratio(u.shape[-1] * u.mean(-1) * v.mean(-1), (u * u).sum(-1), (v * v).sum(-1))


def _ratio(product, square_u, square_v):
    norm = np.sqrt(np.asarray(square_u * square_v, float))
    return np.divide(product, norm, out=np.full(norm.shape, nan), where=norm > 0)


def consistency(
    rows: pd.DataFrame,
    models: Sequence[str],
    benchmarks: Sequence[str],
    rng: np.random.Generator,
    experts: Sequence[str] = EXPERTS,
    anchor: str = "sft",
    resamples: int = RESAMPLES,
) -> pd.DataFrame:
    """Cosine of each model's gains with the experts' union, one line a (benchmark, model), interval over items.

    Columns: benchmark, model, cosine, low, high, chance, ceiling, ceiling_union, split, split_ceiling, split_chance, gained
    (items), n (items), note.
    """
    return pd.concat(
        [_one(rows, models, b, rng, experts, anchor, resamples)[0] for b in benchmarks], ignore_index=True
    )


def consistency_gap(
    rows: pd.DataFrame,
    model: str,
    others: Sequence[str],
    benchmarks: Sequence[str],
    rng: np.random.Generator,
    experts: Sequence[str] = EXPERTS,
    anchor: str = "sft",
    resamples: int = RESAMPLES,
) -> tuple[float, float, float, int]:
    """Mean over benchmarks of cosine(model) minus the mean cosine of `others`: (gap, low, high, n), paired by item.

    Benchmarks on which a cosine is undefined are left out; all NaN where none is left.
    """
    points, draws, n = [], [], 0
    for benchmark in benchmarks:
        line, drawn = _one(rows, [model, *others], benchmark, rng, experts, anchor, resamples)
        found = line["cosine"].to_numpy()
        if np.isfinite(found).all():
            points.append(found[0] - found[1:].mean())
            draws.append(drawn[:, 0] - drawn[:, 1:].mean(axis=1))
            n += int(line["n"].iloc[0])
    if not points:
        return nan, nan, nan, 0
    low, high = np.nanquantile(np.mean(draws, axis=0), [0.025, 0.975])
    return float(np.mean(points)), float(low), float(high), n


def _one(rows, models, benchmark, rng, experts, anchor, resamples):
    names = list(dict.fromkeys([anchor, *experts, *models]))
    gain = gains(item_accuracy(rows, benchmark, names), anchor)
    u, g = union(gain, experts).to_numpy(), gain[list(models)].to_numpy()  # (n,), (n, M)
    n = len(u)
    counts = np.stack([np.bincount(rng.integers(n, size=n), minlength=n) for _ in range(resamples)])  # (R, n)
    drawn = _ratio(counts @ (u[:, None] * g), (counts @ (u * u))[:, None], counts @ (g * g))  # (R, M)
    halves = ceilings(rows, benchmark, models, rng, experts, anchor)
    lines = []
    for j, model in enumerate(models):
        defined = np.isfinite(drawn[:, j])
        low, high = np.quantile(drawn[defined, j], [0.025, 0.975]) if defined.any() else (nan, nan)
        found = float(cosine(u, g[:, j]))
        idle = "no expert gains on any item" if not u.any() else f"{model} gains on no item"
        note = "" if np.isfinite(found) else f"undefined: {idle}"
        lines.append({
            "benchmark": benchmark, "model": model, "cosine": found, "low": low, "high": high,
            "chance": float(_chance(u, g[:, j])),
            "ceiling": halves.own[model], "ceiling_union": halves.union, "split": halves.split[model],
            "split_ceiling": halves.split_own[model], "split_chance": halves.split_chance[model],
            "gained": int((g[:, j] > 0).sum()), "n": n, "note": note,
        })
    return pd.DataFrame(lines), drawn


def ceilings(
    rows: pd.DataFrame,
    benchmark: str,
    models: Sequence[str],
    rng: np.random.Generator,
    experts: Sequence[str] = EXPERTS,
    anchor: str = "sft",
) -> Halves:
    """Mean cosines between gain vectors from two random halves of the samples; NaN at K = 1 or without gains.

    `own` and `union` (of the experts): a half against the other, both over the whole of SFT, as Fig. 5's two sides are.
    `split` (a half of the model against the other half of the union), the same on shuffled items (`split_chance`) and
    `split_own`: each side over a half of SFT of its own. Halves hold K / 2 samples, so all err on the low side.
    """
    names = list(dict.fromkeys([anchor, *experts, *models]))
    part = rows[(rows["benchmark"] == benchmark) & rows["model"].isin(names)]
    cube = part.pivot(index=["model", "item"], columns="sample", values="score").dropna(axis=1)
    k = cube.shape[1]
    unknown = dict.fromkeys(models, nan)
    if k < 2:
        return Halves(unknown, nan, unknown, unknown, unknown)
    values = np.stack([cube.loc[name].sort_index().to_numpy(float) for name in names])  # (M, n, K)
    whole, at = values[0].mean(axis=1), [names.index(model) for model in models]
    of = [names.index(expert) for expert in experts]
    found: dict[str, list] = {name: [] for name in Halves._fields}
    for _ in range(SPLITS):
        mixed = rng.permuted(values, axis=2)
        halves = [mixed[:, :, : k // 2].mean(2), mixed[:, :, k // 2 : 2 * (k // 2)].mean(2)]  # two (M, n)
        shared = [np.maximum(half - whole, 0) for half in halves]
        split = [np.maximum(half - half[0], 0) for half in halves]
        found["own"].append(cosine(shared[0][at], shared[1][at]))
        found["union"].append(cosine(shared[0][of].max(axis=0), shared[1][of].max(axis=0)))
        mine, theirs = split[0][at], split[1][of].max(axis=0)  # (models, n), (n,)
        found["split"].append(cosine(mine, theirs))
        found["split_own"].append(cosine(mine, split[1][at]))
        found["split_chance"].append(_chance(mine, theirs))
    mean = {name: [_mean(line) for line in np.atleast_2d(np.stack(drawn, axis=-1))] for name, drawn in found.items()}
    by_model = {name: dict(zip(models, line, strict=True)) for name, line in mean.items() if name != "union"}
    return Halves(**by_model, union=mean["union"][0])


def _mean(found: Sequence[float]) -> float:
    known = [value for value in found if np.isfinite(value)]
    return float(np.mean(known)) if known else nan
