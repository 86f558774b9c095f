"""Data sets that other packages read: the names, scikit-learn's digits, those of torchvision.

The names are timm's: `torch/NAME` and `hfds/NAME` (hugging_face.py). Each becomes a data set of this project, whose
images have numbers and labels before any is read; timm's streams (`hfids/`, `tfds/`, `wds/`) have neither.
"""

from __future__ import annotations

import difflib
import inspect
import os
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torchvision

from pipeline.file_dataset import ArrayDataset, FileDataset, ItemDataset
from pipeline.images import ImageDataset, Transform
from pipeline.layouts import VAL_NAMES, Split
from utils import InputError, one_line

# What data sets call their splits. Where `val` and `test` are both there, the former chooses the best checkpoint.
SPLIT_NAMES = {'train': ('train', 'trainval', 'train-standard', 'training'), 'val': VAL_NAMES[:-1], 'test': ('test',)}
READERS, STREAMS = ('torch', 'hfds'), ('hfids', 'tfds', 'wds')


def find_reader(name: str) -> str:
    """The spelling of a name with a prefix of timm's: 'torch/flowers102' is 'torch/Flowers102'.

    Raises:
        ValueError: for another prefix, and for a name that torchvision has not.
    """
    prefix, _, rest = name.partition('/')
    prefix = prefix.lower()
    if prefix in STREAMS:
        raise ValueError(
            f'{name} is a stream, whose images have no numbers to train exactly with: use hfds/NAME if it is on the '
            'Hugging Face Hub, or write it as folders, <split>/<class>/<image>, for FOLDER'
        )
    if prefix not in READERS or not rest:
        raise ValueError(f'{name!r} is neither torch/NAME nor hfds/NAME')
    if prefix == 'hfds':
        return f'hfds/{rest}'
    known = {cls.lower(): cls for cls in torchvision.datasets.__all__}
    plain = rest.replace('-', '').replace('_', '').lower()
    if plain not in known:
        near = [known[other] for other in difflib.get_close_matches(plain, known)]
        hint = f' (is {" or ".join(near)} meant?)' if near else ''
        raise ValueError(f'torchvision has no data set {rest!r}{hint}')
    return f'torch/{known[plain]}'


def load_digits(*, train: bool, transform: Transform | None = None) -> ArrayDataset:
    """scikit-learn's handwritten digits: 1,797 grey images of 8x8 pixels in 10 classes, 1,437 train and 360 val.

    The split is fixed and stratified. Source: E. Alpaydin and C. Kaynak, Optical Recognition of Handwritten Digits,
    UCI Machine Learning Repository, 1998; scikit-learn ships it.

    Args:
        train: which part of the split.
        transform: applied to each RGB image.
    """
    from sklearn import datasets
    from sklearn.model_selection import train_test_split

    digits = datasets.load_digits()
    numbers = np.arange(len(digits.target))
    parts = train_test_split(numbers, test_size=360, stratify=digits.target, random_state=0)
    chosen = parts[0 if train else 1]
    images = np.round(digits.images[chosen] * (255 / 16)).astype(np.uint8)  # (n, 8, 8), from 0..16
    return ArrayDataset(images, digits.target[chosen], [str(digit) for digit in range(10)], transform)


# torchvision


def open_torch(name: str, root: Path, wanted: Sequence[str], *, download: bool = True) -> dict[str, ImageDataset]:
    """The splits of a data set of torchvision, which checks its files; what is absent or altered is downloaded.

    Args:
        name: the class's, such as 'Flowers102'.
        root: where its files are put.
        wanted: the splits, some of 'train', 'val' and 'test'.
        download: whether it may.

    Raises:
        InputError: if the files cannot be had, or the data set is not one of classes with a split of its own.
    """
    cls = getattr(torchvision.datasets, name)
    try:
        if download:
            root.mkdir(parents=True, exist_ok=True)
        found = {split: _open_split(cls, root, split, download=download) for split in wanted}
        sources = {split: source for split, source in found.items() if source is not None}
        labels = {split: _labels(source) for split, source in sources.items()}
    except ModuleNotFoundError as err:
        package = str(err.name).partition('.')[0]
        raise InputError(f'torch/{name} needs a package: pip install {package}') from None
    except Exception as err:  # torchvision's readers raise whatever broken files lead them to
        hint = f'. Download {cls.url} there by other means' if isinstance(getattr(cls, 'url', None), str) else ''
        raise InputError(f'cannot get {name} into {root}: {one_line(err)}{hint}') from None
    names = next((source.classes for source in sources.values() if hasattr(source, 'classes')), ())
    classes = check_labels(labels, names, name)
    opened = {split: _convert(sources[split], labels[split], classes, root) for split in labels}
    return check_splits(opened, wanted, name)


def _open_split(cls: Any, root: Path, split: str, *, download: bool) -> Any:
    """torchvision's own object of a split, None if it has no such split."""
    parameters = inspect.signature(cls).parameters
    if 'train' in parameters:
        choices: list[dict[str, Any]] = [{'train': split == 'train'}] if split != 'test' else []
    else:
        choices = [{'split': name} for name in SPLIT_NAMES[split] if 'split' in parameters]
    for chosen in choices:
        try:
            return cls(str(root), **chosen)
        except ValueError as err:
            if 'Unknown value' not in str(err):
                raise
        except (RuntimeError, OSError):  # something is absent
            if not (download and ('download' in parameters or hasattr(cls, 'download'))):
                raise
            return cls(str(root), **chosen, download=True)
    return None


def _labels(source: Any) -> np.ndarray:
    """The class index of each image (n,), from the attributes of torchvision's classes or else from its items."""
    for name in ('targets', '_labels', 'labels'):
        labels = np.asarray(getattr(source, name, ()))
        if labels.shape == (len(source),) and labels.dtype.kind in 'iu':
            return labels
    rows = getattr(source, 'samples', None) or getattr(source, '_samples', None) or source
    return np.array([rows[index][1] for index in range(len(source))])


def _convert(source: Any, labels: np.ndarray, classes: list[str], root: Path) -> ImageDataset:
    """One of torchvision's data sets as one of files if it names them, or of arrays if it holds them."""
    for name in ('_image_files', '_images', 'samples', '_samples', 'imgs'):
        found = [row[0] if isinstance(row, tuple) else row for row in getattr(source, name, ())]
        if len(found) == len(source) and all(isinstance(path, (str, Path)) for path in found):
            paths = [Path(os.path.relpath(path, root)).as_posix() for path in found]
            return FileDataset(Split(root, paths, labels.tolist()), classes)
    pixels = np.asarray(getattr(source, 'data', ()))
    if pixels.dtype == np.uint8 and pixels.ndim in (3, 4) and len(pixels) == len(source):
        channels_first = pixels.ndim == 4 and pixels.shape[3] != 3
        return ArrayDataset(pixels.transpose(0, 2, 3, 1) if channels_first else pixels, labels.tolist(), classes)
    return ItemDataset(source, labels, classes)


# What both have in common


def check_labels(labels: dict[str, np.ndarray], names: Sequence[Any], source: str) -> list[str]:
    """The names of the classes: the data set's where it has one for each, and otherwise their numbers.

    A split `test` without classes, which some data sets keep secret, is removed if there is a split `val`.

    Args:
        labels: of each split.
        names: the data set's, some of which are tuples of synonyms.

    Raises:
        InputError: if the labels are not one class an image.
    """
    wrong = [split for split, found in labels.items()
             if found.ndim != 1 or found.dtype.kind not in 'iu' or found.min(initial=0) < 0]  # fmt: skip
    if wrong == ['test'] and 'val' in labels:
        del labels['test']
    elif wrong:
        raise InputError(f'{source} does not give each image one class as a whole number (split {wrong[0]})')
    joined = [', '.join(name) if isinstance(name, tuple) else str(name) for name in names]
    count = 1 + max((int(found.max(initial=-1)) for found in labels.values()), default=-1)
    if len(joined) < count:
        return [str(number) for number in range(count)]
    return joined if len(set(joined)) == len(joined) else [f'{number} {name}' for number, name in enumerate(joined)]


def check_splits(opened: dict[str, ImageDataset], wanted: Iterable[str], source: str) -> dict[str, ImageDataset]:
    """The splits, `test` as `val` where there is no `val`.

    Raises:
        InputError: if one for training, where it is wanted, or for evaluation is absent or empty.
    """
    if 'val' not in opened and 'test' in opened:
        opened['val'] = opened.pop('test')
    purposes = {'train': 'training', 'val': 'evaluation'}
    absent = [purpose for split, purpose in purposes.items() if split in wanted and not len(opened.get(split, ()))]
    if absent:
        raise InputError(
            f'{source} has no split for {" and none for ".join(absent)}: write it as folders, '
            '<split>/<class>/<image>, for FOLDER'
        )
    return opened
