"""The search space: it contains the recipe, every point is valid, and every bound is in the tables."""

import warnings

import optuna
import pytest
from optuna.distributions import CategoricalDistribution, FloatDistribution, IntDistribution

from cmran.config import RunConfig, load_config, recipe_names
from cmran.errors import CmranError, ConfigError
from search import space
from tests.cmran.tiny import tiny_config

BASES = [
    *(load_config(mode, recipe) for mode in ("full", "weak") for recipe in (f"published-{mode}", "demo", "debug")),
    tiny_config(),
    tiny_config("weak", model={"width": 12, "heads": 3, "interaction_heads": 1}),
    tiny_config(lr=0.5, clip_norm=1e-4, weight_decay=0.3, batch_size=7),
    tiny_config(model={"layers": 9, "dropout": 0.9}),
    tiny_config(model={"width": 4096, "heads": 64, "interaction_heads": 64}),
]


def test_all_recipes_are_covered():
    assert {base.recipe for base in BASES} == set(recipe_names())


@pytest.mark.parametrize("base", BASES)
def test_recipe_is_a_point_of_its_space(base: RunConfig):
    params = space.recipe_params(base)
    assert space.apply_params(params, base) == base
    found = space.distributions(base)
    assert params.keys() == found.keys()
    for name, distribution in found.items():
        assert distribution._contains(distribution.to_internal_repr(params[name])), name


@pytest.mark.parametrize("base", BASES)
def test_enqueued_recipe_is_suggested_exactly_and_without_warning(base: RunConfig):
    optuna.logging.set_verbosity(optuna.logging.ERROR)
    study = optuna.create_study(sampler=optuna.samplers.TPESampler(seed=0))
    study.enqueue_trial(space.recipe_params(base))
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert space.suggest(study.ask(), base) == base


@pytest.mark.parametrize("base", BASES)
def test_every_point_is_valid_and_within_bounds(base: RunConfig):
    study = optuna.create_study(sampler=optuna.samplers.RandomSampler(seed=1))
    ranges = {item.name: item for item in space.RANGES}
    for _ in range(60):
        trial = study.ask()
        config = space.suggest(trial, base)  # RunConfig rejects a width that the heads do not divide
        assert config.recipe == base.recipe
        assert config.train.seed == base.train.seed
        assert config.train.epochs == base.train.epochs
        assert all(milestone >= 1 for milestone in config.train.lr_milestones)
        for name, item in ranges.items():
            own = space.recipe_params(base)[name]
            assert min(item.low, own) <= trial.params[name] <= max(item.high, own)
        study.tell(trial, 0.0)


def test_published_space():
    found = space.distributions(load_config("full"))
    assert found == {
        "lr": FloatDistribution(5e-5, 5e-3, log=True),
        "clip_norm": FloatDistribution(0.02, 2.0, log=True),
        "dropout": FloatDistribution(0.0, 0.5),
        "visual_dropout": FloatDistribution(0.0, 0.5),
        "layers": IntDistribution(1, 3),
        "batch_size": CategoricalDistribution((16, 32, 64)),
        "weight_decay": CategoricalDistribution((0.0, 1e-6, 1e-5, 1e-4, 1e-3)),
        "width": CategoricalDistribution((128, 192, 256, 384, 512)),
        "heads": CategoricalDistribution((2, 4, 8)),
        "schedule": CategoricalDistribution(("recipe", "early", "late", "none")),
    }
    assert space.describe(load_config("full"))["lr"] == "5e-05 to 0.005, logarithmic"


@pytest.mark.parametrize(
    ("schedule", "epochs", "expected"),
    [
        ("recipe", 200, (10, 20, 30)),
        ("early", 200, (50, 100, 150)),
        ("late", 200, (120, 170)),
        ("none", 200, ()),
        ("early", 8, (2, 4, 6)),
        ("late", 2, (1, 2)),
        ("early", 1, (1,)),
        ("late", 1, (1,)),
    ],
)
def test_schedules_scale_with_epochs(schedule, epochs, expected):
    train = load_config("full", overrides={"train": {"epochs": epochs}}).train
    assert space.milestones(schedule, train) == expected


def test_params_of_a_short_search_scale_to_a_longer_training():
    short, long = (load_config("full", overrides={"train": {"epochs": epochs}}) for epochs in (10, 100))
    params = space.recipe_params(short) | {"schedule": "late"}
    assert space.apply_params(params, short).train.lr_milestones == (6, 8)
    assert space.apply_params(params, long).train.lr_milestones == (60, 85)


def test_invalid_params_are_named():
    base = load_config("full")
    params = space.recipe_params(base)
    with pytest.raises(ConfigError, match="'momentum' is unknown"):
        space.apply_params(params | {"momentum": 0.9}, base)
    with pytest.raises(ConfigError, match="'lr' is missing"):
        space.apply_params({key: value for key, value in params.items() if key != "lr"}, base)
    with pytest.raises(ConfigError, match="unknown schedule 'cosine'"):
        space.apply_params(params | {"schedule": "cosine"}, base)
    with pytest.raises(CmranError, match=r"lr"):
        space.apply_params(params | {"lr": 7.0}, base)
