"""Annotations.txt: its variants, bad lines, and the labels built from it."""

from pathlib import Path

import numpy as np
import pytest

from cmran.categories import BACKGROUND, CATEGORIES
from cmran.data.annotations import (
    Annotation,
    background_labels,
    cross_split_duplicates,
    parse_annotations,
    read_annotations,
    segment_labels,
    video_labels,
)
from cmran.errors import CmranError
from tests.helpers import read

BODY = "Church bell&-abc_DEF-12&good&0&10\nMale speech, man speaking&xyz&good&2&5\nFrying (food)&-1&good&4&4"
EXPECTED = [
    Annotation("Church bell", "-abc_DEF-12", "good", 0, 10),
    Annotation("Male speech, man speaking", "xyz", "good", 2, 5),
    Annotation("Frying (food)", "-1", "good", 4, 4),
]
HEADER = "Category&VideoID&Quality&StartTime&EndTime\n"


@pytest.mark.parametrize(
    "text",
    [
        BODY,
        BODY + "\n",
        BODY + "\n\n",
        HEADER + BODY,
        HEADER + BODY + "\n",
        (HEADER + BODY).replace("\n", "\r\n") + "\r\n",
        "\ufeff" + HEADER + BODY,
        "\ufeff" + BODY,
    ],
    ids=["bare", "newline", "blank-end", "header", "header-newline", "crlf", "bom-header", "bom"],
)
def test_all_variants_of_the_file_read_the_same(tmp_path: Path, text: str) -> None:
    path = tmp_path / "Annotations.txt"
    path.write_bytes(text.encode())
    assert read_annotations(path) == EXPECTED


@pytest.mark.parametrize(
    ("line", "rule"),
    [
        ("Church bell&id&good&0", "five fields"),
        ("Church bell&id&good&0&10&x", "five fields"),
        ("", "five fields"),
        ("Church Bell&id&good&0&10", "28 categories"),
        ("Background&id&good&0&10", "28 categories"),
        ("Church bell&&good&0&10", "video id"),
        ("Church bell&id&good&-1&10", "whole seconds"),
        ("Church bell&id&good&0.5&10", "whole seconds"),
        ("Church bell&id&good&1_0&20", "whole seconds"),
        ("Church bell&id&good&7&3", "not before the start"),
        ("Category&VideoID&Quality&StartTime&EndTime", "28 categories"),
    ],
)
def test_a_bad_line_is_reported_with_its_number(tmp_path: Path, line: str, rule: str) -> None:
    path = tmp_path / "Annotations.txt"
    path.write_text(HEADER + BODY + f"\n{line}\n" + BODY, encoding="utf-8")
    with pytest.raises(CmranError) as caught:
        read_annotations(path)
    message = str(caught.value)
    assert "line 5" in message
    assert "row 3" in message
    assert rule in message
    assert "\n" not in message
    rows, faults = parse_annotations(path)
    assert [row is None for row in rows] == [False] * 3 + [True] + [False] * 3
    assert [fault.rows for fault in faults] == [[3]]


def test_a_header_with_one_video_is_enough(tmp_path: Path) -> None:
    path = tmp_path / "Annotations.txt"
    path.write_text(HEADER + BODY.split("\n", 1)[0])
    assert read_annotations(path) == EXPECTED[:1]


@pytest.mark.parametrize("content", [b"", b"\n\n", HEADER.encode(), b"Church bell&\xff\xfe&good&0&1"])
def test_a_file_without_annotations_is_refused(tmp_path: Path, content: bytes) -> None:
    path = tmp_path / "Annotations.txt"
    path.write_bytes(content)
    with pytest.raises(CmranError, match=r"unreadable_file: Annotations\.txt"):
        read_annotations(path)


def test_a_missing_file_is_refused(tmp_path: Path) -> None:
    with pytest.raises(CmranError, match="No such file"):
        read_annotations(tmp_path / "Annotations.txt")


def test_unusual_line_separators_do_not_shift_the_rows(tmp_path: Path) -> None:
    path = tmp_path / "Annotations.txt"
    path.write_text("Church bell&a\x0cb\u2028c&good&0&10\nBark&d&good&0&1\n", encoding="utf-8")
    assert [line.category for line in read_annotations(path)] == ["Church bell", "Bark"]


def test_labels_are_built_from_the_annotations() -> None:
    labels = segment_labels(EXPECTED)
    assert labels.shape == (3, 10, 29)
    assert labels.dtype == np.float32
    assert (labels.sum(axis=2) == 1).all()
    speech = CATEGORIES.index("Male speech, man speaking")
    assert labels.argmax(axis=2).tolist() == [
        [0] * 10,
        [BACKGROUND] * 2 + [speech] * 3 + [BACKGROUND] * 5,
        [BACKGROUND] * 10,
    ]
    # An empty event still has a category.
    assert video_labels(EXPECTED).argmax(axis=1).tolist() == [0, speech, CATEGORIES.index("Frying (food)")]
    assert background_labels(3).tolist() == [[0.0] * 28 + [1.0]] * 3


def test_other_numbers_of_segments() -> None:
    assert segment_labels(EXPECTED[1:], segments=5).shape == (2, 5, 29)
    with pytest.raises(CmranError, match=r"row 0.*end of at most 5"):
        segment_labels(EXPECTED, segments=5)


def test_cross_split_duplicates_have_another_category() -> None:
    lines = [
        Annotation("Bark", "a", "good", 0, 1),
        Annotation("Cat", "a", "good", 0, 1),
        Annotation("Bark", "b", "good", 0, 1),
        Annotation("Bark", "b", "good", 4, 6),
        Annotation("Cat", "c", "good", 0, 1),
    ]
    assert cross_split_duplicates(lines, [1, 3, 4], [0, 2]) == [1]
    assert cross_split_duplicates([lines[0], None, *lines[2:]], [1, 3], [0, 2]) == []


def test_real_annotations_give_the_real_label_files(ave: Path) -> None:
    lines = read_annotations(ave / "Annotations.txt")
    assert len(lines) == 4143
    assert np.array_equal(segment_labels(lines), read(ave / "labels.h5"))
    assert np.array_equal(video_labels(lines), read(ave / "mil_labels.h5"))
    assert np.array_equal(background_labels(178), read(ave / "labels_noisy.h5"))
    assert sum(line.video_id.startswith("-") for line in lines) == 1030
    train, val, test = (read(ave / f"{split}_order.h5", "order").tolist() for split in ("train", "val", "test"))
    assert cross_split_duplicates(lines, test, train) == [339, 680, 785, 931, 1374, 2397, 4074, 4113]
    assert len(cross_split_duplicates(lines, val, train)) == 10
