"""Where the names of points stand in a scatter plot: above, below, right or left of each, so that none covers another."""
from __future__ import annotations

import numpy as np
import pandas as pd

# side: (which way the text runs from its point, x, y of its anchor in pixels)
SIDES = {"above": (0, 0, -9), "below": (0, 0, 11), "right": (1, 8, 0), "left": (-1, -8, 0)}
LETTER, LINE, DOT = 5.0, 10.0, 5.0  # pixels: a letter's width and a line's height at font size 9, half a mark


def sides(frame: pd.DataFrame, facet: str | None, width: int, height: int) -> pd.Series:
    """A key of SIDES for each row of model, x, y. The panels (values of `facet`) share x, not y.

    One after the other, from left to right, each name takes the side where it covers least of the marks, of the names
    before it and of what is outside of the panel.
    """
    across = _pixels(frame["x"], width, 25)
    found = pd.Series("above", frame.index)
    for _, part in frame.groupby(facet) if facet else [("", frame)]:
        x, y = across[part.index], height - _pixels(part["y"], height, 12)
        taken = [_box(x[i], y[i], DOT, DOT) for i in part.index]
        for i in x.sort_values(kind="stable").index:
            half = LETTER * len(str(part.loc[i, "model"])) / 2
            boxes = {name: _box(x[i] + side * half + dx, y[i] + dy, half, LINE / 2) for name, (side, dx, dy) in SIDES.items()}
            cost = {name: sum(_shared(box, other) for other in taken) + _outside(box, width, height)
                    for name, box in boxes.items()}
            found[i] = min(cost, key=cost.get)
            taken.append(boxes[found[i]])
    return found


def _pixels(values: pd.Series, size: int, padding: int) -> pd.Series:
    reach = values.max() - values.min()
    return padding + (values - values.min()) / (reach if reach else 1.0) * (size - 2 * padding)


def _box(x: float, y: float, half_width: float, half_height: float) -> tuple[float, ...]:
    return x - half_width, y - half_height, x + half_width, y + half_height


def _shared(a, b) -> float:
    """Square pixels that two boxes share."""
    return max(0.0, min(a[2], b[2]) - max(a[0], b[0])) * max(0.0, min(a[3], b[3]) - max(a[1], b[1]))


def _outside(box, width: int, height: int) -> float:
    inside = _shared(box, (0, 0, width, height))
    return float(np.prod([box[2] - box[0], box[3] - box[1]])) - inside
