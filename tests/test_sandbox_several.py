"""Several SandboxFusion servers: real processes that share the programs, are killed, hang, and were never there."""
from __future__ import annotations

import signal
import subprocess
import sys
import threading
import time
from pathlib import Path

import pytest
import toy_server
from toy_server import Scripted

from m2rl_core import dry, post, sandbox
from m2rl_core.errors import StudyError
from m2rl_core.sandbox import Outcome, Program, fusion, several
from m2rl_core.sandbox.several import Several


@pytest.fixture(autouse=True)
def impatient(monkeypatch):
    monkeypatch.setattr(post, "PAUSE", 0.001)


@pytest.fixture
def serve(tmp_path):
    """serve(): a server's process, its `url` and name."""
    running = []

    def start():
        name = f"s{len(running)}"
        process = subprocess.Popen([sys.executable, str(Path(__file__).parent / "toy_fusion.py"), str(tmp_path / "log"), name],
                                   stdout=subprocess.PIPE, text=True)
        running.append(process)
        process.url, process.name = process.stdout.readline().strip(), name
        return process

    yield start
    toy_server.end(running)


def programs(count: int, code: str = "wait 0.05") -> list[Program]:
    return [Program(code, (f"{i}",)) for i in range(count)]


def said(count: int) -> list[Outcome]:
    return [Outcome((f"{i}\n",)) for i in range(count)]


def log(tmp_path) -> list[list[str]]:
    return [line.split(" ", 2) for line in (tmp_path / "log").read_text().splitlines()]


def test_servers_share_the_programs_and_none_has_more_than_its_bound(serve, tmp_path, monkeypatch):
    """Faults: one server does all; three callers at once send three times as much; an order mixed up."""
    monkeypatch.setattr(several, "AT_ONCE", 3)
    two = [serve(), serve()]
    monkeypatch.setenv("M2RL_SANDBOX", ", ".join(each.url for each in two))
    with sandbox.open_sandbox() as box:
        assert box.kind == "SandboxFusion" and box.about == f"SandboxFusion at {two[0].url}, {two[1].url}"
        found: list = [None] * 3
        callers = [threading.Thread(target=lambda k=k: found.__setitem__(k, box.run(programs(30)))) for k in range(3)]
        for each in callers:
            each.start()
        for each in callers:
            each.join()
    assert found == [said(30)] * 3
    now, most = {}, {}
    for what, who, _ in log(tmp_path):
        now[who] = now.get(who, 0) + (1 if what == "begin" else -1)
        most[who] = max(most.get(who, 0), now[who])
    assert most == {"s0": 3, "s1": 3}
    count = [sum(line[:2] == ["begin", who] for line in log(tmp_path)) for who in most]
    assert sum(count) == 92 and min(count) > 20  # and one each to see that it is there


def test_a_lost_servers_programs_go_to_the_others_and_all_lost_is_one_line(serve, tmp_path, monkeypatch):
    """Faults: a killed server ends a training, or scores its programs 0; a wait without an end where all are lost."""
    first, second = serve(), serve()
    with Several([first.url, second.url]) as box:
        threading.Timer(0.3, first.kill).start()
        assert box.run(programs(60, "wait 0.2")) == said(60)
        before = len(log(tmp_path))
        assert box.run(programs(4)) == said(4)
        assert {who for _, who, _ in log(tmp_path)[before:]} == {"s1"}
        second.kill()
        second.wait()
        told = rf"^all 2 servers of M2RL_SANDBOX are lost: {first.url}: \(1 attempts.*\).*; {second.url}: \(1 attempts"
        with pytest.raises(StudyError, match=told):
            box.run(programs(4))


def test_a_slow_servers_programs_go_to_the_others_and_it_may_come_back(serve, tmp_path, monkeypatch):
    """Faults: a server that hangs holds a training for ever; one that was away for a moment is never asked again."""
    monkeypatch.setattr(fusion, "GRACE", -8.0)  # with 5 to compile and 6 to run: three seconds
    first, second = serve(), serve()
    with Several([first.url, second.url]) as box:
        first.send_signal(signal.SIGSTOP)
        began = time.monotonic()
        assert box.run(programs(10)) == said(10) and time.monotonic() - began < 10
        first.send_signal(signal.SIGCONT)
        assert box.run(programs(3)) == said(3)
        monkeypatch.setattr(several, "AGAIN", 0.0)
        before = len(log(tmp_path))
        assert box.run(programs(40)) == said(40)
        assert {who for _, who, _ in log(tmp_path)[before:]} == {"s0", "s1"}
        monkeypatch.setattr(several, "AGAIN", 30.0)
        with pytest.raises(StudyError, match="^all 2 servers of M2RL_SANDBOX are lost"):
            box.run([Program("hang", ("",))])


def test_a_server_that_was_never_there_is_told_and_the_others_serve(serve, monkeypatch):
    """Faults: a wrong address among two that nobody sees; or that ends a run which could go on."""
    one = serve()
    monkeypatch.setenv("M2RL_SANDBOX", f"http://127.0.0.1:9,{one.url}")
    with pytest.warns(UserWarning, match="http://127.0.0.1:9/run_code cannot be reached .*; the others run its programs"):
        box = sandbox.open_sandbox()
    with box:
        assert box.run(programs(5)) == said(5)
    assert dry._sandbox(True).state == "MISSING" and "http://127.0.0.1:9 cannot be reached" in dry._sandbox(True).told
    with pytest.raises(StudyError, match="^all 2 servers of M2RL_SANDBOX are lost: http://127.0.0.1:9: .*; http://127.0.0.1"):
        Several(["http://127.0.0.1:9", "http://127.0.0.1:1"])
    with pytest.raises(StudyError, match="M2RL_SANDBOX='file:///x' is no address"):
        Several([one.url, "file:///x"])


def test_a_server_that_is_none_stops_at_once(serve):
    """Fault: an address of something else, whose refusals are taken for a lost server's."""
    with Scripted((404, {"detail": "no"})) as other, pytest.raises(StudyError, match="refuses with status 404"):
        Several([serve().url, other.url])
