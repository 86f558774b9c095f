"""Starting from other people's checkpoints: which model they are of, what is taken, and how much of it."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from PIL import Image

from config.arguments import parse_args
from config.pretrained import load_trained
from main import main
from tests.conftest import PLAIN
from training import checkpoint as ckpt
from training.weights import stored_args
from utils import InputError

DIGITS = [*PLAIN, '--data-set', 'DIGITS', '--batch-size', '256', '--epochs', '1', '--train-fraction', '0.2']
WIDE = ['--model', 'dhvt_small_cifar_patch4', '--model-kwargs', 'embed_dim=24', 'depth=1', 'num_heads=3']


def fails(argv: list[str], capsys: pytest.CaptureFixture[str]) -> str:
    capsys.readouterr()
    with pytest.raises(SystemExit):
        main(argv)
    error = capsys.readouterr().err
    assert error.count('\n') == 1, error
    return error


@pytest.fixture(scope='module')
def trained(tmp_path_factory: pytest.TempPathFactory) -> Path:
    out = tmp_path_factory.mktemp('trained') / 'out'
    main([*DIGITS, *WIDE, '--output_dir', str(out), '--model-ema'])
    return out


def test_the_model_comes_from_the_checkpoint(trained: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    for number, source in enumerate((trained, trained / 'checkpoint.pth')):
        out = tmp_path / str(number)
        main([*DIGITS, '--finetune', str(source), '--output_dir', str(out), '--layer-decay', '0.5'])
        args = stored_args(ckpt.load(str(out)))
        assert args['model'] == WIDE[1] and dict(args['model_kwargs']) == {'embed_dim': 24, 'depth': 1, 'num_heads': 3}
        shown = capsys.readouterr().out
        tensors = len(ckpt.load(str(out))['model'])
        assert f'loaded {tensors} of {tensors} tensors (100.0% of the weights)\n' in shown
    groups = ckpt.load(str(tmp_path / '0' / 'checkpoint.pth'))['optimizer']['param_groups']
    assert {group['lr_scale'] for group in groups} == {1.0, 0.5, 0.25}  # head, block, stem
    typed = parse_args([*DIGITS, '--finetune', str(trained), '--model-kwargs', 'depth=2'])
    assert typed.model == WIDE[1] and typed.model_kwargs == [('depth', 2)]


def test_another_model_is_refused_unless_asked_for(
    trained: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    other = [*DIGITS, '--finetune', str(trained), '--model', 'dhvt_tiny_cifar_patch4', '--model-kwargs']
    other += ['embed_dim=24', 'depth=8', 'num_heads=3']
    error = fails(other, capsys)
    assert 'too little to start from, loaded' in error and 'of the weights); new: ' in error and len(error) < 900
    assert main([*other, '--allow-partial'])['epoch'] == 0
    assert '--allow-partial needs --finetune' in fails([*DIGITS, '--allow-partial'], capsys)
    torch.save(ckpt.load(str(trained))['model'], tmp_path / 'bare.pth')
    assert 'does not say which model it is of' in fails([*DIGITS, '--finetune', str(tmp_path / 'bare.pth')], capsys)
    assert main([*DIGITS, *WIDE, '--finetune', str(tmp_path / 'bare.pth')])['epoch'] == 0


def test_a_folder_of_another_run(trained: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    out = tmp_path / 'out'
    weights = tmp_path / 'weights.pth'
    shutil.copy(trained / 'checkpoint.pth', weights)
    first = [*DIGITS, '--finetune', str(weights), '--output_dir', str(out), '--auto-resume']
    main(first)
    weights.write_bytes(b'damaged')  # which the run needs no more
    main(first)
    first[first.index('--finetune') + 1] = str(trained)
    assert f'--finetune was "{weights}"' in fails(first, capsys)
    shutil.rmtree(out)
    main(first)
    again = fails([*first, '--model', 'dhvt_tiny_cifar_patch4'], capsys)
    assert 'is of a run that differs: --model was "dhvt_small_cifar_patch4", is "dhvt_tiny' in again
    assert 'OUTPUT=' in again and 'shape' not in again
    (tmp_path / 'moved').mkdir()
    torch.save(ckpt.load(str(trained)), tmp_path / 'moved' / 'a.pth')
    first[first.index('--finetune') + 1] = str(tmp_path / 'moved' / 'a.pth')
    assert f'--finetune was "{trained}"' in fails(first, capsys)
    first[first.index('--finetune') + 1] = str(trained)
    main(first)  # the same again


def changed(name: str, state: dict[str, Any]) -> dict[str, Any]:
    """A checkpoint as other programs write it."""
    weights = state['model']
    rest = {'args': state['args'], 'classes': state['classes']}
    prefixed = {
        prefix: {f'{prefix}{key}': value for key, value in weights.items()}
        for prefix in ('module.', '_orig_mod.', 'backbone.', 'encoder.')
    }
    if name in prefixed:
        return {**rest, 'model': prefixed[name]}
    if name == 'dino':
        heads = {f'module.head.mlp.{number}.weight': torch.ones(2) for number in range(9)}
        teacher = {f'module.{key}': value for key, value in prefixed['backbone.'].items()}
        return {**rest, 'student': {}, 'teacher': {**teacher, **heads}}
    return {**rest, name: weights}


NAMES = ('net', 'teacher', 'student', 'state_dict', 'state_dict_ema', 'model_ema', 'module.', '_orig_mod.', 'backbone.',
         'encoder.', 'dino')  # fmt: skip


@pytest.mark.parametrize('name', NAMES)
def test_weights_of_other_programs(
    name: str, trained: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    state = ckpt.load(str(trained))
    torch.save(changed(name, state), tmp_path / 'a.pth')
    model, _, _ = load_trained(str(tmp_path / 'a.pth'))
    assert all(torch.equal(value, state['model'][key]) for key, value in model.state_dict().items())
    silent = name in ('state_dict', 'module.', '_orig_mod.')
    assert ('the weights are those' in capsys.readouterr().out) != silent
    main([*DIGITS, '--finetune', str(tmp_path / 'a.pth'), '--output_dir', str(tmp_path / 'out')])
    assert '(100.0% of the weights)' in capsys.readouterr().out


def test_a_folder_is_a_checkpoint_everywhere(
    trained: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    from tools import export, predict

    accuracy = main(['--eval', '--resume', str(trained), '--device', 'cpu'])['test_acc1']
    assert accuracy == json.loads((trained / 'log.txt').read_text())['test_acc1']
    export.main([str(trained), '--format', 'timm', '--out', str(tmp_path / 'a')])
    assert (tmp_path / 'a' / 'model.safetensors').exists()
    Image.new('RGB', (16, 16)).save(tmp_path / 'black.png')
    predict.main([str(trained), str(tmp_path / 'black.png'), '--device', 'cpu'])
    exported = [path.read_bytes() for path in sorted((tmp_path / 'a').iterdir())]
    for source in ('a', 'a/model.safetensors'):  # of the export, which has the run's flags too
        with pytest.raises(SystemExit, match='2'):
            export.main([str(tmp_path / source), '--format', 'timm', '--out', str(tmp_path / 'a')])
        assert exported == [path.read_bytes() for path in sorted((tmp_path / 'a').iterdir())]
        assert main(['--eval', '--resume', str(tmp_path / source), '--device', 'cpu'])['test_acc1'] == accuracy
    assert '(100.0% of the weights)' in (main([*DIGITS, '--finetune', str(tmp_path / 'a')]), capsys.readouterr().out)[1]
    with pytest.raises(SystemExit):
        main(['--eval', '--resume', str(tmp_path)])
    assert 'is a folder without a best_checkpoint.pth' in capsys.readouterr().err


def test_resuming_from_a_folder_takes_its_newest(
    trained: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    out = tmp_path / 'out'
    more = [*DIGITS, *WIDE, '--model-ema', '--resume', str(trained), '--epochs', '2', '--force-resume']
    main([*more, '--output_dir', str(out)])
    assert [json.loads(line)['epoch'] for line in (out / 'log.txt').read_text().splitlines()] == [0, 1]
    state = ckpt.load(str(out), newest=True)
    assert state['epoch'] == 1
    shutil.copytree(trained, tmp_path / 'copy')
    (tmp_path / 'copy' / 'checkpoint.pth').write_bytes(b'x')
    assert ckpt.load(str(tmp_path / 'copy'), newest=True)['epoch'] == 0
    assert 'the one before it is used' in capsys.readouterr().out


def test_resuming_in_the_own_folder_and_not_in_anothers(
    trained: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    out, below = tmp_path / 'out', tmp_path / 'out' / 'below'
    shutil.copytree(trained, out)
    shutil.copytree(trained, below)
    more = [*DIGITS, *WIDE, '--model-ema', '--output_dir', str(out)]
    assert 'holds a run already' in fails([*more, '--resume', str(below)], capsys)
    main([*more, '--resume', str(out)])


def test_the_current_folder_is_no_output(
    trained: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(trained)
    argv = ['--only_test_speed', '--auto-resume', '--finetune', 'absent.pth']
    assert 'absent.pth: no such checkpoint file' in fails(argv, capsys)


def test_a_damaged_best_is_not_the_end(trained: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    shutil.copytree(trained, tmp_path / 'out')
    (tmp_path / 'out' / 'best_checkpoint.pth').write_bytes(b'x')
    load_trained(str(tmp_path / 'out'))
    shown = capsys.readouterr().out
    assert 'best_checkpoint.pth is damaged' in shown and 'checkpoint.pth is taken' in shown


def test_a_log_without_checkpoints_is_kept(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    out = tmp_path / 'out'
    out.mkdir()
    for number, name in enumerate(('old_log.txt', 'old_log.txt.1')):  # what was kept before stays
        (out / 'log.txt').write_text(f'{{"epoch": {number}}}\n')
        main([*DIGITS, *WIDE, '--output_dir', str(out), '--auto-resume'])
        assert f'is kept as {name}\n' in capsys.readouterr().out
        for checkpoint in out.glob('*.pth'):
            checkpoint.unlink()
    assert [(out / name).read_text() for name in ('old_log.txt', 'old_log.txt.1')] == [
        '{"epoch": 0}\n',
        '{"epoch": 1}\n',
    ]


def test_arguments_as_other_programs_write_them() -> None:
    args = stored_args({'args': {'input_size': [3, 32, 32], 'amp': True, 'drop_loc': '(3, 6, 9)', 'lr': 1}})
    assert args == {'input_size': 32, 'drop_loc': [[3, 6, 9]], 'lr': 1}


@pytest.mark.parametrize(
    ('change', 'message'),
    [
        ({'input_size': 100_000}, 'says that its images have 100000 pixels'),
        ({'model_kwargs': [('depth', 10**7)]}, 'depth is refused, 10000000 is too large'),
        ({'model_kwargs': [('in_chans', 1)]}, 'in_chans is refused|images of 3 channels, not of 1'),
        ({'classes': [str(number) for number in range(20)]}, 'names 20 classes, and its head has 10 rows'),
    ],
)
def test_what_a_checkpoint_says_has_limits(change: dict[str, Any], message: str, trained: Path, tmp_path: Path) -> None:
    state = ckpt.load(str(trained))
    state['args'] = {**state['args'], **{name: value for name, value in change.items() if name != 'classes'}}
    torch.save({**state, 'classes': change.get('classes', state['classes'])}, tmp_path / 'a.pth')
    with pytest.raises(InputError, match=message):
        load_trained(str(tmp_path / 'a.pth'))


def test_one_class_is_refused(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    for split in ('train', 'val'):
        for name in ('cat', 'dog'):
            (tmp_path / split / 'images' / name).mkdir(parents=True)
            Image.new('RGB', (16, 16)).save(tmp_path / split / 'images' / name / '0.png')
    argv = [*PLAIN, *WIDE, '--data-set', 'FOLDER', '--data-path', str(tmp_path), '--batch-size', '2']
    assert 'are of one class, images: nothing is to be told apart' in fails(argv, capsys)
