"""What there is to do on a cluster: the study's unmade stages as tasks of their own, and which of them a notebook reads."""
from __future__ import annotations

from collections.abc import Iterable
from dataclasses import replace
from typing import TYPE_CHECKING

from m2rl_core.jobs.schedule import Task
from m2rl_core.study import MERGES, SHARED, find, seeds_of

if TYPE_CHECKING:
    from m2rl_core.run import Run

CHAPTERS = ("0", "1", "2", "3.1", "3.2", "3.3", "3.4", "3.5", "3.6", "4", "A", "B", "C")
TRAIN = "3.2_train"  # the notebook that is executed once for each policy


def with_stages(notebooks: list[Task], run: Run) -> list[Task]:
    """The unmade stages that the notebooks read, as tasks for the nodes, then the notebooks, which wait for them."""
    reads = {task.name: notebook_stages(run, task.name) for task in notebooks}
    stages = stage_tasks(run, [name for names in reads.values() for name in names], after=("0_plan",))
    return stages + [replace(task, needs=(*task.needs, *reads[task.name])) for task in notebooks]


def stage_tasks(run: Run, names: Iterable[str], after: tuple[str, ...] = ()) -> list[Task]:
    """These stages and all that they lack as tasks for the nodes, in the order of the study."""
    wanted = {part for name in dict.fromkeys(names) for part in run.missing(name)}
    return [Task(name, "nodes", name, stage.needs, after) for name, stage in run.stages.items() if name in wanted]


def notebook_stages(run: Run, notebook: str) -> list[str]:
    """The stages that a notebook (or one execution of it, or its chapter: 3.3) reads; raises UnknownStage for none such."""
    def on_all_seeds(models):
        return [policy for model in models for policy in seeds_of(model, run.profile.seeds).values()]

    members = run.members
    trained, models = on_all_seeds(members.trained), [f"eval-{policy}" for policy in on_all_seeds(members.models)]
    learned = [model for model in members.models if model not in (*SHARED, *MERGES)]
    chapters = {
        "0": [], "1": [], "2": [], "3.1": ["sft", "eval-base", "eval-sft"], "3.2": [*trained, *models, "sweep"],
        "3.3": ["weights", *models, *learned], "3.5": models,
        "3.4": ["neighborhoods", "subsets", *(n for n in run.stages if n.startswith("eval-pair-")), *models],
        "3.6": [*(n for n in run.stages if n.startswith("judge-")), *models], "4": list(run.stages),
        "A": ["sft", *learned, *(f"eval-{model}" for model in ("base", *MERGES))], "B": [], "C": [],
    }
    policy = notebook.removeprefix(f"{TRAIN}.")
    chapter = notebook.split("_")[0]
    if policy in members.trained and policy != notebook:
        chapters[chapter] = [*on_all_seeds([policy]), "eval-sft"]
    if chapter not in chapters:
        find(run.stages, notebook)
    return [stage for stage in chapters[chapter] if stage in run.stages]
