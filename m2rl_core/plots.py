"""Altair pictures of the study; every function takes one tidy frame and returns a chart.

Each model has one colour (Okabe and Ito's, safe for the colour-blind), one mark and one dash everywhere, so that
pictures read in black and white. Titles say which way is good; intervals are 95 %; an unfinished run is pale.
"""
from __future__ import annotations

import functools
import json

import pandas as pd
import vl_convert

from m2rl_core.png import shrink
from m2rl_core.slim import without

with without("rfc3987_syntax"):  # jsonschema's grammar of international URLs: over a second, for a check of no chart
    import altair as alt

PPI = 144
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
GROUPS = {"outcome": ("#0072B2", "circle"), "process": ("#D55E00", "diamond"), "generation": ("#999999", "square")}
DOMAIN_NAMES = {"math": "Math", "coding": "Coding", "science": "Science", "if": "IF", "agent": "Agent"}


def png(chart: alt.TopLevelMixin | dict, ppi: int = PPI) -> bytes:
    """The chart as PNG bytes with at most 256 colours: vl-convert's own are some five times as large."""
    spec = chart if isinstance(chart, dict) else chart.to_dict()
    return _drawn(json.dumps(spec), ppi)


@functools.lru_cache(maxsize=2)
def _drawn(spec: str, ppi: int) -> bytes:
    """A notebook publishes a figure and then shows it: drawn once."""
    return shrink(vl_convert.vegalite_to_png(spec, ppi=ppi))


def show_as_png(ppi: int = PPI) -> None:
    """Let notebooks embed pictures as small PNG files, which every viewer shows, offline too."""
    def render(spec: dict, **options) -> tuple[dict, dict]:
        data = png(spec, ppi)
        width, height = (round(int.from_bytes(data[at:at + 4], "big") * 72 / ppi) for at in (16, 20))
        return {"image/png": data}, {"image/png": {"width": width, "height": height}}

    alt.renderers.register("m2rl-png", render)
    alt.renderers.enable("m2rl-png")


def finish(chart, title: str, good: str = ""):
    params = alt.TitleParams(title, subtitle=good or alt.Undefined, anchor="start", fontSize=12, subtitleFontSize=10)
    return (
        chart.properties(title=params)
        .configure_view(stroke="#dddddd")
        .configure_axis(labelFontSize=10, titleFontSize=10, titleFontWeight="normal", gridColor="#eeeeee")
        .configure_legend(labelFontSize=10, titleFontSize=10, symbolStrokeWidth=1.5, labelLimit=220)
        .configure_header(labelFontSize=10, titleFontSize=10)
    )


def nothing(text: str, title: str):
    """A picture that says why there is none."""
    chart = alt.Chart(pd.DataFrame({"text": [text]})).mark_text(fontSize=12).encode(text="text:N")
    return finish(chart.properties(width=400, height=60), title)


def _named(frame: pd.DataFrame, *columns: str | None) -> pd.DataFrame:
    """Domains by their display names in these columns; Vega cannot sort by a list that holds "if"."""
    return frame.assign(**{c: frame[c].replace(DOMAIN_NAMES) for c in columns if c is not None})


def _models(frame: pd.DataFrame) -> list[str]:
    """The models of a frame in the study's order, unknown ones last."""
    present = list(dict.fromkeys(frame["model"]))
    return [m for m in STYLE if m in present] + [m for m in present if m not in STYLE]


def _colors(models):
    return alt.Scale(domain=models, range=[STYLE.get(m, ("#333333",))[0] for m in models])


def _color(models, legend=alt.Undefined):
    return alt.Color("model:N", scale=_colors(models), title=None, legend=legend)


def _shape(models, legend=alt.Undefined):
    scale = alt.Scale(domain=models, range=[STYLE.get(m, ("", "circle"))[1] for m in models])
    return alt.Shape("model:N", scale=scale, title=None, legend=legend)


def _dash(models, legend=alt.Undefined):
    scale = alt.Scale(domain=models, range=[STYLE.get(m, ("", "", [1, 0]))[2] for m in models])
    return alt.StrokeDash("model:N", scale=scale, title=None, legend=legend)


def figure1(stages, done=()):
    """Fig. 1 from the study itself: `stages` is a list of (name, needs); stages outside `done` are pale if it is given.

    Only models are drawn (names of STYLE); the column is the longest path from the start.
    """
    needs = {name: [n for n in sources if n in STYLE] for name, sources in stages if name in STYLE}
    depth: dict[str, int] = {}
    for name, sources in needs.items():
        depth[name] = 1 + max((depth[source] for source in sources), default=-1)
    columns: dict[int, list[str]] = {}
    for name in needs:
        columns.setdefault(depth[name], []).append(name)
    tallest = max(map(len, columns.values()))
    nodes = pd.DataFrame([{"model": name, "x": x, "y": (i + 0.5) * tallest / len(names)}
                          for x, names in columns.items() for i, name in enumerate(names)])
    nodes["pale"] = [0.35 if done and name not in done else 1.0 for name in nodes["model"]]
    place = nodes.set_index("model")
    half = 0.34
    edges = pd.DataFrame([
        {"model": s, "x": place.x[s] + half, "y": place.y[s], "x2": place.x[t] - half, "y2": place.y[t]}
        for t, sources in needs.items() for s in sources if not (s == "sft" and depth[t] > depth["sft"] + 1)
    ])
    x = alt.X("x:Q", axis=None, scale=alt.Scale(domain=[-0.45, max(columns) + 0.45], nice=False))
    y = alt.Y("y:Q", axis=None, scale=alt.Scale(domain=[0, tallest], reverse=True, nice=False))
    pale = alt.Opacity("pale:Q", scale=None)
    lines = alt.Chart(edges).mark_rule(color="#999999", strokeWidth=0.8).encode(x, y, x2="x2:Q", y2="y2:Q")
    boxes = nodes.assign(x=nodes.x - half, x2=nodes.x + half, y0=nodes.y - 0.33, y2=nodes.y + 0.33)
    rects = alt.Chart(boxes).mark_rect(cornerRadius=4, strokeWidth=2, fill="white").encode(
        x, alt.Y("y0:Q", axis=None), x2="x2:Q", y2="y2:Q", opacity=pale,
        stroke=alt.Color("model:N", scale=_colors(_models(nodes)), legend=None))
    texts = alt.Chart(nodes).mark_text(fontSize=11).encode(x, y, text="model:N", opacity=pale)
    chart = (lines + rects + texts).properties(width=150 * len(columns), height=34 * tallest)
    how = "every merge and MT-OPD also starts from sft (not drawn)" + ("; pale: not finished" if done else "")
    return finish(chart, "Mix (rl-multi) or merge (merge-*, mt-opd): the study as it runs", how)


def trajectories(frame, title, y_title="accuracy (%)", facet=None, good="higher is better", columns=3, zero=False,
                 x_title="step", legend=True):
    """Fig. 2, Fig. 9: lines over steps.

    Columns: model, step, value; optional low, high (a band), `facet`, finished (bool; unfinished runs are pale).
    """
    finished = frame["finished"] if "finished" in frame else pd.Series(True, frame.index)
    frame = _named(frame, facet).assign(pale=finished.map({True: 1.0, False: 0.35}))
    models = _models(frame)
    x = alt.X("step:Q", title=x_title, axis=alt.Axis(tickCount=5))
    scale = alt.Scale(zero=zero)
    base = alt.Chart(frame)
    y, pale = alt.Y("value:Q", title=y_title, scale=scale), alt.Opacity("pale:Q", scale=None)
    legend = alt.Legend(symbolType="stroke", symbolSize=300, symbolStrokeWidth=2, symbolOpacity=1) if legend else None
    layers = [base.mark_line(strokeWidth=1.6).encode(
        x, y, _color(models, legend), strokeDash=_dash(models, legend), opacity=pale)]
    if {"low", "high"} <= set(frame.columns):
        layers.insert(0, base.mark_area(opacity=0.13).encode(
            x, alt.Y("low:Q", title=y_title, scale=scale), y2="high:Q", color=_color(models, legend)))
    chart = alt.layer(*layers)
    good += "" if finished.all() else "; pale: not finished"
    if facet is None:
        return finish(chart.properties(width=380, height=200), title, good)
    chart = chart.properties(width=185, height=120)
    order = list(dict.fromkeys(frame[facet]))
    chart = chart.facet(facet=alt.Facet(f"{facet}:N", title=None, sort=order), columns=columns)
    # Axes of their own: else a last row that is not full leaves an axis under nothing.
    return finish(chart.resolve_scale(y="independent").resolve_axis(x="independent"), title, good)


def dots_with_intervals(scores, title, benchmarks=None, printed=None, columns=5):
    """Tables 3, 4 and 8 as dots: `scores` as `stats.score_table` makes it; `printed` (a paper table) as hollow marks.

    `printed` has models as index and benchmarks as columns, in percent; what it lacks is not drawn.
    """
    benchmarks = list(benchmarks or [c for c in scores if f"{c}_low" in scores])
    ours = pd.concat([pd.DataFrame({
        "model": scores["model"], "benchmark": b, "value": scores[b], "low": scores[f"{b}_low"],
        "high": scores[f"{b}_high"], "source": "this run"}) for b in benchmarks])
    parts = [ours]
    if printed is not None:
        shared = [b for b in benchmarks if b in printed]
        theirs = printed[printed.index.isin(scores["model"])][shared].rename_axis("model").reset_index()
        parts.append(theirs.melt("model", var_name="benchmark").assign(source="paper (printed)"))
    frame = pd.concat(parts, ignore_index=True)
    models = _models(frame)
    y = alt.Y("model:N", sort=models, title=None)
    base = alt.Chart(frame)
    rules = base.mark_rule(strokeWidth=1.5).encode(
        alt.X("low:Q", title="score (%)"), y, x2="high:Q", color=_color(models, None),
    ).transform_filter("isValid(datum.low)")
    dots = base.mark_point(size=45, filled=True, opacity=1).encode(
        x="value:Q", y=y, color=_color(models, None), shape=_shape(models, None),
    ).transform_filter("datum.source == 'this run'")
    hollow = base.mark_point(size=45, filled=False, strokeWidth=1.2, color="#333333").encode(
        x="value:Q", y=y, shape=_shape(models, None)).transform_filter("datum.source != 'this run'")
    chart = (rules + dots + hollow).properties(width=118 if len(benchmarks) > 1 else 330, height=13 * len(models))
    chart = chart.facet(facet=alt.Facet("benchmark:N", title=None, sort=benchmarks), columns=columns)
    hollow_is = "; hollow: the paper's model, full benchmarks" if printed is not None else ""
    how = f"right is better; filled: this run (95 %){hollow_is}"
    return finish(chart.resolve_scale(x="independent"), title, how)


def readings(frame, title, good="right is better; filled: as in Table 4, hollow: one parameter changed; lines: 95 %"):
    """One line a reading of a merging method, grouped by method. Columns: model, label, value, low, high, own (bool)."""
    models, order = _models(frame), list(frame["label"])
    base = alt.Chart(frame)
    y = alt.Y("label:N", sort=order, title=None, axis=alt.Axis(labelLimit=300))
    rules = base.mark_rule(strokeWidth=1.5).encode(
        alt.X("low:Q", title="mean of nine (%)", scale=alt.Scale(zero=False)), y, x2="high:Q", color=_color(models, None))
    dots = [base.mark_point(size=45, filled=filled, opacity=1, strokeWidth=1.5).encode(
        x="value:Q", y=y, color=_color(models, None), shape=_shape(models, None),
    ).transform_filter(test) for filled, test in ((True, "datum.own"), (False, "!datum.own"))]
    return finish(alt.layer(rules, *dots).properties(width=330, height=14 * len(order)), title, good)


def against(frame, title, good="left is better; filled: ours, hollow: the other tool, grey tick: the floor; log scale"):
    """A benchmark: ours and another tool's cost, joined. Columns: name, side ("ours", "other" or "floor"), measure, value."""
    order = list(dict.fromkeys(frame["name"]))
    base = alt.Chart(frame)
    x = alt.X("value:Q", title=None, scale=alt.Scale(type="log", nice=False, padding=14), axis=alt.Axis(tickCount=4))
    y = alt.Y("name:N", sort=order, title=None, axis=alt.Axis(labelLimit=260))
    layers = [base.mark_line(color="#bbbbbb", strokeWidth=2).encode(x, y, detail="name:N").transform_filter(
        "datum.side != 'floor'")]
    layers += [base.mark_point(filled=filled, size=60, opacity=1, color="black", strokeWidth=1.5).encode(
        x, y).transform_filter(f"datum.side == '{side}'") for side, filled in (("ours", True), ("other", False))]
    layers.append(base.mark_tick(color="#888888", thickness=3, size=14).encode(x, y).transform_filter(
        "datum.side == 'floor'"))
    chart = alt.layer(*layers).properties(width=270, height=26 * len(order))
    facet = alt.Facet("measure:N", title=None, sort=list(dict.fromkeys(frame["measure"])))
    return finish(chart.facet(facet=facet, columns=2).resolve_scale(x="independent"), title, good)


def heatmap(frame, title, x, y, value="value", facet=None, good="", text=".2f", columns=2, size=42, note=None):
    """Fig. 3, Fig. 4: a grid with its numbers.

    `x`, `y`, `value`, `facet` and `note` (a second line of text in each cell) name columns of the frame.
    """
    frame = _named(frame, x, y, facet)
    known = [*DOMAIN_NAMES.values(), *STYLE]
    order = {axis: sorted(set(frame[axis]), key=lambda name: (known.index(name) if name in known else 99, name))
             for axis in (x, y)}
    middle = (frame[value].min() + frame[value].max()) / 2
    frame = frame.assign(_dark=frame[value] > middle)
    base = alt.Chart(frame).encode(
        alt.X(f"{x}:N", sort=order[x], title=x, axis=alt.Axis(labelAngle=0)), alt.Y(f"{y}:N", sort=order[y], title=y))
    ink = alt.condition("datum._dark", alt.value("white"), alt.value("black"))
    layers = [
        base.mark_rect().encode(alt.Color(f"{value}:Q", scale=alt.Scale(scheme="blues"), legend=None)),
        base.mark_text(fontSize=10, dy=0 if note is None else -5).encode(
            text=alt.Text(f"{value}:Q", format=text), color=ink,
        ).transform_filter(alt.FieldValidPredicate(field=value, valid=True)),
    ]
    if note is not None:
        layers.append(base.mark_text(fontSize=8, dy=8).encode(text=f"{note}:N", color=ink))
    chart = alt.layer(*layers).properties(width=size * 1.15 * len(order[x]), height=size * 0.75 * len(order[y]))
    if facet is not None:
        facets = list(dict.fromkeys(frame[facet]))
        chart = chart.facet(facet=alt.Facet(f"{facet}:N", title=None, sort=facets), columns=columns)
    return finish(chart, title, good)


def _whiskers(base, y_title):
    """Intervals that show on white and on black."""
    y = alt.Y("low:Q", title=y_title)
    return [base.mark_rule(color="white", strokeWidth=3.5).encode(y, y2="high:Q"),
            base.mark_rule(strokeWidth=1.2).encode(y, y2="high:Q")]


def bars_with_intervals(frame, title, y_title="cosine", good="higher is better", marks=()):
    """Fig. 5: grouped bars. Columns: benchmark, model, value, low, high.

    `marks` names up to two more columns, drawn as ticks (ceiling, chance).
    """
    models = _models(frame)
    order = list(dict.fromkeys(frame["benchmark"]))
    base = alt.Chart(frame).encode(
        x=alt.X("benchmark:N", sort=order, title=None, axis=alt.Axis(labelAngle=0)),
        xOffset=alt.XOffset("model:N", sort=models))
    top = 1.05 * frame[["value", "high", *marks]].max(axis=None)
    scale = alt.Scale(domain=[min(0.0, frame[["value", "low"]].min(axis=None)), top], nice=False)
    layers = [base.mark_bar(stroke="black", strokeWidth=0.5).encode(
        alt.Y("value:Q", title=y_title, scale=scale), _color(models)), *_whiskers(base, y_title)]
    for name, thickness in zip(marks, (3, 1.5), strict=False):
        layers.append(base.mark_tick(thickness=thickness, color="#A0A0A0", size=20).encode(y=f"{name}:Q"))
    how = f"{good}; lines: 95 %" + (f"; grey ticks: {', '.join(marks)} (thick, thin)" if marks else "")
    return finish(alt.layer(*layers).properties(width=95 * len(order), height=200), title, how)


def scatter(frame, title, x_title, y_title, facet=None, good="up and right is better", columns=2, own_x=False,
            width=290):
    """Fig. 6: one point a model with its name, and the least-squares line. Columns: model, x, y; optional `facet`.

    Whiskers where the frame has low and high (of y). `own_x`: each panel has a horizontal scale of its own.
    """
    models = _models(frame)
    ranks = (frame.groupby(facet) if facet else frame)["x"].rank(method="first")
    base = alt.Chart(frame.assign(under=ranks % 2 == 0))  # neighbours get their names above and below
    x = alt.X("x:Q", title=x_title, scale=alt.Scale(zero=False, padding=25))
    y = alt.Y("y:Q", title=y_title, scale=alt.Scale(zero=False, padding=12))
    line = base.mark_line(color="#888888", strokeDash=[4, 3]).encode(x, y).transform_regression(
        "x", "y", groupby=[facet] if facet else [])
    dots = base.mark_point(filled=True, size=60, opacity=1).encode(x, y, _color(models, None), _shape(models, None))
    over, under = (base.mark_text(dy=dy, fontSize=9).encode(x, y, text="model:N").transform_filter(test)
                   for dy, test in ((-9, "!datum.under"), (11, "datum.under")))
    layers = [line, dots, over, under]
    if {"low", "high"} <= set(frame.columns):
        scaled = alt.Y("low:Q", title=y_title, scale=alt.Scale(zero=False, padding=12))
        layers.insert(1, base.mark_rule(opacity=0.5).encode(x, scaled, y2="high:Q", color=_color(models, None)))
    chart = alt.layer(*layers).properties(width=width, height=0.8 * width)
    if facet is not None:
        order = list(dict.fromkeys(frame[facet]))
        chart = chart.facet(facet=alt.Facet(f"{facet}:N", title=None, sort=order), columns=columns)
        chart = chart.resolve_scale(y="independent", x="independent" if own_x else "shared")
    return finish(chart, title, good)


def paired_dots(frame, title, good="right is better", columns=2):
    """Fig. 7: outcome and process judging of each model, joined.

    Columns: benchmark, model, mode ("outcome" or "process"), value; optional low, high.
    """
    models = _models(frame)
    modes = [m for m in GROUPS if m in set(frame["mode"])]
    order = list(dict.fromkeys(frame["benchmark"]))
    base = alt.Chart(frame)
    y = alt.Y("model:N", sort=models, title=None)
    x = alt.X("value:Q", title="judged rightly (%)", scale=alt.Scale(zero=False))
    layers = [base.mark_line(color="#bbbbbb", strokeWidth=2).encode(x, y, detail="model:N")]
    color = alt.Color("mode:N", title=None, scale=alt.Scale(domain=modes, range=[GROUPS[m][0] for m in modes]))
    shape = alt.Shape("mode:N", title=None, scale=alt.Scale(domain=modes, range=[GROUPS[m][1] for m in modes]))
    if {"low", "high"} <= set(frame.columns):
        layers.append(base.mark_rule(opacity=0.6).encode(
            alt.X("low:Q", title="judged rightly (%)", scale=alt.Scale(zero=False)), y, x2="high:Q", color=color))
    layers.append(base.mark_point(filled=True, size=55, opacity=1).encode(x, y, color, shape))
    chart = alt.layer(*layers).properties(width=230, height=16 * len(models))
    chart = chart.facet(facet=alt.Facet("benchmark:N", title=None, sort=order), columns=columns)
    return finish(chart, title, good)


def grouped_bars(frame, title, y_title="average over four benchmarks (%)", good="higher is better"):
    """Fig. 8: generation, outcome and process of each model side by side.

    Columns: model, mode ("generation", "outcome" or "process"), value; optional low, high.
    """
    models = _models(frame)
    modes = [m for m in ("generation", "outcome", "process") if m in set(frame["mode"])]
    base = alt.Chart(frame).encode(
        x=alt.X("model:N", sort=models, title=None, axis=alt.Axis(labelAngle=-25)),
        xOffset=alt.XOffset("mode:N", sort=modes))
    scale = alt.Scale(domain=modes, range=[GROUPS[m][0] for m in modes])
    color = alt.Color("mode:N", title=None, sort=modes, scale=scale)
    layers = [base.mark_bar(stroke="black", strokeWidth=0.5).encode(alt.Y("value:Q", title=y_title), color)]
    if {"low", "high"} <= set(frame.columns):
        layers += _whiskers(base, y_title)
    return finish(alt.layer(*layers).properties(width=62 * len(models), height=200), title, good)
