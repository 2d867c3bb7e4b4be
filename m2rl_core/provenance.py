"""Where a result comes from: commit, packages and machine, for manifests and run cards."""
from __future__ import annotations

import hashlib
import importlib.metadata
import os
import platform
import subprocess
import time
from pathlib import Path

RECORDED = ("torch", "transformers", "tokenizers", "safetensors", "numpy", "numba", "pandas", "pyarrow", "math-verify")


def provenance() -> dict:
    """Commit, packages, machine and time of making."""
    return {"commit": commit(), "packages": packages(), "machine": machine(),
            "created": time.strftime("%Y-%m-%dT%H:%M:%S%z")}


def packages() -> dict[str, str]:
    """Installed versions of the packages that can change a result."""
    return {name: _version(name) for name in RECORDED}


def commit() -> str:
    """The commit of the code, "+changes" where files differ from it; "unknown" outside of git."""
    here = Path(__file__).resolve().parent
    try:
        head = subprocess.run(["git", "rev-parse", "--short=12", "HEAD"], cwd=here, capture_output=True, text=True)
        if head.returncode:
            return "unknown"
        changes = subprocess.run(["git", "status", "--porcelain", "-uno", "--", ".", "../params"], cwd=here,
                                 capture_output=True, text=True)
    except FileNotFoundError:  # no git on this machine
        return "unknown"
    return head.stdout.strip() + ("+changes" if changes.stdout.strip() else "")


def code() -> str:
    """8 hex digits of this package's files, changes that are in no commit included."""
    home, digest = Path(__file__).parent, hashlib.sha256()
    for path in sorted(home.rglob("*")):
        if path.suffix in (".py", ".yaml", ".csv", ".json", ".jinja", ".txt"):
            digest.update(path.relative_to(home).as_posix().encode() + b"\0" + path.read_bytes() + b"\0")
    return digest.hexdigest()[:8]


def sha256(path: Path) -> str:
    """64 hex digits of a file's content."""
    with open(path, "rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def machine() -> dict:
    """Cores that this process may use, memory in GB, processor, system and Python."""
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count()
    memory = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") / 2**30
    return {"cores": cores, "memory_gb": round(memory, 1), "processor": platform.machine(),
            "system": platform.system(), "python": platform.python_version()}


def _version(package: str) -> str:
    try:
        return importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        return "not installed"


def freeze() -> list[str]:
    """Every installed package with its version, as pip would pin it."""
    found = {(dist.metadata["Name"], dist.version) for dist in importlib.metadata.distributions()}
    return sorted((f"{name}=={version}" for name, version in found), key=str.lower)
