"""What a model costs: multiply-adds and images per second."""

from __future__ import annotations

import logging
import warnings
from collections.abc import Iterator
from contextlib import contextmanager

import torch
from torch import nn


@contextmanager
def plain_attention(model: nn.Module) -> Iterator[None]:
    """In its body attention is plain products, not the fused operator, which hides its weights and its cost."""
    fused = [module for module in model.modules() if getattr(module, 'fused_attn', False)]
    for module in fused:
        module.fused_attn = False  # type: ignore[assignment]
    try:
        yield
    finally:
        for module in fused:
            module.fused_attn = True  # type: ignore[assignment]


def count_macs(model: nn.Module, image_size: tuple[int, int, int]) -> int:
    """Multiply-adds of one image (C, H, W) by torchprofile's count, attention included."""
    from torchprofile import profile_macs  # the models themselves do without it

    model.eval()
    image = torch.zeros(1, *image_size, device=next(model.parameters()).device)
    with plain_attention(model), torch.no_grad(), warnings.catch_warnings():
        warnings.simplefilter('ignore')  # the tracer's remarks on shape checks, operators that cost nothing
        macs = profile_macs(model, image)
    assert isinstance(macs, int)
    return macs


def images_per_second(
    model: nn.Module,
    image_size: tuple[int, int, int],
    *,
    batch_size: int,
    amp_dtype: torch.dtype | None = None,
    seconds: float = 3.0,
) -> float:
    """The median speed of evaluation on made-up images (B, C, H, W) that already lie on the model's device.

    Args:
        model: is put into eval mode.
        batch_size: B.
        amp_dtype: autocast's type, None for float32.
        seconds: measures for at least so long.
    """
    logging.getLogger('torch.utils.cpp_extension').setLevel(logging.ERROR)  # which the import below loads for nothing
    from torch.utils.benchmark import Timer

    model.eval()
    device = next(model.parameters()).device
    images = torch.randn(batch_size, *image_size, device=device)

    def run() -> None:
        with torch.inference_mode(), torch.autocast(device.type, amp_dtype, enabled=amp_dtype is not None):
            model(images)[0].cpu()  # the copy waits for the device, whatever kind it is

    measurement = Timer('run()', globals={'run': run}, num_threads=torch.get_num_threads()).blocked_autorange(
        min_run_time=seconds
    )
    return batch_size / measurement.median
