"""The functions that a script or a notebook needs, under the names that `import cmran` offers.

Each function here adapts an existing one to interactive use: paths may be strings, devices are named by a word, and a
model may come from the MLflow registry. Shape letters: n videos, T segments of one second, K class logits (28 in fully
supervised mode, `full`; 29 in weakly supervised mode, `weak`).
"""

import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np

from cmran.config import Device, Mode, Precision, RunConfig, Split
from cmran.data.dataset import FeatureFolder, Rows
from cmran.evaluation.events import Event, events_of
from cmran.evaluation.metrics import Evaluation
from cmran.model import checkpoints
from cmran.model.network import CMRAN
from cmran.training import inference, trainer
from cmran.training.inference import Predictions
from cmran.training.run_dir import EpochRecord, FitResult
from cmran.utils.device import pick_device


def load_model(source: str | Path, mode: Mode | None = None) -> tuple[CMRAN, dict[str, Any]]:
    """Load a trained network.

    Args:
        source: A run directory (its `best.pt`), a checkpoint (`best.pt`, `last.pt`), a published `.pth.tar`, or the
            URI of a registered model (`models:/cmran-full@champion`, `models:/cmran-full/3`). For a URI, the checkpoint
            of the run that trained the version is downloaded from the MLflow store at `MLFLOW_TRACKING_URI`.
        mode: The expected mode. By default the checkpoint decides.

    Returns:
        The network in evaluation mode on the CPU, and the other content of the checkpoint: among others `mode` for a
        published file; `config`, `epoch`, `val_accuracy` (in %) and `fingerprint` of the training data for our own.

    Raises:
        CheckpointError: There is no such file, it is damaged, or it is of another mode.
        TrackingError: The MLflow store cannot be reached.
    """
    if not str(source).startswith("models:"):
        return checkpoints.load_model(Path(source), mode)
    from cmran import tracking
    from cmran.errors import CheckpointError

    run_id = tracking.resolve_model(str(source)).run_id
    if run_id is None:
        raise CheckpointError(f"{source}: the version does not name the run that trained it", "name a run directory")
    with tempfile.TemporaryDirectory(prefix="cmran-") as folder:
        return checkpoints.load_model(tracking.checkpoint_of_run(run_id, Path(folder)), mode)


def fit(
    data: str | Path,
    config: RunConfig,
    out: str | Path,
    *,
    device: Device = "auto",
    resume: bool = False,
    evaluate_test: bool = True,
    on_epoch: Callable[[EpochRecord], None] | None = None,
) -> FitResult:
    """Train on a data folder and write checkpoints and metrics to a run directory.

    Nothing is sent to MLflow; the command `cmran train` does that.

    Args:
        data: The data folder.
        config: Settings, usually from `load_config`.
        out: The run directory. It must not hold a run yet, except with `resume`.
        device: `auto` uses a GPU if there is one.
        resume: Continue an interrupted run, bit-identically on the same kind of device. Return a finished run as it is.
        evaluate_test: Evaluate the test split once, at the end.
        on_epoch: Called with the record of each epoch, after its checkpoint is on disk.

    Returns:
        The finished run: scores on val and test as dictionaries (accuracies in %), one record per epoch, duration in
        seconds.

    Raises:
        CmranError: Data that do not fit the settings, another run in `out`, a loss that is not finite, a full disk.
    """
    return trainer.fit(
        Path(data),
        config,
        Path(out),
        device=device,
        resume=resume,
        evaluate_test=evaluate_test,
        on_epoch=on_epoch,
    )


def predict(
    model: CMRAN,
    folder: FeatureFolder,
    rows: Split | Rows = "test",
    *,
    device: Device = "auto",
    precision: Precision = "float32",
    batch_size: int | None = None,
) -> Predictions:
    """Predict the segments of videos.

    Args:
        model: The network. It is moved to the device and left there, in evaluation mode.
        folder: An open data folder, see `open_folder`.
        rows: A split, or the row numbers of the videos (n,) in any order.
        device: `auto` uses a GPU if there is one.
        precision: `float32`, `float64`, `bfloat16`, or `auto` (bfloat16 if the device supports it).
        batch_size: Videos per batch. By default, what suits the device.

    Returns:
        For the n videos: `event_logits` (n, T), `event_probability` (n, T), `class_logits` (n, K), and `segments`
        (n, T), the label of each second: 0 to 27, or 28 for background.

    Raises:
        DataError: A split or row does not exist, or features are not finite.
    """
    return inference.predict(
        model,
        folder,
        _row_numbers(folder, rows),
        device=pick_device(device),
        precision=precision,
        batch_size=batch_size,
    )


def evaluate(
    model: CMRAN,
    folder: FeatureFolder,
    split: Split = "test",
    *,
    device: Device = "auto",
    precision: Precision = "float32",
    batch_size: int | None = None,
) -> Evaluation:
    """Score a network on a split: segment accuracy, events, categories, baselines and intervals.

    Args:
        model: The network. It is moved to the device and left there, in evaluation mode.
        folder: An open data folder with labels.
        split: `train`, `val` or `test`.
        device: `auto` uses a GPU if there is one.
        precision: As in `predict`.
        batch_size: Videos per batch. By default, what suits the device.

    Returns:
        All scores; `accuracy` is the published metric, in %. `to_dict()` gives plain JSON types.
    """
    evaluation, _ = inference.evaluate_split(
        model,
        folder,
        split,
        device=pick_device(device),
        precision=precision,
        batch_size=batch_size,
    )
    return evaluation


def predicted_events(predictions: Predictions) -> list[Event]:
    """Join predicted segments to events.

    Args:
        predictions: The result of `predict`.

    Returns:
        The events, in the order of the videos and of time: `row`, `category`, `start_s` and `end_s` in seconds, and
        `score`, the mean over the event of event probability x class probability. The probability of a class is the
        softmax of the class logits at their maximum, as in `segments.parquet`.
    """
    logits_nK = predictions.class_logits
    class_probability_n1 = 1.0 / np.exp(logits_nK - logits_nK.max(1, keepdims=True)).sum(1, keepdims=True)
    class_probability_nT = np.broadcast_to(class_probability_n1, predictions.segments.shape)
    return events_of(predictions.rows, predictions.segments, predictions.event_probability, class_probability_nT)


def _row_numbers(folder: FeatureFolder, rows: Split | Rows) -> Any:
    return folder.order(rows) if isinstance(rows, str) else np.asarray(rows, np.int64)
