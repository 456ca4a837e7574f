"""Scores of predicted segments: accuracy, events, categories, confusion, intervals, and the trivial scores beside them.

Shapes: n videos, T segments a video, K categories (28); the label K (28) is background. Accuracies are in %, all
other scores lie in [0, 1]. A score that is not defined (precision without a prediction, say) is None, never NaN or a
made-up 0.
"""

import dataclasses
import itertools
import math
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import numpy as np
import numpy.typing as npt

from cmran.categories import BACKGROUND, CATEGORIES

IOU_THRESHOLD = 0.5
"""A predicted event finds a true one from this intersection over union (in time) on."""


Labels = npt.NDArray[np.int64]


Interval = tuple[float, float]


class Run(NamedTuple):
    """A maximal run of one category in a row of labels: segments start <= t < end."""

    category: int
    start: int
    end: int


@dataclasses.dataclass(frozen=True, kw_only=True)
class CategoryScore:
    """One line of the per-category table; the last line is the background."""

    category: str
    videos: int
    """Videos in which the label truly occurs."""
    segments: int
    """Segments that truly carry it."""
    events: int
    """True events of the category; 0 for the background, which has none."""
    accuracy: float | None
    """Segment accuracy in % over all segments of the category's videos, background segments included. None for the
    background, of which no video is: in the videos that hold some it would count the events, too."""
    precision: float | None
    recall: float | None
    f1: float | None
    """Of the label, counted by segment."""
    event_f1: float | None
    """Of its events at IoU >= 0.5."""


@dataclasses.dataclass(frozen=True, kw_only=True)
class Baselines:
    """Segment accuracy in % of what needs no network."""

    always_background: float
    most_frequent_label: float | None
    """The label that is most frequent in `train_labels`, everywhere; None without them."""
    oracle_category_everywhere: float
    """The video's *true* category on all segments. It looks the answer up: no rule that anyone could use, but it shows
    how much accuracy the category alone is worth, without any localization."""


@dataclasses.dataclass(frozen=True, kw_only=True)
class Evaluation:
    """All scores of one set of predictions; see `evaluate` for what each means."""

    videos: int
    segments: int
    accuracy: float
    accuracy_interval_95: Interval | None
    videos_clean: int | None
    accuracy_leak_free: float | None
    accuracy_clean_interval_95: Interval | None
    true_events: int
    predicted_events: int
    event_precision: float | None
    event_recall: float | None
    event_f1: float | None
    event_f1_interval_95: Interval | None
    mean_iou: float | None
    event_auc: float | None
    background_recall: float | None
    baselines: Baselines
    per_category: tuple[CategoryScore, ...]
    confusion: tuple[tuple[int, ...], ...]
    bootstrap: int
    seed: int

    def to_dict(self) -> dict[str, Any]:
        """Everything as plain JSON types: dict, list, str, int, float, None."""
        plain: dict[str, Any] = _plain(dataclasses.asdict(self))
        return plain

    def scalars(self) -> dict[str, float]:
        """The single numbers that are defined, flat, as a tracker takes them: no tables, no None."""
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
    "accuracy_clean_interval_95",
    "event_precision",
    "event_recall",
    "event_f1",
    "event_f1_interval_95",
    "mean_iou",
    "event_auc",
    "background_recall",
)


def segment_accuracy(segments_pred: npt.ArrayLike, labels_true: npt.ArrayLike) -> float:
    """Correct segments / all segments, in % (the published metric). Both of one shape, e.g. (n, T).

    Raises ValueError: shapes that differ, no segment at all.
    """
    pred, true = np.asarray(segments_pred), np.asarray(labels_true)
    if pred.shape != true.shape:
        raise ValueError(f"predictions have shape {pred.shape}, labels {true.shape}: they must agree")
    if true.size == 0:
        raise ValueError("there is no segment to score")
    return 100.0 * int(np.count_nonzero(pred == true)) / true.size


def runs_of(labels: npt.ArrayLike, background: int = BACKGROUND) -> list[Run]:
    """The events of one video: maximal runs of one category in its labels (T,), in time order, background left out.

    Two categories that touch are two runs. Raises ValueError where `labels` is not one-dimensional.
    """
    row = np.asarray(labels)
    if row.ndim != 1:
        raise ValueError(f"labels of one video have shape (T,), found {row.shape}")
    edges = np.flatnonzero(row[1:] != row[:-1]) + 1
    bounds = [0, *edges.tolist(), len(row)] if len(row) else []
    return [Run(int(row[start]), start, end) for start, end in itertools.pairwise(bounds) if row[start] != background]


def interval_iou(first: Run, second: Run) -> float:
    """Intersection over union of two runs in time, in [0, 1]; 0 where their categories differ."""
    if first.category != second.category:
        return 0.0
    shared = min(first.end, second.end) - max(first.start, second.start)
    if shared <= 0:
        return 0.0
    return shared / ((first.end - first.start) + (second.end - second.start) - shared)


def match_events(
    predicted: Sequence[Run], true: Sequence[Run], threshold: float = IOU_THRESHOLD
) -> list[tuple[int, int]]:
    """Pairs (index of predicted, index of true) of one video's events with IoU >= threshold, each event used once.

    Greedy: the pair with the highest IoU first; among equals the earlier true event, then the earlier predicted one.
    Pairs of different categories never match.
    """
    pairs = [
        (-iou, q.start, p.start, i, j)
        for i, p in enumerate(predicted)
        for j, q in enumerate(true)
        if (iou := interval_iou(p, q)) >= threshold and iou > 0
    ]
    taken_pred: set[int] = set()
    taken_true: set[int] = set()
    matches = []
    for _, _, _, i, j in sorted(pairs):
        if i not in taken_pred and j not in taken_true:
            taken_pred.add(i)
            taken_true.add(j)
            matches.append((i, j))
    return matches


def evaluate(
    segments_pred: npt.ArrayLike,
    labels_true: npt.ArrayLike,
    *,
    event_probability: npt.ArrayLike | None = None,
    clean: npt.ArrayLike | None = None,
    categories: Sequence[str] = CATEGORIES,
    train_labels: npt.ArrayLike | None = None,
    video_categories: npt.ArrayLike | None = None,
    bootstrap: int = 1000,
    seed: int = 0,
) -> Evaluation:
    """Score predicted segment labels (n, T) against the true ones (n, T), both in 0..K with K = background.

    - accuracy: correct segments / all segments, in %; `accuracy_leak_free` the same on the videos where `clean` (n,) is
      true (the real test split: 394 of 402 videos that do not stand in train under another category).
    - events: maximal runs of one category (`runs_of`). A predicted event is right when it matches a true event of the
      same video and category at IoU >= 0.5 (`match_events`: greedy by IoU, each event matched once). Precision, recall
      and F1 count events over all videos together.
    - mean_iou: mean over the true events of the best IoU of a predicted event of the same video and category, 0 where
      there is none. It asks how well true events were found; events predicted too many lower the precision, not this.
    - event_auc: chance that `event_probability` (n, T) is higher on a random event segment than on a random background
      segment (ties count half): how well events are told from background, whatever the threshold. None without it.
    - background_recall: share of true background segments predicted as background.
    - confusion: counts, rows true, columns predicted, (K+1, K+1).
    - intervals: percentile bootstrap over videos (95 %, `bootstrap` resamples, deterministic by `seed`); None when 0.
    - baselines: see `Baselines`. `train_labels` (any shape) are reference labels for the most frequent label;
      `video_categories` (n,) the videos' own categories, else the most frequent event category of each row.

    The order of the videos changes nothing. Raises ValueError: shapes that disagree, no video, labels out of range,
    probabilities that are not finite.
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
    clean_rows = None if clean is None else _mask("clean", clean, n)
    clean_videos = None if clean_rows is None else int(clean_rows.sum())
    accuracy_leak_free = accuracy_clean_interval = None
    if clean_rows is not None and clean_videos:
        accuracy_leak_free = segment_accuracy(pred[clean_rows], true[clean_rows])
        accuracy_clean_interval = _bootstrap(per_video[clean_rows], accuracy_of, bootstrap, seed)

    return Evaluation(
        videos=n,
        segments=segments,
        accuracy=segment_accuracy(pred, true),
        accuracy_interval_95=_bootstrap(per_video, accuracy_of, bootstrap, seed),
        videos_clean=clean_videos,
        accuracy_leak_free=accuracy_leak_free,
        accuracy_clean_interval_95=accuracy_clean_interval,
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
    """The baselines of `evaluate` for labels (n, T) of 0..28, without any prediction."""
    true = _labels("labels_true", labels_true, BACKGROUND)
    if true.size == 0:
        raise ValueError("there is no segment to score")
    return _baselines(true, BACKGROUND, train_labels, None)


def mean_and_spread(values: Sequence[float]) -> dict[str, float | int | None]:
    """Mean, sample standard deviation (n - 1; None for one value), min, max and n of one score over several seeds.

    Raises ValueError: no value, or one that is not finite.
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
    matched: Labels  # (n, K) by video and category
    predicted: Labels
    true: Labels
    best_iou: list[float]  # one for each true event


def _score_events(pred: Labels, true: Labels, background: int) -> _EventCounts:
    matched, predicted, truth = (np.zeros((len(true), background), dtype=np.int64) for _ in range(3))
    best: list[float] = []
    for video in range(len(true)):
        pred_runs, true_runs = runs_of(pred[video], background), runs_of(true[video], background)
        for run in pred_runs:
            predicted[video, run.category] += 1
        for run in true_runs:
            truth[video, run.category] += 1
            best.append(max((interval_iou(other, run) for other in pred_runs), default=0.0))
        for _, index in match_events(pred_runs, true_runs):
            matched[video, true_runs[index].category] += 1
    return _EventCounts(matched, predicted, truth, best)


def _per_category(
    names: Sequence[str], true: Labels, correct: Labels, confusion: Labels, events: _EventCounts
) -> tuple[CategoryScore, ...]:
    segments = true.shape[1]
    scores = []
    for label, name in enumerate(names):
        holds = (true == label).any(axis=1)
        videos = int(holds.sum())
        hits, truly, said = int(confusion[label, label]), int(confusion[label].sum()), int(confusion[:, label].sum())
        foreground = label < len(names) - 1
        found, predicted, truth = (
            (int(counts[:, label].sum()) for counts in (events.matched, events.predicted, events.true))
            if foreground
            else (0, 0, 0)
        )
        scores.append(
            CategoryScore(
                category=name,
                videos=videos,
                segments=truly,
                events=truth,
                accuracy=100.0 * int(correct[holds].sum()) / (videos * segments) if videos and foreground else None,
                precision=_share(hits, said),
                recall=_share(hits, truly),
                f1=_share(2 * hits, said + truly),
                event_f1=_share(2 * found, predicted + truth),
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
        # A video without an event has no category here: any category is wrong on all its segments, so 0 will do.
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
) -> Interval | None:
    """95 % percentile interval of `score`, a function of the sums over the videos of the counts (n, columns).

    Drawing n videos with replacement is a multinomial draw of how often each video comes. Videos with the same counts
    are interchangeable, so it is drawn over the few distinct rows: fast, and the order of the videos cannot matter.
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
    """Area under the ROC curve by the rank-sum formula, ties at their mean rank."""
    probability = np.asarray(event_probability, dtype=np.float64)
    if probability.shape != is_event.shape:
        raise ValueError(f"event_probability has shape {probability.shape}, expected {is_event.shape}")
    if not np.isfinite(probability).all():
        raise ValueError("event_probability holds a value that is not finite")
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
        raise ValueError(f"{name} must lie in 0..{background}, found {array.min()}..{array.max()}")
    return array


def _mask(name: str, values: npt.ArrayLike, n: int) -> npt.NDArray[np.bool_]:
    array = np.asarray(values)
    if array.dtype != np.bool_ or array.shape != (n,):
        raise ValueError(f"{name} must be booleans of shape ({n},), found {array.dtype} {array.shape}")
    return array


def _share(part: int, whole: int) -> float | None:
    return part / whole if whole else None


def _plain(value: Any) -> Any:
    if isinstance(value, dict):
        return {key: _plain(item) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [_plain(item) for item in value]
    return value
