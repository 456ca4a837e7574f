"""Features held on a device are those that are read: the same batches, whatever the dtype and the order."""

import numpy as np
import pytest
import torch

from cmran.data.features import iterate, open_folder
from cmran.data.resident import Resident, hold
from tests.devices import on_cuda
from tests.helpers import make_folder

CPU = torch.device("cpu")


@pytest.fixture(scope="module")
def data(tmp_path_factory):
    return make_folder(tmp_path_factory.mktemp("data") / "ave", 12)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize(("mode", "labels"), [("full", "segments"), ("weak", "video"), ("weak", None)])
@pytest.mark.parametrize("packed", [False, True])
def test_the_same_batches(data, mode, labels, dtype, packed):
    with open_folder(data, mode=mode, features="float16") as folder:
        if packed:
            folder.use_pack(make=True)
        assert folder.holds_halves == packed
        rows = np.random.default_rng(0).permutation(folder.rows)
        held = list(Resident(folder, CPU).iterate(rows, 5, labels=labels, dtype=dtype))
        read = list(iterate(folder, rows, 5, labels=labels, dtype=dtype))
    assert len(held) == len(read)
    for ours, theirs in zip(held, read, strict=True):
        np.testing.assert_array_equal(ours.rows, theirs.rows)
        for name in ("visual", "audio", "labels"):
            a, b = getattr(ours, name), getattr(theirs, name)
            assert (a is None) == (b is None), name
            assert a is None or (a.dtype == b.dtype == dtype and torch.equal(a, b)), name


def test_values_that_float16_does_not_hold_are_refused(data):
    with open_folder(data, features="stored") as folder, pytest.raises(ValueError, match="float16"):
        Resident(folder, CPU)


def test_nothing_is_held_on_a_cpu(data):
    with open_folder(data, features="float16") as folder:
        assert hold(folder, CPU) is None


@on_cuda
def test_the_next_run_finds_them(data):
    with open_folder(data, features="float16") as folder:
        first = hold(folder, torch.device("cuda"))
        assert first is not None
        assert hold(folder, torch.device("cuda")) is first
