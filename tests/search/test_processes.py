"""Real processes: killed, terminated, and two at the same time on one study."""

import contextlib
import fcntl
import json
import os
import signal
import sqlite3
import subprocess
import sys
import time
from collections import Counter
from collections.abc import Callable
from pathlib import Path

import pytest
from optuna.trial import TrialState

from cmran.training.run_dir import read_result
from search import space
from search.study import trial_slots
from tests.cmran.tiny import tiny_config
from tests.conftest import ROOT
from tests.search.conftest import client, run_of, study

pytestmark = pytest.mark.slow

Start = Callable[..., "subprocess.Popen[str]"]


@pytest.fixture
def start(data, storage, tracking_db, tmp_path, monkeypatch) -> Start:
    """Start a search in a separate process with the databases of this test."""
    monkeypatch.setenv("MLFLOW_ENABLE_SYSTEM_METRICS_LOGGING", "false")
    monkeypatch.setenv("OMP_NUM_THREADS", "1")
    running = []

    def call(trials, *, epochs=4, epoch_s=0.0, kind="fake", name="s", out="out", before=()):
        command = [*before, sys.executable, "-m", "tests.search.driver"]
        command += [str(data), str(tmp_path / out), str(trials), str(epochs), str(epoch_s), kind, name]
        process = subprocess.Popen(command, cwd=ROOT, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
        running.append(process)
        return process

    yield call
    for process in running:
        if process.poll() is None:
            process.kill()
        process.communicate()


def stop_between_transactions(process: "subprocess.Popen[str]", folder: Path) -> None:
    """Send SIGSTOP at a moment when the process holds no lock of the databases in `folder`: others must get on."""
    deadline = time.monotonic() + 60
    while time.monotonic() < deadline:
        os.kill(process.pid, signal.SIGSTOP)
        try:
            for path in (folder / "studies.db", folder / "mlflow.db"):
                with contextlib.closing(sqlite3.connect(path, timeout=0.1)) as connection:
                    connection.execute("BEGIN IMMEDIATE")
                    connection.rollback()
            with (folder / "studies.db.lock").open("a") as lock:
                fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
            return
        except (sqlite3.OperationalError, BlockingIOError):
            os.kill(process.pid, signal.SIGCONT)
            time.sleep(0.05)
    raise AssertionError("the process always held a lock")


def wait_for(path: Path, process: "subprocess.Popen[str]") -> None:
    deadline = time.monotonic() + 120
    while not path.exists():
        assert process.poll() is None, process.communicate()[1]
        assert time.monotonic() < deadline, f"{path} was not created"
        time.sleep(0.02)


def result_of(process: "subprocess.Popen[str]") -> dict:
    out, err = process.communicate(timeout=240)
    assert process.returncode == 0, err
    return json.loads(out)


def test_killed_and_resumed_search_equals_uninterrupted_search(start, search, tmp_path):
    trials = 4
    process = start(trials, kind="real", epoch_s=0.4)
    wait_for(tmp_path / "out" / "trial-0002" / "last.pt", process)
    os.kill(process.pid, signal.SIGKILL)
    process.communicate()
    left = study().trials
    assert [trial.state for trial in left] == [TrialState.COMPLETE, TrialState.COMPLETE, TrialState.RUNNING]
    assert run_of(left[2]).info.status == "RUNNING"

    result = search(trials)
    found = study().trials
    assert [trial.number for trial in found] == [0, 1, 2, 3, 4]
    assert [trial.state.name for trial in found] == ["COMPLETE", "COMPLETE", "FAIL", "COMPLETE", "COMPLETE"]
    assert f"process {process.pid} on" in found[2].user_attrs["interrupted"]
    assert result.counts == {"complete": trials}
    # The retry continued in the directory and run of the killed trial, and no epoch is missing or duplicated.
    assert found[3].user_attrs["folder"] == "trial-0002"
    assert found[3].user_attrs["run_id"] == left[2].user_attrs["run_id"]
    for trial in trial_slots(found):
        run = run_of(trial)
        assert run.info.status == "FINISHED"
        assert run.data.tags["mlflow.parentRunId"] == result.run_id
        history = client().get_metric_history(run.info.run_id, "val.accuracy")
        assert [metric.step for metric in history] == [1, 2, 3, 4]

    # The same parameters in the same order, and the same accuracies as without the kill.
    search(trials, study="uninterrupted", out=tmp_path / "uninterrupted")
    uninterrupted = study("uninterrupted").trials
    assert [trial.params for trial in trial_slots(found)] == [trial.params for trial in uninterrupted]
    assert [trial.value for trial in trial_slots(found)] == [trial.value for trial in uninterrupted]
    for killed, whole in (("trial-0002", "trial-0002"), ("trial-0004", "trial-0003")):
        first, second = (read_result(tmp_path / folder) for folder in (f"out/{killed}", f"uninterrupted/{whole}"))
        assert first.val == second.val


def test_killed_before_first_epoch_ends(start, search, fake, tmp_path):
    process = start(2, epoch_s=60)
    wait_for(tmp_path / "out" / "trial-0000" / "epochs.log", process)
    os.kill(process.pid, signal.SIGKILL)
    process.communicate()
    result = search(2)
    assert result.counts == {"complete": 2}
    assert [trial.state for trial in study().trials] == [TrialState.FAIL, TrialState.COMPLETE, TrialState.COMPLETE]
    # The retry is still the recipe.
    assert study().trials[1].params == space.recipe_params(tiny_config(epochs=4))


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_terminated_search_closes_trial_and_runs(start, search, fake, tmp_path, number):
    process = start(2, epoch_s=0.3, epochs=4)
    wait_for(tmp_path / "out" / "trial-0001" / "last.pt", process)
    os.kill(process.pid, number)
    errors = process.communicate(timeout=120)[1]
    assert process.returncode == (143 if number == signal.SIGTERM else -signal.SIGINT), errors
    left = study().trials
    assert [trial.state for trial in left] == [TrialState.COMPLETE, TrialState.FAIL, TrialState.WAITING]
    assert left[1].user_attrs["interrupted"].startswith("the search was stopped")
    assert run_of(left[1]).info.status == "KILLED", errors
    assert client().get_run(study().user_attrs["run"]).info.status == "KILLED"
    result = search(2)
    assert result.counts == {"complete": 2}
    assert fake.calls[0][0] == "trial-0001"
    assert fake.calls[0][1] >= 1
    assert client().get_run(result.run_id).info.status == "FINISHED"


def test_two_processes_share_one_study(start, tmp_path):
    trials = 12
    # Slow enough for the second process to start before the first has finished all trials.
    first, second = start(trials, epoch_s=0.2), start(trials, epoch_s=0.2)
    results = [result_of(process) for process in (first, second)]
    found = study().trials
    counted = trial_slots(found)
    assert len(counted) == trials
    assert all(trial.state in (TrialState.COMPLETE, TrialState.PRUNED) for trial in counted)
    # A trial that does not count is one whose slot the other process took at the same moment.
    extra = [trial.user_attrs["interrupted"] for trial in found if trial not in counted]
    assert set(extra) <= {"another worker took the last trial slot"}
    workers = Counter(trial.user_attrs["worker"]["pid"] for trial in counted)
    assert workers.keys() == {first.pid, second.pid}
    # The recipe once, no point twice, and no trial trained by two processes.
    assert sum(trial.params == space.recipe_params(tiny_config(epochs=4)) for trial in counted) == 1
    assert len({str(trial.params) for trial in counted}) == trials
    for trial in counted:
        epochs = (tmp_path / "out" / trial.user_attrs["folder"] / "epochs.log").read_text().split()
        assert epochs == [str(epoch) for epoch in range(1, len(epochs) + 1)]
        assert run_of(trial).data.tags["mlflow.parentRunId"] == results[0]["run_id"]
    # One parent run, and the best weights exist.
    assert results[0]["run_id"] == results[1]["run_id"]
    assert client().get_run(results[0]["run_id"]).data.metrics["trials.complete"] == sum(
        trial.state == TrialState.COMPLETE for trial in counted
    )
    best = max(counted, key=lambda trial: (trial.state == TrialState.COMPLETE, trial.value))
    assert (tmp_path / "out" / best.user_attrs["folder"] / "best.pt").exists()


def test_surviving_process_retries_trial_of_killed_process(start, tmp_path):
    trials = 6
    dying = start(trials, epoch_s=60, out="a")
    wait_for(tmp_path / "a" / "trial-0000" / "epochs.log", dying)
    living = start(trials, epoch_s=0.3, out="b")
    wait_for(tmp_path / "b" / "trial-0001" / "epochs.log", living)
    os.kill(dying.pid, signal.SIGKILL)
    dying.communicate()
    assert sum(result_of(living)["counts"].values()) == trials
    counted = trial_slots(study().trials)
    assert len(counted) == trials
    assert all(trial.state.is_finished() for trial in counted)
    # The killed trial's directory is not in this search's `out`, so the recipe restarted in a new one.
    retry = next(trial for trial in counted if trial.params == space.recipe_params(tiny_config(epochs=4)))
    assert retry.number > 0
    assert retry.user_attrs["folder"] == f"trial-{retry.number:04d}"


def test_stopped_worker_loses_its_trial_and_continues_with_the_next(start, tmp_path, monkeypatch):
    monkeypatch.setenv("TEST_HEARTBEAT_S", "1")
    monkeypatch.setenv("TEST_GRACE_S", "4")
    trials = 4
    first = start(trials, kind="real", epoch_s=1.0)
    wait_for(tmp_path / "out" / "trial-0000" / "last.pt", first)
    stop_between_transactions(first, tmp_path)
    second = start(trials, kind="real", epoch_s=1.0)
    # The retry of trial 0 is the one that has a predecessor.
    deadline = time.monotonic() + 200
    while not any("previous" in trial.user_attrs and "run_id" in trial.user_attrs for trial in study().trials):
        assert time.monotonic() < deadline
        assert second.poll() is None, second.communicate()[1]
        time.sleep(0.2)
    os.kill(first.pid, signal.SIGCONT)
    (_, errors), counts = first.communicate(timeout=240), result_of(second)["counts"]
    assert first.returncode == 0, errors
    lines = [line for line in errors.splitlines() if line.startswith("trial 0: lost (another worker requeued it")]
    assert len(lines) == 1, errors
    assert "Traceback" not in errors
    assert sum(counts.values()) == trials
    found = study().trials
    assert len(trial_slots(found)) == trials
    run = run_of(found[0])
    assert run.info.status == "KILLED"
    assert run.data.tags["cmran.interrupted"].startswith("another worker requeued it as trial ")
    retry = next(trial for trial in found if "previous" in trial.user_attrs)
    assert retry.state.is_finished()
    assert retry.user_attrs["folder"] != "trial-0000"


def test_live_trial_in_another_pid_namespace_is_not_requeued(start, tmp_path):
    unshare = ("unshare", "--pid", "--fork", "--mount-proc", "--kill-child")
    try:
        subprocess.run([*unshare, "true"], check=True, capture_output=True)
    except (OSError, subprocess.CalledProcessError):
        pytest.skip("this machine does not permit a new PID namespace (unshare)")
    first = start(2, epoch_s=4.0, before=unshare)
    wait_for(tmp_path / "out" / "trial-0000" / "epochs.log", first)
    second = start(2, epoch_s=0.1, before=unshare)
    for process in (first, second):
        errors = process.communicate(timeout=240)[1]
        assert process.returncode == 0, errors
        assert "Traceback" not in errors
    assert [trial.state for trial in study().trials] == [TrialState.COMPLETE, TrialState.COMPLETE]
