import contextlib
import errno
import fcntl
import hashlib
import logging
import os
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from collections import namedtuple
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import h5py
import numpy as np
import pytest
import torch

from cmran.data import packing
from cmran.data.features import READ_AHEAD, iterate, open_folder
from cmran.data.fingerprint import folder_fingerprint
from cmran.data.packing import (
    HEADER_BYTES,
    Pack,
    clear_packs,
    limit_bytes,
    list_packs,
    pack_path,
    set_limit,
    to_half,
    widen,
)
from cmran.errors import UserError
from flows.__main__ import main
from tests.conftest import ROOT
from tests.filesystems import lacking
from tests.helpers import make_folder, read, write


@pytest.fixture(autouse=True)
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    monkeypatch.setattr("cmran.files._without_cache", set())
    return tmp_path / "cache" / "cmran" / "packs"


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    return make_folder(tmp_path / "data")


def rounded(values: np.ndarray) -> np.ndarray:
    with np.errstate(over="ignore"):
        return values.astype(np.float32).astype(np.float16)


def pack(folder: Path, mode: Any = "full") -> Path:
    """Pack the folder; where the pack of its visual maps lies."""
    with open_folder(folder, mode=mode, features="float16") as data:
        data.use_pack(make=True)
        return pack_path(data.fingerprint, data._visual[0].source)


def names(cache: Path) -> list[str]:
    return sorted(path.name.partition(".")[2] for path in cache.iterdir() if not path.name.startswith("."))


@contextlib.contextmanager
def sources_untouched(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """Reading a feature file fails within."""

    def forbidden(*_: Any, **__: Any) -> None:
        raise AssertionError("a feature file is read")

    with monkeypatch.context() as patch:
        patch.setattr("cmran.data.hdf5.StoredArray.read", forbidden)
        patch.setattr("cmran.data.hdf5.StoredArray.read_block", forbidden)
        yield


def test_half_conversion_is_that_of_numpy() -> None:
    rng = np.random.default_rng(0)
    bits = rng.integers(0, 2**32, 200_000, dtype=np.uint32)
    values = np.concatenate(
        [bits.view(np.float32), rng.random(100_000, np.float32) * 1e-6, np.float32([0, -0.0, 65519])]
    )
    half = np.empty(values.shape, np.float16)
    to_half(values, half)
    with np.errstate(over="ignore", invalid="ignore"):
        expected = values.astype(np.float16)
    assert np.array_equal(half, expected, equal_nan=True)
    for dtype in (np.float16, np.float32, np.float64):
        back = np.empty(half.shape, dtype)
        widen(half, back)
        assert np.array_equal(back, half.astype(dtype), equal_nan=True)
        wide = np.zeros((2 * len(half),), dtype)
        widen(half, wide[::2])
        assert np.array_equal(wide[::2], half.astype(dtype), equal_nan=True)


@pytest.mark.parametrize(
    "sizes",
    [
        {},
        {"videos": 5, "segments": 1, "grid": 1, "visual_features": 1},
        {"videos": 4, "segments": 3, "grid": 5, "visual_features": 7},
        {"videos": 40, "segments": 10, "grid": 7, "visual_features": 96},
    ],
)
@pytest.mark.parametrize("dtype", ["float64", "float32", "float16", ">f8"])
def test_values_are_those_of_the_file_rounded(
    tmp_path: Path, sizes: dict[str, int], dtype: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    # Several blocks, the last one short.
    folder = make_folder(tmp_path / "any", **sizes)
    values = read(folder / "visual_feature.h5")
    monkeypatch.setattr(packing, "BLOCK_BYTES", 3 * values[0].nbytes)
    noisy = read(folder / "visual_feature_noisy.h5")
    write(folder / "visual_feature.h5", values.astype(dtype))
    expected = rounded(np.concatenate([values.astype(dtype), noisy]))
    rows = [len(expected) - 1, 1, 1, 0, 3, len(values) - 1]
    with open_folder(folder, mode="weak", features="float16") as data:
        for packed in (False, True):
            if packed:
                data.use_pack(make=True)
            for wanted in (np.float16, np.float32, np.float64):
                assert np.array_equal(data.read_visual(rows, wanted), expected[rows].astype(wanted))
            out = np.zeros((2, *expected.shape[1:-1], 2 * expected.shape[-1]), np.float32)
            data.read_visual([2, 1], out=out[..., ::2])
            assert np.array_equal(out[..., ::2], expected[[2, 1]].astype(np.float32))
            # The sound is as stored.
            assert np.array_equal(data.read_audio([0], np.float64), read(folder / "audio_feature.h5")[[0]])
            with pytest.raises(IndexError):
                data.read_visual([len(expected)])
    with open_folder(folder, mode="weak") as data:
        stored = data.read_visual(rows[:2], np.float64)
    assert np.array_equal(stored, np.concatenate([values.astype(dtype), noisy])[rows[:2]])


@pytest.mark.parametrize(
    "kwargs", [{"chunks": (5, 4, 1, 2, 6)}, {"compression": "gzip"}, {"dtype": "f2", "chunks": (2, 4, 2, 2, 6)}]
)
def test_files_that_are_not_contiguous(folder: Path, kwargs: dict[str, Any]) -> None:
    write(folder / "visual_feature.h5", read(folder / "visual_feature.h5"), **kwargs)
    expected = rounded(read(folder / "visual_feature.h5")).astype(np.float32)
    with open_folder(folder, features="float16") as data:
        assert np.array_equal(data.read_visual(range(12)), expected)
        data.use_pack(make=True)
        assert data._visual[0].pack is not None
        assert np.array_equal(data.read_visual(range(11, -1, -1)), expected[::-1])


def test_a_float16_file_needs_no_pack(tmp_path: Path, cache: Path) -> None:
    folder = make_folder(tmp_path / "half", dtype="float16")
    with open_folder(folder, mode="weak", features="float16") as data:
        data.use_pack(make=True)
        assert np.array_equal(data.read_visual([3], np.float16), read(folder / "visual_feature.h5")[[3]])
    assert not cache.exists()


def test_the_pack_is_read_and_shared(folder: Path, cache: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    pack(folder, "weak")
    assert names(cache) == ["visual_feature.pack", "visual_feature_noisy.pack"]
    with sources_untouched(monkeypatch):
        for make in (True, False):
            with open_folder(folder, features="float16") as data:
                data.use_pack(make=make)
                assert np.array_equal(
                    data.read_visual([7], np.float16), rounded(read(folder / "visual_feature.h5"))[[7]]
                )
        with open_folder(folder, features="stored") as data:
            data.use_pack(make=True)
            with pytest.raises(AssertionError, match="is read"):
                data.read_visual([7])


def test_nothing_is_made_unless_asked(folder: Path, cache: Path) -> None:
    with open_folder(folder, features="float16") as data:
        data.use_pack(make=False)
        assert data.read_visual([0]).any()
    assert not list(cache.iterdir())


def test_other_content_gets_another_pack(folder: Path, cache: Path) -> None:
    first = pack(folder)
    values = read(folder / "visual_feature.h5")
    values[3] += 1
    write(folder / "visual_feature.h5", values)
    assert pack(folder) != first
    with open_folder(folder, features="float16") as data:
        data.use_pack(make=False)
        assert np.array_equal(data.read_visual([3], np.float16), rounded(values)[[3]])


def flip(path: Path, position: int) -> None:
    with path.open("r+b") as file:
        file.seek(position)
        byte = file.read(1)
        file.seek(position)
        file.write(bytes([byte[0] ^ 4]))


ROW = 4 * 2 * 2 * 6 * 2


@pytest.mark.parametrize(
    ("spoil", "says"),
    [
        (lambda path: os.truncate(path, path.stat().st_size - 1), "bytes, expected"),
        (lambda path: os.truncate(path, 0), "header"),
        (lambda path: os.truncate(path, 100), "header"),
        (lambda path: flip(path, 2), "header"),
        (lambda path: flip(path, 9), "header"),
        (lambda path: flip(path, 60), "header"),
        (lambda path: flip(path, path.stat().st_size - 3), "checks"),
        (lambda path: path.write_bytes(path.read_bytes() + b"x"), "bytes, expected"),
        (lambda path: path.write_bytes(b"\0" * path.stat().st_size), "header"),
    ],
)
def test_a_damaged_pack_is_told_and_made_anew(
    folder: Path, spoil: Any, says: str, caplog: pytest.LogCaptureFixture
) -> None:
    path = pack(folder)
    good = path.read_bytes()
    spoil(path)
    assert pack(folder) == path
    assert path.read_bytes() == good
    (warning,) = [record.getMessage() for record in caplog.records if record.levelno == logging.WARNING]
    assert str(path) in warning
    assert "damaged" in warning
    assert says in warning


@pytest.mark.parametrize("dtype", [np.float16, np.float32])
def test_a_row_that_changed_on_the_disk_is_read_from_the_file(
    folder: Path, dtype: Any, caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = pack(folder)
    good = path.read_bytes()
    flip(path, HEADER_BYTES + 7 * ROW + 11)
    rows = [3, 7, 1, 7]
    expected = rounded(read(folder / "visual_feature.h5"))[rows].astype(dtype)
    with open_folder(folder, features="float16") as data:
        data.use_pack(make=True)
        assert not caplog.records or "damaged" not in caplog.text
        assert np.array_equal(data.read_visual(rows, dtype), expected)
        assert "row 7 is not what was written" in caplog.text
        assert not path.exists()
        assert np.array_equal(data.read_visual(rows, dtype), expected)
    assert caplog.text.count("damaged") == 1
    assert pack(folder) == path
    assert path.read_bytes() == good


def test_a_pack_that_shrinks_while_it_is_read(folder: Path, caplog: pytest.LogCaptureFixture) -> None:
    path = pack(folder)
    with open_folder(folder, features="float16") as data:
        data.use_pack(make=True)
        os.truncate(path, HEADER_BYTES + 2 * ROW + 5)
        assert np.array_equal(data.read_visual(range(12), np.float16), rounded(read(folder / "visual_feature.h5")))
    assert "ends within row 2" in caplog.text


def test_rows_that_float16_cannot_hold(folder: Path, cache: Path, caplog: pytest.LogCaptureFixture) -> None:
    values = read(folder / "visual_feature.h5")
    values[5, 1, 1, 1, 2] = 65520
    values[6] *= 1e-3
    values[7, 0, 0, 0, 0] = np.inf
    values[8, 0, 0, 0, 0] = np.nan
    values[9] = 0
    write(folder / "visual_feature.h5", values)
    expected = rounded(values).astype(np.float32)
    expected[5:7] = values[5:7].astype(np.float32)
    for _ in range(2):
        with open_folder(folder, features="float16") as data:
            data.use_pack(make=True)
            assert np.array_equal(data.read_visual(range(12)), expected, equal_nan=True)
            with pytest.raises(UserError, match=r"row 5 .*train\.features: stored"):
                data.read_visual([5], np.float16)
    assert names(cache) == ["visual_feature.refused"]
    assert "largest value of row 5 is 65520" in caplog.text
    # The second time the file is not read in vain.
    assert "float16 cannot: it is read as stored" in caplog.text
    assert [info.state for info in list_packs()] == ["refused"]
    clear_packs()
    assert names(cache) == []


def test_no_room_on_the_disk_is_told(
    folder: Path, cache: Path, caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    usage = namedtuple("usage", "total used free")
    with monkeypatch.context() as patch:
        patch.setattr(shutil, "disk_usage", lambda _: usage(10, 9, 1))
        with open_folder(folder, features="float16") as data:
            data.use_pack(make=True)
            assert np.array_equal(data.read_visual([2], np.float16), rounded(read(folder / "visual_feature.h5"))[[2]])
    assert "read as stored, which is slower: its pack takes" in caplog.text
    assert names(cache) == []

    def full(*_: Any) -> int:
        raise OSError(errno.ENOSPC, "No space left on device")

    with monkeypatch.context() as patch, open_folder(folder, features="float16") as data:
        patch.setattr(packing.os, "pwrite", full)
        data.use_pack(make=True)
    assert "slower: No space left on device" in caplog.text
    assert names(cache) == []


def test_the_least_recently_used_packs_make_room(tmp_path: Path, cache: Path, caplog: pytest.LogCaptureFixture) -> None:
    folders = [make_folder(tmp_path / f"data{seed}", seed=seed) for seed in range(4)]
    paths = [pack(folder) for folder in folders[:3]]
    size = paths[0].stat().st_size
    for age, path in enumerate(paths):
        os.utime(path, (time.time() - 100 - age,) * 2)
    # The oldest is used again.
    assert pack(folders[2]) == paths[2]
    set_limit(3 * size)
    assert limit_bytes() == 3 * size
    fourth = pack(folders[3])
    assert [path.exists() for path in [*paths, fourth]] == [True, False, True, True]
    with open_folder(folders[0], features="float16") as data:
        data.use_pack(make=False)
        set_limit(size)
        # That in use stays; with it and no more the limit is full.
        assert {info.path: info.state for info in list_packs()} == {paths[0]: "in use"}
        with open_folder(folders[1], features="float16") as other:
            other.use_pack(make=True)
            assert other._visual[0].pack is None
            assert "pass the limit" in caplog.text
    assert pack(folders[1]).exists()
    assert not paths[0].exists()


def test_what_cannot_fit_in_any_case_drives_nothing_out(
    tmp_path: Path, cache: Path, caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    paths = [pack(make_folder(tmp_path / f"data{seed}", seed=seed)) for seed in range(2)]
    large = make_folder(tmp_path / "large", 400)
    held = sum(path.stat().st_size for path in paths)
    usage = namedtuple("usage", "total used free")
    for message, limit, free in (("pass the limit", held, 1 << 40), ("can be had", 1 << 40, 1)):
        set_limit(limit)
        monkeypatch.setattr(shutil, "disk_usage", lambda _, free=free: usage(0, 0, free))
        with open_folder(large, features="float16") as data:
            assert data.use_pack(make=True)
        assert message in caplog.text
        assert all(path.exists() for path in paths)


def test_listing_and_clearing(tmp_path: Path, cache: Path) -> None:
    folders = [make_folder(tmp_path / f"data{seed}", seed=seed) for seed in range(2)]
    first, second = (pack(folder, "weak") for folder in folders)
    found = list_packs()
    assert {info.source for info in found} >= {str(folder / "visual_feature.h5") for folder in folders}
    assert {info.fingerprint for info in found} == {folder_fingerprint(folder) for folder in folders}
    assert all(info.size == info.path.stat().st_size and info.state == "ready" for info in found)
    with open_folder(folders[0], features="float16") as data:
        data.use_pack(make=False)
        gone, kept = clear_packs(data.fingerprint)
    assert [info.path for info in kept] == [first]
    assert [info.path.name for info in gone] == [first.name.replace("feature.", "feature_noisy.")]
    gone, kept = clear_packs()
    assert len(gone) == 3
    assert not kept
    assert not second.exists()
    assert list_packs() == []


CHILD = """
import logging, sys, time
from pathlib import Path
from cmran.data import packing
from cmran.data.features import open_folder
logging.basicConfig(level=logging.INFO)
packing.BLOCK_BYTES = 1 << 16
real = packing._write_all
calls = 0
def slow(*arguments):
    global calls
    calls += 1
    print("writing", flush=True)
    # In the middle of the work: wait for a sign.
    while calls == 3 and not Path(sys.argv[2]).exists():
        time.sleep(0.01)
    real(*arguments)
packing._write_all = slow
with open_folder(Path(sys.argv[1]), features="float16") as data:
    data.use_pack(make=True)
    print("packed", data._visual[0].pack is not None, float(data.read_visual([3]).sum()), flush=True)
"""


def child(folder: Path, *, until: Path) -> subprocess.Popen[str]:
    """A process that packs, and waits at its third block until the file is there."""
    return subprocess.Popen(
        [sys.executable, "-c", CHILD, str(folder), str(until)],
        cwd=ROOT, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True,
    )  # fmt: skip


def read_on(process: subprocess.Popen[str]) -> None:
    """Until it waits."""
    assert process.stdout is not None
    assert [process.stdout.readline() for _ in range(3)] == ["writing\n"] * 3


@pytest.fixture
def larger(tmp_path: Path) -> Path:
    folder = make_folder(tmp_path / "larger", 12, visual_features=400)
    folder_fingerprint(folder)
    return folder


def test_killed_while_packing_leaves_nothing_that_looks_whole(larger: Path, cache: Path, tmp_path: Path) -> None:
    process = child(larger, until=tmp_path / "never")
    read_on(process)
    os.kill(process.pid, signal.SIGKILL)
    process.communicate()
    assert names(cache) == ["visual_feature.partial"]
    assert [info.state for info in list_packs()] == ["unfinished"]
    partial = next(cache.glob("*.partial"))
    # Even under the name of a pack it is none.
    with pytest.raises(packing.PackError):
        packing.Pack(partial)
    path = pack(larger)
    assert names(cache) == ["visual_feature.pack"]
    with open_folder(larger, features="float16") as data:
        data.use_pack(make=False)
        assert data._visual[0].pack is not None
        assert np.array_equal(data.read_visual(range(12), np.float16), rounded(read(larger / "visual_feature.h5")))
    assert path.exists()


def test_interrupted_while_packing_leaves_nothing(larger: Path, cache: Path, tmp_path: Path) -> None:
    process = child(larger, until=tmp_path / "go")
    read_on(process)
    process.send_signal(signal.SIGINT)
    (tmp_path / "go").touch()
    process.communicate()
    assert process.returncode != 0
    assert names(cache) == []


def test_two_processes_make_one_pack(larger: Path, cache: Path, tmp_path: Path) -> None:
    first = child(larger, until=tmp_path / "go")
    read_on(first)
    assert [info.state for info in list_packs()] == ["being made"]
    # What is being made is not taken for waste.
    assert clear_packs()[0] == []
    second = child(larger, until=tmp_path / "go")
    assert second.stderr is not None
    assert "waiting for it" in second.stderr.readline()
    (tmp_path / "go").touch()
    outputs = [process.communicate(timeout=60)[0] for process in (first, second)]
    assert [process.returncode for process in (first, second)] == [0, 0]
    assert outputs[0].splitlines()[-1] == outputs[1].strip()
    assert outputs[1].startswith("packed True")
    assert names(cache) == ["visual_feature.pack"]


def test_the_second_goes_on_when_the_first_is_killed(larger: Path, cache: Path, tmp_path: Path) -> None:
    first = child(larger, until=tmp_path / "go")
    read_on(first)
    second = child(larger, until=tmp_path / "go")
    assert second.stderr is not None
    assert "waiting for it" in second.stderr.readline()
    first.kill()
    first.communicate()
    (tmp_path / "go").touch()
    output, _ = second.communicate(timeout=60)
    assert output.splitlines()[-1].startswith("packed True")
    assert names(cache) == ["visual_feature.pack"]


@pytest.mark.parametrize("replaced", [True, False])
def test_a_pack_that_goes_between_its_opening_and_its_lock(
    folder: Path, cache: Path, monkeypatch: pytest.MonkeyPatch, replaced: bool
) -> None:
    """The lock is then on a file without a name, which keeps nobody from removing the one that has it."""
    path = pack(folder)
    other = Path(shutil.copy(path, cache / "other"))
    real = fcntl.flock

    def flock(descriptor: int, operation: int) -> None:
        if other.exists():
            path.unlink()
            os.replace(other, path if replaced else cache / "gone")
        real(descriptor, operation)

    monkeypatch.setattr(fcntl, "flock", flock)
    if replaced:
        with contextlib.closing(Pack(path)) as found:
            assert os.fstat(found._descriptor).st_ino == path.stat().st_ino
    else:
        with pytest.raises(FileNotFoundError):
            Pack(path)


@pytest.fixture
def locked_away(monkeypatch: pytest.MonkeyPatch) -> Callable[[Path], None]:
    """Files that may not be opened, even by root."""

    def lock(path: Path) -> None:
        real = os.open

        def opened(name: Any, *options: Any, **more: Any) -> int:
            if str(name) == str(path):
                raise PermissionError(errno.EACCES, os.strerror(errno.EACCES), str(path))
            return real(name, *options, **more)

        monkeypatch.setattr(os, "open", opened)

    return lock


def test_a_pack_of_another_user_is_told_and_left_alone(
    folder: Path,
    cache: Path,
    locked_away: Callable[[Path], None],
    monkeypatch: pytest.MonkeyPatch,
    caplog: pytest.LogCaptureFixture,
) -> None:
    path = pack(folder)
    locked_away(path)
    monkeypatch.setattr(os, "access", lambda name, _: str(name) != str(path))
    expected = rounded(read(folder / "visual_feature.h5"))
    for make in (True, False):
        with open_folder(folder, features="float16") as data:
            assert data.use_pack(make=make) == [str(folder / "visual_feature.h5")]
            assert np.array_equal(data.read_visual(range(12), np.float16), expected[:12])
    assert caplog.text.count("may not be read: ask its owner, or set XDG_CACHE_HOME") == 2
    with pytest.raises(UserError, match=r"cannot read .*Permission denied: .*XDG_CACHE_HOME"):
        Pack(path)
    assert [(info.path, info.state) for info in list_packs()] == [(path, "not ours")]
    gone, kept = clear_packs()
    assert (gone, [info.path for info in kept]) == ([], [path])
    assert path.exists()


@pytest.mark.parametrize("replaced", [True, False])
def test_a_source_that_changes_while_it_is_packed_gives_no_pack(
    folder: Path, cache: Path, monkeypatch: pytest.MonkeyPatch, replaced: bool
) -> None:
    """The fingerprint would vouch for values that are no more, or not yet."""
    path, real = folder / "visual_feature.h5", packing.StoredArray.sweep

    def sweep(self: Any) -> Any:
        values = read(path)
        values[-1] += 1
        if replaced:
            write(folder / "new.h5", values)
            os.replace(folder / "new.h5", path)
        else:
            with h5py.File(path, "r+") as file:
                file["avadataset"][...] = values
        return real(self)

    monkeypatch.setattr(packing.StoredArray, "sweep", sweep)
    with open_folder(folder, features="float16") as data, pytest.raises(UserError, match="changed while it was packed"):
        data.use_pack(make=True)
    assert names(cache) == []


def test_a_pack_in_a_cache_that_cannot_be_written(
    folder: Path, cache: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    path = pack(folder)

    def refused(*_: Any, **__: Any) -> None:
        raise OSError(errno.EROFS, os.strerror(errno.EROFS))

    for name in ("utime", "unlink"):
        monkeypatch.setattr(os, name, refused)
    with open_folder(folder, features="float16") as data:
        assert data.use_pack(make=True) == []
    gone, kept = clear_packs()
    assert (gone, [info.path for info in kept]) == ([], [path])
    # Damaged: the file itself is read.
    with path.open("r+b") as file:
        file.seek(HEADER_BYTES + 40)
        file.write(b"damage")
    expected = rounded(read(folder / "visual_feature.h5"))
    with open_folder(folder, features="float16") as data:
        data.use_pack(make=False)
        assert np.array_equal(data.read_visual(range(12), np.float16), expected[:12])
    assert "is damaged" in caplog.text
    with path.open("r+b") as file:
        file.write(b"damage")
    with open_folder(folder, features="float16") as data:
        assert len(data.use_pack(make=False)) == 1


@pytest.mark.parametrize("limit", ["Infinity", "-5", '"much"', "[" * 100_000, "{}"])
def test_a_damaged_limit_is_the_usual_one(folder: Path, cache: Path, limit: str) -> None:
    pack(folder)
    (cache / "settings.json").write_text(f'{{"limit_bytes": {limit}}}')
    assert limit_bytes() == packing.LIMIT_BYTES


def test_a_pack_of_another_version_is_made_anew(folder: Path, caplog: pytest.LogCaptureFixture) -> None:
    path = pack(folder)
    text = b"{}"
    head = packing.MAGIC + len(text).to_bytes(4, "little") + hashlib.blake2b(text, digest_size=16).digest() + text
    path.write_bytes(head.ljust(path.stat().st_size, b"\0"))
    assert pack(folder) == path
    assert "its header lacks" in caplog.text
    assert [info.state for info in list_packs()] == ["ready"]


def test_a_source_cut_short_is_told_and_leaves_nothing(folder: Path, cache: Path) -> None:
    with open_folder(folder, features="float16") as data:
        os.truncate(folder / "visual_feature.h5", 4000)
        with pytest.raises(UserError, match="cut short"):
            data.use_pack(make=True)
    assert names(cache) == []


def test_reading_ahead_starts_no_threads_of_torch(tmp_path: Path) -> None:
    """Conversions in the reading thread stay in that thread: others would take the cores of the training."""
    # A row of maps, and the audio and the labels of a batch, are each more than torch converts in one thread.
    folder = make_folder(tmp_path / "wide", 130, visual_features=1024, audio_features=30, segments=10)
    code = f"""
import os, torch
from cmran.data.features import open_folder, iterate
torch.set_num_threads(4)
before = len(os.listdir("/proc/self/task"))
with open_folder({str(folder)!r}, features="float16") as data:
    data.use_pack(make=True)
    counts = [len(os.listdir("/proc/self/task"))
              for dtype in (torch.float32, torch.bfloat16)
              for _ in iterate(data, range(130), 120, labels="segments", dtype=dtype)]
print(max(counts) - before)
"""
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, check=True)
    # The reading thread alone.
    assert int(done.stdout) == 1


@pytest.mark.parametrize("dtype", [torch.float16, torch.float32, torch.float64, torch.bfloat16])
def test_batches_from_a_pack(folder: Path, dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch) -> None:
    pack(folder, "weak")
    rows = [14, 3, 0, 12, 7]
    visual = np.concatenate([read(folder / "visual_feature.h5"), read(folder / "visual_feature_noisy.h5")])
    expected = torch.from_numpy(rounded(visual)[rows]).to(dtype)
    with open_folder(folder, mode="weak", features="float16") as data:
        data.use_pack(make=False)
        batches = list(iterate(data, rows, 2, labels="video", dtype=dtype))
    assert torch.equal(torch.cat([batch.visual for batch in batches]), expected)
    assert {batch.visual.dtype for batch in batches} == {batch.audio.dtype for batch in batches} == {dtype}


@pytest.mark.parametrize("kind", ["float16", "stored"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_batches_in_memory_that_is_used_again(folder: Path, kind: Any, dtype: torch.dtype) -> None:
    rows = [14, 3, 0, 12, 7, 1, 2, 3, 4, 5, 6, 8, 9, 10, 11, 13, 7]
    with open_folder(folder, mode="weak", features=kind) as data:
        expected = list(iterate(data, rows, 2, labels="segments", dtype=dtype))
        places = set()
        again = iterate(data, rows, 2, labels="segments", dtype=dtype, reuse=True)
        for batch, other in zip(again, expected, strict=True):
            places.add(batch.visual.data_ptr())
            # While the reader has time to fill all it may.
            time.sleep(0.02)
            assert batch.rows.tolist() == other.rows.tolist()
            assert batch.labels is not None
            assert other.labels is not None
            assert torch.equal(batch.visual, other.visual)
            assert torch.equal(batch.audio, other.audio)
            assert torch.equal(batch.labels, other.labels)
        # Nine batches, the short one in memory of its own.
        assert len(places) <= READ_AHEAD + 3


def test_the_full_visual_file_is_packed_in_little_memory(tmp_path: Path) -> None:
    """A tenth of the published size, of zeros that take no room on the disk."""
    folder = tmp_path / "large"
    folder.mkdir()
    for name, shape in (("visual_feature.h5", (400, 10, 7, 7, 512)), ("audio_feature.h5", (400, 10, 128))):
        with h5py.File(folder / name, "w") as file:
            plist = h5py.h5p.create(h5py.h5p.DATASET_CREATE)
            plist.set_alloc_time(h5py.h5d.ALLOC_TIME_EARLY)
            plist.set_fill_time(h5py.h5d.FILL_TIME_NEVER)
            h5py.h5d.create(file.id, b"avadataset", h5py.h5t.IEEE_F64LE, h5py.h5s.create_simple(shape), plist)
    code = f"""
import resource, torch
from cmran.data.features import open_folder
with open_folder({str(folder)!r}, need_labels=False, features="float16") as data:
    data.fingerprint
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    data.use_pack(make=True)
    assert data._visual[0].pack is not None
print(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before)
"""
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, check=True)
    assert int(done.stdout) < 300 << 10
    clear_packs()


# --- cache folders that cannot be used ------------------------------------------------------------------------------


def unlocked(monkeypatch: pytest.MonkeyPatch, number: int) -> None:
    """From now on the folder of the packs has no locks."""
    real = fcntl.flock

    def flock(file: Any, operation: int) -> None:
        descriptor = file if isinstance(file, int) else file.fileno()
        if "/packs/" in os.readlink(f"/proc/self/fd/{descriptor}"):
            raise OSError(number, os.strerror(number))
        real(file, operation)

    monkeypatch.setattr(fcntl, "flock", flock)


def cache_in_the_way(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    (tmp_path / "cache").write_text("a file, not a folder")


def no_home(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    def nobody() -> Path:
        raise RuntimeError("Could not determine home directory.")

    monkeypatch.delenv("XDG_CACHE_HOME")
    monkeypatch.setattr(Path, "home", nobody)


def packs_in_the_way(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    (tmp_path / "cache" / "cmran").mkdir(parents=True)
    (tmp_path / "cache" / "cmran" / "packs").write_text("a file, not a folder")


def refusing(number: int) -> Callable[[pytest.MonkeyPatch, Path], None]:
    def refuse(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
        """No file and no folder can be created in the cache."""
        real_open, real_mkdir, real_temporary = os.open, os.mkdir, tempfile.mkstemp
        error = OSError(number, os.strerror(number))

        def in_cache(path: Any) -> bool:
            return str(path).startswith(str(tmp_path / "cache"))

        def opened(path: Any, flags: int, *more: Any, **options: Any) -> int:
            if flags & (os.O_CREAT | os.O_WRONLY | os.O_RDWR) and in_cache(path):
                raise error
            return real_open(path, flags, *more, **options)

        def made(path: Any, *more: Any, **options: Any) -> None:
            if in_cache(path):
                raise error
            real_mkdir(path, *more, **options)

        def temporary(*more: Any, **options: Any) -> Any:
            if in_cache(options.get("dir")):
                raise error
            return real_temporary(*more, **options)

        monkeypatch.setattr(os, "open", opened)
        monkeypatch.setattr(os, "mkdir", made)
        monkeypatch.setattr(tempfile, "mkstemp", temporary)

    return refuse


UNUSABLE = {
    "no locks": lambda patch, _: unlocked(patch, errno.ENOLCK),
    "no lock call": lambda patch, _: unlocked(patch, errno.ENOSYS),
    "a file in place of the cache": cache_in_the_way,
    "a file in place of the packs": packs_in_the_way,
    "no home": no_home,
    "read-only": refusing(errno.EROFS),
    "no permission": refusing(errno.EACCES),
    "full": refusing(errno.ENOSPC),
    "no quota": refusing(errno.EDQUOT),
}


@pytest.mark.parametrize("existing", [False, True])
@pytest.mark.parametrize("why", UNUSABLE)
def test_a_cache_that_cannot_be_used_costs_time_alone(
    folder: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    caplog: pytest.LogCaptureFixture,
    why: str,
    existing: bool,
) -> None:
    if existing:
        if "in place" in why:
            pytest.skip("then it does not exist")
        packing.packs_dir()
    monkeypatch.setattr("cmran.data.fingerprint.SETTLED_NS", -1)
    UNUSABLE[why](monkeypatch, tmp_path)
    expected = rounded(np.concatenate([read(folder / f"visual_feature{end}.h5") for end in ("", "_noisy")]))
    # Two runs of one process, two files each, and the fingerprint: one warning.
    for make in (True, False):
        with open_folder(folder, mode="weak", features="float16") as data:
            assert len(data.use_pack(make=make)) == 2
            assert np.array_equal(data.read_visual(range(len(expected)), np.float16), expected)
    warnings = [record.message for record in caplog.records if record.levelno >= logging.WARNING]
    assert len(warnings) == 1
    assert "XDG_CACHE_HOME" in warnings[0]
    assert "slower" in warnings[0]


@pytest.mark.parametrize("why", UNUSABLE)
def test_pack_and_cache_fail_where_there_is_no_cache(
    folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], why: str
) -> None:
    UNUSABLE[why](monkeypatch, tmp_path)
    assert main(["pack", str(folder)]) == 1
    told = capsys.readouterr().err.splitlines()[-1]
    assert told.startswith("error: ")
    assert "XDG_CACHE_HOME" in told
    if why in ("a file in place of the cache", "a file in place of the packs", "no home"):
        assert main(["cache"]) == 1
        assert capsys.readouterr().err.splitlines()[-1].startswith("error: ")


def test_data_that_change_are_an_error_and_no_fault_of_the_cache(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(packing.StoredArray, "is_as_opened", lambda _: False)
    with open_folder(folder, features="float16") as data, pytest.raises(UserError, match="was changed while"):
        data.use_pack(make=True)


def test_packs_of_a_folder_that_is_read_only_are_used(
    folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    pack(folder)
    refusing(errno.EROFS)(monkeypatch, tmp_path)
    with open_folder(folder, features="float16") as data, sources_untouched(monkeypatch):
        assert data.use_pack(make=True) == []
        data.read_visual([0], np.float16)
    assert caplog.records == []
    assert [info.state for info in list_packs()] == ["ready"]


def test_calls_that_only_help_may_be_missing(folder: Path, tmp_path: Path) -> None:
    code = (
        "import sys; from pathlib import Path; from cmran.data.features import open_folder\n"
        "with open_folder(Path(sys.argv[1]), features='float16') as data: print(data.use_pack(make=True))\n"
        "with open_folder(Path(sys.argv[1]), features='float16') as data: print(data.use_pack(make=False))"
    )
    for number in (errno.EINVAL, errno.ENOTSUP):
        cache = tmp_path / "lacking" / str(number)
        calls = "sync,syncfolder,utime,chmod,fadvise,preadv2,statvfs"
        done = lacking("-c", code, folder, calls=calls, number=number, XDG_CACHE_HOME=cache)
        assert done.stdout == "[]\n[]\n", done.stderr
        assert "warning" not in done.stderr.lower()
        assert list(cache.glob("**/*.pack"))
