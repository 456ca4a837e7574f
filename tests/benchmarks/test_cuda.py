"""The CUDA benchmark without a GPU: its rows on the CPU, its dependencies, and its error."""

import subprocess
import sys

import pytest

from tests.conftest import ROOT
from tests.devices import without_cuda

# The packages that a GPU machine must have; their own dependencies are allowed too.
ALLOWED = ("torch", "numpy", "h5py", "pydantic")
ON_CPU = f"""
import importlib.metadata, os, re, sys
from pathlib import Path
def plain(name):
    return name.lower().replace("_", "-")
allowed, names = set(), list({ALLOWED!r})
while names:
    name = re.split(r"[^A-Za-z0-9_.-]", names.pop())[0]
    name = plain(name)
    if name in allowed:
        continue
    allowed.add(name)
    try:
        names += [need for need in importlib.metadata.requires(name) or [] if "extra ==" not in need]
    except importlib.metadata.PackageNotFoundError:
        pass
for name, owners in importlib.metadata.packages_distributions().items():
    if name not in sys.modules and not any(plain(owner) in allowed | {{"cmran-ops"}} for owner in owners):
        # Simulate that it is not installed.
        sys.modules[name] = None
assert sys.modules["yaml"] is None
import torch
from benchmarks import cuda
out = Path(sys.argv[1])
os.environ["XDG_CACHE_HOME"] = str(out)
config, cpu = cuda.TINY, torch.device("cpu")
cuda.STEPS = 1
rows = cuda.steps(config, cpu, 1)
rows += cuda.epochs(config, cuda.noise_folder(out / "data", config, 40), out, cpu, 1)
print(*[f"{{row.name}} {{row.value > 0}}" for row in rows], sep="\\n")
"""


@pytest.mark.slow
def test_rows_need_only_four_packages(tmp_path):
    done = subprocess.run(
        [sys.executable, "-c", ON_CPU, str(tmp_path)], cwd=ROOT, capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stderr
    names = ["step_float32", "step_float32_eager", "step_bfloat16", "step_bfloat16_eager", "fill_device_cache", "epoch"]
    names += ["stream_epoch", "read_cache", "predict_disk", "predict"]
    assert done.stdout.split("\n")[:-1] == [f"cuda_{name} True" for name in names]


@without_cuda
def test_a_missing_device_is_one_line():
    done = subprocess.run(
        [sys.executable, "-m", "benchmarks.cuda"], cwd=ROOT, capture_output=True, text=True, check=False
    )
    assert done.returncode == 1
    assert "no usable CUDA device" in done.stderr
    assert "Traceback" not in done.stderr
