"""Preparing a release: the data of the parity check, the export, precision variants and scores."""

import logging
import math
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from cmran.data.dataset import open_folder
from cmran.data.fingerprint import folder_fingerprint
from cmran.errors import ConfigError, DataError
from serving import export, parity, release, session
from serving.release import (
    Scores,
    export_with_parity_check,
    find_parity_data,
    make_checked_variants,
    recorded_scores,
    val_batches,
)
from tests.serving.conftest import GRID, LINEAGE, SEGMENTS, Exported


@pytest.fixture
def quick_export(full: Exported, monkeypatch: pytest.MonkeyPatch) -> None:
    """Replace the export, which takes seconds, by the file that was already exported."""

    def copy(model: object, path: Path, **sizes: object) -> Path:
        assert sizes == {"segments": SEGMENTS, "grid": GRID, "metadata": LINEAGE}
        return Path(shutil.copy(full.path, path))

    monkeypatch.setattr(export, "export_onnx", copy)


def test_the_parity_check_uses_the_given_data_or_the_unchanged_training_data(data: Path, tmp_path: Path) -> None:
    fingerprint = folder_fingerprint(data)
    assert find_parity_data(tmp_path, recorded=None, fingerprint=None) == (tmp_path, "")
    assert find_parity_data(None, recorded=data, fingerprint=fingerprint) == (data, "")
    for recorded, reason in ((None, "does not name its data"), (tmp_path / "gone", "not there any more")):
        found = find_parity_data(None, recorded=recorded, fingerprint=fingerprint)
        assert found[0] is None
        assert reason in found[1]
    found = find_parity_data(None, recorded=data, fingerprint="0" * 32)
    assert found[0] is None
    assert "have changed" in found[1]


def test_val_batches_are_all_val_videos_in_order(data: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(release, "PARITY_BATCH", 2)
    with open_folder(data) as folder:
        batches = list(val_batches(folder))
        assert [len(visual) for visual, _ in batches] == [2, 2, 1]
        expected = folder.read_audio(folder.order("val"))
    np.testing.assert_array_equal(np.concatenate([audio for _, audio in batches]), expected)


def test_an_export_is_compared_on_val(full: Exported, data: Path, tmp_path: Path, quick_export: None) -> None:
    with open_folder(data) as folder:
        path, report = export_with_parity_check(
            full.model, tmp_path / "model.onnx", folder, segments=SEGMENTS, grid=GRID, metadata=LINEAGE
        )
    assert (path, report.passed, report.rows) == (tmp_path / "model.onnx", True, 5)
    assert list(tmp_path.iterdir()) == [path]


def test_a_file_that_fails_the_parity_check_replaces_nothing(
    full: Exported, tmp_path: Path, quick_export: None, monkeypatch: pytest.MonkeyPatch
) -> None:
    real = parity.check_parity

    def fail(*arguments: Any, **options: Any) -> parity.ParityReport:
        return real(*arguments, **options).model_copy(update={"failures": ("segments: all differ",)})

    monkeypatch.setattr(parity, "check_parity", fail)
    out = tmp_path / "model.onnx"
    out.write_bytes(b"an earlier file")
    path, report = export_with_parity_check(full.model, out, segments=SEGMENTS, grid=GRID, metadata=LINEAGE)
    assert (path, report.passed) == (tmp_path / "model.onnx.unchecked", False)
    assert path.is_file()
    assert out.read_bytes() == b"an earlier file"


def test_an_export_is_rejected_before_it_starts(full: Exported, data: Path, tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"is a folder: name the ONNX file to write, such as .*cmran-full\.onnx"):
        export_with_parity_check(full.model, tmp_path)
    with open_folder(data) as folder, pytest.raises(DataError, match=r"found 4 segments and a 2x2 grid, expected 10"):
        export_with_parity_check(full.model, tmp_path / "model.onnx", folder)
    assert not list(tmp_path.iterdir())


def test_variants_that_cannot_be_checked_are_left_out(
    full: Exported, data: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(session, "cuda_works", lambda _: False)
    base = Path(shutil.copy(full.path, tmp_path / "model.onnx"))
    (tmp_path / "model.int8.onnx").write_bytes(b"of an earlier release")
    with caplog.at_level(logging.INFO, "serving"):
        (float16,) = make_checked_variants(base, ["float16"], data, mode="full")
        (int8,) = make_checked_variants(base, ["int8"], None, mode="full", no_data="it was moved")
    assert (float16.path, float16.parity, int8.path, int8.parity) == (None, None, None, None)
    assert float16.tags() == {"float16_left_out": float16.reason}
    assert int8.reason.endswith("it was moved")
    levels = {record.levelname for record in caplog.records if "variant float16 is left out" in record.getMessage()}
    assert levels == {"INFO"}
    levels = {record.levelname for record in caplog.records if "variant int8 is left out" in record.getMessage()}
    assert levels == {"WARNING"}
    assert list(tmp_path.iterdir()) == [base]


@pytest.mark.parametrize(
    ("val", "baseline", "reason"),
    [
        (None, 40.0, "no accuracy on val"),
        (math.nan, 40.0, "no accuracy on val"),
        (50.0, None, "baselines on val are not known"),
        (40.0, 40.0, "not above 40.000"),
        (40.1, 40.0, None),
    ],
)
def test_only_a_model_above_the_trivial_baselines_may_become_champion(
    val: float | None, baseline: float | None, reason: str | None
) -> None:
    found = Scores(val=val, test=None, fingerprint="f", baseline=baseline).not_champion
    assert (found is None) if reason is None else reason in (found or "")


def test_missing_baselines_are_computed_from_the_training_data_only(data: Path) -> None:
    fingerprint = folder_fingerprint(data)
    found = recorded_scores(fingerprint, 50.0, None, data, mode="full")
    assert (found.val, found.test) == (50.0, None)
    assert found.baseline is not None
    metrics = {"val": {"accuracy": 51.0, "baselines": {"always_background": found.baseline}}, "test": None}
    assert recorded_scores(fingerprint, 50.0, metrics, None, mode="full") == Scores(
        val=51.0, test=None, fingerprint=fingerprint, baseline=found.baseline
    )
    assert recorded_scores("0" * 32, 50.0, None, data, mode="full").baseline is None
