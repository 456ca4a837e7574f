"""The network: CMRAN of Xu et al. (ACM Multimedia 2020), as its released code computes it.

Shape letters in names and docstrings:
    B videos    T segments    H x W grid of visual cells    S = H * W cells
    C visual channels    A audio features    D width    K class logits (28 full, 29 weak)

Modules carry only weights that an output depends on: 9,509,150 in full mode at the published sizes.
"""

import copy
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from cmran.accel.cpu_layers import Dropout, Linear
from cmran.config import ModelConfig


class Outputs(NamedTuple):
    """What the network says of a batch."""

    event_logits: Tensor
    """(B, T): above 0, the segment holds an event."""
    class_logits: Tensor
    """(B, K) of the whole video; K is 28 in full mode, 29 in weak mode."""


class CMRAN(nn.Module):
    """Cross-Modal Relation-Aware Network; see the steps in `forward`.

    There is no positional encoding: the network is equivariant to permutations in time, and T is free.
    """

    def __init__(self, config: ModelConfig) -> None:
        super().__init__()
        self.config = config
        self.sees, self.hears = not config.audio_only, not config.visual_only
        both = self.sees and self.hears

        if self.sees:
            self.visual_fc = Linear(config.visual_features, config.visual_features)
            self.visual_dropout = Dropout(config.visual_dropout)
            self.visual_temporal = TemporalRelation(config.visual_features, config)
        if self.hears:
            self.audio_temporal = TemporalRelation(config.audio_features, config)
        self.attention = SpatialChannelAttention(config) if both and not config.no_spatial_channel_attention else None

        # Without the cross-modal relation the fused vectors come from the temporal relations alone.
        self.visual_relation = self.audio_relation = None
        if not config.no_cross_modal_relation:
            if self.sees:
                self.visual_relation = CrossModalRelation(config.visual_features, config)
            if self.hears:
                self.audio_relation = CrossModalRelation(config.audio_features, config)
        self.interaction = Interaction(config) if both and not config.no_interaction else None

        self.event_head = Linear(config.width, 1)
        self.class_head = Linear(config.width, config.classes)

    def forward(self, visual_BTHWC: Tensor, audio_BTA: Tensor) -> Outputs:
        """Event and class logits of a batch of videos.

        visual_BTHWC: (B, T, H, W, C), non-negative feature maps; audio_BTA: (B, T, A). Any B >= 1, T >= 1, H * W >= 1.
        Raises ValueError where a shape does not fit the configuration, or the two inputs do not fit each other.
        """
        self._check(visual_BTHWC, audio_BTA)
        visual_query = audio_query = visual_memory = audio_memory = None

        if self.sees:
            cells_BTSC = self.visual_fc.relu(visual_BTHWC.flatten(2, 3), self.visual_dropout)
            visual_query = cells_BTSC.mean(2) if self.attention is None else self.attention(cells_BTSC, audio_BTA)
            visual_memory = self.visual_temporal(visual_query)
        if self.hears:
            audio_query = audio_BTA
            audio_memory = self.audio_temporal(audio_BTA)

        # A modality that stands alone relates to its own memory.
        visual_BTD, audio_BTD = visual_memory, audio_memory
        if self.visual_relation is not None:
            visual_BTD = self.visual_relation(visual_query, audio_memory if self.hears else visual_memory)
        if self.audio_relation is not None:
            audio_BTD = self.audio_relation(audio_query, visual_memory if self.sees else audio_memory)

        fused_BTD = self._fuse(visual_BTD, audio_BTD)
        event_logits_BT = self.event_head(fused_BTD).squeeze(-1)
        return Outputs(event_logits_BT, self.class_head(fused_BTD.amax(1)))

    def _fuse(self, visual_BTD: Tensor | None, audio_BTD: Tensor | None) -> Tensor:
        if visual_BTD is None or audio_BTD is None:
            alone = audio_BTD if visual_BTD is None else visual_BTD
            assert alone is not None
            return alone
        if self.interaction is None:
            return (visual_BTD + audio_BTD) / 2
        fused: Tensor = self.interaction(visual_BTD, audio_BTD)
        return fused

    def _check(self, visual: Tensor, audio: Tensor) -> None:
        config = self.config
        if visual.dim() != 5 or visual.shape[-1] != config.visual_features:
            raise ValueError(f"visual: expected (B, T, H, W, {config.visual_features}), found {tuple(visual.shape)}")
        if audio.dim() != 3 or audio.shape[-1] != config.audio_features:
            raise ValueError(f"audio: expected (B, T, {config.audio_features}), found {tuple(audio.shape)}")
        if visual.shape[:2] != audio.shape[:2]:
            raise ValueError(f"visual {tuple(visual.shape)} and audio {tuple(audio.shape)} differ in B or T")


class SpatialChannelAttention(nn.Module):
    """Audio-guided attention over the channels, then over the cells, of each segment (section 3.3 of the paper).

    Both paths are reordered where that changes nothing but rounding: the audio factor of the channel path does not
    depend on the cell, so the average over cells comes first; the spatial score is a dot product of cell and sound.
    """

    def __init__(self, config: ModelConfig) -> None:
        super().__init__()
        channels, width = config.visual_features, config.spatial_width
        self.audio_channel = Linear(config.audio_features, channels)
        self.visual_channel = Linear(channels, channels)
        self.bottleneck = Linear(channels, config.bottleneck)
        self.gate = Linear(config.bottleneck, channels)
        self.visual_spatial = Linear(channels, width)
        self.audio_spatial = Linear(config.audio_features, width)
        self.score = Linear(width, 1)

    def forward(self, cells_BTSC: Tensor, audio_BTA: Tensor) -> Tensor:
        """(B, T, S, C) cells and (B, T, A) audio -> (B, T, C), one vector a segment."""
        cells_NSC, audio_NA = cells_BTSC.flatten(0, 1), audio_BTA.flatten(0, 1)
        seen_NC = self.visual_channel.relu(cells_NSC).sum(1) / cells_NSC.shape[1]
        guided_NC = self.audio_channel.relu(audio_NA) * seen_NC
        gate_NC = 1 + torch.sigmoid(self.gate(self.bottleneck.relu(guided_NC)))

        seen_NSK = self.visual_spatial.relu(cells_NSC * gate_NC.unsqueeze(1))
        heard_NK = self.audio_spatial.relu(audio_NA) * self.score.weight[0]
        score_NS = torch.bmm(seen_NSK, heard_NK.unsqueeze(2)).squeeze(2) + self.score.bias
        weight_NS = torch.tanh(score_NS).softmax(1)
        # The weighted sum of the gated cells.
        seen_NC = torch.bmm(weight_NS.unsqueeze(1), cells_NSC).squeeze(1) * gate_NC
        out: Tensor = seen_NC.unflatten(0, audio_BTA.shape[:2])
        return out


class MultiHeadAttention(nn.Module):
    """Scaled dot-product attention with projections stacked query, key, value, and dropout on the weights."""

    def __init__(self, width: int, heads: int, dropout: float) -> None:
        super().__init__()
        self.heads = heads
        self.dropout = Dropout(dropout)
        self.in_proj_weight = nn.Parameter(torch.empty(3 * width, width))
        self.in_proj_bias = nn.Parameter(torch.zeros(3 * width))
        self.out_proj = Linear(width, width)
        # The initial values of torch.nn.MultiheadAttention, with which the published numbers were made.
        nn.init.xavier_uniform_(self.in_proj_weight)
        nn.init.zeros_(self.out_proj.bias)

    def forward(self, query_BTD: Tensor, memory_BUD: Tensor) -> Tensor:
        """(B, T, D) queries over (B, U, D) keys and values -> (B, T, D)."""
        query, key, value = (self._split(x) for x in self._project(query_BTD, memory_BUD))
        # Written out: with some ten keys a fused kernel gains nothing, and this one is the same in every precision.
        weight_BhTU = (query * query.shape[-1] ** -0.5 @ key.transpose(-1, -2)).softmax(-1)
        attended_BhTd = self.dropout(weight_BhTU) @ value
        out: Tensor = self.out_proj(attended_BhTd.transpose(1, 2).flatten(2))
        return out

    def _project(self, query_BTD: Tensor, memory_BUD: Tensor) -> tuple[Tensor, ...]:
        weight, bias = self.in_proj_weight, self.in_proj_bias
        if query_BTD is memory_BUD:
            return F.linear(query_BTD, weight, bias).chunk(3, -1)
        width = query_BTD.shape[-1]
        weight_q, weight_kv = weight.split([width, 2 * width])
        bias_q, bias_kv = bias.split([width, 2 * width])
        return F.linear(query_BTD, weight_q, bias_q), *F.linear(memory_BUD, weight_kv, bias_kv).chunk(2, -1)

    def _split(self, x_BTD: Tensor) -> Tensor:
        heads_BThd: Tensor = x_BTD.unflatten(-1, (self.heads, -1))
        return heads_BThd.transpose(1, 2)


class RelationLayer(nn.Module):
    """Post-norm transformer layer: attention, add & norm, feed-forward, add & norm.

    With the input as its own memory it is an encoder layer; with another memory the published decoder layer, which
    has no self-attention.
    """

    def __init__(self, config: ModelConfig) -> None:
        super().__init__()
        self.attention = MultiHeadAttention(config.width, config.heads, config.dropout)
        self.linear1 = Linear(config.width, config.feedforward)
        self.linear2 = Linear(config.feedforward, config.width)
        self.norm1 = nn.LayerNorm(config.width)
        self.norm2 = nn.LayerNorm(config.width)
        self.dropout = Dropout(config.dropout)

    def forward(self, x_BTD: Tensor, memory_BUD: Tensor) -> Tensor:
        """(B, T, D) attending to (B, U, D) -> (B, T, D)."""
        x_BTD = self.norm1(x_BTD + self.dropout(self.attention(x_BTD, memory_BUD)))
        hidden = self.linear1.relu(x_BTD, self.dropout)
        out: Tensor = self.norm2(x_BTD + self.dropout(self.linear2(hidden)))
        return out


class TemporalRelation(nn.Module):
    """Internal temporal relation of one modality (section 3.4): Linear to D, then encoder layers."""

    def __init__(self, features: int, config: ModelConfig) -> None:
        super().__init__()
        self.project = Linear(features, config.width)
        # All layers begin as copies of one, as published.
        layer = RelationLayer(config)
        self.layers = nn.ModuleList([copy.deepcopy(layer) for _ in range(config.layers)])

    def forward(self, x_BTF: Tensor) -> Tensor:
        """(B, T, features) -> (B, T, D)."""
        x_BTD: Tensor = self.project(x_BTF)
        for layer in self.layers:
            x_BTD = layer(x_BTD, x_BTD)
        return x_BTD


class CrossModalRelation(nn.Module):
    """Cross-modal relation (section 3.4): a modality attends over time to the other's memory and to itself."""

    def __init__(self, features: int, config: ModelConfig) -> None:
        super().__init__()
        self.project = Linear(features, config.width)
        self.layer = RelationLayer(config)

    def forward(self, query_BTF: Tensor, memory_BTD: Tensor) -> Tensor:
        """(B, T, features) queries, (B, T, D) memory of the other modality -> (B, T, D)."""
        query_BTD = self.project(query_BTF)
        out: Tensor = self.layer(query_BTD, torch.cat([memory_BTD, query_BTD], dim=1))
        return out


class Interaction(nn.Module):
    """Audio-visual interaction (section 3.5): the product of both streams attends to both."""

    def __init__(self, config: ModelConfig) -> None:
        super().__init__()
        self.attention = MultiHeadAttention(config.width, config.effective_interaction_heads, config.dropout)
        self.norm = nn.LayerNorm(config.width)
        self.dropout = Dropout(config.dropout)

    def forward(self, visual_BTD: Tensor, audio_BTD: Tensor) -> Tensor:
        """Two (B, T, D) streams -> one (B, T, D)."""
        product_BTD = visual_BTD * audio_BTD
        attended_BTD = self.attention(product_BTD, torch.cat([audio_BTD, visual_BTD], dim=1))
        out: Tensor = self.norm(product_BTD + self.dropout(attended_BTD))
        return out
