"""Checkpoints from the web: each is fetched once, and kept only if it is whole."""

from __future__ import annotations

import hashlib
from collections.abc import Callable
from http.client import HTTPException
from pathlib import Path
from urllib.parse import quote, urlsplit
from urllib.request import Request, urlopen

import torch

from utils import InputError, one_line

TIMEOUT = 30.0  # seconds without a byte
CHUNK = 1 << 20


def _fetch(url: str, path: Path) -> None:
    """Writes what a URL gives to a file.

    Raises:
        OSError, HTTPException, ValueError: where that fails, or ends before the length that the server said.
    """
    request = Request(quote(url, safe="%/:=&?~#+!$,;'@()*[]"), headers={'User-Agent': 'dhvt'})
    with urlopen(request, timeout=TIMEOUT) as answer, path.open('wb') as file:
        while chunk := answer.read(CHUNK):
            file.write(chunk)
        length = answer.headers.get('Content-Length')
        if length is not None and file.tell() != int(length):
            raise OSError(f'{file.tell()} of {length} bytes came')


def download(url: str, check: Callable[[Path], object]) -> Path:
    """The file of a URL, in torch.hub's folder for checkpoints; a damaged one there is fetched anew.

    Args:
        check: raises InputError for a file that is not whole.

    Raises:
        InputError: if it cannot be had.
    """
    # The hub names its files by the URL's last part alone; two checkpoint.pth of different origin would be one.
    name = f'{hashlib.sha256(url.encode()).hexdigest()[:12]}-{Path(urlsplit(url).path).name}'
    path = Path(torch.hub.get_dir(), 'checkpoints', name)
    if path.exists():
        try:
            check(path)
            return path
        except InputError:
            pass
    partial = path.with_name(f'.{name}.partial')
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        _fetch(url, partial)
        check(partial)
        partial.replace(path)
    except (OSError, HTTPException, ValueError, InputError) as err:
        partial.unlink(missing_ok=True)
        reason = one_line(err).replace(str(partial), 'what came')
        raise InputError(f'cannot download {url} to {path}: {reason}') from None
    return path
