"""One fault of a data folder, in the form that the reader and the validator share."""

import itertools
from collections.abc import Iterable
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from cmran.data.layout import FileSpec
from cmran.errors import DataError

MAX_ROWS = 1000
"""Maximum number of rows that a fault lists; its `found` states the full count."""


@dataclass(frozen=True, kw_only=True)
class Fault:
    """What is wrong, where, what was expected and what to do. `str()` is one line."""

    code: str
    file: str
    key: str | None = None
    """Key of the HDF5 dataset, if the fault concerns one."""
    rows: list[int] = field(default_factory=list)
    """The first affected rows, in order, at most MAX_ROWS. Lines of Annotations.txt count as rows from 0."""
    found: str
    expected: str
    hint: str
    """What to do."""

    @property
    def description(self) -> str:
        """The fault in one line, without the hint."""
        key = f" [{self.key}]" if self.key else ""
        rows = f", {rows_text(self.rows)}" if self.rows else ""
        return f"{self.code}: {self.file}{key}{rows}: found {self.found}; expected {self.expected}"

    def to_dict(self) -> dict[str, Any]:
        """Return plain values, in the order of the report."""
        return asdict(self)

    def __str__(self) -> str:
        return f"{self.description}: {self.hint}"


class FaultError(DataError):
    """The first fault that stops the reader.

    Args:
        folder: The data folder.
        fault: The parts of the message, also available as `fault`.
    """

    def __init__(self, folder: Path, fault: Fault) -> None:
        super().__init__(f"{folder}: {fault.description}", hint=fault.hint)
        self.fault = fault


def make_fault(
    file: FileSpec | str, code: str, found: str, expected: str, hint: str, rows: Iterable[int] = ()
) -> Fault:
    """Return a fault of an HDF5 file, or of another file given by its name, with at most MAX_ROWS of `rows`."""
    name, key = (file, None) if isinstance(file, str) else (file.name, file.key)
    if code in ("missing_file", "derived_file"):
        key = None
    numbers = [int(row) for row in itertools.islice(rows, MAX_ROWS)]
    return Fault(code=code, file=name, key=key, rows=numbers, found=found, expected=expected, hint=hint)


def rows_text(rows: Iterable[int], most: int = 8) -> str:
    """Return `row 7`, `rows 7, 9` or `rows 1, 2, 3 ... (57 rows)`."""
    numbers = list(rows)
    if len(numbers) == 1:
        return f"row {numbers[0]}"
    text = ", ".join(map(str, numbers[:most]))
    if len(numbers) <= most:
        return f"rows {text}"
    count = f"{len(numbers)} rows" if len(numbers) < MAX_ROWS else f"{MAX_ROWS} rows or more"
    return f"rows {text} ... ({count})"
