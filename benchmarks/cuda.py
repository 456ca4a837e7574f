"""All rows of a GPU machine in one command: steps, epochs, prediction, and ONNX Runtime where it is installed.

    python -m benchmarks.cuda --json benchmarks/results/cuda.json                   # a made folder of 3339 + 804 videos
    python -m benchmarks.cuda --data data/ave --json benchmarks/results/cuda.json

Needs torch, numpy, h5py and pydantic; ONNX rows need onnxruntime-gpu, onnx, onnxscript and pyarrow, and are left out,
with a line on stderr, where these are missing. Without a CUDA device that works it says so and ends with status 1.
Times are wall times around work that ends with a synchronisation.

    cuda_step_*          a training step on a batch of 32 in the device's memory, against its floor (benchmarks.floor);
                         *_plain is the step that was not recorded as a graph
    cuda_hold            the folder's features from the pack to the device
    cuda_epoch           3339 videos, features held on the device: the epoch's steps alone
    cuda_stream_epoch    the same epoch with features streamed from the pack through pinned memory
    cuda_predict*        all videos, from features on the device, and from the pack on disk
    cuda_read_pack       the same bytes read from the pack in order: what prediction from disk is held against
    cuda_trial_start     from the call to the first step of a run whose features are on the device already
    cuda_run_200         `fit` of 200 epochs: scores on val and a checkpoint after each, scores on test at the end
    cuda_ort_*           a batch of 32 through ONNX Runtime, with the largest difference to PyTorch's outputs
    cuda_ort_predict*    the batch job on all videos, against reading the same float64 files in order
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
from benchmarks.training import BATCH, TINY, batch_of, made, our_step, synced, wait
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
"""Steps of one reading."""
EPOCHS = 5
RUN_EPOCHS = 200
ONNX_NEEDS = ("onnxruntime", "onnx", "onnxscript", "pyarrow")


def main(argv: Sequence[str] | None = None) -> int:
    """Run and report; 1 where no CUDA device works."""
    found = parser("all CUDA rows")
    found.add_argument("--data", type=Path, metavar="DIR", help="folder to use [default: one that is made, 7.7 GiB]")
    found.add_argument("--scratch", type=Path, metavar="DIR", help="for the made folder and the pack [default: TMPDIR]")
    options = found.parse_args(argv)
    if not torch.cuda.is_available():
        built = "" if torch.version.cuda else ": this torch is built without CUDA"
        print(f"no CUDA device works here{built}", file=sys.stderr)
        return 1
    config = TINY if options.tiny else ModelConfig()
    repeats = 1 if options.tiny else options.repeats
    with tempfile.TemporaryDirectory(prefix="cmran-bench-", dir=options.scratch) as scratch:
        os.environ["XDG_CACHE_HOME"] = scratch
        rows = steps(config, torch.device("cuda"), repeats)
        data = options.data or made(Path(scratch) / "data", config, 40 if options.tiny else None)
        rows += epochs(config, data, Path(scratch), torch.device("cuda"), 1 if options.tiny else EPOCHS)
        missing = [name for name in ONNX_NEEDS if importlib.util.find_spec(name) is None]
        if missing:
            print(f"ONNX rows are left out: not installed: {', '.join(missing)}", file=sys.stderr)
        else:
            rows += onnx_rows(config, data, Path(scratch), repeats)
        return finish(rows, options)


def steps(config: ModelConfig, device: torch.device, repeats: int) -> list[Row]:
    """The rows `cuda_step_*`."""
    torch.manual_seed(0)
    published = PublishedStep(CMRAN(config), device=device)
    batch = [x.to(device=device, dtype=torch.float64) for x in batch_of(config)]
    actions = {"published": synced(lambda: published(*batch), 2, device)}
    precisions: tuple[Precision, ...] = ("float32", "bfloat16")
    for precision in precisions:
        for recorded in (True, False):
            name = precision if recorded else f"{precision}_plain"
            actions[name] = synced(our_step(config, precision, device, recorded=recorded), STEPS, device)
    readings = in_turn(actions, repeats, warm_up=2)
    base = readings.pop("published")
    floors = {precision: step_seconds(config, precision, BATCH, device) for precision in precisions}
    return [
        timed(f"cuda_step_{name}", values, floor=floors["float32" if "float32" in name else "bfloat16"], published=base)
        for name, values in readings.items()
    ]


def epochs(config: ModelConfig, data: Path, scratch: Path, device: torch.device, count: int) -> list[Row]:
    """Epochs from features on the device and from the pack, prediction from both, and the start of a trial."""
    rows: list[Row] = []
    with open_folder(data, features="float16") as folder, DeviceCacheSlot() as slot:
        folder.use_feature_cache(build=True)
        train = folder.order("train")
        started = time.perf_counter()
        held = slot.load(folder, device, INPUTS["bfloat16"]) if device.type == "cuda" else DeviceCache(folder, device)
        wait(device)
        if held is None:
            print("features do not fit on the device: rows with held features are left out", file=sys.stderr)
        else:
            rows.append(_once("cuda_hold", time.perf_counter() - started))
            rows.append(_held_epochs(config, held, train, device, count))
        train_step = _learner(config, device)

        def stream() -> None:
            for batch in iterate(folder, train, BATCH, labels="segments", dtype=torch.bfloat16, device=device):
                assert batch.labels is not None
                train_step.step(batch.visual, batch.audio, batch.labels)

        rows.append(timed("cuda_stream_epoch", in_turn({"": synced(stream, 1, device)}, count)[""]))

        everything = np.arange(folder.videos)
        read = in_turn({"": _read_packs}, count)[""]
        rows.append(timed("cuda_read_pack", read))
        sources = {"cuda_predict_disk": None} | ({} if held is None else {"cuda_predict": held})
        for name, source in sources.items():

            def all_videos(source: DeviceCache | None = source) -> None:
                predict(train_step.model, folder, everything, device=device, precision="bfloat16", device_cache=source)

            readings = in_turn({"": synced(all_videos, 1, device)}, count)[""]
            rows.append(versus(name, readings, read, "cuda_read_pack"))
        if held is not None and device.type == "cuda":
            rows.append(_once("cuda_trial_start", _trial_start(config, data, scratch, slot), "< 1 s"))
        if device.type == "cuda":
            seconds = _run(config, data, scratch, 1 if count == 1 else RUN_EPOCHS, slot)
            rows.append(_once("cuda_run_200", seconds, "< 100 s"))
    return rows


def _held_epochs(config: ModelConfig, held: DeviceCache, train: np.ndarray, device: torch.device, count: int) -> Row:
    train_step = _learner(config, device)

    def steps_alone() -> None:
        losses = []
        for batch in held.iterate(train, BATCH, labels="segments", dtype=INPUTS["bfloat16"]):
            assert batch.labels is not None
            losses.append(train_step.step(batch.visual, batch.audio, batch.labels)[0])
        # As in training: read back once, at the end.
        torch.stack(losses).tolist()

    readings = in_turn({"": synced(steps_alone, 1, device)}, count, warm_up=2)[""]
    return timed("cuda_epoch", readings, target="<= 0.4 s")


def onnx_rows(config: ModelConfig, data: Path, scratch: Path, repeats: int) -> list[Row]:
    """The rows `cuda_ort_*`: float32 and float16 with inputs from the host, as the batch job gives them."""
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
    readings = in_turn(jobs, min(repeats, 3))
    read = readings.pop("read")
    return rows + [versus(f"cuda_ort_predict_{name}", values, read, "reading") for name, values in readings.items()]


def _learner(config: ModelConfig, device: torch.device) -> TrainStep:
    gc.collect()
    torch.manual_seed(0)
    train = TrainConfig(precision="bfloat16", batch_size=BATCH)
    return TrainStep(RunConfig(recipe="published-full", model=config, train=train), device)


class _BegunError(Exception):
    """Training would begin now."""


def _trial_start(config: ModelConfig, data: Path, scratch: Path, slot: DeviceCacheSlot) -> float:
    """Seconds from the call of `fit` to where training begins, with data and program warm."""
    run = RunConfig(recipe="published-full", model=config, train=TrainConfig(precision="bfloat16", epochs=1))
    begun = 0.0

    def begin(_: object) -> None:
        nonlocal begun
        begun = time.perf_counter()
        raise _BegunError

    # The first one brings the features to the device.
    for number in range(2):
        started = time.perf_counter()
        with contextlib.suppress(_BegunError):
            out = scratch / f"trial-{number}"
            fit(data, run, out, device="cuda", evaluate_test=False, device_cache=slot, on_start=begin)
    return begun - started


def _run(config: ModelConfig, data: Path, scratch: Path, epochs: int, slot: DeviceCacheSlot) -> float:
    """Seconds of a whole run, with data and program warm."""
    train = TrainConfig(precision="bfloat16", epochs=epochs)
    run = RunConfig(recipe="published-full", model=config, train=train)
    return fit(data, run, scratch / "run", device="cuda", device_cache=slot).seconds


def _read_packs() -> None:
    for pack in list_caches():
        read_through(pack.path)


def _once(name: str, seconds: float, target: str = "") -> Row:
    return Row(name=name, value=seconds, unit="s", target=target)


if __name__ == "__main__":
    run_program(main)
