"""Batches of a data folder as tensors, read by a background thread while the previous ones are used."""

import contextlib
import queue
import threading
from collections import deque
from collections.abc import Generator, Iterator
from dataclasses import dataclass
from typing import TYPE_CHECKING, Literal, NamedTuple, TypeVar

import numpy as np
from numpy.typing import NDArray

from cmran.data.dataset import FeatureFolder, Rows
from cmran.data.feature_cache import convert

if TYPE_CHECKING:
    import torch

LabelKind = Literal["segments", "video"]
T = TypeVar("T")

READ_AHEAD = 2
"""Number of batches that wait in the queue, in addition to the one being read and the one in use."""


class Batch(NamedTuple):
    """Some rows of a folder as tensors on one device."""

    rows: NDArray[np.int64]
    visual: "torch.Tensor"
    """(B, T, H, W, C)."""
    audio: "torch.Tensor"
    """(B, T, A)."""
    labels: "torch.Tensor | None"
    """(B, T, 29), (B, 29), or None."""


@dataclass
class _End:
    error: BaseException | None


def prefetch(items: Iterator[T], ahead: int = READ_AHEAD) -> Generator[T]:
    """Yield `items`, which a background thread produces ahead of the consumer.

    An error in `items` is raised here, after the items before it. The thread ends with the last item, and also when
    the generator is closed early.

    Args:
        items: The iterator that the thread runs.
        ahead: Maximum number of finished items that wait.
    """
    ready: queue.Queue[T | _End] = queue.Queue(ahead)
    stop = threading.Event()

    def put(item: T | _End) -> None:
        while not stop.is_set():
            with contextlib.suppress(queue.Full):
                ready.put(item, timeout=0.1)
                return

    def work() -> None:
        try:
            for item in items:
                put(item)
                if stop.is_set():
                    return
            put(_End(None))
        except BaseException as error:
            put(_End(error))

    thread = threading.Thread(target=work, name="cmran-read-ahead", daemon=True)
    thread.start()
    try:
        while not isinstance(item := ready.get(), _End):
            yield item
        if item.error is not None:
            raise item.error
    finally:
        stop.set()
        thread.join()


def iterate(
    folder: FeatureFolder,
    rows: Rows,
    batch_size: int,
    *,
    labels: LabelKind | None,
    dtype: "torch.dtype",
    device: "torch.device | str" = "cpu",
    reuse: bool = False,
) -> Generator[Batch]:
    """Iterate over batches of `rows`, in the given order, read ahead by a background thread.

    Args:
        folder: The open data folder.
        rows: Row numbers.
        batch_size: Rows of a batch; the last batch may be smaller.
        labels: "segments" adds labels (B, T, 29), "video" adds labels (B, 29).
        dtype: Dtype of all tensors.
        device: Device of all tensors.
        reuse: On the CPU, a batch is valid only until the next one is requested, which reuses its memory. Allocating
            new memory takes longer than reading into it.

    Raises:
        IndexError: A row does not exist (raised by the call, before the first batch).
        DataError: A file cannot be read (raised at the batch that is affected).
    """
    if batch_size < 1:
        raise ValueError(f"`batch_size`: found {batch_size}, expected at least 1")
    return _iterate(folder, folder.check_rows(rows), batch_size, labels, dtype, device, reuse)


def _iterate(
    folder: FeatureFolder,
    rows: NDArray[np.int64],
    batch_size: int,
    labels: LabelKind | None,
    dtype: "torch.dtype",
    device: "torch.device | str",
    reuse: bool,
) -> Generator[Batch]:
    import torch

    target = torch.device(device)
    # On a GPU, torch's cache of pinned memory reuses buffers, and it knows when a copy is finished.
    reuse = reuse and target.type == "cpu"
    # In addition to the waiting batches, one is in use and one is being filled, so a buffer is always free.
    buffers: deque[Batch | None] = deque([None] * (READ_AHEAD + 2))

    def read() -> Iterator[Batch]:
        for start in range(0, len(rows), batch_size):
            buffer = buffers.popleft() if reuse else None
            selected = rows[start : start + batch_size]
            yield _read_batch(folder, selected, labels, dtype, pin=target.type == "cuda", buffer=buffer)

    with contextlib.closing(prefetch(read())) as batches:
        for batch in batches:
            yield _move(batch, target, dtype)
            if reuse:
                buffers.append(batch)


def _read_batch(
    folder: FeatureFolder,
    rows: NDArray[np.int64],
    labels: LabelKind | None,
    dtype: "torch.dtype",
    *,
    pin: bool,
    buffer: Batch | None = None,
) -> Batch:
    """Read a batch, into the memory of `buffer` if it is given and has the same number of rows."""
    import torch

    shape = (len(rows), folder.segments)
    if buffer is not None and len(buffer.rows) == len(rows):
        visual, audio = buffer.visual, buffer.audio
    else:
        # For a GPU, cached float16 maps stay float16: the CPU converts nothing, and the transfer is half as large.
        stored = torch.float16 if pin and folder.is_float16 else dtype
        visual = torch.empty((*shape, *folder.grid, folder.visual_features), dtype=stored, pin_memory=pin)
        audio = torch.empty((*shape, folder.audio_features), dtype=dtype, pin_memory=pin)
    if visual.dtype != torch.bfloat16:
        folder.read_visual(rows, out=visual.numpy())
    else:
        # NumPy has no bfloat16: each row is read as float32 and then converted.
        scratch = np.empty((1, *visual.shape[1:]), np.float32)
        for row, target in zip(rows, visual, strict=True):
            convert(torch.from_numpy(folder.read_visual([row], out=scratch)), target)
    if dtype != torch.bfloat16:
        folder.read_audio(rows, out=audio.numpy())
    else:
        convert(torch.from_numpy(folder.read_audio(rows)), audio)
    targets = None
    if labels is not None:
        vectors = folder.segment_label_vectors if labels == "segments" else folder.video_label_vectors
        values = torch.from_numpy(vectors(rows))
        targets = torch.empty(values.shape, dtype=dtype, pin_memory=pin)
        convert(values, targets)
    return Batch(rows, visual, audio, targets)


def _move(batch: Batch, target: "torch.device", dtype: "torch.dtype") -> Batch:
    if target.type == "cpu":
        return batch
    # With pinned memory the copy runs in parallel to the computation, and torch keeps the buffer until it is finished.
    labels = None if batch.labels is None else batch.labels.to(target, non_blocking=True)
    visual, audio = batch.visual.to(target, non_blocking=True), batch.audio.to(target, non_blocking=True)
    return Batch(batch.rows, visual.to(dtype), audio, labels)
