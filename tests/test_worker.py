"""The verifiers' worker: it is killed, it dies, its owner dies; and its verdicts are those of the verifiers themselves."""
from __future__ import annotations

import os
import signal
import subprocess
import sys
import threading
import time
from pathlib import Path

import pytest
import toy_verifier

from m2rl_core.domains import (
    BENCHMARKS, DOMAINS, Row, answer_of, benchmark_rows, generator, module, prepare, rewards, training_rows, worker)
from m2rl_core.errors import StudyError

ROWS = [Row(str(i), "toy", "", "", (), {}) for i in range(6)]


def ask(*answers, name="toy_verifier"):
    """The verdicts on these answers, one for each of as many rows."""
    return worker.verify(name, ROWS[:len(answers)], [[answer] for answer in answers])


def pid() -> int:
    return int(ask("who")[0].reason)


def gone(process: int, seconds: float = 10) -> bool:
    """Whether a process has ended, or does so soon; one that nobody has waited for yet has ended too."""
    end = time.monotonic() + seconds
    while time.monotonic() < end:
        try:
            if Path(f"/proc/{process}/stat").read_text().rpartition(")")[2].split()[0] == "Z":
                return True
        except (FileNotFoundError, ProcessLookupError):
            return True
        time.sleep(0.02)
    return False


@pytest.fixture
def hasty(monkeypatch):
    monkeypatch.setattr(worker, "LIMIT", 2.0)
    pid()  # what the start takes is no answer's


def answers_of(domain):
    """(row, turns after </think>): right, wrong, cut, empty and foreign answers to miniature rows of a domain."""
    rng, home, foreign = generator("worker", domain), module(domain), r"\boxed{1/2} \boxed{x+1} Answer: B Exact Answer: 3 N"
    rows = training_rows(domain, "rl", 24, 5) + [row for b, d in BENCHMARKS.items() if d == domain
                                                for row in benchmark_rows(b, 8, 5)]
    for i, row in enumerate(rows):
        right, wrong = ([answer_of(turn["content"]) for turn in turns if turn["role"] == "assistant"]
                        for turns in (home.respond(row, i % 2 == 0), home.spoil(row, rng)))
        yield from ((row, turns) for turns in (right, wrong, [right[-1][:len(right[-1]) * 2 // 3]], [""], [foreign]))


@pytest.mark.parametrize("domain", DOMAINS)
def test_verdicts_are_the_verifiers_own(domain):
    """Faults: verdicts of a batch in another order; a row that loses a field on its way; copies that change a verdict."""
    rows, answers = (list(part) for part in zip(*answers_of(domain), strict=True))
    wanted = module(domain).verify(rows, answers)
    assert {v.score for v in wanted} == {0.0, 1.0} and len({v.reason for v in wanted}) > 3
    assert rewards(rows, [[f"</think>{turn}" for turn in turns] for turns in answers]) == wanted
    assert worker.verify(module(domain).__name__, rows[:20] * 2, answers[:20] * 2) == wanted[:20] * 2


@pytest.mark.parametrize("how", ["python", "sleep", "regular expression", "power"])
def test_a_hang_costs_its_own_answer_only(hasty, how):
    """Faults: a limit that C code does not feel; a batch that is given up; the innocent after it blamed."""
    start = time.monotonic()
    found = ask("fine", f"hang {how}", "fine", "nan")
    assert [(v.score, v.failed) for v in found] == [(1, False), (0, True), (1, False), (0, True)]
    assert found[1].reason == "verifier killed after 2 s"
    assert time.monotonic() - start < 20  # one kill, and the start of another worker on a busy machine


def test_copies_of_a_hang_cost_one_kill(hasty):
    """Fault: a whole group that says the same stops a step for a limit each."""
    start = time.monotonic()
    found = worker.verify("toy_verifier", [ROWS[0]] * 6 + [ROWS[1]], [["hang python"]] * 6 + [["fine"]])
    assert [v.score for v in found] == [0] * 6 + [1] and all(v.failed for v in found[:6])
    assert time.monotonic() - start < 10  # six would be twelve


def test_a_death_costs_its_own_answer_only():
    """Faults: a crash of a library that ends the run; the answers before or after it blamed."""
    found = ask("fine", "die", "fine", "die")
    assert [(v.score, v.failed) for v in found] == [(1, False), (0, True), (1, False), (0, True)]
    assert found[1].reason == "verifier died"


def test_an_answer_whose_worker_somebody_killed_is_asked_again(tmp_path):
    """Fault: a reward that depends on what else runs on the machine."""
    found = ask("fine", f"die-once {tmp_path / 'died'}", "fine")
    assert [(v.score, v.reason) for v in found] == [(1, "right")] * 3 and (tmp_path / "died").exists()


def test_a_worker_killed_between_batches_is_replaced():
    first = pid()
    os.kill(first, signal.SIGKILL)
    assert gone(first)
    assert ask("fine", "fine")[1].score == 1 and pid() != first


@pytest.mark.skipif(sys.platform != "linux", reason="the limit on memory is Linux's")
def test_memory_is_limited():
    """Fault: one answer takes the machine's memory, and the kernel ends the training."""
    found = ask("memory", "fine")
    assert [v.score for v in found] == [0, 1] and found[0].reason.startswith("verifier failed: MemoryError")


def test_one_worker_serves_a_process_and_a_thread():
    """Fault: a start for each batch."""
    first, seen = pid(), []
    thread = threading.Thread(target=lambda: seen.append(pid()))
    thread.start()
    thread.join()
    assert seen == [first] and pid() == first


def test_a_fork_has_a_worker_of_its_own():
    """Fault: two processes that read each other's verdicts from one line."""
    first = pid()
    read, write = os.pipe()
    child = os.fork()
    if child == 0:
        own = worker.verify("toy_verifier", ROWS[:1], [["who"]])[0].reason
        os.write(write, own.encode())
        os._exit(0)
    os.close(write)
    assert os.waitpid(child, 0)[1] == 0
    own = int(os.read(read, 100))
    os.close(read)
    assert own != first and pid() == first and gone(own)


def test_an_interrupt_leaves_no_late_verdict(hasty):
    """Fault: after Ctrl-C the next batch gets the verdicts of the one that was broken off."""
    first, before = pid(), signal.signal(signal.SIGINT, signal.default_int_handler)  # a job in the background ignores it
    timer = threading.Timer(0.3, os.kill, (os.getpid(), signal.SIGINT))
    timer.start()
    with pytest.raises(KeyboardInterrupt):
        ask("hang python", "raise", "raise")
    signal.signal(signal.SIGINT, before)
    assert gone(first)
    assert [v.score for v in ask("fine", "fine", "fine")] == [1, 1, 1]


OWNER = """
import sys, toy_verifier
from m2rl_core.domains import Row, worker
worker.LIMIT = 1.0
row = Row("", "toy", "", "", (), {})
print(worker.verify("toy_verifier", [row], [["who"]])[0].reason, flush=True)
if sys.argv[1] == "hang":
    worker.LIMIT = 3.0
    worker.verify("toy_verifier", [row], [["hang power"]])
sys.stdin.read()
"""


@pytest.mark.parametrize("state", ["idle", "hang"])
def test_no_worker_outlives_its_owner(state):
    """Fault: a core that an orphan keeps busy for ever, after the run was killed in an endless answer."""
    owner = subprocess.Popen([sys.executable, "-c", OWNER, state], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True,
                             cwd=Path(__file__).parent.parent,
                             env={**os.environ, "PYTHONPATH": os.pathsep.join(sys.path)})
    its = int(owner.stdout.readline())
    if state == "hang":
        time.sleep(0.5)
    os.kill(owner.pid, signal.SIGKILL)
    owner.wait()
    owner.stdin.close()
    owner.stdout.close()
    assert gone(its, 20)


def test_a_verifier_gets_ready_meanwhile():
    """Faults: a start that waits; its reply taken for the next batch's; a module that cannot be loaded ends another's."""
    first = pid()
    os.kill(first, signal.SIGKILL)
    assert gone(first)
    start = time.monotonic()
    worker.start(["toy_verifier", "no_such_verifier", module("math").__name__])
    assert time.monotonic() - start < 2
    assert [v.score for v in ask("fine", "nan")] == [1, 0]
    with pytest.raises(ImportError, match="no_such_verifier"):
        ask("fine", name="no_such_verifier")
    assert ask("fine")[0].score == 1


def test_rows_say_which_verifiers_get_ready(monkeypatch):
    """Faults: sympy loaded for a run without math; a judge's question, which has no verifier, ends the run."""
    asked = []
    monkeypatch.setattr(worker, "start", lambda modules: asked.append(list(modules)))
    for domains in (["if", "coding", "math", "if"], ["coding"], ["judge"], []):
        prepare(Row("", domain, "", "", (), {}) for domain in domains)
    assert asked == [["m2rl_core.domains.instruction", "m2rl_core.domains.math"]]


def test_a_verifier_that_does_not_load_stops_the_run(tmp_path, monkeypatch):
    """Faults: every answer blamed for it; a start that hangs for ever."""
    (tmp_path / "deadly_verifier.py").write_text("import os\nos._exit(3)\n")
    (tmp_path / "endless_verifier.py").write_text("while True: pass\n")
    monkeypatch.syspath_prepend(tmp_path)
    os.kill(pid(), signal.SIGKILL)  # the next one has this folder in its path
    with pytest.raises(StudyError, match="^the verifier of deadly_verifier ends its process while it is loaded"):
        ask("fine", name="deadly_verifier")
    monkeypatch.setattr(worker, "START_LIMIT", 2.0)
    with pytest.raises(StudyError, match="^the verifier of endless_verifier was not loaded within 2 s$"):
        ask("fine", name="endless_verifier")


def test_the_toy_does_what_it_is_told():
    """Without it some of these tests would pass whatever the worker does."""
    assert toy_verifier.said("fine").score == 1 and toy_verifier.said("nan").score != toy_verifier.said("nan").score
    with pytest.raises(ZeroDivisionError):
        toy_verifier.said("raise")
