"""Section 3.5, the items: which a model solves and no expert, the reverse, and how many luck alone would give."""
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
    rows: pd.DataFrame, benchmark: str, model: str, own: str, rng: np.random.Generator,
    experts: Sequence[str] = EXPERTS, threshold: float = 0.5,
) -> dict[str, float]:
    """What `apart` would count of `model`, and of a copy of the expert `own` in its place: that one differs by luck alone.

    Keys: alone, experts, copy_alone, copy_experts; mean numbers of items over random halves of the samples, the one
    half for who stands in the model's place, the other for the experts. alone_se, experts_se: the standard errors over
    items of the two differences, model minus copy. NaN at K = 1.
    """
    names = list(dict.fromkeys([model, *experts]))
    item_accuracy(rows, benchmark, names)
    part = rows[(rows["benchmark"] == benchmark) & rows["model"].isin(names)]
    cube = part.pivot(index=["model", "item"], columns="sample", values="score")
    values = np.stack([cube.loc[name].sort_index().to_numpy(float) for name in names])  # (M, n, K)
    half, of = values.shape[2] // 2, [names.index(expert) for expert in experts]
    drawn = []
    for _ in range(SPLITS if half else 0):
        mixed = rng.permuted(values, axis=2)
        first, second = (side.mean(2) >= threshold for side in (mixed[:, :, :half], mixed[:, :, half : 2 * half]))
        union = first[of].any(axis=0)
        places = [second[names.index(name)] for name in (model, own)]
        drawn.append([seen for place in places for seen in (place & ~union, union & ~place)])
    n = values.shape[1]
    shares = np.mean(drawn, axis=0) if drawn else np.full((4, n), nan)  # (4, n): how often each item is counted
    found = dict(zip(("alone", "experts", "copy_alone", "copy_experts"), map(float, shares.sum(axis=1)), strict=True))
    for name, gap in (("alone_se", shares[0] - shares[2]), ("experts_se", shares[1] - shares[3])):
        found[name] = float(np.sqrt(n * gap.var(ddof=1))) if n > 1 else nan
    return found
