"""Checks rows of public data sets, field by field; an error names the file, the line and the field.

Fields that some rows carry as JSON text (tools, tool calls, arguments) are read either way.
"""
from __future__ import annotations

import json
import re

from m2rl_core.errors import StudyError

ROLES = ("system", "user", "assistant", "tool")
NAMES = {str: "a text", int: "a whole number", list: "a list", dict: "an object"}
MISSING = object()


class SchemaError(StudyError):
    """A row is not of the schema that its data set should have; `field`: which of its fields, without numbers."""

    field: str = ""


def get(row: dict, name: str, kind: type | tuple[type, ...], place: str, default=MISSING, path: str = ""):
    """`row[name]` if it is of this kind; `default`, where there is one, for what is absent or None. SchemaError."""
    found = row.get(name)
    if found is None and default is not MISSING:
        return default
    kinds = kind if isinstance(kind, tuple) else (kind,)
    if not isinstance(found, kinds) or isinstance(found, bool):
        wanted = " or ".join(NAMES[one] for one in kinds)
        raise wrong(place, path + name, f"expected {wanted}, found {'none' if found is None else repr(found)[:40]}")
    return found


def wrong(place: str, field: str, what: str) -> SchemaError:
    """The error for one field of one row; `place` is "file, line N"."""
    error = SchemaError(f"{place}: field {field}: {what}: is it this data set's file, at the commit that is read?")
    error.field = re.sub(r"\[\d+\]", "[]", field)
    return error


def whole(text: str) -> bool:
    """Whether a text can be written at all: JSON may hold halves of characters, which no file and no tokenizer takes."""
    try:
        text.encode()
    except UnicodeEncodeError:
        return False
    return True


def decoded(value, kind: type, place: str, path: str):
    """`value`, or what it says where it is JSON text; SchemaError where that is not of this kind."""
    if isinstance(value, str):
        try:
            value = json.loads(value)
        except (ValueError, RecursionError) as error:
            raise wrong(place, path, f"its text is not JSON ({error})") from error
    if not isinstance(value, kind):
        raise wrong(place, path, f"expected {NAMES[kind]}, found {repr(value)[:40]}")
    return value


def messages(row: dict, place: str) -> list[dict]:
    """A row's messages as {role, content, reasoning_content?, tool_calls?}; [] where the row has none.

    Contents are texts, or lists of parts with a text (a tool's may be any JSON value). Tool calls are [{name,
    arguments}], arguments as they are given: a text stays one, for the chat template writes it as it is. All other
    keys are left out; a developer is a system.
    """
    clean = []
    for i, message in enumerate(get(row, "messages", list, place, [])):
        path = f"messages[{i}]"
        if not isinstance(message, dict):
            raise wrong(place, path, f"expected an object, found {repr(message)[:40]}")
        role = get(message, "role", str, place, path=path + ".")
        role = "system" if role == "developer" else role
        if role not in ROLES:
            raise wrong(place, f"{path}.role", f"unknown role {role!r}, the roles are {', '.join(ROLES)}")
        content = message.get("content")
        if role == "tool" and not isinstance(content, str | None):
            content = json.dumps(content, ensure_ascii=False)
        elif isinstance(content, list):
            content = "".join(_part(part, place, f"{path}.content[{n}]") for n, part in enumerate(content))
        elif not isinstance(content, str | None):
            content = get(message, "content", str, place, path=path + ".")
        one = {"role": role, "content": content or ""}
        if reasoning := get(message, "reasoning_content", str, place, "", path + "."):
            one["reasoning_content"] = reasoning
        if calls := message.get("tool_calls"):
            one["tool_calls"] = _calls(calls, place, f"{path}.tool_calls")
        clean.append(one)
    return clean


def _part(part, place: str, path: str) -> str:
    """The text of one part of a content; SchemaError for a part of another kind, such as a picture."""
    if not isinstance(part, dict):
        raise wrong(place, path, f"expected an object, found {repr(part)[:40]}")
    return get(part, "text", str, place, path=path + ".")


def tools(value, place: str, path: str = "tools") -> list[dict]:
    """Tools as [{type: function, function: {name, description, parameters}}], from that form or from the flat one."""
    listed = []
    for i, tool in enumerate(decoded(value, list, place, path) if value else []):
        if not isinstance(tool, dict):
            raise wrong(place, f"{path}[{i}]", f"expected an object, found {repr(tool)[:40]}")
        at, function = f"{path}[{i}].", tool
        if "function" in tool:
            function, at = get(tool, "function", dict, place, path=at), at + "function."
        get(function, "name", str, place, path=at)
        kept = {key: function[key] for key in ("name", "description", "parameters") if function.get(key) is not None}
        kept.setdefault("parameters", {"type": "object", "properties": {}})
        listed.append({"type": "function", "function": kept})
    return listed


def _calls(value, place: str, path: str) -> list[dict]:
    calls = []
    for i, call in enumerate(decoded(value, list, place, path)):
        if not isinstance(call, dict):
            raise wrong(place, f"{path}[{i}]", f"expected an object, found {repr(call)[:40]}")
        at = f"{path}[{i}]."
        if "function" in call:
            call, at = get(call, "function", dict, place, path=at), at + "function."
        calls.append({"name": get(call, "name", str, place, path=at),
                      "arguments": get(call, "arguments", (str, dict), place, {}, at)})
    return calls
