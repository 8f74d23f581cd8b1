"""First topologies by SNIP, GraSP, FORCE and lottery tickets, against plain autograd."""

import math
from unittest import mock

import pytest
import torch
import torch.nn.functional as F
from torch.nn.attention import SDPBackend, sdpa_kernel

from sparse_gpt.data.loader import PackedDataset
from sparse_gpt.data.shards import open_data
from sparse_gpt.model.flops import sequence_flops
from sparse_gpt.model.gpt import GPT
from sparse_gpt.sparse_units import run_cost
from sparse_gpt.train.build import initial_units
from sparse_gpt.train.checkpoint_files import CheckpointReader
from tests.contracts.runs import assemble, masks, run_config, trainer
from tests.contracts.sessions import differences, whole
from tests.ranks import run_ranks
from tests.tiny import write_corpus

BATCHES, ROUNDS = 2, 3


@pytest.fixture(scope="module")
def corpus(tmp_path_factory):
    return str(write_corpus(tmp_path_factory.mktemp("corpus") / "tiny", documents=60))


def changes(kind, **more):
    scoring = {"batches": BATCHES} | ({"rounds": ROUNDS} if kind == "force" else {})
    return {
        "sparsity__init_mask": kind,
        "sparsity__sparsity": 0.9,
        "sparsity__scoring": scoring,
        "model__dropout": 0.1,
        **more,
    }


def first_topologies(corpus, out, many):
    """Of each config: masks, weights, moments' largest, state and ledger, before step 1."""
    found = []
    for number, config_changes in enumerate(many):
        with trainer(run_config(corpus, f"{out}/{number}", **config_changes)) as made:
            masters, moment = {}, 0.0
            for name in made.shards.parameters:
                fragment = made.shards.fragment(name)
                masters[name] = assemble(made, name, fragment and fragment.master)
                if fragment is not None and fragment.numel:
                    moment = max(moment, float(fragment.exp_avg.abs().max()))
            found.append(
                {
                    "masks": masks(made),
                    "weights": masters,
                    "moment": moment,
                    "samples": made.state.samples,
                    "flops": made.state.flops_spent,
                    "dense": made.ledger.dense.total,
                    "targets": {n: m.active for n, m in made.controller.masks.items()},
                    "uniform": initial_units(made.solution, None),
                }
            )
    return found


class Plain:
    """The model and its first batches in one process, without an engine."""

    def __init__(self, corpus, block=(1, 1)):
        self.block = block
        self.config = run_config(corpus, "unused")
        data = open_data(corpus)
        self.model = GPT(self.config.gpt_config(data.vocab_size))
        self.model.init_weights(self.config.seed)
        self.layers = self.model.sparse_layers()
        self.names = list(self.layers)
        self.dense = {name: layer.weight.detach().clone() for name, layer in self.layers.items()}
        dataset = PackedDataset([(data, 1.0)], "train", 32, self.config.seed)
        samples = [dataset.sample(i)["tokens"] for i in range(8 * BATCHES * ROUNDS)]
        self.tokens = torch.stack([torch.from_numpy(s.astype("int64")) for s in samples])

    def loss(self, first, last):
        """Mean loss of global batches `first .. last - 1`."""
        rows = self.tokens[8 * first : 8 * last]
        return self.model(rows[:, :-1], rows[:, 1:])

    @property
    def weights(self):
        return [layer.weight for layer in self.layers.values()]

    def snip(self, first=0):
        gradients = torch.autograd.grad(self.loss(first, first + BATCHES), self.weights)
        return [(self.dense[n] * g).abs() for n, g in zip(self.names, gradients)]

    def of_blocks(self, scores):
        """The largest score in every block, over the grid."""
        return F.max_pool2d(scores[None], self.block, self.block)[0]

    def force(self, total):
        everything = sum(w.numel() for w in self.weights) // math.prod(self.block)
        for t in range(1, ROUNDS + 1):
            share = t / ROUNDS
            k = round(math.exp(share * math.log(total) + (1 - share) * math.log(everything)))
            scores = self.snip((t - 1) * BATCHES)
            keep = top([self.of_blocks(score) for score in scores], k)
            rows, columns = self.block
            keep = [m.repeat_interleave(rows, 0).repeat_interleave(columns, 1) for m in keep]
            if t < ROUNDS:
                with torch.no_grad():
                    for weight, name, mask in zip(self.weights, self.names, keep):
                        weight.copy_(self.dense[name] * mask)
        return scores

    def grasp(self):
        with sdpa_kernel(SDPBackend.MATH):
            flow = torch.autograd.grad(self.loss(0, BATCHES), self.weights, create_graph=True)
            norm = torch.stack([(g.detach() * g).sum() for g in flow]).sum()
            products = torch.autograd.grad(norm, self.weights)
        return [w.detach() * p for w, p in zip(self.weights, products)]


def top(scores, k):
    """Masks: the best of every layer, then the best of all the others, k in all."""
    keys = [s.double().view(-1).clone() for s in scores]
    for key in keys:
        key[key.argmax()] = math.inf
    flat = torch.cat(keys)
    mask = torch.zeros(flat.numel(), dtype=torch.bool)
    mask[torch.sort(flat, descending=True, stable=True).indices[:k]] = True
    parts = mask.split([s.numel() for s in scores])
    return [part.view(s.shape) for part, s in zip(parts, scores)]


def check(found, scores, names):
    """The masks are those of the scores, but for what is within rounding of the last one taken."""
    total = sum(found["uniform"].values())
    wanted = top(scores, total)
    line = min(float(s[m].min()) for s, m in zip(scores, wanted) if int(m.sum()) > 1)
    differing = 0
    for name, score, mask in zip(names, scores, wanted):
        apart = found["masks"][name] != mask
        differing += int(apart.sum())
        assert ((score[apart] - line).abs() <= 1e-4 * abs(line)).all(), name
    assert differing <= 0.001 * total
    assert sum(int(m.sum()) for m in found["masks"].values()) == total


def scoring(kind, plain, total, dense):
    """FLOPs of one sequence: a dense step; four; or one a round, its products partly masked."""
    if kind != "force":
        return {"snip": 1, "grasp": 4}[kind] * dense
    everything = sum(weight.numel() for weight in plain.weights)
    kept = [(total / everything) ** (t / ROUNDS) * everything for t in range(ROUNDS)]
    return sum(dense - 2 * 2 * 32 * (everything - round(k)) for k in kept)


LAYOUTS = [(1, 1), (2, 0), (2, 2), (2, 3)]


@pytest.mark.parametrize(("ranks", "stage"), LAYOUTS)
def test_masks_are_those_of_plain_autograd(corpus, tmp_path, ranks, stage):
    kinds = [kind for kind in ("snip", "force", "grasp") if kind != "grasp" or stage < 3]
    more = {"deepspeed__zero_stage": stage}
    many = [changes(kind, **more) for kind in kinds]
    results = run_ranks(ranks, first_topologies, corpus, str(tmp_path), many)[0]
    for kind, found in zip(kinds, results):
        plain = Plain(corpus)
        total = sum(found["uniform"].values())
        scores = plain.force(total) if kind == "force" else getattr(plain, kind)()
        check(found, scores, plain.names)
        counts = {name: int(mask.sum()) for name, mask in found["masks"].items()}
        assert counts == found["targets"] != found["uniform"]
        assert min(counts.values()) >= 1
        assert found["samples"] == 0 and found["moment"] == 0.0
        assert found["flops"] == 8 * BATCHES * scoring(kind, plain, total, found["dense"])
        for name, mask in found["masks"].items():
            assert torch.equal(found["weights"][name], plain.dense[name] * mask)


@pytest.mark.parametrize("kind", ["snip", "force"])
def test_blocks(corpus, tmp_path, kind):
    """A block's score is the largest of its weights', and blocks are cut by ranks anywhere."""
    structure = {"type": "block", "block": [4, 2], "score": "max"}
    more = {"sparsity__structure": structure, "deepspeed__zero_stage": 3}
    found = run_ranks(2, first_topologies, corpus, str(tmp_path), [changes(kind, **more)])[0][0]
    plain = Plain(corpus, block=(4, 2))
    total = sum(found["uniform"].values())
    scores = plain.force(total) if kind == "force" else plain.snip()
    check(found, [plain.of_blocks(score) for score in scores], plain.names)


def test_weights_that_zero_3_shards_cannot_be_differentiated_twice(corpus, tmp_path):
    more = changes("grasp", deepspeed__zero_stage=3)
    with pytest.raises(Exception, match=r"deepspeed\.zero_stage 2 or lower"):
        run_ranks(1, first_topologies, corpus, str(tmp_path), [more])


def trained(corpus, out, config_changes, scoring_allowed=True):
    """The state of a run at its end, and what it cost: FLOPs spent, foreseen and of a step."""
    forbidden = mock.patch("sparse_gpt.train.assemble.MaskFinder", side_effect=AssertionError)
    config = run_config(corpus, out, **config_changes)
    with (
        forbidden if not scoring_allowed else mock.MagicMock(),
        trainer(config) as made,
    ):
        made.fit()
        uniform = {name: kept for name, (kept, _) in made.solution.units.items()}
        return {
            "whole": whole(made),
            "spent": made.state.flops_spent,
            "foreseen": 8 * run_cost(config, made.vocab_size, made.solution),
            "step": made.ledger.active.total,
            "uniform": sequence_flops(made.solution.dims, 32, made.vocab_size, uniform).total,
        }


def test_a_run_costs_what_a_uniform_one_does_and_resumes(corpus, tmp_path):
    """Iso-FLOP; and bit for bit the same run when stopped, without scoring again."""
    update = {"freq": 2, "scope": "model"}
    more = changes("force", sparsity__algorithm="rigl", sparsity__update=update)
    more |= {"max_steps": 6, "schedule__warmup_steps": 1}
    straight = run_ranks(2, trained, corpus, str(tmp_path / "one"), more)[0]
    assert straight["step"] == straight["uniform"]
    assert straight["spent"] == straight["foreseen"]
    run_ranks(2, trained, corpus, str(tmp_path / "two"), more | {"stop_at": 3})
    resumed = run_ranks(2, trained, corpus, str(tmp_path / "two"), more, scoring_allowed=False)[0]
    assert differences(straight["whole"], resumed["whole"]) == []
    assert resumed["spent"] == straight["spent"]


def test_a_lottery_ticket(corpus, tmp_path):
    """The largest weights of a dense run's end, with the values they had after two steps."""
    dense = {"sparsity__sparsity": 0.0, "sparsity__algorithm": "static", "max_steps": 4}
    dense |= {"checkpoint__every": 2, "checkpoint__keep_last": 2}
    run_ranks(1, trained, corpus, str(tmp_path / "dense"), dense)
    folder = tmp_path / "dense" / "checkpoints"
    early, last = (CheckpointReader(folder / f"step-0000000{step}") for step in (2, 4))
    ticket = {"final": str(tmp_path / "dense"), "rewind": str(early.path)}
    both = [
        {
            "sparsity__sparsity": 0.9,
            "sparsity__init_mask": "lottery",
            "sparsity__lottery": lottery,
            "deepspeed__zero_stage": 3,
        }
        for lottery in (ticket, ticket | {"rewind": None})
    ]
    results = run_ranks(2, first_topologies, corpus, str(tmp_path / "ticket"), both)[0]
    plain = Plain(corpus)
    scores = [last.parameter(name).abs() for name in plain.names]
    for found, start in zip(results, (early.parameter, plain.dense.__getitem__)):
        total = sum(found["uniform"].values())
        for name, mask in zip(plain.names, top(scores, total)):
            assert torch.equal(found["masks"][name], mask)
            assert torch.equal(found["weights"][name], start(name) * mask)
        assert found["samples"] == found["flops"] == 0
