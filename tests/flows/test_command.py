"""The `cmran` command: help, usage, exit codes, one line per error."""

import json
import logging
import os
import signal
import subprocess
import sys

import pytest

from cmran.errors import CmranError
from flows import cli as command
from flows.jobs.train import TrainParameters
from tests.conftest import ROOT

TRAIN = ["train", "data", "--mode", "full", "--out", "out"]


@pytest.mark.parametrize("name", command.COMMANDS)
def test_help_describes_every_option(name, capsys):
    with pytest.raises(SystemExit) as stopped:
        command.main([name, "--help"])
    assert stopped.value.code == 0
    output = " ".join(capsys.readouterr().out.split())
    entry = command.COMMANDS[name]
    assert " ".join(entry.parameters.__doc__.split()).split(". ")[0] in output
    for key, field in entry.parameters.model_fields.items():
        if key != "parent_run_id":
            assert field.description in output, key
    for example in entry.examples:
        assert example in output
        # The examples parse.
        assert command.parse(example.split()[1:])


def test_general_help_lists_every_command(capsys):
    with pytest.raises(SystemExit):
        command.main(["--help"])
    output = capsys.readouterr().out
    assert all(name in output for name in command.COMMANDS)


def test_help_imports_no_heavy_package():
    heavy = ["torch", "mlflow", "prefect", "optuna", "onnx", "onnxruntime", "matplotlib", "h5py", "numpy"]
    code = (
        "import sys, flows.cli as m\n"
        "try: m.main(['pipeline', '--help'])\n"
        f"except SystemExit: print(sorted(set({heavy}) & set(sys.modules)))"
    )
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, check=True)
    assert done.stdout.strip().endswith("[]")


@pytest.mark.parametrize(
    ("arguments", "expected"),
    [
        ([], "COMMAND"),
        (["paint"], "paint"),
        (["train"], "DATA"),
        (["train", "data", "--mode", "full"], "--out"),
        ([*TRAIN, "--epochs", "0"], "--epochs: Input should be greater than or equal to 1, found '0'"),
        ([*TRAIN, "--epochs", "-3"], "--epochs"),
        ([*TRAIN, "--epochs", "many"], "--epochs"),
        ([*TRAIN, "--epochs", "1.5"], "--epochs"),
        ([*TRAIN, "--epoch", "3"], "--epoch"),
        ([*TRAIN, "--mode", "both"], "--mode: Input should be 'full' or 'weak', found 'both'"),
        ([*TRAIN, "--mode", ""], "--mode is required"),
        ([*TRAIN, "--resume=maybe"], "--resume"),
        ([*TRAIN, "again"], "again"),
        (["search", "data", "--mode", "full", "--timeout", "nan"], "--timeout"),
        (["evaluate", "run"], "DATA"),
        (["seeds", "data", "--seeds", "1,x", "--mode", "full", "--out", "o"], "--seeds"),
        (["seeds", "data", "--seeds", "1,1", "--mode", "full", "--out", "o"], "once"),
        (["evaluate", "data", "--seeds", "1,2", "--mode", "full", "--out", "o"], "use `cmran seeds`"),
        (["evaluate", "--out", "o", "--resume"], "use `cmran seeds`"),
        (["predict", "--model", "m.onnx", "--data", "d", "--out", "o", "--batch-size", "0"], "--batch-size"),
        (["pipeline", "data", "--modes", "full,none"], "--modes"),
        (["pipeline", "--trials", "3"], "DATA is required"),
        (["seeds", "--seeds", "4", "--out", "o", "data"], "--mode is required"),
        (["search", "--mode", "full"], "DATA"),
        ([*TRAIN, "--lr", "0"], "--lr: Input should be greater than 0"),
        ([*TRAIN, "--lr", "fast"], "--lr"),
        ([*TRAIN, "--clip-norm", "nan"], "--clip-norm"),
        ([*TRAIN, "--batch-size", "5000"], "--batch-size"),
        ([*TRAIN, "--set", "train.lrr=1"], "--set: unknown setting 'train.lrr': the nearest are train.lr,"),
        ([*TRAIN, "--set", "batch=1"], "train.batch_size"),
        ([*TRAIN, "--set", "train.lr"], "--set: expected KEY=VALUE"),
        ([*TRAIN, "--set", "train.lr="], "--set: expected KEY=VALUE"),
        ([*TRAIN, "--set", "train.lr_milestones=[5"], "--set: not readable as YAML"),
        ([*TRAIN, "--set", "train.lr=1", "--set", "train.lr=2"], "train.lr is given twice, as 1 and as 2"),
        ([*TRAIN, "--lr", "0.1", "--set", "train.lr=0.1"], "train.lr is given twice, in --lr and in --set"),
        ([*TRAIN, "--epochs", "3", "--set", "train.epochs=4"], "train.epochs is given twice"),
        (["pipeline", "d", "--search-epochs", "3", "--set", "train.epochs=4"], "give --search-epochs and --epochs"),
    ],
    ids=lambda value: " ".join(value) if isinstance(value, list) else "",
)
def test_wrong_usage(arguments, expected, capsys):
    with pytest.raises(SystemExit) as stopped:
        command.main(arguments)
    assert stopped.value.code == 2
    output = capsys.readouterr()
    assert output.out == ""
    assert output.err.count("\n") == 1
    assert output.err.startswith("error: ")
    assert expected in output.err
    assert "--help" in output.err


def test_options_reach_the_parameters():
    found, parameters = command.parse(
        [*TRAIN, "--epochs", "7", "--recipe", "demo", "--resume", "--selection-split", "test", "--precision", "float64"]
    )
    assert found.job == "flows.jobs.train:run"
    assert parameters == TrainParameters(
        data="data",
        mode="full",
        out="out",
        epochs=7,
        recipe="demo",
        resume=True,
        selection_split="test",
        precision="float64",
    )


def test_settings_reach_the_parameters():
    options = [
        "--set",
        "train.lr_milestones=[5, 10]",
        "--set",
        "model.width=128 train.max_batches=null",
        "--lr",
        "1e-4",
    ]
    _, parameters = command.parse([*TRAIN, *options, "--batch-size", "8", "--clip-norm", "0.2"])
    assert parameters.given_settings() == {
        "train.lr_milestones": [5, 10],
        "model.width": 128,
        "train.max_batches": None,
        "train.lr": 1e-4,
        "train.batch_size": 8,
        "train.clip_norm": 0.2,
    }
    # In a pipeline, --batch-size is that of the prediction; in a search, --seed is that of the sampler.
    _, parameters = command.parse(["pipeline", "data", "--batch-size", "8", "--set", "train.batch_size=16"])
    assert (parameters.batch_size, parameters.given_settings()) == (8, {"train.batch_size": 16})
    _, parameters = command.parse(["search", "data", "--mode", "full", "--seed", "8", "--set", "train.seed=9"])
    assert (parameters.seed, parameters.given_settings()) == (8, {"train.seed": 9})


@pytest.mark.parametrize("order", [[], ["--mode", "full"]])
def test_data_may_follow_the_options(order):
    """argparse treats a positional that may be omitted as omitted if an option comes before it."""
    _, parameters = command.parse(["train", *order, "--out", "o", "data", *(order or ["--mode", "full"])])
    assert (str(parameters.data), parameters.mode) == ("data", "full")


def test_resume_needs_only_the_output_folder():
    for arguments, job in (
        (["train", "--out", "o", "--resume"], "train:run"),
        (["seeds", "--out", "o", "--resume"], "seeds:run"),
        (["pipeline", "--out", "o", "--resume"], "local:run_pipeline"),
    ):
        found, parameters = command.parse(arguments)
        assert found.job.endswith(job)
        assert parameters.model_fields_set == {"out", "resume"}


def test_empty_value_counts_as_not_given():
    empty = ["--epochs", "", "--config", "", "--device", "", "--set", "", "--lr", "", "--init", "", "--resume="]
    _, parameters = command.parse([*TRAIN, *empty])
    assert parameters == TrainParameters(data="data", mode="full", out="out")


@pytest.mark.parametrize(("value", "resume"), [("true", True), ("True", True), ("1", True), ("false", False)])
def test_flags_accept_a_value(value, resume):
    assert command.parse([*TRAIN, f"--resume={value}"])[1].resume is resume


def test_options_between_positionals():
    _, parameters = command.parse(["evaluate", "run", "--split", "val", "data"])
    assert (parameters.checkpoint, str(parameters.data), parameters.split) == ("run", "data", "val")


def test_seeds_are_a_list():
    _, parameters = command.parse(["seeds", "--seeds", "4,5", "data", "--mode", "weak", "--out", "o"])
    assert parameters.seeds == (4, 5)


def test_positional_after_a_double_dash():
    assert str(command.parse(["validate", "--", "-data"])[1].data) == "-data"


def _raise(error):
    def job(*_args, **_kwargs):
        raise error

    return job


def test_user_error_is_one_line(monkeypatch, capsys):
    monkeypatch.setattr("flows.jobs.validate.run", _raise(CmranError("this\nand that")))
    assert command.main(["validate", "data"]) == 1
    assert capsys.readouterr().err == "error: this and that\n"


@pytest.mark.parametrize(
    ("name", "arguments", "message", "expected"),
    [
        ("train", TRAIN[1:], "pass `resume=True`, or another `out`", "pass --resume, or another --out"),
        ("train", TRAIN[1:], "give `data` and `mode`, as in `settings`", "give DATA and --mode, as in --set"),
        ("train", TRAIN[1:], 'pass `device="cpu"` or `batch_size=8`', "pass --device cpu or --batch-size 8"),
        ("export", ["run", "-o", "m.onnx"], "choose another `out`", "choose another --out"),
        ("search", ["data", "--mode", "full"], "a longer `timeout_s`", "a longer --timeout"),
        # Unknown names, commands and fields without an option stay.
        (
            "validate",
            ["data"],
            "`resume=True`, `features`, `cmran synth data`",
            "`resume=True`, `features`, `cmran synth data`",
        ),
        ("validate", ["data"], "`parent_run_id` of `data`", "`parent_run_id` of DATA"),
    ],
)
def test_error_names_the_options_of_the_command(monkeypatch, capsys, name, arguments, message, expected):
    monkeypatch.setattr(f"flows.jobs.{name}.run", _raise(CmranError("found this", message)))
    assert command.main([name, *arguments]) == 1
    assert capsys.readouterr().err == f"error: found this: {expected}\n"


def test_interrupt_is_one_line(monkeypatch, capsys):
    monkeypatch.setattr("flows.jobs.validate.run", _raise(KeyboardInterrupt()))
    assert command.main(["validate", "data"]) == 130
    assert capsys.readouterr().err == "interrupted\n"


def test_sigterm_closes_resources(monkeypatch, capsys):
    ended = []

    def job(*_args, **_kwargs):
        try:
            os.kill(os.getpid(), signal.SIGTERM)
            signal.pause()
        finally:
            ended.append(True)

    monkeypatch.setattr("flows.jobs.validate.run", job)
    assert command.main(["validate", "data"]) == 143
    assert ended == [True]
    assert capsys.readouterr().err == "terminated\n"
    assert signal.getsignal(signal.SIGTERM) is signal.SIG_DFL


def test_bug_is_not_hidden(monkeypatch):
    monkeypatch.setattr("flows.jobs.validate.run", _raise(ZeroDivisionError("a bug")))
    with pytest.raises(ZeroDivisionError):
        command.main(["validate", "data"])


def test_log_lines_are_shown_and_loggers_restored(monkeypatch, capsys):
    class Done:
        ok = True

        def text(self):
            return "done"

    def job(*_args, **_kwargs):
        logging.getLogger("cmran.x").info("a line")
        logging.getLogger("search.x").warning("a warning")
        return Done()

    monkeypatch.setattr("flows.jobs.validate.run", job)
    assert command.main(["validate", "data"]) == 0
    output = capsys.readouterr()
    assert output.out == "done\n"
    assert [line.split(" ", 1)[1] for line in output.err.splitlines()] == ["a line", "warning: a warning"]
    logger = logging.getLogger("cmran")
    assert (logger.handlers, logger.propagate, logger.level) == ([], True, logging.NOTSET)


@pytest.mark.parametrize("unbuffered", ["", "1"])
def test_closed_pipe_is_not_an_error(data, unbuffered):
    reader, writer = os.pipe()
    os.close(reader)
    done = subprocess.run(
        [sys.executable, "-m", "flows", "validate", data],
        cwd=ROOT,
        env={**os.environ, "PYTHONUNBUFFERED": unbuffered},
        stdout=writer,
        stderr=subprocess.PIPE,
        text=True,
        check=False,
    )
    os.close(writer)
    assert done.returncode == 141
    assert done.stderr == ""


def test_unusable_path_is_one_line(capsys, tmp_path):
    long = tmp_path / ("x" * 300)
    for arguments in (
        ["validate", str(long)],
        ["synth", str(long), "--videos", "5"],
        ["evaluate", str(long), str(tmp_path)],
        ["predict", "--model", str(long), "--data", str(tmp_path), "--out", str(tmp_path / "out")],
    ):
        assert command.main(arguments) == 1
        output = capsys.readouterr()
        (line,) = (output.out + output.err).strip().splitlines()[-1:]
        assert "File name too long" in line or "File name too long" in output.out, output
        assert "Traceback" not in output.err


@pytest.mark.parametrize(
    ("redirection", "status", "expected"),
    [(">&-", 0, ""), (">/dev/full", 1, "error: while reading or writing: No space left on device: check the disk")],
)
def test_unwritable_stdout(tmp_path, redirection, status, expected):
    done = subprocess.run(
        ["bash", "-c", f'"$0" -m flows cache {redirection}', sys.executable],
        cwd=ROOT,
        env={**os.environ, "XDG_CACHE_HOME": str(tmp_path)},
        capture_output=True,
        text=True,
        check=False,
    )
    assert (done.returncode, done.stderr.strip()) == (status, expected)


def test_name_that_the_terminal_cannot_encode(cmran, tmp_path):
    done = cmran("validate", "n\udcff\u00f6", PYTHONIOENCODING="ascii")
    assert done.returncode == 1
    assert "n\\udcff\\xf6: found nothing there" in done.stdout + done.stderr
    assert "Traceback" not in done.stderr


def test_validate_end_to_end(cmran, data, tmp_path):
    done = cmran("validate", data, "--mode", "weak", "--json", "report.json")
    assert done.returncode == 0, done.stderr
    assert "0 errors" in done.stdout
    report = json.loads((tmp_path / "report.json").read_text())
    assert report["errors"] == []
    assert report["fingerprint"] in done.stdout
    # Validation without --track opens no MLflow run.
    assert not (tmp_path / "mlflow.db").exists()


@pytest.mark.slow
def test_cli_end_to_end(cmran, data, tiny, tmp_path):
    """Train, evaluate, export and predict, each in its own process. For the other commands see test_flows.py."""
    done = cmran("train", data, "--mode", "full", "--out", "run", "--config", tiny, "--epochs", "2")
    assert done.returncode == 0, done.stderr
    assert "epoch 2/2" in done.stderr
    test = json.loads((tmp_path / "run" / "metrics.json").read_text())["test"]

    done = cmran("evaluate", "run", data, "--json", "scores.json")
    assert done.returncode == 0, done.stderr
    assert "baseline: always background" in done.stdout
    assert json.loads((tmp_path / "scores.json").read_text())["accuracy"] == test["accuracy"]

    done = cmran("export", "run", "-o", "model.onnx")
    assert done.returncode == 0, done.stderr
    assert "Parity check passed" in done.stdout

    done = cmran("predict", "--model", "model.onnx", "--data", data, "--out", "predictions")
    assert done.returncode == 0, done.stderr
    manifest = json.loads((tmp_path / "predictions" / "manifest.json").read_text())
    assert manifest["metrics"]["test"]["accuracy"] == test["accuracy"]

    done = cmran("train", data, "--mode", "full", "--out", "run", "--config", tiny)
    assert done.returncode == 1
    assert done.stderr.splitlines()[-1].startswith("error: ")
    assert "--resume" in done.stderr
    assert "Traceback" not in done.stderr
