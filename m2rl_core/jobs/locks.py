"""Who works on what: locks between the processes of one machine, and between machines on one shared path.

On a machine its kernel decides, by `flock` on a file: a lock ends with its process, however it ends. flock does not reach
every shared file system, and on some it outlives a lost machine. So a holder also makes an empty file, its mark, whose
*name* says what it works on, where and as which process, and touches it every few seconds. Who wants a lock makes its own
mark first and looks at the others then: of two that come at once at least one sees the other and steps back. A mark of
another machine that was not touched for a minute, on the clock of the one who waits, is a lost one's.
"""
from __future__ import annotations

import contextlib
import errno
import fcntl
import hashlib
import json
import os
import platform
import random
import sys
import threading
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from urllib.parse import quote, unquote
from uuid import uuid4

from m2rl_core.errors import StudyError

NOTICE = 30.0  # seconds between two lines of somebody who waits for a lock
BEAT = 5.0  # seconds between two touches of a mark
LOST = float(os.environ.get("M2RL_LOST") or 60.0)  # seconds without a touch, after which another machine's mark is void
NO_FLOCK = (errno.ENOLCK, errno.ENOSYS, errno.EOPNOTSUPP)  # file systems without flock: marks alone decide there

_seen: dict[Path, tuple[int, float]] = {}  # when a mark was touched last, and since when this process knows of that touch


class LockLost(StudyError):
    """Another machine took what this one held, because nothing was heard of this one."""


@dataclass(frozen=True)
class Mark:
    """A holder, or one who wants to be: what its file's name says. `alone` suffers nobody else on the same lock."""

    lock: str
    stage: str
    host: str
    machine: str
    pid: int
    born: str
    alone: bool
    token: str

    @classmethod
    def own(cls, lock: str, stage: str, alone: bool) -> Mark:
        return cls(lock, stage, platform.node(), machine_id(), os.getpid(), born(os.getpid()), alone, uuid4().hex[:12])

    @classmethod
    def read(cls, name: str) -> Mark | None:
        """From a file's name; None where it is no mark's."""
        parts = name.split(",")
        if len(parts) != 8:
            return None
        lock, stage, host, machine, pid, birth, alone, token = parts
        return cls(lock, unquote(stage), unquote(host), machine, int(pid), birth, alone == "alone", token)

    @property
    def name(self) -> str:
        alone = "alone" if self.alone else "one"
        return ",".join((self.lock, quote(self.stage, ""), quote(self.host, ""), self.machine, str(self.pid), self.born,
                         alone, self.token))

    def excludes(self, other: Mark) -> bool:
        return self.alone or other.alone or self.stage == other.stage


class Lease:
    """A lock that is held. `check` raises LockLost where it no longer is."""

    def __init__(self, path: Path | None, mark: Mark):
        self.path, self.mark = path, mark  # no path: there was no room for a mark, flock alone holds
        self._over = threading.Event()
        if path is not None:
            threading.Thread(target=self._beat, daemon=True).start()

    def _beat(self) -> None:
        while not self._over.wait(BEAT):
            with contextlib.suppress(OSError):  # a server that does not answer now may answer the next time
                os.utime(self.path)

    def check(self) -> None:
        if self.path is not None and not self.path.exists():
            raise LockLost(f"{self.mark.stage}: {self.mark.host} was not heard of for {LOST:.0f} seconds, so another machine "
                           "took over; it goes on there")

    def end(self) -> None:
        self._over.set()
        if self.path is not None:
            self.path.unlink(missing_ok=True)


@contextlib.contextmanager
def hold(path: Path, stage: str, say: Callable[[str], None] = print, count: int = 1, alone: bool = False) -> Iterator[Lease]:
    """Hold a lock on the file `path`, which `count` of a machine may hold, each for another stage (0: no limit here).

    `alone` waits for all other holders on every machine. Who must wait says for whom, but for those of the same run
    (environment variable M2RL_RUN), which take turns.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    told = -NOTICE
    while True:
        handle = _claim(places(path, count), stage) if count else None
        found = handle if isinstance(handle, Path) else _announce(path, stage, alone)
        if isinstance(found, Lease):
            break
        if isinstance(handle, int):
            os.close(handle)
        if isinstance(found, Path):
            _forget_lost(found, path)
        if time.monotonic() - told >= NOTICE and not (isinstance(found, Path) and _same_run(found)):
            told = time.monotonic()
            say(f"waiting: {_holder(found)}")
        time.sleep(0.15 + 0.1 * random.random())  # so that two who both stepped back do not meet again
    try:
        yield found
    finally:
        found.end()
        if handle is not None:
            try:
                os.ftruncate(handle, 0)
            finally:
                os.close(handle)  # and with it the lock


def marks(path: Path) -> list[Mark]:
    """The living holders of a lock, on all machines; what dead ones left behind is removed."""
    found = []
    for file in sorted(path.parent.glob(f"{path.name},*")):
        mark = Mark.read(file.name)
        if mark is not None and _lives(mark, file):
            found.append(mark)
        elif mark is not None:
            file.unlink(missing_ok=True)
            _seen.pop(file, None)
    return found


def places(path: Path, count: int) -> list[Path]:
    """The files that stand for the places of a lock: `path`, `path`-1, ..."""
    return [path, *(path.with_name(f"{path.name}-{i}") for i in range(1, count))]


def machine_id() -> str:
    """Equal in two processes that see each other's process ids: host, boot and, in containers, process name space."""
    parts = [platform.node()]
    for file, read in (("/proc/sys/kernel/random/boot_id", lambda p: Path(p).read_text()), ("/proc/self/ns/pid", os.readlink)):
        with contextlib.suppress(OSError):
            parts.append(read(file))
    return hashlib.sha256("\n".join(parts).encode()).hexdigest()[:12]


def born(pid: int) -> str | None:
    """When a process of this machine began, in clock ticks ("0" where the system does not tell); None if it is no more."""
    try:
        fields = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()
        return None if fields[0] in "ZX" else fields[19]
    except OSError:
        if Path("/proc/self/stat").exists():
            return None
    try:
        os.kill(pid, 0)
    except ProcessLookupError:
        return None
    except PermissionError:
        pass  # somebody else's
    return "0"


def _lives(mark: Mark, file: Path) -> bool:
    if mark.machine == machine_id():
        return born(mark.pid) == mark.born
    try:
        with open(file) as opened:  # opening asks the server; a plain stat may be answered from memory
            touched = os.fstat(opened.fileno()).st_mtime_ns
    except FileNotFoundError:
        return False
    if _seen.get(file, (0, 0.0))[0] != touched:
        _seen[file] = touched, time.monotonic()
    return time.monotonic() - _seen[file][1] < LOST


def _announce(path: Path, stage: str, alone: bool) -> Lease | Mark:
    """Our mark among the others, or the one that is in its way."""
    mine = Mark.own(path.name, stage, alone)
    file = path.with_name(mine.name)
    try:
        os.close(os.open(file, os.O_CREAT | os.O_EXCL | os.O_WRONLY, 0o644))
    except OSError as error:
        if error.errno not in (errno.ENOSPC, errno.EDQUOT):
            raise
        return Lease(None, mine)
    try:
        other = next((mark for mark in marks(path) if mark != mine and mine.excludes(mark)), None)
    except BaseException:
        file.unlink(missing_ok=True)
        raise
    if other is None:
        return Lease(file, mine)
    file.unlink(missing_ok=True)
    return other


def _claim(paths: list[Path], stage: str) -> int | Path:
    """A handle on this machine's first free place, signed; where none is free, or the stage is in one, that place's file."""
    handles: dict[Path, int] = {}
    with contextlib.ExitStack() as claiming:
        if len(paths) > 1:  # one at a time looks around
            guard = os.open(paths[0].with_name(f"{paths[0].name}-claim"), os.O_RDWR | os.O_CREAT, 0o644)
            claiming.callback(os.close, guard)
            _flock(guard, fcntl.LOCK_EX)
        for path in paths:
            handle = os.open(path, os.O_RDWR | os.O_CREAT, 0o644)
            if _flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB):
                handles[path] = handle
            else:
                os.close(handle)
        taken = [path for path in paths if path not in handles]
        blocking = [path for path in taken if _who(path).get("stage") == stage] or ([] if handles else taken)
        kept = None if blocking else next(iter(handles.values()))
        for handle in handles.values():
            if handle != kept:
                os.close(handle)
        if kept is not None:
            _sign(kept, stage)
        return blocking[0] if blocking else kept


def _flock(handle: int, how: int) -> bool:
    try:
        fcntl.flock(handle, how)
    except BlockingIOError:
        return False
    except OSError as error:
        if error.errno not in NO_FLOCK:
            raise
    return True


def _sign(handle: int, stage: str) -> None:
    """Write who holds the lock; on a full disk it is held without a name."""
    who = {"pid": os.getpid(), "command": " ".join(sys.argv)[:200], "stage": stage, "since": time.strftime("%H:%M:%S"),
           "run": os.environ.get("M2RL_RUN"), "machine": machine_id()}
    os.ftruncate(handle, 0)
    try:
        os.pwrite(handle, json.dumps(who).encode(), 0)
    except OSError as error:
        if error.errno not in (errno.ENOSPC, errno.EDQUOT, errno.EFBIG):
            raise


def _forget_lost(place: Path, path: Path) -> None:
    """A file server may keep the flock of a machine that is no more: its place becomes a new file, which nobody locked."""
    who = _who(place)
    if who.get("machine", machine_id()) == machine_id():
        return
    if not any((mark.machine, mark.pid) == (who["machine"], who["pid"]) for mark in marks(path)):
        place.unlink(missing_ok=True)


def _who(path: Path) -> dict:
    try:
        return json.loads(path.read_text(encoding="utf-8"))
    except (ValueError, FileNotFoundError):  # it was taken a moment ago, or on a full disk; or a lost one's was removed
        return {}


def _same_run(path: Path) -> bool:
    run = os.environ.get("M2RL_RUN")
    return run is not None and _who(path).get("run") == run


def _holder(found: Path | Mark) -> str:
    if isinstance(found, Mark):
        return f"process {found.pid} on {found.host} works on {found.stage}"
    who = _who(found)
    return f"process {who['pid']} ({who['command']}) works on {who['stage']} since {who['since']}" if who else (
        f"another process holds {found}")
