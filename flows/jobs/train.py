"""What each job takes: one frozen record a job, every field described and bounded.

From these come the forms in Prefect's UI, the options of the `cmran` command and the checks of both.
"""

import contextlib
import logging
from collections.abc import Iterator
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

from pydantic import Field, model_validator

from cmran import tracking
from cmran.config import (
    InitRecord,
    RunConfig,
    Seed,
)
from cmran.errors import CmranError
from cmran.utils.files import write_json
from flows.jobs.common import (
    PARENT_HELP,
    MarkdownResult,
    RunId,
    SingleModeParameters,
    config_of,
    data_folder,
    headed,
    marked,
    paragraphs,
    require_fields,
    resumed_config,
    score_metrics,
)
from flows.jobs.models import RUN_FILE, run_of_folder

if TYPE_CHECKING:
    from cmran.data.device_cache import DeviceCacheSlot
    from cmran.training.run_dir import EpochRecord, FitResult


class TrainParameters(SingleModeParameters):
    """Train CMRAN; the epoch that is best on val is kept, test is evaluated once at the end."""

    out: Path = Field(description="Run directory: last.pt, best.pt, metrics.json and more go there.")
    init: str | None = Field(
        None,
        min_length=1,
        description="Start from the weights of this model: a run directory, a checkpoint, a published .pth.tar, an "
        "MLflow run or models:/NAME@ALIAS. Optimizer and schedule are new.",
    )
    seed: Seed | None = Field(None, description="Decides weights, order and dropout, instead of the recipe's.")
    selection_split: Literal["val", "test"] | None = Field(
        None, description="Split that picks the best epoch. test is for comparison only and marks every figure."
    )
    resume: bool = Field(
        False,
        description="Continue the run in OUT, to the same numbers as undisturbed. OUT alone is enough; what else is "
        "given must be as in the run, except for a number of epochs.",
    )
    parent_run_id: RunId | None = Field(None, description=PARENT_HELP)

    @model_validator(mode="before")
    @classmethod
    def _check_needed(cls, values: Any) -> Any:
        return require_fields(values, "data", "mode")

    short = (*SingleModeParameters.short, "seed", "selection_split")


@dataclass(frozen=True, kw_only=True)
class TrainResult(MarkdownResult):
    """A finished training."""

    fit: "FitResult"
    run_id: str
    ok: bool = True

    def markdown(self) -> str:
        """Scores on val and test."""
        from cmran.evaluation.tables import scores_table
        from flows.jobs.models import init_note

        fit, mode, selection = self.fit, self.fit.config.model.mode, self.fit.config.train.selection_split
        scores = {"val": fit.val} if fit.test is None else {"val": fit.val, "test": fit.test}
        lines = [
            f"# Training, {mode}: {fit.run_dir}",
            f"Best of {len(fit.epochs)} epochs: {fit.best_epoch} (recipe {fit.config.recipe}, "
            f"{fit.seconds:.1f} s, data `{fit.fingerprint}`)",
            *([f"Ended by {fit.stop_reason}"] if fit.stopped_early else []),
            *([] if fit.init is None else [init_note(fit.init)]),
            *(
                f"{headed(split, selection)}\n\n{scores_table(found, selection_split=selection)}"
                for split, found in scores.items()
            ),
            f"MLflow run {self.run_id}; checkpoint {fit.best_checkpoint}",
        ]
        return paragraphs(lines)


def train_job(parameters: TrainParameters, *, run_id: str | None = None) -> TrainResult:
    """Train, and keep the run in MLflow.

    The tracking store is asked first: where it cannot be reached nothing is begun. Where it fails on the way the
    training goes on, and what it missed follows with the next epoch that gets through, or after `--resume`.

    With `resume` all that is not given comes from the run in OUT, and what is given must be as it is there.
    """
    begun = None
    if parameters.resume:
        from cmran.training.run_dir import read_run

        begun = read_run(parameters.out)
    if begun is None:
        if parameters.data is None or parameters.mode is None:
            raise CmranError(f"{parameters.out}: holds no run to resume: give data and mode to start one")
        config = config_of(parameters)
    else:
        config = resumed_config(parameters, parameters.out, begun.config)
        data = data_folder(parameters.out, parameters.data, begun.data)
        parameters = parameters.model_copy(update={"data": data, "mode": config.model.mode})
    return train_run(parameters, config, run_id, known_init=None if begun is None else begun.init)


def train_run(
    parameters: TrainParameters,
    config: RunConfig,
    run_id: str | None,
    known_init: InitRecord | None = None,
    device_cache: "DeviceCacheSlot | None" = None,
) -> TrainResult:
    """Train with these settings; data and mode are known. `known_init`: what a resumed run started from."""
    from cmran import tracking

    tracking.connect()
    assert parameters.data is not None
    init = None
    # The same source again says nothing new, and may be gone.
    if parameters.init is not None and (known_init is None or known_init.source != parameters.init):
        from flows.jobs.models import initial_weights

        init = initial_weights(parameters.init, config)
    from cmran.training.trainer import fit

    epochs = EpochLog()
    result: FitResult | None = None
    with contextlib.ExitStack() as stack:

        def begin(history: list["EpochRecord"]) -> str:
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
                on_start=begin,
                on_epoch=epochs,
            )
            if epochs.run is None:
                # The training was finished before: what did not arrive then is sent now.
                epochs.run = stack.enter_context(training_run(parameters, result.config, run_id))
            deliver(epochs.run, result, parameters)
            stack.close()
        except tracking.TrackingError as error:
            if result is None:
                raise
            raise CmranError(
                f"{error}; the training is finished and its result is in {parameters.out}: "
                "the same command with --resume sends it"
            ) from error
    return TrainResult(fit=result, run_id=epochs.run.run_id)


log = logging.getLogger(__name__)


COMPLETE = "cmran.complete"
"""Tag of a training's run when its scores and artifacts have all arrived."""


class EpochLog:
    """Sends each epoch to the run. What does not get through waits for the next epoch, and the training goes on."""

    def __init__(self) -> None:
        self.run: tracking.Run | None = None
        self._waiting: list[EpochRecord] = []

    def catch_up(self, history: list["EpochRecord"]) -> None:
        """Send the epochs that the run has not got. Raises TrackingError where they do not get through."""
        assert self.run is not None
        logged = tracking.logged_epochs(self.run.run_id)
        self._waiting = [record for record in history if record.epoch > logged]
        self._send()

    def __call__(self, record: "EpochRecord") -> None:
        """Send one epoch, and those that wait before it."""
        self._waiting.append(record)
        try:
            self._send()
        except tracking.TrackingError as error:
            log.warning("%s: the training goes on; epochs that wait to be logged: %d", error, len(self._waiting))

    def _send(self) -> None:
        assert self.run is not None
        while self._waiting:
            self.run.log_epoch(self._waiting[0])
            del self._waiting[0]


@contextlib.contextmanager
def training_run(parameters: TrainParameters, config: RunConfig, run_id: str | None) -> Iterator[tracking.Run]:
    """The run of a training: the adopted one `run_id`, on --resume the one it began in, else a new one."""
    from cmran.training.run_dir import read_run

    out, mode = parameters.out, config.model.mode
    if run_id is None and parameters.resume:
        run_id = _begun_in(out)
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
    ) as run:
        write_json(out / RUN_FILE, {"run_id": run.run_id, "tracking_uri": tracking.shown_tracking_uri()})
        run.log_params(config)
        begun = read_run(out)
        assert begun is not None
        run.log_dataset(begun.data, begun.fingerprint, "training")
        if begun.init is not None:
            run.set_tags({f"cmran.init.{key}": value for key, value in begun.init.model_dump(mode="json").items()})
        run.log_artifact(out / "config.json")
        yield run


def _begun_in(out: Path) -> str | None:
    known = run_of_folder(out)
    if known is None or tracking.run_exists(known):
        return known
    log.warning("%s: its MLflow run %s is not at %s: a new one begins", out, known, tracking.shown_tracking_uri())
    return None


def deliver(run: tracking.Run, result: "FitResult", parameters: TrainParameters) -> None:
    """Send what a finished training has to show, once: missing epochs, scores, checkpoint, figures, tables."""
    if tracking.run_info(run.run_id).tags.get(COMPLETE) == "true":
        return
    epochs = EpochLog()
    epochs.run = run
    epochs.catch_up(result.epochs)

    selection = result.config.train.selection_split
    scores = score_metrics(result.val, f"{marked('best.val', selection)}.")
    if result.test is not None:
        scores |= score_metrics(result.test, f"{marked('best.test', selection)}.")
    run.log_metrics(scores | {"best.epoch": float(result.best_epoch)}, step=result.best_epoch)
    _draw(result, parameters)
    run.log_artifact(result.best_checkpoint, "checkpoint")
    run.log_artifact(result.run_dir / "metrics.json")
    run.log_artifact(result.run_dir / "figures", "figures")
    run.log_artifact(result.run_dir / "tables", "tables")
    if result.stopped_early:
        run.set_tags({"cmran.stopped_early": result.stop_reason})
    run.set_tags({COMPLETE: "true"})


def _draw(result: "FitResult", parameters: TrainParameters) -> None:
    """Figures and tables of a finished training, in its folder."""
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
        # Of val: the test split is evaluated once, for the scores.
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
