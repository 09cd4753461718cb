"""The allocator keeps what a step frees, in a process of its own: the setting lasts as long as a process does."""

from __future__ import annotations

import platform
import subprocess
import sys

import pytest

PIECE_BYTES = 16 << 20
PIECES = 20

TAKE_AND_FREE = f"""
import ctypes, resource, sys, threading
from common.allocator import keep_all_memory, keep_freed_memory
if sys.argv[1] == "kept":
    assert keep_freed_memory()
if sys.argv[1] == "all kept":
    assert keep_all_memory()
libc = ctypes.CDLL(None)
libc.malloc.restype, libc.free.argtypes = ctypes.c_void_p, [ctypes.c_void_p]
libc.mallopt(-3, {PIECE_BYTES // 2}) if sys.argv[1] == "given back" else None
n_bytes = int(sys.argv[2])
def take_and_free():
    for _ in range({PIECES}):
        piece = libc.malloc(n_bytes)
        ctypes.memset(piece, 1, n_bytes)
        libc.free(piece)
before = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
if sys.argv[1] == "kept":
    take_and_free()
else:
    thread = threading.Thread(target=take_and_free)
    thread.start()
    thread.join()
print(resource.getrusage(resource.RUSAGE_SELF).ru_minflt - before)
"""


def page_faults(how: str, n_bytes: int = PIECE_BYTES) -> int:
    done = subprocess.run(
        (sys.executable, "-c", TAKE_AND_FREE, how, str(n_bytes)), capture_output=True, text=True, timeout=30, check=True
    )
    return int(done.stdout)


@pytest.mark.skipif(platform.libc_ver()[0] != "glibc", reason="another C library's malloc is left as it is")
def test_memory_that_is_freed_and_taken_again_is_cleared_by_the_kernel_once() -> None:
    assert page_faults("kept") < page_faults("given back") / (PIECES / 4)


@pytest.mark.skipif(platform.libc_ver()[0] != "glibc", reason="another C library's malloc is left as it is")
def test_a_process_that_trains_alone_keeps_large_pieces_of_its_threads_too() -> None:
    large = 3 * PIECE_BYTES  # more than may be kept by `keep_freed_memory`
    assert page_faults("all kept", large) < page_faults("given back", large) / (PIECES / 4)
