"""What each job takes: one frozen record a job, every field described and bounded.

From these come the forms in Prefect's UI, the options of the `cmran` command and the checks of both.
"""

from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from pydantic import Field

from cmran.config import (
    Frozen,
    Mode,
)
from cmran.errors import CmranError
from cmran.utils.files import write_text
from flows.jobs.common import DATA_HELP, PARENT_HELP, RunId, is_tracked, mlflow_run

if TYPE_CHECKING:
    from cmran.data.validation import Report


class ValidateParameters(Frozen):
    """Check a folder of features and report every fault in it."""

    data: Path = Field(description=DATA_HELP)
    mode: Mode = Field("full", description="weak: the background videos' files are needed and checked too.")
    report: Path | None = Field(None, description="JSON file to write the report to.")
    track: bool = Field(False, description="Keep the report as an artifact of an MLflow run.")
    parent_run_id: RunId | None = Field(None, description=PARENT_HELP)


@dataclass(frozen=True, kw_only=True)
class ValidationResult:
    """Report on a folder."""

    data: Path
    mode: Mode
    report: "Report"

    @property
    def ok(self) -> bool:
        """No error; there may be warnings."""
        return self.report.ok

    def markdown(self) -> str:
        """The report as it stands."""
        return self.report.to_markdown()

    def text(self) -> str:
        """One line a fault, for a terminal is too narrow for the table."""
        kinds = (("error", self.report.errors), ("warning", self.report.warnings))
        lines = [f"{kind} {fault}" for kind, faults in kinds for fault in faults]
        end = (
            f"{self.data}: {self.report.summary()} (mode {self.mode}); fingerprint {self.report.fingerprint or 'none'}"
        )
        return "\n".join([*lines, end])

    def raise_if_failed(self) -> None:
        """Raises CmranError where the folder has errors: one line with the first."""
        if not self.ok:
            more = f" (and {len(self.report.errors) - 1} more errors)" if len(self.report.errors) > 1 else ""
            raise CmranError(f"{self.data}: not fit for mode {self.mode}: {self.report.errors[0]}{more}")


def validate_job(parameters: ValidateParameters, *, run_id: str | None = None) -> ValidationResult:
    """Check a folder. The report goes to MLflow where a run is adopted or asked for, or has a parent."""
    from cmran.data.validation import validate

    tracked = is_tracked(parameters, run_id)
    report = validate(parameters.data, parameters.mode)
    result = ValidationResult(data=parameters.data, mode=parameters.mode, report=report)
    if parameters.report is not None:
        write_text(parameters.report, report.to_json())
    if tracked:
        name = parameters.data.name
        with mlflow_run("validate", name, parameters.mode, parameters.parent_run_id, run_id) as run:
            if report.fingerprint:
                run.log_dataset(parameters.data, report.fingerprint, "validation")
            run.log_text(report.to_json(), "validation.json")
            run.log_text(result.markdown(), "validation.md")
            counts = {"errors": len(report.errors), "warnings": len(report.warnings)}
            run.log_metrics({f"validation.{key}": float(value) for key, value in counts.items()})
    return result
