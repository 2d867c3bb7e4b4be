"""A chart's Vega-Lite source as files: PNG for every viewer, SVG for print, CSV for its data, and what a page needs.

A source here holds each of its data sets as CSV text with 6 digits: a third of JSON's size, and the same text as the file
beside the picture. Layers described as HOVER only catch the pointer and are not drawn in PNG and SVG.
"""
from __future__ import annotations

import copy
import csv
import functools
import io
import json
import re
from pathlib import Path

import vl_convert
from PIL import Image

PPI = 144
MIME = "application/vnd.vegalite.v5+json"  # what JupyterLab 4 draws by itself; a test holds our charts to that version
HOVER = "to hover over"
# Metrics of Arial, which every system has in one of these: a text takes the same width wherever it is drawn.
FONT = "Liberation Sans, Arial, Helvetica, sans-serif"
# Nothing that is seen: names of groups, words for screen readers (the title stays), full opacity, empty backgrounds.
UNSEEN = (
    (r' (?:class|role|aria-[a-z]+|pointer-events|xml:space)="[^"]*"', ""),
    (r' (?:opacity|stroke-opacity|fill-opacity)="1"', ""),
    (r' transform="translate\(0,0\)"', ""),
    (r'<path(?: [a-z-]+="[^"]*")*? d="(?:M0,0h0v0h0Z)?"[^>]*/>', ""),
    (r'<path[^>]*? display="none"[^>]*/>', ""),
)
LONG = re.compile(r"-?\d+\.\d{3,}")


def source(chart) -> dict:
    """The chart as Vega-Lite with its data sets as CSV text, named `data`, `data-2`, ... by falling number of rows."""
    spec = copy.deepcopy(chart) if isinstance(chart, dict) else chart.to_dict()
    sets = spec.get("datasets", {})
    if any(isinstance(rows, str) for rows in sets.values()):
        return spec  # is one already
    order = sorted(sets, key=lambda name: -len(sets[name]))
    new = {name: "data" if i == 1 else f"data-{i}" for i, name in enumerate(order, 1)}
    made = {name: _table(sets[name]) for name in order}
    for part in _parts(spec):
        name = part.get("data", {}).get("name") if isinstance(part.get("data"), dict) else None
        if name in made:
            part["data"] = {"name": new[name], "format": {"type": "csv", "parse": made[name][1]}}
    if sets:
        spec["datasets"] = {new[name]: made[name][0] for name in order}
    return spec


def beside(spec: dict, name: str) -> tuple[dict, dict[str, str]]:
    """The `source` as it lies in a folder: data by address instead of inside, and {file: text} of the data."""
    spec = copy.deepcopy(spec)
    files = {f"{name}{key.removeprefix('data')}.csv": text for key, text in spec.pop("datasets", {}).items()}
    for part in _parts(spec):
        if isinstance(part.get("data"), dict) and "name" in part["data"]:
            key = part["data"].pop("name")
            part["data"] = {"url": f"{name}{key.removeprefix('data')}.csv", **part["data"]}
    return spec, files


def bundle(spec: dict) -> dict:
    """What a notebook's output holds: PNG, and the source for viewers that can draw it; no address in either."""
    inside = {key: value for key, value in spec.items() if key != "$schema"}
    return {"image/png": png(spec), MIME: inside}


def still(spec: dict) -> dict:
    """The source without the layers that only catch the pointer."""
    spec = copy.deepcopy(spec)
    for part in _parts(spec):
        if "layer" in part:
            part["layer"] = [layer for layer in part["layer"] if layer.get("description") != HOVER]
    return spec


def png(spec: dict, ppi: int = PPI) -> bytes:
    """The chart as PNG bytes with at most 256 colours: vl-convert's own are some five times as large."""
    return _png(json.dumps(spec), ppi)


@functools.lru_cache(maxsize=2)
def _png(spec: str, ppi: int) -> bytes:
    """A notebook publishes a figure and then shows it: drawn once."""
    return shrink(vl_convert.vegalite_to_png(still(json.loads(spec)), ppi=ppi))


def svg(spec: dict) -> str:
    """The chart as SVG: texts as text, coordinates to a hundredth of a pixel, its title for screen readers."""
    drawn = vl_convert.vegalite_to_svg(still(spec))
    for pattern, instead in UNSEEN:
        drawn = re.sub(pattern, instead, drawn)
    drawn = re.sub(r"<[^>]+>", lambda tag: LONG.sub(_rounded, tag[0]), drawn)  # a number that is read keeps its digits
    before = None
    while before != drawn:  # groups that held nothing else
        before, drawn = drawn, re.sub(r"<g>((?:(?!</?g\b).)*)</g>", r"\1", re.sub(r"<g[^>]*></g>", "", drawn))
    clips = list(dict.fromkeys(re.findall(r'id="(clip\d+)"', drawn)))  # numbered since the process began; now from 1
    drawn = re.sub(r"\bclip\d+\b(?=[\")])", lambda found: f"clip-{clips.index(found[0]) + 1}", drawn)
    name = title(spec).replace("&", "&amp;").replace("<", "&lt;")
    return re.sub(r"(<svg[^>]*>)", lambda found: f'{found[0][:-1]} role="img"><title>{name}</title>', drawn, count=1) + "\n"


def script() -> str:
    """Vega, Vega-Lite and Vega-Embed in one file with their licence: `window.vegaEmbed`, some 900 kB."""
    licence = Path(__file__).with_name("vega_licence.txt").read_text(encoding="utf-8")
    versions = f"Vega {vl_convert.get_vega_version()}, Vega-Lite {vl_convert.get_vegalite_versions()[-1]}, " \
               f"Vega-Embed {vl_convert.get_vega_embed_version()}"
    return f"/*! {versions}, as bundled by vl-convert-python {vl_convert.__version__}.\n\n{licence}*/\n" \
        + vl_convert.javascript_bundle().rstrip() + "\n"


def title(spec: dict) -> str:
    """Title and subtitle in one line."""
    given = spec.get("title", "")
    words = [given] if isinstance(given, str) else [given.get("text", ""), given.get("subtitle", "")]
    return "; ".join(word for word in words if isinstance(word, str) and word)


def shrink(data: bytes) -> bytes:
    """The same PNG on white with a palette of at most 256 colours, about a tenth of the size; resolution kept."""
    image = Image.open(io.BytesIO(data)).convert("RGBA")
    flat = Image.alpha_composite(Image.new("RGBA", image.size, "white"), image).convert("RGB")
    out = io.BytesIO()
    dpi = Image.open(io.BytesIO(data)).info.get("dpi")
    flat.quantize(256, dither=Image.Dither.NONE).save(out, "PNG", optimize=True, **({"dpi": dpi} if dpi else {}))
    return out.getvalue()


def _rounded(found: re.Match) -> str:
    text = f"{float(found[0]):.2f}".rstrip("0").rstrip(".")
    return "0" if text == "-0" else text


def _parts(spec):
    """Every object of the source that may name data, layers or both; data sets left out."""
    if isinstance(spec, dict):
        yield spec
        for key, value in spec.items():
            if key not in ("datasets", "data"):
                yield from _parts(value)
    elif isinstance(spec, list):
        for value in spec:
            yield from _parts(value)


def _table(rows: list[dict]) -> tuple[str, dict]:
    """Rows as CSV text, and how Vega reads each column that is not plain text."""
    columns = list(dict.fromkeys(key for row in rows for key in row))
    kinds = {column: _kind([row.get(column) for row in rows]) for column in columns}
    out = io.StringIO()
    write = csv.writer(out, lineterminator="\n")
    write.writerow(columns)
    write.writerows([_cell(row.get(column)) for column in columns] for row in rows)
    return out.getvalue(), {column: kind for column, kind in kinds.items() if kind}


def _kind(values: list) -> str:
    """`string` only where a text is missing: unread, an empty cell is an empty text."""
    known = [value for value in values if value is not None]
    if known and all(isinstance(value, bool) for value in known):
        return "boolean"
    if known and all(isinstance(value, int | float) and not isinstance(value, bool) for value in known):
        return "number"
    return "" if len(known) == len(values) else "string"


def _cell(value) -> str:
    if isinstance(value, float):
        return f"{value:.6g}"
    return "" if value is None else str(value).lower() if isinstance(value, bool) else str(value)
