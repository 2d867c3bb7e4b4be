"""Pictures in grey, for the colour-blind, as vectors, as data, to click: all chart functions and the page that holds them."""
import io
import json
import re

import altair as alt
import nbformat
import numpy as np
import pandas as pd
import pytest
import torch
import vl_convert
from PIL import Image
from test_plots import CHARTS as PLOTS
from test_plots import grid

from m2rl_core.paper import audit as printed
from m2rl_core.pictures import drawing, labels, picture, plots
from m2rl_core.publishing import publish, site
from m2rl_core.views import audit, opening, toys, verdicts

GOOD = re.compile(r"\b(better|closer|good|same way|starts from sft)\b")


def plan():
    return pd.DataFrame({"stage": ["base", "sft"], "seconds": [3.0, 2.0], "tokens": [5, 4], "done": [True, False]})


def cost():
    return pd.DataFrame([{"source": s, "model": m, "cost": c, "of": "mean of nine", "value": v, "low": v - 2, "high": v + 2}
                         for s in ("this run", "the paper, printed")
                         for m, c, v in (("sft", 0, 40.0), ("merge-ties", 100, 55.0), ("merge-average", 100, 50.0))])


def readings():
    return pd.DataFrame([{"model": "merge-ties", "label": f"merge-ties, {n}", "of": "mean of nine", "value": n,
                          "low": n - 1, "high": n + 1, "own": n == 1} for n in (1.0, 2.0)])


def sides():
    return pd.DataFrame([{"name": n, "side": s, "measure": "time (s)", "value": v + 1.5}
                         for n in ("ties", "sce") for v, s in enumerate(("ours", "other", "floor"))])


CHARTS = PLOTS | {
    "signed heatmap": lambda: plots.heatmap(grid().assign(value=lambda f: f["value"] - 0.4), "t", "domain", "expert",
                                            facet="policy", good="above 0: the same way"),
    "readings": lambda: plots.readings(readings(), "t"),
    "against": lambda: plots.against(sides(), "t"),
    "headline": lambda: verdicts.headline(cost()),
    "plan": lambda: opening.plan_chart(plan()),
    "means": lambda: audit.means_chart(audit.means_with_noise()),
    "correlations": lambda: audit.correlation_chart(printed.judge_correlations(np.random.default_rng(0))),
    "advantages": lambda: toys.advantage_chart(4),
    "paths": lambda: toys.paths_chart(toys.distil_paths(torch.tensor([2.0, -1.5]), torch.zeros(3), 3, 4, 0.4, 0),
                                      torch.zeros(3)),
}
CHARTS["heatmap"] = lambda: plots.heatmap(grid(), "Fig. 4", "domain", "expert", facet="policy", note="change",
                                          good="lower is closer")
every = pytest.mark.parametrize("name", CHARTS)


def units(spec):
    """Every part of a source that draws a mark, and its encoding with that of the charts around it."""
    def walk(part, around):
        around = around | part.get("encoding", {}) | ({"facet": part["facet"]} if "facet" in part else {})
        inner = [*part.get("layer", []), *part.get("hconcat", []), *([part["spec"]] if "spec" in part else [])]
        for each in inner:
            yield from walk(each, around)
        if "mark" in part:
            yield part["mark"], around
    return list(walk(spec, {}))


def fields(encoding, *channels):
    return {encoding[c]["field"] for c in channels if isinstance(encoding.get(c), dict) and "field" in encoding[c]}


@every
def test_no_series_is_told_apart_by_colour_alone(name):
    """Catches bars of three models that are one grey: each coloured series also has a mark, a dash, a name or a place."""
    found = [encoding for _, encoding in units(CHARTS[name]().to_dict())]
    coloured = {encoding[c]["field"] for encoding in found for c in ("color", "stroke", "fill")
                if isinstance(encoding.get(c), dict) and encoding[c].get("type") == "nominal" and encoding[c].get("scale", 1)}
    told = set().union(*(fields(e, "shape", "strokeDash", "text", "x", "y", "facet") for e in found))
    assert coloured <= told, coloured - told


@every
def test_a_model_has_its_colour_mark_and_dash_in_every_chart(name):
    for _, encoding in units(CHARTS[name]().to_dict()):
        for channel, at in (("color", 0), ("stroke", 0), ("shape", 1), ("strokeDash", 2)):
            scale = (encoding.get(channel) or {}).get("scale") or {}
            for model, drawn in zip(scale.get("domain", []), scale.get("range", []), strict=False):
                assert model not in drawing.STYLE or drawn == drawing.STYLE[model][at], (model, channel, drawn)


@every
def test_the_title_says_which_way_is_good(name):
    if name in PLOTS and name != "heatmap":
        good = picture.title(PLOTS[name]().to_dict())
    else:
        good = picture.title(CHARTS[name]().to_dict())
    assert GOOD.search(good), good


@every
def test_every_mark_says_what_it_is(name):
    """Catches a mark without a tooltip; lines that only lead from mark to mark need none."""
    for mark, encoding in units(CHARTS[name]().to_dict()):
        if mark["type"] not in ("rule", "line", "text", "tick"):
            assert "tooltip" in encoding or name in ("figure1", "paths"), mark


@every
def test_clicking_is_known_and_the_still_picture_does_not_depend_on_it(name):
    """Catches a chart that Vega draws differently, or not at all, once it is drawn with nothing chosen."""
    spec = picture.source(CHARTS[name]())
    if name not in ("plan", "correlations", "advantages", "paths"):
        assert [param["name"] for param in spec["params"]] == ["chosen"]
    assert 0.1 not in opacities(vl_convert.vegalite_to_svg(picture.still(spec)))


def opacities(drawn: str) -> set[float]:
    return {float(value) for value in re.findall(r' (?:fill-|stroke-)?opacity="([\d.]+)"', drawn)}


@every
def test_jupyterlab_draws_the_same(name):
    """JupyterLab has Vega-Lite 5: catches a word that only version 6 knows."""
    spec = picture.still(picture.bundle(picture.source(CHARTS[name]()))[picture.MIME])
    old, new = (vl_convert.vegalite_to_png(spec, vl_version=version, ppi=40) for version in ("5.8", "6.4"))
    assert "$schema" not in spec and np.abs(pixels(old) - pixels(new)).mean() < 1


def pixels(data: bytes) -> np.ndarray:
    return np.asarray(Image.open(io.BytesIO(data)).convert("RGB")).astype(float)


@every
def test_the_data_beside_a_picture_are_its_data(name):
    """Catches a column lost, a row moved, or fewer than 6 digits."""
    chart = CHARTS[name]()
    lean, files = picture.beside(picture.source(chart), name)
    raw = sorted(chart.to_dict()["datasets"].values(), key=len, reverse=True)
    assert len(files) == len(raw) and list(files)[0] == f"{name}.csv" and "datasets" not in lean
    assert len(json.dumps(lean)) < 16_000
    for text, rows in zip(files.values(), raw, strict=True):
        found, known = pd.read_csv(io.StringIO(text), keep_default_na=False), pd.DataFrame(rows)
        assert list(found) == list(known) and len(found) == len(known)
        for column in known.select_dtypes("number"):
            assert np.allclose(pd.to_numeric(found[column]), known[column], rtol=1e-5, equal_nan=True), column


def test_empty_text_and_missing_values_are_two_things():
    """Catches `datum.dropped != ''` that is true of all rows once empty text is read as nothing."""
    text, kinds = picture._table([{"a": "", "b": 1.23456789, "c": True, "d": None, "e": 3}, {"a": "x,y", "b": None, "c": False,
                                                                                   "d": "z", "e": 2000000}])
    assert text == 'a,b,c,d,e\n,1.23457,true,,3\n"x,y",,false,z,2000000\n'
    assert kinds == {"b": "number", "c": "boolean", "d": "string", "e": "number"}


@every
def test_the_vector_file_looks_like_the_picture_and_keeps_its_numbers(name):
    """Catches a shortening that moves a mark or rounds a number that is read."""
    spec = picture.source(CHARTS[name]())
    whole, short = vl_convert.vegalite_to_svg(picture.still(spec)), picture.svg(spec)
    assert np.abs(pixels(vl_convert.svg_to_png(whole, ppi=72)) - pixels(vl_convert.svg_to_png(short, ppi=72))).mean() < 0.5
    assert texts(short)[1:] == texts(whole) and picture.FONT in short and len(short) < len(whole)
    assert short == picture.svg(spec)


def texts(drawn: str) -> list[str]:
    return [found.strip() for found in re.findall(r">([^<>]+)<", drawn) if found.strip()]


def test_the_points_to_hover_over_are_not_drawn():
    spec = picture.source(CHARTS["trajectories"]())
    assert picture.HOVER in json.dumps(spec) and picture.HOVER not in json.dumps(picture.still(spec))


def contrast(a, b) -> float:
    """WCAG's, of two colours in 0..255."""
    bright = [np.dot([c / 12.92 if c <= 0.04045 else ((c + 0.055) / 1.055) ** 2.4 for c in np.array(rgb) / 255],
                     (0.2126, 0.7152, 0.0722)) + 0.05 for rgb in (a, b)]
    return max(bright) / min(bright)


@pytest.mark.parametrize(("ends", "stops"), [((-1, 0, 1), plots.BOTH_WAYS), ((0, 1), plots.BLUES)])
def test_numbers_stand_out_in_every_cell(ends, stops):
    for value in np.linspace(ends[0], ends[-1], 101):
        cell = [np.interp(value, ends, [stop[c] for stop in stops]) for c in range(3)]
        ink = {"white": (255, 255, 255), "black": (0, 0, 0)}[plots._ink(value, ends, stops)]
        assert contrast(cell, ink) >= 4.5, value


def test_values_around_0_have_a_hue_a_side_and_a_sign():
    """Catches a scale from little to much for values around 0, where 0 is some blue."""
    spec = CHARTS["signed heatmap"]().to_dict()
    encodings = [encoding for mark, encoding in units(spec) if mark["type"] == "rect"]
    scale = encodings[0]["color"]["scale"]
    assert scale["domain"][1] == 0 and scale["domain"][0] == -scale["domain"][2] and len(set(scale["range"])) == 3
    numbers = [encoding["text"]["format"] for mark, encoding in units(spec) if mark["type"] == "text"]
    assert numbers[0].startswith("+")


def test_what_is_drawn_together_differs_in_lightness_or_in_mark():
    """CIE L* of the pale merges and the rest; where two are within 10, mark and dash must both differ."""
    for group in (list(drawing.STYLE)[:8], list(drawing.STYLE)[8:]):
        for i, one in enumerate(group):
            for other in group[i + 1:]:
                close = abs(lightness(drawing.STYLE[one][0]) - lightness(drawing.STYLE[other][0])) < 10
                assert not close or drawing.STYLE[one][1:] != drawing.STYLE[other][1:], (one, other)
    assert lightness("#ffffff") == pytest.approx(100) and lightness("#777777") == pytest.approx(50, abs=0.1)


def lightness(colour: str) -> float:
    rgb = [int(colour[at:at + 2], 16) for at in (1, 3, 5)]
    bright = contrast(rgb, (0, 0, 0)) * 0.05 - 0.05
    return 116 * bright ** (1 / 3) - 16 if bright > 0.008856 else 903.3 * bright


def test_names_of_points_do_not_cover_one_another():
    """Two points side by side: the left one's name goes away from the right one's, none leaves the panel."""
    frame = pd.DataFrame({"model": ["rl-coding", "rl-science", "sft"], "x": [0.0, 0.06, 1.0], "y": [5.0, 5.02, 9.0]})
    found = labels.sides(frame, None, 290, 230)
    assert found.iloc[0] != found.iloc[1] and found.iloc[2] != "right"
    assert set(found) <= set(labels.SIDES)


def test_a_figure_is_published_as_picture_vector_data_and_source(tmp_path, monkeypatch):
    monkeypatch.setenv("M2RL_REPORT", str(tmp_path))
    chart = publish.figure("figure6", PLOTS["scatter"]())
    folder = tmp_path / "figures"
    assert sorted(path.name for path in folder.iterdir()) == [f"figure6{end}" for end in (".csv", ".png", ".svg", ".vl.json")]
    lean = json.loads((folder / "figure6.vl.json").read_text())
    assert '"url": "figure6.csv"' in json.dumps(lean) and (folder / "figure6.csv").read_text().startswith("model,x,y")
    before = {path.name: path.read_bytes() for path in folder.iterdir()}
    publish.figure("figure6", PLOTS["scatter"]())
    assert before == {path.name: path.read_bytes() for path in folder.iterdir()}
    assert chart.usermeta["figure"] == "figure6"


@pytest.fixture(scope="module")
def report(tmp_path_factory):
    """A report of one notebook with two pictures, one of them published."""
    folder = tmp_path_factory.mktemp("report")
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("M2RL_REPORT", str(folder))
        published = publish.figure("figure2", PLOTS["trajectories"]())
    cells = []
    for chart in (published, PLOTS["heatmap"]()):
        data = {picture.MIME: picture.bundle(picture.source(chart))[picture.MIME], "text/plain": "a chart"}
        cells.append(nbformat.v4.new_code_cell("chart", outputs=[nbformat.v4.new_output("display_data", data=data)]))
    nbformat.write(nbformat.v4.new_notebook(cells=cells), folder / "toy.ipynb")
    machine = {"cores": 2, "memory_gb": 8, "processor": "x", "python": "3"}
    entry = {"name": "toy", "status": "completed", "reason": "", "seconds": 1}
    (folder / "run.json").write_text(json.dumps({"profile": "toy", "commit": "c", "machine": machine, "notebooks": [entry]}))
    site.write(folder)
    return folder


def test_a_page_is_live_without_a_network_and_still_without_scripts(report):
    """Catches a script or a picture from elsewhere, a page that is blank where scripts may not run, ids used twice."""
    page = (report / "toy.html").read_text(encoding="utf-8")
    assert page.count("<figure") == page.count('<svg xmlns') == 2 and "data:image/png" not in page
    assert re.findall(r'src="([^"]+)"', page) == ["assets/vega.js"] and not re.search(r'(?:href|src)="https?:', page)
    assert set(re.findall(r'href="(figures/[^"]+)"', page)) == {f"figures/figure2{end}" for end in (".svg", ".png", ".csv")}
    ids = re.findall(r'<clipPath id="([^"]+)"', page)
    assert len(ids) == len(set(ids)) and set(re.findall(r"url\(#([^)]+)\)", page)) <= set(ids)
    for text in re.findall(r'<script type="application/json">(.*?)</script>', page, re.S):
        spec = json.loads(text)
        assert "url" not in json.dumps(spec.get("data", {})) and vl_convert.vegalite_to_svg(spec)


def test_the_script_comes_from_the_pinned_package_and_says_so(report):
    script = (report / "assets" / "vega.js").read_text(encoding="utf-8")
    assert "vegaEmbed=" in script and "</script" not in script and 500_000 < len(script.encode()) < 1_000_000
    assert f"vl-convert-python {vl_convert.__version__}" in script[:400] and "University of Washington" in script[:1000]
    assert script.index("*/") > 3000


def test_a_notebook_shows_both(monkeypatch):
    before = alt.renderers.active
    drawing.show_pictures()
    try:
        data, _ = PLOTS["scatter"]()._repr_mimebundle_()
    finally:
        alt.renderers.enable(before)
    output = nbformat.v4.new_output("display_data", data={picture.MIME: data[picture.MIME]})
    nbformat.validate(nbformat.v4.new_notebook(cells=[nbformat.v4.new_code_cell("x", outputs=[output])]))
    assert "http" not in json.dumps(data[picture.MIME])
