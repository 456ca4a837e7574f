"""Arrays with axes in the wrong order: the validator and the reader report the same fault with the conversion."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from cmran.config import ModelConfig, RunConfig, TrainConfig
from cmran.data import layout
from cmran.data.dataset import open_folder
from cmran.data.rules import check_axes
from cmran.data.validation import validate
from cmran.errors import CmranError
from cmran.training.inference import check_fits
from tests.helpers import make_folder, read, write

SIZES: dict[str, dict[str, int]] = {
    "tiny": {},
    "7x7": {"grid": 7, "visual_features": 32, "audio_features": 16, "segments": 10},
}

V, A, L, M = "visual_feature.h5", "audio_feature.h5", "labels.h5", "mil_labels.h5"
VN, AN = "visual_feature_noisy.h5", "audio_feature_noisy.h5"


def transpose(names: tuple[str, ...], *order: int) -> Callable[[Path], None]:
    def change(folder: Path) -> None:
        for name in names:
            write(folder / name, np.ascontiguousarray(read(folder / name).transpose(order)))

    return change


def edit(name: str, function: Callable[[np.ndarray], Any], key: str = "avadataset") -> Callable[[Path], None]:
    return lambda folder: write(folder / name, function(read(folder / name, key)), key)


@pytest.fixture(params=SIZES.values(), ids=SIZES)
def folder(request: pytest.FixtureRequest, tmp_path: Path) -> Path:
    return make_folder(tmp_path / "data", **request.param)


@pytest.mark.parametrize("mode", ["full", "weak"])
@pytest.mark.parametrize(
    ("change", "name", "words"),
    [
        (transpose((V,), 0, 1, 4, 2, 3), V, "(N, T, C, H, W)"),
        (transpose((V, VN), 0, 1, 4, 2, 3), V, "(N, T, C, H, W)"),
        (transpose((V,), 0, 1, 2, 4, 3), V, "(N, T, H, C, W)"),
        (transpose((V, VN), 0, 4, 1, 2, 3), V, "(N, C, T, H, W)"),
        (transpose((V,), 0, 2, 3, 1, 4), V, "(N, H, W, T, C)"),
        (transpose((V,), 1, 0, 2, 3, 4), V, "(T, N, H, W, C)"),
        (transpose((A,), 0, 2, 1), A, "(N, A, T)"),
        (transpose((A,), 1, 0, 2), A, "(T, N, A)"),
        (transpose((L,), 1, 0, 2), L, "(T, N, 29)"),
        (transpose((L,), 0, 2, 1), L, "(N, 29, T)"),
        (edit(A, lambda a: a[:, None]), A, "np.squeeze(array, 1)"),
        (edit(A, lambda a: a[..., None]), A, "np.squeeze(array, 3)"),
        (edit(V, lambda a: a[:, None]), V, "np.squeeze(array, 1)"),
        (edit(V, lambda a: a.reshape(*a.shape[:2], -1, a.shape[-1])), V, "array.reshape(N, T,"),
        (edit(V, lambda a: a.reshape(-1, *a.shape[2:])), V, "rows and segments"),
        (edit(V, lambda a: a.mean((2, 3))), V, "averaged over the grid"),
        (edit(V, lambda a: np.zeros((12, a.shape[1], 7 * 7 * 512), np.float32)), V, "array.reshape(N, T, 7, 7, 512)"),
        (edit(L, lambda a: a[..., :28]), L, "background has no column"),
        (edit(L, lambda a: a.argmax(-1)), L, "np.eye(29)[array]"),
        (edit("val_order.h5", lambda a: a[:, None], "order"), "val_order.h5", "array.ravel()"),
        (edit("val_order.h5", lambda a: a[None], "order"), "val_order.h5", "array.ravel()"),
    ],
)
def test_the_order_and_the_conversion_are_reported(
    folder: Path, change: Callable[[Path], None], name: str, words: str, mode: Any
) -> None:
    change(folder)
    report = validate(folder, mode, progress=False)
    (fault,) = (fault for fault in report.errors if fault.file == name)
    assert words in fault.hint
    assert "\n" not in str(fault)
    with pytest.raises(CmranError) as caught, open_folder(folder, mode=mode) as data:
        data.order("val")
    assert str(caught.value) == f"{folder}: {fault}"


def test_transposed_video_labels_are_reported_in_weak_mode(folder: Path) -> None:
    transpose((M,), 1, 0)(folder)
    (fault,) = validate(folder, "weak", progress=False).errors
    assert "(29, N)" in fault.hint


def test_three_transposed_files_that_agree_with_each_other_are_reported(folder: Path) -> None:
    transpose((V,), 1, 0, 2, 3, 4)(folder)
    transpose((A, L), 1, 0, 2)(folder)
    faults = validate(folder, "weak", progress=False).errors
    assert [(fault.code, fault.file) for fault in faults] == [("axis_order", name) for name in (L, V, A)]


@pytest.mark.parametrize(("name", "order"), [(A, (0, 2, 1)), (V, (0, 4, 1, 2, 3)), (V, (0, 1, 4, 2, 3))])
def test_inference_without_labels_reports_the_same_fault(folder: Path, name: str, order: tuple[int, ...]) -> None:
    transpose((name,), *order)(folder)
    expected = next(fault for fault in validate(folder, progress=False).errors if fault.file == name)
    for path in (L, M, "Annotations.txt"):
        (folder / path).unlink()
    with pytest.raises(CmranError) as caught, open_folder(folder, need_labels=False):
        pass
    assert str(caught.value) == f"{folder}: {expected}"


def test_published_sizes() -> None:
    good = {spec: spec.published_shape for spec in layout.FILES if spec.kind != "order"}
    assert check_axes(good, 4143) == []
    N, T, H, W, C = good[layout.VISUAL]
    for shape in ((N, T, C, H, W), (N, C, T, H, W), (N, H, W, T, C), (T, N, H, W, C), (N, T, H, C, W), (C, N, T, H, W)):
        (found,) = check_axes({**good, layout.VISUAL: shape}, 4143)
        assert (found.spec, found.certain) == (layout.VISUAL, True)
        axes = found.fault.hint.split("np.transpose(array, (")[1].split(")")[0]
        order = [int(axis) for axis in axes.split(",")]
        assert tuple(shape[axis] for axis in order) == (N, T, H, W, C)


def test_small_valid_folders_are_not_reported() -> None:
    """All sizes with a square grid, and other grids with at least as many channels as cells on a side."""
    for videos in (4, 7, 12):
        for segments in (1, 2, 4, 7, 10):
            for height, width in ((1, 1), (2, 2), (3, 3), (7, 7), (2, 3), (7, 4)):
                for channels in (1, 2, 3, 4, 6, 7, 10, 32):
                    if height != width and channels < max(height, width):
                        continue
                    for audio in (1, 4, 5, 7, 10, 12):
                        shapes = {
                            layout.VISUAL: (videos, segments, height, width, channels),
                            layout.AUDIO: (videos, segments, audio),
                            layout.LABELS: (videos, segments, 29),
                            layout.MIL_LABELS: (videos, 29),
                            layout.VISUAL_NOISY: (3, segments, height, width, channels),
                            layout.AUDIO_NOISY: (3, segments, audio),
                            layout.LABELS_NOISY: (3, 29),
                        }
                        assert check_axes(shapes, videos) == []
                        assert check_axes({spec: shapes[spec] for spec in (layout.VISUAL, layout.AUDIO)}) == []


def test_a_suspicious_order_is_a_warning(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    folder = make_folder(tmp_path / "data")
    for name in (V, VN):
        values = read(folder / name)
        write(folder / name, np.repeat(np.repeat(values[..., :2], 3, axis=2)[:, :, :5], 2, axis=3)[..., :2])
    report = validate(folder, "weak", progress=False)
    assert report.ok
    assert {(fault.code, fault.file) for fault in report.warnings} == {("axis_order", V), ("axis_order", VN)}
    with open_folder(folder, mode="weak") as data:
        assert data.grid == (5, 4)
    assert "(N, T, C, H, W)" in caplog.text


def test_maps_averaged_over_the_grid_are_a_warning(tmp_path: Path) -> None:
    report = validate(make_folder(tmp_path / "data", grid=1, visual_features=64), "full", progress=False)
    assert report.ok
    assert [warning.file for warning in report.warnings] == [V, VN]
    assert "averaged over the grid" in report.warnings[0].hint


def test_no_hint_to_set_the_features_to_the_length_of_another_axis(tmp_path: Path) -> None:
    folder = make_folder(tmp_path / "data", grid=7, visual_features=6)
    model = ModelConfig(visual_features=7, audio_features=5)
    with open_folder(folder) as data, pytest.raises(CmranError) as caught:
        check_fits(RunConfig(recipe="debug", model=model, train=TrainConfig()), data)
    assert "axes seem to be in another order" in str(caught.value)
    assert "set model.visual_features" not in str(caught.value)
