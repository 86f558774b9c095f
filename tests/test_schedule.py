"""What goes by optimizer steps: the schedule and the average's decay; what is the best; losses of unequal classes."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from timm.scheduler import CosineLRScheduler
from timm.utils import ModelEmaV3
from torch import Tensor, nn

from losses import balanced_class_weights, create_criterion
from main import main
from tests.conftest import PLAIN, SMALL_MODEL
from training import checkpoint as ckpt
from training.ema import MovingAverage
from training.output import OutputFolder
from training.state import read_progress
from utils import InputError

DIGITS = [*SMALL_MODEL, *PLAIN, '--data-set', 'DIGITS', '--batch-size', '128', '--lr', '0.05']


def lines(path: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in path.read_text().splitlines()]


def same(one: dict[str, Tensor], other: dict[str, Tensor]) -> bool:
    return all(torch.equal(value, other[name]) for name, value in one.items())


# The schedule


def test_schedule_by_optimizer_steps(tmp_path: Path) -> None:
    """timm's rates: an epoch of 11 batches is four steps of three, of which the last has two; the last one's is logged.

    No epoch trails, although that is the default of schedules by epochs.
    """
    flags = ['--epochs', '2', '--warmup-epochs', '1', '--cooldown-epochs', '1', '--accum-steps', '3']
    main([*DIGITS, *flags, '--sched-on-updates', '--output_dir', str(tmp_path)])
    optimizer = torch.optim.SGD([torch.zeros(1, requires_grad=True)], lr=0.05 * 128 * 3 / 512)
    schedule = CosineLRScheduler(
        optimizer, t_initial=8, lr_min=1e-5, warmup_t=4, warmup_lr_init=1e-6, t_in_epochs=False
    )
    expected = [schedule._get_lr(step)[0] for step in (3, 7, 11)]
    assert [line['train_lr'] for line in lines(tmp_path / 'log.txt')] == expected


def test_an_epoch_goes_on_in_other_batches_at_the_schedules_rate(tmp_path: Path) -> None:
    """From 8 of 11 batches of 128: by then 32 of 44 batches of 32 would be done."""
    argv = [*DIGITS, '--epochs', '2', '--sched-on-updates', '--checkpoint-every', '8', '--output_dir', str(tmp_path)]
    main(argv)
    middle = tmp_path / 'previous_checkpoint.pth'
    assert ckpt.load(str(middle))['progress']['batch'] == 8
    again = main([*argv, '--batch-size', '32', '--force-resume', '--resume', str(middle)])
    optimizer = torch.optim.SGD([torch.zeros(1, requires_grad=True)], lr=0.05 * 32 / 512)
    schedule = CosineLRScheduler(optimizer, t_initial=88, lr_min=1e-5, t_in_epochs=False)
    assert again['train_lr'] == schedule._get_lr(87)[0]


EVERYTHING = [
    *('--epochs', '3', '--warmup-epochs', '1', '--accum-steps', '2', '--sched-on-updates', '--model-ema'),
    *('--model-ema-warmup', '--mixup', '0.8', '--sampler', 'balanced', '--class-weights', 'balanced'),
    *('--val-fraction', '0.2', '--train-fraction', '0.9', '--repeated-aug', '--checkpoint-every', '5'),
]  # fmt: skip


def test_an_epoch_goes_on_to_the_bit(tmp_path: Path) -> None:
    """From a checkpoint in the middle of the last epoch, with everything that this file tests, and a split."""
    argv = [*DIGITS, '--batch-size', '64', *EVERYTHING, '--output_dir']
    main([*argv, str(tmp_path / 'whole')])
    shutil.copytree(tmp_path / 'whole', tmp_path / 'cut')
    for name in ('test.json', 'best_checkpoint.pth'):
        (tmp_path / 'cut' / name).unlink()
    middle = tmp_path / 'cut' / 'previous_checkpoint.pth'
    state = ckpt.load(str(middle))
    assert state['epoch'] == 1 and 0 < state['progress']['batch'] < 16
    state['max_accuracy'] = -1.0  # so that the last epoch is the best again, whatever it comes to
    torch.save(state, middle)
    main([*argv, str(tmp_path / 'cut'), '--resume', str(middle)])
    whole, cut = (ckpt.load(str(tmp_path / name / 'checkpoint.pth')) for name in ('whole', 'cut'))
    assert same(whole['model'], cut['model']) and same(whole['model_ema'], cut['model_ema'])
    ignored = ('max_accuracy', 'best_is_ema')
    last, again = (
        {name: value for name, value in state['history'][-1].items() if name not in ignored} for state in (whole, cut)
    )
    assert last == again and whole['lr_scheduler'] == cut['lr_scheduler']
    assert json.loads((tmp_path / 'cut' / 'test.json').read_text())['epoch'] == 2


PLATEAU = [
    *('--sched', 'plateau', '--patience-epochs', '0', '--decay-rate', '0.5', '--warmup-epochs', '0'),
    *('--lr', '1e-6', '--min-lr', '0', '--epochs', '4', '--checkpoint-every', '8'),
]  # fmt: skip


@pytest.mark.parametrize('noise', [[], ['--lr-noise', '0.5']])
def test_plateau_goes_on_to_the_bit(noise: list[str], tmp_path: Path) -> None:
    """Its counters, which timm does not keep, are the checkpoint's; what the flags say is theirs."""
    argv = [*DIGITS, *PLATEAU, *noise, '--output_dir']
    main([*argv, str(tmp_path / 'whole')])
    for name, more in (('cut', []), ('forced', ['--lr', '2e-6', '--force-resume'])):
        shutil.copytree(tmp_path / 'whole', tmp_path / name)
        middle = tmp_path / name / 'previous_checkpoint.pth'
        assert ckpt.load(str(middle))['epoch'] == 2
        main([*argv, str(tmp_path / name), '--resume', str(middle), *more])
    whole, cut, forced = (ckpt.load(str(tmp_path / name / 'checkpoint.pth')) for name in ('whole', 'cut', 'forced'))
    assert whole['history'] == cut['history'] and whole['lr_scheduler'] == cut['lr_scheduler']
    rates = [line['train_lr'] for line in whole['history']]
    assert len(set(rates)) > 1, rates
    assert forced['history'][-1]['train_lr'] == pytest.approx(2 * rates[-1])


@pytest.mark.parametrize(
    'place', [['--start_epoch', '1'], ['--start_epoch', '3', '--warmup-epochs', '1', '--lr-delay-epochs', '0']]
)
def test_plateau_starts_later_at_its_rate(place: list[str], tmp_path: Path) -> None:
    argv = [*DIGITS, *PLATEAU, '--lr', '0.05', '--patience-epochs', '9', '--output_dir', str(tmp_path)]
    assert main([*argv, *place])['train_lr'] == pytest.approx(0.05 * 128 / 512)


def test_plateau_goes_on_with_another_batch(tmp_path: Path) -> None:
    """From inside the first epoch, which timm's plateau takes for warm-up."""
    argv = [*DIGITS, *PLATEAU, '--epochs', '1', '--checkpoint-every', '8', '--output_dir', str(tmp_path)]
    main(argv)
    middle = tmp_path / 'previous_checkpoint.pth'
    assert ckpt.load(str(middle))['progress']['batch'] == 8
    again = main([*argv, '--accum-steps', '2', '--force-resume', '--resume', str(middle)])
    assert again['train_lr'] == pytest.approx(1e-6 * 128 * 2 / 512)


def test_a_warm_up_without_end_is_noted(capsys: pytest.CaptureFixture[str]) -> None:
    for warmup in ('0', '1'):
        main([*DIGITS, '--epochs', '1', '--warmup-epochs', warmup])
        note = '--epochs 1 is not above --warmup-epochs 1: the schedule never reaches its rate'
        assert (note in capsys.readouterr().out) == (warmup == '1')


@pytest.mark.parametrize(
    ('argv', 'message'),
    [
        (['--sched-on-updates', '--sched', 'plateau'], 'plateau looks at the loss after each epoch'),
        (['--model-ema-warmup'], '--model-ema-warmup needs the average'),
        (['--sampler', 'other'], "invalid choice: 'other'"),
    ],
)
def test_wrong_flags(argv: list[str], message: str, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as caught:
        main([*DIGITS, *argv])
    error = capsys.readouterr().err
    assert caught.value.code == 2 and message in error and error.count('\n') == 1


# The average


@pytest.mark.parametrize('foreach', [True, False])
def test_warm_up_of_the_average_is_timms(foreach: bool) -> None:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(3, 4), nn.BatchNorm1d(4))
    one, other = ModelEmaV3(model, decay=0.8, use_warmup=True), MovingAverage(model, decay=0.8, use_warmup=True)
    other.foreach = foreach
    for step in range(1, 30):
        with torch.no_grad():
            for parameter in model.parameters():
                parameter.add_(torch.randn_like(parameter))
        one.update(model, step=step)
        other.update(model)
    assert same(one.module.state_dict(), other.module.state_dict())
    assert [round(other.get_decay(step), 3) for step in (1, 2, 5, 1000)] == [0, 0.37, 0.658, 0.8]


def test_the_average_can_be_the_best(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """It is what best_checkpoint.pth evaluates to; a run goes on from that file with the model's own weights."""
    flags = ['--epochs', '2', '--lr', '0.4', '--model-ema', '--model-ema-decay', '0.8']
    main([*DIGITS, *flags, '--output_dir', str(tmp_path / 'plain')])
    out, export = tmp_path / 'out', tmp_path / 'best.safetensors'
    main([*DIGITS, *flags, '--model-ema-warmup', '--export-safetensors', str(export), '--output_dir', str(out)])
    plain, logged = lines(tmp_path / 'plain' / 'log.txt'), lines(out / 'log.txt')
    assert all('best_is_ema' not in line and line['test_acc1'] <= line['max_accuracy'] for line in plain)
    assert [line['test_acc1'] for line in plain] == [line['test_acc1'] for line in logged]
    assert logged[-1]['ema_test_acc1'] > max(line['test_acc1'] for line in logged), 'no case of a better average'
    assert logged[-1]['best_is_ema'] == 1 and logged[-1]['max_accuracy'] == logged[-1]['ema_test_acc1']
    best, last = ckpt.load(str(out)), ckpt.load(str(out / 'checkpoint.pth'))
    assert best['best_of'] == last['best_of'] == 'model_ema' and best['max_accuracy'] == logged[-1]['max_accuracy']
    assert same(best['model'], last['model_ema']) and same(best['trained_model'], last['model'])
    assert same(ckpt.load(str(export))['model'], last['model_ema'])
    stats = main(['--eval', '--resume', str(out), '--device', 'cpu', '--amp', 'off', '--num_workers', '0'])
    assert stats['test_acc1'] == logged[-1]['max_accuracy']
    more = [*flags, '--model-ema-warmup', '--epochs', '3', '--force-resume', '--resume']
    ends = [
        main([*DIGITS, *more, str(out / name), '--output_dir', str(tmp_path / name)])
        for name in ('best_checkpoint.pth', 'checkpoint.pth')
    ]
    assert ends[0] == ends[1]


@pytest.mark.parametrize('choice', [['model'], 'teacher', None])
def test_an_impossible_choice_is_refused(choice: Any) -> None:
    assert read_progress({'epoch': 0}, 'a.pth').best_of == 'model'
    with pytest.raises(InputError, match='its best_of is impossible'):
        read_progress({'epoch': 0, 'best_of': choice}, 'a.pth')


def test_only_the_best_file_is_turned(tmp_path: Path) -> None:
    output = OutputFolder(str(tmp_path))
    weights = {'model': {'w': torch.zeros(2)}, 'model_ema': {'w': torch.ones(2)}, 'progress': {}, 'epoch': 0}
    output.save({**weights, 'best_of': 'model_ema'}, best=True)
    output.close()
    found = {
        name: ckpt.load(str(tmp_path / f'{name}.pth'))['model']['w'][0] for name in ('checkpoint', 'best_checkpoint')
    }
    assert found == {'checkpoint': 0, 'best_checkpoint': 1}


# Unequal classes


def test_class_weights_are_by_inverse_frequency() -> None:
    targets = np.repeat([0, 1, 3], [60, 30, 10])
    weights = balanced_class_weights(targets, 5)
    torch.testing.assert_close(weights, torch.tensor([100 / 180, 100 / 90, 1, 100 / 30, 1]))
    assert weights[targets].mean().item() == pytest.approx(1)


@pytest.mark.parametrize('mixed', [False, True])
def test_weighted_losses(mixed: bool) -> None:
    """Each class's part of a soft target is weighed; of class indices, the weighted mean with smoothing."""
    generator = torch.Generator().manual_seed(0)
    logits, weights = torch.randn(6, 3, generator=generator), torch.tensor([0.5, 2.0, 1.0])
    hard = torch.tensor([0, 1, 2, 2, 1, 0])
    soft = torch.nn.functional.one_hot(hard, 3) * 0.9 + 0.1 / 3
    loss = create_criterion(mixed=mixed, smoothing=0.1, class_weights=weights)(logits, soft if mixed else hard)
    parts = -(weights * soft * logits.log_softmax(dim=1)).sum(dim=1)
    torch.testing.assert_close(loss, parts.mean() if mixed else parts.sum() / weights[hard].sum())


def test_weights_and_sampler_change_the_training() -> None:
    losses = {main([*DIGITS, '--epochs', '1', *flags])['train_loss'] for flags in (
        [], ['--class-weights', 'balanced'], ['--sampler', 'balanced']
    )}  # fmt: skip
    assert len(losses) == 3
