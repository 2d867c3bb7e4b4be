"""Training on real rows: what a stage gets of the blends that `real` made, and what it refuses."""
import dataclasses
import json
from pathlib import Path
from types import SimpleNamespace

import pytest
import toy_foreign

from m2rl_core import data
from m2rl_core.domains import Row
from m2rl_core.errors import StudyError
from m2rl_core.profile import load_profile
from m2rl_core.real import chat, rl_blend

CHAT = "nvidia/Nemotron-Instruction-Following-Chat-v1"


@pytest.fixture
def stage(tmp_path):
    """A function that gives a builder's context of the smoke profile with real rows."""
    def make(**changes):
        smoke = load_profile("smoke")
        told: list[str] = []
        settings = dataclasses.replace(smoke.data, **changes.pop("data", {}))
        rl = dataclasses.replace(smoke.rl, rows=smoke.rl.rows | changes.pop("rows", {}))
        profile = dataclasses.replace(smoke, rows="real", data=settings, rl=rl, **changes)
        return SimpleNamespace(profile=profile, out=tmp_path / "store" / "models" / "x-1", log=told.append, told=told)
    return make


@pytest.fixture
def blend(monkeypatch):
    """An RL blend of twenty science rows, the longer ones of a prompt of many words; agents' are all long."""
    def build(folder, settings, report):
        folder.mkdir(parents=True, exist_ok=True)
        for domain in ("science", "agent"):
            rows = [Row(f"{domain}/{i}", domain, "x", f"{domain}:{i}", ({"role": "user", "content": "why " * (
                200 if domain == "agent" or i % 4 == 3 else 2) + str(i)},), {"letter": "B"}) for i in range(20)]
            (folder / f"{domain}.jsonl").write_text("".join(row.to_json() + "\n" for row in rows))
    monkeypatch.setattr(rl_blend, "build", build)


def test_as_many_prompts_as_asked_for_none_too_long_in_the_blends_order(stage, blend):
    """Faults: prompts that leave no room to answer; always the first rows of the file; another draw for another model."""
    words = toy_foreign.words()
    ctx = stage(rows={"science": 10, "agent": 12}, data={"prompt_tokens": 40, "rules": {"science": "first_letter"}})
    rows = data.training_prompts(ctx, ("science", "agent"), words)
    science = [row for row in rows if row.domain == "science"]
    assert len(science) == 10 and max(data.prompt_length(words, row) for row in science) <= 40
    numbers = [int(row.id.split("/")[1]) for row in science]
    assert numbers == sorted(numbers) and numbers != list(range(10))
    assert rows == data.training_prompts(ctx, ("science", "agent"), words)
    assert {row.truth["rule"] for row in science} == {"first_letter"} and len(rows) == 22  # the agent's are never too long
    assert "science: 10 prompts of 15; 5 were longer than 40 tokens" in ctx.told
    assert data.training_prompts(stage(seed=2, rows={"science": 10}), ("science",), words) != science


def test_fewer_rows_than_asked_for_are_an_error_but_for_a_trial(stage, blend):
    words = toy_foreign.words()
    said = "rl.rows.science: 16 prompts, but the blend has 15 of at most 40 tokens and 20 in all"
    with pytest.raises(StudyError, match=said):
        data.training_prompts(stage(rows={"science": 16}, data={"prompt_tokens": 40}), ("science",), words)
    trial = stage(rows={"science": 16}, data={"prompt_tokens": 40, "first": 20})
    assert len(data.training_prompts(trial, ("science",), words)) == 15


def test_sft_rows_come_from_table_1_with_qwens_empty_thoughts(stage, tmp_path, monkeypatch):
    """Faults: loss on the prompt or on an empty think block; a repeated row stored ten times; a row beyond the context."""
    folder = tmp_path / "by hand" / CHAT.replace("/", "__") / "data"
    folder.mkdir(parents=True)
    said = [f"{i} " * (1 + 300 * (i == 2)) for i in range(3)]
    rows = [{"messages": [{"role": "user", "content": f"say {i}"}, {"role": "assistant", "content": text}]}
            for i, text in enumerate(said)]
    for name in ("chat_if", "structured_outputs"):
        (folder / f"{name}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows[:3 if name == "chat_if" else 1]))
    monkeypatch.setenv("M2RL_DATA", str(tmp_path / "by hand"))
    lines = tuple(line for line in load_profile("smoke").sft.blend if line.type == "Chat")
    ctx = stage(sft=dataclasses.replace(load_profile("smoke").sft, blend=lines), data={"first": 5})
    words = toy_foreign.words()
    found = data.RealSft(ctx, words, context=100)
    assert len(found) == 40
    assert found.told == [{"type": "Chat", "domain": "if", "pool": 4, "sampling": "repeat 10 times", "rows": 40}]
    ids, learn = found[0]
    assert ids == chat.encode(words, [*rows[0]["messages"]])[0][:100] and len(ids) == len(learn)
    said = words.decode([i for i, flag in zip(ids, learn, strict=True) if flag])
    assert said.strip().startswith("0") and said.endswith("<|im_end|>") and "think" not in said and "say" not in said
    assert max(len(found[i][0]) for i in range(len(found))) == 100
    assert found.examples()["Chat"]["messages"][0]["content"] == "say 0"
    short = data.RealSft(stage(sft=ctx.profile.sft, data={"first": 5, "row_tokens": 30}), words, context=100)
    assert max(len(short[i][0]) for i in range(len(short))) == 30
    again = data.batch_of(found, 8, 3, 1, "sft")
    assert again == data.batch_of([found[i] for i in range(len(found))], 8, 3, 1, "sft")
    assert [list(row[0]) for row in again] == [list(row[0]) for row in data.batch_of(found, 8, 3, 1, "sft")]
    assert not list(Path(ctx.out.parents[1] / "data" / "sft").glob("*/nothing"))
