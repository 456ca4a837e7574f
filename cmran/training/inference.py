"""Training and prediction: one loop, a checkpoint each epoch that holds the full state, resume bit for bit.

A run's folder:
    config.json     settings, data folder and its fingerprint, kind of device and source of the initial weights,
                    written before the first step: all that a resumed run needs to know
    init.pt         the initial weights, where they were given
    last.pt         the full state after the last finished epoch
    best.pt         the weights of the epoch that is best on the selection split
    model_epoch_*   the same weights as a published checkpoint, see cmran.model.checkpoints.export_published
    epochs.csv      one line for each finished epoch
    metrics.json    {"val", "test", "epochs", ...}, written at the end: the run is finished when it is there
"""

from contextlib import closing
from dataclasses import dataclass

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from cmran.accel.memory import reuse_memory
from cmran.config import (
    Mode,
    Precision,
    RunConfig,
    Split,
)
from cmran.data.dataset import FeatureFolder
from cmran.data.device_cache import DeviceCache
from cmran.data.faults import rows_text
from cmran.data.loader import LabelKind, iterate
from cmran.errors import CmranError
from cmran.evaluation.metrics import Evaluation, evaluate
from cmran.model.losses import compute_loss, predict_segments
from cmran.model.network import CMRAN
from cmran.training.step import INPUTS, WEIGHTS, _forward
from cmran.utils.device import limit_threads, pick_precision
from cmran.utils.progress import Progress

PREDICT_BATCH = {"cpu": 32, "cuda": 512}
"""Videos at a time in prediction: maps of a few fit a CPU's cache; a GPU computes hundreds while one is launched."""


@dataclass(frozen=True)
class Predictions:
    """The network's answer for `rows` (n,)."""

    rows: NDArray[np.int64]
    event_logits: NDArray[np.float64]  # (n, T)
    class_logits: NDArray[np.float64]  # (n, K)
    segments: NDArray[np.int64]  # (n, T)
    loss: float | None = None
    # The mode's training loss, averaged over the rows; None where it was not asked for.

    @property
    def event_probability(self) -> NDArray[np.float64]:
        """(n, T): probability of an event in each segment."""
        # The same as 1 / (1 + exp(-x)), but without overflow.
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
    """Predictions for `rows` of the folder, in that order. The model is put into evaluation mode and left there.

    `batch_size`: videos at a time; None takes what suits the device. `resident`: the folder's features on `device`,
    where they are there. `with_loss`: compute the training loss, too; it reads the labels.
    """
    device = device or torch.device("cpu")
    precision = pick_precision(precision, device)
    batch_size = batch_size or PREDICT_BATCH[device.type]
    reuse_memory()
    limit_threads()
    model = model.to(device=device, dtype=WEIGHTS[precision]).eval()
    mode = model.config.mode
    labels = _label_kind(mode) if with_loss else None
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
            outputs = _forward(model, batch.visual, batch.audio, precision)
            found.append((outputs.event_logits, outputs.class_logits, predict_segments(outputs)))
            if batch.labels is not None:
                # The mean of a batch counts as many times as it has videos.
                losses.append(compute_loss(outputs, batch.labels, mode).double() * len(batch.rows))
            bar.update(len(batch.rows))
    if not found:
        raise CmranError("no rows to predict: name a split that is not empty")
    event, classes, segments = (torch.cat(parts).cpu().numpy() for parts in zip(*found, strict=True))
    bad = rows[~(np.isfinite(event).all(1) & np.isfinite(classes).all(1))]
    if bad.size:
        folder.check_finite(bad)
        raise CmranError(
            f"the network's outputs are not finite for {rows_text(bad.tolist())}, whose features are: its weights are"
            " damaged or too large: train again, or take another checkpoint"
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
    """All scores of the network on a split, and the predictions behind them. Options as of `predict`."""
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
    clean = ~np.isin(rows, folder.shared_test_rows()) if knows_videos else None
    evaluation = evaluate(
        predictions.segments,
        labels[rows],
        event_probability=predictions.event_probability,
        leak_free=clean,
        train_labels=labels[folder.order("train")],
        video_categories=folder.video_labels()[rows],
    )
    return evaluation, predictions


def check_fits(config: RunConfig, folder: FeatureFolder) -> None:
    """Raises CmranError where the feature widths of the data are not those of the settings."""
    others = {"visual_features": folder.grid, "audio_features": (folder.segments,)}
    for name, found in (("visual_features", folder.visual_features), ("audio_features", folder.audio_features)):
        expected = getattr(config.model, name)
        if found != expected and expected in others[name]:
            raise CmranError(
                f"{folder.path}: the data have {found} {name}, the settings say {expected}, which is the length of"
                " another axis: the axes seem to be in another order; `cmran validate` names the expected one"
            )
        if found != expected:
            raise CmranError(
                f"{folder.path}: the data have {found} {name}, the settings say {expected}:"
                f" set model.{name}: {found} in a config file, or use other data"
            )


def _label_kind(mode: Mode) -> LabelKind:
    """The labels that the loss of `mode` compares with."""
    return "segments" if mode == "full" else "video"
