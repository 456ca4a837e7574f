"""The rules of the data contract, shared by the validator, which collects every fault, and the reader, which raises
the first.

The rules on axes use sizes only. A transposed array often has a legal rank: a file of shape (N, T, 512, 7, 7) also
reads as a grid of 512 x 7 cells with 7 channels. The rules name the likely order of the axes. It is a fault if no other
order fits the sizes, and a warning if the sizes only suggest it.
"""

import itertools
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from cmran.categories import BACKGROUND, LABELS
from cmran.data import layout
from cmran.data.faults import Fault, make_fault
from cmran.data.layout import FileSpec

REBUILD_LABELS = f"remove the file so that it is built from {layout.ANNOTATIONS}, or copy the file again"

POOLED_CHANNELS = 64
"""A grid of one cell with at least this many channels is taken for features that were averaged over the grid."""

Shape = tuple[int, ...]


@dataclass(frozen=True)
class AxisFault:
    """A file whose axes are, or seem to be, in the wrong order."""

    spec: FileSpec
    fault: Fault
    certain: bool
    """True: the array must not be used. False: the array is only suspicious."""


# --- labels, splits and sizes -----------------------------------------------------------------------------------------


def missing_labels(spec: FileSpec) -> Fault:
    """Return the fault of a label file that is missing and cannot be built."""
    return make_fault(
        spec,
        "missing_file",
        f"neither this file nor {layout.ANNOTATIONS}",
        f"one of the two ({spec.content})",
        f"copy {layout.ANNOTATIONS} of the AVE dataset into the folder: the labels are built from it",
    )


def size_fault(letter: str, name: str, size: int, expected: int, agreeing: Iterable[str], shape: Shape | None) -> Fault:
    """Return the fault of a file whose size disagrees with other files.

    Args:
        letter: Shape letter of the dimension.
        name: The file.
        size: Its size.
        expected: The size of the other files.
        agreeing: The files that have the expected size.
        shape: Shape of the file's array; None for Annotations.txt, whose size is its number of lines.
    """
    spec = next((spec for spec in layout.FILES if spec.name == name), None)
    unit = {"N": "rows", "M": "rows", "T": "segments"}.get(letter)

    def text(number: int, noun: str | None) -> str:
        return f"{number} {noun}" if noun else f"{letter} = {number}"

    shape_text = f" (shape {shape} for {spec.shape_text})" if spec else ""
    return make_fault(
        spec or name,
        {"N": "row_count", "M": "row_count", "T": "segments_disagree"}.get(letter, "wrong_shape"),
        f"{text(size, unit if spec else 'lines')}{shape_text}",
        f"{text(expected, unit)}, as in {', '.join(agreeing)}",
        "use files of the same extraction, or create this file again",
    )


def check_one_hot(spec: FileSpec, labels: NDArray[Any]) -> tuple[NDArray[np.int64], list[Fault]]:
    """Convert one-hot labels to label numbers.

    Args:
        spec: The label file.
        labels: (N, T, 29), (N, 29) or (M, 29), any real or integer dtype.

    Returns:
        Label numbers without the last axis, -1 for a label that is not one-hot; and the faults.
    """
    # Damaged numbers can be such that the conversion warns.
    with np.errstate(invalid="ignore"):
        labels = labels.astype(np.float64)
    faults = []
    finite = np.isfinite(labels).all(axis=-1)
    wrong = _rows_of(~finite)
    if wrong.size:
        found = f"NaN or infinity in {count_text(wrong, len(labels))}"
        faults.append(make_fault(spec, "not_finite", found, "one 1 and 28 zeros", REBUILD_LABELS, wrong))
    good = is_one_hot(labels)
    wrong = _rows_of(finite & ~good)
    if wrong.size:
        index = np.argwhere(finite & ~good)[0]
        values = labels[tuple(index)]
        shown = ", ".join(f"{values[at]:.4g} at {at}" for at in np.flatnonzero(values)[:4]) or "only zeros"
        segment = f", segment {index[1]}" if len(index) > 1 else ""
        found = f"{shown} in row {index[0]}{segment}; {count_text(wrong, len(labels))}"
        faults.append(make_fault(spec, "not_one_hot", found, "one 1 and 28 zeros", REBUILD_LABELS, wrong))
    numbers: NDArray[np.int64] = np.where(good, labels.argmax(axis=-1), -1)
    return numbers, faults


def is_one_hot(labels: NDArray[Any]) -> NDArray[np.bool_]:
    """Return which label vectors along the last axis are one 1 and zeros otherwise (to 1e-6; never with NaN)."""
    with np.errstate(invalid="ignore"):
        values = labels.astype(np.float64, copy=False)
    ones = np.abs(values - 1) <= 1e-6
    good: NDArray[np.bool_] = (ones.sum(axis=-1) == 1) & ((np.abs(values) <= 1e-6) | ones).all(axis=-1)
    return good


def check_background(numbers: NDArray[np.int64]) -> list[Fault]:
    """Check that every label (M,) of labels_noisy.h5 is background; -1 is skipped."""
    wrong = np.flatnonzero((numbers >= 0) & (numbers != BACKGROUND))
    if not wrong.size:
        return []
    found = f"{LABELS[numbers[wrong[0]]]!r} in row {wrong[0]}; {count_text(wrong, len(numbers))}"
    hint = "remove the file: a missing file is built"
    return [make_fault(layout.LABELS_NOISY, "wrong_label", found, "background in every row", hint, wrong)]


def check_order(spec: FileSpec, raw: NDArray[Any], videos: int | None) -> tuple[NDArray[np.int64], list[Fault]]:
    """Check the rows of one split.

    Args:
        spec: The order file.
        raw: Its row numbers, any integer dtype.
        videos: N; None if it is unknown.

    Returns:
        The rows that exist, in the order of the file; and the faults.
    """
    faults = []
    if not raw.size:
        hint = "use the order file of these features"
        faults.append(make_fault(spec, "empty_split", "no row", "at least one row", hint))
    # Compared before the conversion, because unsigned numbers may not fit into int64.
    outside: NDArray[np.bool_] = (raw < 0) | (raw >= (np.iinfo(np.int64).max if videos is None else videos))
    if outside.any():
        first = int(np.flatnonzero(outside)[0])
        found = f"{raw[first]} at position {first}; {int(outside.sum())} of {raw.size} positions"
        expected = f"rows from 0 to {videos - 1}" if videos is not None else "rows from 0"
        hint = "count rows from 0; use the order file that belongs to these features"
        faults.append(make_fault(spec, "order_out_of_range", found, expected, hint, np.unique(raw[outside])))
    rows: NDArray[np.int64] = raw[~outside].astype(np.int64)
    numbers, counts = np.unique(rows, return_counts=True)
    repeated = numbers[counts > 1]
    if repeated.size:
        positions = ", ".join(map(str, np.flatnonzero(raw == repeated[0]).tolist()[:4]))
        found = f"row {repeated[0]} at positions {positions}; {repeated.size} repeated rows"
        faults.append(make_fault(spec, "order_repeated", found, "each row once", "write each row once", repeated))
    return rows, faults


def count_text(rows: Sequence[int] | NDArray[np.integer[Any]], of: int) -> str:
    """Return `2 of 12 rows`."""
    return f"{len(rows)} of {of} row{'' if of == 1 else 's'}"


def _rows_of(mask: NDArray[np.bool_]) -> NDArray[np.int64]:
    """Return the rows with at least one True."""
    return np.flatnonzero(mask.reshape(len(mask), -1).any(axis=1))


# --- order of the axes ------------------------------------------------------------------------------------------------


def check_axes(shapes: Mapping[FileSpec, Shape], lines: int | None = None) -> list[AxisFault]:
    """Find the files whose axes are, or seem to be, in an order other than that of the format.

    Args:
        shapes: Shapes of the files that could be opened; each has the rank of its `FileSpec`.
        lines: Number of lines of Annotations.txt, one for each video; None if it is absent or unreadable.
    """
    found: list[AxisFault] = []
    known: dict[str, int] = {}
    _count_videos(shapes, lines, known)
    _check_label_axes(shapes, known, found)
    first = (layout.AUDIO, layout.VISUAL)
    pairs = {shapes[spec][:2] for spec in first if spec in shapes}
    if len(pairs) == 1 and all(spec in shapes for spec in first) and next(iter(pairs))[0] == known.get("N"):
        # Two files disagree with the labels: the labels have another length, and no array is transposed.
        known["T"] = next(iter(pairs))[1]
    # Without labels the two feature files must agree: the one that fits the other after a transposition is wrong.
    if "T" not in known and all(spec in shapes for spec in first):
        transposed = {
            spec: _transposed(spec, shapes[spec], dict(zip("NT", shapes[other][:2], strict=True)) | known)
            for spec, other in (first, first[::-1])
        }
        right = [spec for spec in first if transposed[spec] is None]
        if len(right) == 1:
            known |= dict(zip("NT", shapes[right[0]][:2], strict=True))
    _check_feature_axes(layout.VISUAL, shapes, known, found)
    _check_feature_axes(layout.AUDIO, shapes, known, found)
    background = {letter: size for letter, size in known.items() if letter != "N"}
    if layout.LABELS_NOISY in shapes:
        background["M"] = shapes[layout.LABELS_NOISY][0]
    _check_feature_axes(layout.VISUAL_NOISY, shapes, background, found)
    _check_feature_axes(layout.AUDIO_NOISY, shapes, background, found)
    return found


def rank_hint(spec: FileSpec, shape: Shape | None) -> str:
    """Return how to convert an array whose rank or last axis is wrong; a general hint if that is unclear."""
    general = "write the array again with these dimensions in this order"
    if not shape or 0 in shape:
        return general
    if spec.kind == "order":
        flat = len(shape) == 2 and 1 in shape
        return "the array has one axis too many: convert it with array.ravel()" if flat else general
    width = spec.shape[-1]
    if isinstance(width, int):
        return _label_hint(spec, shape, width) or general
    if len(shape) > len(spec.shape) and len(shape) - shape[1:].count(1) <= len(spec.shape):
        axis = shape.index(1, 1)
        return f"axis {axis} of length 1 is superfluous: convert it with np.squeeze(array, {axis})"
    if "H" not in spec.shape:
        merged = "rows and segments seem to be one axis: convert it with array.reshape(N, T, -1)"
        return merged if len(shape) == 2 else general
    return _visual_hint(shape) or general


def _visual_hint(shape: Shape) -> str:
    channels = layout.VISUAL.published_shape[-1]
    if len(shape) == 4:
        sides = {axis: side for axis in (2, 3) if (side := _root(shape[axis])) is not None and side > 1}
        if sides:
            # If both could be a grid, the larger one is the channels.
            axis = min(sides, key=lambda axis: shape[axis])
            grid = f"{sides[axis]}, {sides[axis]}, -1)"
            if axis == 2:
                return f"the grid seems to be flattened: convert it with array.reshape(N, T, {grid}"
            return f"the axes look like (N, T, C, H*W): convert it with np.moveaxis(array, 2, 3).reshape(N, T, {grid}"
        if shape[1] == shape[2]:
            return "rows and segments seem to be one axis: convert it with array.reshape(N, T, *array.shape[1:])"
    if len(shape) == 3:
        side = _root(shape[2] // channels) if shape[2] % channels == 0 else None
        if side is not None and side > 1:
            return (
                "grid and channels seem to be one axis: convert it with "
                f"array.reshape(N, T, {side}, {side}, {channels}) if the channels vary fastest"
            )
        return "the maps seem to be averaged over the grid: extract them before the pooling; the network needs the grid"
    return ""


def _label_hint(spec: FileSpec, shape: Shape, width: int) -> str:
    if len(shape) == len(spec.shape) and shape.count(width) == 1:
        axis = shape.index(width)
        letters = list(spec.shape)
        order = ", ".join(map(str, [*letters[:axis], width, *letters[axis:-1]]))
        return f"the axes look like ({order}): convert it with np.moveaxis(array, {axis}, -1)"
    if len(shape) == len(spec.shape) and shape[-1] == width - 1:
        return f"the background has no column: label {width - 1} is background and must be 1 where there is no event"
    if len(shape) == len(spec.shape) - 1:
        return f"these seem to be label numbers: convert them with np.eye({width})[array]"
    if len(shape) > len(spec.shape) and 1 in shape:
        axis = shape.index(1)
        return f"axis {axis} of length 1 is superfluous: convert it with np.squeeze(array, {axis})"
    return ""


def _count_videos(shapes: Mapping[FileSpec, Shape], lines: int | None, known: dict[str, int]) -> None:
    """Set N from the files in which no other axis can be mistaken for it, if they agree."""
    counts = {lines} if lines else set()
    if layout.MIL_LABELS in shapes:
        counts.add(shapes[layout.MIL_LABELS][0])
    labels = shapes.get(layout.LABELS, (0,))
    if len(counts) > 1 and labels[0] in counts:
        counts = {labels[0]}
    if len(counts) == 1:
        known["N"] = counts.pop()


def _check_label_axes(shapes: Mapping[FileSpec, Shape], known: dict[str, int], found: list[AxisFault]) -> None:
    shape = shapes.get(layout.LABELS)
    if shape is None:
        return
    order = _transposed(layout.LABELS, shape, known)
    if order is not None:
        found.append(AxisFault(layout.LABELS, _axis_fault(layout.LABELS, shape, order), True))
        shape = tuple(shape[axis] for axis in order)
    known.setdefault("N", shape[0])
    known["T"] = shape[1]


def _check_feature_axes(
    spec: FileSpec, shapes: Mapping[FileSpec, Shape], known: dict[str, int], found: list[AxisFault]
) -> None:
    """Check one feature file, and add its sizes to `known` for the next files."""
    shape = shapes.get(spec)
    if shape is None:
        return
    order, certain = _transposed(spec, shape, known), True
    if order is None and "H" in spec.shape and not _contradicts(spec, shape, known):
        order, certain = _channels_elsewhere(shape)
    if order is not None:
        found.append(AxisFault(spec, _axis_fault(spec, shape, order), certain))
        if certain:
            shape = tuple(shape[axis] for axis in order)
    elif shape[2:4] == (1, 1) and shape[-1] >= POOLED_CHANNELS:
        found.append(AxisFault(spec, _pooled(spec, shape), False))
    for letter, size in zip(spec.shape, shape, strict=True):
        known.setdefault(str(letter), size)


def _contradicts(spec: FileSpec, shape: Shape, known: Mapping[str, int]) -> bool:
    return any(known.get(str(letter), size) != size for letter, size in zip(spec.shape, shape, strict=True))


def _transposed(spec: FileSpec, shape: Shape, known: Mapping[str, int]) -> tuple[int, ...] | None:
    """Return the transposition that makes all known sizes fit; None if they fit already, or with no transposition.

    For visual maps, a transposition that turns a square grid into a grid that is not square does not count.
    """
    if not _contradicts(spec, shape, known):
        return None
    best: tuple[tuple[int, ...], tuple[int, ...]] | None = None
    for order in itertools.permutations(range(len(shape))):
        result = tuple(shape[axis] for axis in order)
        if _contradicts(spec, result, known) or (isinstance(spec.shape[-1], int) and result[-1] != spec.shape[-1]):
            continue
        cost: tuple[int, ...] = (sum(axis > later for axis, later in itertools.combinations(order, 2)),)
        if "H" in spec.shape:
            square = result[2] == result[3]
            if not square and shape[2] == shape[3]:
                continue
            cost = (not square, result[4] < max(result[2:4]), *cost)
        if best is None or (cost, order) < best:
            best = cost, order
    return best[1] if best else None


def _channels_elsewhere(shape: Shape) -> tuple[tuple[int, ...] | None, bool]:
    """Return the transposition that moves the channels to the end, if the grid is not square and exceeds the channels.

    It is certain if the other two sizes form a square grid, or if the grid is far larger than any grid in use.
    """
    height, width, channels = shape[2:]
    side = max(height, width)
    if height == width or channels >= side:
        return None, False
    axis = 2 if height == side else 3
    rest = [size for other, size in enumerate(shape[2:], 2) if other != axis]
    certain = (rest[0] == rest[1] and side >= 2 * channels) or (side >= 64 and side >= 8 * channels)
    return (0, 1, *(other for other in (2, 3, 4) if other != axis), axis), certain


def _axis_fault(spec: FileSpec, shape: Shape, order: tuple[int, ...]) -> Fault:
    letters = [""] * len(order)
    for letter, axis in zip(spec.shape, order, strict=True):
        letters[axis] = str(letter)
    found = f"the shape {shape}"
    if "H" in spec.shape:
        found += f", which reads as a grid of {shape[2]} x {shape[3]} with {shape[4]} channels"
    hint = f"the axes look like ({', '.join(letters)}): convert the array with np.transpose(array, {order})"
    return make_fault(spec, "axis_order", found, f"{spec.shape_text}, as published {spec.published_text}", hint)


def _pooled(spec: FileSpec, shape: Shape) -> Fault:
    return make_fault(
        spec,
        "axis_order",
        f"the shape {shape}, a grid of one cell with {shape[-1]} channels",
        "maps with a grid, as published 7 x 7",
        "the maps seem to be averaged over the grid: the spatial attention then has no effect",
    )


def _root(number: int) -> int | None:
    side = round(number**0.5)
    return side if side * side == number else None
