"""`evaluate`: score a trained model on a split."""

import json
import logging
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from pydantic import Field

from cmran.config import BatchSize, Device, Frozen, Mode, Precision, SelectionSplit
from cmran.utils.files import write_json
from flows.jobs.common import (
    CHECKPOINT_HELP,
    CHECKPOINT_MODE_HELP,
    DATA_HELP,
    DEVICE_HELP,
    PARENT_HELP,
    MarkdownResult,
    RunId,
    is_tracked,
    marked,
    mlflow_run,
    paragraphs,
    score_metrics,
    split_heading,
)

log = logging.getLogger(__name__)


class EvaluateParameters(Frozen):
    """Score a trained model on a split."""

    checkpoint: str = Field(min_length=1, description=CHECKPOINT_HELP)
    data: Path = Field(description=DATA_HELP)
    split: Literal["train", "val", "test"] = Field("test", description="The videos to score.")
    mode: Mode | None = Field(None, description=CHECKPOINT_MODE_HELP)
    report: Path | None = Field(None, description="JSON file for the scores.")
    device: Device = Field("auto", description=DEVICE_HELP)
    precision: Precision | None = Field(None, description="Default: the precision of the training.")
    batch_size: BatchSize = Field(32, description="Evaluation batch size.")
    track: bool = Field(False, description="Log the scores to an MLflow run.")
    parent_run_id: RunId | None = Field(None, description=PARENT_HELP)


@dataclass(frozen=True, kw_only=True)
class EvaluateResult(MarkdownResult):
    """Scores of a model on one split."""

    checkpoint: str
    mode: Mode
    data: Path
    fingerprint: str
    split: str
    selection_split: SelectionSplit
    scores: dict[str, Any]
    notes: tuple[str, ...] = ()
    ok: bool = True

    def to_dict(self) -> dict[str, Any]:
        """Return plain values for JSON."""
        return {
            "checkpoint": self.checkpoint,
            "mode": self.mode,
            "data": str(self.data),
            "fingerprint": self.fingerprint,
            "split": self.split,
            "selection_split": self.selection_split,
            "notes": list(self.notes),
            **self.scores,
        }

    def markdown(self) -> str:
        """Return scores, baselines and the table per category."""
        from cmran.evaluation.tables import per_category_table, scores_table

        lines = [
            f"# Evaluation, {self.mode}: {self.checkpoint}",
            f"Data {self.data}, `{self.fingerprint}`",
            *self.notes,
            split_heading(self.split, self.selection_split),
            scores_table(self.scores, selection_split=self.selection_split),
            per_category_table(self.scores, selection_split=self.selection_split),
        ]
        return paragraphs(lines)


def run(parameters: EvaluateParameters, *, run_id: str | None = None) -> EvaluateResult:
    """Score a model on a split."""
    from cmran.data.dataset import open_folder
    from cmran.data.validation import contradictions
    from cmran.training.inference import evaluate_split
    from cmran.utils.device import pick_device, require_precision
    from flows.jobs.models import find_model

    tracked = is_tracked(parameters, run_id)
    with (
        find_model(parameters.checkpoint, parameters.mode) as found,
        # The features the model was trained on. The cache is used, but not filled for a single split.
        open_folder(parameters.data, mode=found.mode, features=found.features) as folder,
    ):
        found.check_fits(folder)
        folder.use_feature_cache(build=False)
        device, precision = pick_device(parameters.device), parameters.precision or found.precision
        require_precision(precision, device)
        notes = found.notes()
        if found.fingerprint not in (None, folder.fingerprint):
            notes.append(f"The model was trained on other data (`{found.fingerprint}`).")
        for fault in contradictions(parameters.data):
            notes.append(f"**The scores may be wrong**: {fault}.")
            log.warning("the scores may be wrong: %s", fault)
        evaluation, _ = evaluate_split(
            found.model,
            folder,
            parameters.split,
            device=device,
            precision=precision,
            batch_size=parameters.batch_size,
        )
        result = EvaluateResult(
            checkpoint=parameters.checkpoint,
            mode=found.mode,
            data=parameters.data,
            fingerprint=folder.fingerprint,
            split=parameters.split,
            selection_split=found.selection_split,
            scores=evaluation.to_dict(),
            notes=tuple(notes),
        )
    if parameters.report is not None:
        write_json(parameters.report, result.to_dict())
    if tracked:
        with mlflow_run("evaluate", parameters.split, found.mode, parameters.parent_run_id, run_id) as active_run:
            active_run.log_dataset(parameters.data, result.fingerprint, "evaluation")
            active_run.set_tags({"cmran.checkpoint": parameters.checkpoint, "cmran.training_run": found.run_id})
            active_run.log_metrics(score_metrics(result.scores, f"{marked(result.split, result.selection_split)}."))
            active_run.log_text(json.dumps(result.to_dict(), indent=2), f"{parameters.split}.json")
            active_run.log_text(result.markdown(), f"{parameters.split}.md")
    return result
