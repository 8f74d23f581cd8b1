"""Where the documents of a split start: checked once, then looked up with one small read."""

import numpy as np

from sparse_gpt.data.number_file import NumberFile, Numbers
from sparse_gpt.errors import UserError

CHUNK = 1 << 22
_EVERY = 128
_MAX_DOCUMENTS = 2**31 - 1


class DocumentStarts:
    """uint64 [documents + 1], strictly rising from 0 to n_tokens.

    They may be gigabytes for each rank, so they stay in their file; one of 128 is kept, which says
    where to read. `name` appears in errors.
    """

    def __init__(self, name: str, numbers: Numbers, n_tokens: int):
        self._numbers = numbers
        self._where = numbers.path if isinstance(numbers, NumberFile) else name
        if numbers.dtype != np.uint64 or len(numbers) < 1:
            raise UserError(f"{name}: document boundaries must be a 1-D uint64 array")
        if len(numbers) - 1 > _MAX_DOCUMENTS:
            raise UserError(f"{name}: more than {_MAX_DOCUMENTS} documents are not supported")
        first, last = int(numbers[:1][0]), int(numbers[-1:][0])
        if first != 0 or last != n_tokens:
            raise UserError(
                f"{name}: document boundaries run from {first} to {last}, the tokens from "
                f"0 to {n_tokens}"
            )
        marks = []
        for at in range(0, len(numbers), CHUNK):
            piece = numbers[at : at + CHUNK + 1]
            if not (piece[1:] > piece[:-1]).all():
                raise UserError(f"{name}: document boundaries do not rise")
            marks.append(piece[:CHUNK:_EVERY].copy())
        self._marks = np.concatenate(marks)

    def __len__(self) -> int:
        """Documents."""
        return len(self._numbers) - 1

    def within(self, start: int, n: int) -> tuple[int, np.ndarray]:
        """The number of the document that holds token `start`, and the starts (and the end of the
        last document) in (start, start + n) as int64, counted from `start`. n >= 1."""
        low = int(np.searchsorted(self._marks, np.uint64(start), side="right")) - 1
        high = int(np.searchsorted(self._marks, np.uint64(start + n)))
        piece = self._numbers[low * _EVERY : high * _EVERY]
        if piece[0] != self._marks[low] or not (piece[1:] > piece[:-1]).all():
            raise UserError(
                f"{self._where}: the document boundaries have changed since they were opened; put "
                "the file back, then start again"
            )
        first, last = np.searchsorted(piece, np.array([start, start + n - 1], np.uint64), "right")
        return low * _EVERY + int(first) - 1, piece[first:last].astype(np.int64) - start
