"""Measured runs by label, kept on disk as they come in, and the rows of a report that come of them."""
from __future__ import annotations

import json
import statistics
import sys
from collections.abc import Iterable
from pathlib import Path

from m2rl_core.provenance import machine
from m2rl_core.store import write_atomic


class Runs:
    """{label: [one dict a run]}, each with `seconds` and perhaps the peaks of memory; saved after every run."""

    def __init__(self, path: Path):
        self.path = path
        self.found: dict[str, list[dict]] = json.loads(path.read_text()) if path.exists() else {}

    def __contains__(self, label: str) -> bool:
        return label in self.found

    def due(self, label: str, index: int) -> bool:
        """Whether the run of that number (from 0) is still to be measured."""
        return len(self.found.get(label, ())) <= index

    def keep(self, label: str, run: dict) -> None:
        self.found.setdefault(label, []).append(run)
        self.path.write_text(json.dumps(self.found, indent=1) + "\n")
        print(f"{label}, run {len(self.found[label])}: {run['seconds']:.3g} s", flush=True)

    def median(self, label: str) -> float:
        return statistics.median(run["seconds"] for run in self.found[label])

    def row(self, name: str, ours: str, peer: str, peer_name: str, bar: float | None, floor: float) -> list[dict]:
        """The comparison of two labels as a row of reports/bench/*.json; none where one has no run."""
        if ours not in self or peer not in self:
            return []
        mine, other = self.median(ours), self.median(peer)
        row = {"name": name, "ours": _digits(mine), "peer": _digits(other), "peer_name": peer_name, "unit": "s",
               "ratio": round(other / mine, 2), "bar": bar and round(bar, 3),
               "pairs": min(len(self.found[ours]), len(self.found[peer])),
               "floor": _digits(floor), "floor_multiple": round(mine / floor, 2)}
        for side, label in (("ours", ours), ("peer", peer)):
            for kind in ("anonymous_mb", "resident_mb"):
                row[f"{side}_{kind}"] = max(run[kind] for run in self.found[label])
            row[f"{side}_runs"] = [_digits(run["seconds"]) for run in self.found[label]]
        return [row | {"machine": machine()}]


def gather(path: Path, measured: Iterable[list[dict]]) -> int:
    """Replaces the report's data each time that `measured` gives its rows anew; 2 after one line on standard error."""
    try:
        for rows in measured:
            path.parent.mkdir(parents=True, exist_ok=True)
            write_atomic(path, json.dumps(rows, indent=2) + "\n")
    except (RuntimeError, ValueError, OSError) as error:
        print(f"bench: {error}", file=sys.stderr)
        return 2
    print(f"{path}: written")
    return 0


def _digits(seconds: float) -> float:
    return float(f"{seconds:.4g}")
