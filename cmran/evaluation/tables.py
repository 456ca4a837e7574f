"""Tables of the scores of an evaluation, as Markdown and as CSV.

The functions take an `Evaluation` or the dictionary of its `to_dict()`. A Markdown table of a run whose epoch was
selected on the test split starts with a note that says so. Files are written atomically.
"""

import csv
import io
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from cmran.config import SelectionSplit
from cmran.evaluation.metrics import Evaluation
from cmran.utils.files import write_text
from cmran.utils.markdown import markdown_table

Scores = Evaluation | Mapping[str, Any]

_COUNTS = ("videos", "segments", "events")
_FRACTIONS = ("precision", "recall", "f1", "event_f1")


def scores_table(scores: Scores, *, selection_split: SelectionSplit = "val") -> str:
    """Format the overall scores, followed by the trivial baselines, as a Markdown table.

    Args:
        scores: An evaluation.
        selection_split: Split on which the epoch was selected.
    """
    values = as_dict(scores)
    baselines = values["baselines"]
    rows = [("segment accuracy", _percent(values["accuracy"]) + interval_text(values["accuracy_interval_95"]))]
    if values["videos_leak_free"] is not None:
        accuracy = _percent(values["accuracy_leak_free"]) + interval_text(values["accuracy_leak_free_interval_95"])
        rows.append((f"segment accuracy, {values['videos_leak_free']} leak-free videos", accuracy))
    rows += [
        ("event F1 (IoU >= 0.5)", _fraction(values["event_f1"]) + interval_text(values["event_f1_interval_95"], 3)),
        ("event precision / recall", f"{_fraction(values['event_precision'])} / {_fraction(values['event_recall'])}"),
        ("mean IoU of true events", _fraction(values["mean_iou"])),
        ("event / background AUC", _fraction(values["event_auc"])),
        ("background recall", _fraction(values["background_recall"])),
        ("baseline: always background", _percent(baselines["always_background"])),
        ("baseline: most frequent train label", _percent(baselines["most_frequent_label"])),
        ("oracle: true category on all segments", _percent(baselines["oracle_category_everywhere"])),
    ]
    table = markdown_table([f"score ({values['videos']} videos)", "value"], rows, align="right")
    return _selection_note(selection_split) + table + "\n"


def per_category_table(scores: Scores, *, selection_split: SelectionSplit = "val") -> str:
    """Format the per-category scores as a Markdown table.

    Args:
        scores: An evaluation.
        selection_split: Split on which the epoch was selected.
    """
    head = ["category", *_COUNTS, "accuracy", "precision", "recall", "F1", "event F1"]
    rows = [
        [line["category"], *(line[key] for key in _COUNTS), _percent(line["accuracy"])]
        + [_fraction(line[key]) for key in _FRACTIONS]
        for line in as_dict(scores)["per_category"]
    ]
    return _selection_note(selection_split) + markdown_table(head, rows, align="right") + "\n"


def per_category_markdown(scores: Scores, path: Path, *, selection_split: SelectionSplit = "val") -> None:
    """Write `per_category_table` to the file `path`."""
    write_text(path, per_category_table(scores, selection_split=selection_split))


def per_category_csv(scores: Scores, path: Path, *, selection_split: SelectionSplit = "val") -> None:
    """Write the per-category scores to the CSV file `path` in full precision; undefined scores are empty fields."""
    columns = ("category", *_COUNTS, "accuracy", *_FRACTIONS)
    text = io.StringIO()
    writer = csv.writer(text, lineterminator="\n")
    writer.writerow([*columns, "selected_on"])
    # The csv module writes None as an empty field.
    writer.writerows([*(line[key] for key in columns), selection_split] for line in as_dict(scores)["per_category"])
    write_text(path, text.getvalue())


def as_dict(scores: Scores) -> Mapping[str, Any]:
    """Return the scores as the dictionary of `Evaluation.to_dict()`."""
    return scores.to_dict() if isinstance(scores, Evaluation) else scores


def interval_text(interval: Sequence[float] | None, digits: int = 1) -> str:
    """Format a 95 % confidence interval to append to its score; empty without one."""
    return "" if interval is None else f" (95 %: {interval[0]:.{digits}f} to {interval[1]:.{digits}f})"


def _selection_note(selection_split: SelectionSplit) -> str:
    """Return the warning about the selection split as a Markdown paragraph; empty for val."""
    match selection_split:
        case "val":
            return ""
        case "unknown":
            note = "selection split unknown (published checkpoints were selected on test): test scores may be too high"
        case _:
            note = f"epoch selected on {selection_split}: scores are too optimistic, for comparison only"
    return f"**{note}**\n\n"


def _percent(value: float | None) -> str:
    return "-" if value is None else f"{value:.2f} %"


def _fraction(value: float | None) -> str:
    return "-" if value is None else f"{value:.3f}"
