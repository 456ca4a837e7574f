"""What each job takes: one frozen record a job, every field described and bounded.

From these come the forms in Prefect's UI, the options of the `cmran` command and the checks of both.
"""

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

from cmran.config import (
    BatchSize,
    Epochs,
    Frozen,
    Mode,
    RunConfig,
    Seed,
    as_sections,
    load_config,
    parse,
)
from cmran.errors import CmranError
from cmran.utils.files import read_json, write_json, write_text
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
from flows.jobs.predict import PredictParameters, PredictResult, predict_job
from flows.jobs.release import ReleaseParameters, ReleaseResult, release_job
from flows.jobs.search import SearchJobResult, SearchParameters, search_job
from flows.jobs.train import TrainParameters, TrainResult, train_job
from flows.jobs.validate import ValidateParameters, ValidationResult, validate_job

if TYPE_CHECKING:
    from search.worker import SearchResult


Modes = Annotated[tuple[Mode, ...], Field(min_length=1, max_length=2), BeforeValidator(split_commas)]


class PipelineParameters(SettingsParameters):
    """The whole road: validate, then for each mode search, train, release and predict."""

    out: Path = Field(Path("runs/pipeline"), description="Each pipeline gets a folder of its own in here.")
    modes: Modes = Field(("full", "weak"), description="full, weak or full,weak.")
    trials: Trials = Field(20, description="Trials of each mode's search.")
    search_epochs: Epochs | None = Field(None, description="Epochs a trial. Default: the recipe's.")
    epochs: Epochs | None = Field(None, description="Epochs of the final training. Default: the recipe's.")
    timeout_s: Seconds | None = Field(None, description="Start no trial of a search after so many seconds.")
    seed: Seed | None = Field(None, description="Of the final training and the sampler, instead of the recipe's and 0.")
    batch_size: BatchSize = Field(32, description="Videos at a time in the batch inference.")
    resume: bool = Field(
        False,
        description="Continue the last pipeline in OUT that did not end. OUT alone is enough; what else is given must "
        "be as before.",
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
            raise ValueError("modes: each mode can be named once")
        if self.search_epochs is not None and "train.epochs" in (self.settings or {}):
            raise ValueError("train.epochs among the settings is of search and training: give search_epochs and epochs")
        return self


def _short(value: float | None) -> str:
    return "-" if value is None else f"{value:.1e}"


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
        return paragraphs(lines)

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


log = logging.getLogger(__name__)


PIPELINE_FILE = "pipeline.json"
"""In a pipeline's folder: what it was begun with, the name of its studies, its MLflow run."""


@dataclass(frozen=True, kw_only=True)
class Steps:
    """What a pipeline calls for each step: the jobs themselves, or the Prefect flows around them."""

    validate: Callable[[ValidateParameters], ValidationResult] = validate_job
    search: Callable[[SearchParameters], SearchJobResult] = search_job
    train: Callable[[TrainParameters], TrainResult] = train_job
    release: Callable[[ReleaseParameters], ReleaseResult] = release_job
    predict: Callable[[PredictParameters], PredictResult] = predict_job


def pipeline_job(
    parameters: PipelineParameters, *, run_id: str | None = None, steps: Steps | None = None
) -> PipelineResult:
    """Validate, then for each mode search, train with the best settings, release, and predict with that version.

    Each pipeline has a folder of its own in OUT, named by the time, and one MLflow run above all others. With `resume`
    the last one that did not end goes on: each step does what is left of it.
    """
    from cmran import tracking

    steps, started = steps or Steps(), time.monotonic()
    parameters = check_pipeline(parameters)
    assert parameters.data is not None
    out, state = _pipeline_folder(parameters)
    if run_id is None and (begun := state.get("run_id")) is not None and tracking.run_exists(begun):
        run_id = begun
    with tracking.start_run(
        experiment=tracking.PIPELINE_EXPERIMENT,
        name=out.name,
        run_id=run_id,
        parent_run_id=parameters.parent_run_id,
        tags={"cmran.job": "pipeline"},
        system_metrics=False,
    ) as run:
        run.set_tags({tracking.PIPELINE_TAG: run.run_id})
        run.log_params(parameters)
        state |= {"run_id": run.run_id}
        write_json(out / PIPELINE_FILE, state)

        # Weak mode's files are a superset: one pass over the folder checks both.
        widest: Mode = "weak" if "weak" in parameters.modes else "full"
        log.info("validate: %s", parameters.data)
        validation = steps.validate(
            ValidateParameters(
                data=parameters.data, mode=widest, report=out / "validation.json", parent_run_id=run.run_id
            )
        )
        write_text(out / "validation.md", validation.markdown())
        validation.raise_if_failed()
        fingerprint = validation.report.fingerprint
        if (before := state.get("fingerprint", fingerprint)) != fingerprint:
            raise CmranError(
                f"{out}: the pipeline was begun on data with fingerprint {before}, {parameters.data} has {fingerprint}"
                ": resume with the same data, or leave --resume out to begin anew"
            )
        write_json(out / PIPELINE_FILE, state | {"fingerprint": fingerprint})
        run.log_dataset(parameters.data, fingerprint, "pipeline")

        rows = tuple(
            _pipeline_mode(mode, parameters, steps, out, f"{state['study']}-{mode}", run.run_id)
            for mode in parameters.modes
        )
        result = PipelineResult(
            out=out,
            fingerprint=fingerprint,
            run_id=run.run_id,
            tracking_uri=tracking.shown_tracking_uri(),
            modes=rows,
            seconds=time.monotonic() - started,
        )
        write_text(out / "summary.md", result.markdown())
        write_json(out / "summary.json", result.model_dump(mode="json"))
        for row in rows:
            scores = {"val.accuracy": row.val_accuracy, "test.accuracy": row.test_accuracy, "seconds": row.seconds}
            run.log_metrics({f"{row.mode}.{key}": value for key, value in scores.items()})
        run.log_artifact(out / "summary.md")
        run.log_artifact(out / "summary.json")
    return result


def _release_once(
    mode: Mode, parameters: PipelineParameters, steps: Steps, folder: Path, study: str, run_id: str
) -> Released:
    """Release the training, unless a killed pipeline had done it: a version is made once."""
    path = folder / "release.json"
    if path.exists():
        return parse(Released, read_json(path, "remove it and go on with --resume"), str(path))
    if (made := _existing_release(mode, folder / "train", study)) is not None:
        write_json(path, made.model_dump(mode="json"))
        return made
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
    """The version that a pipeline has made of the training, and was killed before it could note it."""
    from cmran import tracking

    run_id = run_of_folder(training)
    for version in reversed(tracking.registered_versions(f"cmran-{mode}")):
        # One that was not settled is released again, which settles both.
        if run_id is not None and version.settled and (version.run_id, version.tags.get("study")) == (run_id, study):
            parity = version.tags.get("parity_max_abs_difference")
            return Released(
                name=version.name,
                version=version.number,
                alias="champion" if "champion" in version.aliases else "challenger",
                reason="made before the pipeline was killed",
                parity_max_abs_difference=None if parity is None else float(parity),
            )
    return None


def check_pipeline(parameters: PipelineParameters) -> PipelineParameters:
    """The parameters, those of the pipeline that is resumed filled in.

    Raises CmranError for what would stop a pipeline later: nothing to resume or with other parameters, settings of each
    mode, no data, no tracking store, registry or study storage.
    """
    from cmran import tracking

    if parameters.resume:
        path, state = _unfinished(parameters.out)
        parameters = _with_pipeline_parameters(parameters, state["parameters"], path)
    assert parameters.data is not None
    for mode in parameters.modes:
        _final_base(mode, parameters)
    if not parameters.data.is_dir():
        raise CmranError(f"{parameters.data}: no such folder: make one for trial with `cmran synth {parameters.data}`")
    tracking.connect_registry()
    from search.study import open_storage

    open_storage()
    return parameters


def _unfinished(out: Path) -> tuple[Path, dict[str, Any]]:
    """The file of the last pipeline in `out` that did not end, and what it says. CmranError where there is none."""
    for path in sorted(out.glob(f"*/{PIPELINE_FILE}"), reverse=True):
        if not (path.parent / "summary.json").exists():
            return path, read_json(path, f"remove {path.parent} and begin anew without --resume", "parameters", "study")
    raise CmranError(f"{out}: no pipeline that did not end: leave --resume out to begin one")


def _with_pipeline_parameters(parameters: PipelineParameters, begun: Any, path: Path) -> PipelineParameters:
    """The parameters that a pipeline was begun with. Raises CmranError where one that was given differs.

    The data may lie elsewhere now: the steps compare their fingerprint.
    """
    own = {"out": parameters.out, "resume": True, "parent_run_id": parameters.parent_run_id}
    if not isinstance(begun, dict):
        raise CmranError(f"{path} is damaged (its parameters are no object): begin anew without --resume")
    there = parse(PipelineParameters, begun | own, str(path))
    for key in PipelineParameters.model_fields:
        before, now = getattr(there, key), getattr(parameters, key)
        if key in own or key == "data" or key not in parameters.model_fields_set or now is None:
            continue
        if isinstance(before, Path):
            before, now = before.resolve(), now.resolve()
        if before != now:
            raise CmranError(
                f"{path.parent}: the pipeline was begun with {key} {before}, now it is {now}: leave it out (a resumed "
                "pipeline keeps its parameters), or leave --resume out to begin anew"
            )
    return there if parameters.data is None else there.model_copy(update={"data": parameters.data})


def _pipeline_mode(
    mode: Mode, parameters: PipelineParameters, steps: Steps, out: Path, study: str, run_id: str
) -> ModeRow:
    """Search, train, release and predict in one mode."""
    started, folder = time.monotonic(), out / mode
    # What a killed pipeline left of a step is there under its name; where there is nothing the step begins.
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
    # By number: an alias may move at any moment.
    address = f"models:/{released.name}/{released.version}"
    log.info("%s, predict with %s (%s)", mode, address, released.alias)
    predicted = steps.predict(
        PredictParameters(
            **common,
            model=address,
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
    """The best trial's settings for the final training, as a file: schedule scaled to its number of epochs."""
    import yaml

    from search.space import apply_params as settings_of

    best = settings_of(searched.best_params, _final_base(mode, parameters))
    write_text(path, yaml.safe_dump(best.model_dump(mode="json"), sort_keys=False))
    return path


def _final_base(mode: Mode, parameters: PipelineParameters) -> RunConfig:
    """Settings of the final training before the search's result."""
    return load_config(mode, parameters.recipe, parameters.config, as_sections(parameters.given_settings()))


def _pipeline_folder(parameters: PipelineParameters) -> tuple[Path, dict[str, Any]]:
    """A new folder for a pipeline, or with `resume` the last one that did not end, and what its file says."""
    if parameters.resume:
        path, state = _unfinished(parameters.out)
        log.info("going on with %s", path.parent)
        return path.parent, state
    name = time.strftime("%Y%m%d-%H%M%S")
    for number in itertools.count(1):
        out = parameters.out / (name if number == 1 else f"{name}-{number}")
        try:
            out.mkdir(parents=True)
        except FileExistsError:
            continue
        except OSError as error:
            raise CmranError(f"cannot make the folder {out}: {error.strerror}: choose another with --out") from error
        break
    # Two pipelines of one second may share a study storage.
    settings = parameters.model_dump(mode="json", exclude={"out", "resume", "parent_run_id"})
    # A resumed pipeline may be started from another folder.
    settings |= {
        key: str(path.resolve()) for key in ("data", "config") if (path := getattr(parameters, key)) is not None
    }
    state = {"parameters": settings, "study": f"pipeline-{out.name}-{secrets.token_hex(2)}"}
    write_json(out / PIPELINE_FILE, state)
    return out, state
