"""A stored file: one pass over it leaves it in memory, or out of it, as it was found."""

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

from benchmarks.report import put_out
from cmran.data.features import open_folder
from cmran.errors import UserError
from tests.helpers import make_folder

VIDEOS = 48


@pytest.fixture
def folder(tmp_path, monkeypatch):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    data = make_folder(tmp_path / "ave", VIDEOS, grid=4, visual_features=512)
    with open_folder(data, features="float16") as folder:
        yield folder


def share_in_memory(path: Path) -> float:
    """Of the file's pages, those that the system has in memory."""
    pages = -(-path.stat().st_size // mmap.PAGESIZE)
    found = (ctypes.c_ubyte * pages)()
    with path.open("rb") as file, mmap.mmap(file.fileno(), 0, prot=mmap.PROT_READ, flags=mmap.MAP_PRIVATE) as mapped:
        place = np.frombuffer(mapped, np.uint8)
        status = ctypes.CDLL(None, use_errno=True).mincore(ctypes.c_void_p(place.ctypes.data), len(mapped), found)
        del place
    assert status == 0
    return sum(page & 1 for page in found) / pages


def prepare(path: Path, in_memory: bool) -> None:
    """Put the file into memory, or out of it."""
    put_out(path)
    if share_in_memory(path) > 0.5:
        pytest.skip("this file system keeps all files in memory")
    if in_memory:
        path.read_bytes()
    assert (share_in_memory(path) == 1) == in_memory


def remaining(in_memory: bool, path: Path) -> bool:
    """Whether the file is where it was; a page that two pieces share may stay."""
    return share_in_memory(path) == 1 if in_memory else share_in_memory(path) < 0.3


@pytest.mark.parametrize("in_memory", [True, False])
@pytest.mark.parametrize("step", [1, 7, 1000])
def test_a_pass_over_a_stored_file(folder, in_memory, step):
    file = folder.visual_file
    prepare(file.path, in_memory)
    passed = file.sweep()
    for start in range(0, VIDEOS, step):
        stop = min(start + step, VIDEOS)
        file.read_block(start, stop)
        passed(start, stop)
    assert remaining(in_memory, file.path)


@pytest.mark.parametrize("in_memory", [True, False])
def test_packing(folder, in_memory):
    folder.fingerprint  # noqa: B018  it reads the file, too
    prepare(folder.visual_file.path, in_memory)
    folder.use_pack(make=True)
    assert folder.holds_halves
    assert remaining(in_memory, folder.visual_file.path)


def test_a_system_that_does_not_tell_is_left_alone(folder, monkeypatch):
    file = folder.visual_file
    prepare(file.path, in_memory=True)

    def not_supported(*_):
        raise OSError(errno.EOPNOTSUPP, os.strerror(errno.EOPNOTSUPP))

    with monkeypatch.context() as patch:
        patch.setattr(os, "preadv", not_supported)
        passed = file.sweep()
    passed(0, VIDEOS)
    assert remaining(True, file.path)


def test_a_file_that_is_read_through_h5py_has_no_such_pass(tmp_path):
    data = make_folder(tmp_path / "ave", 8)
    stored = data / "visual_feature.h5"
    with h5py.File(stored, "r+") as file:
        values = file["avadataset"][:]
        del file["avadataset"]
        file.create_dataset("avadataset", data=values, chunks=(1, *values.shape[1:]), compression="gzip")
    with open_folder(data) as folder:
        passed = folder.visual_file.sweep()
        found = folder.read_visual(np.arange(8))
        passed(0, 8)
    np.testing.assert_array_equal(found, values.astype(np.float32))


def test_a_file_that_another_program_writes_is_no_damaged_one(folder, tmp_path):
    path = folder.path / "audio_feature.h5"
    code = f"import h5py, sys; file = h5py.File({str(path)!r}, 'r+'); print(flush=True); sys.stdin.read()"
    with subprocess.Popen([sys.executable, "-c", code], stdin=subprocess.PIPE, stdout=subprocess.PIPE) as writer:
        assert writer.stdout is not None
        writer.stdout.readline()
        with pytest.raises(UserError, match="another program is writing") as error:
            open_folder(folder.path)
        writer.communicate()
    assert "download" not in str(error.value)
    open_folder(folder.path).close()
