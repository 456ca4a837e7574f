"""One training step: the network and its optimizer on one device, with CUDA-graph replay."""

import math

import torch
from torch import Tensor

from cmran.accel.cuda_graph import CudaGraphStep
from cmran.accel.memory import reuse_memory
from cmran.config import Mode, Precision, RunConfig
from cmran.data.loader import LabelKind
from cmran.model.losses import compute_loss, predict_segments
from cmran.model.network import CMRAN, Outputs
from cmran.utils.device import limit_threads

WEIGHTS = {"float32": torch.float32, "float64": torch.float64, "bfloat16": torch.float32}
"""Dtype of the weights for each precision. bfloat16 is autocast over float32 weights."""

INPUTS = WEIGHTS | {"bfloat16": torch.bfloat16}
"""Dtype of features and labels. Autocast rounds the features to bfloat16, so they are read as bfloat16 at once."""


class TrainStep:
    """The network and its optimizer on one device, and the training step.

    The initial weights are drawn from torch's generator.

    Args:
        config: Settings of the run. The precision must not be "auto".
        device: Device of the network.
    """

    def __init__(self, config: RunConfig, device: torch.device) -> None:
        self.config, train = config, config.train
        reuse_memory()
        limit_threads()
        self.model = CMRAN(config.model).to(device=device, dtype=WEIGHTS[train.precision])
        on_cuda = device.type == "cuda"
        self.optimizer = torch.optim.Adam(
            self.model.parameters(), lr=train.lr, weight_decay=train.weight_decay, fused=True, capturable=on_cuda
        )
        self._parameters = list(self.model.parameters())
        self._use_graph, self._warm = on_cuda, False
        self._graph: CudaGraphStep | None = None
        self._graph_lr = math.nan

    def step(self, visual: Tensor, audio: Tensor, labels: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Train on one batch. On CUDA full batches replay a captured graph, with the same result as `eager_step`.

        Args:
            visual: Feature maps, (B, T, H, W, C), of dtype INPUTS[precision], as the other arguments.
            audio: Audio embeddings, (B, T, A).
            labels: Labels of the segments or videos, as `compute_loss`.

        Returns:
            The loss, the gradient norm before clipping, and the predicted segments (B, T), all on the device: nothing
            here waits for it.
        """
        # A graph has one shape: the last, shorter batch of an epoch runs eagerly.
        if not self._use_graph or len(visual) != self.config.train.batch_size:
            return self.eager_step(visual, audio, labels)
        # The optimizer's state, which the first step creates, must exist before the capture.
        if not self._warm:
            self._warm = True
            return self.eager_step(visual, audio, labels)
        lr = self.optimizer.param_groups[0]["lr"]
        if self._graph is None or lr != self._graph_lr:
            self._graph = None
            self._graph, self._graph_lr = CudaGraphStep(self.eager_step, visual, audio, labels), lr
        loss, norm, segments = self._graph(visual, audio, labels)
        return loss, norm, segments

    def eager_step(self, visual: Tensor, audio: Tensor, labels: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Train on one batch as `step` does, without a CUDA graph."""
        train = self.config.train
        self.model.train()
        self.optimizer.zero_grad()
        outputs = compute_outputs(self.model, visual, audio, train.precision)
        loss = compute_loss(outputs, labels, self.config.model.mode)
        loss.backward()
        norm = torch.nn.utils.clip_grad_norm_(self._parameters, train.clip_norm, foreach=True)
        self.optimizer.step()
        return loss.detach(), norm, predict_segments(outputs)


def compute_outputs(model: CMRAN, visual: Tensor, audio: Tensor, precision: Precision) -> Outputs:
    """Run the network, in autocast for bfloat16. Its outputs are then converted to float32 for losses and decisions."""
    if precision != "bfloat16":
        outputs: Outputs = model(visual, audio)
        return outputs
    with torch.autocast(visual.device.type, torch.bfloat16):
        outputs = model(visual, audio)
    return Outputs(outputs.event_logits.float(), outputs.class_logits.float())


def label_kind(mode: Mode) -> LabelKind:
    """Return the kind of labels that the loss of the mode needs."""
    return "segments" if mode == "full" else "video"
