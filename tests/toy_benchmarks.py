"""Rows of the true schema of the real benchmarks' data sets, all invented here, with a right and a wrong answer to each."""
from __future__ import annotations

import base64
import dataclasses
import json
import pickle
import zlib

from m2rl_core.real import benchmarks

LCB = "livecodebench/code_generation_lite"


def packed(cases) -> str:
    """Private tests as the data set has them: base64 of the zlib of a pickle of JSON."""
    return base64.b64encode(zlib.compress(pickle.dumps(json.dumps(cases)))).decode()


def contest(number: int, day: str, starter: str = "", function: str = "", cases=(("1 2", "3"), ("4 5", "9"))) -> dict:
    """One row of code_generation_lite; the first test is public."""
    kind = "functional" if function else "stdin"
    tests = [{"input": given, "output": printed, "testtype": kind} for given, printed in cases]
    return {"question_title": "Sum", "question_content": f"Add up {number}.", "platform": "atcoder",
            "question_id": f"q{number}", "contest_id": "c", "contest_date": f"{day}T00:00:00", "starter_code": starter,
            "difficulty": "easy",
            "public_test_cases": json.dumps(tests[:1]), "private_test_cases": packed(tests[1:]),
            "metadata": json.dumps({"func_name": function} if function else {})}


STARTER = "class Solution:\n    def add(self, a: int, b: int) -> int:\n        "
# benchmark -> (data set, file, rows)
FILES = {
    "aime24": ("math-ai/aime24", "test-00000-of-00001.parquet", [
        {"id": i, "problem": f"What is ${i} + 70$?", "solution": f"\\boxed{{{70 + i:03}}}", "url": "x"} for i in range(3)]),
    "aime25": ("math-ai/aime25", "test.jsonl", [
        {"problem": f"Find {i}.", "answer": str(i), "id": str(i)} for i in (7, 8, 9)]),
    "lcb_v5": (LCB, "test5.jsonl", [
        contest(1, "2024-07-31"), contest(2, "2024-08-01"), contest(3, "2025-02-01"), contest(4, "2025-02-02"),
        contest(5, "2024-12-24", STARTER, "add", (("1\n2", "3"), ("4\n5", "9")))]),
    "lcb_v6": (LCB, "test6.jsonl", [contest(number, "2025-03-01") for number in (11, 12, 13)]),
    "hle": ("cais/hle", "data/test-00000-of-00001.parquet", [
        {"id": "a1", "question": "Seen?", "image": "data:image/png;base64,AA", "answer": "no", "answer_type": "exactMatch",
         "rationale": "r", "image_preview": "p"},
        {"id": "a2", "question": "Six times seven?", "image": "", "answer": "42", "answer_type": "exactMatch",
         "rationale": "r", "image_preview": ""},
        {"id": "a3", "question": "Which?\n\nAnswer Choices:\nA. this\nB. that", "image": "", "answer": "B",
         "answer_type": "multipleChoice", "rationale": "r", "image_preview": ""},
        {"id": "a4", "question": "Two?", "image": None, "answer": "2", "answer_type": "exactMatch", "rationale": "r",
         "image_preview": None}]),
    "gpqa_diamond": ("Idavidrein/gpqa", "gpqa_diamond.csv", [
        {"Record ID": f"rec{i}", "Question": f"Which, {i}?\nThink.", "Correct Answer": f"right {i}", "Incorrect Answer 1": "x",
         "Incorrect Answer 2": "y, z", "Incorrect Answer 3": 3, "Subdomain": "Optics"} for i in range(3)]),
    "ifeval": ("google/IFEval", "ifeval_input_data.jsonl", [
        {"key": 1000 + i, "prompt": f"Write {i} without commas.", "instruction_id_list": ["punctuation:no_comma"],
         "kwargs": [{}]} for i in range(3)]),
    "ifbench": ("allenai/IFBench_test", "data/train-00000-of-00001.parquet", [
        {"key": str(i), "prompt": f"Write {i}.", "instruction_id_list": ["count:numbers"],
         "kwargs": [{"N": 2, "keyword": None}]} for i in range(3)]),
}
COUNTS = {"aime24": 3, "aime25": 3, "lcb_v5": 3, "lcb_v6": 3, "hle": 3, "gpqa_diamond": 3, "ifeval": 3, "ifbench": 3}


def code(text: str) -> str:
    return f"```python\n{text}\n```"


def answers(row) -> tuple[str, str]:
    """A right and a wrong answer to one item of these files, as text after the thinking."""
    benchmark, truth = row.source, row.truth
    if benchmark.startswith("aime"):
        right, other = int(truth["answer"]), "\\boxed{500}"
        return f"{other} no: Answer: \\boxed{{{right}}}", f"\\boxed{{{right}}} no: {other}"
    if benchmark.startswith("lcb"):
        if "func_name" in truth["metadata"]:
            return code(STARTER + "return a + b"), code(STARTER + "return a - b")
        return code("print(sum(map(int, input().split())))"), code("print(3)")
    if benchmark == "hle":
        kind = "Answer" if truth["answer_type"] == "multipleChoice" else "Exact Answer"
        wrong = "A" if kind == "Answer" else "none"
        return f"{kind}: {truth['answer']}\nConfidence: 9%", f"{kind}: {wrong}\nConfidence: 9%"
    if benchmark == "gpqa_diamond":
        return f"Answer: Z? No.\nAnswer: {truth['letter']}", f"Answer: {'ABCD'[('ABCD'.index(truth['letter']) + 1) % 4]}"
    return {"ifeval": ("No marks here", "Yes, here"), "ifbench": ("I have 2 or 3 cats.", "I have 2 cats.")}[benchmark]


def write_all(put, names=tuple(FILES)) -> None:
    """Write these benchmarks' files by hand."""
    for name in names:
        put(*FILES[name])


def shrink(monkeypatch, counts=COUNTS) -> None:
    """Let the registry expect as many items as these files have."""
    for name, number in counts.items():
        monkeypatch.setitem(benchmarks.NINE, name, dataclasses.replace(benchmarks.NINE[name], items={"": number}))
