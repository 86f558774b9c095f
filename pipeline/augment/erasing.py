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
        keys: (B,).
        size: of the images.
        prob: of erasing anything.
        mode: 'rand' draws colours.
        count: at most so many boxes.
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
        images: float.
        erasing: what is on the host, which so knows how many pixels there are.
        boxes, keys, colours: its arrays on the device of the images.
        noise: erase with normal noise, else with the colours.
    """
    areas = erasing.boxes[:, 3] * erasing.boxes[:, 4]
    first = 0
    for length in erasing.rounds:
        part = slice(first, first + length)
        first += length
        total = int(areas[part].sum())
        if total:
            fill = keys[part] if noise else colours[part]
            _erase_round(images, boxes[part], fill, total, noise=noise)


def _erase_round(images: Tensor, boxes: Tensor, fill: Tensor, total: int, *, noise: bool) -> None:
    """Erases boxes that do not overlap, of so many pixels in total; `fill` holds keys (R,) or colours (R, 3)."""
    sample, top, left, height, width = boxes.unbind(1)
    size = height * width
    box = torch.repeat_interleave(torch.arange(len(boxes), device=images.device), size, output_size=total)  # (N,)
    pixel = torch.arange(total, device=images.device) - (size.cumsum(0) - size)[box]
    row = pixel // width[box]
    place = (top[box] + row) * images.shape[3] + left[box] + pixel - row * width[box]
    values = device_normals(fill[box], pixel) if noise else fill[box]
    images.view(*images.shape[:2], -1)[sample[box], :, place] = values.to(images.dtype)  # (N, 3)
