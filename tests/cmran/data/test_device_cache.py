"""Features held on a device are those that are read: the same batches, whatever the dtype and the order."""

import shutil
import subprocess
import sys
import weakref

import h5py
import numpy as np
import pytest
import torch

from cmran.data import device_cache as device_cache
from cmran.data.dataset import open_folder
from cmran.data.device_cache import DeviceCache, load_device_cache
from cmran.data.loader import iterate
from cmran.errors import CmranError
from tests.devices import on_cuda
from tests.helpers import make_folder

CPU = torch.device("cpu")


@pytest.fixture(autouse=True)
def _nothing_held():
    device_cache.release_device_cache()
    yield
    device_cache.release_device_cache()


@pytest.fixture(scope="module")
def data(tmp_path_factory):
    return make_folder(tmp_path_factory.mktemp("data") / "ave", 12)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize(("mode", "labels"), [("full", "segments"), ("weak", "video"), ("weak", None)])
@pytest.mark.parametrize("packed", [False, True])
@pytest.mark.parametrize("rows_at_once", [1, 5, 64])
def test_the_same_batches(data, monkeypatch, mode, labels, dtype, packed, rows_at_once):
    monkeypatch.setattr(device_cache, "ROWS_AT_ONCE", rows_at_once)
    with open_folder(data, mode=mode, features="float16") as folder:
        if packed:
            folder.use_pack(make=True)
        assert folder.is_float16 == packed
        rows = np.random.default_rng(0).permutation(folder.rows)
        kept = torch.bfloat16 if dtype == torch.bfloat16 else torch.float16
        held = list(DeviceCache(folder, CPU, kept).iterate(rows, 5, labels=labels, dtype=dtype))
        read = list(iterate(folder, rows, 5, labels=labels, dtype=dtype))
    assert len(held) == len(read)
    for ours, theirs in zip(held, read, strict=True):
        np.testing.assert_array_equal(ours.rows, theirs.rows)
        for name in ("visual", "audio", "labels"):
            a, b = getattr(ours, name), getattr(theirs, name)
            assert (a is None) == (b is None), name
            assert a is None or (a.dtype == b.dtype == dtype and torch.equal(a, b)), name


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_the_next_run_finds_them(data, dtype):
    with open_folder(data, features="float16") as folder:
        first = load_device_cache(folder, CPU, dtype)
        assert first is not None
        assert load_device_cache(folder, CPU, dtype) is first
    with open_folder(data, mode="weak", features="float16") as folder:
        other = load_device_cache(folder, CPU, dtype)
        assert other is not None
        assert other is not first


def test_they_are_let_go(data):
    with open_folder(data, features="float16") as folder:
        held = weakref.ref(load_device_cache(folder, CPU, torch.float32))
        assert held() is not None
        device_cache.release_device_cache()
        assert held() is None


@pytest.mark.parametrize(
    ("features", "dtype", "available", "why"),
    [
        ("stored", torch.float32, 1 << 40, "not rounded to float16"),
        ("float16", torch.float64, 1 << 40, "float64 takes the audio"),
        ("float16", torch.float32, 4 * 12 * 4 * 4 * 6, "GiB"),
    ],
)
def test_what_is_not_held_is_told(data, monkeypatch, caplog, features, dtype, available, why):
    monkeypatch.setattr(device_cache, "available_memory", lambda: available)
    caplog.set_level("INFO")
    with open_folder(data, features=features) as folder:
        assert load_device_cache(folder, CPU, dtype) is None
    assert "not held in memory: " in caplog.text
    assert why in caplog.text


def test_rows_that_float16_does_not_hold_are_met_once(data, tmp_path, monkeypatch, caplog):
    bad = shutil.copytree(data, tmp_path / "bad")
    with h5py.File(bad / "visual_feature.h5", "r+") as file:
        file["avadataset"][7, 0, 0, 0, 0] = 1e6
    caplog.set_level("INFO")
    rooms, room = [], device_cache._room

    def watched(*given):
        made = room(*given)
        rooms.append(weakref.ref(made))
        return made

    monkeypatch.setattr(device_cache, "_room", watched)
    with open_folder(bad, features="float16") as folder:
        assert load_device_cache(folder, CPU, torch.float32) is None
        # What was to hold them is given back.
        assert [made() for made in rooms] == [None]
        assert "row 7 holds values that float16 cannot" in caplog.text
        caplog.clear()
        monkeypatch.setattr(folder, "read_visual", None)
        assert load_device_cache(folder, CPU, torch.float32) is None
        assert "row 7 holds values that float16 cannot" in caplog.text


@pytest.mark.parametrize("packed", [False, True])
def test_nan_is_held_as_it_is_read(data, tmp_path, packed):
    bad = shutil.copytree(data, tmp_path / "bad")
    with h5py.File(bad / "visual_feature.h5", "r+") as file:
        file["avadataset"][7, 0, 0, 0, 0] = np.nan
    with open_folder(bad, features="float16") as folder:
        if packed:
            folder.use_pack(make=True)
        held = load_device_cache(folder, CPU, torch.float32)
        assert held is not None
        (batch,) = held.iterate(np.array([7]), 1, labels=None, dtype=torch.float32)
        assert batch.visual.isnan().sum() == 1


def test_memory_that_the_system_refuses(data, monkeypatch, caplog):
    class Refusing:
        MAP_PRIVATE = MAP_ANONYMOUS = 0

        @staticmethod
        def mmap(*_, **__):
            raise OSError(12, "Cannot allocate memory")

    caplog.set_level("INFO")
    with open_folder(data, features="float16") as folder:
        monkeypatch.setattr(device_cache, "mmap", Refusing)
        assert load_device_cache(folder, CPU, torch.float32) is None
        assert "Cannot allocate memory" in caplog.text


def test_a_kernel_without_large_pages(data, monkeypatch):
    monkeypatch.setattr(device_cache.mmap, "MADV_HUGEPAGE", 12345, raising=False)
    with open_folder(data, features="float16") as folder:
        assert load_device_cache(folder, CPU, torch.float32) is not None


def test_processes_look_for_room_one_after_the_other(data):
    """What one is about to take is not yet missing when the next one looks."""
    script = """
import sys, time, torch
from cmran.data import resident
from cmran.data.dataset import open_folder
look, fill = resident.available_memory, resident.Resident
def slow_look():
    print(time.monotonic(), flush=True)
    time.sleep(0.3)
    return look()
def told_fill(*given):
    held = fill(*given)
    print(time.monotonic(), flush=True)
    return held
resident.available_memory, resident.Resident = slow_look, told_fill
with open_folder(sys.argv[1], features="float16") as folder:
    folder.fingerprint
    print("ready", flush=True)
    sys.stdin.readline()
    assert resident.hold(folder, torch.device("cpu"), torch.float32) is not None
"""
    command = [sys.executable, "-c", script, str(data)]
    children = [subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True) for _ in range(2)]
    assert [child.stdout.readline() for child in children] == ["ready\n"] * 2
    for child in children:
        child.stdin.write("go\n")
        child.stdin.flush()
    spans = sorted(tuple(map(float, child.communicate()[0].split())) for child in children)
    assert [child.returncode for child in children] == [0, 0]
    (_, first_filled), (second_looked, _) = spans
    assert first_filled <= second_looked


def test_a_row_that_cannot_be_read_is_told(data, monkeypatch):
    def broken(rows, dtype=None):
        raise CmranError(f"row {rows[0]} is gone")

    with open_folder(data, features="float16") as folder:
        monkeypatch.setattr(folder, "read_visual", broken)
        with pytest.raises(CmranError, match="row 0 is gone"):
            load_device_cache(folder, CPU, torch.float32)
        monkeypatch.undo()
        assert load_device_cache(folder, CPU, torch.float32) is not None


@on_cuda
def test_the_next_run_finds_them_on_a_gpu(data):
    with open_folder(data, features="float16") as folder:
        first = load_device_cache(folder, torch.device("cuda"), torch.bfloat16)
        assert first is not None
        # One copy for all precisions.
        assert load_device_cache(folder, torch.device("cuda"), torch.float32) is first
