"""Fixtures of the tests of jobs, command and flows: a tiny folder, settings for it, and a Prefect server."""

import os
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
import yaml

from cmran.config import Mode
from flows.jobs.train import TrainParameters
from tests.cmran.tiny import tiny_config
from tests.conftest import ROOT
from tests.helpers import make_folder


@pytest.fixture(scope="session")
def data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_folder(tmp_path_factory.mktemp("flows") / "data", videos=16)


@pytest.fixture(scope="session")
def tiny(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A settings file for this folder, for both modes."""
    config = tiny_config().model_dump(mode="json", exclude={"recipe": True, "model": {"mode"}})
    path = tmp_path_factory.mktemp("settings") / "tiny.yaml"
    path.write_text(yaml.safe_dump(config))
    return path


@pytest.fixture
def training(data: Path, tiny: Path, tmp_path: Path) -> Callable[..., TrainParameters]:
    """Parameters of a training that takes a second."""

    def make(mode: Mode = "full", **changes: object) -> TrainParameters:
        values = {"data": data, "mode": mode, "config": tiny, "out": tmp_path / "run", "device": "cpu"}
        return TrainParameters(**(values | changes))

    return make


@pytest.fixture
def cmran(tmp_path: Path) -> Callable[..., subprocess.CompletedProcess[str]]:
    """The command in its own process, in the folder of the test."""

    def run(*arguments: object, **environment: str) -> subprocess.CompletedProcess[str]:
        return subprocess.run(
            [sys.executable, "-m", "flows", *map(str, arguments)],
            cwd=tmp_path,
            env={**os.environ, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1", **environment},
            capture_output=True,
            text=True,
            check=False,
            timeout=240,
        )

    return run


@pytest.fixture(scope="session")
def prefect(_own_cache: None) -> Iterator[None]:
    """One Prefect server for all tests of the session, in its own folder."""
    from prefect.settings import PREFECT_FLOWS_HEARTBEAT_FREQUENCY, temporary_settings
    from prefect.testing.utilities import prefect_test_harness

    with (
        prefect_test_harness(server_startup_timeout=120),
        temporary_settings({PREFECT_FLOWS_HEARTBEAT_FREQUENCY: None}),
    ):
        yield
