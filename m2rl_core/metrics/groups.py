"""Groups of weights in which gradients are looked at: by what they do and where they stand. Imports no torch."""
from __future__ import annotations

import re

WHOLE = "all weights"
THIRDS = ("first third", "middle third", "last third")
ORDER = (WHOLE, *(f"attention, {third}" for third in THIRDS), "embedding", *(f"MLP, {third}" for third in THIRDS),
         *(f"norms, {third}" for third in THIRDS), "last norm")  # in which they are shown


def group_of(name: str, layers: int) -> str:
    """The group that a weight belongs to: the embedding, or attention, MLP or norms of a third of the layers."""
    found = re.match(r"model\.layers\.(\d+)\.(self_attn|mlp)?", name)
    if found is None:
        return "last norm" if name == "model.norm.weight" else "embedding"
    kind = "norms" if name.endswith("norm.weight") else {"self_attn": "attention", "mlp": "MLP"}[found[2]]
    return f"{kind}, {THIRDS[int(found[1]) * 3 // layers]}"
