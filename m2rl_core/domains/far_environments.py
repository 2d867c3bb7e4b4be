"""Environments that live on other machines: M2RL_ENVIRONMENTS=host:port,host:port names `environment_server`s.

A server takes as many of our steps at once as it has processes, by a connection each; an episode belongs to one of these
lanes, and who wants to step another one of the lane waits. A server that breaks the connection, or says nothing for
SILENCE seconds, is lost: its episodes are played again at another one, as after a killed process of this machine.
"""
from __future__ import annotations

import itertools
import os
import socket
import threading
import time
import warnings
import weakref
from collections import OrderedDict, deque
from dataclasses import dataclass, field

from m2rl_core import peers
from m2rl_core.domains import Row
from m2rl_core.domains.far_line import GREETING, SERVERS, Line, Refused, decoded, encoded
from m2rl_core.errors import StudyError, one_line
from m2rl_core.provenance import code

CONNECT = 5.0  # seconds for a connection
SILENCE = 15.0  # seconds without a word from a server that works on a step
AGAIN = 30.0  # seconds after which a lost server is asked again
KEPT = 256  # episodes of a lane that its server keeps; others are played again when their turn comes
GONE = (OSError, EOFError, Refused)  # what a lost server raises; time limits are OSErrors

_numbers = itertools.count()


@dataclass(eq=False)
class Lane:
    """One connection, which carries one step at a time, and the episodes that its server has."""

    server: Server
    lock: threading.Lock = field(default_factory=threading.Lock)
    line: Line | None = None
    known: OrderedDict[int, None] = field(default_factory=OrderedDict)
    gone: deque[int] = field(default_factory=deque)

    def ask(self, episode: Far, answer: str) -> dict:
        """The server's reply to one step; what GONE names where it is lost."""
        with self.lock:
            try:
                if self.line is None:
                    self.known.clear()
                    self.gone.clear()
                    self.line = self.server.connect()[0]
                reply = self._asked(episode, answer, episode.number not in self.known)
                if "unknown" in reply:
                    reply = self._asked(episode, answer, True)
            except BaseException:  # a late reply must not be read as the next one
                self.close()
                raise
            return reply

    def _asked(self, episode: Far, answer: str, anew: bool) -> dict:
        self.known[episode.number] = None
        while len(self.known) > KEPT:
            self.gone.append(self.known.popitem(last=False)[0])
        forget = [self.gone.popleft() for _ in range(len(self.gone))]
        begin = {"home": episode.home, "row": episode.text, "seconds": episode.seconds,
                 "past": [[said, encoded(replied)] for said, replied in episode.past]} if anew else {}
        self.line.send({"forget": forget, "number": episode.number, "answer": answer, **begin})
        while True:
            reply = self.line.receive(SILENCE)
            if "busy" not in reply:
                return reply

    def close(self) -> None:
        if self.line is not None:
            self.line.close()
        self.line = None


class Server:
    """One server of M2RL_ENVIRONMENTS: its lanes, and since when and why it is taken for lost."""

    def __init__(self, address: str):
        self.address, self.place = address, peers.address_of(address, SERVERS)
        self.lanes: list[Lane] = []
        self.lost, self.why = 0.0, ""

    def connect(self) -> tuple[Line, int]:
        """A connection and how many steps the server takes at once; GONE where it is lost, StudyError for other code."""
        line = Line(socket.create_connection(self.place, CONNECT))
        try:
            line.greet(peers.secret(), server=False)
            told = line.receive(GREETING)
        except BaseException:
            line.close()
            raise
        if told.get("code") != code():
            line.close()
            raise StudyError(f"the environments at {self.address} are of other code (files {told.get('code')}, here "
                             f"{code()}): check out the same commit on both")
        return line, max(1, int(told.get("at_once", 1)))

    def open(self) -> None:
        """Connect once, to see whether it is there and how many lanes it has."""
        try:
            line, count = self.connect()
        except GONE as error:
            self.lose(error)
        else:
            line.close()
            self.lanes = self.lanes or [Lane(self) for _ in range(count)]
            self.why = ""

    def lose(self, error: BaseException) -> None:
        self.why, self.lost = one_line(error, 120), time.monotonic()


class Servers:
    """All of them, for this process."""

    def __init__(self, addresses: str):
        """StudyError where none of them is there; one that is not is told by a warning."""
        self.owner, self.lock = os.getpid(), threading.Lock()
        self.all = [Server(address.strip()) for address in addresses.split(",") if address.strip()]
        for server in self.all:
            server.open()
        if all(server.why for server in self.all):
            raise self.all_lost()
        for server in self.all:
            if server.why:
                told = f"{SERVERS}: {server.address} is lost ({server.why}); the others play its episodes"
                warnings.warn(told, stacklevel=2)

    def lane_of(self, episode: Far, tried: set[Server]) -> Lane:
        """The episode's lane, or another one where its server is lost; StudyError where all are."""
        with self.lock:
            now = time.monotonic()
            for server in self.all:
                if server.why and now - server.lost >= AGAIN:
                    server.lost = now
                    threading.Thread(target=server.open, daemon=True).start()  # nobody waits for it
            alive = [server for server in self.all if server not in tried and not server.why]
            if not alive:
                raise self.all_lost()
            lane = episode.at.get("lane")
            if lane is None or lane.server not in alive:
                lanes = [each for server in alive for each in server.lanes]
                lane = episode.at["lane"] = lanes[episode.number % len(lanes)]
            return lane

    def all_lost(self) -> StudyError:
        told = "; ".join(f"{server.address} ({server.why})" for server in self.all)
        return StudyError(f"all servers of {SERVERS} are lost: {told}: do they run, with the same secret?")


_servers: dict[str, Servers] = {}


def servers() -> Servers:
    """This process's own, opened when first asked for."""
    addresses = os.environ[SERVERS]
    found = _servers.get(addresses)
    if found is None or found.owner != os.getpid():  # a forked child must not share its parent's connections
        found = _servers[addresses] = Servers(addresses)
    return found


class Far:
    """An episode at a server, made when it is first asked; otherwise as `environments.Hosted`."""

    def __init__(self, home: str, row: Row, seconds: float):
        self.home, self.text, self.seconds, self.failed = home, row.to_json(), seconds, ""
        if Row.from_json(self.text) != row:
            raise StudyError(f"row {row.id!r} holds what JSON cannot, so it cannot travel: unset {SERVERS}")
        self.number = next(_numbers)
        self.past: list[tuple[str, list[str] | None]] = []
        self.at: dict[str, Lane] = {}
        weakref.finalize(self, _forget, self.at, self.number)

    @property
    def lane(self) -> Lane:
        """What is stepped one after the other."""
        return servers().lane_of(self, set())

    def step(self, answer: str) -> list[str] | None:
        """As `Hosted.step`; StudyError also where all servers are lost."""
        found, tried = servers(), set()
        while True:
            lane = found.lane_of(self, tried)
            try:
                reply = lane.ask(self, answer)
                break
            except GONE as error:
                lane.server.lose(error)
                tried.add(lane.server)
        if "stop" in reply:
            stopped = ImportError if reply["stop"] == "import" else StudyError
            raise stopped(f"environments at {lane.server.address}: {reply['why']}")
        if "failed" in reply:
            self.failed = reply["failed"]
            return None
        replies = decoded(reply["replies"])
        self.past.append((answer, replies))
        return replies


def _forget(at: dict[str, Lane], number: int) -> None:
    """Let the server drop an episode, with the next step that it is asked for."""
    lane = at.get("lane")
    if lane is not None and lane.known.pop(number, 0) is None:
        lane.gone.append(number)
