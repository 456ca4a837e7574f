"""The `cmran` command (also `python -m flows`): one subcommand a job.

Exit codes: 0 done; 1 something the user can mend, told in one line (or a folder with errors); 2 wrong usage;
130 interrupted, 143 terminated.
"""

import argparse
import errno
import importlib
import io
import os
import sys
import textwrap
import traceback
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from types import TracebackType
from typing import Any, Literal, NoReturn, get_args, get_origin

from pydantic import BaseModel, ValidationError
from pydantic.fields import FieldInfo

from cmran import __version__
from cmran.errors import CmranError
from cmran.utils.files import ensure_home
from cmran.utils.signals import raise_on_term
from cmran.utils.uris import redact
from flows.jobs.cache import CacheParameters, PackParameters
from flows.jobs.evaluate import EvaluateParameters
from flows.jobs.export import ExportParameters
from flows.jobs.pipeline import PipelineParameters
from flows.jobs.predict import PredictParameters
from flows.jobs.release import ReleaseParameters
from flows.jobs.search import SearchParameters
from flows.jobs.seeds import SeedsParameters
from flows.jobs.synth import SynthParameters
from flows.jobs.train import TrainParameters
from flows.jobs.validate import ValidateParameters


@dataclass(frozen=True, kw_only=True)
class Command:
    """One subcommand: its parameters become its options, `job` (module:function) does the work."""

    parameters: type[BaseModel]
    job: str
    positionals: tuple[str, ...]
    spellings: Mapping[str, tuple[str, ...]] = field(default_factory=dict)
    # Option names of a field, where they differ from --field-name.
    alone: Mapping[str, str] = field(default_factory=dict)
    # What an option means that is given without its value, for those that may be.
    more: str = ""
    # What --help says besides the parameters' own words.
    examples: tuple[str, ...] = ()


_JSON = {"report": ("--json",)}


_TIMEOUT = {"timeout_s": ("--timeout",)}


_SET = {"settings": ("--set",)}


COMMANDS: dict[str, Command] = {
    "validate": Command(
        parameters=ValidateParameters,
        job="flows.jobs.validate:validate_job",
        positionals=("data",),
        spellings=_JSON,
        more="Exits with 1 if there is an error; warnings alone do not fail.",
        examples=("cmran validate data/ --mode weak --json report.json",),
    ),
    "synth": Command(
        parameters=SynthParameters,
        job="flows.jobs.synth:synth_job",
        positionals=("out",),
        more="With --annotations and --orders labels and splits are the real ones; only the features are made.",
        examples=("cmran synth data/ --videos 600", "cmran synth data/ --annotations Annotations.txt --orders ave/"),
    ),
    "train": Command(
        parameters=TrainParameters,
        job="flows.jobs.train:train_job",
        positionals=("data",),
        spellings=_SET,
        more="The run is kept in MLflow (MLFLOW_TRACKING_URI, by default mlflow.db in this folder), experiment "
        "cmran-full or cmran-weak.",
        examples=(
            "cmran train data/ --mode full --out runs/full",
            "cmran train --out runs/full --resume",
            "cmran train data/ --mode full --out runs/tuned --init runs/full --lr 1e-4 --set train.lr_factor=0.3",
        ),
    ),
    "evaluate": Command(
        parameters=EvaluateParameters,
        job="flows.jobs.evaluate:evaluate_job",
        positionals=("checkpoint", "data"),
        spellings=_JSON,
        more="With --seeds it trains once a seed and reports mean and spread: cmran evaluate DATA --seeds 456,457,458 "
        "--mode full --out DIR (cmran evaluate --seeds 1 --help lists the options).",
        examples=("cmran evaluate runs/full data/ --split test", "cmran evaluate model.pth.tar data/ --mode full"),
    ),
    "search": Command(
        parameters=SearchParameters,
        job="flows.jobs.search:search_job",
        positionals=("data",),
        spellings=_TIMEOUT | _SET,
        more="The study is kept in CMRAN_STUDY_STORAGE (by default a SQLite file in this folder); naming it again "
        "continues it, and keeps the settings that are not given. Every trial is an MLflow run under the search's own.",
        examples=("cmran search data/ --mode weak --trials 30 --epochs 10 --study weak-1",),
    ),
    "export": Command(
        parameters=ExportParameters,
        job="flows.jobs.export:export_job",
        positionals=("checkpoint",),
        spellings={"out": ("-o", "--out")},
        more="Exits with 1 if ONNX Runtime and PyTorch disagree.",
        examples=("cmran export runs/full -o full.onnx",),
    ),
    "release": Command(
        parameters=ReleaseParameters,
        job="flows.jobs.release:release_job",
        positionals=("checkpoint",),
        more="A version becomes champion when it is better on val of the same data than the champion, else challenger. "
        "A model at or below the trivial baselines on val never becomes champion. "
        "A model that fails the proof is not registered.",
        examples=("cmran release runs/full --data data/",),
    ),
    "predict": Command(
        parameters=PredictParameters,
        job="flows.jobs.predict:predict_job",
        positionals=(),
        more="Reads in blocks; killed and started again with --resume, the result is the same.",
        examples=("cmran predict --model models:/cmran-full@champion --data data/ --split all --out predictions/",),
    ),
    "pipeline": Command(
        parameters=PipelineParameters,
        job="flows.local:run_pipeline",
        positionals=("data",),
        spellings=_TIMEOUT | _SET,
        more="Runs as a Prefect flow, on the server of PREFECT_API_URL or one that is started for as long as it takes.",
        examples=("cmran pipeline data/ --recipe demo --trials 3 --search-epochs 3 --epochs 8 --out runs/demo",),
    ),
    "pack": Command(
        parameters=PackParameters,
        job="flows.jobs.cache:pack_job",
        positionals=("data",),
        more="Training does so by itself. Exits with 1 where there is no room.",
        examples=("cmran pack data/", "cmran pack data/ --mode weak"),
    ),
    "cache": Command(
        parameters=CacheParameters,
        job="flows.jobs.cache:cache_job",
        positionals=(),
        alone={"clear": "all"},
        more="Packs in use stay.",
        examples=("cmran cache", "cmran cache --clear", "cmran cache --limit-gib 50"),
    ),
}


EVALUATE_SEEDS = Command(
    parameters=SeedsParameters,
    job="flows.jobs.seeds:seeds_job",
    positionals=("data",),
    spellings=_JSON | _SET,
    examples=(
        "cmran evaluate data/ --seeds 456,457,458 --mode full --out runs/seeds",
        "cmran evaluate --out runs/seeds --resume",
    ),
)


class _Parser(argparse.ArgumentParser):
    """Errors are one line."""

    def error(self, message: str) -> NoReturn:
        self.exit(2, f"error: {message} (see {self.prog} --help)\n")


def main(argv: Sequence[str] | None = None) -> int:
    """Run one command; returns its exit code."""
    arguments = list(sys.argv[1:] if argv is None else argv)
    sys.excepthook = _show_fault
    # A name that the terminal's encoding lacks is no reason to say nothing.
    for stream in (sys.stdout, sys.stderr):
        if isinstance(stream, io.TextIOWrapper):
            stream.reconfigure(errors="backslashreplace")
    if sys.stdout is None:
        # Closed by who started us.
        sys.stdout = open(os.devnull, "w")  # noqa: SIM115
    try:
        try:
            with raise_on_term(_Terminated):
                return _run(arguments)
        finally:
            # Here, where a reader that left can be told from an error of ours.
            sys.stdout.flush()
    except CmranError as error:
        return _fail(f"error: {' '.join(str(error).split())}", 1)
    except KeyboardInterrupt as error:
        return _fail("terminated", 143) if isinstance(error, _Terminated) else _fail("interrupted", 130)
    except BrokenPipeError:
        # The reader of our output left (`cmran ... | head`). Python would complain once more when it closes stdout.
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 141
    except OSError as error:
        # A path that nobody has looked at before it was used, or a disk that fails.
        if error.filename is not None:
            return _fail(f"error: {error.filename}: {error.strerror}: look at the path, its rights and its disk", 1)
        if error.errno not in (errno.ENOSPC, errno.EDQUOT, errno.EIO):
            raise
        # It may be our output that cannot be written: Python would complain once more when it closes stdout.
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return _fail(f"error: while reading or writing: {error.strerror}: look at the disk", 1)


def parse(arguments: Sequence[str]) -> tuple[Command, BaseModel]:
    """The command and its checked parameters. Leaves with SystemExit(2) after one line where the usage is wrong."""
    arguments = list(arguments)
    names = {argument.partition("=")[0] for argument in arguments}
    seeds = arguments[:1] == ["evaluate"] and names & {"--seeds", "--resume"}
    commands = COMMANDS | ({"evaluate": EVALUATE_SEEDS} if seeds else {})
    parser, subparsers = _build(commands)
    found, left = parser.parse_known_args(_plain_flags(arguments, commands))
    given = vars(found)
    name = given.pop("command")
    command = commands[name]
    # argparse takes a positional that may be left out for left out where an option comes before it.
    for key in command.positionals:
        if left and given[key] is None and not left[0].startswith("-"):
            given[key] = left.pop(0)
    if left:
        subparsers[name].error(f"unrecognized arguments: {' '.join(left)}")
    # An empty value is one that was not given: MLproject has no other way to leave an option out.
    given = {
        key: [part for part in value if part] if isinstance(value, list) else value for key, value in given.items()
    }
    values = {key: value for key, value in given.items() if value not in (None, "", False, [])}
    try:
        return command, command.parameters.model_validate(values)
    except ValidationError as error:
        subparsers[name].error(_one_line(error, command))


def _run(arguments: Sequence[str]) -> int:
    command, parameters = parse(arguments)
    from cmran import tracking
    from flows.console import shown_logs

    module, _, function = command.job.partition(":")
    with shown_logs():
        ensure_home()
        # `mlflow run` opened a run for us: taken here, once, so that nothing started from here adopts it again.
        run_id = tracking.adopt_run()
        if run_id is not None:
            tracking.check_adopted_run(run_id)
        result = getattr(importlib.import_module(module), function)(parameters, run_id=run_id)
    print(result.text())
    return 0 if result.ok else 1


def _build(commands: Mapping[str, Command]) -> tuple[_Parser, dict[str, _Parser]]:
    parser = _Parser(
        prog="cmran",
        description="Audio-visual event localization with CMRAN: check features, search, train, release, predict.",
        epilog="Addresses: MLFLOW_TRACKING_URI (default: mlflow.db in this folder), CMRAN_STUDY_STORAGE (default: a "
        "SQLite file in this folder), PREFECT_API_URL (default: a server of its own while a pipeline runs).",
        allow_abbrev=False,
    )
    parser.add_argument("--version", action="version", version=f"cmran {__version__}")
    subparsers = parser.add_subparsers(dest="command", metavar="COMMAND", required=True)
    built = {}
    for name, command in commands.items():
        about = " ".join((command.parameters.__doc__ or "").split())
        sub = subparsers.add_parser(
            name,
            help=about.split(". ")[0].rstrip("."),
            description=textwrap.fill(f"{about} {command.more}", 100),
            epilog="examples:\n" + "\n".join(f"  {line}" for line in command.examples),
            formatter_class=argparse.RawDescriptionHelpFormatter,
            allow_abbrev=False,
        )
        for key, info in command.parameters.model_fields.items():
            _add(sub, command, key, info)
        built[name] = sub
    return parser, built


def _add(parser: argparse.ArgumentParser, command: Command, key: str, info: FieldInfo) -> None:
    text = (info.description or "").replace("%", "%%")
    if key == "parent_run_id":
        return  # For the flows: on the command line `mlflow run` says it.
    if key in command.positionals:
        parser.add_argument(key, metavar=key.upper(), help=text, nargs=None if info.is_required() else "?")
        return
    names = _names(command, key)
    if info.annotation is bool:
        parser.add_argument(*names, dest=key, action="store_true", help=text)
        return
    if key == "settings":
        parser.add_argument(*names, dest=key, metavar="KEY=VALUE", action="append", help=text)
        return
    if info.default is not None and not info.is_required():
        text += f" [default: {_shown(info.default)}]"
    more: dict[str, Any] = {"nargs": "?", "const": command.alone[key]} if key in command.alone else {}
    # Of a command that can resume from OUT alone, the parameters themselves say what is lacking, DATA first.
    required = info.is_required() and all(
        command.parameters.model_fields[name].is_required() for name in command.positionals
    )
    metavar = "NUMBER" if key in ("lr", "clip_norm") else _metavar(info.annotation)
    parser.add_argument(*names, dest=key, metavar=metavar, required=required, help=text, **more)


def _names(command: Command, key: str) -> tuple[str, ...]:
    return command.spellings.get(key, ("--" + key.replace("_", "-"),))


def _metavar(annotation: Any) -> str:
    if get_origin(annotation) is Literal:
        return "{" + ",".join(get_args(annotation)) + "}"
    inner = [_metavar(part) for part in get_args(annotation) if part is not type(None)]
    names = {int: "N", float: "SECONDS", Path: "PATH", str: "NAME"}
    return inner[0] if inner else names.get(annotation, "VALUE")


def _shown(value: Any) -> str:
    return ",".join(str(part) for part in value) if isinstance(value, tuple) else str(value)


def _plain_flags(arguments: list[str], commands: Mapping[str, Command]) -> list[str]:
    """`--resume=true` -> `--resume`, `--resume=false` and `--resume=` -> nothing: how MLproject sets a flag."""
    command = commands.get(arguments[0]) if arguments else None
    if command is None:
        return arguments
    flags = {
        name
        for key, info in command.parameters.model_fields.items()
        if info.annotation is bool
        for name in _names(command, key)
    }
    plain = []
    for argument in arguments:
        name, equals, value = argument.partition("=")
        if name in flags and equals and value.lower() in ("true", "1", "yes"):
            plain.append(name)
        elif not (name in flags and equals and value.lower() in ("", "false", "0", "no")):
            plain.append(argument)
    return plain


def _written(command: Command, key: str) -> str:
    """What a field is called on the command line."""
    return key.upper() if key in command.positionals else _names(command, key)[-1]


def _one_line(error: ValidationError, command: Command) -> str:
    first = error.errors()[0]
    more = f" (and {error.error_count() - 1} more)" if error.error_count() > 1 else ""
    message = str(first["msg"]).removeprefix("Value error, ")
    if first["type"] == "needed":
        return f"{_written(command, first['ctx']['field'])} is needed (only with --resume it can be left out)"
    if not first["loc"]:
        return f"{message}{more}"
    key = str(first["loc"][0])
    name = _written(command, key)
    if first["type"] == "missing":
        return f"{name} is needed{more}"
    return f"{name}: {message}, found {_shown(first['input'])!r}{more}"


class _Terminated(KeyboardInterrupt):
    """SIGTERM, taken like Ctrl-C so that what is open ends in order."""


def _show_fault(kind: type[BaseException], error: BaseException, trace: TracebackType | None) -> None:
    """What Python shows of a fault of ours, without passwords."""
    print(redact("".join(traceback.format_exception(kind, error, trace)).rstrip()), file=sys.stderr)


def _fail(message: str, code: int) -> int:
    print(redact(message), file=sys.stderr)
    return code
