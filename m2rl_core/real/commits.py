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


def files(repo: str, out: Path, splits: Sequence[str] = ()) -> list[File]:
    """The files of a data set at the commit that `out` was begun with; StudyError where that is another one now."""
    found = hub.files(_source(repo, out), splits)
    commit = BY_HAND if hub.folder_of(found[0].source) else found[0].source.revision
    known = read(out)
    if known.get(repo, commit) != commit:
        raise StudyError(f"{out} was begun with {repo} from {known[repo]}, now it is {commit}: choose another folder")
    write_atomic(out / "commits.json", json.dumps(known | {repo: commit}, indent=1))
    return found


def source(repo: str, out: Path) -> Source:
    """A data set at that commit."""
    return files(repo, out)[0].source


def read(out: Path) -> dict[str, str]:
    """Data set -> commit, or "by hand"."""
    path = out / "commits.json"
    return json.loads(path.read_text()) if path.is_file() else {}


def _source(repo: str, out: Path) -> Source:
    known = read(out).get(repo, BY_HAND)
    return hub.sources()[repo] if known == BY_HAND else replace(hub.sources()[repo], revision=known)
