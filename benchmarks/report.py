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

from cmran.errors import UserError
from cmran.files import write_json

BLOCK_BYTES = 32 << 20
ROOT = Path(__file__).resolve().parent.parent
PACKAGES = ("torch", "numpy", "h5py", "onnxruntime-gpu", "onnxruntime", "onnx", "pydantic")


@dataclass(frozen=True, kw_only=True)
class Row:
    """One figure of a benchmark."""

    name: str
    value: float
    # Median of the readings, in `unit`.
    unit: str
    ratio: float | None = None
    # To the baseline in the same run; which way round, `target` shows (">= 10x": how many times faster).
    baseline: float | None = None
    # Median of the baseline's readings, in `unit`.
    spread: float | None = None
    # Largest minus smallest reading, over the median.
    target: str = ""
    # What to reach, such as ">= 10x", "<= 1.1x" or "< 4 ms".


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


def versus(
    name: str,
    readings: Sequence[float],
    baseline: Sequence[float],
    *,
    target: str,
    unit: str = "s",
    scale: float = 1.0,
    faster: bool = True,
) -> Row:
    """A row from seconds: medians times `scale`; ratio baseline / value with `faster`, else value / baseline."""
    value, base = median(readings), median(baseline)
    return Row(
        name=name,
        value=value * scale,
        unit=unit,
        ratio=base / value if faster else value / base,
        baseline=base * scale,
        spread=spread(readings),
        target=target,
    )


def timed(name: str, readings: Sequence[float], *, target: str = "", unit: str = "s", scale: float = 1.0) -> Row:
    """A row of readings in seconds without a baseline: their median times `scale`."""
    return Row(name=name, value=median(readings) * scale, unit=unit, spread=spread(readings), target=target)


def put_out(path: Path) -> None:
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
    except UserError as error:
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
    print(f"{report['machine']['cpu']}, {report['machine']['cores']} cores, {report['machine']['gpu'] or 'no GPU'}")
    head = ("name", "value", "unit", "ratio", "baseline", "spread", "target")
    table = [head, *(tuple(_cell(key, getattr(row, key)) for key in head) for row in rows)]
    widths = [max(len(line[column]) for line in table) for column in range(len(head))]
    for line in table:
        print("  ".join(cell.ljust(width) for cell, width in zip(line, widths, strict=True)).rstrip())
    if options.json is not None:
        write_json(options.json, report)
    return 0


def machine() -> dict[str, Any]:
    """Processor, cores that this process may use, memory and GPU."""
    gpu = None
    # Benchmarks without torch do not wait for it.
    if "torch" in sys.modules:
        import torch

        gpu = torch.cuda.get_device_name() if torch.cuda.is_available() else None
    memory = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    return {
        "cpu": _cpu(),
        "cores": len(os.sched_getaffinity(0)),
        "memory_gib": round(memory / 2**30, 1),
        "gpu": gpu,
        "system": platform.platform(),
    }


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


def _cpu() -> str:
    try:
        lines = Path("/proc/cpuinfo").read_text(encoding="utf-8").splitlines()
    except OSError:
        lines = []
    names = [line.partition(":")[2].strip() for line in lines if line.startswith("model name")]
    return names[0] if names else platform.processor() or platform.machine()


def _module() -> str:
    spec = getattr(sys.modules["__main__"], "__spec__", None)
    return spec.name if spec else sys.argv[0]


def _cell(key: str, value: object) -> str:
    if value is None:
        return "-"
    if not isinstance(value, float):
        return str(value)
    return {"ratio": f"{value:.2f}x", "spread": f"{100 * value:.0f} %"}.get(key, f"{value:.4g}")
