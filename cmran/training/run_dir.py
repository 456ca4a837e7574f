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

import logging
import math
from collections.abc import Callable, Mapping
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import asdict, dataclass
from pathlib import Path
from types import TracebackType
from typing import Any, Literal, Self

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
from cmran.errors import CmranError
from cmran.model.checkpoints import FORMAT, load, save
from cmran.utils.files import read_json, remove_unfinished, write_json

log = logging.getLogger(__name__)


_LOST = "put the file back, or train again into another folder"
# What can be done about a run's file that is damaged.


CHECKPOINTS = ("last.pt", "best.pt", "model_epoch_", "init.pt")
"""How the names of a run's checkpoints begin."""


EPOCHS_CSV = "epochs.csv"


_CSV_SCORES = ("loss", "accuracy", "event_precision", "event_recall", "event_f1", "mean_iou", "background_recall")


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
    # cmran.evaluation.metrics.Evaluation.to_dict() of the best epoch.
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


class ExistingRun(Frozen):
    """What a run directory says of its run (config.json)."""

    config: RunConfig
    data: Path
    # The data folder, where it was when the run was started or last resumed.
    fingerprint: str
    device: Literal["cpu", "cuda"] | None = None
    # Kind of device. None: written by a version that did not record it.
    init: InitRecord | None = None


class AsyncCheckpointWriter:
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


def read_run(run_dir: Path) -> ExistingRun | None:
    """The run that `run_dir` holds, finished or not; None where none was started there.

    Raises CmranError where config.json is damaged, or missing beside files of a run.
    """
    path = run_dir / "config.json"
    if not path.exists() and not _holds_run(run_dir):
        return None
    found = _read_json(path, "config", "data", "fingerprint")
    config = parse(RunConfig, found["config"], str(path))
    return parse(ExistingRun, found | {"config": config}, str(path))


def _holds_run(run_dir: Path) -> bool:
    """Whether there is something of a run to lose or to continue: config.json alone is left by a run that ended within
    its first epoch.
    """
    return any((run_dir / name).exists() for name in ("last.pt", "best.pt", "metrics.json"))


def _device_of(out: Path, begun: ExistingRun | None, device: Device) -> Device:
    """The device to use: that of the run that is continued, where there is one."""
    if begun is None or begun.device is None or (out / "metrics.json").exists():
        return device
    if device not in ("auto", begun.device):
        where = "on a GPU" if begun.device == "cuda" else "on the cpu"
        raise CmranError(f"{out}: the run began {where}: resume it with --device {begun.device}")
    return begun.device


def _prepare(
    out: Path,
    config: RunConfig,
    folder: FeatureFolder,
    device: torch.device,
    begun: ExistingRun | None,
    init: InitialWeights | None,
    resume: bool,
) -> FitResult | InitRecord | None:
    """Refuse or accept the folder `out`; the result where the run is finished already, else where it starts from."""
    path = out / "config.json"
    values = config.model_dump(mode="json")
    if _holds_run(out) and not resume:
        raise CmranError(f"{out} already holds a run: continue it with --resume, or name another folder")
    record = None if init is None else init.record
    if begun is not None:
        if begun.fingerprint != folder.fingerprint:
            raise CmranError(
                f"{out}: the run was made on data with fingerprint {begun.fingerprint}, {folder.path} has"
                f" {folder.fingerprint}: resume with the same data, or name another folder"
            )
        if (difference := first_difference(begun.config, config, but=["train.epochs"])) is not None:
            key, before, value = difference
            raise CmranError(
                f"{out}: the run was made with {key} {before}, now it is {value}:"
                " leave it out (a resumed run keeps its settings), or name another folder"
            )
        if record is not None and (begun.init is None or begun.init.sha256 != record.sha256):
            source = "random weights" if begun.init is None else f"{begun.init.source} (SHA-256 {begun.init.sha256})"
            raise CmranError(
                f"{out}: the run started from {source}, not from {record.source} (SHA-256 {record.sha256}):"
                " leave it out (a resumed run keeps its weights), or name another folder"
            )
        record = begun.init
        if (out / "metrics.json").exists():
            result = read_result(out)
            if config.train.epochs != result.config.train.epochs:
                raise CmranError(
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
    """Raises CmranError where the weights are not those of such a network, or not finite."""
    source = init.record.source
    if init.model.mode != model.mode:
        raise CmranError(
            f"{source}: its weights are of mode {init.model.mode} ({init.model.classes} class logits), not"
            f" {model.mode} ({model.classes}): start from a model of mode {model.mode}"
        )
    ours, theirs = (
        found.model_dump(exclude={"mode", "dropout", "visual_dropout"})
        | {"interaction_heads": found.effective_interaction_heads}
        for found in (model, init.model)
    )
    if different := [key for key, value in theirs.items() if ours[key] != value]:
        raise CmranError(
            f"{source}: its network has {', '.join(f'model.{key} {theirs[key]}' for key in different)}, the settings"
            f" say {', '.join(str(ours[key]) for key in different)}: give the source's settings, or start from another"
        )
    if bad := [key for key, value in init.weights.items() if not torch.isfinite(value).all()]:
        more = f" (and {len(bad) - 1} more)" if len(bad) > 1 else ""
        raise CmranError(f"{source}: its weights are not finite: {bad[0]}{more}: start from another checkpoint")


def _initial_weights(out: Path, record: InitRecord) -> dict[str, Tensor]:
    """The weights that the run started from. Raises CmranError where they are lost."""
    state = load(out / "init.pt")
    if state.get("init") != record.model_dump(mode="json"):
        raise CmranError(f"{out / 'init.pt'} is not what {out} was started from: {_LOST}")
    weights: dict[str, Tensor] = state["model"]
    return weights


def _check_checkpoints(out: Path, config: RunConfig, fingerprint: str) -> None:
    """Raises CmranError, before any work is done, where last.pt and best.pt are not those of one run, this one."""
    last = load(out / "last.pt")
    if "optimizer" not in last:
        raise CmranError(f"{out / 'last.pt'} is not the state of a training: {_LOST}")
    expected = last["history"][-1]["best_epoch"]
    states = {"last.pt": last}
    # Before the first evaluation there is no best epoch.
    if expected is not None or (out / "best.pt").exists():
        states["best.pt"] = load(out / "best.pt")
    for name, state in states.items():
        found = parse(RunConfig, state["config"], str(out / name))
        train = found.train.model_copy(update={"epochs": config.train.epochs})
        if (found.model, train, state["fingerprint"]) != (config.model, config.train, fingerprint):
            raise CmranError(f"{out / name} is of another run than {out}: {_LOST}")
    for record in last["history"]:
        lr = config.train.learning_rate(record["epoch"])
        if not math.isclose(record["lr"], lr, rel_tol=1e-9):
            raise CmranError(
                f"{out}: epoch {record['epoch']} was trained at learning rate {record['lr']:g}, of"
                f" {config.train.epochs} epochs it is {lr:g}: resume with {last['config']['train']['epochs']} epochs,"
                " or train again into another folder"
            )
    # best.pt is written before last.pt: a killed run may have got no further.
    best = states.get("best.pt", {"epoch": None})["epoch"]
    ahead = best == last["epoch"] + 1
    if max(last["epoch"], best if ahead else 0) > config.train.epochs:
        raise CmranError(f"{out}: the run has more epochs than the {config.train.epochs} asked for: raise --epochs")
    if not ahead and best != expected:
        raise CmranError(f"{out / 'best.pt'} is of epoch {best}, expected {expected}: {_LOST}")


def read_result(run_dir: Path) -> FitResult:
    """The result of a finished run. Raises CmranError where `run_dir` holds none."""
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
        raise CmranError(
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
        raise CmranError(f"{path} is missing: {path.parent} is no run's folder, or the run is not finished") from None


def _copied(state: Any) -> Any:
    """Dictionaries and lists with all tensors copied to the host."""
    if isinstance(state, Tensor):
        return state.detach().to("cpu", copy=True)
    if isinstance(state, dict):
        return {key: _copied(value) for key, value in state.items()}
    return [_copied(value) for value in state] if isinstance(state, list) else state
