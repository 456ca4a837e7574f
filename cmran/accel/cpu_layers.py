"""Linear, dropout and their combination with ReLU, accelerated on a CPU.

On every other device, and under export and compilation, they are torch's own operations:

    Linear              nn.Linear
    Dropout, dropout    nn.Dropout, F.dropout
    linear_relu         dropout(F.relu(linear(x)))

At the sizes of this network three of these operations are slow on a CPU. A float32 `F.linear` calls a BLAS that may
leave half of the vector width unused; a convolution, which oneDNN computes, does not. Around a bfloat16 `F.linear`, the
bias, ReLU and dropout each read and write the whole tensor. Dropout draws one random number per element. For
measurements see benchmarks/README.md.
"""

import math
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from numpy.typing import NDArray
from torch import Tensor, nn
from torch.autograd.function import once_differentiable


class Linear(nn.Linear):
    """`nn.Linear`. A float32 input (..., rows, features) on a CPU is computed as a convolution with a 1 x 1 kernel."""

    def forward(self, input: Tensor) -> Tensor:
        """Map (..., in_features) to (..., out_features)."""
        if input.dtype != torch.float32 or input.dim() < 3 or not _eager_cpu(input) or torch.is_autocast_enabled("cpu"):
            return super().forward(input)
        # Images with one line and the features innermost in memory, which is the layout of the input: no copy.
        images = input.flatten(0, -3).transpose(1, 2).unsqueeze(2)
        out = F.conv2d(images, self.weight[:, :, None, None], self.bias)
        rows: Tensor = out.squeeze(2).transpose(1, 2).unflatten(0, input.shape[:-2])
        return rows


class Dropout(nn.Dropout):
    """`nn.Dropout`, with faster random numbers on a CPU."""

    def forward(self, input: Tensor) -> Tensor:
        """Return a tensor of the same shape."""
        return dropout(input, self.p, self.training)


def dropout(input: Tensor, p: float, training: bool) -> Tensor:
    """`torch.nn.functional.dropout`, with the random numbers of `Dropout`."""
    if not training or not _can_draw(input, p):
        return F.dropout(input, p, training)
    out: Tensor = _Dropout.apply(input, p)  # type: ignore[no-untyped-call]
    return out


def linear_relu(linear: nn.Linear, input: Tensor, dropout: Dropout | None = None) -> Tensor:
    """`dropout(F.relu(linear(input)))`, in fewer passes over memory under bfloat16 autocast on a CPU.

    Args:
        linear: The linear layer.
        input: (..., in_features).
        dropout: None: no dropout.

    Returns:
        (..., out_features).
    """
    p = dropout.p if dropout is not None and dropout.training else 0.0
    if _can_fuse(linear, input) and (p == 0 or _can_draw(input, p)):
        out: Tensor = _LinearReLU.apply(input.bfloat16(), linear.weight, linear.bias, p)  # type: ignore[no-untyped-call]
        return out
    rectified = F.relu(linear(input))
    return rectified if dropout is None else dropout(rectified)


class _Dropout(torch.autograd.Function):
    """Dropout with its scale. The gradient of a kept element is scaled, that of another one is zero."""

    @staticmethod
    def forward(ctx: Any, input: Tensor, p: float) -> Tensor:
        kept, ctx.scale = _draw(input, p), 1 / (1 - p)
        ctx.save_for_backward(kept)
        return _scaled_product(kept, input, ctx.scale, out=torch.empty_like(kept))

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None]:
        (kept,) = ctx.saved_tensors
        return _scaled_product(kept, grad, ctx.scale, out=torch.empty_like(kept)), None


class _LinearReLU(torch.autograd.Function):
    """Linear, ReLU and dropout of a bfloat16 input with float32 weights; only the result is kept for the gradient."""

    @staticmethod
    def forward(ctx: Any, input: Tensor, weight: Tensor, bias: Tensor, p: float) -> Tensor:
        weight, ctx.scale = weight.to(input.dtype), 1 / (1 - p)
        # The operation that torch.compile uses; `F.linear` would first fill the result with the bias and then add to
        # it. Its own "relu" is not used because it turns NaN into 0.
        out: Tensor = torch.ops.mkldnn._linear_pointwise(input, weight, bias.to(input.dtype), "none", [], "")
        if p:
            kept = _draw(out, p)
            out = _scaled_product(kept, out, ctx.scale, out=kept)
        ctx.save_for_backward(input, weight, out.relu_())
        return out

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, Tensor, Tensor, None]:
        input, weight, out = ctx.saved_tensors
        # An element of the result is positive if it was positive and kept.
        grad = torch.ops.aten.threshold_backward(grad, out, 0).flatten(0, -2)
        of_input = (grad @ weight).view_as(input) if ctx.needs_input_grad[0] else None
        # Without dropout this would be a needless pass over memory.
        if of_input is not None and ctx.scale != 1:
            of_input.mul_(ctx.scale)
        of_weight, of_bias = grad.T @ input.flatten(0, -2), grad.sum(0)
        return of_input, of_weight.float().mul_(ctx.scale), of_bias.float().mul_(ctx.scale), None


def _scaled_product(kept: Tensor, values: Tensor, scale: float, *, out: Tensor) -> Tensor:
    """Compute `scale * kept * values` in one pass, rounded once."""
    return torch.addcmul(torch.zeros((), dtype=out.dtype), kept, values, value=scale, out=out)


def _can_fuse(linear: nn.Linear, input: Tensor) -> bool:
    """Whether `_LinearReLU` applies: float32 weights under bfloat16 autocast, on a CPU whose oneDNN has bfloat16."""
    return bool(
        torch.is_autocast_enabled("cpu")
        and torch.get_autocast_dtype("cpu") == torch.bfloat16
        and _eager_cpu(input)
        and input.dtype in (torch.float32, torch.bfloat16)
        and linear.weight.dtype == torch.float32
        and linear.bias is not None
        and input.dim() > 1
        and input.numel() > 0
        and torch.backends.mkldnn.enabled
        and torch.ops.mkldnn._is_mkldnn_bf16_supported()
    )


def _can_draw(input: Tensor, p: float) -> bool:
    """Whether `_draw` applies to this input and probability."""
    return 0 < p <= 255 / 256 and input.dim() > 0 and _eager_cpu(input)


def _draw(like: Tensor, p: float) -> Tensor:
    """Draw a mask in the shape and dtype of `like`: 1 for a kept element, else 0. The seed is from torch's generator.

    8 random bits decide on an element. The threshold of each row (along the last dimension) is drawn from the two
    multiples of 1/256 around p, so that every element is dropped with probability p, within 2^-24.
    """
    # Only the seed is from torch's generator, which is slow and single-threaded: a step needs millions of bits.
    generator = np.random.SFC64(int(torch.empty((), dtype=torch.int64).random_()))

    def bits(shape: tuple[int, ...], dtype: type[np.unsignedinteger[Any]]) -> NDArray[Any]:
        count, size = math.prod(shape), np.dtype(dtype).itemsize
        return generator.random_raw(-(-count * size // 8)).view(dtype)[:count].reshape(shape)

    below, rest = divmod(256 * p, 1)
    thresholds = (int(below) + (bits((*like.shape[:-1], 1), np.uint16) < rest * 2**16)).astype(np.uint8)
    elements = torch.from_numpy(bits(like.shape, np.uint8))
    return torch.ge(elements, torch.from_numpy(thresholds), out=torch.empty(like.shape, dtype=like.dtype))


def _eager_cpu(x: Tensor) -> bool:
    return x.device.type == "cpu" and not torch.compiler.is_compiling() and not torch.compiler.is_exporting()
