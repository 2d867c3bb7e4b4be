"""Environments that reply to rollouts: what breaks or hangs costs its own rollout, and nobody else's."""
from __future__ import annotations

import gc
import os
import signal
import sys
import threading
import time

import pytest
import toy_environment
import toy_policy
from test_worker import gone

from m2rl_core import domains, evaluate
from m2rl_core.training import collect
from m2rl_core.domains import Row, Verdict, environment_host, environments, module, training_rows
from m2rl_core.errors import StudyError

ROW = Row("toy/0", "toy", "", "", (), {})


@pytest.fixture
def toy(monkeypatch):
    """The toy domain among the others."""
    monkeypatch.setitem(domains.MODULES, "toy", "toy")
    monkeypatch.setitem(sys.modules, "m2rl_core.domains.toy", toy_environment)


def fresh(row=ROW):
    return environments.open_environment(row)


def here(row=ROW):
    return environments.Here(toy_environment.environment, row)


@pytest.fixture(autouse=True)
def one_process(monkeypatch):
    """One for all, but where a test wants more."""
    monkeypatch.setattr(environment_host, "HOSTS", 1)


def pid():
    return environment_host._hosts[0].process.process.pid


@pytest.mark.parametrize("make", [fresh, here])
def test_a_step_that_fails_is_told_and_nothing_is_raised(toy, make):
    """Faults: one bad call ends the training; a reply that is no text breaks the tokenizer later; an end told as a fault."""
    for answer, told in (("raise", "environment failed: ZeroDivisionError: division by zero"),
                         ("number", "environment failed: TypeError: 'int' object is not iterable"),
                         ("numbers", "environment replied [1, 2], which is no list of texts"), ("end", "")):
        episode = make()
        assert episode.step("a") == ["step 1: a"] and episode.step(answer) is None and episode.failed == told
    broken = make(Row("toy/1", "toy", "", "", (), {"broken": True}))
    assert broken.step("a") is None and broken.failed == "environment failed: KeyError: 'no such table'"


@pytest.mark.parametrize("make", [fresh, here])
def test_what_a_user_says_stays_what_a_user_says(toy, make):
    """Faults: the user's words come back as a tool's; a sentence taken for a list of letters, each a tool's reply."""
    said, = make().step("user Go on.")
    assert said == "Go on." and isinstance(said, domains.UserSays)
    bare = make()
    assert bare.step("bare Go on.") is None
    assert bare.failed == "environment replied 'Go on.', which is one text and no list of texts"
    assert make(Row("toy/2", "toy", "", "", (), {"nobody": True})).step("a") is None


@pytest.mark.parametrize("make", [fresh, here])
@pytest.mark.parametrize(("what", "error"), [("study", StudyError), ("import", ImportError)])
def test_what_cannot_work_at_all_stops_the_run(toy, make, what, error):
    """Fault: every rollout scores 0 for a package that is not installed."""
    with pytest.raises(error, match=f"^no {what}$"):
        make().step(f"cannot {what}")
    assert make().step("a") == ["step 1: a"]


@pytest.mark.parametrize("how", ["python", "sleep", "regular expression", "power"])
def test_a_hang_costs_its_own_rollout_only(toy, how):
    """Faults: a limit that C code does not feel; the others' episodes lost with the process, or begun anew in silence."""
    others = [fresh() for _ in range(3)]
    for i, other in enumerate(others):
        assert [other.step(f"{j}") for j in range(i + 1)] == [[f"step {j + 1}: {j}"] for j in range(i + 1)]
    first, bad = pid(), fresh()
    start = time.monotonic()
    assert bad.step("a") == ["step 1: a"] and bad.step(f"hang {how}") is None
    assert bad.failed == "environment killed after 2 s" and time.monotonic() - start < 20 and gone(first)
    assert [other.step("on") for other in others] == [[f"step {i + 2}: on"] for i in range(3)]


def test_a_death_costs_its_own_rollout_only(toy, tmp_path):
    """Faults: a crash of a library that ends the run; a reward that depends on what else kills processes here."""
    other, bad, unlucky = fresh(), fresh(), fresh()
    assert other.step("a") == ["step 1: a"]
    assert bad.step("die") is None and bad.failed == "environment died"
    assert unlucky.step("b") == ["step 1: b"]
    assert unlucky.step(f"die-once {tmp_path / 'died'}") == [f"step 2: die-once {tmp_path / 'died'}"]
    assert other.step("c") == ["step 2: c"]
    os.kill(pid(), signal.SIGKILL)
    assert other.step("d") == ["step 3: d"]


def test_an_episode_that_cannot_be_played_again_is_not_taken_for_the_same(toy):
    """Fault: a rollout goes on in a world that is not the one that it has read of."""
    clock, bad = fresh(), fresh()
    assert clock.step("clock") == [str(pid())]
    assert bad.step("hang python") is None
    assert clock.step("a") is None
    assert clock.failed == "environment lost with its process; played again, it replied something else"
    assert fresh().step("a") == ["step 1: a"]


@pytest.mark.skipif(sys.platform != "linux", reason="the limit on memory is Linux's")
def test_memory_is_limited(toy):
    bad = fresh()
    assert bad.step("memory") is None and bad.failed.startswith("environment failed: MemoryError")


def test_episodes_that_nobody_holds_are_forgotten(toy):
    """Fault: the tables of every rollout of a training stay in memory."""
    episode = fresh()
    episode.step("a")
    number = episode.number
    assert number in environment_host._hosts[0].episodes
    del episode
    gc.collect()
    fresh().step("a")
    assert number not in environment_host._hosts[0].episodes


def test_an_interrupt_leaves_no_late_reply(toy):
    """Fault: after Ctrl-C the next step gets the reply of the one that was broken off."""
    assert fresh().step("a") == ["step 1: a"]
    first, before = pid(), signal.signal(signal.SIGINT, signal.default_int_handler)
    timer = threading.Timer(0.3, os.kill, (os.getpid(), signal.SIGINT))
    timer.start()
    with pytest.raises(KeyboardInterrupt):
        fresh().step("hang python")
    signal.signal(signal.SIGINT, before)
    assert gone(first) and fresh().step("b") == ["step 1: b"]


def test_environments_that_do_not_load_stop_the_run(tmp_path, monkeypatch):
    """Faults: every rollout blamed for it; a start that hangs for ever."""
    (tmp_path / "deadly_environment.py").write_text("import os\nos._exit(3)\n")
    (tmp_path / "endless_environment.py").write_text("while True: pass\n")
    monkeypatch.syspath_prepend(tmp_path)
    monkeypatch.setattr(environment_host, "_hosts", {})  # the next one has this folder in its path
    with pytest.raises(StudyError, match="^the environments of deadly_environment end their process while they are loaded"):
        environments.Hosted("deadly_environment", ROW, 2.0).step("a")
    monkeypatch.setattr(environment_host, "START_LIMIT", 2.0)
    with pytest.raises(StudyError, match="^the environments of endless_environment were not loaded within 2 s$"):
        environments.Hosted("endless_environment", ROW, 2.0).step("a")
    with pytest.raises(ImportError, match="no_such_environment"):
        environments.Hosted("no_such_environment", ROW, 2.0).step("a")


def test_steps_of_several_processes_run_at_once_and_come_back_in_order(toy, monkeypatch):
    """Faults: a group waits for one tool after the other; replies given to another rollout; one hang that stops all."""
    monkeypatch.setattr(environment_host, "HOSTS", 3)
    episodes = [fresh() for _ in range(6)] + [here()]
    assert environments.step_all(episodes, ["a"] * 7) == [["step 1: a"]] * 7 and len(environment_host._hosts) == 3
    start = time.monotonic()
    assert environments.step_all(episodes[:3], ["wait 1"] * 3) == [["step 2: wait 1"]] * 3
    assert time.monotonic() - start < 2.5  # one after the other they would take three seconds
    found = environments.step_all(episodes, ["b", "b", "b", "c", "hang python", "raise", "d"])
    assert found == [["step 3: b"]] * 3 + [["step 2: c"], None, None, ["step 2: d"]]
    assert [bool(episode.failed) for episode in episodes] == [False] * 4 + [True, True, False]
    assert environments.step_all([], []) == []
    with pytest.raises(StudyError, match="^no study$"):
        environments.step_all(episodes[:3], ["d", "cannot study", "d"])
    for lane in [lane for lane in environment_host._hosts if lane]:
        environment_host._hosts.pop(lane).process.end()


def test_the_miniature_workplace_needs_no_process(monkeypatch):
    """Fault: a study that never needed one pays for a process and a message a turn."""
    monkeypatch.setattr(environment_host, "Host", lambda lane: pytest.fail("a process was asked"))
    monkeypatch.setattr(environment_host, "_hosts", {})
    row = next(row for row in training_rows("agent", "rl", 20, 1) if row.truth["kind"] == "multi_turn")
    turns = [t["content"].split("</think>")[1] for t in module("agent").respond(row) if t["role"] == "assistant"]
    episode = environments.open_environment(row)
    assert episode.step(turns[0]) and episode.failed == ""


def test_a_rollout_whose_environment_failed_is_worth_nothing_and_is_counted(toy, policy, episodes, monkeypatch):
    """Faults: the verifier asked about half an episode, which it may find right; a failure that no count shows; the reward
    of a failed rollout given to its neighbour."""
    row = episodes[0]
    turns = module("agent").respond(row)
    wanted = [toy_policy.script_of(policy, row, turns)] * 2
    step, seen = module("agent").Environment.step, []

    def breaks(self, answer):
        seen.append(answer)
        if len(seen) == 2:
            raise OSError("no disk")
        return step(self, answer)

    monkeypatch.setattr(module("agent").Environment, "step", breaks)
    whole, broken = toy_policy.scripted(policy, [row], wanted, monkeypatch, n=2)
    monkeypatch.undo()
    assert (whole.failed, broken.failed) == ("", "environment failed: OSError: no disk") and len(broken.turns) == 1
    asked = []

    def rewards(rows, transcripts):
        asked.append(transcripts)
        return domains.rewards(rows, transcripts)

    found = environments.verdicts([broken, whole], rewards)
    assert found == [Verdict(0.0, broken.failed, failed=True), Verdict(1.0, "right")] and asked == [[whole.turns]]
    import torch
    assert collect.summary([broken, whole], found, torch.tensor([[0.0, 1.0]]))["verifier_failures"] == 1
    frame = evaluate.frame("sft", "bfcl_v3", [broken, whole], found, 2)
    assert list(frame["reason"]) == [broken.failed, "right"]


OWN = """
import time

def rows(split, n, seed):
    return [{"prompt": f"Guess {i}", "number": i} for i in range(n)]

def verify(rows, answers):
    return [float(turns[-1] == str(row["number"])) if len(turns) > 1 else (0, "one turn") for row, turns in zip(rows, answers)]

class Game:
    def __init__(self, row):
        self.number, self.left = row["number"], 3
    def step(self, text):
        while text == "hang":
            time.sleep(1)
        self.left -= 1
        return None if int(text) == self.number or not self.left else ["low" if int(text) < self.number else "high"]

def environment(row):
    return Game(row)

STEP_SECONDS = 2
"""


def test_a_domain_of_ones_own_has_an_environment_of_its_own(tmp_path, monkeypatch):
    """Faults: the file's environment is never asked, or in the process of the training; its limit is not taken; its verifier
    sees the last turn only."""
    file = tmp_path / "guess.py"
    file.write_text(OWN)
    monkeypatch.setitem(domains.OWN, "guess", str(file))
    row = training_rows("guess", "rl", 6, 0)[5]
    episode, slow, odd = (fresh(row) for _ in range(3))
    assert [episode.step(text) for text in ("3", "7", "5")] == [["low"], ["high"], None] and episode.failed == ""
    assert isinstance(slow, environments.Hosted) and slow.step("hang") is None
    assert slow.failed == "environment killed after 2 s"
    assert odd.step("x") is None and odd.failed.startswith("environment failed: ValueError: invalid literal for int()")
    found = domains.rewards([row] * 3, [["</think>3", "</think>5"], ["</think>5"], ["</think>3", "</think>4"]])
    assert [(v.score, v.reason) for v in found] == [(1.0, "right"), (0, "one turn"), (0.0, "wrong")]


def test_a_domain_of_ones_own_needs_no_environment(tmp_path, monkeypatch):
    file = tmp_path / "plain.py"
    file.write_text(OWN[:OWN.index("class Game")])
    monkeypatch.setitem(domains.OWN, "plain", str(file))
    assert fresh(training_rows("plain", "rl", 1, 0)[0]) is None
