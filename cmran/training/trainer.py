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

import contextlib
import csv
import io
import logging
import math
import os
import time
from collections.abc import Callable, Generator
from contextlib import closing
from dataclasses import asdict
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from cmran.config import (
    Device,
    InitRecord,
    RunConfig,
    Split,
)
from cmran.data.dataset import FeatureFolder, open_folder
from cmran.data.device_cache import DeviceCacheSlot
from cmran.data.faults import FaultError
from cmran.data.loader import Batch, iterate
from cmran.data.validation import require_labels
from cmran.errors import CmranError
from cmran.evaluation.metrics import evaluate
from cmran.model.checkpoints import FORMAT, load, load_model, not_published, published_name, published_state, save
from cmran.training.inference import _label_kind, check_fits, evaluate_split, predict
from cmran.training.run_dir import (
    _CSV_SCORES,
    EPOCHS_CSV,
    AsyncCheckpointWriter,
    EpochRecord,
    FitResult,
    InitialWeights,
    _copied,
    _device_of,
    _initial_weights,
    _metrics,
    _prepare,
    read_run,
)
from cmran.training.step import INPUTS, TrainStep
from cmran.utils.device import pick_device, pick_precision
from cmran.utils.files import file_lock, write_json, write_text
from cmran.utils.progress import Progress

log = logging.getLogger(__name__)


def fit(
    data: Path,
    config: RunConfig,
    out: Path,
    *,
    device: Device = "auto",
    resume: bool = False,
    evaluate_test: bool = True,
    init: InitialWeights | None = None,
    device_cache: DeviceCacheSlot | None = None,
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

    `device_cache`: shares the features in device memory with other runs; by default they are freed when this one ends.

    Raises CmranError: `out` already holds a run (without `resume`) or another one (with it), data that do not fit the
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
        folder.use_feature_cache(build=True)
        try:
            if device_cache is None:
                device_cache = stack.enter_context(DeviceCacheSlot())
            trainer = _Trainer(folder, config, out, chosen, prepared, device_cache)
            if on_start is not None:
                trainer.run_id = on_start(list(trainer.history))
            trainer.run(on_epoch)
            return trainer.finish(evaluate_test, started)
        except (RuntimeError, MemoryError) as error:
            # What torch raises on a CPU has no class of its own.
            out_of_memory = isinstance(error, (torch.OutOfMemoryError, MemoryError))
            if not out_of_memory and "can't allocate memory" not in str(error):
                raise
            raise CmranError(
                f"out of memory on {chosen}: lower train.batch_size ({config.train.batch_size}) or the widths;"
                f" finished epochs are in {out}"
            ) from error


def _resolved(config: RunConfig, device: torch.device) -> RunConfig:
    """The settings with the precision that "auto" stands for on this device."""
    precision = pick_precision(config.train.precision, device)
    return config.model_copy(update={"train": config.train.model_copy(update={"precision": precision})})


class _Trainer:
    """The state of a run between epochs."""

    def __init__(
        self,
        folder: FeatureFolder,
        config: RunConfig,
        out: Path,
        device: torch.device,
        init: InitRecord | None,
        device_cache: DeviceCacheSlot,
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
        self.train_step = TrainStep(config, device)
        self.model, self.optimizer = self.train_step.model, self.train_step.optimizer
        # Not for the few batches of a trial run.
        self.device_cache = (
            device_cache.load(folder, device, INPUTS[train.precision]) if train.max_batches is None else None
        )
        self.history: list[EpochRecord] = []
        self.checkpoint_writer = AsyncCheckpointWriter()
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
        with self.checkpoint_writer:
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
            self.checkpoint_writer.finish()
            self.history.append(record)
            self.checkpoint_writer.begin(self._writer(record), partial(on_epoch, record) if on_epoch else None)
            left_s = (time.monotonic() - started) / (epoch - done) * (train.epochs - epoch)
            log.info("epoch %d/%d: %s, %.1f s, %.0f s left", epoch, train.epochs, self._news(), record.seconds, left_s)
        self.checkpoint_writer.finish()

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
            raise CmranError(
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
                device_cache=self.device_cache,
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
        for group in self.optimizer.param_groups:
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
                self.checkpoint_writer.poll()
                loss, norm, segments = self.train_step.step(batch.visual, batch.audio, batch.labels)
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
        if self.device_cache is not None:
            return self.device_cache.iterate(rows, train.batch_size, labels=labels, dtype=dtype)
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
        raise CmranError(
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
            device_cache=self.device_cache,
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
            "optimizer": _copied(self.optimizer.state_dict()),
            "random": random_state,
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
        self.optimizer.load_state_dict(state["optimizer"])
        torch.set_rng_state(state["random"]["torch"])
        if self.device.type == "cuda":
            if "cuda" not in state["random"]:
                raise CmranError(f"{self.out}: the run began on the cpu: resume it with --device cpu")
            torch.cuda.set_rng_state(state["random"]["cuda"], self.device)
        elif "cuda" in state["random"]:
            raise CmranError(f"{self.out}: the run began on a GPU: resume it with --device cuda")
        self.history = [EpochRecord(**epoch) for epoch in state["history"]]


def _name_rows(rows: NDArray[np.int64], videos: int) -> str:
    return ", ".join(str(row) if row < videos else f"{row - videos} (background videos)" for row in rows.tolist())
