"""One dataset of one HDF5 file: checked against the table of files when it is opened, then read by rows or blocks."""

import contextlib
import errno
import logging
import os
from collections.abc import Callable, Iterator
from pathlib import Path
from types import TracebackType
from typing import Any, Literal, Self

import h5py
import numpy as np
from numpy.typing import NDArray

from cmran.data.faults import FaultError, make_fault
from cmran.data.layout import FileSpec
from cmran.data.rules import rank_hint
from cmran.utils.files import NO_LOCKS, lock_fault, log_once, optional, what_is_at

RowsDone = Callable[[int, int], None]
"""Call it after rows `start` to `stop` of a sweep have been read."""

_CHUNK_CACHE_BYTES = 64 << 20
_GROUP_BYTES = 64 << 20
_CACHE_SAMPLE = 32
"""Number of rows that are probed to decide whether a file is in the page cache."""
_LOCKING_VARIABLE = "HDF5_USE_FILE_LOCKING"
_COPY_AGAIN = "copy or download the file again"
_REPLACE = "replace it by the HDF5 file"


class StoredArray:
    """One dataset, open for reading. Open it with `open_array`. It is a context manager.

    Contiguous uncompressed data (the published format) is read from its byte offset directly into the caller's buffer.
    Unlike a memory map, this uses no memory beyond the buffer, and a file that shrinks while it is read raises an
    error instead of killing the process. All other data is read through h5py. Reading is thread-safe.
    """

    def __init__(self, path: Path, spec: FileSpec, data: h5py.Dataset, stamp: list[int] | None) -> None:
        self.path, self.spec = path, spec
        self.shape: tuple[int, ...] = data.shape
        self.dtype: np.dtype[Any] = data.dtype
        self.row_bytes = int(np.prod(self.shape[1:], dtype=np.int64)) * self.dtype.itemsize
        self._stamp = stamp
        self.chunk_rows: int = data.chunks[0] if data.chunks else 1
        self._offset = _direct_offset(data)
        self._descriptor: int | None = None
        self._data: h5py.Dataset | None = None
        if self._offset is None:
            self._data = data
        else:
            self._descriptor = os.open(path, os.O_RDONLY)
            data.file.close()

    @property
    def direct(self) -> bool:
        """Whether the rows are stored contiguously and uncompressed, so that they are read without h5py."""
        return self._offset is not None

    def is_as_opened(self) -> bool:
        """Whether the file was neither written nor replaced since it was opened."""
        return self._stamp is not None and _stamp(self.path) == self._stamp

    def close(self) -> None:
        """Close the file. Idempotent."""
        if self._descriptor is not None:
            os.close(self._descriptor)
            self._descriptor = None
        if self._data is not None:
            self._data.file.close()
            self._data = None

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    def read(self, rows: NDArray[np.int64], out: NDArray[Any], at: NDArray[np.int64] | None = None) -> None:
        """Read row `rows[i]` into `out[at[i]]` (`out[i]` without `at`), converted to the dtype of `out`.

        Args:
            rows: Row numbers, in any order, with or without repeats.
            out: Buffer; its first axis counts rows.
            at: Index into `out` for each row.

        Raises:
            IndexError: A row does not exist.
            FaultError: The file cannot be read.
        """
        if rows.size and (rows.min() < 0 or rows.max() >= self.shape[0]):
            raise IndexError(
                f"{self.path}: found rows from {rows.min()} to {rows.max()}, expected rows from 0 to"
                f" {self.shape[0] - 1}"
            )
        targets = np.arange(len(rows)) if at is None else at
        if self._offset is None:
            self._read_groups(rows, out, targets)
            return
        direct = out.dtype == self.dtype and out.flags.c_contiguous
        scratch = None if direct else np.empty((1, *self.shape[1:]), self.dtype)
        for row, target in zip(rows.tolist(), targets.tolist(), strict=True):
            if scratch is None:
                self._read_bytes(row, out[target : target + 1])
            else:
                self._read_bytes(row, scratch)
                # A value beyond float16 becomes inf without a warning; the validator reports such values.
                with np.errstate(over="ignore"):
                    np.copyto(out[target : target + 1], scratch, casting="unsafe")

    def read_block(self, start: int, stop: int, buffer: NDArray[Any] | None = None) -> NDArray[Any]:
        """Read rows `start` to `stop` in the stored dtype, into `buffer` (with at least that many rows) if given."""
        shape = (stop - start, *self.shape[1:])
        out = np.empty(shape, self.dtype) if buffer is None else buffer[: stop - start]
        if self._offset is None:
            with self._as_fault(start):
                assert self._data is not None
                self._data.read_direct(out, np.s_[start:stop])
        else:
            self._read_bytes(start, out)
        return out

    def sweep(self) -> RowsDone:
        """Announce one pass over all rows in order, so that the kernel reads ahead more, in larger requests.

        If the file was not in the page cache, its pages are dropped (POSIX_FADV_DONTNEED) after they were used:
        keeping them costs more than reading them, and evicts what other processes need. A file that was in the page
        cache stays there, also if the system does not report it.

        Returns:
            A function to call with `start` and `stop` after each block of rows.
        """
        if self._descriptor is None or self._offset is None:
            return lambda start, stop: None
        descriptor, offset = self._descriptor, self._offset
        keep = self._in_page_cache(descriptor, offset)
        with optional():
            os.posix_fadvise(descriptor, 0, 0, os.POSIX_FADV_SEQUENTIAL)

        def rows_done(start: int, stop: int) -> None:
            if not keep:
                first, size = offset + start * self.row_bytes, (stop - start) * self.row_bytes
                with optional():
                    os.posix_fadvise(descriptor, first, size, os.POSIX_FADV_DONTNEED)

        return rows_done

    def _in_page_cache(self, descriptor: int, offset: int) -> bool:
        """Return whether most of a sample of rows can be read without disk access; also True if that is unknown."""
        found, byte = 0, bytearray(1)
        # From the last to the first, because each probe reads ahead.
        sample = np.unique(np.linspace(0, self.shape[0] - 1, _CACHE_SAMPLE, dtype=np.int64))[::-1]
        for row in sample.tolist():
            try:
                found += os.preadv(descriptor, [byte], offset + row * self.row_bytes, os.RWF_NOWAIT)
            except BlockingIOError:
                continue
            except OSError:
                return True
        return 2 * found > len(sample)

    def read_all(self) -> NDArray[Any]:
        """Read the whole array in the stored dtype. For labels and orders, not for features."""
        return self.read_block(0, self.shape[0])

    def block_rows(self, max_bytes: int) -> int:
        """Return the number of rows in a block of at most `max_bytes`: at least one row, whole chunks if they fit."""
        rows: int = max(1, max_bytes // max(1, self.row_bytes))
        return rows - rows % self.chunk_rows if rows > self.chunk_rows else rows

    def _read_bytes(self, row: int, out: NDArray[Any]) -> None:
        """Fill `out` (C-contiguous, stored dtype) with consecutive rows, starting at `row`."""
        if self._descriptor is None or self._offset is None:
            raise ValueError(f"{self.path} is closed")
        view = out.reshape(-1).view(np.uint8).data
        position, done = self._offset + row * self.row_bytes, 0
        while done < len(view):
            try:
                count = os.preadv(self._descriptor, [view[done:]], position + done)
            except OSError as error:
                raise self._unreadable(f"{error.strerror} at byte {position + done}", [row]) from error
            if count == 0:
                raise self._truncated(f"its end at byte {position + done}, within row {row}")
            done += count

    def _read_groups(self, rows: NDArray[np.int64], out: NDArray[Any], targets: NDArray[np.int64]) -> None:
        """Read through h5py. Rows of one chunk are read together, up to a block, so that it is decompressed once."""
        if self._data is None:
            raise ValueError(f"{self.path} is closed")
        order = np.argsort(rows, kind="stable")
        rows, targets = rows[order], targets[order]
        most = max(1, _GROUP_BYTES // max(1, self.row_bytes))
        start = 0
        while start < len(rows):
            first = int(rows[start])
            end_row = min((first // self.chunk_rows + 1) * self.chunk_rows, first + most)
            stop = int(np.searchsorted(rows, end_row))
            block = self.read_block(first, int(rows[stop - 1]) + 1)
            with np.errstate(over="ignore"):
                out[targets[start:stop]] = block[rows[start:stop] - first].astype(out.dtype, copy=False)
            start = stop

    @contextlib.contextmanager
    def _as_fault(self, start: int) -> Iterator[None]:
        try:
            yield
        except (OSError, RuntimeError) as error:
            raise self._unreadable(_one_line(error), [start]) from error

    def _truncated(self, found: str) -> FaultError:
        end = (self._offset or 0) + self.row_bytes * self.shape[0]
        expected = f"a file of at least {end} bytes; this one is cut short"
        return FaultError(self.path.parent, make_fault(self.spec, "unreadable_file", found, expected, _COPY_AGAIN))

    def _unreadable(self, found: str, rows: list[int]) -> FaultError:
        fault = make_fault(self.spec, "unreadable_file", found, "data that can be read", _COPY_AGAIN, rows)
        return FaultError(self.path.parent, fault)


def open_hdf5(path: Path, mode: Literal["r", "w"], **options: Any) -> h5py.File:
    """Open an `h5py.File`, without HDF5's lock (and a log line) if the file system has no locks.

    The lock detects a file that another program is writing. If the environment variable HDF5_USE_FILE_LOCKING is set,
    it decides instead. Raises OSError and RuntimeError like h5py.
    """
    try:
        return h5py.File(path, mode, **options)
    except OSError:
        fault = lock_fault(path)
        if fault is None or os.environ.get(_LOCKING_VARIABLE):
            raise
    if mode == "r":
        log_once(
            logging.INFO,
            f"{path.parent}: its file system has no locks ({fault}): HDF5 files there are read without a lock; make"
            " sure that no other program writes them",
        )
    return h5py.File(path, mode, locking=False, **options)


def open_array(folder: Path, spec: FileSpec) -> StoredArray:
    """Open and check the dataset that `spec` describes, without reading its values.

    Raises:
        FaultError: One of missing_file, unreadable_file (not HDF5, truncated, no permission), missing_key,
            data_elsewhere (the array is stored in another file), wrong_shape (rank, a size that the table fixes, or an
            empty dimension), wrong_dtype.
    """
    path = folder / spec.name
    if (found := what_is_at(path)) == "nothing":
        hint = "copy it into the folder; README.md lists the source of each file"
        raise FaultError(folder, make_fault(spec, "missing_file", "no such file", f"HDF5: {spec.content}", hint))
    if found != "a file":
        raise FaultError(folder, make_fault(spec, "unreadable_file", found, "a file that can be read", _REPLACE))
    stamp = _stamp(path)
    try:
        file = open_hdf5(path, "r", rdcc_nbytes=_CHUNK_CACHE_BYTES)
    except (OSError, RuntimeError) as error:
        raise FaultError(folder, make_fault(spec, "unreadable_file", *_why_unreadable(path, error))) from error
    try:
        return StoredArray(path, spec, _checked(folder, spec, file), stamp)
    except BaseException as error:
        file.close()
        if isinstance(error, OSError | RuntimeError | KeyError):
            raise FaultError(folder, make_fault(spec, "unreadable_file", *_why_unreadable(path, error))) from error
        raise


def _checked(folder: Path, spec: FileSpec, file: h5py.File) -> h5py.Dataset:
    """Return the dataset of `file` if it follows `spec`; raise FaultError otherwise."""
    # Data in another file could change or disappear while this file and its fingerprint stay the same.
    elsewhere = make_fault(
        spec, "data_elsewhere", "a reference to other files", "the data itself", "copy the array into the file"
    )
    if isinstance(file.get(spec.key, getlink=True), h5py.ExternalLink):
        raise FaultError(folder, elsewhere)
    # Not file.get(): it treats a damaged object as an absent one.
    keys = list(file)
    data = file[spec.key] if spec.key in keys else None
    if not isinstance(data, h5py.Dataset):
        # A key can be any bytes; h5py returns those that are not UTF-8 unchanged.
        names = ", ".join(sorted(" ".join(str(key).split()) for key in keys)[:8])
        found = f"the keys {names or '(none)'}" if data is None else "a group of that name"
        hint = f"store the array under the key {spec.key!r}"
        raise FaultError(folder, make_fault(spec, "missing_key", found, f"the dataset {spec.key!r}", hint))
    # A link within the file can point to an external link.
    if data.is_virtual or data.external or h5py.h5o.get_info(data.id).fileno != h5py.h5o.get_info(file.id).fileno:
        raise FaultError(folder, elsewhere)
    shape, dtype = data.shape, data.dtype
    exact = shape is not None and len(shape) == len(spec.shape)
    if exact:
        exact = all(isinstance(want, str) or want == size for want, size in zip(spec.shape, shape, strict=True))
    # An empty split is a separate fault, see `rules.check_order`.
    empty = exact and 0 in (shape[1:] if spec.kind == "order" else shape)
    if not exact or empty:
        expected = f"{spec.shape_text}, each at least 1 (as published: {spec.published_text})"
        fault = make_fault(spec, "wrong_shape", f"the shape {shape}", expected, rank_hint(spec, shape))
        raise FaultError(folder, fault)
    good, expected = {
        "features": (dtype.kind == "f" and dtype.itemsize in (2, 4, 8), "float64, float32 or float16"),
        "labels": (dtype.kind in "fiub", "numbers, such as float32"),
        "order": (dtype.kind in "iu", "integers, such as int64"),
    }[spec.kind]
    if not good:
        hint = f"write the array again as {spec.dtype}"
        raise FaultError(folder, make_fault(spec, "wrong_dtype", f"the dtype {dtype}", expected, hint))
    return data


def _direct_offset(data: h5py.Dataset) -> int | None:
    """Return the byte offset of the first row, or None if NumPy cannot use the stored bytes as they are."""
    contiguous = data.id.get_create_plist().get_layout() == h5py.h5d.CONTIGUOUS
    if not contiguous or data.id.get_storage_size() != data.size * data.dtype.itemsize:
        return None
    if data.dtype.kind not in "fiu" or data.id.get_type() != h5py.h5t.py_create(data.dtype):
        return None
    offset = data.id.get_offset()
    return None if offset is None else int(offset)


def _why_unreadable(path: Path, error: Exception) -> tuple[str, str, str]:
    """Return `found`, `expected` and `hint` for a file that HDF5 does not open."""
    try:
        with path.open("rb") as file:
            head, size = file.read(16), os.fstat(file.fileno()).st_size
    except OSError as cause:
        hint = "grant read permission" if isinstance(cause, PermissionError) else _REPLACE
        return cause.strerror or str(cause), "a file that can be read", hint
    if not head.startswith(b"\x89HDF\r\n\x1a\n"):
        return f"{size} bytes that are not HDF5, starting with {head!r}", "an HDF5 file", _COPY_AGAIN
    if getattr(error, "errno", None) == errno.EAGAIN or "already open for write" in str(error):
        hint = "wait for that program or stop it; if it crashed, run `h5clear -s` on the file or copy it again"
        return "a file that another program is writing", "a complete file", hint
    setting = os.environ.get(_LOCKING_VARIABLE)
    if setting and (fault := lock_fault(path)) is not None and getattr(error, "errno", None) in NO_LOCKS:
        hint = f"unset {_LOCKING_VARIABLE} (found {setting!r}), or copy the folder to a disk with locks"
        return f"a file system without locks ({fault})", "one with locks, as the environment requires", hint
    return f"a damaged or truncated file of {size} bytes ({_one_line(error)})", "a complete HDF5 file", _COPY_AGAIN


def _stamp(path: Path) -> list[int] | None:
    try:
        found = path.stat()
    except OSError:
        return None
    # Without st_ctime, which a change of permissions or links also updates.
    return [found.st_dev, found.st_ino, found.st_size, found.st_mtime_ns]


def _one_line(error: BaseException) -> str:
    # str() of a KeyError puts the message in quotes.
    return " ".join(str(error.args[0] if isinstance(error, KeyError) and error.args else error).split())
