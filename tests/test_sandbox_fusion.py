"""SandboxFusion's API: our client against our server, both against the true fields, and servers that misbehave."""
from __future__ import annotations

import json
import shutil
import subprocess
import sys
import threading
import time
import urllib.error
import urllib.request

import pytest
from toy_server import Scripted

from m2rl_core import post, sandbox
from m2rl_core.domains import Row, coding
from m2rl_core.errors import StudyError
from m2rl_core.sandbox import Outcome, Program, Sandbox
from m2rl_core.sandbox.fusion import Client, Server, program_of, read, reply_of

needs_bwrap = pytest.mark.skipif(shutil.which("bwrap") is None,
                                 reason="bwrap is not installed: apt-get install bubblewrap")
ANSWER = {"status": "Success", "message": "", "compile_result": None, "executor_pod_name": None, "files": {},
          "run_result": {"status": "Finished", "execution_time": 0.1, "return_code": 0, "stdout": "42\n", "stderr": ""}}


@pytest.fixture(autouse=True)
def impatient(monkeypatch):
    monkeypatch.setattr(post, "PAUSE", 0.001)


@pytest.fixture(scope="module")
def server():
    with Sandbox() as box, Server(box) as running:
        yield running


def result(**changed) -> dict:
    return {**ANSWER, "status": "Failed", "run_result": {**ANSWER["run_result"], **changed}}


def asked_of(url, body: bytes, **headers):
    """(status, JSON) of a raw request."""
    request = urllib.request.Request(url, body, {"Content-Type": "application/json", **headers})
    try:
        with urllib.request.build_opener(urllib.request.ProxyHandler({})).open(request, timeout=60) as answer:
            return answer.status, json.loads(answer.read())
    except urllib.error.HTTPError as error:
        with error:
            return error.code, json.loads(error.read())


# --- both together


@needs_bwrap
def test_client_and_server_give_what_the_sandbox_gives(server):
    """Fault: an input that does not arrive, a failure that reads as an empty output, an order mixed up."""
    programs = [Program("print(sum(map(int, input().split())))", ("1 2", "3 4")),
                Program("print(10 // int(input()))", ("5", "0", "2")),
                Program("print(", ("",)), Program("import sys\nsys.exit(3)", ("",)), Program("print('é')", ("",))]
    with Client(server.url) as client, Sandbox() as box:
        found = client.run([*programs, programs[0]])
        assert client.kind == "SandboxFusion" and client.about == f"SandboxFusion at {server.url}"
        assert found[0] == found[5] == Outcome(("3\n", "7\n"))
        assert found[1] == Outcome(("2\n", None, None), "input 2: ZeroDivisionError: integer division or modulo by zero")
        assert found[2:5] == box.run(programs)[2:]


@needs_bwrap
def test_a_program_that_does_not_end(server):
    body = b'{"code": "while True: pass", "language": "python", "run_timeout": 0.5}'
    status, reply = asked_of(f"{server.url}/run_code", body)
    assert status == 200 and reply["status"] == "Failed"
    assert reply["run_result"]["status"] == "TimeLimitExceeded" and reply["run_result"]["return_code"] is None
    assert read(reply) == (None, "time limit")


@needs_bwrap
def test_the_true_fields(server):
    """Fault: a server or a client that understands its own twin only."""
    status, reply = asked_of(f"{server.url}/run_code", json.dumps({
        "compile_timeout": 5, "run_timeout": 10, "memory_limit_MB": 4096, "code": "print(input())", "stdin": "hi",
        "language": "python", "files": {}, "fetch_files": []}).encode())
    assert status == 200 and set(reply) == set(ANSWER) and set(reply["run_result"]) == set(ANSWER["run_result"])
    assert reply["run_result"].pop("execution_time") > 0
    assert reply["run_result"] == {"status": "Finished", "return_code": 0, "stdout": "hi\n", "stderr": ""}
    with Scripted((200, ANSWER)) as scripted, Client(scripted.url, sandbox.Limits(memory_bytes=2**30)) as client:
        assert client.run([Program("x", ("in",), 9)]) == [Outcome(("42\n",))]
        assert scripted.asked[1] == ("/run_code", {
            "compile_timeout": 5, "run_timeout": 9, "memory_limit_MB": 1024, "code": "x", "stdin": "in", "language": "python",
            "files": {}, "fetch_files": []})


@needs_bwrap
def test_coding_rows_go_to_the_address(server, monkeypatch):
    """Fault: M2RL_SANDBOX read by nobody."""
    monkeypatch.setenv("M2RL_SANDBOX", server.url + "/")
    monkeypatch.setattr(sandbox, "_shared", [])
    row = Row("hand/0", "coding", "", "", (), {"unit_tests": {"inputs": ["1 2", "2 2"], "outputs": ["3", "4"]}})
    answers = [[f"```python\n{code}\n```"] for code in ("print(sum(map(int, input().split())))", "print(3)", "1/0")]
    assert [one.reason for one in coding.verify([row] * 3, answers)] == [
        "right", "wrong answer on input 2: 3", "input 1: ZeroDivisionError: division by zero"]
    assert sandbox.shared().kind == "SandboxFusion"
    assert sandbox.probe() == f"SandboxFusion at {server.url}/"


@needs_bwrap
def test_livecodebench_goes_to_the_address_too(server, monkeypatch):
    """Fault: limits of LiveCodeBench that only our own sandbox can be opened with."""
    monkeypatch.setenv("M2RL_SANDBOX", server.url)
    monkeypatch.setattr(sandbox, "_larger", {})
    cases = json.dumps([{"input": "[1, 2]", "output": "3"}, {"input": "[]", "output": "0"}])
    truth = {"public_test_cases": cases, "private_test_cases": "[]", "metadata": '{"func_name": "total"}'}
    row = Row("lcb/1", "coding", "", "", (), truth)
    answers = [[f"```python\nclass Solution:\n    def total(self, x: List[int]):\n        return {value}\n```"]
               for value in ("sum(x)", "3", "x[0] + x[1]")]
    assert [one.reason for one in coding.verify([row] * 3, answers)] == [
        "right", "wrong answer on test 2: 3", "test 2: IndexError: list index out of range"]


# --- client


@pytest.mark.parametrize("reply, outcome", [
    (result(return_code=1, stderr="Traceback:\n  line 1\nValueError: no\n"), (None, "ValueError: no")),
    (result(return_code=3), (None, "exit code 3")),
    (result(status="TimeLimitExceeded", return_code=None), (None, "time limit")),
    ({**ANSWER, "compile_result": {"status": "Finished", "return_code": 1, "stdout": "", "stderr": "no C"}}, (None, "no C")),
    ({**ANSWER, "compile_result": ANSWER["run_result"]}, ("42\n", "")), (result(stdout=None), ("", "")),
])
def test_replies_are_read(reply, outcome):
    assert read(reply) == outcome


def test_passing_trouble_is_tried_again():
    """Fault: one dropped connection that ends a training; or an answer lost among the attempts."""
    with Scripted((200, ANSWER), (503, {"detail": "busy"}), (500, b"oops"), (200, {**ANSWER, "status": "SandboxError"}),
                  (200, ANSWER)) as scripted, Client(scripted.url) as client:
        assert client.run([Program("x", ("",))]) == [Outcome(("42\n",))]
        assert len(scripted.asked) == 5


def test_a_server_that_fails_at_one_program_costs_that_program():
    """Fault: a program that the server cannot stand ends the whole training."""
    bad = {**ANSWER, "status": "SandboxError", "message": "no\nUTF-8", "run_result": None}
    with Scripted((200, ANSWER), (200, bad)) as scripted, Client(scripted.url) as client:
        assert client.run([Program("x", ("a", "b"))]) == [Outcome((None, None), "input 1: SandboxFusion failed: no UTF-8")]


@pytest.mark.parametrize("answers, said", [
    ([(404, {"detail": "None"})], r'SandboxFusion at http://127.0.0.1:\d+/run_code refuses with status 404: {"detail'),
    ([(503, b"")], r"cannot be reached \(5 attempts; the last: status 503: Service Unavailable\): is it running"),
    ([(200, b"<html>\nhello")], "answers with no JSON object: '<html> hello'"),
    ([(200, [1])], "answers with no JSON object"),
    ([(200, {"status": "Success"})], "answers without run_result.status, return_code and stdout"),
    ([(200, result(stdout="41"))], "does not run Python: print.* gave '41'"),
    ([(200, result(return_code=1))], "does not run Python: print.* gave .exit code 1"),
])
def test_a_server_that_is_none_is_named_at_once(answers, said):
    """Fault: every program of a training scored 0 because an address is wrong."""
    with Scripted(*answers) as scripted, pytest.raises(StudyError, match=said) as caught:
        Client(scripted.url)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("url, said", [
    ("http://127.0.0.1:9", r"SandboxFusion at http://127.0.0.1:9/run_code cannot be reached"),
    ("http://me:secret@127.0.0.1:9", r"SandboxFusion at http://127.0.0.1:9/run_code cannot be reached"),
    ("http://", "M2RL_SANDBOX='http://' is no address"), ("file:///etc/passwd", "is no address"),
])
def test_an_address_where_nobody_answers(url, said):
    """Fault: a wait without an end, a traceback, or a password in a log."""
    with pytest.raises(StudyError, match=said) as caught:
        Client(url)
    assert "secret" not in str(caught.value)


def test_a_proxy_is_not_for_this_machine(monkeypatch):
    monkeypatch.setenv("http_proxy", "http://127.0.0.1:9")
    with Scripted((200, ANSWER)) as scripted, Client(scripted.url) as client:
        assert client.run([Program("x", ("",))]) == [Outcome(("42\n",))]


# --- server


@pytest.mark.parametrize("changed, said", [
    ({"code": None}, "code: a text is needed"), ({"language": "cpp"}, "language: 'cpp' is not served here"),
    ({"stdin": 3}, "stdin: a text or null"), ({"files": {"a": "QQ=="}}, "files: not served here"),
    ({"fetch_files": ["a"]}, "fetch_files: not served"), ({"run_timeout": 0}, "run_timeout: more than 0"),
    ({"run_timeout": 301}, "at most 300"), ({"run_timeout": "1"}, "run_timeout: a number"),
    ({"memory_limit_MB": None}, "memory_limit_MB: a number"), ({"run_timeout": float("nan")}, "run_timeout: a number"),
])
def test_requests_that_are_refused(changed, said):
    with pytest.raises(ValueError, match=said):
        program_of(json.dumps({"code": "x", "language": "python", **changed}).encode())


def test_defaults_of_a_request():
    assert program_of(b'{"code": "x", "language": "python", "stdin": null}') == Program("x", ("",), 10)
    assert program_of(b'{"code": "x", "language": "python", "run_timeout": 1.2}').cpu_seconds == 2


def test_replies_are_written():
    assert reply_of(Outcome(("out",)), 0.5)["run_result"] == {
        "status": "Finished", "execution_time": 0.5, "return_code": 0, "stdout": "out", "stderr": ""}
    failed = reply_of(Outcome((None,), "input 1: exit code 3"), 0.5)
    assert failed["status"] == "Failed" and failed["run_result"]["return_code"] == 3
    assert reply_of(Outcome((None,), "input 1: E: x"), 0.5)["run_result"]["return_code"] == 1
    assert reply_of(Outcome(("",)), 0.5)["status"] == "Success"  # a program that prints nothing has not failed


class Slow:
    """A box that says how many programs were in it at once."""

    def __init__(self):
        self.now = self.most = 0
        self.lock = threading.Lock()

    def run(self, programs):
        with self.lock:
            self.now += 1
            self.most = max(self.most, self.now)
        time.sleep(0.05)
        with self.lock:
            self.now -= 1
        return [Outcome(("",)) for _ in programs]


def test_so_many_at_once_and_no_more():
    """Fault: a hundred requests that start a hundred programs."""
    box = Slow()
    with Server(box, at_once=2) as server:
        body = b'{"code": "x", "language": "python"}'
        threads = [threading.Thread(target=asked_of, args=(f"{server.url}/run_code", body)) for _ in range(8)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
        assert box.most == 2


def test_only_this_machine_is_served():
    """Fault: bound to every network, as the released code does; or served to any page that a browser opens."""
    with Server(Slow()) as server:
        assert server.server_address[0] == "127.0.0.1"
        body = b'{"code": "x", "language": "python"}'
        assert asked_of(f"{server.url}/run_code", body, Host="evil.example:80")[0] == 403
        assert asked_of(f"{server.url}/run_code", body, **{"Content-Type": "text/plain"})[0] == 415
        assert asked_of(f"{server.url}/run_jupyter", body) == (404, {"detail": "only POST /run_code is served here"})
        assert asked_of(f"{server.url}/run_code", b"{")[0] == 422
        assert asked_of(f"{server.url}/run_code", body)[0] == 200
        with pytest.raises(StudyError, match="^port .* of 127.0.0.1 cannot be served .* --port takes another$"):
            Server(Slow(), server.server_address[1])


@needs_bwrap
def test_the_command_serves_until_it_is_ended():
    command = [sys.executable, "-m", "m2rl_core.sandbox.fusion", "--port", "0"]
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True) as running:
        try:
            url = running.stdout.readline().split()[0].removesuffix("/run_code")
            with Client(url) as client:
                assert client.run([Program("print(input())", ("hi",))]) == [Outcome(("hi\n",))]
        finally:
            running.terminate()
