"""What the jobs give back, and how it reads as Markdown: on the terminal, in Prefect's artifacts and in MLflow's."""

import itertools
import re
import shlex
import time
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, Protocol

from cmran.config import Frozen, Mode, SelectionSplit, Variant
from cmran.errors import UserError

if TYPE_CHECKING:
    from cmran.data.packing import PackInfo
    from cmran.data.validation import Report
    from cmran.tracking import Registered
    from cmran.training import FitResult
    from search.worker import SearchResult
    from serving.batch import Manifest
    from serving.export import Proof
    from serving.variants import VariantProof

SELECTED_ON_TEST = (
    "**Selected on the test split** (`selection_split: test`, the published rule): for comparison only, "
    "too high for an honest figure."
)


def marked(name: str, selection_split: SelectionSplit) -> str:
    """The name of a figure, or of a group of them, with the mark of a model that was not surely selected on val."""
    return name + {"val": "", "test": "_selected_on_test", "unknown": "_selection_unknown"}[selection_split]


def headed(split: str, selection_split: SelectionSplit) -> str:
    """The heading of a split's scores: which of them are no measure of new videos, and why."""
    if split == "no_split":
        return "## Videos in no split"
    notes = {"train": " (training data: no measure of new videos)"}
    if selection_split != "unknown":
        notes[selection_split] = " (the epoch was selected on it)"
    return f"## {split}{notes.get(split, '')}"


class Result(Protocol):
    """What the command line and the flows need of every result."""

    @property
    def ok(self) -> bool:
        """Whether the command succeeds."""

    def markdown(self) -> str:
        """What a person wants to know of it."""

    def text(self) -> str:
        """The same on a terminal."""


class _Readable:
    """A result whose Markdown is fit for a terminal too."""

    def markdown(self) -> str:
        raise NotImplementedError

    def text(self) -> str:
        """The Markdown with its tables in line."""
        return aligned(self.markdown())


def table(head: Sequence[str], rows: Iterable[Sequence[object]]) -> str:
    """A Markdown table, all columns but the first to the right."""
    lines = [head, ["---", *(["---:"] * (len(head) - 1))], *([_cell(value) for value in row] for row in rows)]
    return "\n".join(f"| {' | '.join(line)} |" for line in lines)


def aligned(markdown: str) -> str:
    """The same Markdown with the columns of its tables in line, for reading as plain text."""
    lines, done = markdown.split("\n"), list[str]()
    for is_table, group in itertools.groupby(lines, key=lambda line: line.startswith("|")):
        part = list(group)
        done += _aligned_table(part) if is_table else part
    return "\n".join(done)


def _aligned_table(lines: list[str]) -> list[str]:
    rows = [[cell.strip() for cell in re.split(r"(?<!\\)\|", line)[1:-1]] for line in lines]
    rule = rows[1] if len(rows) > 1 else []
    widths = [max(len(row[i]) if i < len(row) and row is not rule else 3 for row in rows) for i in range(len(rows[0]))]

    def padded(row: list[str]) -> str:
        cells = []
        for cell, mark, width in zip(row, rule, widths, strict=True):
            if row is rule:
                cells.append("-" * (width - 1) + ":" if mark.endswith(":") else "-" * width)
            else:
                cells.append(cell.rjust(width) if mark.endswith(":") else cell.ljust(width))
        return f"| {' | '.join(cells)} |"

    return [padded(row) for row in rows] if rule and all(len(row) == len(rule) for row in rows) else lines


def _paragraphs(parts: Iterable[str]) -> str:
    return "\n\n".join(part.strip("\n") for part in parts)


def _cell(value: object) -> str:
    if value is None:
        return "-"
    text = f"{value:.2f}" if isinstance(value, float) else str(value)
    return text.replace("|", "\\|")


@dataclass(frozen=True, kw_only=True)
class ValidationResult:
    """Report on a folder."""

    data: Path
    mode: Mode
    report: "Report"

    @property
    def ok(self) -> bool:
        """No error; there may be warnings."""
        return self.report.ok

    def markdown(self) -> str:
        """The report as it stands."""
        return self.report.to_markdown()

    def text(self) -> str:
        """One line a fault, for a terminal is too narrow for the table."""
        kinds = (("error", self.report.errors), ("warning", self.report.warnings))
        lines = [f"{kind} {fault}" for kind, faults in kinds for fault in faults]
        end = (
            f"{self.data}: {self.report.summary()} (mode {self.mode}); fingerprint {self.report.fingerprint or 'none'}"
        )
        return "\n".join([*lines, end])

    def require(self) -> None:
        """Raises UserError where the folder has errors: one line with the first."""
        if not self.ok:
            more = f" (and {len(self.report.errors) - 1} more errors)" if len(self.report.errors) > 1 else ""
            raise UserError(f"{self.data}: not fit for mode {self.mode}: {self.report.errors[0]}{more}")


@dataclass(frozen=True, kw_only=True)
class SynthResult(_Readable):
    """A folder made."""

    out: Path
    videos: int
    background_videos: int
    bytes: int
    seconds: float
    ok: bool = True

    def markdown(self) -> str:
        """One line."""
        return (
            f"Made {self.out}: {self.videos} videos, {self.background_videos} background videos, "
            f"{self.bytes / 1e6:.0f} MB, in {self.seconds:.1f} s."
        )


@dataclass(frozen=True, kw_only=True)
class TrainResult(_Readable):
    """A finished training."""

    fit: "FitResult"
    run_id: str
    ok: bool = True

    def markdown(self) -> str:
        """Scores on val and test."""
        from cmran.figures import scores_table
        from flows.models import init_note

        fit, mode, selection = self.fit, self.fit.config.model.mode, self.fit.config.train.selection_split
        scores = {"val": fit.val} if fit.test is None else {"val": fit.val, "test": fit.test}
        lines = [
            f"# Training, {mode}: {fit.run_dir}",
            f"Best of {len(fit.epochs)} epochs: {fit.best_epoch} (recipe {fit.config.recipe}, "
            f"{fit.seconds:.1f} s, data `{fit.fingerprint}`)",
            *([f"Ended by {fit.stop_reason}"] if fit.stopped_early else []),
            *([] if fit.init is None else [init_note(fit.init)]),
            *(
                f"{headed(split, selection)}\n\n{scores_table(found, selection_split=selection)}"
                for split, found in scores.items()
            ),
            f"MLflow run {self.run_id}; checkpoint {fit.best_checkpoint}",
        ]
        return _paragraphs(lines)


@dataclass(frozen=True, kw_only=True)
class EvaluateResult(_Readable):
    """Scores of a model on one split."""

    checkpoint: str
    mode: Mode
    data: Path
    fingerprint: str
    split: str
    selection_split: SelectionSplit
    scores: dict[str, Any]
    notes: tuple[str, ...] = ()
    ok: bool = True

    def to_dict(self) -> dict[str, Any]:
        """Plain values for JSON."""
        return {
            "checkpoint": self.checkpoint,
            "mode": self.mode,
            "data": str(self.data),
            "fingerprint": self.fingerprint,
            "split": self.split,
            "selection_split": self.selection_split,
            "notes": list(self.notes),
            **self.scores,
        }

    def markdown(self) -> str:
        """Scores, baselines and the table by category."""
        from cmran.figures import per_category_table, scores_table

        lines = [
            f"# Evaluation, {self.mode}: {self.checkpoint}",
            f"Data {self.data}, `{self.fingerprint}`",
            *self.notes,
            headed(self.split, self.selection_split),
            scores_table(self.scores, selection_split=self.selection_split),
            per_category_table(self.scores, selection_split=self.selection_split),
        ]
        return _paragraphs(lines)


@dataclass(frozen=True, kw_only=True)
class SeedsResult(_Readable):
    """The same training under several seeds."""

    mode: Mode
    out: Path
    seeds: tuple[int, ...]
    spread: dict[str, dict[str, dict[str, float | int | None]]]
    # split -> score -> mean, std, min, max, n
    by_seed: dict[str, dict[str, float | None]]
    selected_on_test: bool
    run_id: str
    ok: bool = True

    def to_dict(self) -> dict[str, Any]:
        """Plain values for JSON."""
        return {
            "mode": self.mode,
            "seeds": list(self.seeds),
            "selection_split": "test" if self.selected_on_test else "val",
            "spread": self.spread,
            "by_seed": self.by_seed,
            "run_id": self.run_id,
        }

    def markdown(self) -> str:
        """Mean and spread, then each seed."""
        test = "test, selected on test" if self.selected_on_test else "test"
        rows = [
            (test if split == "test" else split, score, *(_digits(found[key]) for key in ("mean", "std", "min", "max")))
            for split, scores in self.spread.items()
            for score, found in scores.items()
        ]
        lines = [
            f"# {len(self.seeds)} seeds, {self.mode}: {self.out}",
            *([SELECTED_ON_TEST] if self.selected_on_test else []),
            table(("split", "score", "mean", "std", "min", "max"), rows),
            table(
                ("seed", "val accuracy %", f"{test} accuracy %"),
                ((seed, values["val"], values["test"]) for seed, values in self.by_seed.items()),
            ),
            f"MLflow run {self.run_id}",
        ]
        return _paragraphs(lines)


def _digits(value: float | int | None) -> str:
    return "-" if value is None else f"{value:.3f}"


@dataclass(frozen=True, kw_only=True)
class SearchJobResult(_Readable):
    """A search."""

    mode: Mode
    search: "SearchResult"
    ok: bool = True

    def markdown(self) -> str:
        """Trials and best settings."""
        from search.report import train_command

        search = self.search
        counts = ", ".join(f"{count} {state.lower()}" for state, count in search.counts.items() if count)
        params = table(("setting", "best"), ((key, _plain(value)) for key, value in search.best_params.items()))
        lines = [
            f"# Search, {self.mode}: study {search.study}",
            f"{search.n_trials} trials ({counts}); best: trial {search.best_trial}, {search.best_value:.2f} % on val",
            params,
            f"MLflow run {search.run_id}",
            f"Train with it: {train_command(self.mode, search.best_config.recipe, str(search.best_file))}",
        ]
        return _paragraphs(lines)


def _short(value: float | None) -> str:
    return "-" if value is None else f"{value:.1e}"


def _plain(value: object) -> str:
    return f"{value:.4g}" if isinstance(value, float) else str(value)


@dataclass(frozen=True, kw_only=True)
class ExportResult(_Readable):
    """An ONNX file and the proof that it says what the network says."""

    checkpoint: str
    mode: Mode
    out: Path
    proof: "Proof"
    val_videos: int = 0
    # Of the folder whose val videos were compared; 0 without one.
    notes: tuple[str, ...] = ()
    kept: bool = True
    # Whether the file outlives the command.

    @property
    def ok(self) -> bool:
        """Whether the proof passed."""
        return self.proof.passed

    def markdown(self) -> str:
        """The proof, and everything that failed in it."""
        proof = self.proof
        difference = "-" if proof.max_abs_difference is None else f"{proof.max_abs_difference:.3g}"
        equal = "-" if proof.equal_segments is None else f"{100 * proof.equal_segments:.3f} %"
        rows = (
            ("largest absolute difference", difference),
            ("equal segment labels", equal),
            ("random videos, in batches of " + ", ".join(map(str, proof.batch_sizes)), proof.videos),
            ("val videos", f"{proof.rows} of {self.val_videos}" if self.val_videos else proof.rows),
            ("provider", proof.provider),
        )
        verdict = "proof passed" if proof.passed else "PROOF FAILED"
        lines = [
            f"# Export, {self.mode}: {self.checkpoint}" + (f" -> {self.out}" if self.kept else ""),
            f"{verdict[0].upper()}{verdict[1:]}.",
            *self.notes,
            table(("ONNX Runtime against PyTorch", "found"), rows),
            *(["\n".join(f"- {failure}" for failure in proof.failures)] if proof.failures else []),
        ]
        return _paragraphs(lines)


@dataclass(frozen=True, kw_only=True)
class MadeVariant:
    """A variant of a release: made and proven, or why not."""

    variant: Variant
    path: Path | None
    # None where it was left out.
    proof: "VariantProof | None"
    # None where none was possible.
    reason: str = ""
    # Why it was left out.

    def tags(self) -> dict[str, object]:
        """What the registered version says of it."""
        if self.proof is None or self.reason:
            return {f"{self.variant}_left_out": self.reason}
        return {
            f"{self.variant}_equal_segments": self.proof.equal_segments,
            f"{self.variant}_max_abs_difference": self.proof.max_abs_difference,
            f"{self.variant}_val_videos": self.proof.rows,
            f"{self.variant}_provider": self.proof.provider,
        }

    def cells(self) -> tuple[object, ...]:
        """A line of the table of variants."""
        proof = self.proof
        equal = None if proof is None or proof.equal_segments is None else f"{100 * proof.equal_segments:.3f} %"
        difference = None if proof is None or proof.max_abs_difference is None else f"{proof.max_abs_difference:.3g}"
        videos = None if proof is None else proof.rows
        return self.variant, equal, difference, videos, f"LEFT OUT: {self.reason}" if self.reason else "registered"


@dataclass(frozen=True, kw_only=True)
class ReleaseResult(_Readable):
    """A registered version."""

    export: ExportResult
    registered: "Registered"
    run_id: str
    val_accuracy: float | None
    test_accuracy: float | None
    selection_split: SelectionSplit
    variants: tuple[MadeVariant, ...] = ()
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
        return _paragraphs(
            [
                f"# Release: models:/{found.name}@{found.alias}",
                table(("release", ""), rows),
                *variants,
                self.export.markdown(),
            ]
        )


@dataclass(frozen=True, kw_only=True)
class PredictResult(_Readable):
    """A finished batch job."""

    out: Path
    manifest: "Manifest"
    ok: bool = True

    def markdown(self) -> str:
        """What was predicted, with what, how fast."""
        from cmran.figures import scores_table

        manifest = self.manifest
        speed = "-" if manifest.videos_per_s is None else f"{manifest.videos_per_s:.1f}"
        rows = (
            ("videos", f"{manifest.rows} ({manifest.split})"),
            ("events", manifest.events),
            ("model", manifest.model.get("name") or manifest.model.get("path")),
            ("version", manifest.model.get("version")),
            ("provider", manifest.provider),
            ("variant", manifest.variant),
            ("videos/s", speed),
        )
        lines = [f"# Predictions: {self.out}", table(("batch inference", ""), rows)]
        selection = manifest.selection_split
        for split, scores in (manifest.metrics or {}).items():
            lines += [headed(split, selection), scores_table(scores, selection_split=selection)]
        lines += [f"Note: {note}." for note in manifest.notes]
        return _paragraphs(lines)


@dataclass(frozen=True, kw_only=True)
class CacheResult(_Readable):
    """Packs in the cache folder."""

    packs: tuple["PackInfo", ...]
    removed: tuple["PackInfo", ...]
    limit_bytes: int
    ok: bool = True

    def markdown(self) -> str:
        """One row a pack, and the room they take."""
        rows = [
            (
                pack.fingerprint,
                pack.source,
                f"{pack.size / 2**30:.2f}",
                time.strftime("%Y-%m-%d %H:%M", time.localtime(pack.last_use)),
                pack.state,
            )
            for pack in self.packs
        ]
        sizes = [sum(pack.size for pack in packs) / 2**30 for packs in (self.packs, self.removed)]
        parts = [table(("fingerprint", "packed from", "GiB", "last use", "state"), rows)] if rows else []
        if self.removed:
            parts.append(f"Removed: {len(self.removed)}, {sizes[1]:.2f} GiB.")
        parts.append(f"Packs: {len(rows)}, {sizes[0]:.2f} GiB; at most {self.limit_bytes / 2**30:.0f} GiB are kept.")
        return _paragraphs(parts)


class Released(Frozen):
    """The version that a pipeline registered."""

    name: str
    version: int
    alias: str
    # At that moment.
    reason: str
    parity_max_abs_difference: float | None


class ModeRow(Frozen):
    """What a pipeline did for one mode."""

    mode: Mode
    trials: int
    trial_counts: dict[str, int]
    best_val_accuracy: float
    # Of the search, in %.
    val_accuracy: float
    # Of the final training, in %.
    test_accuracy: float | None
    release: Released
    videos: int
    # Predicted.
    seconds: float
    # All of it.


class PipelineResult(_Readable, Frozen):
    """A finished pipeline."""

    out: Path
    fingerprint: str
    run_id: str
    tracking_uri: str
    modes: tuple[ModeRow, ...]
    seconds: float
    ok: bool = True

    def markdown(self) -> str:
        """The table, and where to look."""
        head = ("mode", "trials", "search val %", "val %", "test %", "model", "alias", "parity", "videos", "seconds")
        rows = [
            (
                row.mode,
                row.trials,
                row.best_val_accuracy,
                row.val_accuracy,
                row.test_accuracy,
                f"{row.release.name} v{row.release.version}",
                row.release.alias,
                _short(row.release.parity_max_abs_difference),
                row.videos,
                f"{row.seconds:.0f}",
            )
            for row in self.modes
        ]
        releases = [row.release for row in self.modes]
        lines = [
            f"# Pipeline: {self.out}",
            table(head, rows),
            "\n".join(f"- {found.name} version {found.version} is {found.alias}: {found.reason}" for found in releases),
            "Where to look:",
            "\n".join(f"- {line}" for line in self._places()),
        ]
        return _paragraphs(lines)

    def _places(self) -> list[str]:
        uri = self.tracking_uri
        ui = uri if uri.startswith("http") else f"mlflow ui --backend-store-uri {shlex.quote(uri)}"
        return [
            f"runs, curves, registered models: `{ui}`, run {self.run_id} in experiment cmran-pipeline",
            f"report of the data: {self.out / 'validation.md'}",
            *(
                f"{row.mode}: {self.out / row.mode}: search/trials.md, train/figures, predictions/"
                for row in self.modes
            ),
        ]
