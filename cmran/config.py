"""Every setting, its default and its bounds: frozen records that refuse unknown keys.

The defaults are the published ones (full mode). A recipe (cmran/recipes/*.yaml) is a named set of settings.
"""

import difflib
import json
import math
import re
from collections.abc import Iterable, Mapping, Sequence
from importlib import resources
from pathlib import Path
from typing import Annotated, Any, Literal, Self, TypeVar, get_args

from pydantic import BaseModel, ConfigDict, Field, ValidationError, ValidationInfo, field_validator, model_validator

from cmran.errors import CmranError

Mode = Literal["full", "weak"]
Precision = Literal["auto", "float32", "float64", "bfloat16"]
Device = Literal["auto", "cpu", "cuda"]
Split = Literal["train", "val", "test"]
SelectionSplit = Literal["val", "test", "unknown"]
"""The split that picked a model's epoch; unknown for a published-format checkpoint without its run."""
Variant = Literal["float32", "float16", "int8"]
# Number format of an exported model: int8 for the CPU, float16 for CUDA, float32 for both.
Features = Literal["float16", "stored"]

T = TypeVar("T", bound=BaseModel)

Dropout = Annotated[float, Field(ge=0.0, lt=1.0)]
Epochs = Annotated[int, Field(ge=1, le=100_000)]
BatchSize = Annotated[int, Field(ge=1, le=4096)]
LearningRate = Annotated[float, Field(gt=0.0, le=1.0)]
ClipNorm = Annotated[float, Field(gt=0.0, le=1e6)]
Seed = Annotated[int, Field(ge=0, le=2**31 - 1)]

SEGMENT_S = 1.0
"""Seconds that one segment covers."""


class Frozen(BaseModel):
    """Base of all settings: immutable, no unknown keys, no NaN."""

    model_config = ConfigDict(frozen=True, extra="forbid", allow_inf_nan=False)


class ModelConfig(Frozen):
    """The network. Defaults: the published CMRAN (9,509,150 parameters in full mode)."""

    mode: Mode = "full"
    # "full": 28 class logits, trained on segment labels; "weak": 29, trained on video labels.
    visual_features: int = Field(512, ge=1, le=8192)
    # C, channels of a visual cell (VGG-19 pool5: 512).
    audio_features: int = Field(128, ge=1, le=8192)
    # A, width of an audio embedding (VGGish: 128).
    width: int = Field(256, ge=8, le=4096)
    # d, width of the temporal, relation and interaction modules.
    heads: int = Field(4, ge=1, le=64)
    # Attention heads of the temporal and relation modules; must divide the width.
    interaction_heads: int | None = Field(None, ge=1, le=64)
    # Attention heads of the interaction module; None: 4 in full mode, 2 in weak mode, as published.
    layers: int = Field(2, ge=1, le=16)
    # Encoder layers of each internal temporal relation.
    feedforward: int = Field(2048, ge=1, le=65536)
    # Width of the feed-forward networks.
    bottleneck: int = Field(256, ge=1, le=8192)
    # Width of the bottleneck of the channel attention.
    spatial_width: int = Field(256, ge=1, le=8192)
    # Width in which the spatial attention compares sound and cell.
    dropout: Dropout = 0.1
    # Dropout of the temporal, relation and interaction modules.
    visual_dropout: Dropout = 0.2
    # Dropout after the first linear layer on every visual cell.

    # Ablations: each takes one part out; without a modality the attention and the cross-modal parts go, too.
    audio_only: bool = False
    visual_only: bool = False
    no_spatial_channel_attention: bool = False
    no_cross_modal_relation: bool = False
    no_interaction: bool = False

    @property
    def classes(self) -> int:
        """Width of the class logits: 28 in full mode, 29 in weak mode."""
        return 28 if self.mode == "full" else 29

    @property
    def ablations(self) -> list[str]:
        """Names of the ablations that are set."""
        names = ("audio_only", "visual_only", "no_spatial_channel_attention", "no_cross_modal_relation")
        return [name for name in (*names, "no_interaction") if getattr(self, name)]

    @property
    def effective_interaction_heads(self) -> int:
        """Heads of the interaction module after the mode's default."""
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
    """The epochs, from 1, that are the given shares of all epochs; two shares may fall on one."""
    return tuple(sorted({max(1, round(share * epochs)) for share in shares}))


class TrainConfig(Frozen):
    """The training protocol. Defaults: as published for full mode, but the epoch is selected on val, in float32."""

    epochs: Epochs = 200
    batch_size: BatchSize = 32
    # Videos a step; the last short batch of an epoch is kept.
    lr: LearningRate = 5e-4
    # Adam's learning rate at the first epoch.
    lr_milestones: tuple[Annotated[int, Field(ge=1)], ...] = (10, 20, 30)
    # Epochs after which the learning rate is multiplied by lr_factor. Where all are shares between 0 and 1, they are
    # turned into epochs of this training at once.
    lr_factor: float = Field(0.5, gt=0.0, le=1.0)
    lr_schedule: Literal["milestones", "cosine"] = "milestones"
    # How the learning rate falls: at lr_milestones, or along half a cosine wave over the epochs after the warm-up, as
    # torch.optim.lr_scheduler.CosineAnnealingLR does; cosine leaves lr_milestones and lr_factor unused.
    lr_min_factor: float = Field(0.0, ge=0.0, le=1.0)
    # Cosine only: the share of lr that the wave ends at, after the last epoch.
    warmup_epochs: int = Field(0, ge=0, le=100_000)
    # Epochs of linear warm-up: of W, epoch e has e / (W + 1) of the schedule's learning rate.
    weight_decay: float = Field(0.0, ge=0.0, le=1.0)
    # Adam's L2 term, as in torch.optim.Adam.
    clip_norm: ClipNorm = 0.1
    # Bound on the global gradient norm.
    seed: Seed = 456
    precision: Precision = "float32"
    # "float64" as published; "bfloat16": autocast, refused on a machine without it in hardware; "auto": bfloat16 where
    # it is in hardware, else float32. A run keeps what auto took.
    features: Features | None = None
    # Visual maps "float16", rounded so that they can be packed, or as "stored". None: float16, but stored for float64.
    background_videos: bool = True
    # Weak mode only: train on the background videos too, as published.
    max_batches: int | None = Field(None, ge=1)
    # Stop each epoch after so many steps (debugging).
    eval_batch_size: BatchSize | None = None
    # Videos at a time where nothing is learnt. None: as suits the device (cmran.training.inference.predict).
    selection_split: Literal["val", "test"] = "val"
    # The split that picks the best epoch. "test" is the published rule, for comparison only: it marks every figure.
    eval_every: int = Field(1, ge=1, le=100_000)
    # Evaluate after every so many epochs, and always after the last one. Only an evaluated epoch can be the best.
    patience: int | None = Field(None, ge=1, le=100_000)
    # Early stopping: end after so many evaluations in a row without a better accuracy on selection_split. None: never.

    @property
    def effective_features(self) -> Features:
        """The visual maps that training reads, after the default."""
        return self.features or ("stored" if self.precision == "float64" else "float16")

    @field_validator("lr_milestones", mode="before")
    @classmethod
    def _take_shares(cls, value: Any, info: ValidationInfo) -> Any:
        shares = [item for item in value if isinstance(item, float)] if isinstance(value, list | tuple) else []
        if not any(0 < share < 1 for share in shares):
            return value
        if not all(isinstance(item, float) and 0 < item < 1 for item in value) or list(value) != sorted(set(value)):
            raise ValueError("either all are epochs or all are shares between 0 and 1, and they must rise")
        # Bad epochs are reported themselves.
        return milestones_of(value, info.data.get("epochs", 1))

    def learning_rate(self, epoch: int) -> float:
        """Adam's learning rate in `epoch` (from 1). It depends on the settings alone, so a resumed run continues it."""
        lr = self.lr * min(1.0, epoch / (self.warmup_epochs + 1))
        if self.lr_schedule == "milestones":
            return lr * self.lr_factor ** sum(milestone < epoch for milestone in self.lr_milestones)
        done = max(0, epoch - 1 - self.warmup_epochs) / (self.epochs - self.warmup_epochs)
        return lr * (self.lr_min_factor + (1 - self.lr_min_factor) * (1 + math.cos(math.pi * done)) / 2)

    def is_evaluated(self, epoch: int) -> bool:
        """Whether the network is evaluated after `epoch` (from 1)."""
        return epoch % self.eval_every == 0 or epoch == self.epochs

    @model_validator(mode="after")
    def _check(self) -> Self:
        if list(self.lr_milestones) != sorted(set(self.lr_milestones)):
            raise ValueError(f"lr_milestones must rise, found {list(self.lr_milestones)}")
        if self.warmup_epochs >= self.epochs:
            raise ValueError(f"warmup_epochs {self.warmup_epochs} must be fewer than the epochs {self.epochs}")
        if self.lr_min_factor and self.lr_schedule != "cosine":
            raise ValueError(f"lr_min_factor {self.lr_min_factor} needs lr_schedule cosine, found {self.lr_schedule}")
        return self


class RunConfig(Frozen):
    """All that decides a training run, besides the data."""

    recipe: str
    model: ModelConfig
    train: TrainConfig


class InitRecord(Frozen):
    """Where the initial weights of a training come from."""

    source: str
    # As it was given: a run directory, a checkpoint, an MLflow run or a models:/ URI.
    sha256: str
    # Of the checkpoint file that the weights were read from.
    run_id: str | None = None
    # MLflow run that trained them, as far as known.
    version: str | None = None
    # models:/NAME/VERSION, where a registered model was named.
    fingerprint: str | None = None
    # Of the data they were trained on; None for a published checkpoint.
    epoch: int | None = None
    # Their epoch in that training.
    selected_on_test: bool = False
    # Whether that epoch, or that of a model that it was itself initialized from, was selected on the test split, or may
    # have been, as that of a published checkpoint.


def recipe_names() -> list[str]:
    """Names of the recipes that ship with the package."""
    return sorted(p.name.removesuffix(".yaml") for p in _recipes().iterdir() if p.name.endswith(".yaml"))


def load_config(
    mode: Mode,
    recipe: str | None = None,
    config_file: Path | None = None,
    overrides: Mapping[str, Mapping[str, Any]] | None = None,
    *,
    base: RunConfig | None = None,
) -> RunConfig:
    """Settings of a run: recipe, then the file's, then `overrides` ({"model": {...}, "train": {...}}).

    `recipe` defaults to the one that the file names as `recipe: ...`, or to ``published-{mode}``. A recipe or file has
    the keys `model` and `train`, and under `full` and `weak` the same two again for what differs by mode; one for a
    single mode says `mode: ...`. `base`: settings that take the place of the recipe, such as those of a run that is
    resumed; the file may name no other recipe than theirs.

    Raises CmranError: unknown recipe, unreadable file, unknown key, value out of bounds, recipe of the other mode.
    """
    # Not at the top: training with settings of its own (benchmarks.cuda) needs no YAML.
    import yaml

    given = None if config_file is None else _read_yaml(config_file)
    named = given.get("recipe") if isinstance(given, Mapping) else None
    if base is not None:
        name = base.recipe
        if named not in (None, name):
            raise CmranError(
                f"config file {config_file}: its recipe is {named!r}, expected {name!r}: leave the file out"
            )
        layers: list[tuple[str, Any]] = [("base", base.model_dump(mode="json", exclude={"recipe"}))]
    else:
        name = recipe or named or f"published-{mode}"
        if name not in recipe_names():
            where = "" if recipe else f"config file {config_file}: "
            raise CmranError(f"{where}unknown recipe {name!r}: expected one of {', '.join(recipe_names())}")
        layers = [(f"recipe {name}", yaml.safe_load((_recipes() / f"{name}.yaml").read_text(encoding="utf-8")))]
    if config_file is not None:
        layers.append((f"config file {config_file}", given))
    layers.append(("the options", dict(overrides or {})))
    return parse(RunConfig, {"recipe": name, **_merge(layers, mode)}, "settings")


def file_settings(mode: Mode, config_file: Path) -> dict[str, dict[str, Any]]:
    """What a config file alone sets in a mode: {"model": {...}, "train": {...}}. Raises CmranError as `load_config`."""
    return _merge([(f"config file {config_file}", _read_yaml(config_file))], mode)


def _merge(layers: Iterable[tuple[str, Any]], mode: Mode) -> dict[str, dict[str, Any]]:
    """The layers (where it is from, what it says) over one another."""
    merged: dict[str, dict[str, Any]] = {"model": {"mode": mode}, "train": {}}
    for where, layer in layers:
        if layer is None:
            continue
        if not isinstance(layer, Mapping):
            raise CmranError(f"{where}: expected a mapping with the keys model and train, found {type(layer).__name__}")
        unknown = sorted(set(layer) - {"mode", "recipe", "model", "train", "full", "weak"}, key=str)
        if unknown:
            raise CmranError(f"{where}: unknown key {unknown[0]!r}: expected model, train, full, weak, mode or recipe")
        if layer.get("mode", mode) != mode:
            raise CmranError(f"{where} is for mode {layer['mode']!r}, but mode {mode!r} was asked for")
        for part in (layer, _mapping(layer.get(mode), where, mode)):
            for section in ("model", "train"):
                values = _mapping(part.get(section), where, section)
                _check_types(section, values, where)
                merged[section] |= values
    if merged["model"]["mode"] != mode:
        raise CmranError(f"model.mode is {merged['model']['mode']!r}, but mode {mode!r} was asked for")
    return merged


def parse_settings(given: object) -> dict[str, Any]:
    """Settings by their dotted keys: {"train.lr": 0.001, "model.width": 128}.

    `given`: one or several texts of the form `KEY=VALUE`, several in one text separated by spaces; or a mapping, or the
    text of a YAML mapping, with dotted keys or with the keys `model` and `train`. A value is read as YAML, and what
    YAML 1.1 calls a text but everybody reads as a number (`1e-4`) is a number.

    Raises ValueError: not of that form, an unknown key (the nearest ones are named), a key given twice.
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
    """The keys and values of one text or mapping."""
    import yaml

    if isinstance(given, str):
        try:
            if given.lstrip().startswith("{"):
                return _pairs(yaml.safe_load(given))
            pairs = []
            # A space ends a value where another KEY= follows; within a list it does not.
            for part in re.split(r"\s+(?=[\w.-]+\s*=)", given.strip()):
                key, _, value = part.partition("=")
                if not key.strip() or not value.strip():
                    raise ValueError(
                        f"expected KEY=VALUE, such as train.lr=0.001, found {part!r}; none is written null"
                    )
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
    """`value` with the texts in it that are numbers to everybody but YAML 1.1 as numbers: 1e-4, 1e3."""
    if isinstance(value, list):
        return [_with_numbers(part) for part in value]
    if isinstance(value, str) and re.fullmatch(r"[+-]?(\d+\.?\d*|\.\d+)[eE][+-]?\d+", value):
        return float(value)
    return value


def first_difference(there: RunConfig, now: RunConfig, *, but: Sequence[str] = ()) -> tuple[str, Any, Any] | None:
    """The first setting that differs, by its dotted key, and its two values; None where there is none.

    `but`: dotted keys that are not compared.
    """
    before, after = there.model_dump(mode="json"), now.model_dump(mode="json")
    for key in _SETTINGS:
        section, _, name = key.partition(".")
        if key not in but and before[section][name] != after[section][name]:
            return key, before[section][name], after[section][name]
    return None


def as_sections(settings: Mapping[str, Any]) -> dict[str, dict[str, Any]]:
    """{"train.lr": 0.1} -> {"train": {"lr": 0.1}}."""
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
"""Every setting by its dotted key, and its type."""


def _nearest(key: str) -> str:
    """The settings whose names are nearest to `key`, as the end of a message."""
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
    """Raises CmranError for true or false where a number is expected, which pydantic would take for 1 or 0."""
    for name, value in values.items():
        kind = _SETTINGS.get(f"{section}.{name}")
        if isinstance(value, bool) and kind is not None and kind is not bool and bool not in get_args(kind):
            raise CmranError(f"{where}: {section}.{name}: expected no truth value, found {str(value).lower()}")


def _mapping(values: object, where: str, key: str) -> Mapping[str, Any]:
    if values is None:
        return {}
    if not isinstance(values, Mapping):
        raise CmranError(f"{where}: {key} must be a mapping, found {type(values).__name__}")
    return values


def parse(kind: type[T], values: Mapping[str, Any], where: str) -> T:
    """`kind` from plain values. Raises CmranError naming the first bad key, what was found and the rule."""
    try:
        return kind.model_validate(values)
    except ValidationError as error:
        first = error.errors()[0]
        key = ".".join(str(part) for part in first["loc"]) or "(whole)"
        found = "" if isinstance(first["input"], Mapping) else f", found {first['input']!r}"
        more = f" (and {error.error_count() - 1} more)" if error.error_count() > 1 else ""
        unknown = first["type"] == "extra_forbidden" and key.startswith(("model.", "train."))
        raise CmranError(f"{where}: {key}: {first['msg']}{found}{_nearest(key) if unknown else ''}{more}") from None


def _read_yaml(path: Path) -> Any:
    import yaml

    try:
        text = path.read_text(encoding="utf-8")
        return json.loads(text) if path.suffix == ".json" else yaml.safe_load(text)
    except OSError as error:
        raise CmranError(f"config file {path}: {error.strerror or error}") from None
    except (UnicodeDecodeError, yaml.YAMLError, json.JSONDecodeError) as error:
        raise CmranError(f"config file {path}: not readable as YAML: {' '.join(str(error).split())}") from None


def _recipes() -> Any:
    return resources.files("cmran") / "recipes"
