"""What the flows share: a job as a task that is tried again after I/O errors, its report as an artifact, its log lines.

A flow calls its task directly, never with `.submit()`: an error that nobody asks for would leave the flow successful.
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
"""Waiting times before a job is tried again after an I/O error."""

_PERMANENT = {
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
"""I/O errors that waiting does not mend."""

log = logging.getLogger(__name__)


def is_transient(error: BaseException | None) -> bool:
    """Whether the error, or what caused it, is an I/O error that may be gone at the next try."""
    while error is not None:
        # h5py calls a file that is damaged a plain OSError, too, without a number; those of the network have a class.
        damaged = type(error) is OSError and error.errno is None
        if isinstance(error, OSError) and not damaged and error.errno not in _PERMANENT:
            return True
        error = error.__cause__
    return False


def run_step(job: Callable[[P], R], parameters: P, *, again: Callable[[P], P] | None = None) -> R:
    """Run `job` as a task of the flow, tried again after I/O errors alone; what it raises fails the flow.

    `again` changes the parameters of a second try (to go on instead of beginning anew).
    """

    def attempt(parameters: P) -> R:
        first = (task_run.run_count or 1) == 1
        return job(parameters if first or again is None else again(parameters))

    step = task(
        name=job.__name__,
        retries=len(RETRY_DELAYS_S),
        retry_delay_seconds=RETRY_DELAYS_S,
        retry_condition_fn=_try_again,
        # The same path may hold other files the next time.
        cache_policy=NO_CACHE,
        persist_result=False,
    )(attempt)
    return step(parameters)


def resumed(parameters: P) -> P:
    """The same parameters, to go on with what is there."""
    return parameters.model_copy(update={"resume": True})


def tracked(parameters: P) -> P:
    """The same parameters, with a run in MLflow: a flow always has one."""
    return parameters.model_copy(update={"track": True})


def _try_again(_task: Any, _run: Any, state: Any) -> bool:
    error = state.result(raise_on_failure=False)
    if not is_transient(error):
        return False
    log.warning("I/O error, trying again: %s", error)
    return True


def publish(key: str, result: Result) -> None:
    """The flow's one artifact: the result's report, which its log shows too."""
    get_run_logger().info("%s", result.text())
    create_markdown_artifact(key=key, markdown=result.markdown(), description=key)


@contextlib.contextmanager
def prefect_logs() -> Iterator[None]:
    """Within the block the packages' log lines go to the flow run that they belong to, too."""
    if any(isinstance(handler, _ToPrefect) for handler in logging.getLogger(PACKAGES[0]).handlers):
        # A flow within a flow.
        yield
        return
    with handled_by(_ToPrefect(), logging.INFO, keep_level=True):
        yield


class _ToPrefect(logging.Handler):
    """Hands a record to the logger of the flow or task run of its thread."""

    def emit(self, record: logging.LogRecord) -> None:
        with contextlib.suppress(MissingContextError):
            get_run_logger().log(record.levelno, redact(record.getMessage()))
