"""Ctrl-C and TERM: they wait for a moment that suits, and none of them is lost."""

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
"""TERM within this time after a first one is the same request: `timeout` sends it to its child, then to the group."""


_last_term = -math.inf


@contextlib.contextmanager
def raise_on_term(make: Callable[[int], BaseException]) -> Iterator[None]:
    """Within the block TERM raises `make(number)`. In threads other than the main one it does nothing.

    Python drops an exception that is raised within a callback of a weak reference or of the garbage collector: TERM or
    Ctrl-C that came just then is sent again. TERM that is repeated at once does nothing.
    """
    global _last_term
    if threading.current_thread() is not threading.main_thread():
        yield
        return

    def stop(number: int, _frame: FrameType | None) -> None:
        global _last_term
        before, _last_term = _last_term, time.monotonic()
        if _last_term - before >= REPEAT_S:
            raise make(number)

    terminated = type(make(signal.SIGTERM))

    def again(dropped: Any) -> None:
        global _last_term
        # TERM first: its exception may be a kind of KeyboardInterrupt.
        for kind, number in ((terminated, signal.SIGTERM), (KeyboardInterrupt, signal.SIGINT)):
            if issubclass(dropped.exc_type, kind):
                # Not from within this hook, where it would be dropped, too.
                _last_term = -math.inf
                threading.Timer(0.05, os.kill, (os.getpid(), number)).start()
                return
        hook(dropped)

    hook, before = sys.unraisablehook, signal.signal(signal.SIGTERM, stop)
    if not callable(before):
        _last_term = -math.inf
    sys.unraisablehook = again
    try:
        yield
    finally:
        sys.unraisablehook = hook
        signal.signal(signal.SIGTERM, before)


@contextlib.contextmanager
def defer_signals() -> Iterator[None]:
    """Let Ctrl-C and TERM wait until the block ends. A second one goes through at once.

    In the middle of a database transaction they would leave it locked.
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
