"""The one route from rollouts to rewards, with verifiers that break down."""
from __future__ import annotations

import math
from types import SimpleNamespace

import pytest

from m2rl_core import domains
from m2rl_core.domains import Row, Verdict, rewards
from m2rl_core.domains.checkers import MissingData
from m2rl_core.errors import StudyError
from m2rl_core.sandbox import SandboxUnavailable


def row(i, domain="math"):
    return Row(str(i), domain, "", "", (), {})


def breaking(answer):
    """A verifier's verdict on one answer; raises, or gives what is no score, where the answer says so."""
    if answer == "raise":
        raise ZeroDivisionError("division\nby zero")
    return Verdict({"nan": math.nan, "two": 2.0, "minus": -0.5}.get(answer, 1.0), "right")


@pytest.fixture
def one_breaks(monkeypatch):
    asked = []

    def verify(rows, answers):
        asked.append([r.id for r in rows])
        return [breaking(turns[-1]) for turns in answers]
    monkeypatch.setattr(domains, "module", lambda domain: SimpleNamespace(verify=verify))
    return asked


def test_a_verifier_that_raises_costs_its_own_answer_only(one_breaks):
    """Fault: one strange answer ends the run, or takes the reward of the whole batch."""
    found = rewards([row(0), row(1), row(2)], [["</think>fine"], ["</think>raise"], ["</think>fine"]])
    assert [v.score for v in found] == [1, 0, 1]
    assert [v.failed for v in found] == [False, True, False]
    assert found[1].reason == "verifier failed: ZeroDivisionError: division by zero"
    assert one_breaks == [["0", "1", "2"], ["0"], ["1"], ["2"]]


@pytest.mark.parametrize("error", [
    StudyError("no pixie dust"), SandboxUnavailable("no bwrap"), MissingData("no words"), ImportError("no checkers")])
def test_a_verifier_that_cannot_work_here_stops_the_run(monkeypatch, error):
    """Fault: a machine without the sandbox, where every program would silently score 0 for the whole training."""
    def verify(rows, answers):
        raise error
    monkeypatch.setattr(domains, "module", lambda domain: SimpleNamespace(verify=verify))
    with pytest.raises(type(error), match=str(error)):
        rewards([row(0), row(1)], [["</think>fine"]] * 2)


@pytest.mark.parametrize(("answer", "said"), [("nan", "nan"), ("two", "2.0"), ("minus", "-0.5")])
def test_what_is_no_score_is_none(one_breaks, answer, said):
    """Fault: a reward that is not a number makes every advantage of its group, and then every weight, NaN."""
    found = rewards([row(0), row(1)], [[f"</think>{answer}"], ["</think>fine"]])
    assert [v.score for v in found] == [0, 1] and found[0].failed and not found[1].failed
    assert found[0].reason == f"verifier gave {said}"


def test_the_format_gate_is_not_a_breakdown(one_breaks):
    """Fault: an answer without its end of thinking counted among the verifier's failures, or verified at all."""
    found = rewards([row(0), row(1)], [["raise"], []])
    assert [v.score for v in found] == [0, 0] and not any(v.failed for v in found)
    assert one_breaks == []


def test_verdicts_come_back_in_the_order_of_the_rows(one_breaks):
    found = rewards([row(0), row(1, "coding"), row(2)], [["</think>raise"], ["</think>fine"], ["</think>fine"]])
    assert [v.score for v in found] == [0, 1, 1]
