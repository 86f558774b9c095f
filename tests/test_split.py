"""Images held out of training: which they are, and what the best checkpoint is chosen and tested on."""

from __future__ import annotations

import json
import signal
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import yaml
from PIL import Image

import folder2lmdb
from datasets import DataSource, HoldOut, Splits, build_datasets
from main import main
from pipeline.file_dataset import ArrayDataset, ItemDataset
from tests.conftest import PLAIN, SMALL_MODEL
from tests.test_distributed import trained_by
from training import checkpoint as ckpt
from training import run as training
from utils import InputError

DIGITS = [*SMALL_MODEL, *PLAIN, '--data-set', 'DIGITS', '--batch-size', '128', '--lr', '0.05', '--epochs', '2']
HELD_OUT = ['--val-fraction', '0.2']


def lines(path: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in path.read_text().splitlines()]


# Which images


def test_each_class_gives_its_share() -> None:
    targets = np.random.default_rng(0).permutation(np.repeat([0, 1, 2, 3], [500, 300, 199, 1]))
    kept, held = HoldOut(0.1).split(targets)
    assert sorted([*kept, *held]) == [*range(1000)] and len(held) == 100
    assert np.bincount(targets[held], minlength=4).tolist() == [50, 30, 20, 0]  # the only image stays in training
    assert np.array_equal(HoldOut(0.1).split(targets)[1], held)
    assert not np.array_equal(HoldOut(0.1, seed=1).split(targets)[1], held)


def test_folds_hold_each_image_once() -> None:
    targets = np.random.default_rng(0).permutation(np.repeat([0, 1, 2], [50, 31, 20]))
    parts = [HoldOut(folds=5, fold=fold).split(targets) for fold in range(5)]
    assert sorted(image for _, held in parts for image in held) == [*range(101)]
    for kept, held in parts:
        assert not set(kept) & set(held) and len(kept) + len(held) == 101
        assert (np.abs(np.bincount(targets[held]) - np.array([10, 6.2, 4])) < 1).all()
    other = HoldOut(folds=5, fold=0, seed=1).split(targets)[1]
    assert not np.array_equal(parts[0][1], other)


def names(splits: Splits) -> list[list[str]]:
    return [[s.name(i) for i in range(len(s))] for s in (splits.train, splits.val, splits.test) if s is not None]


def test_held_out_first_then_a_fraction_of_the_rest() -> None:
    source, hold_out = DataSource('DIGITS', ''), HoldOut(0.1, seed=3)
    train, val, test = names(build_datasets(source, hold_out=hold_out))
    part, same, _ = names(build_datasets(source, hold_out=hold_out, train_fraction=0.5))
    plain_train, plain_test = names(build_datasets(source))
    assert same == val and set(part) < set(train) and len(part) == round(len(train) / 2)
    assert sorted([*train, *val]) == sorted(plain_train) and test == plain_test
    evaluation = build_datasets(source, hold_out=hold_out, train=False)
    assert names(evaluation) == [plain_test] and evaluation.test is None


def test_files_and_lmdb_hold_out_the_same(make_folder: Callable[..., Path], tmp_path: Path) -> None:
    root = make_folder({'train': ['a', 'b'], 'val': ['a', 'b']}, images=10)
    folder2lmdb.main(['--dir', str(root)])
    found = [
        build_datasets(
            DataSource('FOLDER', str(root), use_lmdb=lmdb), hold_out=HoldOut(folds=5, fold=2), known_classes=['b', 'a']
        )
        for lmdb in (False, True)
    ]
    assert names(found[0]) == names(found[1]) and [len(part) for part in names(found[0])] == [16, 4, 20]
    assert found[0].fingerprint() == found[1].fingerprint()
    for splits in found:
        assert splits.test is not None and splits.val.targets.tolist() == [1, 1, 0, 0]  # as the checkpoint has them
        assert [splits.val[i][1] for i in range(4)] == [1, 1, 0, 0] and splits.test.classes == ['b', 'a']


@pytest.mark.parametrize('as_items', [False, True])
def test_images_keep_their_names_whatever_the_order_of_the_head(as_items: bool) -> None:
    pixels, labels = np.zeros((2, 4, 4, 3), np.uint8), np.array([1, 0])
    items = [(Image.fromarray(image), label) for image, label in zip(pixels, labels, strict=True)]
    dataset = ItemDataset(items, labels, ['a', 'b']) if as_items else ArrayDataset(pixels, labels, ['a', 'b'])
    before = [dataset.name(0), dataset.name(1)]
    dataset.relabel(['c', 'b', 'a'])
    assert [dataset.name(0), dataset.name(1)] == before == ['b/000000.png', 'a/000001.png']
    assert dataset.targets.tolist() == [1, 2]


def test_bad_images_are_each_parts_own(make_folder: Callable[..., Path]) -> None:
    """A bad one that is held out is left out of the evaluation, and is none of training's."""
    root = make_folder({'train': ['a', 'b'], 'val': ['a', 'b']}, images=100, size=4)
    splits = build_datasets(DataSource('FOLDER', str(root)), hold_out=HoldOut(0.5), skip_bad_images=True)
    assert splits.train is not None
    Path(splits.val.path(7)).write_bytes(b'no image')
    assert splits.val[7][1] == -1 and splits.val[8][1] >= 0
    Path(splits.train.path(7)).write_bytes(b'no image')
    assert splits.train[7][1] == splits.train.target(8)
    assert (int(splits.val._bad.sum()), int(splits.train._bad.sum())) == (1, 1)


def test_too_few_images(make_folder: Callable[..., Path]) -> None:
    root = make_folder({'train': ['a'], 'val': ['a']}, images=3)
    with pytest.raises(InputError, match='3 training images are too few to hold some of them out'):
        build_datasets(DataSource('FOLDER', str(root)), hold_out=HoldOut(0.1))


# Runs


@pytest.fixture(scope='module')
def finished(tmp_path_factory: pytest.TempPathFactory) -> Path:
    out = tmp_path_factory.mktemp('split') / 'out'
    main([*DIGITS, *HELD_OUT, '--output_dir', str(out)])
    return out


def test_the_best_is_chosen_on_held_out_images(finished: Path, capsys: pytest.CaptureFixture[str]) -> None:
    logged = lines(finished / 'log.txt')
    best = ckpt.load(str(finished))
    assert best['max_accuracy'] == max(line['test_acc1'] for line in logged)
    right = [line['test_acc1'] * 287 / 100 for line in logged]
    assert all(abs(number - round(number)) < 1e-6 for number in right)  # of 287 images
    settings = yaml.safe_load((finished / 'args.yaml').read_text())
    assert settings['derived']['best_chosen_on'] == 'held-out images' and settings['val_fraction'] == 0.2
    result = json.loads((finished / 'test.json').read_text())
    stats = main(['--eval', '--resume', str(finished), '--device', 'cpu', '--amp', 'off', '--num_workers', '0'])
    assert result['images'] == stats['test_images'] == 360 and result['epoch'] == best['epoch']
    for name in ('acc1', 'acc5', 'loss'):
        assert result[name] == stats[f'test_{name}']
    assert 'on the 360 test images' in capsys.readouterr().out


def test_valid_chooses_and_test_tests(
    make_folder: Callable[..., Path], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    root, out = make_folder({'train': ['a', 'b'], 'valid': ['a', 'b'], 'test': ['b', 'a']}, size=16), tmp_path / 'out'
    for path in list((root / 'test').rglob('[0-5].jpg')):
        path.unlink()
    data = ['--data-set', 'FOLDER', '--data-path', str(root), '--epochs', '2', '--batch-size', '8']
    with pytest.raises(SystemExit):
        main([*SMALL_MODEL, *PLAIN, *data])
    assert 'needs a folder for checkpoints: --output_dir' in capsys.readouterr().err
    main([*SMALL_MODEL, *PLAIN, *data, '--report', '--output_dir', str(out)])
    printed = capsys.readouterr().out
    assert printed.count('on the 16 held-out images') == 2 and printed.count('on the 4 test images') == 1
    result = json.loads((out / 'test.json').read_text())
    stats = main(['--eval', '--resume', str(out), '--device', 'cpu', '--amp', 'off', '--num_workers', '0'])
    assert result['images'] == stats['test_images'] == 4 and result['loss'] == stats['test_loss']
    assert 'chosen on held-out images' in (out / 'report.html').read_text()
    held = build_datasets(DataSource('FOLDER', str(root)), hold_out=HoldOut(0.25))
    assert names(held)[1][0].startswith('train/') and len(held.val) == 4 and names(held)[2][0].startswith('test/')
    assert any('16 images that would validate are not used' in note for note in held.notes)


def test_held_out_images_are_evaluated_without_augmentation(tmp_path: Path) -> None:
    """The logged accuracy is that of the same images in a data set of their own, where training augments."""
    augmented = [flag for flag in DIGITS if flag not in ('--no-aug', '--no-repeated-aug')]
    out = tmp_path / 'out'
    line = main([*augmented, '--epochs', '1', '--folds', '4', '--fold', '3', '--output_dir', str(out)])
    splits = build_datasets(DataSource('DIGITS', ''), hold_out=HoldOut(folds=4, fold=3))
    for index in range(len(splits.val)):
        file = tmp_path / 'images' / 'val' / str(splits.val.target(index)) / f'{index}.png'
        file.parent.mkdir(parents=True, exist_ok=True)
        splits.val.load(index).save(file)
    stats = main(['--eval', '--resume', str(out / 'checkpoint.pth'), '--data-set', 'FOLDER', '--data-path',
                  str(tmp_path / 'images'), '--device', 'cpu', '--num_workers', '0'])  # fmt: skip
    assert stats['test_images'] == len(splits.val) == 359 and stats['test_acc1'] == line['test_acc1']


def test_a_signal_in_the_last_evaluation(
    finished: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """The run goes on with it, to the same logs and the same result."""
    argv = [*DIGITS, *HELD_OUT, '--output_dir', str(tmp_path / 'out'), '--auto-resume']
    original = training.Run._test_best

    def interrupted(self: training.Run, test: training.Test) -> None:
        signal.raise_signal(signal.SIGTERM)
        original(self, test)

    monkeypatch.setattr(training.Run, '_test_best', interrupted)
    with pytest.raises(SystemExit) as caught:
        main(argv)
    assert caught.value.code == 143 and not (tmp_path / 'out' / 'test.json').exists()
    monkeypatch.setattr(training.Run, '_test_best', original)
    capsys.readouterr()
    main(argv)
    printed = capsys.readouterr().out
    assert 'Nothing is left to train' in printed and 'on the 287 held-out images' in printed
    for name in ('log.txt', 'test.json'):
        assert (tmp_path / 'out' / name).read_bytes() == (finished / name).read_bytes()


@pytest.mark.parametrize('changed', [['--val-fraction', '0.1'], ['--val-seed', '1'], ['--val-fraction', '0']])
def test_another_split_is_another_run(finished: Path, changed: list[str], capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as caught:
        main([*DIGITS, *HELD_OUT, *changed, '--output_dir', str(finished), '--auto-resume'])
    error = capsys.readouterr().err
    assert caught.value.code == 1 and 'the data set was' in error and f'--{changed[0][2:].replace("-", "_")}' in error


def test_two_processes_agree_with_one(tmp_path: Path) -> None:
    out = tmp_path / 'out'
    trained_by(2, [*DIGITS, *HELD_OUT, '--epochs', '1', '--dist-eval', '--output_dir', str(out)])
    result = json.loads((out / 'test.json').read_text())
    stats = main(['--eval', '--resume', str(out), '--device', 'cpu', '--amp', 'off', '--num_workers', '0'])
    assert result['images'] == 360 and result['acc1'] == stats['test_acc1']


@pytest.mark.parametrize(
    ('argv', 'message'),
    [
        (HELD_OUT, '--val-fraction needs a folder for checkpoints'),
        (['--folds', '5', '--fold', '0'], '--folds needs a folder for checkpoints'),
        (['--folds', '5'], '--folds and --fold need each other'),
        (['--fold', '5'], '--folds and --fold need each other'),
        (['--folds', '5', '--fold', '5', '--output_dir', 'x'], '--fold 5 is none of the 5 folds'),
        (['--folds', '1', '--fold', '0', '--output_dir', 'x'], 'leaves nothing to train with'),
        (['--val-fraction', '1', '--output_dir', 'x'], 'leaves nothing to train with'),
        (['--folds', '5', '--fold', '0', *HELD_OUT, '--output_dir', 'x'], 'exclude each other'),
    ],
)
def test_wrong_flags(argv: list[str], message: str, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as caught:
        main([*DIGITS, *argv])
    error = capsys.readouterr().err
    assert caught.value.code == 2 and message in error and error.count('\n') == 1
