"""Makes a whole data folder in the published format: a problem that only sound and sight together solve.

The 28 categories share 14 sounds and 14 looks: category c sounds like c // 2 and looks like (c + 1) // 2, so sound 0
belongs to categories 0 and 1, look 1 to categories 1 and 2, and only the two together name one category. An event is
what is heard and seen at once. Background segments are silent and empty, or hold a sound without its sight, or a sight
without its sound. A look stands in a box of the grid, elsewhere there is texture.

All features of a video follow from (seed, kind, row) and its annotation alone: the same folder comes out for any number
of threads, and the first rows of a large folder are the rows of a smaller one.

Shape letters as in cmran.data.layout.
"""

import contextlib
import errno
import fcntl
import glob
import logging
import math
import os
import shutil
import threading
import uuid
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor, as_completed
from dataclasses import dataclass
from pathlib import Path
from statistics import NormalDist
from typing import Any, BinaryIO, Literal

import h5py
import numpy as np
from numpy.typing import NDArray
from pydantic import Field

from cmran.categories import CATEGORIES
from cmran.config import Frozen
from cmran.data.annotations import Annotation, background_labels, read_annotations, segment_labels, video_labels
from cmran.data.hdf5 import open_hdf5
from cmran.data.layout import (
    ANNOTATIONS,
    AUDIO,
    AUDIO_NOISY,
    FILES,
    LABELS,
    LABELS_NOISY,
    MIL_LABELS,
    ORDERS,
    VISUAL,
    VISUAL_NOISY,
    FileSpec,
)
from cmran.errors import CmranError
from cmran.utils.device import usable_cpus
from cmran.utils.files import free_bytes, log_once, optional, what_is_at
from cmran.utils.progress import Progress

FeatureDtype = Literal["float64", "float32", "float16"]
Floats = NDArray[np.float32]

GROUPS = len(CATEGORIES) // 2
"""Number of sounds, and of looks: each is shared by two categories."""

DEFAULT_VIDEOS = 600
PUBLISHED_VIDEOS, PUBLISHED_BACKGROUND_VIDEOS = VISUAL.published_shape[0], VISUAL_NOISY.published_shape[0]

# Streams of random numbers: default_rng([seed, kind, row]).
_WORLD, _FOLDER, _VIDEO, _BACKGROUND_VIDEO = range(4)

_ALPHABET = "ABCDEFGHIJKLMNOPQRSTUVWXYZabcdefghijklmnopqrstuvwxyz0123456789-_"
_ID_LENGTH = 11
_DASH_SHARE = 0.25
# Ids that begin with "-": a quarter in the real data.

_ROWS_A_TASK = 16
_SYNC_BYTES = 256 * 2**20
_LOCK = ".being-made"


class SyntheticConfig(Frozen):
    """How hard the made problem is. Strengths are in standard deviations of the noise, before the ReLU."""

    sound_strength: float = Field(2.5, ge=0.0, le=20.0)
    # How far an active audio feature rises where a category is heard.
    look_strength: float = Field(3.0, ge=0.0, le=20.0)
    # How far an active channel rises in the cells where a category is seen.
    prototype_share: float = Field(0.12, gt=0.0, le=1.0)
    # Share of the features that take part in one sound or look.
    variation: float = Field(0.5, ge=0.0, le=5.0)
    # Standard deviation, over videos, of a prototype's active features, relative to their strength.
    static_noise: float = Field(0.7, ge=0.0, le=10.0)
    # Noise that stays the same through a video; the noise that changes with each segment is 1.
    texture_strength: float = Field(1.5, ge=0.0, le=20.0)
    # How far the channels of a video's scene rise, in all cells and segments; likewise its ambient sound.
    faint_share: float = Field(0.1, ge=0.0, le=1.0)
    # Share of event segments in which the sound or the sight is nearly lost: they look like background.
    faint_level: float = Field(0.2, ge=0.0, le=1.0)
    # What is left of it there.
    ambiguous_share: float = Field(0.1, ge=0.0, le=1.0)
    # Share of videos whose sound (or look) lies halfway between two: two categories are then equally likely.
    bystander_share: float = Field(0.3, ge=0.0, le=1.0)
    # Share of videos in which a silent object of another look stands in view all the time.
    sound_only_share: float = Field(0.35, ge=0.0, le=1.0)
    # Share of background segments with a sound without its sight.
    sight_only_share: float = Field(0.35, ge=0.0, le=1.0)
    # Share of background segments with a sight without its sound.
    own_share: float = Field(0.6, ge=0.0, le=1.0)
    # Share of those sounds and sights that are of the video's own category.
    whole_share: float = Field(0.5, ge=0.0, le=1.0)
    # Share of made events that fill their video; the others begin and end anywhere.
    audio_scale: float = Field(0.45, gt=0.0, le=1000.0)
    # Factor on the audio features after the ReLU.
    visual_scale: float = Field(1.0, gt=0.0, le=1000.0)
    # Factor on the visual features after the ReLU.


def sound_of(category: int) -> int:
    """The sound of a category; it shares it with one other."""
    return category // 2


def look_of(category: int) -> int:
    """The look of a category; it shares it with one other, which has another sound."""
    return (category + 1) // 2 % GROUPS


def synthesize(
    out: Path,
    *,
    videos: int | None = None,
    background_videos: int | None = None,
    annotations: Path | None = None,
    orders: Path | None = None,
    dtype: FeatureDtype = "float64",
    seed: int = 0,
    config: SyntheticConfig | None = None,
    segments: int = 10,
    grid: int = 7,
    visual_features: int = 512,
    audio_features: int = 128,
    progress: bool = True,
    threads: int | None = None,
) -> Path:
    """Make the folder `out` with the ten files and Annotations.txt; returns it.

    videos: N; default 600, with `annotations` all of them. With `annotations` the first N are taken.
    background_videos: M; default as many as suit N, 178 at the published size.
    annotations: an Annotations.txt whose categories, ids, starts and ends are used instead of made ones.
    orders: a folder with train_order.h5, val_order.h5 and test_order.h5 to go with `annotations`; rows from N on are
        left out. Without it the splits are made.
    dtype: of the two feature files (and their background twins).
    segments, grid, visual_features, audio_features: T, H = W, C, A.
    threads: workers; default up to 4. The result does not depend on it.

    The folder takes its name only when it is whole; until then it is `out` + ".partial-...". About 40 MB of memory.
    Raises CmranError: `out` is not empty, a bad value, an unreadable file, too little space.
    """
    config = config or SyntheticConfig()
    for name, value, least in (
        ("videos", videos, 3),
        ("background_videos", background_videos, 1),
        ("seed", seed, 0),
        ("segments", segments, 1),
        ("grid", grid, 1),
        ("visual_features", visual_features, 1),
        ("audio_features", audio_features, 1),
        ("threads", threads, 1),
    ):
        if value is not None and value < least:
            raise CmranError(f"{name}: expected {least} or more, found {value}")
    if dtype not in ("float64", "float32", "float16"):
        raise CmranError(f"dtype: expected float64, float32 or float16, found {dtype!r}")
    if orders is not None and annotations is None:
        raise CmranError(f"orders {orders} given without annotations: the rows of a split mean nothing without them")
    if config.sound_only_share + config.sight_only_share > 1:
        raise CmranError("sound_only_share and sight_only_share add up to more than 1: lower one of them")
    out = Path(out).absolute()
    _check_free(out)

    rng = np.random.default_rng([seed, _FOLDER])
    if annotations is None:
        rows = _synthetic_annotations(rng, videos or DEFAULT_VIDEOS, segments, config)
    else:
        rows = _first_annotations(annotations, videos, segments)
    splits = _synthetic_splits(rng, rows) if orders is None else _read_splits(orders, len(rows))
    if background_videos is None:
        share = PUBLISHED_BACKGROUND_VIDEOS / PUBLISHED_VIDEOS
        background_videos = max(round(len(rows) * share), min(len(rows) // 8, 75), 1)

    stored = np.dtype(dtype).newbyteorder("<")
    sizes = {"N": len(rows), "M": background_videos, "T": segments, "H": grid, "W": grid}
    sizes |= {"C": visual_features, "A": audio_features}
    labels: dict[FileSpec, NDArray[Any]] = {
        LABELS: segment_labels(rows, segments),
        MIL_LABELS: video_labels(rows),
        LABELS_NOISY: background_labels(background_videos),
        **{ORDERS[name]: order for name, order in splits.items()},
    }
    features = {spec: tuple(_size(sizes, letter) for letter in spec.shape) for spec in FILES if spec.kind == "features"}
    needed = sum(math.prod(shape) for shape in features.values()) * stored.itemsize
    needed += sum(array.nbytes for array in labels.values())
    _check_space(out, needed)

    world = _World.make(seed, config, grid, visual_features, audio_features)
    with _partial_folder(out) as folder:
        jobs = [
            _Job(VISUAL, AUDIO, [_Event.of(annotation) for annotation in rows], _VIDEO),
            _Job(VISUAL_NOISY, AUDIO_NOISY, [None] * background_videos, _BACKGROUND_VIDEO),
        ]
        with Progress(len(rows) + background_videos, f"making {out.name}", "videos", enabled=progress) as bar:
            for job in jobs:
                _write_features(folder, job, features, stored, world, seed, threads or min(4, usable_cpus()), bar)
        for spec, array in labels.items():
            _write_array(folder, spec, array)
        text = "".join(f"{a.category}&{a.video_id}&{a.quality}&{a.start}&{a.end}\n" for a in rows)
        with (folder / ANNOTATIONS).open("wb") as file:
            file.write(text.encode("utf-8"))
            file.flush()
            with optional():
                os.fsync(file.fileno())
    return out


# --- labels and splits ------------------------------------------------------------------------------------------------


def _synthetic_annotations(
    rng: np.random.Generator, videos: int, segments: int, config: SyntheticConfig
) -> list[Annotation]:
    """Categories in equal numbers, in random order; in a hundred rows one is a second label of another row's video."""
    categories = rng.permutation(np.arange(videos) % len(CATEGORIES))
    rows: list[Annotation] = []
    used: set[str] = set()
    for category in categories:
        video_id = _random_id(rng)
        while video_id in used:
            video_id = _random_id(rng)
        used.add(video_id)
        start, end = 0, segments
        if segments > 2 and rng.random() >= config.whole_share:
            length = int(rng.integers(2, segments))
            start = int(rng.integers(0, segments - length + 1))
            end = start + length
        rows.append(Annotation(CATEGORIES[category], video_id, "good", start, end))
    for _ in range(videos // 100):
        first, second = (int(row) for row in rng.choice(videos, 2, replace=False))
        if rows[first].category != rows[second].category:
            old = rows[second]
            rows[second] = Annotation(old.category, rows[first].video_id, old.quality, old.start, old.end)
    return rows


def _random_id(rng: np.random.Generator) -> str:
    letters = "".join(_ALPHABET[i] for i in rng.integers(0, len(_ALPHABET), _ID_LENGTH))
    return "-" + letters[1:] if rng.random() < _DASH_SHARE else letters


def _first_annotations(path: Path, videos: int | None, segments: int) -> list[Annotation]:
    rows = read_annotations(path)
    if videos is not None and videos > len(rows):
        raise CmranError(f"{path}: holds {len(rows)} videos, but {videos} were asked for: ask for {len(rows)} at most")
    rows = rows[:videos]
    if len(rows) < 3:
        raise CmranError(f"{path}: expected 3 videos or more, found {len(rows)}")
    for number, row in enumerate(rows):
        if row.end > segments:
            raise CmranError(
                f"{path}: row {number} ends at segment {row.end}, but videos of {segments} segments were asked for: "
                f"ask for {max(r.end for r in rows)} or more"
            )
    return rows


def _synthetic_splits(rng: np.random.Generator, rows: Sequence[Annotation]) -> dict[str, NDArray[np.int64]]:
    """About 80/10/10 of a large folder; val and test get up to a sixth each of a small one, to be worth measuring.

    All splits get events of all lengths alike, or small ones would differ in their share of background.
    """
    held_out = max(1, round(len(rows) / 10), min(len(rows) // 6, 100))
    order = rng.permutation(len(rows)).astype(np.int64)
    by_length = order[np.argsort([rows[row].end - rows[row].start for row in order], kind="stable")]
    places = np.arange(2 * held_out) * len(rows) // (2 * held_out)
    held = by_length[places]
    splits = {"train": np.delete(by_length, places), "val": held[0::2], "test": held[1::2]}
    return {name: rng.permutation(split) for name, split in splits.items()}


def _read_splits(folder: Path, videos: int) -> dict[str, NDArray[np.int64]]:
    splits = {}
    for name, spec in ORDERS.items():
        path = folder / spec.name
        try:
            with open_hdf5(path, "r") as file:
                order = np.asarray(file[spec.key][()])
        except (OSError, KeyError, TypeError) as error:
            raise CmranError(
                f"{path}: cannot read data set {spec.key!r}: expected the HDF5 file of a split: "
                + " ".join(str(error).split())
            ) from error
        if order.ndim != 1 or order.dtype.kind not in "iu":
            raise CmranError(f"{path}: {spec.key}: expected a list of row numbers, found {order.dtype} {order.shape}")
        if order.size and order.min() < 0:
            raise CmranError(f"{path}: {spec.key}: found row {order.min()}, expected rows from 0 on")
        order = order[order < videos].astype(np.int64)
        if not order.size:
            raise CmranError(f"{path}: no row of the {name} split is below {videos}: ask for more videos")
        splits[name] = order
    return splits


# --- the problem ------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class _World:
    """What all videos of a seed share."""

    config: SyntheticConfig
    grid: int
    sounds: Floats  # (GROUPS, A)
    looks: Floats  # (GROUPS, C)
    audio_level: Floats  # (A,) mean before the ReLU, mostly below 0
    visual_level: Floats  # (C,)

    @classmethod
    def make(cls, seed: int, config: SyntheticConfig, grid: int, channels: int, audio_features: int) -> "_World":
        rng = np.random.default_rng([seed, _WORLD])
        return cls(
            config,
            grid,
            _prototypes(rng, audio_features, config.prototype_share, config.sound_strength),
            _prototypes(rng, channels, config.prototype_share, config.look_strength),
            # Shares of zeros without any signal; the signals bring them to about 65 % and 86 %.
            _levels(rng, audio_features, 0.46, 0.97, config.static_noise),
            _levels(rng, channels, 0.80, 0.985, config.static_noise),
        )


def _prototypes(rng: np.random.Generator, width: int, share: float, strength: float) -> Floats:
    """(GROUPS, width): each row has a few active features."""
    active = max(1, round(width * share))
    rows = np.zeros((GROUPS, width), np.float32)
    for row in rows:
        row[rng.permutation(width)[:active]] = strength * rng.uniform(0.6, 1.4, active)
    return rows


def _levels(rng: np.random.Generator, width: int, least: float, most: float, static_noise: float) -> Floats:
    """(width,): means such that the ReLU of mean + noise is zero with shares spread from `least` to `most`."""
    deviation = math.hypot(1.0, static_noise)
    shares = np.linspace(least, most, width) if width > 1 else np.array([(least + most) / 2])
    levels = [-deviation * NormalDist().inv_cdf(float(share)) for share in rng.permutation(shares)]
    return np.array(levels, np.float32)


@dataclass(frozen=True)
class _Event:
    """The event of a video: category, and segments start <= t < end."""

    category: int
    start: int
    end: int

    @classmethod
    def of(cls, annotation: Annotation) -> "_Event":
        return cls(annotation.label, annotation.start, annotation.end)


@dataclass(frozen=True)
class _Scene:
    """What is heard and seen in a video, before noise."""

    heard_TA: Floats
    seen_TC: Floats
    # In the cells of the box; zero where nothing is seen.
    box: tuple[slice, slice]
    bystander_C: Floats | None
    bystander_box: tuple[slice, slice]


def _scene(rng: np.random.Generator, world: _World, event: _Event | None, segments: int) -> _Scene:
    """Draw what happens in one video. A background video (event None) is never heard and seen at once."""
    config = world.config
    own = event.category if event is not None else int(rng.integers(len(CATEGORIES)))
    other = int((own + rng.integers(1, len(CATEGORIES))) % len(CATEGORIES))
    sound_A, look_C = _sound_and_look(rng, world, own)
    other_sound_A, other_look_C = (
        _vary(rng, world.sounds[sound_of(other)], config.variation),
        _vary(rng, world.looks[look_of(other)], config.variation),
    )

    heard_TA = np.zeros((segments, sound_A.size), np.float32)
    seen_TC = np.zeros((segments, look_C.size), np.float32)
    for t in range(segments):
        draw, is_own, faint, faint_sound = rng.random(4)
        if event is not None and event.start <= t < event.end:
            level = config.faint_level if faint < config.faint_share else 1.0
            heard_TA[t] = sound_A * np.float32(level if faint_sound < 0.5 else 1.0)
            seen_TC[t] = look_C * np.float32(level if faint_sound >= 0.5 else 1.0)
        elif draw < config.sound_only_share:
            heard_TA[t] = sound_A if is_own < config.own_share else other_sound_A
        elif draw < config.sound_only_share + config.sight_only_share:
            seen_TC[t] = look_C if is_own < config.own_share else other_look_C

    bystander_C = None
    if rng.random() < config.bystander_share:
        # A look that belongs to no sound of this video: it must not make an event.
        sounding = {sound_of(own), sound_of(other)} | ({sound_of(c) for c in _same_look(own)})
        silent = [g for g in range(GROUPS) if not sounding & {sound_of(c) for c in _categories_of_look(g)}]
        bystander_C = _vary(rng, world.looks[silent[int(rng.integers(len(silent)))]], config.variation)
    return _Scene(heard_TA, seen_TC, _box(rng, world.grid), bystander_C, _box(rng, world.grid))


def _sound_and_look(rng: np.random.Generator, world: _World, category: int) -> tuple[Floats, Floats]:
    """Sound (A,) and look (C,) of one video of `category`."""
    sound_A, look_C = world.sounds[sound_of(category)], world.looks[look_of(category)]
    ambiguous, in_sound = rng.random(2) < (world.config.ambiguous_share, 0.5)
    if ambiguous and in_sound:
        sound_A = np.mean([world.sounds[sound_of(c)] for c in _same_look(category)], axis=0, dtype=np.float32)
    elif ambiguous:
        look_C = np.mean([world.looks[look_of(c)] for c in _same_sound(category)], axis=0, dtype=np.float32)
    return _vary(rng, sound_A, world.config.variation), _vary(rng, look_C, world.config.variation)


def _categories_of_look(look: int) -> list[int]:
    return [c for c in range(len(CATEGORIES)) if look_of(c) == look]


def _same_look(category: int) -> list[int]:
    return _categories_of_look(look_of(category))


def _same_sound(category: int) -> list[int]:
    return [c for c in range(len(CATEGORIES)) if sound_of(c) == sound_of(category)]


def _vary(rng: np.random.Generator, prototype: Floats, variation: float) -> Floats:
    """The prototype as one video has it: each active feature stronger or weaker, never below 0."""
    factors = 1 + np.float32(variation) * rng.standard_normal(prototype.size, dtype=np.float32)
    varied: Floats = prototype * np.maximum(factors, 0)
    return varied


def _box(rng: np.random.Generator, grid: int) -> tuple[slice, slice]:
    """A part of the grid: from a third to over a half of its height and width."""
    least, most = max(1, round(0.3 * grid)), max(1, round(0.6 * grid))
    sides = []
    for length in rng.integers(least, most + 1, 2):
        first = int(rng.integers(0, grid - length + 1))
        sides.append(slice(first, first + int(length)))
    return sides[0], sides[1]


def _draw(rng: np.random.Generator, world: _World, event: _Event | None, visual_THWC: Floats, audio_TA: Floats) -> None:
    """Fill the features of one video, in place."""
    config = world.config
    segments, _, _, channels = visual_THWC.shape
    scene = _scene(rng, world, event, segments)
    noise = np.float32(config.static_noise)

    rng.standard_normal(out=audio_TA, dtype=np.float32)
    audio_TA += world.audio_level + noise * rng.standard_normal(audio_TA.shape[1], dtype=np.float32)
    audio_TA += _texture(rng, audio_TA.shape[1], config.texture_strength)
    audio_TA += scene.heard_TA
    np.maximum(audio_TA, 0, out=audio_TA)
    audio_TA *= np.float32(config.audio_scale)

    still_HWC = noise * rng.standard_normal(visual_THWC.shape[1:], dtype=np.float32)
    still_HWC += world.visual_level + _texture(rng, channels, config.texture_strength)
    if scene.bystander_C is not None:
        still_HWC[scene.bystander_box] += scene.bystander_C
    rng.standard_normal(out=visual_THWC, dtype=np.float32)
    visual_THWC += still_HWC
    visual_THWC[:, scene.box[0], scene.box[1]] += scene.seen_TC[:, None, None]
    np.maximum(visual_THWC, 0, out=visual_THWC)
    if config.visual_scale != 1:
        visual_THWC *= np.float32(config.visual_scale)


def _texture(rng: np.random.Generator, width: int, strength: float) -> Floats:
    """(width,): a few features that rise through the whole of one video, saying nothing about its category."""
    texture: Floats = np.float32(strength) * (rng.random(width, dtype=np.float32) < 0.05)
    return texture


# --- files ------------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class _Job:
    """One pair of feature files."""

    visual: FileSpec
    audio: FileSpec
    events: Sequence[_Event | None]
    # One per row; None: a background video.
    kind: int


def _write_features(
    folder: Path,
    job: _Job,
    shapes: dict[FileSpec, tuple[int, ...]],
    dtype: np.dtype[Any],
    world: _World,
    seed: int,
    threads: int,
    bar: Progress,
) -> None:
    """Write both files row by row from several threads, each row at its place."""
    stop = threading.Event()
    paths = {spec: folder / spec.name for spec in (job.visual, job.audio)}
    offsets = {spec: _create(path, spec, shapes[spec], dtype) for spec, path in paths.items()}
    with paths[job.visual].open("r+b") as visual_file, paths[job.audio].open("r+b") as audio_file:

        def make(rows: range) -> int:
            visual, audio = (np.empty(shapes[spec][1:], np.float32) for spec in (job.visual, job.audio))
            for row in rows:
                if stop.is_set():
                    break
                _draw(np.random.default_rng([seed, job.kind, row]), world, job.events[row], visual, audio)
                for file, spec, array in ((visual_file, job.visual, visual), (audio_file, job.audio, audio)):
                    stored = np.ascontiguousarray(array, dtype)
                    _write_at(file, stored, offsets[spec] + row * stored.nbytes)
            return len(rows)

        pool = ThreadPoolExecutor(threads, "synth")
        try:
            tasks = (range(a, min(a + _ROWS_A_TASK, len(job.events))) for a in range(0, len(job.events), _ROWS_A_TASK))
            unsynced, row_bytes = 0, math.prod(shapes[job.visual][1:]) * dtype.itemsize
            for done in as_completed([pool.submit(make, rows) for rows in tasks]):
                bar.update(done.result())
                # Syncing as we go keeps the progress honest: the last sync would else take as long as the rest.
                unsynced += done.result() * row_bytes
                if unsynced >= _SYNC_BYTES:
                    with optional():
                        os.fdatasync(visual_file.fileno())
                    unsynced = 0
        finally:
            stop.set()
            pool.shutdown(wait=True, cancel_futures=True)
        for file in (visual_file, audio_file):
            with optional():
                os.fsync(file.fileno())


def _write_at(file: BinaryIO, array: NDArray[Any], offset: int) -> None:
    view = array.data.cast("B")
    while view:
        written = os.pwrite(file.fileno(), view, offset)
        view, offset = view[written:], offset + written


def _write_array(folder: Path, spec: FileSpec, array: NDArray[Any]) -> None:
    stored = np.ascontiguousarray(array, np.dtype(spec.dtype).newbyteorder("<"))
    path = folder / spec.name
    offset = _create(path, spec, stored.shape, stored.dtype)
    with path.open("r+b") as file:
        _write_at(file, stored, offset)
        with optional():
            os.fsync(file.fileno())


def _create(path: Path, spec: FileSpec, shape: tuple[int, ...], dtype: np.dtype[Any]) -> int:
    """Make the HDF5 file of `spec` with room for its data, and return the byte at which that begins.

    The data set is contiguous and uncompressed, as published, so it can be written without going through HDF5, whose
    lock would let only one thread write.
    """
    with open_hdf5(path, "w") as file:
        properties = h5py.h5p.create(h5py.h5p.DATASET_CREATE)
        properties.set_layout(h5py.h5d.CONTIGUOUS)
        properties.set_alloc_time(h5py.h5d.ALLOC_TIME_EARLY)
        properties.set_fill_time(h5py.h5d.FILL_TIME_NEVER)
        # A time of making in the file would give each copy another fingerprint.
        properties.set_obj_track_times(False)
        space = h5py.h5s.create_simple(shape)
        dataset = h5py.h5d.create(file.id, spec.key.encode(), h5py.h5t.py_create(dtype), space, properties)
        return int(dataset.get_offset())


def _size(sizes: dict[str, int], letter: str | int) -> int:
    return letter if isinstance(letter, int) else sizes[letter]


def _check_free(out: Path) -> None:
    if out.is_symlink() or os.path.ismount(out):
        raise CmranError(f"{out} is a link or a mount point: name the folder to make itself, or one in it")
    if (found := what_is_at(out)) == "nothing":
        return
    if found == "a folder":
        try:
            if not any(out.iterdir()):
                return
        except OSError as error:
            raise CmranError(f"{out} cannot be looked into: {error.strerror}: choose another name") from error
    what = {"a folder": "holds files already", "a file": "is not a folder"}.get(found, f"is {found}")
    raise CmranError(f"{out} {what}: expected a new or empty folder: choose another name or remove it")


def _check_space(out: Path, needed: int) -> None:
    existing = next(parent for parent in out.parents if parent.exists())
    free = free_bytes(existing)
    if free is not None and needed > free:
        raise CmranError(
            f"{existing}: {needed / 2**30:.2f} GiB needed for {out.name}, {free / 2**30:.2f} GiB free: "
            "free space, or ask for fewer videos or dtype float16"
        )


@contextlib.contextmanager
def _partial_folder(out: Path) -> Iterator[Path]:
    """A folder beside `out` that takes its name when the block ends without an error, and is removed otherwise."""
    try:
        out.parent.mkdir(parents=True, exist_ok=True)
        _remove_abandoned(out)
        folder = out.parent / f"{out.name}.partial-{uuid.uuid4().hex[:8]}"
        folder.mkdir()
    except OSError as error:
        raise CmranError(
            f"cannot make a folder beside {out}: {error.strerror or error}: choose another place"
        ) from error
    try:
        # Locked while its maker lives, so that the next one can tell and remove what a killed one left.
        with (folder / _LOCK).open("w") as lock:
            with optional():
                fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
            yield folder
            (folder / _LOCK).unlink()
            os.rename(folder, out)
    except OSError as error:
        if error.errno in (errno.ENOTEMPTY, errno.EEXIST, errno.ENOTDIR):
            raise CmranError(f"{out} appeared while it was being made: choose another name or remove it") from error
        raise CmranError(
            f"cannot write {out}: {error.strerror or error}: free space or choose another place"
        ) from error
    finally:
        shutil.rmtree(folder, ignore_errors=True)


def _remove_abandoned(out: Path) -> None:
    """Remove what killed makers of `out` left: partial folders whose lock nobody holds.

    Where the file system has no locks they stay, since their maker may be alive.
    """
    for lock_path in out.parent.glob(f"{glob.escape(out.name)}.partial-*/{_LOCK}"):
        with lock_path.open("r+") as lock:
            try:
                fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except BlockingIOError:
                continue
            except OSError as error:
                log_once(logging.INFO, f"{lock_path.parent} is not removed: it cannot be locked ({error.strerror})")
                continue
            shutil.rmtree(lock_path.parent, ignore_errors=True)
