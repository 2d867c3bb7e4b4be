"""Fills placeholders: rows that name a problem of another data set in place of its text.

Code rows of the SFT blend have "-" for the user's words and (dataset, split, index) beside it; math rows of the RL
blend have `_hf_placeholder` {row, question_template}. Both mean the row's number, from 0, in that split.
"""
from __future__ import annotations

import json
from collections.abc import Callable, Iterable

from m2rl_core.real import hub, schema
from m2rl_core.real.hub import Source

PLACEHOLDER = "-"
CODE = {"taco": "BAAI/TACO", "apps": "codeparrot/apps", "code_contests": "deepmind/code_contests",
        "open-r1/codeforces": "open-r1/codeforces"}
COLUMNS = {"taco": ("question",), "apps": ("question",), "code_contests": ("description",),
           "open-r1/codeforces": ("description", "input_format", "output_format", "examples", "note")}
DAPO, SKYWORK = "nano_v3_sft_profiled_dapo17k", "nano_v3_sft_profiled_skywork_no_omni"
MATH = {DAPO: "BytedTsinghua-SIA/DAPO-Math-17k", SKYWORK: "Skywork/Skywork-OR1-RL-Data"}


class Statements:
    """Problem statements of the four programming data sets, each read whole (some 100 MB) when first asked for.

    `find(source)` gives the source, with its commit, that a repository is read from.
    """

    def __init__(self, find: Callable[[str], Source]):
        self.find = find
        self._known: dict[tuple[str, str], list[str]] = {}

    def of(self, dataset: str, split: str, index: int) -> str:
        """The statement of one problem; "" for a data set, a split or an index that is not there, or an empty one."""
        if dataset not in CODE:
            return ""
        if (dataset, split) not in self._known:
            self._known[dataset, split] = self._read(dataset, split)
        known = self._known[dataset, split]
        return known[index] if 0 <= index < len(known) else ""

    def _read(self, dataset: str, split: str) -> list[str]:
        source = self.find(CODE[dataset])
        return [statement(dataset, row, f"{file.place}, line {number}")
                for file in (hub.files(source, [split]) if split in source.splits else ())
                for number, row in hub.read(file, columns=COLUMNS[dataset])]


def statement(dataset: str, row: dict, place: str) -> str:
    """One problem's text: TACO and APPS have it whole, code_contests its description, codeforces its parts.

    codeforces' parts are joined as the released code does: Input, Output, Examples, Note under their names.
    """
    if dataset in ("taco", "apps"):
        return schema.get(row, "question", str, place, "")
    text = schema.get(row, "description", str, place, "")
    if dataset == "code_contests" or not text:
        return text
    parts = [text]
    for title, name in (("Input", "input_format"), ("Output", "output_format")):
        if part := schema.get(row, name, str, place, ""):
            parts += [title, part]
    examples = schema.get(row, "examples", list, place, [])
    parts += ["Examples"] if examples else []
    for example in examples:
        parts += [text for name in ("input", "output") if name in example for text in (name.capitalize(), example[name])]
    if note := schema.get(row, "note", str, place, ""):
        parts += ["Note", note]
    return "\n\n".join(parts)


def problems(source: Source, wanted: Iterable[int]) -> dict[int, tuple[str, str]]:
    """Row number -> (question, truth) of the wanted rows of DAPO or Skywork; numbers beyond the end are left out."""
    wanted, found, before = set(wanted), {}, 0
    for file in hub.files(source) if wanted else ():
        number = 0
        for number, row in hub.read(file, columns=("prompt", "reward_model")):
            if before + number - 1 in wanted:
                found[before + number - 1] = _problem(row, f"{file.place}, line {number}")
        before += number
    return found


def _problem(row: dict, place: str) -> tuple[str, str]:
    prompt = schema.get(row, "prompt", list, place)
    if not prompt or not isinstance(prompt[0], dict):
        raise schema.wrong(place, "prompt[0]", "expected a message")
    model = schema.get(row, "reward_model", dict, place)
    return schema.get(prompt[0], "content", str, place, path="prompt[0]."), truth_of(model.get("ground_truth"))


def truth_of(value) -> str:
    """A math truth as text: the first of a list, also of one in JSON text (Skywork); "" where there is none."""
    if isinstance(value, str) and value.lstrip()[:1] in ("[", '"'):
        try:
            told = json.loads(value)
        except ValueError:  # a text that only begins so, such as the interval [0, 1)
            told = None
        if isinstance(told, str) or isinstance(told, list) and (len(told) < 2 or all(isinstance(t, str) for t in told)):
            value = told  # [1, 2] is an answer in itself
    if isinstance(value, list):
        value = value[0] if value else None
    return "" if value is None else str(value).strip()


def filled(dataset: str, template, question: str) -> str:
    """The prompt of a placeholder: DAPO's own wrapping (first and last paragraph) replaced, or {question} put in."""
    if dataset == SKYWORK:
        return template.replace("{question}", question)
    parts = question.split("\n\n")
    bare = "\n\n".join(parts[1:-1]) if len(parts) > 2 else question
    return f"{template.get('prefix') or ''}{bare}{template.get('suffix') or ''}".rstrip("\n")
