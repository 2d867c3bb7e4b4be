"""The 4,441 items of BFCL v3 as rows: from the wheel `bfcl-eval`, or from the data set's repository where it is given by hand.

Tools are in the form that Qwen3's template prints: types as in JSON schema, a hint at the language and a note at each
float, as BFCL writes them for models that call functions; but names keep their dots, which Qwen3 can say and the checker
(`bfcl_wheel`) then expects. An item's functions are kept beside, as the checker reads them.
`Row.truth` of a single-turn item: kind "bfcl", category, functions, ground_truth (none for irrelevance and relevance: []).
Of a multi-turn item: kind, category, test: its id, turns: what the user says in each turn after the first,
names: the functions that exist, initial_config and involved_classes: its world, ground_truth: the calls of each turn.
"""
from __future__ import annotations

import copy
import json
from collections import Counter
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import replace
from pathlib import Path

from m2rl_core.domains import Row, bfcl_wheel
from m2rl_core.domains.bfcl import CATEGORIES, KIND, MULTI
from m2rl_core.errors import StudyError
from m2rl_core.real import hub, schema
from m2rl_core.real.hub import File

REPO, BENCHMARK, PREFIX = "gorilla-llm/Berkeley-Function-Calling-Leaderboard", "bfcl_v3", "BFCL_v3_"
QUESTIONS, ANSWERS, DOCS = "v3", "answers", "functions"  # the source's splits
DOC_OF = {  # class: file that describes its functions
    "GorillaFileSystem": "gorilla_file_system", "MathAPI": "math_api", "MessageAPI": "message_api",
    "TwitterAPI": "posting_api", "TicketAPI": "ticket_api", "TradingBot": "trading_bot", "TravelAPI": "travel_booking",
    "VehicleControlAPI": "vehicle_control",
}
HINT = {"java": " Note that the provided function is in Java 8 SDK syntax.",
        "javascript": " Note that the provided function is in JavaScript syntax."}
PYTHON_HINT = " Note that the provided function is in Python 3 syntax."
MORE = "I have updated some more functions you can choose from. What about now?"  # a turn that adds functions
JSON_TYPE = {  # BFCL's names of types; a name that is not here is a string
    "integer": "integer", "number": "number", "float": "number", "boolean": "boolean", "bool": "boolean",
    "array": "array", "list": "array", "tuple": "array", "dict": "object", "object": "object",
}


# --- files


def files(questions: Sequence[File] = ()) -> list[File]:
    """The files of questions, answers and functions: what lies beside these questions, at their commit; without any,
    those given by hand under M2RL_DATA, else the wheel's own copy."""
    source = hub.sources()[REPO]
    if questions:
        return [*questions, *hub.files(questions[0].source, (ANSWERS, DOCS))]
    if hub.folder_of(source) is not None:
        return hub.files(source, (QUESTIONS, ANSWERS, DOCS))
    data = bfcl_wheel.root() / "data"
    source = replace(source, revision=f"{bfcl_wheel.NAME} {bfcl_wheel.VERSION}")
    return [File(source, split, path.relative_to(data).as_posix(), str(path))
            for split in (QUESTIONS, ANSWERS, DOCS) for path in sorted(data.glob(source.splits[split]))]


def rows(given: Sequence[File] = ()) -> list[Row]:
    """All items, each category's spread evenly, so that the first n are a small picture of the whole.

    `given` are the files, or those of the questions alone; see `files` for what else. Files of other categories are left
    out. SchemaError for a row of another schema (file, line and field); StudyError for a category with another number of
    items than BFCL v3 has, and where there is neither wheel nor folder.
    """
    if not any(file.split == ANSWERS for file in given):
        given = files(given)
    docs = {Path(file.path).stem: _tools(file) for file in given if file.split == DOCS}
    truths = {row_id: truth for file in given if file.split == ANSWERS for row_id, truth in _truths(file)}
    found: dict[str, list[Row]] = {name: [] for name in CATEGORIES}
    for file in given:
        category = Path(file.path).stem.removeprefix(PREFIX)
        if file.split == QUESTIONS and category in CATEGORIES:
            make = _multi if category in MULTI else _single
            found[category] += [make(row, category, f"{file.place}, line {n}", truths, docs) for n, row in _lines(file)]
    _check(found, given)
    order = [((i + 0.5) / len(items), name, row) for name, items in found.items() for i, row in enumerate(items)]
    return [row for *_, row in sorted(order, key=lambda entry: entry[:2])]


def _lines(file: File) -> Iterator[tuple[int, dict]]:
    """As `hub.read`, which would start a reader of its own for each of forty small files."""
    if Path(file.address).is_file():
        for number, text in enumerate(Path(file.address).read_text(encoding="utf-8").splitlines(), 1):
            if text.strip():
                yield number, hub.parsed(text, file, number)
    else:
        yield from hub.read(file)


def _tools(file: File) -> list[dict]:
    """The tools that a file of functions describes."""
    return [tool_of(function, "multi_turn") for number, row in _lines(file)
            for function in _functions([row], f"{file.place}, line {number}", "line")]


def _truths(file: File) -> Iterator[tuple[str, list]]:
    for number, row in _lines(file):
        place = f"{file.place}, line {number}"
        yield schema.get(row, "id", str, place), schema.get(row, "ground_truth", list, place)


def _check(found: dict[str, list[Row]], given: Iterable[File]) -> None:
    wrong = [f"{len(found[name])} of {name} (expected {n})" for name, n in CATEGORIES.items() if len(found[name]) != n]
    if wrong:
        where = ", ".join(sorted({str(Path(file.address).parent) for file in given if file.split == QUESTIONS})) or "no file"
        raise StudyError(f"{BENCHMARK}: {', '.join(wrong[:3])}{', ...' if len(wrong) > 3 else ''} in {where}: take all "
                         f"{PREFIX}*.json of one revision, with possible_answer and multi_turn_func_doc beside them")
    ids = Counter(row.id for items in found.values() for row in items)
    if (twice := ids.most_common(1)[0])[1] > 1:
        raise StudyError(f"{BENCHMARK}: {twice[0]} stands there {twice[1]} times")


# --- rows


def _single(row: dict, category: str, place: str, truths: dict, docs: dict) -> Row:
    name = schema.get(row, "id", str, place)
    functions = _functions(schema.get(row, "function", list, place), place, "function")
    free = category.endswith("relevance")
    if not free and name not in truths:
        raise schema.wrong(place, "id", f"no answer to {name!r} in possible_answer")
    truth = {"kind": KIND, "category": category, "functions": functions, "ground_truth": [] if free else truths[name]}
    (messages,) = _turns(row, place, 1)
    return _row(name, messages, truth, [tool_of(function, category) for function in functions])


def _multi(row: dict, category: str, place: str, truths: dict, docs: dict) -> Row:
    name = schema.get(row, "id", str, place)
    if name not in truths:
        raise schema.wrong(place, "id", f"no answer to {name!r} in possible_answer")
    classes = schema.get(row, "involved_classes", list, place)
    for i, one in enumerate(classes):
        if DOC_OF.get(one) not in docs:
            raise schema.wrong(place, f"involved_classes[{i}]", f"no functions of {one!r} in multi_turn_func_doc")
    tools = {tool["function"]["name"]: tool for one in classes for tool in docs[DOC_OF[one]]}
    names, turns = list(tools), _turns(row, place)
    for turn, missed in schema.get(row, "missed_function", dict, place, {}).items():
        if turns[int(turn)]:
            raise schema.wrong(place, f"question[{turn}]", "the turn that adds functions says something of its own")
        added = [tools.pop(one) for one in missed]
        turns[int(turn)] = [{"role": "user", "content": "\n".join([*(_json(tool) for tool in added), MORE])}]
    first, *later = turns
    for i, turn in enumerate(later, 1):
        if [message["role"] for message in turn] != ["user"]:
            raise schema.wrong(place, f"question[{i}]", "expected one message of the user")
    truth = {"kind": KIND, "category": category, "test": name, "turns": [turn[0]["content"] for turn in later],
             "names": names, "initial_config": schema.get(row, "initial_config", dict, place),
             "involved_classes": classes, "ground_truth": truths[name]}
    return _row(name, first, truth, list(tools.values()))


def _row(name: str, messages: Sequence[dict], truth: dict, tools: Sequence[dict]) -> Row:
    truth["gate"] = "open"  # an answer without thinking counts, as for the official code
    return Row(f"{BENCHMARK}/{name}", "agent", BENCHMARK, f"{BENCHMARK}/{name}", tuple(messages), truth, tuple(tools))


def _turns(row: dict, place: str, count: int | None = None) -> list[list[dict]]:
    """The messages of each turn; SchemaError for another number of turns than `count`, and for a first one without any."""
    given = schema.get(row, "question", list, place)
    if not given or not given[0] or count not in (None, len(given)):
        raise schema.wrong(place, "question", f"{len(given)} turns, or none said in the first")
    return [schema.messages({"messages": turn}, f"{place}, question[{i}]") for i, turn in enumerate(given)]


def _functions(functions: list, place: str, path: str) -> list[dict]:
    for i, function in enumerate(functions):
        if not isinstance(function, dict):
            raise schema.wrong(place, f"{path}[{i}]", f"expected an object, found {repr(function)[:40]}")
        at = f"{path}[{i}]."
        schema.get(function, "name", str, place, path=at)
        schema.get(function, "description", str, place, path=at)
        parameters = schema.get(function, "parameters", dict, place, path=at)
        schema.get(parameters, "properties", dict, place, path=f"{at}parameters.")
    return functions


# --- tools


def tool_of(function: dict, category: str) -> dict:
    """A function of BFCL as a tool of Qwen3's template; Java's and JavaScript's arguments are asked for as texts."""
    shown = copy.deepcopy(function)
    shown["description"] += HINT.get(category, PYTHON_HINT)
    properties = shown["parameters"]["properties"]
    if category in HINT:
        for value in properties.values():
            _as_text(value, {"java": "Java", "javascript": "JavaScript"}[category])
    shown["parameters"]["type"] = "object"
    for value in properties.values():
        _retype(value)
    return {"type": "function", "function": shown}


def _as_text(value: dict, language: str) -> None:
    """The argument's type moves into its description."""
    kind = value["type"]
    value["description"] += (f" This parameter can be of any type of {language} object in string representation."
                             if kind == "any" else f" This is {language} {kind} type parameter in string representation.")
    if kind in ("ArrayList", "Array", "array"):
        value["description"] += (f" The list elements are of type {value.pop('items')['type']}; "
                                 "they are not in string representation.")
    if kind == "dict" and "properties" in value:
        value["description"] += (" The dictionary entries have the following schema; they are not in string representation. "
                                 + json.dumps(value.pop("properties")))
    value["type"] = "string"


def _retype(value: dict) -> None:
    """BFCL's name of a type becomes JSON schema's, for what is inside of it too."""
    kind = value.get("type")
    if kind == "float":
        value["format"] = "float"
        value["description"] = value.get("description", "") + " This is a float type value."
    value["type"] = JSON_TYPE.get(kind, "string")
    if value["type"] in ("array", "object"):
        for inner in value.get("properties", {}).values():
            _retype(inner)
        if "properties" not in value and "items" in value:
            _retype_items(value["items"])


def _retype_items(items: dict) -> None:
    items["type"] = JSON_TYPE.get(items.get("type"), "string")
    if items["type"] == "array" and "items" in items:
        items["items"]["type"] = JSON_TYPE.get(items["items"].get("type"), "string")
    for inner in items.get("properties", {}).values() if items["type"] == "object" else ():
        _retype(inner)


def _json(value) -> str:
    """As the template's tojson writes it."""
    return json.dumps(value, ensure_ascii=False)
