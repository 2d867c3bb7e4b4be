"""Verdicts: each claim of `paper/claims.yaml` names one function, and that function decides it.

The same function decides on a run's rows and on the paper's printed numbers. A claim is supported or contradicted
only when its interval lies wholly on one side of the line that the rule draws; otherwise it is undecided, and
the note says how many items would tell and, where evaluation was timed, how long the further ones take. A claim of
several parts holds when every part does; its parts share the 5 % (Bonferroni).
"""
from __future__ import annotations

from math import isfinite

from m2rl_core import paper
from m2rl_core.claims import judging, mechanisms, scores
from m2rl_core.claims.evidence import Evidence, Missing, Verdict
from m2rl_core.claims.places import where
from m2rl_core.paper import printed

KEYS = (
    "id", "section", "text", "printed", "rule", "test", "params", "paper_verdict", "run_verdict", "estimate", "low", "high",
    "n", "note", "needs", "paper_estimate", "paper_low", "paper_high", "paper_note", "where",
)


def combined(evidence: Evidence, claims: list[str]) -> Verdict:
    """Supported where all of `claims` are, contradicted where one is."""
    known = {claim["id"]: claim for claim in paper.claims()}
    found, absent = {}, []
    for name in claims:
        try:
            found[name] = judge(known[name], evidence)
        except Missing as error:
            absent.append(f"{name}: {error}")
    held = [name for name, v in found.items() if v.verdict == "supported"]
    against = [name for name, v in found.items() if v.verdict == "contradicted"]
    if absent and not against:
        raise Missing("; ".join(absent))
    verdict = "contradicted" if against else "supported" if len(held) == len(claims) else "undecided"
    rest = [name for name in found if name not in held and name not in against]
    parts = [("supported", held), ("contradicted", against), ("undecided", rest)]
    note = "; ".join(f"{name}: {', '.join(ids)}" for name, ids in parts if ids)
    needs = "; ".join(f"{name}: {found[name].needs}" for name in rest) if verdict == "undecided" else ""
    return Verdict(verdict, float(len(held)), n=len(claims), note=note, needs=needs)


RULES = (
    scores.no_harm, scores.lifts, scores.unmoved, scores.best_at_home, scores.higher, scores.as_good_as_merging,
    scores.cheaper, scores.costs_extra, scores.costs_differ, scores.dearest, scores.ranked, scores.leads, scores.seesaw,
    scores.beside_own_experts, scores.beside_each_expert, scores.trends_inconsistent, scores.not_always_superior,
    scores.steady, scores.flat, mechanisms.gradients_agree,
    mechanisms.changed_share, mechanisms.overlap_above_chance, mechanisms.directions_agree, mechanisms.directions_modest,
    mechanisms.reasoning_closer, mechanisms.no_link, mechanisms.nearest, mechanisms.asymmetric, mechanisms.neighbour_helps,
    mechanisms.neighbour_beats_others, mechanisms.strangers_need_not_help, mechanisms.gains_overlap,
    mechanisms.most_consistent, mechanisms.more_consistent, mechanisms.more_consistent_on_most, mechanisms.gains_differ,
    judging.judge_correlation, judging.process_better, judging.outcome_better, judging.waves_through, judging.judges_better,
    judging.best_judge, judging.judge_falls, judging.judge_keeps, judging.best_generation_and_judge, combined,
)
TESTS = {rule.__name__: rule for rule in RULES}


def judge(claim: dict, evidence: Evidence) -> Verdict:
    """The verdict of one claim on one body of evidence; Missing where it lacks what the rule needs."""
    return TESTS[claim["test"]](evidence, **claim["params"])


def attempt(claim: dict, evidence: Evidence, otherwise: str = "not run") -> Verdict:
    """`judge`, or the verdict `otherwise` where the evidence lacks something, with what that is."""
    try:
        return judge(claim, evidence)
    except Missing as error:
        return Verdict(otherwise, note=str(error), needs=f"what is missing ({error})")


def paper_evidence() -> Evidence:
    """The paper's printed numbers as evidence; figures without numbers are missing from it."""
    return Evidence(
        jaccard=printed.jaccard(), costs=printed.costs(), neighbours=printed.STATED_NEIGHBOURS,
        cells={"scores": printed.generation(), "judged": printed.judgement()})


def decide(section: str | None, evidence: Evidence) -> list[dict]:
    """Every claim of `section` (None or "4": all) with the paper's verdict and the run's, as dicts with KEYS.

    Ready for JSON: `estimate`, `low`, `high`, `n`, `note` and `needs` (what would decide it) are the run's, `paper_*` what
    the rule makes of the printed numbers; None where there is none. `where` says which cell and rows it rests on. ValueError
    for a section without claims.
    """
    claims = [claim for claim in paper.claims() if section in (None, "4", claim["section"])]
    if not claims:
        known = dict.fromkeys(claim["section"] for claim in paper.claims())
        raise ValueError(f"no claims in section {section!r}; sections: {', '.join(known)}")
    printed_evidence = paper_evidence()
    return [_line(claim, printed_evidence, evidence) for claim in claims]


def _line(claim: dict, printed_evidence: Evidence, evidence: Evidence) -> dict:
    of_paper, of_run = attempt(claim, printed_evidence, "cannot be decided from printed numbers"), attempt(claim, evidence)
    told = [claim[key] for key in ("id", "section", "text", "printed", "rule", "test", "params")]
    values = [*told, of_paper.verdict, of_run.verdict, *_numbers(of_run), of_run.n or None, of_run.note, of_run.needs]
    return dict(zip(KEYS, [*values, *_numbers(of_paper), of_paper.note, where(claim)], strict=True))


def _numbers(v: Verdict) -> list[float | None]:
    return [round(number, 4) if isfinite(number) else None for number in (v.estimate, v.low, v.high)]
