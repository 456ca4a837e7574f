"""The flow `train`."""

from prefect import flow

from flows.jobs.train import TrainParameters, TrainResult, train_job
from flows.support import prefect_logs, publish, resumed, run_step


@flow(name="train", validate_parameters=True)
def train(parameters: TrainParameters) -> TrainResult:
    """Train CMRAN; the epoch that is best on val is kept, test is evaluated once at the end."""
    with prefect_logs():
        # A second try goes on with what the first left; but not with what somebody else had left before.
        ours = parameters.resume or not parameters.out.exists()
        result = run_step(train_job, parameters, again=resumed if ours else None)
        publish(f"train-{result.fit.config.model.mode}", result)
        return result
