"""The search space. All bounds and choices are in `RANGES`, `CHOICES` and `SCHEDULES`.

The recipe's own value is always inside the space: a range is extended to include it, and a choice gains it. The recipe
is therefore a point of the space (`recipe_params`), and the search starts with it.
"""

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Literal

import optuna
from optuna.distributions import BaseDistribution, CategoricalDistribution, FloatDistribution, IntDistribution

from cmran.config import ModelConfig, RunConfig, TrainConfig, milestones_of, parse
from cmran.errors import CmranError, ConfigError

Section = Literal["model", "train"]


@dataclass(frozen=True, kw_only=True)
class Range:
    """A number between two bounds, both included."""

    name: str
    """Field of ModelConfig or TrainConfig."""
    section: Section
    """Section of RunConfig that has this field."""
    low: float
    high: float
    log: bool = False
    """Whether to sample on a logarithmic scale."""
    integer: bool = False


@dataclass(frozen=True, kw_only=True)
class Choice:
    """One value of a fixed list."""

    name: str
    """Field of ModelConfig or TrainConfig."""
    section: Section
    """Section of RunConfig that has this field."""
    values: tuple[float, ...]
    relative: bool = False
    """Whether `values` are multiples of the recipe's value."""


RANGES: tuple[Range, ...] = (
    Range(name="lr", section="train", low=5e-5, high=5e-3, log=True),
    Range(name="clip_norm", section="train", low=0.02, high=2.0, log=True),
    Range(name="dropout", section="model", low=0.0, high=0.5),
    Range(name="visual_dropout", section="model", low=0.0, high=0.5),
    Range(name="layers", section="model", low=1, high=3, integer=True),
)

CHOICES: tuple[Choice, ...] = (
    Choice(name="batch_size", section="train", values=(16, 32, 64)),
    # A choice and not a range, because a logarithmic range cannot include the published value 0.
    Choice(name="weight_decay", section="train", values=(0.0, 1e-6, 1e-5, 1e-4, 1e-3)),
    # The published 256 gives 128, 192, 256, 384 and 512. Widths that the recipe's heads do not divide are dropped.
    Choice(name="width", section="model", values=(0.5, 0.75, 1.0, 1.5, 2.0), relative=True),
    # Head counts that do not divide all widths above are dropped.
    Choice(name="heads", section="model", values=(2, 4, 8)),
)

PARAMETERS: tuple[Range | Choice, ...] = (*RANGES, *CHOICES)
"""All searched settings except the schedule, which sets the milestones."""

SCHEDULE = "schedule"
SCHEDULES: dict[str, tuple[float, ...] | None] = {
    "recipe": None,
    "early": (0.25, 0.5, 0.75),
    "late": (0.6, 0.85),
    "none": (),
}
"""When the learning rate is multiplied by TrainConfig.lr_factor, as shares of the number of epochs.

None keeps the recipe's own milestones; an empty tuple keeps the learning rate constant.
"""


def suggest(trial: optuna.Trial, base: RunConfig) -> RunConfig:
    """Sample the trial's settings: `base` with every searched value replaced by the one that Optuna suggests."""
    params: dict[str, Any] = {}
    for name, found in distributions(base).items():
        match found:
            case FloatDistribution():
                params[name] = trial.suggest_float(name, found.low, found.high, log=found.log)
            case IntDistribution():
                params[name] = trial.suggest_int(name, found.low, found.high)
            case CategoricalDistribution():
                params[name] = trial.suggest_categorical(name, found.choices)
            case _:  # pragma: no cover
                raise TypeError(f"{name}: unsupported distribution {found}")
    return apply_params(params, base)


def recipe_params(base: RunConfig) -> dict[str, Any]:
    """The parameters of `base` itself; `apply_params` converts them back to `base`."""
    params = {item.name: _value(base, item) for item in PARAMETERS}
    return params | {SCHEDULE: "recipe"}


def apply_params(params: Mapping[str, Any], base: RunConfig) -> RunConfig:
    """Replace the searched settings of `base` by the parameters of a trial.

    The schedule scales to the number of epochs of `base`, which may differ from that of the search.

    Raises:
        ConfigError: `params` lacks a parameter or contains an unknown one, or a setting is out of bounds.
    """
    sections: dict[str, dict[str, Any]] = {"model": base.model.model_dump(), "train": base.train.model_dump()}
    known = {item.name: item.section for item in PARAMETERS}
    if wrong := sorted(params.keys() ^ {*known, SCHEDULE}):
        state = "unknown" if wrong[0] in params else "missing"
        raise ConfigError(f"parameters of a trial: {wrong[0]!r} is {state}: expected {', '.join([*known, SCHEDULE])}")
    for name, section in known.items():
        sections[section][name] = params[name]
    sections["train"]["lr_milestones"] = milestones(params[SCHEDULE], base.train)
    return parse(RunConfig, {"recipe": base.recipe, **sections}, "parameters of a trial")


def best_settings(params: Mapping[str, Any], given: Mapping[str, Mapping[str, Any]]) -> dict[str, dict[str, Any]]:
    """Content of a config file: the settings `given` and the parameters of a trial.

    The schedule is written as shares of the epochs, so it scales to the number of epochs of the training.

    Returns:
        {"model": {...}, "train": {...}}.
    """
    sections: dict[str, dict[str, Any]] = {"model": dict(given.get("model", {})), "train": dict(given.get("train", {}))}
    for item in PARAMETERS:
        sections[item.section][item.name] = params[item.name]
    shares = SCHEDULES[params[SCHEDULE]]
    if shares is not None:
        sections["train"]["lr_milestones"] = list(shares)
    return sections


def milestones(schedule: str, train: TrainConfig) -> tuple[int, ...]:
    """Epochs after which the learning rate is reduced, for the named schedule and the number of epochs of `train`.

    Raises:
        ConfigError: the schedule is unknown.
    """
    if schedule not in SCHEDULES:
        raise ConfigError(f"unknown schedule {schedule!r}: expected one of {', '.join(SCHEDULES)}")
    shares = SCHEDULES[schedule]
    if shares is None:
        return train.lr_milestones
    return milestones_of(shares, train.epochs)


def distributions(base: RunConfig) -> dict[str, BaseDistribution]:
    """The search space around `base` as Optuna distributions. It depends on `base` only."""
    space: dict[str, BaseDistribution] = {}
    for item in RANGES:
        own = _value(base, item)
        low, high = min(item.low, own), max(item.high, own)
        space[item.name] = (
            IntDistribution(int(low), int(high)) if item.integer else FloatDistribution(low, high, log=item.log)
        )
    widths: list[int] = []
    for choice in CHOICES:
        values = _choices(base, choice)
        if choice.name == "width":
            values = widths = [int(width) for width in values if _fits(base.model, width=width)]
        elif choice.name == "heads":
            values = [heads for heads in values if all(_fits(base.model, width=width, heads=heads) for width in widths)]
        space[choice.name] = CategoricalDistribution(values)
    space[SCHEDULE] = CategoricalDistribution(list(SCHEDULES))
    return space


def describe(base: RunConfig) -> dict[str, str]:
    """The search space around `base` as text: {"lr": "5e-05 to 0.005, logarithmic", "heads": "2, 4, 8", ...}."""
    texts = {}
    for name, found in distributions(base).items():
        if isinstance(found, CategoricalDistribution):
            texts[name] = ", ".join(f"{choice}" for choice in found.choices)
        elif isinstance(found, FloatDistribution | IntDistribution):
            texts[name] = f"{found.low:g} to {found.high:g}" + (", logarithmic" if found.log else "")
    return texts


def _value(base: RunConfig, item: Range | Choice) -> Any:
    return getattr(base.model if item.section == "model" else base.train, item.name)


def _choices(base: RunConfig, item: Choice) -> list[Any]:
    own = _value(base, item)
    values = [own * value for value in item.values] if item.relative else list(item.values)
    if item.relative:
        values = [math.floor(value) for value in values if value == math.floor(value)]
    return sorted({*values, own})


def _fits(model: ModelConfig, **changes: Any) -> bool:
    try:
        parse(ModelConfig, model.model_dump() | changes, "")
    except CmranError:
        return False
    return True
