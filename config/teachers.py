"""The teachers of distillation."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import timm
from torch import nn

from config.models import new_model
from config.pretrained import read_settings
from losses import Teacher
from pipeline.transforms import normalization
from training import checkpoint as ckpt
from training.weights import model_weights, stored_args
from utils import InputError, one_line

DEFAULT_TEACHER = 'regnety_160'


def _trained_teacher(
    name: str | None, path: str, num_classes: int, classes: Sequence[str]
) -> tuple[nn.Module, int, Mapping[str, Any]]:
    """The teacher of a checkpoint, its image size, and its normalisation.

    A checkpoint of this program or of the published codes says its model's arguments, and has ImageNet's normalisation
    as they do; for other weights timm's settings of the model count.
    """
    name = name or DEFAULT_TEACHER
    cfg = timm.models.get_pretrained_cfg(name) if timm.is_model(name) else None
    own = timm.data.resolve_data_config(pretrained_cfg=cfg.to_dict() if cfg is not None else {})
    loaded = ckpt.load(path)
    weights = model_weights(loaded, path)
    stored = stored_args(loaded)
    ours = isinstance(stored.get('data_set'), str) and isinstance(stored.get('input_size'), int)
    settings = read_settings(loaded, weights, path, name=name, default_size=own['input_size'][-1])
    taught = loaded.get('classes')
    if taught is not None and len(taught) == len(classes) and list(taught) != list(classes):
        raise InputError(f'the teacher {path} has other classes than the data set, or in another order')
    has = settings.kwargs.setdefault('num_classes', num_classes)
    if has != num_classes:
        raise InputError(f'the teacher {path} has {has} classes, the data set has {num_classes}')
    model = settings.build(weights, path, flag='--teacher-model')
    return model, settings.input_size, {'mean': settings.mean, 'std': settings.std} if ours else own


def _pretrained_teacher(name: str, input_size: int, num_classes: int) -> tuple[nn.Module, int, Mapping[str, Any]]:
    """The teacher with timm's weights, its image size, and its normalisation."""
    if not timm.is_model(name):
        new_model('--teacher-model', name, input_size, {})
    try:
        model = timm.create_model(name, pretrained=True)
    except Exception as err:  # whatever timm and the hub raise where there are no weights or no network
        raise InputError(f"cannot get timm's weights of {name} ({one_line(err)}): give --teacher-path FILE") from None
    if model.num_classes != num_classes:
        have = f'have {model.num_classes} classes, the data set has {num_classes}'
        raise InputError(f"timm's weights of {name} {have}: give --teacher-path FILE")
    settings = timm.data.resolve_data_config(model=model)
    return model, settings['input_size'][-1], settings


def create_teacher(
    name: str | None, path: str | None, *, input_size: int, num_classes: int, in_chans: int = 3, classes: Sequence[str]
) -> Teacher:
    """The teacher of distillation, at the image size and the normalisation that it was trained with.

    Args:
        name: of timm's registry, `DEFAULT_TEACHER` if None.
        path: of its checkpoint; timm's weights if there is none.
        input_size, in_chans: the student's images, in pixels, and their channels.
        num_classes, classes: the data set's.

    Raises:
        UsageError: if timm does not know the model.
        InputError: if the weights cannot be had, or are for another number of classes.
    """
    if path:
        model, size, own = _trained_teacher(name, path, num_classes, classes)
    else:
        model, size, own = _pretrained_teacher(name or DEFAULT_TEACHER, input_size, num_classes)
    student_mean, student_std = normalization(in_chans)
    return Teacher(
        model,
        input_size=size,
        mean=own['mean'],
        std=own['std'],
        student_mean=student_mean,
        student_std=student_std,
    )
