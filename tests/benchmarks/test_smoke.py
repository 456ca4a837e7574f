"""Smoke test: each benchmark runs at its smallest size and writes its report. Speed is not checked."""

import json
import os
import platform
import subprocess
import sys
from pathlib import Path

import pytest

from benchmarks.report import cpu
from tests.conftest import ROOT

ROWS = {
    "benchmarks.packing": {"pack_wall", "peak_memory", "peak_memory_pack", "peak_memory_predict"},
    "benchmarks.startup": {"startup"},
    "benchmarks.training": {"step_fast", "step_float32", "epoch_disk", "epoch_start"},
    "benchmarks.waiting": {"step_spinning", "step_passive", "step_short_spin", "one_training", "two_trainings"},
    "benchmarks.inference": {
        "ort_float32",
        "ort_int8",
        "latency_float32",
        "latency_int8",
        "predict_wall",
        "predict_wall_cached",
        "predict_read",
        "predict_read_cached",
        "predict_wall_int8",
        "predict_wall_int8_cached",
    },
}
FLOORS = {
    "benchmarks.packing": {"pack_wall"},
    "benchmarks.startup": {"startup"},
    "benchmarks.training": {"step_fast", "step_float32", "epoch_disk", "epoch_start"},
    "benchmarks.waiting": {"step_spinning", "one_training"},
    "benchmarks.inference": {
        "ort_float32",
        "latency_float32",
        "predict_wall",
        "predict_wall_cached",
        "predict_wall_int8",
        "predict_wall_int8_cached",
    },
}
KEYS = ["name", "value", "unit", "floor", "ratio", "against", "baseline", "target", "published", "spread"]


@pytest.mark.slow
@pytest.mark.parametrize("module", ROWS)
def test_benchmark_runs_and_reports(module, tmp_path):
    file = tmp_path / "report.json"
    environment = os.environ | {"MLFLOW_TRACKING_URI": f"sqlite:///{tmp_path}/mlflow.db", "TMPDIR": str(tmp_path)}
    done = subprocess.run(
        [sys.executable, "-m", module, "--tiny", "--json", str(file)],
        cwd=ROOT, env=environment, capture_output=True, text=True, check=False,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    report = json.loads(file.read_text())
    assert list(report) == ["machine", "versions", "commit", "command", "rows"]
    assert report["command"] == f"python -m {module} --tiny --json {file}"
    assert report["versions"]["python"] == platform.python_version()
    assert report["machine"]["cpu"] == cpu()
    assert cpu() in done.stdout
    assert {row["name"] for row in report["rows"]} == ROWS[module]
    assert {row["name"] for row in report["rows"] if row["floor"]} == FLOORS[module]
    for row in report["rows"]:
        assert list(row) == KEYS
        assert row["value"] > 0
        assert row["name"] in done.stdout
        if row["against"] == "floor":
            assert row["ratio"] == pytest.approx(row["value"] / row["floor"])
        elif row["against"]:
            pair = row["baseline"] / row["value"], row["value"] / row["baseline"]
            assert row["ratio"] == pytest.approx(pair[0] if row["target"].startswith(">=") else pair[1])
        # A target is never a ratio to the published step, whose speed differs between processors.
        assert not row["target"].endswith("x") or row["against"]
    # Its temporary files are removed.
    assert [path.name for path in tmp_path.iterdir() if path.name.startswith("cmran-bench-")] == []
    assert Path(file).read_text().endswith("\n")


@pytest.mark.slow
def test_precision_benchmark_runs_and_resumes(tmp_path):
    for times in (1, 2):
        done = subprocess.run(
            [sys.executable, "-m", "benchmarks.precision", "--tiny", "--precisions", "float64", "float32",
             "--out", str(tmp_path / "runs"), "--json", str(tmp_path / f"{times}.json")],
            cwd=ROOT, capture_output=True, text=True, check=False,
        )  # fmt: skip
        assert done.returncode == 0, done.stderr
    first, second = (json.loads((tmp_path / f"{times}.json").read_text())["rows"] for times in (1, 2))
    # The second call found the runs of the first one.
    assert second == first
    assert "epoch 1:" not in done.stderr
    *scores, difference = first
    assert [row["name"] for row in scores] == ["val_accuracy_float64", "val_accuracy_float32"]
    assert all(0 <= row["value"] <= 100 for row in scores)
    assert difference["value"] == pytest.approx(abs(scores[0]["value"] - scores[1]["value"]))
    assert len(list((tmp_path / "runs").glob("full-float*/metrics.json"))) == 4
