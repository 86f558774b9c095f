"""What the host gives the device to do: ops with their parameters, for the samples of a batch that get them."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

Size = tuple[int, int]  # height, width
_RAMP = np.arange(256)
# Where the new value of a pixel depends on its old value and an argument alone: all new values (k, 256) for (k, 1).
TABLES: dict[str, Callable[[np.ndarray], np.ndarray]] = {
    'invert': lambda any_number: np.broadcast_to(255 - _RAMP, (len(any_number), 256)),
    'posterize': lambda bits: _RAMP & -(1 << np.clip(8 - bits.astype(np.int64), 0, 8)),
    'solarize': lambda threshold: np.where(threshold > _RAMP, _RAMP, 255 - _RAMP),
    'solarize_add': lambda added: np.where(_RAMP < 128, np.minimum(255, _RAMP + added), _RAMP),
    'brightness': lambda factor: np.clip(factor.astype(np.float32) * _RAMP.astype(np.float32), 0, 255),
}


@dataclass
class Step:
    """One kind of work for samples `index` (k,) with parameters `values` (k, …), both on the host."""

    kind: str
    index: np.ndarray
    values: np.ndarray
    cubic: bool = True


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
    """Pillow's three box blurs in a Gaussian one's place: (k, 3): the weights of full and of edge pixels in 2**-24,
    and the whole radius.

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

    Args:
        kind: of `OpInfo`.
        index: the samples (k,).
        argument: theirs (k,).
        cubic: bicubic or bilinear, where the op interpolates.
    """
    column, zeros = argument[:, None], np.zeros(len(argument))
    if kind in TABLES:
        return Step('table', index, TABLES[kind](column).astype(np.uint8))
    if kind == 'rotate':
        return Step('affine', index, _rotation(argument, size), cubic)
    if kind in ('shear_x', 'shear_y'):
        return Step(f'shift_{kind[-1]}', index, np.stack((argument, zeros), axis=1), cubic)
    if kind in ('translate_x_rel', 'translate_y_rel'):
        pixels = argument * (size[1] if kind == 'translate_x_rel' else size[0])
        return Step(f'shift_{kind.split("_")[1]}', index, np.stack((zeros, pixels), axis=1), cubic)
    if kind == 'desaturate':
        return Step('color', index, np.clip(1.0 - column, 0.0, 1.0))
    if kind == 'gaussian_blur':
        return Step('box_blurs', index, _box_blurs(argument))
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


def real_dtype(device: torch.device) -> torch.dtype:
    """The type of arguments and coordinates, which only MPS does not have."""
    return torch.float32 if device.type == 'mps' else torch.float64


def send(arrays: Sequence[np.ndarray], device: torch.device) -> list[Tensor]:
    """Arrays as tensors on a device: whole numbers as int64, uint8 as it is, the rest as `real_dtype`.

    All of one type travel in one copy from pinned memory, which the host does not wait for.
    """
    kinds = [
        torch.uint8 if array.dtype == np.uint8 else torch.int64 if array.dtype.kind in 'iu' else real_dtype(device)
        for array in arrays
    ]
    parts = {}
    for kind in set(kinds):
        group = [array.reshape(-1) for array, its_kind in zip(arrays, kinds, strict=True) if its_kind == kind]
        joined = torch.from_numpy(np.concatenate(group)).to(kind)
        if device.type == 'cuda':
            joined = joined.pin_memory()
        parts[kind] = iter(joined.to(device, non_blocking=True).split([array.size for array in group]))
    return [next(parts[kind]).view(array.shape) for array, kind in zip(arrays, kinds, strict=True)]
