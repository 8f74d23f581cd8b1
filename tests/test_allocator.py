"""Freed memory is kept: blocks are not cleared by the system again and again."""

import ctypes
import os
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]
# Prints the page faults of the last four of thirty allocations of 64 MB: free blocks have merged.
SCRIPT = """
import resource, sys, torch
from sparse_gpt.allocator import keep_freed_memory
print(keep_freed_memory() if sys.argv[1] == "keep" else "as it is")
for turn in range(30):
    if turn == 26:
        before = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
    torch.ones(16 << 20)
print(resource.getrusage(resource.RUSAGE_SELF).ru_minflt - before)
"""
PAGES = 4 * (64 << 20) // os.sysconf("SC_PAGE_SIZE")


def faults(word, **environment):
    ours = ("MALLOC", "GLIBC_TUNABLES", "LD_PRELOAD")
    plain = {name: value for name, value in os.environ.items() if not name.startswith(ours)}
    done = subprocess.run(
        [sys.executable, "-c", SCRIPT, word],
        cwd=ROOT, env=plain | environment, capture_output=True, text=True, check=True, timeout=120,
    )  # fmt: skip
    said, count = done.stdout.split("\n")[:2]
    return said, int(count)


@pytest.mark.skipif(not hasattr(ctypes.CDLL(None), "gnu_get_libc_version"), reason="not glibc")
def test_blocks_are_cleared_once():
    # Huge pages, where the system gives them unasked, are 512 pages in one fault.
    said, before = faults("leave")
    assert said == "as it is" and before > PAGES // 600
    said, after = faults("keep")
    assert said == "True" and after < before / 4


def test_settings_of_the_user_are_left_alone():
    said, _ = faults("keep", MALLOC_MMAP_THRESHOLD_="33554432")
    assert said == "False"
