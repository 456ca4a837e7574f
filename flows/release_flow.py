"""The flow `release`."""

from prefect import flow

from flows.jobs.release import ReleaseParameters, ReleaseResult, release_job
from flows.support import prefect_logs, publish, run_step


@flow(name="release", validate_parameters=True)
def release(parameters: ReleaseParameters) -> ReleaseResult:
    """Export, prove and register a model; it becomes champion or challenger. A failed proof fails the flow."""
    with prefect_logs():
        result = run_step(release_job, parameters)
        publish(f"release-{result.export.mode}", result)
        return result
