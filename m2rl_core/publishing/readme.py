"""The README's tables, each between two markers: verdicts from the committed report's claims.json, and the data.

`python -m m2rl_core report --profile tiny --readme README.md` refreshes the first, `python -m m2rl_core data sources
--readme README.md` the second; tests hold both together with what they come from.
"""
from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path

from m2rl_core.store import write_atomic

BEGIN, END = "<!-- verdicts: from reports/tiny/claims.json -->", "<!-- end of verdicts -->"
# The claims that a visitor came for, by id; the report holds all of them.
HEADLINES = ("mix-as-good-for-less", "few-interferences", "shared-footprints", "neighbours-explain", "merges-inherit",
             "verification-trade-off")


def table(claims: list[dict], ids=HEADLINES) -> str:
    """A Markdown table of the chosen claims and one line that counts the verdicts on all of them."""
    known = {claim["id"]: claim for claim in claims}
    lines = ["| claim of the paper | on its printed numbers | in the small study |", "|---|---|---|"]
    lines += [f"| {known[i]['text']} | {known[i]['paper_verdict']} | **{known[i]['run_verdict']}** |"
              for i in ids if i in known]
    counts: dict[str, int] = {}
    for claim in claims:
        counts[claim["run_verdict"]] = counts.get(claim["run_verdict"], 0) + 1
    tally = ", ".join(f"{n} {verdict}" for verdict, n in sorted(counts.items(), key=lambda kv: -kv[1]))
    return "\n".join([*lines, "", f"All {len(claims)} claims in the small study: {tally}."])


def refresh(readme: Path, claims_file: Path) -> None:
    """Replace the verdict table between its markers. Raises ValueError where a marker is missing."""
    _replace(readme, BEGIN, END, lambda: table(json.loads(claims_file.read_text(encoding="utf-8"))))


def _replace(readme: Path, first: str, last: str, body: Callable[[], str]) -> None:
    text = readme.read_text(encoding="utf-8")
    head, begin, rest = text.partition(first)
    _, end, tail = rest.partition(last)
    if not begin or not end:
        raise ValueError(f"{readme}: the marker {first if not begin else last} is missing; put it back")
    new = f"{head}{first}\n{body()}\n{last}{tail}"
    if new != text:
        write_atomic(readme, new)


# ---- what the paper's own data and benchmarks are

DATA_BEGIN, DATA_END = "<!-- data: from m2rl_core/real -->", "<!-- end of data -->"


def data_table() -> str:
    """Two Markdown tables, of the nine benchmarks and of what is trained on: where from, how much, by whom verified, what
    it needs."""
    from m2rl_core.domains import bfcl_wheel
    from m2rl_core.real import benchmarks, hub
    from m2rl_core.real.decontamination import FROM
    listed = hub.sources()
    lines = ["| benchmark | source | commit | licence | items | K | verifier | needs |", f"{'|---' * 8}|"]
    for name, about in benchmarks.NINE.items():
        repo, split, _ = FROM[name]
        source = listed[repo]
        where, commit = f"{repo}, `{source.splits[split]}`", _commit(source)
        if about.make is None:  # its items come with a wheel
            where, commit = f"the wheel {bfcl_wheel.NAME}; by hand: {where}", bfcl_wheel.VERSION
        lines.append(_line(name, where, commit, source.licence,
                           " or ".join(f"{n:,}" for n in about.full("")), about.k, about.verifier,
                           "; ".join(filter(None, (source.login, about.needs))) or "–"))
    lines += ["", "| data set | for | commit | licence | rows | K | verifier | needs |", f"{'|---' * 8}|"]
    tested = {repo for repo, _, _ in FROM.values()}
    lines += [_line(f"{repo}, `{', '.join(source.splits.values())}`", source.use, _commit(source), source.licence,
                    _drawn(repo), *_learned(repo), _needed(repo, source))
              for repo, source in listed.items() if repo not in tested]
    return "\n".join(lines)


def _line(*cells: object) -> str:
    return f"| {' | '.join(map(str, cells))} |"


def _commit(source) -> str:
    return f"`{source.revision[:12]}`" if source.revision else "of the first run"


def _learned(repo: str) -> tuple[str, str]:
    """How many answers of a prompt are sampled, and who verifies them; of rows whose answers are imitated neither."""
    from m2rl_core.profile import load_profile
    from m2rl_core.real import rl_blend
    if repo != rl_blend.REPO:
        return "–", "–"
    return f"{load_profile('paper').rl.group}", ("math: math-verify; code: all its unit tests; choice: the last letter; "
                                                 "instructions: IFEvalG's ids; agent: NeMo-Gym's workplace")


def _needed(repo: str, source) -> str:
    """What must be there before the rows serve: terms accepted, a sandbox, a wheel."""
    from m2rl_core.domains import workbench_wheel
    from m2rl_core.real import benchmarks, rl_blend
    wheel = f"the wheel {workbench_wheel.PACKAGE} {workbench_wheel.VERSION}"
    ours = (benchmarks.SANDBOX, wheel) if repo == rl_blend.REPO else ()
    return "; ".join(filter(None, (source.login, *ours))) or "–"


def _drawn(repo: str) -> str:
    """How many rows of a data set are trained on."""
    from m2rl_core.real import questions, rl_blend, sft_blend
    if repo == rl_blend.REPO:
        return f"{sum(rl_blend.PAPER.values()):,}"
    if repo in (*questions.CODE.values(), *questions.MATH.values()):
        return "those that placeholders name"
    return f"{sum(kind.samples for kind in sft_blend.table_1() if kind.repo == repo):,} drawn"


def refresh_data(readme: Path) -> None:
    """Replace the tables of data between their markers. Raises ValueError where a marker is missing."""
    _replace(readme, DATA_BEGIN, DATA_END, data_table)
