"""JSON objects over a TCP connection whose two ends prove to each other that they know one secret.

Each end answers the other's random challenge by an HMAC-SHA256; nothing but that is read of a stranger, and never a
pickle. From then on every message carries a mark of its own that only who knows the secret can make, so none can be
added, changed, repeated or left out on the way. Nothing is hidden: for an open network, use a tunnel.
"""
from __future__ import annotations

import hmac
import json
import secrets
import socket
import struct
import time
from collections.abc import Sequence

from m2rl_core.domains import UserSays
from m2rl_core.errors import StudyError

SERVERS = "M2RL_ENVIRONMENTS"
STRANGER, LARGEST = 1024, 64 * 2**20  # bytes of a message: before the proof, and after it
GREETING = 10.0  # seconds for the proofs
MARK = 32  # bytes of a message's mark


class Refused(StudyError):
    """The other end is none of ours, or it says why it does not serve."""


class Line:
    """One connection; `receive` raises TimeoutError, EOFError or ConnectionError for nothing, Refused for a forgery."""

    def __init__(self, sock: socket.socket):
        self.sock, self.key = sock, b""
        self.sent = self.received = 0
        sock.setsockopt(socket.SOL_SOCKET, socket.SO_KEEPALIVE, 1)
        sock.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)

    def send(self, message: dict, seconds: float = 60.0) -> None:
        data = json.dumps(message).encode()
        mark = self._mark(self.mine, self.sent, data) if self.key else b""
        self.sent += 1
        self.sock.settimeout(seconds)
        self.sock.sendall(struct.pack(">I", len(data)) + mark + data)

    def receive(self, seconds: float | None) -> dict:
        """The next message, all of it within so many seconds (None: no limit)."""
        end = None if seconds is None else time.monotonic() + seconds
        size = struct.unpack(">I", self._read(4, end))[0]
        if size > (LARGEST if self.key else STRANGER):
            raise Refused(f"a message of {size} bytes is longer than any of ours")
        mark = self._read(MARK, end) if self.key else b""
        data = self._read(size, end)
        if self.key and not hmac.compare_digest(mark, self._mark(self.theirs, self.received, data)):
            raise Refused("a message was changed on its way")
        self.received += 1
        try:
            found = json.loads(data)
        except (ValueError, RecursionError):
            found = None
        if not isinstance(found, dict):
            raise Refused("what it says is no JSON object")
        return found

    def greet(self, secret: str, server: bool) -> None:
        """Prove to each other that both know the secret; Refused where one does not."""
        mine = secrets.token_hex(16)
        self.send({"m2rl": 1, "nonce": mine}, GREETING)
        theirs = self._text(self.receive(GREETING), "nonce")
        nonces = f"{mine} {theirs}" if server else f"{theirs} {mine}"
        self.mine, self.theirs = (b"server", b"client") if server else (b"client", b"server")
        mac = {who: hmac.digest(secret.encode(), who + b" " + nonces.encode(), "sha256").hex()
               for who in (self.mine, self.theirs)}
        if not server:  # the one who asks proves it first
            self.send({"proof": mac[self.mine]}, GREETING)
        said = self.receive(GREETING)
        if "refused" in said:
            raise Refused(self._text(said, "refused"))
        if not hmac.compare_digest(self._text(said, "proof").encode(), mac[self.theirs].encode()):
            if server:
                self.send({"refused": "it has another secret"}, GREETING)
            raise Refused("it has another secret")
        if server:
            self.send({"proof": mac[self.mine]}, GREETING)
        self.key = hmac.digest(secret.encode(), b"messages " + nonces.encode(), "sha256")
        self.sent = self.received = 0

    def close(self) -> None:
        self.sock.close()

    def _mark(self, who: bytes, number: int, data: bytes) -> bytes:
        return hmac.digest(self.key, b"%s %d " % (who, number) + data, "sha256")

    def _read(self, size: int, end: float | None) -> bytes:
        parts = []
        while size:
            left = None if end is None else end - time.monotonic()
            if left is not None and left <= 0:
                raise TimeoutError("it says nothing")
            self.sock.settimeout(left)
            part = self.sock.recv(min(size, 2**20))
            if not part:
                raise EOFError("it ended the connection")
            parts.append(part)
            size -= len(part)
        return b"".join(parts)

    @staticmethod
    def _text(message: dict, name: str) -> str:
        found = message.get(name)
        if not isinstance(found, str) or len(found) > 200:
            raise Refused("it is no server or client of environments")
        return found


def encoded(replies: Sequence[str] | None) -> list[list] | None:
    """Texts as JSON: [text, whether the user says it]."""
    return None if replies is None else [[str(text), isinstance(text, UserSays)] for text in replies]


def decoded(replies: list[list] | None) -> list[str] | None:
    return None if replies is None else [UserSays(text) if user else text for text, user in replies]
