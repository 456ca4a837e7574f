"""Corruptions of a valid folder (tests.helpers.make_folder), each with the faults that must be reported."""

import os
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import h5py
import numpy as np

from tests.helpers import read, write

Change = Callable[[Path], None]


@dataclass(frozen=True)
class Corruption:
    """`change` corrupts a folder. The report must then contain exactly these faults, as (code, file, key, rows)."""

    name: str
    change: Change
    errors: tuple[tuple[str, str, str | None, tuple[int, ...]], ...] = ()
    warnings: tuple[tuple[str, str, str | None, tuple[int, ...]], ...] = ()
    contains: tuple[str, ...] = ()
    """Words that the messages must contain."""
    mode: Any = "weak"


def edit(
    name: str, change: Callable[[np.ndarray], np.ndarray | None], key: str = "avadataset", **kwargs: Any
) -> Change:
    """Change the array of a file in place, or replace it by the array that `change` returns."""

    def apply(folder: Path) -> None:
        values = read(folder / name, key)
        changed = change(values)
        write(folder / name, values if changed is None else changed, key, **kwargs)

    return apply


def put(name: str, index: Any, value: Any, key: str = "avadataset") -> Change:
    def change(values: np.ndarray) -> None:
        values[index] = value

    return edit(name, change, key)


def lines(change: Callable[[list[str]], list[str]]) -> Change:
    def apply(folder: Path) -> None:
        path = folder / "Annotations.txt"
        path.write_text("\n".join(change(path.read_text(encoding="utf-8").splitlines())) + "\n", encoding="utf-8")

    return apply


def both(*changes: Change) -> Change:
    def apply(folder: Path) -> None:
        for change in changes:
            change(folder)

    return apply


def drop(*names: str) -> Change:
    def apply(folder: Path) -> None:
        for name in names:
            (folder / name).unlink()

    return apply


def truncate(name: str, share: float) -> Change:
    def apply(folder: Path) -> None:
        os.truncate(folder / name, int((folder / name).stat().st_size * share))

    return apply


def truncate_undetected(name: str) -> Change:
    """Truncate the data and correct the end of file in the superblock, so that HDF5 itself opens the file."""

    def apply(folder: Path) -> None:
        with h5py.File(folder / name, "r") as file:
            end = file["avadataset"].id.get_offset() + file["avadataset"].nbytes // 2
        os.truncate(folder / name, end)
        with (folder / name).open("r+b") as file:
            assert file.read(9)[8] == 0, "superblock of version 0"
            file.seek(40)
            file.write(end.to_bytes(8, "little"))

    return apply


def corrupt_chunk(name: str) -> Change:
    """Store the file in chunks with checksums, and flip a byte in the chunk of row 5."""

    def apply(folder: Path) -> None:
        values = read(folder / name)
        write(folder / name, values, chunks=(1, *values.shape[1:]), fletcher32=True)
        with h5py.File(folder / name, "r") as file:
            offset = file["avadataset"].id.get_chunk_info_by_coord((5, *[0] * (values.ndim - 1))).byte_offset
        with (folder / name).open("r+b") as file:
            file.seek(offset + 3)
            byte = file.read(1)
            file.seek(offset + 3)
            file.write(bytes([byte[0] ^ 0xFF]))

    return apply


def replace_key(name: str, key: str, new: str) -> Change:
    def apply(folder: Path) -> None:
        values = read(folder / name, key)
        write(folder / name, values, new)

    return apply


def group_as_key(folder: Path) -> None:
    with h5py.File(folder / "labels.h5", "w") as file:
        file.create_group("avadataset")["labels"] = np.zeros(3)


def text_as_features(folder: Path) -> None:
    write(folder / "audio_feature.h5", np.full((12, 4, 5), b"x", dtype="S1"))


def two_categories(values: np.ndarray) -> None:
    """Row 6 gets two categories."""
    values[6] = 0
    values[6, :2, 0] = 1
    values[6, 2:, 1] = 1


def row_to(category: int, row: int) -> Callable[[np.ndarray], None]:
    def change(values: np.ndarray) -> None:
        values[row] = np.eye(29)[category]

    return change


def share_video(folder: Path) -> None:
    """A test row gets the video id of a train row of another category."""
    numbers = read(folder / "mil_labels.h5").argmax(axis=1)
    row, other = 8, 11
    write(folder / "train_order.h5", [other, 0, 1, 2, 3, 4], "order")
    write(folder / "val_order.h5", [5, 6, 7], "order")
    write(folder / "test_order.h5", [row, 9, 10], "order")
    assert numbers[row] != numbers[other]

    def change(text: list[str]) -> list[str]:
        parts = text[row].split("&")
        parts[1] = text[other].split("&")[1]
        text[row] = "&".join(parts)
        return text

    lines(change)(folder)


def empty_row_2(folder: Path) -> None:
    """Row 2 gets an empty event in labels and annotations, like row 26 of the real data."""
    edit("labels.h5", row_to(28, 2))(folder)

    def change(text: list[str]) -> list[str]:
        text[2] = "&".join(text[2].split("&")[:3]) + "&0&0"
        return text

    lines(change)(folder)


def gap(folder: Path) -> None:
    values = read(folder / "labels.h5")
    category = values[7].argmax(axis=1).min()
    values[7] = 0
    values[7, [0, 3], category] = 1
    values[7, [1, 2], 28] = 1
    write(folder / "labels.h5", values)
    # An annotation cannot express a gap.
    drop("Annotations.txt")(folder)


V, A, L, M = "visual_feature.h5", "audio_feature.h5", "labels.h5", "mil_labels.h5"
VN, AN, LN = "visual_feature_noisy.h5", "audio_feature_noisy.h5", "labels_noisy.h5"
TRAIN, VAL, TEST, TXT = "train_order.h5", "val_order.h5", "test_order.h5", "Annotations.txt"
D = "avadataset"
NO_TXT = ("missing_annotations", TXT, None, ())


def elsewhere(kind: str) -> Change:
    """The maps are stored in another file, to which the file of the folder refers."""

    def apply(folder: Path) -> None:
        values, other = read(folder / V), folder.with_name("other.h5")
        write(other, values)
        with h5py.File(folder / V, "w") as file:
            if kind.startswith("link"):
                file[D] = h5py.ExternalLink(str(other), f"/{D}")
                # These values would be read at the offset that the array has in the other file.
                file["x"] = np.full_like(values, 7)
            elif kind == "virtual":
                layout = h5py.VirtualLayout(values.shape, values.dtype)
                layout[:] = h5py.VirtualSource(str(other), D, values.shape)
                file.create_virtual_dataset(D, layout)
            else:
                values.tofile(other)
                file.create_dataset(D, values.shape, values.dtype, external=[(str(other), 0, values.nbytes)])

        if kind == "link-gone":
            other.unlink()

    return apply


def named(path: Path, key: bytes) -> None:
    with h5py.File(path, "w") as file:
        file[key] = np.zeros(3)


def as_folder(path: Path) -> None:
    path.unlink()
    path.mkdir()


CORRUPTIONS: tuple[Corruption, ...] = (
    # Files
    Corruption("no-visual", drop(V), (("missing_file", V, None, ()),), contains=("no such file", "README")),
    Corruption("no-order", drop(TEST), (("missing_file", TEST, None, ()),)),
    Corruption("no-background", drop(AN), (("missing_file", AN, None, ()),)),
    Corruption(
        "no-labels-at-all",
        drop(L, M, LN, TXT),
        (("missing_file", L, None, ()), ("missing_file", M, None, ())),
        (NO_TXT, ("derived_file", LN, None, ())),
        contains=("neither this file nor Annotations.txt",),
    ),
    Corruption(
        "labels-to-build",
        drop(L, M, LN),
        warnings=(("derived_file", L, None, ()), ("derived_file", M, None, ()), ("derived_file", LN, None, ())),
        contains=("built from Annotations.txt",),
    ),
    Corruption(
        "web-page",
        lambda folder: (folder / V).write_bytes(b"<!DOCTYPE html><title>Quota exceeded</title>"),
        (("unreadable_file", V, D, ()),),
        contains=("not HDF5", "DOCTYPE", "again"),
    ),
    Corruption("empty-file", truncate(L, 0), (("unreadable_file", L, D, ()),), contains=("0 bytes",)),
    Corruption("truncated", truncate(V, 0.6), (("unreadable_file", V, D, ()),), contains=("truncated file",)),
    Corruption("truncated-in-header", truncate(A, 0.1), (("unreadable_file", A, D, ()),)),
    Corruption(
        "truncated-undetected",
        truncate_undetected(V),
        (("unreadable_file", V, D, ()),),
        contains=("damaged or truncated file", "bytes"),
    ),
    Corruption("corrupted-chunk", corrupt_chunk(V), (("unreadable_file", V, D, (0,)),)),
    Corruption(
        "folder-as-file", both(drop(VAL), lambda f: (f / VAL).mkdir()), (("unreadable_file", VAL, "order", ()),)
    ),
    # Keys, shapes, dtypes
    Corruption(
        "other-key",
        replace_key(V, D, "features"),
        (("missing_key", V, D, ()),),
        contains=("features", "'avadataset'"),
    ),
    Corruption("order-key", replace_key(VAL, "order", D), (("missing_key", VAL, "order", ()),)),
    Corruption("group-as-key", group_as_key, (("missing_key", L, D, ()),), contains=("a group",)),
    Corruption(
        "visual-without-grid",
        edit(V, lambda values: values.mean(axis=(2, 3))),
        (("wrong_shape", V, D, ()),),
        contains=("(12, 4, 6)", "(N, T, H, W, C)", "4143 x 10 x 7 x 7 x 512"),
    ),
    Corruption(
        "labels-28-wide",
        edit(L, lambda values: values[:, :, :28]),
        (("wrong_shape", L, D, ()),),
        contains=("(12, 4, 28)", "29"),
    ),
    Corruption("order-2d", edit(VAL, lambda values: values[:, None], "order"), (("wrong_shape", VAL, "order", ()),)),
    Corruption("scalar", lambda folder: write(folder / A, 3.0), (("wrong_shape", A, D, ()),), contains=("()",)),
    Corruption("no-channels", edit(V, lambda values: values[..., :0]), (("wrong_shape", V, D, ()),)),
    Corruption(
        "integer-features",
        edit(A, lambda values: (values * 100).astype(np.int32)),
        (("wrong_dtype", A, D, ()),),
        contains=("int32", "float64, float32 or float16"),
    ),
    Corruption("text-features", text_as_features, (("wrong_dtype", A, D, ()),)),
    Corruption("complex-labels", edit(M, lambda values: values.astype(complex)), (("wrong_dtype", M, D, ()),)),
    Corruption(
        "float-order", edit(TRAIN, lambda values: values.astype(float), "order"), (("wrong_dtype", TRAIN, "order", ()),)
    ),
    # Sizes that disagree
    Corruption(
        "audio-one-row-short",
        edit(A, lambda values: values[:-1]),
        (("row_count", A, D, ()),),
        contains=("11 rows", "12 rows", V),
    ),
    Corruption("labels-one-row-long", edit(L, lambda v: np.concatenate([v, v[:1]])), (("row_count", L, D, ()),)),
    Corruption(
        "background-rows", edit(LN, lambda values: values[:-1]), (("row_count", LN, D, ()),), contains=("2 rows",)
    ),
    Corruption(
        "annotation-line-lost", lines(lambda text: text[:-1]), (("row_count", TXT, None, ()),), contains=("11 lines",)
    ),
    Corruption(
        "audio-segments",
        edit(A, lambda values: np.concatenate([values, values[:, :1]], axis=1)),
        (("segments_disagree", A, D, ()),),
        contains=("5 segments", "4 segments"),
    ),
    Corruption(
        "background-channels",
        edit(VN, lambda values: values[..., :5]),
        (("wrong_shape", VN, D, ()),),
        contains=("C = 5", "C = 6"),
    ),
    # Values
    Corruption(
        "nan",
        put(V, (7, 2, 1, 0, 3), np.nan),
        (("not_finite", V, D, (7,)),),
        contains=("nan in row 7, segment 2, index (1, 0, 3)", "1 of 12 rows"),
    ),
    Corruption(
        "infinity", put(A, ([3, 9], 1, 4), -np.inf), (("not_finite", A, D, (3, 9)),), contains=("-inf in row 3",)
    ),
    Corruption(
        "too-large", put(V, (4, 0, 0, 0, 0), 1e300), (("not_finite", V, D, (4,)),), contains=("1e+300", "float32")
    ),
    Corruption(
        "nan-in-compressed",
        both(put(AN, (1, 0, 0), np.nan), edit(AN, lambda values: None, compression="gzip")),
        (("not_finite", AN, D, (1,)),),
    ),
    Corruption("nan-label", put(L, (5, 1), np.nan), (("not_finite", L, D, (5,)),)),
    Corruption(
        "soft-label",
        put(L, (5, 1), np.eye(29)[28] * 0.5 + np.eye(29)[1] * 0.5),
        (("not_one_hot", L, D, (5,)),),
        contains=("0.5 at 1, 0.5 at 28 in row 5, segment 1",),
    ),
    Corruption("no-label", put(M, [2, 4], 0), (("not_one_hot", M, D, (2, 4)),), contains=("only zeros in row 2",)),
    Corruption(
        "video-label",
        edit(M, row_to(9, 3)),
        (("labels_disagree", M, D, (3,)),),
        contains=("'Ukulele' in row 3", "labels.h5"),
    ),
    Corruption(
        "video-labels-off-by-one",
        edit(M, lambda values: np.roll(values, 1, axis=0)),
        (("labels_disagree", M, D, ...),),  # type: ignore[arg-type]
        contains=("shifted by exactly 1", "row i + 1 of mil_labels.h5 is row i of labels.h5"),
    ),
    Corruption(
        "video-label-background",
        both(edit(M, row_to(28, 3)), drop(TXT)),
        (("wrong_label", M, D, (3,)),),
        (NO_TXT,),
    ),
    Corruption(
        "background-with-category", edit(LN, row_to(4, 1)), (("wrong_label", LN, D, (1,)),), contains=("'Race car",)
    ),
    Corruption(
        "two-categories",
        both(edit(L, two_categories), drop(TXT)),
        (("two_categories", L, D, (6,)),),
        (NO_TXT,),
        contains=("'Church bell' and 'Male speech, man speaking' in row 6",),
    ),
    # Annotations
    Corruption(
        "annotation",
        lines(lambda text: [*text[:4], "Cat&x&good&0&1", *text[5:]]),
        (("annotations_disagree", TXT, None, (4,)),),
        contains=("'Cat' in segments 0 for row 4", "labels.h5"),
    ),
    Corruption(
        "category-of-an-empty-event",
        both(lambda f: empty_row_2(f), edit(M, row_to(9, 2))),
        (("annotations_disagree", TXT, None, (2,)),),
        (("empty_event", L, D, (2,)),),
        contains=("'Ukulele', as in mil_labels.h5",),
    ),
    Corruption(
        "annotations-off-by-one",
        lines(lambda text: ["Cat&header&good&0&1", *text[:-1]]),
        (("annotations_disagree", TXT, None, ...),),  # type: ignore[arg-type]
        contains=("shifted by exactly 1", "row i + 1 of Annotations.txt is row i of labels.h5", "header"),
    ),
    Corruption(
        "first-line-lost",
        lines(lambda text: text[1:]),
        (
            ("row_count", TXT, None, ()),
            ("annotations_disagree", TXT, None, ...),  # type: ignore[arg-type]
        ),
        contains=("row i of Annotations.txt is row i + 1 of labels.h5",),
    ),
    Corruption(
        "unknown-category",
        lines(lambda text: [*text[:3], "Dog&x&good&0&1", *text[4:]]),
        (("bad_annotations", TXT, None, (3,)),),
        contains=("line 4", "'Dog&x&good&0&1'", "28 categories"),
    ),
    Corruption(
        "late-event",
        lines(lambda text: [*text[:3], text[3].rsplit("&", 1)[0] + "&9", *text[4:]]),
        (("bad_annotations", TXT, None, (3,)),),
        contains=("at most 4",),
    ),
    Corruption(
        "binary-annotations", lambda f: (f / TXT).write_bytes(b"\xff\xfe\x00"), (("unreadable_file", TXT, None, ()),)
    ),
    # Orders
    Corruption(
        "order-out-of-range",
        edit(VAL, lambda values: np.array([*values, 12, -1]), "order"),
        (("order_out_of_range", VAL, "order", (-1, 12)),),
        contains=("12 at position 3", "from 0 to 11"),
    ),
    Corruption(
        "order-unsigned",
        edit(VAL, lambda values: np.array([*values, 2**64 - 1], np.uint64), "order"),
        (("order_out_of_range", VAL, "order", (2**64 - 1,)),),
    ),
    Corruption(
        "order-repeated",
        lambda folder: _orders(folder, [0, 1, 2, 3, 4, 5, 1], [6, 7, 8], [9, 10, 11]),
        (("order_repeated", TRAIN, "order", (1,)),),
        contains=("row 1 at positions 1, 6",),
    ),
    Corruption(
        "order-overlap",
        lambda folder: _orders(folder, [0, 1, 2, 3, 4, 5], [6, 7, 8], [9, 10, 11, 8, 3]),
        (("order_overlap", TEST, "order", (3,)), ("order_overlap", TEST, "order", (8,))),
        contains=("1 row", "train_order.h5 also contains", "val_order.h5 also contains"),
    ),
    Corruption(
        "empty-split",
        lambda folder: _orders(folder, [0, 1, 2, 3, 4, 5, 6, 7, 8], [], [9, 10, 11]),
        (("empty_split", VAL, "order", ()),),
    ),
    Corruption(
        "uncovered",
        lambda folder: _orders(folder, [0, 1, 2, 3, 4], [6, 7, 8], [9, 11]),
        warnings=(("uncovered_rows", TRAIN, "order", (5, 10)),),
        contains=("2 of 12 rows",),
    ),
    *(
        Corruption(
            f"data-elsewhere-{kind}",
            elsewhere(kind),
            (("data_elsewhere", V, D, ()),),
            contains=("reference to other files",),
        )
        for kind in ("link", "link-gone", "virtual", "raw")
    ),
    Corruption(
        "a-key-of-any-bytes",
        lambda folder: named(folder / V, b"\xff\xfe\n"),
        (("missing_key", V, D, ()),),
        contains=("the keys",),
    ),
    Corruption("labels-are-a-folder", lambda folder: as_folder(folder / L), (("unreadable_file", L, D, ()),)),
    # Warnings
    Corruption(
        "silent-audio",
        put(A, [1, 8], 0),
        warnings=(("zero_audio", A, D, (1, 8)),),
        contains=("2 of 12 rows", "sound track"),
    ),
    Corruption("black-video", put(VN, 2, 0), warnings=(("zero_visual", VN, D, (2,)),)),
    Corruption(
        "no-relu",
        put(V, (6, 1, 1, 1, 1), -0.5),
        warnings=(("negative_features", V, D, (6,)),),
        contains=("-0.5", "ReLU"),
    ),
    Corruption(
        "constant-dimensions",
        both(put(A, (..., 2), 0), put(A, (..., 4), 1.5)),
        warnings=(("constant_features", A, D, ()),),
        contains=("2 of 5 dimensions", "2 (= 0), 4 (= 1.5)"),
    ),
    Corruption("empty-event", empty_row_2, warnings=(("empty_event", L, D, (2,)),), contains=("1 of 12 rows",)),
    Corruption("event-with-a-gap", gap, warnings=(NO_TXT, ("broken_event", L, D, (7,)))),
    Corruption(
        "shared-video", share_video, warnings=(("shared_video", TEST, "order", (8,)),), contains=("1 row", "train")
    ),
    # Full mode and the files of weak mode
    Corruption("full-without-weak-files", drop(M, VN, AN, LN), mode="full"),
    Corruption(
        "full-with-a-bad-weak-file",
        both(truncate(VN, 0.5), put(AN, 1, np.nan), put(M, 4, 0)),
        warnings=(("unreadable_file", VN, D, ()), ("not_finite", AN, D, (1,)), ("not_one_hot", M, D, (4,))),
        contains=("full mode does not use this file",),
        mode="full",
    ),
    Corruption(
        "full-with-contradicting-labels",
        both(edit(M, row_to(9, 3)), drop(TXT)),
        (("labels_disagree", M, D, (3,)),),
        (NO_TXT,),
        mode="full",
    ),
)


def _orders(folder: Path, train: list[int], val: list[int], test: list[int]) -> None:
    for name, rows in ((TRAIN, train), (VAL, val), (TEST, test)):
        write(folder / name, np.array(rows, np.int64), "order")
