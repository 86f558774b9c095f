"""Training losses."""

from __future__ import annotations

from timm.loss import LabelSmoothingCrossEntropy, SoftTargetCrossEntropy
from torch import nn


def create_criterion(*, mixed: bool, smoothing: float) -> nn.Module:
    """The loss of logits (B, num_classes), averaged over the batch.

    Args:
        mixed: targets are distributions over the classes (B, num_classes), as mixup makes them, already smoothed;
            otherwise they are class indices (B,).
        smoothing: the share of each target that is spread over all classes, where mixup does not do it.
    """
    if mixed:
        return SoftTargetCrossEntropy()
    return LabelSmoothingCrossEntropy(smoothing) if smoothing > 0.0 else nn.CrossEntropyLoss()
