"""Progress of long work on stderr: a bar on a terminal, else a line now and then, with rate and time left."""

import sys
import time
from collections.abc import Callable
from types import TracebackType
from typing import Self

LINE_EVERY_S = 10.0


NOTE_EVERY_S = 1.0


class Progress:
    """Counts work done. Use as a context manager and call `update`.

    On a terminal this is a tqdm bar. In a log file a bar would be one endless line, so there it prints a line at most
    every 10 seconds, and nothing for work that ends sooner.
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

        `note` gives a few words to show behind the numbers. It is called only when they are shown, at most once a
        second: it may wait for a device.
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
