"""What each job takes: one frozen record a job, every field described and bounded.

From these come the forms in Prefect's UI, the options of the `cmran` command and the checks of both.
"""

import logging
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Literal

from pydantic import Field

from cmran.config import (
    BatchSize,
    Device,
    Frozen,
)
from cmran.errors import CmranError
from flows.jobs.common import (
    PARENT_HELP,
    MarkdownResult,
    RunId,
    VariantChoice,
    headed,
    is_tracked,
    marked,
    mlflow_run,
    paragraphs,
    table,
)

if TYPE_CHECKING:
    from cmran.tracking import ResolvedModel
    from serving.batch import Manifest


class PredictParameters(Frozen):
    """Predict the events of a folder's videos with a registered or exported model."""

    model: str = Field(min_length=1, description="models:/cmran-full@champion, models:/cmran-full/3 or a FILE.onnx.")
    data: Path = Field(description="Folder of the features; labels are not needed, and give metrics where they are.")
    out: Path = Field(description="Folder for segments.parquet, events.parquet and manifest.json.")
    split: Literal["train", "val", "test", "all"] = Field("test", description="The videos to predict.")
    device: Device = Field(
        "auto", description="cuda is an error without a working CUDA provider; auto says its choice."
    )
    variant: VariantChoice | None = Field(
        None,
        description="Number format: float32 says what the network says; auto takes the release's fastest for the "
        "device (int8 on a CPU, float16 on CUDA), with at least 99.5 % the same labels on val, and tells which. "
        "Default: float32 of a release; a FILE.onnx is taken as it is.",
    )
    batch_size: BatchSize = Field(32, description="Videos at a time.")
    resume: bool = Field(False, description="Go on with what a killed command left in OUT.")
    track: bool = Field(False, description="Keep the manifest in an MLflow run.")
    parent_run_id: RunId | None = Field(None, description=PARENT_HELP)


@dataclass(frozen=True, kw_only=True)
class PredictResult(MarkdownResult):
    """A finished batch job."""

    out: Path
    manifest: "Manifest"
    ok: bool = True

    def markdown(self) -> str:
        """What was predicted, with what, how fast."""
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
            lines += [headed(split, selection), scores_table(scores, selection_split=selection)]
        lines += [f"Note: {note}." for note in manifest.notes]
        return paragraphs(lines)


log = logging.getLogger(__name__)


def predict_job(parameters: PredictParameters, *, run_id: str | None = None) -> PredictResult:
    """Predict the events of a folder's videos."""
    from cmran import tracking
    from flows.jobs.common import score_metrics
    from serving.batch import predict_folder

    parameters = _with_job_settings(parameters)
    # First: where there is no such model, no database is created.
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
        with mlflow_run("predict", name, mode, parameters.parent_run_id, run_id) as run:
            run.log_dataset(parameters.data, manifest.job.fingerprint, "inference")
            run.set_tags({"cmran.model": parameters.model, "cmran.model_sha256": model.digest})
            run.set_tags({"cmran.variant": manifest.variant})
            run.log_metrics({"videos": float(manifest.rows), "events": float(manifest.events)})
            run.log_metrics({"seconds": manifest.seconds, "videos_per_s": manifest.videos_per_s})
            for split, scores in (manifest.metrics or {}).items():
                run.log_metrics(score_metrics(scores, f"{marked(split, manifest.selection_split)}."))
            run.log_artifact(parameters.out / "manifest.json")
            run.log_text(result.markdown(), "predictions.md")
    return result


def _with_job_settings(parameters: PredictParameters) -> PredictParameters:
    """The parameters with what was not given taken from the job in OUT, where it is resumed."""
    from serving.batch import known_job

    job = known_job(parameters.out) if parameters.resume else None
    if job is None:
        return parameters
    kept = {"split": job.split, "batch_size": job.batch_size, "variant": job.variant}
    given = parameters.model_fields_set
    return parameters.model_copy(update={key: value for key, value in kept.items() if key not in given})


def _in_variant(model: "ResolvedModel", parameters: PredictParameters) -> "ResolvedModel":
    """The model in the variant asked for; for auto, which it is and why is told."""
    from serving.session import cuda_works, read_metadata
    from serving.variants import pick_variant

    wanted = parameters.variant
    if not parameters.model.startswith(("models:", "runs:")):
        found = read_metadata(model.path).variant
        # A file named is the file meant.
        if wanted not in (None, "auto", found):
            raise CmranError(f"{model.path}: is of variant {found}, not {wanted}: name the file of that variant")
        return replace(model, variant=found)
    if wanted != "auto":
        return model.with_variant(wanted or "float32")
    # Where CUDA is asked for and does not work, the session says so.
    cuda = parameters.device == "cuda" or (parameters.device == "auto" and cuda_works(model.path))
    variant, why = pick_variant({*model.variants, *model.variant_digests}, cuda=cuda)
    log.warning("variant auto: took %s: %s", variant, why)
    return model.with_variant(variant)
