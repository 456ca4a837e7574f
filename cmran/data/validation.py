"""Collect every fault of a data folder in one report: what is wrong, where, what was expected, what to do."""

import contextlib
import itertools
import json
import threading
from collections import Counter
from collections.abc import Iterable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from cmran.categories import BACKGROUND, LABELS
from cmran.config import Mode
from cmran.data import layout
from cmran.data.annotations import Annotation, cross_split_duplicates, late_event, parse_annotations
from cmran.data.faults import Fault, FaultError, make_fault, rows_text
from cmran.data.fingerprint import folder_fingerprint
from cmran.data.hdf5 import StoredArray, open_array
from cmran.data.layout import FileSpec
from cmran.data.rules import (
    REBUILD_LABELS,
    check_axes,
    check_background,
    check_one_hot,
    check_order,
    count_text,
    missing_labels,
    size_fault,
)
from cmran.errors import CmranError
from cmran.utils.device import usable_cpus
from cmran.utils.files import path_exists, what_is_at
from cmran.utils.progress import Progress

BLOCK_BYTES = 8 << 20
"""Size of the blocks in which each thread scans features: small enough to stay in the CPU cache."""
THREADS = 2

_FLOAT32_MAX = float(np.finfo(np.float32).max)
_EMPTY_HINT = "nothing to do for the published data, in which row 26 is empty; in other data check these videos"
_CONTRADICTIONS = {"labels_disagree", "annotations_disagree"}


@dataclass
class Report:
    """All faults of a folder. The folder can be used for training in the checked mode if `errors` is empty."""

    fingerprint: str
    """Empty if the folder is missing or one of its files cannot be read."""
    errors: list[Fault] = field(default_factory=list)
    warnings: list[Fault] = field(default_factory=list)

    @property
    def ok(self) -> bool:
        """Whether there is no error; there may be warnings."""
        return not self.errors

    def to_dict(self) -> dict[str, Any]:
        """Return the report as plain values: fingerprint, errors, warnings."""
        return {
            "fingerprint": self.fingerprint,
            "errors": [fault.to_dict() for fault in self.errors],
            "warnings": [fault.to_dict() for fault in self.warnings],
        }

    def to_json(self) -> str:
        """Return the report as JSON text."""
        return json.dumps(self.to_dict(), indent=2, allow_nan=False) + "\n"

    def to_markdown(self) -> str:
        """Return the report as a Markdown table, errors first."""
        lines = [f"# Data report: {self.summary()}", "", f"Fingerprint: `{self.fingerprint or 'none'}`", ""]
        if self.errors or self.warnings:
            lines += [
                "| | code | file | key | rows | found | expected | what to do |",
                "|---|---|---|---|---|---|---|---|",
            ]
        for kind, faults in (("error", self.errors), ("warning", self.warnings)):
            for fault in faults:
                rows = rows_text(fault.rows) if fault.rows else ""
                cells = (kind, fault.code, fault.file, fault.key or "", rows, fault.found, fault.expected, fault.hint)
                lines.append("| " + " | ".join(cell.replace("|", "\\|") for cell in cells) + " |")
        return "\n".join(lines) + "\n"

    def summary(self) -> str:
        """Return one line, for example `2 errors, 1 warning`."""
        counts = ((len(self.errors), "error"), (len(self.warnings), "warning"))
        return ", ".join(f"{count} {word}{'' if count == 1 else 's'}" for count, word in counts)


def validate(path: Path | str, mode: Mode = "full", *, progress: bool = True) -> Report:
    """Check the whole folder for training in `mode`.

    All faults are collected. The features are read once, in blocks, by two threads; memory stays below 1 GiB for files
    of any size. The fingerprint reads the files once more, unless it is cached.

    In full mode, files that only weak mode needs may be absent. If they exist they are checked, but their faults are
    warnings, except labels that contradict labels.h5 or Annotations.txt.

    Args:
        path: The data folder.
        mode: "full" or "weak".
        progress: Show progress bars.

    Returns:
        The report. A bad or missing folder is reported, never raised.
    """
    path = Path(path)
    if (found := what_is_at(path)) != "a folder":
        expected = "a folder with the files of the published format"
        hint = "check the path, or generate a synthetic dataset with `cmran synth`"
        return Report("", errors=[make_fault(str(path), "missing_folder", f"{found} there", expected, hint)])
    with _Check(path, mode, progress) as check:
        check.run(features=True)
    try:
        fingerprint = folder_fingerprint(path, progress=progress)
    except CmranError as error:
        fingerprint = ""
        # A file that could not be opened is already in the report.
        if not any(fault.code == "unreadable_file" for fault in check.errors + check.warnings):
            hint = "check the permissions of the files, and the disk"
            check.errors.append(make_fault(str(path), "unreadable_file", error.message, "readable files", hint))
    return Report(fingerprint, check.errors, check.warnings)


def require_labels(path: Path, mode: Mode) -> None:
    """Raise the first error that `validate` would report on labels, annotations, splits and sizes.

    This takes milliseconds, because the features are not read. Training detects values that are not finite itself.

    Raises:
        FaultError: The folder has such an error for training in `mode`.
    """
    errors = _label_errors(path, mode)
    if errors:
        more = f"; `cmran validate` lists {len(errors) - 1} more" if len(errors) > 1 else ""
        fault = errors[0]
        raise FaultError(path, replace(fault, hint=fault.hint + more))


def contradictions(path: Path) -> list[Fault]:
    """Return the faults of labels that contradict each other, which can make scores wrong.

    These are label files that disagree with each other or with the annotations, and videos with two categories.
    """
    return [fault for fault in _label_errors(path, "full") if fault.code in _CONTRADICTIONS | {"two_categories"}]


def _label_errors(path: Path, mode: Mode) -> list[Fault]:
    with _Check(path, mode, progress=False) as check:
        check.run(features=False)
    return check.errors


class _Check:
    """One pass over a folder, collecting faults."""

    def __init__(self, path: Path, mode: Mode, progress: bool) -> None:
        self.path, self.mode, self.progress = path, mode, progress
        self.errors: list[Fault] = []
        self.warnings: list[Fault] = []
        self.arrays: dict[FileSpec, StoredArray] = {}
        self.annotations: list[Annotation | None] = []
        # Rows whose labels were already reported as contradictory: each is reported once, not for each pair of files.
        self.contradictory: set[int] = set()
        self._open = contextlib.ExitStack()

    def __enter__(self) -> "_Check":
        return self

    def __exit__(self, *args: object) -> None:
        self._open.close()

    def run(self, *, features: bool) -> None:
        """Run all checks, each on the files that can be read. `features`: also scan the values of the features."""
        self._open_files()
        self._check_axes()
        sizes = self._check_sizes()
        if features:
            self._scan_features()
        numbers = {spec: self._check_one_hot(spec) for spec in self.arrays if spec.kind == "labels"}
        if (noisy := numbers.get(layout.LABELS_NOISY)) is not None:
            self._add_all(check_background(noisy))
        videos = self._check_events(numbers.get(layout.LABELS))
        self._check_video_labels(numbers.get(layout.MIL_LABELS), videos)
        self._check_annotations(numbers.get(layout.LABELS), numbers.get(layout.MIL_LABELS), sizes.get("T"))
        self._check_orders(sizes.get("N"))

    # Faults

    def _error(
        self, file: FileSpec | str, code: str, found: str, expected: str, hint: str, rows: Iterable[int] = ()
    ) -> None:
        self._add(make_fault(file, code, found, expected, hint, rows))

    def _warn(
        self, file: FileSpec | str, code: str, found: str, expected: str, hint: str, rows: Iterable[int] = ()
    ) -> None:
        self.warnings.append(make_fault(file, code, found, expected, hint, rows))

    def _add(self, fault: Fault) -> None:
        """Add an error, or a warning if full mode does not use the file."""
        weak_only = any(spec.name == fault.file and spec.weak_only for spec in layout.FILES)
        if self.mode == "full" and weak_only and fault.code not in _CONTRADICTIONS:
            note = "full mode does not use this file, weak mode rejects it"
            self.warnings.append(replace(fault, hint=f"{fault.hint} ({note})"))
        else:
            self.errors.append(fault)

    def _add_all(self, faults: Iterable[Fault]) -> None:
        for fault in faults:
            self._add(fault)

    # Files and sizes

    def _open_files(self) -> None:
        path = self.path / layout.ANNOTATIONS
        annotated = path_exists(path)
        if annotated:
            self.annotations, faults = parse_annotations(path)
            self.errors += faults
        else:
            expected = "the annotations of the AVE dataset"
            hint = "copy the file into the folder: without it video ids, and videos in two splits, are unknown"
            self._warn(layout.ANNOTATIONS, "missing_annotations", "no such file", expected, hint)
        for spec in layout.FILES:
            if path_exists(self.path / spec.name):
                self._open_file(spec)
            elif spec.weak_only and self.mode == "full":
                continue
            elif spec is layout.LABELS_NOISY:
                hint = "nothing to do: every background video is background"
                self._warn(spec, "derived_file", "no such file", "the labels of the background videos", hint)
            elif spec.derivable and annotated:
                hint = f"nothing to do: the labels are built from {layout.ANNOTATIONS}"
                self._warn(spec, "derived_file", "no such file", spec.content, hint)
            elif spec.derivable:
                self._add(missing_labels(spec))
            else:
                # open_array raises the fault.
                self._open_file(spec)

    def _open_file(self, spec: FileSpec) -> None:
        try:
            self.arrays[spec] = self._open.enter_context(open_array(self.path, spec))
        except FaultError as error:
            self._add(error.fault)

    def _check_axes(self) -> None:
        """Report files whose axes are in the wrong order, and exclude them from all other checks."""
        shapes = {spec: array.shape for spec, array in self.arrays.items() if spec.kind != "order"}
        for found in check_axes(shapes, len(self.annotations) or None):
            if found.certain:
                self._add(found.fault)
                del self.arrays[found.spec]
            else:
                self.warnings.append(found.fault)

    def _check_sizes(self) -> dict[str, int]:
        """Check the dimensions that files share. The size that most files have is taken as the right one."""
        sizes: dict[str, int] = {}
        for letter in ("N", "M", "T", "H", "W", "C", "A"):
            found = {
                spec.name: size
                for spec, array in self.arrays.items()
                for name, size in zip(spec.shape, array.shape, strict=True)
                if name == letter
            }
            if letter == "N" and self.annotations:
                found[layout.ANNOTATIONS] = len(self.annotations)
            if not found:
                continue
            # With equal counts, the first in the table of files.
            sizes[letter] = right = Counter(found.values()).most_common(1)[0][0]
            agreeing = [name for name, size in found.items() if size == right]
            shapes = {spec.name: array.shape for spec, array in self.arrays.items()}
            for name, size in found.items():
                if size != right:
                    self._add(size_fault(letter, name, size, right, agreeing, shape=shapes.get(name)))
        return sizes

    # Features

    def _scan_features(self) -> None:
        arrays = [array for spec, array in self.arrays.items() if spec.kind == "features"]
        total = sum(array.shape[0] * array.row_bytes for array in arrays)
        with (
            Progress(total, "scan features", "B", enabled=self.progress) as bar,
            ThreadPoolExecutor(min(THREADS, usable_cpus())) as pool,
        ):
            for array in arrays:
                self._report_features(array, _scan(array, pool, bar))

    def _report_features(self, array: StoredArray, scan: "_Scan") -> None:
        spec = array.spec
        self._add_all(scan.faults)
        # min and max propagate NaN, and infinities are extremes.
        bad = np.flatnonzero(scan.seen & ~(np.isfinite(scan.low) & np.isfinite(scan.high)))
        if bad.size:
            hint = "extract these rows again: one NaN turns every weight into NaN within one training step"
            found = f"{_first_non_finite(array, int(bad[0]))}; {count_text(bad, len(scan.low))}"
            self._error(spec, "not_finite", found, "finite numbers", hint, bad)
        finite = scan.seen.copy()
        finite[bad] = False
        large = np.flatnonzero(finite & (np.maximum(np.abs(scan.low), np.abs(scan.high)) > _FLOAT32_MAX))
        if large.size:
            worst = max(float(np.abs(scan.low[large]).max()), float(np.abs(scan.high[large]).max()))
            found = f"values up to {worst:.3g}; {count_text(large, len(scan.low))}"
            expected = f"at most {_FLOAT32_MAX:.3g}, the largest float32"
            self._error(spec, "not_finite", found, expected, "extract these rows again", large)
        zero = np.flatnonzero(finite & (scan.low == 0) & (scan.high == 0))
        if zero.size:
            code, cause = (
                ("zero_audio", "the video has no sound track, or the audio extractor failed silently")
                if "A" in spec.shape
                else ("zero_visual", "frames are missing, or the visual extractor failed silently")
            )
            found, hint = f"only zeros in {count_text(zero, len(scan.low))}", f"{cause}: check and extract them again"
            self._warn(spec, code, found, "a value above 0", hint, zero)
        negative = np.flatnonzero(finite & (scan.low < 0))
        if negative.size:
            found = f"values down to {scan.low[negative].min():.4g}; {count_text(negative, len(scan.low))}"
            hint = "the extractor seems to omit the last ReLU, which the published features include"
            self._warn(spec, "negative_features", found, "values >= 0", hint, negative)
        constant = np.flatnonzero(scan.channel_low == scan.channel_high)
        if constant.size and array.shape[0] * array.row_bytes > array.dtype.itemsize * array.shape[-1]:
            shown = ", ".join(f"{number} (= {scan.channel_low[number]:.4g})" for number in constant[:8])
            found = f"{constant.size} of {array.shape[-1]} dimensions constant over all rows: {shown}"
            more = " ..." if constant.size > 8 else ""
            hint = "they carry no information: check whether the extractor is the right one and works"
            self._warn(spec, "constant_features", found + more, "dimensions that vary", hint)

    # Labels

    def _check_one_hot(self, spec: FileSpec) -> NDArray[np.int64] | None:
        """Return label numbers, -1 for a label that is not one-hot; None if the file cannot be read."""
        try:
            numbers, faults = check_one_hot(spec, self.arrays[spec].read_all())
        except FaultError as error:
            self._add(error.fault)
            return None
        self._add_all(faults)
        return numbers

    def _check_events(self, labels: NDArray[np.int64] | None) -> NDArray[np.int64] | None:
        """Check that each video has one event. Return the category of each row, -1 if it has none or several."""
        if labels is None:
            return None
        spec = layout.LABELS
        readable: NDArray[np.bool_] = np.all(labels >= 0, axis=1)
        event = (labels != BACKGROUND) & readable[:, None]
        lowest = np.where(event, labels, len(LABELS)).min(axis=1)
        highest = np.where(event, labels, -1).max(axis=1)
        empty = readable & ~event.any(axis=1)
        two = np.flatnonzero(~empty & readable & (lowest != highest))
        if two.size:
            row = two[0]
            found = f"{LABELS[lowest[row]]!r} and {LABELS[highest[row]]!r} in row {row}; {count_text(two, len(labels))}"
            hint = f"correct these rows, or {REBUILD_LABELS}"
            rare = 2 * (labels == BACKGROUND).sum() < event.sum()
            if two.size > 1 and rare and (lowest[two] == 0).all():
                hint = f"the background seems to be column 0: move it with np.roll(array, -1, axis=-1); or {hint}"
            self._error(spec, "two_categories", found, "one category for each video besides background", hint, two)
        if empty.any():
            found = f"background in every segment of {count_text(np.flatnonzero(empty), len(labels))}"
            self._warn(spec, "empty_event", found, "an event in each video", _EMPTY_HINT, np.flatnonzero(empty))
        starts = (np.diff(event.astype(np.int8), axis=1, prepend=0) == 1).sum(axis=1)
        broken = np.flatnonzero((starts > 1) & (lowest == highest))
        if broken.size:
            found = f"events with a gap in {count_text(broken, len(labels))}"
            self._warn(spec, "broken_event", found, "consecutive event segments", "check these videos", broken)
        return np.where(readable & ~empty & (lowest == highest), highest, -1)

    def _check_video_labels(self, numbers: NDArray[np.int64] | None, videos: NDArray[np.int64] | None) -> None:
        if numbers is None:
            return
        spec = layout.MIL_LABELS
        background = np.flatnonzero(numbers == BACKGROUND)
        if background.size:
            found = f"background in {count_text(background, len(numbers))}"
            expected = "an event category, also for a video whose event is empty"
            self._error(spec, "wrong_label", found, expected, REBUILD_LABELS, background)
        if videos is None:
            return
        count = min(len(numbers), len(videos))
        video, segments = numbers[:count], videos[:count]
        wrong = np.flatnonzero((video >= 0) & (video != BACKGROUND) & (segments >= 0) & (video != segments))
        if wrong.size:
            self.contradictory.update(wrong.tolist())
            row = wrong[0]
            found = f"{LABELS[video[row]]!r} in row {row}; {count_text(wrong, count)}"
            expected = f"the category of the segments in {layout.LABELS.name}, {LABELS[segments[row]]!r}"
            hint = f"use label files of the same dataset{_shift_hint(video[:, None], segments[:, None], spec.name)}"
            self._error(spec, "labels_disagree", found, expected, hint, wrong)

    def _check_annotations(
        self, labels: NDArray[np.int64] | None, video_numbers: NDArray[np.int64] | None, segments: int | None
    ) -> None:
        lines = self.annotations
        if not lines:
            return
        if labels is not None:
            segments = labels.shape[1]
        if segments is not None and (fault := late_event(lines, segments)) is not None:
            self.errors.append(fault)
        empty = np.array([row for row, line in enumerate(lines) if line is not None and line.start == line.end])
        if labels is None and empty.size:
            found = f"an event that ends at its start in {count_text(empty, len(lines))}"
            self._warn(layout.ANNOTATIONS, "empty_event", found, "an event in each video", _EMPTY_HINT, empty)
        if labels is not None:
            numbers = np.full((len(lines), labels.shape[1]), -1)
            for row, line in enumerate(lines):
                if line is not None and line.end <= labels.shape[1]:
                    numbers[row] = BACKGROUND
                    numbers[row, line.start : line.end] = line.label
            self._compare_annotations(layout.LABELS, numbers, labels)
        if video_numbers is not None:
            categories = np.array([-1 if line is None else line.label for line in lines])
            self._compare_annotations(layout.MIL_LABELS, categories[:, None], video_numbers[:, None])

    def _compare_annotations(self, spec: FileSpec, lines: NDArray[np.int64], labels: NDArray[np.int64]) -> None:
        count = min(len(lines), len(labels))
        differ = np.flatnonzero(_differ(lines[:count], labels[:count]))
        wrong = np.array([row for row in differ.tolist() if row not in self.contradictory], np.int64)
        if not wrong.size:
            return
        self.contradictory.update(wrong.tolist())
        row = int(wrong[0])
        shift = _shift_hint(lines, labels, layout.ANNOTATIONS, spec.name)
        found = f"{_label_text(lines[row])} for row {row}; {count_text(wrong, count)}"
        expected = f"{_label_text(labels[row])}, as in {spec.name} [{spec.key}]"
        hint = f"use the Annotations.txt that the labels were built from{shift}"
        self._error(layout.ANNOTATIONS, "annotations_disagree", found, expected, hint, wrong)

    # Orders

    def _check_orders(self, videos: int | None) -> None:
        orders: dict[str, NDArray[np.int64]] = {}
        for split, spec in layout.ORDERS.items():
            if spec not in self.arrays:
                continue
            try:
                raw = self.arrays[spec].read_all()
            except FaultError as error:
                self._add(error.fault)
                continue
            rows, faults = check_order(spec, raw, videos)
            self._add_all(faults)
            orders[split] = np.unique(rows)
        for (one, first), (other, second) in itertools.combinations(orders.items(), 2):
            both = np.intersect1d(first, second)
            if both.size:
                found = f"{both.size} rows that {layout.ORDERS[one].name} also contains"
                hint = "keep each row in one split only: duplicates across splits (leakage) make scores unreliable"
                self._error(layout.ORDERS[other], "order_overlap", found, "rows of no other split", hint, both)
        if len(orders) < len(layout.ORDERS):
            return
        if videos is not None:
            rest = np.setdiff1d(np.arange(videos), np.concatenate(list(orders.values())))
            if rest.size:
                found = f"{rest.size} of {videos} rows in no split"
                hint = "add them to train_order.h5, unless they are omitted on purpose"
                self._warn(layout.TRAIN_ORDER, "uncovered_rows", found, "each row in one split", hint, rest)
        known = {split: order[order < len(self.annotations)].tolist() for split, order in orders.items()}
        for split, other in (("val", "train"), ("test", "train"), ("test", "val")):
            shared = cross_split_duplicates(self.annotations, known[split], known[other])
            if shared:
                found = f"{len(shared)} rows whose video is also in {other} under another category"
                hint = "also report the score without these rows"
                self._warn(layout.ORDERS[split], "shared_video", found, "videos of no other split", hint, shared)


class _Scan:
    """Result of one pass over a feature file: extremes of each row and of each channel (last dimension)."""

    def __init__(self, rows: int, channels: int) -> None:
        self.low = np.zeros(rows)
        self.high = np.zeros(rows)
        # False for rows that could not be read.
        self.seen = np.zeros(rows, bool)
        self.channel_low = np.full(channels, np.inf)
        self.channel_high = np.full(channels, -np.inf)
        self.faults: list[Fault] = []


def _scan(array: StoredArray, pool: ThreadPoolExecutor, bar: Progress) -> _Scan:
    """Read the whole array in blocks, several in parallel. Reading and comparing release the GIL."""
    rows, step = array.shape[0], array.block_rows(BLOCK_BYTES)
    result = _Scan(rows, array.shape[-1])
    local = threading.local()

    def extremes(start: int) -> tuple[int, NDArray[Any], NDArray[Any]] | Fault:
        if not hasattr(local, "buffer"):
            local.buffer = np.empty((min(step, rows), *array.shape[1:]), array.dtype)
        try:
            block = array.read_block(start, min(start + step, rows), local.buffer)
        except FaultError as error:
            return error.fault
        values = block.reshape(len(block), -1, array.shape[-1])
        return start, values.min(axis=1), values.max(axis=1)

    starts = range(0, rows, step)
    for start, found in zip(starts, _bounded_map(pool, extremes, starts), strict=True):
        stop = min(start + step, rows)
        bar.update((stop - start) * array.row_bytes)
        if isinstance(found, Fault):
            # A truncated file fails in every block after its end; only the first failure is reported.
            result.faults = result.faults or [found]
            continue
        _, low, high = found
        # Infinities and NaN are what this scan looks for, so NumPy's warnings are not needed.
        with np.errstate(invalid="ignore"):
            result.low[start:stop], result.high[start:stop] = low.min(axis=1), high.max(axis=1)
            result.channel_low = np.fmin(result.channel_low, np.fmin.reduce(low, axis=0))
            result.channel_high = np.fmax(result.channel_high, np.fmax.reduce(high, axis=0))
        result.seen[start:stop] = True
    return result


def _bounded_map(pool: ThreadPoolExecutor, work: Any, items: Sequence[int]) -> Iterator[Any]:
    """Like `pool.map`, but submit only a few items ahead, so that Ctrl-C does not wait for the whole file."""
    waiting: list[Any] = []
    for item in items:
        waiting.append(pool.submit(work, item))
        if len(waiting) > 2 * THREADS:
            yield waiting.pop(0).result()
    for future in waiting:
        yield future.result()


def _first_non_finite(array: StoredArray, row: int) -> str:
    values = array.read_block(row, row + 1)[0]
    bad = np.argwhere(~np.isfinite(values))
    first = bad[0].tolist()
    return f"{values[tuple(first)]} in row {row}, segment {first[0]}, index {tuple(first[1:])} ({len(bad)} in that row)"


def _label_text(numbers: NDArray[np.int64]) -> str:
    """Return `'Bark' in segments 2, 3, 4`, or only the label for an array of length 1."""
    if len(numbers) == 1:
        return repr(LABELS[numbers[0]])
    event = np.flatnonzero(numbers != BACKGROUND)
    if not event.size:
        return "background in every segment"
    names = " and ".join(repr(LABELS[number]) for number in np.unique(numbers[event]))
    return f"{names} in segments {', '.join(map(str, event))}"


def _differ(one: NDArray[np.int64], other: NDArray[np.int64]) -> NDArray[np.bool_]:
    """Return the rows (n,) in which two arrays (n, k) of label numbers differ. Rows with a -1 are skipped."""
    known: NDArray[np.bool_] = np.all((one >= 0) & (other >= 0), axis=1)
    return known & np.asarray(one != other).any(axis=1)


def _shift_hint(
    one: NDArray[np.int64], other: NDArray[np.int64], name: str, other_name: str = layout.LABELS.name
) -> str:
    """Return an addition to a hint if the arrays agree completely after a shift by one or two rows; otherwise ""."""
    for shift in (1, -1, 2, -2):
        ahead, behind = one[max(0, shift) :], other[max(0, -shift) :]
        count = min(len(ahead), len(behind))
        ahead, behind = ahead[:count], behind[:count]
        known = (ahead >= 0).all(axis=1) & (behind >= 0).all(axis=1)
        if known.sum() >= 2 and not _differ(ahead, behind).any():
            where = (
                f"row i + {shift} of {name} is row i of {other_name}"
                if shift > 0
                else (f"row i of {name} is row i + {-shift} of {other_name}")
            )
            return (
                f": the two are shifted by exactly {abs(shift)} ({where}), for example because a header line was"
                " counted as a video or the first line was lost"
            )
    return ""
