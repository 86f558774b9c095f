"""EViT: a DeiT that keeps only the most attentive patch tokens after some of its blocks.

Liang et al., "Not All Patches are What You Need: Expediting Vision Transformers via Token Reorganizations", ICLR 2022,
https://arxiv.org/abs/2202.07800. Built on timm's vision transformer, with the state_dict keys of DeiT, so that a
DeiT's weights load and shrink at once. The file needs torch and timm only.

Shapes: B batch, n patch tokens (a fused one included), k kept ones, D embedding width, h heads, d = D/h.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from timm.models import build_model_with_cfg, generate_default_cfgs, register_model
from timm.models.deit import _cfg
from timm.models.vision_transformer import Block, VisionTransformer
from torch import Tensor
from torch.utils.checkpoint import checkpoint

__all__ = ['EViT', 'KeepRateSchedule']

KeepRate = float | Sequence[float] | None

BASE_KEEP_RATE = 0.7


class Kept(NamedTuple):
    """What a block did with its patch tokens: the indices of the kept ones (B, k), in descending order of attention,
    and all of their attention from the class token (B, n)."""

    indices: Tensor
    attention: Tensor


class ShrinkBlock(Block):
    """timm's block, which may keep only part of the patch tokens, (B, 1+n, D) -> (B, 1+k, D), or 1+k+1 with fusion.

    After attention, the class token's attention to the patch tokens, averaged over the heads, ranks them; the first
    ceil(keep rate * n) stay. Paper §3.2. A block whose own keep rate is 1 never shrinks.

    `keep_rate` is the block's own, used where `forward` gets none; with `fuse_token` one token is appended, the sum of
    the others weighted by that attention (not normalised). EViT sets both.
    """

    keep_rate: float = 1.0
    fuse_token: bool = False

    def _attend(self, x: Tensor) -> tuple[Tensor, Tensor]:
        """Attention of normed tokens (B, 1+n, D), and the class token's attention to the patch tokens (B, n).

        The fused kernel shows no attention, so its first row is made beside it.
        """
        attn: Any = self.attn
        batch, tokens, _ = x.shape
        qkv = attn.qkv(x).reshape(batch, tokens, 3, attn.num_heads, attn.head_dim).permute(2, 0, 3, 1, 4)
        q, k, v = qkv.unbind(0)  # (B, h, 1+n, d) each
        q, k = attn.q_norm(q), attn.k_norm(k)
        if attn.fused_attn:
            x = F.scaled_dot_product_attention(q, k, v, dropout_p=attn.attn_drop.p if self.training else 0.0)
            row = ((q[:, :, :1] * attn.scale) @ k.transpose(-2, -1)).softmax(dim=-1)  # (B, h, 1, 1+n)
        else:
            weights = ((q * attn.scale) @ k.transpose(-2, -1)).softmax(dim=-1)  # (B, h, 1+n, 1+n)
            x = attn.attn_drop(weights) @ v
            row = weights[:, :, :1]
        x = attn.proj_drop(attn.proj(attn.norm(x.transpose(1, 2).flatten(2))))  # (B, 1+n, D)
        return x, row[:, :, 0, 1:].mean(dim=1)

    def shrink(self, x: Tensor, keep_rate: float | None = None) -> tuple[Tensor, Kept | None]:
        """The block's output, and what it kept; None if it kept all.

        Args:
            x: (B, 1+n, D), the class token first.
            keep_rate: in place of the block's own, if that is below 1.
        """
        rate = self.keep_rate if keep_rate is None or self.keep_rate >= 1 else keep_rate
        num_patches = x.shape[1] - 1
        num_kept = math.ceil(rate * num_patches)
        if num_kept >= num_patches:
            return super().forward(x), None
        update, attention = self._attend(self.norm1(x))
        x = x + self.drop_path1(self.ls1(update))
        indices = attention.topk(num_kept, dim=1).indices  # (B, k)
        patches = x[:, 1:]
        kept = patches.gather(1, indices[:, :, None].expand(-1, -1, x.shape[2]))  # (B, k, D)
        parts = [x[:, :1], kept]
        if self.fuse_token:
            others = attention.scatter(1, indices, 0.0)  # (B, n)
            parts.append((others[:, None].to(x.dtype) @ patches).to(x.dtype))  # (B, 1, D)
        x = torch.cat(parts, dim=1)
        return x + self.drop_path2(self.ls2(self.mlp(self.norm2(x)))), Kept(indices, attention)

    def forward(self, x: Tensor, keep_rate: float | None = None) -> Tensor:  # type: ignore[override]
        return self.shrink(x, keep_rate)[0]


class EViT(VisionTransformer):
    """The whole model: timm's vision transformer with shrinking blocks. Its weights are a DeiT's.

    Args:
        base_keep_rate: the part of the patch tokens that each shrinking block keeps, above 0, at most 1.
        drop_loc: the numbers of the shrinking blocks, from 0 on.
        fuse_token: fuse the others into one token, in place of dropping them.
        **kwargs: timm's VisionTransformer's, without distillation.

    Raises:
        ValueError: for a keep rate outside its range, blocks that are not there, or tokens beside class and patches.
    """

    def __init__(
        self,
        *,
        base_keep_rate: float = BASE_KEEP_RATE,
        drop_loc: Sequence[int] = (3, 6, 9),
        fuse_token: bool = False,
        **kwargs: Any,
    ) -> None:
        if not 0 < base_keep_rate <= 1:
            raise ValueError(f'base_keep_rate must be above 0, at most 1, not {base_keep_rate}')
        super().__init__(block_fn=ShrinkBlock, **kwargs)
        if self.num_prefix_tokens != 1 or self.cls_token is None:
            raise ValueError('EViT needs a class token and no other tokens beside the patches')
        wrong = [number for number in drop_loc if not 0 <= number < len(self.blocks)]
        if wrong:
            raise ValueError(f'drop_loc names block {wrong[0]}, but there are 0 to {len(self.blocks) - 1}')
        for number in drop_loc:
            self.blocks[number].keep_rate = base_keep_rate  # type: ignore[assignment]
        for block in self.blocks:
            block.fuse_token = fuse_token  # type: ignore[assignment]

    def _rates(self, keep_rate: KeepRate) -> Sequence[float | None]:
        if isinstance(keep_rate, Sequence):
            if len(keep_rate) != len(self.blocks):
                raise ValueError(f'{len(keep_rate)} keep rates for {len(self.blocks)} blocks')
            return keep_rate
        return [keep_rate] * len(self.blocks)

    def _embed(self, x: Tensor) -> Tensor:
        return self.norm_pre(self.patch_drop(self._pos_embed(self.patch_embed(x))))  # (B, 1+N, D)

    def forward_features(self, x: Tensor, keep_rate: KeepRate = None) -> Tensor:  # type: ignore[override]
        """(B, C, H, W) -> the tokens that are left, after the final norm; the class token first."""
        x = self._embed(x)
        for block, rate in zip(self.blocks, self._rates(keep_rate), strict=True):
            if self.grad_checkpointing and torch.is_grad_enabled():
                x = checkpoint(block, x, rate, use_reentrant=False)
            else:
                x = block(x, rate)
        return self.norm(x)

    def forward(self, x: Tensor, keep_rate: KeepRate = None) -> Tensor:  # type: ignore[override]
        """(B, C, H, W) -> logits (B, num_classes).

        Args:
            keep_rate: for the shrinking blocks in place of their own, one for all or one for each block of the model.
        """
        return self.forward_head(self.forward_features(x, keep_rate))

    def forward_kept(self, x: Tensor, keep_rate: KeepRate = None) -> tuple[Tensor, dict[int, Kept]]:
        """As `forward`, and what each block that shrank has kept, by its number."""
        x = self._embed(x)
        found = {}
        for number, (block, rate) in enumerate(zip(self.blocks, self._rates(keep_rate), strict=True)):
            x, kept = block.shrink(x, rate)  # type: ignore[operator]
            if kept is not None:
                found[number] = kept
        return self.forward_head(self.norm(x)), found

    def forward_intermediates(self, *args: Any, **kwargs: Any) -> Any:
        """Raises NotImplementedError: after the first shrinking block there is no grid of tokens."""
        raise NotImplementedError('EViT has no feature maps: its tokens leave the grid; use the DeiT of these weights')


@dataclass(frozen=True, kw_only=True)
class KeepRateSchedule:
    """The keep rate of each training step: 1, then a cosine down, then the base rate. Published adjust_keep_rate."""

    base_keep_rate: float  # at the end
    start_epoch: int  # the first epoch of the descent
    epochs: int  # its length; 0 goes to the base rate at once

    def __call__(self, epoch: int, step: int, steps: int) -> float:
        """The rate at a step of an epoch of `steps` steps, all counted from 0."""
        if epoch < self.start_epoch:
            return 1.0
        if epoch >= self.start_epoch + self.epochs:
            return self.base_keep_rate
        progress = (epoch - self.start_epoch + step / steps) / self.epochs
        return self.base_keep_rate + (1 - self.base_keep_rate) * 0.5 * (1 + math.cos(math.pi * progress))


default_cfgs = generate_default_cfgs(
    {f'deit_{size}_patch16_shrink_base': _cfg(paper_ids='arXiv:2202.07800') for size in ('tiny', 'small', 'base')}
)


def _create_evit(variant: str, pretrained: bool, defaults: dict[str, Any], kwargs: dict[str, Any]) -> EViT:
    if kwargs.get('features_only'):
        raise RuntimeError('EViT has no feature maps: its tokens leave the grid; use the DeiT of these weights')
    return build_model_with_cfg(EViT, variant, pretrained, **{'patch_size': 16, 'depth': 12, **defaults, **kwargs})


@register_model
def deit_tiny_patch16_shrink_base(pretrained: bool = False, **kwargs: Any) -> EViT:
    """EViT on DeiT-T, 224 px: 5.7M parameters."""
    return _create_evit('deit_tiny_patch16_shrink_base', pretrained, {'embed_dim': 192, 'num_heads': 3}, kwargs)


@register_model
def deit_small_patch16_shrink_base(pretrained: bool = False, **kwargs: Any) -> EViT:
    """EViT on DeiT-S, 224 px: 22.1M parameters; 3.0 G multiply-adds at keep rate 0.7."""
    return _create_evit('deit_small_patch16_shrink_base', pretrained, {'embed_dim': 384, 'num_heads': 6}, kwargs)


@register_model
def deit_base_patch16_shrink_base(pretrained: bool = False, **kwargs: Any) -> EViT:
    """EViT on DeiT-B, 224 px: 86.6M parameters."""
    return _create_evit('deit_base_patch16_shrink_base', pretrained, {'embed_dim': 768, 'num_heads': 12}, kwargs)
