"""What the paper's ablations put in the place of DHVT's modules: ViT's own ones, and steps from those to DAFF.

`create_model` builds a DHVT with the options of `AblatedDHVT`; main.py does so for `--model-kwargs`. With 'patch',
'plain', 'mlp' and a position embedding the model is DeiT: equal keys, equal outputs. tools/ablate.py says which options
make which row of the paper's tables.

Shapes as in dhvt.py.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any

import timm
import torch
from einops import rearrange
from timm.layers import LayerNorm2d, Mlp, to_2tuple, trunc_normal_
from torch import Tensor, nn

from .dhvt import (
    DHVT,
    DynamicAggregationFeedForward,
    Grid,
    HeadInteractedAttention,
    SelfAttention,
    SequentialOverlapPatchEmbed,
)
from .distilled import DistilledDHVT

__all__ = ['AblatedDHVT', 'AblatedDistilledDHVT', 'create_model']

OPTIONS: dict[str, tuple[Any, ...]] = {  # of AblatedDHVT, and their values
    'stem': ('sope', 'no-affine', 'patch'),
    'attention': ('head', 'plain'),
    'feed_forward': ('daff', 'mlp', 'split', 'pool'),
    'stem_norm': ('batch', 'layer'),
    'aggregation': ('class', 'all', 'none'),
    'shortcut': (True, False),
    'feed_forward_norm': ('batch', 'layer'),
    'pos_embed': ('none', 'learn'),
}

# By position and channel-wise, as ConvNeXt's; eps 1e-6 as the model's other LayerNorms.
NORMS: dict[str, Callable[[int], nn.Module]] = {'batch': nn.BatchNorm2d, 'layer': partial(LayerNorm2d, eps=1e-6)}


class PatchEmbed(SequentialOverlapPatchEmbed):
    """ViT's stem: one convolution of kernel and stride P, any P that divides the image's height and width."""

    def __init__(self, *, img_size: int | tuple[int, int], patch_size: int, in_chans: int, embed_dim: int) -> None:
        nn.Module.__init__(self)
        if patch_size < 1:
            raise ValueError(f'patch_size must be at least 1, not {patch_size}')
        self.patch_size = patch_size
        self.set_input_size(img_size)
        self.proj = nn.Conv2d(in_chans, embed_dim, patch_size, stride=patch_size)  # type: ignore[assignment]
        self.pre_affine = self.post_affine = nn.Identity()  # type: ignore[assignment]


class PlainAttention(SelfAttention):
    """ViT's self-attention, without head tokens, (B, 1+N, D) to the same shape."""

    def forward(self, x: Tensor) -> Tensor:  # type: ignore[override]
        return self.proj_drop(self.attend(x))


class _Aggregation(nn.Module):
    """DAFF's channel weights on nothing (`aggregation` 'none'), the class token ('class'), or every token ('all')."""

    aggregation: str
    act: nn.GELU

    def make_aggregation(self, dim: int) -> None:
        if self.aggregation != 'none':
            self.compress = nn.Linear(dim, dim // 4)
            self.excitation = nn.Linear(dim // 4, dim)

    def aggregate(self, prefix: Tensor, patches: Tensor) -> Tensor:
        if self.aggregation != 'none':
            weight = self.excitation(self.act(self.compress(patches.mean(dim=1, keepdim=True))))  # (B, 1, D)
            prefix = prefix * weight
            patches = patches * weight if self.aggregation == 'all' else patches
        return torch.cat([prefix, patches], dim=1)


class OtherDAFF(_Aggregation, DynamicAggregationFeedForward):
    """DAFF with another aggregation, or without the shortcut around its depthwise convolution."""

    def __init__(self, *, aggregation: str = 'class', shortcut: bool = True, **kwargs: Any) -> None:
        self.aggregation = aggregation
        super().__init__(**kwargs)
        self.shortcut = shortcut

    def depthwise(self, x: Tensor) -> Tensor:
        return super().depthwise(x) if self.shortcut else self.act(self.bn2(self.conv2(x)))


class FeedForward(Mlp):
    """ViT's feed-forward: two linear layers on every token, the class token too. (B, 1+N, D) to the same shape."""

    def __init__(self, *, dim: int, hidden_dim: int, num_prefix_tokens: int = 1) -> None:
        super().__init__(in_features=dim, hidden_features=hidden_dim)

    def forward(self, x: Tensor, grid: Grid) -> Tensor:  # type: ignore[override]
        return super().forward(x)


class SplitFeedForward(_Aggregation):
    """ViT's feed-forward on the patch tokens alone; the class token passes by, as it does in DAFF. Table 8.

    Maps (B, 1+N, D) on a grid of (H/P, W/P) patches to the same shape. What passes by is the input, which the block has
    normed; the block adds it to the class token. Without aggregation nothing of the last block's feed-forward reaches
    the class token.

    Args:
        pool: the mean of each 3x3 patches between the two linear layers, where DAFF has its depthwise convolution.
        shortcut: around that mean.
    """

    def __init__(
        self,
        *,
        dim: int,
        hidden_dim: int,
        aggregation: str = 'none',
        shortcut: bool = True,
        pool: bool,
        num_prefix_tokens: int = 1,
    ) -> None:
        super().__init__()
        self.num_prefix_tokens = num_prefix_tokens
        self.aggregation = aggregation
        self.shortcut = shortcut
        self.fc1 = nn.Linear(dim, hidden_dim)
        self.pool = nn.AvgPool2d(3, stride=1, padding=1) if pool else None
        self.fc2 = nn.Linear(hidden_dim, dim)
        self.act = nn.GELU()
        self.make_aggregation(dim)

    def forward(self, x: Tensor, grid: Grid) -> Tensor:
        prefix, patches = x[:, : self.num_prefix_tokens], x[:, self.num_prefix_tokens :]
        x = self.act(self.fc1(patches))  # (B, N, hidden)
        if self.pool is not None:
            means = self.pool(rearrange(x, 'b (h w) d -> b d h w', h=grid[0]))
            means = rearrange(means, 'b d h w -> b (h w) d')
            x = x + means if self.shortcut else means
        return self.aggregate(prefix, self.fc2(x))


def _check(options: dict[str, Any]) -> None:
    for name, allowed in OPTIONS.items():
        value = options.get(name)
        if value is not None and (type(value) is not type(allowed[0]) or value not in allowed):
            raise ValueError(f'{name} must be {" or ".join(map(repr, allowed))}, not {value!r}')
    stem, feed_forward = options.get('stem'), options.get('feed_forward') or 'daff'
    for name, needs, has in (
        ('stem_norm', "stem='sope'", stem != 'patch'),
        ('shortcut', "feed_forward='daff' or 'pool'", feed_forward in ('daff', 'pool')),
        ('feed_forward_norm', "feed_forward='daff'", feed_forward == 'daff'),
    ):
        if options.get(name) is not None and not has:
            raise ValueError(f'{name}={options[name]!r} needs {needs}')
    aggregation = options.get('aggregation')
    if feed_forward == 'mlp' and aggregation not in (None, 'none'):
        raise ValueError(f"aggregation={aggregation!r} needs the class token split off: feed_forward='split'")


def choose_layers(options: dict[str, Any]) -> dict[str, Callable[..., nn.Module]]:
    """The stem, the attention and the feed-forward that options of `AblatedDHVT` ask for, as DHVT takes them."""
    _check(options)
    embed_layer: Callable[..., nn.Module] = PatchEmbed
    if options.get('stem') != 'patch':
        embed_layer = partial(SequentialOverlapPatchEmbed, norm_layer=NORMS[options.get('stem_norm') or 'batch'])
    feed_forward = options.get('feed_forward') or 'daff'
    given = {name: options[name] for name in ('aggregation', 'shortcut') if options.get(name) is not None}
    mlp_layer: Callable[..., nn.Module] = FeedForward
    if feed_forward == 'daff':
        mlp_layer = partial(OtherDAFF, norm_layer=NORMS[options.get('feed_forward_norm') or 'batch'], **given)
    elif feed_forward != 'mlp':
        mlp_layer = partial(SplitFeedForward, pool=feed_forward == 'pool', **given)
    attn_layer = PlainAttention if options.get('attention') == 'plain' else HeadInteractedAttention
    return {'embed_layer': embed_layer, 'attn_layer': attn_layer, 'mlp_layer': mlp_layer}


class AblatedDHVT(DHVT):
    """DHVT with other modules, or with DeiT's position embedding. An option that is None leaves the paper's model.

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
        pos_embed: 'none', or 'learn': one for each token, which ties the model to `img_size`.
        **kwargs: DHVT's.

    Raises:
        ValueError: for another value, or an option of a module that the model would not have.
    """

    def __init__(self, **kwargs: Any) -> None:
        options = {name: kwargs.pop(name) for name in OPTIONS if name in kwargs}
        super().__init__(**{**kwargs, **choose_layers(options)})
        if options.get('stem') == 'no-affine':
            self.patch_embed.pre_affine = self.patch_embed.post_affine = nn.Identity()
        self.has_positions = options.get('pos_embed') == 'learn'
        if self.has_positions:
            num_patches: int = self.patch_embed.num_patches  # type: ignore[assignment]
            self.pos_embed = nn.Parameter(torch.zeros(1, self.num_prefix_tokens + num_patches, self.embed_dim))
            trunc_normal_(self.pos_embed, std=0.02)

    def _refuse_grid(self, height: int, width: int) -> None:
        """Raises ValueError for a grid that the position embedding is not for."""
        own: Grid = self.patch_embed.grid_size  # type: ignore[assignment]
        if self.has_positions and (height, width) != own:
            raise ValueError(
                f'the position embedding is for {own[0]}x{own[1]} patches, not {height}x{width}: keep the image size, '
                'or leave out pos_embed'
            )

    def set_input_size(self, img_size: int | tuple[int, int]) -> None:
        side: int = self.patch_embed.patch_size  # type: ignore[assignment]
        self._refuse_grid(*(length // side for length in to_2tuple(img_size)))
        super().set_input_size(img_size)

    def _tokens(self, x: Tensor) -> tuple[Tensor, Grid]:
        tokens, grid = super()._tokens(x)
        self._refuse_grid(*grid)
        return tokens + self.pos_embed if self.has_positions else tokens, grid


class AblatedDistilledDHVT(DistilledDHVT, AblatedDHVT):
    """The distilled model with the options of `AblatedDHVT`."""


def create_model(name: str, **kwargs: Any) -> nn.Module:
    """timm's `create_model`, whose arguments for a DHVT may also be the options of `AblatedDHVT`."""
    if name.startswith('dhvt_') and any(kwargs.get(option) is not None for option in OPTIONS):
        kwargs['model_cls'] = AblatedDistilledDHVT if name.endswith('_distilled') else AblatedDHVT
    return timm.create_model(name, **kwargs)
