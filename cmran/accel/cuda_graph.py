"""CUDA-graph capture and replay of the training step.

The portable form is to call the step itself. A replay is one launch instead of about a thousand, with the same result.
"""

from collections.abc import Callable

import torch
from torch import Tensor


class CudaGraphStep:
    """A captured function that is replayed on batches of one shape.

    Everything that the function changes in place (weights, the optimizer's state, random numbers) must already exist on
    the device. Numbers of the host, such as the learning rate, keep the value that they had at the capture.

    Args:
        step: The function to capture. It is not executed.
        *inputs: Tensors of the shapes and dtypes that the function takes; their values are not used.
    """

    def __init__(self, step: Callable[..., tuple[Tensor, ...]], *inputs: Tensor) -> None:
        self._inputs = [torch.empty_like(given) for given in inputs]
        self._graph = torch.cuda.CUDAGraph()
        # The threads that prefetch batches use the device during the capture.
        with torch.cuda.graph(self._graph, capture_error_mode="thread_local"):
            self._outputs = step(*self._inputs)

    def __call__(self, *inputs: Tensor) -> tuple[Tensor, ...]:
        """Return the outputs of the function for `inputs`, without waiting for the device."""
        for static, given in zip(self._inputs, inputs, strict=True):
            static.copy_(given)
        self._graph.replay()
        # Copies, because the next replay overwrites the outputs.
        return tuple(output.clone() for output in self._outputs)
