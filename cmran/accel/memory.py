"""Keeping freed memory for the next allocation."""

import ctypes
import mmap
from functools import cache

HEAP_BYTES = 4 << 30
"""More than training and prediction have in use at once: addresses, memory is taken as it is used."""


@cache
def reuse_memory() -> None:
    """Let the C library keep freed memory for the next allocation, in large pages, for the rest of the process.

    A training step frees and allocates some 500 MB. Left alone, glibc gives large blocks back to the system at once
    and gets them zeroed, page by page, in the next step: a sixth of a float32 step's time. In pages of 2 MiB where the
    system has them, what is left takes a tenth less. It is for the main thread, where the steps are made; HEAP_BYTES of
    addresses stay reserved for it, which a system without overcommit counts as taken. Does nothing where the C library
    is another.
    """
    libc = ctypes.CDLL(None)
    if not all(hasattr(libc, name) for name in ("mallopt", "gnu_get_libc_version")):
        return
    trim_threshold, mmap_max = -1, -4
    libc.mallopt(trim_threshold, -1)
    libc.mallopt(mmap_max, 0)
    # From now on all blocks lie in the heap: room for the coming ones is added to it, marked, and handed back unused.
    libc.malloc.restype, libc.malloc.argtypes = ctypes.c_void_p, [ctypes.c_size_t]
    libc.free.argtypes, libc.madvise.argtypes = [ctypes.c_void_p], [ctypes.c_void_p, ctypes.c_size_t, ctypes.c_int]
    block = libc.malloc(HEAP_BYTES)
    if block is not None:
        start = -(-block // mmap.PAGESIZE) * mmap.PAGESIZE
        libc.madvise(start, HEAP_BYTES - mmap.PAGESIZE, mmap.MADV_HUGEPAGE)
        libc.free(block)
