"""`python -m m2rl_core bench engine`: our sampler and trainer against `generate`, vLLM and TRL's GRPOTrainer.

The same model (the tiny study's shape, random weights), prompts, group, lengths, loss and float32 on all sides; runs
are interleaved, pair by pair, each a process of its own that warms up before it measures, and kept at once.
"""
from __future__ import annotations

import argparse
import json
import statistics
import sys
from collections.abc import Iterator, Sequence
from pathlib import Path

from m2rl_core.bench import measure, work
from m2rl_core.bench.runs import Runs, gather
from m2rl_core.profile import repo_root

AGAINST = {  # name: (our side, the peer's, its name, how many times as fast we mean to be; None where it only informs)
    "sampling 256 rollouts": ("sample", "generate", "generate", 4),
    "sampling 256 rollouts (vLLM)": ("sample", "vllm", "vllm", None),
    "a step of GRPO": ("step", "trl", "trl", 5),
}
OURS = ("sample", "step", "floor")
# The libraries' own choices, and the fastest for others: ours are for us.
THEIRS = {"GOMP_SPINCOUNT": "300000", "MKL_CBWR": "AUTO"}


def main(argv: Sequence[str]) -> int:
    """Runs what is missing and writes reports/bench/engine.json; 2 after one line on standard error."""
    parser = argparse.ArgumentParser(prog="python -m m2rl_core bench engine", description=__doc__.split("\n")[0])
    parser.add_argument("--pairs", type=int, default=5, help="how many pairs of runs each row is to have (5)")
    parser.add_argument("--scratch", type=Path, default=repo_root() / "artifacts" / "bench" / "engine")
    parser.add_argument("--out", type=Path, default=repo_root() / "reports" / "bench" / "engine.json")
    parser.add_argument("--peer", type=Path, default=repo_root() / ".venv-peers" / "bin" / "python")
    parser.add_argument("--vllm", type=Path, default=repo_root() / ".venv-vllm" / "bin" / "python")
    parser.add_argument("--prompts", type=int, default=32, help="for a try-out")
    parser.add_argument("--new-tokens", type=int, default=64, help="for a try-out")
    args = parser.parse_args(argv)
    for python in (args.peer, args.vllm):
        if not python.exists():
            print(f"bench: {python} is missing: run it as `make bench NB=engine`, which installs it", file=sys.stderr)
            return 2

    def measured() -> Iterator[list[dict]]:
        folder = args.scratch / f"{args.prompts}-{args.new_tokens}"
        bench = Bench(folder, args.peer, args.vllm, args.prompts, args.new_tokens)
        for pair in range(args.pairs):
            bench.pair(pair)
            yield bench.rows()
    return gather(args.out, measured())


class Bench:
    """The work and the measured runs in one folder."""

    def __init__(self, folder: Path, peer: Path, vllm: Path, prompts: int, new_tokens: int):
        self.folder, self.peer, self.vllm = folder, peer, vllm
        if not (folder / "work.json").exists():
            work.make(folder, prompts=prompts, new_tokens=new_tokens)
        self.runs = Runs(folder / "runs.json")

    def pair(self, index: int) -> None:
        """Measures the runs of one pair that are not yet there; who goes first changes from pair to pair."""
        sides = [side for ours, peer, _, _ in AGAINST.values() for side in (ours, peer)] + ["floor"]
        for side in reversed(sides) if index % 2 else sides:
            if self.runs.due(side, index):
                self._measure(side)

    def _measure(self, side: str) -> None:
        """Median seconds of a run's repetitions, at the same number of tokens, and its peaks of memory."""
        log = self.folder / f"{side}.log"
        command = [str(self.peer), str(Path(__file__).with_name("side_trl.py")), str(self.folder)] if side == "trl" else [
            sys.executable, "-m", "m2rl_core.bench.engine_side", side, str(self.folder), str(self.vllm)]
        found = measure.run(command, log, {} if side in OURS else THEIRS)
        said = json.loads(next(line for line in reversed(log.read_text().splitlines()) if line.startswith('{"seconds"')))
        per_token = statistics.median(s / t for s, t in zip(said["seconds"], said["tokens"], strict=True))
        self.runs.keep(side, found | said | {
            "times": said["seconds"], "seconds": statistics.median(said["seconds"]), "per_token": per_token})

    def rows(self) -> list[dict]:
        """One row for each comparison: medians of seconds for the work, tokens a second, peaks of memory in MB.

        `profile` says where our own time went, in shares of 1. vLLM's has its mismatch too: the largest and the mean
        difference of a log-prob to the trainer's, in nats, and the share of tokens that the profile's importance
        weights keep.
        """
        found = []
        for name, (ours, peer, peer_name, bar) in AGAINST.items():
            rows = self.runs.row(name, ours, peer, peer_name, bar, self._floor(ours))
            for row, (side, label) in ((r, pair) for r in rows for pair in (("ours", ours), ("peer", peer))):
                row[f"{side}_tokens_per_second"] = round(1 / statistics.median(
                    run["per_token"] for run in self.runs.found[label]))
            for row in rows:
                profiles = [run["shares"] for run in self.runs.found[ours]]
                row["profile"] = {part: round(statistics.median(p[part] for p in profiles), 3) for part in profiles[0]}
            for row in rows if peer == "vllm" else ():
                runs = self.runs.found[peer]
                row |= {"mismatch_max": max(run["mismatch_max"] for run in runs), "kept": min(run["kept"] for run in runs),
                        "mismatch_mean": statistics.median(run["mismatch_mean"] for run in runs)}
            found += rows
        return found

    def _floor(self, side: str) -> float:
        """Seconds of the matrix products of that side alone, at the greatest speed that was seen of products of the
        model's own shapes: a floor is what nothing goes below.

        2 operations a weight for a sampled token; in a step, 6 more for a trained one. Attention is left out.
        """
        speed = max(1000 * t / s for run in self.runs.found["floor"]
                    for s, t in zip(run["times"], run["tokens"], strict=True))
        tokens = statistics.median(t for run in self.runs.found[side] for t in run["tokens"])
        return tokens * self.runs.found[side][0]["parameters"] * (8 if side == "step" else 2) / speed
