"""Precision variants of an exported model: int8 for the CPU and float16 for CUDA, each checked against float32.

A variant is converted from the float32 file, which has passed its own parity check against PyTorch. Inputs and outputs
stay float32, so that all variants of a release have the same interface.

Shape letters: B videos, T segments, H x W grid, C visual channels, A audio features, K class logits.
"""

import tempfile
from collections.abc import Collection, Iterable
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
from numpy.typing import NDArray

from cmran.config import Device, Frozen, Variant
from cmran.errors import DeviceError, ExportError
from cmran.utils.files import sha256_file
from serving.export import quiet, write_model
from serving.session import has_int8_products, open_session, read_metadata
from serving.signature import OUTPUTS

if TYPE_CHECKING:
    from onnx import ModelProto, NodeProto

MIN_EQUAL_SEGMENTS = 0.995
"""Share of segment labels of a variant that must equal those of the float32 model."""
FLOAT32_PARTS = ("model.interaction.", "model.event_head.", "model.class_head.")
"""Parts that stay float32 in an int8 model. No later layer averages out their error, and they are 2 % of all products.
After one epoch of training, 8 bits in these parts alone changed 0.7 % of the labels."""
DEVICES: dict[Variant, Device] = {"float32": "cpu", "int8": "cpu", "float16": "cuda"}
"""The device on which each variant runs and is checked."""


class VariantReport(Frozen):
    """The result of comparing a precision variant with its float32 model on real videos."""

    variant: Variant
    """Number format of the variant."""
    digest: str
    """SHA-256 of the file of the variant."""
    base_digest: str
    """SHA-256 of the float32 file."""
    provider: str
    """ONNX Runtime provider that ran the variant."""
    rows: int
    """Number of videos compared."""
    equal_segments: float | None
    """Share of equal segment labels, 0 to 1; `None` without videos."""
    min_equal_segments: float
    """Lower bound of `equal_segments`."""
    max_abs_differences: dict[str, float]
    """Largest difference of each output except the labels."""
    failures: tuple[str, ...]
    """The reasons why the variant must not be used."""

    @property
    def passed(self) -> bool:
        """Whether the variant may be used."""
        return not self.failures

    @property
    def max_abs_difference(self) -> float | None:
        """Largest difference of all outputs; `None` without videos."""
        return max(self.max_abs_differences.values(), default=None)


def make_variant(base: Path, variant: Variant, out: Path) -> Path:
    """Convert a float32 model to another number format. Its metadata is kept, with the name of the variant.

    Args:
        base: The float32 model.
        variant: "int8": weights in 8 bits with one scale per channel, except FLOAT32_PARTS; activations are quantized
            dynamically in each run. "float16": weights, activations and products in 16 bits.
        out: The file to write, atomically.

    Returns:
        `out`.

    Raises:
        ExportError: `base` is not a float32 model exported by this project.
        StorageError: `out` cannot be written.
    """
    import onnx

    found = read_metadata(base).variant
    if found != "float32":
        raise ExportError(f"{base}: found a model of variant {found}, expected float32: variants are made from that")
    proto = onnx.load(str(base))
    strings = {entry.key: entry.value for entry in proto.metadata_props}
    # The quantizer logs advice to the root logger.
    with quiet(""):
        converted = _int8(base) if variant == "int8" else _float16(proto)
    _drop_unused_domains(converted)
    return write_model(converted, {**strings, "variant": variant}, out)


def check_variant(
    path: Path, base: Path, batches: Iterable[tuple[NDArray[np.float32], NDArray[np.float32]]]
) -> VariantReport:
    """Compare a variant with its float32 model on real videos, on the device and in the way that predictions use it.

    Args:
        path: The variant.
        base: The float32 model.
        batches: Visual maps (B, T, H, W, C) and audio embeddings (B, T, A), float32.

    Returns:
        The report. It passes if at least MIN_EQUAL_SEGMENTS of the segment labels are equal, all outputs are finite
        and the metadata agrees.

    Raises:
        ExportError: A file is not a model exported by this project.
        DeviceError: This machine cannot run the variant, so that it cannot be checked.
    """
    metadata, expected_metadata = read_metadata(path), read_metadata(base)
    variant = metadata.variant
    if variant == "int8" and not has_int8_products():
        raise DeviceError("int8 cannot be checked here: this CPU has no 8-bit dot products in hardware")
    reference = open_session(base, "cpu", purpose="throughput")
    session = open_session(path, DEVICES[variant], purpose="throughput")
    failures: list[str] = []
    if metadata != expected_metadata.model_copy(update={"variant": variant}):
        failures.append(f"its metadata differs from that of {base}")
    differences: dict[str, float] = dict.fromkeys(OUTPUTS[:2], 0.0)
    rows = segments = equal = 0
    for visual, audio in batches:
        expected, found = reference.run(visual, audio), session.run(visual, audio)
        rows += len(visual)
        segments += found.segments.size
        equal += int((found.segments == expected.segments).sum())
        for name in differences:
            difference = float(np.abs(getattr(found, name).astype(np.float64) - getattr(expected, name)).max())
            # Not max(), which would drop a NaN.
            differences[name] = float(np.maximum(differences[name], difference))
    share = equal / segments if segments else None
    if share is None:
        failures.append("no video was compared")
    elif share < MIN_EQUAL_SEGMENTS:
        failures.append(
            f"{100 * share:.2f} % of {segments} segment labels equal those of the float32 model, "
            f"expected {100 * MIN_EQUAL_SEGMENTS:g} % or more"
        )
    wrong = [name for name, value in differences.items() if not np.isfinite(value)]
    if wrong:
        failures.append(f"{', '.join(wrong)} are not finite")
    return VariantReport(
        variant=variant,
        digest=sha256_file(path),
        base_digest=sha256_file(base),
        provider=session.provider,
        rows=rows,
        equal_segments=share,
        min_equal_segments=MIN_EQUAL_SEGMENTS,
        max_abs_differences={name: value for name, value in differences.items() if rows and np.isfinite(value)},
        failures=tuple(failures),
    )


def pick_variant(available: Collection[Variant], *, cuda: bool) -> tuple[Variant, str]:
    """Choose the fastest variant that was checked for this kind of machine.

    Args:
        available: Variants of the release; float32 is always available.
        cuda: Whether the model runs on CUDA.

    Returns:
        The variant and the reason for the choice.
    """
    if cuda:
        if "float16" in available:
            return "float16", "the model runs on CUDA, and the release has float16"
        return "float32", "the model runs on CUDA, and the release has no float16"
    if "int8" not in available:
        return "float32", "the model runs on the CPU, and the release has no int8"
    if not has_int8_products():
        return "float32", "this CPU has no 8-bit dot products in hardware, on which the check of int8 relies"
    return "int8", "the model runs on the CPU, and the release has int8"


def _int8(base: Path) -> "ModelProto":
    import onnx
    from onnxruntime.quantization import QuantType, quantize_dynamic
    from onnxruntime.quantization.shape_inference import quant_pre_process

    with tempfile.TemporaryDirectory(prefix="cmran-") as name:
        ready, quantized = Path(name) / "ready.onnx", Path(name) / "int8.onnx"
        # Folds constants, such as the parts of stacked weights: only constants are quantized.
        quant_pre_process(str(base), str(ready), skip_symbolic_shape=True)
        proto = onnx.load(str(ready))
        # These shapes are no longer valid for transposed weights.
        del proto.graph.value_info[:]
        excluded = _float32_products(onnx.load(str(base)))
        quantize_dynamic(
            proto, str(quantized), weight_type=QuantType.QInt8, per_channel=True, nodes_to_exclude=excluded
        )
        return onnx.load(str(quantized))


def _float32_products(proto: "ModelProto") -> list[str]:
    """Names of the matrix products of FLOAT32_PARTS: those with one of their weights, or followed by their bias."""
    producers = {output: node for node in proto.graph.node for output in node.output}
    names = []
    for node in proto.graph.node:
        for value in node.input:
            producer = producers.get(value)
            if node.op_type in ("MatMul", "Gemm") and _weight(value, producers).startswith(FLOAT32_PARTS):
                # The quantizer first splits a Gemm into a product and a sum, under another name.
                names.append(node.name if node.op_type == "MatMul" else f"{node.name}_MatMul")
            elif node.op_type == "Add" and producer is not None and producer.op_type == "MatMul":
                names += [producer.name for bias in node.input if bias.startswith(FLOAT32_PARTS)]
    return names


def _weight(value: str, producers: "dict[str, NodeProto]") -> str:
    """The weight that a value is a part of, or the value itself. Stacked weights are split and transposed."""
    while value in producers and producers[value].op_type in ("Transpose", "Split"):
        value = producers[value].input[0]
    return value


def _float16(proto: "ModelProto") -> "ModelProto":
    from onnxruntime.transformers.float16 import convert_float_to_float16
    from onnxruntime.transformers.onnx_model import OnnxModel

    del proto.graph.value_info[:]
    model = OnnxModel(convert_float_to_float16(proto, keep_io_types=True))
    # The converter appends the casts of the inputs to the end of the list.
    model.topological_sort()
    sorted_proto: ModelProto = model.model
    return sorted_proto


def _drop_unused_domains(proto: "ModelProto") -> None:
    """Remove the operator sets that the graph does not use; the tools of ONNX Runtime list them anyway."""
    used = {node.domain for node in proto.graph.node}
    kept = [entry for entry in proto.opset_import if entry.domain in used]
    versions = {entry.domain: entry.version for entry in kept}
    del proto.opset_import[:]
    for domain, version in versions.items():
        entry = proto.opset_import.add()
        entry.domain, entry.version = domain, version
