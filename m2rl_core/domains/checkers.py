"""Instructions by id: whether a text follows one, and IFEval's strict and loose readings of it.

The ids are IFEval's 25 and IFBench's 58 (`published`, the evalscope 1.14.1 wheel's checkers), and IFEvalG's other 29.
"""
from __future__ import annotations

import csv
import difflib
import functools
import re
from collections.abc import Mapping

from m2rl_core.domains import ifevalg
from m2rl_core.domains.published import MissingData, published, seeded

# What the published checkers raise on a text that they did not foresee: no word or sentence where one is indexed,
# brackets nested too deep for JSON, a broken CSV line, NLTK's own time limit; and re.error for a row's keyword (":(")
# that is no regular expression, which no text can satisfy. The released code scores all of these 0, and so do we.
BAD_TEXT = (IndexError, RecursionError, TimeoutError, csv.Error, re.error)


def ids() -> tuple[str, ...]:
    """Every instruction id that can be checked, sorted."""
    return tuple(sorted(_registry()))


def follows(instruction_id: str, kwargs: Mapping | None, prompt: str, response: str, loose: bool = False) -> tuple[bool, str]:
    """Whether `response` obeys one instruction, and what a checker stumbled on ("" if nothing); IFEval, strict or loose.

    `kwargs` are the instruction's parameters; those that are None are left out. Global `random` is seeded for the
    check, because some checkers draw the parameters that a row omits, and put back afterwards.
    Raises ValueError for an unknown id or parameters that it refuses, MissingData for absent NLTK data.
    """
    stumbled = ""
    with seeded():
        checker = _build(instruction_id, kwargs, prompt)
        for text in readings(response) if loose else (response,):
            try:
                if text.strip() and checker.check_following(text):
                    return True, ""
            except BAD_TEXT as error:
                stumbled = stumbled or type(error).__name__
    return False, stumbled


def readings(response: str) -> list[str]:
    """The texts of which one must obey in loose IFEval: as it is, and without its first line, its last line, both, and
    each of these four without asterisks."""
    lines = response.split("\n")
    cut = [response, *("\n".join(part).strip() for part in (lines[1:], lines[:-1], lines[1:-1]))]
    return cut + [text.replace("*", "") for text in cut]


def require(instruction_id: str) -> type:
    """The checker class of an instruction id; ValueError, with the nearest known id, where there is none."""
    known = _registry()
    if instruction_id not in known:
        near = difflib.get_close_matches(instruction_id, known, n=1, cutoff=0.0)[0]
        raise ValueError(
            f"unknown instruction id {instruction_id!r}; the nearest of {len(known)} known ids is {near!r}"
        )
    return known[instruction_id]


def _build(instruction_id, kwargs, prompt):
    checker = require(instruction_id)(instruction_id)
    given = {name: value for name, value in (kwargs or {}).items() if value is not None}
    try:
        checker.build_description(**given)
        if "prompt" in (checker.get_instruction_args() or {}):
            checker.build_description(prompt=prompt)
    except MissingData:
        raise
    except (TypeError, ValueError, AttributeError) as error:
        raise ValueError(f"instruction {instruction_id!r} refuses the parameters {given}: {error}") from error
    return checker


@functools.cache
def _registry() -> dict[str, type]:
    """Instruction id -> checker class, of both benchmarks and of training rows (no id is in two of them)."""
    return published()[0] | ifevalg.registry()
