"""`startup`: the time of `cmran --help` beyond the start of Python, which is its floor."""

import subprocess
import sys
from collections.abc import Sequence

from benchmarks.report import ROOT, Row, finish, in_turn, median, parser, run_program, spread


def main(argv: Sequence[str] | None = None) -> int:
    """Run and report."""
    options = parser(__doc__ or "").parse_args(argv)
    measurements = in_turn(
        {"cmran": lambda: run("-m", "flows", "--help"), "python": lambda: run("-c", "pass")},
        1 if options.tiny else options.repeats,
    )
    python = median(measurements["python"])
    more = [total - python for total in measurements["cmran"]]
    row = Row(
        name="startup",
        value=median(more),
        unit="s",
        floor=python,
        target="< 0.7 s more",
        spread=spread(more),
    )
    return finish([row], options)


def run(*arguments: str) -> None:
    """Run one Python process."""
    subprocess.run([sys.executable, *arguments], cwd=ROOT, stdout=subprocess.DEVNULL, check=True)


if __name__ == "__main__":
    run_program(main)
