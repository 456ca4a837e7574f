"""The deployments as a user runs them: a server, a work pool, workers, and the project installed without a checkout."""

import contextlib
import json
import os
import shutil
import socket
import subprocess
import sys
import time
import urllib.request
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path

import psutil
import pytest
import yaml

from tests.conftest import ROOT

pytestmark = [pytest.mark.slow, pytest.mark.timeout(1500)]

PACKAGES = ("cmran", "search", "serving", "flows")
PATIENCE_S = 600.0
"""Time limit of each wait, long enough for a busy machine."""


@dataclass(frozen=True, kw_only=True)
class Site:
    """The working environment of a user: an installed project, a folder and a server."""

    python: Path
    folder: Path
    environment: dict[str, str]

    def prefect(self, *arguments: str, cwd: Path | None = None) -> str:
        done = subprocess.run(
            [self.python, "-m", "prefect", *arguments],
            cwd=cwd or self.folder,
            env=self.environment,
            capture_output=True,
            text=True,
            check=False,
        )
        assert done.returncode == 0, done.stdout + done.stderr
        return done.stdout

    @contextlib.contextmanager
    def running(self, *arguments: str) -> Iterator[subprocess.Popen[bytes]]:
        """Run a Prefect command, with all its child processes, until the end of the block."""
        log = self.folder.parent / f"{'-'.join(arguments[:2])}.log"
        with log.open("ab") as stream:
            process = subprocess.Popen(
                [self.python, "-m", "prefect", *arguments],
                cwd=self.folder,
                env=self.environment,
                stdout=stream,
                stderr=stream,
                start_new_session=True,
            )
        try:
            yield process
        finally:
            kill_tree(process.pid)
            process.wait()

    def ask(self, path: str, body: object = None) -> object:
        """Send a request to the server, without the client settings of the test process."""
        request = urllib.request.Request(
            self.environment["PREFECT_API_URL"] + path,
            data=None if body is None else json.dumps(body).encode(),
            headers={"Content-Type": "application/json"},
        )
        with urllib.request.build_opener(urllib.request.ProxyHandler({})).open(request, timeout=60) as answer:
            return json.load(answer)

    def start(self, deployment: str, **parameters: object) -> str:
        """Create a flow run and return its id."""
        found = self.ask(f"/deployments/name/{deployment}")
        body = {"parameters": {"parameters": parameters}, "state": {"type": "SCHEDULED"}}
        return str(self.ask(f"/deployments/{found['id']}/create_flow_run", body)["id"])

    def run(self, run_id: str) -> dict:
        return dict(self.ask(f"/flow_runs/{run_id}"))

    def ended(self, run_id: str) -> dict:
        """Wait for the end of the run and return it."""
        return until(lambda: run if (run := self.run(run_id))["state_type"] in ENDED else None)

    def completed(self, *run_ids: str) -> list[dict]:
        runs = [self.ended(run_id) for run_id in run_ids]
        for run in runs:
            assert run["state_type"] == "COMPLETED", (run["name"], run["state"]["message"], self.log(run["id"]))
        return runs

    def log(self, run_id: str) -> str:
        lines = self.ask("/logs/filter", {"logs": {"flow_run_id": {"any_": [run_id]}}, "sort": "TIMESTAMP_ASC"})
        return "\n".join(line["message"] for line in lines)


ENDED = {"COMPLETED", "FAILED", "CRASHED", "CANCELLED"}


def until(ready: Callable[[], object]) -> object:
    deadline = time.monotonic() + PATIENCE_S
    while not (found := ready()):
        assert time.monotonic() < deadline, "nothing happened"
        time.sleep(0.5)
    return found


def kill_tree(pid: int) -> None:
    """Kill a process and all its children with SIGKILL."""
    with contextlib.suppress(psutil.NoSuchProcess):
        process = psutil.Process(pid)
        for one in [process, *process.children(recursive=True)]:
            with contextlib.suppress(psutil.NoSuchProcess):
                one.kill()


def free_port() -> int:
    with socket.create_server(("127.0.0.1", 0)) as listener:
        return listener.getsockname()[1]


@pytest.fixture(scope="module")
def sources(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A second checkout."""
    copy = tmp_path_factory.mktemp("checkout") / "cmran-ops"
    copy.mkdir()
    for package in PACKAGES:
        shutil.copytree(ROOT / package, copy / package, symlinks=True, ignore=shutil.ignore_patterns("__pycache__"))
    files = ("pyproject.toml", "README.md", "requirements.txt", "requirements-dev.txt")
    for name in (*files, "prefect.yaml", "prefect-automations.yaml"):
        shutil.copy(ROOT / name, copy)
    return copy


@pytest.fixture(scope="module")
def installed(sources: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The Python of a new environment with the project installed (not editable) and the dependencies of this one."""
    folder = tmp_path_factory.mktemp("installed") / "venv"
    subprocess.run([sys.executable, "-m", "venv", "--without-pip", folder], check=True)
    packages = next((folder / "lib").glob("python*/site-packages"))
    here = [path for path in sys.path if path.endswith(("site-packages", "dist-packages"))]
    (packages / "dependencies.pth").write_text("".join(f"{path}\n" for path in here))
    python = folder / "bin" / "python"
    options = ["--quiet", "--no-index", "--no-deps", "--no-build-isolation", "--disable-pip-version-check"]
    done = subprocess.run(
        [python, "-m", "pip", "install", *options, "--target", packages, sources],
        cwd=folder,
        env={name: value for name, value in os.environ.items() if name != "PYTHONPATH"},
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stdout + done.stderr
    shutil.rmtree(sources / "build", ignore_errors=True)
    found = subprocess.check_output([python, "-P", "-c", "import flows; print(flows.__file__)"], cwd=folder, text=True)
    assert Path(found.strip()).is_relative_to(folder)
    return python


@pytest.fixture(scope="module")
def site(installed: Path, data: Path, tiny: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Site]:
    """A folder without a checkout, and a server."""
    folder = tmp_path_factory.mktemp("site") / "work folder"
    folder.mkdir()
    shutil.copytree(data, folder / "data")
    shutil.copy(tiny, folder / "tiny.yaml")
    port = free_port()
    # As in a shell in this folder, after `export PREFECT_API_URL`.
    environment = {name: value for name, value in os.environ.items() if name not in ("PYTHONPATH", "PWD")}
    environment |= {
        "PREFECT_API_URL": f"http://127.0.0.1:{port}/api",
        "PREFECT_HOME": str(folder.parent / "prefect"),
        "PREFECT_FLOWS_HEARTBEAT_FREQUENCY": "30",
        "OMP_NUM_THREADS": "1",
        "PATH": f"{installed.parent}:{os.environ['PATH']}",
    }
    site = Site(python=installed, folder=folder, environment=environment)
    with site.running("server", "start", "--host", "127.0.0.1", "--port", str(port), "--no-ui"):

        def ready() -> bool:
            with contextlib.suppress(OSError):
                return site.ask("/health") is True
            return False

        until(ready)
        yield site


def test_deployments_end_to_end(site: Site, sources: Path, installed: Path) -> None:
    # As documented: copy the files of the installed package into the folder.
    where = subprocess.check_output([installed, "-P", "-c", "import flows; print(flows.__path__[0])"], text=True)
    for name in ("prefect.yaml", "prefect-automations.yaml"):
        shutil.copy(Path(where.strip()) / name, site.folder)
        assert not (site.folder / name).is_symlink()
    rules = (site.folder / "prefect-automations.yaml").read_text()
    assert rules.count("within: 600") == 2
    # Here the heartbeats come every 30 s, not every 180 s.
    (site.folder / "quick.yaml").write_text(rules.replace("within: 600", "within: 90", 1))

    site.prefect("work-pool", "create", "cmran", "--type", "process")
    site.prefect("--no-prompt", "deploy", "--all")
    site.prefect("automation", "create", "--from-file", "quick.yaml")
    common = {"data": "data", "config": "tiny.yaml", "device": "cpu"}
    with site.running("worker", "start", "--pool", "cmran") as worker:
        done = site.completed(
            site.start("validate-features/cmran", data="data"),
            site.start("search/cmran", **common, mode="weak", trials=1, study="s", out="search"),
            site.start("train/cmran", **common, mode="full", out="run"),
        )
        assert "0 errors" in site.log(done[0]["id"])
        # A long flow run, whose worker and process are killed.
        lost = site.start("train/cmran", **(common | {"config": "long.yaml"}), mode="full", out="lost")
        settings = yaml.safe_load((site.folder / "tiny.yaml").read_text())
        settings["train"] |= {"epochs": 100_000, "lr_milestones": [90_000]}
        (site.folder / "long.yaml").write_text(yaml.safe_dump(settings))
        until(lambda: "epoch 1/" in site.log(lost) or site.run(lost)["state_type"] in ENDED)
        assert site.run(lost)["state_type"] == "RUNNING"
        kill_tree(worker.pid)

    with site.running("worker", "start", "--pool", "cmran", "--limit", "1"):
        parameters = {"parameters": common | {"modes": ["full"], "trials": 1, "epochs": 1, "out": "pipeline"}}
        waiting = [
            site.start("release/cmran", checkpoint="run", data="data", out="model.onnx"),
            site.start("validate-features/cmran", data="data"),
        ]
        site.prefect("deployment", "run", "cmran-pipeline/cmran", "--params", json.dumps(parameters), "--watch")
        first, second = sorted(site.completed(*waiting), key=lambda run: str(run["start_time"]))
        # One worker with one slot runs them one after the other.
        assert first["end_time"] <= second["start_time"]
        # An entry point that is a file, in a checkout.
        deploy = ("--no-prompt", "deploy", "flows/search_flow.py:search", "--name", "file", "--pool", "cmran")
        site.prefect(*deploy, cwd=sources)
        where = {"data": str(site.folder / "data"), "config": str(site.folder / "tiny.yaml"), "device": "cpu"}
        site.completed(
            site.start("batch-inference/cmran", model="models:/cmran-full/1", data="data", out="predictions"),
            site.start("search/file", **where, mode="full", trials=1, study="s", out="found"),
        )
        assert (sources / "found").is_dir()
        assert (site.folder / "predictions" / "manifest.json").is_file()
        assert list(site.folder.glob("pipeline/*/summary.json"))
        # Everything is in this folder, whatever the working directory of the worker.
        assert (site.folder / "mlflow.db").is_file()

        ended = site.ended(lost)
    assert (ended["state_type"], ended["state"]["name"]) == ("CRASHED", "Crashed")
    assert ended["state"]["message"].startswith("No heartbeat for 10 minutes")
    # No other flow run was set to Crashed.
    everything = site.ask("/flow_runs/filter", {})
    assert {run["state_type"] for run in everything if run["id"] != lost} == {"COMPLETED"}
