"""Atomic writes, file locks and the cache folder.

Some file systems lack locks, `fsync` of a folder or other calls. Such a call is then skipped or replaced; only an
error that means lost data is raised.
"""

import contextlib
import errno
import fcntl
import hashlib
import json
import logging
import os
import shutil
import stat
import sys
import tempfile
from collections.abc import Callable, Iterator
from functools import cache
from pathlib import Path
from typing import Any, BinaryIO

from cmran.errors import BusyError, CacheError, StorageError

log = logging.getLogger(__name__)


NO_LOCKS = frozenset({errno.ENOLCK, errno.ENOSYS, errno.EOPNOTSUPP, errno.ENOTSUP, errno.EINVAL})
"""Errors of a lock call on a file system without locks: NFS without its daemon, Lustre without `-o flock`, FUSE."""


_UNSUPPORTED = NO_LOCKS | {
    *(errno.EBADF, errno.EACCES, errno.EPERM, errno.EROFS, errno.EISDIR, errno.ENOTTY, errno.ESPIPE),
}


_NAME_BYTES = 200
"""Bytes of a file's name that its temporary file repeats, so that the temporary name stays below 255 bytes."""


@contextlib.contextmanager
def optional() -> Iterator[None]:
    """Ignore the error of a call that the file system does not support, such as fsync of a folder or posix_fadvise.

    Errors that mean lost data (EIO, ENOSPC, EDQUOT, ...) are raised unchanged.
    """
    try:
        yield
    except OSError as error:
        if error.errno not in _UNSUPPORTED:
            raise


@contextlib.contextmanager
def atomic_write(path: Path) -> Iterator[BinaryIO]:
    """Open a temporary binary file that is synced and renamed to `path` when the block ends without an error.

    A symbolic link at `path` is kept, and the file that it points to is replaced. A device, a named pipe and this
    process's own output (`/dev/stdout`) are written directly; a file never replaces them.

    Args:
        path: The file to create or replace. Missing parent folders are created.

    Yields:
        The file to write to.

    Raises:
        StorageError: The folder cannot be written or the disk is full. An old file at `path` is unchanged.
    """
    temporary: Path | None = None
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        if (stream := _open_stream(path)) is not None:
            with stream:
                yield stream
            return
        target = Path(os.path.realpath(path)) if path.is_symlink() else path
        target.parent.mkdir(parents=True, exist_ok=True)
        prefix = os.fsencode(f".{target.name}")[:_NAME_BYTES].decode("utf-8", "ignore")
        descriptor, name = tempfile.mkstemp(prefix=f"{prefix}.", suffix=".tmp", dir=target.parent)
        temporary = Path(name)
        with os.fdopen(descriptor, "wb") as file:
            yield file
            file.flush()
            with optional():
                os.fsync(file.fileno())
        with optional():
            os.chmod(temporary, 0o666 & ~_umask())
        os.replace(temporary, target)
        temporary = None
        sync_folder(target.parent)
    except BrokenPipeError:
        # The command line handles a closed pipe on standard output itself.
        raise
    except OSError as error:
        raise StorageError(f"cannot write {path}: {error.strerror or error}", _write_hint(error)) from error
    finally:
        if temporary is not None:
            temporary.unlink(missing_ok=True)


def _open_stream(path: Path) -> BinaryIO | None:
    """Open a device, a pipe or our own output for writing; None if `path` is a regular file or does not exist."""
    try:
        found = path.stat()
    except FileNotFoundError:
        return None
    for output in (sys.stdout, sys.stderr):
        # Also if the output was redirected to a file: replacing that file would lose what is printed later.
        with contextlib.suppress(OSError, ValueError, AttributeError):
            if os.path.samestat(found, os.fstat(output.fileno())):
                output.flush()
                return os.fdopen(os.dup(output.fileno()), "wb")
    if stat.S_ISREG(found.st_mode):
        return None
    if stat.S_ISCHR(found.st_mode) or stat.S_ISFIFO(found.st_mode):
        return path.open("wb")
    if stat.S_ISDIR(found.st_mode):
        raise IsADirectoryError(errno.EISDIR, "it is a folder")
    raise OSError(errno.EINVAL, "it is a socket or a block device")


def _write_hint(error: OSError) -> str:
    match error.errno:
        case errno.ENOSPC | errno.EDQUOT | errno.EFBIG:
            return "free space or choose another folder"
        case errno.EACCES | errno.EPERM | errno.EROFS:
            return "grant write permission or choose another folder"
        case errno.ENAMETOOLONG:
            return "choose a shorter name"
        case errno.EBUSY | errno.ETXTBSY:
            return "close the program that has it open, or choose another name"
        case errno.EISDIR | errno.ENOTDIR | errno.EEXIST | errno.EINVAL | errno.ELOOP:
            return "choose another name"
    return "check the disk, or choose another folder"


def remove_unfinished(folder: Path, *names: str) -> None:
    """Remove the temporary files that killed processes left in `folder`, of files whose names begin with `names`.

    Call it only if no other process can be writing these files.
    """
    for name in names:
        for left in folder.glob(f".{name}*.tmp"):
            left.unlink(missing_ok=True)


def what_is_at(path: Path) -> str:
    """The kind of object at `path`: "a folder", "a file", "nothing", or a description of why it cannot be inspected."""
    try:
        return "a folder" if stat.S_ISDIR(path.stat().st_mode) else "a file"
    except (FileNotFoundError, NotADirectoryError):
        return "nothing"
    except OSError as error:
        return f"a path that cannot be followed ({error.strerror})"


def write_text(path: Path, text: str) -> None:
    """Write `text` as UTF-8, atomically."""
    with atomic_write(path) as file:
        file.write(text.encode("utf-8"))


def write_json(path: Path, value: Any) -> None:
    """Write `value` as indented JSON, atomically. Raises ValueError for NaN and infinities."""
    write_text(path, json.dumps(value, indent=2, allow_nan=False) + "\n")


def path_exists(path: Path) -> bool:
    """Whether anything exists at `path`, readable or not. Invalid files are reported when they are opened."""
    return what_is_at(path) != "nothing"


def sha256_file(path: Path) -> str:
    """Return the SHA-256 of the file at `path`, 64 hex digits."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def read_json(path: Path, hint: str, *keys: str) -> dict[str, Any]:
    """Read a JSON object that this project wrote.

    Args:
        path: The file.
        hint: What the user can do if the file is damaged.
        keys: Keys that the object must have.

    Raises:
        FileNotFoundError: The file does not exist.
        StorageError: The file cannot be read, is not a JSON object, or lacks one of `keys`.
    """
    try:
        value = json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise
    except OSError as error:
        raise StorageError(f"{path} cannot be read: {error.strerror}", hint) from error
    except (ValueError, RecursionError) as error:
        raise StorageError(f"{path} is damaged ({' '.join(str(error).split())})", hint) from None
    if not isinstance(value, dict):
        raise StorageError(f"{path} is damaged (not a JSON object)", hint)
    if missing := [key for key in keys if key not in value]:
        raise StorageError(f"{path} is damaged (it lacks {', '.join(missing)})", hint)
    return value


def lock_fault(path: Path, call: Callable[[int, int], None] | None = None) -> str | None:
    """The error of locking `path` if its file system has no locks; None if it has locks, or if that is unknown.

    Args:
        path: An existing file.
        call: `fcntl.flock` (the default), which HDF5 and this project use, or `fcntl.lockf`, which SQLite uses.
    """
    try:
        descriptor = os.open(path, os.O_RDONLY)
    except OSError:
        return None
    try:
        (call or fcntl.flock)(descriptor, fcntl.LOCK_SH | fcntl.LOCK_NB)
    except OSError as error:
        return os.strerror(error.errno) if error.errno in NO_LOCKS else None
    finally:
        os.close(descriptor)
    return None


@contextlib.contextmanager
def file_lock(
    path: Path, *, busy: str | None = None, waiting: str | None = None, required: str | None = None
) -> Iterator[None]:
    """Hold an exclusive lock on the file `path`, which is created if missing.

    The system releases the lock if the process is killed. If the file system has no locks, a lock in the temporary
    folder takes its place, which excludes only the processes of this machine. That is logged, with `busy` as a warning,
    because a second command on another machine is then not detected.

    Args:
        path: The lock file.
        busy: Raise BusyError with this message if another process holds the lock. By default, wait for it.
        waiting: Log this message before waiting for another process.
        required: Refuse a file system without locks, with this hint.

    Raises:
        BusyError: Another process holds the lock, and `busy` is given.
        StorageError: The file cannot be created or locked, or its file system has no locks and `required` is given.
    """
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        file = path.open("a")
    except OSError as error:
        raise StorageError(f"cannot write {path}: {error.strerror or error}", _write_hint(error)) from error
    with file:
        if required is not None and (fault := lock_fault(path) or lock_fault(path, fcntl.lockf)):
            raise StorageError(f"{path.parent}: found a file system without locks ({fault}), expected one", required)
        local: contextlib.AbstractContextManager[None] = contextlib.nullcontext()
        try:
            _lock(file.fileno(), path, busy, waiting)
        except OSError as error:
            if error.errno not in NO_LOCKS:
                raise StorageError(f"cannot lock {path}: {error.strerror}", "choose another folder") from error
            local = _local_lock(path, os.path.realpath(path), os.strerror(error.errno), busy)
        with local:
            yield


@contextlib.contextmanager
def cache_lock(name: str, waiting: str | None = None) -> Iterator[None]:
    """Hold an exclusive lock for work that only one process of this machine may do at a time.

    The lock is the file `name` in the cache folder or, if that cannot be used, in the temporary folder. If neither can
    be used, the block runs without a lock.

    Args:
        name: The file name of the lock.
        waiting: Log this message before waiting for another process.
    """
    try:
        path = cache_dir() / "locks" / name
        path.parent.mkdir(exist_ok=True)
        path.open("a").close()
    except (OSError, CacheError) as error:
        with _local_lock(Path("locks of the cache", name), name, str(error), None):
            yield
    else:
        with file_lock(path, waiting=waiting):
            yield


def _lock(descriptor: int, path: Path, busy: str | None, waiting: str | None = None) -> None:
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        if busy is not None:
            raise BusyError(busy) from None
        if waiting is not None:
            log.info("%s", waiting)
        fcntl.flock(descriptor, fcntl.LOCK_EX)


@contextlib.contextmanager
def _local_lock(path: Path, key: str, reason: str, busy: str | None) -> Iterator[None]:
    """Hold a lock in the temporary folder instead of the one on `path`; run without one if that fails, too."""
    with contextlib.ExitStack() as stack:
        detected = "are not detected"
        with contextlib.suppress(OSError):
            folder = Path(tempfile.gettempdir()) / f"cmran-locks-{os.getuid()}"
            folder.mkdir(mode=0o700, exist_ok=True)
            # Everybody can write to the temporary folder: another user may have created this one.
            if folder.lstat().st_uid == os.getuid() and not folder.is_symlink():
                name = hashlib.sha256(os.fsencode(key)).hexdigest()[:32]
                file = stack.enter_context((folder / name).open("a"))
                _lock(file.fileno(), path, busy)
                detected = "are detected only if they run on this machine"
        if busy is None:
            log_once(logging.INFO, f"{path.parent} cannot be locked ({reason}): two commands at once {detected}")
        else:
            log_once(
                logging.WARNING,
                f"{path.parent}: its file system has no locks ({reason}): two commands in this folder at once"
                f" {detected}: start only one, or choose a folder on another disk",
            )
        yield


@cache
def log_once(level: int, message: str) -> None:
    """Log `message` once per process."""
    log.log(level, "%s", message)


def cache_dir() -> Path:
    """The cache folder, $XDG_CACHE_HOME/cmran or ~/.cache/cmran; created if missing.

    Raises:
        CacheError: There is no home folder, or the cache folder cannot be created.
    """
    folder = _cache_path()
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise CacheError(
            f"cannot create the cache folder {folder}: {error.strerror}", "set XDG_CACHE_HOME to a writable folder"
        ) from error
    return folder


def _cache_path() -> Path:
    base = os.environ.get("XDG_CACHE_HOME")
    try:
        return (Path(base) if base else Path.home() / ".cache") / "cmran"
    except RuntimeError as error:
        raise CacheError("there is no home folder for the cache", "set XDG_CACHE_HOME to a writable folder") from error


_without_cache: set[Path | None] = set()


def go_without_cache(error: CacheError) -> None:
    """Log, once per process and cache folder, that the cache cannot be used."""
    folder: Path | None = None
    with contextlib.suppress(CacheError):
        folder = _cache_path()
    if folder not in _without_cache:
        _without_cache.add(folder)
        log.warning("%s; until then data are read or computed again instead of cached, which is slower", error)


def ensure_home() -> None:
    """Set HOME for this process and its children if the user has no home folder: neither HOME nor a passwd entry.

    Containers often run under such a user id. MLflow and Prefect cannot be imported without a home folder.

    Raises:
        StorageError: A temporary home folder cannot be created.
    """
    with contextlib.suppress(RuntimeError):
        Path.home()
        return
    os.environ["HOME"] = str(temporary_home())
    log.info(
        "user id %d has no home folder (HOME is not set, no passwd entry): using %s", os.getuid(), os.environ["HOME"]
    )


def temporary_home() -> Path:
    """A private folder of this user id in the temporary folder; created if missing, and reused by later commands.

    Raises:
        StorageError: The folder cannot be created.
    """
    user = os.getuid()
    folder = Path(tempfile.gettempdir()) / f"cmran-home-{user}"
    try:
        folder.mkdir(mode=0o700, exist_ok=True)
        found = folder.lstat()
        # Another user may have created it, to read or change its content.
        if not stat.S_ISDIR(found.st_mode) or found.st_uid != user or found.st_mode & 0o022:
            folder = Path(tempfile.mkdtemp(prefix="cmran-home-"))
    except OSError as error:
        raise StorageError(
            f"user id {user} has no home folder, and {folder} cannot be created ({error.strerror})",
            "set HOME to a writable folder",
        ) from error
    return folder


def _umask() -> int:
    # The mask cannot be read without setting it.
    mask = os.umask(0o022)
    os.umask(mask)
    return mask


def free_bytes(folder: Path) -> int | None:
    """Free bytes on the disk of `folder`; None if its file system does not report them."""
    try:
        usage = shutil.disk_usage(folder)
    except OSError as error:
        if error.errno not in _UNSUPPORTED:
            raise
        return None
    # Some FUSE file systems report a disk of size zero.
    return usage.free if usage.free or usage.total else None


def sync_folder(folder: Path) -> None:
    """Sync the directory entries of `folder`, so that a rename survives a power failure."""
    with optional():
        descriptor = os.open(folder, os.O_RDONLY)
        try:
            os.fsync(descriptor)
        finally:
            os.close(descriptor)
