"""The README's verdict table, written from the committed report's claims.json between two markers.

`python -m m2rl_core report --profile tiny --readme README.md` refreshes it; a test holds README and report together.
"""
from __future__ import annotations

import json
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
    lines += [f"| {known[i]['text']} | {known[i]['paper_verdict']} | **{known[i]['run_verdict']}** |" for i in ids if i in known]
    counts: dict[str, int] = {}
    for claim in claims:
        counts[claim["run_verdict"]] = counts.get(claim["run_verdict"], 0) + 1
    tally = ", ".join(f"{n} {verdict}" for verdict, n in sorted(counts.items(), key=lambda kv: -kv[1]))
    return "\n".join([*lines, "", f"All {len(claims)} claims in the small study: {tally}."])


def refresh(readme: Path, claims_file: Path) -> None:
    """Replace what stands between the markers. Raises ValueError where a marker is missing."""
    text = readme.read_text(encoding="utf-8")
    head, begin, rest = text.partition(BEGIN)
    _, end, tail = rest.partition(END)
    if not begin or not end:
        raise ValueError(f"{readme}: the marker {BEGIN if not begin else END} is missing; put it back")
    new = f"{head}{BEGIN}\n{table(json.loads(claims_file.read_text(encoding='utf-8')))}\n{END}{tail}"
    if new != text:
        write_atomic(readme, new)
