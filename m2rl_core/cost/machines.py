"""The machines that an estimate may name, as data (`machines.yaml`)."""
from __future__ import annotations

import difflib
from dataclasses import dataclass
from functools import cache
from importlib.resources import files

import yaml

from m2rl_core.errors import StudyError


@dataclass(frozen=True)
class Machine:
    """One accelerator: operations and bytes a second, bytes of memory, bytes a second to others; `node` of them together."""

    name: str
    flops: float
    bandwidth: float
    memory: float
    link: float
    network: float
    node: int
    source: str = ""

    def wire(self, gpus: int) -> float:
        """Bytes a second of one among `gpus` that exchange something: the link in a node, the network beyond it."""
        return self.link if gpus <= self.node else self.network


@cache
def machines() -> dict[str, Machine]:
    """All of them by name."""
    text = (files(__package__) / "machines.yaml").read_text(encoding="utf-8")
    return {name: Machine(name, **fields) for name, fields in yaml.safe_load(text).items()}


def machine(name: str) -> Machine:
    """The machine of that name; raises StudyError with the nearest one."""
    known = machines()
    if name.lower() in known:
        return known[name.lower()]
    close = difflib.get_close_matches(name.lower(), known, 1, 0.4)
    hint = f"did you mean {close[0]!r}?" if close else f"there are {', '.join(known)}"
    raise StudyError(f"GPU={name}: unknown machine; {hint}")
