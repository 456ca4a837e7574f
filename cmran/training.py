"""Training and prediction: one loop, a checkpoint each epoch that holds the full state, resume bit for bit.

A run's folder:
    config.json     settings, data folder and its fingerprint, kind of device and source of the initial weights,
                    written before the first step: all that a resumed run needs to know
    init.pt         the initial weights, where they were given
    last.pt         the full state after the last finished epoch
    best.pt         the weights of the epoch that is best on the selection split
    model_epoch_*   the same weights as a published checkpoint, see cmran.checkpoints.export_published
    epochs.csv      one line for each finished epoch
    metrics.json    {"val", "test", "epochs", ...}, written at the end: the run is finished when it is there
"""

import contextlib
import csv
import io
import logging
import math
import os
import time
from collections.abc import Callable, Generator, Mapping
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import closing
from dataclasses import asdict, dataclass
from functools import partial
from pathlib import Path
from types import TracebackType
from typing import Any, Literal, Self

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from cmran.checkpoints import FORMAT, load, load_model, not_published, published_name, published_state, save
from cmran.config import (
    Device,
    Frozen,
    InitRecord,
    Mode,
    ModelConfig,
    Precision,
    RunConfig,
    Split,
    TrainConfig,
    first_difference,
    parse,
)
from cmran.data.faults import FaultError, rows_text
from cmran.data.features import Batch, FeatureFolder, LabelKind, iterate, open_folder
from cmran.data.resident import Resident, hold
from cmran.data.validation import require_labels
from cmran.errors import UserError
from cmran.files import file_lock, read_json, remove_unfinished, write_json, write_text
from cmran.hardware import limit_threads, pick_device, pick_precision, reuse_memory
from cmran.metrics import Evaluation, evaluate
from cmran.model import CMRAN, Outputs
from cmran.objectives import compute_loss, predict_segments
from cmran.progress import Progress
from cmran.recording import RecordedStep

log = logging.getLogger(__name__)

WEIGHTS = {"float32": torch.float32, "float64": torch.float64, "bfloat16": torch.float32}
"""Dtype of the weights; bfloat16 computes in autocast over float32 ones."""
INPUTS = WEIGHTS | {"bfloat16": torch.bfloat16}
"""Dtype of features and labels. Autocast rounds the features to bfloat16 anyway; so it has less to read."""

_LOST = "put the file back, or train again into another folder"
# What can be done about a run's file that is damaged.

CHECKPOINTS = ("last.pt", "best.pt", "model_epoch_", "init.pt")
"""How the names of a run's checkpoints begin."""

EPOCHS_CSV = "epochs.csv"
_CSV_SCORES = ("loss", "accuracy", "event_precision", "event_recall", "event_f1", "mean_iou", "background_recall")

PREDICT_BATCH = {"cpu": 32, "cuda": 512}
"""Videos at a time in prediction: maps of a few fit a CPU's cache; a GPU computes hundreds while one is launched."""


@dataclass(frozen=True, kw_only=True)
class EpochRecord:
    """What one epoch gave. Accuracies in %."""

    epoch: int
    # From 1.
    lr: float
    train_loss: float
    train_accuracy: float | None
    # Of the segments, in training mode (with dropout); None in weak mode, which knows no segment labels.
    grad_norm: float
    # Mean over the steps, before clipping.
    val: dict[str, float] | None
    # Scores on val after the epoch, and "loss": the training loss in evaluation mode. None where the epoch was not
    # evaluated (TrainConfig.eval_every).
    test: dict[str, float] | None
    # The same on test, only where the published rule selects on it.
    seconds: float
    best_epoch: int | None
    # The best epoch so far, on the selection split; None before the first evaluation.
    best_accuracy: float | None
    evaluations_since_best: int = 0

    @property
    def is_best(self) -> bool:
        """Whether this epoch is the best so far."""
        return self.best_epoch == self.epoch

    def out_of_patience(self, train: TrainConfig) -> bool:
        """Whether early stopping ends the run after this epoch."""
        return train.patience is not None and self.evaluations_since_best >= train.patience


@dataclass(frozen=True, kw_only=True)
class FitResult:
    """A finished run."""

    run_dir: Path
    config: RunConfig
    fingerprint: str
    best_epoch: int
    val: dict[str, Any]
    # cmran.metrics.Evaluation.to_dict() of the best epoch.
    test: dict[str, Any] | None
    # The same on the test split, touched once; None where it was not asked for.
    epochs: list[EpochRecord]
    seconds: float
    init: InitRecord | None = None
    # Source of the initial weights; None: they were random.

    @property
    def stopped_early(self) -> bool:
        """Whether early stopping ended the run before its last epoch."""
        return len(self.epochs) < self.config.train.epochs

    @property
    def stop_reason(self) -> str:
        """Why the run ended, in words."""
        train = self.config.train
        if not self.stopped_early:
            return f"all {train.epochs} epochs are trained"
        return (
            f"early stopping after epoch {len(self.epochs)} of {train.epochs}: no better accuracy on"
            f" {train.selection_split} since epoch {self.best_epoch} (train.patience {train.patience})"
        )

    @property
    def best_checkpoint(self) -> Path:
        """Weights of the best epoch."""
        return self.run_dir / "best.pt"


@dataclass(frozen=True, kw_only=True)
class InitialWeights:
    """Weights that a training starts from instead of random ones."""

    model: ModelConfig
    # Settings of the network that they belong to.
    weights: Mapping[str, Tensor]
    # Its state dict.
    record: InitRecord


class BegunRun(Frozen):
    """What a run directory says of its run (config.json)."""

    config: RunConfig
    data: Path
    # The data folder, where it was when the run was started or last resumed.
    fingerprint: str
    device: Literal["cpu", "cuda"] | None = None
    # Kind of device. None: written by a version that did not record it.
    init: InitRecord | None = None
    # Source of the initial weights; None: they were random.


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


def fit(
    data: Path,
    config: RunConfig,
    out: Path,
    *,
    device: Device = "auto",
    resume: bool = False,
    evaluate_test: bool = True,
    init: InitialWeights | None = None,
    on_start: Callable[[list[EpochRecord]], str | None] | None = None,
    on_epoch: Callable[[EpochRecord], None] | None = None,
) -> FitResult:
    """Train on the folder `data` and leave checkpoints and metrics in `out`.

    `on_start` is called before the first step, when data and settings are found good, with the epochs that a resumed
    run has behind it; the id that it returns (of a tracking run) goes into the checkpoints. The full state after an
    epoch is written while the next one trains; `on_epoch` is called as soon as it is on disk. What either raises ends
    the run. The epoch is selected on val (or, by `selection_split: test`, as published), and the test split is
    evaluated once, at the end. Early stopping (`patience`) ends a run as its last epoch does. With `resume` a run that
    was killed at any moment goes on, and ends bit-identical to an undisturbed one on the same kind of device; a
    finished one is returned as it stands, without a call. Only `epochs` may differ then, and only where the learning
    rates of the finished epochs do not depend on it; `device` "auto" stands for the kind that the run was started on.

    `init`: the weights to start from (fine-tuning); optimizer, schedule and random state are new all the same. They are
    kept in `out`, so a resumed run does not need them again.

    Raises UserError: `out` already holds a run (without `resume`) or another one (with it), data that do not fit the
    settings, initial weights of another network or that are not finite, a loss or gradient that is not finite (with the
    rows of the batch), out of memory, out of disk.
    """
    started = time.monotonic()
    busy = f"{out}: another process trains in this folder: wait for it or name another"
    with contextlib.ExitStack() as stack:
        features = config.train.effective_features
        folder = stack.enter_context(open_folder(data, mode=config.model.mode, features=features))
        check_fits(config, folder)
        require_labels(data, config.model.mode)
        begun = read_run(out) if resume else None
        chosen = pick_device(_device_of(out, begun, device))
        config = _resolved(config, chosen)
        stack.enter_context(file_lock(out / ".lock", busy=busy))
        # What a run draws leaves the caller's random numbers as they were.
        stack.enter_context(torch.random.fork_rng(devices=range(torch.cuda.device_count())))
        prepared = _prepare(out, config, folder, chosen, begun, init, resume)
        if isinstance(prepared, FitResult):
            return prepared
        folder.use_pack(make=True)
        try:
            trainer = _Trainer(folder, config, out, chosen, prepared)
            if on_start is not None:
                trainer.run_id = on_start(list(trainer.history))
            trainer.run(on_epoch)
            return trainer.finish(evaluate_test, started)
        except (RuntimeError, MemoryError) as error:
            # What torch raises on a CPU has no class of its own.
            out_of_memory = isinstance(error, (torch.OutOfMemoryError, MemoryError))
            if not out_of_memory and "can't allocate memory" not in str(error):
                raise
            raise UserError(
                f"out of memory on {chosen}: lower train.batch_size ({config.train.batch_size}) or the widths;"
                f" finished epochs are in {out}"
            ) from error


def predict(
    model: CMRAN,
    folder: FeatureFolder,
    rows: NDArray[np.int64],
    *,
    device: torch.device | None = None,
    precision: Precision = "float32",
    batch_size: int | None = None,
    progress: bool = False,
    resident: Resident | None = None,
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
    if resident is None:
        batches = iterate(folder, rows, batch_size, labels=labels, dtype=INPUTS[precision], device=device, reuse=True)
    else:
        batches = resident.iterate(rows, batch_size, labels=labels, dtype=INPUTS[precision])
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
        raise UserError("no rows to predict: name a split that is not empty")
    event, classes, segments = (torch.cat(parts).cpu().numpy() for parts in zip(*found, strict=True))
    bad = rows[~(np.isfinite(event).all(1) & np.isfinite(classes).all(1))]
    if bad.size:
        folder.check_finite(bad)
        raise UserError(
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
    resident: Resident | None = None,
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
        resident=resident,
    )
    labels = folder.segment_labels()
    knows_videos = split == "test" and folder.annotations is not None
    clean = ~np.isin(rows, folder.shared_test_rows()) if knows_videos else None
    evaluation = evaluate(
        predictions.segments,
        labels[rows],
        event_probability=predictions.event_probability,
        clean=clean,
        train_labels=labels[folder.order("train")],
        video_categories=folder.video_labels()[rows],
    )
    return evaluation, predictions


def check_fits(config: RunConfig, folder: FeatureFolder) -> None:
    """Raises UserError where the feature widths of the data are not those of the settings."""
    others = {"visual_features": folder.grid, "audio_features": (folder.segments,)}
    for name, found in (("visual_features", folder.visual_features), ("audio_features", folder.audio_features)):
        expected = getattr(config.model, name)
        if found != expected and expected in others[name]:
            raise UserError(
                f"{folder.path}: the data have {found} {name}, the settings say {expected}, which is the length of"
                " another axis: the axes seem to be in another order; `cmran validate` names the expected one"
            )
        if found != expected:
            raise UserError(
                f"{folder.path}: the data have {found} {name}, the settings say {expected}:"
                f" set model.{name}: {found} in a config file, or use other data"
            )


def _resolved(config: RunConfig, device: torch.device) -> RunConfig:
    """The settings with the precision that "auto" stands for on this device."""
    precision = pick_precision(config.train.precision, device)
    return config.model_copy(update={"train": config.train.model_copy(update={"precision": precision})})


class Learner:
    """The network and its optimiser on one device, and the training step."""

    def __init__(self, config: RunConfig, device: torch.device) -> None:
        """`config` with the precision picked. Draws the weights from torch's generator."""
        self.config, train = config, config.train
        reuse_memory()
        limit_threads()
        self.model = CMRAN(config.model).to(device=device, dtype=WEIGHTS[train.precision])
        on_cuda = device.type == "cuda"
        self.optimiser = torch.optim.Adam(
            self.model.parameters(), lr=train.lr, weight_decay=train.weight_decay, fused=True, capturable=on_cuda
        )
        self._parameters = list(self.model.parameters())
        self._records, self._warm = on_cuda, False
        self._recorded: RecordedStep | None = None
        self._recorded_lr = math.nan

    def step(self, visual: Tensor, audio: Tensor, labels: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """One step on a batch of dtype INPUTS[precision]: its loss, gradient norm before clipping, and segments (B, T).

        All three are left on the device: nothing here waits for it. On CUDA full batches go through a recorded step,
        which does the same.
        """
        # A recording takes one shape: the last, short batch of an epoch goes without.
        if not self._records or len(visual) != self.config.train.batch_size:
            return self.plain_step(visual, audio, labels)
        # What a first step makes, such as the optimiser's state, must be there before one is recorded.
        if not self._warm:
            self._warm = True
            return self.plain_step(visual, audio, labels)
        lr = self.optimiser.param_groups[0]["lr"]
        if self._recorded is None or lr != self._recorded_lr:
            self._recorded = None
            self._recorded, self._recorded_lr = RecordedStep(self.plain_step, visual, audio, labels), lr
        loss, norm, segments = self._recorded(visual, audio, labels)
        return loss, norm, segments

    def plain_step(self, visual: Tensor, audio: Tensor, labels: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """`step`, one operation after the other."""
        train = self.config.train
        self.model.train()
        self.optimiser.zero_grad()
        outputs = _forward(self.model, visual, audio, train.precision)
        loss = compute_loss(outputs, labels, self.config.model.mode)
        loss.backward()
        norm = torch.nn.utils.clip_grad_norm_(self._parameters, train.clip_norm, foreach=True)
        self.optimiser.step()
        return loss.detach(), norm, predict_segments(outputs)


class _Aftermath:
    """What follows an epoch while the next one trains: its files are written in a thread, and only then it is told.

    A context manager: it ends when the files are written, however the training ended.
    """

    def __init__(self) -> None:
        self._thread = ThreadPoolExecutor(1, "cmran-save")
        self._under_way: tuple[Future[None], Callable[[], None] | None] | None = None

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        with self._thread:
            # Not on Ctrl-C, which wants an end.
            if kind is None or issubclass(kind, Exception):
                self.finish()

    def begin(self, write: Callable[[], None], tell: Callable[[], None] | None) -> None:
        """Start to write. Finish what was begun before, first."""
        self._under_way = self._thread.submit(write), tell

    def poll(self) -> None:
        """Tell the epoch if its files are written by now."""
        if self._under_way is not None and self._under_way[0].done():
            self.finish()

    def finish(self) -> None:
        """Wait for the files and tell the epoch. Raises what either raises."""
        if self._under_way is not None:
            (written, tell), self._under_way = self._under_way, None
            written.result()
            if tell is not None:
                tell()


class _Trainer:
    """The state of a run between epochs."""

    def __init__(
        self, folder: FeatureFolder, config: RunConfig, out: Path, device: torch.device, init: InitRecord | None
    ) -> None:
        self.folder, self.config, self.out, self.device, self.init = folder, config, out, device, init
        train = config.train
        if device.type == "cuda":
            # Seeds fix everything on a GPU too; cuBLAS asks for the variable before its first use.
            os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")
            torch.use_deterministic_algorithms(True)
            # Nothing here reads memory that it did not write: filling it first takes a fifth of a step.
            torch.utils.deterministic.fill_uninitialized_memory = False  # type: ignore[attr-defined]
        torch.manual_seed(train.seed)
        self.learner = Learner(config, device)
        self.model, self.optimiser = self.learner.model, self.learner.optimiser
        # Not for the few batches of a trial run.
        self.resident = hold(folder, device, INPUTS[train.precision]) if train.max_batches is None else None
        self.history: list[EpochRecord] = []
        self.aftermath = _Aftermath()
        self.run_id: str | None = None
        self.labels = folder.segment_labels()
        self.train_rows = folder.order("train")
        if config.model.mode == "weak" and train.background_videos:
            # Row N + j is background video j.
            background = folder.videos + np.arange(folder.background_videos, dtype=np.int64)
            self.train_rows = np.concatenate([self.train_rows, background])
        if (out / "last.pt").exists():
            self._restore(load(out / "last.pt"))
        elif init is not None:
            self.model.load_state_dict(_initial_weights(out, init))
        if reason := not_published(config.model):
            log.info("%s: %s", out, reason)

    def run(self, on_epoch: Callable[[EpochRecord], None] | None) -> None:
        with self.aftermath:
            self._run(on_epoch)

    def _run(self, on_epoch: Callable[[EpochRecord], None] | None) -> None:
        train = self.config.train
        done = len(self.history)
        if done:
            log.info("%s: resumed after epoch %d of %d", self.out, done, train.epochs)
        # A killed run may have got no further than last.pt.
        write_text(self.out / EPOCHS_CSV, self._epochs_csv())
        started = time.monotonic()
        for epoch in range(done + 1, train.epochs + 1):
            if self.history and self.history[-1].out_of_patience(train):
                break
            record = self._epoch(epoch)
            self.aftermath.finish()
            self.history.append(record)
            self.aftermath.begin(self._writer(record), partial(on_epoch, record) if on_epoch else None)
            left_s = (time.monotonic() - started) / (epoch - done) * (train.epochs - epoch)
            log.info("epoch %d/%d: %s, %.1f s, %.0f s left", epoch, train.epochs, self._news(), record.seconds, left_s)
        self.aftermath.finish()

    def _news(self) -> str:
        """The last epoch in words."""
        record, split = self.history[-1], self.config.train.selection_split
        words = [f"loss {record.train_loss:.4f}, lr {record.lr:.3g}"]
        for name, scores in (("val", record.val), ("test", record.test)):
            if scores is not None:
                words.append(f"{name} {scores['accuracy']:.2f} % (loss {scores['loss']:.4f})")
        if record.best_epoch is not None:
            words.append(f"best on {split} {record.best_accuracy:.2f} % (epoch {record.best_epoch})")
        return ", ".join(words)

    def _epochs_csv(self) -> str:
        """The epochs so far, one line each: empty where there is no number; accuracies in %."""
        splits = {"val": "val"}
        if self.config.train.selection_split == "test":
            # Marked, as everywhere.
            splits["test"] = "test_selected_on_test"
        text = io.StringIO()
        writer = csv.writer(text, lineterminator="\n")
        writer.writerow(
            ["epoch", "lr", "train_loss", "train_accuracy", "grad_norm"]
            + [f"{name}_{score}" for name in splits.values() for score in _CSV_SCORES]
            + ["best_epoch", "best_accuracy", "seconds"]
        )
        for record in self.history:
            # None becomes an empty cell, a float all its digits.
            writer.writerow(
                [record.epoch, record.lr, record.train_loss, record.train_accuracy, record.grad_norm]
                + [(getattr(record, split) or {}).get(score) for split in splits for score in _CSV_SCORES]
                + [record.best_epoch, record.best_accuracy, record.seconds]
            )
        return text.getvalue()

    def finish(self, evaluate_test: bool, started: float) -> FitResult:
        """Score the best epoch, the test split once, and write metrics.json."""
        model, state = load_model(self.out / "best.pt")
        if (expected := self.history[-1].best_epoch) != state["epoch"]:
            # Killed when the files of an epoch were half written, and resumed where numbers are rounded otherwise.
            raise UserError(
                f"{self.out / 'best.pt'} is of epoch {state['epoch']}, expected {expected}: this machine computes"
                " otherwise than the one that trained that epoch: train again into another folder"
            )
        train = self.config.train
        splits: tuple[Split, ...] = ("val", "test") if evaluate_test else ("val",)
        scores = {}
        for split in splits:
            evaluation, _ = evaluate_split(
                model,
                self.folder,
                split,
                device=self.device,
                precision=train.precision,
                batch_size=train.eval_batch_size,
                resident=self.resident,
            )
            scores[split] = evaluation.to_dict()
        result = FitResult(
            run_dir=self.out,
            config=self.config,
            fingerprint=self.folder.fingerprint,
            best_epoch=state["epoch"],
            val=scores["val"],
            test=scores.get("test"),
            epochs=self.history,
            seconds=time.monotonic() - started,
            init=self.init,
        )
        write_json(self.out / "metrics.json", _metrics(result))
        log.info("%s: finished: %s", self.out, result.stop_reason)
        return result

    def _epoch(self, epoch: int) -> EpochRecord:
        started = time.monotonic()
        train = self.config.train
        lr = train.learning_rate(epoch)
        for group in self.optimiser.param_groups:
            group["lr"] = lr
        # The order follows from seed and epoch alone.
        rows = np.random.default_rng([train.seed, epoch]).permutation(self.train_rows)
        if train.max_batches is not None:
            rows = rows[: train.max_batches * train.batch_size]
        losses, norms, correct = self._train(epoch, rows)
        evaluated = train.is_evaluated(epoch)
        val = self._scores("val") if evaluated else None
        test = self._scores("test") if evaluated and train.selection_split == "test" else None
        best_epoch, best_accuracy, since_best = None, None, 0
        if self.history:
            before = self.history[-1]
            best_epoch, best_accuracy = before.best_epoch, before.best_accuracy
            since_best = before.evaluations_since_best
        if (scores := val if test is None else test) is not None:
            if best_accuracy is None or scores["accuracy"] > best_accuracy:
                best_epoch, best_accuracy, since_best = epoch, scores["accuracy"], 0
            else:
                since_best += 1
        steps_videos = np.diff([*range(0, len(rows), train.batch_size), len(rows)])
        return EpochRecord(
            epoch=epoch,
            lr=lr,
            train_loss=float(np.average(losses, weights=steps_videos)),
            train_accuracy=None if correct is None else 100 * correct / (len(rows) * self.folder.segments),
            grad_norm=float(np.mean(norms)),
            val=val,
            test=test,
            seconds=time.monotonic() - started,
            best_epoch=best_epoch,
            best_accuracy=best_accuracy,
            evaluations_since_best=since_best,
        )

    def _train(self, epoch: int, rows: NDArray[np.int64]) -> tuple[NDArray[Any], NDArray[Any], int | None]:
        """One pass over `rows`: loss and gradient norm of each step, and the correct segments (full mode)."""
        mode = self.config.model.mode
        lr = self.config.train.learning_rate(epoch)
        losses: list[Tensor] = []
        norms: list[Tensor] = []
        correct = torch.zeros((), dtype=torch.int64, device=self.device)
        with Progress(len(rows), f"epoch {epoch}", "videos") as bar, closing(self._batches(rows)) as batches:
            for batch in batches:
                assert batch.labels is not None
                self.aftermath.poll()
                loss, norm, segments = self.learner.step(batch.visual, batch.audio, batch.labels)
                losses.append(loss)
                norms.append(norm)
                # On a GPU nothing waits for the device within an epoch: there the check comes at its end.
                if self.device.type == "cpu":
                    self._check_finite(epoch, rows, losses, norms, first=len(losses) - 1)
                if mode == "full":
                    correct += (segments == batch.labels.argmax(-1)).sum()
                # On a GPU this waits for the step, but only once a second.
                bar.update(len(batch.rows), lambda: f"loss {float(losses[-1]):.4f}, lr {lr:.3g}")
        if self.device.type != "cpu":
            self._check_finite(epoch, rows, losses, norms)
        return (
            torch.stack(losses).double().cpu().numpy(),
            torch.stack(norms).double().cpu().numpy(),
            int(correct) if mode == "full" else None,
        )

    def _batches(self, rows: NDArray[np.int64]) -> Generator[Batch]:
        train = self.config.train
        labels = _label_kind(self.config.model.mode)
        dtype = INPUTS[train.precision]
        if self.resident is not None:
            return self.resident.iterate(rows, train.batch_size, labels=labels, dtype=dtype)
        return iterate(self.folder, rows, train.batch_size, labels=labels, dtype=dtype, device=self.device, reuse=True)

    def _check_finite(
        self, epoch: int, rows: NDArray[np.int64], losses: list[Tensor], norms: list[Tensor], first: int = 0
    ) -> None:
        values = torch.stack([torch.stack(losses[first:]), torch.stack(norms[first:])]).double().cpu().numpy()
        bad = np.flatnonzero(~np.isfinite(values).all(0))
        if not bad.size:
            return
        step = first + int(bad[0])
        size = self.config.train.batch_size
        batch = rows[step * size : (step + 1) * size]
        what = "loss" if not math.isfinite(values[0, bad[0]]) else "gradient norm"
        value = values[0 if what == "loss" else 1, bad[0]]
        cause = "their features are finite: lower train.lr"
        try:
            self.folder.check_finite(batch)
        except FaultError as error:
            cause = str(error)
        raise UserError(
            f"{what} is {value} at epoch {epoch}, step {step + 1}, rows {_name_rows(batch, self.folder.videos)}:"
            f" {cause}; finished epochs are kept"
        )

    def _scores(self, split: Split) -> dict[str, float]:
        rows = self.folder.order(split)
        if self.config.train.max_batches is not None:
            rows = rows[: self.config.train.max_batches * self.config.train.batch_size]
        predictions = predict(
            self.model,
            self.folder,
            rows,
            device=self.device,
            precision=self.config.train.precision,
            batch_size=self.config.train.eval_batch_size,
            resident=self.resident,
            with_loss=True,
        )
        assert predictions.loss is not None
        evaluation = evaluate(predictions.segments, self.labels[rows], bootstrap=0)
        return evaluation.scalars() | {"loss": predictions.loss}

    def _writer(self, record: EpochRecord) -> Callable[[], None]:
        """What writes the state of now, whatever becomes of it meanwhile."""
        state: dict[str, Any] = {
            "format": FORMAT,
            "config": self.config.model_dump(mode="json"),
            "model": _copied(self.model.state_dict()),
            "fingerprint": self.folder.fingerprint,
            "data": str(self.folder.path.resolve()),
            "segments": self.folder.segments,
            "grid": list(self.folder.grid),
            "epoch": record.epoch,
            "val_accuracy": None if record.val is None else record.val["accuracy"],
            "run_id": self.run_id,
            "init": None if self.init is None else self.init.model_dump(mode="json"),
        }
        random_state: dict[str, Any] = {"torch": torch.get_rng_state()}
        if self.device.type == "cuda":
            random_state["cuda"] = torch.cuda.get_rng_state(self.device)
        full = {
            "optimiser": _copied(self.optimiser.state_dict()),
            "random": random_state,
            "threads": torch.get_num_threads(),
            "history": [asdict(epoch) for epoch in self.history],
        }
        table = self._epochs_csv()

        def write() -> None:
            # The best first: killed in between, the resumed run makes this epoch once more and writes the same again.
            if record.is_best:
                assert record.best_accuracy is not None
                save(self.out / "best.pt", state)
                published = self.out / published_name(record.epoch, record.best_accuracy)
                if weights := published_state(state["model"], self.config.model):
                    save(published, weights)
                for older in self.out.glob("model_epoch_*_best_model.pth.tar"):
                    if older != published:
                        older.unlink()
            save(self.out / "last.pt", state | full)
            write_text(self.out / EPOCHS_CSV, table)

        return write

    def _restore(self, state: dict[str, Any]) -> None:
        self.model.load_state_dict(state["model"])
        self.optimiser.load_state_dict(state["optimiser"])
        torch.set_rng_state(state["random"]["torch"])
        threads = torch.get_num_threads()
        if self.device.type == "cpu" and state.get("threads", threads) != threads:
            log.info(
                "%s: resumed with %d threads, the run used %d: its numbers may differ in the last bits",
                self.out,
                threads,
                state["threads"],
            )
        if self.device.type == "cuda":
            if "cuda" not in state["random"]:
                raise UserError(f"{self.out}: the run began on the cpu: resume it with --device cpu")
            torch.cuda.set_rng_state(state["random"]["cuda"], self.device)
        elif "cuda" in state["random"]:
            raise UserError(f"{self.out}: the run began on a GPU: resume it with --device cuda")
        self.history = [EpochRecord(**epoch) for epoch in state["history"]]


def read_run(run_dir: Path) -> BegunRun | None:
    """The run that `run_dir` holds, finished or not; None where none was started there.

    Raises UserError where config.json is damaged, or missing beside files of a run.
    """
    path = run_dir / "config.json"
    if not path.exists() and not _holds_run(run_dir):
        return None
    found = _read_json(path, "config", "data", "fingerprint")
    config = parse(RunConfig, found["config"], str(path))
    return parse(BegunRun, found | {"config": config}, str(path))


def _holds_run(run_dir: Path) -> bool:
    """Whether there is something of a run to lose or to continue: config.json alone is left by a run that ended within
    its first epoch.
    """
    return any((run_dir / name).exists() for name in ("last.pt", "best.pt", "metrics.json"))


def _device_of(out: Path, begun: BegunRun | None, device: Device) -> Device:
    """The device to use: that of the run that is continued, where there is one."""
    if begun is None or begun.device is None or (out / "metrics.json").exists():
        return device
    if device not in ("auto", begun.device):
        where = "on a GPU" if begun.device == "cuda" else "on the cpu"
        raise UserError(f"{out}: the run began {where}: resume it with --device {begun.device}")
    return begun.device


def _prepare(
    out: Path,
    config: RunConfig,
    folder: FeatureFolder,
    device: torch.device,
    begun: BegunRun | None,
    init: InitialWeights | None,
    resume: bool,
) -> FitResult | InitRecord | None:
    """Refuse or accept the folder `out`; the result where the run is finished already, else where it starts from."""
    path = out / "config.json"
    values = config.model_dump(mode="json")
    if _holds_run(out) and not resume:
        raise UserError(f"{out} already holds a run: continue it with --resume, or name another folder")
    record = None if init is None else init.record
    if begun is not None:
        if begun.fingerprint != folder.fingerprint:
            raise UserError(
                f"{out}: the run was made on data with fingerprint {begun.fingerprint}, {folder.path} has"
                f" {folder.fingerprint}: resume with the same data, or name another folder"
            )
        if (difference := first_difference(begun.config, config, but=["train.epochs"])) is not None:
            key, before, value = difference
            raise UserError(
                f"{out}: the run was made with {key} {before}, now it is {value}:"
                " leave it out (a resumed run keeps its settings), or name another folder"
            )
        if record is not None and (begun.init is None or begun.init.sha256 != record.sha256):
            source = "random weights" if begun.init is None else f"{begun.init.source} (SHA-256 {begun.init.sha256})"
            raise UserError(
                f"{out}: the run started from {source}, not from {record.source} (SHA-256 {record.sha256}):"
                " leave it out (a resumed run keeps its weights), or name another folder"
            )
        record = begun.init
        if (out / "metrics.json").exists():
            result = read_result(out)
            if config.train.epochs != result.config.train.epochs:
                raise UserError(
                    f"{out}: the run is finished with {result.config.train.epochs} epochs and its test split is spent:"
                    f" train {config.train.epochs} epochs in another folder"
                )
            log.info("%s: the run is finished already", out)
            return result
        if (out / "last.pt").exists():
            _check_checkpoints(out, config, folder.fingerprint)
        elif record is not None:
            _initial_weights(out, record)
    elif init is not None:
        _check_initial(config.model, init)
    remove_unfinished(out, path.name, "metrics.json", EPOCHS_CSV, *CHECKPOINTS)
    if begun is None:
        (out / "init.pt").unlink(missing_ok=True)
        if init is not None:
            # Kept: the source may be gone or changed when the run is resumed within its first epoch.
            save(
                out / "init.pt",
                {"format": FORMAT, "model": dict(init.weights), "init": init.record.model_dump(mode="json")},
            )
    write_json(
        path,
        {
            "config": values,
            "data": str(folder.path.resolve()),
            "fingerprint": folder.fingerprint,
            "device": device.type,
            "init": None if record is None else record.model_dump(mode="json"),
        },
    )
    return record


def _check_initial(model: ModelConfig, init: InitialWeights) -> None:
    """Raises UserError where the weights are not those of such a network, or not finite."""
    source = init.record.source
    if init.model.mode != model.mode:
        raise UserError(
            f"{source}: its weights are of mode {init.model.mode} ({init.model.classes} class logits), not"
            f" {model.mode} ({model.classes}): start from a model of mode {model.mode}"
        )
    ours, theirs = (
        found.model_dump(exclude={"mode", "dropout", "visual_dropout"})
        | {"interaction_heads": found.effective_interaction_heads}
        for found in (model, init.model)
    )
    if different := [key for key, value in theirs.items() if ours[key] != value]:
        raise UserError(
            f"{source}: its network has {', '.join(f'model.{key} {theirs[key]}' for key in different)}, the settings"
            f" say {', '.join(str(ours[key]) for key in different)}: give the source's settings, or start from another"
        )
    if bad := [key for key, value in init.weights.items() if not torch.isfinite(value).all()]:
        more = f" (and {len(bad) - 1} more)" if len(bad) > 1 else ""
        raise UserError(f"{source}: its weights are not finite: {bad[0]}{more}: start from another checkpoint")


def _initial_weights(out: Path, record: InitRecord) -> dict[str, Tensor]:
    """The weights that the run started from. Raises UserError where they are lost."""
    state = load(out / "init.pt")
    if state.get("init") != record.model_dump(mode="json"):
        raise UserError(f"{out / 'init.pt'} is not what {out} was started from: {_LOST}")
    weights: dict[str, Tensor] = state["model"]
    return weights


def _check_checkpoints(out: Path, config: RunConfig, fingerprint: str) -> None:
    """Raises UserError, before any work is done, where last.pt and best.pt are not those of one run, this one."""
    last = load(out / "last.pt")
    if "optimiser" not in last:
        raise UserError(f"{out / 'last.pt'} is not the state of a training: {_LOST}")
    expected = last["history"][-1]["best_epoch"]
    states = {"last.pt": last}
    # Before the first evaluation there is no best epoch.
    if expected is not None or (out / "best.pt").exists():
        states["best.pt"] = load(out / "best.pt")
    for name, state in states.items():
        found = parse(RunConfig, state["config"], str(out / name))
        train = found.train.model_copy(update={"epochs": config.train.epochs})
        if (found.model, train, state["fingerprint"]) != (config.model, config.train, fingerprint):
            raise UserError(f"{out / name} is of another run than {out}: {_LOST}")
    for record in last["history"]:
        lr = config.train.learning_rate(record["epoch"])
        if not math.isclose(record["lr"], lr, rel_tol=1e-9):
            raise UserError(
                f"{out}: epoch {record['epoch']} was trained at learning rate {record['lr']:g}, of"
                f" {config.train.epochs} epochs it is {lr:g}: resume with {last['config']['train']['epochs']} epochs,"
                " or train again into another folder"
            )
    # best.pt is written before last.pt: a killed run may have got no further.
    best = states.get("best.pt", {"epoch": None})["epoch"]
    ahead = best == last["epoch"] + 1
    if max(last["epoch"], best if ahead else 0) > config.train.epochs:
        raise UserError(f"{out}: the run has more epochs than the {config.train.epochs} asked for: raise --epochs")
    if not ahead and best != expected:
        raise UserError(f"{out / 'best.pt'} is of epoch {best}, expected {expected}: {_LOST}")


def read_result(run_dir: Path) -> FitResult:
    """The result of a finished run. Raises UserError where `run_dir` holds none."""
    metrics = _read_json(run_dir / "metrics.json")
    begun = read_run(run_dir)
    assert begun is not None
    try:
        return FitResult(
            run_dir=run_dir,
            config=begun.config,
            fingerprint=begun.fingerprint,
            init=begun.init,
            best_epoch=metrics["best_epoch"],
            val=metrics["val"],
            test=metrics["test"],
            epochs=[EpochRecord(**epoch) for epoch in metrics["epochs"]],
            seconds=metrics["seconds"],
        )
    except (KeyError, TypeError) as error:
        raise UserError(
            f"{run_dir}: its files are damaged, or of another version ({type(error).__name__}: {error}):"
            " train again into another folder"
        ) from None


def _metrics(result: FitResult) -> dict[str, Any]:
    return {
        "mode": result.config.model.mode,
        "recipe": result.config.recipe,
        "fingerprint": result.fingerprint,
        "selection_split": result.config.train.selection_split,
        "best_epoch": result.best_epoch,
        "stopped_early": result.stopped_early,
        "stop_reason": result.stop_reason,
        "val": result.val,
        "test": result.test,
        "epochs": [asdict(epoch) for epoch in result.epochs],
        "seconds": result.seconds,
    }


def _read_json(path: Path, *keys: str) -> dict[str, Any]:
    try:
        return read_json(path, _LOST, *keys)
    except FileNotFoundError:
        raise UserError(f"{path} is missing: {path.parent} is no run's folder, or the run is not finished") from None


def _forward(model: CMRAN, visual: Tensor, audio: Tensor, precision: Precision) -> Outputs:
    if precision != "bfloat16":
        outputs: Outputs = model(visual, audio)
        return outputs
    with torch.autocast(visual.device.type, torch.bfloat16):
        outputs = model(visual, audio)
    # Losses and decisions in float32.
    return Outputs(outputs.event_logits.float(), outputs.class_logits.float())


def _label_kind(mode: Mode) -> LabelKind:
    """The labels that the loss of `mode` compares with."""
    return "segments" if mode == "full" else "video"


def _copied(state: Any) -> Any:
    """Dictionaries and lists with all tensors copied to the host."""
    if isinstance(state, Tensor):
        return state.detach().to("cpu", copy=True)
    if isinstance(state, dict):
        return {key: _copied(value) for key, value in state.items()}
    return [_copied(value) for value in state] if isinstance(state, list) else state


def _name_rows(rows: NDArray[np.int64], videos: int) -> str:
    return ", ".join(str(row) if row < videos else f"{row - videos} (background videos)" for row in rows.tolist())
