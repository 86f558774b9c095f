"""The teachers of distillation."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import timm
from torch import nn

from config.models import new_model, published_config
from config.pretrained import read_settings
from training import checkpoint as ckpt
from training.weights import model_weights, stored_args
from utils import InputError, one_line

DEFAULT_TEACHER = 'regnety_160'


def trained_teacher(
    name: str, path: str, num_classes: int, classes: Sequence[str]
) -> tuple[nn.Module, int, Mapping[str, Any]]:
    """The teacher of a checkpoint, its image size, and its normalisation.

    A checkpoint of this program or of the published codes says its model's arguments, and has ImageNet's normalisation
    as they do; for other weights timm's settings of the model count.
    """
    cfg = published_config(name)
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


def pretrained_teacher(name: str, input_size: int, num_classes: int) -> tuple[nn.Module, int, Mapping[str, Any]]:
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
