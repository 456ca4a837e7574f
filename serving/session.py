"""An exported model in ONNX Runtime: what the file says of itself, and on which device it runs.

Shape letters as in cmran.model: B videos, T segments, H x W grid, C visual channels, A audio features, K class logits.
"""

import contextlib
import ctypes
import io
import json
import logging
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import Any, NamedTuple, Self

import numpy as np
from numpy.typing import NDArray
from pydantic import Field

from cmran.categories import BACKGROUND
from cmran.config import Device, Frozen, Mode, parse
from cmran.errors import UserError

INPUTS = ("visual", "audio")
OUTPUTS = ("event_logits", "class_logits", "segments")

CPU = "CPUExecutionProvider"
CUDA = "CUDAExecutionProvider"

_log = logging.getLogger(__name__)


class ModelMetadata(Frozen):
    """What an exported model says of itself: the metadata of the ONNX file that predictions depend on."""

    mode: Mode
    categories: tuple[str, ...] = Field(min_length=BACKGROUND, max_length=BACKGROUND)
    # Names of the labels 0 to 27; 28 is background.
    visual_features: int = Field(ge=1)
    audio_features: int = Field(ge=1)
    segments: int = Field(ge=1)
    grid: tuple[int, int]
    # H, W.

    @property
    def classes(self) -> int:
        """K, the width of the class logits: background has one of its own in weak mode only."""
        return len(self.categories) + (self.mode == "weak")

    @property
    def visual_shape(self) -> tuple[int, int, int, int]:
        """(T, H, W, C)."""
        return (self.segments, *self.grid, self.visual_features)

    @property
    def audio_shape(self) -> tuple[int, int]:
        """(T, A)."""
        return (self.segments, self.audio_features)

    def to_strings(self) -> dict[str, str]:
        """As ONNX metadata, which holds strings only: all but the mode as JSON."""
        return {key: value if isinstance(value, str) else json.dumps(value) for key, value in self.model_dump().items()}

    @classmethod
    def from_strings(cls, strings: Mapping[str, str], where: str) -> Self:
        """Back from ONNX metadata. Raises UserError naming the key that is missing or wrong; `where` names the file."""
        missing = [key for key in cls.model_fields if key not in strings]
        if missing:
            raise UserError(
                f"{where}: not a model exported by this project: its metadata lacks {', '.join(missing)}: "
                "export it with `cmran export`"
            )
        values: dict[str, Any] = {}
        for key in cls.model_fields:
            try:
                values[key] = strings[key] if key == "mode" else json.loads(strings[key])
            except json.JSONDecodeError:
                raise UserError(f"{where}: metadata {key}: expected JSON, found {strings[key]!r}") from None
        return parse(cls, values, f"{where}: metadata")


class _ProviderError(UserError):
    """The model may be sound, but not on this provider of this machine."""


class SessionOutputs(NamedTuple):
    """What the model says of a batch."""

    event_logits: NDArray[np.float32]
    """(B, T)."""
    class_logits: NDArray[np.float32]
    """(B, K)."""
    segments: NDArray[np.int64]
    """(B, T) labels, 28 is background."""


class Session:
    """A model ready to run; made by `open_session`."""

    def __init__(self, path: Path, session: Any, provider: str) -> None:
        import onnxruntime

        self.path = path
        self.provider = provider
        """The provider that does the work: "CPUExecutionProvider" or "CUDAExecutionProvider"."""
        self.runtime_version: str = onnxruntime.__version__
        self.all_metadata: dict[str, str] = dict(session.get_modelmeta().custom_metadata_map)
        """Everything the file says, lineage (run_id, git_commit, fingerprint, ...) included."""
        self.metadata = ModelMetadata.from_strings(self.all_metadata, str(path))
        self._session = session
        _check_signature(path, session, self.metadata)

    def run(self, visual: NDArray[np.float32], audio: NDArray[np.float32]) -> SessionOutputs:
        """Predict a batch: visual (B, T, H, W, C) and audio (B, T, A), float32, any B >= 1.

        Raises ValueError where shape or dtype do not fit, UserError where ONNX Runtime fails (out of memory, mostly).
        """
        for name, array, shape in (
            ("visual", visual, self.metadata.visual_shape),
            ("audio", audio, self.metadata.audio_shape),
        ):
            if array.dtype != np.float32 or array.shape[1:] != shape or len(array) != len(visual) or not len(array):
                expected = ", ".join(map(str, shape))
                raise ValueError(f"{name}: expected float32 (B, {expected}), found {array.dtype} {array.shape}")
        try:
            outputs = self._session.run(list(OUTPUTS), {"visual": visual, "audio": audio})
        except runtime_errors() as error:
            raise UserError(
                f"{self.path}: ONNX Runtime failed on {self.provider} with a batch of {len(visual)}: "
                f"{one_line(error)}: where memory is short, take a smaller batch"
            ) from error
        return SessionOutputs(*outputs)


def open_session(path: Path, device: Device = "auto", *, threads: int | None = None) -> Session:
    """Load an exported model on a device, chosen and told as by `bare_session`.

    Raises UserError, besides what that raises, for a model that this project did not export.
    """
    return Session(path, *bare_session(path, device, threads=threads))


def bare_session(path: Path, device: Device = "auto", *, threads: int | None = None) -> tuple[Any, str]:
    """An ONNX Runtime session of any model, and the provider that does its work.

    "cpu": the CPU alone. "cuda": CUDA, or UserError where its provider does not come up. "auto": CUDA where it works,
    else the CPU; which of the two, and why, is logged as a warning. `threads`: CPU threads a step may use; None leaves
    it to ONNX Runtime (one a physical core).

    Raises UserError too where the file is missing or not an ONNX model.
    """
    if not path.is_file():
        raise UserError(
            f"no model file at {path}: name an exported .onnx file or a registered model (models:/NAME@ALIAS)"
        )
    if threads is not None and threads < 1:
        raise UserError(f"threads: expected 1 or more, found {threads}")
    if device == "cpu":
        return _create(path, CPU, threads), CPU
    session, reason = _try_cuda(path, threads)
    if session is not None:
        if device == "auto":
            _log.warning("device auto: took CUDA (%s)", CUDA)
        return session, CUDA
    if device == "cuda":
        raise UserError(
            f"device cuda was asked for, but ONNX Runtime cannot use CUDA here: {reason}: "
            "install the driver, CUDA 13 and cuDNN 9, or choose device cpu"
        )
    _log.warning("device auto: took the CPU (%s), because %s", CPU, reason)
    return _create(path, CPU, threads), CPU


def runtime_errors() -> tuple[type[Exception], ...]:
    """What ONNX Runtime raises when it cannot run a model: its errors have no base class of their own."""
    from onnxruntime.capi import onnxruntime_pybind11_state as state

    return (state.Fail, state.RuntimeException, state.EPFail, state.InvalidArgument, state.NotImplemented)


def one_line(error: BaseException) -> str:
    """The message of an error without line breaks."""
    return " ".join(str(error).split()) or type(error).__name__


def _try_cuda(path: Path, threads: int | None) -> tuple[Any, str]:
    """A session on CUDA and "", or None and the reason why there is none."""
    import onnxruntime

    # The list of available providers only tells how the wheel was built; the session's own list tells what works.
    if CUDA not in onnxruntime.get_available_providers():
        return None, "the installed onnxruntime is built without CUDA (onnxruntime-gpu has it)"
    try:
        ctypes.CDLL("libcuda.so.1")
    except OSError:
        return None, "this machine has no NVIDIA driver (libcuda.so.1)"
    said = io.StringIO()
    with contextlib.redirect_stdout(said):
        onnxruntime.preload_dlls()
    try:
        session = _create(path, CUDA, threads)
    except _ProviderError as error:
        return None, str(error)
    if CUDA in session.get_providers():
        return session, ""
    print(said.getvalue(), end="", file=sys.stderr)
    found = next((line for line in said.getvalue().splitlines() if line.startswith("Failed")), "")
    return None, f"its CUDA provider did not start ({found or 'ONNX Runtime fell back to the CPU'})"


def _create(path: Path, provider: str, threads: int | None) -> Any:
    import onnxruntime
    from onnxruntime.capi import onnxruntime_pybind11_state as state

    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = threads or 0
    options.log_severity_level = 3
    # TensorFloat-32 would differ from the proven float32 values in the third digit.
    providers: list[Any] = [(CUDA, {"use_tf32": "0"}), CPU] if provider == CUDA else [CPU]
    broken = (
        state.InvalidProtobuf,
        state.InvalidArgument,
        state.InvalidGraph,
        state.NoModel,
        state.NotImplemented,
        state.NoSuchFile,
    )
    try:
        return onnxruntime.InferenceSession(str(path), options, providers=providers)
    except broken as error:
        raise UserError(f"{path}: not a usable ONNX model: {one_line(error)}: export it again") from None
    except (state.Fail, state.RuntimeException, state.EPFail) as error:
        raise _ProviderError(f"{path}: ONNX Runtime cannot load it on {provider}: {one_line(error)}") from None


def _check_signature(path: Path, session: Any, metadata: ModelMetadata) -> None:
    """Inputs and outputs as `export` writes them, and as the metadata says. Raises UserError with all that differ."""
    expected = {
        "visual": ("tensor(float)", metadata.visual_shape),
        "audio": ("tensor(float)", metadata.audio_shape),
        "event_logits": ("tensor(float)", (metadata.segments,)),
        "class_logits": ("tensor(float)", (metadata.classes,)),
        "segments": ("tensor(int64)", (metadata.segments,)),
    }
    found = {node.name: (node.type, node.shape) for node in (*session.get_inputs(), *session.get_outputs())}
    problems = [f"unknown {name}" for name in found if name not in expected]
    for name, (kind, shape) in expected.items():
        if name not in found:
            problems.append(f"missing {name}")
        elif found[name][0] != kind or tuple(found[name][1][1:]) != shape:
            problems.append(f"{name} is {found[name][0]} {found[name][1]}, expected {kind} (batch, {_commas(shape)})")
        elif isinstance(found[name][1][0], int):
            problems.append(f"{name} has its batch fixed at {found[name][1][0]}")
    if problems:
        raise UserError(f"{path}: not a model exported by this project: {'; '.join(problems)}: export it again")


def _commas(shape: tuple[int, ...]) -> str:
    return ", ".join(map(str, shape))
