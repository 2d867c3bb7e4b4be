"""A stage that several processes make, started by the one that needs it: the same trajectory, and nobody left over."""
from __future__ import annotations

import json
import os
import pickle
import re
import signal
from pathlib import Path

import pytest
import torch
import yaml
from toy_launch import STEPS, TWO, assert_nobody_left, assert_same_expert, at_step, beginning, parent, rank_file, small, start
from whole_study import ROOT

from m2rl_core import ranks
from m2rl_core.errors import StudyError
from m2rl_core.jobs import cluster, launch, live, rank
from m2rl_core.jobs.cluster import ClusterError, Node, takes
from m2rl_core.profile import ProfileError, load_profile
from m2rl_core.run import open_run
from m2rl_core.store import DiskFull

# ---- made by two

def test_two_processes_in_a_local_lane_make_what_one_makes(one, tmp_path):
    """Catches a stage that the notebook's kernel makes by itself, ranks that speak or write twice, an environment that does
    not reach them, and what a launch leaves behind."""
    store = beginning(one, tmp_path, TWO)
    process = start(tmp_path, "reproduce", "--models", "rl-math")
    said = process.communicate(timeout=300)[0]
    assert process.returncode == 0, said
    assert said.count(f"rl-math · step {STEPS}/{STEPS}") == 1 and said.count("rl-math · 2 processes begin") == 1
    assert assert_same_expert(one, store)["processes"] == 2
    (evaluated,) = store.glob("evals/eval-sft-*")
    assert "processes" not in json.loads((evaluated / "manifest.json").read_text())  # only what the profile says
    assert [path.name for path in (store / launch.LAUNCHES).iterdir()] == ["rl-math.log"]
    assert_nobody_left(tmp_path, 0)


def test_whoever_is_killed_the_others_end_and_any_number_goes_on(one, tmp_path):
    """Catches ranks that outlive their launcher or the one who asked, an error that names nobody, one line from each rank, a
    start from nothing, and a checkpoint that only two can read."""
    store = beginning(one, tmp_path, TWO)
    process = start(tmp_path, "run", "rl-math")
    step = at_step(process, 2)
    os.kill(rank_file(store, 1), signal.SIGKILL)
    said = process.communicate(timeout=60)[0]
    assert process.returncode == 2 and len(re.findall("^error: ", said, re.M)) == 1, said
    assert re.search(r"^error: rank 1 of 2 \(process \d+ on .*\) has ended; all ranks stop, what was made is kept", said, re.M)
    assert_nobody_left(tmp_path)

    process = start(tmp_path, "run", "rl-math")
    assert step <= at_step(process, 1)
    os.kill(parent(rank_file(store, 0)), signal.SIGKILL)
    said = process.communicate(timeout=60)[0].strip().splitlines()[-1]
    assert process.returncode == 2 and said.startswith("error: rl-math: the launcher of its processes was killed by signal 9")
    assert_nobody_left(tmp_path)

    process = start(tmp_path, "run", "rl-math")
    step = at_step(process, 1)
    process.kill()
    assert_nobody_left(tmp_path)
    process.communicate()
    assert [path.name for path in store.glob("models/rl-math-*/state/step-*")]

    small(tmp_path)
    process = start(tmp_path, "run", "rl-math")
    assert step <= at_step(process, 1)
    said = process.communicate(timeout=120)[0]
    assert process.returncode == 0, said
    assert "processes" not in assert_same_expert(one, store)


def test_what_a_killed_one_left_is_removed_by_the_next(tmp_path):
    """Catches folders that pile up, and one that is taken from a launch that still runs, here or on another machine."""
    (stage, dead), here = (open_run("smoke", tmp_path).stages["rl-math"], "2147483000,1"), launch.who()
    machine = here.split(",")[0]
    for name, told in {"rl-math-00000001": f"{machine},{dead}", "rl-math-00000002": here, "rl-math-00000003": f"m,{dead}",
                       "rl-multi-00000004": f"{machine},{dead}"}.items():
        (tmp_path / name).mkdir()
        (tmp_path / name / launch.ASKED).write_text(told)
    launch._sweep(tmp_path, stage)
    assert sorted(path.name[-1] for path in tmp_path.iterdir()) == ["2", "3", "4"]


def test_an_error_of_a_rank_and_an_interrupt_end_a_launch(one, tmp_path):
    """Catches a launcher's own words in place of the ranks', a launch that Ctrl-C, or a notebook's view, does not reach."""
    store = beginning(one, tmp_path, TWO)
    process = start(tmp_path, "run", "rl-math")
    at_step(process, 1)
    run = open_run(tmp_path / "small.yaml", tmp_path / "artifacts")
    assert live.working(run, "rl-math") and re.search(r"rl-math · step \d+/", live.picture(run, "rl-math", ["rl-math"]))
    process.send_signal(signal.SIGINT)  # as Ctrl-C and live.stop do
    assert process.communicate(timeout=60)[0].endswith("stopped; the same command goes on from here\n")
    assert process.returncode == 130 and not [path for path in (store / launch.LAUNCHES).iterdir() if path.is_dir()]
    assert_nobody_left(tmp_path, 0)

    content = yaml.safe_load(Path(TWO["config"]).read_text())
    for change, message in (({"mixed_precision": "fp16"}, "^accelerate's mixed_precision is fp16; this trainer"),
                            ({"no_such_key": 1}, "^rl-math: accelerate's launcher ended with code 1 before it .*no_such_key")):
        (tmp_path / "config.yaml").write_text(yaml.safe_dump(content | change))
        run = open_run(small(tmp_path, TWO | {"config": "config.yaml"}), tmp_path / "artifacts")
        with pytest.raises(StudyError, match=message):
            run.need("rl-math")


# ---- what is raised, and what is refused

def errors(folder: Path, **found) -> Path:
    """A launch's folder with what its ranks have raised."""
    folder.mkdir()
    for name, error in found.items():
        (folder / f"{launch.RANK}{name[1:]}").write_text("")
        if error:
            (folder / f"{launch.ERROR}{name[1:]}").write_bytes(pickle.dumps(error))
    return folder


def test_of_many_errors_the_cause_is_raised(tmp_path):
    """Catches a rank's word on who is lost in place of why, and a cluster that gives up, or tries again, at the wrong one."""
    stage, log = open_run("smoke", tmp_path).stages["rl-math"], tmp_path / "rl-math.log"
    log.write_text("a\nValueError: no such key\n\n")
    lost, full = (ranks.RankLost, "rank 1 of 2 has ended: no space"), (DiskFull, "no space left")
    found = launch._error(errors(tmp_path / "a", r0=lost, r1=full), stage, 1, log)
    assert type(found) is DiskFull and str(found) == "rank 1: no space left"
    found = launch._error(errors(tmp_path / "b", r0=full, r1=full), stage, 1, log)
    assert type(found) is DiskFull and str(found) == "no space left"
    found = launch._error(errors(tmp_path / "c", r0=lost, r1=None), stage, 1, log)
    assert type(found) is ranks.RankLost and str(found) == lost[1]
    found = launch._error(tmp_path / "c", stage, -9, log)
    assert type(found) is ranks.RankLost and str(found).startswith("rl-math: the launcher of its processes was killed by sig")
    found = launch._error(errors(tmp_path / "d", r0=(launch.RankFailed, "KeyError: 'x'")), stage, 1, log)
    assert isinstance(found, ranks.RankLost) and str(found) == f"KeyError: 'x'; its traceback is in {log}"
    found = launch._error(errors(tmp_path / "e"), stage, 1, log)
    assert type(found) is launch.LaunchFailed and "process: ValueError: no such key (" in str(found)
    assert not isinstance(found, ranks.RankLost)


def test_why_another_node_could_not_begin_is_raised(tmp_path, monkeypatch):
    """Catches the first node's word that somebody is missing, in place of the missing one's own."""
    run = open_run(small(tmp_path, TWO | {"nodes": 2}), tmp_path)

    class Others(launch.Others):
        def close(self):
            self.fault = ClusterError("node b does not see it")
    run.others, closed = lambda folder: Others(), []
    monkeypatch.setattr(launch, "attend", lambda *arguments: closed.append(arguments) or 1)
    with pytest.raises(ClusterError, match="^node b does not see it$"):
        launch.make(run, run.stages["rl-math"])
    assert len(closed) == 1 and not list((run.store.root / launch.LAUNCHES).iterdir())


@pytest.mark.parametrize(("error", "kept"), [
    (ZeroDivisionError("division by zero"), (launch.RankFailed, "ZeroDivisionError: division by zero")),
    (DiskFull("no space left\nin here"), (DiskFull, "no space left"))])
def test_a_rank_leaves_its_error_to_the_one_who_asked(tmp_path, monkeypatch, capsys, error, kept):
    run = open_run("smoke", tmp_path)
    (tmp_path / launch.WORK).write_bytes(pickle.dumps((run.profile, tmp_path, "smoke", 0, "rl-math")))

    def need(self, name):
        assert name == "rl-math" and self.store.jobs == 0
        raise error
    monkeypatch.setattr("m2rl_core.run.Run.need", need)
    assert rank.main(tmp_path, "3") == 2
    assert pickle.loads((tmp_path / f"{launch.ERROR}3").read_bytes()) == kept
    assert "Traceback" in capsys.readouterr().err


def test_what_does_not_fit_is_one_line(tmp_path, monkeypatch):
    """Catches more processes than GPUs, uneven nodes, kinds that one process makes, and files that say something else."""
    for wrong, said in (
            ({"rl": TWO | {"processes": 0}}, "rl: 0 processes on 1 nodes"),
            ({"rl": TWO | {"processes": 3, "nodes": 2}}, "rl: 3 processes on 2 nodes: each node has as many"),
            ({"rl": {"processes": 2}}, "rl.config: missing; a file of params/accelerate says how 2 processes hold"),
            ({"rl": TWO | {"gpus": 1}}, "rl: 2 processes on a node that gives 1 GPUs"),
            ({"merge": TWO}, "merge: one process makes a stage of kind merge; several make base, sft, rl, opd, eval"),
            ({"rl": TWO | {"config": "none.yaml"}}, "rl.config: .*/none.yaml cannot be read"),
            ({"rl": TWO | {"config": str(ROOT / "params" / "smoke.yaml")}}, "rl.config: .*: distributed_type is None, and")):
        path = small(tmp_path)
        path.write_text(path.read_text() + yaml.safe_dump({"resources": wrong}))
        with pytest.raises(ProfileError, match=f"small.yaml: resources.{said}"):
            load_profile(path)

    run = open_run(small(tmp_path, TWO | {"processes": 4, "nodes": 2}), tmp_path)
    assert run.stages == open_run(small(tmp_path), tmp_path).stages  # in no key
    with pytest.raises(StudyError, match="^resources.rl: 2 nodes, and this is one machine"):
        launch.check(run.profile, ["rl"])
    assert takes(run.profile, "rl") == {"num_cpus": 2, "num_gpus": 0}
    nodes = [Node("a", "10.0.0.1", 8, 0), Node("b", "10.0.0.2", 1, 0)]
    with pytest.raises(ClusterError, match="kind rl takes 2 nodes with 2 cores and 0 GPUs each, and 1 of 2 have them"):
        cluster.check_sizes(run.profile, {"rl"}, nodes)
    with pytest.raises(ClusterError, match="^resources.rl takes 2 nodes, which must share the store's folder .* unset it"):
        cluster.check_disks(run.profile, {"eval", "rl"})

    launch.check(load_profile(small(tmp_path, TWO)), ["rl"])  # without any GPU it is a try on the CPU
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 1)
    with pytest.raises(StudyError, match="^resources.rl: 2 processes, a GPU each, and this machine has 1 GPUs"):
        launch.check(load_profile(small(tmp_path, TWO)), ["rl"])
    launch.check(load_profile(small(tmp_path, TWO)), ["eval"])


def test_another_machine_gets_the_config_files_content(tmp_path):
    """Catches a node that looks for a file of the driver's machine."""
    profile = launch.portable(load_profile(small(tmp_path, TWO)))
    assert launch._content(profile.resources["rl"].config) == Path(TWO["config"]).read_text()
    assert launch.portable(profile) == profile
