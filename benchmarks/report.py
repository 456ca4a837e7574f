"""Shared by all benchmarks: alternating measurements, and the report with machine, versions, commit and command."""

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
"""Processor flags that determine the speed of matrix products."""


@dataclass(frozen=True, kw_only=True)
class Row:
    """One figure of a benchmark."""

    name: str
    value: float
    """Median of the measurements, in `unit`."""
    unit: str
    floor: float | None = None
    """The least time that this machine allows (`benchmarks.floor`), measured in the same run, in `unit`."""
    ratio: float | None = None
    """`value` / the value named by `against`; inverted if `target` begins with ">="."""
    against: str = ""
    """What `ratio` compares with: "floor", or another row of the same run."""
    baseline: float | None = None
    """The value of `against`, in `unit`, if it is not the floor."""
    target: str = ""
    """The target: a ratio, such as "<= 1.5x", or a value, such as "< 4 ms"."""
    published: float | None = None
    """Speed relative to the published operations in float64. Information only: it differs between processors."""
    spread: float | None = None
    """(largest - smallest measurement) / median."""


def median(measurements: Sequence[float]) -> float:
    """Return the median of the measurements."""
    return statistics.median(measurements)


def spread(measurements: Sequence[float]) -> float | None:
    """Return (largest - smallest measurement) / median; None for a single measurement."""
    middle = statistics.median(measurements)
    return (max(measurements) - min(measurements)) / middle if len(measurements) > 1 and middle else None


def in_turn(
    actions: Mapping[str, Callable[[], float | None]], repeats: int, *, warm_up: int = 1
) -> dict[str, list[float]]:
    """Measure each action in seconds, alternating, so that a change in the speed of the machine affects all equally.

    An action that measures itself returns its seconds; otherwise its wall time is used.
    """
    measurements: dict[str, list[float]] = {name: [] for name in actions}
    for round_ in range(warm_up + repeats):
        for name, action in actions.items():
            started = time.perf_counter()
            own = action()
            taken = time.perf_counter() - started if own is None else own
            if round_ >= warm_up:
                measurements[name].append(taken)
    return measurements


def timed(
    name: str,
    measurements: Sequence[float],
    *,
    floor: float | None = None,
    published: Sequence[float] | None = None,
    target: str = "",
    unit: str = "s",
    scale: float = 1.0,
) -> Row:
    """Return the row of measurements in seconds: their median times `scale`, and its ratio to the floor (in s)."""
    value = median(measurements)
    return Row(
        name=name,
        value=value * scale,
        unit=unit,
        floor=None if floor is None else floor * scale,
        ratio=None if floor is None else value / floor,
        against="" if floor is None else "floor",
        target=target,
        published=None if published is None else median(published) / value,
        spread=spread(measurements),
    )


def versus(
    name: str,
    measurements: Sequence[float],
    baseline: Sequence[float],
    against: str,
    *,
    target: str = "",
    published: Sequence[float] | None = None,
) -> Row:
    """Return the row of measurements in seconds relative to others; the ratio is inverted for a target ">= ..."."""
    value, base = median(measurements), median(baseline)
    return Row(
        name=name,
        value=value,
        unit="s",
        ratio=base / value if target.startswith(">=") else value / base,
        against=against,
        baseline=base,
        target=target,
        published=None if published is None else median(published) / value,
        spread=spread(measurements),
    )


def evict_from_page_cache(path: Path) -> None:
    """Drop the pages of a file from the page cache."""
    with path.open("rb", buffering=0) as file:
        # A dirty page would stay.
        os.fsync(file.fileno())
        os.posix_fadvise(file.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)


def read_through(path: Path, *, keep: bool = True) -> None:
    """Read a file sequentially in large blocks; without `keep`, drop its pages from the page cache while reading."""
    buffer = memoryview(bytearray(BLOCK_BYTES))
    with path.open("rb", buffering=0) as file:
        os.posix_fadvise(file.fileno(), 0, 0, os.POSIX_FADV_SEQUENTIAL)
        done = 0
        while count := file.readinto(buffer):
            if not keep:
                os.posix_fadvise(file.fileno(), done, count, os.POSIX_FADV_DONTNEED)
            done += count


def parser(description: str) -> argparse.ArgumentParser:
    """Return a parser with the options of every benchmark: --json, --repeats, --tiny."""
    found = argparse.ArgumentParser(description=description)
    found.add_argument("--json", type=Path, metavar="FILE", help="also write the report to this file")
    found.add_argument("--repeats", type=_positive, default=5, metavar="N", help="measurements per row [default: 5]")
    found.add_argument("--tiny", action="store_true", help="smallest size: a smoke test, not a measurement")
    return found


def _positive(text: str) -> int:
    number = int(text)
    if number < 1:
        raise argparse.ArgumentTypeError(f"expected 1 or more, found {number}")
    return number


def run_program(main: Callable[[], int]) -> NoReturn:
    """Run `main` and exit with its status; report a user error in one line."""
    try:
        sys.exit(main())
    except CmranError as error:
        sys.exit(f"error: {' '.join(str(error).split())}")


def finish(rows: Sequence[Row], options: argparse.Namespace) -> int:
    """Print the rows as a table and, with --json, write the report. Return the exit status."""
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
    """Describe processor, usable CPUs, memory and GPU."""
    gpu = None
    # Do not import torch for benchmarks that do not need it.
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
    """Describe the processor by name, family, model and those of FLAGS that it has; the name alone may be generic.

    "AMD EPYC (family 26, model 2; avx512f, avx512_bf16, avx512_vnni)"
    """
    try:
        first = path.read_text(encoding="utf-8").partition("\n\n")[0]
    except OSError:
        first = ""
    found = {key.strip(): value.strip() for key, _, value in (line.partition(":") for line in first.splitlines())}
    # An Arm processor is identified by numbers instead of a name.
    name = found.get("model name") or platform.processor() or platform.machine()
    keys = {"cpu family": "family", "model": "model", "CPU implementer": "implementer", "CPU part": "part"}
    numbers = ", ".join(f"{shown} {found[key]}" for key, shown in keys.items() if key in found)
    flags = (found.get("flags") or found.get("Features") or "").split()
    details = "; ".join(filter(None, [numbers, ", ".join(flag for flag in FLAGS if flag in flags)]))
    return f"{name} ({details})" if details else name


def versions() -> dict[str, str]:
    """Return the versions of Python and of the relevant packages that are installed."""
    found = {"python": platform.python_version()}
    for name in PACKAGES:
        try:
            found[name] = importlib.metadata.version(name)
        except importlib.metadata.PackageNotFoundError:
            continue
    return found


def commit() -> str | None:
    """Return the measured commit, with "+changes" if tracked files differ from it; None outside git."""
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
