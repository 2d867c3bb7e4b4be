"""Appendix B: what our own code costs beside well-known tools, from reports/bench/*.json (`make bench`)."""
from __future__ import annotations

import json

import pandas as pd
from IPython.display import Markdown

from m2rl_core.profile import repo_root

SIDES = ("ours", "peer")
MEASURES = {"seconds": "wall time (s)", "anonymous_mb": "memory of its own, peak (MB)"}


def rows(name: str) -> pd.DataFrame:
    """The rows of reports/bench/<name>.json; empty where it was not measured."""
    path = repo_root() / "reports" / "bench" / f"{name}.json"
    return pd.DataFrame(json.loads(path.read_text(encoding="utf-8")) if path.is_file() else [])


def sentence(found: pd.DataFrame, name: str) -> Markdown:
    """Where and how it was measured, and which bars hold; or the command that measures it."""
    if found.empty:
        return Markdown(f"Not measured in this clone: `make bench NB={name}` does it.")
    here, barred = found["machine"].iloc[0], found.dropna(subset="bar")
    missed = [f"{r.name} ({r.peer_name} over {r.bar:.2g} would be {r.peer / r.bar / r.floor:.1f} times the floor; "
              f"we are at {r.floor_multiple:.1f})" for r in barred[barred["ratio"] < barred["bar"]].itertuples(index=False)]
    held = f"{len(barred) - len(missed)} of {len(barred)} comparisons with a bar reach it"
    least, most = found["pairs"].min(), found["pairs"].max()
    pairs = f"{least}" if least == most else f"{least} to {most}"
    return Markdown(f"Measured on {here['cores']} cores and {here['memory_gb']} GB of memory, interleaved, "
                    f"{pairs} pairs, medians. {held}"
                    + (f"; not {', '.join(missed)}." if len(missed) else ".") + "".join(
                        f" {r['peer_name']}'s log-probs differ from the trainer's by at most {r['mismatch_max']:.1e} nats, "
                        f"{r['mismatch_mean']:.1e} on average, and masking keeps {100 * r['kept']:.2f} % of the tokens."
                        for r in found.to_dict("records") if r.get("mismatch_max", 0) > 0))


def shown(found: pd.DataFrame) -> pd.DataFrame:
    """The rows for the eye: medians with the spread of the runs."""
    def runs(r, side):
        times = r[f"{side}_runs"]
        speed = r.get(f"{side}_tokens_per_second")
        return (f"{_seconds(r[side])}\n{_seconds(min(times))} to {_seconds(max(times))}"
                + (f"\n{speed:,.0f} tokens/s" if speed else ""))

    return pd.DataFrame([{
        "what": r["name"], "ours (s)": runs(r, "ours"), "other (s)": runs(r, "peer"), "other is": r["peer_name"],
        "other / ours": f"{r['ratio']:.1f}", "bar": "–" if pd.isna(r["bar"]) else f"{r['bar']:.2g}",
        "ours / floor": f"{r['floor_multiple']:.1f}",
        "our memory (MB)": f"{r['ours_anonymous_mb']:,.0f}", "other's (MB)": f"{r['peer_anonymous_mb']:,.0f}",
        "pairs": r["pairs"],
    } for r in found.to_dict("records")])


def parts(found: pd.DataFrame, floor: str = "arithmetic alone") -> pd.DataFrame:
    """Where our own time went in each kind of work (percent), and how much of it what the floor measures would take."""
    lines = [{"what": r["name"], **{part: f"{100 * share:.0f}" for part, share in r["profile"].items()},
              floor: f"{100 / r['floor_multiple']:.0f}"} for r in found.dropna(subset="bar").to_dict("records")]
    return pd.DataFrame(lines)


def _seconds(value: float) -> str:
    return f"{value:,.1f}" if value >= 1 else f"{value:.2g}"


def drawn(found: pd.DataFrame) -> pd.DataFrame:
    """One line for each (row, side, measure): name, side, measure, value; side "floor" for the wall time alone."""
    lines = []
    for r in found.to_dict("records"):
        for side in SIDES:
            values = {"seconds": r[side], "anonymous_mb": r[f"{side}_anonymous_mb"]}
            lines += [{"name": r["name"], "side": side if side == "ours" else "other", "measure": label,
                       "value": values[key]} for key, label in MEASURES.items()]
        lines.append({"name": r["name"], "side": "floor", "measure": MEASURES["seconds"], "value": r["floor"]})
    return pd.DataFrame(lines)
