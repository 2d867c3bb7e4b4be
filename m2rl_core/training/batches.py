"""Where the batch of a step comes from: sampled when it is asked for, or (`overlap: 1`) during the step before.

With overlap, a thread samples and verifies the batch of step k + 1 while step k's update runs. It draws from a copy of
the weights made before that update, so it is a function of the step, whatever the threads' timing. With vLLM the
sampling is other processes' work; with the torch engine both threads compute here and share the same cores.
"""
from __future__ import annotations

import json
import time
from dataclasses import asdict
from pathlib import Path

import torch

from m2rl_core.data import batch_of
from m2rl_core.domains import Row, Verdict
from m2rl_core.engines import Engine
from m2rl_core.engines.rollout import Rollout
from m2rl_core.errors import StudyError
from m2rl_core.models.policy import Policy
from m2rl_core.threads import STOPPING, Beside
from m2rl_core.training.collect import Batch, collect, joined, scores_of, share

PENDING = "pending.jsonl"  # in a checkpoint: the batch of the next step, sampled with weights that are gone by now


class Batches:
    """`batches(step)`: the batch of a step, and with overlap the start of the next one's sampling, in a `with` of its own.

    Steps are asked for in order. `name` sets the order of the rows, with the stage's seed.
    """

    def __init__(self, ctx, spec, name: str, policy: Policy, rows: list[Row], engine: Engine, steps: int):
        self.spec, self.name, self.policy, self.rows, self.engine, self.steps = spec, name, policy, rows, engine, steps
        self.seed = ctx.seed
        self.copy: Policy | None = None  # what the next batch is drawn from
        self.beside: Beside | None = None  # the thread that draws it
        self.ready: Batch | None = None

    def __call__(self, step: int) -> Batch:
        """The batch of `step` (0-based): of the present weights, or of those before the last update with overlap."""
        if not self.spec.overlap:
            return collect(self.policy, *self._what(step))
        found, self.ready = self.ready or collect(self.policy, *self._what(step)), None
        if step + 1 < self.steps:
            self.copy = copied(self.policy, self.copy)
            self.beside = Beside(lambda: share(self.copy, *self._what(step + 1)), "m2rl-batch")
            self.beside.start()
        return found

    def staleness(self, step: int) -> dict[str, int]:
        """How many updates lie between the weights that sampled a step's batch and those that learn from it."""
        return {"staleness": min(step, 1)} if self.spec.overlap else {}

    def settle(self) -> dict[str, float]:
        """Wait for what is sampled meanwhile, on all ranks; the seconds of that, or raises what went wrong there.

        After each update: the next step needs it at once, and what comes between has the engine to itself, or keeps it.
        """
        if self.beside is None:
            return {}
        start = time.perf_counter()
        own, self.beside = self.beside.result(), None
        self.ready = joined(own, self.spec.group)
        return {"seconds_wait": time.perf_counter() - start}

    def write(self, folder: Path) -> None:
        """Keep the next step's batch with a checkpoint.

        Its weights would be another whole model, and vLLM would not draw the same tokens from them again.
        """
        if self.ready is not None:
            rollouts, verdicts, _, seconds = self.ready
            with (folder / PENDING).open("w", encoding="utf-8") as file:
                file.write(json.dumps(seconds) + "\n")
                for rollout, verdict in zip(rollouts, verdicts, strict=True):
                    own = {name: value for name, value in vars(rollout).items() if name != "row"}
                    file.write(json.dumps({"item": rollout.row.id, **own, "verdict": asdict(verdict)}) + "\n")

    def read(self, folder: Path, step: int) -> None:
        """Take up the batch of `step` from a checkpoint; StudyError where it is not the one that belongs there."""
        if not self.spec.overlap:
            return
        rows, spec, *_ = self._what(step)
        try:
            seconds, *lines = map(json.loads, (folder / PENDING).read_text(encoding="utf-8").splitlines())
            rollouts = [Rollout(rows[i // spec.group], **{n: v for n, v in line.items() if n not in ("item", "verdict")})
                        for i, line in enumerate(lines)]
            if [line["item"] for line in lines] != [row.id for row in rows for _ in range(spec.group)]:
                raise ValueError("its items are not those of the step")
            verdicts = [Verdict(**line["verdict"]) for line in lines]
        except (OSError, ValueError, TypeError, KeyError, IndexError) as error:
            raise StudyError(f"{folder / PENDING}: not the batch of step {step + 1} ({error}); remove {folder.parent} to "
                             "begin the stage again") from error
        self.ready = rollouts, verdicts, scores_of(verdicts, spec.group), seconds

    def _what(self, step: int) -> tuple:
        """The arguments of `collect` for a step, but for the policy."""
        rows = batch_of(self.rows, self.spec.prompts, step, self.seed, self.name)
        return rows, self.spec, self.seed * 100_003 + step, self.engine

    def __enter__(self) -> Batches:
        return self

    def __exit__(self, *_) -> None:
        """Stop what nobody will ask for any more: an error or an interrupt ends both threads."""
        if self.beside is not None:
            self.beside.stop()
            self.engine.stop()
            if self.beside.over.wait(STOPPING):
                self.beside.join()
            self.beside = None


@torch.no_grad()
def copied(policy: Policy, into: Policy | None) -> Policy:
    """A copy of the whole policy that no update touches; in the memory of the last one, where there is one."""
    whole = policy.whole()
    if into is None:
        return Policy({name: w.detach().clone() for name, w in whole.weights.items()}, policy.config, policy.tokenizer)
    for name, weight in whole.weights.items():
        into.weights[name].copy_(weight)
    return into
