"""The store: artifacts by content key, each in a folder of its own with a manifest written last.

artifacts/<profile>/<group>/<name>-<key8>/. Where manifest.json is missing the stage is unfinished and
goes on from state/. A finished folder is never written again: `set_aside` moves it away first. Digests
are checked when an artifact is opened. With M2RL_STORE an artifact may lie at an address instead (`jobs.remote`): it
is pulled when it is opened, and pushed when it is finished. Nothing here imports torch.
"""
from __future__ import annotations

import contextlib
import errno
import json
import os
import shutil
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from uuid import uuid4

from m2rl_core import imports, ranks
from m2rl_core.jobs import far_locks
from m2rl_core.jobs.far_locks import FarLease
from m2rl_core.jobs.locks import Lease, hold, places
from m2rl_core.jobs.remote import Damaged, Remote, StateCopies, seconds_of
from m2rl_core.provenance import sha256
from m2rl_core.study import Stage

MANIFEST = "manifest.json"
STATE = "state"  # what a stage needs to go on after a crash; removed when it is finished
UNHASHED = "timing.jsonl"  # seconds differ from run to run, so they are no part of what an artifact is
NOT_RUN = "not_run.json"  # beside the rows of an evaluation that went on without a benchmark
SPARE = 64 * 2**20  # bytes that must be free before a stage starts, besides four times its largest input


def store_of(context) -> Path:
    """The folder of the store in which a stage is made: that of rank 0, for the other ranks' `out` lies elsewhere."""
    return ranks.agree(context.out.parents[1])


class CorruptArtifact(RuntimeError):
    """A finished artifact whose files are not those that its manifest lists."""


class DiskFull(RuntimeError):
    """No space left; what was made so far is kept."""


class Store:
    """The artifacts of one profile under `root` (artifacts/<profile>); `jobs` (0: any number) may be made at once.

    `remote`: their copies at an address, which other machines push to and pull from.
    """

    def __init__(self, root: Path, jobs: int = 1, remote: Remote | None = None):
        self.root, self.jobs, self.remote = Path(root), jobs, remote
        self._checked: set[tuple[Path, int]] = set()

    def folder(self, stage: Stage) -> Path:
        """Where the stage's files stand or will stand."""
        return self.root / stage.group / f"{stage.name}-{stage.key[:8]}"

    def is_complete(self, stage: Stage) -> bool:
        """Whether it is finished, here or at the remote address."""
        return self.is_here(stage) or self._is_there(stage)

    def is_here(self, stage: Stage) -> bool:
        return (self.folder(stage) / MANIFEST).is_file()

    def fetch(self, stage: Stage) -> Path:
        """The folder of a finished stage, pulled first where it is at the remote address alone; raises CorruptArtifact."""
        folder = self.folder(stage)
        if not self.is_here(stage) and self._is_there(stage):
            with hold(self.root / ".lock", stage.name, count=0):  # not while a process of this machine makes it
                if not self.is_here(stage):
                    self._pull(stage, folder)
        return folder

    def offer(self, stage: Stage) -> None:
        """Push a finished stage that is here and not at the remote address; brought models stay where they are."""
        if self.remote and stage.kind != "import" and self.is_here(stage) and not self._is_there(stage):
            self.remote.push(self.folder(stage), self.where(stage))

    def manifest(self, stage: Stage) -> dict:
        """The manifest of a finished stage; raises CorruptArtifact where it cannot be read."""
        return self._read(self.folder(stage), stage.name)

    def open(self, stage: Stage) -> Path:
        """The folder of a finished stage, its digests checked (once a process); raises CorruptArtifact."""
        folder = self.fetch(stage)
        mark = (folder, (folder / MANIFEST).stat().st_mtime_ns)
        if mark not in self._checked:
            manifest = self._read(folder, stage.name)
            if manifest["key"] != stage.key:
                raise self._corrupt(folder, stage.name, MANIFEST, "belongs to another key")
            if stage.kind == "import":
                self._check_brought(stage, folder)
            for name, digest in manifest["digests"].items():
                if not (folder / name).is_file():
                    raise self._corrupt(folder, stage.name, name, "is missing")
                if sha256(folder / name) != digest:
                    raise self._corrupt(folder, stage.name, name, "is not what was written (its digest differs)")
            self._checked.add(mark)
        return folder

    def begin(self, stage: Stage, say: Callable[[str], None] = print) -> Path:
        """An unfinished stage's folder with state/ in it, old or new; raises DiskFull before any work is lost."""
        folder = self.folder(stage)
        if self.is_complete(stage):
            raise FileExistsError(f"{folder} is finished and is never overwritten; use `rebuild {stage.name}`")
        (folder / STATE).mkdir(parents=True, exist_ok=True)
        inputs = [path for name in stage.inputs for path in self.root.glob(f"*/{name}-{stage.inputs[name][:8]}")]
        needed = SPARE + 4 * max((size(path) for path in inputs), default=0)
        free = shutil.disk_usage(folder).free
        if free < needed:
            raise DiskFull(f"{stage.name}: {free / 2**20:.0f} MB free in {self.root}, about "
                           f"{needed / 2**20:.0f} MB needed; make room and start again: nothing is lost")
        if self.remote:
            self._take_up(stage, folder / STATE, say)
        return folder

    @contextlib.contextmanager
    def copies(self, stage: Stage, say: Callable[[str], None]) -> Iterator[Callable[[], None]]:
        """Inside, what to call now and then while a stage is made: it copies the state to the remote address, if any."""
        if self.remote is None or stage.kind == "import":
            yield lambda: None
            return
        copies = StateCopies(self.remote, self.folder(stage) / STATE, self.where(stage), say)
        try:
            yield copies.look
        finally:
            copies.end()

    def finish(self, stage: Stage, facts: dict) -> None:
        """Seal a stage: its files reach the disk, then the manifest appears by rename, then state/ goes.

        `facts` (commit, packages, machine, seconds, ...) are put beside key, settings, inputs and digests.
        """
        folder = self.folder(stage)
        own = (STATE, MANIFEST, MANIFEST + ".new")
        files = [path for path in sorted(folder.rglob("*"))
                 if path.is_file() and not path.is_symlink() and path.relative_to(folder).parts[0] not in own]
        for path in files:
            _sync(path)
        digests = {path.relative_to(folder).as_posix(): sha256(path) for path in files if path.name != UNHASHED}
        manifest = {"stage": stage.name, "kind": stage.kind, "version": stage.version, "key": stage.key,
                    "settings": stage.settings, "inputs": stage.inputs, "digests": digests, **facts}
        write_atomic(folder / MANIFEST, json.dumps(manifest, indent=1) + "\n")
        self.sweep(stage)
        self.offer(stage)

    def sweep(self, stage: Stage) -> None:
        """Remove the state/ that a crash between manifest and clean-up left behind."""
        if self.is_complete(stage):
            shutil.rmtree(self.folder(stage) / STATE, ignore_errors=True)

    def set_aside(self, stage: Stage) -> Path | None:
        """Move the stage's folder into set-aside/, so that it is made afresh; its new place, None if there was none."""
        folder = self.folder(stage)
        if self.remote:
            with far_locks.hold(self.remote.at, contextlib.nullcontext(), stage.name, print):
                self.remote.forget(self.where(stage))
        if not folder.exists():
            return None
        home = self.root / "set-aside"
        home.mkdir(exist_ok=True)
        place = next(p for i in range(1, 10**6) if not (p := home / f"{folder.name}.{i}").exists())
        os.replace(folder, place)
        return place

    def why(self, stage: Stage) -> list[str]:
        """Why the stage would run, one reason a line; empty where it is finished."""
        if self.is_complete(stage):
            return []
        others = [path for path in self.root.glob(f"{stage.group}/{stage.name}-*/{MANIFEST}")
                  if len(path.parent.name) == len(stage.name) + 9]
        begun = ["begun and not finished; it goes on where it stopped"] if self._has_state(stage) else []
        if not others:
            return begun or ["never made"]
        newest = max(others, key=lambda path: path.stat().st_mtime_ns)
        old = self._read(newest.parent, stage.name)
        reasons = []
        if old["version"] != stage.version:
            reasons.append(f"version of {stage.kind!r} changed: {old['version']} -> {stage.version}")
        reasons += [f"setting {line}" for line in differences(old["settings"], stage.settings)]
        reasons += [f"input {name} changed" for name in stage.inputs
                    if old["inputs"].get(name) not in (None, stage.inputs[name])]
        reasons += [f"input {name} is new" for name in stage.inputs if name not in old["inputs"]]
        reasons += [f"input {name} is gone" for name in old["inputs"] if name not in stage.inputs]
        return begun + reasons

    @contextlib.contextmanager
    def lock(self, stage: str, say: Callable[[str], None] = print) -> Iterator[Lease | FarLease]:
        """Hold `stage` and one of the places while it is made; who finds none, or the stage held, waits and says for whom."""
        here = hold(self.root / ".lock", stage, say, self.jobs)
        with far_locks.hold(self.remote.at, here, stage, say) if self.remote else here as lease:
            if self.remote:
                self.remote.look_again()  # another machine may have finished it while this one waited
            yield lease

    @contextlib.contextmanager
    def lock_all(self, what: str, say: Callable[[str], None] = print) -> Iterator[None]:
        """Hold the whole store: no stage is being made, on no machine."""
        with contextlib.ExitStack() as held:
            for path in places(self.root / ".lock", self.jobs):
                held.enter_context(hold(path, what, say, alone=True))
            yield

    def where(self, stage: Stage) -> str:
        """The stage's folder, relative to the store's."""
        return self.folder(stage).relative_to(self.root).as_posix()

    def _is_there(self, stage: Stage) -> bool:
        return self.remote is not None and stage.kind != "import" and self.remote.has(self.where(stage))

    def _pull(self, stage: Stage, folder: Path) -> None:
        new = self.root / f".pull-{uuid4().hex[:8]}"
        try:
            self.remote.pull(self.where(stage), new)
            shutil.rmtree(folder, ignore_errors=True)  # begun here, finished elsewhere
            folder.parent.mkdir(parents=True, exist_ok=True)
            os.replace(new, folder)
        except Damaged as error:
            raise CorruptArtifact(f"{stage.name}: {error}; mend: `{command()} rebuild {stage.name} --profile "
                                  f"{self.root.name}`") from error
        finally:
            shutil.rmtree(new, ignore_errors=True)

    def _take_up(self, stage: Stage, state: Path, say: Callable[[str], None]) -> None:
        """Let a stage go on from the state at the remote address where more work is in it than in the one here."""
        if stage.kind == "import" or self.remote.state_seconds(self.where(stage)) <= seconds_of(state):
            return
        new = self.root / f".pull-{uuid4().hex[:8]}"
        try:
            self.remote.pull_state(self.where(stage), new)
            shutil.rmtree(state)
            os.replace(new, state)
        except Damaged as error:  # only time is lost
            say(f"{stage.name}: {error}; it goes on from what is on this machine")
            self.remote.drop_state(self.where(stage))
        finally:
            shutil.rmtree(new, ignore_errors=True)

    def _check_brought(self, stage: Stage, folder: Path) -> None:
        """Weights that are linked are theirs that were brought, by `imports.file_digest`."""
        origin = json.loads((folder / "origin.json").read_text(encoding="utf-8"))
        if origin.get("anchor", "") not in ("", stage.settings.get("anchor")):  # the key is the brought content's
            raise self._corrupt(folder, stage.name, "origin.json", "says that it was mended by another anchor's files")
        for name, digest in origin["digests"].items():
            if (folder / name).is_symlink():
                try:
                    same = imports.file_digest((folder / name).resolve()) == digest
                except imports.ModelError as error:
                    raise CorruptArtifact(f"{stage.name}: {error}") from error
                if not same:
                    raise self._corrupt(folder, stage.name, name, f"is not what was brought from {origin['source']}")

    def _has_state(self, stage: Stage) -> bool:
        state = self.folder(stage) / STATE
        return state.is_dir() and any(state.iterdir())

    def _read(self, folder: Path, name: str) -> dict:
        try:
            manifest = json.loads((folder / MANIFEST).read_text(encoding="utf-8"))
            missing = {"key", "settings", "inputs", "digests", "version"} - set(manifest)
        except (ValueError, TypeError) as error:
            raise self._corrupt(folder, name, MANIFEST, "is not readable") from error
        if missing:
            raise self._corrupt(folder, name, MANIFEST, f"lacks {', '.join(sorted(missing))}")
        return manifest

    def _corrupt(self, folder: Path, name: str, file: str, what: str) -> CorruptArtifact:
        return CorruptArtifact(f"{name}: {folder / file} {what}; "
                               f"mend: `{command()} rebuild {name} --profile {self.root.name}`")


def command() -> str:
    """How to call this package's command line from the clone's root."""
    own = sys.prefix != sys.base_prefix and Path(sys.prefix).name == ".venv"
    return f"{'.venv/bin/python' if own else 'python'} -m m2rl_core"


def differences(old: dict, new: dict, where: str = "") -> list[str]:
    """`key: old -> new` for every leaf in which two nested dicts differ."""
    lines = []
    for key in sorted(old.keys() | new.keys()):
        a, b = old.get(key, "absent"), new.get(key, "absent")
        if isinstance(a, dict) and isinstance(b, dict):
            lines += differences(a, b, f"{where}{key}.")
        elif a != b:
            lines.append(f"{where}{key}: {_short(a)} -> {_short(b)}")
    return lines


def _short(value) -> str:
    text = json.dumps(value)
    return text if len(text) <= 60 else text[:57] + "..."


def size(folder: Path) -> int:
    """Bytes of all files under a folder."""
    return sum(path.stat().st_size for path in folder.rglob("*") if path.is_file())


def write_atomic(path: Path, content: str | bytes) -> None:
    """Write a whole file or none of it: a new file, synced, renamed over the old one."""
    new = path.with_name(path.name + ".new")
    with open(new, "wb") as file:
        file.write(content if isinstance(content, bytes) else content.encode("utf-8"))
        file.flush()
        os.fsync(file.fileno())
    os.replace(new, path)
    _sync(path.parent)


def is_disk_full(error: BaseException) -> bool:
    """Whether an error, or what caused it, says that the disk (or a quota, or a file-size limit) is full."""
    while error is not None:
        full = isinstance(error, OSError) and error.errno in (errno.ENOSPC, errno.EDQUOT, errno.EFBIG)
        if full or "No space left on device" in str(error) or "File too large" in str(error):
            return True
        error = error.__cause__ or error.__context__
    return False


def _sync(path: Path) -> None:
    handle = os.open(path, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)
