"""Stages on a real Ray cluster: two nodes on this machine, a worker killed, a node lost, nodes that do not fit.

`make test` installs Ray (10 seconds, 245 MB). The tests that need none of it run everywhere.
"""
from __future__ import annotations

import importlib.util
import json
import os
import re
import shutil
import signal
import subprocess
import sys
import threading
import time
from concurrent.futures import Future
from pathlib import Path

import pytest
import toy_launch
import yaml
from whole_study import ROOT, environment_in

from m2rl_core.__main__ import main
from m2rl_core.jobs import cluster, launch, locks
from m2rl_core.jobs.cluster import ClusterError, Node, check_sizes, difference, takes
from m2rl_core.jobs.schedule import Result, Task, scheduled
from m2rl_core.jobs.tasks import notebook_stages, stage_tasks, with_stages
from m2rl_core.profile import ProfileError, load_profile
from m2rl_core.publishing.report import NOTEBOOKS, POLICIES, TRAIN, Job, notebook_tasks
from m2rl_core.run import open_run
from m2rl_core.store import Store

with_ray = pytest.mark.skipif(importlib.util.find_spec("ray") is None, reason="Ray is not installed: `make ray`")
TIMED = {"table2", "policies", "headline", "decision", "readings"}  # tables with seconds, which differ from run to run
MEMORY = 80 * 2**20  # bytes of a node's object store, the least that Ray takes


class Here:
    """An executor whose tasks are over as soon as they are handed over; `fails` maps a task to how often it fails."""

    def __init__(self, size: int, **fails: int):
        self.size, self.fails, self.begun, self.busy = size, fails, [], 0

    def room(self) -> bool:
        return self.busy < self.size

    def submit(self, task: Task) -> Future:
        self.begun.append(task.name)
        self.busy += 1
        future: Future = Future()
        future.set_result(None)
        return future

    def result(self, task: Task, future: Future) -> Result | None:
        self.busy -= 1
        left = self.fails.get(task.name, 0)
        self.fails[task.name] = left - 1
        if left > 1:
            return None
        return Result(task.name, "failed" if left == 1 else "completed")

    def close(self) -> None:
        self.begun.append("closed")


# Without Ray ------------------------------------------------------------------------------------------

def test_tasks_wait_for_what_they_need_whichever_executor_has_it():
    """Catches a notebook that is executed before the cluster made what it reads, and one that a failed stage should stop."""
    nodes, lanes = Here(9, b=2, c=1), Here(1)
    tasks = [Task("a", "nodes", None), Task("b", "nodes", None, ("a",)), Task("c", "nodes", None, ("a",)),
             Task("after c", "lanes", None, (), ("c",)), Task("of b", "lanes", None, ("b", "not here")),
             Task("of c", "lanes", None, ("c",)), Task("of that", "lanes", None, ("of c",))]
    results = {r.name: (r.status, r.reason) for r in scheduled(tasks, {"nodes": nodes, "lanes": lanes})}
    assert results.pop("of c") == ("not run", "needs c") and results.pop("of that") == ("not run", "needs of c")
    assert nodes.begun[:3] == ["a", "b", "c"] and nodes.begun.count("b") == 2
    assert nodes.begun[-1] == lanes.begun[-1] == "closed"
    assert {name: status for name, (status, _) in results.items()} == {
        "a": "completed", "b": "failed", "c": "failed", "after c": "completed"} | ({"of b": "not run"})


def test_a_notebook_waits_for_all_that_it_reads(tmp_path):
    """Catches a name that no stage has, a stage after what needs it, and a notebook that would make stages itself."""
    run = open_run("smoke", tmp_path)
    names = [name for stem in NOTEBOOKS for name in (POLICIES if stem == TRAIN else (stem,))]
    tasks = with_stages(notebook_tasks([Job(name, tmp_path, {}) for name in names]), run)
    stages = [task.name for task in tasks if task.executor == "nodes"]
    assert stages == list(run.stages) and tasks[0].after == ("0_plan",)
    for task in tasks:
        assert task.executor == "nodes" or set(task.needs) <= {*stages, *names}, task
        assert task.executor == "lanes" or set(task.needs) <= set(stages[:stages.index(task.name)])
    reads = {task.name: set(task.needs) for task in tasks}
    assert {"rl-math", "eval-sft", "3.1_preliminary"} == reads["3.2_train.rl-math"] and reads["2_related_work"] == set()
    assert [task.name for task in stage_tasks(run, ["rl-math"])] == ["base", "sft", "rl-math"]
    assert notebook_stages(run, "3.2_train.mt-opd") == ["mt-opd", "eval-sft"]


def test_what_a_stage_takes_is_the_profiles(tmp_path):
    content = yaml.safe_load((ROOT / "params" / "smoke.yaml").read_text())
    path = tmp_path / "gpus.yaml"
    path.write_text(yaml.safe_dump(content | {"resources": {"rl": {"gpus": 8, "cpus": 16}, "eval": {"gpus": 1}}}))
    profile = load_profile(path)
    assert takes(profile, "rl") == {"num_cpus": 16, "num_gpus": 8} and takes(profile, "eval") == {"num_cpus": 1, "num_gpus": 1}
    assert takes(profile, "base") == {"num_cpus": 2, "num_gpus": 0}
    assert open_run(path, tmp_path).stages == open_run("smoke", tmp_path).stages  # no key changes
    small = [Node("a", "10.0.0.1", 32, 4), Node("b", "10.0.0.2", 64, 0)]
    said = r"kind rl takes 16 cores and 8 GPUs, .*10.0.0.1 has 32 and 4; lower resources.rl .*gpus"
    with pytest.raises(ClusterError, match=said):
        check_sizes(profile, {"rl", "base"}, small)
    check_sizes(profile, {"eval", "base"}, small)
    for wrong, said in (({"rll": {}}, "resources.rll: unknown name; did you mean 'rl'"),
                        ({"rl": {"gpu": 1}}, "did you mean 'gpus'"),
                        ({"rl": {"gpus": -1}}, "resources.rl: -1 GPUs")):
        path.write_text(yaml.safe_dump(content | {"resources": wrong}))
        with pytest.raises(ProfileError, match=said):
            load_profile(path)


def test_another_version_is_named_with_its_node():
    here = {"commit": "aaa", "code": "1111", "Python": "3.11.7", "torch": "2.13.0"}
    assert difference("10.0.0.2", here, dict(here)) == ""
    assert difference("10.0.0.2", here, here | {"commit": "bbb"}) == ""  # other commits, the same files
    assert difference("10.0.0.2", here, here | {"commit": "bbb", "code": "2222"}) == (
        "node 10.0.0.2 runs commit bbb (files 2222), the driver aaa (files 1111): check out the same commit on both")
    assert difference("10.0.0.2", here, here | {"torch": "2.12.1"}) == (
        "node 10.0.0.2 has torch 2.12.1, the driver 2.13.0: install the same version on both")


def test_mistakes_are_one_line(tmp_path, monkeypatch, capsys):
    monkeypatch.setenv("M2RL_ARTIFACTS", str(tmp_path))
    monkeypatch.setitem(sys.modules, "ray", None)
    assert main(["run", "base", "--profile", "smoke", "--engine", "ray"]) == 2
    assert capsys.readouterr().err == "error: --engine ray needs Ray, which is not installed here: `make ray` installs it\n"
    assert main(["run", "base", "--profile", "smoke", "--address", "auto"]) == 2
    assert capsys.readouterr().err == "error: --address auto: only --engine ray has one\n"
    monkeypatch.setenv("M2RL_ARTIFACTS", "s3://bucket/artifacts")
    assert main(["status", "--profile", "smoke"]) == 2
    assert "a store is a folder" in capsys.readouterr().err


def test_what_another_node_wrote_is_waited_for(tmp_path):
    """Catches a stage that is made twice because a machine still remembers that it was not there."""
    threading.Timer(0.4, (tmp_path / "manifest.json").touch).start()
    assert cluster._appears(tmp_path, "manifest.json", 30) and not cluster._appears(tmp_path, "never", 0.2)


# With Ray ---------------------------------------------------------------------------------------------

@pytest.fixture(scope="module")
def two_nodes():
    """A cluster of two nodes with two cores each, both on this machine."""
    pytest.importorskip("ray")
    from ray.cluster_utils import Cluster
    with pytest.MonkeyPatch.context() as patch:
        for name, value in environment_in(Path("/none")).items():
            patch.setenv(name, value)  # workers inherit it; what they need of M2RL_ comes with each task
        nodes = Cluster()
        more(nodes, include_dashboard=False)
        more(nodes)
        yield nodes
        nodes.shutdown()


def more(nodes, **options):
    """One node more; on a busy machine Ray's own processes can miss the half minute that it gives them."""
    for patience in (3, 2, 1, 0):
        try:
            return nodes.add_node(num_cpus=2, object_store_memory=MEMORY, **options)
        except Exception as error:
            if cluster.SLOW not in str(error) or not patience:
                raise


def start(nodes, folder: Path, *arguments: str, **environment: str) -> subprocess.Popen:
    """The command line, on that cluster; `environment` beside the usual one."""
    return subprocess.Popen([sys.executable, "-m", "m2rl_core", *arguments, "--engine", "ray", "--address", nodes.address],
                            cwd=folder, env=environment_in(folder) | {"OMP_NUM_THREADS": "1"} | environment, text=True,
                            stdout=subprocess.PIPE, stderr=subprocess.STDOUT)


def read_until(process: subprocess.Popen, begin: str, said: list[str]) -> str:
    """Lines go to `said`, up to the first that begins so, which is returned."""
    for line in process.stdout:
        said.append(line)
        if line.strip().startswith(begin):
            return line.strip()
    raise AssertionError("".join(said[-40:]))


def kill_maker(store: Path, stage: str, other_than: int = 0) -> int:
    """Kill the process that makes a stage, or will in a moment; its id. A killed one can still be seen for a while."""
    end = time.monotonic() + 120
    while time.monotonic() < end:
        for mark in locks.marks(store / ".lock"):
            if mark.stage == stage and mark.pid != other_than:
                os.kill(mark.pid, signal.SIGKILL)
                return mark.pid
        time.sleep(0.1)
    raise AssertionError(f"nobody makes {stage}")


def digests(store: Path) -> dict[str, dict]:
    """What every finished stage is made of."""
    return {path.parent.name: json.loads(path.read_text())["digests"] for path in sorted(store.glob("*/*/manifest.json"))}


def verdicts(report: Path) -> list[str]:
    """The claims of a report, but for those that rest on seconds, and without the seconds that others would take."""
    claims = json.loads((report / "claims.json").read_text())
    return [re.sub(r"[\d.,]+ (second|minute|hour)s?", "a time", json.dumps(claim)) for claim in claims
            if not any("timing.jsonl" in data for data in claim["where"]["data"])]


@with_ray
def test_the_whole_study_with_a_worker_killed_is_the_local_one(two_nodes, study, tmp_path):
    """Catches a retry from nothing, a stage that a notebook had to make itself, and any result that depends on the engine."""
    began, said = time.monotonic(), []
    process = start(two_nodes, tmp_path, "reproduce", "--profile", "smoke")
    store, report = tmp_path / "artifacts" / "smoke", tmp_path / "reports" / "smoke"
    read_until(process, "rl-multi · step 2/5", said)
    kill_maker(store, "rl-multi")
    again = read_until(process, "rl-multi: WorkerCrashedError", said)
    assert "goes on from its last state, on another node if there is one (1 of 2)" in again
    assert int(re.search(r"step (\d)/5", read_until(process, "rl-multi · step", said))[1]) > 1
    said += process.stdout.readlines()
    assert process.wait() == 0 and "20 of 20 notebooks completed" in said[-1], "".join(said[-40:])
    print(f"\nreproduce --engine ray: {time.monotonic() - began:.0f} s")

    assert len(list(store.glob("reproduce-*.log"))) == 2  # both nodes worked
    assert " made in " not in (store / "reproduce.log").read_text()  # kernels found all that they read
    assert digests(store) == digests(study.store) and len(digests(store)) > 40
    assert not [*store.glob(".lock,*"), *store.glob(".token*"), *(store / cluster.RUNNING).iterdir()]
    assert verdicts(report) == verdicts(study.report) and len(verdicts(report)) > 70
    tables = {path.stem: path.read_bytes() for path in (study.report / "tables").glob("*.csv")}
    assert {path.stem for path in (report / "tables").glob("*.csv")} == tables.keys()
    assert {name for name, data in tables.items()
            if (report / "tables" / f"{name}.csv").read_bytes() != data} <= TIMED


@with_ray
def test_a_lost_node_is_one_line_and_another_one_goes_on(two_nodes, study, tmp_path):
    """The node that makes a stage is killed with all its processes; a third failure ends it."""
    profile, store = long_profile(tmp_path, study), tmp_path / "artifacts" / "long"
    process, said = start(two_nodes, tmp_path, "run", "rl-math", "--profile", str(profile)), []
    read_until(process, "rl-math · step 3/", said)
    lost = (store / cluster.RUNNING / "rl-math").read_text()
    node = next(each for each in two_nodes.list_all_nodes() if each.node_id == lost)
    killed = 0
    if node is two_nodes.head_node:  # it cannot be taken away: what it runs is killed instead
        killed = kill_maker(store, "rl-math")
    else:
        two_nodes.remove_node(node, allow_graceful=False)
    read_until(process, "rl-math: ", said)
    assert re.search(r"(NodeDied|WorkerCrashed)Error: .* \(1 of 2\)", said[-1]), said[-1]
    assert int(re.search(r"step (\d+)/", read_until(process, "rl-math · step", said))[1]) > 1
    for _ in range(2):
        killed = kill_maker(store, "rl-math", killed)
        read_until(process, "rl-math: ", said)
    assert "rl-math: failed: WorkerCrashedError" in said[-1] and process.wait() == 1
    assert [path for path in store.glob("models/rl-math-*/state/step-*")]  # kept for the next start
    if node is not two_nodes.head_node:
        more(two_nodes)


def long_profile(folder: Path, study) -> Path:
    """Smoke with many steps of RL, its base and SFT model already in the store."""
    content = yaml.safe_load((ROOT / "params" / "smoke.yaml").read_text())
    content["rl"] |= {"steps": 200, "eval_every": 200, "interference_every": 0}
    path = folder / "long.yaml"
    path.write_text(yaml.safe_dump(content))
    for made in study.store.glob("models/*"):
        if made.name.startswith(("base-", "sft-")):
            shutil.copytree(made, folder / "artifacts" / "long" / "models" / made.name)
    return path


@with_ray
def test_two_processes_on_a_node_with_one_killed_make_what_one_makes(two_nodes, one, tmp_path):
    """Catches a node that looks for the driver's file, a rank that is lost for good, and ranks that are left on a node."""
    store = toy_launch.beginning(one, tmp_path, toy_launch.TWO)
    process, said = start(two_nodes, tmp_path, "run", "rl-math", "--profile", str(tmp_path / "small.yaml")), []
    read_until(process, "rl-math · 2 processes begin", said)
    read_until(process, "rl-math · step 2/", said)
    os.kill(toy_launch.rank_file(store, 1), signal.SIGKILL)
    again = read_until(process, "rl-math: rank 1 of 2 (process ", said)
    assert "has ended; all ranks stop" in again and again.endswith("on another node if there is one (1 of 2)")
    assert int(re.search(r"step (\d+)/", read_until(process, "rl-math · step", said))[1]) > 1
    said += process.stdout.readlines()
    assert process.wait() == 0, "".join(said[-40:])
    assert toy_launch.assert_same_expert(one, store)["processes"] == 2
    assert [path.name for path in (store / launch.LAUNCHES).iterdir()] == ["rl-math.log"]
    toy_launch.assert_nobody_left(tmp_path)


@with_ray
def test_a_stage_over_two_nodes_is_the_one_of_a_process(two_nodes, one, tmp_path):
    """Catches a launcher that is not started on the second node, two in one place, and an address where nobody listens."""
    store = toy_launch.beginning(one, tmp_path, toy_launch.TWO | {"nodes": 2})
    process = start(two_nodes, tmp_path, "run", "rl-math", "--profile", str(tmp_path / "small.yaml"))
    said = process.communicate(timeout=300)[0]
    assert process.returncode == 0, said
    assert toy_launch.assert_same_expert(one, store)["processes"] == 2
    assert sorted(path.name for path in (store / launch.LAUNCHES).iterdir()) == ["rl-math-1.log", "rl-math.log"]
    toy_launch.assert_nobody_left(tmp_path)


@with_ray
def test_a_node_with_other_code_is_named(two_nodes, tmp_path):
    shutil.copytree(ROOT / "m2rl_core", tmp_path / "old" / "m2rl_core", ignore=shutil.ignore_patterns("__pycache__"))
    (tmp_path / "old" / "m2rl_core" / "errors.py").open("a").write("\n# changed here\n")
    node = more(two_nodes, env_vars={"PYTHONPATH": str(tmp_path / "old")})
    try:
        process = start(two_nodes, tmp_path, "run", "base", "--profile", "smoke")
        said = process.communicate(timeout=180)[0].strip().splitlines()
        assert process.returncode == 2 and re.search(
            r"^error: node [\d.]+ runs commit unknown \(files \w{8}\), the driver .*: check out the same commit", said[-1])
    finally:
        two_nodes.remove_node(node, allow_graceful=False)


@with_ray
def test_a_path_that_is_not_shared_is_one_line(two_nodes, tmp_path, monkeypatch):
    """A node that finds nothing where the driver has its store, as on two machines with a folder each."""
    import ray
    ray.init(address=two_nodes.address, logging_level="ERROR", log_to_driver=False)
    try:
        nodes = [Node(node["NodeID"], node["NodeManagerAddress"], 2, 0) for node in ray.nodes() if node["Alive"]]
        store = Store(tmp_path / "store")
        cluster.check_nodes(ray, nodes, store)
        assert not list((tmp_path / "store").iterdir())
        there, look = str(tmp_path / "other"), cluster.look
        monkeypatch.setattr(cluster, "look", lambda where, token, node: look(f"{there}/{node}", token, node))
        with pytest.raises(ClusterError, match=r"^node [\d.]+ does not share .*/store with the driver: .*M2RL_ARTIFACTS"):
            cluster.check_nodes(ray, nodes, store)
    finally:
        ray.shutdown()


@with_ray
def test_no_cluster_at_an_address_is_one_line(tmp_path, monkeypatch, capsys):
    monkeypatch.setenv("M2RL_ARTIFACTS", str(tmp_path))
    monkeypatch.setenv("RAY_raylet_start_wait_time_s", "1")
    assert main(["run", "base", "--profile", "smoke", "--engine", "ray", "--address", "127.0.0.1:1"]) == 2
    assert "error: no Ray cluster at 127.0.0.1:1: " in capsys.readouterr().err
