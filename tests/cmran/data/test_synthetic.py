"""The generator of data folders: format, statistics, the task, determinism, and refused requests."""

import hashlib
import os
import re
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import h5py
import numpy as np
import pytest
from pydantic import ValidationError

from cmran.categories import BACKGROUND, CATEGORIES
from cmran.data.annotations import read_annotations, segment_labels, video_labels
from cmran.data.layout import ANNOTATIONS, AUDIO, FILES, ORDERS, VISUAL
from cmran.data.synthetic import SyntheticConfig, look_of, sound_of, synthesize, writer
from cmran.data.synthetic.splits import synthetic_annotations, synthetic_splits
from cmran.data.synthetic.task import World
from cmran.data.validation import validate
from cmran.errors import CmranError, ConfigError, DataError, StorageError
from tests.helpers import read

SMALL: dict[str, Any] = {"grid": 2, "visual_features": 6, "audio_features": 5, "progress": False}
CLEAR = SyntheticConfig(faint_share=0, ambiguous_share=0, bystander_share=0, variation=0, texture_strength=0)


def digests(folder: Path) -> dict[str, str]:
    return {file.name: hashlib.sha256(file.read_bytes()).hexdigest() for file in sorted(folder.iterdir())}


def sizes(folder: Path) -> dict[str, tuple[int, ...]]:
    return {spec.name: read(folder / spec.name, spec.key).shape for spec in FILES}


@pytest.fixture(scope="module")
def published_widths(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return synthesize(
        tmp_path_factory.mktemp("synthetic") / "data", videos=60, background_videos=40, dtype="float32", progress=False
    )


def test_folder_is_complete_and_has_the_published_layout(tmp_path: Path) -> None:
    out = synthesize(tmp_path / "data", videos=40, background_videos=7, segments=4, **SMALL)
    assert sorted(file.name for file in out.iterdir()) == sorted([*(spec.name for spec in FILES), ANNOTATIONS])
    letters = {"N": 40, "M": 7, "T": 4, "H": 2, "W": 2, "C": 6, "A": 5}
    for spec in FILES:
        with h5py.File(out / spec.name) as file:
            assert list(file) == [spec.key]
            data = file[spec.key]
            assert data.chunks is None
            assert data.compression is None
            assert data.dtype == spec.dtype
            if spec.kind != "order":
                assert data.shape == tuple(letters.get(size, size) for size in spec.shape)
    orders = [read(out / spec.name, spec.key) for spec in ORDERS.values()]
    assert [len(order) for order in orders] == [28, 6, 6]
    assert sorted(np.concatenate(orders)) == list(range(40))


@pytest.mark.parametrize("mode", ["full", "weak"])
def test_validator_reports_no_error(published_widths: Path, mode: Any) -> None:
    report = validate(published_widths, mode, progress=False)
    assert report.errors == []
    assert {fault.code for fault in report.warnings} <= {"shared_video"}


def test_features_have_the_published_statistics(published_widths: Path) -> None:
    for suffix in ("", "_noisy"):
        visual, audio = (read(published_widths / f"{name}_feature{suffix}.h5") for name in ("visual", "audio"))
        assert visual.min() == 0
        assert audio.min() == 0
        assert np.mean(visual == 0) == pytest.approx(0.86, abs=0.02)
        assert np.mean(audio == 0) == pytest.approx(0.65, abs=0.05)
        assert 2.5 < audio.max() < 7
        assert np.isfinite(visual).all()


def test_labels_match_the_annotations(published_widths: Path) -> None:
    annotations = read_annotations(published_widths / ANNOTATIONS)
    labels = read(published_widths / "labels.h5")
    np.testing.assert_array_equal(labels, segment_labels(annotations))
    np.testing.assert_array_equal(read(published_widths / "mil_labels.h5"), video_labels(annotations))
    noisy = read(published_widths / "labels_noisy.h5")
    assert (noisy.argmax(1) == BACKGROUND).all()
    assert (noisy.sum(1) == 1).all()
    assert 0.1 < labels[..., BACKGROUND].mean() < 0.4


def test_synthetic_annotations_resemble_the_real_ones(tmp_path: Path) -> None:
    rows = read_annotations(synthesize(tmp_path / "data", videos=300, **SMALL) / ANNOTATIONS)
    counts = np.bincount([row.label for row in rows], minlength=28)
    assert counts.min() >= 10
    assert counts.max() <= 11
    assert all(re.fullmatch(r"[\w-]{11}", row.video_id) for row in rows)
    dashes = sum(row.video_id.startswith("-") for row in rows)
    assert 0.15 < dashes / len(rows) < 0.35
    labels: dict[str, set[str]] = {}
    for row in rows:
        labels.setdefault(row.video_id, set()).add(row.category)
    # Some videos appear a second time, under another category.
    assert 1 <= 300 - len(labels) <= 3
    assert all(0 <= row.start < row.end <= 10 for row in rows)
    whole = sum(row.end - row.start == 10 for row in rows) / len(rows)
    assert 0.35 < whole < 0.65


def test_only_sound_and_look_together_identify_a_category() -> None:
    pairs = [(sound_of(c), look_of(c)) for c in range(len(CATEGORIES))]
    assert len(set(pairs)) == 28
    sounds, looks = (np.bincount(group) for group in zip(*pairs, strict=True))
    assert sounds.tolist() == looks.tolist() == [2] * 14
    assert all(
        pairs[c][0] != pairs[d][0] for c in range(28) for d in range(28) if c != d and pairs[c][1] == pairs[d][1]
    )


def test_only_events_are_audible_and_visible_at_the_same_time(tmp_path: Path) -> None:
    """In an easy task, the features match the sound and the look of the seed's world in events only."""
    out = synthesize(tmp_path / "data", videos=80, background_videos=10, dtype="float32", config=CLEAR, progress=False)
    world = World.generate(0, CLEAR, 7, 512, 128)

    def scores(features: np.ndarray, prototypes: np.ndarray) -> np.ndarray:
        """Return (..., 14): mean of each prototype's active features minus the mean of the others."""
        active = prototypes > 0
        return features @ (active / active.sum(1, keepdims=True) - ~active / (~active).sum(1, keepdims=True)).T

    def heard(audio: np.ndarray) -> np.ndarray:
        return scores(audio, world.sounds)

    def seen(visual: np.ndarray) -> np.ndarray:
        # The strongest four cells, because the smallest box has four.
        cells = scores(visual.reshape(*visual.shape[:2], 49, -1), world.looks)
        return np.sort(cells, 2)[:, :, -4:].mean(2)

    labels = read(out / "labels.h5").argmax(-1)
    sound, look = heard(read(out / AUDIO.name)), seen(read(out / VISUAL.name))
    events = labels != BACKGROUND
    expected = [[(sound_of(c), look_of(c)) for c in row] for row in np.where(events, labels, 0)]
    assert (sound.argmax(-1) == np.array(expected)[..., 0])[events].mean() > 0.99
    assert (look.argmax(-1) == np.array(expected)[..., 1])[events].mean() > 0.99
    threshold_sound = sound.max(-1)[events].min()
    threshold_look = look.max(-1)[events].min()
    both = (sound.max(-1) >= threshold_sound) & (look.max(-1) >= threshold_look)
    assert both[events].all()
    assert both[~events].mean() < 0.05
    alone_sound = (sound.max(-1) >= threshold_sound)[~events].mean()
    alone_look = (look.max(-1) >= threshold_look)[~events].mean()
    # About 35 % each: one modality alone does not separate events from background.
    assert 0.2 < alone_sound < 0.55
    assert 0.2 < alone_look < 0.55

    noisy_sound, noisy_look = heard(read(out / "audio_feature_noisy.h5")), seen(read(out / "visual_feature_noisy.h5"))
    both = (noisy_sound.max(-1) >= threshold_sound) & (noisy_look.max(-1) >= threshold_look)
    assert both.mean() < 0.05


def test_a_look_fills_a_box_of_the_grid(tmp_path: Path) -> None:
    out = synthesize(tmp_path / "data", videos=40, dtype="float32", config=CLEAR, progress=False)
    world = World.generate(0, CLEAR, 7, 512, 128)
    visual, labels = read(out / VISUAL.name), read(out / "labels.h5").argmax(-1)
    shares, corners = [], set()
    for video, row in zip(visual, labels, strict=True):
        t = int(np.flatnonzero(row != BACKGROUND)[0])
        look = world.looks[look_of(row[t])]
        score = video[t][..., look > 0].mean(-1)
        cells = score > (score.min() + score.max()) / 2
        ys, xs = np.nonzero(cells)
        assert cells[ys.min() : ys.max() + 1, xs.min() : xs.max() + 1].all(), "the cells are not one box"
        shares.append(cells.mean())
        corners.add((int(ys.min()), int(xs.min())))
    assert min(shares) >= 4 / 49
    assert max(shares) <= 16 / 49
    assert len(corners) > 8


def test_the_same_seed_gives_the_same_bytes_for_any_number_of_threads(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    first = synthesize(tmp_path / "first", videos=40, threads=1, **SMALL)
    # HDF5 can store the second in which a dataset was created.
    time.sleep(1.1)
    monkeypatch.setattr(writer, "_ROWS_PER_TASK", 3)
    second = synthesize(tmp_path / "second", videos=40, threads=3, **SMALL)
    assert digests(first) == digests(second)
    other = digests(synthesize(tmp_path / "other", videos=40, seed=1, **SMALL))
    different = {name for name, digest in digests(first).items() if digest != other[name]}
    assert different == {spec.name for spec in FILES} - {"labels_noisy.h5"} | {ANNOTATIONS}


@pytest.mark.parametrize("dtype", ["float32", "float16"])
def test_dtype_changes_only_the_storage(tmp_path: Path, dtype: Any) -> None:
    wide = synthesize(tmp_path / "wide", videos=10, **SMALL)
    narrow = synthesize(tmp_path / "narrow", videos=10, dtype=dtype, **SMALL)
    for spec in FILES:
        expected, found = read(wide / spec.name, spec.key), read(narrow / spec.name, spec.key)
        assert found.dtype == (dtype if spec.kind == "features" else spec.dtype)
        np.testing.assert_array_equal(found, expected.astype(found.dtype))


@pytest.mark.parametrize(("segments", "grid", "width"), [(1, 1, 1), (2, 3, 2), (13, 2, 4)])
def test_small_and_odd_sizes(tmp_path: Path, segments: int, grid: int, width: int) -> None:
    out = synthesize(
        tmp_path / "data",
        videos=5,
        background_videos=1,
        segments=segments,
        grid=grid,
        visual_features=width,
        audio_features=width,
        progress=False,
    )
    assert sizes(out)[VISUAL.name] == (5, segments, grid, grid, width)
    assert [len(read(out / spec.name, spec.key)) for spec in ORDERS.values()] == [3, 1, 1]
    assert np.isfinite(read(out / VISUAL.name)).all()
    assert validate(out, "full", progress=False).errors == []


@pytest.mark.parametrize(
    ("videos", "expected"),
    [(3, [1, 1, 1]), (12, [8, 2, 2]), (600, [400, 100, 100]), (1000, [800, 100, 100]), (4143, [3315, 414, 414])],
)
def test_synthetic_splits(videos: int, expected: list[int]) -> None:
    rng = np.random.default_rng(0)
    rows = synthetic_annotations(rng, videos, 10, SyntheticConfig())
    splits = synthetic_splits(rng, rows)
    assert [len(order) for order in splits.values()] == expected
    assert sorted(np.concatenate(list(splits.values()))) == list(range(videos))
    if videos >= 600:
        lengths = [np.mean([rows[row].end - rows[row].start for row in order]) for order in splits.values()]
        assert max(lengths) - min(lengths) < 0.2
        assert all(len({rows[row].category for row in order}) >= 26 for order in splits.values())


# --- real annotations ---


def test_real_labels_and_splits(tmp_path: Path, ave: Path) -> None:
    out = synthesize(tmp_path / "data", annotations=ave / ANNOTATIONS, orders=ave, **SMALL)
    for name in ("labels.h5", "mil_labels.h5", "labels_noisy.h5"):
        np.testing.assert_array_equal(read(out / name), read(ave / name))
    for spec in ORDERS.values():
        np.testing.assert_array_equal(read(out / spec.name, spec.key), read(ave / spec.name, spec.key))
    assert (out / ANNOTATIONS).read_bytes() == (ave / ANNOTATIONS).read_bytes()
    assert sizes(out)["visual_feature_noisy.h5"][0] == 178
    assert validate(out, "weak", progress=False).errors == []


def test_the_first_real_videos(tmp_path: Path, ave: Path) -> None:
    headed = tmp_path / "headed.txt"
    headed.write_bytes(b"Category&VideoID&Quality&StartTime&EndTime\n" + (ave / ANNOTATIONS).read_bytes().rstrip(b"\n"))
    full = synthesize(tmp_path / "all", annotations=headed, orders=ave, **SMALL)
    part = synthesize(tmp_path / "part", annotations=headed, orders=ave, videos=200, **SMALL)
    for spec in (VISUAL, AUDIO):
        np.testing.assert_array_equal(read(part / spec.name), read(full / spec.name)[:200])
    np.testing.assert_array_equal(read(part / "labels.h5"), read(ave / "labels.h5")[:200])
    for spec in ORDERS.values():
        order = read(ave / spec.name, spec.key)
        np.testing.assert_array_equal(read(part / spec.name, spec.key), order[order < 200])
    assert read_annotations(part / ANNOTATIONS) == read_annotations(ave / ANNOTATIONS)[:200]


def test_annotations_without_orders_get_synthetic_splits(tmp_path: Path) -> None:
    source = tmp_path / ANNOTATIONS
    source.write_text("".join(f"{CATEGORIES[i % 28]}&id{i}&good&0&{i % 10}\n" for i in range(30)))
    out = synthesize(tmp_path / "data", annotations=source, **SMALL)
    assert sorted(np.concatenate([read(out / spec.name, "order") for spec in ORDERS.values()])) == list(range(30))
    # Event 0-0 is empty, like row 26 of the real file.
    assert read(out / "labels.h5")[0, :, BACKGROUND].all()


# --- refusals ---


def write_orders(folder: Path, **rows: list[int]) -> Path:
    folder.mkdir(exist_ok=True)
    for name, spec in ORDERS.items():
        with h5py.File(folder / spec.name, "w") as file:
            file[spec.key] = np.array(rows.get(name, [0, 1]))
    return folder


@pytest.fixture
def annotated(tmp_path: Path) -> Path:
    source = tmp_path / "some.txt"
    source.write_text("".join(f"Bark&id{i}&good&2&{5 + i % 6}\n" for i in range(12)))
    return source


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"videos": 2}, "`videos`: found 2, expected at least 3"),
        ({"background_videos": 0}, "`background_videos`: found 0, expected at least 1"),
        ({"grid": 0}, "`grid`: found 0, expected at least 1"),
        ({"seed": -1}, "`seed`: found -1, expected at least 0"),
        ({"dtype": "int8"}, "`dtype`: found 'int8', expected float64, float32 or float16"),
        ({"orders": Path("splits")}, "`orders` needs `annotations`"),
        ({"config": SyntheticConfig(sound_only_share=0.7, sight_only_share=0.7)}, "add up to more than 1"),
        ({"annotations": Path("nowhere.txt")}, "nowhere.txt"),
    ],
)
def test_bad_arguments_are_refused(tmp_path: Path, changes: dict[str, Any], message: str) -> None:
    with pytest.raises(CmranError, match=re.escape(message)):
        synthesize(tmp_path / "data", **({"videos": 10} | SMALL | changes))
    assert list(tmp_path.iterdir()) == []


def test_bad_annotations_and_orders_are_refused(tmp_path: Path, annotated: Path) -> None:
    out = tmp_path / "data"
    with pytest.raises(ConfigError, match="`videos`: found 13, expected at most the 12 videos"):
        synthesize(out, annotations=annotated, videos=13, **SMALL)
    with pytest.raises(ConfigError, match=r"`segments`: found 6, but the event of row 2 .* ends at segment 7"):
        synthesize(out, annotations=annotated, segments=6, **SMALL)
    with pytest.raises(DataError, match=r"missing_file: train_order\.h5: "):
        synthesize(out, annotations=annotated, orders=tmp_path / "absent", **SMALL)
    orders = write_orders(tmp_path / "orders", val=[7, 8])
    with pytest.raises(ConfigError, match=r"val_order.h5: the val split has no row below 5: increase `videos`"):
        synthesize(out, annotations=annotated, orders=orders, videos=5, **SMALL)
    with pytest.raises(DataError, match=r"order_out_of_range: test_order\.h5 \[order\], row -1: "):
        synthesize(out, annotations=annotated, orders=write_orders(orders, test=[-1, 3]), **SMALL)
    assert not out.exists()


@pytest.mark.parametrize("wrong", [{"faint_share": 1.5}, {"sound_strength": -1}, {"loudness": 3}])
def test_config_is_bounded(wrong: dict[str, float]) -> None:
    with pytest.raises(ValidationError):
        SyntheticConfig(**wrong)


def test_a_link_is_refused_before_the_work(tmp_path: Path) -> None:
    (tmp_path / "real").mkdir()
    for name, target in (("link", "real"), ("dangling", "nowhere")):
        (tmp_path / name).symlink_to(target)
        with pytest.raises(StorageError, match=f"{name} is a link or a mount point"):
            synthesize(tmp_path / name, videos=5, **SMALL)


def test_a_folder_that_is_not_empty_is_refused(tmp_path: Path) -> None:
    out = tmp_path / "data"
    out.mkdir()
    (out / "mine.txt").write_text("precious")
    with pytest.raises(StorageError, match="already contains files"):
        synthesize(out, videos=5, **SMALL)
    with pytest.raises(StorageError, match="is not a folder"):
        synthesize(out / "mine.txt", videos=5, **SMALL)
    assert [file.name for file in out.iterdir()] == ["mine.txt"]
    (out / "mine.txt").unlink()
    assert sizes(synthesize(out, videos=5, **SMALL))[VISUAL.name][0] == 5


def test_too_little_space_is_refused_before_anything_is_written(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(writer.shutil, "disk_usage", lambda path: type("Usage", (), {"free": 2**20}))
    with pytest.raises(StorageError, match=r"GiB needed for data, 0.00 GiB free"):
        synthesize(tmp_path / "data", videos=10, progress=False)
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize(
    ("error", "seen"),
    [(OSError(28, "No space left on device"), StorageError), (KeyboardInterrupt(), KeyboardInterrupt)],
)
def test_a_failure_leaves_no_files(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, error: BaseException, seen: type[BaseException]
) -> None:
    written = []
    original = writer._write_at

    def fail_later(*args: Any) -> None:
        written.append(args)
        if len(written) > 5:
            raise error
        original(*args)

    monkeypatch.setattr(writer, "_write_at", fail_later)
    with pytest.raises(seen):
        synthesize(tmp_path / "data", videos=40, **SMALL)
    assert list(tmp_path.iterdir()) == []


def test_a_folder_created_in_the_meantime_is_not_overwritten(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    out = tmp_path / "data"
    original = writer.write_array

    def appear(*args: Any) -> None:
        out.mkdir(exist_ok=True)
        (out / "mine.txt").write_text("precious")
        original(*args)

    monkeypatch.setattr("cmran.data.synthetic.write_array", appear)
    with pytest.raises(StorageError, match="created by another process in the meantime"):
        synthesize(out, videos=5, **SMALL)
    assert [file.name for file in tmp_path.iterdir()] == ["data"]
    assert [file.name for file in out.iterdir()] == ["mine.txt"]


GENERATE = """
import sys
from pathlib import Path
from cmran.data.synthetic import synthesize
synthesize(Path(sys.argv[1]), videos=5000, grid=4, visual_features=64, progress=False)
"""


def start_generator(out: Path) -> subprocess.Popen[bytes]:
    """Start a process that generates `out`, and wait until it writes."""
    process = subprocess.Popen([sys.executable, "-c", GENERATE, str(out)], env=os.environ | {"PYTHONPATH": os.getcwd()})
    deadline = time.monotonic() + 60
    while not list(out.parent.glob("data.partial-*/visual_feature.h5")):
        assert process.poll() is None, "the process ended before it wrote anything"
        assert time.monotonic() < deadline, "the process wrote nothing for 60 s"
        time.sleep(0.01)
    return process


def test_a_killed_generator_leaves_no_folder_that_looks_complete(tmp_path: Path) -> None:
    out = tmp_path / "data"
    process = start_generator(out)
    process.send_signal(signal.SIGKILL)
    assert process.wait(60) == -signal.SIGKILL
    (left,) = tmp_path.iterdir()
    assert re.fullmatch(r"data\.partial-[0-9a-f]{8}", left.name)
    assert not (left / ANNOTATIONS).exists()
    # The next generator removes the folder of the killed one, and nothing else.
    other = tmp_path / "data.partial-of-mine"
    other.mkdir()
    synthesize(out, videos=5, **SMALL)
    assert sorted(file.name for file in tmp_path.iterdir()) == ["data", "data.partial-of-mine"]
    assert not any(file.name.startswith(".") for file in out.iterdir())


def test_an_interrupted_generator_leaves_no_files(tmp_path: Path) -> None:
    process = start_generator(tmp_path / "data")
    # The partial folder of a living process stays when another one generates the same folder.
    (partial,) = tmp_path.glob("data.partial-*")
    synthesize(tmp_path / "data", videos=5, **SMALL)
    assert partial.exists() or process.poll() is not None
    process.send_signal(signal.SIGINT)
    assert process.wait(60) != 0
    assert [file.name for file in tmp_path.iterdir()] == ["data"]
