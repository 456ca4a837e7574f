"""The Markdown tables of reports and documents."""

from collections.abc import Iterable, Sequence
from typing import Literal


def markdown_table(
    head: Sequence[object],
    rows: Iterable[Sequence[object]],
    *,
    align: Literal["left", "right"] = "left",
    digits: int | None = None,
) -> str:
    """Format a Markdown table, without a trailing newline.

    Args:
        head: Column titles.
        rows: One sequence of cells per row. None becomes "-"; pipes are escaped and line breaks become spaces.
        align: Alignment of all columns except the first, which is left-aligned. "right" suits numbers.
        digits: Digits after the decimal point of float cells; None formats them with `str`.
    """

    def cell(value: object) -> str:
        if value is None:
            return "-"
        text = str(value) if digits is None or not isinstance(value, float) else f"{value:.{digits}f}"
        return " ".join(text.splitlines()).replace("|", "\\|")

    rule = ["---", *(["---:" if align == "right" else "---"] * (len(head) - 1))]
    return "\n".join(f"| {' | '.join(map(cell, line))} |" for line in (head, rule, *rows))
