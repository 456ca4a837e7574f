"""The flow `batch-inference`."""

from prefect import flow

from flows.jobs import predict
from flows.jobs.predict import PredictParameters, PredictResult
from flows.support import prefect_logs, publish, resumed, run_step, tracked


@flow(name="batch-inference", validate_parameters=True)
def batch_inference(parameters: PredictParameters) -> PredictResult:
    """Predict the events of all videos in a folder with a registered or exported model."""
    with prefect_logs():
        # A retry resumes the output of the first attempt, but never output that existed before.
        ours = parameters.resume or not parameters.out.exists()
        result = run_step(predict.run, tracked(parameters), on_retry=resumed if ours else None)
        publish("batch-inference", result)
        return result
