"""Our reward in verl: `reward.custom_reward_function.path=pkg://m2rl_core.adapters.verl`, its name `compute_score`.

verl 0.9.1 calls `compute_score(data_source=, solution_str=, ground_truth=, extra_info=, ...)` from a pool of threads, one
answer a call, and takes a number or a dict whose "score" is the reward and whose keys become columns of the batch
(verl-project/verl: verl/experimental/reward_loop/reward_manager/naive.py; how the function is found:
verl/trainer/ppo/reward.py, and `load_module` in verl/utils/import_utils.py). The older batch manager calls with lists
(verl/workers/reward_manager/batch.py), as `compute_scores` takes them. `solution_str` comes without special tokens.
"""
from __future__ import annotations

from m2rl_core.adapters import scoring
from m2rl_core.domains import Verdict

WHERE = "verl's extra_info"


def compute_score(data_source, solution_str, ground_truth, extra_info=None, **kwargs) -> dict[str, float]:
    """`score` and `acc`, both the reward in [0, 1], and `verifier_failed`, 0 or 1; StudyError for a file of another make."""
    return _told(scoring.ask(scoring.row_of(extra_info, WHERE), solution_str).result())


def compute_scores(data_sources, solution_strs, ground_truths, extra_infos, **kwargs) -> list[dict[str, float]]:
    """The same for a whole batch, in order."""
    asked = [scoring.ask(scoring.row_of(info, WHERE), text) for text, info in zip(solution_strs, extra_infos, strict=True)]
    return [_told(future.result()) for future in asked]


def _told(verdict: Verdict) -> dict[str, float]:
    """Every answer with the same keys: verl makes a column of each (`acc` is what its validation reports)."""
    return {"score": verdict.score, "acc": verdict.score, "verifier_failed": float(verdict.failed)}
