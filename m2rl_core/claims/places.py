"""Where a verdict can be followed to: the cell that shows its numbers, and the rows that these rest on.

A cell's id is its anchor in the executed page. Claims made of others rest on the data of all their parts.
"""
from __future__ import annotations

import re

from m2rl_core import paper

NOTEBOOKS = {"1": "4_conclusion", "3.2": "3.2_experiments", "3.3": "3.3_weight_shift", "3.4": "3.4_policy_neighborhoods",
             "3.5": "3.5_same_skills", "3.6": "3.6_self_verification"}
ROWS = {  # frame of the evidence -> the file in the store that it is read from; * stands for the models
    "scores": "eval-*/rows.parquet", "along": "rl-*/along.parquet", "judged": "judge-*/rows.parquet",
    "passed": "judge-*/rows.parquet", "costs": "rl-*/timing.jsonl",
    "jaccard": "weights/jaccard.parquet", "cosine": "weights/cosine.parquet", "kl": "neighborhoods/kl.parquet",
    "gradients": "rl-multi/interference.parquet",
}
FRAMES = {  # frame -> the rules that read it
    "scores": ("no_harm", "lifts", "unmoved", "best_at_home", "higher", "as_good_as_merging", "ranked", "leads", "seesaw",
               "beside_own_experts", "beside_each_expert", "trends_inconsistent", "not_always_superior", "no_link",
               "neighbour_helps", "neighbour_beats_others", "strangers_need_not_help", "gains_overlap", "most_consistent",
               "more_consistent", "more_consistent_on_most", "gains_differ", "judge_correlation",
               "best_generation_and_judge"),
    "along": ("steady", "flat"),
    "costs": ("cheaper", "costs_extra", "costs_differ", "dearest"),
    "gradients": ("gradients_agree",),
    "jaccard": ("changed_share", "overlap_above_chance"),
    "cosine": ("directions_agree", "directions_modest", "reasoning_closer"),
    "kl": ("no_link", "nearest", "asymmetric", "neighbour_helps", "neighbour_beats_others", "strangers_need_not_help"),
    "judged": ("judge_correlation", "process_better", "outcome_better", "judges_better", "best_judge", "judge_falls",
               "judge_keeps", "best_generation_and_judge"),
    "passed": ("waves_through",),
}
CELLS = {  # rule -> (notebook, id of the cell that shows the numbers, published table)
    **dict.fromkeys(("no_harm", "lifts", "unmoved"), ("3.2_experiments", "c-away", "table3")),
    **dict.fromkeys(("higher", "leads"), ("3.2_experiments", "c-table3", "table3")),
    "best_at_home": ("3.2_experiments", "c-home", "expert_gains"),
    **dict.fromkeys(("beside_each_expert", "not_always_superior"), ("3.2_experiments", "c-away", "table3")),
    **dict.fromkeys(("as_good_as_merging", "ranked", "seesaw", "beside_own_experts"),
                    ("3.2_experiments", "c-table4", "table4")),
    **dict.fromkeys(("cheaper", "costs_extra", "costs_differ", "dearest"), ("3.2_experiments", "c-table2", "table2")),
    **dict.fromkeys(("steady", "flat"), ("3.2_experiments", "c-figure2", "")),
    "gradients_agree": ("3.3_weight_shift", "c-interference", ""),
    "changed_share": ("3.3_weight_shift", "c-precision", ""),
    "overlap_above_chance": ("3.3_weight_shift", "c-table5", "table5"),
    **dict.fromkeys(("directions_agree", "directions_modest", "reasoning_closer"), ("3.3_weight_shift", "c-directions", "")),
    **dict.fromkeys(("no_link", "trends_inconsistent"), ("3.4_policy_neighborhoods", "c-link-table", "")),
    "nearest": ("3.4_policy_neighborhoods", "c-figure4", "figure4"),
    "asymmetric": ("3.4_policy_neighborhoods", "c-eq1", "figure4"),
    **dict.fromkeys(("neighbour_helps", "neighbour_beats_others", "strangers_need_not_help"),
                    ("3.4_policy_neighborhoods", "c-table6", "table6_changes")),
    **dict.fromkeys(("gains_overlap", "most_consistent", "more_consistent", "more_consistent_on_most", "gains_differ"),
                    ("3.5_same_skills", "c-figure5-table", "figure5")),
    "judge_correlation": ("3.6_self_verification", "c-correlations", "table7"),
    **dict.fromkeys(("process_better", "outcome_better"), ("3.6_self_verification", "c-figure7", "table7")),
    "waves_through": ("3.6_self_verification", "c-quality", "judges"),
    **dict.fromkeys(("judges_better", "best_judge", "judge_falls", "judge_keeps", "best_generation_and_judge"),
                    ("3.6_self_verification", "c-table7", "table7")),
    "combined": ("4_conclusion", "c-all", ""),
}
# Where a rule is used on another table than it mostly is: section or table -> its place.
ELSEWHERE = {("higher", "3.6"): ("3.6_self_verification", "c-table7", "table7"),
             ("higher", "3.4"): ("3.4_policy_neighborhoods", "c-link-table", ""),
             ("leads", "table 4"): ("3.2_experiments", "c-table4", "table4"),
             ("higher", "table 4"): ("3.2_experiments", "c-table4", "table4"),
             ("leads", "table 8"): ("A_training_details", "code-30-table8", "table8"),
             ("higher", "table 8"): ("A_training_details", "code-30-table8", "table8")}


def where(claim: dict) -> dict:
    """{notebook, anchor, verdict, data} of a claim: page and cell of its numbers, page and cell of its verdict, files.

    `data`: tables of the report (tables/...) and files of the store, whose folders are named by stage.
    """
    notebook, cell, _ = _place(claim)
    return {"notebook": notebook, "anchor": f"cell-id={cell}", "verdict": f"{NOTEBOOKS[claim['section']]}.html#cell-id="
            + ("c-all" if claim["section"] == "1" else "c-claims"), "data": _data(claim)}


def link(place: dict) -> str:
    """The address of a place inside the report."""
    return f"{place['notebook']}.html#{place['anchor']}"


def _place(claim: dict) -> tuple[str, str, str]:
    test, named = claim["test"], re.search(r"\((Table \d)\)", claim["text"])
    keys = [(test, named[1].lower())] if named else []
    return next((ELSEWHERE[key] for key in [*keys, (test, claim["section"])] if key in ELSEWHERE), CELLS[test])


def _data(claim: dict) -> list[str]:
    if claim["test"] == "combined":
        known = {other["id"]: other for other in paper.claims()}
        return list(dict.fromkeys(file for part in claim["params"]["claims"] for file in _data(known[part])))
    table = _place(claim)[2]
    frames = [frame for frame, rules in FRAMES.items() if claim["test"] in rules]
    return [*([f"tables/{table}.csv"] if table else []), *(ROWS[frame] for frame in frames)]
