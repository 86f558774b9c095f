"""What a checkpoint says of its model, and its weights in a model."""

from __future__ import annotations

import argparse
import math
import re
from collections.abc import Mapping
from typing import Any

import torch
from timm.layers import resample_abs_pos_embed
from timm.models import adapt_input_conv
from torch import Tensor, nn

from utils import InputError, UsageError, count, log, shorten

# Where training codes put the weights that are for use; DINO has a teacher and a student.
WEIGHTS = ('model', 'state_dict', 'net', 'teacher', 'student')
AVERAGES = ('model_ema', 'state_dict_ema', 'ema')
PREFIXES = ('backbone.', 'encoder.')  # of self-supervised training, before the names of the part that is the model
ENOUGH = 0.5  # part of a model's weights without which fine-tuning is training from scratch


def stored_args(checkpoint: Mapping[str, Any]) -> dict[str, Any]:
    """The arguments of the run that wrote a checkpoint, empty if it does not say.

    Those that other programs write otherwise are as here: timm's shape of the images and its switch for mixed
    precision, and the blocks of EViT as a word.
    """
    found = checkpoint.get('args')
    if isinstance(found, argparse.Namespace):
        found = vars(found)
    args = dict(found) if isinstance(found, Mapping) else {}
    size, blocks = args.get('input_size'), args.get('drop_loc')
    if isinstance(size, (list, tuple)) and size:
        args['input_size'] = size[-1]
    if isinstance(args.get('amp'), bool):
        del args['amp']
    if isinstance(blocks, str):
        args['drop_loc'] = [[int(number) for number in re.findall(r'\d{1,4}', blocks)]]
    return args


def class_names(checkpoint: Mapping[str, Any], source: str) -> list[str] | None:
    """The classes in the order of a checkpoint's head, None if it does not say.

    Raises:
        InputError: if they are no names.
    """
    names = checkpoint.get('classes')
    if names is not None and not (isinstance(names, (list, tuple)) and all(isinstance(name, str) for name in names)):
        raise InputError(f'{source} has {names!r:.40} as its classes: it is not of this program')
    return None if names is None else list(names)


def model_weights(checkpoint: Mapping[str, Any], source: str, *, ema: bool = False) -> dict[str, Tensor]:
    """The model's state_dict out of a checkpoint, under any of the names that training codes give it.

    Prefixes that DistributedDataParallel and torch.compile put before each name are removed.

    Args:
        ema: take the moving average; without it, it is taken where there is nothing else.

    Raises:
        InputError: if there is none, or it is not of plain tensors in memory.
    """
    keys = AVERAGES if ema else WEIGHTS + AVERAGES
    key = next((key for key in keys if isinstance(checkpoint.get(key), Mapping)), None)
    if ema and key is None:
        raise UsageError(f'--ema: {source} has no moving average of its weights')
    found: Mapping[Any, Any] = checkpoint if key is None else checkpoint[key]
    tensors = {
        re.sub(r'^(module\.|_orig_mod\.)+', '', name): value
        for name, value in found.items()
        if isinstance(name, str) and isinstance(value, Tensor)
    }
    if not tensors:
        raise InputError(f'{source} holds no model weights (its keys: {count(map(str, found), "key")})')
    for name, value in tensors.items():
        if value.layout != torch.strided or value.device.type == 'meta' or value.is_quantized or value.is_complex():
            raise InputError(f'{source}: {name} is no plain tensor of real numbers')
    if key not in (None, 'model', 'state_dict') and not ema:
        log(f'{source}: the weights are those that it has as {key!r}')
    return tensors


def _named_as(model: nn.Module, weights: Mapping[str, Tensor], source: str) -> dict[str, Tensor]:
    """Weights without the prefix that self-supervised training gives the part of them that is such a model."""
    own = model.state_dict()
    for prefix in PREFIXES:
        named = {name.removeprefix(prefix): value for name, value in weights.items() if name.startswith(prefix)}
        if named.keys() & own.keys() and not any(name.startswith(prefix) for name in own):
            log(f'{source}: the weights are those whose names begin with {prefix!r}')
            return named
    return dict(weights)


def _differences(model: nn.Module, weights: Mapping[str, Tensor]) -> tuple[list[str], list[str], list[str]]:
    """Names in both whose shape or kind of number differs, names the model has alone, names the weights have alone."""
    own = model.state_dict()
    reshaped = []
    for name in own:
        given = weights.get(name)
        if given is not None and given.shape != own[name].shape:
            reshaped.append(f'{name} {tuple(given.shape)} for {tuple(own[name].shape)}')
        elif given is not None and given.is_floating_point() != own[name].is_floating_point():
            reshaped.append(f'{name} {given.dtype} for {own[name].dtype}'.replace('torch.', ''))
    return reshaped, [name for name in own if name not in weights], [name for name in weights if name not in own]


def check_whole(model: nn.Module, weights: Mapping[str, Tensor], source: str) -> None:
    """Raises InputError unless weights fit a model exactly."""
    reshaped, missing, unexpected = _differences(model, weights)
    if reshaped or missing or unexpected:
        found = ((reshaped, 'other shape'), (missing, 'missing key'), (unexpected, 'unexpected key'))
        parts = [count(names, noun) for names, noun in found if names]
        raise InputError(
            f'{source} does not fit the model: {"; ".join(parts)}. '
            'Check --model, --input-size and --nb-classes, or use --finetune to start from what fits'
        )


def load_whole(model: nn.Module, weights: Mapping[str, Tensor], source: str) -> None:
    """Loads weights that must fit exactly; raises InputError if they do not, and the model is untouched."""
    weights = _named_as(model, weights, source)
    check_whole(model, weights, source)
    model.load_state_dict(weights)


def _resample_position_embedding(model: nn.Module, weights: Mapping[str, Tensor]) -> tuple[dict[str, Tensor], str]:
    """Weights whose position embedding, made for a square grid, fits the model's grid; and a note if that was done.

    The row of a distillation token is left out where the model has none, and is the model's own where the weights have
    none.
    """
    own, given = getattr(model, 'pos_embed', None), weights.get('pos_embed')
    grid = getattr(getattr(model, 'patch_embed', None), 'grid_size', None)
    result = dict(weights)
    if grid is None or not isinstance(own, Tensor) or given is None or own.shape[::2] != given.shape[::2]:
        return result, ''
    own_prefix = own.shape[1] - grid[0] * grid[1]  # rows of the class and distillation token, if they have one
    prefix = own_prefix and 1 + ('dist_token' in weights)
    side = math.isqrt(max(given.shape[1] - prefix, 0))
    same = own.shape == given.shape and prefix == own_prefix
    if same or side * side != given.shape[1] - prefix:
        return result, ''
    rows = given[:, :prefix]
    if own_prefix != prefix:
        rows = torch.cat([rows[:, :1], own.detach().to(rows)[:, 1:own_prefix]], dim=1)
    patches = resample_abs_pos_embed(given[:, prefix:], new_size=list(grid), num_prefix_tokens=0)
    result['pos_embed'] = torch.cat([rows, patches], dim=1)
    return result, f'pos_embed resampled from {side}x{side} to {grid[0]}x{grid[1]}'


def _adapt_channels(model: nn.Module, weights: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Weights for RGB in a model for grey images: of convolutions timm's sum over the channels, of SOPE's first affine
    the mean."""
    result = dict(weights)
    for name, own in model.state_dict().items():
        given = weights.get(name)
        if given is None or own.ndim != 4 or own.shape[1] != 1 or given.shape != (own.shape[0], 3, *own.shape[2:]):
            continue
        is_affine = own.shape == (1, 1, 1, 1)
        result[name] = given.mean(1, keepdim=True) if is_affine else adapt_input_conv(1, given)
    return result


def load_fitting(model: nn.Module, weights: Mapping[str, Tensor], source: str, *, partial: bool = False) -> None:
    """Loads what fits, says what that was, and leaves the rest of the model as it is: for fine-tuning.

    A position embedding of another image size is resampled, and RGB's weights become those of grey images, by timm's
    functions.

    Args:
        partial: also if that is less than half of the model's weights.

    Raises:
        InputError: if too little fits; the model is then untouched.
    """
    weights, note = _resample_position_embedding(model, _named_as(model, weights, source))
    weights = _adapt_channels(model, weights)
    own = model.state_dict()
    reshaped, _, unexpected = _differences(model, weights)
    dropped = {entry.split()[0] for entry in reshaped}
    fitting = {name: value for name, value in weights.items() if name not in dropped and name in own}
    part = sum(own[name].numel() for name in fitting) / sum(value.numel() for value in own.values())
    line = f'loaded {len(fitting)} of {len(own)} tensors ({100 * part:.1f}% of the weights)'
    new = [name for name in own if name not in fitting]
    for names, kind in ((new, 'new'), (reshaped, 'of other shape'), (unexpected, 'not in the model')):
        if names:
            line += f'; {kind}: {shorten(names)}'
    if not fitting or (part < ENOUGH and not partial):
        little = line if fitting else f'nothing in it fits the model; it holds {count(unexpected or reshaped, "key")}'
        raise InputError(
            f'{source}: too little to start from, {little}. Give the --model and --model-kwargs that it is of, or '
            '--allow-partial to start from so little'
        )
    model.load_state_dict(fitting, strict=False)
    for text in filter(None, (note, line)):
        log(f'{source}: {text}')
