"""Turns files into Parquet pieces that a killed run can build on: a piece is what some thousand lines of one file give.

A piece is complete when its JSON note lies beside it, and both come by rename; a run that finds notes goes on after
them, and writes the same bytes as a run that was never killed. A folder keeps the settings that it was begun with.
"""
from __future__ import annotations

import json
import os
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

from m2rl_core.errors import StudyError
from m2rl_core.provenance import sha256
from m2rl_core.real import hub
from m2rl_core.real.hub import File
from m2rl_core.real.schema import SchemaError
from m2rl_core.store import write_atomic

LINES = 10_000  # of a file, for each piece
GROUP = 100  # rows that are read back together
WHOLE = "whole"  # the note that a file has been read to its end
Convert = Callable[[File, int, dict], "dict | str"]


@dataclass(frozen=True)
class Piece:
    """What one stretch of lines gave. `rows`: usable ones; `written`: those of them that were drawn."""

    file: str
    first: int  # line, from 1
    read: int
    rows: int
    written: int
    dropped: dict[str, int]
    data: str = ""  # file name beside the note; "" where nothing was written
    sha256: str = ""

    @property
    def name(self) -> str:
        return f"{self.file}:{self.first}"


def begin(folder: Path, settings: dict) -> dict:
    """Makes `folder`, or opens the one that these settings began; returns what its plan.json says.

    Commits that the settings leave open ("") are filled in from the plan. StudyError for a folder of other settings.
    """
    folder.mkdir(parents=True, exist_ok=True)
    plan = folder / "plan.json"
    if not plan.is_file():
        if any(folder.iterdir()):
            raise StudyError(f"{folder} is not empty and has no plan.json: choose another folder, or empty it")
        write_atomic(plan, json.dumps(settings, indent=1))
        return settings
    known = json.loads(plan.read_text())
    for name in sorted({*known, *settings}):
        if known.get(name) != settings.get(name):
            raise StudyError(f"{folder} was begun with {name} = {json.dumps(known.get(name))}, now it is "
                             f"{json.dumps(settings.get(name))}: choose another folder, or remove this one")
    return known


def work(files: Sequence[File], folder: Path, convert: Convert, *, lines: int = LINES, first: int = 0,
         wanted: Callable[[Piece], set[int]] | None = None, write: bool = True, skip_wrong: bool = False,
         report: Callable[[Piece], None] | None = None) -> list[Piece]:
    """All pieces of `files`, in order; those that are made already are only read.

    convert(file, line, row) gives the columns of a row, all texts, or the reason why it is dropped. `wanted(piece)`:
    the ranks (from 0, among the usable rows of the piece) that are written, all without it; it is asked with the
    piece's place alone. `first`: of each file only so many lines (0: all). Without `write`, rows are only counted.
    With `skip_wrong`, a row of the wrong schema is dropped and counted by its field; else it raises SchemaError.
    """
    folder.mkdir(parents=True, exist_ok=True)
    pieces = []
    for number, file in enumerate(files):
        stem = f"{number:02d}-{Path(file.path).name.rsplit('.', 1)[0]}"
        done, whole = [], folder / f"{stem}-{WHOLE}.json"
        while (note := folder / f"{stem}-{len(done):06d}.json").exists():
            done.append(_noted(note))
        if not whole.exists() or json.loads(whole.read_text())["pieces"] != len(done):
            for piece in _rest(file, folder, stem, len(done), convert, lines, first, wanted, write, skip_wrong):
                done.append(piece)
                if report:
                    report(piece)
            write_atomic(whole, json.dumps({"file": file.place, "pieces": len(done)}))
        pieces += done
    return pieces


def _rest(file, folder, stem, done, convert, lines, first, wanted, write, skip_wrong) -> Iterator[Piece]:
    """The pieces of one file after the first `done`, each written and noted before it is given."""
    last = first or float("inf")
    stream = hub.read(file, skip=done * lines)
    row = next(stream, None)
    while row is not None and row[0] <= last:
        start = done * lines + 1
        end = min(start + lines - 1, last)
        name = f"{stem}-{done:06d}"
        ranks = wanted(Piece(file.place, start, 0, 0, 0, {})) if wanted else None
        dropped, rows, read, out = Counter(), 0, 0, _Writer(folder / f"{name}.parquet", write)
        with out:
            while row is not None and row[0] <= end:
                number, content = row
                try:
                    made = convert(file, number, content)
                except SchemaError as error:
                    if not skip_wrong:
                        raise
                    made = f"wrong field {error.field}"
                if isinstance(made, str):
                    dropped[made] += 1
                else:
                    if ranks is None or rows in ranks:
                        out.add({**made, "place": f"{file.place}:{number}"})
                    rows += 1
                read += 1
                row = next(stream, None)
        piece = Piece(file.place, start, read, rows, out.rows, dict(sorted(dropped.items())),
                      out.path.name if out.rows and write else "", out.sha256)
        write_atomic(folder / f"{name}.json", json.dumps(vars(piece)))
        done += 1
        yield piece


def _noted(path: Path) -> Piece:
    try:
        return Piece(**json.loads(path.read_text()))
    except (ValueError, TypeError) as error:
        raise StudyError(f"{path}: cannot be read ({error}): remove the folder and begin again") from error


class _Writer:
    """Writes rows to a Parquet file that appears under its name when it is whole; nothing for no rows."""

    def __init__(self, path: Path, write: bool):
        self.path, self.write, self.rows, self.sha256 = path, write, 0, ""
        self.buffer: list[dict] = []
        self.file = None

    def __enter__(self) -> _Writer:
        return self

    def add(self, row: dict[str, str]) -> None:
        self.rows += 1
        if self.write:
            self.buffer.append(row)
            if len(self.buffer) == GROUP:
                self._flush()

    def _flush(self) -> None:
        import pyarrow
        from pyarrow import parquet
        if self.buffer:
            table = pyarrow.table({name: pyarrow.array([row[name] for row in self.buffer], pyarrow.string())
                                   for name in self.buffer[0]})
            if self.file is None:
                self.file = parquet.ParquetWriter(_new(self.path), table.schema, compression="zstd")
            self.file.write_table(table)
            self.buffer = []

    def __exit__(self, kind, error, trace) -> None:
        if kind is None:
            self._flush()
        if self.file is not None:
            self.file.close()
            if kind is None:
                self.sha256 = sha256(_new(self.path))
                os.replace(_new(self.path), self.path)


def _new(path: Path) -> Path:
    return path.with_name(path.name + ".new")


def rows_of(folder: Path, piece: Piece) -> Iterator[dict[str, str]]:
    """The written rows of a piece, a few at a time."""
    from pyarrow import parquet
    if piece.data:
        with parquet.ParquetFile(folder / piece.data) as file:
            for batch in file.iter_batches(GROUP):
                yield from batch.to_pylist()


def dropped(pieces: Sequence[Piece]) -> dict[str, int]:
    """Reason -> rows, over all pieces."""
    total: Counter = Counter()
    for piece in pieces:
        total.update(piece.dropped)
    return dict(sorted(total.items()))
