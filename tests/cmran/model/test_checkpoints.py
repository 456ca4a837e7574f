"""Checkpoints: published ones are read and written exactly, every fault is named, and only tensors are unpickled."""

import pickle

import pytest
import torch
from torch import nn

from cmran.config import ModelConfig
from cmran.errors import CheckpointError
from cmran.model.checkpoints import (
    FORMAT,
    export_published,
    import_published,
    load,
    load_model,
    published_name,
    reason_not_published,
    save,
)
from cmran.model.network import CMRAN
from tests.golden import published


@pytest.fixture(scope="module")
def full():
    return {key: value.float() for key, value in published.state_dict("full").items()}


def test_keys_with_and_without_the_prefix(full, tmp_path):
    path = tmp_path / "model_epoch_12_top1_77.400_task_full_best_model.pth.tar"
    torch.save({f"module.{key}": value for key, value in full.items()}, path)
    bare, wrapped = import_published(full, "full"), import_published(path, "full")
    for key, value in bare.state_dict().items():
        assert torch.equal(value, wrapped.state_dict()[key])
    assert load_model(path)[0].config.mode == "full"


def test_dtype_of_the_imported_network(full):
    assert import_published(published.state_dict("full"), "full").event_head.weight.dtype == torch.float32
    wide = import_published(published.state_dict("full"), "full", torch.float64)
    assert torch.equal(wide.event_head.weight, published.state_dict("full")["localize_module.classifier.weight"])


def test_unused_weights_may_be_absent_together(full):
    used = {key for key in full if not any(part in key for part in ("encoder_layer.", "decoder_layer.", "guided"))}
    used -= {key for key in used if "decoder.decoder.layers.0.self_attn" in key}
    import_published({key: full[key] for key in used}, "full")
    almost = {key: value for key, value in full.items() if key != "spatial_channel_att.affine_video_guided_2.bias"}
    with pytest.raises(CheckpointError, match=r"missing spatial_channel_att\.affine_video_guided_2\.bias"):
        import_published(almost, "full")


@pytest.mark.parametrize(
    ("key", "change", "message"),
    [
        ("v_fc.weight", lambda value: value * float("nan"), "v_fc.weight contains NaN, infinities or values beyond"),
        (
            "v_fc.bias",
            lambda value: value.double() + 1e300,
            "v_fc.bias contains NaN, infinities or values beyond float32",
        ),
        ("v_fc.bias", lambda value: value.to_sparse(), "v_fc.bias is a sparse or meta tensor"),
        ("v_fc.bias", lambda value: value.to("meta"), "v_fc.bias is a sparse or meta tensor"),
    ],
)
def test_invalid_values_are_named(full, key, change, message):
    with pytest.raises(CheckpointError, match=message):
        import_published(full | {key: change(full[key])}, "full")


def test_duplicated_key_is_named(full):
    with pytest.raises(CheckpointError, match=r"v_fc\.bias is duplicated"):
        import_published(full | {"module.v_fc.bias": full["v_fc.bias"] * 2}, "full")


def test_all_faults_are_named_at_once(full):
    bad = dict(full)
    del bad["v_fc.bias"]
    bad["extra.weight"] = torch.zeros(1)
    bad["AVInter.norm1.weight"] = torch.zeros(7)
    bad["AVInter.norm1.bias"] = torch.zeros(256, dtype=torch.int64)
    with pytest.raises(CheckpointError) as error:
        import_published(bad, "full")
    text = str(error.value)
    assert "missing v_fc.bias" in text
    assert "unknown extra.weight" in text
    assert "AVInter.norm1.weight has shape (7,), expected (256,)" in text
    assert "AVInter.norm1.bias is torch.int64" in text
    assert "\n" not in text


def test_other_mode_is_rejected(full):
    with pytest.raises(CheckpointError, match=r"event_classifier\.weight has shape \(28, 256\), expected \(29, 256\)"):
        import_published(full, "weak")


@pytest.mark.parametrize("mode", ["full", "weak"])
def test_mode_follows_from_the_weights(mode, tmp_path):
    # The published code gives the files of both modes the same name.
    path = tmp_path / published_name(12, 77.4)
    assert path.name == "model_epoch_12_top1_77.400_task_Supervised_best_model.pth.tar"
    torch.save({f"module.{key}": value for key, value in published.state_dict(mode).items()}, path)
    model, state = load_model(path)
    assert model.config.mode == state["mode"] == mode
    with pytest.raises(CheckpointError, match="event_classifier"):
        load_model(path, "weak" if mode == "full" else "full")


class Published(nn.Module):
    """The published network's parameters, in float64 and with the published names, for a strict load."""

    def __init__(self, mode):
        super().__init__()
        for key, shape in published.KEYS[mode].items():
            *path, name = key.split(".")
            module = self
            for part in path:
                if part not in module._modules:
                    module.add_module(part, nn.Module())
                module = module._modules[part]
            module.register_parameter(name, nn.Parameter(torch.full(shape, torch.nan, dtype=torch.float64)))


@pytest.mark.parametrize("mode", ["full", "weak"])
def test_export_loads_strictly_in_the_published_network(mode, tmp_path):
    torch.manual_seed(1)
    model = CMRAN(ModelConfig(mode=mode)).eval()
    state = export_published(model)
    shapes = {key.removeprefix("module."): list(value.shape) for key, value in state.items()}
    assert shapes == published.KEYS[mode]
    assert all(key.startswith("module.") for key in state)

    path = tmp_path / published_name(3, 50.0)
    torch.save(state, path)
    # The published code wraps its network, too.
    network = nn.ModuleDict({"module": Published(mode)})
    network.load_state_dict(torch.load(path, weights_only=True), strict=True)
    assert all(torch.isfinite(value).all() for value in network.state_dict().values())
    data = published.inputs()
    again = import_published(network.state_dict(), mode, torch.float64)
    with torch.no_grad():
        for ours, theirs in zip(
            model.double()(data["visual"], data["audio"]), again(data["visual"], data["audio"]), strict=True
        ):
            assert torch.equal(ours, theirs)


def unused(state):
    """Return the weights of an export on which no output depends."""
    used = {f"module.{key}" for key in published.KEYS["full"]} - set(state)
    assert not used
    parts = ("encoder_layer.", "decoder_layer.", "guided", "decoder.decoder.layers.0.self_attn.")
    return {key: value for key, value in state.items() if any(part in key for part in parts)}


def test_unused_weights_are_fixed_initial_values():
    model = CMRAN(ModelConfig())
    torch.manual_seed(5)
    before = torch.get_rng_state()
    first, second = unused(export_published(model)), unused(export_published(model.double()))
    assert torch.equal(torch.get_rng_state(), before)
    assert len(first) == 68
    assert sum(value.numel() for value in first.values()) == 6_354_112
    for key, value in first.items():
        assert value.dtype == torch.float32
        assert second[key].dtype == torch.float64
        assert torch.equal(value.double(), second[key]), key
        if ".norm" in key:
            assert (value == (1 if key.endswith("weight") else 0)).all(), key
        elif key.endswith(("in_proj_bias", "out_proj.bias")):
            assert (value == 0).all(), key
        else:
            # Uniform, within the bound that torch uses for the same layer.
            like = nn.MultiheadAttention(256, 4).in_proj_weight if "in_proj" in key else None
            inputs = first[key.replace(".bias", ".weight")].shape[1]
            bound = inputs**-0.5 if like is None else float(like.detach().abs().max())
            assert 0.8 * bound < value.abs().max() <= 1.001 * bound, key
    # Changing one result does not change the next one.
    next(iter(first.values())).zero_()
    assert not torch.equal(next(iter(first.values())), next(iter(unused(export_published(model)).values())))


def test_unused_weights_have_the_sizes_of_the_model():
    sizes = {"visual_features": 6, "audio_features": 5, "width": 8, "heads": 2, "interaction_heads": 2}
    state = unused(export_published(CMRAN(ModelConfig(feedforward=16, bottleneck=4, spatial_width=4, **sizes))))
    assert state["module.video_encoder.encoder_layer.self_attn.in_proj_weight"].shape == (24, 8)
    assert state["module.audio_decoder.decoder_layer.linear1.weight"].shape == (16, 8)
    assert state["module.spatial_channel_att.affine_video_guided_1.weight"].shape == (64, 6)


@pytest.mark.parametrize("ablation", ["audio_only", "no_spatial_channel_attention", "no_interaction"])
def test_export_of_an_ablation_has_only_its_weights(ablation):
    config = ModelConfig(**{ablation: True})
    model = CMRAN(config)
    assert len(export_published(model)) == len(model.state_dict())
    assert ablation in reason_not_published(config)
    with pytest.raises(CheckpointError, match="missing"):
        import_published(export_published(model), "full")


@pytest.mark.parametrize("heads", [{"heads": 8}, {"interaction_heads": 2}])
def test_weights_with_other_heads_are_not_exported(heads):
    config = ModelConfig(**heads)
    assert export_published(CMRAN(config)) == {}
    assert "attention heads" in reason_not_published(config)
    assert reason_not_published(ModelConfig()) is None


class Evil:
    def __reduce__(self):
        return (print, ("this must never run",))


def test_only_tensors_are_unpickled(tmp_path, capsys):
    path = tmp_path / "evil.pth.tar"
    torch.save({"v_fc.weight": Evil()}, path)
    with pytest.raises(CheckpointError, match="more than tensors"):
        import_published(path, "full")
    path.write_bytes(pickle.dumps(Evil()))
    with pytest.raises(CheckpointError):
        import_published(path, "full")
    assert "never run" not in capsys.readouterr().out


@pytest.mark.parametrize("content", [b"", b"\x80", b"PK\x03\x04 not a zip", b"plain text"])
def test_damaged_file_is_reported_in_one_line(tmp_path, content):
    path = tmp_path / "best.pt"
    path.write_bytes(content)
    with pytest.raises(CheckpointError, match=r"best\.pt") as error:
        load(path)
    assert "\n" not in str(error.value)


@pytest.mark.parametrize(
    ("state", "message"),
    [
        ({"format": 1, "model": {}}, rf"found checkpoint format 1, expected {FORMAT}: .*: train again"),
        ({"model": {}}, "not a checkpoint of this project"),
    ],
)
def test_other_format_is_rejected_in_one_line(tmp_path, state, message):
    path = tmp_path / "last.pt"
    save(path, state)
    with pytest.raises(CheckpointError, match=message) as error:
        load(path)
    assert "\n" not in str(error.value)


def test_missing_file_and_missing_class_head(tmp_path, full):
    with pytest.raises(CheckpointError, match="no checkpoint at"):
        load_model(tmp_path)
    path = tmp_path / "unnamed.pth.tar"
    torch.save(full, path)
    assert load_model(path)[0].config.mode == "full"
    torch.save({key: value for key, value in full.items() if "event_classifier" not in key}, path)
    with pytest.raises(CheckpointError, match=r"should have 28 .* or 29 rows .*, found no such key"):
        load_model(path)
