"""Checkpoint files: written so that no crash leaves half of one, read so that none can run code."""

from __future__ import annotations

import argparse
import hashlib
import math
import os
import re
import tempfile
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import IO, Any
from urllib.error import URLError
from urllib.parse import urlsplit
from urllib.request import url2pathname

import torch
from timm.layers import resample_abs_pos_embed
from torch import Tensor, nn

from utils import InputError, count, one_line


def write_file(path: Path, write: Callable[[IO[bytes]], object]) -> None:
    """Writes a file under a temporary name beside it, syncs it to the disk, then renames it into place.

    Whatever interrupts this, `path` holds either its old content or the whole of the new one.

    Raises:
        OSError: if the disk is full or the folder cannot be written; the old file is untouched.
    """
    with tempfile.NamedTemporaryFile(dir=path.parent, prefix=f'.{path.name}.', delete=False) as file:
        try:
            write(file)
            file.flush()
            os.fsync(file.fileno())
            umask = os.umask(0)
            os.umask(umask)
            os.fchmod(file.fileno(), 0o666 & ~umask)  # temporary files start as the owner's alone
            Path(file.name).replace(path)
        except BaseException:
            Path(file.name).unlink(missing_ok=True)
            raise


def save(path: Path, checkpoint: Mapping[str, Any]) -> None:
    """Writes a checkpoint of tensors and plain Python values to `path`."""
    write_file(path, lambda file: torch.save(dict(checkpoint), file))


def _download(url: str) -> Path:
    # The hub names its files by the URL's last part alone; two checkpoint.pth of different origin would be one.
    name = f'{hashlib.sha256(url.encode()).hexdigest()[:12]}-{Path(urlsplit(url).path).name}'
    path = Path(torch.hub.get_dir(), 'checkpoints', name)
    if not path.exists():
        path.parent.mkdir(parents=True, exist_ok=True)
        try:
            torch.hub.download_url_to_file(url, str(path), progress=False)
        except (URLError, ValueError, OSError) as err:
            raise InputError(f'cannot download {url}: {one_line(err)}') from None
    return path


def load(source: str) -> dict[str, Any]:
    """Reads a checkpoint onto the CPU.

    Only tensors and plain Python values are accepted, and the `argparse.Namespace` that the published code stores.

    Args:
        source: a path, or a URL (http, https, file), which is downloaded once.

    Raises:
        InputError: if the file is missing, is no checkpoint, is damaged, or holds anything else.
    """
    url = urlsplit(source)
    if url.scheme in ('http', 'https'):
        path = _download(source)
    else:
        path = Path(url2pathname(url.path) if url.scheme == 'file' else source)
    if not path.is_file():
        raise InputError(f'{source}: no such checkpoint file')
    try:
        with torch.serialization.safe_globals([argparse.Namespace]):
            checkpoint = torch.load(path, map_location='cpu', weights_only=True)
    except PermissionError:
        raise InputError(f'{source}: no permission to read it') from None
    except Exception as err:  # torch raises a dozen types for damaged files
        refused = re.search(r'GLOBAL ([\w.]+)|(?:class|type) ([\w.]+)', str(err)) if 'eights' in str(err) else None
        if refused:
            name = refused.group(1) or refused.group(2)
            raise InputError(f'{source}: refused, it holds {name}, and a checkpoint may hold no code') from None
        raise InputError(f'{source} is damaged, or no checkpoint of PyTorch') from None
    if not isinstance(checkpoint, dict):
        raise InputError(f'{source} holds a {type(checkpoint).__name__}, not a checkpoint')
    return checkpoint


def stored_args(checkpoint: Mapping[str, Any]) -> dict[str, Any]:
    """The arguments of the run that wrote a checkpoint, empty if it does not say."""
    args = checkpoint.get('args')
    if isinstance(args, argparse.Namespace):
        args = vars(args)
    return dict(args) if isinstance(args, Mapping) else {}


def model_weights(checkpoint: Mapping[str, Any], source: str) -> dict[str, Tensor]:
    """The model's state_dict out of a checkpoint, under any of the names that training codes give it.

    Prefixes that DistributedDataParallel and torch.compile put before each name are removed.

    Raises:
        InputError: if there is none.
    """
    weights: Any = checkpoint
    for key in ('model', 'state_dict'):
        if isinstance(checkpoint.get(key), Mapping):
            weights = checkpoint[key]
            break
    tensors = {
        re.sub(r'^(module\.|_orig_mod\.)+', '', name): value
        for name, value in weights.items()
        if isinstance(name, str) and isinstance(value, Tensor)
    }
    if not tensors:
        raise InputError(f'{source} holds no model weights (its keys: {count(weights, "key")})')
    return tensors


def _differences(model: nn.Module, weights: Mapping[str, Tensor]) -> tuple[list[str], list[str], list[str]]:
    """Names in both whose shapes differ, names that only the model has, names that only the weights have."""
    own = model.state_dict()
    reshaped = [
        f'{name} {tuple(weights[name].shape)} for {tuple(own[name].shape)}'
        for name in own
        if name in weights and weights[name].shape != own[name].shape
    ]
    return reshaped, [name for name in own if name not in weights], [name for name in weights if name not in own]


def load_whole(model: nn.Module, weights: Mapping[str, Tensor], source: str) -> None:
    """Loads weights that must fit exactly.

    Raises:
        InputError: if they do not; the model is then untouched.
    """
    reshaped, missing, unexpected = _differences(model, weights)
    if reshaped or missing or unexpected:
        parts = [
            count(names, noun)
            for names, noun in ((reshaped, 'other shape'), (missing, 'missing key'), (unexpected, 'unexpected key'))
            if names
        ]
        raise InputError(
            f'{source} does not fit the model: {"; ".join(parts)}. '
            'Check --model, --input-size and --nb-classes, or use --finetune to start from what fits'
        )
    model.load_state_dict(dict(weights))


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


def load_fitting(model: nn.Module, weights: Mapping[str, Tensor], source: str) -> list[str]:
    """Loads what fits and leaves the rest of the model as it is: for fine-tuning with another head.

    A position embedding of another image size is resampled, by timm's function.

    Returns:
        A line each for what was resampled, dropped because its shape differs, what is missing and what is unexpected.

    Raises:
        InputError: if nothing fits.
    """
    weights, note = _resample_position_embedding(model, weights)
    reshaped, missing, unexpected = _differences(model, weights)
    dropped = {entry.split()[0] for entry in reshaped}
    fitting = {name: value for name, value in weights.items() if name not in dropped and name not in unexpected}
    if not fitting:
        raise InputError(f'{source}: nothing in it fits the model; it holds {count(unexpected or reshaped, "key")}')
    model.load_state_dict(fitting, strict=False)
    lists = ((reshaped, 'dropped'), (missing, 'missing'), (unexpected, 'unexpected'))
    return [note] * bool(note) + [f'{kind}: {", ".join(names)}' for names, kind in lists if names]
