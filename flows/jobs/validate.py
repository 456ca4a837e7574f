"""`validate`: check a folder of features and report every fault."""

from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from pydantic import Field

from cmran.config import Frozen, Mode
from cmran.errors import DataError
from cmran.utils.files import write_text
from flows.jobs.common import DATA_HELP, PARENT_HELP, RunId, is_tracked, mlflow_run

if TYPE_CHECKING:
    from cmran.data.validation import Report


class ValidateParameters(Frozen):
    """Check a folder of features and report every fault."""

    data: Path = Field(description=DATA_HELP)
    mode: Mode = Field("full", description="weak: the files of the background videos are required and checked too.")
    report: Path | None = Field(None, description="JSON file for the report.")
    track: bool = Field(False, description="Log the report to an MLflow run.")
    parent_run_id: RunId | None = Field(None, description=PARENT_HELP)


@dataclass(frozen=True, kw_only=True)
class ValidationResult:
    """The report on a folder."""

    data: Path
    mode: Mode
    report: "Report"

    @property
    def ok(self) -> bool:
        """Whether there is no error; there may be warnings."""
        return self.report.ok

    def markdown(self) -> str:
        """Return the report."""
        return self.report.to_markdown()

    def text(self) -> str:
        """Return one line per fault, because a terminal is too narrow for the table."""
        kinds = (("error", self.report.errors), ("warning", self.report.warnings))
        lines = [f"{kind} {fault}" for kind, faults in kinds for fault in faults]
        end = (
            f"{self.data}: {self.report.summary()} (mode {self.mode}); fingerprint {self.report.fingerprint or 'none'}"
        )
        return "\n".join([*lines, end])

    def raise_if_failed(self) -> None:
        """Raise DataError with the first error and the number of the others."""
        if not self.ok:
            more = f" (and {len(self.report.errors) - 1} more errors)" if len(self.report.errors) > 1 else ""
            raise DataError(f"{self.data}: not usable in mode {self.mode}: {self.report.errors[0]}{more}")


def run(parameters: ValidateParameters, *, run_id: str | None = None) -> ValidationResult:
    """Check a folder. The report is logged to MLflow with `track`, in an adopted run, or below a parent run."""
    from cmran.data.validation import validate

    tracked = is_tracked(parameters, run_id)
    report = validate(parameters.data, parameters.mode)
    result = ValidationResult(data=parameters.data, mode=parameters.mode, report=report)
    if parameters.report is not None:
        write_text(parameters.report, report.to_json())
    if tracked:
        name = parameters.data.name
        with mlflow_run("validate", name, parameters.mode, parameters.parent_run_id, run_id) as active_run:
            if report.fingerprint:
                active_run.log_dataset(parameters.data, report.fingerprint, "validation")
            active_run.log_text(report.to_json(), "validation.json")
            active_run.log_text(result.markdown(), "validation.md")
            counts = {"errors": len(report.errors), "warnings": len(report.warnings)}
            active_run.log_metrics({f"validation.{key}": float(value) for key, value in counts.items()})
    return result
