"""What all benchmarks share: timing in turn, and the report with machine, versions, commit and command."""

import argparse
import importlib.metadata
import os
import platform
import shlex
import statistics
import subprocess
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, NoReturn

from cmran.errors import CmranError
from cmran.utils.device import usable_cpus
from cmran.utils.files import write_json

BLOCK_BYTES = 32 << 20
ROOT = Path(__file__).resolve().parent.parent
PACKAGES = ("torch", "numpy", "h5py", "onnxruntime-gpu", "onnxruntime", "onnx", "pydantic")
FLAGS = (
    "avx2", "avx512f", "avx512_bf16", "avx512_fp16", "avx512_vnni", "avx_vnni", "amx_bf16", "amx_int8",
    "asimddp", "bf16", "i8mm", "sve",
)  # fmt: skip
"""Of a processor's flags those that decide how fast its products are."""


@dataclass(frozen=True, kw_only=True)
class Row:
    """One figure of a benchmark."""

    name: str
    value: float
    """Median of the readings, in `unit`."""
    unit: str
    floor: float | None = None
    """The least that this machine allows (benchmarks.floor), measured in the same run, in `unit`."""
    ratio: float | None = None
    """`value` over what `against` names; the other way round where `target` begins with ">="."""
    against: str = ""
    """What `ratio` compares with: "floor", or what else was measured in the same run."""
    baseline: float | None = None
    """That, in `unit`, where it is not the floor."""
    target: str = ""
    """What to reach: a ratio, such as "<= 1.5x", or a value, such as "< 4 ms"."""
    published: float | None = None
    """How many times as fast as the published operations in float64, for information: it differs between processors."""
    spread: float | None = None
    """Largest minus smallest reading, over the median."""


def median(readings: Sequence[float]) -> float:
    """Median of the readings."""
    return statistics.median(readings)


def spread(readings: Sequence[float]) -> float | None:
    """Largest minus smallest reading, over the median; None for a single reading."""
    middle = statistics.median(readings)
    return (max(readings) - min(readings)) / middle if len(readings) > 1 and middle else None


def in_turn(
    actions: Mapping[str, Callable[[], float | None]], repeats: int, *, warm_up: int = 1
) -> dict[str, list[float]]:
    """Readings in seconds of each action, taken in turn so that a change of the machine's pace meets all alike.

    An action that measures itself returns its seconds; of any other the wall time is taken.
    """
    readings: dict[str, list[float]] = {name: [] for name in actions}
    for round_ in range(warm_up + repeats):
        for name, action in actions.items():
            started = time.perf_counter()
            own = action()
            taken = time.perf_counter() - started if own is None else own
            if round_ >= warm_up:
                readings[name].append(taken)
    return readings


def timed(
    name: str,
    readings: Sequence[float],
    *,
    floor: float | None = None,
    published: Sequence[float] | None = None,
    target: str = "",
    unit: str = "s",
    scale: float = 1.0,
) -> Row:
    """A row of readings in seconds: their median times `scale`, and its ratio to the floor (in seconds)."""
    value = median(readings)
    return Row(
        name=name,
        value=value * scale,
        unit=unit,
        floor=None if floor is None else floor * scale,
        ratio=None if floor is None else value / floor,
        against="" if floor is None else "floor",
        target=target,
        published=None if published is None else median(published) / value,
        spread=spread(readings),
    )


def versus(
    name: str,
    readings: Sequence[float],
    baseline: Sequence[float],
    against: str,
    *,
    target: str = "",
    published: Sequence[float] | None = None,
) -> Row:
    """A row of readings in seconds against other ones: value / baseline, or baseline / value for a target ">= ..."."""
    value, base = median(readings), median(baseline)
    return Row(
        name=name,
        value=value,
        unit="s",
        ratio=base / value if target.startswith(">=") else value / base,
        against=against,
        baseline=base,
        target=target,
        published=None if published is None else median(published) / value,
        spread=spread(readings),
    )


def evict_from_page_cache(path: Path) -> None:
    """Put the file's pages out of the page cache."""
    with path.open("rb", buffering=0) as file:
        # A page that waits to be written stays.
        os.fsync(file.fileno())
        os.posix_fadvise(file.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)


def read_through(path: Path, *, keep: bool = True) -> None:
    """Read a file from front to back, in large blocks, told to the system; without `keep` its pages go behind it."""
    buffer = memoryview(bytearray(BLOCK_BYTES))
    with path.open("rb", buffering=0) as file:
        os.posix_fadvise(file.fileno(), 0, 0, os.POSIX_FADV_SEQUENTIAL)
        done = 0
        while count := file.readinto(buffer):
            if not keep:
                os.posix_fadvise(file.fileno(), done, count, os.POSIX_FADV_DONTNEED)
            done += count


def parser(description: str) -> argparse.ArgumentParser:
    """The options of every benchmark: --json, --repeats, --tiny."""
    found = argparse.ArgumentParser(description=description)
    found.add_argument("--json", type=Path, metavar="FILE", help="write the report here, too")
    found.add_argument("--repeats", type=_positive, default=5, metavar="N", help="readings of each figure [default: 5]")
    found.add_argument("--tiny", action="store_true", help="the smallest size: for being alive, not for speed")
    return found


def _positive(text: str) -> int:
    number = int(text)
    if number < 1:
        raise argparse.ArgumentTypeError(f"expected 1 or more, found {number}")
    return number


def run_program(main: Callable[[], int]) -> NoReturn:
    """End the process as `main` says; what the user can mend is one line."""
    try:
        sys.exit(main())
    except CmranError as error:
        sys.exit(f"error: {' '.join(str(error).split())}")


def finish(rows: Sequence[Row], options: argparse.Namespace) -> int:
    """Print the rows as a table and, with --json, write the report. The exit code."""
    report: dict[str, Any] = {
        "machine": machine(),
        "versions": versions(),
        "commit": commit(),
        "command": shlex.join(["python", "-m", _module(), *sys.argv[1:]]),
        "rows": [asdict(row) for row in rows],
    }
    print(f"{report['machine']['cpu']}, {report['machine']['cores']} CPUs, {report['machine']['gpu'] or 'no GPU'}")
    head = ("name", "value", "unit", "floor", "ratio", "against", "target", "published", "spread")
    table = [head, *(tuple(_cell(key, getattr(row, key)) for key in head) for row in rows)]
    widths = [max(len(line[column]) for line in table) for column in range(len(head))]
    for line in table:
        print("  ".join(cell.ljust(width) for cell, width in zip(line, widths, strict=True)).rstrip())
    if options.json is not None:
        write_json(options.json, report)
    return 0


def machine() -> dict[str, Any]:
    """Processor, the number of CPUs that this process may use, memory and GPU."""
    gpu = None
    # Benchmarks without torch do not wait for it.
    if "torch" in sys.modules:
        import torch

        gpu = torch.cuda.get_device_name() if torch.cuda.is_available() else None
    memory = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    return {
        "cpu": cpu(),
        "cores": usable_cpus(),
        "memory_gib": round(memory / 2**30, 1),
        "gpu": gpu,
        "system": platform.platform(),
    }


def cpu(path: Path = Path("/proc/cpuinfo")) -> str:
    """The processor's name, family, model, and which of FLAGS it has: the name alone may say little.

    "AMD EPYC (family 26, model 2; avx512f, avx512_bf16, avx512_vnni)"
    """
    try:
        first = path.read_text(encoding="utf-8").partition("\n\n")[0]
    except OSError:
        first = ""
    found = {key.strip(): value.strip() for key, _, value in (line.partition(":") for line in first.splitlines())}
    # An Arm processor has no name here, but numbers.
    name = found.get("model name") or platform.processor() or platform.machine()
    keys = {"cpu family": "family", "model": "model", "CPU implementer": "implementer", "CPU part": "part"}
    numbers = ", ".join(f"{shown} {found[key]}" for key, shown in keys.items() if key in found)
    flags = (found.get("flags") or found.get("Features") or "").split()
    details = "; ".join(filter(None, [numbers, ", ".join(flag for flag in FLAGS if flag in flags)]))
    return f"{name} ({details})" if details else name


def versions() -> dict[str, str]:
    """Versions of Python and of the packages that matter, as far as installed."""
    found = {"python": platform.python_version()}
    for name in PACKAGES:
        try:
            found[name] = importlib.metadata.version(name)
        except importlib.metadata.PackageNotFoundError:
            continue
    return found


def commit() -> str | None:
    """The commit that is measured, with "+changes" where files differ from it; None outside git."""
    try:
        head = _git("rev-parse", "HEAD")
        return head + ("+changes" if _git("status", "--porcelain", "--untracked-files=no") else "")
    except (OSError, subprocess.CalledProcessError):
        return None


def _git(*arguments: str) -> str:
    done = subprocess.run(["git", *arguments], cwd=ROOT, capture_output=True, text=True, check=True)
    return done.stdout.strip()


def _module() -> str:
    spec = getattr(sys.modules["__main__"], "__spec__", None)
    return spec.name if spec else sys.argv[0]


def _cell(key: str, value: object) -> str:
    if value in (None, ""):
        return "-"
    if not isinstance(value, float):
        return str(value)
    shown = {"ratio": f"{value:.2f}x", "published": f"{value:.1f}x", "spread": f"{100 * value:.0f} %"}
    return shown.get(key, f"{value:.4g}")
