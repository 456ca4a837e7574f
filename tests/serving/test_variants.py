"""Precision variants of an exported model and their check against float32."""

import logging
from collections.abc import Callable
from pathlib import Path

import numpy as np
import onnx
import pytest
from onnx import numpy_helper

from cmran.config import Device, Mode, Variant
from cmran.data.dataset import open_folder
from cmran.errors import CmranError
from cmran.utils.files import log_once
from serving import variants
from serving.session import (
    CPU,
    CUDA,
    Session,
    SessionOutputs,
    bare_session,
    has_int8_products,
    open_session,
    read_metadata,
)
from serving.variants import check_variant, make_variant, pick_variant
from tests.devices import on_cuda, without_cuda
from tests.serving.conftest import LINEAGE, Exported

Batches = list[tuple[np.ndarray, np.ndarray]]

needs_int8 = pytest.mark.skipif(not has_int8_products(), reason="needs a CPU with 8-bit dot products")


@pytest.fixture(scope="module")
def batches(data: Path) -> Batches:
    with open_folder(data) as folder:
        parts = (np.arange(start, min(start + 6, folder.videos)) for start in range(0, folder.videos, 6))
        return [(folder.read_visual(part), folder.read_audio(part)) for part in parts]


@pytest.fixture(scope="module")
def converted(exported: Callable[[Mode], Exported], tmp_path_factory: pytest.TempPathFactory) -> Callable[..., Path]:
    """A variant of the small exported model of a mode, created once."""
    found: dict[tuple[str, str], Path] = {}

    def get(variant: Variant, mode: Mode = "full") -> Path:
        if (variant, mode) not in found:
            folder = tmp_path_factory.mktemp(variant)
            found[variant, mode] = make_variant(exported(mode).path, variant, folder / f"{mode}.onnx")
        return found[variant, mode]

    return get


def run(path: Path, batches: Batches, device: Device = "cpu") -> list[np.ndarray]:
    session, _ = bare_session(path, device, threads=1)
    outputs = [session.run(None, {"visual": visual, "audio": audio}) for visual, audio in batches]
    return [np.concatenate(arrays) for arrays in zip(*outputs, strict=True)]


@pytest.mark.parametrize("mode", ["full", "weak"])
@pytest.mark.parametrize("variant", ["int8", "float16"])
def test_a_variant_is_a_complete_model_with_the_same_metadata(
    converted: Callable[..., Path], exported: Callable[[Mode], Exported], variant: Variant, mode: Mode
) -> None:
    path, base = converted(variant, mode), exported(mode).path
    proto, base_proto = onnx.load(path), onnx.load(base)
    onnx.checker.check_model(proto, full_check=True)
    strings, base_strings = ({entry.key: entry.value for entry in each.metadata_props} for each in (proto, base_proto))
    assert base_strings["variant"] == "float32"
    assert strings == base_strings | {"variant": variant}
    assert strings.items() >= LINEAGE.items()
    ends, base_ends = ([*each.graph.input, *each.graph.output] for each in (proto, base_proto))
    assert [(end.name, end.type) for end in ends] == [(end.name, end.type) for end in base_ends]
    assert [entry.domain for entry in proto.opset_import] == [""]
    assert b"/tmp" not in path.read_bytes()
    weights = [tensor.data_type for tensor in proto.graph.initializer if len(tensor.dims) == 2]
    if variant == "float16":
        assert set(weights) == {onnx.TensorProto.FLOAT16}
    else:
        # Query, key and value of the interaction and both heads stay float32. The output layer of the interaction does
        # not: in an untrained network all biases are zero and are stored once, under the name of another layer.
        kept = [t for t in proto.graph.initializer if len(t.dims) == 2 and t.data_type == onnx.TensorProto.FLOAT]
        assert len(kept) == 4
        assert sum(node.op_type == "MatMulInteger" for node in proto.graph.node) == 7 + 4 + 4 * 4 + 2 * 5 + 1
        assert set(weights) == {onnx.TensorProto.INT8, onnx.TensorProto.FLOAT}


def test_equal_models_give_equal_bytes(converted: Callable[..., Path], full: Exported, tmp_path: Path) -> None:
    for variant in ("int8", "float16"):
        again = make_variant(full.path, variant, tmp_path / f"{variant}.onnx")
        assert again.read_bytes() == converted(variant).read_bytes()


@pytest.mark.parametrize("variant", ["int8", "float16"])
def test_the_outputs_of_a_variant_are_close_to_those_of_the_model(
    converted: Callable[..., Path], full: Exported, batches: Batches, variant: Variant
) -> None:
    expected, found = run(full.path, batches), run(converted(variant), batches)
    for one, two in zip(expected[:2], found[:2], strict=True):
        assert one.dtype == two.dtype == np.float32
        # Relative, because the heads of the fixture spread the outputs widely.
        difference = np.abs(one - two).max() / np.abs(one).max()
        assert 0 < difference < 0.1
    assert np.mean(expected[2] == found[2]) > 0.9


@needs_int8
@pytest.mark.parametrize("mode", ["full", "weak"])
def test_the_report_states_what_was_compared(
    converted: Callable[..., Path], exported: Callable[[Mode], Exported], batches: Batches, mode: Mode
) -> None:
    base, path = exported(mode).path, converted("int8", mode)
    parity = check_variant(path, base, batches)
    assert (parity.variant, parity.provider, parity.rows, parity.min_equal_segments) == ("int8", CPU, 22, 0.995)
    micro_batches = [(visual[i : i + 1], audio[i : i + 1]) for visual, audio in batches for i in range(len(visual))]
    expected, found = run(base, batches), run(path, micro_batches)
    assert parity.equal_segments == pytest.approx(np.mean(expected[2] == found[2]))
    for name, one, two in zip(("event_logits", "class_logits"), expected, found, strict=False):
        assert parity.max_abs_differences[name] == pytest.approx(np.abs(one - two).max(), abs=1e-4)
    assert parity.max_abs_difference == max(parity.max_abs_differences.values())
    assert parity.passed == (parity.equal_segments >= 0.995)


def spoil(source: Path, target: Path, value: float) -> Path:
    """The model with a larger bias for one class."""
    proto = onnx.load(source)
    tensor = next(t for t in proto.graph.initializer if t.name == "model.class_head.bias")
    array = numpy_helper.to_array(tensor).copy()
    array[3] += value
    tensor.CopyFrom(numpy_helper.from_array(array, tensor.name))
    onnx.save(proto, target)
    return target


@needs_int8
def test_a_variant_that_predicts_other_labels_is_rejected(full: Exported, batches: Batches, tmp_path: Path) -> None:
    other = make_variant(spoil(full.path, tmp_path / "other.onnx", 1e4), "int8", tmp_path / "int8.onnx")
    parity = check_variant(other, full.path, batches)
    assert not parity.passed
    assert parity.equal_segments is not None
    assert parity.equal_segments < 0.995
    (failure,) = parity.failures
    assert failure.endswith("of 88 segment labels equal those of the float32 model, expected 99.5 % or more")
    assert parity.max_abs_differences["class_logits"] > 5e3


@needs_int8
def test_the_bound_is_the_share_of_equal_labels(
    converted: Callable[..., Path], full: Exported, batches: Batches, monkeypatch: pytest.MonkeyPatch
) -> None:
    class Tipped(Session):
        """The same labels, except for `wrong` of the first batch."""

        wrong = 0

        def run(self, visual: np.ndarray, audio: np.ndarray) -> SessionOutputs:
            outputs = super().run(visual, audio)
            labels = reference.run(visual, audio).segments.copy()
            labels.ravel()[: self.wrong] += 1
            Tipped.wrong = 0
            return outputs._replace(segments=labels)

    reference = open_session(full.path, "cpu", threads=1)
    many = batches * 10  # 880 segments: 4 may differ.

    def opened(path: Path, *arguments: object, **options: object) -> Session:
        return reference if path == full.path else Tipped(path, *bare_session(path, "cpu", threads=1))

    monkeypatch.setattr(variants, "open_session", opened)
    for wrong, passed in ((4, True), (5, False)):
        Tipped.wrong = wrong
        parity = check_variant(converted("int8"), full.path, many)
        assert parity.equal_segments == pytest.approx(1 - wrong / 880)
        assert parity.passed is passed


@needs_int8
def test_a_check_without_videos_fails(
    converted: Callable[..., Path], full: Exported, weak: Exported, batches: Batches
) -> None:
    parity = check_variant(converted("int8"), full.path, [])
    assert parity.failures == ("no video was compared",)
    assert (parity.equal_segments, parity.max_abs_difference) == (None, None)
    assert any("metadata" in failure for failure in check_variant(converted("int8"), weak.path, []).failures)


@needs_int8
def test_outputs_that_are_not_finite_fail(full: Exported, batches: Batches, tmp_path: Path) -> None:
    path = make_variant(full.path, "int8", tmp_path / "int8.onnx")
    proto = onnx.load(path)
    tensor = next(t for t in proto.graph.initializer if t.name == "model.class_head.bias")
    tensor.CopyFrom(numpy_helper.from_array(np.full(28, np.nan, np.float32), tensor.name))
    onnx.save(proto, path)
    parity = check_variant(path, full.path, batches)
    assert "class_logits are not finite" in parity.failures


def test_a_variant_of_a_variant_is_rejected(converted: Callable[..., Path], tmp_path: Path) -> None:
    with pytest.raises(CmranError, match="found a model of variant float16, expected float32"):
        make_variant(converted("float16"), "int8", tmp_path / "twice.onnx")
    assert not list(tmp_path.iterdir())


def test_int8_is_not_checked_on_a_cpu_without_8_bit_dot_products(
    converted: Callable[..., Path], full: Exported, batches: Batches, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(variants, "has_int8_products", lambda: False)
    with pytest.raises(CmranError, match="int8 cannot be checked here"):
        check_variant(converted("int8"), full.path, batches)
    assert pick_variant(("int8",), cuda=False)[0] == "float32"


@pytest.mark.parametrize(
    ("available", "cuda", "expected"),
    [
        (("int8", "float16"), False, "int8"),
        (("int8", "float16"), True, "float16"),
        (("int8",), True, "float32"),
        (("float16",), False, "float32"),
        ((), False, "float32"),
        ((), True, "float32"),
    ],
)
def test_auto_chooses_by_device(
    available: tuple[Variant, ...], cuda: bool, expected: Variant, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(variants, "has_int8_products", lambda: True)
    variant, why = pick_variant(available, cuda=cuda)
    assert variant == expected
    assert ("CUDA" in why) is cuda


def test_float16_is_rejected_on_the_cpu(converted: Callable[..., Path], full: Exported) -> None:
    with pytest.raises(CmranError, match="variant float16, which runs on CUDAExecutionProvider only") as info:
        open_session(converted("float16"), "cpu")
    assert "\n" not in str(info.value)


@without_cuda
def test_float16_is_not_checked_without_cuda(converted: Callable[..., Path], full: Exported) -> None:
    with pytest.raises(CmranError, match="device cuda"):
        check_variant(converted("float16"), full.path, [])


@on_cuda
@pytest.mark.parametrize("mode", ["full", "weak"])
def test_float16_is_checked_on_a_gpu(
    converted: Callable[..., Path], exported: Callable[[Mode], Exported], mode: Mode, batches: Batches
) -> None:
    parity = check_variant(converted("float16", mode), exported(mode).path, batches)
    assert parity.provider == CUDA
    assert parity.rows == sum(len(visual) for visual, _ in batches)
    largest = max(np.abs(value).max() for value in run(exported(mode).path, batches)[:2])
    # Relative, because the heads of the fixture spread the outputs widely.
    assert 0 < max(parity.max_abs_differences.values()) < 0.02 * largest
    assert parity.equal_segments is not None
    assert parity.equal_segments > 0.9
    assert open_session(converted("float16", mode), "auto").provider == CUDA


def test_int8_runs_on_the_cpu(
    converted: Callable[..., Path], monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    real = bare_session

    def on_cuda(path: Path, device: Device, *, threads: int | None = None) -> tuple[object, str]:
        session, provider = real(path, "cpu", threads=threads)
        return session, provider if device == "cpu" else CUDA

    monkeypatch.setattr("serving.session.bare_session", on_cuda)
    log_once.cache_clear()
    with caplog.at_level(logging.INFO, "cmran"):
        assert open_session(converted("int8"), "auto").provider == CPU
    assert "is an int8 model: it runs on the CPU" in caplog.text
    with pytest.raises(CmranError, match="variant int8, which runs on CPUExecutionProvider only"):
        open_session(converted("int8"), "cuda")


def test_metadata_name_the_variant(converted: Callable[..., Path], full: Exported) -> None:
    assert [read_metadata(path).variant for path in (full.path, converted("int8"), converted("float16"))] == [
        "float32",
        "int8",
        "float16",
    ]


def test_a_model_without_a_variant_in_its_metadata_is_float32(full: Exported, tmp_path: Path) -> None:
    proto = onnx.load(full.path)
    kept = [entry for entry in proto.metadata_props if entry.key != "variant"]
    del proto.metadata_props[:]
    proto.metadata_props.extend(kept)
    onnx.save(proto, tmp_path / "old.onnx")
    assert open_session(tmp_path / "old.onnx", "cpu").metadata == open_session(full.path, "cpu").metadata


@pytest.fixture(params=["latency", "throughput", "bound"])
def opened(request: pytest.FixtureRequest, exported: Callable[[Mode], Exported]) -> Callable[[Path], Session]:
    """Sessions with each kind of runner."""

    def get(path: Path) -> Session:
        if request.param == "bound":
            return Session(path, *bare_session(path, "cpu", threads=1), runners=2, bound_to="cpu")
        return open_session(path, "cpu", threads=2, purpose=request.param)

    return get


@pytest.mark.parametrize("size", [1, 4, 7, 22])
def test_parallel_micro_batches_give_the_whole_batch(
    opened: Callable[[Path], Session], full: Exported, batches: Batches, size: int
) -> None:
    visual, audio = (np.concatenate(arrays)[:size] for arrays in zip(*batches, strict=True))
    session = opened(full.path)
    assert session.micro_batch == 4
    expected = full.outputs(visual, audio)
    # Two batches at the same time, so that buffers are reused.
    waiting = [session.start(visual, audio), session.start(visual[::-1].copy(), audio[::-1].copy())]
    for outputs, order in zip((wait() for wait in waiting), (slice(None), slice(None, None, -1)), strict=True):
        for found, wanted in zip(outputs, expected, strict=True):
            np.testing.assert_allclose(found, wanted[order], rtol=1e-4, atol=1e-4)


def test_int8_outputs_of_a_video_do_not_depend_on_the_other_videos(
    opened: Callable[[Path], Session], converted: Callable[..., Path], batches: Batches
) -> None:
    session = opened(converted("int8"))
    visual, audio = batches[0]
    alone = session.run(visual[:1], audio[:1])
    loud = np.concatenate([visual[:1], 50 * visual[1:]])
    for found, expected in zip(session.run(loud, audio), alone, strict=True):
        np.testing.assert_array_equal(found[:1], expected)
