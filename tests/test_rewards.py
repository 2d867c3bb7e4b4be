"""The one route from rollouts to rewards, with verifiers that break down, in place and in their worker."""
from __future__ import annotations

import pytest
import toy_verifier
from toy_verifier import ERRORS

from m2rl_core import domains
from m2rl_core.domains import Row, rewards
from m2rl_core.errors import StudyError

PLACES = ["coding", "math"]  # whose verifier is called in place, and whose in a worker


def row(i, domain):
    return Row(str(i), domain, "", "", (), {})


@pytest.fixture(autouse=True)
def toy(monkeypatch):
    """The toy verifier in place of every domain's."""
    monkeypatch.setattr(domains, "module", lambda domain: toy_verifier)
    toy_verifier.asked.clear()


def of(*answers, domain):
    """The verdicts on these answers, one for each of as many rows."""
    return rewards([row(i, domain) for i in range(len(answers))], [[f"</think>{answer}"] for answer in answers])


@pytest.mark.parametrize("domain", PLACES)
def test_a_verifier_that_raises_costs_its_own_answer_only(domain):
    """Fault: one strange answer ends the run, or takes the reward of the whole batch."""
    found = of("fine", "raise", "fine", domain=domain)
    assert [v.score for v in found] == [1, 0, 1]
    assert [v.failed for v in found] == [False, True, False]
    assert found[1].reason == "verifier failed: ZeroDivisionError: division by zero"
    assert toy_verifier.asked == ([["0", "1", "2"], ["0"], ["1"], ["2"]] if domain == "coding" else [])


@pytest.mark.parametrize("domain", PLACES)
@pytest.mark.parametrize("error", ERRORS)
def test_a_verifier_that_cannot_work_here_stops_the_run(domain, error):
    """Fault: a machine without the sandbox, where every program would silently score 0 for the whole training."""
    with pytest.raises(ERRORS[error], match=f"^no {error}$") as caught:
        of("fine", f"cannot {error}", domain=domain)
    assert caught.type is ERRORS[error]
    assert of("fine", domain=domain)[0].score == 1  # and what it left behind is no later batch's


@pytest.mark.parametrize("domain", PLACES)
@pytest.mark.parametrize(("answer", "said"), [
    ("nan", "nan"), ("inf", "inf"), ("two", "2.0"), ("minus", "-0.5"), ("None", "None"), ("text", "'1'"), ("bool", "True"),
    ("float", "1.0, which is no Verdict")])
def test_what_is_no_score_is_none(domain, answer, said):
    """Fault: a reward that is not a number makes every advantage of its group, and then every weight, NaN."""
    found = of(answer, "fine", domain=domain)
    assert [v.score for v in found] == [0, 1] and found[0].failed and not found[1].failed
    assert found[0].reason == f"verifier gave {said}"


@pytest.mark.parametrize("domain", PLACES)
def test_a_number_of_another_type_is_a_score(domain):
    """Fault: a verifier that computes with numpy, or that counts, loses all its rewards."""
    found = of("integer", "float32", domain=domain)
    assert [(type(v.score), v.score, v.failed) for v in found] == [(float, 1, False), (float, 0.5, False)]


@pytest.mark.parametrize("domain", PLACES)
def test_a_verdict_too_few_stops_the_run(domain):
    """Fault: rewards that slip to the next rollout."""
    with pytest.raises(StudyError, match=r"^toy_verifier.verify gave \d verdicts for \d answers: it must give one"):
        of("a verdict short", "fine", domain=domain)


def test_an_empty_batch_has_no_rewards():
    assert rewards([], []) == [] and toy_verifier.asked == []


def test_the_format_gate_is_not_a_breakdown():
    """Fault: an answer without its end of thinking counted among the verifier's failures, or verified at all."""
    found = rewards([row(0, "coding"), row(1, "coding")], [["raise"], []])
    assert [v.score for v in found] == [0, 0] and not any(v.failed for v in found)
    assert toy_verifier.asked == []


def test_verdicts_come_back_in_the_order_of_the_rows():
    rows = [row(0, "math"), row(1, "coding"), row(2, "math")]
    found = rewards(rows, [["</think>raise"], ["</think>fine"], ["</think>fine"]])
    assert [v.score for v in found] == [0, 1, 1]
