"""One data set of one HDF5 file: checked against the table of files when opened, then read by rows or in blocks."""

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

from cmran.data.axes import rank_hint
from cmran.data.faults import Fault, FaultError
from cmran.data.layout import FileSpec
from cmran.utils.files import NO_LOCKS, lock_fault, log_once, optional, what_is_at

Passed = Callable[[int, int], None]
"""Told of a sweep that the rows from the first number to the second have been read."""

_CHUNK_CACHE_BYTES = 64 << 20
_GROUP_BYTES = 64 << 20
_CACHE_SAMPLE = 32
# Rows that tell whether a file is in memory.
_LOCKING_VARIABLE = "HDF5_USE_FILE_LOCKING"
_FRESH_COPY = "copy or download the file again"


class StoredArray:
    """One data set, open for reading. Open it with `open_array`; it is a context manager.

    Contiguous uncompressed data (the published format) is read straight from its place in the file into the caller's
    buffer. That is preferred to a memory map: the memory held is what was asked for and no more, and a file that
    shrinks while it is read raises an error where a map would kill the process. Anything else goes through h5py.
    Reading is safe from several threads.
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
        """Whether rows lie in the file as they are, one after the other."""
        return self._offset is not None

    def is_as_opened(self) -> bool:
        """Whether nobody has written to the file, or put another in its place, since it was opened."""
        return self._stamp is not None and _stamp(self.path) == self._stamp

    def close(self) -> None:
        """Close the file; harmless when done twice."""
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
        """Row `rows[i]` into `out[at[i]]` (`out[i]` without `at`), converted to the dtype of `out`.

        Rows may come in any order and repeat. Raises IndexError for a row out of range, FaultError when the file
        cannot be read.
        """
        if rows.size and (rows.min() < 0 or rows.max() >= self.shape[0]):
            raise IndexError(f"{self.path}: rows from 0 to {self.shape[0] - 1}, asked for {rows.min()} to {rows.max()}")
        places = range(len(rows)) if at is None else at.tolist()
        if self._offset is None:
            self._read_groups(rows, out, np.fromiter(places, np.int64, len(rows)))
            return
        direct = out.dtype == self.dtype and out.flags.c_contiguous
        scratch = None if direct else np.empty((1, *self.shape[1:]), self.dtype)
        for row, place in zip(rows.tolist(), places, strict=True):
            if scratch is None:
                self._read_bytes(row, out[place : place + 1])
            else:
                self._read_bytes(row, scratch)
                # A value beyond float16 becomes inf; the validator is where such values are told of.
                with np.errstate(over="ignore"):
                    np.copyto(out[place : place + 1], scratch, casting="unsafe")

    def read_block(self, start: int, stop: int, buffer: NDArray[Any] | None = None) -> NDArray[Any]:
        """Rows start to stop in the stored dtype, in `buffer` (of at least so many rows) when it is given."""
        shape = (stop - start, *self.shape[1:])
        out = np.empty(shape, self.dtype) if buffer is None else buffer[: stop - start]
        if self._offset is None:
            with self._told(start):
                assert self._data is not None
                self._data.read_direct(out, np.s_[start:stop])
        else:
            self._read_bytes(start, out)
        return out

    def sweep(self) -> Passed:
        """Announce one pass over the rows, from the first to the last: the system then fetches more, in larger pieces.

        What is returned must be told of the rows that have been read. Of a file that was not in memory they are let go:
        room for it takes longer to make than the rows to read, and pushes out what others need. A file that was in
        memory stays there, and so does one of which the system does not tell.
        """
        if self._descriptor is None or self._offset is None:
            return lambda start, stop: None
        descriptor, offset = self._descriptor, self._offset
        kept = self._in_memory(descriptor, offset)
        with optional():
            os.posix_fadvise(descriptor, 0, 0, os.POSIX_FADV_SEQUENTIAL)

        def passed(start: int, stop: int) -> None:
            if not kept:
                place, size = offset + start * self.row_bytes, (stop - start) * self.row_bytes
                with optional():
                    os.posix_fadvise(descriptor, place, size, os.POSIX_FADV_DONTNEED)

        return passed

    def _in_memory(self, descriptor: int, offset: int) -> bool:
        """Whether most of a sample of rows can be read without waiting for the disk, or that is not known."""
        found, byte = 0, bytearray(1)
        # From the last to the first: asking fetches what comes next.
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
        """The whole array in the stored dtype: for labels and orders, not for features."""
        return self.read_block(0, self.shape[0])

    def block_rows(self, max_bytes: int) -> int:
        """Rows of a block of at most `max_bytes` (at least one row), whole chunks where they fit."""
        rows: int = max(1, max_bytes // max(1, self.row_bytes))
        return rows - rows % self.chunk_rows if rows > self.chunk_rows else rows

    def _read_bytes(self, row: int, out: NDArray[Any]) -> None:
        """As many rows as `out` holds (C-contiguous, stored dtype), from `row` on."""
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

    def _read_groups(self, rows: NDArray[np.int64], out: NDArray[Any], places: NDArray[np.int64]) -> None:
        # Chunked data: rows of one chunk are read together, so that it is unpacked once, but no more than fits a block.
        if self._data is None:
            raise ValueError(f"{self.path} is closed")
        order = np.argsort(rows, kind="stable")
        rows, places = rows[order], places[order]
        most = max(1, _GROUP_BYTES // max(1, self.row_bytes))
        start = 0
        while start < len(rows):
            first = int(rows[start])
            end_row = min((first // self.chunk_rows + 1) * self.chunk_rows, first + most)
            stop = int(np.searchsorted(rows, end_row))
            block = self.read_block(first, int(rows[stop - 1]) + 1)
            with np.errstate(over="ignore"):
                out[places[start:stop]] = block[rows[start:stop] - first].astype(out.dtype, copy=False)
            start = stop

    @contextlib.contextmanager
    def _told(self, start: int) -> Iterator[None]:
        try:
            yield
        except (OSError, RuntimeError) as error:
            raise self._unreadable(_one_line(error), [start]) from error

    def _truncated(self, found: str) -> FaultError:
        end = (self._offset or 0) + self.row_bytes * self.shape[0]
        fault = _fault(self.spec, "unreadable_file", found, f"{end} bytes or more: the file is cut short", _FRESH_COPY)
        return FaultError(self.path.parent, fault)

    def _unreadable(self, found: str, rows: list[int]) -> FaultError:
        fault = _fault(self.spec, "unreadable_file", found, "data that can be read", _FRESH_COPY, rows)
        return FaultError(self.path.parent, fault)


def open_hdf5(path: Path, mode: Literal["r", "w"], **options: Any) -> h5py.File:
    """`h5py.File`, without HDF5's lock where the file system has no locks, which is logged.

    With locks, a file that another program is writing is detected. The environment variable HDF5_USE_FILE_LOCKING, if
    it is set, decides instead. Raises OSError and RuntimeError as h5py does.
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
            " sure that no other program is writing them",
        )
    return h5py.File(path, mode, locking=False, **options)


def open_array(folder: Path, spec: FileSpec) -> StoredArray:
    """The data set that `spec` describes, opened and checked, without reading it.

    Raises FaultError: missing_file, unreadable_file (not HDF5, cut short, no permission), missing_key, data_elsewhere
    (another file holds the array), wrong_shape (rank, or a number that the table fixes, or an empty dimension),
    wrong_dtype.
    """
    path = folder / spec.name
    if (there := what_is_at(path)) == "nothing":
        hint = "copy it into the folder; README.md says where each file comes from"
        raise FaultError(folder, _fault(spec, "missing_file", "no such file", f"HDF5: {spec.content}", hint))
    if there != "a file":
        hint = "put the HDF5 file in its place"
        raise FaultError(folder, _fault(spec, "unreadable_file", there, "a file that can be read", hint))
    stamp = _stamp(path)
    try:
        file = open_hdf5(path, "r", rdcc_nbytes=_CHUNK_CACHE_BYTES)
    except (OSError, RuntimeError) as error:
        raise FaultError(folder, _fault(spec, "unreadable_file", *_why_unreadable(path, error))) from error
    try:
        return StoredArray(path, spec, _checked(folder, spec, file), stamp)
    except BaseException as error:
        file.close()
        if isinstance(error, OSError | RuntimeError | KeyError):
            raise FaultError(folder, _fault(spec, "unreadable_file", *_why_unreadable(path, error))) from error
        raise


def shape_text(spec: FileSpec) -> str:
    """The shape in letters, such as `(N, T, 29)`."""
    return f"({', '.join(map(str, spec.shape))}{',' if len(spec.shape) == 1 else ''})"


def _checked(folder: Path, spec: FileSpec, file: h5py.File) -> h5py.Dataset:
    """The data set of `file`, or FaultError."""
    # Not file.get(): that takes an object that is there but damaged for an absent one.
    # It could change, or be gone, and the file and its fingerprint would stay the same.
    elsewhere = _fault(
        spec, "data_elsewhere", "a reference to other files", "the data itself", "copy the array into the file"
    )
    if isinstance(file.get(spec.key, getlink=True), h5py.ExternalLink):
        raise FaultError(folder, elsewhere)
    keys = list(file)
    data = file[spec.key] if spec.key in keys else None
    if not isinstance(data, h5py.Dataset):
        # A name may be any bytes: h5py gives those that are not UTF-8 as such.
        names = ", ".join(sorted(" ".join(str(key).split()) for key in keys)[:8])
        found = f"the keys {names or '(none)'}" if data is None else "a group of that name"
        hint = f"store the array under the key {spec.key!r}"
        raise FaultError(folder, _fault(spec, "missing_key", found, f"the data set {spec.key!r}", hint))
    # A link of this file can lead to an external one.
    if data.is_virtual or data.external or h5py.h5o.get_info(data.id).fileno != h5py.h5o.get_info(file.id).fileno:
        raise FaultError(folder, elsewhere)
    shape, dtype = data.shape, data.dtype
    exact = shape is not None and len(shape) == len(spec.shape)
    if exact:
        exact = all(isinstance(want, str) or want == size for want, size in zip(spec.shape, shape, strict=True))
    # An empty split is a fault of its own, told by whoever reads the order.
    empty = exact and 0 in (shape[1:] if spec.kind == "order" else shape)
    if not exact or empty:
        like = " x ".join(map(str, spec.published_shape))
        expected = f"{shape_text(spec)}, each at least 1 (as published: {like})"
        fault = _fault(spec, "wrong_shape", f"the shape {shape}", expected, rank_hint(spec, shape))
        raise FaultError(folder, fault)
    good, expected = {
        "features": (dtype.kind == "f" and dtype.itemsize in (2, 4, 8), "float64, float32 or float16"),
        "labels": (dtype.kind in "fiub", "numbers, such as float32"),
        "order": (dtype.kind in "iu", "whole numbers, such as int64"),
    }[spec.kind]
    if not good:
        hint = f"write the array again as {spec.dtype}"
        raise FaultError(folder, _fault(spec, "wrong_dtype", f"the dtype {dtype}", expected, hint))
    return data


def _direct_offset(data: h5py.Dataset) -> int | None:
    """Where the rows start in the file, or None when they do not lie there one after the other as NumPy wants them."""
    contiguous = data.id.get_create_plist().get_layout() == h5py.h5d.CONTIGUOUS
    if not contiguous or data.id.get_storage_size() != data.size * data.dtype.itemsize:
        return None
    if data.dtype.kind not in "fiu" or data.id.get_type() != h5py.h5t.py_create(data.dtype):
        return None
    offset = data.id.get_offset()
    return None if offset is None else int(offset)


def _why_unreadable(path: Path, error: Exception) -> tuple[str, str, str]:
    """Found, expected, hint for a file that HDF5 does not open."""
    try:
        with path.open("rb") as file:
            head, size = file.read(16), os.fstat(file.fileno()).st_size
    except OSError as cause:
        hint = "grant read permission" if isinstance(cause, PermissionError) else "put the HDF5 file in its place"
        return cause.strerror or str(cause), "a file that can be read", hint
    if not head.startswith(b"\x89HDF\r\n\x1a\n"):
        return f"{size} bytes that are not HDF5, beginning with {head!r}", "an HDF5 file", _FRESH_COPY
    if getattr(error, "errno", None) == errno.EAGAIN or "already open for write" in str(error):
        hint = "wait for that program or end it; after a crash of it, `h5clear -s` or a fresh copy"
        return "a file that another program is writing", "a finished file", hint
    setting = os.environ.get(_LOCKING_VARIABLE)
    if setting and (fault := lock_fault(path)) is not None and getattr(error, "errno", None) in NO_LOCKS:
        hint = f"unset {_LOCKING_VARIABLE} (found {setting!r}), or copy the folder to a disk with locks"
        return f"a file system without locks ({fault})", "one with locks, as the environment asks", hint
    return f"a damaged or cut file of {size} bytes ({_one_line(error)})", "a whole HDF5 file", _FRESH_COPY


def _stamp(path: Path) -> list[int] | None:
    try:
        found = path.stat()
    except OSError:
        return None
    # Not the time of a change to its rights or links.
    return [found.st_dev, found.st_ino, found.st_size, found.st_mtime_ns]


def _fault(spec: FileSpec, code: str, found: str, expected: str, hint: str, rows: list[int] | None = None) -> Fault:
    key = None if code == "missing_file" else spec.key
    return Fault(code=code, file=spec.name, key=key, rows=rows or [], found=found, expected=expected, hint=hint)


def _one_line(error: BaseException) -> str:
    # str() of a KeyError puts its message in quotes.
    return " ".join(str(error.args[0] if isinstance(error, KeyError) and error.args else error).split())
