"""`python -m m2rl_core bench analysis`: the weight analysis of section 3.3 against one read of its files.

Base and five experts in the matrix shapes of Qwen3-4B, bfloat16. Runs are interleaved, pair by pair, each a process
of its own; what it times are the files alone, after imports and, for ours, after the kernel has been loaded.
"""
from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Iterator, Sequence
from pathlib import Path

from m2rl_core.bench import measure, models
from m2rl_core.bench.runs import Runs, gather
from m2rl_core.profile import repo_root

READ, COLD = "one read of the files", "one read of the files, from the disk"
AGAINST = {  # name: (our side, the other, its name, how many times as fast we mean to be; None where it only informs)
    READ: ("ours", "read", "read", 1 / 1.25),
    COLD: ("ours-cold", "read-cold", "read", None),
    "the same in PyTorch, matrix by matrix": ("ours", "torch", "torch", None),
}


def main(argv: Sequence[str]) -> int:
    """Runs what is missing and writes reports/bench/analysis.json; 2 after one line on standard error."""
    parser = argparse.ArgumentParser(prog="python -m m2rl_core bench analysis", description=__doc__.split("\n")[0])
    parser.add_argument("--pairs", type=int, default=5, help="how many pairs of runs each row is to have (5)")
    parser.add_argument("--scratch", type=Path, default=repo_root() / "artifacts" / "bench" / "analysis")
    parser.add_argument("--out", type=Path, default=repo_root() / "reports" / "bench" / "analysis.json")
    parser.add_argument("--layers", type=int, default=2, help="of the models; each adds 1.2 GB of files (2)")
    parser.add_argument("--hidden", type=int, default=2560, help="of the models, for a try-out")
    args = parser.parse_args(argv)

    def measured() -> Iterator[list[dict]]:
        bench = Bench(args.scratch / f"{args.layers}-{args.hidden}", args.layers, args.hidden)
        for pair in range(args.pairs):
            bench.pair(pair)
            yield bench.rows()
    return gather(args.out, measured())


class Bench:
    """The models and the measured runs in one folder."""

    def __init__(self, folder: Path, layers: int, hidden: int):
        self.folder, self.home = folder, folder / "models"
        models.make_once(self.home, layers, 0, sizes=models.matrices(layers, hidden))
        self.files = sorted(self.home.glob("*/*.safetensors"))
        self.runs = Runs(folder / "runs.json")

    def pair(self, index: int) -> None:
        """Measures the runs of one pair that are not yet there; who goes first changes from pair to pair."""
        sides = dict.fromkeys(side for ours, other, _, _ in AGAINST.values() for side in (ours, other))
        for side in reversed(sides) if index % 2 else sides:
            if self.runs.due(side, index):
                self._measure(side)

    def _measure(self, side: str) -> None:
        """Seconds as the side itself takes them, with the files in the page cache or, for `-cold`, dropped from it."""
        name, log = side.removesuffix("-cold"), self.folder / f"{side}.log"
        if side == name:
            measure.warm(self.files)
        else:
            measure.drop(self.files)
        found = measure.run([sys.executable, "-m", "m2rl_core.bench.analysis_side", name, str(self.home)], log)
        self.runs.keep(side, found | json.loads(log.read_text().splitlines()[-1]))

    def rows(self) -> list[dict]:
        """One row for each comparison: medians of seconds, peaks of memory in MB; the floor is the read.

        `profile` says where our own processor time went, in shares of 1.
        """
        found = []
        for name, (ours, other, other_name, bar) in AGAINST.items():
            floor = self.runs.median("read-cold" if ours.endswith("cold") else "read")
            rows = self.runs.row(name, ours, other, other_name, bar, floor)
            found += [row | {"gigabytes": round(sum(path.stat().st_size for path in self.files) / 1e9, 2),
                             "profile": self.runs.found[ours][0]["profile"]} for row in rows]
        return found
