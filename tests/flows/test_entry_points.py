"""MLproject, conda.yaml and prefect.yaml agree with the code."""

import json
import os
import shlex
import subprocess
import sys

import pytest
import yaml

from cmran import tracking
from cmran.config import load_config
from cmran.training.trainer import fit
from flows import cli as command
from tests.conftest import ROOT
from tests.flows.test_jobs import runs, steps

PROJECT = yaml.safe_load((ROOT / "MLproject").read_text())
REQUIRED = {
    "main": {"data": "."},
    "validate": {"data": "."},
    "synth": {"out": "synthetic"},
    "train": {"data": ".", "mode": "full"},
    "seeds": {"data": ".", "mode": "full", "seeds": "4,5"},
    "evaluate": {"checkpoint": "run", "data": "."},
    "search": {"data": ".", "mode": "weak"},
    "export": {"checkpoint": "run", "out": "m.onnx"},
    "release": {"checkpoint": "run"},
    "predict": {"model": "m.onnx", "data": ".", "out": "out"},
}
FLOWS = {
    "validate-features": "parameters",
    "search": "parameters",
    "train": "parameters",
    "release": "parameters",
    "batch-inference": "parameters",
    "cmran-pipeline": "parameters",
}


def arguments_of(entry, given):
    """Return the arguments that `mlflow run -e ENTRY -P ...` would pass to the command."""
    from mlflow.projects._project_spec import EntryPoint

    spec = PROJECT["entry_points"][entry]
    line = EntryPoint(entry, spec["parameters"], spec["command"]).compute_command(given, storage_dir=None)
    words = shlex.split(line)
    assert words[:3] == ["python", "-m", "flows"]
    return words[3:]


def test_every_command_has_an_entry_point():
    assert PROJECT["entry_points"].keys() == REQUIRED.keys()
    # The feature cache belongs to a machine, not to a run.
    here = {"pack", "cache"}
    assert {"pipeline" if name == "main" else name for name in REQUIRED} | here == command.COMMANDS.keys()


@pytest.mark.parametrize("entry", REQUIRED)
def test_required_parameters_are_enough(entry):
    found, parameters = command.parse(arguments_of(entry, REQUIRED[entry]))
    assert found is command.COMMANDS["pipeline" if entry == "main" else entry]
    # Parameters that are not given have the default of the command.
    fields = type(parameters).model_fields
    # MLproject has a default for a required output folder.
    given = {"out": parameters.out} if "out" in fields and fields["out"].is_required() else {}
    defaults = type(parameters)(**REQUIRED[entry] | given)
    assert parameters == defaults


@pytest.mark.parametrize("entry", REQUIRED)
def test_every_parameter_is_an_option(entry):
    """Each parameter reaches the command line, even with spaces and quotes in its value."""
    spec = PROJECT["entry_points"][entry]
    for name in spec["parameters"]:
        if name == "resume":
            assert "--resume" in arguments_of(entry, REQUIRED[entry] | {"resume": "true"})[-1]
            continue
        value = "it's a; value"
        assert value in arguments_of(entry, REQUIRED[entry] | {name: value})


def test_undeclared_parameter_is_rejected_by_the_parser():
    with pytest.raises(SystemExit) as stopped:
        command.parse(arguments_of("train", REQUIRED["train"] | {"color": "blue"}))
    assert stopped.value.code == 2


def test_conda_environment():
    environment = yaml.safe_load((ROOT / PROJECT["conda_env"]).read_text())
    pip = next(entry["pip"] for entry in environment["dependencies"] if isinstance(entry, dict))
    assert "python=3.11" in environment["dependencies"]
    assert pip == ["-r requirements.txt", "-c constraints.txt"]
    assert all((ROOT / line.split()[1]).is_file() for line in pip)


def test_deployments_resolve():
    from importlib.metadata import version

    from prefect import Flow
    from prefect.flows import load_flow_from_entrypoint

    settings = yaml.safe_load((ROOT / "prefect.yaml").read_text())
    assert settings["prefect-version"] == version("prefect")
    found = {}
    for deployment in settings["deployments"]:
        flow = load_flow_from_entrypoint(deployment["entrypoint"], use_placeholder_flow=False)
        assert isinstance(flow, Flow)
        assert deployment["name"] == "cmran"
        assert deployment["work_pool"]["name"] == "cmran"
        assert deployment["description"]
        found[flow.name] = flow
    assert found.keys() == FLOWS.keys()
    for flow in found.values():
        # The form in Prefect's UI has a description of each field.
        schema = flow.parameters.model_dump() if hasattr(flow.parameters, "model_dump") else flow.parameters.dict()
        (name,) = (
            reference["$ref"].rsplit("/", 1)[-1] for reference in _references(schema["properties"]["parameters"])
        )
        fields = schema["definitions"][name]["properties"]
        assert fields
        assert all(field.get("description") for field in fields.values())


def _references(schema):
    return [schema] if "$ref" in schema else [part for part in schema.get("allOf", []) if "$ref" in part]


def mlflow_run(*values, cwd):
    arguments = [argument for value in values for argument in ("-P", value)]
    return subprocess.run(
        [sys.executable, "-m", "mlflow", "run", str(ROOT), "--env-manager", "local", "-e", "train", *arguments],
        cwd=cwd,
        env={
            **os.environ,
            "OMP_NUM_THREADS": "1",
            "PATH": f"{os.path.dirname(sys.executable)}:{os.environ['PATH']}",
        },
        capture_output=True,
        text=True,
        check=False,
    )


@pytest.mark.slow
@pytest.mark.timeout(900)
def test_mlflow_run(data, tiny, tracking_db, tmp_path):
    # A relative path refers to the folder of the caller.
    done = mlflow_run(f"data={data.name}", "mode=weak", f"config={tiny}", f"out={tmp_path / 'run'}", cwd=data.parent)
    assert done.returncode == 0, done.stderr
    (run,) = runs("Default")
    assert run.info.status == "FINISHED"
    assert run.data.tags["mlflow.project.entryPoint"] == "train"
    assert run.data.params["mode"] == "weak"
    assert run.data.params["cfg.model.mode"] == "weak"
    assert steps(run.info.run_id, "val.accuracy") == [1, 2, 3]
    assert tracking.run_info(run.info.run_id).tags["cmran.complete"] == "true"
    assert runs("cmran-weak") == []

    done = mlflow_run(f"data={data}", "mode=weak", "epochs=many", f"out={tmp_path / 'bad'}", cwd=tmp_path)
    assert done.returncode != 0
    assert "error: --epochs: Input should be a valid integer" in done.stderr
    assert "Traceback" not in done.stderr
    assert not (tmp_path / "bad").exists()


@pytest.mark.slow
@pytest.mark.timeout(900)
def test_mlflow_run_takes_settings_and_initial_weights_and_resumes(data, tiny, tracking_db, tmp_path):
    source, out = tmp_path / "source", tmp_path / "tuned"
    fit(data, load_config("weak", config_file=tiny, overrides={"train": {"epochs": 1}}), source, device="cpu")
    given = ["mode=weak", f"config={tiny}", f"init={source}", "set=train.lr=1e-3 train.lr_milestones=[1, 2]"]
    done = mlflow_run(f"data={data}", f"out={out}", *given, cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    config = json.loads((out / "config.json").read_text())
    assert (config["config"]["train"]["lr"], config["config"]["train"]["lr_milestones"]) == (1e-3, [1, 2])
    (run,) = runs("Default")
    assert run.data.tags["cmran.init.source"] == str(source)
    assert run.data.params["cfg.train.lr"] == "0.001"

    # Parameters that are not given come from the run; no default of the entry point contradicts it.
    done = mlflow_run(f"data={data}", f"out={out}", "resume=true", cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    assert "the run is finished" in done.stderr
