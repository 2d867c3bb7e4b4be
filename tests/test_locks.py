"""Locks between machines: processes that believe to be on other machines, and share nothing but a folder.

`python tests/test_locks.py FOLDER MACHINE STAGE SECONDS [TURNS]` holds the lock there, as the process of another machine.
"""
from __future__ import annotations

import fcntl
import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from m2rl_core.jobs import locks
from m2rl_core.jobs.locks import LockLost, Mark, hold, marks

ROOT = Path(__file__).resolve().parent.parent


def elsewhere(folder: Path, machine: str, stage: str, seconds: float, turns: int = 1) -> subprocess.Popen:
    return subprocess.Popen([sys.executable, __file__, str(folder), machine, stage, str(seconds), str(turns)], text=True,
                            env={**os.environ, "PYTHONPATH": str(ROOT)}, stdout=subprocess.PIPE, stderr=subprocess.STDOUT)


def holding(process: subprocess.Popen) -> subprocess.Popen:
    assert process.stdout.readline() == "holds\n"
    return process


@pytest.fixture
def hasty(monkeypatch):
    """A second without a touch is enough to be lost."""
    monkeypatch.setattr(locks, "LOST", 1.5)


def test_another_machines_stage_is_waited_for(tmp_path):
    """Catches two trainers of one stage where flock ends at the machine: no place is taken here, marks alone decide."""
    other, told = holding(elsewhere(tmp_path, "node7", "rl-math", 1.0)), []
    with hold(tmp_path / ".lock", "rl-if", told.append, count=0):  # another stage is free at once
        assert not told and {mark.stage for mark in marks(tmp_path / ".lock")} == {"rl-math", "rl-if"}
    with hold(tmp_path / ".lock", "rl-math", told.append, count=0):
        assert other.poll() is not None or "over" in other.stdout.read()
    assert told == [f"waiting: process {other.pid} on {locks.platform.node()} works on rl-math"]
    assert other.wait() == 0 and not list(tmp_path.glob(".lock,*"))


def test_the_whole_store_is_held_against_other_machines(tmp_path):
    """Catches `clean` on one machine under a trainer on another."""
    other, told = holding(elsewhere(tmp_path, "node7", "rl-math", 0.7)), []
    with hold(tmp_path / ".lock", "clean", told.append, alone=True):
        assert other.wait() == 0 and "works on rl-math" in told[0]
        late = elsewhere(tmp_path, "node8", "rl-if", 0)
        time.sleep(0.8)
        assert late.poll() is None
    assert late.wait(timeout=30) == 0


def test_a_lost_machines_lock_is_taken_over_after_its_time_and_not_before(tmp_path, hasty, monkeypatch):
    monkeypatch.setattr(locks, "NOTICE", 0.0)
    other = holding(elsewhere(tmp_path, "node7", "rl-math", 60))
    start = time.monotonic()
    with pytest.raises(InterruptedError):
        with hold(tmp_path / ".lock", "rl-math", lambda text: time.monotonic() - start > 3 and interrupted(), count=0):
            pass  # it lives, so it is waited for, however long
    other.kill()
    other.wait()
    start = time.monotonic()
    with hold(tmp_path / ".lock", "rl-math", count=0):
        assert 1.0 < time.monotonic() - start < 10
        assert [mark.pid for mark in marks(tmp_path / ".lock")] == [os.getpid()]


def interrupted():
    raise InterruptedError


def test_who_was_taken_for_lost_notices_when_it_comes_back(tmp_path, hasty):
    """Catches two trainers that write into one folder after a machine slept."""
    other = holding(elsewhere(tmp_path, "node7", "rl-math", 60))
    other.send_signal(signal.SIGSTOP)
    with hold(tmp_path / ".lock", "rl-math", count=0) as lease:
        lease.check()
        other.send_signal(signal.SIGCONT)
        text, _ = other.communicate(timeout=30)
        assert "LockLost: rl-math: " in text and "another machine took over" in text
        lease.check()
        lease.path.unlink()
        with pytest.raises(LockLost):
            lease.check()


def test_a_killed_process_of_this_machine_is_known_to_be_gone_at_once(tmp_path):
    other = holding(elsewhere(tmp_path, "", "rl-math", 60))
    assert [mark.pid for mark in marks(tmp_path / ".lock")] == [other.pid]
    other.kill()
    start = time.monotonic()
    with hold(tmp_path / ".lock", "rl-math", count=0):
        assert time.monotonic() - start < 5
    other.wait()


def test_a_flock_that_outlived_its_machine_is_left_behind(tmp_path, hasty):
    """As on file servers that wait for a lost machine to come back: the lock's file is new, so nobody has locked it."""
    path = tmp_path / ".lock"
    kept = os.open(path, os.O_RDWR | os.O_CREAT)
    fcntl.flock(kept, fcntl.LOCK_EX)
    who = {"pid": 1, "command": "train", "stage": "rl-math", "since": "10:00:00", "machine": "node7"}
    os.pwrite(kept, json.dumps(who).encode(), 0)
    (tmp_path / Mark(".lock", "rl-math", "node7", "node7", 1, "0", False, "ab").name).touch()
    with hold(path, "rl-math", count=2):
        assert json.loads(path.read_text())["pid"] == os.getpid()
    os.close(kept)


def test_a_file_system_without_flock_is_no_error(tmp_path, monkeypatch):
    def flock(*_):
        raise OSError(locks.errno.ENOLCK, "No locks available")
    monkeypatch.setattr(locks.fcntl, "flock", flock)
    with hold(tmp_path / ".lock", "rl-math", count=2):
        with pytest.raises(InterruptedError):
            with hold(tmp_path / ".lock", "rl-math", lambda _: interrupted(), count=2):
                pass


def test_never_two_at_once(tmp_path):
    """Six machines, five turns each at one stage: every turn makes a file that only one may make, and removes it."""
    others = [elsewhere(tmp_path, f"node{i}", "rl-math", 0.01, 5) for i in range(6)]
    assert [(other.wait(timeout=120), other.stdout.read().count("over")) for other in others] == [(0, 5)] * 6


def test_marks_by_hand(tmp_path):
    mark = Mark(".lock", "rl-math@2, set aside", "a,b", "0123", 7, "99", True, "ef")
    assert Mark.read(mark.name) == mark and len(mark.name.split(",")) == 8 and Mark.read(".lock-1") is None
    other = Mark(".lock", "rl-if", "c", "4567", 8, "0", False, "ef")
    assert mark.excludes(other) and other.excludes(mark)
    assert not other.excludes(Mark(".lock", "rl-math", "c", "4567", 8, "0", False, ""))


if __name__ == "__main__":
    folder, machine, stage, seconds, turns = Path(sys.argv[1]), sys.argv[2], sys.argv[3], float(sys.argv[4]), int(sys.argv[5])
    locks.BEAT = 0.2
    if machine:
        locks.machine_id = lambda: machine
    for _ in range(turns):
        with hold(folder / ".lock", stage, lambda _: None, count=0) as lease:
            print("holds", flush=True)
            (folder / "only one").open("x").close()
            end = time.monotonic() + seconds
            while time.monotonic() < end:
                time.sleep(0.05)
                lease.check()
            (folder / "only one").unlink()
        print("over", flush=True)
