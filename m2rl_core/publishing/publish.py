"""What notebooks hand to the report: tables, figures and claims.

The runner sets M2RL_REPORT to the report's folder and M2RL_NOTEBOOK to the notebook's name. Without them
(somebody works in JupyterLab) the report on disk is left alone; claims still go into the store, so that
the conclusion can read them.
"""
from __future__ import annotations

import dataclasses
import json
import math
import os
import re
from collections.abc import Iterable
from pathlib import Path

from m2rl_core.store import write_atomic

CLAIM_KEYS = ("id", "section", "text", "printed", "rule", "test", "params", "paper_verdict", "run_verdict", "estimate", "low",
              "high", "n", "note", "needs", "paper_estimate", "paper_low", "paper_high", "paper_note", "where")


def report_folder() -> Path | None:
    """The folder of the report that is being made; None outside of its runner."""
    folder = os.environ.get("M2RL_REPORT")
    return Path(folder) if folder else None


def table(name: str, frame):
    """tables/<name>.csv; an index with a name becomes the first column."""
    report = report_folder()
    if report:
        target = _file(report / "tables", name, ".csv")
        named = frame.index.name is not None
        write_atomic(target, frame.to_csv(index=named, float_format="%.6g", lineterminator="\n"))
    return frame


def figure(name: str, chart):
    """figures/<name>.png (144 dpi), .svg, .csv (its data) and .vl.json (its Vega-Lite source, which reads the data).

    A chart of several data sets has <name>-2.csv and so on. Returns the chart, which now knows its name.
    """
    chart.usermeta = {"figure": name, "embedOptions": {"downloadFileName": name}}
    report = report_folder()
    if report:
        from m2rl_core.pictures import picture  # takes a while to load

        spec = picture.source(chart)
        lean, data = picture.beside(spec, name)
        write_atomic(_file(report / "figures", name, ".png"), picture.png(spec))
        write_atomic(_file(report / "figures", name, ".svg"), picture.svg(spec))
        write_atomic(_file(report / "figures", name, ".vl.json"), json.dumps(lean, indent=1) + "\n")
        for file, text in data.items():
            write_atomic(_file(report / "figures", file.removesuffix(".csv"), ".csv"), text)
    return chart


def claims(store: Path, section: str, entries: Iterable) -> list[dict]:
    """One file of verdicts a section; `entries` are dataclasses or dicts with CLAIM_KEYS. Raises ValueError."""
    found = [_claim(entry) for entry in entries]
    text = json.dumps(found, indent=1) + "\n"
    write_atomic(_file(store, section, ".json"), text)
    report = report_folder()
    if report:
        write_atomic(_file(report / "claims", os.environ.get("M2RL_NOTEBOOK", section), ".json"), text)
    return found


def read_claims(store: Path) -> list[dict]:
    """All verdicts of the report in the making, else those in the store, in order of file name."""
    report = report_folder()
    folder = report / "claims" if report else store
    return [entry for path in sorted(folder.glob("*.json")) for entry in json.loads(path.read_text(encoding="utf-8"))]


def _claim(entry) -> dict:
    fields = dataclasses.asdict(entry) if dataclasses.is_dataclass(entry) else dict(entry)
    missing = [key for key in CLAIM_KEYS if key not in fields]
    if missing:
        raise ValueError(f"claim {fields.get('id', '?')}: without {', '.join(missing)}")
    return {key: _plain(fields[key]) for key in CLAIM_KEYS}


def _plain(value):
    """A value that JSON can hold: NumPy scalars become Python's, NaN and infinity null."""
    value = value.item() if hasattr(value, "item") else value
    return None if isinstance(value, float) and not math.isfinite(value) else value


def _file(folder: Path, name: str, suffix: str) -> Path:
    if not re.fullmatch(r"[\w.-]+", name):
        raise ValueError(f"{name!r} cannot be a file's name: letters, digits, '.', '-' and '_' only")
    folder.mkdir(parents=True, exist_ok=True)
    return folder / f"{name}{suffix}"
