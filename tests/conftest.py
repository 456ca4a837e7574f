"""What all tests share: where the real AVE files may lie, and a cache folder of their own."""

import contextlib
import shutil
import signal
import sqlite3
from collections.abc import Iterator
from pathlib import Path

import pytest

from cmran.utils.device import set_passive_openmp_waiting

# Before any test imports torch: other processes want the CPUs, too.
set_passive_openmp_waiting()

ROOT = Path(__file__).resolve().parent.parent
GOLDEN = ROOT / "tests" / "golden"


def pytest_configure() -> None:
    """A shell that starts the tests in the background has them ignore Ctrl-C, which some of them are about."""
    if signal.getsignal(signal.SIGINT) is signal.SIG_IGN:
        signal.signal(signal.SIGINT, signal.default_int_handler)


@pytest.fixture(autouse=True, scope="session")
def _own_cache(tmp_path_factory: pytest.TempPathFactory) -> Iterator[None]:
    """Tests never touch the user's cache, tracking database or Prefect home."""
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
    """Folder of the real AVE labels, splits and background audio; the test is skipped where it is absent."""
    folder = ROOT.parent / "shared" / "ave"
    if not (folder / "labels.h5").is_file():
        pytest.skip("the real AVE label files are not beside the project (../shared/ave)")
    return folder


@pytest.fixture(scope="session")
def _migrated_database(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A new MLflow database. Making one takes about a second; a copy takes none."""
    from cmran import tracking

    path = tmp_path_factory.mktemp("tracking") / "mlflow.db"
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("MLFLOW_TRACKING_URI", f"sqlite:///{path}")
        tracking.connect()
    return path


@pytest.fixture
def tracking_db(_migrated_database: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """An empty MLflow database of the test's own, set as MLFLOW_TRACKING_URI; artifacts lie beside it."""
    path = tmp_path / "mlflow.db"
    shutil.copyfile(_migrated_database, path)
    # A database holds absolute artifact paths: that of the default experiment still points to the first copy.
    with contextlib.closing(sqlite3.connect(path)) as connection, connection:
        connection.execute("UPDATE experiments SET artifact_location = ?", ((tmp_path / "mlruns" / "0").as_uri(),))
    monkeypatch.setenv("MLFLOW_TRACKING_URI", f"sqlite:///{path}")
    return path
