"""The fingerprint of a data folder: 32 hex digits that depend on the content of its files only."""

import hashlib
import json
import os
import time
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

from cmran.data.layout import ANNOTATIONS, FILES
from cmran.errors import CacheError, CmranError, DataError
from cmran.utils.device import usable_cpus
from cmran.utils.files import cache_dir, cache_lock, go_without_cache, optional, what_is_at, write_json
from cmran.utils.progress import Progress

BLOCK_BYTES = 16 << 20
THREADS = 2
DIGEST_BYTES = 16
SETTLED_NS = 2_000_000_000
"""A file that changed less than this before it was read is not cached: another change could get the same time stamp."""
CACHE_FILES = 10_000


def folder_fingerprint(path: Path, *, files: Sequence[str] | None = None, progress: bool = True) -> str:
    """Compute 32 hex digits for the content of the known files in `path` (the ten HDF5 files and Annotations.txt).

    A changed, renamed, missing or added file changes the fingerprint. The path of the folder, time stamps and unknown
    files do not. The digest of each file is cached by path, size, time stamps and inode in
    `cache_dir()/fingerprints.json`.

    Args:
        path: The data folder.
        files: Names of the files to use instead of the known ones. Absent files are ignored.
        progress: Show a progress bar.

    Raises:
        DataError: `path` is not a folder, or a file cannot be read.
    """
    if (found := what_is_at(path)) != "a folder":
        raise DataError(f"{path}: found {found} there, expected a data folder")
    names = [spec.name for spec in FILES] + [ANNOTATIONS] if files is None else files
    present = [path / name for name in names if what_is_at(path / name) == "a file"]
    cache = _read_cache()
    digests: dict[str, str] = {}
    new: dict[str, dict[str, object]] = {}
    try:
        stats = {file: file.stat() for file in present}
        known = {file: cache.get(str(file.resolve())) for file in present}
        missing = [file for file in present if (known[file] or {}).get("stat") != _stat(stats[file])]
        with Progress(sum(stats[file].st_size for file in missing), "fingerprint", "B", enabled=progress) as bar:
            for file in present:
                if file not in missing:
                    digests[file.name] = str((known[file] or {})["digest"])
                    continue
                started_ns = time.time_ns()
                before = file.stat()
                digests[file.name] = _file_digest(file, before.st_size, bar)
                unchanged = _stat(before) == _stat(file.stat())
                if unchanged and started_ns - max(before.st_ctime_ns, before.st_mtime_ns) > SETTLED_NS:
                    new[str(file.resolve())] = {"stat": _stat(before), "digest": digests[file.name]}
    except OSError as error:
        raise DataError(
            f"cannot read {error.filename or path}: {error.strerror}", hint="check the file and its permissions"
        ) from error
    if new:
        _add_to_cache(new)
    whole = hashlib.blake2b(digest_size=DIGEST_BYTES)
    for name in sorted(digests):
        whole.update(f"{name}\0{digests[name]}\n".encode())
    return whole.hexdigest()


def _file_digest(path: Path, size: int, bar: Progress) -> str:
    """Return the digest of the digests of the file's blocks, which are hashed in parallel (this releases the GIL)."""
    descriptor = os.open(path, os.O_RDONLY)
    # The kernel then reads ahead more, in larger requests.
    with optional():
        os.posix_fadvise(descriptor, 0, 0, os.POSIX_FADV_SEQUENTIAL)

    def block(start: int) -> bytes:
        digest, end = hashlib.blake2b(digest_size=32), min(start + BLOCK_BYTES, size)
        while start < end and (data := os.pread(descriptor, end - start, start)):
            digest.update(data)
            start += len(data)
        return digest.digest()

    whole = hashlib.blake2b(digest_size=DIGEST_BYTES)
    whole.update(size.to_bytes(8, "little"))
    try:
        with ThreadPoolExecutor(min(THREADS, usable_cpus())) as pool:
            starts = range(0, size, BLOCK_BYTES)
            for start, digest in zip(starts, pool.map(block, starts), strict=True):
                whole.update(digest)
                bar.update(min(BLOCK_BYTES, size - start))
    finally:
        os.close(descriptor)
    return whole.hexdigest()


def _stat(stat: os.stat_result) -> list[int]:
    return [stat.st_size, stat.st_mtime_ns, stat.st_ctime_ns, stat.st_ino]


def _read_cache() -> dict[str, dict[str, object]]:
    """Return the cached entries; none if the cache is absent or damaged, because it can be rebuilt."""
    try:
        content = json.loads((cache_dir() / "fingerprints.json").read_text(encoding="utf-8"))
    except (OSError, CmranError, ValueError, RecursionError):
        return {}
    if not isinstance(content, dict):
        return {}
    return {
        name: entry
        for name, entry in content.items()
        if isinstance(entry, dict) and isinstance(entry.get("stat"), list) and isinstance(entry.get("digest"), str)
    }


def _add_to_cache(new: dict[str, dict[str, object]]) -> None:
    try:
        folder = cache_dir()
        with cache_lock("fingerprints.lock"):
            entries = _read_cache()
            for name, entry in new.items():
                # Removed first, so that the entry becomes the last; the oldest entries are dropped below.
                entries.pop(name, None)
                entries[name] = entry
            write_json(folder / "fingerprints.json", dict(list(entries.items())[-CACHE_FILES:]))
    except CacheError as error:
        go_without_cache(error)
    except CmranError as error:
        go_without_cache(CacheError(str(error), hint="or set XDG_CACHE_HOME to a writable folder"))
