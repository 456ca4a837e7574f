"""Ctrl-C and TERM at a moment that suits: in the middle of a database transaction they would leave it locked."""

import contextlib
import signal
import threading
from collections.abc import Callable, Iterator
from types import FrameType
from typing import Any


@contextlib.contextmanager
def held_back() -> Iterator[None]:
    """Let Ctrl-C and TERM wait until the block ends. A second one goes through at once.

    Only where they would raise an exception: in the main thread, and where somebody has set a handler.
    """
    if threading.current_thread() is not threading.main_thread():
        yield
        return
    before: dict[int, Callable[[int, FrameType | None], Any]] = {}
    waiting: list[int] = []

    def hold(number: int, frame: FrameType | None) -> None:
        if waiting:
            before[number](number, frame)
        waiting.append(number)

    for number in (signal.SIGINT, signal.SIGTERM):
        handler = signal.getsignal(number)
        if callable(handler):
            before[number] = handler
            signal.signal(number, hold)
    try:
        yield
    finally:
        for held, handler in before.items():
            signal.signal(held, handler)
        if waiting:
            signal.raise_signal(waiting[0])
