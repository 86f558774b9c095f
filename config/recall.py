"""Flags that stand in a file: of settings in YAML, or of the run that wrote a checkpoint."""

from __future__ import annotations

import argparse
import difflib
import re
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

from config.flags import FlagParser, read_mapping
from config.models import EVIT_ARGUMENTS, is_evit
from training import checkpoint as ckpt
from training.weights import stored_args
from utils import InputError, UsageError

MODEL_FLAGS = ('model', 'model_kwargs', 'in_chans', *EVIT_ARGUMENTS)  # with --finetune, the run's unless given
LAYOUT_FLAGS = ('data_layout', 'inat_category', 'use_lmdb')
EVIT_FLAGS = (*EVIT_ARGUMENTS, 'shrink_start_epoch', 'shrink_epochs')
RECALLED_FLAGS = (  # with --eval, these
    *('model', 'model_kwargs', 'input_size', 'nb_classes', 'batch_size', 'amp', 'channels_last'),
    *('in_chans', 'exif_orientation', 'value_range', 'data_set', 'data_path', *LAYOUT_FLAGS, *EVIT_FLAGS),
)


def config_flags(parser: FlagParser, path: str) -> list[str]:
    """The flags that a YAML file sets, as they would be typed. What a run derived of its flags, in its args.yaml, is
    passed over.

    Raises:
        InputError: if it is no such file.
        UsageError: for a name that is no flag, or a value that none has.
    """
    actions = {name[2:].replace('-', '_'): action for name, action in parser._option_string_actions.items()}
    names = actions.keys() - {'', 'help', 'config'}
    settings: dict[str, Any] = {}
    for key, value in read_mapping(path).items():
        name = str(key).replace('-', '_')
        if name == 'derived':
            continue
        if name not in names:
            near = difflib.get_close_matches(name, names, n=1)
            raise UsageError(f'{path}: there is no flag {key!r}' + ''.join(f' (is {flag} meant?)' for flag in near))
        switch, choices = actions[name].nargs == 0, actions[name].choices or ()
        if value is None and actions[name].default not in (None, '', []):
            raise UsageError(f'{path}: {key} cannot be null: leave it out, or write what it is to be')
        if value is not None and not isinstance(value, bool if switch else (str, int, float, list, dict)):
            raise UsageError(f'{path}: {key} cannot be {value!r:.40}' + ', but true or false' * switch)
        if value is False and 'off' in choices:
            value = 'off'  # which YAML takes for a false
        if value is not False or not switch or f'no_{name}' in names:
            settings[name] = value
    return stored_flags(settings, settings, path)


def stored_flags(
    stored: Mapping[str, Any], names: Iterable[str] = RECALLED_FLAGS, source: str = 'the checkpoint'
) -> list[str]:
    """Some flags of a run as they would be typed, so that the parser checks them like any others; not those at None.

    Raises:
        InputError: for a value that would be taken for more than a flag's value.
    """
    flags: list[str] = []
    for name in names:
        value = stored.get(name)
        if isinstance(value, (list, tuple)) or (name == 'model_kwargs' and value is not None):
            words = _words(name, value)
            if words is None or any(re.match(r'-\D|-$', word) for word in words):
                raise InputError(f'{source} has {value!r:.40} as {name}: it is not of this program')
            flags += [f'--{name}', *words]
        elif isinstance(value, bool):
            flags.append(f'--{name}' if value else f'--no-{name}')
        elif value is not None:
            flags.append(f'--{name}={value}')
    return flags


def _words(name: str, value: Any) -> list[str] | None:
    """A list as the words after its flag, None if it is not of the flag's form."""
    try:
        if name == 'model_kwargs':
            pairs = value.items() if isinstance(value, Mapping) else value
            return [f'{key}={setting!r}' for key, setting in pairs]
        if name == 'checkpoint_every':
            kind, amount = value
            return [f'{amount:.12f}m' if kind == 'minutes' else f'{amount:.0f}']
        return [str(item) for item in value]
    except (TypeError, ValueError):
        return None


def recalled_flags(args: argparse.Namespace, typed: set[str]) -> list[str]:
    """What the run that wrote a checkpoint says in place of flags that are not typed.

    Args:
        typed: names of flags, with hyphens.

    Raises:
        InputError: if the checkpoint cannot be read.
        UsageError: if it does not say its model, and the flags do not either.
    """
    source = (args.eval and args.resume) or args.finetune
    if not source:
        return []
    goes_on = args.auto_resume and args.output_dir and not args.eval  # then what it began with is not needed
    newest = ckpt.newest_in(Path(args.output_dir)) if goes_on else None
    stored = stored_args(ckpt.load(source) if newest is None else ckpt.from_bytes(newest[1], newest[0]))
    name = stored.get('model')
    if args.eval and (args.resume or isinstance(name, str)):
        without: tuple[str, ...] = ()
        if '--data-set' in typed:  # how the other one lies says nothing about this one
            without = LAYOUT_FLAGS
        elif typed & {'--use-lmdb', '--no-use-lmdb'}:
            without = ('data_layout',)
        if not is_evit(args.model if '--model' in typed else str(name)):
            without += EVIT_FLAGS
        return stored_flags(stored, [name for name in RECALLED_FLAGS if name not in without])
    if '--model' in typed:
        return stored_flags(stored, MODEL_FLAGS[1:]) if name == args.model else []
    if not isinstance(name, str):
        raise UsageError(f'{args.finetune} does not say which model it is of: give --model (MODEL=… for finetune.sh)')
    return stored_flags(stored, MODEL_FLAGS)
