"""Features held on a device are those that are read: the same batches, whatever the dtype and the order."""

import numpy as np
import pytest
import torch

from cmran.data import resident
from cmran.data.features import iterate, open_folder
from cmran.data.resident import NotHeldError, Resident, hold
from cmran.errors import UserError
from tests.devices import on_cuda
from tests.helpers import make_folder

CPU = torch.device("cpu")


@pytest.fixture(scope="module")
def data(tmp_path_factory):
    return make_folder(tmp_path_factory.mktemp("data") / "ave", 12)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize(("mode", "labels"), [("full", "segments"), ("weak", "video"), ("weak", None)])
@pytest.mark.parametrize("packed", [False, True])
@pytest.mark.parametrize("rows_at_once", [1, 5, 64])
def test_the_same_batches(data, monkeypatch, mode, labels, dtype, packed, rows_at_once):
    monkeypatch.setattr(resident, "ROWS_AT_ONCE", rows_at_once)
    with open_folder(data, mode=mode, features="float16") as folder:
        if packed:
            folder.use_pack(make=True)
        assert folder.holds_halves == packed
        rows = np.random.default_rng(0).permutation(folder.rows)
        kept = torch.bfloat16 if dtype == torch.bfloat16 else torch.float16
        held = list(Resident(folder, CPU, kept).iterate(rows, 5, labels=labels, dtype=dtype))
        read = list(iterate(folder, rows, 5, labels=labels, dtype=dtype))
    assert len(held) == len(read)
    for ours, theirs in zip(held, read, strict=True):
        np.testing.assert_array_equal(ours.rows, theirs.rows)
        for name in ("visual", "audio", "labels"):
            a, b = getattr(ours, name), getattr(theirs, name)
            assert (a is None) == (b is None), name
            assert a is None or (a.dtype == b.dtype == dtype and torch.equal(a, b)), name


def test_values_that_float16_does_not_hold_are_refused(data):
    with open_folder(data, features="stored") as folder, pytest.raises(NotHeldError, match="float16"):
        Resident(folder, CPU)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_the_next_run_finds_them(data, dtype):
    with open_folder(data, features="float16") as folder:
        first = hold(folder, CPU, dtype)
        assert first is not None
        assert hold(folder, CPU, dtype) is first
    with open_folder(data, mode="weak", features="float16") as folder:
        other = hold(folder, CPU, dtype)
        assert other is not None
        assert other is not first


@pytest.mark.parametrize(
    ("features", "available", "why"),
    [("stored", 1 << 40, "not rounded to float16"), ("float16", 4 * 12 * 4 * 4 * 6, "GiB")],
)
def test_what_is_not_held_is_told(data, monkeypatch, caplog, features, available, why):
    monkeypatch.setattr(resident, "available_memory", lambda: available)
    caplog.set_level("INFO")
    with open_folder(data, features=features) as folder:
        assert hold(folder, CPU, torch.float32) is None
    assert "not held in memory: " in caplog.text
    assert why in caplog.text


def test_a_row_that_cannot_be_read_is_told(data, monkeypatch):
    def broken(rows, dtype=None):
        raise UserError(f"row {rows[0]} is gone")

    with open_folder(data, features="float16") as folder:
        monkeypatch.setattr(folder, "read_visual", broken)
        with pytest.raises(UserError, match="row 0 is gone"):
            hold(folder, CPU, torch.float32)
        monkeypatch.undo()
        assert hold(folder, CPU, torch.float32) is not None


@on_cuda
def test_the_next_run_finds_them_on_a_gpu(data):
    with open_folder(data, features="float16") as folder:
        first = hold(folder, torch.device("cuda"), torch.bfloat16)
        assert first is not None
        # One copy for all precisions.
        assert hold(folder, torch.device("cuda"), torch.float32) is first
