"""One training step and one epoch on the CPU: `step_fast`, `step_float32`, `epoch_disk`, `epoch_start`.

    python -m benchmarks.training                    # a synthetic folder of 3339 training videos: 7.7 GiB on disk
    python -m benchmarks.training --data data/ave    # an existing folder
    python -m benchmarks.training --no-epoch         # only the steps

A step is forward, backward, clipping and Adam on 32 videos in full mode, relative to its floor (`benchmarks.floor`).
For information, the published step in float64 (`benchmarks.published`) is measured in alternation with the others, in
a separate process, so that the memory settings of this process do not affect it.

`epoch_start` is the time from the start of a run to its first step, in a fresh process with an empty feature cache: the
feature files are not in the page cache, and the fingerprint is known, as after a validation. Its floor is reading the
same files once, sequentially.

`epoch_disk` is a run of `cmran train` in the fast precision, with as many epochs as measurements, divided among them:
from the call, with a filled feature cache (in memory, as building it leaves it), until the files of the last epoch are
on disk. It therefore includes such a start, in which features are read into memory if they fit, and per epoch 105
steps, the scores on val, and the part of the checkpoint that is not written during the next epoch. Its floor is that
of the steps and of the scored batches.

The published epoch, for information, reads float64 rows one by one through a DataLoader into the published step and,
as published, scores 402 videos after it; it has no start and no checkpoint. 10 steps and 5 scored batches represent
all, after three of each that are not counted. It is measured once before and once after our run, since the speed of a
machine changes.
"""

import contextlib
import itertools
import multiprocessing
import os
import sys
import tempfile
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import ProcessPoolExecutor
from contextlib import contextmanager
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any

import h5py
import numpy as np
import torch
from torch import Tensor

from benchmarks.floor import forward_seconds, step_seconds
from benchmarks.published import PublishedRows, PublishedStep
from benchmarks.report import (
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
from cmran.config import ModelConfig, Precision, RunConfig, TrainConfig
from cmran.data.dataset import open_folder
from cmran.data.feature_cache import clear_caches
from cmran.model.network import CMRAN
from cmran.training.step import INPUTS, TrainStep
from cmran.training.trainer import fit
from cmran.utils.device import pick_precision, usable_cpus

BATCH = 32
CPU = torch.device("cpu")
VIDEOS = {"train": 3339, "val": 402, "test": 402}
BASELINE_BATCHES = {"train": 10, "val": 5}
"""Batches that represent an epoch of the baseline; "train" are steps, "val" are scored."""
UNCOUNTED_BATCHES = 3
"""Batches before them that are not counted, while readers and memory warm up."""
STEP_TARGETS = {"bfloat16": "<= 1.5x", "float32": "<= 1.3x"}
STEPS = 10
"""Consecutive steps per measurement, as in training: about as long as one published step."""
TINY = ModelConfig(visual_features=32, audio_features=8, width=16, feedforward=32, bottleneck=8, spatial_width=8)


def main(argv: Sequence[str] | None = None) -> int:
    """Run and report."""
    found = parser("step_fast, step_float32, epoch_disk, epoch_start")
    found.add_argument("--data", type=Path, metavar="DIR", help="data folder [default: a synthetic one]")
    found.add_argument("--scratch", type=Path, metavar="DIR", help="folder for data and cache [default: TMPDIR]")
    found.add_argument("--no-epoch", action="store_true", help="skip epoch_disk and epoch_start")
    options = found.parse_args(argv)
    if options.data is not None:
        # Fail now, not after the steps have been measured.
        open_folder(options.data).close()
    config = TINY if options.tiny else ModelConfig()
    repeats = 1 if options.tiny else options.repeats
    with tempfile.TemporaryDirectory(prefix="cmran-bench-", dir=options.scratch) as scratch:
        # A separate cache: leave the user's cache untouched.
        os.environ["XDG_CACHE_HOME"] = scratch
        rows = steps(config, repeats, 1 if options.tiny else STEPS)
        if not options.no_epoch:
            data = options.data or noise_folder(Path(scratch) / "data", config, 40 if options.tiny else None)
            rows += epoch(config, data, Path(scratch), repeats)
        return finish(rows, options)


def steps(config: ModelConfig, repeats: int, count: int) -> list[Row]:
    """Return the rows `step_fast` (bfloat16 if native) and `step_float32`; a measurement has `count` steps."""
    fast = pick_precision("auto", CPU)
    with in_subprocess(_published_steps, config) as published:
        actions = {"published": published} | {
            name: synced(our_step(config, precision), count, CPU)
            for name, precision in (("fast", fast), ("float32", "float32"))
        }
        measurements = in_turn(actions, repeats, warm_up=2)
    rows = []
    for name, precision in (("fast", fast), ("float32", "float32")):
        floor = step_seconds(config, precision, BATCH, CPU)
        published_s, target = measurements["published"], STEP_TARGETS[precision]
        rows.append(timed(f"step_{name}", measurements[name], floor=floor, published=published_s, target=target))
    return rows


def synced(work: Callable[[], object], times: int, device: torch.device) -> Callable[[], float]:
    """Return an action that runs `work` `times` times and returns the seconds of one, including the device."""

    def action() -> float:
        wait(device)
        started = time.perf_counter()
        for _ in range(times):
            work()
        wait(device)
        return (time.perf_counter() - started) / times

    return action


def wait(device: torch.device) -> None:
    """Wait until the device has finished its work."""
    if device.type == "cuda":
        torch.cuda.synchronize(device)


def epoch(config: ModelConfig, data: Path, scratch: Path, repeats: int) -> list[Row]:
    """Return the rows `epoch_disk` and `epoch_start`."""
    with open_folder(data, features="float16") as folder:
        orders = {"train": folder.order("train"), "val": folder.order("val")}
        folder.fingerprint  # noqa: B018  computed and cached, as by a validation
    files = [data / "visual_feature.h5", data / "audio_feature.h5"]
    number = itertools.count()

    def settle() -> None:
        os.sync()
        for file in files:
            evict_from_page_cache(file)

    def start() -> float:
        clear_caches()
        settle()
        # In a fresh process, as `cmran train`: in this one the earlier steps have changed the state of the memory.
        seconds: float = in_fresh_process(_start, config, data, scratch / f"start-{next(number)}")
        return seconds

    def read() -> float:
        settle()
        started = time.perf_counter()
        for file in files:
            read_through(file, keep=False)
        return time.perf_counter() - started

    starts = in_turn({"start": start, "read": read}, min(repeats, 3), warm_up=0)
    with in_subprocess(_published_epoch, (config, data, orders)) as published:
        baseline = [published()]
        start_s, written = in_fresh_process(epochs_of, config, data, scratch / "run", repeats)
        baseline.append(published())
    # Each epoch lasts from the callback of the previous one; the start is divided among all.
    each = np.diff([start_s, *written]) + start_s / len(written)
    fast = pick_precision("auto", CPU)
    floor = step_seconds(config, fast, BATCH, CPU) * len(orders["train"]) / BATCH
    floor += forward_seconds(config, fast, BATCH, CPU) * len(orders["val"]) / BATCH
    return [
        timed("epoch_disk", each.tolist(), floor=floor, published=baseline),
        timed("epoch_start", starts["start"], floor=median(starts["read"]), target="<= 1.5x"),
    ]


def in_fresh_process(work: Callable[..., Any], *given: object) -> Any:
    """Return the result of `work` in a fresh process."""
    with ProcessPoolExecutor(1, multiprocessing.get_context("spawn")) as pool:
        return pool.submit(work, *given).result()


class _StartedError(Exception):
    """Raised at the first step of a training, to end it there."""


def _start(config: ModelConfig, data: Path, out: Path) -> float:
    """Return the seconds of a run until its first step."""

    def begin(_: object) -> None:
        raise _StartedError

    run = RunConfig(recipe="published-full", model=config, train=TrainConfig(epochs=1, precision="auto"))
    started = time.perf_counter()
    with contextlib.suppress(_StartedError):
        fit(data, run, out, device="cpu", evaluate_test=False, on_start=begin)
    return time.perf_counter() - started


def epochs_of(config: ModelConfig, data: Path, out: Path, epochs: int) -> tuple[float, list[float]]:
    """Return the seconds until the first step, and until the files of each epoch are on disk."""
    started = time.perf_counter()
    first_step: list[float] = []
    written: list[float] = []

    def begin(_: object) -> None:
        first_step.append(time.perf_counter() - started)

    def record(_: object) -> None:
        written.append(time.perf_counter() - started)

    run = RunConfig(recipe="published-full", model=config, train=TrainConfig(epochs=epochs, precision="auto"))
    fit(data, run, out, device="cpu", evaluate_test=False, on_start=begin, on_epoch=record)
    return first_step[0], written


def batch_of(config: ModelConfig, videos: int = BATCH) -> tuple[Tensor, Tensor, Tensor]:
    """Return visual maps (B, T, H, W, C) and audio (B, T, A), as sparse as AVE, and labels (B, T, 29); float32."""
    generator = torch.Generator().manual_seed(0)
    visual = torch.randn(videos, 10, 7, 7, config.visual_features, generator=generator).sub_(1.08).relu_()
    audio = torch.randn(videos, 10, config.audio_features, generator=generator).sub_(0.39).relu_()
    labels = torch.full((videos, 10), 28)
    labels[:, 3:8] = torch.randint(28, (videos, 1), generator=generator)
    return visual, audio, torch.eye(29)[labels]


def our_step(
    config: ModelConfig, precision: Precision, device: torch.device = CPU, *, captured: bool = True
) -> Callable[[], None]:
    """Return a training step on one batch on the device; on CUDA captured as a graph, or eager."""
    torch.manual_seed(0)
    train = TrainConfig(precision=precision)
    train_step = TrainStep(RunConfig(recipe="published-full", model=config, train=train), device)
    batch = [x.to(device=device, dtype=INPUTS[precision]) for x in batch_of(config)]

    def step() -> None:
        (train_step.step if captured else train_step.eager_step)(*batch)

    return step


@contextmanager
def in_subprocess(
    serve: Callable[..., None], given: object, environment: Mapping[str, str] | None = None
) -> Iterator[Callable[[], float]]:
    """Run `serve(connection, given)` in a fresh process; it answers each message with its seconds, until None.

    `environment` replaces the environment of this process there.
    """
    here, there = multiprocessing.get_context("spawn").Pipe()
    process = multiprocessing.get_context("spawn").Process(target=serve, args=(there, given))
    own = dict(os.environ)
    try:
        if environment is not None:
            os.environ.clear()
            os.environ.update(environment)
        process.start()
    finally:
        if environment is not None:
            os.environ.clear()
            os.environ.update(own)
    there.close()

    def action() -> float:
        here.send("go")
        seconds: float = here.recv()
        return seconds

    try:
        yield action
        here.send(None)
        process.join()
    finally:
        process.terminate()


def _published_steps(connection: Connection, config: ModelConfig) -> None:
    torch.manual_seed(0)
    step = PublishedStep(CMRAN(config))
    batch = [x.double() for x in batch_of(config)]
    while connection.recv() is not None:
        started = time.perf_counter()
        step(*batch)
        connection.send(time.perf_counter() - started)


def _published_epoch(connection: Connection, given: tuple[ModelConfig, Path, dict[str, np.ndarray]]) -> None:
    """Answer with the seconds of an epoch, including data and scores."""
    config, data, orders = given
    torch.manual_seed(0)
    step = PublishedStep(CMRAN(config))
    works: dict[str, Callable[[Tensor, Tensor, Tensor], object]] = {"train": step, "val": step.score}
    while connection.recv() is not None:
        seconds = 0.0
        for split, counted in BASELINE_BATCHES.items():
            seconds += _batch_seconds(data, orders[split], counted, works[split]) * len(orders[split]) / BATCH
            # Use other rows next time, since these are in memory now.
            orders[split] = orders[split][::-1]
        connection.send(seconds)


def _batch_seconds(
    data: Path, rows: np.ndarray, counted: int, work: Callable[[Tensor, Tensor, Tensor], object]
) -> float:
    """Return the mean seconds per batch of a DataLoader and `work`, over up to `counted` batches."""
    # The published 8 workers, if there are as many cores.
    workers = min(8, usable_cpus())
    ends = [time.perf_counter()]
    # The readers run ahead of the work, and are still busy when the counting ends.
    for batch in torch.utils.data.DataLoader(PublishedRows(data, rows), BATCH, num_workers=workers):
        work(*batch)
        ends.append(time.perf_counter())
        if len(ends) > UNCOUNTED_BATCHES + counted:
            break
    kept = ends[min(UNCOUNTED_BATCHES, len(ends) - 2) :]
    return (kept[-1] - kept[0]) / (len(kept) - 1)


def noise_folder(path: Path, config: ModelConfig, videos: int | None = None) -> Path:
    """Write a folder of float64 features for timing only: sparse noise, the same few videos repeated."""
    sizes = VIDEOS if videos is None else {"train": videos, "val": 4, "test": 4}
    total, rng = sum(sizes.values()), np.random.default_rng(0)
    path.mkdir()

    def write(name: str, values: np.ndarray, key: str = "avadataset") -> None:
        with h5py.File(path / name, "w") as file:
            data = file.create_dataset(key, (total, *values.shape[1:]), values.dtype)
            for start in range(0, total, len(values)):
                data[start : start + len(values)] = values[: total - start]

    print(f"generating a folder of {total} videos in {path}", file=sys.stderr, flush=True)
    visual, audio, labels = batch_of(config)
    write("visual_feature.h5", visual.double().numpy())
    write("audio_feature.h5", audio.double().numpy())
    write("labels.h5", labels.numpy())
    start = 0
    order = rng.permutation(total)
    for split, size in sizes.items():
        with h5py.File(path / f"{split}_order.h5", "w") as file:
            file["order"] = order[start : start + size]
        start += size
    return path


if __name__ == "__main__":
    run_program(main)
