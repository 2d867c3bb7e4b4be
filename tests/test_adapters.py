"""Our reward as slime, verl and TRL call it, and our rows as they read them; none of the three is needed here."""
from __future__ import annotations

import asyncio
import json
import subprocess
import sys
import threading
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from types import SimpleNamespace

import pytest
import toy_verifier
from toy_verifier import ERRORS

from m2rl_core import domains
from m2rl_core.models import policy as policies
from m2rl_core.adapters import export as exports
from m2rl_core.adapters import scoring, slime, trl, verl
from m2rl_core.domains import Row, Verdict, generator, module, rewards
from m2rl_core.errors import StudyError
from m2rl_core.real import cli

END = "<|im_end|>"


def spoken(messages):
    """(the assistant's turns, the same with the tools' answers as slime's text has them, as verl's has them)."""
    turns = [m["content"] for m in messages if m["role"] == "assistant"]
    marked, bare, replied = "", "", False
    for message in messages:
        if message["role"] == "tool":
            reply = f"<tool_response>\n{message['content']}\n</tool_response>"
            marked += ("\n" if replied else f"{END}\n<|im_start|>user\n") + reply
            bare += ("\n" if replied else "\nuser\n") + reply
        else:
            marked += f"{END}\n<|im_start|>assistant\n" * replied + message["content"]
            bare += "\nassistant\n" * replied + message["content"]
        replied = message["role"] == "tool"
    return turns, marked + END, bare


@pytest.fixture(scope="module")
def said(toy_rows, episodes):
    """(row, turns, slime's text, verl's text) with right and wrong answers to every domain, some of several turns."""
    rng, found = generator("adapters"), []
    for row in (*toy_rows, *episodes):
        for messages in (module(row.domain).respond(row), module(row.domain).spoil(row, rng)):
            found.append((row, *spoken(messages)))
    assert {len(turns) for _, turns, *_ in found} >= {1, 3}
    return found


@pytest.fixture(scope="module")
def wanted(said):
    """Our own reward of each."""
    scores = [v.score for v in rewards([row for row, *_ in said], [turns for _, turns, *_ in said])]
    assert {0.0, 1.0} == set(scores)
    return scores


def sample(row, text):
    return SimpleNamespace(response=text, metadata={scoring.KEY: row.to_json(), "tools": []}, label=row.id, reward=None)


def extra(row):
    return {"index": 0, scoring.KEY: row.to_json(), "num_turns": 2, "rollout_reward_scores": {}}


def test_slime_gets_our_rewards_one_by_one_and_by_groups(said, wanted):
    """Faults: a turn cut at the wrong place, an end marker in the answer, rewards in another order than samples."""
    samples = [sample(row, marked) for row, _, marked, _ in said]

    async def run():
        single = await asyncio.gather(*(slime.reward(None, one) for one in samples))
        return single, await slime.reward(None, samples, evaluation=False)

    single, group = asyncio.run(run())
    assert single == wanted and group == wanted


def test_verl_gets_our_rewards_from_threads_and_in_a_batch(said, wanted):
    """Faults: tool results without special tokens not found, an answer scored by a neighbour's verdict."""
    def one(entry):
        row, _, _, bare = entry
        return verl.compute_score(data_source="m2rl/x", solution_str=bare, ground_truth=row.id, extra_info=extra(row),
                                  reward_router_address=None)

    with ThreadPoolExecutor(8) as pool:
        found = list(pool.map(one, said))
    assert [f["score"] for f in found] == [f["acc"] for f in found] == wanted
    assert {tuple(f) for f in found} == {("score", "acc", "verifier_failed")}  # verl makes a column of each key
    rows, none = [row for row, *_ in said], [""] * len(said)
    assert verl.compute_scores(none, [bare for *_, bare in said], none, [extra(row) for row in rows]) == found


def test_trl_gets_our_rewards_of_texts_and_of_messages(said, wanted):
    """Faults: a tool's message taken for the assistant's, thoughts or calls that TRL parsed lost, metrics of other rows."""
    rows = [row for row, *_ in said]
    column = {scoring.KEY: [row.to_json() for row in rows], "domain": [row.domain for row in rows]}
    logged = {}
    for completions in ([bare for *_, bare in said], [talk(turns) for _, turns, *_ in said]):
        assert trl.reward(prompts=[[]] * len(rows), completions=completions, completion_ids=None, trainer_state=None,
                          log_extra=None, log_metric=logged.__setitem__, **column) == wanted
    for domain in domains.DOMAINS:
        scores = [score for row, score in zip(rows, wanted, strict=True) if row.domain == domain]
        assert logged[f"reward/{domain}"] == sum(scores) / len(scores)
    assert logged["verifier_failed"] == 0
    assert trl.reward(prompts=[[]], completions=[bare for *_, bare in said[:1]], **{scoring.KEY: column[scoring.KEY][:1]})


def talk(turns):
    """The messages of a completion, a tool's answer after each but the last."""
    found = []
    for turn in turns:
        found += [{"role": "assistant", "content": turn}, {"role": "tool", "name": "t", "content": "{}\n</think>"}]
    return found[:-1]


def test_messages_that_trl_parsed_are_put_together_again(episodes):
    """Fault: a right call without its thoughts fails the format gate, or without its markup is no call."""
    row = next(row for row in domains.training_rows("agent", "rl", 40, 2) if row.truth["kind"] == "single")
    turn = module("agent").respond(row)[0]["content"]
    call = json.loads(turn.split("<tool_call>\n")[1].split("\n</tool_call>")[0])
    parsed = {"role": "assistant", "reasoning_content": "need it", "content": "",
              "tool_calls": [{"type": "function", "function": call}]}
    ask = {scoring.KEY: [row.to_json()] * 3}
    cut = {**parsed, "tool_calls": []}
    assert trl.reward([[]] * 3, [[parsed], [cut], [{"role": "assistant", "content": [{"type": "text", "text": turn}]}]],
                      **ask) == [1, 0, 1]


def test_markup_of_a_tool_result_cuts_no_other_answer(toy_rows):
    """Fault: a text about tool results in an instruction task becomes two turns, of which one fails the format gate."""
    row = next(row for row in toy_rows if row.domain == "if")
    text = "<think>\n\n</think>\n\nx\nuser\n<tool_response>\n1\n</tool_response>\nassistant\ny"
    assert scoring.turns_of(row, text) == [text]
    assert scoring.turns_of(row, text + END + "\n") == [text]


@pytest.fixture
def toy(monkeypatch):
    """The toy verifier in place of every domain's, and nothing counted yet."""
    monkeypatch.setattr(domains, "module", lambda domain: toy_verifier)
    monkeypatch.setattr(scoring, "failures", type(scoring.failures)())
    toy_verifier.asked.clear()


def row(i, domain="coding"):  # whose verifier is called in place
    return Row(str(i), domain, "", "", (), {})


def test_a_verifier_that_breaks_down_scores_0_is_counted_and_logged_once(toy, caplog):
    """Faults: a trainer of days that ends at one strange answer; a log that says it a million times; silence."""
    def score(i, answer):
        return verl.compute_score("", f"</think>{answer}", "", extra(row(i)))

    assert [score(i, answer)["score"] for i, answer in enumerate(("fine", "raise", "nan", "fine"))] == [1, 0, 0, 1]
    assert score(1, "raise")["verifier_failed"] == 1 and score(0, "fine")["verifier_failed"] == 0
    assert scoring.failures == {"coding": 3}
    assert [record.getMessage().split(" (")[0] for record in caplog.records] == [
        "the verifier of coding broke down at row 1, which scores 0"]


@pytest.mark.parametrize("error", ERRORS)
def test_a_verifier_that_cannot_work_here_stops_the_trainer(toy, error):
    """Fault: a machine without a sandbox trains for days on zeros; or the error reaches one of those who wait only."""
    ask = [sample(row(i), f"</think>cannot {error}") for i in range(3)]
    with pytest.raises(ERRORS[error], match=f"no {error}"):
        asyncio.run(slime.reward(None, ask))
    with pytest.raises(ERRORS[error], match=f"no {error}"):
        verl.compute_score("", f"</think>cannot {error}", "", extra(row(0)))
    assert asyncio.run(slime.reward(None, sample(row(0), "</think>fine"))) == 1  # and the desk still serves


@pytest.mark.parametrize(("call", "where"), [
    (lambda held: asyncio.run(slime.reward(None, SimpleNamespace(response="", metadata=held))), "slime's sample.metadata"),
    (lambda held: verl.compute_score("", "", "", held), "verl's extra_info"),
    (lambda held: trl.reward([""], [""], **(held or {})), "TRL's data set"),
], ids=["slime", "verl", "trl"])
def test_a_file_of_another_make_is_named_in_one_line(call, where):
    """Fault: a KeyError deep in a trainer, from which nobody learns which file to use."""
    for held in (None, {}):
        with pytest.raises(StudyError, match=f"^{where}.* has no 'm2rl_row': .*data export") as caught:
            call(held)
        assert "\n" not in str(caught.value)
    with pytest.raises(StudyError, match="holds no row of this package"):
        call({scoring.KEY: ['{"id": 3}'] if where.startswith("TRL") else '{"id": 3}'})


def test_answers_that_come_meanwhile_are_verified_together(monkeypatch):
    """Faults: thousands of batches of one; an answer left behind as the desk looked away; a domain that waits for another."""
    held, begun, batches = threading.Event(), threading.Event(), []

    def slow(rows, transcripts):
        batches.append([(r.domain, r.id) for r in rows])
        if rows[0].domain == "math" and rows[0].id == "0":
            begun.set()
            assert held.wait(20)
        return [Verdict(float(r.id)) for r in rows]

    monkeypatch.setattr(domains, "rewards", slow)
    desk = scoring.Desk()
    first = desk.ask(row(0, "math"), [])
    assert begun.wait(20)
    rest = [desk.ask(row(i, "math"), []) for i in range(1, 300)]
    assert desk.ask(row(7, "if"), []).result(20).score == 7  # while math is busy
    assert rest[10].cancel()  # slime cancels what it aborts
    held.set()
    assert first.result(20).score == 0
    assert [f.result(20).score for i, f in enumerate(rest) if i != 10] == [i for i in range(1, 300) if i != 11]
    assert [len(batch) for batch in batches if batch[0][0] == "math"] == [1, 255, 43]
    assert desk.ask(row(5, "math"), []).result(20).score == 5


def test_no_adapter_imports_a_trainer_or_torch():
    """Fault: slime's workers load our trainer, or a machine without TRL cannot use verl."""
    found = subprocess.run([sys.executable, "-c", "import sys; from m2rl_core.adapters import export, slime, trl, verl; "
                            "print(*sorted({'torch', 'trl', 'verl', 'slime', 'transformers'} & sys.modules.keys()))"],
                           capture_output=True, text=True, check=True)
    assert found.stdout.strip() == ""


# ---- our rows as their files

@pytest.fixture(scope="module")
def rows(toy_rows, episodes):
    kept = {row.id: row for row in (*toy_rows, *episodes)}.values()
    assert any(row.tools for row in kept) and any(scoring.many_turns(row) for row in kept)
    return list(kept)


def told(policy, row):
    """The text of a row's prompt, as our sampler tokenises it."""
    return policy.tokenizer.decode(policies.encode_prompt(policy, row.messages, row.tools))


def test_slimes_file_gives_our_prompts_and_rows(policy, rows, tmp_path):
    """Faults: a prompt without its tools, a row changed on the way, a row with an environment trained without one."""
    report = exports.export("slime", rows, tmp_path)
    kept = [row for row in rows if not scoring.many_turns(row)]
    lines = [json.loads(line) for line in (tmp_path / "train.jsonl").read_text().splitlines()]
    assert len(lines) == len(kept) == sum(report["rows"].values())
    assert report["left out, with replies"] == {"agent": len(rows) - len(kept)}
    for line, row in zip(lines, kept, strict=True):  # as slime's Dataset reads a line
        assert isinstance(line["tools"], list)
        assert policy.tokenizer.apply_chat_template(line["prompt"], tools=line["tools"], tokenize=False,
                                                    add_generation_prompt=True) == told(policy, row)
        assert scoring.row_of(line["metadata"], "") == row


@pytest.mark.parametrize("trainer", ["verl", "trl"])
def test_verls_and_trls_files_give_our_prompts_and_rows(policy, rows, tmp_path, trainer, monkeypatch):
    """Faults: tools written in other words than the chat template's, Arrow's None in a row, a group of another schema."""
    from datasets import load_dataset
    monkeypatch.setattr(exports, "PIECE", 2000)  # several row groups
    exports.export(trainer, rows, tmp_path / "data", policy.tokenizer, all_turns=True)
    found = load_dataset(str(tmp_path / "data"), split="train", cache_dir=str(tmp_path / "cache"))  # as `trl grpo` does
    assert len(found) == len(rows)
    for number, (line, row) in enumerate(zip(found, rows, strict=True)):
        assert policy.tokenizer.apply_chat_template(line["prompt"], tokenize=False,
                                                    add_generation_prompt=True) == told(policy, row)
        held = line["extra_info"] if trainer == "verl" else line
        assert scoring.row_of(held, "") == row
        if trainer == "verl":
            assert (line["data_source"], line["extra_info"]["index"]) == (f"m2rl/{row.domain}", number)
            assert line["reward_model"] == {"style": "rule", "ground_truth": row.id}


def test_a_row_comes_back_with_its_tools_in_their_order(policy, rows):
    """Fault: keys sorted on the way; equal as rows, but a chat template then writes other text into the prompt."""
    assert any(told(policy, row) != told(policy, sorted_tools(row)) for row in rows)
    assert [told(policy, Row.from_json(row.to_json())) for row in rows] == [told(policy, row) for row in rows]


def sorted_tools(row):
    return Row(**{**row.__dict__, "tools": tuple(json.loads(json.dumps(row.tools, sort_keys=True)))})


def test_a_system_turn_of_ones_own_keeps_its_text_beside_the_tools(words):
    """Fault: the row's own system message lost, or said twice, where tools are written into it."""
    class Template:
        """Qwen3's way: the row's system text first, then the tools."""
        def apply_chat_template(self, talk, tools, tokenize, add_generation_prompt):
            system, rest = ([talk[0]["content"]], talk[1:]) if talk[0]["role"] == "system" else ([], talk)
            system += [f"# Tools\n{json.dumps(tools)}"] if tools else []
            head = "<|im_start|>system\n" + "\n\n".join(system) + f"{END}\n" if system else ""
            return head + "".join(f"<|im_start|>{m['role']}\n{m['content']}{END}\n" for m in rest)

    messages = ({"role": "system", "content": "Be kind."}, {"role": "user", "content": "Hello"})
    found = exports.with_tools(Row("1", "agent", "", "", messages, {}, ({"name": "f"},)), Template())
    assert found == [{"role": "system", "content": 'Be kind.\n\n# Tools\n[{"name": "f"}]'}, messages[1]]
    kept = words.chat_template
    try:
        for head in ("", "<|im_start|>system\nBe kind.<|im_end|>\n"):  # no system turn, and one without the tools
            words.chat_template = head + "{{ messages[-1].content }}{% if tools %} with tools{% endif %}"
            with pytest.raises(StudyError, match="writes tools elsewhere than into a system turn"):
                exports.with_tools(Row("1", "agent", "", "", messages, {}, ({"name": "f"},)), words)
    finally:
        words.chat_template = kept


def test_the_command_says_what_it_wrote_and_what_to_type(tmp_path, capsys, policy):
    """Faults: a domain asked for and not written; flags of another file than the one written."""
    policies.save(policy, tmp_path / "model")
    for trainer, file in (("slime", "train.jsonl"), ("verl", "train.parquet"), ("trl", "train.parquet")):
        out = tmp_path / trainer
        assert cli.main(["export", "--for", trainer, str(out), "--profile", "smoke", "--domains", "if,agent",
                         "--model", str(tmp_path / "model")]) == 0
        text = capsys.readouterr().out
        report = json.loads((out / "report.json").read_text())
        assert set(report["rows"]) == {"if", "agent"} and "left out: they need a tool loop" in text
        assert report["flags"] in text and str(out if trainer == "trl" else out / file) in text
        assert f"m2rl_core.adapters.{trainer}" in text


def test_the_readme_has_the_flags_that_the_command_prints():
    """Fault: a user types a flag that was renamed here, or that the file written does not have."""
    text = (Path(__file__).resolve().parent.parent / "README.md").read_text()
    for trainer in exports.TRAINERS:
        for flag in exports.flags(trainer, Path(f"data/{trainer}")).split():
            assert flag in text, flag


def test_a_blends_rows_are_verified_by_the_rule_that_was_asked_for(tmp_path):
    """Faults: a training by another rule than the study's; a rule that reaches another domain's rows."""
    for domain in domains.DOMAINS:
        rows = domains.training_rows(domain, "rl", 2, 4)
        (tmp_path / f"{domain}.jsonl").write_text("".join(row.to_json() + "\n" for row in rows))
    assert cli.main(["export", "--for", "slime", str(tmp_path / "out"), "--blend", str(tmp_path), "--turns", "all",
                     "--rule", "math=last_box", "--rule", "science=first_letter"]) == 0
    found = [scoring.row_of(json.loads(line)["metadata"], "")
             for line in (tmp_path / "out" / "train.jsonl").read_text().splitlines()]
    assert len(found) == 10
    assert {row.domain: row.truth.get("rule") for row in found} == {
        "math": "last_box", "coding": None, "science": "first_letter", "if": None, "agent": None}


@pytest.mark.parametrize(("arguments", "line"), [
    (["--for", "verl"], "has tools, which verl and TRL write into no prompt: --model FOLDER"),
    (["--for", "slime", "--domains", "maths"], "--domains maths: the domains are math"),
    (["--for", "slime", "--profile", "smok"], "did you mean 'smoke'"),
    (["--for", "trl", "--blend", "nowhere"], "data rl --out nowhere"),
    (["--for", "slime", "--rule", "math=lastbox"], "math has every_box, last_box, deepscaler"),
    (["--for", "slime", "--rule", "coding=strict"], "coding has no rules"),
])
def test_what_cannot_be_exported_is_said_in_one_line(tmp_path, capsys, arguments, line):
    """Faults: a traceback; a file half written that a trainer would take."""
    profile = [] if {"--profile", "--blend"} & set(arguments) else ["--profile", "smoke"]
    assert cli.main(["export", str(tmp_path / "out"), *arguments, *profile]) == 2
    error = capsys.readouterr().err
    assert line in error and error.count("\n") == 1
    assert not [path for path in (tmp_path / "out").glob("*")]


def test_rows_that_cannot_travel_are_refused(episodes, tmp_path):
    """Faults: an empty training file; a message whose calls are dropped in silence; a good file lost to a bad row."""
    with pytest.raises(StudyError, match=r"no row left to export, \d need a tool loop: --turns all takes them"):
        exports.export("slime", episodes, tmp_path)
    exports.export("slime", episodes, tmp_path, all_turns=True)
    before = (tmp_path / "train.jsonl").read_bytes()
    odd = Row("odd", "if", "", "", ({"role": "user", "content": "x", "tool_calls": []},), {})
    with pytest.raises(StudyError, match="^odd: a message with content, role, tool_calls"):
        exports.export("slime", [*episodes, odd], tmp_path, all_turns=True)
    assert (tmp_path / "train.jsonl").read_bytes() == before
