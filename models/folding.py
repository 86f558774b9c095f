"""BatchNorms folded into the convolutions before them, for inference. The file needs dhvt.py beside it."""

from __future__ import annotations

import copy
from collections import Counter
from collections.abc import Iterator
from itertools import pairwise
from typing import Any

from timm.layers import BatchNormAct2d
from torch import nn
from torch.nn.utils.fusion import fuse_conv_bn_weights

from .dhvt import DynamicAggregationFeedForward, PointwiseConv

__all__ = ['fold_batchnorm']


def _pairs(module: nn.Module, by_name: bool) -> Iterator[tuple[str, str]]:
    """Names of children of which the second takes what the first puts out.

    In a Sequential, neighbours. In DAFF, and with `by_name` elsewhere, `conv…` and `bn…` with the same ending, the
    first one registered earlier: a norm that stands before its convolution is registered before it too.
    """
    names = list(module._modules)
    if type(module).forward is nn.Sequential.forward:
        yield from pairwise(names)
        return
    if not by_name and type(module) is not DynamicAggregationFeedForward:
        return
    for place, name in enumerate(names):
        partner = f'bn{name.removeprefix("conv")}'
        if name.startswith('conv') and partner in names[place + 1 :]:
            yield name, partner


def _can_fold(conv: Any, norm: Any) -> bool:
    """Whether both are of classes that do no more than they say, with statistics, and nothing looks in between."""
    return (
        type(conv) in (nn.Conv2d, PointwiseConv)
        and type(norm) in (nn.BatchNorm2d, nn.SyncBatchNorm, BatchNormAct2d)
        and norm.running_mean is not None
        and norm.running_var is not None
        and norm.num_features == conv.out_channels
        and not any(module._forward_hooks or module._forward_pre_hooks for module in (conv, norm))
    )


def fold_batchnorm(model: nn.Module, *, by_name: bool = False) -> nn.Module:
    """A copy in eval mode whose BatchNorms are folded into the convolutions that they follow directly.

    Such a convolution gets the norm's scale in its weight and the rest in its bias; nn.Identity stands in the norm's
    place, or what else timm's BatchNormAct2d does. The outputs are equal up to rounding. Whatever stands in no pair
    stays as it is, and so do modules in two places, and norms without running statistics.

    Args:
        model: is not changed.
        by_name: take pairs outside of DHVT and nn.Sequential by their names (conv1, bn1), which say nothing of what
            lies between: the outputs are to be compared.
    """
    folded = copy.deepcopy(model).eval()
    places = Counter(id(child) for module in folded.modules() for child in module._modules.values())
    for module in list(folded.modules()):
        for conv_name, norm_name in _pairs(module, by_name):
            conv: Any = module._modules[conv_name]
            norm: Any = module._modules[norm_name]
            if not _can_fold(conv, norm) or places[id(conv)] > 1 or places[id(norm)] > 1:
                continue
            conv.weight, conv.bias = fuse_conv_bn_weights(
                conv.weight, conv.bias, norm.running_mean, norm.running_var, norm.eps, norm.weight, norm.bias
            )
            rest = nn.Sequential(norm.drop, norm.act) if isinstance(norm, BatchNormAct2d) else nn.Identity()
            module._modules[norm_name] = rest.eval()
    return folded
