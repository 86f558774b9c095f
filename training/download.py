"""Files of the web: where torch.hub's cache has them, and how they are fetched."""

from __future__ import annotations

import hashlib
from pathlib import Path
from urllib.parse import quote, urlsplit
from urllib.request import Request, urlopen

import torch

TIMEOUT = 30.0  # seconds without a byte


def cache_path(url: str) -> Path:
    """The name of a URL's file in torch.hub's folder for checkpoints."""
    # The hub names its files by the URL's last part alone; two checkpoint.pth of different origin would be one.
    name = f'{hashlib.sha256(url.encode()).hexdigest()[:12]}-{Path(urlsplit(url).path).name}'
    return Path(torch.hub.get_dir(), 'checkpoints', name)


def fetch(url: str) -> bytes:
    """What a URL gives.

    Raises:
        OSError, HTTPException, ValueError: where that fails, or ends before the length that the server said.
    """
    request = Request(quote(url, safe="%/:=&?~#+!$,;'@()*[]"), headers={'User-Agent': 'dhvt'})
    with urlopen(request, timeout=TIMEOUT) as answer:
        data = answer.read()
        length = answer.headers.get('Content-Length')
        if length is not None and len(data) != int(length):
            raise OSError(f'{len(data)} of {length} bytes came')
    return data
