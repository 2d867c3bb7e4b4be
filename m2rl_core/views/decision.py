"""Section 4: which of the options to take, by a rule in words: the cheapest that is not shown to score lower.

Scores are means of the nine benchmarks, differences are paired by item; the options share the 5 % of error. Costs are
training beyond SFT, in percent of the five experts' together; each was one run, so a cost has no interval, but up to
three measures of it.
"""
from __future__ import annotations

from math import isfinite

import pandas as pd
from IPython.display import Markdown

from m2rl_core import claims
from m2rl_core.claims.evidence import EXPERT, MARGIN, MERGES, OWN, Evidence, items_that_tell
from m2rl_core.domains import mean_of
from m2rl_core.pictures.drawing import DOMAIN_NAMES
from m2rl_core.metrics.stats import average, difference
from m2rl_core.views import scores
from m2rl_core.views.opening import interval

OPTIONS = ("sft", *EXPERT.values(), "rl-multi", *MERGES, "mt-opd")
MEASURES = {"hours": "by the clock", "cpu_hours": "by processor time", "tokens": "by sampled tokens"}


def cost(spent: pd.DataFrame, column: str = "hours", experts_at_hand: bool = False) -> dict[str, float]:
    """What each option takes to train, in percent of the five experts: a merge needs all five, MT-OPD its own run too.

    With the experts at hand these cost nothing more, and so do the merges. Unmeasured options are left out.
    """
    share = scores.shares(spent, column).to_dict()
    five = 0.0 if experts_at_hand else 100.0
    found = {"sft": 0.0, **dict.fromkeys(MERGES, five)}
    found |= dict.fromkeys(EXPERT.values(), 0.0) if experts_at_hand else {m: share[m] for m in EXPERT.values()}
    return found | {m: share[m] + (five if m == "mt-opd" else 0.0) for m in ("rl-multi", "mt-opd") if m in share}


def options(found: Evidence, experts_at_hand: bool = False, models=OPTIONS) -> pd.DataFrame:
    """Every option, cheapest first: model, cost, of, value, low, high, gap, gap_low, gap_high, lower, comparable, chosen.

    `of`: what `value` is the mean of. `gap`: minus the best option, zero for that one. `lower`: the whole interval is below
    0. `comparable`: the whole interval is above -2 points. `chosen`: the cheapest that is not lower; of equally cheap ones
    the best.
    """
    known = cost(found.frame("costs", "model", "hours"), experts_at_hand=experts_at_hand)
    models = [m for m in models if m in known and all(found.measured("scores").has(b, m) for b in found.benchmarks)]
    means, of = {m: found.contrast(average(m, found.benchmarks)) for m in models}, mean_of(found.benchmarks)
    best = max(models, key=lambda m: means[m].estimate)
    rows = []
    for m in models:
        gap = (0.0, 0.0, 0.0) if m == best else found.contrast(difference(m, best, found.benchmarks), len(models) - 1)[:3]
        value, low, high = means[m][:3]
        rows.append({"model": m, "cost": known[m], "of": of, "value": value, "low": low, "high": high,
                     "gap": gap[0], "gap_low": gap[1], "gap_high": gap[2], "lower": gap[2] < 0,
                     "comparable": gap[1] > -MARGIN})
    frame = pd.DataFrame(rows).sort_values(["cost", "value"], ascending=[True, False], kind="stable", ignore_index=True)
    chosen = frame.loc[~frame["lower"]].index[0]  # the best one at least is not lower
    return frame.assign(chosen=frame.index == chosen)


def shown(from_scratch: pd.DataFrame, at_hand: pd.DataFrame) -> pd.DataFrame:
    """`options` for the eye, best first: both costs, the mean, the difference to the best and what the rule says."""
    later = at_hand.set_index("model")
    rows = []
    for r in from_scratch.sort_values("value", ascending=False, kind="stable").itertuples():
        said = ("the best" if r.gap == r.gap_low == r.gap_high == 0 else "lower" if r.lower else
                f"comparable: within {MARGIN:g} points" if r.comparable else "not shown to be lower")
        ways = (("from SFT", r.chosen), ("with the experts at hand", later.loc[r.model, "chosen"]))
        takes = [name for name, on in ways if on]
        rows.append({
            "option": r.model, "training from SFT (%)": f"{r.cost:.0f}",
            "with the experts at hand (%)": f"{later.loc[r.model, 'cost']:.0f}",
            f"{r.of} [95 %]": interval(r.value, r.low, r.high), "minus the best (options share the 5 %)":
            "" if said == "the best" else interval(r.gap, r.gap_low, r.gap_high), "shown to be": said,
            "the rule takes it": " and ".join(takes)})
    return pd.DataFrame(rows)


def sentence(found: Evidence, from_scratch: pd.DataFrame, at_hand: pd.DataFrame) -> Markdown:
    """What the rule takes in both situations and on the paper's numbers, what that costs, and how sure it is."""
    theirs = claims.paper_evidence()
    return Markdown("\n\n".join([
        "The rule: *take the cheapest option whose score is not shown to be lower than the best one's.*",
        f"**Starting from SFT: {_choice(found, from_scratch, False)}",
        f"**With the five experts at hand: {_choice(found, at_hand, True)}",
        f"**By the paper's printed numbers, from SFT: {_choice(theirs, options(theirs), False)}",
    ]))


def _choice(found: Evidence, frame: pd.DataFrame, experts_at_hand: bool) -> str:
    take, best = frame[frame["chosen"]].iloc[0], frame.loc[frame["value"].idxmax(), "model"]
    if not frame.loc[frame["model"] != best, "gap_low"].notna().any():
        return "cannot tell.** There are too few items for an interval, so no option is shown to be lower."
    spent = found.costs
    costs = [f"{cost(spent, column, experts_at_hand)[take['model']]:.0f} % {name}" for column, name in MEASURES.items()
             if column in spent and spent[column].notna().all()]
    costs = "nothing more to train" if take["cost"] == 0 else (
        f"training {', '.join(costs)} of what the five experts take together")
    text = f"`{take['model']}`** ({costs}), mean {interval(take['value'], take['low'], take['high'])}. "
    if take["model"] == best:
        text += "It is the best option too"
        rivals = frame[(frame["model"] != best) & ~frame["lower"]]
        text += (f"; not shown to be lower, though dearer or no better: {', '.join(f'`{m}`' for m in rivals['model'])}."
                 if len(rivals) else ", and every other one is shown to be lower.")
    else:
        price = frame.loc[frame["value"].idxmax(), "cost"]
        text += f"The best, `{best}`, costs {price:.0f} % and is not shown to score higher: the difference is "
        text += f"{interval(take['gap'], take['gap_low'], take['gap_high'])} points"
        text += "." if take["comparable"] else _open(found, take, best, len(frame) - 1)
    cheaper = frame[(frame["cost"] < take["cost"]) & frame["lower"]]
    if len(cheaper):
        nearest = cheaper.loc[cheaper["gap"].idxmax()]
        text += (f" Of the {len(cheaper)} cheaper options the nearest, `{nearest['model']}` at {nearest['cost']:.0f} %, is "
                 f"{interval(nearest['gap'], nearest['gap_low'], nearest['gap_high'])} points away.")
    return text


def _open(found: Evidence, take: pd.Series, best: str, parts: int) -> str:
    """What a choice risks that is neither lower nor comparable, and what would settle it."""
    e = found.contrast(difference(take["model"], best, found.benchmarks), parts)
    if not isfinite(e.low):
        return "; too few items for an interval."
    items = items_that_tell(e, 0.0, parts)
    told = f"about {items:.0f} items would tell the two apart" if items < 1e6 else "no feasible n would tell the two apart"
    return f": it may be up to {-take['gap_low']:.1f} points lower, {told}."


def by_domain(found: Evidence, a: str = "rl-multi", b: str | None = None) -> pd.DataFrame:
    """What a mean hides: domain, a, b (Avg@K of both), difference with interval, who is ahead; `b`: the best weight merge."""
    b = b or found.best(MERGES)
    rows = []
    for domain, own in found.own.items():
        gap = found.contrast(difference(a, b, own), len(found.own))
        ahead = a if gap.low > 0 else b if gap.high < 0 else "not decided"
        lost = [name for name in OWN.get(domain, own) if name not in own]
        name = DOMAIN_NAMES[domain] + (f" (without {', '.join(lost)})" if lost else "")
        rows.append({"domain": name, **{m: f"{found.contrast(average(m, own)).estimate:.1f}" for m in (a, b)},
                     f"{a} minus {b} (domains share the 5 %)": interval(*gap[:3]), "ahead": ahead})
    return pd.DataFrame(rows)
