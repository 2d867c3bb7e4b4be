"""SandboxFusion over HTTP: a client with the interface of `sandbox.Sandbox`, and the same API on top of our sandbox.

M2RL_SANDBOX=http://host:port sends programs to a SandboxFusion server (its POST /run_code, schema of 2026). `python -m
m2rl_core.sandbox.fusion` serves that one call to this machine only, for trainers that speak it; unlike the released
code, which asks for `memory_limit`, the limit goes into `memory_limit_MB`, the field that the server reads.
Our server runs Python only, takes `run_timeout` as seconds of CPU, and forgets what a failing program has printed.
"""
from __future__ import annotations

import argparse
import json
import math
import re
import sys
import threading
import time
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

from m2rl_core import post
from m2rl_core.errors import StudyError, one_line
from m2rl_core.sandbox import Limits, Outcome, Program, Sandbox

COMPILE, LEAST, GRACE = 5, 6, 60.0  # seconds: to compile; to run, at least, for it is wall time; to wait in the server's queue
AT_ONCE, TRIES = 16, 3  # programs on their way to the server; attempts at one that it says it failed at
WHO = "SandboxFusion"


# --- client


class Client:
    """Programs run by a SandboxFusion server; use as a context manager, or close it."""

    kind = "SandboxFusion"

    def __init__(self, endpoint: str, limits: Limits = Limits(), patience: int = post.TRIES):
        """Runs one program, so that StudyError comes here where the server is not there or is none."""
        self.patience = patience
        self.url = post.check(endpoint, "M2RL_SANDBOX") + "/run_code"
        self.about, self.limits = f"{WHO} at {post.shown(endpoint)}", limits
        said, error = self._ask("print(6*7)", "", LEAST)
        if said is None or said.strip() != "42":
            raise StudyError(f"{self.about} does not run Python: print(6*7) gave {error or said!r}")
        self._pool = ThreadPoolExecutor(AT_ONCE, "sandbox-fusion")

    def run(self, programs: Sequence[Program]) -> list[Outcome]:
        """The outcome of each program, in order; equal programs run once. StudyError where the server fails."""
        different = list(dict.fromkeys(programs))
        found = dict(zip(different, self._pool.map(self.one, different), strict=True))
        return [found[program] for program in programs]

    def one(self, program: Program) -> Outcome:
        """Input after input, up to the first failure: no verdict depends on what follows it."""
        outputs = []
        for number, text in enumerate(program.inputs, 1):
            said, error = self._ask(program.code, text, max(LEAST, program.cpu_seconds))
            if said is None:
                rest = (None,) * (len(program.inputs) - len(outputs))
                return Outcome((*outputs, *rest), f"input {number}: {error}")
            outputs.append(said)
        return Outcome(tuple(outputs))

    def _ask(self, code: str, stdin: str, seconds: int) -> tuple[str | None, str]:
        """What the program printed, or None and why it failed."""
        request = {"compile_timeout": COMPILE, "run_timeout": seconds, "memory_limit_MB": self.limits.memory_bytes // 2**20,
                   "code": code, "stdin": stdin, "language": "python", "files": {}, "fetch_files": []}
        for attempt in range(TRIES):
            post.wait(attempt)
            reply = post.post(self.url, request, WHO, COMPILE + seconds + GRACE, patience=self.patience)
            if reply.get("status") != "SandboxError":
                return read(reply)
        # Its own fault, or a program's that it could not stand, as one that prints no UTF-8: no reason to end a training.
        return None, f"{WHO} failed: {one_line(reply.get('message'), 160)}"

    def close(self) -> None:
        self._pool.shutdown(cancel_futures=True)

    def __enter__(self) -> Client:
        return self

    def __exit__(self, *_) -> None:
        self.close()


def read(reply: dict) -> tuple[str | None, str]:
    """What a program printed, or None and why it failed, from the server's reply; StudyError for another schema."""
    for name in ("compile_result", "run_result"):
        result = reply.get(name)
        if result is None and name == "compile_result":
            continue
        if not isinstance(result, dict) or not {"status", "return_code", "stdout"} <= set(result):
            raise StudyError(f"{WHO} answers without {name}.status, return_code and stdout: {str(reply)[:120]}")
        if result["status"] == "TimeLimitExceeded":
            return None, "time limit"
        if result["return_code"] != 0:
            lines = (result.get("stderr") or "").strip().splitlines()
            return None, one_line(lines[-1]) if lines else f"exit code {result['return_code']}"
    return result["stdout"] or "", ""


# --- server


class Refused(ValueError):
    """A request that is answered with a status and a line instead of a run."""

    def __init__(self, status: int, detail: str):
        super().__init__(detail)
        self.status = status


NUMBERS = {"compile_timeout": 10, "run_timeout": 10, "memory_limit_MB": -1}  # and their defaults
LONGEST_RUN, LARGEST, QUEUE = 300, 64 * 2**20, 64  # seconds; bytes of a request; requests that wait


def program_of(body: bytes) -> Program:
    """The program of one request; Refused (422, as the true server's) for a field that is wrong or not served here."""
    try:
        asked = json.loads(body)
    except (ValueError, RecursionError):
        raise Refused(422, "the body is no JSON") from None
    if not isinstance(asked, dict) or not isinstance(asked.get("code"), str):
        raise Refused(422, "code: a text is needed")
    if asked.get("language") != "python":
        raise Refused(422, f"language: {asked.get('language')!r} is not served here, python is")
    if not isinstance(asked.get("stdin"), (str, type(None))):
        raise Refused(422, "stdin: a text or null is needed")
    for name in ("files", "fetch_files", "args"):
        if asked.get(name):
            raise Refused(422, f"{name}: not served here")
    for name, default in NUMBERS.items():
        value = asked.setdefault(name, default)
        if isinstance(value, bool) or not isinstance(value, (int, float)) or not math.isfinite(value):
            raise Refused(422, f"{name}: a number is needed")
    if not 0 < asked["run_timeout"] <= LONGEST_RUN:
        raise Refused(422, f"run_timeout: more than 0 and at most {LONGEST_RUN} seconds are served here")
    return Program(asked["code"], (asked.get("stdin") or "",), math.ceil(asked["run_timeout"]))


def reply_of(outcome: Outcome, seconds: float) -> dict:
    """SandboxFusion's reply to a program with one input."""
    (stdout,), error = outcome.outputs, outcome.error.removeprefix("input 1: ")
    code = re.fullmatch(r"exit code (-?\d+)", error)
    late = error == "time limit"
    result = {"status": "TimeLimitExceeded" if late else "Finished", "execution_time": seconds,
              "return_code": None if late else int(code[1]) if code else 0 if stdout is not None else 1,
              "stdout": stdout or "", "stderr": error}
    return {"status": "Failed" if stdout is None else "Success", "message": "", "compile_result": None,
            "run_result": result, "executor_pod_name": None, "files": {}}


class _Handler(BaseHTTPRequestHandler):
    server: Server
    timeout = 60  # seconds that a silent connection is kept

    def do_POST(self) -> None:
        try:
            self._send(200, self._run())
        except Refused as refused:
            self._send(refused.status, {"detail": str(refused)})

    def _run(self) -> dict:
        host = self.headers.get("Host", "").rsplit(":", 1)[0]
        if host not in ("127.0.0.1", "localhost"):  # a page in a browser that was sent here under another name
            raise Refused(403, f"this server is for this machine, not for {host!r}")
        if self.path != "/run_code":
            raise Refused(404, "only POST /run_code is served here")
        if self.headers.get_content_type() != "application/json":  # which no page may send without asking first
            raise Refused(415, "Content-Type: application/json is needed")
        size = self.headers.get("Content-Length", "")
        if not size.isdecimal() or int(size) > LARGEST:
            raise Refused(413, f"Content-Length: at most {LARGEST} bytes are served here")
        program = program_of(self.rfile.read(int(size)))
        if not self.server.queue.acquire(blocking=False):
            raise Refused(503, "too many requests wait")
        try:
            with self.server.slots:
                start = time.perf_counter()
                (outcome,) = self.server.box.run([program])
                return reply_of(outcome, time.perf_counter() - start)
        finally:
            self.server.queue.release()

    def _send(self, status: int, message: dict) -> None:
        data = json.dumps(message).encode()
        self.send_response(status)
        self.send_header("Content-Type", "application/json")
        self.send_header("Content-Length", str(len(data)))
        self.send_header("Connection", "close")
        self.end_headers()
        self.wfile.write(data)

    def log_message(self, *_) -> None:
        """Nothing a request: there are thousands."""


class Server(ThreadingHTTPServer):
    """POST /run_code on 127.0.0.1, a thread a request, `at_once` programs at a time; `with`, then `url`."""

    daemon_threads = True

    def __init__(self, box, port: int = 0, at_once: int = 4):
        """StudyError where the port is taken; 0 is any free one."""
        self.box, self.slots, self.queue = box, threading.Semaphore(at_once), threading.Semaphore(QUEUE)
        try:
            super().__init__(("127.0.0.1", port), _Handler)
        except OSError as error:
            raise StudyError(f"port {port} of 127.0.0.1 cannot be served ({error.strerror}): --port takes another") from error
        self.url = f"http://127.0.0.1:{self.server_address[1]}"

    def handle_error(self, request, client_address) -> None:
        """Who went away meanwhile needs no traceback."""
        if not isinstance(sys.exception(), (ConnectionError, TimeoutError)):
            super().handle_error(request, client_address)

    def __enter__(self) -> Server:
        threading.Thread(target=self.serve_forever, daemon=True).start()
        return self

    def __exit__(self, *_) -> None:
        self.shutdown()
        self.server_close()


def main() -> None:
    """Serve until interrupted; only bubblewrap will do, for others send real programs."""
    arguments = argparse.ArgumentParser(prog="python -m m2rl_core.sandbox.fusion", description=__doc__.splitlines()[0])
    arguments.add_argument("--port", type=int, default=8080)
    arguments.add_argument("--memory", type=int, default=4096, help="MiB for each program, whatever a request asks for")
    asked = arguments.parse_args()
    with Sandbox(Limits(memory_bytes=asked.memory * 2**20, output_bytes=8 * 2**20)) as box, Server(box, asked.port) as server:
        print(f"{server.url}/run_code on {box.about}; Ctrl-C ends it", flush=True)
        threading.Event().wait()


if __name__ == "__main__":
    try:
        main()
    except StudyError as error:
        raise SystemExit(f"error: {error}") from None
    except KeyboardInterrupt:
        pass
