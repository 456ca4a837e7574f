"""What each job takes: one frozen record a job, every field described and bounded.

From these come the forms in Prefect's UI, the options of the `cmran` command and the checks of both.
"""

import contextlib
import logging
import math
import os
from collections.abc import Mapping
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING

from pydantic import Field

from cmran.config import (
    Frozen,
    Mode,
    SelectionSplit,
    Variant,
)
from cmran.errors import CmranError
from flows.jobs.common import PARENT_HELP, MarkdownResult, RunId, VariantChoice, marked, mlflow_run, paragraphs, table
from flows.jobs.export import ExportResult, export_with_parity_check, log_parity, parity_data, val_batches

if TYPE_CHECKING:
    from cmran.tracking import Registered
    from flows.jobs.models import FoundModel
    from serving.variants import VariantReport


class ReleaseParameters(Frozen):
    """Export, prove and register a model; it becomes champion or challenger."""

    checkpoint: str = Field(
        min_length=1, description="Folder of a run, best.pt, a published .pth.tar or the id of an MLflow run."
    )
    data: Path | None = Field(
        None, description="Folder whose val videos are compared too. Default: the model's own, if it is still there."
    )
    mode: Mode | None = Field(None, description="Of a published .pth.tar. Default: as its weights tell.")
    out: Path | None = Field(None, description="Keep the ONNX file here as well, its variants beside it.")
    variant: VariantChoice = Field(
        "auto",
        description="Faster variant to make besides float32; auto makes int8 (CPU) and float16 (CUDA). One that this "
        "machine cannot run, or that differs too much on val, is left out.",
    )
    study: str | None = Field(None, description="Name of the study that found the settings; a tag of the version.")
    parent_run_id: RunId | None = Field(None, description=PARENT_HELP)


@dataclass(frozen=True, kw_only=True)
class VariantResult:
    """A variant of a release: made and proven, or why not."""

    variant: Variant
    path: Path | None
    # None where it was left out.
    parity: "VariantReport | None"
    # None where none was possible.
    reason: str = ""
    # Why it was left out.

    def tags(self) -> dict[str, object]:
        """What the registered version says of it."""
        if self.parity is None or self.reason:
            return {f"{self.variant}_left_out": self.reason}
        return {
            f"{self.variant}_equal_segments": self.parity.equal_segments,
            f"{self.variant}_max_abs_difference": self.parity.max_abs_difference,
            f"{self.variant}_val_videos": self.parity.rows,
            f"{self.variant}_provider": self.parity.provider,
        }

    def cells(self) -> tuple[object, ...]:
        """A line of the table of variants."""
        parity = self.parity
        equal = None if parity is None or parity.equal_segments is None else f"{100 * parity.equal_segments:.3f} %"
        difference = None if parity is None or parity.max_abs_difference is None else f"{parity.max_abs_difference:.3g}"
        videos = None if parity is None else parity.rows
        return self.variant, equal, difference, videos, f"LEFT OUT: {self.reason}" if self.reason else "registered"


@dataclass(frozen=True, kw_only=True)
class ReleaseResult(MarkdownResult):
    """A registered version."""

    export: ExportResult
    registered: "Registered"
    run_id: str
    val_accuracy: float | None
    test_accuracy: float | None
    selection_split: SelectionSplit
    variants: tuple[VariantResult, ...] = ()
    ok: bool = True

    def markdown(self) -> str:
        """What was registered, and the proof."""
        found = self.registered
        selected = {"val": "", "test": ", selected on test", "unknown": ", selection split unknown"}
        rows = (
            ("registered as", f"{found.name} version {found.version}"),
            ("alias", f"{found.alias} ({found.reason})"),
            ("val accuracy, %", self.val_accuracy),
            (f"test accuracy, %{selected[self.selection_split]}", self.test_accuracy),
            ("MLflow run", self.run_id),
        )
        head = ("variant", "equal labels", "largest difference", "val videos", "")
        variants = [table(head, (made.cells() for made in self.variants))] if self.variants else []
        return paragraphs(
            [
                f"# Release: models:/{found.name}@{found.alias}",
                table(("release", ""), rows),
                *variants,
                self.export.markdown(),
            ]
        )


log = logging.getLogger(__name__)


def release_job(parameters: ReleaseParameters, *, run_id: str | None = None) -> ReleaseResult:
    """Export, prove and register. Raises CmranError where the proof fails: nothing is registered then."""
    import tempfile

    from cmran import tracking
    from flows.jobs.models import find_model
    from serving.parity import raise_if_failed

    with contextlib.ExitStack() as stack:
        # Before the stores are asked: where there is no such model, no database is made.
        found = stack.enter_context(find_model(parameters.checkpoint, parameters.mode))
        tracking.connect_registry()
        scores = _scores(found, parameters.data)
        # A folder of its own where the file is not kept.
        scratch = stack.enter_context(tempfile.TemporaryDirectory(prefix="cmran-"))
        out = parameters.out or Path(scratch) / f"cmran-{found.mode}.onnx"
        export = replace(export_with_parity_check(found, out, parameters.data), kept=parameters.out is not None)
        raise_if_failed(export.parity)
        variants = _variants(found, out, parameters)

        known = found.run_id is not None and tracking.run_exists(found.run_id)
        if known and found.run_id is not None:
            home = tracking.open_run(found.run_id)
        else:
            name = Path(parameters.checkpoint).name
            home = stack.enter_context(mlflow_run("release", name, found.mode, parameters.parent_run_id, run_id))
        log_parity(home, export)
        for made in variants:
            if made.parity is not None:
                home.log_text(made.parity.model_dump_json(indent=2), f"release/parity-{made.variant}.json")
        git = tracking.git_state()
        # A test score of a model that was selected on test is not a test score.
        test = marked("test_accuracy", found.selection_split)
        registered = tracking.register_release(
            onnx_path=out,
            run_id=home.run_id,
            mode=found.mode,
            val_accuracy=scores.val,
            fingerprint=scores.fingerprint,
            selection_split=found.selection_split,
            not_champion=scores.not_champion,
            tags={
                test: scores.test,
                "parity_max_abs_difference": export.parity.max_abs_difference,
                "parity_equal_segments": export.parity.equal_segments,
                "parity_val_videos": export.parity.rows,
                "git_commit": None if git is None else git.commit,
                "git_dirty": None if git is None else str(git.dirty).lower(),
                "study": parameters.study,
                "recipe": None if found.config is None else found.config.recipe,
                **{f"init_{key}": value for key, value in found.init_known().items()},
                **{key: value for made in variants for key, value in made.tags().items()},
            },
            variants={made.variant: made.path for made in variants if made.path is not None},
        )
        result = ReleaseResult(
            export=export,
            registered=registered,
            run_id=home.run_id,
            val_accuracy=scores.val,
            test_accuracy=scores.test,
            selection_split=found.selection_split,
            variants=variants,
        )
        home.log_text(result.markdown(), "release/release.md")
        if run_id is not None and run_id != home.run_id:
            adopted = tracking.open_run(run_id)
            adopted.set_tags({"cmran.job": "release", "cmran.mode": found.mode, "cmran.version": registered.uri})
            adopted.log_text(result.markdown(), "release.md")
    return result


def _variants(found: "FoundModel", base: Path, parameters: ReleaseParameters) -> tuple[VariantResult, ...]:
    """The variants asked for, made beside `base` and proven on val. What is not proven leaves no file."""
    from cmran.data.dataset import open_folder
    from serving.session import cuda_works
    from serving.variants import check_variant, make_variant

    choices: dict[str, tuple[Variant, ...]] = {"auto": ("int8", "float16"), "int8": ("int8",), "float16": ("float16",)}
    made: list[VariantResult] = []
    paths = {variant: base.with_name(f"{base.stem}.{variant}.onnx") for variant in choices["auto"]}
    for path in paths.values():
        if path.exists():
            log.info("removed %s, a variant of an earlier release", path)
            path.unlink()
    for variant in choices.get(parameters.variant, ()):
        path, parity, reason = paths[variant], None, ""
        unchecked = path.with_name(f"{path.name}.unproven")
        folder_path, why_not = parity_data(found, parameters.data)
        if folder_path is None:
            reason = f"no val video to prove it on: {why_not}"
        elif variant == "float16" and not cuda_works(base):
            reason = "it is for CUDA, which ONNX Runtime cannot use here: it cannot be proven"
        else:
            log.info("making variant %s", variant)
            try:
                make_variant(base, variant, unchecked)
                with open_folder(folder_path, mode=found.mode) as folder:
                    parity = check_variant(unchecked, base, val_batches(folder, folder.order("val")))
                if parity.passed:
                    os.replace(unchecked, path)
                else:
                    reason = "; ".join(parity.failures)
            except CmranError as error:
                reason = str(error)
            finally:
                unchecked.unlink(missing_ok=True)
        if reason:
            log.warning("variant %s is LEFT OUT of the release: %s", variant, reason)
        made.append(VariantResult(variant=variant, path=None if reason else path, parity=parity, reason=reason))
    return tuple(made)


@dataclass(frozen=True, kw_only=True)
class _Scores:
    """Val and test accuracy in % and the data that they were measured on."""

    val: float | None
    test: float | None
    fingerprint: str
    baseline: float | None
    """The best accuracy on val in % of a rule that needs no network; None where it is not known."""

    @property
    def not_champion(self) -> str | None:
        """Why a model with these scores must not become champion; None where nothing speaks against it."""
        if self.val is None or not math.isfinite(self.val):
            return "it has no accuracy on val"
        if self.baseline is None:
            return (
                "the trivial baselines on val are not known: finish the training, or give the folder that it was "
                "trained on"
            )
        if self.val <= self.baseline:
            return f"val accuracy {self.val:.3f} is not above {self.baseline:.3f} of the best trivial baseline"
        return None


def _scores(found: "FoundModel", data: Path | None) -> _Scores:
    """What the training measured; a published checkpoint is measured here."""
    from cmran.data.dataset import open_folder

    if found.fingerprint is not None:
        val, test, baseline = found.val_accuracy, None, None
        if found.metrics is not None:
            val, test = found.metrics["val"]["accuracy"], (found.metrics["test"] or {}).get("accuracy")
            baseline = _best_baseline(found.metrics["val"].get("baselines") or {})
        if baseline is None and (path := data or found.data) is not None and path.is_dir():
            from cmran.evaluation.metrics import trivial_baselines

            with open_folder(path, mode=found.mode) as folder:
                if folder.fingerprint == found.fingerprint:
                    labels = folder.segment_labels()
                    trivial = trivial_baselines(labels[folder.order("val")], train_labels=labels[folder.order("train")])
                    baseline = _best_baseline(asdict(trivial))
        return _Scores(val=val, test=test, fingerprint=found.fingerprint, baseline=baseline)
    if data is None:
        raise CmranError(f"{found.name}: a published checkpoint does not tell its data: give the folder with --data")
    from cmran.training.inference import evaluate_split
    from cmran.utils.device import pick_device

    with open_folder(data, mode=found.mode) as folder:
        found.check_fits(folder)
        val_scores, test_scores = (
            evaluate_split(found.model, folder, split, device=pick_device("auto"))[0] for split in ("val", "test")
        )
        return _Scores(
            val=val_scores.accuracy,
            test=test_scores.accuracy,
            fingerprint=folder.fingerprint,
            baseline=_best_baseline(val_scores.to_dict()["baselines"]),
        )


def _best_baseline(baselines: Mapping[str, float | None]) -> float | None:
    """The higher of the two rules that anyone could use, in %; None where neither is known."""
    rules = (baselines.get("always_background"), baselines.get("most_frequent_label"))
    return max((rule for rule in rules if rule is not None), default=None)
