"""Running the pipeline's flow from the command line: quietly, and with a server of its own where there is none."""

import atexit
import contextlib
import logging
import os
import signal
import sys
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from types import FrameType
from typing import Any

from cmran.errors import CmranError
from cmran.utils.files import temporary_home
from cmran.utils.uris import redact
from flows.jobs.pipeline import PipelineParameters, PipelineResult, check_pipeline
from flows.prefect_server import ServerError, started_server
from flows.proxies import described, exempt_loopback, proxy_of, set_aside_unusable

log = logging.getLogger(__name__)

SERVER_START_S = 120
"""How long Prefect's own server may take: 5 to 11 s on two idle cores, more on busy ones."""

CONNECT_S, ANSWER_S = 3.0, 15.0
"""How long a server of the user may take to accept a connection (tried four times) and to answer the first request."""

END_S = 8.0
"""After Ctrl-C or TERM the process ends within this time, whatever it still waits for."""


def run_pipeline(parameters: PipelineParameters, *, run_id: str | None = None) -> PipelineResult:
    """Run the flow `cmran-pipeline` in this process.

    Raises CmranError: what the pipeline raises, or Prefect's server cannot be reached or does not start.
    """
    exempt_loopback()
    # At once, and not after a server's start.
    check_pipeline(parameters)
    settings = {
        # Our own log lines are on the console already; Prefect would say each again.
        "PREFECT_LOGGING_HANDLERS_CONSOLE_LEVEL": "CRITICAL",
        "PREFECT_LOGGING_INTERNAL_LEVEL": "CRITICAL",
        "PREFECT_SERVER_ANALYTICS_ENABLED": "false",
        "DO_NOT_TRACK": "true",
    }
    if "PREFECT_HOME" not in os.environ and not _is_writable(Path.home()):
        settings["PREFECT_HOME"] = str(temporary_home() / ".prefect")
        log.info("the home folder %s cannot be written: Prefect works in %s", Path.home(), settings["PREFECT_HOME"])
    for name, value in settings.items():
        os.environ.setdefault(name, value)
    with _ending_in_time():
        # Prefect reads its settings when it is imported.
        from prefect.settings import PREFECT_API_URL

        url = PREFECT_API_URL.value()
        variables = {"PREFECT_API_URL": url} | {
            name: os.environ.get(name) for name in ("MLFLOW_TRACKING_URI", "MLFLOW_REGISTRY_URI")
        }
        set_aside_unusable({name: value for name, value in variables.items() if value and value.startswith("http")})
        if url:
            log.info("Prefect: %s", redact(url))
            _check_server(url)
            return _run_flow(parameters, run_id, url)
        log.info("Prefect: starting a server for this pipeline")
        try:
            with started_server(SERVER_START_S) as own:
                return _run_flow(parameters, run_id, own)
        except ServerError as error:
            raise CmranError(
                f"Prefect's own server did not start: {error}: look at the folder PREFECT_HOME (default: ~/.prefect), "
                "or start a server (`prefect server start`) and set PREFECT_API_URL"
            ) from error


def _run_flow(parameters: PipelineParameters, run_id: str | None, url: str) -> PipelineResult:
    import httpx
    import prefect.flow_engine
    from prefect.settings import PREFECT_API_URL, PREFECT_FLOWS_HEARTBEAT_FREQUENCY, temporary_settings

    from flows.pipeline_flow import cmran_pipeline

    # In a flow Prefect's handler of TERM would take the place of ours: a repeated signal would then interrupt the very
    # request that reports the flow's end.
    vars(prefect.flow_engine)["capture_sigterm"] = contextlib.nullcontext
    # Prefect's threads write on stderr, amid our lines, what they could not send; a lost server ends the flow itself.
    logging.raiseExceptions = False
    # The heartbeat costs a second a flow, and here this process is the one that would miss it.
    with temporary_settings({PREFECT_FLOWS_HEARTBEAT_FREQUENCY: None, PREFECT_API_URL: url}):
        try:
            return cmran_pipeline(parameters, run_id=run_id)
        except (RuntimeError, httpx.HTTPError) as error:
            if isinstance(error, RuntimeError) and "API" not in str(error):
                raise
            _give_up_the_server()
            raise CmranError(
                f"Prefect's server at {redact(url)} failed ({_line(error)}): look at it, then try again"
            ) from error
        finally:
            _send_the_rest()


def _send_the_rest() -> None:
    """Send what Prefect's threads still have of logs and events, before a server of ours ends."""
    from prefect.events.worker import EventsWorker
    from prefect.logging.handlers import APILogWorker

    for worker in (APILogWorker, EventsWorker):
        worker.drain_all(timeout=5)


def _check_server(url: str) -> None:
    """Raises CmranError: no Prefect server answers at `url`, or it refuses this client."""
    import httpx
    from prefect.client.orchestration import get_client
    from prefect.exceptions import PrefectException
    from prefect.settings import PREFECT_CLIENT_MAX_RETRIES, temporary_settings

    timeout = httpx.Timeout(ANSWER_S, connect=CONNECT_S)
    try:
        with (
            temporary_settings({PREFECT_CLIENT_MAX_RETRIES: 0}),
            get_client(httpx_settings={"timeout": timeout}, sync_client=True) as client,
        ):
            # Not its health, which it tells to everyone.
            client.read_flows(limit=1)
    except (httpx.HTTPError, httpx.InvalidURL, PrefectException, OSError, ValueError) as error:
        source = "PREFECT_API_URL" if os.environ.get("PREFECT_API_URL") else "PREFECT_API_URL of the Prefect profile"
        proxy = proxy_of(url)
        through = f" through the proxy {described(proxy)}" if proxy else ""
        advice = "start the server (`prefect server start`), correct the variable, or unset it to have one started"
        if isinstance(error, httpx.HTTPStatusError) and error.response.status_code in (401, 403):
            advice = "set PREFECT_API_AUTH_STRING or PREFECT_API_KEY"
        elif proxy:
            advice = "correct the proxy or the URL, or add the host to NO_PROXY"
        raise CmranError(
            f"Prefect has no server at {source}={redact(url)}{through} ({_line(error)}): {advice}"
        ) from error


def _line(error: Exception) -> str:
    """The error in one line, without a password."""
    import httpx

    if isinstance(error, httpx.HTTPStatusError):
        return f"HTTP status {error.response.status_code}"
    if isinstance(error, httpx.TimeoutException):
        return "no answer in time"
    lines = redact(str(error)).split("\n")
    return " ".join(lines[0].split()) or type(error).__name__


@contextlib.contextmanager
def _ending_in_time() -> Iterator[None]:
    """Within the block the first Ctrl-C or TERM starts a limit for all that ends in order; later ones do nothing.

    A server that is gone, too, would otherwise hold the process for minutes: Prefect's client tries again.
    """
    if threading.current_thread() is not threading.main_thread():
        yield
        return
    inside, ending = True, False
    caught: BaseException | None = None

    def watch() -> None:
        # Told by the C handler itself: the Python one has to wait while the main thread computes.
        while number := int.from_bytes(os.read(told, 1)):
            if number in before:
                time.sleep(END_S)
                if inside:
                    print("terminated" if number == signal.SIGTERM else "interrupted", file=sys.stderr, flush=True)
                os._exit(128 + number)
        os.close(told)

    def stop(number: int, frame: FrameType | None) -> None:
        nonlocal ending, caught
        if not ending:
            ending = True
            _give_up_the_server()
            # All that matters is ended by then; to take the interpreter apart took seconds more.
            atexit.register(os._exit, 128 + number)
            try:
                before[number](number, frame)
            except BaseException as error:
                caught = error
                raise

    def dropped(what: Any) -> None:
        nonlocal ending
        # Python dropped its exception: it is sent again.
        ending = ending and not issubclass(what.exc_type, KeyboardInterrupt)
        hook(what)

    before: dict[int, Callable[[int, FrameType | None], Any]] = {}
    hook, sys.unraisablehook = sys.unraisablehook, dropped
    for number in (signal.SIGINT, signal.SIGTERM):
        handler = signal.getsignal(number)
        if callable(handler):
            before[number] = handler
            signal.signal(number, stop)
    told, tell = os.pipe()
    os.set_blocking(tell, False)
    wakeup = signal.set_wakeup_fd(tell, warn_on_full_buffer=False)
    threading.Thread(target=watch, daemon=True).start()
    try:
        yield
    except Exception as error:
        if caught is None:
            raise
        # A server that was gone, too, when the end was to be reported to it.
        raise caught from error
    finally:
        inside = False
        signal.set_wakeup_fd(wakeup)
        os.close(tell)
        sys.unraisablehook = hook
        for taken, handler in before.items():
            signal.signal(taken, handler)


def _give_up_the_server() -> None:
    """From now on Prefect's client tries once."""
    if "prefect.settings" in sys.modules:
        from prefect.settings import get_current_settings

        get_current_settings().client.max_retries = 0


def _is_writable(folder: Path) -> bool:
    """Whether `folder`, or the first of its parents that there is, can be written."""
    there = next((path for path in (folder, *folder.parents) if path.exists()), folder)
    return os.access(there, os.W_OK)
