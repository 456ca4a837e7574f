"""Write the files of a synthetic folder. The folder gets its name only when it is complete."""

import contextlib
import errno
import fcntl
import glob
import logging
import math
import os
import shutil
import threading
import uuid
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor, as_completed
from dataclasses import dataclass
from pathlib import Path
from typing import Any, BinaryIO

import h5py
import numpy as np
from numpy.typing import NDArray

from cmran.data.hdf5 import open_hdf5
from cmran.data.layout import FileSpec
from cmran.data.synthetic.task import Event, World, generate_features
from cmran.errors import StorageError
from cmran.utils.files import free_bytes, log_once, optional, what_is_at
from cmran.utils.progress import Progress

_ROWS_PER_TASK = 16
_SYNC_BYTES = 256 * 2**20
_LOCK = ".being-written"


@dataclass(frozen=True)
class FeatureFiles:
    """A visual and an audio feature file with the same rows."""

    visual: FileSpec
    audio: FileSpec
    events: Sequence[Event | None]
    """The event of each row; None for a background video."""
    stream: int
    """Kind of the random streams of these rows."""


def write_features(
    folder: Path,
    files: FeatureFiles,
    shapes: dict[FileSpec, tuple[int, ...]],
    dtype: np.dtype[Any],
    world: World,
    seed: int,
    threads: int,
    bar: Progress,
) -> None:
    """Generate and write both files row by row in several threads, each row at its offset."""
    stop = threading.Event()
    paths = {spec: folder / spec.name for spec in (files.visual, files.audio)}
    offsets = {spec: _create(path, spec, shapes[spec], dtype) for spec, path in paths.items()}
    with paths[files.visual].open("r+b") as visual_file, paths[files.audio].open("r+b") as audio_file:

        def generate(rows: range) -> int:
            visual, audio = (np.empty(shapes[spec][1:], np.float32) for spec in (files.visual, files.audio))
            for row in rows:
                if stop.is_set():
                    break
                rng = np.random.default_rng([seed, files.stream, row])
                generate_features(rng, world, files.events[row], visual, audio)
                for file, spec, array in ((visual_file, files.visual, visual), (audio_file, files.audio, audio)):
                    stored = np.ascontiguousarray(array, dtype)
                    _write_at(file, stored, offsets[spec] + row * stored.nbytes)
            return len(rows)

        pool = ThreadPoolExecutor(threads, "synth")
        try:
            tasks = (
                range(a, min(a + _ROWS_PER_TASK, len(files.events)))
                for a in range(0, len(files.events), _ROWS_PER_TASK)
            )
            unsynced, row_bytes = 0, math.prod(shapes[files.visual][1:]) * dtype.itemsize
            for done in as_completed([pool.submit(generate, rows) for rows in tasks]):
                bar.update(done.result())
                # Regular syncs keep the progress accurate; otherwise the last sync takes as long as all the rest.
                unsynced += done.result() * row_bytes
                if unsynced >= _SYNC_BYTES:
                    with optional():
                        os.fdatasync(visual_file.fileno())
                    unsynced = 0
        finally:
            stop.set()
            pool.shutdown(wait=True, cancel_futures=True)
        for file in (visual_file, audio_file):
            with optional():
                os.fsync(file.fileno())


def _write_at(file: BinaryIO, array: NDArray[Any], offset: int) -> None:
    view = array.data.cast("B")
    while view:
        written = os.pwrite(file.fileno(), view, offset)
        view, offset = view[written:], offset + written


def write_array(folder: Path, spec: FileSpec, array: NDArray[Any]) -> None:
    """Write one label or order file."""
    stored = np.ascontiguousarray(array, np.dtype(spec.dtype).newbyteorder("<"))
    path = folder / spec.name
    offset = _create(path, spec, stored.shape, stored.dtype)
    with path.open("r+b") as file:
        _write_at(file, stored, offset)
        with optional():
            os.fsync(file.fileno())


def _create(path: Path, spec: FileSpec, shape: tuple[int, ...], dtype: np.dtype[Any]) -> int:
    """Create the HDF5 file of `spec` with allocated data, and return the byte offset of the data.

    The dataset is contiguous and uncompressed, as published, so that several threads can write it without HDF5, whose
    lock would serialize them.
    """
    with open_hdf5(path, "w") as file:
        properties = h5py.h5p.create(h5py.h5p.DATASET_CREATE)
        properties.set_layout(h5py.h5d.CONTIGUOUS)
        properties.set_alloc_time(h5py.h5d.ALLOC_TIME_EARLY)
        properties.set_fill_time(h5py.h5d.FILL_TIME_NEVER)
        # A creation time in the file would give each copy another fingerprint.
        properties.set_obj_track_times(False)
        space = h5py.h5s.create_simple(shape)
        dataset = h5py.h5d.create(file.id, spec.key.encode(), h5py.h5t.py_create(dtype), space, properties)
        return int(dataset.get_offset())


def check_target(out: Path) -> None:
    """Check that `out` is a new or empty folder."""
    if out.is_symlink() or os.path.ismount(out):
        raise StorageError(f"{out} is a link or a mount point", hint="use the folder itself or a folder in it")
    if (found := what_is_at(out)) == "nothing":
        return
    if found == "a folder":
        try:
            if not any(out.iterdir()):
                return
        except OSError as error:
            raise StorageError(f"{out} cannot be read: {error.strerror}", hint="choose another name") from error
    state = {"a folder": "already contains files", "a file": "is not a folder"}.get(found, f"is {found}")
    raise StorageError(f"{out} {state}, expected a new or empty folder", hint="choose another name or remove it")


def check_space(out: Path, needed: int) -> None:
    """Check that the disk of `out` has `needed` bytes of free space."""
    existing = next(parent for parent in out.parents if parent.exists())
    free = free_bytes(existing)
    if free is not None and needed > free:
        raise StorageError(
            f"{existing}: {needed / 2**30:.2f} GiB needed for {out.name}, {free / 2**30:.2f} GiB free",
            hint="free disk space, reduce `videos`, or set `dtype` to float16",
        )


@contextlib.contextmanager
def partial_folder(out: Path) -> Iterator[Path]:
    """Create a folder beside `out`; it is renamed to `out` if the block succeeds, and removed otherwise."""
    try:
        out.parent.mkdir(parents=True, exist_ok=True)
        _remove_interrupted(out)
        folder = out.parent / f"{out.name}.partial-{uuid.uuid4().hex[:8]}"
        folder.mkdir()
    except OSError as error:
        raise StorageError(
            f"cannot create a folder beside {out}: {error.strerror or error}", hint="choose another folder"
        ) from error
    try:
        # Locked while this process lives, so that another one can detect and remove the folder of a killed process.
        with (folder / _LOCK).open("w") as lock:
            with optional():
                fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
            yield folder
            (folder / _LOCK).unlink()
            os.rename(folder, out)
    except OSError as error:
        if error.errno in (errno.ENOTEMPTY, errno.EEXIST, errno.ENOTDIR):
            raise StorageError(
                f"{out} was created by another process in the meantime", hint="choose another name or remove it"
            ) from error
        raise StorageError(
            f"cannot write {out}: {error.strerror or error}", hint="free disk space or choose another folder"
        ) from error
    finally:
        shutil.rmtree(folder, ignore_errors=True)


def _remove_interrupted(out: Path) -> None:
    """Remove partial folders of `out` that killed processes left: those that no process has locked.

    On a file system without locks they stay, because their process may be alive.
    """
    for lock_path in out.parent.glob(f"{glob.escape(out.name)}.partial-*/{_LOCK}"):
        with lock_path.open("r+") as lock:
            try:
                fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except BlockingIOError:
                continue
            except OSError as error:
                log_once(logging.INFO, f"{lock_path.parent} is not removed: it cannot be locked ({error.strerror})")
                continue
            shutil.rmtree(lock_path.parent, ignore_errors=True)
