"""A stage that several processes make: accelerate's launcher, as a child of the process that needs the stage.

The ranks do what they do where a person types `accelerate launch`: rank 0 takes the lock, writes, and tells each step; an
error of theirs is raised here. No rank outlives its launcher or the process that asked for the stage (see `rank`).
What ranks and launcher say themselves stands in the store, launch/<stage>.log; beside it lies what a launch is to do.
"""
from __future__ import annotations

import contextlib
import dataclasses
import os
import pickle
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING
from uuid import uuid4

from m2rl_core import progress
from m2rl_core.errors import StudyError
from m2rl_core.jobs import locks
from m2rl_core.profile import Profile
from m2rl_core.ranks import RankLost
from m2rl_core.specs import Resources
from m2rl_core.study import Stage

if TYPE_CHECKING:
    from m2rl_core.run import Run

LAUNCHES = "launch"  # folder of the store
WORK, CONFIG, ASKED, RANK, ERROR, SAID = "work", "config.yaml", "asked", "rank-", "error-", "said-"  # files of one launch
MAKER = "M2RL_MAKER"  # environment of a rank: the process on its machine that has started the launcher
LOOK = 0.2  # seconds between two looks
PATIENCE = 40.0  # seconds in which a launcher ends that was asked to; it gives the ranks 30
SHORT = 5.0  # seconds in which ranks see that their launcher has ended


class LaunchFailed(StudyError):
    """Accelerate's launcher did not start the ranks."""


class RankFailed(RankLost):
    """A rank ended by an error that nobody foresaw; it may not come again."""


@dataclass(frozen=True)
class Place:
    """Which machine of a launch this is, and where the ranks of all machines meet; alone, at any free port."""

    machine: int = 0
    address: str = ""
    port: int = 0


class Others:
    """The launchers on the other machines of a stage; here, none."""

    place = Place()
    fault: Exception | None = None  # why one of them could not begin; known when all have ended

    def ended(self) -> bool:
        """Whether one of them has ended."""
        return False

    def close(self) -> None:
        """Return when all have ended."""


def taken(profile: Profile, kind: str) -> Resources:
    """What the profile says of a kind of stage."""
    return profile.resources.get(kind, Resources())


def check(profile: Profile, kinds: Iterable[str]) -> None:
    """Raise StudyError, before any work, for more processes than this machine has GPUs, or for several machines."""
    launched = {kind: taken(profile, kind) for kind in sorted(set(kinds)) if taken(profile, kind).config}
    if not launched:
        return
    import torch
    gpus = torch.cuda.device_count()
    for kind, how in launched.items():
        if how.nodes > 1:
            raise StudyError(f"resources.{kind}: {how.nodes} nodes, and this is one machine: --engine ray has several")
        if how.processes > gpus and (gpus or how.gpus):
            raise StudyError(f"resources.{kind}: {how.processes} processes, a GPU each, and this machine has {gpus} GPUs")


def portable(profile: Profile) -> Profile:
    """The profile with the content of accelerate's config files in place of their names: another machine may lack them."""
    return dataclasses.replace(profile, resources={
        kind: dataclasses.replace(how, config=_content(how.config)) for kind, how in profile.resources.items()})


def _content(config: str) -> str:
    return config if "\n" in config or not config else Path(config).read_text(encoding="utf-8")


def make(run: Run, stage: Stage) -> None:
    """Have a stage made whose inputs are made; returns when it is, and raises what its ranks raised.

    RankLost where another try may go on (a rank or the launcher was killed), LaunchFailed where no rank was started.
    """
    _wait(run, stage)
    if run.has(stage.name):
        return
    how = taken(run.profile, stage.kind)
    if how.nodes > 1 and run.others is None:
        check(run.profile, [stage.kind])
    folder = run.store.root / LAUNCHES / f"{stage.name}-{uuid4().hex[:8]}"
    _sweep(folder.parent, stage)
    folder.mkdir(parents=True)
    others = Others()
    try:
        (folder / ASKED).write_text(who())
        (folder / CONFIG).write_text(_content(how.config), encoding="utf-8")
        (folder / WORK).write_bytes(pickle.dumps((run.profile, run.root, run.source, run.store.jobs, stage.name)))
        progress.say(f"{stage.name} · {how.processes} processes begin")
        if how.nodes > 1:
            others = run.others(folder)
        code = attend(run, stage, folder, others.place, others.ended)
        others.close()
        if not run.has(stage.name):
            raise others.fault or _error(folder, stage, code, log_of(run, stage, 0))
    finally:
        shutil.rmtree(folder, ignore_errors=True)  # by which launchers on other machines see that it is over


def attend(run: Run, stage: Stage, folder: Path, place: Place, stopped: Callable[[], bool]) -> int:
    """One machine's launcher from its start to the end of its ranks; its exit code. `stopped`: the other machines have."""
    how, log, said = taken(run.profile, stage.kind), log_of(run, stage, place.machine), folder / f"{SAID}{place.machine}"
    said.touch()
    where = ["--main_process_ip", place.address] if place.address else []
    command = [sys.executable, "-m", "accelerate.commands.launch", "--config_file", folder / CONFIG,
               "--num_processes", how.processes, "--num_machines", how.nodes, "--machine_rank", place.machine, *where,
               "--main_process_port", place.port, "-m", "m2rl_core.jobs.rank", folder]
    environment = os.environ | {
        MAKER: who(), "M2RL_LOG": os.environ.get("M2RL_LOG", str(said)),
        "PYTHONPATH": os.pathsep.join(filter(None, sys.path))}
    with open(log, "ab") as sink:  # a session of its own: Ctrl-C is for this process, which ends them one after the other
        launcher = subprocess.Popen([str(part) for part in command], env=environment, stdin=subprocess.DEVNULL, stdout=sink,
                                    stderr=subprocess.STDOUT, start_new_session=True)
    try:
        tail, late = _told(said), None
        while launcher.poll() is None:
            next(tail)
            late = late or (time.monotonic() if stopped() else None)
            if late and time.monotonic() - late > PATIENCE:  # ours wait for theirs, which will not come
                break
            time.sleep(LOOK)
        next(tail)
    finally:
        _end(launcher, folder)
    return launcher.returncode


def log_of(run: Run, stage: Stage, machine: int) -> Path:
    """What a stage's launcher and its ranks say themselves, tracebacks and warnings."""
    return run.store.root / LAUNCHES / f"{stage.name}{f'-{machine}' if machine else ''}.log"


def who() -> str:
    """This process, as `lives` reads it."""
    return f"{locks.machine_id()},{os.getpid()},{locks.born(os.getpid())}"


def lives(told: str) -> bool:
    """Whether a process of this machine is still there; False for those of others."""
    machine, pid, born = told.split(",")
    return machine == locks.machine_id() and locks.born(int(pid)) == born


def _sweep(home: Path, stage: Stage) -> None:
    """Remove what launches of a stage left behind whose asker on this machine was killed."""
    for asked in home.glob(f"{stage.name}-????????/{ASKED}"):
        told = asked.read_text()
        if told.startswith(locks.machine_id()) and not lives(told):
            shutil.rmtree(asked.parent, ignore_errors=True)


def _wait(run: Run, stage: Stage) -> None:
    """Return when nobody makes the stage: ranks that wait for a lock would hold their GPUs meanwhile."""
    told = time.monotonic()
    while mark := next((m for m in locks.marks(run.store.root / ".lock") if m.stage == stage.name), None):
        if time.monotonic() - told > locks.NOTICE:
            told = time.monotonic()
            progress.say(f"waiting: process {mark.pid} on {mark.host} works on {stage.name}")
        time.sleep(LOOK)


def _told(said: Path) -> Iterator[None]:
    """Pass on, at each `next`, the whole lines that rank 0 has said since the last one."""
    rest = ""
    with open(said, encoding="utf-8") as file:
        while True:
            *lines, rest = (rest + file.read()).split("\n")
            for line in lines:
                progress.say(line)
            yield


def _end(launcher: subprocess.Popen, folder: Path) -> None:
    """Let a launcher that still runs stop its ranks, and see to it that none of this machine is left."""
    if launcher.poll() is None:
        launcher.terminate()
        try:
            launcher.wait(PATIENCE)
        except subprocess.TimeoutExpired:
            launcher.kill()
            launcher.wait()
    end = time.monotonic() + SHORT
    for path in folder.glob(f"{RANK}*"):
        told = path.read_text()
        while lives(told):
            if time.monotonic() > end:
                with contextlib.suppress(ProcessLookupError):
                    os.kill(int(told.split(",")[1]), signal.SIGKILL)
            time.sleep(0.05)


def _error(folder: Path, stage: Stage, code: int, log: Path) -> Exception:
    """What the ranks of a launch that failed have raised: one of its own before the others' word on who is lost.

    Of a launcher that was killed they only know that the store is gone which it kept for them.
    """
    found = {int(path.name.removeprefix(ERROR)): pickle.loads(path.read_bytes()) for path in folder.glob(f"{ERROR}*")}
    own = [rank for rank in sorted(found) if found[rank][0] is not RankLost]
    if own or found and code >= 0:
        rank = (own or sorted(found))[0]
        kind, message = found[rank]
        if kind is RankFailed:
            message += f"; its traceback is in {log}"
        return kind(f"rank {rank}: {message}" if own and rank else message)
    how = f"was killed by signal {-code}" if code < 0 else f"ended with code {code}"
    if any(folder.glob(f"{RANK}*")):
        return RankLost(f"{stage.name}: the launcher of its processes {how}; what was made is kept, and the same command "
                        f"goes on from the last checkpoint ({log})")
    said = [line for line in log.read_text(encoding="utf-8", errors="replace").splitlines() if line.strip()]
    return LaunchFailed(f"{stage.name}: accelerate's launcher {how} before it started a process: "
                        f"{(said or ['no word'])[-1][:200]} ({log})")
