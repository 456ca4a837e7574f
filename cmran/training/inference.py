"""Inference on a data folder: predictions for given rows, and all scores of a split."""

from contextlib import closing
from dataclasses import dataclass

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from cmran.accel.memory import reuse_memory
from cmran.config import Precision, RunConfig, Split
from cmran.data.dataset import FeatureFolder
from cmran.data.device_cache import DeviceCache
from cmran.data.faults import rows_text
from cmran.data.loader import iterate
from cmran.errors import CheckpointError, ConfigError, DataError
from cmran.evaluation.metrics import Evaluation, evaluate
from cmran.model.losses import compute_loss, predict_segments
from cmran.model.network import CMRAN
from cmran.training.step import INPUTS, WEIGHTS, compute_outputs, label_kind
from cmran.utils.device import limit_threads, pick_precision
from cmran.utils.progress import Progress

PREDICT_BATCH = {"cpu": 32, "cuda": 512}
"""Default batch size. The maps of a few videos fit the cache of a CPU; a GPU needs hundreds to be busy."""


@dataclass(frozen=True)
class Predictions:
    """The outputs of the network for n videos."""

    rows: NDArray[np.int64]
    """(n,): the rows of the data folder."""
    event_logits: NDArray[np.float64]
    """(n, T)."""
    class_logits: NDArray[np.float64]
    """(n, K)."""
    segments: NDArray[np.int64]
    """(n, T): the predicted label of each segment."""
    loss: float | None = None
    """The training loss of the mode, averaged over the rows. None: it was not requested."""

    @property
    def event_probability(self) -> NDArray[np.float64]:
        """(n, T): the probability of an event in each segment."""
        # 1 / (1 + exp(-x)), without overflow.
        return 0.5 * (1 + np.tanh(0.5 * self.event_logits))


def predict(
    model: CMRAN,
    folder: FeatureFolder,
    rows: NDArray[np.int64],
    *,
    device: torch.device | None = None,
    precision: Precision = "float32",
    batch_size: int | None = None,
    progress: bool = False,
    device_cache: DeviceCache | None = None,
    with_loss: bool = False,
) -> Predictions:
    """Predict `rows` of a data folder, in that order.

    Args:
        model: The network. It is moved to the device and left in evaluation mode.
        folder: The data folder.
        rows: Rows of the folder, (n,).
        device: None: the CPU.
        precision: Precision of the computation.
        batch_size: Videos in a batch. None: a size that fits the device.
        progress: Whether to show the progress.
        device_cache: The features of the folder on `device`, if they are cached there.
        with_loss: Whether to compute the training loss, too, which reads the labels.

    Raises:
        DataError: There are no rows, or features are not finite.
        CheckpointError: The outputs are not finite although the features are.
        DeviceError: The device does not support the precision.
    """
    device = device or torch.device("cpu")
    precision = pick_precision(precision, device)
    batch_size = batch_size or PREDICT_BATCH[device.type]
    reuse_memory()
    limit_threads()
    model = model.to(device=device, dtype=WEIGHTS[precision]).eval()
    mode = model.config.mode
    labels = label_kind(mode) if with_loss else None
    if device_cache is None:
        batches = iterate(folder, rows, batch_size, labels=labels, dtype=INPUTS[precision], device=device, reuse=True)
    else:
        batches = device_cache.iterate(rows, batch_size, labels=labels, dtype=INPUTS[precision])
    found: list[tuple[Tensor, Tensor, Tensor]] = []
    losses: list[Tensor] = []
    with (
        torch.inference_mode(),
        Progress(len(rows), "predict", "videos", enabled=progress) as bar,
        closing(batches),
    ):
        for batch in batches:
            outputs = compute_outputs(model, batch.visual, batch.audio, precision)
            found.append((outputs.event_logits, outputs.class_logits, predict_segments(outputs)))
            if batch.labels is not None:
                # Weighted, because the last batch may be shorter.
                losses.append(compute_loss(outputs, batch.labels, mode).double() * len(batch.rows))
            bar.update(len(batch.rows))
    if not found:
        raise DataError("no rows to predict", "name a split that is not empty")
    event, classes, segments = (torch.cat(parts).cpu().numpy() for parts in zip(*found, strict=True))
    bad = rows[~(np.isfinite(event).all(1) & np.isfinite(classes).all(1))]
    if bad.size:
        folder.check_finite(bad)
        raise CheckpointError(
            f"the outputs are not finite for {rows_text(bad.tolist())} although the features are: the weights of the"
            " network are damaged or too large",
            "train again, or use another checkpoint",
        )
    return Predictions(
        np.asarray(rows, np.int64),
        event.astype(np.float64),
        classes.astype(np.float64),
        segments,
        float(torch.stack(losses).sum()) / len(rows) if losses else None,
    )


def evaluate_split(
    model: CMRAN,
    folder: FeatureFolder,
    split: Split,
    *,
    device: torch.device | None = None,
    precision: Precision = "float32",
    batch_size: int | None = None,
    device_cache: DeviceCache | None = None,
) -> tuple[Evaluation, Predictions]:
    """Compute all scores of the network on a split.

    Args:
        model: The network.
        folder: The data folder.
        split: The split to evaluate.
        device: As `predict`, like the following arguments.
        precision: Precision of the computation.
        batch_size: Videos in a batch.
        device_cache: The features of the folder on `device`.

    Returns:
        The scores, and the predictions that they were computed from.

    Raises:
        CmranError: As `predict`.
    """
    rows = folder.order(split)
    predictions = predict(
        model,
        folder,
        rows,
        device=device,
        precision=precision,
        batch_size=batch_size,
        progress=True,
        device_cache=device_cache,
    )
    labels = folder.segment_labels()
    knows_videos = split == "test" and folder.annotations is not None
    leak_free = ~np.isin(rows, folder.shared_test_rows()) if knows_videos else None
    evaluation = evaluate(
        predictions.segments,
        labels[rows],
        event_probability=predictions.event_probability,
        leak_free=leak_free,
        train_labels=labels[folder.order("train")],
        video_categories=folder.video_labels()[rows],
    )
    return evaluation, predictions


def check_fits(config: RunConfig, folder: FeatureFolder) -> None:
    """Check that the feature widths of the data are those of the settings.

    Raises:
        ConfigError: They differ.
        DataError: They differ, and the axes of the data seem to be in another order.
    """
    other_axes = {"visual_features": folder.grid, "audio_features": (folder.segments,)}
    for name, found in (("visual_features", folder.visual_features), ("audio_features", folder.audio_features)):
        expected = getattr(config.model, name)
        if found == expected:
            continue
        message = f"{folder.path}: the data have {found} {name}, the settings say {expected}"
        if expected in other_axes[name]:
            raise DataError(
                f"{message}, which is the length of another axis: the axes seem to be in another order",
                "validate the folder to see the expected order",
            )
        raise ConfigError(message, f"set model.{name}: {found} in a config file, or use other data")
