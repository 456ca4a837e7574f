"""The study: where it is kept, which trials it still owes, who runs them, how the next one is drawn.

Words: a *place* is one of the N trials that a search wants. A trial whose worker died or was stopped is *abandoned*:
it ends as FAIL and a *retry* (a new trial with the same parameters) takes its place, so a place is never lost and
never counted twice. A trial that failed by itself keeps its place.
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
from cmran.errors import CmranError
from cmran.utils.files import file_lock
from cmran.utils.uris import absolute_sqlite_uri, has_bare_special_characters, redact, sqlite_path, sqlite_uri
from search.journal import open_journal

log = logging.getLogger(__name__)

STORAGE_VARIABLE = "CMRAN_STUDY_STORAGE"

HEARTBEAT_S = 60
GRACE_S = 300
"""A worker of which nothing else is known is taken for dead when its heartbeat is this old (SQL storages)."""

UNOWNED_S = float(GRACE_S)
"""A running trial that no worker has put its name to for so long was left by one that died in between."""

JOINED = "worker "
"""Beginning of the user attributes of a study that hold the records of its workers."""

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
    return os.environ.get(STORAGE_VARIABLE, "").strip() or sqlite_uri(Path("studies.db"))


def open_storage(address: str | None = None) -> BaseStorage:
    """The storage at `address` (default: `storage_address()`); made if it is new. Safe for several processes at once.

    Raises CmranError (without the password): bad address, missing driver, unreachable server, unwritable file.
    """
    given = address is None and bool(os.environ.get(STORAGE_VARIABLE, "").strip())
    address = address or storage_address()
    shown = redact(address)
    if has_bare_special_characters(address):
        raise CmranError(
            f"{STORAGE_VARIABLE}: its user name or password holds a character that ends it too early: percent-encode "
            "it (@ as %40, : as %3A, / as %2F, # as %23, ? as %3F)"
        )
    try:
        if "://" not in address:
            return open_journal(Path(address).absolute())
        if make_url(address).get_backend_name() == "sqlite":
            return _open_sqlite(address)
        return _open_server(address)
    except (ImportError, sqlalchemy.exc.NoSuchModuleError) as error:
        reason = error.__cause__ or error
        raise CmranError(f"{STORAGE_VARIABLE}={shown}: its driver is not installed ({_line(reason)})") from None
    except (sqlalchemy.exc.ArgumentError, ValueError):
        raise CmranError(
            f"{STORAGE_VARIABLE}={shown}: not a storage URL: expected sqlite:///FILE, "
            "postgresql+psycopg://USER:PASSWORD@HOST/DATABASE or the path of a journal file"
        ) from None
    except (sqlalchemy.exc.SQLAlchemyError, optuna.exceptions.StorageInternalError, RuntimeError, OSError) as error:
        reason = getattr(error, "orig", None) or error.__cause__ or error
        origin = STORAGE_VARIABLE if given else f"the default without {STORAGE_VARIABLE}"
        raise CmranError(f"cannot open the study storage {shown} ({origin}): {_line(reason)}") from None


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
    if sqlite_path(address) is None:
        raise CmranError(f"{STORAGE_VARIABLE}={address}: a study in memory cannot be resumed: name a file")
    # Absolute, because connections are opened again later, when the current folder may be another one.
    address = absolute_sqlite_uri(address)
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


def _line(error: BaseException) -> str:
    return " ".join(redact(str(error)).split())[:300] or type(error).__name__


# --- one study --------------------------------------------------------------------------------------------------------


def open_study(
    name: str, settings: Mapping[str, Any], first: Mapping[str, Any], *, seed: int, epochs: int
) -> optuna.Study:
    """The study `name`, made if it is new, with the trial `first` waiting.

    `settings`: what a study is about (mode, fingerprint, recipe, epochs, ...), kept as user attributes of the study. A
    study that was made with others is not gone on with. `seed` of the sampler, `epochs` of a trial.

    Raises CmranError where the settings differ (the first difference is named) and for a study of another tool.
    """
    optuna.logging.set_verbosity(optuna.logging.ERROR)
    # The worker reports each trial in its own words; Optuna would add a traceback for each failed one.
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
            raise CmranError(f"study {name!r} was not made by this command: name another study")
        # Made just now, or by a process that died before it was done.
        for key, value in {"id": uuid.uuid4().hex, **settings}.items():
            if key not in found:
                study.set_user_attr(key, value)
        study.enqueue_trial(dict(first), skip_if_exists=True)
        study.set_user_attr("ready", True)
    found = study.user_attrs
    if difference := _difference({key: found.get(key) for key in settings}, settings):
        raise CmranError(f"study {name!r} was made with {difference}: name another study, or search as before")
    return study


def known_base(name: str) -> RunConfig | None:
    """The settings that the study `name` searches around; None where there is no such study yet."""
    try:
        found = optuna.load_study(storage=open_storage(), study_name=name).user_attrs.get("base")
    except KeyError:
        return None
    return None if found is None else parse(RunConfig, found, f"study {name!r}")


def make_pruner(epochs: int) -> optuna.pruners.BasePruner:
    """Stops a trial whose best val accuracy so far is below the median of the others at the same epoch.

    Nothing is pruned before 4 trials are complete and before a quarter of the epochs has passed: some settings (small
    learning rates, weak mode) rise late.
    """
    return optuna.pruners.MedianPruner(n_startup_trials=4, n_warmup_steps=max(1, math.ceil(epochs / 4)))


class TrialSlotSampler(optuna.samplers.BaseSampler):
    """TPE whose random numbers depend on the seed and on the trial's place in the study alone.

    So a resumed search does not repeat the trials it began with, two workers never draw the same ones, and a search
    that was killed and resumed draws what the undisturbed one would have drawn.
    """

    def __init__(self, seed: int) -> None:
        self._seed = seed
        self._samplers: dict[int, optuna.samplers.TPESampler] = {}

    def before_trial(self, study: optuna.Study, trial: FrozenTrial) -> None:
        """Make the trial's own sampler."""
        place = sum(other.number < trial.number for other in trial_slots(study.get_trials(deepcopy=False)))
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


def trial_slots(trials: Iterable[FrozenTrial]) -> list[FrozenTrial]:
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
    """The record of a worker of this process, for the user attribute `worker` of its trials, good within the block.

    Host, pid and token are always there. `boot`, `pid_namespace`, `time_namespace` and `start_ticks` (start of the
    process in clock ticks since boot) are there where /proc gives them: with the pid they identify the process exactly.
    """
    token = uuid.uuid4().hex
    _working.add(token)
    machine, process = _machine(), _process(os.getpid())
    exact = machine | {"start_ticks": process[1]} if machine and process else {}
    try:
        yield {"host": socket.gethostname(), "pid": os.getpid(), "token": token, **exact}
    finally:
        _working.discard(token)


def is_dead(name: Mapping[str, Any]) -> bool:
    """Whether the worker with the record `name` is known to be gone; where this is not known its heartbeat decides.

    It is known only of a process of this boot and these namespaces: containers may share a host's name, and a pid says
    nothing in another PID namespace.
    """
    if name.get("token") in _working:
        return False
    machine, pid = _machine(), name.get("pid")
    if not machine or any(name.get(key) != value for key, value in machine.items()):
        return False
    if not isinstance(pid, int) or pid <= 0 or "start_ticks" not in name:
        return False
    process = _process(pid)
    if process is None:
        return _is_gone(pid)
    state, start_ticks = process
    # A process that got the same number later is not the worker. An earlier search of this very process is over.
    return state in "ZX" or start_ticks != name["start_ticks"] or pid == os.getpid()


def _machine() -> dict[str, str]:
    """Boot and namespaces that this process sees processes of; empty where /proc does not give them or is another's."""
    try:
        # Without a /proc of its own, a PID namespace sees the numbers of the one above.
        if os.readlink("/proc/self") != str(os.getpid()):
            return {}
        found = {
            "boot": Path("/proc/sys/kernel/random/boot_id").read_text(encoding="ascii").strip(),
            "pid_namespace": os.readlink("/proc/self/ns/pid"),
        }
        # Each time namespace has its own start of the clock. Kernels before 5.6 have none.
        time_namespace = Path("/proc/self/ns/time")
        found["time_namespace"] = os.readlink(time_namespace) if os.path.lexists(time_namespace) else "none"
    except (OSError, ValueError):
        return {}
    return found if all(found.values()) else {}


def _process(pid: int) -> tuple[str, int] | None:
    """State of a process and its start in clock ticks since boot (fields 3 and 22 of stat, proc(5)), if readable."""
    try:
        # The name, which is the second field, may hold spaces and brackets.
        fields = Path(f"/proc/{pid}/stat").read_text(encoding="utf-8", errors="replace").rpartition(")")[2].split()
        return fields[0], int(fields[19])
    except (OSError, ValueError, IndexError):
        return None


def _is_gone(pid: int) -> bool:
    # /proc may hide the processes of other users (hidepid); a signal finds them.
    try:
        os.kill(pid, 0)
    except ProcessLookupError:
        return True
    except (OSError, OverflowError):
        return False
    return False


class Reaper:
    """Finds the trials that dead workers left running, and puts their retries in the queue."""

    def __init__(self, token: str = "") -> None:
        """`token` of the worker that looks for them: it is not in the middle of asking for a trial itself."""
        self._token = token
        self._unowned: dict[int, float] = {}

    def reap(self, study: optuna.Study) -> list[int]:
        """Numbers of the trials that this call found by their workers' records; the heartbeat finds more."""
        with _as_it_is():
            # Optuna does so only before it begins a trial, and the last trial of a study may be one of these.
            optuna.storages.fail_stale_trials(study)
        reaped = []
        for trial in study.get_trials(deepcopy=False, states=(TrialState.RUNNING,)):
            name = trial.user_attrs.get("worker")
            if name is None:
                since = self._unowned.setdefault(trial.number, time.monotonic())
                dead = time.monotonic() - since > UNOWNED_S or self._alone(study)
                reason = "its worker died before it began"
            else:
                dead, reason = is_dead(name), f"its worker (process {name.get('pid')} on {name.get('host')}) died"
            if dead and requeue(study, trial.number, reason, limit=MAX_RETRIES):
                reaped.append(trial.number)
        return reaped

    def unowned(self, study: optuna.Study) -> bool:
        """Whether a trial is running that has no worker's name (yet)."""
        running = study.get_trials(deepcopy=False, states=(TrialState.RUNNING,))
        return any("worker" not in trial.user_attrs for trial in running)

    def _alone(self, study: optuna.Study) -> bool:
        """Whether every other worker that ever joined the study is known to be dead."""
        joined = [record for key, record in study.user_attrs.items() if key.startswith(JOINED)]
        others = [record for record in joined if record.get("token") != self._token]
        return bool(others) and all(is_dead(record) for record in others)


def requeue(study: optuna.Study, number: int, reason: str, *, limit: int | None = None) -> bool:
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


def lost(study: optuna.Study, number: int, trial_id: int) -> str | None:
    """Why the trial is not its worker's any more: ended by another process, or removed; None while it is running."""
    try:
        trial = study._storage.get_trial(trial_id)
        if trial.state == TrialState.RUNNING:
            return None
        retry = next((other.number for other in study.get_trials(deepcopy=False) if number in _history(other)), None)
    except KeyError:
        return "it is no longer in the study"
    if retry is not None:
        return f"another worker took it for abandoned: trial {retry} takes its place"
    return f"another process ended it as {trial.state.name}"


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
    if not released:
        log.info("trial %d: the heartbeat of its worker has stopped: it goes on as a new trial", trial.number)
    with _as_it_is():
        RetryHeartbeatStaleTrialCallback()(study, trial)


def _history(trial: FrozenTrial) -> list[int]:
    """Numbers of the abandoned trials whose place `trial` took, the latest last."""
    history: list[int] = trial.system_attrs.get("retry_history", [])
    return history
