"""The order of the axes, judged by the sizes: rules that the reader and the validator share.

A transposed array often has a legal rank, and reads as a grid of 512 x 7 cells with 7 channels. These rules name the
likely order where the sizes prove it (a fault), and where they only suggest it (a suspicion, which is a warning).
"""

import itertools
from collections.abc import Mapping
from dataclasses import dataclass

from cmran.data import layout
from cmran.data.faults import Fault
from cmran.data.layout import FileSpec

POOLED_CHANNELS = 64
"""From so many channels on, a grid of one cell is taken for features that were averaged over the grid."""

Shape = tuple[int, ...]


@dataclass(frozen=True)
class Judgement:
    """What the sizes say of one file."""

    spec: FileSpec
    fault: Fault
    certain: bool
    """True: the array must not be used as it is. False: it is suspicious only."""


def judge_axes(shapes: Mapping[FileSpec, Shape], lines: int | None = None) -> list[Judgement]:
    """Files whose axes are, or seem to be, in another order than the format's.

    Args:
        shapes: Of the files that could be opened; each has the rank of its `FileSpec`.
        lines: Lines of Annotations.txt, one a video; None where it is absent or unreadable.
    """
    found: list[Judgement] = []
    known: dict[str, int] = {}
    _count_videos(shapes, lines, known)
    _judge_labels(shapes, known, found)
    first = (layout.AUDIO, layout.VISUAL)
    pairs = {shapes[spec][:2] for spec in first if spec in shapes}
    if len(pairs) == 1 and all(spec in shapes for spec in first) and next(iter(pairs))[0] == known.get("N"):
        # Two files against the labels: these are of another length, and no array is transposed.
        known["T"] = next(iter(pairs))[1]
    # Without labels the two feature files must agree: the one that can be turned to fit the other is wrong.
    if "T" not in known and all(spec in shapes for spec in first):
        turned = {
            spec: _transposed(spec, shapes[spec], dict(zip("NT", shapes[other][:2], strict=True)) | known)
            for spec, other in (first, first[::-1])
        }
        right = [spec for spec in first if turned[spec] is None]
        if len(right) == 1:
            known |= dict(zip("NT", shapes[right[0]][:2], strict=True))
    _judge_features(layout.VISUAL, shapes, known, found)
    _judge_features(layout.AUDIO, shapes, known, found)
    background = {letter: size for letter, size in known.items() if letter != "N"}
    if layout.LABELS_NOISY in shapes:
        background["M"] = shapes[layout.LABELS_NOISY][0]
    _judge_features(layout.VISUAL_NOISY, shapes, background, found)
    _judge_features(layout.AUDIO_NOISY, shapes, background, found)
    return found


def rank_hint(spec: FileSpec, shape: Shape | None) -> str:
    """How to convert an array whose rank or last axis is not that of `spec`; a general hint where that is unclear."""
    general = "write the array again with these dimensions in this order"
    if not shape or 0 in shape:
        return general
    if spec.kind == "order":
        flat = len(shape) == 2 and 1 in shape
        return "it has an axis too many: convert it with array.ravel()" if flat else general
    width = spec.shape[-1]
    if isinstance(width, int):
        return _label_hint(spec, shape, width) or general
    if len(shape) > len(spec.shape) and len(shape) - shape[1:].count(1) <= len(spec.shape):
        axis = shape.index(1, 1)
        return f"axis {axis} of length 1 is one too many: convert it with np.squeeze(array, {axis})"
    if "H" not in spec.shape:
        return general if len(shape) != 2 else "rows and segments seem to be one axis: reshape it to (N, T, A)"
    return _visual_hint(shape) or general


def _visual_hint(shape: Shape) -> str:
    channels = layout.VISUAL.published_shape[-1]
    if len(shape) == 4:
        sides = {axis: side for axis in (2, 3) if (side := _root(shape[axis])) is not None and side > 1}
        if sides:
            # Where both could be a grid, the channels are more.
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
        return "the maps seem to be averaged over the grid: extract them before the pooling, the network needs the grid"
    return ""


def _label_hint(spec: FileSpec, shape: Shape, width: int) -> str:
    if len(shape) == len(spec.shape) and shape.count(width) == 1:
        axis = shape.index(width)
        letters = list(spec.shape)
        order = ", ".join(map(str, [*letters[:axis], width, *letters[axis:-1]]))
        return f"the axes look like ({order}): convert it with np.moveaxis(array, {axis}, -1)"
    if len(shape) == len(spec.shape) and shape[-1] == width - 1:
        return f"the background has no column: label {width - 1} is background, and must be 1 where there is no event"
    if len(shape) == len(spec.shape) - 1:
        return f"these seem to be label numbers: convert them with np.eye({width})[array]"
    if len(shape) > len(spec.shape) and 1 in shape:
        axis = shape.index(1)
        return f"axis {axis} of length 1 is one too many: convert it with np.squeeze(array, {axis})"
    return ""


def _count_videos(shapes: Mapping[FileSpec, Shape], lines: int | None, known: dict[str, int]) -> None:
    """N by the files in which no axis can be mistaken for it, where they agree."""
    counts = {lines} if lines else set()
    if layout.MIL_LABELS in shapes:
        counts.add(shapes[layout.MIL_LABELS][0])
    labels = shapes.get(layout.LABELS, (0,))
    if len(counts) > 1 and labels[0] in counts:
        counts = {labels[0]}
    if len(counts) == 1:
        known["N"] = counts.pop()


def _judge_labels(shapes: Mapping[FileSpec, Shape], known: dict[str, int], found: list[Judgement]) -> None:
    shape = shapes.get(layout.LABELS)
    if shape is None:
        return
    order = _transposed(layout.LABELS, shape, {letter: known[letter] for letter in known})
    if order is not None:
        found.append(Judgement(layout.LABELS, _fault(layout.LABELS, shape, order), True))
        shape = tuple(shape[axis] for axis in order)
    known.setdefault("N", shape[0])
    known["T"] = shape[1]


def _judge_features(
    spec: FileSpec, shapes: Mapping[FileSpec, Shape], known: dict[str, int], found: list[Judgement]
) -> None:
    """Judge one feature file, and note its sizes for the files after it."""
    shape = shapes.get(spec)
    if shape is None:
        return
    order, certain = _transposed(spec, shape, known), True
    if order is None and "H" in spec.shape and not _contradicts(spec, shape, known):
        order, certain = _channels_elsewhere(shape)
    if order is not None:
        found.append(Judgement(spec, _fault(spec, shape, order), certain))
        if certain:
            shape = tuple(shape[axis] for axis in order)
    elif shape[2:4] == (1, 1) and shape[-1] >= POOLED_CHANNELS:
        found.append(Judgement(spec, _pooled(spec, shape), False))
    for letter, size in zip(spec.shape, shape, strict=True):
        known.setdefault(str(letter), size)


def _contradicts(spec: FileSpec, shape: Shape, known: Mapping[str, int]) -> bool:
    return any(known.get(str(letter), size) != size for letter, size in zip(spec.shape, shape, strict=True))


def _transposed(spec: FileSpec, shape: Shape, known: Mapping[str, int]) -> tuple[int, ...] | None:
    """The transposition that makes all known sizes fit, where they do not as it is; None where there is none.

    Of visual maps a transposition counts only where it does not take the array from a square grid to another one.
    """
    if not _contradicts(spec, shape, known):
        return None
    best: tuple[tuple[int, ...], tuple[int, ...]] | None = None
    for order in itertools.permutations(range(len(shape))):
        turned = tuple(shape[axis] for axis in order)
        if _contradicts(spec, turned, known) or (isinstance(spec.shape[-1], int) and turned[-1] != spec.shape[-1]):
            continue
        cost: tuple[int, ...] = (sum(axis > later for axis, later in itertools.combinations(order, 2)),)
        if "H" in spec.shape:
            square = turned[2] == turned[3]
            if not square and shape[2] == shape[3]:
                continue
            cost = (not square, turned[4] < max(turned[2:4]), *cost)
        if best is None or (cost, order) < best:
            best = cost, order
    return best[1] if best else None


def _channels_elsewhere(shape: Shape) -> tuple[tuple[int, ...] | None, bool]:
    """The transposition that brings the channels to the end, where the grid is not square and larger than the channels.

    It is certain where the other two sizes make a square grid, or where the grid is far beyond any that exists.
    """
    height, width, channels = shape[2:]
    side = max(height, width)
    if height == width or channels >= side:
        return None, False
    axis = 2 if height == side else 3
    rest = [size for place, size in enumerate(shape[2:], 2) if place != axis]
    certain = (rest[0] == rest[1] and side >= 2 * channels) or (side >= 64 and side >= 8 * channels)
    return (0, 1, *(place for place in (2, 3, 4) if place != axis), axis), certain


def _fault(spec: FileSpec, shape: Shape, order: tuple[int, ...]) -> Fault:
    letters = [""] * len(order)
    for letter, axis in zip(spec.shape, order, strict=True):
        letters[axis] = str(letter)
    found = f"the shape {shape}"
    if "H" in spec.shape:
        found += f", which reads as a grid of {shape[2]} x {shape[3]} with {shape[4]} channels"
    like = " x ".join(map(str, spec.published_shape))
    return Fault(
        code="axis_order",
        file=spec.name,
        key=spec.key,
        found=found,
        expected=f"({', '.join(map(str, spec.shape))}), as published {like}",
        hint=f"the axes look like ({', '.join(letters)}): convert the array with np.transpose(array, {order})",
    )


def _pooled(spec: FileSpec, shape: Shape) -> Fault:
    return Fault(
        code="axis_order",
        file=spec.name,
        key=spec.key,
        found=f"the shape {shape}, a grid of one cell with {shape[-1]} channels",
        expected="maps with a grid, as published 7 x 7",
        hint="the maps seem to be averaged over the grid: the spatial attention has nothing to choose from then",
    )


def _root(number: int) -> int | None:
    side = round(number**0.5)
    return side if side * side == number else None
