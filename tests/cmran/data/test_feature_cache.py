import contextlib
import errno
import fcntl
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

from cmran.data import feature_cache
from cmran.data.dataset import open_folder
from cmran.data.feature_cache import (
    FeatureCache,
    cache_limit,
    cache_path,
    clear_caches,
    list_caches,
    set_cache_limit,
    to_half,
    widen,
)
from cmran.data.fingerprint import folder_fingerprint
from cmran.data.loader import READ_AHEAD, iterate
from cmran.errors import CacheError, CmranError, DataError
from flows.cli import main
from tests.conftest import ROOT
from tests.filesystems import lacking
from tests.helpers import make_folder, read, write


@pytest.fixture(autouse=True)
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    monkeypatch.setattr("cmran.utils.files._without_cache", set())
    return tmp_path / "cache" / "cmran" / "features"


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    return make_folder(tmp_path / "data")


def rounded(values: np.ndarray) -> np.ndarray:
    with np.errstate(over="ignore"):
        return values.astype(np.float32).astype(np.float16)


def build(folder: Path, mode: Any = "full") -> Path:
    """Build the caches of the folder and return the array of its visual maps."""
    with open_folder(folder, mode=mode, features="float16") as data:
        data.use_feature_cache(build=True)
        return cache_path(data.fingerprint, data._visual[0].source)


def names(cache: Path) -> list[str]:
    return sorted(path.name.lstrip(".").split(".", 1)[1] for path in cache.iterdir())


ARRAY = ["visual_feature.json", "visual_feature.npy"]


def spoil_sidecar(path: Path, text: str) -> None:
    path.with_suffix(".json").write_text(text)


@contextlib.contextmanager
def sources_untouched(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """Within the block, reading a feature file fails."""

    def forbidden(*_: Any, **__: Any) -> None:
        raise AssertionError("a feature file is read")

    with monkeypatch.context() as patch:
        patch.setattr("cmran.data.hdf5.StoredArray.read", forbidden)
        patch.setattr("cmran.data.hdf5.StoredArray.read_block", forbidden)
        yield


def test_conversion_to_float16_equals_that_of_numpy() -> None:
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
def test_values_are_the_rounded_values_of_the_file(
    tmp_path: Path, sizes: dict[str, int], dtype: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    # Several blocks, the last one short.
    folder = make_folder(tmp_path / "any", **sizes)
    values = read(folder / "visual_feature.h5")
    monkeypatch.setattr(feature_cache, "BLOCK_BYTES", 3 * values[0].nbytes)
    noisy = read(folder / "visual_feature_noisy.h5")
    write(folder / "visual_feature.h5", values.astype(dtype))
    expected = rounded(np.concatenate([values.astype(dtype), noisy]))
    rows = [len(expected) - 1, 1, 1, 0, 3, len(values) - 1]
    with open_folder(folder, mode="weak", features="float16") as data:
        for cached in (False, True):
            if cached:
                data.use_feature_cache(build=True)
            for wanted in (np.float16, np.float32, np.float64):
                assert np.array_equal(data.read_visual(rows, wanted), expected[rows].astype(wanted))
            out = np.zeros((2, *expected.shape[1:-1], 2 * expected.shape[-1]), np.float32)
            data.read_visual([2, 1], out=out[..., ::2])
            assert np.array_equal(out[..., ::2], expected[[2, 1]].astype(np.float32))
            # Audio features are not rounded.
            assert np.array_equal(data.read_audio([0], np.float64), read(folder / "audio_feature.h5")[[0]])
            with pytest.raises(IndexError):
                data.read_visual([len(expected)])
    with open_folder(folder, mode="weak") as data:
        stored = data.read_visual(rows[:2], np.float64)
    assert np.array_equal(stored, np.concatenate([values.astype(dtype), noisy])[rows[:2]])


@pytest.mark.parametrize(
    "kwargs", [{"chunks": (5, 4, 1, 2, 6)}, {"compression": "gzip"}, {"dtype": "f2", "chunks": (2, 4, 2, 2, 6)}]
)
def test_chunked_and_compressed_files(folder: Path, kwargs: dict[str, Any]) -> None:
    write(folder / "visual_feature.h5", read(folder / "visual_feature.h5"), **kwargs)
    expected = rounded(read(folder / "visual_feature.h5")).astype(np.float32)
    with open_folder(folder, features="float16") as data:
        assert np.array_equal(data.read_visual(range(12)), expected)
        data.use_feature_cache(build=True)
        assert data._visual[0].cache is not None
        assert np.array_equal(data.read_visual(range(11, -1, -1)), expected[::-1])


def test_float16_file_needs_no_cache(tmp_path: Path, cache: Path) -> None:
    folder = make_folder(tmp_path / "half", dtype="float16")
    with open_folder(folder, mode="weak", features="float16") as data:
        data.use_feature_cache(build=True)
        assert np.array_equal(data.read_visual([3], np.float16), read(folder / "visual_feature.h5")[[3]])
    assert not cache.exists()


def test_cache_is_used_by_later_runs(folder: Path, cache: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    build(folder, "weak")
    assert names(cache) == [*ARRAY, "visual_feature_noisy.json", "visual_feature_noisy.npy"]
    stored = np.load(cache / f"{folder_fingerprint(folder)}.visual_feature.npy")
    assert np.array_equal(stored, rounded(read(folder / "visual_feature.h5")))
    with sources_untouched(monkeypatch):
        for building in (True, False):
            with open_folder(folder, features="float16") as data:
                data.use_feature_cache(build=building)
                assert np.array_equal(
                    data.read_visual([7], np.float16), rounded(read(folder / "visual_feature.h5"))[[7]]
                )
        with open_folder(folder, features="stored") as data:
            data.use_feature_cache(build=True)
            with pytest.raises(AssertionError, match="is read"):
                data.read_visual([7])


def test_no_cache_is_built_unless_requested(folder: Path, cache: Path) -> None:
    with open_folder(folder, features="float16") as data:
        data.use_feature_cache(build=False)
        assert data.read_visual([0]).any()
    assert not list(cache.iterdir())


def test_changed_content_gets_another_cache(folder: Path, cache: Path) -> None:
    first = build(folder)
    values = read(folder / "visual_feature.h5")
    values[3] += 1
    write(folder / "visual_feature.h5", values)
    assert build(folder) != first
    with open_folder(folder, features="float16") as data:
        data.use_feature_cache(build=False)
        assert np.array_equal(data.read_visual([3], np.float16), rounded(values)[[3]])


def flip(path: Path, position: int) -> None:
    with path.open("r+b") as file:
        file.seek(position)
        byte = file.read(1)
        file.seek(position)
        file.write(bytes([byte[0] ^ 4]))


HEADER, ROW = 128, 4 * 2 * 2 * 6 * 2
"""Bytes of the header and of a row of the small folder."""


@pytest.mark.parametrize(
    ("spoil", "says"),
    [
        (lambda path: os.truncate(path, path.stat().st_size - 1), "bytes, expected"),
        (lambda path: os.truncate(path, 0), "header"),
        (lambda path: os.truncate(path, 100), "header"),
        (lambda path: flip(path, 2), "header"),
        (lambda path: flip(path, 9), "header"),
        (lambda path: flip(path, 60), "header"),
        (lambda path: path.write_bytes(path.read_bytes() + b"x"), "bytes, expected"),
        (lambda path: path.write_bytes(b"\0" * path.stat().st_size), "header"),
        (lambda path: path.with_suffix(".json").unlink(), "sidecar"),
        (lambda path: spoil_sidecar(path, ""), "sidecar"),
        (lambda path: spoil_sidecar(path, "[" * 100_000), "sidecar"),
        (lambda path: spoil_sidecar(path, "{}"), "sidecar"),
        (lambda path: spoil_sidecar(path, '{"crc32": [1, 2]}'), "sidecar"),
        (lambda path: spoil_sidecar(path, '{"crc32": ["a"]}'), "sidecar"),
        (lambda path: spoil_sidecar(path, '{"crc32": [-1]}'), "sidecar"),
    ],
)
def test_damaged_cache_is_reported_and_rebuilt(
    folder: Path, spoil: Any, says: str, caplog: pytest.LogCaptureFixture
) -> None:
    path = build(folder)
    good = path.read_bytes()
    spoil(path)
    assert build(folder) == path
    assert path.read_bytes() == good
    (warning,) = [record.getMessage() for record in caplog.records if record.levelno == logging.WARNING]
    assert str(path) in warning
    assert "damaged" in warning
    assert says in warning


@pytest.mark.parametrize("dtype", [np.float16, np.float32])
def test_damaged_row_is_read_from_the_feature_file(
    folder: Path, dtype: Any, caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = build(folder)
    good = path.read_bytes()
    flip(path, HEADER + 7 * ROW + 11)
    rows = [3, 7, 1, 7]
    expected = rounded(read(folder / "visual_feature.h5"))[rows].astype(dtype)
    with open_folder(folder, features="float16") as data:
        data.use_feature_cache(build=True)
        assert not caplog.records or "is damaged" not in caplog.text
        assert np.array_equal(data.read_visual(rows, dtype), expected)
        assert "the checksum of row 7 is wrong" in caplog.text
        assert not path.exists()
        assert np.array_equal(data.read_visual(rows, dtype), expected)
    assert caplog.text.count("is damaged") == 1
    assert build(folder) == path
    assert path.read_bytes() == good


def test_cache_truncated_while_in_use(folder: Path, caplog: pytest.LogCaptureFixture) -> None:
    path = build(folder)
    with open_folder(folder, features="float16") as data:
        data.use_feature_cache(build=True)
        os.truncate(path, HEADER + 2 * ROW + 5)
        assert np.array_equal(data.read_visual(range(12), np.float16), rounded(read(folder / "visual_feature.h5")))
    assert "ends within row 2" in caplog.text


def test_rows_that_do_not_fit_float16(
    folder: Path, cache: Path, caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
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
            data.use_feature_cache(build=True)
            assert np.array_equal(data.read_visual(range(12)), expected, equal_nan=True)
            with pytest.raises(CmranError, match=r"row 5: .*train\.features: stored"):
                data.read_visual([5], np.float16)
    assert names(cache) == ["visual_feature.json"]
    assert caplog.text.count("largest value of row 5 is 65520") == 1
    # Another run does not read the file again to find the row.
    with open_folder(folder, features="float16") as data, sources_untouched(monkeypatch):
        assert data.use_feature_cache(build=True) == [str(folder / "visual_feature.h5")]
    assert list_caches() == []
    clear_caches()
    assert names(cache) == []


def test_full_disk_is_reported_and_the_file_read(
    folder: Path, cache: Path, caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    usage = namedtuple("usage", "total used free")
    with monkeypatch.context() as patch:
        patch.setattr(shutil, "disk_usage", lambda _: usage(10, 9, 1))
        with open_folder(folder, features="float16") as data:
            data.use_feature_cache(build=True)
            assert np.array_equal(data.read_visual([2], np.float16), rounded(read(folder / "visual_feature.h5"))[[2]])
    assert "the feature cache needs" in caplog.text
    assert names(cache) == []

    def full(*_: Any) -> None:
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr("cmran.utils.files._without_cache", set())
    with monkeypatch.context() as patch, open_folder(folder, features="float16") as data:
        patch.setattr(feature_cache, "_write_block", full)
        data.use_feature_cache(build=True)
    assert "No space left on device: free space" in caplog.text
    assert caplog.text.count("slower") == 2
    assert names(cache) == []


def test_least_recently_used_caches_are_removed(tmp_path: Path, cache: Path, caplog: pytest.LogCaptureFixture) -> None:
    folders = [make_folder(tmp_path / f"data{seed}", seed=seed) for seed in range(4)]
    paths = [build(folder) for folder in folders[:3]]
    size = paths[0].stat().st_size
    for age, path in enumerate(paths):
        os.utime(path, (time.time() - 100 - age,) * 2)
    # Use the oldest one again.
    assert build(folders[2]) == paths[2]
    set_cache_limit(3 * size)
    assert cache_limit() == 3 * size
    fourth = build(folders[3])
    assert [path.exists() for path in [*paths, fourth]] == [True, False, True, True]
    with open_folder(folders[0], features="float16") as data:
        data.use_feature_cache(build=False)
        set_cache_limit(size)
        # The one in use stays, and it alone reaches the limit.
        assert {info.path: info.state for info in list_caches()} == {paths[0]: "in use"}
        with open_folder(folders[1], features="float16") as other:
            other.use_feature_cache(build=True)
            assert other._visual[0].cache is None
            assert "exceeds the limit" in caplog.text
    assert build(folders[1]).exists()
    assert not paths[0].exists()


def test_cache_that_cannot_fit_removes_nothing(
    tmp_path: Path, cache: Path, caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    paths = [build(make_folder(tmp_path / f"data{seed}", seed=seed)) for seed in range(2)]
    large = make_folder(tmp_path / "large", 400)
    total = sum(path.stat().st_size for path in paths)
    usage = namedtuple("usage", "total used free")
    for message, limit, free in (("exceeds the limit", total, 1 << 40), ("are available", 1 << 40, 1)):
        set_cache_limit(limit)
        monkeypatch.setattr("cmran.utils.files._without_cache", set())
        monkeypatch.setattr(shutil, "disk_usage", lambda _, free=free: usage(0, 0, free))
        with open_folder(large, features="float16") as data:
            assert data.use_feature_cache(build=True)
        assert message in caplog.text
        assert all(path.exists() for path in paths)


def test_list_and_clear(tmp_path: Path, cache: Path) -> None:
    folders = [make_folder(tmp_path / f"data{seed}", seed=seed) for seed in range(2)]
    first, second = (build(folder, "weak") for folder in folders)
    found = list_caches()
    assert {info.source for info in found} >= {str(folder / "visual_feature.h5") for folder in folders}
    assert {info.fingerprint for info in found} == {folder_fingerprint(folder) for folder in folders}
    assert all(info.size == info.path.stat().st_size and info.state == "ready" for info in found)
    with open_folder(folders[0], features="float16") as data:
        data.use_feature_cache(build=False)
        removed, kept = clear_caches(data.fingerprint)
    assert [info.path for info in kept] == [first]
    assert [info.path.name for info in removed] == [first.name.replace("feature.", "feature_noisy.")]
    removed, kept = clear_caches()
    assert len(removed) == 3
    assert not kept
    assert not second.exists()
    assert list_caches() == []


CHILD = """
import logging, sys, time
from pathlib import Path
from cmran.data import feature_cache
from cmran.data.dataset import open_folder
logging.basicConfig(level=logging.INFO)
feature_cache.BLOCK_BYTES = 1 << 16
real = feature_cache._write_block
calls = 0
def slow(*arguments):
    global calls
    calls += 1
    print("writing", flush=True)
    # In the middle of the work: wait for the file.
    while calls == 3 and not Path(sys.argv[2]).exists():
        time.sleep(0.01)
    real(*arguments)
feature_cache._write_block = slow
with open_folder(Path(sys.argv[1]), features="float16") as data:
    data.use_feature_cache(build=True)
    print("cached", data._visual[0].cache is not None, float(data.read_visual([3]).sum()), flush=True)
"""


def child(folder: Path, *, until: Path) -> subprocess.Popen[str]:
    """A process that builds a cache, and waits at its third block until the file `until` exists."""
    return subprocess.Popen(
        [sys.executable, "-c", CHILD, str(folder), str(until)],
        cwd=ROOT, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True,
    )  # fmt: skip


def read_on(process: subprocess.Popen[str]) -> None:
    """Read its output until it waits."""
    assert process.stdout is not None
    assert [process.stdout.readline() for _ in range(3)] == ["writing\n"] * 3


@pytest.fixture
def larger(tmp_path: Path) -> Path:
    folder = make_folder(tmp_path / "larger", 12, visual_features=400)
    folder_fingerprint(folder)
    return folder


def test_cache_is_rebuilt_after_a_killed_build(larger: Path, cache: Path, tmp_path: Path) -> None:
    process = child(larger, until=tmp_path / "never")
    read_on(process)
    os.kill(process.pid, signal.SIGKILL)
    process.communicate()
    (left,) = list_caches()
    assert left.state == "unfinished"
    assert [path.suffix for path in cache.iterdir()] == [".tmp"]
    # Even under the name of a cache it is not one.
    name = left.path.with_name(f"{left.fingerprint}.visual_feature.npy")
    shutil.copy(left.path, name)
    with open_folder(larger, features="float16") as data:
        data.use_feature_cache(build=False)
        assert data._visual[0].cache is None
    path = build(larger)
    assert names(cache) == ARRAY
    with open_folder(larger, features="float16") as data:
        data.use_feature_cache(build=False)
        assert data._visual[0].cache is not None
        assert np.array_equal(data.read_visual(range(12), np.float16), rounded(read(larger / "visual_feature.h5")))
    assert path.exists()


def test_interrupted_build_leaves_nothing(larger: Path, cache: Path, tmp_path: Path) -> None:
    process = child(larger, until=tmp_path / "go")
    read_on(process)
    process.send_signal(signal.SIGINT)
    (tmp_path / "go").touch()
    process.communicate()
    assert process.returncode != 0
    assert names(cache) == []


def test_two_processes_build_one_cache(larger: Path, cache: Path, tmp_path: Path) -> None:
    first = child(larger, until=tmp_path / "go")
    read_on(first)
    assert [info.state for info in list_caches()] == ["in use"]
    # A cache that is being built is not removed.
    assert clear_caches()[0] == []
    second = child(larger, until=tmp_path / "go")
    assert second.stderr is not None
    assert "waiting for it" in second.stderr.readline()
    (tmp_path / "go").touch()
    outputs = [process.communicate(timeout=60)[0] for process in (first, second)]
    assert [process.returncode for process in (first, second)] == [0, 0]
    assert outputs[0].splitlines()[-1] == outputs[1].strip()
    assert outputs[1].startswith("cached True")
    assert names(cache) == ARRAY


def test_waiting_process_builds_after_the_first_is_killed(larger: Path, cache: Path, tmp_path: Path) -> None:
    first = child(larger, until=tmp_path / "go")
    read_on(first)
    second = child(larger, until=tmp_path / "go")
    assert second.stderr is not None
    assert "waiting for it" in second.stderr.readline()
    first.kill()
    first.communicate()
    (tmp_path / "go").touch()
    output, _ = second.communicate(timeout=60)
    assert output.splitlines()[-1].startswith("cached True")
    assert names(cache) == ARRAY


@pytest.fixture
def locked_away(monkeypatch: pytest.MonkeyPatch) -> Callable[[Path], None]:
    """Makes opening a file fail, even for root."""

    def lock(path: Path) -> None:
        real = os.open

        def opened(name: Any, *options: Any, **more: Any) -> int:
            if str(name) == str(path):
                raise PermissionError(errno.EACCES, os.strerror(errno.EACCES), str(path))
            return real(name, *options, **more)

        monkeypatch.setattr(os, "open", opened)

    return lock


def test_cache_of_another_user_is_reported_and_kept(
    folder: Path, cache: Path, locked_away: Callable[[Path], None], caplog: pytest.LogCaptureFixture
) -> None:
    path = build(folder)
    locked_away(path)
    expected = rounded(read(folder / "visual_feature.h5"))
    for building in (True, False):
        with open_folder(folder, features="float16") as data:
            assert data.use_feature_cache(build=building) == [str(folder / "visual_feature.h5")]
            assert np.array_equal(data.read_visual(range(12), np.float16), expected[:12])
    assert caplog.text.count("ask its owner for permission, or set XDG_CACHE_HOME") == 1
    with pytest.raises(CacheError, match=r"cannot read .*Permission denied: .*XDG_CACHE_HOME"):
        FeatureCache(path, (12, 4, 2, 2, 6))
    assert [(info.path, info.state) for info in list_caches()] == [(path, "in use")]
    removed, kept = clear_caches()
    assert (removed, [info.path for info in kept]) == ([], [path])
    assert path.exists()


@pytest.mark.parametrize("replaced", [True, False])
def test_source_that_changes_during_the_build_is_refused(
    folder: Path, cache: Path, monkeypatch: pytest.MonkeyPatch, replaced: bool
) -> None:
    """The fingerprint would not belong to the cached values."""
    path, real = folder / "visual_feature.h5", feature_cache.StoredArray.sweep

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

    monkeypatch.setattr(feature_cache.StoredArray, "sweep", sweep)
    with (
        open_folder(folder, features="float16") as data,
        pytest.raises(DataError, match="changed while it was cached"),
    ):
        data.use_feature_cache(build=True)
    assert names(cache) == []


def test_cache_in_a_read_only_folder(
    folder: Path, cache: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    path = build(folder)

    def refused(*_: Any, **__: Any) -> None:
        raise OSError(errno.EROFS, os.strerror(errno.EROFS))

    for name in ("utime", "unlink"):
        monkeypatch.setattr(os, name, refused)
    with open_folder(folder, features="float16") as data:
        assert data.use_feature_cache(build=True) == []
    removed, kept = clear_caches()
    assert (removed, [info.path for info in kept]) == ([], [path])
    # Damaged: the file itself is read.
    with path.open("r+b") as file:
        file.seek(HEADER + 40)
        file.write(b"damage")
    expected = rounded(read(folder / "visual_feature.h5"))
    with open_folder(folder, features="float16") as data:
        data.use_feature_cache(build=False)
        assert np.array_equal(data.read_visual(range(12), np.float16), expected[:12])
    assert "is damaged" in caplog.text
    with path.open("r+b") as file:
        file.write(b"damage")
    with open_folder(folder, features="float16") as data:
        assert len(data.use_feature_cache(build=False)) == 1


@pytest.mark.parametrize("limit", ["Infinity", "-5", '"much"', "[" * 100_000, "{}"])
def test_damaged_limit_is_replaced_by_the_default(folder: Path, cache: Path, limit: str) -> None:
    build(folder)
    (cache / "settings.json").write_text(f'{{"limit_bytes": {limit}}}')
    assert cache_limit() == feature_cache.LIMIT_BYTES


def test_caches_in_the_old_format_are_removed(folder: Path, cache: Path, caplog: pytest.LogCaptureFixture) -> None:
    old = cache.parent / "packs"
    old.mkdir(parents=True)
    (old / "0.visual_feature.pack").write_bytes(b"old")
    with caplog.at_level(logging.INFO):
        build(folder)
    assert not old.exists()
    assert caplog.text.count(f"removed {old}") == 1


def test_truncated_source_is_reported_and_leaves_nothing(folder: Path, cache: Path) -> None:
    with open_folder(folder, features="float16") as data:
        os.truncate(folder / "visual_feature.h5", 4000)
        with pytest.raises(CmranError, match="cut short"):
            data.use_feature_cache(build=True)
    assert names(cache) == []


def test_read_ahead_starts_no_threads_of_torch(tmp_path: Path) -> None:
    """Conversions run in the reading thread alone: more threads would slow down the training."""
    # A row of maps and the audio and labels of a batch are each larger than torch converts in one thread.
    folder = make_folder(tmp_path / "wide", 130, visual_features=1024, audio_features=30, segments=10)
    code = f"""
import os, torch
from cmran.data.dataset import open_folder; from cmran.data.loader import iterate
torch.set_num_threads(4)
before = len(os.listdir("/proc/self/task"))
with open_folder({str(folder)!r}, features="float16") as data:
    data.use_feature_cache(build=True)
    counts = [len(os.listdir("/proc/self/task"))
              for dtype in (torch.float32, torch.bfloat16)
              for _ in iterate(data, range(130), 120, labels="segments", dtype=dtype)]
print(max(counts) - before)
"""
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, check=True)
    # Only the reading thread.
    assert int(done.stdout) == 1


@pytest.mark.parametrize("dtype", [torch.float16, torch.float32, torch.float64, torch.bfloat16])
def test_batches_from_the_cache(folder: Path, dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch) -> None:
    build(folder, "weak")
    rows = [14, 3, 0, 12, 7]
    visual = np.concatenate([read(folder / "visual_feature.h5"), read(folder / "visual_feature_noisy.h5")])
    expected = torch.from_numpy(rounded(visual)[rows]).to(dtype)
    with open_folder(folder, mode="weak", features="float16") as data:
        data.use_feature_cache(build=False)
        batches = list(iterate(data, rows, 2, labels="video", dtype=dtype))
    assert torch.equal(torch.cat([batch.visual for batch in batches]), expected)
    assert {batch.visual.dtype for batch in batches} == {batch.audio.dtype for batch in batches} == {dtype}


@pytest.mark.parametrize("kind", ["float16", "stored"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_batches_with_reused_memory(folder: Path, kind: Any, dtype: torch.dtype) -> None:
    rows = [14, 3, 0, 12, 7, 1, 2, 3, 4, 5, 6, 8, 9, 10, 11, 13, 7]
    with open_folder(folder, mode="weak", features=kind) as data:
        expected = list(iterate(data, rows, 2, labels="segments", dtype=dtype))
        addresses = set()
        again = iterate(data, rows, 2, labels="segments", dtype=dtype, reuse=True)
        for batch, other in zip(again, expected, strict=True):
            addresses.add(batch.visual.data_ptr())
            # Give the reader time to read ahead.
            time.sleep(0.02)
            assert batch.rows.tolist() == other.rows.tolist()
            assert batch.labels is not None
            assert other.labels is not None
            assert torch.equal(batch.visual, other.visual)
            assert torch.equal(batch.audio, other.audio)
            assert torch.equal(batch.labels, other.labels)
        # Nine batches; the partial one has separate memory.
        assert len(addresses) <= READ_AHEAD + 3


def test_cache_is_built_with_little_memory(tmp_path: Path) -> None:
    """A tenth of the published size, zeros that occupy no disk space."""
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
from cmran.data.dataset import open_folder
with open_folder({str(folder)!r}, need_labels=False, features="float16") as data:
    data.fingerprint
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    data.use_feature_cache(build=True)
    assert data._visual[0].cache is not None
print(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before)
"""
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, check=True)
    assert int(done.stdout) < 300 << 10
    clear_caches()


# --- unusable cache folders -----------------------------------------------------------------------------------------


def unlocked(monkeypatch: pytest.MonkeyPatch, number: int) -> None:
    """Make locks fail in the whole cache folder."""
    real = fcntl.flock

    def flock(file: Any, operation: int) -> None:
        descriptor = file if isinstance(file, int) else file.fileno()
        if "/cache/cmran/" in os.readlink(f"/proc/self/fd/{descriptor}"):
            raise OSError(number, os.strerror(number))
        real(file, operation)

    monkeypatch.setattr(fcntl, "flock", flock)


def cache_in_the_way(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    (tmp_path / "cache").write_text("a file, not a folder")


def no_home(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    def fail() -> Path:
        raise RuntimeError("Could not determine home directory.")

    monkeypatch.delenv("XDG_CACHE_HOME")
    monkeypatch.setattr(Path, "home", fail)


def features_in_the_way(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    (tmp_path / "cache" / "cmran").mkdir(parents=True)
    (tmp_path / "cache" / "cmran" / "features").write_text("a file, not a folder")


def refusing(number: int) -> Callable[[pytest.MonkeyPatch, Path], None]:
    def refuse(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
        """Make the creation of files and folders in the cache fail."""
        real_open, real_mkdir, real_temporary = os.open, os.mkdir, tempfile.mkstemp
        error = OSError(number, os.strerror(number))

        def in_cache(path: Any) -> bool:
            return str(path).startswith(str(tmp_path / "cache"))

        def opened(path: Any, flags: int, *more: Any, **options: Any) -> int:
            if flags & (os.O_CREAT | os.O_WRONLY | os.O_RDWR) and in_cache(path):
                raise error
            return real_open(path, flags, *more, **options)

        def failing_mkdir(path: Any, *more: Any, **options: Any) -> None:
            if in_cache(path):
                raise error
            real_mkdir(path, *more, **options)

        def temporary(*more: Any, **options: Any) -> Any:
            if in_cache(options.get("dir")):
                raise error
            return real_temporary(*more, **options)

        monkeypatch.setattr(os, "access", lambda path, mode: not (mode == os.W_OK and in_cache(path)))
        monkeypatch.setattr(os, "open", opened)
        monkeypatch.setattr(os, "mkdir", failing_mkdir)
        monkeypatch.setattr(tempfile, "mkstemp", temporary)

    return refuse


UNUSABLE = {
    "a file instead of the cache": cache_in_the_way,
    "a file instead of the features": features_in_the_way,
    "no home": no_home,
    "read-only": refusing(errno.EROFS),
    "no permission": refusing(errno.EACCES),
    "full": refusing(errno.ENOSPC),
    "no quota": refusing(errno.EDQUOT),
}


@pytest.mark.parametrize("existing", [False, True])
@pytest.mark.parametrize("why", UNUSABLE)
def test_unusable_cache_only_costs_time(
    folder: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    caplog: pytest.LogCaptureFixture,
    why: str,
    existing: bool,
) -> None:
    if existing:
        if "instead" in why:
            pytest.skip("then it does not exist")
        feature_cache.cache_folder()
    monkeypatch.setattr("cmran.data.fingerprint.SETTLED_NS", -1)
    UNUSABLE[why](monkeypatch, tmp_path)
    expected = rounded(np.concatenate([read(folder / f"visual_feature{end}.h5") for end in ("", "_noisy")]))
    # Two runs of one process, two files each, and the fingerprint: one warning.
    for building in (True, False):
        with open_folder(folder, mode="weak", features="float16") as data:
            assert len(data.use_feature_cache(build=building)) == 2
            assert np.array_equal(data.read_visual(range(len(expected)), np.float16), expected)
    warnings = [record.message for record in caplog.records if record.levelno >= logging.WARNING]
    assert len(warnings) == 1
    assert "XDG_CACHE_HOME" in warnings[0]
    assert "slower" in warnings[0]


@pytest.mark.parametrize("why", UNUSABLE)
def test_commands_fail_without_a_usable_cache(
    folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], why: str
) -> None:
    UNUSABLE[why](monkeypatch, tmp_path)
    assert main(["pack", str(folder)]) == 1
    error = capsys.readouterr().err.splitlines()[-1]
    assert error.startswith("error: ")
    assert "XDG_CACHE_HOME" in error
    if why in ("a file instead of the cache", "a file instead of the features", "no home"):
        assert main(["cache"]) == 1
        assert capsys.readouterr().err.splitlines()[-1].startswith("error: ")


@pytest.mark.parametrize("number", [errno.ENOLCK, errno.ENOSYS])
def test_cache_without_locks(folder: Path, monkeypatch: pytest.MonkeyPatch, number: int) -> None:
    unlocked(monkeypatch, number)
    build(folder)
    expected = rounded(read(folder / "visual_feature.h5"))
    with open_folder(folder, features="float16") as data, sources_untouched(monkeypatch):
        assert data.use_feature_cache(build=False) == []
        assert np.array_equal(data.read_visual(range(12), np.float16), expected)
        # A reader keeps its open file.
        clear_caches()
        assert np.array_equal(data.read_visual(range(12), np.float16), expected)
    assert list_caches() == []


def test_changed_source_is_not_an_error_of_the_cache(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(feature_cache.StoredArray, "is_as_opened", lambda _: False)
    with open_folder(folder, features="float16") as data, pytest.raises(CmranError, match="was changed while"):
        data.use_feature_cache(build=True)


def test_cache_on_a_read_only_disk_is_used(
    folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    build(folder)
    refusing(errno.EROFS)(monkeypatch, tmp_path)
    with open_folder(folder, features="float16") as data, sources_untouched(monkeypatch):
        assert data.use_feature_cache(build=True) == []
        data.read_visual([0], np.float16)
    assert caplog.records == []
    assert [info.state for info in list_caches()] == ["ready"]


def test_optional_calls_may_be_missing(folder: Path, tmp_path: Path) -> None:
    code = (
        "import sys; from pathlib import Path; from cmran.data.dataset import open_folder\n"
        "with open_folder(Path(sys.argv[1]), features='float16') as data: print(data.use_feature_cache(build=True))\n"
        "with open_folder(Path(sys.argv[1]), features='float16') as data: print(data.use_feature_cache(build=False))"
    )
    for number in (errno.EINVAL, errno.ENOTSUP):
        cache = tmp_path / "lacking" / str(number)
        calls = "sync,syncfolder,utime,chmod,fadvise,preadv2,statvfs"
        done = lacking("-c", code, folder, calls=calls, number=number, XDG_CACHE_HOME=cache)
        assert done.stdout == "[]\n[]\n", done.stderr
        assert "warning" not in done.stderr.lower()
        assert list(cache.glob("**/*.npy"))
