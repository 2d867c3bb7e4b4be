"""Section 3.5: Fig. 5 with its intervals, chance and ceiling; and the items behind it, to be read."""
from __future__ import annotations

from collections.abc import Sequence

import altair as alt
import pandas as pd
from IPython.display import Markdown

from m2rl_core import plots
from m2rl_core.claims.evidence import FIGURE2, Evidence
from m2rl_core.metrics import skills
from m2rl_core.views.opening import interval, miniature

POLICIES = ("merge-ties", "rl-multi", "mt-opd")
TURN = "<|im_end|>"


def consistency(evidence: Evidence, models: Sequence[str] = POLICIES) -> pd.DataFrame:
    """Fig. 5: `skills.consistency` on its five benchmarks, with the draws of the claims' rules."""
    return skills.consistency(evidence.frame("scores"), models, list(FIGURE2.values()), evidence.rng(), resamples=1000)


def figure5(found: pd.DataFrame):
    """Fig. 5 as bars with chance and ceiling; what is undefined is no bar, and a picture without bars says so."""
    title = "Fig. 5: cosine of gains with the union of the experts' (miniature benchmarks)"
    named = found.rename(columns={"cosine": "value"}).dropna(subset="value")
    if named.empty:
        nothing = alt.Chart(pd.DataFrame({"text": ["undefined on every benchmark: no gains to compare"]}))
        return nothing.mark_text(fontSize=12).encode(text="text:N").properties(
            width=400, height=60, title=alt.TitleParams(title, subtitle="higher is better", anchor="start"))
    return plots.bars_with_intervals(named, title, marks=("ceiling", "chance"))


def shown(found: pd.DataFrame) -> pd.DataFrame:
    """`consistency` for the eye."""
    two = [found[name].map(lambda v: "undefined" if pd.isna(v) else f"{v:.2f}") for name in ("chance", "ceiling")]
    return pd.DataFrame({
        "benchmark": found["benchmark"].map(miniature), "model": found["model"],
        "cosine with the experts' union": [r.note or interval(r.cosine, r.low, r.high, 2) for r in found.itertuples()],
        "chance (shuffled items)": two[0], "ceiling (against itself)": two[1],
        "items gained": [f"{r.gained} of {r.n}" for r in found.itertuples()],
    })


def sentence(found: pd.DataFrame) -> Markdown:
    """Which model resembles the experts most, and on how many benchmarks the cosine is clear of chance."""
    known = found.dropna(subset="cosine")
    if known.empty:
        return Markdown("No model gains on any item, so no cosine is defined.")
    clear = (known["low"] > known["chance"]).sum()
    mean = known.groupby("model")["cosine"].mean().sort_values(ascending=False)
    order = ", ".join(f"`{model}` {value:.2f}" for model, value in mean.items())
    return Markdown(f"{clear} of {len(known)} defined cosines are above chance with the whole interval. "
                    f"Mean over benchmarks: {order}.")


def apart(evidence: Evidence, models: Sequence[str] = POLICIES) -> pd.DataFrame:
    """Items that one side solves and the other does not, all five benchmarks: as `skills.solved_apart`."""
    rows = evidence.frame("scores")
    return pd.concat([skills.solved_apart(rows, b, m) for m in models for b in FIGURE2.values()], ignore_index=True)


def apart_counts(found: pd.DataFrame, models: Sequence[str] = POLICIES) -> pd.DataFrame:
    """How many items: a row a benchmark, for each model "only it / only experts"."""
    count = found.groupby(["benchmark", "model", "who"]).size()
    return pd.DataFrame([{
        "benchmark": miniature(b),
        **{f"{m}: it alone / an expert alone": f"{count.get((b, m, 'model only'), 0)} / "
                                               f"{count.get((b, m, 'experts only'), 0)}" for m in models},
    } for b in FIGURE2.values()])


def transcripts(found: pd.DataFrame, rows: pd.DataFrame, model: str, who: str, n: int = 2) -> Markdown:
    """Up to `n` such items, clearest first, one a benchmark: the prompt, a response of `model` and of the best expert.

    `who` is "model only" or "experts only". The response shown is the first right one of the side that solves it.
    """
    part = found[(found["model"] == model) & (found["who"] == who)]
    part = part.assign(gap=(part["accuracy"] - part["best_accuracy"]).abs()).sort_values(
        ["gap", "item"], ascending=[False, True])
    chosen = part.drop_duplicates("benchmark").head(n)
    if chosen.empty:
        return Markdown(f"No item of the five benchmarks is of the kind \"{who}\" for `{model}`.")
    return Markdown("\n\n".join(_one(line, rows) for line in chosen.itertuples()))


def _one(line, rows: pd.DataFrame) -> str:
    here = rows[(rows["benchmark"] == line.benchmark) & (rows["item"] == line.item)]
    told = [f"**{miniature(line.benchmark)}, item `{line.item}`**", _block(here["prompt"].iloc[0])]
    for name, accuracy in ((line.model, line.accuracy), (line.best_expert, line.best_accuracy)):
        own = here[here["model"] == name].sort_values("sample")
        solver = line.model if line.who == "model only" else line.best_expert
        first = own.sort_values("score", ascending=name != solver, kind="stable").iloc[0]
        told.append(f"`{name}`, right in {100 * accuracy:.0f} % of its samples; this one: {first['reason']}")
        told.append(_block(first["response"].replace(TURN, "\n---\n")))
    return "\n\n".join(told)


def _block(text: str, limit: int = 900) -> str:
    """A code block that no text can end early."""
    text = text if len(text) <= limit else text[:limit] + " [...]"
    return "~~~~~text\n" + text.replace("~~~~~", "~ ~ ~ ~ ~").strip() + "\n~~~~~"
