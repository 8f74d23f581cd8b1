"""The plan against the model it speaks of, the ledger, and the published recipe."""

import json
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from sparse_gpt.config import RunConfig
from sparse_gpt.config_file import load_config, validate
from sparse_gpt.errors import UserError
from sparse_gpt.ift.iso_flop import Residual, solve_units
from sparse_gpt.memory import view_bytes
from sparse_gpt.model.flops import FlopsLedger, active_counts, linear_shapes
from sparse_gpt.model.gpt import GPT
from sparse_gpt.model.presets import preset
from sparse_gpt.ops import BlockLayout, Operand, block_cpu
from sparse_gpt.plan import parameter_count, plan, render
from sparse_gpt.plan_updates import Cluster, update_table
from sparse_gpt.sparse_units import solve
from sparse_gpt.topology.schedule import UpdateSchedule
from tests.data.test_megatron import write_pair

ROOT = Path(__file__).resolve().parents[1]
VOCAB = 50257


def config(**changes) -> RunConfig:
    tree = {
        "data": [{"path": "none"}],
        "seq_len": 2048,
        "micro_batch_size": 8,
        "global_batch_size": 256,
        "max_tokens": 2_505_048_064,
        "model": {"preset": "gpt3-small"},
        "ift": {"member": "wide"},
        "sparsity": {"sparsity": 0.75, "algorithm": "set"},
        "schedule": {"warmup_tokens": 375_000_000},
        "deepspeed": {"zero_stage": 2},
    }
    return validate(RunConfig, {**tree, **changes}, "test")


def test_the_pile_recipe():
    result = plan(config(), VOCAB, 8)
    assert (result.steps, result.warmup_steps, result.tokens) == (4_778, 716, 2_505_048_064)
    assert result.accumulation == 4
    assert config().update_stop(8) == 3_584
    assert result.topology_updates == 35


def test_table_17_of_a_whole_run():
    changes = {"seq_len": 1024, "global_batch_size": 512, "max_tokens": None, "max_steps": 4460}
    result = plan(config(**changes, sparsity={"sparsity": 0.5, "algorithm": "static"}), VOCAB, 1)
    assert result.flops_per_sequence == 1_029_007_761_408
    assert result.base_flops_per_sequence == 876_303_876_096
    assert result.flops_total == 1_029_007_761_408 * 2_283_520
    assert result.base_flops_total == 876_303_876_096 * 2_283_520
    assert result.flops_per_token * 1024 == result.flops_per_sequence
    assert result.layer_residual == Residual(84_934_656, 85_542_912)


@pytest.mark.parametrize("name", ["gpt3-small", "gpt3-small-sw50"])
def test_parameters_are_the_models(name):
    dims = {**preset(name), "n_layer": 2}
    gpt = config(model=dims, ift={}, sparsity={}).gpt_config(VOCAB)
    model = GPT(gpt)
    assert parameter_count(dims, VOCAB, 2048) == sum(p.numel() for p in model.parameters())


@pytest.mark.parametrize("member", ["parallel", "factorized", "doped", "low_rank"])
def test_a_plan_of_transformed_layers(member):
    ift = {"member": member, "non_linearity": "gelu"}
    sparsity = {"sparsity": 0.0 if member == "low_rank" else 0.6}
    small = {"n_layer": 2, "n_head": 2, "d_model": 64}
    run = config(model=small, ift=ift, sparsity=sparsity)
    result = plan(run, 257, 1)
    model = GPT(run.gpt_config(257))
    assert result.parameters == sum(p.numel() for p in model.parameters())
    assert abs(float(result.layer_residual.excess)) < 0.005
    if member != "low_rank":
        assert result.flops_per_sequence == result.base_flops_per_sequence
    text = render(result)
    assert run.transform is not None
    size = run.transform.sizes["h.1.mlp.fc1"]
    assert f"layers       {member}, sigma = gelu" in text and f"mlp.fc1 {size}" in text
    assert json.loads(json.dumps(result.as_dict()))["model"]["transform"]["member"] == member


def test_parameters_of_a_projected_head():
    dims = {"n_layer": 2, "n_head": 4, "d_model": 64, "d_ff": 96, "d_embed": 48}
    model = GPT(config(model=dims, ift={}, sparsity={}).gpt_config(97))
    assert parameter_count(dims, 97, 2048) == sum(p.numel() for p in model.parameters())


def test_gpt2_small_has_its_known_size():
    assert parameter_count(preset("gpt3-small"), VOCAB, 1024) == 124_439_808


def test_active_parameters():
    result = plan(config(), VOCAB, 1)
    counts = active_counts(preset("gpt3-small-sw75"), 0.75)
    assert result.parameters - result.active_parameters == 3 * sum(counts.values())
    assert result.achieved_sparsity == 0.75


def test_a_filter_leaves_layers_dense():
    only = {"sparsity": 0.75, "param_filter": ["h.*.mlp.*"]}
    whole, part = plan(config(), VOCAB, 1), plan(config(sparsity=only), VOCAB, 1)
    assert part.active_parameters - whole.active_parameters == 12 * 4 * 1536**2 * 3 // 4
    assert part.achieved_sparsity == 0.75


def test_blocks_are_counted_whole():
    block = {"type": "block", "block": [32, 16]}
    changes = {"sparsity": {"sparsity": 0.9, "structure": block}}
    result = plan(config(**changes), VOCAB, 1)
    wide = config(**changes).dims
    # Solved to the base layer's FLOPs, in whole blocks.
    units = solve_units(preset("gpt3-small"), wide, (32, 16))
    counts = {name: 512 * count for name, count in units.items()}
    inactive = result.parameters - result.active_parameters
    assert inactive == 12 * (4 * wide["d_model"] ** 2 + 2 * wide["d_model"] * wide["d_ff"]) - sum(
        counts.values()
    )
    assert result.memory[2].masks * 8 * 512 == inactive + sum(counts.values())
    kept = sum(counts.values())
    assert result.achieved_sparsity == 1 - kept / (kept + inactive)
    assert result.sparsity == 0.9


@pytest.mark.parametrize(
    ("algorithm", "dense"), [("static", False), ("set", False), ("rigl", True)]
)
def test_the_total_is_what_a_runs_ledger_will_show(algorithm, dense):
    update = {"freq": 5, "stop": 50}
    sparsity = {"sparsity": 0.75, "algorithm": algorithm, "update": update}
    c = config(max_tokens=None, max_steps=60, sparsity=sparsity)
    result = plan(c, VOCAB, 1)
    dims = preset("gpt3-small-sw75")
    ledger = FlopsLedger.of(dims, 2048, VOCAB, active_counts(dims, 0.75))
    schedule = UpdateSchedule(freq=5, stop=c.update_stop(1))
    updates = [step for step in range(1, 61) if schedule.is_update(step)]
    spent = 256 * sum(
        ledger.active.total + (ledger.dense_gradient if dense and step in updates else 0)
        for step in range(1, 61)
    )
    assert result.flops_total == spent
    assert updates == [5, 10, 15, 20, 25, 30, 35, 40, 45]
    assert result.topology_updates == (0 if algorithm == "static" else 9)
    assert (result.extra_flops > 0) == dense


def test_a_run_shorter_than_its_updates():
    sparsity = {"sparsity": 0.5, "algorithm": "rigl", "update": {"freq": 5, "stop": 500}}
    result = plan(config(max_tokens=None, max_steps=20, sparsity=sparsity), VOCAB, 1)
    assert result.topology_updates == 4


def test_a_dense_run():
    result = plan(config(ift={}, sparsity={}), VOCAB, 1)
    assert result.active_parameters == result.parameters == result.base_parameters
    assert result.flops_total == result.base_flops_total == result.masked_flops_total
    assert "sparsity" not in render(result)
    assert "iso-FLOP" not in render(result)


@pytest.mark.parametrize(
    ("precision", "stage", "listed"),
    [("bf16", 2, "bf16"), ("auto", 0, "fp32"), ("auto", 1, "bf16")],
)
def test_precision(precision, stage, listed):
    c = config(precision=precision, deepspeed={"zero_stage": stage})
    assert plan(c, VOCAB, 1).precision == listed
    assert plan(config(), VOCAB, 1, precision="fp32").precision == "fp32"


def test_checkpoint_bytes():
    result = plan(config(), VOCAB, 4)
    weights = 12 * (4 * 1536**2 + 2 * 1536 * 6144)
    assert result.checkpoint_bytes == 12 * result.parameters + weights // 8


def test_the_largest_model_in_text():
    deepspeed = {"zero_stage": 3, "offload_optimizer": "cpu"}
    big = config(model={"preset": "gpt3-175b"}, micro_batch_size=1, deepspeed=deepspeed)
    result = plan(big, VOCAB, 64)
    text = render(result)
    assert result.base_parameters == 174_604_259_328
    assert "dense base model 174,604,259,328" in text
    assert "0.75 nominal, 0.750000 solved; set, 35 updates" in text
    assert "wide, per layer (not per model)" in text
    assert "   * stage 3 " in text
    assert "host memory" in text
    assert "64 ranks x 1 x 4 accumulated" in text


TABLE_17 = {"seq_len": 1024, "global_batch_size": 512, "max_tokens": None, "max_steps": 4460}


def test_layer_mode_says_what_the_whole_model_costs():
    text = render(plan(config(**TABLE_17, sparsity={"sparsity": 0.5}), VOCAB, 1))
    assert "sparsified layers +0.716 %" in text
    assert "the whole model 1.174x" in text
    assert "0.5 nominal, 0.500000 solved" in text


def test_model_mode_says_nominal_and_solved_sparsity():
    changes = {"sparsity": {"sparsity": 0.75}, "ift": {"member": "wide", "iso_flop": "model"}}
    result = plan(config(**TABLE_17, **changes), VOCAB, 8)
    assert result.flops_total == result.base_flops_total == 876_303_876_096 * 2_283_520
    text = render(result)
    assert "0.75 nominal, 0.919165 solved" in text
    assert "wide, whole run, solved for the sparsity: +0.0e+00 of the dense model's run\n" in text
    assert result.flops_per_sequence == 876_303_876_096


@pytest.mark.parametrize(("name", "solved"), [("", 0.974720), ("_projected", 0.868056)])
def test_the_shipped_runs_in_model_mode(name, solved):
    run = load_config(ROOT / f"configs/pretrain/gpt3_125m_sparsewide75_set_model{name}.yaml")
    result = plan(run, VOCAB, 8)
    assert result.flops_total == result.base_flops_total
    assert (result.sparsity, round(result.achieved_sparsity, 6)) == (0.75, solved)


def test_the_shipped_parallel_run_costs_what_the_dense_one_costs():
    run = load_config(ROOT / "configs/pretrain/gpt3_125m_parallel75_set.yaml")
    result = plan(run, VOCAB, 8)
    assert result.flops_total == result.base_flops_total
    assert (result.active_parameters, result.sparse_layers) == (result.base_parameters, 4 * 72)


def test_model_mode_says_how_near_blocks_come():
    block = {"type": "block", "block": [64, 64]}
    changes = {
        "seq_len": 50,
        "model": {"n_layer": 2, "n_head": 2, "d_model": 128, "d_ff": 512},
        "sparsity": {"sparsity": 0.75, "structure": block},
        "ift": {"member": "wide", "iso_flop": "model", "head": "project"},
    }
    result = plan(config(**changes), 1000, 1)
    assert abs(result.flops_total / result.base_flops_total - 1) > 1e-6
    assert "the nearest that whole units come" in render(result)
    assert "embedding 128 (projected)" in render(result)


def run(*arguments: str) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, str(ROOT / "launch" / "plan.py"), *arguments]
    return subprocess.run(command, capture_output=True, text=True, timeout=300, check=False)


def test_the_command(tmp_path):
    (tmp_path / "run.yaml").write_text(
        "data: [{path: nowhere}]\nseq_len: 1024\nmax_steps: 10\nmodel: {preset: gpt3-small}\n"
    )
    done = run(str(tmp_path / "run.yaml"), "--gpus", "2", "--json", "micro_batch_size=3")
    assert done.returncode == 0, done.stderr
    tree = json.loads(done.stdout)
    assert (tree["flops_per_sequence"], tree["tokens"]) == (876_303_876_096, 10 * 2 * 3 * 1024)
    assert tree["model"]["vocab_size"] == VOCAB
    assert "no data at nowhere yet" in done.stderr
    assert set(tree["memory"]) == {"1", "2", "3"}
    assert tree["memory"]["1"]["total"] > tree["memory"]["3"]["total"]


def test_the_vocabulary_is_that_of_the_data(tmp_path):
    """Of a Megatron pair too, though nothing has the name of its prefix."""
    write_pair(tmp_path / "pair", documents=[[1, 256], [2, 256]])
    (tmp_path / "run.yaml").write_text(
        f"data: [{{path: {tmp_path}/pair}}]\nseq_len: 64\nmax_steps: 1\n"
        "model: {preset: gpt3-small}\n"
    )
    command = [str(tmp_path / "run.yaml"), "--json"]
    for overrides, expected in (
        ([], 257),
        ([f"data=[{{path: {tmp_path}/pair, vocab_size: 300}}]"], 300),
    ):
        done = run(*command, *overrides)
        assert (done.returncode, done.stderr) == (0, "")
        assert json.loads(done.stdout)["model"]["vocab_size"] == expected
    (tmp_path / "empty").mkdir()
    done = run(*command, f"data=[{{path: {tmp_path}/empty}}]")
    assert done.returncode == 2 and "has no index.json" in done.stderr


def test_a_bad_flag_is_one_line(tmp_path):
    done = run(str(tmp_path / "none.yaml"), "--gpus", "0")
    assert (done.returncode, done.stderr) == (2, "error: --gpus: 0 is not a positive number\n")


def test_the_cost_of_updates_is_in_the_plan():
    rigl = config(sparsity={"sparsity": 0.75, "algorithm": "rigl"})
    one, many = plan(rigl, VOCAB, 1), plan(rigl, VOCAB, 32)
    assert one.update is not None
    assert many.update is not None
    assert one.update.sent == 0
    # Samples of 4,096 and three histograms of 2,050 numbers a layer, for the drop and the growth;
    # and what checks them.
    assert many.update.payload == 72 * (2 * 4 * 4096 + 2 * 3 * 4 * 2050 + 2 * 8)
    assert many.update.sent == 2 * many.update.payload * 31 // 32
    assert many.update.sent / 72 < 1e6
    assert many.update.exchanges == one.update.exchanges == 10
    assert many.update.extra < one.update.extra / 2  # a chunk stays
    assert "10 exchanges" in render(many)
    assert plan(config(sparsity={"sparsity": 0.75, "algorithm": "static"}), VOCAB, 8).update is None


BLOCKS = {"type": "block", "block": [16, 16]}


@pytest.mark.parametrize("stage", [0, 2])
def test_compact_storage_holds_what_the_dense_model_holds(stage):
    """Of the linear layers at 75 %: masked storage four times as much."""
    plans = [
        plan(
            config(
                sparsity={"sparsity": 0.75, "storage": storage, "structure": BLOCKS},
                deepspeed={"zero_stage": stage},
            ),
            VOCAB,
            2,
        )
        for storage in ("masked", "compact")
    ]
    masked, compact = plans
    assert masked.layer_bytes == 4 * masked.base_layer_bytes
    assert masked.base_layer_bytes < compact.layer_bytes < 1.05 * compact.base_layer_bytes
    assert masked.stored_parameters == masked.parameters == compact.parameters
    assert compact.stored_parameters == compact.active_parameters == masked.active_parameters
    for mine, theirs in zip(compact.memory.values(), masked.memory.values(), strict=True):
        for part in ("weights", "gradients", "optimizer"):
            share = compact.stored_parameters / masked.stored_parameters
            assert getattr(mine, part) == pytest.approx(share * getattr(theirs, part), rel=1e-6)
        assert (mine.masks, mine.activations) == (theirs.masks, theirs.activations)
        assert mine.views > theirs.views == 0
    slots = (compact.stored_parameters - masked.parameters) // 256 + masked.memory[2].masks * 8
    bits = masked.memory[2].masks
    assert compact.checkpoint_bytes == 12 * compact.stored_parameters + bits + 4 * slots
    assert "compact: 165,517,824 parameters" in render(compact)
    assert "4.000x the dense base model's" in render(masked)
    assert "views" in render(compact) and "views" not in render(masked)


def test_a_compact_model_is_as_planned():
    small = {"n_layer": 2, "n_head": 2, "d_model": 64}
    sparsity = {"sparsity": 0.75, "storage": "compact", "structure": BLOCKS}
    run = config(model=small, sparsity=sparsity)
    result = plan(run, 257, 1)
    layouts = {
        name: BlockLayout(linear_shapes(run.dims)[name], (16, 16), torch.arange(kept))
        for name, (kept, _) in solve(run, 257).units.items()
    }
    model = GPT(run.gpt_config(257), layouts)
    assert result.stored_parameters == sum(p.numel() for p in model.parameters())
    assert result.memory[2].views == sum(
        view_bytes(layout.count, layout.grid) for layout in layouts.values()
    )


@pytest.mark.skipif(
    block_cpu.why_not(torch.device("cpu"), torch.float32) is not None, reason="no native kernels"
)
@pytest.mark.parametrize("block", [(1, 1), (16, 16)])
def test_views_are_what_a_kernel_keeps(block):
    shape = (768, 3072)
    units = shape[0] * shape[1] // (block[0] * block[1])
    layout = BlockLayout(shape, block, torch.arange(0, units, 4))
    values = torch.zeros(layout.count, *block, requires_grad=True)
    x = torch.zeros(300, shape[1], requires_grad=True)  # of few tokens two passes share an order
    block_cpu.sparse_linears(x, [Operand(values, None, layout)])[0].sum().backward()
    kept = {t.data_ptr(): t.nbytes for order in layout.cache.values() for t in order[:3]}
    held = layout.slots.nbytes + sum(kept.values())
    assert 0.95 < held / view_bytes(layout.count, layout.grid) < 1.05  # rows of bands


def test_updates_of_compact_storage_are_not_estimated():
    sparsity = {"sparsity": 0.75, "algorithm": "rigl", "storage": "compact", "structure": BLOCKS}
    result = plan(config(sparsity=sparsity), VOCAB, 8)
    assert result.update is None and result.topology_updates == 35
    # fc1's gradient in bf16, a copy in fp32, and a rank's range of every layer's.
    weights = 12 * (4 * 1536**2 + 2 * 1536 * 6144)
    assert result.growth_bytes == 6 * 1536 * 6144 + 4 * weights // 8
    assert "more memory a rank in update steps" in render(result)
    with pytest.raises(UserError, match="not estimated"):
        update_table([result], Cluster())
    # Without accumulation one layer's is there at a time.
    alone = plan(config(sparsity=sparsity, global_batch_size=64), VOCAB, 8)
    assert alone.growth_bytes == (6 + 4 / 8) * 1536 * 6144
    norms = plan(config(sparsity=sparsity | {"growth_score": "microbatch_norm"}), VOCAB, 8)
    assert norms.growth_bytes == 4 * weights // 256
    assert plan(config(sparsity=sparsity | {"algorithm": "set"}), VOCAB, 8).growth_bytes == 0


def test_the_table_of_updates():
    config_path = "configs/pretrain/gpt3_125m_sparsewide75_rigl.yaml"
    command = [sys.executable, "launch/plan.py", config_path]
    command += ["model.preset=gpt3-13b", "ift.member=none", "deepspeed.zero_stage=3"]
    command += ["global_batch_size=1024", "micro_batch_size=1", "--vocab-size", "50257"]
    result = subprocess.run(
        [*command, "--updates", "8", "1024"], cwd=ROOT, capture_output=True, text=True, check=True
    )
    lines = result.stdout.splitlines()
    assert "12,853,386,240 parameters" in lines[0]
    assert [line.split()[0] for line in lines[-2:]] == ["8", "1024"]
    for line in lines[-2:]:
        assert float(line.split()[-1].rstrip("%")) < 1  # of training
    refused = subprocess.run(
        [*command, "--updates", "8", "--mfu", "0"], cwd=ROOT, capture_output=True, text=True
    )
    assert refused.returncode == 2
    assert "--mfu" in refused.stderr
