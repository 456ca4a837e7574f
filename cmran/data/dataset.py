"""Read a data folder: features of given rows, labels, splits and annotations."""

import contextlib
import logging
from collections.abc import Sequence
from functools import cached_property
from pathlib import Path
from types import TracebackType
from typing import Any, Self

import numpy as np
from numpy.typing import DTypeLike, NDArray

from cmran.categories import BACKGROUND, LABELS
from cmran.config import Features, Mode, Split
from cmran.data import annotations as annotated
from cmran.data import layout
from cmran.data.faults import Fault, FaultError, make_fault
from cmran.data.feature_cache import Float16Array
from cmran.data.fingerprint import folder_fingerprint
from cmran.data.hdf5 import StoredArray, open_array
from cmran.data.rules import check_axes, check_background, check_one_hot, check_order, missing_labels, size_fault
from cmran.errors import CacheError, DataError
from cmran.utils.files import go_without_cache, path_exists, what_is_at

_log = logging.getLogger(__name__)


Rows = Sequence[int] | NDArray[np.integer[Any]]


class FeatureFolder:
    """A data folder, open for reading. Open it with `open_folder`. It is a context manager.

    Shape letters: n requested rows, N videos, M background videos, T segments, H x W grid, C visual channels, A audio
    features. Rows 0 to N-1 are the videos. In weak mode, row N+j is background video j.
    """

    path: Path
    mode: Mode
    videos: int
    """N."""
    background_videos: int
    """M; 0 in full mode and without labels."""
    segments: int
    """T."""
    grid: tuple[int, int]
    """(H, W)."""
    visual_features: int
    """C."""
    audio_features: int
    """A."""

    def __init__(self, path: Path, mode: Mode, need_labels: bool, features: Features) -> None:
        self.path, self.mode, self.features, self._need_labels = path, mode, features, need_labels
        self._open = contextlib.ExitStack()
        try:
            visual = self._array(layout.VISUAL)
            self._visual = [self._rounded(visual)]
            self._audio = [self._array(layout.AUDIO)]
            self.videos, self.segments, height, width, self.visual_features = visual.shape
            self.grid = (height, width)
            self.audio_features = self._audio[0].shape[2]
            self.background_videos = 0
            self._check_axes()
            self._check_sizes(self._audio[0], {"N": self.videos, "T": self.segments})
            if need_labels:
                self._check_label_files()
            if need_labels and mode == "weak":
                self._open_background()
        except BaseException:
            self.close()
            raise

    def close(self) -> None:
        """Close the feature files. Idempotent."""
        self._open.close()

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    @property
    def rows(self) -> int:
        """N + M, the number of rows that can be read."""
        return self.videos + self.background_videos

    @cached_property
    def fingerprint(self) -> str:
        """32 hex digits that identify the content of the folder; computed on first use (seconds), then cached."""
        return folder_fingerprint(self.path)

    def use_feature_cache(self, *, build: bool, progress: bool = True, required: bool = False) -> list[str]:
        """Read float16 features from the feature cache from now on; the values stay the same.

        Does nothing for features as stored, which have no cache.

        Args:
            build: Build missing caches, which reads each feature file once.
            progress: Show the progress of the build.
            required: Raise an error if the cache folder cannot be used. By default a warning is logged.

        Returns:
            The feature files that are read directly although a cache would be faster. With `build`, a warning gives
            the reason.

        Raises:
            CacheError: The cache folder cannot be used, and `required` is set.
        """
        arrays = [array for array in self._visual if isinstance(array, Float16Array) and array.needs_cache]
        for array in arrays:
            try:
                array.use_cache(self.fingerprint, build=build, progress=progress)
            except CacheError as error:
                if required:
                    raise
                go_without_cache(error)
        return [str(array.source.path) for array in arrays if array.cache is None]

    @property
    def is_float16(self) -> bool:
        """Whether all visual maps come from the feature cache or a float16 file, and so fit float16."""
        return all(isinstance(array, Float16Array) and array.is_float16 for array in self._visual)

    def read_visual(
        self, rows: Rows, dtype: DTypeLike = np.float32, *, out: NDArray[Any] | None = None
    ) -> NDArray[Any]:
        """Read the visual maps of `rows`.

        Args:
            rows: n row numbers, in any order, with or without repeats.
            dtype: Dtype of the result.
            out: Buffer (n, T, H, W, C) for the result. Its dtype replaces `dtype`.

        Returns:
            Visual maps (n, T, H, W, C), not negative.

        Raises:
            IndexError: A row does not exist.
            DataError: The file cannot be read.
        """
        return self._read(self._visual, rows, dtype, out)

    def check_finite(self, rows: Rows) -> None:
        """Find the reason for a result that is not finite.

        Raises:
            FaultError: Features of `rows` are not finite, or beyond float32. It names the first such file and its rows.
        """
        numbers = self.check_rows(rows)
        files = (layout.VISUAL, layout.AUDIO), (layout.VISUAL_NOISY, layout.AUDIO_NOISY)
        for background, first_row in ((False, 0), (True, self.videos)):
            selected = numbers[(numbers >= self.videos) == background]
            for spec, read in zip(files[background], (self.read_visual, self.read_audio), strict=True):
                with np.errstate(over="ignore", invalid="ignore"):
                    bad = [int(row) - first_row for row in selected if not np.isfinite(read([row])).all()]
                if bad:
                    found = "NaN, infinity or values beyond float32"
                    hint = "extract these videos again; `cmran validate` lists all such rows"
                    raise FaultError(self.path, make_fault(spec, "not_finite", found, "finite features", hint, bad))

    @property
    def visual_file(self) -> StoredArray:
        """The file with the visual maps of rows 0 to N-1, for callers that announce the order in which they read."""
        visual = self._visual[0]
        return visual.source if isinstance(visual, Float16Array) else visual

    def read_audio(self, rows: Rows, dtype: DTypeLike = np.float32, *, out: NDArray[Any] | None = None) -> NDArray[Any]:
        """Read the audio embeddings (n, T, A) of `rows`. Arguments and errors as for `read_visual`."""
        return self._read(self._audio, rows, dtype, out)

    def order(self, split: Split) -> NDArray[np.int64]:
        """Return the rows of a split, in the order of the file.

        Raises:
            FaultError: The file is missing or damaged, or a row is repeated or does not exist.
        """
        if split not in self._orders:
            self._orders[split] = self._read_order(split)
        return self._orders[split].copy()

    @property
    def has_labels(self) -> bool:
        """Whether the folder has segment labels, as a file or in Annotations.txt."""
        return any(path_exists(self.path / name) for name in (layout.LABELS.name, layout.ANNOTATIONS))

    @cached_property
    def annotations(self) -> list[annotated.Annotation] | None:
        """The lines of Annotations.txt, or None if the folder has no such file. Raises FaultError for a bad file."""
        path = self.path / layout.ANNOTATIONS
        if not path_exists(path):
            return None
        lines = annotated.read_annotations(path)
        if len(lines) != self.videos:
            raise FaultError(
                self.path, size_fault("N", path.name, len(lines), self.videos, [layout.VISUAL.name], shape=None)
            )
        if (fault := annotated.late_event(lines, self.segments)) is not None:
            raise FaultError(self.path, fault)
        return lines

    def video_ids(self) -> list[str] | None:
        """Return the YouTube id of each video, or None without Annotations.txt."""
        return None if self.annotations is None else [line.video_id for line in self.annotations]

    def segment_labels(self) -> NDArray[np.int64]:
        """Return the label of each segment (N, T): 0 to 27, or 28 for background.

        The source is labels.h5, or Annotations.txt if that file is missing.
        """
        return self._segment_labels.copy()

    def video_labels(self) -> NDArray[np.int64]:
        """Return the event category of each video (N,): 0 to 27.

        The source is mil_labels.h5 in weak mode, and Annotations.txt in full mode or if mil_labels.h5 is missing. In
        full mode without Annotations.txt it is the segment labels, with 28 for a video whose event is empty.
        """
        return self._video_labels.copy()

    def segment_label_vectors(self, rows: Rows) -> NDArray[np.float32]:
        """Return one-hot segment labels (n, T, 29). All segments of background videos are background."""
        numbers = np.full((self.rows, self.segments), BACKGROUND)
        numbers[: self.videos] = self._segment_labels
        return _one_hot_vectors(numbers[self.check_rows(rows)])

    def video_label_vectors(self, rows: Rows) -> NDArray[np.float32]:
        """Return one-hot video labels (n, 29), the targets of weak mode. Background videos are background."""
        numbers = np.full(self.rows, BACKGROUND)
        numbers[: self.videos] = self._video_labels
        return _one_hot_vectors(numbers[self.check_rows(rows)])

    def shared_test_rows(self) -> NDArray[np.int64]:
        """Return the test rows whose video is also in train, under another category or as the same row.

        The other test rows are the leak-free test subset. Without Annotations.txt, only identical rows are found.
        """
        test, train = self.order("test"), self.order("train")
        rows = np.intersect1d(test, train).tolist()
        if self.annotations is not None:
            rows += annotated.cross_split_duplicates(self.annotations, test.tolist(), train.tolist())
        return np.unique(np.array(rows, np.int64))

    @cached_property
    def _orders(self) -> dict[str, NDArray[np.int64]]:
        return {}

    @cached_property
    def _segment_labels(self) -> NDArray[np.int64]:
        if path_exists(self.path / layout.LABELS.name):
            return self._label_numbers(layout.LABELS, {"N": self.videos, "T": self.segments})
        if self.annotations is None:
            raise FaultError(self.path, missing_labels(layout.LABELS))
        numbers: NDArray[np.int64] = annotated.segment_labels(self.annotations, self.segments).argmax(axis=2)
        return numbers

    @cached_property
    def _video_labels(self) -> NDArray[np.int64]:
        if self.mode == "weak" and path_exists(self.path / layout.MIL_LABELS.name):
            return self._label_numbers(layout.MIL_LABELS, {"N": self.videos})
        if self.annotations is not None:
            return np.array([line.label for line in self.annotations], np.int64)
        if self.mode == "weak":
            raise FaultError(self.path, missing_labels(layout.MIL_LABELS))
        # A video has one event, whose category is the only label below 28.
        numbers: NDArray[np.int64] = self._segment_labels.min(axis=1)
        return numbers

    def _array(self, spec: layout.FileSpec) -> StoredArray:
        return self._open.enter_context(open_array(self.path, spec))

    def _rounded(self, array: StoredArray) -> StoredArray | Float16Array:
        """Return the visual maps in the requested precision. float16 files always take the faster float16 reader."""
        if self.features == "stored" and array.dtype != np.float16:
            return array
        half = Float16Array(array)
        self._open.callback(half.close)
        return half

    def _check_axes(self) -> None:
        """Check the order of the axes, as far as the sizes of all files that can be opened show it."""
        shapes: dict[layout.FileSpec, tuple[int, ...]] = {}
        for spec in layout.FILES:
            wanted = not spec.weak_only or self.mode == "weak" or spec is layout.MIL_LABELS
            if spec.kind != "order" and wanted and path_exists(self.path / spec.name):
                # The code that needs the file raises its fault.
                with contextlib.suppress(FaultError), open_array(self.path, spec) as array:
                    shapes[spec] = array.shape
        lines = None
        if path_exists(self.path / layout.ANNOTATIONS):
            lines = len(annotated.parse_annotations(self.path / layout.ANNOTATIONS)[0]) or None
        for found in check_axes(shapes, lines):
            if not found.certain:
                _log.warning("%s: %s", self.path, found.fault)
            elif found.spec.kind == "features" or self._need_labels:
                raise FaultError(self.path, found.fault)

    def _check_label_files(self) -> None:
        """Check that labels and orders exist and fit the features. Only their headers are read."""
        specs = [layout.LABELS, *([layout.MIL_LABELS] if self.mode == "weak" else [])]
        for spec in specs:
            if path_exists(self.path / spec.name):
                with open_array(self.path, spec) as array:
                    self._check_sizes(array, {"N": self.videos, "T": self.segments})
            elif not path_exists(self.path / layout.ANNOTATIONS):
                raise FaultError(self.path, missing_labels(spec))
        for spec in layout.ORDERS.values():
            open_array(self.path, spec).close()

    def _open_background(self) -> None:
        visual, audio = self._array(layout.VISUAL_NOISY), self._array(layout.AUDIO_NOISY)
        self._visual.append(self._rounded(visual))
        self._audio.append(audio)
        self.background_videos = visual.shape[0]
        sizes = {"M": self.background_videos, "T": self.segments, "H": self.grid[0], "W": self.grid[1]}
        sizes |= {"C": self.visual_features, "A": self.audio_features}
        for array in (visual, audio):
            self._check_sizes(array, sizes)
        if path_exists(self.path / layout.LABELS_NOISY.name):
            self._raise_first(check_background(self._label_numbers(layout.LABELS_NOISY, sizes)))

    def _check_sizes(self, array: StoredArray, sizes: dict[str, int]) -> None:
        """Check that the dimensions of `array` agree with those of the files that were opened before."""
        for letter, size in zip(array.spec.shape, array.shape, strict=True):
            if isinstance(letter, str) and letter in sizes and sizes[letter] != size:
                source = {"M": layout.VISUAL_NOISY, "A": layout.AUDIO}.get(letter, layout.VISUAL)
                name = array.spec.name
                raise FaultError(
                    self.path, size_fault(letter, name, size, sizes[letter], [source.name], shape=array.shape)
                )

    def _read(
        self, parts: Sequence[StoredArray | Float16Array], rows: Rows, dtype: DTypeLike, out: NDArray[Any] | None
    ) -> NDArray[Any]:
        numbers = self.check_rows(rows)
        shape = (len(numbers), *parts[0].shape[1:])
        if out is None:
            out = np.empty(shape, dtype)
        elif out.shape != shape:
            raise ValueError(f"`out`: found the shape {out.shape}, expected {shape}")
        if not numbers.size or numbers.max() < self.videos:
            parts[0].read(numbers, out)
        else:
            for part, offset, mask in ((0, 0, numbers < self.videos), (1, self.videos, numbers >= self.videos)):
                parts[part].read(numbers[mask] - offset, out, np.flatnonzero(mask))
        return out

    def check_rows(self, rows: Rows) -> NDArray[np.int64]:
        """Return `rows` as an array (n,).

        Raises:
            TypeError: A row is not an integer.
            ValueError: `rows` has more than one dimension.
            IndexError: A row does not exist.
        """
        numbers = np.asarray(rows)
        if numbers.size and numbers.dtype.kind not in "iu":
            raise TypeError(f"`rows`: found {numbers.dtype}, expected integers")
        if numbers.ndim != 1:
            raise ValueError(f"`rows`: found {numbers.ndim} dimensions, expected one")
        if numbers.size and (numbers.min() < 0 or numbers.max() >= self.rows):
            raise IndexError(
                f"{self.path}: found rows from {numbers.min()} to {numbers.max()}, expected rows from 0 to"
                f" {self.rows - 1}"
            )
        return numbers.astype(np.int64)

    def _read_order(self, split: Split) -> NDArray[np.int64]:
        spec = layout.ORDERS[split]
        with open_array(self.path, spec) as array:
            rows, faults = check_order(spec, array.read_all(), self.videos)
        self._raise_first(faults)
        return rows

    def _label_numbers(self, spec: layout.FileSpec, sizes: dict[str, int]) -> NDArray[np.int64]:
        """Return the label numbers of a one-hot file."""
        with open_array(self.path, spec) as array:
            self._check_sizes(array, sizes)
            numbers, faults = check_one_hot(spec, array.read_all())
        self._raise_first(faults)
        return numbers

    def _raise_first(self, faults: Sequence[Fault]) -> None:
        if faults:
            raise FaultError(self.path, faults[0])


def open_folder(
    path: Path | str, *, mode: Mode = "full", need_labels: bool = True, features: Features = "stored"
) -> FeatureFolder:
    """Open a data folder for reading. Only headers are read, no features.

    Args:
        path: The data folder.
        mode: "full" (segment labels) or "weak" (video labels, and the background videos as extra rows).
        need_labels: Require labels (or Annotations.txt), the three order files and, in weak mode, the background
            videos. False requires only visual_feature.h5 and audio_feature.h5, as for inference.
        features: "stored" reads the visual maps as they are. "float16" rounds them to float16, whatever dtype they
            are read in, except rows with values that float16 cannot represent; `FeatureFolder.use_feature_cache` makes
            this fast.

    Raises:
        DataError: The folder or a file is missing, damaged, or does not fit the other files.
    """
    path = Path(path)
    if (found := what_is_at(path)) != "a folder":
        raise DataError(
            f"{path}: found {found} there, expected a data folder",
            hint=f"check the path, or generate a synthetic dataset with `cmran synth {path}`",
        )
    return FeatureFolder(path, mode, need_labels, features)


def _one_hot_vectors(numbers: NDArray[np.int64]) -> NDArray[np.float32]:
    vectors: NDArray[np.float32] = np.eye(len(LABELS), dtype=np.float32)[numbers]
    return vectors
