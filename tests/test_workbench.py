"""The workplace assistant: verdicts are the wheel's own, replies are what the released code shows, nothing hangs the run."""
from __future__ import annotations

import json
import time
from dataclasses import replace

import pytest
import toy_policy
import toy_workplace

from m2rl_core import dry
from m2rl_core.domains import environments, generator, rewards, workbench, workbench_server, workbench_wheel, worker
from m2rl_core.errors import StudyError

pytestmark = pytest.mark.filterwarnings("ignore::pandas.errors.Pandas4Warning")  # the wheel's, called as it is

ROWS = toy_workplace.rows()
REPLY, RENAME, REASSIGN, DELETE, LOST = ROWS  # the wheel's five examples
# A search text that takes for ever: pandas gives patterns that look ahead to Python's own `re`.
HANG = {"name": "calendar_search_events", "arguments": {"query": "(?=.)((a|b|[a-z ]+)+)+@@@"}}


def call(tool, **arguments):
    return {"name": tool, "arguments": arguments}


def text(*calls):
    """What a model writes to make these calls; a text is written as it stands."""
    return "\n".join(c if isinstance(c, str) else f"<tool_call>\n{json.dumps(c)}\n</tool_call>" for c in calls)


def gold(row):
    return row.truth["calls"]


def wheel_says(calls, golds):
    return toy_workplace.plain().is_correct(workbench.as_text(calls), workbench.as_text(golds), None)


def ours_says(calls, golds):
    return workbench_wheel.same_state(workbench.as_text(calls), workbench.as_text(golds))


# ---- the verdict

CASES = {
    "right": lambda calls: calls, "nothing": lambda calls: [], "twice": lambda calls: calls * 2,
    "one short": lambda calls: calls[:-1], "other order": lambda calls: calls[::-1],
    "looked first": lambda calls: [call("email_search_emails", query="raj"), call("company_directory_find_email_address"),
                                   call("analytics_get_average_session_duration"), *calls],
    "a plot too many": lambda calls: [*calls, call("analytics_create_plot", time_min="2023-11-01", time_max="2023-11-02",
                                                   value_to_plot="total_visits", plot_type="bar")],
    "another case": lambda calls: [call(c["name"], **{k: v.upper() if k == "body" else v for k, v in c["arguments"].items()})
                                   for c in calls],
    "the status in lower case": lambda calls: [call(c["name"], **{k: v.lower() for k, v in c["arguments"].items()})
                                               for c in calls],
    "an unknown tool beside": lambda calls: [call("email_burn", email_id="1"), *calls],
    "an argument too many": lambda calls: [call(c["name"], **c["arguments"], extra=1) for c in calls],
    "an argument too few": lambda calls: [call(c["name"], **dict(list(c["arguments"].items())[1:])) for c in calls],
    "numbers for texts": lambda calls: [call(c["name"], **{k: 7 for k in c["arguments"]}) for c in calls],
    "nothing for texts": lambda calls: [call(c["name"], **dict.fromkeys(c["arguments"])) for c in calls],
    "made and unmade": lambda calls: [call("project_management_create_task", task_name="x", list_name="Backlog",
                                           board="Design", assigned_to_email="raj.patel@atlas.com", due_date="2023-12-01"),
                                      call("project_management_delete_task", task_id="00000300"), *calls],
    "a number among texts": lambda calls: [*calls, call("customer_relationship_manager_add_customer", customer_name="Ann",
                                                        assigned_to_email="a@b.c", status="Lead", customer_phone=5)],
}


@pytest.mark.parametrize("name", CASES)
def test_verdicts_are_the_wheels(name):
    """Faults: tables that one replay changes for the next; a verdict kept for calls that are not the same; tables that are
    compared without their numbers, or with the case of every column."""
    for row in ROWS:
        calls = CASES[name](gold(row))
        wanted = wheel_says(calls, gold(row))
        assert [ours_says(calls, gold(row)) for _ in range(2)] == [wanted] * 2, row.id
        assert ours_says(gold(row), calls) == wheel_says(gold(row), calls)  # as truths they are kept, too
    if name in ("right", "nothing"):
        assert wanted == (name == "right")


def test_verdicts_on_mutated_calls_are_the_wheels():
    """Fault: one that no case above names. Calls of all examples mixed, dropped, doubled, and with foreign values."""
    rng, pool, seen = generator("workbench"), [c for row in ROWS for c in gold(row)], []
    reads = [call("email_delete_email", email_id="00000057"), call("calendar_search_events", query="Forum"),
             call("calendar_create_event", event_name="x", participant_email="A@b.c", event_start="2023-12-01 09:00:00",
                  duration="30"), call("email_send_email", recipient="A@b.c", subject="s", body="b")]
    for _ in range(60):
        golds = gold(rng.choice(ROWS))
        calls = [c for c in golds if rng.random() < 0.9] + rng.sample(pool + reads, rng.choice((0, 0, 0, 1)))
        if rng.random() < 0.4:
            calls.insert(0, rng.choice(reads))
        if calls and rng.random() < 0.2:
            at = rng.randrange(len(calls))
            key = rng.choice(sorted(calls[at]["arguments"]))
            calls[at] = call(calls[at]["name"], **(calls[at]["arguments"] | {key: rng.choice(("x", "", "00000037", 3, None))}))
        seen.append(wheel_says(calls, golds))
        assert ours_says(calls, golds) == seen[-1], (calls, golds)
    assert 10 < sum(seen) < 50


def test_the_wheels_own_verify_cases():
    """`test_verify` and `test_stateful_email_deletion_and_fetch` of the wheel's test file."""
    reply = [call("email_reply_email", email_id="00000057", body="Thanks for the update - I will get back to you tomorrow.")]
    fetch = [call("email_delete_email", email_id="00000146"),
             call("email_get_email_information_by_id", email_id="00000146", field="email_id")]
    for calls in (reply, fetch):
        assert ours_says(calls, calls) and wheel_says(calls, calls)
        assert not ours_says([], calls) and not wheel_says([], calls)
    assert ours_says(fetch[:1], fetch)  # reading changes nothing


def test_a_verdict_that_the_wheel_cannot_give_is_none_the_second_time_either(monkeypatch):
    """Fault: a column that stopped the wheel's comparison is taken for compared when the same calls come again."""
    import pandas as pd
    table = workbench_wheel._Table(pd.DataFrame({"a": ["X"], "b": [1]}))

    def lower(frame):
        for column in frame.columns:
            frame[column] = frame[column].str.lower()

    for _ in range(2):
        with pytest.raises(AttributeError):
            lower(table)
    assert table.columns == ["b"] and list(table.table["a"]) == ["x"]


# ---- the reward


def test_transcripts_are_scored_by_all_their_turns():
    """Faults: only the last turn counts; calls side by side are dropped; whoever says nothing is right; what follows the end
    of an episode counts."""
    golds = gold(LOST)
    assert len(golds) == 5
    spread = [text(c) for c in golds]
    for turns, wanted in (
        ([text(*golds)], "right"), ([text(*golds), "Done."], "right"), ([*spread, "Done."], "right"), (spread[:4], "wrong"),
        ([text(call("customer_relationship_manager_search_customers", status="Lead")), text(*golds), "Done."], "right"),
        (["Done."], "no call"), ([""], "no call"), (["Done.", text(*golds)], "went on after the end"),
        ([text(*golds), "<tool_call>\n{}\n</tool_call>"], "a call that cannot be read"),
        ([text(*golds), "<tool_call>"], "a call that cannot be read"),
        ([text(call("email_burn"), *golds)], "right"),  # refused, and told so, but no end
        ([text(call("email_search_emails", query="a"))] * 6 + [text(*golds)], "went on after the end"),
        ([text(call("email_search_emails", query="a"))] * 5 + [text(*golds)], "right"),  # calls of the sixth turn count
    ):
        verdict, = workbench.verify([LOST], [turns])
        assert verdict.reason.startswith(wanted) and verdict.score == (wanted == "right"), turns


def test_a_truth_that_changes_nothing_rewards_doing_nothing_and_says_so():
    """Fault: a share of the rewards that is luck, and that no report can count."""
    looks = replace(REPLY, truth=REPLY.truth | {"calls": [call("email_search_emails", query="carlos")]})
    assert workbench.idle(looks) and not workbench.idle(REPLY)
    nothing, acted = workbench.verify([looks] * 2, [["Done."], [text(*gold(REPLY))]])
    assert (nothing.score, nothing.reason) == (1.0, workbench.IDLE) and acted.score == 0.0


@pytest.mark.parametrize("block", [
    "not JSON", "[]", "3", '{"arguments": {}}', '{"name": 3, "arguments": {}}', '{"name": "x", "arguments": []}',
    '{"name": "x", "arguments": "{}"}', '{"name": "x", "arguments": {"a": NaN}}', "[" * 10_000])
def test_a_call_that_cannot_be_read_ends_the_rollout(block):
    """Faults: a model is taught to write what no parser reads; one broken call of several is passed over."""
    answer = text(*gold(REPLY)) + f"\n<tool_call>\n{block}\n</tool_call>"
    assert workbench.read_calls(answer) is None
    assert workbench.Episode(REPLY, lambda call: "ran").step(answer) is None
    assert workbench.verify([REPLY], [[answer]])[0].score == 0


def test_the_reward_runs_in_the_worker_and_a_hang_is_killed(monkeypatch):
    """Faults: a search text that a model wrote runs in the process of the training; it hangs there for ever."""
    monkeypatch.setattr(worker, "LIMIT", 4.0)
    verdicts = rewards([REPLY] * 3, [["</think>" + text(*calls), "</think>Done."] for calls in (
        gold(REPLY), [HANG, *gold(REPLY)], gold(RENAME))])
    assert [v.score for v in verdicts] == [1, 0, 0] and [v.failed for v in verdicts] == [False, True, False]
    assert verdicts[1].reason == "verifier killed after 4 s"


def test_a_machine_without_the_wheel_says_so_in_one_line(monkeypatch):
    monkeypatch.setattr(workbench_wheel, "PACKAGE", "nemo-gym-that-is-not-there")
    workbench_wheel.published.cache_clear()
    with pytest.raises(StudyError, match=r"^the workplace assistant's tools and tables are not installed: "
                                         r"pip install --no-deps --ignore-requires-python nemo-gym==0\.2\.0$"):
        workbench_wheel.load()
    assert not workbench_wheel.installed()


def test_only_the_workplace_of_the_wheel_is_loaded():
    """Fault: NeMo-Gym's framework is imported, which sets variables of the environment and needs thirty packages."""
    import sys
    workbench_wheel.published.cache_clear()
    workbench_wheel.load()
    assert not [name for name in sys.modules if name.split(".")[0] in ("nemo_gym", workbench_wheel.FOLDER)]


def test_a_dry_run_says_where_the_tools_are(monkeypatch):
    """Fault: a training that stops at its first agent prompt, a day after the dry run found nothing missing."""
    monkeypatch.delenv("M2RL_WORKPLACE", raising=False)
    assert dry._workplace() == dry.Line("workplace", dry.HERE, "nemo-gym 0.2.0")
    monkeypatch.setattr(workbench_wheel, "PACKAGE", "nemo-gym-that-is-not-there")
    assert dry._workplace().told.endswith("is not installed: pip install --no-deps --ignore-requires-python nemo-gym==0.2.0")
    monkeypatch.setenv("M2RL_WORKPLACE", "http://127.0.0.1:9")
    assert dry._workplace().state == dry.MISSING and "unset M2RL_WORKPLACE" in dry._workplace().told


# ---- the episode


def test_replies_are_those_of_the_wheels_rollouts():
    """Fault: a reply in another form than the one that NVIDIA's server gives: its null, its order, its numbers."""
    count = 0
    for rollout in toy_workplace.lines("example_rollouts.jsonl"):
        episode, calls = workbench.environment(REPLY), {}
        for item in rollout["response"]["output"]:
            if item["type"] == "function_call":
                calls[item["call_id"]] = call(item["name"], **json.loads(item["arguments"]))
            elif item["type"] == "function_call_output":
                said, = episode.step(text(calls[item["call_id"]]))
                output = json.loads(item["output"])["output"]
                assert said == (output if isinstance(output, str) else json.dumps(output))
                count += 1
    assert count == 8


def test_calls_that_do_not_fit_are_answered_as_the_released_code_does():
    """Faults: a call that does not fit ends the rollout; it runs all the same; the model is not told what was wrong."""
    episode = workbench.environment(REPLY)
    assert episode.step(text(
        call("email_burn", email_id="1"), call("email_delete_email", email="1"),
        call("email_reply_email", email_id="00000057"),
        call("calendar_search_events", page_size=0), call("email_delete_email", email_id="00000057"),
        call("email_get_email_information_by_id", email_id="00000057", field="body"),
        call("calendar_search_events", query=None, page_size=1),
    )) == [
        "Model attempted to call undefined function: email_burn",
        "email_delete_email() got an unexpected keyword argument 'email'",
        "email_reply_email() missing required argument 'body'",
        "Error executing tool 'calendar_search_events': integer division or modulo by zero",
        "Email deleted successfully.", "Email not found.",
        '{"events": [{"event_id": "00000170", "event_name": "Board of Directors Conclave", "participant_email": '
        '"chenwei.zhang@atlas.com", "event_start": "2023-12-21 15:30:00", "duration": "90"}], "pagination": '
        '{"total_events": 300, "page": 1, "page_size": 1, "total_pages": 300}}']


def test_an_episode_ends_after_its_turns_and_shares_no_table():
    """Faults: a seventh turn; one rollout reads what another has changed; the clock of this machine."""
    first, second = workbench.environment(REPLY), workbench.environment(REPLY)
    ask = text(call("email_get_email_information_by_id", email_id="00000057", field="email_id"))
    assert first.step(text(call("email_delete_email", email_id="00000057"))) == ["Email deleted successfully."]
    assert first.step(ask) == ["Email not found."]
    assert second.step(ask) == ['{"email_id": "00000057"}'] and workbench.environment(REPLY).step(ask) == second.step(ask)
    assert [first.step(ask) for _ in range(5)] == [["Email not found."]] * 3 + [None] * 2
    assert second.step("Done.") is None and second.step(ask) is None
    third = workbench.environment(REPLY)
    third.step(text(*gold(REPLY)))
    sent, = third.step(text(call("email_search_emails", query="get back to you tomorrow", page_size=1)))
    assert json.loads(sent)["emails"][0]["sent_datetime"] == "2023-11-30 23:59:00"
    short = workbench.environment(replace(REPLY, truth=REPLY.truth | {"max_turns": 2}))
    assert short.step(ask) is not None and short.step(ask) is None


def test_a_rollout_asks_the_process_that_can_be_killed(monkeypatch):
    """Faults: tools with a model's arguments run in the process of the training; a search that hangs ends it."""
    monkeypatch.setattr(workbench, "STEP_SECONDS", 4.0, raising=False)
    good, bad = environments.open_environment(REPLY), environments.open_environment(REPLY)
    assert isinstance(good, environments.Hosted)
    assert good.step(text(call("email_delete_email", email_id="00000057"))) == ["Email deleted successfully."]
    assert bad.step(text(HANG)) is None
    assert bad.failed == "environment killed after 4 s"
    assert good.step(text(call("email_delete_email", email_id="00000057"))) == ["Email not found."]


# ---- over HTTP


@pytest.fixture
def server(monkeypatch):
    monkeypatch.setattr(workbench_server.post, "PAUSE", 0.01)
    with toy_workplace.Server() as found:
        monkeypatch.setenv("M2RL_WORKPLACE", found.url)
        yield found


def test_the_server_says_what_the_wheel_says(server):
    """Faults: a cookie that is not sent back, so that each call has fresh tables; episodes that share a session; arguments
    as objects where the server wants texts; a verdict for another answer."""
    one, two = (environments.open_environment(LOST) for _ in range(2))
    mine = workbench.environment(LOST)
    for answer in (text(call("customer_relationship_manager_search_customers", customer_name="Casey Wilson")),
                   text(call("email_burn"), *gold(LOST)[:2]), text(call("calendar_search_events", page_size=0)),
                   text(call("customer_relationship_manager_search_customers", status="Lost", page_size=40))):
        assert one.step(answer) == mine.step(answer) is not None and one.failed == ""
    assert two.step(text(call("email_search_emails", query="raj", page=None))) and len(server.sessions) == 2
    answers = [[text(*gold(row)), "Done."] for row in ROWS] + [["Done."], [text(*gold(LOST)[:2])], ["<tool_call>"]]
    rows = [*ROWS, LOST, LOST, LOST]
    found = rewards(rows + rows[:1], [[f"</think>{turn}" for turn in turns] for turns in answers + answers[:1]])
    assert found == workbench.verify(rows + rows[:1], answers + answers[:1])
    assert [v.score for v in found] == [1] * 5 + [0] * 3 + [1]
    assert [path for path, _ in server.asked].count("verify") == 7  # an answer that cannot be read asks nobody


def test_which_row_asks_the_server(server, monkeypatch):
    """Fault: a row that asks for the wheel is sent away, or one that asks for a server is verified here in silence."""
    wheel, served = (replace(REPLY, truth=REPLY.truth | {"rule": rule}) for rule in ("wheel", "server"))
    assert [workbench.home(row) for row in (REPLY, wheel, served)] == [workbench_server, workbench, workbench_server]
    monkeypatch.delenv("M2RL_WORKPLACE")
    assert [workbench.home(row) for row in (REPLY, wheel, served)] == [workbench, workbench, workbench_server]
    for ask in (lambda: environments.open_environment(served).step("x"), lambda: workbench_server.verify([served], [["x"]])):
        with pytest.raises(StudyError, match='^rows with the rule "server" need M2RL_WORKPLACE, the address of a workplace'):
            ask()
    with pytest.raises(ValueError, match="rule 'other' is none of wheel, server"):
        workbench.home(replace(REPLY, truth=REPLY.truth | {"rule": "other"}))
    monkeypatch.setenv("M2RL_WORKPLACE", "workplace:12000")
    with pytest.raises(StudyError, match="^M2RL_WORKPLACE='workplace:12000' is no address"):
        workbench.home(REPLY)


def test_a_dead_server_ends_the_run_in_one_line(monkeypatch):
    """Fault: a whole training of zeros, because nobody started the server."""
    monkeypatch.setattr(workbench_server.post, "PAUSE", 0.01)
    monkeypatch.setenv("M2RL_WORKPLACE", "http://127.0.0.1:9")
    for ask in (lambda: environments.open_environment(REPLY).step(text(*gold(REPLY))),
                lambda: rewards([REPLY], [["</think>Done."]])):
        said = r"^the workplace server at http://127.0.0.1:9/\w+ cannot be reached \(5 "
        with pytest.raises(StudyError, match=said) as dead:
            ask()
        assert "\n" not in str(dead.value)


def test_what_a_living_server_cannot_stand_costs_its_own_rollout(server):
    """Faults: one call of a model's at which the server breaks ends the training; a verdict without a reward is a zero."""
    server.faults["calendar_search_events"] = 500
    episode = environments.open_environment(REPLY)
    assert episode.step(text(call("email_search_emails", query="raj"))) is not None
    assert episode.step(text(call("calendar_search_events", query="raj"))) is None
    assert episode.failed.startswith("environment failed: RuntimeError: the workplace server at http://127.0.0.1:")
    server.faults["verify"] = 422
    verdict, = rewards([REPLY], [["</think>Done."]])
    assert verdict.failed and verdict.score == 0 and "refuses with status 422" in verdict.reason
    for reward in ({}, {"reward": None}, {"reward": True}, {"reward": "1"}):
        server.faults["verify"] = reward
        with pytest.raises(StudyError, match="^the workplace server answers /verify without a reward"):
            rewards([REPLY], [["</think>Done."]])


def test_a_silent_server_has_a_time_limit(monkeypatch):
    """Fault: a server that takes a request and never answers stops the run."""
    class Silent(toy_workplace.Server):
        def process_request(self, request, client_address):
            self.held = [*getattr(self, "held", ()), request]

    monkeypatch.setattr(workbench_server, "SECONDS", 0.2)
    monkeypatch.setattr(workbench_server.post, "PAUSE", 0.01)
    with Silent() as silent:
        monkeypatch.setenv("M2RL_WORKPLACE", silent.url)
        start = time.monotonic()
        with pytest.raises(StudyError, match="cannot be reached .*timed out"):
            environments.open_environment(REPLY).step(text(*gold(REPLY)))
        assert time.monotonic() - start < 20


def test_the_body_of_verify_has_both_forms():
    """Fault: NeMo-Gym's own server, or the released code's launcher, finds no calls in it."""
    asked = workbench_server.request(LOST, gold(LOST)[:1])
    assert asked["output"] == asked["response"]["output"] == [{
        "type": "function_call", "call_id": "call_0", "name": "customer_relationship_manager_update_customer",
        "arguments": '{"customer_id": "00000037", "field": "status", "new_value": "Lost"}'}]
    assert asked["ground_truth"] == toy_workplace.lines("example.jsonl")[4]["ground_truth"]
    assert asked["category"] == "workplace_assistant_customer_relationship_manager" and asked["id"] == 0


# ---- whole rollouts


def test_a_rollout_of_a_real_row_reads_the_tools_and_is_rewarded(policy, monkeypatch):
    """Faults: a real agent row without an environment; replies in another form than the chat template's; a reward for calls
    that the rollout never made; a turn more than the profile allows."""
    tool = {"type": "function", "function": {"name": "email_delete_email", "parameters": {
        "type": "object", "properties": {"email_id": {"type": "string"}}, "required": ["email_id"]}}}
    delete = call("email_delete_email", email_id="00000057")
    row = replace(REPLY, messages=({"role": "user", "content": "Delete it."},), tools=(tool,),
                  truth=REPLY.truth | {"calls": [delete]})
    think = "<think>\n\n</think>\n\n"
    right = [{"role": "assistant", "content": think + text(delete)},
             {"role": "tool", "content": "Email deleted successfully."},
             {"role": "assistant", "content": think + "Done."}]
    wrong = [{"role": "assistant", "content": think + text(call("email_delete_email"))},
             {"role": "tool", "content": "email_delete_email() missing required argument 'email_id'"},
             {"role": "assistant", "content": think + "Done."}]
    wanted = [toy_policy.script_of(policy, row, turns) for turns in (right, wrong)]
    found = toy_policy.scripted(policy, [row], wanted, monkeypatch, n=2)
    assert [(r.tokens, r.sampled) for r in found] == wanted and [r.failed for r in found] == ["", ""]
    assert [v.reason for v in environments.verdicts(found, rewards)] == ["right", "wrong final state"]
    short, _ = toy_policy.scripted(policy, [row], wanted, monkeypatch, n=2, max_turns=1)
    assert len(short.turns) == 1 and environments.verdicts([short], rewards)[0].score == 1  # the calls of its last turn count
