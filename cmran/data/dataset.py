"""Reading a data folder: the rows asked for and no others, and the batches that training takes."""

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
from cmran.data.axes import judge_axes
from cmran.data.faults import Fault, FaultError, rows_text
from cmran.data.feature_cache import Float16Array
from cmran.data.fingerprint import folder_fingerprint
from cmran.data.hdf5 import StoredArray, open_array
from cmran.errors import CacheError, CmranError
from cmran.utils.files import go_without_cache, path_exists, what_is_at

_log = logging.getLogger(__name__)


Rows = Sequence[int] | NDArray[np.integer[Any]]


class FeatureFolder:
    """A data folder, open for reading. Open it with `open_folder`; it is a context manager.

    Shape letters: n rows asked for, N videos, M background videos, T segments, H x W grid, C visual channels, A audio
    features. Rows 0 to N-1 are the videos; in weak mode row N+j is background video j.
    """

    path: Path
    mode: Mode
    videos: int
    # N
    background_videos: int
    # M; 0 in full mode and without labels.
    segments: int
    # T
    grid: tuple[int, int]
    # (H, W)
    visual_features: int
    # C
    audio_features: int
    # A

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
            self._check_like(self._audio[0], {"N": self.videos, "T": self.segments})
            if need_labels:
                self._check_labels()
            if need_labels and mode == "weak":
                self._open_background()
        except BaseException:
            self.close()
            raise

    def close(self) -> None:
        """Close the feature files; harmless when done twice."""
        self._open.close()

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    @property
    def rows(self) -> int:
        """N + M: rows that can be read."""
        return self.videos + self.background_videos

    @cached_property
    def fingerprint(self) -> str:
        """Name of the folder's content, 32 hex digits; computed when first asked for (seconds), then cached."""
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
        """Visual maps (n, T, H, W, C) of `rows`, in any order, repeats allowed; in `out` when it is given.

        `out` must have that shape and decides the dtype. Raises IndexError for a row that is not there, CmranError
        when the file cannot be read.
        """
        return self._read(self._visual, rows, dtype, out)

    def check_finite(self, rows: Rows) -> None:
        """Raises FaultError where features of `rows` are not finite, or beyond float32: the first file, all its rows.

        To be asked where a result is not finite.
        """
        wanted = self._checked(rows)
        files = (layout.VISUAL, layout.AUDIO), (layout.VISUAL_NOISY, layout.AUDIO_NOISY)
        for part, first in ((0, 0), (1, self.videos)):
            of_part = wanted[(wanted >= self.videos) == bool(part)]
            for spec, read in zip(files[part], (self.read_visual, self.read_audio), strict=True):
                with np.errstate(over="ignore", invalid="ignore"):
                    bad = [int(row) - first for row in of_part if not np.isfinite(read([row])).all()]
                if bad:
                    raise FaultError(
                        self.path,
                        Fault(
                            code="not_finite",
                            file=spec.name,
                            key=spec.key,
                            rows=bad,
                            found="NaN, infinities or values beyond float32",
                            expected="finite features",
                            hint="extract these videos again; `cmran validate` lists every such row",
                        ),
                    )

    @property
    def visual_file(self) -> StoredArray:
        """The stored visual maps of rows 0 to N-1, for those who know in which order they will read them."""
        visual = self._visual[0]
        return visual.source if isinstance(visual, Float16Array) else visual

    def read_audio(self, rows: Rows, dtype: DTypeLike = np.float32, *, out: NDArray[Any] | None = None) -> NDArray[Any]:
        """Audio embeddings (n, T, A) of `rows`; otherwise as `read_visual`."""
        return self._read(self._audio, rows, dtype, out)

    def order(self, split: Split) -> NDArray[np.int64]:
        """Rows of a split, in the file's order. Raises CmranError: file missing or bad, row repeated or not there."""
        if split not in self._orders:
            self._orders[split] = self._read_order(split)
        return self._orders[split].copy()

    @property
    def has_labels(self) -> bool:
        """Whether segment labels are there, as a file or in Annotations.txt."""
        return any(path_exists(self.path / name) for name in (layout.LABELS.name, layout.ANNOTATIONS))

    @cached_property
    def annotations(self) -> list[annotated.Annotation] | None:
        """The lines of Annotations.txt, None where the folder has none. Raises CmranError for a bad file."""
        path = self.path / layout.ANNOTATIONS
        if not path_exists(path):
            return None
        lines = annotated.read_annotations(path)
        if len(lines) != self.videos:
            raise self._fault(
                "row_count",
                layout.ANNOTATIONS,
                f"{len(lines)} lines",
                f"one line for each of the {self.videos} rows of {layout.VISUAL.name}",
                "take the Annotations.txt that belongs to these features",
            )
        for row, line in enumerate(lines):
            if line.end > self.segments:
                raise FaultError(self.path, annotated.late_event(row, line, self.segments))
        return lines

    def video_ids(self) -> list[str] | None:
        """YouTube id of each video, or None without Annotations.txt."""
        return None if self.annotations is None else [line.video_id for line in self.annotations]

    def segment_labels(self) -> NDArray[np.int64]:
        """Label of each segment (N, T): 0 to 27, or 28 for background. From labels.h5, else from Annotations.txt."""
        return self._segment_labels.copy()

    def video_labels(self) -> NDArray[np.int64]:
        """Event category of each video (N,): 0 to 27.

        Weak mode: from mil_labels.h5. Where that is absent, and in full mode, which does not touch it: from
        Annotations.txt; without that, in full mode, from the segment labels, and 28 for a video whose event is empty.
        """
        return self._video_labels.copy()

    def segment_label_vectors(self, rows: Rows) -> NDArray[np.float32]:
        """One-hot segment labels (n, T, 29); background videos are background throughout."""
        numbers = np.full((self.rows, self.segments), BACKGROUND)
        numbers[: self.videos] = self._segment_labels
        return _one_hot_vectors(numbers[self._checked(rows)])

    def video_label_vectors(self, rows: Rows) -> NDArray[np.float32]:
        """One-hot video labels (n, 29), the targets of weak mode; background videos are background."""
        numbers = np.full(self.rows, BACKGROUND)
        numbers[: self.videos] = self._video_labels
        return _one_hot_vectors(numbers[self._checked(rows)])

    def shared_test_rows(self) -> NDArray[np.int64]:
        """Test rows whose video is also in train: under another category, or as the same row (splits that overlap).

        Without Annotations.txt the same rows alone are known.
        """
        test, train = self.order("test"), self.order("train")
        rows = np.intersect1d(test, train).tolist()
        if self.annotations is not None:
            rows += annotated.shared_rows(self.annotations, test.tolist(), train.tolist())
        return np.unique(np.array(rows, np.int64))

    @cached_property
    def _orders(self) -> dict[str, NDArray[np.int64]]:
        return {}

    @cached_property
    def _segment_labels(self) -> NDArray[np.int64]:
        if path_exists(self.path / layout.LABELS.name):
            return self._numbers(layout.LABELS, {"N": self.videos, "T": self.segments})
        if self.annotations is None:
            raise self._no_labels(layout.LABELS)
        numbers: NDArray[np.int64] = annotated.segment_labels(self.annotations, self.segments).argmax(axis=2)
        return numbers

    @cached_property
    def _video_labels(self) -> NDArray[np.int64]:
        if self.mode == "weak" and path_exists(self.path / layout.MIL_LABELS.name):
            return self._numbers(layout.MIL_LABELS, {"N": self.videos})
        if self.annotations is not None:
            return np.array([line.label for line in self.annotations], np.int64)
        if self.mode == "weak":
            raise self._no_labels(layout.MIL_LABELS)
        # One event a video: its category is the only label below 28.
        numbers: NDArray[np.int64] = self._segment_labels.min(axis=1)
        return numbers

    def _array(self, spec: layout.FileSpec) -> StoredArray:
        return self._open.enter_context(open_array(self.path, spec))

    def _rounded(self, array: StoredArray) -> StoredArray | Float16Array:
        """Visual maps in the precision asked for. Files of float16 are that already, and convert faster so."""
        if self.features == "stored" and array.dtype != np.float16:
            return array
        half = Float16Array(array)
        self._open.callback(half.close)
        return half

    def _check_axes(self) -> None:
        """The axes are in the format's order, as far as the sizes of all files that can be opened tell."""
        shapes: dict[layout.FileSpec, tuple[int, ...]] = {}
        for spec in layout.FILES:
            wanted = not spec.weak_only or self.mode == "weak" or spec is layout.MIL_LABELS
            if spec.kind != "order" and wanted and path_exists(self.path / spec.name):
                # Whoever needs the file says what is wrong with it.
                with contextlib.suppress(FaultError), open_array(self.path, spec) as array:
                    shapes[spec] = array.shape
        lines = None
        if path_exists(self.path / layout.ANNOTATIONS):
            lines = len(annotated.parse_annotations(self.path / layout.ANNOTATIONS)[0]) or None
        for judgement in judge_axes(shapes, lines):
            if not judgement.certain:
                _log.warning("%s: %s", self.path, judgement.fault)
            elif judgement.spec.kind == "features" or self._need_labels:
                raise FaultError(self.path, judgement.fault)

    def _check_labels(self) -> None:
        """Labels and orders are there and fit the features; nothing is read but their headers."""
        specs = [layout.LABELS, *([layout.MIL_LABELS] if self.mode == "weak" else [])]
        for spec in specs:
            if path_exists(self.path / spec.name):
                with open_array(self.path, spec) as array:
                    self._check_like(array, {"N": self.videos, "T": self.segments})
            elif not path_exists(self.path / layout.ANNOTATIONS):
                raise self._no_labels(spec)
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
            self._check_like(array, sizes)
        if path_exists(self.path / layout.LABELS_NOISY.name):
            wrong = np.flatnonzero(self._numbers(layout.LABELS_NOISY, sizes) != BACKGROUND)
            if wrong.size:
                raise self._fault(
                    "wrong_label",
                    layout.LABELS_NOISY.name,
                    f"a category in {rows_text(wrong.tolist())}",
                    "background in every row",
                    "remove the file: it is built where it is missing",
                )

    def _check_like(self, array: StoredArray, sizes: dict[str, int]) -> None:
        """Dimensions of `array` agree with those of the files opened before."""
        for letter, size in zip(array.spec.shape, array.shape, strict=True):
            if isinstance(letter, str) and letter in sizes and sizes[letter] != size:
                code = {"N": "row_count", "M": "row_count", "T": "segments_disagree"}.get(letter, "wrong_shape")
                first = layout.VISUAL_NOISY if letter == "M" else layout.VISUAL
                raise self._fault(
                    code,
                    array.spec.name,
                    f"{letter} = {size} (shape {array.shape})",
                    f"{letter} = {sizes[letter]}, as in {first.name}",
                    "use files that were made together",
                    key=array.spec.key,
                )

    def _read(
        self, parts: Sequence[StoredArray | Float16Array], rows: Rows, dtype: DTypeLike, out: NDArray[Any] | None
    ) -> NDArray[Any]:
        wanted = self._checked(rows)
        shape = (len(wanted), *parts[0].shape[1:])
        if out is None:
            out = np.empty(shape, dtype)
        elif out.shape != shape:
            raise ValueError(f"out has shape {out.shape}, expected {shape}")
        if not wanted.size or wanted.max() < self.videos:
            parts[0].read(wanted, out)
        else:
            for part, offset, mask in ((0, 0, wanted < self.videos), (1, self.videos, wanted >= self.videos)):
                parts[part].read(wanted[mask] - offset, out, np.flatnonzero(mask))
        return out

    def _checked(self, rows: Rows) -> NDArray[np.int64]:
        numbers = np.asarray(rows)
        if numbers.size and numbers.dtype.kind not in "iu":
            raise TypeError(f"rows must be whole numbers, found {numbers.dtype}")
        if numbers.ndim != 1:
            raise ValueError(f"rows must be one list of numbers, found {numbers.ndim} dimensions")
        if numbers.size and (numbers.min() < 0 or numbers.max() >= self.rows):
            raise IndexError(
                f"{self.path}: rows go from 0 to {self.rows - 1}, asked for {numbers.min()} to {numbers.max()}"
            )
        return numbers.astype(np.int64)

    def _read_order(self, split: Split) -> NDArray[np.int64]:
        spec = layout.ORDERS[split]
        with open_array(self.path, spec) as array:
            raw = array.read_all()
        again = "take the order file that belongs to these features; `cmran validate` lists every fault"
        if not raw.size:
            raise self._fault("empty_split", spec.name, "no row", "at least one row", again, key=spec.key)
        outside = raw[(raw < 0) | (raw >= self.videos)].tolist()
        if outside:
            expected = f"rows from 0 to {self.videos - 1}"
            raise self._fault("order_out_of_range", spec.name, rows_text(outside), expected, again, key=spec.key)
        order = raw.astype(np.int64)
        numbers, counts = np.unique(order, return_counts=True)
        if len(numbers) < len(order):
            found = f"{rows_text(numbers[counts > 1].tolist())} more than once"
            raise self._fault("order_repeated", spec.name, found, "each row once", again, key=spec.key)
        return order

    def _numbers(self, spec: layout.FileSpec, sizes: dict[str, int]) -> NDArray[np.int64]:
        """Label numbers from a one-hot file."""
        with open_array(self.path, spec) as array:
            self._check_like(array, sizes)
            labels = array.read_all()
        numbers: NDArray[np.int64] = labels.argmax(axis=-1)
        wrong = np.flatnonzero(~one_hot(labels).reshape(len(labels), -1).all(axis=1))
        if wrong.size:
            raise self._fault(
                "not_one_hot",
                spec.name,
                rows_text(wrong.tolist()),
                "one 1 and 28 zeros for each label",
                f"remove the file, so that it is built from {layout.ANNOTATIONS}, or take a fresh copy",
                key=spec.key,
            )
        return numbers

    def _no_labels(self, spec: layout.FileSpec) -> FaultError:
        return self._fault(
            "missing_file",
            spec.name,
            f"neither this file nor {layout.ANNOTATIONS}",
            "one of the two",
            f"copy {layout.ANNOTATIONS} of the AVE data set into the folder: the labels are built from it",
        )

    def _fault(
        self, code: str, file: str, found: str, expected: str, hint: str, *, key: str | None = None
    ) -> FaultError:
        return FaultError(self.path, Fault(code=code, file=file, key=key, found=found, expected=expected, hint=hint))


def open_folder(
    path: Path | str, *, mode: Mode = "full", need_labels: bool = True, features: Features = "stored"
) -> FeatureFolder:
    """Open a data folder for reading; no features are read yet.

    `features`: "float16" rounds the visual maps to float16, whatever dtype they are read in, except rows that float16
    cannot hold; `FeatureFolder.use_feature_cache` makes reading these fast. "stored" gives them as they are.

    `need_labels=False` asks for visual_feature.h5 and audio_feature.h5 alone (inference). Otherwise labels (or
    Annotations.txt) and the three order files must be there, and in weak mode the background videos.

    Raises CmranError, one line: a folder or file that is missing or not HDF5, wrong ranks, shapes that disagree.
    """
    path = Path(path)
    if (found := what_is_at(path)) != "a folder":
        raise CmranError(
            f"{path}: found {found} there, expected a data folder; `cmran synth {path}` makes one for trial"
        )
    return FeatureFolder(path, mode, need_labels, features)


def one_hot(labels: NDArray[Any]) -> NDArray[np.bool_]:
    """Which label vectors along the last axis are one 1 and zeros otherwise (to 1e-6; NaN is neither)."""
    # Damaged numbers can be such that their cast warns.
    with np.errstate(invalid="ignore"):
        values = labels.astype(np.float64, copy=False)
    ones = np.abs(values - 1) <= 1e-6
    good: NDArray[np.bool_] = (ones.sum(axis=-1) == 1) & ((np.abs(values) <= 1e-6) | ones).all(axis=-1)
    return good


def _one_hot_vectors(numbers: NDArray[np.int64]) -> NDArray[np.float32]:
    vectors: NDArray[np.float32] = np.eye(len(LABELS), dtype=np.float32)[numbers]
    return vectors
