"""The pipeline on a batch: the host plans, the device works."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from pipeline.augment.erasing import Erasing, erase, plan_erasing
from pipeline.augment.pixels import apply_step
from pipeline.augment.policy import OPS, plan_jitter, plan_ops, read_policy
from pipeline.augment.random_numbers import Purpose, sample_keys, uniforms
from pipeline.augment.steps import Size, Step, make_step, send
from pipeline.transforms import PADDING, Augmentation, normalization
from utils import UsageError


def apply_op(
    images: Tensor,
    name: str,
    argument: np.ndarray,
    *,
    cubic: bool = True,
    fill: Sequence[int] = (128, 128, 128),
    exact: bool = False,
) -> Tensor:
    """One op of timm's table on each image of a batch, uint8 (B, 3, H, W).

    Args:
        name: of `OPS`.
        argument: (B,), what timm's function of that name takes; any numbers where it takes none.
        cubic, fill, exact: as for `apply_step`.
    """
    step = make_step(OPS[name].kind, np.arange(len(images)), argument, (images.shape[2], images.shape[3]), cubic=cubic)
    index, values, colour = send([step.index, step.values, np.array(fill, np.uint8)], images.device)
    out = images.clone()
    apply_step(out, step.kind, index, values, colour, cubic=cubic, exact=exact)
    return out


@dataclass
class Plan:
    """What is to be done with a batch, on the host.

    `top` and `left` (B,) are the crop's corner in the padded image; `steps` hold a list for each layer.
    """

    top: np.ndarray
    left: np.ndarray
    flip: np.ndarray
    steps: list[list[Step]]
    erasing: Erasing | None


class BatchedAugment:
    """The transform of DeiT's recipe for training, from uint8 images to normalised tensors.

    In this order, as timm has it: crop with 4 pixels of zeros on each side (of images up to 32 px; larger ones come
    cropped), flip, RandAugment, colour jitter, normalisation, random erasing. Each sample has its own random numbers,
    those of (seed, epoch, image, repeat).

    Args:
        settings: `no_aug` means nothing here.
        seed: the run's.
        exact: the same bits as timm's pipeline on Pillow gives for the same parameters, in float64; otherwise in
            float32, where a pixel of a geometric op may differ by a grey level.

    Raises:
        UsageError: for a policy or an op that is not covered.
    """

    def __init__(self, settings: Augmentation, *, seed: int, exact: bool = False) -> None:
        self.settings = settings
        self.seed = seed
        self.exact = exact
        mean, std = normalization(settings.channels)
        self._normalization = np.array([[255.0] * len(mean), mean, std])[:, :, None, None]
        self._fill = np.array([round(255 * value) for value in mean] * (3 // len(mean)), np.uint8)  # of outside pixels
        policy = settings.auto_augment
        self.policy = read_policy(policy) if policy else None
        # timm turns colour jitter off beside RandAugment, except beside 3-Augment, which it looks for by these letters.
        self.jitter = settings.color_jitter if not policy or '3a' in policy else 0.0

    def plan(self, draws: np.ndarray, size: Size) -> Plan:
        """Draws the random numbers of a batch, for draws (B, 3) of images of a size."""
        settings = self.settings
        keys = sample_keys(self.seed, draws)
        corner = np.floor(uniforms(keys, Purpose.CROP, 2) * (2 * PADDING + 1)).astype(np.int64)
        flip = uniforms(keys, Purpose.FLIP, 1)[:, 0] < settings.hflip
        steps: list[list[Step]] = []
        if self.policy is not None:
            _, _, steps = plan_ops(self.policy, keys, size, interpolation=settings.interpolation)
        if self.jitter > 0:
            steps += plan_jitter(self.jitter, keys, size)
        erasing = None
        if settings.re_prob > 0:
            start = len(keys) // 2 if settings.resplit else 0
            erasing = plan_erasing(
                keys, size, prob=settings.re_prob, mode=settings.re_mode, count=settings.re_count, start=start
            )
        return Plan(corner[:, 0], corner[:, 1], flip, steps, erasing)

    def __call__(self, images: Tensor, draws: Tensor) -> Tensor:
        """Augments a batch where it lies, without a wait for the device.

        Args:
            images: uint8 (B, C, H, W), C of 3 or 1; H and W are `input_size` up to 32 px.
            draws: int64 (B, 3) on the host: image, epoch, repeat, as in `samplers.Draw`.

        Returns:
            float32 (B, C, H, W), normalised.
        """
        device, (height, width), expected = images.device, images.shape[2:], self.settings.input_size
        if self.settings.is_small and (height, width) != (expected, expected):
            raise ValueError(f'images of {height}x{width} pixels, {expected}x{expected} are expected')
        if self.exact and device.type == 'mps':
            raise UsageError('--augment-exact needs float64, which MPS does not have')
        channels = images.shape[1]
        images = images.expand(-1, 3, -1, -1)  # grey as three equal channels, which every op leaves equal
        plan = self.plan(draws.numpy(), (height, width))
        arrays = [self._fill, self._normalization, plan.top, plan.left, plan.flip.astype(np.int64)]
        arrays += [array for steps in plan.steps for step in steps for array in (step.index, step.values)]
        if plan.erasing is not None:
            arrays += [plan.erasing.boxes, plan.erasing.keys, plan.erasing.colours]
        sent = iter(send(arrays, device))
        fill, (divisor, mean, std) = next(sent), next(sent).float()

        images = self._crop_and_flip(images, next(sent), next(sent), next(sent))
        for steps in plan.steps:
            for step in steps:
                apply_step(images, step.kind, next(sent), next(sent), fill, cubic=step.cubic, exact=self.exact)
        out = images.float()
        # A quotient by a tensor is the true one on every device, as torchvision's on the host is.
        out.div_(divisor).sub_(mean).div_(std) if self.exact else out.sub_(mean * divisor).mul_(1 / (std * divisor))
        if plan.erasing is not None:
            erase(out, plan.erasing, *sent, noise=self.settings.re_mode == 'pixel')
        return out[:, :channels].contiguous()

    def _crop_and_flip(self, images: Tensor, top: Tensor, left: Tensor, flip: Tensor) -> Tensor:
        """A new tensor, whatever is done."""
        height, width = images.shape[2:]
        if not self.settings.is_small:
            return torch.where(flip.bool()[:, None, None, None], images.flip(3), images).contiguous()
        padded = F.pad(images, (PADDING,) * 4)
        y = top[:, None] + torch.arange(height, device=images.device)
        x = torch.arange(width, device=images.device)
        x = left[:, None] + torch.where(flip.bool()[:, None], width - 1 - x, x)
        place = (y * padded.shape[3])[:, :, None] + x[:, None, :]  # (B, H, W)
        return padded.flatten(2).gather(2, place.flatten(1)[:, None].expand(-1, 3, -1)).view(images.shape)
