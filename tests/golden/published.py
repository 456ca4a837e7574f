"""Recreate the weights and inputs of the golden vectors from their seed.

The golden values were computed in float64 with weights that had been rounded to float32; with unrounded weights the
outputs differ by 1e-7. The tests therefore import the weights in float32 and then convert the network to float64.
"""

import json
import zlib
from pathlib import Path
from typing import Any

import numpy as np
import torch

FOLDER = Path(__file__).resolve().parent
KEYS: dict[str, dict[str, list[int]]] = json.loads((FOLDER / "checkpoint_keys.json").read_text())
SEED, BATCH = 20, 3


def state_dict(mode: str, seed: int = SEED) -> dict[str, torch.Tensor]:
    """Return a published checkpoint in float64, including the unused weights, drawn from the seed and not rounded."""
    return {key: torch.from_numpy(_weight(key, shape, seed)) for key, shape in KEYS[mode].items()}


def inputs(seed: int = SEED, batch: int = BATCH) -> dict[str, torch.Tensor]:
    """Return visual (B,10,7,7,512), audio (B,10,128), one-hot segments (B,10,29) and their mean, video (B,29)."""
    r = np.random.default_rng([seed, 1])
    visual = np.maximum(r.standard_normal((batch, 10, 7, 7, 512)), 0)
    audio = r.random((batch, 10, 128))
    category = r.integers(0, 28, batch)
    start = r.integers(0, 6, batch)
    end = start + r.integers(1, 5, batch)
    t = np.arange(10)
    label = np.where((t >= start[:, None]) & (t < end[:, None]), category[:, None], 28)
    segments = np.eye(29)[label]
    values = {"visual": visual, "audio": audio, "segments": segments, "video": segments.mean(1)}
    return {name: torch.from_numpy(value) for name, value in values.items()}


def golden() -> dict[str, Any]:
    """Read the golden vectors."""
    with np.load(FOLDER / "golden.npz") as file:
        return dict(file)


def _weight(key: str, shape: list[int], seed: int) -> np.ndarray:
    x = np.random.default_rng([seed, zlib.crc32(key.encode())]).standard_normal(shape)
    if "norm" in key and key.endswith("weight"):
        return 1 + 0.02 * x
    return 0.02 * x if key.endswith("bias") else x / np.sqrt(shape[-1])
