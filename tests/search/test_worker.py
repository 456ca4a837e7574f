"""A search in one process: each outcome of a trial in study, tracking database and run directory; the report."""

import csv
import json
import os
import sqlite3
import threading
import time
from types import SimpleNamespace

import matplotlib.pyplot as plt
import pytest
import sqlalchemy.exc
import torch
import yaml
from optuna.trial import TrialState

from cmran import tracking
from cmran.config import load_config
from cmran.errors import BusyError, CmranError, ConfigError, StorageError, TrackingError
from cmran.training.run_dir import read_result
from cmran.training.step import compute_outputs
from search import objective as objectives
from search import space
from search import study as studies
from search.study import open_study
from search.worker import default_study
from tests.cmran.tiny import tiny_config
from tests.search.conftest import client, run_of, study
from tests.search.fake import accuracy, quality

# The heartbeat needs study.optimize, but some tests use ask and tell.
pytestmark = pytest.mark.filterwarnings("ignore:Heartbeat of storage")


SETTINGS = ("mode", "fingerprint", "recipe", "epochs", "base", "space")


def tags(trial):
    return {key: value for key, value in run_of(trial).data.tags.items() if key.startswith("cmran.")}


def checkpoints(out):
    return sorted(f"{path.parent.name}/{path.name}" for path in out.glob("*/*.pt*"))


# ------------------------------------------------------------------------------------------------ complete searches


def test_three_real_trials(search, tmp_path, data):
    result = search(3, base=tiny_config(epochs=2), mode="full")
    trials = study().trials
    assert [trial.state for trial in trials] == [TrialState.COMPLETE] * 3
    assert result.counts == {"complete": 3}
    assert result.n_trials == 3
    assert result.best_value == max(trial.value for trial in trials)
    # Trial 0 is the recipe, trained as by `train`.
    assert trials[0].params == space.recipe_params(tiny_config(epochs=2))
    assert read_result(tmp_path / "out" / "trial-0000").config == tiny_config(epochs=2)
    for trial in trials:
        fit = read_result(tmp_path / "out" / f"trial-{trial.number:04d}")
        assert fit.test is None
        assert trial.value == fit.val["accuracy"]
        assert trial.intermediate_values == {record.epoch: record.val["accuracy"] for record in fit.epochs}
        run = run_of(trial)
        assert run.info.status == "FINISHED"
        assert run.data.tags["mlflow.parentRunId"] == result.run_id
        assert run.data.tags["cmran.trial"] == str(trial.number)
        assert run.data.params["cfg.train.lr"] == str(fit.config.train.lr)
        assert run.data.metrics["best.val.accuracy"] == trial.value
        assert not [key for key in run.data.metrics if "test" in key]
        history = client().get_metric_history(run.info.run_id, "val.accuracy")
        assert [(metric.step, metric.value) for metric in history] == list(trial.intermediate_values.items())
    best = f"trial-{result.best_trial:04d}"
    assert [name for name in checkpoints(tmp_path / "out") if "model_epoch" not in name] == [f"{best}/best.pt"]


def test_trial_reports_only_evaluated_epochs_and_may_stop_early(search, tmp_path):
    search(2, base=tiny_config(epochs=30, eval_every=2, patience=1, lr=5e-5), mode="full")
    for trial in study().trials:
        assert trial.state == TrialState.COMPLETE
        fit = read_result(tmp_path / "out" / f"trial-{trial.number:04d}")
        assert trial.value == fit.val["accuracy"]
        assert trial.intermediate_values == {
            record.epoch: record.val["accuracy"] for record in fit.epochs if record.val
        }
        assert all(epoch % 2 == 0 for epoch in trial.intermediate_values)
        # Every epoch is logged.
        history = client().get_metric_history(run_of(trial).info.run_id, "train.loss")
        assert [metric.step for metric in history] == [record.epoch for record in fit.epochs]
    # The recipe's trial improves too slowly.
    assert read_result(tmp_path / "out" / "trial-0000").stopped_early


def test_content_of_the_parent_run(search, fake, figures, tmp_path):
    result = search(4)
    parent = client().get_run(result.run_id)
    assert parent.info.status == "FINISHED"
    assert client().get_experiment(parent.info.experiment_id).name == "cmran-full"
    assert {key: value for key, value in parent.data.tags.items() if key.startswith("cmran.")}.items() >= {
        "cmran.mode": "full",
        "cmran.job": "search",
        "cmran.study": "s",
        "cmran.fingerprint": result.fingerprint,
        "cmran.best_trial": str(result.best_trial),
        "cmran.best_run": study().trials[result.best_trial].user_attrs["run_id"],
    }.items()
    assert parent.data.params["search.trials"] == "4"
    assert parent.data.params["space.lr"] == "5e-05 to 0.01, logarithmic"
    for name, value in result.best_params.items():
        assert parent.data.params[f"best.{name}"] == str(value)
    assert parent.data.metrics["best.val.accuracy"] == pytest.approx(result.best_value)
    assert parent.data.metrics["trials.complete"] == result.counts["complete"]
    assert parent.inputs.dataset_inputs[0].dataset.digest == result.fingerprint
    expected = {"best.yaml", "history.png", "importances.png", "slices.png", "study.json", "trials.csv", "trials.md"}
    assert {entry.path for entry in client().list_artifacts(result.run_id, "study")} == {
        f"study/{name}" for name in expected
    }
    assert plt.get_fignums() == []
    for name in ("history.png", "importances.png", "slices.png"):
        assert (tmp_path / "out" / name).read_bytes().startswith(b"\x89PNG")
    children = client().search_runs(
        [parent.info.experiment_id], f"tags.`mlflow.parentRunId` = '{result.run_id}'", max_results=100
    )
    assert len(children) == 4


def test_best_settings_are_a_config_file_for_training(search, fake, tmp_path):
    result = search(2)
    assert result.best_file == tmp_path / "out" / "best.yaml"
    config = load_config("full", "debug", result.best_file)
    assert config == result.best_config
    assert accuracy(config, 4) == pytest.approx(result.best_value)
    assert space.apply_params(result.best_params, tiny_config(epochs=4)) == config
    found = yaml.safe_load(result.best_file.read_text())
    assert found.keys() == {"mode", "recipe", "model", "train"}
    # The recipe may be omitted or replaced.
    assert load_config("full", None, result.best_file) == config
    assert load_config("full", "demo", result.best_file).recipe == "demo"
    with pytest.raises(CmranError, match=r"mode 'full'.*mode 'weak'"):
        load_config("weak", None, result.best_file)


@pytest.mark.parametrize("schedule", ["recipe", "early", "late", "none"])
def test_best_settings_of_short_trials_keep_the_epochs_of_the_recipe(search, fake, tmp_path, schedule, data):
    base = load_config("full", "demo", overrides={"model": {"visual_features": 6, "audio_features": 5}})
    params = space.recipe_params(base) | {"schedule": schedule, "lr": 2e-3}
    fake.before = lambda out, config, epoch: None
    search(1, base=base, epochs=2)
    study().enqueue_trial(params)
    result = search(2, base=base, epochs=2)
    assert result.best_params["schedule"] == schedule
    assert result.best_config.train.epochs == 2
    text = result.best_file.read_text()
    assert "--recipe demo --config THIS_FILE" in text
    # The searched settings and the differences between base and recipe, but nothing that concerns only the trials.
    found = yaml.safe_load(text)
    searched = {item.name for item in space.PARAMETERS}
    milestones = {"lr_milestones"} if schedule != "recipe" else set()
    assert found["model"].keys() | found["train"].keys() == searched | milestones | {
        "visual_features",
        "audio_features",
    }
    for epochs in (None, 4, 200):
        overrides = {} if epochs is None else {"train": {"epochs": epochs}}
        config = load_config("full", None, result.best_file, overrides)
        assert config.train.epochs == (epochs or 8)
        expected = base.model_copy(update={"train": base.train.model_copy(update={"epochs": epochs or 8})})
        assert config == space.apply_params(params, expected)


@pytest.mark.parametrize(
    "name",
    [
        *("../../up", "/tmp/x", "..", ".", "a/b", "a\\b", "a\0b", "a\nb", "a\n", "\x1b[31m", "-a", ".a", "a ", " a"),
        *("a" * 201, "ü" * 200, "%", "a;b", "", "'"),
    ],
)
def test_invalid_study_name_is_rejected_before_anything_is_written(search, fake, tmp_path, name):
    with pytest.raises(CmranError, match=r"^study name .*: expected at most 200 letters") as found:
        search(1, study=name)
    assert "\n" not in str(found.value)
    assert sorted(path.name for path in tmp_path.iterdir() if path.name in ("out", "studies.db")) == []


@pytest.mark.parametrize("name", ["a", "weak-1", "my study", "a_b.c", "CON", "x" * 200, "cmran-full-ab12cd34", "_a_"])
def test_valid_study_names_are_accepted(search, fake, name):
    assert search(1, study=name).study == name


def test_tables_list_every_trial(search, fake, tmp_path):
    def fail(out, config, epoch):
        if out.name == "trial-0002":
            raise CmranError("loss is nan | at epoch 1")

    fake.before = fail
    search(4)
    with (tmp_path / "out" / "trials.csv").open() as file:
        rows = list(csv.DictReader(file))
    assert [row["trial"] for row in rows] == ["0", "1", "2", "3"]
    assert [row["state"] for row in rows] == ["complete", "complete", "failed", "complete"]
    assert rows[2]["outcome"] == "failed: loss is nan | at epoch 1"
    assert float(rows[0]["lr"]) == 0.01
    text = (tmp_path / "out" / "trials.md").read_text()
    assert "failed: loss is nan \\| at epoch 1" in text
    assert "Not available: 3 complete trials, 4 are needed." in text
    assert not (tmp_path / "out" / "importances.png").exists()
    assert json.loads((tmp_path / "out" / "study.json").read_text())["importances"] is None


def test_weak_mode_and_default_names(search, fake, data):
    result = search(1, mode="weak", base=tiny_config("weak", epochs=2), study=None)
    assert result.study == default_study("weak", result.fingerprint) == f"cmran-weak-{result.fingerprint[:8]}"
    assert study(result.study).user_attrs["mode"] == "weak"
    assert client().get_experiment(client().get_run(result.run_id).info.experiment_id).name == "cmran-weak"


def test_search_run_has_the_given_parent(search, fake):
    with tracking.start_run(experiment="cmran-pipeline", name="pipeline", system_metrics=False) as pipeline:
        result = search(1, parent_run_id=pipeline.run_id)
    assert client().get_run(result.run_id).data.tags["mlflow.parentRunId"] == pipeline.run_id
    # Resumed under another parent, the study gets a new search run, and the existing trials keep their parent.
    with tracking.start_run(experiment="cmran-pipeline", name="pipeline", system_metrics=False) as second:
        again = search(2, parent_run_id=second.run_id)
    assert client().get_run(again.run_id).data.tags["mlflow.parentRunId"] == second.run_id
    parents = [run_of(trial).data.tags["mlflow.parentRunId"] for trial in study().trials]
    assert parents == [result.run_id, again.run_id]


# ------------------------------------------------------------------------------------------- how a trial can end


def test_bad_trial_is_pruned(search, fake, tmp_path):
    search(1)
    for params in [{"lr": 2e-3}] * 4 + [{"lr": 5e-5, "dropout": 0.5}]:
        study().enqueue_trial(space.recipe_params(tiny_config(epochs=4)) | params)
    result = search(6)
    trial = study().trials[5]
    assert trial.state == TrialState.PRUNED
    assert trial.user_attrs["pruned_at_epoch"] == 1
    assert result.counts == {"complete": 5, "pruned": 1}
    run = run_of(trial)
    assert run.info.status == "KILLED"
    assert tags(trial)["cmran.pruned_at_epoch"] == "1"
    assert [metric.step for metric in client().get_metric_history(run.info.run_id, "val.accuracy")] == [1]
    assert not list((tmp_path / "out" / "trial-0005").glob("*.pt*"))
    assert fake.calls[-1] == ("trial-0005", 0)


def test_trial_is_not_pruned_at_its_last_epoch(search, fake, monkeypatch):
    class Always:
        def prune(self, study, trial):
            return True

    monkeypatch.setattr(studies, "make_pruner", lambda epochs: Always())
    result = search(2, base=tiny_config(epochs=1))
    assert result.counts == {"complete": 2}


@pytest.mark.parametrize(
    ("error", "reason"),
    [
        (CmranError("loss is nan at epoch 2, step 1, rows 3, 4"), "loss is nan at epoch 2, step 1, rows 3, 4"),
        (torch.OutOfMemoryError("CUDA out of memory."), "OutOfMemoryError: CUDA out of memory."),
        (MemoryError(), "MemoryError"),
        (RuntimeError("can't allocate\n  memory"), "RuntimeError: can't allocate memory"),
        (ZeroDivisionError("a bug"), "ZeroDivisionError: a bug"),
    ],
)
def test_failed_trial_is_recorded_and_the_search_continues(search, fake, tmp_path, error, reason):
    def fail(out, config, epoch):
        if out.name == "trial-0001" and epoch == 2:
            raise error

    fake.before = fail
    result = search(3)
    assert result.counts == {"complete": 2, "failed": 1}
    trial = study().trials[1]
    assert trial.state == TrialState.FAIL
    assert trial.user_attrs["failure"] == reason
    run = run_of(trial)
    assert run.info.status == "FAILED"
    assert tags(trial)["cmran.failure"] == reason
    logged = [entry.path for entry in client().list_artifacts(run.info.run_id)]
    assert logged == ([] if isinstance(error, CmranError) else ["traceback.txt"])
    assert not list((tmp_path / "out" / "trial-0001").glob("*.pt*"))


def test_out_of_memory_in_the_real_training_is_a_failed_trial(search, monkeypatch):
    forward, calls = compute_outputs, []

    def run_out(*arguments):
        calls.append(1)
        if len(calls) > 4:
            raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB")
        return forward(*arguments)

    monkeypatch.setattr("cmran.training.inference.compute_outputs", run_out)
    monkeypatch.setattr("cmran.training.step.compute_outputs", run_out)
    result = search(2, base=tiny_config(epochs=1))
    assert result.counts == {"complete": 1, "failed": 1}
    assert study().trials[1].user_attrs["failure"].startswith("out of memory on cpu: lower train.batch_size")


def test_search_fails_if_every_trial_fails(search, fake):
    def fail(out, config, epoch):
        raise CmranError(f"loss is nan in {out.name}")

    fake.before = fail
    with pytest.raises(CmranError, match=r"^all 3 trials failed; trial 2: loss is nan in trial-0002$"):
        search(3)
    assert [trial.state for trial in study().trials] == [TrialState.FAIL] * 3
    parent = client().get_run(study().user_attrs["run"])
    assert parent.info.status == "FAILED"
    assert "study/trials.md" in {entry.path for entry in client().list_artifacts(parent.info.run_id, "study")}


@pytest.mark.parametrize("kind", ["interrupt", "exit", "tracking", "disk", "database"])
def test_external_failure_stops_the_search_and_can_be_resumed(search, fake, kind):
    try:
        raise OSError(28, "No space left on device")
    except OSError as full:
        cause = full
    disk = CmranError("cannot write best.pt: No space left on device")
    disk.__cause__ = cause
    error, raised, text = {
        "interrupt": (KeyboardInterrupt(), KeyboardInterrupt, None),
        "exit": (SystemExit(143), SystemExit, "143"),
        "tracking": (TrackingError("MLflow is gone"), CmranError, "^MLflow is gone$"),
        "disk": (disk, CmranError, "^cannot write best.pt"),
        "database": (
            sqlalchemy.exc.OperationalError("x", {}, sqlite3.OperationalError("disk I/O error")),
            CmranError,
            r"^the storage of study 's' failed \(disk I/O error\): run the same search again to continue$",
        ),
    }[kind]

    def stop(out, config, epoch):
        if out.name == "trial-0001" and epoch == 3:
            raise error

    fake.before = stop
    with pytest.raises(raised, match=text):
        search(3)
    left = study().trials
    assert [trial.state for trial in left] == [TrialState.COMPLETE, TrialState.FAIL, TrialState.WAITING]
    assert left[1].user_attrs["interrupted"]
    assert "failure" not in left[1].user_attrs
    run = run_of(left[1])
    assert run.info.status == ("KILLED" if kind in ("interrupt", "exit") else "FAILED")

    fake.before = None
    result = search(3)
    assert result.counts == {"complete": 3}
    retry = study().trials[2]
    assert retry.params == left[1].params
    # In the same directory and run, from the epoch where it stopped.
    assert fake.calls[-2:] == [("trial-0001", 2), ("trial-0003", 0)]
    assert retry.user_attrs["run_id"] == run.info.run_id
    assert run_of(retry).info.status == "FINISHED"
    assert list(retry.intermediate_values) == [1, 2, 3, 4]
    history = client().get_metric_history(run.info.run_id, "val.accuracy")
    assert [metric.step for metric in history] == [1, 2, 3, 4]


# --------------------------------------------------------------------------------------------------- lost trials


def interfere(monkeypatch, fake, moment, act):
    """Call `act` once, when trial 1 reaches `moment`."""
    done = []

    def once(number):
        if number == 1 and not done:
            done.append(number)
            act()

    def fit(data, config, out, **options):
        number = int(out.name.removeprefix("trial-"))
        if moment == "start":
            once(number)
        result = fake(data, config, out, **options)
        if moment == "end":
            once(number)
        return result

    before, call, original_suggest = (
        studies.TrialSlotSampler.before_trial,
        objectives.Objective.__call__,
        objectives.suggest,
    )

    def before_trial(self, study, trial):
        before(self, study, trial)
        if moment == "asked":
            once(trial.number)

    def called(self, trial):
        try:
            return call(self, trial)
        finally:
            if moment == "returned":
                once(trial.number)

    def suggest(trial, base):
        if moment == "settings":
            once(trial.number)
        return original_suggest(trial, base)

    if moment == "epoch":
        fake.before = lambda out, config, epoch: once(int(out.name.removeprefix("trial-"))) if epoch == 3 else None
    monkeypatch.setattr("search.objective.fit", fit)
    monkeypatch.setattr(studies.TrialSlotSampler, "before_trial", before_trial)
    monkeypatch.setattr(objectives.Objective, "__call__", called)
    monkeypatch.setattr(objectives, "suggest", suggest)


ENDINGS = {
    "requeued": (
        lambda: studies.requeue(study(), 1, "power failure"),
        "another worker requeued it as trial 2",
    ),
    "failed": (lambda: study().tell(1, state=TrialState.FAIL), "another process ended it as FAIL"),
    "completed": (lambda: study().tell(1, 1.0), "another process ended it as COMPLETE"),
}


@pytest.mark.parametrize("moment", ["asked", "settings", "start", "epoch", "end", "returned"])
@pytest.mark.parametrize("ending", list(ENDINGS))
def test_worker_logs_a_lost_trial_once_and_continues_with_the_next(search, fake, monkeypatch, caplog, moment, ending):
    act, why = ENDINGS[ending]
    interfere(monkeypatch, fake, moment, act)
    with caplog.at_level("INFO"):
        result = search(3)
    lines = [line for line in caplog.messages if line.startswith("trial 1:")]
    assert len(lines) == 1
    assert lines[0].startswith(f"trial 1: lost ({why}")
    assert not [record for record in caplog.records if record.exc_info]
    trials = study().trials
    # The result of the other process is kept, and no slot is counted twice.
    expected = {"requeued": "FAIL", "failed": "FAIL", "completed": "COMPLETE"}
    assert trials[1].state.name == expected[ending]
    assert len(trials) == (4 if ending == "requeued" else 3)
    assert sum(result.counts.values()) == 3
    assert result.counts == ({"complete": 2, "failed": 1} if ending == "failed" else {"complete": 3})
    if moment != "asked":
        run = run_of(trials[1])
        # The trial's own retry may have resumed the run and ended it.
        adopted = any(trial.user_attrs.get("run_id") == run.info.run_id for trial in trials[2:])
        assert run.info.status == ("FINISHED" if adopted else "KILLED")
        assert run.data.tags["cmran.interrupted"].startswith(why)


def test_deletion_of_the_study_is_reported_in_one_line(search, fake, monkeypatch, tmp_path):
    for number, moment in enumerate(("asked", "epoch", "returned")):
        name = f"s{number}"

        def delete(name=name):
            study(name)._storage.delete_study(study(name)._study_id)

        with monkeypatch.context() as patch:
            interfere(patch, fake, moment, delete)
            with pytest.raises(StorageError, match=rf"^study '{name}' was deleted during the search[^\n]*$"):
                search(3, study=name, out=tmp_path / name)
        fake.before = None


def test_retry_does_not_use_a_busy_run_directory(search, fake, tmp_path):
    """As if the worker that counts as dead were still training."""
    from cmran.utils.files import file_lock

    def stop(out, config, epoch):
        if epoch == 3:
            raise KeyboardInterrupt

    fake.before = stop
    with pytest.raises(KeyboardInterrupt):
        search(1)
    fake.before = None
    with file_lock(tmp_path / "out" / "trial-0000" / ".lock"):
        assert search(1).counts == {"complete": 1}
    assert fake.calls == [("trial-0000", 0), ("trial-0001", 0)]
    assert study().trials[1].user_attrs["run_id"] != study().trials[0].user_attrs["run_id"]


def test_run_directory_that_another_process_locks_at_the_same_moment_is_no_failure_of_the_settings(
    search, fake, tmp_path, monkeypatch
):
    calls = []

    def fit(data, config, out, **options):
        calls.append(out.name)
        if len(calls) == 1:
            raise BusyError(f"{out}: another process trains in this folder")
        return fake(data, config, out, **options)

    monkeypatch.setattr("search.objective.fit", fit)
    assert search(2).counts == {"complete": 2}
    trials = study().trials
    assert [trial.state.name for trial in trials] == ["FAIL", "COMPLETE", "COMPLETE"]
    assert "failure" not in trials[0].user_attrs
    assert run_of(trials[0]).info.status in ("KILLED", "FINISHED")


@pytest.mark.parametrize(
    "folder", ["../victim", "/victim", "..", ".", "", "victim", None, 7, "trial-0000/../../victim"]
)
def test_manipulated_study_changes_no_directory_but_those_of_trials(search, fake, tmp_path, folder):
    search(1)
    victims = [tmp_path / "victim", tmp_path / "out" / "victim"]
    for victim in victims:
        victim.mkdir()
        (victim / "last.pt").write_text("[]")
    if folder == "/victim":
        folder = str(victims[0])
    found = study()
    found.ask().set_user_attr("folder", folder)
    found.tell(1, state=TrialState.FAIL)
    trial = found.ask()
    trial.set_user_attr("worker", {})
    studies.requeue(found, 2, "power failure")
    studies.set_trial_attr(found, found.trials[3], "previous", {"folder": folder, "worker_stopped": True, "worker": {}})
    assert search(4).counts == {"complete": 3, "failed": 1}
    for victim in victims:
        assert [path.name for path in victim.iterdir()] == ["last.pt"]
        assert (victim / "last.pt").read_text() == "[]"
    assert {name for name, _ in fake.calls} == {"trial-0000", "trial-0003", "trial-0004"}


# ------------------------------------------------------------------------------------------------ time and number


def test_resume_runs_only_the_missing_trials(search, fake, caplog):
    first = search(2)
    assert search(2).counts == {"complete": 2}
    second = search(4)
    assert second.n_trials == 4
    assert search(1).n_trials == 4
    assert len(study().trials) == 4
    assert len(fake.calls) == 4
    assert second.run_id == first.run_id
    assert [run_of(trial).data.tags["mlflow.parentRunId"] for trial in study().trials] == [first.run_id] * 4


def test_seed_determines_the_whole_search(search, fake, tmp_path):
    results = [search(3, study=name, out=tmp_path / name, seed=seed) for name, seed in (("a", 5), ("b", 5), ("c", 6))]
    params = [[trial.params for trial in study(name).trials] for name in "abc"]
    assert params[0] == params[1]
    assert params[0][0] == params[2][0]
    assert params[0][1:] != params[2][1:]
    assert results[0].best_params == results[1].best_params


@pytest.fixture
def clock(monkeypatch):
    """The clock of the search. It advances only when a test increases `clock.now`."""
    clock = SimpleNamespace(now=100.0, sleep=time.sleep)
    clock.monotonic = lambda: clock.now
    monkeypatch.setattr("search.worker.time", clock)
    monkeypatch.setattr("search.objective.time", clock)
    return clock


def test_time_limit_before_the_first_trial_ends(search, fake, clock):
    def late(out, config, epoch):
        clock.now += 1.0

    fake.before = late
    with pytest.raises(CmranError, match=r"out: no trial was completed in time: run the same search [^\n]*`timeout_s`"):
        search(3, timeout_s=1.5)
    # The running trial stopped after its epoch.
    trials = study().trials
    assert [trial.state for trial in trials] == [TrialState.FAIL, TrialState.WAITING]
    assert trials[0].user_attrs["interrupted"] == "the time limit of the search was reached after epoch 2"
    assert run_of(trials[0]).info.status == "KILLED"
    assert search(1, timeout_s=1000).counts == {"complete": 1}
    assert fake.calls == [("trial-0000", 0), ("trial-0000", 2)]


def test_time_limit_after_some_trials_ends_the_search_normally(search, fake, clock):
    def late(out, config, epoch):
        clock.now += 1.0

    fake.before = late
    # Four epochs per trial: the last one of the second trial exceeds the limit, but its result is kept.
    result = search(4, timeout_s=7.5)
    assert result.counts == {"complete": 2}
    assert result.n_trials == 2
    result = search(4, timeout_s=5.5)
    assert result.counts == {"complete": 3, "waiting": 1}
    assert result.n_trials == 3
    assert client().get_run(result.run_id).info.status == "FINISHED"


# ---------------------------------------------------------------------------------------------------- checkpoints


def test_best_weights_are_kept_and_other_checkpoints_removed(search, fake, tmp_path):
    best = None
    for number in (1, 3, 4):
        result = search(number)
        assert best is None or result.best_value >= best
        best = result.best_value
        name = f"trial-{result.best_trial:04d}"
        assert {path.split("/")[0] for path in checkpoints(tmp_path / "out")} == {name}
        assert (tmp_path / "out" / name / "best.pt").exists()
        assert not (tmp_path / "out" / name / "last.pt").exists()


def test_tidy_keeps_checkpoints_of_running_and_waiting_trials(search, fake, tmp_path):
    search(1)
    found = study()
    out = tmp_path / "out"
    with studies.worker_record() as own:
        for folder in ("trial-0001", "trial-0002"):
            trial = found.ask()
            trial.set_user_attr("worker", own)
            trial.set_user_attr("folder", folder)
            (out / folder).mkdir()
            (out / folder / "last.pt").write_text("")
            (out / folder / "best.pt").write_text("")
        studies.requeue(found, 2, "power failure")
        objectives.tidy(found, out)
    assert [path for path in checkpoints(out) if path.startswith(("trial-0001", "trial-0002"))] == [
        "trial-0001/best.pt",
        "trial-0001/last.pt",
        "trial-0002/best.pt",
        "trial-0002/last.pt",
    ]


def test_trial_of_a_dead_machine_restarts_in_a_new_directory(search, fake, tmp_path):
    search(1)
    found = study()
    trial = found.ask()
    config = space.suggest(trial, tiny_config(epochs=4))
    with tracking.start_run(experiment="cmran-full", name="trial-0001", system_metrics=False) as left:
        pass
    client().update_run(left.run_id, status="RUNNING")
    trial.set_user_attr("worker", {"host": "elsewhere", "pid": os.getpid(), "started": 0.0, "token": ""})
    trial.set_user_attr("folder", "trial-0001")
    trial.set_user_attr("run_id", left.run_id)
    # As Optuna does when the heartbeat has stopped.
    found._storage.set_trial_state_values(trial._trial_id, TrialState.FAIL)
    found._storage.get_heartbeat_stale_trial_callback()(found, found.trials[1])

    assert search(2).counts == {"complete": 2}
    retry = study().trials[2]
    assert retry.value == pytest.approx(accuracy(config, 4))
    assert retry.user_attrs["folder"] == "trial-0002"
    assert retry.user_attrs["run_id"] != left.run_id
    assert client().get_run(left.run_id).info.status == "FAILED"


# -------------------------------------------------------------------------------------------------- rejected input


def test_invalid_input_is_rejected_before_anything_is_written(search, fake, tmp_path, data):
    for options, text in (
        ({"base": load_config("full", "debug")}, "6 visual_features.*512"),
        ({"base": tiny_config("weak")}, "the settings are for mode weak, but mode full was requested"),
        (
            {"base": tiny_config(selection_split="test")},
            "found train.selection_split test, .* the val split only",
        ),
        ({"device": "cuda"}, "device cuda was requested"),
        ({"base": None, "recipe": "nonsense"}, "unknown recipe 'nonsense'"),
        ({"epochs": 0}, "train.epochs"),
    ):
        if options.get("device") == "cuda" and torch.cuda.is_available():
            continue
        with pytest.raises(CmranError, match=text) as found:
            search(3, **options)
        assert "\n" not in str(found.value)
    assert not (tmp_path / "out").exists()
    assert not (tmp_path / "studies.db").exists()


def test_missing_data_folder_is_rejected(storage, tracking_db, tmp_path):
    from search.worker import search as bare

    with pytest.raises(CmranError):
        bare(tmp_path / "nowhere", mode="full", trials=2, out=tmp_path / "out")
    assert not (tmp_path / "studies.db").exists()


def test_other_settings_under_the_same_name_are_rejected(search, fake):
    search(1)
    with pytest.raises(
        ConfigError, match=r"^study 's' was created with epochs 4, not 3: choose another `study`[^\n]*$"
    ):
        search(2, epochs=3)
    with pytest.raises(CmranError, match=r"base.train.lr 0.01, not 0.02"):
        search(2, base=tiny_config(epochs=4, lr=0.02))
    assert len(study().trials) == 1


def test_output_directory_belongs_to_one_study(search, fake, tmp_path, storage):
    search(1)
    with pytest.raises(CmranError, match=r"out contains the trials of study 's', not of 't': choose another `out`$"):
        search(1, study="t")
    (tmp_path / "studies.db").unlink()
    with pytest.raises(CmranError, match=r"study 's', which was created again or is in another storage: .*`out`$"):
        search(1)


def test_no_complete_trial_while_others_run_every_slot(search, fake, data):
    search(1)
    found = study()
    # As if the only trial ran on another machine.
    other = open_study("t", {key: found.user_attrs[key] for key in SETTINGS}, {}, seed=0, epochs=4)
    other.ask().set_user_attr("worker", {"host": "elsewhere", "pid": 1, "started": 0.0, "token": ""})
    with pytest.raises(CmranError, match=r"^no trial is complete yet: 1 still run in other processes"):
        search(1, study="t", out=data.parent / "t")
    assert fake.calls == [("trial-0000", 0)]


def test_resume_with_a_new_tracking_database(search, fake, monkeypatch, tmp_path):
    first = search(1)
    monkeypatch.setenv("MLFLOW_TRACKING_URI", f"sqlite:///{tmp_path}/other.db")
    second = search(2)
    assert second.counts == {"complete": 2}
    assert second.run_id != first.run_id
    assert run_of(study().trials[1]).data.tags["mlflow.parentRunId"] == second.run_id


def test_search_runs_outside_the_main_thread(search, fake):
    results = []
    thread = threading.Thread(target=lambda: results.append(search(2)))
    thread.start()
    thread.join()
    assert results[0].counts == {"complete": 2}


def test_fake_training_has_a_known_optimum():
    assert quality(tiny_config(lr=2e-3, model={"dropout": 0.2})) == 80
