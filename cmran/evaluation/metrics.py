"""Metrics of predicted segments: accuracy, events, per-category scores, confusion, intervals and trivial baselines.

Shapes: n videos, T segments per video, K event categories (28). Label K (28) is the background. Accuracies are in %;
all other scores are in [0, 1]. An undefined score, such as the precision without any prediction, is None, never NaN or
a placeholder 0.
"""

import dataclasses
import itertools
import json
import math
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import numpy as np
import numpy.typing as npt

from cmran.categories import BACKGROUND, CATEGORIES

IOU_THRESHOLD = 0.5
"""Smallest intersection over union (in time) at which a predicted event matches a true one."""

Labels = npt.NDArray[np.int64]

ConfidenceInterval = tuple[float, float]


class EventInterval(NamedTuple):
    """An event: a maximal interval of consecutive segments with one category, start <= t < end."""

    category: int
    start: int
    end: int


@dataclasses.dataclass(frozen=True, kw_only=True)
class CategoryScore:
    """One row of the per-category table; the last row is the background.

    `precision`, `recall` and `f1` are those of the label, counted by segment.
    """

    category: str
    """Name of the category."""
    videos: int
    """Videos in which the label occurs."""
    segments: int
    """Segments that have the label."""
    events: int
    """True events of the category; 0 for the background, which has no events."""
    accuracy: float | None
    """Segment accuracy in % over all segments of the videos that contain the category, their background segments
    included. None for the background: an accuracy over the videos that contain background would also count events."""
    precision: float | None
    """Share of the segments predicted as this label that have it."""
    recall: float | None
    """Share of the segments with this label that are predicted as it."""
    f1: float | None
    """Harmonic mean of precision and recall."""
    event_f1: float | None
    """F1 of the category's events at IoU >= 0.5."""


@dataclasses.dataclass(frozen=True, kw_only=True)
class Baselines:
    """Segment accuracy in % of predictions that need no network."""

    always_background: float
    """Background on all segments."""
    most_frequent_label: float | None
    """The most frequent label of `train_labels` on all segments; None without `train_labels`."""
    oracle_category_everywhere: float
    """The video's *true* category on all segments. This is an oracle, not a usable rule: it shows how much of the
    accuracy comes from the category alone, without any localization."""


@dataclasses.dataclass(frozen=True, kw_only=True)
class Evaluation:
    """All scores of one set of predictions; `evaluate` defines them."""

    videos: int
    """Number of videos n."""
    segments: int
    """Number of segments per video T."""
    accuracy: float
    """Segment accuracy in %."""
    accuracy_interval_95: ConfidenceInterval | None
    """Its 95 % bootstrap interval."""
    videos_leak_free: int | None
    """Number of leak-free videos; None if they are unknown."""
    accuracy_leak_free: float | None
    """Segment accuracy in % on the leak-free videos."""
    accuracy_leak_free_interval_95: ConfidenceInterval | None
    """Its 95 % bootstrap interval."""
    true_events: int
    """Number of true events."""
    predicted_events: int
    """Number of predicted events."""
    event_precision: float | None
    """Share of the predicted events that match a true event."""
    event_recall: float | None
    """Share of the true events that are matched."""
    event_f1: float | None
    """Harmonic mean of event precision and recall."""
    event_f1_interval_95: ConfidenceInterval | None
    """Its 95 % bootstrap interval."""
    mean_iou: float | None
    """Mean best IoU over the true events."""
    event_auc: float | None
    """Area under the ROC curve of event against background segments."""
    background_recall: float | None
    """Share of the background segments predicted as background."""
    baselines: Baselines
    """Scores of trivial predictions on the same videos."""
    per_category: tuple[CategoryScore, ...]
    """Scores of the K categories and of the background."""
    confusion: tuple[tuple[int, ...], ...]
    """Segment counts, (K+1, K+1): rows true, columns predicted."""
    bootstrap: int
    """Number of bootstrap resamples."""
    seed: int
    """Seed of the bootstrap."""

    def to_dict(self) -> dict[str, Any]:
        """Return all scores as plain JSON types: dict, list, str, int, float, None."""
        plain: dict[str, Any] = json.loads(json.dumps(dataclasses.asdict(self)))
        return plain

    def scalars(self) -> dict[str, float]:
        """Return the defined scalar scores as a flat dictionary for a tracker: no tables, no None.

        An interval becomes two entries with the suffixes `_low` and `_high`.
        """
        flat: dict[str, float] = {}
        for name in _SCALARS:
            value = getattr(self, name)
            if isinstance(value, tuple):
                flat[f"{name}_low"], flat[f"{name}_high"] = value
            elif value is not None:
                flat[name] = float(value)
        return flat


_SCALARS = (
    "accuracy",
    "accuracy_interval_95",
    "accuracy_leak_free",
    "accuracy_leak_free_interval_95",
    "event_precision",
    "event_recall",
    "event_f1",
    "event_f1_interval_95",
    "mean_iou",
    "event_auc",
    "background_recall",
)


def segment_accuracy(segments_pred: npt.ArrayLike, labels_true: npt.ArrayLike) -> float:
    """Compute the segment accuracy in %: correct segments / all segments (the metric of the paper).

    Args:
        segments_pred: Predicted labels, any shape, for example (n, T).
        labels_true: True labels, same shape.

    Raises:
        ValueError: The shapes differ, or there is no segment.
    """
    pred, true = np.asarray(segments_pred), np.asarray(labels_true)
    if pred.shape != true.shape:
        raise ValueError(f"predictions have shape {pred.shape}, labels {true.shape}: they must agree")
    if true.size == 0:
        raise ValueError("there is no segment to score")
    return 100.0 * int(np.count_nonzero(pred == true)) / true.size


def event_intervals(labels: npt.ArrayLike, background: int = BACKGROUND) -> list[EventInterval]:
    """Return the events of one video in time order: its maximal intervals of one category, without the background.

    Two adjacent categories are two events.

    Args:
        labels: Labels of the video's segments, (T,).
        background: Label of the background.

    Raises:
        ValueError: `labels` is not one-dimensional.
    """
    row = np.asarray(labels)
    if row.ndim != 1:
        raise ValueError(f"labels of one video have shape (T,), found {row.shape}")
    edges = np.flatnonzero(row[1:] != row[:-1]) + 1
    bounds = [0, *edges.tolist(), len(row)] if len(row) else []
    return [
        EventInterval(int(row[start]), start, end)
        for start, end in itertools.pairwise(bounds)
        if row[start] != background
    ]


def interval_iou(first: EventInterval, second: EventInterval) -> float:
    """Return the intersection over union of two events in time, in [0, 1]; 0 if their categories differ."""
    if first.category != second.category:
        return 0.0
    shared = min(first.end, second.end) - max(first.start, second.start)
    if shared <= 0:
        return 0.0
    return shared / ((first.end - first.start) + (second.end - second.start) - shared)


def match_events(
    predicted: Sequence[EventInterval], true: Sequence[EventInterval], threshold: float = IOU_THRESHOLD
) -> list[tuple[int, int]]:
    """Match the predicted and true events of one video. Each event is used at most once.

    The matching is greedy: the pair with the highest IoU first; ties go to the earlier true event, then to the earlier
    predicted event. Events of different categories never match.

    Args:
        predicted: Predicted events.
        true: True events.
        threshold: Smallest IoU of a match.

    Returns:
        Pairs (index of the predicted event, index of the true event) in the order of matching.
    """
    pairs = [
        (-iou, q.start, p.start, i, j)
        for i, p in enumerate(predicted)
        for j, q in enumerate(true)
        if (iou := interval_iou(p, q)) >= threshold and iou > 0
    ]
    used_pred: set[int] = set()
    used_true: set[int] = set()
    matches = []
    for _, _, _, i, j in sorted(pairs):
        if i not in used_pred and j not in used_true:
            used_pred.add(i)
            used_true.add(j)
            matches.append((i, j))
    return matches


def evaluate(
    segments_pred: npt.ArrayLike,
    labels_true: npt.ArrayLike,
    *,
    event_probability: npt.ArrayLike | None = None,
    leak_free: npt.ArrayLike | None = None,
    categories: Sequence[str] = CATEGORIES,
    train_labels: npt.ArrayLike | None = None,
    video_categories: npt.ArrayLike | None = None,
    bootstrap: int = 1000,
    seed: int = 0,
) -> Evaluation:
    """Score predicted segment labels against the true ones.

    The scores, which do not depend on the order of the videos:

    - accuracy: correct segments / all segments, in %. `accuracy_leak_free` is the same on the `leak_free` videos.
    - events: maximal intervals of one category (`event_intervals`). A predicted event is correct if it matches a true
      event of the same video and category at IoU >= 0.5 (`match_events`). Precision, recall and F1 count the events of
      all videos together.
    - mean_iou: mean over the true events of the best IoU of a predicted event of the same video and category, 0 if
      there is none. It measures how well true events are found; extra predicted events lower the precision only.
    - event_auc: probability that `event_probability` is higher on a random event segment than on a random background
      segment (ties count half). It measures the separation of events and background at any threshold.
    - background_recall: share of the true background segments that are predicted as background.
    - confusion: segment counts, (K+1, K+1): rows true, columns predicted.
    - intervals: 95 % percentile bootstrap over videos.
    - baselines: see `Baselines`.

    Args:
        segments_pred: Predicted labels in 0..K, (n, T), K = background.
        labels_true: True labels in 0..K, (n, T).
        event_probability: Probability of an event in each segment, (n, T). None leaves out `event_auc`.
        leak_free: Boolean mask of the leak-free videos, (n,). Of the published test split, 394 of 402 videos do not
            also occur in train under another category.
        categories: Names of the K event categories.
        train_labels: Reference labels of any shape for the most frequent label.
        video_categories: Category of each video, (n,). By default the most frequent event category of each row.
        bootstrap: Number of bootstrap resamples; 0 leaves out the intervals.
        seed: Seed of the bootstrap, which is deterministic.

    Raises:
        ValueError: Shapes that disagree, no video, labels out of range, or probabilities that are not finite.
    """
    background = len(categories)
    true = _labels("labels_true", labels_true, background)
    pred = _labels("segments_pred", segments_pred, background)
    if pred.ndim != 2 or pred.shape != true.shape:
        raise ValueError(f"segments_pred {pred.shape} and labels_true {true.shape} must both have shape (n, T)")
    if true.size == 0:
        raise ValueError("there is no segment to score")
    if bootstrap < 0:
        raise ValueError(f"bootstrap must be >= 0, found {bootstrap}")
    n, segments = true.shape

    correct = (pred == true).sum(axis=1)
    confusion = np.bincount((true * (background + 1) + pred).ravel(), minlength=(background + 1) ** 2).reshape(
        background + 1, background + 1
    )
    events = _score_events(pred, true, background)
    video_events = np.stack([events.matched.sum(1), events.predicted.sum(1), events.true.sum(1)], axis=1)
    matched, predicted, truth = (int(total) for total in video_events.sum(axis=0))

    def accuracy_of(sums: npt.NDArray[np.int64]) -> npt.NDArray[np.float64]:
        percent: npt.NDArray[np.float64] = 100.0 * sums[:, 0] / (sums[:, 1] * segments)
        return percent

    def f1_of(sums: npt.NDArray[np.int64]) -> npt.NDArray[np.float64]:
        with np.errstate(invalid="ignore"):
            f1: npt.NDArray[np.float64] = 2.0 * sums[:, 0] / (sums[:, 1] + sums[:, 2])
        return f1

    per_video = np.stack([correct, np.ones_like(correct)], axis=1)
    mask = None if leak_free is None else _mask("leak_free", leak_free, n)
    accuracy_leak_free = accuracy_leak_free_interval = None
    if mask is not None and mask.any():
        accuracy_leak_free = segment_accuracy(pred[mask], true[mask])
        accuracy_leak_free_interval = _bootstrap(per_video[mask], accuracy_of, bootstrap, seed)

    return Evaluation(
        videos=n,
        segments=segments,
        accuracy=segment_accuracy(pred, true),
        accuracy_interval_95=_bootstrap(per_video, accuracy_of, bootstrap, seed),
        videos_leak_free=None if mask is None else int(mask.sum()),
        accuracy_leak_free=accuracy_leak_free,
        accuracy_leak_free_interval_95=accuracy_leak_free_interval,
        true_events=truth,
        predicted_events=predicted,
        event_precision=_share(matched, predicted),
        event_recall=_share(matched, truth),
        event_f1=_share(2 * matched, predicted + truth),
        event_f1_interval_95=_bootstrap(video_events, f1_of, bootstrap, seed),
        mean_iou=math.fsum(events.best_iou) / truth if truth else None,
        event_auc=None if event_probability is None else _event_auc(event_probability, true != background),
        background_recall=_share(int(confusion[background, background]), int(confusion[background].sum())),
        baselines=_baselines(true, background, train_labels, video_categories),
        per_category=_per_category((*categories, "Background"), true, correct, confusion, events),
        confusion=tuple(tuple(row) for row in confusion.tolist()),
        bootstrap=bootstrap,
        seed=seed,
    )


def trivial_baselines(labels_true: npt.ArrayLike, *, train_labels: npt.ArrayLike | None = None) -> Baselines:
    """Compute the baselines of `evaluate` without any prediction.

    Args:
        labels_true: True labels in 0..28, (n, T).
        train_labels: Reference labels of any shape for the most frequent label.

    Raises:
        ValueError: No video, or labels out of range.
    """
    true = _labels("labels_true", labels_true, BACKGROUND)
    if true.size == 0:
        raise ValueError("there is no segment to score")
    return _baselines(true, BACKGROUND, train_labels, None)


def mean_and_spread(values: Sequence[float]) -> dict[str, float | int | None]:
    """Summarize one score over several seeds.

    Returns:
        `mean`, `std` (the sample standard deviation with n - 1; None for one value), `min`, `max` and `n`.

    Raises:
        ValueError: There is no value, or one is not finite.
    """
    numbers = [float(value) for value in values]
    if not numbers:
        raise ValueError("there is no value to average")
    if not all(math.isfinite(number) for number in numbers):
        raise ValueError(f"values must be finite, found {numbers}")
    n = len(numbers)
    mean = math.fsum(numbers) / n
    std = math.sqrt(math.fsum((number - mean) ** 2 for number in numbers) / (n - 1)) if n > 1 else None
    return {"mean": mean, "std": std, "min": min(numbers), "max": max(numbers), "n": n}


class _EventCounts(NamedTuple):
    """Event counts by video and category, (n, K), and the best IoU of each true event."""

    matched: Labels
    predicted: Labels
    true: Labels
    best_iou: list[float]


def _score_events(pred: Labels, true: Labels, background: int) -> _EventCounts:
    matched, predicted, truth = (np.zeros((len(true), background), dtype=np.int64) for _ in range(3))
    best: list[float] = []
    for video in range(len(true)):
        pred_events, true_events = event_intervals(pred[video], background), event_intervals(true[video], background)
        for event in pred_events:
            predicted[video, event.category] += 1
        for event in true_events:
            truth[video, event.category] += 1
            best.append(max((interval_iou(other, event) for other in pred_events), default=0.0))
        for _, index in match_events(pred_events, true_events):
            matched[video, true_events[index].category] += 1
    return _EventCounts(matched, predicted, truth, best)


def _per_category(
    names: Sequence[str], true: Labels, correct: Labels, confusion: Labels, events: _EventCounts
) -> tuple[CategoryScore, ...]:
    segments = true.shape[1]
    scores = []
    for label, name in enumerate(names):
        contains = (true == label).any(axis=1)
        videos = int(contains.sum())
        correct_segments = int(confusion[label, label])
        true_segments, pred_segments = int(confusion[label].sum()), int(confusion[:, label].sum())
        is_event = label < len(names) - 1
        matched, predicted, truth = (
            (int(counts[:, label].sum()) for counts in (events.matched, events.predicted, events.true))
            if is_event
            else (0, 0, 0)
        )
        scores.append(
            CategoryScore(
                category=name,
                videos=videos,
                segments=true_segments,
                events=truth,
                accuracy=100.0 * int(correct[contains].sum()) / (videos * segments) if videos and is_event else None,
                precision=_share(correct_segments, pred_segments),
                recall=_share(correct_segments, true_segments),
                f1=_share(2 * correct_segments, pred_segments + true_segments),
                event_f1=_share(2 * matched, predicted + truth),
            )
        )
    return tuple(scores)


def _baselines(
    true: Labels, background: int, train_labels: npt.ArrayLike | None, video_categories: npt.ArrayLike | None
) -> Baselines:
    most_frequent = None
    if train_labels is not None:
        counts = np.bincount(_labels("train_labels", train_labels, background).ravel(), minlength=background + 1)
        if not counts.any():
            raise ValueError("train_labels are empty")
        most_frequent = segment_accuracy(np.full_like(true, counts.argmax()), true)
    if video_categories is not None:
        category = _labels("video_categories", video_categories, background)
        if category.shape != true.shape[:1]:
            raise ValueError(f"video_categories have shape {category.shape}, expected ({len(true)},)")
    else:
        # A video without an event has no category; any category is wrong on all its segments, so 0 is fine.
        category = (true[:, :, None] == np.arange(background)).sum(axis=1).argmax(axis=1)
    return Baselines(
        always_background=segment_accuracy(np.full_like(true, background), true),
        most_frequent_label=most_frequent,
        oracle_category_everywhere=segment_accuracy(np.broadcast_to(category[:, None], true.shape), true),
    )


def _bootstrap(
    per_video: npt.NDArray[np.int64],
    score: Callable[[npt.NDArray[np.int64]], npt.NDArray[np.float64]],
    resamples: int,
    seed: int,
) -> ConfidenceInterval | None:
    """Return the 95 % percentile interval of `score`, a function of the sums over videos of the counts (n, columns).

    Drawing n videos with replacement is a multinomial draw of the number of times that each video is drawn. Videos with
    equal counts are interchangeable, so the draw is over the few distinct rows: it is fast and does not depend on the
    order of the videos.
    """
    if resamples == 0:
        return None
    rows, counts = np.unique(per_video, axis=0, return_counts=True)
    drawn = np.random.default_rng(seed).multinomial(len(per_video), counts / len(per_video), size=resamples)
    scores = score(drawn @ rows)
    scores = scores[np.isfinite(scores)]
    if not len(scores):
        return None
    low, high = np.percentile(scores, [2.5, 97.5])
    return float(low), float(high)


def _event_auc(event_probability: npt.ArrayLike, is_event: npt.NDArray[np.bool_]) -> float | None:
    """Return the area under the ROC curve by the rank-sum formula, with ties at their mean rank."""
    probability = np.asarray(event_probability, dtype=np.float64)
    if probability.shape != is_event.shape:
        raise ValueError(f"event_probability has shape {probability.shape}, expected {is_event.shape}")
    if not np.isfinite(probability).all():
        raise ValueError("event_probability contains a value that is not finite")
    events, others = int(is_event.sum()), int((~is_event).sum())
    if not events or not others:
        return None
    _, group, size = np.unique(probability.ravel(), return_inverse=True, return_counts=True)
    mean_rank = np.cumsum(size) - (size - 1) / 2
    rank_sum = float(mean_rank[group.ravel()][is_event.ravel()].sum())
    return (rank_sum - events * (events + 1) / 2) / (events * others)


def _labels(name: str, values: npt.ArrayLike, background: int) -> Labels:
    array = np.asarray(values)
    if array.dtype.kind not in "iu":
        raise ValueError(f"{name} must be integers, found {array.dtype}")
    array = array.astype(np.int64)
    if array.size and (array.min() < 0 or array.max() > background):
        raise ValueError(f"{name} must be in 0..{background}, found {array.min()}..{array.max()}")
    return array


def _mask(name: str, values: npt.ArrayLike, n: int) -> npt.NDArray[np.bool_]:
    array = np.asarray(values)
    if array.dtype != np.bool_ or array.shape != (n,):
        raise ValueError(f"{name} must be booleans of shape ({n},), found {array.dtype} {array.shape}")
    return array


def _share(part: int, whole: int) -> float | None:
    return part / whole if whole else None
