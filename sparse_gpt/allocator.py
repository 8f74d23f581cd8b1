"""What the C library does with memory that is freed."""

import ctypes
import os

_TRIM_THRESHOLD, _MMAP_THRESHOLD = -1, -3  # M_TRIM_THRESHOLD and M_MMAP_THRESHOLD of malloc.h
_OWN_SETTINGS = ("GLIBC_TUNABLES", "MALLOC_MMAP_THRESHOLD_", "MALLOC_TRIM_THRESHOLD_")


def keep_freed_memory() -> bool:
    """Let this process keep what it frees, for its next allocation. Whether it does.

    glibc gives blocks of over 32 MB back to the system when they are freed. A step allocates them
    anew, and the system clears each of their pages at its first use: a third of the time of a
    GPT-3 Small's step on two CPU cores, whose logits and activations are such blocks. Memory that
    is kept this way is at most what the process had at its peak.

    Settings in the environment are left alone, and so are C libraries that are not glibc.
    """
    if any(name in os.environ for name in _OWN_SETTINGS):
        return False
    mallopt = getattr(ctypes.CDLL(None), "mallopt", None)
    if mallopt is None:
        return False
    return bool(mallopt(_MMAP_THRESHOLD, 1 << 30) and mallopt(_TRIM_THRESHOLD, 2**31 - 1))
