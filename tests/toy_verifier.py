"""A domain whose verifier does what an answer tells it: raise, hang, die, or give what is no verdict."""
from __future__ import annotations

import math
import os
import re
import signal
import time

import numpy as np

from m2rl_core.domains import Verdict
from m2rl_core.domains.checkers import MissingData
from m2rl_core.errors import StudyError
from m2rl_core.sandbox import SandboxUnavailable

SCORES = {"nan": math.nan, "inf": math.inf, "two": 2.0, "minus": -0.5, "None": None, "text": "1", "bool": True,
          "integer": 1, "float32": np.float32(0.5)}
ERRORS = {"study": StudyError, "sandbox": SandboxUnavailable, "data": MissingData, "import": ImportError}
asked: list[list[str]] = []  # the row ids of each call, where it is called in place


def verify(rows, answers):
    asked.append([row.id for row in rows])
    if answers[0][-1] == "a verdict short":
        return [Verdict(1.0, "right")] * (len(rows) - 1)
    return [said(turns[-1]) for turns in answers]


def said(answer):
    """The verdict on one answer, if there is one; "fine" and whatever is unknown are right."""
    what, _, about = answer.partition(" ")
    if what == "raise":
        raise ZeroDivisionError("division\nby zero")
    if what == "cannot":
        raise ERRORS[about](f"no {about}")
    if what == "hang":
        hang(about)
    if what == "die":
        os.kill(os.getpid(), signal.SIGSEGV)
    if what == "die-once" and not os.path.exists(about):
        open(about, "w").close()
        os.kill(os.getpid(), signal.SIGKILL)
    if what == "memory":
        return Verdict(float(len(bytearray(2**40)) > 0))
    if what == "who":
        return Verdict(1.0, str(os.getpid()))
    if what == "float":
        return 1.0  # no Verdict
    return Verdict(SCORES.get(what, 1.0), "right")


def hang(how):
    if how == "python":
        while True:
            pass
    if how == "sleep":
        while True:
            time.sleep(60)
    if how == "regular expression":
        re.match(r"(a+)+$", "a" * 64 + "b")
    if how == "power":
        9 ** 9 ** 9  # one C call: no signal handler of Python's runs before it ends
