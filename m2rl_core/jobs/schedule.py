"""One scheduler for every engine: each task as soon as what it needs is over, by the executor that its kind belongs to.

An executor starts tasks and says how they ended: `Lanes` are processes of this machine, `cluster.Nodes` a Ray cluster.
"""
from __future__ import annotations

import multiprocessing
import os
import threading
from collections.abc import Callable, Iterable, Iterator, Mapping
from concurrent.futures import FIRST_COMPLETED, Future, ProcessPoolExecutor, wait
from concurrent.futures.process import BrokenProcessPool
from dataclasses import dataclass, field
from typing import Any, Protocol

PRELOAD = ["papermill", "nbclient", "nbformat", "m2rl_core.publishing.report"]  # what every lane needs


@dataclass(frozen=True)
class Task:
    """Something to do: `needs` must have completed if they belong to this run, `after` must only be over."""

    name: str
    executor: str
    work: Any
    needs: tuple[str, ...] = ()
    after: tuple[str, ...] = ()


@dataclass
class Result:
    """How a task ended: completed, failed or not run."""

    name: str
    status: str
    seconds: float = 0.0
    reason: str = ""
    parameters: dict = field(default_factory=dict)


class Executor(Protocol):
    """Where tasks run."""

    def room(self) -> bool:
        """Whether another task may be handed over now."""

    def submit(self, task: Task) -> Future: ...

    def result(self, task: Task, future: Future) -> Result | None:
        """How a task ended whose future is done; None where it is to be handed over again."""

    def close(self) -> None: ...


def scheduled(tasks: Iterable[Task], executors: Mapping[str, Executor]) -> Iterator[Result]:
    """Run all tasks, the first ones first where several may run; yields results as they come, and closes the executors."""
    waiting, running, over = list(tasks), {}, {}
    try:
        while waiting or running:
            for task in list(waiting):
                executor = executors[task.executor]
                ahead = {other.name for other in (*waiting, *running.values())}
                blocked = [name for name in task.needs if name in over and over[name].status != "completed"]
                if not ahead.isdisjoint((*task.needs, *task.after)) or not blocked and not executor.room():
                    continue
                waiting.remove(task)
                if blocked:
                    over[task.name] = Result(task.name, "not run", reason="needs " + ", ".join(blocked))
                    yield over[task.name]
                else:
                    running[executor.submit(task)] = task
            for future in wait(running, return_when=FIRST_COMPLETED)[0]:
                task = running.pop(future)
                result = executors[task.executor].result(task, future)
                if result is None:
                    waiting.insert(0, task)
                else:
                    over[task.name] = result
                    yield result
    finally:
        for executor in executors.values():
            executor.close()


class Lanes:
    """`count` processes that call `function(task.work)`; a fork server starts them with papermill loaded.

    Papermill keeps its kernel's environment and signals to itself there.
    """

    def __init__(self, count: int, function: Callable[[Any], Result], say: Callable[[str], None]):
        self.count, self.function, self.say = count, function, say
        self._busy: dict[Future, ProcessPoolExecutor] = {}
        self._pool = _pool(count)

    def room(self) -> bool:
        return len(self._busy) < self.count

    def submit(self, task: Task) -> Future:
        self.say(f"{task.name} starts")
        future = self._pool.submit(self.function, task.work)
        self._busy[future] = self._pool
        return future

    def result(self, task: Task, future: Future) -> Result:
        pool = self._busy.pop(future)
        try:
            return future.result()
        except BrokenProcessPool:
            if pool is self._pool:
                pool.shutdown(wait=False)
                self._pool = _pool(self.count)
            return Result(task.name, "failed", reason="its process was killed; run again to go on")

    def close(self) -> None:
        self._pool.shutdown(cancel_futures=True)


def _pool(count: int) -> ProcessPoolExecutor:
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(PRELOAD)
    return ProcessPoolExecutor(count, context, _inherit, (dict(os.environ) | {"M2RL_RUN": run_id()},))


def run_id() -> str:
    """Of all processes that belong to this one's run: they take turns without saying so."""
    return str(os.getpid())


def _inherit(environment: dict[str, str]) -> None:
    """A lane's environment is its parent's of now, not of when the fork server began; and it ends with its parent."""
    os.environ.clear()
    os.environ.update(environment)
    threading.Thread(target=_end_with, args=(multiprocessing.parent_process(),), daemon=True).start()


def _end_with(parent) -> None:
    parent.join()  # however it ended; then this lane's kernel sees its own parent gone and ends too
    os._exit(1)
