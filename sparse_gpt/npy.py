"""The header of a .npy file as numpy writes it for plain numbers; nothing of it is evaluated.

`numpy.load` reads headers as Python literals and believes the shape that it finds. Here the caller
says what must be in the file, and nothing is allocated before that is known to be so.
"""

import re
from typing import BinaryIO, NamedTuple

_START = b"\x93NUMPY\x01\x00"
_HEADER = re.compile(
    r"\{'descr': '([<>|][a-zA-Z]\d{1,4})', 'fortran_order': False, "
    r"'shape': \(((?:\d{1,18}, ?)*(?:\d{1,18})?)\), \} *\n"
)


class Header(NamedTuple):
    """`descr`: the type as numpy writes it, `<u8`; `offset`: where the numbers begin."""

    descr: str
    shape: tuple[int, ...]
    offset: int


def read_header(file: BinaryIO) -> Header:
    """The header at the start of a file; `ValueError` where there is none of plain numbers."""
    start = file.read(len(_START) + 2)
    length = int.from_bytes(start[len(_START) :], "little")
    text = file.read(length)
    if not start.startswith(_START) or len(text) != length:
        raise ValueError("it is no .npy file of version 1.0")
    match = _HEADER.fullmatch(text.decode("latin-1"))
    if match is None:
        raise ValueError("its header is not that of plain numbers")
    shape = tuple(int(size) for size in match[2].replace(" ", "").split(",") if size)
    return Header(match[1], shape, len(start) + length)
