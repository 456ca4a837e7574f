"""The flow `search`."""

from prefect import flow

from flows.jobs import search as job
from flows.jobs.search import SearchJobResult, SearchParameters
from flows.support import prefect_logs, publish, run_step


@flow(name="search", validate_parameters=True)
def search(parameters: SearchParameters) -> SearchJobResult:
    """Search for better settings with Optuna; trial 0 is the recipe itself."""
    with prefect_logs():
        # The study records the finished trials: a retry runs only the missing ones.
        result = run_step(job.run, parameters)
        publish(f"search-{result.mode}", result)
        return result
