"""Tables whose cells have a small print: the score, and below it the interval and the paper's number."""
from __future__ import annotations

import html
from math import isfinite
from typing import NamedTuple

import pandas as pd
from IPython.display import HTML

from m2rl_core.views.opening import VERDICT_COLOURS

SMALL = "font-size:0.8em;font-weight:normal;color:#555"
CELL = "text-align:left;vertical-align:top;padding:.3rem .4rem"


class Link(NamedTuple):
    """A cell that leads elsewhere: what it says (small print after a line break) and the address."""

    text: str
    address: str


def bounds(low: float, high: float, digits: int = 1) -> str:
    """`[58.1, 64.0]`, or "[undefined]"."""
    return f"[{low:.{digits}f}, {high:.{digits}f}]" if isfinite(low) else "[undefined]"


def grid(frame: pd.DataFrame, wrap: bool = False) -> HTML:
    """The frame as an HTML table without its index; in a cell, what follows a line break is small print.

    Cells do not wrap unless `wrap`, for tables of sentences. Verdicts have their colours.
    """
    names = [str(name).replace(" (miniature)", "\n(miniature)") for name in frame.columns]
    head = "".join(_cell(name, True, "th") for name in names)
    body = "".join("<tr>" + "".join(_cell(value, wrap) for value in line) + "</tr>\n"
                   for line in frame.itertuples(index=False))
    return HTML(f"<table><thead><tr>{head}</tr></thead>\n<tbody>{body}</tbody></table>")


def _cell(value, wrap: bool, tag: str = "td") -> str:
    text = value.text if isinstance(value, Link) else str(value)
    first, *rest = (html.escape(line) for line in text.split("\n"))
    if isinstance(value, Link):
        first = f'<a href="{html.escape(value.address)}">{first}</a>'
    small = "".join(f'<br><span style="{SMALL}">{line}</span>' for line in rest)
    style = CELL + ("" if wrap else ";white-space:nowrap")
    colour = VERDICT_COLOURS.get(text)
    return f'<{tag} style="{style}{f";color:{colour}" if colour else ""}">{first}{small}</{tag}>'
