"""The device cache: all features of a data folder in the memory of a GPU or of this machine.

A training step then selects its batch there and reads no file.
"""

import contextlib
import logging
import math
import mmap
from collections.abc import Generator
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from typing import Self

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from cmran.data.dataset import FeatureFolder
from cmran.data.feature_cache import UnfitRowError, convert
from cmran.data.loader import Batch, LabelKind
from cmran.utils.device import available_memory
from cmran.utils.files import cache_lock
from cmran.utils.progress import Progress

SPARE_BYTES = 4 << 30
"""GPU memory that is left free for the network and its training steps."""

MEMORY_SHARE = 0.25
"""Share of this machine's available memory that a cache may use; other processes and the page cache need the rest."""

ROWS_AT_ONCE = 16
"""Rows that one thread reads at a time."""

READERS = 4
"""Threads that fill the cache. They mostly wait for the disk, so their number does not depend on the CPUs."""

log = logging.getLogger(__name__)


class NotCachedError(Exception):
    """The features cannot be cached; the message is the reason."""


class DeviceCache:
    """The features of all rows of a folder on one device: visual maps in one dtype, audio and labels as float32.

    Args:
        folder: An open folder with `features="float16"`. All of it is read.
        device: Where the features are kept.
        dtype: The dtype of the visual maps, float16 or bfloat16.

    Raises:
        NotCachedError: A row does not fit float16, or the system refuses the memory.
    """

    def __init__(self, folder: FeatureFolder, device: torch.device, dtype: torch.dtype = torch.float16) -> None:
        shape = (folder.rows, folder.segments, *folder.grid, folder.visual_features)
        self.device = device
        self._visual = _allocate(shape, dtype, device)
        rows = np.arange(folder.rows)
        blocks = [rows[start : start + ROWS_AT_ONCE] for start in range(0, folder.rows, ROWS_AT_ONCE)]
        with (
            ThreadPoolExecutor(READERS, "cmran-device-cache") as pool,
            Progress(folder.rows, f"features to {device.type}", "videos") as bar,
        ):
            for count in pool.map(partial(self._fill, folder), blocks):
                bar.update(count)
        self._audio = torch.from_numpy(folder.read_audio(rows)).to(device)
        vectors = {"segments": folder.segment_label_vectors(rows), "video": folder.video_label_vectors(rows)}
        self._labels = {kind: torch.from_numpy(value).to(device) for kind, value in vectors.items()}

    def _fill(self, folder: FeatureFolder, rows: NDArray[np.int64]) -> int:
        try:
            read = torch.from_numpy(folder.read_visual(rows, np.float16))
        except UnfitRowError as error:
            raise NotCachedError(str(error)) from error
        target = self._visual[rows[0] : rows[-1] + 1]
        if self.device.type == "cpu":
            convert(read, target)
        else:
            target.copy_(read)
        return len(rows)

    def iterate(
        self, rows: NDArray[np.int64], batch_size: int, *, labels: LabelKind | None, dtype: torch.dtype
    ) -> Generator[Batch]:
        """Yield the same batches as `cmran.data.loader.iterate`."""
        # One copy for all batches, so that the host does not wait for the device between them.
        selected = torch.from_numpy(np.asarray(rows, np.int64)).to(self.device)
        for start in range(0, len(rows), batch_size):
            batch = selected[start : start + batch_size]
            targets = None if labels is None else self._labels[labels][batch].to(dtype)
            yield Batch(
                rows[start : start + batch_size], self._select(self._visual, batch, dtype),
                self._select(self._audio, batch, dtype), targets,
            )  # fmt: skip

    @staticmethod
    def _select(values: Tensor, rows: Tensor, dtype: torch.dtype) -> Tensor:
        return values.index_select(0, rows).to(dtype)

    def free(self) -> None:
        """Free the memory. The cache cannot be used afterwards."""
        del self._visual, self._audio, self._labels


def _allocate(shape: tuple[int, ...], dtype: torch.dtype, device: torch.device) -> Tensor:
    """An empty tensor. On a CPU it is a memory map with large pages, which is returned to the system as a whole."""
    if device.type != "cpu":
        return torch.empty(shape, dtype=dtype, device=device)
    try:
        memory = mmap.mmap(-1, math.prod(shape) * dtype.itemsize, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)
    except OSError as error:
        raise NotCachedError(f"the system refuses the memory: {error.strerror}") from error
    # Some kernels do not support large pages.
    with contextlib.suppress(OSError, AttributeError):
        memory.madvise(mmap.MADV_HUGEPAGE)
    return torch.frombuffer(memory, dtype=dtype).view(shape)


class DeviceCacheSlot:
    """Keeps one device cache for several trainings in this process, so that the next one starts at once.

    Its owner, for example a search, creates it and passes it to `cmran.training.trainer.fit`. It is a context manager
    that releases the memory at its end.
    """

    def __init__(self) -> None:
        self._key: tuple[str, str, torch.device, torch.dtype] | None = None
        self._cached: DeviceCache | str | None = None

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.release()

    def release(self) -> None:
        """Free the memory of the cache. Nobody may use the cache afterwards."""
        cached, self._key, self._cached = self._cached, None, None
        if isinstance(cached, DeviceCache):
            cached.free()
        if torch.cuda.is_initialized():
            torch.cuda.empty_cache()

    def load(self, folder: FeatureFolder, device: torch.device, dtype: torch.dtype) -> DeviceCache | None:
        """The device cache of a folder: the one in this slot, or a new one that takes its place.

        Args:
            folder: An open data folder.
            device: The device of the training.
            dtype: The dtype of the batches.

        Returns:
            The cache, or None if the features must be read for each batch; the reason is logged.
        """
        try:
            return self._load(folder, device, dtype)
        except NotCachedError as error:
            # Reading each batch costs a tenth of the training time on a CPU, and most of it on a GPU.
            level, memory = (logging.WARNING, "the GPU") if device.type == "cuda" else (logging.INFO, "memory")
            log.log(level, "features are read for each batch and not cached in %s: %s", memory, error)
            return None

    def _load(self, folder: FeatureFolder, device: torch.device, dtype: torch.dtype) -> DeviceCache:
        if folder.features != "float16":
            raise NotCachedError("they are not rounded to float16")
        if dtype == torch.float64:
            raise NotCachedError("float64 needs the audio features in the precision of the file")
        # A GPU converts a batch at no cost; on a CPU the conversion would take longer than the selection of the rows.
        stored = torch.bfloat16 if (device.type, dtype) == ("cpu", torch.bfloat16) else torch.float16
        key = (folder.fingerprint, folder.mode, device, stored)
        if self._key != key:
            self.release()
            need = 2 * folder.rows * folder.segments * folder.grid[0] * folder.grid[1] * folder.visual_features
            # One process at a time: the system does not count memory that another one is about to allocate.
            with cache_lock("device-cache.lock") if device.type == "cpu" else contextlib.nullcontext():
                if device.type == "cpu":
                    limit = int(MEMORY_SHARE * available_memory())
                else:
                    limit = torch.cuda.mem_get_info(device)[0] - SPARE_BYTES
                if need > limit:
                    raise NotCachedError(
                        f"they need {need / 2**30:.1f} GiB, and {max(0, limit) / 2**30:.1f} GiB are available for them"
                    )
                try:
                    cached: DeviceCache | str = DeviceCache(folder, device, stored)
                except NotCachedError as error:
                    # The next run does not read the features again. Only the message is kept: the traceback of the
                    # error would keep the allocated memory.
                    cached = str(error)
                self._key, self._cached = key, cached
        if isinstance(self._cached, DeviceCache):
            return self._cached
        raise NotCachedError(self._cached)
