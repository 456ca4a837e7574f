import fcntl
import json
import logging
import signal
import subprocess
import sys
import threading
import time
from pathlib import Path
from typing import Any

import h5py
import numpy as np
import pyarrow.parquet as pq
import pytest

from cmran.categories import LABELS
from cmran.data.dataset import FeatureFolder, open_folder
from cmran.errors import CmranError
from cmran.evaluation.metrics import evaluate
from cmran.utils.files import sha256_file
from serving.batch import EVENTS, MANIFEST, SEGMENTS, Manifest, predict_folder, reader
from serving.batch import predict as predict_module
from serving.batch.reader import FeatureBatch, FeatureReader
from serving.batch.shards import Results, Shards
from tests.conftest import ROOT
from tests.devices import on_cuda
from tests.helpers import make_folder, read, write
from tests.serving.conftest import Exported

Options = dict[str, Any]


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    return make_folder(tmp_path / "data", 22)


def predict(model: Exported | Path, data: Path, out: Path, **options: Any) -> Manifest:
    path = model if isinstance(model, Path) else model.path
    return predict_folder(path, data, out, **({"device": "cpu", "batch_size": 4, "threads": 1} | options))


def results(out: Path) -> tuple[bytes, bytes]:
    return (out / SEGMENTS).read_bytes(), (out / EVENTS).read_bytes()


def features(data: Path, rows: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    with open_folder(data, need_labels=False) as opened:
        return opened.read_visual(rows), opened.read_audio(rows)


def names_in(out: Path) -> list[str]:
    return sorted(path.name for path in out.iterdir())


@pytest.mark.parametrize("split", ["test", "val", "train", "all"])
@pytest.mark.parametrize("batch_size", [1, 4, 32])
def test_predictions_are_those_of_the_network(
    weak: Exported, data: Path, tmp_path: Path, split: str, batch_size: int
) -> None:
    manifest = predict(weak, data, tmp_path / "out", split=split, batch_size=batch_size)
    rows = np.arange(22) if split == "all" else read(data / f"{split}_order.h5", "order")
    event_logits, class_logits, labels = weak.outputs(*features(data, rows))
    assert len(np.unique(labels)) > 2, "the network predicts the same label for every segment"

    table = pq.read_table(tmp_path / "out" / SEGMENTS)
    assert {name: str(table.schema.field(name).type) for name in table.column_names} == {
        "row": "int64",
        "video_id": "string",
        "segment": "int32",
        "label": "int32",
        "category": "string",
        "event_probability": "float",
        "class_probability": "float",
    }
    columns = table.to_pydict()
    assert columns["row"] == np.repeat(rows, 4).tolist()
    assert columns["segment"] == [0, 1, 2, 3] * len(rows)
    assert columns["label"] == labels.ravel().tolist()
    assert columns["category"] == [LABELS[label] for label in labels.ravel()]
    ids = [line.split("&")[1] for line in (data / "Annotations.txt").read_text().splitlines()]
    assert columns["video_id"] == [ids[row] for row in np.repeat(rows, 4)]
    event_probability = 1 / (1 + np.exp(-event_logits.astype(np.float64)))
    np.testing.assert_allclose(columns["event_probability"], event_probability.ravel(), atol=1e-5)
    softmax = np.exp(class_logits) / np.exp(class_logits).sum(1, keepdims=True)
    np.testing.assert_allclose(columns["class_probability"], np.repeat(softmax.max(1), 4), atol=1e-5)
    assert all(p > 0.5 for p, label in zip(columns["event_probability"], columns["label"], strict=True) if label < 28)

    events = pq.read_table(tmp_path / "out" / EVENTS).to_pylist()
    assert (manifest.rows, manifest.segments, manifest.events) == (len(rows), 4 * len(rows), len(events))
    rebuilt = np.full(labels.shape, 28)
    index_of = {int(row): index for index, row in enumerate(rows)}
    for event in events:
        part = (index_of[event["row"]], slice(int(event["start_s"]), int(event["end_s"])))
        rebuilt[part] = LABELS.index(event["category"])
        confidence = event_probability[part] * softmax[index_of[event["row"]]].max()
        assert event["score"] == pytest.approx(confidence.mean(), abs=1e-5)
        assert event["video_id"] == ids[event["row"]]
    np.testing.assert_array_equal(rebuilt, labels)
    assert [index_of[event["row"]] for event in events] == sorted(index_of[event["row"]] for event in events)


def test_the_manifest_describes_the_job(full: Exported, data: Path, tmp_path: Path) -> None:
    out = tmp_path / "out"
    info = {"name": "cmran-full", "version": 3, "uri": "models:/cmran-full@champion"}
    manifest = predict(full, data, out, model_info=info)
    assert Manifest.model_validate_json((out / MANIFEST).read_text()) == manifest
    assert names_in(out) == [".lock", EVENTS, MANIFEST, SEGMENTS]
    assert manifest.model.items() >= info.items()
    assert manifest.model["digest"] == sha256_file(full.path)
    assert manifest.model["mode"] == "full"
    assert manifest.model["metadata"]["run_id"] == "f" * 32
    with open_folder(data) as opened:
        assert manifest.data == {"path": str(data), "fingerprint": opened.fingerprint}
        labels, test = opened.segment_labels(), opened.order("test")
        known = {"train_labels": labels[opened.order("train")], "video_categories": opened.video_labels()[test]}
    assert (manifest.provider, manifest.split, manifest.batch_size) == ("CPUExecutionProvider", "test", 4)
    assert (manifest.rows, manifest.rows_resumed) == (6, 0)
    assert manifest.videos_per_s is not None
    assert manifest.videos_per_s > 0
    assert manifest.versions.keys() >= {"cmran", "python", "numpy", "onnxruntime", "pyarrow"}
    assert manifest.files == {name: sha256_file(out / name) for name in (SEGMENTS, EVENTS)}

    table = pq.read_table(out / SEGMENTS)
    predicted = np.array(table["label"]).reshape(6, 4)
    probability = np.array(table["event_probability"]).reshape(6, 4)
    scores = evaluate(predicted, labels[test], event_probability=probability, leak_free=np.ones(6, bool), **known)
    assert manifest.metrics == {"test": json.loads(json.dumps(scores.to_dict()))}


def test_a_damaged_train_order_removes_only_one_baseline(
    full: Exported, folder: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    write(folder / "train_order.h5", np.array([999]), "order")
    metrics = predict(full, folder, tmp_path / "out").metrics
    assert metrics is not None
    assert metrics["test"]["baselines"]["most_frequent_label"] is None
    assert "order_out_of_range" in caplog.text


def test_features_alone_are_enough(full: Exported, folder: Path, tmp_path: Path) -> None:
    predict(full, folder, tmp_path / "whole", split="all")
    for path in folder.iterdir():
        if path.name not in ("visual_feature.h5", "audio_feature.h5"):
            path.unlink()
    manifest = predict(full, folder, tmp_path / "out", split="all")
    assert (manifest.rows, manifest.metrics) == (22, None)
    table, whole = (pq.read_table(tmp_path / name / SEGMENTS) for name in ("out", "whole"))
    assert set(table["video_id"].to_pylist()) == {None}
    assert table.drop(["video_id"]) == whole.drop(["video_id"])
    with pytest.raises(CmranError, match=r"test_order\.h5"):
        predict(full, folder, tmp_path / "split", split="test")


def test_annotations_are_enough_for_metrics(full: Exported, folder: Path, tmp_path: Path) -> None:
    expected = predict(full, folder, tmp_path / "with").metrics
    (folder / "labels.h5").unlink()
    assert predict(full, folder, tmp_path / "without").metrics == expected


def test_the_leak_free_subset_excludes_shared_test_videos(full: Exported, folder: Path, tmp_path: Path) -> None:
    train, test = (int(read(folder / f"{split}_order.h5", "order")[0]) for split in ("train", "test"))
    lines = [line.split("&") for line in (folder / "Annotations.txt").read_text().splitlines()]
    lines[test][1] = lines[train][1]
    lines[test][0], lines[train][0] = "Bark", "Church bell"
    (folder / "Annotations.txt").write_text("".join("&".join(line) + "\n" for line in lines))
    metrics = predict(full, folder, tmp_path / "out").metrics
    assert metrics is not None
    assert (metrics["test"]["videos"], metrics["test"]["videos_leak_free"]) == (6, 5)


class TestScoresOfSplits:
    def test_all_is_scored_by_split(self, full: Exported, folder: Path, tmp_path: Path) -> None:
        every = predict(full, folder, tmp_path / "all", split="all")
        assert every.metrics is not None
        assert list(every.metrics) == ["test", "val", "train"]
        assert {split: scores["videos"] for split, scores in every.metrics.items()} == {
            "test": 6,
            "val": 5,
            "train": 11,
        }
        assert (every.rows_in_no_split, every.notes) == (0, ())
        for split in ("train", "val", "test"):
            assert predict(full, folder, tmp_path / split, split=split).metrics == {split: every.metrics[split]}

    def test_rows_in_no_split_are_counted_and_scored_separately(
        self, full: Exported, folder: Path, tmp_path: Path
    ) -> None:
        rows = read(folder / "train_order.h5", "order")
        write(folder / "train_order.h5", rows[:-2], "order")
        manifest = predict(full, folder, tmp_path / "all", split="all")
        assert manifest.metrics is not None
        assert {split: scores["videos"] for split, scores in manifest.metrics.items()} == {
            "test": 6,
            "val": 5,
            "train": 9,
            "no_split": 2,
        }
        assert manifest.rows_in_no_split == 2
        assert manifest.notes == ("2 of 22 videos are in no split",)

    def test_without_orders_all_rows_are_in_no_split(self, full: Exported, folder: Path, tmp_path: Path) -> None:
        for split in ("train", "val", "test"):
            (folder / f"{split}_order.h5").unlink()
        manifest = predict(full, folder, tmp_path / "all", split="all")
        assert manifest.metrics is not None
        assert list(manifest.metrics) == ["no_split"]
        assert (manifest.metrics["no_split"]["videos"], manifest.rows_in_no_split) == (22, 22)

    def test_rows_of_an_unknown_split_are_not_scored(self, full: Exported, folder: Path, tmp_path: Path) -> None:
        """They may be training videos."""
        write(folder / "train_order.h5", np.array([999]), "order")
        manifest = predict(full, folder, tmp_path / "all", split="all")
        assert manifest.metrics is not None
        assert list(manifest.metrics) == ["test", "val"]
        assert manifest.rows_in_no_split == 11
        assert any("11 of 22 videos" in note and "train_order.h5" in note for note in manifest.notes)

    def test_overlapping_splits_are_reported_and_shared_rows_are_not_leak_free(
        self, full: Exported, folder: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture
    ) -> None:
        train, test = (read(folder / f"{split}_order.h5", "order") for split in ("train", "test"))
        test[0] = train[3]
        write(folder / "test_order.h5", test, "order")
        manifest = predict(full, folder, tmp_path / "all", split="all")
        assert manifest.metrics is not None
        assert manifest.metrics["test"]["videos"] == 6
        assert manifest.metrics["test"]["videos_leak_free"] == 5
        assert manifest.metrics["train"]["videos"] == 11
        assert any(f"row {train[3]} in both train and test" in note for note in manifest.notes)
        assert f"row {train[3]} in both" in caplog.text


class TestOptionalFiles:
    @pytest.mark.parametrize("kind", ["rows", "transposed", "web-page", "folder", "soft"])
    def test_damaged_labels_remove_only_the_scores(
        self, full: Exported, folder: Path, tmp_path: Path, kind: str, caplog: pytest.LogCaptureFixture
    ) -> None:
        expected = predict(full, folder, tmp_path / "good")
        path = folder / "labels.h5"
        labels = read(path)
        path.unlink()
        if kind == "rows":
            write(path, labels[:-3])
        elif kind == "transposed":
            write(path, np.moveaxis(labels, 1, 2))
        elif kind == "web-page":
            path.write_bytes(b"<!DOCTYPE html>")
        elif kind == "folder":
            path.mkdir()
        else:
            write(path, labels / 2)
        manifest = predict(full, folder, tmp_path / "out")
        assert manifest.metrics is None
        assert manifest.files == expected.files
        (note,) = manifest.notes
        assert note.startswith("scores are left out")
        assert "labels.h5" in note
        assert [record.levelname for record in caplog.records if "scores are left out" in record.message] == ["WARNING"]

    @pytest.mark.parametrize("kind", ["short", "binary", "late", "category"])
    def test_damaged_annotations_remove_video_ids_and_the_leak_free_score(
        self, full: Exported, folder: Path, tmp_path: Path, kind: str
    ) -> None:
        expected = predict(full, folder, tmp_path / "good").metrics
        path = folder / "Annotations.txt"
        lines = path.read_text().splitlines()
        bad = {
            "short": "\n".join(lines[:-4]).encode(),
            "binary": b"\xff\xfe\x00",
            "late": "\n".join([lines[0].rsplit("&", 1)[0] + "&99", *lines[1:]]).encode(),
            "category": "\n".join(["Dog&x&good&0&1", *lines[1:]]).encode(),
        }
        path.write_bytes(bad[kind])
        manifest = predict(full, folder, tmp_path / "out")
        assert manifest.metrics is not None
        assert expected is not None
        assert manifest.metrics["test"]["accuracy"] == expected["test"]["accuracy"]
        assert manifest.metrics["test"]["videos_leak_free"] is None
        assert set(pq.read_table(tmp_path / "out" / SEGMENTS)["video_id"].to_pylist()) == {None}
        (note,) = manifest.notes
        assert note.startswith("there are no video ids")
        assert "Annotations.txt" in note

    def test_contradictory_labels_are_reported(self, full: Exported, folder: Path, tmp_path: Path) -> None:
        (folder / "Annotations.txt").unlink()
        write(folder / "labels.h5", np.roll(read(folder / "labels.h5"), 1, axis=-1))
        manifest = predict(full, folder, tmp_path / "out")
        assert manifest.metrics is not None
        assert any("scores may be wrong: two_categories: labels.h5" in note for note in manifest.notes)
        assert any("np.roll(array, -1, axis=-1)" in note for note in manifest.notes)

    def test_order_files_of_other_splits_are_not_needed(self, full: Exported, folder: Path, tmp_path: Path) -> None:
        expected = predict(full, folder, tmp_path / "good")
        for split in ("train", "val"):
            (folder / f"{split}_order.h5").write_bytes(b"x")
        manifest = predict(full, folder, tmp_path / "out")
        assert manifest.files == expected.files
        assert manifest.metrics is not None
        (folder / "test_order.h5").write_bytes(b"x")
        with pytest.raises(CmranError, match=r"test_order\.h5"):
            predict(full, folder, tmp_path / "again")


@pytest.mark.parametrize("dtype", ["float32", "float16"])
def test_other_dtypes_are_read(full: Exported, folder: Path, tmp_path: Path, dtype: str) -> None:
    for name in ("visual_feature.h5", "audio_feature.h5"):
        write(folder / name, read(folder / name).astype(dtype))
    predict(full, folder, tmp_path / "out", split="all")
    _, _, labels = full.outputs(*features(folder, np.arange(22)))
    assert pq.read_table(tmp_path / "out" / SEGMENTS)["label"].to_pylist() == labels.ravel().tolist()


def test_a_model_that_does_not_fit_is_rejected_before_the_first_row(
    full: Exported, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    other = make_folder(tmp_path / "data", 8, grid=3, visual_features=7, audio_features=4, segments=5)
    monkeypatch.setattr(FeatureFolder, "read_visual", lambda *_, **__: pytest.fail("a row was read"))
    with pytest.raises(CmranError) as info:
        predict(full, other, tmp_path / "out")
    text = str(info.value)
    assert "\n" not in text
    for part in (
        "visual_feature.h5: found 7 visual features, expected 6",
        "audio_feature.h5: found 4 audio features, expected 5",
        "found 5 segments, expected 4",
        "found 3x3 grid, expected 2x2",
    ):
        assert part in text
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize("value", [np.nan, -np.inf, 1e300])
@pytest.mark.parametrize("name", ["visual_feature.h5", "audio_feature.h5"])
def test_features_that_are_not_finite_are_rejected_by_row(
    full: Exported, folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, name: str, value: float
) -> None:
    monkeypatch.setattr(predict_module, "SHARD_BATCHES", 1)
    with h5py.File(folder / name, "r+") as file:
        for row in (13, 15):
            data = file["avadataset"]
            data[row, 2, ..., 1] = value
    with pytest.raises(CmranError, match=rf"not_finite: {name} \[avadataset\], rows 13, 15: found") as info:
        predict(full, folder, tmp_path / "out", split="all")
    assert "\n" not in str(info.value)
    # Rows 0 to 11 are in finished shards.
    assert names_in(tmp_path / "out" / "shards") == [f"shard-{number:06d}.bin" for number in range(3)]
    assert "cmran-read-ahead" not in [thread.name for thread in threading.enumerate()]


def test_errors_of_arguments_are_one_line(full: Exported, data: Path, tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    cases: list[tuple[str, Options]] = [
        ("`batch_size`: expected 1 or more, found 0", {"batch_size": 0}),
        ("expected 0000: the file was changed", {"model_info": {"digest": "0000"}}),
        ("no model file at", {"model": tmp_path / "none.onnx"}),
        ("expected a data folder", {"data": tmp_path / "none"}),
        ("cannot write", {"out": tmp_path / "file"}),
    ]
    for message, options in cases:
        arguments = {"model": full, "data": data, "out": tmp_path / "out"} | options
        with pytest.raises(CmranError, match=message) as info:
            predict(**arguments)
        assert "\n" not in str(info.value)
        assert not (tmp_path / "out").exists()


def test_files_of_another_prediction_are_never_overwritten(full: Exported, data: Path, tmp_path: Path) -> None:
    out = tmp_path / "out"
    predict(full, data, out)
    before = results(out)
    with pytest.raises(CmranError, match=r"found manifest\.json, segments\.parquet, events\.parquet of an earlier"):
        predict(full, data, out)
    (out / MANIFEST).unlink()
    with pytest.raises(CmranError, match=r"without job\.json"):
        predict(full, data, out, resume=True)
    assert results(out) == before


def test_resuming_a_complete_job_changes_nothing(
    full: Exported, data: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    out = tmp_path / "out"
    first = predict(full, data, out)
    stamps = {path.name: path.stat().st_mtime_ns for path in out.iterdir() if path.name != ".lock"}
    with caplog.at_level(logging.INFO, "serving"):
        assert predict(full, data, out, resume=True) == first
    assert "already complete" in caplog.text
    assert {path.name: path.stat().st_mtime_ns for path in out.iterdir() if path.name != ".lock"} == stamps


def test_a_complete_job_whose_files_changed_is_an_error(full: Exported, data: Path, tmp_path: Path) -> None:
    out = tmp_path / "out"
    predict(full, data, out)
    content = bytearray((out / EVENTS).read_bytes())
    content[len(content) // 2] ^= 1
    (out / EVENTS).write_bytes(content)
    with pytest.raises(CmranError, match=r"events\.parquet: missing or changed"):
        predict(full, data, out, resume=True)


def test_resume_in_an_empty_folder_starts_a_job(full: Exported, data: Path, tmp_path: Path) -> None:
    assert predict(full, data, tmp_path / "out", resume=True).rows == 6


@pytest.mark.parametrize("finished", [False, True])
def test_a_job_resumes_only_with_the_same_settings(
    full: Exported, weak: Exported, folder: Path, tmp_path: Path, finished: bool
) -> None:
    out = tmp_path / "out"
    (predict if finished else interrupt)(full, folder, out)
    cases: list[tuple[str, Exported, Options]] = [
        ("batch_size: found 4, requested 5", full, {"batch_size": 5}),
        ("split: found 'test', requested 'all'; rows: found 6, requested 22", full, {"split": "all"}),
        ("model_digest", weak, {}),
    ]
    for message, model, options in cases:
        with pytest.raises(CmranError, match=message) as info:
            predict(model, folder, out, resume=True, **options)
        assert "belongs to another job" in str(info.value)
    with h5py.File(folder / "audio_feature.h5", "r+") as file:
        file["avadataset"][0, 0, 0] = 0.5
    with pytest.raises(CmranError, match="belongs to another job: fingerprint"):
        predict(full, folder, out, resume=True)


def interrupt(model: Exported, data: Path, out: Path, *, finished: int = 1, **options: Any) -> None:
    """A job that is interrupted after `finished` shards."""
    real = Shards.write

    def write_or_stop(shards: Shards, number: int, results: Results) -> None:
        if number >= finished:
            raise KeyboardInterrupt
        real(shards, number, results)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(Shards, "write", write_or_stop)
        shard_batches = options.pop("shard_batches", predict_module.SHARD_BATCHES)
        patch.setattr(predict_module, "SHARD_BATCHES", shard_batches)
        if finished:
            patch.setattr(predict_module, "write_parquet", lambda *_, **__: (_ for _ in ()).throw(KeyboardInterrupt))
        with pytest.raises(KeyboardInterrupt):
            predict(model, data, out, **options)


def truncate(path: Path, _: Path) -> None:
    path.write_bytes(path.read_bytes()[:-7])


def empty(path: Path, _: Path) -> None:
    path.write_bytes(b"")


def flip(path: Path, _: Path) -> None:
    content = bytearray(path.read_bytes())
    content[-200] ^= 4
    path.write_bytes(content)


def replace_by_another(path: Path, other: Path) -> None:
    path.write_bytes(other.read_bytes())


def remove(path: Path, _: Path) -> None:
    path.unlink()


@pytest.mark.parametrize("damage", [truncate, empty, flip, replace_by_another, remove])
def test_a_damaged_shard_is_found_and_computed_again(
    full: Exported,
    data: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    caplog: pytest.LogCaptureFixture,
    damage: Any,
) -> None:
    monkeypatch.setattr(predict_module, "SHARD_BATCHES", 1)
    predict(full, data, tmp_path / "whole", split="all")
    out = tmp_path / "out"
    interrupt(full, data, out, split="all", finished=4, shard_batches=1)
    assert len(names_in(out / "shards")) == 4
    damage(out / "shards" / "shard-000001.bin", out / "shards" / "shard-000002.bin")
    manifest = predict(full, data, out, split="all", resume=True)
    assert results(out) == results(tmp_path / "whole")
    assert manifest.rows_resumed == 12
    assert ("shard-000001.bin is damaged: its 4 videos are computed again" in caplog.text) == (damage is not remove)


def test_two_jobs_in_one_folder_at_once_are_rejected(full: Exported, data: Path, tmp_path: Path) -> None:
    out = tmp_path / "out"
    out.mkdir()
    with (out / ".lock").open("a") as other:
        fcntl.flock(other, fcntl.LOCK_EX)
        for resume in (False, True):
            with pytest.raises(CmranError, match="another predict command is running"):
                predict(full, data, out, resume=resume)
        assert names_in(out) == [".lock"]
    assert predict(full, data, out).rows == 6


def test_the_reader_keeps_three_batches(data: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    started: list[int] = []
    real = reader._read_part

    def record(folder: FeatureFolder, item: FeatureBatch, part: slice) -> bool:
        started.append(item.rows[0])
        return real(folder, item, part)

    monkeypatch.setattr(reader, "_read_part", record)

    def settled(expected: list[int]) -> bool:
        deadline = time.monotonic() + 10
        while len(started) < len(expected) and time.monotonic() < deadline:
            time.sleep(0.01)
        time.sleep(0.2)
        return started == expected

    with (
        open_folder(data) as opened,
        FeatureReader(opened, [np.array([row]) for row in range(22)], buffers=3) as features,
    ):
        assert settled([0, 1, 2])
        first, second = features.take(), features.take()
        assert settled([0, 1, 2])
        expected = opened.read_visual([0, 1])
        np.testing.assert_array_equal(np.concatenate([first.visual, second.visual]), expected)
        features.give_back(first)
        assert settled([0, 1, 2, 3])
        features.take()
        assert features.take().visual is first.visual
    assert "cmran-read-ahead" not in [thread.name for thread in threading.enumerate()]


@on_cuda
def test_a_gpu_predicts_what_the_cpu_predicts(full: Exported, data: Path, tmp_path: Path) -> None:
    tables = []
    for device in ("cpu", "cuda"):
        manifest = predict(full, data, tmp_path / device, split="all", device=device)
        assert ("CUDA" in manifest.provider) == (device == "cuda")
        tables.append(pq.read_table(tmp_path / device / SEGMENTS).to_pydict())
    assert tables[0].keys() == tables[1].keys()
    for name, expected in tables[0].items():
        if isinstance(expected[0], float):
            np.testing.assert_allclose(tables[1][name], expected, atol=1e-4, err_msg=name)
        else:
            assert tables[1][name] == expected, name


@pytest.mark.parametrize(
    ("batches", "expected"),
    [
        ([[0, 1], [2, 3], [4]], True),
        ([[2, 3], [6, 7]], True),
        ([[5]], True),
        ([], False),
        ([[0], [2], [1]], False),
        ([[0, 1], [8, 9], [21]], False),
        ([[0, 0]], False),
    ],
)
def test_a_pass_in_file_order_is_detected(data: Path, batches: list[list[int]], expected: bool) -> None:
    with open_folder(data) as opened:
        features = FeatureReader(opened, [np.array(rows) for rows in batches], buffers=3)
        assert features._is_one_pass() == expected


def test_buffers_are_not_larger_than_the_job(
    full: Exported, data: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    shapes = []
    real = FeatureReader.take

    def take(self: FeatureReader) -> FeatureBatch:
        shapes.append(real(self))
        return shapes[-1]

    monkeypatch.setattr(FeatureReader, "take", take)
    assert predict(full, data, tmp_path / "out", batch_size=1_000_000).rows == 6
    assert [len(item.visual) for item in shapes] == [6]


@pytest.mark.parametrize("threads", [1, 2, 3, 4])
def test_several_threads_read_the_same(data: Path, threads: int) -> None:
    batches = [np.arange(start, min(start + 5, 22)) for start in range(0, 22, 5)]
    with open_folder(data) as opened, FeatureReader(opened, batches, buffers=3, threads=threads) as features:
        for rows in batches:
            found = features.take()
            for values, expected in ((found.visual, opened.read_visual(rows)), (found.audio, opened.read_audio(rows))):
                np.testing.assert_array_equal(values[: len(rows)], expected)
            features.give_back(found)


def test_batches_in_progress_before_a_failure_are_kept(
    full: Exported, data: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(predict_module, "SHARD_BATCHES", 1)
    real = reader._read_part

    def read_part(folder: FeatureFolder, item: FeatureBatch, part: slice) -> bool:
        if item.rows[0] == 8:
            raise CmranError("the disk is gone")
        return real(folder, item, part)

    monkeypatch.setattr(reader, "_read_part", read_part)
    with pytest.raises(CmranError, match="the disk is gone"):
        predict(full, data, tmp_path / "out", split="all")
    assert names_in(tmp_path / "out" / "shards") == ["shard-000000.bin", "shard-000001.bin"]


# A predict command that kills itself, like kill -9, before or after it renames the n-th file of the job.
SUICIDE = """
import os, signal, sys
from pathlib import Path
from serving.batch import predict
model, data, out, when, number, batch_size = sys.argv[1:7]
real, count = os.replace, 0
def replace(source, target):
    global count
    ours = str(target).startswith(out)
    count += ours
    if ours and count == int(number) and when == "before":
        os.kill(os.getpid(), signal.SIGKILL)
    real(source, target)
    if ours and count == int(number) and when == "after":
        os.kill(os.getpid(), signal.SIGKILL)
    if when == "slowly":
        import time
        time.sleep(0.02)
os.replace = replace
predict.SHARD_BATCHES = 1
predict.predict_folder(Path(model), Path(data), Path(out), split="all", device="cpu", batch_size=int(batch_size),
                       resume=True, threads=1, progress=False)
"""


def command(model: Exported, data: Path, out: Path, when: str, number: int, batch_size: int) -> list[str]:
    words = [model.path, data, out, when, number, batch_size]
    return [sys.executable, "-c", SUICIDE, *map(str, words)]


@pytest.mark.parametrize(
    ("when", "deaths"),
    [
        # At job.json; at the first and third shard; at events.parquet, segments.parquet and manifest.json. Each command
        # writes the earlier ones of these three files again.
        ("before", [1, 2, 3, 2, 2, 3]),
        ("after", [1, 2, 2, 2, 3]),
    ],
)
def test_killed_at_every_stage_and_resumed_gives_the_same_bytes(
    full: Exported, data: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, when: str, deaths: list[int]
) -> None:
    monkeypatch.setattr(predict_module, "SHARD_BATCHES", 1)
    undisturbed = predict(full, data, tmp_path / "whole", split="all", batch_size=8)
    out = tmp_path / "out"
    for number in deaths:
        died = subprocess.run(command(full, data, out, when, number, 8), cwd=ROOT, capture_output=True, check=False)
        assert died.returncode == -signal.SIGKILL, died.stderr.decode()
    assert (out / MANIFEST).exists() == (when == "after")
    predict(full, data, out, split="all", batch_size=8, resume=True)
    assert names_in(out) == [".lock", EVENTS, MANIFEST, SEGMENTS]
    assert results(out) == results(tmp_path / "whole")
    manifest = Manifest.model_validate_json((out / MANIFEST).read_text())
    assert manifest.metrics == undisturbed.metrics
    assert manifest.rows == 22
    assert manifest.rows_resumed == 22


def test_killed_by_another_process_and_resumed_gives_the_same_bytes(
    full: Exported, data: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(predict_module, "SHARD_BATCHES", 1)
    out = tmp_path / "out"
    process = subprocess.Popen(command(full, data, out, "slowly", 0, 1), cwd=ROOT, stderr=subprocess.DEVNULL)
    try:
        deadline = time.monotonic() + 60
        while len(list((out / "shards").glob("shard-*.bin"))) < 7 and time.monotonic() < deadline:
            assert process.poll() is None, "it ended before it was killed"
            time.sleep(0.005)
    finally:
        process.kill()
        process.wait()
    assert not (out / MANIFEST).exists()
    found = len(list((out / "shards").glob("shard-*.bin")))
    assert 7 <= found < 22
    manifest = predict(full, data, out, split="all", batch_size=1, resume=True)
    predict(full, data, tmp_path / "whole", split="all", batch_size=1)
    assert results(out) == results(tmp_path / "whole")
    assert manifest.rows_resumed == found
