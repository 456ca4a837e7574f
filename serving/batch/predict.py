"""Run a batch job: read a data folder, predict its videos shard by shard, write the Parquet files and the manifest.

Shape letters: n videos, B videos per batch, T segments, K class logits.
"""

import collections
import contextlib
import datetime
import importlib.metadata
import logging
import platform
import time
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

import cmran
from cmran.config import Device
from cmran.data import layout
from cmran.data.dataset import FeatureFolder, open_folder
from cmran.data.faults import rows_text
from cmran.data.fingerprint import folder_fingerprint
from cmran.errors import ConfigError, DataError, ExportError
from cmran.utils.device import usable_cpus
from cmran.utils.files import file_lock, sha256_file
from cmran.utils.progress import Progress
from serving.batch.job import (
    EVENTS,
    FORMAT,
    LOCK,
    SEGMENTS,
    Job,
    Manifest,
    PredictSplit,
    begin_job,
    finish_job,
    job_files,
)
from serving.batch.reader import FeatureBatch, FeatureReader
from serving.batch.scores import Truth, read_optional
from serving.batch.shards import Results, Shards, join
from serving.batch.writer import write_parquet
from serving.session import CPU, CUDA, Session, SessionOutputs, open_session

SHARD_BATCHES = 4
"""Batches per shard. An interrupted job loses at most one shard."""
READERS = {CPU: 1, CUDA: 4}
"""Largest number of threads that read a batch; on the CPU the model needs the other cores."""
BATCHES_IN_PROGRESS = 2
"""Batches in the session at the same time: the next one uses the cores that the last micro-batches leave idle."""

_LIBRARIES = ("numpy", "h5py", "pyarrow")

_log = logging.getLogger(__name__)


def predict_folder(
    model_path: Path,
    data: Path,
    out: Path,
    *,
    split: PredictSplit = "test",
    device: Device = "auto",
    batch_size: int = 32,
    resume: bool = False,
    model_info: Mapping[str, Any] | None = None,
    threads: int | None = None,
    progress: bool = True,
) -> Manifest:
    """Predict the videos of a data folder with an exported model.

    Only visual_feature.h5 and audio_feature.h5 are required, and the order file of `split` unless it is "all". With
    labels (labels.h5 or Annotations.txt) the manifest contains metrics of each split. Any other file may be missing or
    damaged: a warning and a note in the manifest state the consequence. Memory does not grow with the folder, except
    for the predicted labels that the metrics need.

    The function writes three files to `out`. Their videos are in the order of the split file, or of the feature file
    for "all".

    segments.parquet, one line per segment:
        row int64; video_id string (null without Annotations.txt); segment int32, from 0; label int32, 28 is background;
        category string, the name of the label; event_probability float32, the sigmoid of the segment's event logit,
        above 0.5 if the label is not background; class_probability float32, the maximum of the softmax of the video's
        class logits: the probability of the class that the video's segments have, or would have if they contained an
        event. In weak mode that class can be background. It is the same for all segments of a video.
    events.parquet, one line per run of segments of one category:
        row int64; video_id string; category string; start_s, end_s float64, seconds from the start of the video;
        score float32, mean over the event's segments of event_probability x class_probability.
    manifest.json: see `Manifest`.

    Args:
        model_path: The ONNX file.
        data: The data folder.
        out: Folder of the results; created if missing.
        split: The videos to predict: "train", "val", "test" or "all".
        device: Where the model runs, see `serving.session.open_session`.
        batch_size: Videos per batch.
        resume: Continue the job that an interrupted command left in `out`, or start one if there is none. A complete
            job is not changed. The results are byte for byte those of an uninterrupted job.
        model_info: Further information on the model (name, version, digest, ...) for the manifest. A digest must be
            the SHA-256 of the file.
        threads: Number of CPU threads. `None`: as many as this process may use.
        progress: Whether to show a progress bar.

    Returns:
        The manifest.

    Raises:
        ExportError: The model is missing, damaged or not exported by this project; or its outputs are not finite.
        DataError: The data folder is damaged, does not fit the model, or has features that are not finite. The message
            names the rows, and finished shards are kept.
        ConfigError: `out` contains another job, or an argument is out of range.
        DeviceError: `device` is not available.
        BusyError: Another command works in `out`.
        StorageError: A file of the job is damaged or cannot be written.
    """
    if batch_size < 1:
        raise ConfigError(f"`batch_size`: expected 1 or more, found {batch_size}")
    with contextlib.ExitStack() as stack:
        folder = stack.enter_context(open_folder(data, need_labels=False))
        rows = np.arange(folder.videos) if split == "all" else folder.order(split)
        notes: list[str] = []
        annotated = read_optional(
            lambda: folder.annotations, "there are no video ids and no scores of the leak-free test subset", notes
        )
        video_ids = None if annotated is None else [line.video_id for line in annotated]
        truth = Truth.read(folder, split, rows, annotated is not None, notes)
        fingerprint = _fingerprint(folder, split, notes)
        digest = _checked_digest(model_path, model_info or {})
        session = open_session(model_path, device, threads=threads, purpose="throughput")
        _check_fits(session, folder)
        busy = f"{out}: another predict command is running there: wait for it, or choose another folder"
        stack.enter_context(file_lock(out / LOCK, busy=busy))
        present = job_files(out, resume)
        job = Job(
            format=FORMAT,
            model_digest=digest,
            fingerprint=fingerprint,
            split=split,
            rows=len(rows),
            batch_size=batch_size,
            shard_batches=SHARD_BATCHES,
            variant=session.metadata.variant,
            provider=session.provider,
            onnxruntime=session.runtime_version,
        )
        complete = begin_job(out, job, present)
        if complete is not None:
            finish_job(out)
            _log.info("%s: the job is already complete, there is nothing to do", out)
            return complete

        shards = Shards(out, job, rows)
        started = time.perf_counter()
        computed = _compute_missing(session, folder, shards, progress)
        seconds = time.perf_counter() - started
        events, results = write_parquet(out, shards, video_ids, session.metadata.categories, keep=truth is not None)
        manifest = Manifest(
            format=FORMAT,
            created=datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds"),
            job=job,
            model=_describe_model(session, model_path, digest, model_info),
            data={"path": str(data.resolve()), "fingerprint": fingerprint},
            device=device,
            provider=session.provider,
            variant=session.metadata.variant,
            split=split,
            rows=len(rows),
            segments=len(rows) * folder.segments,
            events=events,
            batch_size=batch_size,
            rows_resumed=len(rows) - computed,
            seconds=round(seconds, 3),
            videos_per_s=round(computed / seconds, 3) if computed else None,
            metrics=None if truth is None else truth.score(results),
            rows_in_no_split=None if truth is None else truth.rows_in_no_split,
            notes=tuple(notes),
            files={name: sha256_file(out / name) for name in (SEGMENTS, EVENTS)},
            versions={
                "cmran": cmran.__version__,
                "python": platform.python_version(),
                "onnxruntime": session.runtime_version,
                **{name: importlib.metadata.version(name) for name in _LIBRARIES},
            },
        )
        finish_job(out, manifest)
        return manifest


def _checked_digest(path: Path, info: Mapping[str, Any]) -> str:
    """SHA-256 of the model file; "" if it is missing, which `open_session` reports."""
    digest = sha256_file(path) if path.is_file() else ""
    if digest and info.get("digest", digest) != digest:
        raise ExportError(
            f"{path}: found content of SHA-256 {digest}, expected {info['digest']}: the file was changed or truncated",
            hint="fetch the model again",
        )
    return digest


def _check_fits(session: Session, folder: FeatureFolder) -> None:
    """Raise DataError, in one line, if the model expects other shapes than those of the folder."""
    model = session.metadata
    pairs = (
        (layout.VISUAL.name, "visual features", folder.visual_features, model.visual_features),
        (layout.AUDIO.name, "audio features", folder.audio_features, model.audio_features),
        (layout.VISUAL.name, "segments", folder.segments, model.segments),
        (layout.VISUAL.name, "grid", "{}x{}".format(*folder.grid), "{}x{}".format(*model.grid)),
    )
    mismatches = [
        f"{name}: found {found} {what}, expected {expected}"
        for name, what, found, expected in pairs
        if found != expected
    ]
    if mismatches:
        raise DataError(
            f"the model {session.path} does not fit the data {folder.path}: {'; '.join(mismatches)}",
            hint="choose a model that was trained on such features, or extract features like those of its training",
        )


def _fingerprint(folder: FeatureFolder, split: PredictSplit, notes: list[str]) -> str:
    """The fingerprint of the folder, or of the required files if another file cannot be read."""
    found = read_optional(lambda: folder.fingerprint, "the fingerprint covers the required files only", notes)
    if found is not None:
        return found
    orders = () if split == "all" else (layout.ORDERS[split].name,)
    return folder_fingerprint(folder.path, files=(layout.VISUAL.name, layout.AUDIO.name, *orders))


def _compute_missing(session: Session, folder: FeatureFolder, shards: Shards, progress: bool) -> int:
    """Compute and write every missing shard. Return the number of videos computed."""
    missing = [number for number in range(len(shards.rows)) if shards.read(number) is None]
    total = sum(len(shards.rows[number]) for number in missing)
    step = shards.batch_size
    batches = [
        shards.rows[number][start : start + step]
        for number in missing
        for start in range(0, len(shards.rows[number]), step)
    ]
    threads = min(READERS[session.provider], usable_cpus())
    with (
        FeatureReader(folder, batches, buffers=BATCHES_IN_PROGRESS + 1, threads=threads) as features,
        Progress(total, "predict", "videos", enabled=progress) as bar,
    ):
        results = _predict_batches(session, features, len(batches))
        for number in missing:
            done: list[Results] = []
            while sum(len(batch.rows) for batch in done) < len(shards.rows[number]):
                done.append(next(results))
                bar.update(len(done[-1].rows))
            shards.write(number, join(done))
    return total


def _predict_batches(session: Session, features: FeatureReader, batches: int) -> Iterator[Results]:
    """Yield the results of each batch, in order, while the session works on the next batches."""
    in_progress: collections.deque[tuple[FeatureBatch, Callable[[], SessionOutputs]]] = collections.deque()
    failure: BaseException | None = None
    started = 0
    while True:
        while failure is None and started < batches and len(in_progress) < BATCHES_IN_PROGRESS:
            try:
                batch = features.take()
            except Exception as error:
                # Raised after the batches in progress, so that their results are not lost.
                failure = error
            else:
                n = len(batch.rows)
                in_progress.append((batch, session.start(batch.visual[:n], batch.audio[:n])))
                started += 1
        if in_progress:
            batch, outputs = in_progress.popleft()
            results = _results(session, batch.rows, outputs())
            features.give_back(batch)
            yield results
        elif failure is not None:
            raise failure
        else:
            return


def _results(session: Session, rows: NDArray[np.int64], outputs: SessionOutputs) -> Results:
    event_logits = outputs.event_logits.astype(np.float64)
    class_logits = outputs.class_logits.astype(np.float64)
    finite = np.isfinite(event_logits).all(1) & np.isfinite(class_logits).all(1)
    if not finite.all():
        raise ExportError(
            f"{session.path}: the outputs of the model are not finite for {rows_text(rows[~finite].tolist())}",
            hint="check these features with `cmran validate`; if they are finite, the weights of the model are corrupt",
        )
    # Sigmoid and softmax in a form that cannot overflow: the argument of exp is never positive.
    decay = np.exp(-np.abs(event_logits))
    event_probability = np.where(event_logits >= 0, 1.0, decay) / (1.0 + decay)
    class_probability = 1.0 / np.exp(class_logits - class_logits.max(1, keepdims=True)).sum(1)
    return Results(
        rows,
        outputs.segments,
        event_probability.astype(np.float32),
        class_probability.astype(np.float32),
    )


def _describe_model(session: Session, path: Path, digest: str, info: Mapping[str, Any] | None) -> dict[str, Any]:
    """The model for the manifest: information of the registry, then of the file."""
    return {
        "name": None,
        "version": None,
        **(info or {}),
        "path": str(path.resolve()),
        "digest": digest,
        "mode": session.metadata.mode,
        "metadata": {key: value for key, value in session.all_metadata.items() if key != "categories"},
    }
