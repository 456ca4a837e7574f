"""The shards of a batch job: files that are written atomically, so that an interrupted job keeps its finished results.

A job divides its videos into shards. A resumed job computes only the shards that are missing or damaged, and the
Parquet files are written from all shards at the end. So the results do not depend on how often the job was interrupted.

Shape letters: n videos, T segments.
"""

import hashlib
import io
import logging
from collections.abc import Sequence
from pathlib import Path
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

from cmran.errors import StorageError
from cmran.utils.files import atomic_write
from serving.batch.job import SHARDS, Job

_log = logging.getLogger(__name__)


class Results(NamedTuple):
    """The results of some videos. The probabilities are those of segments.parquet."""

    rows: NDArray[np.int64]
    """(n,)."""
    segments: NDArray[np.int64]
    """(n, T) labels."""
    event_probability: NDArray[np.float32]
    """(n, T)."""
    class_probability: NDArray[np.float32]
    """(n,)."""


def join(results: Sequence[Results]) -> Results:
    """Concatenate results along the videos."""
    return Results(*(np.concatenate(arrays) for arrays in zip(*results, strict=True)))


class Shards:
    """The shard files of a job: each holds a SHA-256, followed by the arrays as NPZ.

    The SHA-256 covers the job and the number of the shard too. It detects a damaged shard, and one of another job or
    with another number.

    Args:
        out: Folder of the job.
        job: The job.
        rows: (n,) rows of the videos to predict.
    """

    def __init__(self, out: Path, job: Job, rows: NDArray[np.int64]) -> None:
        self.batch_size = job.batch_size
        self._folder = out / SHARDS
        self._seed = job.model_dump_json().encode()
        step = job.batch_size * job.shard_batches
        self.rows = [rows[start : start + step] for start in range(0, len(rows), step)]
        """The rows of each shard."""

    def write(self, number: int, results: Results) -> None:
        """Write a finished shard."""
        buffer = io.BytesIO()
        np.savez(buffer, **results._asdict())
        content = buffer.getvalue()
        with atomic_write(self._path(number)) as file:
            file.write(self._digest(number, content) + content)

    def read(self, number: int) -> Results | None:
        """Return a finished shard; `None` if it is missing or damaged. A damaged one is logged."""
        path = self._path(number)
        try:
            content = path.read_bytes()
        except FileNotFoundError:
            return None
        except OSError as error:
            raise StorageError(f"cannot read {path}: {error.strerror or error}") from error
        digest, content = content[:32], content[32:]
        if digest != self._digest(number, content):
            _log.warning("%s is damaged: its %d videos are computed again", path, len(self.rows[number]))
            return None
        with np.load(io.BytesIO(content), allow_pickle=False) as arrays:
            return Results(**{name: arrays[name] for name in Results._fields})

    def _path(self, number: int) -> Path:
        return self._folder / f"shard-{number:06d}.bin"

    def _digest(self, number: int, content: bytes) -> bytes:
        return hashlib.sha256(self._seed + number.to_bytes(8, "little") + content).digest()
