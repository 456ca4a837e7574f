"""Scores of a batch job: compare its predictions with the labels of the data folder, if there are any.

Files that only the scores need may be missing or damaged. Then the scores that need them are left out, and a note in
the manifest gives the reason.

Shape letters: n videos, T segments.
"""

import contextlib
import functools
import itertools
import logging
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, Self, TypeVar

import numpy as np
from numpy.typing import NDArray

from cmran.config import Split
from cmran.data import layout
from cmran.data.dataset import FeatureFolder
from cmran.data.faults import rows_text
from cmran.data.validation import contradictions
from cmran.errors import CmranError
from cmran.evaluation.metrics import evaluate
from cmran.utils.files import path_exists
from serving.batch.job import PredictSplit
from serving.batch.shards import Results

T = TypeVar("T")

_log = logging.getLogger(__name__)


def read_optional(read: Callable[[], T], consequence: str, notes: list[str]) -> T | None:
    """Return `read()`. If it raises CmranError, log a warning, add it to `notes` and return `None`.

    For files that the predictions do not need; `consequence` says what is missing without them.
    """
    try:
        return read()
    except CmranError as error:
        _warn(f"{consequence}: {error}", notes)
        return None


def _warn(note: str, notes: list[str]) -> None:
    notes.append(note)
    _log.warning("%s", note)


@dataclass(frozen=True)
class Truth:
    """The labels of the videos of a job and the splits that they belong to, read before inference starts."""

    labels: NDArray[np.int64]
    """(n, T)."""
    video_categories: NDArray[np.int64] | None
    """(n,); `None` if they are unknown."""
    train: NDArray[np.int64] | None
    """Labels of the training videos; `None` if it is unknown which videos these are."""
    leak_free: NDArray[np.bool_] | None
    """(n,): false for test videos that share a video with train; `None` if this is unknown."""
    splits: dict[str, NDArray[np.int64]]
    """Indices of each split's videos among those of the job. Test comes first."""
    rows_in_no_split: int | None
    """Number of videos in no known split, for a job over all videos."""

    @classmethod
    def read(
        cls, folder: FeatureFolder, split: PredictSplit, rows: NDArray[np.int64], annotated: bool, notes: list[str]
    ) -> Self | None:
        """Read labels and splits of a data folder.

        Args:
            folder: The data folder.
            split: The videos of the job.
            rows: (n,) their rows.
            annotated: Whether Annotations.txt can be read.
            notes: Problems are appended here, and logged.

        Returns:
            The labels; `None` if there are none, or they are damaged.
        """
        if not folder.has_labels:
            return None
        labels = read_optional(folder.segment_labels, "scores are left out", notes)
        if labels is None:
            return None
        for fault in contradictions(folder.path):
            _warn(f"scores may be wrong: {fault}", notes)
        orders: dict[str, NDArray[np.int64]] = {}
        damaged = False
        wanted: tuple[Split, ...] = ("test", "val", "train") if split == "all" else (split, "train")
        for name in wanted:
            if name not in orders and path_exists(folder.path / layout.ORDERS[name].name):
                order = read_optional(functools.partial(folder.order, name), f"split {name} is unknown", notes)
                if order is None:
                    damaged = True
                else:
                    orders[name] = order
        categories = None
        # A damaged Annotations.txt was already reported; `evaluate` then takes the categories from the segments.
        with contextlib.suppress(CmranError):
            categories = folder.video_labels()
        train = orders.get("train")
        leak_free = None
        if train is not None and "test" in orders and annotated:
            leak_free = ~np.isin(rows, folder.shared_test_rows())
        splits: dict[str, NDArray[np.int64]] = {}
        in_no_split = None
        if split == "all":
            # The job has all rows of the folder, in order: the index of a video is its row.
            splits = dict(orders)
            rest = np.setdiff1d(rows, np.concatenate([*orders.values(), np.empty(0, np.int64)]))
            in_no_split = len(rest)
            if rest.size and (len(orders) in (0, len(layout.ORDERS)) and not damaged):
                splits["no_split"] = rest
                if orders:
                    notes.append(f"{len(rest)} of {len(rows)} videos are in no split")
            elif rest.size:
                missing = [layout.ORDERS[name].name for name in wanted if name not in orders]
                notes.append(
                    f"{len(rest)} of {len(rows)} videos are in no known split and are not scored, because "
                    f"{', '.join(missing)} is missing or damaged"
                )
        else:
            splits[split] = np.arange(len(rows))
        for one, other in itertools.combinations(orders, 2):
            shared = np.intersect1d(orders[one], orders[other])
            if shared.size:
                notes.append(
                    f"{rows_text(shared.tolist())} in both {other} and {one} (leakage): scores there are unreliable"
                )
                _log.warning("%s: %s", folder.path, notes[-1])
        return cls(
            labels[rows],
            None if categories is None else categories[rows],
            None if train is None else labels[train],
            leak_free,
            splits,
            in_no_split,
        )

    def score(self, results: Results | None) -> dict[str, dict[str, Any]]:
        """Return `Evaluation.to_dict()` of each split."""
        assert results is not None
        return {
            split: evaluate(
                results.segments[at],
                self.labels[at],
                event_probability=results.event_probability[at],
                leak_free=None if self.leak_free is None or split != "test" else self.leak_free[at],
                train_labels=self.train,
                video_categories=None if self.video_categories is None else self.video_categories[at],
            ).to_dict()
            for split, at in self.splits.items()
        }
