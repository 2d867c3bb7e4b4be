"""Episodes in which the user goes on: BFCL's multi-turn items through both engines; the wheel's world is a stub here."""
from __future__ import annotations

import copy

import pytest
import toy_policy
from bfcl_answers import write

from m2rl_core import evaluate
from m2rl_core.domains import NO_ROOM, Row, UserSays, Verdict, bfcl, bfcl_wheel, rewards
from m2rl_core.engines.rollout import Rollout, _add_reply, logprobs, tool_reply
from m2rl_core.engines.vllm_engine import VllmEngine
from m2rl_core.models.policy import Policy, encode_prompt

THINK = "<think>\n\n</think>\n\n"
TOOL = {"type": "function", "function": {"name": "f", "description": "d", "parameters": {"type": "object", "properties": {}}}}
SAID = [THINK + write([("f", {}), ("g", {})]), THINK + "Done.", THINK + write([("f", {})]), THINK + "Done."]
REPLIES = [["ok", "Error during execution: name 'g' is not defined"], [UserSays("And now?")], ["ok"]]


@pytest.fixture
def row(monkeypatch):
    """An item of two turns whose one tool answers "ok"; the wheel finds all right."""
    def ask(questions):
        return [{"results": ["ok"] * len(one["steps"][-1])} if one["kind"] == "execute" else {"valid": True}
                for one in questions]
    monkeypatch.setattr(bfcl_wheel, "ask", ask)
    truth = {"kind": bfcl.KIND, "category": "multi_turn_base", "test": "multi_turn_base_0", "turns": ["And now?"],
             "names": ["f"], "initial_config": {}, "involved_classes": [], "ground_truth": [["f()"], ["f()"]]}
    return Row("bfcl_v3/0", "agent", "bfcl_v3", "", ({"role": "user", "content": "Do f."},), truth, (TOOL,))


def script(policy, said, replies) -> tuple[list[int], list[bool]]:
    """Token ids after the prompt, and which are sampled."""
    tokens, sampled = [], []
    for i, text in enumerate(said):
        spoken = [*policy.tokenizer.encode(text, add_special_tokens=False), policy.stop_ids[0]]
        heard = tool_reply(policy, replies[i]) if i < len(replies) else []
        tokens += [*spoken, *heard]
        sampled += [True] * len(spoken) + [False] * len(heard)
    return tokens, sampled


def test_the_users_words_are_what_the_template_writes(policy, row):
    """Fault: a user's next message put into the running context otherwise than the chat template writes the talk."""
    talk = [*row.messages, {"role": "assistant", "content": "Done."}, {"role": "user", "content": "And now?"}]
    before = encode_prompt(policy, row.messages, row.tools)
    spoken = [*policy.tokenizer.encode("Done.", add_special_tokens=False), policy.stop_ids[0]]
    assert encode_prompt(policy, talk, row.tools) == before + spoken + tool_reply(policy, [UserSays("And now?")])


def test_an_episode_with_users_words_in_the_torch_engine(policy, row, monkeypatch):
    """Faults: the user's words counted as sampled; an episode that ends where no tool is called; a cache that is wrong
    after them; the last turn answered."""
    wanted = script(policy, SAID, REPLIES)
    found, = toy_policy.scripted(policy, [row], [wanted], monkeypatch, budget=200, max_turns=9)
    assert (found.tokens, found.sampled) == wanted and found.turns == SAID and not found.truncated
    recorded = [p for p, sampled in zip(found.logprobs, found.sampled, strict=True) if sampled]
    assert max(abs(a - b) for a, b in zip(recorded, logprobs(policy, [found])[0].tolist(), strict=True)) < 1e-5
    assert rewards([row], [found.turns])[0].reason == "right"


def test_an_episode_with_users_words_in_vllms_engine(policy, row, monkeypatch):
    """The same through vLLM's engine, whose process is a stub: each call gets all that was said and heard before it."""
    import torch
    wanted, asked = script(policy, SAID, REPLIES), []
    engine, said = VllmEngine(1), iter(SAID)

    def ask(policy, call, rows, **settings):
        asked.append(rows["prompts"][0])
        tokens = [*policy.tokenizer.encode(next(said), add_special_tokens=False), policy.stop_ids[0]]
        return {"tokens": [tokens], "logprobs": [[-1.0] * len(tokens)]}

    monkeypatch.setattr(engine, "_ask", ask)
    found, = engine.sample(policy, [row], 1, generator=torch.Generator().manual_seed(1), max_new_tokens=200, max_turns=9)
    assert (found.tokens, found.sampled) == wanted and found.turns == SAID
    assert len(asked) == 4 and asked[2] == found.prompt + script(policy, SAID[:2], REPLIES)[0]


def test_an_episode_without_room_says_so(policy, row):
    """Fault: an item that ends because a reply did not fit, and that reads as if the model had stopped too early; the same
    said of one that spent its own words."""
    small = Policy(policy.weights, copy.deepcopy(policy.config), policy.tokenizer)
    prompt = encode_prompt(policy, row.messages, row.tools)
    spoken = [*policy.tokenizer.encode("Done.", add_special_tokens=False), policy.stop_ids[0]]
    small.config.max_position_embeddings = len(prompt) + len(spoken) + 40
    ended = Verdict(0.0, "ended in turn 1 of 2")

    def played(context):
        found = Rollout(row, prompt, tokens=[*spoken], sampled=[True] * len(spoken))
        small.config.max_position_embeddings = context
        return found, _add_reply(small, found, [UserSays("word " * 30)], 40)

    found, reply = played(len(prompt) + 60)
    assert reply is None and found.truncated
    said = evaluate._roomless(small, found, ended, 40).reason
    assert said.startswith(f"{NO_ROOM}{len(prompt) + len(spoken)} tokens after 0 answers") and said.endswith(ended.reason)
    assert evaluate._roomless(small, found, ended, found.length) == ended, "its own words are spent"
    found, reply = played(len(prompt) + 400)
    assert reply and not found.truncated and evaluate._roomless(small, found, ended, 40) == ended


def test_the_limit_on_turns_counts_the_whole_episode(policy, row, monkeypatch):
    """A profile that allows fewer turns than an item has ends it: its score is 0, with the reason."""
    wanted = script(policy, SAID, REPLIES)
    found, = toy_policy.scripted(policy, [row], [wanted], monkeypatch, budget=200, max_turns=1)
    assert found.turns == SAID[:1]
    assert rewards([row], [found.turns])[0].reason == "ended in turn 1 of 2"
