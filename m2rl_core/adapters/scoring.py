"""The domain-routed reward for answers that arrive one by one, from many threads or tasks of somebody else's trainer.

A row travels through a trainer as JSON text under the name `KEY`. Answers that come while verifiers are busy wait and are
verified as one batch a domain, which is what sandbox, judge and worker are made for; a verifier that breaks down costs its
answer only, is counted in `failures`, and is logged the first time.
"""
from __future__ import annotations

import logging
import os
import re
import threading
from collections import Counter
from collections.abc import Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from functools import lru_cache

from m2rl_core import domains
from m2rl_core.domains import Row, Verdict
from m2rl_core.errors import StudyError

KEY = "m2rl_row"
BATCH = 256  # answers that are verified at once, at most
END = re.compile(r"(<\|im_end\|>|<\|endoftext\|>)\s*\Z")
# What stands between two turns of the assistant where tools answered: Qwen's markup, with or without its special tokens.
REPLY = re.compile(r"(?:<\|im_end\|>)?\n(?:<\|im_start\|>)?user\n(?:<tool_response>\n.*?\n</tool_response>\n?)+"
                   r"(?:<\|im_end\|>\n)?(?:<\|im_start\|>)?assistant\n", re.DOTALL)

log = logging.getLogger("m2rl")
failures: Counter[str] = Counter()  # domain -> answers at which its verifier broke down, in this process


@lru_cache(maxsize=256)  # a group's answers come close together, and share the row: equal ones are verified once
def _row(text: str) -> Row:
    try:
        return Row.from_json(text)
    except (ValueError, TypeError, KeyError) as error:
        raise StudyError(f"{KEY} holds no row of this package ({error}): export the file again by "
                         "`python -m m2rl_core data export`") from error


def row_of(held: object, where: str) -> Row:
    """The row that a trainer carried in `held`, a mapping; StudyError, which names `where`, for one without."""
    text = held.get(KEY) if isinstance(held, Mapping) else None
    if not isinstance(text, str):
        raise StudyError(f"{where} has no {KEY!r}: train on a file that `python -m m2rl_core data export` wrote")
    return _row(text)


def many_turns(row: Row) -> bool:
    """Whether an environment replies to the assistant's turns, so that a trainer needs a tool loop for this row."""
    kind = row.truth.get("kind", "") if row.domain == "agent" else ""
    return kind == "workplace" or kind.startswith("multi_turn")


def turns_of(row: Row, text: str) -> list[str]:
    """The assistant's turns in a trainer's text of a whole response, as `domains.rewards` takes them.

    Only rows with an environment are cut at tool results; to all others such text is part of the one answer.
    """
    parts = REPLY.split(text) if many_turns(row) else [text]
    return [END.sub("", part) for part in parts]


class Desk:
    """Takes answers from any thread and verifies what has gathered, a batch at a time, in one thread a domain."""

    def __init__(self):
        self.owner = os.getpid()  # threads do not survive a fork
        self._lock = threading.Lock()
        self._waiting: dict[str, list[tuple[Row, Sequence[str], Future]]] = {}
        self._threads: dict[str, ThreadPoolExecutor] = {}  # kept: some sandboxes end with the thread that began them

    def ask(self, row: Row, turns: Sequence[str]) -> Future[Verdict]:
        """The verdict to come; its exception is what `domains.rewards` raises: a verifier that cannot work here."""
        future: Future[Verdict] = Future()
        with self._lock:
            waiting = self._waiting.setdefault(row.domain, [])
            waiting.append((row, turns, future))
            if row.domain not in self._threads:
                self._threads[row.domain] = ThreadPoolExecutor(1, f"m2rl-{row.domain}")
            if len(waiting) == 1:  # else a look at them is due already
                self._threads[row.domain].submit(self._serve, row.domain)
        return future

    def _serve(self, domain: str) -> None:
        while True:
            with self._lock:
                waiting = self._waiting[domain]
                batch, waiting[:] = waiting[:BATCH], waiting[BATCH:]
            if not batch:
                return
            batch = [entry for entry in batch if entry[2].set_running_or_notify_cancel()]
            try:
                found = verdicts([row for row, *_ in batch], [turns for _, turns, _ in batch])
            except BaseException as error:  # to whoever waits, or they would do so for ever
                for *_, future in batch:
                    future.set_exception(error)
            else:
                for (*_, future), verdict in zip(batch, found, strict=True):
                    future.set_result(verdict)


_desks: list[Desk] = []
_opening = threading.Lock()


def ask(row: Row, text: str) -> Future[Verdict]:
    """The verdict to come on a whole response, by this process's desk."""
    with _opening:
        if not _desks or _desks[0].owner != os.getpid():
            _desks[:] = [Desk()]
    return _desks[0].ask(row, turns_of(row, text))


def verdicts(rows: Sequence[Row], transcripts: Sequence[Sequence[str]]) -> list[Verdict]:
    """`domains.rewards`, with its breakdowns counted, and logged where they are a domain's first."""
    found = domains.rewards(rows, transcripts)
    for row, verdict in zip(rows, found, strict=True):
        if verdict.failed:
            failures[row.domain] += 1
            if failures[row.domain] == 1:
                log.warning("the verifier of %s broke down at row %s, which scores 0 (%s); later ones are only counted, "
                            "in m2rl_core.adapters.scoring.failures", row.domain, row.id, verdict.reason)
    return found
