"""BFCL v3: verdicts of the official code, the two traps of its multi-turn checker, and the world its tools act on.

The wheel belongs to requirements-nodeps.txt. Where bwrap is absent, what needs it is skipped.
"""
from __future__ import annotations

import copy
import dataclasses
import importlib.util
import json
import os
import random
import shutil
import subprocess
import sys
import time
from collections import Counter
from pathlib import Path

import bfcl_answers
import numpy as np
import pytest
from bfcl_answers import DONE, gold, gold_turns, write

from m2rl_core import sandbox
from m2rl_core.domains import Row, UserSays, bfcl, bfcl_wheel, rewards
from m2rl_core.domains.bfcl import CATEGORIES, MULTI, REFUSED, SINGLE, calls_of, code_of
from m2rl_core.domains.environments import open_environment
from m2rl_core.engines.rollout import Rollout
from m2rl_core.errors import StudyError
from m2rl_core.evaluate import evaluate
from m2rl_core.metrics import stats
from m2rl_core.models.policy import Policy
from m2rl_core.profile import load_profile
from m2rl_core.real import benchmarks, bfcl_rows, chat, hub, schema
from m2rl_core.sandbox.interpreter import Interpreter

needs_bwrap = pytest.mark.skipif(shutil.which("bwrap") is None,
                                 reason="bwrap is not installed: apt-get install bubblewrap")
REFERENCE = Path(__file__).with_name("bfcl_reference.py")
SAMPLE = 4  # items of each category


@pytest.fixture(scope="module")
def items() -> dict[str, list[Row]]:
    """All items of each category, in their order."""
    found = {name: [] for name in CATEGORIES}
    for row in bfcl_rows.rows():
        found[row.truth["category"]].append(row)
    return found


def official(cases=(), tools=(), scores=None) -> dict:
    """What the wheel's own runners say, in a process of their own: it evaluates calls as code."""
    asked = json.dumps({"verdicts": list(cases), "tools": list(tools), "scores": scores or {}})
    env = {**os.environ, "PYTHONPATH": os.pathsep.join(sys.path)}
    said = subprocess.run([sys.executable, str(REFERENCE)], input=asked, env=env, capture_output=True, text=True, check=True)
    return json.loads(said.stdout.splitlines()[-1])


def case(row: Row, answers: list[str]) -> dict:
    """A row and the model's turns as the official runner takes them."""
    truth = row.truth
    if truth["category"] not in MULTI:
        return {"category": truth["category"], "entry": {"id": row.id.split("/")[1], "function": truth["functions"]},
                "ground_truth": truth["ground_truth"], "answers": answers[0]}
    turns, episode = [[]], bfcl.Episode(row)
    for answer in answers:  # as the official inference groups steps by turns
        turns[-1].append(answer)
        episode.take(answer)
        turns += [[] for _ in range(len(episode.turns) - len(turns))]
    entry = {"id": truth["test"], "initial_config": truth["initial_config"], "involved_classes": truth["involved_classes"]}
    return {"category": truth["category"], "entry": entry, "ground_truth": truth["ground_truth"], "answers": turns}


def judged(row: Row, *answers: list[str]):
    return rewards([row] * len(answers), [[f"</think>{turn}" for turn in turns] for turns in answers])


def one(items, name: str, class_name: str = "") -> Row:
    return next(row for row in items[name] if not class_name or row.truth["involved_classes"] == [class_name])


# --- verdicts


@needs_bwrap
def test_verdicts_are_the_official_ones(items):
    """Right answers and wrong ones of ten kinds, on items of all seventeen categories, against the wheel's own runners.

    Catches a call that is read otherwise, arguments changed on the way into the sandbox, state that leaks from answer to
    answer, a wrong language or category, and a rule for (ir)relevance or for ended episodes that is not theirs.
    """
    rng = random.Random(1)
    pairs = []
    for name, rows in items.items():
        for row in rng.sample(rows, SAMPLE):
            others = bfcl_answers.wrong(row, rng)
            pairs += [(row, turns) for turns in [gold(row), *rng.sample(others, min(len(others), 3))]]
    start = time.perf_counter()
    found = rewards([row for row, _ in pairs], [[f"</think>{turn}" for turn in turns] for _, turns in pairs])
    took = time.perf_counter() - start
    wanted = official([case(*pair) for pair in pairs])["verdicts"]
    differ = [(row.id, verdict, right, turns) for (row, turns), verdict, right in zip(pairs, found, wanted, strict=True)
              if (verdict.score == 1) != right]
    assert not differ, differ[:3]
    assert not any(verdict.failed for verdict in found)
    assert 0.2 < sum(wanted) / len(wanted) < 0.8, "the sample holds right answers and wrong ones"
    assert took / len(pairs) < 0.1, f"{1000 * took / len(pairs):.0f} ms a verdict"


@needs_bwrap
@pytest.mark.parametrize(("name", "least"), [(name, 9) for name in CATEGORIES if name not in bfcl.LANGUAGES]
                         + [(name, 6) for name in bfcl.LANGUAGES])
def test_right_answers_pass(items, name, least):
    """Catches functions, truths or a world that belong to another item, and types that no answer could have."""
    rows = items[name][:10]
    found = rewards(rows, [[f"</think>{turn}" for turn in gold(row)] for row in rows])
    assert sum(verdict.score for verdict in found) >= least, [verdict.reason for verdict in found]


@needs_bwrap
def test_reasons_say_what_is_wrong(items):
    row = one(items, "simple")
    (name, given), = bfcl_answers.gold_calls(row)
    right = write([(name, given)])
    found = judged(row, [right], [DONE], [write([(name, {**given, "base": 11})])], [right, DONE])
    assert [verdict.reason for verdict in found] == [
        "right", "simple_function_checker:wrong_count: Wrong number of functions.",
        "value_error:others: Invalid value for parameter 'base': 11. Expected one of [10].", "went on after the end"]
    irrelevant = judged(one(items, "irrelevance"), [DONE], [write([("f", {})])])
    assert [verdict.reason for verdict in irrelevant] == ["right", "called a tool"]
    assert [verdict.reason for verdict in judged(one(items, "live_relevance"), [DONE])] == ["no call"]


@pytest.mark.parametrize(("answer", "found"), [
    ('<tool_call>\n{"name": "a.b", "arguments": {"x": 1}}\n</tool_call>', [("a.b", {"x": 1})]),
    ('so\n<tool_call>\n{"name": "a", "arguments": {}}\n</tool_call>\n<tool_call>\n{"name": "b", "arguments": {}}'
     '\n</tool_call>', [("a", {}), ("b", {})]),
    ('<tool_call>{"name": "a", "arguments": {}}</tool_call>', []),  # the handler needs the line breaks
    ('<tool_call>\n{"name": "a", "arguments": {}}\n</tool_call>\n<tool_call>\n{"name"\n</tool_call>', []),  # one spoils all
    ('<tool_call>\n{"name": "a"}\n</tool_call>', []), ('<tool_call>\n[1]\n</tool_call>', []),
    ('<tool_call>\n{"name": "a", "arguments": [1]}\n</tool_call>', []),
    ('<tool_call>\n{"name": ["a"], "arguments": {}}\n</tool_call>', []), ("[" * 100_000, []),
    ("<tool_call>\n" + "[" * 100_000 + "\n</tool_call>", []), ("a(x=1)", []),
])
def test_what_counts_as_a_call(answer, found):
    assert calls_of(answer) == found


def test_arguments_as_text_count_in_multi_turn_items_only():
    said = '<tool_call>\n{"name": "a", "arguments": "{\\"x\\": 1}"}\n</tool_call>'
    assert calls_of(said) == [] and calls_of(said, multi_turn=True) == [("a", {"x": 1})]


# --- trap 1: names and arguments must not become code


INJECTED = [
    ("__import__('os').getpid", {}), ("ls", {"a=__import__('os').getpid(), b": True}), ("print", {"end": "x"}),
    ("globals", {}), ("ls.__globals__", {}), ("ls(a=True) or __import__('os').getpid", {}), ("exec", {"source": "1/0"}),
    ("ls", {"class": 1}), ("json.dumps", {"obj": 1}), ("importlib.import_module", {"name": "os"}), ("ls", {"": 1}),
]


@pytest.mark.parametrize("call", INJECTED)
def test_nothing_but_a_known_name_becomes_code(call):
    assert code_of(call, ["ls", "cat"]) == REFUSED


def test_values_become_literals():
    """Catches a value that leaves its quotes: whatever it is, Python reads back what JSON said."""
    values = ["'); __import__('os').getpid() #", '"""', "\\", "\n", "\ud800", {"a'b": [None, True, 1e300]}, -1, "é"]
    code = code_of(("ls", {f"a{i}": value for i, value in enumerate(values)}), ["ls"])
    import ast
    read = ast.parse(code, mode="eval").body
    assert read.func.id == "ls" and [ast.literal_eval(word.value) for word in read.keywords] == values


@needs_bwrap
@pytest.mark.parametrize("call", INJECTED)
def test_an_injected_call_gets_an_error_and_does_nothing(items, call):
    """Catches a call that reaches the wheel's eval: it answers with what the code gave, for instance a process id."""
    row = one(items, "multi_turn_base", "GorillaFileSystem")
    world = open_environment(row)
    said = world.step(write([call, ("pwd", {})]))
    assert len(said) == 2 and "current_working_directory" in said[1]
    assert said[0].startswith("Error during execution: name ") or said[0].endswith("invalid syntax (<string>, line 1)")


@needs_bwrap
def test_even_what_reaches_eval_stays_in_the_sandbox(items):
    """The second wall: the checkers run where there is no network, no answer file, and nothing of this process."""
    item = bfcl._item(one(items, "multi_turn_base", "GorillaFileSystem"))
    tries = ["__import__('os').listdir('/')", "__import__('os').getpid()", "open('/etc/passwd').read()",
             "__import__('os').fork()", "__import__('socket').socket()", "open('/tmp/x', 'w')",
             f"__import__('os').path.exists({str(bfcl_wheel.root())!r})", "__import__('os').getuid()"]
    said = bfcl_wheel.ask([{"kind": "execute", "steps": [tries], **item}])[0]["results"]
    assert str(os.getpid()) != said[1] and said[6] == "False" and said[7] != "0"
    assert not {"etc", "root", "home"} & set(eval(said[0]))
    assert all(text.startswith("Error during execution: ") for text in said[2:6])


# --- trap 2: no state from one answer to the next


@needs_bwrap
def test_a_wrong_rollout_spoils_no_other(items):
    """Catches worlds that are kept by item: after a wrong rollout, a right one of the same item is scored wrong."""
    for name in MULTI:
        for row in items[name][:6]:
            *turns, last = bfcl_answers.steps(gold_turns(row))
            wrong, right = bfcl_answers.spoken([*turns, last[:-1]]), gold(row)
            found = judged(row, wrong, right, wrong, right, right)
            assert [verdict.score for verdict in found] == [0, 1, 0, 1, 1], row.id


@needs_bwrap
def test_an_environment_shares_nothing_with_another(items):
    row = one(items, "multi_turn_base", "GorillaFileSystem")
    first, second = open_environment(row), open_environment(row)
    made = write([("mkdir", {"dir_name": "mine"})])
    assert "mine" not in second.step(write([("ls", {})]))[0]
    assert first.step(made) == ["None"] and "mine" in first.step(write([("ls", {})]))[0]
    assert "mine" not in second.step(write([("ls", {})]))[0]
    assert "exists" in first.step(made)[0]  # and what an episode did before is still there


# --- the episode


@needs_bwrap
def test_an_episode_goes_as_the_official_one(items):
    """Tools answer, the user goes on when no tool is called, functions that were missing come in a turn of their own."""
    row = next(row for row in items["multi_turn_miss_func"] if row.truth["test"] == "multi_turn_miss_func_0")
    assert "sort" not in [tool["function"]["name"] for tool in row.tools]
    world, replies = open_environment(row), []
    for answer in gold(row):
        replies.append(world.step(answer))
    kinds = "".join("e" if reply is None else "u" if isinstance(reply[0], UserSays) else "t" for reply in replies)
    assert kinds == "u".join("t" * len(turn) for turn in row.truth["ground_truth"]) + "e"
    assert replies[kinds.index("u")] == [row.truth["turns"][0]]
    added, = (reply[0] for reply in replies if reply and bfcl_rows.MORE in reply[0])
    assert '"name": "sort"' in added
    assert json.loads(replies[0][0])["current_working_directory"] == "document"
    assert world.step(DONE) is None, "an episode that is over stays so"
    assert judged(row, gold(row))[0].score == 1
    assert open_environment(one(items, "simple")).step(DONE) is None


@needs_bwrap
def test_twenty_one_steps_end_the_episode(items):
    """Catches an endless turn, and one step more or less than the official limit; the wheel fails such an item unless
    it was at its last turn, where what was done counts."""
    row = items["multi_turn_base"][0]
    world, look = open_environment(row), write([("pwd", {})])
    replies = [world.step(look) for _ in range(22)]
    assert all(isinstance(reply, list) for reply in replies[:20]) and replies[20:] == [None, None]
    assert judged(row, [look] * 21)[0].reason == f"ended in turn 1 of {len(row.truth['ground_truth'])}"
    last = gold(row)[:-1]
    ended = [*last, *[look] * (21 - len(row.truth["ground_truth"][-1]))]
    found = judged(row, gold(row), ended, [*ended, DONE])
    assert [(one.score, one.reason) for one in found] == [(1, "right"), (1, "right"), (0, "went on after the end")]
    assert official([case(row, ended)])["verdicts"] == [True]


@needs_bwrap
def test_an_endless_call_costs_its_own_answer_only(items, monkeypatch):
    monkeypatch.setattr(bfcl_wheel, "SECONDS", 1)
    row = one(items, "multi_turn_base", "GorillaFileSystem")
    slow = dict(bfcl._item(row), kind="execute", steps=[["sum(iter(int, 1))"]])
    fine = dict(bfcl._item(row), kind="execute", steps=[["pwd()"]])
    found = bfcl_wheel.ask([slow, fine])
    assert found[0] == "time limit" and found[1]["results"][0].startswith('{"current_working_directory"')


# --- what a user can get wrong


def test_a_missing_wheel_and_another_version_are_named(monkeypatch):
    monkeypatch.setattr(bfcl_wheel.metadata, "version", lambda name: "2026.3.23")
    with pytest.raises(StudyError, match="needs bfcl-eval==2025.8.6.2, but 2026.3.23 is installed.*requirements-nodeps.txt$"):
        bfcl_wheel.root()
    monkeypatch.setattr(bfcl_wheel.importlib.util, "find_spec", lambda name: None)
    with pytest.raises(StudyError, match="which is not installed: pip install --no-deps"):
        bfcl_wheel.root()


def test_no_sandbox_is_no_reason_to_run_it_here(items, monkeypatch):
    monkeypatch.setattr(sandbox, "shared", lambda limits: Interpreter("bwrap is not installed"))
    with pytest.raises(StudyError, match="apt-get install bubblewrap"):
        bfcl.verify([one(items, "simple")], [[DONE]])


def test_an_unknown_category_is_named(items):
    row = one(items, "simple")
    strange = Row(**{**row.__dict__, "truth": {**row.truth, "category": "rest"}})
    with pytest.raises(StudyError, match="category 'rest' is none of BFCL v3: simple, "):
        bfcl.verify([strange], [[DONE]])


# --- rows


def test_every_item_is_there(items):
    assert {name: len(rows) for name, rows in items.items()} == CATEGORIES and sum(CATEGORIES.values()) == 4441
    assert len({row.id for rows in items.values() for row in rows}) == 4441
    row = items["parallel"][0]
    assert row.id == "bfcl_v3/parallel_0" and row.domain == "agent" and Row.from_json(row.to_json()) == row
    assert [tool["function"]["name"] for tool in row.tools] == ["spotify.play"], "names keep their dots"
    assert items["live_irrelevance"][0].truth["ground_truth"] == []


def test_the_first_rows_are_a_small_picture_of_all():
    """Catches an evaluation on the first few items that is one of the first category only."""
    counts = Counter(row.truth["category"] for row in bfcl_rows.rows()[:444])
    assert all(abs(counts[name] - n / 10) <= 1 for name, n in CATEGORIES.items())


def test_tools_are_the_official_ones_but_for_dots(items):
    """Catches a type, a hint or a note that BFCL's own form for models that call functions has otherwise."""
    pairs = [(function, name) for name, rows in items.items() if name not in MULTI for row in rows[:40]
             for function in row.truth["functions"]]
    wanted = official(tools=pairs)["tools"]
    for (function, category), tool in zip(pairs, wanted, strict=True):
        tool["function"]["name"] = function["name"]
        assert bfcl_rows.tool_of(function, category) == tool


def test_the_evaluation_takes_them_from_the_wheel(items, monkeypatch):
    """Faults: items asked of a hub, where the wheel has them; a trial of one category; a verifier found missing too late."""
    monkeypatch.delenv("M2RL_DATA", raising=False)
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    found = benchmarks.load("bfcl_v3", 200)
    assert len(found) == 200 and len({row.truth["category"] for row in found}) > 12
    if shutil.which("bwrap"):
        benchmarks.probe(found)
    assert rewards([items["live_relevance"][0]], [["I think not."]])[0].reason == "no call", "no thinking, yet it counts"


@needs_bwrap
def test_an_evaluation_scores_what_is_right_by_the_benchmarks_weights(items, policy):
    """The whole way from rows to a score, with an engine that plays right answers, and wrong ones to Java's items: they
    cost what the three languages' share is, and not what the items' is. Turns are taken through the environment."""
    chosen = [row for name in CATEGORIES for row in items[name][:2]]
    large = Policy(policy.weights, copy.deepcopy(policy.config), policy.tokenizer)
    large.config.max_position_embeddings = 10**6
    spec = dataclasses.replace(load_profile("smoke").eval, rows="real")
    scored = evaluate(large, "oracle", {"bfcl_v3": chosen}, {"bfcl_v3": 1}, spec, 1, Oracle())
    assert Counter(scored["category"]) == dict.fromkeys(CATEGORIES, 2)
    table = stats.score_table(scored, ["oracle"], ["bfcl_v3"], np.random.default_rng(0))
    assert table.loc[0, "bfcl_v3"] == pytest.approx(100 * (1 - 1 / 3 / 5 / 3))


class Oracle:
    """An engine whose policy says what is right, until the environment ends the episode; it calls no tool of Java's."""

    def sample(self, policy, rows, n, **settings):
        return [self.played(row) for row in rows]

    def played(self, row):
        rollout, world = Rollout(row, []), open_environment(row)
        for answer in [DONE] if row.truth["category"] == "java" else gold(row):
            rollout.turns.append(f"<think>\n</think>\n\n{answer}")
            if world.step(answer) is None:
                return rollout
        raise AssertionError(f"{row.id}: the episode goes on after the right answers")


def test_profiles_let_an_episode_come_to_its_end(items):
    """Catches a limit on turns, made for training, that ends most of the multi-turn items: they would all score 0."""
    longest = max(1 + len(row.truth["turns"]) for name in MULTI for row in items[name]) * (bfcl.STEPS + 1)
    for path in (Path(__file__).parent.parent / "params").glob("*.yaml"):
        asked = load_profile(path.stem).eval
        if asked.rows == "real":
            assert asked.sampled_by("bfcl_v3")["max_turns"] >= longest == 168, path.name


def test_profiles_leave_room_for_the_items(items):
    """Catches a context in which most multi-turn items cannot end, or an agent's prompt in training not even begin: with
    32,768 new tokens in a context of 34,816 all 800 items scored 0.

    No tokenizer of Qwen3 is here. In its tokens these prompts have at least 4.0 letters each (measured: 4.04 to 4.79), and the
    replies to right calls, but for long_context's, at most 1,200 tokens beside the prompt.
    """
    def tokens(row):
        return sum(len(text) for text, _ in chat.spans(row.messages, row.tools)) / 4.0

    talks = [tokens(row) + 1200 for name in MULTI if name != "multi_turn_long_context" for row in items[name]]
    singles = [tokens(row) for name in SINGLE for row in items[name]]
    wheel = importlib.util.find_spec("resources_servers").submodule_search_locations[0]
    example = json.loads((Path(wheel) / "workplace_assistant/data/example.jsonl").open().readline())["responses_create_params"]
    agent = sum(len(text) for text, _ in chat.spans(example["input"], schema.tools(example["tools"], "here"))) / 4.0
    assert 4000 < agent < 4500 and 8000 < max(talks) < 9500
    for path in (Path(__file__).parent.parent / "params").glob("*.yaml"):
        profile = load_profile(path.stem)
        if profile.model and profile.eval.rows == "real":
            context = profile.model.context
            assert max(*talks, *singles) <= context - profile.eval.sampled_by("bfcl_v3")["max_new_tokens"], path.name
            assert agent + 2000 <= context - max(profile.rl.max_new_tokens, profile.opd.max_new_tokens), path.name


def test_truths_do_not_reach_the_prompt(items):
    for name in ("simple", "multi_turn_miss_func"):
        row = items[name][0]
        assert "ground_truth" not in json.dumps([row.messages, row.tools])


@pytest.fixture
def by_hand(tmp_path, monkeypatch):
    """A copy of the data, as somebody would put it under M2RL_DATA; the folder with the questions."""
    folder = tmp_path / bfcl_rows.REPO.replace("/", "__")
    shutil.copytree(bfcl_wheel.root() / "data", folder, ignore=shutil.ignore_patterns("unused_datasets"))
    monkeypatch.setenv("M2RL_DATA", str(tmp_path))
    return folder


def change(path: Path, number: int, **fields) -> None:
    lines = path.read_text().splitlines()
    lines[number - 1] = json.dumps({**json.loads(lines[number - 1]), **fields})
    path.write_text("\n".join(lines))


def test_files_by_hand_come_first(by_hand):
    change(by_hand / "BFCL_v3_simple.json", 1, question=[[{"role": "user", "content": "changed"}]])
    (by_hand / "BFCL_v3_rest.json").write_text("not for us")
    found = {row.id: row for row in bfcl_rows.rows()}
    assert len(found) == 4441 and found["bfcl_v3/simple_0"].messages[0]["content"] == "changed"
    questions = hub.files(hub.sources()[bfcl_rows.REPO], [bfcl_rows.QUESTIONS])
    assert {row.id: row for row in bfcl_rows.rows(questions)} == found, "questions alone: the answers lie beside them"


@pytest.mark.parametrize(("spoil", "said"), [
    (lambda f: change(f / "BFCL_v3_simple.json", 3, function="f"),
     "BFCL_v3_simple.json, line 3: field function: expected a list"),
    (lambda f: change(f / "BFCL_v3_java.json", 2, function=[{"name": "f", "description": ""}]),
     r"BFCL_v3_java.json, line 2: field function\[0\].parameters: expected an object"),
    (lambda f: change(f / "possible_answer" / "BFCL_v3_simple.json", 4, ground_truth=None),
     "possible_answer/BFCL_v3_simple.json, line 4: field ground_truth"),
    (lambda f: change(f / "BFCL_v3_multi_turn_base.json", 5, involved_classes=["Nobody"]),
     r"line 5: field involved_classes\[0\]: no functions of 'Nobody'"),
    (lambda f: change(f / "BFCL_v3_simple.json", 3, id="simple_x"), "line 3: field id: no answer to 'simple_x'"),
    (lambda f: change(f / "BFCL_v3_simple.json", 3, id="simple_0"), "simple_0 stands there 2 times"),
    (lambda f: (f / "BFCL_v3_simple.json").write_text("{\n"), "BFCL_v3_simple.json, line 1: not JSON"),
    (lambda f: (f / "BFCL_v3_live_simple.json").unlink(), "0 of live_simple .expected 258. in .*: take all"),
    (lambda f: shutil.rmtree(f / "possible_answer"), "has no file possible_answer/"),
])
def test_bad_files_are_named(by_hand, spoil, said):
    spoil(by_hand)
    with pytest.raises(StudyError, match=said) as error:
        bfcl_rows.rows()
    assert "\n" not in str(error.value)
