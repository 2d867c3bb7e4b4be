"""The workplace assistant's tools, tables and verdict from the nemo-gym 0.2.0 wheel.

Of the wheel only the workplace's own files are loaded. The tables are read once and copied for each episode; the verdict is
that of the wheel's own `is_correct`: two lists of calls, replayed on fresh tables, must leave calendar, mail, plots, tasks
and customers equal. The clock of the tools stands still (2023-11-30). A model's search text is a regular expression, which
can take for ever: all of it must run where it can be killed.
"""
from __future__ import annotations

import contextlib
import functools
import importlib
import sys
import warnings
from collections.abc import Callable, Iterator
from importlib import metadata
from types import ModuleType, SimpleNamespace

from m2rl_core.errors import StudyError

PACKAGE, VERSION = "nemo-gym", "0.2.0"
INSTALL = f"pip install --no-deps --ignore-requires-python {PACKAGE}=={VERSION}"
FOLDER = "resources_servers"  # the wheel's package that holds the workplace
TOOLKITS = ("email", "calendar", "analytics", "project_management", "customer_relationship_manager")
TOOLS = ("company_directory", *TOOLKITS)  # a class each


def run_on_fresh_tables(said: Callable[[object], str]) -> Callable[[dict], str]:
    """What runs one call after the other on tables of its own, and gives each output in the words of `said`."""
    functions = published().get_tools(TOOLKITS)["functions"]

    def run(call: dict) -> str:
        given = {key: value for key, value in call["arguments"].items() if value is not None}  # as the server does
        try:
            with _quiet():
                return said(functions[call["name"]](**given))
        except Exception as error:  # whatever a tool raises at a model's arguments: the server tells the model, too
            return f"Error executing tool '{call['name']}': {error}"

    return run


def same_state(calls: list[dict], golds: list[dict]) -> bool:
    """The wheel's verdict on calls whose arguments are JSON texts; may take for ever, as a regular expression can."""
    with _quiet():
        return bool(published().is_correct(calls, golds, None))


@contextlib.contextmanager
def _quiet() -> Iterator[None]:
    """A model's search text makes pandas warn, which says nothing to whoever trains it."""
    with warnings.catch_warnings(action="ignore"):
        yield


# ---- the wheel


def installed() -> bool:
    """Whether the wheel is there, in its version."""
    try:
        return metadata.version(PACKAGE) == VERSION
    except metadata.PackageNotFoundError:
        return False


def load() -> None:
    """Read the tables, before time counts."""
    same_state([], [])


@functools.cache
def published() -> ModuleType:
    """The wheel's `get_tools` and `is_correct`, their tables read once; StudyError where the wheel is missing."""
    if not installed():
        raise StudyError(f"the workplace assistant's tools and tables are not installed: {INSTALL}")
    folder = str(metadata.distribution(PACKAGE).locate_file(FOLDER))
    with _bare(folder):
        found = importlib.import_module(f"{FOLDER}.workplace_assistant.utils")
    for name in TOOLS:
        _read_once(getattr(found, "".join(part.title() for part in name.split("_")) + "Tool"))
    found.print = lambda *_: None  # a line for each call that fails: there are thousands
    found.execute_actions_and_reset_state = _remembered(found.execute_actions_and_reset_state)
    return found


@contextlib.contextmanager
def _bare(folder: str) -> Iterator[None]:
    """The wheel's own folder under its name, whoever else has a package that is called so; nothing of it stays."""
    def popped():
        return {name: sys.modules.pop(name) for name in list(sys.modules) if name.split(".")[0] == FOLDER}

    before = popped()
    sys.modules[FOLDER] = ModuleType(FOLDER)
    sys.modules[FOLDER].__path__ = [folder]
    try:
        yield
    finally:
        popped()
        sys.modules.update(before)


def _read_once(tool: type) -> None:
    """Let a tool's `reset_state` read its file once; afterwards it gives copies, of which pandas copies what is changed."""
    read, tables = tool.reset_state, {}

    def reset_state(self):
        if not tables:
            read(self)
            tables.update(vars(self))
        vars(self).update((name, table.copy(deep=False)) for name, table in tables.items())

    tool.reset_state = reset_state


def _remembered(execute: Callable) -> Callable:
    """Let `is_correct` replay equal calls once, and have each table that they leave in lower case once."""
    fresh = {name: dict(vars(tool)) for name, tool in execute([])["containers"].items()}
    unchanged = {name: {key: _Table(table) for key, table in tables.items()} for name, tables in fresh.items()}

    @functools.lru_cache(maxsize=256)
    def replayed(calls: tuple[tuple[str, str], ...]) -> dict:
        left = execute([{"name": name, "arguments": arguments} for name, arguments in calls])["containers"]
        return {"containers": {name: SimpleNamespace(**{
            key: unchanged[name][key] if table.equals(fresh[name][key]) else _Table(table)
            for key, table in vars(tool).items()}) for name, tool in left.items()}}

    def execute_actions_and_reset_state(actions: list[dict]) -> dict:
        return replayed(tuple((action["name"], action["arguments"]) for action in actions))

    return execute_actions_and_reset_state


class _Table:
    """A table as `is_correct` handles it: it writes columns again in lower case, and compares. It is shown those columns only
    that are not written yet."""

    def __init__(self, table):
        self.table, self.written = table.copy(deep=False), set()

    @property
    def columns(self) -> list[str]:
        return [column for column in self.table.columns if column not in self.written]

    def __getitem__(self, column: str):
        return self.table[column]

    def __setitem__(self, column: str, values) -> None:
        self.table[column] = values
        self.written.add(column)

    def equals(self, other: _Table) -> bool:
        return self is other or self.table.equals(other.table)
