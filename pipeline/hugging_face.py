"""Data sets of the Hugging Face Hub, by timm's reader: the one place where `datasets` is Hugging Face's package."""

from __future__ import annotations

import importlib
import sys
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from types import ModuleType
from typing import Any

import numpy as np
import pyarrow as pa
from timm.data.readers import create_reader

from pipeline.files import read_file
from pipeline.images import ImageDataset
from pipeline.readers import SPLIT_NAMES, check_labels, check_splits
from utils import InputError, one_line, shorten

_theirs: dict[str, ModuleType] = {}


def _is_theirs(name: str) -> bool:
    return name == 'datasets' or name.startswith('datasets.')


@contextmanager
def hugging_face() -> Iterator[ModuleType]:
    """Hugging Face's package `datasets`, which the name stands for in the body, and this folder's datasets.py outside.

    Nothing of the package is needed after the body: loader processes do not import it, however they are started.

    Raises:
        InputError: if it is not installed.
    """
    folder = Path(__file__).resolve().parent.parent
    ours = {name: sys.modules.pop(name) for name in list(sys.modules) if _is_theirs(name)}
    sys.modules.update(_theirs)
    path = sys.path
    sys.path = [entry for entry in path if Path(entry).resolve() != folder]
    try:
        yield importlib.import_module('datasets')
    except ImportError as err:
        raise InputError(f'--data-set hfds/NAME needs a package: pip install datasets ({one_line(err)})') from None
    finally:
        sys.path = path
        _theirs.update({name: sys.modules.pop(name) for name in list(sys.modules) if _is_theirs(name)})
        sys.modules.update(ours)


class ArrowDataset(ImageDataset):
    """Images in the Arrow files that Hugging Face's package writes: the bytes of an image's file, or its path.

    Each process maps the files for itself, so that loader processes share their pages and are sent none.

    Args:
        files: the Arrow files, in order.
        column: of the images.
        name: of the data set and split; an image's name is that and its number.
    """

    def __init__(
        self, files: Sequence[str], column: str, labels: np.ndarray, classes: Sequence[str], name: str
    ) -> None:
        self._files, self._column, self._called = files, column, name
        self._images: pa.ChunkedArray | None = None
        super().__init__(labels, classes)

    def __getstate__(self) -> dict[str, Any]:
        return {**self.__dict__, '_images': None}

    def _name(self, position: int) -> str:
        return f'{self._called}/{position:08d}'

    def _raw(self, position: int) -> bytes:
        if self._images is None:
            tables = [pa.ipc.open_stream(pa.memory_map(file)).read_all() for file in self._files]
            self._images = pa.chunked_array([chunk for table in tables for chunk in table[self._column].chunks])
        image = self._images[position].as_py()
        if image is None or (image['bytes'] is None and not image['path']):
            raise ValueError('the data set has none there')
        return read_file(image['path']) if image['bytes'] is None else image['bytes']


def open_hugging_face(
    name: str, root: Path, wanted: Sequence[str], *, download: bool = True
) -> dict[str, ImageDataset]:
    """The splits of a data set of the Hugging Face Hub, or of a folder that its package reads, by timm's reader.

    The images are its column `image`, or the first one of images; the classes `label`, or the first one of classes.

    Args:
        name: on the Hub, or a folder's path.
        root: where the package puts its files.
        wanted: the splits, some of 'train', 'val' and 'test'.
        download: whether it may; what was prepared before is used in any case.

    Raises:
        InputError: if the package is missing, or the data set cannot be had or has no images with classes.
    """
    source = f'hfds/{name}'
    with hugging_face() as package:
        try:
            package.config.IN_MEMORY_MAX_SIZE = 0  # files, whatever the environment says
            builder = package.load_dataset_builder(name, cache_dir=str(root))
            if not download and not Path(builder.cache_dir).is_dir():
                raise InputError('it was not downloaded there')
            builder.download_and_prepare()
            features, splits = builder.info.features, builder.info.splits
            image = _find_column(features, 'image', package.Image)
            label = 'label' if 'label' in features else _find_column(features, 'label', package.ClassLabel)
            names = {split: next((own for own in SPLIT_NAMES[split] if own in splits), '') for split in wanted}
            readers = {
                split: create_reader(source, root=str(root), split=own, input_key=image, target_key=label)
                for split, own in names.items()
                if own
            }
        except Exception as err:  # the package has errors of its own, and those of many others
            raise InputError(f'cannot read {source}, whose files are put into {root}: {one_line(err)}') from None
    labels = {split: reader.dataset.data[label].to_numpy() for split, reader in readers.items()}
    classes = check_labels(labels, list(next((reader.class_to_idx for reader in readers.values()), ())), source)
    opened: dict[str, ImageDataset] = {}
    for split, of_images in labels.items():
        files = [file['filename'] for file in readers[split].dataset.cache_files]
        called = f'{Path(name).name}/{names[split]}'
        opened[split] = ArrowDataset(files, image, of_images, classes, called)
    return check_splits(opened, wanted, source)


def _find_column(features: Mapping[str, Any], name: str, kind: type) -> str:
    """The column of a kind that has the name, or else the first one."""
    found = next((key for key in (name, *features) if isinstance(features.get(key), kind)), None)
    if found is None:
        raise InputError(f'it has no column of the kind {kind.__name__} ({name}), but {shorten(features)}')
    return found
