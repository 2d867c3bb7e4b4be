"""One row of nvidia/Nemotron-3-Nano-RL-Training-Blend as a `domains.Row`, or the reason why it is dropped.

`Row.truth` by domain (what a verifier of real rows reads):
  math     answer: the text of the value
  coding   unit_tests: {inputs, outputs}, texts for stdin and stdout; cpu_seconds: for all tests together (10 a test as in
           the released code, 60 at most; that code draws 20 of the tests, here all count); a LiveCodeBench item adds
           function: the method of Solution that is called ("" for stdin), inputs then being one JSON value a line
  science  letter: of the right option; options: how many there are; output_regex: the form that the prompt asks for, where
           it is another than "Answer: X"
  if       instruction_id_list, kwargs: in the same order, without keys that are None
  agent    kind: "workplace" (NeMo-Gym's tables; `workbench` replays `calls` and compares states),
           calls: [{name, arguments}], category, environment, max_turns: 6 as in the released code. A BFCL item: see
           `bfcl_rows`
"""
from __future__ import annotations

import hashlib
import re

from m2rl_core.domains import Row
from m2rl_core.domains.letters import BOXED
from m2rl_core.real import hub, questions, schema
from m2rl_core.real.questions import DAPO, SKYWORK

LABELS = {
    DAPO: "math", SKYWORK: "math", "nano_v3_sft_profiled_comp_coding_50tests": "coding",
    "nano_v3_sft_profiled_stem_mcqa": "science", "nano_v3_sft_profiled_instruction_following": "if",
    "nano_v3_sft_profiled_workbench": "agent",
}
NOT_USED = "nano_v3_sft_profiled_structured_outputs"
MAX_TURNS = 6
RUN_SECONDS, CPU_SECONDS = 10, 60
# The released code's wording (process_rl_data.py): put before a math prompt, and in place of the opening of a science one.
MATH_OPENING = ("Solve the following math problem step by step. The last line of your response should be of the form "
                "Answer: $Answer (without quotes) where $Answer is the answer to the problem.\n\n")
CHOICE_OPENING = "Answer the following multiple choice question."
CHOICE_STEPS = "Answer the following multiple choice question step by step."
Problems = dict[tuple[str, int], tuple[str, str]]  # (label, row) -> (question, truth)


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
        truth = {"coding": _coding, "science": _science, "if": instruction, "agent": _agent}[domain](row, place)
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
        number, template = placeholder(row, place)
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
    if not inputs:
        return "empty truth"
    return {"unit_tests": {"inputs": inputs, "outputs": outputs}, "cpu_seconds": min(RUN_SECONDS * len(inputs), CPU_SECONDS)}


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
    form = _form(row, place)
    return {"letter": letter, "options": max(ord(key) for key in options if len(key) == 1) - ord("A") + 1,
            **({"output_regex": form} if form else {})}


def _form(row: dict, place: str) -> str:
    """The regular expression of the form that a row's prompt asks for; "" for the usual one.

    NeMo-Gym's rows state it in `template_metadata`, or by a mode of grading; without either, a prompt that speaks of a box
    asks for one.
    """
    told = schema.decoded(row.get("template_metadata") or {}, dict, place, "template_metadata")
    if form := schema.get(told, "output_regex", str, place, "", "template_metadata."):
        try:
            re.compile(form)
        except re.error as error:
            raise schema.wrong(place, "template_metadata.output_regex",
                               f"{form[:40]!r} is no regular expression: {error}") from error
        return form
    mode = schema.get(row, "grading_mode", str, place, "")
    if mode == "lenient_answer_colon":
        return r"\banswer\s*:\s*(.+)"
    asked = str(schema.get(row, "responses_create_params", dict, place, {}).get("input"))
    return BOXED if "boxed" in (mode or asked) else ""


def instruction(row: dict, place: str) -> dict | str:
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


def placeholder(row: dict, place: str) -> tuple[int, dict | str]:
    """(row number, template) of a placeholder."""
    held = schema.get(row, "_hf_placeholder", dict, place)
    kind = str if row["dataset"] == SKYWORK else dict
    template = schema.get(held, "question_template", kind, place, path="_hf_placeholder.")
    if kind is str and "{question}" not in template:
        raise schema.wrong(place, "_hf_placeholder.question_template", "it has no {question}")
    return schema.get(held, "row", int, place, path="_hf_placeholder."), template
