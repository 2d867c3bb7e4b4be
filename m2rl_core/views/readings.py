"""Section 4: the main claims under the readings that the paper leaves open, as one picture and one sentence."""
from __future__ import annotations

import altair as alt
import pandas as pd
from IPython.display import Markdown

from m2rl_core.claims import readings
from m2rl_core.claims.evidence import Evidence
from m2rl_core.pictures import drawing
from m2rl_core.views.opening import VERDICT_COLOURS
from m2rl_core.views.sensitivity import READINGS

LETTERS = {"supported": "S", "contradicted": "C", "undecided": "?", "not run": "–"}
TILE = 22  # points, the side of a tile


def of(run, evidence: Evidence) -> pd.DataFrame:
    """`claims.readings.decided` on a run: its evidence, the sweep's variants of merges, its layer and other etas."""
    analysis = run.profile.analysis
    at = [run.table("weights", f"{name}_etas.parquet") for name in ("jaccard", "cosine")] if analysis.etas else None
    return readings.decided(readings.every(evidence, run.table("sweep", "rows.parquet"), analysis.layer, at))


def label(reading: str) -> str:
    """A reading in words: variants of merges by the names that section 3.2 gives them."""
    model, _, change = reading.partition(" ")
    varied, equals, value = change.partition("=")
    return f"{model.removeprefix('merge-')}: {READINGS.get(varied, varied)} {value}" if equals else reading


def figure(found: pd.DataFrame, title: str = "The main claims again, one reading changed at a time"):
    """Rows: claims; columns: readings, grouped by what is left open, the study's own first. Empty: no influence."""
    claims = [name for name in readings.HEADLINES.values() if name in set(found["headline"])]
    panels = []
    for group in dict.fromkeys(found.sort_values("group", key=lambda g: g.map(order(found)), kind="stable")["group"]):
        part = found[found["group"] == group]
        part = part.assign(label=[label(r.reading) + (" (own)" if r.own else "") for r in part.itertuples()],
                           letter=part["verdict"].map(LETTERS))
        names = list(dict.fromkeys(part.sort_values("own", ascending=False, kind="stable")["label"]))
        axis = alt.Axis(labelLimit=250, domain=False, ticks=False) if not panels else None
        y = alt.Y("headline:N", sort=claims, scale=alt.Scale(domain=claims), title=None, axis=axis)
        x = alt.X("label:N", sort=names, title=None, axis=alt.Axis(orient="top", labelAngle=-60, labelLimit=200, ticks=False))
        base = alt.Chart(part).encode(x, y)
        colours = alt.Scale(domain=list(LETTERS), range=[VERDICT_COLOURS.get(name, "#999999") for name in LETTERS])
        tiles = base.mark_rect(opacity=0.8).encode(alt.Color("verdict:N", scale=colours, title=None))
        framed = base.mark_rect(fill=None, stroke="black", strokeWidth=2.5).transform_filter("datum.flips")
        letters = base.mark_text(fontSize=11, fontWeight="bold", color="white").encode(text="letter:N")
        panels.append((tiles + framed + letters).properties(
            width=TILE * len(names), height=TILE * len(claims), title=alt.TitleParams(group, fontSize=10, anchor="start")))
    how = ("S supported, C contradicted, ? undecided, – not run; framed: another verdict than by the study's own reading "
           "(own), fewer are better; empty: this reading cannot matter")
    return drawing.finish(alt.hconcat(*panels, spacing=8), title, how)


def order(found: pd.DataFrame) -> dict[str, int]:
    """The groups as they were decided, narrow ones first."""
    sizes = found.groupby("group", sort=False)["reading"].nunique()
    return {group: place for place, group in enumerate(sizes.sort_values(kind="stable").index)}


def sentence(found: pd.DataFrame) -> Markdown:
    """How many headlines keep their verdict under all readings, and which hang on one, with what flips them."""
    changed = found[~found["own"]]
    flips = {name: part for name, part in changed[changed["flips"]].groupby("headline", sort=False)}
    tried = list(dict.fromkeys(changed["headline"]))
    kept = [name for name in tried if name not in flips]
    hang = {name: part for name, part in flips.items() if part["group"].nunique() == 1}
    more = [name for name in flips if name not in hang]
    turned = changed[changed["flips"] & changed[["verdict", "before"]].isin(["supported", "contradicted"]).all(axis=1)]
    untried = [name for name in dict.fromkeys(found["headline"]) if name not in tried]

    def told(part: pd.DataFrame) -> str:
        values = ", ".join(f"{label(r.reading)}: {r.before} becomes {r.verdict}" for r in part.itertuples())
        return f"{part['group'].iloc[0]} ({values})"

    verdict = found[found["own"]].groupby("headline")["verdict"].first()  # on all items, where there is that
    same = {v: [name for name in kept if verdict[name] == v] for v in LETTERS}
    named = "; ".join(f"{len(names)} {v} ({', '.join(names)})" for v, names in same.items() if names)
    text = [f"Of {len(tried)} headlines, **{len(kept)} keep their verdict under every reading tried**"
            + (f": {named}." if named else ".")]
    text.append(f"{len(hang)} hang on one thing that the paper leaves open"
                + (": " + "; ".join(f"*{name}* on {told(part)}" for name, part in hang.items()) if hang else "") + ".")
    if more:
        text.append(f"{len(more)} change under several: " + "; ".join(
            f"*{name}* ({', '.join(dict.fromkeys(flips[name]['group']))})" for name in more) + ".")
    text.append("No reading turns a supported claim into a contradicted one or the reverse." if turned.empty else
                f"A supported claim turns into a contradicted one, or the reverse, in {len(turned)} of {len(changed)} cells.")
    if untried:
        text.append(f"No other reading of {'; '.join(untried)} could be tried.")
    return Markdown(" ".join(text))
