"""A folder's features held in a GPU's memory: batches are picked there, and nothing is read or copied in a step."""

import logging
from collections.abc import Generator

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from cmran.data.features import Batch, FeatureFolder, LabelKind
from cmran.progress import Progress

SPARE_BYTES = 4 << 30
"""Memory of the device that is left to the network and its steps."""
ROWS_AT_ONCE = 64

log = logging.getLogger(__name__)


class Resident:
    """The features of all rows of a folder on one device: visual maps as float16, audio and labels as float32."""

    def __init__(self, folder: FeatureFolder, device: torch.device) -> None:
        """Reads the whole folder. Raises ValueError for a visual value that float16 does not hold as it stands."""
        shape = (folder.rows, folder.segments, *folder.grid, folder.visual_features)
        dtype = np.float16 if folder.holds_halves else np.float32
        self.device = device
        self._visual = torch.empty(shape, dtype=torch.float16, device=device)
        rows = np.arange(folder.rows)
        with Progress(folder.rows, f"features to {device.type}", "videos") as bar:
            for start in range(0, folder.rows, ROWS_AT_ONCE):
                read = torch.from_numpy(folder.read_visual(rows[start : start + ROWS_AT_ONCE], dtype))
                half = read.half()
                if read.dtype != torch.float16 and not torch.equal(half.float(), read):
                    raise ValueError("the visual maps hold values that float16 does not")
                self._visual[start : start + len(half)] = half.to(device)
                bar.update(len(half))
        self._audio = torch.from_numpy(folder.read_audio(rows)).to(device)
        vectors = {"segments": folder.segment_label_vectors(rows), "video": folder.video_label_vectors(rows)}
        self._labels = {kind: torch.from_numpy(value).to(device) for kind, value in vectors.items()}

    def iterate(
        self, rows: NDArray[np.int64], batch_size: int, *, labels: LabelKind | None, dtype: torch.dtype
    ) -> Generator[Batch]:
        """As `cmran.data.features.iterate`, with the same values."""
        # One copy for all batches; the host does not wait for the device between them.
        picked = torch.from_numpy(np.asarray(rows, np.int64)).to(self.device)
        for start in range(0, len(rows), batch_size):
            part = picked[start : start + batch_size]
            targets = None if labels is None else self._labels[labels][part].to(dtype)
            yield Batch(
                rows[start : start + batch_size], self._take(self._visual, part, dtype),
                self._take(self._audio, part, dtype), targets,
            )  # fmt: skip

    @staticmethod
    def _take(values: Tensor, rows: Tensor, dtype: torch.dtype) -> Tensor:
        return values.index_select(0, rows).to(dtype)


_last: tuple[tuple[str, str, torch.device], Resident] | None = None


def hold(folder: FeatureFolder, device: torch.device) -> Resident | None:
    """The folder's features on a GPU where they fit; None on a CPU, and where they are streamed instead (and why).

    The last one held stays, so that the next run of this process on the same data begins at once.
    """
    global _last
    if device.type != "cuda":
        return None
    key = (folder.fingerprint, folder.mode, device)
    if _last is not None and _last[0] == key:
        return _last[1]
    _last = None
    elements = folder.rows * folder.segments * folder.grid[0] * folder.grid[1] * folder.visual_features
    free, _ = torch.cuda.mem_get_info(device)
    if folder.features != "float16":
        why = "they are not rounded to float16"
    elif 2 * elements + SPARE_BYTES > free:
        why = f"{2 * elements / 2**30:.1f} GiB of them do not fit beside the network in {free / 2**30:.1f} GiB"
    else:
        try:
            _last = key, Resident(folder, device)
            return _last[1]
        except ValueError as error:
            why = str(error)
    log.warning("features are read for each batch, not held on the GPU: %s", why)
    return None
