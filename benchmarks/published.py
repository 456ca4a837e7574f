"""The baseline: the published operations in the published order and precision, with the weights of `cmran.model`.

Float64, plain Adam, one HDF5 row at a time. Operations that this project reorders are in the published order: the
attention multiplies sound and cell for every cell, before the average and before the score's linear layer, and its
intermediates have 490 x 512 values per video; the relation modules have time as the first axis. Its outputs and losses
match the golden vectors (tests/benchmarks). It is not slowed down artificially: it uses torch's kernels and all
threads.

Shape letters as in `cmran.model.network`.
"""

import copy
from collections.abc import Iterable
from pathlib import Path

import h5py
import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from cmran.model.losses import compute_loss
from cmran.model.network import (
    CMRAN,
    CrossModalRelation,
    MultiHeadAttention,
    Outputs,
    RelationLayer,
    SpatialChannelAttention,
    TemporalRelation,
)


class Published(nn.Module):
    """The published network without ablations, in float64, with a copy of the weights of `model`.

    `dropout=False` disables dropout in training, as in the golden losses.
    """

    def __init__(self, model: CMRAN, *, dropout: bool = True) -> None:
        super().__init__()
        self.weights = copy.deepcopy(model).double()
        config = model.config
        self.config = config
        self.visual_p = config.visual_dropout if dropout else 0.0
        self.p = config.dropout if dropout else 0.0

    def forward(self, visual_BTHWC: Tensor, audio_BTA: Tensor) -> Outputs:
        """Compute the same as `CMRAN.forward`, in float64."""
        weights = self.weights
        visual = self._drop(F.relu(_linear(weights.visual_fc, visual_BTHWC)), self.visual_p)
        assert weights.attention is not None
        visual_BTC = _spatial_channel_attention(weights.attention, visual, audio_BTA)
        # Time is the first axis from here on.
        visual_TBC, audio_TBA = visual_BTC.transpose(0, 1).contiguous(), audio_BTA.transpose(0, 1).contiguous()
        visual_memory = self._temporal(weights.visual_temporal, visual_TBC)
        audio_memory = self._temporal(weights.audio_temporal, audio_TBA)
        visual_TBD = self._cross(weights.visual_relation, visual_TBC, audio_memory)
        audio_TBD = self._cross(weights.audio_relation, audio_TBA, visual_memory)
        fused_TBD = self._interaction(visual_TBD, audio_TBD)
        event_logits_BT = _linear(weights.event_head, fused_TBD).squeeze(-1).transpose(0, 1)
        highest_BD, _ = fused_TBD.transpose(0, 1).max(1)
        return Outputs(event_logits_BT, _linear(weights.class_head, highest_BD))

    def _temporal(self, module: TemporalRelation, x_TBF: Tensor) -> Tensor:
        x_TBD = _linear(module.project, x_TBF)
        for layer in module.layers:
            assert isinstance(layer, RelationLayer)
            x_TBD = self._layer(layer, x_TBD, x_TBD)
        return x_TBD

    def _cross(self, module: CrossModalRelation | None, query_TBF: Tensor, memory_TBD: Tensor) -> Tensor:
        assert module is not None
        query_TBD = _linear(module.project, query_TBF)
        return self._layer(module.layer, query_TBD, torch.cat([memory_TBD, query_TBD], dim=0))

    def _layer(self, layer: RelationLayer, x_TBD: Tensor, memory_UBD: Tensor) -> Tensor:
        x_TBD = layer.norm1(x_TBD + self._drop(self._attend(layer.attention, x_TBD, memory_UBD), self.p))
        hidden = self._drop(F.relu(_linear(layer.linear1, x_TBD)), self.p)
        out: Tensor = layer.norm2(x_TBD + self._drop(_linear(layer.linear2, hidden), self.p))
        return out

    def _interaction(self, visual_TBD: Tensor, audio_TBD: Tensor) -> Tensor:
        module = self.weights.interaction
        assert module is not None
        product_TBD = visual_TBD * audio_TBD
        memory_UBD = torch.cat([audio_TBD, visual_TBD], dim=0)
        out: Tensor = module.norm(
            product_TBD + self._drop(self._attend(module.attention, product_TBD, memory_UBD), self.p)
        )
        return out

    def _attend(self, module: MultiHeadAttention, query_TBD: Tensor, memory_UBD: Tensor) -> Tensor:
        out, _ = F.multi_head_attention_forward(
            query_TBD,
            memory_UBD,
            memory_UBD,
            query_TBD.shape[-1],
            module.heads,
            module.in_proj_weight,
            module.in_proj_bias,
            None,
            None,
            False,
            self.p,
            module.out_proj.weight,
            module.out_proj.bias,
            training=self.training,
            need_weights=True,
        )
        return out

    def _drop(self, x: Tensor, p: float) -> Tensor:
        return F.dropout(x, p, self.training)


def _linear(layer: nn.Linear, x: Tensor) -> Tensor:
    return F.linear(x, layer.weight, layer.bias)


def _spatial_channel_attention(module: SpatialChannelAttention, visual_BTHWC: Tensor, audio_BTA: Tensor) -> Tensor:
    B, T, H, W, C = visual_BTHWC.shape
    cells_NSC = visual_BTHWC.reshape(B * T, H * W, C)
    audio_NA = audio_BTA.reshape(B * T, -1)

    heard_N1C = F.relu(_linear(module.audio_channel, audio_NA)).unsqueeze(1)
    seen_NSC = F.relu(_linear(module.visual_channel, cells_NSC))
    guided_NC = (heard_N1C * seen_NSC).mean(1)
    gate_NC = torch.sigmoid(_linear(module.gate, F.relu(_linear(module.bottleneck, guided_NC))))
    cells_NSC = cells_NSC * (gate_NC.unsqueeze(1) + 1)

    seen_NSK = F.relu(_linear(module.visual_spatial, cells_NSC))
    heard_N1K = F.relu(_linear(module.audio_spatial, audio_NA)).unsqueeze(1)
    score_NS1 = torch.tanh(_linear(module.score, seen_NSK * heard_N1K))
    weight_N1S = score_NS1.transpose(2, 1).softmax(-1)
    return torch.bmm(weight_N1S, cells_NSC).reshape(B, T, C)


class PublishedStep:
    """One training step as published: Adam and gradient clipping, everything in float64."""

    def __init__(
        self, model: CMRAN, *, lr: float = 5e-4, dropout: bool = True, device: torch.device | str = "cpu"
    ) -> None:
        self.mode = model.config.mode
        self.model = Published(model, dropout=dropout).to(device).train()
        self.clip_norm = 0.1 if self.mode == "full" else 0.5
        self.optimizer = torch.optim.Adam(self.model.parameters(), lr=lr)

    def __call__(self, visual: Tensor, audio: Tensor, labels: Tensor) -> tuple[float, float]:
        """Train on one batch in float64. Return its loss and gradient norm, read back immediately, as published."""
        self.optimizer.zero_grad()
        loss = compute_loss(self.model(visual, audio), labels, self.mode)
        loss.backward()
        norm = torch.nn.utils.clip_grad_norm_(self.model.parameters(), self.clip_norm)
        self.optimizer.step()
        return loss.item(), float(norm)

    def score(self, visual: Tensor, audio: Tensor, labels: Tensor) -> float:
        """Return the loss of one batch in evaluation mode, as after each published epoch."""
        self.model.eval()
        with torch.no_grad():
            loss = compute_loss(self.model(visual, audio), labels, self.mode).item()
        self.model.train()
        return loss


class PublishedRows(torch.utils.data.Dataset[tuple[Tensor, Tensor, Tensor]]):
    """Rows of a folder as published: float64, three HDF5 reads each. (T, H, W, C), (T, A), (T, 29)."""

    def __init__(self, folder: Path, rows: Iterable[int]) -> None:
        self.folder, self.rows = folder, [int(row) for row in rows]
        self._files: list[h5py.File] = []

    def __len__(self) -> int:
        return len(self.rows)

    def __getitem__(self, index: int) -> tuple[Tensor, Tensor, Tensor]:
        if not self._files:
            # Each worker process opens the files itself.
            names = ("visual_feature.h5", "audio_feature.h5", "labels.h5")
            self._files = [h5py.File(self.folder / name, "r") for name in names]
        row = self.rows[index]
        visual, audio, labels = (np.asarray(file["avadataset"][row], np.float64) for file in self._files)
        return torch.from_numpy(visual), torch.from_numpy(audio), torch.from_numpy(labels)
