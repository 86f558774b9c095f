"""Checkpoint files: written so that no crash leaves half of one, read so that none can run code."""

from __future__ import annotations

import argparse
import hashlib
import io
import json
import math
import os
import re
import struct
import tempfile
from collections.abc import Callable, Mapping
from contextlib import suppress
from pathlib import Path
from typing import IO, Any
from urllib.error import URLError
from urllib.parse import urlsplit
from urllib.request import url2pathname

import safetensors.torch
import torch
from safetensors import SafetensorError
from timm.layers import resample_abs_pos_embed
from torch import Tensor, nn

from utils import InputError, count, one_line

COMMENT = b'sha256 '
COMMENT_LENGTH = len(COMMENT) + 64
NO_COMMENT = b'PK\x05\x06' + bytes(18)  # a zip archive's last record: counts, offsets, length of the comment
TEMPORARY = '.dhvt-partial'  # how names of files end that are not whole yet


def _sync_folder(folder: Path) -> None:
    """Puts a folder's names on the disk, where its file system can."""
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        with suppress(OSError):
            os.fsync(descriptor)
    finally:
        os.close(descriptor)


def _keep(path: Path, previous: Path) -> None:
    """Gives a file a second name, in place of what had it; the file has its first name all the time."""
    link = path.with_name(f'.{previous.name}{TEMPORARY}')
    link.unlink(missing_ok=True)
    try:
        os.link(path, link)
    except FileNotFoundError:
        return
    except OSError:  # a file system without links
        path.replace(previous)
        return
    link.replace(previous)


def write_file(path: Path, write: Callable[[IO[bytes]], object], *, previous: Path | None = None) -> None:
    """Writes a file under a temporary name beside it, syncs it to the disk, then renames it into place.

    Whatever interrupts this, `path` holds either its old content or the whole of the new one.

    Args:
        previous: a name that the old file gets.

    Raises:
        OSError: if the disk is full or the folder cannot be written; the old file is untouched.
    """
    with tempfile.NamedTemporaryFile(dir=path.parent, prefix=f'.{path.name}.', suffix=TEMPORARY, delete=False) as file:
        try:
            write(file)
            file.flush()
            os.fsync(file.fileno())
            umask = os.umask(0)
            os.umask(umask)
            os.fchmod(file.fileno(), 0o666 & ~umask)  # temporary files start as the owner's alone
            if previous is not None:
                _keep(path, previous)
            Path(file.name).replace(path)
        except BaseException:
            with suppress(OSError):
                Path(file.name).unlink(missing_ok=True)
            raise
    _sync_folder(path.parent)


def write_bytes(path: Path, data: bytes, *, previous: Path | None = None) -> None:
    """`write_file` for bytes that are in memory."""
    write_file(path, lambda file: file.write(data), previous=previous)


def remove_temporary(folder: Path) -> None:
    """Removes what a killed `write_file` left in a folder that no other process writes to."""
    for path in folder.glob(f'.*{TEMPORARY}'):
        path.unlink(missing_ok=True)


def to_bytes(checkpoint: Mapping[str, Any]) -> bytes:
    """A checkpoint of tensors and plain Python values as the bytes of a file that `torch.load` reads.

    The file is a zip archive; its SHA-256 stands at its end, where zip archives have room for a comment.
    """
    buffer = io.BytesIO()
    torch.save(dict(checkpoint), buffer)
    body = buffer.getvalue()
    assert body[-len(NO_COMMENT) :][:4] == NO_COMMENT[:4], 'torch.save ends its files otherwise than it did'
    body = body[:-2] + struct.pack('<H', COMMENT_LENGTH)
    return body + COMMENT + hashlib.sha256(body).hexdigest().encode()


def save(path: Path, checkpoint: Mapping[str, Any]) -> None:
    """Writes a checkpoint of tensors and plain Python values, with its checksum, to `path`."""
    write_bytes(path, to_bytes(checkpoint))


def _is_whole(data: bytes) -> bool:
    """Whether a file's bytes are those that were written, as far as the file can say: others' have no checksum."""
    if data[:4] != b'PK\x03\x04':  # PyTorch's format before 1.6
        return True
    body, comment = data[:-COMMENT_LENGTH], data[-COMMENT_LENGTH:]
    if comment.startswith(COMMENT):
        return comment[len(COMMENT) :] == hashlib.sha256(body).hexdigest().encode()
    return data[-22:-18] == NO_COMMENT[:4] and data[-2:] == NO_COMMENT[-2:]


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


def read(source: str) -> bytes:
    """The bytes of a checkpoint file.

    Args:
        source: a path, or a URL (http, https, file), which is downloaded once.

    Raises:
        InputError: if the file is missing or cannot be read.
    """
    url = urlsplit(source)
    if url.scheme in ('http', 'https'):
        path = _download(source)
    else:
        path = Path(url2pathname(url.path) if url.scheme == 'file' else source)
    if not path.is_file():
        raise InputError(f'{source}: no such checkpoint file')
    try:
        return path.read_bytes()
    except PermissionError:
        raise InputError(f'{source}: no permission to read it') from None
    except OSError as err:
        raise InputError(f'{source} cannot be read: {err.strerror}') from None


def _from_safetensors(data: bytes, source: str) -> dict[str, Any]:
    try:
        weights = safetensors.torch.load(data)
        length = int.from_bytes(data[:8], 'little')
        metadata = json.loads(data[8 : 8 + length]).get('__metadata__') or {}
        described = json.loads(metadata.get('dhvt', '{}'))
    except (SafetensorError, ValueError, KeyError, TypeError, RuntimeError, AttributeError) as err:
        raise InputError(f'{source} is damaged, or no safetensors file: {one_line(err)}') from None
    return {'model': weights, **(described if isinstance(described, dict) else {})}


def from_bytes(data: bytes, source: str) -> dict[str, Any]:
    """The checkpoint that a file's bytes hold, on the CPU.

    Only tensors and plain Python values are accepted, and the `argparse.Namespace` that the published code stores.

    Args:
        data: of a file of `torch.save`, or of safetensors if `source` ends so.
        source: the file's name, for messages.

    Raises:
        InputError: if it is no checkpoint, is damaged, or holds anything else.
    """
    if source.endswith('.safetensors'):
        return _from_safetensors(data, source)
    if not _is_whole(data):
        raise InputError(f'{source} is damaged: it was cut off or altered after it was written')
    try:
        with torch.serialization.safe_globals([argparse.Namespace]):
            checkpoint = torch.load(io.BytesIO(data), map_location='cpu', weights_only=True)
    except Exception as err:  # torch raises a dozen types for damaged files
        refused = re.search(r'GLOBAL ([\w.]+)|(?:class|type) ([\w.]+)', str(err)) if 'eights' in str(err) else None
        if refused:
            name = refused.group(1) or refused.group(2)
            raise InputError(f'{source}: refused, it holds {name}, and a checkpoint may hold no code') from None
        raise InputError(f'{source} is damaged, or no checkpoint of PyTorch') from None
    if not isinstance(checkpoint, dict):
        raise InputError(f'{source} holds a {type(checkpoint).__name__}, not a checkpoint')
    return checkpoint


def load(source: str) -> dict[str, Any]:
    """Reads a checkpoint from a path or a URL onto the CPU: `read`, then `from_bytes`."""
    return from_bytes(read(source), source)


def to_safetensors(weights: Mapping[str, Tensor], described: Mapping[str, Any]) -> bytes:
    """Weights as the bytes of a safetensors file, with what describes them as JSON in its metadata, under 'dhvt'."""
    tensors = {name: value.detach().cpu().contiguous() for name, value in weights.items()}
    return safetensors.torch.save(tensors, {'format': 'pt', 'dhvt': json.dumps(described)})


def description(checkpoint: Mapping[str, Any]) -> dict[str, Any]:
    """What a safetensors file keeps of a checkpoint beside its weights: enough to evaluate them."""
    described = {
        name: checkpoint[name] for name in ('epoch', 'max_accuracy', 'keep_rate', 'classes') if name in checkpoint
    }
    return {**described, 'args': stored_args(checkpoint)}


def stored_args(checkpoint: Mapping[str, Any]) -> dict[str, Any]:
    """The arguments of the run that wrote a checkpoint, empty if it does not say."""
    args = checkpoint.get('args')
    if isinstance(args, argparse.Namespace):
        args = vars(args)
    return dict(args) if isinstance(args, Mapping) else {}


def class_names(checkpoint: Mapping[str, Any], source: str) -> list[str] | None:
    """The classes in the order of a checkpoint's head, None if it does not say.

    Raises:
        InputError: if they are no names.
    """
    names = checkpoint.get('classes')
    if names is not None and not (isinstance(names, (list, tuple)) and all(isinstance(name, str) for name in names)):
        raise InputError(f'{source} has {names!r:.40} as its classes: it is not of this program')
    return None if names is None else list(names)


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
    """Compares weights with a model that they must fit exactly.

    Raises:
        InputError: if they do not.
    """
    reshaped, missing, unexpected = _differences(model, weights)
    if reshaped or missing or unexpected:
        parts = [
            count(names, noun)
            for names, noun in (
                (reshaped, 'other shape'),
                (missing, 'missing key'),
                (unexpected, 'unexpected key'),
            )
            if names
        ]
        raise InputError(
            f'{source} does not fit the model: {"; ".join(parts)}. '
            'Check --model, --input-size and --nb-classes, or use --finetune to start from what fits'
        )


def load_whole(model: nn.Module, weights: Mapping[str, Tensor], source: str) -> None:
    """Loads weights that must fit exactly.

    Raises:
        InputError: if they do not; the model is then untouched.
    """
    check_whole(model, weights, source)
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
