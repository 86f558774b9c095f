"""datasets.py: class maps, splits, transforms, downloads."""

from __future__ import annotations

import hashlib
import pickle
import tarfile
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from timm.data.auto_augment import RandAugment
from timm.data.random_erasing import RandomErasing
from timm.data.transforms import RandomResizedCropAndInterpolation
from torch.utils.data import DataLoader
from torchvision import transforms
from torchvision.datasets import CIFAR10

from datasets import DataSource, build_datasets, find_name, load_digits
from pipeline.transforms import AugmentedImages, build_transform
from samplers import Draw, TrainBatches
from utils import InputError, UsageError

MakeFolder = Callable[..., Path]


def test_digits_split_is_fixed_and_stratified() -> None:
    train, val = load_digits(train=True), load_digits(train=False)
    assert (len(train), len(val)) == (1437, 360)
    everything = np.concatenate([train.images, val.images]).reshape(1797, -1)
    assert len(np.unique(everything, axis=0)) == 1797, 'an image stands in both parts'
    for counts in (Counter(val.targets.tolist()), Counter(train.targets.tolist())):
        assert max(counts.values()) <= 1.1 * min(counts.values()) and len(counts) == 10
    image, target = val[0]
    assert image.mode == 'RGB' and image.size == (8, 8) and isinstance(target, int)
    assert everything.max() == 255
    digest = hashlib.sha256(val.images.tobytes() + bytes(val.targets.tolist())).hexdigest()
    assert digest.startswith('50633b623f555b34'), 'the split changed'


@pytest.mark.parametrize(
    ('given', 'name'), [('cifar-10', 'CIFAR10'), ('CIFAR', 'CIFAR'), ('cifar100', 'CIFAR'), ('Sketch', 'sketch')]
)
def test_names(given: str, name: str) -> None:
    assert find_name(given) == name
    with pytest.raises(ValueError, match='DIGITS'):
        find_name('MNIST')


def test_folders_share_one_class_map(make_folder: MakeFolder) -> None:
    """DomainNet's painting lists: train lacks t-shirt, val lacks its neighbour in the order, syringe."""
    classes = ['apple', 'syringe', 't-shirt', 'zebra']
    root = make_folder({'train': ['apple', 'syringe', 'zebra'], 'val': ['apple', 't-shirt', 'zebra']}, images=2)
    splits = build_datasets(DataSource('FOLDER', str(root)))
    assert splits.num_classes == 4
    assert splits.train.class_to_idx == splits.val.class_to_idx == {name: i for i, name in enumerate(classes)}
    assert splits.train.targets.tolist() == [0, 0, 1, 1, 3, 3] and splits.val.targets.tolist() == [0, 0, 2, 2, 3, 3]
    assert len(splits.notes) == 2
    assert 'train has no images of 1 of the 4 classes: t-shirt' in splits.notes[0]
    assert 'val has no images of 1 of the 4 classes: syringe' in splits.notes[1]


def test_hidden_folders_are_no_classes_and_empty_ones_are_reported(make_folder: MakeFolder) -> None:
    root = make_folder({'train': ['a', 'b', '.ipynb_checkpoints'], 'val': ['a']}, images=1)
    (root / 'val' / 'b').mkdir()
    (root / 'train' / 'a' / '._0.jpg').write_bytes(b'what macOS leaves beside a file')
    (root / 'val' / 'notes.txt').write_text('a file beside the folders')
    splits = build_datasets(DataSource('FOLDER', str(root)))
    assert splits.train.classes == ['a', 'b'] and len(splits.train) == 2
    assert [note.partition(' has ')[2] for note in splits.notes] == ['no images of 1 of the 2 classes: b']


def test_class_counts(make_folder: MakeFolder) -> None:
    root = make_folder({'train': ['a', 'b'], 'val': ['a', 'b']}, images=1)
    splits = build_datasets(DataSource('clipart', str(root)))
    assert splits.num_classes == 345 and '2 classes; the head is made for 345' in splits.notes[-1]
    assert build_datasets(DataSource('FOLDER', str(root)), num_classes=5).num_classes == 5
    with pytest.raises(InputError, match='2 classes, more than --nb-classes 1 leaves room for'):
        build_datasets(DataSource('FOLDER', str(root)), num_classes=1)


def test_evaluation_needs_no_training_images(make_folder: MakeFolder) -> None:
    splits = build_datasets(DataSource('FOLDER', str(make_folder({'val': ['a', 'b']}))), train=False)
    assert splits.train is None and len(splits.val) == 16


@pytest.mark.parametrize(
    ('splits', 'message'),
    [
        ({}, 'no folder train and no folder val'),
        ({'train': ['a']}, 'no folder val'),
        ({'train': ['a'], 'val': []}, 'no folder val'),
    ],
)
def test_missing_folders(make_folder: MakeFolder, splits: dict[str, list[str]], message: str) -> None:
    root = make_folder(splits)
    root.mkdir(exist_ok=True)
    with pytest.raises(InputError, match=message):
        build_datasets(DataSource('FOLDER', str(root)))


def test_empty_folders(tmp_path: Path) -> None:
    with pytest.raises(InputError, match='no such folder'):
        build_datasets(DataSource('IMNET', str(tmp_path / 'nothing')))
    for split in ('train', 'val'):
        (tmp_path / split).mkdir()
    with pytest.raises(InputError, match='hold no class folders'):
        build_datasets(DataSource('FOLDER', str(tmp_path)))
    for split in ('train', 'val'):
        (tmp_path / split / 'a').mkdir()
    with pytest.raises(InputError, match='holds no images'):
        build_datasets(DataSource('FOLDER', str(tmp_path)))


def test_truncated_image_is_named(make_folder: MakeFolder) -> None:
    root = make_folder({'train': ['a'], 'val': ['a']}, images=1)
    path = root / 'train' / 'a' / '0.jpg'
    path.write_bytes(path.read_bytes()[:300])
    with pytest.raises(InputError, match=r'train/a/0\.jpg cannot be read'):
        build_datasets(DataSource('FOLDER', str(root))).train[0]


def fake_cifar10(folder: Path, url: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """An archive in CIFAR-10's format, in a folder that a URL serves."""
    inside = folder / 'cifar-10-batches-py'
    inside.mkdir()
    sums = {}
    batches: dict[str, Any] = {f'data_batch_{i}': 4 for i in range(1, 6)} | {'test_batch': 6}
    for name, count in batches.items():
        rows = np.random.default_rng(0).integers(0, 256, (count, 3072), dtype=np.uint8)
        content = pickle.dumps({'data': rows, 'labels': [i % 10 for i in range(count)]})
        (inside / name).write_bytes(content)
        sums[name] = hashlib.md5(content).hexdigest()
    meta = pickle.dumps({'label_names': [f'class {i}' for i in range(10)]})
    (inside / 'batches.meta').write_bytes(meta)
    with tarfile.open(folder / 'cifar-10-python.tar.gz', 'w:gz') as tar:
        tar.add(inside, 'cifar-10-batches-py')
    monkeypatch.setattr(CIFAR10, 'url', f'{url}/cifar-10-python.tar.gz')
    monkeypatch.setattr(CIFAR10, 'tgz_md5', hashlib.md5((folder / 'cifar-10-python.tar.gz').read_bytes()).hexdigest())
    monkeypatch.setattr(CIFAR10, 'train_list', [[name, sums[name]] for name in batches if name != 'test_batch'])
    monkeypatch.setattr(CIFAR10, 'test_list', [['test_batch', sums['test_batch']]])
    monkeypatch.setattr(CIFAR10, 'meta', {**CIFAR10.meta, 'md5': hashlib.md5(meta).hexdigest()})


def test_cifar_is_downloaded_when_absent(
    tmp_path: Path, web_folder: tuple[Path, str], monkeypatch: pytest.MonkeyPatch
) -> None:
    fake_cifar10(*web_folder, monkeypatch)
    splits = build_datasets(DataSource('CIFAR10', str(tmp_path / 'data')))
    assert (len(splits.train), len(splits.val), splits.num_classes) == (20, 6, 10)
    monkeypatch.setattr(CIFAR10, 'url', f'{web_folder[1]}/absent.tar.gz')
    assert len(build_datasets(DataSource('CIFAR10', str(tmp_path / 'data'))).train) == 20  # found, not downloaded
    with pytest.raises(InputError, match='cannot get CIFAR10 into'):
        build_datasets(DataSource('CIFAR10', str(tmp_path / 'other')))


def names(transform: Any) -> list[str]:
    return [type(step).__name__ for step in transform.transforms]


def test_recipe_transforms() -> None:
    large = build_transform(train=True, input_size=224)
    assert [type(step) for step in large.transforms] == [  # type: ignore[attr-defined]
        *(RandomResizedCropAndInterpolation, transforms.RandomHorizontalFlip, RandAugment),
        *(large.transforms[3].__class__, transforms.Normalize, RandomErasing),  # type: ignore[attr-defined]
    ]  # fmt: skip
    small = build_transform(train=True, input_size=32)
    assert names(small)[:4] == ['Resize', 'RandomCrop', 'RandomHorizontalFlip', 'RandAugment']
    light = build_transform(train=True, input_size=32, auto_augment=None, color_jitter=0.4, re_prob=0, hflip=0)
    assert names(light) == ['Resize', 'RandomCrop', 'ColorJitter', 'MaybeToTensor', 'Normalize']
    assert names(build_transform(train=False, input_size=224))[:2] == ['Resize', 'CenterCrop']
    assert build_transform(train=False, input_size=224).transforms[0].size == 256  # type: ignore[attr-defined]
    assert names(build_transform(train=True, input_size=32, no_aug=True)) == ['Resize', 'ToTensor', 'Normalize']


def test_small_images_pass_evaluation_unchanged() -> None:
    pixels = np.random.default_rng(0).integers(0, 256, (32, 32, 3), dtype=np.uint8)
    out = build_transform(train=False, input_size=32)(Image.fromarray(pixels))
    mean, std = torch.tensor([0.485, 0.456, 0.406]), torch.tensor([0.229, 0.224, 0.225])
    torch.testing.assert_close(out, ((torch.tensor(pixels) / 255 - mean) / std).permute(2, 0, 1))


@pytest.mark.parametrize('size', [(500, 375), (40, 300), (8, 8)])
@pytest.mark.parametrize('train', [True, False])
@pytest.mark.parametrize('input_size', [16, 32, 224])
def test_any_image_becomes_the_right_shape(size: tuple[int, int], train: bool, input_size: int) -> None:
    out = build_transform(train=train, input_size=input_size)(Image.new('RGB', size, (200, 10, 10)))
    assert out.shape == (3, input_size, input_size) and out.dtype == torch.float32


@pytest.mark.parametrize('policy', ['rand-z3', 'nonsense'])
def test_unknown_policy_is_refused(policy: str) -> None:
    with pytest.raises(UsageError, match='timm refuses'):
        build_transform(train=True, input_size=32, auto_augment=policy)


def test_resplit_erases_in_the_second_half_only() -> None:
    grey = load_digits(train=True, transform=lambda image: torch.full((3, 16, 16), 9.0))
    erase = RandomErasing(1.0, mode='const', max_count=1, device='cpu')
    samples = AugmentedImages(grey, seed=0, erase=erase).__getitems__([Draw(i, 0, 0) for i in range(8)])
    assert [bool((image != 9).any()) for image, _ in samples] == [False] * 4 + [True] * 4
    assert [target for _, target in samples] == grey.targets[:8].tolist()


def test_a_sample_depends_on_its_draw_alone() -> None:
    """Seed, image, epoch and repeat each give another augmentation; nothing that was drawn before does."""
    transform = build_transform(train=True, input_size=16)
    images = AugmentedImages(load_digits(train=True, transform=transform), seed=0)
    first, _ = images[Draw(5, 2, 1)]
    images[Draw(6, 2, 1)]
    assert torch.equal(images[Draw(5, 2, 1)][0], first)
    assert torch.equal(images.__getitems__([Draw(9, 2, 1), Draw(5, 2, 1)])[1][0], first)
    for other in (Draw(5, 3, 1), Draw(5, 2, 0)):
        assert not torch.equal(images[other][0], first)
    assert not torch.equal(AugmentedImages(images.dataset, seed=1)[Draw(5, 2, 1)][0], first)


@pytest.mark.parametrize('erase', [None, RandomErasing(0.5, device='cpu')])
def test_batches_do_not_depend_on_the_workers(erase: RandomErasing | None) -> None:
    """Also those of a loader that starts in the middle of an epoch."""
    transform = build_transform(train=True, input_size=16)
    images = AugmentedImages(load_digits(train=True, transform=transform), seed=3, erase=erase)

    def batches(workers: int, done: int = 0) -> list[torch.Tensor]:
        order = TrainBatches(len(images), batch_size=128, repeated=True)
        order.set_epoch(1, done=done)
        return [batch for batch, _ in DataLoader(images, batch_sampler=order, num_workers=workers)]

    alone = batches(0)
    assert len(alone) == 10 and not torch.equal(alone[0], alone[1])
    for workers in (1, 2, 4):
        assert all(torch.equal(*pair) for pair in zip(batches(workers), alone, strict=True))
    assert all(torch.equal(*pair) for pair in zip(batches(2, done=7 * 128), alone[7:], strict=True))
