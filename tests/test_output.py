"""A run's folder: nobody writes into another's, and what is left is used."""

from __future__ import annotations

import errno
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch

from main import main
from tests.conftest import PLAIN, ROOT, SMALL_MODEL
from training import checkpoint as ckpt
from training.output import BackgroundWriter, OutputFolder
from utils import InputError

RUN = [*SMALL_MODEL, *PLAIN, '--data-set', 'DIGITS', '--batch-size', '256', '--epochs', '1', '--train-fraction', '0.2']


def state(number: float) -> dict:
    return {'model': {'a': torch.full((2,), number)}, 'progress': None, 'history': [], 'timings': []}


def test_a_renamed_folder_ends_its_run(tmp_path: Path) -> None:
    path = tmp_path / 'out'
    first = OutputFolder(str(path))
    first.begin({}, lines=[], timings=[], best=-1.0)
    first.save(state(1.0))
    first.wait()
    path.rename(tmp_path / 'moved')
    first.save(state(2.0))
    with pytest.raises(InputError, match='no longer the folder that this run began in'):
        first.wait()
    second = OutputFolder(str(path))  # a new run under the old name
    second.save(state(3.0))
    second.close()
    for call in (lambda: first.save(state(4.0)), lambda: first.dump('a.json', {}), first.close):
        with pytest.raises(InputError, match='moved or replaced'):
            call()
    assert ckpt.load(str(path / 'checkpoint.pth'))['model']['a'][0] == 3
    assert ckpt.load(str(tmp_path / 'moved' / 'checkpoint.pth'))['model']['a'][0] == 1
    assert not (path / 'a.json').exists()


def test_a_folder_in_the_place_of_a_checkpoint(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    out = tmp_path / 'out'
    main([*RUN, '--output_dir', str(out)])
    (out / 'checkpoint.pth').unlink()
    (out / 'checkpoint.pth').mkdir()
    main([*RUN, '--output_dir', str(out), '--auto-resume'])
    assert 'no such checkpoint file; the one before it is used' in capsys.readouterr().out
    with (out / 'checkpoint.pth').open('wb') as file:
        file.truncate(10**12)
    main([*RUN, '--output_dir', str(out), '--auto-resume'])
    assert 'is damaged, or no checkpoint of PyTorch; the one before it is used' in capsys.readouterr().out


def test_an_export_without_the_best(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    out, file = tmp_path / 'out', tmp_path / 'best.safetensors'
    main([*RUN, '--output_dir', str(out)])
    (out / 'best_checkpoint.pth').unlink()
    main([*RUN, '--output_dir', str(out), '--auto-resume', '--export-safetensors', str(file)])
    assert 'best.safetensors is not written' in capsys.readouterr().out and not file.exists()
    main([*RUN, '--output_dir', str(tmp_path / 'b'), '--resume', str(out), '--export-safetensors', str(file)])
    assert 'best.safetensors is not written' in capsys.readouterr().out  # of no epoch of its own


def test_an_export_of_no_better_epoch(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Without a folder too, in which the best one would lie."""
    out, file = tmp_path / 'out', tmp_path / 'best.safetensors'
    main([*RUN, '--output_dir', str(out)])
    state = ckpt.load(str(out / 'checkpoint.pth'))
    torch.save({**state, 'max_accuracy': 99.0}, tmp_path / 'good.pth')
    more = ['--epochs', '2', '--force-resume', '--resume', str(tmp_path / 'good.pth')]
    main([*RUN, *more, '--export-safetensors', str(file)])
    assert 'best.safetensors is not written' in capsys.readouterr().out and not file.exists()


def test_the_best_of_other_epochs_is_set_aside(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Of those that came after the checkpoint that the run goes on from."""
    out = tmp_path / 'out'
    main([*RUN, '--epochs', '2', '--output_dir', str(out)])
    best = out / 'best_checkpoint.pth'
    torch.save({**ckpt.load(str(best)), 'max_accuracy': 99.0}, best)
    main([*RUN, '--epochs', '2', '--output_dir', str(out), '--resume', str(out / 'previous_checkpoint.pth')])
    assert 'is kept as old_best_checkpoint.pth' in capsys.readouterr().out
    assert ckpt.load(str(out / 'old_best_checkpoint.pth'))['max_accuracy'] == 99
    last = ckpt.load(str(out / 'checkpoint.pth'))
    assert ckpt.load(str(best))['max_accuracy'] == last['max_accuracy']
    main([*RUN, '--epochs', '3', '--force-resume', '--output_dir', str(out), '--auto-resume'])
    assert 'is kept as' not in capsys.readouterr().out


def test_what_waits_keeps_its_place_among_newer_files(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A checkpoint that could not be written comes after the best one that the next save makes, as ever."""
    written: list[str] = []
    full = [True]

    def write(path: Path, data: bytes, **_: Any) -> None:
        if full[0]:
            raise OSError(errno.ENOSPC, 'No space left on device')
        written.append(f'{path.name} {data.decode()}')

    monkeypatch.setattr(ckpt, 'write_bytes', write)
    writer = BackgroundWriter({})
    writer.put(lambda: {tmp_path / 'checkpoint.pth': b'1', tmp_path / 'log.txt': b'1'})
    writer.wait()
    full[0] = False
    writer.put(lambda: {tmp_path / 'best.pth': b'2', tmp_path / 'checkpoint.pth': b'2'})
    writer.close()
    assert written == ['log.txt 1', 'best.pth 2', 'checkpoint.pth 2']


THREADS = """
import os, sys, torch
from training.output import OutputFolder

torch.zeros(2**20).add_(1)  # now this thread has its OpenMP threads
before = len(os.listdir('/proc/self/task'))
weights = {'a': torch.zeros(64, 64, 64, 64).to(memory_format=torch.channels_last)}
output = OutputFolder(sys.argv[1], export=sys.argv[1] + '.safetensors')
output.save({'model': weights, 'progress': None, 'history': [], 'timings': []}, best=True)
output.wait()
print(len(os.listdir('/proc/self/task')) - before)
"""


@pytest.mark.skipif(not Path('/proc/self/task').is_dir(), reason='needs /proc')
def test_a_save_leaves_the_threads_of_the_training_alone(tmp_path: Path) -> None:
    """OpenMP threads of a second thread make those of the first sleep where they would wait in a loop."""
    done = subprocess.run(
        [sys.executable, '-c', THREADS, str(tmp_path / 'out')], cwd=ROOT, env={**os.environ, 'OMP_NUM_THREADS': '2'},
        capture_output=True, text=True, timeout=120,
    )  # fmt: skip
    assert done.stdout == '1\n', done.stdout + done.stderr  # the writer
