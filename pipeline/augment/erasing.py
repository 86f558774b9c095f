"""Random erasing: boxes that the host draws, and the device fills."""

from __future__ import annotations

import math
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from pipeline.augment.random_numbers import Purpose, device_normals, hashes, normals, uniforms
from pipeline.augment.steps import Size


@dataclass
class Erasing:
    """Boxes for random erasing, in the order in which they are drawn: sample, top, left, height, width (R, 5)."""

    boxes: np.ndarray
    keys: np.ndarray  # int64 (R,), for noise
    colours: np.ndarray  # (R, 3), where a box has one colour
    rounds: list[int]  # boxes of each round; those of one round do not overlap


def plan_erasing(keys: np.ndarray, size: Size, *, prob: float, mode: str, count: int, start: int = 0) -> Erasing:
    """timm's RandomErasing: a sample gets 1 to `count` boxes of 2% to 33% of the area / boxes, aspect 0.3 to 1 / 0.3.

    Ten boxes are tried for each, and the first is taken that is smaller than the image both ways.

    Args:
        keys: of the samples (B,).
        prob: of erasing anything.
        mode: 'rand' draws colours.
        start: leave out the samples before this one.
    """
    height, width = size
    first = uniforms(keys, Purpose.ERASE, 2)
    samples = np.flatnonzero((first[:, 0] <= prob) & (np.arange(len(keys)) >= start))
    chosen = 1 + np.floor(first[samples, 1] * count)  # (s,) boxes
    numbers = uniforms(keys[samples], Purpose.ERASE_BOX, count * 22).reshape(len(samples), count, 22)
    area = (0.02 + (1 / 3 - 0.02) * numbers[:, :, :10]) * (height * width) / chosen[:, None, None]
    aspect = np.exp(math.log(0.3) + (math.log(1 / 0.3) - math.log(0.3)) * numbers[:, :, 10:20])
    heights, widths = np.rint(np.sqrt(area * aspect)), np.rint(np.sqrt(area / aspect))  # (s, count, 10)
    fits = (heights < height) & (widths < width)
    taken = np.argmax(fits, axis=2)[:, :, None]
    box_height, box_width = (np.take_along_axis(a, taken, 2)[:, :, 0] for a in (heights, widths))
    top = np.floor(numbers[:, :, 20] * (height - box_height + 1))
    left = np.floor(numbers[:, :, 21] * (width - box_width + 1))
    valid = fits.any(axis=2) & (np.arange(count) < chosen[:, None]) & (box_height > 0) & (box_width > 0)
    rounds, rows = np.nonzero(valid.T)  # in the order of rounds
    boxes = np.stack((samples[rows], *(a[rows, rounds] for a in (top, left, box_height, box_width))), axis=1)
    noise_keys = hashes(keys[samples], Purpose.ERASE_NOISE, count)[rows, rounds].view(np.int64)
    colours = np.zeros((len(rows), 3))
    if mode == 'rand':
        pairs = uniforms(keys[samples], Purpose.ERASE_COLOUR, count * 6).reshape(len(samples), count, 3, 2)
        colours = normals(pairs[..., 0], pairs[..., 1])[rows, rounds]
    return Erasing(boxes.astype(np.int64), noise_keys, colours, np.bincount(rounds, minlength=count).tolist())


def erase(images: Tensor, erasing: Erasing, boxes: Tensor, keys: Tensor, colours: Tensor, *, noise: bool) -> None:
    """Erases boxes of images (B, 3, H, W), in place.

    Args:
        erasing: what is on the host, which so knows how many pixels there are.
        boxes, keys, colours: its arrays on the device of the images.
        noise: erase with normal noise, else with the colours.
    """
    rounds = erasing.rounds
    areas = np.split(erasing.boxes[:, 3] * erasing.boxes[:, 4], np.cumsum(rounds)[:-1])
    fills = (keys if noise else colours).split(rounds)
    for box, fill, total in zip(boxes.split(rounds), fills, [int(area.sum()) for area in areas], strict=True):
        sample, top, left, height, width = box.unbind(1)
        size = height * width
        # The box of each pixel (N,), and the pixel's number in it.
        number = torch.repeat_interleave(torch.arange(len(box), device=images.device), size, output_size=total)
        pixel = torch.arange(total, device=images.device) - (size.cumsum(0) - size)[number]
        row = pixel // width[number]
        place = (top[number] + row) * images.shape[3] + left[number] + pixel - row * width[number]
        values = device_normals(fill[number], pixel) if noise else fill[number]
        images.view(*images.shape[:2], -1)[sample[number], :, place] = values.to(images.dtype)  # (N, 3)
