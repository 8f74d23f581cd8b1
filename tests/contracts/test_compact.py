"""Contract 6: compact storage trains as masked storage does, at every stage, and converts."""

from dataclasses import replace
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from sparse_gpt.errors import UserError
from sparse_gpt.hf.checkpoint import export_checkpoint
from sparse_gpt.ops import block_cpu
from sparse_gpt.train.checkpoint_files import open_checkpoint, write_tensors
from sparse_gpt.train.manifest import write_manifest
from tests.contracts.runs import after_every_step, run_config, trainer
from tests.ranks import run_ranks

SLOW_SET = pytest.param("set", marks=pytest.mark.slow)
MEMBERS = ("wide", "factorized")  # and those that are not slow
STRUCTURES = {
    "block": {"type": "block", "block": [4, 8]},
    "balanced": {"type": "block", "block": [4, 4], "balanced": "row"},
    "unstructured": {"type": "unstructured"},
    "n_m": {"type": "n_m", "n": 1, "m": 4},
    "transposable": {"type": "n_m", "n": 1, "m": 4, "transposable": True},
}


def changes(storage, method="rigl", structure="block", steps=12, **more):
    found = {
        "max_steps": steps,
        "sparsity__algorithm": method,
        "sparsity__structure": STRUCTURES[structure],
        "sparsity__storage": storage,
        "sparsity__kernel": "reference" if storage == "compact" else "auto",
        "optimizer__grad_clip": 0.0,
        **more,
    }
    return found


def train(corpus, out, *runs):
    """(losses, digests after updates, gradient norms) of each of some runs in turn."""
    results = []
    for i, more in enumerate(runs):
        losses, norms, digests = [], [], []

        def look(step, health, update, losses=losses, norms=norms, digests=digests):
            losses.append(health.loss)
            norms.append(health.grad_norm)
            if update is not None:
                digests.append((step, made.controller.digest(), update.dropped, update.replaced))

        with trainer(run_config(corpus, f"{out}/{i}", **more)) as made:
            after_every_step(made, look)
            made.fit()
            digests.append((0, made.controller.digest(), 0, 0))
        results.append((losses, digests, norms))
    return results


def compare(corpus, out, ranks, first, second):
    for a, b in run_ranks(ranks, train, corpus, str(out), first, second):
        assert a[1] == b[1]
        assert a[0] == b[0]
        # The norm sums squares over other fragments.
        assert a[2] == pytest.approx(b[2], rel=1e-6)


def newest(out: Path):
    """The last checkpoint of a run."""
    return open_checkpoint(max(out.rglob("step-*")))


def same_weights(first, second):
    """Whether two checkpoints hold the same weights and moments, wherever those lie."""
    for name in first.names:
        for kind in ("master", "exp_avg", "exp_avg_sq"):
            assert torch.equal(first.stored(name, kind), second.stored(name, kind)), (name, kind)


@pytest.mark.parametrize("structure", STRUCTURES)
@pytest.mark.parametrize("method", [SLOW_SET, "rigl"])
def test_masks_and_losses_have_the_bits_of_masked_storage(corpus, tmp_path, method, structure):
    both = [changes(storage, method, structure) for storage in ("masked", "compact")]
    compare(corpus, tmp_path, 2, *both)
    same_weights(newest(tmp_path / "0"), newest(tmp_path / "1"))


@pytest.mark.slow
@pytest.mark.parametrize("structure", ["block", "unstructured"])
@pytest.mark.parametrize("method", ["set", "rigl"])
def test_200_steps(corpus, tmp_path, method, structure):
    more = {"sparsity__update": {"freq": 10}, "sparsity__structure": STRUCTURES[structure]}
    both = [changes(s, method, structure, 200, **more) for s in ("masked", "compact")]
    compare(corpus, tmp_path, 2, *both)
    same_weights(newest(tmp_path / "0"), newest(tmp_path / "1"))


def masks_of(reader):
    return {name: pattern.active for name, pattern in reader.patterns().items()}


@pytest.mark.skipif(
    block_cpu.why_not(torch.device("cpu"), torch.float32) is not None, reason="no native kernels"
)
@pytest.mark.parametrize("method", [SLOW_SET, "rigl"])
@pytest.mark.parametrize("structure", ["block", "unstructured"])
def test_a_real_kernel_stays_within_the_bounds_of_contract_4(corpus, tmp_path, method, structure):
    """50 steps in fp32: masks of IoU >= 0.999, losses to 1e-4."""
    more = {"optimizer__lr": 1e-3, "schedule__warmup_steps": 10, "sparsity__update": {"freq": 5}}
    masked, compact = (changes(s, method, structure, 50, **more) for s in ("masked", "compact"))
    compact["sparsity__kernel"] = "block_cpu"
    first, second = run_ranks(2, train, corpus, str(tmp_path), masked, compact)[0]
    assert second[0] == pytest.approx(first[0], rel=0, abs=1e-4)
    assert first[0] != second[0]  # it was another kernel
    pairs = [masks_of(newest(tmp_path / name)) for name in ("0", "1")]
    both = sum(int((pairs[0][n] & pairs[1][n]).sum()) for n in pairs[0])
    either = sum(int((pairs[0][n] | pairs[1][n]).sum()) for n in pairs[0])
    assert both / either >= 0.999


@pytest.mark.skipif(
    block_cpu.why_not(torch.device("cpu"), torch.float32) is not None, reason="no native kernels"
)
@pytest.mark.parametrize("stage", [0, 3])
def test_a_real_kernel_at_other_stages(corpus, tmp_path, stage):
    more = {"sparsity__kernel": "block_cpu", "global_batch_size": 4}
    both = [{**changes("compact"), **more, "deepspeed__zero_stage": s} for s in (2, stage)]
    first, second = run_ranks(2, train, corpus, str(tmp_path), *both)[0]
    assert second[0] == pytest.approx(first[0], rel=0, abs=1e-5)
    assert second[1] == first[1]


def unlike_ranks(corpus, out, more):
    """A run in which rank 1 has no C++ compiler."""
    real = block_cpu.why_not
    if torch.distributed.get_rank() == 1:
        block_cpu.why_not = lambda device, dtype: "there is no C++ compiler"
    try:
        return train(corpus, out, more)
    except UserError as error:
        return str(error)
    finally:
        block_cpu.why_not = real


def test_all_ranks_take_a_kernel_that_all_of_them_have(corpus, tmp_path):
    """Else gradients of different layers would be added to each other."""
    reference, auto = changes("compact", steps=4), changes("compact", steps=4)
    auto["sparsity__kernel"] = "auto"
    (expected,) = run_ranks(2, train, corpus, f"{tmp_path}/reference", reference)[0]
    for (found,) in run_ranks(2, unlike_ranks, corpus, f"{tmp_path}/auto", auto):
        assert found[:2] == expected[:2]
    auto["sparsity__kernel"] = "block_cpu"
    for said in run_ranks(2, unlike_ranks, corpus, f"{tmp_path}/explicit", auto):
        assert "block_cpu cannot run here" in said and "no C++ compiler" in said


# One micro-batch a step: else stages 0 and 1 add micro-batches up before ranks, and compact
# storage, as stages 2 and 3, after them.
@pytest.mark.parametrize(("ranks", "stage"), [(1, 2), (2, 0), (2, 1), (2, 3)])
def test_every_stage(corpus, tmp_path, ranks, stage):
    more = {"deepspeed__zero_stage": stage, "global_batch_size": 2 * ranks}
    both = [changes(storage, "rigl", **more) for storage in ("masked", "compact")]
    compare(corpus, tmp_path, ranks, *both)


def test_three_ranks(corpus, tmp_path):
    """Sums over three ranks are rounded in an order that depends on where a gradient lies."""
    both = [changes(s, "set", global_batch_size=6) for s in ("masked", "compact")]
    for masked, compact in run_ranks(3, train, corpus, str(tmp_path), *both):
        assert masked[1] == compact[1]
        assert masked[0] == pytest.approx(compact[0], rel=1e-6)


@pytest.mark.parametrize("stage", [1, 2, pytest.param(3, marks=pytest.mark.slow)])
def test_bf16(corpus, tmp_path, stage):
    more = {"precision": "bf16", "deepspeed__zero_stage": stage}
    both = [changes(storage, "rigl", "block", 7, **more) for storage in ("masked", "compact")]
    compare(corpus, tmp_path, 2, *both)


@pytest.mark.parametrize(
    ("first", "then"), [("compact", "compact"), ("masked", "compact"), ("compact", "masked")]
)
@pytest.mark.parametrize("method", [SLOW_SET, "rigl"])
def test_a_run_goes_on_in_either_storage(corpus, tmp_path, method, first, then):
    """Stopped behind an update, with another one to come; bit for bit the run without a stop."""
    (whole,) = run_ranks(2, train, corpus, f"{tmp_path}/whole", changes("masked", method))[0]
    (start,) = run_ranks(2, train, corpus, f"{tmp_path}/parts", changes(first, method, stop_at=4))[
        0
    ]
    (end,) = run_ranks(2, train, corpus, f"{tmp_path}/parts", changes(then, method))[0]
    assert start[0] + end[0] == whole[0]
    assert end[1] == whole[1][-len(end[1]) :] and len(end[1]) > 1
    same_weights(newest(tmp_path / "whole"), newest(tmp_path / "parts"))


@pytest.mark.skipif(
    block_cpu.why_not(torch.device("cpu"), torch.float32) is not None, reason="no native kernels"
)
@pytest.mark.parametrize("precision", ["fp32", "bf16"])
@pytest.mark.parametrize("structure", ["block", "unstructured"])
def test_a_run_with_a_real_kernel_goes_on_bit_for_bit(corpus, tmp_path, structure, precision):
    """Stopped twice: behind an update, and before one."""
    given = changes("compact", "rigl", structure, sparsity__kernel="block_cpu", precision=precision)
    (whole,) = run_ranks(2, train, corpus, f"{tmp_path}/whole", given)[0]
    losses = []
    for stop in (4, 8, None):
        more = given | ({} if stop is None else {"stop_at": stop})
        (part,) = run_ranks(2, train, corpus, f"{tmp_path}/parts", more)[0]
        losses += part[0]
    assert losses == whole[0] and len(losses) == 12
    same_weights(newest(tmp_path / "whole"), newest(tmp_path / "parts"))


def broken_slots(corpus, out, change):
    """The error of going on from a checkpoint whose slots were changed, manifest and all."""
    reader = newest(Path(out))
    manifest = dict(reader.manifest)
    file = next(name for name in reader.files if name.startswith("slots-"))
    slots = load_file(reader.path / file)
    name = next(iter(slots))
    if change == "twice":
        slots[name][0] = slots[name][1]
    elif change == "outside":
        slots[name][0] = 2**20
    elif change == "another":
        free = set(range(int(slots[name].max()) + 1)) - set(slots[name].tolist())
        slots[name][0] = free.pop()
    else:
        del slots[name]
    arrays = {key: value.numpy() for key, value in slots.items()}
    ranges = {key: (0, value.size) for key, value in arrays.items()}
    entry = write_tensors(reader.path / file, arrays, ranges)
    manifest["files"] = {**manifest["files"], file: entry}
    write_manifest(reader.path, {key: value for key, value in manifest.items() if key != "sha256"})
    try:
        train(corpus, out, changes("compact"))
    except UserError as error:
        return str(error)
    return None


@pytest.mark.parametrize(
    ("change", "said"),
    [
        ("twice", "are no topology"),
        ("outside", "are no topology"),
        ("another", "are not those of its mask"),
        ("missing", "are missing"),
    ],
)
def test_slots_that_are_not_the_masks_are_refused(corpus, tmp_path, change, said):
    run_ranks(1, train, corpus, str(tmp_path), changes("compact", stop_at=4))
    (error,) = run_ranks(1, broken_slots, corpus, str(tmp_path), change)
    assert error is not None and said in error and "broken checkpoint" in error


def test_another_layout_goes_on_from_compact_slots(corpus, tmp_path):
    """Slots are read back on more ranks and another stage: losses agree as elastic runs do."""
    (whole,) = run_ranks(2, train, corpus, f"{tmp_path}/whole", changes("compact"))[0]
    run_ranks(2, train, corpus, f"{tmp_path}/parts", changes("compact", stop_at=7))
    more = {"deepspeed__zero_stage": 3}
    (end,) = run_ranks(4, train, corpus, f"{tmp_path}/parts", changes("compact", **more))[0]
    assert end[0] == pytest.approx(whole[0][7:], rel=1e-5)


@pytest.mark.parametrize(
    "member", ["parallel", "doped", *(pytest.param(m, marks=pytest.mark.slow) for m in MEMBERS)]
)
def test_members(corpus, tmp_path, member):
    both = [changes(s, "rigl", steps=7, ift__member=member) for s in ("masked", "compact")]
    compare(corpus, tmp_path, 2, *both)
    same_weights(newest(tmp_path / "0"), newest(tmp_path / "1"))


def test_an_update_that_replaces_the_step(corpus, tmp_path):
    more = {"sparsity__update": {"freq": 3, "mode": "replace"}}
    compare(corpus, tmp_path, 2, *(changes(s, steps=7, **more) for s in ("masked", "compact")))


def test_activation_checkpointing(corpus, tmp_path):
    more = {"model__activation_checkpointing": True}
    compare(corpus, tmp_path, 2, *(changes(s, steps=7, **more) for s in ("masked", "compact")))


def weights_from(corpus, out, more, source):
    """Losses of a run that starts from the weights of another."""
    losses = []
    with trainer(run_config(corpus, out, **more), open_checkpoint(source)) as made:
        after_every_step(made, lambda step, health, update: losses.append(health.loss))
        made.fit()
    return losses


@pytest.mark.parametrize("storage", ["masked", "compact"])
def test_a_run_from_weights_of_the_other_storage(corpus, tmp_path, storage):
    run_ranks(2, train, corpus, f"{tmp_path}/start", changes(storage))
    found = []
    for own in ("masked", "compact"):
        more = changes(own, "static", steps=4)
        out = f"{tmp_path}/{own}"
        found += run_ranks(2, weights_from, corpus, out, more, f"{tmp_path}/start/0")[:1]
    assert found[0] == found[1]


def test_growth_by_norms_of_micro_batches(corpus, tmp_path):
    """Ranks agree (a run checks it after every update), and it is not growth by the whole batch."""
    exact, norms = (
        changes("compact", steps=7, sparsity__growth_score=score)
        for score in ("exact", "microbatch_norm")
    )
    first, second = run_ranks(2, train, corpus, str(tmp_path), exact, norms)[0]
    assert first[0][:3] == second[0][:3]
    assert [update[0] for update in first[1]] == [update[0] for update in second[1]]
    assert first[1][0][1] != second[1][0][1]


def test_exports_and_tickets_of_both_storages(corpus, tmp_path):
    exported, tickets = [], []
    for storage in ("masked", "compact"):
        run = tmp_path / storage
        run_ranks(1, train, corpus, str(run), changes(storage, "set", steps=4))
        made = export_checkpoint(run / "0", run / "hf")
        exported.append(made)
        ticket = changes("masked", "static", steps=4, sparsity__init_mask="lottery")
        ticket["sparsity__lottery"] = {"final": str(run / "0")}
        tickets.append(run_ranks(1, train, corpus, f"{run}/ticket", ticket)[0][0])
    masked, compact = (replace(made, out=Path(), bytes=0) for made in exported)
    assert masked == compact and 0 < masked.active_parameters < masked.parameters
    files = [tmp_path / storage / "hf" / "model.safetensors" for storage in ("masked", "compact")]
    assert files[0].read_bytes() == files[1].read_bytes()
    assert tickets[0] == tickets[1]


def state_bytes(corpus, out, more):
    """Bytes on this rank of weights, gradients and Adam of the layers that can be sparse."""
    with trainer(run_config(corpus, out, **more)) as made:
        found = {"weights": 0, "gradients": 0, "optimizer": 0}

        inner = made.controller.before_step

        def before_step(step):
            for name in made.engine.module.sparse_layers():
                fragment, gradient = made.shards.fragment(name), made.shards.gradient(name)
                found["weights"] += made.shards.parameters[name].nbytes
                if fragment is not None:
                    own = sum(t.nbytes for t in fragment.tensors().values())
                    own -= fragment.master.nbytes if made.shards.replicated else 0
                    found["optimizer"] += own
                found["gradients"] += 0 if gradient is None else gradient.nbytes
            return inner(step)

        made.controller.before_step = before_step
        made.fit()
        return found


@pytest.mark.parametrize("stage", [0, 2])
def test_memory_of_sparse_layers_is_that_of_the_dense_model(corpus, tmp_path, stage):
    """Issue 5: at 75 % in 16 x 16 blocks at most 1.05 times the dense baseline; masked: 4 times."""
    common = {"max_steps": 1, "deepspeed__zero_stage": stage, "schedule__warmup_steps": 1}
    wide = {
        "ift__member": "wide",
        "sparsity__structure": {"type": "block", "block": [16, 16]},
        **common,
    }
    runs = {
        "dense": {**common, "sparsity": {}},
        "masked": {**wide, "sparsity__storage": "masked"},
        "compact": {**wide, "sparsity__storage": "compact", "sparsity__kernel": "reference"},
    }
    total = {}
    for name, more in runs.items():
        ranks = run_ranks(2, state_bytes, corpus, f"{tmp_path}/{name}", more)
        total[name] = sum(sum(found.values()) for found in ranks)
    assert total["compact"] <= 1.05 * total["dense"]
    assert total["masked"] == pytest.approx(4 * total["dense"], rel=0.05)
