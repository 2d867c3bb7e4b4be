"""One JSON message by HTTP and the JSON that answers it, tried again where that can help; standard library only."""
from __future__ import annotations

import http.client
import http.cookiejar
import json
import time
import urllib.error
import urllib.parse
import urllib.request
from collections.abc import Mapping

from m2rl_core.errors import StudyError, one_line

AGAIN = (408, 425, 429, 500, 502, 503, 504)  # statuses that may pass
TRIES, PAUSE, LONGEST = 5, 0.5, 30.0  # attempts; seconds before the second one, twice as long each time, at most
LARGEST = 64 * 2**20  # bytes of an answer


class Unreachable(StudyError):
    """Nobody answers at the address, or not in time."""


def post(url: str, message: Mapping, who: str, seconds: float, headers: Mapping[str, str] | None = None,
         jar: http.cookiejar.CookieJar | None = None, patience: int = TRIES) -> dict:
    """The JSON object that `url` answers to `message`, within `seconds` for each attempt; `jar` keeps a session's cookies.

    StudyError, one line that begins with `who`, where the address is none, refuses, or gives no JSON object; Unreachable
    where it cannot be reached in `TRIES` attempts, of which `patience` may get no answer at all.
    """
    where = f"{who} at {shown(url)}"
    data = json.dumps(message).encode()
    said, silent = "", 0
    for attempt in range(TRIES):
        wait(attempt)
        request = urllib.request.Request(url, data, {"Content-Type": "application/json", **(headers or {})})
        try:
            with _opener(url, jar).open(request, timeout=seconds) as answer:
                return _object(answer.read(LARGEST), where)
        except urllib.error.HTTPError as error:
            with error:
                said = f"status {error.code}: {one_line(error.read(2000).decode('utf-8', 'replace')) or error.reason}"
            if error.code not in AGAIN:
                raise StudyError(f"{where} refuses with {said}") from None
        except (OSError, http.client.HTTPException) as error:  # URLError and time limits are OSErrors
            said, silent = one_line(str(getattr(error, "reason", error)) or type(error).__name__), silent + 1
            if silent >= patience:
                break
    raise Unreachable(f"{where} cannot be reached ({attempt + 1} attempts; the last: {said}): is it running, is the address "
                      "right?")


def wait(attempt: int) -> None:
    """Sleep before attempt 1, 2, ... (before attempt 0 not at all), each time twice as long."""
    if attempt:
        time.sleep(min(LONGEST, PAUSE * 2 ** (attempt - 1)))


def check(url: str, setting: str) -> str:
    """`url` without a slash at its end; StudyError, which names `setting`, where it is no HTTP address."""
    parts = urllib.parse.urlsplit(url)
    if parts.scheme not in ("http", "https") or not parts.hostname:
        raise StudyError(f"{setting}={url!r} is no address: http://127.0.0.1:8080, for example")
    return url.rstrip("/")


def shown(url: str) -> str:
    """The address as it may stand in a message: without a password or a query."""
    parts = urllib.parse.urlsplit(url)
    port = f":{parts.port}" if parts.port else ""
    return f"{parts.scheme}://{parts.hostname}{port}{parts.path}"


def _opener(url: str, jar: http.cookiejar.CookieJar | None = None) -> urllib.request.OpenerDirector:
    """A proxy is for the world outside, never for this machine."""
    here = urllib.parse.urlsplit(url).hostname in ("127.0.0.1", "localhost", "::1")
    return urllib.request.build_opener(*([urllib.request.ProxyHandler({})] if here else []),
                                       *([] if jar is None else [urllib.request.HTTPCookieProcessor(jar)]))


def _object(data: bytes, where: str) -> dict:
    try:
        found = json.loads(data)
    except (ValueError, RecursionError):
        found = None
    if not isinstance(found, dict):
        raise StudyError(f"{where} answers with no JSON object: {one_line(data[:200].decode('utf-8', 'replace'))!r}")
    return found
