"""glibc's malloc, told to keep what is freed: a step frees and takes the same megabytes again and again.

By default it gives large pieces back to the kernel, which clears every page of them before the next use: a tenth of a
host's time. See `mallopt(3)`. Other C libraries are left as they are.
"""

from __future__ import annotations

import ctypes
import platform

M_TRIM_THRESHOLD, M_MMAP_THRESHOLD = -1, -3  # glibc's <malloc.h>
KEPT_BYTES = 64 << 20
"""So much free memory at the heap's end stays."""
MAPPED_BYTES = 32 << 20
"""From this size on a piece is mapped for itself; glibc allows no more."""


def keep_freed_memory() -> bool:
    """For this process, from now on; whether it could be set."""
    if platform.libc_ver()[0] != "glibc":
        return False
    mallopt = ctypes.CDLL(None).mallopt
    return bool(mallopt(M_TRIM_THRESHOLD, KEPT_BYTES)) and bool(mallopt(M_MMAP_THRESHOLD, MAPPED_BYTES))
