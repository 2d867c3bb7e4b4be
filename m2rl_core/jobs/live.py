"""From a notebook: make something in a process of its own and watch it, by any engine; closing the notebook stops nothing.

The process is the command line's `run`, in a session of its own; what it says goes to a file of the store, jobs/<name>.log.
The steps that are shown come from the stage's own state, so any notebook, reopened or on another node, sees the same.
"""
from __future__ import annotations

import html
import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

from m2rl_core import progress
from m2rl_core.errors import StudyError
from m2rl_core.jobs import locks
from m2rl_core.run import Run
from m2rl_core.store import STATE, write_atomic
from m2rl_core.study import Stage, seeds_of

JOBS = "jobs"  # folder of the store
EVERY = 1.0  # seconds between two looks
OF_A_REPORT = ("M2RL_LOG", "M2RL_REPORT", "M2RL_NOTEBOOK", "M2RL_RUN")  # environment of a kernel that a runner started
DRAWN = 400  # points of a curve, at most


def train(run: Run, model: str, engine: str = "local", address: str = "") -> None:
    """Make a policy on every training seed, and watch until it is made. Where it is made already, nothing happens.

    In JupyterLab the work is done by a process of its own (see `begin`), on this machine or a Ray cluster
    (`engine="ray"`, `address` as on the command line); interrupting the cell stops the watching alone. Where a runner
    executes the notebook, the kernel makes it, as ever. Raises StudyError where it fails.
    """
    if not missing(run, model):
        return
    if not progress.in_jupyter():
        run.need_seeds(model)
        return
    if not working(run, model):
        begin(run, model, engine, address)
    try:
        watch(run, model)
    except KeyboardInterrupt:  # the lines below this one would wait for the policy
        raise KeyboardInterrupt(f"no longer watched; it goes on, and this cell shows it again; live.stop(run, {model!r}) "
                                "ends it") from None


def missing(run: Run, model: str) -> list[str]:
    """The stages that are still to be made for a policy on every training seed, in order."""
    wanted = {part for name in _policies(run, model) for part in run.missing(name)}
    return [name for name in run.stages if name in wanted]


def begin(run: Run, model: str, engine: str = "local", address: str = "") -> int:
    """Start making a policy in a process of its own, which outlives this one; its id."""
    folder = run.store.root / JOBS
    folder.mkdir(parents=True, exist_ok=True)
    command = [sys.executable, "-m", "m2rl_core", "run", ",".join(_policies(run, model)), "--profile", run.source,
               "--engine", engine, *(["--address", address] if address else [])]
    environment = {key: value for key, value in os.environ.items() if key not in OF_A_REPORT} | {
        "M2RL_ARTIFACTS": str(run.root), "PYTHONUNBUFFERED": "1", "PYTHONPATH": os.pathsep.join(filter(None, sys.path))}
    with open(folder / f"{model}.log", "ab") as log:
        process = subprocess.Popen(command, env=environment, stdin=subprocess.DEVNULL, stdout=log, stderr=subprocess.STDOUT,
                                   start_new_session=True)  # a kernel that ends signals its own session alone
    who = {"pid": process.pid, "born": locks.born(process.pid), "machine": locks.machine_id(), "command": " ".join(command)}
    write_atomic(folder / f"{model}.json", json.dumps(who))
    _CHILDREN[model] = process
    return process.pid


_CHILDREN: dict[str, subprocess.Popen] = {}  # of this kernel; to be asked how they ended


def working(run: Run, model: str) -> bool:
    """Whether something makes the policy, or what it lacks: the process that a notebook began, or any other on any machine."""
    left, who = missing(run, model), _job(run, model)
    if left and who.get("machine") == locks.machine_id() and locks.born(who["pid"]) == who["born"]:
        return True
    return bool(makers(run) & set(left))


def makers(run: Run) -> set[str]:
    """The stages that are being made, on whatever machine that shares the store's path or its address."""
    there = run.store.remote.makers() if run.store.remote else set()
    return there | {mark.stage for mark in locks.marks(run.store.root / ".lock")}


def trace_of(run: Run, stage: Stage) -> Path:
    """The lines of a stage's steps: of this machine's state, or of the one that another machine copied to the address."""
    here = run.store.folder(stage) / STATE / progress.TRACE
    if here.exists() or run.store.remote is None:
        return here
    copy = run.store.root / JOBS / f"{stage.name}.{progress.TRACE}"
    run.store.remote.pull_trace(run.store.where(stage), progress.TRACE, copy)
    return copy


def stop(run: Run, model: str) -> None:
    """End the process that a notebook began; its state is kept, and the next start goes on from it."""
    who = _job(run, model)
    if who.get("machine") != locks.machine_id() or locks.born(who["pid"]) != who["born"]:
        raise StudyError(f"{model}: no process that a notebook began on this machine works on it")
    os.kill(who["pid"], signal.SIGINT)
    while locks.born(who["pid"]) == who["born"]:
        time.sleep(0.1)


def watch(run: Run, model: str) -> None:
    """Show how it goes, in one output that is written over, until the policy is made; raises StudyError if it ends before."""
    from IPython.display import HTML, display
    shown = display(HTML(""), display_id=True)
    idle = 0
    while left := missing(run, model):
        shown.update(HTML(picture(run, model, left)))
        if model in _CHILDREN:
            _CHILDREN[model].poll()  # so that a dead child is seen as such
        idle = 0 if working(run, model) else idle + 1
        if idle > 3:  # between two stages nobody holds a lock for a moment
            log = run.store.root / JOBS / f"{model}.log"
            last = log.read_text(encoding="utf-8").strip().splitlines()[-1:] if log.is_file() else []
            raise StudyError(f"{model} is not made and nothing works on it any more: {(last or ['it said nothing'])[0]} "
                             f"(all of it: {log}); run this cell again to go on")
        time.sleep(EVERY)
    shown.update(HTML(f"<code>{html.escape(model)} · made</code>"))


def picture(run: Run, model: str, left: list[str]) -> str:
    """HTML of the moment: what is made now, how far it is, and the curve of its reward (or loss)."""
    marked = makers(run)
    now = next((name for name in left if name in marked), left[0])
    stage = run.stages[now]
    steps = steps_so_far(trace_of(run, stage))
    if not steps:
        return f"<code>{html.escape(now)} · {'begins' if now in marked else 'waits'} · {len(left)} to be made</code>"
    last = steps[-1]
    numbers = {key: value for key, value in last.items() if key not in ("step", "total", "seconds", "left")}
    text = progress.line(now, last["step"], last["total"], numbers, last["left"])
    if throughput := speed(steps, stage.settings.get("prompts", 0) * stage.settings.get("group", 0)):
        text += f" · {throughput}"
    bar = f'<progress value="{last["step"] / last["total"]:.3f}" max="1" style="width: 12em"></progress>'
    curve = next((key for key in ("reward", "loss") if key in last), None)
    return f"<div style='font-family: monospace'>{bar} {html.escape(text)}</div>" + (
        sparkline([row[curve] for row in steps if curve in row], curve) if curve else "")


def steps_so_far(trace: Path) -> list[dict]:
    """The last word on each step, in order; a line that is being written is left for the next look."""
    found = {}
    for line in trace.read_text(encoding="utf-8").splitlines() if trace.is_file() else ():
        try:
            row = json.loads(line)
        except ValueError:
            continue
        found[row["step"]] = row
    return [found[step] for step in sorted(found)]


def speed(steps: list[dict], rollouts: int) -> str:
    """Steps a minute since the process that makes them began, and `rollouts` a step a second; "" before the second step."""
    first = next((i for i in range(len(steps) - 1, 0, -1) if steps[i]["seconds"] < steps[i - 1]["seconds"]), 0)
    seconds, count = steps[-1]["seconds"], len(steps) - first
    if seconds <= 0 or count < 2:
        return ""
    return f"{60 * count / seconds:.3g} steps a minute" + (
        f" · {rollouts * count / seconds:.3g} rollouts a second" if rollouts else "")


def sparkline(values: list[float], what: str, width: int = 480, height: int = 80) -> str:
    """A curve as SVG, from the first step to the last, its range written beside it."""
    kept = values[::max(1, len(values) // DRAWN)]
    low, high = min(kept), max(kept)
    right, up = (width - 8) / max(1, len(kept) - 1), (height - 8) / ((high - low) or 1)
    points = " ".join(f"{4 + i * right:.1f},{height - 4 - (value - low) * up:.1f}" for i, value in enumerate(kept))
    return (f'<div style="font-family: monospace">{what} {low:.3g} to {high:.3g}<br><svg width="{width}" height="{height}">'
            f'<polyline points="{points}" fill="none" stroke="currentColor" stroke-width="1.5"/></svg></div>')


def _policies(run: Run, model: str) -> list[str]:
    return list(seeds_of(model, run.profile.seeds).values())


def _job(run: Run, model: str) -> dict:
    try:
        return json.loads((run.store.root / JOBS / f"{model}.json").read_text(encoding="utf-8"))
    except FileNotFoundError:
        return {}
