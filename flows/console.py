"""What the `cmran` command shows while it works: the packages' log lines, on stderr."""

import contextlib
import logging
import sys
from collections.abc import Iterator
from typing import Any

from cmran.utils.uris import redact

PACKAGES = ("cmran", "search", "serving", "flows")


class _Plain(logging.Formatter):
    """`12:00:00 message`; a warning says that it is one."""

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
    """Within the block, what our packages log from `level` on is printed on stderr."""
    handler = logging.StreamHandler(sys.stderr)
    handler.setFormatter(_Plain())
    with handled_by(handler, level):
        yield


@contextlib.contextmanager
def handled_by(handler: logging.Handler, level: int, *, keep_level: bool = False) -> Iterator[None]:
    """Within the block our packages' log lines go to `handler`, too; afterwards the loggers are as they were.

    `keep_level`: a level that somebody has set already stays.
    """
    loggers = [logging.getLogger(name) for name in PACKAGES]
    before = [(logger, logger.level, logger.propagate) for logger in loggers]
    for logger in loggers:
        if not keep_level or logger.level == logging.NOTSET:
            logger.setLevel(level)
        # Not to the root logger: Prefect puts a handler of its own there, which would print each line again.
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
    """Within the block no log line of any library, whichever handler writes it, shows a password."""
    make = logging.getLogRecordFactory()

    def redacted(*arguments: Any, **options: Any) -> logging.LogRecord:
        record = make(*arguments, **options)
        try:
            text = record.getMessage()
        except Exception:
            # A faulty call: the handler reports it.
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
