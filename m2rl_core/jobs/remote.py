"""The store's copy at an fsspec address, M2RL_STORE: s3://bucket/folder, gs://..., a path on another disk.

All code reads and writes the local store. A finished artifact is copied to the address, its manifest last, so that it is
whole there or absent; what another machine made is copied from there before it is read, each file checked by its digest. The
state of a stage that is being made goes there now and then (`StateCopies`), so that another machine goes on from it: files
by their digests, and an index last, which so never names half a checkpoint. Brought models are linked and stay here.
"""
from __future__ import annotations

import contextlib
import json
import os
import posixpath
import shutil
import threading
import time
from collections.abc import Callable
from pathlib import Path

from m2rl_core.errors import StudyError, one_line
from m2rl_core.jobs.address import SETTING, Address, RemoteError
from m2rl_core.jobs.far_locks import FOLDER as LOCKS
from m2rl_core.jobs.locks import Mark
from m2rl_core.provenance import sha256

PACE = "M2RL_STORE_MINUTES"
MANIFEST, FILES, STATE = "manifest.json", "files.json", "state"
MINUTES = 5.0  # between two copies of a stage's state, at least; the environment's M2RL_STORE_MINUTES
FORGET = 1.0  # seconds for which it is remembered that an artifact is not there
FROZEN = (".safetensors", ".pt", ".distcp", ".parquet")  # written once: a second name of theirs serves as a copy
PASSING = ("seconds", "progress.jsonl")  # of a state: they change with every step


class Damaged(StudyError):
    """A file there is not what was pushed; the message says which."""


class Remote:
    """One profile's artifacts at an address; `where` is always <group>/<name>-<key8>, as in the local store."""

    def __init__(self, address: str, profile: str):
        """RemoteError where the package for such addresses is not installed, or no package knows them."""
        self.at = Address(address, profile)
        self._absent: dict[str, float] = {}  # where -> when it was looked for last
        self._there: set[str] = set()

    # Artifacts ------------------------------------------------------------------------------------

    def has(self, where: str) -> bool:
        """Whether a finished artifact is there."""
        if where not in self._there and time.monotonic() - self._absent.get(where, -FORGET) >= FORGET:
            if self.at.exists(f"{where}/{MANIFEST}"):
                self._there.add(where)
            else:
                self._absent[where] = time.monotonic()
        return where in self._there

    def look_again(self) -> None:
        """Forget what was not there a moment ago."""
        self._absent.clear()

    def push(self, folder: Path, where: str) -> None:
        """Copy a finished artifact; the manifest is written last, and the state is no longer needed then."""
        files = [path for path in sorted(folder.rglob("*")) if path.is_file() and not path.is_symlink()
                 and path.relative_to(folder).parts[0] != STATE and path.suffix != ".new"]
        digests = {path.relative_to(folder).as_posix(): sha256(path) for path in files}
        for name in digests:
            if name != MANIFEST:
                self.at.put(folder / name, f"{where}/{name}")
        self.at.write(f"{where}/{FILES}", json.dumps(digests, indent=1).encode())
        self.at.write(f"{where}/{MANIFEST}", (folder / MANIFEST).read_bytes())
        self._there.add(where)
        self.drop_state(where)

    def pull(self, where: str, target: Path) -> None:
        """Copy an artifact into a new folder; Damaged for a file that is missing or whose digest is another."""
        target.mkdir(parents=True)
        files = self._json(f"{where}/{FILES}")
        if MANIFEST not in files:
            raise Damaged(f"{self.at.shown}/{where}/{FILES} is missing or not readable")
        for name, digest in files.items():
            self._fetch(f"{where}/{name}", target, name, digest)

    def forget(self, where: str) -> None:
        """Remove an artifact and its state, the manifest first."""
        self._there.discard(where)
        self.at.remove(f"{where}/{MANIFEST}")
        self.at.remove(where, recursive=True)

    # State ----------------------------------------------------------------------------------------

    def push_state(self, folder: Path, where: str, seconds: float) -> None:
        """Copy what a stage needs to go on, of a folder that nobody writes to; what is there already stays."""
        index = f"{where}/{STATE}/{FILES}"
        before = set(self._state(where).get("files", {}).values())
        digests = {path.relative_to(folder).as_posix(): sha256(path) for path in sorted(folder.rglob("*")) if path.is_file()}
        for digest, name in {digest: name for name, digest in digests.items() if digest not in before}.items():
            self.at.put(folder / name, f"{where}/{STATE}/{digest}")
        self.at.write(index, json.dumps({"seconds": seconds, "files": digests}, indent=1).encode())
        for digest in before - set(digests.values()):
            self.at.remove(f"{where}/{STATE}/{digest}")

    def state_seconds(self, where: str) -> float:
        """How many seconds of work are in the state that is there; -1 where there is none."""
        return self._state(where).get("seconds", -1.0)

    def pull_state(self, where: str, target: Path) -> None:
        """Copy a state into a new folder; Damaged as `pull`."""
        target.mkdir(parents=True)
        for name, digest in self._state(where)["files"].items():
            self._fetch(f"{where}/{STATE}/{digest}", target, name, digest)

    def pull_trace(self, where: str, name: str, target: Path) -> None:
        """One small file of a state, to be looked at; nothing where there is none, or where it is being replaced."""
        digest = self._state(where).get("files", {}).get(name)
        with contextlib.suppress(Damaged):
            if digest:
                self._fetch(f"{where}/{STATE}/{digest}", target.parent, target.name, digest)

    def makers(self) -> set[str]:
        """The stages that have a mark at the address (see `far_locks`)."""
        marks = [Mark.read(name) for name in self.at.names(LOCKS)]
        return {mark.stage for mark in marks if mark is not None}

    def drop_state(self, where: str) -> None:
        self.at.remove(f"{where}/{STATE}/{FILES}")
        self.at.remove(f"{where}/{STATE}", recursive=True)

    def _state(self, where: str) -> dict:
        """The index of a state; empty where there is none, or one that was torn: the stage begins anew."""
        found = self._json(f"{where}/{STATE}/{FILES}")
        whole = isinstance(found.get("files"), dict) and isinstance(found.get("seconds"), float)
        return found if whole else {}

    def _json(self, path: str) -> dict:
        """A small file's object; empty where there is none."""
        try:
            data = self.at.read(path)
        except FileNotFoundError:
            return {}
        with contextlib.suppress(ValueError):
            found = json.loads(data)
            return found if isinstance(found, dict) else {}
        return {}

    def _fetch(self, path: str, target: Path, name: str, digest: str) -> None:
        if posixpath.isabs(name) or ".." in name.split("/"):
            raise Damaged(f"{self.at.shown}/{path} is to lie outside of its folder")
        (target / name).parent.mkdir(parents=True, exist_ok=True)
        try:
            self.at.get(path, target / name)
        except FileNotFoundError:
            raise Damaged(f"{self.at.shown}/{path} is missing") from None
        if sha256(target / name) != digest:
            raise Damaged(f"{self.at.shown}/{path} is not what was pushed (its digest differs)")


class StateCopies:
    """Copies of one stage's state/, made beside the work and not more often than PACE says; `look` is called between steps.

    What is copied is a snapshot, since the work goes on meanwhile. An address that cannot be reached now costs a line.
    """

    def __init__(self, remote: Remote, state: Path, where: str, say: Callable[[str], None]):
        self.remote, self.state, self.where, self.say = remote, state, where, say
        self.snapshot = state.parents[2] / f".push-{state.parent.name}"
        self.pace = 60 * pace()
        self._seen, self._last = self._marks(), time.monotonic()
        self._thread: threading.Thread | None = None

    def look(self) -> None:
        """Begin a copy where it is time for one and there is something new."""
        if self._thread is not None and self._thread.is_alive() or time.monotonic() - self._last < self.pace:
            return
        now = self._marks()
        if now == self._seen:
            return
        self._seen, self._last = now, time.monotonic()
        shutil.rmtree(self.snapshot, ignore_errors=True)
        for path in self._files():
            _copy(path, self.snapshot / path.relative_to(self.state))
        seconds = seconds_of(self.state)
        self._thread = threading.Thread(target=self._push, args=(seconds,), daemon=True)
        self._thread.start()

    def end(self) -> None:
        """Wait for the copy that is being made."""
        if self._thread is not None:
            self._thread.join()
        shutil.rmtree(self.snapshot, ignore_errors=True)

    def _push(self, seconds: float) -> None:
        try:
            self.remote.push_state(self.snapshot, self.where, seconds)
        except (RemoteError, OSError) as error:
            self.say(f"{self.where}: its state stays on this machine for now: {one_line(error)}")

    def _files(self) -> list[Path]:
        return [path for path in sorted(self.state.rglob("*")) if path.is_file()
                and not any(part.endswith((".partial", ".new")) for part in path.relative_to(self.state).parts)]

    def _marks(self) -> set[tuple]:
        return {(path, path.stat().st_mtime_ns) for path in self._files() if path.name not in PASSING}


def opened(profile: str) -> Remote | None:
    """What M2RL_STORE names for a profile; None where it names nothing."""
    address = os.environ.get(SETTING, "")
    if not address:
        return None
    return Remote(address if "://" in address else os.path.abspath(address), profile)


def pace() -> float:
    """Minutes between two copies of a state; 0: after each checkpoint."""
    try:
        return max(0.0, float(os.environ.get(PACE) or MINUTES))
    except ValueError:
        raise RemoteError(f"{PACE}={os.environ[PACE]!r}: a number of minutes is needed") from None


def seconds_of(state: Path) -> float:
    """How many seconds of work are in a local state, by its own count; -1 where there is none."""
    with contextlib.suppress(OSError, ValueError):
        return float((state / "seconds").read_text())
    return -1.0


def _copy(path: Path, target: Path) -> None:
    target.parent.mkdir(parents=True, exist_ok=True)
    if path.suffix in FROZEN:
        with contextlib.suppress(OSError):  # a file system without second names
            os.link(path, target)
            return
    shutil.copy2(path, target)
