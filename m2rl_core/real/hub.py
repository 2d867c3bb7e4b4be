"""Opens a public data set at one commit, row by row: from the Hugging Face hub, or from files given by hand.

By hand: M2RL_DATA=/folder, with /folder/<owner>__<name>/ as a copy of the data set's repository, such as
/folder/nvidia__Nemotron-Math-v2/data/low.jsonl (`hf download REPO --repo-type dataset --revision COMMIT --local-dir
/folder/<owner>__<name>` makes one). A data set that has no folder there is read from the hub.
JSON lines are read as text and parsed one by one, so that no two rows must agree on their types, nothing is filled
up with None, and an error can name its line; a Parquet file's None-filled keys are removed again (`without_none`).
"""
from __future__ import annotations

import fnmatch
import json
import os
import urllib.request
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field, replace
from functools import cache
from importlib.resources import files as resources
from pathlib import Path

import yaml

from m2rl_core.errors import StudyError, one_line
from m2rl_core.real.schema import SchemaError

FOLDER = "M2RL_DATA"
BUILDERS = {".jsonl": "text", ".json": "text", ".parquet": "parquet", ".csv": "csv"}
COMMIT_SECONDS = 30


class HubError(StudyError):
    """A data set cannot be opened; one line with its name, commit, files, terms and where to put it by hand."""


@dataclass(frozen=True)
class Source:
    """One data set: repository, commit ("" = not known yet), pattern of the files of each split, licence, login."""

    repo: str
    splits: dict[str, str]
    licence: str
    use: str = ""
    revision: str = ""
    login: str = ""

    @property
    def by_hand(self) -> str:
        return self.repo.replace("/", "__")


@dataclass(frozen=True)
class File:
    """One file of a source: its split, its path in the repository, and the address that `datasets` reads."""

    source: Source = field(repr=False)
    split: str
    path: str
    address: str

    @property
    def place(self) -> str:
        """How errors and reports name it."""
        return f"{self.source.repo}/{self.path}"


@cache
def sources() -> dict[str, Source]:
    """Every source by its repository, in the order of sources.yaml."""
    lines = yaml.safe_load((resources("m2rl_core.real") / "sources.yaml").read_text(encoding="utf-8"))
    return {repo: Source(repo, **line) for repo, line in lines.items()}


def folder_of(source: Source) -> Path | None:
    """The folder with the data set's files, where the user gave one; HubError where M2RL_DATA names no folder."""
    given = os.environ.get(FOLDER)
    if not given:
        return None
    if not Path(given).is_dir():
        raise HubError(f"{FOLDER}={given} is no folder: make it, or unset {FOLDER} to read from the hub")
    folder = Path(given) / source.by_hand
    return folder if folder.is_dir() else None


def files(source: Source, splits: Sequence[str] = ()) -> list[File]:
    """The files of a source (of all its splits, or of some), sorted within each split; HubError where one has none.

    Their `source` has the commit that the hub answered with, where it had none; files by hand keep what they have.
    """
    folder = folder_of(source)
    if folder is not None:
        names = sorted(path.relative_to(folder).as_posix() for path in folder.rglob("*") if path.is_file())
        address = f"{folder}/"
    else:
        commit, names = _listing(source)
        source = replace(source, revision=commit)
        address = f"hf://datasets/{source.repo}@{commit}/"
    found = []
    for split in splits or source.splits:
        paths = [name for name in names if fnmatch.fnmatchcase(name, source.splits[split])
                 and Path(name).suffix in BUILDERS]
        if not paths:
            raise HubError(f"{_name(source)} has no file {source.splits[split]}"
                           + (f" in {folder}: copy it there" if folder else f" on the hub: {mend(source)}"))
        found += [File(source, split, path, address + path) for path in paths]
    return found


def _listing(source: Source) -> tuple[str, list[str]]:
    """Commit and all files of a data set, asked of the hub in one request."""
    try:
        info = ask(f"/api/datasets/{source.repo}/revision/{source.revision or 'main'}", COMMIT_SECONDS)
        return info["sha"], sorted(entry["rfilename"] for entry in info["siblings"])
    except (OSError, ValueError, KeyError) as error:
        raise _unreachable(source, error) from error


def ask(path: str, seconds: float) -> dict:
    """The hub's answer at `path`, as whoever is logged in; OSError or ValueError where it gives none (or HF_HUB_OFFLINE)."""
    from datasets import config
    from datasets.utils.file_utils import get_authentication_headers_for_url
    if os.environ.get("HF_HUB_OFFLINE", "0").upper() in ("1", "ON", "YES", "TRUE"):
        raise OSError("HF_HUB_OFFLINE is set")
    address = config.HF_ENDPOINT + path
    request = urllib.request.Request(address, headers=get_authentication_headers_for_url(address))
    with urllib.request.urlopen(request, timeout=seconds) as reply:
        return json.load(reply)


def read(file: File, skip: int = 0, columns: Sequence[str] | None = None) -> Iterator[tuple[int, dict]]:
    """Streams (line or row number from 1, row) of one file, after the first `skip`.

    `columns` are read alone where the format allows it. Raises SchemaError for a line that is no JSON object, and
    HubError where the file cannot be opened or read on.
    """
    from datasets import config, disable_progress_bars, load_dataset
    disable_progress_bars()
    config.HF_UPDATE_DOWNLOAD_COUNTS = False  # it would tell the hub of every file that is opened, also of a local one
    builder = BUILDERS[Path(file.path).suffix]
    options = {"columns": list(columns)} if columns and builder == "parquet" else {}
    if builder == "csv":
        options["keep_default_na"] = False  # "None" and "NA" are answers, too

    def rows():
        stream = load_dataset(builder, data_files=[file.address], split="train", streaming=True, **options)
        return iter(stream.skip(skip) if skip else stream)

    stream = _guarded(file, rows)
    number = skip
    while (row := _guarded(file, lambda: next(stream, None))) is not None:
        number += 1
        if builder == "text":
            if row["text"].strip():
                yield number, parsed(row["text"], file, number)
        else:
            yield number, without_none(row)


def _guarded(file: File, work: Callable):
    try:
        return work()
    except Exception as error:  # what a failed connection raises depends on the hub client's version
        raise _unreachable(file.source, error, file.path) from error


def parsed(text: str, file: File, number: int) -> dict:
    """The object of one line of JSON; SchemaError with file and line where it holds none."""
    place = f"{file.place}, line {number}"
    try:
        row = json.loads(text)
    except (ValueError, RecursionError) as error:
        raise SchemaError(f"{place}: not JSON ({error}): is the file whole?") from error
    if not isinstance(row, dict):
        raise SchemaError(f"{place}: expected an object, found {text[:40]!r}")
    return row


def without_none(value):
    """The same value without the keys that are None, at every depth: Arrow fills rows up with them."""
    if isinstance(value, dict):
        return {key: without_none(item) for key, item in value.items() if item is not None}
    return [without_none(item) for item in value] if isinstance(value, list) else value


def _name(source: Source) -> str:
    return f"{source.repo} at {source.revision[:12] or 'its newest commit'}"


def mend(source: Source) -> str:
    """How to get a data set that cannot be read, in half a line."""
    where = f"{os.environ.get(FOLDER) or '/folder'}/{source.by_hand}/"
    terms = f"{source.login}; or " if source.login else ""
    return (f"{terms}put {', '.join(source.splits.values())} into {where} by hand and set {FOLDER}="
            f"{os.environ.get(FOLDER) or '/folder'} (licence: {source.licence})")


def _unreachable(source: Source, error: object, path: str = "") -> HubError:
    reason = one_line(error, 160)
    return HubError(f"{_name(source)}{': ' + path if path else ''} cannot be read ({reason}): {mend(source)}")
