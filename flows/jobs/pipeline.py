"""`pipeline`: validate, then search, train, release and predict in each mode."""

import itertools
import logging
import secrets
import shlex
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Self

from pydantic import BeforeValidator, Field, model_validator

from cmran import tracking
from cmran.config import BatchSize, Epochs, Frozen, Mode, RunConfig, Seed, as_sections, load_config, parse
from cmran.errors import CheckpointError, ConfigError, DataError, StorageError
from cmran.utils.files import read_json, write_json, write_text
from flows.jobs import predict, release, search, train, validate
from flows.jobs.common import (
    PARENT_HELP,
    MarkdownResult,
    RunId,
    Seconds,
    SettingsParameters,
    Trials,
    paragraphs,
    require_fields,
    split_commas,
    table,
)
from flows.jobs.models import run_of_folder
from flows.jobs.predict import PredictParameters, PredictResult
from flows.jobs.release import ReleaseParameters, ReleaseResult
from flows.jobs.search import SearchJobResult, SearchParameters
from flows.jobs.train import TrainParameters, TrainResult
from flows.jobs.validate import ValidateParameters, ValidationResult

if TYPE_CHECKING:
    from search.worker import SearchResult

log = logging.getLogger(__name__)

PIPELINE_FILE = "pipeline.json"
"""File in the folder of a pipeline: its parameters, the names of its studies and its MLflow run."""

Modes = Annotated[tuple[Mode, ...], Field(min_length=1, max_length=2), BeforeValidator(split_commas)]


class PipelineParameters(SettingsParameters):
    """Run the full pipeline: validate, then search, train, release and predict in each mode."""

    out: Path = Field(Path("runs/pipeline"), description="Each pipeline creates its own folder in here.")
    modes: Modes = Field(("full", "weak"), description="full, weak or full,weak.")
    trials: Trials = Field(20, description="Total number of trials per mode.")
    search_epochs: Epochs | None = Field(None, description="Epochs per trial. Default: the recipe's.")
    epochs: Epochs | None = Field(None, description="Epochs of the final training. Default: the recipe's.")
    timeout_s: Seconds | None = Field(None, description="Start no trial of a search after this many seconds.")
    seed: Seed | None = Field(
        None, description="Random seed of the final training and the sampler. Default: the recipe's, and 0."
    )
    batch_size: BatchSize = Field(32, description="Batch size of the batch inference.")
    resume: bool = Field(
        False,
        description="Continue the last unfinished pipeline in OUT. OUT alone is enough; other options must match.",
    )
    parent_run_id: RunId | None = Field(None, description=PARENT_HELP)

    @model_validator(mode="before")
    @classmethod
    def _check_needed(cls, values: Any) -> Any:
        return require_fields(values, "data")

    short = (*SettingsParameters.short, "epochs", "seed")

    @model_validator(mode="after")
    def _check(self) -> Self:
        if len(set(self.modes)) != len(self.modes):
            raise ValueError("modes: each mode can be given once")
        if self.search_epochs is not None and "train.epochs" in (self.settings or {}):
            raise ValueError("train.epochs is ambiguous here: give `search_epochs` and `epochs` instead")
        return self


def _short(value: float | None) -> str:
    return "-" if value is None else f"{value:.1e}"


class Released(Frozen):
    """The model version that a pipeline registered."""

    name: str
    version: int
    alias: str
    """The alias at the time of the registration."""
    reason: str
    """Why the version got this alias."""
    parity_max_abs_difference: float | None


class ModeRow(Frozen):
    """The results of a pipeline in one mode."""

    mode: Mode
    trials: int
    trial_counts: dict[str, int]
    best_val_accuracy: float
    """The best val accuracy of the search, in percent."""
    val_accuracy: float
    """The val accuracy of the final training, in percent."""
    test_accuracy: float | None
    """The test accuracy of the final training, in percent."""
    release: Released
    videos: int
    """The number of videos predicted."""
    seconds: float


class PipelineResult(MarkdownResult, Frozen):
    """A finished pipeline."""

    out: Path
    fingerprint: str
    run_id: str
    tracking_uri: str
    modes: tuple[ModeRow, ...]
    seconds: float
    ok: bool = True

    def markdown(self) -> str:
        """Return the table of results, and where to find the details."""
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
            "Details:",
            "\n".join(f"- {line}" for line in self._locations()),
        ]
        return paragraphs(lines)

    def _locations(self) -> list[str]:
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


@dataclass(frozen=True, kw_only=True)
class Steps:
    """The functions that a pipeline calls: the jobs, or the Prefect flows that wrap them."""

    validate: Callable[[ValidateParameters], ValidationResult] = validate.run
    search: Callable[[SearchParameters], SearchJobResult] = search.run
    train: Callable[[TrainParameters], TrainResult] = train.run
    release: Callable[[ReleaseParameters], ReleaseResult] = release.run
    predict: Callable[[PredictParameters], PredictResult] = predict.run


def run(parameters: PipelineParameters, *, run_id: str | None = None, steps: Steps | None = None) -> PipelineResult:
    """Validate, then in each mode search, train with the best settings, release, and predict with that version.

    Each pipeline has its own folder in `out`, named by the time, and one MLflow run, the parent of all others. With
    `resume` the last unfinished pipeline is continued: each step does what is left of it.

    Args:
        parameters: What to run.
        run_id: Adopted MLflow run; None opens a new one.
        steps: The functions to call; None calls the jobs.

    Raises:
        CmranError: A step failed, or the pipeline cannot be resumed with these parameters.
    """
    steps, started = steps or Steps(), time.monotonic()
    parameters = check_pipeline(parameters)
    assert parameters.data is not None
    out, state = _pipeline_folder(parameters)
    if run_id is None and (recorded := state.get("run_id")) is not None and tracking.run_exists(recorded):
        run_id = recorded
    with tracking.start_run(
        experiment=tracking.PIPELINE_EXPERIMENT,
        name=out.name,
        run_id=run_id,
        parent_run_id=parameters.parent_run_id,
        tags={"cmran.job": "pipeline"},
        system_metrics=False,
    ) as active_run:
        active_run.set_tags({tracking.PIPELINE_TAG: active_run.run_id})
        active_run.log_params(parameters)
        state |= {"run_id": active_run.run_id}
        write_json(out / PIPELINE_FILE, state)

        # The files of weak mode are a superset: one pass over the folder checks both modes.
        widest: Mode = "weak" if "weak" in parameters.modes else "full"
        log.info("validate: %s", parameters.data)
        validation = steps.validate(
            ValidateParameters(
                data=parameters.data, mode=widest, report=out / "validation.json", parent_run_id=active_run.run_id
            )
        )
        write_text(out / "validation.md", validation.markdown())
        validation.raise_if_failed()
        fingerprint = validation.report.fingerprint
        if (before := state.get("fingerprint", fingerprint)) != fingerprint:
            raise DataError(
                f"{out}: the pipeline was started on data with fingerprint {before}, {parameters.data} has "
                f"{fingerprint}",
                "resume with the same data, or omit `resume` to start a new pipeline",
            )
        write_json(out / PIPELINE_FILE, state | {"fingerprint": fingerprint})
        active_run.log_dataset(parameters.data, fingerprint, "pipeline")

        rows = tuple(
            _pipeline_mode(mode, parameters, steps, out, f"{state['study']}-{mode}", active_run.run_id)
            for mode in parameters.modes
        )
        result = PipelineResult(
            out=out,
            fingerprint=fingerprint,
            run_id=active_run.run_id,
            tracking_uri=tracking.shown_tracking_uri(),
            modes=rows,
            seconds=time.monotonic() - started,
        )
        write_text(out / "summary.md", result.markdown())
        write_json(out / "summary.json", result.model_dump(mode="json"))
        for row in rows:
            scores = {"val.accuracy": row.val_accuracy, "test.accuracy": row.test_accuracy, "seconds": row.seconds}
            active_run.log_metrics({f"{row.mode}.{key}": value for key, value in scores.items()})
        active_run.log_artifact(out / "summary.md")
        active_run.log_artifact(out / "summary.json")
    return result


def _release_once(
    mode: Mode, parameters: PipelineParameters, steps: Steps, folder: Path, study: str, run_id: str
) -> Released:
    """Release the trained model, unless an interrupted pipeline has already done so: a version is registered once."""
    path = folder / "release.json"
    if path.exists():
        return parse(Released, read_json(path, "remove it and resume the pipeline"), str(path))
    if (existing := _existing_release(mode, folder / "train", study)) is not None:
        write_json(path, existing.model_dump(mode="json"))
        return existing
    log.info("%s, release", mode)
    result = steps.release(
        ReleaseParameters(
            checkpoint=str(folder / "train"),
            data=parameters.data,
            out=folder / f"cmran-{mode}.onnx",
            study=study,
            parent_run_id=run_id,
        )
    )
    released = Released(
        name=result.registered.name,
        version=result.registered.version,
        alias=result.registered.alias,
        reason=result.registered.reason,
        parity_max_abs_difference=result.export.parity.max_abs_difference,
    )
    write_json(path, released.model_dump(mode="json"))
    return released


def _existing_release(mode: Mode, training: Path, study: str) -> Released | None:
    """Return the version that the pipeline registered before it was killed, if it could not write release.json."""
    run_id = run_of_folder(training)
    for version in reversed(tracking.registered_versions(f"cmran-{mode}")):
        # A version that was not settled is released again, which settles both.
        if run_id is not None and version.settled and (version.run_id, version.tags.get("study")) == (run_id, study):
            parity = version.tags.get("parity_max_abs_difference")
            return Released(
                name=version.name,
                version=version.number,
                alias="champion" if "champion" in version.aliases else "challenger",
                reason="registered before the pipeline was interrupted",
                parity_max_abs_difference=None if parity is None else float(parity),
            )
    return None


def check_pipeline(parameters: PipelineParameters) -> PipelineParameters:
    """Return the parameters, completed from the pipeline that is resumed.

    Raises:
        CmranError: Something would stop the pipeline later: nothing to resume, other parameters than in the resumed
            pipeline, invalid settings of a mode, no data, no tracking store, model registry or study storage.
    """
    if parameters.resume:
        path, state = _unfinished(parameters.out)
        parameters = _with_pipeline_parameters(parameters, state["parameters"], path)
    assert parameters.data is not None
    for mode in parameters.modes:
        _final_base(mode, parameters)
    if not parameters.data.is_dir():
        raise DataError(
            f"{parameters.data}: no such folder", f"generate synthetic data with `cmran synth {parameters.data}`"
        )
    tracking.connect_registry()
    from search.study import open_storage

    open_storage()
    return parameters


def _unfinished(out: Path) -> tuple[Path, dict[str, Any]]:
    """Return the file of the last unfinished pipeline in `out`, and its content. Raises CheckpointError if none."""
    for path in sorted(out.glob(f"*/{PIPELINE_FILE}"), reverse=True):
        if not (path.parent / "summary.json").exists():
            advice = f"remove {path.parent} and start a new pipeline without `resume`"
            return path, read_json(path, advice, "parameters", "study")
    raise CheckpointError(f"{out}: no unfinished pipeline to resume", "omit `resume` to start one")


def _with_pipeline_parameters(parameters: PipelineParameters, recorded: Any, path: Path) -> PipelineParameters:
    """Return the parameters of the pipeline that is resumed. Raises ConfigError if a given one differs.

    The data folder may have moved: the steps compare the fingerprint.
    """
    own = {"out": parameters.out, "resume": True, "parent_run_id": parameters.parent_run_id}
    if not isinstance(recorded, dict):
        raise CheckpointError(
            f"{path} is damaged (its parameters are not an object)", "start a new pipeline without `resume`"
        )
    started = parse(PipelineParameters, recorded | own, str(path))
    for key in PipelineParameters.model_fields:
        before, now = getattr(started, key), getattr(parameters, key)
        if key in own or key == "data" or key not in parameters.model_fields_set or now is None:
            continue
        if isinstance(before, Path):
            before, now = before.resolve(), now.resolve()
        if before != now:
            raise ConfigError(
                f"{path.parent}: the pipeline has {key} {before}, now it is {now}",
                f"omit `{key}` (a resumed pipeline keeps its parameters), or omit `resume` to start a new pipeline",
            )
    return started if parameters.data is None else started.model_copy(update={"data": parameters.data})


def _pipeline_mode(
    mode: Mode, parameters: PipelineParameters, steps: Steps, out: Path, study: str, run_id: str
) -> ModeRow:
    """Search, train, release and predict in one mode."""
    started, folder = time.monotonic(), out / mode
    # An interrupted pipeline left the output of each step under its name; a step without output starts from scratch.
    common = {"data": parameters.data, "device": parameters.device, "parent_run_id": run_id}
    log.info("%s, search: %d trials", mode, parameters.trials)
    searched = steps.search(
        SearchParameters(
            **common,
            mode=mode,
            recipe=parameters.recipe,
            config=parameters.config,
            settings=parameters.settings,
            lr=parameters.lr,
            clip_norm=parameters.clip_norm,
            epochs=parameters.search_epochs,
            precision=parameters.precision,
            trials=parameters.trials,
            timeout_s=parameters.timeout_s,
            study=study,
            seed=parameters.seed or 0,
            out=folder / "search",
        )
    ).search
    log.info("%s, train with the settings of trial %d", mode, searched.best_trial)
    trained = steps.train(
        TrainParameters(
            **common,
            mode=mode,
            recipe=parameters.recipe,
            config=_final_config(mode, parameters, searched, folder / "train.yaml"),
            out=folder / "train",
            resume=(folder / "train").exists(),
        )
    )
    released = _release_once(mode, parameters, steps, folder, study, run_id)
    # By number, because an alias may move at any time.
    model = f"models:/{released.name}/{released.version}"
    log.info("%s, predict with %s (%s)", mode, model, released.alias)
    predicted = steps.predict(
        PredictParameters(
            **common,
            model=model,
            out=folder / "predictions",
            batch_size=parameters.batch_size,
            resume=(folder / "predictions").exists(),
        )
    )
    return ModeRow(
        mode=mode,
        trials=searched.n_trials,
        trial_counts=searched.counts,
        best_val_accuracy=searched.best_value,
        val_accuracy=trained.fit.val["accuracy"],
        test_accuracy=trained.fit.test["accuracy"] if trained.fit.test else None,
        release=released,
        videos=predicted.manifest.rows,
        seconds=time.monotonic() - started,
    )


def _final_config(mode: Mode, parameters: PipelineParameters, searched: "SearchResult", path: Path) -> Path:
    """Write the best trial's settings for the final training, with the schedule scaled to its number of epochs."""
    import yaml

    from search.space import apply_params

    best = apply_params(searched.best_params, _final_base(mode, parameters))
    write_text(path, yaml.safe_dump(best.model_dump(mode="json"), sort_keys=False))
    return path


def _final_base(mode: Mode, parameters: PipelineParameters) -> RunConfig:
    """Return the settings of the final training before the search."""
    return load_config(mode, parameters.recipe, parameters.config, as_sections(parameters.given_settings()))


def _pipeline_folder(parameters: PipelineParameters) -> tuple[Path, dict[str, Any]]:
    """Create the folder of a pipeline, or find the one that is resumed; return it and the content of its file."""
    if parameters.resume:
        path, state = _unfinished(parameters.out)
        log.info("resuming %s", path.parent)
        return path.parent, state
    name = time.strftime("%Y%m%d-%H%M%S")
    for number in itertools.count(1):
        out = parameters.out / (name if number == 1 else f"{name}-{number}")
        try:
            out.mkdir(parents=True)
        except FileExistsError:
            continue
        except OSError as error:
            raise StorageError(f"cannot create the folder {out}: {error.strerror}", "choose another `out`") from error
        break
    # The random suffix below keeps the studies of two pipelines of the same second apart.
    settings = parameters.model_dump(mode="json", exclude={"out", "resume", "parent_run_id"})
    # Absolute paths, because a pipeline may be resumed from another working directory.
    settings |= {
        key: str(path.resolve()) for key in ("data", "config") if (path := getattr(parameters, key)) is not None
    }
    state = {"parameters": settings, "study": f"pipeline-{out.name}-{secrets.token_hex(2)}"}
    write_json(out / PIPELINE_FILE, state)
    return out, state
