"""The method of a run from its configuration, and what is refused before it starts."""

import pytest

from sparse_gpt.errors import UserError
from sparse_gpt.run_method import method_of
from sparse_gpt.topology.methods import METHODS
from tests.contracts.runs import run_config


def configured(algorithm, steps=100, **sparsity):
    changes = {f"sparsity__{key}": value for key, value in sparsity.items()}
    if algorithm == "top_kast":
        changes["optimizer__weight_decay"] = 0.0
    return run_config("corpus", "out", max_steps=steps, sparsity__algorithm=algorithm, **changes)


@pytest.mark.parametrize("algorithm", METHODS)
def test_every_algorithm_of_the_config_is_a_method(algorithm):
    method = method_of(configured(algorithm), world_size=1)
    assert type(method) is METHODS[algorithm]
    assert (method.schedule.freq, method.schedule.stop) == (3, 75)


def test_what_methods_need_besides_comes_from_their_section():
    method = method_of(configured("gmp", gmp={"initial_sparsity": 0.25}), 1)
    assert method.active_after(0, 25, 100) == 75
    method = method_of(configured("search_spaces", search_spaces={"exploit": "fix"}), 1)
    assert [t for t in range(1, 101) if method.trains(t) == "forward"] == list(range(51, 101))
    own = {"warmup": 0.2, "phase": 0.1, "last_dense": 0.1, "last_sparse": 0.2}
    method = method_of(configured("ac_dc", ac_dc=own, steps=50), 1)
    assert [t for t in range(51) if method.is_update(t)] == [10, 15, 20, 25, 30, 35, 40]


def refused(message, algorithm, **sparsity):
    with pytest.raises((UserError, ValueError), match=message):
        method_of(configured(algorithm, **sparsity), 1)


@pytest.mark.parametrize("algorithm", ["gmp", "granet"])
def test_runs_without_an_update_that_reaches_the_sparsity(algorithm):
    refused(r"sparsity\.update\.freq", algorithm, update={"freq": 80})
    refused(r"sparsity\.update\.stop", algorithm, update={"freq": 3, "stop": 3})
    refused("lower sparsity", algorithm, update={"freq": 90, "stop": 400}, steps=80)


@pytest.mark.parametrize("steps", [5, 9, 15])
def test_runs_too_short_for_the_phases_of_ac_dc(steps):
    refused(r"phases without a step.*sparsity\.ac_dc\.phase", "ac_dc", steps=steps)
    method_of(configured("ac_dc", steps=20), 1)


def test_phases_that_are_more_than_the_run():
    own = {"warmup": 0.1, "phase": 0.2, "last_dense": 0.3, "last_sparse": 0.4}
    method_of(configured("ac_dc", ac_dc=own), 1)  # exactly all of it
    refused("more than 1", "ac_dc", ac_dc=own | {"phase": 0.21})


def test_what_makes_no_sense_together():
    refused("gmp is set, but algorithm is set", "set", gmp={"initial_sparsity": 0.5})
    refused(r"initial_sparsity 0\.8 is more than", "gmp", gmp={"initial_sparsity": 0.8})
    refused("backward_sparsity", "top_kast", top_kast={"backward_sparsity": 0.8})
    refused("dense_sparsity", "ac_dc", ac_dc={"dense_sparsity": 0.8})
    for algorithm in METHODS.keys() - {"set", "rigl"}:
        refused("mode: follow", algorithm, update={"freq": 3, "mode": "replace"})
    refused("update.scope: model", "top_kast", distribution="global")
    with pytest.raises(UserError, match=r"optimizer\.weight_decay: 0"):
        run_config("corpus", "out", sparsity__algorithm="top_kast")


@pytest.mark.parametrize("algorithm", ["set", "rigl", "granet", "ac_dc", "search_spaces"])
def test_powers_of_weights_that_start_at_zero(algorithm):
    refused("powerpropagation.*stay there", algorithm, powerpropagation=2.0)


def test_powerpropagation():
    for algorithm in ("static", "gmp", "top_kast"):
        method_of(configured(algorithm, powerpropagation=2.0), 1)
    fix = {"exploit": "fix"}
    method_of(configured("search_spaces", powerpropagation=2.0, search_spaces=fix), 1)
    refused("powerpropagation", "static", powerpropagation=0.5)
    block = {"type": "block", "block": [2, 2]}
    refused("blocks are scored", "gmp", powerpropagation=2.0, structure=block)
