"""BFCL v3 by its parts: a model's score overall, in each group and in each category, with intervals."""
from __future__ import annotations

import numpy as np
import pandas as pd

from m2rl_core.metrics.bfcl import GROUP_OF, GROUPS
from m2rl_core.metrics.measured import measure


def breakdown(rows: pd.DataFrame, model: str, rng: np.random.Generator) -> pd.DataFrame:
    """A model's score on BFCL v3 in percent: overall, in each group, in each category: part, estimate, low, high, n."""
    own = rows[rows["model"] == model]
    groups = own["category"].map(GROUP_OF)
    parts = [("overall", own)]
    for group in GROUPS:
        parts += [(group, own[groups == group]), *own[groups == group].groupby("category", sort=False)]
    lines = []
    for name, part in parts:
        if not part.empty:
            found = measure(part.assign(benchmark="bfcl_v3"), rng).contrast({("bfcl_v3", model): 1.0})
            lines.append({"part": name, "estimate": found.estimate, "low": found.low, "high": found.high, "n": found.n})
    return pd.DataFrame(lines)
