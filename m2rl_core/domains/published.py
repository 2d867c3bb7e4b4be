"""The evalscope wheel's checkers of IFEval and IFBench, and NLTK's words and sentences, loaded without all the rest.

`import evalscope` would start its whole framework, and its checkers fetch NLTK data when imported. So only the checker
files are loaded, on first use, with a finder for NLTK data that never downloads. Where NLTK's sentence splitter
(`punkt_tab`) is not installed, one without any abbreviations takes its place.
"""
from __future__ import annotations

import contextlib
import functools
import importlib
import importlib.util
import random
import sys
import tempfile
from collections.abc import Iterator
from pathlib import Path
from types import ModuleType

from m2rl_core.errors import StudyError
from m2rl_core.slim import without

BENCHMARKS = ("ifeval", "ifbench")
PUNKT_FILES = ("abbrev_types.txt", "collocations.tab", "ortho_context.tab", "sent_starters.txt")
NLTK_FOLDERS = {"stopwords": "corpora", "averaged_perceptron_tagger_eng": "taggers"}


class MissingData(StudyError):
    """A checker needs NLTK data that this machine lacks; says which, and how to get it."""


def sentences(text: str) -> list[str]:
    """IFEval's own splitting into sentences."""
    return published()[1].split_into_sentences(text)


def tokens(text: str) -> list[str]:
    """NLTK's words and marks."""
    return published()[1].nltk.word_tokenize(text)


@contextlib.contextmanager
def seeded() -> Iterator[None]:
    """Some checkers draw at random: inside, always the same."""
    state = random.getstate()
    random.seed(0)
    try:
        yield
    finally:
        random.setstate(state)


@functools.cache
def published() -> tuple[dict[str, type], ModuleType]:
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
    with _punkt_of_last_resort(nltk), _bare_evalscope(Path(spec.origin).parent), seeded():
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
