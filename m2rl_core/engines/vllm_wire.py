"""What a trainer and a vLLM speak: lines of JSON, weights as raw bytes after one; and how both ends of TCP know each other.

Each shows that it has the secret, without sending it, by an HMAC of two random numbers. What follows is not encrypted:
between machines that do not trust their network, put it through ssh (`-L 8123:localhost:8123`).
"""
from __future__ import annotations

import contextlib
import hmac
import json
import os
import secrets
import socket

from m2rl_core import peers
from m2rl_core.errors import StudyError
from m2rl_core.provenance import code

PATIENCE = 3600.0  # seconds for one answer, vLLM's start among them; the environment's M2RL_VLLM_TIMEOUT
GREETING = 10.0  # seconds in which two machines must have connected and shown the secret
LINE = 4096  # bytes of a line from somebody who has not shown it
PIECE = 2**22  # bytes of weights that are sent at once
SILENT = (10, 10, 6)  # seconds before, seconds between and number of unanswered probes after which a machine is lost
SEEN: dict[str, str] = {}  # the vLLM of each server that this process has spoken to


class Ended(Exception):
    """The other side of a connection went away before it answered."""

    def __init__(self, link):
        super().__init__()
        self.link = link


class Wire:
    """A socket for lines of JSON, and for bytes after them; OSError, also for its end and when time is over."""

    def __init__(self, connected: socket.socket, seconds: float | None = None):
        self.socket, self.file = connected, connected.makefile("rb")
        self.wait(seconds)

    def wait(self, seconds: float | None) -> None:
        """How long to wait for the other side from now on; None: as long as it lives."""
        self.seconds = seconds
        self.socket.settimeout(seconds)

    def send(self, **message) -> None:
        self.socket.sendall(json.dumps(message).encode() + b"\n")

    def receive(self, most: int = -1) -> dict:
        """The next line; at most `most` bytes of it."""
        line = self.line(most)
        try:
            found = json.loads(line)
        except ValueError as error:
            raise OSError("this was no line of ours") from error
        return found if isinstance(found, dict) else {}

    def line(self, most: int = -1) -> bytes:
        try:
            found = self.file.readline(most)
        except ValueError as error:  # another thread has closed it
            raise ConnectionError("it was closed") from error
        if not found.endswith(b"\n"):
            raise ConnectionError("it has ended" if not found else "it ended in the middle of a line")
        return found

    def write(self, data: memoryview) -> None:
        for start in range(0, len(data), PIECE):
            self.socket.sendall(data[start:start + PIECE])

    def read_into(self, there: memoryview) -> None:
        """Fill it with the bytes that come next."""
        while there:
            count = self.file.readinto(there[:PIECE])
            if not count:
                raise ConnectionError("it ended in the middle of the weights")
            there = there[count:]

    def close(self) -> None:
        with contextlib.suppress(OSError):  # it is gone already
            self.socket.shutdown(socket.SHUT_RDWR)
        with contextlib.suppress(OSError):
            self.file.close()
        self.socket.close()


def ourselves() -> str:
    return f"process {os.getpid()} on {socket.gethostname()}"


def connect(address: str) -> tuple[Wire, str]:
    """A connection to a server that has shown the secret, and its vLLM; StudyError where there is none of our kind."""
    key, who = peers.secret().encode(), f"the vLLM server {address}"
    try:
        connected = socket.create_connection(peers.address_of(address, "a vLLM server"), timeout=GREETING)
    except OSError as error:
        raise StudyError(f"{who} cannot be reached ({error.strerror or error}): start it there with `python -m "
                         "m2rl_core.engines.server`, or take it from vllm.servers (M2RL_VLLM)") from error
    _probe(connected)
    wire = Wire(connected, GREETING)
    try:
        theirs = str(wire.receive(LINE)["m2rl-vllm"])
        ours = secrets.token_hex(32)
        wire.send(nonce=ours, proof=_proof(key, "trainer", theirs, ours))
        found = wire.receive(LINE)
    except (OSError, KeyError) as error:
        wire.close()
        raise StudyError(f"{who} does not answer as one ({error}): another program's port, or a busy machine") from error
    if not _shown(found, _proof(key, "server", theirs, ours)):
        wire.close()
        raise StudyError(f"{who} has another secret than M2RL_SECRET here")
    if found["code"] != (here := code()):
        wire.close()
        raise StudyError(f"{who} runs other code of this package ({found['code']}, here {here}): bring both to one "
                         "version and start it again")
    SEEN[address] = found["vllm"]
    wire.wait(patience())
    return wire, found["vllm"]


def greet(wire: Wire, key: bytes, about: dict) -> bool:
    """The server's side of `connect`: whether the other one has the secret, and if so it is told `about`."""
    _probe(wire.socket)
    wire.wait(GREETING)
    ours = secrets.token_hex(32)
    wire.send(**{"m2rl-vllm": ours})
    said = wire.receive(LINE)
    theirs = str(said.get("nonce", ""))
    if not _shown(said, _proof(key, "trainer", ours, theirs)):
        wire.send(error="another secret")
        return False
    wire.send(proof=_proof(key, "server", ours, theirs), code=code(), **about)
    wire.wait(None)
    return True


def patience() -> float:
    """Seconds that a server has for an answer; StudyError where M2RL_VLLM_TIMEOUT is no number."""
    told = os.environ.get("M2RL_VLLM_TIMEOUT", str(PATIENCE))
    try:
        if float(told) > 0:
            return float(told)
    except ValueError:
        pass
    raise StudyError(f"M2RL_VLLM_TIMEOUT is {told!r}: it is a number of seconds above 0")


def _proof(key: bytes, side: str, server: str, trainer: str) -> str:
    return hmac.new(key, f"{side} {server} {trainer}".encode(), "sha256").hexdigest()


def _shown(said: dict, wanted: str) -> bool:
    return hmac.compare_digest(str(said.get("proof", "")).encode(), wanted.encode())


def _probe(connected: socket.socket) -> None:
    """Let the system notice, in about a minute, that the other machine is gone, however long an answer may take."""
    connected.setsockopt(socket.SOL_SOCKET, socket.SO_KEEPALIVE, 1)
    connected.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
    for name, value in zip(("TCP_KEEPIDLE", "TCP_KEEPINTVL", "TCP_KEEPCNT"), SILENT, strict=True):
        connected.setsockopt(socket.IPPROTO_TCP, getattr(socket, name), value)
    connected.setsockopt(socket.IPPROTO_TCP, socket.TCP_USER_TIMEOUT, 1000 * (SILENT[0] + SILENT[1] * SILENT[2]))
