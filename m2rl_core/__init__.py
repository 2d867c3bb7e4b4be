"""m2rl_core: one study of mixing or merging multi-domain RLVR, small enough to read, real enough to run."""
import os
from pathlib import Path

# How long an OpenMP thread spins before it sleeps; read when torch is first imported. Sampling on 2 cores, tokens/s on
# a quiet machine and beside one busy process: 1000 times 15 k and 13 k, this 23 k and 10 k, 10000 times 25 k and 7 k,
# libgomp's own choice (300000) 27 k and 6 k, or 0.5 k with two busy ones.
os.environ.setdefault("GOMP_SPINCOUNT", "3000")

# On Intel's processors: matrix products with the same bits whatever the alignment of memory, at no cost in time.
_cpu = Path("/proc/cpuinfo")
if _cpu.is_file() and "GenuineIntel" in _cpu.read_text():
    os.environ.setdefault("MKL_CBWR", "AUTO,STRICT")

__version__ = "0.1.0"
