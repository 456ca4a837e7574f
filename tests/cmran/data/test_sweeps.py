"""One pass over a file leaves it in memory, or out of it, as it was found."""

import ctypes
import mmap
import os
from pathlib import Path

import h5py
import numpy as np
import pytest
import torch

from cmran.data import resident
from cmran.data.features import open_folder
from cmran.data.packing import pack_path
from cmran.data.resident import hold
from tests.helpers import make_folder

VIDEOS, BACKGROUND = 48, 40


@pytest.fixture
def folder(tmp_path, monkeypatch):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    data = make_folder(tmp_path / "ave", VIDEOS, background_videos=BACKGROUND, grid=4, visual_features=512)
    with open_folder(data, mode="weak", features="float16") as folder:
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
    with path.open("rb") as file:
        os.fsync(file.fileno())
        os.posix_fadvise(file.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)
    if share_in_memory(path) > 0.5:
        pytest.skip("this file system keeps all files in memory")
    if in_memory:
        path.read_bytes()
    assert (share_in_memory(path) == 1) == in_memory


@pytest.mark.parametrize("in_memory", [True, False])
@pytest.mark.parametrize("step", [1, 7, 1000])
def test_a_pass_over_the_stored_files(folder, in_memory, step):
    paths = [folder.path / name for name in ("visual_feature.h5", "visual_feature_noisy.h5")]
    for path in paths:
        prepare(path, in_memory)
    passed = folder.sweep_visual()
    for start in range(0, folder.rows, step):
        stop = min(start + step, folder.rows)
        folder.read_visual(np.arange(start, stop))
        passed(start, stop)
    for path in paths:
        assert share_in_memory(path) == 1 if in_memory else share_in_memory(path) < 0.3


@pytest.mark.parametrize("in_memory", [True, False])
def test_packing_and_holding(folder, in_memory):
    stored = folder.path / "visual_feature.h5"
    pack = pack_path(folder.fingerprint, folder._visual[0].source)
    prepare(stored, in_memory)
    folder.use_pack(make=True)
    assert share_in_memory(stored) == 1 if in_memory else share_in_memory(stored) < 0.3
    prepare(pack, in_memory)
    try:
        held = hold(folder, torch.device("cpu"), torch.bfloat16)
    finally:
        resident.let_go()
    assert held is not None
    assert share_in_memory(pack) == 1 if in_memory else share_in_memory(pack) < 0.3
    # What was let go of can be read again.
    rows = np.arange(folder.rows)
    batch = next(iter(held.iterate(rows, folder.rows, labels=None, dtype=torch.bfloat16)))
    assert torch.equal(batch.visual, torch.from_numpy(folder.read_visual(rows)).bfloat16())


def test_a_file_that_is_read_through_h5py_has_no_such_pass(tmp_path):
    data = make_folder(tmp_path / "ave", 8)
    stored = data / "visual_feature.h5"
    with h5py.File(stored, "r+") as file:
        values = file["avadataset"][:]
        del file["avadataset"]
        file.create_dataset("avadataset", data=values, chunks=(1, *values.shape[1:]), compression="gzip")
    with open_folder(data) as folder:
        passed = folder.sweep_visual()
        found = folder.read_visual(np.arange(8))
        passed(0, 8)
    np.testing.assert_array_equal(found, values.astype(np.float32))
