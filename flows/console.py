"""Console logging of the `cmran` command: the log lines of our packages on stderr, without passwords."""

import contextlib
import logging
import sys
from collections.abc import Iterator
from typing import Any

from cmran.utils.uris import redact

PACKAGES = ("cmran", "search", "serving", "flows")


class _Plain(logging.Formatter):
    """Formats `12:00:00 message`, and `12:00:00 warning: message` from level WARNING on."""

    def __init__(self) -> None:
        super().__init__("%(asctime)s %(message)s", "%H:%M:%S")

    def format(self, record: logging.LogRecord) -> str:
        text = super().format(record)
        if record.levelno < logging.WARNING:
            return text
        time, _, message = text.partition(" ")
        return f"{time} {record.levelname.lower()}: {message}"


@contextlib.contextmanager
def shown_logs(level: int = logging.INFO) -> Iterator[None]:
    """Within the block, print the log lines of our packages from `level` on to stderr."""
    handler = logging.StreamHandler(sys.stderr)
    handler.setFormatter(_Plain())
    with handled_by(handler, level):
        yield


@contextlib.contextmanager
def handled_by(handler: logging.Handler, level: int, *, keep_level: bool = False) -> Iterator[None]:
    """Within the block, send the log lines of our packages to `handler`; afterwards restore the loggers.

    Args:
        handler: The handler to add.
        level: The level of the loggers within the block.
        keep_level: Whether a level that is already set is kept.
    """
    loggers = [logging.getLogger(name) for name in PACKAGES]
    before = [(logger, logger.level, logger.propagate) for logger in loggers]
    for logger in loggers:
        if not keep_level or logger.level == logging.NOTSET:
            logger.setLevel(level)
        # Prefect adds its own handler to the root logger, which would print each line twice.
        logger.propagate = False
        logger.addHandler(handler)
    try:
        with redacted_logs():
            yield
    finally:
        for logger, old_level, propagate in before:
            logger.removeHandler(handler)
            logger.setLevel(old_level)
            logger.propagate = propagate


@contextlib.contextmanager
def redacted_logs() -> Iterator[None]:
    """Within the block, hide passwords in the log lines of all libraries, whichever handler writes them."""
    make = logging.getLogRecordFactory()

    def redacted(*arguments: Any, **options: Any) -> logging.LogRecord:
        record = make(*arguments, **options)
        try:
            text = record.getMessage()
        except Exception:
            # The arguments do not match the format; the handler reports that.
            return record
        if (hidden := redact(text)) != text:
            record.msg, record.args = hidden, ()
        if record.exc_info:
            traceback = logging.Formatter().formatException(record.exc_info)
            if (hidden := redact(traceback)) != traceback:
                record.exc_info, record.exc_text = None, hidden
        return record

    logging.setLogRecordFactory(redacted)
    try:
        yield
    finally:
        logging.setLogRecordFactory(make)
