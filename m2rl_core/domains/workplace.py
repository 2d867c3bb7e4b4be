"""A small stateful workplace: contacts, mail, events and tasks, and six tools that act on them.

It stands for NeMo-Gym's workplace assistant (27 tools over five tables) in the miniature study. A tool is
a plain function of the tables and of arguments that `agent.parse_calls` has checked; no text that a model
wrote is evaluated. The tables belong to one `World`; nothing is kept between worlds.
"""
from __future__ import annotations

import copy
import json

DAYS = ("Mon", "Tue", "Wed", "Thu", "Fri")
HOURS = tuple(range(1, 10))
TABLES = ("contacts", "events", "mail", "tasks")


class ToolError(Exception):
    """A tool refused its arguments; the message is what the model gets to read."""


def _find_contact(tables: dict, name: str) -> dict:
    for contact in tables["contacts"]:
        if contact["name"].casefold() == name.casefold():
            return {"id": contact["id"]}
    raise ToolError("no such contact")


def _find_event(tables: dict, day: str, hour: int) -> dict:
    for event in tables["events"]:
        if event["day"].casefold() == day.casefold() and event["hour"] == hour:
            return {"id": event["id"]}
    raise ToolError("no such event")


def _send_mail(tables: dict, to: int, text: str) -> dict:
    tables["mail"].append({"to": to, "text": text})
    return {"ok": True}


def _add_event(tables: dict, day: str, hour: int, who: int) -> dict:
    if day.casefold() not in {known.casefold() for known in DAYS}:
        raise ToolError("no such day")
    if hour not in HOURS:
        raise ToolError("no such hour")
    taken = {event["id"] for event in tables["events"]}
    free = next(i for i in range(1, len(taken) + 2) if i not in taken)
    tables["events"].append({"id": free, "day": day, "hour": hour, "who": who})
    return {"ok": True}


def _delete_event(tables: dict, id: int) -> dict:
    for event in tables["events"]:
        if event["id"] == id:
            tables["events"].remove(event)
            return {"ok": True}
    raise ToolError("no such event")


def _add_task(tables: dict, title: str, day: str = "") -> dict:
    tables["tasks"].append({"title": title, "day": day})
    return {"ok": True}


FUNCTIONS = {
    "find_contact": _find_contact, "find_event": _find_event, "send_mail": _send_mail,
    "add_event": _add_event, "delete_event": _delete_event, "add_task": _add_task,
}


def _tool(name: str, description: str, optional: tuple[str, ...] = (), /, **types: str) -> dict:
    """A tool in OpenAI's form; `types` gives each argument its JSON type."""
    parameters = {"type": "object", "properties": {key: {"type": kind} for key, kind in types.items()},
                  "required": [key for key in types if key not in optional]}
    return {"type": "function", "function": {"name": name, "description": description, "parameters": parameters}}


TOOLS = {tool["function"]["name"]: tool for tool in (
    _tool("find_contact", "id of a contact", name="string"),
    _tool("find_event", "id of an event", day="string", hour="integer"),
    _tool("send_mail", "mail a contact", to="integer", text="string"),
    _tool("add_event", "meet a contact", day="string", hour="integer", who="integer"),
    _tool("delete_event", "delete an event", id="integer"),
    _tool("add_task", "add a task", ("day",), title="string", day="string"),
)}


def signature(tool: dict) -> str:
    """The one line that stands for a tool in a prompt: "send_mail(to, text)"."""
    function = tool["function"]
    return f"{function['name']}({', '.join(function['parameters']['properties'])})"


def compact(value: dict) -> str:
    """JSON without spaces: fewer tokens for a small model, the same to every parser."""
    return json.dumps(value, separators=(",", ":"))


class World:
    """The four tables of one episode, copied from `state` so that no two episodes share them."""

    def __init__(self, state: dict):
        unknown = sorted(set(state) - set(TABLES))
        if unknown:
            raise ValueError(f"workplace state: unknown table {unknown[0]!r}; the tables are {', '.join(TABLES)}")
        self.tables = {name: copy.deepcopy(state.get(name, [])) for name in TABLES}

    def run(self, call: dict) -> str:
        """Run one checked call and return what the tool answers, as JSON; a refused call changes nothing."""
        if call["name"] not in FUNCTIONS:
            raise ValueError(f"the workplace has no tool {call['name']!r}; it has {', '.join(FUNCTIONS)}")
        try:
            return compact(FUNCTIONS[call["name"]](self.tables, **call["arguments"]))
        except ToolError as error:
            return compact({"error": str(error)})

    def snapshot(self) -> dict[str, list[str]]:
        """What is compared between two worlds: each table as a sorted list, texts in lower case."""
        return {name: sorted(json.dumps(row, sort_keys=True).casefold() for row in rows)
                for name, rows in self.tables.items()}
