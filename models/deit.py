"""DeiT at 32 px: the baselines of DHVT's table 4. At 224 and 384 px timm itself has DeiT, with its published weights.

Touvron et al., "Training data-efficient image transformers & distillation through attention", ICML 2021; Lu et al.
2022 (DHVT), §4.2: DeiT-T has four heads there, in place of its own three.
"""

from __future__ import annotations

from typing import Any

from timm.data import IMAGENET_DEFAULT_MEAN, IMAGENET_DEFAULT_STD
from timm.models import build_model_with_cfg, generate_default_cfgs, register_model
from timm.models.vision_transformer import VisionTransformer

_CFG: dict[str, Any] = {
    'url': '',
    'num_classes': 100,
    'input_size': (3, 32, 32),
    'pool_size': None,
    'crop_pct': 1.0,
    'interpolation': 'bicubic',
    'fixed_input_size': True,
    'mean': IMAGENET_DEFAULT_MEAN,
    'std': IMAGENET_DEFAULT_STD,
    'first_conv': 'patch_embed.proj',
    'classifier': 'head',
    'license': 'apache-2.0',
    'paper_ids': 'arXiv:2012.12877',
}

default_cfgs = generate_default_cfgs(
    {f'deit_{size}_cifar_patch{patch}': _CFG for size in ('tiny', 'small') for patch in (4, 2)}
)


_TINY, _SMALL = {'embed_dim': 192, 'num_heads': 4}, {'embed_dim': 384, 'num_heads': 6}


def _create_deit(variant: str, pretrained: bool, sizes: dict[str, int], kwargs: dict[str, Any]) -> VisionTransformer:
    common = {'img_size': 32, 'depth': 12, 'num_classes': 100}
    features = {'out_indices': 3, 'feature_cls': 'getter'}
    return build_model_with_cfg(
        VisionTransformer, variant, pretrained, feature_cfg=features, **{**common, **sizes, **kwargs}
    )


@register_model
def deit_tiny_cifar_patch4(pretrained: bool = False, **kwargs: Any) -> VisionTransformer:
    """DeiT-T with four heads, patch 4, 32 px: 5.4M parameters."""
    return _create_deit('deit_tiny_cifar_patch4', pretrained, {'patch_size': 4, **_TINY}, kwargs)


@register_model
def deit_tiny_cifar_patch2(pretrained: bool = False, **kwargs: Any) -> VisionTransformer:
    """DeiT-T with four heads, patch 2, 32 px: 5.4M parameters."""
    return _create_deit('deit_tiny_cifar_patch2', pretrained, {'patch_size': 2, **_TINY}, kwargs)


@register_model
def deit_small_cifar_patch4(pretrained: bool = False, **kwargs: Any) -> VisionTransformer:
    """DeiT-S, patch 4, 32 px: 21.4M parameters."""
    return _create_deit('deit_small_cifar_patch4', pretrained, {'patch_size': 4, **_SMALL}, kwargs)


@register_model
def deit_small_cifar_patch2(pretrained: bool = False, **kwargs: Any) -> VisionTransformer:
    """DeiT-S, patch 2, 32 px: 21.4M parameters."""
    return _create_deit('deit_small_cifar_patch2', pretrained, {'patch_size': 2, **_SMALL}, kwargs)
