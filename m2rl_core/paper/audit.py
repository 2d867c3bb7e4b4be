"""The paper's own printed numbers, recomputed; every function returns a tidy frame for the introduction's notebook.

What is inferred rather than printed (K and the item counts of the benchmarks) is named so.
"""
from __future__ import annotations

from math import floor, sqrt

import numpy as np
import pandas as pd

from m2rl_core import paper
from m2rl_core.metrics import stats

BENCHMARKS = ("aime24", "aime25", "lcb_v5", "lcb_v6", "hle", "gpqa_diamond", "ifeval", "ifbench", "bfcl_v3")
EXPERTS = ("rl-math", "rl-coding", "rl-science", "rl-if", "rl-agent")
JUDGED = ("aime24", "ifeval", "lcb_v5", "gpqa_diamond")
# Items and K that the printed digits allow (see `grid`); the paper states neither. BFCL v3 averages categories,
# so no grid can tell: 1000 is an assumption about how much its average varies, used for intervals only.
GRID = {
    "aime24": (30, 64), "aime25": (30, 64), "lcb_v5": (279, 8), "lcb_v6": (175, 1), "hle": (2158, 1),
    "gpqa_diamond": (198, 4), "ifeval": (541, 1), "ifbench": (294, 1),
}
ASSUMED = {"bfcl_v3": (1000, 1)}


def averages() -> pd.DataFrame:
    """Printed averages of Tables 4, 7 and 8 beside the recomputed ones; `agrees`: within a unit of the last digit."""
    lines = []
    for number in (4, 8):
        for row, cells in paper.table(number).iterrows():
            lines.append((number, row, "avg", cells["avg"], cells[list(BENCHMARKS)].mean(), 0.01))
    for row, cells in paper.table(7).iterrows():
        for kind, unit in (("gen", 0.01), ("out", 0.1), ("proc", 0.1)):
            mean = cells[[f"{b}_{kind}" for b in JUDGED]].mean()
            lines.append((7, row, f"avg_{kind}", cells[f"avg_{kind}"], mean, unit))
    frame = pd.DataFrame(lines, columns=["table", "row", "column", "printed", "computed", "unit"])
    frame["agrees"] = (frame["printed"] - frame["computed"]).abs() <= frame["unit"] + 1e-9
    return frame


def nine_benchmark_means() -> pd.DataFrame:
    """Mean over the nine benchmarks of every model of Tables 3 and 4 (Table 3 prints none), best first: model, avg."""
    means = _main_scores().mean(axis=1).sort_values(ascending=False)
    return means.rename("avg").rename_axis("model").reset_index()


def blend() -> pd.DataFrame:
    """Table 1: samples, printed and computed proportion in percent, whether they agree; the last line is the total."""
    printed = paper.table(1)
    parts = printed.drop("Total")["samples"]
    samples = pd.concat([parts, pd.Series({"Total": parts.sum()})])
    frame = pd.DataFrame({
        "type": printed.index, "samples": samples.to_numpy(), "samples_printed": printed["samples"].to_numpy(),
        "printed": printed["proportion"].to_numpy(), "computed": 100 * samples.to_numpy() / parts.sum(),
    })
    frame["agrees"] = (frame["computed"].round(2) == frame["printed"]) & (frame["samples"] == frame["samples_printed"])
    return frame


def gpu_hours() -> pd.DataFrame:
    """Table 2: what RL-Multi and MT-OPD cost beside the five experts: model, hours, percent_of_experts, steps."""
    printed = paper.table(2)
    experts = printed.loc[list(EXPERTS)].sum()
    frame = printed.loc[["rl-multi", "mt-opd"], ["gpu_hours", "steps"]].rename(columns={"gpu_hours": "hours"})
    frame.loc["five experts"] = [experts["gpu_hours"], experts["steps"]]
    frame["percent_of_experts"] = 100 * frame["hours"] / experts["gpu_hours"]
    return frame.rename_axis("model").reset_index()


def random_jaccard(p: float = 0.3, q: float = 0.3) -> float:
    """Expected Jaccard overlap of two independent masks of densities p and q: pq / (p + q - pq)."""
    return p * q / (p + q - p * q)


def judge_correlations(rng: np.random.Generator) -> pd.DataFrame:
    """r between average generation and judging in Table 7: mode, dropped ('' = all nine models), r, low, high, n.

    The interval is a bootstrap over models; the dropped lines are leave-one-out.
    """
    printed = paper.table(7)
    frames = []
    for mode, column in (("outcome", "avg_out"), ("process", "avg_proc")):
        whole = stats.pearson(printed["avg_gen"], printed[column], rng)
        left = stats.leave_one_out(printed.index, printed["avg_gen"], printed[column]).assign(n=whole.n - 1)
        first = pd.DataFrame([{"dropped": "", "r": whole.estimate, "low": whole.low, "high": whole.high, "n": whole.n}])
        frames.append(pd.concat([first, left], ignore_index=True).assign(mode=mode))
    return pd.concat(frames, ignore_index=True)[["mode", "dropped", "r", "low", "high", "n"]]


def finding1() -> pd.DataFrame:
    """Finding 1 cell by cell: benchmark, model, outcome, process, process_better."""
    printed = paper.table(7)
    frame = pd.DataFrame([
        {"benchmark": b, "model": m, "outcome": printed.loc[m, f"{b}_out"], "process": printed.loc[m, f"{b}_proc"]}
        for b in JUDGED for m in printed.index
    ])
    return frame.assign(process_better=frame["process"] > frame["outcome"])


def two_expert_changes() -> pd.DataFrame:
    """Table 6: printed change against the single expert beside the recomputed one, one line a merged cell."""
    printed = paper.table(6)
    lines = []
    for row in printed.index.drop(["rl-math", "rl-coding"]):
        for column in ("aime24", "aime25", "lcb_v5", "lcb_v6"):
            if not np.isnan(printed.loc[row, column]):
                expert = "rl-math" if column.startswith("aime") else "rl-coding"
                change = printed.loc[row, column] - printed.loc[expert, column]
                lines.append((row, column, printed.loc[row, f"{column}_change"], round(change, 2)))
    return pd.DataFrame(lines, columns=["row", "column", "printed", "computed"])


def on_grid(score: float, items: int, k: int) -> bool:
    """Whether some count of right answers out of items x k prints as `score` (percent, two decimals)."""
    count = floor(score / 100 * items * k)
    return any(abs(100 * c / (items * k) - score) <= 0.005 + 1e-9 for c in (count, count + 1))


def grid() -> pd.DataFrame:
    """Does each printed score lie on the grid of k / (items x K)?

    Columns: benchmark, set, items, k, values, fit, percent_by_chance, off. `set` is "tables 3-4" (15 models) or
    "table 6" (eight merges of two). `off` lists the values that do not fit.
    """
    main, pairs = _main_scores(), paper.table(6).drop(["rl-math", "rl-coding"])
    lines = []
    for benchmark, (items, k) in GRID.items():
        for name, frame in (("tables 3-4", main), ("table 6", pairs)):
            if benchmark not in frame:
                continue
            values = frame[benchmark].dropna()
            off = [f"{model} {score:.2f}" for model, score in values.items() if not on_grid(score, items, k)]
            chance = min(100.0, items * k * 0.01)
            lines.append((benchmark, name, items, k, len(values), len(values) - len(off), chance, ", ".join(off)))
    return pd.DataFrame(lines, columns=["benchmark", "set", "items", "k", "values", "fit", "percent_by_chance", "off"])


def standard_errors(model: str = "merge-ties") -> pd.DataFrame:
    """Binomial standard error in points of one model's scores: benchmark, items, k, se_draws, se_items; last line avg.

    `se_draws` takes the items as fixed and all items x K draws as independent; `se_items` takes each item as one
    draw, the most that K repeats of the same items could be worth. The truth lies between. BFCL v3 is assumed.
    """
    lines = []
    for benchmark, (items, k) in {**GRID, **ASSUMED}.items():
        p = _main_scores().loc[model, benchmark] / 100
        spread = 100 * sqrt(p * (1 - p))
        lines.append((benchmark, items, k, spread / sqrt(items * k), spread / sqrt(items)))
    frame = pd.DataFrame(lines, columns=["benchmark", "items", "k", "se_draws", "se_items"])
    ends = [float(np.sqrt((frame[column] ** 2).sum()) / len(frame)) for column in ("se_draws", "se_items")]
    frame.loc[len(frame)] = ["avg", frame["items"].sum(), 0, *ends]
    return frame


def _main_scores() -> pd.DataFrame:
    """The 15 models of Tables 3 and 4 on nine benchmarks; the merge by TIES stands in both and counts once."""
    merged = paper.table(4).drop("merge-ties")
    return pd.concat([paper.table(3), merged])[list(BENCHMARKS)]
