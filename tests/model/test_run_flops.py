"""The FLOPs of a run, against the ledger step by step."""

from sparse_gpt.model.flops import active_counts, linear_shapes, sequence_flops
from sparse_gpt.model.run_flops import Phase, run_flops

DIMS = {"n_layer": 2, "n_head": 2, "d_model": 8, "d_ff": 20}


def test_phases_add_up():
    shapes = linear_shapes(DIMS)
    every = sum(out * inner for out, inner in shapes.values())
    counts = active_counts(DIMS, 0.75)
    active = sum(counts.values())
    rest = sequence_flops(DIMS, 5, 11, dict.fromkeys(shapes, 0)).total
    sparse, dense = (sequence_flops(DIMS, 5, 11, c).total for c in (counts, None))

    def one(phase: Phase) -> int:
        return run_flops(rest, 5, 1, [phase])

    assert one(Phase(1, active, active)) == sparse
    assert one(Phase(1, every, every)) == dense
    # A dense gradient: one product of three in full.
    assert one(Phase(1, active, every)) == sparse + 2 * 5 * (every - active)
    phases = [Phase(7, every, every), Phase(10, active, active), Phase(3, active, every)]
    assert run_flops(rest, 5, 4, phases) == 4 * sum(one(phase) for phase in phases)
    assert one(phases[1]) == 10 * sparse
