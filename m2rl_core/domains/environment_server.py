"""Environments on another machine: `python -m m2rl_core.domains.environment_server --port 7000 --host 0.0.0.0`.

Rollouts whose M2RL_ENVIRONMENTS names this server (`far_environments`) have their episodes here, in processes that can be
killed as on their own machine (`environments.Hosted`): so many steps run at once, and others wait. A client must know the
secret (`far_line`), sends rows as JSON, and can load nothing but modules of this project's domains and --domain's files.
"""
from __future__ import annotations

import argparse
import contextlib
import re
import socket
import sys
import threading
from collections import OrderedDict
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor, wait
from pathlib import Path

from m2rl_core import peers
from m2rl_core.domains import Row, environment_host, own_file
from m2rl_core.domains.environments import PLAYED_OTHER, Hosted
from m2rl_core.domains.far_line import GREETING, Line, Refused, decoded, encoded
from m2rl_core.errors import StudyError
from m2rl_core.provenance import code

MODULE = re.compile(r"m2rl_core\.domains(\.[a-z][a-z0-9_]*)+")
CONNECTIONS = 256  # at once; one more is refused
KEPT = 1024  # episodes of a connection; the oldest is dropped for another one, and played again if it is asked for
BEAT = 2.0  # seconds between two words to a client whose step takes its time
LONGEST = 3600.0  # seconds of a step, whatever a client asks for


class Server:
    """Serves on `host` and `port` (0: any free one) until `close`; `address` says where. StudyError: the port is taken."""

    def __init__(self, host: str, port: int, word: str, files: Sequence[str] = ()):
        self.word, self.code = word, code()
        self.files = {own_file.digest(file): str(Path(file).absolute()) for file in files}
        self.places = threading.Semaphore(CONNECTIONS)
        try:
            self.listening = socket.create_server((host, port), backlog=CONNECTIONS)
        except OSError as error:
            raise StudyError(f"port {port} of {host} cannot be served ({error.strerror}): --port takes another") from error
        self.address = "{}:{}".format(*self.listening.getsockname()[:2])

    def serve(self) -> None:
        while True:
            try:
                sock, _ = self.listening.accept()
            except OSError:  # closed
                return
            if self.places.acquire(blocking=False):
                threading.Thread(target=self._connection, args=(sock,), daemon=True).start()
            else:
                sock.close()

    def close(self) -> None:
        self.listening.close()

    def _connection(self, sock: socket.socket) -> None:
        line = Line(sock)
        try:
            with contextlib.suppress(OSError, EOFError, Refused):  # whoever that was, it is gone
                line.greet(self.word, server=True)
                line.send({"code": self.code, "at_once": environment_host.HOSTS}, GREETING)
                _Client(line, self.files).serve()
        finally:
            line.close()
            self.places.release()


class _Client:
    """One connection: a request at a time, and the episodes that it began."""

    def __init__(self, line: Line, files: dict[str, str]):
        self.line, self.files = line, files
        self.episodes: OrderedDict[int, Hosted] = OrderedDict()

    def serve(self) -> None:
        with ThreadPoolExecutor(1) as pool:
            while True:
                request = self.line.receive(None)
                step = pool.submit(self._replied, request)
                while not wait([step], BEAT).done:
                    self.line.send({"busy": True})
                self.line.send(step.result())

    def _replied(self, request: dict) -> dict:
        try:
            return self._step(request)
        except ImportError as error:
            return {"stop": "import", "why": str(error)}
        except StudyError as error:
            return {"stop": "study", "why": str(error)}
        except (KeyError, TypeError, ValueError, AttributeError) as error:
            return {"stop": "study", "why": f"a request that is not understood ({type(error).__name__}: {error})"}

    def _step(self, request: dict) -> dict:
        for old in request["forget"]:
            self.episodes.pop(old, None)
        number = request["number"]
        if number not in self.episodes:
            if request.get("row") is None:
                return {"unknown": True}
            seconds = min(LONGEST, float(request["seconds"]))
            episode = Hosted(self._home(request["home"]), Row.from_json(request["row"]), seconds)
            for answer, replied in request["past"]:
                if episode.step(answer) != decoded(replied):
                    return {"failed": episode.failed or PLAYED_OTHER}
            self.episodes[number] = episode
            while len(self.episodes) > KEPT:
                self.episodes.popitem(last=False)
        found = self.episodes[number].step(request["answer"])
        return {"failed": self.episodes[number].failed} if found is None else {"replies": encoded(found)}

    def _home(self, asked: str) -> str:
        """The name that a process loads: a module of this project, or the file here of that digest; StudyError for others."""
        if MODULE.fullmatch(asked):
            return asked
        name, mark, digest = asked.rpartition("?")
        if not mark or digest not in self.files:
            raise StudyError(f"it has no {name or asked} of that content: start it with --domain and the same file")
        return f"{self.files[digest]}?{digest}"


def main(argv: Sequence[str] | None = None) -> None:
    """Serve until interrupted."""
    arguments = argparse.ArgumentParser(prog="python -m m2rl_core.domains.environment_server")
    arguments.add_argument("--port", type=int, default=7000)
    arguments.add_argument("--host", default="127.0.0.1", help="address to listen at; 0.0.0.0: all networks (127.0.0.1)")
    arguments.add_argument("--processes", type=int, default=environment_host.HOSTS, help="steps at once, at most 16")
    arguments.add_argument("--domain", action="append", default=[], metavar="FILE", help="a domain of one's own; repeatable")
    asked = arguments.parse_args(argv)
    environment_host.HOSTS = max(1, min(16, asked.processes))
    server = Server(asked.host, asked.port, peers.secret(), asked.domain)
    print(f"environments at {server.address}, {environment_host.HOSTS} steps at once; Ctrl-C ends it", flush=True)
    try:
        server.serve()
    finally:
        server.close()


if __name__ == "__main__":
    try:
        main()
    except StudyError as error:
        sys.exit(f"error: {error}")
    except KeyboardInterrupt:
        pass
