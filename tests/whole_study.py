"""The whole study at profile smoke, made once for all test files that look at it; some two minutes on two calm cores."""
from __future__ import annotations

import os
import subprocess
import sys
import time
from dataclasses import dataclass
from pathlib import Path

from m2rl_core.profile import repo_root

ROOT = repo_root()


@dataclass(frozen=True)
class Study:
    """A finished reproduction: its report, its store, the environment it ran in, what it said and its seconds."""

    report: Path
    store: Path
    environment: dict
    said: str
    seconds: float


def run(arguments: list[str], environment: dict) -> subprocess.CompletedProcess:
    """A command of this clone, from another folder than it, so that nothing rests on where one stands."""
    return subprocess.run([sys.executable, *arguments], cwd=Path(environment["M2RL_ARTIFACTS"]).parent, env=environment,
                          text=True, stdout=subprocess.PIPE, stderr=subprocess.STDOUT)


def environment_in(folder: Path) -> dict[str, str]:
    """The environment of a command whose store and reports lie in a folder."""
    return {key: value for key, value in os.environ.items() if not key.startswith("M2RL_")} | {
        "M2RL_ARTIFACTS": str(folder / "artifacts"), "M2RL_REPORTS": str(folder / "reports"),
        "PYTHONPATH": str(ROOT), "TOKENIZERS_PARALLELISM": "false"}


def make(folder: Path) -> Study:
    """`reproduce --profile smoke` in a folder, as a user types it."""
    environment = environment_in(folder)
    start = time.monotonic()
    done = run(["-m", "m2rl_core", "reproduce", "--profile", "smoke"], environment)
    seconds = time.monotonic() - start
    print(f"\nreproduce --profile smoke: {seconds:.0f} s")
    assert done.returncode == 0, done.stdout[-4000:]
    return Study(folder / "reports" / "smoke", folder / "artifacts" / "smoke", environment, done.stdout, seconds)
