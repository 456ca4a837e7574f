"""Properties of the network besides the golden vectors: sizes, shapes, equivariance, gradients, ablations."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from cmran import CMRAN, ModelConfig
from cmran.categories import BACKGROUND
from cmran.model.losses import compute_loss, predict_segments, video_scores
from cmran.model.network import Outputs
from tests.cmran.tiny import tiny_model

ABLATIONS = [
    {},
    {"audio_only": True},
    {"visual_only": True},
    {"no_spatial_channel_attention": True},
    {"no_cross_modal_relation": True},
    {"no_interaction": True},
    {"no_spatial_channel_attention": True, "no_cross_modal_relation": True, "no_interaction": True},
]
MODES = ["full", "weak"]


def make_network(config: ModelConfig, seed: int = 0) -> CMRAN:
    torch.manual_seed(seed)
    return CMRAN(config).double().eval()


def inputs(batch: int, segments: int, grid: int = 2, seed: int = 0) -> tuple[torch.Tensor, torch.Tensor]:
    generator = torch.Generator().manual_seed(seed)
    visual = torch.rand(batch, segments, grid, grid, 6, generator=generator, dtype=torch.float64)
    return visual, torch.rand(batch, segments, 5, generator=generator, dtype=torch.float64)


def labels(mode: str, batch: int, segments: int) -> torch.Tensor:
    one_hot = torch.eye(29, dtype=torch.float64)
    if mode == "weak":
        return one_hot[torch.arange(batch) % 28]
    return one_hot[torch.tensor([[t % 2 * 25 + 3 for t in range(segments)]] * batch)]


def test_number_of_parameters_is_the_published_one():
    assert sum(p.numel() for p in CMRAN(ModelConfig(mode="full")).parameters()) == 9_509_150
    assert sum(p.numel() for p in CMRAN(ModelConfig(mode="weak")).parameters()) == 9_509_150 + 257


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("ablation", ABLATIONS, ids=lambda a: "+".join(a) or "whole")
def test_every_parameter_gets_a_gradient(mode, ablation):
    model = make_network(tiny_model(mode, **ablation)).train()
    compute_loss(model(*inputs(4, 6)), labels(mode, 4, 6), mode).backward()
    dead = [name for name, p in model.named_parameters() if p.grad is None or not p.grad.abs().sum() > 0]
    # Softmax ignores the bias of a key, so that its gradient is zero; but the bias is stacked with those of query and
    # value. With widths of 4, a ReLU may be dead by chance.
    assert not [name for name in dead if model.get_parameter(name).grad is None]
    assert len(dead) <= 2, dead


@settings(max_examples=25, deadline=None)
@given(
    batch=st.integers(1, 4),
    segments=st.integers(1, 13),
    grid=st.integers(1, 3),
    mode=st.sampled_from(MODES),
    ablation=st.sampled_from(ABLATIONS),
    seed=st.integers(0, 5),
)
def test_any_shape_and_permutation_in_time(batch, segments, grid, mode, ablation, seed):
    model = make_network(tiny_model(mode, **ablation), seed)
    visual, audio = inputs(batch, segments, grid, seed)
    order = torch.randperm(segments, generator=torch.Generator().manual_seed(seed))
    with torch.no_grad():
        whole = model(visual, audio)
        permuted = model(visual[:, order], audio[:, order])
        alone = model(visual[-1:], audio[-1:])
    assert whole.event_logits.shape == (batch, segments)
    assert whole.class_logits.shape == (batch, 28 if mode == "full" else 29)
    torch.testing.assert_close(permuted.event_logits, whole.event_logits[:, order])
    torch.testing.assert_close(permuted.class_logits, whole.class_logits)
    torch.testing.assert_close(alone.event_logits[0], whole.event_logits[-1])
    torch.testing.assert_close(alone.class_logits[0], whole.class_logits[-1])


@pytest.mark.parametrize(("ablation", "changed"), [({"audio_only": True}, "visual"), ({"visual_only": True}, "audio")])
def test_ablated_modality_has_no_effect(ablation, changed):
    model = make_network(tiny_model(**ablation))
    visual, audio = inputs(2, 4)
    before = model(visual, audio)
    after = model(visual * 2, audio) if changed == "visual" else model(visual, audio * 2)
    torch.testing.assert_close(before.event_logits, after.event_logits, rtol=0, atol=0)


@pytest.mark.parametrize(
    ("visual", "audio", "message"),
    [
        ((2, 4, 2, 2, 7), (2, 4, 5), r"visual: expected \(B, T, H, W, 6\)"),
        ((2, 4, 4, 6), (2, 4, 5), "visual: expected"),
        ((2, 4, 2, 2, 6), (2, 4, 6), r"audio: expected \(B, T, 5\)"),
        ((2, 4, 2, 2, 6), (2, 3, 5), "differ in B or T"),
    ],
)
def test_wrong_shapes_are_reported(visual, audio, message):
    with pytest.raises(ValueError, match=message):
        make_network(tiny_model())(torch.zeros(visual).double(), torch.zeros(audio).double())


def test_dropout_is_active_only_in_training_mode():
    model = make_network(tiny_model())
    data = inputs(2, 4)
    torch.testing.assert_close(model(*data).event_logits, model(*data).event_logits, rtol=0, atol=0)
    model.train()
    assert not torch.equal(model(*data).event_logits, model(*data).event_logits)


def test_encoder_layers_start_as_copies():
    model = CMRAN(tiny_model(layers=3))
    first, second = model.visual_temporal.layers[0], model.visual_temporal.layers[2]
    assert torch.equal(first.linear1.weight, second.linear1.weight)
    assert first.linear1.weight is not second.linear1.weight


def test_prediction_rule():
    logits = torch.zeros(1, 28)
    logits[0, 5] = 1
    # sigmoid(0) is not above one half.
    outputs = Outputs(torch.tensor([[-1.0, 0.0, 1e-3, 9.0]]), logits)
    assert predict_segments(outputs).tolist() == [[BACKGROUND, BACKGROUND, 5, 5]]
    weak = torch.zeros(1, 29)
    weak[0, 28] = 1
    assert predict_segments(Outputs(torch.ones(1, 2), weak)).tolist() == [[BACKGROUND, BACKGROUND]]
    assert predict_segments(outputs).dtype == torch.int64


def test_full_loss_equals_its_formula():
    event, classes = torch.tensor([[2.0, -1.0]]), torch.zeros(1, 28)
    classes[0, 7] = 3.0
    target = torch.zeros(1, 2, 29)
    target[0, 0, 7] = target[0, 1, 28] = 1
    expected = (torch.log1p(torch.exp(torch.tensor(-2.0))) + torch.log1p(torch.exp(torch.tensor(-1.0)))) / 2
    expected += torch.log(torch.exp(torch.tensor(3.0)) + 27) - 3
    torch.testing.assert_close(compute_loss(Outputs(event, classes), target, "full"), expected)


def test_a_video_without_an_event_counts_as_category_zero():
    target = torch.zeros(1, 2, 29)
    target[..., 28] = 1
    low, high = torch.zeros(1, 28), torch.zeros(1, 28)
    high[0, 0] = 5
    event = torch.zeros(1, 2)
    assert compute_loss(Outputs(event, high), target, "full") < compute_loss(Outputs(event, low), target, "full")


def test_video_scores_are_a_distribution():
    scores = video_scores(make_network(tiny_model("weak"))(*inputs(3, 4)))
    assert scores.shape == (3, 29)
    torch.testing.assert_close(scores.sum(-1), torch.ones(3, dtype=torch.float64))


@pytest.mark.parametrize(("mode", "shape"), [("full", (2, 29)), ("full", (2, 4, 28)), ("weak", (2, 4, 29))])
def test_labels_of_the_other_mode_are_rejected(mode, shape):
    outputs = make_network(tiny_model(mode))(*inputs(2, 4))
    with pytest.raises(ValueError, match="labels: expected"):
        compute_loss(outputs, torch.zeros(shape), mode)
