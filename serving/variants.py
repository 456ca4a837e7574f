"""Faster forms of an exported model: int8 for the CPU, float16 for CUDA, each with a proof against the float32 one.

They are made from the float32 file, whose proof against PyTorch stands beside it. Inputs and outputs stay float32, so
that all variants of a release are called alike.
"""

import contextlib
import hashlib
import logging
import tempfile
from collections.abc import Collection, Iterable, Iterator
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
from numpy.typing import NDArray

from cmran.config import Device, Frozen, Variant
from cmran.errors import CmranError
from serving.export import write_model
from serving.session import has_int8_products, open_session, read_metadata
from serving.signature import OUTPUTS

if TYPE_CHECKING:
    from onnx import ModelProto, NodeProto

MIN_EQUAL_SEGMENTS = 0.995
"""Share of segment labels that a variant must have in common with the float32 model."""
INT8_LEAVES = ("model.interaction.", "model.event_head.", "model.class_head.")
"""Parts that int8 leaves in float32: nothing after them evens their error out, and they are a fiftieth of all products.
On a network trained for one epoch, 8 bits in them alone tipped 0.7 % of the labels."""
DEVICES: dict[Variant, Device] = {"float32": "cpu", "int8": "cpu", "float16": "cuda"}
"""Where each variant runs, and is proven."""


class VariantReport(Frozen):
    """What comparing a variant with its float32 model on real videos showed."""

    variant: Variant
    digest: str
    # SHA-256 of the variant's file.
    base_digest: str
    # SHA-256 of the float32 file.
    provider: str
    # ONNX Runtime provider that ran the variant.
    rows: int
    # Videos compared.
    equal_segments: float | None
    # Share of equal segment labels, 0 to 1; None without videos.
    min_equal_segments: float
    # The bound that it has to reach.
    max_abs_differences: dict[str, float]
    # Of each output that is not labels.
    failures: tuple[str, ...]

    @property
    def passed(self) -> bool:
        """Whether the variant may be used."""
        return not self.failures

    @property
    def max_abs_difference(self) -> float | None:
        """Largest of all outputs; None without videos."""
        return max(self.max_abs_differences.values(), default=None)


def make_variant(base: Path, variant: Variant, out: Path) -> Path:
    """Write the float32 model `base` in another number format to `out`; its metadata are kept, and name the variant.

    int8: weights in 8 bits with one scale a channel, but for INT8_LEAVES; what they are multiplied with is put into 8
    bits at each run.
    float16: everything inside in 16 bits.

    Raises CmranError where `base` is not a float32 model of ours or `out` cannot be written.
    """
    import onnx

    found = read_metadata(base).variant
    if found != "float32":
        raise CmranError(f"{base}: is a model of variant {found}: variants are made from the float32 one")
    proto = onnx.load(str(base))
    strings = {entry.key: entry.value for entry in proto.metadata_props}
    with _quiet():
        made = _int8(base) if variant == "int8" else _float16(proto)
    _drop_unused_domains(made)
    return write_model(made, {**strings, "variant": variant}, out)


def check_variant(
    path: Path, base: Path, batches: Iterable[tuple[NDArray[np.float32], NDArray[np.float32]]]
) -> VariantReport:
    """Compare the variant at `path` with the float32 model `base` on real videos, where and how predictions run it.

    `batches`: visual (B, T, H, W, C) and audio (B, T, A), float32. At least MIN_EQUAL_SEGMENTS of the segment labels
    must be equal; each reason against it becomes one of `failures`. Raises CmranError where a file is not a model of
    ours, or the machine lacks what the variant runs on: then nothing is proven.
    """
    metadata, expected_metadata = read_metadata(path), read_metadata(base)
    variant = metadata.variant
    if variant == "int8" and not has_int8_products():
        raise CmranError("int8 cannot be proven here: this CPU has no 8-bit matrix products in hardware")
    reference = open_session(base, "cpu", purpose="throughput")
    session = open_session(path, DEVICES[variant], purpose="throughput")
    failures: list[str] = []
    if metadata != expected_metadata.model_copy(update={"variant": variant}):
        failures.append(f"its metadata are not those of {base}")
    differences: dict[str, float] = dict.fromkeys(OUTPUTS[:2], 0.0)
    rows = segments = equal = 0
    for visual, audio in batches:
        expected, found = reference.run(visual, audio), session.run(visual, audio)
        rows += len(visual)
        segments += found.segments.size
        equal += int((found.segments == expected.segments).sum())
        for name in differences:
            difference = float(np.abs(getattr(found, name).astype(np.float64) - getattr(expected, name)).max())
            # Not max(): a NaN, once met, is to stay.
            differences[name] = float(np.maximum(differences[name], difference))
    share = equal / segments if segments else None
    if share is None:
        failures.append("no video was compared")
    elif share < MIN_EQUAL_SEGMENTS:
        failures.append(
            f"{100 * share:.2f} % of {segments} segment labels are those of the float32 model, "
            f"expected {100 * MIN_EQUAL_SEGMENTS:g} % or more"
        )
    wrong = [name for name, value in differences.items() if not np.isfinite(value)]
    if wrong:
        failures.append(f"{', '.join(wrong)} are not finite")
    return VariantReport(
        variant=variant,
        digest=_sha256(path),
        base_digest=_sha256(base),
        provider=session.provider,
        rows=rows,
        equal_segments=share,
        min_equal_segments=MIN_EQUAL_SEGMENTS,
        max_abs_differences={name: value for name, value in differences.items() if rows and np.isfinite(value)},
        failures=tuple(failures),
    )


def pick_variant(available: Collection[Variant], *, cuda: bool) -> tuple[Variant, str]:
    """The fastest of the variants that are there and proven for this machine, and why it is that one.

    `cuda`: whether the work goes to CUDA. float32 always is there.
    """
    if cuda:
        if "float16" in available:
            return "float16", "the work is CUDA's, and the release has float16"
        return "float32", "the work is CUDA's, but the release has no float16"
    if "int8" not in available:
        return "float32", "the work is the CPU's, and the release has no int8"
    if not has_int8_products():
        return "float32", "this CPU has no 8-bit matrix products in hardware, as the proof of int8 assumes"
    return "int8", "the work is the CPU's, and the release has int8"


def _int8(base: Path) -> "ModelProto":
    import onnx
    from onnxruntime.quantization import QuantType, quantize_dynamic
    from onnxruntime.quantization.shape_inference import quant_pre_process

    with tempfile.TemporaryDirectory(prefix="cmran-") as name:
        ready, made = Path(name) / "ready.onnx", Path(name) / "int8.onnx"
        # Computes what is constant ahead, such as the parts of stacked weights: only constants get 8 bits.
        quant_pre_process(str(base), str(ready), skip_symbolic_shape=True)
        proto = onnx.load(str(ready))
        # Shapes of before, which no longer hold for transposed weights.
        del proto.graph.value_info[:]
        left = _products_left(onnx.load(str(base)))
        quantize_dynamic(proto, str(made), weight_type=QuantType.QInt8, per_channel=True, nodes_to_exclude=left)
        return onnx.load(str(made))


def _products_left(proto: "ModelProto") -> list[str]:
    """Names of the matrix products of INT8_LEAVES: one of their weights goes into them, or their bias is added."""
    makers = {output: node for node in proto.graph.node for output in node.output}
    names = []
    for node in proto.graph.node:
        for value in node.input:
            maker = makers.get(value)
            if node.op_type in ("MatMul", "Gemm") and _weight(value, makers).startswith(INT8_LEAVES):
                # The quantiser first makes a product and a sum of a Gemm, under another name.
                names.append(node.name if node.op_type == "MatMul" else f"{node.name}_MatMul")
            elif node.op_type == "Add" and maker is not None and maker.op_type == "MatMul":
                names += [maker.name for bias in node.input if bias.startswith(INT8_LEAVES)]
    return names


def _weight(value: str, makers: "dict[str, NodeProto]") -> str:
    """The weight that a value is a part of, or the value itself: stacked weights are split and transposed."""
    while value in makers and makers[value].op_type in ("Transpose", "Split"):
        value = makers[value].input[0]
    return value


def _float16(proto: "ModelProto") -> "ModelProto":
    from onnxruntime.transformers.float16 import convert_float_to_float16
    from onnxruntime.transformers.onnx_model import OnnxModel

    del proto.graph.value_info[:]
    model = OnnxModel(convert_float_to_float16(proto, keep_io_types=True))
    # The conversion of the inputs was put at the end of the list.
    model.topological_sort()
    sorted_proto: ModelProto = model.model
    return sorted_proto


def _drop_unused_domains(proto: "ModelProto") -> None:
    """Take out the operator sets that ONNX Runtime's tools list, whether the graph uses them or not."""
    used = {node.domain for node in proto.graph.node}
    kept = [entry for entry in proto.opset_import if entry.domain in used]
    versions = {entry.domain: entry.version for entry in kept}
    del proto.opset_import[:]
    for domain, version in versions.items():
        entry = proto.opset_import.add()
        entry.domain, entry.version = domain, version


@contextlib.contextmanager
def _quiet() -> Iterator[None]:
    """The quantiser advises, on the root logger, to do what has been done."""
    logger = logging.getLogger()
    level = logger.level
    logger.setLevel(logging.ERROR)
    try:
        yield
    finally:
        logger.setLevel(level)


def _sha256(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()
