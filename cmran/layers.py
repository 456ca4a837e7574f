"""Linear and dropout, made for the work of this network on a CPU; elsewhere they are torch's own.

Two of torch's operations are slow there at our sizes: a float32 `linear`, whose BLAS may leave half of the vector width
unused where oneDNN, behind convolutions, does not; and dropout, which draws one random number an element. Readings
stand in benchmarks/README.md. Under export, compilation and autocast `Linear` is torch's own, too.
"""

from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
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
    """`nn.Dropout`; on a CPU 16 random bits decide on an element, so p is rounded to a multiple of 2^-16."""

    def forward(self, input: Tensor) -> Tensor:
        """Any shape -> the same shape."""
        return dropout(input, self.p, self.training)

    def after_relu(self, input: Tensor) -> Tensor:
        """`self(relu(input))`, in fewer passes over memory."""
        if not self.training or self.p == 0 or not _eager_cpu(input):
            return dropout(F.relu(input), self.p, self.training)
        out: Tensor = _DroppedRelu.apply(input, self.p)  # type: ignore[no-untyped-call]
        return out


def dropout(input: Tensor, p: float, training: bool) -> Tensor:
    """`torch.nn.functional.dropout`, with the random numbers of `Dropout`."""
    if not training or p == 0 or not _eager_cpu(input):
        return F.dropout(input, p, training)
    kept, scale = _draw(input, p)
    return input * kept.mul_(scale)


class _DroppedRelu(torch.autograd.Function):
    """relu, dropout and its scale in one: the gradient passes, scaled, where the result is not 0."""

    @staticmethod
    def forward(ctx: Any, input: Tensor, p: float) -> Tensor:
        kept, ctx.scale = _draw(input, p)
        out = kept.mul_(input).relu_().mul_(ctx.scale)
        ctx.save_for_backward(out)
        return out

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None]:
        (out,) = ctx.saved_tensors
        return torch.gt(out, 0, out=torch.empty_like(out)).mul_(grad).mul_(ctx.scale), None


def _draw(like: Tensor, p: float) -> tuple[Tensor, float]:
    """Ones where an element is kept, zeros elsewhere, and the scale of those kept. Follows torch's generator."""
    dropped = min(round(p * 2**16), 2**16 - 1)
    # Torch's generator gives the seed alone: it is slow, on one core, and a step needs millions of bits.
    seed = int(torch.empty((), dtype=torch.int64).random_())
    words = np.random.SFC64(seed).random_raw((like.numel() + 3) // 4)
    bits = torch.from_numpy(words.view(np.int16))[: like.numel()].view(like.shape)
    kept = torch.ge(bits, dropped - 2**15, out=torch.empty(like.shape, dtype=like.dtype))
    return kept, 2**16 / (2**16 - dropped)


def _eager_cpu(x: Tensor) -> bool:
    return x.device.type == "cpu" and not torch.compiler.is_compiling() and not torch.compiler.is_exporting()
