"""Linear and dropout, made for the work of this network on a CPU; elsewhere they are torch's own.

Two of torch's operations are slow there at our sizes: a float32 `linear`, whose BLAS may leave half of the vector width
unused where oneDNN, behind convolutions, does not; and dropout, which draws one random number an element. Readings
stand in benchmarks/README.md. Under export, compilation and autocast `Linear` is torch's own, too.
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


class Dropout(nn.Dropout):
    """`nn.Dropout`; on a CPU the random numbers are our own."""

    def forward(self, input: Tensor) -> Tensor:
        """Any shape -> the same shape."""
        return dropout(input, self.p, self.training)

    def after_relu(self, input: Tensor) -> Tensor:
        """`self(relu(input))`, in fewer passes over memory."""
        if not self.training or not _draws(input, self.p):
            return dropout(F.relu(input), self.p, self.training)
        out: Tensor = _DroppedRelu.apply(input, self.p)  # type: ignore[no-untyped-call]
        return out


def dropout(input: Tensor, p: float, training: bool) -> Tensor:
    """`torch.nn.functional.dropout`, with the random numbers of `Dropout`."""
    if not training or not _draws(input, p):
        return F.dropout(input, p, training)
    return input * _draw(input, p).mul_(1 / (1 - p))


class _DroppedRelu(torch.autograd.Function):
    """relu, dropout and its scale in one: the gradient passes, scaled, where the result is not 0."""

    @staticmethod
    def forward(ctx: Any, input: Tensor, p: float) -> Tensor:
        ctx.scale = 1 / (1 - p)
        out = _scaled_product(_draw(input, p), input, ctx.scale).relu_()
        ctx.save_for_backward(out)
        return out

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None]:
        (out,) = ctx.saved_tensors
        return _scaled_product(torch.gt(out, 0, out=torch.empty_like(out)), grad, ctx.scale), None


def _scaled_product(kept: Tensor, values: Tensor, scale: float) -> Tensor:
    """`scale * kept * values`, in one pass and in the memory of `kept`."""
    return torch.addcmul(torch.zeros((), dtype=kept.dtype), kept, values, value=scale, out=kept)


def _draws(input: Tensor, p: float) -> bool:
    """Whether `_draw` is for this dropout."""
    return 0 < p <= 255 / 256 and _eager_cpu(input)


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
    # No rows in a tensor of one element without dimensions.
    rows = (*like.shape[:-1], 1)[: like.dim()]
    thresholds = (int(below) + (bits(rows, np.uint16) < rest * 2**16)).astype(np.uint8)
    elements = torch.from_numpy(bits(like.shape, np.uint8))
    return torch.ge(elements, torch.from_numpy(thresholds), out=torch.empty(like.shape, dtype=like.dtype))


def _eager_cpu(x: Tensor) -> bool:
    return x.device.type == "cpu" and not torch.compiler.is_compiling() and not torch.compiler.is_exporting()
