"""How much memory is left: of the machine, and of the control groups that a container or a job puts around it."""

from pathlib import Path

import pytest

from cmran.hardware import available_memory

MIB = 1 << 20


def write(root: Path, files: dict[str, str]) -> Path:
    for name, text in files.items():
        path = root / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(text)
    return root


def group(folder: str, limit: str, used: int, files: int, version: int) -> dict[str, str]:
    names = ("memory.max", "memory.current") if version == 2 else ("memory.limit_in_bytes", "memory.usage_in_bytes")
    # Version 1 counts the groups below under names of their own; the plain ones are this group's alone.
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
        # No groups at all, and groups that are not there.
        ({}, {}, 8 * MIB),
        ({"proc/self/cgroup": "0::/a/b\n"}, {}, 8 * MIB),
        # Version 2: cached files give way, and so the room is limit - used + files.
        ({"proc/self/cgroup": "0::/a/b\n"}, group("sys/fs/cgroup/a/b", str(6 * MIB), 5 * MIB, 4 * MIB, 2), 5 * MIB),
        # The limit of a group around it, and no limit of its own.
        (
            {"proc/self/cgroup": "0::/a/b\n"},
            group("sys/fs/cgroup/a/b", "max", MIB, 0, 2) | group("sys/fs/cgroup/a", str(3 * MIB), MIB, 0, 2),
            2 * MIB,
        ),
        # Above this much the group is slowed down.
        (
            {"proc/self/cgroup": "0::/a\n"},
            group("sys/fs/cgroup/a", "max", MIB, 0, 2) | {"sys/fs/cgroup/a/memory.high": f"{4 * MIB}\n"},
            3 * MIB,
        ),
        # In a container the path may be that of the host: what counts is at the top.
        ({"proc/self/cgroup": "0::/host/x\n"}, group("sys/fs/cgroup", str(3 * MIB), 2 * MIB, 0, 2), MIB),
        # Version 1, beside an empty version 2, and "no limit" as a huge number.
        (
            {"proc/self/cgroup": "3:cpu:/a\n2:memory:/a\n0::/\n"},
            group("sys/fs/cgroup/memory/a", str(2 * MIB), MIB, 0, 1)
            | group("sys/fs/cgroup/memory", str(2**63 - 4096), MIB, 0, 1)
            | group("sys/fs/cgroup/cpu/a", "1", 0, 0, 1),
            MIB,
        ),
        # More in use than allowed: nothing is left, not less than nothing.
        ({"proc/self/cgroup": "0::/\n"}, group("sys/fs/cgroup", str(MIB), 2 * MIB, 0, 2), 0),
    ],
)
def test_available_memory(tmp_path, cgroup, groups, expected):
    assert available_memory(write(tmp_path, MACHINE | cgroup | groups)) == expected


def test_where_the_system_does_not_tell(tmp_path):
    assert available_memory(tmp_path) == 0


def test_of_this_machine():
    if not Path("/proc/meminfo").is_file():
        pytest.skip("no /proc here")
    assert 0 < available_memory() < 1 << 50
