"""The answer in sentences, made from the comparisons alone: wins and losses alike."""

from collections.abc import Sequence

from sparse_gpt.experiment.arms import (
    MAIN,
    SPLITS,
    Arm,
    Comparison,
    arms,
    transformation,
)
from sparse_gpt.experiment.results import Results
from sparse_gpt.experiment.statistics import ALPHA

SPLIT_NAMES = {"test": "test", "val": "validation"}


def answer(results: Results, found: Sequence[Comparison]) -> list[str]:
    """The verdict: at equal FLOPs of the whole model, at other FLOPs, what is still open."""
    if not found:
        there = len(results.records)
        return [
            f"No answer yet: {there} finished run{'s' if there != 1 else ''}, and no two arms to "
            "compare on a common seed."
        ]
    sentences = []
    for lead, chosen in _kinds(found):
        if chosen:
            sentences.append(f"{lead}: {_counts(chosen)}")
    mixed = [c for c in found if _dense(c.against) and not _dense(c.arm)]
    if mixed and not any(c.equal_flops for c in mixed):
        sentences.append("No sparse model was compared with a dense one of equal FLOPs yet.")
    sentences += _ranking(results)
    splits = " and ".join(dict.fromkeys(SPLIT_NAMES[c.split] for c in found))
    sentences.append(
        f"In brackets: mean differences in {splits} loss, nats a token, negative where the first "
        "arm is better; findings by paired t tests after Holm's correction."
    )
    if results.missing:
        sentences.append(
            f"This is preliminary: {len(results.missing)} of {len(results.plan or [])} planned "
            "runs are not there yet."
        )
    return sentences


def _kinds(found: Sequence[Comparison]) -> list[tuple[str, list[Comparison]]]:
    """The comparisons by what they can show: equal FLOPs with a dense model come first."""
    trained = [c for c in found if c.arm.stage == "pretrain"]
    mixed = [c for c in trained if _dense(c.against) and not _dense(c.arm)]
    dense = [c for c in trained if _dense(c.arm)]
    sparse = [c for c in trained if not _dense(c.arm) and not _dense(c.against)]
    other = [c for c in mixed if not c.equal_flops]
    ratios = sorted(c.flops_ratio for c in other if c.flops_ratio is not None)
    span = "" if not ratios else f" ({_span(ratios[0], ratios[-1])} times theirs)"
    return [
        (
            "Sparse against dense at equal FLOPs of the whole model",
            [c for c in mixed if c.equal_flops],
        ),
        (f"Sparse against dense at other FLOPs of the whole model{span}", other),
        ("Among sparse models", sparse),
        ("Dense models", dense),
        ("After fine-tuning", [c for c in found if c.arm.stage == "finetune"]),
    ]


def _span(low: float, high: float) -> str:
    return f"{low:.2f}" if f"{low:.2f}" == f"{high:.2f}" else f"{low:.2f} to {high:.2f}"


def _dense(arm: Arm) -> bool:
    return transformation(arm.source)[1] == 0


def _counts(found: Sequence[Comparison]) -> str:
    """Who has a lower, a higher, no different loss, with the mean differences in nats."""
    clauses = []
    for verdict, verb in (
        ("better", "has a lower loss than"),
        ("worse", "has a higher loss than"),
        ("undecided", "is not told apart from"),
        ("untested", "is not tested against"),
    ):
        rivals: dict[str, list[str]] = {}
        for comparison in found:
            if comparison.verdict == verdict:
                name = f"“{comparison.arm.title}” ({comparison.pairs.mean:+.4f})"
                rivals.setdefault(comparison.against.title, []).append(name)
        clauses += [
            f"{_list(names)} {verb if len(names) == 1 else _PLURAL[verb]} “{rival}”"
            for rival, names in rivals.items()
        ]
    return "; ".join(clauses) + "."


_PLURAL = {
    "has a lower loss than": "have lower losses than",
    "has a higher loss than": "have higher losses than",
    "is not told apart from": "are not told apart from",
    "is not tested against": "are not tested against",
}


def _list(names: Sequence[str]) -> str:
    return names[0] if len(names) == 1 else ", ".join(names[:-1]) + " and " + names[-1]


def _ranking(results: Results) -> list[str]:
    """The arm of lowest mean loss, said to be no more than that."""
    main = [arm for arm in arms(results, "pretrain") if arm.group == MAIN]
    split = next((s for s in SPLITS if main and all(arm.losses(s) for arm in main)), None)
    if split is None or len(main) < 2:
        return []
    means = {arm.title: summary for arm in main if (summary := arm.loss(split)) is not None}
    best = min(means, key=lambda title: means[title].mean)
    return [
        f"“{best}” has the lowest mean {SPLIT_NAMES[split]} loss of the {len(main)} pretraining "
        f"arms ({means[best].mean:.4f}, {means[best].n} seed{'' if means[best].n == 1 else 's'}); "
        "a rank among means is no test."
    ]


def sentence(c: Comparison) -> str:
    """One comparison in full."""
    pairs = c.pairs
    direction = "lower" if pairs.mean < 0 else "higher"
    size = f"{abs(pairs.mean):.4f} nats"
    if pairs.low is not None and pairs.high is not None:
        low, high = sorted((abs(pairs.low), abs(pairs.high)))
        same_sign = pairs.low * pairs.high > 0
        size += (
            f" (95 % interval {low:.4f} to {high:.4f}, "
            if same_sign
            else f" (95 % interval of the difference {pairs.low:+.4f} to {pairs.high:+.4f}, "
        )
        p = c.p_adjusted
        exact = "< 0.0001" if p is not None and p < 1e-4 else f"= {p or 0:.4f}"
        adjusted = "not tested" if p is None else f"adjusted p {exact}"
        size += f"{pairs.n} pairs, {adjusted})"
    else:
        size += f" (one pair, seed {pairs.seeds[0]}: no interval, no test)"
    what = (
        f"{c.arm.title}: {SPLIT_NAMES[c.split]} loss {direction} than {c.against.title} by {size}"
    )
    what += _budget(c)
    if c.verdict == "undecided":
        what += f"; not significant at {ALPHA}"
    return what + "."


def _budget(c: Comparison) -> str:
    """At what FLOPs and tokens, against the other arm."""
    parts = []
    if c.flops_ratio is not None:
        parts.append("equal FLOPs" if c.equal_flops else f"{c.flops_ratio:.2f} times its FLOPs")
    if c.tokens_ratio is not None:
        same = abs(c.tokens_ratio - 1) <= 1e-3
        parts.append("equal tokens" if same else f"{c.tokens_ratio:.2f} times its tokens")
    return f", at {' and '.join(parts)}" if parts else ""
