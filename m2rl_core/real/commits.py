"""Which commit of which data set a folder was made from: asked once, kept in its commits.json, and held to."""
from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

from m2rl_core.errors import StudyError
from m2rl_core.real import hub
from m2rl_core.real.hub import File, Source
from m2rl_core.store import write_atomic

BY_HAND = "by hand"


def files(repo: str, out: Path, splits: Sequence[str] = (), revision: str = "") -> list[File]:
    """The files of a data set at the commit that `out` was begun with; StudyError where that is another one now.

    Files by hand have no commit; their number and bytes stand in for it. `revision` is asked for in place of the listed one.
    """
    found = hub.files(_source(repo, out, revision), splits)
    commit = found[0].source.revision
    if hub.folder_of(found[0].source):
        commit = f"{BY_HAND}, {len(found)} files, {sum(Path(file.address).stat().st_size for file in found)} bytes"
    known = read(out)
    if known.get(repo, commit) != commit:
        raise StudyError(f"{out} was begun with {repo} from {known[repo]}, now it is {commit}: choose another folder")
    write_atomic(out / "commits.json", json.dumps(known | {repo: commit}, indent=1))
    return found


def source(repo: str, out: Path) -> Source:
    """A data set at that commit."""
    return files(repo, out)[0].source


def read(out: Path) -> dict[str, str]:
    """Data set -> commit, or what there is by hand."""
    path = out / "commits.json"
    return json.loads(path.read_text()) if path.is_file() else {}


def _source(repo: str, out: Path, revision: str = "") -> Source:
    known, listed = read(out).get(repo, BY_HAND), hub.sources()[repo]
    return replace(listed, revision=revision or listed.revision if known.startswith(BY_HAND) else known)
