"""The SFT blend of Table 1 from the six Nemotron sets: a folder of Parquet pieces, a manifest, and what was dropped why.

Table 1's counts and ways of drawing are read from the paper's tables. "random sampling" draws without replacement, by
rank among the usable rows, which a first pass counts; "use all" and "repeat N times" need one pass. A repeated row is
stored once, with its number of times in the manifest: read the folder through `Blend`.
Departures from the released code: a set that is too small is an error, not drawn with replacement; "repeat" repeats
each row, where that code draws at random; a placeholder that cannot be filled is dropped, where it trains on "-".
"""
from __future__ import annotations

import json
from bisect import bisect_left, bisect_right
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import asdict, dataclass
from functools import partial
from itertools import accumulate, groupby
from pathlib import Path

import pandas as pd

from m2rl_core import paper
from m2rl_core.domains import generator
from m2rl_core.errors import StudyError
from m2rl_core.real import commits, pieces, schema
from m2rl_core.real.hub import File
from m2rl_core.real.pieces import Piece
from m2rl_core.real.questions import CODE, PLACEHOLDER, Statements
from m2rl_core.store import hold, write_atomic

DOMAINS = {"Math Formal Proofs": "math", "Math": "math", "Science": "science", "Code": "coding", "Chat": "if",
           "Conversational Agent": "agent"}
ASKED = ("user", "assistant")  # an empty message of these makes a row useless


@dataclass(frozen=True)
class Kind:
    """One line of Table 1: type, data set, samples, and the way of drawing."""

    type: str
    repo: str
    samples: int
    sampling: str

    @property
    def times(self) -> int:
        return int(self.sampling.split()[1]) if self.sampling.startswith("repeat") else 1


@dataclass(frozen=True)
class Settings:
    """What is made of Table 1.

    `share`: of its samples of every type; below 1, "use all" and "repeat" draw at random too. `types`: some of its
    types, () for all. `first`: only so many lines of every file, for a trial, where types may come out short (0: all).
    `skip_wrong`: rows of the wrong schema are dropped and counted.
    """

    seed: int = 1
    share: float = 1.0
    types: tuple[str, ...] = ()
    first: int = 0
    skip_wrong: bool = False
    lines: int = pieces.LINES


def table_1() -> list[Kind]:
    """The lines of Table 1 without its total."""
    printed = paper.table(1).drop(index="Total")
    return [Kind(row.Index, f"nvidia/{row.source}", row.samples, row.sampling) for row in printed.itertuples()]


def build(out: Path, settings: Settings = Settings(), report: Callable[[str], None] = lambda text: None) -> dict:
    """Makes the blend in `out` and returns its report; goes on where a killed run stopped, to the same bytes.

    Raises HubError, SchemaError, and StudyError for a set with fewer usable rows than are drawn from it.
    """
    known = {kind.type: kind for kind in table_1()}
    for name in settings.types:
        if name not in known:
            raise StudyError(f"Table 1 has no type {name!r}; its types are {', '.join(known)}")
    if not 0 < settings.share <= 1:
        raise StudyError(f"share {settings.share}: a number above 0 and at most 1")
    plan = pieces.begin(out, json.loads(json.dumps({"kind": "sft", **asdict(settings)})))
    if (out / "report.json").is_file():
        return json.loads((out / "report.json").read_text())
    names = settings.types or tuple(known)
    for repo in (*(known[name].repo for name in names), *(CODE.values() if "Code" in names else ())):
        commits.files(repo, out)  # what is not there is said now, not after hours
    statements = Statements(lambda repo: commits.source(repo, out))
    made, lines = {}, {}
    with hold(out / ".lock", "this blend", report):
        for name in names:
            made[name], lines[name] = _kind(known[name], out, settings, statements, report)
    manifest = [{"type": name, "folder": folder_name(name), "times": lines[name]["times"], "group": pieces.GROUP,
                 **vars(piece)} for name, done in made.items() for piece in done if piece.data]
    write_atomic(out / "manifest.json", json.dumps(manifest, indent=1))
    told = {"plan": plan, "commits": commits.read(out), "types": lines}
    write_atomic(out / "report.json", json.dumps(told, indent=1))
    return told


def folder_name(kind: str) -> str:
    return kind.lower().replace(" ", "-")


def _kind(kind: Kind, out: Path, settings: Settings, statements: Statements, report) -> tuple[list[Piece], dict]:
    """The pieces of one type, and its line of the report."""
    folder, files = out / folder_name(kind.type), commits.files(kind.repo, out)
    convert = partial(columns_of, kind=kind.type, statements=statements)
    work = partial(pieces.work, files, convert=convert, lines=settings.lines, first=settings.first,
                   skip_wrong=settings.skip_wrong,
                   report=lambda piece: report(f"{kind.type}: {piece.name}: {piece.rows} of {piece.read} rows usable"))
    random = settings.share < 1 or kind.sampling == "random sampling"
    wanted = None
    if random:
        counted = work(folder / "counted", write=False)
        count = round(settings.share * kind.samples / kind.times)
        wanted = draw(counted, count, settings, kind)
    done = work(folder, wanted=wanted)
    written = sum(piece.written for piece in done)
    usable = sum(piece.rows for piece in done)
    return done, {
        "source": kind.repo, "sampling": kind.sampling, "drawn": "at random" if random else "all",
        "read": sum(piece.read for piece in done), "dropped": pieces.dropped(done), "usable": usable,
        "rows": written, "times": kind.times, "samples": written * kind.times, "paper": kind.samples}


def draw(counted: Sequence[Piece], count: int, settings: Settings, kind: Kind) -> Callable[[Piece], set[int]]:
    """The ranks to write of each piece: `count` of all usable rows without replacement, by the seed and the type.

    A trial run (`first`) takes what there is where that is less; else StudyError.
    """
    ends = list(accumulate(piece.rows for piece in counted))
    total = ends[-1] if ends else 0
    if total < count and not settings.first:
        raise StudyError(f"{kind.type}: {kind.repo} has {total} usable rows, {count} are to be drawn without replacement: "
                         "is the copy whole? else lower the share (--share)")
    chosen = sorted(generator(settings.seed, "sft", kind.type).sample(range(total), min(count, total)))
    begins = {piece.name: end - piece.rows for piece, end in zip(counted, ends, strict=True)}
    lengths = {piece.name: piece.rows for piece in counted}

    def wanted(piece: Piece) -> set[int]:
        begin = begins[piece.name]
        low, high = bisect_left(chosen, begin), bisect_right(chosen, begin + lengths[piece.name] - 1)
        return {rank - begin for rank in chosen[low:high]}

    return wanted


def columns_of(file: File, number: int, row: dict, *, kind: str, statements: Statements) -> dict | str:
    """A row as it is stored (messages and tools as JSON text, which Arrow cannot fill up), or why it is dropped."""
    place = f"{file.place}, line {number}"
    made = clean(row, place, statements)
    if isinstance(made, str):
        return made
    columns = {name: json.dumps(value, ensure_ascii=False) for name, value in made.items()}
    return {"type": kind, **columns} if all(map(schema.whole, columns.values())) else "half a character"


def clean(row: dict, place: str, statements: Statements) -> dict | str:
    """{messages, tools} of a row of any of the six sets, or the reason why it is dropped. SchemaError names the field."""
    messages = schema.messages(row, place)
    if not messages:
        return "no messages"
    for message in messages:
        if message["role"] == "user" and message["content"] == PLACEHOLDER:
            message["content"] = _statement(row, place, statements)
            if not message["content"]:
                return "placeholder without a question"
    if any(m["role"] in ASKED and not (m["content"] or m.get("reasoning_content") or m.get("tool_calls"))
           for m in messages):
        return "empty message"
    if not any(message["role"] == "assistant" for message in messages):
        return "no assistant message"
    return {"messages": messages, "tools": schema.tools(row.get("tools"), place)}


def _statement(row: dict, place: str, statements: Statements) -> str:
    dataset, split = (schema.get(row, name, str, place, "") for name in ("dataset", "split"))
    index = schema.get(row, "index", (int, str), place, "")
    if isinstance(index, str) and index and not index.isdecimal():
        raise schema.wrong(place, "index", f"expected a whole number, found {index[:40]!r}")
    return statements.of(dataset, split, int(index)) if dataset and split and index != "" else ""


class Blend(Sequence):
    """The finished blend of a folder as a sequence of {type, messages, tools, place}, repeated rows repeated.

    StudyError for a folder that is not finished. Neighbours come from one group of some rows, which stays in memory;
    scattered rows are best asked for together (`take`).
    """

    def __init__(self, folder: Path):
        path = folder / "manifest.json"
        if not path.is_file():
            raise StudyError(f"{folder} holds no finished blend: `python -m m2rl_core data sft --out {folder}` goes on")
        self.folder = folder
        self.lines = [line for line in json.loads(path.read_text()) for _ in range(line["times"])]
        self.ends = list(accumulate(line["written"] for line in self.lines))
        self._held: tuple[str, int, list[dict]] = ("", -1, [])

    def __len__(self) -> int:
        return self.ends[-1] if self.ends else 0

    def __getitem__(self, index: int) -> dict:
        data, group, within = self._place(index)
        if self._held[:2] != (data, group):
            from pyarrow import parquet
            with parquet.ParquetFile(self.folder / data) as file:
                self._held = data, group, file.read_row_group(group).to_pylist()
        return _parsed(self._held[2][within])

    def take(self, indices: Sequence[int]) -> list[dict]:
        """The rows at `indices`, in that order; every file is opened once, every group of rows in it is read once."""
        from pyarrow import parquet
        places = [self._place(index) for index in indices]
        found: list[dict] = [{}] * len(places)
        for data, there in groupby(sorted(range(len(places)), key=places.__getitem__), lambda n: places[n][0]):
            with parquet.ParquetFile(self.folder / data) as file:
                for group, same in groupby(there, lambda n: places[n][1]):
                    same = list(same)
                    rows = file.read_row_group(group).take([places[n][2] for n in same]).to_pylist()
                    for n, row in zip(same, rows, strict=True):
                        found[n] = _parsed(row)
        return found

    def _place(self, index: int) -> tuple[str, int, int]:
        """(file, group of rows in it, row of the group) of a row; IndexError beyond the end."""
        if not 0 <= index < len(self):
            raise IndexError(index)
        at = bisect_right(self.ends, index)
        line = self.lines[at]
        return f"{line['folder']}/{line['data']}", *divmod(index - self.ends[at] + line["written"], line["group"])


def _parsed(row: dict) -> dict:
    return {**row, "messages": json.loads(row["messages"]), "tools": json.loads(row["tools"])}


def prompts(folder: Path) -> Iterator[tuple[str, str]]:
    """(place, what the user said) of every stored row, once each, for `decontamination`."""
    for line in json.loads((folder / "manifest.json").read_text()):
        piece = Piece(**{name: line[name] for name in Piece.__dataclass_fields__})
        for row in pieces.rows_of(folder / line["folder"], piece):
            yield row["place"], user_text(json.loads(row["messages"]))


def user_text(messages: Iterable[dict]) -> str:
    return "\n".join(message["content"] for message in messages if message["role"] == "user")


def blend_frame(told: dict) -> pd.DataFrame:
    """A report as the frame that `views.preliminary.blend_table` sets beside Table 1."""
    return pd.DataFrame([{"type": name, "domain": DOMAINS[name], "pool": line["usable"],
                          "sampling": line["sampling"], "rows": line["samples"]} for name, line in told["types"].items()])


def drops_frame(told: dict) -> pd.DataFrame:
    """type, reason, rows: what was dropped and why, and what was usable but not drawn."""
    lines = [(name, reason, rows) for name, line in told["types"].items() for reason, rows in line["dropped"].items()]
    lines += [(name, "usable, not drawn", line["usable"] - line["rows"]) for name, line in told["types"].items()
              if line["usable"] > line["rows"]]
    return pd.DataFrame(lines, columns=["type", "reason", "rows"])
