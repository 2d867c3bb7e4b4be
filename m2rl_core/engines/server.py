"""A vLLM for a trainer on another machine: `python -m m2rl_core.engines.server --port 8123 --tensor-parallel 2`.

Runs the same worker as a trainer does on its own machine, started for the model that the first trainer brings, and kept
for the next one of that shape. Serves one trainer at a time. One that goes away in the middle of a question takes the
worker with it: nobody waits for that answer, and the server is free at once.
"""
from __future__ import annotations

import argparse
import contextlib
import os
import select
import socket
import sys
import threading
import time
from pathlib import Path

from m2rl_core import peers
from m2rl_core.engines import vllm_wire
from m2rl_core.engines.vllm_link import MEND, Local, Memory, installed, interpreter, visible_gpus
from m2rl_core.engines.vllm_wire import Ended, Wire
from m2rl_core.errors import StudyError

CALLS = ("load", "sample", "score")
GREETED = 32  # connections at a time, most of them from nobody that we know
HOLD = 1.0  # seconds before somebody who has not the secret may try again


class Server:
    """One vLLM and whoever may ask it."""

    def __init__(self, key: bytes, vllm: str, python: Path, threads: int, gpu_memory: float, tensor_parallel: int):
        self.key, self.vllm, self.settings = key, vllm, (python, threads, gpu_memory, tensor_parallel)
        self.taken, self.trainer, self.room = threading.Lock(), "", threading.BoundedSemaphore(GREETED)
        self.local: Local | None = None
        self.model: dict = {}
        self.memory: Memory | None = None

    def serve(self, listener: socket.socket) -> None:
        """Let in whoever comes, for ever."""
        while True:
            connected, address = listener.accept()
            if self.room.acquire(blocking=False):
                threading.Thread(target=self._meet, args=(Wire(connected), address[0]), daemon=True).start()
            else:
                connected.close()

    def _meet(self, wire: Wire, host: str) -> None:
        """One connection, from its greeting to its end."""
        try:
            with contextlib.closing(wire), contextlib.suppress(OSError):  # it went away, which is its right
                if not vllm_wire.greet(wire, self.key, {"vllm": self.vllm}):
                    _say(f"refused {host}: it has another secret")
                    time.sleep(HOLD)
                    return
                request = wire.receive()
                if not self.taken.acquire(blocking=False):
                    wire.send(error=f"it serves another trainer ({self.trainer}): wait for its end, or take other servers")
                    return
                try:
                    self.trainer = request["who"]
                    _say(f"serving {self.trainer}")
                    self._work(wire, request["model"])
                finally:
                    _say(f"{self.trainer} has gone")
                    self.taken.release()
        finally:
            self.room.release()

    def _work(self, wire: Wire, model: dict) -> None:
        """Answer a trainer until it goes away."""
        try:
            self._ready(model)
            wire.send(about=self.local.about)
            while True:
                request = wire.receive()
                if request.get("call") not in CALLS:
                    wire.send(error=f"no call {request.get('call')!r} here")
                    continue
                if request["call"] == "load":
                    self.memory.receive(wire)
                answer = self._passed_on(wire, request)
                if answer is None:
                    return
                wire.socket.sendall(answer)
        except StudyError as error:
            wire.send(error=str(error))
        except Ended as ended:
            how = ended.link.autopsy()
            self._stop()
            _say(f"vLLM ended {how}")
            wire.send(ended=how)

    def _ready(self, model: dict) -> None:
        """A worker for this model, the one that is there if it fits."""
        if self.local is not None and (self.model != model or self.local.process.poll() is not None):
            self._stop()
        if self.local is None:
            python, threads, gpu_memory, tensor_parallel = self.settings
            _say("vLLM is started")
            self.model, self.memory = model, Memory(model)
            try:
                self.local = Local(model, self.memory, python, threads, gpu_memory, tensor_parallel)
            except OSError as error:
                raise StudyError(f"vLLM could not be started: {error}") from error
            finally:
                self.memory.close()
            _say(f"{self.local.about}, for a model of {model['size'] / 2**20:.0f} MiB")

    def _passed_on(self, wire: Wire, request: dict) -> bytes | None:
        """The worker's answer; None where the trainer did not wait for it."""
        try:
            self.local.wire.send(**request)
            ready, *_ = select.select([self.local.wire.socket, wire.socket], [], [])
            if self.local.wire.socket not in ready:  # a trainer that waits says nothing: it has hung up
                self._stop()
                return None
            return self.local.wire.line()
        except OSError as error:
            raise Ended(self.local) from error

    def _stop(self) -> None:
        if self.local is not None:
            self.local.end()
        self.local = None


def _say(what: str) -> None:
    print(f"{time.strftime('%H:%M:%S')} {what}", flush=True)


def _listen(host: str, port: int) -> socket.socket:
    try:
        family = socket.getaddrinfo(host, port)[0][0]
        return socket.create_server((host, port), family=family)
    except OSError as error:
        raise StudyError(f"cannot listen on {host}:{port} ({error.strerror}): give another --port, or an address of this "
                         "machine as --host") from error


def main(argv: list[str] | None = None) -> int:
    """Serves until it is stopped; 2 after one line on standard error."""
    parser = argparse.ArgumentParser(prog="python -m m2rl_core.engines.server", description=__doc__.split("\n")[0],
                                     epilog="The secret is M2RL_SECRET, or what is in the file M2RL_SECRET_FILE.")
    parser.add_argument("--host", default="127.0.0.1", help="0.0.0.0 lets other machines in (%(default)s)")
    parser.add_argument("--port", type=int, default=8123, help="0: any that is free (%(default)s)")
    parser.add_argument("--tensor-parallel", type=int, default=1, help="GPUs of one model (%(default)s)")
    parser.add_argument("--gpu-memory", type=float, default=0.9, help="vLLM's share of each GPU's memory (%(default)s)")
    parser.add_argument("--threads", type=int, default=len(os.sched_getaffinity(0)), help="on a CPU (%(default)s)")
    args = parser.parse_args(argv)
    try:
        python = interpreter()
        vllm, gpus = installed(python), visible_gpus()
        if vllm == "not installed":
            raise StudyError(f"{python} has no vllm: {MEND}")
        if gpus and len(gpus) < args.tensor_parallel:
            raise StudyError(f"--tensor-parallel {args.tensor_parallel}, but {len(gpus)} GPUs are here")
        server = Server(peers.secret().encode(), vllm, python, args.threads, args.gpu_memory, args.tensor_parallel)
        with _listen(args.host, args.port) as listener:
            host, port = listener.getsockname()[:2]
            alone = host.startswith("127.") or host == "::1"
            _say(f"{vllm} at {host}:{port}, " + ("for this machine alone; `--host 0.0.0.0` lets other machines in" if alone
                                                 else "for every machine that can reach it and has the secret"))
            server.serve(listener)
    except StudyError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        return 130
    return 0


if __name__ == "__main__":
    sys.exit(main())
