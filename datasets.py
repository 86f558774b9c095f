"""The data sets, their class maps and their transforms."""

from __future__ import annotations

import os
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, ClassVar, NamedTuple

import numpy as np
import torch
from PIL import Image, UnidentifiedImageError
from timm.data import IMAGENET_DEFAULT_MEAN, IMAGENET_DEFAULT_STD, create_transform
from timm.data.random_erasing import RandomErasing
from torch import Tensor
from torch.utils.data import Dataset, default_collate
from torchvision import transforms
from torchvision.datasets import CIFAR10, CIFAR100, ImageFolder

from utils import InputError, UsageError, one_line, shorten

Transform = Callable[[Image.Image], Tensor]

DOMAINNET = ('clipart', 'infograph', 'painting', 'quickdraw', 'real', 'sketch')
SMALL_IMAGE = 32  # pixels; up to here a random crop with padding replaces the random resized crop


@dataclass(frozen=True)
class DataSetInfo:
    """A row of the table of data sets; `num_classes` is None where the data itself says it."""

    kind: str
    num_classes: int | None


DATA_SETS = {
    'CIFAR': DataSetInfo('cifar', 100),
    'CIFAR10': DataSetInfo('cifar', 10),
    'IMNET': DataSetInfo('folder', 1000),
    'DIGITS': DataSetInfo('digits', 10),
    'FOLDER': DataSetInfo('folder', None),
    **{name: DataSetInfo('folder', 345) for name in DOMAINNET},
}
ALIASES = {'CIFAR100': 'CIFAR'}


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


class Digits(Dataset[tuple[Any, int]]):
    """scikit-learn's handwritten digits: 1,797 grey images of 8x8 pixels in 10 classes, 1,437 train and 360 val.

    The split is fixed and stratified. Source: E. Alpaydin and C. Kaynak, Optical Recognition of Handwritten Digits,
    UCI Machine Learning Repository, 1998; scikit-learn ships it.

    Args:
        train: which part of the split.
        transform: applied to each RGB image.
    """

    classes: ClassVar = [str(digit) for digit in range(10)]
    val_size = 360

    def __init__(self, *, train: bool, transform: Transform | None = None) -> None:
        from sklearn.datasets import load_digits
        from sklearn.model_selection import train_test_split

        digits = load_digits()
        parts = train_test_split(
            np.arange(len(digits.target)), test_size=self.val_size, stratify=digits.target, random_state=0
        )
        indices = parts[0 if train else 1]
        self.images = np.round(digits.images[indices] * (255 / 16)).astype(np.uint8)  # (n, 8, 8), from 0..16
        self.targets = [int(target) for target in digits.target[indices]]
        self.transform = transform

    def __len__(self) -> int:
        return len(self.targets)

    def __getitem__(self, index: int) -> tuple[Any, int]:
        image = Image.fromarray(self.images[index]).convert('RGB')
        return image if self.transform is None else self.transform(image), self.targets[index]


def load_image(path: str) -> Image.Image:
    """Reads an image file as RGB.

    Raises:
        InputError: with the path, if it cannot be decoded.
    """
    try:
        with open(path, 'rb') as file:
            return Image.open(file).convert('RGB')
    except (OSError, SyntaxError, ValueError, Image.DecompressionBombError) as err:
        reason = 'its format is unknown' if isinstance(err, UnidentifiedImageError) else one_line(err)
        raise InputError(f'{path} cannot be read as an image ({reason}): replace or remove it') from None


class _FolderSplit(ImageFolder):
    """One split of a folder data set, with a class map given from outside."""

    def __init__(self, root: Path, class_to_idx: dict[str, int], transform: Transform | None) -> None:
        self._class_to_idx = class_to_idx  # before the base class asks for it
        super().__init__(str(root), transform=transform, loader=load_image, allow_empty=True)
        if not self.samples:
            raise InputError(f'{root} holds no images (file names must end in .jpg, .png, …)')

    def find_classes(self, directory: str | Path) -> tuple[list[str], dict[str, int]]:
        return list(self._class_to_idx), self._class_to_idx


def _class_folders(root: Path) -> list[str]:
    return sorted(entry.name for entry in os.scandir(root) if entry.is_dir() and not entry.name.startswith('.'))


class Splits(NamedTuple):
    """What `build_datasets` gives. `train` is None where only evaluation was asked for; `notes` are for the user."""

    train: Any
    val: Any
    num_classes: int
    notes: list[str]


def _build_folders(
    root: Path, train: bool, train_transform: Transform | None, val_transform: Transform | None
) -> tuple[Any, Any, list[str], list[str]]:
    if not root.is_dir():
        raise InputError(f'{root}: no such folder; give the one that holds train/ and val/ with --data-path')
    folders = {split: root / split for split in ('train', 'val')}
    needed = ('train', 'val') if train else ('val',)
    absent = [split for split in needed if not folders[split].is_dir()]
    if absent:
        raise InputError(f'{root} has no folder {" and no folder ".join(absent)}; it needs <split>/<class>/<image>')
    found = {split: _class_folders(folder) for split, folder in folders.items() if folder.is_dir()}
    classes = sorted({name for names in found.values() for name in names})
    if not classes:
        raise InputError(f'{root}: train/ and val/ hold no class folders; they need <split>/<class>/<image>')
    class_to_idx = {name: index for index, name in enumerate(classes)}
    train_split = _FolderSplit(folders['train'], class_to_idx, train_transform) if train else None
    val_split = _FolderSplit(folders['val'], class_to_idx, val_transform)
    notes = []
    for split in (train_split, val_split):
        if split is not None:
            present = set(split.targets)
            lacking = [name for name in classes if class_to_idx[name] not in present]
            if lacking:
                notes.append(f'{split.root} has no images of {len(lacking)} of the {len(classes)} classes: '
                             + shorten(lacking))  # fmt: skip
    return train_split, val_split, classes, notes


def _build_cifar(
    name: str, root: Path, train: bool, train_transform: Transform | None, val_transform: Transform | None
) -> tuple[Any, Any, list[str], list[str]]:
    cls = CIFAR10 if name == 'CIFAR10' else CIFAR100
    try:
        root.mkdir(parents=True, exist_ok=True)
        # torchvision checks the files' checksums and downloads only what is absent or altered.
        val_split = cls(str(root), train=False, transform=val_transform, download=True)
        train_split = cls(str(root), train=True, transform=train_transform) if train else None
    except (OSError, RuntimeError) as err:
        raise InputError(
            f'cannot get {cls.__name__} into {root}: {one_line(err)}. Download {cls.url} there by other means'
        ) from None
    return train_split, val_split, list(val_split.classes), []


def build_datasets(
    name: str,
    data_path: str,
    *,
    train: bool = True,
    train_transform: Transform | None = None,
    val_transform: Transform | None = None,
    num_classes: int | None = None,
) -> Splits:
    """Builds a data set of the table with one class map for both splits.

    Args:
        name: a row of `DATA_SETS`.
        data_path: the folder that holds `train/` and `val/`, or where torchvision puts CIFAR; DIGITS needs none.
        train: whether the training split is needed.
        train_transform, val_transform: from images to tensors (C, H, W).
        num_classes: the size of the model's head, where the user sets it.

    Raises:
        InputError: if the data is missing or has more classes than the head.
    """
    info = DATA_SETS[name]
    transforms_ = (train_transform, val_transform)
    classes: Sequence[str] = Digits.classes
    notes: list[str] = []
    if info.kind == 'digits':
        train_split: Any = Digits(train=True, transform=train_transform) if train else None
        val_split: Any = Digits(train=False, transform=val_transform)
    elif info.kind == 'cifar':
        train_split, val_split, classes, notes = _build_cifar(name, Path(data_path), train, *transforms_)
    else:
        train_split, val_split, classes, notes = _build_folders(Path(data_path), train, *transforms_)

    head = num_classes or info.num_classes or len(classes)
    where = data_path if info.kind == 'folder' else name
    if len(classes) > head:
        limit = f'--nb-classes {head} leaves room for' if num_classes else f'the {head} of {name}'
        raise InputError(f'{where} has {len(classes)} classes, more than {limit}: set --nb-classes {len(classes)}')
    if len(classes) < head:
        notes.append(f'{where} has {len(classes)} classes; the head is made for {head}')
    return Splits(train_split, val_split, head, notes)


def build_transform(
    *,
    train: bool,
    input_size: int,
    no_aug: bool = False,
    hflip: float = 0.5,
    color_jitter: float = 0.4,
    auto_augment: str | None = 'rand-m9-mstd0.5-inc1',
    interpolation: str = 'bicubic',
    re_prob: float = 0.25,
    re_mode: str = 'pixel',
    re_count: int = 1,
) -> Transform:
    """The transform of DeiT's recipe, from an image to a normalised tensor (3, input_size, input_size).

    Training uses timm's. Up to 32 px a random crop with padding 4 stands in its random resized crop's place.
    Evaluation resizes the shorter side to 256/224 of the size and crops the centre; up to 32 px it only resizes.

    Args:
        train: training or evaluation.
        input_size: pixels.
        no_aug: use evaluation's transform in training too.
        hflip: probability of a horizontal flip.
        color_jitter: strength, used where `auto_augment` is not.
        auto_augment: timm's policy string, or None.
        interpolation: of the training crop: random, bilinear, bicubic.
        re_prob, re_mode, re_count: random erasing's probability, fill and count.

    Raises:
        UsageError: for a policy or mode that timm does not know.
    """
    square = transforms.Resize((input_size, input_size), transforms.InterpolationMode.BICUBIC)
    small = input_size <= SMALL_IMAGE
    if train and not no_aug:
        try:
            transform = create_transform(
                input_size=input_size,
                is_training=True,
                hflip=hflip,
                color_jitter=color_jitter,
                auto_augment=auto_augment,
                interpolation=interpolation,
                re_prob=re_prob,
                re_mode=re_mode,
                re_count=re_count,
            )
        except (AssertionError, ValueError, KeyError, NotImplementedError) as err:
            raise UsageError(f'--aa {auto_augment} --remode {re_mode}: timm refuses this ({one_line(err)})') from None
        if small:
            crop = [square, transforms.RandomCrop(input_size, padding=4)]
            transform.transforms[:1] = crop
        return transform
    resize = [square] if small else [
        transforms.Resize(int(256 / 224 * input_size), transforms.InterpolationMode.BICUBIC),
        transforms.CenterCrop(input_size),
    ]  # fmt: skip
    normalize = transforms.Normalize(IMAGENET_DEFAULT_MEAN, IMAGENET_DEFAULT_STD)
    return transforms.Compose([*resize, transforms.ToTensor(), normalize])


class EraseSecondHalf:
    """A collate function that erases at random in the second half of a batch only: `--resplit`, as timm defines it."""

    def __init__(self, *, re_prob: float, re_mode: str, re_count: int) -> None:
        self.erase = RandomErasing(re_prob, mode=re_mode, max_count=re_count, num_splits=2, device='cpu')

    def __call__(self, samples: list[tuple[Tensor, int]]) -> tuple[Tensor, Tensor]:
        images, targets = default_collate(samples)
        return self.erase(images), torch.as_tensor(targets)
