"""The bill as text, for `make estimate`."""
from __future__ import annotations

import math

import pandas as pd

from m2rl_core.cost import bill, plan, table2
from m2rl_core.progress import duration

ERROR_SAID = "the cost model's largest error on the rows of Table 2 that did not fit it is a factor of"


def lines(run, found: pd.DataFrame) -> list[str]:
    """Every line of the answer: the stages, the sums, the paper's table, what could be left out, how sure it is."""
    clustered = bool(found["gpus"].max())
    told = [f"{'stage':28} {'done':4} {'steps':>7} {'rollouts':>10} {'tokens':>8} {'time':>9} {'likely':>19} "
            f"{'at most':>9} {'GPU-h' if clustered else '':>8} {'disk':>8} {'memory':>8}  from"]
    for row in found.itertuples(index=False):
        hours = f"{row.seconds * row.gpus / 3600:,.1f}" if clustered else ""
        told.append(f"{row.stage:28} {'yes' if row.done else 'no':4} {row.steps:>7,} {row.rollouts:>10,} {count(row[6]):>8} "
                    f"{clock(row.seconds):>9} {span(row.low, row.high):>19} {clock(row.most):>9} {hours:>8} "
                    f"{size(row.disk):>8} {size(row.memory):>8}  {row[-1]}")
    return [*told, "", *totals(run, found), "", *paper_lines(found), "", *left_out(run, found), "", *sure(run, found)]


def totals(run, found: pd.DataFrame) -> list[str]:
    """What is left in all: seconds of all stages, GPU hours, wall time, tokens, bytes."""
    left = found[~found["done"]]
    if left.empty:
        return [f"all {len(found)} stages are made; they took {clock(found['seconds'].sum())}"]
    timed = left.dropna(subset=["seconds"])
    jobs, gpus = run.profile.jobs, int(found["gpus"].max())
    sums = {name: timed[name].sum() for name in ("seconds", "low", "high", "most")}
    together = f", about {clock(wall(run, left))} on the wall as {jobs} are made at a time" if jobs > 1 else ""
    told = [f"left: {len(left)} of {len(found)} stages, {clock(sums['seconds'])} of work "
            f"(likely {span(sums['low'], sums['high'])}, at most {clock(sums['most'])}){together}"]
    if len(timed) < len(left):
        told.append(f"      {len(left) - len(timed)} of them have no time yet")
    if gpus:
        hours, low, high = (sums[name] * gpus / 3600 for name in ("seconds", "low", "high"))
        told.append(f"      {hours:,.0f} GPU hours on {gpus} GPU{'s' if gpus > 1 else ''} (likely {low:,.0f} to {high:,.0f})")
    told.append(f"      {count(left['expected tokens'].sum())} sampled tokens as expected, "
                f"{count(float(left['tokens'].sum()))} at most; {size(left['disk'].sum())} of disk when all is made; "
                f"{size(left['memory'].max())} of memory at the peak"
                + (" on each GPU" if gpus else f" of one stage, {jobs} at a time"))
    if gpus:
        told.append("      merging and the weight analysis read tensor by tensor: they need no GPU")
    weights = left.loc[left["kind"].isin(("base", "sft", "rl", "opd")), "disk"].notna().any()
    if weights and (shape := bill.shape_of(run.profile)):
        told.append(f"      {size(bill.CHECKPOINT * shape.parameters)} more of disk while a policy trains, to go on from")
    return told


def wall(run, left: pd.DataFrame) -> float:
    """Seconds on the wall: stages in the order of the study, each as soon as what it needs is made and a place is free."""
    seconds, ends = left.set_index("stage")["seconds"].fillna(0.0), {}
    free = [0.0] * run.profile.jobs
    for name in seconds.index:
        ready = max((ends[need] for need in run.stages[name].needs if need in ends), default=0.0)
        place = min(range(len(free)), key=lambda i: free[i])
        begin = max(ready, free[place])
        free[place] = ends[name] = begin + seconds[name]
    return max(ends.values(), default=0.0)


def paper_lines(found: pd.DataFrame) -> list[str]:
    """The trained models beside Table 2."""
    table = bill.beside_paper(found)
    clustered = bool(found["gpus"].max())
    unit = "GPU-h here" if clustered else "time here"
    told = [f"{'Table 2':12} {'GPU-h (paper)':>14} {unit:>11} {'steps (paper)':>14} {'steps here':>11} {'tokens here':>12}"]
    for row in table.to_dict("records"):
        here = f"{row['hours']:,.1f}" if clustered and not math.isnan(row["hours"]) else clock(row["seconds"])
        told.append(f"{row['model']:12} {row['GPU hours (paper)']:>14,.1f} {here:>11} {row['steps (paper)']:>14,} "
                    f"{row['steps']:>11,} {count(row['tokens']):>12}")
    return told if len(table) else ["Table 2: this profile trains none of its models"]


def left_out(run, found: pd.DataFrame) -> list[str]:
    """What could be left out and what it saves; each alone."""
    table = bill.skippable(run, found)
    table = table[table["saves"] > 0]
    if table.empty:
        return ["nothing is left that could be left out"]
    told = [f"{'without':18} {'saves':>9} {'share':>6} {'stages':>7}  notebooks that lose by it"]
    told += [f"{r['without']:18} {clock(r['saves']):>9} {100 * r['share']:>5.0f}% {r['stages']:>7}  "
             f"{r['lost or poorer']}" for r in table.to_dict("records")]
    return [*told, "  each alone, with all that needs it (without one expert the others are merged instead); models are left",
            "  out by `train:` and `import:` of a profile, pairs and subsets by `analysis: {pairs: false}`, the rest where",
            "  `NB=` names other notebooks"]


def sure(run, found: pd.DataFrame) -> list[str]:
    """How sure it is, and why."""
    kinds = found.loc[~found["done"], "from"].str.split(",").str[0].value_counts()  # none where all is made
    told = ["how sure: " + "; ".join(f"{n} stages {label}" for label, n in kinds.items())] if len(kinds) else []
    if found["gpus"].max():
        fit = table2.fit()
        reached = fit.efficiency
        told.append(f"  {ERROR_SAID} {table2.error():.2f}")
        told.append(f"  fitted: {100 * reached.train:.0f} % of a GPU's operations in training, "
                    f"{100 * reached.decode:.0f} % of its bandwidth in sampling")
        few, many = (100 * share for share in plan.LEARNS)
        told.append("  the likely range has answers from half to one and a half times as long as assumed"
                    + (f",\n  and {few:.0f} to {many:.0f} % of the groups with something to learn"
                       if found["kind"].isin(["rl"]).any() else "") + "; `at most`: all at full length")
        told.append("  no run on GPUs stands behind it: say what yours reach, SAMPLING= and TRAINING= tokens a second of one")
    else:
        told.append("  the likely range is that of the calibration's repetitions, of how many groups have an advantage, and a "
                    "factor for what it leaves out; `at most`: every answer at full length")
    return told


def clock(seconds: float) -> str:
    """`1:20`, `2:05:00`, `12.3 d`; "?" where it is not known."""
    if math.isnan(seconds):
        return "?"
    return duration(seconds) if seconds < 3 * 86400 else f"{seconds / 86400:,.1f} d"


def span(low: float, high: float) -> str:
    return "?" if math.isnan(low) else clock(low) if low == high else f"{clock(low)}-{clock(high)}"


def count(number: float) -> str:
    """`12.3 M`"""
    if math.isnan(number):
        return "?"
    return scaled(number, (("T", 1e12), ("B", 1e9), ("M", 1e6), ("k", 1e3))) if number else "–"


def size(number: float) -> str:
    """`1.2 GB`"""
    if math.isnan(number):
        return "?"
    return scaled(number, (("TB", 1e12), ("GB", 1e9), ("MB", 1e6), ("kB", 1e3))) if number else "–"


def scaled(number: float, units) -> str:
    for name, unit in units:
        if number >= unit:
            return f"{number / unit:.3g} {name}" if number < 999.5 * unit else f"{number / unit:,.0f} {name}"
    return f"{number:.0f}"
