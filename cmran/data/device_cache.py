"""A folder's features held in memory, a GPU's or this machine's: a step picks its batch there and reads no file."""

import contextlib
import logging
import math
import mmap
from collections.abc import Generator
from concurrent.futures import ThreadPoolExecutor
from functools import partial

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
"""Memory of a GPU that is left to the network and its steps."""


SHARE_OF_MEMORY = 0.25
"""Of what this machine has left, for features: other processes train here too, and the files want to stay cached."""


ROWS_AT_ONCE = 16


READERS = 4
"""Threads that fill the memory, on whatever number of cores: they wait for the disk in turn."""


log = logging.getLogger(__name__)


class NotCachedError(Exception):
    """Features that cannot be held; why not."""


class DeviceCache:
    """The features of all rows of a folder on one device: visual maps in one dtype, audio and labels as float32."""

    def __init__(self, folder: FeatureFolder, device: torch.device, dtype: torch.dtype = torch.float16) -> None:
        """Reads the whole folder, which rounds to float16. `dtype`: of the visual maps, float16 or bfloat16.

        Raises NotCachedError for a row that float16 does not hold, or where the memory is refused.
        """
        shape = (folder.rows, folder.segments, *folder.grid, folder.visual_features)
        self.device = device
        self._visual = _room(shape, dtype, device)
        rows = np.arange(folder.rows)
        parts = [rows[start : start + ROWS_AT_ONCE] for start in range(0, folder.rows, ROWS_AT_ONCE)]
        with (
            ThreadPoolExecutor(READERS, "cmran-hold") as pool,
            Progress(folder.rows, f"features to {device.type}", "videos") as bar,
        ):
            for count in pool.map(partial(self._fill, folder), parts):
                bar.update(count)
        self._audio = torch.from_numpy(folder.read_audio(rows)).to(device)
        vectors = {"segments": folder.segment_label_vectors(rows), "video": folder.video_label_vectors(rows)}
        self._labels = {kind: torch.from_numpy(value).to(device) for kind, value in vectors.items()}

    def _fill(self, folder: FeatureFolder, rows: NDArray[np.int64]) -> int:
        try:
            read = torch.from_numpy(folder.read_visual(rows, np.float16))
        except UnfitRowError as error:
            raise NotCachedError(str(error)) from error
        place = self._visual[rows[0] : rows[-1] + 1]
        if self.device.type == "cpu":
            convert(read, place)
        else:
            place.copy_(read)
        return len(rows)

    def iterate(
        self, rows: NDArray[np.int64], batch_size: int, *, labels: LabelKind | None, dtype: torch.dtype
    ) -> Generator[Batch]:
        """As `cmran.data.loader.iterate`, with the same values."""
        # One copy for all batches; the host does not wait for the device between them.
        picked = torch.from_numpy(np.asarray(rows, np.int64)).to(self.device)
        for start in range(0, len(rows), batch_size):
            part = picked[start : start + batch_size]
            targets = None if labels is None else self._labels[labels][part].to(dtype)
            yield Batch(
                rows[start : start + batch_size], self._take(self._visual, part, dtype),
                self._take(self._audio, part, dtype), targets,
            )  # fmt: skip

    @staticmethod
    def _take(values: Tensor, rows: Tensor, dtype: torch.dtype) -> Tensor:
        return values.index_select(0, rows).to(dtype)


def _room(shape: tuple[int, ...], dtype: torch.dtype, device: torch.device) -> Tensor:
    """An empty tensor. On a CPU in memory of its own, in large pages: given back as a whole, apart from the steps'."""
    if device.type != "cpu":
        return torch.empty(shape, dtype=dtype, device=device)
    try:
        memory = mmap.mmap(-1, math.prod(shape) * dtype.itemsize, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)
    except OSError as error:
        raise NotCachedError(f"the system refuses the memory: {error.strerror}") from error
    # Some kernels have no large pages.
    with contextlib.suppress(OSError, AttributeError):
        memory.madvise(mmap.MADV_HUGEPAGE)
    return torch.frombuffer(memory, dtype=dtype).view(shape)


_Key = tuple[str, str, torch.device, torch.dtype]


_last: tuple[_Key, DeviceCache | str] | None = None
# The features held, or why these cannot be.


def load_device_cache(folder: FeatureFolder, device: torch.device, dtype: torch.dtype) -> DeviceCache | None:
    """The folder's features in memory of the device; None where they are read for each batch instead (and why).

    `dtype`: of the batches. The last features held stay until `release_device_cache`, so that the next run in this
    process on the same data begins at once.
    """
    try:
        return _load(folder, device, dtype)
    except NotCachedError as error:
        # On a CPU reading ahead costs a tenth of the time, on a GPU most of it.
        level, where = (logging.WARNING, "the GPU") if device.type == "cuda" else (logging.INFO, "memory")
        log.log(level, "features are read for each batch, not held in %s: %s", where, error)
        return None


def release_device_cache() -> None:
    """Give back the memory that `hold` keeps for the next run, for work of another kind."""
    global _last
    _last = None
    if torch.cuda.is_initialized():
        torch.cuda.empty_cache()


def _load(folder: FeatureFolder, device: torch.device, dtype: torch.dtype) -> DeviceCache:
    global _last
    if folder.features != "float16":
        raise NotCachedError("they are not rounded to float16")
    if dtype == torch.float64:
        raise NotCachedError("float64 takes the audio in the precision of the file")
    # A GPU converts in passing; a CPU would take longer over it than over picking the rows.
    held = torch.bfloat16 if (device.type, dtype) == ("cpu", torch.bfloat16) else torch.float16
    key = (folder.fingerprint, folder.mode, device, held)
    if _last is None or _last[0] != key:
        release_device_cache()
        need = 2 * folder.rows * folder.segments * folder.grid[0] * folder.grid[1] * folder.visual_features
        # One process after the other: what one is about to take, the system does not yet count as taken.
        with cache_lock("hold.lock") if device.type == "cpu" else contextlib.nullcontext():
            if device.type == "cpu":
                room = int(SHARE_OF_MEMORY * available_memory())
            else:
                room = torch.cuda.mem_get_info(device)[0] - SPARE_BYTES
            if need > room:
                raise NotCachedError(
                    f"they take {need / 2**30:.1f} GiB, and {max(0, room) / 2**30:.1f} GiB are for them"
                )
            try:
                _last = key, DeviceCache(folder, device, held)
            except NotCachedError as error:
                # Not read again in vain by the next run. As text: the error itself would keep the memory it was met in.
                _last = key, str(error)
    found = _last[1]
    if isinstance(found, str):
        raise NotCachedError(found)
    return found
