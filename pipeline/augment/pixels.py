"""Ops on pixels, on the device.

Each takes uint8 (k, 3, H, W) and gives the same. Pillow's ImageEnhance computes in float32 and truncates, its affine
transform in float64. The order of operations below is that of its C sources, and no fused multiply-add is used.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor
from torchvision.transforms.v2.functional import equalize

from pipeline.augment.steps import real_dtype


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
    scale = torch.full((1,), 255, dtype=real_dtype(pixels.device), device=pixels.device) / (high - low).clamp(min=1)
    stretched = (ramp * scale).add_(-low * scale).clamp_(0, 255)
    return torch.where(high > low, stretched.to(torch.uint8), ramp.to(torch.uint8))


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
    """Does a step's work on some of the images, uint8 (B, 3, H, W), in place.

    Args:
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
        out = equalize(pixels)  # the one op of torchvision's whose bits are Pillow's
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
