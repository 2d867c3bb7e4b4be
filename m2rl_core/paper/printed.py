"""The paper's printed scores as evidence, so that one rule decides on them and on a run.

The paper prints no interval. These intervals count sampling noise only: `items x K` independent draws as the
printed digits allow (`audit.GRID`), items taken as fixed, models not paired. For the judges of Table 7
eight verdicts on each item are assumed (Avg@8). Where the true noise is larger, "supported" is too kind.
"""
from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from math import sqrt
from statistics import NormalDist

import pandas as pd

from m2rl_core import paper
from m2rl_core.metrics.stats import Estimate
from m2rl_core.paper import audit

STATED_NEIGHBOURS = {"math": "coding", "coding": "agent"}  # caption of Table 6


@dataclass(frozen=True)
class Printed:
    """Cells (benchmark, column) -> (percent, items, draws); answers `has` and `contrast` as `stats.Measured` does."""

    cells: Mapping[tuple[str, str], tuple[float, int, int]]

    def has(self, benchmark: str, column: str) -> bool:
        return (benchmark, column) in self.cells

    def contrast(self, weights: Mapping[tuple[str, str], float], level: float = 0.95) -> Estimate:
        """Sum of weight x score, normal interval from binomial sampling noise; KeyError for a cell not printed."""
        total, variance, items = 0.0, 0.0, {}
        for cell, weight in weights.items():
            percent, count, draws = self.cells[cell]
            total += weight * percent
            variance += weight**2 * percent * (100 - percent) / draws
            items[cell[0]] = count
        se = sqrt(variance)
        reach = NormalDist().inv_cdf(0.5 + level / 2) * se
        return Estimate(total, total - reach, total + reach, sum(items.values()), se)


def generation() -> Printed:
    """Tables 3, 4, 6 and 8: every (benchmark, model) score that the paper prints."""
    sizes = {**audit.GRID, **audit.ASSUMED}
    cells = {}
    for number in (8, 6, 4, 3):
        for model, line in paper.table(number).iterrows():
            for benchmark, (items, k) in sizes.items():
                if benchmark in line and pd.notna(line[benchmark]):
                    cells[benchmark, model] = (line[benchmark], items, items * k)
    return Printed(cells)


def judgement() -> Printed:
    """Table 7: (benchmark, "<model>/outcome" or "<model>/process")."""
    cells = {}
    for model, line in paper.table(7).iterrows():
        for benchmark in audit.JUDGED:
            items, _ = audit.GRID[benchmark]
            for mode, short in (("outcome", "out"), ("process", "proc")):
                cells[benchmark, f"{model}/{mode}"] = (line[f"{benchmark}_{short}"], items, items * 8)
    return Printed(cells)


def jaccard() -> pd.DataFrame:
    """Table 5 in the shape of a run's frame: matrix, a, b, jaccard, jaccard_random."""
    printed = paper.table(5)
    pairs = printed.drop("random").stack().rename("jaccard").rename_axis(["pair", "matrix"]).reset_index()
    pairs[["a", "b"]] = pairs["pair"].str.split("-", expand=True)
    return pairs.drop(columns="pair").assign(jaccard_random=pairs["matrix"].map(printed.loc["random"]))


def costs() -> pd.DataFrame:
    """Table 2 in the shape of a run's frame: model, hours."""
    return paper.table(2)["gpu_hours"].rename("hours").rename_axis("model").reset_index()
