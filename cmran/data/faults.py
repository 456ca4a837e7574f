"""One fault of a data folder, in the words that reader and validator share."""

from collections.abc import Iterable
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from cmran.errors import DataError

MAX_ROWS = 1000
"""A fault lists at most so many row numbers; `found` tells how many there are."""


@dataclass(frozen=True, kw_only=True)
class Fault:
    """What is wrong, where, what was expected and what to do. `str()` is one line."""

    code: str
    file: str
    key: str | None = None
    # Key of the HDF5 data set, where the fault lies inside one.
    rows: list[int] = field(default_factory=list)
    # At most MAX_ROWS of the rows it touches, in order. Lines of Annotations.txt count as rows from 0.
    found: str
    expected: str
    hint: str

    def to_dict(self) -> dict[str, Any]:
        """Plain values, in the order of the report."""
        return asdict(self)

    def __str__(self) -> str:
        where = self.file + (f" [{self.key}]" if self.key else "")
        rows = f", {rows_text(self.rows)}" if self.rows else ""
        return f"{self.code}: {where}{rows}: found {self.found}; expected {self.expected}; {self.hint}"


class FaultError(DataError):
    """A fault that stops the reader. `fault` holds its parts."""

    def __init__(self, folder: Path, fault: Fault) -> None:
        super().__init__(f"{folder}: {fault}")
        self.fault = fault


def rows_text(rows: Iterable[int], most: int = 8) -> str:
    """`row 7`, `rows 7, 9` or `rows 1, 2, 3 ... (57 rows)`."""
    numbers = list(rows)
    if len(numbers) == 1:
        return f"row {numbers[0]}"
    text = ", ".join(map(str, numbers[:most]))
    if len(numbers) <= most:
        return f"rows {text}"
    count = f"{len(numbers)} rows" if len(numbers) < MAX_ROWS else f"{MAX_ROWS} rows or more"
    return f"rows {text} ... ({count})"
