"""A moving average of a model's weights that costs little on the host."""

from __future__ import annotations

import torch
from timm.utils import ModelEmaV3
from torch import Tensor, nn


class MovingAverage(ModelEmaV3):
    """timm's ModelEmaV3, which looks up all weights by name at each update, with its lists of tensors made once.

    Its formula and its state are unchanged. With `use_warmup` it counts the updates itself; `updates`, those before the
    next one, is set where a run goes on. Neither the model nor the average may get other tensors afterwards:
    loading a state copies into those that are there.
    """

    def __init__(
        self, model: nn.Module, *, decay: float, use_warmup: bool = False, device: torch.device | None = None
    ) -> None:
        super().__init__(model, decay=decay, use_warmup=use_warmup, device=device)
        self.updates = 0
        self._lists: tuple[list[Tensor], ...] | None = None

    @torch.no_grad()
    def update(self, model: nn.Module, step: int | None = None) -> None:
        self.updates += 1
        if self.use_warmup and step is None:
            step = self.updates
        if not self.foreach:  # the average lies elsewhere
            super().update(model, step)
            return
        if self._lists is None:
            pairs = list(zip(self.module.state_dict().values(), model.state_dict().values(), strict=True))
            floats = [pair for pair in pairs if pair[0].is_floating_point()]
            counts = [pair for pair in pairs if not pair[0].is_floating_point()]
            self._lists = tuple([pair[i] for pair in group] for group in (floats, counts) for i in (0, 1))
        own, others, own_counts, other_counts = self._lists
        torch._foreach_lerp_(own, others, weight=1.0 - self.get_decay(step))
        if own_counts:
            torch._foreach_copy_(own_counts, other_counts)
