"""The main claims decided again under the readings that the paper leaves open, each by its own unchanged rule.

A reading replaces frames of the evidence or one argument of a rule. Its verdict is held against that of the study's
own reading; where a reading rests on fewer items (variants of merges), against the own reading on those items.
"""
from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field, replace

import pandas as pd

from m2rl_core import claims, paper
from m2rl_core.claims.evidence import MERGES, Evidence, first_seed
from m2rl_core.claims.places import FRAMES

HEADLINES = {  # claim -> what it says, in short
    "mix-equals-merge": "mix scores like the best merge", "mix-costs-less": "mix costs less",
    "ties-best-merge": "TIES is the best merge", "few-interferences": "RLVR hardly harms other domains",
    "reasoning-synergy": "reasoning domains lift one another", "third-of-weights-change": "about 30 % of weights change",
    "masks-overlap": "masks overlap beyond chance", "directions-agree": "directions agree",
    "neighbour-lifts": "merging a neighbour lifts", "neighbours-one-way": "neighbours are one-way",
    "merge-most-consistent": "merges inherit skills", "process-opposes-generation": "process judging falls with generation",
    "process-consistently-better": "process judging beats outcome", "agent-best-process": "agent judges the process best",
    "mix-process-collapse": "process judging collapses in the mix", "integration-keeps-process": "merge and OPD keep judging",
}
EPSILONS = (1.0, 1.25, 1.5, 2.0, 3.0)  # of Eq. 1, times the own expert's divergence; the rule's own is 1.5
SHARES = {"half": 0.5, "a quarter": 0.25}  # of the samples K
ON_MERGES = {"mix-equals-merge": MERGES, "ties-best-merge": MERGES, "merge-most-consistent": ("merge-ties",)}


@dataclass(frozen=True)
class Reading:
    """`group` is what is left open, `name` one value of it; `frames` are those that it changes.

    `own`: the study's own value, which the group's others are held against. `params` replaces arguments of the rules
    in `only` (None: of all that read one of `frames`).
    """

    group: str
    name: str
    evidence: Evidence
    frames: tuple[str, ...] = ()
    own: bool = False
    params: Mapping = field(default_factory=dict)
    only: tuple[str, ...] | None = None

    def touches(self, claim: dict) -> bool:
        """Whether this reading can change the verdict of `claim`."""
        if self.only is not None:
            return claim["id"] in self.only
        return any(claim["test"] in FRAMES[frame] for frame in self.frames)


def decided(readings: Iterable[Reading], headlines: Mapping[str, str] = HEADLINES) -> pd.DataFrame:
    """A row a headline and reading that touches it: id, headline, group, reading, own, verdict, before, estimate, flips.

    `before` is the verdict under the group's own reading; `flips` says whether it differs from that.
    """
    known = {claim["id"]: claim for claim in paper.claims()}
    rows, before = [], {}
    for reading in sorted(readings, key=lambda r: not r.own):  # a group's own reading first: the others need it
        for name, short in headlines.items():
            claim = known[name]
            if not reading.touches(claim):
                continue
            found = claims.attempt({**claim, "params": {**claim["params"], **reading.params}}, reading.evidence)
            if reading.own:
                before[reading.group, name] = found.verdict
            base = before[reading.group, name]
            rows.append({"id": name, "headline": short, "group": reading.group, "reading": reading.name, "own": reading.own,
                         "verdict": found.verdict, "before": base, "estimate": found.estimate,
                         "flips": found.verdict != base})
    return pd.DataFrame(rows)


def every(evidence: Evidence, sweep: pd.DataFrame | None = None, layer: int | None = None,
          etas: Sequence[pd.DataFrame] | None = None) -> list[Reading]:
    """All readings that this evidence allows.

    `sweep`: rows of the merges' variants; `layer`: the one shown, from 0; `etas`: jaccard and cosine at other thresholds.
    """
    return [*samples(evidence), *costs(evidence), *variants(evidence, sweep), *weights(evidence, layer, etas),
            *estimators(evidence), *thresholds(evidence)]


def samples(evidence: Evidence) -> list[Reading]:
    """K of Avg@K, of judging and of the divergences: fewer of the samples that were drawn."""
    names = [name for name in ("scores", "judged", "kl") if getattr(evidence, name) is not None]
    frames = (*names, "passed") if "judged" in names else tuple(names)
    found = [Reading("K: samples", "all", evidence, frames, own=True)]
    for name, share in SHARES.items():
        changed = {frame: fewer(getattr(evidence, frame), share) for frame in names}
        if any(len(changed[frame]) < len(getattr(evidence, frame)) for frame in names):
            found.append(Reading("K: samples", name, replace(evidence, cells={}, **changed), frames))
    return found if len(found) > 1 else []


def fewer(rows: pd.DataFrame, share: float) -> pd.DataFrame:
    """The first `share` of the samples of every benchmark (or domain of prompts), at least one."""
    by = "benchmark" if "benchmark" in rows else "domain"
    k = rows.groupby(by)["sample"].transform("nunique")
    return rows[rows["sample"] < (k * share).clip(lower=1)]  # samples count from 0


def costs(evidence: Evidence) -> list[Reading]:
    """What "GPU hours" stands for: both clocks, one of them, or the tokens that were sampled."""
    spent = evidence.costs
    if spent is None or "cpu_hours" not in spent:
        return []
    measures = {"clock": "hours", "processor": "cpu_hours", **({"tokens": "tokens"} if "tokens" in spent else {})}
    return [Reading("cost", "both clocks", evidence, ("costs",), own=True)] + [
        Reading("cost", name, replace(evidence, costs=spent[["model"]].assign(hours=spent[column].astype(float))), ("costs",))
        for name, column in measures.items()]


def variants(evidence: Evidence, sweep: pd.DataFrame | None) -> list[Reading]:
    """Every merge of the sweep in its method's place, on the sweep's items; the methods' own readings are the base."""
    if sweep is None or evidence.scores is None:
        return []
    rows, k = first_seed(evidence.scores), sweep["sample"].nunique()
    others = rows[~rows["model"].isin(MERGES) & rows["item"].isin(set(sweep["item"])) & (rows["sample"] < k)]
    own = sweep[sweep["model"].isin(MERGES)]

    def on(merges: pd.DataFrame) -> Evidence:
        return replace(evidence, cells={}, scores=pd.concat([others, merges], ignore_index=True))

    found = [Reading("merging", "as in Table 4", on(own), own=True, only=tuple(ON_MERGES))]
    for name in dict.fromkeys(sweep["model"]):
        model = name.split(" ")[0]
        if name != model:
            changed = pd.concat([own[own["model"] != model], sweep[sweep["model"] == name].assign(model=model)])
            only = tuple(claim for claim, models in ON_MERGES.items() if model in models)
            found.append(Reading("merging", name, on(changed), only=only))
    return found


def weights(evidence: Evidence, layer: int | None, etas: Sequence[pd.DataFrame] | None) -> list[Reading]:
    """Which weights count as changed (stored type and eta) and in which layer."""
    if evidence.jaccard is None or evidence.cosine is None:
        return []
    names = ("jaccard", "cosine")

    def kept(test, frames=(evidence.jaccard, evidence.cosine)) -> Evidence:
        return replace(evidence, **{name: frame[test(frame)].assign(bf16=False)
                                    for name, frame in zip(names, frames, strict=True)})

    found = [Reading("changed weights", "as stored", kept(lambda f: ~f["bf16"]), names, own=True),
             Reading("changed weights", "bfloat16", kept(lambda f: f["bf16"]), names)]
    for value in sorted(set(etas[0]["eta"])) if etas is not None else ():
        changed = kept(lambda f, value=value: ~f["bf16"] & (f["eta"] == value), etas)
        found.append(Reading("changed weights", f"η {value:g}", changed, names))
    if layer is not None:
        found.append(Reading("layer", "all", kept(lambda f: ~f["bf16"]), names, own=True))
        found += [Reading("layer", name, kept(lambda f, i=i: ~f["bf16"] & (f["layer"] == i)), names)
                  for i, name in ((layer, f"{layer}, from 0"), (layer - 1, f"{layer}, from 1"))
                  if i in set(evidence.jaccard["layer"])]
    return found


def estimators(evidence: Evidence) -> list[Reading]:
    """KL exact in each token's distribution or by sampled tokens, of a whole response or by token."""
    kl = evidence.kl
    if kl is None or not {"kl_seq", "kl_token"} <= set(kl.columns):
        return []
    if evidence.scores is not None:
        evidence.measured("scores")  # once for all four
    kept = {name: cells for name, cells in evidence.cells.items() if name != "kl"}
    forms = {"exact, by response": (kl, True), "sampled, by response": (kl.assign(kl_exact=kl["kl_seq"], tokens=1), False),
             "exact, by token": (kl.assign(tokens=1), False),
             "sampled, by token": (kl.assign(kl_exact=kl["kl_token"], tokens=1), False)}
    return [Reading("KL", name, replace(evidence, kl=frame, cells=dict(kept)), ("kl",), own=own)
            for name, (frame, own) in forms.items()]


def thresholds(evidence: Evidence) -> list[Reading]:
    """Epsilon of Eq. 1, which the paper leaves open."""
    if evidence.kl is None:
        return []
    return [Reading("epsilon / own KL", f"{factor:g}", evidence, own=factor == 1.5, params={"factor": factor},
                    only=("neighbours-one-way",)) for factor in EPSILONS]
