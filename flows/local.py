"""Running the pipeline's flow from the command line: quietly, and with a server of its own where there is none."""

import logging
import os

from cmran.errors import UserError
from flows.parameters import PipelineParameters
from flows.pipeline_job import check_pipeline
from flows.results import PipelineResult

log = logging.getLogger(__name__)

SERVER_START_S = 120
"""How long Prefect's own server may take: 5 to 11 s on two idle cores, more on busy ones."""


def run_pipeline(parameters: PipelineParameters, *, run_id: str | None = None) -> PipelineResult:
    """Run the flow `cmran-pipeline` in this process.

    Raises UserError: what the pipeline raises, or Prefect's server cannot be reached or does not start.
    """
    # At once, and not after a server's start.
    check_pipeline(parameters)
    settings = {
        # Our own log lines are on the console already; Prefect would say each again.
        "PREFECT_LOGGING_HANDLERS_CONSOLE_LEVEL": "CRITICAL",
        "PREFECT_SERVER_EPHEMERAL_STARTUP_TIMEOUT_SECONDS": str(SERVER_START_S),
        "PREFECT_SERVER_ANALYTICS_ENABLED": "false",
        "DO_NOT_TRACK": "true",
    }
    for name, value in settings.items():
        os.environ.setdefault(name, value)
    # Prefect reads its settings when it is imported.
    from prefect.settings import PREFECT_API_URL, PREFECT_FLOWS_HEARTBEAT_FREQUENCY, temporary_settings

    server = PREFECT_API_URL.value()
    log.info("Prefect: %s", server or "starting a server for this pipeline")
    from flows.pipeline_flow import cmran_pipeline

    try:
        # The heartbeat costs a second a flow, and here this process is the one that would miss it.
        with temporary_settings({PREFECT_FLOWS_HEARTBEAT_FREQUENCY: None}):
            return cmran_pipeline(parameters, run_id=run_id)
    except RuntimeError as error:
        if "API" not in str(error):
            raise
        where = f"at {server}" if server else f"of its own within {SERVER_START_S} s"
        raise UserError(
            f"Prefect has no server {where} ({' '.join(str(error).split())}): "
            "start one (`prefect server start`), correct PREFECT_API_URL, or unset it to have one started"
        ) from error
