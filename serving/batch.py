"""Batch inference: a data folder through an exported model into Parquet files, safe to kill at any moment.

A job cuts its videos into blocks. Each finished block is one file in OUT/parts, written atomically; a resumed job
computes only the blocks that are missing, and the Parquet files are made from all blocks at the end. So they do not
depend on how often the job was interrupted.

Shape letters: n videos, B videos a batch, T segments, K class logits.
"""

import collections
import contextlib
import datetime
import functools
import hashlib
import importlib.metadata
import io
import itertools
import logging
import platform
import queue
import shutil
import threading
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from types import TracebackType
from typing import Any, Literal, NamedTuple, Self, TypeVar

import numpy as np
from numpy.typing import NDArray

import cmran
from cmran.categories import LABELS
from cmran.config import Device, Frozen, SelectionSplit, Split, Variant, parse
from cmran.data import layout
from cmran.data.dataset import FeatureFolder, open_folder
from cmran.data.faults import rows_text
from cmran.data.fingerprint import folder_fingerprint
from cmran.data.validation import contradictions
from cmran.errors import CmranError
from cmran.evaluation.metrics import evaluate
from cmran.utils.device import usable_cpus
from cmran.utils.files import atomic_write, file_lock, path_exists, read_json, remove_unfinished, write_json
from cmran.utils.progress import Progress
from serving.events import events_of
from serving.session import CPU, CUDA, Session, SessionOutputs, open_session

PredictSplit = Literal["train", "val", "test", "all"]

FORMAT = 4
"""Version of the job's files, and of the way to their values."""
SHARD_BATCHES = 4
"""Batches a block: what a killed job loses at most."""
READERS = {CPU: 1, CUDA: 4}
"""Threads that read a batch together, at most; on the CPU all cores but one have the model to compute."""
ROW_GROUP_VIDEOS = 8192
"""Videos a row group of the Parquet files, and so what merging holds in memory."""
BATCHES_UNDER_WAY = 2
"""Batches given to the session at once: the next one begins where the first has work for some of the cores only."""

SEGMENTS, EVENTS, MANIFEST = "segments.parquet", "events.parquet", "manifest.json"
_JOB, _SHARDS, _LOCK = "job.json", "parts", ".lock"
_ANEW = "predict again into an empty folder"
_VERSIONS = ("numpy", "h5py", "pyarrow")

T = TypeVar("T")

_log = logging.getLogger(__name__)


class Job(Frozen):
    """All that decides the values of a job's results: a job goes on only under the same."""

    format: int
    model_digest: str
    # SHA-256 of the ONNX file.
    fingerprint: str
    # Of the data folder.
    split: PredictSplit
    rows: int
    batch_size: int
    shard_batches: int
    variant: Variant = "float32"
    provider: str
    onnxruntime: str
    # Another version may round otherwise.


class Manifest(Frozen):
    """What a finished job did: `manifest.json`. It is written last: where it is, the job is complete."""

    format: int
    created: str
    # When the job ended, ISO 8601 in UTC.
    job: Job
    model: dict[str, Any]
    # name, version and more where the caller knows them; path, digest, mode; the file's own metadata (lineage).
    data: dict[str, Any]
    # path, fingerprint.
    device: Device
    # As asked for.
    provider: str
    # What took the work: "CPUExecutionProvider" or "CUDAExecutionProvider".
    variant: Variant = "float32"
    # Number format that the model computed in.
    split: PredictSplit
    rows: int
    # Videos predicted; segments.parquet has T times as many lines.
    segments: int
    # Lines of segments.parquet.
    events: int
    # Lines of events.parquet.
    batch_size: int
    rows_resumed: int
    # Videos whose results an earlier, interrupted command had left; the others were computed by the last one.
    seconds: float
    # Of the last command's inference: reading, computing, writing of blocks.
    videos_per_s: float | None
    # Of the same; None where nothing was left to compute.
    metrics: dict[str, dict[str, Any]] | None
    # By split, also where there is one: Evaluation.to_dict(), of probabilities as in the files.
    # "no_split" holds the rows in none of three known splits; None without labels.
    rows_in_no_split: int | None = None
    # With split "all": rows in none of the order files that could be read.
    notes: tuple[str, ...] = ()
    # What was left out, and why; what the splits share.
    files: dict[str, str]
    # SHA-256 of each Parquet file.
    versions: dict[str, str]

    @property
    def selection_split(self) -> SelectionSplit:
        """The split that picked the model's epoch, as the model's file says; unknown where it does not."""
        splits: dict[str, SelectionSplit] = {"val": "val", "test": "test"}
        return splits.get(self.model["metadata"].get("selection_split"), "unknown")


class _Block(NamedTuple):
    """The results of some videos. The two probabilities are those of segments.parquet."""

    rows: NDArray[np.int64]
    """(n,)."""
    segments: NDArray[np.int64]
    """(n, T)."""
    event_probability: NDArray[np.float32]
    """(n, T)."""
    class_probability: NDArray[np.float32]
    """(n,)."""


class _Batch(NamedTuple):
    """The features of n videos, in buffers of B >= n that a longer batch may have filled before."""

    rows: NDArray[np.int64]
    """(n,)."""
    visual: NDArray[np.float32]
    """(B, T, H, W, C)."""
    audio: NDArray[np.float32]
    """(B, T, A)."""


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
    """Predict the videos of `data` with the exported model at `model_path` into the folder `out`.

    Only visual_feature.h5 and audio_feature.h5 are needed, and the split's order file unless `split` is "all". With
    labels (labels.h5 or Annotations.txt) the manifest holds metrics too, of each split by itself. Any other file may
    be missing or bad: a warning and a note in the manifest say what is left out. Memory does not grow with the folder,
    save for the predicted labels that the metrics need. `model_info`: what else is known of the model (name, version,
    digest, ...); it goes into the manifest, and a digest (SHA-256) must be the file's.

    Writes, with the videos in the order of the split file (of the feature file for "all"):

    segments.parquet, one line a segment:
        row int64; video_id string (null without Annotations.txt); segment int32, from 0; label int32, 28 is background;
        category string, the label's name; event_probability float32, sigmoid of the segment's event logit, above 0.5
        where the label is not background; class_probability float32, softmax of the video's class logits at their
        maximum: the probability of the class that the video's segments have or would have if they held an event (a
        model of weak mode can name background as that class). It is the same for all segments of a video.
    events.parquet, one line a run of segments of one category:
        row int64; video_id string; category string; start_s, end_s float64, seconds from the start of the video;
        score float32, mean over the event's segments of event_probability x class_probability.
    manifest.json: see `Manifest`.

    `resume` goes on with what a killed command left in `out` (and begins where there is nothing); a finished job is
    left as it is and its manifest returned. The results are byte for byte those of an undisturbed job.

    Raises CmranError, before the first row where it can be known: a model that does not fit the data, files of another
    job in `out`, another command at work in `out`, a feature that is not finite (the rows are named; finished blocks
    stay), and whatever `open_session` and `open_folder` raise.
    """
    if batch_size < 1:
        raise CmranError(f"batch size: expected 1 or more, found {batch_size}")
    with contextlib.ExitStack() as stack:
        folder = stack.enter_context(open_folder(data, need_labels=False))
        rows = np.arange(folder.videos) if split == "all" else folder.order(split)
        notes: list[str] = []
        annotated = _unless_bad(lambda: folder.annotations, "there are no video ids and no leak-free scores", notes)
        video_ids = None if annotated is None else [line.video_id for line in annotated]
        labels = _Labels.of(folder, split, rows, annotated is not None, notes)
        fingerprint = _fingerprint(folder, split, notes)
        digest = _file_digest(model_path) if model_path.is_file() else ""
        if digest and (model_info or {}).get("digest", digest) != digest:
            raise CmranError(
                f"{model_path}: found content of SHA-256 {digest}, expected {(model_info or {})['digest']}: "
                "the file was changed or cut: fetch the model again"
            )
        session = open_session(model_path, device, threads=threads, purpose="throughput")
        _check_fits(session, folder)
        busy = f"{out}: another predict command is at work there: wait for it, or choose another folder"
        stack.enter_context(file_lock(out / _LOCK, busy=busy))
        present = _present(out, resume)
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
        finished = _begin(out, job, present)
        if finished is not None:
            _clean_up(out)
            _log.warning("%s: the job is complete already, nothing is left to do", out)
            return finished

        parts = _Shards(out / _SHARDS, job, rows)
        started = time.perf_counter()
        computed = _compute_missing(session, folder, parts, progress)
        seconds = time.perf_counter() - started
        events, predicted = _merge(out, parts, video_ids, session.metadata.categories, keep=labels is not None)
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
            metrics=None if labels is None else labels.score(predicted),
            rows_in_no_split=None if labels is None else labels.rows_in_no_split,
            notes=tuple(notes),
            files={name: _file_digest(out / name) for name in (SEGMENTS, EVENTS)},
            versions={
                "cmran": cmran.__version__,
                "python": platform.python_version(),
                "onnxruntime": session.runtime_version,
                **{name: importlib.metadata.version(name) for name in _VERSIONS},
            },
        )
        write_json(out / MANIFEST, manifest.model_dump(mode="json"))
        _clean_up(out)
        return manifest


def _check_fits(session: Session, folder: FeatureFolder) -> None:
    """Refuse, in one line, a model made for other shapes than the folder's."""
    model = session.metadata
    pairs = (
        (layout.VISUAL.name, "visual features", folder.visual_features, model.visual_features),
        (layout.AUDIO.name, "audio features", folder.audio_features, model.audio_features),
        (layout.VISUAL.name, "segments", folder.segments, model.segments),
        (layout.VISUAL.name, "grid", _by(folder.grid), _by(model.grid)),
    )
    wrong = [
        f"{name}: found {found} {what}, expected {expected}"
        for name, what, found, expected in pairs
        if found != expected
    ]
    if wrong:
        raise CmranError(
            f"the model {session.path} does not fit the data {folder.path}: {'; '.join(wrong)}: "
            "take a model trained on such features, or features made like those it was trained on"
        )


def _by(grid: tuple[int, int]) -> str:
    return f"{grid[0]}x{grid[1]}"


def _present(out: Path, resume: bool) -> list[str]:
    """Files of a job in `out`. Raises CmranError where there are any and they are not to be gone on with."""
    present = [name for name in (MANIFEST, _JOB, _SHARDS, SEGMENTS, EVENTS) if (out / name).exists()]
    if present and not resume:
        raise CmranError(
            f"{out}: found {', '.join(present)} of an earlier prediction: choose another folder, "
            "or go on with it with --resume"
        )
    return present


def known_job(out: Path) -> Job | None:
    """The job that a command has left in `out`, complete or not; None where there is none. CmranError: damaged."""
    with contextlib.suppress(FileNotFoundError):
        return parse(Manifest, read_json(out / MANIFEST, _ANEW), str(out / MANIFEST)).job
    with contextlib.suppress(FileNotFoundError):
        return parse(Job, read_json(out / _JOB, _ANEW), str(out / _JOB))
    return None


def _begin(out: Path, job: Job, present: list[str]) -> Manifest | None:
    """Make the folder ready for `job`; the manifest where it is complete. Raises CmranError where it may not go on."""
    remove_unfinished(out, MANIFEST, _JOB, SEGMENTS, EVENTS)
    if MANIFEST in present:
        manifest = parse(Manifest, read_json(out / MANIFEST, _ANEW), str(out / MANIFEST))
        _check_same(out / MANIFEST, manifest.job, job)
        for name, digest in manifest.files.items():
            if not (out / name).is_file() or _file_digest(out / name) != digest:
                raise CmranError(
                    f"{out / name}: missing or changed since {MANIFEST} was written: predict again into an empty folder"
                )
        return manifest
    if _JOB in present:
        _check_same(out / _JOB, parse(Job, read_json(out / _JOB, _ANEW), str(out / _JOB)), job)
    elif present:
        raise CmranError(
            f"{out}: found {', '.join(present)} without {_JOB}, nothing to go on with: choose another folder"
        )
    else:
        write_json(out / _JOB, job.model_dump(mode="json"))
    return None


def _check_same(path: Path, found: Job, asked: Job) -> None:
    differences = [
        f"{key} {getattr(found, key)!r} there, {getattr(asked, key)!r} asked for"
        for key in Job.model_fields
        if getattr(found, key) != getattr(asked, key)
    ]
    if differences:
        raise CmranError(
            f"{path}: of another job: {'; '.join(differences)}: resume with the same settings, or choose another folder"
        )


def _clean_up(out: Path) -> None:
    """Remove what only an unfinished job needs."""
    (out / _JOB).unlink(missing_ok=True)
    shutil.rmtree(out / _SHARDS, ignore_errors=True)


class _Shards:
    """The finished blocks of a job, one file each: a SHA-256, then the arrays it was made of.

    The job and the number of the block go into the SHA-256: a part that is damaged, or of another job or place, is
    found out.
    """

    def __init__(self, folder: Path, job: Job, rows: NDArray[np.int64]) -> None:
        self.batch_size = job.batch_size
        self._folder = folder
        self._seed = job.model_dump_json().encode()
        step = job.batch_size * job.shard_batches
        self.blocks = [rows[start : start + step] for start in range(0, len(rows), step)]
        """The rows of each block."""

    def write(self, number: int, block: _Block) -> None:
        """Keep a finished block."""
        buffer = io.BytesIO()
        np.savez(buffer, **block._asdict())
        content = buffer.getvalue()
        with atomic_write(self._path(number)) as file:
            file.write(self._digest(number, content) + content)

    def read(self, number: int) -> _Block | None:
        """A finished block, None where there is none or a damaged one (which is logged)."""
        path = self._path(number)
        try:
            content = path.read_bytes()
        except FileNotFoundError:
            return None
        except OSError as error:
            raise CmranError(f"cannot read {path}: {error.strerror or error}") from error
        digest, content = content[:32], content[32:]
        if digest != self._digest(number, content):
            _log.warning("%s is damaged: its %d videos are computed again", path, len(self.blocks[number]))
            return None
        with np.load(io.BytesIO(content), allow_pickle=False) as arrays:
            return _Block(**{name: arrays[name] for name in _Block._fields})

    def _path(self, number: int) -> Path:
        return self._folder / f"part-{number:06d}.bin"

    def _digest(self, number: int, content: bytes) -> bytes:
        return hashlib.sha256(self._seed + number.to_bytes(8, "little") + content).digest()


def _compute_missing(session: Session, folder: FeatureFolder, parts: _Shards, progress: bool) -> int:
    """Compute and keep every block that is not there yet; the number of videos computed."""
    missing = [number for number in range(len(parts.blocks)) if parts.read(number) is None]
    total = sum(len(parts.blocks[number]) for number in missing)
    step = parts.batch_size
    batches = [
        parts.blocks[number][start : start + step]
        for number in missing
        for start in range(0, len(parts.blocks[number]), step)
    ]
    with (
        _ReadAhead(folder, batches, min(READERS[session.provider], usable_cpus())) as features,
        Progress(total, "predict", "videos", enabled=progress) as bar,
    ):
        results = _predicted(session, features, len(batches))
        for number in missing:
            done: list[_Block] = []
            while sum(len(block.rows) for block in done) < len(parts.blocks[number]):
                done.append(next(results))
                bar.update(len(done[-1].rows))
            parts.write(number, _join(done))
    return total


def _predicted(session: Session, features: "_ReadAhead", batches: int) -> Iterator[_Block]:
    """The results of each batch, in order; the next ones are under way meanwhile."""
    under_way: collections.deque[tuple[_Batch, Callable[[], SessionOutputs]]] = collections.deque()
    failure: BaseException | None = None
    started = 0
    while True:
        while failure is None and started < batches and len(under_way) < BATCHES_UNDER_WAY:
            try:
                batch = features.take()
            except Exception as error:
                # What was begun before is finished and kept first.
                failure = error
            else:
                n = len(batch.rows)
                under_way.append((batch, session.start(batch.visual[:n], batch.audio[:n])))
                started += 1
        if under_way:
            batch, outputs = under_way.popleft()
            block = _block(session, batch.rows, outputs())
            features.give_back(batch)
            yield block
        elif failure is not None:
            raise failure
        else:
            return


def _block(session: Session, rows: NDArray[np.int64], outputs: SessionOutputs) -> _Block:
    event_logits = outputs.event_logits.astype(np.float64)
    class_logits = outputs.class_logits.astype(np.float64)
    sound = np.isfinite(event_logits).all(1) & np.isfinite(class_logits).all(1)
    if not sound.all():
        raise CmranError(
            f"{session.path}: the model's outputs are not finite for {rows_text(rows[~sound].tolist())}: "
            "look at these features with `cmran validate`; if they are sound, the model is not"
        )
    # Written so that neither overflows: exp of what is never positive.
    decay = np.exp(-np.abs(event_logits))
    event_probability = np.where(event_logits >= 0, 1.0, decay) / (1.0 + decay)
    class_probability = 1.0 / np.exp(class_logits - class_logits.max(1, keepdims=True)).sum(1)
    return _Block(
        rows,
        outputs.segments,
        event_probability.astype(np.float32),
        class_probability.astype(np.float32),
    )


def _join(blocks: Sequence[_Block]) -> _Block:
    return _Block(*(np.concatenate(arrays) for arrays in zip(*blocks, strict=True)))


class _ReadAhead:
    """Reads the features of batch after batch in threads of its own while others are computed.

    Three buffers are used in turn: one is read into while two are computed. What goes wrong in the thread is raised by
    `take`. A context manager: the thread ends with it.
    """

    def __init__(self, folder: FeatureFolder, batches: Sequence[NDArray[np.int64]], readers: int = 1) -> None:
        longest = max(map(len, batches), default=0)
        self._folder, self._batches = folder, batches
        self._readers = ThreadPoolExecutor(readers, "cmran-read")
        self._part = max(1, -(-longest // readers))
        self._free: queue.SimpleQueue[_Batch | None] = queue.SimpleQueue()
        self._ready: queue.SimpleQueue[_Batch | BaseException] = queue.SimpleQueue()
        shape = (longest, folder.segments)
        for _ in range(min(len(batches), BATCHES_UNDER_WAY + 1)):
            visual = np.zeros((*shape, *folder.grid, folder.visual_features), np.float32)
            audio = np.zeros((*shape, folder.audio_features), np.float32)
            self._free.put(_Batch(np.empty(0, np.int64), visual, audio))
        self._stop = threading.Event()
        self._thread = threading.Thread(target=self._work, name="cmran-read-ahead", daemon=True)

    def __enter__(self) -> Self:
        self._thread.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._stop.set()
        # The thread may be waiting for a buffer.
        self._free.put(None)
        self._thread.join()
        self._readers.shutdown()

    def take(self) -> "_Batch":
        """The next batch, in order. Its arrays hold until they are given back."""
        item = self._ready.get()
        if isinstance(item, BaseException):
            raise item
        return item

    def give_back(self, batch: "_Batch") -> None:
        """Let the arrays of a batch be used again."""
        self._free.put(batch)

    def _work(self) -> None:
        try:
            passed = self._folder.visual_file.sweep() if self._is_one_pass() else None
            for rows in self._batches:
                batch = self._free.get()
                if batch is None or self._stop.is_set():
                    return
                batch = batch._replace(rows=rows)
                self._fill(batch)
                if passed is not None:
                    passed(int(rows[0]), int(rows[-1]) + 1)
                self._ready.put(batch)
        except BaseException as error:
            self._ready.put(error)

    def _is_one_pass(self) -> bool:
        """Whether the rows follow each other through the file; what an earlier command has done is passed over."""
        if not self._batches:
            return False
        rows = np.concatenate(self._batches)
        return bool((np.diff(rows) > 0).all()) and int(rows[-1] - rows[0]) < 2 * len(rows)

    def _fill(self, batch: _Batch) -> None:
        n = len(batch.rows)
        parts = [slice(start, min(start + self._part, n)) for start in range(0, n, self._part)]
        sound = list(self._readers.map(lambda part: _read_part(self._folder, batch, part), parts))
        if not all(sound):
            # A network with ReLU can swallow a NaN: so the features are looked at, not the outputs.
            self._folder.check_finite(batch.rows)


def _read_part(folder: FeatureFolder, batch: _Batch, part: slice) -> bool:
    """Read some of the batch's features into its buffers; whether they are surely finite."""
    rows, visual, audio = batch.rows[part], batch.visual[part], batch.audio[part]
    # A float64 feature beyond float32 becomes infinite, and is refused.
    with np.errstate(over="ignore", invalid="ignore"):
        folder.read_visual(rows, out=visual)
        folder.read_audio(rows, out=audio)
        # The sum is the quick look.
        return bool(np.isfinite(visual.sum()) and np.isfinite(audio.sum()))


def _merge(
    out: Path, parts: _Shards, video_ids: list[str] | None, categories: tuple[str, ...], *, keep: bool
) -> tuple[int, _Block | None]:
    """Write both Parquet files from the parts. Returns the number of events, and all results if they are to be kept."""
    import pyarrow as pa
    import pyarrow.parquet as pq

    names = (*categories, LABELS[-1])
    segment_schema = pa.schema(
        [
            ("row", pa.int64()),
            ("video_id", pa.string()),
            ("segment", pa.int32()),
            ("label", pa.int32()),
            ("category", pa.string()),
            ("event_probability", pa.float32()),
            ("class_probability", pa.float32()),
        ]
    )
    event_schema = pa.schema(
        [
            ("row", pa.int64()),
            ("video_id", pa.string()),
            ("category", pa.string()),
            ("start_s", pa.float64()),
            ("end_s", pa.float64()),
            ("score", pa.float32()),
        ]
    )
    count = 0
    kept: list[_Block] = []
    with (
        atomic_write(out / SEGMENTS) as segment_file,
        atomic_write(out / EVENTS) as event_file,
        pq.ParquetWriter(segment_file, segment_schema) as segment_writer,
        pq.ParquetWriter(event_file, event_schema) as event_writer,
    ):
        for block in _groups(parts):
            n, T = block.segments.shape
            labels = block.segments.ravel()
            ids = [None if video_ids is None else video_ids[row] for row in block.rows]
            columns: list[Any] = [
                np.repeat(block.rows, T),
                [video_id for video_id in ids for _ in range(T)],
                np.tile(np.arange(T, dtype=np.int32), n),
                labels.astype(np.int32),
                [names[label] for label in labels],
                block.event_probability.ravel(),
                np.repeat(block.class_probability, T),
            ]
            segment_writer.write_table(_table(columns, segment_schema), row_group_size=n * T)
            class_probability = np.broadcast_to(block.class_probability[:, None], (n, T))
            # By place in the block, so that the id is at hand even where a row stands twice.
            events = events_of(range(n), block.segments, block.event_probability, class_probability)
            columns = [
                [int(block.rows[event.row]) for event in events],
                [ids[event.row] for event in events],
                [names[event.category] for event in events],
                [event.start_s for event in events],
                [event.end_s for event in events],
                np.array([event.score for event in events], np.float32),
            ]
            event_writer.write_table(_table(columns, event_schema), row_group_size=max(1, len(events)))
            count += len(events)
            if keep:
                kept.append(block)
    return count, _join(kept) if keep else None


def _groups(parts: _Shards) -> Iterator[_Block]:
    """The results in order, about ROW_GROUP_VIDEOS at a time."""
    group: list[_Block] = []
    for number in range(len(parts.blocks)):
        block = parts.read(number)
        if block is None:
            raise CmranError(f"part {number} of the job was damaged while it ran: run again with --resume")
        group.append(block)
        if sum(len(block.rows) for block in group) >= ROW_GROUP_VIDEOS:
            yield _join(group)
            group = []
    if group:
        yield _join(group)


def _table(columns: list[Any], schema: Any) -> Any:
    import pyarrow as pa

    arrays = [pa.array(column, type=field.type) for column, field in zip(columns, schema, strict=True)]
    return pa.Table.from_arrays(arrays, schema=schema)


def _unless_bad(read: Callable[[], T], left_out: str, notes: list[str]) -> T | None:
    """What `read` gives; None, a warning and a note where a file that the predictions do not need is bad."""
    try:
        return read()
    except CmranError as error:
        notes.append(f"{left_out}: {error}")
        _log.warning("%s", notes[-1])
        return None


def _fingerprint(folder: FeatureFolder, split: PredictSplit, notes: list[str]) -> str:
    """The folder's, or that of the files that are needed where another one cannot be read."""
    found = _unless_bad(lambda: folder.fingerprint, "the fingerprint is that of the files that are needed", notes)
    if found is not None:
        return found
    orders = () if split == "all" else (layout.ORDERS[split].name,)
    return folder_fingerprint(folder.path, files=(layout.VISUAL.name, layout.AUDIO.name, *orders))


@dataclass(frozen=True)
class _Labels:
    """What the job's predictions are compared with, read before the first of them."""

    true: NDArray[np.int64]
    """(n, T)."""
    video_categories: NDArray[np.int64] | None
    """(n,); None where they are not known."""
    train: NDArray[np.int64] | None
    """Labels of the training videos; None where the folder does not say which they are."""
    clean: NDArray[np.bool_] | None
    """(n,): false for test videos that stand in train, too."""
    places: dict[str, NDArray[np.int64]]
    """Split -> places among the job's rows; test first."""
    rows_in_no_split: int | None
    """Of a job over all rows."""

    @classmethod
    def of(
        cls, folder: FeatureFolder, split: PredictSplit, rows: NDArray[np.int64], annotated: bool, notes: list[str]
    ) -> Self | None:
        """What the folder tells; None without good labels. What is bad is logged and added to `notes`."""
        if not folder.has_labels:
            return None
        labels = _unless_bad(folder.segment_labels, "the scores are left out", notes)
        if labels is None:
            return None
        for fault in contradictions(folder.path):
            notes.append(f"the scores may be wrong: {fault}")
            _log.warning("%s", notes[-1])
        orders: dict[str, NDArray[np.int64]] = {}
        bad = 0
        wanted: tuple[Split, ...] = ("test", "val", "train") if split == "all" else (split, "train")
        for name in wanted:
            if name not in orders and path_exists(folder.path / layout.ORDERS[name].name):
                order = _unless_bad(functools.partial(folder.order, name), f"split {name} is unknown", notes)
                bad += order is None
                if order is not None:
                    orders[name] = order
        categories = None
        with contextlib.suppress(CmranError):
            # Told of already: a bad Annotations.txt, for which the categories are taken from the segments.
            categories = folder.video_labels()
        train = orders.get("train")
        clean = None
        if train is not None and "test" in orders and annotated:
            clean = ~np.isin(rows, folder.shared_test_rows())
        places: dict[str, NDArray[np.int64]] = {}
        in_no_split = None
        if split == "all":
            # The job's rows are those of the folder, in order: a row is its own place.
            places = dict(orders)
            rest = np.setdiff1d(rows, np.concatenate([*orders.values(), np.empty(0, np.int64)]))
            in_no_split = len(rest)
            if rest.size and (len(orders) in (0, len(layout.ORDERS)) and not bad):
                places["no_split"] = rest
                if orders:
                    notes.append(f"{len(rest)} of {len(rows)} videos are in no split")
            elif rest.size:
                missing = [name for name in wanted if name not in orders]
                notes.append(
                    f"{len(rest)} of {len(rows)} videos are in no known split and are not scored, because "
                    f"{', '.join(layout.ORDERS[name].name for name in missing)} is missing or bad"
                )
        else:
            places[split] = np.arange(len(rows))
        for one, other in itertools.combinations(orders, 2):
            shared = np.intersect1d(orders[one], orders[other])
            if shared.size:
                notes.append(f"{rows_text(shared.tolist())} in both {other} and {one}: scores there are worth little")
                _log.warning("%s: %s", folder.path, notes[-1])
        return cls(
            labels[rows],
            None if categories is None else categories[rows],
            None if train is None else labels[train],
            clean,
            places,
            in_no_split,
        )

    def score(self, block: _Block | None) -> dict[str, dict[str, Any]]:
        """The scores of each split by itself."""
        assert block is not None
        return {
            split: evaluate(
                block.segments[at],
                self.true[at],
                event_probability=block.event_probability[at],
                leak_free=None if self.clean is None or split != "test" else self.clean[at],
                train_labels=self.train,
                video_categories=None if self.video_categories is None else self.video_categories[at],
            ).to_dict()
            for split, at in self.places.items()
        }


def _describe_model(session: Session, path: Path, digest: str, info: Mapping[str, Any] | None) -> dict[str, Any]:
    """What is known of the model: the registry's words, then the file's own."""
    return {
        "name": None,
        "version": None,
        **(info or {}),
        "path": str(path.resolve()),
        "digest": digest,
        "mode": session.metadata.mode,
        "metadata": {key: value for key, value in session.all_metadata.items() if key != "categories"},
    }


def _file_digest(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()
