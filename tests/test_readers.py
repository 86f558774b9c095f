"""Data sets by their names in timm, torch/… and hfds/…: splits and classes, runs that go on, LMDB, what is refused."""

from __future__ import annotations

import hashlib
import json
import pickle
import signal
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from importlib import metadata
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pytest
import torch
import torchvision
from PIL import Image
from pyarrow import parquet

import config.data
import folder2lmdb
import main
from config.data import load_splits
from config.flags import data_set
from datasets import DataSource, HoldOut, build_datasets
from pipeline.file_dataset import ArrayDataset, ItemDataset
from pipeline.images import BadImageError
from pipeline.readers import open_torch
from reports.predictions import predict
from reports.runs import read_run
from tests.conftest import PLAIN, ROOT, SMALL_MODEL
from tests.test_datasets import fake_cifar10
from training.distributed import Process
from utils import InputError

try:
    metadata.version('datasets')
    needs_package = pytest.mark.skipif(False, reason='')
except metadata.PackageNotFoundError:
    needs_package = pytest.mark.skipif(True, reason='needs pip install datasets')

FLOWERS = {'trnid': range(1, 33), 'valid': range(33, 45), 'tstid': range(45, 61)}  # image numbers of each split
SMALL = [*SMALL_MODEL, *PLAIN, '--batch-size', '8', '--epochs', '2', '--lr', '0.02']


def picture(number: int, label: int) -> Image.Image:
    pixels = np.random.default_rng(number).integers(0, 80, (20, 20, 3)) + 50 * np.array([label, 3 - label, 1])
    return Image.fromarray(pixels.astype(np.uint8))


@pytest.fixture
def flowers(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> tuple[str, Path]:
    """The Flowers 102 data set as it is unpacked, of 60 images in three of its classes."""
    scipy_io = pytest.importorskip('scipy.io')
    folder = tmp_path / 'flowers-102'
    (folder / 'jpg').mkdir(parents=True)
    labels = np.arange(60) % 3
    for number, label in enumerate(labels.tolist(), start=1):
        picture(number, label).save(folder / 'jpg' / f'image_{number:05d}.jpg')
    scipy_io.savemat(folder / 'imagelabels.mat', {'labels': labels + 1})
    scipy_io.savemat(folder / 'setid.mat', {name: np.array(numbers) for name, numbers in FLOWERS.items()})
    sums = {name: hashlib.md5((folder / name).read_bytes()).hexdigest() for name in ('imagelabels.mat', 'setid.mat')}
    known = {'image': ('102flowers.tgz', ''), **{n[: -len('.mat')].replace('imagelabels', 'label'): (n, s)
                                                 for n, s in sums.items()}}  # fmt: skip
    monkeypatch.setattr(torchvision.datasets.Flowers102, '_file_dict', known)
    return 'torch/Flowers102', tmp_path


@pytest.fixture
def cifar(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> tuple[str, Path]:
    fake_cifar10(tmp_path, 'http://127.0.0.1:9', monkeypatch)
    return 'torch/CIFAR10', tmp_path


@pytest.fixture(autouse=True)
def offline(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv('HF_HUB_OFFLINE', '1')
    monkeypatch.setattr('huggingface_hub.constants.HF_HUB_OFFLINE', True)  # read from that before the test


@pytest.fixture
def hub_folder(tmp_path: Path) -> tuple[str, Path]:
    """A folder of parquet files, as most data sets of the Hub are: 32 images to train, 12 and 16 to evaluate."""
    folder = tmp_path / 'leaves'
    folder.mkdir()
    features = {'img': {'_type': 'Image'}, 'name': {'names': ['oak', 'elm', 'ash'], '_type': 'ClassLabel'}}
    described = {'huggingface': json.dumps({'info': {'features': features}})}
    for split, first, count in (('train', 0, 32), ('validation', 100, 12), ('test', 200, 16)):
        rows = []
        for number in range(first, first + count):
            path = tmp_path / f'{number}.png'
            picture(number, number % 3).save(path)
            rows.append({'img': {'bytes': path.read_bytes(), 'path': None}, 'name': number % 3})
        kinds = pa.schema([
            ('img', pa.struct([('bytes', pa.binary()), ('path', pa.string())])), ('name', pa.int64())
        ], metadata=described)  # fmt: skip
        parquet.write_table(pa.Table.from_pylist(rows, schema=kinds), folder / f'{split}-00000-of-00001.parquet')
    return f'hfds/{folder}', tmp_path / 'cache'


ALL = ['flowers', 'cifar', pytest.param('hub_folder', marks=needs_package)]
WITH_TEST = ['flowers', pytest.param('hub_folder', marks=needs_package)]  # data sets of three splits


def log_lines(out: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in (out / 'log.txt').read_text().splitlines()]


@pytest.mark.parametrize('made', ALL)
def test_a_run_goes_on_and_is_evaluated(
    made: str, tmp_path: Path, request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Two epochs, once without a stop and once with one: to the same weights; then --eval, and the report's part."""
    name, root = request.getfixturevalue(made)
    argv = [*SMALL, '--data-set', name, '--data-path', str(root)]
    main.main([*argv, '--output_dir', str(tmp_path / 'whole')])
    original = main.evaluate

    def stopped(**given: Any) -> dict[str, float]:
        monkeypatch.setattr(main, 'evaluate', original)  # a second signal would end the process
        signal.raise_signal(signal.SIGTERM)
        return original(**given)

    argv += ['--output_dir', str(tmp_path / 'stopped'), '--auto-resume']
    monkeypatch.setattr(main, 'evaluate', stopped)
    with pytest.raises(SystemExit) as caught:
        main.main(argv)
    assert caught.value.code == 143
    main.main(argv)
    one, two = (torch.load(tmp_path / run / 'checkpoint.pth', weights_only=True) for run in ('whole', 'stopped'))
    assert all(torch.equal(two['model'][key], value) for key, value in one['model'].items())
    assert log_lines(tmp_path / 'whole') == log_lines(tmp_path / 'stopped')
    three = made in ('flowers', 'hub_folder')
    stats = main.main(['--eval', '--resume', str(tmp_path / 'whole' / 'best_checkpoint.pth'), '--num_workers', '0'])
    found = predict(read_run(tmp_path / 'whole'), device='cpu', num_workers=0)
    assert not isinstance(found, str), found
    assert stats['test_images'] == len(found.targets) == (16 if three else 6)
    assert found.accuracy == pytest.approx(stats['test_acc1'])
    if three:  # the images that --eval takes are those that chose nothing
        tested = json.loads((tmp_path / 'whole' / 'test.json').read_text())
        assert tested['acc1'] == pytest.approx(stats['test_acc1'])


@pytest.mark.parametrize('made', WITH_TEST)
def test_splits_parts_and_lmdb(made: str, tmp_path: Path, request: pytest.FixtureRequest) -> None:
    name, root = request.getfixturevalue(made)
    source = DataSource(name, str(root))
    splits = build_datasets(source)
    sizes = [len(split) for split in (splits.train, splits.val, splits.test)]
    assert sizes == [32, 12, 16] and 'its 16 test images are evaluated by it, at the end' in splits.notes[-1]
    classes = torchvision.datasets.Flowers102.classes if made == 'flowers' else ['oak', 'elm', 'ash']
    assert splits.val.classes == classes and splits.num_classes == len(classes)
    assert splits.train.targets[:4].tolist() == [0, 1, 2, 0]
    held = build_datasets(source, hold_out=HoldOut(folds=4, fold=1), train_fraction=0.5)
    assert [len(split) for split in (held.train, held.val, held.test)] == [12, 8, 16]
    assert held.test.fingerprint() == splits.test.fingerprint() != splits.val.fingerprint()
    assert build_datasets(source, train=False).val.fingerprint() == splits.test.fingerprint()

    out = tmp_path / 'lmdb'
    folder2lmdb.main(['--data-set', name, '--dir', str(root), '--out', str(out), '--num_workers', '0'])
    records = build_datasets(DataSource(name, str(out), use_lmdb=True))
    assert records.fingerprint() == splits.fingerprint()  # so a run goes on with either
    for one, two in ((splits.train, records.train), (splits.test, records.test)):
        assert one.raw(5) == two.raw(5) and np.array_equal(np.asarray(one.load(3)), np.asarray(two.load(3)))


@needs_package
def test_loader_processes_need_no_package(hub_folder: tuple[str, Path]) -> None:
    """However they are started: what they are sent names none of its modules, and holds no images."""
    name, root = hub_folder
    train = build_datasets(DataSource(name, str(root))).train
    assert train is not None
    first = np.asarray(train.load(0))
    sent = pickle.dumps(train)
    assert b'datasets' not in sent and train.raw(1)[:100] not in sent
    again = pickle.loads(sent)
    assert again.targets.tolist() == train.targets.tolist() and np.array_equal(np.asarray(again.load(0)), first)


@needs_package
def test_both_modules_named_datasets(hub_folder: tuple[str, Path]) -> None:
    """timm's own reader works inside, and outside the name is this folder's again, also the second time."""
    from timm.data import create_dataset

    import datasets as ours
    from pipeline.hugging_face import hugging_face

    for _ in range(2):
        with hugging_face() as package:
            found = create_dataset(hub_folder[0], str(hub_folder[1]), split='train', input_key='img', target_key='name')
            assert len(found) == 32 and package is sys.modules['datasets'] is not ours
        assert sys.modules['datasets'] is ours and 'datasets.arrow_dataset' not in sys.modules
        assert str(ROOT) in map(str, map(Path.resolve, map(Path, sys.path)))


@needs_package
def test_a_split_without_labels_is_left_out(hub_folder: tuple[str, Path]) -> None:
    name, root = hub_folder
    path = Path(name.removeprefix('hfds/')) / 'test-00000-of-00001.parquet'
    table = parquet.read_table(path)
    parquet.write_table(table.set_column(1, table.schema.field(1), pa.array([-1] * 16)), path)
    splits = build_datasets(DataSource(name, str(root)))
    assert splits.test is None and len(splits.val) == len(build_datasets(DataSource(name, str(root)), train=False).val)


@needs_package
def test_an_image_that_is_not_there(hub_folder: tuple[str, Path]) -> None:
    name, root = hub_folder
    path = Path(name.removeprefix('hfds/')) / 'validation-00000-of-00001.parquet'
    table = parquet.read_table(path)
    images = pa.array([None, *table['img'].to_pylist()[1:]], table.schema.field(0).type)
    parquet.write_table(table.set_column(0, table.schema.field(0), images), path)
    for split in ('train', 'validation', 'test'):
        other = path.with_name(f'{split}-00000-of-00001.parquet')
        table = parquet.read_table(other)
        described = json.loads(table.schema.metadata[b'huggingface'])
        described['info']['features']['image'] = {'dtype': 'string', '_type': 'Value'}
        table = table.append_column('image', pa.array(['a path'] * len(table)))
        parquet.write_table(table.replace_schema_metadata({'huggingface': json.dumps(described)}), other)
    splits = build_datasets(DataSource(name, str(root)))
    with pytest.raises(BadImageError, match='the data set has none there'):
        splits.val.load(0)
    assert splits.val.load(1).size == splits.train.load(0).size


class Shapes(torch.utils.data.Dataset[Any]):
    """Not files and not an array, with labels in its items alone, as some of torchvision's."""

    def __init__(self, root: str, split: str = 'train') -> None:
        if split not in ('train', 'val'):
            raise ValueError(f"Unknown value '{split}' for argument split. Valid values are train, val.")
        self.numbers = range(6 if split == 'train' else 3)

    def __len__(self) -> int:
        return len(self.numbers)

    def __getitem__(self, index: int) -> tuple[Image.Image, int]:
        return picture(self.numbers[index], index % 3), index % 3


def test_items_and_channels_first(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torchvision.datasets, 'Shapes', Shapes, raising=False)
    opened = open_torch('Shapes', tmp_path, ('train', 'val', 'test'))
    train = opened['train']
    assert isinstance(train, ItemDataset) and [*opened] == ['train', 'val'] and train.classes == ['0', '1', '2']
    assert train.targets.tolist() == [0, 1, 2, 0, 1, 2]
    assert np.array_equal(np.asarray(train.load(4)), np.asarray(picture(4, 1)))

    def svhn(self: Any, root: str, split: str = 'train', **_: Any) -> None:
        if split not in ('train', 'test'):
            raise ValueError(f"Unknown value '{split}'")
        self.labels, self.data = np.array([1, 0]), np.arange(24, dtype=np.uint8).reshape(2, 3, 2, 2)

    monkeypatch.setattr(torchvision.datasets.SVHN, '__init__', svhn)
    opened = open_torch('SVHN', tmp_path, ('train', 'val', 'test'))
    assert isinstance(opened['val'], ArrayDataset)
    assert np.asarray(opened['val'].load(0))[0, 1].tolist() == [1, 5, 9]


@pytest.mark.parametrize('name', ['torch/CIFAR10', 'hfds/some/name', 'CIFAR', 'DIGITS'])
def test_one_process_downloads(name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    turns: list[Process] = []

    @contextmanager
    def main_process_first(process: Process) -> Iterator[None]:
        turns.append(process)
        yield

    def stop(*_: Any, **__: Any) -> None:
        raise InputError('as asked')

    monkeypatch.setattr(config.data, 'main_process_first', main_process_first)
    monkeypatch.setattr(config.data, 'build_datasets', stop)
    args = main.parse_args(['--data-set', name, '--data-path', str(tmp_path)])
    for download in (True, False):
        with pytest.raises(InputError, match='as asked'):
            load_splits(args, Process(), None, download=download)
    assert len(turns) == (name != 'DIGITS')


# What is refused


def refused(argv: list[str], capsys: pytest.CaptureFixture[str]) -> tuple[int, str]:
    capsys.readouterr()
    with pytest.raises(SystemExit) as caught:
        main.main([*SMALL, *argv])
    error = capsys.readouterr().err
    assert 'Traceback' not in error and error.splitlines()[-1].startswith('main.py: error: ')
    assert isinstance(caught.value.code, int)
    return caught.value.code, error.splitlines()[-1]


@pytest.mark.parametrize(
    ('name', 'message'),
    [
        ('torch/flower102', r'torchvision has no data set .flower102. \(is Flowers102 meant\?\)'),
        ('torch/', 'neither torch/NAME nor hfds/NAME'),
        ('timm/flowers', 'neither torch/NAME nor hfds/NAME'),
        ('wds/shards', r'wds/shards is a stream.*use hfds/NAME.*for FOLDER'),
        ('tfds/mnist', 'tfds/mnist is a stream'),
    ],
)
def test_wrong_names(name: str, message: str, capsys: pytest.CaptureFixture[str]) -> None:
    code, error = refused(['--data-set', name], capsys)
    assert code == 2
    with pytest.raises(Exception, match=message):
        data_set(name)
    assert name.partition('/')[0] in error


def test_a_test_at_the_end_needs_a_folder(flowers: tuple[str, Path], capsys: pytest.CaptureFixture[str]) -> None:
    code, error = refused(['--data-set', flowers[0], '--data-path', str(flowers[1])], capsys)
    assert code == 2 and 'has test images beside those that validate' in error and error.endswith('--output_dir')


def test_spellings() -> None:
    names = {'torch/oxford_iiit_pet': 'torch/OxfordIIITPet', 'Torch/fashion-mnist': 'torch/FashionMNIST'}
    assert {name: data_set(name) for name in names} == names
    assert data_set('HFDS/Some/Name') == 'hfds/Some/Name'


@pytest.mark.parametrize(
    ('name', 'message'),
    [
        ('torch/cifar10', 'cannot get CIFAR10 into'),
        ('torch/caltech101', 'Caltech101 has no split for training and none for evaluation: write it as folders'),
        ('torch/fakedata', 'FakeData has no split for'),
        pytest.param('hfds/nobody/nothing', 'cannot read hfds/nobody/nothing', marks=needs_package),
    ],
)
def test_what_cannot_be_had(
    name: str, message: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(torchvision.datasets.CIFAR10, 'url', 'http://127.0.0.1:9/cifar-10-python.tar.gz')
    code, error = refused(['--data-set', name, '--data-path', str(tmp_path / 'none')], capsys)
    assert code == 1 and message in error


def test_a_missing_package_is_one_line(
    tmp_path: Path, flowers: tuple[str, Path], monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    original: Callable[..., Any] = __import__

    def without(name: str, *rest: Any, **further: Any) -> Any:
        if name.partition('.')[0] == 'scipy':
            raise ModuleNotFoundError(f'No module named {name!r}', name=name)
        return original(name, *rest, **further)

    monkeypatch.setattr('builtins.__import__', without)
    code, error = refused(['--data-set', flowers[0], '--data-path', str(flowers[1])], capsys)
    assert code == 1 and 'torch/Flowers102 needs a package: pip install scipy' in error
    monkeypatch.setattr('builtins.__import__', original)
    for name in [name for name in sys.modules if name == 'pipeline.hugging_face']:
        monkeypatch.setattr(sys.modules[name], '_theirs', {})
    site = [entry for entry in sys.path if not (Path(entry) / 'datasets').is_dir()]
    monkeypatch.setattr(sys, 'path', site)
    code, error = refused(['--data-set', 'hfds/some/name', '--data-path', str(tmp_path)], capsys)
    assert code == 1 and 'needs a package: pip install datasets' in error
