"""An exported model in ONNX Runtime: what the file says of itself, and on which device it runs.

Shape letters as in cmran.model: B videos, T segments, H x W grid, C visual channels, A audio features, K class logits.
"""

import contextlib
import ctypes
import io
import logging
import queue
import sys
from collections.abc import Callable
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path
from typing import Any, Literal, NamedTuple

import numpy as np
from numpy.typing import NDArray

from cmran.config import Device, Variant
from cmran.errors import CmranError
from cmran.utils.device import usable_cpus
from serving.signature import OUTPUTS, ModelMetadata

CPU = "CPUExecutionProvider"


CUDA = "CUDAExecutionProvider"


MICRO_BATCH: dict[Variant, int] = {"float32": 4, "float16": 16, "int8": 1}
"""Videos that go through the model together; a batch is cut into such pieces.

On a CPU a piece's maps fit its cache, and the pieces of a batch run side by side, each on one core: that measured
faster than many cores on one large batch, above all beside a thread that reads. int8 finds the range of its numbers
anew in each run: with one video a run, no video's labels depend on its neighbours. On CUDA one piece is copied while
another is computed.
"""


CUDA_LANES = 3
"""Pieces under way at once on CUDA: some are copied, one is computed."""


Purpose = Literal["latency", "throughput"]


_log = logging.getLogger(__name__)


class _ProviderError(CmranError):
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
    """A model ready to run; made by `open_session`. Its methods may be called from several threads."""

    def __init__(
        self, path: Path, session: Any, provider: str, *, lanes: int = 1, bound_to: Literal["cpu", "cuda"] | None = None
    ) -> None:
        import onnxruntime

        self.path = path
        self.provider = provider
        """The provider that does the work: "CPUExecutionProvider" or "CUDAExecutionProvider"."""
        self.runtime_version: str = onnxruntime.__version__
        self.all_metadata = _all_metadata(session, path)
        """Everything the file says, lineage (run_id, git_commit, fingerprint, ...) included."""
        self.metadata = ModelMetadata.from_strings(self.all_metadata, str(path))
        _check_signature(path, session, self.metadata)
        # float32 on CUDA takes the pieces of float16: there they are for copying beside computing.
        self.micro_batch = MICRO_BATCH["float16" if provider == CUDA else self.metadata.variant]
        """Videos that go through the model together."""
        self._lanes: queue.SimpleQueue[_Lane] = queue.SimpleQueue()
        for _ in range(lanes):
            self._lanes.put(_plain_lane(session) if bound_to is None else _BoundLane(session, bound_to).run)
        self._workers = ThreadPoolExecutor(lanes, thread_name_prefix="cmran-session")

    def run(self, visual: NDArray[np.float32], audio: NDArray[np.float32]) -> SessionOutputs:
        """Predict a batch: visual (B, T, H, W, C) and audio (B, T, A), float32, any B >= 1.

        Raises ValueError where shape or dtype do not fit, CmranError where ONNX Runtime fails (out of memory, mostly).
        """
        return self.start(visual, audio)()

    def start(self, visual: NDArray[np.float32], audio: NDArray[np.float32]) -> Callable[[], SessionOutputs]:
        """Begin a batch, and return what waits for its outputs; until then leave the arrays as they are.

        Raises ValueError at once; what is returned raises CmranError; both as `run`.
        """
        for name, array, shape in (
            ("visual", visual, self.metadata.visual_shape),
            ("audio", audio, self.metadata.audio_shape),
        ):
            if array.dtype != np.float32 or array.shape[1:] != shape or len(array) != len(visual) or not len(array):
                expected = ", ".join(map(str, shape))
                raise ValueError(f"{name}: expected float32 (B, {expected}), found {array.dtype} {array.shape}")
        parts = [slice(start, start + self.micro_batch) for start in range(0, len(visual), self.micro_batch)]
        running = [self._workers.submit(self._run_micro_batch, visual[part], audio[part]) for part in parts]
        return lambda: self._joined(running, len(visual))

    def _run_micro_batch(self, visual: NDArray[np.float32], audio: NDArray[np.float32]) -> list[NDArray[Any]]:
        lane = self._lanes.get()
        try:
            return lane(visual, audio)
        finally:
            self._lanes.put(lane)

    def _joined(self, running: list[Future[list[NDArray[Any]]]], videos: int) -> SessionOutputs:
        try:
            micro_batches = [future.result() for future in running]
        except runtime_errors() as error:
            raise CmranError(
                f"{self.path}: ONNX Runtime failed on {self.provider} with a batch of {videos}: "
                f"{one_line(error)}: where memory is short, take a smaller batch"
            ) from error
        return SessionOutputs(*(np.concatenate(arrays) for arrays in zip(*micro_batches, strict=True)))


_Lane = Callable[[NDArray[np.float32], NDArray[np.float32]], list[NDArray[Any]]]


def _plain_lane(session: Any) -> _Lane:
    def run(visual: NDArray[np.float32], audio: NDArray[np.float32]) -> list[NDArray[Any]]:
        values: list[NDArray[Any]] = session.run(list(OUTPUTS), {"visual": visual, "audio": audio})
        return values

    return run


class _BoundLane:
    """Runs one piece at a time through input buffers in the device's memory, which the next piece fills again."""

    def __init__(self, session: Any, device: Literal["cpu", "cuda"]) -> None:
        self._session, self._device = session, device
        self._binding = session.io_binding()
        self._inputs: dict[str, Any] = {}

    def run(self, visual: NDArray[np.float32], audio: NDArray[np.float32]) -> list[NDArray[Any]]:
        """The outputs, copied to the host."""
        from onnxruntime import OrtValue

        for name, array in (("visual", visual), ("audio", audio)):
            held = self._inputs.get(name)
            if held is None or tuple(held.shape()) != array.shape:
                # Not made of the array: on the CPU it would be the array's own memory.
                held = OrtValue.ortvalue_from_shape_and_type(list(array.shape), np.float32, self._device, 0)
                self._inputs[name] = held
                self._binding.bind_ortvalue_input(name, held)
            held.update_inplace(np.ascontiguousarray(array))
        self._binding.clear_binding_outputs()
        for name in OUTPUTS:
            self._binding.bind_output(name, "cpu")
        self._session.run_with_iobinding(self._binding)
        # Copies: the next run may use the memory of this one's outputs again.
        return [value.copy() for value in self._binding.copy_outputs_to_cpu()]


def open_session(
    path: Path, device: Device = "auto", *, threads: int | None = None, purpose: Purpose = "latency"
) -> Session:
    """Load an exported model on a device, chosen and told as by `bare_session`.

    `purpose` says how `threads` CPU threads (None: as many as `usable_cpus`) share the work: "latency":
    all on each piece of a batch, one piece after the other; "throughput": one on each piece, so many pieces side by
    side. On CUDA it makes no difference.

    An int8 model runs on the CPU and a float16 one on CUDA, where it was proven: "auto" follows that. Raises CmranError
    where `device` is another one, for a model that this project did not export, and as `bare_session`.
    """
    cores = threads if threads is not None else usable_cpus()
    each = cores if purpose == "latency" or cores < 1 else 1
    session, provider = bare_session(path, device, threads=each)
    variant = _all_metadata(session, path).get("variant", "float32")
    home = {"int8": CPU, "float16": CUDA}.get(variant, provider)
    if provider != home and device == "auto" and home == CPU:
        _log.warning("%s is an int8 model: it runs on the CPU", path)
        session, provider = bare_session(path, "cpu", threads=each)
    elif provider != home:
        raise CmranError(
            f"{path}: a model of variant {variant}, which runs on {home} only, but {provider} was taken: "
            "choose another variant or another device"
        )
    if provider == CUDA:
        return Session(path, session, provider, lanes=CUDA_LANES, bound_to="cuda")
    return Session(path, session, provider, lanes=1 if purpose == "latency" else cores)


def read_metadata(path: Path) -> ModelMetadata:
    """What an exported model says of itself. Raises CmranError for a model that this project did not export."""
    session, _ = bare_session(path, "cpu", threads=1)
    return ModelMetadata.from_strings(_all_metadata(session, path), str(path))


def _all_metadata(session: Any, path: Path) -> dict[str, str]:
    try:
        return dict(session.get_modelmeta().custom_metadata_map)
    except UnicodeDecodeError as error:
        raise CmranError(
            f"{path}: not a usable ONNX model: its metadata are not text ({error}): export it again"
        ) from None


def bare_session(path: Path, device: Device = "auto", *, threads: int | None = None) -> tuple[Any, str]:
    """An ONNX Runtime session of any model, and the provider that does its work.

    "cpu": the CPU alone. "cuda": CUDA, or CmranError where its provider does not come up. "auto": CUDA where it works,
    else the CPU; which of the two, and why, is logged as a warning. `threads`: CPU threads a step may use; None takes
    as many as `cmran.utils.device.usable_cpus`: ONNX Runtime's own count does not see a CPU quota.

    Raises CmranError too where the file is missing or not an ONNX model.
    """
    if not path.is_file():
        raise CmranError(
            f"no model file at {path}: name an exported .onnx file or a registered model (models:/NAME@ALIAS)"
        )
    if threads is not None and threads < 1:
        raise CmranError(f"threads: expected 1 or more, found {threads}")
    if device == "cpu":
        return _create(path, CPU, threads), CPU
    session, reason = _try_cuda(path, threads)
    if session is not None:
        if device == "auto":
            _log.warning("device auto: took CUDA (%s)", CUDA)
        return session, CUDA
    if device == "cuda":
        raise CmranError(
            f"device cuda was asked for, but ONNX Runtime cannot use CUDA here: {reason}: "
            "install the driver, CUDA 13 and cuDNN 9, or choose device cpu"
        )
    _log.warning("device auto: took the CPU (%s), because %s", CPU, reason)
    return _create(path, CPU, threads), CPU


def cuda_works(path: Path) -> bool:
    """Whether ONNX Runtime runs the model at `path` on CUDA here."""
    return _try_cuda(path, None)[0] is not None


def has_int8_products() -> bool:
    """Whether the CPU multiplies int8 matrices in hardware as the proof of an int8 model assumes.

    Older x86 processors add pairs of products in 16 bits, where large ones overflow: an int8 model says other things
    there than where it was proven.
    """
    try:
        flags = Path("/proc/cpuinfo").read_text(encoding="utf-8")
    except OSError:
        return False
    return any(f" {flag}" in flags for flag in ("avx512_vnni", "avx_vnni", "asimddp"))


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
    options.intra_op_num_threads = threads or usable_cpus()
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
        # Its message may quote the damaged bytes.
        UnicodeDecodeError,
    )
    try:
        return onnxruntime.InferenceSession(str(path), options, providers=providers)
    except broken as error:
        raise CmranError(f"{path}: not a usable ONNX model: {one_line(error)}: export it again") from None
    except (state.Fail, state.RuntimeException, state.EPFail) as error:
        raise _ProviderError(f"{path}: ONNX Runtime cannot load it on {provider}: {one_line(error)}") from None


def _check_signature(path: Path, session: Any, metadata: ModelMetadata) -> None:
    """Inputs and outputs as `export` writes them, and as the metadata says. Raises CmranError with all that differ."""
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
        raise CmranError(f"{path}: not a model exported by this project: {'; '.join(problems)}: export it again")


def _commas(shape: tuple[int, ...]) -> str:
    return ", ".join(map(str, shape))
