"""Widths and counts: nominal, solved again for blocks, solved for the whole run, shared out."""

from fractions import Fraction

import pytest

from sparse_gpt.config import RunConfig
from sparse_gpt.config_file import validate
from sparse_gpt.errors import UserError
from sparse_gpt.ift.iso_flop import residual
from sparse_gpt.model.flops import sequence_flops
from sparse_gpt.sparse_units import Solution, base_cost, run_cost, scoring_cost, solve

VOCAB = 50257
DENSE = 876_303_876_096  # GPT-3 Small, S = 1024: Table 17
MODEL = {"member": "wide", "iso_flop": "model"}


def config(sparsity, **sections) -> RunConfig:
    tree = {
        "data": [{"path": "x"}],
        "seq_len": 1024,
        "max_steps": 1,
        "model": {"preset": "gpt3-small"},
        "ift": {"member": "wide"},
        "sparsity": sparsity,
        **sections,
    }
    return validate(RunConfig, tree, "test")


def total(solution: Solution) -> int:
    return sum(kept for kept, _ in solution.units.values())


def test_unstructured_keeps_the_nominal_sparsity():
    solution = solve(config({"sparsity": 0.5}), VOCAB)
    assert solution.units["h.0.attn.q.weight"] == (1092 * 1092 // 2, 1092 * 1092)
    assert len(solution.units) == 72
    assert solution.sparsity == Fraction(1, 2)


def test_blocks_are_solved_again_to_the_base_layers_flops():
    run = config({"sparsity": 0.5, "structure": {"type": "block", "block": [16, 16]}})
    solution = solve(run, VOCAB)
    assert solution.dims["d_model"] == 1104
    kept, count = solution.units["h.3.attn.o.weight"]
    assert (kept, count) == (768 * 768 // 256, 69 * 69)
    assert kept != round(count / 2)


def test_without_widening_blocks_keep_the_nominal_sparsity():
    run = config(
        {"sparsity": 0.75, "structure": {"type": "block", "block": [16, 16]}},
        ift={"member": "none"},
    )
    assert solve(run, VOCAB).units["h.3.attn.o.weight"] == (48 * 48 // 4, 48 * 48)


def test_dense_has_none_and_a_filter_must_match():
    dense = solve(config({"sparsity": 0.0}), VOCAB)
    assert (dense.units, dense.sparsity) == ({}, 0)
    only = solve(config({"sparsity": 0.75, "param_filter": ["h.*.mlp.*"]}), VOCAB)
    assert len(only.units) == 24
    with pytest.raises(UserError, match="mlq"):
        solve(config({"sparsity": 0.75, "param_filter": ["h.*.mlq.*"]}), VOCAB)


@pytest.mark.parametrize(
    ("sparsity", "head", "seq_len", "active", "solved"),
    [
        # (dense total - fixed cost) / 6 S, by hand from FACTS section 3's formula.
        (0.50, "dense", 1024, 60_688_764, "0.645273"),
        (0.75, "dense", 1024, 27_462_912, "0.919165"),
        (0.50, "project", 1024, 75_294_720, "0.559901"),
        (0.75, "project", 1024, 63_700_992, "0.812500"),
        (0.90, "project", 1024, 40_513_536, "0.952197"),
        (0.75, "dense", 2048, 8_588_544, "0.974720"),  # density 2.5 %: FACTS section 8
    ],
)
def test_a_whole_run_costs_what_the_dense_models_does(sparsity, head, seq_len, active, solved):
    run = config({"sparsity": sparsity}, ift={**MODEL, "head": head}, seq_len=seq_len, max_steps=7)
    solution = solve(run, VOCAB)
    assert total(solution) == active
    assert f"{float(solution.sparsity):.6f}" == solved
    counts = {name: kept for name, (kept, _) in solution.units.items()}
    flops = sequence_flops(solution.dims, seq_len, VOCAB, counts).total
    dense = {1024: DENSE, 2048: 1_987_253_895_168}[seq_len]
    assert base_cost(run, VOCAB) == 7 * dense
    assert run_cost(run, VOCAB, solution) == 7 * flops
    assert abs(flops - dense) <= dense * 1e-6
    assert solution.dims.get("d_embed") == (768 if head == "project" else None)
    # Uniform over the layers, to a weight.
    for kept, every in solution.units.values():
        assert abs(kept - (1 - solution.sparsity) * every) < 1


def test_what_the_output_projection_alone_would_need():
    """FACTS section 8's 5.0 % at 90 %: without the projection behind the look-up."""
    run = config({"sparsity": 0.9}, ift={**MODEL, "head": "project"})
    solution = solve(run, VOCAB)
    every = sum(count for _, count in solution.units.values())
    density = Fraction(total(solution), every)
    assert f"{float(density):.4f}" == "0.0478"
    look_up = 2424 * 768  # MACs a token of the input projection
    assert f"{float(density + Fraction(look_up, every)):.4f}" == "0.0500"


@pytest.mark.parametrize(
    ("head", "seq_len", "ratio"),
    [("dense", 1024, "1.273x"), ("dense", 2048, "1.493x"), ("project", 2048, "1.001x")],
)
def test_what_no_sparsity_solves_is_refused(head, seq_len, ratio):
    run = config({"sparsity": 0.9}, ift={**MODEL, "head": head}, seq_len=seq_len)
    with pytest.raises(UserError) as error:
        solve(run, VOCAB)
    text = str(error.value)
    assert "no sparsity makes wide 90 % (d_model 2424, " in text
    assert f"is alone {ratio} the dense model" in text
    assert ("ift.head: project" in text) == (head == "dense")
    assert ("projections" in text) == (head == "project")
    assert "besides" not in text


def test_dense_gradients_are_paid_for():
    update = {"freq": 10, "stop": 0.75}
    runs = [
        config({"sparsity": 0.75, "algorithm": name, "update": update}, ift=MODEL, max_steps=100)
        for name in ("set", "rigl")
    ]
    set_, rigl = (solve(run, VOCAB) for run in runs)
    assert total(set_) == 27_462_912
    # 7 of 100 steps compute dW in full: 100 * 3 T + 7 (W - T) = 100 * 3 * 27,462,912.
    every = sum(count for _, count in rigl.units.values())
    assert total(rigl) == round(Fraction(300 * 27_462_912 - 7 * every, 293))
    for run, solution in zip(runs, (set_, rigl)):
        assert abs(run_cost(run, VOCAB, solution) / (100 * DENSE) - 1) < 1e-6


@pytest.mark.parametrize("scope", ["layer", "model"])
@pytest.mark.parametrize(
    ("algorithm", "by", "more"),
    [
        ("granet", "sparsity", {}),
        ("top_kast", "sparsity", {"top_kast": {"backward_sparsity": 0.7}}),
        ("gmp", "width", {}),
        ("ac_dc", "width", {}),
        ("ac_dc", "sparsity", {"ac_dc": {"dense_sparsity": 0.7, "warmup": 0.02}}),
        ("search_spaces", "width", {"search_spaces": {"exploit": "fix"}}),
    ],
)
def test_dense_phases_and_larger_sets_are_paid_for(algorithm, by, more, scope):
    update = {"freq": 10, "stop": 0.75, "scope": scope}
    sparsity = {"sparsity": 0.75, "algorithm": algorithm, "update": update, **more}
    ift = {**MODEL, "head": "project", "solve": by}
    extra = {"optimizer": {"weight_decay": 0.0}} if algorithm == "top_kast" else {}
    run = config(sparsity, ift=ift, max_steps=100, **extra)
    plain = config({"sparsity": 0.75}, ift=ift, max_steps=100)
    solution, cheaper = solve(run, VOCAB), solve(plain, VOCAB)
    assert abs(run_cost(run, VOCAB, solution) / (100 * DENSE) - 1) < 1e-6
    assert run_cost(plain, VOCAB, solution) < 100 * DENSE  # at its final sparsity throughout
    if by == "width":
        assert solution.dims["d_model"] < cheaper.dims["d_model"]
    else:
        assert solution.sparsity > cheaper.sparsity


def test_scoring_a_first_topology_is_paid_for():
    sparsity = {"sparsity": 0.75, "init_mask": "snip", "scoring": {"batches": 3}}
    run = config(sparsity, ift=MODEL, max_steps=100)
    solution = solve(run, VOCAB)
    dense = sequence_flops(solution.dims, 1024, VOCAB).total
    assert scoring_cost(run, VOCAB, solution) == 3 * dense
    assert total(solution) < 27_462_912
    assert abs(run_cost(run, VOCAB, solution) / (100 * DENSE) - 1) < 1e-6


def test_what_dense_gradients_make_impossible_says_so():
    update = {"freq": 2, "stop": 1.0}
    sparsity = {"sparsity": 0.75, "algorithm": "rigl", "update": update}
    with pytest.raises(UserError, match="what rigl computes besides"):
        solve(config(sparsity, ift=MODEL, max_steps=100), VOCAB)


@pytest.mark.parametrize("head", ["dense", "project"])
@pytest.mark.parametrize("heads", ["keep", "fixed_d_head"])
@pytest.mark.parametrize("block", [None, 16])
def test_the_width_is_solved_for(head, heads, block):
    structure = {"type": "block", "block": [block, block]} if block else {}
    sparsity = {"sparsity": 0.9, "structure": structure}
    ift = {**MODEL, "solve": "width", "heads": heads, "head": head}
    run = config(sparsity, ift=ift)
    solution = solve(run, VOCAB)
    dims = solution.dims
    width, n_head = dims["d_model"], dims["n_head"]
    assert 768 < width < 2424
    step = {"keep": 12, "fixed_d_head": 64}[heads]
    if block:
        step = {"keep": 48, "fixed_d_head": 64}[heads]
    assert width % step == 0 and dims["d_ff"] % step == 0
    assert n_head == (12 if heads == "keep" else width // 64)
    assert dims["d_ff"] == 4 * width
    assert abs(solution.sparsity - Fraction(9, 10)) < Fraction(1, 50)
    assert abs(run_cost(run, VOCAB, solution) / DENSE - 1) < 1e-6
    # No other width at the same sparsity comes nearer.
    for other in (width - step, width + step):
        more = {"d_model": other, "d_ff": 4 * other}
        more["n_head"] = 12 if heads == "keep" else other // 64
        more = {**dims, **more}
        costs = [
            sequence_flops(d, 1024, VOCAB, {n: d_out * d_in // 10 for n, d_out, d_in in shapes(d)})
            for d in (dims, more)
        ]
        assert abs(costs[0].total - DENSE) < abs(costs[1].total - DENSE)


def shapes(dims):
    d, f = dims["d_model"], dims["d_ff"]
    for i in range(dims["n_layer"]):
        yield from ((f"h.{i}.attn.{kind}.weight", d, d) for kind in "qkvo")
        yield f"h.{i}.mlp.fc1.weight", f, d
        yield f"h.{i}.mlp.fc2.weight", d, f


def test_a_method_too_dear_at_any_width_is_refused():
    sparsity = {"sparsity": 0.01, "algorithm": "rigl", "update": {"freq": 1, "stop": 1.0}}
    run = config(sparsity, ift={**MODEL, "solve": "width", "multiple_of": 1024}, max_steps=100)
    with pytest.raises(UserError, match=r"ift.solve: width: at 1 % and d_model 3072, the smallest"):
        solve(run, VOCAB)


def test_blocks_come_as_near_as_they_can():
    sparsity = {"sparsity": 0.75, "structure": {"type": "block", "block": [64, 64]}}
    run = config(sparsity, ift={**MODEL, "heads": "fixed_d_head"})
    solution = solve(run, VOCAB)
    a_block = 6 * 1024 * 64 * 64
    assert abs(run_cost(run, VOCAB, solution) - DENSE) <= a_block / 2


@pytest.mark.parametrize("transposable", [False, True])
def test_n_m_is_solved_by_the_width_alone(transposable):
    structure = {"type": "n_m", "n": 2, "m": 8, "transposable": transposable}
    sparsity = {"sparsity": 0.75, "structure": structure}
    run = config(sparsity, ift={**MODEL, "solve": "width"})
    solution = solve(run, VOCAB)
    assert solution.sparsity == Fraction(3, 4)
    width = solution.dims["d_model"]
    assert width % 24 == 0
    excesses = []
    for d in (width - 24, width, width + 24):
        dims = {**solution.dims, "d_model": d, "d_ff": 4 * d}
        counts = {name: out * inner // 4 for name, out, inner in shapes(dims)}
        excesses.append(sequence_flops(dims, 1024, VOCAB, counts).total - DENSE)
    assert run_cost(run, VOCAB, solution) - DENSE == excesses[1]
    assert min(excesses, key=abs) == excesses[1]


@pytest.mark.parametrize("block", [(1, 1), (16, 16)])
def test_balanced_rows_come_within_half_a_unit_in_each_row_of_a_layer(block):
    structure = {"balanced": "row"}
    if block != (1, 1):
        structure |= {"type": "block", "block": list(block)}
    run = config({"sparsity": 0.75, "structure": structure}, ift=MODEL)
    solution = solve(run, VOCAB)
    rows = solution.dims["d_model"] // block[0]
    excess = run_cost(run, VOCAB, solution) - DENSE
    assert abs(excess) <= 6 * 1024 * rows * block[0] * block[1] / 2
    for name, (kept, _) in solution.units.items():
        assert kept % (rows * (4 if "fc1" in name else 1)) == 0


def test_no_sparsity_is_the_dense_model_in_model_mode():
    run = config({"sparsity": 0.0}, ift={**MODEL, "head": "project"})
    solution = solve(run, VOCAB)
    assert solution == Solution(run.base_dims, {})
    assert run_cost(run, VOCAB, solution) == base_cost(run, VOCAB)


@pytest.mark.parametrize("iso_flop", ["layer", "model"])
def test_what_stays_dense_is_taken_from_the_rest(iso_flop):
    ift = {"member": "wide", "iso_flop": iso_flop, "head": "project"}
    plain = solve(config({"sparsity": 0.75}, ift=ift), VOCAB)
    sparsity = {"sparsity": 0.75, "dense_first": 1, "layer_sparsity": {"h.11.mlp.*": 0.5}}
    solution = solve(config(sparsity, ift=ift), VOCAB)
    assert total(solution) == total(plain)
    assert all(kept == every for name, (kept, every) in solution.units.items() if "h.0." in name)
    assert solution.units["h.11.mlp.fc1.weight"][0] * 2 == 1536 * 6144
    for name in ("h.1.attn.q.weight", "h.10.mlp.fc2.weight", "h.11.attn.o.weight"):
        assert 0 < solution.units[name][0] < plain.units[name][0]


def test_the_last_blocks_stay_dense_too():
    solution = solve(config({"sparsity": 0.75, "dense_first": 1, "dense_last": 1}), VOCAB)
    full = {int(name.split(".")[1]) for name, (kept, n) in solution.units.items() if kept == n}
    assert full == {0, 11}


def test_erdos_renyi_keeps_the_uniform_total():
    sparsity = {"sparsity": 0.9, "distribution": "erdos_renyi"}
    uniform, er = (solve(config(s), VOCAB) for s in ({"sparsity": 0.9}, sparsity))
    assert total(er) == total(uniform)
    q, fc1 = (er.units[f"h.4.{name}.weight"][0] for name in ("attn.q", "mlp.fc1"))
    assert abs(Fraction(fc1, q) - Fraction(2424 + 9720, 2 * 2424)) < 1e-4


@pytest.mark.parametrize(
    ("sparsity", "message"),
    [
        ({"dense_first": 4}, "fix fewer layers"),
        ({"layer_sparsity": {"h.*.mlq.*": 0.5}}, "layer_sparsity: h.*.mlq.* matches no"),
        ({"dense_first": 1, "layer_sparsity": {"h.0.*": 0.5}}, "name a layer once"),
        ({"layer_sparsity": {"h.0.*": 0.5, "h.*.attn.q.*": 0.9}}, "names h.0.attn.q.weight"),
    ],
)
def test_bad_distributions(sparsity, message):
    with pytest.raises(UserError) as error:
        solve(config({"sparsity": 0.75, **sparsity}), VOCAB)
    assert message in str(error.value)


def active(run):
    return {name: kept for name, (kept, _) in solve(run, VOCAB).units.items()}


@pytest.mark.parametrize("member", ["parallel", "factorized", "doped"])
@pytest.mark.parametrize("sparsity", [0.5, 0.6, 0.9])
def test_members_keep_every_layers_flops(member, sparsity):
    run = config({"sparsity": sparsity}, ift={"member": member})
    report = residual(run.base_dims, run.dims, active(run), run.transform)
    assert [r.excess for r in report.values()] == [0] * 7


def test_members_in_blocks_are_near():
    structure = {"type": "block", "block": [16, 16]}
    run = config({"sparsity": 0.9, "structure": structure}, ift={"member": "factorized"})
    kept = active(run)
    assert kept["h.0.attn.q.u.weight"] + kept["h.0.attn.q.v.weight"] == 768 * 768 // 256
    weights = {name: count * 256 for name, count in kept.items()}
    assert residual(run.base_dims, run.dims, weights, run.transform)["all"].excess == 0


def test_a_members_own_sparsity_leaves_the_counts_nominal():
    run = config({"sparsity": 0.75}, ift={"member": "parallel", "sparsity": 0.5})
    assert solve(run, VOCAB).units["h.0.attn.q.branch.1.weight"] == (768 * 768 // 4, 768 * 768)


def test_weights_that_are_dense_have_no_units():
    run = config({"sparsity": 0.75}, ift={"member": "doped", "keep_dense": ["h.[2-9].*", "h.1?.*"]})
    units = solve(run, VOCAB).units
    assert len(units) == 12 and all(name.endswith(".sparse.weight") for name in units)
    left = 768 * 768 - 288 * 2 * 768  # 288 = 0.75 * 768 / 2
    assert units["h.1.attn.v.sparse.weight"] == (left, 768 * 768)
    wide = config({"sparsity": 0.75}, ift={"member": "wide", "keep_dense": ["h.0.*"]})
    assert len(solve(wide, VOCAB).units) == 66


def test_a_filter_may_name_the_weights_of_a_form():
    sparsity = {"sparsity": 0.75, "param_filter": ["h.3.attn.q.branch.0.weight"]}
    ift = {"member": "parallel", "sizes": {"h.3.attn.q": 4}}
    assert list(solve(config(sparsity, ift=ift), VOCAB).units) == ["h.3.attn.q.branch.0.weight"]


@pytest.mark.parametrize("member", ["parallel", "factorized", "doped"])
def test_members_pay_for_dense_gradients_in_model_mode(member):
    sparsity = {"sparsity": 0.9, "algorithm": "rigl", "update": {"freq": 10, "stop": 0.5}}
    run = config(sparsity, ift={"member": member, "iso_flop": "model"}, max_steps=100)
    solution = solve(run, VOCAB)
    assert solution.dims == run.base_dims
    assert abs(run_cost(run, VOCAB, solution) / (100 * DENSE) - 1) < 1e-6
    layer = solve(config(sparsity, ift={"member": member}, max_steps=100), VOCAB)
    assert total(solution) < total(layer)


@pytest.mark.parametrize("member", ["parallel", "factorized", "doped"])
def test_blocks_that_stay_dense_keep_the_plain_form(member):
    run = config({"sparsity": 0.75, "dense_first": 1, "dense_last": 1}, ift={"member": member})
    assert run.transform is not None
    assert {name.split(".")[1] for name in run.transform.sizes} == {str(i) for i in range(1, 11)}
    counts = solve(run, VOCAB).units
    assert counts["h.11.mlp.fc1.weight"] == (768 * 3072, 768 * 3072)
    active = {name: kept for name, (kept, _) in counts.items()}
    whole = residual(run.base_dims, run.dims, active, run.transform)["all"]
    assert whole.excess == 0


@pytest.mark.parametrize("transposable", [False, True])
def test_n_of_m(transposable):
    structure = {"type": "n_m", "n": 2, "m": 8, "transposable": transposable}
    run = config({"sparsity": 0.75, "structure": structure})
    assert run.dims["d_model"] == 1536
    assert solve(run, VOCAB).units["h.3.mlp.fc2.weight"] == (6144 * 1536 // 4, 6144 * 1536)
    odd = config({"sparsity": 0.5, "structure": structure | {"n": 4}})
    assert odd.dims["d_model"] % 24 == 0, "heads and m divide it"
    kept, count = solve(odd, VOCAB).units["h.3.attn.q.weight"]
    assert (2 * kept, count) == (count, odd.dims["d_model"] ** 2)


def test_balanced_rows_are_shared_out():
    base = {"sparsity": 0.9, "structure": {"balanced": "row"}}
    kept, count = solve(config(base, ift={"member": "none"}), VOCAB).units["h.3.attn.o.weight"]
    assert (kept, count) == (768 * 77, 768 * 768)
    blocks = {"type": "block", "block": [16, 32], "balanced": "row"}
    run = config({"sparsity": 0.99, "structure": blocks}, ift={"member": "none"})
    assert solve(run, VOCAB).units["h.0.mlp.fc1.weight"] == (192, 192 * 24), "at least one a row"
    run = config({"sparsity": 0.5, "structure": blocks})
    kept, count = solve(run, VOCAB).units["h.0.mlp.fc1.weight"]
    rows = run.dims["d_ff"] // 16
    assert kept == rows * round(3072 * 768 / 512 / rows)


@pytest.mark.parametrize("member", ["parallel", "factorized", "doped"])
def test_members_in_n_m_have_n_of_every_m(member):
    structure = {"type": "n_m", "n": 2, "m": 4}
    run = config({"sparsity": 0.5, "structure": structure}, ift={"member": member})
    units = solve(run, VOCAB).units
    assert all(4 * kept == 2 * every for kept, every in units.values())
    assert run.transform is not None
    if member != "parallel":
        assert all(size % 4 == 0 for size in run.transform.sizes.values())
    active = {name: kept for name, (kept, _) in units.items()}
    # Counts are given, so that an inner width that was rounded to m is not paid back.
    excess = residual(run.base_dims, run.dims, active, run.transform)["all"].excess
    assert abs(excess) < Fraction(1, 1000)
