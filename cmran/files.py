"""Files that are whole or not there: atomic writes, locks, the cache folder."""

import contextlib
import fcntl
import json
import os
import stat
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any, BinaryIO

from cmran.errors import UserError


@contextlib.contextmanager
def atomic_write(path: Path) -> Iterator[BinaryIO]:
    """A binary file that takes the name `path` only when the block ends without an error, synced to disk.

    Raises UserError where the folder cannot be written or the disk is full; the old file then stands untouched.
    """
    temporary: Path | None = None
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        descriptor, name = tempfile.mkstemp(prefix=f".{path.name}.", suffix=".tmp", dir=path.parent)
        temporary = Path(name)
        with os.fdopen(descriptor, "wb") as file:
            yield file
            file.flush()
            os.fsync(file.fileno())
        os.chmod(temporary, 0o666 & ~_umask())
        os.replace(temporary, path)
        temporary = None
        sync_folder(path.parent)
    except OSError as error:
        raise UserError(
            f"cannot write {path}: {error.strerror or error}: free space or choose another folder"
        ) from error
    finally:
        if temporary is not None:
            temporary.unlink(missing_ok=True)


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


def is_there(path: Path) -> bool:
    """Whether there is anything, readable or not: what is no good is told of when it is opened."""
    return what_is_at(path) != "nothing"


def read_json(path: Path, advice: str, *keys: str) -> dict[str, Any]:
    """The JSON object in a file of ours. Raises UserError with `advice` where it is damaged or lacks one of `keys`.

    Raises FileNotFoundError where there is none.
    """
    try:
        value = json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise
    except OSError as error:
        raise UserError(f"{path} cannot be read: {error.strerror}: {advice}") from error
    except (ValueError, RecursionError) as error:
        raise UserError(f"{path} is damaged ({' '.join(str(error).split())}): {advice}") from None
    if not isinstance(value, dict):
        raise UserError(f"{path} is damaged (no JSON object): {advice}")
    if lacking := [key for key in keys if key not in value]:
        raise UserError(f"{path} is damaged (it lacks {', '.join(lacking)}): {advice}")
    return value


@contextlib.contextmanager
def file_lock(path: Path, *, busy: str | None = None) -> Iterator[None]:
    """Hold an exclusive lock on `path` (made if missing) among the processes of this machine.

    Waits for another holder, or, with `busy`, raises UserError of that text at once. A killed holder frees it.
    """
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        file = path.open("a")
    except OSError as error:
        raise UserError(f"cannot write {path}: {error.strerror or error}: choose another folder") from error
    with file:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | (fcntl.LOCK_NB if busy is not None else 0))
        except BlockingIOError:
            raise UserError(busy or f"{path} is locked") from None
        yield


def cache_dir() -> Path:
    """The folder for what can be made again: $XDG_CACHE_HOME/cmran or ~/.cache/cmran; made if missing."""
    base = os.environ.get("XDG_CACHE_HOME")
    try:
        folder = (Path(base) if base else Path.home() / ".cache") / "cmran"
    except RuntimeError as error:
        raise UserError("there is no home folder for the cache: set XDG_CACHE_HOME to a writable folder") from error
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise UserError(
            f"cannot make the cache folder {folder}: {error.strerror}: set XDG_CACHE_HOME to a writable folder"
        ) from error
    return folder


def _umask() -> int:
    # There is no call that reads the mask alone.
    mask = os.umask(0o022)
    os.umask(mask)
    return mask


def sync_folder(folder: Path) -> None:
    """Make sure that a name given or taken in `folder` survives a power cut."""
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
