"""A run: one profile and its store. Notebooks and the command line ask it for things by name.

`run.need("rl-math")` gives the finished folder and makes first what is missing, under the store's lock.
The readers below return tidy frames, one row an observation. Builders are imported when they are used,
so nothing here imports torch.
"""
from __future__ import annotations

import contextlib
import importlib
import json
import os
import shutil
import socket
import sys
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from m2rl_core import domains, imports, layers, progress, ranks
from m2rl_core.errors import StudyError
from m2rl_core.jobs import launch, remote
from m2rl_core.profile import TOGETHER, Profile, load_profile, repo_root
from m2rl_core.provenance import provenance
from m2rl_core.publishing import publish
from m2rl_core.store import NOT_RUN, STATE, DiskFull, Store, command, is_disk_full
from m2rl_core.study import Members, NotInStudy, Stage, find, first, seed_of, seeds_of, study, upstream, work

if TYPE_CHECKING:
    import pandas as pd

BUILDERS = {
    "base": "m2rl_core.training.sft:build_base", "sft": "m2rl_core.training.sft:build_sft",
    "rl": "m2rl_core.training.grpo:build", "opd": "m2rl_core.training.opd:build",
    "merge": "m2rl_core.merging:build", "eval": "m2rl_core.evaluate:build",
    "weights": "m2rl_core.metrics.weights:build", "kl": "m2rl_core.metrics.divergence:build",
    "judge": "m2rl_core.judge:build", "sweep": "m2rl_core.sweep:build", "import": "m2rl_core.layers:build",
}


class MissingArtifact(LookupError):
    """Something that was asked for is not made yet; the message says what makes it and how long that takes."""


@dataclass(frozen=True)
class BuilderContext:
    """What a builder gets: it reads `inputs`, writes its files into `out` and what it needs to resume into `state`.

    `seed` is this stage's own, from the profile's seed and the stage's name. `inputs` go by the names of the first
    training seed, so a builder makes every seed's stage alike.
    """

    profile: Profile
    stage: Stage
    inputs: dict[str, Path]
    out: Path
    state: Path
    progress: progress.Progress
    log: Callable[[str], None]
    seed: int


class Run:
    """One profile's study: `stages` by name, `store` for what is made, `root` the folder of all stores.

    `source` is what the profile is asked for by: its name or its file.
    """

    def __init__(self, profile: Profile, root: Path, source: str = ""):
        self.profile = profile
        self.root = root
        self.source = source or profile.name
        domains.own(profile.files)
        domains.LABELS.clear()
        if profile.eval.rows == "real":
            from m2rl_core.real import benchmarks
            domains.LABELS.update(benchmarks.labels(profile.eval))
        self.stages = study(profile)
        self.members = Members.of(profile)
        self.store = Store(root / profile.name, profile.jobs, remote.opened(profile.name))
        self.others: Callable[[Path], launch.Others] | None = None  # a cluster's other nodes, for a stage that takes several

    # Making ---------------------------------------------------------------------------------------

    def has(self, name: str) -> bool:
        """Whether the stage is finished."""
        return self.store.is_complete(find(self.stages, name))

    def path(self, name: str) -> Path:
        """The finished folder; raises MissingArtifact or CorruptArtifact."""
        stage = find(self.stages, name)
        if not self.store.is_complete(stage):
            left = self.missing(name)
            known = [self.expected_seconds(part) for part in left]
            cost = f"about {progress.duration(sum(known))}" if None not in known else "a time not measured yet"
            raise MissingArtifact(f"{name} is not made yet: `{command()} run {name} --profile "
                                  f"{self.profile.name}` makes it ({len(left)} stages, {cost})")
        return self.store.open(stage)

    def need(self, name: str) -> Path:
        """The finished folder; makes it and whatever it lacks first. Raises DiskFull, CorruptArtifact."""
        away = ranks.agree([part for part in self.missing(name) if self.stages[part].settings.get("found") is False])
        for part in away:  # a model's key is its content's: what needs it has no key before it is here
            if ranks.first():
                brought = layers if "layers" in self.stages[part].settings else imports
                brought.fetch(imports.source_of(self.profile, part))
            ranks.agree(part)
        if away:
            self.stages = study(self.profile)
        for part in ranks.agree(self.missing(name)):
            if not ranks.launched() and launch.taken(self.profile, self.stages[part].kind).config:
                launch.make(self, self.stages[part])
            elif ranks.first():
                with ranks.alone() if self.stages[part].kind not in TOGETHER else contextlib.nullcontext():
                    self._make(self.stages[part])
            elif self.stages[part].kind in TOGETHER:
                self._help(self.stages[part])
            ranks.agree(part)
        for stage in upstream(self.stages, name) if ranks.first() else ():
            self.store.offer(stage)  # it may have been made before there was an address
        return self.path(name)

    def need_seeds(self, model: str) -> list[Path]:
        """The finished folders of a policy on every training seed, the first one first."""
        return [self.need(name) for name in seeds_of(model, self.profile.seeds).values()]

    def missing(self, name: str) -> list[str]:
        """What `need(name)` would make, in order; inputs of finished stages do not count."""
        if self.has(name):
            return []
        wanted = {name}
        for stage in reversed(upstream(self.stages, name)):
            if stage.name in wanted and not self.has(stage.name):
                wanted.update(stage.needs)
        return [part for part in self.stages if part in wanted and not self.has(part)]

    def rebuild(self, name: str) -> Path:
        """Make a stage again; the old folder is moved to set-aside/, not removed."""
        stage = find(self.stages, name)
        if ranks.first():
            with self.store.lock_all(f"{name} (set aside)", progress.say):
                self.store.set_aside(stage)
        ranks.agree(name)
        return self.need(name)

    def seed(self, name: str) -> int:
        """A stage's own seed in [0, 2^31)."""
        return seed_of(self.profile.seed, name)

    def _make(self, stage: Stage) -> None:
        with self.store.lock(stage.name, progress.say) as lease:
            if ranks.agree(self.store.is_complete(stage)):  # another process made it while this one waited
                return self.store.sweep(stage)
            inputs = self._inputs(stage)
            out = self.store.begin(stage, progress.say)
            try:
                with self.store.copies(stage, progress.say) as look:
                    spent = _Spent(out / STATE / "seconds", lease.check, look)
                    shown = progress.Progress(stage.name, spent.tick, out / STATE / progress.TRACE)
                    build, context = self._ready(stage, inputs, out, shown)
                    build(context)
                facts = {"seed": context.seed, "seconds": round(spent.before + shown.seconds, 1), **provenance()}
                if ranks.launched():
                    facts["processes"] = ranks.size()
                if stage.settings.get("engine") == "vllm":
                    from m2rl_core.engines import vllm_engine
                    facts["packages"]["vllm"] = vllm_engine.version(vllm_engine.servers_of(self.profile))
                lease.check()
                self.store.finish(stage, facts)
            except Exception as error:  # only to give one cause a name of its own; all others pass unchanged
                if not is_disk_full(error) and shutil.disk_usage(out).free > 2**20:
                    raise
                raise DiskFull(f"{stage.name}: no space left in {self.root}; make room and start again: "
                               "it goes on from its last checkpoint") from error
            shown.close()

    def _help(self, stage: Stage) -> None:
        """What a rank other than the first does for a stage: the same, but what it writes is for nobody."""
        if not ranks.agree(None):
            build, context = self._ready(stage, self._inputs(stage), ranks.scratch(), progress.Silent(stage.name))
            build(context)

    def _inputs(self, stage: Stage) -> dict[str, Path]:
        for name in stage.needs if not ranks.first() else ():
            if not self.has(name):
                raise StudyError(f"rank {ranks.rank()} on {socket.gethostname()} does not see {name} in {self.store.root}, "
                                 "which rank 0 does: let M2RL_ARTIFACTS be a folder that all machines share")
        return {first(name): self.path(name) for name in stage.needs}

    def _ready(self, stage: Stage, inputs: dict[str, Path], out: Path,
               shown: progress.Progress) -> tuple[Callable, BuilderContext]:
        """A stage's builder, and what it gets."""
        module, function = BUILDERS[stage.kind].split(":")
        build = getattr(importlib.import_module(module), function)
        if "torch" in sys.modules:
            from m2rl_core import cpu
            cpu.settle(max(1, self.profile.threads_of(stage.kind) // ranks.here()))
        return build, BuilderContext(self.profile, stage, inputs, out, out / STATE, shown, shown.log, self.seed(stage.name))

    # Cost -----------------------------------------------------------------------------------------

    def expected_seconds(self, name: str) -> float | None:
        """Measured seconds of the newest finished stage of that name in this profile; None if there is none.

        Where that one had other settings, in proportion to the work. What was never made on its training seed takes as
        long as on the first.
        """
        stage = find(self.stages, name)
        found = _measured(self.store.root, stage)
        if not found:
            return None
        then, now = (done["tokens"] or done["steps"] for done in (found[1], work(stage)))
        return found[0] * now / then if then and now else found[0]

    def estimate(self) -> pd.DataFrame:
        """One row a stage: done, steps, rollouts, tokens (at most), seconds and where these are from; see `cost.bill.frame`.

        Measures nothing: what was neither made nor can be told from this machine's calibration (`make estimate` makes
        it) has no seconds (NaN).
        """
        from m2rl_core.cost import bill
        return bill.frame(self)

    # Reading --------------------------------------------------------------------------------------

    def table(self, name: str, file: str) -> pd.DataFrame:
        """One Parquet (or .jsonl) file of a stage, made first where it is missing."""
        import pandas as pd
        stage = find(self.stages, name)
        path = self.need(name) / file
        if not path.is_file() and stage.kind == "import":
            raise NotInStudy(f"{name} is brought, not trained here: there is no {file}")
        if not path.is_file():
            there = ", ".join(sorted(part.name for part in path.parent.iterdir()))
            raise MissingArtifact(f"{name} has no file {file}; it has {there}")
        return pd.read_json(path, lines=True) if path.suffix == ".jsonl" else pd.read_parquet(path)

    def scores(self, models: Iterable[str] | None = None) -> pd.DataFrame:
        """Evaluation rows of these models (all of the study's): one for each (model, benchmark, item, sample).

        With several training seeds also one for each `seed` from 1, and seed 0 for what these share (base, sft); models
        that are all shared have no such column.
        """
        import pandas as pd
        names = [(model, seed, name) for model in models or self.members.models
                 for seed, name in seeds_of(model, self.profile.seeds).items()]
        if self.profile.seeds == 1 or not any(seed for _, seed, _ in names):
            return self._shown(self._stack(f"eval-{name}" for _, _, name in names))
        return self._shown(pd.concat([self.table(f"eval-{name}", "rows.parquet").assign(model=model, seed=seed)
                                      for model, seed, name in names], ignore_index=True))

    def _shown(self, rows: pd.DataFrame) -> pd.DataFrame:
        """The rows without the texts of those real benchmarks whose authors ask that items be published nowhere."""
        if self.profile.eval.rows == "real":
            from m2rl_core.real.benchmarks import PRIVATE
            rows.loc[rows["benchmark"].isin(PRIVATE), ["prompt", "response"]] = "(not to be published: it is in the store)"
        return rows

    def not_run(self) -> dict[str, str]:
        """Benchmarks that some finished evaluation went on without, each with one line why; empty where all were had."""
        found = {}
        for name, stage in self.stages.items():
            if stage.kind == "eval" and self.has(name) and (path := self.store.fetch(stage) / NOT_RUN).is_file():
                found |= json.loads(path.read_text(encoding="utf-8"))
        return found

    def seconds_a_rollout(self, model: str) -> float:
        """What one sample of one item took when the model was evaluated, verified and all; the mean over its seeds."""
        names = [f"eval-{name}" for name in seeds_of(model, self.profile.seeds).values()]
        return sum(self.manifest(name)["seconds"] / work(self.stages[name])["rollouts"] for name in names) / len(names)

    def judged(self, models: Iterable[str] | None = None) -> pd.DataFrame:
        """Self-verification rows (section 3.6) of these models (those of Table 7)."""
        return self._stack(f"judge-{model}" for model in models or self.members.judged)

    def steps(self, model: str) -> pd.DataFrame:
        """What was recorded at each training step: reward, length, entropy, ..."""
        return self.table(model, "metrics.jsonl")

    def timing(self, model: str) -> pd.DataFrame:
        """Seconds and tokens of each training step."""
        return self.table(model, "timing.jsonl")

    def along(self, model: str | None = None) -> pd.DataFrame:
        """Evaluation rows on the way, one for each (model, step, benchmark, item, sample); all policies by default."""
        import pandas as pd
        names = [model] if model else self.members.trained
        if not names:
            raise NotInStudy("no policy is trained in this profile")
        return pd.concat([self.table(name, "along.parquet") for name in names], ignore_index=True)

    def rollouts(self, model: str) -> pd.DataFrame:
        """Sample rollouts of a training run."""
        return self.table(model, "rollouts.jsonl")

    def manifest(self, name: str) -> dict:
        """How a finished stage was made."""
        self.path(name)
        return self.store.manifest(self.stages[name])

    def _stack(self, names: Iterable[str]) -> pd.DataFrame:
        import pandas as pd
        found = [self.table(name, "rows.parquet") for name in names]
        if not found:
            raise NotInStudy("no model of this profile is judged")
        return pd.concat(found, ignore_index=True)

    # Publishing: files of the report; nothing is written unless its runner asks for it --------------

    def publish_table(self, name: str, frame: pd.DataFrame) -> pd.DataFrame:
        """tables/<name>.csv of the report; returns the frame, to be shown."""
        if frame is None:
            raise NotInStudy(f"nothing that {name} is made of is trained or measured by this profile")
        return publish.table(name, frame)

    def publish_figure(self, name: str, chart):
        """figures/<name>.png and .vl.json of the report; returns the chart, to be shown."""
        return publish.figure(name, chart)

    def publish_claims(self, section: str, claims: Iterable) -> list[dict]:
        """The verdicts of a section, for this store and for claims.json of the report; returns them as dicts."""
        return publish.claims(self.store.root / "claims", section, claims)

    def claims(self) -> list[dict]:
        """All verdicts so far: the report's while it is made, else the store's."""
        return publish.read_claims(self.store.root / "claims")


def open_run(profile: str | Path, root: Path | str | None = None) -> Run:
    """The run of a profile; its store is root/<profile>. `root`: else M2RL_ARTIFACTS, else artifacts/ of the clone."""
    root = root or os.environ.get("M2RL_ARTIFACTS") or repo_root() / "artifacts"
    if "://" in str(root):
        raise StudyError(f"M2RL_ARTIFACTS={root}: a store is a folder, since it renames folders and makes files that only "
                         f"one may make, which object stores cannot; set {remote.SETTING}={root} for copies there, and let "
                         "M2RL_ARTIFACTS be a folder of this machine")
    is_file = str(profile).endswith((".yaml", ".yml"))
    return Run(load_profile(profile), Path(root).absolute(), str(Path(profile).absolute()) if is_file else str(profile))


def _measured(folder: Path, stage: Stage) -> tuple[float, dict] | None:
    """Seconds and amount of work of the newest finished stage of that name (else of its first seed's) in a store."""
    found = [path for name in dict.fromkeys((stage.name, first(stage.name)))
             for path in sorted(folder.glob(f"{stage.group}/{name}-*/manifest.json"), key=lambda p: -p.stat().st_mtime_ns)
             if len(path.parent.name) == len(name) + 9]
    for path in found:
        old = json.loads(path.read_text(encoding="utf-8"))
        past = Stage(stage.name, stage.kind, (), old["settings"], old["version"], {})
        if past.settings.keys() == stage.settings.keys():
            return old["seconds"], work(past)
    return None


class _Spent:
    """Seconds that a stage has taken over all its attempts, kept in its state/ as long as `check` does not raise.

    `after` is called when they are written.
    """

    def __init__(self, path: Path, check: Callable[[], None] = lambda: None, after: Callable[[], None] = lambda: None):
        self.path, self.check, self.after = path, check, after
        self.before = float(path.read_text()) if path.is_file() and path.read_text() else 0.0

    def tick(self, seconds: float) -> None:
        self.check()
        self.path.write_text(f"{self.before + seconds:.1f}")
        self.after()
