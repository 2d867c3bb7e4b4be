"""One look at a stretch of the base and all experts counts all that section 3.3 asks about it (see `weights`).

Weights are taken as rows of `width`, and the projection folds them by column: as vector units add. Sums are float32
over a few rows, a fold's over SPAN, and then added in float64.
"""
from __future__ import annotations

import numpy as np

from m2rl_core.merging.dare import STEP, fill
from m2rl_core.merging.diagnosis import bfloat16
from m2rl_core.kernel import fused, kernel
from m2rl_core.merging.stored import wide

ROWS = 4  # taken at once: their shifts fit the nearest cache
WORD = 32  # rows whose signs come from one draw of a 32-bit word for each column
SPAN = 256
CODES = 15  # bits of a magnitude: the upper ones of |w| as float32
TOP, REST = np.uint32(1 << 31), np.uint32((1 << 31) - 1)


@kernel
def _place(base, experts, origin, cells):
    """origin := the base in float32; cells := its magnitudes << experts, which leaves a bit for each expert."""
    for i in range(len(base)):
        x = np.float32(wide(base[i]))
        origin[i] = x
        cells[i] = np.int32(np.uint32(x.view(np.uint32) & REST) >> np.uint32(16)) << np.int32(experts)


@kernel
def _look(model, origin, bit, eta, flips, y, cells):
    """y := the shifts that count as changed, else 0, with the projection's signs; cells |= bit at those.

    `eta` None: any weight that differs counts as changed.
    """
    for i in range(len(model)):
        a, b = np.float32(wide(model[i])), origin[i]
        x = np.float32(a - b)
        if eta is None:
            moved = x != 0
            y[i] = np.uint32(x.view(np.uint32) ^ flips[i]).view(np.float32)
        else:
            u, v = abs(a), abs(b)
            moved = abs(x) > eta * (u if u > v else v)
            y[i] = np.uint32(x.view(np.uint32) ^ flips[i]).view(np.float32) if moved else np.float32(0)
        cells[i] = np.int32(cells[i] | (bit if moved else np.int32(0)))


@kernel
def _flip(signs, flips):
    """flips := the uppermost bit of `signs` (width,) for the first of ROWS rows, the next bit for the next, and so on."""
    n = len(signs)
    for row in range(0, len(flips), n):
        out = flips[row : row + n]
        for j in range(n):
            out[j] = np.uint32(signs[j] & TOP)
            signs[j] = np.uint32(signs[j] + signs[j])


@fused
def _add_pair(a, b, folds):
    """folds (2, width) += the columns of a pair where both changed; the sums there of a squared, b squared and a times b.

    a, b: (ROWS, width) shifts, 0 where not changed.
    """
    aa = bb = ab = np.float32(0)
    for j in range(folds.shape[1]):
        pa, pb = folds[0, j], folds[1, j]
        for r in range(ROWS):
            x = a[r, j] if b[r, j] != 0 else np.float32(0)
            z = b[r, j] if a[r, j] != 0 else np.float32(0)
            pa += x
            pb += z
            aa += x * x
            bb += z * z
            ab += x * z
        folds[0, j], folds[1, j] = pa, pb
    return aa, bb, ab


@kernel
def _count(cells, counts):
    for i in range(len(cells)):
        counts[np.uint32(cells[i])] += np.int32(1)


@kernel
def look(rows, row, eta, state, counts, sums, folds):
    """Adds a stretch of a tensor to `counts`, `sums` and `folds`.

    rows: the same stretch of the base and of each expert (P,), which begins at row `row`, a multiple of ROWS, of the
    tensor; eta: None or float32; state: of the stream of signs. counts: int32 (2^CODES << experts,), by magnitude and
    which experts changed it; sums: float64 (pairs, 3), folds: float64 (pairs, 2, width), see `_add_pair`.
    """
    base, experts, width = rows[0], len(rows) - 1, folds.shape[2]
    block, size, known = ROWS * width, len(base), -1
    y, lanes = np.zeros((experts, block), np.float32), np.zeros(folds.shape, np.float32)
    origin, cells, flips = np.empty(block, np.float32), np.empty(block, np.int32), np.empty(block, np.uint32)
    drawn = np.empty(width // 2, np.uint64)
    signs = drawn.view(np.uint32)
    for first in range(0, size, block):
        here, n = row + first // width, min(block, size - first)
        if here // WORD != known:
            known = here // WORD
            fill(state + np.uint64(known * (width // 2)) * STEP, drawn)
            for j in range(width):
                signs[j] = np.uint32(signs[j] << np.uint32(here % WORD))
        _flip(signs, flips)
        _place(base[first : first + n], experts, origin, cells)
        for e in range(experts):
            y[e, n:] = 0
            _look(rows[1 + e][first : first + n], origin, np.int32(1 << e), eta, flips, y[e], cells)
        _count(cells[:n], counts)
        pair = 0
        for a in range(experts):
            for b in range(a + 1, experts):
                aa, bb, ab = _add_pair(y[a].reshape(ROWS, width), y[b].reshape(ROWS, width), lanes[pair])
                sums[pair, 0] += aa
                sums[pair, 1] += bb
                sums[pair, 2] += ab
                pair += 1
        if (first // block + 1) % (SPAN // ROWS) == 0 or first + n == size:
            folds += lanes
            lanes[:] = 0


@kernel
def halve(values, out):
    """out := the bits of the nearest bfloat16; float32 (P,) to uint16 (P,)."""
    for i in range(len(out)):
        out[i] = bfloat16(values[i])


@kernel
def drain(table, total, seen):
    """total += table and table := 0, both (magnitudes, patterns); seen[m] := True where a magnitude occurs."""
    for m in range(len(table)):
        some, row = np.int32(0), table[m]
        for p in range(len(row)):
            some |= row[p]
        if some:
            seen[m] = True
            for p in range(len(row)):
                total[m, p] += row[p]
                row[p] = 0
