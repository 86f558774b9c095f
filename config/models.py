"""Models and teachers, from what the flags say."""

from __future__ import annotations

import inspect
from collections.abc import Mapping, Sequence
from typing import Any

import timm
import torch
from torch import nn

from models import ablations, evit  # and all models are registered with timm
from models.dhvt import PointwiseConv
from utils import UsageError, one_line

MOST_BLOCKS, MOST_SIZE = 1000, 1_000_000  # of a model: more would be built for hours
EVIT_ARGUMENTS = ('base_keep_rate', 'fuse_token', 'drop_loc')


def _is_plain(value: Any, depth: int = 4) -> bool:
    """Whether a value is a number, a word, or a small nest of them."""
    if isinstance(value, (list, tuple)):
        return depth > 0 and len(value) <= 1000 and all(_is_plain(item, depth - 1) for item in value)
    return value is None or isinstance(value, (bool, int, float, str))


def _whole_numbers(value: Any) -> list[int]:
    """Those that a value is, or has in a list."""
    values = value if isinstance(value, (list, tuple)) else [value]
    return [entry for entry in values if isinstance(entry, int)]


def constructor_arguments(model: nn.Module) -> set[str]:
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
        try:
            with torch.device('meta'):  # which takes no memory
                model = timm.create_model(name)
        except Exception:  # a constructor that looks at its tensors
            model = timm.create_model(name)
        known |= constructor_arguments(model)
    for key, value in kwargs.items():
        if key not in known:
            raise UsageError(f'{name} refuses its arguments: {key} is refused, its constructor has none of that name')
        if any(size > (MOST_BLOCKS if key == 'depth' else MOST_SIZE) for size in _whole_numbers(value)):
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


def keeps_tokens_by_rate(name: str) -> bool:
    """Whether a model of timm's registry is an EViT."""
    return timm.is_model(name) and timm.models.model_entrypoint(name).__module__ == evit.__name__


def evit_kwargs(settings: Mapping[str, Any]) -> dict[str, Any]:
    """The constructor's arguments for an EViT out of a run's arguments, those that are set."""
    kwargs = {name: settings[name] for name in EVIT_ARGUMENTS if settings.get(name) is not None}
    if 'drop_loc' in kwargs:
        kwargs['drop_loc'] = [number for numbers in kwargs['drop_loc'] for number in numbers]
    return kwargs


def create_model(
    name: str,
    *,
    input_size: int,
    num_classes: int | None,
    in_chans: int = 3,
    drop: float = 0.0,
    drop_path: float = 0.0,
    evit_settings: Mapping[str, Any],
    model_kwargs: Sequence[tuple[str, Any]] = (),
) -> nn.Module:
    """Builds the student, or the only model.

    Args:
        num_classes: the head's size, None for the model's own.
        in_chans: channels of the images; 3 is not mentioned to the model.
        drop, drop_path: rates; 0 is not mentioned to the model.
        evit_settings: arguments among which those of EViT are looked up.
        model_kwargs: further arguments of the constructor.

    Raises:
        UsageError: if timm does not know the name, or the model refuses its arguments.
    """
    elsewhere = {argument: f'--{argument}' for argument in EVIT_ARGUMENTS}
    elsewhere |= {
        'num_classes': '--nb-classes',
        'img_size': '--input-size',
        'in_chans': "--in-chans, the images' three channels or one",
    }
    for key, _ in model_kwargs:
        if key in elsewhere:
            raise UsageError(f'--model-kwargs {key}=…: this is set by {elsewhere[key]}')
    rates = {'drop_rate': drop, 'drop_path_rate': drop_path}
    kwargs: dict[str, Any] = {**{key: rate for key, rate in rates.items() if rate > 0}, **dict(model_kwargs)}
    if num_classes is not None:
        kwargs['num_classes'] = num_classes
    if in_chans != 3:
        kwargs['in_chans'] = in_chans
    return new_model('--model', name, input_size, {**kwargs, **evit_kwargs(evit_settings)})


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


def synchronize_stem(model: nn.Module, device: torch.device) -> None:
    """Lets the stem's BatchNorms, and no others, see the batches of all processes, as in the published code.

    PyTorch's SyncBatchNorm exists on GPUs only; on CPUs each process normalises its own batch (docs/differences.md).
    """
    if device.type == 'cuda' and isinstance(getattr(model, 'patch_embed', None), nn.Module):
        model.patch_embed = nn.SyncBatchNorm.convert_sync_batchnorm(model.patch_embed)


def put_channels_last(model: nn.Module) -> None:
    """Lays convolutions' weights out with the channels innermost, as their gradients come from channels-last maps."""
    for module in model.modules():
        if isinstance(module, nn.Conv2d) and not isinstance(module, PointwiseConv):
            module.to(memory_format=torch.channels_last)  # type: ignore[call-overload]


def recompute_blocks(model: nn.Module, name: str) -> None:
    """Has the model compute its blocks again in the backward pass.

    Raises:
        UsageError: if it cannot.
    """
    try:
        model.set_grad_checkpointing()  # type: ignore[operator]
    except (AttributeError, AssertionError, TypeError, NotImplementedError):
        raise UsageError(f'--grad-checkpointing: {name} cannot compute its blocks again') from None
