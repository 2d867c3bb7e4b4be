"""A domain whose environment does what an answer tells it: reply, raise, hang, die, or reply what is no list of texts."""
from __future__ import annotations

import os
import time

import toy_verifier

from m2rl_core.domains import UserSays

STEP_SECONDS = 2.0


class Episode:
    """Counts its steps; what `step` says depends on how often it was asked, so that a lost one shows."""

    def __init__(self, row):
        if row.truth.get("broken"):
            raise KeyError("no such table")
        self.steps = 0

    def step(self, answer):
        self.steps += 1
        what, _, about = answer.partition(" ")
        if what == "end":
            return None
        if what in ("user", "bare"):
            return [UserSays(about)] if what == "user" else about
        if what == "wait":
            time.sleep(float(about))
        if what == "number":
            return 3
        if what == "numbers":
            return [1, 2]
        if what == "clock":
            return [f"{os.getpid()}"]  # another one in another process
        toy_verifier.said(answer)
        return [f"step {self.steps}: {answer}"]


def environment(row):
    return None if row.truth.get("nobody") else Episode(row)
