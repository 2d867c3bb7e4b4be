"""Progress that a person can see: one line a step in batch, one bar that moves in JupyterLab.

A builder calls `progress.step(12, 40, reward=0.61)`. In batch (the report's runner sets
M2RL_LOG to a file, or there is no notebook) each call is one line of text and nothing lands in the
executed notebook.
"""
from __future__ import annotations

import json
import os
import sys
import time
from collections.abc import Callable
from pathlib import Path

TRACE = "progress.jsonl"  # in a stage's state/: a line for each step, for those who watch from another process


def duration(seconds: float) -> str:
    """`1:20` minutes, `2:05:00` hours."""
    minutes, rest = divmod(int(round(seconds)), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours}:{minutes:02d}:{rest:02d}" if hours else f"{minutes}:{rest:02d}"


def spoken(seconds: float) -> str:
    """About how long: `40 seconds`, `4 minutes`, `3.2 hours`."""
    for most, unit, name in ((90, 1, "seconds"), (90 * 60, 60, "minutes")):
        if seconds < most:
            count = max(1, round(seconds / unit))
            return f"{count} {name if count > 1 else name.removesuffix('s')}"
    return f"{seconds / 3600:,.1f} hours"


def line(name: str, step: int, total: int, numbers: dict[str, float], left: float | None) -> str:
    """`rl-math · step 12/40 · reward 0.61 · 1:20 left`"""
    parts = [name, f"step {step}/{total}", *(f"{key} {value:.3g}" for key, value in numbers.items())]
    return " · ".join(parts + ([f"{duration(left)} left"] if left is not None else []))


def say(text: str) -> None:
    """One line to the runner's log where there is one, else to standard output."""
    path = os.environ.get("M2RL_LOG")
    if path:
        with open(path, "a", encoding="utf-8") as file:
            file.write(text + "\n")
    else:
        print(text, flush=True)


class Progress:
    """Reports the steps of one stage; `tick(seconds)` is called at each, with the seconds since the start.

    Each step is also a line of the file `trace`; a step that is made again after a crash stands there twice.
    """

    def __init__(self, name: str, tick: Callable[[float], None] | None = None, trace: Path | None = None):
        self.name = name
        self._tick, self._trace = tick, trace
        self._begun = self._last = time.monotonic()
        self._first: int | None = None
        self._bar = _Bar() if in_jupyter() else None

    @property
    def seconds(self) -> float:
        """Since this stage was started or taken up again."""
        return time.monotonic() - self._begun

    def step(self, step: int, total: int, **numbers: float) -> None:
        """Step `step` of `total` is done; `numbers` are shown as they come (reward, loss, ...)."""
        if self._first is None:
            self._first = step - 1
        done = step - self._first
        left = (total - step) * self.seconds / done if done > 0 else None
        text = line(self.name, step, total, numbers, left)
        if self._bar:
            self._bar.show(text, step / total)
        else:
            say(text)
        if self._tick:
            self._tick(self.seconds)
        if self._trace:
            with open(self._trace, "a", encoding="utf-8") as file:
                file.write(json.dumps({"step": step, "total": total, **numbers, "seconds": round(self.seconds, 2),
                                       "left": None if left is None else round(left, 1)}) + "\n")

    def log(self, text: str) -> None:
        """A remark, under the stage's name."""
        if self._bar:
            self._bar.show(f"{self.name} · {text}", None)
        else:
            say(f"{self.name} · {text}")

    def close(self) -> None:
        """The stage is made: the bar becomes one quiet line."""
        if self._bar:
            self._bar.show(f"{self.name} · made in {duration(self.seconds)}", None)
        else:
            say(f"{self.name} · made in {duration(self.seconds)}")


class Silent(Progress):
    """Of a process that works beside the one which shows how far they are."""

    def step(self, step: int, total: int, **numbers: float) -> None:
        pass

    def log(self, text: str) -> None:
        pass

    def close(self) -> None:
        pass


class _Bar:
    """One cell output that is written over."""

    def __init__(self):
        self._handle = None

    def show(self, text: str, share: float | None) -> None:
        from IPython.display import HTML, display
        bar = f'<progress value="{share:.3f}" max="1" style="width: 12em"></progress> ' if share is not None else ""
        content = HTML(f"<div style='font-family: monospace'>{bar}{text}</div>")
        if self._handle is None:
            self._handle = display(content, display_id=True)
        else:
            self._handle.update(content)


def in_jupyter() -> bool:
    """Whether a notebook's kernel runs this and nobody collects a log."""
    if "M2RL_LOG" in os.environ or "IPython" not in sys.modules:
        return False
    shell = sys.modules["IPython"].get_ipython()
    return shell is not None and hasattr(shell, "kernel")
