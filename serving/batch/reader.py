"""Read features ahead of inference: threads fill the next batch while the model computes.

Shape letters: n videos, B videos of a full batch, T segments, H x W grid, C visual channels, A audio features.
"""

import queue
import threading
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from types import TracebackType
from typing import NamedTuple, Self

import numpy as np
from numpy.typing import NDArray

from cmran.data.dataset import FeatureFolder


class FeatureBatch(NamedTuple):
    """The features of n videos, in buffers of B >= n videos; the rest of a buffer belongs to an earlier batch."""

    rows: NDArray[np.int64]
    """(n,)."""
    visual: NDArray[np.float32]
    """(B, T, H, W, C)."""
    audio: NDArray[np.float32]
    """(B, T, A)."""


class FeatureReader:
    """Reads batches in the given order into a fixed number of buffers, in threads. It is a context manager.

    Args:
        folder: The data folder.
        batches: The rows of each batch.
        buffers: Number of batches in memory.
        threads: Number of threads that read one batch together.
    """

    def __init__(
        self, folder: FeatureFolder, batches: Sequence[NDArray[np.int64]], *, buffers: int, threads: int = 1
    ) -> None:
        longest = max(map(len, batches), default=0)
        self._folder, self._batches = folder, batches
        self._threads = ThreadPoolExecutor(threads, "cmran-read")
        self._step = max(1, -(-longest // threads))
        self._free: queue.SimpleQueue[FeatureBatch | None] = queue.SimpleQueue()
        self._ready: queue.SimpleQueue[FeatureBatch | BaseException] = queue.SimpleQueue()
        shape = (longest, folder.segments)
        for _ in range(min(len(batches), buffers)):
            visual = np.zeros((*shape, *folder.grid, folder.visual_features), np.float32)
            audio = np.zeros((*shape, folder.audio_features), np.float32)
            self._free.put(FeatureBatch(np.empty(0, np.int64), visual, audio))
        self._stop = threading.Event()
        self._thread = threading.Thread(target=self._work, name="cmran-read-ahead", daemon=True)

    def __enter__(self) -> Self:
        self._thread.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._stop.set()
        # Wakes the thread if it waits for a buffer.
        self._free.put(None)
        self._thread.join()
        self._threads.shutdown()

    def take(self) -> FeatureBatch:
        """Return the next batch. Its arrays stay valid until `give_back`. Raises the error of the reading thread."""
        item = self._ready.get()
        if isinstance(item, BaseException):
            raise item
        return item

    def give_back(self, batch: FeatureBatch) -> None:
        """Return the buffers of a batch for reuse."""
        self._free.put(batch)

    def _work(self) -> None:
        try:
            passed = self._folder.visual_file.sweep() if self._is_one_pass() else None
            for rows in self._batches:
                batch = self._free.get()
                if batch is None or self._stop.is_set():
                    return
                batch = batch._replace(rows=rows)
                self._fill(batch)
                if passed is not None:
                    passed(int(rows[0]), int(rows[-1]) + 1)
                self._ready.put(batch)
        except BaseException as error:
            self._ready.put(error)

    def _is_one_pass(self) -> bool:
        """Whether the rows are in file order and mostly consecutive; a resumed job skips finished shards."""
        if not self._batches:
            return False
        rows = np.concatenate(self._batches)
        return bool((np.diff(rows) > 0).all()) and int(rows[-1] - rows[0]) < 2 * len(rows)

    def _fill(self, batch: FeatureBatch) -> None:
        n = len(batch.rows)
        parts = [slice(start, min(start + self._step, n)) for start in range(0, n, self._step)]
        finite = list(self._threads.map(lambda part: _read_part(self._folder, batch, part), parts))
        if not all(finite):
            # The features are checked, not the outputs, because a ReLU can hide a NaN.
            self._folder.check_finite(batch.rows)


def _read_part(folder: FeatureFolder, batch: FeatureBatch, part: slice) -> bool:
    """Read some of the features into the buffers. Return False if they may not be finite."""
    rows, visual, audio = batch.rows[part], batch.visual[part], batch.audio[part]
    # A float64 feature beyond float32 becomes infinite, and is rejected.
    with np.errstate(over="ignore", invalid="ignore"):
        folder.read_visual(rows, out=visual)
        folder.read_audio(rows, out=audio)
        # The sums are a fast check: they are finite only if all features are.
        return bool(np.isfinite(visual.sum()) and np.isfinite(audio.sum()))
