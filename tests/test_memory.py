"""Freed blocks of memory are kept for later blocks of their size."""

from __future__ import annotations

import platform
import resource
import subprocess
import sys

import pytest

#: Prints the number of page faults while arrays of one megabyte are filled and freed, eight at a time.
FILL_AND_FREE = """
import resource, sys
import numpy as np
from ismdata.memory import keep_freed_blocks

if sys.argv[1] == "kept":
    keep_freed_blocks()
before = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
for _ in range(20):
    arrays = [np.ones(1 << 20, np.uint8) for _ in range(8)]
    del arrays
print(resource.getrusage(resource.RUSAGE_SELF).ru_minflt - before)
"""


def pages(how):
    done = subprocess.run([sys.executable, "-c", FILL_AND_FREE, how], capture_output=True, text=True, check=True)
    return int(done.stdout)


@pytest.mark.slow
@pytest.mark.skipif(platform.libc_ver()[0] != "glibc", reason="only glibc gives large blocks back at once")
def test_pages_of_freed_blocks_are_used_again():
    once = (8 << 20) // resource.getpagesize()
    assert pages("kept") < 3 * once
    assert pages("as usual") > 10 * once
