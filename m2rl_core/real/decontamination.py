"""Looks for the nine benchmarks' prompts in training prompts, by shared runs of 13 words, and for repeated prompts.

Words are compared in lower case and without punctuation. A benchmark prompt of 8 to 12 words is looked for as a whole;
shorter ones are counted, not checked. Only the benchmarks' runs are kept in memory, and 8 bytes a training prompt.
A shared run is a reason to look, not a proof: stock phrases ("your answer must contain a title wrapped in ...") are
shared too, so each hit says how much of the item one training prompt holds.
"""
from __future__ import annotations

import hashlib
import heapq
import re
import unicodedata
from array import array
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass, field

import numpy as np

from m2rl_core.domains import BENCHMARKS
from m2rl_core.real import hub, schema

RUN, SHORTEST = 13, 8  # words
EXAMPLES = 5  # a benchmark, those first of which a training prompt holds most
HALF = 0.5  # of an item's runs in one training prompt: most likely the item itself
V5_WINDOW = ("2024-08-01", "2025-02-01")  # of contest dates, as NVIDIA's model cards print it
Prompts = Iterable[tuple[str, str]]  # (where it stands, text)


def words(text: str) -> list[str]:
    """The words that are compared."""
    return re.findall(r"\w+", unicodedata.normalize("NFKC", text).casefold())


@dataclass
class Index:
    """Runs of words of all benchmarks: length -> run -> items; and for each item how many runs it has."""

    runs: dict[int, dict[str, set[tuple[str, str]]]] = field(default_factory=dict)
    sizes: Counter = field(default_factory=Counter)
    items: Counter = field(default_factory=Counter)
    short: Counter = field(default_factory=Counter)

    def add(self, benchmark: str, item: str, text: str) -> None:
        """One benchmark prompt."""
        said = words(text)
        self.items[benchmark] += 1
        if len(said) < SHORTEST:
            self.short[benchmark] += 1
            return
        size = min(RUN, len(said))
        for run in set(_runs(said, size)):
            self.runs.setdefault(size, {}).setdefault(run, set()).add((benchmark, item))
            self.sizes[benchmark, item] += 1

    def find(self, text: str) -> dict[tuple[str, str], tuple[float, str]]:
        """(benchmark, item) -> (share of the item's runs that the text holds, the first of them)."""
        said, found = words(text), {}
        for size, known in self.runs.items():
            for run in dict.fromkeys(_runs(said, size)):
                for item in known.get(run, ()):
                    count, first = found.get(item, (0, run))
                    found[item] = count + 1, first
        return {item: (count / self.sizes[item], first) for item, (count, first) in found.items()}


def _runs(said: list[str], size: int) -> Iterator[str]:
    return (" ".join(said[i:i + size]) for i in range(len(said) - size + 1))


def check(train: Mapping[str, Prompts], benchmarks: Mapping[str, Callable[[], Prompts]]) -> dict:
    """The report: for each benchmark its hits in the training prompts, and the repeated prompts of each training set.

    benchmarks[name]() gives (item, prompt) pairs; where it raises HubError, its line says so and the others go on.
    """
    index, skipped = Index(), {}
    for name, load in benchmarks.items():
        try:
            prompts = list(load())
        except hub.HubError as error:
            skipped[name] = str(error)
            continue
        for item, text in prompts:
            index.add(name, item, text)
    best: dict[tuple[str, str], tuple[float, str, str]] = {}
    rows: Counter = Counter()
    seen: dict[str, array] = {}
    for source, prompts in train.items():
        seen[source] = array("Q")
        for place, text in prompts:
            seen[source].append(_hash(text))
            found = index.find(text)
            rows.update({benchmark for benchmark, _ in found})
            for item, (share, run) in found.items():
                if share > best.get(item, (0.0,))[0]:
                    best[item] = share, place, run
    lines = {name: {"not checked": skipped[name]} if name in skipped else _line(name, index, best, rows)
             for name in benchmarks}
    return {"words in a run": RUN, "benchmarks": lines, "repeated": _repeated(seen)}


def _line(name: str, index: Index, best: dict, rows: Counter) -> dict:
    hits = {item: found for (benchmark, item), found in best.items() if benchmark == name}
    top = heapq.nsmallest(EXAMPLES, hits.items(), key=lambda hit: (-hit[1][0], hit[0]))
    return {"items": index.items[name], "too short": index.short[name], "items hit": len(hits),
            "items hit by half": sum(share >= HALF for share, _, _ in hits.values()), "training prompts": rows[name],
            "examples": [{"item": item, "share": round(share, 3), "place": place, "run": run}
                         for item, (share, place, run) in top]}


def _hash(text: str) -> int:
    return int.from_bytes(hashlib.blake2b(" ".join(words(text)).encode(errors="replace"), digest_size=8).digest())


def _repeated(seen: Mapping[str, array]) -> dict:
    """For each training set, and for all together: prompts, different ones, how often the most frequent stands there."""
    parts = {name: np.frombuffer(values, dtype=np.uint64) if values else np.zeros(0, np.uint64)
             for name, values in seen.items()}
    if len(parts) > 1:
        parts["all"] = np.concatenate(list(parts.values()))
    found = {}
    for name, values in parts.items():
        counts = np.unique(values, return_counts=True)[1]
        found[name] = {"prompts": len(values), "different": len(counts), "most often": int(counts.max(initial=0))}
    return found


# ---- the nine benchmarks' prompts

def _text(name: str) -> Callable[[dict, str], str]:
    return lambda row, place: schema.get(row, name, str, place)


def _lcb(row: dict, place: str) -> str:
    return schema.get(row, "question_content", str, place)


def _lcb_v5(row: dict, place: str) -> str:
    day = schema.get(row, "contest_date", str, place)[:10]
    return _lcb(row, place) if V5_WINDOW[0] <= day <= V5_WINDOW[1] else ""


def _hle(row: dict, place: str) -> str:
    """Only items without a picture are in the study."""
    return "" if row.get("image") else schema.get(row, "question", str, place)


def _bfcl(row: dict, place: str) -> str:
    turns = schema.get(row, "question", list, place)
    return "\n".join(message["content"] for turn in turns for message in turn if message.get("role") == "user")


FROM: dict[str, tuple[str, str, Callable[[dict, str], str]]] = {  # benchmark -> data set, split, prompt of a row
    "aime24": ("math-ai/aime24", "test", _text("problem")),
    "aime25": ("math-ai/aime25", "test", _text("problem")),
    "lcb_v5": ("livecodebench/code_generation_lite", "v5", _lcb_v5),
    "lcb_v6": ("livecodebench/code_generation_lite", "v6", _lcb),
    "hle": ("cais/hle", "test", _hle),
    "gpqa_diamond": ("Idavidrein/gpqa", "diamond", _text("Question")),
    "ifeval": ("google/IFEval", "train", _text("prompt")),
    "ifbench": ("allenai/IFBench_test", "train", _text("prompt")),
    "bfcl_v3": ("gorilla-llm/Berkeley-Function-Calling-Leaderboard", "v3", _bfcl),
}


def benchmark_prompts(name: str) -> Iterator[tuple[str, str]]:
    """(place, prompt) of a benchmark's items; HubError where its data set cannot be opened."""
    repo, split, prompt = FROM[name]
    for file in hub.files(hub.sources()[repo], [split]):
        for number, row in hub.read(file):
            if text := prompt(row, f"{file.place}, line {number}"):
                yield f"{file.path}:{number}", text


def nine() -> dict[str, Callable[[], Prompts]]:
    """All benchmarks of the study, for `check`."""
    return {name: (lambda name=name: benchmark_prompts(name)) for name in BENCHMARKS}
