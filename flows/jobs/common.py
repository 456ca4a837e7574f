"""What each job takes: one frozen record a job, every field described and bounded.

From these come the forms in Prefect's UI, the options of the `cmran` command and the checks of both.
"""

import contextlib
import itertools
import logging
import re
from collections.abc import Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, ClassVar, Literal, Protocol, Self

from pydantic import AfterValidator, BeforeValidator, Field, model_validator
from pydantic_core import PydanticCustomError

from cmran import tracking
from cmran.config import (
    BatchSize,
    ClipNorm,
    Device,
    Epochs,
    Frozen,
    LearningRate,
    Mode,
    Precision,
    RunConfig,
    SelectionSplit,
    as_sections,
    load_config,
    parse_settings,
)
from cmran.errors import CmranError
from search.names import STUDY_NAME, STUDY_NAME_RULE, is_study_name

if TYPE_CHECKING:
    from cmran.tracking import Run


RunId = Annotated[str, Field(pattern="^[0-9a-f]{32}$")]


def split_commas(value: Any) -> Any:
    """'a,b' as one reads it on a command line -> ['a', 'b']."""
    return [part.strip() for part in value.split(",")] if isinstance(value, str) else value


def _study_name(value: str) -> str:
    # Not Field(pattern=...), whose message is the pattern.
    if not is_study_name(value):
        raise ValueError(STUDY_NAME_RULE)
    return value


StudyName = Annotated[str, AfterValidator(_study_name), Field(json_schema_extra={"pattern": STUDY_NAME})]


VariantChoice = Literal["auto", "float32", "float16", "int8"]


Trials = Annotated[int, Field(ge=1, le=100_000)]


Seconds = Annotated[float, Field(gt=0, le=1e8)]


Settings = Annotated[dict[str, Any], BeforeValidator(lambda given: None if given is None else parse_settings(given))]


DATA_HELP = "Folder of the feature files (HDF5, see the README's table)."


MODE_HELP = "full: trained on segment labels; weak: trained on video labels."


PARENT_HELP = "MLflow run to hang under; the pipeline fills it in."


class SettingsParameters(Frozen):
    """What every job that trains takes, the pipeline too; an option left out leaves the recipe's value."""

    data: Path | None = Field(None, description=DATA_HELP)
    recipe: str | None = Field(
        None, description="Named settings: published-full, published-weak, demo or debug. Default: published-{mode}."
    )
    config: Path | None = Field(
        None, description="YAML or JSON file with the keys model and train; it goes over the recipe."
    )
    settings: Settings | None = Field(
        None,
        description="Any setting of model or train, such as train.lr=0.001 or train.lr_milestones=[5,10]; it goes over "
        "recipe and file, and can be given several times, but each setting once.",
    )
    lr: LearningRate | None = Field(None, description="Learning rate, the setting train.lr.")
    clip_norm: ClipNorm | None = Field(None, description="Bound on the gradient norm, the setting train.clip_norm.")
    device: Device = Field("auto", description="auto takes a GPU where there is one.")
    precision: Precision | None = Field(
        None,
        description="float32, float64 (as published), bfloat16 or auto (bfloat16 where the hardware has it), instead "
        "of the recipe's.",
    )

    short: ClassVar[tuple[str, ...]] = ("lr", "clip_norm", "precision")
    # Fields that are the setting train.NAME.

    def given_settings(self) -> dict[str, Any]:
        """The settings that were given as options, by their dotted keys."""
        given = {f"train.{name}": getattr(self, name) for name in self.short}
        return (self.settings or {}) | {key: value for key, value in given.items() if value is not None}

    @model_validator(mode="after")
    def _check_once(self) -> Self:
        for name in self.short:
            if getattr(self, name) is not None and f"train.{name}" in (self.settings or {}):
                raise ValueError(f"train.{name} is given twice, as {name} and among the settings: give it once")
        return self


class SingleModeParameters(SettingsParameters):
    """What the jobs that train in one mode take."""

    mode: Mode | None = Field(None, description=MODE_HELP)
    epochs: Epochs | None = Field(None, description="Number of epochs, instead of the recipe's.")
    batch_size: BatchSize | None = Field(None, description="Videos a step, the setting train.batch_size.")

    short = (*SettingsParameters.short, "epochs", "batch_size")


def require_fields(values: Any, *names: str) -> Any:
    """`values`, after a check that `names` are given, unless a run is resumed, which has them."""
    if isinstance(values, dict) and not values.get("resume"):
        for name in names:
            if values.get(name) is None:
                raise PydanticCustomError("needed", "{field} is needed, unless a run is resumed", {"field": name})
    return values


SELECTED_ON_TEST = (
    "**Selected on the test split** (`selection_split: test`, the published rule): for comparison only, "
    "too high for an honest figure."
)


def marked(name: str, selection_split: SelectionSplit) -> str:
    """The name of a figure, or of a group of them, with the mark of a model that was not surely selected on val."""
    return name + {"val": "", "test": "_selected_on_test", "unknown": "_selection_unknown"}[selection_split]


def headed(split: str, selection_split: SelectionSplit) -> str:
    """The heading of a split's scores: which of them are no measure of new videos, and why."""
    if split == "no_split":
        return "## Videos in no split"
    notes = {"train": " (training data: no measure of new videos)"}
    if selection_split != "unknown":
        notes[selection_split] = " (the epoch was selected on it)"
    return f"## {split}{notes.get(split, '')}"


class Result(Protocol):
    """What the command line and the flows need of every result."""

    @property
    def ok(self) -> bool:
        """Whether the command succeeds."""

    def markdown(self) -> str:
        """What a person wants to know of it."""

    def text(self) -> str:
        """The same on a terminal."""


class MarkdownResult:
    """A result whose Markdown is fit for a terminal too."""

    def markdown(self) -> str:
        """The report; implemented by each result."""
        raise NotImplementedError

    def text(self) -> str:
        """The Markdown with its tables in line."""
        return aligned(self.markdown())


def table(head: Sequence[str], rows: Iterable[Sequence[object]]) -> str:
    """A Markdown table, all columns but the first to the right."""
    lines = [head, ["---", *(["---:"] * (len(head) - 1))], *([_cell(value) for value in row] for row in rows)]
    return "\n".join(f"| {' | '.join(line)} |" for line in lines)


def aligned(markdown: str) -> str:
    """The same Markdown with the columns of its tables in line, for reading as plain text."""
    lines, done = markdown.split("\n"), list[str]()
    for is_table, group in itertools.groupby(lines, key=lambda line: line.startswith("|")):
        part = list(group)
        done += _aligned_table(part) if is_table else part
    return "\n".join(done)


def _aligned_table(lines: list[str]) -> list[str]:
    rows = [[cell.strip() for cell in re.split(r"(?<!\\)\|", line)[1:-1]] for line in lines]
    rule = rows[1] if len(rows) > 1 else []
    widths = [max(len(row[i]) if i < len(row) and row is not rule else 3 for row in rows) for i in range(len(rows[0]))]

    def padded(row: list[str]) -> str:
        cells = []
        for cell, mark, width in zip(row, rule, widths, strict=True):
            if row is rule:
                cells.append("-" * (width - 1) + ":" if mark.endswith(":") else "-" * width)
            else:
                cells.append(cell.rjust(width) if mark.endswith(":") else cell.ljust(width))
        return f"| {' | '.join(cells)} |"

    return [padded(row) for row in rows] if rule and all(len(row) == len(rule) for row in rows) else lines


def paragraphs(parts: Iterable[str]) -> str:
    """The parts, separated by blank lines."""
    return "\n\n".join(part.strip("\n") for part in parts)


def _cell(value: object) -> str:
    if value is None:
        return "-"
    text = f"{value:.2f}" if isinstance(value, float) else str(value)
    return text.replace("|", "\\|")


log = logging.getLogger(__name__)


def config_of(parameters: SingleModeParameters, base: RunConfig | None = None) -> RunConfig:
    """Settings of a training: recipe, or `base` in its place, then the file, then the options that were given."""
    mode = parameters.mode or (base.model.mode if base is not None else None)
    assert mode is not None
    overrides = as_sections(parameters.given_settings())
    return load_config(mode, parameters.recipe, parameters.config, overrides, base=base)


def resumed_config(parameters: SingleModeParameters, out: Path, there: RunConfig) -> RunConfig:
    """The settings `there` of what is in OUT, and over them what was given.

    Raises CmranError for another mode or recipe, and for another number of epochs in the file: a file that was given to
    start a run may be given again, where the run's own number came from an option.
    """
    for name, before, now in (
        ("mode", there.model.mode, parameters.mode),
        ("recipe", there.recipe, parameters.recipe),
    ):
        if now not in (None, before):
            raise CmranError(
                f"{out}: the run was made with {name} {before}, now it is {now}: leave it out (a resumed run keeps its"
                " settings), or name another folder"
            )
    config = config_of(parameters, there)
    epochs = config.train.epochs
    if epochs != there.train.epochs and "train.epochs" not in parameters.given_settings():
        raise CmranError(
            f"{out}: the run was made with train.epochs {there.train.epochs}, {parameters.config} says {epochs}: leave"
            " the file out (a resumed run keeps its settings), or give the number of epochs as well"
        )
    return config


def data_folder(out: Path, data: Path | None, recorded: Path) -> Path:
    """The data folder that was given, else the recorded one. Raises CmranError where that is gone."""
    if data is None and not recorded.is_dir():
        raise CmranError(f"{out}: its data folder {recorded} is not there any more: give the folder where it is now")
    return data or recorded


class Trackable(Protocol):
    """Parameters of a job that MLflow keeps only where it is asked to."""

    @property
    def track(self) -> bool:
        """Whether to keep the result in an MLflow run."""

    @property
    def parent_run_id(self) -> str | None:
        """MLflow run that the job belongs to."""


def is_tracked(parameters: Trackable, run_id: str | None) -> bool:
    """Whether the job is kept in MLflow. If so the store is asked at once, before any work."""
    from cmran import tracking

    wanted = run_id is not None or parameters.track or parameters.parent_run_id is not None
    if wanted:
        tracking.connect()
        if parameters.parent_run_id is not None:
            tracking.open_run(parameters.parent_run_id)
    return wanted


@contextlib.contextmanager
def mlflow_run(job: str, name: str, mode: str, parent_run_id: str | None, run_id: str | None) -> Iterator["Run"]:
    """An MLflow run for a job: the adopted one `run_id`, else a new one in the mode's experiment."""
    from cmran import tracking

    with tracking.start_run(
        experiment=tracking.experiment_of(mode),
        name=f"{job} {name}".strip(),
        parent_run_id=parent_run_id,
        run_id=run_id,
        tags={"cmran.job": job, "cmran.mode": mode},
        system_metrics=False,
    ) as run:
        yield run


def score_metrics(scores: Mapping[str, Any], prefix: str) -> dict[str, float | None]:
    """The figures of an `Evaluation.to_dict()` as metrics, without those that say how it was computed."""
    how = ("bootstrap", "seed", "segments")
    return tracking.numbers({key: value for key, value in scores.items() if key not in how}, prefix)
