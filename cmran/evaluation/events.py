"""Events from predicted segments: each maximal run of segments of one category is one event.

Shape letters: n videos, T segments.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from cmran.config import SEGMENT_S
from cmran.evaluation.metrics import event_intervals


@dataclass(frozen=True)
class Event:
    """One predicted event of one video."""

    row: int
    """Row of the video in the feature files."""
    category: int
    """Label, 0 to 27: an index into `cmran.categories.CATEGORIES`."""
    start: int
    """First segment."""
    end: int
    """Segment after the last one."""
    score: float
    """Mean over the event's segments of event probability x class probability, 0 to 1."""

    @property
    def start_s(self) -> float:
        """Start of the event, in seconds from the start of the video."""
        return self.start * SEGMENT_S

    @property
    def end_s(self) -> float:
        """End of the event, in seconds from the start of the video."""
        return self.end * SEGMENT_S


def events_of(
    rows: Sequence[int] | NDArray[Any],
    segments_nT: NDArray[Any],
    event_probability_nT: NDArray[Any],
    class_probability_nT: NDArray[Any],
) -> list[Event]:
    """Return the events of n videos, in the order of `rows` and, within a video, of time.

    Args:
        rows: Identifiers of the videos, (n,); each event carries the one of its video.
        segments_nT: Labels, (n, T), 0 to 28. Label 28 is background and belongs to no event.
        event_probability_nT: Probability of an event in each segment, (n, T).
        class_probability_nT: Probability of the video's category, repeated over its segments, (n, T).

    Raises:
        ValueError: The shapes differ.
    """
    shapes = {np.shape(segments_nT), np.shape(event_probability_nT), np.shape(class_probability_nT)}
    if len(shapes) != 1 or np.ndim(segments_nT) != 2 or np.shape(segments_nT)[0] != len(rows):
        raise ValueError(f"expected {len(rows)} rows and three arrays of one shape (n, T), found {sorted(shapes)}")
    confidence_nT = np.asarray(event_probability_nT, np.float64) * np.asarray(class_probability_nT, np.float64)
    return [
        Event(int(row), int(category), int(start), int(end), float(confidence_T[start:end].mean()))
        for row, labels_T, confidence_T in zip(rows, segments_nT, confidence_nT, strict=True)
        for category, start, end in event_intervals(labels_T)
    ]
