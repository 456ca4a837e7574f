"""The flow `validate-features`."""

from prefect import flow

from flows.jobs.validate import ValidateParameters, ValidationResult, validate_job
from flows.support import prefect_logs, publish, run_step, tracked


@flow(name="validate-features", validate_parameters=True)
def validate_features(parameters: ValidateParameters) -> ValidationResult:
    """Check a folder of features and report every fault in it; an error in it fails the flow."""
    with prefect_logs():
        result = run_step(validate_job, tracked(parameters))
        publish("validate-features", result)
        result.raise_if_failed()
        return result
