"""Pictures and tables of a run: confusion, curves, a timeline of events, the per-category table.

Scores come as an `Evaluation` or as its `to_dict()`. Every file is written atomically. A figure of a run
whose epoch was selected on the test split says so on its face.

The pictures use matplotlib's Figure objects alone, no pyplot: no global state, so threads may draw at once.
"""

import csv
import io
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from cmran.config import SelectionSplit
from cmran.evaluation.metrics import Evaluation
from cmran.utils.files import write_text

Scores = Evaluation | Mapping[str, Any]


def scores_table(scores: Scores, *, selection_split: SelectionSplit = "val") -> str:
    """The overall scores as a Markdown table, the trivial baselines beside them."""
    values = _as_dict(scores)
    baselines = values["baselines"]
    lines = [
        ("segment accuracy", _percent(values["accuracy"]) + _interval_text(values["accuracy_interval_95"])),
    ]
    if values["videos_clean"] is not None:
        clean = _percent(values["accuracy_leak_free"]) + _interval_text(values["accuracy_clean_interval_95"])
        lines.append((f"segment accuracy, {values['videos_clean']} clean videos", clean))
    lines += [
        ("event F1 (IoU >= 0.5)", _fraction(values["event_f1"]) + _interval_text(values["event_f1_interval_95"], 3)),
        ("event precision / recall", f"{_fraction(values['event_precision'])} / {_fraction(values['event_recall'])}"),
        ("mean IoU of true events", _fraction(values["mean_iou"])),
        ("event / background AUC", _fraction(values["event_auc"])),
        ("background recall", _fraction(values["background_recall"])),
        ("baseline: always background", _percent(baselines["always_background"])),
        ("baseline: most frequent train label", _percent(baselines["most_frequent_label"])),
        ("not a rule: true category on all segments", _percent(baselines["oracle_category_everywhere"])),
    ]
    head = [_mark(selection_split)] if selection_split != "val" else []
    head += [f"| score ({values['videos']} videos) | value |", "|---|---:|"]
    return "\n".join([*head, *(f"| {name} | {value} |" for name, value in lines)]) + "\n"


def per_category_table(scores: Scores, *, selection_split: SelectionSplit = "val") -> str:
    """The per-category table as Markdown."""
    head = [_mark(selection_split)] if selection_split != "val" else []
    head += [
        "| category | videos | segments | events | accuracy | precision | recall | F1 | event F1 |",
        "|---|---:|---:|---:|---:|---:|---:|---:|---:|",
    ]
    lines = [
        f"| {line['category'].replace('|', chr(92) + '|')} | {line['videos']} | {line['segments']} | {line['events']} "
        f"| {_percent(line['accuracy'])} | " + " | ".join(_fraction(line[key]) for key in _CATEGORY_FRACTIONS) + " |"
        for line in _as_dict(scores)["per_category"]
    ]
    return "\n".join([*head, *lines]) + "\n"


def per_category_markdown(scores: Scores, path: Path, *, selection_split: SelectionSplit = "val") -> None:
    """Write the per-category table as Markdown."""
    write_text(path, per_category_table(scores, selection_split=selection_split))


def per_category_csv(scores: Scores, path: Path, *, selection_split: SelectionSplit = "val") -> None:
    """Write the per-category table as CSV in full precision: empty where a score is not defined."""
    columns = ("category", "videos", "segments", "events", "accuracy", *_CATEGORY_FRACTIONS)
    text = io.StringIO()
    writer = csv.writer(text, lineterminator="\n")
    writer.writerow([*columns, "selected_on"])
    for line in _as_dict(scores)["per_category"]:
        writer.writerow(["" if line[key] is None else line[key] for key in columns] + [selection_split])
    write_text(path, text.getvalue())


_CATEGORY_FRACTIONS = ("precision", "recall", "f1", "event_f1")


def _as_dict(scores: Scores) -> Mapping[str, Any]:
    return scores.to_dict() if isinstance(scores, Evaluation) else scores


def _mark(selection_split: SelectionSplit) -> str:
    # A Markdown paragraph of its own: the empty line ends it.
    if selection_split == "unknown":
        return (
            "**selection split unknown (published checkpoints were selected on test): a test score may be too high**\n"
        )
    return f"**epoch selected on {selection_split}: too kind a score, for comparison only**\n"


def _percent(value: float | None) -> str:
    return "-" if value is None else f"{value:.2f} %"


def _fraction(value: float | None) -> str:
    return "-" if value is None else f"{value:.3f}"


def _interval_text(interval: Sequence[float] | None, digits: int = 1) -> str:
    return "" if interval is None else f" (95 %: {interval[0]:.{digits}f} to {interval[1]:.{digits}f})"
