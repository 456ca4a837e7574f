"""Inference through ONNX Runtime on the CPU: `ort_*`, `latency_*` and `predict_wall`.

    python -m benchmarks.inference                      # random weights, a synthetic folder of 1024 videos
    python -m benchmarks.inference --data data/ave      # the published size
    python -m benchmarks.inference --model FILE.onnx    # an exported model; with --data also int8 on its val videos

`ort_float32`: a batch of 32 videos, as the batch job runs it. Its floor is the matrix products of the network, at the
better of PyTorch's rates (`benchmarks.floor`) and ONNX Runtime's rate for the product over the cells of a micro-batch.
`ort_int8`: the same batch relative to `ort_float32`. For information, the published forward pass in float64 is measured
in alternation, through PyTorch. `latency_*`: one video; the floor is that of the float32 products.

`predict_wall`: the batch job on all videos of a folder, including opening and Parquet files. Its floor is the larger of
reading the same bytes sequentially and of computing as many videos with everything in memory. Before each measurement
the pages of the file are dropped from the page cache (`predict_wall`), or the file is read first
(`predict_wall_cached`). The read alone (`predict_read`) works like the job: sequentially, and the pages of a file that
was not in memory are dropped behind the reader. `int8_equal_segments` is the share that a release requires.
"""

import itertools
import os
import tempfile
import time
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from pathlib import Path

import h5py
import numpy as np
import onnx
import torch

from benchmarks.floor import least_seconds, product_seconds, products
from benchmarks.published import Published
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
    versus,
)
from cmran.config import ModelConfig, Variant
from cmran.data.dataset import open_folder
from cmran.model.network import CMRAN
from cmran.utils.device import usable_cpus
from serving.batch import predict_folder
from serving.export import export_onnx
from serving.session import MICRO_BATCH, Session, bare_session, open_session
from serving.variants import MIN_EQUAL_SEGMENTS, check_variant, make_variant

BATCH = 32
CPU = torch.device("cpu")
LATENCY_RUNS = 30
"""Videos per latency measurement, which is their median."""
VIDEOS = 1024
LATENCY_TARGETS = {"float32": "< 4 ms", "int8": "< 2 ms"}

Models = dict[Variant, Path]


def main(argv: Sequence[str] | None = None) -> int:
    """Run and report."""
    found = parser("ort_float32, ort_int8, latency_float32, latency_int8, predict_wall")
    found.add_argument("--data", type=Path, metavar="DIR", help="data folder [default: a synthetic one]")
    found.add_argument("--model", type=Path, metavar="FILE", help="exported float32 model [default: random weights]")
    found.add_argument("--videos", type=int, metavar="N", help=f"videos of the synthetic folder [default: {VIDEOS}]")
    found.add_argument("--no-predict", action="store_true", help="skip predict_wall")
    options = found.parse_args(argv)
    repeats = 1 if options.tiny else options.repeats
    with tempfile.TemporaryDirectory(prefix="cmran-bench-") as name:
        scratch = Path(name)
        # A separate cache: leave the user's cache untouched.
        os.environ["XDG_CACHE_HOME"] = name
        network = CMRAN(ModelConfig()).eval()
        models = _models(network, options.model, scratch)
        rows = _batches(network, models, scratch, repeats, tiny=options.tiny)
        rows += _latencies(network, models, repeats)
        if options.model is not None and options.data is not None:
            rows.append(_equal_segments(models, options.data))
        if not options.no_predict:
            data = options.data or _noise_folder(scratch / "data", 8 if options.tiny else options.videos or VIDEOS)
            rows += _predict(models, data, scratch, min(repeats, 3))
        return finish(rows, options)


def _models(network: CMRAN, given: Path | None, scratch: Path) -> Models:
    base = given or export_onnx(network, scratch / "float32.onnx", segments=10, grid=(7, 7))
    return {"float32": base, "int8": make_variant(base, "int8", scratch / "int8.onnx")}


def _features(videos: int) -> tuple[np.ndarray, np.ndarray]:
    """Return visual maps and audio in float32, as sparse as AVE."""
    rng = np.random.default_rng(0)
    visual = np.maximum(rng.standard_normal((videos, 10, 7, 7, 512), np.float32) - 1.08, 0)
    audio = np.maximum(rng.standard_normal((videos, 10, 128), np.float32) - 0.39, 0)
    return visual, audio


def _batches(network: CMRAN, models: Models, scratch: Path, repeats: int, *, tiny: bool) -> list[Row]:
    videos = 2 if tiny else BATCH
    visual, audio = _features(videos)
    published = Published(network).eval()
    doubles = torch.from_numpy(visual).double(), torch.from_numpy(audio).double()
    sessions = {variant: open_session(path, "cpu", purpose="throughput") for variant, path in models.items()}

    def eager() -> None:
        with torch.inference_mode():
            published(*doubles)

    # Three runs per measurement: a single short run would be dominated by one interruption.
    actions = {"published": eager} | {
        variant: _three_runs(session, visual, audio) for variant, session in sessions.items()
    }
    measurements = in_turn(actions, repeats, warm_up=2)
    needed, published_s = products(network.config, videos, training=False), measurements["published"]
    operations = sum(product.operations for product in needed)
    floor = min(product_seconds(needed, torch.float32, CPU), operations / _runtime_rate(network.config, scratch))
    return [
        timed("ort_float32", measurements["float32"], floor=floor, published=published_s, target="<= 1.1x"),
        versus(
            "ort_int8",
            measurements["int8"],
            measurements["float32"],
            "ort_float32",
            target=">= 2.5x",
            published=published_s,
        ),
    ]


def _runtime_rate(config: ModelConfig, scratch: Path) -> float:
    """Return ONNX Runtime's float32 operations per second on all CPUs: one product of a micro-batch's cells on each."""
    rows, width, cpus = MICRO_BATCH["float32"] * 10 * 49, config.visual_features, usable_cpus()
    helper = onnx.helper
    x_info, y_info = (helper.make_tensor_value_info(name, onnx.TensorProto.FLOAT, [rows, width]) for name in "xy")
    weight = onnx.numpy_helper.from_array(np.full((width, width), 1e-3, np.float32), "w")
    graph = helper.make_graph([helper.make_node("MatMul", ["x", "w"], ["y"])], "product", [x_info], [y_info], [weight])
    model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 20)], ir_version=10)
    path = scratch / "product.onnx"
    onnx.save(model, path)
    session, _ = bare_session(path, "cpu", threads=1)
    x = np.ones((rows, width), np.float32)
    with ThreadPoolExecutor(cpus) as pool:

        def everywhere() -> None:
            list(pool.map(lambda _: session.run(None, {"x": x}), range(cpus)))

        seconds = least_seconds(everywhere, CPU)
    return 2 * rows * width * width * cpus / seconds


def _three_runs(session: Session, visual: np.ndarray, audio: np.ndarray) -> Callable[[], float]:
    def run() -> float:
        started = time.perf_counter()
        for _ in range(3):
            session.run(visual, audio)
        return (time.perf_counter() - started) / 3

    return run


def _latencies(network: CMRAN, models: Models, repeats: int) -> list[Row]:
    visual, audio = _features(1)
    floor = product_seconds(products(network.config, 1, training=False), torch.float32, CPU)

    def median_latency(session: Session) -> float:
        taken = []
        for _ in range(LATENCY_RUNS):
            started = time.perf_counter()
            session.run(visual, audio)
            taken.append(time.perf_counter() - started)
        return median(taken)

    rows = []
    # One session at a time: the threads of an idle session could spin beside those of the other.
    for variant, path in models.items():
        session = open_session(path, "cpu", purpose="latency")
        measurements = in_turn({"latency": lambda session=session: median_latency(session)}, repeats)["latency"]  # type: ignore[misc]
        rows.append(
            timed(
                f"latency_{variant}",
                measurements,
                floor=floor if variant == "float32" else None,
                target=LATENCY_TARGETS[variant],
                unit="ms",
                scale=1000,
            )
        )
    return rows


def _equal_segments(models: Models, data: Path) -> Row:
    with open_folder(data) as folder:
        rows = folder.order("val")
        parts = (rows[start : start + BATCH] for start in range(0, len(rows), BATCH))
        batches = ((folder.read_visual(part), folder.read_audio(part)) for part in parts)
        parity = check_variant(models["int8"], models["float32"], batches)
    share = 100 * (parity.equal_segments or 0.0)
    return Row(name="int8_equal_segments", value=share, unit="%", target=f">= {100 * MIN_EQUAL_SEGMENTS:g} %")


def _predict(models: Models, data: Path, scratch: Path, repeats: int) -> list[Row]:
    files = (data / "visual_feature.h5", data / "audio_feature.h5")
    with open_folder(data, need_labels=False) as folder:
        videos = folder.videos
        # As after a validation: later calls find it in the cache.
        assert folder.fingerprint
    visual, audio = _features(min(BATCH, videos))
    number = itertools.count()
    sessions = {variant: open_session(path, "cpu", purpose="throughput") for variant, path in models.items()}

    def settle(cached: bool) -> None:
        for file in files:
            (read_through if cached else evict_from_page_cache)(file)

    def read(cached: bool) -> float:
        settle(cached)
        started = time.perf_counter()
        for file in files:
            read_through(file, keep=cached)
        return time.perf_counter() - started

    def compute(variant: Variant) -> float:
        started = time.perf_counter()
        waiting: list[Callable[[], object]] = []
        for start in range(0, videos, BATCH):
            size = min(BATCH, videos - start)
            waiting.append(sessions[variant].start(visual[:size], audio[:size]))
            if len(waiting) == 2:
                waiting.pop(0)()
        for wait in waiting:
            wait()
        return time.perf_counter() - started

    def predict(variant: Variant, cached: bool) -> float:
        settle(cached)
        started = time.perf_counter()
        out = scratch / f"out-{next(number)}"
        predict_folder(models[variant], data, out, split="all", device="cpu", batch_size=BATCH, progress=False)
        return time.perf_counter() - started

    rows = []
    for cached in (False, True):
        actions: dict[str, Callable[[], float]] = {"read": partial(read, cached)}
        for variant in models:
            actions[f"compute {variant}"] = partial(compute, variant)
            actions[f"predict {variant}"] = partial(predict, variant, cached)
        measurements = in_turn(actions, repeats, warm_up=0 if repeats == 1 else 1)
        for variant in models:
            floor = max(measurements["read"], measurements[f"compute {variant}"], key=median)
            name = "predict_wall" + ("" if variant == "float32" else f"_{variant}") + ("_cached" if cached else "")
            target = "<= 1.25x" if name == "predict_wall" else ""
            rows.append(timed(name, measurements[f"predict {variant}"], floor=median(floor), target=target))
        rows.append(timed("predict_read" + ("_cached" if cached else ""), measurements["read"]))
    return rows


def _noise_folder(path: Path, videos: int) -> Path:
    """Write features only, in float64 as published: the same few videos repeated."""
    path.mkdir()
    visual, audio = _features(min(BATCH, videos))
    for name, values in (("visual_feature.h5", visual), ("audio_feature.h5", audio)):
        with h5py.File(path / name, "w") as file:
            data = file.create_dataset("avadataset", (videos, *values.shape[1:]), "float64")
            for start in range(0, videos, len(values)):
                part = values[: min(len(values), videos - start)]
                data[start : start + len(part)] = part
    return path


if __name__ == "__main__":
    run_program(main)
