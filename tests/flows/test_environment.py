"""Wrong or missing environment variables: found first, reported by name, without passwords."""

import contextlib
import logging
import os
import shutil
import stat
import subprocess
import sys
from pathlib import Path

import pytest

from flows import cli as command
from flows.console import shown_logs
from tests.cmran.tracking.test_tracking import free_port, serving
from tests.conftest import ROOT

PASSWORD = "geheim-99%s"
ENCODED = "geheim-99%25s"
DEAD = f"http://user:{ENCODED}@127.0.0.1:9"


def no_password_in(*texts: str) -> None:
    for text in texts:
        assert "geheim-99" not in text


def no_password_below(folder: Path) -> None:
    for path in folder.rglob("*"):
        if path.is_file():
            assert b"geheim-99" not in path.read_bytes(), path


@pytest.fixture
def fails(capfd, monkeypatch, tmp_path):
    """Run a command that must fail in the folder of the test, and return its error line."""
    monkeypatch.chdir(tmp_path)

    def run(*arguments):
        assert command.main([str(argument) for argument in arguments]) == 1
        out, err = capfd.readouterr()
        assert "Traceback" not in err
        assert err.splitlines()[-1].startswith("error: ")
        no_password_in(out, err)
        no_password_below(tmp_path)
        return err.splitlines()[-1]

    return run


def test_stale_run_id_is_found_before_any_work(fails, data, tmp_path, monkeypatch):
    for arguments in (
        ("validate", data),
        ("synth", tmp_path / "synthetic"),
        ("train", data, "--mode", "full", "--out", tmp_path / "run"),
        ("export", "run", "-o", tmp_path / "m.onnx"),
        ("predict", "--model", "m.onnx", "--data", data, "--out", tmp_path / "out"),
    ):
        monkeypatch.setenv("MLFLOW_RUN_ID", "0" * 32)
        assert f"MLFLOW_RUN_ID={'0' * 32}" in fails(*arguments)
    assert list(tmp_path.iterdir()) == []


def test_read_only_command_creates_no_database(fails, data, tmp_path):
    for arguments in (
        ("predict", "--model", "models:/cmran-full@champion", "--data", data, "--out", tmp_path / "out"),
        ("predict", "--model", "models:/cmran-full@champion", "--data", data, "--out", tmp_path / "out", "--track"),
        ("evaluate", "0" * 32, data),
        ("export", "0" * 32, "-o", tmp_path / "m.onnx"),
        ("release", "0" * 32),
    ):
        line = fails(*arguments)
        assert f"there is no tracking database {tmp_path}/mlflow.db (the default without MLFLOW_TRACKING_URI)" in line
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize(
    ("variable", "uri"),
    [
        ("MLFLOW_TRACKING_URI", DEAD),
        ("MLFLOW_TRACKING_URI", "http://user:geheim-99/x#@127.0.0.1:9"),
        ("MLFLOW_TRACKING_URI", f"postgresql+nosuchdriver://user@127.0.0.1:9/d?password={ENCODED}"),
        ("CMRAN_STUDY_STORAGE", f"postgresql+nosuchdriver://user@127.0.0.1:9/d?password={ENCODED}"),
        ("CMRAN_STUDY_STORAGE", f"nothing://user:{ENCODED}@127.0.0.1:9/d"),
        ("CMRAN_STUDY_STORAGE", f"postgresql://user:{ENCODED}@127.0.0.1:port/d"),
        ("MLFLOW_REGISTRY_URI", DEAD),
    ],
)
def test_pipeline_checks_its_stores_first(fails, data, tracking_db, monkeypatch, variable, uri):
    monkeypatch.setenv(variable, uri)
    assert variable in fails("pipeline", data, "--recipe", "debug", "--out", "runs")
    assert not Path("runs").exists()
    if variable != "MLFLOW_REGISTRY_URI":
        assert variable in fails("search", data, "--mode", "full", "--recipe", "debug", "--out", "search")
        assert not Path("search").exists()


def test_release_checks_the_registry_before_the_export(fails, data, tracking_db, training, monkeypatch):
    from flows.jobs import train

    run = training()
    train.run(run)
    monkeypatch.setenv("MLFLOW_REGISTRY_URI", DEAD)
    assert "MLFLOW_REGISTRY_URI" in fails("release", run.out, "--data", data, "--out", "m.onnx")
    assert not Path("m.onnx").exists()


def test_log_lines_of_all_libraries_hide_passwords(capfd, monkeypatch, tmp_path):
    monkeypatch.setenv("MLFLOW_TRACKING_URI", DEAD)
    # Handlers that libraries created in another test write to a closed stream.
    monkeypatch.setattr(logging, "raiseExceptions", False)
    file = tmp_path / "log.txt"
    handler = logging.FileHandler(file)
    loggers = [
        logging.getLogger(name) for name in ("cmran", "mlflow.x", "urllib3.x", "alembic", "sqlalchemy", "optuna")
    ]
    for logger in loggers:
        logger.addHandler(handler)
    try:
        with shown_logs():
            for logger in loggers:
                logger.warning("retry %s with %r", DEAD, PASSWORD)
                try:
                    raise ValueError(DEAD)
                except ValueError:
                    logger.exception("failed")
            logging.getLogger("cmran").warning("%d is no number", "faulty call")
    finally:
        for logger in loggers:
            logger.removeHandler(handler)
        handler.close()
    text = file.read_text()
    no_password_in(text, *capfd.readouterr())
    assert text.count("Traceback") == len(loggers)
    assert text.count("http://user:***@127.0.0.1:9 with") == len(loggers)
    # Logging is restored.
    assert logging.getLogRecordFactory() is logging.LogRecord


def test_traceback_hides_passwords():
    code = "import flows.jobs.cache as j; from flows.cli import main\nFAULT\nraise SystemExit(main(['cache']))"
    code = code.replace("FAULT", f"def f(*_, **__): raise RuntimeError({DEAD!r})\nj.run = f")
    done = subprocess.run(
        [sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, check=False, timeout=120
    )
    assert done.returncode == 1
    assert "RuntimeError: http://user:***@127.0.0.1:9" in done.stderr
    assert "Traceback" in done.stderr
    no_password_in(done.stderr)


@pytest.mark.slow
def test_no_command_leaves_a_password(cmran, data, tiny, tmp_path):
    """Commands with a real server whose URI contains a password; then without the server."""
    port, server_folder, work = free_port(), tmp_path / "server", tmp_path
    server_folder.mkdir()
    arguments = ["server", "--backend-store-uri", f"sqlite:///{server_folder}/mlflow.db", "--host", "127.0.0.1"]
    arguments += ["--port", str(port), "--artifacts-destination", str(server_folder / "artifacts"), "--workers", "1"]
    environment = {"MLFLOW_TRACKING_URI": f"http://user:{ENCODED}@127.0.0.1:{port}"}
    settings = ("--mode", "full", "--config", tiny, "--epochs", "1")
    ready = f"http://127.0.0.1:{port}/health"
    with serving(arguments, ready, server_folder):
        for line in (
            ("train", data, *settings, "--out", "run"),
            ("search", data, *settings, "--trials", "1", "--study", "one", "--out", "search"),
            ("release", "run", "--data", data, "--variant", "float32"),
        ):
            done = cmran(*line, **environment)
            assert done.returncode == 0, done.stderr
            no_password_in(done.stdout, done.stderr)
    for line in (
        ("train", data, *settings, "--out", "another"),
        ("predict", "--model", "models:/cmran-full/1", "--data", data, "--out", "out"),
    ):
        done = cmran(*line, **environment)
        assert done.returncode == 1
        assert "MLFLOW_TRACKING_URI" in done.stderr
        no_password_in(done.stdout, done.stderr)
    no_password_below(work)


# ---------------------------------------------------------------------------------------------------- no home folder


def test_missing_home_folder_is_replaced_by_a_temporary_one(tmp_path, monkeypatch):
    import pwd
    import tempfile

    from cmran.utils.files import ensure_home

    def nobody(_):
        raise KeyError("no such user id")

    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path))
    monkeypatch.setenv("HOME", "restored at the end")
    for _ in range(2):
        # The second time it is found again.
        monkeypatch.delenv("HOME")
        with monkeypatch.context() as patch:
            patch.setattr(pwd, "getpwuid", nobody)
            ensure_home()
        assert Path(os.environ["HOME"]) == tmp_path / f"cmran-home-{os.getuid()}"
    assert stat.S_IMODE((tmp_path / f"cmran-home-{os.getuid()}").stat().st_mode) == 0o700
    # A folder that others can write to is not trusted.
    (tmp_path / f"cmran-home-{os.getuid()}").chmod(0o777)
    monkeypatch.delenv("HOME")
    with monkeypatch.context() as patch:
        patch.setattr(pwd, "getpwuid", nobody)
        ensure_home()
    assert Path(os.environ["HOME"]).name != f"cmran-home-{os.getuid()}"
    # An existing setting is kept.
    monkeypatch.setenv("HOME", "/nonexistent")
    ensure_home()
    assert os.environ["HOME"] == "/nonexistent"


@pytest.mark.slow
def test_user_id_without_home_and_passwd_entry(data, tiny, tmp_path):
    unshare = ["unshare", "--user", "--map-user=12345", "--map-group=12345"]
    if (
        shutil.which("unshare") is None
        or subprocess.run([*unshare, "true"], check=False, capture_output=True).returncode
    ):
        pytest.skip("this machine does not allow another user id (unshare --user)")
    lacking = ("HOME", "XDG_CACHE_HOME", "PREFECT_HOME", "USER", "LOGNAME", "MLFLOW_TRACKING_URI")
    environment = {key: value for key, value in os.environ.items() if key not in lacking}
    temporary = tmp_path / "tmp"
    temporary.mkdir()
    environment |= {"TMPDIR": str(temporary), "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"}
    arguments = ["train", data, "--mode", "full", "--config", tiny, "--epochs", "1", "--out", "run"]
    done = subprocess.run(
        [*unshare, sys.executable, "-m", "flows", *map(str, arguments)],
        cwd=tmp_path,
        env=environment,
        capture_output=True,
        text=True,
        check=False,
        timeout=240,
    )
    assert done.returncode == 0, done.stderr
    assert f"user id 12345 has no home folder (HOME is not set, no passwd entry): using {temporary}" in done.stderr
    assert "Traceback" not in done.stderr
    with contextlib.suppress(OSError):
        shutil.rmtree(temporary)
