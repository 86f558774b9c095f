"""Data sets of image files, and of images in memory."""

from __future__ import annotations

import io
import os
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image

from pipeline.files import read_file
from pipeline.images import AS_STORED, ImageDataset, Transform, pack_names
from pipeline.layouts import Split


class FileDataset(ImageDataset):
    """Images that are files below a folder."""

    def __init__(self, split: Split, classes: Sequence[str]) -> None:
        self.root = str(split.root)
        self._paths = pack_names(split.paths)
        super().__init__(split.targets, classes)

    def _name(self, position: int) -> str:
        return os.fsdecode(self._paths[position])

    def _path(self, position: int) -> str:
        return os.path.join(self.root, self._name(position))  # noqa: PTH118  ten times as fast as pathlib

    def _raw(self, position: int) -> bytes:
        return read_file(self._path(position))

    def file_size(self, index: int) -> int:
        return Path(self.path(index)).stat().st_size


class ArrayDataset(ImageDataset):
    """Images that are held in memory.

    Args:
        images: uint8, (n, H, W, 3), or (n, H, W) if grey.
        targets: class indices, (n,).
    """

    def __init__(
        self, images: np.ndarray, targets: Sequence[int], classes: Sequence[str], transform: Transform | None = None
    ) -> None:
        self.images = images
        super().__init__(targets, classes, transform)

    def _content(self) -> bytes:
        return np.ascontiguousarray(self.images).tobytes()

    def _image(self, position: int) -> Image.Image:
        return Image.fromarray(self.images[position]).convert(self.reading.mode)

    def _raw(self, position: int) -> bytes:
        file = io.BytesIO()
        Image.fromarray(self.images[position]).save(file, 'PNG')
        return file.getvalue()


class ItemDataset(ImageDataset):
    """Images that another data set, `items`, gives as pairs of an image of Pillow and a label."""

    def __init__(self, items: Any, labels: np.ndarray, classes: Sequence[str]) -> None:
        self.items = items
        super().__init__(labels, classes)

    def _raw(self, position: int) -> bytes:
        file = io.BytesIO()
        image = self.items[position][0]
        image = image if image.mode in ('L', 'RGB', 'I;16') else AS_STORED.convert(image)
        image.save(file, 'PNG', compress_level=1)
        return file.getvalue()
