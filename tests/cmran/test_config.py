"""Settings: published defaults, recipes, clear refusals."""

import pytest

from cmran.config import ModelConfig, load_config, recipe_names
from cmran.errors import UserError


@pytest.mark.parametrize(
    ("mode", "milestones", "clip", "seed"), [("full", (10, 20, 30), 0.1, 456), ("weak", (5, 20, 40), 0.5, 666)]
)
def test_published_protocol(mode, milestones, clip, seed):
    config = load_config(mode)
    train = config.train
    assert (train.lr, train.lr_factor, train.lr_milestones) == (5e-4, 0.5, milestones)
    assert (train.clip_norm, train.seed, train.batch_size, train.epochs) == (clip, seed, 32, 200)
    assert (train.weight_decay, train.precision, train.selection_split) == (0.0, "float32", "val")
    assert config.model == ModelConfig(mode=mode)
    assert config.model.effective_interaction_heads == {"full": 4, "weak": 2}[mode]


@pytest.mark.parametrize("mode", ["full", "weak"])
def test_every_recipe_loads(mode):
    for name in recipe_names():
        if name.startswith("published-") and name != f"published-{mode}":
            with pytest.raises(UserError, match="is for mode"):
                load_config(mode, name)
        else:
            assert load_config(mode, name).recipe == name


def test_file_and_options_override_in_order(tmp_path):
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
        ("train: {lr_milestones: [20, 10]}", "must rise"),
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
def test_bad_settings_are_one_clear_line(tmp_path, text, message):
    path = tmp_path / "bad.yaml"
    path.write_text(text)
    with pytest.raises(UserError, match=message) as error:
        load_config("full", config_file=path)
    assert "\n" not in str(error.value)


def test_unknown_recipe_and_missing_file(tmp_path):
    with pytest.raises(UserError, match=r"unknown recipe 'best'.*published-full"):
        load_config("full", "best")
    with pytest.raises(UserError, match="No such file"):
        load_config("full", config_file=tmp_path / "none.yaml")
