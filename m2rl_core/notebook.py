"""The set-up cell of every notebook: `run = start(profile, "3.3")` opens the run and shows its card."""
from __future__ import annotations

import os
import sys

from IPython import get_ipython
from IPython.display import Markdown, display

from m2rl_core.cost import shapes
from m2rl_core.pictures.drawing import show_pictures
from m2rl_core.provenance import commit, machine, packages
from m2rl_core.publishing import not_run
from m2rl_core.run import Run, open_run
from m2rl_core.specs import ModelSpec
from m2rl_core.study import MODELS, left_out_for


def start(profile: str, section: str) -> Run:
    """Open the profile's run, draw charts as PNG (JupyterLab: to hover and click; offline too) and display the run card.

    The card holds no time, so that the same results give the same notebook. Raises ProfileError.
    """
    run = open_run(profile)
    show_pictures()
    if (not run.members.whole or run.not_run() or run.profile.eval.rows == "real") and (shell := get_ipython()) is not None:
        not_run.install(shell)
    if "torch" in sys.modules:
        sys.modules["torch"].set_num_threads(run.profile.threads)
    else:
        os.environ.setdefault("OMP_NUM_THREADS", str(run.profile.threads))
    display(Markdown(card(run, section)))
    return run


def card(run: Run, section: str) -> str:
    """A Markdown table of what a reader must know to judge the numbers below it."""
    profile, here, versions = run.profile, machine(), packages()
    lines = {
        "section": section,
        "profile": f"`{profile.name}`: {profile.about}",
        "model": _model(profile),
        **({"not run": f"{', '.join(left)}: {left_out_for(profile)}"} if (left := left_out(run)) else {}),
        **({"layers": f"weights are looked at in {', '.join(map(str, only))} alone (counted from 0), also where a text says "
                      "every layer"} if (only := profile.analysis.layers) else {}),
        **_without(run),
        "seed": f"{profile.seed} ({profile.seeds} run{'s of every policy after SFT' if profile.seeds > 1 else ''})",
        "code": f"commit {commit()}",
        "software": f"Python {here['python']}, torch {versions['torch']}, transformers {versions['transformers']}",
        "machine": f"{here['cores']} cores, {here['memory_gb']:.0f} GB, {here['system']} {here['processor']}",
    }
    return "\n".join(["| run card | |", "|---|---|", *(f"| {key} | {value} |" for key, value in lines.items())])


def _model(profile) -> str:
    model = profile.model
    if isinstance(model, ModelSpec):
        millions = shapes.of_spec(model).parameters / 1e6
        return (f"Qwen3, {millions:.2f} M parameters ({model.layers} layers, width {model.hidden}, {model.vocab} tokens), "
                f"context {model.context}")
    brought = ", ".join(f"{name} from `{source}`" for name, source in profile.imports.items() if source)
    return "; ".join(filter(None, [model and f"base `{model.source}`, context {model.context}", brought]))


def _without(run: Run) -> dict[str, str]:
    """Lines of the card on benchmarks that could not be had, and what that means for means."""
    missing = run.not_run()
    lines = {f"not run: {name}": line.removeprefix(f"{name} is not run: ") for name, line in missing.items()}
    others = sum(name not in missing for name in run.profile.benchmarks)
    return lines | ({"means of benchmarks": f"of the other {others} here"} if missing else {})


def left_out(run: Run) -> list[str]:
    """The paper's models that a profile's study does not have."""
    return [name for name in MODELS if name not in run.members.models]


def seeds_note(run: Run, section: str) -> Markdown | None:
    """What a section does not show of the training seeds: of one, where scores are compared; of several, everywhere."""
    n = run.profile.seeds
    one = "One training run of each policy: the intervals cover the choice of items and the samples, not another run."
    pooled = (f"Scores are pooled over {n} training seeds and their intervals cover these, all of one SFT model: another SFT "
              "run is not shown.")
    told = {
        "3.2": [one] if n == 1 else [pooled, "Costs, accuracy on the way, diagnoses of merges and the sweep are the first "
                                     "seed's."],
        "4": [one] if n == 1 else [pooled, "Weights, policies, skills and judging are the first seed's."],
    }.get(section, [f"There are {n} training seeds of each policy; this notebook looks at the first."] if n > 1 else [])
    return Markdown("\n".join(f"* {line}" for line in told)) if told else None
