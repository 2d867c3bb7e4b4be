"""Every picture renders to a small PNG, and models look the same everywhere."""
import io
import struct

import altair as alt
import numpy as np
import pandas as pd
import pytest
from PIL import Image, UnidentifiedImageError

from m2rl_core import paper, study
from m2rl_core.paper import audit
from m2rl_core.pictures import drawing, picture, plots

MODELS = list(drawing.STYLE)
EXPERTS = MODELS[2:7]
RNG = np.random.default_rng(0)


def stages():
    merges = [(m, ("sft", *EXPERTS)) for m in MODELS[8:]]
    return [("base", ()), ("sft", ("base",)), *[(e, ("sft",)) for e in EXPERTS], ("rl-multi", ("sft",)), *merges,
            ("eval-sft", ("sft",))]


def curves():
    frame = pd.DataFrame([{"model": m, "step": s, "domain": d, "value": s + RNG.normal(), "finished": m != "rl-if"}
                          for m in EXPERTS for s in range(0, 50, 10) for d in drawing.DOMAIN_NAMES])
    return frame.assign(low=frame["value"] - 2, high=frame["value"] + 2)


def table():
    main = paper.table(3)
    frame = main.rename_axis("model").reset_index()
    for name in main:
        frame[f"{name}_low"], frame[f"{name}_high"] = frame[name] - 3, frame[name] + 3
    frame.loc[0, ["hle", "hle_low", "hle_high"]] = np.nan  # not measured
    return frame


def grid():
    return pd.DataFrame([{"domain": d, "expert": f"rl-{e}", "value": RNG.random(), "policy": p, "change": "+1.0"}
                         for d in drawing.DOMAIN_NAMES for e in drawing.DOMAIN_NAMES for p in ("rl-multi", "merge-ties")])


def gains():
    numbers = {"value": 0.5, "low": 0.4, "high": 0.6, "ceiling": 0.9, "chance": 0.2}
    return pd.DataFrame([{"benchmark": b, "model": m, **numbers}
                         for b in audit.JUDGED for m in ("rl-multi", "merge-ties", "mt-opd")])


def judges():
    frame = audit.finding1().melt(["benchmark", "model"], ["outcome", "process"], var_name="mode")
    return frame.assign(low=frame["value"] - 2, high=frame["value"] + 2)


def averages():
    printed = paper.table(7)
    return printed[["avg_gen", "avg_proc"]].set_axis(["x", "y"], axis=1).rename_axis("model").reset_index()


CHARTS = {
    "figure1": lambda: plots.figure1(stages(), done=["base", "sft"]),
    "trajectories": lambda: plots.trajectories(curves(), "Fig. 2", facet="domain"),
    "one trajectory": lambda: plots.trajectories(
        curves().query("domain == 'math'")[["model", "step", "value"]], "Fig. 9"),
    "dots": lambda: plots.dots_with_intervals(table(), "Table 3", printed=paper.table(3)),
    "heatmap": lambda: plots.heatmap(grid(), "Fig. 4", "domain", "expert", facet="policy", note="change"),
    "bars": lambda: plots.bars_with_intervals(gains(), "Fig. 5", marks=("ceiling", "chance")),
    "scatter": lambda: plots.scatter(averages(), "Fig. 6", "generation (%)", "judging (%)"),
    "scatters": lambda: plots.scatter(averages().assign(mode="process"), "Fig. 6", "x", "y", facet="mode"),
    "paired dots": lambda: plots.paired_dots(judges(), "Fig. 7"),
    "grouped bars": lambda: plots.grouped_bars(judges().query("benchmark == 'aime24'"), "Fig. 8"),
}


@pytest.mark.parametrize("name", CHARTS)
def test_chart_renders_small(name):
    """Catches a chart that Vega refuses, an empty picture, and one too large for the committed report."""
    data = drawing.png(CHARTS[name]())
    width, height = struct.unpack(">II", data[16:24])
    assert data.startswith(b"\x89PNG") and 400 < width < 2000 and 200 < height < 1600
    assert 4_000 < len(data) <= 80 * 1024


def test_notebooks_show_png():
    before = alt.renderers.active
    drawing.show_pictures()
    try:
        data, about = plots.figure1(stages())._repr_mimebundle_()
    finally:
        alt.renderers.enable(before)
    assert list(data) == ["image/png", picture.MIME] and data["image/png"].startswith(b"\x89PNG")
    assert 300 < about["image/png"]["width"] < 1000


def test_models_differ_in_black_and_white():
    """Within what is drawn together, no two models share mark and dash, or colour."""
    for group in (MODELS[:8], MODELS[8:], [*EXPERTS, "rl-multi", "merge-ties", "mt-opd"]):
        assert len({drawing.STYLE[m][0] for m in group}) == len(group)
        assert len({(drawing.STYLE[m][1], tuple(drawing.STYLE[m][2])) for m in group}) == len(group)


def test_style_covers_the_study():
    assert set(drawing.STYLE) == set(study.MODELS)


def test_only_domains_named_if_are_renamed():
    """Vega cannot sort by a list that holds "if"; models such as rl-if keep their name."""
    found = drawing.named(pd.DataFrame({"domain": ["if", "math"], "model": ["rl-if", "rl-math"]}), "domain", "model")
    assert found.to_numpy().tolist() == [["IF", "rl-if"], ["Math", "rl-math"]]


def as_png(pixels):
    out = io.BytesIO()
    Image.fromarray(pixels).save(out, "PNG")
    return out.getvalue()


def colors_of(data):
    image = Image.open(io.BytesIO(data))
    assert image.mode == "P"
    return np.asarray(image.convert("RGB"))


def test_shrink_keeps_every_pixel():
    pixels = RNG.integers(0, 5, (6, 7, 3)).astype(np.uint8) * 60
    assert (colors_of(picture.shrink(as_png(pixels))) == pixels).all()


def test_shrink_lays_transparent_on_white_and_limits_colours():
    assert (colors_of(picture.shrink(as_png(np.zeros((2, 3, 4), np.uint8)))) == 255).all()
    many = RNG.integers(0, 256, (40, 40, 3)).astype(np.uint8)
    found = colors_of(picture.shrink(as_png(many)))
    assert len(np.unique(found.reshape(-1, 3), axis=0)) <= 256 and np.abs(found.astype(int) - many).mean() < 40


def test_shrink_refuses_other_files():
    with pytest.raises(UnidentifiedImageError):
        picture.shrink(b"GIF89a")
