"""Linear and dropout, made for the work of this network on a CPU; elsewhere they are torch's own.

Three things are slow there at our sizes: a float32 `linear`, whose BLAS may leave half of the vector width unused where
oneDNN, behind convolutions, does not; bias, relu and dropout around a bfloat16 `linear`, each in passes of its own; and
dropout, which draws one random number an element. Readings stand in benchmarks/README.md. Under export and compilation
these layers are torch's own, too.
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
    """`nn.Linear`; of (..., rows, features) in float32 on a CPU it is computed as a convolution with a 1 x 1 kernel."""

    def forward(self, input: Tensor) -> Tensor:
        """(..., in_features) -> (..., out_features)."""
        if input.dtype != torch.float32 or input.dim() < 3 or not _eager_cpu(input) or torch.is_autocast_enabled("cpu"):
            return super().forward(input)
        # Images of one line with the features innermost in memory, as they are: nothing is copied.
        images = input.flatten(0, -3).transpose(1, 2).unsqueeze(2)
        out = F.conv2d(images, self.weight[:, :, None, None], self.bias)
        rows: Tensor = out.squeeze(2).transpose(1, 2).unflatten(0, input.shape[:-2])
        return rows

    def relu(self, input: Tensor, dropout: "Dropout | None" = None) -> Tensor:
        """`relu(self(input))`, then `dropout` where there is one, in fewer passes over memory."""
        p = dropout.p if dropout is not None and dropout.training else 0.0
        if self._fuses(input) and (p == 0 or _draws(input, p)):
            out: Tensor = _LinearRelu.apply(input.bfloat16(), self.weight, self.bias, p)  # type: ignore[no-untyped-call]
            return out
        rectified = F.relu(self(input))
        return rectified if dropout is None else dropout(rectified)

    def _fuses(self, input: Tensor) -> bool:
        """Whether `_LinearRelu` is for this input: float32 weights in bfloat16 autocast, where oneDNN has bfloat16."""
        return bool(
            torch.is_autocast_enabled("cpu")
            and torch.get_autocast_dtype("cpu") == torch.bfloat16
            and _eager_cpu(input)
            and input.dtype in (torch.float32, torch.bfloat16)
            and self.weight.dtype == torch.float32
            and self.bias is not None
            and input.dim() > 1
            and input.numel() > 0
            and torch.backends.mkldnn.enabled
            and torch.ops.mkldnn._is_mkldnn_bf16_supported()
        )


class Dropout(nn.Dropout):
    """`nn.Dropout`; on a CPU the random numbers are our own."""

    def forward(self, input: Tensor) -> Tensor:
        """Any shape -> the same shape."""
        return dropout(input, self.p, self.training)


def dropout(input: Tensor, p: float, training: bool) -> Tensor:
    """`torch.nn.functional.dropout`, with the random numbers of `Dropout`."""
    if not training or not _draws(input, p):
        return F.dropout(input, p, training)
    out: Tensor = _Dropped.apply(input, p)  # type: ignore[no-untyped-call]
    return out


class _Dropped(torch.autograd.Function):
    """Dropout and its scale: the gradient passes, scaled, where an element was kept."""

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


class _LinearRelu(torch.autograd.Function):
    """Linear, relu and dropout of a bfloat16 input with float32 weights, in one result and one mask."""

    @staticmethod
    def forward(ctx: Any, input: Tensor, weight: Tensor, bias: Tensor, p: float) -> Tensor:
        weight, ctx.scale = weight.to(input.dtype), 1 / (1 - p)
        # What torch's own compiler calls; `linear` would fill the result with the bias first, and add to it. Not with
        # its "relu": that takes NaN for 0.
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
        # The result itself tells what was positive and kept.
        grad = torch.ops.aten.threshold_backward(grad, out, 0).flatten(0, -2)
        of_input = (grad @ weight).view_as(input) if ctx.needs_input_grad[0] else None
        # Without dropout this would be a pass over a map for nothing.
        if of_input is not None and ctx.scale != 1:
            of_input.mul_(ctx.scale)
        of_weight, of_bias = grad.T @ input.flatten(0, -2), grad.sum(0)
        return of_input, of_weight.float().mul_(ctx.scale), of_bias.float().mul_(ctx.scale), None


def _scaled_product(kept: Tensor, values: Tensor, scale: float, *, out: Tensor) -> Tensor:
    """`scale * kept * values` in one pass, rounded once."""
    return torch.addcmul(torch.zeros((), dtype=out.dtype), kept, values, value=scale, out=out)


def _draws(input: Tensor, p: float) -> bool:
    """Whether `_draw` is for this dropout."""
    return 0 < p <= 255 / 256 and input.dim() > 0 and _eager_cpu(input)


def _draw(like: Tensor, p: float) -> Tensor:
    """Ones where an element is kept, zeros elsewhere, in the shape and dtype of `like`. Follows torch's generator.

    8 random bits decide on an element. The threshold of each row (along the last dimension) is drawn from the two
    multiples of 1/256 around p, so that every element is dropped with probability p, to 2^-24.
    """
    # Torch's generator gives the seed alone: it is slow, on one core, and a step needs millions of bits.
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
