"""The model of a checkpoint with what is needed to use it: for tools, reports, teachers and the hub."""

from __future__ import annotations

import argparse
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import timm
import torch
from PIL import Image
from torch import Tensor, nn

from config.flags import MAX_PIXELS, PIXELS, FlagParser
from config.models import (
    MAX_SIZE,
    check_kwargs,
    evit_kwargs,
    is_evit,
    new_model,
    published_config,
    stored_keep_rate,
)
from models.folding import fold_batchnorm
from pipeline.files import read_file
from pipeline.images import AS_STORED, Reading, Transform, decode
from pipeline.transforms import build_transform, normalization
from training import checkpoint as ckpt
from training.schema import is_count
from training.weights import PREFIXES, class_names, load_whole, model_weights, stored_args
from utils import InputError, UsageError, count

TOLERANCE = 1e-5  # of equal logits, as a part of the largest where that is above 1


def read_image(path: str | Path, reading: Reading = AS_STORED) -> Image.Image:
    """An image file as a model was trained on it.

    Raises:
        InputError: if it cannot be decoded.
        OSError: if it cannot be read.
    """
    try:
        return decode(read_file(path), reading)
    except ValueError as err:
        raise InputError(f'{path} cannot be read as an image ({err})') from None


@dataclass(frozen=True)
class Settings:
    """What a checkpoint says of its model.

    `kwargs` are the constructor's beside the image size, which is `input_size` pixels; `classes` names the head's rows;
    `mean` and `std` normalise the channels of images in 0..1, which are read as `reading` says; `args` are those of the
    run, empty for bare weights.
    """

    name: str
    kwargs: dict[str, Any]
    input_size: int
    classes: list[str]
    mean: tuple[float, ...]
    std: tuple[float, ...]
    args: dict[str, Any]
    reading: Reading

    @property
    def shape(self) -> tuple[int, int, int]:
        """Of an image."""
        return self.reading.channels, self.input_size, self.input_size

    @cached_property
    def transform(self) -> Transform:
        """Evaluation's, from an image to a normalised tensor (C, S, S)."""
        return build_transform(train=False, input_size=self.input_size, channels=self.reading.channels)

    def build(self, weights: Mapping[str, Tensor], source: str, *, flag: str = '--model') -> nn.Module:
        """The model with these weights, which must fit exactly and be finite, on the CPU in eval mode."""
        model = new_model(flag, self.name, self.input_size, self.kwargs)
        load_whole(model, weights, source)
        spoilt = [name for name, value in model.state_dict().items() if not value.isfinite().all()]
        if spoilt:
            raise InputError(f'{source} has NaN or infinite weights ({count(spoilt, "tensor")}): take an earlier one')
        return model.eval()


def find_reading(args: Mapping[str, Any], source: str = 'the run') -> Reading:
    """How the files of a run become images.

    Raises:
        InputError: for arguments that main.py has not written.
    """
    channels, limits = args.get('in_chans', 3), args.get('value_range')
    try:
        low, high = map(float, limits or (0, 1))
        if channels not in (1, 3) or not 0 < high - low < float('inf'):
            raise ValueError
    except (TypeError, ValueError):
        raise InputError(
            f'{source}: images of {channels!r:.20} channels, with values in {limits!r:.40}, cannot be read'
        ) from None
    turns = args.get('exif_orientation') is True
    return Reading(channels=channels, exif_orientation=turns, value_range=(low, high) if limits else None)


def _size_of_head(name: str, weights: Mapping[str, Tensor]) -> int | None:
    classifier = getattr(published_config(name), 'classifier', None)
    if isinstance(classifier, (list, tuple)):
        classifier = classifier[0]
    found = (weights.get(f'{prefix}{classifier}.weight') for prefix in ('', *PREFIXES))
    return next((len(weight) for weight in found if weight is not None and weight.ndim), None)


def read_settings(
    checkpoint: Mapping[str, Any],
    weights: Mapping[str, Tensor],
    source: str,
    *,
    name: str | None = None,
    input_size: int | None = None,
    default_size: int | None = None,
    further: Mapping[str, Any] | None = None,
) -> Settings:
    """What a checkpoint says of its model.

    Args:
        weights: the checkpoint's, which say the size of the head.
        name: of the model; where the checkpoint says one, it has to be that.
        input_size: pixels, in place of what the checkpoint says, or where it does not.
        default_size: pixels, where the checkpoint does not say.
        further: arguments of the constructor, in place of the checkpoint's.

    Raises:
        UsageError: if it does not say its model or its size, and the arguments do not either.
        InputError: if it is of another model, or what it says is of another kind than this program writes.
    """
    stored = stored_args(checkpoint)
    stored_name = stored.get('model')
    if not isinstance(stored_name, str):
        stored_name = None
    # Names that timm had once are no other models.
    if name and stored_name and timm.is_model(stored_name) and name.split('.')[0] != stored_name.split('.')[0]:
        raise InputError(f'{source} is of {stored_name}, not of {name}: give that name')
    name = name or stored_name
    if not name:
        raise UsageError(f'{source} does not say which model it is of: give --model NAME and --input-size PIXELS')
    size = input_size or stored.get('input_size') or default_size
    if not isinstance(size, int):
        raise UsageError(f'{source} does not say the size of its images: give --input-size PIXELS')
    if not 0 < size <= MAX_PIXELS:
        raise InputError(f'{source} says that its images have {size} pixels: give --input-size PIXELS')
    try:
        kwargs = dict(stored.get('model_kwargs') or [])
        if is_evit(name):
            kwargs |= evit_kwargs(stored)
            rate = stored_keep_rate(name, checkpoint)
            kwargs |= {} if rate is None else {'base_keep_rate': rate}
    except (TypeError, ValueError):
        raise InputError(f'{source} has model arguments that are not of this program') from None
    kwargs |= further or {}
    reading = find_reading(stored, source)
    channels = kwargs.pop('in_chans', reading.channels)
    if channels != reading.channels:
        raise InputError(f'{source} is of a model for images of {reading.channels} channels, not of {channels}')
    if reading.channels != 3:
        kwargs['in_chans'] = reading.channels
    if timm.is_model(name):
        check_kwargs(name, kwargs)
    classes = class_names(checkpoint, source) or []
    stored_head = stored.get('nb_classes')
    head = _size_of_head(name, weights) or (stored_head if is_count(stored_head) else 0) or len(classes)
    if head:
        kwargs['num_classes'] = head
    if head and not len(classes) <= head <= MAX_SIZE:
        number = f'names {len(classes)} classes, and its head has {head} rows'
        raise InputError(f'{source} {number}: it is not of this program')
    # A head with more rows than the data had classes, and checkpoints of other programs, which name none.
    classes = [*classes, *map(str, range(len(classes), head or 0))]
    return Settings(name, kwargs, size, classes, *normalization(reading.channels), stored, reading)


def load_trained(
    source: str,
    *,
    ema: bool = False,
    name: str | None = None,
    input_size: int | None = None,
    further: Mapping[str, Any] | None = None,
) -> tuple[nn.Module, Settings, dict[str, Any]]:
    """The model of a checkpoint on the CPU, in eval mode, its settings, and the checkpoint.

    Args:
        source: a path or URL of a file of main.py, of the published codes, or of safetensors; or a run's folder.
        ema: take the moving average of the weights.
        name, input_size, further: see `read_settings`.

    Raises:
        InputError: if the file cannot be read or is of another model.
        UsageError: if it needs one of the arguments, or has no moving average.
    """
    loaded = ckpt.load(source)
    weights = model_weights(loaded, source, ema=ema)
    settings = read_settings(loaded, weights, source, name=name, input_size=input_size, further=further)
    return settings.build(weights, source), settings, loaded


def add_checkpoint_flags(parser: FlagParser) -> None:
    """The flags that say which trained model is meant; `load_chosen` reads it."""
    parser.add_argument('checkpoint', metavar='CHECKPOINT', help="path or URL, also of safetensors, or a run's folder")
    parser.add_argument('--ema', action='store_true', help='use the moving average of the weights')
    parser.add_argument('--model', help="a name of timm's registry, where the checkpoint says none")
    parser.add_argument('--input-size', type=PIXELS, help="pixels, in place of the checkpoint's")


def load_chosen(
    args: argparse.Namespace, further: Mapping[str, Any] | None = None
) -> tuple[nn.Module, Settings, dict[str, Any]]:
    """`load_trained` of what `add_checkpoint_flags` asked for."""
    return load_trained(args.checkpoint, ema=args.ema, name=args.model, input_size=args.input_size, further=further)


@torch.inference_mode()
def compare(
    forward: Callable[[Tensor], Tensor], model: nn.Module, shape: Sequence[int], batch_sizes: Sequence[int] = (2,)
) -> tuple[bool, float, float]:
    """Whether two models' logits are equal up to rounding on random images, their largest difference, and the largest.

    Args:
        forward, model: the one that is tested, and the one that is right.
        shape: of an image (C, H, W).
    """
    generator = torch.Generator().manual_seed(0)
    difference = largest = torch.zeros(())
    for batch_size in batch_sizes:
        images = torch.randn(batch_size, *shape, generator=generator)
        expected = model(images)
        difference = torch.maximum(difference, (forward(images) - expected).abs().max())  # NaN stays
        largest = torch.maximum(largest, expected.abs().max())
    return bool(difference <= TOLERANCE * largest.clamp(min=1)), float(difference), float(largest)


def fold_if_equal(model: nn.Module, shape: Sequence[int]) -> tuple[nn.Module, float]:
    """A model with its BatchNorms folded, and the largest difference of its logits on random images.

    The pairs are found by their names, which another's network may use otherwise; so this compares.

    Raises:
        InputError: if the outputs are not equal up to rounding.
    """
    folded = fold_batchnorm(model, by_name=True)
    equal, difference, _ = compare(folded, model, shape)
    if not equal:
        what = f'folding the BatchNorms of this {type(model).__name__} changes its logits by {difference:.2g}'
        raise InputError(f'{what}: its parts are not called in the order that their names say')
    return folded, difference
