"""Every kind of damage to every file of a checkpoint is refused, with the file's name."""

import random
import re
import shutil
from pathlib import Path

import pytest

from sparse_gpt.errors import UserError
from sparse_gpt.train.checkpoint_files import open_checkpoint
from tests.contracts.runs import run_config, trainer
from tests.faults import tally
from tests.ranks import run_ranks

SEED = 11
# Between them they write every kind of file there is.
RUNS = {
    "rigl": {"sparsity__algorithm": "rigl"},
    "compact": {
        "sparsity__storage": "compact",
        "sparsity__structure": {"type": "block", "block": [4, 4]},
    },
    "smet": {"optimizer__growth": "smet"},
    "top_kast": {
        "sparsity__algorithm": "top_kast",
        "optimizer__weight_decay": 0,
    },
}
KINDS = {"master", "exp_avg", "exp_avg_sq", "topology", "ever", "rng", "slots", "young", "trained"}


def save_two(corpus, out, changes):
    with trainer(run_config(corpus, out, max_steps=6, checkpoint__every=3, **changes)) as made:
        made.fit()


@pytest.fixture(scope="module")
def runs(corpus, tmp_path_factory):
    """Two checkpoints of every run, by name."""
    root, kinds = tmp_path_factory.mktemp("damage"), set()
    for name, changes in RUNS.items():
        run_ranks(2, save_two, corpus, str(root / name), changes)
        for file in open_checkpoint(root / name).files:
            kinds.add(re.sub(r"-\d{5}\.safetensors$", "", file))
    assert kinds == KINDS
    return root


@pytest.fixture(params=RUNS)
def checkpoint(request, runs, tmp_path):
    """A copy of a run's newest checkpoint."""
    source = open_checkpoint(runs / request.param).path
    return Path(shutil.copytree(source, tmp_path / source.name))


def refused(checkpoint, name):
    """Opening it names the folder and that file."""
    with pytest.raises(UserError) as caught:
        open_checkpoint(checkpoint)
    said = str(caught.value)
    assert name in said and str(checkpoint) in said, (name, said)


def damaged(checkpoint, damages):
    """Each damage of each file is refused, and the mended checkpoint is not; how many."""
    many = 0
    for path in sorted(checkpoint.iterdir()):
        good = path.read_bytes()
        for damage in damages(path.name, good):
            path.write_bytes(damage)
            refused(checkpoint, path.name)
            many += 1
        path.write_bytes(good)
    open_checkpoint(checkpoint)
    return many


def flips(many):
    def of(name, good):
        generator = random.Random(f"{SEED} {name}")
        for _ in range(many):
            position = generator.randrange(8 * len(good))
            bad = bytearray(good)
            bad[position // 8] ^= 1 << position % 8
            if name != "manifest.json" or bad.lower() != good.lower():  # 1e-05 as 1E-05
                yield bytes(bad)

    return of


def test_a_flipped_bit_in_any_file(checkpoint):
    tally.add("files with a flipped bit refused by name", damaged(checkpoint, flips(8)))


@pytest.mark.slow
def test_many_flipped_bits_in_any_file(checkpoint):
    tally.add("files with a flipped bit refused by name", damaged(checkpoint, flips(200)))


def cuts(name, good):
    generator = random.Random(f"{SEED} {name}")
    for length in (0, 7, len(good) - 1, generator.randrange(len(good))):
        yield good[:length]
    yield good + b"\0"
    yield bytes(len(good))


def test_any_file_cut_short_longer_or_full_of_zeros(checkpoint):
    tally.add("files of a wrong length or of zeros refused by name", damaged(checkpoint, cuts))


def test_any_file_missing(checkpoint):
    for path in sorted(checkpoint.iterdir()):
        good = path.read_bytes()
        path.unlink()
        refused(checkpoint, path.name)
        path.mkdir()  # a folder of its name
        refused(checkpoint, path.name)
        path.rmdir()
        path.write_bytes(good)
        tally.add("missing files refused by name", 2)
    open_checkpoint(checkpoint)


def other(runs, run, step):
    return runs / run / f"checkpoints/step-{step:08d}"


def same(first, second):
    return second.exists() and first.read_bytes() == second.read_bytes()


def test_any_file_of_another_run_step_or_rank(checkpoint, runs, request):
    own = request.node.callspec.params["checkpoint"]
    strangers = [other(runs, run, 6) for run in RUNS if run != own] + [other(runs, own, 3)]
    many = 0
    for path in sorted(checkpoint.iterdir()):
        good = path.read_bytes()
        rank = path.with_name(path.name.replace("00000.s", "00001.s"))
        for stranger in [*(folder / path.name for folder in strangers), rank]:
            if not stranger.exists() or same(path, stranger):
                continue
            shutil.copyfile(stranger, path)
            with pytest.raises(UserError) as caught:
                open_checkpoint(checkpoint)
            # A manifest that is whole, but of another folder, is told by a file it does not fit.
            named = [name for name in named_in(str(caught.value)) if (checkpoint / name).exists()]
            assert path.name in named or path.name == "manifest.json", str(caught.value)
            assert str(checkpoint) in str(caught.value)
            path.write_bytes(good)
            many += 1
    assert many > 10
    open_checkpoint(checkpoint)
    tally.add("files of another run, step or rank refused by name", many)


def named_in(text):
    return re.findall(r"[a-z_]+-\d{5}\.safetensors|manifest\.json", text)


@pytest.mark.parametrize(
    "name", ["master-00002.safetensors", "slots-00007.safetensors", "manifest.json.tmp", "notes"]
)
def test_a_file_that_does_not_belong_there(runs, tmp_path, name):
    source = other(runs, "rigl", 6)
    checkpoint = Path(shutil.copytree(source, tmp_path / source.name))
    shutil.copyfile(other(runs, "smet", 3) / "master-00000.safetensors", checkpoint / name)
    refused(checkpoint, name)
    (checkpoint / name).rename(checkpoint / ".hidden")  # such as what NFS leaves: nobody reads it
    open_checkpoint(checkpoint)
    tally.add("files that do not belong there refused by name")


def test_a_whole_checkpoint_under_the_name_of_another_step(runs, tmp_path):
    checkpoint = Path(shutil.copytree(other(runs, "rigl", 3), tmp_path / "step-00000006"))
    refused(checkpoint, "manifest.json is that of step 3")
    open_checkpoint(checkpoint.rename(tmp_path / "start"))  # a name that says no step
