"""main.py, called as from the command line, on the CPU, from data to files."""

from __future__ import annotations

import argparse
import json
import re
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import timm
import torch
import yaml
from torch.nn.modules.batchnorm import _BatchNorm

from config.arguments import get_args_parser, parse_args
from main import main
from tests.conftest import PLAIN, SMALL_MODEL
from training import checkpoint as ckpt

MakeFolder = Callable[..., Path]
BASE = [*SMALL_MODEL, *PLAIN]


def load(path: Path) -> dict[str, Any]:
    return ckpt.load(str(path))


def log_lines(folder: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in (folder / 'log.txt').read_text().splitlines()]


@pytest.fixture
def folder(make_folder: MakeFolder) -> Path:
    return make_folder({'train': ['red', 'green', 'blue'], 'val': ['red', 'green', 'blue']})


@pytest.fixture
def flags(folder: Path) -> list[str]:
    return [*BASE, '--data-set', 'FOLDER', '--data-path', str(folder), '--batch-size', '8', '--lr', '0.1']


def fails(argv: list[str], capsys: pytest.CaptureFixture[str]) -> tuple[int, str]:
    with pytest.raises(SystemExit) as caught:
        main(argv)
    error = capsys.readouterr().err
    assert error.count('\n') == 1 and 'Traceback' not in error
    assert isinstance(caught.value.code, int)
    return caught.value.code, error


def test_published_flags_and_defaults() -> None:
    defaults = vars(get_args_parser().parse_args([]))
    published = {
        **{'batch_size': 64, 'epochs': 300, 'input_size': 224, 'drop': 0.0, 'drop_path': 0.1, 'model_ema': True},
        **{'model_ema_decay': 0.99996, 'model_ema_force_cpu': False, 'opt': 'adamw', 'opt_eps': 1e-8},
        **{'opt_betas': None, 'clip_grad': None, 'momentum': 0.9, 'weight_decay': 0.05, 'sched': 'cosine'},
        **{'lr': 5e-4, 'lr_noise': None, 'lr_noise_pct': 0.67, 'lr_noise_std': 1.0, 'warmup_lr': 1e-6},
        **{'min_lr': 1e-5, 'decay_epochs': 30, 'warmup_epochs': 5, 'patience_epochs': 10, 'decay_rate': 0.1},
        **{'color_jitter': 0.4, 'aa': 'rand-m9-mstd0.5-inc1', 'smoothing': 0.1, 'train_interpolation': 'bicubic'},
        **{'repeated_aug': True, 'reprob': 0.25, 'remode': 'pixel', 'recount': 1, 'resplit': False, 'mixup': 0.8},
        **{'cutmix': 1.0, 'cutmix_minmax': None, 'mixup_prob': 1.0, 'mixup_switch_prob': 0.5},
        **{'mixup_mode': 'batch', 'finetune': '', 'data_set': 'IMNET', 'output_dir': '', 'seed': 0, 'resume': ''},
        **{'start_epoch': 0, 'eval': False, 'dist_eval': False, 'pin_mem': True, 'world_size': 1},
        **{'dist_url': 'env://', 'test_speed': False, 'only_test_speed': False},
    }
    assert {name: defaults[name] for name in published} == published


def test_hyphens_and_underscores() -> None:
    parse = get_args_parser().parse_args
    for flag in ('--output-dir', '--output_dir'):
        assert parse([flag, 'x']).output_dir == 'x' and parse([f'{flag}=a_b-c']).output_dir == 'a_b-c'
    for flag in ('--no-model-ema', '--no_model_ema'):
        assert parse([flag]).model_ema is False
    assert parse(['--model_kwargs', 'depth=2', 'global_pool=avg']).model_kwargs == [
        ('depth', 2),
        ('global_pool', 'avg'),
    ]


def test_training_writes_its_files(flags: list[str], tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    out = tmp_path / 'out'
    with warnings.catch_warnings():
        warnings.simplefilter('error', DeprecationWarning)
        warnings.simplefilter('error', FutureWarning)
        line = main([*flags, '--epochs', '4', '--model-ema', '--model-ema-decay', '0.5', '--output_dir', str(out)])
    printed = capsys.readouterr().out
    assert 'Accuracy of the network on the 24 test images: ' in printed
    lines = log_lines(out)
    assert [entry['epoch'] for entry in lines] == [0, 1, 2, 3] and lines[-1] == line
    assert {'train_lr', 'train_loss', 'test_loss', 'test_acc1', 'test_acc5', 'ema_test_acc1', 'n_parameters'} <= set(
        line
    )
    assert lines[-1]['train_loss'] < lines[0]['train_loss'] and line['max_accuracy'] > 40  # chance is 33
    state = load(out / 'checkpoint.pth')
    assert set(state) >= {'model', 'model_ema', 'optimizer', 'lr_scheduler', 'scaler', 'epoch', 'max_accuracy', 'args'}
    assert type(state['args']) is dict and state['args']['epochs'] == 4 and state['epoch'] == 3
    assert any(not torch.equal(v, state['model'][k]) for k, v in state['model_ema'].items())
    best = load(out / 'best_checkpoint.pth')
    assert best['max_accuracy'] == max(entry['test_acc1'] for entry in lines)
    assert lines[best['epoch']]['test_acc1'] == best['max_accuracy']
    settings = yaml.safe_load((out / 'args.yaml').read_text())
    assert settings['derived']['lr_scaled'] == pytest.approx(0.1 * 8 / 512)
    assert settings['derived']['nb_classes'] == 3 and settings['lr'] == 0.1
    assert list((out / 'runs').glob('events*'))


def test_full_recipe_runs(folder: Path) -> None:
    """Every augmentation of the recipe at once, repeated, in bfloat16 and with accumulation, at 32 px."""
    flags = ['--data-set', 'FOLDER', '--data-path', str(folder), '--batch-size', '4', '--num_workers', '1']
    common = [*SMALL_MODEL, *flags, '--epochs', '1', '--input-size', '32', '--device', 'cpu']
    assert 0 <= main([*common, '--amp', 'bf16', '--accum-steps', '4', '--resplit'])['test_acc1'] <= 100
    assert 0 <= main([*common, '--amp', 'off', '--mixup-mode', 'elem', '--model-ema-force-cpu'])['test_acc1'] <= 100


@pytest.mark.parametrize('sched', ['cosine', 'tanh', 'step', 'poly', 'plateau'])
def test_schedules(flags: list[str], sched: str, tmp_path: Path) -> None:
    """As published, training trails timm's schedule by an epoch; --lr-delay-epochs 0 follows it."""
    extra = ['--epochs', '4', '--warmup-epochs', '2', '--warmup-lr', '1e-6', '--sched', sched]
    main([*flags, *extra, '--output_dir', str(tmp_path / 'late')])
    main([*flags, *extra, '--output_dir', str(tmp_path / 'prompt'), '--lr-delay-epochs', '0'])
    late, prompt = ([line['train_lr'] for line in log_lines(tmp_path / name)] for name in ('late', 'prompt'))
    assert late[0] == late[1] == prompt[0] == 1e-6
    assert 1e-4 < prompt[1] < 0.1 * 8 / 512
    assert late[1:] == pytest.approx(prompt[:-1])


def test_cooldown_adds_epochs_at_the_last_rate(flags: list[str], tmp_path: Path) -> None:
    main([*flags, '--epochs', '2', '--cooldown-epochs', '2', '--min-lr', '1e-4', '--output_dir', str(tmp_path / 'out')])
    rates = [line['train_lr'] for line in log_lines(tmp_path / 'out')]
    assert len(rates) == 4 and rates[-1] == 1e-4


def test_resume_goes_on_where_the_run_stopped(flags: list[str], tmp_path: Path) -> None:
    """Two epochs, then two more of a longer schedule: its rates, the best accuracy of all, all lines in its log."""
    common = [*flags, '--epochs', '4', '--model-ema', '--model-ema-decay', '0.9']
    main([*common, '--output_dir', str(tmp_path / 'whole')])
    main([*flags, '--epochs', '2', '--model-ema', '--model-ema-decay', '0.9', '--output_dir', str(tmp_path / 'half')])
    first = load(tmp_path / 'half' / 'checkpoint.pth')
    first['max_accuracy'] = 99.5
    torch.save(first, tmp_path / 'half' / 'checkpoint.pth')
    more = ['--resume', str(tmp_path / 'half' / 'checkpoint.pth'), '--force-resume']
    main([*common, '--output_dir', str(tmp_path / 'a'), *more])
    assert [line['epoch'] for line in log_lines(tmp_path / 'a')] == [0, 1, 2, 3]
    assert log_lines(tmp_path / 'a')[2]['max_accuracy'] >= 99.5
    for epoch in (2, 3):
        assert log_lines(tmp_path / 'a')[epoch]['train_lr'] == log_lines(tmp_path / 'whole')[epoch]['train_lr']


def test_resumed_epoch_is_bitwise_the_same(flags: list[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A run stopped after its second epoch, then resumed, has the weights of the run that was not."""
    from training import run as training

    common = [*flags, '--epochs', '3', '--model-ema', '--model-ema-decay', '0.9']
    main([*common, '--output_dir', str(tmp_path / 'whole')])
    original = training.train_one_epoch

    def stop_before_the_third(*args: Any, **kwargs: Any) -> dict[str, float]:
        if kwargs['epoch'] == 2:
            raise KeyboardInterrupt
        return original(*args, **kwargs)

    monkeypatch.setattr(training, 'train_one_epoch', stop_before_the_third)
    with pytest.raises(SystemExit) as caught:
        main([*common, '--output_dir', str(tmp_path / 'cut')])
    assert caught.value.code == 130
    monkeypatch.setattr(training, 'train_one_epoch', original)
    main([*common, '--output_dir', str(tmp_path / 'cut'), '--resume', str(tmp_path / 'cut' / 'checkpoint.pth')])
    whole, cut = (load(tmp_path / name / 'checkpoint.pth') for name in ('whole', 'cut'))
    for part in ('model', 'model_ema'):
        for key, value in whole[part].items():
            assert torch.equal(value, cut[part][key]), key
    assert log_lines(tmp_path / 'whole') == log_lines(tmp_path / 'cut')


def test_evaluation_repeats_the_logged_accuracy(
    flags: list[str], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    line = main([*flags, '--epochs', '2', '--output_dir', str(tmp_path / 'out')])
    capsys.readouterr()
    path = str(tmp_path / 'out' / 'checkpoint.pth')
    stats = main([*flags, '--eval', '--resume', path])
    recalled = main(['--eval', '--resume', path, '--device', 'cpu', '--num_workers', '0'])
    assert stats == recalled
    for name in ('test_acc1', 'test_acc5', 'test_loss'):
        assert stats[name] == line[name]
    printed = capsys.readouterr().out
    assert f'Accuracy of the network on the 24 test images: {line["test_acc1"]:.1f}%' in printed
    assert 'acc@5' in printed and 'loss' in printed


def test_checkpoint_of_the_published_code(flags: list[str], tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """A Namespace for args, timm 0.4's scheduler state, no best accuracy: it evaluates and resumes."""
    main([*flags, '--epochs', '2', '--model-ema', '--output_dir', str(tmp_path / 'out')])
    state = load(tmp_path / 'out' / 'checkpoint.pth')
    state['args'] = argparse.Namespace(**{k: state['args'][k] for k in ('model', 'data_set', 'input_size', 'lr')})
    old = {k: v for k, v in state['lr_scheduler'].items() if k in ('base_values', 't_initial', 'lr_min', 'warmup_t')}
    state['lr_scheduler'] = {**old, 't_mul': 1.0, 'decay_rate': 0.1, 'metric': None}
    for name in ('max_accuracy', 'scaler', 'fingerprint', 'history', 'timings', 'left_out', 'progress', 'classes'):
        del state[name]
    path = tmp_path / 'published.pth'
    torch.save(state, path)
    assert 0 <= main([*flags, '--eval', '--resume', str(path)])['test_acc1'] <= 100
    resumed = main([*flags, '--epochs', '3', '--model-ema', '--resume', str(path)])
    assert resumed['epoch'] == 2
    assert 'does not say with which data and precision it was made' in capsys.readouterr().out


def test_finetuning_with_another_head(
    flags: list[str], make_folder: MakeFolder, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    main([*flags, '--epochs', '1', '--output_dir', str(tmp_path / 'out')])
    two = make_folder({'train': ['red', 'blue'], 'val': ['red', 'blue']}, name='two')
    path = tmp_path / 'out' / 'checkpoint.pth'
    before = load(path)['model']
    capsys.readouterr()
    tune = [*flags, '--data-path', str(two), '--epochs', '1', '--finetune']
    for source, extra, frozen in ((str(path), [], True), (path.as_uri(), ['--train-mode'], False)):
        out = tmp_path / f'tuned-{frozen}'
        main([*tune, source, '--output_dir', str(out), *extra])
        assert re.search(
            r'loaded 95 of 97 tensors \(9.*% of the weights\); new: head.weight, head.bias', capsys.readouterr().out
        )
        after = load(out / 'checkpoint.pth')['model']
        assert not torch.equal(after['blocks.0.attn.qkv.weight'], before['blocks.0.attn.qkv.weight'])
        kept = torch.equal(after['blocks.0.mlp.bn1.running_mean'], before['blocks.0.mlp.bn1.running_mean'])
        assert kept == frozen


@pytest.mark.parametrize('opt', ['sgd', 'lion', 'lamb'])
def test_other_optimizers_train(flags: list[str], opt: str) -> None:
    assert main([*flags, '--opt', opt, '--epochs', '1'])['epoch'] == 0


def test_other_timm_models_train(flags: list[str]) -> None:
    argv = [flag for flag in flags if flag not in SMALL_MODEL]
    assert main([*argv, '--model', 'resnet10t', '--epochs', '1', '--input-size', '32'])['epoch'] == 0


def test_speed(capsys: pytest.CaptureFixture[str]) -> None:
    argv = [*SMALL_MODEL, '--input-size', '16', '--data-set', 'DIGITS', '--batch-size', '2', '--device', 'cpu']
    main([*argv, '--only_test_speed', '--amp', 'off'])
    printed = capsys.readouterr().out
    assert 'images/s in evaluation, batch 2, 16 px, float32' in printed and 'G multiply-adds' in printed


# Bad input: one line, no traceback, the right exit code


@pytest.mark.parametrize(
    ('argv', 'message'),
    [
        (['--nonsense'], 'unrecognized arguments: --nonsense'),
        (['--epoch', '3'], 'unrecognized arguments'),
        (['--batch-size', '0'], 'at least 1'),
        (['--lr', 'nan'], 'must be at least 0'),
        (['--lr', 'fast'], 'invalid float value'),
        (['--drop-path', '1.5'], 'at most 1'),
        (['--batch-size', '5'], 'is odd: mixup'),
        (['--cutmix-minmax', '0.8', '0.2'], 'smaller one first'),
        (['--cutmix-minmax', '0.5', '0.5'], 'a pixel apart'),
        (['--seed', '99999999999'], 'at most'),
        (['--start_epoch', '4', '--epochs', '4'], 'leaves nothing'),
        (
            ['--batch-size', '1', '--input-size', '4', '--mixup', '0', '--cutmix', '0', '--aa', 'none'],
            'BatchNorm needs',
        ),
        (['--model-kwargs', 'num_heads=0'], '0 heads'),
        (['--model-kwargs', 'global_pool='], 'a row of 10 logits is needed'),
        (['--model-kwargs', 'features_only=True'], 'features_only is refused'),
        (['--model', 'vgg11'], '--drop-path 0 leaves it out'),
        (['--lr-noise', '0.1', '0.2', '0.3'], 'two'),
        (['--lr-noise', '0.9', '0.1'], 'the smaller one first'),
        (['--eval'], '--eval needs the weights'),
        (['--eval', '--finetune', 'x', '--only_test_speed'], 'exclude each other'),
        (['--resplit', '--reprob', '0'], 'needs random erasing'),
        (['--resume', 'x', '--start_epoch', '3'], 'exclude each other'),
        (['--data-set', 'MNIST'], 'known are CIFAR'),
        (['--model', 'dhvt_huge'], 'dhvt_tiny_cifar_patch4'),
        (['--model-kwargs', 'depth'], 'key=value'),
        (['--model-kwargs', 'depht=2'], 'depht'),
        (['--model-kwargs', 'num_classes=2'], 'set by --nb-classes'),
        (['--model-kwargs', 'in_chans=1'], 'three channels'),
        (['--model-kwargs', 'patch_size=3'], 'power of two'),
        (['--input-size', '30'], 'not divisible by patch size 4'),
        (['--opt', 'nonsense'], 'nonsense'),
        (['--opt', 'sgd', '--opt-betas', '0.9', '0.9'], '--opt sgd: it takes no --opt-betas'),
        (['--aa', 'nonsense'], 'timm refuses'),
        (['--device', 'cuda:99'], 'needs GPU 99'),
        (['--world_size', '2', '--local_rank', '5'], 'outside --world_size'),
    ],
)
def test_wrong_flags(argv: list[str], message: str, capsys: pytest.CaptureFixture[str]) -> None:
    first = SMALL_MODEL if not {'--model', '--model-kwargs'} & {*argv} else SMALL_MODEL[:2]
    plain = ['--data-set', 'DIGITS', '--device', 'cpu', '--input-size', '16', '--num_workers', '0']
    code, error = fails([*first, *plain, *argv], capsys)
    assert code == 2 and message in error


def test_missing_files(flags: list[str], capsys: pytest.CaptureFixture[str]) -> None:
    for flag in ('--resume', '--finetune'):
        assert fails([*flags, flag, '/nowhere/a.pth'], capsys) == (
            *(1, 'main.py: error: /nowhere/a.pth: no such checkpoint file\n'),
        )  # fmt: skip
    code, error = fails([*flags, '--data-path', '/nowhere'], capsys)
    assert code == 1 and '/nowhere: no such folder' in error
    assert fails(['--eval', '--resume', '/nowhere/a.pth'], capsys)[0] == 1


@pytest.mark.parametrize('workers', ['0', '1'])
def test_truncated_image(flags: list[str], folder: Path, workers: str, capsys: pytest.CaptureFixture[str]) -> None:
    path = folder / 'train' / 'red' / '3.jpg'
    path.write_bytes(path.read_bytes()[:400])
    code, error = fails([*flags, '--epochs', '1', '--num_workers', workers], capsys)
    assert code == 1 and str(path) in error and 'replace or remove it' in error


def test_wrong_class_count(flags: list[str], tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    code, error = fails([*flags, '--nb-classes', '2'], capsys)
    assert code == 1 and '3 classes, more than --nb-classes 2 leaves room for' in error
    main([*flags, '--epochs', '1', '--output_dir', str(tmp_path / 'out')])
    capsys.readouterr()
    path = str(tmp_path / 'out' / 'checkpoint.pth')
    code, error = fails([*flags, '--eval', '--resume', path, '--nb-classes', '9'], capsys)
    assert code == 1 and 'head.weight (3, 32) for (9, 32)' in error


def test_foreign_checkpoints(flags: list[str], tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    path = tmp_path / 'resnet.pth'
    torch.save({'state_dict': {'conv1.weight': torch.ones(3)}}, path)
    for flag, message in (('--resume', 'does not fit the model'), ('--finetune', 'nothing in it fits the model')):
        code, error = fails([*flags, flag, str(path)], capsys)
        assert code == 1 and message in error and str(path) in error


def test_weights_alone_cannot_be_resumed(flags: list[str], tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    main([*flags, '--epochs', '1', '--output_dir', str(tmp_path / 'out')])
    torch.save({'model': load(tmp_path / 'out' / 'checkpoint.pth')['model']}, tmp_path / 'weights.pth')
    capsys.readouterr()
    code, error = fails([*flags, '--resume', str(tmp_path / 'weights.pth')], capsys)
    assert code == 1 and 'has no optimizer, lr_scheduler, epoch' in error


def test_a_run_is_not_overwritten(flags: list[str], tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    argv = [*flags, '--epochs', '1', '--output_dir', str(tmp_path / 'out')]
    main(argv)
    before = {path.name: path.read_bytes() for path in (tmp_path / 'out').iterdir() if path.is_file()}
    capsys.readouterr()
    code, error = fails(argv, capsys)
    assert code == 2 and 'holds a run already' in error
    assert before == {path.name: path.read_bytes() for path in (tmp_path / 'out').iterdir() if path.is_file()}


def test_another_run_is_not_overwritten_by_a_resumed_one(
    flags: list[str], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    for name in ('a', 'b'):
        main([*flags, '--epochs', '1', '--output_dir', str(tmp_path / name)])
    capsys.readouterr()
    resume = ['--resume', str(tmp_path / 'a' / 'checkpoint.pth'), '--epochs', '2']
    code, error = fails([*flags, *resume, '--output_dir', str(tmp_path / 'b')], capsys)
    assert code == 2 and 'holds a run already' in error
    assert main([*flags, *resume, '--output_dir', str(tmp_path / 'c'), '--force-resume'])['epoch'] == 1


def test_output_that_is_a_file(flags: list[str], tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / 'out').touch()
    code, error = fails([*flags, '--output_dir', str(tmp_path / 'out')], capsys)
    assert code == 1 and error == (
        f'main.py: error: {tmp_path / "out"} is a file, where a folder is to be: give another name\n'
    )


def test_resume_with_other_flags(flags: list[str], tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    main([*flags, '--epochs', '2', '--output_dir', str(tmp_path / 'out')])
    path = tmp_path / 'out' / 'checkpoint.pth'
    capsys.readouterr()
    code, error = fails([*flags, '--resume', str(path), '--opt', 'sgd'], capsys)
    assert code == 1 and 'is of a run with --opt adamw, not sgd' in error
    code, error = fails([*flags, '--resume', str(path), '--epochs', '3', '--lr', '0.2'], capsys)
    assert code == 1 and '--lr was 0.1, is 0.2' in error and '--epochs was 2, is 3' in error
    assert '--force-resume' in error and 'batch' not in error
    line = main([*flags, '--resume', str(path), '--epochs', '3', '--lr', '0.2', '--force-resume'])
    printed = capsys.readouterr().out
    assert 'Note: --lr was 0.1, is 0.2' in printed and 'Note: --epochs was 2, is 3' in printed
    assert line['epoch'] == 2 and 0 < line['train_lr'] < 0.2 * 8 / 512


@pytest.mark.parametrize(
    'change',
    [{'optimizer': None}, {'optimizer': {'state': 3}}, {'lr_scheduler': 3}, {'epoch': 'x'}, {'max_accuracy': None}],
)
def test_damaged_state_of_a_run(
    flags: list[str], tmp_path: Path, capsys: pytest.CaptureFixture[str], change: dict[str, Any]
) -> None:
    main([*flags, '--epochs', '1', '--output_dir', str(tmp_path / 'out')])
    torch.save({**load(tmp_path / 'out' / 'checkpoint.pth'), **change}, tmp_path / 'bad.pth')
    capsys.readouterr()
    code, error = fails([*flags, '--resume', str(tmp_path / 'bad.pth')], capsys)
    assert code == 1 and str(tmp_path / 'bad.pth') in error


def test_evaluation_finds_relative_data_from_elsewhere(
    flags: list[str], folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(folder.parent)
    main([*flags, '--data-path', folder.name, '--epochs', '1', '--output_dir', str(tmp_path / 'out')])
    (tmp_path / 'elsewhere').mkdir()
    monkeypatch.chdir(tmp_path / 'elsewhere')
    assert 'test_acc1' in main(['--eval', '--resume', str(tmp_path / 'out' / 'checkpoint.pth'), '--device', 'cpu'])


def test_plateau_without_warmup_keeps_its_rate(flags: list[str], tmp_path: Path) -> None:
    main([*flags, '--sched', 'plateau', '--epochs', '3', '--output_dir', str(tmp_path / 'out')])
    assert [line['train_lr'] for line in log_lines(tmp_path / 'out')] == pytest.approx([0.1 * 8 / 512] * 3)


def test_evaluating_takes_up_the_runs_flags(
    flags: list[str], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """From --finetune as from --resume; a file that is read is not what the weights are exported to."""
    logged = main([*flags, '--epochs', '1', '--output_dir', str(tmp_path)])['test_acc1']
    weights = str(tmp_path / 'w.safetensors')
    argv = ['--device', 'cpu', '--num_workers', '0', '--eval', '--val-fraction', '0.1', '--export-safetensors', weights]
    for flag, source in (('--resume', str(tmp_path)), ('--finetune', str(tmp_path / 'checkpoint.pth'))):
        assert main([*argv, flag, source])['test_acc1'] == logged
        assert '--folds and --train-fraction are for training' in capsys.readouterr().out
    whole = Path(weights).read_bytes()
    code, error = fails([*argv, '--finetune', weights], capsys)
    assert code == 2 and 'which is read' in error and Path(weights).read_bytes() == whole


def test_evaluating_with_a_new_head_is_refused(
    flags: list[str], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    main([*flags, '--epochs', '1', '--output_dir', str(tmp_path / 'out')])
    capsys.readouterr()
    argv = [*flags, '--eval', '--finetune', str(tmp_path / 'out' / 'checkpoint.pth'), '--nb-classes', '9']
    code, error = fails(argv, capsys)
    assert code == 1 and 'does not fit the model' in error


def test_a_run_that_ends_in_nan_keeps_its_checkpoint(
    flags: list[str], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """The last update of an epoch comes after its last training loss."""
    argv = [*flags, '--batch-size', '24', '--output_dir', str(tmp_path / 'out')]
    code, error = fails([*argv, '--epochs', '3', '--lr', '1e35'], capsys)
    assert code == 1 and 'the test loss is nan after epoch 0' in error
    assert not (tmp_path / 'out' / 'checkpoint.pth').exists() and not (tmp_path / 'out' / 'log.txt').exists()


def test_too_large_a_batch(flags: list[str], capsys: pytest.CaptureFixture[str]) -> None:
    code, error = fails([*flags, '--batch-size', '26'], capsys)
    assert code == 1 and '24 training images do not fill one batch of 26 on each of 1 process' in error


def test_diverging_run_keeps_its_checkpoint(
    flags: list[str], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    main([*flags, '--epochs', '1', '--output_dir', str(tmp_path / 'out')])
    path = tmp_path / 'out' / 'checkpoint.pth'
    before = path.read_bytes()
    resume = [*flags, '--epochs', '3', '--force-resume', '--output_dir', str(tmp_path / 'out')]
    state = load(path)
    state['model']['head.bias'][0] = float('nan')
    torch.save(state, tmp_path / 'out' / 'nan.pth')
    capsys.readouterr()
    code, error = fails([*resume, '--resume', str(tmp_path / 'out' / 'nan.pth')], capsys)
    assert code == 1 and 'the loss is nan at epoch 1, step 0 of 3, with learning rate' in error
    assert path.read_bytes() == before


def test_only_the_stem_is_synchronised() -> None:
    from config.models import convert_stem_sync_batchnorm

    model = timm.create_model('dhvt_tiny_cifar_patch4', embed_dim=32, depth=1, num_heads=2)
    keys = list(model.state_dict())
    convert_stem_sync_batchnorm(model, torch.device('cpu'))
    assert not any(isinstance(module, torch.nn.SyncBatchNorm) for module in model.modules())
    convert_stem_sync_batchnorm(model, torch.device('cuda'))
    kinds = {name: type(module) for name, module in model.named_modules() if isinstance(module, _BatchNorm)}
    assert {name for name, kind in kinds.items() if kind is torch.nn.SyncBatchNorm} == {
        'patch_embed.proj.0.1',
        'patch_embed.proj.2.1',
    }
    assert {kind for name, kind in kinds.items() if name.startswith('blocks')} == {torch.nn.BatchNorm2d}
    assert list(model.state_dict()) == keys


def test_arguments_are_not_changed(flags: list[str]) -> None:
    args = parse_args([*flags, '--epochs', '1'])
    before = dict(vars(args))
    from main import run

    run(args)
    assert vars(args) == before


def test_a_run_may_begin_with_a_later_epoch(flags: list[str], tmp_path: Path) -> None:
    main([*flags, '--epochs', '3', '--output_dir', str(tmp_path / 'whole')])
    main([*flags, '--epochs', '3', '--start_epoch', '2', '--output_dir', str(tmp_path / 'late')])
    (line,) = log_lines(tmp_path / 'late')
    assert line['epoch'] == 2 and line['train_lr'] == log_lines(tmp_path / 'whole')[2]['train_lr']
