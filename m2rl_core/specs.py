"""What a profile says, as frozen dataclasses; the values stand in params/<name>.yaml and nowhere else."""
from __future__ import annotations

from dataclasses import MISSING, asdict, dataclass, field, fields
from pathlib import Path
from typing import Literal

from m2rl_core.domains import BENCHMARKS, DOMAINS


@dataclass(frozen=True)
class ModelSpec:
    """A Qwen3 of this shape; `vocab` and `context` in tokens."""

    hidden: int
    layers: int
    heads: int
    kv_heads: int
    head_dim: int
    intermediate: int
    vocab: int
    context: int


@dataclass(frozen=True)
class PretrainedSpec:
    """A dense Qwen3 that exists: `source` is a folder, or a hub id with its `revision`; `context` is used, in tokens."""

    source: str
    context: int
    revision: str = ""


@dataclass(frozen=True)
class DataSpec:
    """Which real rows are trained on (`rows: real`); defaults are the paper's.

    `share` of Table 1's samples; `first` lines of every file, for a trial (0: all); `thinking` as in `real.chat`;
    `template`: prompts as the data has them, or worded as the released code does; RL prompts of more than
    `prompt_tokens` are left out (0: none). SFT rows are cut after `row_tokens` (0: where the model's context ends). `rules`:
    domain -> the rule of its verifier, where it is not the first.
    """

    share: float = 1.0
    first: int = 0
    thinking: Literal["every", "last"] = "every"
    template: Literal["data", "released"] = "data"
    prompt_tokens: int = 2048
    row_tokens: int = 0
    rules: dict[str, str] = field(default_factory=dict)


@dataclass(frozen=True)
class BaseSpec:
    """Plain next-token training of `base`; `batch_tokens` a step, `warmup` in steps."""

    documents: int
    steps: int
    batch_tokens: int
    lr: float
    warmup: int
    weight_decay: float


@dataclass(frozen=True)
class Blend:
    """One line of Table 1: `share` of the blend, `pool` of different rows, and how they are drawn."""

    type: str
    domain: str
    share: float
    pool: int
    sampling: str  # "random sampling", "use all" or "repeat N times"


@dataclass(frozen=True)
class SftSpec:
    """Supervised fine-tuning on the blend (section 3.1, appendix A); `warmup` in steps."""

    rows: int
    blend: tuple[Blend, ...]
    steps: int
    batch_size: int
    lr: float
    final_lr: float
    warmup: int
    weight_decay: float
    betas: tuple[float, float]


@dataclass(frozen=True)
class RlSpec:
    """RLVR by GRPO (appendix A): `prompts` x `group` rollouts a step, one update each.

    `kl` weighs a KL term to the SFT model and `entropy` a bonus; `is_level`: of what the ratio to the sampler is
    taken; `scale_rewards`: what divides a centred reward, its group's standard deviation or nothing. See `losses`.
    `interference_every`: at every so many steps of rl-multi the domains' gradients are compared; 0 for never.
    `overlap`: 1 samples each batch during the step before, with weights one update old; see `training.batches`.
    """

    rows: dict[str, int]
    prompts: int
    group: int
    steps: int
    multi_steps: int
    lr: float
    weight_decay: float
    betas: tuple[float, float]
    clip_low: float
    clip_high: float
    grad_clip: float
    is_correction: Literal["none", "tis", "mis"]
    is_low: float
    is_high: float
    loss: Literal["grpo", "dapo", "dr_grpo"]
    kl: float
    temperature: float
    max_new_tokens: int
    max_turns: int
    checkpoint_every: int
    eval_every: int
    eval_items: int
    eval_k: int
    is_level: Literal["token", "sequence"] = "token"
    entropy: float = 0.0
    scale_rewards: Literal["group", "none"] = "group"
    interference_every: int = 0
    overlap: int = 0


@dataclass(frozen=True)
class OpdSpec:
    """Multi-teacher on-policy distillation (appendix A): the student's own rollouts, routed teachers.

    `variance_every`: at every so many steps the noise of both losses' gradients is measured; 0 for never.
    `overlap` as in `RlSpec`.
    """

    prompts: int
    group: int
    steps: int
    lr: float
    weight_decay: float
    betas: tuple[float, float]
    clip_low: float
    clip_high: float
    grad_clip: float
    is_correction: Literal["none", "tis", "mis"]
    is_low: float
    is_high: float
    temperature: float
    max_new_tokens: int
    max_turns: int
    loss: Literal["sampled", "full"]
    variance_every: int = 0
    overlap: int = 0


@dataclass(frozen=True)
class MergeSpec:
    """`density` kept by TIES, `drop_rate` of DARE, `scale` of the summed task vectors."""

    density: float
    drop_rate: float
    scale: float


@dataclass(frozen=True)
class Sampling:
    """What one benchmark samples by, where that differs from the others; 0 for what does not."""

    temperature: float = 0.0
    top_p: float = 0.0
    max_new_tokens: int = 0
    max_turns: int = 0


@dataclass(frozen=True)
class EvalSpec:
    """Avg@K: items and samples an item for each benchmark; `sampling`: what single benchmarks sample by instead.

    `rows`: the miniatures, or the real benchmarks (`real.benchmarks`). Of these, `items` below the full number are the
    first ones, for a trial; `revisions` are commits other than those of sources.yaml, and `rules` verdicts other than
    the official ones.
    """

    items: dict[str, int]
    k: dict[str, int]
    temperature: float
    max_new_tokens: int
    max_turns: int
    top_p: float = 1.0
    rows: Literal["miniature", "real"] = "miniature"
    sampling: dict[str, Sampling] = field(default_factory=dict)
    revisions: dict[str, str] = field(default_factory=dict)
    rules: dict[str, str] = field(default_factory=dict)

    def sampled_by(self, benchmark: str) -> dict[str, float]:
        """The arguments of an engine's `sample` for one benchmark."""
        own = asdict(self.sampling.get(benchmark, Sampling()))
        return {name: value or getattr(self, name) for name, value in own.items()}


@dataclass(frozen=True)
class AnalysisSpec:
    """Settings of the analyses; `eta` is the relative threshold of a changed weight, `sweep_...` belong to 3.2.

    `etas` are other thresholds under which the claims on weights are decided again; each reads the models once more.
    `layers`: those, counted from 0, that the weights are looked at in; none named is all.
    `judge_tokens`: what a judge may say (0: one word, as models do that do not think first).
    """

    eta: float
    layer: int
    random_projection: int
    kl_prompts: int
    kl_samples: int
    sweep_items: int
    sweep_k: int
    judge_items: int
    judge_k: int
    bootstrap: int
    pairs: bool
    etas: tuple[float, ...] = (1e-4, 1e-2)
    layers: tuple[int, ...] = ()
    judge_tokens: int = 0


@dataclass(frozen=True)
class VllmSpec:
    """How vLLM uses several GPUs: `replicas` of the model, each on `tensor_parallel` GPUs; or `servers`, each host:port.

    See `vllm_engine` and `server`; none of it stands in a key.
    """

    replicas: int = 1
    tensor_parallel: int = 1
    servers: tuple[str, ...] = ()


@dataclass(frozen=True)
class Resources:
    """What a stage takes of a Ray cluster's node (no `cpus`: a core for each of its threads), and by how many it is made.

    With `config`, a file of accelerate's, it is made by `processes`, shared evenly by so many `nodes` (see `jobs.launch`).
    """

    gpus: float = 0.0
    cpus: int = 0
    processes: int = 1
    nodes: int = 1
    config: str = ""


@dataclass(frozen=True)
class Profile:
    """One scale of the study; `name` is the file's.

    `engine` samples (see `engines`); `gpu_memory` is the share of a GPU's memory that vLLM takes beside the trainer.
    `seed` makes the data and the evaluation's draws; `seeds`: how often everything after SFT (experts, mix, merges,
    distillation and their evaluations) is made, each time with other orders and samples, n times the price of these.

    `model` is a shape, trained from scratch, or one that exists; None where SFT is imported and nothing asks for base.
    `imports` (in YAML: `import`): stages that are not made but brought, each a folder or a hub id (owner/name@revision),
    "" for one that is still to be named. `train`: the policies that are trained; None is all that are not imported.
    `domains`: names of the five, and files of one's own that end in .py (see `domains.own`), which are benchmarks too.
    `only`: "weights" leaves all out but SFT, the experts and section 3.3's look at their weights; with `analysis.layers`,
    models that are brought are then read in part (see `layers`).
    `rows`: the miniatures' or those of the paper's data sets, see `data`.
    `resources` are for kinds of stages ("rl", "eval", ...): of a Ray cluster, and how many processes; they stand in no key.
    """

    name: str
    about: str
    seed: int
    threads: int
    sft: SftSpec
    rl: RlSpec
    opd: OpdSpec
    merge: MergeSpec
    eval: EvalSpec
    analysis: AnalysisSpec
    model: ModelSpec | PretrainedSpec | None = None
    base: BaseSpec | None = None
    imports: dict[str, str] = field(default_factory=dict, metadata={"key": "import"})
    train: tuple[str, ...] | None = None
    domains: tuple[str, ...] = DOMAINS
    only: Literal["", "weights"] = ""
    rows: Literal["miniature", "real"] = "miniature"
    data: DataSpec = field(default_factory=DataSpec)
    engine: Literal["torch", "vllm"] = "torch"
    gpu_memory: float = 0.4
    vllm: VllmSpec = VllmSpec()
    seeds: int = 1
    jobs: int = 1
    resources: dict[str, Resources] = field(default_factory=dict)

    @property
    def parts(self) -> tuple[int, ...]:
        """The layers that are read of models that are brought; none where these are needed whole."""
        return self.analysis.layers if self.only else ()

    def threads_of(self, kind: str) -> int:
        """Threads of a stage: its share of all, whether or not others run; all where every other stage waits for it."""
        return self.threads if kind in ("base", "sft") else max(1, self.threads // self.jobs)

    @property
    def files(self) -> dict[str, str]:
        """Domains of one's own: name -> file."""
        return {Path(entry).stem: entry for entry in self.domains if entry.endswith(".py")}

    @property
    def domain_names(self) -> tuple[str, ...]:
        """Every domain of the study by its name, in order."""
        return tuple(Path(entry).stem if entry.endswith(".py") else entry for entry in self.domains)

    @property
    def benchmarks(self) -> dict[str, str]:
        """Benchmark -> domain: of the nine, those of the profile's domains; a domain of one's own is one by its own name."""
        nine = {name: domain for name, domain in BENCHMARKS.items() if domain in self.domains}
        return nine | {name: name for name in self.files}


def keyed(spec) -> dict:
    """A spec as part of a stage's key: without what stands at its default, so that a new option makes nothing again."""
    defaults = {one.name: one.default if one.default_factory is MISSING else one.default_factory() for one in fields(spec)}
    return {name: value for name, value in asdict(spec).items() if value != defaults[name]}
