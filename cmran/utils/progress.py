"""Progress of long work on stderr: a bar on a terminal, otherwise an occasional line, with rate and time left."""

import sys
import time
from collections.abc import Callable
from types import TracebackType
from typing import Self

LINE_EVERY_S = 10.0
"""Least time between two lines in a log."""


NOTE_EVERY_S = 1.0
"""Least time between two notes on a terminal."""


class Progress:
    """A progress report. Use it as a context manager and call `update`.

    On a terminal it is a tqdm bar. In a log file, where a bar would be one endless line, it prints a line at most every
    10 seconds, and nothing for shorter work.

    Args:
        total: Units of work.
        desc: Name of the work.
        unit: Name of a unit; "B" stands for bytes, which are printed as MiB.
        enabled: Whether to show anything.
    """

    def __init__(self, total: int, desc: str, unit: str = "it", *, enabled: bool = True) -> None:
        self.total, self.desc, self.unit = total, desc, unit
        self._enabled = enabled
        self._done = 0
        self._started = self._last = time.monotonic()
        self._noted = -float("inf")
        self._bar = None
        if enabled and sys.stderr.isatty():
            from tqdm import tqdm

            self._bar = tqdm(total=total, desc=desc, unit=unit, leave=False, dynamic_ncols=True, unit_scale=True)

    def update(self, count: int = 1, note: Callable[[], str] | None = None) -> None:
        """Report that `count` more units are done.

        Args:
            count: Units done since the last call.
            note: Returns a short text that follows the numbers. Because it may wait for a device, it is called only
                when the text is shown, at most once a second.
        """
        self._done += count
        if self._bar is not None:
            if note is not None and time.monotonic() - self._noted >= NOTE_EVERY_S:
                self._noted = time.monotonic()
                self._bar.set_postfix_str(note(), refresh=False)
            self._bar.update(count)
        elif self._enabled and time.monotonic() - self._last >= LINE_EVERY_S:
            self._last = time.monotonic()
            rate = self._done / (self._last - self._started)
            left = (self.total - self._done) / rate if rate > 0 else float("inf")
            scale, unit = (2**20, "MiB") if self.unit == "B" else (1, self.unit)
            done, total = self._done // scale, self.total // scale
            print(
                f"{self.desc}: {done}/{total} {unit}, {rate / scale:.3g} {unit}/s, {left:.0f} s left"
                + ("" if note is None else f", {note()}"),
                file=sys.stderr,
                flush=True,
            )

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if self._bar is not None:
            self._bar.close()
