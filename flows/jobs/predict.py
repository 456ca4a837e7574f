"""`predict`: batch inference with a registered or exported model."""

import logging
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Literal

from pydantic import Field

from cmran.config import BatchSize, Device, Frozen
from cmran.errors import ExportError
from flows.jobs.common import (
    PARENT_HELP,
    MarkdownResult,
    RunId,
    VariantChoice,
    is_tracked,
    marked,
    mlflow_run,
    paragraphs,
    score_metrics,
    split_heading,
    table,
)

if TYPE_CHECKING:
    from cmran.tracking import ResolvedModel
    from serving.batch import Manifest

log = logging.getLogger(__name__)


class PredictParameters(Frozen):
    """Predict the events of all videos in a folder with a registered or exported model."""

    model: str = Field(min_length=1, description="models:/cmran-full@champion, models:/cmran-full/3 or an ONNX file.")
    data: Path = Field(description="Folder with the feature files; labels are optional and add metrics.")
    out: Path = Field(description="Folder for segments.parquet, events.parquet and manifest.json.")
    split: Literal["train", "val", "test", "all"] = Field("test", description="The videos to predict.")
    device: Device = Field("auto", description="cuda fails without a working CUDA provider; auto logs its choice.")
    variant: VariantChoice | None = Field(
        None,
        description="Precision variant: float32 matches the network; auto selects the fastest of the release for the "
        "device (int8 on a CPU, float16 on CUDA; at least 99.5 % of the labels on val are equal) and logs its choice. "
        "Default: float32 of a release; an ONNX file is used as is.",
    )
    batch_size: BatchSize = Field(32, description="Inference batch size.")
    resume: bool = Field(False, description="Continue an interrupted job in OUT.")
    track: bool = Field(False, description="Log the manifest to an MLflow run.")
    parent_run_id: RunId | None = Field(None, description=PARENT_HELP)


@dataclass(frozen=True, kw_only=True)
class PredictResult(MarkdownResult):
    """A finished batch job."""

    out: Path
    manifest: "Manifest"
    ok: bool = True

    def markdown(self) -> str:
        """Return the number of videos and events, the model, the speed and the metrics."""
        from cmran.evaluation.tables import scores_table

        manifest = self.manifest
        speed = "-" if manifest.videos_per_s is None else f"{manifest.videos_per_s:.1f}"
        rows = (
            ("videos", f"{manifest.rows} ({manifest.split})"),
            ("events", manifest.events),
            ("model", manifest.model.get("name") or manifest.model.get("path")),
            ("version", manifest.model.get("version")),
            ("provider", manifest.provider),
            ("variant", manifest.variant),
            ("videos/s", speed),
        )
        lines = [f"# Predictions: {self.out}", table(("batch inference", ""), rows)]
        selection = manifest.selection_split
        for split, scores in (manifest.metrics or {}).items():
            lines += [split_heading(split, selection), scores_table(scores, selection_split=selection)]
        lines += [f"Note: {note}." for note in manifest.notes]
        return paragraphs(lines)


def run(parameters: PredictParameters, *, run_id: str | None = None) -> PredictResult:
    """Predict the events of all videos in a folder."""
    from cmran import tracking
    from serving.batch import predict_folder

    parameters = _with_job_settings(parameters)
    # Resolve the model first: if it does not exist, no database is created.
    model = _in_variant(tracking.resolve_model(parameters.model), parameters)
    tracked = is_tracked(parameters, run_id)
    known = {"name": model.name, "version": model.version, "run_id": model.run_id, "digest": model.digest}
    manifest = predict_folder(
        model.path,
        parameters.data,
        parameters.out,
        split=parameters.split,
        device=parameters.device,
        batch_size=parameters.batch_size,
        resume=parameters.resume,
        model_info={key: value for key, value in known.items() if value is not None},
    )
    result = PredictResult(out=parameters.out, manifest=manifest)
    if tracked:
        name, mode = parameters.out.name, manifest.model["mode"]
        with mlflow_run("predict", name, mode, parameters.parent_run_id, run_id) as active_run:
            active_run.log_dataset(parameters.data, manifest.job.fingerprint, "inference")
            active_run.set_tags({"cmran.model": parameters.model, "cmran.model_sha256": model.digest})
            active_run.set_tags({"cmran.variant": manifest.variant})
            active_run.log_metrics({"videos": float(manifest.rows), "events": float(manifest.events)})
            active_run.log_metrics({"seconds": manifest.seconds, "videos_per_s": manifest.videos_per_s})
            for split, scores in (manifest.metrics or {}).items():
                active_run.log_metrics(score_metrics(scores, f"{marked(split, manifest.selection_split)}."))
            active_run.log_artifact(parameters.out / "manifest.json")
            active_run.log_text(result.markdown(), "predictions.md")
    return result


def _with_job_settings(parameters: PredictParameters) -> PredictParameters:
    """Fill in the parameters that were not given from the job in `out`, if it is resumed."""
    from serving.batch import known_job

    job = known_job(parameters.out) if parameters.resume else None
    if job is None:
        return parameters
    kept = {"split": job.split, "batch_size": job.batch_size, "variant": job.variant}
    given = parameters.model_fields_set
    return parameters.model_copy(update={key: value for key, value in kept.items() if key not in given})


def _in_variant(model: "ResolvedModel", parameters: PredictParameters) -> "ResolvedModel":
    """Return the model in the requested variant; for auto, log the choice and the reason."""
    from serving.session import cuda_works, read_metadata
    from serving.variants import pick_variant

    wanted = parameters.variant
    if not parameters.model.startswith(("models:", "runs:")):
        found = read_metadata(model.path).variant
        # An explicit file is used as is.
        if wanted not in (None, "auto", found):
            raise ExportError(
                f"{model.path}: is of variant {found}, not {wanted}", "pass the file of that variant as `model`"
            )
        return replace(model, variant=found)
    if wanted != "auto":
        return model.with_variant(wanted or "float32")
    # If CUDA was requested and does not work, the session reports it.
    cuda = parameters.device == "cuda" or (parameters.device == "auto" and cuda_works(model.path))
    variant, why = pick_variant({*model.variants, *model.variant_digests}, cuda=cuda)
    log.info("variant auto: took %s: %s", variant, why)
    return model.with_variant(variant)
