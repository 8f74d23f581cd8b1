"""Which documents are held out for validation and test: by a hash of (seed, document number)."""

import heapq
from collections.abc import Iterable
from dataclasses import dataclass

from sparse_gpt.data.order import derive_key, mix64
from sparse_gpt.errors import UserError

_SPACE = 1 << 64


@dataclass(frozen=True)
class HoldoutRule:
    """What the user asked for. Numbers of documents, where given, replace the fractions."""

    seed: int = 0
    val_fraction: float = 0.01
    val_documents: int | None = None
    test_fraction: float = 0.0
    test_documents: int | None = None

    def __post_init__(self) -> None:
        for flag, value in (
            ("--val-fraction", self.val_fraction),
            ("--test-fraction", self.test_fraction),
        ):
            if not 0 <= value < 1:
                raise UserError(f"{flag} is {value}, it must be at least 0 and less than 1")
        for flag, documents in (
            ("--val-documents", self.val_documents),
            ("--test-documents", self.test_documents),
        ):
            if documents is not None and documents < 1:
                raise UserError(f"{flag} is {documents}, it must be at least 1")
        if self.val_fraction + self.test_fraction >= 1:
            raise UserError("--val-fraction and --test-fraction leave nothing for training")

    @property
    def wants_val(self) -> bool:
        """Whether any document goes to validation."""
        return self.val_documents is not None or self.val_fraction > 0

    @property
    def wants_test(self) -> bool:
        """Whether any document goes to testing."""
        return self.test_documents is not None or self.test_fraction > 0


@dataclass(frozen=True)
class Holdout:
    """The rule resolved for a corpus: documents whose hash is below a bound are held out."""

    key: int
    val_bound: int = 0
    test_bound: int = 0

    def split_of(self, document: int) -> str:
        """The split of document number `document`, counted from 0 in the order of the source."""
        place = mix64(self.key ^ document)
        if place < self.val_bound:
            return "val"
        return "test" if place < self.test_bound else "train"


def resolve_holdout(rule: HoldoutRule, n_documents: int) -> Holdout:
    """Bounds that hold out exactly the numbers of documents, or about the fractions but at least
    one document for each split asked for and one for training.

    Raises UserError where there are too few documents. Memory does not grow with the corpus.
    """
    key = derive_key("holdout", rule.seed)
    if not (rule.wants_val or rule.wants_test):
        return Holdout(key)
    needed = (rule.val_documents or int(rule.val_fraction > 0)) + 1
    needed += rule.test_documents or int(rule.test_fraction > 0)
    if n_documents < needed:
        raise UserError(
            f"the corpus has {n_documents} document(s), but holding out by document needs at least "
            f"{needed}; give more documents (one file or row each), or set --val-fraction 0 to "
            "hold out nothing"
        )

    def places() -> Iterable[int]:
        return (mix64(key ^ document) for document in range(n_documents))

    val_bound = 0
    if rule.val_documents is not None:
        val_bound = max(heapq.nsmallest(rule.val_documents, places())) + 1
    elif rule.val_fraction > 0:
        val_bound = max(round(rule.val_fraction * _SPACE), min(places()) + 1)
    test_bound = val_bound
    if rule.test_documents is not None:
        rest = (place for place in places() if place >= val_bound)
        test_bound = max(heapq.nsmallest(rule.test_documents, rest), default=val_bound) + 1
    elif rule.wants_test:
        test_bound = val_bound + round(rule.test_fraction * _SPACE)
        rest = min((place for place in places() if place >= val_bound), default=None)
        test_bound = max(test_bound, (rest if rest is not None else 0) + 1)
    held_out = Holdout(key, val_bound, test_bound)
    if all(place < test_bound for place in places()):
        raise UserError(
            f"--val-fraction and --test-fraction hold out all {n_documents} documents; lower them"
        )
    return held_out
