"""Gradients looked at while models train: do domains pull the same way (3.3), and how noisy is distillation's (A)?"""
from __future__ import annotations

from math import exp, log, nan, sqrt

import pandas as pd
from IPython.display import Markdown
from scipy.special import stdtrit

from m2rl_core.metrics.groups import ORDER, WHOLE
from m2rl_core.metrics.stats import Estimate
from m2rl_core.pictures.drawing import DOMAIN_NAMES
from m2rl_core.views.opening import interval

GAP = "sampled - full"  # as `metrics.gradient_noise` names it, which brings torch along
UNSEEN = "*Not measured in this profile: its `{}` is zero.*"


def ordered(frame: pd.DataFrame) -> pd.DataFrame:
    """The frame with its groups of weights in the order in which they are shown."""
    return frame.sort_values("group", key=lambda group: group.map(ORDER.index), kind="stable", ignore_index=True)


def over_steps(values: pd.Series) -> Estimate:
    """Mean over measured steps with its 95 % interval (t, steps as independent); undefined steps are left out."""
    values = values.dropna()
    n = len(values)
    mean, se = (float(values.mean()) if n else nan), (float(values.std(ddof=1)) / sqrt(n) if n > 1 else nan)
    half = se * float(stdtrit(n - 1, 0.975)) if n > 1 else nan
    return Estimate(mean, mean - half, mean + half, n, se)


# Section 3.3: the domains of rl-multi's batches ---------------------------------------------------------------------

def interference(run) -> pd.DataFrame:
    """What rl-multi recorded: step, group, a, b, cosine, norm_a, norm_b; no rows where the profile never looks."""
    if not run.profile.rl.interference_every:
        return pd.DataFrame(columns=["step", "group", "a", "b", "cosine"])
    return run.table("rl-multi", "interference.parquet")


def cosines(seen: pd.DataFrame) -> pd.DataFrame:
    """Mean cosine over steps of each group of weights and pair: group, a, b, value, low, high, n."""
    rows = [(group, a, b, *over_steps(part["cosine"])[:4])
            for (group, a, b), part in seen.groupby(["group", "a", "b"], sort=False)]
    return ordered(pd.DataFrame(rows, columns=["group", "a", "b", "value", "low", "high", "n"]))


def square(found: pd.DataFrame) -> pd.DataFrame:
    """`cosines` for `plots.heatmap`: both halves, weights of norms left out (they are few); domain, other domain."""
    part = found[~found["group"].str.contains("norm")].dropna(subset="value")
    both = pd.concat([part, part.rename(columns={"a": "b", "b": "a"})], ignore_index=True)
    return both.rename(columns={"a": "domain", "b": "other domain"})


def cosines_shown(found: pd.DataFrame) -> pd.DataFrame:
    """A line a pair, highest first: cosine over all weights with its interval, and where it is lowest and highest."""
    lines = []
    for (a, b), part in found.groupby(["a", "b"], sort=False):
        whole = part[part["group"] == WHOLE].iloc[0]
        groups = part[part["group"] != WHOLE].dropna(subset="value").sort_values("value")
        told = [f"{value:.3f} ({group})" for group, value in zip(groups["group"], groups["value"], strict=True)] or ["–"]
        lines.append({"pair": f"{DOMAIN_NAMES[a]} - {DOMAIN_NAMES[b]}", "value": whole["value"],
                      "cosine, all weights [95 %]": interval(whole["value"], whole["low"], whole["high"], 3),
                      "steps": int(whole["n"]), "lowest in": told[0], "highest in": told[-1]})
    return pd.DataFrame(lines).sort_values("value", ascending=False, ignore_index=True).drop(columns="value")


def interference_sentence(found: pd.DataFrame, every: int) -> Markdown:
    """How many pairs pull together and against one another, by their intervals; or that nobody looked."""
    whole = found[found["group"] == WHOLE].dropna(subset="value")
    if not every:
        return Markdown(UNSEEN.format("interference_every"))
    if whole.empty:
        return Markdown("No two domains had a gradient at a measured step, so no cosine is defined.")
    low, high = whole.loc[whole["value"].idxmin()], whole.loc[whole["value"].idxmax()]
    named = [f"{DOMAIN_NAMES[end['a']]} with {DOMAIN_NAMES[end['b']]} ({end['value']:.3f})" for end in (low, high)]
    return Markdown(f"Over all weights, of {len(whole)} pairs of domains {(whole['low'] > 0).sum()} pull together (interval "
                    f"above 0), {(whole['high'] < 0).sum()} against one another (below 0). Mean cosine "
                    f"{whole['value'].mean():.3f}, lowest {named[0]}, highest {named[1]}; at most {int(whole['n'].max())} "
                    f"steps measured, every {every}.")


# Appendix A: both gradients of MT-OPD ---------------------------------------------------------------------------------

def noise(run) -> pd.DataFrame:
    """What mt-opd recorded: step, group, estimator, parts, trace, norm, noise; no rows where the profile never looks."""
    if not run.profile.opd.variance_every:
        return pd.DataFrame(columns=["step", "group", "estimator", "parts", "trace", "norm", "noise"])
    return run.table("mt-opd", "variance.parquet")


def ratios(seen: pd.DataFrame) -> pd.DataFrame:
    """Variance of the sampled gradient by that of the full one, geometric mean over steps: group, value, low, high, n."""
    wide = seen.pivot(index=["step", "group"], columns="estimator", values="trace").reindex(columns=["sampled", "full"])
    wide = wide[(wide["sampled"] > 0) & (wide["full"] > 0)]
    logs = (wide["sampled"] / wide["full"]).map(log)
    found = {group: over_steps(part) for group, part in logs.groupby(level="group")}
    rows = [(group, *map(exp, e[:3]), e.n) for group, e in found.items()]
    return ordered(pd.DataFrame(rows, columns=["group", "value", "low", "high", "n"]))


def noise_pairs(seen: pd.DataFrame) -> pd.DataFrame:
    """For `plots.against`: both variances of a group by the square of the full gradient's mean, means over steps."""
    full = seen[seen["estimator"] == "full"].set_index(["step", "group"])["norm"] ** 2
    part = seen[seen["estimator"] != GAP].set_index(["step", "group"])
    part = part.assign(value=part["trace"] / part["parts"] / full.reindex(part.index))
    part = part[part.index.get_level_values("group").isin(ratios(seen)["group"])]
    mean = ordered(part.groupby(["group", "estimator"], sort=False)["value"].mean().reset_index())
    side = mean["estimator"].map({"full": "ours", "sampled": "other"})
    return mean.assign(name=mean["group"], side=side, measure="variance of the gradient / square of the full KL's mean")


def noise_shown(seen: pd.DataFrame) -> pd.DataFrame:
    """A line a group of weights: how many times the variance, and what noise is expected of each mean's square."""
    share = seen.groupby(["group", "estimator"], sort=False)["noise"].mean().unstack()
    return pd.DataFrame([{
        "weights": r.group, "variance, sampled / full [95 %]": interval(r.value, r.low, r.high, 1), "steps": r.n,
        **{f"noise by squared mean, {name} (%)": 100 * share.loc[r.group, name] for name in ("sampled", "full", GAP)},
    } for r in ratios(seen).itertuples()])


def noise_sentence(seen: pd.DataFrame, timing: pd.DataFrame, every: int) -> Markdown:
    """How many times less variance the full KL's gradient has and what it costs; or that nobody looked."""
    if not every:
        return Markdown(UNSEEN.format("variance_every"))
    found = ratios(seen).set_index("group")
    if WHOLE not in found.index:
        return Markdown("No gradient differed between prompts, so no variance is defined.")
    e, gap = found.loc[WHOLE], seen.loc[(seen["group"] == WHOLE) & (seen["estimator"] == GAP), "noise"].mean()
    cost = timing["seconds_full"].sum() / timing["seconds_sampled"].sum()
    return Markdown(f"At {int(e['n'])} measured steps (every {every}), the sampled tokens' gradient had "
                    f"{interval(e['value'], e['low'], e['high'], 1)} times the variance of the full KL's, which took "
                    f"{cost:.2f} times as long on the same rollouts. Noise alone would leave {100 * gap:.0f} % of "
                    "the square of their mean difference: near a hundred where both have the same expectation.")
