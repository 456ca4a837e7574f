"""Floors: the least time that this machine allows, measured in the same run as the code that is compared with it.

A floor has two terms. Operations: the network's matrix products, at the best rate that products of these shapes reach
on this machine in their dtype, with all threads. Bytes: the minimum to read and write, divided by the bandwidth of a
copy. Element-wise passes over the maps are not included, since they can be fused into the products.

Shape letters as in `cmran.model.network`.
"""

import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import cache

import torch
import torch.nn.functional as F

from cmran.config import ModelConfig, Precision
from cmran.model.network import CMRAN
from cmran.training.step import INPUTS, WEIGHTS

COPIED_BYTES = 128 << 20
SECONDS = 0.05
"""Minimum time over which a product is repeated to measure its rate."""
OPTIMIZER_PASSES = 7
"""Adam reads weights, gradients and two moments, and writes weights and moments."""


@dataclass(frozen=True)
class Product:
    """`pairs` products of a (rows, inner) and an (inner, columns) matrix."""

    rows: int
    inner: int
    columns: int
    pairs: int = 1
    passes: int = 1
    """1: forward only; 2: with the gradient of the weights; 3: also with the gradient of the input."""

    @property
    def operations(self) -> int:
        """Multiplications and additions of all passes; each pass has the same number."""
        return 2 * self.rows * self.inner * self.columns * self.pairs * self.passes


def products(config: ModelConfig, videos: int, *, training: bool, segments: int = 10, cells: int = 49) -> list[Product]:
    """Return the matrix products of the network without ablations for a batch: forward and, in training, backward."""
    found: list[Product] = []
    T, S, C, A, D = segments, cells, config.visual_features, config.audio_features, config.width
    N = videos * T

    def linear(rows: int, inner: int, columns: int, *, leaf: bool = False) -> None:
        # The input features need no gradient.
        found.append(Product(rows, inner, columns, passes=1 if not training else 2 if leaf else 3))

    def attend(heads: int, memory: int, *, own_memory: bool = False) -> None:
        if own_memory:
            linear(N, D, 3 * D)
        else:
            linear(N, D, D)
            linear(videos * memory, D, 2 * D)
        for inner, columns in ((D // heads, memory), (memory, D // heads)):
            found.append(Product(T, inner, columns, pairs=videos * heads, passes=3 if training else 1))
        linear(N, D, D)

    def relate(memory: int, *, own_memory: bool = False) -> None:
        attend(config.heads, memory, own_memory=own_memory)
        linear(N, D, config.feedforward)
        linear(N, config.feedforward, D)

    linear(N * S, C, C, leaf=True)
    # Spatial and channel attention.
    linear(N, A, C, leaf=True)
    linear(N * S, C, C)
    linear(N, C, config.bottleneck)
    linear(N, config.bottleneck, C)
    linear(N * S, C, config.spatial_width)
    linear(N, A, config.spatial_width, leaf=True)
    for rows, inner, columns in ((S, config.spatial_width, 1), (1, S, C)):
        found.append(Product(rows, inner, columns, pairs=N, passes=3 if training else 1))
    for features, leaf in ((C, False), (A, True)):
        # Temporal relation, then cross-modal relation over both memories.
        linear(N, features, D, leaf=leaf)
        for _ in range(config.layers):
            relate(T, own_memory=True)
        linear(N, features, D, leaf=leaf)
        relate(2 * T)
    attend(config.effective_interaction_heads, 2 * T)
    linear(N, D, 1)
    linear(videos, D, config.classes)
    return found


def product_seconds(found: Sequence[Product], dtype: torch.dtype, device: torch.device) -> float:
    """Return the least time for these products, in seconds."""
    return sum(one.operations / rate(one.rows, one.inner, one.columns, one.pairs, dtype, device) for one in found)


def step_seconds(config: ModelConfig, precision: Precision, videos: int, device: torch.device) -> float:
    """Return the least time of a training step, in seconds: its products, reading its batch, and Adam's passes."""
    dtype = torch.bfloat16 if precision == "bfloat16" else WEIGHTS[precision]
    with torch.device("meta"):
        weights = sum(weight.numel() for weight in CMRAN(config).parameters())
    batch = videos * 10 * 49 * config.visual_features
    moved = batch * INPUTS[precision].itemsize + OPTIMIZER_PASSES * weights * WEIGHTS[precision].itemsize
    return product_seconds(products(config, videos, training=True), dtype, device) + moved / bandwidth(device)


def forward_seconds(config: ModelConfig, precision: Precision, videos: int, device: torch.device) -> float:
    """Return the least time of a batch in inference, in seconds: its products, and reading its features."""
    dtype = torch.bfloat16 if precision == "bfloat16" else WEIGHTS[precision]
    read = videos * 10 * 49 * config.visual_features * INPUTS[precision].itemsize
    return product_seconds(products(config, videos, training=False), dtype, device) + read / bandwidth(device)


@cache
def rate(rows: int, inner: int, columns: int, pairs: int, dtype: torch.dtype, device: torch.device) -> float:
    """Return the operations per second of a product of this shape, with the fastest of torch's implementations."""
    left = torch.randn(pairs, rows, inner, device=device).to(dtype)
    right = torch.randn(pairs, columns, inner, device=device).to(dtype)
    works: list[Callable[[], object]] = [lambda: torch.bmm(left, right.transpose(1, 2))]
    if pairs == 1:
        works = [lambda: F.linear(left[0], right[0])]
        if device.type == "cpu" and dtype == torch.float32:
            # oneDNN; BLAS may use only half of the vector width, see cmran.accel.cpu_layers.
            image, kernel = left.transpose(1, 2).unsqueeze(2), right[0, :, :, None, None]
            works.append(lambda: F.conv2d(image, kernel))
    with torch.inference_mode():
        seconds = min(least_seconds(work, device) for work in works)
    return Product(rows, inner, columns, pairs).operations / seconds


@cache
def bandwidth(device: torch.device) -> float:
    """Return the bytes per second of a large copy, counting bytes read and bytes written."""
    source = torch.ones(COPIED_BYTES, dtype=torch.uint8, device=device)
    target = torch.empty_like(source)
    return 2 * COPIED_BYTES / least_seconds(lambda: target.copy_(source), device)


def least_seconds(work: Callable[[], object], device: torch.device) -> float:
    """Return the seconds of `work`: the minimum of five measurements, each repeated to fill a fifth of SECONDS."""

    def measure(times: int) -> float:
        _wait(device)
        started = time.perf_counter()
        for _ in range(times):
            work()
        _wait(device)
        return (time.perf_counter() - started) / times

    # The first call starts threads and chooses kernels.
    measure(1)
    times = max(1, int(SECONDS / 5 / max(measure(1), 1e-7)))
    return min(measure(times) for _ in range(5))


def _wait(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize(device)
