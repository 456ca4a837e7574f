"""The search: one worker runs the trials of a study and writes its report."""

import contextlib
import logging
import signal
import time
from collections import Counter
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import optuna
import sqlalchemy.exc
from optuna.trial import FrozenTrial, TrialState

from cmran import tracking
from cmran.config import Device, Mode, RunConfig, load_config, parse
from cmran.data.dataset import open_folder
from cmran.data.device_cache import DeviceCacheSlot
from cmran.data.validation import require_labels
from cmran.errors import CmranError, ConfigError, StorageError
from cmran.training.inference import check_fits
from cmran.utils.device import pick_device, require_precision
from cmran.utils.files import cache_lock, read_json, write_json
from cmran.utils.signals import raise_on_term
from search import report
from search.names import STUDY_NAME_RULE, is_study_name
from search.objective import Objective, RunDirBusy, SlotTaken, TimeBudgetExceeded, TrialFailed, tidy
from search.space import apply_params, describe, recipe_params
from search.study import (
    GRACE_S,
    WORKER_KEY,
    Reaper,
    best_trial,
    database_reason,
    lost_reason,
    open_study,
    requeue,
    trial_slots,
    worker_record,
)

log = logging.getLogger(__name__)


@dataclass(frozen=True, kw_only=True)
class SearchResult:
    """State of a study when a search returns."""

    study: str
    """Name of the study."""
    best_trial: int
    """Number of the best trial."""
    best_value: float
    """Its val accuracy in %."""
    best_params: dict[str, Any]
    """Its parameters, for `search.space.apply_params`: with a base of more epochs the schedule scales."""
    best_config: RunConfig
    """Its settings."""
    n_trials: int
    """Number of trials that were started: complete, pruned, failed or running in another process."""
    counts: dict[str, int]
    """Number of trials by state: {"complete": 8, "pruned": 3, "failed": 1}."""
    run_id: str
    """MLflow run of the search, the parent of the trials' runs."""
    fingerprint: str
    """Fingerprint of the data folder."""
    out: Path
    """Directory with the trials and the report."""
    seconds: float
    """Duration of this call."""

    @property
    def best_file(self) -> Path:
        """Config file with the best settings."""
        return self.out / "best.yaml"


def default_study(mode: Mode, fingerprint: str) -> str:
    """Default name of the study for a mode and a data folder."""
    return f"cmran-{mode}-{fingerprint[:8]}"


def search(
    data: Path,
    *,
    mode: Mode,
    trials: int,
    out: Path,
    epochs: int | None = None,
    timeout_s: float | None = None,
    study: str | None = None,
    recipe: str | None = None,
    base: RunConfig | None = None,
    given: Mapping[str, Mapping[str, Any]] | None = None,
    device: Device = "auto",
    parent_run_id: str | None = None,
    seed: int = 0,
) -> SearchResult:
    """Search for the settings with the best val accuracy around a recipe. Trial 0 is the recipe itself.

    SIGTERM and SIGINT leave the study ready to be resumed. Several processes may work on one study at the same time.

    Args:
        data: Data folder.
        mode: "full" (supervised) or "weak" (weakly supervised).
        trials: Total number of trials of the study; complete, pruned and failed ones count. The same call therefore
            resumes a search that was killed, and runs only the trials that are missing.
        out: Output directory: a run directory for each trial (only the best one keeps its weights), best.yaml, and the
            tables and figures of the study.
        epochs: Epochs of a trial (default: the recipe's).
        timeout_s: Seconds after which no trial starts and the running one stops after its epoch. A resumed search
            continues that trial.
        study: Name of the study (default: `default_study`).
        recipe: Name of the recipe (default: the published one of the mode).
        base: Settings to search around instead of the recipe's.
        given: Settings of `base` that best.yaml contains in addition to the searched ones, {"model": {...}, "train":
            {...}} (default: all in which `base` differs from its recipe). The epochs of a trial are not among them.
        device: Device to train on.
        parent_run_id: MLflow run that becomes the parent of the search's run.
        seed: Seed of the sampler.

    Returns:
        The state of the study.

    Raises:
        ConfigError: invalid settings, or `study` or `out` belongs to another search.
        DataError: the data folder cannot be used.
        StorageError: the study storage or the tracking server failed.
        CmranError: no trial is complete.
    """
    started = time.monotonic()
    if study is not None and not is_study_name(study):
        raise ConfigError(f"study name {study!r}: {STUDY_NAME_RULE}")
    if given is None:
        given = {} if base is None else _differences(base)
    base = _base(base, mode, recipe, epochs)
    require_precision(base.train.precision, pick_device(device))
    # Checked once, here, so that unusable data does not fail every trial.
    with open_folder(data, mode=mode) as folder:
        check_fits(base, folder)
        require_labels(data, mode)
        fingerprint = folder.fingerprint
    name = study or default_study(mode, fingerprint)
    space = describe(base)
    settings = {
        "mode": mode,
        "fingerprint": fingerprint,
        "recipe": base.recipe,
        "epochs": base.train.epochs,
        "base": base.model_dump(mode="json"),
        "space": space,
    }
    with contextlib.ExitStack() as stack:
        stack.enter_context(_exit_on_sigterm())
        stack.enter_context(_storage_errors(name))
        # Two processes that start together must create one study and one parent run.
        with cache_lock(f"search-{mode}-{fingerprint}.lock"):
            found = open_study(name, settings, recipe_params(base), seed=seed, epochs=base.train.epochs)
            stack.enter_context(_deletion_errors(found))
            _claim(out, found)
            run = stack.enter_context(_parent_run(found, mode, parent_run_id))
        run.log_params({"trials": trials, "timeout_s": timeout_s, "seed": seed, "study": name}, "search.")
        run.log_params(base)
        run.log_params(space, "space.")
        run.log_dataset(data, fingerprint, "training")
        worker = stack.enter_context(worker_record())
        found.set_user_attr(WORKER_KEY + worker["token"], worker)
        objective = Objective(
            study=found,
            data=data,
            fingerprint=fingerprint,
            base=base,
            trial_slots=trials,
            out=out,
            parent_run_id=run.run_id,
            worker=worker,
            device_cache=stack.enter_context(DeviceCacheSlot()),
            device=device,
            deadline=None if timeout_s is None else started + timeout_s,
        )
        _run_trials(objective)
        return _finish(objective, run, started, given)


def _differences(base: RunConfig) -> dict[str, dict[str, Any]]:
    """The settings in which `base` differs from its recipe, by section."""
    recipe = load_config(base.model.mode, base.recipe).model_dump(mode="json")
    own = base.model_dump(mode="json")
    return {
        section: {key: value for key, value in own[section].items() if value != recipe[section][key]}
        for section in ("model", "train")
    }


def _base(base: RunConfig | None, mode: Mode, recipe: str | None, epochs: int | None) -> RunConfig:
    overrides = {"train": {"epochs": epochs}} if epochs is not None else {}
    if base is None:
        base = load_config(mode, recipe, overrides=overrides)
    elif epochs is not None:
        values = base.model_dump()
        base = parse(RunConfig, values | {"train": values["train"] | {"epochs": epochs}}, "settings")
    if base.model.mode != mode:
        raise ConfigError(f"the settings are for mode {base.model.mode}, but mode {mode} was requested")
    if base.train.selection_split != "val":
        raise ConfigError(
            f"found train.selection_split {base.train.selection_split}, but a search uses the val split only",
            hint="set train.selection_split to val",
        )
    return base


def _claim(out: Path, study: optuna.Study) -> None:
    """Mark `out` as the directory of this study. Raises ConfigError if it belongs to another one."""
    path, own = out / "search.json", {"study": study.study_name, "id": study.user_attrs["id"]}
    try:
        found = read_json(path, "choose another `out`")
    except FileNotFoundError:
        write_json(path, own)
        return
    if found != own:
        other = found.get("study")
        detail = (
            "which was created again or is in another storage" if other == own["study"] else f"not of {own['study']!r}"
        )
        raise ConfigError(f"{out} contains the trials of study {other!r}, {detail}", hint="choose another `out`")


@contextlib.contextmanager
def _parent_run(study: optuna.Study, mode: Mode, parent_run_id: str | None) -> Iterator[tracking.Run]:
    """The parent of the trials' runs: the study's run is resumed, or created if it is missing or has another parent."""
    # Creates the tracking database if it is missing; `run_exists` alone only reads.
    tracking.connect()
    key = f"run under {parent_run_id}" if parent_run_id else "run"
    run_id = study.user_attrs.get(key)
    if run_id is not None and not tracking.run_exists(run_id):
        log.warning("the study's run %s is not at %s: creating a new one", run_id, tracking.shown_tracking_uri())
        run_id = None
    tags = {
        "cmran.mode": mode,
        "cmran.job": "search",
        "cmran.study": study.study_name,
        "cmran.fingerprint": study.user_attrs["fingerprint"],
    }
    with tracking.start_run(
        experiment=tracking.experiment_of(mode),
        name=f"search {study.study_name}",
        parent_run_id=parent_run_id,
        run_id=run_id,
        tags=tags,
    ) as run:
        study.set_user_attr(key, run.run_id)
        yield run


def _run_trials(objective: Objective) -> None:
    """Run trials until all slots of the study are taken or the time limit is reached."""
    study, reaper = objective.study, Reaper(objective.worker["token"])
    while objective.deadline is None or time.monotonic() < objective.deadline:
        for number in reaper.reap(study):
            log.info("trial %d: its worker has died; the trial is requeued", number)
        trials = trial_slots(study.get_trials(deepcopy=False))
        waiting = any(trial.state == TrialState.WAITING for trial in trials[: objective.trial_slots])
        if len(trials) >= objective.trial_slots and not waiting:
            if not reaper.has_unowned(study):
                return
            # Another process has just started this trial, or died before it wrote its record.
            time.sleep(0.5)
            continue
        _run_trial(objective)
        tidy(study, objective.out)
    log.info("the time limit is reached: run the same search again to continue")


def _run_trial(objective: Objective) -> None:
    study = objective.study
    asked: list[optuna.Trial] = []
    raised: list[BaseException] = []

    def call(trial: optuna.Trial) -> float:
        asked.append(trial)
        try:
            return objective(trial)
        except BaseException as error:
            raised.append(error)
            raise

    started = time.monotonic()
    try:
        # `optimize` instead of ask and tell, because it records the heartbeat.
        study.optimize(call, n_trials=1, catch=(TrialFailed, SlotTaken, RunDirBusy))
    except TimeBudgetExceeded:
        return
    except BaseException as error:
        # An interrupt within Optuna's own database calls causes another error there, which is raised instead.
        interrupt = _interrupt_behind(error) if isinstance(error, Exception) else None
        # Errors of the objective arrive unchanged; any other one means that Optuna could not end the trial.
        if isinstance(error, Exception) and interrupt is None and error not in raised:
            for trial in asked:
                if (reason := lost_reason(study, trial.number, trial._trial_id)) is not None:
                    log.info("trial %d: lost (%s): its result here is dropped", trial.number, reason)
                    _close_run(trial, reason)
                    return
        # Optuna ends the trial after an Exception, but not after SystemExit and the like.
        for trial in asked:
            requeue(study, trial.number, "the search was stopped")
        if interrupt is not None:
            raise interrupt from None
        raise
    for trial in asked:
        _log_trial_end(objective, trial.number, time.monotonic() - started)


def _close_run(trial: optuna.Trial, reason: str) -> None:
    """End the MLflow run of a lost trial, which may have been lost after its training."""
    run_id = trial.user_attrs.get("run_id")
    if run_id is None:
        return
    try:
        run = tracking.open_run(run_id)
        run.set_tags({"cmran.interrupted": reason})
        run.finish("KILLED")
    except CmranError as error:
        log.warning("%s", error)


def _interrupt_behind(error: BaseException) -> BaseException | None:
    behind = error.__context__
    while behind is not None and isinstance(behind, Exception):
        behind = behind.__context__
    return behind


def _log_trial_end(objective: Objective, number: int, seconds: float) -> None:
    trials = objective.study.get_trials(deepcopy=False)
    trial, best = trials[number], best_trial(trials)
    if "interrupted" in trial.user_attrs:
        return
    match trial.state:
        case TrialState.COMPLETE:
            outcome = f"val {trial.value:.2f} %"
        case TrialState.PRUNED:
            outcome = f"pruned after epoch {trial.user_attrs['pruned_at_epoch']} at val {trial.value:.2f} %"
        case _:
            outcome = f"failed: {trial.user_attrs.get('failure', 'the objective returned no number')}"
    done = sum(slot.state.is_finished() for slot in trial_slots(trials))
    log.info(
        "trial %d: %s, %.1f s; best %s; %d of %d trials done, about %.0f s left",
        number,
        outcome,
        seconds,
        f"{best.value:.2f} % (trial {best.number})" if best else "none yet",
        done,
        objective.trial_slots,
        max(0, objective.trial_slots - done) * _mean_seconds(trials),
    )


def _mean_seconds(trials: list[FrozenTrial]) -> float:
    spent = [trial.duration.total_seconds() for trial in trials if trial.duration and trial.state != TrialState.FAIL]
    return sum(spent) / len(spent) if spent else 0.0


def _finish(
    objective: Objective, run: tracking.Run, started: float, given: Mapping[str, Mapping[str, Any]]
) -> SearchResult:
    study, out = objective.study, objective.out
    tidy(study, out)
    trials = trial_slots(study.get_trials(deepcopy=False))
    counts = Counter(report.STATES[trial.state] for trial in trials)
    run.log_metrics({f"trials.{state}": float(count) for state, count in counts.items()})
    for path in report.write(study, objective.base, out, given):
        run.log_artifact(path, "study")
    best = best_trial(trials)
    if best is None:
        raise CmranError(*_no_result(trials, out))
    if counts["running"]:
        log.info(
            "%d trials still run in other processes; the last process to finish writes the final report. If one of"
            " them was killed, run the same search again after %d minutes to continue its trial",
            counts["running"],
            GRACE_S // 60,
        )
    if not counts["running"] and not counts["waiting"]:
        run.log_params(best.params, "best.")
    run.set_tags({"cmran.best_trial": best.number, "cmran.best_run": best.user_attrs.get("run_id")})
    run.log_metrics({"best.val.accuracy": best.value})
    return SearchResult(
        study=study.study_name,
        best_trial=best.number,
        best_value=float(best.value or 0.0),
        best_params=dict(best.params),
        best_config=apply_params(best.params, objective.base),
        n_trials=len(trials) - counts["waiting"],
        counts=dict(counts),
        run_id=run.run_id,
        fingerprint=objective.fingerprint,
        out=out,
        seconds=time.monotonic() - started,
    )


def _no_result(trials: list[FrozenTrial], out: Path) -> tuple[str, str]:
    """Message and hint for a search without a complete trial."""
    failures = [trial.user_attrs["failure"] for trial in trials if "failure" in trial.user_attrs]
    if failures and all(trial.state == TrialState.FAIL for trial in trials):
        return f"all {len(trials)} trials failed; trial {trials[-1].number}: {failures[-1]}", ""
    if running := sum(trial.state == TrialState.RUNNING for trial in trials):
        return f"no trial is complete yet: {running} still run in other processes", "wait until they have finished"
    return f"{out}: no trial was completed in time", "run the same search again with a larger `timeout_s` to continue"


@contextlib.contextmanager
def _storage_errors(name: str) -> Iterator[None]:
    """Raise database errors of the study as StorageError."""
    try:
        yield
    except (sqlalchemy.exc.SQLAlchemyError, optuna.exceptions.StorageInternalError) as error:
        raise StorageError(
            f"the storage of study {name!r} failed ({database_reason(error)})",
            hint="run the same search again to continue",
        ) from error


@contextlib.contextmanager
def _deletion_errors(study: optuna.Study) -> Iterator[None]:
    """Raise errors that follow from the deletion of the study as StorageError."""
    try:
        yield
    except Exception as error:
        if isinstance(error, CmranError):
            raise
        try:
            # Searched by name, because Optuna caches the name of an id.
            exists = study._storage.get_study_id_from_name(study.study_name) == study._study_id
        except KeyError:
            exists = False
        if exists:
            raise
        raise StorageError(
            f"study {study.study_name!r} was deleted during the search", hint="choose another `study` and another `out`"
        ) from error


@contextlib.contextmanager
def _exit_on_sigterm() -> Iterator[None]:
    """Within the block SIGTERM raises SystemExit, so that trials and runs are closed.

    An existing handler (Prefect's, the command line's) stays in place.
    """
    unhandled = signal.getsignal(signal.SIGTERM) is signal.SIG_DFL
    with raise_on_term(lambda number: SystemExit(128 + number)) if unhandled else contextlib.nullcontext():
        yield
