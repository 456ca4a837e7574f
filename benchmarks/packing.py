"""`pack_wall`: building the feature cache of a float64 file, relative to reading and writing the bytes; `peak_memory`.

    python -m benchmarks.packing                    # a synthetic folder of 1000 videos, removed afterwards
    python -m benchmarks.packing --data data/ave    # the published size

The floor reads the file once sequentially, dropping its pages behind the reader, then writes as many bytes as the
cached file has, in large blocks, and syncs them. Before each measurement the pages of the file are dropped from the
page cache. The fingerprint is known, as after a validation or an earlier run. `peak_memory` is the larger value of
`cmran pack` and `cmran predict` on the whole folder.
"""

import argparse
import os
import shlex
import subprocess
import sys
import tempfile
import time
from collections.abc import Sequence
from pathlib import Path

import numpy as np

from benchmarks.report import (
    BLOCK_BYTES,
    ROOT,
    Row,
    evict_from_page_cache,
    finish,
    in_turn,
    median,
    parser,
    read_through,
    run_program,
    timed,
)

TARGET_GIB = 1.5

PEAK = """
import sys
from pathlib import Path
from flows.cli import main
if main(sys.argv[1:]):
    sys.exit("failed")
lines = Path("/proc/self/status").read_text().splitlines()
print(next(line.split()[1] for line in lines if line.startswith("VmHWM")))
"""


def main(argv: Sequence[str] | None = None) -> int:
    """Run and report."""
    found = parser("pack_wall and peak_memory")
    found.add_argument("--data", type=Path, metavar="DIR", help="data folder [default: a synthetic one]")
    found.add_argument(
        "--scratch", type=Path, metavar="DIR", help="folder for cache and output [default: beside the data]"
    )
    found.add_argument("--no-memory", action="store_true", help="skip peak_memory")
    options = found.parse_args(argv)
    if options.scratch is not None:
        options.scratch.mkdir(parents=True, exist_ok=True)
    parent = options.scratch or (options.data.resolve().parent if options.data else None)
    with tempfile.TemporaryDirectory(prefix="cmran-bench-", dir=parent) as scratch:
        # A separate cache: leave the user's cache untouched.
        os.environ["XDG_CACHE_HOME"] = scratch
        data = options.data or _synthetic_folder(Path(scratch) / "data", options.tiny)
        rows = pack_wall(data, Path(scratch), 1 if options.tiny else options.repeats)
        if not options.no_memory:
            rows += peak_memory(data, Path(scratch), options)
        return finish(rows, options)


def pack_wall(data: Path, scratch: Path, repeats: int) -> list[Row]:
    """Return the row `pack_wall`."""
    from cmran.data.dataset import open_folder
    from cmran.data.feature_cache import clear_caches, list_caches

    visual = data / "visual_feature.h5"
    with open_folder(data, need_labels=False, features="float16") as folder:
        # The first call also computes the fingerprint, which later calls find in the cache.
        if folder.use_feature_cache(build=True, progress=False):
            raise SystemExit("error: the feature cache cannot be built for this folder")
    size = sum(cache.size for cache in list_caches())

    def pack() -> float:
        clear_caches()
        _settle(visual)
        started = time.perf_counter()
        with open_folder(data, need_labels=False, features="float16") as folder:
            folder.use_feature_cache(build=True, progress=False)
        return time.perf_counter() - started

    def floor() -> float:
        clear_caches()
        _settle(visual)
        started = time.perf_counter()
        read_through(visual, keep=False)
        _write(scratch / "written", size)
        taken = time.perf_counter() - started
        (scratch / "written").unlink()
        return taken

    measurements = in_turn({"pack": pack, "floor": floor}, repeats, warm_up=0)
    clear_caches()
    return [timed("pack_wall", measurements["pack"], floor=median(measurements["floor"]), target="<= 1.1x")]


def peak_memory(data: Path, scratch: Path, options: argparse.Namespace) -> list[Row]:
    """Return the rows `peak_memory_pack`, `peak_memory_predict` and `peak_memory`, in GiB."""
    model, out = _exported(data, scratch), scratch / "predictions"
    commands = {
        "pack": ["pack", str(data)],
        "predict": shlex.split(f"predict --model {model} --data {data} --split all --device cpu --out {out}"),
    }
    peaks = {}
    for name, arguments in commands.items():
        done = subprocess.run(
            [sys.executable, "-c", PEAK, *arguments], cwd=ROOT, capture_output=True, text=True, check=False
        )
        if done.returncode:
            raise SystemExit(f"cmran {' '.join(arguments)}: {done.stderr}")
        peaks[name] = int(done.stdout.splitlines()[-1]) / 2**20
    target = f"<= {TARGET_GIB} GiB"
    rows = [Row(name=f"peak_memory_{name}", value=peak, unit="GiB") for name, peak in peaks.items()]
    return [Row(name="peak_memory", value=max(peaks.values()), unit="GiB", target=target), *rows]


def _synthetic_folder(path: Path, tiny: bool) -> Path:
    from cmran.data.synthetic import synthesize

    if tiny:
        return synthesize(path, videos=20, grid=3, visual_features=64, progress=False)
    return synthesize(path, videos=1000, progress=False)


def _exported(data: Path, scratch: Path) -> Path:
    """Export a network with random weights; memory does not depend on their values."""
    from cmran.config import ModelConfig
    from cmran.data.dataset import open_folder
    from cmran.model.network import CMRAN
    from serving.export import export_onnx

    with open_folder(data, need_labels=False) as folder:
        config = ModelConfig(visual_features=folder.visual_features, audio_features=folder.audio_features)
        segments, grid = folder.segments, folder.grid
    return export_onnx(CMRAN(config).eval(), scratch / "model.onnx", segments=segments, grid=grid, metadata={})


def _settle(path: Path) -> None:
    """Flush dirty pages, and drop the file from the page cache."""
    os.sync()
    evict_from_page_cache(path)


def _write(path: Path, size: int) -> None:
    block = np.random.default_rng(0).integers(0, 256, BLOCK_BYTES, np.uint8)
    with path.open("wb", buffering=0) as file:
        for start in range(0, size, BLOCK_BYTES):
            file.write(block[: min(BLOCK_BYTES, size - start)].data)
        os.fsync(file.fileno())


if __name__ == "__main__":
    run_program(main)
