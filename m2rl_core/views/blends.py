"""Notebook 3.1, real rows: what of the data sets was dropped and why, and which benchmark items stand in training prompts.

Both are read from what the stages and `data check` left in the store; a miniature's rows are made, so none is dropped.
"""
from __future__ import annotations

import json

import pandas as pd
from IPython.display import HTML, Markdown

from m2rl_core.views.opening import show

MADE = "The rows of this profile are made, not read: none is dropped, and no problem of a benchmark is among them."


def dropped(run) -> list[HTML | Markdown]:
    """The rows that were read, dropped, left over and taken, of each type of Table 1 and of the RL blend, with reasons."""
    if run.profile.rows != "real":
        return [Markdown(MADE)]
    from m2rl_core.real import sft_blend
    told = _reports(run)
    parts: list[HTML | Markdown] = []
    if "sft" in told:
        reasons = sft_blend.drops_frame(told["sft"])
        lines = [{"type": name, "read": line["read"], "dropped": sum(line["dropped"].values()), "usable": line["usable"],
                  "drawn": line["rows"], "times": line["times"], "samples": line["samples"], "Table 1": line["paper"],
                  "why": _why(reasons[reasons["type"] == name])} for name, line in told["sft"]["types"].items()]
        parts += [Markdown("**SFT blend**, rows"), show(pd.DataFrame(lines), dict.fromkeys(
            ("read", "dropped", "usable", "drawn", "samples", "Table 1"), ","))]
    if "rl" in told:
        lines = [{"domain": name, "prompts": line["rows"], "paper": line["paper"]}
                 for name, line in told["rl"]["domains"].items()]
        reasons = pd.DataFrame(told["rl"]["dropped"].items(), columns=["reason", "rows"])
        parts += [Markdown("**RL blend**, prompts"), show(pd.DataFrame(lines), dict.fromkeys(("prompts", "paper"), ",")),
                  Markdown(f"Of {told['rl']['read']:,} rows read, dropped: {_why(reasons)}. To know before training: "
                           f"{_why(pd.DataFrame(told['rl']['remarks'].items(), columns=['reason', 'rows']))}.")]
    left = [name for name in ("sft", "rl") if name not in told]
    return parts + [Markdown(f"The {name.upper()} blend has not been made here yet: the first stage that needs it does.")
                    for name in left]


def overlap(run) -> list[HTML | Markdown]:
    """Per benchmark: how many of its items share a run of words with a training prompt, and the worst of them."""
    if run.profile.rows != "real":
        return [Markdown(MADE)]
    from m2rl_core.data import overlap_file  # here: it brings torch
    path = overlap_file(run.store.root)
    if not path.is_file():
        return [Markdown(f"*not run*: `python -m m2rl_core data check --profile {run.source}` looks for the benchmarks' items "
                         "in the prompts of both blends.")]
    told = json.loads(path.read_text(encoding="utf-8"))
    lines = []
    for name, line in told["benchmarks"].items():
        worst = (line.get("examples") or [{}])[0]
        lines.append({"benchmark": name, "items": line.get("items"), "share a run": line.get("items hit"),
                      "half of their runs": line.get("items hit by half"), "too short to tell": line.get("too short"),
                      "training prompts": line.get("training prompts"),
                      "the worst": line.get("not checked") and f"not checked: {line['not checked']}"
                      or (f"{worst['item']} in {worst['place']}, {100 * worst['share']:.0f} % of its runs" if worst else "")})
    counts = ("items", "share a run", "half of their runs", "too short to tell", "training prompts")
    frame = pd.DataFrame(lines).astype({name: "Float64" for name in counts})
    frame[list(counts)] = frame[list(counts)].map(lambda value: "–" if pd.isna(value) else f"{value:,.0f}")
    repeated = "; ".join(f"{name}: {line['prompts']:,} prompts, {line['different']:,} different, one of them "
                         f"{line['most often']:,} times" for name, line in told["repeated"].items())
    return [show(frame), Markdown(f"A run is {told['words in a run']} words. Training prompts that repeat: {repeated}.")]


def _reports(run) -> dict[str, dict]:
    from m2rl_core.data import blends_of  # here: it brings torch
    paths = {kind: folder / "report.json" for kind, folder in blends_of(run.profile, run.store.root).items()}
    return {kind: json.loads(path.read_text(encoding="utf-8")) for kind, path in paths.items() if path.is_file()}


def _why(reasons: pd.DataFrame) -> str:
    """Reasons with their numbers, the most frequent first."""
    counted = reasons[reasons["rows"] > 0].sort_values("rows", ascending=False, kind="stable")
    return "; ".join(f"{r.rows:,} {r.reason}" for r in counted.itertuples()) or "none"
