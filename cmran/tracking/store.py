"""The tracking store: where it is, whether it can be used, and its errors in one line.

MLflow takes over a second to import, so it is loaded by the first call that needs it, not with this module.
"""

import contextlib
import fcntl
import importlib
import logging
import os
import re
import shlex
import sqlite3
import ssl
import tempfile
import threading
from collections.abc import Iterator
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import TYPE_CHECKING, Any
from urllib.parse import unquote

from cmran.errors import CmranError, TrackingError
from cmran.tracking.artifacts import ROOT, find_beside
from cmran.utils.files import ensure_home, file_lock, lock_fault
from cmran.utils.signals import defer_signals
from cmran.utils.uris import absolute_sqlite_uri, has_bare_special_characters, redact, sqlite_path, sqlite_uri

if TYPE_CHECKING:
    from mlflow import MlflowClient

log = logging.getLogger(__name__)

HEALTH_TIMEOUT_S = 5.0
"""How long a tracking server or database may take to say that it is there."""

ANSWER_TIMEOUT_S = 30.0
"""How long a server that is there may take for its first answer."""

TRACKING_VARIABLE, REGISTRY_VARIABLE = "MLFLOW_TRACKING_URI", "MLFLOW_REGISTRY_URI"


def tracking_uri() -> str:
    """URI of the tracking store: $MLFLOW_TRACKING_URI, else `mlflow.db` (SQLite) in the current folder.

    A relative SQLite path is made absolute, so that a later change of folder moves nothing.
    """
    return absolute_sqlite_uri(os.environ.get(TRACKING_VARIABLE, "").strip() or "sqlite:///mlflow.db")


def shown_tracking_uri() -> str:
    """`tracking_uri` without passwords, for messages and files."""
    return redact(tracking_uri())


def registry_uri() -> str | None:
    """URI of the model registry where it is kept apart: $MLFLOW_REGISTRY_URI; None: in the tracking store."""
    uri = absolute_sqlite_uri(os.environ.get(REGISTRY_VARIABLE, "").strip())
    return None if uri in ("", tracking_uri()) else uri


def adopt_run() -> str | None:
    """The run that `mlflow run` opened for this process, taken out of the environment; None without one.

    Call it once where a command starts, then `check_adopted_run`. Left in the environment, the id would be taken up
    again by the first run that any child process starts.
    """
    run_id = os.environ.pop("MLFLOW_RUN_ID", "").strip() or None
    for name in ("MLFLOW_EXPERIMENT_ID", "MLFLOW_EXPERIMENT_NAME"):
        if os.environ.pop(name, "").strip() and run_id is None:
            log.info("%s is not used: every job has an experiment of its own, such as cmran-full", name)
    return run_id


_connecting = threading.RLock()
_connected: set[tuple[str, str, bool]] = set()
# Variable, URI, and whether it was opened for writing.
_defaults: set[str] = set()
# Tracking URIs that nobody has set: MLflow puts them into the environment all the same.


def connect(*, create: bool = True) -> str:
    """Make sure that the tracking store is there and usable; returns its URI. Cheap after the first call.

    A new SQLite database is created once, however many processes ask at the same time; with `create` false, for one
    who only reads, there must be one, and nothing is written.

    Raises CmranError (one line): a folder store (`./mlruns`), a database that cannot be written, is no database or has
    another schema version, a server that does not answer within seconds.
    """
    uri = tracking_uri()
    with _connecting:
        if not os.environ.get(TRACKING_VARIABLE, "").strip():
            _defaults.add(uri)
        mlflow = mlflow_module()
        _check(_Store(uri, TRACKING_VARIABLE), create=create)
        if mlflow.get_tracking_uri() != uri:
            mlflow.set_tracking_uri(uri)
        find_beside(sqlite_path(uri))
    return uri


def connect_registry(*, create: bool = True) -> str:
    """`connect`, and the same for the model registry where MLFLOW_REGISTRY_URI names another; returns its URI."""
    uri = connect(create=create)
    with _connecting:
        own = registry_uri()
        if own is not None:
            _check(_Store(own, REGISTRY_VARIABLE), create=create)
        # For MLflow's own functions, which know no other way; it does not look at the environment again.
        mlflow_module().set_registry_uri(own or "")
    return own or uri


@dataclass(frozen=True)
class _Store:
    """A tracking store or registry, and the variable that names it."""

    uri: str
    variable: str

    @property
    def what(self) -> str:
        """As it is called in messages."""
        return "tracking" if self.variable == TRACKING_VARIABLE else "model registry"

    @property
    def origin(self) -> str:
        """Where the URI comes from."""
        return f"the default without {self.variable}" if self.uri in _defaults else self.variable

    def named(self, kind: str) -> str:
        """ "tracking database FILE (from ...)" for messages."""
        path = sqlite_path(self.uri)
        return f"{self.what} {kind} {redact(self.uri) if path is None else path} ({self.origin})"


def _check(store: _Store, *, create: bool) -> None:
    """Raises CmranError unless the store is there and usable. Cheap after the first call."""
    uri, path = store.uri, sqlite_path(store.uri)
    known = {(store.variable, uri, True), (store.variable, uri, create)} & _connected
    if known and (path is None or path.exists()):
        return
    if path is not None:
        _remove_undecoded_folder(os.environ.get(store.variable, ""))
        _prepare_sqlite(store, path, create=create)
    elif uri.startswith("sqlite"):
        raise CmranError(f"{store.variable}={redact(uri)}: give a SQLite file, as in sqlite:////folder/mlflow.db")
    elif has_bare_special_characters(uri):
        raise CmranError(
            f"{store.variable}: its user name or password holds a character that ends it too early: percent-encode it "
            "(@ as %40, : as %3A, / as %2F, # as %23, ? as %3F)"
        )
    elif uri.startswith(("http://", "https://")):
        _check_server(store)
    elif re.match(r"(postgresql|mysql|mssql)(\+\w+)?://", uri):
        _check_database(store)
    elif uri.startswith("file:") or ("://" not in uri and uri not in ("databricks", "databricks-uc", "uc")):
        raise CmranError(
            f"{store.variable} is the folder {uri!r}, which MLflow no longer supports: "
            "use sqlite:///mlflow.db, a database or an http(s) server"
        )
    _connected.add((store.variable, uri, create))


def mlflow_module(module: str = "mlflow") -> Any:
    """The package or one of its modules. Untyped: MLflow is marked as typed, but much of it is not."""
    _settle()
    return importlib.import_module(module)


@cache
def _settle() -> None:
    # Before the import: MLflow reads some of these when it is loaded, and the home folder.
    ensure_home()
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


def connected_client(*, create: bool = False, registry: bool = False) -> "MlflowClient":
    """A client of the tracking store, and of the registry if asked for, after `connect` or `connect_registry`."""
    uri = connect(create=create)
    models = connect_registry(create=create) if registry else None
    client: MlflowClient = mlflow_module().MlflowClient(tracking_uri=uri, registry_uri=models)
    return client


def stores() -> str:
    """ "MLflow at URI", with the registry where that is another, for messages."""
    own = registry_uri()
    registry = "" if own is None else f", registry {redact(own)} ({REGISTRY_VARIABLE})"
    return f"MLflow at {shown_tracking_uri()}{registry}"


def _remove_undecoded_folder(uri: str) -> None:
    """Remove the empty folders that MLflow makes for the parents of a SQLite URI before it decodes the URI.

    `mlflow run` in `my proj` sets `sqlite:////.../my%20proj/mlflow.db` and so leaves a folder `my%20proj`.
    """
    path = sqlite_path(uri)
    literal = re.sub(r"^sqlite(\+\w+)?:///", "", uri).partition("?")[0]
    if path is None or literal == str(path):
        return
    for folder in Path(literal).absolute().parents:
        if unquote(str(folder)) == str(folder):
            return
        try:
            folder.rmdir()
        except OSError:
            # Not empty: somebody's own.
            return


def _prepare_sqlite(store: _Store, path: Path, *, create: bool) -> None:
    where = store.named("database")
    advice = f"choose another with {store.variable}=sqlite:////folder/mlflow.db"
    if path.is_dir():
        raise CmranError(f"{where} is a folder: {advice}")
    try:
        if not create:
            _read_sqlite(store, path, where)
            return
        path.parent.mkdir(parents=True, exist_ok=True)
        lock = path.with_name(path.name + ".lock")
        lock.touch()
        if fault := lock_fault(lock, fcntl.lockf):
            raise CmranError(f"{where}: its file system has no locks ({fault}), which SQLite needs: {advice}")
        with file_lock(lock):
            if path.exists() and path.stat().st_size:
                with contextlib.closing(sqlite3.connect(path, timeout=20.0)) as connection:
                    # Fails on a file that is no database or cannot be written. MLflow itself retries for two minutes.
                    connection.execute("BEGIN IMMEDIATE")
                    connection.execute("SELECT count(*) FROM sqlite_master")
                    connection.rollback()
                _open_store(store, store.uri, artifact_root(path))
            else:
                _make_sqlite(store, path)
    except OSError as error:
        raise CmranError(f"{where} cannot be made: {error.strerror or error}: {advice}") from error
    except sqlite3.Error as error:
        raise CmranError(f"{where} cannot be used: {error}: {advice}") from error


def _read_sqlite(store: _Store, path: Path, where: str) -> None:
    advice = f"work in the folder that holds it, or set {store.variable} to sqlite:////folder/mlflow.db or a server"
    if not path.exists() or not path.stat().st_size:
        raise CmranError(f"there is no {where}: {advice}")
    # Without write access: a reader leaves a file that is none of MLflow's as it is.
    with contextlib.closing(sqlite3.connect(f"{path.absolute().as_uri()}?mode=ro", uri=True, timeout=20.0)) as database:
        tables = {name for (name,) in database.execute("SELECT name FROM sqlite_master")}
    if not {"alembic_version", "experiments"} <= tables:
        raise CmranError(f"{where} holds no MLflow tables: {advice}")
    _open_store(store, store.uri, artifact_root(path))


def _make_sqlite(store: _Store, path: Path) -> None:
    """A new database, under its name only when it is whole: a half-made one could not be repaired."""
    target = Path(os.path.realpath(path))
    with tempfile.TemporaryDirectory(prefix=".mlflow-", dir=target.parent) as folder:
        partial = Path(folder, "partial.db")
        _open_store(store, sqlite_uri(partial), artifact_root(path))
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


def _open_store(store: _Store, uri: str, artifacts: Path | None) -> None:
    """Create the tables where there are none, and check the version of the schema."""
    import sqlalchemy

    mlflow = mlflow_module()
    # As a URI: MLflow would decode percent signs of a plain path.
    root = "mlruns" if artifacts is None else artifacts.absolute().as_uri()
    try:
        opened = mlflow_module("mlflow.store.tracking.sqlalchemy_store").SqlAlchemyStore(uri, root)
        # Clients make their own connections.
        opened.engine.dispose()
    except (mlflow.exceptions.MlflowException, sqlalchemy.exc.SQLAlchemyError, _alembic_error()) as error:
        raise CmranError(
            f"{store.named('database')} does not fit MLflow {mlflow.__version__} ({one_line(error)}): "
            f"back it up and run `mlflow db upgrade {shlex.quote(redact(uri))}`, or use another"
        ) from error


def _alembic_error() -> type[Exception]:
    from alembic.util import CommandError

    return CommandError


def artifact_root(database: Path) -> Path:
    """Folder of the artifacts of an SQLite database: beside it, wherever a command is started."""
    return database.parent / ROOT


def _check_server(store: _Store) -> None:
    """By MLflow's own client: it knows the certificates, logins and proxies that MLflow's variables name."""
    where = store.named("server")
    advice = f"start it (`mlflow server`), correct {store.variable}, or unset it"
    advice += " to use ./mlflow.db" if store.variable == TRACKING_VARIABLE else " to use the tracking store's registry"
    rest, credentials = mlflow_module("mlflow.utils.rest_utils"), mlflow_module("mlflow.utils.credentials")
    creds = credentials.get_default_host_creds(store.uri)
    once = {"max_retries": 0, "raise_on_status": False}
    try:
        # Whatever the status: some proxies do not pass /health on, or want a login first. The call below decides.
        rest.http_request(creds, "/health", "GET", timeout=HEALTH_TIMEOUT_S, **once)
    except Exception as error:
        # requests, urllib3, ssl and MLflow each have errors of their own.
        reason = _innermost(error)
        if isinstance(reason, ssl.SSLError):
            advice = "name the certificate of its CA in MLFLOW_TRACKING_SERVER_CERT_PATH; otherwise " + advice
        raise CmranError(f"{where} is not reachable ({one_line(reason)}): {advice}") from error
    path = "experiments" if store.variable == TRACKING_VARIABLE else "registered-models"
    endpoint, method = f"/api/2.0/mlflow/{path}/search", "POST" if path == "experiments" else "GET"
    query = {"json": {"max_results": 1}} if method == "POST" else {"params": {"max_results": 1}}
    try:
        answer = rest.http_request(creds, endpoint, method, timeout=ANSWER_TIMEOUT_S, **once, **query)
        if answer.status_code in (401, 403):
            raise CmranError(
                f"{where} refuses the login (HTTP {answer.status_code}): "
                "set MLFLOW_TRACKING_USERNAME and MLFLOW_TRACKING_PASSWORD, or MLFLOW_TRACKING_TOKEN"
            )
        rest.verify_rest_response(answer, endpoint)
    except CmranError:
        raise
    except Exception as error:
        # Whatever a stranger on this port sends back: JSON or not, the message is the same.
        reason = _innermost(error)
        raise CmranError(f"{where} does not answer as MLflow does ({one_line(reason)}): {advice}") from error


def _innermost(error: BaseException) -> BaseException:
    """The error at the bottom of those that the libraries of the network put around each other."""
    seen = {id(error)}
    while True:
        inside = [error.__cause__, error.__context__, getattr(error, "reason", None), *error.args]
        below = next((one for one in inside if isinstance(one, BaseException) and id(one) not in seen), None)
        if below is None:
            return error
        seen.add(id(below))
        error = below


def _check_database(store: _Store) -> None:
    import sqlalchemy

    # Once and with a bound on the wait, since MLflow itself retries ten times over two minutes.
    arguments = {"connect_timeout": int(HEALTH_TIMEOUT_S)} if not store.uri.startswith("mssql") else {}
    try:
        engine = sqlalchemy.create_engine(store.uri, connect_args=arguments)
        with engine.connect():
            pass
        engine.dispose()
    except (sqlalchemy.exc.SQLAlchemyError, ImportError, ValueError) as error:
        raise CmranError(
            f"{store.named('database')} is not reachable ({one_line(error)}): start it or correct {store.variable}"
        ) from error
    _open_store(store, store.uri, None)


def one_line(error: object, limit: int = 300) -> str:
    """The message of `error` in one line of bounded length."""
    text = " ".join(redact(str(error)).split()) or type(error).__name__
    text = re.sub(r"^\([\w.]+\) ", "", text.split(" [SQL:")[0].split(" (Background on this error")[0])
    return text if len(text) <= limit else text[: limit - 3] + "..."


@contextlib.contextmanager
def tracking_errors(what: str) -> Iterator[None]:
    """Turn whatever MLflow, its database or its server throws into a TrackingError of one line.

    Interrupts wait for its end: a transaction that they cut off would keep a SQLite database locked.
    """
    import sqlalchemy

    exceptions = mlflow_module().exceptions
    with defer_signals():
        try:
            yield
        except CmranError:
            raise
        except (exceptions.MlflowException, sqlalchemy.exc.SQLAlchemyError, OSError) as error:
            raise TrackingError(f"{stores()}: cannot {what}: {one_line(error)}") from error
