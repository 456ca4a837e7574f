"""The training loop, with a full checkpoint after each epoch from which a run resumes bit-identically."""

import contextlib
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

from cmran.config import Device, InitRecord, RunConfig, Split
from cmran.data.dataset import FeatureFolder, open_folder
from cmran.data.device_cache import DeviceCacheSlot
from cmran.data.faults import FaultError
from cmran.data.loader import Batch, iterate
from cmran.data.validation import require_labels
from cmran.errors import CheckpointError, CmranError, ConfigError, DataError, DeviceError
from cmran.evaluation.metrics import evaluate
from cmran.model.checkpoints import FORMAT, load, load_model, reason_not_published
from cmran.training.checkpoint_writer import AsyncCheckpointWriter, copy_to_host, write_epoch
from cmran.training.inference import check_fits, evaluate_split, predict
from cmran.training.run_dir import (
    EpochRecord,
    FitResult,
    InitialWeights,
    prepare_run_dir,
    read_initial_weights,
    read_run,
    resumed_device,
    write_epochs_csv,
    write_result,
)
from cmran.training.step import INPUTS, TrainStep, label_kind
from cmran.utils.device import pick_device, pick_precision
from cmran.utils.files import file_lock
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
    """Train a network and write its run directory: see `cmran.training.run_dir` for the files.

    The epoch is selected on val (with `selection_split: test` on test, as published), and the test split is evaluated
    once, at the end. Early stopping (`patience`) ends a run as its last epoch does.

    A run that was killed at any moment can be resumed. On the same kind of device it ends bit-identical to an
    uninterrupted one. Only `epochs` may change, and only if the learning rates of the finished epochs do not depend on
    it. A finished run is returned as it is, without a callback.

    The full state after an epoch is written in the background while the next epoch trains.

    Args:
        data: The data folder.
        config: Settings of the run.
        out: The run directory.
        device: "auto" selects a GPU if there is one; for a resumed run, the kind of device that it was started on.
        resume: Continue the run in `out`, if there is one.
        evaluate_test: Whether to evaluate the best epoch on test.
        init: Initial weights (fine-tuning). Optimizer, schedule and random state are new all the same. The weights are
            copied into `out`, so that a resumed run does not need them again.
        device_cache: Shares the features in device memory with other runs. By default the run frees them at its end.
        on_start: Called before the first step, after data and settings have been checked, with the finished epochs of
            a resumed run. It returns the id of a tracking run, which is stored in the checkpoints, or None.
        on_epoch: Called when the files of an epoch are on disk. Exceptions of both callbacks end the run.

    Returns:
        The scores of the best epoch and the records of all epochs.

    Raises:
        ConfigError: `out` has a run (without `resume`) or another run (with it), or the settings do not fit the data.
        DataError: The data are invalid, or features are not finite.
        CheckpointError: Files of the run or the initial weights are damaged, not finite or of another network.
        DeviceError: The device or precision is not available, or its memory is too small.
        StorageError: A file cannot be written.
        BusyError: Another process is training in `out`.
    """
    started = time.monotonic()
    busy = f"{out}: another process is training in this directory: wait for it, or choose another directory"
    with contextlib.ExitStack() as stack:
        features = config.train.effective_features
        folder = stack.enter_context(open_folder(data, mode=config.model.mode, features=features))
        check_fits(config, folder)
        require_labels(data, config.model.mode)
        existing = read_run(out) if resume else None
        chosen = pick_device(resumed_device(out, existing, device))
        config = _with_precision(config, chosen)
        stack.enter_context(file_lock(out / ".lock", busy=busy))
        # The caller's random numbers are not affected.
        stack.enter_context(torch.random.fork_rng(devices=range(torch.cuda.device_count())))
        prepared = prepare_run_dir(out, config, folder, chosen, existing, init, resume)
        if isinstance(prepared, FitResult):
            return prepared
        folder.use_feature_cache(build=True)
        try:
            if device_cache is None:
                device_cache = stack.enter_context(DeviceCacheSlot())
            trainer = Trainer(folder, config, out, chosen, prepared, device_cache)
            if on_start is not None:
                trainer.run_id = on_start(list(trainer.history))
            trainer.run(on_epoch)
            return trainer.finish(evaluate_test, started)
        except (RuntimeError, MemoryError) as error:
            # On a CPU torch raises a plain RuntimeError.
            out_of_memory = isinstance(error, (torch.OutOfMemoryError, MemoryError))
            if not out_of_memory and "can't allocate memory" not in str(error):
                raise
            raise DeviceError(
                f"out of memory on {chosen}",
                f"lower train.batch_size ({config.train.batch_size}) or the widths; finished epochs are in {out}",
            ) from error


def _with_precision(config: RunConfig, device: torch.device) -> RunConfig:
    """Replace the precision "auto" by the one for this device."""
    precision = pick_precision(config.train.precision, device)
    return config.model_copy(update={"train": config.train.model_copy(update={"precision": precision})})


class Trainer:
    """The state of a training between epochs.

    Args:
        folder: The data.
        config: Settings of the run. The precision must not be "auto".
        out: The prepared run directory; a last.pt in it is resumed.
        device: Device of the training.
        init: Source of the initial weights in init.pt. None: they are random.
        device_cache: Keeps the features in device memory.
    """

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
            # Deterministic on a GPU, too. cuBLAS reads the variable at its first use.
            os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")
            torch.use_deterministic_algorithms(True)
            # No operation here reads uninitialized memory, and filling it takes a fifth of a step.
            torch.utils.deterministic.fill_uninitialized_memory = False  # type: ignore[attr-defined]
        torch.manual_seed(train.seed)
        self.train_step = TrainStep(config, device)
        self.model, self.optimizer = self.train_step.model, self.train_step.optimizer
        # Not worth it for a few batches.
        self.device_cache = (
            device_cache.load(folder, device, INPUTS[train.precision]) if train.max_batches is None else None
        )
        self.history: list[EpochRecord] = []
        self.checkpoint_writer = AsyncCheckpointWriter()
        self.run_id: str | None = None
        self.labels = folder.segment_labels()
        self.train_rows = folder.order("train")
        if config.model.mode == "weak" and train.background_videos:
            # The rows after the N videos of the folder are the background videos.
            background = folder.videos + np.arange(folder.background_videos, dtype=np.int64)
            self.train_rows = np.concatenate([self.train_rows, background])
        if (out / "last.pt").exists():
            self._restore(load(out / "last.pt"))
        elif init is not None:
            self.model.load_state_dict(read_initial_weights(out, init))
        if reason := reason_not_published(config.model):
            log.info("%s: %s", out, reason)

    def run(self, on_epoch: Callable[[EpochRecord], None] | None) -> None:
        """Train the remaining epochs. `on_epoch` is called when the files of an epoch are on disk."""
        with self.checkpoint_writer:
            self._train_epochs(on_epoch)

    def _train_epochs(self, on_epoch: Callable[[EpochRecord], None] | None) -> None:
        train = self.config.train
        done = len(self.history)
        if done:
            log.info("%s: resumed after epoch %d of %d", self.out, done, train.epochs)
        # A run may have been killed between last.pt and epochs.csv.
        write_epochs_csv(self.out, self.history, train.selection_split)
        started = time.monotonic()
        for epoch in range(done + 1, train.epochs + 1):
            if self.history and self.history[-1].out_of_patience(train):
                break
            record = self._train_epoch(epoch)
            self.checkpoint_writer.finish()
            self.history.append(record)
            self.checkpoint_writer.start(self._snapshot(record), partial(on_epoch, record) if on_epoch else None)
            left_s = (time.monotonic() - started) / (epoch - done) * (train.epochs - epoch)
            log.info(
                "epoch %d/%d: %s, %.1f s, %.0f s left", epoch, train.epochs, self._summary(), record.seconds, left_s
            )
        self.checkpoint_writer.finish()

    def _summary(self) -> str:
        """Summarize the last epoch for the log."""
        record, split = self.history[-1], self.config.train.selection_split
        words = [f"loss {record.train_loss:.4f}, lr {record.lr:.3g}"]
        for name, scores in (("val", record.val), ("test", record.test)):
            if scores is not None:
                words.append(f"{name} {scores['accuracy']:.2f} % (loss {scores['loss']:.4f})")
        if record.best_epoch is not None:
            words.append(f"best on {split} {record.best_accuracy:.2f} % (epoch {record.best_epoch})")
        return ", ".join(words)

    def finish(self, evaluate_test: bool, started: float) -> FitResult:
        """Evaluate the best epoch, on test only once, and write metrics.json. `started`: time of the start."""
        model, state = load_model(self.out / "best.pt")
        if (expected := self.history[-1].best_epoch) != state["epoch"]:
            # Killed between best.pt and last.pt of an epoch, and resumed on a machine with other rounding.
            raise CheckpointError(
                f"{self.out / 'best.pt'} is of epoch {state['epoch']}, expected {expected}: numerics differ between"
                " this machine and the one that trained that epoch",
                "train again in another directory",
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
        write_result(result)
        log.info("%s: finished: %s", self.out, result.stop_reason)
        return result

    def _train_epoch(self, epoch: int) -> EpochRecord:
        started = time.monotonic()
        train = self.config.train
        lr = train.learning_rate(epoch)
        for group in self.optimizer.param_groups:
            group["lr"] = lr
        # The order depends only on the seed and the epoch, so that a resumed run has the same.
        rows = np.random.default_rng([train.seed, epoch]).permutation(self.train_rows)
        if train.max_batches is not None:
            rows = rows[: train.max_batches * train.batch_size]
        losses, norms, correct = self._run_steps(epoch, rows)
        evaluated = train.is_evaluated(epoch)
        val = self._evaluate("val") if evaluated else None
        test = self._evaluate("test") if evaluated and train.selection_split == "test" else None
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

    def _run_steps(self, epoch: int, rows: NDArray[np.int64]) -> tuple[NDArray[Any], NDArray[Any], int | None]:
        """Train once on `rows`. Returns loss and gradient norm of each step, and the correct segments (full mode)."""
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
                # On a GPU the check is at the end of the epoch, because it waits for the device.
                if self.device.type == "cpu":
                    self._check_finite(epoch, rows, losses, norms, first=len(losses) - 1)
                if mode == "full":
                    correct += (segments == batch.labels.argmax(-1)).sum()
                # The text, which waits for a GPU, is only computed once a second.
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
        labels = label_kind(self.config.model.mode)
        dtype = INPUTS[train.precision]
        if self.device_cache is not None:
            return self.device_cache.iterate(rows, train.batch_size, labels=labels, dtype=dtype)
        return iterate(self.folder, rows, train.batch_size, labels=labels, dtype=dtype, device=self.device, reuse=True)

    def _check_finite(
        self, epoch: int, rows: NDArray[np.int64], losses: list[Tensor], norms: list[Tensor], first: int = 0
    ) -> None:
        """Raise CmranError if a loss or gradient norm from step `first` on is not finite."""
        values = torch.stack([torch.stack(losses[first:]), torch.stack(norms[first:])]).double().cpu().numpy()
        bad = np.flatnonzero(~np.isfinite(values).all(0))
        if not bad.size:
            return
        step = first + int(bad[0])
        size = self.config.train.batch_size
        batch = rows[step * size : (step + 1) * size]
        name = "loss" if not math.isfinite(values[0, bad[0]]) else "gradient norm"
        value = values[0 if name == "loss" else 1, bad[0]]
        where = f"epoch {epoch}, step {step + 1}, rows {_name_rows(batch, self.folder.videos)}"
        kind: type[CmranError] = ConfigError
        cause = "their features are finite: lower train.lr"
        try:
            self.folder.check_finite(batch)
        except FaultError as error:
            kind, cause = DataError, str(error)
        raise kind(f"{name} is {value} at {where}: {cause}; finished epochs are kept")

    def _evaluate(self, split: Split) -> dict[str, float]:
        """Compute the scores of the current weights on a split, and the training loss in evaluation mode."""
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

    def _snapshot(self, record: EpochRecord) -> Callable[[], None]:
        """Copy the current state. Returns the function that writes it."""
        epoch_state: dict[str, Any] = {
            "format": FORMAT,
            "config": self.config.model_dump(mode="json"),
            "model": copy_to_host(self.model.state_dict()),
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
        resume_state = {
            "optimizer": copy_to_host(self.optimizer.state_dict()),
            "random": random_state,
            "threads": torch.get_num_threads(),
            "history": [asdict(epoch) for epoch in self.history],
        }
        return partial(write_epoch, self.out, self.config, list(self.history), epoch_state, resume_state)

    def _restore(self, state: dict[str, Any]) -> None:
        """Continue from the content of last.pt."""
        random_state = state["random"]
        kind = "cuda" if "cuda" in random_state else "cpu"
        if kind != self.device.type:
            raise CheckpointError(f"{self.out / 'last.pt'} is of a training on {kind}, not on {self.device.type}")
        self.model.load_state_dict(state["model"])
        self.optimizer.load_state_dict(state["optimizer"])
        torch.set_rng_state(random_state["torch"])
        threads = torch.get_num_threads()
        if kind == "cpu" and state["threads"] != threads:
            log.info(
                "%s: resumed with %d threads, the run used %d: its numbers may differ in the last bits",
                self.out,
                threads,
                state["threads"],
            )
        if kind == "cuda":
            torch.cuda.set_rng_state(random_state["cuda"], self.device)
        self.history = [EpochRecord(**epoch) for epoch in state["history"]]


def _name_rows(rows: NDArray[np.int64], videos: int) -> str:
    """List row numbers; rows from `videos` on are background videos."""
    return ", ".join(str(row) if row < videos else f"{row - videos} (background videos)" for row in rows.tolist())
