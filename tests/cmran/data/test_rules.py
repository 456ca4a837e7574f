"""The rules that the validator and the reader share."""

import numpy as np

from cmran.data.layout import VAL_ORDER
from cmran.data.rules import check_order, is_one_hot


def test_one_hot_vectors() -> None:
    good = np.eye(3)
    assert is_one_hot(good).tolist() == [True] * 3
    assert is_one_hot(good.astype(np.int8)).all()
    assert is_one_hot(good.astype(bool)).all()
    assert is_one_hot(good + 1e-9).all()
    bad = np.array([[0, 0, 0], [1, 1, 0], [0.5, 0.5, 0], [1, -1, 1], [2, 0, 0], [np.nan, 1, 0], [np.inf, 0, 0]])
    assert not is_one_hot(bad).any()


def test_a_valid_order_keeps_the_order_of_the_file() -> None:
    rows, faults = check_order(VAL_ORDER, np.array([4, 0, 2], np.uint8), 5)
    assert rows.tolist() == [4, 0, 2]
    assert rows.dtype == np.int64
    assert faults == []


def test_a_row_beyond_int64_is_reported_even_if_the_number_of_videos_is_unknown() -> None:
    rows, faults = check_order(VAL_ORDER, np.array([4, 2**64 - 1], np.uint64), None)
    assert rows.tolist() == [4]
    assert [(fault.code, fault.rows) for fault in faults] == [("order_out_of_range", [2**64 - 1])]
