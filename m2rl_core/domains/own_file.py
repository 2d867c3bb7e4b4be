"""A domain of one's own: one Python file with `rows` and `verify`, named in a profile's `domains`; its name is the file's.

    def rows(split, n, seed):     # n rows of "rl" or "test" ("sft" too where SFT is trained), each a dict that has
        ...                       # `prompt` (a text, or messages) and whatever `verify` needs (JSON, never shown to a model);
                                  # optional: `id`, `tools`, and for "sft" `answer`, the text that the model learns to give
    def verify(rows, answers):    # those dicts, and the text after </think> of one answer to each
        ...                       # -> a score in [0, 1] for each, a bool, or (score, "reason")
    def environment(row):         # optional, for answers of several turns: an object whose step(text) gives the replies to
        ...                       # one turn, a list of texts, or None where the episode is over; `verify` then gets the
                                  # texts of all turns, a list for each answer. STEP_SECONDS = 30: longer than 10 for a step

All are called with the same arguments more than once and must give the same each time. `verify` and `environment` run in
processes that can be killed (`worker`, `environments`): what hangs or crashes costs its own score and no more.
"""
from __future__ import annotations

import functools
import hashlib
import importlib.util
import json
import sys
from collections.abc import Sequence
from pathlib import Path

from m2rl_core.domains import Row, Verdict
from m2rl_core.errors import StudyError, one_line


class DomainError(StudyError):
    """A domain file that cannot serve; one line with the file, the place in it, and the mend."""


class Domain:
    """What `domains.module` gives for a domain of one's own; `__name__` is what the worker loads."""

    def __init__(self, name: str, file: str):
        self.name, self.file = name, file
        self.__name__ = f"{file}?{digest(file)}"  # a file that was edited is another module

    def __eq__(self, other) -> bool:  # the rows of one domain are verified as one batch
        return isinstance(other, Domain) and self.__name__ == other.__name__

    def __hash__(self) -> int:
        return hash(self.__name__)

    def rows(self, split: str, n: int, seed: int) -> list[Row]:
        """`n` rows of "sft", "rl" or "test" as the study's own; DomainError for what is no row, or a test row twice."""
        return list(_rows(self.name, self.file, split, n, seed, digest(self.file)))

    def load(self) -> None:
        load(self.file)

    @property
    def verify(self):
        return verifier(self.file)

    @property
    def environment(self):
        """What makes an episode of a row; AttributeError where the file has no environment."""
        make = load(self.file).environment
        return lambda row: make(row.truth["row"])

    @property
    def STEP_SECONDS(self) -> float:
        return load(self.file).STEP_SECONDS


def digest(file: str) -> str:
    """Of the file as it is now; DomainError where there is none."""
    try:
        return hashlib.sha256(Path(file).read_bytes()).hexdigest()[:16]
    except OSError as error:
        raise DomainError(f"{file} cannot be read ({error.strerror}); `domains` of the profile names it") from error


def load(file: str):
    """The module in a file, with its two functions; DomainError for one that cannot be imported or lacks them."""
    return _load(file, digest(file))


@functools.lru_cache(maxsize=8)
def _load(file: str, _digest: str):
    name = f"m2rl_own_{Path(file).stem}"
    spec = importlib.util.spec_from_file_location(name, file)
    module = importlib.util.module_from_spec(spec)
    sys.modules[name] = module
    try:
        spec.loader.exec_module(module)
    except Exception as error:  # whatever somebody's file raises
        line = getattr(error, "lineno", None) or _line(error, file)
        raise DomainError(f"{file}, line {line}: {type(error).__name__}: {one_line(error, 160)}") from error
    for function in ("rows", "verify"):
        if not callable(getattr(module, function, None)):
            raise DomainError(f"{file}: it has no function `{function}`; a domain's file has rows(split, n, seed) and "
                              "verify(rows, answers)")
    return module


def verifier(file: str):
    """The `verify` of a file in the form that the study calls: rows and the answers of each turn, verdicts."""
    module = load(file)

    def verify(rows: Sequence[Row], answers: Sequence[Sequence[str]]) -> list[Verdict]:
        said = [list(turns) for turns in answers] if hasattr(module, "environment") else [turns[-1] for turns in answers]
        found = module.verify([row.truth["row"] for row in rows], said)
        try:
            found = list(found)
        except TypeError as error:
            raise DomainError(f"{file}: verify gave {found!r:.40}, not a score for each answer") from error
        return [_verdict(given) for given in found]

    verify.__module__ = file
    return verify


def _verdict(given) -> Verdict:
    if isinstance(given, Verdict):
        return given
    score, reason = given if isinstance(given, tuple) and len(given) == 2 else (given, "")
    if isinstance(score, bool):
        score = float(score)
    if hasattr(score, "item"):
        score = score.item()
    return Verdict(score, str(reason) or ("right" if score == 1 else "wrong" if score == 0 else f"{score:.2f}"
                                          if isinstance(score, float) else "no number"))


@functools.lru_cache(maxsize=32)
def _rows(name: str, file: str, split: str, n: int, seed: int, _digest: str) -> tuple[Row, ...]:
    try:
        given = list(load(file).rows(split, n, seed))
    except DomainError:
        raise
    except Exception as error:  # whatever somebody's file raises
        raise DomainError(f"{file}, line {_line(error, file)}: rows({split!r}, {n}, {seed}): {type(error).__name__}: "
                          f"{one_line(error, 160)}") from error
    if len(given) != n:
        raise DomainError(f"{file}: rows({split!r}, {n}, {seed}) gave {len(given)} rows; the profile asks for {n}: give as "
                          "many, or lower its number")
    rows = [_row(name, file, split, i, row) for i, row in enumerate(given)]
    if split == "test" and min(len({row.id for row in rows}), len({row.fingerprint for row in rows})) < n:
        raise DomainError(f"{file}: rows('test', {n}, {seed}): a row stands there twice; a benchmark asks each item once")
    return tuple(rows)


def _row(name: str, file: str, split: str, i: int, given) -> Row:
    place = f"{file}: rows({split!r}, ...)[{i}]"
    if not isinstance(given, dict):
        raise DomainError(f"{place}: expected a dict with `prompt`, found {given!r:.40}")
    prompt = given.get("prompt")
    messages = [{"role": "user", "content": prompt}] if isinstance(prompt, str) else prompt
    if not messages or not isinstance(messages, list | tuple) or not all(
            isinstance(m, dict) and isinstance(m.get("content"), str) and isinstance(m.get("role"), str) for m in messages):
        raise DomainError(f"{place}.prompt: expected a text or a list of messages with role and content, found {prompt!r:.40}")
    try:
        json.dumps(given)
    except TypeError as error:
        raise DomainError(f"{place}: {error}; rows hold what JSON holds") from error
    turns = ()
    if split == "sft":
        if not isinstance(given.get("answer"), str):
            raise DomainError(f"{place}.answer: a row to learn from needs the text of its answer")
        said = given["answer"] if "</think>" in given["answer"] else f"<think>\n\n</think>\n\n{given['answer']}"
        turns = ({"role": "assistant", "content": said},)
    problem = hashlib.sha256(" ".join(messages[-1]["content"].split()).casefold().encode()).hexdigest()[:16]
    return Row(f"{name}/{split}/{given.get('id', f'{i:05d}')}", name, name if split == "test" else split, f"{name}:{problem}",
               tuple(messages), {"row": given}, tuple(given.get("tools", ())), turns)


def leaks(name: str, file: str, n_rl: int, n_test: int, seed: int) -> int:
    """How many test rows have a training row's prompt."""
    seen = {row.fingerprint for row in _rows(name, file, "rl", n_rl, seed, digest(file))}
    return sum(row.fingerprint in seen for row in _rows(name, file, "test", n_test, seed, digest(file)))


def _line(error: BaseException, file: str) -> int | str:
    """The line of the file at which an error rose."""
    lines, trace = [], error.__traceback__
    while trace:
        if trace.tb_frame.f_code.co_filename == file:
            lines.append(trace.tb_lineno)
        trace = trace.tb_next
    return lines[-1] if lines else "?"
