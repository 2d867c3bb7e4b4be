"""BFCL v3's averaging: the unweighted mean of Non-Live, Live and Multi-Turn, as a weight for each category.

Non-Live is the unweighted mean of simple (itself that of Python, Java and JavaScript), multiple, parallel,
parallel_multiple and irrelevance; Live weighs its items alike; Multi-Turn is the unweighted mean of its four categories.
Every score is so a weighted mean of categories, which `measured` resamples. What was not run has no weight, where the
official code counts it as 0.
"""
from __future__ import annotations

from collections.abc import Mapping

import pandas as pd

GROUPS = {
    "Non-Live": (("simple", "java", "javascript"), "multiple", "parallel", "parallel_multiple", "irrelevance"),
    "Live": ("live_simple", "live_multiple", "live_parallel", "live_parallel_multiple", "live_irrelevance",
             "live_relevance"),
    "Multi-Turn": ("multi_turn_base", "multi_turn_miss_func", "multi_turn_miss_param", "multi_turn_long_context"),
}
GROUP_OF = {name: group for group, parts in GROUPS.items() for part in parts
            for name in (part if isinstance(part, tuple) else (part,))}


def shares(items: Mapping[str, int]) -> dict[str, float]:
    """Each category's weight in its benchmark's score, from how many items it has; they add up to 1.

    BFCL v3's weights where all categories are its own, else all alike (the miniature has a category of another name).
    """
    if not set(items) <= set(GROUP_OF):
        return dict.fromkeys(items, 1 / len(items))
    groups = [present for parts in GROUPS.values() if (present := _present(parts, items))]
    found = {}
    for parts in groups:
        total = sum(items[name] for part in parts for name in part)
        for part in parts:
            for name in part:
                live = GROUP_OF[name] == "Live"
                found[name] = (items[name] / total if live else 1 / len(parts) / len(part)) / len(groups)
    return found


def _present(parts, items) -> list[list[str]]:
    """The parts of a group that were run, each a list of categories."""
    found = [[name for name in (part if isinstance(part, tuple) else (part,)) if name in items] for part in parts]
    return [part for part in found if part]


def average(rows: pd.DataFrame) -> float:
    """The overall score, in the unit of `score`, of rows (category, score), one an item; ValueError for none."""
    if rows.empty:
        raise ValueError("BFCL v3: no rows to average")
    means = rows.groupby("category")["score"].agg(["mean", "size"])
    weight = shares(means["size"].to_dict())
    return float(sum(weight[name] * mean for name, mean in means["mean"].items()))
