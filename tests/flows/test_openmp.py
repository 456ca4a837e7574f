"""OpenMP's threads sleep while they wait, however our code is started; what the user has set wins.

libgomp reads the environment when torch is loaded, so the setting must stand there before: each test has Python note
the variables when torch is first looked for, and libgomp print what it took.
"""

import json
import os
import re
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest
import yaml

from tests.conftest import ROOT

NAMES = ("OMP_WAIT_POLICY", "GOMP_SPINCOUNT")
PASSIVE = {"OMP_WAIT_POLICY": "passive", "GOMP_SPINCOUNT": "2000"}
SITE = """
import json, os, sys
class Noted:
    def find_spec(self, name, path=None, target=None):
        if name == "torch":
            sys.meta_path.remove(self)
            with open(os.environ["NOTES"], "a") as file:
                file.write(json.dumps({name: os.environ.get(name) for name in %r}) + "\\n")
sys.meta_path.insert(0, Noted())
"""

ENTRYPOINTS = [
    deployment["entrypoint"] for deployment in yaml.safe_load((ROOT / "prefect.yaml").read_text())["deployments"]
]
WORKER = f"""
from prefect.flows import load_flow_from_entrypoint
for entrypoint in {ENTRYPOINTS!r}:
    load_flow_from_entrypoint(entrypoint)
import torch
"""
CHILD = """
import multiprocessing
import flows
if __name__ == "__main__":
    child = multiprocessing.get_context("spawn").Process(target=__import__, args=("torch",))
    child.start()
    child.join()
"""

PATHS = {
    "cmran": [str(Path(sys.executable).parent / "cmran"), "evaluate", "nowhere.pt", "nowhere"],
    "python -m flows": [sys.executable, "-m", "flows", "evaluate", "nowhere.pt", "nowhere"],
    "flows of a worker": [sys.executable, "-c", WORKER],
    "a process that is started": [sys.executable, "-c", CHILD],
    "benchmarks": [sys.executable, "-m", "benchmarks.training", "--help"],
    "tests": [sys.executable, "-m", "pytest", "--collect-only", "-q", "-s", "tests/cmran/test_layers.py"],
}

Noted = Callable[..., tuple[list[dict[str, str | None]], str]]


@pytest.fixture
def noted(tmp_path: Path) -> Noted:
    """Runs a command; the variables whenever torch was first looked for, and what libgomp printed."""

    def run(command: list[str], **variables: str) -> tuple[list[dict[str, str | None]], str]:
        site, notes = tmp_path / "site", tmp_path / "notes"
        site.mkdir()
        (site / "sitecustomize.py").write_text(SITE % (NAMES,))
        environment = {name: value for name, value in os.environ.items() if name not in NAMES}
        environment |= {"PYTHONPATH": f"{site}:{ROOT}", "NOTES": str(notes), "OMP_DISPLAY_ENV": "verbose"}
        done = subprocess.run(
            command, cwd=ROOT, env=environment | variables, capture_output=True, text=True, check=False, timeout=240
        )
        assert "Traceback" not in done.stderr, done.stderr
        assert notes.exists(), f"torch was not imported: {done.stderr}"
        return [json.loads(line) for line in notes.read_text().splitlines()], done.stderr

    return run


def spins(printed: str) -> set[str]:
    """How often the threads spin before they sleep, as libgomp says."""
    return set(re.findall(r"GOMP_SPINCOUNT = '(\d+)'", printed))


@pytest.mark.parametrize("path", PATHS)
def test_passive_before_torch_is_loaded(path: str, noted: Noted) -> None:
    if not Path(PATHS[path][0]).exists():
        pytest.skip("the project is not installed: no cmran command")
    variables, printed = noted(PATHS[path])
    assert variables == [PASSIVE]
    assert spins(printed) == {"2000"}


@pytest.mark.parametrize(
    ("name", "value", "expected"),
    [("OMP_WAIT_POLICY", "active", "30000000000"), ("GOMP_SPINCOUNT", "1234", "1234")],
)
@pytest.mark.parametrize("path", ["python -m flows", "benchmarks"])
def test_a_setting_of_the_user_wins(path: str, name: str, value: str, expected: str, noted: Noted) -> None:
    variables, printed = noted(PATHS[path], **{name: value})
    assert variables == [dict.fromkeys(NAMES) | {name: value}]
    assert spins(printed) == {expected}


def test_an_empty_variable_is_none(noted: Noted) -> None:
    variables, printed = noted(PATHS["python -m flows"], OMP_WAIT_POLICY="")
    assert variables == [PASSIVE]
    assert spins(printed) == {"2000"}


def test_the_library_leaves_the_environment_alone(noted: Noted) -> None:
    code = "import os\nbefore = dict(os.environ)\nimport cmran, cmran.training\nassert dict(os.environ) == before"
    variables, _ = noted([sys.executable, "-c", code])
    assert variables == [dict.fromkeys(NAMES)]
