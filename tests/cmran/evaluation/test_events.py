import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from hypothesis.extra.numpy import arrays

from cmran.categories import BACKGROUND
from cmran.evaluation.events import Event, events_of


def test_consecutive_segments_become_events_with_their_mean_confidence() -> None:
    segments = np.array([[28, 3, 3, 28, 3], [28, 28, 28, 28, 28], [1, 1, 2, 2, 2]])
    event = np.array([[0.1, 0.6, 0.8, 0.2, 1.0], [0.1] * 5, [0.9] * 5])
    klass = np.array([[0.5] * 5, [1.0] * 5, [0.5] * 5])
    events = events_of([26, 7, 4], segments, event, klass)
    assert [(e.row, e.category, e.start_s, e.end_s) for e in events] == [
        (26, 3, 1.0, 3.0),
        (26, 3, 4.0, 5.0),
        (4, 1, 0.0, 2.0),
        (4, 2, 2.0, 5.0),
    ]
    assert [e.score for e in events] == pytest.approx([0.35, 0.5, 0.45, 0.45])


@given(arrays(np.int64, st.tuples(st.integers(0, 4), st.integers(1, 12)), elements=st.sampled_from([0, 5, 27, 28])))
def test_events_reproduce_the_segments(segments: np.ndarray) -> None:
    ones = np.ones(segments.shape, np.float32)
    events = events_of(range(len(segments)), segments, ones, ones)
    rebuilt = np.full(segments.shape, BACKGROUND)
    for event in events:
        assert (rebuilt[event.row, event.start : event.end] == BACKGROUND).all(), "events overlap"
        rebuilt[event.row, event.start : event.end] = event.category
    np.testing.assert_array_equal(rebuilt, segments)
    assert events == sorted(events, key=lambda e: (e.row, e.start))
    assert all(event.score == 1.0 for event in events)


def test_shapes_that_disagree_are_rejected() -> None:
    with pytest.raises(ValueError, match="2 rows"):
        events_of([0, 1], np.zeros((1, 4), int), np.zeros((1, 4)), np.zeros((1, 4)))
    with pytest.raises(ValueError, match=r"\(1, 3\)"):
        events_of([0], np.zeros((1, 4), int), np.zeros((1, 3)), np.zeros((1, 4)))


def test_seconds_are_computed_from_segments() -> None:
    event = Event(row=0, category=1, start=2, end=7, score=0.5)
    assert (event.start_s, event.end_s) == (2.0, 7.0)
