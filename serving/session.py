"""ONNX Runtime sessions of exported models: the choice of the device, and parallel micro-batches.

Shape letters: B videos, T segments, H x W grid, C visual channels, A audio features, K class logits.
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
from cmran.errors import ConfigError, DeviceError, ExportError
from cmran.utils.device import usable_cpus
from cmran.utils.files import log_once
from serving.signature import OUTPUTS, ModelMetadata

CPU = "CPUExecutionProvider"
CUDA = "CUDAExecutionProvider"

MICRO_BATCH: dict[Variant, int] = {"float32": 4, "float16": 16, "int8": 1}
"""Videos of a micro-batch, the part of a batch that goes through the model at once.

On a CPU the activations of a micro-batch fit the cache. The micro-batches of a batch run in parallel, each on one core,
which was faster than all cores on one large batch, especially beside a thread that reads features. An int8 model scales
its activations in each run: with one video per run, the labels of a video do not depend on the other videos of the
batch. On CUDA one micro-batch is copied while another is computed.
"""
CUDA_RUNNERS = 3
"""Micro-batches in progress at the same time on CUDA: one is computed while others are copied."""

Purpose = Literal["latency", "throughput"]
_Runner = Callable[[NDArray[np.float32], NDArray[np.float32]], list[NDArray[Any]]]


class _ProviderError(ExportError):
    """The file may be valid, but this provider cannot run it on this machine."""


class SessionOutputs(NamedTuple):
    """The outputs of a model for a batch."""

    event_logits: NDArray[np.float32]
    """(B, T)."""
    class_logits: NDArray[np.float32]
    """(B, K)."""
    segments: NDArray[np.int64]
    """(B, T) labels, 28 is background."""


class Session:
    """A loaded model. `open_session` creates it. Its methods are thread-safe.

    Args:
        path: The ONNX file, for error messages.
        session: The `onnxruntime.InferenceSession`.
        provider: The provider that computes.
        runners: Number of micro-batches that run in parallel.
        bound_to: Device whose memory holds the inputs. `None`: ONNX Runtime reads them from the caller's arrays.
    """

    def __init__(
        self,
        path: Path,
        session: Any,
        provider: str,
        *,
        runners: int = 1,
        bound_to: Literal["cpu", "cuda"] | None = None,
    ) -> None:
        import onnxruntime

        self.path = path
        self.provider = provider
        """The provider that computes: "CPUExecutionProvider" or "CUDAExecutionProvider"."""
        self.runtime_version: str = onnxruntime.__version__
        self.all_metadata = _all_metadata(session, path)
        """All metadata of the file, with its lineage (run_id, git_commit, fingerprint, ...)."""
        self.metadata = ModelMetadata.from_strings(self.all_metadata, str(path))
        _check_signature(path, session, self.metadata)
        # On CUDA, float32 uses the micro-batch of float16, because its purpose there is to overlap copies.
        self.micro_batch = MICRO_BATCH["float16" if provider == CUDA else self.metadata.variant]
        """Videos of a micro-batch."""
        self._runners: queue.SimpleQueue[_Runner] = queue.SimpleQueue()
        for _ in range(runners):
            self._runners.put(_plain_runner(session) if bound_to is None else _BoundRunner(session, bound_to).run)
        self._workers = ThreadPoolExecutor(runners, thread_name_prefix="cmran-session")

    def run(self, visual: NDArray[np.float32], audio: NDArray[np.float32]) -> SessionOutputs:
        """Predict a batch.

        Args:
            visual: (B, T, H, W, C), float32, any B >= 1.
            audio: (B, T, A), float32.

        Raises:
            ValueError: A shape or dtype does not fit the model.
            DeviceError: ONNX Runtime failed, usually because memory ran out.
        """
        return self.start(visual, audio)()

    def start(self, visual: NDArray[np.float32], audio: NDArray[np.float32]) -> Callable[[], SessionOutputs]:
        """Start to predict a batch; arguments as for `run`.

        Returns:
            A function that waits for the outputs. Do not change the arrays before it returns. It raises DeviceError as
            `run` does.

        Raises:
            ValueError: A shape or dtype does not fit the model.
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
        return lambda: self._join(running, len(visual))

    def _run_micro_batch(self, visual: NDArray[np.float32], audio: NDArray[np.float32]) -> list[NDArray[Any]]:
        runner = self._runners.get()
        try:
            return runner(visual, audio)
        finally:
            self._runners.put(runner)

    def _join(self, running: list[Future[list[NDArray[Any]]]], videos: int) -> SessionOutputs:
        try:
            micro_batches = [future.result() for future in running]
        except runtime_errors() as error:
            raise DeviceError(
                f"{self.path}: ONNX Runtime failed on {self.provider} with a batch of {videos}: {one_line(error)}",
                hint="if memory is short, use a smaller `batch_size`",
            ) from error
        return SessionOutputs(*(np.concatenate(arrays) for arrays in zip(*micro_batches, strict=True)))


def _plain_runner(session: Any) -> _Runner:
    def run(visual: NDArray[np.float32], audio: NDArray[np.float32]) -> list[NDArray[Any]]:
        values: list[NDArray[Any]] = session.run(list(OUTPUTS), {"visual": visual, "audio": audio})
        return values

    return run


class _BoundRunner:
    """Runs one micro-batch at a time and reuses the input buffers in the memory of the device."""

    def __init__(self, session: Any, device: Literal["cpu", "cuda"]) -> None:
        self._session, self._device = session, device
        self._binding = session.io_binding()
        self._inputs: dict[str, Any] = {}

    def run(self, visual: NDArray[np.float32], audio: NDArray[np.float32]) -> list[NDArray[Any]]:
        """Return the outputs, copied to the host."""
        from onnxruntime import OrtValue

        for name, array in (("visual", visual), ("audio", audio)):
            buffer = self._inputs.get(name)
            if buffer is None or tuple(buffer.shape()) != array.shape:
                # Not created from the array: on the CPU it would share the memory of the array.
                buffer = OrtValue.ortvalue_from_shape_and_type(list(array.shape), np.float32, self._device, 0)
                self._inputs[name] = buffer
                self._binding.bind_ortvalue_input(name, buffer)
            buffer.update_inplace(np.ascontiguousarray(array))
        self._binding.clear_binding_outputs()
        for name in OUTPUTS:
            self._binding.bind_output(name, "cpu")
        self._session.run_with_iobinding(self._binding)
        # Copies, because the next run may reuse the memory of these outputs.
        return [value.copy() for value in self._binding.copy_outputs_to_cpu()]


def open_session(
    path: Path, device: Device = "auto", *, threads: int | None = None, purpose: Purpose = "latency"
) -> Session:
    """Load an exported model on a device, which is chosen and logged as by `bare_session`.

    An int8 model runs on the CPU only and a float16 model on CUDA only, because its values were checked there. With
    "auto" an int8 model runs on the CPU even if there is a GPU.

    Args:
        path: The ONNX file.
        device: "auto", "cpu" or "cuda".
        threads: Number of CPU threads. `None`: as many as `cmran.utils.device.usable_cpus`.
        purpose: How the threads share the work. "latency": all of them compute one micro-batch after the other.
            "throughput": each of them computes a micro-batch of its own. It makes no difference on CUDA.

    Raises:
        DeviceError: The device is not available, or it cannot run this precision variant.
        ExportError: The file is missing, or it is not a model exported by this project.
        ConfigError: `threads` is less than 1.
    """
    cores = threads if threads is not None else usable_cpus()
    each = cores if purpose == "latency" or cores < 1 else 1
    session, provider = bare_session(path, device, threads=each)
    variant = _all_metadata(session, path).get("variant", "float32")
    required = {"int8": CPU, "float16": CUDA}.get(variant, provider)
    if provider != required and device == "auto" and required == CPU:
        log_once(logging.INFO, f"{path} is an int8 model: it runs on the CPU")
        session, provider = bare_session(path, "cpu", threads=each)
    elif provider != required:
        raise DeviceError(
            f"{path}: a model of variant {variant}, which runs on {required} only, cannot run on {provider}",
            hint="choose another `variant` or another `device`",
        )
    if provider == CUDA:
        return Session(path, session, provider, runners=CUDA_RUNNERS, bound_to="cuda")
    return Session(path, session, provider, runners=1 if purpose == "latency" else cores)


def read_metadata(path: Path) -> ModelMetadata:
    """Return the metadata of an exported model. Raises ExportError for a model that this project did not export."""
    session, _ = bare_session(path, "cpu", threads=1)
    return ModelMetadata.from_strings(_all_metadata(session, path), str(path))


def _all_metadata(session: Any, path: Path) -> dict[str, str]:
    try:
        return dict(session.get_modelmeta().custom_metadata_map)
    except UnicodeDecodeError as error:
        raise ExportError(
            f"{path}: not a usable ONNX model: its metadata is not text ({error})", hint="export it again"
        ) from None


def bare_session(path: Path, device: Device = "auto", *, threads: int | None = None) -> tuple[Any, str]:
    """Create an ONNX Runtime session of any ONNX model.

    Args:
        path: The ONNX file.
        device: "cpu"; "cuda"; or "auto", which uses CUDA if it works and the CPU otherwise. The choice of "auto" and
            its reason are logged once per process.
        threads: CPU threads of one operator. `None`: as many as `cmran.utils.device.usable_cpus`, because the default
            of ONNX Runtime ignores a CPU quota.

    Returns:
        The `onnxruntime.InferenceSession`, and the provider that computes.

    Raises:
        DeviceError: `device` is "cuda", and ONNX Runtime cannot use CUDA here.
        ExportError: The file is missing or is not an ONNX model.
        ConfigError: `threads` is less than 1.
    """
    if not path.is_file():
        raise ExportError(
            f"no model file at {path}", hint="name an exported .onnx file or a registered model (models:/NAME@ALIAS)"
        )
    if threads is not None and threads < 1:
        raise ConfigError(f"`threads`: expected 1 or more, found {threads}")
    if device == "cpu":
        return _create(path, CPU, threads), CPU
    session, reason = _try_cuda(path, threads)
    if session is not None:
        if device == "auto":
            log_once(logging.INFO, f"device auto: ONNX Runtime uses CUDA ({CUDA})")
        return session, CUDA
    if device == "cuda":
        raise DeviceError(
            f"device cuda is not available: ONNX Runtime cannot use CUDA here: {reason}",
            hint="install the driver, CUDA 13 and cuDNN 9, or set `device` to cpu",
        )
    log_once(logging.INFO, f"device auto: ONNX Runtime uses the CPU ({CPU}), because {reason}")
    return _create(path, CPU, threads), CPU


def cuda_works(path: Path) -> bool:
    """Return whether ONNX Runtime can load the model at `path` on CUDA here."""
    return _try_cuda(path, None)[0] is not None


def has_int8_products() -> bool:
    """Return whether the CPU has the 8-bit dot products that the check of an int8 model relies on.

    Older x86 processors add pairs of products in 16 bits, which overflows for large ones. There the outputs of an int8
    model differ from those that were checked.
    """
    try:
        flags = Path("/proc/cpuinfo").read_text(encoding="utf-8")
    except OSError:
        return False
    return any(f" {flag}" in flags for flag in ("avx512_vnni", "avx_vnni", "asimddp"))


def runtime_errors() -> tuple[type[Exception], ...]:
    """Return the exceptions of a failed ONNX Runtime call: they have no base class of their own."""
    from onnxruntime.capi import onnxruntime_pybind11_state as state

    return (state.Fail, state.RuntimeException, state.EPFail, state.InvalidArgument, state.NotImplemented)


def one_line(error: BaseException) -> str:
    """Return the message of an error without line breaks."""
    return " ".join(str(error).split()) or type(error).__name__


def _try_cuda(path: Path, threads: int | None) -> tuple[Any, str]:
    """Return a session on CUDA and "", or None and the reason why there is none."""
    import onnxruntime

    # The list of available providers only says how the wheel was built. The list of a session says what works.
    if CUDA not in onnxruntime.get_available_providers():
        return None, "the installed onnxruntime is built without CUDA (onnxruntime-gpu has it)"
    try:
        ctypes.CDLL("libcuda.so.1")
    except OSError:
        return None, "this machine has no NVIDIA driver (libcuda.so.1)"
    output = io.StringIO()
    with contextlib.redirect_stdout(output):
        onnxruntime.preload_dlls()
    try:
        session = _create(path, CUDA, threads)
    except _ProviderError as error:
        return None, str(error)
    if CUDA in session.get_providers():
        return session, ""
    print(output.getvalue(), end="", file=sys.stderr)
    failed = next((line for line in output.getvalue().splitlines() if line.startswith("Failed")), "")
    return None, f"its CUDA provider did not start ({failed or 'ONNX Runtime fell back to the CPU'})"


def _create(path: Path, provider: str, threads: int | None) -> Any:
    import onnxruntime
    from onnxruntime.capi import onnxruntime_pybind11_state as state

    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = threads or usable_cpus()
    options.log_severity_level = 3
    # TensorFloat-32 would differ from the checked float32 values in the third digit.
    providers: list[Any] = [(CUDA, {"use_tf32": "0"}), CPU] if provider == CUDA else [CPU]
    invalid_file = (
        state.InvalidProtobuf,
        state.InvalidArgument,
        state.InvalidGraph,
        state.NoModel,
        state.NotImplemented,
        state.NoSuchFile,
        # The message of ONNX Runtime may quote the damaged bytes.
        UnicodeDecodeError,
    )
    try:
        return onnxruntime.InferenceSession(str(path), options, providers=providers)
    except invalid_file as error:
        raise ExportError(f"{path}: not a usable ONNX model: {one_line(error)}", hint="export it again") from None
    except (state.Fail, state.RuntimeException, state.EPFail) as error:
        raise _ProviderError(f"{path}: ONNX Runtime cannot load it on {provider}: {one_line(error)}") from None


def _check_signature(path: Path, session: Any, metadata: ModelMetadata) -> None:
    """Raise ExportError if inputs or outputs differ from those that `export_onnx` writes or the metadata states."""
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
            sizes = ", ".join(map(str, shape))
            problems.append(f"{name} is {found[name][0]} {found[name][1]}, expected {kind} (batch, {sizes})")
        elif isinstance(found[name][1][0], int):
            problems.append(f"{name} has a fixed batch size of {found[name][1][0]}")
    if problems:
        raise ExportError(
            f"{path}: not a model exported by this project: {'; '.join(problems)}", hint="export it again"
        )
