"""Labels and splits of a synthetic folder: generated, or read from real files."""

from collections.abc import Sequence
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from cmran.categories import CATEGORIES
from cmran.data.annotations import Annotation, read_annotations
from cmran.data.faults import FaultError
from cmran.data.hdf5 import open_array
from cmran.data.layout import ORDERS
from cmran.data.rules import check_order
from cmran.data.synthetic.task import SyntheticConfig
from cmran.errors import ConfigError, DataError

_ID_ALPHABET = "ABCDEFGHIJKLMNOPQRSTUVWXYZabcdefghijklmnopqrstuvwxyz0123456789-_"
_ID_LENGTH = 11
_DASH_SHARE = 0.25
"""Share of the ids that start with "-", as in the real data."""


def synthetic_annotations(
    rng: np.random.Generator, videos: int, segments: int, config: SyntheticConfig
) -> list[Annotation]:
    """Generate annotations: equally many videos of each category, in random order.

    One row in a hundred repeats the video of another row under another category, as in the real dataset.
    """
    categories = rng.permutation(np.arange(videos) % len(CATEGORIES))
    rows: list[Annotation] = []
    used: set[str] = set()
    for category in categories:
        video_id = _random_id(rng)
        while video_id in used:
            video_id = _random_id(rng)
        used.add(video_id)
        start, end = 0, segments
        if segments > 2 and rng.random() >= config.whole_share:
            length = int(rng.integers(2, segments))
            start = int(rng.integers(0, segments - length + 1))
            end = start + length
        rows.append(Annotation(CATEGORIES[category], video_id, "good", start, end))
    for _ in range(videos // 100):
        first, second = (int(row) for row in rng.choice(videos, 2, replace=False))
        if rows[first].category != rows[second].category:
            old = rows[second]
            rows[second] = Annotation(old.category, rows[first].video_id, old.quality, old.start, old.end)
    return rows


def _random_id(rng: np.random.Generator) -> str:
    letters = "".join(_ID_ALPHABET[i] for i in rng.integers(0, len(_ID_ALPHABET), _ID_LENGTH))
    return "-" + letters[1:] if rng.random() < _DASH_SHARE else letters


def first_annotations(path: Path, videos: int | None, segments: int) -> list[Annotation]:
    """Read the first `videos` annotations of a file; all of them for None."""
    rows = read_annotations(path)
    if videos is not None and videos > len(rows):
        raise ConfigError(
            f"`videos`: found {videos}, expected at most the {len(rows)} videos of {path}", hint="reduce `videos`"
        )
    rows = rows[:videos]
    if len(rows) < 3:
        raise DataError(f"{path}: found {len(rows)} videos, expected at least 3")
    for number, row in enumerate(rows):
        if row.end > segments:
            raise ConfigError(
                f"`segments`: found {segments}, but the event of row {number} of {path} ends at segment {row.end}",
                hint=f"set `segments` to at least {max(r.end for r in rows)}",
            )
    return rows


def synthetic_splits(rng: np.random.Generator, rows: Sequence[Annotation]) -> dict[str, NDArray[np.int64]]:
    """Draw splits of about 80/10/10. In small folders, val and test get up to a sixth each, so that scores are useful.

    Events of all lengths are distributed evenly; otherwise small splits would differ in their share of background.
    """
    held_out = max(1, round(len(rows) / 10), min(len(rows) // 6, 100))
    order = rng.permutation(len(rows)).astype(np.int64)
    by_length = order[np.argsort([rows[row].end - rows[row].start for row in order], kind="stable")]
    positions = np.arange(2 * held_out) * len(rows) // (2 * held_out)
    evaluation = by_length[positions]
    splits = {"train": np.delete(by_length, positions), "val": evaluation[0::2], "test": evaluation[1::2]}
    return {name: rng.permutation(split) for name, split in splits.items()}


def read_splits(folder: Path, videos: int) -> dict[str, NDArray[np.int64]]:
    """Read the three order files of `folder`, without the rows from `videos` on."""
    splits = {}
    for name, spec in ORDERS.items():
        with open_array(folder, spec) as array:
            rows, faults = check_order(spec, array.read_all(), None)
        if faults:
            raise FaultError(folder, faults[0])
        splits[name] = rows[rows < videos]
        if not splits[name].size:
            raise ConfigError(
                f"{folder / spec.name}: the {name} split has no row below {videos}", hint="increase `videos`"
            )
    return splits
