"""RandAugment and colour jitter: which op each sample gets, how strong.

A level (timm: magnitude) lies in 0..10, or 0..mmax. Each op has its own scale from levels to arguments.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
from timm.data.auto_augment import rand_augment_transform

from pipeline.augment.random_numbers import Purpose, normals, uniforms
from pipeline.augment.steps import Size, Step, make_step, merge_steps
from utils import UsageError, one_line

# The part of geometric ops that interpolate cubically, by timm's name for the training crop's interpolation.
CUBIC_SHARE = {'bilinear': 0.0, 'random': 0.5, 'bicubic': 1.0}


def _signed(level: np.ndarray, negative: np.ndarray) -> np.ndarray:
    return np.where(negative, -1.0, 1.0) * level


def _at_random_side_of_one(level: np.ndarray, negative: np.ndarray) -> np.ndarray:
    return np.maximum(0.1, 1.0 + _signed(level / 10 * 0.9, negative))


def _between(level: np.ndarray, low: float, high: float) -> np.ndarray:
    return np.clip(low + (high - low) * (level / 10), low, high)


def _whole(level: np.ndarray, at_ten: int) -> np.ndarray:
    return np.trunc(level / 10 * at_ten).astype(np.int64)


@dataclass(frozen=True)
class OpInfo:
    """An op of timm's table: what it does, and its argument (k,) from levels (k,) and signs (k,), if it takes one."""

    kind: str
    argument: Callable[[np.ndarray, np.ndarray], np.ndarray] | None = None


OPS = {
    'AutoContrast': OpInfo('autocontrast'),
    'Equalize': OpInfo('equalize'),
    'Invert': OpInfo('invert'),
    'Rotate': OpInfo('rotate', lambda level, negative: _signed(level / 10 * 30, negative)),
    'Posterize': OpInfo('posterize', lambda level, _: _whole(level, 4)),
    'PosterizeIncreasing': OpInfo('posterize', lambda level, _: 4 - _whole(level, 4)),
    'PosterizeOriginal': OpInfo('posterize', lambda level, _: _whole(level, 4) + 4),
    'Solarize': OpInfo('solarize', lambda level, _: np.minimum(256, _whole(level, 256))),
    'SolarizeIncreasing': OpInfo('solarize', lambda level, _: np.maximum(0, 256 - _whole(level, 256))),
    'SolarizeAdd': OpInfo('solarize_add', lambda level, _: np.minimum(128, _whole(level, 110))),
    'Color': OpInfo('color', lambda level, _: level / 10 * 1.8 + 0.1),
    'ColorIncreasing': OpInfo('color', _at_random_side_of_one),
    'Contrast': OpInfo('contrast', lambda level, _: level / 10 * 1.8 + 0.1),
    'ContrastIncreasing': OpInfo('contrast', _at_random_side_of_one),
    'Brightness': OpInfo('brightness', lambda level, _: level / 10 * 1.8 + 0.1),
    'BrightnessIncreasing': OpInfo('brightness', _at_random_side_of_one),
    'Sharpness': OpInfo('sharpness', lambda level, _: level / 10 * 1.8 + 0.1),
    'SharpnessIncreasing': OpInfo('sharpness', _at_random_side_of_one),
    'ShearX': OpInfo('shear_x', lambda level, negative: _signed(level / 10 * 0.3, negative)),
    'ShearY': OpInfo('shear_y', lambda level, negative: _signed(level / 10 * 0.3, negative)),
    'TranslateXRel': OpInfo('translate_x_rel', lambda level, negative: _signed(level / 10 * 0.45, negative)),
    'TranslateYRel': OpInfo('translate_y_rel', lambda level, negative: _signed(level / 10 * 0.45, negative)),
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
            level = self.magnitude + self.magnitude_std * normals(noise[..., 0], noise[..., 1])
        return np.clip(level, 0.0, self.magnitude_max)


def read_policy(text: str) -> Policy:
    """A policy from timm's own reading of a string such as 'rand-m9-mstd0.5-inc1'.

    Raises:
        UsageError: for a string that is no RandAugment policy, or needs an op that is not covered.
    """
    if text.partition('-')[0] != 'rand':
        raise UsageError(f'--aa {text}: batched augmentation covers the rand-… policies only; use --augment pil')
    try:
        transform = rand_augment_transform(text, {'translate_const': 0})
        first = transform.ops[0]
    except (AssertionError, ValueError, KeyError, IndexError) as err:
        raise UsageError(f'--aa {text}: timm refuses this ({one_line(err)})') from None
    names, num_layers, weights = tuple(op.name for op in transform.ops), transform.num_layers, transform.choice_weights
    missing = [name for name in names if name not in OPS]
    if missing:
        raise UsageError(f'--aa {text}: batched augmentation does not cover {", ".join(missing)}; use --augment pil')
    if weights is not None and num_layers > np.count_nonzero(weights):
        raise UsageError(f'--aa {text}: {num_layers} ops of {len(names)} without replacement')
    most = first.magnitude_max or 10
    return Policy(names, num_layers, first.prob, first.magnitude, first.magnitude_std, most, weights)


def plan_ops(
    policy: Policy, keys: np.ndarray, size: Size, *, interpolation: str
) -> tuple[np.ndarray, np.ndarray, list[list[Step]]]:
    """The layers of RandAugment.

    Args:
        keys: of the samples (B,).
        interpolation: of `CUBIC_SHARE`.

    Returns:
        For each layer and sample the op as its position in the policy's names, -1 where one was drawn but is not
        applied, (layers, B); the levels (layers, B); the steps of each layer.
    """
    num_layers, num_ops = policy.num_layers, len(policy.names)
    numbers = uniforms(keys, Purpose.OPS, num_layers * 6).reshape(len(keys), num_layers, 6)
    if policy.weights is None:
        ops = np.floor(numbers[:, :, 0] * num_ops).astype(np.int64)
    else:
        # In the order of exponential waiting times, ops are drawn in proportion to their weights, each once.
        waiting = -np.log1p(-uniforms(keys, Purpose.WEIGHTED_CHOICE, num_ops))
        with np.errstate(divide='ignore'):
            ops = np.argsort(waiting / policy.weights, axis=1)[:, :num_layers]
    ops = np.where(numbers[:, :, 1] < policy.prob, ops, -1)
    levels = policy.levels(numbers[:, :, 2:4])
    negative = numbers[:, :, 4] < 0.5
    cubic = numbers[:, :, 5] < CUBIC_SHARE[interpolation]
    # Sorted by interpolation inside of ops: a run of each pair is one step.
    codes = np.where(ops < 0, -1, 2 * ops + cubic)
    layers = []
    for layer in range(num_layers):
        order = np.argsort(codes[:, layer], kind='stable')
        present, first = np.unique(codes[order, layer], return_index=True)
        steps = []
        for code, index in zip(present.tolist(), np.split(order, first[1:]), strict=True):
            if code >= 0:
                info = OPS[policy.names[code // 2]]
                argument = levels[index, layer]
                if info.argument is not None:
                    argument = info.argument(argument, negative[index, layer])
                steps.append(make_step(info.kind, index, argument, size, cubic=bool(code % 2)))
        layers.append(merge_steps(steps))
    return ops.T, levels.T, layers


def plan_jitter(strength: float, keys: np.ndarray, size: Size) -> list[list[Step]]:
    """The layers of torchvision's ColorJitter: brightness, contrast and saturation, in random order."""
    numbers = uniforms(keys, Purpose.JITTER, 6)
    order = np.argsort(numbers[:, :3], axis=1)
    low = max(0.0, 1 - strength)
    factors = low + (1 + strength - low) * numbers[:, 3:]
    layers = []
    for place in range(3):
        steps = []
        for number, kind in enumerate(('brightness', 'contrast', 'color')):
            index = np.flatnonzero(order[:, place] == number)
            steps.append(make_step(kind, index, factors[index, number], size))
        layers.append(merge_steps(steps))
    return layers
