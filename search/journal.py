"""A study in a plain file: Optuna's journal, one entry a line, which a full disk or a crash can leave half of."""

import contextlib
import json
import logging
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from optuna.storages import BaseStorage
from optuna.storages.journal import JournalFileBackend, JournalFileOpenLock, JournalStorage

from cmran.errors import UserError

log = logging.getLogger(__name__)


def open_journal(path: Path) -> BaseStorage:
    """The journal in the file `path`, which is made if missing. Raises UserError for a file that is no journal.

    Half an entry at its end is removed, which is told.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    journal = _Journal(path)
    if path.exists():
        journal.end_in_a_whole_line()
        _check(path)
    return JournalStorage(journal)


class _Journal(JournalFileBackend):
    """Keeps to whole lines: behind half a line the next entry would be lost, too."""

    def __init__(self, path: Path) -> None:
        self._path, self._own_lock = path, JournalFileOpenLock(str(path))
        super().__init__(str(path), lock_obj=self._own_lock)

    def append_logs(self, logs: list[dict[str, Any]]) -> None:
        try:
            super().append_logs(logs)
        except OSError:
            self.end_in_a_whole_line()
            raise

    def end_in_a_whole_line(self) -> None:
        """Remove what stands behind the last line break. Nobody is writing then: entries are written under the lock."""
        with self._locked(), self._path.open("r+b") as file:
            content = file.read()
            whole = content.rfind(b"\n") + 1
            if whole < len(content):
                log.warning("%s: its last entry is cut off (a full disk, a crash): it is removed", self._path)
                file.truncate(whole)

    @contextlib.contextmanager
    def _locked(self) -> Iterator[None]:
        self._own_lock.acquire()
        try:
            yield
        finally:
            self._own_lock.release()


def _check(path: Path) -> None:
    with path.open("rb") as file:
        for number, line in enumerate(file, 1):
            try:
                good = isinstance(json.loads(line), dict)
            except (ValueError, RecursionError):
                good = False
            if not good:
                raise UserError(
                    f"{path}: line {number} is no entry of a study's journal: the file is damaged, or another one:"
                    " put a copy in its place, or name another file by CMRAN_STUDY_STORAGE"
                )
