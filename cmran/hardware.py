"""What the machine can do: which device, which precision. Nothing is replaced silently."""

import ctypes
import logging
import mmap
from functools import cache
from pathlib import Path

import torch

from cmran.config import Device, Precision
from cmran.errors import UserError

HEAP_BYTES = 4 << 30
"""More than training and prediction have in use at once: addresses, memory is taken as it is used."""

log = logging.getLogger(__name__)


def pick_device(device: Device) -> torch.device:
    """The torch device for a choice; "auto" takes a GPU where one works, and says which it took.

    Raises UserError for "cuda" where no CUDA device works.
    """
    works = torch.cuda.is_available()
    if device == "cuda" and not works:
        built = "" if torch.version.cuda else " (this torch is built without CUDA)"
        raise UserError(f"device cuda was asked for, but no CUDA device works here{built}: use --device cpu or auto")
    if device == "auto":
        chosen = "cuda" if works else "cpu"
        log.info(
            "device auto: %s", f"cuda, {torch.cuda.get_device_name()}" if works else "cpu, no CUDA device works here"
        )
        return torch.device(chosen)
    return torch.device(device)


def pick_precision(precision: Precision, device: torch.device) -> Precision:
    """The precision for a choice; "auto" takes bfloat16 where the device has it in hardware, and says what it took.

    Raises UserError for bfloat16 where the device computes it only by emulation.
    """
    require_precision(precision, device)
    if precision != "auto":
        return precision
    found = has_bfloat16(device)
    log.info("precision auto: %s", f"bfloat16, this {device.type} has it in hardware" if found else "float32")
    return "bfloat16" if found else "float32"


def require_precision(precision: Precision, device: torch.device) -> None:
    """Raises UserError for bfloat16 where the device computes it only by emulation."""
    if precision == "bfloat16" and not has_bfloat16(device):
        raise UserError(f"precision bfloat16 was asked for, but this {device.type} has it not in hardware: use float32")


def has_bfloat16(device: torch.device) -> bool:
    """Whether matrix products in bfloat16 run in hardware on the device."""
    if device.type == "cuda":
        return bool(torch.cuda.is_bf16_supported(including_emulation=False))
    try:
        flags = Path("/proc/cpuinfo").read_text()
    except OSError:
        return False
    return any(f" {flag}" in flags for flag in ("avx512_bf16", "amx_bf16", "bf16"))


def available_memory(root: Path = Path("/")) -> int:
    """Bytes that this process may still take: of the machine, and of the control groups (container, job) it is in.

    0 where the system does not tell. `root`: where /proc and /sys are.
    """
    rooms = [_numbers(root / "proc/meminfo").get("MemAvailable:", 0) << 10]
    for line in _lines(root / "proc/self/cgroup"):
        _, controllers, path = line.split(":", 2)
        # Version 2 has one tree, without a name here; version 1 one for each controller.
        if controllers == "":
            tree, limits, use, prefix = "", ["memory.max", "memory.high"], "memory.current", ""
        elif "memory" in controllers.split(","):
            tree, limits, use, prefix = controllers, ["memory.limit_in_bytes"], "memory.usage_in_bytes", "total_"
        else:
            continue
        # The limits of the groups around it hold, too. In a container the path may lead outside: then the top is ours.
        top = root / "sys/fs/cgroup" / tree
        lowest = top / path.strip("/")
        for group in (lowest, *lowest.parents):
            used, *most = ("".join(_lines(group / name)) for name in (use, *limits))
            if used.isdecimal():
                stat = _numbers(group / "memory.stat")
                # Cached files give way.
                files = sum(stat.get(f"{prefix}{kind}_file", 0) for kind in ("active", "inactive"))
                rooms += [int(limit) - int(used) + files for limit in most if limit.isdecimal()]
            if group == top:
                break
    return max(0, min(rooms))


def _lines(path: Path) -> list[str]:
    try:
        return path.read_text().splitlines()
    except OSError:
        return []


def _numbers(path: Path) -> dict[str, int]:
    """Of lines like `name 12` or `name 12 kB`."""
    return {words[0]: int(words[1]) for line in _lines(path) if len(words := line.split()) > 1 and words[1].isdecimal()}


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
