"""The flow `validate-features`."""

from prefect import flow

from flows.jobs import validate
from flows.jobs.validate import ValidateParameters, ValidationResult
from flows.support import prefect_logs, publish, run_step, tracked


@flow(name="validate-features", validate_parameters=True)
def validate_features(parameters: ValidateParameters) -> ValidationResult:
    """Check a folder of features and report every fault. An error in the folder fails the flow."""
    with prefect_logs():
        result = run_step(validate.run, tracked(parameters))
        publish("validate-features", result)
        result.raise_if_failed()
        return result
