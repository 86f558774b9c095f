"""tools/predict.py: what it reads, in which order, what it writes, and that it agrees with evaluation."""

from __future__ import annotations

import csv
import io
import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any, NamedTuple

import pytest
import torch
from PIL import Image

from datasets import DataSource, build_datasets, load_digits
from folder2lmdb import write_lmdb
from main import main as train
from tests.conftest import PLAIN, ROOT, SMALL_MODEL
from tools import predict
from training import checkpoint as ckpt
from utils import InputError

FLAGS = ['--device', 'cpu', '--num_workers', '0', '--amp', 'off']


class Made(NamedTuple):
    checkpoint: str
    root: Path  # val/<digit>/<number>.png


@pytest.fixture(scope='module')
def made(tmp_path_factory: pytest.TempPathFactory) -> Made:
    """A model that has seen digits for one epoch, and the test images as files."""
    folder = tmp_path_factory.mktemp('predict')
    flags = [*SMALL_MODEL, *PLAIN, '--data-set', 'DIGITS', '--batch-size', '64', '--epochs', '1', '--lr', '2e-2']
    train([*flags, '--lr-delay-epochs', '0', '--model-ema', '--output_dir', str(folder / 'run')])
    digits = load_digits(train=False)
    for number in range(len(digits)):
        path = folder / 'images' / 'val' / digits.classes[digits.target(number)] / f'{number:03d}.png'
        path.parent.mkdir(parents=True, exist_ok=True)
        digits.load(number).save(path)
    return Made(str(folder / 'run' / 'checkpoint.pth'), folder / 'images')


def run(*argv: Any, expect: int = 0) -> None:
    if expect == 0:
        predict.main([*map(str, argv), *FLAGS])
        return
    with pytest.raises(SystemExit) as stop:
        predict.main([*map(str, argv), *FLAGS])
    assert stop.value.code == expect


def names_in(folder: Path) -> list[str]:
    return sorted(path.name for path in folder.iterdir())


def rows(path: Path) -> list[dict[str, str]]:
    with open(path, newline='', encoding='utf-8', errors='surrogateescape') as file:
        return list(csv.DictReader(file))


def test_agrees_with_evaluation(made: Made, tmp_path: Path, capsys: pytest.CaptureFixture) -> None:
    line = train(['--eval', '--resume', made.checkpoint, '--data-set', 'FOLDER', '--data-path', str(made.root),
                  '--num_workers', '0', '--device', 'cpu', '--amp', 'off'])  # fmt: skip
    capsys.readouterr()
    run(made.checkpoint, made.root / 'val', '--out', tmp_path / 'p.csv', '--batch-size', '100')
    found = rows(tmp_path / 'p.csv')
    right = [row for row in found if Path(row['path']).parent.name == row['class1']]
    among = [row for row in found if Path(row['path']).parent.name in [row[f'class{place}'] for place in range(1, 6)]]
    assert len(found) == line['test_images'] == 360
    assert 100 * len(right) / 360 == pytest.approx(line['test_acc1']) and len(right) > 72
    assert 100 * len(among) / 360 == pytest.approx(line['test_acc5'])
    assert [row['path'] for row in found] == sorted(map(str, made.root.glob('val/*/*.png')))
    err = capsys.readouterr().err
    assert '360 images' in err and '0 skipped' in err and 'images/s' in err


def test_csv_and_json_lines_agree(made: Made, tmp_path: Path, capsys: pytest.CaptureFixture) -> None:
    run(made.checkpoint, made.root / 'val' / '7', '--topk', 99)
    table = list(csv.DictReader(io.StringIO(capsys.readouterr().out)))
    run(made.checkpoint, made.root / 'val' / '7', '--topk', 99, '--out', tmp_path / 'new' / 'p.jsonl')
    lines = [json.loads(line) for line in (tmp_path / 'new' / 'p.jsonl').read_text().splitlines()]
    assert len(table) == len(lines) > 30 and names_in(tmp_path / 'new') == ['p.jsonl']
    for row, line in zip(table, lines, strict=True):
        assert row['path'] == line['path'] and line['probabilities'] == sorted(line['probabilities'], reverse=True)
        assert [row[f'class{place}'] for place in range(1, 11)] == line['classes']
        assert sorted(line['classes']) == list('0123456789')
        assert [float(row[f'probability{place}']) for place in range(1, 11)] == line['probabilities']
        assert sum(line['probabilities']) == pytest.approx(1, abs=1e-5)
    run(made.checkpoint, made.root / 'val' / '7' / '../7', '--format', 'jsonl', '--out', tmp_path / 'p.csv')
    assert json.loads((tmp_path / 'p.csv').read_text().splitlines()[0])['path'].startswith(f'{made.root}/val/7/../7/')


def test_inputs_of_all_kinds_in_their_order(made: Made, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    splits = build_datasets(DataSource('FOLDER', str(made.root)), train=False)
    write_lmdb(splits.val, tmp_path / 'val.lmdb', data_set='FOLDER', workers=0)
    images = sorted(map(str, made.root.glob('val/3/*.png')))[:6]
    (tmp_path / 'folder' / 'deep').mkdir(parents=True)
    for name in ('b.png', 'deep/a.png', '.hidden.png', 'notes.txt'):
        (tmp_path / 'folder' / name).write_bytes(Path(images[0]).read_bytes())
    lmdb = tmp_path / 'val.lmdb'
    listed = f'{images[1]}\n\n{lmdb}\r\n{images[2]}\n{tmp_path}/folder\n'
    monkeypatch.setattr('sys.stdin', io.TextIOWrapper(io.BytesIO(listed.encode())))
    run(made.checkpoint, images[3], '-', images[4], '--out', tmp_path / 'p.csv', '--batch-size', 50)
    paths = [row['path'] for row in rows(tmp_path / 'p.csv')]
    assert paths[:2] == [images[3], images[1]]
    records = [f'{lmdb}/{path.relative_to(made.root)}' for path in sorted(made.root.glob('val/*/*.png'))]
    assert paths[2:362] == records
    assert paths[362:] == [images[2], f'{tmp_path}/folder/b.png', f'{tmp_path}/folder/deep/a.png', images[4]]
    # A record is predicted as its file is.
    run(made.checkpoint, made.root / 'val', '--out', tmp_path / 'files.csv')
    files = [{**row, 'path': ''} for row in rows(tmp_path / 'files.csv')]
    assert [{**row, 'path': ''} for row in rows(tmp_path / 'p.csv')[2:362]] == files


def test_workers_and_batches_change_nothing(made: Made, tmp_path: Path) -> None:
    run(made.checkpoint, made.root / 'val' / '1', '--out', tmp_path / 'a.csv')
    predict.main([made.checkpoint, str(made.root / 'val' / '1'), '--out', str(tmp_path / 'b.csv'), '--device', 'cpu',
                  '--num_workers', '2', '--batch-size', '7', '--amp', 'off'])  # fmt: skip
    first, second = rows(tmp_path / 'a.csv'), rows(tmp_path / 'b.csv')
    assert [row['path'] for row in first] == [row['path'] for row in second]
    assert [row['class1'] for row in first] == [row['class1'] for row in second]
    values, others = ([float(row['probability1']) for row in found] for found in (first, second))
    assert values == pytest.approx(others, abs=2e-6)


def test_bad_images_are_named_and_skipped(made: Made, tmp_path: Path, capsys: pytest.CaptureFixture) -> None:
    good = sorted(made.root.glob('val/0/*.png'))[0]
    folder = tmp_path / 'in'
    folder.mkdir()
    (folder / '1.png').write_bytes(good.read_bytes())
    (folder / '2.png').write_bytes(good.read_bytes()[:60])
    (folder / '3.jpg').touch()
    (folder / '4,"é.png').write_bytes(good.read_bytes())
    (folder / os.fsdecode(b'5\xff.png')).write_bytes(good.read_bytes())
    (tmp_path / 'empty').mkdir()
    (tmp_path / 'no.lmdb').write_bytes(b'x' * 5000)
    Image.new('I;16', (9, 40), 40000).save(folder / '6.png')
    wrong = [tmp_path / 'absent.png', tmp_path / 'empty', tmp_path / 'no.lmdb']
    run(made.checkpoint, folder, *wrong, '--out', tmp_path / 'p.csv', '--batch-size', '2')
    names = ['1.png', '4,"é.png', os.fsdecode(b'5\xff.png'), '6.png']
    assert [Path(row['path']).name for row in rows(tmp_path / 'p.csv')] == names
    err = capsys.readouterr().err
    for message in (
        'absent.png cannot be read as an image (No such file or directory)',
        'empty holds no images',
        'no.lmdb is no LMDB database',
        '2.png cannot be read as an image',
        '3.jpg cannot be read as an image (it is empty)',
        '4 images to',
        '5 skipped',
    ):
        assert message in err, err
    before = (tmp_path / 'p.csv').read_bytes()
    run(made.checkpoint, folder / '2.png', tmp_path / 'absent.png', '--out', tmp_path / 'p.csv', expect=1)
    assert 'none of the 2 inputs could be read' in capsys.readouterr().err
    assert (tmp_path / 'p.csv').read_bytes() == before
    run(made.checkpoint, good, '--out', os.devnull)
    assert not Path(os.devnull).is_file()
    for out, message in ((folder, 'is a folder'), (made.checkpoint, 'ends in .csv or .jsonl'), (good, 'ends in .csv')):
        whole = Path(out).stat()
        run(made.checkpoint, good, '--out', out, expect=2)
        assert f'{out} ' in (err := capsys.readouterr().err) and message in err and Path(out).stat() == whole
    assert names_in(tmp_path) == ['empty', 'in', 'no.lmdb', 'p.csv']


def test_the_list_of_inputs_is_not_replaced(made: Made, tmp_path: Path) -> None:
    listed = tmp_path / 'list.csv'
    listed.write_text('a.png\n')
    command = [sys.executable, str(ROOT / 'tools' / 'predict.py'), str(made.checkpoint), '-', '--out', str(listed)]
    with listed.open() as file:
        done = subprocess.run(command, stdin=file, capture_output=True, text=True)
    assert done.returncode == 2 and 'which is read: give another name' in done.stderr
    assert listed.read_text() == 'a.png\n'


def test_special_files_and_other_endings_are_named(made: Made, tmp_path: Path, capsys: pytest.CaptureFixture) -> None:
    good = sorted(made.root.glob('val/0/*.png'))[0]
    folder = tmp_path / 'in'
    (folder / 'sub').mkdir(parents=True)
    (folder / 'sub' / '1.png').write_bytes(good.read_bytes())
    (folder / 'sub' / 'loop').symlink_to('..')
    (folder / 'photo.heic').touch()
    (folder / 'sub' / 'gone').symlink_to('unmounted')
    os.mkfifo(folder / 'pipe.jpg')
    os.mkfifo(tmp_path / 'val.lmdb')
    wrong = [folder / 'pipe.jpg', '/dev/zero', tmp_path / 'val.lmdb']
    run(made.checkpoint, folder, *wrong, '--out', tmp_path / 'p.csv')
    assert [row['path'] for row in rows(tmp_path / 'p.csv')] == [str(folder / 'sub' / '1.png')]
    err = capsys.readouterr().err
    for message in (
        f'{folder}: 1 file left out: .heic',
        f'skipped: {folder}/sub/gone: a link that leads nowhere',
        f'{folder}: left out, as no image files: {folder}/pipe.jpg (a named pipe)',
        'pipe.jpg cannot be read as an image (it is a named pipe, not a file)',
        '/dev/zero cannot be read as an image (it is a device, not a file)',
        'val.lmdb is a named pipe, not a file',
    ):
        assert message in err, err


def test_moving_average_and_bare_weights(made: Made, tmp_path: Path, capsys: pytest.CaptureFixture) -> None:
    image = sorted(made.root.glob('val/0/*.png'))[0]
    loaded = ckpt.load(made.checkpoint)

    def probabilities(*argv: Any) -> list[str]:
        run(*argv, image, '--topk', '10')
        return capsys.readouterr().out.splitlines()[1].split(',')[1:]

    averaged = probabilities(made.checkpoint, '--ema')
    assert averaged != probabilities(made.checkpoint)
    torch.save({'model': loaded['model_ema'], 'args': loaded['args']}, tmp_path / 'published.pth')
    assert probabilities(str(tmp_path / 'published.pth')) == averaged  # without names the classes are their numbers
    torch.save(loaded['model'], tmp_path / 'bare.pth')
    run(tmp_path / 'bare.pth', image, expect=2)
    assert 'does not say which model it is of: give --model' in capsys.readouterr().err
    run(tmp_path / 'bare.pth', image, '--model', 'dhvt_tiny_cifar_patch4', expect=2)
    assert 'give --input-size' in capsys.readouterr().err
    run(tmp_path / 'bare.pth', image, '--model', 'resnet18.typo', '--input-size', '32', expect=2)
    assert 'Invalid pretrained tag (typo)' in capsys.readouterr().err
    torch.save({**loaded, 'args': {**loaded['args'], 'model': 'a_name_of_old'}}, tmp_path / 'old.pth')
    named = probabilities(str(tmp_path / 'old.pth'), '--model', 'dhvt_tiny_cifar_patch4')
    assert named == probabilities(made.checkpoint)
    run(made.checkpoint, image, '--model', 'resnet18', expect=1)
    assert 'is of dhvt_tiny_cifar_patch4, not of resnet18' in capsys.readouterr().err
    run(tmp_path / 'published.pth', image, '--ema', expect=2)
    assert 'has no moving average' in capsys.readouterr().err
    run(tmp_path / 'absent.pth', image, expect=1)
    assert 'no such checkpoint file' in capsys.readouterr().err


def test_mirror_images(made: Made, tmp_path: Path, capsys: pytest.CaptureFixture) -> None:
    """--tta: the softmax of the mean of both logits; an image and its mirror image have the same answer."""
    image = sorted(made.root.glob('val/2/*.png'))[0]
    mirror = tmp_path / 'mirror.png'
    Image.open(image).transpose(Image.Transpose.FLIP_LEFT_RIGHT).save(mirror)

    def logits(*argv: Any) -> list[torch.Tensor]:  # up to a constant
        run(made.checkpoint, image, mirror, '--topk', 10, '--format', 'jsonl', *argv)
        lines = [json.loads(line) for line in capsys.readouterr().out.splitlines()]
        ordered = [dict(zip(line['classes'], line['probabilities'], strict=True)) for line in lines]
        return [torch.tensor([found[name] for name in '0123456789']).log() for found in ordered]

    (one, other), both = logits(), logits('--tta')
    assert not torch.allclose(one, other, atol=1e-2) and torch.allclose(both[0], both[1], atol=1e-3)
    expected = ((one + other) / 2).log_softmax(dim=0)
    torch.testing.assert_close(both[0], expected, atol=1e-3, rtol=0)


def test_more_rows_in_the_head_than_classes(made: Made, tmp_path: Path) -> None:
    loaded = ckpt.load(made.checkpoint)
    names = [f'digit {number}' for number in range(8)]
    torch.save({**loaded, 'classes': names}, tmp_path / 'c.pth')
    run(tmp_path / 'c.pth', made.root / 'val' / '0', '--topk', '10', '--out', tmp_path / 'p.csv')
    found = {value for key, value in rows(tmp_path / 'p.csv')[0].items() if key.startswith('class')}
    assert found == {*names, '8', '9'}


def test_networks_whose_names_mislead_are_not_folded() -> None:
    class Twice(torch.nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.conv1 = torch.nn.Conv2d(3, 3, 1)
            self.bn1 = torch.nn.BatchNorm2d(3)

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return self.bn1(self.conv1(x).relu()).mean(dim=(2, 3))

    model = Twice()
    model.bn1.running_mean.fill_(0.5)
    with pytest.raises(InputError, match='changes its logits'):
        predict.fold_if_equal(model.eval(), (3, 8, 8))


def test_a_reader_that_leaves(made: Made) -> None:
    """`predict.py … | head` ends without a word, and a list comes through the pipe."""
    command = [sys.executable, str(ROOT / 'tools' / 'predict.py'), made.checkpoint, '-', *FLAGS, '--batch-size', '8']
    listed = '\n'.join([str(made.root)] * 30)
    with subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=subprocess.PIPE) as process:
        assert process.stdin is not None and process.stdout is not None and process.stderr is not None
        process.stdin.write(listed.encode())
        process.stdin.close()
        assert process.stdout.readline() == b'path,' + b','.join(
            f'class{place},probability{place}'.encode() for place in range(1, 6)
        ) + b'\n'  # fmt: skip
        process.stdout.close()
        assert process.stderr.read() == b''
