"""The store's copy at an address: whole or absent, checked, taken up by another machine; and an address that is none.

Two machines are two local roots here. What the stages compute is `toy_study`'s, but for the two Ray nodes at the end.
"""
from __future__ import annotations

import json
import os
import platform
import re
import shutil
import signal
import subprocess
import sys
import threading
import time
from pathlib import Path
from types import SimpleNamespace

import fsspec
import pytest
import toy_study
from fsspec.implementations.local import LocalFileSystem
from test_cluster import digests, kill_maker, long_profile, more, read_until, start, with_ray
from whole_study import environment_in

from m2rl_core import dry, post
from m2rl_core import run as runs
from m2rl_core.__main__ import main
from m2rl_core.errors import StudyError
from m2rl_core.jobs import address, cluster, far_locks, live, locks, remote
from m2rl_core.jobs.cluster import ClusterError
from m2rl_core.jobs.locks import LockLost, Mark
from m2rl_core.store import CorruptArtifact

SLOW = "import sys, toy_study; toy_study.DIE_AT_STEP, toy_study.PAUSE = int(sys.argv[3]), float(sys.argv[4])\n" \
       "toy_study.toy_run(sys.argv[1]).need(sys.argv[2])"  # root, stage, step at which it kills itself, seconds a step


@pytest.fixture(autouse=True)
def calm(monkeypatch):
    monkeypatch.setattr(post, "PAUSE", 0.001)
    monkeypatch.setattr(remote, "FORGET", 0.0)


@pytest.fixture(params=["path", "memory"])
def far(request, tmp_path, monkeypatch):
    """An address with folders, and one of objects."""
    name = str(tmp_path / "far") if request.param == "path" else f"memory://{tmp_path.name}"
    monkeypatch.setenv("M2RL_STORE", name)
    return name


@pytest.fixture
def path(tmp_path, monkeypatch):
    """An address that is a folder, so that tests can look into it and other processes reach it."""
    monkeypatch.setenv("M2RL_STORE", str(tmp_path / "far"))
    return tmp_path / "far" / "smoke"


def machine(tmp_path, name):
    """A run whose local store is a folder of that name."""
    return toy_study.toy_run(tmp_path / name)


def process(tmp_path, name, stage, die_at=0, pause=0.25):
    return subprocess.Popen([sys.executable, "-c", SLOW, str(tmp_path / name), stage, str(die_at), str(pause)], text=True,
                            env=os.environ | {"PYTHONPATH": os.pathsep.join(sys.path)}, stdout=subprocess.PIPE)


# Artifacts ------------------------------------------------------------------------------------------------

def test_what_one_machine_made_another_one_reads(far, tmp_path, capsys):
    """Faults: it is made again there; a file is left behind; what is needed on the way is fetched for nothing."""
    one, two = machine(tmp_path, "one"), machine(tmp_path, "two")
    one.need("sft")
    assert two.missing("sft") == [] and two.has("base") and not two.store.folder(two.stages["sft"]).exists()
    capsys.readouterr()
    folder = two.need("sft")
    assert capsys.readouterr().out == ""  # nothing was made
    kept = {path.name: path.read_bytes() for path in one.path("sft").iterdir()}
    assert {path.name: path.read_bytes() for path in folder.iterdir()} == kept and "timing.jsonl" in kept
    assert [path.name for path in (tmp_path / "two" / "smoke").iterdir()] == ["models"]
    assert not two.store.folder(two.stages["base"]).exists()
    two.need("rl-math")
    assert one.has("rl-math") and one.manifest("rl-math")["digests"] == two.manifest("rl-math")["digests"]


def test_without_an_address_nothing_changes(tmp_path, monkeypatch):
    monkeypatch.delenv("M2RL_STORE", raising=False)
    run = machine(tmp_path, "one")
    assert run.store.remote is None and run.need("base").is_dir()


def test_a_torn_upload_is_no_artifact(path, tmp_path, monkeypatch):
    """Faults: a manifest before its files; a copy that is never finished; an artifact that is lost for a lost connection."""
    put = LocalFileSystem.put_file

    def breaks(self, source, target, *rest, **named):
        if target.endswith("timing.jsonl"):
            raise ConnectionResetError("gone")
        return put(self, source, target, *rest, **named)

    monkeypatch.setattr(LocalFileSystem, "put_file", breaks)
    one, two = machine(tmp_path, "one"), machine(tmp_path, "two")
    with pytest.raises(StudyError, match=r"far/smoke cannot be written \(ConnectionResetError: gone\)"):
        one.need("base")
    there = path / "models" / one.store.folder(one.stages["base"]).name
    assert (there / "numbers.txt").is_file() and not (there / "manifest.json").exists()
    assert one.store.is_here(one.stages["base"]) and not two.has("base")
    monkeypatch.undo()
    monkeypatch.setenv("M2RL_STORE", str(path.parent))
    toy_study.toy_run(tmp_path / "one").need("sft")  # base is made, and goes there now
    assert toy_study.toy_run(tmp_path / "two").missing("sft") == []


def test_a_killed_upload_leaves_no_half_manifest(path, tmp_path, monkeypatch):
    """Fault: on a file system with folders, half a manifest stands under its name."""
    monkeypatch.setattr(LocalFileSystem, "mv", lambda *_: pytest.fail("killed"))
    with pytest.raises(pytest.fail.Exception):
        remote.opened("smoke").at.write("manifest.json", b"{}")
    assert [name.suffix for name in path.iterdir()] == [".new"]


def test_a_damaged_file_is_named_and_rebuild_mends_it(far, tmp_path, capsys):
    """Faults: what was damaged at the address is trained with; the mend pulls the same file again."""
    one, two = machine(tmp_path, "one"), machine(tmp_path, "two")
    one.need("base")
    at, where = one.store.remote.at, f"models/{one.store.folder(one.stages['base']).name}"
    at.write(f"{where}/numbers.txt", b"other\n")
    said = (rf"^base: \S*/smoke/{where}/numbers.txt is not what was pushed \(its digest differs\); "
            r"mend: `\S+ -m m2rl_core rebuild base --profile smoke`$")
    with pytest.raises(CorruptArtifact, match=said):
        two.need("base")
    assert not two.store.folder(two.stages["base"]).exists() and not list((tmp_path / "two/smoke").glob(".pull-*"))
    two.rebuild("base")
    assert machine(tmp_path, "three").need("base") and at.read(f"{where}/numbers.txt") == (
        one.path("base") / "numbers.txt").read_bytes()
    for name, content in ((f"{where}/files.json", b"[1"), (f"{where}/files.json", b'{"manifest.json": "1", "../x": "1"}')):
        at.write(name, content)
        with pytest.raises(CorruptArtifact, match="files.json is missing or not readable|manifest.json is not what was"):
            machine(tmp_path, "four").need("base")
    at.write(f"{where}/files.json", b'{"../../x": "1", "manifest.json": "1"}')
    with pytest.raises(CorruptArtifact, match="is to lie outside of its folder"):
        machine(tmp_path, "four").need("base")


# State ----------------------------------------------------------------------------------------------------

def test_another_machine_goes_on_from_the_copied_state(path, tmp_path, monkeypatch, capsys):
    """Faults: it begins anew; it goes on from half a checkpoint; it ends with other bytes; the state stays for ever."""
    monkeypatch.setenv("M2RL_STORE_MINUTES", "0")
    killed = process(tmp_path, "one", "base", die_at=5)
    assert killed.wait() == -9
    two = machine(tmp_path, "two")
    state = path / "models" / two.store.folder(two.stages["base"]).name / "state"
    assert (state / "files.json").is_file()
    capsys.readouterr()
    two.need("base")
    first = re.search(r"base · step (\d)/6", capsys.readouterr().out)
    assert 2 <= int(first[1]) <= 5 and not state.exists()
    monkeypatch.delenv("M2RL_STORE")
    alone = machine(tmp_path, "alone")
    alone.need("base")
    assert two.manifest("base")["digests"] == alone.manifest("base")["digests"]
    assert not list((tmp_path / "two" / "smoke").glob(".pu*"))


def test_the_state_with_more_work_in_it_is_taken(far, tmp_path):
    """Faults: a machine goes back to an old copy of its own; or it does not see that another one came further."""
    run = machine(tmp_path, "one")
    stage = run.stages["base"]
    where = run.store.where(stage)

    def begun(seconds_here, seconds_there):
        shutil.rmtree(tmp_path / "one", ignore_errors=True)
        for seconds, name in ((seconds_here, "here"), (seconds_there, "there")):
            folder = run.store.folder(stage) / "state" if name == "here" else tmp_path / f"copy-{seconds}"
            folder.mkdir(parents=True, exist_ok=True)
            (folder / "seconds").write_text(str(seconds))
            (folder / "who").write_text(name)
        run.store.remote.push_state(tmp_path / f"copy-{seconds_there}", where, seconds_there)
        return (run.store.begin(stage) / "state" / "who").read_text()

    assert begun(10.0, 20.0) == "there" and begun(30.0, 20.0) == "here" and begun(20.0, 20.0) == "here"


def test_a_damaged_state_costs_time_only(far, tmp_path, capsys):
    """Faults: a stage that can never be made again; or that goes on from another checkpoint in silence."""
    run = machine(tmp_path, "one")
    copy = tmp_path / "copy"
    copy.mkdir()
    (copy / "done.txt").write_text("1 0.5\n")
    where = run.store.where(run.stages["base"])
    run.store.remote.push_state(copy, where, 5.0)
    run.store.remote.at.write(f"{where}/state/{remote.sha256(copy / 'done.txt')}", b"1 0.7\n")
    run.need("base")
    said = capsys.readouterr().out
    assert re.search(r"^base: .*/state/\w{64} is not what was pushed .*; it goes on from what is on this machine\n"
                     "base · step 1/6", said)
    run.store.remote.at.write(f"{where}/state/files.json", b'{"seconds": 5.0, "fi')
    assert run.store.remote.state_seconds(where) == -1.0


def test_what_is_there_already_is_not_copied_again(path, tmp_path, monkeypatch):
    """Faults: every copy of a state sends all of it; files of old checkpoints fill the address."""
    there, copy, sent = remote.opened("smoke"), tmp_path / "copy", []
    put = there.at.put
    monkeypatch.setattr(there.at, "put", lambda file, name: (sent.append(file.name), put(file, name)))
    copy.mkdir()
    (copy / "along").write_text("kept")
    (copy / "step").write_text("1")
    there.push_state(copy, "models/x", 1.0)
    (copy / "step").write_text("2")
    there.push_state(copy, "models/x", 2.0)
    assert sent == ["along", "step", "step"] and len(list((path / "models/x/state").iterdir())) == 3
    there.pull_state("models/x", tmp_path / "found")
    assert {file.name: file.read_text() for file in (tmp_path / "found").iterdir()} == {"along": "kept", "step": "2"}


def test_copies_keep_their_pace_and_never_stop_the_work(path, tmp_path, monkeypatch, capsys):
    """Faults: an upload after each step of a training; one lost connection that ends it; a half-written checkpoint is sent."""
    state, said = tmp_path / "store" / "models" / "base-1" / "state", []
    state.mkdir(parents=True)
    there = remote.opened("smoke")
    monkeypatch.setenv("M2RL_STORE_MINUTES", "10")
    copies = remote.StateCopies(there, state, "models/base-1", said.append)
    (state / "step-1").write_text("1")
    copies.look()
    assert copies._thread is None
    copies.pace = 0
    (state / "step-2.partial").write_text("2")
    (state / "seconds").write_text("3.0")
    copies.look()
    copies.end()
    assert there.state_seconds("models/base-1") == 3.0 and not copies.snapshot.exists()
    assert set(json.loads((path / "models/base-1/state/files.json").read_text())["files"]) == {"step-1", "seconds"}
    thread = copies._thread
    (state / "seconds").write_text("4.0")
    copies.look()
    assert copies._thread is thread  # nothing new
    monkeypatch.setattr(there.at, "put", lambda *_: (_ for _ in ()).throw(address.RemoteError("no way")))
    (state / "step-3").write_text("3")
    copies.look()
    copies.end()
    assert said == ["models/base-1: its state stays on this machine for now: no way"]
    monkeypatch.setenv("M2RL_STORE_MINUTES", "often")
    with pytest.raises(StudyError, match="^M2RL_STORE_MINUTES='often': a number of minutes is needed$"):
        remote.pace()


def test_a_notebook_shows_what_another_machine_makes(path, tmp_path, monkeypatch):
    """Faults: a cell that says "nothing works on it" while a node does; a curve that waits for the end."""
    monkeypatch.setenv("M2RL_STORE_MINUTES", "0")
    maker, run = process(tmp_path, "one", "base", pause=1.0), machine(tmp_path, "two")
    while not [index for index in path.glob("models/base-*/state/files.json") if "progress.jsonl" in index.read_text()]:
        assert maker.poll() is None
        time.sleep(0.1)
    assert live.working(run, "base")
    shown = live.picture(run, "base", ["base"])
    assert re.search(r"base · step \d/6 · reward 0.\d", shown) and "<svg" in shown
    assert maker.wait() == 0 and live.missing(run, "base") == []


# Locks ----------------------------------------------------------------------------------------------------

def test_two_machines_do_not_make_the_same_stage(path, tmp_path):
    """Fault: two drivers on one address train the same model twice, and mix their files."""
    both = [process(tmp_path, name, "base", pause=0.8) for name in ("one", "two")]
    waited, made = sorted((each.communicate(timeout=60)[0] for each in both), key=lambda said: "step 1/6" in said)
    assert [each.returncode for each in both] == [0, 0] and not list(path.glob(".lock/*"))
    assert made.count("base · step 1/6") == 1 and "step" not in waited
    assert re.match(rf"waiting: process \d+ on \S+ works on base \(its mark is at {path}/.lock\)", waited)


def test_who_waited_looks_again(far, tmp_path, monkeypatch):
    """Fault: what another machine finished a moment ago is made again, because it was not there a moment before."""
    monkeypatch.setattr(remote, "FORGET", 1000.0)
    one, two = machine(tmp_path, "one"), machine(tmp_path, "two")
    assert not two.has("base")
    one.need("base")
    assert not two.has("base")
    with two.store.lock("base"):
        assert two.has("base")


def test_a_lost_machines_mark_is_void_and_a_living_ones_is_not(path, tmp_path, monkeypatch):
    """Faults: a lost machine holds its stage for ever; a living one's stage is taken because clocks differ."""
    at, said = remote.opened("smoke").at, []
    other = Mark("far", "base", "elsewhere", "0" * 12, 1, "0", False, "f" * 12)
    at.write(f".lock/{other.name}", b".")
    os.utime(path / ".lock" / other.name, (time.time() - 30,) * 2)
    monkeypatch.setattr(locks, "LOST", 20.0)
    with far_locks.hold(at, locks.hold(tmp_path / ".lock", "base"), "base", said.append):
        assert at.names(".lock") != [other.name] and len(at.names(".lock")) == 1
    os.utime(path.parent)
    at.write(f".lock/{other.name}", b".")
    threading.Timer(1.0, at.remove, (f".lock/{other.name}",)).start()
    began = time.monotonic()
    with far_locks.hold(at, locks.hold(tmp_path / ".lock", "base"), "base", said.append):
        assert time.monotonic() - began > 0.9
    assert len(said) == 1 and said[0].startswith("waiting: process 1 on elsewhere works on base")
    with far_locks.hold(at, locks.hold(tmp_path / ".lock", "sft"), "sft", said.append):
        assert len(said) == 1


def test_who_lost_its_mark_stops(path, tmp_path, monkeypatch):
    """Fault: a machine that was away for minutes goes on beside the one that took over."""
    monkeypatch.setattr(far_locks, "BEAT", 0.05)
    at = remote.opened("smoke").at
    with far_locks.hold(at, locks.hold(tmp_path / ".lock", "base"), "base", print) as lease:
        lease.check()
        at.remove(f".lock/{lease.mark.name}")
        lease._over.wait(0.5)
        with pytest.raises(LockLost, match=f"^base: {platform.node()} was not heard of at .*; it goes on there$"):
            lease.check()


# Addresses that are none ------------------------------------------------------------------------------------

class ReadOnly(LocalFileSystem):
    """A folder that may be read and not written, whoever asks."""

    protocol = "readonly"

    def pipe_file(self, path, *_, **__):
        raise PermissionError(13, "Access Denied", path)

    put_file = makedirs = mkdir = pipe_file

    @classmethod
    def _strip_protocol(cls, path):
        return super()._strip_protocol(path.removeprefix("readonly://"))


@pytest.mark.parametrize(("name", "said"), [
    ("s3://bucket/folder", "M2RL_STORE=s3://bucket/folder: s3:// needs a package that is not installed here: `pip install "
                           "s3fs`"),
    ("ftp://me:secret@127.0.0.1:1/x", r"M2RL_STORE: ftp://127.0.0.1:1/x/smoke cannot be reached \(ConnectionRefusedError: "
                                      r".*\): is the address right\?"),
    ("nonsense://x", "M2RL_STORE=nonsense://x is no address that fsspec knows .*: a path, or s3://bucket/folder, for example"),
    ("readonly:///tmp", r"M2RL_STORE: readonly:///tmp/smoke cannot be written \(PermissionError: .*Access Denied.*\): give "
                        "the right to write there"),
])
def test_an_address_that_cannot_be_used_is_one_line(name, said, tmp_path, monkeypatch, capsys):
    """Faults: a traceback; a password in it; an hour of training before it shows."""
    monkeypatch.setitem(sys.modules, "s3fs", None)
    fsspec.register_implementation("readonly", ReadOnly, clobber=True)
    monkeypatch.setenv("M2RL_STORE", name)
    monkeypatch.setenv("M2RL_ARTIFACTS", str(tmp_path))
    toy_study.runs.BUILDERS.update(dict.fromkeys(runs.BUILDERS, "toy_study:build"))
    assert main(["run", "base", "--profile", "smoke"]) == 2
    error = capsys.readouterr().err
    assert re.fullmatch(f"error: {said}\n", error) and "secret" not in error


def test_what_fails_once_is_tried_again(path, monkeypatch):
    """Fault: one dropped connection that ends a night's work; or rights that are asked for again and again."""
    at, asked = remote.opened("smoke").at, []

    def flaky(name, *_):
        asked.append(name)
        if len(asked) < 3:
            raise TimeoutError("slow")
        return b"x"

    monkeypatch.setattr(at.fs, "cat_file", flaky)
    assert at.read("x") == b"x" and len(asked) == 3
    monkeypatch.setattr(at.fs, "cat_file", lambda *_: (asked.append(1), (_ for _ in ()).throw(PermissionError("no"))))
    with pytest.raises(StudyError, match="cannot be read .PermissionError: no.: is it up, are the rights there"):
        at.read("x")
    assert len(asked) == 4


def test_a_dry_run_asks_the_address(path, tmp_path, monkeypatch):
    run = machine(tmp_path, "one")
    (told,) = dry.copies(run)
    assert (told.state, told.told) == ("here", f"{path} can be written to") and not list(path.iterdir())
    monkeypatch.setattr(run.store.remote.at.fs, "pipe_file", lambda *_: (_ for _ in ()).throw(PermissionError("no")))
    (told,) = dry.copies(run)
    assert told.state == "MISSING" and "cannot be written (PermissionError: no)" in told.told


def test_clean_says_what_stays(path, tmp_path, monkeypatch, capsys):
    monkeypatch.setenv("M2RL_ARTIFACTS", str(tmp_path / "one"))
    machine(tmp_path, "one").need("base")
    assert main(["clean", "--profile", "smoke"]) == 0
    assert capsys.readouterr().out.endswith(f"removed {tmp_path}/one/smoke; what is at {path} stays\n")


# On nodes -------------------------------------------------------------------------------------------------

def test_a_nodes_task_works_on_its_own_disk(path, tmp_path, monkeypatch):
    """Faults: a node writes to the driver's path; makes again what another one made; leaves its note; forgets its folder."""
    here = SimpleNamespace(get_node_id=lambda: "a-node")
    monkeypatch.setitem(sys.modules, "ray", SimpleNamespace(get_runtime_context=lambda: here))
    driver = machine(tmp_path, "driver")
    environment = {"M2RL_STORE": str(path.parent)}
    for disk, stage in (("a", "base"), ("b", "sft")):
        monkeypatch.setenv("M2RL_NODE_ARTIFACTS", str(tmp_path / disk))
        cluster.make(driver.profile, str(driver.root), stage, environment)
    assert set(digests(tmp_path / "a/smoke")) | set(digests(tmp_path / "b/smoke")) == set(digests(path))
    made = {name: (tmp_path / name / "smoke" / "models").iterdir() for name in ("a", "b")}
    assert [sorted(each.name.split("-")[0] for each in found) for found in made.values()] == [["base"], ["base", "sft"]]
    assert not (tmp_path / "driver").exists() and driver.missing("sft") == [] and not list((path / ".running").iterdir())
    monkeypatch.setattr(cluster, "LAG", 0.2)
    driver.store.remote.forget(driver.store.where(driver.stages["sft"]))
    shutil.rmtree(tmp_path / "b")
    with pytest.raises(ClusterError, match=f"rl-math: sft is made, but this node does not see it .* is {path} the same"):
        cluster.make(driver.profile, str(driver.root), "rl-math", environment)
    assert cluster._node_of(driver.store, "rl-math") == "a-node" and cluster._node_of(driver.store, "rl-if") == "none"


# With Ray -------------------------------------------------------------------------------------------------

@pytest.fixture(scope="module")
def apart(tmp_path_factory):
    """A cluster of two nodes that share no folder: each has a disk of its own, and the driver a third."""
    pytest.importorskip("ray")
    from ray.cluster_utils import Cluster
    disks = tmp_path_factory.mktemp("disks")
    with pytest.MonkeyPatch.context() as patch:
        for name, value in environment_in(Path("/none")).items():
            patch.setenv(name, value)
        nodes = Cluster()
        for name, options in (("a", {"include_dashboard": False}), ("b", {})):
            more(nodes, env_vars={"M2RL_NODE_ARTIFACTS": str(disks / name)}, **options)
        yield nodes, disks
        nodes.shutdown()


@pytest.fixture(scope="module")
def local(tmp_path_factory):
    """The store of one machine that made two experts."""
    folder = tmp_path_factory.mktemp("local")
    done = subprocess.run([sys.executable, "-m", "m2rl_core", "run", "rl-math,rl-agent", "--profile", "smoke"], cwd=folder,
                          env=environment_in(folder), capture_output=True, text=True)
    assert done.returncode == 0, done.stdout + done.stderr
    return folder / "artifacts" / "smoke"


@with_ray
def test_nodes_with_disks_of_their_own_make_what_one_machine_makes(apart, local, tmp_path):
    """Faults: a node that trains what another one has made; bytes that depend on where; lines of nodes that nobody sees."""
    nodes, disks = apart
    process = start(nodes, tmp_path, "run", "rl-math,rl-agent", "--profile", "smoke", M2RL_STORE=str(tmp_path / "far"))
    said = process.communicate(timeout=300)[0]
    assert process.returncode == 0, said[-4000:]
    wanted = digests(local)
    made = [digests(disks / name / "smoke") for name in ("a", "b")]
    assert len(wanted) == 4 and digests(tmp_path / "far" / "smoke") == wanted and made[0] | made[1] == wanted
    driver = digests(tmp_path / "artifacts" / "smoke")
    assert driver == {name: found for name, found in wanted.items() if name.startswith("rl-")}
    assert "rl-math · step 2/2" in said and "rl-agent · step 2/2" in said
    assert {path.name for path in (tmp_path / "far" / "smoke").iterdir()} == {".lock", ".running", "models"}


@with_ray
def test_another_node_goes_on_from_the_copied_checkpoint(apart, local, tmp_path):
    """Fault: what a killed worker had learned is lost with its node's disk."""
    nodes, disks = apart
    profile, said = long_profile(tmp_path, SimpleNamespace(store=local)), []
    process = start(nodes, tmp_path, "run", "rl-math", "--profile", str(profile), M2RL_STORE=str(tmp_path / "far"),
                    M2RL_STORE_MINUTES="0")
    try:
        index = "far/long/models/rl-math-*/state/files.json"
        while not [path for path in tmp_path.glob(index) if "step-" in path.read_text()]:
            said.append(process.stdout.readline())
            assert said[-1], "".join(said)
        first = next(name for name in ("a", "b") if list(disks.glob(f"{name}/long/models/rl-math-*")))
        kill_maker(disks / first / "long", "rl-math")
        read_until(process, "rl-math: WorkerCrashedError", said)
        while not (again := re.search(r"rl-math · step (\d+)/", said[-1])):
            said.append(process.stdout.readline())
            assert said[-1], "".join(said)
        assert int(again[1]) > 1, "".join(said)
        assert all(list(disks.glob(f"{name}/long/models/rl-math-*/state")) for name in ("a", "b"))
    finally:
        process.send_signal(signal.SIGINT)
        process.communicate(timeout=60)


@with_ray
def test_a_node_that_does_not_reach_the_address_is_named(apart, tmp_path, monkeypatch):
    """Fault: an hour of training whose result cannot leave its node."""
    import ray
    monkeypatch.setenv("M2RL_STORE", str(tmp_path / "far"))
    store = machine(tmp_path, "driver").store
    ray.init(address=apart[0].address, logging_level="ERROR", log_to_driver=False)
    try:
        nodes = [cluster.Node(node["NodeID"], node["NodeManagerAddress"], 2, 0) for node in ray.nodes() if node["Alive"]]
        cluster.check_nodes(ray, nodes, store)
        assert not list((tmp_path / "far" / "smoke").iterdir())
        look = cluster.look
        for there, said in ((str(tmp_path / "other"), "it must reach that address, and may write there"),
                            ("ftp://127.0.0.1:1/x", r"M2RL_STORE: ftp://127.0.0.1:1/x/smoke cannot be reached")):
            monkeypatch.setattr(cluster, "look", lambda _, token, node, there=there: look((there, "smoke"), token, node))
            with pytest.raises(ClusterError, match=rf"^node [\d.]+ does not share {tmp_path}/far/smoke with .*: {said}"):
                cluster.check_nodes(ray, nodes, store)
    finally:
        ray.shutdown()
