"""The direction of imports, the cost of light imports, and the pins of dependencies."""

import re
import subprocess
import sys
from importlib.metadata import packages_distributions

import pytest

from tests.conftest import ROOT


def test_imports_respect_the_layers():
    done = subprocess.run(
        [sys.executable, "-c", "from importlinter.cli import lint_imports; raise SystemExit(lint_imports())"],
        cwd=ROOT,
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stdout + done.stderr
    assert "0 broken" in done.stdout


@pytest.mark.parametrize("statement", ["import cmran", "import flows.cli"])
def test_light_import_loads_no_heavy_package(statement):
    heavy = ("torch", "mlflow", "prefect", "optuna", "onnx", "onnxruntime", "matplotlib", "h5py", "pyarrow", "pandas")
    code = f"{statement}\nimport sys\nprint(sorted(set(sys.modules) & set({heavy!r})))"
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "[]"


def test_no_module_shadows_another():
    """The folder of a package may be first on sys.path: of a script, or of a file that Prefect uses as entry point."""
    packages = ("cmran", "search", "serving", "flows")
    names = {*packages, *sys.stdlib_module_names, *packages_distributions()}
    shadowing = [
        str(path.relative_to(ROOT))
        for package in packages
        for path in (ROOT / package).rglob("*")
        # These folders contain neither scripts nor entry points, so they are never on sys.path.
        if path.parent not in (ROOT / "flows" / "jobs", ROOT / "cmran" / "utils")
        if (path.suffix == ".py" or (path / "__init__.py").is_file()) and path.stem in names
    ]
    assert shadowing == []


def test_dependencies_are_pinned_exactly_and_once():
    lines = [
        line
        for name in ("requirements.txt", "requirements-dev.txt")
        for line in (ROOT / name).read_text().splitlines()
        if line and not line.startswith("#")
    ]
    names = [re.fullmatch(r"([A-Za-z0-9_.-]+)==[0-9][0-9A-Za-z.]*", line).group(1).lower() for line in lines]
    assert len(names) == len(set(names))
    locked = dict(
        line.split("==") for line in (ROOT / "constraints.txt").read_text().lower().splitlines() if "==" in line
    )
    assert "onnxruntime" not in locked
    for line in lines:
        name, version = line.lower().split("==")
        assert locked.get(name.replace("_", "-"), version) == version
