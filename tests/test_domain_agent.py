"""The agent domain: what a call is, what a state is worth, and that no rollout reaches another's tables."""
import copy
import json
import random

import pytest

from m2rl_core import domains
from m2rl_core.domains import Row, agent, agent_tasks, is_held_out, rewards, tool_calls, workplace

THINK = "<think>\n\n</think>\n\n"
STATE = {"contacts": [{"id": 4, "name": "Ann"}, {"id": 71, "name": "Bob"}],
         "events": [{"id": 1, "day": "Mon", "hour": 2, "who": 4}, {"id": 9, "day": "Fri", "hour": 3, "who": 71}]}


def say(*calls):
    """One assistant turn that makes these calls; a string is written as it stands."""
    text = "\n".join(call if isinstance(call, str) else f"<tool_call>\n{json.dumps(call)}\n</tool_call>"
                     for call in calls)
    return THINK + text


def call(tool, **arguments):
    return {"name": tool, "arguments": arguments}


def row(kind, calls, tools, state=None):
    truth = {"kind": kind, "category": agent_tasks.CATEGORY[kind], "calls": calls, "state": state or {}, "max_turns": 4}
    return Row("x", "agent", "bfcl_v3", "f", ({"role": "user", "content": "?"},), truth,
               tuple(workplace.TOOLS[name] for name in tools))


def score(a_row, *turns):
    return rewards([a_row], [list(turns)])[0].score


def reason(a_row, *turns):
    return rewards([a_row], [list(turns)])[0].reason


MAIL = row("multi_turn", [call("find_contact", name="Ann"), call("send_mail", to=4, text="tea")],
           ("send_mail", "find_contact"), STATE)
SINGLE = row("single", [call("send_mail", to=[4], text=["tea", "milk"])], ("send_mail", "add_task"))
TASK = row("single", [call("add_task", title=["tea"], day=["", "Mon"])], ("send_mail", "add_task"))
PARALLEL = row("parallel", [call("find_contact", name=["Ann"]), call("find_contact", name=["Bob"])],
               ("find_contact", "add_task"))
NONE = row("irrelevance", [], ("find_contact", "add_task"))
FIND, SEND = say(call("find_contact", name="Ann")), say(call("send_mail", to=4, text="tea"))
DONE = THINK + "Done."


def rows_of_kind(kind, n=200):
    rng = random.Random(kind)
    found = []
    while len(found) < n:
        found += [r for r in (agent.rl(rng), agent.test("bfcl_v3", rng), agent.sft(rng)) if r.truth["kind"] == kind]
    return found[:n]


def assistant(messages):
    return [message["content"] for message in messages if message["role"] == "assistant"]


# ---- generators and verifier agree

@pytest.mark.parametrize("kind", agent_tasks.KINDS)
def test_right_answers_score_one_and_spoiled_ones_zero(kind):
    """Catches a generator whose own answer is wrong, and a spoiler that happens to be right."""
    rng = random.Random(0)
    for r in rows_of_kind(kind):
        for worked in (True, False):
            verdict = rewards([r], [assistant(agent.respond(r, worked))])[0]
            assert verdict.score == 1.0, (r, verdict)
        spoilt = assistant(agent.spoil(r, rng))
        verdict = rewards([r], [spoilt])[0]
        assert verdict.score == 0.0, (r, spoilt)
        assert verdict.reason in ("wrong calls", "wrong final state", "no call", "called a tool"), verdict


@pytest.mark.parametrize("kind", agent_tasks.KINDS)
def test_environment_says_what_the_written_transcript_says(kind):
    """Catches SFT rows whose tool messages differ from what a rollout would be shown."""
    for r in rows_of_kind(kind):
        messages, episode, replayed = agent.respond(r), agent.environment(r), []
        for text in assistant(messages):
            replayed.append({"role": "assistant", "content": text})
            outputs = episode.step(domains.answer_of(text))
            replayed += [{"role": "tool", "content": output} for output in outputs or ()]
        assert replayed == messages
        assert episode.done and episode.step("x") is None
        assert len(messages) == (5 if kind == "multi_turn" else 1)


def test_the_id_of_a_multi_turn_row_is_known_to_the_tool_only():
    """Catches ids that follow from the request, which would make the first step needless."""
    ids = {}
    for r in rows_of_kind("multi_turn", 2000):
        act = r.truth["calls"][-1]
        found = act["arguments"][agent_tasks.ID_SLOT[act["name"]]]
        shown = [m["content"] for m in agent.respond(r) if m["role"] == "tool"]
        assert json.loads(shown[0]) == {"id": found}
        ids.setdefault(r.fingerprint, []).append(found)
    often = [found for found in ids.values() if len(found) >= 5]
    assert often and all(len(set(found)) > 1 for found in often)


def test_every_multi_turn_truth_changes_the_state():
    """Catches a task that rewards doing nothing."""
    for r in rows_of_kind("multi_turn"):
        world = workplace.World(r.truth["state"])
        before = world.snapshot()
        for gold in r.truth["calls"]:
            assert "error" not in json.loads(world.run(gold))
        assert world.snapshot() != before


# ---- one turn: BFCL's rule

def test_single_call_arguments():
    assert score(SINGLE, SEND) == 1
    assert score(SINGLE, say(call("send_mail", text="MILK", to=4))) == 1  # another allowed value, any order and case
    assert score(SINGLE, say(call("send_mail", to=5, text="tea"))) == 0
    assert score(SINGLE, say(call("send_mail", to=4))) == 0  # a required argument is missing
    assert score(SINGLE, say(call("send_mail", to="4", text="tea"))) == 0  # a text is no integer
    assert score(SINGLE, say(call("send_mail", to=4.0, text="tea"))) == 0
    assert reason(SINGLE, say(call("send_mail", to=True, text="tea"))) == "send_mail: to is no integer"
    assert score(SINGLE, say(call("send_mail", to=4, text="tea", cc=1))) == 0
    assert score(SINGLE, SEND, DONE) == 0  # the episode is one turn
    assert score(TASK, say(call("add_task", title="tea"))) == 1  # an optional argument may be absent
    assert score(TASK, say(call("add_task", title="tea", day="Mon"))) == 1
    assert score(TASK, say(call("add_task", title="tea", day="Tue"))) == 0


def test_one_is_not_true():
    """Catches Python's 1 == True where a schema leaves the type open."""
    assert not tool_calls.equal(1, True) and tool_calls.equal("Tea", "tEA") and not tool_calls.equal(1, "1")


def test_parallel_calls_are_free_in_order_and_exact_in_number():
    ann, bob = call("find_contact", name="Ann"), call("find_contact", name="Bob")
    assert score(PARALLEL, say(ann, bob)) == score(PARALLEL, say(bob, ann)) == 1
    for wrong in ((ann, ann), (ann,), (ann, bob, bob), (ann, bob, call("add_task", title="tea"))):
        assert score(PARALLEL, say(*wrong)) == 0


def test_pairing_looks_further_than_the_first_fit():
    """Catches a greedy pairing: "a" fits both truths, "b" only the first."""
    golds = [{"name": "f", "arguments": {"x": ["a", "b"]}}, {"name": "f", "arguments": {"x": ["a"]}}]
    assert tool_calls.all_match([{"name": "f", "arguments": {"x": "a"}}, {"name": "f", "arguments": {"x": "b"}}], golds)


def test_irrelevance_wants_words_and_no_call():
    assert score(NONE, THINK + agent.REFUSAL) == 1
    assert score(NONE, THINK) == 0
    assert score(NONE, say(call("add_task", title="tea"))) == 0
    assert score(NONE, say(call("send_mail", to=4, text="tea"))) == 0  # not even one that is not listed
    assert score(NONE, THINK + 'No. <tool_call>\n{"name"') == 0


# ---- several turns: the final state

def test_state_decides():
    assert score(MAIL, FIND, SEND, DONE) == 1
    assert score(MAIL, FIND, FIND, SEND, DONE) == 1  # reads are free
    assert score(MAIL, FIND, say(call("find_contact", name="Zoe")), SEND) == 1  # a refused call is skipped
    assert score(MAIL, FIND, say(call("send_mail", to=4, text="TEA")), DONE) == 1  # texts in any case
    assert score(MAIL, FIND, say(call("send_mail", to=71, text="tea")), DONE) == 0
    assert score(MAIL, FIND, SEND, SEND) == 0  # sent twice


def test_cheat_no_call_at_all():
    assert score(MAIL, DONE) == 0 and score(SINGLE, DONE) == 0 and score(PARALLEL, THINK + "tea") == 0
    assert score(MAIL, FIND, DONE) == 0


def test_cheat_wrong_call_then_the_right_one():
    """Catches a verifier that looks only for the right call among all calls."""
    wrong = say(call("send_mail", to=71, text="tea"))
    assert score(MAIL, wrong, SEND, DONE) == 0 and score(MAIL, FIND, wrong, SEND) == 0
    delete = row("multi_turn", [call("find_event", day="Fri", hour=3), call("delete_event", id=9)],
                 ("find_event", "delete_event"), STATE)
    right, other = call("delete_event", id=9), call("delete_event", id=1)
    assert score(delete, say(right), DONE) == 1 and score(delete, say(call("delete_event", id=50)), say(right)) == 1
    assert score(delete, say(other), say(right)) == score(delete, say(other, right)) == 0


def test_cheat_a_tool_that_is_not_listed():
    """The tool exists in the workplace, but this row does not offer it."""
    turn = say(call("delete_event", id=1))
    assert score(MAIL, FIND, turn, SEND) == 0 and score(SINGLE, turn) == 0
    assert reason(MAIL, FIND, turn) == "not in the tool list: delete_event"
    assert reason(MAIL, say(call("__import__", name="os"))) == "not in the tool list: __import__"
    episode = agent.environment(MAIL)
    assert episode.step(domains.answer_of(turn)) is None and episode.done and not episode.calls


@pytest.mark.parametrize("value", ["__import__('os').mkdir('{}')", "{{__import__('os').mkdir('{}')}}"])
def test_cheat_import_in_an_argument(value, tmp_path):
    """Catches any path on which an argument's text or name is evaluated."""
    made = tmp_path / "made"
    value = value.format(made)
    raw = f'<tool_call>\n{{"name": "send_mail", "arguments": {{"to": {value}, "text": "tea"}}}}\n</tool_call>'
    turns = [say(call("send_mail", to=4, text=value)), say(call("send_mail", to=value, text="tea")), THINK + raw,
             say(call("send_mail", to=4, text="tea", **{value: 1})), say(call(value, to=4, text="tea"))]
    for turn in turns:
        for r in (SINGLE, MAIL):
            agent.environment(r).step(domains.answer_of(turn))
            assert score(r, turn) == 0
    assert not made.exists()


def test_cheat_calls_inside_think_do_not_count():
    hidden = "<think>\n" + SEND.removeprefix(THINK) + "\n</think>\n\n"
    assert score(SINGLE, hidden + "Done.") == 0 and score(SINGLE, hidden) == 0
    assert score(NONE, hidden + agent.REFUSAL) == 1  # nor do they count against a reply
    assert score(SINGLE, SEND.removeprefix(THINK)) == 0  # no </think>


@pytest.mark.parametrize("text", [
    "", "<tool_call>", '{"name": "send_mail", "arguments": {"to": 4, "text": "tea"}}',
    "<tool_call>\n{'name': 'send_mail', 'arguments': {'to': 4, 'text': 'tea'}}\n</tool_call>",
    '<tool_call>\n{"name": "send_mail", "arguments": {"to": 4, "to": 4, "text": "tea"}}\n</tool_call>',
    '<tool_call>\n{"name": "send_mail", "arguments": "{}"}\n</tool_call>',
    '<tool_call>\n{"name": "send_mail", "arguments": {"to": NaN, "text": "tea"}}\n</tool_call>',
    '<tool_call>\n{"name": "send_mail", "arguments": {"to": 4, "text": "tea"}, "id": 1}\n</tool_call>',
    '<tool_call>\n{"name": ["send_mail"], "arguments": {}}\n</tool_call>', "<tool_call>\n[]\n</tool_call>",
    '<tool_call>\n{"name": "send_mail", "arguments": {"to": 4, "text": "tea"}}',
    SEND.removeprefix(THINK) + "\n<tool_call>\n{", "<tool_call>" + "[" * 100_000 + "</tool_call>",
    '<tool_call>{"name": "send_mail", "arguments": {"to": ' + "9" * 5000 + ', "text": "tea"}}</tool_call>',
])
def test_malformed_calls_score_zero_and_end_the_episode(text):
    """Catches a lenient or a crashing parser; each text is one way to be almost right."""
    for r in (SINGLE, MAIL):
        assert score(r, THINK + text) == 0
    assert agent.environment(MAIL).step(text) is None


def test_a_wrong_rollout_leaves_nothing_behind():
    """Catches tables that are cached between rollouts (a correct one then scores 0), or a verifier that edits a row."""
    before = copy.deepcopy(MAIL)
    wrong = [say(call("send_mail", to=71, text="rent")), DONE]
    for _ in range(50):
        assert [v.score for v in rewards([MAIL, MAIL], [wrong, [FIND, SEND, DONE]])] == [0, 1]
        first, second = agent.environment(MAIL), agent.environment(MAIL)
        first.step(domains.answer_of(SEND))
        assert second.world.tables["mail"] == [] and first.world.tables["mail"] != []
    assert MAIL == before


def test_turn_budget():
    """Catches an episode that never ends, or one that ends a turn early."""
    episode = agent.environment(MAIL)
    assert [episode.step(domains.answer_of(FIND)) for _ in range(4)] == [['{"id":4}']] * 3 + [None]
    assert score(MAIL, FIND, FIND, FIND, SEND) == 1  # the last turn's calls still count
    assert score(MAIL, FIND, FIND, FIND, FIND, SEND) == 0
    assert score(MAIL, DONE, FIND, SEND) == 0  # a turn without a call had ended it
    assert agent.environment(SINGLE).step(domains.answer_of(SEND)) is None


# ---- the workplace

def test_tools_by_hand():
    world = workplace.World(STATE)
    assert world.run(call("find_contact", name="ann")) == '{"id":4}'
    assert world.run(call("find_event", day="Fri", hour=3)) == '{"id":9}'
    assert world.run(call("add_event", day="Tue", hour=5, who=4)) == '{"ok":true}'
    assert [e["id"] for e in world.tables["events"]] == [1, 9, 2]  # the smallest free id
    assert "error" in world.run(call("add_event", day="Sun", hour=5, who=4))
    assert "error" in world.run(call("add_event", day="Mon", hour=12, who=4))
    assert world.run(call("delete_event", id=2)) == '{"ok":true}'
    assert "error" in world.run(call("delete_event", id=2))
    assert world.snapshot() == workplace.World(STATE).snapshot()
    with pytest.raises(ValueError, match="no tool 'rm'"):
        world.run(call("rm"))
    with pytest.raises(ValueError, match="unknown table 'plots'"):
        workplace.World({"plots": []})


def test_schemas_and_functions_agree():
    """Catches a tool whose schema promises an argument that its function does not take."""
    for name, tool in workplace.TOOLS.items():
        function = workplace.FUNCTIONS[name]
        names = function.__code__.co_varnames[1:function.__code__.co_argcount]
        assert tuple(tool["function"]["parameters"]["properties"]) == names
        assert len(names) - len(function.__defaults__ or ()) == len(tool["function"]["parameters"]["required"])


# ---- rows

def test_splits_are_disjoint_and_large_enough():
    """Catches a fingerprint that moves with the wording, and a category too small: the study asks for 80 items in all."""
    train = {r.fingerprint for kind in ("sft", "rl") for r in domains.training_rows("agent", kind, 400, seed=1)}
    items = domains.benchmark_rows("bfcl_v3", 480, seed=1)
    assert not train & {r.fingerprint for r in items} and len({r.fingerprint for r in items}) == 480
    for category in agent_tasks.CATEGORY.values():
        assert sum(r.truth["category"] == category for r in items) >= 60


def test_same_problem_in_other_words_keeps_its_fingerprint():
    words = {}
    for r in rows_of_kind("multi_turn", 3000):
        words.setdefault(r.fingerprint, set()).add(r.messages[0]["content"])
    assert max(map(len, words.values())) == 2  # both wordings, and random ids do not count


def test_draws_depend_on_the_seed_alone():
    for make in (lambda seed: domains.training_rows("agent", "sft", 60, seed),
                 lambda seed: domains.benchmark_rows("bfcl_v3", 60, seed)):
        assert make(3) == make(3) != make(4)
    assert [agent.corpus(random.Random(i)) for i in range(30)] == [agent.corpus(random.Random(i)) for i in range(30)]
    assert all(Row.from_json(r.to_json()) == r for r in domains.training_rows("agent", "sft", 60, 1))


def test_sizes_and_shares():
    """Catches prompts too long for the small model's context, and an SFT set that has drifted to other kinds."""
    rows = domains.training_rows("agent", "sft", 1000, seed=0)
    for r in rows + domains.training_rows("agent", "rl", 500, seed=0):
        prompt = "\n".join([*map(workplace.signature, r.tools), r.messages[0]["content"]])
        assert len(prompt) <= 220 and prompt.isascii() and 2 <= len(r.tools) <= 3
        assert max(len(text) for text in assistant(agent.respond(r))) <= 300
    for kind, share in agent_tasks.SFT_KINDS.items():
        assert abs(sum(r.truth["kind"] == kind for r in rows) / 1000 - share) < 0.07
    terse = sum(r.turns[0]["content"].startswith(THINK) for r in rows)
    assert 400 < terse < 600


def test_corpus_shows_no_held_out_problem():
    """Catches test problems that slip into pre-training: every request in a document must be a training one."""
    held = {r.messages[0]["content"] for r in rows_of_kind("single") + rows_of_kind("multi_turn", 2000)
            if is_held_out(r.fingerprint)}
    rng = random.Random(5)
    documents = [agent.corpus(rng) for _ in range(2000)]
    assert held and not {line for text in documents for line in text.split("\n")} & held
    assert max(map(len, documents)) <= 420


# ---- the average

def test_bfcl_average_by_hand():
    scores = {"simple": 0.8, "parallel": 0.6, "irrelevance": 0.4, "multi_turn": 0.2}
    assert agent.bfcl_average(scores) == pytest.approx(0.4)
    assert agent.bfcl_average({"simple": 1.0, "multi_turn": 0.0}) == 0.5
    assert agent.bfcl_average({"parallel": 0.3}) == 0.3
    with pytest.raises(ValueError, match="unknown category 'live'"):
        agent.bfcl_average({"live": 1.0})
    with pytest.raises(ValueError, match="no category"):
        agent.bfcl_average({})
