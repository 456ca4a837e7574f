"""Parity check: compare an ONNX file with the PyTorch network that it was exported from.

Shape letters: B videos, T segments, H x W grid, C visual channels, A audio features, K class logits.
"""

import hashlib
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np
import torch
from numpy.typing import NDArray

from cmran.categories import CATEGORIES
from cmran.config import Device, Frozen
from cmran.errors import CmranError, DeviceError, ExportError
from cmran.model.losses import predict_segments
from cmran.model.network import CMRAN, Outputs
from cmran.utils.device import limit_threads
from serving.export import float32_copy
from serving.session import bare_session, one_line, runtime_errors
from serving.signature import OUTPUTS, ModelMetadata

if TYPE_CHECKING:
    from onnx import ModelProto

BATCH_SIZES = (1, 2, 7)
"""Batch sizes of the random videos. An exporter may fix the batch size at 1 by mistake."""
ATOL = RTOL = 1e-4
"""Outputs may differ by ATOL + RTOL x |value|, the rounding error of float32."""

VideoBatch = tuple[NDArray[Any], NDArray[Any]]
"""Visual maps (B, T, H, W, C) and audio embeddings (B, T, A) of some videos."""


class ParityReport(Frozen):
    """The result of comparing an ONNX model with its network."""

    path: str
    """The ONNX file."""
    digest: str
    """SHA-256 of the file."""
    provider: str | None
    """ONNX Runtime provider; `None` if the file could not be loaded."""
    batch_sizes: tuple[int, ...]
    """Batch sizes of the random videos."""
    videos: int
    """Number of random and all-zero videos compared."""
    rows: int
    """Number of real videos compared."""
    atol: float
    """Absolute tolerance of the outputs."""
    rtol: float
    """Relative tolerance of the outputs."""
    max_abs_difference: float | None
    """Largest difference of all outputs; `None` if nothing was compared, or a value was not finite."""
    max_abs_differences: dict[str, float | None]
    """Largest difference of each output except the labels."""
    equal_segments: float | None
    """Share of equal segment labels, 0 to 1."""
    failures: tuple[str, ...]
    """All mismatches, one line each."""

    @property
    def passed(self) -> bool:
        """Whether there is no mismatch."""
        return not self.failures


def check_parity(
    path: Path,
    model: CMRAN,
    *,
    real: Iterable[VideoBatch] = (),
    device: Device = "cpu",
) -> ParityReport:
    """Compare an ONNX file with the network that it was exported from, and collect every mismatch.

    The check covers onnx.checker; the metadata; the names, dtypes, ranks and axes of inputs and outputs; and the
    outputs against PyTorch in float32 on the CPU. The inputs are seeded random videos in batches of 1, 2 and 7,
    all-zero videos, and `real` ones. Outputs may differ by ATOL + RTOL x |value|. Segment labels must be equal, unless
    a difference of that size can change them: an event logit near 0, or a tie of the two largest class logits.

    Args:
        path: The ONNX file.
        model: The network. It is not changed.
        real: Batches of real videos. They are read one at a time, so that memory is that of one batch.
        device: Where ONNX Runtime computes: "cpu", "cuda" or "auto".

    Returns:
        The report; a mismatch does not raise, see `raise_if_failed`.

    Raises:
        ExportError: The file is missing.
        DeviceError: `device` is not available.
    """
    import onnx

    if not path.is_file():
        raise ExportError(f"no model file at {path}")
    content = path.read_bytes()
    findings = _Findings()
    session, provider = None, None
    try:
        proto = onnx.load_model_from_string(content)
    except Exception as error:  # protobuf's own DecodeError has no stable home
        findings.failures.append(f"not an ONNX file: {one_line(error)}")
    else:
        shapes = _check_file(proto, path, model, findings)
        try:
            session, provider = bare_session(path, device)
        except DeviceError:
            raise
        except CmranError as error:
            findings.failures.append(str(error))
        if session is not None:
            limit_threads()
            reference = float32_copy(model)
            for case, visual_B, audio_B in _cases(shapes, real):
                _compare(case, session, reference, visual_B, audio_B, findings)

    worst = findings.differences.values()
    return ParityReport(
        path=str(path),
        digest=hashlib.sha256(content).hexdigest(),
        provider=provider,
        batch_sizes=BATCH_SIZES,
        videos=findings.videos - findings.rows,
        rows=findings.rows,
        atol=ATOL,
        rtol=RTOL,
        max_abs_difference=None if not worst or None in worst else max(value for value in worst if value is not None),
        max_abs_differences=findings.differences,
        equal_segments=findings.equal / findings.segments if findings.segments else None,
        failures=tuple(findings.failures),
    )


def raise_if_failed(parity: ParityReport) -> None:
    """Raise ExportError, in one line with all mismatches, if the parity check failed."""
    if not parity.passed:
        raise ExportError(
            f"{parity.path}: the ONNX model differs from the network and must not be used: "
            + "; ".join(parity.failures)
        )


class _Findings:
    """The results of a parity check so far."""

    def __init__(self) -> None:
        self.failures: list[str] = []
        self.differences: dict[str, float | None] = {}
        self.videos = self.rows = 0
        self.segments = self.equal = 0

    def add_difference(self, name: str, value: float) -> None:
        before = self.differences.get(name, 0.0)
        self.differences[name] = None if before is None or not np.isfinite(value) else max(before, value)


class _Shapes(NamedTuple):
    """Shapes of the inputs without the batch axis."""

    visual: tuple[int, ...]
    audio: tuple[int, ...]


def _check_file(proto: "ModelProto", path: Path, model: CMRAN, findings: _Findings) -> _Shapes:
    """Check everything that needs no inference. Return the shapes to run the model with."""
    import onnx

    failures = findings.failures
    try:
        onnx.checker.check_model(proto, full_check=True)
    except (onnx.checker.ValidationError, onnx.shape_inference.InferenceError) as error:
        failures.append(f"onnx.checker: {one_line(error)}")
    if any(tensor.data_location == onnx.TensorProto.EXTERNAL for tensor in proto.graph.initializer):
        failures.append("weights are stored outside the file")

    config = model.config
    expected: dict[str, object] = {
        "mode": config.mode,
        "categories": CATEGORIES,
        "visual_features": config.visual_features,
        "audio_features": config.audio_features,
    }
    strings = {entry.key: entry.value for entry in proto.metadata_props}
    try:
        metadata = ModelMetadata.from_strings(strings, "metadata")
    except CmranError as error:
        failures.append(str(error))
        T, grid = _sizes_of(proto)
    else:
        T, grid = metadata.segments, metadata.grid
        failures += [
            f"metadata {key}: found {getattr(metadata, key)!r}, the network has {value!r}"
            for key, value in expected.items()
            if getattr(metadata, key) != value
        ]
        if strings.get("model_config") != config.model_dump_json():
            failures.append(
                f"metadata model_config: found {strings.get('model_config')}, the network has other settings"
            )

    shapes = _Shapes((T, *grid, config.visual_features), (T, config.audio_features))
    inputs = {"visual": (onnx.TensorProto.FLOAT, shapes.visual), "audio": (onnx.TensorProto.FLOAT, shapes.audio)}
    outputs = {
        "event_logits": (onnx.TensorProto.FLOAT, (T,)),
        "class_logits": (onnx.TensorProto.FLOAT, (config.classes,)),
        "segments": (onnx.TensorProto.INT64, (T,)),
    }
    for kind, values, wanted in (("inputs", proto.graph.input, inputs), ("outputs", proto.graph.output, outputs)):
        names = [value.name for value in values]
        if names != list(wanted):
            failures.append(f"{kind}: found {', '.join(names)}, expected {', '.join(wanted)}")
        for value in values:
            if value.name in wanted:
                failures += _check_axes(value, *wanted[value.name])
    return shapes


def _check_axes(value: Any, dtype: int, shape: tuple[int, ...]) -> list[str]:
    import onnx

    failures = []
    tensor = value.type.tensor_type
    if tensor.elem_type != dtype:
        found, expected = (onnx.TensorProto.DataType.Name(kind) for kind in (tensor.elem_type, dtype))
        failures.append(f"{value.name}: dtype {found}, expected {expected}")
    axes = [axis.dim_param if axis.HasField("dim_param") else axis.dim_value for axis in tensor.shape.dim]
    if len(axes) != 1 + len(shape):
        failures.append(f"{value.name}: {len(axes)} axes {axes}, expected {1 + len(shape)}")
        return failures
    if not (isinstance(axes[0], str) and axes[0]):
        failures.append(f"{value.name}: the batch size is fixed at {axes[0]}, expected any")
    if tuple(axes[1:]) != shape:
        failures.append(f"{value.name}: shape (batch, {axes[1:]}), expected (batch, {list(shape)})")
    return failures


def _sizes_of(proto: "ModelProto") -> tuple[int, tuple[int, int]]:
    """Return T and (H, W) of the visual input, for a file without metadata; 1 where the input does not state them."""
    for value in proto.graph.input:
        axes = [axis.dim_value or 1 for axis in value.type.tensor_type.shape.dim]
        if value.name == "visual" and len(axes) == 5:
            return axes[1], (axes[2], axes[3])
    return 1, (1, 1)


def _cases(
    shapes: _Shapes, real: Iterable[VideoBatch]
) -> Iterator[tuple[str, NDArray[np.float32], NDArray[np.float32]]]:
    """Yield name, visual and audio of every batch to compare. Names of real batches start with "rows"."""
    for size in BATCH_SIZES:
        rng = np.random.default_rng([size, 20])
        # Like features after a ReLU: not negative, and mostly zero.
        arrays = (np.maximum(rng.standard_normal((size, *shape)) - 0.5, 0) for shape in shapes)
        visual_B, audio_B = (array.astype(np.float32) for array in arrays)
        yield f"batch of {size}", visual_B, audio_B
    yield "zeros", np.zeros((2, *shapes.visual), np.float32), np.zeros((2, *shapes.audio), np.float32)
    start = 0
    for batch in real:
        visual_B, audio_B = (np.ascontiguousarray(array, np.float32) for array in batch)
        yield f"rows {start} to {start + len(visual_B) - 1}", visual_B, audio_B
        start += len(visual_B)


def _compare(
    case: str,
    session: Any,
    reference: CMRAN,
    visual: NDArray[np.float32],
    audio: NDArray[np.float32],
    findings: _Findings,
) -> None:
    """Run one batch through both models and record the mismatches."""
    with torch.no_grad():
        outputs = reference(torch.from_numpy(visual), torch.from_numpy(audio))
        expected_segments = predict_segments(outputs).numpy()
    expected = {name: getattr(outputs, name).numpy() for name in Outputs._fields}
    # ValueError: the model has no input or output of that name.
    errors: tuple[type[Exception], ...] = (*runtime_errors(), ValueError)
    try:
        values = session.run(list(OUTPUTS), {"visual": visual, "audio": audio})
    except errors as error:
        findings.failures.append(f"{case}: ONNX Runtime failed: {one_line(error)}")
        return
    found = dict(zip(OUTPUTS, values, strict=True))
    findings.videos += len(visual)
    findings.rows += len(visual) if case.startswith("rows") else 0

    for name, true in expected.items():
        if found[name].shape != true.shape:
            findings.failures.append(f"{case}, {name}: shape {found[name].shape}, expected {true.shape}")
            continue
        difference = np.abs(found[name].astype(np.float64) - true)
        # The negation of <= also catches NaN, unlike >.
        wrong = ~(difference <= ATOL + RTOL * np.abs(true))
        findings.add_difference(name, float(difference.max()))
        if wrong.any():
            findings.failures.append(
                f"{case}, {name}: {wrong.sum()} of {wrong.size} values differ, by up to {difference.max():.3g}"
            )
    segments = found["segments"]
    if segments.shape != expected_segments.shape:
        findings.failures.append(f"{case}, segments: shape {segments.shape}, expected {expected_segments.shape}")
        return
    equal = segments == expected_segments
    findings.segments += equal.size
    findings.equal += int(equal.sum())
    wrong = ~equal & ~_ties(expected["event_logits"], expected["class_logits"])
    if wrong.any():
        findings.failures.append(f"{case}, segments: {wrong.sum()} of {wrong.size} labels differ")


def _ties(event_logits: NDArray[np.float32], class_logits: NDArray[np.float32]) -> NDArray[np.bool_]:
    """Return (B, T): the labels that a difference within tolerance can change."""
    second, first = np.sort(class_logits, axis=1)[:, -2:].T
    slack = 2 * (ATOL + RTOL * np.maximum(np.abs(first), np.abs(second)))
    tie: NDArray[np.bool_] = (np.abs(event_logits) <= ATOL) | (first - second <= slack)[:, None]
    return tie
