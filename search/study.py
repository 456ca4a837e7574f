"""The study: where it is kept, which trials it still owes, who runs them, how the next one is drawn.

Words: a *place* is one of the N trials that a search wants. A trial whose worker died or was stopped is *abandoned*:
it ends as FAIL and a *retry* (a new trial with the same parameters) takes its place, so a place is never lost and
never counted twice. A trial that failed by itself keeps its place.
"""

import contextlib
import copy
import json
import math
import os
import socket
import time
import uuid
import warnings
from collections.abc import Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import optuna
import psutil  # type: ignore[import-untyped]
import sqlalchemy.exc
from optuna.distributions import BaseDistribution
from optuna.storages import BaseStorage, RDBStorage, RetryHeartbeatStaleTrialCallback
from optuna.trial import FrozenTrial, TrialState
from sqlalchemy.engine import make_url

from cmran.errors import UserError
from cmran.files import file_lock
from search.journal import open_journal

STORAGE_VARIABLE = "CMRAN_STUDY_STORAGE"

HEARTBEAT_S = 60
GRACE_S = 300
"""A worker on another machine is taken for dead when its heartbeat is this old (SQL storages)."""

UNOWNED_S = 30.0
"""A running trial that no worker has put its name to for so long was left by one that died in between."""

MAX_RETRIES = 5
"""A trial whose workers died so often is not tried again: it may be what kills them."""

STARTUP_TRIALS = 10
"""Trials drawn at random before the sampler models what it has seen (Optuna's default)."""

READY_WAIT_S = 10.0
CONNECT_S = 10
LOCK_WAIT_S = 60


# --- where studies are kept -------------------------------------------------------------------------------------------


def storage_address() -> str:
    """Where studies are kept: CMRAN_STUDY_STORAGE, or studies.db in the current folder.

    A URL for SQLAlchemy (`sqlite:///FILE`, `postgresql+psycopg://USER:PASSWORD@HOST/DATABASE`, ...), or the plain path
    of a journal file.
    """
    return os.environ.get(STORAGE_VARIABLE) or f"sqlite:///{Path.cwd() / 'studies.db'}"


def open_storage(address: str | None = None) -> BaseStorage:
    """The storage at `address` (default: `storage_address()`); made if it is new. Safe for several processes at once.

    Raises UserError (without the password): bad address, missing driver, unreachable server, unwritable file.
    """
    address = address or storage_address()
    shown = _without_password(address)
    try:
        if "://" not in address:
            return open_journal(Path(address).absolute())
        if make_url(address).get_backend_name() == "sqlite":
            return _open_sqlite(address)
        return _open_server(address)
    except (ImportError, sqlalchemy.exc.NoSuchModuleError) as error:
        reason = error.__cause__ or error
        raise UserError(f"{STORAGE_VARIABLE}={shown}: its driver is not installed ({_line(reason)})") from None
    except sqlalchemy.exc.ArgumentError:
        raise UserError(
            f"{STORAGE_VARIABLE}={shown}: not a storage URL: expected sqlite:///FILE, "
            "postgresql+psycopg://USER:PASSWORD@HOST/DATABASE or the path of a journal file"
        ) from None
    except (sqlalchemy.exc.SQLAlchemyError, optuna.exceptions.StorageInternalError, RuntimeError, OSError) as error:
        reason = getattr(error, "orig", None) or error.__cause__ or error
        raise UserError(f"cannot open the study storage {shown}: {_line(reason)}") from None


class _SqliteStorage(RDBStorage):
    """SQLite has no row locks: without a lock of ours two processes could both take the same waiting trial."""

    def set_trial_state_values(self, trial_id: int, state: TrialState, values: Sequence[float] | None = None) -> bool:
        with _database_lock(self.url):
            return super().set_trial_state_values(trial_id, state, values)


@contextlib.contextmanager
def _as_it_is() -> Iterator[None]:
    """Optuna marks its heartbeat, in use since version 2, as experimental."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", optuna.exceptions.ExperimentalWarning)
        yield


def _open_sqlite(address: str) -> BaseStorage:
    database = make_url(address).database
    if database in (None, "", ":memory:"):
        raise UserError(f"{STORAGE_VARIABLE}={address}: a study in memory cannot be resumed: name a file")
    # Absolute, because connections are opened again later, when the current folder may be another one.
    address = f"sqlite:///{Path(str(database)).absolute()}"
    # Two processes that make the same new database at once: one would die.
    with _database_lock(address), _as_it_is():
        return _SqliteStorage(address, {"connect_args": {"timeout": LOCK_WAIT_S}}, **_heartbeat())


def _open_server(address: str) -> BaseStorage:
    options: dict[str, Any] = {"pool_pre_ping": True}
    if make_url(address).get_backend_name() == "postgresql":
        options["connect_args"] = {"connect_timeout": CONNECT_S}
    for attempt in range(3):
        try:
            with _as_it_is():
                return RDBStorage(address, options, **_heartbeat())
        except (sqlalchemy.exc.ProgrammingError, sqlalchemy.exc.IntegrityError):
            # Another process was making the same tables.
            if attempt == 2:
                raise
            time.sleep(1.0)
    raise AssertionError("unreachable")


def _heartbeat() -> dict[str, Any]:
    return {"heartbeat_interval": HEARTBEAT_S, "grace_period": GRACE_S, "heartbeat_stale_trial_callback": _retry}


@contextlib.contextmanager
def _database_lock(url: str) -> Iterator[None]:
    """Exclude other processes from a SQLite database. Without it two of them could take the same trial."""
    remedy = (
        f"keep the studies on a local disk ({STORAGE_VARIABLE}=sqlite:////FOLDER/studies.db), or in PostgreSQL"
        " (postgresql+psycopg://USER:PASSWORD@HOST/DATABASE)"
    )
    with file_lock(Path(f"{make_url(url).database}.lock"), required=remedy):
        yield


def _without_password(address: str) -> str:
    try:
        return make_url(address).render_as_string(hide_password=True) if "://" in address else address
    except (sqlalchemy.exc.ArgumentError, ValueError):
        return address.split("://")[0] + "://..."


def _line(error: BaseException) -> str:
    return " ".join(str(error).split())[:300] or type(error).__name__


# --- one study --------------------------------------------------------------------------------------------------------


def open_study(
    name: str, settings: Mapping[str, Any], first: Mapping[str, Any], *, seed: int, epochs: int
) -> optuna.Study:
    """The study `name`, made if it is new, with the trial `first` waiting.

    `settings`: what a study is about (mode, fingerprint, recipe, epochs, ...), kept as user attributes of the study. A
    study that was made with others is not gone on with. `seed` of the sampler, `epochs` of a trial.

    Raises UserError where the settings differ (the first difference is named) and for a study of another tool.
    """
    optuna.logging.set_verbosity(optuna.logging.ERROR)
    # The worker reports each trial in its own words; Optuna would add a traceback for each failed one.
    storage = open_storage()
    sampler, pruner = PlaceSampler(seed), make_pruner(epochs)
    try:
        study = optuna.create_study(
            storage=storage, study_name=name, direction="maximize", sampler=sampler, pruner=pruner
        )
    except optuna.exceptions.DuplicatedStudyError:
        study = optuna.load_study(storage=storage, study_name=name, sampler=sampler, pruner=pruner)
        _wait_until_ready(study)
    settings = json.loads(json.dumps(settings))
    found = study.user_attrs
    if not found.get("ready"):
        if _is_foreign(study):
            raise UserError(f"study {name!r} was not made by this command: name another study")
        # Made just now, or by a process that died before it was done.
        for key, value in {"id": uuid.uuid4().hex, **settings}.items():
            if key not in found:
                study.set_user_attr(key, value)
        study.enqueue_trial(dict(first), skip_if_exists=True)
        study.set_user_attr("ready", True)
    found = study.user_attrs
    if difference := _difference({key: found.get(key) for key in settings}, settings):
        raise UserError(f"study {name!r} was made with {difference}: name another study, or search as before")
    return study


def make_pruner(epochs: int) -> optuna.pruners.BasePruner:
    """Stops a trial whose best val accuracy so far is below the median of the others at the same epoch.

    Nothing is pruned before 4 trials are complete and before a quarter of the epochs has passed: some settings (small
    learning rates, weak mode) rise late.
    """
    return optuna.pruners.MedianPruner(n_startup_trials=4, n_warmup_steps=max(1, math.ceil(epochs / 4)))


class PlaceSampler(optuna.samplers.BaseSampler):
    """TPE whose random numbers depend on the seed and on the trial's place in the study alone.

    So a resumed search does not repeat the trials it began with, two workers never draw the same ones, and a search
    that was killed and resumed draws what the undisturbed one would have drawn.
    """

    def __init__(self, seed: int) -> None:
        self._seed = seed
        self._samplers: dict[int, optuna.samplers.TPESampler] = {}

    def before_trial(self, study: optuna.Study, trial: FrozenTrial) -> None:
        """Make the trial's own sampler."""
        place = sum(other.number < trial.number for other in places(study.get_trials(deepcopy=False)))
        self._samplers[trial.number] = optuna.samplers.TPESampler(
            seed=(self._seed * 1_000_003 + place) % 2**32, n_startup_trials=STARTUP_TRIALS
        )

    def infer_relative_search_space(self, study: optuna.Study, trial: FrozenTrial) -> dict[str, BaseDistribution]:
        """As TPE does."""
        return self._samplers[trial.number].infer_relative_search_space(study, trial)

    def sample_relative(
        self, study: optuna.Study, trial: FrozenTrial, search_space: dict[str, BaseDistribution]
    ) -> dict[str, Any]:
        """As TPE does."""
        return self._samplers[trial.number].sample_relative(study, trial, search_space)

    def sample_independent(
        self, study: optuna.Study, trial: FrozenTrial, param_name: str, param_distribution: BaseDistribution
    ) -> Any:
        """As TPE does."""
        return self._samplers[trial.number].sample_independent(study, trial, param_name, param_distribution)

    def after_trial(
        self, study: optuna.Study, trial: FrozenTrial, state: TrialState, values: Sequence[float] | None
    ) -> None:
        """Forget the trial's sampler."""
        self._samplers.pop(trial.number, None)


def _wait_until_ready(study: optuna.Study) -> None:
    # The process that made it may still be writing what the study is about.
    deadline = time.monotonic() + READY_WAIT_S
    while not study.user_attrs.get("ready") and time.monotonic() < deadline:
        if _is_foreign(study):
            return
        time.sleep(0.2)


def _is_foreign(study: optuna.Study) -> bool:
    # Ours says what it is about before it gets its first trial.
    return "id" not in study.user_attrs and bool(study.get_trials(deepcopy=False))


def _difference(old: Mapping[str, Any], new: Mapping[str, Any], prefix: str = "") -> str:
    for key in [*new, *(key for key in old if key not in new)]:
        was, now = old.get(key), new.get(key)
        if isinstance(was, Mapping) and isinstance(now, Mapping):
            if inner := _difference(was, now, f"{prefix}{key}."):
                return inner
        elif was != now:
            return f"{prefix}{key} {was}, not {now}"
    return ""


# --- trials and their workers -----------------------------------------------------------------------------------------


def places(trials: Iterable[FrozenTrial]) -> list[FrozenTrial]:
    """The trials that count, by number: all but the abandoned ones, whose retries count instead."""
    trials = sorted(trials, key=lambda trial: trial.number)
    replaced = {number for trial in trials for number in _history(trial)}
    kept, retried = [], set()
    for trial in trials:
        if trial.number in replaced or "abandoned" in trial.user_attrs:
            continue
        if history := _history(trial):
            # Two workers may have found the same dead one.
            if history[-1] in retried:
                continue
            retried.add(history[-1])
        kept.append(trial)
    return kept


def best_trial(trials: Iterable[FrozenTrial]) -> FrozenTrial | None:
    """The complete trial of the highest value, the earlier of two equal ones; None where none is complete."""
    complete = [trial for trial in trials if trial.state == TrialState.COMPLETE and trial.value is not None]
    return max(complete, key=lambda trial: (trial.value or 0.0, -trial.number), default=None)


_working: set[str] = set()


@contextlib.contextmanager
def worker() -> Iterator[dict[str, Any]]:
    """The name of a worker of this process, for the user attribute `worker` of its trials, good within the block."""
    token = uuid.uuid4().hex
    _working.add(token)
    try:
        yield {
            "host": socket.gethostname(),
            "pid": os.getpid(),
            "started": psutil.Process().create_time(),
            "token": token,
        }
    finally:
        _working.discard(token)


def is_dead(name: Mapping[str, Any]) -> bool:
    """Whether that worker is known to be gone. One of another machine never is: its heartbeat decides."""
    if name["host"] != socket.gethostname():
        return False
    if name["pid"] == os.getpid():
        return name["token"] not in _working
    try:
        process = psutil.Process(name["pid"])
        # A process that got the same number later is not the worker.
        return bool(process.status() == psutil.STATUS_ZOMBIE or abs(process.create_time() - name["started"]) > 5)
    except psutil.NoSuchProcess:
        return True
    except psutil.AccessDenied:
        return False


class Reaper:
    """Finds the trials that dead workers of this machine left running, and puts their retries in the queue."""

    def __init__(self) -> None:
        self._unowned: dict[int, float] = {}

    def reap(self, study: optuna.Study) -> list[int]:
        """Numbers of the trials abandoned by this call. Those of dead machines are found by their heartbeat instead."""
        reaped = []
        for trial in study.get_trials(deepcopy=False, states=(TrialState.RUNNING,)):
            name = trial.user_attrs.get("worker")
            if name is None:
                since = self._unowned.setdefault(trial.number, time.monotonic())
                dead, reason = time.monotonic() - since > UNOWNED_S, "its worker died before it began"
            else:
                dead, reason = is_dead(name), f"its worker (process {name['pid']} on {name['host']}) died"
            if dead and abandon(study, trial.number, reason, limit=MAX_RETRIES):
                reaped.append(trial.number)
        return reaped

    def unowned(self, study: optuna.Study) -> bool:
        """Whether a trial is running that has no worker's name (yet)."""
        running = study.get_trials(deepcopy=False, states=(TrialState.RUNNING,))
        return any("worker" not in trial.user_attrs for trial in running)


def abandon(study: optuna.Study, number: int, reason: str, *, limit: int | None = None) -> bool:
    """End the running trial `number` as FAIL and queue its retry; False where another worker was quicker.

    With `limit`, a trial that was retried so often already keeps its place as a failed one.
    """
    trial = study.trials[number]
    if trial.state != TrialState.RUNNING:
        return False
    try:
        if limit is not None and len(_history(trial)) >= limit:
            set_trial_attr(study, trial, "failure", f"{reason}, as did {limit} before it")
        else:
            queue_retry(study, number, reason)
        study.tell(number, state=TrialState.FAIL)
    except (optuna.exceptions.UpdateFinishedTrialError, ValueError):
        return False
    return True


def queue_retry(study: optuna.Study, number: int, reason: str) -> None:
    """Mark the running trial `number` as abandoned and queue its retry; the caller ends it."""
    trials = study.trials
    # The retry takes the place in one step; killed after it, the next reaper does the rest.
    if not any(number in _history(other) for other in trials):
        _retry(study, trials[number], released=True)
    set_trial_attr(study, trials[number], "abandoned", reason)


def set_trial_attr(study: optuna.Study, trial: FrozenTrial, key: str, value: Any) -> None:
    """Set a user attribute of a running trial, whichever process began it."""
    # Optuna offers this to the trial's own process alone.
    study._storage.set_trial_user_attr(trial._trial_id, key, value)


def _retry(study: optuna.Study, trial: FrozenTrial, *, released: bool = False) -> None:
    """Queue a new trial with the parameters of `trial`. Also called by Optuna for one whose heartbeat has stopped.

    `released`: its worker is known to have let it go, so that the next one may go on in its folder.
    """
    own = {key: trial.user_attrs[key] for key in ("worker", "folder", "run_id") if key in trial.user_attrs}
    # One that ended before it had a folder hands on what it was handed.
    previous = own | {"released": released} if "folder" in own else trial.user_attrs.get("previous")
    trial = copy.copy(trial)
    trial.user_attrs = {"previous": previous} if previous else {}
    with _as_it_is():
        RetryHeartbeatStaleTrialCallback()(study, trial)


def _history(trial: FrozenTrial) -> list[int]:
    """Numbers of the abandoned trials whose place `trial` took, the latest last."""
    history: list[int] = trial.system_attrs.get("retry_history", [])
    return history
