"""Points for TensorBoard, read back as TensorBoard reads them."""

import pytest
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

from sparse_gpt.train.board import Board


def points(folder, tag):
    read = EventAccumulator(str(folder))
    read.Reload()
    return {point.step: point.value for point in read.Scalars(tag)}


def test_points_read_back_and_a_later_start_hides_what_it_does_again(tmp_path):
    first = Board(tmp_path / "board", 0)
    for step in range(1, 6):
        first.add({"train/loss": step / 4, "train/lr": 0.5}, step)
    assert points(tmp_path / "board", "train/loss") == {step: step / 4 for step in range(1, 6)}
    first.close()
    second = Board(tmp_path / "board", 3)
    second.add({"train/loss": 9.0}, 4)
    second.close()
    assert points(tmp_path / "board", "train/loss") == {1: 0.25, 2: 0.5, 3: 0.75, 4: 9.0}
    assert points(tmp_path / "board", "train/lr") == {1: 0.5, 2: 0.5, 3: 0.5}


def test_a_full_disk_is_an_error_at_once(tmp_path):
    board = Board(tmp_path / "board", 0)
    board._file.close()
    board._file = open("/dev/full", "wb")  # noqa: SIM115 - closed by the board
    board._records._writer = board._file
    with pytest.raises(OSError, match="No space left"):
        board.add({"train/loss": 1.0}, 1)
    with pytest.raises(OSError, match="No space left"):  # what it still holds
        board.close()
