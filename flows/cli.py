"""The `cmran` command (also `python -m flows`): one subcommand per job, with options generated from its parameters.

Exit codes: 0 success; 1 an error that the user can correct, reported in one line (or a folder with errors); 2 wrong
usage; 130 interrupted; 143 terminated.
"""

import argparse
import errno
import importlib
import io
import os
import re
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
    """One subcommand."""

    parameters: type[BaseModel]
    """The record whose fields become the options; its docstring is the description."""
    job: str
    """The function that does the work, as module:function. It is imported after the parameters are checked."""
    positionals: tuple[str, ...] = ()
    """Fields that are positional arguments."""
    names: Mapping[str, tuple[str, ...]] = field(default_factory=dict)
    """Option names of the fields that are not spelled --field-name."""
    const: Mapping[str, str] = field(default_factory=dict)
    """Values of the options that may be given without a value."""
    note: str = ""
    """Text of --help after the description."""
    examples: tuple[str, ...] = ()


_JSON = {"report": ("--json",)}
_TIMEOUT = {"timeout_s": ("--timeout",)}
_SET = {"settings": ("--set",)}

COMMANDS: dict[str, Command] = {
    "validate": Command(
        parameters=ValidateParameters,
        job="flows.jobs.validate:run",
        positionals=("data",),
        names=_JSON,
        note="Exits with 1 if there is an error; warnings alone do not fail.",
        examples=("cmran validate data/ --mode weak --json report.json",),
    ),
    "synth": Command(
        parameters=SynthParameters,
        job="flows.jobs.synth:run",
        positionals=("out",),
        note="With --annotations and --orders, labels and splits are the real ones; only the features are synthetic.",
        examples=("cmran synth data/ --videos 600", "cmran synth data/ --annotations Annotations.txt --orders ave/"),
    ),
    "train": Command(
        parameters=TrainParameters,
        job="flows.jobs.train:run",
        positionals=("data",),
        names=_SET,
        note="The run is logged to MLflow (MLFLOW_TRACKING_URI, by default mlflow.db in the current folder), in the "
        "experiment cmran-full or cmran-weak.",
        examples=(
            "cmran train data/ --mode full --out runs/full",
            "cmran train --out runs/full --resume",
            "cmran train data/ --mode full --out runs/tuned --init runs/full --lr 1e-4 --set train.lr_factor=0.3",
        ),
    ),
    "seeds": Command(
        parameters=SeedsParameters,
        job="flows.jobs.seeds:run",
        positionals=("data",),
        names=_JSON | _SET,
        examples=(
            "cmran seeds data/ --seeds 456,457,458 --mode full --out runs/seeds",
            "cmran seeds --out runs/seeds --resume",
        ),
    ),
    "evaluate": Command(
        parameters=EvaluateParameters,
        job="flows.jobs.evaluate:run",
        positionals=("checkpoint", "data"),
        names=_JSON,
        examples=("cmran evaluate runs/full data/ --split test", "cmran evaluate model.pth.tar data/ --mode full"),
    ),
    "search": Command(
        parameters=SearchParameters,
        job="flows.jobs.search:run",
        positionals=("data",),
        names=_TIMEOUT | _SET,
        note="The study is stored in CMRAN_STUDY_STORAGE (by default a SQLite file in the current folder). An existing "
        "study is resumed and keeps the settings that are not given. Every trial is an MLflow run below the search's.",
        examples=("cmran search data/ --mode weak --trials 30 --epochs 10 --study weak-1",),
    ),
    "export": Command(
        parameters=ExportParameters,
        job="flows.jobs.export:run",
        positionals=("checkpoint",),
        names={"out": ("-o", "--out")},
        note="Exits with 1 if ONNX Runtime and PyTorch disagree.",
        examples=("cmran export runs/full -o full.onnx",),
    ),
    "release": Command(
        parameters=ReleaseParameters,
        job="flows.jobs.release:run",
        positionals=("checkpoint",),
        note="A version becomes champion if it is better than the champion on val of the same data, else challenger. "
        "A model that does not beat the trivial baselines on val never becomes champion. "
        "A model that fails the parity check is not registered.",
        examples=("cmran release runs/full --data data/",),
    ),
    "predict": Command(
        parameters=PredictParameters,
        job="flows.jobs.predict:run",
        note="An interrupted job continues with --resume and gives the same result.",
        examples=("cmran predict --model models:/cmran-full@champion --data data/ --split all --out predictions/",),
    ),
    "pipeline": Command(
        parameters=PipelineParameters,
        job="flows.local:run_pipeline",
        positionals=("data",),
        names=_TIMEOUT | _SET,
        note="Runs as a Prefect flow, on the server of PREFECT_API_URL or on a temporary server.",
        examples=("cmran pipeline data/ --recipe demo --trials 3 --search-epochs 3 --epochs 8 --out runs/demo",),
    ),
    "pack": Command(
        parameters=PackParameters,
        job="flows.jobs.cache:run_pack",
        positionals=("data",),
        note="Training does this automatically. Exits with 1 if there is no space.",
        examples=("cmran pack data/", "cmran pack data/ --mode weak"),
    ),
    "cache": Command(
        parameters=CacheParameters,
        job="flows.jobs.cache:run",
        const={"clear": "all"},
        note="Packs that are in use are kept.",
        examples=("cmran cache", "cmran cache --clear", "cmran cache --limit-gib 50"),
    ),
}


class _Parser(argparse.ArgumentParser):
    """A parser whose errors are one line."""

    def error(self, message: str) -> NoReturn:
        self.exit(2, f"error: {message} (see {self.prog} --help)\n")


def main(argv: Sequence[str] | None = None) -> int:
    """Run a command and return its exit code."""
    arguments = list(sys.argv[1:] if argv is None else argv)
    sys.excepthook = _print_redacted
    # A name that the terminal cannot encode must not hide the message.
    for stream in (sys.stdout, sys.stderr):
        if isinstance(stream, io.TextIOWrapper):
            stream.reconfigure(errors="backslashreplace")
    if sys.stdout is None:
        # The calling process closed it.
        sys.stdout = open(os.devnull, "w")  # noqa: SIM115
    try:
        try:
            with raise_on_term(_Terminated):
                return _run(arguments)
        finally:
            # Flush here, where a closed pipe can be distinguished from an error of the job.
            sys.stdout.flush()
    except KeyboardInterrupt as error:
        return _fail("terminated", 143) if isinstance(error, _Terminated) else _fail("interrupted", 130)
    except BrokenPipeError:
        # The reader of the output is gone (`cmran ... | head`). Python would report it again when it closes stdout.
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 141
    except OSError as error:
        # A path that was not checked before it was used, or a disk that fails.
        if error.filename is not None:
            return _fail(f"error: {error.filename}: {error.strerror}: check the path, its permissions and its disk", 1)
        if error.errno not in (errno.ENOSPC, errno.EDQUOT, errno.EIO):
            raise
        # Possibly stdout itself cannot be written. Python would report it again when it closes stdout.
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return _fail(f"error: while reading or writing: {error.strerror}: check the disk", 1)


def parse(arguments: Sequence[str]) -> tuple[Command, BaseModel]:
    """Return the command and its checked parameters.

    Raises:
        SystemExit: The usage is wrong (exit code 2, after one line on stderr), or help was requested (0).
    """
    name = _parser().parse_args(arguments[:1]).command
    command, options = COMMANDS[name], list(arguments[1:])
    parser = _command_parser(name, command)
    if name == "evaluate" and any(option.partition("=")[0] in ("--seeds", "--resume") for option in options):
        parser.error("evaluate does not train: to train with several seeds, use `cmran seeds`")
    found, left = parser.parse_known_args(_plain_flags(options, command))
    given = vars(found)
    # argparse treats a positional that may be omitted as omitted if an option comes before it.
    for key in command.positionals:
        if left and given[key] is None and not left[0].startswith("-"):
            given[key] = left.pop(0)
    if left:
        parser.error(f"unrecognized arguments: {' '.join(left)}")
    # An empty value counts as not given: MLproject cannot omit an option.
    given = {
        key: [part for part in value if part] if isinstance(value, list) else value for key, value in given.items()
    }
    values = {key: value for key, value in given.items() if value not in (None, "", False, [])}
    try:
        return command, command.parameters.model_validate(values)
    except ValidationError as error:
        parser.error(_one_line(error, command))


def _run(arguments: Sequence[str]) -> int:
    command, parameters = parse(arguments)
    from cmran import tracking
    from flows.console import shown_logs

    module, _, function = command.job.partition(":")
    try:
        with shown_logs():
            ensure_home()
            # The run that `mlflow run` opened is adopted here, once, so that no job below adopts it again.
            run_id = tracking.adopt_run()
            if run_id is not None:
                tracking.check_adopted_run(run_id)
            result = getattr(importlib.import_module(module), function)(parameters, run_id=run_id)
    except CmranError as error:
        return _fail(f"error: {_with_flags(' '.join(str(error).split()), command)}", 1)
    print(result.text())
    return 0 if result.ok else 1


def _parser() -> _Parser:
    """Return the parser of the subcommand's name, which also lists all subcommands."""
    parser = _Parser(
        prog="cmran",
        description="Audio-visual event localization with CMRAN: validate features, search, train, release, predict.",
        epilog="Environment: MLFLOW_TRACKING_URI (default: mlflow.db in the current folder), CMRAN_STUDY_STORAGE "
        "(default: a SQLite file in the current folder), PREFECT_API_URL (default: a temporary server per pipeline).",
        allow_abbrev=False,
    )
    parser.add_argument("--version", action="version", version=f"cmran {__version__}")
    commands = parser.add_subparsers(dest="command", metavar="COMMAND", required=True)
    for name, command in COMMANDS.items():
        commands.add_parser(name, help=_about(command).split(". ")[0].rstrip("."))
    return parser


def _command_parser(name: str, command: Command) -> _Parser:
    """Return the parser of the arguments of one subcommand."""
    parser = _Parser(
        prog=f"cmran {name}",
        description=textwrap.fill(f"{_about(command)} {command.note}", 100),
        epilog="examples:\n" + "\n".join(f"  {line}" for line in command.examples),
        formatter_class=argparse.RawDescriptionHelpFormatter,
        allow_abbrev=False,
    )
    for key, info in command.parameters.model_fields.items():
        # On the command line, `mlflow run` sets the parent run.
        if key != "parent_run_id":
            _add(parser, command, key, info)
    return parser


def _about(command: Command) -> str:
    return " ".join((command.parameters.__doc__ or "").split())


def _add(parser: argparse.ArgumentParser, command: Command, key: str, info: FieldInfo) -> None:
    text = (info.description or "").replace("%", "%%")
    names = _names(command, key)
    if key in command.positionals:
        parser.add_argument(key, metavar=key.upper(), help=text, nargs=None if info.is_required() else "?")
    elif info.annotation is bool:
        parser.add_argument(*names, dest=key, action="store_true", help=text)
    elif key == "settings":
        parser.add_argument(*names, dest=key, metavar="KEY=VALUE", action="append", help=text)
    else:
        if info.default is not None and not info.is_required():
            text += f" [default: {_shown(info.default)}]"
        more: dict[str, Any] = {"nargs": "?", "const": command.const[key]} if key in command.const else {}
        # If a command can resume from OUT alone, the record itself checks what is missing, DATA first.
        required = info.is_required() and all(
            command.parameters.model_fields[name].is_required() for name in command.positionals
        )
        metavar = "NUMBER" if key in ("lr", "clip_norm") else _metavar(info.annotation)
        parser.add_argument(*names, dest=key, metavar=metavar, required=required, help=text, **more)


def _names(command: Command, key: str) -> tuple[str, ...]:
    return command.names.get(key, ("--" + key.replace("_", "-"),))


def _metavar(annotation: Any) -> str:
    if get_origin(annotation) is Literal:
        return "{" + ",".join(get_args(annotation)) + "}"
    inner = [_metavar(part) for part in get_args(annotation) if part is not type(None)]
    names = {int: "N", float: "SECONDS", Path: "PATH", str: "NAME"}
    return inner[0] if inner else names.get(annotation, "VALUE")


def _shown(value: Any) -> str:
    return ",".join(str(part) for part in value) if isinstance(value, tuple) else str(value)


def _plain_flags(options: Sequence[str], command: Command) -> list[str]:
    """Replace `--resume=true` by `--resume`, and drop `--resume=false` and `--resume=`; MLproject needs these forms."""
    values = {"true": True, "1": True, "yes": True, "false": False, "0": False, "no": False, "": False}
    fields = command.parameters.model_fields.items()
    flags = {name for key, info in fields if info.annotation is bool for name in _names(command, key)}
    plain = []
    for option in options:
        name, equals, value = option.partition("=")
        if name not in flags or not equals or value.lower() not in values:
            plain.append(option)
        elif values[value.lower()]:
            plain.append(name)
    return plain


def _written(command: Command, key: str) -> str:
    """Return how a field is written on the command line."""
    return key.upper() if key in command.positionals else _names(command, key)[-1]


def _with_flags(message: str, command: Command) -> str:
    """Replace the parameters in backticks by what the command calls them: `out` -> --out, `resume=True` -> --resume."""

    def written(match: re.Match[str]) -> str:
        key, value = match["key"], match["value"] or ""
        info = command.parameters.model_fields.get(key)
        if info is None or key == "parent_run_id":
            return match[0]
        if info.annotation is bool:
            return _written(command, key) + ("=false" if value == "False" else "")
        return f"{_written(command, key)} {value.strip(chr(34) + chr(39))}".strip()

    return re.sub(r"`(?P<key>\w+)(?:=(?P<value>[^`\s]+))?`", written, message)


def _one_line(error: ValidationError, command: Command) -> str:
    first = error.errors()[0]
    more = f" (and {error.error_count() - 1} more)" if error.error_count() > 1 else ""
    message = _with_flags(str(first["msg"]).removeprefix("Value error, "), command)
    if first["type"] == "needed":
        return f"{_written(command, first['ctx']['field'])} is required (it can be omitted only with --resume)"
    if not first["loc"]:
        return f"{message}{more}"
    key = str(first["loc"][0])
    name = _written(command, key)
    if first["type"] == "missing":
        return f"{name} is required{more}"
    return f"{name}: {message}, found {_shown(first['input'])!r}{more}"


class _Terminated(KeyboardInterrupt):
    """SIGTERM, handled like Ctrl-C so that open resources are closed in order."""


def _print_redacted(kind: type[BaseException], error: BaseException, trace: TracebackType | None) -> None:
    """Print the traceback of an unexpected error without passwords."""
    print(redact("".join(traceback.format_exception(kind, error, trace)).rstrip()), file=sys.stderr)


def _fail(message: str, code: int) -> int:
    print(redact(message), file=sys.stderr)
    return code
