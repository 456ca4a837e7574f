"""Export a trained model as ONNX and check its numerical parity with PyTorch."""

import contextlib
import logging
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from pydantic import Field

from cmran.config import Frozen, Mode
from flows.jobs.common import MarkdownResult, paragraphs, table

if TYPE_CHECKING:
    from cmran.tracking import Run
    from flows.jobs.models import FoundModel
    from serving.parity import ParityReport

log = logging.getLogger(__name__)


class ExportParameters(Frozen):
    """Write a trained model as ONNX and check its numerical parity with PyTorch."""

    checkpoint: str = Field(
        min_length=1, description="Run directory, best.pt, a published .pth.tar or the id of an MLflow run."
    )
    out: Path = Field(description="The ONNX file to write.")
    data: Path | None = Field(
        None,
        description="Data folder whose val videos are compared too. Default: that of the training, if it still exists.",
    )
    mode: Mode | None = Field(None, description="Mode of a published .pth.tar. Default: that of its weights.")


@dataclass(frozen=True, kw_only=True)
class ExportResult(MarkdownResult):
    """An ONNX file and the result of its parity check."""

    checkpoint: str
    """The model as the user named it."""
    mode: Mode
    """Mode of the model."""
    out: Path
    """The ONNX file; with the suffix ".unchecked" if the parity check failed."""
    parity: "ParityReport"
    """The result of the parity check."""
    val_videos: int = 0
    """Val videos of the data folder; 0 without one."""
    notes: tuple[str, ...] = ()
    """Warnings for the reader of the report."""
    kept: bool = True
    """Whether the file still exists after the command."""

    @property
    def ok(self) -> bool:
        """Whether the parity check passed."""
        return self.parity.passed

    def markdown(self) -> str:
        """Return the report of the parity check with all mismatches."""
        parity = self.parity
        difference = "-" if parity.max_abs_difference is None else f"{parity.max_abs_difference:.3g}"
        equal = "-" if parity.equal_segments is None else f"{100 * parity.equal_segments:.3f} %"
        rows = (
            ("largest absolute difference", difference),
            ("equal segment labels", equal),
            ("random videos, in batches of " + ", ".join(map(str, parity.batch_sizes)), parity.videos),
            ("val videos", f"{parity.rows} of {self.val_videos}" if self.val_videos else parity.rows),
            ("provider", parity.provider),
        )
        lines = [
            f"# Export, {self.mode}: {self.checkpoint}" + (f" -> {self.out}" if self.kept else ""),
            "Parity check passed." if parity.passed else "PARITY CHECK FAILED.",
            *self.notes,
            table(("ONNX Runtime against PyTorch", "found"), rows),
            *(["\n".join(f"- {failure}" for failure in parity.failures)] if parity.failures else []),
        ]
        return paragraphs(lines)


def run(parameters: ExportParameters, *, run_id: str | None = None) -> ExportResult:
    """Export a model with a parity check. A file that fails the check does not get the name `out`.

    Args:
        parameters: The parameters of the job.
        run_id: MLflow run to log to; `None`: the export is not logged.

    Raises:
        CmranError: The model was not found, or the file cannot be written or compared.
    """
    from cmran import tracking
    from flows.jobs.models import find_model

    with find_model(parameters.checkpoint, parameters.mode) as found:
        result = export_found(found, parameters.out, parameters.data)
        if run_id is not None:
            run = tracking.open_run(run_id)
            run.set_tags({"cmran.job": "export", "cmran.mode": found.mode, "cmran.training_run": found.run_id})
            log_parity(run, result)
            if result.ok:
                run.log_artifact(parameters.out)
    return result


def export_found(found: "FoundModel", out: Path, data: Path | None) -> ExportResult:
    """Export a model with a parity check on the val videos of `data`, or of its training data."""
    from cmran import tracking
    from cmran.data.dataset import open_folder
    from serving.release import export_with_parity_check, find_parity_data

    notes, segments, grid, val_videos = found.notes(), found.segments, found.grid, 0
    path, reason = find_parity_data(data, recorded=found.data, fingerprint=found.fingerprint)
    with contextlib.ExitStack() as stack:
        folder = None
        if path is None:
            notes.append(f"**No val video was compared**: {reason}.")
            log.warning("the parity check compares no val video: %s", reason)
        else:
            folder = stack.enter_context(open_folder(path, mode=found.mode))
            found.check_fits(folder)
            if found.config is None:
                # A published checkpoint does not state these sizes.
                segments, grid = folder.segments, folder.grid
            val_videos = len(folder.order("val"))
            if data is not None and found.fingerprint not in (None, folder.fingerprint):
                notes.append(
                    f"The val videos are from other data (`{folder.fingerprint}`) than the model was trained on."
                )
        git = tracking.git_state()
        metadata = {
            "fingerprint": found.fingerprint or "unknown",
            "run_id": found.run_id or "unknown",
            "git_commit": "unknown" if git is None else git.commit + ("+changes" if git.dirty else ""),
            "selection_split": found.selection_split,
            **{f"init_{key}": value for key, value in found.init_known().items()},
        }
        log.info("exporting %s", found.name)
        written, parity = export_with_parity_check(
            found.model, out, folder, segments=segments, grid=grid, metadata=metadata
        )
    return ExportResult(
        checkpoint=found.name,
        mode=found.mode,
        out=written,
        parity=parity,
        val_videos=val_videos,
        notes=tuple(notes),
    )


def log_parity(run: "Run", result: ExportResult) -> None:
    """Log the result of the parity check as artifacts of `run`."""
    run.log_text(result.parity.model_dump_json(indent=2), "release/parity.json")
    run.log_text(result.markdown(), "release/parity.md")
