"""Property tests: whatever flags and damaged files are given, errors are one line, never a traceback."""

from __future__ import annotations

import io
import json
import shutil
from collections.abc import Callable
from contextlib import redirect_stderr
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import safetensors.torch
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from PIL import Image

import folder2lmdb
from config.arguments import get_args_parser, parse_args
from config.builders import build_criterion, build_model, build_optimizer, build_scheduler
from config.data import load_splits, open_loaders
from config.pretrained import load_trained
from datasets import DATA_SETS, DataSource, build_datasets
from main import main
from pipeline.images import decode
from tests.conftest import PLAIN, SMALL_MODEL
from training import checkpoint as ckpt
from training.distributed import Process
from training.weights import stored_args
from utils import InputError

MANY = settings(max_examples=250, deadline=None, derandomize=True, suppress_health_check=list(HealthCheck))
SOME = settings(MANY, max_examples=120)
FEW = settings(MANY, max_examples=15)  # whole runs; tests/test_schema.py has thousands of fields

ONE_EPOCH = [*SMALL_MODEL, *PLAIN, '--data-set', 'DIGITS', '--epochs', '1', '--batch-size', '256']

NUMBERS = ['0', '1', '2', '3', '-1', '0.5', '1e-3', 'nan', 'inf', '-inf', '1e400', '', 'x', '９', '0x10', '7_0', '١']
VALUES: dict[str, list[list[str]]] = {
    **{
        name: [[number] for number in NUMBERS]
        for name in (
            *(
                'batch-size',
                'epochs',
                'accum-steps',
                'input-size',
                'nb-classes',
                'drop',
                'drop-path',
                'model-ema-decay',
            ),
            *(
                'base_keep_rate',
                'shrink_start_epoch',
                'opt-eps',
                'clip-grad',
                'momentum',
                'weight-decay',
                'lr',
                'min-lr',
            ),
            *(
                'lr-noise',
                'warmup-lr',
                'decay-epochs',
                'warmup-epochs',
                'cooldown-epochs',
                'decay-rate',
                'hflip',
                'seed',
            ),
            *('smoothing', 'reprob', 'recount', 'mixup', 'cutmix', 'mixup-prob', 'train-fraction', 'num_workers'),
            'cache-gib',
            *('layer-decay', 'lr-noise-pct', 'lr-noise-std', 'patience-epochs', 'color-jitter', 'mixup-switch-prob'),
            *('val-fraction', 'val-seed', 'folds', 'fold', 'train-fraction-seed', 'shrink_epochs', 'in-chans'),
            *('start_epoch', 'timeout', 'most-skips', 'distillation-alpha', 'distillation-tau', 'lr-delay-epochs'),
        )
    },
    'model-kwargs': [['depth=1'], ['depth=0'], ['embed_dim=7'], ['x'], ['=1'], ['depth=[]'], ['num_heads=-1'], []],
    'model': [['vgg11'], [''], ['nonsense'], ['deit_tiny_cifar_patch4'], ['resnet10t'], ['dhvt_tiny_cifar_patch4']],
    'opt': [['sgd'], ['nonsense'], [''], ['lamb']],
    'opt-betas': [['0.9'], ['0.9', '0.99'], ['2', '3'], ['x', 'y'], ['1', '1'], ['0.9', '0.9', '0.9']],
    'sched': [['cosine'], ['step'], ['poly'], ['tanh'], ['plateau'], ['nonsense']],
    'drop_loc': [['1'], ['(3, 6'], ['x'], ['99'], ['1', '2']],
    'aa': [['none'], [''], ['rand-m9'], ['rand-mx'], ['nonsense'], ['original'], ['augmix-m3'], ['rand-n3-p2']],
    'remode': [['pixel'], ['const'], ['x']],
    'augment': [['pil'], ['batched'], ['x']],
    'compile': [['default'], ['x']],
    'train-interpolation': [['random'], ['x']],
    'cutmix-minmax': [['0.1', '0.5'], ['0.5', '0.1'], ['0', '0'], ['1'], ['a', 'b']],
    'mixup-mode': [['elem'], ['x']],
    'data-set': [['digits'], ['CIFAR-100'], ['x'], [''], ['FOLDER'], ['inat'], ['sketch']],
    'data-layout': [['lists'], ['folder'], ['x']],
    'inat-category': [['genus'], ['x']],
    'amp': [['off'], ['bf16'], ['x']],
    'device': [['cpu'], ['cuda:99'], ['tpu'], ['']],
    'distillation-type': [['hard'], ['soft'], ['x']],
    'teacher-path': [['/nowhere'], ['']],
    'checkpoint-every': [['5'], ['10m'], ['0'], ['0m'], ['m'], ['-3'], ['1h'], ['1.5m'], ['1.5'], ['9' * 30]],
    'on-nan': [['rewind'], ['x']],
    'on-bad-image': [['skip'], ['x']],
    'sampler': [['balanced'], ['x']],
    'class-weights': [['balanced'], ['x']],
    'value-range': [['0', '4095'], ['4095', '0'], ['nan', '1'], ['0'], ['x', 'y']],
    'teacher-model': [['resnet10t'], ['nonsense']],
    'export-safetensors': [['x.safetensors'], ['x']],
    'output_dir': [['/proc/x'], ['']],
    'resume': [['/nowhere/a.pth'], ['/'], ['file:///nowhere'], ['']],
    'finetune': [['/nowhere/a.pth'], ['/dev/null'], ['http://127.0.0.1:9/x.pth']],
    **{
        name: [[]]
        for name in (
            *(
                'no-aug',
                'resplit',
                'augment-exact',
                'grad-checkpointing',
                'no-tf32',
                'no-channels-last',
                'eval',
                'use-lmdb',
                'auto-resume',
                'force-resume',
                'no-train-mode',
                'fuse_token',
            ),
            *('no-report', 'sched-on-updates', 'model-ema-warmup', 'model-ema-force-cpu', 'exif-orientation'),
            *('allow-partial', 'no-pin-mem', 'only_test_speed'),
            *('no-repeated-aug', 'verify-records', 'deterministic', 'dist-eval', 'no-model-ema', 'nonsense', 'epoch'),
        )
    },
}


@st.composite
def flags(draw: st.DrawFn) -> list[str]:
    found = []
    for name in draw(st.lists(st.sampled_from(sorted(VALUES)), min_size=1, max_size=4)):
        found += [f'--{name}', *draw(st.sampled_from(VALUES[name]))]
    return found


def test_every_flag_is_drawn() -> None:
    """But for those of processes and of wandb, and those that name files which other tests are about."""
    options = {name[2:].replace('_', '-') for name in get_args_parser()._option_string_actions if name[:2] == '--'}
    drawn = {name.replace('_', '-').removeprefix('no-') for name in VALUES}
    others = {'help', 'config', 'data-path', 'dr', 'dist-url', 'local-rank', 'world-size', 'test-speed', 'log-wandb',
              'wandb-project', 'wandb-tags', 'experiment', 'report'}  # fmt: skip
    assert {name for name in options if name.removeprefix('no-') not in drawn | others} == set()


def one_line_at_most(call: Callable[[], object]) -> str:
    """Calls something that may fail on what was given; the message, which is one line."""
    printed = io.StringIO()
    try:
        with redirect_stderr(printed):
            call()
    except SystemExit as stop:
        assert stop.code == 2 and printed.getvalue().count('\n') == 1, printed.getvalue()
    except (InputError, OSError) as err:  # what main.py's one_line_errors turns into a line and an exit code
        assert '\n' not in str(err), str(err)
        return str(err)
    return ''


@MANY
@given(flags())
def test_any_flags(argv: list[str]) -> None:
    """Everything of a run up to its first step."""

    def prepare() -> None:
        plain = [flag for flag in PLAIN if flag != '--no-aug' or '--no-aug' in argv]
        args = parse_args([*SMALL_MODEL, *plain, '--data-set', 'DIGITS', '--train-fraction', '0.2', *argv])
        if args.input_size > 64 or args.data_set in ('CIFAR', 'CIFAR10'):
            return  # too slow, and a download
        if args.resume or args.finetune:
            ckpt.load(args.resume or args.finetune)
        splits = load_splits(args, Process(), None)
        model = build_model(args, splits.num_classes)
        optimizer = build_optimizer(args, model, args.lr, torch.device('cpu'))
        scheduler = build_scheduler(args, optimizer)
        scheduler.step(1, 0.0)
        build_criterion(args, Process(), model, splits)
        assert splits.train is not None or args.eval
        loader, _, _ = open_loaders(args, splits, Process(), torch.device('cpu'))
        if loader is not None and not args.num_workers and args.batch_size <= 64:
            next(iter(loader))

    one_line_at_most(prepare)


def damage(data: bytes, draw: st.DrawFn) -> bytes:
    """Cut off, with bytes changed, put in, or taken out."""
    kind = draw(st.sampled_from(['cut', 'change', 'insert', 'remove', 'zero', 'other']))
    place = draw(st.integers(0, max(len(data) - 1, 0)))
    if kind == 'cut':
        return data[:place]
    if kind == 'change':
        return data[:place] + draw(st.binary(min_size=1, max_size=4)) + data[place + 4 :]
    if kind == 'insert':
        return data[:place] + draw(st.binary(min_size=1, max_size=16)) + data[place:]
    if kind == 'remove':
        return data[:place] + data[place + draw(st.integers(1, 64)) :]
    if kind == 'zero':
        return data[:place] + bytes(min(512, len(data) - place)) + data[place + 512 :]
    return draw(st.binary(max_size=200))


@pytest.fixture(scope='module')
def trained(tmp_path_factory: pytest.TempPathFactory) -> Path:
    out = tmp_path_factory.mktemp('trained') / 'out'
    argv = [*ONE_EPOCH, '--output_dir', str(out), '--export-safetensors', str(out / 'best.safetensors')]
    main(argv)
    return out


def refused_or_same(original: bytes, changed: bytes) -> None:
    """Equal values come to equal bytes when they are saved again."""

    def load() -> None:
        assert ckpt.to_bytes(ckpt.from_bytes(changed, 'a.pth')) == expected

    expected = ckpt.to_bytes(ckpt.from_bytes(original, 'a.pth'))
    one_line_at_most(load)


@MANY
@given(data=st.data())
def test_any_damage_to_a_checkpoint_is_found(trained: Path, data: st.DataObject) -> None:
    """It is refused, or in bytes that hold nothing: each record has a checksum."""
    original = (trained / 'checkpoint.pth').read_bytes()
    refused_or_same(original, damage(original, data.draw))


@SOME
@given(data=st.data())
def test_any_damage_to_a_safetensors_file(trained: Path, data: st.DataObject) -> None:
    """It has no checksum: what is read must at least be tensors."""
    changed = damage((trained / 'best.safetensors').read_bytes(), data.draw)
    one_line_at_most(lambda: stored_args(ckpt.from_bytes(changed, 'a.safetensors')))


@SOME
@given(data=st.data())
def test_any_damage_to_a_foreign_checkpoint(tmp_path_factory: pytest.TempPathFactory, data: st.DataObject) -> None:
    """It has the checksums of its records, too."""
    path = tmp_path_factory.getbasetemp() / 'foreign.pth'
    torch.save({'model': {'a': torch.arange(20.0)}, 'epoch': 3, 'args': {'lr': 1}}, path)
    original = path.read_bytes()
    refused_or_same(original, damage(original, data.draw))


def test_a_record_that_calls_itself_a_folder() -> None:
    """Whose memory PyTorch would hand out as it finds it."""
    file = io.BytesIO()
    torch.save({'model': {'a': torch.arange(20.0)}}, file)
    data = bytearray(file.getvalue())
    data[data.rindex(b'PK\x01\x02', 0, data.rindex(b'/data/0')) + 38] |= 0x10
    with pytest.raises(InputError, match='is damaged'):
        ckpt.from_bytes(bytes(data), 'a.pth')


@SOME
@given(data=st.data(), kind=st.sampled_from(['JPEG', 'PNG', 'GIF', 'BMP', 'WEBP', 'TIFF']))
def test_any_damage_to_an_image(tmp_path_factory: pytest.TempPathFactory, data: st.DataObject, kind: str) -> None:
    path = tmp_path_factory.getbasetemp() / f'image.{kind}'
    if not path.exists():
        Image.fromarray(np.random.default_rng(0).integers(0, 256, (9, 7, 3), dtype=np.uint8)).save(path, kind)
    try:
        assert decode(damage(path.read_bytes(), data.draw)).mode == 'RGB'
    except ValueError as err:
        assert '\n' not in str(err)


@pytest.fixture(scope='module')
def lists(tmp_path_factory: pytest.TempPathFactory) -> Path:
    from tests.conftest import make_lists

    rows = [(f'{cls}/{i}.png', number) for number, cls in enumerate(('cat', 'dog')) for i in range(3)]
    root = make_lists(tmp_path_factory.mktemp('lists'), 'sketch', {'train': rows, 'test': rows[:2]}, size=4)
    folder2lmdb.main(['--dir', str(root), '--data-set', 'FOLDER', '--out', str(root / 'lmdb'), '--num_workers', '0'])
    return root


@SOME
@given(data=st.data(), name=st.sampled_from(['sketch_train.txt', 'sketch_test.txt']))
def test_any_damage_to_a_list(lists: Path, data: st.DataObject, name: str) -> None:
    original = (lists / name).read_bytes()
    try:
        (lists / name).write_bytes(damage(original, data.draw))
        one_line_at_most(lambda: build_datasets(DataSource('FOLDER', str(lists), layout='lists')))
    finally:
        (lists / name).write_bytes(original)


@SOME
@given(data=st.data())
def test_any_damage_to_an_lmdb_file(lists: Path, tmp_path_factory: pytest.TempPathFactory, data: st.DataObject) -> None:
    """It is refused when it is opened, or the image that was hit is named when it is read."""
    folder = tmp_path_factory.mktemp('damaged')
    for split in ('train', 'val'):
        shutil.copy(lists / 'lmdb' / f'{split}.lmdb', folder)
    path = folder / 'train.lmdb'
    path.write_bytes(damage(path.read_bytes(), data.draw))

    def read() -> None:
        train = build_datasets(DataSource('FOLDER', str(folder), use_lmdb=True, verify=True)).train
        assert train is not None
        for index in range(len(train)):
            train.load(index)

    one_line_at_most(read)
    shutil.rmtree(folder)


ENTRIES = [
    'model',
    'model_ema',
    'epoch',
    'args',
    'optimizer',
    'lr_scheduler',
    'progress',
    'history',
    'left_out',
    'classes',
]
ENTRIES += ['max_accuracy', 'fingerprint', 'scaler', 'timings', 'keep_rate']
PLAIN_VALUES = st.one_of(st.none(), st.integers(), st.text(max_size=3), st.lists(st.integers(), max_size=2))
WRONG = st.one_of(PLAIN_VALUES, st.dictionaries(st.text(max_size=3), PLAIN_VALUES, max_size=2))


@FEW
@given(content=st.dictionaries(st.sampled_from(ENTRIES), WRONG, min_size=1, max_size=3))
def test_checkpoints_with_anything_in_them(trained: Path, content: dict) -> None:
    """A whole file whose entries are of the wrong kind, to go on from."""
    path = trained.parent / 'odd.pth'
    state = {**ckpt.load(str(trained / 'checkpoint.pth')), **content}
    torch.save(state, path)
    printed = io.StringIO()
    try:
        with redirect_stderr(printed):
            main([*ONE_EPOCH, '--resume', str(path)])
    except SystemExit as stop:
        assert stop.code in (1, 2) and printed.getvalue().count('\n') == 1, printed.getvalue()


def test_the_damage_reaches_what_is_tested(trained: Path) -> None:
    """Untouched files pass, so that the tests above can tell."""
    assert ckpt.from_bytes((trained / 'checkpoint.pth').read_bytes(), 'a.pth')['epoch'] == 0
    content = (trained / 'best.safetensors').read_bytes()
    loaded = ckpt.from_bytes(content, 'a.safetensors')
    assert stored_args(loaded)['epochs'] == 1 and loaded['classes'] == [str(digit) for digit in range(10)]
    assert safetensors.torch.load(content).keys() == loaded['model'].keys()
    assert json.loads(content[8 : 8 + int.from_bytes(content[:8], 'little')])['__metadata__']['format'] == 'pt'
    assert len(DATA_SETS) > 10


@pytest.mark.parametrize(
    ('key', 'value'),
    [
        ('pretrained', True),
        ('pretrained_cfg', {'url': 'http://127.0.0.1:9/a.zip'}),
        ('pretrained_cfg_overlay', {'url': 'http://127.0.0.1:9/a.zip'}),
        ('cache_dir', '/tmp'),
        ('checkpoint_path', '/tmp/a.pth'),
        ('model_cls', 'x'),
        ('features_only', True),
        ('embed_dim', {'a': 1}),
    ],
)
def test_a_checkpoint_does_not_say_what_is_loaded_from_where(
    key: str, value: Any, trained: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """Neither do typed arguments: timm's loader takes nothing but the constructor's own."""
    state = ckpt.load(str(trained / 'checkpoint.pth'))
    state['args'] = {**state['args'], 'model_kwargs': [*state['args']['model_kwargs'], (key, value)]}
    path = str(tmp_path / 'a.pth')
    torch.save(state, path)
    typed = ['--model-kwargs', f'{key}={value!r}', '--only_test_speed', '--device', 'cpu']
    for argv in (['--eval', '--resume', path, '--device', 'cpu'], typed):
        with pytest.raises(SystemExit) as caught:
            main(argv)
        error = capsys.readouterr().err
        assert caught.value.code in (1, 2) and error.count('\n') == 1 and key in error and 'refused' in error, error
    with pytest.raises(InputError, match=f'{key} is refused'):
        load_trained(path)
