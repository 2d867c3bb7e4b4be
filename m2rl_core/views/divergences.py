"""Section 3.4: the four readings of one divergence: a response or a token, sampled or exact, with what each costs in noise."""
from __future__ import annotations

import numpy as np
import pandas as pd
from IPython.display import Markdown

from m2rl_core.claims.evidence import Evidence
from m2rl_core.metrics import stats
from m2rl_core.pictures.drawing import DOMAIN_NAMES
from m2rl_core.views.neighbours import POLICIES
from m2rl_core.views.opening import interval

READINGS = {  # name: (unit, estimate), in the order of the table
    "sampled_response": "a response, sampled (the paper's)", "exact_response": "a response, exact",
    "sampled_token": "a token, sampled", "exact_token": "a token, exact",
}


def readings(evidence: Evidence) -> pd.DataFrame:
    """policy, data, expert, then for each of READINGS <name>, <name>_low, <name>_high and <name>_se, in nats, and n.

    Intervals are over prompts, with the same resamples for all four. A response is that of the expert on a prompt of
    `data`; "token" is the mean over responses of the mean over a response's tokens.
    """
    rows = evidence.frame("kl", "kl_seq", "kl_token", "kl_exact")
    rows = rows.assign(model=rows["expert"] + ">" + rows["policy"], benchmark=rows["domain"], item=rows["prompt"],
                       sampled_response=rows["kl_seq"], exact_response=rows["kl_exact"] * rows["tokens"],
                       sampled_token=rows["kl_token"], exact_token=rows["kl_exact"])
    cells = {name: stats.measure(rows, evidence.rng(), score=name, scale=1.0, resamples=evidence.resamples)
             for name in READINGS}
    lines = []
    for policy in [p for p in POLICIES if p in set(rows["policy"])]:
        for data in evidence.domains:
            for expert in evidence.domains:
                line: dict[str, object] = {"policy": policy, "data": data, "expert": expert}
                for name, found in cells.items():
                    e = found.contrast({(data, f"{evidence.experts[expert]}>{policy}"): 1.0})
                    line |= {name: e.estimate, f"{name}_low": e.low, f"{name}_high": e.high, f"{name}_se": e.se, "n": e.n}
                lines.append(line)
    return pd.DataFrame(lines)


def shown(found: pd.DataFrame) -> pd.DataFrame:
    """The divergences from each domain's own expert, for the eye."""
    own = found[found["data"] == found["expert"]]
    return pd.DataFrame({"policy": own["policy"], "domain": own["data"].map(DOMAIN_NAMES)} | {
        title: [interval(r[name], r[f"{name}_low"], r[f"{name}_high"], 4 if name.endswith("token") else 3)
                for _, r in own.iterrows()] for name, title in READINGS.items()})


def sentence(found: pd.DataFrame) -> Markdown:
    """How much narrower the exact estimate is, whether both agree, and whether token and response rank alike."""
    told = []
    for unit in ("response", "token"):
        ratio = (found[f"sampled_{unit}_se"] / found[f"exact_{unit}_se"]).replace([np.inf, -np.inf], np.nan).dropna()
        if ratio.empty:
            return Markdown("Too few prompts for a standard error, so the two estimates cannot be compared.")
        told.append(f"**{ratio.median():.2f}** times that of the exact one by the {unit} (from {ratio.min():.2f} to "
                    f"{ratio.max():.2f}, {len(ratio)} cells)")
    apart = ((found["sampled_response_low"] > found["exact_response_high"])
             | (found["sampled_response_high"] < found["exact_response_low"])).sum()
    ranks = [found.groupby(["policy", "data"])[name].rank() for name in ("exact_response", "exact_token")]
    same = ranks[0].eq(ranks[1]).groupby([found["policy"], found["data"]]).all()
    ratio = (found["sampled_response_se"] / found["exact_response_se"]).median()
    return Markdown(
        f"The standard error of the sampled estimate is {told[0]}, and {told[1]}: in the median, a sampled divergence of a "
        f"response needs {ratio ** 2:.1f} times the prompts for the same precision. The intervals of the two do not touch in "
        f"{apart} of {len(found)} cells. By token and by response the experts stand in one order in {same.sum()} of "
        f"{len(same)} (policy, domain) columns.")
