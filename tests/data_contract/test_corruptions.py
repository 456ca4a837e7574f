"""Corrupted folders: each fault is reported with its code, file, key and rows, and no other fault is reported."""

from pathlib import Path
from typing import Any

import pytest

from cmran.data.dataset import open_folder
from cmran.data.faults import Fault
from cmran.data.validation import require_labels, validate
from cmran.errors import CmranError
from cmran.training.trainer import fit
from tests.cmran.tiny import tiny_config
from tests.data_contract.corruptions import CORRUPTIONS, Corruption
from tests.helpers import make_folder


def found(faults: list[Fault], expected: tuple[tuple[object, ...], ...]) -> list[tuple[object, ...]]:
    """Return (code, file, key, rows) of each fault, with `...` as rows if the expectation leaves them open."""
    rows: list[object] = [
        ... if number < len(expected) and expected[number][3] is ... and fault.rows else tuple(fault.rows)
        for number, fault in enumerate(faults)
    ]
    return [(fault.code, fault.file, fault.key, row) for fault, row in zip(faults, rows, strict=True)]


@pytest.mark.parametrize("corruption", CORRUPTIONS, ids=lambda corruption: corruption.name)
def test_exactly_the_expected_faults_are_reported(corruption: Corruption, tmp_path: Path) -> None:
    folder = make_folder(tmp_path / "data")
    corruption.change(folder)
    report = validate(folder, corruption.mode, progress=False)
    assert found(report.errors, corruption.errors) == list(corruption.errors)
    # Some corruptions also remove rows from the splits.
    warnings = [fault for fault in report.warnings if fault.code != "uncovered_rows" or not corruption.errors]
    assert found(warnings, corruption.warnings) == list(corruption.warnings)
    text = "\n".join(map(str, report.errors + report.warnings))
    for words in corruption.contains:
        assert words in text
    for fault in report.errors + report.warnings:
        line = str(fault)
        assert "\n" not in line
        assert fault.file in line
        assert fault.key is None or fault.key in line
        assert all(str(row) in line for row in fault.rows[:8])
        assert fault.found
        assert fault.expected
        assert fault.hint


def test_the_corruption_catalog_is_complete() -> None:
    assert len({corruption.name for corruption in CORRUPTIONS}) == len(CORRUPTIONS) >= 40
    codes = {fault[0] for corruption in CORRUPTIONS for fault in corruption.errors}
    assert codes >= {
        *("missing_file", "unreadable_file", "missing_key", "wrong_shape", "wrong_dtype", "not_finite", "not_one_hot"),
        *("labels_disagree", "annotations_disagree", "order_out_of_range", "order_repeated", "order_overlap"),
        *("row_count", "empty_split", "segments_disagree", "bad_annotations"),
    }


@pytest.mark.parametrize("mode", ["full", "weak"])
@pytest.mark.parametrize("dtype", ["float64", "float32", "float16"])
def test_a_valid_folder_has_no_fault(tmp_path: Path, mode: str, dtype: str) -> None:
    for number, sizes in enumerate(({}, {"videos": 4, "segments": 1, "grid": 1}, {"videos": 40, "segments": 10})):
        folder = make_folder(tmp_path / str(number), dtype=dtype, seed=number, **sizes)  # type: ignore[arg-type]
        report = validate(folder, mode, progress=False)  # type: ignore[arg-type]
        assert report.ok
        assert report.to_dict() == {"fingerprint": report.fingerprint, "errors": [], "warnings": []}


IN_FEATURES = {"corrupted-chunk", "nan", "infinity", "too-large", "nan-in-compressed"}
"""Corruptions that are found only by reading all features. Training detects them when it reads the features."""


@pytest.mark.parametrize("mode", ["full", "weak"])
@pytest.mark.parametrize("corruption", CORRUPTIONS, ids=lambda corruption: corruption.name)
def test_training_refuses_every_folder_with_an_error(corruption: Corruption, mode: Any, tmp_path: Path) -> None:
    folder = make_folder(tmp_path / "data")
    corruption.change(folder)
    errors = validate(folder, mode, progress=False).errors
    if not errors:
        with open_folder(folder, mode=mode):
            require_labels(folder, mode)
        return
    started: list[object] = []
    with pytest.raises(CmranError) as caught:
        fit(folder, tiny_config(mode, epochs=1), tmp_path / "run", device="cpu", on_start=started.append)
    assert "\n" not in str(caught.value)
    assert any(error.file in str(caught.value) for error in errors) or corruption.name in IN_FEATURES
    if corruption.name not in IN_FEATURES:
        assert started == [], "the error is known before the first step"
        assert not (tmp_path / "run").exists()


@pytest.mark.parametrize(
    "corruption",
    [corruption for corruption in CORRUPTIONS if not corruption.errors],
    ids=lambda corruption: corruption.name,
)
def test_the_reader_accepts_folders_with_warnings_only(corruption: Corruption, tmp_path: Path) -> None:
    folder = make_folder(tmp_path / "data")
    corruption.change(folder)
    with open_folder(folder, mode=corruption.mode) as data:
        assert data.segment_labels().shape == (12, 4)
        assert data.video_labels().shape == (12,)
        assert data.read_visual(range(data.rows)).shape[0] == data.rows
