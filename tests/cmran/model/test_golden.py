"""Golden vectors of the published network: its outputs, and five training steps."""

import numpy as np
import pytest
import torch

from cmran.model.checkpoints import import_published
from cmran.model.losses import compute_loss, video_scores
from cmran.model.network import CMRAN
from tests.devices import on_cuda
from tests.golden import published

MODES = ["full", "weak"]
GOLDEN = published.golden()


def outputs_of(model: CMRAN, data: dict[str, torch.Tensor]) -> dict[str, np.ndarray]:
    with torch.no_grad():
        outputs = model.eval()(data["visual"], data["audio"])
    named = {"event_logits": outputs.event_logits, "class_logits": outputs.class_logits}
    if model.config.mode == "weak":
        named["video_scores"] = video_scores(outputs)
    return {name: value.cpu().numpy() for name, value in named.items()}


@pytest.mark.parametrize("mode", MODES)
def test_outputs_in_float64(mode):
    model = import_published(published.state_dict(mode), mode).double()
    for name, value in outputs_of(model, published.inputs()).items():
        np.testing.assert_allclose(value, GOLDEN[f"{mode}/{name}"], rtol=0, atol=1e-9)


@pytest.mark.parametrize("mode", MODES)
def test_outputs_in_float32(mode):
    model = import_published(published.state_dict(mode), mode)
    data = {name: value.float() for name, value in published.inputs().items()}
    assert next(model.parameters()).dtype == torch.float32
    for name, value in outputs_of(model, data).items():
        np.testing.assert_allclose(value, GOLDEN[f"{mode}/{name}"], rtol=0, atol=1e-4)


@on_cuda
@pytest.mark.parametrize(("dtype", "bound"), [(torch.float64, 1e-9), (torch.float32, 1e-4)])
@pytest.mark.parametrize("mode", MODES)
def test_outputs_on_a_gpu(mode, dtype, bound):
    model = import_published(published.state_dict(mode), mode).to("cuda", dtype)
    data = {name: value.to("cuda", dtype) for name, value in published.inputs().items()}
    for name, value in outputs_of(model, data).items():
        np.testing.assert_allclose(value, GOLDEN[f"{mode}/{name}"], rtol=0, atol=bound)


@pytest.mark.parametrize("mode", MODES)
def test_five_training_steps(mode):
    model = import_published(published.state_dict(mode), mode).double()
    for module in model.modules():
        if isinstance(module, torch.nn.Dropout):
            module.p = 0.0
    data = published.inputs()
    labels = data["segments" if mode == "full" else "video"]
    optimizer = torch.optim.Adam(model.parameters(), lr=5e-4)
    losses, norms = [], []
    model.train()
    for _ in range(5):
        optimizer.zero_grad()
        loss = compute_loss(model(data["visual"], data["audio"]), labels, mode)
        loss.backward()
        norms.append(float(torch.nn.utils.clip_grad_norm_(model.parameters(), 0.1 if mode == "full" else 0.5)))
        optimizer.step()
        losses.append(loss.item())
    np.testing.assert_allclose(losses, GOLDEN[f"{mode}/losses"], rtol=1e-6)
    np.testing.assert_allclose(norms, GOLDEN[f"{mode}/grad_norms"], rtol=1e-6)
    after = outputs_of(model, data)
    for name in ("event_logits", "class_logits"):
        np.testing.assert_allclose(after[name], GOLDEN[f"{mode}/{name}_after"], rtol=1e-6, atol=1e-6)
