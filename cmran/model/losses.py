"""The two published losses and the one prediction rule. Shape letters as in cmran.model."""

import torch
import torch.nn.functional as F
from torch import Tensor

from cmran.categories import BACKGROUND
from cmran.config import Mode
from cmran.model.network import Outputs


def compute_loss(outputs: Outputs, labels: Tensor, mode: Mode) -> Tensor:
    """The published loss of a batch, averaged over it: a scalar.

    full: labels (B, T, 29), one-hot segments. Binary cross-entropy of the event logits plus cross-entropy of the class
    logits against the video's category, which is the largest category of its segments (0 in a video without an event,
    since a background segment's row is zero over the 28 categories).
    weak: labels (B, 29), video labels. Multi-label soft-margin loss on `video_scores`, which are softmaxed already.

    Raises ValueError where the labels' shape does not fit the mode.
    """
    B, T = outputs.event_logits.shape
    expected = (B, T, BACKGROUND + 1) if mode == "full" else (B, BACKGROUND + 1)
    if tuple(labels.shape) != expected:
        raise ValueError(f"labels: expected {expected} in {mode} mode, found {tuple(labels.shape)}")
    if mode == "weak":
        return F.multilabel_soft_margin_loss(video_scores(outputs), labels.to(outputs.class_logits.dtype))
    labels = labels.to(outputs.event_logits.dtype)
    foreground_BTK = labels[..., :BACKGROUND]
    is_event_BT = 1 - labels[..., BACKGROUND]
    category_B = foreground_BTK.argmax(-1).amax(-1)
    event_loss = F.binary_cross_entropy_with_logits(outputs.event_logits, is_event_BT)
    return event_loss + F.cross_entropy(outputs.class_logits, category_B)


def video_scores(outputs: Outputs) -> Tensor:
    """Weak mode's scores of a video, (B, 29), each row summing to 1: softmax of the strongest gated segment."""
    gated_BTK = torch.sigmoid(outputs.event_logits).unsqueeze(-1) * outputs.class_logits.unsqueeze(1)
    return gated_BTK.amax(1).softmax(-1)


def predict_segments(outputs: Outputs) -> Tensor:
    """Labels of the segments, (B, T) int64: background unless sigmoid(event logit) > 0.5, else the video's category.

    In weak mode the 29 wide class logits may themselves say background.
    """
    category_B1 = outputs.class_logits.argmax(-1, keepdim=True)
    background = torch.full_like(category_B1, BACKGROUND)
    return torch.where(torch.sigmoid(outputs.event_logits) > 0.5, category_B1, background)
