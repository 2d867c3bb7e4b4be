"""Altair pictures of the study; every function takes one tidy frame and returns a chart in the manner of `drawing`."""
from __future__ import annotations

import numpy as np
import pandas as pd

from m2rl_core.pictures import drawing, labels, picture
from m2rl_core.pictures.drawing import alt

ALIGN = {0: "center", 1: "left", -1: "right"}
GROUPS = {"outcome": ("#0072B2", "circle"), "process": ("#D55E00", "diamond"), "generation": ("#999999", "square")}
BLUES = ((247, 251, 255), (8, 81, 156))  # from nothing to much; red, green, blue
BOTH_WAYS = ((213, 94, 0), (255, 255, 255), (0, 114, 178))  # below 0, 0, above 0


def figure1(stages, done=()):
    """Fig. 1 from the study itself: `stages` is a list of (name, needs); stages outside `done` are pale if it is given.

    Only models are drawn (names of drawing.STYLE); the column is the longest path from the start.
    """
    needs = {name: [n for n in sources if n in drawing.STYLE] for name, sources in stages if name in drawing.STYLE}
    depth: dict[str, int] = {}
    for name, sources in needs.items():
        depth[name] = 1 + max((depth[source] for source in sources), default=-1)
    columns: dict[int, list[str]] = {}
    for name in needs:
        columns.setdefault(depth[name], []).append(name)
    tallest = max(map(len, columns.values()))
    nodes = pd.DataFrame([{"model": name, "x": x, "y": (i + 0.5) * tallest / len(names)}
                          for x, names in columns.items() for i, name in enumerate(names)])
    nodes["starts from"] = [", ".join(needs[name]) or "nothing" for name in nodes["model"]]
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
        x, alt.Y("y0:Q", axis=None), x2="x2:Q", y2="y2:Q", opacity=pale, tooltip=["model:N", "starts from:N"],
        stroke=alt.Color("model:N", scale=drawing.colors(drawing.models_of(nodes)), legend=None))
    texts = alt.Chart(nodes).mark_text(fontSize=11).encode(x, y, text="model:N", opacity=pale)
    chosen = drawing.picker("model")  # a box is chosen: the lines that leave it stay strong
    lines = lines.encode(opacity=drawing.strong(chosen))
    chart = (lines + rects.add_params(chosen) + texts).properties(width=150 * len(columns), height=34 * tallest)
    how = "every merge and MT-OPD also starts from sft (not drawn)" + ("; pale: not finished" if done else "")
    return drawing.finish(chart, "Mix (rl-multi) or merge (merge-*, mt-opd): the study as it runs", how)


def trajectories(frame, title, y_title="accuracy (%)", facet=None, good="higher is better", columns=3, zero=False,
                 x_title="step", legend=True):
    """Fig. 2, Fig. 9: lines over steps.

    Columns: model, step, value; optional low, high (a band), `facet`, finished (bool; unfinished runs are pale).
    """
    finished = frame["finished"] if "finished" in frame else pd.Series(True, frame.index)
    frame = drawing.named(frame, facet).assign(pale=finished.map({True: 1.0, False: 0.35}))
    models = drawing.models_of(frame)
    x = alt.X("step:Q", title=x_title, axis=alt.Axis(tickCount=5))
    scale = alt.Scale(zero=zero)
    base, chosen = drawing.base_of(frame), drawing.picker(legend=legend)
    y, pale = alt.Y("value:Q", title=y_title, scale=scale), drawing.strong(chosen, alt.Opacity("pale:Q", scale=None))
    legend = alt.Legend(symbolType="stroke", symbolSize=300, symbolStrokeWidth=2, symbolOpacity=1) if legend else None
    layers = [base.mark_line(strokeWidth=1.6).encode(
        x, y, drawing.color(models, legend), strokeDash=drawing.dash(models, legend), opacity=pale).add_params(chosen)]
    if {"low", "high"} <= set(frame.columns):
        layers.insert(0, base.mark_area().encode(
            x, alt.Y("low:Q", title=y_title, scale=scale), y2="high:Q", color=drawing.color(models, legend),
            opacity=alt.when(chosen).then(alt.value(0.13)).otherwise(alt.value(0.02))))
    # A line by itself says its first point only.
    layers.append(base.mark_point(opacity=0, size=80, filled=True).encode(x, y).properties(description=picture.HOVER))
    chart = alt.layer(*layers)
    good += "" if finished.all() else "; pale: not finished"
    if facet is None:
        return drawing.finish(chart.properties(width=380, height=200), title, good)
    chart = chart.properties(width=185, height=120)
    order = list(dict.fromkeys(frame[facet]))
    chart = chart.facet(facet=alt.Facet(f"{facet}:N", title=None, sort=order), columns=columns)
    # Axes of their own: else a last row that is not full leaves an axis under nothing.
    return drawing.finish(chart.resolve_scale(y="independent").resolve_axis(x="independent"), title, good)


def together(charts: list[alt.LayerChart], pick: alt.Parameter) -> alt.HConcatChart:
    """Layered charts side by side, a click in one of which holds in all."""
    for i, chart in enumerate(charts):
        chart.layer[0].name = f"panel-{i}"
    joined = alt.hconcat(*charts)
    # By hand: Altair would warn of each chart after the first.
    views = [chart.layer[0].name for chart in joined.hconcat]
    joined.params = [alt.TopLevelSelectionParameter(**pick.param.to_dict(), views=views)]
    return joined


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
    models = drawing.models_of(frame)
    y = alt.Y("model:N", sort=models, title=None)
    chosen = drawing.picker()
    base = drawing.base_of(frame).encode(opacity=drawing.strong(chosen))
    rules = base.mark_rule(strokeWidth=1.5).encode(
        alt.X("low:Q", title="score (%)"), y, x2="high:Q", color=drawing.color(models, None),
    ).transform_filter("isValid(datum.low)").add_params(chosen)
    dots = base.mark_point(size=45, filled=True).encode(
        x="value:Q", y=y, color=drawing.color(models, None), shape=drawing.shape(models, None),
    ).transform_filter("datum.source == 'this run'")
    hollow = base.mark_point(size=45, filled=False, strokeWidth=1.2, color="#333333").encode(
        x="value:Q", y=y, shape=drawing.shape(models, None), tooltip=["model:N", "benchmark:N", "value:Q", "source:N"],
    ).transform_filter("datum.source != 'this run'")
    chart = (rules + dots + hollow).properties(width=118 if len(benchmarks) > 1 else 330, height=13 * len(models))
    chart = chart.facet(facet=alt.Facet("benchmark:N", title=None, sort=benchmarks), columns=columns)
    hollow_is = "; hollow: the paper's model, full benchmarks" if printed is not None else ""
    how = f"right is better; filled: this run (95 %){hollow_is}"
    return drawing.finish(chart.resolve_scale(x="independent"), title, how)


def readings(frame, title, good="right is better; filled: as in Table 4, hollow: one parameter changed; lines: 95 %"):
    """One line a reading of a merging method, grouped by method. Columns: model, label, of, value, low, high, own (bool).

    `of` says which benchmarks the values are means of.
    """
    models, order, chosen = drawing.models_of(frame), list(frame["label"]), drawing.picker()
    base = drawing.base_of(frame).encode(opacity=drawing.strong(chosen))
    y = alt.Y("label:N", sort=order, title=None, axis=alt.Axis(labelLimit=300))
    rules = base.mark_rule(strokeWidth=1.5).encode(
        alt.X("low:Q", title=f"{frame['of'].iloc[0]} (%)", scale=alt.Scale(zero=False)), y, x2="high:Q",
        color=drawing.color(models, None))
    dots = [base.mark_point(size=45, filled=filled, strokeWidth=1.5).encode(
        x="value:Q", y=y, color=drawing.color(models, None), shape=drawing.shape(models, None),
    ).transform_filter(test) for filled, test in ((True, "datum.own"), (False, "!datum.own"))]
    layers = alt.layer(rules.add_params(chosen), *dots)
    return drawing.finish(layers.properties(width=330, height=14 * len(order)), title, good)


def against(frame, title, good="left is better; filled: ours, hollow: the other tool, grey tick: the floor; log scale"):
    """A benchmark: ours and another tool's cost, joined. Columns: name, side ("ours", "other" or "floor"), measure, value."""
    order, chosen = list(dict.fromkeys(frame["name"])), drawing.picker("name")
    base = drawing.base_of(frame).encode(opacity=drawing.strong(chosen))
    x = alt.X("value:Q", title=None, scale=alt.Scale(type="log", nice=False, padding=14), axis=alt.Axis(tickCount=4))
    y = alt.Y("name:N", sort=order, title=None, axis=alt.Axis(labelLimit=260))
    layers = [base.mark_line(color="#bbbbbb", strokeWidth=2).encode(x, y, detail="name:N").transform_filter(
        "datum.side != 'floor'").add_params(chosen)]
    layers += [base.mark_point(filled=filled, size=60, color="black", strokeWidth=1.5).encode(
        x, y).transform_filter(f"datum.side == '{side}'") for side, filled in (("ours", True), ("other", False))]
    layers.append(base.mark_tick(color="#888888", thickness=3, size=14).encode(x, y).transform_filter(
        "datum.side == 'floor'"))
    chart = alt.layer(*layers).properties(width=270, height=26 * len(order))
    facet = alt.Facet("measure:N", title=None, sort=list(dict.fromkeys(frame["measure"])))
    return drawing.finish(chart.facet(facet=facet, columns=2).resolve_scale(x="independent"), title, good)


def heatmap(frame, title, x, y, value="value", facet=None, good="", text=".2f", columns=2, size=42, note=None):
    """Fig. 3, Fig. 4: a grid with its numbers.

    `x`, `y`, `value`, `facet` and `note` (a second line of text in each cell) name columns of the frame. Values on both
    sides of 0 get one hue a side, white at 0, and a sign; each cell's ink is the one of black and white that stands out.
    """
    frame = drawing.named(frame, x, y, facet)
    known = [*drawing.DOMAIN_NAMES.values(), *drawing.STYLE]
    order = {axis: sorted(set(frame[axis]), key=lambda name: (known.index(name) if name in known else 99, name))
             for axis in (x, y)}
    known = frame[value].dropna()
    low, high = (known.min(), known.max()) if len(known) else (0.0, 1.0)  # JSON has no NaN
    signed = low < 0 < high
    ends = [-max(-low, high), 0, max(-low, high)] if signed else [low, high]
    stops = BOTH_WAYS if signed else BLUES
    frame = frame.assign(ink=[_ink(number, ends, stops) for number in frame[value]])
    fill = alt.Scale(domain=ends, range=[f"rgb{stop}" for stop in stops], interpolate="rgb")
    text = "+" + text.removeprefix("+") if signed else text
    chosen = alt.selection_point(name="chosen", fields=[y], on="click", clear="dblclick")
    base = drawing.base_of(frame).encode(
        alt.X(f"{x}:N", sort=order[x], title=x, axis=alt.Axis(labelAngle=0)), alt.Y(f"{y}:N", sort=order[y], title=y))
    ink = alt.Color("ink:N", scale=None)
    layers = [
        base.mark_rect().encode(alt.Color(f"{value}:Q", scale=fill, legend=None),
                                opacity=alt.when(chosen).then(alt.value(1)).otherwise(alt.value(0.3))).add_params(chosen),
        base.mark_text(fontSize=10, dy=0 if note is None else -5).encode(
            text=alt.Text(f"{value}:Q", format=text), color=ink,
        ).transform_filter(alt.FieldValidPredicate(field=value, valid=True)),
    ]
    if note is not None:
        layers.append(base.mark_text(fontSize=8, dy=8).encode(text=f"{note}:N", color=ink))
    chart = alt.layer(*layers).resolve_scale(color="independent")
    chart = chart.properties(width=size * 1.15 * len(order[x]), height=size * 0.75 * len(order[y]))
    if facet is not None:
        facets = list(dict.fromkeys(frame[facet]))
        chart = chart.facet(facet=alt.Facet(f"{facet}:N", title=None, sort=facets), columns=columns)
    return drawing.finish(chart, title, good)


def _ink(value: float, ends, stops) -> str:
    """Black or white, whichever stands out more (4.5 to 1 at least) on the colour of `value` between the `stops`."""
    rgb = [np.interp(value, ends, [stop[channel] for stop in stops]) / 255 for channel in range(3)]
    linear = [c / 12.92 if c <= 0.04045 else ((c + 0.055) / 1.055) ** 2.4 for c in rgb]
    return "white" if np.dot(linear, (0.2126, 0.7152, 0.0722)) < 0.179 else "black"  # WCAG's relative luminance


def _feet(base, shape, top: float):
    """The mark of each bar's model at its foot: grey bars are told apart by it, and the legend shows it."""
    return base.mark_point(filled=True, fill="white", stroke="black", strokeWidth=0.8, size=42).encode(
        y="foot:Q", shape=shape).transform_calculate(foot=f"{0.045 * top}")


def _whiskers(base, y_title):
    """Intervals that show on white and on black."""
    y = alt.Y("low:Q", title=y_title)
    return [base.mark_rule(color="white", strokeWidth=3.5).encode(y, y2="high:Q"),
            base.mark_rule(strokeWidth=1.2).encode(y, y2="high:Q")]


def bars_with_intervals(frame, title, y_title="cosine", good="higher is better", marks=()):
    """Fig. 5: grouped bars. Columns: benchmark, model, value, low, high.

    `marks` names up to two more columns, drawn as ticks (ceiling, chance).
    """
    models = drawing.models_of(frame)
    order, chosen = list(dict.fromkeys(frame["benchmark"])), drawing.picker(legend=True)
    base = drawing.base_of(frame).encode(
        x=alt.X("benchmark:N", sort=order, title=None, axis=alt.Axis(labelAngle=0)),
        xOffset=alt.XOffset("model:N", sort=models), opacity=drawing.strong(chosen))
    top = 1.05 * frame[["value", "high", *marks]].max(axis=None)
    scale = alt.Scale(domain=[min(0.0, frame[["value", "low"]].min(axis=None)), top], nice=False)
    layers = [base.mark_bar(stroke="black", strokeWidth=0.5).encode(
        alt.Y("value:Q", title=y_title, scale=scale), drawing.color(models)).add_params(chosen), *_whiskers(base, y_title)]
    for name, thickness in zip(marks, (3, 1), strict=False):
        layers += [base.mark_tick(thickness=thickness + more, color=color, size=20).encode(y=f"{name}:Q")
                   for more, color in ((2, "white"), (0, "black"))]
    layers.append(_feet(base, drawing.shape(models), top))
    how = f"{good}; lines: 95 %" + (f"; ticks: {', '.join(marks)} (thick, thin)" if marks else "")
    return drawing.finish(alt.layer(*layers).properties(width=95 * len(order), height=200), title, how)


def scatter(frame, title, x_title, y_title, facet=None, good="up and right is better", columns=2, own_x=False,
            width=290):
    """Fig. 6: one point a model with its name, and the least-squares line. Columns: model, x, y; optional `facet`.

    Whiskers where the frame has low and high (of y). `own_x`: each panel has a horizontal scale of its own.
    """
    models = drawing.models_of(frame)
    height, chosen = round(0.8 * width), drawing.picker()
    frame = frame.assign(side=labels.sides(frame, facet, width, height))
    base = drawing.base_of(frame, x=x_title, y=y_title).encode(opacity=drawing.strong(chosen))
    x = alt.X("x:Q", title=x_title, scale=alt.Scale(zero=False, padding=25))
    y = alt.Y("y:Q", title=y_title, scale=alt.Scale(zero=False, padding=12))
    line = alt.Chart(frame).mark_line(color="#888888", strokeDash=[4, 3]).encode(x, y).transform_regression(
        "x", "y", groupby=[facet] if facet else [])
    dots = base.mark_point(filled=True, size=60).encode(
        x, y, drawing.color(models, None), drawing.shape(models, None)).add_params(chosen)
    names = [base.mark_text(dx=dx, dy=dy, align=ALIGN[towards], fontSize=9).encode(x, y, text="model:N").transform_filter(
        alt.FieldEqualPredicate(field="side", equal=side))
        for side, (towards, dx, dy) in labels.SIDES.items() if side in set(frame["side"])]
    layers = [line, dots, *names]
    if {"low", "high"} <= set(frame.columns):
        scaled = alt.Y("low:Q", title=y_title, scale=alt.Scale(zero=False, padding=12))
        layers.insert(1, base.mark_rule(opacity=0.5).encode(x, scaled, y2="high:Q", color=drawing.color(models, None)))
    chart = alt.layer(*layers).properties(width=width, height=height)
    if facet is not None:
        order = list(dict.fromkeys(frame[facet]))
        chart = chart.facet(facet=alt.Facet(f"{facet}:N", title=None, sort=order), columns=columns)
        chart = chart.resolve_scale(y="independent", x="independent" if own_x else "shared")
    return drawing.finish(chart, title, good)


def paired_dots(frame, title, good="right is better", columns=2):
    """Fig. 7: outcome and process judging of each model, joined.

    Columns: benchmark, model, mode ("outcome" or "process"), value; optional low, high.
    """
    models = drawing.models_of(frame)
    modes = [m for m in GROUPS if m in set(frame["mode"])]
    order, chosen = list(dict.fromkeys(frame["benchmark"])), drawing.picker("mode", legend=True)
    base = drawing.base_of(frame)
    y = alt.Y("model:N", sort=models, title=None)
    x = alt.X("value:Q", title="judged rightly (%)", scale=alt.Scale(zero=False))
    layers = [base.mark_line(color="#bbbbbb", strokeWidth=2).encode(x, y, detail="model:N", tooltip="model:N")]
    color = alt.Color("mode:N", title=None, scale=alt.Scale(domain=modes, range=[GROUPS[m][0] for m in modes]))
    shape = alt.Shape("mode:N", title=None, scale=alt.Scale(domain=modes, range=[GROUPS[m][1] for m in modes]))
    for mode, shift in zip(modes, (-2, 2), strict=False):  # a little apart: neither interval hides the other
        part = base.transform_filter(alt.FieldEqualPredicate(field="mode", equal=mode)).encode(opacity=drawing.strong(chosen))
        if {"low", "high"} <= set(frame.columns):
            layers.append(part.mark_rule(yOffset=shift).encode(
                alt.X("low:Q", title="judged rightly (%)", scale=alt.Scale(zero=False)), y, x2="high:Q", color=color))
        layers.append(part.mark_point(filled=True, size=55, yOffset=shift).encode(x, y, color, shape))
    layers[1] = layers[1].add_params(chosen)  # the first with a colour: the legend is its
    chart = alt.layer(*layers).properties(width=230, height=16 * len(models))
    chart = chart.facet(facet=alt.Facet("benchmark:N", title=None, sort=order), columns=columns)
    return drawing.finish(chart, title, good)


def grouped_bars(frame, title, y_title="average over the benchmarks (%)", good="higher is better"):
    """Fig. 8: generation, outcome and process of each model side by side.

    Columns: model, mode ("generation", "outcome" or "process"), value; optional low, high.
    """
    models = drawing.models_of(frame)
    modes = [m for m in ("generation", "outcome", "process") if m in set(frame["mode"])]
    chosen = drawing.picker("mode", legend=True)
    base = drawing.base_of(frame).encode(
        x=alt.X("model:N", sort=models, title=None, axis=alt.Axis(labelAngle=-25)),
        xOffset=alt.XOffset("mode:N", sort=modes), opacity=drawing.strong(chosen))
    scale = alt.Scale(domain=modes, range=[GROUPS[m][0] for m in modes])
    color = alt.Color("mode:N", title=None, sort=modes, scale=scale)
    layers = [base.mark_bar(stroke="black", strokeWidth=0.5).encode(
        alt.Y("value:Q", title=y_title), color).add_params(chosen)]
    if {"low", "high"} <= set(frame.columns):
        layers += _whiskers(base, y_title)
    shapes = alt.Scale(domain=modes, range=[GROUPS[m][1] for m in modes])
    shape = alt.Shape("mode:N", title=None, sort=modes, scale=shapes)
    layers.append(_feet(base, shape, frame["value"].max()))
    return drawing.finish(alt.layer(*layers).properties(width=62 * len(models), height=200), title, good)
