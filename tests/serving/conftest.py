"""Small networks and their exported models, which are created once because an export takes seconds."""

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from cmran import CMRAN, ModelConfig
from cmran.config import Mode
from cmran.data.dataset import open_folder
from serving.export import export_onnx
from tests.helpers import make_folder

SEGMENTS, GRID = 4, (2, 2)
LINEAGE = {"run_id": "f" * 32, "git_commit": "0123abc", "fingerprint": "a" * 32}


def small(mode: Mode = "full", **settings: Any) -> ModelConfig:
    """Settings of a tiny network that fits `make_folder`."""
    sizes = {"width": 16, "feedforward": 32, "bottleneck": 8, "spatial_width": 8}
    return ModelConfig(mode=mode, visual_features=6, audio_features=5, **(sizes | settings))


def network(config: ModelConfig, seed: int = 0) -> CMRAN:
    """Random weights, in evaluation mode."""
    generator = torch.get_rng_state()
    torch.manual_seed(seed)
    model = CMRAN(config).eval()
    torch.set_rng_state(generator)
    return model


@dataclass(frozen=True)
class Exported:
    model: CMRAN
    path: Path

    def outputs(self, visual: np.ndarray, audio: np.ndarray) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
        """Event logits, class logits and labels as PyTorch computes them."""
        from serving.export import Exportable

        with torch.no_grad():
            values = Exportable(self.model)(torch.from_numpy(visual), torch.from_numpy(audio))
        return tuple(value.numpy() for value in values)  # type: ignore[return-value]


@pytest.fixture(scope="session")
def data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder of 22 videos: 11 train, 5 val, 6 test."""
    return make_folder(tmp_path_factory.mktemp("data") / "folder", 22)


@pytest.fixture(scope="session")
def exported(tmp_path_factory: pytest.TempPathFactory, data: Path) -> Callable[[Mode], Exported]:
    """The exported model of a mode; it predicts an event for half of the segments of `data`."""
    models: dict[Mode, Exported] = {}

    def get(mode: Mode) -> Exported:
        if mode not in models:
            model = network(small(mode))
            with open_folder(data) as folder, torch.no_grad():
                rows = np.arange(folder.videos)
                visual, audio = folder.read_visual(rows), folder.read_audio(rows)
                # Spread far apart, so that rounding changes no label.
                model.event_head.weight *= 50
                model.class_head.weight *= 50
                logits = model(torch.from_numpy(visual), torch.from_numpy(audio)).event_logits
                low, high = logits.flatten().sort().values[logits.numel() // 2 - 1 :][:2]
                model.event_head.bias -= (low + high) / 2
            path = tmp_path_factory.mktemp(mode) / "model.onnx"
            models[mode] = Exported(model, export_onnx(model, path, segments=SEGMENTS, grid=GRID, metadata=LINEAGE))
        return models[mode]

    return get


@pytest.fixture(scope="session")
def full(exported: Callable[[Mode], Exported]) -> Exported:
    return exported("full")


@pytest.fixture(scope="session")
def weak(exported: Callable[[Mode], Exported]) -> Exported:
    return exported("weak")
