"""Atomic writes, locks and the cache folder, also on file systems without some of the calls they use."""

import contextlib
import errno
import fcntl
import logging
import os
import subprocess
import sys
import tempfile
import threading
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from cmran.errors import CmranError
from cmran.utils import files
from cmran.utils.files import atomic_write, cache_lock, file_lock, free_bytes, optional, write_text
from tests.conftest import ROOT
from tests.filesystems import lacking

NO_LOCKS = [errno.ENOLCK, errno.ENOSYS, errno.EOPNOTSUPP, errno.EINVAL]


@pytest.fixture(autouse=True)
def temporary(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A private temporary folder."""
    folder = tmp_path / "temporary"
    folder.mkdir()
    monkeypatch.setattr(tempfile, "tempdir", str(folder))
    return folder


@pytest.fixture
def without_locks(monkeypatch: pytest.MonkeyPatch) -> Callable[..., None]:
    """Make `flock` fail with `number` in folders with these names."""

    def use(number: int, *names: str) -> None:
        real = fcntl.flock

        def flock(file: Any, operation: int) -> None:
            descriptor = file if isinstance(file, int) else file.fileno()
            path = os.readlink(f"/proc/self/fd/{descriptor}")
            if any(f"/{name}" in path for name in names):
                raise OSError(number, os.strerror(number))
            real(file, operation)

        monkeypatch.setattr(fcntl, "flock", flock)

    return use


@pytest.mark.parametrize("number", [errno.EINVAL, errno.EACCES, errno.ENOTSUP, errno.EBADF, errno.EPERM])
@pytest.mark.parametrize("calls", ["syncfolder", "chmod", "utime", "fadvise", "preadv2"])
def test_missing_optional_call_is_ignored(tmp_path: Path, calls: str, number: int) -> None:
    path = tmp_path / "lacking" / "a.txt"
    code = "import sys, pathlib; from cmran.utils.files import write_text as w; w(pathlib.Path(sys.argv[1]), 'x')"
    done = lacking("-c", code, path, calls=calls, number=number)
    assert (done.returncode, done.stderr) == (0, "")
    assert path.read_text() == "x"
    assert os.listdir(path.parent) == ["a.txt"]


@pytest.mark.parametrize(("number", "lost"), [(errno.EINVAL, False), (errno.ENOSYS, False), (errno.EIO, True)])
@pytest.mark.parametrize("calls", ["sync", "syncfolder"])
def test_failed_sync_is_an_error_only_if_data_may_be_lost(tmp_path: Path, calls: str, number: int, lost: bool) -> None:
    path = tmp_path / "lacking" / "a.txt"
    path.parent.mkdir()
    path.write_text("old")
    code = "import sys, pathlib; from cmran.utils.files import write_text as w; w(pathlib.Path(sys.argv[1]), 'x')"
    done = lacking("-c", code, path, calls=calls, number=number)
    assert (done.returncode != 0) == lost
    assert ("cannot write" in done.stderr) == lost
    if not lost or calls == "sync":
        assert path.read_text() == ("old" if lost else "x")
    assert os.listdir(path.parent) == ["a.txt"]


def test_optional_raises_errors_of_lost_data_and_missing_files() -> None:
    for number in (errno.EIO, errno.ENOSPC, errno.EDQUOT, errno.ENOENT, errno.ESTALE):
        with pytest.raises(OSError, match=os.strerror(number)), optional():
            raise OSError(number, os.strerror(number))


def test_free_bytes_without_disk_usage(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    assert (free_bytes(tmp_path) or 0) > 0

    def refused(_: Any) -> None:
        raise OSError(errno.ENOSYS, "")

    monkeypatch.setattr(files.shutil, "disk_usage", refused)
    assert free_bytes(tmp_path) is None


@pytest.mark.parametrize("there", [True, False])
def test_symbolic_link_is_kept_and_its_target_replaced(tmp_path: Path, there: bool) -> None:
    (tmp_path / "b").mkdir()
    target, link = tmp_path / "b" / "target.json", tmp_path / "link.json"
    if there:
        target.write_text("old")
    link.symlink_to(Path("b", "target.json"))
    write_text(link, "new")
    assert link.is_symlink()
    assert target.read_text() == "new"
    assert os.listdir(target.parent) == ["target.json"]


def test_cyclic_symbolic_links_are_reported(tmp_path: Path) -> None:
    (tmp_path / "a").symlink_to(tmp_path / "b")
    (tmp_path / "b").symlink_to(tmp_path / "a")
    with pytest.raises(CmranError, match=r"cannot write .*/a: .*symbolic links: choose another name"):
        write_text(tmp_path / "a", "x")
    assert (tmp_path / "a").is_symlink()


def test_device_and_pipe_are_written_and_kept(tmp_path: Path) -> None:
    before = os.stat("/dev/null")
    write_text(Path("/dev/null"), "x")
    assert os.path.samestat(before, os.stat("/dev/null"))
    pipe, read = tmp_path / "pipe", []
    os.mkfifo(pipe)
    reader = threading.Thread(target=lambda: read.append(pipe.read_text()), daemon=True)
    reader.start()
    write_text(pipe, "through the pipe")
    reader.join(30)
    assert read == ["through the pipe"]
    assert pipe.is_fifo()


@pytest.mark.parametrize("redirection", ["", "> out.txt", "| cat"])
def test_write_to_own_standard_output(tmp_path: Path, redirection: str) -> None:
    """If it is redirected to a file, that file must not be replaced: later output would be lost."""
    code = (
        "from pathlib import Path; from cmran.utils.files import write_text;"
        " print('before'); write_text(Path('/dev/stdout'), 'report\\n'); print('after')"
    )
    done = subprocess.run(
        ["bash", "-c", f'"$0" -c "$1" {redirection}', sys.executable, code],
        cwd=tmp_path, env={**os.environ, "PYTHONPATH": str(ROOT)}, capture_output=True, text=True, check=False,
    )  # fmt: skip
    assert done.stderr == ""
    output = (tmp_path / "out.txt").read_text() if ">" in redirection else done.stdout
    assert output == "before\nreport\nafter\n"


@pytest.mark.parametrize("name", ["n" * 255, "ö" * 127, "a b", "a\nb", ".hidden", "-x", "*?[", "n.tmp"])
def test_any_valid_file_name(tmp_path: Path, name: str) -> None:
    folder = tmp_path / "folder"
    write_text(folder / name, "x")
    assert os.listdir(folder) == [name]


def test_write_error_has_a_hint(tmp_path: Path) -> None:
    (tmp_path / "folder").mkdir()
    for path, advice in {
        tmp_path / "folder": "it is a folder: choose another name",
        tmp_path / ("n" * 256): "File name too long: choose a shorter name",
    }.items():
        with pytest.raises(CmranError) as error:
            write_text(path, "x")
        assert str(error.value) == f"cannot write {path}: {advice}"


@pytest.mark.parametrize(
    ("number", "advice"),
    [
        (errno.ENOSPC, "free space"),
        (errno.EROFS, "grant write permission"),
        (errno.EBUSY, "close the program"),
        (errno.EIO, "check the disk"),
    ],
)
def test_failed_rename_keeps_the_old_file(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, number: int, advice: str
) -> None:
    path = tmp_path / "a" / "file"
    write_text(path, "old")

    def refused(*_: Any) -> None:
        raise OSError(number, os.strerror(number))

    monkeypatch.setattr(os, "replace", refused)
    with pytest.raises(CmranError, match=advice), atomic_write(path) as file:
        file.write(b"new")
    assert path.read_text() == "old"
    assert os.listdir(path.parent) == ["file"]


# --- locks ------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("number", NO_LOCKS)
def test_file_system_without_locks_is_logged_once(
    tmp_path: Path, without_locks: Callable[..., None], caplog: pytest.LogCaptureFixture, number: int
) -> None:
    without_locks(number, "lacking")
    lock = tmp_path / "lacking" / ".lock"
    for _ in range(2):
        with file_lock(lock, busy="another command is running"):
            # Processes of this machine still exclude each other.
            with pytest.raises(CmranError, match="another command"), file_lock(lock, busy="another command is running"):
                pass
            with file_lock(lock.with_name("other"), busy="another file"):
                pass
    (record,) = caplog.records
    assert record.levelno == logging.WARNING
    assert f"{lock.parent}: its file system has no locks ({os.strerror(number)})" in record.message
    assert "start only one" in record.message


def test_no_locks_in_the_temporary_folder_either(
    tmp_path: Path, without_locks: Callable[..., None], caplog: pytest.LogCaptureFixture, temporary: Path
) -> None:
    without_locks(errno.ENOSYS, "lacking", temporary.name)
    with file_lock(tmp_path / "lacking" / ".lock", busy="busy"):
        pass
    assert "two commands in this folder at once are not detected" in caplog.text


def test_lock_folder_of_another_user_is_not_used(
    tmp_path: Path, without_locks: Callable[..., None], caplog: pytest.LogCaptureFixture, temporary: Path
) -> None:
    without_locks(errno.ENOSYS, "lacking")
    (tmp_path / "trap").mkdir()
    (temporary / f"cmran-locks-{os.getuid()}").symlink_to(tmp_path / "trap")
    with file_lock(tmp_path / "lacking" / ".lock", busy="busy"):
        pass
    assert os.listdir(tmp_path / "trap") == []
    assert "are not detected" in caplog.text


@pytest.mark.parametrize("call", ["flock", "lockf"])
def test_required_lock_is_refused_without_locks(tmp_path: Path, call: str) -> None:
    code = (
        "import sys; from pathlib import Path; from cmran.utils.files import file_lock\n"
        "with file_lock(Path(sys.argv[1]), required='use another disk'): print('locked')"
    )
    lock = tmp_path / "lacking" / "studies.db.lock"
    done = lacking("-c", code, lock, calls=call, number=errno.ENOLCK)
    assert done.stdout == ""
    expected = f"{lock.parent}: found a file system without locks (No locks available), expected one: use another disk"
    assert done.stderr.splitlines()[-1].endswith(expected)
    assert lacking("-c", code, tmp_path / "good" / ".lock", calls=call, number=errno.ENOLCK).stdout == "locked\n"


def test_other_lock_errors_are_raised(tmp_path: Path, without_locks: Callable[..., None]) -> None:
    without_locks(errno.EIO, "lacking")
    with pytest.raises(CmranError, match=r"cannot lock .*: Input/output error"), file_lock(tmp_path / "lacking" / "a"):
        pass


@pytest.mark.parametrize("why", ["a file instead of the folder", "no home", "no locks"])
def test_cache_lock_without_a_usable_cache(
    tmp_path: Path,
    without_locks: Callable[..., None],
    monkeypatch: pytest.MonkeyPatch,
    caplog: pytest.LogCaptureFixture,
    why: str,
) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "lacking"))
    if why == "no locks":
        without_locks(errno.ENOLCK, "lacking")
    elif why == "no home":
        no_home(monkeypatch)
    else:
        (tmp_path / "lacking").write_text("")
    order = []

    def second() -> None:
        with cache_lock("name"):
            order.append("second")

    with caplog.at_level(logging.INFO), contextlib.ExitStack() as stack:
        stack.enter_context(cache_lock("name"))
        thread = threading.Thread(target=second)
        thread.start()
        thread.join(0.2)
        order.append("first")
        stack.close()
        thread.join(30)
    assert order == ["first", "second"]
    assert all(record.levelno == logging.INFO for record in caplog.records)


def no_home(monkeypatch: pytest.MonkeyPatch) -> None:
    def fail() -> Path:
        raise RuntimeError("Could not determine home directory.")

    monkeypatch.delenv("XDG_CACHE_HOME")
    monkeypatch.setattr(Path, "home", fail)
