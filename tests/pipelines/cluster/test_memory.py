import subprocess
import sys

PROGRAM = """
import resource, sys
import numpy as np
from pipelines.cluster.memory import disable_malloc_trim

if sys.argv[1] == "keep":
    disable_malloc_trim()
for number in range(101):
    if number == 1:
        before = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
    np.ones(48 << 20, np.uint8)
print(resource.getrusage(resource.RUSAGE_SELF).ru_minflt - before)
"""


def faults(how: str) -> int:
    """Page faults of 100 blocks of 48 MiB, each filled and freed."""
    return int(subprocess.run([sys.executable, "-c", PROGRAM, how], check=True, capture_output=True, text=True).stdout)


def test_a_large_block_that_was_freed_is_used_again_without_page_faults():
    assert faults("keep") < 0.1 * faults("let go")
