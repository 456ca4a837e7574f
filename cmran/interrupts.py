"""Ctrl-C and TERM: they wait for a moment that suits, and none of them is lost."""

import contextlib
import os
import signal
import sys
import threading
from collections.abc import Callable, Iterator
from types import FrameType
from typing import Any


@contextlib.contextmanager
def term_raises(make: Callable[[int], BaseException]) -> Iterator[None]:
    """Within the block TERM raises `make(number)`. In threads other than the main one it does nothing.

    Python drops an exception that is raised within a callback of a weak reference or of the garbage collector: TERM or
    Ctrl-C that came just then is sent again.
    """
    if threading.current_thread() is not threading.main_thread():
        yield
        return

    def stop(number: int, _frame: FrameType | None) -> None:
        raise make(number)

    terminated = type(make(signal.SIGTERM))

    def again(dropped: Any) -> None:
        # TERM first: its exception may be a kind of KeyboardInterrupt.
        for kind, number in ((terminated, signal.SIGTERM), (KeyboardInterrupt, signal.SIGINT)):
            if issubclass(dropped.exc_type, kind):
                # Not from within this hook, where it would be dropped, too.
                threading.Timer(0.05, os.kill, (os.getpid(), number)).start()
                return
        hook(dropped)

    hook, before = sys.unraisablehook, signal.signal(signal.SIGTERM, stop)
    sys.unraisablehook = again
    try:
        yield
    finally:
        sys.unraisablehook = hook
        signal.signal(signal.SIGTERM, before)


@contextlib.contextmanager
def held_back() -> Iterator[None]:
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
