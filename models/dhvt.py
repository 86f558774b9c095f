"""DHVT, the Dynamic Hybrid Vision Transformer, in the order of the paper's section 3.

Lu, Xie, Liu, Zhang: "Bridging the Gap Between Vision Transformers and Convolutional Neural Networks on Small
Datasets", NeurIPS 2022, https://arxiv.org/abs/2210.05958. Where the paper and its published code differ, the code is
followed, because its numbers were made with it; such a place is marked "published code". Checkpoints of the published
code load with `strict=True`.

The file needs torch, timm and einops only and can be copied alone. distilled.py adds a distillation token, ablations.py
has what the paper's ablations put in the place of its modules.

Shapes: B batch, C image channels, H and W the image's height and width, P patch size, N = (H/P)(W/P) patch tokens,
D embedding width, h heads, d = D/h, T = 1+N+h tokens in attention. The first of 1+N tokens is the class token; where
there are more prefix tokens, each is treated as it is.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager, nullcontext
from functools import partial
from itertools import pairwise
from typing import Any, Literal

import torch
import torch.nn.functional as F
from einops import rearrange
from timm.layers import Attention, DropPath, global_pool_nlc, to_2tuple, trunc_normal_
from timm.models import build_model_with_cfg, generate_default_cfgs, register_model
from timm.models._features import feature_take_indices
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm
from torch.utils.checkpoint import checkpoint

__all__ = ['DHVT']

Grid = tuple[int, int]
LayerNorm = partial(nn.LayerNorm, eps=1e-6)


class Affine(nn.Module):
    """A learnable scale and shift of each channel, (B, C, H, W) -> (B, C, H, W). Paper §3.1, eq. 1."""

    def __init__(self, *, dim: int) -> None:
        super().__init__()
        self.alpha = nn.Parameter(torch.ones(1, dim, 1, 1))
        self.beta = nn.Parameter(torch.zeros(1, dim, 1, 1))

    def forward(self, x: Tensor) -> Tensor:
        return x * self.alpha + self.beta


class SequentialOverlapPatchEmbed(nn.Module):
    """SOPE, the stem: log2(P) convolutions of stride 2 between two affines. Paper §3.1, eqs. 1 to 3.

    Each convolution has half as many output channels as the next one; the last has D. Maps an image (B, C, H, W) to
    its patch tokens (B, N, D) in row-major order, and also returns their grid (H/P, W/P).

    Raises:
        ValueError: if the patch size is not a power of two from 2 up, if it does not divide the image's height and
            width (`img_size` here, the image itself in `forward`), or if the width cannot be halved often enough.
    """

    def __init__(
        self,
        *,
        img_size: int | tuple[int, int] = 224,
        patch_size: int = 16,
        in_chans: int = 3,
        embed_dim: int = 192,
        norm_layer: Callable[[int], nn.Module] = nn.BatchNorm2d,
    ) -> None:
        super().__init__()
        if patch_size < 2 or patch_size & (patch_size - 1):
            raise ValueError(f'patch_size must be a power of two (2, 4, 8, …), not {patch_size}')
        num_convs = patch_size.bit_length() - 1
        if embed_dim < 1 or embed_dim % 2 ** (num_convs - 1):
            raise ValueError(f'patch_size {patch_size} needs embed_dim {embed_dim} halved {num_convs - 1} times')
        self.patch_size = patch_size
        self.set_input_size(img_size)

        widths = [in_chans] + [embed_dim // 2**i for i in reversed(range(num_convs))]
        layers: list[nn.Module] = []
        for width_in, width_out in pairwise(widths):
            conv = nn.Conv2d(width_in, width_out, kernel_size=3, stride=2, padding=1, bias=False)
            layers += [nn.Sequential(conv, norm_layer(width_out)), nn.GELU()]
        if num_convs > 1:  # published code: no GELU after the last convolution, unless it is the only one
            layers.pop()
        self.pre_affine = Affine(dim=in_chans)
        self.proj = nn.Sequential(*layers)
        self.post_affine = Affine(dim=embed_dim)

    def set_input_size(self, img_size: int | tuple[int, int]) -> None:
        """Declares the image size, in pixels. No parameter depends on it."""
        height, width = to_2tuple(img_size)
        self.grid_size = self._grid(height, width)
        self.img_size = (height, width)
        self.num_patches = self.grid_size[0] * self.grid_size[1]

    def _grid(self, height: int, width: int) -> Grid:
        if height % self.patch_size or width % self.patch_size:
            raise ValueError(f'image size {height}x{width} is not divisible by patch size {self.patch_size}')
        return height // self.patch_size, width // self.patch_size

    def forward(self, x: Tensor) -> tuple[Tensor, Grid]:
        grid = self._grid(x.shape[-2], x.shape[-1])
        x = self.post_affine(self.proj(self.pre_affine(x)))  # (B, D, H/P, W/P)
        return rearrange(x, 'b d h w -> b (h w) d'), grid  # (B, N, D)


class SelfAttention(Attention):
    """timm's self-attention in two parts: `attend`, and the last dropout, which subclasses apply in `forward`.

    Raises:
        ValueError: if the number of heads does not divide the width.
    """

    def __init__(self, *, dim: int, num_heads: int = 3, num_prefix_tokens: int = 1, **kwargs: Any) -> None:
        if num_heads < 1 or dim % num_heads:
            raise ValueError(f'embedding width {dim} is not divisible by {num_heads} heads')
        super().__init__(dim, num_heads, **{'qkv_bias': True, **kwargs})
        self.num_prefix_tokens = num_prefix_tokens

    def attend(self, x: Tensor) -> Tensor:
        """Any tokens (B, T, D) to the same shape."""
        q, k, v = rearrange(self.qkv(x), 'b t (qkv h d) -> qkv b h t d', qkv=3, h=self.num_heads)
        # On CPUs the fused kernel's backward is several times slower than the plain products. A trace has one way only.
        if self.fused_attn and (x.device.type != 'cpu' or not torch.is_grad_enabled() or torch.jit.is_tracing()):
            x = F.scaled_dot_product_attention(q, k, v, dropout_p=self.attn_drop.p if self.training else 0.0)
        else:
            attn = (q @ k.transpose(-2, -1)) * self.scale  # (B, h, T, T)
            x = self.attn_drop(attn.softmax(dim=-1)) @ v  # (B, h, T, d)
        return self.proj(rearrange(x, 'b h t d -> b t (h d)'))  # (B, T, D)


class HeadInteractedAttention(SelfAttention):
    """HI-MHSA: self-attention in which one token for each head takes part. Paper §3.3, eqs. 6 and 7.

    A head token is a projection of that head's share of the mean token. The h of them attend and are attended to
    beside the class and patch tokens; afterwards their mean is added to the class token and they are dropped.
    Maps (B, 1+N, D) to the same shape.
    """

    def __init__(self, *, dim: int, **kwargs: Any) -> None:
        super().__init__(dim=dim, **kwargs)
        self.ht_proj = nn.Linear(self.head_dim, dim)
        self.ht_norm = nn.LayerNorm(self.head_dim)  # published code: eps 1e-5, unlike the other norms
        self.act = nn.GELU()
        self.pos_embed = nn.Parameter(torch.zeros(1, self.num_heads, dim))  # the head embedding; decayed, see DHVT
        trunc_normal_(self.pos_embed, std=0.02)

    def head_tokens(self, x: Tensor) -> Tensor:
        """(B, 1+N, D) -> (B, h, D), one token for each head."""
        heads = rearrange(x.mean(dim=1), 'b (h d) -> b h d', h=self.num_heads)
        heads = rearrange(self.ht_proj(heads), 'b h (g d) -> b h g d', g=self.num_heads)  # (B, h, h, d)
        return rearrange(self.act(self.ht_norm(heads)), 'b h g d -> b h (g d)') + self.pos_embed  # (B, h, D)

    def forward(self, x: Tensor) -> Tensor:  # type: ignore[override]
        num_patches = x.shape[1] - self.num_prefix_tokens
        x = self.attend(torch.cat([x, self.head_tokens(x)], dim=1))  # (B, 1+N+h, D)
        prefix, patches, heads = x.split([self.num_prefix_tokens, num_patches, self.num_heads], dim=1)
        return self.proj_drop(torch.cat([prefix + heads.mean(dim=1, keepdim=True), patches], dim=1))


class PointwiseConv(nn.Conv2d):
    """A 1x1 convolution of tokens, (B, N, in) -> (B, N, out), with a convolution's parameters, as a matrix product.

    In float32 on CPUs PyTorch's convolutions are up to a fifth faster than its matrix products, so it is one there.
    """

    def forward(self, x: Tensor) -> Tensor:
        if x.device.type == 'cpu' and x.dtype == torch.float32 and not torch.is_autocast_enabled('cpu'):
            x = rearrange(x, 'b n d -> b d n 1')  # a map of one column, channels last in memory
            return rearrange(super().forward(x), 'b d n 1 -> b n d')
        return F.linear(x, self.weight.flatten(1), self.bias)


class DynamicAggregationFeedForward(nn.Module):
    """DAFF: a convolutional feed-forward on the patch tokens that re-calibrates the class token. Paper §3.2, eqs. 4, 5.

    The class token passes by the convolutions and is multiplied by channel weights made from the mean of the patch
    tokens that leave them. Maps (B, 1+N, D) on a grid of (H/P, W/P) patches to the same shape.
    """

    def __init__(
        self,
        *,
        dim: int,
        hidden_dim: int,
        norm_layer: Callable[[int], nn.Module] = nn.BatchNorm2d,
        num_prefix_tokens: int = 1,
    ) -> None:
        super().__init__()
        self.num_prefix_tokens = num_prefix_tokens
        # Published code: all three convolutions have a bias, though a norm follows each.
        self.conv1 = PointwiseConv(dim, hidden_dim, kernel_size=1)
        self.bn1 = norm_layer(hidden_dim)
        self.conv2 = nn.Conv2d(hidden_dim, hidden_dim, kernel_size=3, padding=1, groups=hidden_dim)
        self.bn2 = norm_layer(hidden_dim)
        self.conv3 = PointwiseConv(hidden_dim, dim, kernel_size=1)
        self.bn3 = norm_layer(dim)
        self.act = nn.GELU()
        self.make_aggregation(dim)

    def make_aggregation(self, dim: int) -> None:
        self.compress = nn.Linear(dim, dim // 4)
        self.excitation = nn.Linear(dim // 4, dim)

    def aggregate(self, prefix: Tensor, patches: Tensor) -> Tensor:
        """Class token (B, 1, D) and the patch tokens (B, N, D) that leave the convolutions -> (B, 1+N, D)."""
        weight = self.excitation(self.act(self.compress(patches.mean(dim=1, keepdim=True))))  # (B, 1, D); no sigmoid
        return torch.cat([prefix * weight, patches], dim=1)

    def depthwise(self, x: Tensor) -> Tensor:
        """The 3x3 convolution of each channel, with its shortcut, (B, hidden, H/P, W/P) to the same shape."""
        return x + self.act(self.bn2(self.conv2(x)))

    def forward(self, x: Tensor, grid: Grid) -> Tensor:
        prefix, patches = x[:, : self.num_prefix_tokens], x[:, self.num_prefix_tokens :]
        # Maps are tokens seen otherwise, channels last in memory: no rearrangement moves anything.
        to_map = partial(rearrange, pattern='b (h w) d -> b d h w', h=grid[0])
        to_tokens = partial(rearrange, pattern='b d h w -> b (h w) d')
        x = self.act(self.bn1(to_map(self.conv1(patches))))  # (B, hidden, H/P, W/P)
        x = self.bn3(to_map(self.conv3(to_tokens(self.depthwise(x)))))  # (B, D, H/P, W/P)
        return self.aggregate(prefix, to_tokens(x))


class DHVTBlock(nn.Module):
    """One encoder block, (B, 1+N, D) -> (B, 1+N, D): attention, then feed-forward, each normed before and skipped."""

    def __init__(
        self,
        *,
        dim: int,
        mlp_ratio: float = 4.0,
        drop_path: float = 0.0,
        norm_layer: Callable[[int], nn.Module] = LayerNorm,
        attn_layer: Callable[..., nn.Module] = HeadInteractedAttention,
        mlp_layer: Callable[..., nn.Module] = DynamicAggregationFeedForward,
        num_prefix_tokens: int = 1,
        **attention: Any,
    ) -> None:
        super().__init__()
        prefix = {'num_prefix_tokens': num_prefix_tokens} if num_prefix_tokens > 1 else {}
        self.norm1 = norm_layer(dim)
        self.attn = attn_layer(dim=dim, **attention, **prefix)
        self.norm2 = norm_layer(dim)
        self.mlp = mlp_layer(dim=dim, hidden_dim=int(dim * mlp_ratio), **prefix)
        self.drop_path = DropPath(drop_path) if drop_path > 0.0 else nn.Identity()

    def forward(self, x: Tensor, grid: Grid) -> Tensor:
        x = x + self.drop_path(self.attn(self.norm1(x)))
        return x + self.drop_path(self.mlp(self.norm2(x), grid))


@contextmanager
def _keep_statistics(module: nn.Module) -> Iterator[None]:
    """The BatchNorms of a module update copies of their running statistics, which are then dropped."""
    kept = [(norm._buffers, dict(norm._buffers)) for norm in module.modules() if isinstance(norm, _BatchNorm)]
    for buffers, originals in kept:
        buffers.update({name: None if old is None else old.clone() for name, old in originals.items()})
    try:
        yield
    finally:
        for buffers, originals in kept:
            buffers.update(originals)


class DHVT(nn.Module):
    """The whole model: stem, class token, encoder blocks, norm, linear head. There is no absolute position embedding.

    Maps images (B, C, H, W) to logits (B, num_classes), for any H and W that the patch size divides.

    Args:
        img_size: the expected image size in pixels, one number or (height, width); only checked and remembered.
        patch_size: a power of two.
        num_classes: 0 leaves out the head, and `forward` gives the features (B, D).
        global_pool: what the head sees: 'token' the class token, 'avg' the mean of the patch tokens, '' all tokens.
        embed_dim: D, a multiple of `num_heads`.
        mlp_ratio: the feed-forward's hidden width, as a multiple of D.
        drop_rate: dropout after each attention's output projection, and nowhere else (published code).
        attn_drop_rate: dropout on the attention weights.
        drop_path_rate: stochastic depth of the last block; it grows linearly from 0 at the first.
        norm_layer: called with a width; LayerNorm with eps 1e-6 by default.
        embed_layer, attn_layer, mlp_layer: the classes of the stem, the attention and the feed-forward.

    Raises:
        ValueError: for an image size that the patch size does not divide, a width that the heads do not divide, a
            patch size that is no power of two, no blocks, or an unknown `global_pool`.
    """

    num_prefix_tokens = 1

    def __init__(
        self,
        *,
        img_size: int | tuple[int, int] = 224,
        patch_size: int = 16,
        in_chans: int = 3,
        num_classes: int = 1000,
        global_pool: str = 'token',
        embed_dim: int = 192,
        depth: int = 12,
        num_heads: int = 3,
        mlp_ratio: float = 4.0,
        qkv_bias: bool = True,
        drop_rate: float = 0.0,
        attn_drop_rate: float = 0.0,
        drop_path_rate: float = 0.0,
        norm_layer: Callable[[int], nn.Module] = LayerNorm,
        embed_layer: Callable[..., nn.Module] = SequentialOverlapPatchEmbed,
        attn_layer: Callable[..., nn.Module] = HeadInteractedAttention,
        mlp_layer: Callable[..., nn.Module] = DynamicAggregationFeedForward,
    ) -> None:
        super().__init__()
        self._check_pool(global_pool)
        if depth < 1:
            raise ValueError(f'depth must be at least 1, not {depth}')
        self.num_classes = num_classes
        self.global_pool = global_pool
        self.in_chans = in_chans
        self.embed_dim = self.num_features = self.head_hidden_size = embed_dim
        self.grad_checkpointing = False

        self.patch_embed = embed_layer(img_size=img_size, patch_size=patch_size, in_chans=in_chans, embed_dim=embed_dim)
        self.cls_token = nn.Parameter(torch.zeros(1, 1, embed_dim))
        block = partial(
            DHVTBlock,
            dim=embed_dim,
            num_heads=num_heads,
            mlp_ratio=mlp_ratio,
            qkv_bias=qkv_bias,
            proj_drop=drop_rate,
            attn_drop=attn_drop_rate,
            norm_layer=norm_layer,
            attn_layer=attn_layer,
            mlp_layer=mlp_layer,
            num_prefix_tokens=self.num_prefix_tokens,
        )
        self.blocks = nn.ModuleList(block(drop_path=drop_path_rate * i / max(depth - 1, 1)) for i in range(depth))
        shape = {'num_chs': embed_dim, 'reduction': patch_size}
        self.feature_info = [{**shape, 'module': f'blocks.{i}'} for i in range(depth)]
        self.norm = norm_layer(embed_dim)
        self.head: nn.Module = nn.Linear(embed_dim, num_classes) if num_classes > 0 else nn.Identity()

        trunc_normal_(self.cls_token, std=0.02)
        self.apply(self._init_weights)

    @staticmethod
    def _init_weights(module: nn.Module) -> None:
        # Convolutions keep PyTorch's default (published code); norm layers start as the identity by themselves.
        if isinstance(module, nn.Linear):
            trunc_normal_(module.weight, std=0.02)
            if module.bias is not None:
                nn.init.zeros_(module.bias)

    @staticmethod
    def _check_pool(global_pool: str) -> None:
        if global_pool not in ('token', 'avg', ''):
            raise ValueError(f"global_pool must be 'token', 'avg' or '', not {global_pool!r}")

    @torch.jit.ignore
    def no_weight_decay(self) -> set[str]:
        """Exempt from weight decay besides 1-D tensors. Published code: not head embeddings and affines."""
        return {'pos_embed', 'cls_token', 'dist_token'}

    @torch.jit.ignore
    def group_matcher(self, coarse: bool = False) -> dict[str, Any]:
        """Regular expressions that sort parameters into layers, for layer-wise learning rates."""
        return {
            'stem': r'^cls_token|^dist_token|^pos_embed|^patch_embed',
            'blocks': [(r'^blocks\.(\d+)', None), (r'^norm', (99999,))],
        }

    @torch.jit.ignore
    def set_grad_checkpointing(self, enable: bool = True) -> None:
        """Recomputes each block in the backward pass: less memory, about a third more time."""
        self.grad_checkpointing = enable

    @torch.jit.ignore
    def get_classifier(self) -> nn.Module:
        return self.head

    def reset_classifier(self, num_classes: int, global_pool: str | None = None) -> None:
        """Puts a newly initialised head in place; 0 classes remove it."""
        if global_pool is not None:
            self._check_pool(global_pool)
            self.global_pool = global_pool
        self.num_classes = num_classes
        self.head = self._new_head()

    def _new_head(self) -> nn.Module:
        head = nn.Linear(self.embed_dim, self.num_classes) if self.num_classes > 0 else nn.Identity()
        head.apply(self._init_weights)
        old = self.cls_token
        return head.to(device=old.device, dtype=old.dtype)

    def set_input_size(self, img_size: int | tuple[int, int]) -> None:
        """Declares another image size, in pixels; ValueError if the patch size does not divide it."""
        self.patch_embed.set_input_size(img_size)  # type: ignore[operator]

    def _tokens(self, x: Tensor) -> tuple[Tensor, Grid]:
        """Images (B, C, H, W) -> all tokens (B, 1+N, D), the class token first, and the grid of the patches."""
        patches, grid = self.patch_embed(x)
        prefix = self._prefix_tokens().expand(patches.shape[0], -1, -1)
        return torch.cat([prefix, patches], dim=1), grid

    def _prefix_tokens(self) -> Tensor:
        return self.cls_token

    def _block(self, block: nn.Module, x: Tensor, grid: Grid) -> Tensor:
        if not self.grad_checkpointing or not torch.is_grad_enabled() or torch.jit.is_scripting():
            return block(x, grid)
        if torch.compiler.is_compiling():  # which updates running statistics once, and takes no such contexts
            return checkpoint(block, x, grid, use_reentrant=False)
        # The recomputation must not update BatchNorm's running statistics a second time.
        return checkpoint(
            block, x, grid, use_reentrant=False, context_fn=lambda: (nullcontext(), _keep_statistics(block))
        )

    def forward_intermediates(
        self,
        x: Tensor,
        indices: int | list[int] | None = None,
        return_prefix_tokens: bool = False,
        norm: bool = False,
        stop_early: bool = False,
        output_fmt: Literal['NCHW', 'NLC'] = 'NCHW',
        intermediates_only: bool = False,
    ) -> Any:
        """What chosen blocks put out, by timm's contract (`timm.models.VisionTransformer.forward_intermediates`).

        Returns:
            The intermediates of images (B, C, H, W), as maps (B, D, H/P, W/P) or tokens (B, N, D), in pairs with the
            class tokens (B, 1, D) if asked for; or (final tokens (B, 1+N, D), that list).
        """
        if output_fmt not in ('NCHW', 'NLC'):
            raise ValueError(f"output_fmt must be 'NCHW' or 'NLC', not {output_fmt!r}")
        take_indices, max_index = feature_take_indices(len(self.blocks), indices)
        x, grid = self._tokens(x)
        taken = []
        for i, block in enumerate(self.blocks[: max_index + 1] if stop_early else self.blocks):
            x = self._block(block, x, grid)
            if i in take_indices:
                taken.append(self.norm(x) if norm else x)
        prefixes = [y[:, : self.num_prefix_tokens] for y in taken]
        intermediates = [y[:, self.num_prefix_tokens :] for y in taken]
        if output_fmt == 'NCHW':
            intermediates = [rearrange(y, 'b (h w) d -> b d h w', h=grid[0]).contiguous() for y in intermediates]
        result = list(zip(intermediates, prefixes, strict=True)) if return_prefix_tokens else intermediates
        return result if intermediates_only else (self.norm(x), result)

    def prune_intermediate_layers(
        self, indices: int | list[int] = 1, prune_norm: bool = False, prune_head: bool = True
    ) -> list[int]:
        """Removes the blocks after the last of `indices`, and all heads, for use as a feature extractor."""
        take_indices, max_index = feature_take_indices(len(self.blocks), indices)
        self.blocks = self.blocks[: max_index + 1]
        if prune_norm:
            self.norm = nn.Identity()
        if prune_head:
            self.reset_classifier(0)
        return take_indices

    def forward_features(self, x: Tensor) -> Tensor:
        """(B, C, H, W) -> all tokens after the final norm (B, 1+N, D), the class token first."""
        x, grid = self._tokens(x)
        for block in self.blocks:
            x = self._block(block, x, grid)
        return self.norm(x)

    def forward_head(self, x: Tensor, pre_logits: bool = False) -> Tensor:
        """(B, 1+N, D) -> logits (B, num_classes), or with `pre_logits` the pooled features (B, D)."""
        x = global_pool_nlc(x, self.global_pool, self.num_prefix_tokens)
        return x if pre_logits else self.head(x)

    def forward(self, x: Tensor) -> Tensor:
        return self.forward_head(self.forward_features(x))


def _cfg(*, img_size: int = 224, num_classes: int, **_: int) -> dict[str, Any]:
    return {  # mean, std and interpolation are timm's defaults: ImageNet's, bicubic
        'url': '',
        'num_classes': num_classes,
        'input_size': (3, img_size, img_size),
        'crop_pct': 0.875 if img_size > 32 else 1.0,
        'first_conv': 'patch_embed.proj.0.0',
        'classifier': 'head',
        'license': 'apache-2.0',
        'paper_ids': 'arXiv:2210.05958',
        'paper_name': 'Bridging the Gap Between Vision Transformers and CNNs on Small Datasets',
        'origin_url': 'https://github.com/ArieSeirack/DHVT',
    }


_VARIANTS: dict[str, dict[str, int]] = {
    'dhvt_tiny_cifar_patch4': {'img_size': 32, 'patch_size': 4, 'embed_dim': 192, 'num_heads': 4, 'num_classes': 100},
    'dhvt_small_cifar_patch4': {'img_size': 32, 'patch_size': 4, 'embed_dim': 384, 'num_heads': 8, 'num_classes': 100},
    'dhvt_tiny_cifar_patch2': {'img_size': 32, 'patch_size': 2, 'embed_dim': 192, 'num_heads': 4, 'num_classes': 100},
    'dhvt_small_cifar_patch2': {'img_size': 32, 'patch_size': 2, 'embed_dim': 384, 'num_heads': 8, 'num_classes': 100},
    'dhvt_tiny_domain_patch16': {'patch_size': 16, 'embed_dim': 192, 'num_heads': 4, 'num_classes': 345},
    'dhvt_small_domain_patch16': {'patch_size': 16, 'embed_dim': 384, 'num_heads': 6, 'num_classes': 345},
    'dhvt_tiny_imagenet_patch16': {'patch_size': 16, 'embed_dim': 192, 'num_heads': 3, 'num_classes': 1000},
    'dhvt_small_imagenet_patch16': {'patch_size': 16, 'embed_dim': 384, 'num_heads': 6, 'num_classes': 1000},
}
default_cfgs = generate_default_cfgs({name: _cfg(**sizes) for name, sizes in _VARIANTS.items()})


def create_dhvt(variant: str, pretrained: bool = False, *, model_cls: type[DHVT] = DHVT, **kwargs: Any) -> DHVT:
    """A variant of the table, or what a subclass makes of it; `kwargs` are the constructor's."""
    features = {'out_indices': 3, 'feature_cls': 'getter'}
    sizes = _VARIANTS[variant.removesuffix('_distilled')]
    return build_model_with_cfg(model_cls, variant, pretrained, feature_cfg=features, **{**sizes, **kwargs})


@register_model
def dhvt_tiny_cifar_patch4(pretrained: bool = False, **kwargs: Any) -> DHVT:
    """DHVT-T, patch 4, 32 px: 6.0M parameters, 0.39 G multiply-adds."""
    return create_dhvt('dhvt_tiny_cifar_patch4', pretrained, **kwargs)


@register_model
def dhvt_small_cifar_patch4(pretrained: bool = False, **kwargs: Any) -> DHVT:
    """DHVT-S, patch 4, 32 px: 23.4M parameters, 1.53 G multiply-adds."""
    return create_dhvt('dhvt_small_cifar_patch4', pretrained, **kwargs)


@register_model
def dhvt_tiny_cifar_patch2(pretrained: bool = False, **kwargs: Any) -> DHVT:
    """DHVT-T, patch 2, 32 px: 5.8M parameters, 1.72 G multiply-adds."""
    return create_dhvt('dhvt_tiny_cifar_patch2', pretrained, **kwargs)


@register_model
def dhvt_small_cifar_patch2(pretrained: bool = False, **kwargs: Any) -> DHVT:
    """DHVT-S, patch 2, 32 px: 22.8M parameters, 6.22 G multiply-adds."""
    return create_dhvt('dhvt_small_cifar_patch2', pretrained, **kwargs)


@register_model
def dhvt_tiny_domain_patch16(pretrained: bool = False, **kwargs: Any) -> DHVT:
    """DHVT-T for DomainNet, patch 16, 224 px: 6.1M parameters, 1.37 G multiply-adds."""
    return create_dhvt('dhvt_tiny_domain_patch16', pretrained, **kwargs)


@register_model
def dhvt_small_domain_patch16(pretrained: bool = False, **kwargs: Any) -> DHVT:
    """DHVT-S for DomainNet, patch 16, 224 px: 23.8M parameters, 5.05 G multiply-adds."""
    return create_dhvt('dhvt_small_domain_patch16', pretrained, **kwargs)


@register_model
def dhvt_tiny_imagenet_patch16(pretrained: bool = False, **kwargs: Any) -> DHVT:
    """DHVT-T for ImageNet, patch 16, 224 px: 6.3M parameters, 1.36 G multiply-adds."""
    return create_dhvt('dhvt_tiny_imagenet_patch16', pretrained, **kwargs)


@register_model
def dhvt_small_imagenet_patch16(pretrained: bool = False, **kwargs: Any) -> DHVT:
    """DHVT-S for ImageNet, patch 16, 224 px: 24.0M parameters, 5.05 G multiply-adds."""
    return create_dhvt('dhvt_small_imagenet_patch16', pretrained, **kwargs)
