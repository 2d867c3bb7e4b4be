"""Verifiers run in one process that can be killed: an answer that takes for ever costs its own score and no more.

Answers such as 9^{9^{9}} keep sympy busy inside one C call, where no exception can reach it. So each process has one
worker, which verifies a batch answer by answer and sends each verdict at once: when it is killed or dies, the answer
it was at is known, and a new worker goes on with the next. Verdicts are those of the verifier called in place.
"""
from __future__ import annotations

import contextlib
import functools
import importlib
import math
import os
import pathlib
import signal
import subprocess
import sys
import threading
from collections.abc import Iterable, Sequence
from multiprocessing.connection import Connection, Pipe

from m2rl_core.domains import Row, Verdict, verified
from m2rl_core.errors import StudyError

LIMIT, START_LIMIT = 10.0, 120.0  # seconds of wall time: for one answer; for the start, and for what a verifier loads
MEMORY = 2 * 2**30  # bytes of address space that answers may take on top of what is loaded (Linux)
ONE_THREAD = dict.fromkeys(("OMP_NUM_THREADS", "OPENBLAS_NUM_THREADS", "MKL_NUM_THREADS"), "1")

_lock = threading.Lock()
_current: Worker | None = None


class Worker:
    """A process that can be killed and our end of the line to it; asked by the process that started it only."""

    def __init__(self, program: str = __name__):
        """Starts the module `program`, which finds the number of its end of the line in its arguments."""
        self.owner = os.getpid()  # a forked child must not share its parent's line
        self.asked: set[str] = set()  # modules that it was told to load
        self.unread = 0  # replies to `start` that nobody has read
        self.line, theirs = Pipe()
        env = {**os.environ, "PYTHONPATH": os.pathsep.join(sys.path), **ONE_THREAD}
        with theirs:  # a session of its own: Ctrl-C and Ctrl-Z are for the owner, whose end closes the line
            self.process = subprocess.Popen([sys.executable, "-m", program, str(theirs.fileno())], env=env,
                                            pass_fds=[theirs.fileno()], stdin=subprocess.DEVNULL, start_new_session=True)

    def send(self, module: str, pairs: Sequence[tuple[Row, Sequence[str]]]) -> None:
        self.asked.add(module)
        self.line.send((module, pairs, LIMIT))

    def receive(self, seconds: float):
        """The next reply; TimeoutError, EOFError or ConnectionError where none comes."""
        if not self.line.poll(seconds):
            raise TimeoutError
        return self.line.recv()

    def end(self) -> None:
        with contextlib.suppress(ProcessLookupError):
            os.killpg(self.process.pid, signal.SIGKILL)  # with whatever a verifier has started
        self.process.wait()
        self.line.close()


def start(modules: Iterable[str]) -> None:
    """Let the worker load these modules' verifiers meanwhile: returns at once, and raises nothing that `verify` will."""
    with _lock:
        worker = _take()
        for module in modules:
            if module not in worker.asked:
                with contextlib.suppress(ConnectionError):  # it died; `verify` will see
                    worker.send(module, [])
                    worker.unread += 1
        _keep(worker)


def verify(module: str, rows: Sequence[Row], answers: Sequence[Sequence[str]]) -> list[Verdict]:
    """The verdicts of the verifier of `module` (a name to import) on each row's answers, in order.

    It is called with one answer at a time, and once for answers of one row that are the same. One that takes more than
    LIMIT seconds, or that ends two workers, scores 0 and is marked. Raises StudyError or ImportError where the verifier
    cannot work here.
    """
    places = {}
    for row, turns in zip(rows, answers, strict=True):
        places.setdefault((id(row), *turns), (len(places), row, turns))
    with _lock:
        found = _verdicts(module, [(row, turns) for _, row, turns in places.values()])
    return [found[places[id(row), *turns][0]] for row, turns in zip(rows, answers, strict=True)]


def _verdicts(module: str, pairs: list[tuple[Row, Sequence[str]]]) -> list[Verdict]:
    found: list[Verdict] = []
    ended_at = -1  # the answer that ended the last worker: it may have been somebody else who killed that one
    while len(found) < len(pairs):
        worker, loaded = _take(), False
        try:
            for _ in range(worker.unread):
                worker.receive(START_LIMIT)
            worker.unread = 0
            worker.send(module, pairs[len(found):])
            _raised(worker.receive(START_LIMIT))
            loaded = True
            while len(found) < len(pairs):
                found.append(_raised(worker.receive(LIMIT)))
        except TimeoutError as late:
            worker.end()
            if not loaded:
                raise StudyError(f"the verifier of {module} was not loaded within {START_LIMIT:g} s") from late
            found.append(Verdict(0.0, f"verifier killed after {LIMIT:g} s", failed=True))
        except (EOFError, ConnectionError) as death:
            worker.end()
            if ended_at == len(found) and not loaded:
                raise StudyError(f"the verifier of {module} ends its process while it is loaded; "
                                 "its own message stands above") from death
            if ended_at == len(found):
                found.append(Verdict(0.0, "verifier died", failed=True))
            else:
                ended_at = len(found)
        except BaseException:  # an interrupt, or no verifier: late replies must not be read as the next ones
            worker.end()
            raise
        else:
            _keep(worker)
    return found


def _raised(reply: Verdict | Exception | None) -> Verdict | None:
    if isinstance(reply, Exception):
        raise reply
    return reply


def _take() -> Worker:
    """The worker of this process, or a new one; it is kept no longer until `_keep`."""
    global _current
    worker, _current = _current, None
    return worker if worker is not None and worker.owner == os.getpid() else Worker()


def _keep(worker: Worker) -> None:
    global _current
    _current = worker


# --- inside


def _serve(line: Connection) -> None:
    """Answers (module, pairs, limit): None when the verifier is loaded, then a verdict a pair; an error ends either."""
    signal.signal(signal.SIGALRM, signal.SIG_DFL)
    while True:
        module, pairs, limit = line.recv()
        try:
            check = loaded(module).verify
            line.send(None)
            for pair in pairs:
                signal.alarm(math.ceil(2 * limit))  # the owner kills at `limit`; without one the kernel does
                line.send(verified(check, *([part] for part in pair))[0])
        except (StudyError, ImportError) as error:
            line.send(error)
        signal.alarm(0)


@functools.cache
def loaded(name: str):
    """The module of a name, or a domain of one's own for a file's, after its `load`; memory is limited from then on."""
    limit_memory(None)
    if ".py?" in name:  # a domain of one's own: its file and that file's digest
        from m2rl_core.domains import own_file
        found = own_file.Domain(name, name.rpartition("?")[0])
    else:
        found = importlib.import_module(name)
    getattr(found, "load", lambda: None)()
    limit_memory(MEMORY)
    return found


def limit_memory(extra: int | None) -> None:
    """Address space in use now and `extra` bytes; None lifts the limit."""
    if sys.platform != "linux":
        return
    import resource
    _, hard = resource.getrlimit(resource.RLIMIT_AS)
    used = int(pathlib.Path("/proc/self/statm").read_text().split()[0]) * resource.getpagesize()
    soft = hard if extra is None or 0 <= hard < used + extra else used + extra
    resource.setrlimit(resource.RLIMIT_AS, (soft, hard))


if __name__ == "__main__":
    with contextlib.suppress(EOFError, ConnectionError):  # the owner is gone
        _serve(Connection(int(sys.argv[1])))
