"""What the machine can do: devices, precisions, CPUs, memory. Nothing is replaced silently.

torch is imported where it is used: `openmp_waits_passively` must run before it is loaded.
"""

import ctypes
import logging
import math
import mmap
import os
from collections.abc import Iterator
from functools import cache
from pathlib import Path
from typing import TYPE_CHECKING

from cmran.config import Device, Precision
from cmran.errors import UserError

if TYPE_CHECKING:
    import torch

HEAP_BYTES = 4 << 30
"""More than training and prediction have in use at once: addresses, memory is taken as it is used."""

PASSIVE_WAITING = {"OMP_WAIT_POLICY": "passive", "GOMP_SPINCOUNT": "2000"}
"""The variables that `openmp_waits_passively` sets: spin for some 20 to 50 microseconds, then sleep.

Sleeping at once costs a training that runs alone a quarter of its speed; see benchmarks/waiting.py.
"""

log = logging.getLogger(__name__)


def pick_device(device: Device) -> "torch.device":
    """The torch device for a choice; "auto" takes a GPU where one works, and says which it took.

    Raises UserError for "cuda" where no CUDA device works.
    """
    import torch

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


def pick_precision(precision: Precision, device: "torch.device") -> Precision:
    """The precision for a choice; "auto" takes bfloat16 where the device has it in hardware, and says what it took.

    Raises UserError for bfloat16 where the device computes it only by emulation.
    """
    require_precision(precision, device)
    if precision != "auto":
        return precision
    found = has_bfloat16(device)
    log.info("precision auto: %s", f"bfloat16, this {device.type} has it in hardware" if found else "float32")
    return "bfloat16" if found else "float32"


def require_precision(precision: Precision, device: "torch.device") -> None:
    """Raises UserError for bfloat16 where the device computes it only by emulation."""
    if precision == "bfloat16" and not has_bfloat16(device):
        raise UserError(f"precision bfloat16 was asked for, but this {device.type} has it not in hardware: use float32")


def has_bfloat16(device: "torch.device") -> bool:
    """Whether matrix products in bfloat16 run in hardware on the device."""
    if device.type == "cuda":
        import torch

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
    for version, group in _control_groups(root, "memory"):
        if version == 2:
            limits, use, prefix = ["memory.max", "memory.high"], "memory.current", ""
        else:
            limits, use, prefix = ["memory.limit_in_bytes"], "memory.usage_in_bytes", "total_"
        used, *most = ("".join(_lines(group / name)) for name in (use, *limits))
        if used.isdecimal():
            stat = _numbers(group / "memory.stat")
            # Cached files give way.
            files = sum(stat.get(f"{prefix}{kind}_file", 0) for kind in ("active", "inactive"))
            rooms += [int(limit) - int(used) + files for limit in most if limit.isdecimal()]
    return max(0, min(rooms))


def usable_cpus(root: Path = Path("/")) -> int:
    """The number of CPUs that this process may use: those it may run on, or the CPU time that its control groups grant.

    A quota (container, job) of 1.5 CPUs counts as 2. At least 1. A quota that lowers the number is logged once.
    `root`: where /proc and /sys are.
    """
    allowed = len(os.sched_getaffinity(0))
    granted = float(allowed)
    for version, group in _control_groups(root, "cpu"):
        if version == 2:
            quota, _, period = "".join(_lines(group / "cpu.max")).partition(" ")
        else:
            quota, period = ("".join(_lines(group / f"cpu.cfs_{name}_us")) for name in ("quota", "period"))
        # "max" and -1 mean no limit.
        if quota.isdecimal() and period.strip().isdecimal() and int(period):
            granted = min(granted, int(quota) / int(period))
    cpus = max(1, math.ceil(granted))
    if cpus < allowed:
        _log_quota(granted, allowed, cpus)
    return cpus


@cache
def _log_quota(granted: float, allowed: int, cpus: int) -> None:
    log.info("a control group grants the time of %.3g of the %d CPUs: %d threads by default", granted, allowed, cpus)


def _control_groups(root: Path, controller: str) -> Iterator[tuple[int, Path]]:
    """The folders of this process's control groups that may limit `controller`, innermost first, with their version."""
    for line in _lines(root / "proc/self/cgroup"):
        _, controllers, path = line.split(":", 2)
        # Version 2 has one tree, without a name here; version 1 one for each controller, or for several at once, whose
        # folder may be called after one of them. Beside version 1, version 2 lies in a folder of its own.
        if controllers == "":
            version, trees = 2, ["", "unified"]
        elif controller in controllers.split(","):
            version, trees = 1, [controllers] if (root / "sys/fs/cgroup" / controllers).is_dir() else [controller]
        else:
            continue
        # The limits of the groups around it hold, too. In a container the path may lead outside: then the top is ours.
        for tree in trees:
            top = root / "sys/fs/cgroup" / tree
            lowest = top / path.strip("/")
            for group in (lowest, *lowest.parents):
                yield version, group
                if group == top:
                    break


def _lines(path: Path) -> list[str]:
    try:
        return path.read_text().splitlines()
    except OSError:
        return []


def _numbers(path: Path) -> dict[str, int]:
    """Of lines like `name 12` or `name 12 kB`."""
    return {words[0]: int(words[1]) for line in _lines(path) if len(words := line.split()) > 1 and words[1].isdecimal()}


def openmp_waits_passively() -> None:
    """Have the threads of OpenMP sleep after a short spin while they wait, unless the user has a setting of their own.

    Left alone, the threads of torch (libgomp) spin while they wait for each other, and so take the CPUs from every
    other process that computes: two trainings at once are then slower than one after the other. libgomp reads the
    environment (OMP_WAIT_POLICY, GOMP_SPINCOUNT) when it is loaded: call this before torch is imported. The `cmran`
    command, the flows, the benchmarks and the tests do; a program that uses `cmran` as a library decides for itself.
    """
    if not any(os.environ.get(name) for name in ("OMP_WAIT_POLICY", "GOMP_SPINCOUNT")):
        os.environ.update(PASSIVE_WAITING)


@cache
def limit_threads() -> None:
    """Have torch compute with no more threads than `usable_cpus`: on its own it does not see a CPU quota.

    Once a process, and never more threads than before. OMP_NUM_THREADS and MKL_NUM_THREADS win. So does a call of
    `torch.set_num_threads` after this one; one before it wins where it set fewer threads than this would, or more than
    there are CPUs (any other number is torch's own, as far as can be told).
    """
    import torch

    if any(os.environ.get(name) for name in ("OMP_NUM_THREADS", "MKL_NUM_THREADS")):
        return
    cpus = usable_cpus()
    if cpus < torch.get_num_threads() <= len(os.sched_getaffinity(0)):
        torch.set_num_threads(cpus)


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
