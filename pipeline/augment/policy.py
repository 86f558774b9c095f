"""RandAugment and colour jitter: which op each sample gets, how strong.

A level (timm: magnitude) lies in 0..10, or 0..mmax. Each op has its own scale from levels to arguments.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
from timm.data.auto_augment import AugmentOp, RandAugment, rand_augment_transform

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


def _draw_levels(op: AugmentOp, noise: np.ndarray) -> np.ndarray:
    """Levels from two uniform numbers each (..., 2), distributed as timm's op draws its own."""
    level = np.full(noise.shape[:-1], float(op.magnitude))
    if op.magnitude_std == math.inf:
        level = op.magnitude * noise[..., 0]
    elif op.magnitude_std > 0:
        level = op.magnitude + op.magnitude_std * normals(noise[..., 0], noise[..., 1])
    return np.clip(level, 0.0, op.magnitude_max or 10)


def read_policy(text: str) -> RandAugment:
    """timm's RandAugment for a string such as 'rand-m9-mstd0.5-inc1'.

    Raises:
        UsageError: for a string that is no RandAugment policy, or needs an op that is not covered.
    """
    if text.partition('-')[0] != 'rand':
        raise UsageError(f'--aa {text}: batched augmentation covers the rand-… policies only; use --augment pil')
    try:
        policy = rand_augment_transform(text, {'translate_const': 0})
        names = [op.name for op in policy.ops]
    except (AssertionError, ValueError, KeyError) as err:
        raise UsageError(f'--aa {text}: timm refuses this ({one_line(err)})') from None
    missing = [name for name in names if name not in OPS]
    if missing:
        raise UsageError(f'--aa {text}: batched augmentation does not cover {", ".join(missing)}; use --augment pil')
    if policy.choice_weights is not None and policy.num_layers > np.count_nonzero(policy.choice_weights):
        raise UsageError(f'--aa {text}: {policy.num_layers} ops of {len(names)} without replacement')
    return policy


def plan_ops(
    policy: RandAugment, keys: np.ndarray, size: Size, *, interpolation: str
) -> tuple[np.ndarray, np.ndarray, list[list[Step]]]:
    """The layers of RandAugment.

    Args:
        keys: of the samples (B,).
        interpolation: of `CUBIC_SHARE`.

    Returns:
        For each layer and sample the op as its position in the policy's, -1 where one was drawn but is not
        applied, (layers, B); the levels (layers, B); the steps of each layer.
    """
    num_layers, num_ops = policy.num_layers, len(policy.ops)
    numbers = uniforms(keys, Purpose.OPS, num_layers * 6).reshape(len(keys), num_layers, 6)
    if policy.choice_weights is None:  # with replacement, each as likely as the others
        ops = np.floor(numbers[:, :, 0] * num_ops).astype(np.int64)
    else:
        # In the order of exponential waiting times, ops are drawn in proportion to their weights, each once.
        waiting = -np.log1p(-uniforms(keys, Purpose.WEIGHTED_CHOICE, num_ops))
        with np.errstate(divide='ignore'):
            ops = np.argsort(waiting / policy.choice_weights, axis=1)[:, :num_layers]
    ops = np.where(numbers[:, :, 1] < policy.ops[0].prob, ops, -1)  # all ops share the settings
    levels = _draw_levels(policy.ops[0], numbers[:, :, 2:4])
    negative = numbers[:, :, 4] < 0.5
    cubic = numbers[:, :, 5] < CUBIC_SHARE[interpolation]
    layers = []
    for layer, codes in enumerate((2 * ops + cubic).T):  # a step for each pair of op and interpolation
        steps = []
        for code in np.unique(codes[codes >= 0]).tolist():
            info = OPS[policy.ops[code // 2].name]
            index = np.flatnonzero(codes == code)
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
