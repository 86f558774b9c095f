"""Runs that go on: what they compare, what they keep, how files are written. test_faults.py kills them."""

from __future__ import annotations

import json
import os
import signal
import stat
import threading
import time
from functools import partial
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import nn

from config.arguments import parse_args
from engine import TrainSettings, train_one_epoch
from main import main
from tests.conftest import PLAIN, SMALL_MODEL
from tests.processes import run
from training import checkpoint as ckpt
from training import signals as interrupts
from training.output import BackgroundWriter, OutputFolder
from training.run import Run
from training.state import TrainingProgress, compare
from training.weights import stored_args
from utils import EpochSums, InputError, NonFiniteError, seed_all

DIGITS = [*SMALL_MODEL, *PLAIN, '--data-set', 'DIGITS', '--batch-size', '256']


def fails(argv: list[str], capsys: pytest.CaptureFixture[str]) -> tuple[int, str]:
    capsys.readouterr()
    with pytest.raises(SystemExit) as caught:
        main(argv)
    error = capsys.readouterr().err
    assert error.count('\n') == 1 and 'Traceback' not in error
    assert isinstance(caught.value.code, int)
    return caught.value.code, error


def lines(path: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in path.read_text().splitlines()]


# What is compared


@pytest.fixture(scope='module')
def finished(tmp_path_factory: pytest.TempPathFactory) -> Path:
    out = tmp_path_factory.mktemp('finished') / 'out'
    main([*DIGITS, '--epochs', '1', '--output_dir', str(out)])
    return out


@pytest.mark.parametrize(
    ('changed', 'message'),
    [
        (['--lr', '0.1'], '--lr was 0.0005, is 0.1'),
        (['--seed', '1'], '--seed was 0, is 1'),
        (['--mixup', '0.5'], '--mixup was 0.0, is 0.5'),
        (['--batch-size', '128'], '--batch_size was 256, is 128'),
        (['--accum-steps', '2'], '--accum_steps was 1, is 2'),
        (['--amp', 'bf16'], 'the precision was float32, is bfloat16'),
        (['--train-fraction', '0.5'], 'the data set was'),
        (['--no-train-mode'], '--train-mode was True, is False'),
        (['--model-kwargs', 'embed_dim=32', 'depth=1', 'num_heads=2'], 'other shape|unexpected|missing|model_kwargs'),
    ],
)
def test_differences_are_named(
    finished: Path, changed: list[str], message: str, capsys: pytest.CaptureFixture[str]
) -> None:
    code, error = fails([*DIGITS, '--epochs', '1', '--output_dir', str(finished), '--auto-resume', *changed], capsys)
    assert code == 1 and any(part in error for part in message.split('|')), error


@pytest.mark.parametrize(
    'changed',
    [
        ['--num_workers', '1'],
        ['--batch-size', '128', '--accum-steps', '2'],
        ['--data-path', '/elsewhere'],
        ['--checkpoint-every', '5m', '--dist-eval', '--timeout', '60'],
    ],
)
def test_what_may_differ(finished: Path, changed: list[str], capsys: pytest.CaptureFixture[str]) -> None:
    main([*DIGITS, '--epochs', '1', '--output_dir', str(finished), '--auto-resume', *changed])
    assert 'Nothing is left to train' in capsys.readouterr().out


def test_threads_and_processes_are_noted(finished: Path) -> None:
    state = ckpt.load(str(finished / 'checkpoint.pth'))
    args, fingerprint = stored_args(state), state['fingerprint']
    assert compare(state, args, fingerprint) == ([], [], False)
    assert fingerprint['threads'] == 1 and fingerprint['processes'] == 1
    differences, notes, other_rate = compare(state, args, {**fingerprint, 'threads': 2, 'processes': 2})
    assert not differences and not other_rate and len(notes) == 2
    assert notes[0] == 'the number of processes was 1, is 2: results agree to rounding, not to the bit'
    differences, notes, other_rate = compare(state, args, {**fingerprint, 'processes': 2, 'total_batch': 512})
    assert not differences and other_rate and 'the total batch was 256, is 512' in notes[0]


def test_auto_resume_starts_where_there_is_nothing(tmp_path: Path) -> None:
    line = main([*DIGITS, '--epochs', '1', '--output_dir', str(tmp_path / 'out'), '--auto-resume'])
    assert line['epoch'] == 0


def test_forced_arguments_count(finished: Path, tmp_path: Path) -> None:
    """From then on: the schedule, the decay; the optimizer's averages stay."""
    path = str(finished / 'checkpoint.pth')
    out = tmp_path / 'out'
    changed = ['--epochs', '3', '--lr', '0.02', '--weight-decay', '0.2', '--lr-delay-epochs', '0']
    main([*DIGITS, *changed, '--resume', path, '--force-resume', '--output_dir', str(out)])
    main([*DIGITS, *changed, '--output_dir', str(tmp_path / 'whole')])
    for got, expected in zip(lines(out / 'log.txt')[1:], lines(tmp_path / 'whole' / 'log.txt')[1:], strict=True):
        assert got['train_lr'] == expected['train_lr']
    state = ckpt.load(str(out / 'checkpoint.pth'))
    assert {group['weight_decay'] for group in state['optimizer']['param_groups']} == {0.0, 0.2}
    assert {float(entry['step']) for entry in state['optimizer']['state'].values()} == {15.0}


def test_a_checkpoint_is_checked_before_anything_changes(finished: Path) -> None:
    from training.state import TrainState, load_state

    model = nn.Linear(2, 2)
    optimizer = torch.optim.AdamW(model.parameters())
    parts = TrainState(
        model, None, optimizer, torch.optim.lr_scheduler.ConstantLR(optimizer), torch.amp.GradScaler('cpu')
    )
    before = [p.clone() for p in model.parameters()]
    good = {**parts.state(), 'epoch': 3, 'model': {'weight': torch.ones(2, 2), 'bias': torch.ones(2)}}
    entry = {'step': torch.tensor(1.0), 'exp_avg': torch.ones(2, 3), 'exp_avg_sq': torch.ones(2, 2)}
    odd = {'state': {0: entry}, 'param_groups': good['optimizer']['param_groups']}
    for change, message in (
        ({'optimizer': odd}, r'exp_avg of parameter 0 has shape \(2, 3\), where \(2, 2\) is needed'),
        ({'optimizer': {'state': {}, 'param_groups': []}}, 'other parameters in its optimizer'),
        ({'model': {'weight': torch.ones(2, 2).long(), 'bias': torch.ones(2)}}, 'weight int64 for float32'),
        ({'epoch': -3}, 'impossible'),
        ({'max_accuracy': 'x'}, 'x'),
    ):
        with pytest.raises(InputError, match=message):
            load_state(parts, {**good, **change}, 'a.pth')
        assert all(torch.equal(p, q) for p, q in zip(model.parameters(), before, strict=True))
    assert load_state(parts, good, 'a.pth') == TrainingProgress(epoch=4) and model.bias[0] == 1


# Files


def test_the_last_two_checkpoints_are_kept(tmp_path: Path) -> None:
    out = tmp_path / 'out'
    main([*DIGITS, '--epochs', '3', '--output_dir', str(out), '--checkpoint-every', '2'])
    last, before = (ckpt.load(str(out / name)) for name in ('checkpoint.pth', 'previous_checkpoint.pth'))
    assert last['epoch'] == 2 and last['progress'] is None
    batch = before['progress']['batch']  # 5 where the one after step 2 was still being written at step 4
    assert before['epoch'] == 1 and batch in (4, 5) and before['progress']['done'] == 256 * batch
    assert [line['epoch'] for line in lines(out / 'timing.txt')] == [0, 1, 2]
    timing = lines(out / 'timing.txt')[0]
    assert {'train_seconds', 'step_seconds', 'test_seconds'} <= set(timing) and timing['train_images'] == 1280
    assert 0 < timing['data_seconds'] < timing['train_seconds']
    assert all(line['train_grad_norm'] > 0 for line in lines(out / 'log.txt'))
    assert sorted(path.name for path in out.iterdir()) == [
        *('.lock', 'args.yaml', 'best_checkpoint.pth', 'checkpoint.pth', 'log.txt', 'previous_checkpoint.pth'),
        *('runs', 'timing.txt'),
    ]  # fmt: skip


def test_files_of_torch_and_zip(finished: Path) -> None:
    """They are read by torch.load, mapped or not, and by programs that read zip archives."""
    import zipfile

    path = finished / 'checkpoint.pth'
    for mmap in (True, False):
        assert torch.load(path, weights_only=True, mmap=mmap)['epoch'] == 0
    with zipfile.ZipFile(path) as archive:
        assert archive.testzip() is None


def test_an_unwritable_file_is_tried_again(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    writer = BackgroundWriter({})
    target = tmp_path / 'later' / 'a.pth'
    writer.put(lambda: {target: b'1', tmp_path / 'b': b'2'})
    writer.wait()
    assert 'could not be written: No such file or directory' in capsys.readouterr().out
    assert (tmp_path / 'b').read_bytes() == b'2'
    with pytest.raises(InputError, match=r'a\.pth could not be written'):
        writer.close()
    target.parent.mkdir()
    writer.put(lambda: {})
    writer.close()
    assert target.read_bytes() == b'1'


def test_saving_does_not_wait_for_the_disk(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The tensors of the moment are written, although they change meanwhile."""
    free = threading.Event()
    write = ckpt.write_bytes
    monkeypatch.setattr(ckpt, 'write_bytes', lambda *args, **kwargs: (free.wait(10), write(*args, **kwargs)))
    output = OutputFolder(str(tmp_path / 'out'))
    weight = torch.zeros(3)
    output.save({'model': {'weight': weight}, 'progress': {}, 'epoch': 0})
    assert output.busy
    weight += 1
    free.set()
    output.close()
    assert ckpt.load(str(tmp_path / 'out' / 'checkpoint.pth'))['model']['weight'].tolist() == [0, 0, 0]


def test_weights_that_are_no_numbers_are_not_saved(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    output = OutputFolder(str(tmp_path / 'out'))
    for value in (1.0, float('nan')):
        output.save({'model': {'weight': torch.full((2,), value)}, 'progress': {}, 'epoch': 0})
        output.wait()
    assert 'its weights are not all numbers' in capsys.readouterr().out
    assert ckpt.load(str(tmp_path / 'out' / 'checkpoint.pth'))['model']['weight'][0] == 1
    with pytest.raises(InputError):
        output.close()


def test_two_runs_do_not_share_a_folder(finished: Path, tmp_path: Path) -> None:
    output = OutputFolder(str(tmp_path))
    (done,) = run(partial(OutputFolder, str(tmp_path)))
    assert f'another process writes to {tmp_path}' in done.stderr
    output.close()
    assert run(partial(OutputFolder, str(tmp_path)))[0].returncode == 0


def test_safetensors(finished: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Written by training and by --eval, read by --eval and --finetune, with the classes and arguments."""
    source, export = str(finished / 'checkpoint.pth'), tmp_path / 'model.safetensors'
    logged = lines(finished / 'log.txt')[0]
    main(['--eval', '--resume', source, '--device', 'cpu', '--export-safetensors', str(export)])
    stats = main(['--eval', '--resume', str(export), '--device', 'cpu', '--amp', 'off'])
    assert stats['test_acc1'] == logged['test_acc1'] and stats['test_loss'] == logged['test_loss']
    main(
        [
            *DIGITS,
            '--epochs',
            '1',
            '--finetune',
            str(export),
            '--export-safetensors',
            str(tmp_path / 'best.safetensors'),
        ]
    )
    tuned = ckpt.load(str(tmp_path / 'best.safetensors'))
    assert tuned['epoch'] == 0 and stored_args(tuned)['finetune'] == str(export)
    assert not torch.equal(tuned['model']['head.weight'], ckpt.load(source)['model']['head.weight'])
    code, error = fails([*DIGITS, '--resume', str(export)], capsys)
    assert code == 1 and 'it cannot be resumed' in error


# Signals


def test_requeue_asks_slurm(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    called = tmp_path / 'called'
    scontrol = tmp_path / 'scontrol'
    scontrol.write_text(f'#!/bin/sh\necho "$@" >> {called}\n')
    scontrol.chmod(scontrol.stat().st_mode | stat.S_IXUSR)
    monkeypatch.setenv('PATH', f'{tmp_path}:{os.environ["PATH"]}')
    monkeypatch.delenv('SLURM_JOB_ID', raising=False)
    interrupts.requeue()
    assert not called.exists()
    monkeypatch.setenv('SLURM_JOB_ID', '17')
    interrupts.requeue()
    monkeypatch.setenv('SLURM_ARRAY_JOB_ID', '16')
    monkeypatch.setenv('SLURM_ARRAY_TASK_ID', '3')
    interrupts.requeue()
    assert called.read_text().splitlines() == ['requeue 17', 'requeue 16_3']
    scontrol.write_text('#!/bin/sh\necho "not allowed" >&2; exit 1\n')
    interrupts.requeue()
    assert 'scontrol requeue 16_3: not allowed' in capsys.readouterr().out


@pytest.mark.parametrize(('number', 'asked'), [(signal.SIGTERM, 0), (signal.SIGUSR1, 1)])
def test_a_signal_in_evaluation(number: int, asked: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """It is not waited for: the run goes on with that evaluation. SIGUSR1 has SLURM start the job again."""
    from training import run as training

    out = [*DIGITS, '--epochs', '2', '--output_dir', str(tmp_path / 'out'), '--auto-resume']
    main([*DIGITS, '--epochs', '2', '--output_dir', str(tmp_path / 'whole')])
    original = training.Run._evaluate

    def interrupted(self: training.Run, *args: Any) -> Any:
        os.kill(os.getpid(), number)
        return original(self, *args)

    calls: list[int] = []
    monkeypatch.setattr(training, 'requeue', lambda: calls.append(number))
    monkeypatch.setattr(training.Run, '_evaluate', interrupted)
    with pytest.raises(SystemExit) as caught:
        main(out)
    assert caught.value.code == 128 + number and len(calls) == asked
    state = ckpt.load(str(tmp_path / 'out' / 'checkpoint.pth'))
    assert state['epoch'] == -1 and state['progress']['done'] == 1437 // 256 * 256
    monkeypatch.setattr(training.Run, '_evaluate', original)
    main(out)
    logs = [(tmp_path / name / 'log.txt').read_bytes() for name in ('out', 'whole')]
    assert logs[0] == logs[1]


# Numbers


def test_seeds_mix_all_their_numbers() -> None:
    draws = set()
    for numbers in ((0, 0, 0), (0, 0, 1), (0, 1, 0), (1, 0, 0), (0, 0, 2**40)):
        seed_all(*numbers)
        import random

        import numpy as np

        draws.add((random.random(), float(np.random.rand()), float(torch.rand(()))))
    assert len(draws) == 5 and len({value for draw in draws for value in draw}) == 15


def train(model: nn.Module, batches: list, scaler: torch.amp.GradScaler, **kwargs: Any) -> dict[str, float]:
    own = {name: kwargs.pop(name) for name in ('sums', 'first') if name in kwargs}
    settings = TrainSettings(criterion=nn.CrossEntropyLoss(), device=torch.device('cpu'), **kwargs)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    return train_one_epoch(model, batches, optimizer, scaler, settings, epoch=0, **own)  # type: ignore[arg-type]


def batches(bad: tuple[int, ...] = (), n: int = 8) -> list:
    generator = torch.Generator().manual_seed(0)
    found = [(torch.randn(4, 3, generator=generator), torch.randint(0, 2, (4,), generator=generator)) for _ in range(n)]
    for number in bad:
        found[number][0][1, 2] = float('inf')
    return found


def test_skips_of_the_scaler_are_counted() -> None:
    torch.manual_seed(0)
    model = nn.Linear(3, 2)
    sums = EpochSums()
    stats = train(model, batches((2, 3, 6)), torch.amp.GradScaler('cpu'), sums=sums, max_skipped_steps=2)
    assert stats['skipped_steps'] == 3 and sums.losses == 5 and sums.skipped_in_a_row == 0
    assert all(bool(torch.isfinite(p).all()) for p in model.parameters())
    assert 0 < stats['loss'] < 10 and 0 < stats['grad_norm'] < 100
    with pytest.raises(NonFiniteError, match=r'in 3 steps in a row, with learning rate 0.1 and loss scale') as caught:
        train(nn.Linear(3, 2), batches((2, 3, 4)), torch.amp.GradScaler('cpu'), max_skipped_steps=2)
    assert caught.value.step['batch'] == 4


def test_a_gradient_that_is_no_number_stops_the_run() -> None:
    """Although its loss is one."""

    class Root(nn.Linear):
        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return super().forward(x) * (1 + torch.sqrt(self.weight.sum() * 0))  # its derivative is infinite at 0

    with pytest.raises(NonFiniteError, match='the norm of the gradient is nan at epoch 0, step 0 of 8') as caught:
        train(Root(3, 2), batches(), torch.amp.GradScaler('cpu', enabled=False))
    assert caught.value.step['losses'][0] < 10


def test_the_middle_of_an_epoch_goes_on(tmp_path: Path) -> None:
    """Loss and gradient norm of the whole epoch come out of its two parts to the bit."""
    torch.manual_seed(0)
    whole_model, model = nn.Linear(3, 2), nn.Linear(3, 2)
    model.load_state_dict(whole_model.state_dict())
    off = torch.amp.GradScaler('cpu', enabled=False)
    whole = train(whole_model, batches(), off, print_freq=3)
    sums = EpochSums()
    train(model, batches()[:5], off, sums=sums)
    assert train(model, batches()[5:], off, sums=sums, first=5, print_freq=2) == whole
    assert all(torch.equal(p, q) for p, q in zip(model.parameters(), whole_model.parameters(), strict=True))


def test_rewinding_has_an_end(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    out = tmp_path / 'out'
    argv = [
        *DIGITS,
        '--batch-size',
        '64',
        '--epochs',
        '2',
        '--lr',
        '1e12',
        '--on-nan',
        'rewind',
        '--output_dir',
        str(out),
    ]
    code, error = fails(argv, capsys)
    assert code == 1 and 'rewinding has not helped' in error
    assert ckpt.load(str(out / 'checkpoint.pth'))['epoch'] == -1
    dumps = [json.loads(path.read_text()) for path in out.glob('non_finite_*.json')]
    assert dumps and all(len(dump['samples'][0][0]) == 64 for dump in dumps)


@pytest.mark.parametrize(
    ('argv', 'message'),
    [
        (['--auto-resume'], '--auto-resume needs a folder'),
        (['--checkpoint-every', '5'], '--checkpoint-every needs a folder'),
        (['--on-nan', 'rewind'], '--on-nan rewind needs a folder'),
        (['--force-resume'], 'needs --resume FILE or --auto-resume'),
        (['--checkpoint-every', '5h'], 'neither steps, such as 500, nor minutes, such as 10m'),
        (['--checkpoint-every', '0'], 'neither steps'),
        (['--timeout', '0'], 'must be above 0'),
    ],
)
def test_wrong_flags(argv: list[str], message: str, capsys: pytest.CaptureFixture[str]) -> None:
    code, error = fails([*DIGITS, *argv], capsys)
    assert code == 2 and message in error


def test_intervals() -> None:
    for text, interval in (('500', ('steps', 500)), ('10m', ('minutes', 10)), ('0.5m', ('minutes', 0.5))):
        assert parse_args([*DIGITS, '--checkpoint-every', text, '--output_dir', 'x']).checkpoint_every == interval


@pytest.mark.parametrize(('ago', 'busy', 'due'), [(100, False, False), (140, False, True), (140, True, False)])
def test_a_checkpoint_after_so_many_minutes(ago: float, busy: bool, due: bool) -> None:
    settings = SimpleNamespace(checkpoint_every=('minutes', 2.0))
    output = SimpleNamespace(path=Path(), busy=busy)
    saved = time.monotonic() - ago
    run: Any = SimpleNamespace(run_settings=settings, output=output, _saved_at=saved, _steps_since_save=0)
    assert Run._save_is_due(run) == due
