"""Initial weights through the jobs: sources, recorded lineage, rejected sources."""

import hashlib
import json
import shutil

import pytest
import torch

from cmran import tracking
from cmran.config import ModelConfig, load_config
from cmran.errors import CmranError
from cmran.model.checkpoints import export_published, load
from cmran.model.network import CMRAN
from cmran.training.trainer import fit
from flows.jobs import evaluate, release, train
from flows.jobs.evaluate import EvaluateParameters
from flows.jobs.models import initial_weights
from flows.jobs.release import ReleaseParameters
from flows.jobs.train import TrainParameters
from tests.flows.test_jobs import runs


@pytest.fixture(scope="module")
def source(data, tiny, tmp_path_factory):
    """A run directory."""
    out = tmp_path_factory.mktemp("source") / "run"
    fit(data, load_config("full", config_file=tiny, overrides={"train": {"epochs": 1}}), out, device="cpu")
    return out


def test_lineage_is_recorded(source, training, tracking_db):
    result = train.run(training(init=str(source), epochs=1))
    sha256 = hashlib.sha256((source / "best.pt").read_bytes()).hexdigest()
    fingerprint = json.loads((source / "config.json").read_text())["fingerprint"]
    record = result.fit.init
    assert (record.source, record.sha256, record.fingerprint) == (str(source), sha256, fingerprint)
    assert (record.epoch, record.selected_on_test, record.version) == (1, False, None)
    tags = tracking.run_info(result.run_id).tags
    assert tags["cmran.init.source"] == str(source)
    assert tags["cmran.init.sha256"] == sha256
    assert tags["cmran.init.fingerprint"] == fingerprint
    assert f"Initialized from {source}" in result.markdown()
    evaluated = evaluate.run(EvaluateParameters(checkpoint=str(training().out), data=training().data))
    assert any(str(source) in note for note in evaluated.notes)

    # The finished run accepts the same source again, even if it has been moved, but no other source.
    again = train.run(training(init=str(source), epochs=1, resume=True))
    assert again.fit.init == record
    moved = shutil.copytree(source, training().out.with_name("moved"))
    assert train.run(training(init=str(moved), epochs=1, resume=True)).fit.init == record
    with pytest.raises(CmranError, match="the run started from"):
        train.run(training(init=str(training().out), epochs=1, resume=True))
    plain = train.run(training(out=training().out.with_name("plain"), epochs=1))
    assert not any(key.startswith("cmran.init") for key in tracking.run_info(plain.run_id).tags)
    with pytest.raises(CmranError, match="started from random weights, not from"):
        train.run(TrainParameters(out=plain.fit.run_dir, init=str(source), resume=True))


def test_source_selected_on_test_is_marked(training, tracking_db):
    first = train.run(training(epochs=1, selection_split="test"))
    second = train.run(training(out=training().out.with_name("second"), epochs=1, init=first.run_id))
    assert (second.fit.init.run_id, second.fit.init.selected_on_test) == (first.run_id, True)
    assert tracking.run_info(second.run_id).tags["cmran.init.selected_on_test"].lower() == "true"
    assert "selected on the test split" in second.markdown()
    # The mark is inherited by the next generation.
    third = train.run(training(out=training().out.with_name("third"), epochs=1, init=str(second.fit.run_dir)))
    assert third.fit.init.selected_on_test


@pytest.mark.parametrize(
    ("init", "changes", "message"),
    [
        ("no-such", {}, "no-such: found nothing there"),
        ("source", {"mode": "weak"}, r"of mode full \(28 class logits\), not weak"),
        ("source", {"settings": "model.width=16"}, r"model\.width 8, the settings say 16"),
        ("models:/cmran-full@champion", {}, "cmran-full"),
        ("f" * 32, {}, "f{32}"),
    ],
    ids=str,
)
def test_invalid_source_is_rejected(source, training, tracking_db, init, changes, message):
    with pytest.raises(CmranError, match=message) as error:
        train.run(training(init=str(source) if init == "source" else init, **changes))
    assert "\n" not in str(error.value)
    assert runs("cmran-full") == []
    assert not (training().out / "config.json").exists()


@pytest.mark.parametrize("precision", ["float32", "float64"])
def test_published_checkpoint(tmp_path, precision):
    """Its float64 weights are not rounded for training in float64."""
    model = CMRAN(ModelConfig()).double()
    path = tmp_path / "model.pth.tar"
    torch.save(export_published(model), path)
    config = load_config("full", overrides={"train": {"precision": precision}})
    found = initial_weights(str(path), config)
    dtype = getattr(torch, precision)
    assert found.model == config.model
    assert all(torch.equal(found.weights[key], value.to(dtype)) for key, value in model.state_dict().items())
    assert found.record.sha256 == hashlib.sha256(path.read_bytes()).hexdigest()
    assert (found.record.run_id, found.record.fingerprint) == (None, None)
    # The mode comes from the weights, not from the settings; the training checks it.
    assert initial_weights(str(path), load_config("weak")).model.mode == "full"


@pytest.mark.slow
def test_registered_model(training, tracking_db, tmp_path, monkeypatch):
    """models:/ resolves to the checkpoint; the release of the fine-tuned model records its source."""
    import onnx

    first = train.run(training(epochs=1))
    data = training().data
    parameters = ReleaseParameters(checkpoint=str(first.fit.run_dir), data=data, variant="float32")
    release.run(parameters)
    out = training().out.with_name("tuned")
    name = "models:/cmran-full/1"
    tuned = train.run(training(out=out, epochs=1, init=name))
    assert (tuned.fit.init.source, tuned.fit.init.version, tuned.fit.init.run_id) == (name, name, first.run_id)
    kept = load(out / "init.pt")["model"]
    assert all(torch.equal(kept[key], value) for key, value in load(first.fit.best_checkpoint)["model"].items())

    file = tmp_path / "tuned.onnx"
    release.run(parameters.model_copy(update={"checkpoint": str(out), "out": file}))
    version = tracking.registered_versions("cmran-full")[-1]
    metadata = {entry.key: entry.value for entry in onnx.load(str(file)).metadata_props}
    for found in (version.tags, metadata):
        assert found["init_source"] == name
        assert found["init_sha256"] == tuned.fit.init.sha256
        assert found["init_run_id"] == first.run_id
        assert found["init_selected_on_test"] == "false"

    # The checkpoint of the run is not the registered model: the training would start from other weights.
    client = tracking.store.connected_client()
    client.log_artifact(first.run_id, str(tuned.fit.best_checkpoint), "checkpoint")
    with pytest.raises(CmranError, match="is not the registered model"):
        train.run(training(out=out.with_name("third"), epochs=1, init=name))
    client.delete_run(first.run_id)


@pytest.mark.slow
def test_registered_model_without_a_checkpoint(training, tracking_db, data, tmp_path):
    """A model that was released from a file has no training run."""
    trained = train.run(training(epochs=1))
    file = shutil.copy(trained.fit.best_checkpoint, tmp_path / "alone.pt")
    state = load(file) | {"run_id": None}
    torch.save(state, file)
    release.run(ReleaseParameters(checkpoint=str(file), data=data, variant="float32"))
    with pytest.raises(CmranError, match=r"models:/cmran-full/1: there is no checkpoint of it") as error:
        train.run(training(out=tmp_path / "tuned", init="models:/cmran-full/1"))
    assert "\n" not in str(error.value)
