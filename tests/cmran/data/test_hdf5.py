"""Stored files: the page cache after a sweep, file locks, and damaged files."""

import ctypes
import errno
import mmap
import os
import subprocess
import sys
from pathlib import Path

import h5py
import numpy as np
import pytest

from benchmarks.report import evict_from_page_cache
from cmran.data.dataset import open_folder
from cmran.data.synthetic import writer
from cmran.errors import DataError
from tests.filesystems import lacking
from tests.helpers import make_folder

VIDEOS = 48


@pytest.fixture
def folder(tmp_path, monkeypatch):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    data = make_folder(tmp_path / "ave", VIDEOS, grid=4, visual_features=512)
    with open_folder(data, features="float16") as folder:
        yield folder


def share_in_memory(path: Path) -> float:
    """Return the share of the file's pages that are in the page cache."""
    pages = -(-path.stat().st_size // mmap.PAGESIZE)
    found = (ctypes.c_ubyte * pages)()
    with path.open("rb") as file, mmap.mmap(file.fileno(), 0, prot=mmap.PROT_READ, flags=mmap.MAP_PRIVATE) as mapped:
        start = np.frombuffer(mapped, np.uint8)
        status = ctypes.CDLL(None, use_errno=True).mincore(ctypes.c_void_p(start.ctypes.data), len(mapped), found)
        del start
    assert status == 0
    return sum(page & 1 for page in found) / pages


def prepare(path: Path, in_memory: bool) -> None:
    """Load the file into the page cache, or evict it."""
    evict_from_page_cache(path)
    if share_in_memory(path) > 0.5:
        pytest.skip("this file system keeps all files in memory")
    if in_memory:
        path.read_bytes()
    assert (share_in_memory(path) == 1) == in_memory


def is_unchanged(in_memory: bool, path: Path) -> bool:
    """Whether the page cache is unchanged; a page that two blocks share may stay."""
    return share_in_memory(path) == 1 if in_memory else share_in_memory(path) < 0.3


@pytest.mark.parametrize("in_memory", [True, False])
@pytest.mark.parametrize("step", [1, 7, 1000])
def test_a_sweep_leaves_the_page_cache_as_it_was(folder, in_memory, step):
    file = folder.visual_file
    prepare(file.path, in_memory)
    rows_done = file.sweep()
    for start in range(0, VIDEOS, step):
        stop = min(start + step, VIDEOS)
        file.read_block(start, stop)
        rows_done(start, stop)
    assert is_unchanged(in_memory, file.path)


@pytest.mark.parametrize("in_memory", [True, False])
def test_building_the_feature_cache_leaves_the_page_cache_as_it_was(folder, in_memory):
    folder.fingerprint  # noqa: B018  it reads the file, too
    prepare(folder.visual_file.path, in_memory)
    folder.use_feature_cache(build=True)
    assert folder.is_float16
    assert is_unchanged(in_memory, folder.visual_file.path)


def test_pages_stay_if_the_system_does_not_report_the_page_cache(folder, monkeypatch):
    file = folder.visual_file
    prepare(file.path, in_memory=True)

    def not_supported(*_):
        raise OSError(errno.EOPNOTSUPP, os.strerror(errno.EOPNOTSUPP))

    with monkeypatch.context() as patch:
        patch.setattr(os, "preadv", not_supported)
        rows_done = file.sweep()
    rows_done(0, VIDEOS)
    assert is_unchanged(True, file.path)


def test_a_sweep_over_a_file_read_through_h5py_has_no_effect(tmp_path):
    data = make_folder(tmp_path / "ave", 8)
    stored = data / "visual_feature.h5"
    with h5py.File(stored, "r+") as file:
        values = file["avadataset"][:]
        del file["avadataset"]
        file.create_dataset("avadataset", data=values, chunks=(1, *values.shape[1:]), compression="gzip")
    with open_folder(data) as folder:
        rows_done = folder.visual_file.sweep()
        found = folder.read_visual(np.arange(8))
        rows_done(0, 8)
    np.testing.assert_array_equal(found, values.astype(np.float32))


def test_a_file_that_another_program_writes_is_not_called_damaged(folder, tmp_path):
    path = folder.path / "audio_feature.h5"
    code = f"import h5py, sys; file = h5py.File({str(path)!r}, 'r+'); print(flush=True); sys.stdin.read()"
    with subprocess.Popen([sys.executable, "-c", code], stdin=subprocess.PIPE, stdout=subprocess.PIPE) as writer:
        assert writer.stdout is not None
        writer.stdout.readline()
        with pytest.raises(DataError, match="another program is writing") as error:
            open_folder(folder.path)
        writer.communicate()
    assert "download" not in str(error.value)
    open_folder(folder.path).close()


READ = """
import logging, sys
from pathlib import Path
from cmran.data.dataset import open_folder
logging.basicConfig(level=logging.INFO, format="%(levelname)s %(message)s")
for mode in ("full", "weak"):
    with open_folder(Path(sys.argv[1]), mode=mode) as folder:
        print(folder.read_visual([1, 3]).sum(), folder.order("val").tolist())
"""


@pytest.mark.parametrize("number", [errno.ENOLCK, errno.ENOSYS, errno.EOPNOTSUPP, errno.EINVAL])
def test_a_file_system_without_locks_is_read_without_a_lock(tmp_path, number):
    data = make_folder(tmp_path / "lacking" / "ave")
    plain = make_folder(tmp_path / "ave")
    environment = {"XDG_CACHE_HOME": tmp_path / "cache", "HDF5_USE_FILE_LOCKING": None}
    # Other optional calls are missing, too.
    calls = "flock,fadvise,preadv2"
    done = lacking("-c", READ, data, calls=calls, number=number, **environment)
    assert done.returncode == 0, done.stderr
    assert done.stdout == lacking("-c", READ, plain, calls=calls, number=number, **environment).stdout
    if number == errno.ENOSYS:
        # HDF5 itself then works without a lock.
        assert done.stderr == ""
        return
    (line,) = done.stderr.splitlines()
    assert line.startswith(f"INFO {data}: its file system has no locks ({os.strerror(number)})")


@pytest.mark.parametrize("damage", ["cut", "not hdf5"])
def test_a_damaged_file_without_locks_is_called_damaged(tmp_path, damage):
    data = make_folder(tmp_path / "lacking" / "ave")
    path = data / "audio_feature.h5"
    path.write_bytes(path.read_bytes()[:-100] if damage == "cut" else b"something else" * 100)
    done = lacking("-c", READ, data, calls="flock", number=errno.ENOLCK, HDF5_USE_FILE_LOCKING=None)
    assert done.returncode != 0
    error = done.stderr.splitlines()[-1]
    assert "audio_feature.h5" in error
    assert ("damaged or truncated" if damage == "cut" else "that are not HDF5") in error
    assert "locks" not in error


def test_the_environment_variable_for_locks_takes_precedence(tmp_path):
    data = make_folder(tmp_path / "lacking" / "ave")
    settings = {"TRUE": "unset HDF5_USE_FILE_LOCKING (found 'TRUE')", "FALSE": None}
    for setting, expected in settings.items():
        done = lacking("-c", READ, data, calls="flock", number=errno.ENOLCK, HDF5_USE_FILE_LOCKING=setting)
        assert (done.returncode == 0) == (expected is None)
        if expected is None:
            assert done.stderr == ""
        else:
            error = done.stderr.splitlines()[-1]
            assert expected in error
            assert "found a file system without locks (No locks available)" in error
            assert "download" not in error


def test_read_only_files_are_read(tmp_path):
    """For example on a read-only mount or in a folder of another user, where opening for writing fails."""
    data = make_folder(tmp_path / "lacking" / "ave")
    done = lacking("-c", READ, data, calls="create,mkdir", number=errno.EROFS, XDG_CACHE_HOME=tmp_path / "cache")
    assert done.returncode == 0, done.stderr
    assert done.stderr == ""


@pytest.mark.parametrize("number", [errno.ENOLCK, errno.EINVAL])
def test_synthetic_data_without_locks_and_syncs(tmp_path, number):
    out = tmp_path / "lacking" / "ave"
    code = (
        "import sys; from pathlib import Path; from cmran.data.synthetic import synthesize;"
        " synthesize(out=Path(sys.argv[1]), videos=20, grid=2, visual_features=8, audio_features=4, progress=False)"
    )
    # An unfinished folder of another process, which may still be alive.
    other = out.with_name("ave.partial-01234567")
    other.mkdir(parents=True)
    (other / writer._LOCK).touch()
    done = lacking("-c", code, out, calls="flock,sync,syncfolder,statvfs", number=number)
    assert done.returncode == 0, done.stderr
    assert other.is_dir()
    assert sorted(path.name for path in out.parent.iterdir()) == ["ave", other.name]
    with open_folder(out, mode="weak") as folder:
        assert folder.videos == 20
