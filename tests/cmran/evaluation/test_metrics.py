"""Metrics: examples computed by hand, properties that always hold, and facts about the real AVE labels."""

import itertools
import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import h5py
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra import numpy as hnp

from cmran.categories import BACKGROUND, CATEGORIES
from cmran.evaluation.metrics import (
    EventInterval,
    evaluate,
    event_intervals,
    interval_iou,
    match_events,
    mean_and_spread,
    segment_accuracy,
)

AB = ("a", "b")  # two categories; 2 is background in the small examples
_ = 2


def _labels(n: int, segments: int, top: int) -> st.SearchStrategy[np.ndarray]:
    return hnp.arrays(np.int64, (n, segments), elements=st.integers(0, top))


@st.composite
def _pairs(draw: st.DrawFn) -> tuple[np.ndarray, np.ndarray]:
    """Predicted and true labels (n, T) over 2 categories and background: few labels, so that events often overlap."""
    n, segments = draw(st.integers(1, 6)), draw(st.integers(1, 10))
    return draw(_labels(n, segments, 2)), draw(_labels(n, segments, 2))


# --- events -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("labels", "expected"),
    [
        ([], []),
        ([_, _, _], []),
        ([0], [(0, 0, 1)]),
        ([0, 0, 0], [(0, 0, 3)]),
        ([_, 1, 1, _, 1], [(1, 1, 3), (1, 4, 5)]),
        ([0, 0, 1, _, 0], [(0, 0, 2), (1, 2, 3), (0, 4, 5)]),
    ],
)
def test_event_intervals(labels: list[int], expected: list[tuple[int, int, int]]) -> None:
    assert event_intervals(labels if labels else np.zeros(0, np.int64), background=_) == expected


def test_event_intervals_default_to_the_background_of_ave() -> None:
    assert event_intervals([BACKGROUND, 27, 27]) == [EventInterval(27, 1, 3)]


def test_event_intervals_reject_two_dimensions() -> None:
    with pytest.raises(ValueError, match=r"shape \(T,\)"):
        event_intervals([[0, 1]])


@given(hnp.arrays(np.int64, st.integers(0, 12), elements=st.integers(0, 2)))
@settings(deadline=None)
def test_event_intervals_rebuild_the_row(row: np.ndarray) -> None:
    rebuilt = np.full_like(row, _)
    events = event_intervals(row, background=_)
    for event in events:
        assert event.start < event.end
        assert (rebuilt[event.start : event.end] == _).all()
        rebuilt[event.start : event.end] = event.category
    assert (rebuilt == row).all()
    # Maximal: two adjacent events differ in category.
    assert all(a.end < b.start or a.category != b.category for a, b in itertools.pairwise(events))


def test_interval_iou() -> None:
    assert interval_iou(EventInterval(0, 0, 4), EventInterval(0, 2, 6)) == 2 / 6
    assert interval_iou(EventInterval(0, 0, 4), EventInterval(0, 0, 4)) == 1.0
    assert interval_iou(EventInterval(0, 0, 4), EventInterval(0, 4, 6)) == 0.0
    assert interval_iou(EventInterval(0, 0, 4), EventInterval(1, 0, 4)) == 0.0


def test_matching_uses_the_best_pair_first_and_each_event_once() -> None:
    true = [EventInterval(0, 0, 4)]
    predicted = [EventInterval(0, 0, 2), EventInterval(0, 0, 4)]
    assert match_events(predicted, true) == [(1, 0)]
    # One prediction covers two true events with IoU 0.5 each: it matches the earlier one.
    assert match_events([EventInterval(0, 0, 4)], [EventInterval(0, 2, 4), EventInterval(0, 0, 2)]) == [(0, 1)]
    assert match_events([EventInterval(0, 0, 4)], [EventInterval(0, 0, 1)]) == []
    assert match_events([EventInterval(1, 0, 4)], [EventInterval(0, 0, 4)]) == []


def test_event_scores_computed_by_hand() -> None:
    true = [
        [0, 0, 0, 0, _, _],  # predicted in two pieces: IoU 1/4 and 2/4; the second matches
        [1, 1, _, _, _, _],  # other category: no match, IoU 0
        [_, _, _, _, _, _],  # one event is predicted, but there is none
        [_, 0, 0, 0, _, _],  # one segment too long: IoU 3/4
    ]
    pred = [
        [0, _, 0, 0, _, _],
        [0, 0, _, _, _, _],
        [_, _, _, _, 1, 1],
        [_, 0, 0, 0, 0, _],
    ]
    scores = evaluate(pred, true, categories=AB, bootstrap=0)
    assert (scores.true_events, scores.predicted_events) == (3, 5)
    assert scores.event_precision == 2 / 5
    assert scores.event_recall == 2 / 3
    assert scores.event_f1 == 2 * 2 / (5 + 3)
    assert scores.mean_iou == pytest.approx((0.5 + 0.0 + 0.75) / 3)
    assert scores.accuracy == pytest.approx(100 * (5 + 4 + 4 + 5) / 24)
    # 15 background segments; 3 are predicted as an event: 2 in the third video, 1 in the fourth.
    assert scores.background_recall == 12 / 15
    a, b, background = scores.per_category
    assert (a.videos, a.segments, a.events) == (2, 7, 2)
    assert a.accuracy == pytest.approx(100 * (5 + 5) / 12)
    assert (a.precision, a.recall, a.f1) == (6 / 9, 6 / 7, 12 / 16)
    assert a.event_f1 == 2 * 2 / (4 + 2)
    assert (b.videos, b.events, b.precision, b.recall, b.event_f1) == (1, 1, 0.0, 0.0, 0.0)
    assert (background.category, background.videos, background.segments, background.events) == ("Background", 4, 15, 0)
    # The background has no videos of its own: an accuracy over the videos that contain it would count their events.
    assert (background.accuracy, background.event_f1) == (None, None)
    assert background.precision == 12 / 13
    assert background.recall == scores.background_recall == 12 / 15
    assert background.f1 == 24 / 28
    assert scores.confusion == ((6, 0, 1), (2, 0, 0), (1, 2, 12))


def test_the_background_has_no_accuracy() -> None:
    """All event segments are correct and all background segments wrong: the background must not get an accuracy > 0."""
    scores = evaluate([[0, 0, 0, 0, 0]], [[0, _, _, _, _]], categories=AB)
    a, _b, background = scores.per_category
    assert (a.accuracy, a.precision, a.recall) == (20.0, 1 / 5, 1.0)
    assert (background.accuracy, background.precision, background.recall) == (None, None, 0.0)


def test_events_of_different_videos_do_not_match() -> None:
    scores = evaluate([[_, _], [0, 0]], [[0, 0], [_, _]], categories=AB)
    assert (scores.event_f1, scores.mean_iou) == (0.0, 0.0)


# --- properties -------------------------------------------------------------------------------------------------------


@given(_labels(4, 6, BACKGROUND))
@settings(max_examples=40, deadline=None)
def test_a_perfect_prediction_has_perfect_scores(true: np.ndarray) -> None:
    scores = evaluate(true, true, leak_free=np.array([True, False, True, True]), bootstrap=50)
    assert scores.accuracy == scores.accuracy_leak_free == 100.0
    assert scores.accuracy_interval_95 == (100.0, 100.0)
    has_events = bool((true != BACKGROUND).any())
    for score in (scores.event_precision, scores.event_recall, scores.event_f1, scores.mean_iou):
        assert score == (1.0 if has_events else None)
    assert scores.background_recall == (1.0 if (true == BACKGROUND).any() else None)
    assert np.array_equal(np.array(scores.confusion), np.diag(np.bincount(true.ravel(), minlength=29)))


@given(_pairs(), st.randoms(use_true_random=False))
@settings(max_examples=60, deadline=None)
def test_the_order_of_the_videos_does_not_matter(pair: tuple[np.ndarray, np.ndarray], random: Any) -> None:
    pred, true = pair
    order = list(range(len(true)))
    random.shuffle(order)
    probability = np.linspace(0, 1, true.size).reshape(true.shape)
    leak_free = np.arange(len(true)) % 2 == 0

    def score(rows: list[int]) -> dict[str, Any]:
        scores = evaluate(
            pred[rows],
            true[rows],
            categories=AB,
            event_probability=probability[rows],
            leak_free=leak_free[rows],
            train_labels=true,
            bootstrap=40,
        )
        return scores.to_dict()

    assert score(order) == score(list(range(len(true))))


@given(_pairs())
@settings(max_examples=80, deadline=None)
def test_bounds_and_plain_types(pair: tuple[np.ndarray, np.ndarray]) -> None:
    pred, true = pair
    scores = evaluate(pred, true, categories=AB, bootstrap=40, event_probability=pred / 2)
    plain = scores.to_dict()
    # allow_nan=False rejects NaN; an unchanged round trip shows that there are only JSON types.
    assert json.loads(json.dumps(plain, allow_nan=False)) == plain
    for share in ("event_precision", "event_recall", "event_f1", "mean_iou", "event_auc", "background_recall"):
        assert plain[share] is None or 0.0 <= plain[share] <= 1.0
    for percent in (plain["accuracy"], *(v for v in plain["baselines"].values() if v is not None)):
        assert 0.0 <= percent <= 100.0
    low, high = plain["accuracy_interval_95"]
    assert 0.0 <= low <= high <= 100.0
    assert sum(map(sum, plain["confusion"])) == true.size
    assert plain["accuracy"] == pytest.approx(100 * np.trace(np.array(plain["confusion"])) / true.size)
    assert sum(line["segments"] for line in plain["per_category"]) == true.size
    assert sum(line["events"] for line in plain["per_category"]) == plain["true_events"]
    # Each matched true event has a predicted event with an IoU of at least 0.5.
    if plain["mean_iou"] is not None and plain["event_recall"] is not None:
        assert plain["mean_iou"] >= 0.5 * plain["event_recall"] - 1e-12


@given(_pairs())
@settings(max_examples=60, deadline=None)
def test_swapping_truth_and_prediction_swaps_precision_and_recall(pair: tuple[np.ndarray, np.ndarray]) -> None:
    pred, true = pair
    one = evaluate(pred, true, categories=AB, bootstrap=0)
    other = evaluate(true, pred, categories=AB, bootstrap=0)
    assert (one.accuracy, one.event_f1) == (other.accuracy, other.event_f1)
    assert (one.event_precision, one.event_recall) == (other.event_recall, other.event_precision)


# --- intervals, probabilities, baselines ------------------------------------------------------------------------------


def test_the_interval_equals_a_plain_bootstrap_over_videos() -> None:
    random = np.random.default_rng(3)
    true = random.integers(0, 3, (200, 10))
    # Whole videos are correct or wrong: an interval over segments would be far too narrow.
    pred = np.where(random.random(200)[:, None] < 0.7, true, (true + 1) % 3)
    scores = evaluate(pred, true, categories=AB, bootstrap=4000)
    per_video = (pred == true).mean(axis=1)
    plain = 100 * per_video[random.integers(0, 200, (4000, 200))].mean(axis=1)
    assert scores.accuracy_interval_95 == pytest.approx(tuple(np.percentile(plain, [2.5, 97.5])), abs=0.8)
    # A share of 0.7 over 200 videos: +-1.96 * sqrt(0.7 * 0.3 / 200) = +-6.4 points.
    assert scores.accuracy_interval_95 is not None
    assert 11.0 < scores.accuracy_interval_95[1] - scores.accuracy_interval_95[0] < 14.5


def test_the_interval_depends_on_the_seed_only() -> None:
    random = np.random.default_rng(0)
    pred, true = random.integers(0, 3, (2, 50, 10))
    first, again, other = (evaluate(pred, true, categories=AB, seed=seed) for seed in (0, 0, 1))
    assert first == again
    assert first.accuracy_interval_95 != other.accuracy_interval_95
    assert first.event_f1_interval_95 is not None
    assert first.event_f1 is not None
    assert first.event_f1_interval_95[0] < first.event_f1 < first.event_f1_interval_95[1]
    assert evaluate(pred, true, categories=AB, bootstrap=0).accuracy_interval_95 is None


def test_undefined_scores_are_none_and_left_out_of_the_scalars() -> None:
    nothing = np.full((3, 4), _)
    scores = evaluate(nothing, nothing, categories=AB, event_probability=np.zeros((3, 4)))
    assert scores.event_f1 is None
    assert scores.event_f1_interval_95 is None
    assert scores.mean_iou is None
    assert scores.event_auc is None
    assert scores.per_category[0].accuracy is None
    assert scores.baselines.most_frequent_label is None
    assert set(scores.scalars()) == {
        "accuracy",
        "accuracy_interval_95_low",
        "accuracy_interval_95_high",
        "background_recall",
    }
    # There are events and none is predicted: the recall is 0, the precision undefined.
    missed = evaluate(nothing, np.zeros((3, 4), np.int64), categories=AB)
    assert (missed.event_precision, missed.event_recall, missed.event_f1, missed.mean_iou) == (None, 0.0, 0.0, 0.0)
    assert missed.background_recall is None


def test_the_leak_free_videos_have_their_own_accuracy() -> None:
    true = np.zeros((4, 2), np.int64)
    pred = np.array([[0, 0], [0, 1], [1, 1], [0, 0]])
    scores = evaluate(pred, true, categories=AB, leak_free=np.array([True, True, False, True]))
    assert scores.accuracy == 62.5
    assert (scores.videos, scores.videos_leak_free) == (4, 3)
    assert scores.accuracy_leak_free == pytest.approx(100 * 5 / 6)
    without = evaluate(pred, true, categories=AB, leak_free=np.zeros(4, bool))
    assert (without.videos_leak_free, without.accuracy_leak_free, without.accuracy_leak_free_interval_95) == (
        0,
        None,
        None,
    )


def test_event_auc() -> None:
    true = [[0, 1, _, _]]
    for probability, auc in (
        ([0.9, 0.8, 0.2, 0.1], 1.0),
        ([0.1, 0.2, 0.8, 0.9], 0.0),
        ([0.5, 0.5, 0.5, 0.5], 0.5),
        ([0.9, 0.3, 0.3, 0.1], 3.5 / 4),
    ):
        assert evaluate(true, true, categories=AB, event_probability=[probability]).event_auc == auc
    assert evaluate(true, true, categories=AB).event_auc is None


def test_baselines_computed_by_hand() -> None:
    true = [[0, 0, 1, _], [1, 1, 1, _], [_, _, _, _]]
    baselines = evaluate(true, true, categories=AB, train_labels=[1, 1, 0, 2]).baselines
    assert baselines.always_background == 50.0
    assert baselines.most_frequent_label == pytest.approx(100 * 4 / 12)
    assert baselines.oracle_category_everywhere == pytest.approx(100 * 5 / 12)
    given_categories = evaluate(true, true, categories=AB, video_categories=[1, 1, 0]).baselines
    assert given_categories.oracle_category_everywhere == pytest.approx(100 * 4 / 12)


def test_mean_and_spread() -> None:
    assert mean_and_spread([1.0, 2.0, 3.0]) == {"mean": 2.0, "std": 1.0, "min": 1.0, "max": 3.0, "n": 3}
    assert mean_and_spread([7]) == {"mean": 7.0, "std": None, "min": 7.0, "max": 7.0, "n": 1}
    with pytest.raises(ValueError, match="no value"):
        mean_and_spread([])
    with pytest.raises(ValueError, match="finite"):
        mean_and_spread([1.0, float("nan")])


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"segments_pred": [[0, 1]]}, "must both have shape"),
        ({"segments_pred": [[0, 3], [0, 0]]}, r"segments_pred must be in 0\.\.2, found 0\.\.3"),
        ({"labels_true": [[-1, 0], [0, 0]]}, "labels_true must be in"),
        ({"labels_true": [[0.0, 1.0], [0.0, 0.0]]}, "must be integers"),
        ({"leak_free": [True]}, "leak_free must be booleans"),
        ({"leak_free": [1, 0]}, "leak_free must be booleans"),
        ({"event_probability": [[0.1, float("nan")], [0, 0]]}, "not finite"),
        ({"event_probability": [0.1, 0.2]}, "event_probability has shape"),
        ({"video_categories": [0]}, "video_categories have shape"),
        ({"train_labels": np.zeros(0, np.int64)}, "train_labels are empty"),
        ({"bootstrap": -1}, "bootstrap"),
        ({"segments_pred": np.zeros((0, 2), np.int64), "labels_true": np.zeros((0, 2), np.int64)}, "no segment"),
    ],
)
def test_invalid_arguments_are_rejected(change: dict[str, Any], message: str) -> None:
    arguments: dict[str, Any] = {"segments_pred": [[0, 1], [2, 2]], "labels_true": [[0, 1], [2, 2]], **change}
    with pytest.raises(ValueError, match=message):
        evaluate(**arguments, categories=AB)


def test_segment_accuracy_rejects_shapes_that_would_broadcast() -> None:
    assert segment_accuracy([0, 1, 2, 2], [0, 1, 1, 2]) == 75.0
    with pytest.raises(ValueError, match="must agree"):
        segment_accuracy([[0, 1]], [0, 1])
    with pytest.raises(ValueError, match="no segment"):
        segment_accuracy([], [])


def test_metrics_need_neither_torch_nor_matplotlib() -> None:
    heavy = {"torch", "matplotlib", "mlflow", "h5py"}
    code = f"import sys, cmran.evaluation.metrics; print(sorted({heavy} & set(sys.modules)))"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "[]"


# --- the AVE labels --------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def real(ave: Path) -> dict[str, np.ndarray]:
    def read(name: str, key: str = "avadataset") -> np.ndarray:
        with h5py.File(ave / name) as file:
            return np.asarray(file[key][:])

    return {
        "labels": read("labels.h5").argmax(-1),
        "categories": read("mil_labels.h5").argmax(-1),
        **{split: read(f"{split}_order.h5", "order") for split in ("train", "val", "test")},
    }


def test_trivial_scores_of_the_ave_test_split(real: dict[str, np.ndarray]) -> None:
    true = real["labels"][real["test"]]
    # The 8 test rows that also occur in train under another category.
    leak_free = ~np.isin(real["test"], [339, 680, 785, 931, 1374, 2397, 4074, 4113])
    always = evaluate(
        np.full_like(true, BACKGROUND),
        true,
        leak_free=leak_free,
        train_labels=real["labels"][real["train"]],
        video_categories=real["categories"][real["test"]],
    )
    assert (always.videos, always.videos_leak_free) == (402, 394)
    assert round(always.accuracy, 2) == 17.79
    assert always.baselines.always_background == always.accuracy
    assert round(always.baselines.oracle_category_everywhere, 2) == 82.21
    # Background is the most frequent label of train.
    assert always.baselines.most_frequent_label == always.accuracy
    assert (always.event_f1, always.mean_iou, always.background_recall) == (0.0, 0.0, 1.0)
    assert always.true_events == 402
    # The video labels make no difference: each test video has exactly one category.
    assert evaluate(true, true).baselines.oracle_category_everywhere == always.baselines.oracle_category_everywhere


def test_the_oracle_category_predicts_no_background(real: dict[str, np.ndarray]) -> None:
    true = real["labels"][real["test"]]
    oracle = np.repeat(real["categories"][real["test"]][:, None], true.shape[1], axis=1)
    scores = evaluate(oracle, true)
    assert round(scores.accuracy, 2) == 82.21
    assert scores.background_recall == 0.0
    # Each video has one event, predicted on all 10 segments: IoU and accuracy are both its length / 10.
    assert scores.mean_iou == pytest.approx(scores.accuracy / 100)


def test_row_26_has_an_empty_event(real: dict[str, np.ndarray]) -> None:
    true, category = real["labels"][[26]], real["categories"][[26]]
    assert CATEGORIES[category[0]] == "Church bell"
    scores = evaluate(np.full_like(true, category[0]), true, video_categories=category)
    assert (scores.true_events, scores.predicted_events, scores.accuracy) == (0, 1, 0.0)
    assert (scores.mean_iou, scores.event_recall, scores.event_precision) == (None, None, 0.0)
    assert scores.baselines.oracle_category_everywhere == 0.0
