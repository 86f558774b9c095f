"""What the paper's ablations put in the place of DHVT's modules: ViT's own ones, and steps from those to DAFF.

Beside dhvt.py, not in it, so that dhvt.py is the paper's model in the paper's order and can be copied alone. That file
imports this one when a model is built with one of the options of `choose_layers`, as `--model-kwargs` of main.py or
arguments of `timm.create_model`. With 'patch', 'plain', 'mlp' and a position embedding the model is DeiT: equal keys,
equal outputs. tools/ablate.py says which options make which row of the paper's tables.

Shapes as in dhvt.py.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any

import torch
import torch.nn.functional as F
from einops import rearrange
from timm.layers import LayerNorm2d, Mlp, to_2tuple, use_fused_attn
from torch import Tensor, nn

from .dhvt import DynamicAggregationFeedForward, Grid, HeadInteractedAttention, SequentialOverlapPatchEmbed

__all__ = ['FeedForward', 'PatchEmbed', 'PlainAttention', 'SplitFeedForward', 'choose_layers']

# By position and channel-wise, as ConvNeXt's; eps 1e-6 as the model's other LayerNorms.
NORMS: dict[str, Callable[[int], nn.Module]] = {'batch': nn.BatchNorm2d, 'layer': partial(LayerNorm2d, eps=1e-6)}


class PatchEmbed(nn.Module):
    """ViT's stem: one convolution of kernel and stride P. An image (B, C, H, W) to (B, N, D) and their grid.

    Raises:
        ValueError: if the patch size does not divide the image's height and width.
    """

    def __init__(
        self, *, img_size: int | tuple[int, int] = 224, patch_size: int = 16, in_chans: int = 3, embed_dim: int = 192
    ) -> None:
        super().__init__()
        if patch_size < 1:
            raise ValueError(f'patch_size must be at least 1, not {patch_size}')
        self.patch_size = patch_size
        self.set_input_size(img_size)
        self.proj = nn.Conv2d(in_chans, embed_dim, kernel_size=patch_size, stride=patch_size)

    def set_input_size(self, img_size: int | tuple[int, int]) -> None:
        """Declares the image size, in pixels. No parameter depends on it."""
        self.img_size = to_2tuple(img_size)
        self.grid_size = self._grid(*self.img_size)
        self.num_patches = self.grid_size[0] * self.grid_size[1]

    def _grid(self, height: int, width: int) -> Grid:
        if height % self.patch_size or width % self.patch_size:
            raise ValueError(f'image size {height}x{width} is not divisible by patch size {self.patch_size}')
        return height // self.patch_size, width // self.patch_size

    def forward(self, x: Tensor) -> tuple[Tensor, Grid]:
        grid = self._grid(x.shape[-2], x.shape[-1])
        return rearrange(self.proj(x), 'b d h w -> b (h w) d'), grid  # (B, N, D)


class PlainAttention(nn.Module):
    """ViT's self-attention, without head tokens. Maps (B, 1+N, D) to the same shape; `proj_drop` acts on the result.

    Raises:
        ValueError: if the number of heads does not divide the width.
    """

    def __init__(
        self,
        *,
        dim: int,
        num_heads: int = 3,
        qkv_bias: bool = True,
        attn_drop: float = 0.0,
        proj_drop: float = 0.0,
        num_prefix_tokens: int = 1,
    ) -> None:
        super().__init__()
        if num_heads < 1 or dim % num_heads:
            raise ValueError(f'embedding width {dim} is not divisible by {num_heads} heads')
        self.num_heads = num_heads
        self.scale = (dim // num_heads) ** -0.5
        self.fused_attn = use_fused_attn()
        self.qkv = nn.Linear(dim, dim * 3, bias=qkv_bias)
        self.attn_drop = nn.Dropout(attn_drop)
        self.proj = nn.Linear(dim, dim)
        self.proj_drop = nn.Dropout(proj_drop)

    def forward(self, x: Tensor) -> Tensor:
        q, k, v = rearrange(self.qkv(x), 'b t (qkv h d) -> qkv b h t d', qkv=3, h=self.num_heads)
        # As in HeadInteractedAttention, so that the comparison is one of the models.
        if self.fused_attn and not (x.device.type == 'cpu' and torch.is_grad_enabled()):
            x = F.scaled_dot_product_attention(q, k, v, dropout_p=self.attn_drop.p if self.training else 0.0)
        else:
            x = self.attn_drop(((q @ k.transpose(-2, -1)) * self.scale).softmax(dim=-1)) @ v  # (B, h, T, d)
        return self.proj_drop(self.proj(rearrange(x, 'b h t d -> b t (h d)')))


class FeedForward(Mlp):
    """ViT's feed-forward: two linear layers on every token, the class token too. (B, 1+N, D) to the same shape."""

    def __init__(self, *, dim: int, hidden_dim: int, num_prefix_tokens: int = 1) -> None:
        super().__init__(in_features=dim, hidden_features=hidden_dim)

    def forward(self, x: Tensor, grid: Grid) -> Tensor:  # type: ignore[override]
        return super().forward(x)


class SplitFeedForward(nn.Module):
    """ViT's feed-forward on the patch tokens alone; the class token passes by, as it does in DAFF. Table 8.

    Maps (B, 1+N, D) on a grid of (H/P, W/P) patches to the same shape. What passes by is the input, which the block has
    normed; the block adds it to the class token.

    Args:
        aggregation: DAFF's channel weights on nothing ('none'), the class token ('class'), or every token ('all').
        pool: the mean of each 3x3 patches between the two linear layers, where DAFF has its depthwise convolution.
        shortcut: around that mean.
    """

    def __init__(
        self,
        *,
        dim: int,
        hidden_dim: int,
        num_prefix_tokens: int = 1,
        aggregation: str = 'none',
        pool: bool = False,
        shortcut: bool = True,
    ) -> None:
        super().__init__()
        self.num_prefix_tokens = num_prefix_tokens
        self.aggregation = aggregation
        self.shortcut = shortcut
        self.fc1 = nn.Linear(dim, hidden_dim)
        self.pool = nn.AvgPool2d(3, stride=1, padding=1) if pool else None
        self.fc2 = nn.Linear(hidden_dim, dim)
        self.act = nn.GELU()
        if aggregation != 'none':
            self.compress = nn.Linear(dim, dim // 4)
            self.excitation = nn.Linear(dim // 4, dim)

    def forward(self, x: Tensor, grid: Grid) -> Tensor:
        prefix, patches = x[:, : self.num_prefix_tokens], x[:, self.num_prefix_tokens :]
        x = self.act(self.fc1(patches))  # (B, N, hidden)
        if self.pool is not None:
            means = self.pool(rearrange(x, 'b (h w) d -> b d h w', h=grid[0]))
            means = rearrange(means, 'b d h w -> b (h w) d')
            x = x + means if self.shortcut else means
        patches = self.fc2(x)  # (B, N, D)
        if self.aggregation != 'none':
            weight = self.excitation(self.act(self.compress(patches.mean(dim=1, keepdim=True))))  # (B, 1, D)
            prefix = prefix * weight
            patches = patches * weight if self.aggregation == 'all' else patches
        return torch.cat([prefix, patches], dim=1)


def _check(name: str, value: Any, allowed: tuple[Any, ...]) -> None:
    if value is not None and (type(value) is not type(allowed[0]) or value not in allowed):
        raise ValueError(f'{name} must be {" or ".join(map(repr, allowed))}, not {value!r}')


def choose_layers(
    *,
    stem: str = 'sope',
    stem_norm: str | None = None,
    attention: str = 'head',
    feed_forward: str = 'daff',
    aggregation: str | None = None,
    shortcut: bool | None = None,
    feed_forward_norm: str | None = None,
) -> tuple[Callable[..., nn.Module], Callable[..., nn.Module], Callable[..., nn.Module]]:
    """The stem, the attention and the feed-forward of a model, as DHVT takes them.

    Args:
        stem: 'sope'; 'no-affine', which is SOPE without its two affines; 'patch', ViT's.
        stem_norm: SOPE's norm: 'batch', or 'layer', over the channels of each position.
        attention: 'head', with head tokens; 'plain', ViT's.
        feed_forward: 'daff'; 'mlp', ViT's; 'split', that on the patch tokens alone; 'pool', the same with a 3x3 average
            pooling between its layers.
        aggregation: what channel weights multiply: 'class', the class token; 'all', every token; 'none'. DAFF has
            'class' if None, 'split' and 'pool' have 'none', and an 'mlp' can have nothing else.
        shortcut: around DAFF's depthwise convolution or around the pooling; True if None.
        feed_forward_norm: DAFF's norms: 'batch', or 'layer' as in the stem.

    Raises:
        ValueError: for another value, or an option of a module that the model would not have.
    """
    _check('stem', stem, ('sope', 'no-affine', 'patch'))
    _check('attention', attention, ('head', 'plain'))
    _check('feed_forward', feed_forward, ('daff', 'mlp', 'split', 'pool'))
    _check('stem_norm', stem_norm, ('batch', 'layer'))
    _check('aggregation', aggregation, ('class', 'all', 'none'))
    _check('shortcut', shortcut, (True, False))
    _check('feed_forward_norm', feed_forward_norm, ('batch', 'layer'))
    for name, value, needs, given in (
        ('stem_norm', stem_norm, "stem='sope'", stem == 'patch'),
        ('shortcut', shortcut, "feed_forward='daff' or 'pool'", feed_forward in ('mlp', 'split')),
        ('feed_forward_norm', feed_forward_norm, "feed_forward='daff'", feed_forward != 'daff'),
    ):
        if value is not None and given:
            raise ValueError(f'{name}={value!r} needs {needs}')
    if feed_forward == 'mlp' and aggregation not in (None, 'none'):
        raise ValueError(f"aggregation={aggregation!r} needs the class token split off: feed_forward='split'")

    embed_layer: Callable[..., nn.Module] = PatchEmbed
    if stem != 'patch':
        norm = NORMS[stem_norm or 'batch']
        embed_layer = partial(SequentialOverlapPatchEmbed, norm_layer=norm, affine=stem == 'sope')
    attn_layer: Callable[..., nn.Module] = HeadInteractedAttention if attention == 'head' else PlainAttention
    mlp_layer: Callable[..., nn.Module] = FeedForward
    if feed_forward == 'daff':
        mlp_layer = partial(
            DynamicAggregationFeedForward,
            norm_layer=NORMS[feed_forward_norm or 'batch'],
            aggregation=aggregation or 'class',
            shortcut=shortcut is not False,
        )
    elif feed_forward != 'mlp':
        mlp_layer = partial(
            SplitFeedForward,
            pool=feed_forward == 'pool',
            aggregation=aggregation or 'none',
            shortcut=shortcut is not False,
        )
    return embed_layer, attn_layer, mlp_layer
