"""The table of data sets, and the splits of one with their class map."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple

from pipeline.file_dataset import FileDataset
from pipeline.hugging_face import open_hugging_face
from pipeline.images import ImageDataset
from pipeline.inaturalist import find_inaturalist
from pipeline.layouts import Layout, evaluated_split, find_folders, find_listed, find_lists, has_folders, note_lacking
from pipeline.lmdb_dataset import ImageFolderLMDB
from pipeline.readers import READERS, find_reader, load_digits, open_torch
from pipeline.subsets import HoldOut, stratified_subset
from utils import InputError, UsageError, shorten


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
        ValueError: if the table has no such row, and timm's readers no such name.
    """
    if '/' in name:
        return find_reader(name)
    plain = name.replace('-', '').replace('_', '').upper()
    plain = ALIASES.get(plain, plain)
    for known in DATA_SETS:
        if known.upper() == plain:
            return known
    raise ValueError(f'unknown data set {name!r}; known are {", ".join(DATA_SETS)}, torch/NAME and hfds/NAME')


def find_info(name: str) -> DataSetInfo:
    """The row of a name that `find_name` gives; those of timm's readers, 'torch/…' and 'hfds/…', have no row."""
    return DATA_SETS[name] if name in DATA_SETS else DataSetInfo(name.partition('/')[0], None)


@dataclass(frozen=True)
class DataSource:
    """Where a data set lies, and how it is read.

    Args:
        name: a row of `DATA_SETS`, or torch/NAME or hfds/NAME.
        path: the data set's folder, or where a download is put; DIGITS needs none. With `use_lmdb`, the folder of
            train.lmdb and val.lmdb.
        layout: 'lists', 'folder', or 'auto', which prefers lists, for DomainNet and FOLDER.
        inat_category: the level that iNaturalist's labels are of, 'name' by default.
        use_lmdb, verify: read LMDB files; compare each record with its checksum.
        download: whether absent files may be fetched, where the data set has an address.

    Raises:
        UsageError: for an argument that means nothing for this data set.
    """

    name: str
    path: str
    layout: str = 'auto'
    inat_category: str | None = None
    use_lmdb: bool = False
    verify: bool = False
    download: bool = True

    def __post_init__(self) -> None:
        if self.layout != 'auto' and (self.use_lmdb or (self.kind != 'domain' and self.name != 'FOLDER')):
            raise UsageError(f'--data-layout {self.layout} is for image files of DomainNet and FOLDER')
        if self.inat_category is not None and self.kind != 'inat':
            raise UsageError(f'--inat-category {self.inat_category} is for INAT and INAT19, not {self.name}')
        if self.verify and not self.use_lmdb:
            raise UsageError('--verify-records needs --use-lmdb: only records have checksums')

    @property
    def kind(self) -> str:
        return find_info(self.name).kind

    @property
    def downloads(self) -> bool:
        return self.download and not self.use_lmdb and self.kind in ('cifar', *READERS)

    def __str__(self) -> str:
        return self.name if self.kind in ('digits', 'cifar', *READERS) else self.path


class Splits(NamedTuple):
    """What `build_datasets` gives. `train` is None where only evaluation was asked for; `notes` are for the user.

    `val` chooses the best checkpoint: the test images, as published, or others, and then `test` are the test images.
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


def _open_lmdb(source: DataSource, wanted: Sequence[str]) -> tuple[dict[str, ImageDataset], list[str]]:
    """The LMDB files of the splits that are wanted, if they hold the data set of this name; test.lmdb may be absent."""
    name, root = source.name, Path(source.path)
    folder = root / name if (root / name / 'val.lmdb').exists() and not (root / 'val.lmdb').exists() else root
    opened: dict[str, ImageDataset] = {}
    notes: list[str] = []
    for split in wanted:
        path = folder / f'{split}.lmdb'
        if split == 'test' and not path.exists():
            continue
        dataset = ImageFolderLMDB(path, verify=source.verify)
        if 'FOLDER' not in (name, dataset.data_set) and dataset.data_set != name:
            raise InputError(f'{path} holds {dataset.data_set}, not {name}')
        if source.inat_category not in (None, dataset.inat_category):
            raise InputError(f'{path} has the labels of {dataset.inat_category}, not of {source.inat_category}')
        notes += note_lacking(path, dataset.targets.tolist(), dataset.classes)
        opened[split] = dataset
    if len({tuple(dataset.classes) for dataset in opened.values()}) > 1:
        files = ' and '.join(f'{split}.lmdb' for split in opened)
        raise InputError(f'{folder}: {files} have different classes: build them together')
    return opened, notes


def _open_splits(source: DataSource, *, train: bool) -> tuple[dict[str, ImageDataset], list[str]]:
    """The splits as they lie there, by their names 'train', 'val' and 'test', and notes."""
    wanted = ('train', 'val', 'test') if train else ('val', 'test')
    if source.use_lmdb:
        return _open_lmdb(source, wanted)
    root = Path(source.path)
    if source.kind == 'digits':
        return {split: load_digits(train=split == 'train') for split in wanted if split != 'test'}, []
    if source.kind in ('cifar', 'torch'):
        name = {'CIFAR': 'CIFAR100'}.get(source.name, source.name.rpartition('/')[2])
        return open_torch(name, root, wanted, download=source.download), []
    if source.kind == 'hfds':
        name = source.name.partition('/')[2]
        return open_hugging_face(name, root, wanted, download=source.download), []
    layout = _find_layout(source, train=train)
    return {split: FileDataset(files, layout.classes) for split, files in layout.splits.items()}, layout.notes


def _use_known_classes(source: DataSource, datasets: Sequence[ImageDataset], known: Sequence[str]) -> list[str]:
    """Numbers the classes as a trained head does, by their order if it knows none; InputError if it knows some only."""
    classes = datasets[0].classes
    if list(known) == classes:
        return []
    others = [name for name in classes if name not in known]
    what = f'{source} has classes that the checkpoint has not ({shorten(others)})'
    if len(others) == len(classes):
        return [f'{what}: labels are compared by their numbers']
    if others:
        raise InputError(f'{what} beside {len(classes) - len(others)} that it has: rename or remove them')
    for dataset in datasets:
        dataset.relabel(known)
    note = f"{source} numbers its classes otherwise than the checkpoint: the checkpoint's numbers are used"
    return [note, *note_lacking(str(source), datasets[0].targets.tolist(), known)]


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
        train_fraction, train_fraction_seed: of the images that are left for training; see `stratified_subset`.
        known_classes: class names in the order of a trained head, which the labels then follow if it has them all.

    Raises:
        InputError: if the data is missing or has more classes than the head.
    """
    info = find_info(source.name)
    opened, notes = _open_splits(source, train=train)
    for split, published in zip(('train', 'val'), info.images or (), strict=False):
        if split in opened and len(opened[split]) != published:
            notes.append(f'{source}: {len(opened[split])} {split} images, {source.name} is published with {published}')
    if not train:
        opened = {'val': opened[evaluated_split(opened)]}
    train_split, val_split, test_split = opened.get('train'), opened['val'], opened.get('test')
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
        val_split = train_split.subset(held)
        train_split.select(kept)
        notes.append(f'{len(held)} of {len(kept) + len(held)} training images are held out and choose the best '
                     f'checkpoint; the {len(test_split)} test images are evaluated by it, at the end')  # fmt: skip
        notes += note_lacking('what is left', train_split.targets.tolist(), train_split.classes)
    elif test_split is not None:
        notes.append(f'the {len(val_split)} validation images of {source} choose the best checkpoint; its '
                     f'{len(test_split)} test images are evaluated by it, at the end')  # fmt: skip
    if train_fraction < 1 and train_split is not None:
        whole = len(train_split)
        train_split.select(stratified_subset(train_split.targets, train_fraction, seed=train_fraction_seed))
        notes.append(f'{len(train_split)} of {whole} training images are used: --train-fraction {train_fraction}')
        notes += note_lacking('that part', train_split.targets.tolist(), train_split.classes)
    if known_classes is not None:
        used = [split for split in (val_split, train_split, test_split) if split is not None]
        notes += _use_known_classes(source, used, known_classes)
    for part, how in ((train_split, 'next'), (val_split, 'leave out'), (test_split, 'leave out')):
        if skip_bad_images and part is not None:
            part.treat_bad_images(how)
    classes = val_split.classes
    head = num_classes or info.num_classes or len(classes)
    if len(classes) > head:
        limit = f'--nb-classes {head} leaves room for' if num_classes else f'the {head} of {source.name}'
        hint = f'set --nb-classes {len(classes)}' + ('' if num_classes else ', or read it with --data-set FOLDER')
        raise InputError(f'{source} has {len(classes)} classes, more than {limit}: {hint}')
    if len(classes) < head:
        notes.append(f'{source} has {len(classes)} classes; the head is made for {head}')
    return Splits(train_split, val_split, head, notes, test_split)
