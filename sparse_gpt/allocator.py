"""What the C library does with memory that is freed."""

import ctypes
import os

_TRIM_THRESHOLD, _MMAP_MAX = -1, -4  # M_TRIM_THRESHOLD and M_MMAP_MAX of malloc.h
_OWN_SETTINGS = (
    "GLIBC_TUNABLES", "MALLOC_MMAP_MAX_", "MALLOC_MMAP_THRESHOLD_", "MALLOC_TRIM_THRESHOLD_",
)  # fmt: skip


def keep_freed_memory() -> bool:
    """Let this process keep what it frees, for its next allocation. Whether it does.

    glibc gives blocks of over 32 MB back to the system when they are freed. A step allocates them
    anew, and the system clears each of their pages at its first use: a third of the time of a
    GPT-3 Small's step on two CPU cores, whose logits and activations are such blocks. The process
    then stays as large as it was at its peak, or somewhat larger where free blocks lie between
    others.

    Settings in the environment are left alone, and so are C libraries that are not glibc.
    """
    if any(name in os.environ for name in _OWN_SETTINGS):
        return False
    mallopt = getattr(ctypes.CDLL(None), "mallopt", None)
    if mallopt is None:
        return False
    return bool(mallopt(_MMAP_MAX, 0) and mallopt(_TRIM_THRESHOLD, -1))
