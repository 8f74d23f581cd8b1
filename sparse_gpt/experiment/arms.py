"""Arms of an experiment over their seeds, and the paired comparisons between them."""

import dataclasses
import math
from collections.abc import Sequence
from dataclasses import dataclass, field

from sparse_gpt.experiment.results import Record, Results
from sparse_gpt.experiment.statistics import ALPHA, Paired, Summary, holm, paired, summarise

MEMBERS = {
    "wide": "Sparse Wide",
    "parallel": "Sparse Parallel",
    "factorized": "Sparse Factorized",
    "doped": "Sparse Doped",
    "low_rank": "Low Rank",
}
METHODS = {
    "set": "SET",
    "rigl": "RigL",
    "granet": "GraNet",
    "gmp": "GMP",
    "ac_dc": "AC/DC",
    "top_kast": "Top-KAST",
    "search_spaces": "search spaces",
}
MAIN = "main"
EQUAL_FLOPS = 0.01  # whole-model FLOPs that differ by no more than this share are called equal


@dataclass(frozen=True)
class Arm:
    """All runs of one arm in one stage (and one way of fine-tuning), by seed."""

    name: str
    label: str
    stage: str
    mode: str = ""
    group: str = MAIN  # arms shown together
    planned: tuple[int, ...] = ()
    runs: dict[int, Record] = field(default_factory=dict)
    pretrained: Record | None = None

    @property
    def any(self) -> Record:
        """A record of the arm, for what does not depend on the seed."""
        return next(iter(self.runs.values()))

    @property
    def source(self) -> Record:
        """A record that tells the pretrained model: of the stage before where there is one."""
        return self.pretrained or self.any

    @property
    def title(self) -> str:
        return f"{self.label}, {self.mode} fine-tuning" if self.mode else self.label

    def losses(self, split: str) -> dict[int, float]:
        """Finite losses by seed."""
        by_seed = ((seed, run.final_loss(split)) for seed, run in sorted(self.runs.items()))
        return {seed: loss for seed, loss in by_seed if loss is not None}

    def loss(self, split: str) -> Summary | None:
        losses = self.losses(split)
        return summarise(list(losses.values())) if losses else None

    def diverged(self) -> list[int]:
        """Seeds that end without any finite loss; evaluations have none to end with."""
        if self.stage == "leaderboard":
            return []
        return [s for s in sorted(self.runs) if all(s not in self.losses(x) for x in SPLITS)]

    def flops(self, seeds: Sequence[int] | None = None) -> float | None:
        """Mean FLOPs spent, of these seeds or all."""
        chosen = [self.runs[seed] for seed in (self.runs if seeds is None else seeds)]
        spent = [run.flops.spent for run in chosen if run.flops]
        return math.fsum(spent) / len(spent) if spent and len(spent) == len(chosen) else None

    def tokens(self, seeds: Sequence[int] | None = None) -> float | None:
        chosen = [self.runs[seed] for seed in (self.runs if seeds is None else seeds)]
        tokens = [run.tokens for run in chosen if run.tokens is not None]
        return sum(tokens) / len(tokens) if tokens and len(tokens) == len(chosen) else None


SPLITS = ("test", "val")  # the first that all arms of a stage have is compared


@dataclass(frozen=True)
class Comparison:
    """An arm against another on their common seeds; negative differences are lower losses."""

    arm: Arm
    against: Arm
    split: str
    pairs: Paired
    p_adjusted: float | None = None

    @property
    def verdict(self) -> str:
        """`better`, `worse`, `undecided` (tested, not significant) or `untested`."""
        if self.p_adjusted is None:
            return "untested"
        if self.p_adjusted >= ALPHA:
            return "undecided"
        return "better" if self.pairs.mean < 0 else "worse"

    @property
    def flops_ratio(self) -> float | None:
        return _ratio(self.arm.flops(self.pairs.seeds), self.against.flops(self.pairs.seeds))

    @property
    def tokens_ratio(self) -> float | None:
        return _ratio(self.arm.tokens(self.pairs.seeds), self.against.tokens(self.pairs.seeds))

    @property
    def equal_flops(self) -> bool:
        ratio = self.flops_ratio
        return ratio is not None and abs(ratio - 1) <= EQUAL_FLOPS


def _ratio(first: float | None, second: float | None) -> float | None:
    return first / second if first is not None and second else None


def arms(results: Results, stage: str) -> list[Arm]:
    """The arms of a stage that have a record, in the plan's order, then by first record."""
    planned = {run.run: run for run in results.plan or []}
    order = {run.arm: place for place, run in reversed(list(enumerate(results.plan or [])))}
    runs: dict[tuple[str, str], dict[int, Record]] = {}
    for record in results.records:
        if record.stage == stage:
            runs.setdefault((record.arm, record.mode), {})[record.seed] = record
    before = {record.arm: record for record in results.records if record.stage == "pretrain"}
    found = []
    for (name, mode), by_seed in runs.items():
        record = next(iter(by_seed.values()))
        plan = planned.get(record.run)
        group = record.group if record.group is not None else (plan.group if plan else None)
        seeds = {p.seed for p in planned.values() if p.arm == name and p.stage == stage}
        found.append(
            Arm(
                name=name,
                label=plan.label if plan else record.label,
                stage=stage,
                mode=mode,
                group=group or MAIN,
                planned=tuple(sorted(seeds)),
                runs=dict(sorted(by_seed.items())),
                pretrained=before.get(name),
            )
        )
    base = baseline_name(results)
    return sorted(found, key=lambda a: (order.get(a.name, len(order)), a.name != base, a.mode))


def baseline_name(results: Results) -> str | None:
    """The named baseline, else the arm called dense, else the first planned or recorded one."""
    if results.about.baseline:
        return results.about.baseline
    names = [run.arm for run in [*(results.plan or []), *results.records]]
    return "dense" if "dense" in names else (names[0] if names else None)


def comparisons(results: Results) -> list[Comparison]:
    """All comparisons of the experiment, with p values corrected over all of them (Holm).

    Pretraining: the pairs the experiment names; or each main arm against the baseline, and each
    arm against those that were given its FLOPs.
    Fine-tuning: the same pairs, the other side fine-tuned densely, and dense against sparse
    fine-tuning of each arm.
    """
    found: list[Comparison] = []
    trained = {arm.name: arm for arm in arms(results, "pretrain")}
    main = {name: arm for name, arm in trained.items() if arm.group == MAIN}
    base = baseline_name(results)
    wanted = results.about.compare
    if wanted is None:
        wanted = [(name, base) for name in main if base is not None and name != base]
        matched = ((str((arm.any.match or {}).get("arm")), name) for name, arm in main.items())
        wanted += [(given, name) for given, name in matched if given in main]
    for name, other in wanted:
        if name in trained and other in trained:
            groups = {trained[name].group, trained[other].group}
            beside = [arm for arm in trained.values() if arm.group in groups]
            found += _compare(trained[name], trained[other], _split(beside))
    tuned = {(a.name, a.mode): a for a in arms(results, "finetune") if a.group == MAIN}
    split = _split(list(tuned.values()))
    for (name, mode), arm in tuned.items():
        rivals = [(other, "dense") for one, other in wanted if one == name]
        if not any(one in {key[0] for key in tuned} for one, _ in rivals) and name != base:
            rivals.append((base or "", "dense"))
        if mode == "dense":
            rivals.append((name, "sparse"))
        for rival in dict.fromkeys(rivals):
            if rival in tuned:
                found += _compare(arm, tuned[rival], split)
    adjusted = holm([comparison.pairs.p for comparison in found])
    return [dataclasses.replace(comparison, p_adjusted=p) for comparison, p in zip(found, adjusted)]


def _split(chosen: list[Arm]) -> str:
    """The split to compare on: test where all arms with any loss have one, else validation."""
    ended = [arm for arm in chosen if any(arm.losses(split) for split in SPLITS)]
    return next((split for split in SPLITS if all(a.losses(split) for a in ended)), SPLITS[-1])


def _compare(arm: Arm, against: Arm, split: str) -> list[Comparison]:
    pairs = paired(arm.losses(split), against.losses(split))
    return [Comparison(arm, against, split, pairs)] if pairs else []


def transformation(record: Record) -> tuple[str, float]:
    """The papers' name of what was done to the dense model, and the nominal sparsity."""
    member = str(record.section("ift").get("member", "none"))
    sparsity = record.model.sparsity_nominal if record.model else 0.0
    if member != "none":
        return MEMBERS.get(member, member), sparsity
    return ("Sparse" if sparsity else "Dense"), sparsity


def method(record: Record) -> str:
    """The sparse training method, or a dash."""
    name = str(record.section("sparsity").get("algorithm", "-"))
    sparse = record.model is not None and record.model.sparsity_nominal > 0
    return METHODS.get(name, name) if sparse else "-"
