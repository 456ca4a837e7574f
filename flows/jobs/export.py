"""What each job takes: one frozen record a job, every field described and bounded.

From these come the forms in Prefect's UI, the options of the `cmran` command and the checks of both.
"""

import contextlib
import logging
import os
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from pydantic import Field

from cmran.config import (
    Frozen,
    Mode,
)
from cmran.errors import CmranError
from flows.jobs.common import MarkdownResult, paragraphs, table

if TYPE_CHECKING:
    import numpy as np
    from numpy.typing import NDArray

    from cmran.data.dataset import FeatureFolder
    from cmran.tracking import Run
    from flows.jobs.models import FoundModel
    from serving.parity import ParityReport


class ExportParameters(Frozen):
    """Write a trained model as ONNX and prove that it says the same as PyTorch."""

    checkpoint: str = Field(
        min_length=1, description="Folder of a run, best.pt, a published .pth.tar or the id of an MLflow run."
    )
    out: Path = Field(description="The ONNX file to write.")
    data: Path | None = Field(
        None, description="Folder whose val videos are compared too. Default: the model's own, if it is still there."
    )
    mode: Mode | None = Field(None, description="Of a published .pth.tar. Default: as its weights tell.")


@dataclass(frozen=True, kw_only=True)
class ExportResult(MarkdownResult):
    """An ONNX file and the proof that it says what the network says."""

    checkpoint: str
    mode: Mode
    out: Path
    parity: "ParityReport"
    val_videos: int = 0
    # Of the folder whose val videos were compared; 0 without one.
    notes: tuple[str, ...] = ()
    kept: bool = True
    # Whether the file outlives the command.

    @property
    def ok(self) -> bool:
        """Whether the proof passed."""
        return self.parity.passed

    def markdown(self) -> str:
        """The proof, and everything that failed in it."""
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
        verdict = "proof passed" if parity.passed else "PROOF FAILED"
        lines = [
            f"# Export, {self.mode}: {self.checkpoint}" + (f" -> {self.out}" if self.kept else ""),
            f"{verdict[0].upper()}{verdict[1:]}.",
            *self.notes,
            table(("ONNX Runtime against PyTorch", "found"), rows),
            *(["\n".join(f"- {failure}" for failure in parity.failures)] if parity.failures else []),
        ]
        return paragraphs(lines)


log = logging.getLogger(__name__)


PARITY_BATCH = 32
"""Val videos at a time in the parity checks, which compare all of them."""


def export_job(parameters: ExportParameters, *, run_id: str | None = None) -> ExportResult:
    """Export a model and prove the file. The file takes its name only when the proof has passed."""
    from cmran import tracking
    from flows.jobs.models import find_model

    with find_model(parameters.checkpoint, parameters.mode) as found:
        result = export_with_parity_check(found, parameters.out, parameters.data)
        if run_id is not None:
            run = tracking.open_run(run_id)
            run.set_tags({"cmran.job": "export", "cmran.mode": found.mode, "cmran.training_run": found.run_id})
            log_parity(run, result)
            if result.ok:
                run.log_artifact(parameters.out)
    return result


def export_with_parity_check(found: "FoundModel", out: Path, data: Path | None) -> ExportResult:
    """Export beside `out`, prove, and only then take the name `out`."""
    from cmran import tracking
    from cmran.data.dataset import open_folder
    from serving.export import export_onnx
    from serving.parity import check_parity

    if out.is_dir():
        raise CmranError(f"{out} is a folder: name the ONNX file to write, such as {out / f'cmran-{found.mode}.onnx'}")
    if out.exists() and not out.is_file():
        raise CmranError(f"{out} is a device or a pipe, expected the name of an ONNX file: name another")
    notes, segments, grid = found.notes(), found.segments, found.grid
    real: Iterator[tuple[NDArray[Any], NDArray[Any]]] = iter(())
    val_videos = 0
    folder_path, why_not = parity_data(found, data)
    with contextlib.ExitStack() as stack:
        if folder_path is not None:
            folder = stack.enter_context(open_folder(folder_path, mode=found.mode))
            found.check_fits(folder)
            # A published checkpoint does not tell its own.
            if found.config is not None and (folder.segments, folder.grid) != (segments, grid):
                raise CmranError(
                    f"{folder.path}: found {folder.segments} segments and a {folder.grid[0]}x{folder.grid[1]} grid,"
                    f" expected {segments} and {grid[0]}x{grid[1]}, as {found.name} was trained on: name other data"
                )
            segments, grid = folder.segments, folder.grid
            rows = folder.order("val")
            val_videos, real = len(rows), val_batches(folder, rows)
            if data is not None and found.fingerprint not in (None, folder.fingerprint):
                notes.append(
                    f"Its val videos are of other data (`{folder.fingerprint}`) than the model was trained on."
                )
        else:
            notes.append(f"**No val video was compared**: {why_not}.")
            log.warning("no val video is compared in the proof: %s", why_not)

        git = tracking.git_state()
        metadata = {
            "fingerprint": found.fingerprint or "unknown",
            "run_id": found.run_id or "unknown",
            "git_commit": "unknown" if git is None else git.commit + ("+changes" if git.dirty else ""),
            "selection_split": found.selection_split,
            **{f"init_{key}": value for key, value in found.init_known().items()},
        }
        unchecked = out.with_name(f"{out.name}.unproven")
        log.info("exporting %s", found.name)
        export_onnx(found.model, unchecked, segments=segments, grid=grid, metadata=metadata)
        try:
            parity = check_parity(unchecked, found.model, real=real)
        except CmranError:
            # The data cannot be read, or are not finite: nothing is known of the file.
            unchecked.unlink(missing_ok=True)
            raise
    if parity.passed:
        os.replace(unchecked, out)
    return ExportResult(
        checkpoint=found.name,
        mode=found.mode,
        out=out if parity.passed else unchecked,
        parity=parity,
        val_videos=val_videos,
        notes=tuple(notes),
    )


def val_batches(folder: "FeatureFolder", rows: "NDArray[np.int64]") -> "Iterator[tuple[NDArray[Any], NDArray[Any]]]":
    """Yield visual and audio features of a few videos at a time. Raises CmranError where they are not finite."""
    import numpy as np

    from cmran.utils.progress import Progress

    with Progress(len(rows), "parity check", "videos") as bar:
        for start in range(0, len(rows), PARITY_BATCH):
            part = rows[start : start + PARITY_BATCH]
            visual, audio = folder.read_visual(part), folder.read_audio(part)
            # The sums are the quick look.
            if not (np.isfinite(visual.sum()) and np.isfinite(audio.sum())):
                folder.check_finite(part)
            yield visual, audio
            bar.update(len(part))


def parity_data(found: "FoundModel", data: Path | None) -> tuple[Path | None, str]:
    """The folder whose val videos the proof compares; None and the reason where there is none."""
    from cmran.data.fingerprint import folder_fingerprint

    if data is not None:
        return data, ""
    if found.data is None:
        return None, "a published checkpoint does not tell its data, and --data was not given"
    if not found.data.is_dir():
        return None, f"its data folder {found.data} is not there any more, and --data was not given"
    if folder_fingerprint(found.data) != found.fingerprint:
        return None, f"the data in {found.data} have changed since, and --data was not given"
    return found.data, ""


def log_parity(run: "Run", result: ExportResult) -> None:
    """Log the parity report as artifacts of `run`."""
    run.log_text(result.parity.model_dump_json(indent=2), "release/parity.json")
    run.log_text(result.markdown(), "release/parity.md")
