"""`train`: train CMRAN and log the run to MLflow."""

import contextlib
import logging
from collections.abc import Iterator
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

from pydantic import Field, model_validator

from cmran import tracking
from cmran.config import InitRecord, RunConfig, Seed
from cmran.errors import CheckpointError
from cmran.utils.files import write_json
from flows.jobs.common import (
    PARENT_HELP,
    SELECTION_HELP,
    MarkdownResult,
    RunId,
    SingleModeParameters,
    data_folder,
    marked,
    paragraphs,
    require_fields,
    resolve_config,
    resumed_config,
    score_metrics,
    split_heading,
)
from flows.jobs.models import RUN_FILE, run_of_folder

if TYPE_CHECKING:
    from cmran.data.device_cache import DeviceCacheSlot
    from cmran.training.run_dir import EpochRecord, FitResult

log = logging.getLogger(__name__)

COMPLETE = "cmran.complete"
"""Tag of the MLflow run of a training run whose scores and artifacts have all arrived."""


class TrainParameters(SingleModeParameters):
    """Train CMRAN. The best epoch on val is kept; test is evaluated once at the end."""

    out: Path = Field(description="Run directory: last.pt, best.pt, metrics.json and more.")
    init: str | None = Field(
        None,
        min_length=1,
        description="Initialize the weights from this model: a run directory, a checkpoint, a published .pth.tar, an "
        "MLflow run or models:/NAME@ALIAS. Optimizer and schedule start fresh.",
    )
    seed: Seed | None = Field(None, description="Random seed of weights, order and dropout, instead of the recipe's.")
    selection_split: Literal["val", "test"] | None = Field(None, description=SELECTION_HELP)
    resume: bool = Field(
        False,
        description="Continue the run in OUT, with the same result as without the interruption. OUT alone is enough; "
        "other options must match the run, except for the number of epochs.",
    )
    parent_run_id: RunId | None = Field(None, description=PARENT_HELP)

    @model_validator(mode="before")
    @classmethod
    def _check_needed(cls, values: Any) -> Any:
        return require_fields(values, "data", "mode")

    short = (*SingleModeParameters.short, "seed", "selection_split")


@dataclass(frozen=True, kw_only=True)
class TrainResult(MarkdownResult):
    """A finished training run."""

    fit: "FitResult"
    run_id: str
    ok: bool = True

    def markdown(self) -> str:
        """Return the scores on val and test."""
        from cmran.evaluation.tables import scores_table
        from flows.jobs.models import init_note

        fit, mode, selection = self.fit, self.fit.config.model.mode, self.fit.config.train.selection_split
        scores = {"val": fit.val} if fit.test is None else {"val": fit.val, "test": fit.test}
        lines = [
            f"# Training, {mode}: {fit.run_dir}",
            f"Best epoch: {fit.best_epoch} of {len(fit.epochs)} (recipe {fit.config.recipe}, "
            f"{fit.seconds:.1f} s, data `{fit.fingerprint}`)",
            *([f"Ended by {fit.stop_reason}"] if fit.stopped_early else []),
            *([] if fit.init is None else [init_note(fit.init)]),
            *(
                f"{split_heading(split, selection)}\n\n{scores_table(found, selection_split=selection)}"
                for split, found in scores.items()
            ),
            f"MLflow run {self.run_id}; checkpoint {fit.best_checkpoint}",
        ]
        return paragraphs(lines)


def run(parameters: TrainParameters, *, run_id: str | None = None) -> TrainResult:
    """Train, and log the run to MLflow.

    The tracking store is checked first: if it cannot be reached, nothing is started. If it fails during training,
    training continues; the missing epochs are logged with the next epoch that succeeds, or after `resume`.

    With `resume`, everything that is not given comes from the run in `out`, and what is given must match it.

    Args:
        parameters: What to train, and where.
        run_id: Adopted MLflow run; None opens a new one.

    Raises:
        CmranError: The settings, the data or the run directory do not fit, or the tracking store failed.
    """
    recorded = None
    if parameters.resume:
        from cmran.training.run_dir import read_run

        recorded = read_run(parameters.out)
    if recorded is None:
        if parameters.data is None or parameters.mode is None:
            raise CheckpointError(f"{parameters.out}: contains no run to resume", "give `data` and `mode` to start one")
        config = resolve_config(parameters)
    else:
        config = resumed_config(parameters, parameters.out, recorded.config)
        data = data_folder(parameters.out, parameters.data, recorded.data)
        parameters = parameters.model_copy(update={"data": data, "mode": config.model.mode})
    return train_run(parameters, config, run_id, known_init=None if recorded is None else recorded.init)


def train_run(
    parameters: TrainParameters,
    config: RunConfig,
    run_id: str | None,
    known_init: InitRecord | None = None,
    device_cache: "DeviceCacheSlot | None" = None,
) -> TrainResult:
    """Train with resolved settings.

    Args:
        parameters: What to train; `data` and `mode` are set.
        config: The settings.
        run_id: Adopted MLflow run; None opens a new one.
        known_init: Source of the initial weights of a resumed run.
        device_cache: Cache of features in device memory that several runs share.
    """
    tracking.connect()
    assert parameters.data is not None
    init = None
    # The same source adds nothing to a resumed run, and may no longer exist.
    if parameters.init is not None and (known_init is None or known_init.source != parameters.init):
        from flows.jobs.models import initial_weights

        init = initial_weights(parameters.init, config)
    from cmran.training.trainer import fit

    epochs = EpochLog()
    result: FitResult | None = None
    with contextlib.ExitStack() as stack:

        def start(history: list["EpochRecord"]) -> str:
            epochs.run = stack.enter_context(training_run(parameters, config, run_id))
            epochs.catch_up(history)
            return epochs.run.run_id

        try:
            result = fit(
                parameters.data,
                config,
                parameters.out,
                device=parameters.device,
                resume=parameters.resume,
                init=init,
                device_cache=device_cache,
                on_start=start,
                on_epoch=epochs,
            )
            if epochs.run is None:
                # Training had finished before; what could not be logged then is logged now.
                epochs.run = stack.enter_context(training_run(parameters, result.config, run_id))
            log_result(epochs.run, result, parameters)
            stack.close()
        except tracking.TrackingError as error:
            if result is None:
                raise
            raise tracking.TrackingError(
                f"{error}; training has finished and its result is in {parameters.out}",
                "run it again with `resume=True` to log the result",
            ) from error
    return TrainResult(fit=result, run_id=epochs.run.run_id)


class EpochLog:
    """Logs each epoch to the MLflow run. If logging fails, training continues and the epoch is logged with the next."""

    def __init__(self) -> None:
        self.run: tracking.Run | None = None
        self._pending: list[EpochRecord] = []

    def catch_up(self, history: list["EpochRecord"]) -> None:
        """Log the epochs that the run does not have. Raises TrackingError if that fails."""
        assert self.run is not None
        logged = tracking.logged_epochs(self.run.run_id)
        self._pending = [record for record in history if record.epoch > logged]
        self._send()

    def __call__(self, record: "EpochRecord") -> None:
        """Log one epoch, after the pending ones."""
        self._pending.append(record)
        try:
            self._send()
        except tracking.TrackingError as error:
            log.warning("%s: training continues; epochs still to be logged: %d", error, len(self._pending))

    def _send(self) -> None:
        assert self.run is not None
        while self._pending:
            self.run.log_epoch(self._pending[0])
            del self._pending[0]


@contextlib.contextmanager
def training_run(parameters: TrainParameters, config: RunConfig, run_id: str | None) -> Iterator[tracking.Run]:
    """Open the MLflow run of a training run: the adopted `run_id`, else the one that is resumed, else a new one."""
    from cmran.training.run_dir import read_run

    out, mode = parameters.out, config.model.mode
    if run_id is None and parameters.resume:
        run_id = _known_run(out)
    with tracking.start_run(
        experiment=tracking.experiment_of(mode),
        name=out.name or "train",
        parent_run_id=parameters.parent_run_id,
        run_id=run_id,
        tags={
            "cmran.job": "train",
            "cmran.mode": mode,
            "cmran.recipe": config.recipe,
            "cmran.selection_split": config.train.selection_split,
            "cmran.run_dir": out.resolve(),
        },
    ) as active_run:
        write_json(out / RUN_FILE, {"run_id": active_run.run_id, "tracking_uri": tracking.shown_tracking_uri()})
        active_run.log_params(config)
        recorded = read_run(out)
        assert recorded is not None
        active_run.log_dataset(recorded.data, recorded.fingerprint, "training")
        if recorded.init is not None:
            init = recorded.init.model_dump(mode="json")
            active_run.set_tags({f"cmran.init.{key}": value for key, value in init.items()})
        active_run.log_artifact(out / "config.json")
        yield active_run


def _known_run(out: Path) -> str | None:
    """Return the MLflow run that the run directory names, if the store has it."""
    known = run_of_folder(out)
    if known is None or tracking.run_exists(known):
        return known
    log.warning("%s: MLflow run %s is not in %s; a new run is started", out, known, tracking.shown_tracking_uri())
    return None


def log_result(active_run: tracking.Run, result: "FitResult", parameters: TrainParameters) -> None:
    """Log a finished training run, once: missing epochs, scores, checkpoint, figures and tables."""
    if tracking.run_info(active_run.run_id).tags.get(COMPLETE) == "true":
        return
    epochs = EpochLog()
    epochs.run = active_run
    epochs.catch_up(result.epochs)

    selection = result.config.train.selection_split
    scores = score_metrics(result.val, f"{marked('best.val', selection)}.")
    if result.test is not None:
        scores |= score_metrics(result.test, f"{marked('best.test', selection)}.")
    active_run.log_metrics(scores | {"best.epoch": float(result.best_epoch)}, step=result.best_epoch)
    _draw(result, parameters)
    active_run.log_artifact(result.best_checkpoint, "checkpoint")
    active_run.log_artifact(result.run_dir / "metrics.json")
    active_run.log_artifact(result.run_dir / "figures", "figures")
    active_run.log_artifact(result.run_dir / "tables", "tables")
    if result.stopped_early:
        active_run.set_tags({"cmran.stopped_early": result.stop_reason})
    active_run.set_tags({COMPLETE: "true"})


def _draw(result: "FitResult", parameters: TrainParameters) -> None:
    """Write the figures and tables of a finished training run to its run directory."""
    from cmran.data.dataset import open_folder
    from cmran.evaluation.plots import confusion_png, curves_png, timeline_png, timeline_rows
    from cmran.evaluation.tables import per_category_csv, per_category_markdown
    from cmran.model.checkpoints import load_model
    from cmran.training.inference import predict
    from cmran.utils.device import pick_device

    train, mode = result.config.train, result.config.model.mode
    split, scores = ("val", result.val) if result.test is None else ("test", result.test)
    pictures, tables, selection = result.run_dir / "figures", result.run_dir / "tables", train.selection_split
    confusion_png(scores, pictures / "confusion.png", title=f"{mode}, {split}", selection_split=selection)
    per_category_csv(scores, tables / "per_category.csv", selection_split=selection)
    per_category_markdown(scores, tables / "per_category.md", selection_split=selection)
    curves_png(
        [asdict(record) for record in result.epochs],
        pictures / "curves.png",
        title=f"Training, {mode}",
        baselines=result.val["baselines"],
        selection_split=selection,
    )
    assert parameters.data is not None
    with open_folder(parameters.data, mode=mode, features=train.effective_features) as folder:
        # On val, because test is evaluated only once, for the scores.
        rows = folder.order("val")
        rows = rows[timeline_rows(len(rows))]
        model, _ = load_model(result.best_checkpoint)
        predictions = predict(
            model,
            folder,
            rows,
            device=pick_device(parameters.device),
            precision=train.precision,
            batch_size=train.eval_batch_size,
        )
        ids = folder.video_ids()
        timeline_png(
            predictions.segments,
            folder.segment_labels()[rows],
            [f"{row} {ids[row]}" if ids else f"row {row}" for row in rows.tolist()],
            pictures / "timelines.png",
            title=f"True and predicted events, {mode}, val",
            selection_split=selection,
        )
