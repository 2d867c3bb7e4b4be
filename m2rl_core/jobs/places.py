"""A stage over several nodes of a Ray cluster: a place on each, kept for it at once, and a launcher in every place.

Ray keeps the places (a placement group, each on another node) as soon as the nodes have room. The task in the first one
makes the stage, as on one node, and asks for a task in each of the others, which starts that node's launcher: all ranks
meet at the first node's address. The launch's folder is of the store, so the store must lie on a path that all share.
"""
from __future__ import annotations

import socket
import time
from dataclasses import replace
from pathlib import Path

from m2rl_core.errors import StudyError
from m2rl_core.jobs import launch
from m2rl_core.run import Run

LAG = 90.0  # seconds after which one node must see what another one wrote


def keep(wanted: dict[str, float], count: int):
    """Places with what a stage takes of each node, on so many nodes."""
    from ray.util.placement_group import placement_group
    bundle = {name: wanted[key] for name, key in (("CPU", "num_cpus"), ("GPU", "num_gpus")) if wanted[key]}
    return placement_group([bundle] * count, strategy="STRICT_SPREAD")


def at(group, number: int):
    """The place of that number, as a task's strategy."""
    from ray.util.scheduling_strategies import PlacementGroupSchedulingStrategy
    return PlacementGroupSchedulingStrategy(group, number)


class Others(launch.Others):
    """The launchers of the other nodes; `begin(strategy, folder, place)` hands Ray the task that starts one."""

    def __init__(self, begin, count: int, folder: Path):
        import ray
        self.ray = ray
        with socket.socket() as free:
            free.bind(("", 0))
            self.place = launch.Place(0, ray.util.get_node_ip_address(), free.getsockname()[1])
        group = ray.util.get_current_placement_group()
        self.refs = [begin(at(group, i), folder, replace(self.place, machine=i)) for i in range(1, count)]

    def ended(self) -> bool:
        return bool(self.ray.wait(self.refs, timeout=0)[0])

    def close(self) -> None:
        over, late = self.ray.wait(self.refs, num_returns=len(self.refs), timeout=launch.PATIENCE)
        for ref in late:
            self.ray.cancel(ref, force=True)
        for ref in over:
            try:
                self.ray.get(ref)
            except self.ray.exceptions.RayError as error:  # a lost node is told by the ranks that miss its ranks
                cause = getattr(error, "cause", None)
                self.fault = cause if isinstance(cause, StudyError) else self.fault


def help_make(run: Run, name: str, folder: Path, place: launch.Place) -> None:
    """On another node than the first: its ranks of a stage, until they or those of the first have ended."""
    end = time.monotonic() + LAG
    while not (folder / launch.WORK).exists():
        if time.monotonic() > end:
            raise StudyError(f"{name}: {socket.gethostname()} does not see {folder}: a stage over several nodes needs a store "
                             "on a path that all of them share (M2RL_ARTIFACTS)")
        time.sleep(launch.LOOK)
    launch.attend(run, run.stages[name], folder, place, lambda: not folder.exists())
