"""The validator: collected faults, reports, memory, and the real label files."""

import json
import sys
import tracemalloc
from pathlib import Path
from typing import Any

import h5py
import numpy as np
import pytest

from cmran.data import validation
from cmran.data.faults import MAX_ROWS, Fault, FaultError, rows_text
from cmran.data.fingerprint import folder_fingerprint
from cmran.data.validation import Report, validate
from tests.helpers import make_folder, read, write

KEYS = ["code", "file", "key", "rows", "found", "expected", "hint"]


def test_a_valid_folder_has_an_empty_report(tmp_path: Path) -> None:
    folder = make_folder(tmp_path / "data")
    report = validate(folder, "weak", progress=False)
    assert report.ok
    assert report.summary() == "0 errors, 0 warnings"
    assert json.loads(report.to_json()) == {
        "fingerprint": folder_fingerprint(folder, progress=False),
        "errors": [],
        "warnings": [],
    }
    assert "| code |" not in report.to_markdown()


def test_one_fault_hides_no_other(tmp_path: Path) -> None:
    folder = make_folder(tmp_path / "data")
    (folder / "audio_feature.h5").write_bytes(b"")
    (folder / "visual_feature_noisy.h5").unlink()
    visual = read(folder / "visual_feature.h5")
    visual[3, 0, 0, 0, 0], visual[7, 1], visual[8] = np.nan, np.inf, 0
    write(folder / "visual_feature.h5", visual)
    labels = read(folder / "labels.h5")
    labels[1, 0] = 0
    write(folder / "labels.h5", labels)
    write(folder / "val_order.h5", np.array([0, 0, 44]), "order")
    write(folder / "test_order.h5", np.array([[1]]), "order")
    with (folder / "Annotations.txt").open("a") as file:
        file.write("Cat\n")
    report = validate(folder, "weak", progress=False)
    found = {(fault.code, fault.file) for fault in report.errors}
    assert found >= {
        ("unreadable_file", "audio_feature.h5"),
        ("missing_file", "visual_feature_noisy.h5"),
        ("not_finite", "visual_feature.h5"),
        ("not_one_hot", "labels.h5"),
        ("order_repeated", "val_order.h5"),
        ("order_out_of_range", "val_order.h5"),
        ("wrong_shape", "test_order.h5"),
        ("bad_annotations", "Annotations.txt"),
        ("row_count", "Annotations.txt"),
    }
    assert [fault.rows for fault in report.errors if fault.code == "not_finite"] == [[3, 7]]
    assert [fault.rows for fault in report.warnings if fault.code == "zero_visual"] == [[8]]
    assert not report.ok


def test_json_and_markdown_contain_every_fault(tmp_path: Path) -> None:
    folder = make_folder(tmp_path / "data")
    (folder / "labels.h5").unlink()
    write(folder / "val_order.h5", np.array([0, 99, -3]), "order")
    (folder / "audio_feature.h5").write_bytes(b"a | b")
    report = validate(folder, progress=False)
    content = json.loads(report.to_json())
    assert list(content) == ["fingerprint", "errors", "warnings"]
    assert [fault["code"] for fault in content["errors"]] == [fault.code for fault in report.errors]
    for fault in content["errors"] + content["warnings"]:
        assert list(fault) == KEYS
    assert next(fault["rows"] for fault in content["errors"] if fault["code"] == "order_out_of_range") == [-3, 99]
    table = [line for line in report.to_markdown().splitlines() if line.startswith("| ")]
    assert len(table) == 1 + len(report.errors) + len(report.warnings)
    assert all(line.replace("\\|", "").count("|") == 9 for line in table)
    assert "derived_file" in report.to_markdown()


@pytest.mark.parametrize("kind", ["absent", "file"])
def test_a_missing_folder_is_reported(tmp_path: Path, kind: str) -> None:
    path = tmp_path / "data"
    if kind == "file":
        path.write_text("")
    report = validate(path, progress=False)
    assert [fault.code for fault in report.errors] == ["missing_folder"]
    assert report.fingerprint == ""
    assert str(path) in str(report.errors[0])
    assert "\n" not in str(report.errors[0])


def test_an_empty_folder_reports_each_missing_file(tmp_path: Path) -> None:
    full = [fault.file for fault in validate(tmp_path, progress=False).errors]
    orders = ["train_order.h5", "val_order.h5", "test_order.h5"]
    assert full == ["visual_feature.h5", "audio_feature.h5", "labels.h5", *orders]
    weak = {fault.file for fault in validate(tmp_path, "weak", progress=False).errors}
    assert weak - set(full) == {"mil_labels.h5", "visual_feature_noisy.h5", "audio_feature_noisy.h5"}


@pytest.mark.parametrize("storage", [{}, {"compression": "gzip"}, {"chunks": (7, 2, 2, 2, 3)}, {"dtype": ">f8"}])
@pytest.mark.parametrize("block_rows", [1, 3, 5, 1000])
def test_faults_are_found_in_every_block(
    tmp_path: Path, storage: dict[str, Any], block_rows: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(validation, "BLOCK_BYTES", block_rows * 4 * 2 * 2 * 6 * 8)
    folder = make_folder(tmp_path / "data", videos=50)
    visual = read(folder / "visual_feature.h5")
    visual[[0, 17, 49], 3, 1, 1, 5] = [np.nan, np.inf, -np.inf]
    visual[[1, 30, 48]] = 0
    visual[[2, 31, 47], 0, 0, 0, 0] = -1
    visual[..., 4] = 0.0
    write(folder / "visual_feature.h5", visual, **storage)
    report = validate(folder, progress=False)
    assert {(fault.code, *fault.rows) for fault in report.errors} == {("not_finite", 0, 17, 49)}
    assert {(fault.code, *fault.rows) for fault in report.warnings} == {
        ("zero_visual", 1, 30, 48),
        ("negative_features", 2, 31, 47),
        ("constant_features",),
    }
    constant = next(fault for fault in report.warnings if fault.code == "constant_features")
    assert "1 of 6 dimensions" in constant.found
    assert "4 (= 0)" in constant.found


def test_float16_infinity_is_reported(tmp_path: Path) -> None:
    folder = make_folder(tmp_path / "data", dtype="float16")
    audio = read(folder / "audio_feature.h5")
    audio[4, 1, 2], audio[5, 0, 0] = np.inf, 65504
    write(folder / "audio_feature.h5", audio)
    report = validate(folder, progress=False)
    assert [(fault.code, fault.rows) for fault in report.errors] == [("not_finite", [4])]


def test_the_list_of_rows_is_bounded_and_counted(tmp_path: Path) -> None:
    folder = make_folder(tmp_path / "data", videos=MAX_ROWS + 500)
    audio = read(folder / "audio_feature.h5")
    audio[5:] = 0
    write(folder / "audio_feature.h5", audio)
    (fault,) = validate(folder, progress=False).warnings
    assert fault.rows == list(range(5, 5 + MAX_ROWS))
    assert "1495 of 1500 rows" in fault.found
    assert "1000 rows or more" in str(fault)
    assert len(str(fault)) < 400


def test_a_single_row_is_not_reported_as_constant(tmp_path: Path) -> None:
    folder = make_folder(tmp_path / "data", videos=4, segments=1, grid=1)
    for name in ("visual_feature.h5", "audio_feature.h5"):
        write(folder / name, read(folder / name)[:1])
    assert "constant_features" not in {fault.code for fault in validate(folder, progress=False).warnings}


def test_memory_stays_bounded(tmp_path: Path) -> None:
    # Rows of the published shape that occupy no disk space: 0.4 GB of zeros.
    for name, shape in (("visual_feature.h5", (400, 10, 7, 7, 512)), ("audio_feature.h5", (400, 10, 128))):
        with h5py.File(tmp_path / name, "w") as file:
            plist = h5py.h5p.create(h5py.h5p.DATASET_CREATE)
            plist.set_alloc_time(h5py.h5d.ALLOC_TIME_EARLY)
            plist.set_fill_time(h5py.h5d.FILL_TIME_NEVER)
            space = h5py.h5s.create_simple(shape)
            h5py.h5d.create(file.id, b"avadataset", h5py.h5t.IEEE_F32LE, space, plist)
    assert (tmp_path / "visual_feature.h5").stat().st_size > 4e8
    tracemalloc.start()
    try:
        report = validate(tmp_path, progress=False)
        peak = tracemalloc.get_traced_memory()[1]
    finally:
        tracemalloc.stop()
    zero = next(fault for fault in report.warnings if fault.code == "zero_visual")
    assert "400 of 400 rows" in zero.found
    assert peak < 128 << 20


def test_progress_is_written_to_a_log_file(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr("cmran.utils.progress.LINE_EVERY_S", 0.0)
    monkeypatch.setattr(sys.stderr, "isatty", lambda: False)
    folder = make_folder(tmp_path / "data")
    validate(folder)
    assert "scan features: " in (output := capsys.readouterr().err)
    assert "fingerprint: " in output
    validate(folder, progress=False)
    assert capsys.readouterr().err == ""


def test_a_fault_is_one_line() -> None:
    fault = Fault(code="c", file="f.h5", key="k", rows=[3], found="a", expected="b", hint="do")
    assert str(fault) == "c: f.h5 [k], row 3: found a; expected b: do"
    assert str(FaultError(Path("/data"), fault)) == "/data: c: f.h5 [k], row 3: found a; expected b: do"
    assert rows_text([1, 2]) == "rows 1, 2"
    assert rows_text(range(9)) == "rows 0, 1, 2, 3, 4, 5, 6, 7 ... (9 rows)"
    assert Report("", [fault]).summary() == "1 error, 0 warnings"


@pytest.mark.parametrize("mode", ["full", "weak"])
@pytest.mark.parametrize("built", [False, True])
def test_the_real_label_files_have_no_error(ave: Path, tmp_path: Path, mode: Any, built: bool) -> None:
    for path in ave.iterdir():
        if path.suffix == ".h5" or path.name == "Annotations.txt":
            (tmp_path / path.name).symlink_to(path)
    if built:
        for name in ("labels.h5", "mil_labels.h5", "labels_noisy.h5", "Annotations.txt"):
            (tmp_path / name).unlink()
        header = "Category&VideoID&Quality&StartTime&EndTime\n"
        (tmp_path / "Annotations.txt").write_text(header + (ave / "Annotations.txt").read_text().strip())
    rng = np.random.default_rng(0)
    write(tmp_path / "visual_feature.h5", rng.random((4143, 10, 2, 1, 3), np.float32))
    write(tmp_path / "audio_feature.h5", rng.random((4143, 10, 128), np.float32))
    write(tmp_path / "visual_feature_noisy.h5", rng.random((178, 10, 2, 1, 3), np.float32))
    report = validate(tmp_path, mode, progress=False)
    assert report.errors == []
    shared = {fault.file: fault.rows for fault in report.warnings if fault.code == "shared_video"}
    assert set(shared) == {"val_order.h5", "test_order.h5"}
    assert shared["test_order.h5"] == [339, 680, 785, 931, 1374, 2397, 4074, 4113]
    assert len(shared["val_order.h5"]) == 10
    assert [fault.rows for fault in report.warnings if fault.code == "empty_event"] == [[26]]
    derived = {fault.file for fault in report.warnings if fault.code == "derived_file"}
    weak_files = {"mil_labels.h5", "labels_noisy.h5"} if mode == "weak" else set()
    assert derived == ({"labels.h5", *weak_files} if built else set())


def test_real_annotations_shifted_by_one_are_reported(ave: Path, tmp_path: Path) -> None:
    for path in ave.iterdir():
        if path.suffix == ".h5":
            (tmp_path / path.name).symlink_to(path)
    lines = (ave / "Annotations.txt").read_text().splitlines()
    (tmp_path / "Annotations.txt").write_text("\n".join([*lines[1:], lines[0]]))
    report = validate(tmp_path, progress=False)
    (fault,) = [fault for fault in report.errors if fault.code == "annotations_disagree"]
    assert "shifted by exactly 1" in fault.hint
    assert "row i of Annotations.txt is row i + 1 of labels.h5" in fault.hint
