"""The flow `search`."""

from prefect import flow

from flows.jobs.search import SearchJobResult, SearchParameters, search_job
from flows.support import prefect_logs, publish, run_step


@flow(name="search", validate_parameters=True)
def search(parameters: SearchParameters) -> SearchJobResult:
    """Search for better settings with Optuna; trial 0 is the recipe itself."""
    with prefect_logs():
        # The study knows what is done: a second try does what is left.
        result = run_step(search_job, parameters)
        publish(f"search-{result.mode}", result)
        return result
