"""DeiT at 32 px: the baselines of DHVT's table 4. At 224 and 384 px timm itself has DeiT, with its published weights.

Touvron et al., "Training data-efficient image transformers & distillation through attention", ICML 2021; Lu et al.
2022 (DHVT), §4.2: DeiT-T has four heads there, in place of its own three.
"""

from __future__ import annotations

from typing import Any

from timm.models import generate_default_cfgs, register_model
from timm.models.deit import _cfg, _create_deit
from timm.models.vision_transformer import VisionTransformer

_VARIANTS = {
    'deit_tiny_cifar_patch4': {'patch_size': 4, 'embed_dim': 192, 'num_heads': 4},
    'deit_tiny_cifar_patch2': {'patch_size': 2, 'embed_dim': 192, 'num_heads': 4},
    'deit_small_cifar_patch4': {'patch_size': 4, 'embed_dim': 384, 'num_heads': 6},
    'deit_small_cifar_patch2': {'patch_size': 2, 'embed_dim': 384, 'num_heads': 6},
}
default_cfgs = generate_default_cfgs(
    dict.fromkeys(_VARIANTS, _cfg(num_classes=100, input_size=(3, 32, 32), crop_pct=1.0, paper_ids='arXiv:2012.12877'))
)


def _create(variant: str, pretrained: bool, kwargs: dict[str, Any]) -> VisionTransformer:
    sizes = {'img_size': 32, 'depth': 12, 'num_classes': 100, **_VARIANTS[variant]}
    return _create_deit(variant, pretrained, **{**sizes, **kwargs})


@register_model
def deit_tiny_cifar_patch4(pretrained: bool = False, **kwargs: Any) -> VisionTransformer:
    """DeiT-T with four heads, patch 4, 32 px: 5.4M parameters."""
    return _create('deit_tiny_cifar_patch4', pretrained, kwargs)


@register_model
def deit_tiny_cifar_patch2(pretrained: bool = False, **kwargs: Any) -> VisionTransformer:
    """DeiT-T with four heads, patch 2, 32 px: 5.4M parameters."""
    return _create('deit_tiny_cifar_patch2', pretrained, kwargs)


@register_model
def deit_small_cifar_patch4(pretrained: bool = False, **kwargs: Any) -> VisionTransformer:
    """DeiT-S, patch 4, 32 px: 21.4M parameters."""
    return _create('deit_small_cifar_patch4', pretrained, kwargs)


@register_model
def deit_small_cifar_patch2(pretrained: bool = False, **kwargs: Any) -> VisionTransformer:
    """DeiT-S, patch 2, 32 px: 21.4M parameters."""
    return _create('deit_small_cifar_patch2', pretrained, kwargs)
