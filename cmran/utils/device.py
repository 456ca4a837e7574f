"""Devices, precisions, CPUs and memory of this machine.

torch is imported inside the functions, because `set_passive_openmp_waiting` must run before torch is loaded.
"""

import logging
import math
import os
from collections.abc import Iterator
from functools import cache
from pathlib import Path
from typing import TYPE_CHECKING

from cmran.config import Device, Precision
from cmran.errors import DeviceError
from cmran.utils.files import log_once

if TYPE_CHECKING:
    import torch


PASSIVE_WAITING = {"OMP_WAIT_POLICY": "passive", "GOMP_SPINCOUNT": "2000"}
"""The variables that `set_passive_openmp_waiting` sets: spin for some 20 to 50 microseconds, then sleep.

Sleeping at once costs a training that runs alone a quarter of its speed; see benchmarks/waiting.py.
"""


def pick_device(device: Device) -> "torch.device":
    """The torch device for a setting; "auto" selects a GPU if one works, and logs the selection once per process.

    Raises:
        DeviceError: `device` is "cuda", but no CUDA device works.
    """
    import torch

    works = torch.cuda.is_available()
    if device == "cuda" and not works:
        built = "" if torch.version.cuda else " (this torch is built without CUDA)"
        raise DeviceError(
            f"device cuda was requested, but no CUDA device works on this machine{built}", "set `device` to cpu or auto"
        )
    if device == "auto":
        selected = f"cuda, {torch.cuda.get_device_name()}" if works else "cpu, no CUDA device works on this machine"
        log_once(logging.INFO, f"device auto: {selected}")
        return torch.device("cuda" if works else "cpu")
    return torch.device(device)


def pick_precision(precision: Precision, device: "torch.device") -> Precision:
    """The precision for a setting; "auto" selects bfloat16 if the device supports it in hardware, else float32.

    The selection is logged once per process.

    Raises:
        DeviceError: `precision` is "bfloat16", but the device only emulates it.
    """
    require_precision(precision, device)
    if precision != "auto":
        return precision
    found = has_bfloat16(device)
    reason = f"bfloat16, which this {device.type} supports in hardware" if found else "float32"
    log_once(logging.INFO, f"precision auto: {reason}")
    return "bfloat16" if found else "float32"


def require_precision(precision: Precision, device: "torch.device") -> None:
    """Check that the device supports the precision.

    Raises:
        DeviceError: `precision` is "bfloat16", but the device only emulates it.
    """
    if precision == "bfloat16" and not has_bfloat16(device):
        raise DeviceError(
            f"precision bfloat16 was requested, but this {device.type} has no hardware support for it", "use float32"
        )


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
    """Bytes of memory that this process can still allocate, within the limits of its control groups (container, job).

    Args:
        root: The folder that contains /proc and /sys.

    Returns:
        The number of bytes; 0 if the system does not report it.
    """
    available = [_numbers(root / "proc/meminfo").get("MemAvailable:", 0) << 10]
    for version, group in _control_groups(root, "memory"):
        if version == 2:
            limits, use, prefix = ["memory.max", "memory.high"], "memory.current", ""
        else:
            limits, use, prefix = ["memory.limit_in_bytes"], "memory.usage_in_bytes", "total_"
        used, *most = ("".join(_lines(group / name)) for name in (use, *limits))
        if used.isdecimal():
            stat = _numbers(group / "memory.stat")
            # The system evicts cached files when memory is needed.
            files = sum(stat.get(f"{prefix}{kind}_file", 0) for kind in ("active", "inactive"))
            available += [int(limit) - int(used) + files for limit in most if limit.isdecimal()]
    return max(0, min(available))


def usable_cpus(root: Path = Path("/")) -> int:
    """The number of CPUs that this process can use: the smaller of its affinity mask and its control groups' CPU quota.

    A quota (container, job) of 1.5 CPUs counts as 2. A quota that lowers the number is logged once.

    Args:
        root: The folder that contains /proc and /sys.

    Returns:
        The number of CPUs, at least 1.
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
        log_once(
            logging.INFO,
            f"a control group limits CPU time to {granted:.3g} of the {allowed} CPUs: {cpus} threads by default",
        )
    return cpus


def _control_groups(root: Path, controller: str) -> Iterator[tuple[int, Path]]:
    """The version and folder of each control group that can limit `controller` for this process, innermost first."""
    for line in _lines(root / "proc/self/cgroup"):
        _, controllers, path = line.split(":", 2)
        # Version 2 has one tree, whose name is empty. Version 1 has a tree for each controller or list of controllers,
        # whose folder has the name of the list or of one controller. If both are mounted, version 2 is in "unified".
        if controllers == "":
            version, trees = 2, ["", "unified"]
        elif controller in controllers.split(","):
            version, trees = 1, [controllers] if (root / "sys/fs/cgroup" / controllers).is_dir() else [controller]
        else:
            continue
        # The limits of the parent groups apply, too. In a container the path may be that of the host, which does not
        # exist here; the top folder is then the container's own group.
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
    """Numbers by name, from lines such as `name 12` or `name 12 kB`."""
    return {words[0]: int(words[1]) for line in _lines(path) if len(words := line.split()) > 1 and words[1].isdecimal()}


def set_passive_openmp_waiting() -> None:
    """Make waiting OpenMP threads sleep after a short spin, unless OMP_WAIT_POLICY or GOMP_SPINCOUNT is set.

    By default the threads of torch (libgomp) spin while they wait for each other and so take CPU time from other
    processes: two trainings at once are then slower than one after the other. libgomp reads these environment variables
    when it is loaded, so call this function before torch is imported. The `cmran` command, the flows, the benchmarks
    and the tests call it; a program that uses `cmran` as a library decides for itself.
    """
    if not any(os.environ.get(name) for name in ("OMP_WAIT_POLICY", "GOMP_SPINCOUNT")):
        os.environ.update(PASSIVE_WAITING)


@cache
def limit_threads() -> None:
    """Limit the threads of torch to `usable_cpus`, because torch itself ignores a CPU quota.

    It acts once per process and never raises the number of threads. OMP_NUM_THREADS and MKL_NUM_THREADS take
    precedence. So does a later call of `torch.set_num_threads`, and an earlier one that set fewer threads than the
    limit or more than there are CPUs (any other number cannot be distinguished from torch's default).
    """
    import torch

    if any(os.environ.get(name) for name in ("OMP_NUM_THREADS", "MKL_NUM_THREADS")):
        return
    cpus = usable_cpus()
    if cpus < torch.get_num_threads() <= len(os.sched_getaffinity(0)):
        torch.set_num_threads(cpus)
