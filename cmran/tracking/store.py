"""The tracking store: its URI, the check that it can be used, and its errors in one line.

MLflow takes over a second to import, so the first call that needs it imports it, not this module.
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

from cmran.errors import CmranError, ConfigError, TrackingError
from cmran.tracking.artifacts import ARTIFACT_FOLDER, set_database
from cmran.utils.files import ensure_home
from cmran.utils.signals import defer_signals
from cmran.utils.uris import absolute_sqlite_uri, has_bare_special_characters, redact, sqlite_path, sqlite_uri

if TYPE_CHECKING:
    from mlflow import MlflowClient

log = logging.getLogger(__name__)

SERVER_TIMEOUT_S = 10.0
"""Longest wait for the first answer of a tracking server or database."""

TRACKING_VARIABLE, REGISTRY_VARIABLE = "MLFLOW_TRACKING_URI", "MLFLOW_REGISTRY_URI"


def tracking_uri() -> str:
    """Return the URI of the tracking store: $MLFLOW_TRACKING_URI, or `mlflow.db` (SQLite) in the current folder.

    A relative SQLite path becomes absolute, so that a later change of the current folder has no effect.
    """
    return absolute_sqlite_uri(os.environ.get(TRACKING_VARIABLE, "").strip() or "sqlite:///mlflow.db")


def shown_tracking_uri() -> str:
    """Return `tracking_uri` without passwords, for messages and files."""
    return redact(tracking_uri())


def registry_uri() -> str | None:
    """Return the URI of a separate model registry ($MLFLOW_REGISTRY_URI); None if the tracking store contains it."""
    uri = absolute_sqlite_uri(os.environ.get(REGISTRY_VARIABLE, "").strip())
    return None if uri in ("", tracking_uri()) else uri


def adopt_run() -> str | None:
    """Return the id of the run that `mlflow run` opened for this process, or None, and remove it from the environment.

    Call it once when a command starts, and then `check_adopted_run`. If the id stayed in the environment, the first run
    that a child process starts would use it again.
    """
    run_id = os.environ.pop("MLFLOW_RUN_ID", "").strip() or None
    for name in ("MLFLOW_EXPERIMENT_ID", "MLFLOW_EXPERIMENT_NAME"):
        if os.environ.pop(name, "").strip() and run_id is None:
            log.info("ignoring %s: every job has its own experiment, such as cmran-full", name)
    return run_id


@dataclass(frozen=True)
class _Store:
    """A tracking store or model registry."""

    uri: str
    """Its URI."""
    variable: str
    """The environment variable that names it."""

    def described(self, kind: str) -> str:
        """Return "tracking database FILE (from ...)" for messages."""
        role = "tracking" if self.variable == TRACKING_VARIABLE else "model registry"
        path = sqlite_path(self.uri)
        origin = f"the default without {self.variable}" if self.uri in _defaults else self.variable
        return f"{role} {kind} {redact(self.uri) if path is None else path} ({origin})"


_connecting = threading.RLock()
_connected: set[tuple[_Store, bool]] = set()
"""Stores that were checked, and whether they were opened for writing."""
_defaults: set[str] = set()
"""Default tracking URIs. MLflow writes them to the environment, where they look like the user's choice."""


def connect(*, create: bool = True) -> str:
    """Check that the tracking store can be used, and create a missing SQLite database. Later calls are cheap.

    Several processes that connect at the same time create the database once.

    Args:
        create: Whether a missing database is created. False suits a reader: nothing is written.

    Returns:
        The URI of the store.

    Raises:
        ConfigError: $MLFLOW_TRACKING_URI is unusable, such as a folder store (`./mlruns`).
        TrackingError: The database is missing, cannot be written, is not a database or has another schema version, or
            the server does not answer within seconds.
    """
    uri = tracking_uri()
    with _connecting:
        if not os.environ.get(TRACKING_VARIABLE, "").strip():
            _defaults.add(uri)
        mlflow = mlflow_module()
        _check(_Store(uri, TRACKING_VARIABLE), create=create)
        if mlflow.get_tracking_uri() != uri:
            mlflow.set_tracking_uri(uri)
        set_database(sqlite_path(uri))
    return uri


def connect_registry(*, create: bool = True) -> str:
    """Check the tracking store and, if $MLFLOW_REGISTRY_URI names another store, the model registry.

    Args and exceptions are those of `connect`.

    Returns:
        The URI of the registry.
    """
    uri = connect(create=create)
    with _connecting:
        registry = registry_uri()
        if registry is not None:
            _check(_Store(registry, REGISTRY_VARIABLE), create=create)
        # MLflow's own functions need it, and do not read the environment again.
        mlflow_module().set_registry_uri(registry or "")
    return registry or uri


def _check(store: _Store, *, create: bool) -> None:
    """Raise ConfigError or TrackingError unless the store can be used."""
    uri, path = store.uri, sqlite_path(store.uri)
    checked = (store, True) in _connected or (store, create) in _connected
    if checked and (path is None or path.exists()):
        return
    if path is not None:
        _remove_undecoded_folder(os.environ.get(store.variable, ""))
        _check_sqlite(store, path, create=create)
    elif uri.startswith("sqlite"):
        raise ConfigError(
            f"{store.variable}={redact(uri)} does not name a file",
            "give a SQLite file, as in sqlite:////folder/mlflow.db",
        )
    elif has_bare_special_characters(uri):
        raise ConfigError(
            f"{store.variable}: its user name or password contains an unencoded special character",
            "percent-encode it (@ as %40, : as %3A, / as %2F, # as %23, ? as %3F)",
        )
    elif uri.startswith(("http://", "https://")):
        _check_server(store)
    elif re.match(r"(postgresql|mysql|mssql)(\+\w+)?://", uri):
        _check_database(store)
    elif uri.startswith("file:") or ("://" not in uri and uri not in ("databricks", "databricks-uc", "uc")):
        raise ConfigError(
            f"{store.variable} is the folder {uri!r}, which MLflow no longer supports",
            "use sqlite:///mlflow.db, a database or an http(s) server",
        )
    _connected.add((store, create))


def mlflow_module(module: str = "mlflow") -> Any:
    """Import MLflow or one of its modules. Untyped: MLflow is marked as typed, but much of it is not."""
    _configure_mlflow()
    return importlib.import_module(module)


@cache
def _configure_mlflow() -> None:
    """Import MLflow with this project's defaults. It reads the home folder and some variables when it is imported."""
    ensure_home()
    os.environ.setdefault("MLFLOW_DISABLE_TELEMETRY", "true")
    os.environ.setdefault("DO_NOT_TRACK", "true")
    # MLflow's defaults (7 retries of up to 120 s) delay the report of a lost server by minutes.
    os.environ.setdefault("MLFLOW_HTTP_REQUEST_MAX_RETRIES", "3")
    os.environ.setdefault("MLFLOW_HTTP_REQUEST_BACKOFF_FACTOR", "1")
    os.environ.setdefault("MLFLOW_HTTP_REQUEST_TIMEOUT", "30")
    os.environ.setdefault("MLFLOW_ENABLE_ARTIFACTS_PROGRESS_BAR", "false")
    # Stdout is reserved for the result of a command.
    os.environ.setdefault("MLFLOW_SUPPRESS_PRINTING_URL_TO_STDOUT", "true")
    # The import configures MLflow's loggers, so their levels are set afterwards.
    importlib.import_module("mlflow")
    for name in ("mlflow", "alembic"):
        logging.getLogger(name).setLevel(logging.WARNING)
    # It logs a traceback for every database error, which the caller gets as an exception of one line.
    logging.getLogger("mlflow.store.db.utils").setLevel(logging.CRITICAL)


def connected_client(*, create: bool = False, registry: bool = False) -> "MlflowClient":
    """Connect, and return a client of the tracking store.

    Args:
        create: As for `connect`.
        registry: Whether the client is also used for the model registry, which is then checked too.
    """
    uri = connect(create=create)
    models = connect_registry(create=create) if registry else None
    client: MlflowClient = mlflow_module().MlflowClient(tracking_uri=uri, registry_uri=models)
    return client


def stores_text() -> str:
    """Return "MLflow at URI" for messages, with the registry if it is separate."""
    registry = registry_uri()
    suffix = "" if registry is None else f", registry {redact(registry)} ({REGISTRY_VARIABLE})"
    return f"MLflow at {shown_tracking_uri()}{suffix}"


def _remove_undecoded_folder(uri: str) -> None:
    """Remove the empty folders that MLflow creates for the parents of a SQLite URI before it decodes the URI.

    `mlflow run` in the folder `my proj` sets `sqlite:////.../my%20proj/mlflow.db` and leaves a folder `my%20proj`.
    """
    undecoded = Path(re.sub(r"^sqlite(\+\w+)?:///", "", uri).partition("?")[0])
    for folder in undecoded.absolute().parents:
        if unquote(str(folder)) == str(folder):
            return
        try:
            folder.rmdir()
        except OSError:
            # It is missing, or it is not empty and therefore a folder of the user.
            return


def _check_sqlite(store: _Store, path: Path, *, create: bool) -> None:
    """Check a SQLite database; create a missing one if `create`."""
    where = store.described("database")
    hint = f"choose another with {store.variable}=sqlite:////folder/mlflow.db"
    if path.is_dir():
        raise TrackingError(f"{where} is a folder", hint)
    try:
        if not create:
            hint = f"work in the folder that contains it, or set {store.variable} to its URI or to that of a server"
            if not _has_content(path):
                raise TrackingError(f"there is no {where}", hint)
            if not {"alembic_version", "experiments"} <= _probe_sqlite(path, "ro"):
                raise TrackingError(f"{where} contains no MLflow tables", hint)
            _open_store(store, store.uri, artifact_root(path))
            return
        path.parent.mkdir(parents=True, exist_ok=True)
        with path.with_name(path.name + ".lock").open("a") as lock:
            # SQLite uses the same kind of lock, so another machine that shares the file system waits, too.
            try:
                fcntl.lockf(lock, fcntl.LOCK_EX)
            except OSError as error:
                raise TrackingError(
                    f"{where}: its file system has no locks ({error.strerror}), which SQLite needs", hint
                ) from error
            if _has_content(path):
                _probe_sqlite(path, "rw")
                _open_store(store, store.uri, artifact_root(path))
            else:
                _create_sqlite(store, path)
    except OSError as error:
        raise TrackingError(f"{where} cannot be created: {error.strerror or error}", hint) from error
    except sqlite3.Error as error:
        raise TrackingError(f"{where} cannot be used: {error}", hint) from error


def _has_content(path: Path) -> bool:
    return path.exists() and path.stat().st_size > 0


def _probe_sqlite(path: Path, mode: str) -> set[str]:
    """Return the table names of a database; raise sqlite3.Error at once, whereas MLflow retries for two minutes.

    With the mode "ro" the file is not changed; "rw" also checks that it can be written.
    """
    uri = f"{path.absolute().as_uri()}?mode={mode}"
    with contextlib.closing(sqlite3.connect(uri, uri=True, timeout=20.0)) as connection:
        if mode == "rw":
            connection.execute("BEGIN IMMEDIATE")
        return {name for (name,) in connection.execute("SELECT name FROM sqlite_master")}


def _create_sqlite(store: _Store, path: Path) -> None:
    """Create a database under a temporary name and rename it: an incomplete one cannot be repaired."""
    target = Path(os.path.realpath(path))
    with tempfile.TemporaryDirectory(prefix=".mlflow-", dir=target.parent) as folder:
        partial = Path(folder, "partial.db")
        _open_store(store, sqlite_uri(partial), artifact_root(path))
        os.replace(partial, target)


def _open_store(store: _Store, uri: str, artifacts: Path | None) -> None:
    """Create missing tables and check the version of the schema."""
    import sqlalchemy
    from alembic.util import CommandError

    mlflow = mlflow_module()
    # A URI, because MLflow decodes the percent signs of a plain path.
    root = ARTIFACT_FOLDER if artifacts is None else artifacts.absolute().as_uri()
    try:
        opened = mlflow_module("mlflow.store.tracking.sqlalchemy_store").SqlAlchemyStore(uri, root)
        # Clients open their own connections.
        opened.engine.dispose()
    except (mlflow.exceptions.MlflowException, sqlalchemy.exc.SQLAlchemyError, CommandError) as error:
        raise TrackingError(
            f"{store.described('database')} does not fit MLflow {mlflow.__version__} ({one_line(error)})",
            f"back it up and run `mlflow db upgrade {shlex.quote(redact(uri))}`, or use another",
        ) from error


def artifact_root(database: Path) -> Path:
    """Return the artifact folder of a SQLite database, which is beside it."""
    return database.parent / ARTIFACT_FOLDER


def _check_server(store: _Store) -> None:
    """Send one request by MLflow's own client, which knows the certificates, logins and proxies of its variables."""
    where = store.described("server")
    hint = f"start it (`mlflow server`), correct {store.variable}, or unset it to use "
    hint += "./mlflow.db" if store.variable == TRACKING_VARIABLE else "the tracking store's registry"
    rest = mlflow_module("mlflow.utils.rest_utils")
    credentials = mlflow_module("mlflow.utils.credentials").get_default_host_creds(store.uri)
    if store.variable == TRACKING_VARIABLE:
        method, endpoint, query = "POST", "/api/2.0/mlflow/experiments/search", {"json": {"max_results": 1}}
    else:
        method, endpoint, query = "GET", "/api/2.0/mlflow/registered-models/search", {"params": {"max_results": 1}}
    options = {"timeout": SERVER_TIMEOUT_S, "max_retries": 0, "raise_on_status": False}
    try:
        answer = rest.http_request(credentials, endpoint, method, **options, **query)
    except Exception as error:
        # requests, urllib3, ssl and MLflow have unrelated exceptions.
        reason = _root_cause(error)
        if isinstance(reason, ssl.SSLError):
            hint = f"name the certificate of its CA in MLFLOW_TRACKING_SERVER_CERT_PATH; otherwise {hint}"
        raise TrackingError(f"{where} is not reachable ({one_line(reason)})", hint) from error
    if answer.status_code in (401, 403):
        raise TrackingError(
            f"{where} rejects the login (HTTP {answer.status_code})",
            "set MLFLOW_TRACKING_USERNAME and MLFLOW_TRACKING_PASSWORD, or MLFLOW_TRACKING_TOKEN",
        )
    try:
        rest.verify_rest_response(answer, endpoint)
    except Exception as error:
        # Another program may listen on this port and send anything.
        raise TrackingError(f"{where} does not answer like MLflow ({one_line(_root_cause(error))})", hint) from error


def _root_cause(error: BaseException) -> BaseException:
    """Return the innermost of the nested exceptions of the network libraries."""
    seen = {id(error)}
    while True:
        nested = [error.__cause__, error.__context__, getattr(error, "reason", None), *error.args]
        cause = next((one for one in nested if isinstance(one, BaseException) and id(one) not in seen), None)
        if cause is None:
            return error
        seen.add(id(cause))
        error = cause


def _check_database(store: _Store) -> None:
    """Connect to a database server once, with a timeout; MLflow itself retries ten times within two minutes."""
    import sqlalchemy

    arguments = {"connect_timeout": int(SERVER_TIMEOUT_S)} if not store.uri.startswith("mssql") else {}
    try:
        engine = sqlalchemy.create_engine(store.uri, connect_args=arguments)
        with engine.connect():
            pass
        engine.dispose()
    except (sqlalchemy.exc.SQLAlchemyError, ImportError, ValueError) as error:
        raise TrackingError(
            f"{store.described('database')} is not reachable ({one_line(error)})",
            f"start it or correct {store.variable}",
        ) from error
    _open_store(store, store.uri, None)


def one_line(error: object, limit: int = 300) -> str:
    """Return the message of `error` in one line of at most `limit` characters, without passwords."""
    text = " ".join(redact(str(error)).split()) or type(error).__name__
    text = re.sub(r"^\([\w.]+\) ", "", text.split(" [SQL:")[0].split(" (Background on this error")[0])
    return text if len(text) <= limit else text[: limit - 3] + "..."


@contextlib.contextmanager
def tracking_errors(action: str) -> Iterator[None]:
    """Raise the errors of MLflow, its database and its server as a TrackingError "cannot ACTION: ..." of one line.

    Interrupts wait until the end of the block: an interrupted transaction would keep a SQLite database locked.
    """
    import sqlalchemy

    exceptions = mlflow_module().exceptions
    with defer_signals():
        try:
            yield
        except CmranError:
            raise
        except (exceptions.MlflowException, sqlalchemy.exc.SQLAlchemyError, OSError) as error:
            raise TrackingError(f"{stores_text()}: cannot {action}: {one_line(error)}") from error
