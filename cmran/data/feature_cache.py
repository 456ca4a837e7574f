"""Packs: the visual maps of a folder as float16, one file for each feature file, in the cache folder.

A pack holds nothing that could not be made again. It lies in `cache_dir()/packs` under the fingerprint of the folder:

    header     16384 bytes: magic, length and digest of a JSON text, the text (what it is made of, shape, checks)
    rows       N rows of float16, one after the other
    checks     N CRC-32, one a row

`Float16Array` gives the same values with and without a pack. Each row is rounded to float32
and then to float16; a row that float16 cannot hold (a value beyond 65504, or none as large as 2^-8) stays as stored.

It is read with pread, not mapped: a file cut short raises an error where a map would kill the process, and the memory
held is what was asked for.
"""

import contextlib
import errno
import fcntl
import hashlib
import json
import logging
import os
import threading
import time
import zlib
from collections import deque
from collections.abc import Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

from cmran.data.hdf5 import StoredArray
from cmran.errors import CacheError, CmranError
from cmran.utils.files import cache_dir, file_lock, free_bytes, optional, sync_folder, write_json
from cmran.utils.progress import Progress

if TYPE_CHECKING:
    import torch


LIMIT_BYTES = 20 << 30
"""Room for all packs where `set_limit` has not set another."""


MAGIC = b"CMRANPK1"


HEADER_BYTES = 16384


BLOCK_BYTES = 32 << 20
"""Of the stored file, read at a time; three blocks are held."""


SERIAL_ELEMENTS = 32_000
"""Elements that torch converts in one call: from 32768 on it would start threads, and steal them from the training."""


_LARGEST = 0x7C00


# Bits of float16's infinity: finite values lie below.
_SMALLEST = 0x1C00
# Bits of 2^-8: a row with no larger value would keep few of its digits.


_DAMAGED = "the pack %s is damaged: it is given up, and made anew when it is next asked for: %s"


log = logging.getLogger(__name__)


class PackError(Exception):
    """A pack that is damaged; one line."""


class UnfitRowError(CmranError):
    """A row of values that float16 cannot hold, asked for as float16."""


@dataclass(frozen=True, kw_only=True)
class PackInfo:
    """One file in the folder of packs."""

    path: Path
    fingerprint: str
    # Of the data folder.
    source: str
    # The feature file that was packed.
    size: int
    # Bytes.
    last_use: float
    # Seconds since 1970.
    state: str


class Pack:
    """A pack, open for reading. While it is open no other process removes it."""

    def __init__(self, path: Path) -> None:
        """Raises FileNotFoundError, PackError, CacheError where the file may not be read or cannot be locked."""
        self.path = path
        self._descriptor = _open_locked(path)
        try:
            self.header = _read_header(self._descriptor)
            self.shape: tuple[int, ...] = tuple(self.header["shape"])
            self._row_bytes = 2 * int(np.prod(self.shape[1:], dtype=np.int64))
            rows, end = self.shape[0], HEADER_BYTES + self.shape[0] * self._row_bytes
            size = os.fstat(self._descriptor).st_size
            if size != end + 4 * rows:
                raise PackError(f"it has {size} bytes, expected {end + 4 * rows}")
            checks = os.pread(self._descriptor, 4 * rows, end)
            if len(checks) != 4 * rows or zlib.crc32(checks) != self.header["checks"]:
                raise PackError("its table of checks is not the one that was written")
            self._checks = np.frombuffer(checks, "<u4")
            # A row is checked when it is first read: all of them at the opening would read the whole file.
            self._seen = np.zeros(rows, bool)
            self.damaged = False
            # Threads may find the damage at once.
            self._lock = threading.Lock()
            # The time of the last use, by which the oldest go first. In another's cache we may read alone.
            with contextlib.suppress(OSError):
                os.utime(self._descriptor)
        except BaseException:
            os.close(self._descriptor)
            raise

    def read_row(self, row: int, out: NDArray[np.float16]) -> None:
        """Row `row` into `out` (C-contiguous). Raises PackError where it is not what was written."""
        view = out.reshape(-1).view(np.uint8).data
        try:
            count = os.preadv(self._descriptor, [view], HEADER_BYTES + row * self._row_bytes)
        except OSError as error:
            raise PackError(f"row {row} cannot be read: {error.strerror}") from error
        if count != self._row_bytes:
            raise PackError(f"it ends within row {row}")
        if not self._seen[row]:
            if zlib.crc32(view) != self._checks[row]:
                raise PackError(f"row {row} is not what was written")
            self._seen[row] = True

    def discard(self, reason: str) -> None:
        """Remove the file, loudly, and use it no more."""
        with self._lock:
            if self.damaged:
                return
            self.damaged = True
        with contextlib.suppress(OSError):
            # Not one that another process has made meanwhile.
            if os.stat(self.path).st_ino == os.fstat(self._descriptor).st_ino:
                self.path.unlink()
        log.warning(_DAMAGED, self.path, reason)

    def close(self) -> None:
        """Close the file; harmless when done twice."""
        if self._descriptor >= 0:
            os.close(self._descriptor)
            self._descriptor = -1


class Float16Array:
    """A feature file's rows rounded to float16: read from its pack where there is one, else from the file itself."""

    def __init__(self, source: StoredArray) -> None:
        self.source, self.shape = source, source.shape
        self.pack: Pack | None = None

    @property
    def needs_pack(self) -> bool:
        """Whether a pack would be faster than the file."""
        return not (self.source.direct and self.source.dtype == np.float16)

    @property
    def is_float16(self) -> bool:
        """Whether all rows are known to fit float16."""
        return self.pack is not None or self.source.dtype == np.float16

    def use_pack(self, fingerprint: str, *, make: bool, progress: bool = True) -> None:
        """Read from the pack from now on: the one that is there or, with `make`, one that is made now.

        Where there can be none (no room, values that float16 cannot hold, another user's) this is logged as a warning,
        and the file is read directly: the same values, slower. Raises CacheError where the cache folder cannot be
        written or locked; the file can be read all the same.
        """
        if self.pack is not None or not self.needs_pack:
            return
        path = pack_path(fingerprint, self.source)
        if os.path.exists(path) and not os.access(path, os.R_OK):
            log.warning(
                "%s is read as stored, which is slower: its pack %s may not be read: ask its owner, or set"
                " XDG_CACHE_HOME to another folder",
                self.source.path,
                path,
            )
            return
        self.pack = make_pack(self.source, fingerprint, progress=progress) if make else None
        self.pack = self.pack or _find(path, self.shape)

    def close(self) -> None:
        """Let go of the pack; the stored file belongs to whoever opened it."""
        if self.pack is not None:
            self.pack.close()
            self.pack = None

    def read(self, rows: NDArray[np.int64], out: NDArray[Any], at: NDArray[np.int64] | None = None) -> None:
        """As `StoredArray.read`. Raises UnfitRowError where `out` is float16 and a row does not fit."""
        if rows.size and (rows.min() < 0 or rows.max() >= self.shape[0]):
            raise IndexError(f"rows from 0 to {self.shape[0] - 1}, asked for {rows.min()} to {rows.max()}")
        places = np.arange(len(rows)) if at is None else at
        done = self._read_pack(rows, out, places)
        # Some 64 MiB at a time.
        step = max(1, (64 << 20) // (4 * max(1, int(np.prod(self.shape[1:], dtype=np.int64)))))
        for start in range(done, len(rows), step):
            self._read_source(rows[start : start + step], out, places[start : start + step])

    def _read_pack(self, rows: NDArray[np.int64], out: NDArray[Any], places: NDArray[np.int64]) -> int:
        """Rows that the pack gave: all of them, or fewer where it turned out to be damaged."""
        pack = self.pack
        if pack is None or pack.damaged:
            return 0
        direct = out.dtype == np.float16 and out.flags.c_contiguous
        scratch = np.empty(self.shape[1:], np.float16)
        for done, (row, place) in enumerate(zip(rows.tolist(), places.tolist(), strict=True)):
            half = out[place] if direct else scratch
            try:
                pack.read_row(row, half)
            except PackError as error:
                pack.discard(f"{error}; until then rows are read from {self.source.path}")
                return done
            if not direct:
                widen(half, out[place])
        return len(rows)

    def _read_source(self, rows: NDArray[np.int64], out: NDArray[Any], places: NDArray[np.int64]) -> None:
        if self.source.dtype == np.float16:
            halves = np.empty((len(rows), *self.shape[1:]), np.float16)
            self.source.read(rows, halves)
            for half, place in zip(halves, places.tolist(), strict=True):
                widen(half, out[place])
            return
        values = np.empty((len(rows), *self.shape[1:]), np.float32)
        half = np.empty(self.shape[1:], np.float16)
        self.source.read(rows, values)
        for row, value, place in zip(rows.tolist(), values, places.tolist(), strict=True):
            to_half(value, half)
            if _fits(value, half):
                widen(half, out[place])
            elif out.dtype == np.float16:
                raise UnfitRowError(
                    f"{self.source.path}: row {row} holds values that float16 cannot: read it as float32"
                    " (train.features: stored)"
                )
            else:
                # From float32 in every case, so that the values are the same whatever is read first.
                np.copyto(out[place], value, casting="unsafe")


def to_half(values: NDArray[np.float32], out: NDArray[np.float16]) -> None:
    """float32 to float16, rounded to the nearest; both C-contiguous and of one size. NumPy takes 20 times as long."""
    _convert(values, out)


def widen(half: NDArray[np.float16], out: NDArray[Any]) -> None:
    """The same values in the dtype of `out`."""
    if out.flags.c_contiguous and out.dtype in (np.float32, np.float64):
        _convert(half, out)
    else:
        np.copyto(out, half, casting="unsafe")


def _convert(values: NDArray[Any], out: NDArray[Any]) -> None:
    import torch

    convert(torch.from_numpy(values), torch.from_numpy(out))


def convert(values: "torch.Tensor", out: "torch.Tensor") -> None:
    """Copy between dtypes in this thread alone; both contiguous and of one size."""
    source, target = values.view(-1), out.view(-1)
    for start in range(0, len(source), SERIAL_ELEMENTS):
        target[start : start + SERIAL_ELEMENTS].copy_(source[start : start + SERIAL_ELEMENTS])


def _fits(values: NDArray[np.float32], half: NDArray[np.float16]) -> bool:
    """Whether `half` holds what `values` does, but for rounding. NaN and infinities fit."""
    # Of positive floats the larger one has the larger bits.
    largest = int((half.view(np.uint16) & 0x7FFF).max(initial=0))
    if _SMALLEST <= largest < _LARGEST:
        return True
    if largest < _SMALLEST:
        return not values.any()
    return not (np.isfinite(values) & ~np.isfinite(half)).any()


def pack_path(fingerprint: str, source: StoredArray) -> Path:
    """Where the pack of a feature file of a folder lies, or would lie."""
    return packs_dir() / f"{fingerprint}.{source.path.stem}.pack"


def packs_dir() -> Path:
    """The folder of the packs; made if missing."""
    folder = cache_dir() / "packs"
    try:
        folder.mkdir(exist_ok=True)
    except OSError as error:
        raise _unusable(f"cannot create the folder {folder}", error) from error
    return folder


def _unusable(what: str, error: OSError) -> CacheError:
    return CacheError(f"{what}: {error.strerror or error}: set XDG_CACHE_HOME to another folder, on a local disk")


def make_pack(source: StoredArray, fingerprint: str, *, progress: bool = True) -> Pack | None:
    """The pack of a feature file; made where it is missing or damaged, which takes a pass over the file.

    Two processes that ask at once make one: the second waits for the first. None, after a warning, where it cannot be
    made: no room on the disk or within the limit, or a row that float16 cannot hold. Raises CacheError where the folder
    of the packs cannot be written or locked.
    """
    path = pack_path(fingerprint, source)
    if (pack := _find(path, source.shape)) is not None or _is_refused(path, source):
        return pack
    with _making(path) as descriptor:
        # Another process may have made it meanwhile.
        if (pack := _find(path, source.shape)) is not None or _is_refused(path, source):
            return pack
        started = time.monotonic()
        try:
            size = HEADER_BYTES + source.shape[0] * (2 * (source.row_bytes // source.dtype.itemsize) + 4)
            _make_room(descriptor, size)
            header = {
                "fingerprint": fingerprint,
                "source": str(source.path.resolve()),
                "shape": source.shape,
                "dtype": "float16",
            }
            _write(descriptor, source, header, progress)
            os.replace(_partial(path), path)
            sync_folder(path.parent)
        except _Refused as error:
            refusal = {"fingerprint": fingerprint, "source": str(source.path.resolve())}
            # Only saves the next try.
            with contextlib.suppress(CmranError):
                write_json(path.with_suffix(".refused"), refusal)
            log.warning("%s is not packed but read as stored, which is slower: %s", source.path, error)
            return None
        except _NoRoom as error:
            log.warning("%s is not packed but read as stored, which is slower: %s", source.path, error)
            return None
        except OSError as error:
            if error.errno not in (errno.ENOSPC, errno.EDQUOT, errno.EFBIG):
                raise _unusable(f"cannot write {path}", error) from error
            log.warning("%s is not packed but read as stored, which is slower: %s", source.path, error.strerror)
            return None
    log.info("%s: packed in %.1f s, %s, kept in %s", source.path, time.monotonic() - started, _gib(size), path)
    return _find(path, source.shape)


def list_packs() -> list[PackInfo]:
    """What lies in the folder of packs, the last used first."""
    found = []
    for path in packs_dir().iterdir():
        if path.suffix not in (".pack", ".partial", ".refused") or not path.is_file():
            continue
        with contextlib.suppress(FileNotFoundError):
            found.append(_info(path))
    return sorted(found, key=lambda info: info.last_use, reverse=True)


def clear_packs(fingerprint: str | None = None) -> tuple[list[PackInfo], list[PackInfo]]:
    """Remove the packs of a folder, or all. Returns those that are gone, and those in use, which stay."""
    gone: list[PackInfo] = []
    kept: list[PackInfo] = []
    for info in list_packs():
        if fingerprint is None or info.fingerprint == fingerprint:
            (gone if _remove(info.path) else kept).append(info)
    return gone, kept


def limit_bytes() -> int:
    """Room for all packs."""
    with contextlib.suppress(OSError, ValueError, KeyError, TypeError, OverflowError, RecursionError):
        limit = int(json.loads((packs_dir() / "settings.json").read_text(encoding="utf-8"))["limit_bytes"])
        if limit >= 0:
            return limit
    return LIMIT_BYTES


def set_limit(limit: int) -> list[PackInfo]:
    """Keep no more than `limit` bytes of packs from now on. Returns those that went: the least recently used."""
    folder = packs_dir()
    write_json(folder / "settings.json", {"limit_bytes": limit})
    with file_lock(folder / ".lock"):
        return _evict(0)


class _Refused(Exception):
    """The values cannot be packed."""


class _NoRoom(Exception):
    """The pack cannot be kept."""


def _write(descriptor: int, source: StoredArray, header: dict[str, Any], progress: bool) -> None:
    """Rows, checks, then the header: without it the file is no pack. Reading, converting, writing, syncing overlap."""
    passed = source.sweep()
    rows = source.shape[0]
    row_bytes = 2 * (source.row_bytes // source.dtype.itemsize)
    step = min(source.block_rows(BLOCK_BYTES), rows)
    starts = deque(range(0, rows, step))
    checks = np.empty(rows, "<u4")
    values = np.empty(source.shape[1:], np.float32)
    # While one block is converted, the next two are read and the one before is written.
    blocks = [np.empty((step, *source.shape[1:]), source.dtype) for _ in range(3)]
    halves, spare = (np.empty((step, *source.shape[1:]), np.float16) for _ in range(2))
    reads: deque[tuple[int, NDArray[Any], Future[NDArray[Any]]]] = deque()
    write: Future[None] | None = None
    sync: Future[None] | None = None
    with (
        ThreadPoolExecutor(1, "cmran-pack-read") as reader,
        ThreadPoolExecutor(1, "cmran-pack-write") as writer,
        ThreadPoolExecutor(1, "cmran-pack-sync") as syncer,
        Progress(rows * source.row_bytes, f"pack {source.path.name}", "B", enabled=progress) as bar,
    ):

        def read_block(start: int, buffer: NDArray[Any]) -> NDArray[Any]:
            stop = min(start + step, rows)
            block = source.read_block(start, stop, buffer)
            passed(start, stop)
            return block

        def read_on(buffer: NDArray[Any]) -> None:
            if starts:
                start = starts.popleft()
                reads.append((start, buffer, reader.submit(read_block, start, buffer)))

        for buffer in blocks:
            read_on(buffer)
        while reads:
            start, buffer, read = reads.popleft()
            block = read.result()
            for index, stored in enumerate(block):
                with np.errstate(over="ignore"):
                    np.copyto(values, stored, casting="unsafe")
                to_half(values, halves[index])
                if not _fits(values, halves[index]):
                    largest = np.abs(values).max()
                    raise _Refused(f"the largest value of row {start + index} is {largest:.6g}, not for float16")
                checks[start + index] = zlib.crc32(halves[index])
            read_on(buffer)
            if write is not None:
                write.result()
                # The disk writes while the next block is read: else all of it would wait for the end.
                if sync is None or sync.done():
                    if sync is not None:
                        sync.result()
                    sync = syncer.submit(_sync_data, descriptor)
            write = writer.submit(_write_all, descriptor, halves[: len(block)], HEADER_BYTES + start * row_bytes)
            halves, spare = spare, halves
            bar.update(len(block) * source.row_bytes)
        if write is not None:
            write.result()
        _write_all(descriptor, checks, HEADER_BYTES + rows * row_bytes)
        if sync is not None:
            sync.result()
    text = json.dumps(header | {"checks": zlib.crc32(checks.data)}).encode()
    digest = hashlib.blake2b(text, digest_size=16).digest()
    if not source.is_as_opened():
        # The fingerprint would vouch for other values.
        raise CmranError(f"{source.path} was changed while it was packed: pack again when nobody writes to it")
    head = MAGIC + len(text).to_bytes(4, "little") + digest + text
    if len(head) > HEADER_BYTES:
        raise _NoRoom(f"the path {source.path} is too long")
    # The rows reach the disk before the header that vouches for them.
    _sync_data(descriptor)
    _write_all(descriptor, np.frombuffer(head.ljust(HEADER_BYTES, b"\0"), np.uint8), 0)
    with optional():
        os.fsync(descriptor)


def _sync_data(descriptor: int) -> None:
    with optional():
        os.fdatasync(descriptor)


def _write_all(descriptor: int, values: NDArray[Any], offset: int) -> None:
    view = values.reshape(-1).view(np.uint8).data
    done = 0
    while done < len(view):
        done += os.pwrite(descriptor, view[done:], offset + done)


def _read_header(descriptor: int) -> dict[str, Any]:
    head = os.pread(descriptor, HEADER_BYTES, 0)
    start = len(MAGIC) + 4 + 16
    length = int.from_bytes(head[len(MAGIC) : len(MAGIC) + 4], "little")
    text = head[start : start + length]
    good = head.startswith(MAGIC) and len(text) == length
    if not good or hashlib.blake2b(text, digest_size=16).digest() != head[start - 16 : start]:
        raise PackError("its header is not one that was written")
    found: dict[str, Any] = json.loads(text)
    if missing := {"fingerprint", "source", "shape", "checks"} - found.keys():
        raise PackError(f"its header lacks {', '.join(sorted(missing))}")
    return found


def _find(path: Path, shape: tuple[int, ...]) -> Pack | None:
    """The pack under `path`; a damaged one is removed, loudly."""
    try:
        pack = Pack(path)
    except FileNotFoundError:
        return None
    except PackError as error:
        log.warning(_DAMAGED, path, error)
        with contextlib.suppress(OSError):
            path.unlink()
        return None
    if pack.shape != shape:
        pack.discard(f"its shape is {pack.shape}, expected {shape}")
        pack.close()
        return None
    return pack


def _is_refused(path: Path, source: StoredArray) -> bool:
    """Whether an earlier try told that the file cannot be packed, so that it is not read in vain each time."""
    refused = os.path.exists(path.with_suffix(".refused"))
    if refused:
        log.warning("%s holds values that float16 cannot: it is read as stored, which is slower", source.path)
    return refused


def _partial(path: Path) -> Path:
    return path.with_suffix(".partial")


@contextlib.contextmanager
def _making(path: Path) -> Iterator[int]:
    """Descriptor of an empty file beside `path`, ours alone; it is removed at the end, unless it was renamed.

    The lock is on the file itself: a maker that is killed lets go of it, and the next one takes the file over.
    """
    partial = _partial(path)
    while True:
        try:
            descriptor = os.open(partial, os.O_RDWR | os.O_CREAT, 0o666)
        except OSError as error:
            raise _unusable(f"cannot write {partial}", error) from error
        try:
            _lock_exclusive(descriptor, partial)
            with contextlib.suppress(FileNotFoundError):
                if os.stat(partial).st_ino == os.fstat(descriptor).st_ino:
                    break
        except BaseException:
            os.close(descriptor)
            raise
        # The maker that we waited for has renamed or removed it.
        os.close(descriptor)
    inode = os.fstat(descriptor).st_ino
    try:
        os.ftruncate(descriptor, 0)
        yield descriptor
    finally:
        with contextlib.suppress(FileNotFoundError):
            if os.stat(partial).st_ino == inode:
                partial.unlink()
        os.close(descriptor)


def _lock_exclusive(descriptor: int, path: Path) -> None:
    try:
        try:
            fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            log.info("another process makes %s: waiting for it", path.with_suffix(".pack").name)
            fcntl.flock(descriptor, fcntl.LOCK_EX)
    except OSError as error:
        with contextlib.suppress(OSError):
            path.unlink()
        raise _unusable(f"cannot lock {path}", error) from error


def _open_locked(path: Path) -> int:
    """Descriptor of `path` under a shared lock. Raises FileNotFoundError, PackError, CacheError."""
    while True:
        try:
            descriptor = os.open(path, os.O_RDONLY)
        except FileNotFoundError:
            raise
        except PermissionError as error:
            raise CacheError(
                f"cannot read {path}: {error.strerror}: ask its owner for it, or set XDG_CACHE_HOME to another folder"
            ) from error
        except OSError as error:
            raise PackError(f"it cannot be opened: {error.strerror}") from error
        # Who removes a pack holds the other lock, for a moment.
        try:
            fcntl.flock(descriptor, fcntl.LOCK_SH)
        except OSError as error:
            os.close(descriptor)
            raise _unusable(f"cannot lock {path}", error) from error
        with contextlib.suppress(FileNotFoundError):
            if os.stat(path).st_ino == os.fstat(descriptor).st_ino:
                return descriptor
        os.close(descriptor)


def _make_room(descriptor: int, size: int) -> None:
    """Claim `size` bytes for the file, after removing the least recently used packs where needed. Raises _NoRoom."""
    try:
        with file_lock(packs_dir() / ".lock"):
            _evict(size)
            # The size counts from now on for others that look for room.
            with optional():
                os.ftruncate(descriptor, size)
    except CmranError as error:
        raise CacheError(str(error)) from error


def _evict(need: int) -> list[PackInfo]:
    """Remove packs, the least recently used first, until `need` bytes more are within the limit and on the disk.

    Packs in use stay. Returns those that went. Raises _NoRoom where that is not enough, before any goes.
    """
    gone = []
    limit, folder = limit_bytes(), packs_dir()
    packs = [info for info in list_packs() if info.path.suffix != ".refused"]
    used = sum(info.size for info in packs)
    idle = [info for info in packs if info.state not in ("in use", "being made", "not ours")]
    # What is unfinished may hold less of the disk than its size says.
    on_disk = sum(info.size for info in idle if info.state != "unfinished")
    free = free_bytes(folder)
    _check_room(need, used - sum(info.size for info in idle), limit, None if free is None else free + on_disk)
    for info in reversed(packs):
        free = free_bytes(folder)
        if used + need <= limit and (free is None or free >= need):
            break
        if info.size and _remove(info.path):
            log.info("removed the pack %s (%s): room is needed", info.path.name, _gib(info.size))
            used -= info.size
            gone.append(info)
    # Another process may have begun to use one meanwhile.
    _check_room(need, used, limit, free_bytes(folder))
    return gone


def _check_room(need: int, used: int, limit: int, free: int | None) -> None:
    if need and used + need > limit:
        raise _NoRoom(
            f"its pack of {_gib(need)} and those in use ({_gib(used)}) pass the limit of {_gib(limit)}:"
            " raise it with `cmran cache --limit-gib`"
        )
    if free is not None and need > free:
        raise _NoRoom(f"its pack takes {_gib(need)}, {_gib(free)} can be had in {packs_dir()}")


def _remove(path: Path) -> bool:
    """Remove a pack or what is left of one; False where it is in use, or not ours to remove."""
    try:
        descriptor = _open_to_lock(path)
    except FileNotFoundError:
        return True
    except PermissionError:
        return False
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
        path.unlink(missing_ok=True)
    except OSError:
        return False
    finally:
        os.close(descriptor)
    return True


def _open_to_lock(path: Path) -> int:
    """Descriptor for an exclusive lock: NFS asks for one that may write, which another user's file may not be."""
    try:
        return os.open(path, os.O_RDWR)
    except OSError as error:
        if error.errno not in (errno.EACCES, errno.EPERM, errno.EROFS):
            raise
        return os.open(path, os.O_RDONLY)


def _info(path: Path) -> PackInfo:
    stat = path.stat()
    told = partial(
        PackInfo, path=path, fingerprint=path.name.partition(".")[0], size=stat.st_size, last_use=stat.st_mtime
    )
    source, state = "?", "unfinished"
    try:
        descriptor = _open_to_lock(path)
    except PermissionError:
        return told(source=source, state="not ours")
    try:
        try:
            fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
            busy = False
        except BlockingIOError:
            busy = True
        except OSError as error:
            if error.errno != errno.EBADF:
                raise _unusable(f"cannot lock {path}", error) from error
            # Another user's, on NFS.
            busy = True
        if path.suffix == ".refused":
            state = "refused"
            with contextlib.suppress(ValueError, KeyError, TypeError):
                source = str(json.loads(os.read(descriptor, 1 << 16))["source"])
        elif path.suffix == ".pack":
            try:
                source, state = str(_read_header(descriptor)["source"]), "in use" if busy else "ready"
            except PackError:
                state = "damaged"
        elif busy:
            state = "being made"
    finally:
        os.close(descriptor)
    return told(source=source, state=state)


def _gib(size: int) -> str:
    return f"{size / 2**30:.2f} GiB"
