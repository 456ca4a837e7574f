"""The flow `batch-inference`."""

from prefect import flow

from flows.jobs.predict import PredictParameters, PredictResult, predict_job
from flows.support import prefect_logs, publish, resumed, run_step, tracked


@flow(name="batch-inference", validate_parameters=True)
def batch_inference(parameters: PredictParameters) -> PredictResult:
    """Predict the events of a folder's videos with a registered or exported model."""
    with prefect_logs():
        # A second try goes on with what the first left; but not with what somebody else had left before.
        ours = parameters.resume or not parameters.out.exists()
        result = run_step(predict_job, tracked(parameters), again=resumed if ours else None)
        publish("batch-inference", result)
        return result
