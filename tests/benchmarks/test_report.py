import itertools
import platform

import pytest

from benchmarks.report import cpu, in_turn, median, spread, timed, versus


def test_measurements_alternate_and_the_warm_up_is_not_counted():
    order = []
    times = itertools.count(1)

    def timed() -> float:
        order.append("own")
        return float(next(times))

    found = in_turn({"own": timed, "wall": lambda: order.append("wall")}, 3, warm_up=1)
    assert order == ["own", "wall"] * 4
    assert found["own"] == [2.0, 3.0, 4.0]
    assert len(found["wall"]) == 3
    assert all(0 <= seconds < 1 for seconds in found["wall"])


def test_ratios_and_spread():
    row = versus("a", [1.0, 2.0, 3.0], [10.0, 9.0, 12.0], "b", target=">= 4x", published=[20.0])
    assert (row.value, row.against, row.baseline, row.ratio, row.spread) == (2.0, "b", 10.0, 5.0, 1.0)
    assert (row.floor, row.published) == (None, 10.0)
    assert versus("b", [1.1], [1.0], "c", target="<= 1.2x").ratio == pytest.approx(1.1)
    row = timed("c", [3.0, 2.0, 4.0], floor=1.5, published=[30.0], target="<= 1.5x", unit="ms", scale=1e3)
    assert (row.value, row.floor, row.ratio, row.against, row.published) == (3000.0, 1500.0, 2.0, "floor", 10.0)
    row = timed("d", [3.0])
    assert (row.floor, row.ratio, row.against, row.published) == (None, None, "", None)
    assert spread([1.0]) is None
    assert median([3.0, 1.0, 2.0]) == 2.0


X86 = """processor\t: 0
vendor_id\t: AuthenticAMD
cpu family\t: 26
model\t\t: 2
model name\t: AMD EPYC
flags\t\t: fpu avx2 avx512f avx512_bf16 avx512_vnni amx_tile

processor\t: 1
model name\t: another
"""
ARM = """processor\t: 0
Features\t: fp asimd asimddp bf16
CPU implementer\t: 0x41
CPU part\t: 0xd4f
"""


def test_processor_description(tmp_path):
    path = tmp_path / "cpuinfo"
    path.write_text(X86)
    assert cpu(path) == "AMD EPYC (family 26, model 2; avx2, avx512f, avx512_bf16, avx512_vnni)"
    path.write_text(ARM)
    assert cpu(path).endswith(" (implementer 0x41, part 0xd4f; asimddp, bf16)")
    # Without the file, the name that the system reports.
    assert cpu(tmp_path / "missing") == (platform.processor() or platform.machine())
