"""Where the agent's rows come from: requests over the small workplace, in BFCL's four categories.

`single`, `parallel` and `irrelevance` ask for one turn; `multi_turn` asks to find an id, which is random in
each row, and to act on it. What makes the tasks easier or harder stands first.
"""
from __future__ import annotations

import json
import random

from m2rl_core.domains import Row, is_held_out
from m2rl_core.domains.workplace import DAYS, HOURS, TOOLS

# All that tunes the difficulty.
NAMES = ("Ann", "Bob", "Cat", "Dan", "Eve", "Fay", "Gus", "Hal", "Ida", "Jim")
WORDS = ("hello", "thanks", "yes", "no", "tea", "bread", "milk", "rent", "call", "pay", "book", "lunch",
         "train", "desk", "plan", "home", "late", "soon", "done", "stop", "rice", "soap", "lamp", "door")  # many: to copy
IDS = tuple(range(1, 100))
MAX_TURNS = 4
KINDS = ("single", "parallel", "irrelevance", "multi_turn")
SFT_KINDS = {"single": 0.40, "parallel": 0.15, "irrelevance": 0.20, "multi_turn": 0.25}  # RL and tests: evenly
SFT_STEPS = {"mail": 0.6, "delete": 0.3, "meet": 0.1}  # multi-turn tasks; RL and tests: evenly
PARALLEL_TOOLS = ("find_contact", "find_event", "send_mail", "delete_event", "add_task")  # two calls stay short
SFT_MIXED = 0.2  # share of parallel rows with two different tools; RL and tests: as two free draws give
TOOL_WEIGHTS = {"find_contact": 1, "find_event": 2, "send_mail": 3, "add_event": 3, "delete_event": 2, "add_task": 2}
SFT_WORKED = 0.5  # share of rows whose think says which tool is needed

CATEGORY = {"single": "simple", "parallel": "parallel", "irrelevance": "irrelevance", "multi_turn": "multi_turn"}
# Two wordings for each thing to ask; the last three have no tool.
REQUESTS = {
    "find_contact": ("Find the id of {name}.", "What is the id of {name}?"),
    "find_event": ("Find the event on {day} at {hour}.", "What is the event on {day} at {hour}?"),
    "send_mail": ('Mail "{text}" to id {to}.', 'Send id {to} the mail "{text}".'),
    "add_event": ("Meet id {who} on {day} at {hour}.", "On {day} at {hour} meet id {who}."),
    "delete_event": ("Delete event {id}.", "Remove event {id}."),
    "add_task": ('Add the task "{title}".', 'Note the task "{title}".'),
    "play": ('Play "{title}".', 'Please play "{title}".'),
    "buy": ('Buy "{title}".', 'Please buy "{title}".'),
    "phone": ("Phone {name}.", "Please phone {name}."),
}
WITH_DAY = {"add_task": ('Add the task "{title}" for {day}.', 'Note the task "{title}" for {day}.')}
# Multi-turn: the wordings, the tool that finds the id, the tool that acts, and its argument that takes the id.
STEPS = {
    "mail": (('Mail "{text}" to {name}.', 'Send {name} the mail "{text}".'), "find_contact", "send_mail", "to"),
    "meet": (("Meet {name} on {day} at {hour}.", "On {day} at {hour} meet {name}."), "find_contact",
             "add_event", "who"),
    "delete": (("Delete the event on {day} at {hour}.", "Remove the event on {day} at {hour}."), "find_event",
               "delete_event", "id"),
}
NO_TOOL = {"play": ("title",), "buy": ("title",), "phone": ("name",)}
POOLS = {"name": NAMES, "text": WORDS, "title": WORDS, "day": DAYS, "hour": HOURS, "to": IDS, "who": IDS, "id": IDS}
ID_SLOT = {actor: slot for _, _, actor, slot in STEPS.values()}


def _tool(rng: random.Random, names: tuple[str, ...]) -> str:
    """A tool to ask for; one with few different calls comes up less often, so that items do not run out."""
    return rng.choices(names, [TOOL_WEIGHTS[name] for name in names])[0]


def _ask(rng: random.Random, name: str) -> tuple[str, dict]:
    """A request for one call, and the call with a list of allowed values for each argument."""
    keys = NO_TOOL[name] if name in NO_TOOL else TOOLS[name]["function"]["parameters"]["properties"]
    values = {key: rng.choice(POOLS[key]) for key in keys}
    wordings, allowed = REQUESTS[name], {key: [value] for key, value in values.items()}
    if name in WITH_DAY:
        if rng.random() < 0.5:
            wordings = WITH_DAY[name]
        else:
            allowed["day"] = [""]
    return rng.choice(wordings).format(**values), {"name": name, "arguments": allowed}


def _tool_list(rng: random.Random, needed: list[str], size: int, banned: str = "") -> tuple[dict, ...]:
    """`size` tools in random order, with all that are needed and without the banned one."""
    others = [name for name in TOOLS if name not in needed and name != banned]
    names = list(needed) + rng.sample(others, size - len(needed))
    rng.shuffle(names)
    return tuple(TOOLS[name] for name in names)


def _one_turn(rng: random.Random, kind: str, narrow: bool) -> dict:
    """Request, calls, tools and the needed tools' names of a single, parallel or irrelevance row."""
    if kind == "irrelevance":
        text, call = _ask(rng, rng.choice([*TOOLS, *NO_TOOL]))
        tools = _tool_list(rng, [], rng.choice((2, 3)), banned=call["name"])
        return {"text": text, "problem": [call], "calls": [], "tools": tools, "needs": [call["name"]]}
    names = PARALLEL_TOOLS if kind == "parallel" else tuple(TOOLS)
    text, call = _ask(rng, _tool(rng, names))
    texts, calls = [text], [call]
    while kind == "parallel" and len(calls) == 1:
        same = narrow and rng.random() >= SFT_MIXED
        text, other = _ask(rng, call["name"] if same else _tool(rng, names))
        if other != call:
            texts, calls = [*texts, text], [*calls, other]
    needs = list(dict.fromkeys(call["name"] for call in calls))
    return {"text": " ".join(texts), "problem": calls, "calls": calls, "needs": needs,
            "tools": _tool_list(rng, needs, rng.choice((2, 3)))}


def _two_steps(rng: random.Random, narrow: bool) -> dict:
    """The same fields for a multi-turn row: find a random id, then act on it; and the tables it starts from."""
    step = rng.choices(list(SFT_STEPS), list(SFT_STEPS.values()))[0] if narrow else rng.choice(list(STEPS))
    wordings, finder, actor, slot = STEPS[step]
    ids = rng.sample(IDS, 6)
    people = [{"id": i, "name": name} for i, name in zip(ids[:3], rng.sample(POOLS["name"], 3), strict=True)]
    slots = rng.sample([(day, hour) for day in DAYS for hour in HOURS], 3)
    events = [{"id": i, "day": day, "hour": hour, "who": person["id"]}
              for i, (day, hour), person in zip(ids[3:], slots, people, strict=True)]
    free = {"name": people[0]["name"], "day": slots[0][0], "hour": slots[0][1], "text": rng.choice(POOLS["text"])}
    if step == "meet":  # the slot is still free, else two events would share it
        events = events[1:]
    found = events[0]["id"] if step == "delete" else people[0]["id"]
    rng.shuffle(people)
    rng.shuffle(events)
    find = {key: free[key] for key in TOOLS[finder]["function"]["parameters"]["properties"]}
    act = {key: found if key == slot else free[key] for key in TOOLS[actor]["function"]["parameters"]["properties"]}
    return {"text": rng.choice(wordings).format(**free), "needs": [finder, actor],
            "problem": [step, {key: value for key, value in (find | act).items() if key != slot}],
            "calls": [{"name": finder, "arguments": find}, {"name": actor, "arguments": act}],
            "tools": _tool_list(rng, [finder, actor], rng.choice((2, 3))),
            "state": {"contacts": people, "events": events}}


def fingerprint(kind: str, problem: list) -> str:
    """What decides whether a row is held out: its kind and what is asked, whatever the wording and the tools."""
    return f"agent {kind} {' '.join(sorted(json.dumps(part, sort_keys=True) for part in problem))}"


def requests(rng: random.Random, n: int) -> tuple[tuple[dict, ...], list[tuple[str, dict]]]:
    """Three tools and `n` requests for one of them each, none held out, with the call that each asks for."""
    tools, found = _tool_list(rng, [], 3), []
    while len(found) < n:
        text, call = _ask(rng, _tool(rng, tuple(tool["function"]["name"] for tool in tools)))
        if not is_held_out(fingerprint("single", [call])):
            found.append((text, call))
    return tools, found


def plain(gold: dict) -> dict:
    """One call that a list of allowed values accepts; optional arguments are left out."""
    return {"name": gold["name"],
            "arguments": {key: values[0] for key, values in gold["arguments"].items() if "" not in values}}


def notes(rng: random.Random, n: int) -> list[tuple[str, dict]]:
    """`n` requests, none held out, each with the values that it gives: plain practice in copying."""
    found = []
    while len(found) < n:
        if rng.random() < 0.5:
            drawn = _two_steps(rng, narrow=False)
            text, kind, problem, said = drawn["text"], "multi_turn", drawn["problem"], drawn["problem"][1]
        else:
            text, call = _ask(rng, rng.choice(("find_contact", "send_mail", "add_task", "delete_event")))
            kind, problem, said = "single", [call], plain(call)["arguments"]
        if not is_held_out(fingerprint(kind, problem)):
            found.append((text, said))
    return found


def make(rng: random.Random, kind: str, source: str, narrow: bool = False) -> Row:
    """A row of one of `KINDS`; `narrow` draws in the proportions of SFT."""
    drawn = _two_steps(rng, narrow) if kind == "multi_turn" else _one_turn(rng, kind, narrow)
    truth = {"kind": kind, "category": CATEGORY[kind], "calls": drawn["calls"], "needs": drawn["needs"],
             "state": drawn.get("state", {}), "max_turns": MAX_TURNS}
    return Row(id="", domain="agent", source=source, fingerprint=fingerprint(kind, drawn["problem"]),
               messages=({"role": "user", "content": drawn["text"]},), truth=truth, tools=drawn["tools"])
