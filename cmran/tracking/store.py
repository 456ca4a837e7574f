"""The tracking store: where it is, whether it can be used, and its errors in one line.

MLflow takes over a second to import, so it is loaded by the first call that needs it, not with this module.
"""

import contextlib
import fcntl
import importlib
import logging
import os
import re
import sqlite3
import tempfile
import threading
import urllib.error
import urllib.request
from collections.abc import Iterator
from functools import cache
from pathlib import Path
from typing import TYPE_CHECKING, Any

from cmran.errors import UserError
from cmran.files import file_lock, lock_fault
from cmran.interrupts import held_back

if TYPE_CHECKING:
    from mlflow import MlflowClient

HEALTH_TIMEOUT_S = 5.0
"""How long a tracking server or database may take to say that it is there."""


class TrackingError(UserError):
    """The tracking server or database failed in the middle of work."""


def tracking_uri() -> str:
    """Address of the tracking store: $MLFLOW_TRACKING_URI, else `mlflow.db` (SQLite) in the current folder.

    A relative SQLite path is made absolute, so that a later change of folder moves nothing.
    """
    uri = os.environ.get("MLFLOW_TRACKING_URI", "").strip() or "sqlite:///mlflow.db"
    path = sqlite_path(uri)
    if path is None or path.is_absolute():
        return uri
    return uri.replace(f"sqlite:///{path}", f"sqlite:///{path.absolute()}", 1)


def adopt_run() -> str | None:
    """The run that `mlflow run` opened for this process, taken out of the environment; None without one.

    Call it once where a command starts. Left in the environment, the id would be taken up again by the first run that
    any child process starts.
    """
    for name in ("MLFLOW_EXPERIMENT_ID", "MLFLOW_EXPERIMENT_NAME"):
        os.environ.pop(name, None)
    return os.environ.pop("MLFLOW_RUN_ID", "").strip() or None


_connecting = threading.RLock()
_connected: set[str] = set()


def connect() -> str:
    """Make sure that the tracking store is there and usable; returns its address. Cheap after the first call.

    A new SQLite database is created once, however many processes ask at the same time.

    Raises UserError (one line): a folder store (`./mlruns`), a database that cannot be written, is no database or has
    another schema version, a server that does not answer within seconds.
    """
    uri = tracking_uri()
    path = sqlite_path(uri)
    with _connecting:
        mlflow = mlflow_module()
        if uri not in _connected or (path is not None and not path.exists()):
            if path is not None:
                _prepare_sqlite(uri, path)
            elif uri.startswith(("http://", "https://")):
                _check_server(uri)
            elif re.match(r"(postgresql|mysql|mssql)(\+\w+)?://", uri):
                _check_database(uri)
            elif uri.startswith("file:") or ("://" not in uri and uri not in ("databricks", "databricks-uc", "uc")):
                raise UserError(
                    f"MLFLOW_TRACKING_URI is the folder {uri!r}, which MLflow no longer supports: "
                    "use sqlite:///mlflow.db, a database or an http(s) server"
                )
            _connected.add(uri)
        if mlflow.get_tracking_uri() != uri:
            mlflow.set_tracking_uri(uri)
    return uri


def mlflow_module(module: str = "mlflow") -> Any:
    """The package or one of its modules. Untyped: MLflow is marked as typed, but much of it is not."""
    _settle()
    return importlib.import_module(module)


@cache
def _settle() -> None:
    # Before the import: MLflow reads some of these when it is loaded.
    os.environ.setdefault("MLFLOW_DISABLE_TELEMETRY", "true")
    os.environ.setdefault("DO_NOT_TRACK", "true")
    # Its defaults (7 retries, each up to 120 s) keep a lost server silent for minutes.
    os.environ.setdefault("MLFLOW_HTTP_REQUEST_MAX_RETRIES", "3")
    os.environ.setdefault("MLFLOW_HTTP_REQUEST_BACKOFF_FACTOR", "1")
    os.environ.setdefault("MLFLOW_HTTP_REQUEST_TIMEOUT", "30")
    os.environ.setdefault("MLFLOW_ENABLE_ARTIFACTS_PROGRESS_BAR", "false")
    # It would write on stdout, which belongs to the command's own result.
    os.environ.setdefault("MLFLOW_SUPPRESS_PRINTING_URL_TO_STDOUT", "true")
    # Importing it sets its loggers up.
    importlib.import_module("mlflow")
    for name in ("mlflow", "alembic"):
        logging.getLogger(name).setLevel(logging.WARNING)
    # Logs a traceback for every database error; the caller gets that error as an exception with one line.
    logging.getLogger("mlflow.store.db.utils").setLevel(logging.CRITICAL)


def connected_client() -> "MlflowClient":
    """A client of the store, after `connect`."""
    uri = connect()
    client: MlflowClient = mlflow_module().MlflowClient(tracking_uri=uri)
    return client


def sqlite_path(uri: str) -> Path | None:
    """The file of an SQLite address; None for other addresses."""
    prefix = "sqlite:///"
    return Path(uri.removeprefix(prefix).split("?")[0]) if uri.startswith(prefix) else None


def shown(uri: str) -> str:
    """`uri` without a password."""
    return re.sub(r"//([^:/@]*):[^/@]*@", r"//\1:***@", uri)


def _prepare_sqlite(uri: str, path: Path) -> None:
    where = f"tracking database {path}"
    advice = "choose another with MLFLOW_TRACKING_URI=sqlite:////folder/mlflow.db"
    if path.is_dir():
        raise UserError(f"{where} is a folder: {advice}")
    lock = path.with_name(path.name + ".lock")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        lock.touch()
        if fault := lock_fault(lock, fcntl.lockf):
            raise UserError(f"{where}: its file system has no locks ({fault}), which SQLite needs: {advice}")
        with file_lock(lock):
            if path.exists() and path.stat().st_size:
                with contextlib.closing(sqlite3.connect(path, timeout=20.0)) as connection:
                    # Fails on a file that is no database or cannot be written. MLflow itself retries for two minutes.
                    connection.execute("BEGIN IMMEDIATE")
                    connection.execute("SELECT count(*) FROM sqlite_master")
                    connection.rollback()
                _open_store(uri, artifact_root(path))
            else:
                _make_sqlite(path)
    except OSError as error:
        raise UserError(f"{where} cannot be made: {error.strerror or error}: {advice}") from error
    except sqlite3.Error as error:
        raise UserError(f"{where} cannot be used: {error}: {advice}") from error


def _make_sqlite(path: Path) -> None:
    """A new database, under its name only when it is whole: a half-made one could not be repaired."""
    target = Path(os.path.realpath(path))
    with tempfile.TemporaryDirectory(prefix=".mlflow-", dir=target.parent) as folder:
        partial = Path(folder, "partial.db")
        _open_store(f"sqlite:///{partial}", artifact_root(path))
        if target.exists() and not target.stat().st_size:
            target.unlink()
        # Not os.replace: on a file system without locks another machine may have made one meanwhile, and filled it.
        try:
            os.link(partial, target)
        except FileExistsError:
            return
        except OSError:
            # No hard links there (FAT, some shares).
            if not target.exists():
                os.replace(partial, target)


def _open_store(uri: str, artifacts: Path) -> None:
    """Create the tables where there are none, and check the version of the schema."""
    import sqlalchemy

    mlflow = mlflow_module()
    try:
        store = mlflow_module("mlflow.store.tracking.sqlalchemy_store").SqlAlchemyStore(uri, str(artifacts))
        # Clients make their own connections.
        store.engine.dispose()
    except (mlflow.exceptions.MlflowException, sqlalchemy.exc.SQLAlchemyError, _alembic_error()) as error:
        raise UserError(
            f"tracking database {shown(uri)} does not fit MLflow {mlflow.__version__} ({one_line(error)}): "
            f"back it up and run `mlflow db upgrade {shown(uri)}`, or use another"
        ) from error


def _alembic_error() -> type[Exception]:
    from alembic.util import CommandError

    return CommandError


def artifact_root(database: Path) -> Path:
    """Folder of the artifacts of an SQLite database: beside it, wherever a command is started."""
    return database.parent / "mlruns"


def _check_server(uri: str) -> None:
    mlflow = mlflow_module()
    advice = "start it (`mlflow server`), correct MLFLOW_TRACKING_URI, or unset it to use ./mlflow.db"
    try:
        request = urllib.request.Request(re.sub(r"//[^/@]*@", "//", uri).rstrip("/") + "/health")
        with urllib.request.urlopen(request, timeout=HEALTH_TIMEOUT_S):
            pass
    except urllib.error.HTTPError:
        # Somebody answers. Some proxies do not pass /health on, or want a login first: the call below decides.
        pass
    except (OSError, ValueError) as error:
        reason = getattr(error, "reason", None) or error
        raise UserError(f"tracking server {shown(uri)} is not reachable ({one_line(reason)}): {advice}") from error
    try:
        mlflow.MlflowClient(tracking_uri=uri).search_experiments(max_results=1)
    except Exception as error:
        # Whatever a stranger on this port sends back: JSON or not, the message is the same.
        raise UserError(
            f"tracking server {shown(uri)} does not answer as MLflow does ({one_line(error)}): {advice}"
        ) from error


def _check_database(uri: str) -> None:
    import sqlalchemy

    # Once and with a bound on the wait, since MLflow itself retries ten times over two minutes.
    arguments = {"connect_timeout": int(HEALTH_TIMEOUT_S)} if not uri.startswith("mssql") else {}
    try:
        engine = sqlalchemy.create_engine(uri, connect_args=arguments)
        with engine.connect():
            pass
        engine.dispose()
    except (sqlalchemy.exc.SQLAlchemyError, ImportError) as error:
        raise UserError(
            f"tracking database {shown(uri)} is not reachable ({one_line(error)}): "
            "start it or correct MLFLOW_TRACKING_URI"
        ) from error
    _open_store(uri, Path("mlruns"))


def one_line(error: object, limit: int = 300) -> str:
    """The message of `error` in one line of bounded length."""
    text = " ".join(str(error).split()) or type(error).__name__
    text = re.sub(r"^\([\w.]+\) ", "", text.split(" [SQL:")[0].split(" (Background on this error")[0])
    return text if len(text) <= limit else text[: limit - 3] + "..."


@contextlib.contextmanager
def doing(what: str) -> Iterator[None]:
    """Turn whatever MLflow, its database or its server throws into a TrackingError of one line.

    Interrupts wait for its end: a transaction that they cut off would keep a SQLite database locked.
    """
    import sqlalchemy

    exceptions = mlflow_module().exceptions
    with held_back():
        try:
            yield
        except UserError:
            raise
        except (exceptions.MlflowException, sqlalchemy.exc.SQLAlchemyError, OSError) as error:
            raise TrackingError(f"MLflow at {shown(tracking_uri())}: cannot {what}: {one_line(error)}") from error
