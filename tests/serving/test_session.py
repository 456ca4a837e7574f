import ctypes
import logging
from pathlib import Path

import numpy as np
import onnx
import pytest

import serving.session
from cmran.categories import CATEGORIES
from cmran.errors import CmranError
from cmran.utils.files import log_once
from serving.session import CPU, CUDA, Purpose, bare_session, open_session
from serving.signature import ModelMetadata
from tests.devices import on_cuda, without_cuda
from tests.serving.conftest import LINEAGE, Exported


def inputs(batch: int) -> tuple[np.ndarray, np.ndarray]:
    rng = np.random.default_rng(batch)
    return rng.random((batch, 4, 2, 2, 6), np.float32), rng.random((batch, 4, 5), np.float32)


def one_line_error(info: pytest.ExceptionInfo[CmranError]) -> str:
    text = str(info.value)
    assert "\n" not in text
    return text


@pytest.mark.parametrize("batch", [1, 5])
def test_a_session_computes_what_the_network_computes(full: Exported, batch: int) -> None:
    session = open_session(full.path, "cpu", threads=1)
    found = session.run(*inputs(batch))
    for value, expected in zip(found, full.outputs(*inputs(batch)), strict=True):
        assert value.shape == expected.shape
        np.testing.assert_allclose(value, expected, rtol=1e-4, atol=1e-4)
    assert session.provider == CPU
    assert found.segments.dtype == np.int64


def test_a_session_reads_the_metadata_of_the_file(weak: Exported) -> None:
    session = open_session(weak.path, "cpu")
    assert session.metadata == ModelMetadata(
        mode="weak", categories=CATEGORIES, visual_features=6, audio_features=5, segments=4, grid=(2, 2)
    )
    assert session.metadata.classes == 29
    assert {key: session.all_metadata[key] for key in LINEAGE} == LINEAGE


@pytest.mark.parametrize(
    ("visual", "audio", "named"),
    [
        (np.zeros((2, 4, 2, 2, 7), np.float32), np.zeros((2, 4, 5), np.float32), "visual"),
        (np.zeros((2, 4, 2, 2, 6), np.float64), np.zeros((2, 4, 5), np.float32), "float64"),
        (np.zeros((2, 4, 2, 2, 6), np.float32), np.zeros((3, 4, 5), np.float32), "audio"),
        (np.zeros((0, 4, 2, 2, 6), np.float32), np.zeros((0, 4, 5), np.float32), "visual"),
    ],
)
def test_inputs_that_do_not_fit_are_rejected(full: Exported, visual: np.ndarray, audio: np.ndarray, named: str) -> None:
    session = open_session(full.path, "cpu")
    with pytest.raises(ValueError, match=named):
        session.run(visual, audio)


def test_auto_logs_its_choice_once_as_information(full: Exported, caplog: pytest.LogCaptureFixture) -> None:
    log_once.cache_clear()
    with caplog.at_level(logging.INFO, "cmran"):
        session = open_session(full.path, "auto")
        open_session(full.path, "auto")
    assert [record.levelname for record in caplog.records] == ["INFO"]
    assert "device auto" in caplog.text
    assert session.provider in caplog.text


def test_cuda_without_a_driver_is_an_error(full: Exported, monkeypatch: pytest.MonkeyPatch) -> None:
    def no_driver(name: str) -> None:
        raise OSError(name)

    monkeypatch.setattr(ctypes, "CDLL", no_driver)
    with pytest.raises(CmranError, match=r"device cuda.*no NVIDIA driver") as info:
        open_session(full.path, "cuda")
    one_line_error(info)


@without_cuda
def test_cuda_that_falls_back_to_the_cpu_is_an_error(
    full: Exported, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    # A driver, but no CUDA libraries: ONNX Runtime lists CUDA as available, falls back to the CPU and raises nothing.
    monkeypatch.setattr(ctypes, "CDLL", lambda name: None)
    with pytest.raises(CmranError, match=r"device cuda.*provider did not start") as info:
        open_session(full.path, "cuda")
    one_line_error(info)
    log_once.cache_clear()
    with caplog.at_level(logging.INFO, "cmran"):
        assert open_session(full.path, "auto").provider == CPU
    assert "uses the CPU" in caplog.text


@on_cuda
def test_cuda_computes_what_the_network_computes(full: Exported) -> None:
    session = open_session(full.path, "cuda")
    assert session.provider == CUDA
    for value, expected in zip(session.run(*inputs(3)), full.outputs(*inputs(3)), strict=True):
        np.testing.assert_allclose(value, expected, rtol=1e-4, atol=1e-4)


def test_a_missing_file_is_named(tmp_path: Path) -> None:
    with pytest.raises(CmranError, match=r"no model file at .*nothing\.onnx"):
        open_session(tmp_path / "nothing.onnx", "cpu")


@pytest.mark.parametrize("keep", [0, 1000, -1])
def test_a_file_that_is_not_an_onnx_model_is_named(full: Exported, tmp_path: Path, keep: int) -> None:
    path = tmp_path / "broken.onnx"
    path.write_bytes(full.path.read_bytes()[:keep] if keep >= 0 else b"hello world" * 100)
    with pytest.raises(CmranError, match=r"broken\.onnx: not a usable ONNX model") as info:
        open_session(path, "auto")
    one_line_error(info)


def edited(source: Path, target: Path, edit: object) -> Path:
    proto = onnx.load(source)
    edit(proto)  # type: ignore[operator]
    onnx.save(proto, target)
    return target


def set_metadata(proto: onnx.ModelProto, key: str, value: str) -> None:
    next(entry for entry in proto.metadata_props if entry.key == key).value = value


@pytest.mark.parametrize(
    ("edit", "message"),
    [
        (lambda p: p.ClearField("metadata_props"), "metadata lacks mode, categories"),
        (lambda p: set_metadata(p, "grid", "7x7"), "metadata grid: expected JSON, found '7x7'"),
        (lambda p: set_metadata(p, "grid", "[" * 100_000), "metadata grid: expected JSON"),
        (lambda p: set_metadata(p, "segments", "1" * 5000), "metadata segments: expected JSON"),
        (lambda p: set_metadata(p, "mode", "both"), "metadata: mode: .*'both'"),
        (lambda p: set_metadata(p, "categories", '["Bark"]'), "metadata: categories"),
        (
            lambda p: set_metadata(p, "audio_features", "128"),
            r"audio is tensor\(float\) .*expected .*\(batch, 4, 128\)",
        ),
        (lambda p: set_metadata(p, "mode", "weak"), r"class_logits .*expected tensor\(float\) \(batch, 29\)"),
    ],
)
def test_a_model_of_another_exporter_is_rejected(full: Exported, tmp_path: Path, edit: object, message: str) -> None:
    with pytest.raises(CmranError, match=message) as info:
        open_session(edited(full.path, tmp_path / "other.onnx", edit), "cpu")
    assert "other.onnx" in one_line_error(info)


@pytest.mark.parametrize("text", [b"Church bell", b"MatMul\x22"])
def test_damaged_text_in_the_file_is_one_line(full: Exported, tmp_path: Path, text: bytes) -> None:
    content = bytearray(full.path.read_bytes())
    # In the file, a quotation mark and the length precede the type of an operator.
    found = content.find(text) if text.isalpha() or b" " in text else content.find(b'"\x06MatMul') + 2
    assert found > 1
    content[found] = 0xFF
    (tmp_path / "broken.onnx").write_bytes(content)
    with pytest.raises(CmranError, match=r"broken\.onnx: ") as info:
        open_session(tmp_path / "broken.onnx", "cpu")
    one_line_error(info)


def test_another_network_is_rejected(tmp_path: Path) -> None:
    node = onnx.helper.make_node("Relu", ["x"], ["y"])
    values = [onnx.helper.make_tensor_value_info(name, onnx.TensorProto.FLOAT, ["b", 2]) for name in "xy"]
    graph = onnx.helper.make_graph([node], "other", values[:1], values[1:])
    model = onnx.helper.make_model(graph, opset_imports=[onnx.helper.make_opsetid("", 20)], ir_version=10)
    metadata = ModelMetadata(
        mode="full", categories=CATEGORIES, visual_features=6, audio_features=5, segments=4, grid=(2, 2)
    )
    onnx.helper.set_model_props(model, metadata.to_strings())
    onnx.save(model, tmp_path / "other.onnx")
    with pytest.raises(CmranError, match="unknown x; unknown y; missing visual; missing audio"):
        open_session(tmp_path / "other.onnx", "cpu")


def test_threads_below_one_are_rejected(full: Exported) -> None:
    with pytest.raises(CmranError, match="`threads`: expected 1 or more, found 0"):
        open_session(full.path, "cpu", threads=0)


@pytest.mark.parametrize(
    ("purpose", "threads", "expected"),
    [("latency", None, (3, 1)), ("throughput", None, (1, 3)), ("latency", 2, (2, 1)), ("throughput", 2, (1, 2))],
)
def test_threads_default_to_the_usable_cpus(
    full: Exported, monkeypatch: pytest.MonkeyPatch, purpose: Purpose, threads: int | None, expected: tuple[int, int]
) -> None:
    monkeypatch.setattr(serving.session, "usable_cpus", lambda: 3)
    opened, create = [], serving.session._create
    monkeypatch.setattr(serving.session, "_create", lambda *given: opened.append(create(*given)) or opened[-1])
    session = open_session(full.path, "cpu", threads=threads, purpose=purpose)
    assert (opened[-1].get_session_options().intra_op_num_threads, session._runners.qsize()) == expected
    bare_session(full.path, "cpu")
    # Not the default of ONNX Runtime, which ignores a CPU quota.
    assert opened[-1].get_session_options().intra_op_num_threads == 3
