"""One route from a row to its reward: the five domains behind one schema.

A domain is a module with six functions (see `DOMAINS`): three that make rows, one that writes a right
answer, one that writes a wrong one, and `verify`, which serves miniature and real rows; it may have `load`, which
imports what is slow, and `environment`, which replies to a rollout (see `environments`). The format gate of appendix A
stands here, once: the text after the last `</think>` counts.
"""
from __future__ import annotations

import hashlib
import importlib
import json
import numbers
import random
from collections.abc import Iterable, Sequence
from dataclasses import asdict, dataclass, field, replace

from m2rl_core.errors import StudyError, one_line

DOMAINS = ("math", "coding", "science", "if", "agent")
OWN: dict[str, str] = {}  # a domain of one's own, which is a benchmark too -> its file; see `own`
MODULES = {"math": "math", "coding": "coding", "science": "science", "if": "instruction", "agent": "agent"}
SANDBOXED = ("coding",)  # its answers are run, a batch side by side, where they can be killed already
BENCHMARKS = {
    "aime24": "math", "aime25": "math", "lcb_v5": "coding", "lcb_v6": "coding", "hle": "science",
    "gpqa_diamond": "science", "ifeval": "if", "ifbench": "if", "bfcl_v3": "agent",
}
LABELS: dict[str, str] = {}  # benchmark -> what tables say behind its name, where it is no miniature; see `called`
THINK, THINK_END = "<think>", "</think>"
TEST_SHARE = 0.25  # of all compositions; they never occur in training


@dataclass(frozen=True)
class Row:
    """One prompt with what its verifier needs; the same schema at every scale.

    `fingerprint` names the problem behind the wording: two paraphrases share it, and train and test
    never do. `truth` belongs to the verifier and never reaches the model. `turns` (SFT rows only) holds
    the assistant and tool messages that follow the prompt.
    """

    id: str
    domain: str
    source: str  # benchmark (test rows), Table 1 type (SFT rows) or family (RL rows)
    fingerprint: str
    messages: tuple[dict, ...]
    truth: dict
    tools: tuple[dict, ...] = ()
    turns: tuple[dict, ...] = ()

    def to_json(self) -> str:
        return json.dumps(asdict(self))  # not sorted: chat templates write a tool's keys in their order

    @staticmethod
    def from_json(text: str) -> Row:
        fields = json.loads(text)
        for name in ("messages", "tools", "turns"):
            fields[name] = tuple(fields[name])
        return Row(**fields)


@dataclass(frozen=True)
class Verdict:
    """A score in [0, 1] and the reason in one short phrase ("right", "no box", "wrong answer: 7").

    `failed`: the verifier broke down on this answer, which therefore scores 0.
    """

    score: float
    reason: str = field(default="")
    failed: bool = False


NO_ROOM = "no room in the context: "  # begins the reason of an item that did not fit; counted in 3.2


class UserSays(str):
    """The user's next words, where an environment replies with these alone and not with the answers of tools."""


def own(files: dict[str, str]) -> None:
    """Let this process know domains of one's own: name -> file (`own_file` says what it holds)."""
    OWN.update(files)


def called(benchmark: str) -> str:
    """How a benchmark is called on every table: a miniature says that it is one, a real one how much of it there is."""
    return f"{benchmark} {LABELS.get(benchmark, '(miniature)')}".strip() if benchmark in BENCHMARKS else benchmark


def mean_of(benchmarks: Iterable[str]) -> str:
    """How a mean over these benchmarks is called everywhere: "mean of nine", else of how many, and which are missing.

    Where more of the nine are missing than there, or a benchmark is none of the nine, those that are there are named.
    """
    here = list(dict.fromkeys(benchmarks))
    missing = [name for name in BENCHMARKS if name not in here]
    if set(here) == set(BENCHMARKS):
        return "mean of nine"
    told = f"without {', '.join(missing)}" if set(here) <= set(BENCHMARKS) and len(missing) < len(here) else ", ".join(here)
    return f"mean of {len(here)} ({told})"


def module(domain: str):
    """The module that makes and verifies the rows of `domain`; ValueError for a name that is none."""
    if domain in OWN:
        from m2rl_core.domains import own_file
        return own_file.Domain(domain, OWN[domain])
    if domain not in MODULES:
        raise ValueError(f"unknown domain {domain!r}: one of {', '.join(DOMAINS)}")
    return importlib.import_module(f"m2rl_core.domains.{MODULES[domain]}")


def rule_of(row: Row, rules: Sequence[str]) -> str:
    """The rule that a row asks its verifier for, `truth["rule"]`; the first of `rules` where it asks for none.

    A loader sets it in every row of a source, from the profile. ValueError for a rule that the verifier does not have.
    """
    rule = row.truth.get("rule", rules[0])
    if rule not in rules:
        raise ValueError(f"row {row.id!r}: rule {rule!r} is none of {', '.join(rules)}")
    return rule


def is_held_out(fingerprint: str) -> bool:
    """Whether a problem belongs to the test sets, decided by its SHA-256 alone."""
    return int(hashlib.sha256(fingerprint.encode()).hexdigest()[:8], 16) / 16**8 < TEST_SHARE


def generator(*names: object) -> random.Random:
    """A generator of its own for each tuple of names: no draw depends on what ran before it."""
    return random.Random(hashlib.sha256(repr(names).encode()).digest())


def training_rows(domain: str, kind: str, n: int, seed: int) -> list[Row]:
    """`n` rows to train on: `kind` is "sft" (with turns) or "rl"; no held-out problem among them."""
    if domain in OWN:
        return module(domain).rows(kind, n, seed)
    make = getattr(module(domain), kind)
    return _draw(lambda rng: make(rng), n, generator(seed, domain, kind), f"{domain}/{kind}", held_out=False, unique=False)


def benchmark_rows(benchmark: str, n: int, seed: int) -> list[Row]:
    """`n` held-out items of a miniature benchmark, no problem twice."""
    if benchmark in OWN:
        return module(benchmark).rows("test", n, seed)
    make = module(BENCHMARKS[benchmark]).test
    return _draw(lambda rng: make(benchmark, rng), n, generator(seed, benchmark), benchmark, held_out=True, unique=True)


def _draw(make, n, rng, name, held_out, unique):
    rows, seen = [], set()
    for _ in range(400 * n + 1000):
        if len(rows) == n:
            return rows
        row = make(rng)
        if is_held_out(row.fingerprint) != held_out or (unique and row.fingerprint in seen):
            continue
        seen.add(row.fingerprint)
        rows.append(Row(**{**row.__dict__, "id": f"{name}/{len(rows):05d}"}))
    raise StudyError(f"{name}: only {len(rows)} of {n} different problems exist; ask for fewer")


def answer_of(turn: str) -> str | None:
    """What stands after the last `</think>` of one assistant turn; None where the tag is missing."""
    head, tag, answer = turn.rpartition(THINK_END)
    return answer.strip() if tag else None


def graded(row: Row, turn: str) -> str | None:
    """What is verified of one assistant turn of `row`: `answer_of`, or None where it fails the format gate.

    Items of the real benchmarks have no such gate (`truth["gate"]` is "open"): there a turn without any thinking, such as
    a base model's, counts as a whole, as the official code counts it. One that ends amid its thinking has no answer.
    """
    answer = answer_of(turn)
    return turn.strip() if answer is None and row.truth.get("gate") == "open" and THINK not in turn else answer


def prepare(rows: Iterable[Row]) -> None:
    """Start what verifies these rows without waiting for it, so that it gets ready while answers are sampled."""
    from m2rl_core.domains import worker
    # a judge's question belongs to no domain
    asked = [_route(row) for row in rows if row.domain in MODULES or row.domain in OWN]
    wanted = sorted({home.__name__ for home, here in asked if not here})
    if wanted:
        worker.start(wanted)


def home_of(row: Row):
    """The module that verifies a row, and whose environment replies to it: a domain may have several."""
    found = module(row.domain)
    return getattr(found, "home", lambda _: found)(row)


def _route(row: Row) -> tuple:
    """The module that verifies a row, and whether it does so in this process: where what can hang is elsewhere already."""
    found = home_of(row)
    return found, row.domain in SANDBOXED or getattr(found, "here", lambda: False)()


def rewards(rows: Sequence[Row], transcripts: Sequence[Sequence[str]]) -> list[Verdict]:
    """The domain-routed reward: one verdict for each (row, assistant turns) pair, in order.

    A transcript is the list of the assistant's turns as generated, without end-of-turn markers. Turns
    that miss `</think>` fail the format gate and score 0; all others go to the row's own verifier,
    one batch a domain. An answer at which a verifier raises, hangs, dies or gives no number in [0, 1] scores 0 and is
    marked; StudyError and ImportError say that it cannot work here at all, and go on up.
    """
    from m2rl_core.domains import worker
    verdicts: list[Verdict | None] = [None] * len(rows)
    batches: dict[tuple, list[int]] = {}
    answers: list[list[str]] = []
    for i, (row, turns) in enumerate(zip(rows, transcripts, strict=True)):
        parts = [graded(row, turn) for turn in turns]
        answers.append(parts)
        if not parts or any(part is None for part in parts):
            verdicts[i] = Verdict(0.0, "no </think>")
        else:
            batches.setdefault(_route(row), []).append(i)
    for (home, here), indices in batches.items():
        batch = [rows[i] for i in indices], [answers[i] for i in indices]
        found = verified(home.verify, *batch) if here else worker.verify(home.__name__, *batch)
        for i, verdict in zip(indices, found, strict=True):
            verdicts[i] = verdict
    return verdicts


def verified(verify, rows: list[Row], answers: list[list[str]]) -> list[Verdict]:
    """What `verify` says, made sound: answers at which it raises, or gives no number in [0, 1], score 0 and are marked.

    Raises StudyError for any other number of verdicts than of answers, and what `rewards` passes on.
    """
    try:
        found = list(verify(rows, answers))
    except (StudyError, ImportError):
        raise
    except Exception as error:  # whatever a verifier of one's own raises, it must not cost the step
        if len(rows) == 1:
            return [Verdict(0.0, one_line(f"verifier failed: {type(error).__name__}: {error}"), failed=True)]
        return [verified(verify, [row], [answer])[0] for row, answer in zip(rows, answers, strict=True)]
    if len(found) != len(rows):
        raise StudyError(f"{verify.__module__}.{verify.__name__} gave {len(found)} verdicts for {len(rows)} answers: "
                         "it must give one for each, in their order")
    return [_sound(verdict) for verdict in found]


def _sound(verdict) -> Verdict:
    if not isinstance(verdict, Verdict):
        return Verdict(0.0, one_line(f"verifier gave {verdict!r}, which is no Verdict"), failed=True)
    score = verdict.score
    if not isinstance(score, numbers.Real) or isinstance(score, bool) or not 0 <= score <= 1:
        return Verdict(0.0, one_line(f"verifier gave {score!r}"), failed=True)
    return verdict if type(score) is float else replace(verdict, score=float(score))
