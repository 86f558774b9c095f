"""DHVT with a distillation token, for training with a teacher (`--distillation-type`). It needs dhvt.py beside it.

This project's own: the paper has no distilled model.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from timm.layers import trunc_normal_
from timm.models import generate_default_cfgs, register_model
from torch import Tensor, nn

from . import dhvt
from .dhvt import DHVT, create_dhvt

__all__ = ['DistilledDHVT']


class DistilledDHVT(DHVT):
    """DHVT with a distillation token after the class token and a head on it, as DeiT (Touvron et al. 2021) has them.

    Attention and feed-forward treat both tokens alike. After `set_distilled_training()`, `forward` gives the logits of
    both heads in training mode, and otherwise their mean.

    Args:
        global_pool: 'token', and no other: the heads read the two tokens.
    """

    num_prefix_tokens = 2

    def __init__(self, **kwargs: Any) -> None:
        super().__init__(**kwargs)
        self.dist_token = nn.Parameter(torch.zeros(1, 1, self.embed_dim))
        self.head_dist = self._new_head()
        self.distilled_training = False
        trunc_normal_(self.dist_token, std=0.02)

    @staticmethod
    def _check_pool(global_pool: str) -> None:
        if global_pool != 'token':
            raise ValueError(f"a distilled model's global_pool must be 'token', not {global_pool!r}")

    @torch.jit.ignore
    def set_distilled_training(self, enable: bool = True) -> None:
        """Makes `forward` return (class logits, distillation logits) in training mode."""
        self.distilled_training = enable

    @torch.jit.ignore
    def get_classifier(self) -> Any:
        return self.head, self.head_dist

    def reset_classifier(self, num_classes: int, global_pool: str | None = None) -> None:
        """Puts newly initialised heads in place; 0 classes remove them."""
        super().reset_classifier(num_classes, global_pool)
        self.head_dist = self._new_head()

    def _prefix_tokens(self) -> Tensor:
        return torch.cat([self.cls_token, self.dist_token], dim=1)

    def forward_head(self, x: Tensor, pre_logits: bool = False) -> Any:
        """(B, 2+N, D) -> logits (B, num_classes), a pair of them, or with `pre_logits` the tokens' mean (B, D)."""
        if pre_logits:
            return x[:, :2].mean(dim=1)
        logits, logits_dist = self.head(x[:, 0]), self.head_dist(x[:, 1])
        if self.distilled_training and self.training:
            return logits, logits_dist
        return (logits + logits_dist) / 2


default_cfgs = generate_default_cfgs(
    {
        f'{name}_distilled': {**cfgs.default.to_dict(), 'classifier': ('head', 'head_dist')}
        for name, cfgs in dhvt.default_cfgs.items()
    }
)


def _entry_point(name: str) -> Callable[..., DHVT]:
    """timm's entry point for a variant of dhvt.py with a distillation token."""

    def create(pretrained: bool = False, **kwargs: Any) -> DHVT:
        return create_dhvt(create.__name__, pretrained, **{'model_cls': DistilledDHVT, **kwargs})

    create.__name__ = create.__qualname__ = f'{name}_distilled'
    create.__doc__ = f'`{name}` with a distillation token.'
    return register_model(create)


globals().update({f'{name}_distilled': _entry_point(name) for name in dhvt.default_cfgs})
