"""A tiny data folder, and a separate study storage, tracking database and output directory for each test."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import optuna
import pytest

from search import worker
from search.study import open_storage
from search.worker import SearchResult
from tests.cmran.tiny import tiny_config
from tests.helpers import make_folder
from tests.search.fake import FakeFit

Search = Callable[..., SearchResult]


@pytest.fixture(scope="session")
def data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_folder(tmp_path_factory.mktemp("data") / "folder")


@pytest.fixture
def storage(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> str:
    """A SQLite study storage for this test, set as CMRAN_STUDY_STORAGE."""
    url = f"sqlite:///{tmp_path}/studies.db"
    monkeypatch.setenv("CMRAN_STUDY_STORAGE", url)
    return url


@pytest.fixture
def fake(monkeypatch: pytest.MonkeyPatch) -> FakeFit:
    fit = FakeFit()
    monkeypatch.setattr("search.objective.fit", fit)
    return fit


@pytest.fixture
def figures() -> None:
    """Request this fixture to have `search` draw its figures; other tests skip them to save time."""


@pytest.fixture
def search(
    request: pytest.FixtureRequest,
    data: Path,
    storage: str,
    tracking_db: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> Search:
    """`search` on the tiny folder with tiny settings of four epochs, study "s", and trials in tmp_path/out."""
    monkeypatch.setenv("MLFLOW_ENABLE_SYSTEM_METRICS_LOGGING", "false")
    if "figures" not in request.fixturenames:
        monkeypatch.setattr("search.report._draw", lambda *arguments: None)

    def call(trials: int, **options: Any) -> SearchResult:
        options = {
            "mode": "full",
            "base": tiny_config(epochs=4),
            "study": "s",
            "out": tmp_path / "out",
            "device": "cpu",
        } | options
        return worker.search(data, trials=trials, **options)

    return call


def study(name: str = "s") -> optuna.Study:
    return optuna.load_study(study_name=name, storage=open_storage())


def client() -> Any:
    from mlflow import MlflowClient

    from cmran.tracking import tracking_uri

    return MlflowClient(tracking_uri=tracking_uri())


def run_of(trial: optuna.trial.FrozenTrial) -> Any:
    return client().get_run(trial.user_attrs["run_id"])
