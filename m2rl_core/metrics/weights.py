"""How RLVR moves the weights (section 3.3, Table 5, Fig. 3): which ones change, and in which direction.

Beside the paper's figures stand two things that it lacks. A null for the overlap: a relative test fires mostly where
|w| is small, so two unrelated runs overlap more than random masks do; `jaccard_null` says how much. And the exact
cosine, next to that of the projected values. All of it comes from one read of the models, stretch by stretch.
"""
from __future__ import annotations

import math
import re
import threading
from collections.abc import Iterator, Mapping, Sequence
from contextlib import ExitStack
from itertools import combinations
from pathlib import Path
from typing import NamedTuple

import numpy as np
import pandas as pd

from m2rl_core.adapters.foreign import PART
from m2rl_core.errors import StudyError
from m2rl_core.merging.checkpoint import Checkpoint
from m2rl_core.merging.dare import state_of
from m2rl_core.merging.pool import Pool, cores
from m2rl_core.merging.reader import Reader
from m2rl_core.merging.stored import as_float, count_of
from m2rl_core.metrics.masks import BINS, ETA
from m2rl_core.metrics.projection import Projection, check, columns, start
from m2rl_core.metrics.weight_kernel import CODES, ROWS, drain, halve, look

MATRICES = {"q": "self_attn.q_proj", "k": "self_attn.k_proj", "v": "self_attn.v_proj", "o": "self_attn.o_proj",
            "down": "mlp.down_proj", "up": "mlp.up_proj", "gate": "mlp.gate_proj"}
GROUPS = 32  # blocks of a matrix that the interval of a cosine leaves out one by one
LARGEST = 1 << 20  # weights of a stretch: what a thread holds at once


class Stretch(NamedTuple):
    """Weights first .. first+count-1 of the flat tensor, which lie in block `group` of it."""

    name: str
    group: int
    first: int
    count: int


class Counted(NamedTuple):
    """What is known of one matrix.

    counts: int64 (magnitudes, 2^experts), how many weights have these upper 16 bits of |w| and were changed by just
    those experts, for the magnitudes that occur, in order; sums: float64 (groups, pairs, 3), of a squared, b squared and
    a times b over shifts that both changed; folds: float64 (pairs, 2, columns), the same shifts folded by the projection.
    """

    counts: np.ndarray
    sums: np.ndarray
    folds: np.ndarray


def stretches(name: str, size: int, width: int) -> list[Stretch]:
    """A tensor in order, cut into GROUPS blocks of about equal size, and these into equal parts of at most LARGEST."""
    unit = ROWS * width
    units, found = -(-size // unit), []
    edges = [units * g // min(GROUPS, units) for g in range(min(GROUPS, units) + 1)]
    for group, (begin, end) in enumerate(zip(edges, edges[1:], strict=False)):
        parts = -(-(end - begin) * unit // LARGEST)
        cuts = [begin + (end - begin) * p // parts for p in range(parts + 1)]
        found += [Stretch(name, group, a * unit, min(b * unit, size) - a * unit)
                  for a, b in zip(cuts, cuts[1:], strict=False)]
    return found


class Stream:
    """Reads a base and its experts, each a `Checkpoint`, entered, or a `states.State`, once, in threads."""

    def __init__(self, base, models: Mapping, *, eta: float = ETA, k: int = 256, seed: int = 0, threads: int = 0):
        check(k)
        self.base, self.models, self.eta, self.k, self.seed = base, dict(models), eta, k, seed
        self.threads = threads or cores()
        self.pairs = len(models) * (len(models) - 1) // 2
        self._tables: dict[tuple, np.ndarray] = {}  # of each thread, tensor and way of reading it
        self._free: list[np.ndarray] = []
        self._total, self._seen = np.zeros((1 << CODES, 1 << len(models)), np.int64), np.zeros(1 << CODES, bool)

    def __call__(self, names: Sequence[str]) -> Iterator[tuple[str, Counted, Counted]]:
        """(name, weights as stored, weights rounded to bfloat16) of each tensor, in order."""
        work = [s for name in names for s in stretches(name, count_of(self.base.meta[name]), columns(self.k))]
        with Pool(self.threads) as pool:
            parts: list[list] = []
            for i, (stretch, part) in enumerate(zip(work, pool.map(self._look, work), strict=True)):
                parts.append([stretch.group, *part])
                if i + 1 == len(work) or work[i + 1].name != stretch.name:
                    found = [self._collect(stretch.name, way, [(p[0], p[1 + way]) for p in parts])
                             for way in range(len(part))]
                    yield stretch.name, found[0], found[-1]
                    parts = []

    def _look(self, stretch: Stretch) -> list[tuple[np.ndarray, np.ndarray]]:
        """(sums, folds) of a stretch as stored and, where that is another thing, in bfloat16."""
        models = [self.base, *self.models.values()]
        rows = tuple(model.view(stretch.name, stretch.first, stretch.count) for model in models)
        codes = [model.meta[stretch.name][0] for model in models]
        if set(codes) == {"BF16"}:
            return [self._add(stretch, rows, 0)]
        rows = tuple(as_float(values, code) for values, code in zip(rows, codes, strict=True))
        halves = np.empty((len(rows), stretch.count), np.uint16)
        for values, out in zip(rows, halves, strict=True):
            halve(values, out)
        return [self._add(stretch, rows, 0), self._add(stretch, tuple(halves), 1)]

    def _add(self, stretch: Stretch, rows: Sequence[np.ndarray], way: int) -> tuple[np.ndarray, np.ndarray]:
        for values in rows:
            values.flags.writeable = False  # mapped files are: one kind of arguments, one kernel
        width, bf16 = columns(self.k), rows[0].dtype == np.uint16
        sums, folds = np.zeros((self.pairs, 3)), np.zeros((self.pairs, 2, width))
        eta = None if bf16 and self.eta < 2**-8 else np.float32(self.eta)  # on bfloat16 it decides nothing: see `masks`
        signs = state_of(start(self.seed, stretch.name), 0)
        look(rows, stretch.first // width, eta, signs, self._table(stretch.name, way), sums, folds)
        return sums, folds

    def _table(self, name: str, way: int) -> np.ndarray:
        key = (threading.get_ident(), name, way)
        if key not in self._tables:
            try:
                self._tables[key] = self._free.pop()
            except IndexError:
                self._tables[key] = np.zeros(1 << CODES + len(self.models), np.int32)
        return self._tables[key]

    def _collect(self, name: str, way: int, parts: Sequence[tuple]) -> Counted:
        """All stretches of a tensor together, in their order; ValueError where a model holds NaN or Inf there."""
        for key in [key for key in self._tables if key[1:] == (name, way)]:
            table = self._tables.pop(key)
            drain(table.reshape(self._total.shape), self._total, self._seen)
            self._free.append(table)
        filled = np.flatnonzero(self._seen)
        counts = self._total[filled]
        self._total[filled], self._seen[filled] = 0, False
        sums, folds = np.zeros((parts[-1][0] + 1, self.pairs, 3)), 0
        for group, (some, more) in parts:
            sums[group] += some
            folds = folds + more
        if not np.isfinite(sums).all():
            Reader(self.base, self.models).refuse_nonfinite(name, "nothing to compare")
        return Counted(counts, sums, folds)


def overlaps(found: Counted, names: Sequence[str]) -> list[tuple[dict, dict]]:
    """Of every pair {a, b}: jaccard, its two nulls, the shares of changed weights, and n, how many both changed.

    The overlap with an expert that changed nothing is undefined: NaN, and so are its nulls.
    """
    bits = np.arange(1 << len(names))[:, None] >> np.arange(len(names)) & 1  # (patterns, experts)
    size = found.counts.sum(1)
    middle = np.cumsum(size) - size / 2
    bins = np.minimum(middle / size.sum() * BINS, BINS - 1).astype(int)  # grows: magnitudes of one bin lie side by side
    in_bin = np.add.reduceat(found.counts, np.flatnonzero(np.diff(bins, prepend=-1)))  # (bins, patterns)
    patterns, weights = in_bin.sum(0), in_bin.sum(1)
    changed = in_bin @ bits  # (bins, experts)
    rows = []
    for a, b in combinations(range(len(names)), 2):
        n = int(patterns @ (bits[:, a] & bits[:, b]))
        in_a, in_b = int(changed[:, a].sum()), int(changed[:, b].sum())
        both = {"jaccard": n, "jaccard_random": in_a * in_b / size.sum(),
                "jaccard_null": float((changed[:, a] * changed[:, b] / weights).sum())}
        rows.append(({"a": names[a], "b": names[b]}, {
            **{name: x / (in_a + in_b - x) if in_a and in_b else math.nan for name, x in both.items()},
            "share_a": in_a / int(size.sum()), "share_b": in_b / int(size.sum()), "n": n}))
    return rows


def angles(found: Counted, projection: Projection) -> list[dict]:
    """Of every pair: cosine, its standard error `cosine_sd` (see `jackknife`), that of the projected shifts, and the
    noise that the projection adds; NaN where no weight was changed by both."""
    folds = found.folds.reshape(*found.folds.shape[:2], -1, projection.k).sum(2)
    rows = []
    for pair, (a, b) in enumerate(folds):
        exact = float(_cosine(found.sums[:, pair].sum(0)))
        rows.append({"cosine": exact, "cosine_sd": jackknife(found.sums[:, pair]),
                     "cosine_projected": float(_cosine(np.array([a @ a, b @ b, a @ b]))),
                     "projection_sd": projection.noise(exact)})
    return rows


def jackknife(sums: np.ndarray) -> float:
    """The standard error of a cosine by leaving out one group at a time (Efron 1982); sums: (groups, 3).

    It says how much the cosine differs from block to block of this matrix; nothing about another run of training.
    """
    groups = len(sums)
    left = _cosine(sums.sum(0) - sums)
    return math.sqrt((groups - 1) / groups * ((left - left.mean()) ** 2).sum()) if groups > 1 else math.nan


def _cosine(sums: np.ndarray) -> np.ndarray:
    """From (..., 3): a squared, b squared, a times b; NaN where one is zero."""
    aa, bb, ab = np.moveaxis(sums, -1, 0)
    whole = np.sqrt(aa) * np.sqrt(bb)
    return np.divide(ab, whole, out=np.full_like(whole, math.nan), where=whole > 0)


def matrices(names: Mapping) -> list[tuple[int, str, str]]:
    """(layer, matrix, tensor name) of the seven matrices of every layer, in order; ValueError for none."""
    kinds = {f"{path}.weight": matrix for matrix, path in MATRICES.items()}
    found = []
    for name in names:
        match = re.fullmatch(r"model\.layers\.(\d+)\.(.+)", name)
        if match and match[2] in kinds:
            found.append((int(match[1]), kinds[match[2]], name))
    if not found:
        raise ValueError("no tensor is named like model.layers.0.self_attn.q_proj.weight: not a Qwen3 model")
    return sorted(found, key=lambda entry: (entry[0], list(MATRICES).index(entry[1])))


def check_models(base, models: Mapping, label: str = "sft", layers: Sequence[int] = ()) -> None:
    """StudyError unless every expert has the matrices of the base (in `layers`, where named), of the same shapes."""
    def found(state):
        return {name: state.meta[name][1] for layer, _, name in matrices(state.meta) if layer in layers or not layers}

    shapes = found(base)
    for model, state in models.items():
        theirs = found(state)
        for name in sorted(shapes.keys() | theirs.keys()):
            if shapes.get(name) != theirs.get(name):
                said = [f"shape {list(have[name])}" if name in have else "no such tensor" for have in (theirs, shapes)]
                raise StudyError(f"{name}: {model} has {said[0]} and {label} has {said[1]}: "
                                 f"compare experts that were trained from this very {label} model")


def measure(
    base, models: Mapping, *, eta: float = ETA, k: int = 256, seed: int = 0, threads: int = 0, layers: Sequence[int] = (),
    report=None,
) -> tuple[pd.DataFrame, pd.DataFrame]:
    """(jaccard, cosine) over all layers, matrices and pairs, as stored and in bfloat16; models as for `Stream`.

    `layers`: those that are looked at, where these are not all; StudyError for one that the models do not have.
    """
    check_models(base, models, layers=layers)
    work, names = matrices(base.meta), list(models)
    if lacking := sorted(set(layers) - {layer for layer, _, _ in work}):
        raise StudyError(f"layer {lacking[0]} is asked for, the models have {len({layer for layer, _, _ in work})}, counted "
                         "from 0: change analysis.layers")
    work = [entry for entry in work if entry[0] in layers or not layers]
    table, cosines = [], []
    stream = Stream(base, models, eta=eta, k=k, seed=seed, threads=threads)([name for _, _, name in work])
    for done, ((layer, matrix, _), (name, *ways)) in enumerate(zip(work, stream, strict=True), 1):
        projection = Projection(count_of(base.meta[name]), k, seed, name)
        found = {id(way): list(zip(overlaps(way, names), angles(way, projection), strict=True)) for way in ways}
        for bf16, way in zip((False, True), ways, strict=True):  # of bfloat16 files, twice the same
            for (pair, overlap), angle in found[id(way)]:
                head = {"layer": layer, "matrix": matrix, **pair, "bf16": bf16}
                table.append(head | {key: x for key, x in overlap.items() if key != "n"} | {"eta": eta})
                cosines.append(head | angle | {"n": overlap["n"]})
        if report:
            report(done, len(work))
    return pd.DataFrame(table), pd.DataFrame(cosines)


def opened(folder: Path) -> Checkpoint:
    """A model's folder, or one of some layers of it."""
    return Checkpoint(folder, [folder / PART] if (folder / PART).is_file() else ())


def build(ctx) -> None:
    """jaccard.parquet and cosine.parquet of the experts against `sft`; `a` and `b` are domains.

    `jaccard_etas` and `cosine_etas` are the same at the other thresholds `etas`, a column eta each.
    """
    settings, names = ctx.stage.settings, [name for name in ctx.inputs if name != "sft"]
    domains = [name.removeprefix("rl-") for name in names]
    with ExitStack() as stack:
        base, *models = (stack.enter_context(opened(Path(ctx.inputs[name]))) for name in ("sft", *names))
        at = {eta: measure(base, dict(zip(domains, models, strict=True)), eta=eta, k=settings["random_projection"],
                           seed=settings["seed"], layers=settings.get("layers", ()), report=ctx.progress.step)
              for eta in (settings["eta"], *settings["etas"])}
    for i, name in enumerate(("jaccard", "cosine")):
        at[settings["eta"]][i].to_parquet(ctx.out / f"{name}.parquet", index=False)
        others = [at[eta][i].assign(eta=eta) for eta in settings["etas"]]
        if others:
            pd.concat(others, ignore_index=True).to_parquet(ctx.out / f"{name}_etas.parquet", index=False)
