"""The synthetic task needs both audio and video: shown with small networks on small features."""

from pathlib import Path
from typing import Any

import numpy as np
import pytest

from cmran.config import Mode, ModelConfig, RunConfig, TrainConfig
from cmran.data.dataset import open_folder
from cmran.data.synthetic import SyntheticConfig, synthesize
from cmran.evaluation.metrics import segment_accuracy
from cmran.training.run_dir import FitResult
from cmran.training.trainer import fit

pytestmark = pytest.mark.slow


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    # With few features the evidence is weak, so the signals are stronger than the defaults. The ambiguity stays.
    config = SyntheticConfig(sound_strength=3.5, look_strength=4.0)
    out = tmp_path_factory.mktemp("problem") / "data"
    sizes: dict[str, Any] = {"grid": 3, "visual_features": 96, "audio_features": 48}
    return synthesize(out, videos=600, dtype="float32", config=config, progress=False, **sizes)


def trained(folder: Path, out: Path, mode: Mode, train: dict[str, Any], **ablation: bool) -> FitResult:
    sizes: dict[str, Any] = {"visual_features": 96, "audio_features": 48, "width": 64, "layers": 1, "feedforward": 128}
    model = ModelConfig(mode=mode, bottleneck=32, spatial_width=32, **sizes, **ablation)
    return fit(folder, RunConfig(recipe="demo", model=model, train=TrainConfig(**train)), out, device="cpu")


def trivial(folder: Path) -> float:
    """Return the best val accuracy, in %, of one constant label."""
    with open_folder(folder) as data:
        labels = data.segment_labels()[data.order("val")]
        return max(segment_accuracy(np.full_like(labels, label), labels) for label in range(29))


def test_task_needs_both_modalities(folder: Path, tmp_path: Path) -> None:
    train = {"epochs": 8, "lr_milestones": (6,), "lr": 2e-3, "batch_size": 16}
    both = trained(folder, tmp_path / "both", "full", train)
    audio = trained(folder, tmp_path / "audio", "full", train, audio_only=True)
    visual = trained(folder, tmp_path / "visual", "full", train, visual_only=True)
    scores = {
        name: (run.val["accuracy"], run.test["accuracy"] if run.test else 0.0)
        for name, run in (("both", both), ("audio", audio), ("visual", visual))
    }
    assert min(scores["both"]) > 70
    assert max(scores["both"]) < 97, "the task should keep some ambiguity"
    assert max(scores["audio"] + scores["visual"]) < 60
    assert min(scores["both"]) > max(scores["audio"] + scores["visual"]) + 20
    assert both.val["accuracy"] > trivial(folder) + 40
    # The network localizes events; it does not only classify videos.
    assert both.val["background_recall"] > 0.5


def test_weak_mode_learns_the_task_from_video_labels(folder: Path, tmp_path: Path) -> None:
    run = trained(
        folder,
        tmp_path / "weak",
        "weak",
        {"epochs": 8, "lr_milestones": (6,), "lr": 1e-3, "batch_size": 8, "clip_norm": 0.5, "seed": 666},
    )
    assert run.test is not None
    assert min(run.val["accuracy"], run.test["accuracy"]) > trivial(folder) + 15
    assert max(run.val["accuracy"], run.test["accuracy"]) < 97
