"""What each job takes: one frozen record a job, every field described and bounded.

From these come the forms in Prefect's UI, the options of the `cmran` command and the checks of both.
"""

from pathlib import Path
from typing import Annotated, Any, ClassVar, Literal, Self

from pydantic import AfterValidator, BeforeValidator, Field, model_validator
from pydantic_core import PydanticCustomError

from cmran.config import (
    BatchSize,
    ClipNorm,
    Device,
    Epochs,
    Frozen,
    LearningRate,
    Mode,
    Precision,
    Seed,
    parse_settings,
)
from search.names import STUDY_NAME, STUDY_NAME_RULE, is_study_name

RunId = Annotated[str, Field(pattern="^[0-9a-f]{32}$")]


def _split(value: Any) -> Any:
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
Count = Annotated[int, Field(ge=1, le=10_000_000)]
Seconds = Annotated[float, Field(gt=0, le=1e8)]
Modes = Annotated[tuple[Mode, ...], Field(min_length=1, max_length=2), BeforeValidator(_split)]
Seeds = Annotated[tuple[Seed, ...], Field(min_length=1, max_length=100), BeforeValidator(_split)]
Settings = Annotated[dict[str, Any], BeforeValidator(lambda given: None if given is None else parse_settings(given))]

_DATA = "Folder of the feature files (HDF5, see the README's table)."
_MODE = "full: trained on segment labels; weak: trained on video labels."
_PARENT = "MLflow run to hang under; the pipeline fills it in."


class _Settings(Frozen):
    """What every job that trains takes, the pipeline too; an option left out leaves the recipe's value."""

    data: Path | None = Field(None, description=_DATA)
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


class _Training(_Settings):
    """What the jobs that train in one mode take."""

    mode: Mode | None = Field(None, description=_MODE)
    epochs: Epochs | None = Field(None, description="Number of epochs, instead of the recipe's.")
    batch_size: BatchSize | None = Field(None, description="Videos a step, the setting train.batch_size.")

    short = (*_Settings.short, "epochs", "batch_size")


def _require(values: Any, *names: str) -> Any:
    """`values`, after a check that `names` are given, unless a run is resumed, which has them."""
    if isinstance(values, dict) and not values.get("resume"):
        for name in names:
            if values.get(name) is None:
                raise PydanticCustomError("needed", "{field} is needed, unless a run is resumed", {"field": name})
    return values


class ValidateParameters(Frozen):
    """Check a folder of features and report every fault in it."""

    data: Path = Field(description=_DATA)
    mode: Mode = Field("full", description="weak: the background videos' files are needed and checked too.")
    report: Path | None = Field(None, description="JSON file to write the report to.")
    track: bool = Field(False, description="Keep the report as an artifact of an MLflow run.")
    parent_run_id: RunId | None = Field(None, description=_PARENT)


class SynthParameters(Frozen):
    """Make a folder in the published format, with made features that hold a real problem."""

    out: Path = Field(description="Folder to make; it must not exist or be empty.")
    videos: Count | None = Field(
        None, description="Number of videos. Default: 600, or all of the annotations' where these are given."
    )
    background_videos: Annotated[int, Field(ge=1, le=10_000_000)] | None = Field(
        None, description="Number of background-only videos (weak mode). Default: in proportion to the real folder."
    )
    annotations: Path | None = Field(None, description="Annotations.txt of the real labels.")
    orders: Path | None = Field(None, description="Folder of the real train, val and test order files.")
    dtype: Literal["float64", "float32", "float16"] = Field(
        "float64", description="Number format of the features; float64 as published."
    )
    seed: Seed = Field(0, description="Decides every number made.")
    segments: Annotated[int, Field(ge=1, le=1000)] = Field(10, description="Seconds a video.")
    grid: Annotated[int, Field(ge=1, le=64)] = Field(7, description="Cells along each side of a visual map.")
    visual_features: Annotated[int, Field(ge=1, le=8192)] = Field(512, description="Channels of a visual cell.")
    audio_features: Annotated[int, Field(ge=1, le=8192)] = Field(128, description="Width of an audio embedding.")


class TrainParameters(_Training):
    """Train CMRAN; the epoch that is best on val is kept, test is evaluated once at the end."""

    out: Path = Field(description="Run directory: last.pt, best.pt, metrics.json and more go there.")
    init: str | None = Field(
        None,
        min_length=1,
        description="Start from the weights of this model: a run directory, a checkpoint, a published .pth.tar, an "
        "MLflow run or models:/NAME@ALIAS. Optimizer and schedule are new.",
    )
    seed: Seed | None = Field(None, description="Decides weights, order and dropout, instead of the recipe's.")
    selection_split: Literal["val", "test"] | None = Field(
        None, description="Split that picks the best epoch. test is for comparison only and marks every figure."
    )
    resume: bool = Field(
        False,
        description="Continue the run in OUT, to the same numbers as undisturbed. OUT alone is enough; what else is "
        "given must be as in the run, except for a number of epochs.",
    )
    parent_run_id: RunId | None = Field(None, description=_PARENT)

    @model_validator(mode="before")
    @classmethod
    def _check_needed(cls, values: Any) -> Any:
        return _require(values, "data", "mode")

    short = (*_Training.short, "seed", "selection_split")


class EvaluateParameters(Frozen):
    """Score a trained model on a split."""

    checkpoint: str = Field(
        min_length=1, description="Folder of a run, best.pt, a published .pth.tar or an MLflow run."
    )
    data: Path = Field(description=_DATA)
    split: Literal["train", "val", "test"] = Field("test", description="The videos to score.")
    mode: Mode | None = Field(None, description="Of a published .pth.tar. Default: as its weights tell.")
    report: Path | None = Field(None, description="JSON file to write the figures to.")
    device: Device = Field("auto", description="auto takes a GPU where there is one.")
    precision: Precision | None = Field(None, description="Default: as the model was trained.")
    batch_size: BatchSize = Field(32, description="Videos at a time.")
    track: bool = Field(False, description="Keep the figures in an MLflow run.")
    parent_run_id: RunId | None = Field(None, description=_PARENT)


class SeedsParameters(_Training):
    """Train once a seed and report mean and spread."""

    seeds: Seeds | None = Field(None, description="Seeds, separated by commas: 456,457,458.")
    out: Path = Field(description="Folder that gets one run a seed and seeds.json.")
    report: Path | None = Field(None, description="JSON file to write the figures to, besides OUT/seeds.json.")
    selection_split: Literal["val", "test"] | None = Field(
        None, description="Split that picks the best epoch. test is for comparison only and marks every figure."
    )
    resume: bool = Field(
        False,
        description="Keep the finished seeds in OUT and continue with the others. OUT alone is enough; what else is "
        "given must be as before, except that seeds can be added.",
    )
    parent_run_id: RunId | None = Field(None, description=_PARENT)

    @model_validator(mode="before")
    @classmethod
    def _check_needed(cls, values: Any) -> Any:
        return _require(values, "data", "mode", "seeds")

    short = (*_Training.short, "selection_split")

    @model_validator(mode="after")
    def _check(self) -> Self:
        if self.seeds is not None and len(set(self.seeds)) != len(self.seeds):
            raise ValueError("each seed can be named once")
        return self


class SearchParameters(_Training):
    """Search for better settings with Optuna; trial 0 is the recipe itself."""

    data: Path = Field(description=_DATA)
    mode: Mode = Field(description=_MODE)
    trials: Trials = Field(
        20, description="Trials that the study shall have in the end; the same search again does what is left."
    )
    timeout_s: Seconds | None = Field(
        None, description="Start no trial after so many seconds; the running one ends with its epoch."
    )
    study: StudyName | None = Field(
        None, description="Name of the study; an existing one goes on. Default: named after mode and data."
    )
    seed: Seed = Field(0, description="Of the sampler.")
    out: Path | None = Field(None, description="Folder for trials, tables and best.yaml. Default: runs/STUDY.")
    parent_run_id: RunId | None = Field(None, description=_PARENT)


class ExportParameters(Frozen):
    """Write a trained model as ONNX and prove that it says the same as PyTorch."""

    checkpoint: str = Field(
        min_length=1, description="Folder of a run, best.pt, a published .pth.tar or the id of an MLflow run."
    )
    out: Path = Field(description="The ONNX file to write.")
    data: Path | None = Field(
        None, description="Folder whose val videos are compared too. Default: the model's own, if it is still there."
    )
    mode: Mode | None = Field(None, description="Of a published .pth.tar. Default: as its weights tell.")


class ReleaseParameters(Frozen):
    """Export, prove and register a model; it becomes champion or challenger."""

    checkpoint: str = Field(
        min_length=1, description="Folder of a run, best.pt, a published .pth.tar or the id of an MLflow run."
    )
    data: Path | None = Field(
        None, description="Folder whose val videos are compared too. Default: the model's own, if it is still there."
    )
    mode: Mode | None = Field(None, description="Of a published .pth.tar. Default: as its weights tell.")
    out: Path | None = Field(None, description="Keep the ONNX file here as well, its variants beside it.")
    variant: VariantChoice = Field(
        "auto",
        description="Faster variant to make besides float32; auto makes int8 (CPU) and float16 (CUDA). One that this "
        "machine cannot run, or that differs too much on val, is left out.",
    )
    study: str | None = Field(None, description="Name of the study that found the settings; a tag of the version.")
    parent_run_id: RunId | None = Field(None, description=_PARENT)


class PredictParameters(Frozen):
    """Predict the events of a folder's videos with a registered or exported model."""

    model: str = Field(min_length=1, description="models:/cmran-full@champion, models:/cmran-full/3 or a FILE.onnx.")
    data: Path = Field(description="Folder of the features; labels are not needed, and give metrics where they are.")
    out: Path = Field(description="Folder for segments.parquet, events.parquet and manifest.json.")
    split: Literal["train", "val", "test", "all"] = Field("test", description="The videos to predict.")
    device: Device = Field(
        "auto", description="cuda is an error without a working CUDA provider; auto says its choice."
    )
    variant: VariantChoice | None = Field(
        None,
        description="Number format: float32 says what the network says; auto takes the release's fastest for the "
        "device (int8 on a CPU, float16 on CUDA), with at least 99.5 % the same labels on val, and tells which. "
        "Default: float32 of a release; a FILE.onnx is taken as it is.",
    )
    batch_size: BatchSize = Field(32, description="Videos at a time.")
    resume: bool = Field(False, description="Go on with what a killed command left in OUT.")
    track: bool = Field(False, description="Keep the manifest in an MLflow run.")
    parent_run_id: RunId | None = Field(None, description=_PARENT)


class PackParameters(Frozen):
    """Pack the features of a folder in the cache folder, so that training reads a quarter of the bytes."""

    data: Path = Field(description=_DATA)
    mode: Mode = Field("full", description="weak: the background videos are packed, too.")


class CacheParameters(Frozen):
    """List the packed features in the cache folder, or remove them."""

    clear: str | None = Field(
        None,
        pattern="^(all|[0-9a-f]{32})$",
        description="Remove the packs of the data folder with this fingerprint; without one all packs.",
    )
    limit_gib: Annotated[int, Field(ge=1, le=1_000_000)] | None = Field(
        None, description="From now on keep at most so many GiB of packs; the least recently used go. At first 20."
    )


class PipelineParameters(_Settings):
    """The whole road: validate, then for each mode search, train, release and predict."""

    out: Path = Field(Path("runs/pipeline"), description="Each pipeline gets a folder of its own in here.")
    modes: Modes = Field(("full", "weak"), description="full, weak or full,weak.")
    trials: Trials = Field(20, description="Trials of each mode's search.")
    search_epochs: Epochs | None = Field(None, description="Epochs a trial. Default: the recipe's.")
    epochs: Epochs | None = Field(None, description="Epochs of the final training. Default: the recipe's.")
    timeout_s: Seconds | None = Field(None, description="Start no trial of a search after so many seconds.")
    seed: Seed | None = Field(None, description="Of the final training and the sampler, instead of the recipe's and 0.")
    batch_size: BatchSize = Field(32, description="Videos at a time in the batch inference.")
    resume: bool = Field(
        False,
        description="Continue the last pipeline in OUT that did not end. OUT alone is enough; what else is given must "
        "be as before.",
    )
    parent_run_id: RunId | None = Field(None, description=_PARENT)

    @model_validator(mode="before")
    @classmethod
    def _check_needed(cls, values: Any) -> Any:
        return _require(values, "data")

    short = (*_Settings.short, "epochs", "seed")

    @model_validator(mode="after")
    def _check(self) -> Self:
        if len(set(self.modes)) != len(self.modes):
            raise ValueError("modes: each mode can be named once")
        if self.search_epochs is not None and "train.epochs" in (self.settings or {}):
            raise ValueError("train.epochs among the settings is of search and training: give search_epochs and epochs")
        return self
