"""A study in a plain file: Optuna's journal, one entry a line, which a full disk or a crash can leave half of."""

import contextlib
import json
import logging
import os
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from optuna.storages import BaseStorage
from optuna.storages.journal import JournalFileBackend, JournalFileOpenLock, JournalStorage

from cmran.errors import CmranError
from cmran.utils.files import optional

log = logging.getLogger(__name__)


def open_journal(path: Path) -> BaseStorage:
    """The journal in the file `path`, which is made if missing. Raises CmranError for a file that is no journal.

    Half an entry at its end is removed, which is told.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    journal = _Journal(path)
    journal.check()
    return JournalStorage(journal)


class _Journal(JournalFileBackend):
    """Keeps to whole lines: behind half a line the next entry would be lost, too."""

    def __init__(self, path: Path) -> None:
        self._path, self._own_lock = path, JournalFileOpenLock(str(path))
        super().__init__(str(path), lock_obj=self._own_lock)

    def append_logs(self, logs: list[dict[str, Any]]) -> None:
        text = "".join(json.dumps(log, separators=(",", ":")) + "\n" for log in logs).encode()
        # Without a buffer, which would try again to write when the file is closed.
        with self._locked(), self._path.open("ab", buffering=0) as file:
            end = os.fstat(file.fileno()).st_size
            try:
                while text:
                    text = text[file.write(text) :]
                with optional():
                    os.fsync(file.fileno())
            except OSError:
                file.truncate(end)
                raise

    def check(self) -> None:
        """Raises CmranError where a line is no entry. Removes what a killed process has left behind the last one."""
        with self._locked(), self._path.open("r+b") as file:
            content = file.read()
            whole = content.rfind(b"\n") + 1
            lines = content[:whole].splitlines()
            if whole < len(content) and not lines and not content.startswith(b'{"op_code"'):
                # Somebody else's file, of one line.
                lines = [content]
            for number, line in enumerate(lines, 1):
                if not _is_entry(line):
                    raise CmranError(
                        f"{self._path}: line {number} is no entry of a study's journal: the file is damaged, or"
                        " another one: put a copy in its place, or name another file by CMRAN_STUDY_STORAGE"
                    )
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


def _is_entry(line: bytes) -> bool:
    try:
        found = json.loads(line)
    except (ValueError, RecursionError):
        return False
    return isinstance(found, dict) and "op_code" in found
