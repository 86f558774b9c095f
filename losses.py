"""Training losses."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, Literal

import numpy as np
import torch
import torch.nn.functional as F
from timm.loss import LabelSmoothingCrossEntropy, SoftTargetCrossEntropy
from torch import Tensor, nn


def balanced_class_weights(targets: np.ndarray, num_classes: int) -> Tensor:
    """Weights (num_classes,) by inverse frequency, whose mean over the images is 1; 1 for a class without images.

    Args:
        targets: class indices (n,).
    """
    counts = np.bincount(targets, minlength=num_classes)
    weights = len(targets) / (np.count_nonzero(counts) * np.maximum(counts, 1))
    return torch.tensor(np.where(counts > 0, weights, 1.0), dtype=torch.float32)


def create_criterion(*, mixed: bool, smoothing: float, class_weights: Tensor | None = None) -> nn.Module:
    """The loss of logits (B, num_classes), averaged over the batch.

    Args:
        mixed: targets are distributions (B, num_classes), as mixup makes and smooths them, not class indices (B,).
        smoothing: of class indices.
        class_weights: (num_classes,), by PyTorch's rules.
    """
    if class_weights is not None:
        return nn.CrossEntropyLoss(class_weights, label_smoothing=0.0 if mixed else smoothing)
    if mixed:
        return SoftTargetCrossEntropy()
    return LabelSmoothingCrossEntropy(smoothing) if smoothing > 0.0 else nn.CrossEntropyLoss()


class Teacher(nn.Module):
    """A trained model that gives logits for a student's batches, at its own image size and normalisation.

    Stays in eval mode and makes no gradients.

    Args:
        model: from images (B, 3, S, S) to logits; S is the `input_size`, and batches of another size are resized.
        mean, std: of the channels, that the model was trained with.
        student_mean, student_std: those that the batches are normalised with.
    """

    scale: Tensor
    shift: Tensor

    def __init__(
        self,
        model: nn.Module,
        *,
        input_size: int,
        mean: Sequence[float],
        std: Sequence[float],
        student_mean: Sequence[float],
        student_std: Sequence[float],
    ) -> None:
        super().__init__()
        self.model = model.requires_grad_(False)
        self.input_size = input_size
        means, stds = (torch.tensor(pair)[..., None, None] for pair in ((student_mean, mean), (student_std, std)))
        self.register_buffer('scale', stds[0] / stds[1])  # (3, 1, 1)
        self.register_buffer('shift', (means[0] - means[1]) / stds[1])
        self.same_normalisation = tuple(mean) == tuple(student_mean) and tuple(std) == tuple(student_std)
        self.train(False)

    def train(self, mode: bool = True) -> Teacher:
        """Stays in eval mode, whatever the student does."""
        return super().train(False)

    @torch.no_grad()
    def forward(self, images: Tensor) -> Tensor:
        if images.shape[-2:] != (self.input_size, self.input_size):
            images = F.interpolate(images.float(), self.input_size, mode='bicubic', antialias=True)
        if not self.same_normalisation:
            images = images * self.scale + self.shift
        return self.model(images)


class DistillationLoss(nn.Module):
    """Cross-entropy of the class head, and the distance of the distillation head from a teacher. Touvron et al. 2021.

    loss = (1 - alpha) * base_criterion(class logits, targets) + alpha * distillation, where distillation is for 'soft'
    tau^2 / (B * num_classes) * KL(teacher at temperature tau, student at tau), and for 'hard' the cross-entropy of the
    distillation logits with the teacher's decision.

    Args:
        base_criterion: from logits and targets to a mean loss.
        distillation_type: 'none' for the base alone, 'soft' or 'hard'.
        alpha: the weight of distillation.
        tau: the temperature of 'soft'.
    """

    def __init__(
        self,
        base_criterion: nn.Module,
        *,
        distillation_type: Literal['none', 'soft', 'hard'],
        alpha: float = 0.5,
        tau: float = 1.0,
    ) -> None:
        super().__init__()
        self.base_criterion = base_criterion
        self.distillation_type = distillation_type
        self.alpha = alpha
        self.tau = tau

    def forward(self, outputs: Any, targets: Tensor, teacher_logits: Tensor | None = None) -> Tensor:
        """The loss of a batch.

        Args:
            outputs: the logits (B, num_classes), or a pair of them: class and distillation head.
            targets: as `base_criterion` takes them.

        Raises:
            ValueError: if distillation lacks the second logits or the teacher's.
        """
        outputs, outputs_dist = (outputs, None) if isinstance(outputs, Tensor) else outputs
        base_loss = self.base_criterion(outputs, targets)
        if self.distillation_type == 'none':
            return base_loss
        if outputs_dist is None or teacher_logits is None:
            raise ValueError('distillation needs a student with two heads and the logits of a teacher')
        if self.distillation_type == 'soft':
            distillation = F.kl_div(
                F.log_softmax(outputs_dist / self.tau, dim=1),
                F.log_softmax(teacher_logits / self.tau, dim=1),
                reduction='sum',
                log_target=True,
            ) * (self.tau**2 / outputs_dist.numel())
        else:
            distillation = F.cross_entropy(outputs_dist, teacher_logits.argmax(dim=1))
        return base_loss * (1 - self.alpha) + distillation * self.alpha
