"""What runs after a pretraining have from it."""

from dataclasses import dataclass
from typing import Any

from sparse_gpt.experiment.identity import config_tree, tree_sha256
from sparse_gpt.experiment.plan import Run


@dataclass(frozen=True)
class FollowUp:
    """A run that starts from the weights that the run `after` ended with."""

    after: Run

    @property
    def after_sha256(self) -> str:
        """Of the configuration of the run whose weights it starts from."""
        return tree_sha256(config_tree(self.after.config))

    @property
    def experiment(self) -> str:
        return self.after.experiment

    @property
    def arm(self) -> str:
        return self.after.arm

    @property
    def label(self) -> str:
        return self.after.label

    @property
    def group(self) -> str:
        return self.after.group

    @property
    def seed(self) -> int:
        return self.after.seed

    @property
    def settings(self) -> dict[str, Any]:
        return self.after.settings
