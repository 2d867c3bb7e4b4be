"""Section 3.5: Fig. 5 with its intervals, chance and ceiling; and the items behind it, to be read."""
from __future__ import annotations

import html
from collections.abc import Sequence

import pandas as pd
from IPython.display import HTML, Markdown

from m2rl_core.claims.evidence import Evidence, Missing, first_seed
from m2rl_core.metrics import skills, solved
from m2rl_core.pictures import drawing, plots
from m2rl_core.views.opening import interval, miniature

POLICIES = ("merge-ties", "rl-multi", "mt-opd")
TURN = "<|im_end|>"


def consistency(evidence: Evidence, models: Sequence[str] = POLICIES) -> pd.DataFrame:
    """Fig. 5: `skills.consistency` on its five benchmarks, with the draws of the claims' rules."""
    return skills.consistency(evidence.frame("first"), evidence.present(models), list(evidence.figure2.values()),
                              evidence.rng(), resamples=1000, experts=_experts(evidence))


def _experts(evidence: Evidence) -> list[str]:
    there = list(evidence.experts.values())
    return [*(name for name in skills.EXPERTS if name in there), *(name for name in there if name not in skills.EXPERTS)]


def figure5(found: pd.DataFrame):
    """Fig. 5 as bars with chance and ceiling; what is undefined is no bar, and a picture without bars says so."""
    title = "Fig. 5: cosine of gains with the union of the experts' (miniature benchmarks)"
    named = found.rename(columns={"cosine": "value"}).dropna(subset="value")
    if named.empty:
        return drawing.nothing("undefined on every benchmark: no gains to compare", title)
    return plots.bars_with_intervals(named, title, marks=("ceiling", "chance"))


def shown(found: pd.DataFrame) -> pd.DataFrame:
    """`consistency` for the eye."""
    two = [found[name].map(_two) for name in ("chance", "ceiling")]
    return pd.DataFrame({
        "benchmark": found["benchmark"].map(miniature), "model": found["model"],
        "cosine with the experts' union": [r.note or interval(r.cosine, r.low, r.high, 2) for r in found.itertuples()],
        "chance (shuffled items)": two[0], "ceiling (against itself)": two[1],
        "SFT's samples split: cosine / ceiling / chance": [
            " / ".join(map(_two, (r.split, r.split_ceiling, r.split_chance))) for r in found.itertuples()],
        "items gained": [f"{r.gained} of {r.n}" for r in found.itertuples()],
    })


def _two(value: float) -> str:
    return "undefined" if pd.isna(value) else f"{value:.2f}"


def sentence(found: pd.DataFrame) -> Markdown:
    """Which model resembles the experts most, where the cosine is clear of chance, and what shared SFT luck adds."""
    known = found.dropna(subset="cosine")
    if known.empty:
        return Markdown("No model gains on any item, so no cosine is defined.")
    clear = (known["low"] > known["chance"]).sum()
    mean = known.groupby("model")["cosine"].mean().sort_values(ascending=False)
    order = ", ".join(f"`{model}` {value:.2f}" for model, value in mean.items())
    return Markdown(f"{clear} of {len(known)} defined cosines are above chance with the whole interval. "
                    f"Mean over benchmarks: {order}. " + _shared(known))


def _shared(known: pd.DataFrame) -> str:
    """What is left of the cosines where no SFT sample serves both sides."""
    both = known.dropna(subset=["split", "split_ceiling", "split_chance", "ceiling"])
    if both.empty:
        return "With one sample an item there is no ceiling: two halves need two samples."
    mean = both[["cosine", "ceiling", "chance", "split", "split_ceiling", "split_chance"]].mean()
    return (f"Mean of all: {mean['cosine']:.2f}, ceiling {mean['ceiling']:.2f}, chance {mean['chance']:.2f}. With SFT's "
            f"samples split between the two sides, so that its luck is shared no more: {mean['split']:.2f}, ceiling "
            f"{mean['split_ceiling']:.2f}, chance {mean['split_chance']:.2f}.")


def apart(evidence: Evidence, models: Sequence[str] = POLICIES) -> pd.DataFrame:
    """Items that one side solves and the other does not, all five benchmarks: as `solved.apart`."""
    rows = evidence.frame("first")
    return pd.concat([solved.apart(rows, b, m, _experts(evidence)) for m in evidence.present(models)
                      for b in evidence.figure2.values()], ignore_index=True)


def apart_counts(found: pd.DataFrame, evidence: Evidence, models: Sequence[str] = POLICIES) -> pd.DataFrame:
    """How many items, a row a benchmark and model, and how many where only luck is at work.

    Columns: benchmark, model, alone, experts (from all samples, `found` as `apart` makes it); half_alone, half_experts,
    copy_alone, copy_experts, alone_se, experts_se (from halves, as `solved.by_luck`, the copy being of the domain's own
    expert).
    """
    rows, count, rng = evidence.frame("first"), found.groupby(["benchmark", "model", "who"]).size(), evidence.rng()
    lines = []
    for domain, benchmark in evidence.figure2.items():
        for model in evidence.present(models):
            luck = solved.by_luck(rows, benchmark, model, evidence.experts[domain], rng, experts=_experts(evidence))
            lines.append({"benchmark": benchmark, "model": model, "alone": count.get((benchmark, model, "model only"), 0),
                          "experts": count.get((benchmark, model, "experts only"), 0), "half_alone": luck["alone"],
                          "half_experts": luck["experts"],
                          **{name: luck[name] for name in ("copy_alone", "copy_experts", "alone_se", "experts_se")}})
    return pd.DataFrame(lines)


def apart_shown(found: pd.DataFrame) -> pd.DataFrame:
    """`apart_counts` for the eye: a row a benchmark and one for their sum; small print for the halves."""
    lines = []
    for benchmark, part in [*found.groupby("benchmark", sort=False), (_all(found), _total(found).reset_index())]:
        line = {"benchmark": miniature(benchmark)}
        for r in part.itertuples():
            line[f"{r.model}: it alone / an expert alone"] = (
                f"{r.alone} / {r.experts}\nby halves {_one_digit(r.half_alone)} / {_one_digit(r.half_experts)}\n"
                f"own expert's copy {_one_digit(r.copy_alone)} / {_one_digit(r.copy_experts)}")
        lines.append(line)
    return pd.DataFrame(lines)


def _all(found: pd.DataFrame) -> str:
    """What the sum over these benchmarks is called."""
    count = found["benchmark"].nunique()
    return "all five" if count == 5 else f"all {count}"


def _total(found: pd.DataFrame) -> pd.DataFrame:
    """Sums over benchmarks by model, NaN where one is; standard errors add up in squares: benchmarks share no items."""
    errors = ["alone_se", "experts_se"]
    total = found.assign(**{name: found[name] ** 2 for name in errors}).drop(columns="benchmark")
    total = total.groupby("model", sort=False).agg(lambda column: column.sum(skipna=False))
    return total.assign(**{name: total[name] ** 0.5 for name in errors})


def _one_digit(value: float) -> str:
    return "undefined" if pd.isna(value) else f"{value:.1f}"


def apart_sentence(found: pd.DataFrame) -> Markdown:
    """Which model solves more items alone, or misses more, than a copy of the own experts does by luck."""
    total = _total(found)
    if total.isna().any(axis=None):
        return Markdown("A benchmark has one sample an item, and one sample does not tell luck from skill.")
    told = []
    for model, r in total.iterrows():
        gaps = []
        for side in ("alone", "experts"):
            gap, reach = r[f"half_{side}"] - r[f"copy_{side}"], 1.96 * r[f"{side}_se"]
            clear = "more than luck" if gap > reach else "less than luck" if gap < -reach else "not told from luck"
            gaps.append(f"{interval(gap, gap - reach, gap + reach)} items ({clear})")
        told.append(f"`{model}` minus the copy: alone {gaps[0]}, left to an expert alone {gaps[1]}")
    return Markdown(f"{_all(found).capitalize()} benchmarks, by halves of the samples, 95 % over items: {'; '.join(told)}.")


def transcripts(found: pd.DataFrame, rows: pd.DataFrame, model: str, who: str, n: int = 6) -> HTML | Markdown:
    """Up to `n` such items to open, clearest first, two a benchmark: a response of `model` and of the best expert.

    `who` is "model only" or "experts only". The response shown is the first right one of the side that solves it.
    Missing where `model` is not in this study.
    """
    rows = first_seed(rows)
    if not (rows["model"] == model).any():
        raise Missing(f"no scores of {model}")
    part = found[(found["model"] == model) & (found["who"] == who)]
    part = part.assign(gap=(part["accuracy"] - part["best_accuracy"]).abs()).sort_values(
        ["gap", "item"], ascending=[False, True])
    chosen = part.groupby("benchmark", sort=False).head(2).head(n)
    if chosen.empty:
        return Markdown(f"No item of these benchmarks is of the kind \"{who}\" for `{model}`.")
    return HTML(f"<p>{len(chosen)} of {len(part)} items; click one to open it.</p>\n"
                + "\n".join(_one(line, rows) for line in chosen.itertuples()))


def _one(line, rows: pd.DataFrame) -> str:
    here = rows[(rows["benchmark"] == line.benchmark) & (rows["item"] == line.item)]
    sides = ((line.model, line.accuracy), (line.best_expert, line.best_accuracy))
    title = ", ".join(f"{name} right in {100 * accuracy:.0f} %" for name, accuracy in sides)
    told = [f"<summary><b>{html.escape(f'{miniature(line.benchmark)}, {line.item}')}</b>: {html.escape(title)}</summary>",
            _block(here["prompt"].iloc[0])]
    for name, accuracy in sides:
        own = here[here["model"] == name].sort_values("sample")
        solver = line.model if line.who == "model only" else line.best_expert
        first = own.sort_values("score", ascending=name != solver, kind="stable").iloc[0]
        told.append(f"<p><code>{html.escape(name)}</code>, right in {100 * accuracy:.0f} % of its {len(own)} samples; "
                    f"sample {first['sample']}: reward {first['score']:g}, {html.escape(str(first['reason']))}</p>")
        told.append(_block(first["response"].replace(TURN, "\n---\n")))
    return "<details>" + "\n".join(told) + "</details>"


def _block(text: str, limit: int = 900) -> str:
    """A block that no text of a model can end early; long lines wrap."""
    text = text if len(text) <= limit else text[:limit] + " [...]"
    return f'<pre style="white-space:pre-wrap">{html.escape(text.strip())}</pre>'
