"""The RL blend: the rows of `rl_rows` for the five domains, as a JSON-lines file of `domains.Row` for each.

The blend is read twice: for the numbers of the problems that its placeholders name, and for the rows. Its drops, and
what else should be known before training on it, are in report.json.
"""
from __future__ import annotations

import json
from collections import Counter
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Literal

from m2rl_core.domains import DOMAINS, Row, workbench, workbench_wheel, worker
from m2rl_core.errors import StudyError
from m2rl_core.provenance import sha256
from m2rl_core.real import commits, hub, pieces, questions, rl_rows, schema
from m2rl_core.real.hub import File
from m2rl_core.real.rl_rows import CHOICE_OPENING, Problems, to_row
from m2rl_core.store import hold, write_atomic

REPO = "nvidia/Nemotron-3-Nano-RL-Training-Blend"
PAPER = {"math": 22_056, "coding": 19_169, "science": 19_670, "if": 16_575, "agent": 10_229}  # section 3.2


@dataclass(frozen=True)
class Settings:
    """`template`: prompts as the data has them, or worded again as the released code does. `first`: lines (0: all).

    `skip_wrong`: rows of the wrong schema are dropped and counted.
    """

    template: Literal["data", "released"] = "data"
    first: int = 0
    skip_wrong: bool = False
    lines: int = pieces.LINES


def build(out: Path, settings: Settings = Settings(), report: Callable[[str], None] = lambda text: None) -> dict:
    """Writes <domain>.jsonl and report.json into `out` and returns the report; goes on where a killed run stopped.

    Raises HubError for what cannot be opened, SchemaError for a row of another schema.
    """
    if settings.template not in ("data", "released"):
        raise StudyError(f"template {settings.template!r}: one of data, released")
    plan = pieces.begin(out, {"kind": "rl", **asdict(settings)})
    if (out / "report.json").is_file():
        return json.loads((out / "report.json").read_text())
    files, *_ = [commits.files(repo, out) for repo in (REPO, *questions.MATH.values())]
    needed = _needed(files, settings)
    report(f"{sum(map(len, needed.values()))} math problems to fetch")
    known: Problems = {}
    for label, numbers in needed.items():
        origin = commits.source(questions.MATH[label], out) if numbers else None
        known |= {(label, number): problem for number, problem in (
            questions.problems(origin, numbers) if origin else {}).items()}

    def convert(file: File, number: int, row: dict) -> dict | str:
        made = to_row(row, f"{file.place}, line {number}", number, known, settings.template)
        return made if isinstance(made, str) else {"domain": made.domain, "row": made.to_json()}

    with hold(out / ".lock", "this blend", report):
        done = pieces.work(files, out / "pieces", convert, first=settings.first, lines=settings.lines,
                           skip_wrong=settings.skip_wrong,
                           report=lambda piece: report(f"{piece.name}: {piece.rows} of {piece.read} rows"))
    told = _join(out, done) | {"plan": plan, "commits": commits.read(out), "read": sum(piece.read for piece in done),
                               "dropped": pieces.dropped(done)}
    write_atomic(out / "report.json", json.dumps(told, indent=1))
    return told


def _needed(files: list[File], settings: Settings) -> dict[str, set[int]]:
    """Label -> numbers of the rows of DAPO and Skywork that placeholders name."""
    wanted: dict[str, set[int]] = {label: set() for label in questions.MATH}
    for file in files:
        for number, row in hub.read(file):
            if settings.first and number > settings.first:
                break
            if row.get("dataset") in wanted and row.get("_hf_placeholder") is not None:
                try:
                    wanted[row["dataset"]].add(rl_rows.placeholder(row, f"{file.place}, line {number}")[0])
                except schema.SchemaError:
                    if not settings.skip_wrong:
                        raise
    return wanted


def _join(out: Path, done: list[pieces.Piece]) -> dict:
    """One JSON-lines file a domain, by rename, and what is in them."""
    names = {domain: out / f"{domain}.jsonl" for domain in DOMAINS}
    counts: Counter = Counter()
    ids: Counter = Counter()
    told = Counter()
    streams = {domain: open(path.with_name(path.name + ".new"), "w", encoding="utf-8") for domain, path in names.items()}
    try:
        for piece in done:
            for line in pieces.rows_of(out / "pieces", piece):
                streams[line["domain"]].write(line["row"] + "\n")
                row = Row.from_json(line["row"])
                counts[row.domain] += 1
                ids.update(row.truth.get("instruction_id_list", ()))
                told["math prompts without \\boxed"] += row.domain == "math" and "\\boxed" not in row.messages[-1]["content"]
                told["science prompts of another opening"] += (
                    row.domain == "science" and not row.messages[0]["content"].startswith(CHOICE_OPENING[:-1]))
    finally:
        for stream in streams.values():
            stream.close()
    for path in names.values():
        path.with_name(path.name + ".new").replace(path)
    told |= _idle(rows(out, "agent"))
    return {"domains": {domain: {"rows": counts[domain], "paper": PAPER[domain],
                                 "sha256": sha256(path)} for domain, path in names.items()},
            "instruction_ids": dict(sorted(ids.items())), "remarks": dict(told)}


def _idle(agents: list[Row]) -> dict[str, int]:
    """How many agent rows reward an answer without any call, as their verifier finds; none where it is not installed."""
    if not workbench_wheel.installed():
        return {}
    found = worker.verify(workbench.__name__, agents, [[""]] * len(agents))
    return {"agent rows whose truth changes nothing": sum(verdict.score == 1 for verdict in found)}


def rows(folder: Path, domain: str) -> list[Row]:
    """The rows of one domain that `build` wrote; StudyError where there are none."""
    path = folder / f"{domain}.jsonl"
    if not path.is_file():
        raise StudyError(f"{path} does not exist: `python -m m2rl_core data rl --out {folder}` makes it")
    with path.open(encoding="utf-8") as stream:
        return [Row.from_json(line) for line in stream]


def prompts(folder: Path) -> Iterator[tuple[str, str]]:
    """(id, what the user said) of every row of `folder`, for `decontamination`."""
    for domain in DOMAINS:
        with (folder / f"{domain}.jsonl").open(encoding="utf-8") as stream:
            for row in map(Row.from_json, stream):
                yield row.id, "\n".join(m["content"] for m in row.messages if m["role"] == "user")
