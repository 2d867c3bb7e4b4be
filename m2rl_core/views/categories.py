"""Section 3.2: the score on BFCL v3 by group and category, and which samples found no room in the model's context."""
from __future__ import annotations

from collections.abc import Sequence

import pandas as pd
from IPython.display import HTML, Markdown

from m2rl_core.claims.evidence import Evidence
from m2rl_core.domains import NO_ROOM
from m2rl_core.metrics import bfcl, bfcl_parts
from m2rl_core.views.grid import grid
from m2rl_core.views.opening import interval, miniature

BENCHMARK = "bfcl_v3"
COLUMNS = ["model", "part", "estimate", "low", "high", "n", "no_room"]


def parts(evidence: Evidence, models: Sequence[str]) -> pd.DataFrame:
    """BFCL v3 of each model in percent: overall, by group, by category; empty for the miniature, whose categories are others.

    Columns: model, part, estimate, low, high, n (items), no_room (samples that score 0 because they did not fit).
    """
    rows = evidence.frame("scores", "category", "reason")
    rows = rows[rows["benchmark"] == BENCHMARK]
    if rows.empty or not set(rows["category"]) <= set(bfcl.GROUP_OF):
        return pd.DataFrame(columns=COLUMNS)
    found = []
    for model in evidence.present(models):
        own = rows[rows["model"] == model]
        lost = own[own["reason"].str.startswith(NO_ROOM)]["category"]
        counts = {"overall": len(lost), **lost.map(bfcl.GROUP_OF).value_counts(), **lost.value_counts()}
        lines = bfcl_parts.breakdown(own, model, evidence.rng())
        found.append(lines.assign(model=model, no_room=[int(counts.get(part, 0)) for part in lines["part"]]))
    return pd.concat(found, ignore_index=True)[COLUMNS]


def shown(found: pd.DataFrame) -> HTML | Markdown:
    """`parts` for the eye: a line a part, a column a model; groups and the overall score in capitals."""
    if found.empty:
        return Markdown(f"*not run*: the categories of BFCL v3; no rows of `{BENCHMARK}` here are of its own categories.")
    lines = []
    for part, same in found.groupby("part", sort=False):
        cells = {r.model: interval(r.estimate, r.low, r.high).replace(" [", "\n[")
                 + (f"\n{r.no_room} no room" if r.no_room else "") for r in same.itertuples()}
        name = part.upper() if part == "overall" or part in bfcl.GROUPS else part
        lines.append({"": name, "items": same["n"].max(), **cells})
    return grid(pd.DataFrame(lines).fillna("–"))


def room(evidence: Evidence) -> Markdown:
    """How many samples scored 0 because a prompt or a reply found no room in the model's context, by benchmark."""
    rows = evidence.frame("scores", "reason")
    lost = rows["reason"].fillna("").str.startswith(NO_ROOM)
    if not lost.any():
        return Markdown(f"Every prompt and every reply found room in its model's context ({len(rows):,} samples).")
    told = ["**Samples that score 0 because a prompt or a reply found no room in the model's context:**", ""]
    for benchmark, same in rows.assign(lost=lost).groupby("benchmark", sort=False):
        by = same.groupby("model", sort=False)["lost"].agg(["sum", "size"])
        if by["sum"].any():
            told.append(f"* {miniature(benchmark)}: " + ", ".join(f"`{m}` {r['sum']:,} of {r['size']:,}"
                                                                  for m, r in by.iterrows() if r["sum"]))
    return Markdown("\n".join(told))
