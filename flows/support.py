"""Helpers of the flows: run a job as a task with retries, publish its report as an artifact, forward log lines.

A flow calls its task directly, never with `.submit()`: an exception that is not retrieved would leave the flow
successful.
"""

import contextlib
import errno
import logging
from collections.abc import Callable, Iterator
from typing import Any, TypeVar

from prefect import get_run_logger, task
from prefect.artifacts import create_markdown_artifact
from prefect.cache_policies import NO_CACHE
from prefect.exceptions import MissingContextError
from prefect.runtime import task_run
from pydantic import BaseModel

from cmran.utils.uris import redact
from flows.console import PACKAGES, handled_by
from flows.jobs.common import Result

P = TypeVar("P", bound=BaseModel)
R = TypeVar("R", bound=Result)

RETRY_DELAYS_S = [5.0, 30.0, 120.0]
"""Waiting times before the retries after an I/O error."""

_NON_RETRYABLE = {
    errno.ENOENT,
    errno.EACCES,
    errno.EPERM,
    errno.EROFS,
    errno.ENOSPC,
    errno.EDQUOT,
    errno.EEXIST,
    errno.EISDIR,
    errno.ENOTDIR,
    errno.ENAMETOOLONG,
}
"""I/O errors that do not go away by waiting."""

log = logging.getLogger(__name__)


def is_transient(error: BaseException | None) -> bool:
    """Return whether the error, or one of its causes, is an I/O error that a retry may not meet again."""
    while error is not None:
        # For a damaged file h5py raises a plain OSError without errno; network errors are of a subclass.
        damaged = type(error) is OSError and error.errno is None
        if isinstance(error, OSError) and not damaged and error.errno not in _NON_RETRYABLE:
            return True
        error = error.__cause__
    return False


def run_step(job: Callable[[P], R], parameters: P, *, on_retry: Callable[[P], P] | None = None) -> R:
    """Run a job as a task of the flow. Only transient I/O errors are retried; its exception fails the flow.

    Args:
        job: The function to run; the task has the name of its module.
        parameters: Its parameters.
        on_retry: Changes the parameters of a retry, for example to resume.
    """

    def attempt(parameters: P) -> R:
        first = (task_run.run_count or 1) == 1
        return job(parameters if first or on_retry is None else on_retry(parameters))

    step = task(
        name=job.__module__.rpartition(".")[2],
        retries=len(RETRY_DELAYS_S),
        retry_delay_seconds=RETRY_DELAYS_S,
        retry_condition_fn=_should_retry,
        # The same path may hold other files next time.
        cache_policy=NO_CACHE,
        persist_result=False,
    )(attempt)
    return step(parameters)


def resumed(parameters: P) -> P:
    """Return the same parameters with `resume`."""
    return parameters.model_copy(update={"resume": True})


def tracked(parameters: P) -> P:
    """Return the same parameters with `track`: a flow is always logged to MLflow."""
    return parameters.model_copy(update={"track": True})


def _should_retry(_task: Any, _run: Any, state: Any) -> bool:
    error = state.result(raise_on_failure=False)
    if not is_transient(error):
        return False
    log.warning("I/O error, retrying: %s", error)
    return True


def publish(key: str, result: Result) -> None:
    """Log the report of the result, and create it as the artifact of the flow."""
    get_run_logger().info("%s", result.text())
    create_markdown_artifact(key=key, markdown=result.markdown(), description=key)


@contextlib.contextmanager
def prefect_logs() -> Iterator[None]:
    """Within the block, also send the log lines of our packages to the flow run that they belong to."""
    if any(isinstance(handler, _ToPrefect) for handler in logging.getLogger(PACKAGES[0]).handlers):
        # A subflow: the handler of the outer flow does it.
        yield
        return
    with handled_by(_ToPrefect(), logging.INFO, keep_level=True):
        yield


class _ToPrefect(logging.Handler):
    """Passes a record to the logger of the current flow run or task run."""

    def emit(self, record: logging.LogRecord) -> None:
        with contextlib.suppress(MissingContextError):
            get_run_logger().log(record.levelno, redact(record.getMessage()))
