"""The nine real benchmarks: where their items come from, how many there must be, how often each is sampled, by what verified.

Items are read once for a store and kept beside its evaluations (`<store>/benchmarks/`), at one commit, so that every model
is asked the same. Another number of items than the revision should have is refused: it would be another benchmark.
GPQA and HLE ask that their items be published nowhere (PRIVATE): they stay in the store, which is no part of a report.
"""
from __future__ import annotations

import importlib
import itertools
from collections.abc import Collection, Iterator, Sequence
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path

from m2rl_core.domains import BENCHMARKS, THINK_END, Row, instruction, math, rewards, science
from m2rl_core.errors import StudyError
from m2rl_core.real import benchmark_rows, commits, hub, schema
from m2rl_core.real.benchmark_rows import Maker
from m2rl_core.real.decontamination import FROM
from m2rl_core.real.hub import File

PRIVATE = ("hle", "gpqa_diamond")
IFBENCH_NOW = "2e8a48de45ff3bf41242f927254ca81b59ca3ae2"


@dataclass(frozen=True)
class Benchmark:
    """One benchmark: the number of its items by revision ("": any other), K, who verifies it, and what that needs.

    `k` is the number of samples an item with which the digits of the paper's tables agree; it prints none.
    """

    items: dict[str, int]
    k: int
    verifier: str
    make: Maker | None
    needs: str = ""
    rules: tuple[str, ...] = ()

    def full(self, revision: str) -> tuple[int, ...]:
        """The numbers of items that it may have at a commit: of one that is not known, and of files by hand, any of them."""
        known = self.items.get(revision) if revision else None
        return (known,) if known else tuple(self.items.values())


SANDBOX = "bubblewrap, or a SandboxFusion address"
NINE = {
    "aime24": Benchmark({"": 30}, 64, "math-verify, last box", benchmark_rows.aime24, rules=math.RULES),
    "aime25": Benchmark({"": 30}, 64, "math-verify, last box", benchmark_rows.aime25, rules=math.RULES),
    "lcb_v5": Benchmark({"": 279}, 8, "all tests, LiveCodeBench's comparison", partial(benchmark_rows.lcb, "lcb_v5"), SANDBOX),
    "lcb_v6": Benchmark({"": 175}, 2, "all tests, LiveCodeBench's comparison", partial(benchmark_rows.lcb, "lcb_v6"), SANDBOX),
    "hle": Benchmark({"": 2158}, 1, "a judge; without one a rule, as a lower bound", benchmark_rows.hle,
                     "a judge's address (`M2RL_JUDGE`)"),
    "gpqa_diamond": Benchmark({"": 198}, 4, "the last letter", benchmark_rows.gpqa, rules=science.RULES),
    "ifeval": Benchmark({"": 541}, 1, "IFEval, strict, all instructions", partial(benchmark_rows.instructions, "ifeval"),
                        rules=instruction.RULES),
    "ifbench": Benchmark({IFBENCH_NOW: 300, "": 294}, 1, "IFBench, strict, all instructions",
                         partial(benchmark_rows.instructions, "ifbench"), "NLTK data for two ids", instruction.RULES),
    "bfcl_v3": Benchmark({"": 4441}, 1, "BFCL's AST and multi-turn checkers, its averaging", None,
                         "the wheel bfcl-eval 2025.8.6.2; bubblewrap"),
}


def load_all(spec, limit: int | None = None, folder: Path | None = None,
             names: Sequence[str] = tuple(BENCHMARKS)) -> tuple[dict[str, list[Row]], dict[str, str]]:
    """The items of the real benchmarks that an `EvalSpec` names, and for each that cannot be had here one line why.

    `limit` takes the first few of each. Raises SchemaError and StudyError for data that are there and wrong.
    """
    items, missing = {}, {}
    for name in (name for name in BENCHMARKS if name in spec.items and name in names):
        try:
            rows = load(name, spec.items[name], folder, spec.revisions.get(name, ""), spec.rules.get(name, ""))
            items[name] = rows[:limit]
            probe(items[name])
        except schema.SchemaError:
            raise
        except (hub.HubError, ImportError, Unready) as error:
            items.pop(name, None)
            missing[name] = f"{name} is not run: {' '.join(str(error).split())}"
    return items, missing


def load(name: str, wanted: int, folder: Path | None = None, revision: str = "", rule: str = "") -> list[Row]:
    """`wanted` items of a benchmark: all that its revision has, or fewer, for a trial.

    With a `folder` they are kept there and read from there. Raises HubError where they cannot be had, SchemaError for a
    row, and StudyError for another number of items, an unknown rule, or files that changed since `folder` was begun.
    """
    about = NINE[name]
    if rule and rule not in about.rules:
        raise StudyError(f"eval.rules.{name}: {rule!r} is none of {', '.join(about.rules) or 'its rules: it has but one'}")
    if wanted > max(about.items.values()):
        raise StudyError(f"eval.items.{name}: {wanted}, but it has {' or '.join(map(str, about.full(revision)))}")
    whole = wanted in about.items.values()
    own = None if folder is None else folder / (f"{name}-{revision[:12]}" if revision else name)
    kept = own and own / "items.jsonl"
    if kept and kept.is_file():
        with kept.open(encoding="utf-8") as lines:
            rows = [Row.from_json(line) for line in lines]
        commit = commits.read(own).get(FROM[name][0], "")
    else:
        found, commit = _files(name, own, revision)
        made = _rows(name, found)
        rows = list(made if whole or about.make is None else itertools.islice(made, wanted))
        if kept and found and whole and not hub.folder_of(found[0].source):
            _keep(kept, rows)
    if whole and len(rows) not in about.full(commit):
        raise _count(name, len(rows), about.full(commit), commit)
    if len(rows) < wanted or whole and len(rows) > wanted:
        raise _count(name, len(rows), (wanted,), commit, f" as the profile asks for (eval.items.{name})")
    rows = rows[:wanted]
    return [replace(row, truth={**row.truth, "rule": rule}) for row in rows] if rule else rows


def wording(name: str) -> str:
    """What a benchmark's items are asked with, in place of an item: the part that is alike in all of them."""
    here = {name: f"{{{name}}}" for name in ("question", *"ABCD")} | {
        "form": benchmark_rows.LCB_STDIN, "code": "# YOUR CODE HERE"}
    known = {"math": benchmark_rows.AIME + "{problem}", "if": "{prompt}",
             "coding": f"{benchmark_rows.LCB_SYSTEM}\n\n{benchmark_rows.LCB.format(**here)}".strip()}
    if name == "gpqa_diamond":
        return benchmark_rows.GPQA.format(**here)
    if name == "hle":
        return f"{benchmark_rows.HLE_SYSTEM['exactMatch']}\n\n{{question}}"
    return known.get(BENCHMARKS[name], "{question}, and the tools as the chat template lists them")


def labels(spec) -> dict[str, str]:
    """What tables say behind each real benchmark's name: nothing, or that it is a part of it, or another version of it."""
    return {name: _label(spec.items[name], about.full(hub.sources()[FROM[name][0]].revision), about.items.values())
            for name, about in NINE.items() if name in spec.items}


def _label(wanted: int, listed: Collection[int], known: Collection[int]) -> str:
    return "" if wanted in listed else f"({wanted} items)" if wanted in known else f"(first {wanted})"


class Unready(StudyError):
    """The verifier of a benchmark cannot work on this machine; says what to do."""


def probe(rows: Sequence[Row]) -> None:
    """Verify a poor answer to one item of each kind: what is missing for that is better known before an hour of sampling."""
    kinds = {name: row for row in reversed(rows)
             for name in row.truth.get("instruction_id_list", (row.truth.get("category", row.truth.get("answer_type")),))}
    chosen = list({row.id: row for row in kinds.values()}.values())
    try:
        rewards(chosen, [[f"{THINK_END}\nIt is so."]] * len(chosen))
    except (StudyError, ImportError) as error:
        raise Unready(str(error)) from error


def _files(name: str, own: Path | None, revision: str) -> tuple[list[File], str]:
    """The files that hold a benchmark's items, and their commit; none of BFCL's, which its wheel has, too."""
    repo, split, _ = FROM[name]
    source = hub.sources()[repo]
    if NINE[name].make is None and not revision and hub.folder_of(source) is None:
        return [], "the wheel"
    if own is not None:
        own.mkdir(parents=True, exist_ok=True)
        try:
            found = commits.files(repo, own, [split], revision)
        except hub.HubError:
            raise
        except StudyError as error:
            raise StudyError(f"{error}, or remove it and make all evaluations again (`rebuild`)") from error
        return found, commits.read(own)[repo]
    found = hub.files(replace(source, revision=revision or source.revision), [split])
    return found, "by hand" if hub.folder_of(source) else found[0].source.revision


def _rows(name: str, found: list[File]) -> Iterator[Row]:
    """All items in the order of the files, no id twice."""
    about, seen = NINE[name], {}
    if about.make is None:
        bfcl_rows = importlib.import_module("m2rl_core.real.bfcl_rows")  # its rows are spread: the first n are of all kinds
        try:
            yield from (replace(row, truth={**row.truth, "gate": "open"}) for row in bfcl_rows.rows(found))
        except schema.SchemaError:
            raise
        except StudyError as error:
            if found:
                raise
            raise Unready(str(error)) from error  # its wheel is not there
        return
    for file in found:
        for number, row in hub.read(file):
            place = f"{file.place}, line {number}"
            made = about.make(row, place)
            if made is None:
                continue
            if made.id in seen:
                raise schema.wrong(place, "id", f"{made.id!r} stands in {seen[made.id]} already")
            seen[made.id] = place
            yield made


def _keep(path: Path, rows: Sequence[Row]) -> None:
    new = path.with_suffix(".new")
    with new.open("w", encoding="utf-8") as out:
        out.writelines(row.to_json() + "\n" for row in rows)
    new.rename(path)


def _count(name: str, got: int, known: Sequence[int], commit: str, where: str = "") -> StudyError:
    repo, split, _ = FROM[name]
    return StudyError(f"{name}: {repo} ({hub.sources()[repo].splits[split]}, {commit[:40]}) holds {got} items, not "
                      f"{' or '.join(map(str, known))}{where}: another version of the benchmark, or a part of it; "
                      f"eval.revisions.{name} names a commit, and eval.items.{name} below the full number makes a trial")
