"""The training pipeline of DeiT's recipe on batches of uint8 images, on any device: crop, flip, RandAugment or colour
jitter, normalisation, random erasing; and mixup and cutmix.

It draws from the distributions of timm's and torchvision's pipeline on PIL images, which `datasets.build_transform`
makes. No library offers that on batches: torchvision's and kornia's RandAugment draw one op for the whole batch, and
DALI's has other ranges. The work is divided so that the host never waits for the device:

1. the host draws all random numbers, a few for each sample, from a hash of (seed, epoch, image, repeat);
2. it turns them into parameters of ops, and groups the samples by op;
3. the device applies each op to its samples at once.

References: E. D. Cubuk et al., RandAugment, 2019; Z. Zhong et al., Random Erasing Data Augmentation, 2017; H. Zhang et
al., mixup, 2017; S. Yun et al., CutMix, 2019. The definitions that count are those of timm's `auto_augment`,
`random_erasing` and `mixup`, and of Pillow's C sources.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from enum import IntEnum
from typing import Literal

import numpy as np
import torch
import torch.nn.functional as F
from timm.data.auto_augment import rand_augment_transform
from timm.data.mixup import mixup_target
from torch import Tensor

from utils import UsageError, one_line

PADDING = 4  # pixels of zeros on each side, for the random crop of small images
Size = tuple[int, int]  # height, width


# 1. Random numbers
#
# SplitMix64 (G. L. Steele et al., Fast splittable pseudorandom number generators, OOPSLA 2014) as a function of a
# counter: the n-th number of a key is mix(key + n * GOLDEN). A sample's key is a hash of its draw, so its numbers do
# not depend on the samples around it, nor on how many numbers another purpose takes.

GOLDEN = 0x9E3779B97F4A7C15
MIX = ((30, 0xBF58476D1CE4E5B9), (27, 0x94D049BB133111EB))
LAST_SHIFT = 31


class Purpose(IntEnum):
    """What a sample's random numbers are for; each purpose has 2**16 counters of its own."""

    CROP = 0
    FLIP = 1
    OPS = 2
    WEIGHTED_CHOICE = 3
    JITTER = 4
    ERASE = 5
    ERASE_BOX = 6
    ERASE_COLOUR = 7
    ERASE_NOISE = 8


def _mix(numbers: np.ndarray) -> np.ndarray:
    """SplitMix64's output function, on uint64."""
    for shift, factor in MIX:
        numbers = (numbers ^ (numbers >> np.uint64(shift))) * np.uint64(factor)
    return numbers ^ (numbers >> np.uint64(LAST_SHIFT))


def sample_keys(seed: int, draws: np.ndarray) -> np.ndarray:
    """A uint64 (B,) for each draw, which stands for (seed, epoch, image, repeat).

    Args:
        seed: the run's.
        draws: int64 (B, 3): image, epoch, repeat.
    """
    image, epoch, repeat = draws.T.astype(np.uint64)
    keys = np.full(len(draws), seed % 2**64, np.uint64)
    for number in (epoch, image, repeat):
        keys = _mix(keys + np.uint64(GOLDEN)) + number
    return _mix(keys + np.uint64(GOLDEN))


def hashes(keys: np.ndarray, purpose: Purpose, count: int) -> np.ndarray:
    """uint64 (B, count) for keys (B,)."""
    counters = np.arange(1, count + 1, dtype=np.uint64) + np.uint64(purpose << 16)
    return _mix(keys[:, None] + counters * np.uint64(GOLDEN))


def uniforms(keys: np.ndarray, purpose: Purpose, count: int) -> np.ndarray:
    """float64 (B, count), in [0, 1)."""
    return (hashes(keys, purpose, count) >> np.uint64(11)) * 2.0**-53


def _normals(first: np.ndarray, second: np.ndarray) -> np.ndarray:
    """Standard normal numbers from two uniform ones each (G. E. P. Box and M. E. Muller, 1958)."""
    return np.sqrt(-2 * np.log1p(-first)) * np.cos(2 * math.pi * second)


def _signed(number: int) -> int:
    """The int64 with the bits of a uint64: PyTorch has no arithmetic for the latter."""
    return number - 2**64 if number >= 2**63 else number


def device_normals(keys: Tensor, counters: Tensor) -> Tensor:
    """Standard normal numbers (N, 3), a function of keys and counters alone, made where these are.

    Devices agree on the bits that are drawn; logarithms and cosines differ in the last place.

    Args:
        keys: int64 (N,).
        counters: int64 (N,), from 0; numbers with the same key need different ones.
    """
    numbers = keys + (torch.stack((2 * counters, 2 * counters + 1)) + 1) * _signed(GOLDEN)  # (2, N)
    for shift, factor in MIX:
        numbers = (numbers ^ (numbers >> shift & (1 << 64 - shift) - 1)) * _signed(factor)
    numbers = numbers ^ (numbers >> LAST_SHIFT & (1 << 64 - LAST_SHIFT) - 1)
    bits = (1 << 24) - 1
    radius = ((numbers >> 40 & bits) + 1).float().mul_(2.0**-24).log_().mul_(-2).sqrt_()
    angle = (numbers >> 8 & bits).float().mul_(2 * math.pi * 2.0**-24)
    return torch.stack((radius[0] * angle[0].cos(), radius[0] * angle[0].sin(), radius[1] * angle[1].cos()), dim=1)


# 2. Parameters
#
# A level (timm: magnitude) lies in 0..10, or 0..mmax. Each op has its own scale from levels to arguments.


def _signs(negative: np.ndarray) -> np.ndarray:
    return np.where(negative, -1.0, 1.0)


def _integers(values: np.ndarray) -> np.ndarray:
    return np.trunc(values).astype(np.int64)


def _away_from_one(level: np.ndarray, negative: np.ndarray) -> np.ndarray:
    return np.maximum(0.1, 1.0 + _signs(negative) * (level / 10 * 0.9))


def _between(level: np.ndarray, low: float, high: float) -> np.ndarray:
    return np.clip(low + (high - low) * (level / 10), low, high)


def _posterize_bits(level: np.ndarray) -> np.ndarray:
    return _integers(level / 10 * 4)


def _solarize_threshold(level: np.ndarray) -> np.ndarray:
    return np.minimum(256, _integers(level / 10 * 256))


@dataclass(frozen=True)
class OpInfo:
    """An op of timm's table: what it does, and its argument (k,) from levels (k,) and signs (k,), if it takes one."""

    kind: str
    argument: Callable[[np.ndarray, np.ndarray], np.ndarray] | None = None


OPS = {
    'AutoContrast': OpInfo('autocontrast'),
    'Equalize': OpInfo('equalize'),
    'Invert': OpInfo('invert'),
    'Rotate': OpInfo('rotate', lambda level, negative: _signs(negative) * (level / 10 * 30)),
    'Posterize': OpInfo('posterize', lambda level, _: _posterize_bits(level)),
    'PosterizeIncreasing': OpInfo('posterize', lambda level, _: 4 - _posterize_bits(level)),
    'PosterizeOriginal': OpInfo('posterize', lambda level, _: _posterize_bits(level) + 4),
    'Solarize': OpInfo('solarize', lambda level, _: _solarize_threshold(level)),
    'SolarizeIncreasing': OpInfo('solarize', lambda level, _: 256 - _solarize_threshold(level)),
    'SolarizeAdd': OpInfo('solarize_add', lambda level, _: np.minimum(128, _integers(level / 10 * 110))),
    'Color': OpInfo('color', lambda level, _: level / 10 * 1.8 + 0.1),
    'ColorIncreasing': OpInfo('color', _away_from_one),
    'Contrast': OpInfo('contrast', lambda level, _: level / 10 * 1.8 + 0.1),
    'ContrastIncreasing': OpInfo('contrast', _away_from_one),
    'Brightness': OpInfo('brightness', lambda level, _: level / 10 * 1.8 + 0.1),
    'BrightnessIncreasing': OpInfo('brightness', _away_from_one),
    'Sharpness': OpInfo('sharpness', lambda level, _: level / 10 * 1.8 + 0.1),
    'SharpnessIncreasing': OpInfo('sharpness', _away_from_one),
    'ShearX': OpInfo('shear_x', lambda level, negative: _signs(negative) * (level / 10 * 0.3)),
    'ShearY': OpInfo('shear_y', lambda level, negative: _signs(negative) * (level / 10 * 0.3)),
    'TranslateXRel': OpInfo('translate_x_rel', lambda level, negative: _signs(negative) * (level / 10 * 0.45)),
    'TranslateYRel': OpInfo('translate_y_rel', lambda level, negative: _signs(negative) * (level / 10 * 0.45)),
    'Desaturate': OpInfo('desaturate', lambda level, _: _between(level, 0.5, 1.0)),
    'GaussianBlur': OpInfo('gaussian_blur', lambda level, _: _between(level, 0.1, 2.0)),
}


@dataclass(frozen=True)
class Policy:
    """RandAugment's settings, as timm reads them from a policy string.

    `weights` (ops,) are None where ops are drawn with replacement, each as likely as the others. A level is normal
    around `magnitude`, or uniform from 0 to it where `magnitude_std` is infinite.
    """

    names: tuple[str, ...]
    num_layers: int
    prob: float
    magnitude: float
    magnitude_std: float
    magnitude_max: float
    weights: np.ndarray | None

    def levels(self, noise: np.ndarray) -> np.ndarray:
        """Levels from two uniform numbers each, (..., 2)."""
        level = np.full(noise.shape[:-1], float(self.magnitude))
        if self.magnitude_std == math.inf:
            level = self.magnitude * noise[..., 0]
        elif self.magnitude_std > 0:
            level = self.magnitude + self.magnitude_std * _normals(noise[..., 0], noise[..., 1])
        return np.clip(level, 0.0, self.magnitude_max)


def read_policy(text: str) -> Policy:
    """A policy from timm's own reading of a string such as 'rand-m9-mstd0.5-inc1'.

    Raises:
        UsageError: for a string that is no RandAugment policy, or needs an op that is not covered.
    """
    way_out = 'use --augment pil'
    if text.partition('-')[0] != 'rand':
        raise UsageError(f'--aa {text}: batched augmentation covers the rand-… policies only; {way_out}')
    try:
        transform = rand_augment_transform(text, {'translate_const': 0})
        names = tuple(op.name for op in transform.ops)
        first = transform.ops[0]
    except (AssertionError, ValueError, KeyError, IndexError) as err:
        raise UsageError(f'--aa {text}: timm refuses this ({one_line(err)})') from None
    missing = [name for name in names if name not in OPS]
    if missing:
        raise UsageError(f'--aa {text}: batched augmentation does not cover {", ".join(missing)}; {way_out}')
    weights = transform.choice_weights
    if weights is not None and transform.num_layers > np.count_nonzero(weights):
        raise UsageError(f'--aa {text}: {transform.num_layers} ops of {len(names)} without replacement')
    return Policy(
        names=names,
        num_layers=transform.num_layers,
        prob=first.prob,
        magnitude=first.magnitude,
        magnitude_std=first.magnitude_std,
        magnitude_max=first.magnitude_max or 10,
        weights=weights,
    )


@dataclass
class Step:
    """One kind of work for samples `index` (k,) with parameters `values` (k, …), both on the host."""

    kind: str
    index: np.ndarray
    values: np.ndarray
    cubic: bool = True


_RAMP = np.arange(256)


def _rotation(degrees: np.ndarray, size: Size) -> np.ndarray:
    """Pillow's matrices (k, 6) from output to input pixels, around the centre.

    Pillow rounds decimal digits, and NumPy's cosine is not the C library's in the last place; so these are Python's.
    """
    height, width = size
    angles = [-math.radians(angle % 360.0) for angle in degrees.tolist()]
    cosine = np.array([round(math.cos(angle), 15) for angle in angles])
    sine = np.array([round(math.sin(angle), 15) for angle in angles])
    x, y = -width / 2, -height / 2
    return np.stack(
        (cosine, sine, cosine * x + sine * y + width / 2, -sine, cosine, -sine * x + cosine * y + height / 2), axis=1
    )


def _box_blurs(sigma: np.ndarray) -> np.ndarray:
    """Pillow's three box blurs in a Gaussian one's place: weights (k, 2) in 2**-24 of full and of edge pixels, and the
    whole radius (k, 1).

    Source: P. Gwosdek et al., Theoretical foundations of Gaussian convolution by extended box filtering, 2011.
    """
    variance = (sigma.astype(np.float32) ** 2 / np.float32(3)).astype(np.float32)
    length = np.sqrt(12.0 * variance.astype(np.float64) + 1.0).astype(np.float32)
    whole = np.floor((length.astype(np.float64) - 1.0) / 2.0).astype(np.float32)
    part = (2 * whole + 1) * (whole * (whole + 1) - 3 * variance)
    part = part / (6 * (variance - (whole + 1) * (whole + 1)))
    radius = whole + part
    full = np.trunc(np.float32(1 << 24) / (radius * 2 + 1)).astype(np.int64)
    reach = np.trunc(radius).astype(np.int64)
    edge = ((1 << 24) - (reach * 2 + 1) * full) // 2
    return np.stack((full, edge, reach), axis=1)


def make_step(kind: str, index: np.ndarray, argument: np.ndarray, size: Size, *, cubic: bool = True) -> Step:
    """A step from what the ops of timm's table take.

    Where the new value of a pixel depends on its old value and the argument alone, the host makes the table of it.

    Args:
        kind: of `OpInfo`.
        index: the samples (k,).
        argument: theirs (k,).
        size: of the images.
        cubic: bicubic or bilinear, where the op interpolates.
    """
    column = argument[:, None]
    table: np.ndarray | None = None
    if kind == 'invert':
        table = np.broadcast_to(255 - _RAMP, (len(index), 256))
    elif kind == 'posterize':
        kept = np.where(column >= 8, 255, ~((1 << np.clip(8 - column.astype(np.int64), 0, 8)) - 1))
        table = _RAMP & kept
    elif kind == 'solarize':
        table = np.where(column > _RAMP, _RAMP, 255 - _RAMP)
    elif kind == 'solarize_add':
        table = np.where(_RAMP < 128, np.minimum(255, _RAMP + column), _RAMP)
    elif kind == 'brightness':
        table = np.clip(column.astype(np.float32) * _RAMP.astype(np.float32), 0, 255)
    elif kind == 'rotate':
        return Step('affine', index, _rotation(argument, size), cubic)
    elif kind in ('shear_x', 'shear_y'):
        return Step(f'shift_{kind[-1]}', index, np.stack((argument, 0 * argument), axis=1), cubic)
    elif kind in ('translate_x_rel', 'translate_y_rel'):
        pixels = argument * (size[1] if kind == 'translate_x_rel' else size[0])
        return Step(f'shift_{kind[10]}', index, np.stack((0 * pixels, pixels), axis=1), cubic)
    elif kind == 'desaturate':
        return Step('color', index, np.clip(1.0 - column, 0.0, 1.0))
    elif kind == 'gaussian_blur':
        return Step('box_blurs', index, _box_blurs(argument))
    if table is not None:
        return Step('table', index, table.astype(np.uint8))
    return Step(kind, index, column)


def merge_steps(steps: Sequence[Step]) -> list[Step]:
    """Steps of one kind as one: a few large pieces of work are faster than many small ones."""
    groups: dict[tuple[str, bool], list[Step]] = {}
    for step in steps:
        if len(step.index):
            groups.setdefault((step.kind, step.cubic), []).append(step)
    return [
        Step(kind, np.concatenate([s.index for s in group]), np.concatenate([s.values for s in group]), cubic)
        for (kind, cubic), group in groups.items()
    ]


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
        colours = _normals(pairs[..., 0], pairs[..., 1])[rows, rounds]
    return Erasing(boxes.astype(np.int64), noise_keys, colours, np.bincount(rounds, minlength=count).tolist())


def _real(device: torch.device) -> torch.dtype:
    """The type of arguments and coordinates, which only MPS does not have."""
    return torch.float32 if device.type == 'mps' else torch.float64


def send(arrays: Sequence[np.ndarray], device: torch.device) -> list[Tensor]:
    """Arrays as tensors on a device: whole numbers as int64, uint8 as it is, the rest as float64.

    All of one type travel in one copy from pinned memory, which the host does not wait for.
    """
    groups: dict[torch.dtype, list[int]] = {}
    for number, array in enumerate(arrays):
        whole = torch.uint8 if array.dtype == np.uint8 else torch.int64
        groups.setdefault(whole if array.dtype.kind in 'iu' else _real(device), []).append(number)
    found: dict[int, Tensor] = {}
    for kind, members in groups.items():
        joined = torch.from_numpy(np.concatenate([arrays[number].reshape(-1) for number in members])).to(kind)
        if device.type == 'cuda':
            joined = joined.pin_memory()
        parts = joined.to(device, non_blocking=True).split([arrays[number].size for number in members])
        found.update({number: part.view(arrays[number].shape) for number, part in zip(members, parts, strict=True)})
    return [found[number] for number in range(len(arrays))]


# 3. Ops on pixels
#
# Each takes uint8 (k, 3, H, W) and gives the same. Pillow's ImageEnhance computes in float32 and truncates, its affine
# transform in float64. The order of operations below is that of its C sources, and no fused multiply-add is used.


def _blend(base: Tensor, pixels: Tensor, factor: Tensor) -> Tensor:
    """Pillow's blend: base + factor * (pixels - base), clipped and truncated. All float32, of whole numbers."""
    return (pixels - base).mul_(factor).add_(base).clamp_(0, 255).to(torch.uint8)


def _grey(pixels: Tensor) -> Tensor:
    """Pillow's luma of ITU-R 601-2 as whole numbers in float32 (k, H, W).

    In 2**-16 as Pillow has it; every sum is below 2**24, so float32 holds it exactly.
    """
    red, green, blue = pixels.unbind(1)
    total = red * 19595.0
    total += green * 38470.0
    total += blue * 7471.0
    return total.add_(32768.0).mul_(2.0**-16).floor_()


def _color(pixels: Tensor, factor: Tensor) -> Tensor:
    pixels = pixels.float()
    return _blend(_grey(pixels)[:, None], pixels, factor[:, :, None, None])


def _sharpness(pixels: Tensor, factor: Tensor) -> Tensor:
    """A blend with Pillow's SMOOTH, whose weights are 5 in the centre and 1 around it; the border stays as it is."""
    out = pixels.clone()
    pixels = pixels.float()
    rows = pixels[:, :, :-2] + pixels[:, :, 1:-1] + pixels[:, :, 2:]
    centre = pixels[:, :, 1:-1, 1:-1]
    total = rows[..., :-2] + rows[..., 1:-1] + rows[..., 2:] + 4 * centre
    smooth = total.add_(6.5).mul_(1 / 13).floor_()  # a sum of whole numbers is never nearer than 1 / 26 to a step
    out[:, :, 1:-1, 1:-1] = _blend(smooth, centre, factor[:, :, None, None])
    return out


def _autocontrast_tables(pixels: Tensor) -> Tensor:
    """From the darkest and the lightest value of each channel to 0 and 255."""
    low = pixels.amin((2, 3)).long()[:, :, None]
    high = pixels.amax((2, 3)).long()[:, :, None]
    # Of tensors: a quotient with a Python number becomes a product with its reciprocal.
    ramp = torch.arange(256, device=pixels.device)
    scale = torch.full((1,), 255, dtype=_real(pixels.device), device=pixels.device) / (high - low).clamp(min=1)
    stretched = (ramp * scale).add_(-low * scale).clamp_(0, 255)
    return torch.where(high > low, stretched.to(torch.uint8), ramp.to(torch.uint8))


def _equalize_tables(pixels: Tensor) -> Tensor:
    """Each value's share of the darker pixels, in steps of 1/255 of all but the lightest."""
    values = pixels.flatten(2).long()
    histogram = torch.zeros(*values.shape[:2], 256, dtype=torch.int32, device=pixels.device)
    histogram.scatter_add_(2, values, torch.ones((), dtype=torch.int32, device=pixels.device).expand_as(values))
    lightest = histogram.gather(2, values.amax(2, keepdim=True))
    step = (values.shape[2] - lightest) // 255
    below = histogram.cumsum(2, dtype=torch.int32) - histogram
    equalized = ((step // 2 + below) // step.clamp(min=1)).clamp_(max=255)
    ramp = torch.arange(256, dtype=torch.int32, device=pixels.device)
    return torch.where(step > 0, equalized, ramp).to(torch.uint8)


def _contrast_tables(pixels: Tensor, factor: Tensor) -> Tensor:
    """A blend with the mean grey, which is rounded."""
    count = pixels.shape[2] * pixels.shape[3]
    total = _grey(pixels.float()).to(torch.int32).sum((1, 2))
    mean = (2 * total + count) // (2 * count)
    ramp = torch.arange(256, dtype=torch.float32, device=pixels.device)
    return _blend(mean.float()[:, None], ramp, factor)[:, None].expand(-1, 3, -1)


def _look_up(pixels: Tensor, tables: Tensor) -> Tensor:
    """Values through tables (k, 3, 256)."""
    return tables.gather(2, pixels.flatten(2).long()).view_as(pixels)


def _interpolate(taps: Sequence[Tensor], d: Tensor, *, exact: bool) -> Tensor:
    """The value at a fraction d between two pixels, or between the middle ones of four.

    The cubic is Pillow's, of Keys' family with a = -1. All forms give a constant exactly: a sum of weighted pixels
    would fall below it by rounding, and then by a whole grey level by truncation.
    """
    if len(taps) == 2:
        first, second = taps
        return (second - first).mul_(d).add_(first)
    v1, v2, v3, v4 = taps
    if exact:
        p2 = v3 - v1
        p3 = (v1 - v2).mul_(2).add_(v3).sub_(v4)
        p4 = (v2 - v1).sub_(v3).add_(v4)
        return p4.mul_(d).add_(p3).mul_(d).add_(p2).mul_(d).add_(v2)
    rest = d - 1
    w1, w4 = -d * rest * rest, d * d * rest
    w3 = d * (1 + d * (1 - d))
    return torch.addcmul(v2, w1, v1 - v2).addcmul_(w3, v3 - v2).addcmul_(w4, v4 - v2)


def _finish(values: Tensor, inside: Tensor, fill: Tensor) -> Tensor:
    """Truncated values (k, 3, H, W), and the fill colour where the source lies outside of the image."""
    return torch.where(inside[:, None], values.clamp_(0, 255).to(torch.uint8), fill[:, None, None])


def _shift_x(pixels: Tensor, values: Tensor, fill: Tensor, *, cubic: bool, exact: bool) -> Tensor:
    """Shears and translations along rows; values (k, 2) are pixels a row and pixels.

    Rows are whole pixels apart, where Pillow's interpolation between rows gives the row itself.
    """
    height, width = pixels.shape[2:]
    real = values.dtype
    slope, offset = values[:, 0, None, None], values[:, 1, None, None]
    x = torch.arange(width, device=pixels.device, dtype=real) + 0.5
    y = torch.arange(height, device=pixels.device, dtype=real)[:, None] + 0.5
    shift = slope * y + offset  # (k, H, 1)
    source = x + slope * y + offset if exact else x + shift  # (k, H, W)
    inside = (source >= 0) & (source < width)
    pixels = pixels.to(real if exact else torch.float32)
    first, last = (-1, 2) if cubic else (0, 1)
    if exact:
        source -= 0.5
        base = source.floor()
        places = [(base.long() + tap).clamp_(0, width - 1) for tap in range(first, last + 1)]
        taps = [pixels.gather(3, place[:, None].expand(-1, 3, -1, -1)) for place in places]
        d = (source - base)[:, None]
    else:  # the fraction is the same along a row, but for rounding, so that neighbours are slices of one strip
        base = shift.floor()
        columns = torch.arange(first, width + last, device=pixels.device)
        place = (base.long() + columns).clamp_(0, width - 1)
        strip = pixels.gather(3, place[:, None].expand(-1, 3, -1, -1))
        taps = [strip[..., tap : tap + width] for tap in range(last - first + 1)]
        d = (shift - base).float()[:, None]
    return _finish(_interpolate(taps, d, exact=exact), inside, fill)


def _affine(pixels: Tensor, values: Tensor, fill: Tensor, *, cubic: bool, exact: bool) -> Tensor:
    """Any affine transform; values (k, 6) are Pillow's matrix from output to input pixels."""
    height, width = pixels.shape[2:]
    real = values.dtype
    a, b, c, d, e, f = values[:, :, None, None].unbind(1)
    x = torch.arange(width, device=pixels.device, dtype=real) + 0.5
    y = torch.arange(height, device=pixels.device, dtype=real)[:, None] + 0.5
    source_x = a * x + b * y + c  # (k, H, W)
    source_y = d * x + e * y + f
    inside = (source_x >= 0) & (source_x < width) & (source_y >= 0) & (source_y < height)
    source_x -= 0.5
    source_y -= 0.5
    base_x, base_y = source_x.floor(), source_y.floor()
    flat = pixels.to(real if exact else torch.float32).flatten(2)
    dx, dy = ((a - b).to(flat.dtype).flatten(1)[:, None] for a, b in ((source_x, base_x), (source_y, base_y)))
    taps = range(-1, 3) if cubic else range(2)
    columns = [(base_x.long() + tap).clamp_(0, width - 1) for tap in taps]
    rows = [(base_y.long() + tap).clamp_(0, height - 1).mul_(width) for tap in taps]
    lines = []
    for row in rows:
        line = [flat.gather(2, (row + column).flatten(1)[:, None].expand(-1, 3, -1)) for column in columns]
        lines.append(_interpolate(line, dx, exact=exact))
    return _finish(_interpolate(lines, dy, exact=exact).view(pixels.shape), inside, fill)


def _box_blurs_along(pixels: Tensor, values: Tensor) -> Tensor:
    """Three box blurs along rows; values (k, 3) are those of `_box_blurs`. Beyond the border its pixels go on."""
    width = pixels.shape[3]
    full, edge, reach = values[:, :, None, None, None].unbind(1)
    x = torch.arange(width, device=pixels.device)
    farthest = 2  # timm's strongest blur, sigma 2, reaches one whole pixel and a part of the next
    offsets = range(-farthest, farthest + 1)
    weights = [torch.where(reach >= abs(o), full, torch.where(reach + 1 == abs(o), edge, 0)) for o in offsets]
    sources = [(x + offset).clamp_(0, width - 1) for offset in offsets]
    blurred = pixels.long()
    for _ in range(3):
        total = torch.full_like(blurred, 1 << 23)
        for weight, source in zip(weights, sources, strict=True):
            total += weight * blurred.index_select(3, source)
        blurred = total >> 24
    return blurred.to(torch.uint8)


def apply_step(
    images: Tensor, kind: str, index: Tensor, values: Tensor, fill: Tensor, *, cubic: bool, exact: bool
) -> None:
    """Does a step's work on some of the images (B, 3, H, W), in place.

    Args:
        images: uint8.
        kind, index, values, cubic: of a `Step`, on the device of the images.
        fill: uint8 (3,), for pixels from outside of the image.
        exact: Pillow's arithmetic in every bit: float64 for interpolation too, not for coordinates alone.
    """
    pixels = images.index_select(0, index)
    if kind == 'table':
        out = _look_up(pixels, values[:, None].expand(-1, 3, -1))
    elif kind == 'autocontrast':
        out = _look_up(pixels, _autocontrast_tables(pixels))
    elif kind == 'equalize':
        out = _look_up(pixels, _equalize_tables(pixels))
    elif kind == 'contrast':
        out = _look_up(pixels, _contrast_tables(pixels, values.float()))
    elif kind == 'color':
        out = _color(pixels, values.float())
    elif kind == 'sharpness':
        out = _sharpness(pixels, values.float())
    elif kind == 'shift_x':
        out = _shift_x(pixels, values, fill, cubic=cubic, exact=exact)
    elif kind == 'shift_y':
        flipped = pixels.transpose(2, 3).contiguous()
        out = _shift_x(flipped, values, fill, cubic=cubic, exact=exact).transpose(2, 3)
    elif kind == 'affine':
        out = _affine(pixels, values, fill, cubic=cubic, exact=exact)
    elif kind == 'box_blurs':
        flipped = _box_blurs_along(pixels, values).transpose(2, 3).contiguous()
        out = _box_blurs_along(flipped, values).transpose(2, 3)
    else:
        raise ValueError(f'no op of the kind {kind!r}')
    images.index_copy_(0, index, out)


def apply_op(
    images: Tensor,
    name: str,
    argument: np.ndarray,
    *,
    cubic: bool = True,
    fill: Sequence[int] = (128, 128, 128),
    exact: bool = False,
) -> Tensor:
    """One op of timm's table on each image of a batch.

    Args:
        images: uint8 (B, 3, H, W).
        name: of `OPS`.
        argument: (B,), what timm's function of that name takes; any numbers where it takes none.
        cubic, fill, exact: as for `apply_step`.
    """
    step = make_step(OPS[name].kind, np.arange(len(images)), argument, (images.shape[2], images.shape[3]), cubic=cubic)
    index, values = send([step.index, step.values], images.device)
    out = images.clone()
    colour = torch.tensor(fill, dtype=torch.uint8, device=images.device)
    apply_step(out, step.kind, index, values, colour, cubic=cubic, exact=exact)
    return out


def erase(images: Tensor, boxes: Tensor, keys: Tensor, colours: Tensor, areas: np.ndarray, *, noise: bool) -> None:
    """Erases boxes of images (B, 3, H, W), in place.

    Args:
        images: float.
        boxes, keys, colours: of `Erasing`, on the device of the images.
        areas: of the boxes in pixels (R,), on the host, which so knows how many pixels there are.
        noise: erase with normal noise, else with the colours.
    """
    total = int(areas.sum())
    if total == 0:
        return
    sample, top, left, height, width = boxes.unbind(1)
    size = height * width
    box = torch.repeat_interleave(torch.arange(len(boxes), device=images.device), size, output_size=total)  # (N,)
    pixel = torch.arange(total, device=images.device) - (size.cumsum(0) - size)[box]
    row = pixel // width[box]
    place = (top[box] + row) * images.shape[3] + left[box] + pixel - row * width[box]
    values = device_normals(keys[box], pixel) if noise else colours[box]
    images.view(*images.shape[:2], -1)[sample[box], :, place] = values.to(images.dtype)  # (N, 3)


# 4. The pipeline


@dataclass
class Plan:
    """What is to be done with a batch, on the host.

    `ops` (layers, B) are positions in the policy's names, -1 where an op was drawn but is not applied; `levels` are
    theirs. `top` and `left` (B,) are the crop's corner in the padded image; `steps` hold a list for each layer.
    """

    top: np.ndarray
    left: np.ndarray
    flip: np.ndarray
    ops: np.ndarray
    levels: np.ndarray
    steps: list[list[Step]]
    erasing: Erasing | None


class BatchedAugment:
    """The transform of DeiT's recipe for training, from uint8 images to normalised tensors.

    In this order, as timm has it: crop, flip, RandAugment, colour jitter, normalisation, random erasing. Each sample
    has its own random numbers, those of (seed, epoch, image, repeat).

    Args:
        input_size: pixels, of the images that come out.
        seed: the run's.
        crop: 'pad' crops from the image with 4 pixels of zeros on each side; 'none' leaves it as it is.
        hflip: probability of a horizontal flip.
        color_jitter: strength, used where there is no `auto_augment`, or one of timm's 3-Augment sets.
        auto_augment: timm's policy string rand-…, or None.
        interpolation: of the geometric ops, as timm takes it from the training crop's: random, bilinear, bicubic.
        re_prob, re_mode, re_count: random erasing's probability, fill (const, rand, pixel) and count.
        resplit: random erasing for the second half of the batch only.
        mean, std: of the channels, for images in 0..1.
        exact: the same bits as timm's pipeline on Pillow gives for the same parameters, in float64; otherwise in
            float32, where a pixel of a geometric op may differ by a grey level.

    Raises:
        UsageError: for a policy, an op or a mode that is not covered.
    """

    def __init__(
        self,
        *,
        input_size: int,
        seed: int,
        crop: Literal['pad', 'none'],
        hflip: float = 0.5,
        color_jitter: float = 0.4,
        auto_augment: str | None = 'rand-m9-mstd0.5-inc1',
        interpolation: str = 'bicubic',
        re_prob: float = 0.25,
        re_mode: str = 'pixel',
        re_count: int = 1,
        resplit: bool = False,
        mean: Sequence[float],
        std: Sequence[float],
        exact: bool = False,
    ) -> None:
        if crop not in ('pad', 'none'):
            raise UsageError(f'crop {crop!r}: batched augmentation knows pad and none')
        if interpolation not in ('random', 'bilinear', 'bicubic'):
            raise UsageError(
                f'--train-interpolation {interpolation}: batched augmentation covers random, bilinear and bicubic; '
                'use --augment pil'
            )
        if re_mode not in ('const', 'rand', 'pixel'):
            raise UsageError(f'--remode {re_mode}: batched augmentation knows const, rand and pixel')
        if color_jitter < 0 or re_count < 1:
            raise UsageError('--color-jitter must be 0 or more, and --recount 1 or more')
        self.input_size = input_size
        self.seed = seed
        self.crop = crop
        self.hflip = hflip
        self.policy = read_policy(auto_augment) if auto_augment else None
        # timm turns colour jitter off beside RandAugment, except beside 3-Augment, which it looks for by these letters.
        self.jitter = color_jitter if not auto_augment or '3a' in auto_augment else 0.0
        self.interpolation = interpolation
        self.re_prob = re_prob
        self.re_mode = re_mode
        self.re_count = re_count
        self.resplit = resplit
        self.fill = [min(255, round(255 * value)) for value in mean]
        self.mean = list(mean)
        self.std = list(std)
        self.exact = exact
        self._constants: dict[torch.device, tuple[Tensor, Tensor, Tensor, Tensor]] = {}

    def plan(self, draws: np.ndarray, size: Size) -> Plan:
        """Draws the random numbers of a batch.

        Args:
            draws: int64 (B, 3): image, epoch, repeat.
            size: of the images.
        """
        keys = sample_keys(self.seed, draws)
        corner = np.floor(uniforms(keys, Purpose.CROP, 2) * (2 * PADDING + 1)).astype(np.int64)
        flip = uniforms(keys, Purpose.FLIP, 1)[:, 0] < self.hflip
        steps: list[list[Step]] = []
        ops, levels = np.zeros((0, len(keys)), np.int64), np.zeros((0, len(keys)))
        if self.policy is not None:
            ops, levels = self._plan_ops(self.policy, keys, size, steps)
        if self.jitter > 0:
            self._plan_jitter(keys, size, steps)
        erasing = None
        if self.re_prob > 0:
            erasing = plan_erasing(
                keys,
                size,
                prob=self.re_prob,
                mode=self.re_mode,
                count=self.re_count,
                start=len(keys) // 2 if self.resplit else 0,
            )
        return Plan(corner[:, 0], corner[:, 1], flip, ops, levels, steps, erasing)

    def _plan_ops(
        self, policy: Policy, keys: np.ndarray, size: Size, steps: list[list[Step]]
    ) -> tuple[np.ndarray, np.ndarray]:
        """Adds the steps of each layer of RandAugment; gives the ops (layers, B), as in `Plan`, and their levels."""
        layers, num_ops = policy.num_layers, len(policy.names)
        numbers = uniforms(keys, Purpose.OPS, layers * 6).reshape(len(keys), layers, 6)
        if policy.weights is None:
            ops = np.floor(numbers[:, :, 0] * num_ops).astype(np.int64)
        else:
            # In the order of exponential waiting times, ops are drawn in proportion to their weights, each once.
            waiting = -np.log1p(-uniforms(keys, Purpose.WEIGHTED_CHOICE, num_ops))
            with np.errstate(divide='ignore'):
                ops = np.argsort(waiting / policy.weights, axis=1)[:, :layers]
        ops = np.where(numbers[:, :, 1] < policy.prob, ops, -1)
        levels = policy.levels(numbers[:, :, 2:4])
        negative = numbers[:, :, 4] < 0.5
        cubic = numbers[:, :, 5] < {'bilinear': 0.0, 'random': 0.5, 'bicubic': 1.0}[self.interpolation]
        # Sorted by interpolation inside of ops: a run of each pair is one step.
        codes = np.where(ops < 0, -1, 2 * ops + cubic)
        for layer in range(layers):
            order = np.argsort(codes[:, layer], kind='stable')
            present, first = np.unique(codes[order, layer], return_index=True)
            found = []
            for code, index in zip(present.tolist(), np.split(order, first[1:]), strict=True):
                if code >= 0:
                    info = OPS[policy.names[code // 2]]
                    argument = levels[index, layer]
                    if info.argument is not None:
                        argument = info.argument(argument, negative[index, layer])
                    found.append(make_step(info.kind, index, argument, size, cubic=bool(code % 2)))
            steps.append(merge_steps(found))
        return ops.T, levels.T

    def _plan_jitter(self, keys: np.ndarray, size: Size, steps: list[list[Step]]) -> None:
        """Adds torchvision's ColorJitter: brightness, contrast and saturation, in random order."""
        numbers = uniforms(keys, Purpose.JITTER, 6)
        order = np.argsort(numbers[:, :3], axis=1)
        low = max(0.0, 1 - self.jitter)
        factors = low + (1 + self.jitter - low) * numbers[:, 3:]
        for place in range(3):
            found = []
            for number, kind in enumerate(('brightness', 'contrast', 'color')):
                index = np.flatnonzero(order[:, place] == number)
                found.append(make_step(kind, index, factors[index, number], size))
            steps.append(merge_steps(found))

    def __call__(self, images: Tensor, draws: Tensor) -> Tensor:
        """Augments a batch where it lies, without a wait for the device.

        Args:
            images: uint8 (B, 3, H, W); H and W are `input_size` for the crop 'pad'.
            draws: int64 (B, 3) on the host: image, epoch, repeat, as in `samplers.Draw`.

        Returns:
            float32 (B, 3, H, W), normalised.
        """
        device, (height, width) = images.device, images.shape[2:]
        if self.crop == 'pad' and (height, width) != (self.input_size, self.input_size):
            raise ValueError(f'images of {height}x{width} pixels, {self.input_size}x{self.input_size} are expected')
        if self.exact and device.type == 'mps':
            raise UsageError('--augment-exact needs float64, which MPS does not have')
        plan = self.plan(draws.numpy(), (height, width))
        layers = plan.steps
        arrays = [plan.top, plan.left, plan.flip.astype(np.int64)]
        arrays += [array for steps in layers for step in steps for array in (step.index, step.values)]
        if plan.erasing is not None:
            arrays += [plan.erasing.boxes, plan.erasing.keys, plan.erasing.colours]
        sent = iter(send(arrays, device))
        fill, divisor, mean, std = self._on(device)

        images = self._crop_and_flip(images, next(sent), next(sent), next(sent))
        for steps in layers:
            for step in steps:
                apply_step(images, step.kind, next(sent), next(sent), fill, cubic=step.cubic, exact=self.exact)
        out = images.float()
        # A quotient by a tensor is the true one on every device, as torchvision's on the host is.
        out.div_(divisor).sub_(mean).div_(std) if self.exact else out.sub_(mean * divisor).mul_(1 / (std * divisor))
        if plan.erasing is not None:
            boxes, keys, colours = sent
            areas = plan.erasing.boxes[:, 3] * plan.erasing.boxes[:, 4]
            first = 0
            for length in plan.erasing.rounds:
                part = slice(first, first + length)
                first += length
                erase(out, boxes[part], keys[part], colours[part], areas[part], noise=self.re_mode == 'pixel')
        return out

    def _on(self, device: torch.device) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        """The fill colour, 255, the means and the deviations on a device."""
        if device not in self._constants:
            columns = [torch.tensor(values).view(-1, 1, 1).to(device) for values in ([255.0], self.mean, self.std)]
            fill = torch.tensor(self.fill, dtype=torch.uint8).to(device)
            self._constants[device] = (fill, columns[0], columns[1], columns[2])
        return self._constants[device]

    def _crop_and_flip(self, images: Tensor, top: Tensor, left: Tensor, flip: Tensor) -> Tensor:
        """A new tensor, whatever is done."""
        height, width = images.shape[2:]
        if self.crop == 'none':
            return torch.where(flip.bool()[:, None, None, None], images.flip(3), images).contiguous()
        padded = F.pad(images, (PADDING,) * 4)
        y = top[:, None] + torch.arange(height, device=images.device)
        x = torch.arange(width, device=images.device)
        x = left[:, None] + torch.where(flip.bool()[:, None], width - 1 - x, x)
        place = (y * padded.shape[3])[:, :, None] + x[:, None, :]  # (B, H, W)
        return padded.flatten(2).gather(2, place.flatten(1)[:, None].expand(-1, 3, -1)).view(images.shape)


# 5. Mixup and cutmix


class BatchedMixup:
    """timm's Mixup without a loop over samples: mixes each image with its mirror in the order of the batch.

    Random numbers are NumPy's global ones, on the host; with the same state they are timm's, except for
    `cutmix_minmax` by samples, where only the distribution is.

    Args:
        mixup_alpha, cutmix_alpha: of the beta distributions; 0 turns one off.
        cutmix_minmax: the least and the greatest share of each side that a box takes, in place of `cutmix_alpha`.
        prob: of mixing, for each batch or sample.
        switch_prob: of cutmix where both are on.
        mode: one mixture for each 'batch', 'pair' or 'elem'.
        correct_lam: mix targets by the box's area inside the image.
        label_smoothing: of the targets.
        num_classes: of the targets.

    Raises:
        UsageError: where nothing is on, or for an unknown mode.
    """

    def __init__(
        self,
        *,
        mixup_alpha: float = 1.0,
        cutmix_alpha: float = 0.0,
        cutmix_minmax: Sequence[float] | None = None,
        prob: float = 1.0,
        switch_prob: float = 0.5,
        mode: str = 'batch',
        correct_lam: bool = True,
        label_smoothing: float = 0.1,
        num_classes: int = 1000,
    ) -> None:
        if mode not in ('batch', 'pair', 'elem'):
            raise UsageError(f'--mixup-mode {mode}: known are batch, pair and elem')
        if cutmix_minmax is not None:
            if len(cutmix_minmax) != 2:
                raise UsageError('--cutmix-minmax takes two numbers')
            cutmix_alpha = 1.0
        if mixup_alpha <= 0 and cutmix_alpha <= 0:
            raise UsageError('mixing needs --mixup or --cutmix above 0, or --cutmix-minmax')
        self.mixup_alpha = mixup_alpha
        self.cutmix_alpha = cutmix_alpha
        self.cutmix_minmax = cutmix_minmax
        self.prob = prob
        self.switch_prob = switch_prob
        self.mode = mode
        self.correct_lam = correct_lam
        self.label_smoothing = label_smoothing
        self.num_classes = num_classes

    def __call__(self, images: Tensor, targets: Tensor) -> tuple[Tensor, Tensor]:
        """Mixes a batch of an even number of images.

        Args:
            images: float (B, 3, H, W).
            targets: class indices (B,), on the same device.

        Returns:
            New images, and float32 targets (B, classes), each of which sums to 1.
        """
        if len(images) % 2:
            raise ValueError(f'mixing needs an even number of images, not {len(images)}')
        lam: float | Tensor
        if self.mode == 'batch':
            images, lam = self._mix_batch(images)
        else:
            images, lam = self._mix_samples(images)
        return images, mixup_target(targets, self.num_classes, lam, self.label_smoothing)

    def _mix_batch(self, images: Tensor) -> tuple[Tensor, float]:
        if np.random.rand() >= self.prob:
            return images, 1.0
        cut = self.cutmix_alpha > 0 and (self.mixup_alpha <= 0 or np.random.rand() < self.switch_prob)
        alpha = self.cutmix_alpha if cut else self.mixup_alpha
        lam = float(np.random.beta(alpha, alpha))
        if lam == 1:
            return images, lam
        mirrored = images.flip(0)
        if not cut:
            return images * lam + mirrored.mul_(1 - lam), lam
        box, lams = self._boxes(np.array([lam]), images)
        top, bottom, left, right = (int(edge[0]) for edge in box)
        images = images.clone()
        images[:, :, top:bottom, left:right] = mirrored[:, :, top:bottom, left:right]
        return images, float(lams[0])

    def _mix_samples(self, images: Tensor) -> tuple[Tensor, Tensor]:
        count = len(images) if self.mode == 'elem' else len(images) // 2
        cut = np.full(count, self.mixup_alpha <= 0)
        if self.mixup_alpha > 0 and self.cutmix_alpha > 0:
            cut = np.random.rand(count) < self.switch_prob
            lams = np.where(
                cut,
                np.random.beta(self.cutmix_alpha, self.cutmix_alpha, count),
                np.random.beta(self.mixup_alpha, self.mixup_alpha, count),
            )
        else:
            alpha = self.mixup_alpha if self.mixup_alpha > 0 else self.cutmix_alpha
            lams = np.random.beta(alpha, alpha, count)
        lams = np.where(np.random.rand(count) < self.prob, lams, 1).astype(np.float32)
        cut &= lams != 1
        boxes = np.zeros((count, 4), np.int64)
        shares = np.where(cut, 1, lams).astype(np.float32)  # of the image itself, outside of boxes
        found, cut_lams = self._boxes(lams[cut], images)
        boxes[cut] = np.stack(found, axis=1)
        lams[cut] = cut_lams
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

    def _boxes(self, lams: np.ndarray, images: Tensor) -> tuple[tuple[np.ndarray, ...], np.ndarray]:
        """Boxes for cutmix (top, bottom, left, right), each (k,), and the lams (k,) that go with them."""
        size = np.array(images.shape[2:])
        if self.cutmix_minmax is not None:
            low, high = ((size * share).astype(np.int64) for share in self.cutmix_minmax)
            cut_height, cut_width = (np.random.randint(low[side], high[side], len(lams)) for side in range(2))
            top = np.random.randint(0, size[0] - cut_height + 1)
            left = np.random.randint(0, size[1] - cut_width + 1)
            bottom, right = top + cut_height, left + cut_width
        else:
            ratio = np.sqrt(1 - lams)[:, None]
            cut = np.trunc(size.astype(lams.dtype) * ratio).astype(np.int64)
            centre = np.random.randint(0, np.broadcast_to(size, cut.shape))  # y, x of each sample in turn, as timm
            (top, left), (bottom, right) = (
                np.clip(edge, 0, size).T for edge in (centre - cut // 2, centre + (cut + 1) // 2)
            )
        if self.correct_lam or self.cutmix_minmax is not None:
            lams = 1 - (bottom - top) * (right - left) / float(size[0] * size[1])
        return (top, bottom, left, right), lams
