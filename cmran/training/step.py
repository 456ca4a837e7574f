"""Training and prediction: one loop, a checkpoint each epoch that holds the full state, resume bit for bit.

A run's folder:
    config.json     settings, data folder and its fingerprint, kind of device and source of the initial weights,
                    written before the first step: all that a resumed run needs to know
    init.pt         the initial weights, where they were given
    last.pt         the full state after the last finished epoch
    best.pt         the weights of the epoch that is best on the selection split
    model_epoch_*   the same weights as a published checkpoint, see cmran.model.checkpoints.export_published
    epochs.csv      one line for each finished epoch
    metrics.json    {"val", "test", "epochs", ...}, written at the end: the run is finished when it is there
"""

import math

import torch
from torch import Tensor

from cmran.accel.cuda_graph import CudaGraphStep
from cmran.accel.memory import reuse_memory
from cmran.config import (
    Precision,
    RunConfig,
)
from cmran.model.losses import compute_loss, predict_segments
from cmran.model.network import CMRAN, Outputs
from cmran.utils.device import limit_threads

WEIGHTS = {"float32": torch.float32, "float64": torch.float64, "bfloat16": torch.float32}
"""Dtype of the weights; bfloat16 computes in autocast over float32 ones."""


INPUTS = WEIGHTS | {"bfloat16": torch.bfloat16}
"""Dtype of features and labels. Autocast rounds the features to bfloat16 anyway; so it has less to read."""


class TrainStep:
    """The network and its optimizer on one device, and the training step."""

    def __init__(self, config: RunConfig, device: torch.device) -> None:
        """`config` with the precision picked. Draws the weights from torch's generator."""
        self.config, train = config, config.train
        reuse_memory()
        limit_threads()
        self.model = CMRAN(config.model).to(device=device, dtype=WEIGHTS[train.precision])
        on_cuda = device.type == "cuda"
        self.optimizer = torch.optim.Adam(
            self.model.parameters(), lr=train.lr, weight_decay=train.weight_decay, fused=True, capturable=on_cuda
        )
        self._parameters = list(self.model.parameters())
        self._captures, self._warm = on_cuda, False
        self._graph: CudaGraphStep | None = None
        self._graph_lr = math.nan

    def step(self, visual: Tensor, audio: Tensor, labels: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """One step on a batch of dtype INPUTS[precision]: its loss, gradient norm before clipping, and segments (B, T).

        All three are left on the device: nothing here waits for it. On CUDA full batches go through a recorded step,
        which does the same.
        """
        # A recording takes one shape: the last, short batch of an epoch goes without.
        if not self._captures or len(visual) != self.config.train.batch_size:
            return self.eager_step(visual, audio, labels)
        # What a first step makes, such as the optimizer's state, must be there before one is recorded.
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
        """`step`, one operation after the other."""
        train = self.config.train
        self.model.train()
        self.optimizer.zero_grad()
        outputs = _forward(self.model, visual, audio, train.precision)
        loss = compute_loss(outputs, labels, self.config.model.mode)
        loss.backward()
        norm = torch.nn.utils.clip_grad_norm_(self._parameters, train.clip_norm, foreach=True)
        self.optimizer.step()
        return loss.detach(), norm, predict_segments(outputs)


def _forward(model: CMRAN, visual: Tensor, audio: Tensor, precision: Precision) -> Outputs:
    if precision != "bfloat16":
        outputs: Outputs = model(visual, audio)
        return outputs
    with torch.autocast(visual.device.type, torch.bfloat16):
        outputs = model(visual, audio)
    # Losses and decisions in float32.
    return Outputs(outputs.event_logits.float(), outputs.class_logits.float())
