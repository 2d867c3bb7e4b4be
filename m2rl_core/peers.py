"""What this project's programs on different machines have in common: one secret, and how an address is written."""
from __future__ import annotations

import os
from pathlib import Path

from m2rl_core.errors import StudyError

SECRET, SECRET_FILE = "M2RL_SECRET", "M2RL_SECRET_FILE"
SHORTEST = 16  # characters of a secret


def secret() -> str:
    """What M2RL_SECRET says, or what is in the file that M2RL_SECRET_FILE names; StudyError where it is no secret."""
    file = os.environ.get(SECRET_FILE)
    try:
        found = Path(file).read_text(encoding="utf-8").strip() if file else os.environ.get(SECRET, "")
    except (OSError, ValueError) as error:
        raise StudyError(f"{SECRET_FILE}: {file} cannot be read ({getattr(error, 'strerror', None) or error})") from error
    if len(found) < SHORTEST:
        raise StudyError(f"programs on other machines need a secret of {SHORTEST} characters or more, the same on all (here "
                         f"are {len(found)}): set {SECRET}, or {SECRET_FILE} to a file that holds it (`openssl rand -hex 32`)")
    return found


def address_of(text: str, what: str) -> tuple[str, int]:
    """(host, port) of "host:port" or "[IPv6]:port"; StudyError, which begins with `what`, for anything else."""
    host, _, port = text.rpartition(":")
    host = host[1:-1] if host.startswith("[") and host.endswith("]") else host if ":" not in host else ""
    if not host or not port.isdecimal() or not 0 < int(port) < 2**16:
        raise StudyError(f"{what}: {text!r} is no address: write host:port, as in node2:8123")
    return host, int(port)
