"""Pickles that make a folder when they are read, in every dress they come in."""

import io
import os
import pickle
import zipfile
from pathlib import Path
from typing import Any

import numpy as np
import torch


class Evil:
    """An object whose pickle calls `os.mkdir` on `marker`."""

    def __init__(self, marker: Path) -> None:
        self.marker = str(marker)

    def __reduce__(self) -> tuple[Any, ...]:
        return os.mkdir, (self.marker,)


def plain(marker: Path) -> bytes:
    """As `pickle.dump` writes it."""
    return pickle.dumps(Evil(marker))


def torch_zip(marker: Path) -> bytes:
    """As `torch.save` writes it: an archive with the pickle in it."""
    file = io.BytesIO()
    torch.save({"wte.weight": torch.zeros(2), "evil": Evil(marker)}, file)
    return file.getvalue()


def torch_old(marker: Path) -> bytes:
    """As `torch.save` wrote it before version 1.6."""
    file = io.BytesIO()
    torch.save([Evil(marker)], file, _use_new_zipfile_serialization=False)
    return file.getvalue()


def npy(marker: Path) -> bytes:
    """An array of objects."""
    file = io.BytesIO()
    np.save(file, np.array([Evil(marker)], dtype=object), allow_pickle=True)
    return file.getvalue()


def npz(marker: Path, *names: str) -> bytes:
    """An archive of arrays of objects."""
    file = io.BytesIO()
    with zipfile.ZipFile(file, "w") as archive:
        for name in names or ("arr_0",):
            archive.writestr(f"{name}.npy", npy(marker))
    return file.getvalue()


DRESSES = {"plain": plain, "torch zip": torch_zip, "old torch": torch_old, "npy": npy, "npz": npz}
