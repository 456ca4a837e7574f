"""The baseline of the benchmarks is the published network: its outputs and losses match the golden vectors."""

import numpy as np
import pytest
import torch

from benchmarks.published import Published, PublishedRows, PublishedStep
from cmran.config import ModelConfig, RunConfig, TrainConfig
from cmran.data.dataset import open_folder
from cmran.model.checkpoints import import_published
from cmran.training.step import TrainStep
from tests.golden import published
from tests.helpers import make_folder

GOLDEN = published.golden()


@pytest.mark.parametrize("mode", ["full", "weak"])
def test_outputs(mode):
    model = Published(import_published(published.state_dict(mode), mode)).eval()
    data = published.inputs()
    with torch.no_grad():
        outputs = model(data["visual"], data["audio"])
    for name in ("event_logits", "class_logits"):
        np.testing.assert_allclose(getattr(outputs, name).numpy(), GOLDEN[f"{mode}/{name}"], rtol=0, atol=1e-9)


@pytest.mark.parametrize("mode", ["full", "weak"])
def test_five_steps(mode):
    step = PublishedStep(import_published(published.state_dict(mode), mode), dropout=False)
    data = published.inputs()
    labels = data["segments" if mode == "full" else "video"]
    losses, norms = zip(*(step(data["visual"], data["audio"], labels) for _ in range(5)), strict=True)
    np.testing.assert_allclose(losses, GOLDEN[f"{mode}/losses"], rtol=1e-6)
    np.testing.assert_allclose(norms, GOLDEN[f"{mode}/grad_norms"], rtol=1e-6)


@pytest.mark.parametrize("mode", ["full", "weak"])
def test_ten_training_steps_match_the_published_ones(mode):
    """The same initial weights and batches, no dropout: the training step of `fit` in float64."""
    config = ModelConfig(mode=mode, dropout=0.0, visual_dropout=0.0)
    train = TrainConfig(precision="float64", batch_size=2, clip_norm={"full": 0.1, "weak": 0.5}[mode])
    torch.manual_seed(0)
    train_step = TrainStep(RunConfig(recipe="published", model=config, train=train), torch.device("cpu"))
    step = PublishedStep(train_step.model, dropout=False)
    losses = []
    for seed in range(10):
        # The last batch is partial, as in an epoch.
        data = published.inputs(seed, batch=1 if seed == 9 else 2)
        labels = data["segments" if mode == "full" else "video"]
        loss, norm, _ = train_step.step(data["visual"], data["audio"], labels)
        expected_loss, expected_norm = step(data["visual"], data["audio"], labels)
        np.testing.assert_allclose(float(loss), expected_loss, rtol=1e-13, err_msg=f"step {seed}")
        np.testing.assert_allclose(float(norm), expected_norm, rtol=1e-11, err_msg=f"step {seed}")
        losses.append(float(loss))
    assert len(set(losses)) == 10


def test_scoring_changes_neither_weights_nor_mode():
    step = PublishedStep(import_published(published.state_dict("full"), "full"))
    data = published.inputs()
    before = [weight.clone() for weight in step.model.parameters()]
    losses = [step.score(data["visual"], data["audio"], data["segments"]) for _ in range(2)]
    # Without dropout the loss is the same twice, and equals that of the first training step.
    assert losses == [pytest.approx(GOLDEN["full/losses"][0], rel=1e-6)] * 2
    assert step.model.training
    assert all(torch.equal(a, b) for a, b in zip(before, step.model.parameters(), strict=True))


def test_rows(tmp_path):
    path = make_folder(tmp_path / "ave", 12)
    with open_folder(path) as folder:
        rows = folder.order("train")
        visual, audio, labels = PublishedRows(path, rows)[1]
        np.testing.assert_array_equal(visual.numpy(), folder.read_visual(rows[1:2], np.float64)[0])
        np.testing.assert_array_equal(audio.numpy(), folder.read_audio(rows[1:2], np.float64)[0])
        np.testing.assert_array_equal(labels.numpy().argmax(-1), folder.segment_labels()[rows[1]])
