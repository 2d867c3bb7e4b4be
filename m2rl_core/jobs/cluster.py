"""A Ray cluster as an executor of stages: where each runs, what it may take of a node, and what follows when one is lost.

Ray places the tasks and tells how they ended, no more: models stay in the store, which all nodes see at one path, or have
on disks of their own with copies at one address (M2RL_STORE). Before any work, each node shows that it sees that path or
address and that its code and packages are the driver's.
"""
from __future__ import annotations

import os
import platform
import socket
import time
from collections.abc import Callable
from concurrent.futures import Future
from dataclasses import dataclass
from pathlib import Path
from types import ModuleType
from uuid import uuid4

from m2rl_core.errors import StudyError
from m2rl_core.jobs import launch, places
from m2rl_core.jobs.remote import SETTING, Remote, RemoteError
from m2rl_core.jobs.schedule import Result, Task, run_id
from m2rl_core.profile import Profile, ProfileError
from m2rl_core.provenance import code, commit, packages
from m2rl_core.ranks import RankLost
from m2rl_core.run import MissingArtifact, Run
from m2rl_core.store import CorruptArtifact, DiskFull, Store, write_atomic

RETRIES = 2  # how often a stage is tried again, from its last state, after its worker or its node is gone or it failed there
ANSWER = 120  # seconds in which a node must answer the first question
KNOCK = 10  # seconds in which an address must take a connection
SLOW = "timed out during startup"  # Ray's words for a node whose processes are not up within half a minute
FINAL = (StudyError, ProfileError, MissingArtifact, CorruptArtifact, DiskFull)  # another node would find the same
LAG = 90.0  # seconds after which one node must see what another one wrote
RUNNING = "running"  # folder of the store, or of its address: on which node each stage is made
OWN_DISK = "M2RL_NODE_ARTIFACTS"  # of a node's own environment: its folder, where nodes share an address and no path


class ClusterError(StudyError):
    """A cluster that cannot be reached or used; the message names the node."""


@dataclass(frozen=True)
class Node:
    """A living node: its id, the address that a person knows it by, and its totals."""

    id: str
    name: str
    cpus: float
    gpus: float

    def has(self, wanted: dict[str, float]) -> bool:
        return self.cpus >= wanted["num_cpus"] and self.gpus >= wanted["num_gpus"]


class Nodes:
    """The stages' executor; hands all tasks over at once, since Ray waits until a node has what a task takes.

    Raises ClusterError for a cluster that cannot be reached, a node that does not see the store or has other versions,
    and a kind of stage that fits on no node.
    """

    def __init__(self, run: Run, address: str, say=print):
        self.run, self.say = run, say
        self._failed: dict[str, list[str]] = {}  # stage -> the nodes on which it failed
        self._refs: dict[str, object] = {}
        self._groups: dict[str, object] = {}  # stage -> its places on several nodes
        self.ray = connect(address, told=run.store.remote is not None)
        try:
            nodes = self.nodes()
            kinds = {stage.kind for stage in run.stages.values()}
            check_sizes(run.profile, kinds, nodes)
            if run.store.remote:
                check_disks(run.profile, kinds)
            check_nodes(self.ray, nodes, run.store)
            for stage in run.stages.values():
                run.store.offer(stage)  # what is made on this machine already
        except BaseException:
            self.close()
            raise
        self._make, self._profile = self.ray.remote(make), launch.portable(run.profile)
        say(f"{len(nodes)} node{'s' if len(nodes) > 1 else ''}: "
            + ", ".join(f"{node.name} ({node.cpus:g} cores, {node.gpus:g} GPUs)" for node in nodes))

    def nodes(self) -> list[Node]:
        """Those that live now."""
        return [Node(node["NodeID"], node["NodeManagerAddress"], *(node["Resources"].get(what, 0) for what in ("CPU", "GPU")))
                for node in self.ray.nodes() if node["Alive"]]

    def room(self) -> bool:
        return True

    def submit(self, task: Task) -> Future:
        kind = self.run.stages[task.name].kind
        wanted, count = takes(self.run.profile, kind), launch.taken(self.run.profile, kind).nodes
        options = {"name": task.name, "max_retries": 0, **wanted}
        failed = self._failed.get(task.name, [])
        if count > 1:
            self._groups[task.name] = group = places.keep(wanted, count)
            options["scheduling_strategy"] = places.at(group, 0)
        elif any(node.id not in failed and node.has(wanted) for node in self.nodes()):
            options |= {"label_selector": {"ray.io/node-id": f"!in({','.join(failed)})"}} if failed else {
                "scheduling_strategy": "SPREAD"}
        environment = {name: value for name, value in os.environ.items()
                       if name.startswith("M2RL_") and name != OWN_DISK} | {"M2RL_RUN": run_id()}
        ref = self._make.options(**options).remote(self._profile, str(self.run.root), task.name, environment)
        self._refs[task.name] = ref
        return ref.future()

    def result(self, task: Task, future: Future) -> Result | None:
        del self._refs[task.name]
        if group := self._groups.pop(task.name, None):
            self.ray.util.remove_placement_group(group)
        try:
            result = Result(task.name, "completed", future.result())
            _waits(lambda: self.run.has(task.name), LAG)  # before a notebook looks for it
            return result
        except self.ray.exceptions.RayError as error:
            cause = getattr(error, "cause", None) or error
            reason = (str(cause).strip().splitlines() or [""])[0][:300]
            reason = reason if isinstance(cause, FINAL) else f"{type(cause).__name__}: {reason}"
        failed = self._failed.setdefault(task.name, [])
        failed.append(_node_of(self.run.store, task.name))
        if isinstance(cause, FINAL) and not isinstance(cause, RankLost) or len(failed) > RETRIES:
            return Result(task.name, "failed", reason=reason)
        if group and not _room(self.run.profile, self.run.stages[task.name].kind, self.nodes()):
            return Result(task.name, "failed", reason=f"{reason}; too few nodes are left for it, its state is kept")
        self.say(f"{task.name}: {reason}; it goes on from its last state, on another node if there is one "
                 f"({len(failed)} of {RETRIES})")
        return None

    def close(self) -> None:
        """Stop what still runs (its state is kept) and leave the cluster."""
        for ref in self._refs.values():
            self.ray.cancel(ref, force=True)
        self.ray.shutdown()


def make(profile: Profile, root: str, name: str, environment: dict[str, str],
         helps: tuple[Path, launch.Place] | None = None) -> float:
    """In a worker of a node: make one stage whose inputs are made, or help the node that makes it; its seconds."""
    import ray
    began, node = time.monotonic(), ray.get_runtime_context().get_node_id()
    for old in [key for key in os.environ if key.startswith("M2RL_") and key != OWN_DISK]:
        del os.environ[old]  # of the task before: a worker serves several
    os.environ.update(environment)
    own = os.environ.get(OWN_DISK) if SETTING in environment else None
    run = Run(profile, Path(own or root).absolute())
    if run.store.remote is None:  # the driver reads it there; what is said on another disk comes to it through Ray
        os.environ["M2RL_LOG"] = str(run.store.root / f"reproduce-{node[:8]}.log")
    run.store.jobs = 0  # Ray counts what runs on a node
    _note(run.store, name, node)
    for part in run.stages[name].needs:  # what another node has just made; unseen, it would be made here again
        if run.store.remote and run.stages[part].kind == "import":
            run.need(part)  # brought models lie on each node, or come from the hub
        elif not _waits(lambda part=part: run.has(part), LAG):
            raise ClusterError(f"{name}: {part} is made, but this node does not see it {LAG:.0f} seconds later: is "
                               + (f"{run.store.remote.at.shown} the same for all nodes?" if run.store.remote else
                                  f"{run.store.root} a path that all nodes share?"))
    if helps:
        places.help_make(run, name, *helps)
        return round(time.monotonic() - began, 1)

    def begin(strategy, *helps):
        options = {"name": name, "max_retries": 0, "scheduling_strategy": strategy, **takes(profile, run.stages[name].kind)}
        return ray.remote(make).options(**options).remote(profile, root, name, environment, helps)

    run.others = lambda folder: places.Others(begin, launch.taken(profile, run.stages[name].kind).nodes, folder)
    run.need(name)
    _note(run.store, name, None)
    return round(time.monotonic() - began, 1)


def takes(profile: Profile, kind: str) -> dict[str, float]:
    """What a stage takes of each of its nodes: as `resources` say, else a core for each of its threads or processes there."""
    given = launch.taken(profile, kind)
    return {"num_cpus": given.cpus or max(profile.threads_of(kind), given.processes // given.nodes), "num_gpus": given.gpus}


def connect(address: str, told: bool = False) -> ModuleType:
    """Ray, connected to `auto`, host:port, ray://host:port or `local`: a cluster of this machine alone that ends with us.

    `told`: what tasks say on other machines comes to this process's standard output.
    """
    try:
        import ray
    except ModuleNotFoundError as error:
        raise ClusterError("--engine ray needs Ray, which is not installed here: `make ray` installs it") from error
    os.environ.setdefault("RAY_USAGE_STATS_ENABLED", "0")
    quiet = {"logging_level": "ERROR", "log_to_driver": told}
    if address == "local":  # nothing large passes through Ray's memory, so the least that it takes
        quiet |= {"include_dashboard": False, "object_store_memory": 80 * 2**20}
    for patience in (2, 1, 0):
        try:
            _knock(address)
            ray.init(address=address, **quiet)
            return ray
        except Exception as error:  # Ray has no class of its own for most of these
            if SLOW in str(error) and patience:
                ray.shutdown()
                continue
            reason = (str(error).strip().splitlines() or [type(error).__name__])[0]
            raise ClusterError(f"no Ray cluster at {address}: {reason}; start one with `ray start --head` on one node and "
                               "`ray start --address=HOST:6379` on the others, or give --address local") from error


def _knock(address: str) -> None:
    """OSError where nobody answers at HOST:PORT, with or without ray:// before it: Ray itself would try for many minutes."""
    host, colon, port = address.removeprefix("ray://").rpartition(":")
    if colon and port.isdigit():
        socket.create_connection((host.strip("[]"), int(port)), timeout=KNOCK).close()


def check_sizes(profile: Profile, kinds, nodes: list[Node]) -> None:
    """Raise ClusterError for a kind of stage that no node has room for: Ray would wait for ever."""
    for kind in sorted(kinds):
        wanted = takes(profile, kind)
        if not any(node.has(wanted) for node in nodes):
            largest = max(nodes, key=lambda node: (node.gpus, node.cpus))
            raise ClusterError(
                f"a stage of kind {kind} takes {wanted['num_cpus']:g} cores and {wanted['num_gpus']:g} GPUs, and no node has "
                f"them: {largest.name} has {largest.cpus:g} and {largest.gpus:g}; lower resources.{kind} (or threads) of the "
                f"profile {profile.name}")
        if not _room(profile, kind, nodes):
            raise ClusterError(
                f"a stage of kind {kind} takes {launch.taken(profile, kind).nodes} nodes with {wanted['num_cpus']:g} cores "
                f"and {wanted['num_gpus']:g} GPUs each, and {sum(node.has(wanted) for node in nodes)} of {len(nodes)} have "
                f"them: lower resources.{kind} of the profile {profile.name}, or start more nodes")


def check_disks(profile: Profile, kinds) -> None:
    """Raise ClusterError, where nodes have disks of their own, for a kind of stage that is made on several at once."""
    for kind in sorted(kinds):
        if launch.taken(profile, kind).nodes > 1:
            raise ClusterError(f"resources.{kind} takes {launch.taken(profile, kind).nodes} nodes, which must share the "
                               f"store's folder while they make one stage: {SETTING} is for nodes that share none; unset it, "
                               "or take nodes: 1")


def _room(profile: Profile, kind: str, nodes: list[Node]) -> bool:
    """Whether there are as many nodes as a kind of stage takes, each with what it takes of one."""
    return sum(node.has(takes(profile, kind)) for node in nodes) >= launch.taken(profile, kind).nodes


def check_nodes(ray: ModuleType, nodes: list[Node], store: Store) -> None:
    """Raise ClusterError for the first node that does not share the store, or that has other versions than this one.

    Shared is a path, or the address of the copies where there is one: each must see what the other one wrote.
    """
    from ray.util.scheduling_strategies import NodeAffinitySchedulingStrategy
    store.root.mkdir(parents=True, exist_ok=True)
    token, here = f".token-{uuid4().hex}", versions()
    place = store.remote or store.root
    _leave(place, token)
    where = (store.remote.at.address, store.remote.at.name) if store.remote else str(store.root)
    ask = ray.remote(num_cpus=0, max_retries=0)(look)
    left = [token]
    try:
        there = [ask.options(scheduling_strategy=NodeAffinitySchedulingStrategy(node.id, soft=False)) for node in nodes]
        asked = [(node, task.remote(where, token, node.id)) for node, task in zip(nodes, there, strict=True)]
        left += [f"{token}.{node.id}" for node in nodes]
        for node, ref in asked:
            try:
                found, fault = ray.get(ref, timeout=ANSWER)
            except (ray.exceptions.TaskUnschedulableError, ray.exceptions.NodeDiedError):
                continue  # it left the cluster a moment ago; Ray gives it no stage
            except ray.exceptions.RayError as error:
                last = (str(getattr(error, "cause", None) or error).strip().splitlines() or [""])[-1]
                raise ClusterError(f"node {node.name} cannot answer ({last[:200]}): is the same commit of this repository "
                                   "installed there, with its requirements?") from error
            if other := difference(node.name, here, found):
                raise ClusterError(other)
            if fault is None and _appears(place, f"{token}.{node.id}"):
                continue
            if store.remote:
                raise ClusterError(f"node {node.name} does not share {store.remote.at.shown} with the driver"
                                   + (f": {fault}" if fault else ": it must reach that address, and may write there"))
            raise ClusterError(f"node {node.name} does not share {store.root} with the driver: the store must lie on a path "
                               "that all nodes see and may write to (M2RL_ARTIFACTS=/shared/folder), or have its copies at "
                               "an address (M2RL_STORE=s3://bucket/folder)")
    finally:
        for name in left:
            store.remote.at.remove(name) if store.remote else (store.root / name).unlink(missing_ok=True)


def look(where: str | tuple[str, str], token: str, node: str) -> tuple[dict[str, str], str | None]:
    """On a node: its versions, and what is wrong with the store ("" where the driver's file is not seen, None for nothing).

    Leaves a file beside the driver's, for the driver to see. `where`: a path, or an address and the name there.
    """
    try:
        place = Path(where) if isinstance(where, str) else Remote(*where)
        fault = None if _appears(place, token) else ""
        if fault is None:
            _leave(place, f"{token}.{node}")
    except (StudyError, OSError) as error:
        fault = str(error)
    return versions(), fault


def _leave(place: Path | Remote, name: str) -> None:
    place.at.write(name, b".") if isinstance(place, Remote) else write_atomic(place / name, name)


def _appears(place: Path | Remote, name: str, seconds: float = 5.0) -> bool:
    return _waits(lambda: place.at.exists(name) if isinstance(place, Remote) else (place / name).exists(), seconds)


def versions() -> dict[str, str]:
    """What must be the same on all nodes."""
    import ray
    return {"commit": commit(), "code": code(), "Python": platform.python_version(), "ray": ray.__version__, **packages()}


def difference(node: str, here: dict[str, str], there: dict[str, str]) -> str:
    """The first thing in which a node differs from the driver, as one line; "" for none. The same files are the same code."""
    if here["code"] != there["code"]:
        return (f"node {node} runs commit {there['commit']} (files {there['code']}), the driver {here['commit']} (files "
                f"{here['code']}): check out the same commit on both")
    for name in here:
        if name not in ("commit", "code") and here[name] != there.get(name):
            return (f"node {node} has {name} {there.get(name, 'not at all')}, the driver {here[name]}: install the same "
                    "version on both")
    return ""


def _waits(there: Callable[[], bool], seconds: float) -> bool:
    """Whether something is there, or comes to be seen in time; a machine may remember for a while that it was not."""
    end = time.monotonic() + seconds
    while not there():
        if time.monotonic() > end:
            return False
        time.sleep(0.1)
    return True


def _note(store: Store, stage: str, node: str | None) -> None:
    """Keep on which node a stage is made; None: on none any more."""
    if store.remote:
        name = f".{RUNNING}/{stage}"
        return store.remote.at.write(name, node.encode()) if node else store.remote.at.remove(name)
    note = store.root / RUNNING / stage
    note.parent.mkdir(exist_ok=True)
    write_atomic(note, node) if node else note.unlink(missing_ok=True)


def _node_of(store: Store, stage: str) -> str:
    """The node on which a stage was begun last; "none" where it never was."""
    try:
        if store.remote:
            return store.remote.at.read(f".{RUNNING}/{stage}").decode()
        return (store.root / RUNNING / stage).read_text()
    except (FileNotFoundError, RemoteError):
        return "none"
