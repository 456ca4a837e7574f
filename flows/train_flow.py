"""The flow `train`."""

from prefect import flow

from flows.jobs import train as job
from flows.jobs.train import TrainParameters, TrainResult
from flows.support import prefect_logs, publish, resumed, run_step


@flow(name="train", validate_parameters=True)
def train(parameters: TrainParameters) -> TrainResult:
    """Train CMRAN. The best epoch on val is kept; test is evaluated once at the end."""
    with prefect_logs():
        # A retry resumes the run of the first attempt, but never a run that existed before.
        ours = parameters.resume or not parameters.out.exists()
        result = run_step(job.run, parameters, on_retry=resumed if ours else None)
        publish(f"train-{result.fit.config.model.mode}", result)
        return result
