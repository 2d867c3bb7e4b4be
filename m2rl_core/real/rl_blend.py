"""The RL blend: rows of nvidia/Nemotron-3-Nano-RL-Training-Blend as `domains.Row`, a JSON-lines file for each domain.

`Row.truth` by domain (what a verifier of real rows reads):
  math     answer: the text of the value
  coding   unit_tests: {inputs, outputs}, texts for stdin and stdout; a LiveCodeBench item adds function: the method of
           Solution that is called ("" for stdin), inputs then being one JSON value a line
  science  letter: of the right option; options: how many there are
  if       instruction_id_list, kwargs: in the same order, without keys that are None
  agent    kind: "workplace" (NeMo-Gym's tables; replay `calls` and compare states), calls: [{name, arguments}], category,
           environment, max_turns: 6 as in the released code; `agent.verify` has no such kind yet. A BFCL item has kind: its category, calls: [{name,
           arguments: {name: [allowed values]}}] as `tool_calls.all_match` reads them; its multi-turn ones have calls: a
           list for each turn, and state: the classes and their first values
"""
from __future__ import annotations

import hashlib
import json
import re
from collections import Counter
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Literal

from m2rl_core.domains import DOMAINS, Row
from m2rl_core.errors import StudyError
from m2rl_core.real import commits, hub, pieces, questions, schema
from m2rl_core.real.hub import File
from m2rl_core.real.questions import DAPO, SKYWORK
from m2rl_core.store import hold, write_atomic

REPO = "nvidia/Nemotron-3-Nano-RL-Training-Blend"
LABELS = {
    DAPO: "math", SKYWORK: "math", "nano_v3_sft_profiled_comp_coding_50tests": "coding",
    "nano_v3_sft_profiled_stem_mcqa": "science", "nano_v3_sft_profiled_instruction_following": "if",
    "nano_v3_sft_profiled_workbench": "agent",
}
NOT_USED = "nano_v3_sft_profiled_structured_outputs"
PAPER = {"math": 22_056, "coding": 19_169, "science": 19_670, "if": 16_575, "agent": 10_229}  # section 3.2
MAX_TURNS = 6
# The released code's wording (process_rl_data.py): put before a math prompt, and in place of the opening of a science one.
MATH_OPENING = ("Solve the following math problem step by step. The last line of your response should be of the form "
                "Answer: $Answer (without quotes) where $Answer is the answer to the problem.\n\n")
CHOICE_OPENING = "Answer the following multiple choice question."
CHOICE_STEPS = "Answer the following multiple choice question step by step."
Problems = dict[tuple[str, int], tuple[str, str]]  # (label, row) -> (question, truth)


@dataclass(frozen=True)
class Settings:
    """`template`: prompts as the data has them, or worded again as the released code does. `first`: lines (0: all).

    `skip_wrong`: rows of the wrong schema are dropped and counted.
    """

    template: Literal["data", "released"] = "data"
    first: int = 0
    skip_wrong: bool = False
    lines: int = pieces.LINES


def build(out: Path, settings: Settings = Settings(), report: Callable[[str], None] = lambda text: None) -> dict:
    """Writes <domain>.jsonl and report.json into `out` and returns the report; goes on where a killed run stopped.

    Raises HubError for what cannot be opened, SchemaError for a row of another schema.
    """
    if settings.template not in ("data", "released"):
        raise StudyError(f"template {settings.template!r}: one of data, released")
    plan = pieces.begin(out, {"kind": "rl", **asdict(settings)})
    if (out / "report.json").is_file():
        return json.loads((out / "report.json").read_text())
    files = commits.files(REPO, out)
    needed = _needed(files, settings)
    report(f"{sum(map(len, needed.values()))} math problems to fetch")
    known: Problems = {}
    for label, numbers in needed.items():
        origin = commits.source(questions.MATH[label], out) if numbers else None
        known |= {(label, number): problem for number, problem in (
            questions.problems(origin, numbers) if origin else {}).items()}

    def convert(file: File, number: int, row: dict) -> dict | str:
        made = to_row(row, f"{file.place}, line {number}", number, known, settings.template)
        return made if isinstance(made, str) else {"domain": made.domain, "row": made.to_json()}

    with hold(out / ".lock", "this blend", report):
        done = pieces.work(files, out / "pieces", convert, first=settings.first, lines=settings.lines,
                           skip_wrong=settings.skip_wrong,
                           report=lambda piece: report(f"{piece.name}: {piece.rows} of {piece.read} rows"))
    told = _join(out, done) | {"plan": plan, "commits": commits.read(out), "read": sum(piece.read for piece in done),
                               "dropped": pieces.dropped(done)}
    write_atomic(out / "report.json", json.dumps(told, indent=1))
    return told


def _needed(files: list[File], settings: Settings) -> dict[str, set[int]]:
    """Label -> numbers of the rows of DAPO and Skywork that placeholders name."""
    wanted: dict[str, set[int]] = {label: set() for label in questions.MATH}
    for file in files:
        for number, row in hub.read(file):
            if settings.first and number > settings.first:
                break
            if row.get("dataset") in wanted and row.get("_hf_placeholder") is not None:
                try:
                    wanted[row["dataset"]].add(_placeholder(row, f"{file.place}, line {number}")[0])
                except schema.SchemaError:
                    if not settings.skip_wrong:
                        raise
    return wanted


def _placeholder(row: dict, place: str) -> tuple[int, dict | str]:
    """(row number, template) of a placeholder."""
    held = schema.get(row, "_hf_placeholder", dict, place)
    kind = str if row["dataset"] == SKYWORK else dict
    template = schema.get(held, "question_template", kind, place, path="_hf_placeholder.")
    if kind is str and "{question}" not in template:
        raise schema.wrong(place, "_hf_placeholder.question_template", "it has no {question}")
    return schema.get(held, "row", int, place, path="_hf_placeholder."), template


def to_row(row: dict, place: str, number: int, problems: Problems, template: str = "data") -> Row | str:
    """One row of the blend as a `Row`, or the reason why it is dropped. SchemaError names the field that is wrong.

    `number` becomes part of the row's id; `problems` are what placeholders name.
    """
    label = schema.get(row, "dataset", str, place)
    if label == NOT_USED:
        return "structured outputs (not in the study)"
    if label not in LABELS:
        raise schema.wrong(place, "dataset", f"unknown label {label!r}, the labels are {', '.join([*LABELS, NOT_USED])}")
    domain = LABELS[label]
    asked = schema.get(row, "responses_create_params", dict, place, {})
    messages = _messages(asked, place)
    if domain == "math":
        messages, truth = _math(row, label, place, messages, problems)
        if messages is None:
            return "placeholder without a problem"
    else:
        truth = {"coding": _coding, "science": _science, "if": _instruction, "agent": _agent}[domain](row, place)
    if isinstance(truth, str):
        return truth
    if not messages or not any(message["content"].strip() for message in messages):
        return "no prompt"
    if not all(schema.whole(message["content"]) for message in messages):
        return "half a character"
    bare = messages[-1]["content"]
    if template == "released":
        messages = _reworded(messages, domain)
    tools = schema.tools(asked.get("tools"), place, "responses_create_params.tools")
    problem = hashlib.sha256(" ".join(bare.split()).casefold().encode()).hexdigest()[:16]
    return Row(f"{label}/{number}", domain, label, f"{label}:{problem}", tuple(messages), truth, tuple(tools))


def _messages(asked: dict, place: str) -> list[dict]:
    """The prompt: `input` is a list of messages, or one text."""
    given = asked.get("input")
    if isinstance(given, str):
        return [{"role": "user", "content": given}]
    found = schema.messages({"messages": given}, place + ", responses_create_params.input")
    return [{"role": message["role"], "content": message["content"]} for message in found]


def _math(row: dict, label: str, place: str, messages: list[dict], problems: Problems):
    if row.get("_hf_placeholder") is not None:
        number, template = _placeholder(row, place)
        if (label, number) not in problems:
            return None, {}
        question, answer = problems[label, number]
        messages = [{"role": "user", "content": questions.filled(label, template, question)}, *messages[1:]]
    else:  # filled already, by NVIDIA's create_nanov3_jsonl.py
        answer = questions.truth_of(row.get("expected_answer"))
    return messages, {"answer": answer} if answer else "empty truth"


def _coding(row: dict, place: str) -> dict | str:
    tests = schema.decoded(row.get("verifier_metadata") or {}, dict, place, "verifier_metadata")
    tests = schema.get(tests, "unit_tests", dict, place, {}, "verifier_metadata.")
    path = "verifier_metadata.unit_tests."
    inputs, outputs = (schema.get(tests, name, list, place, [], path) for name in ("inputs", "outputs"))
    if len(inputs) != len(outputs):
        raise schema.wrong(place, path + "outputs", f"{len(outputs)} outputs for {len(inputs)} inputs")
    for name, texts in (("inputs", inputs), ("outputs", outputs)):
        for i, text in enumerate(texts):
            if not isinstance(text, str):
                raise schema.wrong(place, f"{path}{name}[{i}]", f"expected a text, found {repr(text)[:40]}")
    return {"unit_tests": {"inputs": inputs, "outputs": outputs}} if inputs else "empty truth"


def _science(row: dict, place: str) -> dict | str:
    options: dict[str, str] = {}
    for i, one in enumerate(schema.get(row, "options", list, place)):
        if not isinstance(one, dict):
            raise schema.wrong(place, f"options[{i}]", f"expected an object, found {repr(one)[:40]}")
        options |= hub.without_none(one)  # a letter each; Arrow fills in all other letters with None
    letter = schema.get(row, "expected_answer", str, place, "").strip()
    if not letter:
        return "empty truth"
    if not re.fullmatch("[A-Z]", letter):
        raise schema.wrong(place, "expected_answer", f"expected one letter, found {letter[:40]!r}")
    if letter not in options:
        return "the right letter is no option"
    return {"letter": letter, "options": max(ord(key) for key in options if len(key) == 1) - ord("A") + 1}


def _instruction(row: dict, place: str) -> dict | str:
    deeper = schema.decoded(row.get("verifier_metadata") or {}, dict, place, "verifier_metadata")
    held = {**deeper, **{key: value for key, value in row.items() if value is not None}}  # newer files have it deeper
    names = schema.get(held, "instruction_id_list", list, place, [])
    if not names:
        return "empty truth"
    kwargs = schema.decoded(held.get("kwargs") or [None] * len(names), list, place, "kwargs")
    if len(kwargs) != len(names):
        raise schema.wrong(place, "kwargs", f"{len(kwargs)} for {len(names)} instructions")
    for i, (name, given) in enumerate(zip(names, kwargs, strict=True)):
        if not isinstance(name, str):
            raise schema.wrong(place, f"instruction_id_list[{i}]", f"expected a text, found {repr(name)[:40]}")
        if not isinstance(given, dict | None):
            raise schema.wrong(place, f"kwargs[{i}]", f"expected an object, found {repr(given)[:40]}")
    return {"instruction_id_list": names, "kwargs": [hub.without_none(given or {}) for given in kwargs]}


def _agent(row: dict, place: str) -> dict | str:
    calls = []
    for i, call in enumerate(schema.decoded(row.get("ground_truth") or [], list, place, "ground_truth")):
        path = f"ground_truth[{i}]"
        if not isinstance(call, dict):
            raise schema.wrong(place, path, f"expected an object, found {repr(call)[:40]}")
        calls.append({"name": schema.get(call, "name", str, place, path=path + "."),
                      "arguments": schema.decoded(call.get("arguments"), dict, place, path + ".arguments")})
    if not calls:
        return "empty truth"
    return {"kind": "workplace", "calls": calls, "category": schema.get(row, "category", str, place, ""),
            "environment": schema.get(row, "environment_name", str, place, ""), "max_turns": MAX_TURNS}


def _reworded(messages: list[dict], domain: str) -> list[dict]:
    """The released code's wording of the first message.

    It cuts as many characters off every science prompt as CHOICE_OPENING has; here another opening stays as it is.
    """
    first = messages[0]["content"]
    if domain == "math":
        first = MATH_OPENING + first
    elif domain == "science" and first.startswith(CHOICE_OPENING):
        first = CHOICE_STEPS + first[len(CHOICE_OPENING):]
    return [{**messages[0], "content": first}, *messages[1:]]


def _join(out: Path, done: list[pieces.Piece]) -> dict:
    """One JSON-lines file a domain, by rename, and what is in them."""
    names = {domain: out / f"{domain}.jsonl" for domain in DOMAINS}
    counts: Counter = Counter()
    ids: Counter = Counter()
    told = Counter()
    streams = {domain: open(path.with_name(path.name + ".new"), "w", encoding="utf-8") for domain, path in names.items()}
    try:
        for piece in done:
            for line in pieces.rows_of(out / "pieces", piece):
                streams[line["domain"]].write(line["row"] + "\n")
                row = Row.from_json(line["row"])
                counts[row.domain] += 1
                ids.update(row.truth.get("instruction_id_list", ()))
                told["math prompts without \\boxed"] += row.domain == "math" and "\\boxed" not in row.messages[-1]["content"]
                told["science prompts of another opening"] += (
                    row.domain == "science" and not row.messages[0]["content"].startswith(CHOICE_OPENING[:-1]))
    finally:
        for stream in streams.values():
            stream.close()
    for path in names.values():
        path.with_name(path.name + ".new").replace(path)
    return {"domains": {domain: {"rows": counts[domain], "paper": PAPER[domain],
                                 "sha256": pieces.digest(path)} for domain, path in names.items()},
            "instruction_ids": dict(sorted(ids.items())), "remarks": dict(told)}


def rows(folder: Path, domain: str) -> list[Row]:
    """The rows of one domain that `build` wrote; StudyError where there are none."""
    path = folder / f"{domain}.jsonl"
    if not path.is_file():
        raise StudyError(f"{path} does not exist: `python -m m2rl_core data rl --out {folder}` makes it")
    with path.open(encoding="utf-8") as stream:
        return [Row.from_json(line) for line in stream]


def prompts(folder: Path) -> Iterator[tuple[str, str]]:
    """(id, what the user said) of every row of `folder`, for `decontamination`."""
    for domain in DOMAINS:
        with (folder / f"{domain}.jsonl").open(encoding="utf-8") as stream:
            for row in map(Row.from_json, stream):
                yield row.id, "\n".join(m["content"] for m in row.messages if m["role"] == "user")
