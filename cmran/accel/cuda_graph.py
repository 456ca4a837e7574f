"""A step on CUDA, recorded once as a graph and replayed: one launch instead of some thousand, with the same result."""

from collections.abc import Callable

import torch
from torch import Tensor


class CudaGraphStep:
    """Replays `step` on batches of one shape.

    What the step changes (weights, the optimizer's state, random numbers) must exist before, on the device: it is read
    and written in place. Numbers of the host, such as the learning rate, stay what they were at the recording.
    """

    def __init__(self, step: Callable[..., tuple[Tensor, ...]], *inputs: Tensor) -> None:
        """Records without doing the step; of `inputs` only shape and dtype count."""
        self._inputs = [torch.empty_like(given) for given in inputs]
        self._graph = torch.cuda.CUDAGraph()
        # Threads that read ahead use the device meanwhile.
        with torch.cuda.graph(self._graph, capture_error_mode="thread_local"):
            self._outputs = step(*self._inputs)

    def __call__(self, *inputs: Tensor) -> tuple[Tensor, ...]:
        """What `step` returns for these inputs; nothing here waits for the device."""
        for held, given in zip(self._inputs, inputs, strict=True):
            held.copy_(given)
        self._graph.replay()
        # Copies: the next replay writes to the same place.
        return tuple(output.clone() for output in self._outputs)
