"""The network: CMRAN of Xu et al. (ACM Multimedia 2020), as its released code computes it.

Shape letters in names and docstrings:
    B videos    T segments    N = B * T segments of a batch    H x W grid of visual cells    S = H * W cells
    C visual channels    A audio features    F features of either modality    D width    E width of the spatial scores
    U keys of an attention    h heads    d = D / h    K class logits (28 in full mode, 29 in weak mode)

The network has only weights on which an output depends: 9,509,150 in full mode at the published sizes. `Linear`,
`Dropout` and `linear_relu` are torch's operations; see cmran.accel.cpu_layers.
"""

import copy
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from cmran.accel.cpu_layers import Dropout, Linear, linear_relu
from cmran.config import ModelConfig


class Outputs(NamedTuple):
    """The outputs of the network for a batch."""

    event_logits: Tensor
    """(B, T). Above 0: the segment contains an event."""
    class_logits: Tensor
    """(B, K), for the whole video. K is 28 in full mode and 29 in weak mode."""


class CMRAN(nn.Module):
    """Cross-Modal Relation-Aware Network.

    There is no positional encoding: the network is equivariant to permutations in time, and T is free.

    Args:
        config: Sizes, mode and ablations.
    """

    def __init__(self, config: ModelConfig) -> None:
        super().__init__()
        self.config = config
        self.has_visual, self.has_audio = not config.audio_only, not config.visual_only
        both = self.has_visual and self.has_audio

        if self.has_visual:
            self.visual_fc = Linear(config.visual_features, config.visual_features)
            self.visual_dropout = Dropout(config.visual_dropout)
            self.visual_temporal = TemporalRelation(config.visual_features, config)
        if self.has_audio:
            self.audio_temporal = TemporalRelation(config.audio_features, config)
        self.attention = SpatialChannelAttention(config) if both and not config.no_spatial_channel_attention else None

        # Without cross-modal relations the outputs of the temporal relations are fused.
        self.visual_relation = self.audio_relation = None
        if not config.no_cross_modal_relation:
            if self.has_visual:
                self.visual_relation = CrossModalRelation(config.visual_features, config)
            if self.has_audio:
                self.audio_relation = CrossModalRelation(config.audio_features, config)
        self.interaction = Interaction(config) if both and not config.no_interaction else None

        self.event_head = Linear(config.width, 1)
        self.class_head = Linear(config.width, config.classes)

    def forward(self, visual_BTHWC: Tensor, audio_BTA: Tensor) -> Outputs:
        """Compute the event and class logits of a batch of videos.

        Args:
            visual_BTHWC: Non-negative feature maps, (B, T, H, W, C), with any B, T and H * W of at least 1.
            audio_BTA: Audio embeddings, (B, T, A).

        Returns:
            The event logits (B, T) and class logits (B, K).

        Raises:
            ValueError: A shape does not fit the configuration, or the two inputs do not fit each other.
        """
        self._check(visual_BTHWC, audio_BTA)
        visual_query = audio_query = visual_memory = audio_memory = None

        # Audio-guided spatial-channel attention, then the internal temporal relation of each modality.
        if self.has_visual:
            cells_BTSC = linear_relu(self.visual_fc, visual_BTHWC.flatten(2, 3), self.visual_dropout)
            visual_query = cells_BTSC.mean(2) if self.attention is None else self.attention(cells_BTSC, audio_BTA)
            visual_memory = self.visual_temporal(visual_query)
        if self.has_audio:
            audio_query = audio_BTA
            audio_memory = self.audio_temporal(audio_BTA)

        # Cross-modal relation. A single modality attends to its own memory.
        visual_BTD, audio_BTD = visual_memory, audio_memory
        if self.visual_relation is not None:
            visual_BTD = self.visual_relation(visual_query, audio_memory if self.has_audio else visual_memory)
        if self.audio_relation is not None:
            audio_BTD = self.audio_relation(audio_query, visual_memory if self.has_visual else audio_memory)

        # Audio-visual interaction, then one event logit per segment and class logits for the whole video.
        fused_BTD = self._fuse(visual_BTD, audio_BTD)
        event_logits_BT = self.event_head(fused_BTD).squeeze(-1)
        return Outputs(event_logits_BT, self.class_head(fused_BTD.amax(1)))

    def _fuse(self, visual_BTD: Tensor | None, audio_BTD: Tensor | None) -> Tensor:
        if visual_BTD is None or audio_BTD is None:
            single = audio_BTD if visual_BTD is None else visual_BTD
            assert single is not None
            return single
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

    Two operations are reordered, which changes only the rounding. The audio factor of the channel attention does not
    depend on the cell, so the average over the cells is computed first. The spatial score is computed as a dot product
    of cell and audio.
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
        """Map (B, T, S, C) cells and (B, T, A) audio to (B, T, C), one vector per segment."""
        cells_NSC, audio_NA = cells_BTSC.flatten(0, 1), audio_BTA.flatten(0, 1)
        visual_NC = linear_relu(self.visual_channel, cells_NSC).sum(1) / cells_NSC.shape[1]
        guided_NC = linear_relu(self.audio_channel, audio_NA) * visual_NC
        gate_NC = 1 + torch.sigmoid(self.gate(linear_relu(self.bottleneck, guided_NC)))

        visual_NSE = linear_relu(self.visual_spatial, cells_NSC * gate_NC.unsqueeze(1))
        audio_NE = linear_relu(self.audio_spatial, audio_NA) * self.score.weight[0]
        score_NS = torch.bmm(visual_NSE, audio_NE.unsqueeze(2)).squeeze(2) + self.score.bias
        weight_NS = torch.tanh(score_NS).softmax(1)
        # The weighted sum of the gated cells.
        attended_NC = torch.bmm(weight_NS.unsqueeze(1), cells_NSC).squeeze(1) * gate_NC
        out: Tensor = attended_NC.unflatten(0, audio_BTA.shape[:2])
        return out


class MultiHeadAttention(nn.Module):
    """Scaled dot-product attention with dropout on the weights. The projections are stacked: query, key, value."""

    def __init__(self, width: int, heads: int, dropout: float) -> None:
        super().__init__()
        self.heads = heads
        self.dropout = Dropout(dropout)
        self.in_proj_weight = nn.Parameter(torch.empty(3 * width, width))
        self.in_proj_bias = nn.Parameter(torch.zeros(3 * width))
        self.out_proj = Linear(width, width)
        # The initialization of torch.nn.MultiheadAttention, which the published code uses.
        nn.init.xavier_uniform_(self.in_proj_weight)
        nn.init.zeros_(self.out_proj.bias)

    def forward(self, query_BTD: Tensor, memory_BUD: Tensor) -> Tensor:
        """Let (B, T, D) queries attend to (B, U, D) keys and values; return (B, T, D)."""
        query, key, value = (self._split(x) for x in self._project(query_BTD, memory_BUD))
        # Written out: a fused kernel is no faster with about ten keys, and this form is the same in every precision.
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

    If the memory is the input it is an encoder layer. With another memory it is the published decoder layer, which has
    no self-attention.
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
        """Let (B, T, D) attend to (B, U, D); return (B, T, D)."""
        x_BTD = self.norm1(x_BTD + self.dropout(self.attention(x_BTD, memory_BUD)))
        hidden = linear_relu(self.linear1, x_BTD, self.dropout)
        out: Tensor = self.norm2(x_BTD + self.dropout(self.linear2(hidden)))
        return out


class TemporalRelation(nn.Module):
    """Internal temporal relation of one modality (section 3.4): a linear layer to width D, then encoder layers."""

    def __init__(self, features: int, config: ModelConfig) -> None:
        super().__init__()
        self.project = Linear(features, config.width)
        # All layers start as copies of one, as published.
        layer = RelationLayer(config)
        self.layers = nn.ModuleList([copy.deepcopy(layer) for _ in range(config.layers)])

    def forward(self, x_BTF: Tensor) -> Tensor:
        """Map (B, T, F) to (B, T, D)."""
        x_BTD: Tensor = self.project(x_BTF)
        for layer in self.layers:
            x_BTD = layer(x_BTD, x_BTD)
        return x_BTD


class CrossModalRelation(nn.Module):
    """Cross-modal relation (section 3.4): one modality attends over time to the memory of the other and to itself."""

    def __init__(self, features: int, config: ModelConfig) -> None:
        super().__init__()
        self.project = Linear(features, config.width)
        self.layer = RelationLayer(config)

    def forward(self, query_BTF: Tensor, memory_BTD: Tensor) -> Tensor:
        """Map (B, T, F) queries and the (B, T, D) memory of the other modality to (B, T, D)."""
        query_BTD = self.project(query_BTF)
        out: Tensor = self.layer(query_BTD, torch.cat([memory_BTD, query_BTD], dim=1))
        return out


class Interaction(nn.Module):
    """Audio-visual interaction (section 3.5): the product of the two modalities attends to both of them."""

    def __init__(self, config: ModelConfig) -> None:
        super().__init__()
        self.attention = MultiHeadAttention(config.width, config.effective_interaction_heads, config.dropout)
        self.norm = nn.LayerNorm(config.width)
        self.dropout = Dropout(config.dropout)

    def forward(self, visual_BTD: Tensor, audio_BTD: Tensor) -> Tensor:
        """Fuse the two modalities, (B, T, D) each, into (B, T, D)."""
        product_BTD = visual_BTD * audio_BTD
        attended_BTD = self.attention(product_BTD, torch.cat([audio_BTD, visual_BTD], dim=1))
        out: Tensor = self.norm(product_BTD + self.dropout(attended_BTD))
        return out
