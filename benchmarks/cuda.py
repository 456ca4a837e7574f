"""All rows of a GPU machine in one command: steps, epochs, prediction, and ONNX Runtime if it is installed.

    python -m benchmarks.cuda --json benchmarks/results/cuda.json         # a synthetic folder of 3339 + 804 videos
    python -m benchmarks.cuda --data data/ave --json benchmarks/results/cuda.json

Needs torch, numpy, h5py and pydantic. ONNX rows need onnxruntime-gpu, onnx, onnxscript and pyarrow; without these they
are skipped, with a line on stderr. Without a usable CUDA device the program exits with status 1. Times are wall times
around work that ends with a synchronization.

    cuda_step_*             a training step on a batch of 32 in device memory, relative to its floor (benchmarks.floor);
                            *_eager is the step without a CUDA graph
    cuda_fill_device_cache  copying the features from the feature cache to the device
    cuda_epoch              3339 videos with features on the device: only the steps of the epoch
    cuda_stream_epoch       the same epoch with features streamed from the feature cache through pinned memory
    cuda_predict*           all videos, from features on the device, and from the feature cache on disk
    cuda_read_cache         sequential read of the same bytes: the baseline of prediction from disk
    cuda_trial_start        from the call to the first step of a run whose features are on the device already
    cuda_run_200            `fit` of 200 epochs: scores on val and a checkpoint after each, scores on test at the end
    cuda_ort_*              a batch of 32 through ONNX Runtime, with the largest difference to PyTorch's outputs
    cuda_ort_predict*       the batch job on all videos, relative to a sequential read of the same float64 files
"""

import contextlib
import gc
import importlib.util
import itertools
import os
import sys
import tempfile
import time
from collections.abc import Callable, Sequence
from pathlib import Path

import numpy as np
import torch

from benchmarks.floor import step_seconds
from benchmarks.published import PublishedStep
from benchmarks.report import Row, finish, in_turn, parser, read_through, run_program, timed, versus
from benchmarks.training import BATCH, TINY, batch_of, noise_folder, our_step, synced, wait
from cmran.config import ModelConfig, Precision, RunConfig, TrainConfig
from cmran.data.dataset import open_folder
from cmran.data.device_cache import DeviceCache, DeviceCacheSlot
from cmran.data.feature_cache import list_caches
from cmran.data.loader import iterate
from cmran.model.network import CMRAN
from cmran.training.inference import predict
from cmran.training.step import INPUTS, TrainStep
from cmran.training.trainer import fit

STEPS = 20
"""Steps per measurement."""
EPOCHS = 5
RUN_EPOCHS = 200
ONNX_NEEDS = ("onnxruntime", "onnx", "onnxscript", "pyarrow")


def main(argv: Sequence[str] | None = None) -> int:
    """Run and report. Return 1 if there is no usable CUDA device."""
    found = parser("all CUDA rows")
    found.add_argument("--data", type=Path, metavar="DIR", help="data folder [default: a synthetic one, 7.7 GiB]")
    found.add_argument("--scratch", type=Path, metavar="DIR", help="folder for data and cache [default: TMPDIR]")
    options = found.parse_args(argv)
    if not torch.cuda.is_available():
        built = "" if torch.version.cuda else ": this torch is built without CUDA"
        print(f"error: no usable CUDA device{built}", file=sys.stderr)
        return 1
    config = TINY if options.tiny else ModelConfig()
    repeats = 1 if options.tiny else options.repeats
    with tempfile.TemporaryDirectory(prefix="cmran-bench-", dir=options.scratch) as scratch:
        os.environ["XDG_CACHE_HOME"] = scratch
        rows = steps(config, torch.device("cuda"), repeats)
        data = options.data or noise_folder(Path(scratch) / "data", config, 40 if options.tiny else None)
        rows += epochs(config, data, Path(scratch), torch.device("cuda"), 1 if options.tiny else EPOCHS)
        missing = [name for name in ONNX_NEEDS if importlib.util.find_spec(name) is None]
        if missing:
            print(f"skipping the ONNX rows: not installed: {', '.join(missing)}", file=sys.stderr)
        else:
            rows += onnx_rows(config, data, Path(scratch), repeats)
        return finish(rows, options)


def steps(config: ModelConfig, device: torch.device, repeats: int) -> list[Row]:
    """Return the rows `cuda_step_*`."""
    torch.manual_seed(0)
    published = PublishedStep(CMRAN(config), device=device)
    batch = [x.to(device=device, dtype=torch.float64) for x in batch_of(config)]
    actions = {"published": synced(lambda: published(*batch), 2, device)}
    precisions: tuple[Precision, ...] = ("float32", "bfloat16")
    for precision in precisions:
        for captured in (True, False):
            name = precision if captured else f"{precision}_eager"
            actions[name] = synced(our_step(config, precision, device, captured=captured), STEPS, device)
    measurements = in_turn(actions, repeats, warm_up=2)
    base = measurements.pop("published")
    floors = {precision: step_seconds(config, precision, BATCH, device) for precision in precisions}
    return [
        timed(f"cuda_step_{name}", values, floor=floors["float32" if "float32" in name else "bfloat16"], published=base)
        for name, values in measurements.items()
    ]


def epochs(config: ModelConfig, data: Path, scratch: Path, device: torch.device, count: int) -> list[Row]:
    """Return the rows of epochs and prediction, from the device and from disk, and of the start of a trial."""
    rows: list[Row] = []
    with open_folder(data, features="float16") as folder, DeviceCacheSlot() as slot:
        folder.use_feature_cache(build=True)
        train = folder.order("train")
        started = time.perf_counter()
        device_cache = (
            slot.load(folder, device, INPUTS["bfloat16"]) if device.type == "cuda" else DeviceCache(folder, device)
        )
        wait(device)
        if device_cache is None:
            print("skipping the rows with a device cache: the features do not fit on the device", file=sys.stderr)
        else:
            rows.append(_single("cuda_fill_device_cache", time.perf_counter() - started))
            rows.append(_cached_epochs(config, device_cache, train, device, count))
        train_step = _train_step(config, device)

        def stream() -> None:
            for batch in iterate(folder, train, BATCH, labels="segments", dtype=torch.bfloat16, device=device):
                assert batch.labels is not None
                train_step.step(batch.visual, batch.audio, batch.labels)

        rows.append(timed("cuda_stream_epoch", in_turn({"": synced(stream, 1, device)}, count)[""]))

        everything = np.arange(folder.videos)
        read = in_turn({"": _read_caches}, count)[""]
        rows.append(timed("cuda_read_cache", read))
        sources = {"cuda_predict_disk": None} | ({} if device_cache is None else {"cuda_predict": device_cache})
        for name, source in sources.items():

            def all_videos(source: DeviceCache | None = source) -> None:
                predict(train_step.model, folder, everything, device=device, precision="bfloat16", device_cache=source)

            measurements = in_turn({"": synced(all_videos, 1, device)}, count)[""]
            rows.append(versus(name, measurements, read, "cuda_read_cache"))
        if device_cache is not None and device.type == "cuda":
            rows.append(_single("cuda_trial_start", _trial_start(config, data, scratch, slot), "< 1 s"))
        if device.type == "cuda":
            seconds = _run(config, data, scratch, 1 if count == 1 else RUN_EPOCHS, slot)
            rows.append(_single("cuda_run_200", seconds, "< 100 s"))
    return rows


def _cached_epochs(
    config: ModelConfig, device_cache: DeviceCache, train: np.ndarray, device: torch.device, count: int
) -> Row:
    train_step = _train_step(config, device)

    def steps_alone() -> None:
        losses = []
        for batch in device_cache.iterate(train, BATCH, labels="segments", dtype=INPUTS["bfloat16"]):
            assert batch.labels is not None
            losses.append(train_step.step(batch.visual, batch.audio, batch.labels)[0])
        # Read back once at the end, as in training.
        torch.stack(losses).tolist()

    measurements = in_turn({"": synced(steps_alone, 1, device)}, count, warm_up=2)[""]
    return timed("cuda_epoch", measurements, target="<= 0.4 s")


def onnx_rows(config: ModelConfig, data: Path, scratch: Path, repeats: int) -> list[Row]:
    """Return the rows `cuda_ort_*`: float32 and float16 with inputs from the host, as in the batch job."""
    from serving.batch import predict_folder
    from serving.export import export_onnx
    from serving.session import open_session
    from serving.variants import make_variant

    torch.manual_seed(0)
    model = CMRAN(config).eval()
    base = export_onnx(model, scratch / "float32.onnx", segments=10, grid=(7, 7))
    paths = {"float32": base, "float16": make_variant(base, "float16", scratch / "float16.onnx")}
    visual, audio, _ = batch_of(config)
    with torch.no_grad():
        expected = model(visual, audio)
    actions: dict[str, Callable[[], float | None]] = {}
    differences = {}
    for name, path in paths.items():
        session = open_session(path, "cuda")
        answer = session.run(visual.numpy(), audio.numpy())
        differences[name] = float(np.abs(answer.event_logits - expected.event_logits.numpy()).max())
        actions[name] = lambda session=session: session.run(visual.numpy(), audio.numpy()) and None  # type: ignore[misc]
    rows = [timed(f"cuda_ort_{name}", values) for name, values in in_turn(actions, repeats, warm_up=3).items()]
    for name, value in differences.items():
        rows.append(Row(name=f"cuda_ort_{name}_difference", value=value, unit="logit"))
    del session
    actions.clear()
    number = itertools.count()
    files = [data / "visual_feature.h5", data / "audio_feature.h5"]

    def read_files() -> None:
        for file in files:
            read_through(file)

    jobs: dict[str, Callable[[], float | None]] = {"read": read_files}
    for name, path in paths.items():
        jobs[name] = lambda path=path: predict_folder(  # type: ignore[misc]
            path, data, scratch / f"out-{next(number)}", split="all", device="cuda", batch_size=BATCH, progress=False
        ) and None  # fmt: skip
    measurements = in_turn(jobs, min(repeats, 3))
    read = measurements.pop("read")
    return rows + [versus(f"cuda_ort_predict_{name}", values, read, "reading") for name, values in measurements.items()]


def _train_step(config: ModelConfig, device: torch.device) -> TrainStep:
    gc.collect()
    torch.manual_seed(0)
    train = TrainConfig(precision="bfloat16", batch_size=BATCH)
    return TrainStep(RunConfig(recipe="published-full", model=config, train=train), device)


class _StartedError(Exception):
    """Raised at the first step of a training, to end it there."""


def _trial_start(config: ModelConfig, data: Path, scratch: Path, slot: DeviceCacheSlot) -> float:
    """Return the seconds from the call of `fit` to its first step, with data and program warm."""
    run = RunConfig(recipe="published-full", model=config, train=TrainConfig(precision="bfloat16", epochs=1))
    first_step = 0.0

    def begin(_: object) -> None:
        nonlocal first_step
        first_step = time.perf_counter()
        raise _StartedError

    # The first run copies the features to the device.
    for number in range(2):
        started = time.perf_counter()
        with contextlib.suppress(_StartedError):
            out = scratch / f"trial-{number}"
            fit(data, run, out, device="cuda", evaluate_test=False, device_cache=slot, on_start=begin)
    return first_step - started


def _run(config: ModelConfig, data: Path, scratch: Path, epochs: int, slot: DeviceCacheSlot) -> float:
    """Return the seconds of a whole run, with data and program warm."""
    train = TrainConfig(precision="bfloat16", epochs=epochs)
    run = RunConfig(recipe="published-full", model=config, train=train)
    return fit(data, run, scratch / "run", device="cuda", device_cache=slot).seconds


def _read_caches() -> None:
    for cache in list_caches():
        read_through(cache.path)


def _single(name: str, seconds: float, target: str = "") -> Row:
    return Row(name=name, value=seconds, unit="s", target=target)


if __name__ == "__main__":
    run_program(main)
