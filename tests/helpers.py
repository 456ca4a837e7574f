"""A tiny, valid, complete data folder, written with h5py only, so that reader tests do not depend on the generator."""

from pathlib import Path
from typing import Any

import h5py
import numpy as np

from cmran.categories import BACKGROUND, CATEGORIES


def write(path: Path, values: Any, key: str = "avadataset", **kwargs: Any) -> None:
    """Write one HDF5 file with one dataset: contiguous and uncompressed, unless `kwargs` (of create_dataset) differ."""
    with h5py.File(path, "w") as file:
        file.create_dataset(key, data=values, **kwargs)


def read(path: Path, key: str = "avadataset") -> np.ndarray:
    with h5py.File(path, "r") as file:
        return np.asarray(file[key][()])


def make_folder(
    path: Path,
    videos: int = 12,
    *,
    background_videos: int = 3,
    grid: int = 2,
    visual_features: int = 6,
    audio_features: int = 5,
    segments: int = 4,
    categories: int = 3,
    seed: int = 0,
    dtype: str = "float64",
    annotations: bool = True,
) -> Path:
    """Write all ten files and Annotations.txt to `path`; at least 4 videos.

    Features are random, labels match the annotations, and the shuffled splits (half train, a quarter val, the rest
    test) cover every row once. The validator reports no error and no warning: there is no zero row, no constant
    dimension and no video in two splits.
    """
    rng = np.random.default_rng(seed)
    path.mkdir(parents=True, exist_ok=True)

    def features(*shape: int) -> np.ndarray:
        values = rng.random(shape, dtype=np.float64) + 0.01
        values[rng.random(shape) < 0.5] = 0.0
        # No video is all zero and, with at least two videos, no dimension is constant.
        values[:, 0, ..., 0] = 1.0
        values.reshape(-1, shape[-1])[0] = 0.25
        values.reshape(-1, shape[-1])[-1] = 0.75
        return values.astype(dtype)

    category = rng.permutation(np.arange(videos) % categories)
    starts = rng.integers(0, segments, videos)
    ends = np.array([rng.integers(start + 1, segments + 1) for start in starts])

    labels = np.zeros((videos, segments, 29), np.float32)
    labels[:, :, BACKGROUND] = 1
    for row, (c, start, end) in enumerate(zip(category, starts, ends, strict=True)):
        labels[row, start:end, BACKGROUND] = 0
        labels[row, start:end, c] = 1
    noisy = np.zeros((background_videos, 29), np.float32)
    noisy[:, BACKGROUND] = 1

    write(path / "visual_feature.h5", features(videos, segments, grid, grid, visual_features))
    write(path / "audio_feature.h5", features(videos, segments, audio_features))
    write(path / "labels.h5", labels)
    write(path / "mil_labels.h5", np.eye(29, dtype=np.float32)[category])
    write(path / "visual_feature_noisy.h5", features(background_videos, segments, grid, grid, visual_features))
    write(path / "audio_feature_noisy.h5", features(background_videos, segments, audio_features))
    write(path / "labels_noisy.h5", noisy)

    rows = rng.permutation(videos).astype(np.int64)
    train, val = videos // 2, videos // 2 + max(1, videos // 4)
    write(path / "train_order.h5", rows[:train], "order")
    write(path / "val_order.h5", rows[train:val], "order")
    write(path / "test_order.h5", rows[val:], "order")

    if annotations:
        lines = [
            # Many real YouTube ids start with a dash.
            f"{CATEGORIES[c]}&{'-' if row % 4 == 0 else 'v'}id{row:08d}&good&{start}&{end}"
            for row, (c, start, end) in enumerate(zip(category, starts, ends, strict=True))
        ]
        (path / "Annotations.txt").write_text("\n".join(lines) + "\n", encoding="utf-8")
    return path
