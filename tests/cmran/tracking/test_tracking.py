"""Runs, lineage and the registry on a real SQLite store, and in part with a real server and real processes."""

import contextlib
import errno
import fcntl
import http.server
import json
import logging
import os
import socket
import sqlite3
import subprocess
import sys
import threading
import time
import urllib.request
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from cmran import tracking
from cmran.config import load_config
from cmran.errors import CmranError
from cmran.tracking import registry, store
from cmran.tracking.registry import Version, _objection, _select_champion

ROOT = Path(__file__).resolve().parents[3]
FINGERPRINT = "0123456789abcdef" * 2


@dataclass
class Record:
    """The fields of cmran.training.run_dir.EpochRecord that are logged."""

    epoch: int
    lr: float = 5e-4
    train_loss: float = 2.5
    train_accuracy: float | None = None
    grad_norm: float = 1.0
    val: dict[str, Any] | None = field(default_factory=lambda: {"accuracy": 60.0})
    test: dict[str, Any] | None = None
    seconds: float = 1.5


def client() -> Any:
    import mlflow

    return mlflow.MlflowClient(tracking_uri=tracking.tracking_uri())


@contextlib.contextmanager
def quick_run(**options: Any) -> Iterator[tracking.Run]:
    options = {"experiment": "cmran-full", "name": "train", "system_metrics": False} | options
    with tracking.start_run(**options) as run:
        yield run


def one_line(error: pytest.ExceptionInfo[BaseException]) -> str:
    text = str(error.value)
    assert "\n" not in text
    return text


# ---------------------------------------------------------------------------------------------------- connection


def test_import_is_light() -> None:
    code = (
        "import sys, cmran.tracking; print([m for m in ('mlflow', 'onnx', 'torch', 'sqlalchemy') if m in sys.modules])"
    )
    assert subprocess.check_output([sys.executable, "-c", code], text=True, cwd=ROOT).strip() == "[]"


def test_default_is_a_database_in_the_current_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("MLFLOW_TRACKING_URI", "x")
    monkeypatch.delenv("MLFLOW_TRACKING_URI")
    monkeypatch.chdir(tmp_path)
    assert tracking.tracking_uri() == f"sqlite:///{tmp_path}/mlflow.db"
    monkeypatch.setenv("MLFLOW_TRACKING_URI", "sqlite:///here.db?timeout=5")
    assert tracking.tracking_uri() == f"sqlite:///{tmp_path}/here.db?timeout=5"


@pytest.mark.slow
def test_many_processes_create_one_database(tmp_path: Path) -> None:
    folder = tmp_path / "a folder"
    folder.mkdir()
    code = (
        "from cmran import tracking\n"
        "with tracking.start_run(experiment='cmran-full', name='x', system_metrics=False) as run:\n"
        "    run.log_metrics({'a': 1.0})"
    )
    environment = {k: v for k, v in os.environ.items() if k != "MLFLOW_TRACKING_URI"} | {"PYTHONPATH": str(ROOT)}
    processes = [
        subprocess.Popen([sys.executable, "-c", code], cwd=folder, env=environment, stderr=subprocess.PIPE, text=True)
        for _ in range(3)
    ]
    assert [(p.communicate()[1], p.returncode) for p in processes] == [("", 0)] * 3
    with contextlib.closing(sqlite3.connect(folder / "mlflow.db")) as database:
        assert database.execute("SELECT count(*), count(DISTINCT experiment_id) FROM runs").fetchone() == (3, 1)
        roots = {row[0] for row in database.execute("SELECT artifact_location FROM experiments")}
    assert all(root.startswith((str(folder), folder.as_uri())) for root in roots)
    assert sorted(p.name for p in folder.iterdir()) == ["mlflow.db", "mlflow.db.lock"]


def test_a_database_that_another_process_creates_is_kept(
    tracking_db: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The lock is a POSIX lock, as SQLite's own locks are, so that it also excludes other machines."""
    path = tmp_path / "shared" / "mlflow.db"
    path.parent.mkdir()
    other = (
        "import fcntl, os, sys\n"
        "lock = open(sys.argv[2] + '.lock', 'a')\n"
        "fcntl.lockf(lock, fcntl.LOCK_EX)\n"
        "print('locked', flush=True)\n"
        "sys.stdin.read()\n"
        "os.rename(sys.argv[1], sys.argv[2])"
    )
    theirs = tmp_path / "theirs.db"
    theirs.write_bytes(tracking_db.read_bytes())
    with contextlib.closing(sqlite3.connect(theirs)) as database, database:
        database.execute("CREATE TABLE theirs (x)")
    monkeypatch.setenv("MLFLOW_TRACKING_URI", f"sqlite:///{path}")
    command = [sys.executable, "-c", other, str(theirs), str(path)]
    with subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE) as process:
        assert process.stdout is not None
        assert process.stdin is not None
        assert process.stdout.readline() == b"locked\n"
        thread = threading.Thread(target=tracking.connect)
        thread.start()
        thread.join(1.0)
        assert thread.is_alive()
        assert os.listdir(path.parent) == ["mlflow.db.lock"]
        process.stdin.close()
        thread.join(60.0)
    assert not thread.is_alive()
    with contextlib.closing(sqlite3.connect(path)) as database:
        assert database.execute("SELECT count(*) FROM theirs").fetchone() == (0,)


def test_a_file_system_without_locks_is_rejected(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def lacking(*_: Any) -> None:
        raise OSError(errno.ENOLCK, os.strerror(errno.ENOLCK))

    monkeypatch.setattr(fcntl, "lockf", lacking)
    monkeypatch.setenv("MLFLOW_TRACKING_URI", f"sqlite:///{tmp_path}/mlflow.db")
    with pytest.raises(CmranError, match=r"has no locks \(No locks available\), which SQLite needs") as error:
        tracking.connect()
    assert "MLFLOW_TRACKING_URI" in one_line(error)
    assert not (tmp_path / "mlflow.db").exists()


def test_without_a_cache_models_are_downloaded_to_a_temporary_folder(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    assert registry._download_folder() == tmp_path / "cache" / "cmran" / "models"
    (tmp_path / "file").touch()
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "file"))
    folder = registry._download_folder()
    assert folder.is_dir()
    assert folder == registry._download_folder()
    assert tmp_path not in folder.parents


def test_a_folder_store_is_rejected(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for uri in ("./mlruns", str(tmp_path), tmp_path.as_uri()):
        monkeypatch.setenv("MLFLOW_TRACKING_URI", uri)
        with pytest.raises(CmranError, match="no longer supports") as error:
            tracking.connect()
        assert uri in one_line(error)


def test_bad_databases_are_rejected_at_once(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, tracking_db: Path) -> None:
    text = tmp_path / "text.db"
    text.write_text("this is no database " * 100)
    old = tmp_path / "old.db"
    old.write_bytes(tracking_db.read_bytes())
    with contextlib.closing(sqlite3.connect(old)) as database, database:
        database.execute("UPDATE alembic_version SET version_num = '451aebb31d03'")
    for path, message in (
        (text, "not a database"),
        (text / "below" / "mlflow.db", "(Not a directory|File exists)"),
        (tmp_path, "is a folder"),
        (old, "mlflow db upgrade"),
    ):
        monkeypatch.setenv("MLFLOW_TRACKING_URI", f"sqlite:///{path}")
        with pytest.raises(CmranError, match=message) as error:
            tracking.connect()
        assert str(path) in one_line(error)


def test_an_unreachable_server_is_reported_in_one_line(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(store, "SERVER_TIMEOUT_S", 0.3)
    with socket.create_server(("127.0.0.1", 0)) as silent:
        # It accepts connections and does not answer.
        uri = f"http://me:secret@127.0.0.1:{silent.getsockname()[1]}"
        monkeypatch.setenv("MLFLOW_TRACKING_URI", uri)
        with pytest.raises(CmranError, match="not reachable") as error:
            tracking.connect()
    assert "secret" not in one_line(error)
    assert "MLFLOW_TRACKING_URI" in one_line(error)
    # Now no process listens on the port.
    with pytest.raises(CmranError, match="refused"):
        tracking.connect()


def test_another_program_on_the_port_is_reported(monkeypatch: pytest.MonkeyPatch) -> None:
    class Other(http.server.BaseHTTPRequestHandler):
        def do_GET(self) -> None:
            self.send_response(200)
            self.end_headers()
            self.wfile.write(b"<html>hello</html>")

        do_POST = do_GET

        def log_message(self, *_: Any) -> None:
            pass

    server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), Other)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    try:
        monkeypatch.setenv("MLFLOW_TRACKING_URI", f"http://127.0.0.1:{server.server_port}")
        with pytest.raises(CmranError, match="does not answer like MLflow") as error:
            tracking.connect()
        one_line(error)
    finally:
        server.shutdown()
        server.server_close()


def test_an_unreachable_database_server_is_reported_in_one_line(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("MLFLOW_TRACKING_URI", "postgresql+nosuchdriver://me:secret@127.0.0.1:1/mlflow")
    with pytest.raises(CmranError, match="not reachable") as error:
        tracking.connect()
    assert "secret" not in one_line(error)


# ---------------------------------------------------------------------------------------------------------- runs


def test_a_run_contains_everything(tracking_db: Path, tmp_path: Path) -> None:
    config = load_config("full", "demo")
    (tmp_path / "confusion.png").write_bytes(b"png")
    with tracking.start_run(experiment="cmran-full", name="train", tags={"cmran.mode": "full", "none": None}) as run:
        assert tracking.run_info(run.run_id).status == "RUNNING"
        run.log_params(config)
        run.log_epoch(Record(1))
        run.log_epoch(Record(2, val={"accuracy": 61.0, "accuracy_interval_95": [58.0, 64.0], "confusion": [[1, 2]]}))
        # One epoch without an evaluation, and one with a loss on val.
        run.log_epoch(Record(3, val=None))
        run.log_epoch(Record(4, val={"accuracy": 61.0, "loss": 1.5}))
        run.log_metrics({"test.accuracy": 59.0, "absent": None})
        run.log_dataset(tmp_path, FINGERPRINT, "training")
        run.log_artifact(tmp_path / "confusion.png", "figures")
        run.log_text("hello", "report.md")
    info = tracking.run_info(run.run_id)
    assert (info.status, info.experiment, info.name) == ("FINISHED", "cmran-full", "train")
    assert info.params["cfg.train.lr"] == str(config.train.lr)
    assert info.params["cfg.train.lr_milestones"] == json.dumps(list(config.train.lr_milestones))
    assert info.params["cfg.recipe"] == "demo"
    assert set(info.params) == {
        "cfg.recipe",
        *(f"cfg.model.{key}" for key in type(config.model).model_fields),
        *(f"cfg.train.{key}" for key in type(config.train).model_fields),
    }
    assert info.metrics["val.accuracy"] == 61.0
    assert info.metrics["val.accuracy_interval_95.low"] == 58.0
    assert info.metrics["train.loss"] == 2.5
    assert not any("confusion" in key or "absent" in key for key in info.metrics)
    # A run shorter than the sampling interval still has one sample.
    assert info.metrics["system/cpu_utilization_percentage"] >= 0
    assert info.tags["cmran.mode"] == "full"
    assert info.tags["cmran.fingerprint"] == FINGERPRINT
    history = client().get_metric_history(run.run_id, "val.accuracy")
    assert [(m.step, m.value) for m in history] == [(1, 60.0), (2, 61.0), (4, 61.0)]
    assert [(m.step, m.value) for m in client().get_metric_history(run.run_id, "val.loss")] == [(4, 1.5)]
    assert tracking.logged_epochs(run.run_id) == 4
    (entry,) = client().get_run(run.run_id).inputs.dataset_inputs
    assert (entry.dataset.digest, entry.tags[0].value) == (FINGERPRINT, "training")
    assert str(tmp_path) in entry.dataset.source
    assert tracking.run_artifact(run.run_id, "figures/confusion.png", tmp_path / "got").read_bytes() == b"png"
    artifacts = client().get_run(run.run_id).info.artifact_uri
    assert artifacts.startswith(tracking_db.parent.as_uri())
    assert not any(thread.name == "SystemMetricsMonitor" for thread in threading.enumerate())


def test_the_git_commit_of_the_source_tree_is_logged(tracking_db: Path) -> None:
    if not (ROOT / ".git").exists():
        pytest.skip("the tests are not in a git repository")
    head = subprocess.check_output(["git", "-C", str(ROOT), "rev-parse", "HEAD"], text=True).strip()
    tracking.git_state.cache_clear()
    with quick_run() as run:
        pass
    tags = tracking.run_info(run.run_id).tags
    assert tags["mlflow.source.git.commit"] == head
    assert tags["cmran.git_dirty"] in ("true", "false")


class Stopped(Exception):
    """Like an exception that the search uses to end a trial."""


@pytest.mark.parametrize(
    ("error", "status"),
    [
        (ValueError("x"), "FAILED"),
        (KeyboardInterrupt(), "KILLED"),
        (SystemExit(143), "KILLED"),
        (Stopped(), "KILLED"),
    ],
)
def test_the_status_of_a_failed_run(tracking_db: Path, error: BaseException, status: str) -> None:
    with pytest.raises(type(error)), quick_run(killed_by=(Stopped,)) as run:
        raise error
    assert tracking.run_info(run.run_id).status == status


def test_the_first_error_is_raised_if_the_store_also_fails(
    tracking_db: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    def work() -> None:
        with quick_run():
            tracking_db.unlink()
            tracking_db.mkdir()
            raise ValueError("the first")

    with pytest.raises(ValueError, match="the first"):
        work()
    assert "cannot end the run" in caplog.text


def test_child_runs_have_their_parent_from_any_thread(tracking_db: Path) -> None:
    import mlflow

    ids: list[str] = []

    def trial(number: int) -> None:
        with quick_run(name=f"trial-{number}", parent_run_id=parent.run_id) as run:
            run.log_metrics({"value": float(number)}, step=number)
            parent.log_metrics({"trials": float(number)}, step=number)
            ids.append(run.run_id)

    with quick_run(name="search") as parent:
        threads = [threading.Thread(target=trial, args=(number,)) for number in range(4)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
    assert len(ids) == 4
    assert {tracking.run_info(run_id).tags["mlflow.parentRunId"] for run_id in ids} == {parent.run_id}
    runs = client().search_runs([parent.experiment_id])
    assert {run.info.run_id for run in runs} == {parent.run_id, *ids}
    assert {run.info.status for run in runs} == {"FINISHED"}
    assert mlflow.active_run() is None


def test_the_runs_of_a_pipeline_have_its_id(tracking_db: Path) -> None:
    with quick_run(experiment=tracking.PIPELINE_EXPERIMENT, name="pipeline") as pipeline:
        pipeline.set_tags({tracking.PIPELINE_TAG: pipeline.run_id})
        with (
            quick_run(name="search", parent_run_id=pipeline.run_id) as search,
            quick_run(name="trial", parent_run_id=search.run_id) as trial,
        ):
            pass
    for run, parent in ((search, pipeline), (trial, search)):
        tags = tracking.run_info(run.run_id).tags
        assert (tags[tracking.PIPELINE_TAG], tags["mlflow.parentRunId"]) == (pipeline.run_id, parent.run_id)
    with pytest.raises(CmranError, match="unknown or deleted"), quick_run(parent_run_id="0" * 32):
        pass


def test_system_metrics_can_be_disabled(tracking_db: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("MLFLOW_ENABLE_SYSTEM_METRICS_LOGGING", "false")
    with tracking.start_run(experiment="cmran-full", name="train") as run:
        pass
    assert not any(key.startswith("system/") for key in tracking.run_info(run.run_id).metrics)


def test_a_run_is_resumed(tracking_db: Path) -> None:
    with contextlib.suppress(KeyboardInterrupt), quick_run() as run:
        run.log_params({"train": {"epochs": 5, "lr": 0.1}})
        run.log_epoch(Record(1))
        run.log_epoch(Record(2))
        raise KeyboardInterrupt
    assert tracking.run_info(run.run_id).status == "KILLED"
    assert tracking.logged_epochs(run.run_id) == 2
    with quick_run(experiment="another", name="another", run_id=run.run_id) as again:
        assert tracking.run_info(run.run_id).status == "RUNNING"
        again.log_params({"train": {"epochs": 9, "lr": 0.1}})
        again.log_epoch(Record(3))
    info = tracking.run_info(run.run_id)
    assert (again.run_id, info.experiment, info.name, info.status) == (run.run_id, "cmran-full", "train", "FINISHED")
    assert info.params["cfg.train.epochs"] == "5"
    assert info.tags["changed.cfg.train.epochs"] == "9"
    assert "changed.cfg.train.lr" not in info.tags
    assert tracking.logged_epochs(run.run_id) == 3
    assert client().get_experiment_by_name("another") is None


def test_a_run_that_mlflow_opened_is_adopted_once(tracking_db: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    # Like `mlflow run`, which opens the run, logs the raw parameters and passes the ids in the environment.
    opened = client().create_run("0", tags={"mlflow.source.type": "PROJECT", "mlflow.source.name": "file:///project"})
    client().log_param(opened.info.run_id, "lr", "0.5")
    monkeypatch.setenv("MLFLOW_RUN_ID", opened.info.run_id)
    monkeypatch.setenv("MLFLOW_EXPERIMENT_ID", "0")
    assert tracking.adopt_run() == opened.info.run_id
    assert tracking.adopt_run() is None
    assert "MLFLOW_EXPERIMENT_ID" not in os.environ
    with quick_run(run_id=opened.info.run_id) as run:
        run.log_params({"lr": 0.25})
        with quick_run(name="child", parent_run_id=run.run_id) as child:
            assert child.run_id != run.run_id
    info = tracking.run_info(run.run_id)
    assert (info.experiment_id, info.params) == ("0", {"lr": "0.5", "cfg.lr": "0.25"})
    assert info.tags["mlflow.source.type"] == "PROJECT"
    assert info.tags["mlflow.source.name"] == "file:///project"


def test_unknown_and_deleted_runs_are_rejected(tracking_db: Path, tmp_path: Path) -> None:
    with quick_run() as run:
        pass
    assert tracking.run_exists(run.run_id)
    with pytest.raises(CmranError, match="no artifact 'checkpoint/best"):
        tracking.checkpoint_of_run(run.run_id, tmp_path)
    client().delete_run(run.run_id)
    for run_id in (run.run_id, "0" * 32, "../../etc", ""):
        assert not tracking.run_exists(run_id)
        for call in (
            lambda run_id=run_id: tracking.run_info(run_id),
            lambda run_id=run_id: tracking.checkpoint_of_run(run_id, tmp_path),
            lambda run_id=run_id: quick_run(run_id=run_id).__enter__(),
        ):
            with pytest.raises(CmranError, match="unknown or deleted") as error:
                call()
            assert repr(run_id) in one_line(error)


def test_the_error_for_a_deleted_experiment_says_how_to_restore_it(tracking_db: Path) -> None:
    with quick_run() as run:
        pass
    client().delete_experiment(run.experiment_id)
    with pytest.raises(CmranError, match=f"experiments restore --experiment-id {run.experiment_id}"), quick_run():
        pass


def test_the_checkpoint_of_a_run_is_downloaded(tracking_db: Path, tmp_path: Path) -> None:
    (tmp_path / "best.pt").write_bytes(b"weights")
    with quick_run() as run:
        run.log_artifact(tmp_path / "best.pt", "checkpoint")
    assert tracking.checkpoint_of_run(run.run_id, tmp_path / "new" / "folder").read_bytes() == b"weights"


def test_a_store_that_fails_later_is_reported_in_one_line(tracking_db: Path, caplog: pytest.LogCaptureFixture) -> None:
    with quick_run() as run:
        with contextlib.closing(sqlite3.connect(tracking_db)) as database, database:
            database.execute("ALTER TABLE metrics RENAME TO renamed")
        with pytest.raises(tracking.TrackingError, match="cannot log metrics") as error:
            run.log_epoch(Record(1))
        assert str(tracking_db) in one_line(error)
        with contextlib.closing(sqlite3.connect(tracking_db)) as database, database:
            database.execute("ALTER TABLE renamed RENAME TO metrics")
        run.log_epoch(Record(1))
    assert "Traceback" not in caplog.text


def test_long_and_unusual_values(tracking_db: Path) -> None:
    with quick_run(tags={"long": "x" * 20_000}) as run:
        run.log_params({"long": "y" * 20_000, "empty": "", "list": [1, "a"], "none": None})
        run.log_params({f"p{i}": i for i in range(250)}, prefix="many.")
        run.log_metrics({f"m{i}": float(i) for i in range(1500)}, step=3)
        run.log_metrics({"nan": float("nan")})
    info = tracking.run_info(run.run_id)
    assert len(info.tags["long"]) == len(info.params["cfg.long"]) == 5000
    assert (info.params["cfg.list"], info.params["cfg.none"], info.params["cfg.empty"]) == ('[1, "a"]', "None", "")
    assert sum(key.startswith("many.") for key in info.params) == 250
    assert info.metrics["m1499"] == 1499.0


def test_numbers_of_an_evaluation() -> None:
    values = {
        "accuracy": 50,
        "interval": [1.0, 2.0],
        "leak_free": None,
        "baselines": {"always": 17.8},
        "confusion": [[1, 2]],
    }
    assert tracking.numbers(values | {"flag": True, "bad": float("nan")}, "val.") == {
        "val.accuracy": 50.0,
        "val.interval.low": 1.0,
        "val.interval.high": 2.0,
        "val.baselines.always": 17.8,
    }


# ------------------------------------------------------------------------------------------------------ registry


def tiny_onnx(path: Path, seed: int = 0) -> Path:
    """Write a model with the inputs and outputs of an export, T = 3, and one weight drawn from `seed`."""
    import onnx
    from onnx import TensorProto, helper, numpy_helper

    def value(name: str, kind: int, *shape: int | str) -> Any:
        return helper.make_tensor_value_info(name, kind, ["batch", *shape])

    weight = np.random.default_rng(seed).normal(size=(2, 28)).astype(np.float32)
    axes = {
        name: np.array(values, dtype=np.int64) for name, values in {"vis": [2, 3, 4], "last": [2], "time": [1]}.items()
    }
    nodes = [
        helper.make_node("ReduceMean", ["visual", "vis"], ["seen"], keepdims=0),
        helper.make_node("ReduceMean", ["audio", "last"], ["heard"], keepdims=0),
        helper.make_node("Mul", ["seen", "heard"], ["event_logits"]),
        helper.make_node("ReduceMax", ["audio", "time"], ["loudest"], keepdims=0),
        helper.make_node("MatMul", ["loudest", "weight"], ["class_logits"]),
        helper.make_node("ArgMax", ["class_logits"], ["category"], axis=1, keepdims=1),
        helper.make_node("Greater", ["event_logits", "zero"], ["is_event"]),
        helper.make_node("Where", ["is_event", "category", "background"], ["segments"]),
    ]
    constants = axes | {"weight": weight, "zero": np.float32(0), "background": np.int64(28)}
    graph = helper.make_graph(
        nodes,
        "tiny",
        [value("visual", TensorProto.FLOAT, 3, 2, 2, 4), value("audio", TensorProto.FLOAT, 3, 2)],
        [
            value("event_logits", TensorProto.FLOAT, 3),
            value("class_logits", TensorProto.FLOAT, 28),
            value("segments", TensorProto.INT64, 3),
        ],
        [numpy_helper.from_array(np.asarray(array), name) for name, array in constants.items()],
    )
    model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 20)], ir_version=10)
    onnx.checker.check_model(model, full_check=True)
    onnx.save(model, str(path))
    return path


Release = Callable[..., tracking.Registered]


@pytest.fixture
def release(tracking_db: Path, tmp_path: Path) -> Release:
    """Return a function that releases a tiny model with the given accuracy on val."""

    def make(val: float | None, *, seed: int = 0, mode: str = "full", **options: Any) -> tracking.Registered:
        options = {"fingerprint": FINGERPRINT} | options
        with quick_run(experiment=f"cmran-{mode}") as run:
            run.log_epoch(Record(1))
        return tracking.register_release(
            onnx_path=tiny_onnx(tmp_path / "tiny.onnx", seed), run_id=run.run_id, mode=mode, val_accuracy=val, **options
        )

    return make


def test_a_release_creates_a_version_with_lineage(release: Release, tracking_db: Path, tmp_path: Path) -> None:
    import mlflow
    import onnxruntime

    registered = release(
        75.25, tags={"test_accuracy": 74.0, "study": None, "recipe": "demo", "parity_equal_segments": 1.0}
    )
    assert (registered.name, registered.version, registered.alias) == ("cmran-full", 1, "champion")
    assert (registered.champion, registered.previous_champion) == (1, None)
    (version,) = tracking.registered_versions("cmran-full")
    assert version.val_accuracy == 75.25
    assert version.aliases == ("champion",)
    assert version.run_id is not None
    expected = {
        "mode": "full",
        "val_accuracy": "75.25",
        "test_accuracy": "74.0",
        "recipe": "demo",
        "parity_equal_segments": "1.0",
        "fingerprint": FINGERPRINT,
        "selection_split": "val",
        "run_id": version.run_id,
    }
    assert expected.items() <= version.tags.items()
    assert "study" not in version.tags

    # Run and model refer to each other; the run is still finished, and no other run was started.
    run = client().get_run(version.run_id)
    assert run.info.status == "FINISHED"
    (output,) = run.outputs.model_outputs
    stored = client().get_logged_model(output.model_id)
    assert (stored.source_run_id, stored.experiment_id, str(stored.status)) == (
        version.run_id,
        run.info.experiment_id,
        "READY",
    )
    assert stored.artifact_location.startswith(tracking_db.parent.as_uri())
    assert len(client().search_runs([run.info.experiment_id, "0"])) == 1
    assert mlflow.active_run() is None

    # MLflow loads it as a user would, and its outputs equal those of the file.
    loaded = mlflow.onnx.load_model("models:/cmran-full@champion")
    feed = {
        "visual": np.random.default_rng(1).random((5, 3, 2, 2, 4), dtype=np.float32),
        "audio": np.random.default_rng(2).normal(size=(5, 3, 2)).astype(np.float32),
    }
    names = ["event_logits", "class_logits", "segments"]
    providers = ["CPUExecutionProvider"]
    ours = onnxruntime.InferenceSession(str(tmp_path / "tiny.onnx"), providers=providers).run(names, feed)
    theirs = onnxruntime.InferenceSession(loaded.SerializeToString(), providers=providers).run(names, feed)
    served = mlflow.pyfunc.load_model("models:/cmran-full@champion")
    for one, two, three in zip(ours, theirs, served.predict(feed).values(), strict=True):
        np.testing.assert_array_equal(one, two)
        np.testing.assert_array_equal(one, three)

    schema = served.metadata.signature
    assert {s.name: (str(s.type), s.shape) for s in schema.inputs.inputs} == {
        "visual": ("float32", (-1, 3, 2, 2, 4)),
        "audio": ("float32", (-1, 3, 2)),
    }
    assert {s.name: (str(s.type), s.shape) for s in schema.outputs.inputs} == {
        "event_logits": ("float32", (-1, 3)),
        "class_logits": ("float32", (-1, 28)),
        "segments": ("int64", (-1, 3)),
    }
    with pytest.raises(mlflow.exceptions.MlflowException, match=r"[Ss]hape"):
        served.predict(feed | {"audio": feed["audio"][..., :1]})
    pins = Path(mlflow.artifacts.download_artifacts("models:/cmran-full/1"), "requirements.txt").read_text().split()
    assert [pin.split("==")[0] for pin in pins] == ["mlflow", "onnx", "onnxruntime-gpu", "numpy"]
    assert all("==" in pin and "+" not in pin for pin in pins)


def test_only_a_better_version_becomes_champion(release: Release, caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level(logging.INFO, "cmran")
    other = {"fingerprint": "f" * 32}
    got = [
        release(70.0),
        release(70.0),
        release(69.0),
        release(71.0),
        release(99.0, **other),
        release(99.0, selection_split="test"),
        release(None),
        release(71.5),
    ]
    assert [(registered.version, registered.alias, registered.champion) for registered in got] == [
        (1, "champion", 1),
        (2, "challenger", 1),
        (3, "challenger", 1),
        (4, "champion", 4),
        (5, "challenger", 4),
        (6, "challenger", 4),
        (7, "challenger", 4),
        (8, "champion", 8),
    ]
    assert [registered.previous_champion for registered in got] == [None, 1, 1, 1, 4, 4, 4, 4]
    reasons = [registered.reason for registered in got]
    assert "there was no champion" in reasons[0]
    assert "is not above" in reasons[1]
    assert "above 70.000 of version 1" in reasons[3]
    assert "other data" in reasons[4]
    assert "selected on the test split" in reasons[5]
    assert "no accuracy on val" in reasons[6]
    assert all(reason in caplog.text for reason in reasons)
    aliases = {version.number: version.aliases for version in tracking.registered_versions("cmran-full")}
    assert {number: names for number, names in aliases.items() if names} == {7: ("challenger",), 8: ("champion",)}
    assert release(50.0, mode="weak").alias == "champion"


def test_without_an_accuracy_on_val_there_is_no_champion(release: Release) -> None:
    registered = release(99.0, selection_split="test")
    assert (registered.alias, registered.champion) == ("challenger", None)
    with pytest.raises(
        CmranError, match=r"no such alias: cmran-full has the aliases challenger -> 1 and the versions 1"
    ):
        tracking.resolve_model("models:/cmran-full@champion")
    assert release(10.0).alias == "champion"


def test_a_version_with_a_reason_against_it_never_becomes_champion(release: Release) -> None:
    reason = "val accuracy 20.000 is not above 25.000 of the best trivial baseline"
    first = release(20.0, not_champion=reason)
    assert (first.alias, first.reason, first.champion) == ("challenger", reason, None)
    assert tracking.registered_versions("cmran-full")[0].tags["not_champion"] == reason
    # Only a better version without such a reason replaces the champion.
    assert release(10.0).alias == "champion"
    assert release(24.0, not_champion=reason).reason == reason
    assert release(30.0).champion == 4


def test_an_unknown_selection_split_is_never_champion(release: Release) -> None:
    registered = release(99.0, selection_split="unknown")
    assert (registered.alias, registered.reason) == ("challenger", "its selection split is unknown")


def test_an_alias_that_a_person_moved_is_respected(release: Release) -> None:
    release(80.0)
    release(90.0)
    client().set_registered_model_alias("cmran-full", "champion", "1")
    registered = release(85.0)
    assert (registered.version, registered.alias, registered.previous_champion) == (3, "champion", 1)
    client().delete_registered_model_alias("cmran-full", "champion")
    assert release(50.0).alias == "champion"


def test_a_concurrent_release_on_another_machine(release: Release, monkeypatch: pytest.MonkeyPatch) -> None:
    """A release on another machine, which the lock does not exclude, between the read and the write."""
    import mlflow

    release(70.0)
    release(60.0)
    plain = mlflow.MlflowClient.set_registered_model_alias
    rivals: list[str] = []

    def interfere(self: Any, name: str, alias: str, version: str) -> None:
        if not rivals:
            source = self.get_model_version(name, "1")
            tags = {
                "val_accuracy": "90.0",
                "fingerprint": FINGERPRINT,
                "selection_split": "val",
                "release_state": "pending",
            }
            rival = self.create_model_version(name, source.source, tags=tags, model_id=source.model_id)
            rivals.append(str(rival.version))
            plain(self, name, "champion", rival.version)
            self.set_model_version_tag(name, str(rival.version), "release_state", "settled")
        plain(self, name, alias, version)

    monkeypatch.setattr(mlflow.MlflowClient, "set_registered_model_alias", interfere)
    registered = release(80.0)
    assert (registered.alias, registered.champion) == ("challenger", int(rivals[0]))
    assert "not above 90.000" in registered.reason
    (champion,) = [v for v in tracking.registered_versions("cmran-full") if "champion" in v.aliases]
    assert champion.val_accuracy == 90.0


def test_setting_an_alias_is_retried(release: Release, monkeypatch: pytest.MonkeyPatch) -> None:
    """MLflow reads and then inserts: one of two concurrent releases violates the unique key of the database."""
    import mlflow

    plain = mlflow.MlflowClient.set_registered_model_alias
    failed: list[str] = []

    def collide(self: Any, name: str, alias: str, version: str) -> None:
        if alias not in failed:
            failed.append(alias)
            raise mlflow.exceptions.MlflowException("UNIQUE constraint failed: registered_model_aliases.name")
        plain(self, name, alias, version)

    monkeypatch.setattr(mlflow.MlflowClient, "set_registered_model_alias", collide)
    assert [release(70.0).alias, release(60.0).alias] == ["champion", "challenger"]
    assert failed == ["champion", "challenger"]
    assert [v.aliases for v in tracking.registered_versions("cmran-full")] == [("champion",), ("challenger",)]


def test_the_next_release_considers_one_that_was_killed(release: Release) -> None:
    release(70.0)
    source = client().get_model_version("cmran-full", "1")
    tags = {"val_accuracy": "90.0", "fingerprint": FINGERPRINT, "selection_split": "val", "release_state": "pending"}
    client().create_model_version("cmran-full", source.source, tags=tags, model_id=source.model_id)
    registered = release(80.0)
    assert (registered.version, registered.alias, registered.champion) == (3, "challenger", 2)


def test_the_selected_champion_does_not_depend_on_the_order() -> None:
    def version(number: int, val: float, fingerprint: str = "a") -> Version:
        tags = {"val_accuracy": str(val), "fingerprint": fingerprint, "selection_split": "val"}
        return Version("cmran-full", number, None, tags, ())

    field_ = [version(3, 80.0), version(1, 79.0), version(2, 80.0), version(4, 99.0, "b")]
    for candidates in (field_, field_[::-1]):
        best = _select_champion(None, candidates)
        assert best is not None
        assert best.number == 2
        assert all(_objection(version, best) for version in candidates)


RACER = """
import sys, time
from pathlib import Path
from cmran import tracking
onnx_path, run_id, val, go = sys.argv[1:]
tracking.registered_versions("cmran-full")
import onnx, mlflow.onnx
Path(go + "." + run_id).touch()
while not Path(go).exists():
    time.sleep(0.005)
registered = tracking.register_release(
    onnx_path=Path(onnx_path), run_id=run_id, mode="full", val_accuracy=float(val), fingerprint="f" * 32
)
print(registered.version, registered.alias)
"""


@pytest.mark.slow
@pytest.mark.parametrize("machines", ["one machine", "several machines"])
def test_concurrent_releases_leave_the_best_as_champion(tracking_db: Path, tmp_path: Path, machines: str) -> None:
    """Real processes release at once; "several machines" have separate locks and do not wait."""
    path, go = tiny_onnx(tmp_path / "tiny.onnx"), tmp_path / "go"
    accuracies = [71.0, 73.0, 72.0]
    processes = []
    for number, accuracy in enumerate(accuracies):
        with quick_run() as run:
            pass
        environment = os.environ | {"PYTHONPATH": str(ROOT)}
        if machines == "several machines":
            environment["XDG_CACHE_HOME"] = str(tmp_path / f"machine-{number}")
        arguments = [sys.executable, "-c", RACER, str(path), run.run_id, str(accuracy), str(go)]
        processes.append(
            subprocess.Popen(arguments, env=environment, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
        )
    while len(list(tmp_path.glob("go.*"))) < len(processes) and all(p.poll() is None for p in processes):
        time.sleep(0.01)
    go.touch()
    ended = [(process.communicate(), process.returncode) for process in processes]
    assert [code for _, code in ended] == [0] * len(processes), ended
    versions = tracking.registered_versions("cmran-full")
    assert sorted(version.number for version in versions) == [1, 2, 3]
    assert [version.val_accuracy for version in versions if "champion" in version.aliases] == [73.0]
    assert not any(len(version.aliases) > 1 for version in versions)
    assert {version.tags["release_state"] for version in versions} == {"settled"}


def test_a_store_that_returns_another_model_registers_nothing(
    release: Release, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    import mlflow.onnx

    other = registry._parsed_onnx(tiny_onnx(tmp_path / "other.onnx", seed=7))
    plain = mlflow.onnx.log_model
    monkeypatch.setattr(mlflow.onnx, "log_model", lambda _, **options: plain(other, **options))
    with pytest.raises(tracking.TrackingError, match="weights weight differ") as error:
        release(75.0)
    one_line(error)
    assert tracking.registered_versions("cmran-full") == []
    (stored,) = client().search_logged_models(["1"])
    assert str(stored.status) == "FAILED"


def test_other_onnx_models_are_rejected(tracking_db: Path, tmp_path: Path) -> None:
    import onnx

    with quick_run() as run:
        pass
    text = tmp_path / "text.onnx"
    text.write_text("no model")
    foreign = registry._parsed_onnx(tiny_onnx(tmp_path / "foreign.onnx"))
    foreign.graph.output[0].name = "seen"
    onnx.save(foreign, str(tmp_path / "foreign.onnx"))
    for path, message in (
        (text, "not readable as an ONNX model"),
        (tmp_path / "absent.onnx", "No such file"),
        (tmp_path / "foreign.onnx", "expected .*'event_logits'"),
    ):
        with pytest.raises(CmranError, match=message) as error:
            tracking.register_release(
                onnx_path=path, run_id=run.run_id, mode="full", val_accuracy=1.0, fingerprint=FINGERPRINT
            )
        assert str(path) in one_line(error)
    with pytest.raises(CmranError, match="unknown or deleted"):
        tracking.register_release(
            onnx_path=tiny_onnx(text), run_id="0" * 32, mode="full", val_accuracy=1.0, fingerprint=FINGERPRINT
        )
    assert tracking.registered_versions("cmran-full") == []


def test_resolving_a_model(release: Release, tmp_path: Path) -> None:
    import hashlib

    first, second = release(70.0, seed=1), release(60.0, seed=2)
    by_alias = tracking.resolve_model("models:/cmran-full@champion")
    by_number = tracking.resolve_model("models:/cmran-full/2")
    assert (by_alias.name, by_alias.version) == ("cmran-full", first.version)
    assert (by_number.name, by_number.version) == ("cmran-full", second.version)
    assert by_alias.digest != by_number.digest
    assert by_number.digest == hashlib.sha256(by_number.path.read_bytes()).hexdigest()
    assert by_number.run_id
    by_run = tracking.resolve_model(f"runs:/{by_number.run_id}/model")
    assert (by_run.digest, by_run.run_id, by_run.version) == (by_number.digest, by_number.run_id, None)
    plain = tracking.resolve_model(str(tiny_onnx(tmp_path / "plain.onnx", seed=2)))
    assert (plain.path, plain.name, plain.run_id) == (tmp_path / "plain.onnx", None, None)
    assert plain.digest == by_number.digest

    both = "aliases champion -> 1, challenger -> 2 and the versions 1, 2"
    for address, message in (
        ("models:/cmran-full@champio", both),
        ("models:/cmran-full/3", both),
        ("models:/cmran-weak@champion", "there are cmran-full"),
        ("models:/cmran-full", "expected models:/NAME@ALIAS"),
        ("models:/cmran-full/latest", "expected models:/NAME@ALIAS"),
        (f"runs:/{by_run.run_id}/nothing", "it has model"),
        ("runs:/" + "0" * 32 + "/model", "unknown or deleted"),
        (str(tmp_path / "absent.onnx"), "no such file"),
    ):
        with pytest.raises(CmranError, match=message) as error:
            tracking.resolve_model(address)
        one_line(error)

    by_number.path.write_bytes(tiny_onnx(tmp_path / "swapped.onnx", seed=3).read_bytes())
    with pytest.raises(CmranError, match="changed or damaged"):
        tracking.resolve_model("models:/cmran-full/2")
    by_number.path.unlink()
    with pytest.raises(CmranError, match="damaged"):
        tracking.resolve_model("models:/cmran-full/2")


def test_variants_are_stored_beside_the_model(release: Release, tmp_path: Path) -> None:
    int8 = tiny_onnx(tmp_path / "any name.onnx", seed=5)
    registered = release(70.0, seed=1, variants={"int8": int8}, tags={"int8_equal_segments": 0.999})
    (version,) = tracking.registered_versions("cmran-full")
    assert version.tags["int8_equal_segments"] == "0.999"
    assert "float16_sha256" not in version.tags

    resolved = tracking.resolve_model(registered.uri)
    assert resolved.variant == "float32"
    assert resolved.with_variant("float32") is resolved
    int8_model = resolved.with_variant("int8")
    assert int8_model.path.read_bytes() == int8.read_bytes()
    assert int8_model.digest == version.tags["int8_sha256"] != resolved.digest
    assert (int8_model.name, int8_model.version, int8_model.run_id) == (
        resolved.name,
        resolved.version,
        resolved.run_id,
    )
    by_run = tracking.resolve_model(f"runs:/{resolved.run_id}/model").with_variant("int8")
    assert (by_run.path.read_bytes(), by_run.version) == (int8.read_bytes(), None)
    with pytest.raises(CmranError, match="has no variant float16: it has float32, int8") as error:
        resolved.with_variant("float16")
    one_line(error)

    int8_model.path.write_bytes(tiny_onnx(tmp_path / "swapped.onnx", seed=3).read_bytes())
    with pytest.raises(CmranError, match="variant int8 was changed"):
        tracking.resolve_model(registered.uri).with_variant("int8")
    int8_model.path.unlink()
    with pytest.raises(CmranError, match="variant int8 was changed, damaged or removed"):
        tracking.resolve_model(registered.uri).with_variant("int8")
    assert tracking.resolve_model(registered.uri).digest == resolved.digest


def test_a_store_that_returns_another_variant_registers_nothing(
    release: Release, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    import mlflow.onnx

    plain = mlflow.onnx.log_model

    def cut(model: Any, *, extra_files: list[str], **options: Any) -> Any:
        Path(extra_files[0]).write_bytes(b"")
        return plain(model, extra_files=extra_files, **options)

    monkeypatch.setattr(mlflow.onnx, "log_model", cut)
    with pytest.raises(tracking.TrackingError, match="variant int8 differ"):
        release(75.0, variants={"int8": tiny_onnx(tmp_path / "int8.onnx", seed=5)})
    assert tracking.registered_versions("cmran-full") == []


# ------------------------------------------------------------------------------------------- servers (real ones)


def free_port() -> int:
    with socket.create_server(("127.0.0.1", 0)) as listener:
        return int(listener.getsockname()[1])


@contextlib.contextmanager
def serving(arguments: list[str], ready: str, folder: Path) -> Iterator[subprocess.Popen[bytes]]:
    """Run a server process until the block ends; it answers at the URL `ready`."""
    # MLflow starts uvicorn by its name, so it must be on the path.
    path = f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}"
    environment = os.environ | {"PYTHONPATH": str(ROOT), "PATH": path, "MLFLOW_SERVER_ENABLE_JOB_EXECUTION": "false"}
    with (folder / "server.log").open("wb") as output:
        command = [sys.executable, "-m", "mlflow", *arguments]
        process = subprocess.Popen(
            command, cwd=folder, env=environment, stdout=output, stderr=output, start_new_session=True
        )
    try:
        deadline = time.monotonic() + 200
        while True:
            try:
                urllib.request.urlopen(ready, timeout=2).close()
                break
            except OSError:
                assert process.poll() is None, (folder / "server.log").read_text()
                assert time.monotonic() < deadline, (folder / "server.log").read_text()
                time.sleep(0.2)
        yield process
    finally:
        with contextlib.suppress(ProcessLookupError):
            os.killpg(process.pid, 9)
        process.wait()


@pytest.mark.slow
def test_releases_through_a_server(
    tracking_db: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, release: Release
) -> None:
    port = free_port()
    uri = f"http://127.0.0.1:{port}"
    arguments = [
        "server",
        "--backend-store-uri",
        f"sqlite:///{tracking_db}",
        "--host",
        "127.0.0.1",
        "--port",
        str(port),
    ]
    arguments += ["--artifacts-destination", str(tmp_path / "artifacts"), "--workers", "1"]
    with serving(arguments, f"{uri}/health", tmp_path) as server:
        monkeypatch.setenv("MLFLOW_TRACKING_URI", uri)
        first, second, third = release(70.0, seed=1), release(71.0, seed=2), release(69.0, seed=3)
        assert [registered.alias for registered in (first, second, third)] == ["champion", "champion", "challenger"]
        assert third.version == 3
        resolved = tracking.resolve_model("models:/cmran-full@champion")
        assert resolved.digest == tracking.resolve_model(str(tiny_onnx(tmp_path / "again.onnx", seed=2))).digest
        # The model is downloaded once, and again if it is damaged.
        inode = resolved.path.stat().st_ino
        again = tracking.resolve_model("models:/cmran-full/2").path
        assert (again, again.stat().st_ino) == (resolved.path, inode)
        for damage in (lambda: os.truncate(again, 100), again.unlink, (again.parent / "MLmodel").unlink):
            damage()
            assert tracking.resolve_model("models:/cmran-full/2").digest == resolved.digest
        with pytest.raises(CmranError, match="challenger -> 3 and the versions 1, 2, 3"):
            tracking.resolve_model("models:/cmran-full@nobody")
        assert not tracking.run_exists("0" * 32)
        monkeypatch.setenv("MLFLOW_HTTP_REQUEST_MAX_RETRIES", "1")
        run = tracking.open_run(resolved.run_id or "")
        os.killpg(server.pid, 9)
        server.wait()
        with pytest.raises(tracking.TrackingError, match=f"{uri}.*cannot log metrics") as error:
            run.log_epoch(Record(1))
        one_line(error)


@pytest.mark.slow
def test_mlflow_serves_the_champion(release: Release, tmp_path: Path) -> None:
    release(70.0)
    port = free_port()
    arguments = ["models", "serve", "-m", "models:/cmran-full@champion", "--env-manager", "local"]
    arguments += ["--host", "127.0.0.1", "--port", str(port)]
    with serving(arguments, f"http://127.0.0.1:{port}/ping", tmp_path):
        visual, audio = np.full((2, 3, 2, 2, 4), 0.5), np.full((2, 3, 2), 0.25)
        audio[1] = -0.25
        request = urllib.request.Request(
            f"http://127.0.0.1:{port}/invocations",
            data=json.dumps({"inputs": {"visual": visual.tolist(), "audio": audio.tolist()}}).encode(),
            headers={"Content-Type": "application/json"},
        )
        with urllib.request.urlopen(request, timeout=60) as response:
            answer = json.load(response)["predictions"]
    np.testing.assert_allclose(answer["event_logits"], [[0.125] * 3, [-0.125] * 3], rtol=1e-6)
    assert np.shape(answer["class_logits"]) == (2, 28)
    best = int(np.argmax(answer["class_logits"][0]))
    assert answer["segments"] == [[best] * 3, [28] * 3]
