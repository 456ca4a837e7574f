"""Plots of an evaluation and of a training run as PNG files: confusion matrix, training curves, event timeline.

A plot of a run whose epoch was selected on the test split says so in its title. Files are written atomically.

The plots use the Figure objects of matplotlib without pyplot. There is no global state, so threads may draw at the same
time. matplotlib is imported by the first plot.
"""

from collections.abc import Mapping, Sequence, Sized
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import numpy.typing as npt

from cmran.categories import CATEGORIES
from cmran.config import SEGMENT_S, SelectionSplit
from cmran.evaluation.metrics import EventInterval, event_intervals
from cmran.evaluation.tables import Scores, as_dict, interval_text
from cmran.utils.files import atomic_write

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure
    from matplotlib.text import Text

TIMELINE_VIDEOS = 12
"""Largest number of videos in a timeline."""

DPI = 110

INK, MUTED, GRID, EMPTY, BACKGROUND_COLOR = "#222222", "#666666", "#dddddd", "#e6e6e6", "#f0f0f0"

# The line colors of Okabe and Ito, which are distinguishable with any color vision.
BLUE, ORANGE, GREEN = "#0072b2", "#d55e00", "#009e73"

# One color per category. A greedy search maximized their distance in CIELAB for normal and for red-green blind vision.
CATEGORY_COLORS: tuple[str, ...] = (
    "#4b780f", "#4b3cc3", "#5ad2ff", "#782d4b", "#ffc31e", "#f0c3a5", "#ff3ca5",
    "#5a96ff", "#ff785a", "#870078", "#5a3c1e", "#e15a78", "#0fe1e1", "#785ab4",
    "#96a500", "#ffc369", "#0f784b", "#0096a5", "#f096a5", "#1eb45a", "#5a78ff",
    "#8796d2", "#b42d78", "#b40f3c", "#d23c1e", "#d2d287", "#690f96", "#3cb4ff",
)  # fmt: skip


def confusion_png(
    scores: Scores, path: Path, *, title: str = "Confusion of segment labels", selection_split: SelectionSplit = "val"
) -> None:
    """Draw the confusion matrix. Each row shows shares of the true label; shares from 1 % are also written in %.

    The row of a label without true segments is gray.

    Args:
        scores: An evaluation.
        path: PNG file to write.
        title: Title of the plot.
        selection_split: Split on which the epoch was selected.
    """
    values = as_dict(scores)
    counts = np.asarray(values["confusion"], dtype=np.int64)
    names = [line["category"] for line in values["per_category"]]
    totals = counts.sum(axis=1)
    share = counts / np.maximum(totals, 1)[:, None]

    size = len(names)
    figure = _figure(4.2 + 0.34 * size, 3.2 + 0.33 * size)
    axes = figure.add_subplot()
    shown = np.ma.masked_array(share, mask=np.broadcast_to(totals[:, None] == 0, share.shape))
    # cividis is perceptually uniform, also for red-green blind readers.
    image = axes.imshow(shown, cmap="cividis", vmin=0.0, vmax=1.0, interpolation="nearest")
    axes.set_facecolor(EMPTY)
    axes.set_xticks(range(size), names, rotation=90, fontsize=9, color=INK)
    axes.set_yticks(
        range(size), [f"{name}  ({total})" for name, total in zip(names, totals, strict=True)], fontsize=9, color=INK
    )
    axes.tick_params(length=0)
    for row, column in np.argwhere(share >= 0.01):
        text_color = "#000000" if share[row, column] > 0.55 else "#ffffff"
        axes.text(
            column, row, f"{100 * share[row, column]:.0f}", ha="center", va="center", fontsize=7, color=text_color
        )
    axes.set_xlabel("predicted label", fontsize=11, color=INK)
    axes.set_ylabel("true label (segments)", fontsize=11, color=INK)
    bar = figure.colorbar(image, ax=axes, fraction=0.035, pad=0.015, format=lambda value, _: f"{100 * value:.0f} %")
    bar.set_label("share of the true label's segments", fontsize=10, color=INK)
    bar.ax.tick_params(labelsize=9)
    line = f"segment accuracy {values['accuracy']:.1f} %{interval_text(values['accuracy_interval_95'])}"
    _title(axes, title, f"{line}, {values['videos']} videos", selection_split)
    _save(figure, path)


def curves_png(
    epochs: Sequence[Mapping[str, Any]],
    path: Path,
    *,
    title: str = "Training",
    baselines: Mapping[str, float | None] | None = None,
    selection_split: SelectionSplit = "val",
) -> None:
    """Draw accuracy, loss and learning rate over the epochs, and mark the best epoch.

    The best epoch is the first one with the highest accuracy on `selection_split`.

    Args:
        epochs: One mapping per epoch with the keys `epoch`, `train_loss` and `lr`, and optionally `train_accuracy`
            (in %), `val` and `test` ({"accuracy": in %, "loss": ...}, or None if the epoch was not evaluated).
        path: PNG file to write.
        title: Title of the plot.
        baselines: Baselines as in `Evaluation.baselines`; `always_background` is drawn as a line.
        selection_split: Split on which the epoch was selected.

    Raises:
        ValueError: There is no epoch, or none was evaluated on the selection split.
    """
    if not epochs:
        raise ValueError("there is no epoch to draw")
    number = [int(epoch["epoch"]) for epoch in epochs]
    by_split = {split: _split_scores(epochs, split, "accuracy") for split in ("val", "test")}
    selection = by_split[selection_split]
    if not np.isfinite(selection).any():
        raise ValueError(f"no epoch has an accuracy on the selection split {selection_split!r}")
    best = int(np.nanargmax(selection))

    figure = _figure(9.0, 8.2)
    grid = figure.add_gridspec(3, 1, height_ratios=[3, 2, 1.1])
    top = figure.add_subplot(grid[0])
    middle, bottom = (figure.add_subplot(grid[i], sharex=top) for i in (1, 2))

    train = np.array([np.nan if (value := epoch.get("train_accuracy")) is None else value for epoch in epochs])
    for name, line, color in (
        ("train", train, GREEN),
        ("val", by_split["val"], BLUE),
        ("test", by_split["test"], ORANGE),
    ):
        _curve(top, number, line, color, name)
    always = (baselines or {}).get("always_background")
    if always is not None:
        top.axhline(always, color=MUTED, linewidth=1.2, linestyle=(0, (4, 3)), label="always background")
    top.plot(
        number[best],
        selection[best],
        marker="*",
        markersize=16,
        color=INK,
        linestyle="none",
        label=f"best on {selection_split}: {selection[best]:.2f} % (epoch {number[best]})",
        zorder=5,
    )
    top.set_ylabel("segment accuracy (%)", color=INK, fontsize=10)
    # The legend is outside the axes, so that it hides no curve.
    top.legend(loc="lower right", bbox_to_anchor=(1.0, 1.0), ncols=5, fontsize=9, frameon=False, borderaxespad=0.2)

    # Same colors as the accuracies above.
    _curve(middle, number, np.array([epoch["train_loss"] for epoch in epochs], dtype=np.float64), GREEN, "train")
    for split, color in (("val", BLUE), ("test", ORANGE)):
        _curve(middle, number, _split_scores(epochs, split, "loss"), color, split)
    middle.set_ylabel("loss", color=INK, fontsize=10)
    # In weak mode, train has no accuracy and is therefore missing in the legend above.
    middle.legend(loc="best", fontsize=9, frameon=False)
    rates = [float(epoch["lr"]) for epoch in epochs]
    bottom.step(number, rates, color=MUTED, where="mid", marker="o", markersize=_marker(number), linewidth=1.8)
    _log_axis(bottom, rates)
    bottom.set_ylabel("learning rate", color=INK, fontsize=10)
    bottom.set_xlabel("epoch", color=INK, fontsize=10)
    for axes in (top, middle, bottom):
        axes.axvline(number[best], color=INK, linewidth=0.8, linestyle=":")
        axes.grid(color=GRID, linewidth=0.7)
        axes.tick_params(labelsize=9, colors=INK, labelbottom=axes is bottom)
        axes.spines[["top", "right"]].set_visible(False)
    bottom.set_xlim(number[0] - 0.5, number[-1] + 0.5)
    _whole_numbers(bottom)
    _title(top, title, "", selection_split, pad=26)
    _save(figure, path)


def timeline_rows(videos: int, limit: int = TIMELINE_VIDEOS) -> npt.NDArray[np.int64]:
    """Return the indices of the videos to draw, at most `limit`, evenly spread over all `videos`."""
    return np.unique(np.linspace(0, videos - 1, min(videos, limit)).round().astype(np.int64))


def timeline_png(
    segments_pred: npt.ArrayLike,
    labels_true: npt.ArrayLike,
    titles: Sequence[str],
    path: Path,
    *,
    categories: Sequence[str] = CATEGORIES,
    title: str = "True and predicted events",
    selection_split: SelectionSplit = "val",
) -> None:
    """Draw the true and predicted events of a few videos over time.

    Args:
        segments_pred: Predicted labels, (n, T), 1 <= n <= 12.
        labels_true: True labels, (n, T).
        titles: One title per video, for example its row and video id.
        path: PNG file to write.
        categories: Names of the event categories.
        title: Title of the plot.
        selection_split: Split on which the epoch was selected.

    Raises:
        ValueError: The shapes disagree, or there are no videos or more than 12.
    """
    pred, true = np.asarray(segments_pred), np.asarray(labels_true)
    if pred.ndim != 2 or pred.shape != true.shape or len(titles) != len(pred):
        raise ValueError(f"expected two (n, T) arrays and n titles, found {pred.shape}, {true.shape}, {len(titles)}")
    if not 1 <= len(pred) <= TIMELINE_VIDEOS or pred.shape[1] == 0:
        raise ValueError(f"a timeline shows 1 to {TIMELINE_VIDEOS} videos of at least one segment, found {pred.shape}")
    background = len(categories)
    videos, segments = pred.shape
    used = sorted({e.category for labels in (true, pred) for row in labels for e in event_intervals(row, background)})

    legend_rows = -(-(len(used) + 1) // 3)
    figure = _figure(11.0, 1.5 + 0.72 * videos + 0.24 * legend_rows)
    axes = figure.add_subplot()
    texts: list[tuple[Text, float]] = []
    for video in range(videos):
        for which, labels, top in (("true", true[video], 0.08), ("pred.", pred[video], 0.48)):
            y = video + top
            axes.broken_barh([(0, segments * SEGMENT_S)], (y, 0.36), facecolor=BACKGROUND_COLOR)
            for event in event_intervals(labels, background):
                texts.append(_draw_event(axes, event, y, categories))
            axes.text(
                -0.008,
                y + 0.18,
                which,
                transform=axes.get_yaxis_transform(),
                ha="right",
                va="center",
                fontsize=8,
                color=MUTED,
            )
        right = int((pred[video] == true[video]).sum())
        axes.text(
            1.01,
            video + 0.46,
            f"{right}/{segments}",
            transform=axes.get_yaxis_transform(),
            va="center",
            fontsize=9,
            color=INK,
        )
    axes.set_yticks([video + 0.46 for video in range(videos)], titles, fontsize=9, color=INK, parse_math=False)
    axes.tick_params(axis="y", length=0, pad=36)
    axes.tick_params(axis="x", labelsize=9, colors=INK)
    axes.set_xlim(0, segments * SEGMENT_S)
    axes.set_ylim(videos, 0)
    _whole_numbers(axes)
    axes.grid(axis="x", color="#ffffff", linewidth=0.6, alpha=0.6)
    axes.set_axisbelow("line")  # above the bars and below their names
    axes.spines[["top", "right", "left"]].set_visible(False)
    axes.set_xlabel("time (s); right: correct segments", fontsize=10, color=INK)
    _legend(figure, used, categories)
    _title(axes, title, "", selection_split)
    _remove_overlong_texts(figure, axes, texts)
    _save(figure, path)


def _split_scores(epochs: Sequence[Mapping[str, Any]], split: str, score: str) -> npt.NDArray[np.float64]:
    values = [(epoch.get(split) or {}).get(score) for epoch in epochs]
    return np.array([np.nan if value is None else value for value in values], dtype=np.float64)


def _curve(axes: "Axes", number: Sequence[int], values: npt.NDArray[np.float64], color: str, label: str) -> None:
    """Draw a line through the epochs that have a value, if there are any."""
    known = np.isfinite(values)
    if known.any():
        epochs = np.asarray(number)[known]
        marker = _marker(epochs)
        axes.plot(epochs, values[known], color=color, marker="o", markersize=marker, linewidth=1.8, label=label)


def _marker(number: Sized) -> float:
    return 4.0 if len(number) <= 40 else 0.0


def _figure(width: float, height: float) -> "Figure":
    from matplotlib.figure import Figure

    return Figure(figsize=(width, height), dpi=DPI, layout="constrained", facecolor="white")


def _title(axes: "Axes", title: str, line: str, selection_split: SelectionSplit, pad: float = 8) -> None:
    mark = {"val": "", "test": "epoch selected on test", "unknown": "selection split unknown"}[selection_split]
    text = "\n".join(filter(None, [" - ".join(filter(None, [title, mark])), line]))
    axes.set_title(text, loc="left", fontsize=12, color=ORANGE if mark else INK, pad=pad, parse_math=False)


def _whole_numbers(axes: "Axes") -> None:
    from matplotlib.ticker import MaxNLocator

    axes.xaxis.set_major_locator(MaxNLocator(integer=True, min_n_ticks=1))


def _log_axis(axes: "Axes", values: Sequence[float]) -> None:
    from matplotlib.ticker import LogLocator, NullFormatter

    axes.set_yscale("log")
    axes.set_ylim(min(values) / 1.6, max(values) * 1.6)
    decades = np.log10(max(values) / min(values))
    axes.yaxis.set_major_locator(LogLocator(subs=(1.0, 2.0, 5.0) if decades < 2 else (1.0,)))
    axes.yaxis.set_major_formatter(lambda value, _: f"{value:g}")
    axes.yaxis.set_minor_formatter(NullFormatter())


def _draw_event(axes: "Axes", event: EventInterval, y: float, categories: Sequence[str]) -> tuple["Text", float]:
    """Draw the bar of one event with its name; return the text and the width of the bar in seconds."""
    from matplotlib.colors import to_rgb

    start, width = event.start * SEGMENT_S, (event.end - event.start) * SEGMENT_S
    color = CATEGORY_COLORS[event.category % len(CATEGORY_COLORS)]
    axes.broken_barh([(start, width)], (y, 0.36), facecolor=color)
    red, green, blue = to_rgb(color)
    text = axes.text(
        start + width / 2,
        y + 0.19,
        categories[event.category],
        ha="center",
        va="center",
        fontsize=8,
        color="#000000" if 0.299 * red + 0.587 * green + 0.114 * blue > 0.5 else "#ffffff",
        bbox={"facecolor": color, "edgecolor": "none", "pad": 1.5},  # hides the grid line behind the name
        parse_math=False,
    )
    return text, width


def _legend(figure: "Figure", used: Sequence[int], categories: Sequence[str]) -> None:
    from matplotlib.patches import Patch

    handles = [Patch(facecolor=CATEGORY_COLORS[c % len(CATEGORY_COLORS)], label=categories[c]) for c in used]
    handles.append(Patch(facecolor=BACKGROUND_COLOR, edgecolor=GRID, label="Background"))
    figure.legend(handles=handles, loc="outside lower center", ncols=3, fontsize=9, frameon=False)


def _remove_overlong_texts(figure: "Figure", axes: "Axes", texts: Sequence[tuple["Text", float]]) -> None:
    """Remove names that are longer than their bar (the legend has them), measured in the final layout."""
    figure.draw_without_rendering()
    for text, width in texts:
        left, right = axes.transData.transform([(0, 0), (width, 0)])[:, 0]
        if text.get_window_extent().width > right - left - 6:
            text.remove()


def _save(figure: "Figure", path: Path) -> None:
    # Without the Software entry, the bytes do not depend on the version of matplotlib.
    with atomic_write(path) as file:
        figure.savefig(file, format="png", metadata={"Software": None})
