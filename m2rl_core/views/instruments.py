"""Does this instrument work? Each section's own measures on planted worlds, whose answer is known.

A frame of checks has a row for each measure and world: world, measure, planted, recovered, low, high, exact. Worlds have
the run's own numbers of items and samples where those are not too small to say anything. Counts and numbers without
sampling noise are `exact`: their "interval" is the planted value to rounding.
"""
from __future__ import annotations

from collections.abc import Callable, Iterator
from math import isfinite, sqrt

import numpy as np
import pandas as pd
from IPython.display import Markdown
from scipy.special import bdtr

from m2rl_core.claims.evidence import Evidence
from m2rl_core.domains import BENCHMARKS, DOMAINS, mean_of
from m2rl_core.metrics import planted, solved, stats
from m2rl_core.metrics import skills as gains
from m2rl_core.views import judging as judges
from m2rl_core.views import neighbours as near
from m2rl_core.views.grid import bounds

WORLDS, LEAST, RESAMPLES = 20, 40, 400
RARE = 0.001  # how seldom an interval that holds the truth in 95 % of worlds may be called missed
KINDS = (0.25, 0.1, 0.15, 0.5)  # shares of `planted.KINDS`
SAME, OTHER = (0.4, 0.0, 0.0, 0.6), (0.0, 0.3, 0.3, 0.4)  # the model gains where the experts do, or nowhere there
PAIRS = {("math", "coding"), ("if", "agent"), ("agent", "if")}  # planted neighbours, the first one way only
MANY = "three planted, one of them one way"
OVERLAP = (0.2, 0.15)  # share of weights that both experts change, and that each changes on its own
Check = tuple[str, float, float, float, float, bool]


def scores(run) -> pd.DataFrame:
    """Section 3.2: a score, the paired difference of two models, of two equal ones, hard items, a mean of benchmarks."""
    items, k = _sizes(run)

    def world(rng: np.random.Generator) -> Iterator[Check]:
        for name, level, gap in (("two models", 0.5, 0.1), ("two equal models", 0.5, 0.0)):
            frame = planted.rows(planted.difficulties(max(items.values()), level, gap, rng), k, rng)
            e = stats.paired_difference(frame, "a", "b", ["b"], rng, RESAMPLES)
            yield f"difference of {name}, paired (points)", 100 * gap, *e[:3], False
        for name, level in (("a score", 0.5), ("a score on hard items", 0.05)):
            frame = planted.rows(planted.difficulties(max(items.values()), level, 0.0, rng), k, rng)
            found = stats.score_table(frame, ["a"], ["b"], rng, RESAMPLES).iloc[0]
            yield f"{name} (percent)", 100 * level, found["b"], found["b_low"], found["b_high"], False
        frames = [planted.rows(planted.difficulties(n, 0.5, 0.0, rng), k, rng, b) for b, n in items.items()]
        found = stats.score_table(pd.concat(frames), ["a"], list(items), rng, RESAMPLES).iloc[0]
        yield f"{mean_of(items)} (percent)", 50.0, found["avg"], found["avg_low"], found["avg_high"], False
    return _checks(run, world)


def weights(run) -> pd.DataFrame:
    """Section 3.3: overlaps that are shared or due to small |w| alone, the angle of shifts and of gradients."""
    import torch  # here alone: the other sections' notebooks do without

    from m2rl_core.merging.states import State
    from m2rl_core.metrics import interference
    from m2rl_core.metrics import planted_models as models
    from m2rl_core.metrics import weights as shift

    size, rho, settings = (128, 128), 0.3, run.profile.analysis

    def world(rng: np.random.Generator) -> Iterator[Check]:
        g = torch.Generator().manual_seed(int(rng.integers(2**62)))
        made = {"q": models.shared_mask(size, *OVERLAP, g), "k": models.alike_by_magnitude(size, settings.eta / 2, g),
                "v": models.turned(size, rho, g)}
        base, a, b = (State({models.MATRIX.format(m): tensors[i] for m, tensors in made.items()}) for i in range(3))
        found = shift.measure(base, {"a": a, "b": b}, eta=settings.eta, k=settings.random_projection,
                              seed=int(rng.integers(2**31)))
        shared, alike, angle = (frame[~frame["bf16"]].set_index("matrix").loc[m]
                                for frame, m in zip((found[0], found[0], found[1]), made, strict=True))
        yield "overlap of masks that share a part", models.shared_overlap(*OVERLAP), *_overlap(shared, 0.0, size)
        yield "small |w| alone: overlap beyond random masks", 0.0, *_overlap(alike, alike["jaccard_random"], size)
        yield ("small |w| alone: overlap beyond masks random given |w|", 0.0,
               *_overlap(alike, alike["jaccard_null"], size))
        yield "cosine of shifts, exact", rho, *_exact(angle["cosine"], rho, 2 / size[0] / size[1])
        reach = 1.96 * angle["projection_sd"]
        projected = angle["cosine_projected"]
        yield "cosine of shifts, projected", rho, projected, projected - reach, projected + reach, False
        cosine = interference.cosines(models.gradients(1000, rho, g), 1)["cosine"].iloc[0]
        yield "cosine of two domains' gradients", rho, *_exact(cosine, rho)
    return _checks(run, world)


def neighbourhoods(run) -> pd.DataFrame:
    """Section 3.4: the divergence of two policies whose divergence can be worked out, and Eq. 1 on planted neighbours."""
    import torch  # here alone: the other sections' notebooks do without

    from m2rl_core.metrics import planted_models as models
    from m2rl_core.metrics.divergence import trajectory_kl

    spec, tokens, length = run.profile.analysis, 5, 8
    prompts, samples = max(24, spec.kl_prompts), max(4, spec.kl_samples)
    cell = {("math", "rl-math>policy"): 1.0}

    def world(rng: np.random.Generator) -> Iterator[Check]:
        g = torch.Generator().manual_seed(int(rng.integers(2**62)))
        expert = models.transitions(tokens, g)
        other = models.transitions(tokens, g, expert, by=0.7)
        truth = models.chain_kl(expert, other, length)
        starts = torch.randint(tokens, (prompts,), generator=g).tolist()
        walks = models.walks(expert, starts, samples, length, g)
        found = pd.DataFrame(trajectory_kl(models.chain(expert), {"policy": models.chain(other)}, walks, 1.0))
        found = found.assign(expert="rl-math", domain="math", prompt=found["rollout"] // samples,
                             sample=found["rollout"] % samples)
        for name, column in (("exact along the response", "kl_exact"), ("of sampled log-ratios", "kl_token")):
            evidence = Evidence(kl=found.assign(kl_exact=found[column]), resamples=RESAMPLES)
            yield f"KL(expert || policy), {name} (nats)", truth, *evidence.contrast(cell, of="kl")[:3], False
        worlds = {MANY: PAIRS, "none planted": set()}
        kl = pd.concat([planted.divergences(pairs, DOMAINS, name, prompts, samples, rng) for name, pairs in worlds.items()])
        table = near.divergences(Evidence(kl=kl, resamples=RESAMPLES), list(worlds))
        for name, pairs in worlds.items():
            eq1 = near.neighbours(table, name)
            is_near = [(r.domain, r.expert) in pairs for r in eq1.itertuples()]
            yield f"pairs that Eq. 1 gets wrong, of {len(eq1)} ({name})", 0, *_exact(int((eq1["near"] != is_near).sum()), 0)
        eq1 = near.neighbours(table, MANY)
        one_way = int((eq1["near"] & ~eq1["mutual"]).sum())
        yield f"neighbours one way only ({MANY})", 1, *_exact(one_way, 1)
    return _checks(run, world)


def skills(run) -> pd.DataFrame:
    """Section 3.5: the cosine of planted gains, its chance and ceiling, items that the model alone solves; then noise.

    With few samples of items that are neither sure nor hopeless, equal gains look unlike, and unlike ones alike, beyond
    chance even: all gains subtract the same samples of SFT, whose bad luck on an item is everybody's gain.
    """
    items, k = _sizes(run)
    n, k = max(items.values()), max(2, k)
    true, noisy = planted.gain_cosine(KINDS), f"gains through {k} noisy samples an item"

    def world(rng: np.random.Generator) -> Iterator[Check]:
        chances, kind = planted.gains(n, KINDS, rng)
        frame = planted.rows(chances, k, rng)
        found = gains.consistency(frame, ["model"], ["b"], rng, resamples=RESAMPLES).iloc[0]
        yield "cosine of gains that are certain", true, found["cosine"], found["low"], found["high"], False
        drawn = np.bincount(kind, minlength=len(KINDS)) / n
        yield "chance, of the items drawn", planted.gain_chance(drawn), *_exact(found["chance"], planted.gain_chance(drawn))
        yield "ceiling of gains that are certain", 1.0, *_exact(found["ceiling"], 1.0)
        alone = int((kind == planted.KINDS.index("model only")).sum())
        apart = solved.apart(frame, "b", "model")["who"].eq("model only").sum()
        yield "items that the model alone solves", alone, *_exact(int(apart), alone)
        for name, shares in (("the same skills", SAME), ("other skills", OTHER)):
            frame = planted.rows(planted.gains(n, shares, rng, before=0.3, after=0.7)[0], k, rng)
            found = gains.consistency(frame, ["model"], ["b"], rng, resamples=RESAMPLES).iloc[0]
            yield f"{noisy}: cosine of {name}", planted.gain_cosine(shares), *found[["cosine", "low", "high"]], False
        excess = planted.gain_cosine(OTHER) - planted.gain_chance(OTHER), *(found[["cosine", "low", "high"]] - found["chance"])
        yield f"{noisy}: cosine of other skills, less chance", *excess, False
    return _checks(run, world)


def judging(run) -> pd.DataFrame:
    """Section 3.6: accuracy and balanced accuracy of judges of known quality, and a correlation over nine models."""
    n, k = max(LEAST, run.profile.analysis.judge_items), run.profile.analysis.judge_k
    right, sensitivity, specificity, rho = 0.7, 0.9, 0.6, -0.5

    def world(rng: np.random.Generator) -> Iterator[Check]:
        rows = planted.judged(n, k, right, sensitivity, specificity, rng)
        e = Evidence(judged=rows, resamples=RESAMPLES).contrast({("b", "sft/outcome"): 1.0}, of="judged")
        yield "accuracy (percent)", 100 * (right * sensitivity + (1 - right) * specificity), *e[:3], False
        yield "balanced accuracy (percent)", 50 * (sensitivity + specificity), *_balanced(rows, rng), False
        yes = planted.judged(n, k, right, 1.0, 0.0, rng)
        yield "balanced accuracy of a judge that always says yes", 50.0, *_exact(_balanced(yes, rng)[0], 50.0)
        x, y = planted.correlated(9, rho, rng)
        yield "r of generation and judging over nine models", rho, *stats.pearson(x, y, rng)[:3], False
    return _checks(run, world)


def shown(checks: pd.DataFrame) -> pd.DataFrame:
    """The checks for the eye: the first world's numbers, in how many worlds the interval held the truth, the verdict."""
    lines = []
    for measure, part in checks.groupby("measure", sort=False):
        first, count = part.iloc[0], int(held(part).sum())
        digits = 1 if max(abs(first["recovered"]), abs(first["planted"])) >= 2 and not first["exact"] else 3
        lines.append({
            "measure": measure, "planted": _number(first["planted"], digits), "recovered": _number(first["recovered"], digits),
            "95 % interval": "none: exact" if first["exact"] else bounds(first["low"], first["high"], digits),
            "held the planted value in": f"{count} of {len(part)} worlds",
            "verdict": "recovered" if works(part) else "missed",
        })
    return pd.DataFrame(lines)


def sentence(checks: pd.DataFrame) -> Markdown:
    """Which measures recover what was planted and which do not, in words."""
    by = {measure: part for measure, part in checks.groupby("measure", sort=False)}
    missed = [f"{measure} (held in {int(held(part).sum())} of {len(part)} worlds; off by "
              f"{(part['recovered'] - part['planted']).mean():+.2f} on average)"
              for measure, part in by.items() if not works(part)]
    worlds = checks["world"].nunique()
    return Markdown(
        f"**{len(by) - len(missed)} of {len(by)} measures recover what was planted.** "
        + (f"**Missed:** {'; '.join(missed)}. " if missed else "")
        + f"{worlds} worlds each. A measure with an interval is called missed where fewer than {_enough(worlds)} intervals "
        f"hold the planted value: a sound 95 % interval has that less than once in {1 / RARE:.0f} times. An exact one must "
        "hold in all.")


def held(part: pd.DataFrame) -> pd.Series:
    """In which rows the planted value lies in the interval, or is what was recovered; an undefined one holds nothing."""
    value = part["recovered"].where(part["exact"], part["planted"])
    return (part["low"] <= value) & (value <= part["high"])


def works(part: pd.DataFrame) -> bool:
    """Whether a measure, with these rows of its worlds, is as good as its intervals say."""
    return int(held(part).sum()) >= (len(part) if part["exact"].all() else _enough(len(part)))


def _enough(worlds: int) -> int:
    return next(k for k in range(worlds + 1) if bdtr(k, worlds, 0.95) > RARE)


def _checks(run, world: Callable[[np.random.Generator], Iterator[Check]]) -> pd.DataFrame:
    return pd.DataFrame([(i, *check) for i in range(WORLDS) for check in world(np.random.default_rng([run.profile.seed, i]))],
                        columns=["world", "measure", "planted", "recovered", "low", "high", "exact"])


def _sizes(run) -> tuple[dict[str, int], int]:
    """Items of each benchmark, at least `LEAST`, and the usual number of samples an item."""
    spec = run.profile.eval
    return {b: max(LEAST, spec.items.get(b, LEAST)) for b in BENCHMARKS}, int(np.median(list(spec.k.values())))


def _overlap(line: pd.Series, null: float, size: tuple[int, int]) -> tuple[float, float, float, bool]:
    """The overlap less `null`, with the binomial interval of a share of the weights that either mask holds."""
    j = line["jaccard"]
    either = (line["share_a"] + line["share_b"]) / (1 + j) * size[0] * size[1]
    reach = 1.96 * sqrt(j * (1 - j) / either)
    return j - null, j - null - reach, j - null + reach, False


def _balanced(rows: pd.DataFrame, rng: np.random.Generator) -> tuple[float, float, float]:
    """Balanced accuracy and its interval as the section reports them."""
    found = judges.quality(rows, Evidence(judged=rows, seed=int(rng.integers(2**31)), resamples=RESAMPLES)).iloc[0]
    return found["balanced"], found["low"], found["high"]


def _exact(found: float, wanted: float, tolerance: float = 1e-9) -> tuple[float, float, float, bool]:
    """A number without sampling noise: it must be the planted one to rounding."""
    return found, wanted - tolerance, wanted + tolerance, True


def _number(value: float, digits: int) -> str:
    if not isfinite(value):
        return "undefined"
    return f"{value:.0f}" if float(value).is_integer() else f"{value:.{digits}f}"
