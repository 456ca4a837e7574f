"""Every setting with its default and its bounds, as frozen records that reject unknown keys.

The defaults are the published ones of full mode. A recipe (cmran/recipes/*.yaml) is a named set of settings.
"""

import difflib
import json
import math
import re
from collections.abc import Iterable, Mapping, Sequence
from importlib import resources
from importlib.resources.abc import Traversable
from pathlib import Path
from typing import Annotated, Any, Literal, Self, TypeVar, get_args

from pydantic import BaseModel, ConfigDict, Field, ValidationError, ValidationInfo, field_validator, model_validator

from cmran.errors import CmranError, ConfigError

Mode = Literal["full", "weak"]
"""full: supervised, trained on segment labels; weak: weakly supervised, trained on video labels."""
Precision = Literal["auto", "float32", "float64", "bfloat16"]
Device = Literal["auto", "cpu", "cuda"]
Split = Literal["train", "val", "test"]
SelectionSplit = Literal["val", "test", "unknown"]
"""The split that selected a model's epoch; unknown for a checkpoint in the published format without its run."""
Variant = Literal["float32", "float16", "int8"]
"""Number format of an exported model: int8 for the CPU, float16 for CUDA, float32 for both."""
Features = Literal["float16", "stored"]
"""Precision of the visual maps: rounded to float16, or as they are stored."""

T = TypeVar("T", bound=BaseModel)

Dropout = Annotated[float, Field(ge=0.0, lt=1.0)]
Epochs = Annotated[int, Field(ge=1, le=100_000)]
BatchSize = Annotated[int, Field(ge=1, le=4096)]
LearningRate = Annotated[float, Field(gt=0.0, le=1.0)]
ClipNorm = Annotated[float, Field(gt=0.0, le=1e6)]
Seed = Annotated[int, Field(ge=0, le=2**31 - 1)]

SEGMENT_S = 1.0
"""Duration of a segment in seconds."""


class Frozen(BaseModel):
    """Base class of all records: immutable, without unknown keys and without NaN."""

    model_config = ConfigDict(frozen=True, extra="forbid", allow_inf_nan=False)


class ModelConfig(Frozen):
    """Settings of the network. The defaults are the published CMRAN (9,509,150 parameters in full mode)."""

    mode: Mode = "full"
    """full: 28 class logits, trained on segment labels. weak: 29 class logits, trained on video labels."""
    visual_features: int = Field(512, ge=1, le=8192)
    """Channels of a visual cell (C); 512 for VGG-19 pool5."""
    audio_features: int = Field(128, ge=1, le=8192)
    """Width of an audio embedding (A); 128 for VGGish."""
    width: int = Field(256, ge=8, le=4096)
    """Width of the temporal, relation and interaction modules (D)."""
    heads: int = Field(4, ge=1, le=64)
    """Attention heads of the temporal and relation modules; must divide the width."""
    interaction_heads: int | None = Field(None, ge=1, le=64)
    """Attention heads of the interaction module. None: 4 in full mode and 2 in weak mode, as published."""
    layers: int = Field(2, ge=1, le=16)
    """Encoder layers of each internal temporal relation."""
    feedforward: int = Field(2048, ge=1, le=65536)
    """Width of the feed-forward networks."""
    bottleneck: int = Field(256, ge=1, le=8192)
    """Width of the bottleneck of the channel attention."""
    spatial_width: int = Field(256, ge=1, le=8192)
    """Width in which the spatial attention compares the audio with each cell."""
    dropout: Dropout = 0.1
    """Dropout of the temporal, relation and interaction modules."""
    visual_dropout: Dropout = 0.2
    """Dropout after the first linear layer, which is applied to every visual cell."""
    audio_only: bool = False
    """Ablation: ignore the visual features. The attention and the cross-modal modules are left out, too."""
    visual_only: bool = False
    """Ablation: ignore the audio features. The attention and the cross-modal modules are left out, too."""
    no_spatial_channel_attention: bool = False
    """Ablation: average the visual cells instead of attending to them."""
    no_cross_modal_relation: bool = False
    """Ablation: fuse the outputs of the internal temporal relations directly."""
    no_interaction: bool = False
    """Ablation: average the two modalities instead of letting them interact."""

    @property
    def classes(self) -> int:
        """Number of class logits (K): 28 in full mode, 29 in weak mode."""
        return 28 if self.mode == "full" else 29

    @property
    def ablations(self) -> list[str]:
        """Names of the ablations that are set."""
        names = ("audio_only", "visual_only", "no_spatial_channel_attention", "no_cross_modal_relation")
        return [name for name in (*names, "no_interaction") if getattr(self, name)]

    @property
    def effective_interaction_heads(self) -> int:
        """Attention heads of the interaction module after the default of the mode."""
        return self.interaction_heads or (4 if self.mode == "full" else 2)

    @model_validator(mode="after")
    def _check(self) -> Self:
        for name, heads in (("heads", self.heads), ("interaction_heads", self.effective_interaction_heads)):
            if self.width % heads:
                raise ValueError(f"width {self.width} must be a multiple of {name} {heads}")
        if self.audio_only and self.visual_only:
            raise ValueError("audio_only and visual_only exclude each other")
        return self


def milestones_of(shares: Iterable[float], epochs: int) -> tuple[int, ...]:
    """Convert shares of the training into epochs, counted from 1. Two shares may give the same epoch."""
    return tuple(sorted({max(1, round(share * epochs)) for share in shares}))


class TrainConfig(Frozen):
    """The training protocol.

    The defaults are the published ones of full mode, except that the epoch is selected on val and that training uses
    float32.
    """

    epochs: Epochs = 200
    """Number of epochs."""
    batch_size: BatchSize = 32
    """Videos in a training step; the last, shorter batch of an epoch is used, too."""
    lr: LearningRate = 5e-4
    """Adam's learning rate in the first epoch, without a warm-up."""
    lr_milestones: tuple[Annotated[int, Field(ge=1)], ...] = (10, 20, 30)
    """Epochs after which the learning rate is multiplied by `lr_factor`. Shares of the training between 0 and 1 are
    accepted and converted to epochs."""
    lr_factor: float = Field(0.5, gt=0.0, le=1.0)
    """Factor of the learning rate at each milestone."""
    lr_schedule: Literal["milestones", "cosine"] = "milestones"
    """milestones: multiply by `lr_factor` at `lr_milestones`. cosine: follow half a cosine wave after the warm-up, as
    torch.optim.lr_scheduler.CosineAnnealingLR does; `lr_milestones` and `lr_factor` are then unused."""
    lr_min_factor: float = Field(0.0, ge=0.0, le=1.0)
    """Cosine schedule only: the share of `lr` that the wave reaches after the last epoch."""
    warmup_epochs: int = Field(0, ge=0, le=100_000)
    """Epochs of linear warm-up. With W of them, epoch e uses e / (W + 1) of the schedule's learning rate."""
    weight_decay: float = Field(0.0, ge=0.0, le=1.0)
    """Adam's L2 penalty, as in torch.optim.Adam."""
    clip_norm: ClipNorm = 0.1
    """Bound on the global gradient norm."""
    seed: Seed = 456
    """Seed of the initial weights, the order of the videos and the dropout."""
    precision: Precision = "float32"
    """float64: as published. bfloat16: autocast; rejected on a device without native bfloat16. auto: bfloat16 if the
    device has it, else float32; the run stores the choice and keeps it."""
    features: Features | None = None
    """Visual maps rounded to float16, so that the feature cache can hold them, or as stored. None: float16, but stored
    for a training in float64."""
    background_videos: bool = True
    """Weak mode only: train on the background videos, too, as published."""
    max_batches: int | None = Field(None, ge=1)
    """Training steps per epoch, for debugging. None: the whole split."""
    eval_batch_size: BatchSize | None = None
    """Evaluation batch size. None: a size that fits the device (`cmran.training.inference.PREDICT_BATCH`)."""
    selection_split: Literal["val", "test"] = "val"
    """The split that selects the best epoch. test is the published rule, for comparison only: every score of the run
    is then marked as selected on test."""
    eval_every: int = Field(1, ge=1, le=100_000)
    """Evaluate after every N-th epoch and after the last one. Only an evaluated epoch can be the best."""
    patience: int | None = Field(None, ge=1, le=100_000)
    """Early stopping: stop after this number of consecutive evaluations without a better accuracy on
    `selection_split`. None: no early stopping."""

    @property
    def effective_features(self) -> Features:
        """The visual maps that training reads, after the default of the precision."""
        return self.features or ("stored" if self.precision == "float64" else "float16")

    @field_validator("lr_milestones", mode="before")
    @classmethod
    def _convert_shares(cls, value: Any, info: ValidationInfo) -> Any:
        shares = [item for item in value if isinstance(item, float)] if isinstance(value, list | tuple) else []
        if not any(0 < share < 1 for share in shares):
            return value
        if not all(isinstance(item, float) and 0 < item < 1 for item in value) or list(value) != sorted(set(value)):
            raise ValueError("must be all epochs or all shares between 0 and 1, in increasing order")
        # `epochs` is absent if it is invalid, which pydantic reports itself.
        return milestones_of(value, info.data.get("epochs", 1))

    def learning_rate(self, epoch: int) -> float:
        """Return Adam's learning rate in `epoch`, counted from 1.

        It depends only on the settings, so that a resumed run continues the schedule.
        """
        lr = self.lr * min(1.0, epoch / (self.warmup_epochs + 1))
        if self.lr_schedule == "milestones":
            return lr * self.lr_factor ** sum(milestone < epoch for milestone in self.lr_milestones)
        done = max(0, epoch - 1 - self.warmup_epochs) / (self.epochs - self.warmup_epochs)
        return lr * (self.lr_min_factor + (1 - self.lr_min_factor) * (1 + math.cos(math.pi * done)) / 2)

    def is_evaluated(self, epoch: int) -> bool:
        """Whether the network is evaluated after `epoch`, counted from 1."""
        return epoch % self.eval_every == 0 or epoch == self.epochs

    @model_validator(mode="after")
    def _check(self) -> Self:
        if list(self.lr_milestones) != sorted(set(self.lr_milestones)):
            raise ValueError(f"lr_milestones must be in increasing order, found {list(self.lr_milestones)}")
        if self.warmup_epochs >= self.epochs:
            raise ValueError(f"warmup_epochs {self.warmup_epochs} must be fewer than the epochs {self.epochs}")
        if self.lr_min_factor and self.lr_schedule != "cosine":
            raise ValueError(f"lr_min_factor {self.lr_min_factor} needs lr_schedule cosine, found {self.lr_schedule}")
        return self


class RunConfig(Frozen):
    """Everything that determines a training run, except the data."""

    recipe: str
    """Name of the recipe that the settings started from."""
    model: ModelConfig
    """Settings of the network."""
    train: TrainConfig
    """Settings of the training."""


class InitRecord(Frozen):
    """The source of the initial weights of a training."""

    source: str
    """As the user gave it: a run directory, a checkpoint, an MLflow run or a models:/ URI."""
    sha256: str
    """Digest of the checkpoint file that the weights were read from."""
    run_id: str | None = None
    """MLflow run that trained the weights, if known."""
    version: str | None = None
    """models:/NAME/VERSION, if the source is a registered model."""
    fingerprint: str | None = None
    """Fingerprint of the data the weights were trained on. None for a published checkpoint."""
    epoch: int | None = None
    """Epoch of the weights in that training."""
    selected_on_test: bool = False
    """Whether the epoch of the weights, or of a model that they were initialized from, was or may have been selected
    on the test split, as for a published checkpoint."""


def recipe_names() -> list[str]:
    """Return the names of the recipes in the package."""
    return sorted(p.name.removesuffix(".yaml") for p in _recipes().iterdir() if p.name.endswith(".yaml"))


def load_config(
    mode: Mode,
    recipe: str | None = None,
    config_file: Path | None = None,
    overrides: Mapping[str, Mapping[str, Any]] | None = None,
    *,
    base: RunConfig | None = None,
) -> RunConfig:
    """Merge the settings of a run: the recipe, then the configuration file, then `overrides`.

    A recipe or file has the keys `model` and `train`, and under `full` and `weak` the same two keys for settings that
    depend on the mode. A file for one mode only says `mode: ...`.

    Args:
        mode: The mode of the run.
        recipe: Name of a recipe. None: the one that the file names as `recipe: ...`, or `published-{mode}`.
        config_file: A YAML or JSON file.
        overrides: Further settings, as {"model": {...}, "train": {...}}.
        base: Settings that replace the recipe, such as those of a resumed run. The file must not name another recipe.

    Raises:
        ConfigError: A recipe is unknown or of the other mode, a file cannot be read, a key is unknown, or a value is
            out of bounds.
    """
    # Imported here because training with given settings does not need YAML.
    import yaml

    given = None if config_file is None else _read_yaml(config_file)
    named = given.get("recipe") if isinstance(given, Mapping) else None
    if base is not None:
        name = base.recipe
        if named not in (None, name):
            raise ConfigError(f"config file {config_file}: its recipe is {named!r}, expected {name!r}", "omit the file")
        layers: list[tuple[str, Any]] = [("base", base.model_dump(mode="json", exclude={"recipe"}))]
    else:
        name = recipe or named or f"published-{mode}"
        if name not in recipe_names():
            where = "" if recipe else f"config file {config_file}: "
            raise ConfigError(f"{where}unknown recipe {name!r}: expected one of {', '.join(recipe_names())}")
        layers = [(f"recipe {name}", yaml.safe_load((_recipes() / f"{name}.yaml").read_text(encoding="utf-8")))]
    if config_file is not None:
        layers.append((f"config file {config_file}", given))
    layers.append(("the options", dict(overrides or {})))
    return parse(RunConfig, {"recipe": name, **_merge(layers, mode)}, "settings")


def file_settings(mode: Mode, config_file: Path) -> dict[str, dict[str, Any]]:
    """Return the settings of a configuration file alone, as {"model": {...}, "train": {...}}.

    Raises:
        ConfigError: As `load_config`.
    """
    return _merge([(f"config file {config_file}", _read_yaml(config_file))], mode)


def _merge(layers: Iterable[tuple[str, Any]], mode: Mode) -> dict[str, dict[str, Any]]:
    """Merge the layers (source, content); a later one wins."""
    merged: dict[str, dict[str, Any]] = {"model": {"mode": mode}, "train": {}}
    for where, layer in layers:
        if layer is None:
            continue
        if not isinstance(layer, Mapping):
            raise ConfigError(
                f"{where}: expected a mapping with the keys model and train, found {type(layer).__name__}"
            )
        unknown = sorted(set(layer) - {"mode", "recipe", "model", "train", "full", "weak"}, key=str)
        if unknown:
            raise ConfigError(f"{where}: unknown key {unknown[0]!r}: expected model, train, full, weak, mode or recipe")
        if layer.get("mode", mode) != mode:
            raise ConfigError(f"{where} is for mode {layer['mode']!r}, but mode {mode!r} was asked for")
        for part in (layer, _mapping(layer.get(mode), where, mode)):
            for section in ("model", "train"):
                values = _mapping(part.get(section), where, section)
                _check_types(section, values, where)
                merged[section] |= values
    if merged["model"]["mode"] != mode:
        raise ConfigError(f"model.mode is {merged['model']['mode']!r}, but mode {mode!r} was asked for")
    return merged


def parse_settings(given: object) -> dict[str, Any]:
    """Parse settings into dotted keys, such as {"train.lr": 0.001, "model.width": 128}.

    Values are read as YAML. Numbers such as `1e-4`, which YAML 1.1 reads as text, become numbers.

    Args:
        given: One text or several of the form `KEY=VALUE`, where one text may hold several pairs separated by spaces;
            or a mapping, or the text of a YAML mapping, with dotted keys or with the keys `model` and `train`.

    Raises:
        ValueError: The form is wrong, a key is given twice, or a key is unknown; then the nearest keys are named.
    """
    found: dict[str, Any] = {}
    for text in given if isinstance(given, list | tuple) else [given]:
        for key, value in _pairs(text):
            if key not in _SETTINGS:
                raise ValueError(f"unknown setting {key!r}{_nearest(key)}")
            if key in found:
                raise ValueError(f"{key} is given twice, as {found[key]!r} and as {value!r}")
            found[key] = value
    return found


def _pairs(given: object) -> list[tuple[str, Any]]:
    """Split one text or mapping into keys and values."""
    import yaml

    if isinstance(given, str):
        try:
            if given.lstrip().startswith("{"):
                return _pairs(yaml.safe_load(given))
            pairs = []
            # A space ends a value only if another KEY= follows, so that a list may contain spaces.
            for part in re.split(r"\s+(?=[\w.-]+\s*=)", given.strip()):
                key, _, value = part.partition("=")
                if not key.strip() or not value.strip():
                    raise ValueError(f"expected KEY=VALUE, such as train.lr=0.001, found {part!r}; write null for none")
                pairs.append((key.strip(), _with_numbers(yaml.safe_load(value))))
            return pairs
        except yaml.YAMLError as error:
            raise ValueError(f"not readable as YAML: {' '.join(str(error).split())}") from None
    if not isinstance(given, Mapping):
        raise ValueError(f"expected KEY=VALUE or a mapping, found {type(given).__name__}")
    pairs = []
    for key, value in given.items():
        if key in ("model", "train") and isinstance(value, Mapping):
            pairs += [(f"{key}.{name}", _with_numbers(inner)) for name, inner in value.items()]
        else:
            pairs.append((str(key), _with_numbers(value)))
    return pairs


def _with_numbers(value: Any) -> Any:
    """Convert texts such as 1e-4, which YAML 1.1 does not read as numbers."""
    if isinstance(value, list):
        return [_with_numbers(part) for part in value]
    if isinstance(value, str) and re.fullmatch(r"[+-]?(\d+\.?\d*|\.\d+)[eE][+-]?\d+", value):
        return float(value)
    return value


def first_difference(before: RunConfig, after: RunConfig, *, ignore: Sequence[str] = ()) -> tuple[str, Any, Any] | None:
    """Return the dotted key and the two values of the first setting that differs. None: all are equal.

    Args:
        before: The first settings.
        after: The second settings.
        ignore: Dotted keys that are not compared.
    """
    first, second = before.model_dump(mode="json"), after.model_dump(mode="json")
    for key in _SETTINGS:
        section, _, name = key.partition(".")
        if key not in ignore and first[section][name] != second[section][name]:
            return key, first[section][name], second[section][name]
    return None


def as_sections(settings: Mapping[str, Any]) -> dict[str, dict[str, Any]]:
    """Group dotted keys by section: {"train.lr": 0.1} becomes {"train": {"lr": 0.1}}."""
    sections: dict[str, dict[str, Any]] = {}
    for key, value in settings.items():
        section, _, name = key.partition(".")
        sections.setdefault(section, {})[name] = value
    return sections


_SETTINGS = {
    f"{section}.{name}": info.annotation
    for section, kind in (("model", ModelConfig), ("train", TrainConfig))
    for name, info in kind.model_fields.items()
}
"""The type of every setting, by dotted key."""


def _nearest(key: str) -> str:
    """Name the settings with the nearest names, as the end of a message."""
    name = key.rpartition(".")[2]
    names = {known.partition(".")[2]: known for known in _SETTINGS}
    close = difflib.get_close_matches(key, _SETTINGS, n=3, cutoff=0.75)
    close += [names[near] for near in difflib.get_close_matches(name, names, n=3, cutoff=0.6)]
    close += [known for short, known in names.items() if name and (name in short or short in name)]
    nearest = list(dict.fromkeys(close))[:3]
    if nearest:
        return f": the nearest are {', '.join(nearest)}" if len(nearest) > 1 else f": the nearest is {nearest[0]}"
    return f": expected one of {', '.join(_SETTINGS)}"


def _check_types(section: str, values: Mapping[str, Any], where: str) -> None:
    """Reject true and false for a number: pydantic would read them as 1 and 0."""
    for name, value in values.items():
        kind = _SETTINGS.get(f"{section}.{name}")
        if isinstance(value, bool) and kind is not None and kind is not bool and bool not in get_args(kind):
            raise ConfigError(f"{where}: {section}.{name}: expected no boolean, found {str(value).lower()}")


def _mapping(values: object, where: str, key: str) -> Mapping[str, Any]:
    if values is None:
        return {}
    if not isinstance(values, Mapping):
        raise ConfigError(f"{where}: {key} must be a mapping, found {type(values).__name__}")
    return values


def parse(kind: type[T], values: Mapping[str, Any], where: str, error: type[CmranError] = ConfigError) -> T:
    """Validate plain values as a record.

    Args:
        kind: The class of the record.
        values: The values of its fields.
        where: Source of the values, the start of the error message.
        error: The exception to raise.

    Raises:
        CmranError: A value is invalid; the exception is of the class `error`. The message names the first bad key, its
            value and the rule.
    """
    try:
        return kind.model_validate(values)
    except ValidationError as invalid:
        first = invalid.errors()[0]
        key = ".".join(str(part) for part in first["loc"]) or "(whole)"
        found = "" if isinstance(first["input"], Mapping) else f", found {first['input']!r}"
        more = f" (and {invalid.error_count() - 1} more)" if invalid.error_count() > 1 else ""
        unknown = first["type"] == "extra_forbidden" and key.startswith(("model.", "train."))
        raise error(f"{where}: {key}: {first['msg']}{found}{_nearest(key) if unknown else ''}{more}") from None


def _read_yaml(path: Path) -> Any:
    import yaml

    try:
        text = path.read_text(encoding="utf-8")
        return json.loads(text) if path.suffix == ".json" else yaml.safe_load(text)
    except OSError as error:
        raise ConfigError(f"config file {path}: {error.strerror or error}") from None
    except (UnicodeDecodeError, yaml.YAMLError, json.JSONDecodeError) as error:
        raise ConfigError(f"config file {path}: not readable as YAML: {' '.join(str(error).split())}") from None


def _recipes() -> Traversable:
    return resources.files("cmran") / "recipes"
