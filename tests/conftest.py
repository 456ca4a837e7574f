"""Fixtures of all tests: the real AVE files if they exist, a separate cache folder, an MLflow database."""

import contextlib
import shutil
import signal
import sqlite3
from collections.abc import Iterator
from pathlib import Path

import pytest

from cmran.utils.device import set_passive_openmp_waiting

# Before any test imports torch, because other processes need the CPUs, too.
set_passive_openmp_waiting()

ROOT = Path(__file__).resolve().parent.parent
GOLDEN = ROOT / "tests" / "golden"


def pytest_configure() -> None:
    """Restore the default handler of Ctrl-C, which some tests need and a background shell disables."""
    if signal.getsignal(signal.SIGINT) is signal.SIG_IGN:
        signal.signal(signal.SIGINT, signal.default_int_handler)


@pytest.fixture(autouse=True, scope="session")
def _own_cache(tmp_path_factory: pytest.TempPathFactory) -> Iterator[None]:
    """Separate the tests from the user's cache, tracking database and Prefect home."""
    patch = pytest.MonkeyPatch()
    home = tmp_path_factory.mktemp("home")
    patch.setenv("XDG_CACHE_HOME", str(home / "cache"))
    patch.setenv("PREFECT_HOME", str(home / "prefect"))
    patch.setenv("MLFLOW_DISABLE_TELEMETRY", "true")
    patch.setenv("DO_NOT_TRACK", "true")
    patch.setenv("PREFECT_SERVER_ANALYTICS_ENABLED", "false")
    for name in ("MLFLOW_TRACKING_URI", "MLFLOW_RUN_ID", "CMRAN_STUDY_STORAGE", "PREFECT_API_URL"):
        patch.delenv(name, raising=False)
    yield
    patch.undo()


@pytest.fixture(scope="session")
def ave() -> Path:
    """Folder of the real AVE labels, splits and background audio. The test is skipped if it does not exist."""
    folder = ROOT.parent / "shared" / "ave"
    if not (folder / "labels.h5").is_file():
        pytest.skip("the real AVE label files do not exist in ../shared/ave")
    return folder


@pytest.fixture(scope="session")
def _migrated_database(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A new MLflow database. Creating one takes about a second, so the tests copy it."""
    from cmran import tracking

    path = tmp_path_factory.mktemp("tracking") / "mlflow.db"
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("MLFLOW_TRACKING_URI", f"sqlite:///{path}")
        tracking.connect()
    return path


@pytest.fixture
def tracking_db(_migrated_database: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """An empty MLflow database for one test, set as MLFLOW_TRACKING_URI. Artifacts are stored beside it."""
    path = tmp_path / "mlflow.db"
    shutil.copyfile(_migrated_database, path)
    # The database contains absolute artifact paths; that of the default experiment points to the first copy.
    with contextlib.closing(sqlite3.connect(path)) as connection, connection:
        connection.execute("UPDATE experiments SET artifact_location = ?", ((tmp_path / "mlruns" / "0").as_uri(),))
    monkeypatch.setenv("MLFLOW_TRACKING_URI", f"sqlite:///{path}")
    return path
