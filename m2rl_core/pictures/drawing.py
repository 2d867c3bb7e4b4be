"""What all pictures of the study share: how a model looks, what hovering shows, how a click chooses, the frame.

Each model has one colour (Okabe and Ito's, safe for the colour-blind), one mark and one dash everywhere, so that
pictures read in black and white. Titles say which way is good; intervals are 95 %; an unfinished run is pale.
Where a viewer can, hovering shows the item and a click on a mark or the legend leaves one model (shift: more) strong.
"""
from __future__ import annotations

import pandas as pd

from m2rl_core.pictures import picture
from m2rl_core.slim import without

with without("rfc3987_syntax"):  # jsonschema's grammar of international URLs: over a second, for a check of no chart
    import altair as alt

# model: (colour, mark, dash)
STYLE = {
    "base": ("#999999", "cross", [1, 2]),
    "sft": ("#555555", "square", [4, 2]),
    "rl-math": ("#0072B2", "circle", [1, 0]),
    "rl-coding": ("#E69F00", "triangle-up", [6, 2]),
    "rl-science": ("#009E73", "diamond", [2, 2]),
    "rl-if": ("#D55E00", "triangle-down", [8, 2, 2, 2]),
    "rl-agent": ("#CC79A7", "triangle-right", [4, 4]),
    "rl-multi": ("#000000", "square", [1, 0]),
    "merge-average": ("#9ED3F2", "triangle-left", [1, 1]),
    "merge-ta": ("#56B4E9", "triangle-up", [3, 1]),
    "merge-ties": ("#1F78B4", "circle", [5, 1]),
    "merge-sce": ("#3B8EA5", "diamond", [7, 1]),
    "merge-ties-dare": ("#2B5C8A", "triangle-down", [5, 1, 1, 1]),
    "merge-ta-dare": ("#7FA8D1", "square", [3, 1, 1, 1]),
    "mt-opd": ("#8A6D00", "cross", [10, 2]),
}
ENDS = {"low": "95 % from", "high": "95 % to"}


class _Names(dict):
    """A domain of one's own goes by its own name."""

    def __missing__(self, name: str) -> str:
        return name


DOMAIN_NAMES = _Names({"math": "Math", "coding": "Coding", "science": "Science", "if": "IF", "agent": "Agent"})
HELPERS = {"pale", "finished", "side", "own", "x2", "y0", "y2", "at", "beside", "floor", "top", "ink"}  # not for readers


def png(chart: alt.TopLevelMixin | dict, ppi: int = picture.PPI) -> bytes:
    """The chart as a small PNG."""
    return picture.png(picture.source(chart), ppi)


def show_pictures(ppi: int = picture.PPI) -> None:
    """Let notebooks embed each chart as a small PNG, which shows everywhere, and as its source, which JupyterLab draws
    by itself, to hover and to click, offline too."""
    def render(spec: dict, **options) -> tuple[dict, dict]:
        data = picture.bundle(picture.source(spec))
        width, height = (round(int.from_bytes(data["image/png"][at:at + 4], "big") * 72 / ppi) for at in (16, 20))
        return data, {"image/png": {"width": width, "height": height}}

    alt.renderers.register("m2rl", render)
    alt.renderers.enable("m2rl")


def finish(chart, title: str, good: str = ""):
    params = alt.TitleParams(title, subtitle=good or alt.Undefined, anchor="start", fontSize=12, subtitleFontSize=10)
    return (
        chart.properties(title=params)
        .configure(font=picture.FONT)
        .configure_view(stroke="#dddddd")
        .configure_axis(labelFontSize=10, titleFontSize=10, titleFontWeight="normal", gridColor="#eeeeee")
        .configure_legend(labelFontSize=10, titleFontSize=10, symbolStrokeWidth=1.5, labelLimit=220)
        .configure_header(labelFontSize=10, titleFontSize=10)
    )


def nothing(text: str, title: str):
    """A picture that says why there is none."""
    chart = alt.Chart(pd.DataFrame({"text": [text]})).mark_text(fontSize=12).encode(text="text:N")
    return finish(chart.properties(width=400, height=60), title, "undefined")


def named(frame: pd.DataFrame, *columns: str | None) -> pd.DataFrame:
    """Domains by their display names in these columns; Vega cannot sort by a list that holds "if"."""
    return frame.assign(**{c: frame[c].replace(DOMAIN_NAMES) for c in columns if c is not None})


def models_of(frame: pd.DataFrame) -> list[str]:
    """The models of a frame in the study's order, unknown ones last."""
    present = list(dict.fromkeys(frame["model"]))
    return [m for m in STYLE if m in present] + [m for m in present if m not in STYLE]


def colors(models):
    return alt.Scale(domain=models, range=[STYLE.get(m, ("#333333",))[0] for m in models])


def color(models, legend=alt.Undefined):
    return alt.Color("model:N", scale=colors(models), title=None, legend=legend)


def shape(models, legend=alt.Undefined):
    scale = alt.Scale(domain=models, range=[STYLE.get(m, ("", "circle"))[1] for m in models])
    return alt.Shape("model:N", scale=scale, title=None, legend=legend)


def dash(models, legend=alt.Undefined):
    scale = alt.Scale(domain=models, range=[STYLE.get(m, ("", "", [1, 0]))[2] for m in models])
    return alt.StrokeDash("model:N", scale=scale, title=None, legend=legend)


def tips(frame: pd.DataFrame, **titles: str) -> list[alt.Tooltip]:
    """What hovering shows: every column that a reader knows, in the frame's order; `titles` by column."""
    shown = [c for c in frame if c not in HELPERS and not frame[c].isna().all()]
    number = {c: pd.api.types.is_float_dtype(frame[c]) for c in shown}
    return [alt.Tooltip(f"{c}:Q" if pd.api.types.is_numeric_dtype(frame[c]) and not pd.api.types.is_bool_dtype(frame[c])
                        else f"{c}:N", title=titles.get(c, ENDS.get(c, c)), **({"format": ".4~g"} if number[c] else {}))
            for c in shown]


def base_of(frame: pd.DataFrame, **titles: str) -> alt.Chart:
    """A chart of the frame whose marks say what they are."""
    return alt.Chart(frame).encode(tooltip=tips(frame, **titles))


def picker(field: str = "model", legend: bool = False) -> alt.Parameter:
    """A click on a mark (and on the legend) chooses one value of `field`; nothing chosen is all chosen."""
    bound = {"bind": "legend"} if legend else {}
    return alt.selection_point(name="chosen", fields=[field], on="click", clear="dblclick", **bound)


def strong(pick: alt.Parameter, shown=1.0):
    """Opacity: `shown` (a number, or a column's encoding) where chosen, a tenth elsewhere."""
    return alt.when(pick).then(alt.value(shown) if isinstance(shown, float) else shown).otherwise(alt.value(0.1))
