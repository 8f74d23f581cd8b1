"""The run configuration: what is refused, what the numbers derived from it are."""

import pytest

from sparse_gpt.config import RunConfig
from sparse_gpt.config_file import validate
from sparse_gpt.errors import UserError
from sparse_gpt.model.flops import layer_shapes

PILE = {
    "data": [{"path": "pile"}],
    "seq_len": 2048,
    "micro_batch_size": 8,
    "global_batch_size": 256,
    "max_tokens": 2_505_048_064,
    "model": {"preset": "gpt3-125m"},
    "ift": {"member": "wide"},
    "sparsity": {"sparsity": 0.75, "algorithm": "set"},
    "schedule": {"warmup_tokens": 375_000_000},
}


def make(**changes) -> RunConfig:
    """A small valid configuration with dotted changes (`__` for dots)."""
    tree: dict = {
        "data": [{"path": "corpus"}],
        "seq_len": 32,
        "micro_batch_size": 2,
        "max_steps": 10,
        "model": {"n_layer": 2, "n_head": 2, "d_model": 64},
    }
    for dotted, value in changes.items():
        *sections, key = dotted.split("__")
        section = tree
        for name in sections:
            section = section.setdefault(name, {})
        section[key] = value
        if value is None:
            del section[key]
    return validate(RunConfig, tree, "test.yaml")


def test_the_pile_recipe():
    """FACTS section 4: 4,778 steps of 524,288 tokens, 716 of warmup, topology until 3,584."""
    config = validate(RunConfig, PILE, "pile.yaml")
    assert config.total_steps(8) == 4778
    assert config.warmup_steps(8) == 716
    assert config.update_stop(8) == 3584
    assert config.total_steps(8) * config.batch(8) * config.seq_len == 2_505_048_064
    assert (config.dims["d_model"], config.dims["d_ff"]) == (1536, 6144)
    assert config.accumulation(8) == 4
    assert (config.sparsity.update.freq, config.sparsity.drop_fraction.init) == (100, 0.3)
    assert config.optimizer.betas == (0.9, 0.95)


REFUSED = {
    "no data": ({"data": []}, "data: no corpus"),
    "both lengths": ({"max_tokens": 5}, "exactly one of max_tokens, max_steps"),
    "no length": ({"max_steps": None}, "exactly one of max_tokens, max_steps"),
    "bf16 at stage 0": (
        {"precision": "bf16", "deepspeed__zero_stage": 0},
        "set deepspeed.zero_stage: 1",
    ),
    "batch": ({"global_batch_size": 7}, "global_batch_size 7 is not a multiple of"),
    "long sequence": (
        {"model__n_positions": 31},
        "seq_len 32 is longer than model.n_positions 31",
    ),
    "heads": (
        {"model__n_head": 3},
        "model.d_model 64 is not divisible by model.n_head 3",
    ),
    "block": (
        {"sparsity__structure": {"type": "block", "block": [24, 8]}},
        "sparsity.structure.block: b_out 24 does not divide d_model 64",
    ),
    "block of inputs": (
        {"sparsity__structure": {"type": "block", "block": [8, 24]}, "model__d_ff": 120},
        "b_in 24 does not divide d_model 64",
    ),
    "block without a type": (
        {"sparsity__structure": {"block": [4, 4]}},
        "set type: block",
    ),
    "type without a block": (
        {"sparsity__structure": {"type": "block"}},
        "needs block: [b_out, b_in]",
    ),
    "n_m without numbers": (
        {"sparsity__structure": {"type": "n_m", "n": 2}},
        "needs n and m, n < m, e.g. n: 2, m: 4",
    ),
    "n of no n_m": (
        {"sparsity__structure": {"n": 2, "m": 4}},
        "structure.n, m or transposable is set but type is unstructured; set type: n_m",
    ),
    "block of n_m": (
        {"sparsity__structure": {"type": "n_m", "n": 2, "m": 4, "block": [2, 2]}},
        "structure.block is set but type is n_m; set type: block",
    ),
    "balanced n_m": (
        {"sparsity__structure": {"type": "n_m", "n": 2, "m": 4, "balanced": "row"}},
        "structure.balanced: n_m is balanced as it is",
    ),
    "another sparsity than n_m": (
        {"sparsity": {"sparsity": 0.75, "structure": {"type": "n_m", "n": 2, "m": 4}}},
        "structure 2:4 has a sparsity of 0.5, not 0.75; set sparsity.sparsity to it, or choose "
        "other n and m (0.5 is 2:4, 0.75 is 1:4 or 2:8)",
    ),
    "m of the width": (
        {"sparsity": {"sparsity": 0.5, "structure": {"type": "n_m", "n": 12, "m": 24}}},
        "sparsity.structure.m: m 24 does not divide d_model 64",
    ),
    "dense layers beside n_m": (
        {
            "sparsity": {
                "sparsity": 0.5,
                "structure": {"type": "n_m", "n": 2, "m": 4},
                "dense_last": 1,
            }
        },
        "dense_last gives layers other sparsities, but every layer of structure 2:4 has 0.5",
    ),
    "n_m of changing counts": (
        {
            "sparsity": {
                "sparsity": 0.5,
                "algorithm": "gmp",
                "structure": {"type": "n_m", "n": 2, "m": 4},
            }
        },
        "algorithm: gmp: in this structure every group keeps its number",
    ),
    "rows of changing counts": (
        {"sparsity": {"sparsity": 0.5, "algorithm": "granet", "structure": {"balanced": "row"}}},
        "algorithm: granet: in this structure every group keeps its number",
    ),
    "n_m of half dense phases": (
        {
            "sparsity": {
                "sparsity": 0.5,
                "algorithm": "ac_dc",
                "ac_dc": {"dense_sparsity": 0.25},
                "structure": {"type": "n_m", "n": 2, "m": 4},
            }
        },
        "use static, set, rigl, ac_dc with dense_sparsity: 0",
    ),
    "n_m over the model": (
        {
            "sparsity": {
                "sparsity": 0.5,
                "structure": {"type": "n_m", "n": 2, "m": 4},
                "update": {"scope": "model"},
            }
        },
        "every group keeps its number; set update.scope: layer",
    ),
    "rows over the model": (
        {"sparsity__structure": {"balanced": "row"}, "sparsity__update": {"scope": "model"}},
        "every group keeps its number; set update.scope: layer",
    ),
    "a sparsity solved for n_m": (
        {
            "ift": {"member": "wide", "iso_flop": "model"},
            "sparsity": {"sparsity": 0.5, "structure": {"type": "n_m", "n": 2, "m": 4}},
        },
        "n_m has one that is given; set ift.solve: width",
    ),
    "no model": ({"model": {}}, "model: set preset, or n_layer, n_head, d_model"),
    "unknown preset": ({"model": {"preset": "gpt3-126m"}}, "did you mean 'gpt3-125m'?"),
    "two warmups": (
        {"schedule": {"warmup_steps": 1, "warmup_tokens": 5}},
        "one of warmup_tokens, warmup_steps",
    ),
    "stop of one": ({"sparsity__update": {"stop": 1}}, "stop 1 is ambiguous: write 1.0"),
    "sparsity one": ({"sparsity__sparsity": 1.0}, "sparsity.sparsity"),
    "stage": ({"deepspeed__zero_stage": 4}, "deepspeed.zero_stage"),
    "negative rate": ({"optimizer__lr": -1e-3}, "optimizer.lr"),
    "algorithm": ({"sparsity__algorithm": "rigel"}, "sparsity.algorithm"),
    "projection of nothing": ({"ift__head": "project"}, "set ift.member: wide or ift.head: dense"),
    "width by layer": (
        {"ift__member": "wide", "ift__solve": "width"},
        "ift.solve: width needs ift.iso_flop: model",
    ),
    "steps that blocks do not divide": (
        {
            "ift": {"member": "wide", "iso_flop": "model", "solve": "width", "multiple_of": 24},
            "sparsity__structure": {"type": "block", "block": [16, 16]},
        },
        "steps of 24, which sparsity.structure needs 16 to divide; set ift.multiple_of: 16",
    ),
    "model mode of nothing": ({"ift__iso_flop": "model"}, "set another member, e.g. wide"),
    "two sparsities": (
        {
            "ift": {"member": "wide", "iso_flop": "model", "sparsity": 0.5},
            "sparsity__sparsity": 0.75,
        },
        "set sparsity.sparsity alone",
    ),
    "steps that depend on ranks": (
        {
            "ift": {"member": "wide", "iso_flop": "model"},
            "max_steps": None,
            "max_tokens": 1000,
        },
        "needs global_batch_size where max_tokens is given",
    ),
    "own sparsity in a dense run": (
        {"sparsity__layer_sparsity": {"h.0.*": 0.5}},
        "set sparsity.sparsity, or param_filter",
    ),
    "fixed and global": (
        {"sparsity": {"distribution": "global", "sparsity": 0.5, "layer_sparsity": {"h.0.*": 0.1}}},
        "layer_sparsity fixes numbers that distribution: global finds",
    ),
    "balanced and global": (
        {"sparsity": {"distribution": "global", "structure": {"balanced": "row"}}},
        "structure.balanced fixes numbers that distribution: global finds",
    ),
    "global by layer": (
        {"sparsity": {"distribution": "global", "sparsity": 0.5, "algorithm": "gmp"}},
        "need update.scope: model",
    ),
    "own sparsity one": ({"sparsity__layer_sparsity": {"h.0.*": 1.0}}, "layer_sparsity"),
    "empty path": ({"data": [{"weight": 1.0}]}, "data.0.path"),
    "weight": ({"data": [{"path": "x", "weight": 0.0}]}, "data.0.weight"),
    "sigma of a plain layer": (
        {"ift": {"member": "wide", "non_linearity": "relu"}},
        "ift.non_linearity: member wide has layers of the plain form",
    ),
    "sizes of plain layers": ({"ift": {"sizes": {}}}, "ift.sizes: member none has layers"),
    "k_lr of another": ({"ift": {"member": "doped", "k_lr": 2.0}}, "ift.k_lr: for member low_rank"),
    "sparse low rank": (
        {"ift": {"member": "low_rank"}, "sparsity__sparsity": 0.5},
        "low_rank has dense weights; set sparsity.sparsity: 0",
    ),
    "keep_dense of nothing": (
        {"ift": {"keep_dense": ["h.2.*"]}},
        "ift.keep_dense: h.2.* matches no layer",
    ),
    "size of no layer": (
        {"ift": {"member": "doped", "sizes": {"h.2.attn.q": 1}}},
        "ift.sizes: h.2.attn.q is no layer",
    ),
    "no branch": (
        {"ift": {"member": "parallel", "sizes": {"h.1.attn.q": 0}}},
        "h.1.attn.q: size 0 is not 1 or more",
    ),
    "block and an inner width": (
        {
            "ift": {"member": "factorized", "sizes": {"h.1.attn.q": 30}},
            "sparsity": {"sparsity": 0.5, "structure": {"type": "block", "block": [16, 16]}},
        },
        "16 x 16 does not divide h.1.attn.q.u.weight (30 x 64)",
    ),
}


@pytest.mark.parametrize(("changes", "message"), REFUSED.values(), ids=REFUSED)
def test_refused(changes, message):
    with pytest.raises(UserError) as caught:
        make(**changes)
    assert message in str(caught.value)
    assert str(caught.value).startswith("test.yaml: ")


WRONG_TYPES = {
    "model.n_layer: true": ({"model__n_layer": True}, "model.n_layer"),
    "text for a number": ({"optimizer__lr": "6e-4"}, "optimizer.lr"),
    "float for an integer": ({"seq_len": 32.5}, "seq_len"),
    "whole float for an integer": ({"max_steps": 10.0}, "max_steps"),
    "number for a flag": ({"document_attention": 1}, "document_attention"),
    "text for a flag": ({"logging__wandb": "yes"}, "logging.wandb"),
    "text for a section": ({"model": "gpt3"}, "model"),
    "number for a path": ({"output_dir": 3}, "output_dir"),
    "section for a list": ({"data": {"path": "x"}}, "data"),
    "one beta": ({"optimizer__betas": [0.9]}, "optimizer.betas"),
    "nan": ({"optimizer__lr": float("nan")}, "optimizer.lr"),
    "infinity": ({"optimizer__lr": float("inf")}, "optimizer.lr"),
    "infinite decay": ({"optimizer__weight_decay": float("inf")}, "optimizer.weight_decay"),
    "infinite weight": ({"data": [{"path": "x", "weight": float("inf")}]}, "data.0.weight"),
}


@pytest.mark.parametrize(("changes", "where"), WRONG_TYPES.values(), ids=WRONG_TYPES)
def test_types_are_strict(changes, where):
    with pytest.raises(UserError, match=rf"(^|[ ;]){where}"):
        make(**changes)


def test_every_problem_is_named_at_once():
    with pytest.raises(UserError) as caught:
        make(seq_len=0, optimizer__lr=0.0, model__n_heads=2)
    for key in ("seq_len", "optimizer.lr", "model.n_heads: unknown key; did you mean 'n_head'?"):
        assert key in str(caught.value)


def test_a_configuration_is_frozen():
    config = make()
    with pytest.raises(ValueError, match="frozen"):
        config.seq_len = 64


def test_batches_and_ranks():
    config = make(global_batch_size=12)
    assert [config.accumulation(ranks) for ranks in (1, 2, 3, 6)] == [6, 3, 2, 1]
    with pytest.raises(UserError, match="12 is not a multiple of micro_batch_size 2 x 4 ranks"):
        config.accumulation(4)
    assert make().batch(3) == 6
    assert make().accumulation(3) == 1


@pytest.mark.parametrize(
    ("stop", "total", "wanted"),
    [(0.75, 4778, 3584), (0.07, 100, 7), (1.0, 10, 10), (5, 10, 5), (0.8, 4460, 3568)],
)
def test_update_stop(stop, total, wanted):
    assert make(max_steps=total, sparsity__update={"stop": stop}).update_stop(1) == wanted


def test_token_schedules_round_up():
    config = make(max_steps=None, max_tokens=641, schedule__warmup_tokens=65)
    assert config.total_steps(1) == 11  # 64 tokens a step
    assert config.warmup_steps(1) == 2
    assert make(schedule__warmup_fraction=0.11).warmup_steps(1) == 2
    assert make(schedule__warmup_fraction=0.07, max_steps=100).warmup_steps(1) == 7


def test_blocks_steer_the_widths_of_sparse_wide():
    config = make(
        ift__member="wide",
        sparsity__sparsity=0.5,
        sparsity__structure={"type": "block", "block": [16, 16]},
    )
    assert config.dims["d_model"] == 96 and config.dims["d_ff"] == 368
    assert make(ift__member="wide", sparsity__sparsity=0.0).dims == make().dims


def test_members_that_change_the_form_of_layers():
    config = make(ift__member="parallel", sparsity__sparsity=0.75)
    assert config.transform is not None
    assert config.transform.non_linearity == "relu"
    assert config.transform.sizes == dict.fromkeys(layer_shapes(config.dims), 4)
    assert config.dims == make().dims
    assert config.gpt_config(9).transform == config.transform
    for member in ("none", "wide"):
        assert make(ift__member=member, sparsity__sparsity=0.75).transform is None


def test_layers_a_member_leaves_alone():
    config = make(
        ift__member="doped",
        ift__sparsity=0.5,
        ift__keep_dense=["h.0.*"],
        sparsity__sparsity=0.75,
        sparsity__param_filter=["h.*.mlp.*"],
    )
    assert config.transform is not None
    assert config.transform.sizes == {"h.1.mlp.fc1": 26, "h.1.mlp.fc2": 26}  # of 25.6
    assert config.names_layer("h.1.mlp.fc1.weight") and config.names_layer("h.1.mlp.fc1.u.weight")
    assert not config.names_layer("h.0.mlp.fc1.weight")
    assert not config.names_layer("h.1.attn.q.weight")


def test_low_rank_widens_by_k_lr():
    config = make(ift__member="low_rank", ift__k_lr=2.0)
    assert (config.dims["d_model"], config.dims["d_ff"]) == (128, 512)
    assert config.transform is not None
    # 64 * 64 / (128 + 128), 64 * 256 / (128 + 512)
    assert config.transform.sizes["h.0.attn.q"] == 16
    assert config.transform.sizes["h.1.mlp.fc2"] == 26
    assert make(ift__member="low_rank").dims == make().dims


def test_blocks_steer_inner_widths():
    config = make(
        ift__member="factorized",
        sparsity__sparsity=0.5,
        sparsity__structure={"type": "block", "block": [16, 16]},
    )
    assert config.transform is not None
    assert config.transform.sizes["h.0.mlp.fc1"] == 96  # 102.4


@pytest.mark.parametrize("algorithm", ["gmp", "granet", "ac_dc"])
def test_the_best_loss_is_not_that_of_a_denser_model(algorithm):
    sparsity = {"sparsity": 0.75, "algorithm": algorithm}
    with pytest.raises(ValueError, match=r"evaluation\.patience"):
        make(sparsity=sparsity, evaluation={"every": 5, "patience": 2})
