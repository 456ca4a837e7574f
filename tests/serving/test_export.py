from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import pytest
import torch
from onnx import numpy_helper

import cmran
from cmran.data.dataset import open_folder
from cmran.errors import CmranError
from serving.export import export_onnx
from serving.parity import ATOL, ParityReport, _ties, check_parity, raise_if_failed
from serving.session import open_session
from tests.conftest import ROOT
from tests.serving.conftest import GRID, LINEAGE, SEGMENTS, Exported, network, small

Edit = Callable[[onnx.ModelProto], Any]


def axes(value: onnx.ValueInfoProto) -> list[Any]:
    return [axis.dim_param or axis.dim_value for axis in value.type.tensor_type.shape.dim]


def val_rows(data: Path) -> list[tuple[np.ndarray, np.ndarray]]:
    """The five val videos, as one batch."""
    with open_folder(data) as folder:
        rows = folder.order("val")
        return [(folder.read_visual(rows), folder.read_audio(rows))]


def test_the_file_declares_names_axes_and_lineage(full: Exported) -> None:
    proto = onnx.load(full.path)
    assert {v.name: axes(v) for v in proto.graph.input} == {"visual": ["batch", 4, 2, 2, 6], "audio": ["batch", 4, 5]}
    assert {v.name: axes(v) for v in proto.graph.output} == {
        "event_logits": ["batch", 4],
        "class_logits": ["batch", 28],
        "segments": ["batch", 4],
    }
    assert [(entry.domain, entry.version) for entry in proto.opset_import] == [("", 20)]
    metadata = {entry.key: entry.value for entry in proto.metadata_props}
    assert metadata.items() >= LINEAGE.items()
    assert metadata["mode"] == "full"
    assert metadata["cmran_version"] == cmran.__version__
    assert metadata["model_config"] == full.model.config.model_dump_json()


def test_the_file_contains_nothing_about_this_machine(full: Exported) -> None:
    content = full.path.read_bytes()
    for trace in (str(ROOT).encode(), str(Path.home()).encode() + b"/", b".py", b"stack_trace", b"site-packages"):
        assert trace not in content
    assert [path.name for path in full.path.parent.iterdir()] == ["model.onnx"]


def test_equal_models_give_equal_bytes_and_the_network_is_not_changed(
    full: Exported, tmp_path: Path, capfd: pytest.CaptureFixture[str], recwarn: pytest.WarningsRecorder
) -> None:
    model = network(small()).double().train()
    model.load_state_dict(full.model.state_dict())
    state = torch.get_rng_state()
    export_onnx(model, tmp_path / "again.onnx", segments=SEGMENTS, grid=GRID, metadata=LINEAGE)
    assert (tmp_path / "again.onnx").read_bytes() == full.path.read_bytes()
    assert model.training
    assert next(model.parameters()).dtype == torch.float64
    assert next(model.parameters()).requires_grad
    assert torch.equal(torch.get_rng_state(), state)
    assert capfd.readouterr() == ("", "")
    assert not recwarn.list


def test_metadata_may_not_contradict_the_model(full: Exported, tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="metadata mode: 'weak' contradicts"):
        export_onnx(full.model, tmp_path / "x.onnx", segments=4, grid=GRID, metadata={"mode": "weak"})
    assert not (tmp_path / "x.onnx").exists()


@pytest.mark.parametrize("mode", ["full", "weak"])
def test_the_parity_check_passes_for_the_exported_network(
    exported: Callable[[Any], Exported], data: Path, mode: str
) -> None:
    model = exported(mode)
    parity = check_parity(model.path, model.model, real=val_rows(data))
    assert parity.passed, parity.failures
    raise_if_failed(parity)
    assert (parity.batch_sizes, parity.videos, parity.rows) == ((1, 2, 7), 12, 5)
    assert parity.equal_segments == 1.0
    assert parity.max_abs_difference is not None
    assert 0 < parity.max_abs_difference < 1e-3
    assert set(parity.max_abs_differences) == {"event_logits", "class_logits"}
    assert max(parity.max_abs_differences.values()) == parity.max_abs_difference
    assert ParityReport.model_validate_json(parity.model_dump_json()) == parity


@pytest.mark.parametrize(
    ("config", "segments", "grid"),
    [
        (small(audio_only=True), 3, (3, 2)),
        (small("weak", visual_only=True, heads=2), 1, (2, 2)),
        (
            small("weak", no_spatial_channel_attention=True, no_cross_modal_relation=True, no_interaction=True),
            2,
            (1, 1),
        ),
    ],
    ids=["audio_only", "visual_only", "no_parts"],
)
def test_ablations_and_unusual_sizes_pass_the_parity_check_with_both_inputs(
    tmp_path: Path, config: Any, segments: int, grid: tuple[int, int]
) -> None:
    model = network(config)
    path = export_onnx(model, tmp_path / "model.onnx", segments=segments, grid=grid)
    assert [value.name for value in onnx.load(path).graph.input] == ["visual", "audio"]
    raise_if_failed(check_parity(path, model))
    session = open_session(path, "cpu")
    visual = np.ones((3, segments, *grid, 6), np.float32)
    assert session.run(visual, np.ones((3, segments, 5), np.float32)).segments.shape == (3, segments)


def change_weight(proto: onnx.ModelProto, value: float = 0.05) -> None:
    tensor = next(t for t in proto.graph.initializer if t.name == "model.class_head.bias")
    array = numpy_helper.to_array(tensor).copy()
    array[3] += value
    tensor.CopyFrom(numpy_helper.from_array(array, tensor.name))


def swap_outputs(proto: onnx.ModelProto) -> None:
    first, second, third = (onnx.ValueInfoProto.FromString(v.SerializeToString()) for v in proto.graph.output)
    del proto.graph.output[:]
    proto.graph.output.extend([second, first, third])


def freeze_batch(proto: onnx.ModelProto) -> None:
    for value in (*proto.graph.input, *proto.graph.output):
        value.type.tensor_type.shape.dim[0].dim_value = 2


def other_rule(proto: onnx.ModelProto) -> None:
    (greater,) = [node for node in proto.graph.node if node.op_type == "Greater"]
    greater.op_type = "Less"


def rename_output(proto: onnx.ModelProto) -> None:
    for node in proto.graph.node:
        node.output[:] = ["scores" if name == "class_logits" else name for name in node.output]
        node.input[:] = ["scores" if name == "class_logits" else name for name in node.input]
    proto.graph.output[1].name = "scores"


def set_metadata(key: str, value: str) -> Edit:
    def edit(proto: onnx.ModelProto) -> None:
        next(entry for entry in proto.metadata_props if entry.key == key).value = value

    return edit


def drop_metadata(proto: onnx.ModelProto) -> None:
    del proto.metadata_props[:]


def break_graph(proto: onnx.ModelProto) -> None:
    proto.graph.node[-1].input[0] = "nowhere"


SABOTAGE: dict[str, tuple[Edit, list[str]]] = {
    "a weight changed": (
        change_weight,
        ["batch of 1, class_logits", "batch of 7, class_logits", "zeros, class_logits"],
    ),
    "a weight is NaN": (lambda p: change_weight(p, float("nan")), ["rows 0 to 4, class_logits"]),
    "outputs in another order": (swap_outputs, ["outputs: found class_logits, event_logits, segments"]),
    "batch frozen": (
        freeze_batch,
        ["visual: the batch size is fixed at 2", "segments: the batch size is fixed at 2", "batch of 7"],
    ),
    "another rule": (other_rule, ["batch of 7, segments:", "rows 0 to 4, segments:"]),
    "output renamed": (rename_output, ["outputs: found event_logits, scores, segments", "ONNX Runtime failed"]),
    "mode wrong": (set_metadata("mode", "weak"), ["metadata mode: found 'weak', the network has 'full'"]),
    "width wrong": (set_metadata("audio_features", "9"), ["metadata audio_features: found 9, the network has 5"]),
    "segments wrong": (set_metadata("segments", "9"), ["visual: shape (batch, [4, 2, 2, 6]), expected (batch, [9"]),
    "settings wrong": (set_metadata("model_config", "{}"), ["metadata model_config: found {}"]),
    "no metadata": (drop_metadata, ["lacks mode, categories, visual_features"]),
    "not a graph": (break_graph, ["onnx.checker", "not a usable ONNX model"]),
}


@pytest.mark.parametrize("name", SABOTAGE)
def test_the_parity_check_finds_sabotage(full: Exported, data: Path, tmp_path: Path, name: str) -> None:
    edit, expected = SABOTAGE[name]
    proto = onnx.load(full.path)
    edit(proto)
    (tmp_path / "model.onnx").write_bytes(proto.SerializeToString())
    parity = check_parity(tmp_path / "model.onnx", full.model, real=val_rows(data))
    assert not parity.passed
    for text in expected:
        assert any(text in failure for failure in parity.failures), parity.failures
    with pytest.raises(CmranError) as info:
        raise_if_failed(parity)
    assert "\n" not in str(info.value)
    assert all(failure in str(info.value) for failure in parity.failures)


def test_the_reported_difference_equals_the_actual_one(full: Exported, tmp_path: Path) -> None:
    proto = onnx.load(full.path)
    change_weight(proto, 0.05)
    onnx.save(proto, tmp_path / "model.onnx")
    parity = check_parity(tmp_path / "model.onnx", full.model)
    assert parity.max_abs_differences["class_logits"] == pytest.approx(0.05, rel=1e-3)
    assert parity.max_abs_difference == parity.max_abs_differences["class_logits"]
    assert parity.max_abs_differences["event_logits"] == pytest.approx(0, abs=1e-4)


def test_outputs_that_are_not_finite_have_no_largest_difference(full: Exported, tmp_path: Path) -> None:
    proto = onnx.load(full.path)
    change_weight(proto, float("nan"))
    onnx.save(proto, tmp_path / "model.onnx")
    parity = check_parity(tmp_path / "model.onnx", full.model)
    assert parity.max_abs_difference is None
    assert parity.max_abs_differences["class_logits"] is None


def test_weights_of_another_network_fail(full: Exported) -> None:
    other = network(small(), seed=1)
    parity = check_parity(full.path, other)
    assert any("event_logits" in failure for failure in parity.failures)


def test_another_mode_fails(full: Exported) -> None:
    parity = check_parity(full.path, network(small("weak")))
    assert any("metadata mode" in failure for failure in parity.failures)
    assert any("class_logits: shape (1, 28), expected (1, 29)" in failure for failure in parity.failures)


def test_weights_stored_outside_the_file_fail(full: Exported, tmp_path: Path) -> None:
    onnx.save_model(
        onnx.load(full.path), tmp_path / "model.onnx", save_as_external_data=True, location="w.bin", size_threshold=0
    )
    assert any("outside the file" in failure for failure in check_parity(tmp_path / "model.onnx", full.model).failures)


@pytest.mark.parametrize("content", [b"", b"hello world" * 50])
def test_a_file_that_is_not_a_model_fails(full: Exported, tmp_path: Path, content: bytes) -> None:
    (tmp_path / "model.onnx").write_bytes(content)
    parity = check_parity(tmp_path / "model.onnx", full.model)
    assert parity.failures
    assert (parity.max_abs_difference, parity.equal_segments, parity.rows) == (None, None, 0)


def test_the_parity_check_needs_a_file(full: Exported, tmp_path: Path) -> None:
    with pytest.raises(CmranError, match="no model file"):
        check_parity(tmp_path / "nothing.onnx", full.model)


def test_only_labels_within_tolerance_of_a_tie_may_differ() -> None:
    event = np.array([[0.0, ATOL / 2, 3 * ATOL, -1.0], [1.0, 1.0, 1.0, 1.0]], np.float32)
    classes = np.zeros((2, 28), np.float32)
    classes[0, 4] = 1.0
    classes[1, [4, 5]] = 2.0
    expected = [[True, True, False, False], [True] * 4]
    assert _ties(event, classes).tolist() == expected
