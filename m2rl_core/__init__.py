"""m2rl_core: one study of mixing or merging multi-domain RLVR, small enough to read, real enough to run."""
import os

# OpenMP threads that wait by spinning starve each other on a shared machine (8 times slower there); sleeping ones do
# not. Read when torch is first imported.
os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")
os.environ.setdefault("GOMP_SPINCOUNT", "0")

__version__ = "0.1.0"
