"""Measured scores: resampled over items, and over training seeds where there are several; all else is a contrast of them.

The interval is the expanded percentile bootstrap over items (Hesterberg 2015): deviations scaled by sqrt(n / (n - 1)),
then by t / z, so that it also covers at 20 items. With several training seeds (column `seed`) a resample draws items
and seeds: every item is seen by every seed, and a seed is a replicate of the whole study (its merges are made of its
own experts), so one draw of seeds serves all models and benchmarks. Two or three values drawn with replacement are
too few (two seeds covered 86 %), so the mean of the seeds is drawn from a normal with their standard error, of
n - 1 degrees of freedom. Seed 0 marks what all seeds share (base, sft): intervals hold for this one SFT model.
"""
from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from math import isfinite, isnan, nan, sqrt
from statistics import NormalDist
from typing import NamedTuple

import numpy as np
import pandas as pd
from scipy.special import stdtrit

from m2rl_core.metrics import bfcl

RESAMPLES = 2000
SHARED = 0  # the seed of what is trained once


class NotMeasured(KeyError):
    """A contrast asks for a benchmark on which a model was not measured."""

    def __str__(self) -> str:
        benchmark, column = self.args
        return f"no scores of {column} on {benchmark}"


class Spread(NamedTuple):
    """What the variance of an estimate is made of (squared units); the three parts add up to it.

    `items`: between items, less with more of them (holds what items and seeds do together). `samples`: within an item,
    less with more items or a larger K; NaN (and a part of `items`) at one sample an item. `seeds`: between training
    runs, less with more of these; NaN where there is one. `runs` counts the training seeds.
    """

    items: float
    samples: float
    seeds: float
    runs: int = 1


class Estimate(NamedTuple):
    """A number with its interval; `n` counts items (clusters), `se` is the standard error; all in one unit.

    `spread` is known where it is pooled over training seeds; `seconds` is what evaluating it took, where that is known.
    """

    estimate: float
    low: float
    high: float
    n: int
    se: float
    spread: Spread | None = None
    seconds: float = nan


@dataclass(frozen=True)
class Stratum:
    """Items of one benchmark and category: `values` (S, n, C) per-item means in percent, one column a model.

    `share` is the stratum's weight in its benchmark; `deviations` (S, R, C) are resampled means minus the mean; `held`
    (S, C) says which model was made on which seed (values are 0 where it was not); `rows` are what it was made of.
    """

    benchmark: str
    category: str
    share: float
    items: tuple
    columns: tuple[str, ...]
    values: np.ndarray
    deviations: np.ndarray
    held: np.ndarray
    rows: tuple[pd.DataFrame, str, str, float]

    @cached_property
    def samples(self) -> np.ndarray:
        """Single scores (S, n, K, C), as `values` but one for each sample; NaN where a model has fewer."""
        rows, column, score, scale = self.rows
        seeds = _seeds(rows["seed"]) if "seed" in rows else [SHARED]
        item, model = (pd.Index(known).get_indexer(rows[name])
                       for known, name in ((self.items, "item"), (self.columns, column)))
        number = pd.factorize(rows["sample"], sort=True)[0] if "sample" in rows else np.zeros(len(rows), int)
        found = np.full((len(seeds), len(self.items), number.max() + 1, len(self.columns)), nan)
        for i, seed in enumerate(seeds):
            own = rows["seed"].isin((SHARED, seed)).to_numpy() if "seed" in rows else slice(None)
            found[i, item[own], number[own], model[own]] = rows[score].to_numpy(float)[own] * scale
        return found


@dataclass(frozen=True)
class Measured:
    """Resampled scores of several models on the same items; every table, difference and claim is a contrast of it.

    `luck` (R,), standard normal, draws the training seeds' part of each resample; None where there is one seed.
    """

    strata: tuple[Stratum, ...]
    luck: np.ndarray | None = None

    def has(self, benchmark: str, column: str) -> bool:
        return any(s.benchmark == benchmark and column in s.columns for s in self.strata)

    def contrast(self, weights: Mapping[tuple[str, str], float], level: float = 0.95) -> Estimate:
        """Sum of weight x score over (benchmark, column) cells, in points, with its interval at `level`.

        Columns of one benchmark are resampled together, so a difference of two models is paired by item, and by
        training seed where there are several; the seeds are those that all its models have. NotMeasured for a cell that
        was not.
        """
        total, deviations, variances, count, pooled = self._resampled(weights)
        found = _expanded(total, deviations, variances, count, level)
        return found if pooled == 1 else found._replace(spread=self.spread(weights))

    def drawn(self, weights: Mapping[tuple[str, str], float]) -> np.ndarray:
        """Resampled values of a contrast, (R,), around its estimate; NaN where a benchmark has a single item.

        NotMeasured for a cell that was not measured.
        """
        total, deviations, *_ = self._resampled(weights)
        return total + deviations

    def _resampled(self, weights) -> tuple[float, np.ndarray, list[tuple[float, int]], int, int]:
        """The estimate, deviations from it (R,), variances with how many each rests on, items, and seeds pooled."""
        for benchmark, column in weights:
            if not self.has(benchmark, column):
                raise NotMeasured(benchmark, column)
        parts, seeds = self._parts(weights)
        total, deviations, variances, count, by_seed = 0.0, 0.0, [], 0, 0.0
        for s, w in parts:
            cells = np.stack([s.values[i] @ w for i in seeds])  # (S, n)
            per_item = cells.mean(axis=0)  # (n,)
            n = len(per_item)
            total, count, by_seed = total + per_item.mean(), count + n, by_seed + cells.mean(axis=1)
            drawn = sum(s.deviations[i] @ w for i in seeds) / len(seeds)
            deviations = deviations + drawn * (sqrt(n / (n - 1)) if n > 1 else nan)
            variances.append((per_item.var(ddof=1) / n if n > 1 else nan, n))
        if (pooled := len(seeds)) > 1:
            variances.append((by_seed.var(ddof=1) / pooled, pooled))
            deviations = deviations + self.luck * sqrt(variances[-1][0])
        return total, deviations, variances, count, pooled

    def spread(self, weights: Mapping[tuple[str, str], float]) -> Spread:
        """The parts of a contrast's variance, unbiased but for the floor at 0: analysis of variance, items by seeds.

        The interval is wider than their sum: it counts what items and seeds do together once for each.
        """
        parts, seeds = self._parts(weights)
        items = samples = both = 0.0
        by_seed = np.zeros(len(seeds))
        for s, w in parts:
            used = w != 0
            single = s.samples[seeds][..., used] @ w[used]  # (S, n, K)
            cells = np.stack([s.values[i] @ w for i in seeds])  # (S, n)
            n, k = single.shape[1:]
            by_seed += cells.mean(axis=1)
            within = single.var(axis=2, ddof=1).mean() / k / len(seeds) / n if k > 1 else nan
            whole = cells.mean(axis=0).var(ddof=1) / n if n > 1 else nan
            samples, items = samples + within, items + whole
            if len(seeds) > 1:
                rest = cells - cells.mean(axis=0) - cells.mean(axis=1, keepdims=True) + cells.mean()
                both += (rest**2).sum() / (n - 1) / (len(seeds) - 1) / n / len(seeds) if n > 1 else nan
        between = max(by_seed.var(ddof=1) / len(seeds) - both, 0.0) if len(seeds) > 1 else nan
        if isnan(samples):
            return Spread(float(items), nan, float(between), len(seeds))
        samples = min(samples, items)  # the spread of items' means holds that of their samples
        return Spread(float(items - samples), float(samples), float(between), len(seeds))

    def _parts(self, weights) -> tuple[list[tuple[Stratum, np.ndarray]], list[int]]:
        """The strata that a contrast touches with their weights (C,), and the seeds that all of its models have."""
        parts = [(s, np.array([weights.get((s.benchmark, c), 0.0) for c in s.columns]) * s.share) for s in self.strata]
        parts = [(s, w) for s, w in parts if w.any()]
        common = np.logical_and.reduce([s.held[:, w != 0].all(axis=1) for s, w in parts]) if parts else np.ones(1, bool)
        return parts, np.flatnonzero(common).tolist()


def _expanded(total, deviations, variances, count, level):
    se = sqrt(sum(v for v, _ in variances))
    if not isfinite(se):  # a single item says nothing of its spread
        return Estimate(float(total), nan, nan, count, nan)
    if se == 0:  # all items alike: the resamples cannot show any spread
        return Estimate(float(total), float(total), float(total), count, 0.0)
    freedom = se**4 / sum(v * v / (n - 1) for v, n in variances)  # Welch-Satterthwaite
    stretch = stdtrit(freedom, 0.5 + level / 2) / NormalDist().inv_cdf(0.5 + level / 2)
    low, high = np.quantile(deviations, [0.5 - level / 2, 0.5 + level / 2]) * stretch
    return Estimate(float(total), float(total + low), float(total + high), count, se)


def measure(
    rows: pd.DataFrame,
    rng: np.random.Generator,
    models: Sequence[str] | None = None,
    benchmarks: Sequence[str] | None = None,
    column: str = "model",
    score: str = "score",
    scale: float = 100.0,
    resamples: int = RESAMPLES,
) -> Measured:
    """Resample `rows` (model, benchmark, item, sample, score in [0, 1] and, optionally, category, seed) over items.

    `scale` turns the score into the unit of the estimates: 100 for percent, 1 for nats. Models that lack a
    benchmark are left out of it. ValueError where two models, or two seeds, have different items, or two models
    different numbers of samples.
    """
    rows = rows if models is None else rows[rows[column].isin(list(models))]
    rows = rows.assign(category=rows["category"].fillna("") if "category" in rows else "")
    seeds = _seeds(rows["seed"]) if "seed" in rows else [SHARED]
    strata = []
    for benchmark in dict.fromkeys(rows["benchmark"]) if benchmarks is None else benchmarks:
        part = rows[rows["benchmark"] == benchmark]
        if part.empty:
            continue
        means = [_means(part if len(seeds) == 1 else part[part["seed"].isin((SHARED, seed))], benchmark, column, score)
                 for seed in seeds]
        columns = means[0].columns if len(seeds) == 1 else sorted(set().union(*(m.columns for m in means)))
        for seed, other in zip(seeds, means, strict=True):
            if not other.index.equals(means[0].index):
                raise ValueError(f"{benchmark}: seeds {seeds[0]} and {seed} were not measured on the same items; "
                                 "evaluate both on one item set")
        held = np.array([[c in m.columns for c in columns] for m in means])
        means = [m if len(seeds) == 1 else m.reindex(columns=columns, fill_value=0.0) for m in means]
        groups = [list(m.groupby(level="category", sort=True)) for m in means]
        share = bfcl.shares({category: len(group) for category, group in groups[0]})
        part = part[[c for c in dict.fromkeys(("category", "item", "sample", "seed", column, score)) if c in part]]
        for of_seeds in zip(*groups, strict=True):
            (category, group), *_ = of_seeds
            values = np.stack([g.to_numpy(dtype=float) * scale for _, g in of_seeds])  # (S, n, C)
            strata.append(Stratum(
                benchmark, str(category), share[category], tuple(group.index.get_level_values("item")),
                tuple(columns), values, _deviations(values, rng, resamples), held,
                (part[part["category"] == category], column, score, scale)))
    return Measured(tuple(strata), rng.standard_normal(resamples) if len(seeds) > 1 else None)


def _seeds(column: pd.Series) -> list[int]:
    """The training seeds in a frame; what is shared belongs to each, and stands alone where there is nothing else."""
    return sorted(set(column) - {SHARED}) or [SHARED]


def _means(rows: pd.DataFrame, benchmark: str, column: str, score: str) -> pd.DataFrame:
    cells = rows.groupby(["category", "item", column], observed=True)[score]
    means = cells.mean().unstack(column)
    _same_items(means, benchmark)
    _same_k(cells.size().unstack(column), benchmark)
    return means


def _same_items(means: pd.DataFrame, benchmark: str) -> None:
    missing = means.isna()
    if not missing.any(axis=None):
        return
    model = missing.any().idxmax()
    item = missing[model].idxmax()[1]
    other = means.columns[~missing.loc[missing[model].idxmax()]][0]
    raise ValueError(f"{benchmark}: {model} and {other} were not measured on the same items ({item!r} lacks {model}); "
                     "evaluate both on one item set")


def _same_k(counts: pd.DataFrame, benchmark: str) -> None:
    uneven = counts.ne(counts.iloc[:, 0], axis=0)
    if uneven.any(axis=None):
        model = uneven.any().idxmax()
        item = uneven[model].idxmax()
        raise ValueError(f"{benchmark}: {counts.columns[0]} and {model} have different K ({counts.iloc[:, 0][item]} and "
                         f"{counts.loc[item, model]} samples of {item[1]!r}); evaluate both with one K")


def _deviations(values: np.ndarray, rng: np.random.Generator, resamples: int) -> np.ndarray:
    """Resampled means minus the mean, (S, R, C): items drawn with replacement, one draw for all columns and seeds."""
    n = values.shape[1]
    drawn = rng.integers(n, size=(resamples, n)) + n * np.arange(resamples)[:, None]
    counts = np.bincount(drawn.ravel(), minlength=resamples * n).reshape(resamples, n)
    return np.stack([counts @ (of_seed - of_seed.mean(axis=0)) / n for of_seed in values])
