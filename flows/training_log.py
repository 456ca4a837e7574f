"""A training in MLflow: its run, its epochs as they come, its scores and artifacts at the end."""

import contextlib
import logging
from collections.abc import Iterator, Mapping
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Any

from cmran import tracking
from cmran.config import RunConfig
from cmran.files import write_json
from flows.models import RUN_FILE, run_of_folder
from flows.parameters import TrainParameters
from flows.results import marked

if TYPE_CHECKING:
    from cmran.training import EpochRecord, FitResult

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
    from cmran.training import read_run

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


def score_metrics(scores: Mapping[str, Any], prefix: str) -> dict[str, float | None]:
    """The figures of an `Evaluation.to_dict()` as metrics, without those that say how it was computed."""
    how = ("bootstrap", "seed", "segments")
    return tracking.numbers({key: value for key, value in scores.items() if key not in how}, prefix)


def _draw(result: "FitResult", parameters: TrainParameters) -> None:
    """Figures and tables of a finished training, in its folder."""
    from cmran import figures
    from cmran.checkpoints import load_model
    from cmran.data.features import open_folder
    from cmran.hardware import pick_device
    from cmran.training import predict

    train, mode = result.config.train, result.config.model.mode
    split, scores = ("val", result.val) if result.test is None else ("test", result.test)
    pictures, tables, selection = result.run_dir / "figures", result.run_dir / "tables", train.selection_split
    figures.confusion_png(scores, pictures / "confusion.png", title=f"{mode}, {split}", selection_split=selection)
    figures.per_category_csv(scores, tables / "per_category.csv", selection_split=selection)
    figures.per_category_markdown(scores, tables / "per_category.md", selection_split=selection)
    figures.curves_png(
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
        rows = rows[figures.timeline_rows(len(rows))]
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
        figures.timeline_png(
            predictions.segments,
            folder.segment_labels()[rows],
            [f"{row} {ids[row]}" if ids else f"row {row}" for row in rows.tolist()],
            pictures / "timelines.png",
            title=f"True and predicted events, {mode}, val",
            selection_split=selection,
        )
