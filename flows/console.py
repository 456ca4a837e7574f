"""What the `cmran` command shows while it works: the packages' log lines, on stderr."""

import logging
import sys

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


def show_logs(level: int = logging.INFO) -> None:
    """Print what our packages log from `level` on; calling it twice prints nothing twice."""
    for name in PACKAGES:
        logger = logging.getLogger(name)
        logger.setLevel(level)
        # Not to the root logger: Prefect puts a handler of its own there, which would print each line again.
        logger.propagate = False
        if not any(isinstance(handler.formatter, _Plain) for handler in logger.handlers):
            handler = logging.StreamHandler(sys.stderr)
            handler.setFormatter(_Plain())
            logger.addHandler(handler)
