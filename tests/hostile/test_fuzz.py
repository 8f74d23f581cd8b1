"""Spoilt files by the thousand: every one is read as promised, or refused with a `UserError`."""

import json
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]
FEW = {"config": 400, "index": 700, "manifest": 500, "shard": 300, "folder": 400, "record": 700}
MANY = {"config": 12_000, "index": 30_000, "manifest": 15_000, "shard": 7_000, "folder": 10_000,
        "record": 28_000}  # fmt: skip
MAX_GROWTH = 512  # MiB of resident memory, over all cases


def fuzz(seed: int, wanted: dict[str, int]) -> dict[str, dict[str, int]]:
    """Run the fuzzer; its counts by reader."""
    command = [sys.executable, "-m", "tests.hostile.fuzz", str(seed)]
    command += [f"{reader}={cases}" for reader, cases in wanted.items()]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr[-4000:]
    found = json.loads(done.stdout.splitlines()[-1])
    assert found["grown_mib"] <= MAX_GROWTH
    for reader, counts in found["counts"].items():
        assert counts["cases"] == wanted[reader] == counts["valid"] + counts["refused"]
        assert counts["refused"] > wanted[reader] // 4  # the generator does spoil something
        assert counts["valid"] > 0  # and not everything
    return found["counts"]


def test_a_few_thousand(fuzzed) -> None:
    fuzzed(fuzz(0, FEW))


@pytest.mark.slow
@pytest.mark.timeout(3000)
@pytest.mark.parametrize("reader", MANY)
def test_a_hundred_thousand(fuzzed, reader) -> None:
    assert sum(MANY.values()) >= 100_000
    fuzzed(fuzz(1, {reader: MANY[reader]}))
