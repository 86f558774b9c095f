"""The table of data sets, and their transforms."""

from __future__ import annotations

import io
import os
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from PIL import Image
from torchvision.datasets import CIFAR10, CIFAR100

from pipeline.images import ImageDataset, PackedStrings, Transform
from pipeline.layouts import (
    Layout,
    Split,
    find_folders,
    find_inaturalist,
    find_listed,
    find_lists,
    has_folders,
    note_lacking,
)
from pipeline.lmdb_dataset import ImageFolderLMDB
from utils import InputError, UsageError, one_line, shorten


@dataclass(frozen=True)
class DataSetInfo:
    """A row of the table of data sets.

    `num_classes` is None where the data itself says it; `images` are the published counts, of train and val.
    """

    kind: str
    num_classes: int | None
    images: tuple[int, int] | None = None


DATA_SETS = {
    'CIFAR': DataSetInfo('cifar', 100),
    'CIFAR10': DataSetInfo('cifar', 10),
    'IMNET': DataSetInfo('folder', 1000, (1281167, 50000)),
    'INAT': DataSetInfo('inat', None, (437513, 24426)),
    'INAT19': DataSetInfo('inat', None, (265213, 3030)),
    'TINYIMNET': DataSetInfo('folder', 200, (100000, 10000)),
    'DIGITS': DataSetInfo('digits', 10),
    'FOLDER': DataSetInfo('folder', None),
    'clipart': DataSetInfo('domain', 345, (33525, 14604)),
    'infograph': DataSetInfo('domain', 345, (36023, 15582)),
    'painting': DataSetInfo('domain', 345, (50416, 21850)),
    'quickdraw': DataSetInfo('domain', 345, (120750, 51750)),
    'real': DataSetInfo('domain', 345, (120906, 52041)),
    'sketch': DataSetInfo('domain', 345, (48212, 20916)),
}
DOMAINNET = tuple(name for name, info in DATA_SETS.items() if info.kind == 'domain')
ALIASES = {'CIFAR100': 'CIFAR', 'IMAGENET': 'IMNET', 'INAT18': 'INAT', 'TINYIMAGENET': 'TINYIMNET'}


def find_name(name: str) -> str:
    """The table's spelling of a data set's name, whose case and hyphens do not matter: 'cifar-10' is 'CIFAR10'.

    Raises:
        ValueError: if the table has no such row.
    """
    plain = name.replace('-', '').replace('_', '').upper()
    plain = ALIASES.get(plain, plain)
    for known in DATA_SETS:
        if known.upper() == plain:
            return known
    raise ValueError(f'unknown data set {name!r}; known are {", ".join(DATA_SETS)}')


class FileDataset(ImageDataset):
    """Images that are files below a folder."""

    def __init__(
        self, split: Split, classes: Sequence[str], transform: Transform | None = None, *, on_bad_image: str = 'stop'
    ) -> None:
        self.root = str(split.root)
        self._paths = PackedStrings(split.paths)
        labels = np.array(split.targets, dtype=np.int64)
        super().__init__(labels, classes, transform, on_bad_image=on_bad_image)

    def _name(self, position: int) -> str:
        return self._paths[position]

    def _path(self, position: int) -> str:
        return os.path.join(self.root, self._paths[position])  # noqa: PTH118  ten times as fast as pathlib

    def _raw(self, position: int) -> bytes:
        with open(self._path(position), 'rb') as file:
            return file.read()

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
        super().__init__(np.array(targets, dtype=np.int64), classes, transform)

    def _content(self) -> bytes:
        return np.ascontiguousarray(self.images).tobytes()

    def _name(self, position: int) -> str:
        return f'{self.classes[self._labels()[position]]}/{position:06d}.png'

    def _image(self, position: int) -> Image.Image:
        return Image.fromarray(self.images[position]).convert('RGB')

    def _raw(self, position: int) -> bytes:
        file = io.BytesIO()
        Image.fromarray(self.images[position]).save(file, 'PNG')
        return file.getvalue()


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


def _load_cifar(name: str, root: Path, *, train: bool, transform: Transform | None) -> ArrayDataset:
    cls = CIFAR10 if name == 'CIFAR10' else CIFAR100
    try:
        root.mkdir(parents=True, exist_ok=True)
        # torchvision checks the files' checksums and downloads only what is absent or altered.
        loaded = cls(str(root), train=train, download=True)
    except (OSError, RuntimeError) as err:
        raise InputError(
            f'cannot get {cls.__name__} into {root}: {one_line(err)}. Download {cls.url} there by other means'
        ) from None
    return ArrayDataset(loaded.data, loaded.targets, loaded.classes, transform)


class Splits(NamedTuple):
    """What `build_datasets` gives. `train` is None where only evaluation was asked for; `notes` are for the user."""

    train: ImageDataset | None
    val: ImageDataset
    num_classes: int
    notes: list[str]


def _find_layout(name: str, root: Path, *, train: bool, data_layout: str, inat_category: str | None) -> Layout:
    """Where the images of a data set of files lie."""
    info = DATA_SETS[name]
    if info.kind == 'inat':
        return find_inaturalist(
            root, year=2019 if name == 'INAT19' else 2018, category=inat_category or 'name', train=train
        )
    domain = name if info.kind == 'domain' else None
    by_lists = data_layout != 'folder' and (domain is not None or name == 'FOLDER')
    lists = find_lists(root, domain) if by_lists else None
    folder = root / name if domain and not has_folders(root, train=train) else root
    complete = lists is not None and lists.train.is_file() and lists.test.is_file()
    if data_layout == 'auto' and not complete and has_folders(folder, train=train):
        lists = None  # a list alone says nothing about the folders beside it
    if lists is None:
        if data_layout == 'lists':
            wanted = domain or '<domain>'
            raise InputError(f'{root} has no lists {wanted}_train.txt and {wanted}_test.txt')
        if domain and not has_folders(folder, train=train):
            raise InputError(
                f'{root} has neither the lists {domain}_train.txt and {domain}_test.txt beside {domain}/, nor folders '
                'train/ and val/: give the folder that DomainNet was unpacked into with --data-path'
            )
        return find_folders(folder, train=train)
    layout = find_listed(lists, train=train)
    if data_layout == 'auto' and has_folders(folder, train=train):
        layout.notes.append(
            f'{folder} has folders train/ and val/, and {lists.root} has lists: the lists are used, '
            'with --data-layout folder the folders'
        )
    return layout


def _open_lmdb(
    path: Path, name: str, inat_category: str | None, verify: bool, options: dict[str, Any]
) -> ImageFolderLMDB:
    """A split's LMDB file, if it holds the data set of this name."""
    dataset = ImageFolderLMDB(path, verify=verify, **options)
    if 'FOLDER' not in (name, dataset.data_set) and dataset.data_set != name:
        raise InputError(f'{path} holds {dataset.data_set}, not {name}')
    if inat_category not in (None, dataset.inat_category):
        raise InputError(f'{path} has the labels of {dataset.inat_category}, not of {inat_category}')
    return dataset


def stratified_part(targets: np.ndarray, fraction: float, *, seed: int) -> np.ndarray:
    """A part of a data set with each class's share, by the images' numbers in ascending order.

    Images are ranked at random within their class and taken in the order of rank / images of the class; so each class
    gives its first image before any gives its second, and a smaller part lies inside a larger one.

    Args:
        targets: class indices (n,).
        fraction: of the n images, rounded, at least one.
        seed: of the ranks and of the order of classes within a rank.
    """
    rng = np.random.default_rng(seed)
    shuffled = rng.permutation(len(targets))
    order = shuffled[np.argsort(targets[shuffled], kind='stable')]  # by class, at random inside
    counts = np.bincount(targets)
    rank = np.arange(len(targets)) - np.repeat(np.cumsum(counts) - counts, counts)
    sorted_targets = targets[order]
    turn = rng.permutation(len(counts))
    taken = np.lexsort((turn[sorted_targets], rank / counts[sorted_targets]))
    return np.sort(order[taken[: max(round(fraction * len(targets)), 1)]])


def build_datasets(
    name: str,
    data_path: str,
    *,
    train: bool = True,
    train_transform: Transform | None = None,
    val_transform: Transform | None = None,
    num_classes: int | None = None,
    data_layout: str = 'auto',
    inat_category: str | None = None,
    use_lmdb: bool = False,
    verify_records: bool = False,
    skip_bad_images: bool = False,
    train_fraction: float = 1.0,
    train_fraction_seed: int = 0,
    known_classes: Sequence[str] | None = None,
) -> Splits:
    """Builds a data set of the table with one class map for both splits.

    Args:
        name: a row of `DATA_SETS`.
        data_path: the data set's folder, or where torchvision puts CIFAR; DIGITS needs none. With `use_lmdb`, the
            folder of train.lmdb and val.lmdb.
        train: whether the training split is needed.
        train_transform, val_transform: from images to tensors (C, H, W).
        num_classes: the size of the model's head, where the user sets it.
        data_layout: 'lists', 'folder', or 'auto', which prefers lists, for DomainNet and FOLDER.
        inat_category: the level that iNaturalist's labels are of, 'name' by default.
        use_lmdb, verify_records: read LMDB files; compare each record with its checksum.
        skip_bad_images: train with the next good image instead of stopping, and leave bad ones out of evaluation.
        train_fraction, train_fraction_seed: see `stratified_part`.
        known_classes: class names in the order of a trained head, which the labels then follow if it has them all.

    Raises:
        InputError: if the data is missing or has more classes than the head.
        UsageError: for an argument that means nothing for this data set.
    """
    info = DATA_SETS[name]
    if data_layout != 'auto' and (use_lmdb or (info.kind != 'domain' and name != 'FOLDER')):
        raise UsageError(f'--data-layout {data_layout} is for image files of DomainNet and FOLDER')
    if inat_category is not None and info.kind != 'inat':
        raise UsageError(f'--inat-category {inat_category} is for INAT and INAT19, not {name}')
    if verify_records and not use_lmdb:
        raise UsageError('--verify-records needs --use-lmdb: only records have checksums')
    policies = ('next', 'leave out') if skip_bad_images else ('stop', 'stop')
    train_options: dict[str, Any] = {'transform': train_transform, 'on_bad_image': policies[0]}
    val_options: dict[str, Any] = {'transform': val_transform, 'on_bad_image': policies[1]}
    root = Path(data_path)
    notes: list[str] = []
    train_split: ImageDataset | None = None
    if use_lmdb:
        folder = root / name if (root / name / 'val.lmdb').exists() and not (root / 'val.lmdb').exists() else root
        val_split: ImageDataset = _open_lmdb(folder / 'val.lmdb', name, inat_category, verify_records, val_options)
        if train:
            train_split = _open_lmdb(folder / 'train.lmdb', name, inat_category, verify_records, train_options)
            notes += note_lacking(folder / 'train.lmdb', train_split.targets.tolist(), train_split.classes)
            if train_split.classes != val_split.classes:
                raise InputError(f'{folder}: train.lmdb and val.lmdb have different classes: build them together')
        notes += note_lacking(folder / 'val.lmdb', val_split.targets.tolist(), val_split.classes)
    elif info.kind == 'digits':
        train_split = load_digits(train=True, transform=train_transform) if train else None
        val_split = load_digits(train=False, transform=val_transform)
    elif info.kind == 'cifar':
        train_split = _load_cifar(name, root, train=True, transform=train_transform) if train else None
        val_split = _load_cifar(name, root, train=False, transform=val_transform)
    else:
        layout = _find_layout(name, root, train=train, data_layout=data_layout, inat_category=inat_category)
        notes += layout.notes
        train_split = FileDataset(layout.train, layout.classes, **train_options) if layout.train else None
        val_split = FileDataset(layout.val, layout.classes, **val_options)

    where = name if info.kind in ('digits', 'cifar') else data_path
    if info.images is not None:
        for split, dataset, published in zip(('train', 'val'), (train_split, val_split), info.images, strict=True):
            if dataset is not None and len(dataset) != published:
                notes.append(f'{where}: {len(dataset)} {split} images, {name} is published with {published}')
    if train_fraction < 1 and train_split is not None:
        whole = len(train_split)
        train_split.select(stratified_part(train_split.targets, train_fraction, seed=train_fraction_seed))
        notes.append(f'{len(train_split)} of {whole} training images are used: --train-fraction {train_fraction}')
        notes += note_lacking('that part', train_split.targets.tolist(), train_split.classes)

    if known_classes is not None and list(known_classes) != val_split.classes:
        if set(val_split.classes) <= set(known_classes):
            for dataset in filter(None, (train_split, val_split)):
                dataset.relabel(known_classes)
            notes.append(
                f"{where} numbers its classes otherwise than the checkpoint: the checkpoint's numbers are used"
            )
        else:
            others = [name for name in val_split.classes if name not in known_classes]
            notes.append(f'{where} has classes that the checkpoint has not ({shorten(others)}): '
                         'labels are compared by their numbers')  # fmt: skip
    classes = val_split.classes
    head = num_classes or info.num_classes or len(classes)
    if len(classes) > head:
        limit = f'--nb-classes {head} leaves room for' if num_classes else f'the {head} of {name}'
        raise InputError(f'{where} has {len(classes)} classes, more than {limit}: set --nb-classes {len(classes)}')
    if len(classes) < head:
        notes.append(f'{where} has {len(classes)} classes; the head is made for {head}')
    return Splits(train_split, val_split, head, notes)
