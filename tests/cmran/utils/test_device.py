"""Memory and CPUs that are available to this process, on the machine and in its control groups."""

import logging
import os
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

from cmran.utils.device import available_memory, usable_cpus
from cmran.utils.files import log_once
from tests.conftest import ROOT
from tests.helpers import make_folder

MIB = 1 << 20


def write(root: Path, files: dict[str, str]) -> Path:
    for name, text in files.items():
        path = root / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(text)
    return root


def group(folder: str, limit: str, used: int, files: int, version: int) -> dict[str, str]:
    names = ("memory.max", "memory.current") if version == 2 else ("memory.limit_in_bytes", "memory.usage_in_bytes")
    # Version 1 has separate names for totals that include child groups; the plain names count this group alone.
    prefix = "" if version == 2 else "total_"
    cached = f"{prefix}active_file {files // 4}\n{prefix}inactive_file {files - files // 4}\n"
    stat = f"anon 5\nactive_file 1\ninactive_file 1\n{cached}"
    return {
        f"{folder}/{names[0]}": f"{limit}\n",
        f"{folder}/{names[1]}": f"{used}\n",
        f"{folder}/memory.stat": stat,
    }


MACHINE = {"proc/meminfo": "MemTotal: 9000 kB\nMemFree: 10 kB\nMemAvailable:    8192 kB\n"}


@pytest.mark.parametrize(
    ("cgroup", "groups", "expected"),
    [
        # No groups at all, and groups that do not exist.
        ({}, {}, 8 * MIB),
        ({"proc/self/cgroup": "0::/a/b\n"}, {}, 8 * MIB),
        # Version 2: cached files can be evicted, so limit - used + files is available.
        ({"proc/self/cgroup": "0::/a/b\n"}, group("sys/fs/cgroup/a/b", str(6 * MIB), 5 * MIB, 4 * MIB, 2), 5 * MIB),
        # A limit of the parent group only.
        (
            {"proc/self/cgroup": "0::/a/b\n"},
            group("sys/fs/cgroup/a/b", "max", MIB, 0, 2) | group("sys/fs/cgroup/a", str(3 * MIB), MIB, 0, 2),
            2 * MIB,
        ),
        # Above memory.high the group is slowed down.
        (
            {"proc/self/cgroup": "0::/a\n"},
            group("sys/fs/cgroup/a", "max", MIB, 0, 2) | {"sys/fs/cgroup/a/memory.high": f"{4 * MIB}\n"},
            3 * MIB,
        ),
        # In a container the path may be that of the host: the limit is in the top folder.
        ({"proc/self/cgroup": "0::/host/x\n"}, group("sys/fs/cgroup", str(3 * MIB), 2 * MIB, 0, 2), MIB),
        # Version 1, beside an empty version 2, and "no limit" as a huge number.
        (
            {"proc/self/cgroup": "3:cpu:/a\n2:memory:/a\n0::/\n"},
            group("sys/fs/cgroup/memory/a", str(2 * MIB), MIB, 0, 1)
            | group("sys/fs/cgroup/memory", str(2**63 - 4096), MIB, 0, 1)
            | group("sys/fs/cgroup/cpu/a", "1", 0, 0, 1),
            MIB,
        ),
        # More in use than allowed: the result is 0, not negative.
        ({"proc/self/cgroup": "0::/\n"}, group("sys/fs/cgroup", str(MIB), 2 * MIB, 0, 2), 0),
    ],
)
def test_available_memory(tmp_path, cgroup, groups, expected):
    assert available_memory(write(tmp_path, MACHINE | cgroup | groups)) == expected


def test_available_memory_without_proc(tmp_path):
    assert available_memory(tmp_path) == 0


def test_available_memory_of_this_machine():
    if not Path("/proc/meminfo").is_file():
        pytest.skip("no /proc here")
    assert 0 < available_memory() < 1 << 50


def quota(folder: str, quota_us: int, version: int, period_us: int = 100_000) -> dict[str, str]:
    if version == 2:
        return {f"{folder}/cpu.max": f"{'max' if quota_us < 0 else quota_us} {period_us}\n"}
    return {f"{folder}/cpu.cfs_quota_us": f"{quota_us}\n", f"{folder}/cpu.cfs_period_us": f"{period_us}\n"}


V2, V1 = "sys/fs/cgroup", "sys/fs/cgroup/cpu"


@pytest.mark.parametrize(
    ("cgroup", "groups", "expected"),
    [
        # No groups at all, groups that do not exist, groups without a quota.
        (None, {}, 8),
        ("0::/a/b\n", {}, 8),
        ("0::/a\n", quota(f"{V2}/a", -1, 2), 8),
        ("1:cpu:/a\n", quota(f"{V1}/a", -1, 1), 8),
        # A fraction of a CPU counts as one; at least 1, at most the CPUs of the affinity mask.
        ("0::/a\n", quota(f"{V2}/a", 200_000, 2), 2),
        ("0::/a\n", quota(f"{V2}/a", 200_001, 2), 3),
        ("0::/a\n", quota(f"{V2}/a", 1_000, 2), 1),
        ("0::/a\n", quota(f"{V2}/a", 1_600_000, 2), 8),
        ("0::/a\n", quota(f"{V2}/a", 100_000, 2, period_us=50_000), 2),
        # The smallest quota on the path applies.
        ("0::/a/b\n", quota(f"{V2}/a/b", 400_000, 2) | quota(f"{V2}/a", 300_000, 2), 3),
        ("0::/a/b\n", quota(f"{V2}/a/b", 200_000, 2) | quota(f"{V2}/a", 300_000, 2), 2),
        ("0::/a/b\n", quota(f"{V2}/a", 300_000, 2), 3),
        # In a container the path may be that of the host: the limit is in the top folder.
        ("0::/host/x\n", quota(V2, 150_000, 2), 2),
        ("0::/../x\n", quota(V2, 150_000, 2), 2),
        # Version 1: alone, or with another controller in either order, in a folder with one name or both.
        ("4:memory:/m\n1:cpu:/a\n", quota(f"{V1}/a", 250_000, 1), 3),
        ("4:cpu,cpuacct:/a\n", quota(f"{V2}/cpu,cpuacct/a", 250_000, 1), 3),
        ("4:cpuacct,cpu:/a\n", quota(f"{V1}/a", 250_000, 1), 3),
        ("4:cpuset:/a\n2:cpuacct:/a\n", quota(f"{V1}/a", 250_000, 1), 8),
        # Both versions mounted: either may have the quota.
        ("4:memory:/a\n0::/b\n", quota(f"{V2}/unified/b", 250_000, 2), 3),
        ("4:cpu:/a\n0::/b\n", quota(f"{V1}/a", 400_000, 1) | quota(f"{V2}/unified/b", -1, 2), 4),
        # An unreadable quota is ignored.
        ("0::/a\n", {f"{V2}/a/cpu.max": ""}, 8),
        ("0::/a\n", {f"{V2}/a/cpu.max": "100000 0\n"}, 8),
        ("1:cpu:/a\n", {f"{V1}/a/cpu.cfs_quota_us": "100000\n"}, 8),
    ],
)
def test_usable_cpus(tmp_path, monkeypatch, cgroup, groups, expected):
    monkeypatch.setattr("os.sched_getaffinity", lambda _: set(range(8)))
    files = groups if cgroup is None else {"proc/self/cgroup": cgroup} | groups
    assert usable_cpus(write(tmp_path, files)) == expected


def test_affinity_mask_limits_usable_cpus(tmp_path, monkeypatch):
    monkeypatch.setattr("os.sched_getaffinity", lambda _: {3, 5})
    assert usable_cpus(write(tmp_path, {"proc/self/cgroup": "0::/a\n"} | quota(f"{V2}/a", 300_000, 2))) == 2
    assert usable_cpus(write(tmp_path, quota(f"{V2}/a", 100_000, 2))) == 1


def test_quota_is_logged_once(tmp_path, monkeypatch, caplog):
    monkeypatch.setattr("os.sched_getaffinity", lambda _: set(range(8)))
    root = write(tmp_path, {"proc/self/cgroup": "0::/a\n"} | quota(f"{V2}/a", 250_000, 2))
    log_once.cache_clear()
    with caplog.at_level(logging.INFO, "cmran"):
        assert usable_cpus(root) == usable_cpus(root) == 3
        write(tmp_path, quota(f"{V2}/a", 1_600_000, 2))
        usable_cpus(root)
    assert [(record.levelname, record.getMessage()) for record in caplog.records] == [
        ("INFO", "a control group limits CPU time to 2.5 of the 8 CPUs: 3 threads by default")
    ]


LIMITED = """
import os, sys
from cmran.utils import device
device.usable_cpus = lambda: {cpus}
os.sched_getaffinity = lambda _: set(range(4))
import torch
torch.set_num_threads({before})
device.limit_threads()
print(torch.get_num_threads())
torch.set_num_threads(3)
device.limit_threads()
print(torch.get_num_threads())
"""


@pytest.mark.parametrize(
    ("cpus", "before", "variable", "expected"),
    [
        (1, 4, None, 1),
        (2, 4, None, 2),
        # Never raised; more threads than CPUs, or a variable, is a setting of the user.
        (4, 2, None, 2),
        (1, 6, None, 6),
        (1, 4, "OMP_NUM_THREADS", 4),
        (1, 4, "MKL_NUM_THREADS", 4),
    ],
)
def test_torch_threads_are_lowered_once_and_never_raised(cpus, before, variable, expected):
    code = LIMITED.format(cpus=cpus, before=before)
    environment = {name: value for name, value in os.environ.items() if not name.endswith("NUM_THREADS")}
    environment |= {} if variable is None else {variable: "4"}
    done = subprocess.run(
        [sys.executable, "-c", code], cwd=ROOT, env=environment, capture_output=True, text=True, check=True
    )
    # A later setting of the caller is kept.
    assert done.stdout.split() == [str(expected), "3"]


@pytest.fixture
def control_group() -> Iterator[Path]:
    """A control group with a quota of half a CPU; the test is skipped if none can be created."""
    if len(os.sched_getaffinity(0)) < 2:
        pytest.skip("with a single CPU no quota can lower the number")
    own = {line.split(":")[1]: line.split(":")[2].strip("/") for line in Path("/proc/self/cgroup").read_text().split()}
    if "cpu" in own:
        group, name, value = Path("/sys/fs/cgroup/cpu", own["cpu"]), "cpu.cfs_quota_us", "50000"
    else:
        group, name, value = Path("/sys/fs/cgroup", own.get("", "")), "cpu.max", "50000 100000"
    group = group / f"cmran-test-{os.getpid()}"
    try:
        group.mkdir()
    except OSError as error:
        pytest.skip(f"cannot create a control group here: {error}")
    try:
        try:
            (group / name).write_text(value)
        except OSError as error:
            pytest.skip(f"cannot set a CPU quota here: {error}")
        yield group
    finally:
        group.rmdir()


def test_fit_in_a_real_control_group(control_group, tmp_path):
    data = make_folder(tmp_path / "data", 8)
    code = f"""
import logging, os, sys
for name in ("OMP_NUM_THREADS", "MKL_NUM_THREADS"):
    os.environ.pop(name, None)
open("{control_group}/cgroup.procs", "w").write(str(os.getpid()))
logging.basicConfig(level=logging.INFO)
import torch
from pathlib import Path
from cmran.training.trainer import fit
from tests.cmran.tiny import tiny_config
before = torch.get_num_threads()
fit(Path({str(data)!r}), tiny_config(), Path({str(tmp_path / "run")!r}), device="cpu")
print(before, torch.get_num_threads())
"""
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    before, after = map(int, done.stdout.split())
    assert before > 1
    assert after == 1
    assert done.stderr.count("a control group limits CPU time to 0.5 of the") == 1
