"""Prepare a trained network for release: export with a parity check on val videos, precision variants, scores.

Shape letters: B videos, T segments, H x W grid, C visual channels, A audio features.
"""

import logging
import math
import os
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from cmran.config import Mode, Variant
from cmran.data.dataset import FeatureFolder, open_folder
from cmran.data.fingerprint import folder_fingerprint
from cmran.errors import CmranError, ConfigError, DataError
from cmran.evaluation.metrics import trivial_baselines
from cmran.model.network import CMRAN
from cmran.training.inference import evaluate_split
from cmran.utils.device import pick_device
from cmran.utils.progress import Progress
from serving import export, parity, session, variants
from serving.parity import ParityReport
from serving.variants import VariantReport

PARITY_BATCH = 32
"""Val videos per batch of a parity check, which compares all of them."""
VARIANTS: tuple[Variant, ...] = ("int8", "float16")
"""The precision variants that a release can have besides float32."""

_log = logging.getLogger(__name__)


def find_parity_data(data: Path | None, *, recorded: Path | None, fingerprint: str | None) -> tuple[Path | None, str]:
    """Choose the data folder whose val videos a parity check compares.

    Args:
        data: The folder that the caller named; it is always used.
        recorded: The folder on which the model was trained, as its checkpoint records it.
        fingerprint: Fingerprint of that folder at the time of the training.

    Returns:
        The folder and "", or `None` and the reason why there is none.
    """
    if data is not None:
        return data, ""
    if recorded is None:
        return None, "a published checkpoint does not name its data, and `data` was not given"
    if not recorded.is_dir():
        return None, f"its data folder {recorded} is not there any more, and `data` was not given"
    if folder_fingerprint(recorded) != fingerprint:
        return None, f"the data in {recorded} have changed since the training, and `data` was not given"
    return recorded, ""


def val_batches(folder: FeatureFolder) -> Iterator[tuple[NDArray[np.float32], NDArray[np.float32]]]:
    """Yield visual maps (B, T, H, W, C) and audio embeddings (B, T, A) of all val videos, PARITY_BATCH at a time.

    Raises:
        DataError: A feature is not finite.
    """
    rows = folder.order("val")
    with Progress(len(rows), "parity check", "videos") as bar:
        for start in range(0, len(rows), PARITY_BATCH):
            part = rows[start : start + PARITY_BATCH]
            visual, audio = folder.read_visual(part), folder.read_audio(part)
            # The sums are a fast check: they are finite only if all features are.
            if not (np.isfinite(visual.sum()) and np.isfinite(audio.sum())):
                folder.check_finite(part)
            yield visual, audio
            bar.update(len(part))


def export_with_parity_check(
    model: CMRAN,
    out: Path,
    folder: FeatureFolder | None = None,
    *,
    segments: int = 10,
    grid: tuple[int, int] = (7, 7),
    metadata: Mapping[str, str] | None = None,
) -> tuple[Path, ParityReport]:
    """Export a network to ONNX. The file gets the name `out` only if it passes the parity check.

    Args:
        model: The network.
        out: The ONNX file to write.
        folder: An open data folder, whose val videos are compared besides random ones.
        segments: T of the training data. Default: of the published features.
        grid: (H, W) of the training data. Default: of the published features.
        metadata: Lineage for the metadata of the file, see `export_onnx`.

    Returns:
        The file and the report. A file that failed the check has the name `out` with the suffix ".unchecked", and a
        file that was at `out` before is not changed.

    Raises:
        ConfigError: `out` is a folder, a device or a pipe.
        DataError: The features of `folder` have other sizes than the training data, or are not finite.
        StorageError: The file cannot be written.
    """
    if out.is_dir():
        example = out / f"cmran-{model.config.mode}.onnx"
        raise ConfigError(f"{out} is a folder", hint=f"name the ONNX file to write, such as {example}")
    if out.exists() and not out.is_file():
        raise ConfigError(f"{out} is a device or a pipe, expected the name of an ONNX file", hint="choose another name")
    if folder is not None and (folder.segments, folder.grid) != (segments, grid):
        raise DataError(
            f"{folder.path}: found {folder.segments} segments and a {folder.grid[0]}x{folder.grid[1]} grid,"
            f" expected {segments} and {grid[0]}x{grid[1]}, as in the training data of the model",
            hint="name other `data`",
        )
    unchecked = out.with_name(f"{out.name}.unchecked")
    export.export_onnx(model, unchecked, segments=segments, grid=grid, metadata=metadata)
    try:
        report = parity.check_parity(unchecked, model, real=() if folder is None else val_batches(folder))
    except CmranError:
        # The data cannot be read or are not finite, which says nothing about the file.
        unchecked.unlink(missing_ok=True)
        raise
    if not report.passed:
        return unchecked, report
    os.replace(unchecked, out)
    return out, report


@dataclass(frozen=True, kw_only=True)
class ReleaseVariant:
    """A precision variant of a release, or the reason why the release does not have it."""

    variant: Variant
    """Number format of the variant."""
    path: Path | None
    """The ONNX file; `None` if the variant is left out."""
    parity: VariantReport | None
    """Its comparison with float32; `None` if it could not be compared."""
    reason: str = ""
    """Why the variant is left out."""

    def tags(self) -> dict[str, object]:
        """Return the tags of the registered version."""
        if self.parity is None or self.reason:
            return {f"{self.variant}_left_out": self.reason}
        return {
            f"{self.variant}_equal_segments": self.parity.equal_segments,
            f"{self.variant}_max_abs_difference": self.parity.max_abs_difference,
            f"{self.variant}_val_videos": self.parity.rows,
            f"{self.variant}_provider": self.parity.provider,
        }


def make_checked_variants(
    base: Path, wanted: Sequence[Variant], data: Path | None, *, mode: Mode, no_data: str = ""
) -> tuple[ReleaseVariant, ...]:
    """Make precision variants beside a float32 model and compare each with it on all val videos.

    Variants of an earlier release beside `base` are removed. A variant that fails the comparison, or that this machine
    cannot run, leaves no file; the reason is logged.

    Args:
        base: The float32 model. The files are named after it, such as model.int8.onnx for model.onnx.
        wanted: The variants to make.
        data: Data folder with the val videos; `None` if there is none.
        mode: Mode of the model.
        no_data: The reason why there is no data folder.

    Returns:
        One record for each of `wanted`.
    """
    paths = {variant: base.with_name(f"{base.stem}.{variant}.onnx") for variant in VARIANTS}
    for path in paths.values():
        if path.exists():
            _log.info("removed %s, a variant of an earlier release", path)
            path.unlink()
    return tuple(_checked_variant(base, variant, paths[variant], data, mode, no_data) for variant in wanted)


def _checked_variant(
    base: Path, variant: Variant, path: Path, data: Path | None, mode: Mode, no_data: str
) -> ReleaseVariant:
    report, level = None, logging.WARNING
    if data is None:
        reason = f"there is no val video to check it on: {no_data}"
    elif variant == "float16" and not session.cuda_works(base):
        # Usual on a machine without a GPU: there is nothing to do about it.
        level = logging.INFO
        reason = "it runs on CUDA only, which ONNX Runtime cannot use on this machine, so that it cannot be checked"
    else:
        _log.info("making the variant %s", variant)
        unchecked = path.with_name(f"{path.name}.unchecked")
        try:
            variants.make_variant(base, variant, unchecked)
            with open_folder(data, mode=mode) as folder:
                report = variants.check_variant(unchecked, base, val_batches(folder))
            reason = "; ".join(report.failures)
            if report.passed:
                os.replace(unchecked, path)
        except CmranError as error:
            reason = str(error)
        finally:
            unchecked.unlink(missing_ok=True)
    if reason:
        _log.log(level, "the variant %s is left out of the release: %s", variant, reason)
    return ReleaseVariant(variant=variant, path=None if reason else path, parity=report, reason=reason)


@dataclass(frozen=True, kw_only=True)
class Scores:
    """Accuracies of a model in %, and the data on which they were measured."""

    val: float | None
    """On val."""
    test: float | None
    """On test."""
    fingerprint: str
    """Fingerprint of the data folder."""
    baseline: float | None
    """The better of the two trivial baselines on val; `None` if they are unknown."""

    @property
    def not_champion(self) -> str | None:
        """Why a model with these scores must not become champion; `None` if it may."""
        if self.val is None or not math.isfinite(self.val):
            return "it has no accuracy on val"
        if self.baseline is None:
            return "the trivial baselines on val are not known: finish the training, or name the `data` of the training"
        if self.val <= self.baseline:
            return f"val accuracy {self.val:.3f} is not above {self.baseline:.3f} of the best trivial baseline"
        return None


def recorded_scores(
    fingerprint: str, val_accuracy: float | None, metrics: Mapping[str, Any] | None, data: Path | None, *, mode: Mode
) -> Scores:
    """Return the scores that the training of a checkpoint measured.

    Args:
        fingerprint: Fingerprint of the training data.
        val_accuracy: Accuracy on val that the checkpoint records, in %.
        metrics: metrics.json of the training, if it is known.
        data: The data folder. If `metrics` lacks the trivial baselines, they are computed from its labels, provided
            that it has the fingerprint of the training data.
        mode: Mode of the model.
    """
    val, test, baseline = val_accuracy, None, None
    if metrics is not None:
        val, test = metrics["val"]["accuracy"], (metrics["test"] or {}).get("accuracy")
        baseline = _best_baseline(metrics["val"].get("baselines") or {})
    if baseline is None and data is not None and data.is_dir():
        with open_folder(data, mode=mode) as folder:
            if folder.fingerprint == fingerprint:
                labels = folder.segment_labels()
                trivial = trivial_baselines(labels[folder.order("val")], train_labels=labels[folder.order("train")])
                baseline = _best_baseline(asdict(trivial))
    return Scores(val=val, test=test, fingerprint=fingerprint, baseline=baseline)


def measure_scores(model: CMRAN, folder: FeatureFolder) -> Scores:
    """Measure the scores of a checkpoint that records none, such as a published one, on val and test of `folder`."""
    val, test = (evaluate_split(model, folder, split, device=pick_device("auto"))[0] for split in ("val", "test"))
    return Scores(
        val=val.accuracy,
        test=test.accuracy,
        fingerprint=folder.fingerprint,
        baseline=_best_baseline(val.to_dict()["baselines"]),
    )


def _best_baseline(baselines: Mapping[str, float | None]) -> float | None:
    """The better of the two rules that need no network, in %; None if neither is known."""
    rules = (baselines.get("always_background"), baselines.get("most_frequent_label"))
    return max((rule for rule in rules if rule is not None), default=None)
