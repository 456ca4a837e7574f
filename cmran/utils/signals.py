"""Deferred and reliable handling of Ctrl-C (SIGINT) and SIGTERM."""

import contextlib
import math
import os
import signal
import sys
import threading
import time
from collections.abc import Callable, Iterator
from types import FrameType
from typing import Any

REPEAT_S = 1.0
"""A repeated SIGTERM within this time is the same request: `timeout` signals its child, then the process group."""


_last_term = -math.inf


@contextlib.contextmanager
def raise_on_term(exception: Callable[[int], BaseException]) -> Iterator[None]:
    """Raise an exception on SIGTERM within the block. Outside the main thread this does nothing.

    Python drops an exception that is raised in a callback of a weak reference or of the garbage collector. A SIGTERM or
    Ctrl-C that is lost in this way is sent again. A SIGTERM that follows another within `REPEAT_S` is ignored.

    Args:
        exception: Creates the exception from the signal number.
    """
    global _last_term
    if threading.current_thread() is not threading.main_thread():
        yield
        return

    def stop(number: int, _frame: FrameType | None) -> None:
        global _last_term
        before, _last_term = _last_term, time.monotonic()
        if _last_term - before >= REPEAT_S:
            raise exception(number)

    terminated = type(exception(signal.SIGTERM))

    def resend(dropped: Any) -> None:
        global _last_term
        # SIGTERM first: its exception may be a subclass of KeyboardInterrupt.
        for kind, number in ((terminated, signal.SIGTERM), (KeyboardInterrupt, signal.SIGINT)):
            if issubclass(dropped.exc_type, kind):
                # After this hook has returned: an exception within it would be dropped, too.
                _last_term = -math.inf
                threading.Timer(0.05, os.kill, (os.getpid(), number)).start()
                return
        hook(dropped)

    hook, before = sys.unraisablehook, signal.signal(signal.SIGTERM, stop)
    if not callable(before):
        _last_term = -math.inf
    sys.unraisablehook = resend
    try:
        yield
    finally:
        sys.unraisablehook = hook
        signal.signal(signal.SIGTERM, before)


@contextlib.contextmanager
def defer_signals() -> Iterator[None]:
    """Defer Ctrl-C and SIGTERM until the block ends, for example during a database transaction.

    A second signal is handled at once. Only signals with a Python handler are deferred, and only in the main thread:
    no others raise an exception in the block.
    """
    if threading.current_thread() is not threading.main_thread():
        yield
        return
    before: dict[int, Callable[[int, FrameType | None], Any]] = {}
    waiting: list[int] = []

    def defer(number: int, frame: FrameType | None) -> None:
        if waiting:
            before[number](number, frame)
        waiting.append(number)

    for number in (signal.SIGINT, signal.SIGTERM):
        handler = signal.getsignal(number)
        if callable(handler):
            before[number] = handler
            signal.signal(number, defer)
    try:
        yield
    finally:
        for deferred, handler in before.items():
            signal.signal(deferred, handler)
        if waiting:
            signal.raise_signal(waiting[0])
