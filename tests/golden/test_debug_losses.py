"""The losses of `configs/debug.yaml` on the small corpus are those on record."""

import json

import pytest

from tests.golden.debug_run import FILE, machine, run


def test_losses_are_the_golden_ones():
    """To 1e-4 anywhere; to the last bit with the CPU and the torch that made the record."""
    golden = json.loads(FILE.read_text(encoding="utf-8"))
    made = run()
    assert len(made["losses"]) == 40
    assert golden["losses"][-1] < golden["losses"][0] - 0.5, "the record itself learns"
    assert made["losses"] == pytest.approx(golden["losses"], abs=1e-4, rel=0)
    assert made["validation"] == pytest.approx(golden["validation"], abs=1e-4, rel=0)
    here = machine()
    if all(golden[key] == value for key, value in here.items()):
        for key in ("losses", "norms", "validation", "topology"):
            assert made[key] == golden[key], key
