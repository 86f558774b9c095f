"""Models and teachers, from what the flags say."""

from __future__ import annotations

import argparse
import inspect
from collections.abc import Mapping
from functools import cache
from typing import Any

import timm
import torch
from torch import nn

from models import ablations, evit  # and all models are registered with timm
from models.dhvt import PointwiseConv
from utils import UsageError, one_line

MAX_BLOCKS, MAX_SIZE = 1000, 1_000_000  # of a model: more would be built for hours
EVIT_ARGUMENTS = ('base_keep_rate', 'fuse_token', 'drop_loc')


def _is_plain(value: Any, depth: int = 4) -> bool:
    """Whether a value is a number, a word, or a small nest of them."""
    if isinstance(value, (list, tuple)):
        return depth > 0 and len(value) <= 1000 and all(_is_plain(item, depth - 1) for item in value)
    return value is None or isinstance(value, (bool, int, float, str))


@cache
def _arguments_of(name: str) -> set[str]:
    """The arguments of a model's constructor and of those of its base classes."""
    try:
        with torch.device('meta'):  # which takes no memory
            model = timm.create_model(name)
    except Exception:  # a constructor that looks at its tensors
        model = timm.create_model(name)
    constructors = [vars(cls)['__init__'] for cls in type(model).__mro__ if '__init__' in vars(cls)]
    return {argument for constructor in constructors for argument in inspect.signature(constructor).parameters}


def check_kwargs(name: str, kwargs: Mapping[str, Any]) -> None:
    """Lets only the arguments of a model's own constructor pass, and of plain types.

    What else timm's `create_model` takes says which file or address weights are loaded from, which neither a checkpoint
    nor a file of flags may decide.

    Raises:
        UsageError: with the argument's name.
    """
    known = {'img_size', 'num_classes', 'drop_rate', 'drop_path_rate'}
    if name.startswith('dhvt_'):
        known |= {*ablations.OPTIONS, 'pos_embed'}
    if not kwargs.keys() <= known:
        known |= _arguments_of(name)
    for key, value in kwargs.items():
        if key not in known:
            raise UsageError(f'{name} refuses its arguments: {key} is refused, its constructor has none of that name')
        most = MAX_BLOCKS if key == 'depth' else MAX_SIZE
        entries = value if isinstance(value, (list, tuple)) else [value]
        if any(isinstance(entry, int) and entry > most for entry in entries):
            raise UsageError(f'{name} refuses its arguments: {key} is refused, {value!r:.20} is too large')
        if not _is_plain(value):
            raise UsageError(f'{name} refuses its arguments: {key} is refused, it is no plain value')


def new_model(flag: str, name: str, img_size: int, kwargs: dict[str, Any]) -> nn.Module:
    """A model by its name in timm's registry, told the image size in pixels if it takes one.

    Raises:
        UsageError: if timm does not know the name, or the model refuses its arguments.
    """
    if not timm.is_model(name):
        near = ', '.join(timm.list_models(['dhvt_*', 'deit_*cifar*', 'deit_*shrink_base']))
        raise UsageError(f"{flag} {name}: timm's registry has no such model; this project adds {near}")
    try:
        check_kwargs(name, kwargs)
        try:
            return ablations.create_model(name, **{'img_size': img_size, **kwargs})
        except TypeError as err:
            if 'img_size' not in str(err):
                raise
            return ablations.create_model(name, **kwargs)  # convolutional networks are not told the size
    except (TypeError, ValueError, RuntimeError, AssertionError, AttributeError) as err:
        hint = '; --drop-path 0 leaves it out' if 'drop_path_rate' in str(err) else ''
        raise UsageError(f'{flag} {name} refuses its arguments: {one_line(err)}{hint}') from None


def published_config(name: str) -> Any:
    """What timm says of a model's published weights; None where it has none of that name, tag included."""
    try:
        return timm.models.get_pretrained_cfg(name)
    except RuntimeError:
        return None


def is_evit(name: str) -> bool:
    """Whether a model of timm's registry is an EViT."""
    return timm.is_model(name) and timm.models.model_entrypoint(name).__module__ == evit.__name__


def stored_keep_rate(name: str, checkpoint: Mapping[str, Any]) -> float | None:
    """Of an EViT, the keep rate of the epoch that wrote a checkpoint, which may be above the base rate."""
    rate = checkpoint.get('keep_rate') if is_evit(name) else None
    return rate if isinstance(rate, float) and 0 < rate <= 1 else None


def evit_kwargs(settings: Mapping[str, Any]) -> dict[str, Any]:
    """The constructor's arguments for an EViT out of a run's arguments, those that are set."""
    kwargs = {name: settings[name] for name in EVIT_ARGUMENTS if settings.get(name) is not None}
    if 'drop_loc' in kwargs:
        kwargs['drop_loc'] = [number for numbers in kwargs['drop_loc'] for number in numbers]
    return kwargs


def check_output(
    model: nn.Module, *, name: str, input_size: int, num_classes: int, in_chans: int = 3, flag: str = '--model'
) -> None:
    """Puts one black image through the model.

    Raises:
        UsageError: if that fails, or does not end in logits (1, num_classes).
    """
    image = torch.zeros(1, in_chans, input_size, input_size, device=next(model.parameters()).device)
    try:
        with torch.no_grad():
            logits = model.eval()(image)
    except (TypeError, ValueError, RuntimeError, AssertionError) as err:
        raise UsageError(f'{flag} {name} cannot take images of {input_size} px: {one_line(err)}') from None
    if not isinstance(logits, torch.Tensor) or logits.shape != (1, num_classes):
        shape = tuple(logits.shape) if isinstance(logits, torch.Tensor) else type(logits).__name__
        raise UsageError(f'{flag} {name} gives {shape} for an image, where a row of {num_classes} logits is needed')


def convert_stem_sync_batchnorm(model: nn.Module, device: torch.device) -> None:
    """Lets the stem's BatchNorms, and no others, see the batches of all processes, as in the published code.

    PyTorch's SyncBatchNorm exists on GPUs only; on CPUs each process normalises its own batch (docs/differences.md).
    """
    if device.type == 'cuda' and isinstance(getattr(model, 'patch_embed', None), nn.Module):
        model.patch_embed = nn.SyncBatchNorm.convert_sync_batchnorm(model.patch_embed)


def set_memory_format(args: argparse.Namespace, model: nn.Module) -> torch.memory_format:
    """The images' format. Channels-last is the convolutions' weights' too, as it will be that of their gradients."""
    if args.channels_last is False:
        return torch.preserve_format
    for module in model.modules():
        if isinstance(module, nn.Conv2d) and not isinstance(module, PointwiseConv):
            module.to(memory_format=torch.channels_last)  # type: ignore[call-overload]
    return torch.channels_last


def enable_grad_checkpointing(model: nn.Module, name: str) -> None:
    """Has the model compute its blocks again in the backward pass; raises UsageError if it cannot."""
    try:
        model.set_grad_checkpointing()  # type: ignore[operator]
    except (AttributeError, AssertionError, TypeError, NotImplementedError):
        raise UsageError(f'--grad-checkpointing: {name} cannot compute its blocks again') from None
