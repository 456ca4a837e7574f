"""The public API: its names, its light import, and the examples that use it."""

import ast
import json
import subprocess
import sys
import time
from types import SimpleNamespace

import numpy as np
import pytest
import torch

import cmran
from cmran import tracking
from cmran.errors import CheckpointError, CmranError, DataError
from cmran.model.checkpoints import export_published
from tests.conftest import ROOT
from tests.helpers import make_folder

TINY = {"width": 8, "heads": 2, "layers": 1, "feedforward": 8, "bottleneck": 4, "spatial_width": 4}


@pytest.fixture(scope="module")
def trained(tmp_path_factory):
    """A data folder and a run of one epoch, through the public API with paths as strings."""
    work = tmp_path_factory.mktemp("api")
    data = make_folder(work / "data")
    overrides = {"model": TINY | {"visual_features": 6, "audio_features": 5}, "train": {"epochs": 1}}
    config = cmran.load_config("full", "demo", overrides=overrides)
    records = []
    result = cmran.fit(str(data), config, str(work / "run"), device="cpu", on_epoch=records.append)
    assert [record.epoch for record in records] == [1]
    assert result.test is not None
    return data, work / "run", result


def test_the_import_is_light_and_has_no_side_effects(tmp_path):
    code = (
        "import logging, os, sys\n"
        "before = set(sys.modules)\n"
        "opened = []\n"
        "sys.addaudithook(lambda event, args: opened.append(args[0]) if event == 'open' else None)\n"
        "import cmran\n"
        "assert not logging.root.handlers\n"
        "assert not [name for name in sys.modules if name.startswith('cmran.')], 'submodules were imported'\n"
        "written = [name for name in opened if not str(name).endswith(('.py', '.pyc'))]\n"
        "print(written, cmran.CmranError.__name__)\n"
    )
    started = time.perf_counter()
    done = subprocess.run(
        [sys.executable, "-B", "-c", code],
        cwd=tmp_path, env={"PYTHONPATH": str(ROOT), "PATH": ""}, capture_output=True, text=True, check=True,
    )  # fmt: skip
    assert done.stdout == "[] CmranError\n"
    assert list(tmp_path.iterdir()) == []
    # The whole interpreter; generous, since other work may share the cores.
    assert time.perf_counter() - started < 10


def test_every_public_name_is_there_and_known_to_type_checkers():
    tree = ast.parse((ROOT / "cmran/__init__.py").read_text())
    imports = {
        (alias.name, node.module)
        for node in ast.walk(tree)
        if isinstance(node, ast.ImportFrom) and node.module.startswith("cmran.")
        for alias in node.names
    }
    assert imports == {(name, f"cmran.{module}") for name, module in cmran._MODULES.items()}
    assert sorted(cmran.__all__) == cmran.__all__
    for name in cmran.__all__:
        value = getattr(cmran, name)
        assert name in dir(cmran)
        assert name == "CATEGORIES" or value.__doc__
    with pytest.raises(AttributeError, match="no attribute 'nothing'"):
        _ = cmran.nothing


def test_load_model_takes_run_directories_and_checkpoints(trained):
    _, run, result = trained
    for source in (run, str(run), run / "best.pt", run / "last.pt"):
        model, info = cmran.load_model(source)
        assert not model.training
        assert (info["epoch"], info["val_accuracy"]) == (1, result.val["accuracy"])
    with pytest.raises(CmranError, match="mode full"):
        cmran.load_model(run, "weak")


def test_load_model_takes_a_published_checkpoint(tmp_path):
    torch.manual_seed(0)
    weights = export_published(cmran.CMRAN(cmran.ModelConfig(mode="weak")))
    torch.save(weights, tmp_path / "model.pth.tar")
    model, info = cmran.load_model(str(tmp_path / "model.pth.tar"))
    assert (model.config.mode, info) == ("weak", {"mode": "weak"})


def test_load_model_takes_the_checkpoint_of_a_registered_version(trained, monkeypatch):
    _, run, _ = trained
    versions = {"models:/cmran-full@champion": "0" * 32, "models:/other/1": None}
    monkeypatch.setattr(tracking, "resolve_model", lambda uri: SimpleNamespace(run_id=versions[uri]))
    monkeypatch.setattr(tracking, "checkpoint_of_run", lambda run_id, folder: run / "best.pt")
    model, _ = cmran.load_model("models:/cmran-full@champion")
    expected, _ = cmran.load_model(run)
    assert all(torch.equal(a, b) for a, b in zip(model.parameters(), expected.parameters(), strict=True))
    with pytest.raises(CheckpointError, match="does not name the run"):
        cmran.load_model("models:/other/1")


def test_predictions_scores_and_events_agree(trained):
    data, run, result = trained
    model, _ = cmran.load_model(run)
    with cmran.open_folder(data, features="float16") as folder:
        rows = folder.order("test")
        predictions = cmran.predict(model, folder, device="cpu")
        assert predictions.rows.tolist() == rows.tolist()
        same = cmran.predict(model, folder, rows.tolist(), device="cpu")
        np.testing.assert_array_equal(same.event_logits, predictions.event_logits)
        scores = cmran.evaluate(model, folder, device="cpu")
        right = predictions.segments == folder.segment_labels()[rows]
        assert scores.accuracy == pytest.approx(100 * right.mean())
        assert scores.accuracy == result.test["accuracy"]
        with pytest.raises((DataError, CmranError, IndexError)):
            cmran.predict(model, folder, [99], device="cpu")


def test_predicted_events_join_segments_and_carry_their_confidence():
    from cmran.training.inference import Predictions

    event_logits = np.array([[-1.0, 0.5, 2.0], [-3.0, -2.0, -1.0]])
    class_logits = np.zeros((2, 28))
    class_logits[0, 4] = 3.0
    segments = np.array([[28, 4, 4], [28, 28, 28]])
    (event,) = cmran.predicted_events(Predictions(np.array([7, 9]), event_logits, class_logits, segments))
    assert (event.row, event.category, event.start_s, event.end_s) == (7, 4, 1.0, 3.0)
    probability = 1 / (1 + np.exp(-event_logits[0, 1:]))
    assert event.score == pytest.approx(probability.mean() * np.exp(3) / (np.exp(3) + 27))


def _run_example(code, folder):
    done = subprocess.run([sys.executable, "-c", code], cwd=folder, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    work = folder / "quickstart"
    assert (work / "timeline.png").read_bytes().startswith(b"\x89PNG")
    assert json.loads((work / "run/metrics.json").read_text())["test"] is None
    return done.stdout


@pytest.mark.slow
def test_the_quick_start_script_runs(tmp_path):
    path = ROOT / "examples/quickstart.py"
    output = _run_example(f"import runpy; runpy.run_path({str(path)!r}, run_name='__main__')", tmp_path)
    assert "test:" in output


@pytest.mark.slow
def test_the_quick_start_notebook_runs(tmp_path):
    """The code cells in order, each one's last expression included, without Jupyter."""
    notebook = json.loads((ROOT / "examples/quickstart.ipynb").read_text())
    cells = ["".join(cell["source"]) for cell in notebook["cells"] if cell["cell_type"] == "code"]
    assert len(cells) >= 5
    assert all(cell["outputs"] == [] for cell in notebook["cells"] if cell["cell_type"] == "code")
    _run_example("\n".join(cells), tmp_path)
