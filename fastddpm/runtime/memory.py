"""Has the C library keep memory that the process frees, for the next training step."""

import ctypes
import os
import platform

_TRIM_THRESHOLD, _MMAP_MAX = -1, -4  # parameters of mallopt, in malloc.h
_CHOSEN_BY = (
    "MALLOC_TRIM_THRESHOLD_",
    "MALLOC_TOP_PAD_",
    "MALLOC_MMAP_THRESHOLD_",
    "MALLOC_MMAP_MAX_",
    "GLIBC_TUNABLES",
)


def keep_freed_memory() -> bool:
    """Keep freed memory from now on, in all of the process; return whether that was possible.

    glibc gives a freed tensor of more than 32 MB back to the system, and large stretches of smaller ones. The system
    fills every page with zeros when it is used again, at each step of training anew. Keeping it takes up to a third
    more memory where every step has the same sizes; where sizes grow it can take several times as much. Nothing is
    changed with another C library, or where one of the environment variables of malloc(3) is set, such as
    GLIBC_TUNABLES=glibc.malloc.tcache_count=7, which changes nothing either.
    """
    if platform.libc_ver()[0] != "glibc" or any(name in os.environ for name in _CHOSEN_BY):
        return False
    mallopt = ctypes.CDLL(None).mallopt
    return bool(mallopt(_MMAP_MAX, 0) and mallopt(_TRIM_THRESHOLD, -1))  # -1: never trim
