"""Export a model with a parity check and register it as a version, which becomes champion or challenger."""

import contextlib
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING

from pydantic import Field

from cmran.config import Frozen, Mode, SelectionSplit
from cmran.errors import DataError
from flows.jobs.common import PARENT_HELP, MarkdownResult, RunId, VariantChoice, marked, mlflow_run, paragraphs, table
from flows.jobs.export import ExportResult, export_found, log_parity

if TYPE_CHECKING:
    from cmran.tracking import Registered
    from flows.jobs.models import FoundModel
    from serving.release import ReleaseVariant, Scores


class ReleaseParameters(Frozen):
    """Export a model with a parity check and register it; it becomes champion or challenger."""

    checkpoint: str = Field(
        min_length=1, description="Run directory, best.pt, a published .pth.tar or the id of an MLflow run."
    )
    data: Path | None = Field(
        None,
        description="Data folder whose val videos are compared too. Default: that of the training, if it still exists.",
    )
    mode: Mode | None = Field(None, description="Mode of a published .pth.tar. Default: that of its weights.")
    out: Path | None = Field(
        None, description="ONNX file to keep besides the registered one, with its precision variants beside it."
    )
    variant: VariantChoice = Field(
        "auto",
        description="Faster precision variant besides float32; auto makes int8 (CPU) and float16 (CUDA). A variant "
        "that this machine cannot run, or that differs too much on val, is left out.",
    )
    study: str | None = Field(None, description="Study that found the settings; it becomes a tag of the version.")
    parent_run_id: RunId | None = Field(None, description=PARENT_HELP)


@dataclass(frozen=True, kw_only=True)
class ReleaseResult(MarkdownResult):
    """A registered version."""

    export: ExportResult
    """The float32 model and its parity check."""
    registered: "Registered"
    """The version in the model registry."""
    run_id: str
    """MLflow run that the release is logged to."""
    val_accuracy: float | None
    """In %."""
    test_accuracy: float | None
    """In %."""
    selection_split: SelectionSplit
    """The split on which the epoch was selected."""
    variants: tuple["ReleaseVariant", ...] = ()
    """The precision variants that were requested."""
    ok: bool = True

    def markdown(self) -> str:
        """Return the report: the version, its variants and the parity check."""
        found = self.registered
        selected = {"val": "", "test": ", selected on test", "unknown": ", selection split unknown"}
        rows = (
            ("registered as", f"{found.name} version {found.version}"),
            ("alias", f"{found.alias} ({found.reason})"),
            ("val accuracy, %", self.val_accuracy),
            (f"test accuracy, %{selected[self.selection_split]}", self.test_accuracy),
            ("MLflow run", self.run_id),
        )
        head = ("variant", "equal labels", "largest difference", "val videos", "")
        variants = [table(head, map(_variant_cells, self.variants))] if self.variants else []
        return paragraphs(
            [
                f"# Release: models:/{found.name}@{found.alias}",
                table(("release", ""), rows),
                *variants,
                self.export.markdown(),
            ]
        )


def _variant_cells(entry: "ReleaseVariant") -> tuple[object, ...]:
    """A line of the table of precision variants."""
    report = entry.parity
    equal = None if report is None or report.equal_segments is None else f"{100 * report.equal_segments:.3f} %"
    difference = None if report is None or report.max_abs_difference is None else f"{report.max_abs_difference:.3g}"
    videos = None if report is None else report.rows
    return entry.variant, equal, difference, videos, f"left out: {entry.reason}" if entry.reason else "registered"


def run(parameters: ReleaseParameters, *, run_id: str | None = None) -> ReleaseResult:
    """Export, check and register a model.

    Args:
        parameters: The parameters of the job.
        run_id: MLflow run for a model whose training run is not in the store; `None`: a new one.

    Raises:
        ExportError: The parity check failed. Nothing is registered then.
        CmranError: The model was not found, or a file or the store failed.
    """
    import tempfile

    from cmran import tracking
    from flows.jobs.models import find_model
    from serving.parity import raise_if_failed
    from serving.release import VARIANTS, find_parity_data, make_checked_variants

    with contextlib.ExitStack() as stack:
        # Before the stores are opened: without a model no database is created.
        found = stack.enter_context(find_model(parameters.checkpoint, parameters.mode))
        tracking.connect_registry()
        scores = _scores(found, parameters.data)
        # For the file, unless it is kept.
        scratch = stack.enter_context(tempfile.TemporaryDirectory(prefix="cmran-"))
        out = parameters.out or Path(scratch) / f"cmran-{found.mode}.onnx"
        export = replace(export_found(found, out, parameters.data), kept=parameters.out is not None)
        raise_if_failed(export.parity)
        wanted = [variant for variant in VARIANTS if parameters.variant in ("auto", variant)]
        data, no_data = find_parity_data(parameters.data, recorded=found.data, fingerprint=found.fingerprint)
        variants = make_checked_variants(out, wanted, data, mode=found.mode, no_data=no_data)

        if found.run_id is not None and tracking.run_exists(found.run_id):
            run = tracking.open_run(found.run_id)
        else:
            name = Path(parameters.checkpoint).name
            run = stack.enter_context(mlflow_run("release", name, found.mode, parameters.parent_run_id, run_id))
        log_parity(run, export)
        for entry in variants:
            if entry.parity is not None:
                run.log_text(entry.parity.model_dump_json(indent=2), f"release/parity-{entry.variant}.json")
        git = tracking.git_state()
        # A test score of a model that was selected on test has another name.
        test = marked("test_accuracy", found.selection_split)
        registered = tracking.register_release(
            onnx_path=out,
            run_id=run.run_id,
            mode=found.mode,
            val_accuracy=scores.val,
            fingerprint=scores.fingerprint,
            selection_split=found.selection_split,
            not_champion=scores.not_champion,
            tags={
                test: scores.test,
                "parity_max_abs_difference": export.parity.max_abs_difference,
                "parity_equal_segments": export.parity.equal_segments,
                "parity_val_videos": export.parity.rows,
                "git_commit": None if git is None else git.commit,
                "git_dirty": None if git is None else str(git.dirty).lower(),
                "study": parameters.study,
                "recipe": None if found.config is None else found.config.recipe,
                **{f"init_{key}": value for key, value in found.init_known().items()},
                **{key: value for entry in variants for key, value in entry.tags().items()},
            },
            variants={entry.variant: entry.path for entry in variants if entry.path is not None},
        )
        result = ReleaseResult(
            export=export,
            registered=registered,
            run_id=run.run_id,
            val_accuracy=scores.val,
            test_accuracy=scores.test,
            selection_split=found.selection_split,
            variants=variants,
        )
        run.log_text(result.markdown(), "release/release.md")
        if run_id is not None and run_id != run.run_id:
            adopted = tracking.open_run(run_id)
            adopted.set_tags({"cmran.job": "release", "cmran.mode": found.mode, "cmran.version": registered.uri})
            adopted.log_text(result.markdown(), "release.md")
    return result


def _scores(found: "FoundModel", data: Path | None) -> "Scores":
    """The scores that the training measured; those of a published checkpoint are measured now."""
    from cmran.data.dataset import open_folder
    from serving.release import measure_scores, recorded_scores

    if found.fingerprint is not None:
        return recorded_scores(
            found.fingerprint, found.val_accuracy, found.metrics, data or found.data, mode=found.mode
        )
    if data is None:
        raise DataError(
            f"{found.name}: a published checkpoint does not name its data", hint="give its data folder as `data`"
        )
    with open_folder(data, mode=found.mode) as folder:
        found.check_fits(folder)
        return measure_scores(found.model, folder)
