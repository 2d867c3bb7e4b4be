"""Humanity's Last Exam: a judge that a stub server plays, and the rule that stands in for one."""
from __future__ import annotations

import json

import pytest
from toy_server import Scripted

from m2rl_core import post
from m2rl_core.domains import Row, hle, prepare, rewards, worker
from m2rl_core.errors import StudyError

LINES = "extracted_final_answer: 42\nreasoning: The same.\ncorrect: yes\nconfidence: 90%"


def row(answer, kind="exactMatch", question="What is six times seven?"):
    truth = {"answer": answer, "answer_type": kind}
    return Row("hle/3", "science", "hle", "", ({"role": "user", "content": question},), truth)


def reply(text) -> tuple[int, dict]:
    return 200, {"choices": [{"message": {"role": "assistant", "content": text}}]}


@pytest.fixture(autouse=True)
def alone(monkeypatch):
    """No judge but a test's own, and no pauses."""
    for name in ("M2RL_JUDGE", "M2RL_JUDGE_MODEL", "M2RL_JUDGE_KEY", "M2RL_JUDGE_OPTIONS"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setattr(post, "PAUSE", 0.001)


@pytest.fixture
def judge(monkeypatch):
    """Start a judge that gives these replies; it is asked from then on."""
    servers = []

    def start(*answers) -> Scripted:
        servers.append(Scripted(*answers).__enter__())
        monkeypatch.setenv("M2RL_JUDGE", servers[-1].url + "/v1/")
        monkeypatch.setenv("M2RL_JUDGE_MODEL", "qwen")
        return servers[-1]
    yield start
    for server in servers:
        server.__exit__()


def verdicts(*answers, asked=None):
    return rewards([asked or row("42")] * len(answers), [[f"<think>x</think>{answer}"] for answer in answers])


# --- with a judge


def test_what_a_judge_is_asked(judge, monkeypatch):
    """Faults: the question, the answer or the truth left out; the thinking shown; a key in the body; asked twice."""
    monkeypatch.setenv("M2RL_JUDGE_KEY", "sk-secret")
    monkeypatch.setenv("M2RL_JUDGE_OPTIONS", '{"temperature": 1, "max_completion_tokens": 4096}')
    server = judge(reply(LINES))
    found = verdicts("Exact Answer: forty-two {x}", "Exact Answer: forty-two {x}")
    assert [(one.score, one.reason) for one in found] == [(1.0, "judge: right, confidence 90")] * 2
    ((path, body),) = server.asked
    assert path == "/v1/chat/completions" and server.headers[0]["Authorization"] == "Bearer sk-secret"
    assert {name: body[name] for name in ("model", "temperature", "max_completion_tokens")} == {
        "model": "qwen", "temperature": 1, "max_completion_tokens": 4096}
    (message,) = body["messages"]
    for part in ("What is six times seven?", "Answer: forty-two {x}\n</response>", "Reference answer:\n42\n", *hle.FIELDS):
        assert part in message["content"]
    assert "think" not in message["content"] and "sk-secret" not in json.dumps(body)
    assert "sk-secret" not in repr(hle.judge())


def test_each_answer_gets_its_own_verdict(judge):
    """Fault: replies of a batch in another order than its answers."""
    server = judge(reply(LINES))

    class Echo:  # yes where the response holds a 7
        def __len__(self):
            return 1

        def __getitem__(self, _):
            prompt = server.asked[-1][1]["messages"][0]["content"]
            said = prompt.split("<response>\n")[1].split("\n")[0]
            return reply(f"correct: {'yes' if '7' in said else 'no'}\nextracted_final_answer: {said}")
    server.answers = Echo()
    found = verdicts(*(f"n{i}" for i in range(20)))
    assert [one.score for one in found] == [float("7" in f"{i}") for i in range(20)]
    assert found[3].reason == "judge: wrong answer: n3, confidence 100"


@pytest.mark.parametrize("text, opinion", [
    (LINES, ("42", True, 90)),
    ("**extracted_final_answer**: 42\n**correct:** no\n**confidence:** 12.5%", ("42", False, 12.5)),
    ("<think>correct: no</think>\n" + LINES, ("42", True, 90)),
    ("Correct: Yes.", ("", True, 100)),
    ('{"extracted_final_answer": "42", "reasoning": "", "correct": "yes", "confidence": 90}', ("42", True, 90)),
    ('```json\n{"extracted_final_answer": 42, "correct": false}\n```', ("42", False, 100)),
    ("correct: yes\ncorrect: no", None),  # two opinions are none
    ("The response said\ncorrect: yes\nreasoning: wrong\ncorrect: no", None),
    ("reasoning: it is correct: yes", None), ("correct: perhaps", None), ("yes", None), ("", None), ("[1]", None),
    ("{}", None),
    ('{"correct": "yes"', None), ("correct: yes and no", None),
])
def test_replies_of_judges(text, opinion):
    """Fault: a reply read as what it does not say, above all as right."""
    assert hle.read(text) == (hle.Opinion(*opinion) if opinion else None)


def test_a_reply_that_cannot_be_read_is_asked_again_then_fails_and_is_shown(judge):
    server = judge(reply("Let me see."), reply(LINES))
    assert verdicts("a")[0].score == 1.0 and len(server.asked) == 2
    judge(reply("I cannot\njudge this."))
    (found,) = verdicts("b")
    assert (found.score, found.failed) == (0.0, True)
    assert found.reason == "judge: a reply that cannot be read: 'I cannot judge this.'"


def test_passing_trouble_is_tried_again(judge):
    server = judge((429, {"error": "slow down"}), (503, b""), reply(LINES))
    assert verdicts("a")[0].score == 1.0 and len(server.asked) == 3


@pytest.mark.parametrize("answers, said", [
    ([(401, {"error": "no key"})], r"^the judge of HLE at http://127.0.0.1:\d+/v1/chat/completions refuses .* 401: .*no key"),
    ([(200, {"choices": []})], r"answers without choices\[0\].message.content"),
    ([(500, b"down")], r"cannot be reached \(5 attempts; the last: status 500: down\)"),
])
def test_a_judge_that_cannot_be_asked_stops_the_run(judge, answers, said):
    """Fault: a whole benchmark of zeros because of a key."""
    judge(*answers)
    with pytest.raises(StudyError, match=said):
        verdicts("a")


def test_half_a_judge_is_an_error(monkeypatch):
    monkeypatch.setenv("M2RL_JUDGE", "localhost:8000/v1")
    with pytest.raises(StudyError, match="^M2RL_JUDGE needs M2RL_JUDGE_MODEL"):
        verdicts("a")
    monkeypatch.setenv("M2RL_JUDGE_MODEL", "qwen")
    with pytest.raises(StudyError, match="^M2RL_JUDGE='localhost:8000/v1' is no address"):
        verdicts("a")
    monkeypatch.setenv("M2RL_JUDGE_OPTIONS", "[1]")
    with pytest.raises(StudyError, match="M2RL_JUDGE_OPTIONS='\\[1\\]' is no JSON object"):
        verdicts("a")


def test_a_judge_is_not_asked_from_the_worker(judge, monkeypatch):
    """Fault: a judge killed after the worker's ten seconds; or miniature rows sent to a judge."""
    judge(reply(LINES))
    monkeypatch.setattr(worker, "verify", lambda *_: pytest.fail("the worker was asked"))
    monkeypatch.setattr(worker, "start", lambda *_: pytest.fail("the worker was started"))
    prepare([row("42")])
    assert verdicts("a")[0].score == 1.0
    monkeypatch.undo()
    miniature = Row("hle/0", "science", "hle", "", (), {"exact": "12 N"})
    assert verdicts("Exact Answer: 12 N", asked=miniature)[0].reason == "right"


# --- without


@pytest.mark.parametrize("gold, answer, reason", [
    ("42", "Explanation: so.\nExact Answer: 42\nConfidence: 90%", "rule: right"),
    ("42", "Answer: 42\nConfidence: 90%", "rule: right"),  # the official form of today
    ("42", "**Answer:** 42.0", "rule: right"), ("Paris", "Answer: paris.", "rule: right"),
    (r"\frac{1}{2}", r"Answer: $\frac{2}{4}$", "rule: right"), ("$x+1$", "Exact Answer: 1+x", "rule: right"),
    ("42", "Answer: 43", "rule: wrong answer: 43"), ("42", "It is 42.", "rule: no 'Answer:'"),
    ("42", "Answer: 42 or 43", "rule: wrong answer: 42 or 43"), ("42", "Answer:\nConfidence: 42", "rule: no 'Answer:'"),
    ("listen", "Answer: silent", "rule: wrong answer: silent"),  # the same letters are not the same product
    ("42", "Answer: 42\nExact Answer: 43", "rule: wrong answer: 43"),
    ("1", r"Answer: 1} \boxed{2", r"rule: wrong answer: 1} \boxed{2"),
])
def test_the_rule_is_a_lower_bound(gold, answer, reason):
    """Fault: a rule that pays what a judge would not, or that does not say that it was the rule."""
    found = hle.by_rule(row(gold), answer)
    assert (found.reason, found.score) == (reason, float(reason == "rule: right"))


@pytest.mark.parametrize("gold, answer, score", [
    ("C", "Explanation: A is wrong.\nAnswer: C\nConfidence: 80%", 1.0), ("M", "Answer: M", 1.0), ("C", "Answer: D", 0.0),
    ("C", "The answer is C.", 0.0), ("C", "Answer: A, B, C", 0.0), ("C", "Answer: C. 12 N", 1.0),
    ("None of these", "Answer: none of these", 1.0),
])
def test_letters_by_the_rule(gold, answer, score):
    assert hle.by_rule(row(gold, "multipleChoice"), answer).score == score


def test_the_rule_runs_where_it_can_be_killed(monkeypatch):
    """Fault: sympy in the trainer's own process, where an endless answer ends the run."""
    monkeypatch.setattr(worker, "LIMIT", 3.0)
    prepare([row("42")])
    endless, fine = verdicts("Answer: 9^{9^{9}}", "Answer: 42")
    assert (endless.reason, fine.reason) == ("verifier killed after 3 s", "rule: right")


def test_an_unknown_kind_of_answer_is_an_error():
    with pytest.raises(ValueError, match="row 'hle/3': answer_type 'image' is none of"):
        hle.by_rule(row("C", "image"), "Answer: C")
