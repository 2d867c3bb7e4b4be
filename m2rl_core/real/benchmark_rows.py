"""One row of a real benchmark as a `domains.Row`: its prompt in the official or the released wording, its truth, its rule.

Eight makers, one a benchmark's data set (BFCL's rows are made in `bfcl_rows`). Each takes a row of the data set and the
place where it stands, and returns the item, or None for one that is not part of the benchmark. SchemaError names file,
line and field. Wordings are those of the sources named beside them, to the letter, since scores hang on them.
"""
from __future__ import annotations

import hashlib
import random
import string
from collections.abc import Callable

from m2rl_core.domains import Row, checkers, math
from m2rl_core.real import rl_rows, schema
from m2rl_core.real.decontamination import V5_WINDOW

OPTIONS = ("Correct Answer", "Incorrect Answer 1", "Incorrect Answer 2", "Incorrect Answer 3")
# The released code (process_rl_data.py) puts this before AIME; in training the answer is asked for without a box.
AIME = rl_rows.MATH_OPENING.replace("Answer: $Answer", r"Answer: \boxed{$Answer}")
# The released code's prompt of GPQA, which is that of OpenAI's simple-evals.
GPQA = ("Answer the following multiple choice question. The last line of your response should be of the following format: "
        "'Answer: $LETTER' (without quotes) where LETTER is one of ABCD. Think step by step before answering.\n\n"
        "{question}\n\nA) {A}\nB) {B}\nC) {C}\nD) {D}")
# LiveCodeBench's own runner, lcb_runner/prompts/code_generation.py, its generic system message and question template.
LCB_SYSTEM = ("You are an expert Python programmer. You will be given a question (problem specification) and will generate a "
              "correct Python program that matches the specification and passes all tests. You will NOT return anything "
              "except for the program.")
LCB = ("### Question:\n{question}\n\n### Format: {form}\n```python\n{code}\n```\n\n"
       "### Answer: (use the provided format with backticks)\n\n")
LCB_STARTER = ("You will use the following starter code to write the solution to the problem and enclose your code within "
               "delimiters.")
LCB_STDIN = ("Read the inputs from stdin solve the problem and write the answer to stdout (do not directly test on the sample "
             "inputs). Enclose your code within delimiters as follows.")
# HLE's own hle_eval/run_model_predictions.py: one system message for exact answers, one for multiple choice.
HLE_SYSTEM = {
    "exactMatch": ("Your response should be in the following format:\nExplanation: {your explanation for your final answer}\n"
                   "Exact Answer: {your succinct, final answer}\nConfidence: {your confidence score between 0% and 100% for "
                   "your answer}"),
    "multipleChoice": ("Your response should be in the following format:\nExplanation: {your explanation for your answer "
                       "choice}\nAnswer: {your chosen answer}\nConfidence: {your confidence score between 0% and 100% for "
                       "your answer}"),
}
Maker = Callable[[dict, str], Row | None]


def item(benchmark: str, domain: str, name: object, prompt: str, truth: dict, system: str = "") -> Row:
    """A benchmark's item: its own id, its prompt as one user message, and a truth that has no format gate."""
    messages = [{"role": "system", "content": system}] if system else []
    problem = hashlib.sha256(prompt.encode()).hexdigest()[:16]
    return Row(f"{benchmark}/{name}", domain, benchmark, f"{benchmark}:{problem}",
               (*messages, {"role": "user", "content": prompt}), {**truth, "gate": "open"})


def aime24(row: dict, place: str) -> Row:
    """math-ai/aime24: the truth is the box that `solution` consists of."""
    solution = schema.get(row, "solution", str, place)
    boxes = math.boxes(solution)
    if not boxes:
        raise schema.wrong(place, "solution", f"it has no \\boxed{{}}: {solution[:40]!r}")
    return _aime("aime24", row, boxes[-1], place)


def aime25(row: dict, place: str) -> Row:
    """math-ai/aime25."""
    return _aime("aime25", row, str(schema.get(row, "answer", (str, int), place)).strip(), place)


def _aime(benchmark: str, row: dict, answer: str, place: str) -> Row:
    if not answer.isdecimal() or not 0 <= int(answer) <= 999:
        raise schema.wrong(place, "solution" if benchmark == "aime24" else "answer",
                           f"an answer of AIME is a whole number from 0 to 999, found {answer[:40]!r}")
    name = schema.get(row, "id", (str, int), place)
    return item(benchmark, "math", name, AIME + _text(row, "problem", place), {"answer": answer, "rule": "last_box"})


def lcb(benchmark: str, row: dict, place: str) -> Row | None:
    """livecodebench/code_generation_lite; of v5 the window that model cards print. Tests stay packed until they run."""
    day = schema.get(row, "contest_date", str, place)[:10]
    if benchmark == "lcb_v5" and not V5_WINDOW[0] <= day <= V5_WINDOW[1]:
        return None
    starter = schema.get(row, "starter_code", str, place, "")
    truth = {name: _text(row, name, place) for name in ("public_test_cases", "private_test_cases")}
    truth["metadata"] = schema.get(row, "metadata", str, place, "")
    prompt = LCB.format(question=_text(row, "question_content", place), form=LCB_STARTER if starter else LCB_STDIN,
                        code=starter or "# YOUR CODE HERE")
    return item(benchmark, "coding", _text(row, "question_id", place), prompt, truth, LCB_SYSTEM)


def hle(row: dict, place: str) -> Row | None:
    """cais/hle, items without a picture; `truth` is what `domains.hle` judges by."""
    if row.get("image"):
        return None
    kind = schema.get(row, "answer_type", str, place)
    if kind not in HLE_SYSTEM:
        raise schema.wrong(place, "answer_type", f"{kind!r} is none of {', '.join(HLE_SYSTEM)}")
    truth = {"answer": _text(row, "answer", place), "answer_type": kind}
    return item("hle", "science", _text(row, "id", place), _text(row, "question", place), truth, HLE_SYSTEM[kind])


def gpqa(row: dict, place: str) -> Row:
    """Idavidrein/gpqa; options in an order that the question's SHA-256 draws (released: another one at each run)."""
    question = _text(row, "Question", place).strip()
    texts = [str(schema.get(row, name, (str, int), place)).strip() for name in OPTIONS]
    order = list(range(len(OPTIONS)))
    random.Random(hashlib.sha256(question.encode()).digest()).shuffle(order)
    letters = dict(zip(string.ascii_uppercase, (texts[i] for i in order), strict=False))
    truth = {"letter": string.ascii_uppercase[order.index(0)], "options": len(OPTIONS)}
    return item("gpqa_diamond", "science", _text(row, "Record ID", place), GPQA.format(question=question, **letters), truth)


def instructions(benchmark: str, row: dict, place: str) -> Row:
    """google/IFEval and allenai/IFBench_test: the prompt as it is. An id without a checker is an error, not a 0."""
    truth = rl_rows.instruction(row, place)
    if isinstance(truth, str):
        raise schema.wrong(place, "instruction_id_list", "it is empty")
    for i, name in enumerate(truth["instruction_id_list"]):
        try:
            checkers.require(name)
        except ValueError as error:
            raise schema.wrong(place, f"instruction_id_list[{i}]", str(error)) from error
    return item(benchmark, "if", schema.get(row, "key", (int, str), place), _text(row, "prompt", place),
                {**truth, "rule": "strict"})


def _text(row: dict, name: str, place: str) -> str:
    """A text that is not empty and can be written."""
    found = schema.get(row, name, str, place)
    if not found.strip() or not schema.whole(found):
        raise schema.wrong(place, name, "it is empty" if not found.strip() else "it holds half a character")
    return found
