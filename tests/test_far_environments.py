"""Environments on other machines: real servers on loopback that share the load, hang, die, and know another secret."""
from __future__ import annotations

import contextlib
import json
import os
import signal
import socket
import struct
import subprocess
import sys
import threading
import time

import pytest
import toy_server
from whole_study import ROOT

from m2rl_core import domains, dry, peers
from m2rl_core.domains import Row, UserSays, environments, far_environments, training_rows
from m2rl_core.domains.environment_server import Server, decoded, encoded
from m2rl_core.domains.far_line import Line, Refused
from m2rl_core.errors import StudyError

SECRET = "a secret of the tests alone"
OWN = """
import os, time
from m2rl_core.domains import UserSays

LOG = {log!r}

def rows(split, n, seed):
    return [{{"prompt": f"Say {{i}}", "number": i}} for i in range(n)]

def verify(rows, answers):
    return [1.0 for _ in rows]

class Episode:
    def __init__(self):
        self.steps = 0
    def step(self, text):
        self.steps += 1
        with open(LOG, "a") as log:
            log.write(f"begin {{os.getppid()}} {{text}}\\n")
        if text == "hang":
            time.sleep(1000)
        if text.startswith("wait"):
            time.sleep(float(text.split()[1]))
        with open(LOG, "a") as log:
            log.write(f"end {{os.getppid()}} {{text}}\\n")
        if text == "raise":
            raise OSError("no disk")
        return None if text == "over" else [UserSays("yes")] if text == "user" else [f"step {{self.steps}}: {{text}}"]

def environment(row):
    return Episode()

STEP_SECONDS = 2
"""


@pytest.fixture(autouse=True)
def secret(monkeypatch):
    monkeypatch.setenv("M2RL_SECRET", SECRET)
    monkeypatch.setattr(far_environments, "_servers", {})


@pytest.fixture
def talk(tmp_path, monkeypatch):
    """A row of a domain of one's own, whose environment does what it is told and writes down who was in it when."""
    file = tmp_path / "talk.py"
    file.write_text(OWN.format(log=str(tmp_path / "log")))
    monkeypatch.setitem(domains.OWN, "talk", str(file))
    return training_rows("talk", "rl", 1, 0)[0]


@pytest.fixture
def serve(tmp_path, talk):
    """serve(*options): a server's process and its address."""
    running = []

    def start(*options, word=SECRET):
        copy = tmp_path / f"server-{len(running)}"  # a file of the same content elsewhere
        copy.mkdir()
        (copy / "talk.py").write_bytes((tmp_path / "talk.py").read_bytes())
        process = subprocess.Popen([sys.executable, "-m", "m2rl_core.domains.environment_server", "--port", "0", "--domain",
                                    str(copy / "talk.py"), *options], stdout=subprocess.PIPE, text=True, cwd=ROOT,
                                   env=os.environ | {"M2RL_SECRET": word})
        running.append(process)
        process.address = process.stdout.readline().split()[2].rstrip(",")
        return process

    yield start
    toy_server.end(running)


@pytest.fixture
def use(monkeypatch):
    return lambda *processes: monkeypatch.setenv("M2RL_ENVIRONMENTS", ",".join(each.address for each in processes))


def begun(tmp_path):
    """Which server began which step."""
    lines = (tmp_path / "log").read_text().splitlines()
    return [tuple(line.split(" ", 2)[1:]) for line in lines if line.startswith("begin")]


def test_an_episode_elsewhere_is_one_here(talk, serve, use):
    """Faults: an end told as a fault; the user's words come back as a tool's; a fault of one episode that ends the run."""
    use(serve("--processes", "2"))
    told, odd, over = (environments.open_environment(talk) for _ in range(3))
    assert isinstance(told, far_environments.Far)
    assert told.step("a") == ["step 1: a"] and told.step("b") == ["step 2: b"]
    (said,) = told.step("user")
    assert said == "yes" and isinstance(said, UserSays)
    assert odd.step("raise") is None and odd.failed == "environment failed: OSError: no disk"
    assert over.step("over") is None and over.failed == ""
    assert decoded(json.loads(json.dumps(encoded([UserSays("x"), "y"])))) == ["x", "y"] and encoded(None) is None


def test_a_step_that_hangs_costs_its_own_rollout(talk, serve, use):
    """Faults: a limit that holds on this machine alone; the others of its process lost, or begun anew in silence."""
    use(serve("--processes", "1"))
    bad, *others = [environments.open_environment(talk) for _ in range(3)]
    assert environments.step_all([bad, *others], ["a"] * 3) == [["step 1: a"]] * 3
    began = time.monotonic()
    assert bad.step("hang") is None and bad.failed == "environment killed after 2 s" and time.monotonic() - began < 15
    assert environments.step_all(others, ["b", "c"]) == [["step 2: b"], ["step 2: c"]]


def test_two_servers_share_the_load_and_none_has_more_than_its_bound(talk, serve, use, tmp_path):
    """Faults: one server does all; thirty steps at once in a server for two; a reply given to another rollout."""
    two = [serve("--processes", "2") for _ in range(2)]
    use(*two)
    episodes = [environments.open_environment(talk) for _ in range(24)]
    asked = [f"wait 0.1 {i}" for i in range(24)]
    assert environments.step_all(episodes, asked) == [[f"step 1: {text}"] for text in asked]
    callers = [threading.Thread(target=environments.step_all, args=(episodes[i::3], ["wait 0.1"] * 8)) for i in range(3)]
    for each in callers:
        each.start()
    for each in callers:
        each.join()
    inside, most = {}, {}
    for line in (tmp_path / "log").read_text().splitlines():
        what, who, _ = line.split(" ", 2)
        inside[who] = inside.get(who, 0) + (1 if what == "begin" else -1)
        most[who] = max(most.get(who, 0), inside[who])
    assert most == {str(each.pid): 2 for each in two}
    count = [sum(who == str(each.pid) for who, _ in begun(tmp_path)) for each in two]
    assert count == [24, 24]


def test_a_lost_servers_episodes_are_played_again_at_the_other(talk, serve, use, tmp_path):
    """Faults: a killed server ends the training; an episode that begins anew in silence; one that goes on in another world."""
    first, second = serve("--processes", "2"), serve("--processes", "2")
    use(first, second)
    episodes = [environments.open_environment(talk) for _ in range(8)]
    assert environments.step_all(episodes, ["a"] * 8) == [["step 1: a"]] * 8
    threading.Timer(0.4, first.kill).start()
    assert environments.step_all(episodes, ["wait 1"] * 8) == [["step 2: wait 1"]] * 8
    assert environments.step_all(episodes, ["c"] * 8) == [["step 3: c"]] * 8
    assert {who for who, text in begun(tmp_path) if text == "c"} == {str(second.pid)}
    second.kill()
    second.wait()
    with pytest.raises(StudyError, match=rf"^all servers of M2RL_ENVIRONMENTS are lost: {first.address} \(.+\); "
                                         rf"{second.address} \(.+\): do they run, with the same secret\?$"):
        environments.step_all(episodes, ["d"] * 8)


def test_a_server_that_falls_silent_is_lost_and_may_come_back(talk, serve, use, monkeypatch, tmp_path):
    """Faults: a machine that hangs holds a training for ever; a server that was started again is never asked."""
    monkeypatch.setattr(far_environments, "SILENCE", 4.0)
    first, second = serve("--processes", "1"), serve("--processes", "1")
    use(first, second)
    episodes = [environments.open_environment(talk) for _ in range(2)]
    assert environments.step_all(episodes, ["a"] * 2) == [["step 1: a"]] * 2
    first.send_signal(signal.SIGSTOP)
    began = time.monotonic()
    assert environments.step_all(episodes, ["b"] * 2) == [["step 2: b"]] * 2 and time.monotonic() - began < 12
    first.send_signal(signal.SIGCONT)
    monkeypatch.setattr(far_environments, "AGAIN", 0.0)
    servers = far_environments.servers()
    while any(server.why for server in servers.all):
        environments.open_environment(talk).step("look")
        time.sleep(0.1)
    more = [environments.open_environment(talk) for _ in range(2)]
    assert environments.step_all(more, ["back"] * 2) == [["step 1: back"]] * 2
    assert {who for who, text in begun(tmp_path) if text == "back"} == {str(first.pid), str(second.pid)}


def test_an_episode_that_replies_something_else_is_not_taken_for_the_same(talk, serve, use):
    first, second = serve("--processes", "1"), serve("--processes", "1")
    use(first, second)
    episode = environments.open_environment(talk)
    assert episode.step("a") == ["step 1: a"]
    episode.past[0] = ("a", ["step 1: b"])
    lost = first if episode.at["lane"].server.address == first.address else second
    lost.kill()
    assert episode.step("c") is None and episode.failed == environments.PLAYED_OTHER


def test_episodes_that_nobody_holds_are_forgotten_and_old_ones_played_again(talk, serve, use, monkeypatch, tmp_path):
    """Faults: the tables of every rollout stay in a server's memory; an episode that was dropped for room is lost."""
    monkeypatch.setattr(far_environments, "KEPT", 2)
    use(serve("--processes", "1"))
    episodes = [environments.open_environment(talk) for _ in range(4)]
    for episode in episodes:
        assert episode.step("a") == ["step 1: a"]
    lane = episodes[0].at["lane"]
    assert list(lane.known) == [episode.number for episode in episodes[2:]]
    assert episodes[0].step("b") == ["step 2: b"]  # played again
    number = episodes[0].number
    del episode, episodes[0]
    assert number not in lane.known and number in lane.gone
    episodes[-1].step("c")
    assert number not in lane.gone


# Who may connect ----------------------------------------------------------------------------------------

def test_another_secret_is_refused_in_one_line(talk, serve, use, monkeypatch):
    """Faults: a server that plays for anybody; a client that tells anybody; a secret in a message."""
    use(serve(word="quite another secret"))
    with pytest.raises(StudyError, match=r"^all servers of M2RL_ENVIRONMENTS are lost: \S+ \(it has another secret\): do"):
        environments.open_environment(talk).step("a")
    monkeypatch.setenv("M2RL_SECRET", "short")
    with pytest.raises(StudyError, match="need a secret of 16 characters or more") as caught:
        peers.secret()
    assert "short" not in str(caught.value)
    command = [sys.executable, "-m", "m2rl_core.domains.environment_server"]
    done = subprocess.run(command, capture_output=True, text=True, cwd=ROOT)
    assert done.returncode == 1 and done.stderr.startswith("error: programs on other machines need a secret of 16")


def test_a_secret_may_lie_in_a_file(tmp_path, monkeypatch):
    (tmp_path / "word").write_text(f"{SECRET} too\n")
    monkeypatch.setenv("M2RL_SECRET_FILE", str(tmp_path / "word"))
    assert peers.secret() == f"{SECRET} too"
    monkeypatch.setenv("M2RL_SECRET_FILE", str(tmp_path / "none"))
    with pytest.raises(StudyError, match="^M2RL_SECRET_FILE: .*none cannot be read"):
        peers.secret()


@pytest.fixture
def server(talk):
    """One in this process."""
    one = Server("127.0.0.1", 0, SECRET)
    threading.Thread(target=one.serve, daemon=True).start()
    yield one
    one.close()


def connected(server):
    host, port = server.address.split(":")
    return socket.create_connection((host, int(port)), 5)


@pytest.mark.parametrize("said", [b"GET / HTTP/1.1\r\n\r\n", struct.pack(">I", 2**31) + b"x", struct.pack(">I", 4) + b"null",
                                  struct.pack(">I", 12) + b'{"nonce": 3}', struct.pack(">I", 2) + b"\x80\x04"])
def test_strangers_get_nothing(server, said):
    """Faults: gigabytes read of a stranger; a pickle that is loaded; a server that ends with a stranger's nonsense."""
    with connected(server) as sock:
        sock.sendall(said)
        told = b""
        with contextlib.suppress(ConnectionResetError):
            while part := sock.recv(1000):
                told += part
    assert b"code" not in told and len(told) < 200
    line = Line(connected(server))
    line.greet(SECRET, server=False)
    assert line.receive(10)["at_once"] >= 1
    line.close()


def test_no_message_is_changed_repeated_or_left_out():
    """Faults: somebody between the two adds a step, or gives an old reply for a new one."""
    near, far = socket.socketpair()
    ends = []
    for sock in (near, far):
        line = Line.__new__(Line)
        line.sock, line.key, line.sent, line.received = sock, b"k" * 32, 0, 0
        ends.append(line)
    client, server = ends
    client.mine, client.theirs, server.mine, server.theirs = b"client", b"server", b"server", b"client"
    client.send({"a": 1})
    assert server.receive(1) == {"a": 1}
    data = b'{"a": 1}'
    wrong = [client._mark(*who, data) for who in ((b"client", 0), (b"server", 1), (b"client", 2))]
    for forged in (*wrong, b"0" * 32):
        near.sendall(struct.pack(">I", len(data)) + forged + data)
        with pytest.raises(Refused, match="^a message was changed on its way$"):
            server.receive(1)
    near.sendall(struct.pack(">I", len(data)) + client._mark(b"client", 1, data) + data)
    assert server.receive(1) == {"a": 1}


@pytest.mark.parametrize(("home", "said"), [
    ("os", "has no os of that content"), ("m2rl_core.jobs.cluster", "has no m2rl_core.jobs.cluster of that content"),
    ("/etc/passwd.py?0000000000000000", "has no /etc/passwd.py of that content: start it with --domain and the same file"),
    ("m2rl_core.domains..os", "has no m2rl_core.domains..os of that content"),
    ("toy_environment", "has no toy_environment of that content"),
])
def test_nothing_but_the_projects_modules_and_given_files_is_loaded(server, monkeypatch, home, said):
    """Fault: whoever knows the secret runs any module of that machine."""
    monkeypatch.setenv("M2RL_ENVIRONMENTS", server.address)
    with pytest.raises(StudyError, match=rf"^environments at {server.address}: it {said}"):
        far_environments.Far(home, Row("x", "talk", "", "", (), {}), 2.0).step("a")


def test_other_code_and_wrong_addresses_are_named(server, monkeypatch, talk):
    """Faults: replies of last month's environments in today's training; a wait without an end; a traceback."""
    server.code = "other"
    monkeypatch.setenv("M2RL_ENVIRONMENTS", server.address)
    with pytest.raises(StudyError, match=rf"^the environments at {server.address} are of other code .files other, here"):
        environments.open_environment(talk).step("a")
    for name, said in (("nowhere", "'nowhere' is no address"), (":7", "':7' is no address"),
                       ("127.0.0.1:1", r"all servers of M2RL_ENVIRONMENTS are lost: 127.0.0.1:1 \(.*refused")):
        monkeypatch.setenv("M2RL_ENVIRONMENTS", name)
        with pytest.raises(StudyError, match=said):
            environments.open_environment(talk).step("a")
        assert [line.state for line in dry._environments() if line] == ["MISSING"] if name == "127.0.0.1:1" else True
    with pytest.raises(StudyError, match="cannot be served .*--port takes another"):
        Server("127.0.0.1", int(server.address.split(":")[1]), SECRET)


def test_a_row_that_json_cannot_carry_is_named(monkeypatch):
    with pytest.raises(StudyError, match="^row 'x' holds what JSON cannot, so it cannot travel: unset M2RL_ENVIRONMENTS$"):
        far_environments.Far("m2rl_core.domains.agent", Row("x", "agent", "", "", (), {"pair": (1, 2)}), 2.0)


def test_one_server_that_is_not_there_is_told_and_the_other_one_serves(server, monkeypatch, talk):
    monkeypatch.setenv("M2RL_ENVIRONMENTS", f"127.0.0.1:1,{server.address}")
    with pytest.warns(UserWarning, match="127.0.0.1:1 is lost .*; the others play its episodes"):
        servers = far_environments.servers()
    assert [bool(each.why) for each in servers.all] == [True, False]
    assert [line.state for line in dry._environments()] == ["MISSING", "here"]
    row = next(row for row in training_rows("agent", "rl", 40, 1) if row.truth["kind"] == "multi_turn")
    episode = far_environments.Far("m2rl_core.domains.agent", row, 5.0)
    turns = [t["content"].split("</think>")[1] for t in domains.module("agent").respond(row) if t["role"] == "assistant"]
    assert episode.step(turns[0]) == environments.open_environment(row).step(turns[0])
