"""Where a calibration is kept: beside the artifacts, by this machine and by everything of the profile that it depends on."""
from __future__ import annotations

import hashlib
import json
from pathlib import Path

from m2rl_core.provenance import machine
from m2rl_core.specs import Profile

VERSION = 1  # raise it when `calibrate` measures something else; what was kept before is then not read


def key(profile: Profile) -> str:
    """Eight hex digits of what a calibration depends on: this machine, the shape, the batch, the lengths, the threads."""
    rl = profile.rl
    parts = [VERSION, machine(), str(profile.model), profile.threads, profile.jobs, profile.base.batch_tokens,
             profile.sft.batch_size, rl.prompts, rl.group, rl.max_new_tokens, rl.max_turns, rl.eval_items, rl.eval_k]
    return hashlib.sha256(json.dumps(parts).encode()).hexdigest()[:8]


def file(profile: Profile, store: Path) -> Path:
    """Where the calibration of this machine for the profile stands."""
    return store / f"throughput-{key(profile)}.json"


def cached(profile: Profile, store: Path) -> dict | None:
    """The calibration of this machine, if it was made."""
    path = file(profile, store)
    return json.loads(path.read_text(encoding="utf-8")) if path.is_file() else None
