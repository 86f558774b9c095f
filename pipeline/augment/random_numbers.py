"""Random numbers that are a function of a sample's draw.

SplitMix64 (G. L. Steele et al., Fast splittable pseudorandom number generators, OOPSLA 2014) as a function of a
counter: the n-th number of a key is mix(key + n * GOLDEN). A sample's key is a hash of its draw, so its numbers do
not depend on the samples around it, nor on how many numbers another purpose takes.
"""

from __future__ import annotations

import math
from enum import IntEnum

import numpy as np
import torch
from torch import Tensor

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
    """uint64 (B,), which stand for (seed, epoch, image, repeat), of draws int64 (B, 3): image, epoch, repeat."""
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


def normals(first: np.ndarray, second: np.ndarray) -> np.ndarray:
    """Standard normal numbers from two uniform ones each (G. E. P. Box and M. E. Muller, 1958)."""
    return np.sqrt(-2 * np.log1p(-first)) * np.cos(2 * math.pi * second)


def device_normals(keys: Tensor, counters: Tensor) -> Tensor:
    """Standard normal numbers (N, 3), a function of keys and counters alone, made where these are.

    Devices agree on the bits that are drawn; logarithms and cosines differ in the last place.

    Args:
        keys: int64 (N,).
        counters: int64 (N,), from 0 on for each key.
    """
    # PyTorch computes with int64: less 2**64, the constants are those with the same bits.
    numbers = keys + torch.stack((2 * counters + 1, 2 * counters + 2)) * (GOLDEN - 2**64)  # (2, N)
    for shift, factor in MIX:
        numbers = (numbers ^ (numbers >> shift & (1 << 64 - shift) - 1)) * (factor - 2**64)
    numbers = numbers ^ (numbers >> LAST_SHIFT & (1 << 64 - LAST_SHIFT) - 1)
    bits = (1 << 24) - 1
    radius = ((numbers >> 40 & bits) + 1).float().mul_(2.0**-24).log_().mul_(-2).sqrt_()
    angle = (numbers >> 8 & bits).float().mul_(2 * math.pi * 2.0**-24)
    return torch.stack((radius[0] * angle[0].cos(), radius[0] * angle[0].sin(), radius[1] * angle[1].cos()), dim=1)
