"""Keep freed memory in the process. The portable form is to do nothing: only the speed differs."""

import ctypes
import mmap
from functools import cache

HEAP_BYTES = 4 << 30
"""Address space to reserve: more than training and inference use at once. Memory is allocated only when it is used."""


@cache
def reuse_memory() -> None:
    """Let the C library keep freed memory for later allocations, in huge pages, for the rest of the process.

    A training step frees and allocates about 500 MB. By default glibc returns large blocks to the system at once, and
    the system zeroes them page by page for the next step, which takes a sixth of the time of a float32 step. Huge pages
    of 2 MiB, if the system has them, save another tenth of the step.

    Call it in the main thread, which runs the steps. HEAP_BYTES of address space stay reserved; a system without
    overcommit counts them as used. With another C library than glibc it does nothing.
    """
    libc = ctypes.CDLL(None)
    if not all(hasattr(libc, name) for name in ("mallopt", "gnu_get_libc_version")):
        return
    trim_threshold, mmap_max = -1, -4
    libc.mallopt(trim_threshold, -1)
    libc.mallopt(mmap_max, 0)
    # From now on all blocks are in the heap. Grow it once, advise the kernel to use huge pages there, and free it.
    libc.malloc.restype, libc.malloc.argtypes = ctypes.c_void_p, [ctypes.c_size_t]
    libc.free.argtypes, libc.madvise.argtypes = [ctypes.c_void_p], [ctypes.c_void_p, ctypes.c_size_t, ctypes.c_int]
    block = libc.malloc(HEAP_BYTES)
    if block is not None:
        start = -(-block // mmap.PAGESIZE) * mmap.PAGESIZE
        libc.madvise(start, HEAP_BYTES - mmap.PAGESIZE, mmap.MADV_HUGEPAGE)
        libc.free(block)
