"""The settings of a process that computes on a CPU."""
import subprocess
import sys

import pytest

CODE = """
import resource, sys, torch
from m2rl_core import cpu
if sys.argv[1] == "settled":
    cpu.settle(1)
print(torch.get_num_threads())
def work():
    for _ in range(50):
        kept = [torch.ones(2**20) for _ in range(4)]  # 4 MB each
work()
before = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
work()
print(resource.getrusage(resource.RUSAGE_SELF).ru_minflt - before)
"""


@pytest.mark.skipif(sys.platform != "linux", reason="glibc's heap")
def test_freed_memory_is_kept_for_the_next_tensor():
    # the fault: every tensor's pages are given back and asked for again, a tenth of a training step
    threads, faults = subprocess.run([sys.executable, "-c", CODE, "settled"], capture_output=True, text=True,
                                     check=True).stdout.split()
    assert threads == "1"
    assert int(faults) < 1000  # 51,200 pages are written
