"""Whether two LaTeX answers are equal, decided by math-verify in a process that can be killed.

Answers such as 9^{9^{9}} keep sympy busy for ever inside one C call, where no exception can reach it. So the
comparison runs in one worker for each process, started when first needed; an alarm that nobody catches lets the
kernel end the worker after `LIMIT` seconds, and the next question starts a new one.
"""
from __future__ import annotations

import functools
import json
import logging
import os
import pathlib
import signal
import subprocess
import sys
import threading

from m2rl_core.errors import StudyError

LIMIT, START_LIMIT = 3, 120  # seconds of wall time: for one comparison, for the start
MEMORY = 2 * 1024**3  # bytes of address space that the worker may take (Linux)

_lock = threading.Lock()
_worker: tuple[int, subprocess.Popen] | None = None  # (process id of its owner, the worker)


@functools.lru_cache(maxsize=4096)
def ask(gold: str, prediction: str) -> str:
    """"right", "wrong answer" or, where the comparison killed the worker, "too slow or too large to compare".

    Both are what stands inside a box. Raises StudyError where the worker cannot start.
    """
    global _worker
    with _lock:
        owned = _worker is not None and _worker[0] == os.getpid()  # a forked child must not share its parent's pipes
        process = _worker[1] if owned else _start()
        _worker = None  # until it has answered: after an interrupt here its late reply must not be read as the next one
        try:
            process.stdin.write(json.dumps([gold, prediction]) + "\n")
            process.stdin.flush()
            reply = process.stdout.readline()
        except BrokenPipeError:
            reply = ""
        if not reply:
            _end(process)
            return "too slow or too large to compare"
        _worker = os.getpid(), process
        return "right" if reply == "1\n" else "wrong answer"


def _start() -> subprocess.Popen:
    root = str(pathlib.Path(__file__).parents[2])
    env = {**os.environ, "PYTHONPATH": os.pathsep.join(filter(None, (root, os.environ.get("PYTHONPATH"))))}
    process = subprocess.Popen([sys.executable, "-m", __name__], env=env, text=True, stdin=subprocess.PIPE,
                               stdout=subprocess.PIPE)
    if process.stdout.readline() != "ready\n":
        _end(process)
        raise StudyError("the math-verify worker did not start (its own message stands above): "
                         "pip install 'math-verify[antlr4-13-2]==0.9.0'")
    return process


def _end(process: subprocess.Popen) -> None:
    process.kill()
    process.wait()
    process.stdin.close()
    process.stdout.close()


def _serve() -> None:
    """Worker loop: a JSON line [gold, prediction] in, "1" or "0" out."""
    import resource

    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C is for the owner, whose end closes our input
    signal.signal(signal.SIGALRM, signal.SIG_DFL)
    signal.alarm(START_LIMIT)
    if sys.platform == "linux":
        resource.setrlimit(resource.RLIMIT_AS, (MEMORY, MEMORY))
    from math_verify import LatexExtractionConfig, parse, verify

    logging.getLogger("math_verify").setLevel(logging.CRITICAL)  # what it cannot read, the verdict tells
    config = [LatexExtractionConfig(boxed_match_priority=0)]
    out, sys.stdout = sys.stdout, sys.stderr

    def equal(gold: str, prediction: str) -> bool:
        parsed = [parse(f"\\boxed{{{text}}}", config, parsing_timeout=None) for text in (gold, prediction)]
        return verify(*parsed, timeout_seconds=None)

    equal("x+1", "1+x")  # the first symbolic comparison is slow, later ones take milliseconds
    signal.alarm(0)
    print("ready", file=out, flush=True)
    for line in sys.stdin:
        signal.alarm(LIMIT)
        result = equal(*json.loads(line))
        signal.alarm(0)
        print(int(result), file=out, flush=True)


if __name__ == "__main__":
    _serve()
