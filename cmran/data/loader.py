"""Reading a data folder: the rows asked for and no others, and the batches that training takes."""

import contextlib
import queue
import threading
from collections import deque
from collections.abc import Generator
from typing import TYPE_CHECKING, Literal, NamedTuple

import numpy as np
from numpy.typing import NDArray

from cmran.data.dataset import FeatureFolder, Rows
from cmran.data.feature_cache import convert

if TYPE_CHECKING:
    import torch

LabelKind = Literal["segments", "video"]


READ_AHEAD = 2
"""Batches that wait ready, besides the one being read and the one in use."""


class Batch(NamedTuple):
    """Some rows of a folder as tensors on one device."""

    rows: NDArray[np.int64]
    visual: "torch.Tensor"
    # (B, T, H, W, C)
    audio: "torch.Tensor"
    # (B, T, A)
    labels: "torch.Tensor | None"


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
    """Batches of `rows` in the order given, the last one short where they do not divide.

    `labels`: "segments" gives (B, T, 29), "video" gives (B, 29). With `reuse` a batch is good until the next one is
    asked for: its memory is then filled again, where on a CPU new memory costs more time than reading into it.

    One thread reads ahead, at most READ_AHEAD batches; it ends with the last batch, and also when the consumer stops
    early (closes the generator or lets go of it). What goes wrong in it is raised here, at the batch it belongs to.
    """
    if batch_size < 1:
        raise ValueError(f"batch_size must be at least 1, found {batch_size}")
    numbers = folder._checked(rows)
    return _read_ahead(folder, numbers, batch_size, labels, dtype, device, reuse)


def _read_ahead(
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
    ready: queue.Queue[Batch | BaseException | None] = queue.Queue(READ_AHEAD)
    stop = threading.Event()
    # On a GPU torch's own cache of pinned memory does the same, and knows when a copy is done.
    reuse = reuse and target.type == "cpu"
    # Besides those that wait, one is in use and one is being filled: then there is always a free one.
    spare: deque[Batch | None] = deque([None] * (READ_AHEAD + 2))

    def offer(item: Batch | BaseException | None) -> bool:
        while not stop.is_set():
            with contextlib.suppress(queue.Full):
                ready.put(item, timeout=0.1)
                return True
        return False

    def work() -> None:
        try:
            for start in range(0, len(rows), batch_size):
                wanted = rows[start : start + batch_size]
                used = spare.popleft() if reuse else None
                batch = _read_batch(folder, wanted, labels, dtype, pin=target.type == "cuda", used=used)
                if not offer(batch):
                    return
            offer(None)
        except BaseException as error:
            offer(error)

    thread = threading.Thread(target=work, name="cmran-read-ahead", daemon=True)
    thread.start()
    try:
        while (item := ready.get()) is not None:
            if isinstance(item, BaseException):
                raise item
            yield _move(item, target, dtype)
            if reuse:
                spare.append(item)
    finally:
        stop.set()
        thread.join()


def _read_batch(
    folder: FeatureFolder,
    rows: NDArray[np.int64],
    labels: LabelKind | None,
    dtype: "torch.dtype",
    *,
    pin: bool,
    used: Batch | None = None,
) -> Batch:
    """A batch, in the memory of `used` where it is given and of this size and dtype."""
    import torch

    shape = (len(rows), folder.segments)
    if used is not None and len(used.rows) == len(rows):
        visual, audio = used.visual, used.audio
    else:
        # For a GPU as they lie in the pack: no core converts them, and half as much crosses the bus.
        held = torch.float16 if pin and folder.is_float16 else dtype
        visual = torch.empty((*shape, *folder.grid, folder.visual_features), dtype=held, pin_memory=pin)
        audio = torch.empty((*shape, folder.audio_features), dtype=dtype, pin_memory=pin)
    if visual.dtype != torch.bfloat16:
        folder.read_visual(rows, out=visual.numpy())
    else:
        # NumPy has no bfloat16: such batches are read as float32 first, a row at a time.
        scratch = np.empty((1, *visual.shape[1:]), np.float32)
        for row, place in zip(rows, visual, strict=True):
            convert(torch.from_numpy(folder.read_visual([row], out=scratch)), place)
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
    # Pinned memory: the copy runs beside the computation, and torch keeps the buffer until it is done.
    labels = None if batch.labels is None else batch.labels.to(target, non_blocking=True)
    visual, audio = batch.visual.to(target, non_blocking=True), batch.audio.to(target, non_blocking=True)
    return Batch(batch.rows, visual.to(dtype), audio, labels)
