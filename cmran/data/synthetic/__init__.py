"""Generate a complete data folder in the published format, with a task that needs both audio and video.

`task` defines the task, `splits` the labels and splits, `writer` the files.
"""

import math
import os
from pathlib import Path
from typing import Any, Literal

import numpy as np
from numpy.typing import NDArray

from cmran.data.annotations import background_labels, segment_labels, video_labels
from cmran.data.layout import (
    ANNOTATIONS,
    AUDIO,
    AUDIO_NOISY,
    FILES,
    LABELS,
    LABELS_NOISY,
    MIL_LABELS,
    ORDERS,
    VISUAL,
    VISUAL_NOISY,
    FileSpec,
)
from cmran.data.synthetic.splits import first_annotations, read_splits, synthetic_annotations, synthetic_splits
from cmran.data.synthetic.task import (
    BACKGROUND_STREAM,
    FOLDER_STREAM,
    VIDEO_STREAM,
    Event,
    SyntheticConfig,
    World,
    look_of,
    sound_of,
)
from cmran.data.synthetic.writer import (
    FeatureFiles,
    check_space,
    check_target,
    partial_folder,
    write_array,
    write_features,
)
from cmran.errors import ConfigError
from cmran.utils.device import usable_cpus
from cmran.utils.files import optional
from cmran.utils.progress import Progress

__all__ = ["FeatureDtype", "SyntheticConfig", "look_of", "sound_of", "synthesize"]

FeatureDtype = Literal["float64", "float32", "float16"]

DEFAULT_VIDEOS = 600
PUBLISHED_VIDEOS, PUBLISHED_BACKGROUND_VIDEOS = VISUAL.published_shape[0], VISUAL_NOISY.published_shape[0]


def synthesize(
    out: Path,
    *,
    videos: int | None = None,
    background_videos: int | None = None,
    annotations: Path | None = None,
    orders: Path | None = None,
    dtype: FeatureDtype = "float64",
    seed: int = 0,
    config: SyntheticConfig | None = None,
    segments: int = 10,
    grid: int = 7,
    visual_features: int = 512,
    audio_features: int = 128,
    progress: bool = True,
    threads: int | None = None,
) -> Path:
    """Generate the folder `out` with the ten files and Annotations.txt.

    The folder gets its name only when it is complete; until then it is `out` + ".partial-...". The generator needs
    about 40 MB of memory.

    Args:
        out: A new or empty folder.
        videos: N. Default: 600, or all videos of `annotations`. With `annotations`, the first N videos are used.
        background_videos: M. Default: in proportion to N, 178 at the published size.
        annotations: An Annotations.txt whose categories, ids, starts and ends replace synthetic ones.
        orders: A folder with train_order.h5, val_order.h5 and test_order.h5 for `annotations`. Rows from N on are
            dropped. Without it, the splits are generated.
        dtype: Dtype of the four feature files.
        seed: Random seed.
        config: Difficulty of the task.
        segments: T.
        grid: H and W.
        visual_features: C.
        audio_features: A.
        progress: Show a progress bar.
        threads: Number of threads. Default: up to 4. The result does not depend on it.

    Returns:
        The absolute path of the folder.

    Raises:
        ConfigError: An argument is out of bounds, or does not fit the annotations.
        DataError: The annotations or orders cannot be read.
        StorageError: `out` is not empty, or the disk has too little space.
    """
    config = config or SyntheticConfig()
    for name, value, least in (
        ("videos", videos, 3),
        ("background_videos", background_videos, 1),
        ("seed", seed, 0),
        ("segments", segments, 1),
        ("grid", grid, 1),
        ("visual_features", visual_features, 1),
        ("audio_features", audio_features, 1),
        ("threads", threads, 1),
    ):
        if value is not None and value < least:
            raise ConfigError(f"`{name}`: found {value}, expected at least {least}")
    if dtype not in ("float64", "float32", "float16"):
        raise ConfigError(f"`dtype`: found {dtype!r}, expected float64, float32 or float16")
    if orders is not None and annotations is None:
        raise ConfigError("`orders` needs `annotations`, to which the rows of the splits refer")
    if config.sound_only_share + config.sight_only_share > 1:
        raise ConfigError("sound_only_share and sight_only_share add up to more than 1", hint="reduce one of them")
    out = Path(out).absolute()
    check_target(out)

    rng = np.random.default_rng([seed, FOLDER_STREAM])
    if annotations is None:
        rows = synthetic_annotations(rng, videos or DEFAULT_VIDEOS, segments, config)
    else:
        rows = first_annotations(annotations, videos, segments)
    splits = synthetic_splits(rng, rows) if orders is None else read_splits(orders, len(rows))
    if background_videos is None:
        share = PUBLISHED_BACKGROUND_VIDEOS / PUBLISHED_VIDEOS
        background_videos = max(round(len(rows) * share), min(len(rows) // 8, 75), 1)

    stored = np.dtype(dtype).newbyteorder("<")
    sizes = {"N": len(rows), "M": background_videos, "T": segments, "H": grid, "W": grid}
    sizes |= {"C": visual_features, "A": audio_features}
    labels: dict[FileSpec, NDArray[Any]] = {
        LABELS: segment_labels(rows, segments),
        MIL_LABELS: video_labels(rows),
        LABELS_NOISY: background_labels(background_videos),
        **{ORDERS[name]: order for name, order in splits.items()},
    }
    features = {spec: tuple(_size(sizes, letter) for letter in spec.shape) for spec in FILES if spec.kind == "features"}
    needed = sum(math.prod(shape) for shape in features.values()) * stored.itemsize
    needed += sum(array.nbytes for array in labels.values())
    check_space(out, needed)

    world = World.generate(seed, config, grid, visual_features, audio_features)
    with partial_folder(out) as folder:
        pairs = [
            FeatureFiles(VISUAL, AUDIO, [Event.of(annotation) for annotation in rows], VIDEO_STREAM),
            FeatureFiles(VISUAL_NOISY, AUDIO_NOISY, [None] * background_videos, BACKGROUND_STREAM),
        ]
        with Progress(len(rows) + background_videos, f"generate {out.name}", "videos", enabled=progress) as bar:
            for files in pairs:
                write_features(folder, files, features, stored, world, seed, threads or min(4, usable_cpus()), bar)
        for spec, array in labels.items():
            write_array(folder, spec, array)
        text = "".join(f"{a.category}&{a.video_id}&{a.quality}&{a.start}&{a.end}\n" for a in rows)
        with (folder / ANNOTATIONS).open("wb") as file:
            file.write(text.encode("utf-8"))
            file.flush()
            with optional():
                os.fsync(file.fileno())
    return out


def _size(sizes: dict[str, int], letter: str | int) -> int:
    return letter if isinstance(letter, int) else sizes[letter]
