"""`python -m m2rl_core bench merge`: our merges against mergekit 0.1.5, the same recipes on the same models.

Runs are interleaved, pair by pair, each a command of its own with a warm page cache, and every measured run is kept
at once: a bench that is stopped goes on where it was. mergekit's TIES takes minutes, so five pairs take hours.
"""
from __future__ import annotations

import argparse
import shutil
import sys
from collections.abc import Iterator, Sequence
from pathlib import Path

import yaml

from m2rl_core.bench import measure, models
from m2rl_core.bench.runs import Runs, gather
from m2rl_core.merging.checkpoint import SHARD_BYTES, Checkpoint, total_bytes
from m2rl_core.profile import repo_root

PEER = "mergekit 0.1.5"
AGAINST = {  # name: (mergekit's method, each expert's parameters, how many times as fast we mean to be)
    "linear": ("linear", {"weight": 1.0}, 3),
    "task_arithmetic": ("task_arithmetic", {"weight": 1.0}, 3),
    "ties": ("ties", {"weight": 1.0, "density": 0.2}, 20),
    "dare_ties": ("dare_ties", {"weight": 1.0, "density": 0.2}, 20),
    "sce": ("sce", {}, 20),
}
ROWS = ("average", "ta", "ties", "sce", "ties-dare", "ta-dare")  # the paper's, under its preset
TOGETHER, SLOWEST = "all six rows in one read", 1.5


def main(argv: Sequence[str]) -> int:
    """Runs what is missing and writes reports/bench/merge.json; 2 after one line on standard error."""
    parser = argparse.ArgumentParser(prog="python -m m2rl_core bench merge", description=__doc__.split("\n")[0])
    parser.add_argument("--pairs", type=int, default=5, help="how many pairs of runs each row is to have (5)")
    parser.add_argument("--only", choices=(*AGAINST, "together"), action="append", help="only this row")
    parser.add_argument("--scratch", type=Path, default=repo_root() / "artifacts" / "bench" / "merge")
    parser.add_argument("--out", type=Path, default=repo_root() / "reports" / "bench" / "merge.json")
    parser.add_argument("--peer", type=Path, default=repo_root() / ".venv-peers" / "bin" / "mergekit-yaml")
    parser.add_argument("--layers", type=int, default=28, help="of the models, for a try-out")
    parser.add_argument("--vocab", type=int, default=151936, help="of the models, for a try-out")
    args = parser.parse_args(argv)
    only = args.only or [*AGAINST, "together"]
    if not args.peer.exists() and set(only) & set(AGAINST):
        print(f"bench: {args.peer} is missing: run it as `make bench NB=merge`, which installs it", file=sys.stderr)
        return 2

    def measured() -> Iterator[list[dict]]:
        bench = Bench(args.scratch, args.peer, args.layers, args.vocab)
        for pair in range(args.pairs):
            for name in only:
                bench.pair(name, pair)
                yield bench.rows()
    return gather(args.out, measured())


class Bench:
    """Models, recipes and measured runs in one folder."""

    def __init__(self, folder: Path, peer: Path, layers: int, vocab: int):
        self.folder, self.peer = folder, peer
        self.home = folder / f"models-{layers}-{vocab}"
        models.make_once(self.home, layers, vocab)
        self.runs = Runs(folder / f"runs-{layers}-{vocab}.json")
        self.inputs = [self.home / "base", *(self.home / f"e{i}" for i in range(models.EXPERTS))]
        self.files = [path for model in self.inputs for path in sorted(model.glob("*.safetensors"))]
        self.out_bytes = total_bytes(Checkpoint(self.home / "base").meta)
        self._recipes()

    def _recipes(self) -> None:
        for name, (method, own, _) in AGAINST.items():
            entries = [{"model": str(path)} | ({"parameters": own} if own else {}) for path in self.inputs[1:]]
            config = {"merge_method": method, "models": entries, "base_model": str(self.inputs[0]),
                      "dtype": "float32", "out_dtype": "bfloat16"}
            if method == "linear":
                del config["base_model"]  # mergekit's linear takes none
            (self.home / f"{name}.yaml").write_text(yaml.safe_dump(config, sort_keys=False))
        for method in ROWS:
            config = {"preset": "paper", "merge_method": method, "base_model": str(self.inputs[0]),
                      "models": [{"model": str(path)} for path in self.inputs[1:]], "out_dtype": "bfloat16"}
            (self.home / f"paper-{method}.yaml").write_text(yaml.safe_dump(config, sort_keys=False))

    def pair(self, name: str, index: int) -> None:
        """Measures the runs of one pair that are not yet there; who goes first changes from pair to pair."""
        if name == "together":
            rows = [str(self.home / f"paper-{method}.yaml") for method in ROWS]
            jobs = {f"paper-{method}": self._ours([row]) for method, row in zip(ROWS, rows, strict=True)}
            jobs[TOGETHER] = self._ours(rows)
        else:
            recipe = str(self.home / f"{name}.yaml")
            jobs = {f"{name} ours": self._ours([recipe]), f"{name} peer": [
                str(self.peer), recipe, str(self.folder / "out"), "--async-write", "--no-copy-tokenizer",
                "--out-shard-size", str(SHARD_BYTES)]}
        for label, command in sorted(jobs.items(), reverse=index % 2 == 1):
            if self.runs.due(label, index):
                self._measure(label, command)
        if self.runs.due("floor", index):
            measure.warm(self.files)
            seconds = measure.copy_floor(self.files, self.folder / "floor.bin", self.out_bytes)
            self.runs.keep("floor", {"seconds": seconds})

    def _ours(self, recipes: list[str]) -> list[str]:
        return [sys.executable, "-m", "m2rl_core", "merge", *recipes, str(self.folder / "out")]

    def _measure(self, label: str, command: list[str]) -> None:
        shutil.rmtree(self.folder / "out", ignore_errors=True)
        measure.warm(self.files)
        found = measure.run(command, self.folder / "log.txt")
        shutil.rmtree(self.folder / "out")
        self.runs.keep(label, found)

    def rows(self) -> list[dict]:
        """One row for each comparison that has a pair: medians of seconds, peaks of memory in MB."""
        floor, found = self.runs.median("floor"), []
        for name, (_, _, bar) in AGAINST.items():
            found += self.runs.row(name, f"{name} ours", f"{name} peer", PEER, bar, floor)
        alone = [f"paper-{method}" for method in ROWS if f"paper-{method}" in self.runs]
        if TOGETHER in self.runs and alone:
            slowest = max(alone, key=self.runs.median)
            name = f"the slowest of the six alone, {slowest.removeprefix('paper-')}"
            found += self.runs.row(TOGETHER, TOGETHER, slowest, name, 1 / SLOWEST, floor)
        return found
