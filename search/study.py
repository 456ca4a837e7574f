"""The Optuna study: storage, remaining trials, worker records, requeueing and sampling.

A search runs N *trial slots*. A trial whose worker died or was stopped is *interrupted*: it ends as FAIL, and a *retry*
(a new trial with the same parameters) fills its slot, so no slot is lost or counted twice. A trial that failed because
of its own settings keeps its slot.
"""

import contextlib
import copy
import json
import logging
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
import sqlalchemy.exc
from optuna.distributions import BaseDistribution
from optuna.storages import BaseStorage, RDBStorage, RetryHeartbeatStaleTrialCallback
from optuna.trial import FrozenTrial, TrialState
from sqlalchemy.engine import make_url

from cmran.config import RunConfig, parse
from cmran.errors import ConfigError, StorageError
from cmran.utils.files import file_lock
from cmran.utils.uris import absolute_sqlite_uri, has_bare_special_characters, redact, sqlite_path, sqlite_uri

log = logging.getLogger(__name__)

STORAGE_VARIABLE = "CMRAN_STUDY_STORAGE"

FORMAT = 2
"""Version of the user attributes that studies and trials carry."""

HEARTBEAT_S = 60
GRACE_S = 300
"""Age of a heartbeat after which its worker counts as dead, if nothing else is known about the worker."""

UNOWNED_S = float(GRACE_S)
"""Time after which a running trial without a worker record counts as interrupted: its worker died before writing it."""

WORKER_KEY = "worker "
"""Prefix of the study's user attributes that hold the records of its workers."""

MAX_RETRIES = 5
"""Retries of a trial whose workers keep dying. After that it counts as failed, because it may be the cause."""

STARTUP_TRIALS = 10
"""Random trials before TPE starts to model the results (Optuna's default)."""

READY_WAIT_S = 10.0
CONNECT_S = 10
LOCK_WAIT_S = 60


# --- storage ----------------------------------------------------------------------------------------------------------


def storage_url() -> str:
    """The SQLAlchemy URL of the study storage: CMRAN_STUDY_STORAGE, or studies.db in the current directory."""
    return os.environ.get(STORAGE_VARIABLE, "").strip() or sqlite_uri(Path("studies.db"))


def open_storage(url: str | None = None) -> BaseStorage:
    """Open the study storage, and create it if it does not exist. Several processes may do so at the same time.

    Args:
        url: `sqlite:///FILE`, `postgresql+psycopg://USER:PASSWORD@HOST/DATABASE` or another SQLAlchemy URL. The default
            is `storage_url()`.

    Raises:
        ConfigError: the URL is invalid, or its database driver is not installed.
        StorageError: the server cannot be reached, or the file cannot be written or locked.
    """
    configured = url is None and bool(os.environ.get(STORAGE_VARIABLE, "").strip())
    url = url or storage_url()
    if has_bare_special_characters(url):
        raise ConfigError(
            f"{STORAGE_VARIABLE}: its user name or password contains a special character that is not encoded",
            hint="percent-encode it (@ as %40, : as %3A, / as %2F, # as %23, ? as %3F)",
        )
    try:
        if make_url(url).get_backend_name() == "sqlite":
            return _open_sqlite(url)
        return _open_server(url)
    except (ImportError, sqlalchemy.exc.NoSuchModuleError) as error:
        reason = _one_line(error.__cause__ or error)
        raise ConfigError(f"{STORAGE_VARIABLE}={url}: its database driver is not installed ({reason})") from None
    except (sqlalchemy.exc.ArgumentError, ValueError):
        raise ConfigError(
            f"{STORAGE_VARIABLE}={url}: this is not a database URL",
            hint="use sqlite:///FILE or postgresql+psycopg://USER:PASSWORD@HOST/DATABASE",
        ) from None
    except (sqlalchemy.exc.SQLAlchemyError, optuna.exceptions.StorageInternalError, RuntimeError, OSError) as error:
        origin = STORAGE_VARIABLE if configured else f"the default without {STORAGE_VARIABLE}"
        raise StorageError(f"cannot open the study storage {url} ({origin}): {database_reason(error)}") from None


class _SqliteStorage(RDBStorage):
    """SQLite has no row locks: without this lock two processes could take the same waiting trial."""

    def set_trial_state_values(self, trial_id: int, state: TrialState, values: Sequence[float] | None = None) -> bool:
        with _database_lock(self.url):
            return super().set_trial_state_values(trial_id, state, values)


@contextlib.contextmanager
def _no_experimental_warning() -> Iterator[None]:
    """Ignore Optuna's warning that heartbeats, available since version 2, are experimental."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", optuna.exceptions.ExperimentalWarning)
        yield


def _open_sqlite(url: str) -> BaseStorage:
    if sqlite_path(url) is None:
        raise ConfigError(f"{STORAGE_VARIABLE}={url}: a study in memory cannot be resumed", hint="use sqlite:///FILE")
    # Absolute, because connections are reopened later, when the current directory may have changed.
    url = absolute_sqlite_uri(url)
    # If two processes created the same database at once, one of them would fail.
    with _database_lock(url), _no_experimental_warning():
        return _SqliteStorage(url, {"connect_args": {"timeout": LOCK_WAIT_S}}, **_heartbeat())


def _open_server(url: str) -> BaseStorage:
    options: dict[str, Any] = {"pool_pre_ping": True}
    if make_url(url).get_backend_name() == "postgresql":
        options["connect_args"] = {"connect_timeout": CONNECT_S}
    for attempt in range(3):
        try:
            with _no_experimental_warning():
                return RDBStorage(url, options, **_heartbeat())
        except (sqlalchemy.exc.ProgrammingError, sqlalchemy.exc.IntegrityError):
            # Another process was creating the same tables.
            if attempt == 2:
                raise
            time.sleep(1.0)
    raise AssertionError("unreachable")


def _heartbeat() -> dict[str, Any]:
    return {"heartbeat_interval": HEARTBEAT_S, "grace_period": GRACE_S, "heartbeat_stale_trial_callback": _add_retry}


@contextlib.contextmanager
def _database_lock(url: str) -> Iterator[None]:
    """Exclude other processes from a SQLite database."""
    remedy = (
        f"keep the studies on a local disk ({STORAGE_VARIABLE}=sqlite:////FOLDER/studies.db), or in PostgreSQL"
        " (postgresql+psycopg://USER:PASSWORD@HOST/DATABASE)"
    )
    with file_lock(Path(f"{make_url(url).database}.lock"), required=remedy):
        yield


def database_reason(error: BaseException) -> str:
    """Message of the database driver behind an error of SQLAlchemy or Optuna, in one line."""
    cause = error if hasattr(error, "orig") else error.__cause__ or error
    return _one_line(getattr(cause, "orig", None) or cause)


def _one_line(error: BaseException) -> str:
    return " ".join(redact(str(error)).split())[:300] or type(error).__name__


# --- study ------------------------------------------------------------------------------------------------------------


def open_study(
    name: str, settings: Mapping[str, Any], first: Mapping[str, Any], *, seed: int, epochs: int
) -> optuna.Study:
    """Open a study, or create it with one waiting trial.

    Args:
        name: Name of the study.
        settings: What defines the study (mode, fingerprint, recipe, epochs, ...). They are stored as user attributes of
            the study, and an existing study must have the same ones.
        first: Parameters of the first trial.
        seed: Seed of the sampler.
        epochs: Epochs of a trial, from which the pruner's warm-up follows.

    Raises:
        ConfigError: the study has other settings (the first difference is named), or another tool or another version of
            this one created it.
        StorageError: as in `open_storage`.
    """
    # The worker logs each trial itself; Optuna would add a traceback for each failed one.
    optuna.logging.set_verbosity(optuna.logging.ERROR)
    storage = open_storage()
    sampler, pruner = TrialSlotSampler(seed), make_pruner(epochs)
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
            raise ConfigError(f"study {name!r} was not created by this project", hint="choose another `study`")
        # The study is new, or the process that created it died before it was ready.
        for key, value in {"id": uuid.uuid4().hex, "format": FORMAT, **settings}.items():
            if key not in found:
                study.set_user_attr(key, value)
        study.enqueue_trial(dict(first), skip_if_exists=True)
        study.set_user_attr("ready", True)
    found = study.user_attrs
    _check_format(name, found)
    if difference := _difference({key: found.get(key) for key in settings}, settings):
        raise ConfigError(
            f"study {name!r} was created with {difference}",
            hint="choose another `study`, or search with the same settings",
        )
    return study


def known_base(name: str) -> RunConfig | None:
    """The settings around which the study `name` searches; None if the study does not exist.

    Raises:
        ConfigError: another version created the study.
        StorageError: as in `open_storage`.
    """
    try:
        found = optuna.load_study(storage=open_storage(), study_name=name).user_attrs
    except KeyError:
        return None
    if "base" not in found:
        return None
    _check_format(name, found)
    return parse(RunConfig, found["base"], f"study {name!r}")


def make_pruner(epochs: int) -> optuna.pruners.BasePruner:
    """Median pruning: stop a trial whose best val accuracy so far is below the median of the others at the same epoch.

    Pruning starts after 4 complete trials and a quarter of the epochs, because some settings (small learning rates,
    weak mode) improve late.
    """
    return optuna.pruners.MedianPruner(n_startup_trials=4, n_warmup_steps=max(1, math.ceil(epochs / 4)))


class TrialSlotSampler(optuna.samplers.BaseSampler):
    """TPE with a random state that depends only on the seed and the trial's slot.

    A resumed search therefore does not repeat its first trials, two workers never draw the same random numbers, and a
    search that was killed and resumed samples the same parameters as an uninterrupted one.
    """

    def __init__(self, seed: int) -> None:
        self._seed = seed
        self._samplers: dict[int, optuna.samplers.TPESampler] = {}

    def before_trial(self, study: optuna.Study, trial: FrozenTrial) -> None:
        """Create the sampler of the trial."""
        slot = sum(other.number < trial.number for other in trial_slots(study.get_trials(deepcopy=False)))
        self._samplers[trial.number] = optuna.samplers.TPESampler(
            seed=(self._seed * 1_000_003 + slot) % 2**32, n_startup_trials=STARTUP_TRIALS
        )

    def infer_relative_search_space(self, study: optuna.Study, trial: FrozenTrial) -> dict[str, BaseDistribution]:
        """Call TPE."""
        return self._samplers[trial.number].infer_relative_search_space(study, trial)

    def sample_relative(
        self, study: optuna.Study, trial: FrozenTrial, search_space: dict[str, BaseDistribution]
    ) -> dict[str, Any]:
        """Call TPE."""
        return self._samplers[trial.number].sample_relative(study, trial, search_space)

    def sample_independent(
        self, study: optuna.Study, trial: FrozenTrial, param_name: str, param_distribution: BaseDistribution
    ) -> Any:
        """Call TPE."""
        return self._samplers[trial.number].sample_independent(study, trial, param_name, param_distribution)

    def after_trial(
        self, study: optuna.Study, trial: FrozenTrial, state: TrialState, values: Sequence[float] | None
    ) -> None:
        """Delete the sampler of the trial."""
        self._samplers.pop(trial.number, None)


def _wait_until_ready(study: optuna.Study) -> None:
    """Wait for the process that created the study and may still be writing its settings."""
    deadline = time.monotonic() + READY_WAIT_S
    while not study.user_attrs.get("ready") and time.monotonic() < deadline:
        if _is_foreign(study):
            return
        time.sleep(0.2)


def _is_foreign(study: optuna.Study) -> bool:
    # `open_study` writes the id before the first trial.
    return "id" not in study.user_attrs and bool(study.get_trials(deepcopy=False))


def _check_format(name: str, attributes: Mapping[str, Any]) -> None:
    if (found := attributes.get("format", 1)) != FORMAT:
        raise ConfigError(
            f"study {name!r} has format {found}, expected {FORMAT}: another version of this project created it",
            hint="choose another `study`",
        )


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


def trial_slots(trials: Iterable[FrozenTrial]) -> list[FrozenTrial]:
    """The trials that count, ordered by number: an interrupted trial is replaced by its retry."""
    trials = sorted(trials, key=lambda trial: trial.number)
    replaced = {number for trial in trials for number in _retried(trial)}
    kept, retried = [], set()
    for trial in trials:
        if trial.number in replaced or "interrupted" in trial.user_attrs:
            continue
        if history := _retried(trial):
            # Two workers may have requeued the same trial.
            if history[-1] in retried:
                continue
            retried.add(history[-1])
        kept.append(trial)
    return kept


def best_trial(trials: Iterable[FrozenTrial]) -> FrozenTrial | None:
    """The complete trial with the highest value, and the earliest of equal ones; None if no trial is complete."""
    complete = [trial for trial in trials if trial.state == TrialState.COMPLETE and trial.value is not None]
    return max(complete, key=lambda trial: (trial.value or 0.0, -trial.number), default=None)


_active_tokens: set[str] = set()


@contextlib.contextmanager
def worker_record() -> Iterator[dict[str, Any]]:
    """Yield the record of a worker in this process, for the user attribute `worker` of its trials.

    The record is valid within the block. `host`, `pid` and `token` are always present. `boot`, `pid_namespace`,
    `time_namespace` and `start_ticks` (start of the process in clock ticks since boot) are present if /proc provides
    them; together with the pid they identify the process exactly.
    """
    token = uuid.uuid4().hex
    _active_tokens.add(token)
    machine, process = _machine(), _process(os.getpid())
    exact = machine | {"start_ticks": process[1]} if machine and process else {}
    try:
        yield {"host": socket.gethostname(), "pid": os.getpid(), "token": token, **exact}
    finally:
        _active_tokens.discard(token)


def is_dead(record: Mapping[str, Any]) -> bool:
    """Whether the worker with this record has certainly ended. If False, only its heartbeat can show that.

    This is known only for processes of the same boot and the same namespaces: containers may share a host name, and a
    pid means nothing in another PID namespace.
    """
    if record.get("token") in _active_tokens:
        return False
    machine, pid = _machine(), record.get("pid")
    if not machine or any(record.get(key) != value for key, value in machine.items()):
        return False
    if not isinstance(pid, int) or pid <= 0 or "start_ticks" not in record:
        return False
    process = _process(pid)
    if process is None:
        return _pid_is_unused(pid)
    state, start_ticks = process
    # A process that got the same pid later is not the worker. An earlier search of this process has ended.
    return state in "ZX" or start_ticks != record["start_ticks"] or pid == os.getpid()


def _machine() -> dict[str, str]:
    """Boot and namespaces of this process; empty if /proc does not provide them or shows another PID namespace."""
    try:
        # A PID namespace without its own /proc sees the pids of the namespace above.
        if os.readlink("/proc/self") != str(os.getpid()):
            return {}
        found = {
            "boot": Path("/proc/sys/kernel/random/boot_id").read_text(encoding="ascii").strip(),
            "pid_namespace": os.readlink("/proc/self/ns/pid"),
        }
        # Each time namespace has its own clock since boot. Kernels before 5.6 have none.
        time_namespace = Path("/proc/self/ns/time")
        found["time_namespace"] = os.readlink(time_namespace) if os.path.lexists(time_namespace) else "none"
    except (OSError, ValueError):
        return {}
    return found if all(found.values()) else {}


def _process(pid: int) -> tuple[str, int] | None:
    """State of a process and its start in clock ticks since boot (fields 3 and 22 of proc_pid_stat(5)), if readable."""
    try:
        # The second field, the process name, may contain spaces and parentheses.
        fields = Path(f"/proc/{pid}/stat").read_text(encoding="utf-8", errors="replace").rpartition(")")[2].split()
        return fields[0], int(fields[19])
    except (OSError, ValueError, IndexError):
        return None


def _pid_is_unused(pid: int) -> bool:
    # /proc may hide the processes of other users (hidepid), but a signal still finds them.
    try:
        os.kill(pid, 0)
    except ProcessLookupError:
        return True
    except (OSError, OverflowError):
        return False
    return False


class Reaper:
    """Finds running trials whose workers died, and queues their retries.

    Args:
        token: Token of the calling worker, which cannot be the owner of a trial without a worker record.
    """

    def __init__(self, token: str = "") -> None:
        self._token = token
        self._unowned_since: dict[int, float] = {}

    def reap(self, study: optuna.Study) -> list[int]:
        """Requeue the trials of dead workers.

        Returns:
            Numbers of the trials that were found by worker records. Trials found by heartbeat are not included.
        """
        with _no_experimental_warning():
            # Optuna does this only before it starts a trial, but the study's last trial may be stale, too.
            optuna.storages.fail_stale_trials(study)
        reaped = []
        for trial in study.get_trials(deepcopy=False, states=(TrialState.RUNNING,)):
            record = trial.user_attrs.get("worker")
            if record is None:
                since = self._unowned_since.setdefault(trial.number, time.monotonic())
                dead = time.monotonic() - since > UNOWNED_S or self._others_are_dead(study)
                reason = "its worker died before the trial started"
            else:
                dead, reason = is_dead(record), f"its worker (process {record.get('pid')} on {record.get('host')}) died"
            if dead and requeue(study, trial.number, reason, limit=MAX_RETRIES):
                reaped.append(trial.number)
        return reaped

    def has_unowned(self, study: optuna.Study) -> bool:
        """Whether a running trial has no worker record (yet)."""
        running = study.get_trials(deepcopy=False, states=(TrialState.RUNNING,))
        return any("worker" not in trial.user_attrs for trial in running)

    def _others_are_dead(self, study: optuna.Study) -> bool:
        """Whether all other workers that ever joined the study are known to be dead."""
        records = [record for key, record in study.user_attrs.items() if key.startswith(WORKER_KEY)]
        others = [record for record in records if record.get("token") != self._token]
        return bool(others) and all(is_dead(record) for record in others)


def requeue(study: optuna.Study, number: int, reason: str, *, limit: int | None = None) -> bool:
    """End the running trial `number` as FAIL and queue its retry.

    Args:
        study: The study.
        number: Number of the trial.
        reason: Why the trial was interrupted.
        limit: Retries after which the trial counts as failed instead.

    Returns:
        False if the trial is not running, for example because another worker has requeued it.
    """
    trial = study.trials[number]
    if trial.state != TrialState.RUNNING:
        return False
    try:
        if limit is not None and len(_retried(trial)) >= limit:
            set_trial_attr(study, trial, "failure", f"{reason}, as in {limit} earlier attempts")
        else:
            queue_retry(study, number, reason)
        study.tell(number, state=TrialState.FAIL)
    except (optuna.exceptions.UpdateFinishedTrialError, ValueError):
        return False
    return True


def lost_reason(study: optuna.Study, number: int, trial_id: int) -> str | None:
    """Why the trial no longer belongs to its worker: another process ended or removed it. None while it is running."""
    try:
        trial = study._storage.get_trial(trial_id)
        if trial.state == TrialState.RUNNING:
            return None
        retry = next((other.number for other in study.get_trials(deepcopy=False) if number in _retried(other)), None)
    except KeyError:
        return "it is no longer in the study"
    if retry is not None:
        return f"another worker requeued it as trial {retry}"
    return f"another process ended it as {trial.state.name}"


def queue_retry(study: optuna.Study, number: int, reason: str) -> None:
    """Mark the running trial `number` as interrupted and queue its retry. The caller ends the trial."""
    trials = study.trials
    # Adding the retry is one transaction. If this process is killed after it, the next reaper completes the rest.
    if not any(number in _retried(other) for other in trials):
        _add_retry(study, trials[number], worker_stopped=True)
    set_trial_attr(study, trials[number], "interrupted", reason)


def set_trial_attr(study: optuna.Study, trial: FrozenTrial, key: str, value: Any) -> None:
    """Set a user attribute of a running trial of any process."""
    # Optuna's public API offers this only to the process that runs the trial.
    study._storage.set_trial_user_attr(trial._trial_id, key, value)


def _add_retry(study: optuna.Study, trial: FrozenTrial, *, worker_stopped: bool = False) -> None:
    """Queue a new trial with the parameters of `trial`. Optuna calls this for a trial whose heartbeat has stopped.

    Args:
        study: The study.
        trial: The interrupted trial.
        worker_stopped: Whether its worker is known to have stopped, so that the retry may continue in its directory.
    """
    own = {key: trial.user_attrs[key] for key in ("worker", "folder", "run_id") if key in trial.user_attrs}
    # A trial that was interrupted before it had a directory passes on the one of its predecessor.
    previous = own | {"worker_stopped": worker_stopped} if "folder" in own else trial.user_attrs.get("previous")
    trial = copy.copy(trial)
    trial.user_attrs = {"previous": previous} if previous else {}
    if not worker_stopped:
        log.info("trial %d: its worker's heartbeat has stopped; the trial is requeued", trial.number)
    with _no_experimental_warning():
        RetryHeartbeatStaleTrialCallback()(study, trial)


def _retried(trial: FrozenTrial) -> list[int]:
    """Numbers of the interrupted trials that `trial` replaces, latest last."""
    history: list[int] = trial.system_attrs.get("retry_history", [])
    return history
