"""Files that are whole or not there: atomic writes, locks, the cache folder. What a file system lacks is no failure."""

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

from cmran.errors import BusyError, CacheError, CmranError

log = logging.getLogger(__name__)


NO_LOCKS = frozenset({errno.ENOLCK, errno.ENOSYS, errno.EOPNOTSUPP, errno.ENOTSUP, errno.EINVAL})
"""What a lock call returns where the file system has none: NFS without its daemon, Lustre without -o flock, FUSE."""


_NOT_OFFERED = NO_LOCKS | {
    *(errno.EBADF, errno.EACCES, errno.EPERM, errno.EROFS, errno.EISDIR, errno.ENOTTY, errno.ESPIPE),
}


_NAME_BYTES = 200
"""Of a file's name, in the name of its temporary file: with the rest of that it stays below 255 bytes."""


@contextlib.contextmanager
def optional() -> Iterator[None]:
    """For a call that helps, but that a file system need not offer, such as fsync of a folder or posix_fadvise.

    Ignores the errors that say so. Errors that mean lost data (EIO, ENOSPC, EDQUOT, ...) are raised as they are.
    """
    try:
        yield
    except OSError as error:
        if error.errno not in _NOT_OFFERED:
            raise


@contextlib.contextmanager
def atomic_write(path: Path) -> Iterator[BinaryIO]:
    """A binary file that takes the name `path` only when the block ends without an error, synced to disk.

    A symbolic link at `path` stays, and the file that it names is replaced. What is written to a device, a named pipe
    or this process's own output (`/dev/stdout`) goes there directly: none of these is replaced by a file.

    Raises CmranError where the folder cannot be written or the disk is full; the old file then stands untouched.
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
        # The reader of our output left, which ends a command in its own way.
        raise
    except OSError as error:
        raise CmranError(f"cannot write {path}: {error.strerror or error}: {_write_advice(error)}") from error
    finally:
        if temporary is not None:
            temporary.unlink(missing_ok=True)


def _open_stream(path: Path) -> BinaryIO | None:
    """What cannot be replaced by a file, open for writing; None for a regular file and where there is nothing."""
    try:
        found = path.stat()
    except FileNotFoundError:
        return None
    for output in (sys.stdout, sys.stderr):
        # Also where it was redirected to a file, which the shell and we would otherwise write over one another.
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


def _write_advice(error: OSError) -> str:
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
    return "look at the disk, or choose another folder"


def remove_unfinished(folder: Path, *names: str) -> None:
    """Remove what killed processes have left in `folder` of files whose names begin with one of `names`.

    Only for one who alone writes such files there.
    """
    for name in names:
        for left in folder.glob(f".{name}*.tmp"):
            left.unlink(missing_ok=True)


def what_is_at(path: Path) -> str:
    """What there is: "a folder", "a file", "nothing", or words that say why it cannot be told."""
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
    """Write `value` as indented JSON, atomically. NaN and infinities are refused with ValueError."""
    write_text(path, json.dumps(value, indent=2, allow_nan=False) + "\n")


def path_exists(path: Path) -> bool:
    """Whether there is anything, readable or not: what is no good is told of when it is opened."""
    return what_is_at(path) != "nothing"


def sha256_file(path: Path) -> str:
    """Return the SHA-256 of the file at `path`, 64 hex digits."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def read_json(path: Path, advice: str, *keys: str) -> dict[str, Any]:
    """The JSON object in a file of ours. Raises CmranError with `advice` where it is damaged or lacks one of `keys`.

    Raises FileNotFoundError where there is none.
    """
    try:
        value = json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise
    except OSError as error:
        raise CmranError(f"{path} cannot be read: {error.strerror}: {advice}") from error
    except (ValueError, RecursionError) as error:
        raise CmranError(f"{path} is damaged ({' '.join(str(error).split())}): {advice}") from None
    if not isinstance(value, dict):
        raise CmranError(f"{path} is damaged (no JSON object): {advice}")
    if lacking := [key for key in keys if key not in value]:
        raise CmranError(f"{path} is damaged (it lacks {', '.join(lacking)}): {advice}")
    return value


def lock_fault(path: Path, call: Callable[[int, int], None] | None = None) -> str | None:
    """Why the file at `path` cannot be locked: its file system has no locks. None where it has, or is not known.

    `call`: `fcntl.flock` (the default), as HDF5 and we use it, or `fcntl.lockf`, as SQLite does.
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
def file_lock(path: Path, *, busy: str | None = None, required: str | None = None) -> Iterator[None]:
    """Hold an exclusive lock on `path` (created if missing) among all processes that can lock it.

    Waits for another holder, or, with `busy`, raises BusyError of that text at once. A killed holder frees it.

    Where the file system has no locks, the processes of this machine still exclude each other, by a lock in the
    temporary folder. That is logged: with `busy` as a warning, since a second command on another machine is no longer
    detected. With `required` (what to do instead) it is refused with CmranError.
    """
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        file = path.open("a")
    except OSError as error:
        raise CmranError(f"cannot write {path}: {error.strerror or error}: {_write_advice(error)}") from error
    with file:
        if required is not None and (fault := lock_fault(path) or lock_fault(path, fcntl.lockf)):
            raise CmranError(f"{path.parent}: found a file system without locks ({fault}), expected one: {required}")
        held: contextlib.AbstractContextManager[None] = contextlib.nullcontext()
        try:
            _lock(file.fileno(), path, busy)
        except OSError as error:
            if error.errno not in NO_LOCKS:
                raise CmranError(f"cannot lock {path}: {error.strerror}: choose another folder") from error
            held = _local_lock(path, os.path.realpath(path), os.strerror(error.errno), busy)
        with held:
            yield


@contextlib.contextmanager
def cache_lock(name: str) -> Iterator[None]:
    """As `file_lock` on a file of that name in the cache; where there is no cache, on one in the temporary folder.

    For what must not happen twice at once on this machine. Where there is no temporary folder either, it goes without.
    """
    try:
        path = cache_dir() / "locks" / name
        path.parent.mkdir(exist_ok=True)
        path.open("a").close()
    except (OSError, CacheError) as error:
        with _local_lock(Path("locks of the cache", name), name, str(error), None):
            yield
    else:
        with file_lock(path):
            yield


def _lock(descriptor: int, path: Path, busy: str | None) -> None:
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX | (fcntl.LOCK_NB if busy is not None else 0))
    except BlockingIOError:
        raise BusyError(busy or f"{path} is locked") from None


@contextlib.contextmanager
def _local_lock(path: Path, key: str, reason: str, busy: str | None) -> Iterator[None]:
    """Hold a lock in the temporary folder that stands for that on `path`; go without where there is none either."""
    with contextlib.ExitStack() as stack:
        detected = "are not detected"
        with contextlib.suppress(OSError):
            folder = Path(tempfile.gettempdir()) / f"cmran-locks-{os.getuid()}"
            folder.mkdir(mode=0o700, exist_ok=True)
            # In a folder that all may write, another user may have made it.
            if folder.lstat().st_uid == os.getuid() and not folder.is_symlink():
                name = hashlib.sha256(os.fsencode(key)).hexdigest()[:32]
                file = stack.enter_context((folder / name).open("a"))
                _lock(file.fileno(), path, busy)
                detected = "are detected on this machine alone"
        if busy is None:
            log_once(logging.INFO, f"{path.parent}: cannot be locked ({reason}): two commands at once {detected}")
        else:
            log_once(
                logging.WARNING,
                f"{path.parent}: its file system has no locks ({reason}): two commands at work there at once"
                f" {detected}: start only one, or choose a folder on another disk",
            )
        yield


@cache
def log_once(level: int, message: str) -> None:
    """Log `message` when it is first said in this process."""
    log.log(level, "%s", message)


def cache_dir() -> Path:
    """The folder for what can be computed again: $XDG_CACHE_HOME/cmran or ~/.cache/cmran; created if missing.

    Raises CacheError where there is no home folder, or the folder cannot be created.
    """
    folder = _cache_path()
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise CacheError(
            f"cannot create the cache folder {folder}: {error.strerror}: set XDG_CACHE_HOME to a writable folder"
        ) from error
    return folder


def _cache_path() -> Path:
    base = os.environ.get("XDG_CACHE_HOME")
    try:
        return (Path(base) if base else Path.home() / ".cache") / "cmran"
    except RuntimeError as error:
        raise CacheError("there is no home folder for the cache: set XDG_CACHE_HOME to a writable folder") from error


_without_cache: set[Path | None] = set()


def go_without_cache(error: CmranError) -> None:
    """Log, once a process and cache folder, that the cache cannot be used: what needs it goes on without."""
    folder: Path | None = None
    with contextlib.suppress(CacheError):
        folder = _cache_path()
    if folder not in _without_cache:
        _without_cache.add(folder)
        log.warning(
            "%s; until then what belongs there is not cached but read or computed again, which is slower", error
        )


def ensure_home() -> None:
    """Give this process and its children a home folder where it has none: neither HOME nor a passwd entry.

    Containers often run under such a user id. MLflow and Prefect cannot even be imported without a home folder.
    Raises CmranError where none can be made.
    """
    with contextlib.suppress(RuntimeError):
        Path.home()
        return
    os.environ["HOME"] = str(temporary_home())
    log.info(
        "user id %d has no home folder (HOME is not set, no passwd entry): using %s", os.getuid(), os.environ["HOME"]
    )


def temporary_home() -> Path:
    """A folder of this user id alone in the temporary folder, the same for the next command; made if missing."""
    user = os.getuid()
    folder = Path(tempfile.gettempdir()) / f"cmran-home-{user}"
    try:
        folder.mkdir(mode=0o700, exist_ok=True)
        found = folder.lstat()
        # Somebody else may have made it, to read or change what is put there.
        if not stat.S_ISDIR(found.st_mode) or found.st_uid != user or found.st_mode & 0o022:
            folder = Path(tempfile.mkdtemp(prefix="cmran-home-"))
    except OSError as error:
        raise CmranError(
            f"user id {user} has no home folder, and {folder} cannot be made ({error.strerror}): "
            "set HOME to a folder that can be written"
        ) from error
    return folder


def _umask() -> int:
    # There is no call that reads the mask alone.
    mask = os.umask(0o022)
    os.umask(mask)
    return mask


def free_bytes(folder: Path) -> int | None:
    """Free space of the disk under `folder`; None where its file system does not report it."""
    try:
        usage = shutil.disk_usage(folder)
    except OSError as error:
        if error.errno not in _NOT_OFFERED:
            raise
        return None
    # Some file systems in user space report a disk of no size.
    return usage.free if usage.free or usage.total else None


def sync_folder(folder: Path) -> None:
    """Make sure that a name given or taken in `folder` survives a power cut, where its file system can do that."""
    with optional():
        descriptor = os.open(folder, os.O_RDONLY)
        try:
            os.fsync(descriptor)
        finally:
            os.close(descriptor)
