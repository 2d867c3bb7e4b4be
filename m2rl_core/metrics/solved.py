"""Section 3.5, the items: which a model solves and no expert, the reverse, and how many of them luck alone would give."""
from __future__ import annotations

from collections.abc import Sequence
from math import nan

import numpy as np
import pandas as pd

from m2rl_core.metrics.skills import EXPERTS, SPLITS, item_accuracy


def apart(
    rows: pd.DataFrame, benchmark: str, model: str, experts: Sequence[str] = EXPERTS, threshold: float = 0.5
) -> pd.DataFrame:
    """Items that `model` solves and no expert does, and the reverse; solved: at least `threshold` of the samples.

    Columns: benchmark, item, who ("model only" or "experts only"), model, best_expert, accuracy, best_accuracy.
    """
    accuracy = item_accuracy(rows, benchmark, list(dict.fromkeys([model, *experts])))
    own, others = accuracy[model], accuracy[list(experts)]
    solved, by_expert = own >= threshold, (others >= threshold).any(axis=1)
    frame = pd.DataFrame({
        "benchmark": benchmark, "item": accuracy.index, "who": np.where(solved, "model only", "experts only"),
        "model": model, "best_expert": others.idxmax(axis=1).to_numpy(),
        "accuracy": own.to_numpy(), "best_accuracy": others.max(axis=1).to_numpy(),
    })
    return frame[(solved != by_expert).to_numpy()].reset_index(drop=True)


def by_luck(
    rows: pd.DataFrame, benchmark: str, model: str, rng: np.random.Generator, experts: Sequence[str] = EXPERTS,
    threshold: float = 0.5,
) -> tuple[float, float]:
    """How many items one random half of the samples solves and the other does not: (of `model`, of any of `experts`).

    What `apart` would count between a model and itself, and between the experts and themselves. Means over
    random halves; these hold K / 2 samples, so both err on the high side. NaN at K = 1.
    """
    item_accuracy(rows, benchmark, list(dict.fromkeys([model, *experts])))
    found = []
    for names in ([model], list(experts)):
        part = rows[(rows["benchmark"] == benchmark) & rows["model"].isin(names)]
        cube = part.pivot(index=["model", "item"], columns="sample", values="score")
        values = np.stack([cube.loc[name].sort_index().to_numpy(float) for name in names])  # (M, n, K)
        half, apart = values.shape[2] // 2, []
        for _ in range(SPLITS if half else 0):
            mixed = rng.permuted(values, axis=2)
            a, b = ((part.mean(2) >= threshold).any(axis=0) for part in (mixed[:, :, :half], mixed[:, :, half : 2 * half]))
            apart.append((a != b).sum() / 2)  # either half may be the one that solves
        found.append(float(np.mean(apart)) if apart else nan)
    return found[0], found[1]
