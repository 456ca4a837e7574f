"""Run the pipeline flow from the command line, with a temporary Prefect server if none is configured."""

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

from cmran.errors import CmranError, ConfigError
from cmran.utils.files import temporary_home
from cmran.utils.uris import redact
from flows.jobs.pipeline import PipelineParameters, PipelineResult, check_pipeline
from flows.prefect_server import ServerError, started_server
from flows.proxies import drop_unusable_proxies, exempt_loopback, proxy_of, shown_proxy

log = logging.getLogger(__name__)

SERVER_START_S = 120
"""Time limit for the start of the temporary server: it takes 5 to 11 s on two idle cores, more on busy ones."""

CONNECT_S, ANSWER_S = 3.0, 15.0
"""Time limits for a server of the user to accept a connection (four attempts) and to answer the first request."""

END_S = 8.0
"""After SIGINT or SIGTERM the process ends within this time, whatever it still waits for."""


def run_pipeline(parameters: PipelineParameters, *, run_id: str | None = None) -> PipelineResult:
    """Run the flow `cmran-pipeline` in this process.

    Args:
        parameters: What to run.
        run_id: Adopted MLflow run; None opens a new one.

    Raises:
        CmranError: The pipeline failed, or the Prefect server cannot be reached or does not start.
    """
    exempt_loopback()
    # Report errors of the user before the server is started.
    check_pipeline(parameters)
    settings = {
        # Our log lines are already on the console; Prefect would print each again.
        "PREFECT_LOGGING_HANDLERS_CONSOLE_LEVEL": "CRITICAL",
        "PREFECT_LOGGING_INTERNAL_LEVEL": "CRITICAL",
        "PREFECT_SERVER_ANALYTICS_ENABLED": "false",
        "DO_NOT_TRACK": "true",
    }
    if "PREFECT_HOME" not in os.environ and not _is_writable(Path.home()):
        settings["PREFECT_HOME"] = str(temporary_home() / ".prefect")
        log.info("the home folder %s is not writable: Prefect uses %s", Path.home(), settings["PREFECT_HOME"])
    for name, value in settings.items():
        os.environ.setdefault(name, value)
    with _shutdown_limit():
        # Prefect reads its settings when it is imported.
        from prefect.settings import PREFECT_API_URL

        url = PREFECT_API_URL.value()
        variables = {"PREFECT_API_URL": url} | {
            name: os.environ.get(name) for name in ("MLFLOW_TRACKING_URI", "MLFLOW_REGISTRY_URI")
        }
        drop_unusable_proxies({name: value for name, value in variables.items() if value and value.startswith("http")})
        if url:
            log.info("Prefect: %s", redact(url))
            _check_server(url)
            return _run_flow(parameters, run_id, url)
        log.info("Prefect: starting a temporary server")
        try:
            with started_server(SERVER_START_S) as url:
                return _run_flow(parameters, run_id, url)
        except ServerError as error:
            raise CmranError(
                f"the temporary Prefect server did not start: {error}",
                "check the folder PREFECT_HOME (default: ~/.prefect), or start a server (`prefect server start`) and "
                "set PREFECT_API_URL",
            ) from error


def _run_flow(parameters: PipelineParameters, run_id: str | None, url: str) -> PipelineResult:
    import httpx
    import prefect.flow_engine
    from prefect.settings import PREFECT_API_URL, PREFECT_FLOWS_HEARTBEAT_FREQUENCY, temporary_settings

    from flows.pipeline_flow import cmran_pipeline

    # Inside a flow, Prefect replaces our SIGTERM handler by its own: a repeated signal would then interrupt the request
    # that reports the final state of the flow.
    vars(prefect.flow_engine)["capture_sigterm"] = contextlib.nullcontext
    # Without this, Prefect's threads print a traceback for every record they could not send; a lost server fails the
    # flow anyway.
    logging.raiseExceptions = False
    # The heartbeat costs a second per flow, and only this process could react to a missing one.
    with temporary_settings({PREFECT_FLOWS_HEARTBEAT_FREQUENCY: None, PREFECT_API_URL: url}):
        try:
            return cmran_pipeline(parameters, run_id=run_id)
        except (RuntimeError, httpx.HTTPError) as error:
            # Prefect's client raises RuntimeError from the HTTP error.
            if not isinstance(error, httpx.HTTPError) and not isinstance(error.__cause__, httpx.HTTPError):
                raise
            _stop_client_retries()
            raise CmranError(
                f"the Prefect server at {redact(url)} failed ({_line(error)})", "check the server, then try again"
            ) from error
        finally:
            _flush_prefect()


def _flush_prefect() -> None:
    """Wait until Prefect's threads have sent their logs and events, before a temporary server stops."""
    from prefect.events.worker import EventsWorker
    from prefect.logging.handlers import APILogWorker

    for worker in (APILogWorker, EventsWorker):
        worker.drain_all(timeout=5)


def _check_server(url: str) -> None:
    """Raise ConfigError if no Prefect server answers at `url`, or if it rejects this client."""
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
            # Not the health endpoint, which needs no authentication.
            client.read_flows(limit=1)
    except (httpx.HTTPError, httpx.InvalidURL, PrefectException, OSError, ValueError) as error:
        source = "PREFECT_API_URL" if os.environ.get("PREFECT_API_URL") else "PREFECT_API_URL of the Prefect profile"
        proxy = proxy_of(url)
        through = f" through the proxy {shown_proxy(proxy)}" if proxy else ""
        advice = "start the server (`prefect server start`), correct the URL, or unset it to use a temporary server"
        if isinstance(error, httpx.HTTPStatusError) and error.response.status_code in (401, 403):
            advice = "set PREFECT_API_AUTH_STRING or PREFECT_API_KEY"
        elif proxy:
            advice = "correct the proxy or the URL, or add the host to NO_PROXY"
        raise ConfigError(f"no Prefect server at {source}={redact(url)}{through} ({_line(error)})", advice) from error


def _line(error: Exception) -> str:
    """Return the error in one line, without passwords."""
    import httpx

    if isinstance(error, httpx.HTTPStatusError):
        return f"HTTP status {error.response.status_code}"
    if isinstance(error, httpx.TimeoutException):
        return "no answer in time"
    lines = redact(str(error)).split("\n")
    return " ".join(lines[0].split()) or type(error).__name__


@contextlib.contextmanager
def _shutdown_limit() -> Iterator[None]:
    """Within the block, the first SIGINT or SIGTERM limits the time of the shutdown; later signals are ignored.

    Without a limit, a server that is gone would keep the process alive for minutes, because Prefect's client retries.
    """
    if threading.current_thread() is not threading.main_thread():
        yield
        return
    inside, ending = True, False
    caught: BaseException | None = None

    def watch() -> None:
        # The C-level handler writes to the pipe at once; the Python handler must wait while the main thread computes.
        while number := int.from_bytes(os.read(pipe_read, 1)):
            if number in before:
                time.sleep(END_S)
                if inside:
                    print("terminated" if number == signal.SIGTERM else "interrupted", file=sys.stderr, flush=True)
                os._exit(128 + number)
        os.close(pipe_read)

    def stop(number: int, frame: FrameType | None) -> None:
        nonlocal ending, caught
        if not ending:
            ending = True
            _stop_client_retries()
            # Everything is closed by then; the teardown of the interpreter would take seconds more.
            atexit.register(os._exit, 128 + number)
            try:
                before[number](number, frame)
            except BaseException as error:
                caught = error
                raise

    def on_unraisable(unraisable: Any) -> None:
        nonlocal ending
        # Python dropped the exception of the signal: let the repeated signal through.
        ending = ending and not issubclass(unraisable.exc_type, KeyboardInterrupt)
        hook(unraisable)

    before: dict[int, Callable[[int, FrameType | None], Any]] = {}
    hook, sys.unraisablehook = sys.unraisablehook, on_unraisable
    for number in (signal.SIGINT, signal.SIGTERM):
        handler = signal.getsignal(number)
        if callable(handler):
            before[number] = handler
            signal.signal(number, stop)
    pipe_read, pipe_write = os.pipe()
    os.set_blocking(pipe_write, False)
    wakeup = signal.set_wakeup_fd(pipe_write, warn_on_full_buffer=False)
    threading.Thread(target=watch, daemon=True).start()
    try:
        yield
    except Exception as error:
        if caught is None:
            raise
        # The interrupt counts, not the error of reporting it to a server that is gone as well.
        raise caught from error
    finally:
        inside = False
        signal.set_wakeup_fd(wakeup)
        os.close(pipe_write)
        sys.unraisablehook = hook
        for signal_number, handler in before.items():
            signal.signal(signal_number, handler)


def _stop_client_retries() -> None:
    """Make Prefect's client try each request only once from now on."""
    if "prefect.settings" in sys.modules:
        from prefect.settings import get_current_settings

        get_current_settings().client.max_retries = 0


def _is_writable(folder: Path) -> bool:
    """Return whether `folder`, or its nearest existing parent, is writable."""
    existing = next((path for path in (folder, *folder.parents) if path.exists()), folder)
    return os.access(existing, os.W_OK)
