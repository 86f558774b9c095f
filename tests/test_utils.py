"""utils.py: launchers, devices, messages, progress."""

from __future__ import annotations

import sys
from typing import Any

import pytest
import torch
from torch.utils.data import DataLoader, Dataset

from config import flags
from config.arguments import parse_args
from config.errors import explain
from config.flags import usable_workers
from training import distributed
from training.devices import find_amp_dtype, find_device
from training.distributed import Process, _slurm_rendezvous, find_process
from utils import InputError, ProgressBar, UsageError, format_seconds, one_line


@pytest.mark.parametrize(
    ('env', 'flags', 'process'),
    [
        ({}, {}, Process(0, 1, 0, 1, 'none')),
        ({}, {'world_size': 4, 'local_rank': 2}, Process(2, 4, 2, 4, 'flags')),
        (
            {'RANK': '5', 'WORLD_SIZE': '8', 'LOCAL_RANK': '1', 'LOCAL_WORLD_SIZE': '4'},
            {},
            Process(5, 8, 1, 4, 'torchrun'),
        ),
        ({'RANK': '5', 'WORLD_SIZE': '8'}, {'local_rank': 3}, Process(5, 8, 3, 1, 'torchrun')),
        ({'RANK': '0', 'WORLD_SIZE': '1', 'SLURM_STEP_NUM_TASKS': ''}, {}, Process(0, 1, 0, 1, 'torchrun')),
        ({'SLURM_PROCID': '9', 'SLURM_STEP_NUM_TASKS': '16', 'SLURM_LOCALID': '1'}, {}, Process(9, 16, 1, 1, 'slurm')),
        ({'SLURM_PROCID': '0', 'SLURM_NTASKS': '4'}, {}, Process(0, 1, 0, 1, 'none')),  # sbatch's script, not srun
        ({'SLURM_PROCID': '0', 'SLURM_NTASKS': '16', 'SLURM_STEP_NUM_TASKS': '1'}, {}, Process(0, 1, 0, 1, 'none')),
        ({'SLURM_PROCID': '0', 'SLURM_NTASKS': '1'}, {}, Process(0, 1, 0, 1, 'none')),
    ],
)
def test_launchers(env: dict[str, str], flags: dict[str, int], process: Process) -> None:
    assert find_process(env, **flags) == process


def test_impossible_launch() -> None:
    with pytest.raises(UsageError, match='outside --world_size 2'):
        find_process({}, world_size=2, local_rank=2)
    for rank, size, local, local_size in ((1, 1, 0, 1), (-1, 2, 0, 2), (0, 2, -1, 2), (0, 1, 0, 0)):
        env = {'RANK': rank, 'WORLD_SIZE': size, 'LOCAL_RANK': local, 'LOCAL_WORLD_SIZE': local_size}
        with pytest.raises(UsageError, match=f'process {rank}, .* is outside WORLD_SIZE {size}'):
            find_process({name: str(value) for name, value in env.items()})
    with pytest.raises(UsageError, match=r'process 5, .* is outside SLURM_STEP_NUM_TASKS 2'):
        find_process({'SLURM_PROCID': '5', 'SLURM_STEP_NUM_TASKS': '2'})
    with pytest.raises(UsageError, match='is no number'):
        find_process({'RANK': 'a', 'WORLD_SIZE': '2'})


def test_slurm_rendezvous(tmp_path: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    scontrol = tmp_path / 'scontrol'
    scontrol.write_text('#!/bin/sh\n[ "$3" = "n[01-02]" ] && printf "n01\\nn02\\n"\n')
    scontrol.chmod(0o755)
    monkeypatch.setenv('PATH', f'{tmp_path}:/usr/bin:/bin')
    env = {'SLURM_JOB_NODELIST': 'n[01-02]', 'SLURM_JOB_ID': '123456'}
    assert _slurm_rendezvous(env) == {'MASTER_ADDR': 'n01', 'MASTER_PORT': str(20000 + 123456 % 20000)}
    assert _slurm_rendezvous({'MASTER_ADDR': 'a', 'SLURM_JOB_ID': 'abc'}) == {'MASTER_PORT': '20000'}
    assert _slurm_rendezvous({'MASTER_ADDR': 'a', 'MASTER_PORT': '1'}) == {}
    with pytest.raises(InputError, match='set MASTER_ADDR'):
        _slurm_rendezvous({'SLURM_JOB_NODELIST': 'other'})


@pytest.mark.parametrize(
    ('process', 'expected'),
    [
        (Process(0, 4, 0, 2, 'torchrun'), ['work', 'wait', 'wait']),
        (Process(2, 4, 0, 2, 'torchrun'), ['wait', 'work', 'wait']),
        (Process(1, 4, 1, 2, 'torchrun'), ['wait', 'wait', 'work']),
    ],
)
def test_downloads_are_done_in_turn(process: Process, expected: list[str], monkeypatch: pytest.MonkeyPatch) -> None:
    """First the main process, then one on each other machine, then the rest, who find the files."""
    events: list[str] = []
    monkeypatch.setattr(distributed, 'barrier', lambda: events.append('wait'))
    with distributed.main_process_first(process):
        events.append('work')
    assert events == expected


@pytest.mark.parametrize(('processes', 'expected'), [(1, 10), (4, 10), (8, 5), (64, 1)])
def test_loader_processes(processes: int, expected: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(flags, 'num_usable_cores', lambda: 40)
    assert usable_workers(None, processes=processes) == expected and usable_workers(3, processes=processes) == 3


def test_devices() -> None:
    assert find_device('cpu', process=Process()) == torch.device('cpu')
    for name in ('tpu9', 'meta', 'xpu'):
        with pytest.raises(UsageError, match='no such kind'):
            find_device(name, process=Process())
    with pytest.raises(UsageError, match='needs GPU 99'):
        find_device('cuda:99', process=Process())
    with pytest.raises(UsageError, match='one GPU for each'):
        find_device('cuda:1', process=Process(1, 2, 1, 2, 'torchrun'))


def test_amp_types(monkeypatch: pytest.MonkeyPatch) -> None:
    cpu = torch.device('cpu')
    assert find_amp_dtype('off', cpu) is None
    assert find_amp_dtype('bf16', cpu) == torch.bfloat16 and find_amp_dtype('fp16', cpu) == torch.float16
    for features, expected in (({'avx512_bf16': True}, torch.bfloat16), ({'avx2': True}, None)):
        monkeypatch.setattr(torch.cpu, 'get_capabilities', lambda features=features: features)
        assert find_amp_dtype('auto', cpu) == expected
    for capability, expected in (((8, 0), torch.bfloat16), ((7, 5), torch.float16)):
        monkeypatch.setattr(torch.cuda, 'get_device_capability', lambda _device, capability=capability: capability)
        assert find_amp_dtype('auto', torch.device('cuda')) == expected


class Broken(Dataset):
    def __len__(self) -> int:
        return 4

    def __getitem__(self, index: int) -> int:
        raise InputError('a.jpg cannot be read: replace it')


def test_errors_of_loader_processes_become_one_line() -> None:
    with pytest.raises(InputError) as caught:
        next(iter(DataLoader(Broken(), num_workers=1)))
    assert one_line(caught.value) == 'a.jpg cannot be read: replace it'
    assert one_line(ValueError('first\nsecond')) == 'first' and one_line(ValueError()) == 'ValueError'


def run_progress() -> None:
    progress = ProgressBar(range(7), header='Epoch 2', print_freq=3)
    for _ in progress:
        if progress.due():
            progress.images = 10
            progress.show({'loss': '0.5'})


def test_progress_is_plain_lines_in_a_file(capsys: pytest.CaptureFixture[str]) -> None:
    run_progress()
    lines = capsys.readouterr().out.splitlines()
    assert [line[:14] for line in lines] == [f'Epoch 2 [{step}/7] '.ljust(14) for step in (1, 4, 7)]
    assert all('loss 0.5' in line and 'images/s' in line and '\r' not in line for line in lines)


def test_progress_is_a_bar_on_a_terminal(capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sys.stdout, 'isatty', lambda: True)
    run_progress()
    assert '\r' in capsys.readouterr().out


def test_seconds() -> None:
    assert [format_seconds(s) for s in (0.4, 61, 3599.6, 90000)] == ['0:00:00', '0:01:01', '1:00:00', '25:00:00']


@pytest.mark.parametrize(
    ('error', 'flags', 'words'),
    [
        (
            torch.OutOfMemoryError('CUDA out of memory'),
            [],
            'GPU memory: --batch-size 32 --accum-steps 2 has',
        ),
        (
            RuntimeError("DefaultCPUAllocator: can't allocate memory: you tried to allocate 9 bytes"),
            ['--batch-size', '6', '--accum-steps', '3', '--grad-checkpointing'],
            'out of memory: --batch-size 3 --accum-steps 6 has the same total batch; a lower --cache-gib',
        ),
        (
            torch.OutOfMemoryError('x'),
            ['--batch-size', '3', '--mixup', '0', '--cutmix', '0'],
            'lower --batch-size;',
        ),
        (RuntimeError('DataLoader worker (pid 7) is killed by signal: Killed.'), [], 'Fewer --num_workers need less'),
        (RuntimeError('size mismatch'), [], ''),
    ],
)
def test_memory_errors_name_the_next_smaller_setting(error: Exception, flags: list[str], words: str) -> None:
    reason = explain(error, parse_args(flags))
    assert (words in str(reason)) if words else reason is None
