"""Wall time and memory of a command, and the floor that no merge can go below."""
from __future__ import annotations

import os
import subprocess
import time
from collections.abc import Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from types import MappingProxyType

BLOCK = 1 << 20


def warm(files: Sequence[Path]) -> None:
    """Reads files, so that they lie in the page cache."""
    buffer = memoryview(bytearray(BLOCK))
    for path in files:
        with path.open("rb", buffering=0) as file:
            while file.readinto(buffer):
                pass


def drop(files: Sequence[Path]) -> None:
    """Drops files from the page cache, so that the next read is from the disk."""
    for path in files:
        with path.open("rb") as file:
            os.fsync(file.fileno())
            os.posix_fadvise(file.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)


def run(command: Sequence[str], log: Path, environment: Mapping[str, str] = MappingProxyType({})) -> dict:
    """Runs a command, with these environment variables beside its own, to its end: seconds of wall time, peak of anonymous
    memory and of all resident memory in MB.

    Resident memory includes pages of mapped files, which cost nothing; anonymous memory does not. It is read
    every 20 ms. RuntimeError, with the end of `log`, where the command fails.
    """
    anonymous = resident = 0
    with log.open("w") as out:
        start = time.perf_counter()
        process = subprocess.Popen(command, stdout=out, stderr=subprocess.STDOUT, env=os.environ | environment)
        while process.poll() is None:
            try:
                status = Path(f"/proc/{process.pid}/status").read_text()
            except (FileNotFoundError, ProcessLookupError):  # it has just ended
                continue
            fields = dict(line.split(":", 1) for line in status.splitlines() if ":" in line)
            if "RssAnon" in fields:
                anonymous = max(anonymous, int(fields["RssAnon"].split()[0]))
                resident = max(resident, int(fields["VmHWM"].split()[0]))
            time.sleep(0.02)
        seconds = time.perf_counter() - start
    if process.returncode:
        raise RuntimeError(f"{' '.join(command[:4])} ... failed, see {log}: {log.read_text()[-300:]}")
    return {"seconds": seconds, "anonymous_mb": round(anonymous / 1024), "resident_mb": round(resident / 1024)}


def copy_floor(files: Sequence[Path], out: Path, size: int) -> float:
    """Seconds to read all files once, with a thread for each core, and to write and flush one file of `size` bytes."""
    start = time.perf_counter()
    with ThreadPoolExecutor(len(os.sched_getaffinity(0))) as pool:
        reads = [pool.submit(warm, [path]) for path in files]
        block = os.urandom(BLOCK)
        with out.open("wb", buffering=0) as file:
            for first in range(0, size, BLOCK):
                file.write(block[: size - first])
            os.fsync(file.fileno())
        for read in reads:
            read.result()
    seconds = time.perf_counter() - start
    out.unlink()
    return seconds
