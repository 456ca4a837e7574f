import itertools

import pytest

from benchmarks.report import in_turn, median, spread, versus


def test_readings_are_taken_in_turn_and_the_first_round_is_left_out():
    order = []
    times = itertools.count(1)

    def timed() -> float:
        order.append("own")
        return float(next(times))

    found = in_turn({"own": timed, "wall": lambda: order.append("wall")}, 3, warm_up=1)
    assert order == ["own", "wall"] * 4
    assert found["own"] == [2.0, 3.0, 4.0]
    assert len(found["wall"]) == 3
    assert all(0 <= reading < 1 for reading in found["wall"])


def test_ratios_and_spread():
    row = versus("a", [1.0, 2.0, 3.0], [10.0, 9.0, 12.0], target=">= 4x", unit="ms", scale=1e3)
    assert (row.value, row.baseline, row.ratio, row.spread) == (2000.0, 10000.0, 5.0, 1.0)
    assert versus("b", [1.1], [1.0], target="<= 1.2x", faster=False).ratio == pytest.approx(1.1)
    assert spread([1.0]) is None
    assert median([3.0, 1.0, 2.0]) == 2.0
