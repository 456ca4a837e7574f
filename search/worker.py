"""A search: one worker's loop over the trials of a study, and what it leaves behind."""

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
from cmran.data.features import open_folder
from cmran.data.validation import require_labels
from cmran.errors import UserError
from cmran.files import cache_lock, read_json, write_json
from cmran.hardware import pick_device, require_precision
from cmran.interrupts import term_raises
from cmran.training import check_fits
from search import report
from search.names import STUDY_NAME_RULE, is_study_name
from search.objective import FolderBusy, Objective, OutOfTime, Surplus, TrialFailed, tidy
from search.space import config_of, describe, published_params
from search.study import GRACE_S, JOINED, Reaper, abandon, best_trial, lost, open_study, places, worker

log = logging.getLogger(__name__)


@dataclass(frozen=True, kw_only=True)
class SearchResult:
    """What a study holds when a search returns."""

    study: str
    best_trial: int
    best_value: float
    # Val accuracy in %.
    best_params: dict[str, Any]
    # As `search.space.config_of` takes them: with a base of more epochs the schedule scales.
    best_config: RunConfig
    n_trials: int
    # Places taken, whatever became of them: complete, pruned, failed, running elsewhere.
    counts: dict[str, int]
    # Of these by state: {"complete": 8, "pruned": 3, "failed": 1}.
    run_id: str
    # The MLflow run above the trials' runs.
    fingerprint: str
    out: Path
    seconds: float
    # Of this call.

    @property
    def best_file(self) -> Path:
        """The best settings as a file for `cmran train --config`."""
        return self.out / "best.yaml"


def default_study(mode: Mode, fingerprint: str) -> str:
    """Name of the study of a mode on a data folder, where none is given."""
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
    """Search for the settings with the best val accuracy around a recipe; the recipe itself is trial 0.

    `trials` is the number that the study shall have in the end (complete, pruned and failed ones count), so that the
    same call again, after a kill at any moment, does what is left and no more. Several processes may work on one
    study at once. `epochs` of a trial: default the recipe's. After `timeout_s` seconds no trial begins and the running
    one ends with its epoch; a resume goes on with it. `base`: settings to search around instead of the recipe's;
    `given`: those of them that best.yaml shall hold besides the searched ones, {"model": {...}, "train": {...}}
    (default: all in which `base` differs from its recipe). The number of epochs of a trial is not among them.

    `out` gets a folder a trial (checkpoints of the best alone), best.yaml and the tables and pictures of the study.

    Raises UserError: bad data or settings, a study or `out` of another search, no trial that was finished, a storage
    or tracking server that fails. TERM and interrupt leave everything ready for a resume.
    """
    started = time.monotonic()
    if study is not None and not is_study_name(study):
        raise UserError(f"study name {study!r}: {STUDY_NAME_RULE}")
    if given is None:
        given = {} if base is None else _differences(base)
    # First, as every store that will be needed.
    tracking.connect()
    base = _base(base, mode, recipe, epochs)
    require_precision(base.train.precision, pick_device(device))
    with open_folder(data, mode=mode) as folder:
        # Once, here: a folder that cannot be used shall not fail trial after trial.
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
        stack.enter_context(_terminable())
        stack.enter_context(_storage_errors(name))
        # Two processes that begin together shall make one study and one parent run.
        with cache_lock(f"search-{mode}-{fingerprint}.lock"):
            found = open_study(name, settings, published_params(base), seed=seed, epochs=base.train.epochs)
            stack.enter_context(_existing(found))
            _claim(out, found)
            run = stack.enter_context(_parent_run(found, mode, parent_run_id))
        run.log_params({"trials": trials, "timeout_s": timeout_s, "seed": seed, "study": name}, "search.")
        run.log_params(base)
        run.log_params(space, "space.")
        run.log_dataset(data, fingerprint, "training")
        own = stack.enter_context(worker())
        found.set_user_attr(JOINED + own["token"], own)
        objective = Objective(
            study=found,
            data=data,
            fingerprint=fingerprint,
            base=base,
            places=trials,
            out=out,
            parent_run_id=run.run_id,
            worker=own,
            device=device,
            deadline=None if timeout_s is None else started + timeout_s,
        )
        _work(objective)
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
        raise UserError(f"the settings are for mode {base.model.mode}, but mode {mode} was asked for")
    if base.train.selection_split != "val":
        raise UserError("a search looks at val alone: leave selection_split at val")
    return base


def _claim(out: Path, study: optuna.Study) -> None:
    """Make `out` the folder of this study. Raises UserError where it is another's."""
    path, own = out / "search.json", {"study": study.study_name, "id": study.user_attrs["id"]}
    try:
        found = read_json(path, "name another folder")
    except FileNotFoundError:
        write_json(path, own)
        return
    if found != own:
        other = found.get("study")
        why = "made anew or kept in another storage" if other == own["study"] else f"not of {own['study']!r}"
        raise UserError(f"{out} holds the trials of study {other!r}, {why}: name another folder")


@contextlib.contextmanager
def _parent_run(study: optuna.Study, mode: Mode, parent_run_id: str | None) -> Iterator[tracking.Run]:
    """The run above the trials' runs: that of the study, gone on with, or a new one under another parent."""
    key = f"run under {parent_run_id}" if parent_run_id else "run"
    run_id = study.user_attrs.get(key)
    if run_id is not None and not tracking.run_exists(run_id):
        log.warning("the study's run %s is not at %s: a new one begins", run_id, tracking.shown_tracking_uri())
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


def _work(objective: Objective) -> None:
    """Run trials until the study has all its places or the time is over."""
    study, reaper = objective.study, Reaper(objective.worker["token"])
    while objective.deadline is None or time.monotonic() < objective.deadline:
        for number in reaper.reap(study):
            log.info("trial %d was left by a dead worker: it goes on as a new trial", number)
        trials = places(study.get_trials(deepcopy=False))
        waiting = any(trial.state == TrialState.WAITING for trial in trials[: objective.places])
        if len(trials) >= objective.places and not waiting:
            if not reaper.unowned(study):
                return
            # Asked for this very moment by another process, or by one that died before it said so.
            time.sleep(0.5)
            continue
        _one_trial(objective)
        tidy(study, objective.out)
    log.info("the time is over: the same search again goes on from here")


def _one_trial(objective: Objective) -> None:
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
        # optimize, not ask and tell: it keeps the heartbeat.
        study.optimize(call, n_trials=1, catch=(TrialFailed, Surplus, FolderBusy))
    except OutOfTime:
        return
    except BaseException as error:
        # Within its own database calls Optuna stumbles over an interrupt, and raises that instead.
        interrupt = _interrupt_behind(error) if isinstance(error, Exception) else None
        # An error of the objective is raised as it is: another one is of Optuna, which cannot end the trial.
        if isinstance(error, Exception) and interrupt is None and error not in raised:
            for trial in asked:
                if (why := lost(study, trial.number, trial._trial_id)) is not None:
                    log.info("trial %d: lost (%s): its result here is dropped", trial.number, why)
                    _close_run(trial, why)
                    return
        # Exceptions have ended the trial; what is no Exception, such as SystemExit, leaves it running.
        for trial in asked:
            abandon(study, trial.number, "the search was stopped")
        if interrupt is not None:
            raise interrupt from None
        raise
    for trial in asked:
        _tell_end(objective, trial.number, time.monotonic() - started)


def _close_run(trial: optuna.Trial, why: str) -> None:
    """End the MLflow run of a lost trial, which may have been lost after its training."""
    run_id = trial.user_attrs.get("run_id")
    if run_id is None:
        return
    try:
        run = tracking.open_run(run_id)
        run.set_tags({"cmran.abandoned": why})
        run.finish("KILLED")
    except UserError as error:
        log.warning("%s", error)


def _interrupt_behind(error: BaseException) -> BaseException | None:
    behind = error.__context__
    while behind is not None and isinstance(behind, Exception):
        behind = behind.__context__
    return behind


def _tell_end(objective: Objective, number: int, seconds: float) -> None:
    trials = objective.study.get_trials(deepcopy=False)
    trial, best = trials[number], best_trial(trials)
    if "abandoned" in trial.user_attrs:
        return
    match trial.state:
        case TrialState.COMPLETE:
            what = f"val {trial.value:.2f} %"
        case TrialState.PRUNED:
            what = f"pruned after epoch {trial.user_attrs['pruned_at_epoch']} at val {trial.value:.2f} %"
        case _:
            what = f"failed: {trial.user_attrs.get('failure', 'the objective gave no number')}"
    done = sum(place.state.is_finished() for place in places(trials))
    log.info(
        "trial %d: %s, %.1f s; best %s; %d of %d trials done, about %.0f s left",
        number,
        what,
        seconds,
        f"{best.value:.2f} % (trial {best.number})" if best else "none yet",
        done,
        objective.places,
        max(0, objective.places - done) * _mean_seconds(trials),
    )


def _mean_seconds(trials: list[FrozenTrial]) -> float:
    spent = [trial.duration.total_seconds() for trial in trials if trial.duration and trial.state != TrialState.FAIL]
    return sum(spent) / len(spent) if spent else 0.0


def _finish(
    objective: Objective, run: tracking.Run, started: float, given: Mapping[str, Mapping[str, Any]]
) -> SearchResult:
    study, out = objective.study, objective.out
    tidy(study, out)
    trials = places(study.get_trials(deepcopy=False))
    counts = Counter(report.STATES[trial.state] for trial in trials)
    run.log_metrics({f"trials.{state}": float(count) for state, count in counts.items()})
    report.write(study, objective.base, out, given)
    for path in report.files(out):
        run.log_artifact(path, "study")
    best = best_trial(trials)
    if best is None:
        raise UserError(_nothing_found(trials, out))
    if counts["running"]:
        log.info(
            "%d trials still run in other processes; the last one to end has the last word. If one of them was killed,"
            " the same search again, %d minutes after that, goes on with its trial",
            counts["running"],
            GRACE_S // 60,
        )
    config = config_of(best.params, objective.base)
    if not counts["running"] and not counts["waiting"]:
        run.log_params(best.params, "best.")
    run.set_tags({"cmran.best_trial": best.number, "cmran.best_run": best.user_attrs.get("run_id")})
    run.log_metrics({"best.val.accuracy": best.value})
    return SearchResult(
        study=study.study_name,
        best_trial=best.number,
        best_value=float(best.value or 0.0),
        best_params=dict(best.params),
        best_config=config,
        n_trials=len(trials) - counts["waiting"],
        counts=dict(counts),
        run_id=run.run_id,
        fingerprint=objective.fingerprint,
        out=out,
        seconds=time.monotonic() - started,
    )


def _nothing_found(trials: list[FrozenTrial], out: Path) -> str:
    failures = [trial.user_attrs["failure"] for trial in trials if "failure" in trial.user_attrs]
    if failures and all(trial.state == TrialState.FAIL for trial in trials):
        return f"every one of the {len(trials)} trials failed; trial {trials[-1].number}: {failures[-1]}"
    if running := sum(trial.state == TrialState.RUNNING for trial in trials):
        return f"no trial is complete yet: {running} still run in other processes; look again when they are done"
    return f"no trial was finished in time: the same search again, with more time, goes on from here ({out})"


@contextlib.contextmanager
def _storage_errors(name: str) -> Iterator[None]:
    try:
        yield
    except (sqlalchemy.exc.SQLAlchemyError, optuna.exceptions.StorageInternalError) as error:
        reason = getattr(error.__cause__ or error, "orig", None) or error.__cause__ or error
        text = " ".join(str(reason).split())[:300]
        raise UserError(f"the storage of study {name!r} failed ({text}): the same search again goes on") from error


@contextlib.contextmanager
def _existing(study: optuna.Study) -> Iterator[None]:
    """Within the block an error of a study that somebody has deleted says so."""
    try:
        yield
    except Exception as error:
        if isinstance(error, UserError):
            raise
        try:
            # By the name, because the name of an id is cached.
            there = study._storage.get_study_id_from_name(study.study_name) == study._study_id
        except KeyError:
            there = False
        if there:
            raise
        raise UserError(
            f"study {study.study_name!r} was deleted during the search: name another study and another folder"
        ) from error


@contextlib.contextmanager
def _terminable() -> Iterator[None]:
    """Within the block TERM ends the process as SystemExit does: trials and runs are ended in order.

    A handler that somebody has set already (Prefect, our command line) is left alone.
    """
    alone = signal.getsignal(signal.SIGTERM) is signal.SIG_DFL
    with term_raises(lambda number: SystemExit(128 + number)) if alone else contextlib.nullcontext():
        yield
