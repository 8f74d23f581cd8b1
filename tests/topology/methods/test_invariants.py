"""What holds in every run of every method: counts, sets inside each other, clean moments, FLOPs."""

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from sparse_gpt.run_phases import unit_phases
from sparse_gpt.topology.methods import METHODS
from sparse_gpt.topology.schedule import UpdateSchedule
from tests.topology.methods.toy import BLOCK, SINGLE, Driven, totals

STEPS = 14
SPARSITIES = st.sampled_from([0.0, 0.3, 0.5])
SETTINGS = {
    "static": {},
    "set": {},
    "rigl": {},
    "gmp": {"initial_sparsity": SPARSITIES},
    "granet": {"initial_sparsity": SPARSITIES},
    "ac_dc": {
        "warmup": st.sampled_from([0.1, 0.3]),
        "phase": st.sampled_from([0.08, 0.1, 0.2]),
        "last_dense": st.sampled_from([0.1, 0.2]),
        "last_sparse": st.sampled_from([0.1, 0.3]),
        "dense_sparsity": SPARSITIES,
        "reset_moments": st.booleans(),
    },
    "top_kast": {"backward_sparsity": SPARSITIES},
    "search_spaces": {
        "exploit": st.sampled_from(["fix", "reset", "regularize"]),
        "v": st.integers(1, STEPS),
        "z": st.integers(1, 6),
    },
}


@st.composite
def runs(draw, name):
    """A method and targets on the toy's layers."""
    block = draw(st.sampled_from([SINGLE, BLOCK]))
    own = {key: draw(values) for key, values in SETTINGS[name].items()}
    if name == "ac_dc":
        own["total_steps"] = STEPS
    freq = draw(st.integers(1, 4))
    schedule = UpdateSchedule(freq, draw(st.integers(freq + 1, STEPS + 1)))
    targets = {n: draw(st.integers(1, count // 2)) for n, count in totals(block).items()}
    return Driven(METHODS[name](schedule, **own), targets, block, draw(st.booleans()))


def check_sets(driven):
    """A inside B; weights and moments only where they are stored, and trained."""
    controller = driven.controller
    forward, trained = driven.forward, driven.trained
    assert trained is None or forward <= trained
    for name, mask in controller.masks.items():
        assert int(mask.bits.count()) == mask.active
        fragment = driven.shards.fragment(name)
        outside = {kind: tensor.clone() for kind, tensor in fragment.tensors().items()}
        if driven.method.stores_all:
            keep = controller.trained.get(name)
            del outside["master"]
        else:
            keep = mask
        for kind, tensor in outside.items() if keep is not None else ():
            before = tensor.clone()
            keep.zero_outside_(tensor, 0)
            assert before.equal(tensor), (name, kind)


def check_counts(driven, step):
    controller, method = driven.controller, driven.method
    active, trained = [], []
    for name, mask in controller.masks.items():
        active.append(method.active_after(step, driven.targets[name], mask.units))
        trained.append(method.trained_after(step, driven.targets[name], mask.units))
    masks = list(controller.masks.values())
    found = [mask.active for mask in masks]
    backward = [mask.active for mask in controller.trained.values()] or trained
    if controller.whole_model:
        active, trained, found, backward = ([sum(c)] for c in (active, trained, found, backward))
    assert found == active
    assert backward == trained


@pytest.mark.parametrize("name", METHODS)
@settings(max_examples=12, deadline=None)
@given(data=st.data())
def test_a_run(name, data):
    driven = data.draw(runs(name))
    check_counts(driven, 0)
    spent, layers = [], []
    for layer, mask in driven.controller.masks.items():
        layers.append((driven.targets[layer], mask.units))
    size = driven.controller.masks["a"].block_size
    for step in range(1, STEPS + 1):
        before = driven.forward
        report = driven.step(step)
        spent.append(driven.weights)
        assert (report is not None) == driven.method.is_update(step)
        if report is None:
            assert driven.forward == before
        else:
            assert report.active == len(driven.forward)
            assert report.replaced == len(driven.forward - before)
        check_sets(driven)
        check_counts(driven, step)
    predicted = [
        (size * forward, size * gradient)
        for many, forward, gradient in unit_phases(driven.method, layers, STEPS)
        for _ in range(many)
    ]
    assert predicted == spent


@pytest.mark.parametrize("name", METHODS)
@settings(max_examples=8, deadline=None)
@given(data=st.data())
def test_steps_that_are_not_finite(name, data):
    """They change nothing; counts are what they must be after the next finite step."""
    driven = data.draw(runs(name))
    broken = data.draw(st.sets(st.integers(1, STEPS - 1), max_size=5))

    def state():
        kinds = ("master", "exp_avg", "exp_avg_sq")
        return driven.forward, driven.trained, [driven.values(kind) for kind in kinds]

    before = state()
    for step in range(1, STEPS + 1):
        assert (driven.step(step, broken=step in broken) is None) or step not in broken
        if step in broken:
            assert state() == before
        else:
            check_sets(driven)
            check_counts(driven, step)
        before = state()
