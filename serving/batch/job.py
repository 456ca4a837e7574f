"""The records of a batch job, and the rules of when a folder may be used and a job resumed.

A job writes `job.json` first and `manifest.json` last: a folder with a manifest holds complete results.
"""

import contextlib
import shutil
from pathlib import Path
from typing import Any, Literal

from cmran.config import Device, Frozen, SelectionSplit, Variant, parse
from cmran.errors import ConfigError, StorageError
from cmran.utils.files import read_json, remove_unfinished, sha256_file, write_json

PredictSplit = Literal["train", "val", "test", "all"]

FORMAT = 5
"""Version of the files of a job and of the computation of their values."""

SEGMENTS, EVENTS, MANIFEST = "segments.parquet", "events.parquet", "manifest.json"
LOCK, SHARDS = ".lock", "shards"
_JOB = "job.json"
_RESTART = "predict again into an empty folder"


class Job(Frozen):
    """Everything that decides the values of the results. A job can only be resumed with the same values."""

    format: int
    """`FORMAT` of the program that started the job."""
    model_digest: str
    """SHA-256 of the ONNX file."""
    fingerprint: str
    """Fingerprint of the data folder."""
    split: PredictSplit
    """The videos to predict."""
    rows: int
    """Number of videos to predict."""
    batch_size: int
    """Videos per batch."""
    shard_batches: int
    """Batches per shard."""
    variant: Variant = "float32"
    """Precision variant of the model."""
    provider: str
    """ONNX Runtime provider that computes."""
    onnxruntime: str
    """Version of ONNX Runtime; another one may round differently."""


class Manifest(Frozen):
    """The record of a complete job: `manifest.json`."""

    format: int
    """`FORMAT` of the program that wrote the manifest."""
    created: str
    """End of the job, ISO 8601 in UTC."""
    job: Job
    """The values that decide the results."""
    model: dict[str, Any]
    """Name, version and more if the caller knows them; path, digest and mode; metadata of the file (lineage)."""
    data: dict[str, Any]
    """Path and fingerprint of the data folder."""
    device: Device
    """The device that was requested."""
    provider: str
    """The provider that computed: "CPUExecutionProvider" or "CUDAExecutionProvider"."""
    variant: Variant = "float32"
    """Number format in which the model computed."""
    split: PredictSplit
    """The videos that were predicted."""
    rows: int
    """Number of videos; segments.parquet has T lines for each."""
    segments: int
    """Number of lines of segments.parquet."""
    events: int
    """Number of lines of events.parquet."""
    batch_size: int
    """Videos per batch."""
    rows_resumed: int
    """Videos whose results an interrupted command had left; the last command computed the others."""
    seconds: float
    """Time of the last command's inference: reading features, computing, writing shards."""
    videos_per_s: float | None
    """Speed of the last command's inference; `None` if there was nothing left to compute."""
    metrics: dict[str, dict[str, Any]] | None
    """`Evaluation.to_dict()` of each split, of probabilities as in the files; `None` without labels.

    "no_split" holds the videos that are in none of three known splits.
    """
    rows_in_no_split: int | None = None
    """Number of videos in none of the readable order files, if the split is "all"."""
    notes: tuple[str, ...] = ()
    """Results that are missing or unreliable, and the reasons."""
    files: dict[str, str]
    """SHA-256 of each Parquet file."""
    versions: dict[str, str]
    """Versions of Python and the libraries."""

    @property
    def selection_split(self) -> SelectionSplit:
        """The split on which the epoch of the model was selected, from the metadata of its file."""
        splits: dict[str, SelectionSplit] = {"val": "val", "test": "test"}
        return splits.get(self.model["metadata"].get("selection_split"), "unknown")


def known_job(out: Path) -> Job | None:
    """Return the job in the folder `out`, complete or interrupted; `None` without one.

    Raises:
        CmranError: Its file is damaged.
    """
    with contextlib.suppress(FileNotFoundError):
        return _read_manifest(out).job
    with contextlib.suppress(FileNotFoundError):
        return _read_job(out)
    return None


def job_files(out: Path, resume: bool) -> list[str]:
    """Return the names of the job files in `out`. Raises ConfigError if there are any and `resume` is false."""
    present = [name for name in (MANIFEST, _JOB, SHARDS, SEGMENTS, EVENTS) if (out / name).exists()]
    if present and not resume:
        raise ConfigError(
            f"{out}: found {', '.join(present)} of an earlier prediction",
            hint="choose another folder, or pass `resume=True`",
        )
    return present


def begin_job(out: Path, job: Job, present: list[str]) -> Manifest | None:
    """Prepare the folder `out` for a new or interrupted job.

    Args:
        out: The folder; this process has locked it.
        job: The job to start or resume.
        present: The names that `job_files` returned.

    Returns:
        The manifest if the job is already complete, else `None`.

    Raises:
        ConfigError: The folder holds another job.
        StorageError: A file of the job is damaged or missing.
    """
    remove_unfinished(out, MANIFEST, _JOB, SEGMENTS, EVENTS)
    if MANIFEST in present:
        manifest = _read_manifest(out)
        _check_same(out / MANIFEST, manifest.job, job)
        for name, digest in manifest.files.items():
            if not (out / name).is_file() or sha256_file(out / name) != digest:
                raise StorageError(f"{out / name}: missing or changed since {MANIFEST} was written", hint=_RESTART)
        return manifest
    if _JOB in present:
        _check_same(out / _JOB, _read_job(out), job)
    elif present:
        raise StorageError(
            f"{out}: found {', '.join(present)} without {_JOB}: there is no job to resume", hint="choose another folder"
        )
    else:
        write_json(out / _JOB, job.model_dump(mode="json"))
    return None


def finish_job(out: Path, manifest: Manifest | None = None) -> None:
    """Write the manifest, which completes the job, and remove the files that only an unfinished job needs."""
    if manifest is not None:
        write_json(out / MANIFEST, manifest.model_dump(mode="json"))
    (out / _JOB).unlink(missing_ok=True)
    shutil.rmtree(out / SHARDS, ignore_errors=True)


def _read_manifest(out: Path) -> Manifest:
    return parse(Manifest, read_json(out / MANIFEST, _RESTART), str(out / MANIFEST))


def _read_job(out: Path) -> Job:
    return parse(Job, read_json(out / _JOB, _RESTART), str(out / _JOB))


def _check_same(path: Path, found: Job, requested: Job) -> None:
    differences = [
        f"{key}: found {getattr(found, key)!r}, requested {getattr(requested, key)!r}"
        for key in Job.model_fields
        if getattr(found, key) != getattr(requested, key)
    ]
    if differences:
        raise ConfigError(
            f"{path}: belongs to another job: {'; '.join(differences)}",
            hint="resume with the same settings, or choose another folder",
        )
