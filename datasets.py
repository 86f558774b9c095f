"""The table of data sets, and the splits of one with their class map."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import NamedTuple

import numpy as np
from torchvision.datasets import CIFAR10, CIFAR100

from pipeline.file_dataset import ArrayDataset, FileDataset
from pipeline.images import ImageDataset, Transform
from pipeline.inaturalist import find_inaturalist
from pipeline.layouts import Layout, find_folders, find_listed, find_lists, has_folders, note_lacking
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


def _load_cifar(name: str, root: Path, *, train: bool) -> ArrayDataset:
    cls = CIFAR10 if name == 'CIFAR10' else CIFAR100
    try:
        root.mkdir(parents=True, exist_ok=True)
        # torchvision checks the files' checksums and downloads only what is absent or altered.
        loaded = cls(str(root), train=train, download=True)
    except (OSError, RuntimeError) as err:
        raise InputError(
            f'cannot get {cls.__name__} into {root}: {one_line(err)}. Download {cls.url} there by other means'
        ) from None
    return ArrayDataset(loaded.data, loaded.targets, loaded.classes)


def _by_class(targets: np.ndarray, rng: np.random.Generator) -> np.ndarray:
    """The images' numbers (n,), class by class, at random inside a class."""
    shuffled = rng.permutation(len(targets))
    return shuffled[np.argsort(targets[shuffled], kind='stable')]


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
    order = _by_class(targets, rng)
    counts = np.bincount(targets)
    rank = np.arange(len(targets)) - np.repeat(np.cumsum(counts) - counts, counts)
    sorted_targets = targets[order]
    turn = rng.permutation(len(counts))
    taken = np.lexsort((turn[sorted_targets], rank / counts[sorted_targets]))
    return np.sort(order[taken[: max(round(fraction * len(targets)), 1)]])


@dataclass(frozen=True)
class HoldOut:
    """Which training images are held out of training, to choose the best checkpoint: a fraction, or one of the folds.

    Either has each class's share of images, to one image; a class of a single image stays in training, but for folds.

    Args:
        fraction: of the training images, below 1; 0 for folds.
        folds, fold: how many parts, which hold each image once, and the number of the one that is held out.
        seed: chooses other images.
    """

    fraction: float = 0.0
    folds: int = 1
    fold: int = 0
    seed: int = 0

    def split(self, targets: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """The numbers of the images that stay in training, and of those that are held out, both ascending."""
        numbers = np.arange(len(targets))
        if self.fraction:
            kept = stratified_part(targets, 1 - self.fraction, seed=self.seed)
            return kept, np.setdiff1d(numbers, kept)
        held = np.sort(_by_class(targets, np.random.default_rng(self.seed))[self.fold :: self.folds])
        return np.setdiff1d(numbers, held), held


@dataclass(frozen=True)
class DataSource:
    """Where a data set lies, and how it is read.

    Args:
        name: a row of `DATA_SETS`.
        path: the data set's folder, or where torchvision puts CIFAR; DIGITS needs none. With `use_lmdb`, the folder of
            train.lmdb and val.lmdb.
        layout: 'lists', 'folder', or 'auto', which prefers lists, for DomainNet and FOLDER.
        inat_category: the level that iNaturalist's labels are of, 'name' by default.
        use_lmdb, verify: read LMDB files; compare each record with its checksum.

    Raises:
        UsageError: for an argument that means nothing for this data set.
    """

    name: str
    path: str
    layout: str = 'auto'
    inat_category: str | None = None
    use_lmdb: bool = False
    verify: bool = False

    def __post_init__(self) -> None:
        if self.layout != 'auto' and (self.use_lmdb or (self.kind != 'domain' and self.name != 'FOLDER')):
            raise UsageError(f'--data-layout {self.layout} is for image files of DomainNet and FOLDER')
        if self.inat_category is not None and self.kind != 'inat':
            raise UsageError(f'--inat-category {self.inat_category} is for INAT and INAT19, not {self.name}')
        if self.verify and not self.use_lmdb:
            raise UsageError('--verify-records needs --use-lmdb: only records have checksums')

    @property
    def kind(self) -> str:
        return DATA_SETS[self.name].kind

    def __str__(self) -> str:
        return self.name if self.kind in ('digits', 'cifar') else self.path


class Splits(NamedTuple):
    """What `build_datasets` gives. `train` is None where only evaluation was asked for; `notes` are for the user.

    `val` chooses the best checkpoint: the test images, as published, or images that are held out of training, or those
    of valid/ where test/ stands beside it; then `test` are the test images.
    """

    train: ImageDataset | None
    val: ImageDataset
    num_classes: int
    notes: list[str]
    test: ImageDataset | None = None

    def only_test(self) -> Splits:
        """The test images as the split to evaluate."""
        return self if self.test is None else self._replace(train=None, val=self.test)

    def fingerprint(self) -> str:
        splits = (self.train, self.val, self.test)
        return '-'.join(split.fingerprint() for split in splits if split is not None)


def _find_layout(source: DataSource, *, train: bool) -> Layout:
    """Where the images of a data set of files lie."""
    name, root = source.name, Path(source.path)
    if source.kind == 'inat':
        year = 2019 if name == 'INAT19' else 2018
        return find_inaturalist(root, year=year, category=source.inat_category or 'name', train=train)
    domain = name if source.kind == 'domain' else None
    by_lists = source.layout != 'folder' and (domain is not None or name == 'FOLDER')
    lists = find_lists(root, domain) if by_lists else None
    folder = root / name if domain and not has_folders(root, train=train) else root
    folders = has_folders(folder, train=train)
    complete = lists is not None and lists.train.is_file() and lists.val.is_file()
    if source.layout == 'auto' and folders and not complete:
        lists = None  # a list alone says nothing about the folders beside it
    if lists is None:
        if source.layout == 'lists':
            wanted = domain or '<domain>'
            raise InputError(f'{root} has no lists {wanted}_train.txt and {wanted}_test.txt')
        if domain and not folders:
            raise InputError(
                f'{root} has neither the lists {domain}_train.txt and {domain}_test.txt beside {domain}/, nor folders '
                'train/ and val/: give the folder that DomainNet was unpacked into with --data-path'
            )
        return find_folders(folder, train=train)
    layout = find_listed(lists, train=train)
    if source.layout == 'auto' and folders:
        layout.notes.append(
            f'{folder} has folders train/ and val/, and {lists.root} has lists: the lists are used, '
            'with --data-layout folder the folders'
        )
    return layout


def _open_lmdb(source: DataSource, split: str, on_bad_image: str) -> ImageFolderLMDB:
    """A split's LMDB file, if it holds the data set of this name."""
    name, root = source.name, Path(source.path)
    inside = (root / name / 'val.lmdb').exists() and not (root / 'val.lmdb').exists()
    path = (root / name if inside else root) / f'{split}.lmdb'
    dataset = ImageFolderLMDB(path, verify=source.verify, on_bad_image=on_bad_image)
    if 'FOLDER' not in (name, dataset.data_set) and dataset.data_set != name:
        raise InputError(f'{path} holds {dataset.data_set}, not {name}')
    if source.inat_category not in (None, dataset.inat_category):
        raise InputError(f'{path} has the labels of {dataset.inat_category}, not of {source.inat_category}')
    return dataset


def _open_splits(
    source: DataSource, *, train: bool, skip_bad_images: bool
) -> tuple[ImageDataset | None, ImageDataset, ImageDataset | None, list[str]]:
    """The splits as they lie there, train, val and test, and notes."""
    in_train, in_val = ('next', 'leave out') if skip_bad_images else ('stop', 'stop')
    if source.use_lmdb:
        val_records = _open_lmdb(source, 'val', in_val)
        train_records = _open_lmdb(source, 'train', in_train) if train else None
        has_test = val_records.file.with_name('test.lmdb').exists()
        test_records = _open_lmdb(source, 'test', in_val) if has_test else None
        opened = [records for records in (train_records, val_records, test_records) if records is not None]
        for records in opened:
            if records.classes != val_records.classes:
                folder, name = records.file.parent, records.file.name
                raise InputError(f'{folder}: {name} and val.lmdb have different classes: build them together')
        if test_records is not None and not train:
            val_records, test_records = test_records, None
            opened = [val_records]
        notes = [note for r in opened for note in note_lacking(r.file, r.targets.tolist(), r.classes)]
        return train_records, val_records, test_records, notes
    if source.kind in ('digits', 'cifar'):
        load = load_digits if source.kind == 'digits' else partial(_load_cifar, source.name, Path(source.path))
        return load(train=True) if train else None, load(train=False), None, []
    layout = _find_layout(source, train=train)
    train_files, test_files = (
        FileDataset(split, layout.classes, on_bad_image=on_bad) if split else None
        for split, on_bad in ((layout.train, in_train), (layout.test, in_val))
    )
    return train_files, FileDataset(layout.val, layout.classes, on_bad_image=in_val), test_files, layout.notes


def _use_known_classes(source: DataSource, datasets: Sequence[ImageDataset], known: Sequence[str]) -> list[str]:
    """Numbers the classes as a trained head does, if it has them all; gives notes."""
    classes = datasets[0].classes
    if list(known) == classes:
        return []
    others = [name for name in classes if name not in known]
    if others:
        return [f'{source} has classes that the checkpoint has not ({shorten(others)}): '
                'labels are compared by their numbers']  # fmt: skip
    for dataset in datasets:
        dataset.relabel(known)
    return [f"{source} numbers its classes otherwise than the checkpoint: the checkpoint's numbers are used"]


def build_datasets(
    source: DataSource,
    *,
    train: bool = True,
    num_classes: int | None = None,
    skip_bad_images: bool = False,
    hold_out: HoldOut | None = None,
    train_fraction: float = 1.0,
    train_fraction_seed: int = 0,
    known_classes: Sequence[str] | None = None,
) -> Splits:
    """Builds a data set of the table with one class map for both splits. They give images; the loaders transform them.

    Args:
        train: whether the training split is needed.
        num_classes: the size of the model's head, where the user sets it.
        skip_bad_images: train with the next good image instead of stopping, and leave bad ones out of evaluation.
        hold_out: training images that are to choose the best checkpoint in place of the test images.
        train_fraction, train_fraction_seed: of the images that are left for training; see `stratified_part`.
        known_classes: class names in the order of a trained head, which the labels then follow if it has them all.

    Raises:
        InputError: if the data is missing or has more classes than the head.
    """
    info = DATA_SETS[source.name]
    train_split, val_split, test_split, notes = _open_splits(source, train=train, skip_bad_images=skip_bad_images)
    if info.images is not None:
        for split, dataset, published in zip(('train', 'val'), (train_split, val_split), info.images, strict=True):
            if dataset is not None and len(dataset) != published:
                notes.append(f'{source}: {len(dataset)} {split} images, {source.name} is published with {published}')
    if hold_out is not None and train_split is not None:
        kept, held = hold_out.split(train_split.targets)
        if not len(kept) or not len(held):
            raise InputError(f'{source}: {len(train_split)} training images are too few to hold some of them out')
        if test_split is None:
            test_split = val_split
        else:
            notes.append(
                f'{source}: the {len(val_split)} images that would validate are not used, as others are held out'
            )
        val_split = train_split.part(held, on_bad_image=val_split.on_bad_image)
        train_split.select(kept)
        notes.append(f'{len(held)} of {len(kept) + len(held)} training images are held out and choose the best '
                     f'checkpoint; the {len(test_split)} test images are evaluated by it, at the end')  # fmt: skip
        notes += note_lacking('what is left', train_split.targets.tolist(), train_split.classes)
    if train_fraction < 1 and train_split is not None:
        whole = len(train_split)
        train_split.select(stratified_part(train_split.targets, train_fraction, seed=train_fraction_seed))
        notes.append(f'{len(train_split)} of {whole} training images are used: --train-fraction {train_fraction}')
        notes += note_lacking('that part', train_split.targets.tolist(), train_split.classes)
    if known_classes is not None:
        opened = [split for split in (val_split, train_split, test_split) if split is not None]
        notes += _use_known_classes(source, opened, known_classes)
    classes = val_split.classes
    head = num_classes or info.num_classes or len(classes)
    if len(classes) > head:
        limit = f'--nb-classes {head} leaves room for' if num_classes else f'the {head} of {source.name}'
        raise InputError(f'{source} has {len(classes)} classes, more than {limit}: set --nb-classes {len(classes)}')
    if len(classes) < head:
        notes.append(f'{source} has {len(classes)} classes; the head is made for {head}')
    return Splits(train_split, val_split, head, notes, test_split)
