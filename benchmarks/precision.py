"""Accuracy in each precision: val accuracy after training on one synthetic folder, with several seeds each.

    python -m benchmarks.precision                      # 800 videos, 3 precisions, 3 seeds, 12 epochs
    python -m benchmarks.precision --mode weak
    python -m benchmarks.precision --data data/ave --precisions bfloat16 --seeds 456

float64 reads the stored features and computes in the published precision; float32 and bfloat16 read the float16
feature cache. `ratio` is the mean best val accuracy of a precision relative to that of float64, `spread` the range
over its seeds divided by the median. The row `precision_difference` is the largest difference between the mean of a
precision and that of float64, in points of accuracy; its baseline is the range over the seeds of float64, in points.
Each run is a complete training (`cmran.training.trainer.fit`): a folder given by --out keeps the runs, and a second
call resumes them.
"""

import argparse
import os
import sys
import tempfile
from collections.abc import Sequence
from pathlib import Path

import torch

from benchmarks.report import Row, finish, parser, run_program, spread
from cmran.config import Precision, load_config
from cmran.data.dataset import open_folder
from cmran.data.synthetic import synthesize
from cmran.training.trainer import fit
from cmran.utils.device import has_bfloat16

PRECISIONS: tuple[Precision, ...] = ("float64", "float32", "bfloat16")
SEEDS = (456, 457, 458)
VIDEOS, EPOCHS = 800, 12


def main(argv: Sequence[str] | None = None) -> int:
    """Run and report."""
    found = parser("val accuracy of each precision")
    found.add_argument("--data", type=Path, metavar="DIR", help=f"data folder [default: {VIDEOS} synthetic videos]")
    found.add_argument("--mode", choices=("full", "weak"), default="full")
    found.add_argument("--precisions", nargs="+", choices=PRECISIONS, default=list(PRECISIONS), metavar="P")
    found.add_argument("--seeds", nargs="+", type=int, default=list(SEEDS), metavar="N")
    found.add_argument("--epochs", type=int, default=EPOCHS, metavar="N", help=f"[default: {EPOCHS}]")
    found.add_argument("--device", choices=("cpu", "cuda"), default="cpu", help="[default: cpu]")
    found.add_argument(
        "--out", type=Path, metavar="DIR", help="keep data and runs in this folder, and resume existing ones"
    )
    options = found.parse_args(argv)
    with tempfile.TemporaryDirectory(prefix="cmran-bench-") as scratch:
        os.environ["XDG_CACHE_HOME"] = scratch
        return finish(compare(options, options.out or Path(scratch)), options)


def compare(options: argparse.Namespace, out: Path) -> list[Row]:
    """Return one row per precision, and the difference between them."""
    data = options.data or out / "data"
    if options.data is None and not data.exists():
        if options.tiny:
            synthesize(data, videos=40, background_videos=4, grid=2, visual_features=32, progress=False)
        else:
            synthesize(data, videos=VIDEOS, background_videos=VIDEOS // 20, progress=False)
    precisions: list[Precision] = list(options.precisions)
    if "bfloat16" in precisions and not has_bfloat16(torch.device(options.device)):
        print(f"skipping bfloat16: not native on this {options.device}", file=sys.stderr)
        precisions.remove("bfloat16")
    seeds, epochs = (options.seeds[:2], 1) if options.tiny else (options.seeds, options.epochs)
    scores: dict[str, list[float]] = {precision: [] for precision in precisions}
    # Seed by seed, so that an interrupted run still compares the same seeds.
    for seed in seeds:
        for precision in precisions:
            score = _train(data, options, precision, seed, epochs, out / f"{options.mode}-{precision}-{seed}")
            print(f"{options.mode} {precision} seed {seed}: {score:.2f} %", file=sys.stderr, flush=True)
            scores[precision].append(score)
    means = {precision: sum(values) / len(values) for precision, values in scores.items()}
    base = means.get("float64")
    rows = [
        Row(
            name=f"val_accuracy_{precision}",
            value=means[precision],
            unit="%",
            ratio=None if base is None else means[precision] / base,
            against="" if base is None else "val_accuracy_float64",
            baseline=base,
            spread=spread(values),
        )
        for precision, values in scores.items()
    ]
    if base is None or len(means) < 2:
        return rows
    own = max(scores["float64"]) - min(scores["float64"])
    difference = max(abs(mean - base) for mean in means.values())
    return [
        *rows,
        Row(name="precision_difference", value=difference, unit="points", baseline=own, target=f"<= {own:.3g} points"),
    ]


def _train(data: Path, options: argparse.Namespace, precision: Precision, seed: int, epochs: int, out: Path) -> float:
    with open_folder(data, mode=options.mode) as folder:
        model = {"visual_features": folder.visual_features, "audio_features": folder.audio_features}
    if options.tiny:
        model |= {"width": 16, "feedforward": 32, "bottleneck": 8, "spatial_width": 8}
    train = {"precision": precision, "seed": seed, "epochs": epochs}
    run = load_config(options.mode, overrides={"model": model, "train": train})
    result = fit(data, run, out, device=options.device, resume=True, evaluate_test=False)
    return float(result.val["accuracy"])


if __name__ == "__main__":
    run_program(main)
