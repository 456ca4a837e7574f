"""What the search varies. Each bound stands in `RANGES`, `CHOICES` or `SCHEDULES`, and nowhere else.

The recipe's own value is always inside: a range is widened to hold it, a choice gains it. So the recipe itself is a
point of the space (`published_params`), and the search begins there.
"""

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Literal

from cmran.config import ModelConfig, RunConfig, TrainConfig, milestones_of, parse
from cmran.errors import CmranError

if TYPE_CHECKING:
    import optuna
    from optuna.distributions import BaseDistribution

Section = Literal["model", "train"]


@dataclass(frozen=True, kw_only=True)
class Range:
    """A number between two bounds, both included."""

    name: str
    # As in ModelConfig or TrainConfig.
    section: Section
    low: float
    high: float
    log: bool = False
    whole: bool = False


@dataclass(frozen=True, kw_only=True)
class Choice:
    """One of some values."""

    name: str
    section: Section
    values: tuple[float, ...]
    relative: bool = False
    # Multiples of the recipe's value.


RANGES: tuple[Range, ...] = (
    Range(name="lr", section="train", low=5e-5, high=5e-3, log=True),
    Range(name="clip_norm", section="train", low=0.02, high=2.0, log=True),
    Range(name="dropout", section="model", low=0.0, high=0.5),
    Range(name="visual_dropout", section="model", low=0.0, high=0.5),
    Range(name="layers", section="model", low=1, high=3, whole=True),
)

CHOICES: tuple[Choice, ...] = (
    Choice(name="batch_size", section="train", values=(16, 32, 64)),
    Choice(name="weight_decay", section="train", values=(0.0, 1e-6, 1e-5, 1e-4, 1e-3)),
    # Powers of ten and none at all: a choice, not a range, because a logarithm cannot hold the published 0.
    Choice(name="width", section="model", values=(0.5, 0.75, 1.0, 1.5, 2.0), relative=True),
    # The published 256 gives 128, 192, 256, 384, 512. Widths that the recipe's heads do not divide are left out.
    Choice(name="heads", section="model", values=(2, 4, 8)),
    # Those that divide every width above.
)

PARAMETERS: tuple[Range | Choice, ...] = (*RANGES, *CHOICES)
"""All of them but the schedule, which decides the milestones."""

SCHEDULE = "schedule"
SCHEDULES: dict[str, tuple[float, ...] | None] = {
    "recipe": None,
    # The recipe's own milestones, untouched.
    "early": (0.25, 0.5, 0.75),
    "late": (0.6, 0.85),
    "none": (),
    # A constant learning rate.
}
"""When the learning rate falls by TrainConfig.lr_factor: shares of the epochs."""


def suggest(trial: "optuna.Trial", base: RunConfig) -> RunConfig:
    """The settings that `trial` tries: `base` with every searched value replaced by the trial's."""
    from optuna.distributions import CategoricalDistribution, FloatDistribution, IntDistribution

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
                raise TypeError(f"{name}: no way to suggest {found}")
    return config_of(params, base)


def published_params(base: RunConfig) -> dict[str, Any]:
    """The point of the space that is `base` itself; `config_of` gives `base` back from it."""
    params = {item.name: _value(base, item) for item in PARAMETERS}
    return params | {SCHEDULE: "recipe"}


def config_of(params: Mapping[str, Any], base: RunConfig) -> RunConfig:
    """`base` with the values of `params` (of a trial).

    With another number of epochs in `base` than in the search, the schedule scales to it.

    Raises CmranError where `params` lacks a value or holds an unknown one, and for settings that are out of bounds.
    """
    sections: dict[str, dict[str, Any]] = {"model": base.model.model_dump(), "train": base.train.model_dump()}
    known = {item.name: item.section for item in PARAMETERS}
    if wrong := sorted(params.keys() ^ {*known, SCHEDULE}):
        state = "unknown" if wrong[0] in params else "missing"
        raise CmranError(f"parameters of a trial: {wrong[0]!r} is {state}: expected {', '.join([*known, SCHEDULE])}")
    for name, section in known.items():
        sections[section][name] = params[name]
    sections["train"]["lr_milestones"] = milestones(params[SCHEDULE], base.train)
    return parse(RunConfig, {"recipe": base.recipe, **sections}, "parameters of a trial")


def best_settings(params: Mapping[str, Any], given: Mapping[str, Mapping[str, Any]]) -> dict[str, dict[str, Any]]:
    """`given` with the values of `params` (of a trial), for a config file: {"model": {...}, "train": {...}}.

    The schedule is written as shares, so that it scales to the number of epochs of each training.
    """
    sections: dict[str, dict[str, Any]] = {"model": dict(given.get("model", {})), "train": dict(given.get("train", {}))}
    for item in PARAMETERS:
        sections[item.section][item.name] = params[item.name]
    shares = SCHEDULES[params[SCHEDULE]]
    if shares is not None:
        sections["train"]["lr_milestones"] = list(shares)
    return sections


def milestones(schedule: str, train: TrainConfig) -> tuple[int, ...]:
    """Epochs after which the learning rate falls, by the schedule's name and the number of epochs."""
    if schedule not in SCHEDULES:
        raise CmranError(f"unknown schedule {schedule!r}: expected one of {', '.join(SCHEDULES)}")
    shares = SCHEDULES[schedule]
    if shares is None:
        return train.lr_milestones
    return milestones_of(shares, train.epochs)


def distributions(base: RunConfig) -> "dict[str, BaseDistribution]":
    """The space around `base`, as Optuna's distributions. The same `base` always gives the same space."""
    from optuna.distributions import CategoricalDistribution, FloatDistribution, IntDistribution

    space: dict[str, BaseDistribution] = {}
    for item in RANGES:
        own = _value(base, item)
        low, high = min(item.low, own), max(item.high, own)
        space[item.name] = (
            IntDistribution(int(low), int(high)) if item.whole else FloatDistribution(low, high, log=item.log)
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
    """The space around `base` in words: {"lr": "5e-05 to 0.005, logarithmic", "heads": "2, 4, 8", ...}."""
    from optuna.distributions import CategoricalDistribution, FloatDistribution, IntDistribution

    words = {}
    for name, found in distributions(base).items():
        if isinstance(found, CategoricalDistribution):
            words[name] = ", ".join(f"{choice}" for choice in found.choices)
        elif isinstance(found, FloatDistribution | IntDistribution):
            words[name] = f"{found.low:g} to {found.high:g}" + (", logarithmic" if found.log else "")
    return words


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
