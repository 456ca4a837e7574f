"""What several jobs share: types and base classes of parameters and results, reports, settings and MLflow runs."""

import contextlib
import itertools
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
from cmran.errors import ConfigError, DataError
from cmran.utils.markdown import markdown_table
from search.names import STUDY_NAME, STUDY_NAME_RULE, is_study_name

if TYPE_CHECKING:
    from cmran.tracking import Run


RunId = Annotated[str, Field(pattern="^[0-9a-f]{32}$")]


def split_commas(value: Any) -> Any:
    """Split a string of the command line: 'a,b' -> ['a', 'b']."""
    return [part.strip() for part in value.split(",")] if isinstance(value, str) else value


def _study_name(value: str) -> str:
    # Field(pattern=...) would report only the regular expression.
    if not is_study_name(value):
        raise ValueError(STUDY_NAME_RULE)
    return value


StudyName = Annotated[str, AfterValidator(_study_name), Field(json_schema_extra={"pattern": STUDY_NAME})]
VariantChoice = Literal["auto", "float32", "float16", "int8"]
Trials = Annotated[int, Field(ge=1, le=100_000)]
Seconds = Annotated[float, Field(gt=0, le=1e8)]
Settings = Annotated[dict[str, Any], BeforeValidator(lambda given: None if given is None else parse_settings(given))]

DATA_HELP = "Folder with the feature files (HDF5)."
MODE_HELP = "full: train on segment labels; weak: train on video labels."
PARENT_HELP = "Parent MLflow run; the pipeline sets it."
SELECTION_HELP = "Split that selects the best epoch. test is for comparison only and marks every score."
CHECKPOINT_HELP = "Run directory, checkpoint, published .pth.tar or id of an MLflow run."
CHECKPOINT_MODE_HELP = "Expected mode of the checkpoint. Default: the mode of its weights."
DEVICE_HELP = "auto uses a GPU if one is available."


class SettingsParameters(Frozen):
    """Parameters of every job that trains, the pipeline included; an omitted option keeps the recipe's value."""

    data: Path | None = Field(None, description=DATA_HELP)
    recipe: str | None = Field(
        None, description="Named settings: published-full, published-weak, demo or debug. Default: published-{mode}."
    )
    config: Path | None = Field(
        None, description="YAML or JSON file with the keys model and train; it overrides the recipe."
    )
    settings: Settings | None = Field(
        None,
        description="Any setting of model or train, such as train.lr=0.001 or train.lr_milestones=[5,10]. It overrides "
        "the recipe and the file. It can be repeated, with each setting once.",
    )
    lr: LearningRate | None = Field(None, description="Learning rate, the setting train.lr.")
    clip_norm: ClipNorm | None = Field(
        None, description="Upper bound of the gradient norm, the setting train.clip_norm."
    )
    device: Device = Field("auto", description=DEVICE_HELP)
    precision: Precision | None = Field(
        None,
        description="float32, float64 (as published), bfloat16 or auto (bfloat16 if the hardware supports it), instead "
        "of the recipe's.",
    )

    short: ClassVar[tuple[str, ...]] = ("lr", "clip_norm", "precision")
    """Fields that are short forms of the setting train.NAME."""

    def given_settings(self) -> dict[str, Any]:
        """Return the settings that were given as options, by their dotted keys."""
        given = {f"train.{name}": getattr(self, name) for name in self.short}
        return (self.settings or {}) | {key: value for key, value in given.items() if value is not None}

    @model_validator(mode="after")
    def _check_once(self) -> Self:
        for name in self.short:
            if getattr(self, name) is not None and f"train.{name}" in (self.settings or {}):
                raise ValueError(f"train.{name} is given twice, in `{name}` and in `settings`: give it once")
        return self


class SingleModeParameters(SettingsParameters):
    """Parameters of the jobs that train in one mode."""

    mode: Mode | None = Field(None, description=MODE_HELP)
    epochs: Epochs | None = Field(None, description="Number of epochs, instead of the recipe's.")
    batch_size: BatchSize | None = Field(None, description="Videos per step, the setting train.batch_size.")

    short = (*SettingsParameters.short, "epochs", "batch_size")


def require_fields(values: Any, *names: str) -> Any:
    """Check that the fields `names` are given, unless a run is resumed, which has them; return `values`."""
    if isinstance(values, dict) and not values.get("resume"):
        for name in names:
            if values.get(name) is None:
                raise PydanticCustomError("needed", "{field} is needed, unless a run is resumed", {"field": name})
    return values


SELECTED_ON_TEST = (
    "**Selected on the test split** (`selection_split: test`, the published rule): the scores are optimistic, for "
    "comparison only."
)


def marked(name: str, selection_split: SelectionSplit) -> str:
    """Return the name of a score, or of a group of scores, marked unless the model was selected on val."""
    return name + {"val": "", "test": "_selected_on_test", "unknown": "_selection_unknown"}[selection_split]


def split_heading(split: str, selection_split: SelectionSplit) -> str:
    """Return the heading of a split's scores, which says why a score does not measure new videos."""
    if split == "no_split":
        return "## Videos in no split"
    notes = {"train": " (training data: not a measure of new videos)"}
    if selection_split != "unknown":
        notes[selection_split] = " (the epoch was selected on it)"
    return f"## {split}{notes.get(split, '')}"


class Result(Protocol):
    """What the command line and the flows use of every result."""

    @property
    def ok(self) -> bool:
        """Whether the command succeeds."""

    def markdown(self) -> str:
        """Return the report as Markdown."""

    def text(self) -> str:
        """Return the report for a terminal."""


class MarkdownResult:
    """A result whose Markdown is readable on a terminal too."""

    def markdown(self) -> str:
        """Return the report; each result implements it."""
        raise NotImplementedError

    def text(self) -> str:
        """Return the Markdown with aligned tables."""
        return aligned(self.markdown())


def table(head: Sequence[str], rows: Iterable[Sequence[object]]) -> str:
    """Return a Markdown table with two digits for float cells; all columns but the first are right-aligned."""
    return markdown_table(head, rows, align="right", digits=2)


def aligned(markdown: str) -> str:
    """Return the same Markdown with the columns of its tables padded to equal width."""
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
    """Join the parts with blank lines."""
    return "\n\n".join(part.strip("\n") for part in parts)


def resolve_config(parameters: SingleModeParameters, base: RunConfig | None = None) -> RunConfig:
    """Return the settings of a training run: the recipe or `base`, then the file, then the given options."""
    mode = parameters.mode or (base.model.mode if base is not None else None)
    assert mode is not None
    overrides = as_sections(parameters.given_settings())
    return load_config(mode, parameters.recipe, parameters.config, overrides, base=base)


def resumed_config(parameters: SingleModeParameters, out: Path, recorded: RunConfig) -> RunConfig:
    """Return the recorded settings of the run in `out`, overridden by the given options.

    Raises:
        ConfigError: The mode, the recipe, or the number of epochs in the file differs. The file that started a run may
            be given again, although an option had set another number of epochs.
    """
    for name, before, now in (
        ("mode", recorded.model.mode, parameters.mode),
        ("recipe", recorded.recipe, parameters.recipe),
    ):
        if now not in (None, before):
            raise ConfigError(
                f"{out}: the run has {name} {before}, now it is {now}",
                f"omit `{name}` (a resumed run keeps its settings), or use another folder",
            )
    config = resolve_config(parameters, recorded)
    epochs = config.train.epochs
    if epochs != recorded.train.epochs and "train.epochs" not in parameters.given_settings():
        raise ConfigError(
            f"{out}: the run has train.epochs {recorded.train.epochs}, {parameters.config} says {epochs}",
            "omit `config` (a resumed run keeps its settings), or give `epochs` as well",
        )
    return config


def data_folder(out: Path, data: Path | None, recorded: Path) -> Path:
    """Return the given data folder, else the recorded one. Raises DataError if the recorded one no longer exists."""
    if data is None and not recorded.is_dir():
        raise DataError(f"{out}: its data folder {recorded} no longer exists", "pass its new location as `data`")
    return data or recorded


class Trackable(Protocol):
    """Parameters of a job that is logged to MLflow only on request."""

    @property
    def track(self) -> bool:
        """Whether to log the result to an MLflow run."""

    @property
    def parent_run_id(self) -> str | None:
        """The MLflow run that the job belongs to."""


def is_tracked(parameters: Trackable, run_id: str | None) -> bool:
    """Return whether the job is logged to MLflow. If so, connect to the store first, before any work."""
    wanted = run_id is not None or parameters.track or parameters.parent_run_id is not None
    if wanted:
        tracking.connect()
        if parameters.parent_run_id is not None:
            tracking.open_run(parameters.parent_run_id)
    return wanted


@contextlib.contextmanager
def mlflow_run(job: str, name: str, mode: str, parent_run_id: str | None, run_id: str | None) -> Iterator["Run"]:
    """Open the MLflow run of a job: the adopted run `run_id`, else a new one in the experiment of the mode."""
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
    """Return the scores of an `Evaluation.to_dict()` as metrics, without the keys that describe the computation."""
    described = ("bootstrap", "seed", "segments")
    return tracking.numbers({key: value for key, value in scores.items() if key not in described}, prefix)
