"""Mixup and cutmix."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
import torch
from timm.data.mixup import Mixup, cutmix_bbox_and_lam, mixup_target
from torch import Tensor

from pipeline.augment.steps import send
from utils import UsageError


class BatchedMixup(Mixup):
    """timm's Mixup, which mixes each image with its mirror in the order of the batch.

    The modes 'pair' and 'elem', which timm does sample by sample, are computed on the whole batch. Random numbers are
    NumPy's global ones, on the host; with the same state they are timm's, except for `cutmix_minmax` in these two
    modes, where only the distribution is.

    Raises:
        UsageError: where nothing is on, or for an unknown mode.
    """

    def __init__(self, *, cutmix_minmax: Sequence[float] | None = None, **settings: Any) -> None:
        if cutmix_minmax is not None and len(cutmix_minmax) != 2:
            raise UsageError('--cutmix-minmax takes two numbers')
        super().__init__(cutmix_minmax=cutmix_minmax, **settings)
        if self.mode not in ('batch', 'pair', 'elem'):
            raise UsageError(f'--mixup-mode {self.mode}: known are batch, pair and elem')
        if self.mixup_alpha <= 0 and self.cutmix_alpha <= 0:
            raise UsageError('mixing needs --mixup or --cutmix above 0, or --cutmix-minmax')

    def __call__(self, images: Tensor, targets: Tensor) -> tuple[Tensor, Tensor]:
        """Mixes a batch of an even number of images, in place where the mode is 'batch'.

        Args:
            images: float (B, 3, H, W).
            targets: class indices (B,), on the same device.

        Returns:
            Images, and float32 targets (B, classes), each of which sums to 1.
        """
        if len(images) % 2:
            raise ValueError(f'mixing needs an even number of images, not {len(images)}')
        if self.mode == 'batch':
            return super().__call__(images, targets)
        images, lam = self._mix_samples(images)
        return images, mixup_target(targets, self.num_classes, lam, self.label_smoothing)

    def _mix_samples(self, images: Tensor) -> tuple[Tensor, Tensor]:
        count = len(images) if self.mode == 'elem' else len(images) // 2
        lams, cut = self._params_per_elem(count)
        cut &= lams != 1
        boxes = np.zeros((count, 4), np.int64)
        shares = np.where(cut, 1, lams).astype(np.float32)  # of the image itself, outside of boxes
        boxes[cut], lams[cut] = self._boxes(lams[cut], images)
        if self.mode == 'pair':
            lams, shares, boxes = (np.concatenate((a, a[::-1])) for a in (lams, shares, boxes))

        lam, share, box = send([lams, shares, boxes], images.device)
        share = share.to(images.dtype)[:, None, None, None]
        mirrored = images.flip(0)
        mixed = images * share + mirrored * (1 - share)
        top, bottom, left, right = box[:, :, None].unbind(1)
        y = torch.arange(images.shape[2], device=images.device)
        x = torch.arange(images.shape[3], device=images.device)
        rows, columns = (y >= top) & (y < bottom), (x >= left) & (x < right)
        inside = (rows[:, :, None] & columns[:, None, :])[:, None]  # (B, 1, H, W)
        return torch.where(inside, mirrored, mixed), lam.to(images.dtype)[:, None]

    def _boxes(self, lams: np.ndarray, images: Tensor) -> tuple[np.ndarray, np.ndarray]:
        """Boxes for cutmix (k, 4) as top, bottom, left, right, and the lams (k,) that go with them."""
        if self.cutmix_minmax is not None:
            edges, lams = cutmix_bbox_and_lam(images.shape, lams, self.cutmix_minmax, count=len(lams))
            return np.stack(edges, axis=1), lams
        size = np.array(images.shape[2:])
        cut = np.trunc(size.astype(lams.dtype) * np.sqrt(1 - lams)[:, None]).astype(np.int64)
        centre = np.random.randint(0, np.broadcast_to(size, cut.shape))  # y, x of each sample in turn, as timm
        start, end = np.clip(centre - cut // 2, 0, size), np.clip(centre + (cut + 1) // 2, 0, size)
        if self.correct_lam:
            lams = 1 - (end - start).prod(1) / float(size.prod())
        return np.stack((start, end), axis=2).reshape(-1, 4), lams
