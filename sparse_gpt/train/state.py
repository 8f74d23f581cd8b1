"""What a checkpoint keeps besides tensors."""

from dataclasses import asdict, dataclass, field, fields
from pathlib import Path
from typing import Any

from sparse_gpt.errors import UserError
from sparse_gpt.train.spikes import WINDOW

LATER = {
    "recent_losses",
    "rollbacks",
    "bad_steps",
}  # what checkpoints of an earlier version do not have


def _is_count(value: Any) -> bool:
    return type(value) is int and 0 <= value < 2**200


def _is_loss(value: Any) -> bool:
    return isinstance(value, float)


_FITS = {
    "best_loss": lambda value: value is None or _is_loss(value),
    "finished": lambda value: isinstance(value, bool),
    "recent_losses": lambda value: isinstance(value, list) and all(map(_is_loss, value)),
}


@dataclass
class TrainState:
    """The position of a run, and what it counts."""

    step: int = 0  # optimizer steps attempted; the position of every schedule
    samples: int = 0  # sequences consumed; the position in the data
    tokens: int = 0
    flops_spent: int = 0
    skipped_steps: int = 0  # non-finite
    bad_steps: int = 0  # of them, in a row up to now
    best_loss: float | None = None
    bad_validations: int = 0  # in a row, without a new best
    finished: bool = False  # stopped early for good
    recent_losses: list[float] = field(default_factory=list)  # finite ones, the newest last
    rollbacks: int = 0

    def remember(self, loss: float) -> None:
        """Keep a finite loss for the rule of spikes."""
        self.recent_losses = [*self.recent_losses, loss][-WINDOW:]

    def restore(self, saved: dict[str, Any], path: Path) -> None:
        """Become the state of the checkpoint at `path`."""
        known = asdict(TrainState())
        if not known.keys() - LATER <= saved.keys() <= known.keys():
            raise UserError(f"broken checkpoint {path}: its state holds {sorted(saved)}")
        for each in fields(self):
            value = saved.get(each.name, known[each.name])
            if not _FITS.get(each.name, _is_count)(value):
                raise UserError(
                    f"broken checkpoint {path}: its state: {each.name} is {value!r:.60}"
                )
            setattr(self, each.name, value)

    def roll_back(self, saved: "TrainState") -> None:
        """Become a saved state but for what was consumed and spent since, which stays so."""
        for name in ("step", "best_loss", "bad_validations", "recent_losses"):
            setattr(self, name, getattr(saved, name))
        self.bad_steps = 0
        self.rollbacks += 1
