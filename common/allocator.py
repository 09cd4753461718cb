"""glibc's malloc, told to keep what is freed, or little of it where memory is scarce.

A step frees and takes the same megabytes again and again.

By default it gives large pieces back to the kernel, which clears every page of them before the next use: a tenth of a
host's time. See `mallopt(3)`. Other C libraries are left as they are.
"""

from __future__ import annotations

import ctypes
import platform

M_TRIM_THRESHOLD, M_MMAP_THRESHOLD, M_MMAP_MAX, M_ARENA_MAX = -1, -3, -4, -8  # glibc's <malloc.h>
KEPT_BYTES = 64 << 20
"""How much free memory stays at the heap's end."""
MAPPED_BYTES = 32 << 20
"""The size from which a piece is mapped on its own; glibc allows no larger one."""


MOST_KEPT_BYTES = 1 << 30
"""How much free memory stays at the heap's end of a process that keeps all of it."""

FEW_ARENAS = 2
"""Each thread that takes memory would else have one, and keep in it what it has freed."""


def keep_freed_memory() -> bool:
    """Have this process keep what it frees from now on; returns whether that could be set."""
    if platform.libc_ver()[0] != "glibc":
        return False
    mallopt = ctypes.CDLL(None).mallopt
    return bool(mallopt(M_TRIM_THRESHOLD, KEPT_BYTES)) and bool(mallopt(M_MMAP_THRESHOLD, MAPPED_BYTES))


def keep_all_memory() -> bool:
    """Have this process give nothing back: for one that trains a model alone, whose every step takes the same again.

    One arena, as those of other threads give back what `keep_freed_memory` would have them keep.
    """
    if platform.libc_ver()[0] != "glibc":
        return False
    mallopt = ctypes.CDLL(None).mallopt
    return all(mallopt(*option) for option in ((M_ARENA_MAX, 1), (M_MMAP_MAX, 0), (M_TRIM_THRESHOLD, MOST_KEPT_BYTES)))


def keep_little_memory() -> bool:
    """Have this process return freed memory early from now on: free memory counts against an owner's limit too."""
    return platform.libc_ver()[0] == "glibc" and bool(ctypes.CDLL(None).mallopt(M_ARENA_MAX, FEW_ARENAS))


def give_back_memory() -> None:
    """Return what is free to the kernel, once."""
    if platform.libc_ver()[0] == "glibc":
        ctypes.CDLL(None).malloc_trim(0)
