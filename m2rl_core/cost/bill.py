"""The bill of a profile: one row for each stage, what the trained models cost beside Table 2, and what could be left out.

Where a stage's seconds are from, in this order: it is finished (what it took); it was finished under another key; this
machine's calibration, corrected by how the finished stages of its kind compare with theirs; the cost model on named GPUs.
"""
from __future__ import annotations

import json
import math
from collections.abc import Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from statistics import median

import pandas as pd

from m2rl_core import imports, paper
from m2rl_core.cost import kept, lengths, memory, modelled, plan, shapes, speed, table2
from m2rl_core.cost.machines import machine
from m2rl_core.errors import StudyError
from m2rl_core.specs import ModelSpec, Profile
from m2rl_core.study import Stage, first, work

DEFAULT = "h100"  # where a model does not run on this machine and no GPU is named
LONG = 4096  # answers of so many tokens are those of a reasoning model, whose lengths are Table 2's
FULL, TEXT, STORED = 4, 6, 1.5  # bytes on disk: of a saved weight; of a token as text that was sampled; of one in a real blend
CHECKPOINT = 24  # bytes a weight while a policy trains: itself and both moments, the old and the new as one replaces the other
PROCESS = 5e8  # bytes of a process with torch loaded
SMALL = 5e7  # parameters of the largest model that is calibrated on a CPU


@dataclass(frozen=True)
class Source:
    """What times are from: a calibration of this machine, or a cluster; neither where nothing is known yet."""

    label: str = "not measured yet"
    found: dict | None = None
    cluster: modelled.Cluster | None = None


def shape_of(profile: Profile) -> shapes.Shape:
    """The shape of a profile's models; raises StudyError for one that is neither given, published nor on this machine."""
    if isinstance(profile.model, ModelSpec):
        return shapes.of_spec(profile.model)
    named = [profile.model.source] if profile.model else list(profile.imports.values())
    for source in filter(None, named):
        name = Path(source.partition("@")[0]).name.removesuffix("-Base")
        if name in shapes.published():
            return shapes.published()[name]
        place = imports.find(source)
        if place is not None:
            return shapes.of_config(json.loads((place.folder / "config.json").read_text(encoding="utf-8")))
    if profile.name == "released" or any("M2RL" in source for source in named):
        return shapes.published()["Qwen3-4B"]  # section 3.2
    what = next(filter(None, named), "its models")
    raise StudyError(f"{profile.name}: the shape of {what} is not known: it is neither on this machine nor one of "
                     f"{', '.join(shapes.published())}; put it there first, or fetch it")


def calibratable(profile: Profile) -> bool:
    """Whether a calibration in seconds is possible on a CPU: a small model of the profile's own shape."""
    return isinstance(profile.model, ModelSpec) and shapes.of_spec(profile.model).parameters <= SMALL


@dataclass(frozen=True)
class Given:
    """What the user says of the machines: a GPU's name, how many (0: the most that `resources` give a stage, else as few as
    hold the model), and the tokens a second that each samples and trains on (0: as the fit says). No name: this machine."""

    gpu: str = ""
    gpus: int = 0
    sampling: float = 0.0
    training: float = 0.0

    def check(self) -> None:
        """Raises StudyError for a number that cannot be."""
        for name in ("gpus", "sampling", "training"):
            if getattr(self, name) < 0:
                raise StudyError(f"{name.upper()}={getattr(self, name):g}: must be above 0")


def source(run, given: Given = Given(), measure: bool = False) -> Source:
    """Where this run's times are from; `measure` allows a calibration of seconds. Raises StudyError for an unknown GPU."""
    given.check()
    profile = run.profile
    gpu, gpus = given.gpu or (DEFAULT if given.sampling or given.training or given.gpus else ""), given.gpus
    if not gpu and calibratable(profile):
        found = kept.cached(profile, run.store.root)
        if found is None and measure:
            from m2rl_core.cost import calibrate
            found = calibrate.calibrate(profile, run.store.root)
        return Source("calibrated on this machine", found) if found else Source()
    if not gpu and not measure:
        return Source()
    shape, named = shape_of(profile), machine(gpu or DEFAULT)
    rl, fit = profile.rl, table2.fit()
    tokens = max(speed.MICRO_TOKENS, rl.max_new_tokens + modelled.PROMPT)
    trains = any(stage.kind in ("sft", "rl", "opd") for stage in run.stages.values())
    fewest = speed.sharding(shape, named, 1024, tokens) if trains else memory.sharded_engine(shape, named, 1024)
    stated = max((math.ceil(taken.gpus * taken.nodes) for taken in profile.resources.values()), default=0)
    gpus = gpus or stated or fewest or 1024
    prompt = min(modelled.PROMPT, profile.model.context - rl.max_new_tokens) if profile.model else modelled.PROMPT
    cut = profile.data.row_tokens or (profile.model.context if profile.model else 2 * table2.MEAN)
    row = min(table2.MEAN, cut / 2)
    cluster = modelled.Cluster(
        shape, named, gpus, fit.efficiency, lengths_of(run, fit), rl.max_new_tokens,
        profile.base.batch_tokens if profile.base else 0, profile.sft.batch_size, row, max(1.0, prompt))
    label = f"modelled for {gpus} x {named.name}"
    if given.sampling or given.training:
        cluster, label = at_rates(cluster, given, profile), f"{label}, at the given rates"
    return Source(label, cluster=cluster)


def at_rates(cluster: modelled.Cluster, given: Given, profile: Profile) -> modelled.Cluster:
    """The cluster at the efficiency that gives the user's tokens a second, in a step of the profile's mixed run."""
    rl = profile.rl
    spread = lengths.quantiles(sum(cluster.lengths.values()) / len(cluster.lengths), cluster.longest)
    reference = speed.Work(rl.prompts * rl.group, cluster.prompt, spread, cluster.longest, rl.group)
    found = speed.step(cluster.shape, cluster.machine, cluster.gpus, reference, cluster.efficiency)
    if found.why:
        raise StudyError(f"GPUS={cluster.gpus} of {cluster.machine.name} are too few: {found.why}; name more of them")
    reached = speed.reaching(cluster.shape, cluster.machine, cluster.gpus, reference, cluster.efficiency, given.sampling,
                             given.training)
    return replace(cluster, efficiency=reached)


def lengths_of(run, fit: table2.Fit | None = None) -> dict[str, float]:
    """Mean tokens of an answer by domain: of finished training here, else what Table 2 implies, else half of the longest.

    Without `fit` only what was measured.
    """
    longest = run.profile.rl.max_new_tokens
    found = {} if fit is None else {
        d: min(0.9 * longest, fit.lengths.get(d, fit.mean)) if longest >= LONG else longest / 2 for d in run.members.experts}
    return found | _told(run, "length")


def learnt_of(run) -> dict[str, float]:
    """The share of groups with an advantage by domain, where the domain's expert was trained here."""
    return {domain: 1 - share for domain, share in _told(run, "skipped_groups").items()}


def _told(run, what: str) -> dict[str, float]:
    """The mean over all steps of one column of metrics.jsonl, by domain, of experts that were trained here."""
    found = {}
    for domain, model in run.members.experts.items():
        path = run.store.folder(run.stages[model]) / "metrics.jsonl" if model in run.stages else Path()
        if path.is_file():
            lines = [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]
            found[domain] = sum(line[what] for line in lines) / len(lines)
    return found


def frame(run, given: Given = Given(), measure: bool = False) -> pd.DataFrame:
    """One row a stage: work, tokens at most and as expected, seconds with range and bound, bytes, and where times are from."""
    here = source(run, given, measure)
    known = here.cluster.lengths if here.cluster else lengths_of(run)
    learnt = learnt_of(run)
    costs = {name: _cost(run, here, stage, known, learnt) for name, stage in run.stages.items()}
    taken = {name: run.expected_seconds(name) for name in run.stages} if not here.cluster else {}
    factors = corrections(run, costs, taken)
    shape = shape_of(run.profile) if here.found or here.cluster else None
    rows = []
    for name, stage in run.stages.items():
        cost, label, done = costs[name], here.label, run.has(name)
        if taken.get(name) is not None:
            cost, label = plan.Cost(*[taken[name]] * 4), "measured here"
        elif cost and stage.kind in factors:
            cost, label = cost.times(factors[stage.kind]), f"{label}, x {factors[stage.kind]:.2f} by finished ones"
        cost = cost or plan.Cost(*[math.nan] * 4)
        parts = plan.parts(stage, run.profile.benchmarks)
        rows.append({
            "stage": name, "kind": stage.kind, "done": done, **work(stage), "expected tokens": tokens_of(parts, known, here),
            "seconds": cost.seconds, "low": cost.low, "high": cost.high, "most": cost.most,
            "gpus": here.cluster.gpus if here.cluster else 0,
            "disk": disk(run, stage, parts, shape, known, here), "memory": memory_of(run, stage, shape, here), "from": label})
    found = pd.DataFrame(rows)
    return found.astype(dict.fromkeys(("seconds", "low", "high", "most", "disk", "memory"), float))


def _cost(run, here: Source, stage: Stage, known: Mapping[str, float], learnt: Mapping[str, float]) -> plan.Cost | None:
    own = run.profile.benchmarks
    if here.found:
        return plan.calibrated(here.found, stage, run.profile.rl.max_new_tokens, own, known, learnt)
    if here.cluster:
        few, many = (plan.parts(stage, own, share) for share in plan.LEARNS)
        return modelled.modelled(here.cluster, plan.parts(stage, own, learnt), few, many, table2.error())
    return None


def corrections(run, costs: Mapping[str, plan.Cost | None], taken: Mapping[str, float | None]) -> dict[str, float]:
    """By kind, the median of what finished stages took over what they were estimated to take."""
    ratios: dict[str, list[float]] = {}
    for name, seconds in taken.items():
        if seconds and costs[name] and costs[name].seconds:
            ratios.setdefault(run.stages[name].kind, []).append(seconds / costs[name].seconds)
    return {kind: median(found) for kind, found in ratios.items()}


def tokens_of(parts: plan.Parts, told: Mapping[str, float], here: Source) -> float:
    """Sampled tokens as expected; NaN where no length is known."""
    known = {d: f["length"] for d, f in here.found["domains"].items()} | dict(told) if here.found else dict(told)
    if not known:
        return math.nan
    return sum(call.times * n * (call.judge_length(known) if call.judge else known.get(domain, max(known.values())))
               for call in parts.calls for domain, n in call.rollouts.items())


def disk(run, stage: Stage, parts: plan.Parts, shape: shapes.Shape | None, told: Mapping[str, float], here: Source) -> float:
    """Bytes that a finished stage keeps: a model in float32 (one that is brought as it is, or as the hub's, in bfloat16), its
    answers as text, the rows of a real blend; a sweep keeps no models."""
    if shape is None:
        return math.nan
    if stage.kind == "import" and "layers" in stage.settings:
        return 2 * len(stage.settings["layers"]) * shape.layer  # bfloat16, as models are published
    if stage.kind == "import":
        place = imports.find(imports.source_of(run.profile, stage.name))
        files = imports.files(place.folder) if place else ()
        return float(sum(path.stat().st_size for path in files)) if place else float(memory.HALF * shape.parameters)
    kept = FULL * shape.parameters if stage.kind in ("base", "sft", "rl", "opd", "merge") else 0
    if stage.kind == "sft" and run.profile.rows == "real":
        kept += STORED * table2.MEAN * stage.settings["rows"]
    return kept + (TEXT * tokens_of(parts, told, here) if stage.kind in ("eval", "judge", "sweep") else 0)


def memory_of(run, stage: Stage, shape: shapes.Shape | None, here: Source) -> float:
    """Bytes at the peak: of this machine's memory, or of each GPU (training and sampling take turns there)."""
    if shape is None:
        return math.nan
    trains = stage.kind in ("base", "sft", "rl", "opd")
    samples = stage.kind not in ("base", "sft", "merge", "weights", "import")
    longest = run.profile.rl.max_new_tokens
    if here.cluster is None:
        tokens = min(plan.BATCH, run.profile.rl.prompts * run.profile.rl.group) * run.profile.model.context
        held = shape.key_values(4) * tokens if samples else 0
        trained = memory.training(shape, 1, 4096, checkpointed=False, plain=True).total if trains else 4 * shape.parameters
        return PROCESS + held + trained
    c = here.cluster
    shard = speed.sharding(shape, c.machine, c.gpus, max(speed.MICRO_TOKENS, longest + c.prompt)) or c.gpus
    trained = memory.training(shape, shard, max(speed.MICRO_TOKENS, longest + c.prompt)).total if trains else 0.0
    return max(trained, run.profile.gpu_memory * c.machine.memory if samples else 0.0)


def beside_paper(found: pd.DataFrame) -> pd.DataFrame:
    """Table 2's rows: GPU hours as printed and of this estimate, tokens, seconds; of the models that the profile trains."""
    printed, ours = paper.table(2), found.set_index("stage")
    names = [name for name in printed.index if name in ours.index and ours.loc[name, "kind"] in ("rl", "opd")]
    return pd.DataFrame([{
        "model": name, "GPU hours (paper)": printed.loc[name, "gpu_hours"], "steps (paper)": printed.loc[name, "steps"],
        "steps": ours.loc[name, "steps"], "seconds": ours.loc[name, "seconds"], "tokens": ours.loc[name, "expected tokens"],
        "hours": ours.loc[name, "seconds"] * max(1, ours.loc[name, "gpus"]) / 3600} for name in names])


def skippable(run, found: pd.DataFrame) -> pd.DataFrame:
    """What could be left out: with all that needs it, what that saves of what is not spent yet, and what is lost."""
    seconds = found[~found["done"]].set_index("stage")["seconds"]
    lost_with = {}
    for label, names in choices(run).items():
        gone = downstream(run.stages, names)
        if gone:
            lost_with[label] = gone
    from m2rl_core.jobs.tasks import CHAPTERS, notebook_stages
    wanted = {chapter: set(notebook_stages(run, chapter)) for chapter in CHAPTERS}
    lines = []
    for label, gone in lost_with.items():
        lost = [chapter for chapter, stages in wanted.items() if chapter != "4" and stages & gone]
        lines.append({"without": label, "stages": len(gone), "saves": float(seconds.reindex(list(gone)).sum()), "share": 0.0,
                      "lost or poorer": ", ".join(lost) or "–"})
    every = float(seconds.sum())
    for line in lines:
        line["share"] = line["saves"] / every if every else 0.0
    return pd.DataFrame(lines, columns=["without", "stages", "saves", "share", "lost or poorer"]).sort_values(
        "saves", ascending=False, ignore_index=True)


def choices(run) -> dict[str, list[str]]:
    """What one may do without: every model but SFT, trained or brought, and every group of merges and analyses."""
    names = list(run.stages)
    found = {model: [model] for model in run.members.models if model != "sft" and not model.startswith("merge-")
             and (model != "base" or "base" not in run.stages["sft"].needs)}
    found |= {
        "further seeds": [n for n in names if first(n) != n], "pairs": [n for n in names if n.startswith("pair-")],
        "subsets": [n for n in names if n == "subsets"], "sweep": [n for n in names if n == "sweep"],
        "self-verification": [n for n in names if n.startswith("judge-")], "weights": [n for n in names if n == "weights"],
        "neighborhoods": [n for n in names if n == "neighborhoods"], "merges": [n for n in names if n.startswith("merge-")]}
    return {label: stages for label, stages in found.items() if stages}


def downstream(stages: Mapping[str, Stage], names) -> set[str]:
    """These stages and all that need one of them, however far on; of what is in the study."""
    gone = {name for name in names if name in stages}
    for stage in stages.values():
        if not gone.isdisjoint(stage.needs):
            gone.add(stage.name)
    return gone
