"""A network and settings that are small enough for a test and fit tests.helpers.make_folder."""

from typing import Any

from cmran.config import Mode, ModelConfig, RunConfig, TrainConfig


def tiny_model(mode: Mode = "full", **changes: Any) -> ModelConfig:
    sizes: dict[str, Any] = {
        "visual_features": 6,
        "audio_features": 5,
        "width": 8,
        "heads": 2,
        "interaction_heads": 2,
        "layers": 1,
        "feedforward": 16,
        "bottleneck": 4,
        "spatial_width": 4,
    }
    return ModelConfig(mode=mode, **(sizes | changes))


def tiny_config(mode: Mode = "full", model: dict[str, Any] | None = None, **train: Any) -> RunConfig:
    settings: dict[str, Any] = {"epochs": 3, "batch_size": 4, "lr_milestones": (2,), "lr": 0.01}
    return RunConfig(recipe="debug", model=tiny_model(mode, **(model or {})), train=TrainConfig(**(settings | train)))
