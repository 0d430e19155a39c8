"""Freed memory is kept: counted in page faults, in a process of its own."""

import subprocess
import sys

FAULTS = """
import resource, sys
import numpy as np
from pipeline.runtime.memory import keep_freed_memory
if sys.argv[1] == "keep":
    assert keep_freed_memory()
def frame():
    images = [np.ones((512, 640), np.float32) for _ in range(8)]
    return [image + 1 for image in images]
frame()
before = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
for _ in range(50):
    frame()
print(resource.getrusage(resource.RUSAGE_SELF).ru_minflt - before)
"""


def faults(mode: str) -> int:
    result = subprocess.run(
        [sys.executable, "-c", FAULTS, mode], capture_output=True, text=True, check=True
    )
    return int(result.stdout)


def test_frames_after_the_first_fault_no_pages_in():
    assert faults("keep") < 100
    assert faults("leave") > 10 * faults("keep")
