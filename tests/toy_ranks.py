"""One rank of a training stage of a tiny random policy, as torchrun or accelerate starts it.

`torchrun ... tests/toy_ranks.py ROOT STAGE OUT [MOMENT]` makes STAGE from ROOT/models in OUT/out and OUT/state. MOMENT,
"die 3 1" or "hang 3 1": what rank 1 does in place of its 3rd sampling.
"""
from __future__ import annotations

import dataclasses
import os
import signal
import sys
import time
from pathlib import Path
from types import SimpleNamespace

import torch
import toy_training

from m2rl_core import collect, engines, grpo, opd, progress, ranks, sft
from m2rl_core.errors import StudyError
from m2rl_core.run import BuilderContext

BUILD = {"rl-math": grpo.build, "rl-multi": grpo.build, "mt-opd": opd.build, "sft": sft.build_sft}


def fail_at(what: str, count: int, who: int) -> None:
    """Let a rank die, hang or raise at its `count`-th sampling."""
    real, left = engines.TorchEngine.sample, [count]

    def call(*args, **settings):
        left[0] -= 1
        if left[0] == 0 and ranks.rank() == who:
            if what == "die":
                os.kill(os.getpid(), signal.SIGKILL)
            if what == "raise":
                raise StudyError("a disk of this machine is full")
            time.sleep(600)
        return real(*args, **settings)
    engines.TorchEngine.sample = staticmethod(call)


def profile():
    toy = toy_training.profile()
    return dataclasses.replace(toy, opd=dataclasses.replace(toy.opd, variance_every=3, loss=os.environ.get("OPD", "sampled")))


def main(root: Path, stage: str, folder: Path, moment: str = "") -> int:
    torch.set_num_threads(1)
    collect.rewards = toy_training.by_text
    if moment:
        what, count, who = moment.split()
        fail_at(what, int(count), int(who))
    made = {path.name: path for path in (root / "models").iterdir()}
    out = folder / "out" if ranks.first() else ranks.scratch()
    out.mkdir(parents=True, exist_ok=True)
    shown = (progress.Progress if ranks.first() else progress.Silent)(stage)
    try:
        BUILD[stage](BuilderContext(profile(), SimpleNamespace(name=stage, settings={"steps": toy_training.STEPS}), {
            **made, "base": made["sft"]}, out, (folder if ranks.first() else out) / "state", shown, shown.log, toy_training.SEED))
    except StudyError as error:
        ranks.tell(error)
        return 2
    return 0


if __name__ == "__main__":
    root, stage, folder, *moment = sys.argv[1:]
    sys.exit(main(Path(root), stage, Path(folder), *moment))
