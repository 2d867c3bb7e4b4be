"""Notebook A: a training run that is broken off and taken up again, against one that is not."""
from __future__ import annotations

import tempfile
from dataclasses import replace
from pathlib import Path

import pandas as pd

from m2rl_core.run import BuilderContext, Run
from m2rl_core.provenance import sha256
from m2rl_core.store import UNHASHED
from m2rl_core.study import ALONE, NotInStudy
from m2rl_core.training import grpo

STEPS, PROMPTS, GROUP, EVERY = 6, 4, 4, 2
MOVED = "The weights are not those of the start, so there was something to get wrong."
STILL = "The weights did not move (no group had both right and wrong answers), so this shows the bookkeeping only."


class BrokenOff(Exception):
    """What stands for the power cut."""


class _Until:
    """Progress of a run that is broken off when it reports step `last`."""

    def __init__(self, last: int | None):
        self.last = last

    def step(self, step: int, total: int, **numbers: float) -> None:
        if step == self.last:
            raise BrokenOff


def prove(run: Run, model: str, broken_at: int) -> pd.DataFrame:
    """Train `model` for a few small GRPO steps from the SFT model, twice: unbroken, and broken off at step `broken_at`.

    Both use this run's weights, rows and seeds, in a folder that is thrown away; the broken one starts again from
    its last checkpoint. Returns a line a file: file, start (SFT's), unbroken, resumed (12 digits of SHA-256), the same.
    """
    with tempfile.TemporaryDirectory() as folder:
        unbroken, resumed = (_context(run, model, Path(folder) / name) for name in ("unbroken", "resumed"))
        grpo.build(unbroken)
        try:
            grpo.build(replace(resumed, progress=_Until(broken_at)))
        except BrokenOff:
            grpo.build(resumed)
        names = sorted(path.name for path in unbroken.out.iterdir() if path.is_file() and path.name != UNHASHED)
        homes = (unbroken.inputs["sft"], unbroken.out, resumed.out)
        digests = [[sha256(home / name)[:12] if (home / name).is_file() else "–" for home in homes] for name in names]
    return pd.DataFrame([{"file": name, "start": start, "unbroken": a, "resumed": b, "the same": a == b}
                         for name, (start, a, b) in zip(names, digests, strict=True)])


def _context(run: Run, model: str, home: Path) -> BuilderContext:
    """The stage of `model`, cut down to a few small steps, in folders of its own."""
    if "layers" in run.stages["sft"].settings:
        raise NotInStudy(f"training needs SFT whole, and {ALONE}")
    small = replace(run.profile.rl, prompts=PROMPTS, group=GROUP, checkpoint_every=EVERY, eval_every=STEPS + 1)
    stage = replace(run.stages[model], settings={**run.stages[model].settings, "steps": STEPS})
    out, state = home / "out", home / "state"
    out.mkdir(parents=True)
    return BuilderContext(replace(run.profile, rl=small), stage, {"sft": run.need("sft")}, out, state, _Until(None),
                          lambda text: None, run.seed(model))


def sentence(found: pd.DataFrame, broken_at: int) -> str:
    """Whether the resumed run ended with the bytes of the unbroken one, and whether that was hard."""
    same = int(found["the same"].sum())
    weights = found.set_index("file").loc["model.safetensors"]
    moved = weights["start"] != weights["unbroken"]
    checkpoint = (broken_at - 1) // EVERY * EVERY
    return (f"{STEPS} steps of {PROMPTS} x {GROUP} rollouts, broken off in step {broken_at} and taken up from "
            f"{f'the checkpoint after step {checkpoint}' if checkpoint else 'the start'}: {same} of {len(found)} "
            f"files have "
            f"the bytes of the unbroken run. {MOVED if moved else STILL}")
