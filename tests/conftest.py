"""Fixtures: small images made on the spot, and flags that make a run take seconds."""

from __future__ import annotations

import multiprocessing
import threading
from collections.abc import Callable, Iterator
from functools import cache, partial
from http.server import SimpleHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from sklearn import datasets

ROOT = Path(__file__).resolve().parent.parent

# A model of 20,000 parameters on 16 px images, in float32, without augmentation.
SMALL_MODEL = ['--model', 'dhvt_tiny_cifar_patch4', '--model-kwargs', 'embed_dim=32', 'depth=2', 'num_heads=2']
PLAIN = [
    *('--no-aug', '--mixup', '0', '--cutmix', '0', '--no-repeated-aug', '--drop-path', '0', '--no-model-ema'),
    *('--warmup-epochs', '0', '--num_workers', '0', '--device', 'cpu', '--amp', 'off', '--input-size', '16'),
    '--no-report',
]  # fmt: skip


@pytest.fixture(autouse=True, scope='session')
def one_thread() -> None:
    torch.set_num_threads(1)


@pytest.fixture(autouse=True, scope='session')
def read_and_imported_once() -> None:
    datasets.load_digits = cache(datasets.load_digits)
    multiprocessing.set_forkserver_preload(['main'])


@pytest.fixture
def make_folder(tmp_path: Path) -> Callable[..., Path]:
    """Makes `<split>/<class>/<n>.jpg` under a new folder: classes are told apart by their colour."""

    def make(splits: dict[str, list[str]], *, images: int = 8, size: int = 20, name: str = 'folder') -> Path:
        rng = np.random.default_rng(0)
        root = tmp_path / name
        for split, classes in splits.items():
            for cls in classes:
                folder = root / split / cls
                folder.mkdir(parents=True)
                hue = sum(cls.encode()) * 37 % 256
                for i in range(images):
                    pixels = rng.integers(0, 60, (size, size, 3)) + np.array([hue, 255 - hue, 128]) // 2
                    Image.fromarray(pixels.astype(np.uint8)).save(folder / f'{i}.jpg')
        return root

    return make


def make_lists(root: Path, domain: str, lists: dict[str, list[tuple[str, int]]], *, size: int = 20) -> Path:
    """Makes `<domain>_<split>.txt` in DomainNet's format from pairs of `<class>/<file>` and label, and the images."""
    rng = np.random.default_rng(0)
    for split, rows in lists.items():
        for name, _ in rows:
            path = root / domain / name
            path.parent.mkdir(parents=True, exist_ok=True)
            Image.fromarray(rng.integers(0, 256, (size, size, 3), dtype=np.uint8)).save(path)
        (root / f'{domain}_{split}.txt').write_text(''.join(f'{domain}/{name} {label}\n' for name, label in rows))
    return root


@pytest.fixture
def web_folder(tmp_path: Path) -> Iterator[tuple[Path, str]]:
    """A folder and the URL on this machine that serves it."""
    folder = tmp_path / 'web'
    folder.mkdir()
    handler = partial(SimpleHTTPRequestHandler, directory=str(folder))
    with ThreadingHTTPServer(('127.0.0.1', 0), handler) as server:
        threading.Thread(target=server.serve_forever, daemon=True).start()
        yield folder, f'http://127.0.0.1:{server.server_address[1]}'
        server.shutdown()
