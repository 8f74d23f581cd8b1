"""The soak, in short: faults in a row, then the comparison with an undisturbed run."""

import json
import subprocess
import sys

import pytest

from tests.faults import tally
from tests.ranks import ROOT

pytestmark = [pytest.mark.launcher, pytest.mark.slow]


@pytest.mark.timeout(1800)
def test_a_short_soak_loses_nothing(tmp_path):
    out = tmp_path / "soak.json"
    command = [sys.executable, str(ROOT / "tests/soak.py"), "--minutes", "2", "--interval", "6"]
    ended = subprocess.run(
        [*command, "--out", str(out)], cwd=ROOT, capture_output=True, text=True, timeout=1700
    )
    assert ended.returncode == 0, ended.stdout + ended.stderr
    summary = json.loads(out.read_text())
    assert summary["verdict"] == "equal"
    assert summary["largest_difference_of_a_loss"] == 0.0
    assert summary["losses_compared"] >= summary["steps"]
    assert summary["faults"] == sum(summary["faults_by_kind"].values()) >= 3
    tally.add("faults in a soak", summary["faults"])
    tally.note(
        f"soak: {summary['steps']} steps, {summary['restarts']} restarts, "
        f"{summary['losses_compared']} losses compared, none differs"
    )
