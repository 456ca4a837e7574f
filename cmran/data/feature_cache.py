"""The feature cache: the visual maps of a data folder as float16, in the cache folder.

Each feature file has an array `FINGERPRINT.NAME.npy` and a sidecar `FINGERPRINT.NAME.json` with the path of the feature
file and a CRC-32 of each row. If float16 cannot represent a row, there is only the sidecar, with the reason. The
fingerprint is that of the data folder. A cache may be removed at any time, because it can be rebuilt.

`Float16Array` returns the same values with and without a cache. Each row is rounded to float32 and then to float16. A
row that float16 cannot represent (a value beyond 65504, or none as large as 2^-8) keeps its stored values.

The array is read with `pread` instead of a memory map: a truncated file then raises an error instead of killing the
process, and the memory of the process does not grow.
"""

import contextlib
import fcntl
import io
import json
import logging
import os
import shutil
import time
import zlib
from collections import deque
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, BinaryIO, Literal

import numpy as np
from numpy.typing import NDArray

from cmran.data.hdf5 import StoredArray
from cmran.errors import CacheError, DataError, StorageError
from cmran.utils.files import (
    atomic_write,
    cache_dir,
    cache_lock,
    free_bytes,
    log_once,
    optional,
    remove_unfinished,
    write_json,
)
from cmran.utils.progress import Progress

if TYPE_CHECKING:
    import torch


LIMIT_BYTES = 20 << 30
"""Default limit of the size of all caches; `set_cache_limit` changes it."""

BLOCK_BYTES = 32 << 20
"""Bytes of the feature file that are read at a time while a cache is built; three blocks are in memory."""

SERIAL_ELEMENTS = 32_000
"""Elements that torch converts in one call. From 32768 on it would start threads, which slow down the training."""

_INFINITY_BITS = 0x7C00
_SMALLEST_BITS = 0x1C00  # 2^-8: a row without a larger value would lose most of its digits

CacheState = Literal["ready", "in use", "unfinished"]

log = logging.getLogger(__name__)


class UnfitRowError(DataError):
    """A row was requested as float16, but float16 cannot represent its values."""


class _DamagedCacheError(Exception):
    """A cache does not contain what was written; the message is one line."""


@dataclass(frozen=True, kw_only=True)
class CacheEntry:
    """One array in the folder of feature caches."""

    path: Path
    """The array, or the temporary file of one that is being built."""
    fingerprint: str
    """Fingerprint of the data folder."""
    source: str
    """The feature file that it was built from; "?" if unknown."""
    size: int
    """Bytes."""
    last_use: float
    """Seconds since 1970."""
    state: CacheState
    """Ready, in use by a process that reads or builds it, or left unfinished by a killed process."""


class FeatureCache:
    """An open cache of one feature file. While it is open, other processes do not remove it.

    Args:
        path: The array.
        shape: Shape of the feature file, rows first.

    Raises:
        FileNotFoundError: There is no cache.
        CacheError: The cache cannot be read, for example because it belongs to another user.
    """

    def __init__(self, path: Path, shape: tuple[int, ...]) -> None:
        self.path = path
        self.damaged = False
        header = _npy_header(shape)
        self._offset, self._row_bytes = len(header), _row_bytes(shape)
        try:
            self._descriptor = os.open(path, os.O_RDONLY)
        except PermissionError as error:
            hint = "ask its owner for permission, or set XDG_CACHE_HOME to another folder"
            raise CacheError(f"cannot read {path}: {error.strerror}", hint) from error
        try:
            checksums = _read_sidecar(path).get("crc32")
            if not isinstance(checksums, list) or len(checksums) != shape[0]:
                raise _DamagedCacheError(f"its sidecar has no checksum for each of {shape[0]} rows")
            self._checksums = checksums
            # Neither is required: the file may be on a read-only disk, or on one without locks.
            with contextlib.suppress(OSError):
                fcntl.flock(self._descriptor, fcntl.LOCK_SH)
            with contextlib.suppress(OSError):
                os.utime(self._descriptor)
            if os.pread(self._descriptor, len(header), 0) != header:
                raise _DamagedCacheError(f"its header is not that of float16 values of the shape {shape}")
            size, expected = os.fstat(self._descriptor).st_size, len(header) + shape[0] * self._row_bytes
            if size != expected:
                raise _DamagedCacheError(f"it has {size} bytes, expected {expected}")
        except BaseException:
            self.close()
            raise
        # A row is checked when it is first read: checking all of them here would read the whole file.
        self._checked = np.zeros(shape[0], bool)

    def read_row(self, row: int, out: NDArray[np.float16]) -> None:
        """Read a row into `out` (C-contiguous). Raises _DamagedCacheError if it is not the row that was written."""
        view = out.reshape(-1).view(np.uint8).data
        try:
            count = os.preadv(self._descriptor, [view], self._offset + row * self._row_bytes)
        except OSError as error:
            raise _DamagedCacheError(f"row {row} cannot be read: {error.strerror}") from error
        if count != self._row_bytes:
            raise _DamagedCacheError(f"it ends within row {row}")
        if not self._checked[row]:
            if zlib.crc32(view) != self._checksums[row]:
                raise _DamagedCacheError(f"the checksum of row {row} is wrong")
            self._checked[row] = True

    def discard(self, reason: str) -> None:
        """Stop using the cache and remove it."""
        if not self.damaged:
            self.damaged = True
            # Another process may have rebuilt it in the meantime.
            with contextlib.suppress(OSError):
                if os.stat(self.path).st_ino == os.fstat(self._descriptor).st_ino:
                    _remove(self.path)
            _log_damaged(self.path, reason)

    def close(self) -> None:
        """Close the file. Idempotent."""
        if self._descriptor >= 0:
            os.close(self._descriptor)
            self._descriptor = -1


class Float16Array:
    """The rows of a feature file, rounded to float16: read from its cache if there is one, else from the file.

    Args:
        source: The open feature file. Its owner closes it.
    """

    def __init__(self, source: StoredArray) -> None:
        self.source, self.shape = source, source.shape
        self.cache: FeatureCache | None = None

    @property
    def needs_cache(self) -> bool:
        """Whether a cache is faster than the file."""
        return not (self.source.direct and self.source.dtype == np.float16)

    @property
    def is_float16(self) -> bool:
        """Whether all rows are known to fit float16."""
        return self.cache is not None or self.source.dtype == np.float16

    def use_cache(self, fingerprint: str, *, build: bool, progress: bool = True) -> None:
        """Read from the cache from now on, if there is one.

        Args:
            fingerprint: Fingerprint of the data folder.
            build: Build a missing or damaged cache, which reads the whole file once.
            progress: Show the progress of the build.

        Raises:
            CacheError: The cache cannot be read or built. The file can be read nevertheless.
        """
        if self.cache is None and self.needs_cache:
            path = cache_path(fingerprint, self.source)
            self.cache = _open(path, self.shape)
            if self.cache is None and build:
                self.cache = _build(self.source, path, fingerprint, progress)

    def close(self) -> None:
        """Close the cache."""
        if self.cache is not None:
            self.cache.close()
            self.cache = None

    def read(self, rows: NDArray[np.int64], out: NDArray[Any], at: NDArray[np.int64] | None = None) -> None:
        """Read rows as `StoredArray.read` does.

        Raises:
            UnfitRowError: `out` is float16 and cannot represent a row.
        """
        if rows.size and (rows.min() < 0 or rows.max() >= self.shape[0]):
            raise IndexError(f"rows from 0 to {self.shape[0] - 1}, requested {rows.min()} to {rows.max()}")
        targets = np.arange(len(rows)) if at is None else at
        done = self._read_cache(rows, out, targets)
        # About 64 MiB at a time.
        step = max(1, (64 << 20) // max(1, 2 * _row_bytes(self.shape)))
        for start in range(done, len(rows), step):
            self._read_source(rows[start : start + step], out, targets[start : start + step])

    def _read_cache(self, rows: NDArray[np.int64], out: NDArray[Any], targets: NDArray[np.int64]) -> int:
        """Read rows until the cache turns out to be damaged. Returns the number of rows."""
        cache = self.cache
        if cache is None or cache.damaged:
            return 0
        direct = out.dtype == np.float16 and out.flags.c_contiguous
        scratch = np.empty(self.shape[1:], np.float16)
        for done, (row, target) in enumerate(zip(rows.tolist(), targets.tolist(), strict=True)):
            half = out[target] if direct else scratch
            try:
                cache.read_row(row, half)
            except _DamagedCacheError as error:
                cache.discard(str(error))
                return done
            if not direct:
                widen(half, out[target])
        return len(rows)

    def _read_source(self, rows: NDArray[np.int64], out: NDArray[Any], targets: NDArray[np.int64]) -> None:
        if self.source.dtype == np.float16:
            halves = np.empty((len(rows), *self.shape[1:]), np.float16)
            self.source.read(rows, halves)
            for half, target in zip(halves, targets.tolist(), strict=True):
                widen(half, out[target])
            return
        values = np.empty((len(rows), *self.shape[1:]), np.float32)
        half = np.empty(self.shape[1:], np.float16)
        self.source.read(rows, values)
        for row, value, target in zip(rows.tolist(), values, targets.tolist(), strict=True):
            to_half(value, half)
            if _fits(value, half):
                widen(half, out[target])
            elif out.dtype == np.float16:
                raise UnfitRowError(
                    f"{self.source.path}: float16 cannot represent the values of row {row}",
                    "read them as float32 (train.features: stored)",
                )
            else:
                # From float32 for every dtype of `out`, so that the values do not depend on it.
                np.copyto(out[target], value, casting="unsafe")


def to_half(values: NDArray[np.float32], out: NDArray[np.float16]) -> None:
    """Round float32 to the nearest float16, 20 times as fast as NumPy. Both are C-contiguous and of the same size."""
    _convert(values, out)


def widen(half: NDArray[np.float16], out: NDArray[Any]) -> None:
    """Copy float16 values to the dtype of `out`."""
    if out.flags.c_contiguous and out.dtype in (np.float32, np.float64):
        _convert(half, out)
    else:
        np.copyto(out, half, casting="unsafe")


def _convert(values: NDArray[Any], out: NDArray[Any]) -> None:
    import torch

    convert(torch.from_numpy(values), torch.from_numpy(out))


def convert(values: "torch.Tensor", out: "torch.Tensor") -> None:
    """Copy between dtypes without starting threads. Both are contiguous and of the same size."""
    source, target = values.view(-1), out.view(-1)
    for start in range(0, len(source), SERIAL_ELEMENTS):
        target[start : start + SERIAL_ELEMENTS].copy_(source[start : start + SERIAL_ELEMENTS])


def _fits(values: NDArray[np.float32], half: NDArray[np.float16]) -> bool:
    """Whether `half` differs from `values` only by rounding. NaN and infinities fit."""
    # Positive floats are in the same order as their bits.
    largest = int((half.view(np.uint16) & 0x7FFF).max(initial=0))
    if _SMALLEST_BITS <= largest < _INFINITY_BITS:
        return True
    if largest < _SMALLEST_BITS:
        return not values.any()
    return not (np.isfinite(values) & ~np.isfinite(half)).any()


def cache_folder() -> Path:
    """The folder of the feature caches; created if missing.

    Raises:
        CacheError: It cannot be created.
    """
    folder = cache_dir() / "features"
    try:
        folder.mkdir(exist_ok=True)
    except OSError as error:
        raise CacheError(f"cannot create the folder {folder}: {error.strerror}", _OTHER_FOLDER) from error
    return folder


_OTHER_FOLDER = "set XDG_CACHE_HOME to another folder, on a local disk"


def cache_path(fingerprint: str, source: StoredArray) -> Path:
    """The array of a feature file's cache, which need not exist."""
    return cache_folder() / f"{fingerprint}.{source.path.stem}.npy"


def list_caches() -> list[CacheEntry]:
    """All arrays in the folder of caches, the most recently used first."""
    found = []
    for path in cache_folder().iterdir():
        if path.suffix not in (".npy", ".tmp"):
            continue
        # It may be renamed or removed meanwhile.
        with contextlib.suppress(FileNotFoundError):
            stat = path.stat()
            state: CacheState = "ready" if path.suffix == ".npy" else "unfinished"
            found.append(
                CacheEntry(
                    path=path,
                    fingerprint=path.name.lstrip(".").partition(".")[0],
                    source=str(_read_sidecar(path).get("source", "?")),
                    size=stat.st_size,
                    last_use=stat.st_mtime,
                    state="in use" if _is_in_use(path) else state,
                )
            )
    return sorted(found, key=lambda entry: entry.last_use, reverse=True)


def clear_caches(fingerprint: str | None = None) -> tuple[list[CacheEntry], list[CacheEntry]]:
    """Remove the caches of a data folder, or all.

    Args:
        fingerprint: Fingerprint of the data folder; by default all caches are removed.

    Returns:
        The caches that were removed, and those that remain because they are in use.
    """
    removed: list[CacheEntry] = []
    kept: list[CacheEntry] = []
    for entry in list_caches():
        if fingerprint is None or entry.fingerprint == fingerprint:
            (removed if entry.state != "in use" and _remove(entry.path) else kept).append(entry)
    for sidecar in cache_folder().glob(f"{fingerprint or '*'}.*.json"):
        if not sidecar.with_suffix(".npy").exists():
            with contextlib.suppress(OSError):
                sidecar.unlink()
    return removed, kept


def cache_limit() -> int:
    """The limit of the size of all caches in bytes."""
    with contextlib.suppress(OSError, ValueError, KeyError, TypeError, OverflowError, RecursionError):
        limit = int(json.loads((cache_folder() / "settings.json").read_bytes())["limit_bytes"])
        if limit >= 0:
            return limit
    return LIMIT_BYTES


def set_cache_limit(limit: int) -> list[CacheEntry]:
    """Set the limit of the size of all caches in bytes. Returns the least recently used ones, which it removes."""
    write_json(cache_folder() / "settings.json", {"limit_bytes": limit})
    return _make_room(0)


def _make_room(size: int) -> list[CacheEntry]:
    """Remove the least recently used caches until `size` bytes fit. Raises CacheError, and removes none, if not."""
    with cache_lock("feature-cache.lock"):
        folder, limit, entries = cache_folder(), cache_limit(), list_caches()
        idle = [entry for entry in entries if entry.state != "in use"]
        total, removable = (sum(entry.size for entry in group) for group in (entries, idle))
        if size and total - removable + size > limit:
            raise CacheError(
                f"the feature cache needs {_gib(size)}; with the caches in use ({_gib(total - removable)}) it exceeds"
                f" the limit of {_gib(limit)}",
                "raise the limit with `cmran cache`",
            )
        if (free := free_bytes(folder)) is not None and size > free + removable:
            raise CacheError(
                f"the feature cache needs {_gib(size)}, but {_gib(free + removable)} are available in {folder}",
                f"free space, or {_OTHER_FOLDER}",
            )
        removed = []
        for entry in reversed(idle):
            free = free_bytes(folder)
            if total + size <= limit and (free is None or size <= free):
                break
            if _remove(entry.path):
                log.info("removed the feature cache %s (%s) to free space", entry.path.name, _gib(entry.size))
                total -= entry.size
                removed.append(entry)
    return removed


def _is_in_use(path: Path) -> bool:
    try:
        # An exclusive lock on NFS requires write access.
        descriptor = os.open(path, os.O_RDWR if os.access(path, os.W_OK) else os.O_RDONLY)
    except FileNotFoundError:
        raise
    except OSError:
        # For example another user's: never removed.
        return True
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        return True
    except OSError:
        # Without locks it may be removed: a reader keeps its open file.
        return False
    finally:
        os.close(descriptor)
    return False


def _remove(path: Path) -> bool:
    """Remove an array and its sidecar. Returns whether that was possible."""
    try:
        path.unlink(missing_ok=True)
        _sidecar(path).unlink(missing_ok=True)
    except OSError:
        return False
    return True


def _sidecar(path: Path) -> Path:
    return path.with_suffix(".json")


def _read_sidecar(path: Path) -> dict[str, Any]:
    """The sidecar of an array; empty if it is missing or damaged."""
    with contextlib.suppress(OSError, ValueError, RecursionError):
        if isinstance(content := json.loads(_sidecar(path).read_bytes()), dict):
            return content
    return {}


def _gib(size: int) -> str:
    return f"{size / 2**30:.2f} GiB"


def _open(path: Path, shape: tuple[int, ...]) -> FeatureCache | None:
    """The cache; None if there is none or it is damaged, in which case it is removed."""
    try:
        return FeatureCache(path, shape)
    except FileNotFoundError:
        return None
    except (_DamagedCacheError, OSError) as error:
        _log_damaged(path, str(error))
        _remove(path)
        return None


def _log_damaged(path: Path, reason: str) -> None:
    log.warning("the feature cache %s is damaged (%s): it is removed, and rebuilt on next use", path, reason)


def _build(source: StoredArray, path: Path, fingerprint: str, progress: bool) -> FeatureCache | None:
    """Build the cache of a feature file, or wait for another process that builds it.

    None, after a warning, if float16 cannot represent a row. Raises CacheError if the cache cannot be written.
    """
    waiting = f"another process builds the feature cache {path.name}: waiting for it"
    try:
        with cache_lock(f"features-{fingerprint}.lock", waiting):
            if (cache := _open(path, source.shape)) is not None:
                return cache
            if unfit := _read_sidecar(path).get("unfit"):
                _log_unfit(source, unfit)
                return None
            _remove_old_format()
            remove_unfinished(path.parent, path.name)
            size = len(_npy_header(source.shape)) + source.shape[0] * _row_bytes(source.shape)
            _make_room(size)
            started = time.monotonic()
            sidecar: dict[str, Any] = {"source": str(source.path.resolve()), "fingerprint": fingerprint}
            try:
                with atomic_write(path) as file:
                    checksums = _write(file, source, progress)
                    # Before the array gets its name, which makes the cache valid.
                    write_json(_sidecar(path), sidecar | {"crc32": checksums})
            except UnfitRowError as error:
                # The next run does not read the file again to find the row.
                write_json(_sidecar(path), sidecar | {"unfit": error.message})
                _log_unfit(source, error.message)
                return None
    except CacheError:
        raise
    except StorageError as error:
        raise CacheError(error.message, f"free space or grant write permission, or {_OTHER_FOLDER}") from error
    log.info("%s: cached as float16 in %.1f s, %s, in %s", source.path, time.monotonic() - started, _gib(size), path)
    return _open(path, source.shape)


def _log_unfit(source: StoredArray, reason: str) -> None:
    log_once(logging.WARNING, f"{source.path} is not cached but read as stored, which is slower: {reason}")


def _remove_old_format() -> None:
    old = cache_dir() / "packs"
    if old.is_dir():
        shutil.rmtree(old, ignore_errors=True)
        log.info("removed %s, feature caches in a format that is no longer used", old)


def _write(file: BinaryIO, source: StoredArray, progress: bool) -> list[int]:
    """Write the array and return the CRC-32 of each row. Reading, conversion and writing overlap."""
    with contextlib.suppress(OSError):
        # Marks the file as in use; not required.
        fcntl.flock(file, fcntl.LOCK_SH)
    file.write(_npy_header(source.shape))
    drop_pages = source.sweep()
    rows = source.shape[0]
    step = min(source.block_rows(BLOCK_BYTES), rows)
    starts = range(0, rows, step)
    blocks = [np.empty((step, *source.shape[1:]), source.dtype) for _ in range(3)]
    halves = [np.empty((step, *source.shape[1:]), np.float16) for _ in range(2)]
    values = np.empty(source.shape[1:], np.float32)
    checksums: list[int] = []
    with (
        ThreadPoolExecutor(1, "cmran-cache-read") as reader,
        ThreadPoolExecutor(2, "cmran-cache-write") as writer,
        Progress(rows * source.row_bytes, f"cache {source.path.name}", "B", enabled=progress) as bar,
    ):

        def read(number: int) -> NDArray[Any]:
            start, stop = starts[number], min(starts[number] + step, rows)
            block = source.read_block(start, stop, blocks[number % 3])
            drop_pages(start, stop)
            return block

        reads = deque(reader.submit(read, number) for number in range(min(3, len(starts))))
        written: Future[None] | None = None
        synced: Future[None] | None = None
        for number, start in enumerate(starts):
            block, half = reads.popleft().result(), halves[number % 2]
            for index, stored in enumerate(block):
                with np.errstate(over="ignore"):
                    np.copyto(values, stored, casting="unsafe")
                to_half(values, half[index])
                if not _fits(values, half[index]):
                    largest = np.abs(values).max()
                    raise UnfitRowError(f"the largest value of row {start + index} is {largest:.6g}, unfit for float16")
                checksums.append(zlib.crc32(half[index]))
            if number + 3 < len(starts):
                reads.append(reader.submit(read, number + 3))
            if written is not None:
                written.result()
                # The disk writes while the next blocks are read; otherwise all of it would wait for the end.
                if synced is None or synced.done():
                    if synced is not None:
                        synced.result()
                    synced = writer.submit(_sync, file)
            written = writer.submit(_write_block, file, half[: len(block)])
            bar.update(len(block) * source.row_bytes)
        # An error of a sync is reported only once: the final one would miss it.
        for future in (written, synced):
            if future is not None:
                future.result()
    if not source.is_as_opened():
        # The fingerprint belongs to the values of before.
        raise DataError(
            f"{source.path} was changed while it was cached", "run the command again when nothing writes to the file"
        )
    return checksums


def _write_block(file: BinaryIO, halves: NDArray[np.float16]) -> None:
    file.write(halves.reshape(-1).view(np.uint8).data)


def _sync(file: BinaryIO) -> None:
    with optional():
        os.fdatasync(file.fileno())


def _npy_header(shape: tuple[int, ...]) -> bytes:
    header = io.BytesIO()
    np.lib.format.write_array_header_1_0(header, {"descr": "<f2", "fortran_order": False, "shape": shape})
    return header.getvalue()


def _row_bytes(shape: tuple[int, ...]) -> int:
    return 2 * int(np.prod(shape[1:], dtype=np.int64))
