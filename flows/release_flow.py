"""The flow `release`."""

from prefect import flow

from flows.jobs import release as job
from flows.jobs.release import ReleaseParameters, ReleaseResult
from flows.support import prefect_logs, publish, run_step


@flow(name="release", validate_parameters=True)
def release(parameters: ReleaseParameters) -> ReleaseResult:
    """Export a model, check its parity and register it as champion or challenger. A failed check fails the flow."""
    with prefect_logs():
        result = run_step(job.run, parameters)
        publish(f"release-{result.export.mode}", result)
        return result
