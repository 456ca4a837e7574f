"""Published checkpoints: read as they are, refused by name when anything is off, nothing but tensors unpickled."""

import pickle

import pytest
import torch

from cmran.checkpoints import import_published, load, load_model
from cmran.errors import UserError
from tests.golden import published


@pytest.fixture(scope="module")
def full():
    return {key: value.float() for key, value in published.state_dict("full").items()}


def test_with_and_without_module(full, tmp_path):
    path = tmp_path / "model_epoch_12_top1_77.400_task_full_best_model.pth.tar"
    torch.save({f"module.{key}": value for key, value in full.items()}, path)
    bare, wrapped = import_published(full, "full"), import_published(path, "full")
    for key, value in bare.state_dict().items():
        assert torch.equal(value, wrapped.state_dict()[key])
    # The mode stands in the file's name.
    assert load_model(path)[0].config.mode == "full"


def test_dtype(full):
    assert import_published(published.state_dict("full"), "full").event_head.weight.dtype == torch.float32
    wide = import_published(published.state_dict("full"), "full", torch.float64)
    assert torch.equal(wide.event_head.weight, published.state_dict("full")["localize_module.classifier.weight"])


def test_dead_weight_may_be_absent_as_a_whole(full):
    live = {key for key in full if not any(part in key for part in ("encoder_layer.", "decoder_layer.", "guided"))}
    live -= {key for key in live if "decoder.decoder.layers.0.self_attn" in key}
    import_published({key: full[key] for key in live}, "full")
    almost = {key: value for key, value in full.items() if key != "spatial_channel_att.affine_video_guided_2.bias"}
    with pytest.raises(UserError, match=r"missing spatial_channel_att\.affine_video_guided_2\.bias"):
        import_published(almost, "full")


@pytest.mark.parametrize(
    ("key", "change", "message"),
    [
        ("v_fc.weight", lambda value: value * float("nan"), "v_fc.weight holds NaN, infinities or values beyond"),
        ("v_fc.bias", lambda value: value.double() + 1e300, "v_fc.bias holds NaN, infinities or values beyond float32"),
        ("v_fc.bias", lambda value: value.to_sparse(), "v_fc.bias is a sparse or meta tensor"),
        ("v_fc.bias", lambda value: value.to("meta"), "v_fc.bias is a sparse or meta tensor"),
    ],
)
def test_values_that_are_no_weights_are_named(full, key, change, message):
    with pytest.raises(UserError, match=message):
        import_published(full | {key: change(full[key])}, "full")


def test_a_key_with_and_without_its_prefix_is_named(full):
    with pytest.raises(UserError, match=r"v_fc\.bias is there twice"):
        import_published(full | {"module.v_fc.bias": full["v_fc.bias"] * 2}, "full")


def test_everything_wrong_is_named_at_once(full):
    bad = dict(full)
    del bad["v_fc.bias"]
    bad["extra.weight"] = torch.zeros(1)
    bad["AVInter.norm1.weight"] = torch.zeros(7)
    bad["AVInter.norm1.bias"] = torch.zeros(256, dtype=torch.int64)
    with pytest.raises(UserError) as error:
        import_published(bad, "full")
    text = str(error.value)
    assert "missing v_fc.bias" in text
    assert "unknown extra.weight" in text
    assert "AVInter.norm1.weight has shape (7,), expected (256,)" in text
    assert "AVInter.norm1.bias is torch.int64" in text
    assert "\n" not in text


def test_the_other_mode_is_refused(full):
    with pytest.raises(UserError, match=r"event_classifier\.weight has shape \(28, 256\), expected \(29, 256\)"):
        import_published(full, "weak")


class Evil:
    def __reduce__(self):
        return (print, ("this must never run",))


def test_only_tensors_are_unpickled(tmp_path, capsys):
    path = tmp_path / "evil.pth.tar"
    torch.save({"v_fc.weight": Evil()}, path)
    with pytest.raises(UserError, match="more than tensors"):
        import_published(path, "full")
    path.write_bytes(pickle.dumps(Evil()))
    with pytest.raises(UserError):
        import_published(path, "full")
    assert "never run" not in capsys.readouterr().out


@pytest.mark.parametrize("content", [b"", b"\x80", b"PK\x03\x04 not a zip", b"plain text"])
def test_damaged_files(tmp_path, content):
    path = tmp_path / "best.pt"
    path.write_bytes(content)
    with pytest.raises(UserError, match=r"best\.pt") as error:
        load(path)
    assert "\n" not in str(error.value)


def test_missing_file_and_missing_mode(tmp_path, full):
    with pytest.raises(UserError, match="no checkpoint at"):
        load_model(tmp_path)
    path = tmp_path / "unnamed.pth.tar"
    torch.save(full, path)
    with pytest.raises(UserError, match="give --mode"):
        load_model(path)
