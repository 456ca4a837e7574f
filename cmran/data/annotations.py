"""Parse Annotations.txt, and build segment labels and video labels from it."""

from collections import defaultdict
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from cmran.categories import BACKGROUND, CATEGORIES, LABELS
from cmran.data.faults import Fault, FaultError, make_fault
from cmran.data.layout import ANNOTATIONS
from cmran.errors import DataError

_NUMBERS = {name: number for number, name in enumerate(CATEGORIES)}
_LINE = "category&video_id&quality&start&end"


@dataclass(frozen=True)
class Annotation:
    """One line of the file: the event of one video. It covers the segments start <= t < end."""

    category: str
    video_id: str
    quality: str
    start: int
    end: int

    @property
    def label(self) -> int:
        """Number of the category, 0 to 27."""
        return _NUMBERS[self.category]


def read_annotations(path: Path) -> list[Annotation]:
    """Read all lines, in the row order of the HDF5 files.

    A header line, a byte-order mark, CRLF line ends and a missing last newline are accepted.

    Raises:
        FaultError: The file cannot be read; or a line is not `category&video_id&quality&start&end`, its category is
            not one of the 28, or its event ends before it starts. The message names the first such line.
    """
    lines, faults = parse_annotations(path)
    if faults:
        raise FaultError(path.parent, faults[0])
    return [line for line in lines if line is not None]


def parse_annotations(path: Path) -> tuple[list[Annotation | None], list[Fault]]:
    """Read all lines without stopping at a bad one.

    Returns:
        All rows, with None for a bad line; and one fault for each kind of bad line, with its rows.
    """
    try:
        text = path.read_bytes().decode("utf-8-sig")
    except OSError as error:
        return [], [_unreadable(path, error.strerror or str(error))]
    except UnicodeDecodeError as error:
        return [], [_unreadable(path, f"bytes that are not UTF-8 at offset {error.start}")]
    # splitlines() also splits at characters such as form feed, which would shift every later row.
    lines = [line.removesuffix("\r") for line in text.split("\n")]
    while lines and not lines[-1].strip():
        lines.pop()
    first_row = 1 if lines and lines[0].split("&")[0].strip().lower() == "category" else 0

    rows: list[Annotation | None] = []
    bad: dict[str, list[tuple[int, str]]] = defaultdict(list)
    for number, line in enumerate(lines[first_row:]):
        parsed = _parse_line(line)
        if isinstance(parsed, Annotation):
            rows.append(parsed)
        else:
            rows.append(None)
            bad[parsed].append((number, f"line {number + first_row + 1}: {line[:80]!r}"))
    if not rows:
        return [], [_unreadable(path, "no line with an annotation")]
    faults = []
    for expected, bad_lines in bad.items():
        more = f" and {len(bad_lines) - 1} more lines" if len(bad_lines) > 1 else ""
        found, hint = f"{bad_lines[0][1]}{more}", "correct the line, or copy the file from the AVE dataset again"
        bad_rows = [number for number, _ in bad_lines]
        faults.append(make_fault(path.name, "bad_annotations", found, expected, hint, bad_rows))
    return rows, faults


def segment_labels(annotations: Sequence[Annotation], segments: int = 10) -> NDArray[np.float32]:
    """Build one-hot segment labels (N, segments, 29).

    Raises:
        DataError: An event ends after the last segment.
    """
    if (fault := late_event(annotations, segments)) is not None:
        raise DataError(fault.description, hint=fault.hint)
    labels = np.zeros((len(annotations), segments, len(LABELS)), np.float32)
    labels[:, :, BACKGROUND] = 1
    for row, annotation in enumerate(annotations):
        labels[row, annotation.start : annotation.end, BACKGROUND] = 0
        labels[row, annotation.start : annotation.end, annotation.label] = 1
    return labels


def video_labels(annotations: Sequence[Annotation]) -> NDArray[np.float32]:
    """Build one-hot video labels (N, 29): the category of the event, never background, even if the event is empty."""
    return np.eye(len(LABELS), dtype=np.float32)[[annotation.label for annotation in annotations]]


def background_labels(videos: int) -> NDArray[np.float32]:
    """Build one-hot labels (M, 29) of background videos: all background."""
    return np.eye(len(LABELS), dtype=np.float32)[[BACKGROUND] * videos]


def cross_split_duplicates(
    annotations: Sequence[Annotation | None], rows: Iterable[int], others: Iterable[int]
) -> list[int]:
    """Return those of `rows` whose video also appears in one of `others` under another category."""
    categories: dict[str, set[str]] = defaultdict(set)
    for row in others:
        other = annotations[row]
        if other is not None:
            categories[other.video_id].add(other.category)
    found = []
    for row in rows:
        annotation = annotations[row]
        if annotation is not None and categories.get(annotation.video_id, set()) - {annotation.category}:
            found.append(row)
    return sorted(found)


def late_event(annotations: Sequence[Annotation | None], segments: int) -> Fault | None:
    """Return the fault of events that end after the last of `segments` segments; None if there are none."""
    late = [row for row, line in enumerate(annotations) if line is not None and line.end > segments]
    if not late:
        return None
    first = annotations[late[0]]
    assert first is not None
    found = f"an event of segments {first.start} to {first.end} in row {late[0]}; {len(late)} such rows"
    expected = f"an end of at most {segments}, since the features have {segments} segments for each video"
    hint = "use the Annotations.txt that belongs to these features"
    return make_fault(ANNOTATIONS, "bad_annotations", found, expected, hint, late)


def _parse_line(line: str) -> Annotation | str:
    """Return the annotation, or the rule that the line breaks."""
    fields = [part.strip() for part in line.split("&")]
    if len(fields) != 5:
        return f"five fields, {_LINE}"
    category, video_id, quality, start, end = fields
    if category not in _NUMBERS:
        return "one of the 28 categories of AVE, spelled as in the dataset"
    if not video_id:
        return "a video id in the second field"
    # isdecimal() alone would accept digits of other scripts; int() alone, signs and underscores.
    if not (start.isascii() and start.isdecimal() and end.isascii() and end.isdecimal()):
        return "whole seconds as start and end"
    if max(len(start), len(end)) > 9:
        return "seconds of a video as start and end"
    if int(start) > int(end):
        return "an end that is not before the start"
    return Annotation(category, video_id, quality, int(start), int(end))


def _unreadable(path: Path, found: str) -> Fault:
    expected = f"text with one line for each video: {_LINE}"
    return make_fault(path.name, "unreadable_file", found, expected, "copy the file from the AVE dataset again")
