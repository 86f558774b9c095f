"""Checkpoint files: written so that no crash leaves half of one, read so that none can run code."""

from __future__ import annotations

import argparse
import errno
import hashlib
import io
import json
import os
import re
import uuid
import zipfile
from collections.abc import Callable, Mapping
from contextlib import suppress
from http.client import HTTPException
from pathlib import Path
from typing import IO, Any
from urllib.parse import quote, urlsplit
from urllib.request import Request, url2pathname, urlopen

import safetensors.torch
import torch
from filelock import FileLock
from safetensors import SafetensorError
from torch import Tensor

from training.weights import stored_args
from utils import InputError, log, one_line

TEMPORARY = '.dhvt-partial'  # how names of files end that are not whole yet
CHECKPOINT, PREVIOUS, BEST = 'checkpoint.pth', 'previous_checkpoint.pth', 'best_checkpoint.pth'
EXPORTED = 'model.safetensors'  # timm's and the Hub's name
PLAIN = (
    *('args', 'classes', 'fingerprint', 'epoch', 'progress', 'max_accuracy', 'best_of', 'keep_rate'),
    *('history', 'timings', 'left_out'),
)  # what is printed, compared and written on, and never holds tensors
MAX_VALUES, MAX_DEPTH, MAX_BITS = 2_000_000, 20, 64
TIMEOUT = 30.0  # seconds without a byte of a download


def _sync_folder(folder: Path) -> None:
    """Puts a folder's names on the disk, where its file system can; Windows opens no folders."""
    with suppress(OSError):
        descriptor = os.open(folder, os.O_RDONLY)
        try:
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
    if path.is_dir():  # else the error, when the work is done, would have the temporary name
        raise IsADirectoryError(errno.EISDIR, os.strerror(errno.EISDIR), str(path))
    temporary = path.with_name(f'.{path.name}.{uuid.uuid4().hex[:8]}{TEMPORARY}')
    try:
        with open(str(temporary), 'x+b') as file:
            write(file)
            file.flush()
            os.fsync(file.fileno())
        if previous is not None:
            _keep(path, previous)
        temporary.replace(path)  # once it is closed: Windows renames no open file
    except BaseException:
        with suppress(OSError):
            temporary.unlink(missing_ok=True)
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
    """A checkpoint of tensors and plain Python values as the bytes of a file that `torch.load` reads."""
    buffer = io.BytesIO()
    torch.save(dict(checkpoint), buffer)
    return buffer.getvalue()


def _is_safetensors(data: bytes) -> bool:
    """Whether a file begins as those of safetensors do, whatever its name: with a length in 8 bytes, then JSON."""
    return data[8:9] == b'{'


def _check_ends(path: Path, source: str) -> None:
    """Refuses what by its first and last bytes, before its memory is taken, can be no checkpoint."""
    with path.open('rb') as file:
        size = os.fstat(file.fileno()).st_size
        start = file.read(9)
        file.seek(max(size - 1, 0))
        end = file.read()
    if _is_safetensors(start):
        plausible = 8 < int.from_bytes(start[:8], 'little') + 8 <= size
    elif start[:2] == b'PK':
        plausible = zipfile.is_zipfile(path)  # which looks at its end
    else:
        plausible = start[:1] == b'\x80' and end != b'\0' * (size > 1 << 30)  # PyTorch's format before 1.6
    if not plausible:
        raise InputError(f'{source} is damaged, or no checkpoint of PyTorch')


def _download(url: str) -> bytes:
    """The bytes of a URL's file, from torch.hub's cache if it is whole there; else it is fetched, and kept if it is.

    One process of a machine at a time; the others find what the first has fetched.
    """
    # The hub names its files by the URL's last part alone; two checkpoint.pth of different origin would be one.
    name = f'{hashlib.sha256(url.encode()).hexdigest()[:12]}-{Path(urlsplit(url).path).name}'
    path = Path(torch.hub.get_dir(), 'checkpoints', name)
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        with FileLock(f'{path}.lock'):
            if path.is_file():
                with suppress(InputError):
                    data = path.read_bytes()
                    from_bytes(data, path.name)
                    return data
            request = Request(quote(url, safe="%/:=&?~#+!$,;'@()*[]"), headers={'User-Agent': 'dhvt'})
            with urlopen(request, timeout=TIMEOUT) as answer:
                data, length = answer.read(), answer.headers.get('Content-Length')
            if length is not None and len(data) != int(length):
                raise OSError(f'{len(data)} of {length} bytes came')
            from_bytes(data, Path(urlsplit(url).path).name)
            write_bytes(path, data)
    except (OSError, HTTPException, ValueError, InputError) as err:
        raise InputError(f'cannot download {url} to {path}: {one_line(err)}') from None
    return data


def read(source: str) -> bytes:
    """The bytes of a checkpoint file.

    Args:
        source: a path, or a URL (http, https, file), which is downloaded once.

    Raises:
        InputError: if the file is missing or cannot be read.
    """
    try:
        url = urlsplit(source)
    except ValueError as err:
        raise InputError(f'{source}: {one_line(err)}') from None
    if url.scheme in ('http', 'https'):
        return _download(source)
    path = Path(url2pathname(url.path) if url.scheme == 'file' else source)
    if not path.is_file():
        raise InputError(f'{source}: no such checkpoint file')
    try:
        _check_ends(path, source)
        return path.read_bytes()
    except PermissionError:
        raise InputError(f'{source}: no permission to read it') from None
    except OSError as err:
        raise InputError(f'{source} cannot be read: {err.strerror}') from None
    except MemoryError:
        raise InputError(f'{source} cannot be read: its {path.stat().st_size >> 30} GiB need more memory') from None


def _check_archive(data: bytes, source: str) -> None:
    """Refuses a zip archive whose records are not as their checksums say, or that says to hold more than the file."""
    try:
        with zipfile.ZipFile(io.BytesIO(data)) as archive:
            members = archive.infolist()
            if any(member.compress_type != zipfile.ZIP_STORED for member in members):
                raise InputError(f'{source}: refused, it is compressed, and could take any amount of memory')
            if sum(member.file_size for member in members) > len(data):
                raise InputError(f'{source} is damaged: it says that it holds more than its {len(data)} bytes')
            whole = archive.testzip() is None and not any(member.external_attr & 0x10 for member in members)  # folders
    except (zipfile.BadZipFile, ValueError, RuntimeError, EOFError, OSError):
        whole = False
    if not whole:
        raise InputError(f'{source} is damaged, or no checkpoint of PyTorch')


def check_plain(value: Any, what: str) -> None:
    """Raises InputError unless a value is of numbers and words, and as small as it looks; shared parts count each time.

    `what` names it in the message.
    """
    left = MAX_VALUES
    stack = [(value, 0)]
    while stack:
        item, depth = stack.pop()
        if isinstance(item, argparse.Namespace):
            item = vars(item)
        left -= 1 + len(item) if isinstance(item, (str, bytes, Mapping, list, tuple, set)) else 1
        large = isinstance(item, int) and item.bit_length() > MAX_BITS
        if left < 0 or depth > MAX_DEPTH or large or isinstance(item, Tensor):
            kind = 'a tensor' if isinstance(item, Tensor) else 'a number of too many digits' if large else 'too much'
            raise InputError(f'{what} holds {kind}: it is not of this program')
        if isinstance(item, Mapping):
            stack += [(part, depth + 1) for pair in item.items() for part in pair]
        elif isinstance(item, (list, tuple, set)):
            stack += [(part, depth + 1) for part in item]


def _from_safetensors(data: bytes, source: str) -> dict[str, Any]:
    try:
        weights = safetensors.torch.load(data)
        length = int.from_bytes(data[:8], 'little')
        metadata = json.loads(data[8 : 8 + length]).get('__metadata__') or {}
        own = json.loads(metadata.get('dhvt', '{}'))
    except (SafetensorError, ValueError, KeyError, TypeError, RuntimeError, AttributeError) as err:
        raise InputError(f'{source} is damaged, or no safetensors file: {one_line(err)}') from None
    return {**(own if isinstance(own, dict) else {}), 'model': weights}


def check_fields(checkpoint: dict[str, Any], source: str) -> dict[str, Any]:
    """A checkpoint whose fields beside the tensors are plain, else InputError."""
    for name in PLAIN:
        check_plain(checkpoint.get(name), f'{source}: {name}')
    return checkpoint


def from_bytes(data: bytes, source: str) -> dict[str, Any]:
    """The checkpoint that a file's bytes hold, on the CPU.

    Only tensors and plain Python values are accepted, and the `argparse.Namespace` that the published code stores.

    Args:
        data: of a file of `torch.save`, or of safetensors.
        source: the file's name, for messages.

    Raises:
        InputError: if it is no checkpoint, is damaged, or holds anything else.
    """
    if _is_safetensors(data):
        return check_fields(_from_safetensors(data, source), source)
    if data[:2] == b'PK':
        _check_archive(data, source)
    try:
        with torch.serialization.safe_globals([argparse.Namespace]):
            checkpoint = torch.load(io.BytesIO(data), map_location='cpu', weights_only=True)
    except Exception as err:  # torch raises a dozen types for damaged files
        refused = re.search(r'GLOBAL ([\w.]+)|(?:class|type) ([\w.]+)', str(err)) if 'eights' in str(err) else None
        if refused:
            name = refused[1] or refused[2]
            raise InputError(f'{source}: refused, it holds {name}, and a checkpoint may hold no code') from None
        raise InputError(f'{source} is damaged, or no checkpoint of PyTorch') from None
    if not isinstance(checkpoint, dict):
        raise InputError(f'{source} holds a {type(checkpoint).__name__}, not a checkpoint')
    return check_fields(checkpoint, source)


def newest_in(folder: Path) -> tuple[str, bytes] | None:
    """The newest whole checkpoint of a run's folder, as its path and bytes; None if there are none.

    Raises:
        InputError: if there are checkpoints, but none is whole.
    """
    found = [folder / name for name in (CHECKPOINT, PREVIOUS, BEST) if (folder / name).exists()]
    whole: list[tuple[tuple[int, int], str, bytes]] = []
    for path in found:
        try:
            data = read(str(path))
            state = from_bytes(data, str(path))
            place = (int(state.get('epoch', -1)), int((state.get('progress') or {}).get('done', 0)))
        except InputError as err:
            log(f'Warning: {err}; the one before it is used')
            continue
        except (TypeError, ValueError, AttributeError, OverflowError):
            log(f'Warning: {path} does not say how far its run was; the one before it is used')
            continue
        whole.append((place, str(path), data))
        if path.name == CHECKPOINT:
            break
    if found and not whole:
        raise InputError(f'{folder} has checkpoints, but none is whole: move them away to start over')
    return max(whole, key=lambda entry: entry[0])[1:] if whole else None


def load(source: str, *, newest: bool = False) -> dict[str, Any]:
    """Reads a checkpoint onto the CPU.

    Args:
        source: a file's path or URL, or a run's folder: its best checkpoint is taken; or the folder of an export.
        newest: take a folder's newest.

    Raises:
        InputError: if there is none, or `from_bytes` refuses it.
    """
    folder = Path(source)
    if not folder.is_dir():
        return from_bytes(read(source), source)
    if not newest and (folder / BEST).is_file():
        try:
            return from_bytes(read(str(folder / BEST)), str(folder / BEST))
        except InputError as err:
            log(f'Warning: {err}')
    found = newest_in(folder)
    if found is None and (folder / EXPORTED).is_file():
        return load(str(folder / EXPORTED))
    if found is None:
        raise InputError(f'{source} is a folder without a {BEST} or {CHECKPOINT}')
    if not newest:
        log(f'Warning: {source} has no {"whole " * (folder / BEST).exists()}{BEST}: {found[0]} is taken')
    return from_bytes(found[1], found[0])


def to_safetensors(weights: Mapping[str, Tensor], metadata: Mapping[str, Any]) -> bytes:
    """Weights as the bytes of a safetensors file, with what describes them as JSON in its metadata, under 'dhvt'."""
    tensors = {name: value.detach().cpu().contiguous() for name, value in weights.items()}
    text = json.dumps(metadata, default=str, skipkeys=True)  # other programs' arguments may be of any kind
    return safetensors.torch.save(tensors, {'format': 'pt', 'dhvt': text})


def export_metadata(checkpoint: Mapping[str, Any]) -> dict[str, Any]:
    """What a safetensors file keeps of a checkpoint beside its weights: enough to evaluate them."""
    names = ('epoch', 'max_accuracy', 'keep_rate', 'classes')
    metadata = {name: checkpoint[name] for name in names if name in checkpoint}
    return {**metadata, 'args': stored_args(checkpoint)}
