"""A measurement at every so many steps of a training run, gathered in one file beside the weights.

Each look is written by its step, whole, when it is taken: a run that was killed and goes on ends with the same file.
"""
from __future__ import annotations

import os
import time
from collections.abc import Callable

import pandas as pd


class Every:
    """Looks at the steps 1, 1 + every, 1 + 2 every, ...; at none where `every` is 0."""

    def __init__(self, ctx, name: str, every: int):
        self.ctx, self.name, self.every = ctx, name, every
        ctx.state.mkdir(parents=True, exist_ok=True)

    def look(self, step: int, measure: Callable[[], pd.DataFrame]) -> dict[str, float]:
        """Before the update of `step` (0-based), where one is due: a frame that is a function of the step alone.

        Returns the seconds it took as `seconds_<name>`, for the timing; nothing where none was due.
        """
        if not self.every or step % self.every:
            return {}
        start = time.perf_counter()
        path = self.ctx.state / f"{self.name}-{step:06d}.parquet"
        measure().assign(step=step + 1).to_parquet(path.with_suffix(".partial"), index=False)
        os.replace(path.with_suffix(".partial"), path)
        return {f"seconds_{self.name}": time.perf_counter() - start}

    def finish(self) -> None:
        """Gather what was seen into `<name>.parquet` beside the weights."""
        found = sorted(self.ctx.state.glob(f"{self.name}-*.parquet"))
        if found:
            gathered = pd.concat([pd.read_parquet(path) for path in found])
            gathered.to_parquet(self.ctx.out / f"{self.name}.parquet", index=False)
