"""The two published losses and the prediction rule.

Shape letters as in cmran.model.network.
"""

import torch
import torch.nn.functional as F
from torch import Tensor

from cmran.categories import BACKGROUND
from cmran.config import Mode
from cmran.model.network import Outputs


def compute_loss(outputs: Outputs, labels: Tensor, mode: Mode) -> Tensor:
    """Compute the published loss of a batch, averaged over the batch.

    Full mode: binary cross-entropy of the event logits plus cross-entropy of the class logits. The target category of
    a video is the largest category of its segments. A video without an event counts as category 0, because the 28
    categories of a background segment are all zero.

    Weak mode: multi-label soft-margin loss of `video_scores`, to which softmax has been applied already.

    Args:
        outputs: Outputs of the network.
        labels: One-hot labels of the segments, (B, T, 29), in full mode; labels of the videos, (B, 29), in weak mode.
        mode: The mode of the network.

    Returns:
        The loss, a scalar.

    Raises:
        ValueError: The shape of `labels` does not fit the mode.
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
    """Compute the scores of a video in weak mode: the softmax of the strongest gated segment of each class.

    Returns:
        (B, 29), each row summing to 1.
    """
    gated_BTK = torch.sigmoid(outputs.event_logits).unsqueeze(-1) * outputs.class_logits.unsqueeze(1)
    return gated_BTK.amax(1).softmax(-1)


def predict_segments(outputs: Outputs) -> Tensor:
    """Label the segments: the video's category if sigmoid(event logit) > 0.5, else background.

    In weak mode the category of the video may itself be background.

    Returns:
        (B, T) int64, labels 0 to 28.
    """
    category_B1 = outputs.class_logits.argmax(-1, keepdim=True)
    background = torch.full_like(category_B1, BACKGROUND)
    return torch.where(torch.sigmoid(outputs.event_logits) > 0.5, category_B1, background)
