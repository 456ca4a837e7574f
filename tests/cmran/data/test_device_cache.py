"""The device cache yields the same batches as reading the files, for every dtype and order."""

import shutil
import subprocess
import sys
import weakref

import h5py
import numpy as np
import pytest
import torch

from cmran.data import device_cache
from cmran.data.dataset import open_folder
from cmran.data.device_cache import DeviceCache, DeviceCacheSlot
from cmran.data.loader import iterate
from cmran.errors import CmranError
from cmran.training.trainer import fit
from tests.cmran.tiny import tiny_config
from tests.devices import on_cuda
from tests.helpers import make_folder

CPU = torch.device("cpu")


@pytest.fixture
def slot():
    with DeviceCacheSlot() as slot:
        yield slot


@pytest.fixture(scope="module")
def data(tmp_path_factory):
    return make_folder(tmp_path_factory.mktemp("data") / "ave", 12)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize(("mode", "labels"), [("full", "segments"), ("weak", "video"), ("weak", None)])
@pytest.mark.parametrize("with_feature_cache", [False, True])
@pytest.mark.parametrize("rows_at_once", [1, 5, 64])
def test_batches_equal_those_of_the_loader(data, monkeypatch, mode, labels, dtype, with_feature_cache, rows_at_once):
    monkeypatch.setattr(device_cache, "ROWS_AT_ONCE", rows_at_once)
    with open_folder(data, mode=mode, features="float16") as folder:
        if with_feature_cache:
            folder.use_feature_cache(build=True)
        assert folder.is_float16 == with_feature_cache
        rows = np.random.default_rng(0).permutation(folder.rows)
        stored = torch.bfloat16 if dtype == torch.bfloat16 else torch.float16
        cached = list(DeviceCache(folder, CPU, stored).iterate(rows, 5, labels=labels, dtype=dtype))
        read = list(iterate(folder, rows, 5, labels=labels, dtype=dtype))
    assert len(cached) == len(read)
    for ours, theirs in zip(cached, read, strict=True):
        np.testing.assert_array_equal(ours.rows, theirs.rows)
        for name in ("visual", "audio", "labels"):
            a, b = getattr(ours, name), getattr(theirs, name)
            assert (a is None) == (b is None), name
            assert a is None or (a.dtype == b.dtype == dtype and torch.equal(a, b)), name


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_slot_returns_the_same_cache_to_the_next_run(data, slot, dtype):
    with open_folder(data, features="float16") as folder:
        first = slot.load(folder, CPU, dtype)
        assert first is not None
        assert slot.load(folder, CPU, dtype) is first
    with open_folder(data, mode="weak", features="float16") as folder:
        other = slot.load(folder, CPU, dtype)
        assert other is not None
        assert other is not first


def test_trainings_share_the_slot_of_their_owner(data, slot, tmp_path, monkeypatch):
    created, create = [], DeviceCache.__init__

    def counted(self, *arguments):
        create(self, *arguments)
        created.append(weakref.ref(self._visual))

    monkeypatch.setattr(DeviceCache, "__init__", counted)
    for name in ("first", "second"):
        fit(data, tiny_config(epochs=1), tmp_path / name, device="cpu", device_cache=slot)
    assert [memory() is None for memory in created] == [False]
    # Without a slot the run frees its own cache.
    fit(data, tiny_config(epochs=1), tmp_path / "third", device="cpu")
    assert [memory() is None for memory in created] == [False, True]


def test_release_frees_the_memory(data, slot):
    with open_folder(data, features="float16") as folder:
        cached = slot.load(folder, CPU, torch.float32)
        memory = weakref.ref(cached._visual)
        assert memory() is not None
        # Even if somebody still refers to the cache.
        slot.release()
        assert memory() is None
        assert slot.load(folder, CPU, torch.float32) is not cached


@pytest.mark.parametrize(
    ("features", "dtype", "available", "why"),
    [
        ("stored", torch.float32, 1 << 40, "not rounded to float16"),
        ("float16", torch.float64, 1 << 40, "float64 needs the audio"),
        ("float16", torch.float32, 4 * 12 * 4 * 4 * 6, "GiB"),
    ],
)
def test_reason_for_no_cache_is_logged(data, slot, monkeypatch, caplog, features, dtype, available, why):
    monkeypatch.setattr(device_cache, "available_memory", lambda: available)
    caplog.set_level("INFO")
    with open_folder(data, features=features) as folder:
        assert slot.load(folder, CPU, dtype) is None
    assert "not cached in memory: " in caplog.text
    assert why in caplog.text


def test_unfit_rows_are_found_only_once(data, slot, tmp_path, monkeypatch, caplog):
    bad = shutil.copytree(data, tmp_path / "bad")
    with h5py.File(bad / "visual_feature.h5", "r+") as file:
        file["avadataset"][7, 0, 0, 0, 0] = 1e6
    caplog.set_level("INFO")
    allocated, allocate = [], device_cache._allocate

    def watched(*arguments):
        memory = allocate(*arguments)
        allocated.append(weakref.ref(memory))
        return memory

    monkeypatch.setattr(device_cache, "_allocate", watched)
    with open_folder(bad, features="float16") as folder:
        assert slot.load(folder, CPU, torch.float32) is None
        # The memory is freed.
        assert [memory() for memory in allocated] == [None]
        assert "float16 cannot represent the values of row 7" in caplog.text
        caplog.clear()
        monkeypatch.setattr(folder, "read_visual", None)
        assert slot.load(folder, CPU, torch.float32) is None
        assert "float16 cannot represent the values of row 7" in caplog.text


@pytest.mark.parametrize("with_feature_cache", [False, True])
def test_nan_is_cached_unchanged(data, slot, tmp_path, with_feature_cache):
    bad = shutil.copytree(data, tmp_path / "bad")
    with h5py.File(bad / "visual_feature.h5", "r+") as file:
        file["avadataset"][7, 0, 0, 0, 0] = np.nan
    with open_folder(bad, features="float16") as folder:
        if with_feature_cache:
            folder.use_feature_cache(build=True)
        cached = slot.load(folder, CPU, torch.float32)
        assert cached is not None
        (batch,) = cached.iterate(np.array([7]), 1, labels=None, dtype=torch.float32)
        assert batch.visual.isnan().sum() == 1


def test_refused_memory_is_logged(data, slot, monkeypatch, caplog):
    class Refusing:
        MAP_PRIVATE = MAP_ANONYMOUS = 0

        @staticmethod
        def mmap(*_, **__):
            raise OSError(12, "Cannot allocate memory")

    caplog.set_level("INFO")
    with open_folder(data, features="float16") as folder:
        monkeypatch.setattr(device_cache, "mmap", Refusing)
        assert slot.load(folder, CPU, torch.float32) is None
        assert "Cannot allocate memory" in caplog.text


def test_kernel_without_large_pages(data, slot, monkeypatch):
    monkeypatch.setattr(device_cache.mmap, "MADV_HUGEPAGE", 12345, raising=False)
    with open_folder(data, features="float16") as folder:
        assert slot.load(folder, CPU, torch.float32) is not None


def test_processes_check_the_memory_one_at_a_time(data):
    """The system does not yet count the memory that another process is about to use."""
    script = """
import sys, time, torch
from cmran.data import device_cache
from cmran.data.dataset import open_folder
check, fill = device_cache.available_memory, device_cache.DeviceCache.__init__
def slow_check():
    print(time.monotonic(), flush=True)
    time.sleep(0.3)
    return check()
def reported_fill(*arguments):
    fill(*arguments)
    print(time.monotonic(), flush=True)
device_cache.available_memory, device_cache.DeviceCache.__init__ = slow_check, reported_fill
with open_folder(sys.argv[1], features="float16") as folder:
    folder.fingerprint
    print("ready", flush=True)
    sys.stdin.readline()
    assert device_cache.DeviceCacheSlot().load(folder, torch.device("cpu"), torch.float32) is not None
"""
    command = [sys.executable, "-c", script, str(data)]
    children = [subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True) for _ in range(2)]
    assert [child.stdout.readline() for child in children] == ["ready\n"] * 2
    for child in children:
        child.stdin.write("go\n")
        child.stdin.flush()
    spans = sorted(tuple(map(float, child.communicate()[0].split())) for child in children)
    assert [child.returncode for child in children] == [0, 0]
    (_, first_filled), (second_checked, _) = spans
    assert first_filled <= second_checked


def test_read_error_is_raised_and_not_cached(data, slot, monkeypatch):
    def broken(rows, dtype=None):
        raise CmranError(f"row {rows[0]} is gone")

    with open_folder(data, features="float16") as folder:
        monkeypatch.setattr(folder, "read_visual", broken)
        with pytest.raises(CmranError, match="row 0 is gone"):
            slot.load(folder, CPU, torch.float32)
        monkeypatch.undo()
        assert slot.load(folder, CPU, torch.float32) is not None


@on_cuda
def test_one_cache_for_all_precisions_on_a_gpu(data, slot):
    with open_folder(data, features="float16") as folder:
        first = slot.load(folder, torch.device("cuda"), torch.bfloat16)
        assert first is not None
        assert slot.load(folder, torch.device("cuda"), torch.float32) is first
