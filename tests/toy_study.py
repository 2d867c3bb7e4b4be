"""A study whose builders take milliseconds, for the tests of store, run and report.

`python tests/toy_study.py ROOT STAGE [DIE]` makes a stage in ROOT; DIE names the moment at which the
process kills itself with SIGKILL: "step 3", "before manifest" or "after manifest".
"""
from __future__ import annotations

import os
import random
import signal
import sys
import time
from pathlib import Path

import pandas as pd

from m2rl_core import run as runs
from m2rl_core import store as stores
from m2rl_core.domains import BENCHMARKS

STEPS = 6
DIE_AT_STEP = 0
PAUSE = 0.0


def build(ctx) -> None:
    """Six steps of seeded numbers, a checkpoint after each; inputs are copied in, so that they are read."""
    done = ctx.state / "done.txt"
    lines = done.read_text().splitlines() if done.is_file() else []
    for step in range(len(lines) + 1, STEPS + 1):
        time.sleep(PAUSE)
        lines.append(f"{step} {random.Random(f'{ctx.seed}/{step}').random():.6f}")
        if step == DIE_AT_STEP:
            os.kill(os.getpid(), signal.SIGKILL)
        new = ctx.state / "done.new"
        new.write_text("\n".join(lines) + "\n")
        os.replace(new, done)
        ctx.progress.step(step, STEPS, reward=step / STEPS)
    (ctx.out / "numbers.txt").write_text("\n".join(lines) + "\n")
    (ctx.out / "timing.jsonl").write_text(f"{time.time()}\n")
    for name, folder in ctx.inputs.items():
        (ctx.out / f"from-{name}.txt").write_text((folder / "numbers.txt").read_text())


def score(ctx) -> None:
    """Evaluation rows: two items of every benchmark, two samples each, with a score drawn from the stage's seed."""
    (model,) = ctx.inputs
    rows = [{"model": model, "benchmark": benchmark, "category": "", "item": f"{benchmark}/{i}", "sample": k,
             "score": random.Random(f"{ctx.seed}/{benchmark}/{i}/{k}").random()}
            for benchmark in BENCHMARKS for i in range(2) for k in range(2)]
    pd.DataFrame(rows).to_parquet(ctx.out / "rows.parquet", index=False)


def toy_run(root: Path, profile: str | Path = "smoke") -> runs.Run:
    """A run whose every stage is built by `build`."""
    runs.BUILDERS.update(dict.fromkeys(runs.BUILDERS, "toy_study:build"))
    return runs.open_run(profile, root)


def die(*_args) -> None:
    os.kill(os.getpid(), signal.SIGKILL)


if __name__ == "__main__":
    root, stage, moment = Path(sys.argv[1]), sys.argv[2], (sys.argv[3] if len(sys.argv) > 3 else "")
    import toy_study  # the copy that builders are looked up in
    if moment.startswith("step"):
        toy_study.DIE_AT_STEP = int(moment.split()[1])
    elif moment.startswith("pause"):
        toy_study.PAUSE = float(moment.split()[1])
    elif moment == "before manifest":
        stores.write_atomic = die
    elif moment == "after manifest":
        stores.Store.sweep = die
    elif moment:
        raise SystemExit(f"unknown moment {moment!r}")
    print(toy_run(root).need(stage), flush=True)
