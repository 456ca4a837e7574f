"""Settings: published defaults, recipes, learning-rate schedules, clear errors."""

import pytest
import torch
from torch.optim.lr_scheduler import CosineAnnealingLR, MultiStepLR

from cmran.config import (
    ModelConfig,
    TrainConfig,
    as_sections,
    first_difference,
    load_config,
    parse_settings,
    recipe_names,
)
from cmran.errors import ConfigError


@pytest.mark.parametrize(
    ("mode", "milestones", "clip", "seed"), [("full", (10, 20, 30), 0.1, 456), ("weak", (5, 20, 40), 0.5, 666)]
)
def test_published_protocol(mode, milestones, clip, seed):
    config = load_config(mode)
    train = config.train
    assert (train.lr, train.lr_factor, train.lr_milestones) == (5e-4, 0.5, milestones)
    assert (train.clip_norm, train.seed, train.batch_size, train.epochs) == (clip, seed, 32, 200)
    assert (train.weight_decay, train.precision, train.selection_split) == (0.0, "float32", "val")
    assert (train.lr_schedule, train.warmup_epochs, train.eval_every, train.patience) == ("milestones", 0, 1, None)
    assert config.model == ModelConfig(mode=mode)
    assert config.model.effective_interaction_heads == {"full": 4, "weak": 2}[mode]


@pytest.mark.parametrize("mode", ["full", "weak"])
def test_every_recipe_loads(mode):
    for name in recipe_names():
        if name.startswith("published-") and name != f"published-{mode}":
            with pytest.raises(ConfigError, match="is for mode"):
                load_config(mode, name)
        else:
            assert load_config(mode, name).recipe == name


def test_file_and_overrides_apply_in_order(tmp_path):
    path = tmp_path / "mine.yaml"
    path.write_text("train: {lr: 1e-3, epochs: 7}\nfull: {model: {width: 128}}\nweak: {model: {width: 64}}\n")
    config = load_config("full", "demo", path, {"train": {"epochs": 9}})
    assert (config.train.lr, config.train.epochs, config.model.width) == (1e-3, 9, 128)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("train: {lr: fast}", r"train\.lr: .*found 'fast'"),
        ("train: {learning_rate: 0.1}", r"train\.learning_rate: Extra inputs"),
        ("train: {epochs: 0}", r"train\.epochs: .*found 0"),
        ("train: {lr: .nan}", r"train\.lr"),
        ("train: {lr_milestones: [20, 10]}", "in increasing order"),
        ("train: {lr_schedule: linear}", r"train\.lr_schedule: .*'milestones' or 'cosine'.*found 'linear'"),
        ("train: {epochs: 5, warmup_epochs: 5}", "warmup_epochs 5 must be fewer than the epochs 5"),
        ("train: {lr_min_factor: 0.1}", "lr_min_factor 0.1 needs lr_schedule cosine"),
        ("train: {eval_every: 0}", r"train\.eval_every: .*found 0"),
        ("train: {patience: 0}", r"train\.patience: .*found 0"),
        ("model: {width: 250}", "multiple of heads"),
        ("model: {audio_only: true, visual_only: true}", "exclude each other"),
        ("model: {mode: weak}", "model.mode is 'weak'"),
        ("optimizer: {}", "unknown key 'optimizer'"),
        ("- 1", "expected a mapping"),
        ("train: [1]", "train must be a mapping"),
        ("full: 3", "full must be a mapping"),
        ("full: [a]", "full must be a mapping"),
        ("full: {train: 3}", "train must be a mapping"),
        ("{", "not readable as YAML"),
    ],
)
def test_invalid_settings_are_reported_in_one_line(tmp_path, text, message):
    path = tmp_path / "bad.yaml"
    path.write_text(text)
    with pytest.raises(ConfigError, match=message) as error:
        load_config("full", config_file=path)
    assert "\n" not in str(error.value)


def test_unknown_recipe_and_missing_file(tmp_path):
    with pytest.raises(ConfigError, match=r"unknown recipe 'best'.*published-full"):
        load_config("full", "best")
    with pytest.raises(ConfigError, match="No such file"):
        load_config("full", config_file=tmp_path / "none.yaml")


def rates_of_torch(scheduler, config, **options):
    """Learning rates of a torch scheduler, one for each epoch."""
    optimizer = torch.optim.SGD([torch.zeros(1)], lr=config.lr)
    schedule = scheduler(optimizer, **options)
    rates = []
    for _ in range(config.epochs):
        rates.append(schedule.get_last_lr()[0])
        optimizer.step()
        schedule.step()
    return rates


def rates(config):
    return [config.learning_rate(epoch) for epoch in range(1, config.epochs + 1)]


@pytest.mark.parametrize("milestones", [(10, 20, 30), (1,), ()])
def test_milestone_schedule_equals_torch(milestones):
    config = TrainConfig(epochs=40, lr_milestones=milestones, lr_factor=0.3)
    expected = rates_of_torch(MultiStepLR, config, milestones=list(milestones), gamma=0.3)
    assert rates(config) == pytest.approx(expected, rel=1e-12)


@pytest.mark.parametrize("factor", [0.0, 0.1, 1.0])
def test_cosine_schedule_equals_torch(factor):
    config = TrainConfig(epochs=12, lr_schedule="cosine", lr_min_factor=factor)
    expected = rates_of_torch(CosineAnnealingLR, config, T_max=12, eta_min=factor * config.lr)
    assert rates(config) == pytest.approx(expected, rel=1e-12)
    assert min(rates(config)) > 0


def test_linear_warmup_precedes_the_schedule():
    plain = TrainConfig(epochs=8, lr_schedule="cosine")
    warm = TrainConfig(epochs=11, lr_schedule="cosine", warmup_epochs=3)
    assert rates(warm)[:3] == pytest.approx([plain.lr / 4, plain.lr / 2, plain.lr * 3 / 4])
    assert rates(warm)[3:] == pytest.approx(rates(plain))
    # The milestones count from the first epoch, as without a warm-up.
    steps = TrainConfig(epochs=5, lr_milestones=(1, 4), warmup_epochs=1)
    assert rates(steps) == pytest.approx([steps.lr / 2] + [steps.lr / 2] * 3 + [steps.lr / 4])


def test_last_epoch_is_always_evaluated():
    config = TrainConfig(epochs=7, eval_every=3)
    assert [epoch for epoch in range(1, 8) if config.is_evaluated(epoch)] == [3, 6, 7]


@pytest.mark.parametrize(
    ("given", "expected"),
    [
        ("train.lr=0.001", {"train.lr": 0.001}),
        ("train.lr=1e-4", {"train.lr": 1e-4}),
        ("train.epochs=1e2", {"train.epochs": 100}),
        ("train.lr_milestones=[5, 10]  model.width=128", {"train.lr_milestones": [5, 10], "model.width": 128}),
        ("train.max_batches = null", {"train.max_batches": None}),
        ("train.background_videos=false", {"train.background_videos": False}),
        ("train.precision=float64", {"train.precision": "float64"}),
        (["train.lr=0.1", "model.width=8 model.heads=2"], {"train.lr": 0.1, "model.width": 8, "model.heads": 2}),
        ("{train: {lr: 1e-4}, model.width: 64}", {"train.lr": 1e-4, "model.width": 64}),
        ({"train": {"lr": 0.1}}, {"train.lr": 0.1}),
        ({"train.lr": 0.1}, {"train.lr": 0.1}),
        ([], {}),
    ],
    ids=str,
)
def test_settings_from_text(given, expected):
    assert parse_settings(given) == expected
    config = load_config("full", overrides=as_sections(expected)).model_dump()
    for key, value in expected.items():
        section, name = key.split(".")
        assert config[section][name] == (tuple(value) if isinstance(value, list) else value)


@pytest.mark.parametrize(
    ("given", "message"),
    [
        ("train.lrr=1", r"unknown setting 'train\.lrr': the nearest are train\.lr, train\.lr_factor"),
        ("lr=1", r"unknown setting 'lr': the nearest are train\.lr"),
        ("model.lr=1", r"train\.lr"),
        ("optimizer=adam", r"unknown setting 'optimizer': expected one of model\.mode, "),
        ("recipe=demo", "unknown setting"),
        ("train.lr", "expected KEY=VALUE"),
        ("=1", "expected KEY=VALUE"),
        ("train.lr=", "null"),
        ("train.lr=[1", "not readable as YAML"),
        ("{train.lr: ", "not readable as YAML"),
        (["train.lr=1", "train.lr=1"], "given twice"),
        ({"train": {"lr": 1}, "train.lr": 2}, "given twice, as 1 and as 2"),
        (7, "expected KEY=VALUE or a mapping"),
    ],
    ids=str,
)
def test_invalid_settings_from_text_are_rejected(given, message):
    with pytest.raises(ValueError, match=message) as error:
        parse_settings(given)
    assert "\n" not in str(error.value)


def test_a_boolean_is_rejected_for_a_number(tmp_path):
    """pydantic would read true as 1."""
    for text in ("train: {epochs: yes}", "train: {lr: true}", "model: {interaction_heads: on}"):
        path = tmp_path / "bad.yaml"
        path.write_text(text)
        with pytest.raises(ConfigError, match="expected no boolean, found true"):
            load_config("full", config_file=path)


def test_unknown_key_in_a_file_names_the_nearest_keys(tmp_path):
    path = tmp_path / "bad.yaml"
    path.write_text("train: {batchsize: 3}")
    with pytest.raises(ConfigError, match=r"train\.batchsize: .*the nearest are train\.batch_size"):
        load_config("full", config_file=path)


def test_settings_override_those_of_a_run():
    run = load_config("weak", "demo", overrides={"train": {"lr": 0.02, "epochs": 3}})
    assert load_config("weak", base=run) == run
    changed = load_config("weak", overrides={"model": {"width": 64}}, base=run)
    assert first_difference(run, run) is None
    assert first_difference(run, changed) == ("model.width", run.model.width, 64)
    assert first_difference(run, changed, ignore=["model.width"]) is None
    with pytest.raises(ConfigError, match=r"model\.mode is 'full'"):
        load_config("weak", overrides={"model": {"mode": "full"}})
