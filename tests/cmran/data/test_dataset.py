"""The reader: rows, labels, splits, errors, and prefetched batches."""

import gc
import itertools
import os
import threading
import tracemalloc
from pathlib import Path
from typing import Any

import h5py
import numpy as np
import pytest
import torch

from cmran.config import Features
from cmran.data.dataset import FeatureFolder, open_folder
from cmran.data.loader import READ_AHEAD, Batch, _read_batch, iterate
from cmran.errors import CmranError, DataError
from tests.devices import on_cuda
from tests.helpers import make_folder, read, write


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    return make_folder(tmp_path / "data")


def reader_threads() -> list[threading.Thread]:
    return [thread for thread in threading.enumerate() if thread.name == "cmran-read-ahead"]


def test_folder_sizes(folder: Path) -> None:
    with open_folder(folder) as data:
        assert (data.videos, data.background_videos, data.segments, data.grid) == (12, 0, 4, (2, 2))
        assert (data.visual_features, data.audio_features, data.rows) == (6, 5, 12)
        assert len(data.fingerprint) == 32
    with open_folder(folder, mode="weak") as data:
        assert (data.videos, data.background_videos, data.rows) == (12, 3, 15)


def test_rows_in_any_order_with_repeats_and_background(folder: Path) -> None:
    rows = [14, 3, 3, 0, 12, 11]
    visual = np.concatenate([read(folder / "visual_feature.h5"), read(folder / "visual_feature_noisy.h5")])
    audio = np.concatenate([read(folder / "audio_feature.h5"), read(folder / "audio_feature_noisy.h5")])
    with open_folder(folder, mode="weak") as data:
        assert np.array_equal(data.read_visual(rows, np.float64), visual[rows])
        assert np.array_equal(data.read_audio(np.array(rows, np.int32), np.float64), audio[rows])
        assert data.read_visual(rows).dtype == np.float32
        assert np.array_equal(data.read_visual(rows), visual[rows].astype(np.float32))
        assert data.read_visual([]).shape == (0, 4, 2, 2, 6)


def test_out_buffer_is_filled_and_reused(folder: Path) -> None:
    visual = read(folder / "visual_feature.h5")
    with open_folder(folder) as data:
        for dtype in (np.float64, np.float32, np.float16):
            buffer = np.full((3, 4, 2, 2, 6), -1, dtype)
            assert data.read_visual([5, 1, 7], out=buffer) is buffer
            assert np.array_equal(buffer, visual[[5, 1, 7]].astype(dtype))
        # A buffer that is not contiguous is filled, too.
        wide = np.zeros((3, 4, 2, 2, 12))
        data.read_visual([0, 1, 2], out=wide[..., ::2])
        assert np.array_equal(wide[..., ::2], visual[:3])
        assert not wide[..., 1::2].any()
        with pytest.raises(ValueError, match="`out`: found the shape"):
            data.read_visual([0], out=buffer)


@pytest.mark.parametrize("rows", [[12], [-1], [0, 99]])
def test_rows_that_do_not_exist_are_refused(folder: Path, rows: list[int]) -> None:
    with open_folder(folder) as data:
        for call in (data.read_visual, data.read_audio, data.segment_label_vectors, data.video_label_vectors):
            with pytest.raises(IndexError, match="expected rows from 0 to 11"):
                call(rows)


def test_rows_must_be_integers(folder: Path) -> None:
    with open_folder(folder) as data:
        with pytest.raises(TypeError, match="expected integers"):
            data.read_audio(np.array([0.0, 1.0]))  # type: ignore[arg-type]
        with pytest.raises(TypeError, match="expected integers"):
            data.read_audio(np.array([True] * 12))  # type: ignore[arg-type]


STORED: dict[str, dict[str, Any]] = {
    "contiguous": {},
    "chunked": {"chunks": (5, 4, 1, 2, 6)},
    "one-chunk": {"chunks": (12, 4, 2, 2, 6)},
    "gzip": {"compression": "gzip", "chunks": (5, 2, 2, 2, 3), "shuffle": True},
    "growing": {"maxshape": (None, 4, 2, 2, 6)},
    "big-endian": {"dtype": ">f8"},
    "float32": {"dtype": "f4"},
    "float16": {"dtype": "f2"},
}


@pytest.mark.parametrize("kind", STORED)
@pytest.mark.parametrize("group_bytes", [64 << 20, 2 * 4 * 2 * 2 * 6 * 8])
def test_every_storage_layout_reads_the_same_values(
    folder: Path, kind: str, group_bytes: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("cmran.data.hdf5._GROUP_BYTES", group_bytes)
    values = read(folder / "visual_feature.h5")
    write(folder / "visual_feature.h5", values, **STORED[kind])
    stored = read(folder / "visual_feature.h5")
    rows = [11, 2, 2, 0, 7, 6, 5, 10]
    with open_folder(folder) as data:
        assert np.array_equal(data.read_visual(rows, np.float64), stored[rows].astype(np.float64))
        assert np.allclose(data.read_visual(rows), values[rows], rtol=1e-3)


def test_compact_userblock_and_fill_value_storage(folder: Path) -> None:
    values = read(folder / "audio_feature.h5")
    path = folder / "audio_feature.h5"

    def check(expected: np.ndarray) -> None:
        with open_folder(folder) as data:
            assert np.array_equal(data.read_audio([3, 1], np.float64), expected[[3, 1]])

    with h5py.File(path, "w", userblock_size=1024) as file:
        file["avadataset"] = values
    check(values)
    with h5py.File(path, "w") as file:
        space, plist = h5py.h5s.create_simple(values.shape), h5py.h5p.create(h5py.h5p.DATASET_CREATE)
        plist.set_layout(h5py.h5d.COMPACT)
        compact = h5py.h5d.create(file.id, b"avadataset", h5py.h5t.NATIVE_DOUBLE, space, plist)
        compact.write(h5py.h5s.ALL, h5py.h5s.ALL, values)
    check(values)
    with h5py.File(path, "w") as file:
        file.create_dataset("avadataset", values.shape, values.dtype, fillvalue=2.5)
    check(np.full_like(values, 2.5))


def sparse(path: Path, shape: tuple[int, ...]) -> None:
    """Create a file of the full published size that occupies no disk space."""
    with h5py.File(path, "w") as file:
        plist = h5py.h5p.create(h5py.h5p.DATASET_CREATE)
        plist.set_alloc_time(h5py.h5d.ALLOC_TIME_EARLY)
        plist.set_fill_time(h5py.h5d.FILL_TIME_NEVER)
        h5py.h5d.create(file.id, b"avadataset", h5py.h5t.IEEE_F64LE, h5py.h5s.create_simple(shape), plist)


def test_the_full_visual_file_is_never_loaded_into_memory(tmp_path: Path) -> None:
    sparse(tmp_path / "visual_feature.h5", (4143, 10, 7, 7, 512))
    sparse(tmp_path / "audio_feature.h5", (4143, 10, 128))
    assert (tmp_path / "visual_feature.h5").stat().st_size > 8e9
    rows = np.arange(0, 4143, 1000)
    tracemalloc.start()
    try:
        with open_folder(tmp_path, need_labels=False) as data:
            visual = data.read_visual(rows)
        peak = tracemalloc.get_traced_memory()[1]
    finally:
        tracemalloc.stop()
    assert visual.shape == (5, 10, 7, 7, 512)
    # The result and one row as stored.
    assert peak < visual.nbytes + 3e6


def test_only_the_requested_rows_are_read(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    asked: list[int] = []
    real = os.preadv

    def preadv(descriptor: int, buffers: list[memoryview], offset: int) -> int:
        asked.append(len(buffers[0]))
        return real(descriptor, buffers, offset)

    monkeypatch.setattr(os, "preadv", preadv)
    with open_folder(folder, mode="weak") as data:
        assert asked == [3 * 29 * 4]  # labels_noisy.h5, which must be all background
        data.read_visual([4, 13])
    assert asked[1:] == [4 * 2 * 2 * 6 * 8] * 2


def test_orders_and_labels(folder: Path) -> None:
    labels = read(folder / "labels.h5")
    with open_folder(folder, mode="weak") as data:
        for split in ("train", "val", "test"):
            assert data.order(split).tolist() == read(folder / f"{split}_order.h5", "order").tolist()
        assert np.array_equal(data.segment_labels(), labels.argmax(axis=2))
        assert np.array_equal(data.video_labels(), read(folder / "mil_labels.h5").argmax(axis=1))
        rows = [2, 14, 2]
        assert np.array_equal(data.segment_label_vectors(rows)[[0, 2]], labels[[2, 2]])
        assert (data.segment_label_vectors(rows)[1, :, 28] == 1).all()
        assert data.segment_label_vectors(rows).sum() == 3 * 4
        vectors = data.video_label_vectors(rows)
        assert np.array_equal(vectors[0], read(folder / "mil_labels.h5")[2])
        assert vectors[1].tolist() == [0.0] * 28 + [1.0]
        ids = data.video_ids()
        assert ids is not None
        assert ids[0] == "-id00000000"
        # The caller gets copies.
        data.segment_labels()[:] = 0
        data.order("train")[:] = 0
        assert np.array_equal(data.segment_labels(), labels.argmax(axis=2))
        assert len(set(data.order("train"))) == 6


@pytest.mark.parametrize("mode", ["full", "weak"])
def test_labels_are_built_from_the_annotations(folder: Path, mode: Any) -> None:
    with open_folder(folder, mode=mode) as data:
        segments, videos = data.segment_labels(), data.video_labels()
        vectors = data.video_label_vectors([0, data.rows - 1])
    for name in ("labels.h5", "mil_labels.h5", "labels_noisy.h5"):
        (folder / name).unlink()
    with open_folder(folder, mode=mode) as data:
        assert data.has_labels
        assert np.array_equal(data.segment_labels(), segments)
        assert np.array_equal(data.video_labels(), videos)
        assert np.array_equal(data.video_label_vectors([0, data.rows - 1]), vectors)


def test_video_labels_in_full_mode_without_annotations(folder: Path) -> None:
    with open_folder(folder) as data:
        expected = data.video_labels()
    (folder / "Annotations.txt").unlink()
    (folder / "mil_labels.h5").unlink()
    labels = read(folder / "labels.h5")
    labels[4] = np.eye(29)[28]
    write(folder / "labels.h5", labels)
    expected[4] = 28
    with open_folder(folder) as data:
        assert np.array_equal(data.video_labels(), expected)
        assert data.video_ids() is None
        assert data.shared_test_rows().tolist() == []


def test_inference_needs_only_the_two_feature_files(folder: Path) -> None:
    for path in folder.iterdir():
        if path.name not in ("visual_feature.h5", "audio_feature.h5"):
            path.unlink()
    for mode in ("full", "weak"):
        with open_folder(folder, mode=mode, need_labels=False) as data:  # type: ignore[arg-type]
            assert data.read_visual(range(12)).shape == (12, 4, 2, 2, 6)
            assert not data.has_labels
            assert data.rows == 12
            assert data.video_ids() is None
            with pytest.raises(CmranError, match=r"missing_file: labels\.h5.*neither"):
                data.segment_labels()
            with pytest.raises(CmranError, match=r"missing_file: train_order\.h5"):
                data.order("train")


def test_test_rows_whose_video_is_also_in_train(folder: Path) -> None:
    with open_folder(folder) as data:
        train, test = data.order("train"), data.order("test")
        lines = (folder / "Annotations.txt").read_text().splitlines()
        category = data.video_labels()
        row = next(int(row) for row in test if any(category[train] != category[row]))
        other = next(int(other) for other in train if category[other] != category[row])
        assert data.shared_test_rows().tolist() == []
    parts = lines[row].split("&")
    parts[1] = lines[other].split("&")[1]
    lines[row] = "&".join(parts)
    (folder / "Annotations.txt").write_text("\n".join(lines))
    with open_folder(folder) as data:
        assert data.shared_test_rows().tolist() == [row]


def _drop(name: str) -> Any:
    return lambda folder: (folder / name).unlink()


def _cut(name: str, key: str = "avadataset", **kwargs: Any) -> Any:
    def change(folder: Path) -> None:
        write(folder / name, read(folder / name, key)[:-1], key, **kwargs)

    return change


def _lines(change: Any) -> Any:
    def rewrite(folder: Path) -> None:
        lines = (folder / "Annotations.txt").read_text().splitlines()
        (folder / "Annotations.txt").write_text("\n".join(change(lines)))
        (folder / "labels.h5").unlink()

    return rewrite


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (_drop("visual_feature.h5"), "missing_file: visual_feature.h5: "),
        (_drop("test_order.h5"), "missing_file: test_order.h5: "),
        (_drop("audio_feature_noisy.h5"), "missing_file: audio_feature_noisy.h5: "),
        (_cut("audio_feature.h5"), "row_count: audio_feature.h5 [avadataset]: found 11 rows"),
        (_cut("labels.h5"), "row_count: labels.h5 [avadataset]: found 11 rows"),
        (_cut("mil_labels.h5"), "row_count: mil_labels.h5 [avadataset]: found 11 rows"),
        (_cut("labels_noisy.h5"), "row_count: labels_noisy.h5 [avadataset]: found 2 rows"),
        (_cut("audio_feature_noisy.h5"), "row_count: audio_feature_noisy.h5 [avadataset]: found 2 rows"),
        (lambda folder: write(folder / "labels.h5", np.zeros((12, 4, 28))), "wrong_shape: labels.h5 [avadataset]"),
        (lambda folder: write(folder / "labels.h5", np.zeros((12, 5, 29))), "segments_disagree: labels.h5"),
        (lambda folder: write(folder / "labels.h5", np.zeros((12, 4, 29))), "not_one_hot: labels.h5"),
        (lambda folder: write(folder / "labels_noisy.h5", np.eye(29)[:3]), "wrong_label: labels_noisy.h5"),
        (lambda folder: write(folder / "audio_feature.h5", np.zeros((12, 4))), "(N, T, A)"),
        (lambda folder: write(folder / "audio_feature.h5", np.zeros((12, 4, 5), int)), "wrong_dtype: audio_feature.h5"),
        (lambda folder: write(folder / "val_order.h5", [1.0], "order"), "wrong_dtype: val_order.h5 [order]"),
        (lambda folder: write(folder / "val_order.h5", [1, 12], "order"), "order_out_of_range: val_order.h5"),
        (lambda folder: write(folder / "val_order.h5", [1, 2, 1], "order"), "order_repeated: val_order.h5"),
        (lambda folder: write(folder / "val_order.h5", np.zeros(0, int), "order"), "empty_split: val_order.h5"),
        (lambda folder: write(folder / "audio_feature.h5", [1], "features"), "missing_key: audio_feature.h5"),
        (lambda folder: (folder / "visual_feature.h5").write_bytes(b"<!DOCTYPE html>"), "not HDF5"),
        (_lines(lambda lines: lines[:-1]), "row_count: Annotations.txt: found 11 lines"),
        (_lines(lambda lines: [line.replace("Bark", "bark") for line in lines]), "bad_annotations: Annotations.txt"),
        (_lines(lambda lines: ["Bark&x&good&0&10", *lines[1:]]), "end of at most 4"),
    ],
)
def test_a_bad_folder_is_refused_with_a_one_line_error(folder: Path, change: Any, message: str) -> None:
    change(folder)

    def use() -> None:
        with open_folder(folder, mode="weak") as data:
            for split in ("train", "val", "test"):
                data.order(split)
            data.segment_labels()
            data.video_labels()

    with pytest.raises(CmranError) as caught:
        use()
    assert isinstance(caught.value, DataError)
    assert message in str(caught.value)
    assert str(caught.value).startswith(f"{folder}: ")
    assert "\n" not in str(caught.value)


def test_a_missing_folder_is_refused(tmp_path: Path) -> None:
    with pytest.raises(DataError, match="found nothing"):
        open_folder(tmp_path / "absent")


def test_files_are_closed_after_use_and_after_an_error(folder: Path) -> None:
    def handles() -> int:
        return sum(
            os.path.realpath(f"/proc/self/fd/{fd}").startswith(str(folder)) for fd in os.listdir("/proc/self/fd")
        )

    write(folder / "audio_feature.h5", read(folder / "audio_feature.h5"), compression="gzip")
    with open_folder(folder, mode="weak") as data:
        data.segment_labels()
        assert handles() == 4
    assert handles() == 0
    with pytest.raises(ValueError, match="closed"):
        data.read_visual([0])
    with pytest.raises(ValueError, match="closed"):
        data.read_audio([0])
    _cut("audio_feature_noisy.h5")(folder)
    with pytest.raises(CmranError):
        open_folder(folder, mode="weak")
    assert handles() == 0


def test_a_file_that_shrinks_while_open_raises_an_error(folder: Path) -> None:
    with open_folder(folder) as data:
        os.truncate(folder / "visual_feature.h5", (folder / "visual_feature.h5").stat().st_size // 2)
        assert data.read_visual([0]).shape == (1, 4, 2, 2, 6)
        with pytest.raises(CmranError, match=r"unreadable_file: visual_feature\.h5.*row 11"):
            data.read_visual([11])


def test_batches_keep_the_given_order(folder: Path) -> None:
    rows = np.array([14, 0, 7, 3, 13, 7, 2])
    with open_folder(folder, mode="weak") as data:
        batches = list(iterate(data, rows, 3, labels="segments", dtype=torch.float32))
        assert [batch.rows.tolist() for batch in batches] == [[14, 0, 7], [3, 13, 7], [2]]
        assert torch.equal(torch.cat([b.visual for b in batches]), torch.from_numpy(data.read_visual(rows)))
        assert torch.equal(torch.cat([b.audio for b in batches]), torch.from_numpy(data.read_audio(rows)))
        labels = torch.cat([b.labels for b in batches if b.labels is not None])
        assert torch.equal(labels, torch.from_numpy(data.segment_label_vectors(rows)))
        (whole,) = iterate(data, rows, 99, labels="video", dtype=torch.float64)
        assert whole.visual.dtype == whole.audio.dtype == torch.float64
        assert whole.labels is not None
        assert whole.labels.dtype == torch.float64
        assert np.array_equal(whole.labels.numpy(), data.video_label_vectors(rows))
        (half,) = iterate(data, rows, 99, labels=None, dtype=torch.bfloat16)
        assert half.labels is None
        assert torch.equal(half.visual, whole.visual.float().bfloat16())
        assert list(iterate(data, [], 3, labels="video", dtype=torch.float32)) == []
    assert not reader_threads()


def test_bad_arguments_are_refused_before_the_first_batch(folder: Path) -> None:
    with open_folder(folder) as data:
        with pytest.raises(IndexError):
            iterate(data, [99], 3, labels=None, dtype=torch.float32)
        with pytest.raises(ValueError, match="batch_size"):
            iterate(data, [1], 0, labels=None, dtype=torch.float32)


def test_the_reader_thread_ends_if_the_consumer_stops_early(folder: Path) -> None:
    with open_folder(folder) as data:
        batches = iterate(data, np.arange(12), 1, labels="segments", dtype=torch.float32)
        next(batches)
        assert reader_threads()
        batches.close()  # type: ignore[attr-defined]
        assert not reader_threads()

        def one(data: FeatureFolder) -> Batch:
            for batch in iterate(data, np.arange(12), 1, labels="segments", dtype=torch.float32):
                return batch
            raise AssertionError

        one(data)
        gc.collect()
        assert not reader_threads()

        def fail(data: FeatureFolder) -> None:
            for _ in iterate(data, np.arange(12), 1, labels="segments", dtype=torch.float32):
                raise KeyError

        with pytest.raises(KeyError):
            fail(data)
        gc.collect()
        assert not reader_threads()


def test_a_reader_error_is_raised_at_its_batch(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with open_folder(folder) as data:
        real = data.read_audio

        def read_audio(rows: Any, *args: Any, **kwargs: Any) -> np.ndarray:
            if 5 in rows:
                raise CmranError("row 5 is gone")
            return real(rows, *args, **kwargs)

        monkeypatch.setattr(data, "read_audio", read_audio)
        batches = iterate(data, np.arange(12), 2, labels=None, dtype=torch.float32)
        assert [next(batches).rows.tolist() for _ in range(2)] == [[0, 1], [2, 3]]
        with pytest.raises(CmranError, match="row 5 is gone"):
            next(batches)
    assert not reader_threads()


def test_read_ahead_is_bounded(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    read_batches: list[list[int]] = []
    blocked = threading.Event()
    real = _read_batch

    def count(folder: FeatureFolder, rows: np.ndarray, *args: Any, **kwargs: Any) -> Batch:
        read_batches.append(rows.tolist())
        if len(read_batches) == READ_AHEAD + 2:
            blocked.set()
        return real(folder, rows, *args, **kwargs)

    monkeypatch.setattr("cmran.data.loader._read_batch", count)
    with open_folder(folder) as data:
        batches = iterate(data, np.arange(12), 1, labels=None, dtype=torch.float32)
        next(batches)
        # One in use, READ_AHEAD waiting, one read but not yet queued; the reader then waits.
        assert blocked.wait(30)
        assert not threading.Event().wait(0.3)
        assert len(read_batches) == READ_AHEAD + 2
        assert [batch.rows.tolist() for batch in itertools.islice(batches, 99)] == [[row] for row in range(1, 12)]


@on_cuda
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16])
@pytest.mark.parametrize(("kind", "packed"), [("stored", False), ("float16", False), ("float16", True)])
def test_batches_on_the_gpu(folder: Path, kind: Features, packed: bool, dtype: torch.dtype) -> None:
    with open_folder(folder, features=kind) as data:
        if packed:
            data.use_feature_cache(build=True)
        assert data.is_float16 == packed
        batches = list(iterate(data, np.arange(12), 5, labels="segments", dtype=dtype, device="cuda"))
        expected = list(iterate(data, np.arange(12), 5, labels="segments", dtype=dtype))
        for found, batch in zip(batches, expected, strict=True):
            assert found.visual.device.type == "cuda"
            for name in ("visual", "audio", "labels"):
                a, b = getattr(found, name), getattr(batch, name)
                assert a.dtype == b.dtype == dtype, name
                assert torch.equal(a.cpu(), b), name


def test_real_labels_with_synthetic_features(ave: Path, tmp_path: Path) -> None:
    for path in ave.iterdir():
        if path.suffix == ".h5" or path.name == "Annotations.txt":
            (tmp_path / path.name).symlink_to(path)
    rng = np.random.default_rng(0)
    write(tmp_path / "visual_feature.h5", rng.random((4143, 10, 1, 1, 4), np.float32))
    write(tmp_path / "audio_feature.h5", rng.random((4143, 10, 128), np.float32))
    write(tmp_path / "visual_feature_noisy.h5", rng.random((178, 10, 1, 1, 4), np.float32))
    with open_folder(tmp_path, mode="weak") as data:
        assert (data.videos, data.background_videos) == (4143, 178)
        assert [len(data.order(split)) for split in ("train", "val", "test")] == [3339, 402, 402]
        assert data.shared_test_rows().tolist() == [339, 680, 785, 931, 1374, 2397, 4074, 4113]
        assert data.video_labels()[26] == 0
        assert (data.segment_labels()[26] == 28).all()
        assert np.array_equal(data.read_audio([4143 + 177], np.float64)[0], read(ave / "audio_feature_noisy.h5")[177])
    for name in ("labels.h5", "mil_labels.h5", "labels_noisy.h5"):
        (tmp_path / name).unlink()
    with open_folder(tmp_path, mode="weak") as data:
        rows = np.arange(4143)
        assert np.array_equal(data.segment_label_vectors(rows), read(ave / "labels.h5"))
        assert np.array_equal(data.video_label_vectors(rows), read(ave / "mil_labels.h5"))
