"""The synthetic task: what is heard and seen in a video, and the features that result.

The 28 categories share 14 sounds and 14 looks. Category c has the sound c // 2 and the look (c + 1) // 2, so sound 0
belongs to categories 0 and 1, look 1 to categories 1 and 2, and only both together identify a category. An event is
audible and visible at the same time. Background segments are silent and empty, or contain a sound without its look, or
a look without its sound. A look fills a box of the grid; the other cells contain texture.

All features of a video follow from (seed, kind, row) and its annotation only. The result is therefore the same for any
number of threads, and the first rows of a large folder are the rows of a smaller one.

Shape letters as in `cmran.data.layout`.
"""

import math
from dataclasses import dataclass
from statistics import NormalDist

import numpy as np
from numpy.typing import NDArray
from pydantic import Field

from cmran.categories import CATEGORIES
from cmran.config import Frozen
from cmran.data.annotations import Annotation

Floats = NDArray[np.float32]

GROUPS = len(CATEGORIES) // 2
"""Number of sounds, and of looks. Each belongs to two categories."""

# Random streams: default_rng([seed, kind, row]).
_WORLD_STREAM, FOLDER_STREAM, VIDEO_STREAM, BACKGROUND_STREAM = range(4)


class SyntheticConfig(Frozen):
    """Difficulty of the synthetic task. Strengths are in standard deviations of the noise, before the ReLU."""

    sound_strength: float = Field(2.5, ge=0.0, le=20.0)
    """Increase of an active audio feature while a category is audible."""
    look_strength: float = Field(3.0, ge=0.0, le=20.0)
    """Increase of an active channel in the cells that show a category."""
    prototype_share: float = Field(0.12, gt=0.0, le=1.0)
    """Share of the features that are active in one sound or look."""
    variation: float = Field(0.5, ge=0.0, le=5.0)
    """Standard deviation of the active features of a sound or look over videos, relative to their strength."""
    static_noise: float = Field(0.7, ge=0.0, le=10.0)
    """Standard deviation of the noise that is constant over a video; that of the noise of each segment is 1."""
    texture_strength: float = Field(1.5, ge=0.0, le=20.0)
    """Increase of the channels of a video's scene in all cells and segments, and of its ambient sound."""
    faint_share: float = Field(0.1, ge=0.0, le=1.0)
    """Share of event segments in which the sound or the look is so weak that they resemble background."""
    faint_level: float = Field(0.2, ge=0.0, le=1.0)
    """Relative strength of the sound or look in these segments."""
    ambiguous_share: float = Field(0.1, ge=0.0, le=1.0)
    """Share of videos whose sound (or look) is the mean of two, so that two categories are equally likely."""
    bystander_share: float = Field(0.3, ge=0.0, le=1.0)
    """Share of videos in which a silent object with another look is always visible."""
    sound_only_share: float = Field(0.35, ge=0.0, le=1.0)
    """Share of background segments with a sound without its look."""
    sight_only_share: float = Field(0.35, ge=0.0, le=1.0)
    """Share of background segments with a look without its sound."""
    own_share: float = Field(0.6, ge=0.0, le=1.0)
    """Share of these sounds and looks that belong to the category of the video."""
    whole_share: float = Field(0.5, ge=0.0, le=1.0)
    """Share of synthetic events that fill their video; the others have a random start and end."""
    audio_scale: float = Field(0.45, gt=0.0, le=1000.0)
    """Factor on the audio features after the ReLU."""
    visual_scale: float = Field(1.0, gt=0.0, le=1000.0)
    """Factor on the visual features after the ReLU."""


def sound_of(category: int) -> int:
    """Return the sound of a category, which one other category has, too."""
    return category // 2


def look_of(category: int) -> int:
    """Return the look of a category, which one other category has, too, with another sound."""
    return (category + 1) // 2 % GROUPS


@dataclass(frozen=True)
class World:
    """The parameters that all videos of a seed share."""

    config: SyntheticConfig
    grid: int
    sounds: Floats
    """(GROUPS, A)."""
    looks: Floats
    """(GROUPS, C)."""
    audio_level: Floats
    """(A,): mean before the ReLU, mostly negative."""
    visual_level: Floats
    """(C,)."""

    @classmethod
    def generate(cls, seed: int, config: SyntheticConfig, grid: int, channels: int, audio_features: int) -> "World":
        """Draw the parameters from the seed."""
        rng = np.random.default_rng([seed, _WORLD_STREAM])
        return cls(
            config,
            grid,
            _prototypes(rng, audio_features, config.prototype_share, config.sound_strength),
            _prototypes(rng, channels, config.prototype_share, config.look_strength),
            # Shares of zeros without any signal. With the signals they are about 65 % (audio) and 86 % (visual).
            _levels(rng, audio_features, 0.46, 0.97, config.static_noise),
            _levels(rng, channels, 0.80, 0.985, config.static_noise),
        )


def _prototypes(rng: np.random.Generator, width: int, share: float, strength: float) -> Floats:
    """Return (GROUPS, width): each row has a few active features."""
    active = max(1, round(width * share))
    rows = np.zeros((GROUPS, width), np.float32)
    for row in rows:
        row[rng.permutation(width)[:active]] = strength * rng.uniform(0.6, 1.4, active)
    return rows


def _levels(rng: np.random.Generator, width: int, least: float, most: float, static_noise: float) -> Floats:
    """Return means (width,) such that the ReLU of mean + noise is zero with shares from `least` to `most`."""
    deviation = math.hypot(1.0, static_noise)
    shares = np.linspace(least, most, width) if width > 1 else np.array([(least + most) / 2])
    levels = [-deviation * NormalDist().inv_cdf(float(share)) for share in rng.permutation(shares)]
    return np.array(levels, np.float32)


@dataclass(frozen=True)
class Event:
    """The event of a video: its category, and the segments start <= t < end."""

    category: int
    start: int
    end: int

    @classmethod
    def of(cls, annotation: Annotation) -> "Event":
        """Return the event of an annotation."""
        return cls(annotation.label, annotation.start, annotation.end)


@dataclass(frozen=True)
class _Scene:
    """Sounds and looks of one video, before noise."""

    heard_TA: Floats
    seen_TC: Floats
    """Look in the cells of `box`; zero in segments without one."""
    box: tuple[slice, slice]
    bystander_C: Floats | None
    bystander_box: tuple[slice, slice]


def _scene(rng: np.random.Generator, world: World, event: Event | None, segments: int) -> _Scene:
    """Draw the scene of one video. In a background video (event None), no sound and look occur at the same time."""
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
        # Its look must not belong to any sound of this video, otherwise it would be an event.
        sounding = {sound_of(own), sound_of(other)} | ({sound_of(c) for c in _same_look(own)})
        silent = [g for g in range(GROUPS) if not sounding & {sound_of(c) for c in _categories_of_look(g)}]
        bystander_C = _vary(rng, world.looks[silent[int(rng.integers(len(silent)))]], config.variation)
    return _Scene(heard_TA, seen_TC, _box(rng, world.grid), bystander_C, _box(rng, world.grid))


def _sound_and_look(rng: np.random.Generator, world: World, category: int) -> tuple[Floats, Floats]:
    """Draw the sound (A,) and the look (C,) of one video of `category`."""
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
    """Draw one video's version of a prototype: each active feature is stronger or weaker, never negative."""
    factors = 1 + np.float32(variation) * rng.standard_normal(prototype.size, dtype=np.float32)
    varied: Floats = prototype * np.maximum(factors, 0)
    return varied


def _box(rng: np.random.Generator, grid: int) -> tuple[slice, slice]:
    """Draw a box of 30 % to 60 % of the height and width of the grid."""
    least, most = max(1, round(0.3 * grid)), max(1, round(0.6 * grid))
    sides = []
    for length in rng.integers(least, most + 1, 2):
        first = int(rng.integers(0, grid - length + 1))
        sides.append(slice(first, first + int(length)))
    return sides[0], sides[1]


def generate_features(
    rng: np.random.Generator, world: World, event: Event | None, visual_THWC: Floats, audio_TA: Floats
) -> None:
    """Generate the features of one video.

    Args:
        rng: Random stream of the video.
        world: Parameters of the seed.
        event: The event; None for a background video.
        visual_THWC: Filled with the visual maps.
        audio_TA: Filled with the audio embeddings.
    """
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
    """Return (width,): a few features that are higher in the whole video, independent of its category."""
    texture: Floats = np.float32(strength) * (rng.random(width, dtype=np.float32) < 0.05)
    return texture
