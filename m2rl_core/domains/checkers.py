"""The published IFEval (25 ids) and IFBench (58 ids) checkers, from the evalscope 1.14.1 wheel, and IFEvalG's other 29.

`import evalscope` would start its whole framework, and its checkers fetch NLTK data when imported. So
only the checker files are loaded, on first use, with a finder for NLTK data that never downloads. Where
NLTK's sentence splitter (`punkt_tab`) is not installed, one without any abbreviations takes its place.
"""
from __future__ import annotations

import contextlib
import csv
import difflib
import functools
import importlib
import importlib.util
import random
import re
import sys
import tempfile
from collections.abc import Iterator, Mapping
from pathlib import Path
from types import ModuleType

from m2rl_core.errors import StudyError
from m2rl_core.slim import without

BENCHMARKS = ("ifeval", "ifbench")
PUNKT_FILES = ("abbrev_types.txt", "collocations.tab", "ortho_context.tab", "sent_starters.txt")
NLTK_FOLDERS = {"stopwords": "corpora", "averaged_perceptron_tagger_eng": "taggers"}
# What the published checkers raise on a text that they did not foresee: no word or sentence where one is indexed,
# brackets nested too deep for JSON, a broken CSV line, NLTK's own time limit; and re.error for a row's keyword (":(")
# that is no regular expression, which no text can satisfy. The released code scores all of these 0, and so do we.
BAD_TEXT = (IndexError, RecursionError, TimeoutError, csv.Error, re.error)


class MissingData(StudyError):
    """A checker needs NLTK data that this machine lacks; says which, and how to get it."""


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
    with _seeded():
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


def sentences(text: str) -> list[str]:
    """IFEval's own splitting into sentences."""
    return _published()[1].split_into_sentences(text)


def tokens(text: str) -> list[str]:
    """NLTK's words and marks."""
    return _published()[1].nltk.word_tokenize(text)


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


@contextlib.contextmanager
def _seeded() -> Iterator[None]:
    state = random.getstate()
    random.seed(0)
    try:
        yield
    finally:
        random.setstate(state)


@functools.cache
def _registry() -> dict[str, type]:
    """Instruction id -> checker class, of both benchmarks and of training rows (no id is in two of them)."""
    from m2rl_core.domains import ifevalg  # it asks here for sentences and tokens
    return _published()[0] | ifevalg.registry()


@functools.cache
def _published() -> tuple[dict[str, type], ModuleType]:
    """The published checkers by instruction id, and IFEval's module for taking texts apart."""
    try:
        return _load()
    except ImportError as error:
        raise ImportError(
            f"the instruction checkers cannot be loaded ({error}): pip install nltk langdetect emoji syllapy, "
            "then pip install --no-deps evalscope==1.14.1"
        ) from error


def _load():
    spec = importlib.util.find_spec("evalscope")
    if spec is None:
        raise ImportError("No module named 'evalscope'")
    import langdetect
    with without("scipy.stats"):  # half a second, for tests of collocations
        import nltk

    langdetect.DetectorFactory.seed = 0  # its answer is random otherwise
    with _punkt_of_last_resort(nltk), _bare_evalscope(Path(spec.origin).parent), _seeded():
        modules = [importlib.import_module(f"evalscope.benchmarks.{name}.instructions_registry") for name in BENCHMARKS]
        nltk.word_tokenize("a")  # NLTK keeps both tokenizers from here on; the folder may go
        modules[0].instructions.instructions_util.count_sentences("a")
    known = {name: checker for module in modules for name, checker in module.INSTRUCTION_DICT.items()}
    return known, modules[0].instructions.instructions_util


@contextlib.contextmanager
def _bare_evalscope(folder: Path) -> Iterator[None]:
    """Empty packages in place of evalscope's own, so that importing a checker file runs that file alone."""
    before = _pop_evalscope()
    for name in ("evalscope", "evalscope.benchmarks", "evalscope.utils"):
        sys.modules[name] = ModuleType(name)
        sys.modules[name].__path__ = [str(folder.joinpath(*name.split(".")[1:]))]
    sys.modules["evalscope.utils.resource_utils"] = ModuleType("evalscope.utils.resource_utils")
    sys.modules["evalscope.utils.resource_utils"].check_nltk_data = _need_nltk_data
    try:
        yield
    finally:
        _pop_evalscope()
        sys.modules.update(before)


def _pop_evalscope() -> dict[str, ModuleType]:
    return {name: sys.modules.pop(name) for name in list(sys.modules) if name.split(".")[0] == "evalscope"}


@contextlib.contextmanager
def _punkt_of_last_resort(nltk) -> Iterator[None]:
    """A splitter of four empty tables, last in NLTK's search path: data that the user installed comes first.

    NLTK refuses files that a group or others may write, hence a private folder made here and not one of the package.
    """
    with tempfile.TemporaryDirectory(prefix="m2rl-nltk-") as root:
        tables = Path(root, "tokenizers", "punkt_tab", "english")
        tables.mkdir(parents=True)
        for name in PUNKT_FILES:
            (tables / name).touch()
        for path in Path(root).rglob("*"):
            path.chmod(0o700 if path.is_dir() else 0o600)
        nltk.data.path.append(root)
        try:
            yield
        finally:
            nltk.data.path.remove(root)


@functools.cache
def _need_nltk_data(name: str) -> None:
    import nltk

    if name == "punkt_tab":
        return  # `_load` has seen to it
    try:
        nltk.data.find(f"{NLTK_FOLDERS[name]}/{name}")
    except LookupError:
        raise MissingData(f"NLTK's {name!r} is not installed: python -m nltk.downloader {name}") from None
