"""The flow `cmran-pipeline`."""

from prefect import flow

from flows.jobs import pipeline
from flows.jobs.pipeline import PipelineParameters, PipelineResult
from flows.predict_flow import batch_inference
from flows.release_flow import release
from flows.search_flow import search
from flows.support import prefect_logs, publish
from flows.train_flow import train
from flows.validate_flow import validate_features


@flow(name="cmran-pipeline", validate_parameters=True)
def cmran_pipeline(parameters: PipelineParameters, run_id: str | None = None) -> PipelineResult:
    """Run the full pipeline: validate, then search, train, release and predict in each mode.

    Args:
        parameters: What to run.
        run_id: MLflow run to use instead of a new one.
    """
    steps = pipeline.Steps(
        validate=validate_features, search=search, train=train, release=release, predict=batch_inference
    )
    with prefect_logs():
        result = pipeline.run(parameters, run_id=run_id, steps=steps)
        publish("cmran-pipeline", result)
        return result
