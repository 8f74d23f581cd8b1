"""Which masks a sparse fine-tuning may keep."""

import pytest

from sparse_gpt.errors import UserError
from sparse_gpt.finetune.source import check_masks
from sparse_gpt.topology.masks import SavedLayer


def layer(active, target):
    return SavedLayer((4, 4), (1, 1), active, target=target)


def test_masks_of_a_finished_method_are_kept():
    check_masks("sparse", "run", [layer(4, None)])
    check_masks("gradual", "run", [layer(3, 4), layer(5, 4)])  # layers may have traded units


def test_masks_of_a_dense_phase_are_refused():
    with pytest.raises(UserError, match=r"run was saved before .* \(20 active blocks, 8 at"):
        check_masks("sparse", "run", [layer(16, 4), layer(4, 4)])


def test_no_masks_are_refused():
    with pytest.raises(
        UserError, match="mode: gradual, but run has no masks to keep; set mode: dense"
    ):
        check_masks("gradual", "run", [])
