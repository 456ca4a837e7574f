"""The files of a training run: which there are, who may resume them, and the result that they hold.

config.json     settings, data folder and fingerprint, kind of device and source of the initial weights: everything
                that a resumed run needs to know; written before the first step
init.pt         the initial weights, if they were given
last.pt         the full state after the last finished epoch
best.pt         the weights of the best epoch on the selection split
model_epoch_*   the same weights as a published checkpoint: see cmran.model.checkpoints.export_published
epochs.csv      one line for each finished epoch
metrics.json    {"val", "test", "epochs", ...}, written at the end: the run is finished if it exists
"""

import csv
import io
import logging
import math
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, Literal

import torch
from torch import Tensor

from cmran.config import (
    Device,
    Frozen,
    InitRecord,
    ModelConfig,
    RunConfig,
    TrainConfig,
    first_difference,
    parse,
)
from cmran.data.dataset import FeatureFolder
from cmran.errors import CheckpointError, ConfigError
from cmran.model.checkpoints import FORMAT, load, save
from cmran.utils.files import read_json, remove_unfinished, write_json, write_text

log = logging.getLogger(__name__)

CHECKPOINTS = ("last.pt", "best.pt", "model_epoch_", "init.pt")
"""Prefixes of the names of a run's checkpoints."""

EPOCHS_CSV = "epochs.csv"

_RESTORE = "restore the file, or train again in another directory"
"""The hint for a missing or damaged file of a run."""

_CSV_SCORES = ("loss", "accuracy", "event_precision", "event_recall", "event_f1", "mean_iou", "background_recall")


@dataclass(frozen=True, kw_only=True)
class EpochRecord:
    """The results of one epoch. Accuracies are in %."""

    epoch: int
    """Counted from 1."""
    lr: float
    """Learning rate."""
    train_loss: float
    """Mean over the training videos, with dropout."""
    train_accuracy: float | None
    """Accuracy on the training segments, with dropout. None in weak mode, which has no segment labels."""
    grad_norm: float
    """Gradient norm before clipping, mean over the steps."""
    val: dict[str, float] | None
    """Scores on val after the epoch, with the training loss in evaluation mode as "loss". None: the epoch was not
    evaluated (`TrainConfig.eval_every`)."""
    test: dict[str, float] | None
    """The same scores on test, only if the published rule selects on test."""
    seconds: float
    """Duration of the epoch."""
    best_epoch: int | None
    """The best epoch so far on the selection split. None before the first evaluation."""
    best_accuracy: float | None
    """Accuracy of the best epoch on the selection split."""
    evaluations_since_best: int = 0
    """Evaluations since the best epoch."""

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
    """Directory of the run."""
    config: RunConfig
    """Settings of the run."""
    fingerprint: str
    """Fingerprint of the data."""
    best_epoch: int
    """The epoch that was selected."""
    val: dict[str, Any]
    """Scores of the best epoch on val: `cmran.evaluation.metrics.Evaluation.to_dict()`."""
    test: dict[str, Any] | None
    """The same scores on test, which is evaluated once. None: not requested."""
    epochs: list[EpochRecord]
    """All epochs in order."""
    seconds: float
    """Duration of the last call of `fit` for the run."""
    init: InitRecord | None = None
    """Source of the initial weights. None: they were random."""

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
        """Path of the weights of the best epoch."""
        return self.run_dir / "best.pt"


@dataclass(frozen=True, kw_only=True)
class InitialWeights:
    """Weights from which a training starts instead of random ones."""

    model: ModelConfig
    """Settings of the network of the weights."""
    weights: Mapping[str, Tensor]
    """State dict of the network."""
    record: InitRecord
    """Source of the weights."""


class ExistingRun(Frozen):
    """The content of config.json."""

    config: RunConfig
    """Settings of the run."""
    data: Path
    """Data folder, at its location when the run was started or last resumed."""
    fingerprint: str
    """Fingerprint of the data."""
    device: Literal["cpu", "cuda"]
    """Kind of device."""
    init: InitRecord | None = None
    """Source of the initial weights. None: they are random."""


def read_run(run_dir: Path) -> ExistingRun | None:
    """Read which run is in a directory, finished or not. None: no run was started there.

    Raises:
        CmranError: config.json is damaged, or missing beside other files of a run.
    """
    path = run_dir / "config.json"
    if not path.exists() and not _has_progress(run_dir):
        return None
    found = _read_json(path, "config", "data", "fingerprint")
    config = parse(RunConfig, found["config"], str(path), CheckpointError)
    return parse(ExistingRun, found | {"config": config}, str(path), CheckpointError)


def read_result(run_dir: Path) -> FitResult:
    """Read the result of a finished run.

    Raises:
        CmranError: There is no finished run, or its files are damaged.
    """
    metrics = _read_json(run_dir / "metrics.json")
    existing = read_run(run_dir)
    assert existing is not None
    try:
        return FitResult(
            run_dir=run_dir,
            config=existing.config,
            fingerprint=existing.fingerprint,
            init=existing.init,
            best_epoch=metrics["best_epoch"],
            val=metrics["val"],
            test=metrics["test"],
            epochs=[EpochRecord(**epoch) for epoch in metrics["epochs"]],
            seconds=metrics["seconds"],
        )
    except (KeyError, TypeError) as error:
        raise CheckpointError(
            f"{run_dir}: its files are damaged, or of another version ({type(error).__name__}: {error})",
            "train again in another directory",
        ) from None


def write_result(result: FitResult) -> None:
    """Write metrics.json, which makes the run a finished one."""
    metrics = {
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
    write_json(result.run_dir / "metrics.json", metrics)


def write_epochs_csv(run_dir: Path, history: Sequence[EpochRecord], selection_split: str) -> None:
    """Write epochs.csv: one line per epoch, with an empty cell for a missing number and accuracies in %."""
    splits = {"val": "val"}
    if selection_split == "test":
        # These scores are marked, as everywhere.
        splits["test"] = "test_selected_on_test"
    text = io.StringIO()
    writer = csv.writer(text, lineterminator="\n")
    writer.writerow(
        ["epoch", "lr", "train_loss", "train_accuracy", "grad_norm"]
        + [f"{name}_{score}" for name in splits.values() for score in _CSV_SCORES]
        + ["best_epoch", "best_accuracy", "seconds"]
    )
    for record in history:
        # None becomes an empty cell, and a float keeps all its digits.
        writer.writerow(
            [record.epoch, record.lr, record.train_loss, record.train_accuracy, record.grad_norm]
            + [(getattr(record, split) or {}).get(score) for split in splits for score in _CSV_SCORES]
            + [record.best_epoch, record.best_accuracy, record.seconds]
        )
    write_text(run_dir / EPOCHS_CSV, text.getvalue())


def resumed_device(out: Path, existing: ExistingRun | None, device: Device) -> Device:
    """Return the device to use: an unfinished run stays on its kind of device.

    Raises:
        ConfigError: Another kind of device was requested.
    """
    if existing is None or (out / "metrics.json").exists():
        return device
    if device not in ("auto", existing.device):
        where = "on a GPU" if existing.device == "cuda" else "on the cpu"
        raise ConfigError(f"{out}: the run began {where}", f'resume it with `device` "{existing.device}"')
    return existing.device


def prepare_run_dir(
    out: Path,
    config: RunConfig,
    folder: FeatureFolder,
    device: torch.device,
    existing: ExistingRun | None,
    init: InitialWeights | None,
    resume: bool,
) -> FitResult | InitRecord | None:
    """Check that the run can be started or resumed in `out`, and write config.json.

    Args:
        out: The run directory.
        config: Settings of the run.
        folder: The data.
        device: Device of the run.
        existing: The run to resume. None: a new run is started.
        init: Initial weights. None: random, or those that the run started from.
        resume: Whether a run in `out` may be resumed.

    Returns:
        The result if the run is already finished, else the source of its initial weights (None: random).

    Raises:
        CmranError: `out` has another run, or its files are damaged.
    """
    if _has_progress(out) and not resume:
        raise ConfigError(f"{out} already holds a run", "continue it with `resume`, or choose another directory")
    record = None if init is None else init.record
    if existing is not None:
        _check_same_run(out, config, folder, existing, record)
        record = existing.init
        if (out / "metrics.json").exists():
            result = read_result(out)
            if config.train.epochs != result.config.train.epochs:
                raise ConfigError(
                    f"{out}: the run is finished with {result.config.train.epochs} epochs and was evaluated on test",
                    f"train {config.train.epochs} epochs in another directory",
                )
            log.info("%s: the run is finished already", out)
            return result
        if (out / "last.pt").exists():
            _check_checkpoints(out, config, folder.fingerprint)
        elif record is not None:
            read_initial_weights(out, record)
    elif init is not None:
        _check_initial_weights(config.model, init)
    remove_unfinished(out, "config.json", "metrics.json", EPOCHS_CSV, *CHECKPOINTS)
    if existing is None:
        (out / "init.pt").unlink(missing_ok=True)
        if init is not None:
            # A copy, because the source may be gone or changed when the run is resumed within its first epoch.
            save(
                out / "init.pt",
                {"format": FORMAT, "model": dict(init.weights), "init": init.record.model_dump(mode="json")},
            )
    write_json(
        out / "config.json",
        {
            "config": config.model_dump(mode="json"),
            "data": str(folder.path.resolve()),
            "fingerprint": folder.fingerprint,
            "device": device.type,
            "init": None if record is None else record.model_dump(mode="json"),
        },
    )
    return record


def read_initial_weights(out: Path, record: InitRecord) -> dict[str, Tensor]:
    """Read the weights that the run started from.

    Raises:
        CheckpointError: init.pt is missing, damaged or of another source.
    """
    state = load(out / "init.pt")
    if state.get("init") != record.model_dump(mode="json"):
        raise CheckpointError(f"{out / 'init.pt'} is not what the run in {out} started from", _RESTORE)
    weights: dict[str, Tensor] = state["model"]
    return weights


def _has_progress(run_dir: Path) -> bool:
    """Whether there is a finished epoch. A run that ended within its first epoch leaves only config.json."""
    return any((run_dir / name).exists() for name in ("last.pt", "best.pt", "metrics.json"))


def _check_same_run(
    out: Path, config: RunConfig, folder: FeatureFolder, existing: ExistingRun, record: InitRecord | None
) -> None:
    """Raise ConfigError if data, settings or initial weights are not those of the run that is resumed."""
    if existing.fingerprint != folder.fingerprint:
        raise ConfigError(
            f"{out}: the run was trained on data with fingerprint {existing.fingerprint}, but {folder.path} has"
            f" {folder.fingerprint}",
            "resume with the same data, or choose another directory",
        )
    if (difference := first_difference(existing.config, config, ignore=["train.epochs"])) is not None:
        key, before, after = difference
        raise ConfigError(
            f"{out}: the run was started with {key} {before}, now it is {after}",
            "omit it (a resumed run keeps its settings), or choose another directory",
        )
    if record is not None and (existing.init is None or existing.init.sha256 != record.sha256):
        source = "random weights"
        if existing.init is not None:
            source = f"{existing.init.source} (SHA-256 {existing.init.sha256})"
        raise ConfigError(
            f"{out}: the run started from {source}, not from {record.source} (SHA-256 {record.sha256})",
            "omit `init` (a resumed run keeps its weights), or choose another directory",
        )


def _check_initial_weights(model: ModelConfig, init: InitialWeights) -> None:
    """Raise CmranError if the weights are of another network or not finite."""
    source = init.record.source
    if init.model.mode != model.mode:
        raise CheckpointError(
            f"{source}: its weights are of mode {init.model.mode} ({init.model.classes} class logits), not"
            f" {model.mode} ({model.classes})",
            f"start from a model of mode {model.mode}",
        )
    ours, theirs = (
        found.model_dump(exclude={"mode", "dropout", "visual_dropout"})
        | {"interaction_heads": found.effective_interaction_heads}
        for found in (model, init.model)
    )
    if different := [key for key, value in theirs.items() if ours[key] != value]:
        raise ConfigError(
            f"{source}: its network has {', '.join(f'model.{key} {theirs[key]}' for key in different)}, the settings"
            f" say {', '.join(str(ours[key]) for key in different)}",
            "use the settings of the source, or start from another model",
        )
    if bad := [key for key, value in init.weights.items() if not torch.isfinite(value).all()]:
        more = f" (and {len(bad) - 1} more)" if len(bad) > 1 else ""
        raise CheckpointError(f"{source}: its weights are not finite: {bad[0]}{more}", "start from another checkpoint")


def _check_checkpoints(out: Path, config: RunConfig, fingerprint: str) -> None:
    """Raise CmranError, before any training, if last.pt and best.pt are not both of this run."""
    last = load(out / "last.pt")
    if "optimizer" not in last:
        raise CheckpointError(f"{out / 'last.pt'} is not the state of a training", _RESTORE)
    expected = last["history"][-1]["best_epoch"]
    states = {"last.pt": last}
    # Before the first evaluation there is no best epoch.
    if expected is not None or (out / "best.pt").exists():
        states["best.pt"] = load(out / "best.pt")
    for name, state in states.items():
        found = parse(RunConfig, state["config"], str(out / name), CheckpointError)
        train = found.train.model_copy(update={"epochs": config.train.epochs})
        if (found.model, train, state["fingerprint"]) != (config.model, config.train, fingerprint):
            raise CheckpointError(f"{out / name} is of another run than the one in {out}", _RESTORE)
    for record in last["history"]:
        lr = config.train.learning_rate(record["epoch"])
        if not math.isclose(record["lr"], lr, rel_tol=1e-9):
            raise ConfigError(
                f"{out}: epoch {record['epoch']} was trained at learning rate {record['lr']:g}, with"
                f" {config.train.epochs} epochs it is {lr:g}",
                f"resume with {last['config']['train']['epochs']} epochs, or train again in another directory",
            )
    # best.pt is written before last.pt: it may be one epoch ahead if the run was killed in between.
    best = states.get("best.pt", {"epoch": None})["epoch"]
    ahead = best == last["epoch"] + 1
    if max(last["epoch"], best if ahead else 0) > config.train.epochs:
        raise ConfigError(f"{out}: the run has more epochs than the {config.train.epochs} asked for", "raise `epochs`")
    if not ahead and best != expected:
        raise CheckpointError(f"{out / 'best.pt'} is of epoch {best}, expected {expected}", _RESTORE)


def _read_json(path: Path, *keys: str) -> dict[str, Any]:
    try:
        return read_json(path, _RESTORE, *keys)
    except FileNotFoundError:
        raise CheckpointError(
            f"{path} is missing: {path.parent} is not a run directory, or its run is not finished"
        ) from None
