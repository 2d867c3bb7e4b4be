"""The one loop that SFT, GRPO and distillation share: step, record, checkpoint, resume.

An objective is a function of the step number alone that leaves gradients on the weights and returns what to
record, so a killed run goes on from its last checkpoint and ends with the bytes of an unbroken one. On several
processes (see `ranks`) every one of them takes the step, and the first writes.
"""
from __future__ import annotations

import json
import math
import os
import shutil
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import torch

from m2rl_core import ranks
from m2rl_core.errors import StudyError
from m2rl_core.models.policy import Policy, save
from m2rl_core.ranks import parts, sharded

SHOWN = ("reward", "loss", "verifier_failures")  # in the line of a step, where they are recorded


class TrainingDiverged(StudyError):
    """The loss or a gradient is not a number; the last good state is kept."""


@dataclass(frozen=True)
class Optimization:
    """Adam with decoupled weight decay; `schedule` maps a step (0-based) to a factor of `lr`."""

    steps: int
    lr: float
    weight_decay: float
    betas: tuple[float, float]
    grad_clip: float = 1.0
    schedule: Callable[[int], float] = lambda step: 1.0
    checkpoint_every: int = 10


def warmup_cosine(steps: int, warmup: int, floor: float = 0.0) -> Callable[[int], float]:
    """Linear warm-up over `warmup` steps, then a cosine from 1 down to `floor`."""
    def factor(step: int) -> float:
        if step < warmup:
            return (step + 1) / warmup
        share = (step - warmup) / max(1, steps - warmup)
        return floor + (1 - floor) * 0.5 * (1 + math.cos(math.pi * share))
    return factor


def fit(policy: Policy, objective: Callable[[int], dict], settings: Optimization, out: Path, state: Path, progress,
        observe: Callable[[int, Policy], None] | None = None,
        keep_batch: Callable[[Path], None] | None = None, batches=None) -> None:
    """Train in place; writes `metrics.jsonl` (the same bytes on every run) and `timing.jsonl` (seconds) into `out`.

    `objective(step)` runs backward and returns a flat dict of numbers with at least `loss` (`seconds_...` go to the
    timing). `observe(step, policy)` is called before the first step and after each, before the checkpoint; what it
    writes must be a function of the step. Checkpoints go to `state`, whole or not at all. Raises TrainingDiverged,
    before the step, after `keep_batch` has written what the step was made of. `batches` (see there) is asked to `settle`
    after a step, to `write` its state into a checkpoint and to `read` it again.
    """
    parameters = policy.requires_grad()
    optimizer = torch.optim.AdamW(parameters, lr=settings.lr, betas=settings.betas, weight_decay=settings.weight_decay)
    shared = ranks.agree(state)  # the first process's, for checkpoints; what others write is for nobody
    done, metrics, timing = _resume(policy, optimizer, shared, batches)
    if done == 0 and observe is not None:
        observe(0, policy)
    for step in range(done, settings.steps):
        started, busy = time.perf_counter(), time.process_time()
        for group in optimizer.param_groups:
            group["lr"] = settings.lr * settings.schedule(step)
        optimizer.zero_grad(set_to_none=True)
        with ranks.watched():
            record = objective(step)
            norm = sharded.full(torch.nn.utils.clip_grad_norm_(
                [p for p in parameters if p.grad is not None], settings.grad_clip))
        if not math.isfinite(record["loss"]) or not torch.isfinite(norm):
            batch = state / "diverged.jsonl"
            if keep_batch is not None:
                keep_batch(batch)
            raise TrainingDiverged(f"step {step + 1}: loss {record['loss']}, gradient norm {float(norm)}; the state "
                                   f"before it is kept in {state}; lower the learning rate or look at the batch"
                                   + (f", {batch}" if keep_batch is not None else ""))
        optimizer.step()
        waited = batches.settle() if batches is not None else {}
        seconds = {k: round(v, 4) for k, v in record.items() if k.startswith("seconds_")}
        metrics.append({"step": step + 1, **{k: _rounded(v) for k, v in record.items() if k not in seconds},
                        "grad_norm": _rounded(float(norm))})
        timing.append({"step": step + 1, "seconds": round(time.perf_counter() - started, 4), **seconds,
                       **{k: round(v, 4) for k, v in waited.items()}, "cpu_seconds": round(time.process_time() - busy, 4)})
        progress.step(step + 1, settings.steps, **{k: record[k] for k in SHOWN if k in record})
        if observe is not None:
            observe(step + 1, policy)
        if (step + 1) % settings.checkpoint_every == 0 and step + 1 < settings.steps:
            _checkpoint(policy, optimizer, shared, step + 1, metrics, timing, batches)
    for parameter in parameters:
        parameter.requires_grad_(False)
    write_lines(out / "metrics.jsonl", metrics)
    write_lines(out / "timing.jsonl", timing)
    whole = policy.whole(exact=True)
    if ranks.first():
        save(whole, out)


def write_lines(path: Path, rows: list[dict]) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))


def read_lines(path: Path) -> list[dict]:
    return [json.loads(line) for line in path.read_text().splitlines()]


def _rounded(value):
    return float(f"{value:.6g}") if isinstance(value, float) else value


def _checkpoint(policy, optimizer, state, step, metrics, timing, batches):
    """Write everything beside the live state, then swap by one rename."""
    fresh = state / f"step-{step:06d}.partial"
    if ranks.first():
        shutil.rmtree(fresh, ignore_errors=True)
    if isinstance(policy, sharded.Sharded):
        parts.write(policy, optimizer, fresh)
    if not ranks.first():
        return
    if not parts.is_parts(fresh):
        save(policy, fresh)
        torch.save(optimizer.state_dict(), fresh / "optimizer.pt")
    write_lines(fresh / "metrics.jsonl", metrics)
    write_lines(fresh / "timing.jsonl", timing)
    if batches is not None:
        batches.write(fresh)
    os.replace(fresh, state / f"step-{step:06d}")
    for old in state.glob("step-*"):
        if old.name != f"step-{step:06d}":
            shutil.rmtree(old)


def _resume(policy, optimizer, state, batches) -> tuple[int, list[dict], list[dict]]:
    """Load the newest complete checkpoint, if any, into policy and optimizer."""
    complete = ranks.agree(sorted(p for p in state.glob("step-*") if p.suffix != ".partial"))
    if not complete:
        return 0, [], []
    newest = complete[-1]
    parts.restore(policy, optimizer, newest)
    done = int(newest.name.split("-")[1])
    if batches is not None:
        batches.read(newest, done)
    return done, read_lines(newest / "metrics.jsonl"), read_lines(newest / "timing.jsonl")
