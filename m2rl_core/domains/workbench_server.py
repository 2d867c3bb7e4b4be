"""The workplace assistant over HTTP: NeMo-Gym's resources server, or the released code's launcher of it.

M2RL_WORKPLACE=http://host:12000 is its address. POST /seed_session begins an episode, which a cookie names; POST /{tool}
runs a tool on its tables; POST /verify replays an answer's calls and the truth's, and gives the reward. What the model
reads, and what ends an episode, is as in `workbench`. Requests have time limits, so they are made from this process.
"""
from __future__ import annotations

import contextlib
import json
import math
import os
import urllib.parse
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from http.cookiejar import CookieJar

from m2rl_core import post
from m2rl_core.domains import Row, Verdict
from m2rl_core.domains.workbench_calls import Episode, as_text, calls_of, said
from m2rl_core.errors import StudyError

SETTING = "M2RL_WORKPLACE"
WHO = "the workplace server"
SECONDS, SECONDS_TOOL, AT_ONCE = 60.0, 10.0, 16  # for a request, for a tool's (as the released code); requests on their way


def address() -> str | None:
    """The server that the environment asks for; StudyError where it is no address."""
    url = os.environ.get(SETTING, "")
    return post.check(url, SETTING) if url else None


def here() -> bool:
    """Rows are verified in this process: a server may take longer than a worker."""
    return True


def steps_here(row: Row) -> bool:
    return True


def _post(path: str, message: dict, seconds: float, jar: CookieJar | None = None) -> dict:
    url = address()
    if url is None:
        raise StudyError(f'rows with the rule "server" need {SETTING}, the address of a workplace server: '
                         f"{SETTING}=http://127.0.0.1:12000, for example")
    return post.post(f"{url}/{urllib.parse.quote(path, safe='')}", message, WHO, seconds, jar=jar)


def environment(row: Row) -> Episode:
    """A fresh episode of `row`, its tables the server's; StudyError where that cannot be asked."""
    jar = CookieJar()
    _post("seed_session", {}, SECONDS, jar)

    def run(call: dict) -> str:
        with _blamed():
            reply = _post(call["name"], call["arguments"], SECONDS_TOOL, jar)
        return said(reply.get("output", reply))

    return Episode(row, run)


@contextlib.contextmanager
def _blamed() -> Iterator[None]:
    """A server that is gone ends the run; what one that still answers cannot stand costs its own rollout: RuntimeError."""
    try:
        yield
    except StudyError as error:
        _post("seed_session", {}, SECONDS)
        raise RuntimeError(str(error)) from error


def verify(rows: Sequence[Row], answers: Sequence[Sequence[str]]) -> list[Verdict]:
    """As `workbench.verify`, by the server's /verify; StudyError where it cannot be asked. Equal answers are asked once."""
    asked: dict[str, tuple[Row, list[dict]]] = {}
    found: list[Verdict | str] = []
    for row, turns in zip(rows, answers, strict=True):
        calls, fault = calls_of(row, turns)
        name = json.dumps([calls, row.truth["calls"]])
        asked |= {} if fault else {name: (row, calls)}
        found.append(Verdict(0.0, fault) if fault else name)
    with ThreadPoolExecutor(AT_ONCE) as pool:
        replies = dict(zip(asked, pool.map(lambda pair: _verdict(*pair), asked.values()), strict=True))
    return [replies[one] if isinstance(one, str) else one for one in found]


def _verdict(row: Row, calls: list[dict]) -> Verdict:
    try:
        with _blamed():
            reward = _post("verify", request(row, calls), SECONDS).get("reward")
    except RuntimeError as error:
        return Verdict(0.0, f"verifier failed: {error}", failed=True)
    if isinstance(reward, bool) or not isinstance(reward, (int, float)) or not math.isfinite(reward):
        raise StudyError(f"{WHO} answers /verify without a reward: {str(reward)[:80]!r}")
    return Verdict(float(reward == 1), "right" if reward == 1 else "wrong final state" if calls else "no call")


def request(row: Row, calls: list[dict]) -> dict:
    """The body of /verify: NeMo-Gym reads calls from `response`, an OpenAI Responses object, the launcher from `output`."""
    said = [{"type": "function_call", "call_id": f"call_{i}", **call} for i, call in enumerate(as_text(calls))]
    response = {"id": "m2rl", "object": "response", "created_at": 0, "model": "m2rl", "output": said,
                "parallel_tool_calls": True, "tool_choice": "auto", "tools": []}
    return {"responses_create_params": {"input": []}, "response": response, "output": said,
            "ground_truth": as_text(row.truth["calls"]), "id": 0, "category": row.truth.get("category", ""),
            "environment_name": row.truth.get("environment", "")}
