"""The study as a graph of names: what is made, from what, with which settings.

Fig. 1 is drawn from it and the order of work follows it. A stage's key is a hash of its name, kind,
version, its own settings and its inputs' keys, so a change rebuilds what depends on it and no more.
Settings that cannot change a result (threads) stand in no key. With `seeds: n` every policy after SFT is made n
times; the first keeps its name and key, so that raising n later makes only what is new: rl-math, rl-math@2, ...
A model may be brought instead of made; its key is its content's (`imports`). What a profile neither brings nor trains
is left out, with all that needs it: `Members` says who is there.
"""
from __future__ import annotations

import difflib
import hashlib
import json
from dataclasses import asdict, dataclass
from itertools import combinations

from m2rl_core import imports, layers
from m2rl_core.domains import BENCHMARKS, DOMAINS
from m2rl_core.profile import Profile
from m2rl_core.specs import ModelSpec, keyed

# Raise a kind's version when its code changes what comes out; every stage of that kind is then made again.
VERSION = {"base": 4, "sft": 2, "rl": 3, "opd": 3, "merge": 2, "eval": 3, "weights": 2, "kl": 3, "judge": 3, "sweep": 2,
           "import": 1}

GROUP = {"base": "models", "sft": "models", "rl": "models", "opd": "models", "merge": "models", "import": "models",
         "eval": "evals", "judge": "evals", "sweep": "evals", "weights": "analyses", "kl": "analyses"}

EXPERTS = tuple(f"rl-{domain}" for domain in DOMAINS)
MERGES = {  # model -> (method, the settings of `merge` that it reads)
    "merge-average": ("average", ()),
    "merge-ta": ("ta", ("scale",)),
    "merge-ties": ("ties", ("density", "scale")),
    "merge-sce": ("sce", ()),  # without its select step, as in the paper
    "merge-ties-dare": ("ties-dare", ("density", "drop_rate", "scale")),
    "merge-ta-dare": ("ta-dare", ("drop_rate", "scale")),
}
SWEEP = (  # what section 3.2 varies, one parameter at a time; each method's own reading is evaluated beside it
    ("merge-ta", "scale", (0.4, 0.7)),  # 0.2 is the average of five
    ("merge-ties", "scale", (0.5, 1.5)),
    ("merge-ties", "density", (0.1, 0.4, 1.0)),
    ("merge-ties", "threshold", ("tensor",)),
    ("merge-sce", "select", (0.5,)),
    ("merge-ties-dare", "drop_rate", (0.2,)),  # the released code's
    ("merge-ta-dare", "drop_rate", (0.2,)),
    *((f"merge-{name}", "out_dtype", ("bfloat16",)) for name in ("average", "ta", "ties")),  # most weights' type
)
TRAINED = (*EXPERTS, "rl-multi", "mt-opd")  # every policy that learns from its own rollouts (3.2_train)
SHARED = ("base", "sft")  # trained once, whatever `seeds` says: the paper's policies start from one SFT model
MODELS = (*SHARED, *EXPERTS, "rl-multi", *MERGES, "mt-opd")
JUDGED = ("sft", *EXPERTS, "merge-ties", "rl-multi", "mt-opd")  # the rows of Table 7
NEIGHBORS = ("sft", *EXPERTS, "rl-multi", "merge-ties", "mt-opd")
JUDGED_BENCHMARKS = ("aime24", "ifeval", "lcb_v5", "gpqa_diamond")  # Table 7
JUDGE_TOKENS = 16  # of a judge's words, where its stage says nothing else (`judge.JUDGE_TOKENS`, which would import torch)


class UnknownStage(KeyError):
    """A name that the study does not have; the message names the nearest one that it has."""

    def __str__(self) -> str:
        return self.args[0]


class NotInStudy(UnknownStage):
    """A part of the paper's study that this profile leaves out, because it neither brings nor trains what it needs."""


NOT_IN = "this profile neither brings nor trains"
ALONE = "this profile looks at the weights of SFT and the experts alone (`only: weights`)"


def left_out_for(profile: Profile) -> str:
    """Why models or stages are not in a profile's study."""
    return ALONE if profile.only else f"{NOT_IN} them, or what they need"


@dataclass(frozen=True)
class Members:
    """Who is in a profile's study, in the order of the tables; all of the paper's where nothing is brought or left out.

    `trained`: the policies that are made here by RL or distillation. `experts`: domain -> model.
    """

    models: tuple[str, ...]
    trained: tuple[str, ...]
    experts: dict[str, str]
    judged: tuple[str, ...]
    neighbors: tuple[str, ...]
    judged_benchmarks: tuple[str, ...]

    @property
    def whole(self) -> bool:
        """Whether it is all of the paper's study, made here."""
        return self.models == MODELS and self.trained == TRAINED

    @staticmethod
    def of(profile: Profile) -> Members:
        def there(name):
            return bool(profile.imports.get(name)) or name not in profile.imports and (
                profile.train is None or name in profile.train)

        experts = {domain: f"rl-{domain}" for domain in profile.domain_names if there(f"rl-{domain}")}
        if profile.only:
            trained = tuple(name for name in experts.values() if name not in profile.imports)
            return Members(("sft", *experts.values()), trained, experts, (), (), ())
        merges = tuple(MERGES) if len(experts) > 1 else ()
        multi = ("rl-multi",) if there("rl-multi") else ()
        distilled = ("mt-opd",) if there("mt-opd") and (profile.imports.get("mt-opd") or experts) else ()
        models = (*(("base",) if profile.model else ()), "sft", *experts.values(), *multi, *merges, *distilled)
        ties = ("merge-ties",) if merges else ()
        judges = (*(b for b in JUDGED_BENCHMARKS if b in profile.benchmarks), *profile.files)
        return Members(
            models, tuple(name for name in (*experts.values(), *multi, *distilled) if name not in profile.imports),
            experts, ("sft", *experts.values(), *ties, *multi, *distilled) if judges else (),
            ("sft", *experts.values(), *multi, *ties, *distilled) if experts else (), judges)


@dataclass(frozen=True)
class Stage:
    """One thing to make; `inputs` maps each needed stage to its key."""

    name: str
    kind: str
    needs: tuple[str, ...]
    settings: dict
    version: int
    inputs: dict[str, str]

    @property
    def key(self) -> str:
        """64 hex digits of everything that the result depends on; of what is brought, its content's digest."""
        if self.kind == "import":
            return self.settings["digest"]
        content = [self.name, self.kind, self.version, self.settings, self.inputs]
        return hashlib.sha256(json.dumps(content, sort_keys=True).encode()).hexdigest()

    @property
    def group(self) -> str:
        return GROUP[self.kind]


def replica(name: str, seed: int) -> str:
    """What a stage is called on training seed `seed` (1 is the first)."""
    return name if seed == 1 else f"{name}@{seed}"


def first(name: str) -> str:
    """The name without its training seed: rl-math for rl-math@2."""
    return name.partition("@")[0]


def seeds_of(model: str, seeds: int) -> dict[int, str]:
    """The policies that stand for `model` under `seeds: n`, by training seed; seed 0 is what all seeds share.

    A merge of two experts (`pair_names`) is made on the first seed only.
    """
    if model in SHARED:
        return {0: model}
    return {seed: replica(model, seed) for seed in range(1, seeds + 1 if model in MODELS else 2)}


def seed_of(seed: int, name: str) -> int:
    """A stage's own seed in [0, 2^31), from the profile's and the stage's name."""
    return int(hashlib.sha256(f"{seed}/{name}".encode()).hexdigest()[:8], 16) % 2**31


def pair_names(domains=DOMAINS) -> list[tuple[str, str, str]]:
    """(stage, domain, domain) of the TIES merges of two experts (section 3.5), ten of the five."""
    return [(f"pair-{a}-{b}", a, b) for a, b in combinations(domains, 2)]


def variants(merge) -> list[dict]:
    """Every merge of the sweep (name, method, parameters): the six rows of Table 4, then one change at a time."""
    own = {name: {key: getattr(merge, key) for key in reads} for name, (_, reads) in MERGES.items()}
    found = [{"name": name, "method": MERGES[name][0], "parameters": own[name]} for name in MERGES]
    return found + [
        {"name": f"{name} {key}={value}", "method": MERGES[name][0], "parameters": own[name] | {key: value}}
        for name, key, values in SWEEP for value in values if value != own[name].get(key)]


def subsets(merge) -> list[dict]:
    """TIES of every three and four experts as variants of a sweep, each tested on its own domains (section 3.4)."""
    own = {key: getattr(merge, key) for key in MERGES["merge-ties"][1]}
    return [{"name": f"ties-{'-'.join(chosen)}", "method": "ties",
             "parameters": own | {"experts": [f"rl-{domain}" for domain in chosen]},
             "benchmarks": [b for b, domain in BENCHMARKS.items() if domain in chosen]}
            for size in (3, 4) for chosen in combinations(DOMAINS, size)]


def study(profile: Profile) -> dict[str, Stage]:
    """All stages of a profile by name, each after what it needs."""
    stages: dict[str, Stage] = {}
    here = Members.of(profile)
    trains = {name: profile.rl.rows[name] for name in profile.domain_names}
    seed = {"seed": profile.seed}
    rl, opd, sampling = keyed(profile.rl), keyed(profile.opd), keyed(profile.eval)
    multi_steps = rl.pop("multi_steps")
    del rl["rows"]
    del rl["checkpoint_every"]
    mixed = {name: rl.pop(name) for name in ("interference_every",) if name in rl}  # concerns rl-multi alone
    rl["along"] = {name: rl.pop(name) for name in ("eval_every", "eval_items", "eval_k")}
    looks = {name: value for name, value in sampling.items() if name not in ("items", "k")}
    rl["along"] |= looks | ({} if profile.domains == DOMAINS else {"benchmarks": len(profile.benchmarks)})
    on = {} if profile.domains == DOMAINS else {"on": list(profile.benchmarks)}
    made_of = {name: imports.file_digest(path) for name, path in profile.files.items()}
    data = {"data": keyed(profile.data)} if profile.rows == "real" else {}

    def files_of(domains):  # rows and verdicts of one's own domains change with their files
        found = {name: made_of[name] for name in domains if name in made_of}
        return {"files": found} if found else {}

    def add(name, kind, needs, settings):
        inputs = {need: stages[need].key for need in needs}
        settings = json.loads(json.dumps(settings))  # as the manifest will hold it
        stages[name] = Stage(name, kind, tuple(needs), settings, VERSION[kind], inputs)

    def add_made(name, kind, needs, settings):
        if profile.imports.get(first(name)):
            if profile.parts:
                return add(name, "import", (), layers.settings(profile.imports[first(name)], profile.parts))
            anchor = stages.get(imports.anchor_of(profile, name))
            held = {"anchor": anchor.key} if anchor else {}
            add(name, "import", (), imports.settings(profile.imports[first(name)]) | held)
        else:
            add(name, kind, needs, settings)

    def add_merge(name, method, experts, reads):
        settings = {"method": method, **{key: getattr(profile.merge, key) for key in reads}}
        own = seed if name == first(name) else {"seed": seed_of(profile.seed, name)}  # of the weights that DARE drops
        add(name, "merge", ("sft", *experts), settings | (own if "drop_rate" in reads else {}))

    def add_policies(number):  # the data are those of the profile's seed; order and sampling are of the stage's own
        experts = [replica(name, number) for name in here.experts.values()]
        engine = {"engine": profile.engine, **seed, **data}
        for domain, name in zip(here.experts, experts, strict=True):
            add_made(name, "rl", ("sft",), {**rl, "rows": {domain: trains[domain]}, **engine, **files_of([domain])})
        if "rl-multi" in here.models:
            add_made(replica("rl-multi", number), "rl", ("sft",), {
                **rl, **mixed, "rows": trains, "steps": multi_steps, **engine, **files_of(trains)})
        for name, (method, reads) in MERGES.items() if "merge-ties" in here.models else ():
            add_merge(replica(name, number), method, experts, reads)
        if "mt-opd" in here.models:
            taught = {domain: trains[domain] for domain in here.experts}
            add_made(replica("mt-opd", number), "opd", ("sft", *experts), {
                **opd, "along": rl["along"], "rows": taught, **engine, **files_of(taught)})

    def add_evals(models):
        for name in models:
            add(f"eval-{name}", "eval", (name,), {**sampling, "engine": profile.engine, **seed, **files_of(made_of)})

    sft = asdict(profile.sft)
    blend = {"rows": sft["rows"], "lines": sft["blend"]}  # the tokenizer is trained on it too
    if profile.only and "sft" in profile.imports:
        pass  # nobody asks for base
    elif isinstance(profile.model, ModelSpec):
        add("base", "base", (), {"model": asdict(profile.model), **asdict(profile.base), "blend": blend, **seed})
    elif profile.model:
        add("base", "import", (), imports.settings(
            f"{profile.model.source}@{profile.model.revision}".rstrip("@"), profile.model.context))
    add_made("sft", "sft", ("base",), {**sft, **seed, **data})
    add_policies(1)
    add_evals(() if profile.only else here.models)

    analysis, experts = profile.analysis, tuple(here.experts.values())
    several = {}
    if len(experts) > 1:
        add("weights", "weights", ("sft", *experts), {
            "eta": analysis.eta, "etas": analysis.etas, "random_projection": analysis.random_projection, **seed,
            **({"layers": analysis.layers} if analysis.layers else {})})
    if len(experts) > 1 and not profile.only:
        several["sweep"] = variants(profile.merge)
        if analysis.pairs and tuple(here.experts) == DOMAINS:
            several["subsets"] = subsets(profile.merge)
    for name, merged in several.items():
        add(name, "sweep", ("sft", *experts), {
            "variants": merged, "items": analysis.sweep_items, "k": analysis.sweep_k,
            **looks, **on, "engine": profile.engine, **seed, **files_of(made_of)})
    if here.neighbors:
        asked = {domain: trains[domain] for domain in here.experts}
        add("neighborhoods", "kl", here.neighbors, {
            "prompts": analysis.kl_prompts, "samples": analysis.kl_samples, "rows": asked, "engine": profile.engine,
            **{name: rl[name] for name in ("temperature", "max_new_tokens", "max_turns")}, **seed, **data, **files_of(asked)})
    for name, a, b in pair_names(here.experts) if analysis.pairs and "merge-ties" in here.models else ():
        add_merge(name, "ties", (here.experts[a], here.experts[b]), MERGES["merge-ties"][1])
        own = [benchmark for benchmark, domain in profile.benchmarks.items() if domain in (a, b)]  # as in Table 6
        add(f"eval-{name}", "eval", (name,), {
            **sampling, "benchmarks": own, "engine": profile.engine, **seed, **files_of((a, b))})
    for name in here.judged:
        on = {"benchmarks": list(here.judged_benchmarks)} if here.judged_benchmarks != JUDGED_BENCHMARKS else {}
        add(f"judge-{name}", "judge", (name, f"eval-{name}"), {
            "items": analysis.judge_items, "k": analysis.judge_k, "temperature": profile.eval.temperature,
            "max_new_tokens": profile.eval.max_new_tokens, "engine": profile.engine, **seed, **on,
            **({"tokens": analysis.judge_tokens} if analysis.judge_tokens else {})})
    for number in range(2, profile.seeds + 1):
        add_policies(number)
        add_evals(replica(name, number) for name in here.models if name not in SHARED and not profile.only)
    return stages


def find(stages: dict[str, Stage], name: str) -> Stage:
    """The stage of that name; raises UnknownStage with the nearest name."""
    if name not in stages:
        policy = name.removeprefix("eval-").removeprefix("judge-")
        if policy in MODELS or name in ("weights", "sweep", "subsets", "neighborhoods") or policy.startswith("pair-"):
            alone = not any(stage.kind == "eval" for stage in stages.values())
            raise NotInStudy(f"{name}: {ALONE if alone else f'{NOT_IN} what it needs'}")
        close = difflib.get_close_matches(name, stages, 1, 0.5)
        hint = f"did you mean {close[0]!r}?" if close else "`make status` lists them all"
        raise UnknownStage(f"unknown stage {name!r}; {hint}")
    return stages[name]


def upstream(stages: dict[str, Stage], name: str) -> list[Stage]:
    """Everything that `name` needs, itself last, in order of work."""
    wanted = {find(stages, name).name}
    for stage in reversed(stages.values()):
        if stage.name in wanted:
            wanted.update(stage.needs)
    return [stage for stage in stages.values() if stage.name in wanted]


def work(stage: Stage) -> dict[str, int]:
    """How much a stage does, from its settings: steps, rollouts and the most tokens that these can have.

    A rollout is bounded by `max_new_tokens` a turn, a judge's words by their own number. Evaluation on the way is counted.
    Zeros for a merge or for the weights, which sample nothing.
    """
    s = stage.settings
    if stage.kind == "base":
        return {"steps": s["steps"], "rollouts": 0, "tokens": s["steps"] * s["batch_tokens"]}
    if stage.kind == "sft":
        return {"steps": s["steps"], "rollouts": 0, "tokens": 0}
    if stage.kind in ("rl", "opd"):
        seen = s["along"]
        marks = -(-s["steps"] // seen["eval_every"]) * seen.get("benchmarks", len(BENCHMARKS))  # and after the last
        rollouts = s["steps"] * s["prompts"] * s["group"] + marks * seen["eval_items"] * seen["eval_k"]
    elif stage.kind == "eval":
        rollouts = sum(s["items"][name] * s["k"][name] for name in s.get("benchmarks", s["items"]))
    elif stage.kind == "sweep":
        rollouts = sum(len(v.get("benchmarks", s.get("on", BENCHMARKS))) for v in s["variants"]) * s["items"] * s["k"]
    elif stage.kind == "judge":
        on = s.get("benchmarks", JUDGED_BENCHMARKS)
        rollouts = 2 * len(on) * s["items"] * s["k"]  # by outcome and by process
    elif stage.kind == "kl":
        rollouts = len(s["rows"]) ** 2 * s["prompts"] * s["samples"]
    else:
        return {"steps": 0, "rollouts": 0, "tokens": 0}
    most = s.get("tokens", JUDGE_TOKENS) if stage.kind == "judge" else s["max_new_tokens"]
    return {"steps": s.get("steps", 0), "rollouts": rollouts, "tokens": rollouts * most}
