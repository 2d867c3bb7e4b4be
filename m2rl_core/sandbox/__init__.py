"""Runs code that a model wrote: bubblewrap around a bare Python, one fork a program.

A program gets its code and its inputs, never an expected output; comparing is the caller's. Inside there is no
network, no file but the system's libraries (read-only), nothing to write to but its output, and no other program:
each worker runs one at a time. CPU time decides verdicts, so a loaded machine gives the same ones; the wall limit is
ten times as long. Without bubblewrap a restricted interpreter stands in (`interpreter.py`) and refuses all else.
"""
from __future__ import annotations

import atexit
import contextlib
import json
import os
import pathlib
import select
import shutil
import struct
import subprocess
import sys
import threading
import time
import warnings
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass

from m2rl_core.errors import StudyError

UID = 61234  # whom root becomes to start it: limits on processes do nothing for root
WALL_FACTOR, WALL_LEAST, GRACE, START = 10, 10.0, 20.0, 30.0  # seconds but for the first
CHOICES = ("auto", "bubblewrap", "interpreter")
CHILD = pathlib.Path(__file__).with_name("child.py")


@dataclass(frozen=True)
class Program:
    """Python source, the text of standard input for each run, and seconds of CPU for all runs together."""

    code: str
    inputs: tuple[str, ...]
    cpu_seconds: int = 1


@dataclass(frozen=True)
class Outcome:
    """What each run printed (None: it failed, or a limit ended it) and the first failure in one line ("" if none)."""

    outputs: tuple[str | None, ...]
    error: str = ""


@dataclass(frozen=True)
class Limits:
    """For each program: bytes of memory, bytes of one output, threads; and what it gets besides the standard library.

    `folder` can be read and imported from inside; anybody on this machine must be able to read it. Its `modules` are
    imported once, so that a program has them at no cost and yet fresh.
    """

    memory_bytes: int = 512 * 2**20
    output_bytes: int = 256 * 2**10
    threads: int = 16
    folder: str = ""
    modules: tuple[str, ...] = ()


class SandboxUnavailable(StudyError):
    """No bubblewrap here; the message says why and how to mend it."""


class _Ended(Exception):
    """The process inside went away or did not answer in time."""


def _pythons() -> list[tuple[str, list[str]]]:
    """(path, folders to bind) of the Pythons that may stand inside, best first: the system's, then this one."""
    prefix = os.path.realpath(sys.base_prefix)
    ours = os.path.join(prefix, "bin", f"python{sys.version_info[0]}.{sys.version_info[1]}")
    found = [(path, []) for path in ("/usr/bin/python3", "/usr/local/bin/python3") if os.path.exists(path)]
    return [*found, (ours, [] if f"{prefix}/".startswith("/usr/") else [prefix])]


def _command(bwrap: str, python: str, binds: list[str], limits: Limits) -> list[str]:
    """The command line; the child's text travels as an argument, so no file of ours needs to be readable inside."""
    given = [*binds, limits.folder] if limits.folder else binds
    folders = [part for folder in given for part in ("--ro-bind", folder, folder)]
    return [bwrap, "--unshare-all", "--unshare-user", "--die-with-parent", "--new-session", "--cap-drop", "ALL",
            "--uid", "65534", "--gid", "65534", "--ro-bind", "/usr", "/usr", "--ro-bind-try", "/lib", "/lib",
            "--ro-bind-try", "/lib64", "/lib64", *folders, "--remount-ro", "/", "--chdir", "/",
            python, "-s", "-S", "-B", "-c", CHILD.read_text(), json.dumps(vars(limits))]


class _Worker:
    """One process inside bubblewrap, asked one program at a time by the thread that started it."""

    def __init__(self, limits: Limits):
        """Starts it; SandboxUnavailable with what each Python said where none can be started."""
        bwrap = shutil.which("bwrap")
        if bwrap is None:
            raise SandboxUnavailable("bwrap is not installed: apt-get install bubblewrap")
        failures = []
        for python, binds in _pythons():
            libraries = str(pathlib.Path(python).parents[1] / "lib")
            try:
                first = self._start(_command(bwrap, python, binds, limits), libraries)
            except (OSError, subprocess.SubprocessError) as error:  # for example no right to become another user
                first = {"refused": str(error)}
            if "ready" in first:
                self.about = f"{python} {first['ready']}"
                return
            failures.append(f"{python}: {first['refused']}")
        raise SandboxUnavailable(f"bwrap cannot start a confined Python ({'; '.join(failures)})")

    def _start(self, command: list[str], libraries: str) -> dict:
        """The first message of a new process, {"ready": version} or {"refused": why}; it is ended if not ready."""
        # The whole environment: sets print in the same order each time, and libpython is found outside of /usr/lib.
        env = {"PYTHONHASHSEED": "0", "LD_LIBRARY_PATH": libraries}
        who = {"user": UID, "group": UID, "extra_groups": ()} if os.geteuid() == 0 else {}
        self.process = subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=subprocess.PIPE,
                                        env=env, cwd="/", bufsize=0, start_new_session=True, **who)
        first = {}
        with contextlib.suppress(_Ended):
            first = self._receive(START)
        if "ready" not in first:
            self.close()
            first = {"refused": first.get("refused") or " ".join(self.said.split()) or "no answer"}
        return first

    def ask(self, program: Program) -> Outcome:
        """One program's outcome; `_Ended` where the process went away meanwhile."""
        wall = max(WALL_LEAST, WALL_FACTOR * program.cpu_seconds)
        data = json.dumps({**vars(program), "wall_seconds": wall}).encode()
        try:
            message = memoryview(struct.pack(">I", len(data)) + data)
            while message:
                message = message[self.process.stdin.write(message):]
        except OSError as error:
            raise _Ended from error
        answer = self._receive(wall + GRACE)
        return Outcome(tuple(answer["outputs"]), answer["error"])

    def _receive(self, seconds: float) -> dict:
        deadline = time.monotonic() + seconds
        size = struct.unpack(">I", self._read(4, deadline))[0]
        return json.loads(self._read(size, deadline))

    def _read(self, size: int, deadline: float) -> bytes:
        poll, data = select.poll(), b""
        poll.register(self.process.stdout, select.POLLIN)
        while len(data) < size:
            if not poll.poll(max(0.0, deadline - time.monotonic()) * 1000):
                raise _Ended
            part = self.process.stdout.read(size - len(data))
            if not part:
                raise _Ended
            data += part
        return data

    def close(self) -> None:
        """End the process; what it said on its error stream stays in `said`."""
        self.process.kill()
        with contextlib.suppress(BrokenPipeError):
            self.process.stdin.close()
        self.process.stdout.close()
        self.said = self.process.stderr.read().decode("utf-8", "replace")[-300:]
        self.process.stderr.close()
        self.process.wait()


class Sandbox:
    """A few workers that stay warm between batches; use as a context manager, or close it."""

    kind = "bubblewrap"

    def __init__(self, limits: Limits = Limits(), workers: int | None = None):
        """Starts the first worker, so that SandboxUnavailable comes here; the others start when needed."""
        self.limits = limits
        self._mine, self._workers = threading.local(), []
        count = workers or min(4, 1 + (os.cpu_count() or 1))  # one more than cores: pipes take turns
        self._pool = ThreadPoolExecutor(count, "sandbox")  # a worker dies with its thread, so threads last
        try:
            self.about = f"bubblewrap around {self._pool.submit(self._worker).result().about}, {count} workers"
        except SandboxUnavailable:
            self._pool.shutdown()
            raise

    def run(self, programs: Sequence[Program]) -> list[Outcome]:
        """The outcome of each program, in order; equal programs run once."""
        different = list(dict.fromkeys(programs))
        found = dict(zip(different, self._pool.map(self._one, different), strict=True))
        return [found[program] for program in programs]

    def _worker(self, new: bool = False) -> _Worker:
        if new:
            self._mine.worker.close()
            self._workers.remove(self._mine.worker)
            del self._mine.worker
        if not hasattr(self._mine, "worker"):
            self._mine.worker = _Worker(self.limits)
            self._workers.append(self._mine.worker)
        return self._mine.worker

    def _one(self, program: Program) -> Outcome:
        worker = self._worker()
        for _ in range(2):  # a worker that somebody killed is no fault of the program: once more, in a new one
            try:
                return worker.ask(program)
            except _Ended:
                worker = self._worker(new=True)
        return Outcome((None,) * len(program.inputs), "the sandbox ended twice under this program")

    def close(self) -> None:
        """End all workers; the sandbox cannot be used afterwards."""
        self._pool.shutdown(cancel_futures=True)
        while self._workers:
            self._workers.pop().close()

    def __enter__(self) -> Sandbox:
        return self

    def __exit__(self, *_) -> None:
        self.close()


def open_sandbox(limits: Limits = Limits()):
    """A `Sandbox`, or the `Interpreter` (with a warning) where bubblewrap cannot be used.

    The environment variable M2RL_SANDBOX forces one: "bubblewrap" (SandboxUnavailable where it fails), "interpreter", or
    the address of a SandboxFusion server, or several with commas (StudyError where it does not run Python); ValueError for
    any other value but "auto".
    """
    found = _find(limits)
    if found.kind == "interpreter":
        warnings.warn(f"no sandbox: model-written programs go to the {found.about}", stacklevel=2)
    return found


def probe() -> str:
    """Which kind is usable here and why, in one line."""
    with _find(Limits()) as found:
        return found.about


def _find(limits: Limits):
    from m2rl_core.sandbox.interpreter import Interpreter

    choice = os.environ.get("M2RL_SANDBOX", "auto")
    if choice.startswith(("http://", "https://")):
        from m2rl_core.sandbox import fusion, several
        return several.Several(choice.split(","), limits) if "," in choice else fusion.Client(choice, limits)
    if choice not in CHOICES:
        raise StudyError(f"M2RL_SANDBOX={choice!r}: one of {', '.join(CHOICES)}, or the address of a SandboxFusion server")
    if choice == "interpreter":
        return Interpreter("M2RL_SANDBOX=interpreter asks for it")
    try:
        return Sandbox(limits)
    except SandboxUnavailable as reason:
        if choice == "bubblewrap":
            raise
        return Interpreter(str(reason))


_shared: list = []
_larger: dict[Limits, list] = {}


def shared(limits: Limits | None = None):
    """The process's one sandbox (or one for other limits), opened when first asked for, closed at exit; a fork of the
    process gets its own."""
    place = _shared if limits is None else _larger.setdefault(limits, [])
    if not place or place[0][0] != os.getpid():
        place[:] = [(os.getpid(), open_sandbox(limits or Limits()))]
        atexit.register(_close, os.getpid(), place)
    return place[0][1]


def _close(pid: int, place: list) -> None:
    if pid == os.getpid() and place:
        place.pop()[1].close()
