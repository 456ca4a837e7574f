"""Training from initial weights: the first step uses them, and a resumed run keeps them."""

import json
import shutil

import numpy as np
import pytest
import torch

from cmran.config import InitRecord
from cmran.data.dataset import open_folder
from cmran.errors import CheckpointError, CmranError, ConfigError
from cmran.model.checkpoints import load, load_model
from cmran.model.losses import compute_loss
from cmran.training.run_dir import InitialWeights, read_result
from cmran.training.step import TrainStep
from cmran.training.trainer import fit
from tests.cmran.tiny import tiny_config
from tests.helpers import make_folder

PLAIN = {"dropout": 0.0, "visual_dropout": 0.0}


@pytest.fixture(scope="module")
def data(tmp_path_factory):
    return make_folder(tmp_path_factory.mktemp("data") / "ave", 24)


@pytest.fixture(scope="module")
def source(data, tmp_path_factory):
    """The checkpoint of a trained network."""
    out = tmp_path_factory.mktemp("source") / "run"
    fit(data, tiny_config(model=PLAIN, seed=7, epochs=1), out, device="cpu")
    return out / "best.pt"


def initial(source, sha256="a" * 64, **changes):
    state = load(source)
    model = load_model(source)[0].config.model_copy(update=changes)
    record = InitRecord(source="a run", sha256=sha256, run_id="b" * 32, fingerprint="c", epoch=1)
    return InitialWeights(model=model, weights=state["model"], record=record)


def test_first_step_uses_the_initial_weights(data, source, tmp_path):
    config = tiny_config(model=PLAIN, lr=1e-9, epochs=1, max_batches=1)
    result = fit(data, config, tmp_path / "run", device="cpu", init=initial(source))
    model, _ = load_model(source)
    with open_folder(data, mode="full") as folder:
        rows = np.random.default_rng([config.train.seed, 1]).permutation(folder.order("train"))[:4]
        visual, audio = (torch.from_numpy(part) for part in (folder.read_visual(rows), folder.read_audio(rows)))
        labels = torch.nn.functional.one_hot(torch.from_numpy(folder.segment_labels()[rows]).long(), 29)
    # Training reads the visual maps as float16.
    expected = compute_loss(model(visual.half().float(), audio.float()), labels.float(), "full")
    assert result.epochs[0].train_loss == pytest.approx(float(expected.detach()), rel=1e-5)
    other = fit(data, config, tmp_path / "other", device="cpu")
    assert abs(other.epochs[0].train_loss - result.epochs[0].train_loss) > 1e-3


def test_source_of_initial_weights_is_recorded(data, source, tmp_path):
    config = tiny_config(model=PLAIN, epochs=1)
    result = fit(data, config, tmp_path / "run", device="cpu", init=initial(source))
    record = initial(source).record
    assert result.init == record
    assert read_result(tmp_path / "run").init == record
    assert json.loads((tmp_path / "run" / "config.json").read_text())["init"] == record.model_dump(mode="json")
    for name in ("last.pt", "best.pt"):
        assert load(tmp_path / "run" / name)["init"] == record.model_dump(mode="json")
    fit(data, config, tmp_path / "other", device="cpu")
    assert json.loads((tmp_path / "other" / "config.json").read_text())["init"] is None


@pytest.mark.parametrize("after", [0, 2])
def test_resumed_run_is_bit_identical(data, source, tmp_path, monkeypatch, after):
    """Killed within the first epoch, after which the initial weights are needed again, and later."""
    config = tiny_config()
    mine = shutil.copy(source, tmp_path / "mine.pt")
    fit(data, config, tmp_path / "whole", device="cpu", init=initial(mine))

    def interrupted(*_):
        raise KeyboardInterrupt

    def stop(record):
        if record.epoch == after:
            raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        if not after:
            patch.setattr(TrainStep, "step", interrupted)
        with pytest.raises(KeyboardInterrupt):
            fit(data, config, tmp_path / "cut", device="cpu", init=initial(mine), on_epoch=stop)
    mine.unlink()
    assert (tmp_path / "cut" / "last.pt").exists() == bool(after)
    with pytest.raises(ConfigError, match=r"started from a run .*not from a run"):
        fit(data, config, tmp_path / "cut", device="cpu", resume=True, init=initial(source, sha256="d" * 64))
    fit(data, config, tmp_path / "cut", device="cpu", resume=True)
    a, b = (load(tmp_path / name / "last.pt") for name in ("whole", "cut"))
    for key in ("model", "optimizer"):
        first, second = (torch.nn.utils.parameters_to_vector(_tensors(state[key])) for state in (a, b))
        assert torch.equal(first, second)
    assert a["init"] == b["init"]


def _tensors(state):
    if isinstance(state, torch.Tensor):
        return [state.double()]
    parts = state.values() if isinstance(state, dict) else state if isinstance(state, list) else []
    return [tensor for part in parts for tensor in _tensors(part)]


def test_damaged_copy_of_initial_weights_is_reported(data, source, tmp_path, monkeypatch):
    def interrupted(*_):
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(TrainStep, "step", interrupted)
        with pytest.raises(KeyboardInterrupt):
            fit(data, tiny_config(), tmp_path / "run", device="cpu", init=initial(source))
    copy = tmp_path / "run" / "init.pt"
    content = copy.read_bytes()
    copy.write_bytes(content[:-100])
    with pytest.raises(CheckpointError, match=r"init\.pt"):
        fit(data, tiny_config(), tmp_path / "run", device="cpu", resume=True)
    copy.unlink()
    with pytest.raises(CheckpointError, match=r"init\.pt"):
        fit(data, tiny_config(), tmp_path / "run", device="cpu", resume=True)
    shutil.copy(source, copy)
    with pytest.raises(CheckpointError, match=r"init\.pt is not what"):
        fit(data, tiny_config(), tmp_path / "run", device="cpu", resume=True)
    # A new run without initial weights removes the copy.
    fit(data, tiny_config(epochs=1), tmp_path / "run", device="cpu")
    assert not copy.exists()


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"mode": "weak"}, r"of mode full \(28 class logits\), not weak \(29\)"),
        ({"model": {"width": 16}}, r"model\.width 8, the settings say 16"),
        ({"model": {"heads": 4, "layers": 2}}, r"model\.heads 2, model\.layers 1, the settings say 4, 2"),
        ({"model": {"audio_only": True}}, r"model\.audio_only False"),
    ],
    ids=str,
)
def test_weights_of_another_network_are_rejected(data, source, tmp_path, settings, message):
    with pytest.raises(CmranError, match=message) as error:
        fit(data, tiny_config(**settings), tmp_path / "run", device="cpu", init=initial(source))
    assert "\n" not in str(error.value)
    assert not (tmp_path / "run" / "config.json").exists()


def test_initial_weights_that_are_not_finite_are_rejected(data, source, tmp_path):
    found = initial(source)
    next(iter(found.weights.values())).view(-1)[0] = float("nan")
    with pytest.raises(CheckpointError, match="a run: its weights are not finite"):
        fit(data, tiny_config(), tmp_path / "run", device="cpu", init=found)


def test_dropout_may_differ(data, source, tmp_path):
    fit(data, tiny_config(model={"dropout": 0.3}, epochs=1), tmp_path / "run", device="cpu", init=initial(source))
