"""`--in-chans 1`, `--exif-orientation` and `--value-range` from training to prediction."""

from __future__ import annotations

import csv
import json
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from timm.models import adapt_input_conv
from torchvision.transforms.functional import pil_to_tensor

from config.pretrained import load_trained
from folder2lmdb import main as build_lmdb
from main import main
from pipeline.augment import BatchedAugment
from pipeline.transforms import Augmentation, normalization
from tests.conftest import PLAIN, SMALL_MODEL
from tools.export import main as export
from tools.predict import main as predict
from tools.visualize import main as visualize
from training import checkpoint as ckpt
from training.weights import load_fitting
from utils import InputError

MakeFolder = Callable[..., Path]
EVALUATION = ['--device', 'cpu', '--amp', 'off', '--num_workers', '0']


def log_of(out: Path) -> str:
    return (out / 'log.txt').read_text()


@pytest.fixture
def flags(make_folder: MakeFolder) -> list[str]:
    root = make_folder({'train': ['a', 'b'], 'val': ['a', 'b']}, size=16)
    return ['--in-chans', '1', '--data-set', 'FOLDER', '--data-path', str(root), '--batch-size', '8', '--epochs', '2']


def test_a_run_on_grey_images(flags: list[str], tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    out, root = tmp_path / 'out', flags[flags.index('--data-path') + 1]
    train = [*SMALL_MODEL, *PLAIN, *flags]
    main([*train, '--report', '--output_dir', str(out)])
    assert 'Report: ' in capsys.readouterr().out
    assert 'cannot be counted' not in (out / 'report.html').read_text()
    first = next(value for name, value in ckpt.load(str(out))['model'].items() if name.endswith('.weight'))
    assert first.shape[1] == 1
    stats = main(['--eval', '--resume', str(out), *EVALUATION])
    assert stats['test_images'] == 16

    main([*train, '--epochs', '1', '--output_dir', str(tmp_path / 'cut')])  # another schedule, but a run to go on from
    main([*train, '--force-resume', '--auto-resume', '--output_dir', str(tmp_path / 'cut')])
    assert len(log_of(tmp_path / 'cut').splitlines()) == 2

    build_lmdb(['--dir', root, '--out', str(tmp_path / 'lmdb'), '--num_workers', '0'])
    main([*train, '--use-lmdb', '--data-path', str(tmp_path / 'lmdb'), '--output_dir', str(tmp_path / 'records')])
    assert log_of(tmp_path / 'records') == log_of(out)

    assert load_trained(str(out), further={'in_chans': 1})[1].shape == (1, 16, 16)
    with pytest.raises(InputError, match='is of a model for images of 1 channels, not of 3'):
        load_trained(str(out), further={'in_chans': 3})
    exported = tmp_path / 'a.safetensors'
    export([str(out), '--format', 'safetensors', '--out', str(exported)])
    export([str(out), '--format', 'timm', '--out', str(tmp_path / 'timm')])
    assert json.loads((tmp_path / 'timm' / 'config.json').read_text())['pretrained_cfg']['input_size'] == [1, 16, 16]
    export([str(out), '--format', 'torch-export', '--fold-bn', '--out', str(tmp_path / 'a.pt2')])
    rows = []
    for source in (out, exported):
        predict([str(source), root + '/val', '--out', str(tmp_path / 'rows.csv'), *EVALUATION])
        rows.append(list(csv.DictReader((tmp_path / 'rows.csv').open())))
    assert rows[0] == rows[1] and len(rows[0]) == 16
    right = sum(row['class1'] == Path(row['path']).parent.name for row in rows[0])
    assert 100 * right / 16 == stats['test_acc1']
    visualize(['attention', str(out), root + '/val/a/0.jpg', '--out', str(tmp_path / 'a.png')])


def test_evit_on_grey_images(flags: list[str], tmp_path: Path) -> None:
    model = ['--model', 'deit_small_patch16_shrink_base', '--input-size', '32', '--drop_loc', '1']
    model += ['--shrink_start_epoch', '0', '--model-kwargs', 'embed_dim=32', 'depth=2', 'num_heads=2']
    main([*PLAIN, *model, *flags, '--epochs', '1', '--output_dir', str(tmp_path / 'out')])
    image = flags[flags.index('--data-path') + 1] + '/val/a/0.jpg'
    visualize(['evit-mask', str(tmp_path / 'out'), image, '--out', str(tmp_path / 'a.png')])


@pytest.mark.parametrize('augment', ['pil', 'batched'])
def test_grey_images_are_augmented(augment: str, flags: list[str]) -> None:
    plain = [flag for flag in PLAIN if flag != '--no-aug']
    argv = [*SMALL_MODEL, *plain, *flags, '--augment', augment, '--epochs', '1', '--aa', 'rand-m9-mstd0.5-inc1']
    assert main(argv)['train_loss'] != main([*argv, '--no-aug'])['train_loss']


def test_grey_batches_are_those_of_grey_colours() -> None:
    """Each op on one channel gives what it gives on three that are equal, erasing and the fill apart."""
    rng = np.random.default_rng(0)
    images = torch.from_numpy(rng.integers(0, 256, (64, 1, 16, 16), dtype=np.uint8))
    draws = torch.stack([torch.arange(64), torch.zeros(64, dtype=torch.long), torch.zeros(64, dtype=torch.long)], 1)
    for policy in ('rand-m9-mstd0.5-inc1', None):
        found, colours = (
            BatchedAugment(Augmentation(input_size=16, channels=channels, re_prob=0.0, auto_augment=policy), seed=0)(
                images.expand(-1, channels, -1, -1), draws
            )
            for channels in (1, 3)
        )
        assert found.shape == (64, 1, 16, 16)
        (mean, std), (means, stds) = (map(torch.tensor, normalization(channels)) for channels in (1, 3))
        grey, green = found[:, 0] * std + mean, colours[:, 1] * stds[1] + means[1]
        same = (grey - green).abs().flatten(1).max(1).values < 1 / 255
        assert same.float().mean() > 0.5  # the others have pixels from outside, filled with the mean
        assert policy or same.all()


def test_normalization_is_that_of_timm() -> None:
    from timm.data.loader import adapt_to_chs

    assert normalization(1) == tuple(pytest.approx(adapt_to_chs(value, 1)) for value in normalization(3))


def test_weights_for_rgb_are_adapted(flags: list[str], tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    rgb = tmp_path / 'rgb'
    train = [*SMALL_MODEL, *PLAIN, *flags, '--epochs', '1']
    main([*train, '--in-chans', '3', '--output_dir', str(rgb)])
    given = ckpt.load(str(rgb))['model']
    capsys.readouterr()
    main([*train, '--finetune', str(rgb), '--lr', '0', '--output_dir', str(tmp_path / 'grey')])
    assert '(100.0% of the weights)' in capsys.readouterr().out
    found = ckpt.load(str(tmp_path / 'grey'))['model']
    adapted = [name for name in given if given[name].shape != found[name].shape]
    assert len(adapted) == 3  # the two tensors of the first affine, and the first convolution
    for name in adapted:
        affine = given[name].shape[0] == 1
        torch.testing.assert_close(
            found[name], given[name].mean(1, keepdim=True) if affine else adapt_input_conv(1, given[name])
        )
    model, settings, _ = load_trained(str(tmp_path / 'grey'))
    assert settings.shape == (1, 16, 16)
    capsys.readouterr()
    load_fitting(model, given, 'it')
    assert 'new' not in capsys.readouterr().out
    main([*PLAIN, '--epochs', '1', *flags[2:], '--finetune', str(tmp_path / 'grey')])  # whose channels count
    assert '(100.0% of the weights)' in capsys.readouterr().out


@pytest.mark.parametrize(
    ('argv', 'message'),
    [
        (['--in-chans', '2'], 'choose from'),
        (['--in-chans', 'grey'], "invalid int value: 'grey'"),
        (['--value-range', '5', '5'], 'needs two numbers, the smaller one first'),
        (['--value-range', '0', 'nan'], 'needs two numbers, the smaller one first'),
        (['--value-range', '0', 'inf'], 'needs two numbers, the smaller one first'),
    ],
)
def test_wrong_values(argv: list[str], message: str, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit):
        main(argv)
    error = capsys.readouterr().err
    assert error.count('\n') == 1 and message in error


def test_how_files_are_read_goes_with_the_checkpoint(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """12-bit data that lies turned: evaluation, LMDB and predictions see what training saw."""
    rng = np.random.default_rng(0)
    exif = Image.Exif()
    exif[0x0112] = 6
    for split, count in (('train', 8), ('val', 4)):
        for label in range(2):
            for number in range(count):
                pixels = rng.integers(0, 400, (16, 16))
                pixels[:8] += 3000 * label
                pixels[:, :8] += 3000 * (1 - label)
                path = tmp_path / 'data' / split / str(label) / f'{number}.png'
                path.parent.mkdir(parents=True, exist_ok=True)
                Image.fromarray(pixels.clip(0, 4095).astype(np.uint16)).save(path, exif=exif)
    data = ['--data-set', 'FOLDER', '--data-path', str(tmp_path / 'data'), '--batch-size', '8', '--epochs', '2']
    train = [*SMALL_MODEL, *PLAIN, *data, '--in-chans', '1', '--exif-orientation']
    with pytest.raises(SystemExit):
        main(train)
    assert '--value-range 0 4095' in capsys.readouterr().err
    out = tmp_path / 'out'
    main([*train, '--value-range', '-1.5', '4095', '--output_dir', str(out)])
    stats = main(['--eval', '--resume', str(out), *EVALUATION])
    assert stats['test_acc1'] == max(json.loads(line)['test_acc1'] for line in log_of(out).splitlines())
    settings = load_trained(str(out))[1]
    assert settings.reading.exif_orientation and settings.reading.value_range == (-1.5, 4095)

    lmdb = tmp_path / 'lmdb'
    build_lmdb(['--dir', str(tmp_path / 'data'), '--out', str(lmdb), '--num_workers', '0'])
    build_lmdb(['--check', str(lmdb / 'val.lmdb'), '--num_workers', '0'])
    records = main(['--eval', '--resume', str(out), '--use-lmdb', '--data-path', str(lmdb), *EVALUATION])
    assert records == stats
    found = []
    for source in (tmp_path / 'data' / 'val', lmdb / 'val.lmdb'):
        predict([str(out), str(source), '--out', str(tmp_path / 'rows.csv'), *EVALUATION])
        found.append([row['probability1'] for row in csv.DictReader((tmp_path / 'rows.csv').open())])
    assert found[0] == found[1] and len(found[0]) == 8
    image = pil_to_tensor(Image.open(tmp_path / 'data' / 'val' / '0' / '0.png')).float()
    upright = image.rot90(-1, (1, 2))
    model, settings, _ = load_trained(str(out))
    mean, std = settings.mean[0], settings.std[0]
    with torch.no_grad():
        scaled = ((upright + 1.5) * 255 / 4096.5).round() / 255
        expected = float(model((scaled[None] - mean) / std).softmax(1).max())
    assert float(found[0][0]) == pytest.approx(expected, abs=1e-4)
