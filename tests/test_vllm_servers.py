"""vLLM beside several trainers' ranks and behind TCP: the same trajectories, and what happens when a server is lost.

Real workers are few, as each takes half a minute to start: two servers and one local one for the module, two for ranks.
"""
from __future__ import annotations

import contextlib
import dataclasses
import os
import signal
import socket
import subprocess
import sys
import threading
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest
import torch
import toy_policy
from safetensors.torch import load_file
from test_ranks import HOME, PARTS, environment, launch
from test_vllm import NEAR, SPEC, draw, mismatch

from m2rl_core import dry, peers
from m2rl_core.engines import server as servers
from m2rl_core.engines import vllm_engine, vllm_link, vllm_wire
from m2rl_core.engines.vllm_engine import VllmEngine
from m2rl_core.engines.vllm_link import Remote, described
from m2rl_core.errors import StudyError
from m2rl_core.models import policy as policies
from m2rl_core.profile import load_profile
from m2rl_core.training.trainer import read_lines

pytestmark = pytest.mark.skipif(sys.platform != "linux", reason="vLLM runs on Linux")
SECRET = "never say this aloud"
STAGE = "rl-multi"


@pytest.fixture(autouse=True)
def known(monkeypatch):
    monkeypatch.setenv("M2RL_SECRET", SECRET)
    monkeypatch.delenv("M2RL_VLLM", raising=False)
    monkeypatch.setattr(vllm_wire, "SEEN", {})


@pytest.fixture(scope="module")
def toy(words):
    return toy_policy.make(words, spec=SPEC)


@pytest.fixture(scope="module")
def root(tmp_path_factory, toy) -> Path:
    root = tmp_path_factory.mktemp("servers")
    policies.save(toy, root / "models" / "sft")
    return root


class Started:
    """A server as a user starts it."""

    def __init__(self, **settings: str):
        self.process = subprocess.Popen(
            [sys.executable, "-m", "m2rl_core.engines.server", "--port", "0", "--threads", "1"], cwd=HOME, text=True,
            stdout=subprocess.PIPE, env=environment(**{"M2RL_SECRET": SECRET, **settings}))
        self.said = self.process.stdout.readline()
        self.address = self.said.split(" at ")[1].split(",")[0]

    def worker(self) -> int | None:
        """The process id of its vLLM."""
        for task in Path(f"/proc/{self.process.pid}/task").iterdir():
            with contextlib.suppress(FileNotFoundError):  # the thread has ended since
                for child in (task / "children").read_text().split():
                    return int(child)
        return None


@pytest.fixture(scope="module")
def pair(root):
    """Two servers on one machine."""
    with ThreadPoolExecutor(2) as pool:
        both = list(pool.map(lambda _: Started(), range(2)))
    yield both
    for one in both:
        one.process.send_signal(signal.SIGCONT)
        one.process.terminate()
        one.process.wait(30)


def trained(n: int, root: Path, folder: Path, **settings: str) -> None:
    done = launch(n, root, STAGE, folder, TOY_ENGINE="vllm", **{"M2RL_SECRET": SECRET, **settings})
    assert done.returncode == 0, done.stderr


@pytest.fixture(scope="module")
def local(root, pair) -> Path:
    """GRPO steps by one process with a vLLM of its own; at the same time the two servers start theirs, by the same steps."""
    addresses = ",".join(one.address for one in pair)
    with ThreadPoolExecutor(2) as pool:
        for run in [pool.submit(trained, 1, root, root / "local"),
                    pool.submit(trained, 1, root, root / "served", M2RL_VLLM=addresses)]:
            run.result()
    return root / "local" / STAGE / "out"


def assert_same(wanted: Path, found: Path, root: Path) -> None:
    """Equal text, rewards and accuracy; log-probs of vLLM differ by rounding with who shares a batch, and all that hangs
    on them."""
    for name in ("rollouts.jsonl", "along.parquet", "blend.jsonl"):
        if (wanted / name).exists():
            assert (found / name).read_bytes() == (wanted / name).read_bytes(), name
    before = load_file(root / "models" / "sft" / "model.safetensors")
    a, b = (load_file(path / "model.safetensors") for path in (wanted, found))
    moved = max(float((a[n] - before[n]).abs().max()) for n in a)
    assert moved > 1e-4 and max(float((a[n] - b[n]).abs().max()) for n in a) < 0.05 * moved
    mine, its = (read_lines(path / "metrics.jsonl") for path in (wanted, found))
    assert len(mine) == len(its) == 3
    for x, y in zip(mine, its, strict=True):
        assert x.keys() == y.keys() and 0 < y["mismatch"] < NEAR
        for name in x:
            assert y[name] == pytest.approx(x[name], rel=1e-3, abs=NEAR if "mismatch" in name else 1e-5), (x["step"], name)


# ---- the same trajectory, whoever samples

def test_two_servers_give_what_a_local_worker_gives(local, root):
    """Faults: weights that lose their type or place on the wire, come to one server alone, or are those of the step before;
    answers in another order; other draws over TCP."""
    assert_same(local, root / "served" / STAGE / "out", root)


def test_two_ranks_with_a_worker_each_give_what_one_process_gives(local, root, tmp_path):
    """Faults: both ranks with the same draws, or with those of the first rows; a worker that takes itself for a rank of
    the launch and waits for the others; whole weights that one of the workers does not get."""
    trained(2, root, tmp_path)
    assert_same(local, tmp_path / STAGE / "out", root)


def test_two_ranks_ask_the_servers_once(local, root, tmp_path, pair):
    """Faults: every rank asks for itself and the second is refused; a rank that learns from other rollouts; rank 0 alone
    puts together the weights of a model in parts. The servers have kept their workers: nothing is started."""
    before = [one.worker() for one in pair]
    trained(2, root, tmp_path, M2RL_VLLM=",".join(one.address for one in pair), **PARTS)
    assert_same(local, tmp_path / STAGE / "out", root)
    assert [one.worker() for one in pair] == before and None not in before


def test_weights_change_in_place_and_one_trainer_is_served(local, toy, toy_rows, pair):
    """Faults: packed or cached parts of the old weights; a worker started anew for new weights; a second trainer that puts
    its weights under the first one's rollouts; a server that stays taken; an engine that one thread alone can use."""
    before, moved = [one.worker() for one in pair], toy_policy.clone(toy)
    with VllmEngine(1, servers=[one.address for one in pair]) as engine:
        first = draw(engine, moved, toy_rows[:4])
        for w in moved.weights.values():
            w.mul_(1.1)
        with ThreadPoolExecutor(1) as pool:
            found = pool.submit(draw, engine, moved, toy_rows[:4]).result()
        assert mismatch(moved, found) < NEAR < 0.05 < mismatch(moved, first)
        assert max(float((a - b).abs().max()) for a, b in zip(
            engine.logprobs(moved, found), [torch.tensor(r.logprobs)[torch.tensor(r.sampled)] for r in found],
            strict=True)) < NEAR
        with pytest.raises(StudyError) as refused:
            draw(VllmEngine(1, servers=[pair[0].address]), toy, toy_rows[:1])
    assert f"the vLLM server {pair[0].address}: it serves another trainer (process {os.getpid()} on " in str(refused.value)
    with VllmEngine(1, servers=[pair[0].address]) as engine:
        assert mismatch(toy, draw(engine, toy, toy_rows[:1])) < NEAR
    assert [one.worker() for one in pair] == before
    profile = dataclasses.replace(load_profile("smoke"), engine="vllm", vllm=dataclasses.replace(
        load_profile("smoke").vllm, servers=(pair[0].address, "127.0.0.1:1")))
    lines = list(dry._vllm(profile))
    assert [line.state for line in lines] == [dry.HERE, dry.MISSING] and lines[0].told == vllm_engine.version()


def test_a_lost_servers_share_goes_to_the_other_once(local, toy, toy_rows, pair, capsys, monkeypatch):
    """Faults: an answer that is waited for in vain; rows that get lost with their server, or other draws for them; a run
    that goes on and on with ever fewer; a loss that does not say who; a server that goes on computing for nobody."""
    with VllmEngine(1, servers=[one.address for one in pair]) as engine:
        wanted = draw(engine, toy, toy_rows, n=8, max_new_tokens=120)
        threading.Timer(0.2, os.kill, (pair[1].worker(), signal.SIGKILL)).start()
        found = draw(engine, toy, toy_rows, n=8, max_new_tokens=120)
        assert [r.tokens for r in found] == [r.tokens for r in wanted] and mismatch(toy, found) < NEAR
        said = capsys.readouterr().out
        assert said.count(f"the vLLM server {pair[1].address} is lost (it ended with status -9; ") == 1
        assert "its share goes to the other 1" in said
        engine.links[0].wire.wait(0.5)
        worker = pair[0].worker()
        pair[0].process.send_signal(signal.SIGSTOP)
        with pytest.raises(StudyError) as caught:
            draw(engine, toy, toy_rows, n=8, max_new_tokens=120)
    assert str(caught.value).startswith(f"the vLLM server {pair[0].address} is lost: it did not answer within 0.5 s (M2RL_V")
    assert "it is the second one" in str(caught.value) and "\n" not in str(caught.value) and not engine.links
    pair[0].process.send_signal(signal.SIGCONT)  # it reads the question of a trainer that has hung up
    until(lambda: pair[0].worker() != worker)
    assert pair[0].process.poll() is None


def _claim(address: str, toy) -> bool:
    """Whether the server has a place, now that it was left in haste."""
    with contextlib.suppress(StudyError):
        Remote(address, described(toy)).end()
        return True
    return False


def until(true, seconds: float = 60) -> None:
    end = time.monotonic() + seconds
    while not true():
        assert time.monotonic() < end
        time.sleep(0.1)


# ---- who is let in: no worker is needed to be refused

@pytest.fixture
def door(monkeypatch):
    """A server in this process, without a vLLM; returns the function that opens one more."""
    def wait(self, wire, model):
        wire.send(about="nothing")
        while wire.file.read(2**16):  # whatever is asked
            pass
    monkeypatch.setattr(servers.Server, "_work", wait)
    opened = []

    def open_(vllm="vllm 0.32.0", key=SECRET):
        listener = servers._listen("127.0.0.1", 0)
        opened.append(listener)
        served = servers.Server(key.encode(), vllm, Path(sys.executable), 1, 0.5, 1)

        def serve():
            with contextlib.suppress(OSError):
                served.serve(listener)
        threading.Thread(target=serve, daemon=True).start()
        return f"127.0.0.1:{listener.getsockname()[1]}"
    yield open_
    for listener in opened:
        listener.close()


def refusal(toy, *addresses: str) -> str:
    with pytest.raises(StudyError) as caught, VllmEngine(1, servers=addresses) as engine:
        engine._start(toy)
    assert "\n" not in str(caught.value)
    return str(caught.value)


def test_who_has_another_secret_is_refused(door, toy, monkeypatch, capsys):
    """Faults: a server that serves anybody; a secret that is sent, or left out on either side; a run that waits."""
    address = door()
    monkeypatch.setenv("M2RL_SECRET", "sixteen letters.")
    assert refusal(toy, address) == f"the vLLM server {address} has another secret than M2RL_SECRET here"
    until(lambda: "refused 127.0.0.1: it has another secret" in capsys.readouterr().out)
    monkeypatch.setenv("M2RL_SECRET", "short")
    assert "(here are 5)" in refusal(toy, address)
    monkeypatch.delenv("M2RL_SECRET")
    assert refusal(toy, address).startswith("programs on other machines need a secret of 16 characters or more")
    assert servers.main(["--port", "0"]) == 2 and "M2RL_SECRET" in capsys.readouterr().err
    with socket.create_connection(peers.address_of(address, "here")) as stranger:
        wire = vllm_wire.Wire(stranger, 10)
        assert SECRET not in str(wire.receive())
        wire.send(call="begin", who="me", model={}, proof="")
        assert wire.receive() == {"error": "another secret"}


def test_a_false_server_is_found_out(door, toy):
    """Fault: weights that are sent to whoever listens at the port."""
    assert "has another secret" in refusal(toy, door(key="the secret of another"))


def test_a_secret_may_lie_in_a_file(door, toy, monkeypatch, tmp_path):
    (tmp_path / "secret").write_text(SECRET + "\n")
    monkeypatch.delenv("M2RL_SECRET")
    monkeypatch.setenv("M2RL_SECRET_FILE", str(tmp_path / "secret"))
    assert Remote(door(), described(toy)).about == "nothing"
    monkeypatch.setenv("M2RL_SECRET_FILE", str(tmp_path / "none"))
    assert refusal(toy, "a:1").startswith(f"M2RL_SECRET_FILE: {tmp_path / 'none'} cannot be read (No such file")


def test_a_second_trainer_waits_for_the_end_of_the_first(door, toy):
    """Fault: a place that is never free again, or a half-opened set of servers that stays taken."""
    one, other = door(), door()
    first = Remote(other, described(toy))
    assert "it serves another trainer (process" in refusal(toy, one, other)
    until(lambda: _claim(one, toy))
    first.end()
    until(lambda: _claim(other, toy))


def test_another_thread_may_stop_it(door, toy, toy_rows):
    """Faults: a call that waits for ever, or a vLLM that is started once more, after its stage has ended."""
    engine = VllmEngine(1, servers=[door()])
    with ThreadPoolExecutor(1) as pool, engine:
        waiting = pool.submit(draw, engine, toy, toy_rows[:1])
        until(lambda: engine.links)
        time.sleep(0.2)
        engine.stop()
        with pytest.raises(StudyError, match="^vLLM was stopped while it worked$"):
            waiting.result(30)
        with pytest.raises(StudyError, match="^vLLM was stopped while it worked$"):
            draw(engine, toy, toy_rows[:1])


def test_the_last_server_is_not_replaced_by_a_vllm_of_ones_own(door, toy, toy_rows, monkeypatch, capsys):
    """Fault: a run that goes on in the trainer's own memory when no server is left. Of two the first loss is told."""
    monkeypatch.setattr(servers.Server, "_work", lambda self, wire, model: wire.send(about="nothing"))  # and hangs up
    monkeypatch.setattr(vllm_engine.Local, "__init__", None)
    address, others = door(), (door(), door())
    with VllmEngine(1, servers=[address]) as engine:
        for why in ("there is no other", "it is the second one"):
            lost = f"^the vLLM server {address} is lost: it closed the connection .*; {why}: look after it"
            with pytest.raises(StudyError, match=lost):
                draw(engine, toy, toy_rows[:1])
    with VllmEngine(1, servers=others) as engine, pytest.raises(StudyError, match="it is the second one"):
        draw(engine, toy, toy_rows[:1])
    assert capsys.readouterr().out.count("its share goes to the other 1") == 1


def test_versions_must_agree(door, toy, monkeypatch):
    """Faults: rollouts of two vLLMs taken for one's; a server that was started before an update of this package."""
    one, other = door(), door(vllm="vllm 0.31.0")
    said = refusal(toy, one, other)
    assert f"vllm 0.32.0 ({one})" in said and f"vllm 0.31.0 ({other})" in said and said.endswith("bring all to one version")
    assert vllm_engine.version([one]) == "vllm 0.32.0" and vllm_engine.version([one, other]) == "vllm 0.31.0 and vllm 0.32.0"
    real, seen = vllm_wire.code, []
    monkeypatch.setattr(vllm_wire, "code", lambda: seen.append(1) or (real() if len(seen) % 2 else "0123"))
    assert "runs other code of this package (" in refusal(toy, one)


def test_what_is_no_server_is_one_line(toy):
    """Faults: a traceback, or an endless wait, for a wrong port or address."""
    with socket.create_server(("127.0.0.1", 0)) as listener:
        address = f"127.0.0.1:{listener.getsockname()[1]}"
        threading.Thread(target=lambda: listener.accept()[0].sendall(b"HTTP/1.1 400 Bad Request\r\n"), daemon=True).start()
        assert refusal(toy, address).startswith(f"the vLLM server {address} does not answer as one (this was no line of ours)")
    assert refusal(toy, address).startswith(f"the vLLM server {address} cannot be reached (Connection refused): start it")
    for wrong in ("node2", "node2:", ":1", "node2:70000", "::1:80"):
        assert refusal(toy, wrong).endswith("is no address: write host:port, as in node2:8123")
    assert peers.address_of("[::1]:80", "here") == ("::1", 80)


def test_the_server_says_whom_it_lets_in(monkeypatch, capsys):
    """Faults: a port that is open to the world without a word; an option that nobody reads."""
    served = []
    monkeypatch.setattr(servers.Server, "serve", lambda self, listener: served.append(self.settings))
    assert servers.main(["--port", "0", "--tensor-parallel", "2", "--gpu-memory", "0.8", "--threads", "3"]) == 0
    assert served == [(vllm_link.interpreter(), 3, 0.8, 2)]
    assert "for this machine alone; `--host 0.0.0.0` lets other machines in" in capsys.readouterr().out
    assert servers.main(["--port", "0", "--host", "0.0.0.0"]) == 0
    assert "for every machine that can reach it and has the secret" in capsys.readouterr().out
    with socket.create_server(("127.0.0.1", 0)) as busy:
        assert servers.main(["--port", str(busy.getsockname()[1])]) == 2
    assert "error: cannot listen on 127.0.0.1:" in capsys.readouterr().err
