"""The rules added with the whole ledger, each decided both ways by hand; what open verdicts need; where verdicts lead."""
import json
import re
from collections import Counter
from dataclasses import replace

import numpy as np
import pandas as pd
import pytest
from test_claims import divergences, evidence, judged, skilled, weights, world

from m2rl_core import claims, paper
from m2rl_core.publishing import publish, site
from m2rl_core.claims import Evidence, evidence as lines, judging, mechanisms, places, scores
from m2rl_core.claims.evidence import EXPERT
from m2rl_core.domains import BENCHMARKS, DOMAINS
from m2rl_core.metrics.groups import WHOLE
from m2rl_core.metrics.stats import Estimate
from m2rl_core.profile import repo_root
from m2rl_core.views import verdicts
from m2rl_core.views.grid import grid

ROOT = repo_root()
PAIRS = [f"pair-{a}-{b}" for i, a in enumerate(DOMAINS) for b in DOMAINS[i + 1:]]
HOURS = {"rl-math": 4.0, "rl-coding": 6.0, "rl-science": 2.0, "rl-if": 2.0, "rl-agent": 6.0 - 1e-9, "rl-multi": 10.0,
         "mt-opd": 1.0}
COSTS = pd.DataFrame({"model": list(HOURS), "hours": list(HOURS.values())})


# -- scores and costs

def test_leads_needs_every_benchmark():
    """Catches a mean over benchmarks, which one lost benchmark would not show."""
    first = {("merge-ties", "aime24"): 0.8, ("merge-ties", "hle"): 0.8}
    assert scores.leads(evidence(first), "merge-ties", scores.MERGES, ["aime24", "hle"]).verdict == "supported"
    lost = evidence({**first, ("merge-sce", "hle"): 0.9})
    assert scores.leads(lost, "merge-ties", scores.MERGES, ["aime24", "hle"]).verdict == "contradicted"
    assert scores.leads(evidence(first), "merge-ties", scores.MERGES, ["aime24"], last=True).verdict == "contradicted"
    assert scores.leads(evidence({"sft": 0.3}), "sft", ["sft", "rl-if"], last=True).verdict == "supported"


def test_costs_by_hand():
    found = Evidence(costs=COSTS)
    extra = scores.costs_extra(found, "mt-opd", 1)
    assert (extra.verdict, extra.estimate) == ("supported", pytest.approx(5.0))  # 1 of 20 hours
    assert scores.costs_extra(found, "mt-opd", 6).verdict == "contradicted"
    assert (scores.costs_differ(found, 1.5).verdict, scores.costs_differ(found, 1.5).estimate) == ("supported", 3.0)
    assert scores.costs_differ(found, 3.5).verdict == "contradicted"
    assert scores.dearest(found, "rl-coding").verdict == "supported"
    assert scores.dearest(found, "rl-math").verdict == "contradicted"
    with pytest.raises(claims.Missing, match="mt-opd"):
        scores.costs_extra(Evidence(costs=COSTS[:6]), "mt-opd", 1)


def test_beside_each_expert_shows_the_worst_domain():
    """Catches averaging over domains: one lost domain is interference however much the others gain."""
    good = {"rl-multi": 0.8}
    assert scores.beside_each_expert(evidence(good), "rl-multi", -2).verdict == "supported"
    lost = scores.beside_each_expert(evidence({**good, ("rl-multi", "if"): 0.3}), "rl-multi", -2)
    assert lost.verdict == "contradicted" and lost.estimate == pytest.approx(-20) and "rl-if" in lost.note


def test_trends_and_superiority():
    both = evidence({("merge-ties", "math"): 0.8, ("merge-ties", "if"): 0.2})
    assert scores.trends_inconsistent(both, "merge-ties").verdict == "supported"
    up = evidence({"merge-ties": 0.8})
    assert scores.trends_inconsistent(up, "merge-ties").verdict == "contradicted"
    assert scores.not_always_superior(up, "merge-ties").verdict == "contradicted"
    assert scores.not_always_superior(both, "merge-ties").verdict == "supported"
    mostly = evidence({"merge-ties": 0.8, ("merge-ties", "if"): 0.5})  # equal to the expert in one domain
    for rule in (scores.trends_inconsistent, scores.not_always_superior):
        assert rule(mostly, "merge-ties").verdict == "undecided" and rule(mostly, "merge-ties").needs


def test_flat_is_inside_the_margin_on_the_way():
    def along(late, n=400):
        parts = [world({m: 0.5 if step == 0 else late for m in EXPERT.values()}, n=n, models=tuple(EXPERT.values())).assign(
            step=step) for step in (0, 10, 20, 30)]
        return Evidence(along=pd.concat(parts), resamples=300)
    assert scores.flat(along(0.505), ["math", "if"], "agent").verdict == "supported"
    assert scores.flat(along(0.7), ["math", "if"], "agent").verdict == "contradicted"
    assert scores.steady(along(0.7), experts=["if"]).verdict == "supported"
    assert "3 of 3" in scores.steady(along(0.7), experts=["if"]).note  # three reasoning benchmarks, not six


# -- weights, gradients, policies, skills

def test_modest_is_an_upper_line():
    assert mechanisms.directions_modest(weights(cosine=0.1), 0.5).verdict == "supported"
    assert mechanisms.directions_modest(weights(cosine=0.9), 0.5).verdict == "contradicted"


def gradients(level, steps=6, noise=0.01):
    rng = np.random.default_rng(0)
    return pd.DataFrame([{"step": s, "group": g, "a": a, "b": b, "cosine": level(a, b) - (g != WHOLE) + rng.normal(0, noise)}
                         for s in range(steps) for g in (WHOLE, "embedding")
                         for i, a in enumerate(DOMAINS) for b in DOMAINS[i + 1:]])


def test_gradients_clash_where_one_pair_does():
    """Catches a mean over pairs, and the groups of weights counted beside the whole."""
    calm = Evidence(gradients=gradients(lambda a, b: 0.05))
    assert mechanisms.gradients_agree(calm, -0.1).verdict == "supported"
    clash = Evidence(gradients=gradients(lambda a, b: -0.4 if (a, b) == ("math", "if") else 0.3))
    found = mechanisms.gradients_agree(clash, -0.1)
    assert found.verdict == "contradicted" and "math with if" in found.note and found.n == 6
    few = mechanisms.gradients_agree(Evidence(gradients=gradients(lambda a, b: 0.0, 2, 0.2)), -0.1)
    assert few.verdict == "undecided" and "steps" in few.needs


def test_nearest_without_the_own_expert():
    kl = divergences(lambda d, e: 0.1 if d == e else 0.2 if (d, e) == ("math", "coding") else 1.0)
    found = Evidence(kl=kl, resamples=300)
    assert mechanisms.nearest(found, "math", "rl-coding", "rl-multi").verdict == "contradicted"
    assert mechanisms.nearest(found, "math", "rl-coding", "rl-multi", without=["rl-math"]).verdict == "supported"


def test_strangers():
    kl = divergences(lambda d, e: 0.1 if d == e else 0.2 if (d, e) in {("math", "coding"), ("coding", "math")} else 1.0)
    def found(levels):
        return Evidence(scores=world(levels, models=(*EXPERT.values(), *PAIRS)), kl=kl, resamples=300)
    near_only = found({"pair-math-coding": 0.1})  # a loss with the neighbour says nothing of strangers
    assert mechanisms.strangers_need_not_help(near_only, ["math", "coding"]).verdict == "undecided"
    assert mechanisms.strangers_need_not_help(found({"pair-math-if": 0.3}), ["math", "coding"]).verdict == "supported"
    gain = found(dict.fromkeys(PAIRS, 0.8))
    assert mechanisms.strangers_need_not_help(gain, ["math", "coding"]).verdict == "contradicted"


def test_skills_on_most_benchmarks():
    most = mechanisms.more_consistent_on_most
    assert most(skilled(False), "merge-ties", ["rl-multi", "mt-opd"]).verdict == "supported"
    assert most(skilled(False), "rl-multi", ["merge-ties"]).verdict == "contradicted"
    assert most(skilled(True), "merge-ties", ["rl-multi", "mt-opd"]).verdict == "undecided"
    differ = mechanisms.gains_differ
    assert differ(skilled(False), ["rl-multi"], ["lcb_v5"], 0.9).verdict == "supported"
    assert differ(skilled(True), ["rl-multi"], ["lcb_v5"], 0.9).verdict == "contradicted"


# -- judges

def test_judges_each_benchmark_and_each_cell():
    def level(m, b, mode):
        special = {("rl-agent", "ifeval"): 0.3, ("rl-multi", "ifeval"): 0.1, ("rl-multi", "lcb_v5"): 0.9}
        return special.get((m, b), 0.95 if m == "rl-agent" else 0.6)
    found = Evidence(judged=judged(level), resamples=300)
    among = list(EXPERT.values())
    assert judging.best_judge(found, "rl-agent", among, "process").verdict == "supported"
    assert judging.best_judge(found, "rl-agent", among, "process", each=True).verdict == "contradicted"
    named = judging.judge_falls(found, "rl-multi", 10, benchmarks=["ifeval"], each=True)
    assert named.verdict == "supported" and named.estimate == pytest.approx(50)
    both = judging.judge_falls(found, "rl-multi", 10, benchmarks=["ifeval", "lcb_v5"], each=True)
    assert both.verdict == "contradicted"
    assert judging.judges_better(found, [["rl-agent", "sft", "process", "aime24"]]).verdict == "supported"
    assert judging.judges_better(found, [["rl-agent", "sft", "process", "ifeval"]]).verdict == "contradicted"


def test_severely_is_more_than_better():
    slight = Evidence(judged=judged(lambda m, b, mode: 0.53 if mode == "outcome" else 0.5, n=300), resamples=300)
    assert judging.outcome_better(slight, ["ifeval"]).verdict == "supported"
    assert judging.outcome_better(slight, ["ifeval"], margin=5).verdict == "contradicted"


def test_passing_wrong_answers_is_not_accuracy():
    """Catches accuracy in its place: a judge that always says yes is right on right answers and passes wrong ones."""
    rows = judged(lambda m, b, mode: 0.5).assign(truth=lambda f: (f["item"] % 2), said=0)
    rows["said"] = np.where(rows["mode"] == "process", 1, rows["truth"])  # process: always yes; outcome: always right
    found = judging.waves_through(Evidence(judged=rows, resamples=300), "ifeval")
    assert found.verdict == "supported" and found.estimate == pytest.approx(100)
    turned = rows.assign(mode=rows["mode"].map({"process": "outcome", "outcome": "process"}))
    assert judging.waves_through(Evidence(judged=turned, resamples=300), "ifeval").verdict == "contradicted"


# -- what is needed, and where to look

def test_items_that_tell_by_hand():
    e = Estimate(10, -4, 24, 40, 50 / 40**0.5)
    assert lines.items_that_tell(e, 0) == 197
    assert lines.items_that_tell(e._replace(se=float("nan")), 0) == 161  # se 28 / 3.92; (2.80 * 45.2 / 10)^2
    assert lines.items_that_tell(e, 10) == float("inf")
    same = Estimate(0.0, -3, 3, 40, 0.0)  # all items agree; within 2 points of it lie log(.025)/log(.98) = 183 items
    assert lines.items_that_tell(same, 2) == 183


def test_a_claim_waits_for_its_slowest_part():
    soon, late = (lines.undecided(Estimate(1, -1, 3, 9, 1), items=n) for n in (30, 300))
    found = lines.every({"a": replace(soon, low=-9), "b": late})
    assert "300 items would tell (b, the slowest of 2 open parts)" in found.needs and found.items == 300
    assert found.needs in found.note and "30 items" not in found.note.replace("300", "")  # one number, not two


def whole(noise, n=30):
    """Evidence with every frame, noisy enough to leave much open."""
    rng = np.random.default_rng(1)
    models = ("base", "sft", *EXPERT.values(), "rl-multi", *scores.MERGES, "mt-opd", *PAIRS)
    rows = world(noise=noise, n=n, models=models)
    angle = weights(cosine=0.0, inner=0.0)
    angle.cosine = angle.cosine.assign(cosine_projected=rng.normal(0.05, 0.3, len(angle.cosine)))
    kl = divergences(lambda d, e: 0.3 + 0.1 * (d == "if") + 0.05 * (e == "agent"))
    kl["kl_exact"] += rng.normal(0, 0.02, len(kl))
    seen = judged(lambda m, b, mode: 0.5 + rng.normal(0, 0.1), n=20)
    return Evidence(scores=rows, along=pd.concat([rows.assign(step=s) for s in (0, 5, 10)]), kl=kl, costs=COSTS,
                    jaccard=angle.jaccard.assign(jaccard=lambda f: f["jaccard"] + rng.normal(-0.15, 0.2, len(f))),
                    cosine=angle.cosine, gradients=gradients(lambda a, b: 0.0, 3, 0.3), resamples=200,
                    judged=seen.assign(truth=seen["item"] % 2, said=seen["item"] % 3 == 0))


@pytest.fixture(scope="module")
def decided():
    return claims.decide(None, whole(0.4))


def test_every_open_verdict_says_what_it_needs(decided):
    verdict = Counter(line["run_verdict"] for line in decided)
    assert verdict["undecided"] > 20 and verdict["not run"] == 3, verdict  # the official model is in no run
    for line in decided:
        assert bool(line["needs"]) == (line["run_verdict"] in ("undecided", "not run")), line["id"]
    assert all(line["needs"] for line in claims.decide(None, Evidence()))
    assert json.loads(json.dumps(decided, allow_nan=False)) == decided


class Recorded(Evidence):
    """Evidence that notes which frames a rule reads."""

    def __init__(self, found: Evidence):
        super().__init__(**{name: getattr(found, name) for name in found.__dataclass_fields__})
        self.read = set()

    def frame(self, name, *columns):
        self.read.add("passed" if name == "judged" and "truth" in columns else "scores" if name == "first" else name)
        return super().frame(name, *columns)

    def measured(self, name):
        self.read.add("scores" if name == "first" else name)  # the same rows, of the first training seed
        return super().measured(name)


def test_the_rows_that_are_named_are_those_that_are_read():
    """Catches a claim whose `where` names other rows than its rule reads."""
    found = whole(0.4)
    for claim in paper.claims():
        if claim["test"] == "combined" or "qwen3-4b-thinking" in str(claim["params"]):
            continue
        seen = Recorded(found)
        claims.judge(claim, seen)
        named = {frame for frame, rules in places.FRAMES.items() if claim["test"] in rules}
        assert seen.read == named, claim["id"]


def cells_of(name):
    return {cell["id"]: "".join(cell["source"])
            for cell in json.loads((ROOT / "notebooks" / f"{name}.ipynb").read_text(encoding="utf-8"))["cells"]}


def test_every_place_exists(decided):
    """Catches a renamed cell or table: a link that leads nowhere, in the sources and in the committed report."""
    published = set()
    for path in (ROOT / "notebooks").glob("*.ipynb"):
        published |= set(re.findall(r'publish_table\("(\w+)"', "\n".join(cells_of(path.stem).values())))
    for line in decided:
        place, name = line["where"], line["id"]
        cell = place["anchor"].removeprefix("cell-id=")
        assert cell in cells_of(place["notebook"]), name
        page, anchor = place["verdict"].split(".html#cell-id=")
        assert ("publish_claims" in cells_of(page)[anchor]), name
        assert place["data"], name
        tables = [file for file in place["data"] if file.startswith("tables/")]
        assert {file[7:-4] for file in tables} <= published, name
        made = ROOT / "reports" / "tiny" / f"{place['notebook']}.html"
        if made.is_file():
            assert f'id="{place["anchor"]}"' in made.read_text(encoding="utf-8"), name
    merged = next(line for line in decided if line["id"] == "shared-footprints")["where"]["data"]
    assert {"weights/jaccard.parquet", "weights/cosine.parquet"} <= set(merged)  # a combined claim: those of its parts


def test_programs_get_all_that_is_decided(decided):
    assert publish.CLAIM_KEYS == claims.KEYS
    for claim in paper.claims():
        assert set(places.where(claim)) == {"notebook", "anchor", "verdict", "data"}
        assert claim["test"] in places.CELLS


def test_verdict_tables_lead_to_cells_and_rows(decided):
    page = site.verdict_table(decided)
    for line in decided:
        assert f'href="{places.link(line["where"])}"' in page and f'href="{line["where"]["verdict"]}"' in page
    old = [{key: value for key, value in line.items() if key not in ("where", "needs")} for line in decided]
    assert "href" not in site.verdict_table(old)  # a report of older code stays readable
    table = grid(verdicts.table(decided), wrap=True).data
    assert table.count("<a href=") == len(decided) and "neighborhoods/kl.parquet" in table


def test_nine_benchmarks_are_named_rightly():
    """Catches a misspelt benchmark or model in claims.yaml, which would read as `not run`."""
    models = {"base", "sft", *EXPERT.values(), "rl-multi", *scores.MERGES, "mt-opd", "qwen3-4b-thinking"}
    for claim in paper.claims():
        p = claim["params"]
        assert set(p.get("benchmarks", ())) <= set(BENCHMARKS), claim["id"]
        assert set(p.get("among", ())) | {p[k] for k in ("model", "a", "b", "expert") if k in p} <= models, claim["id"]
        assert set(p.get("domains", ())) | set(p.get("experts", ())) <= set(DOMAINS), claim["id"]
