"""The console is not the run: standard streams that go away, and terminals that hang up."""

from __future__ import annotations

import json
import os
import shlex
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from main import main
from tests.conftest import PLAIN, ROOT
from tests.processes import fork, wait

FLAGS = [*PLAIN, '--model', 'dhvt_tiny_cifar_patch4', '--model-kwargs', 'embed_dim=16', 'depth=1', 'num_heads=2',
         '--data-set', 'DIGITS', '--epochs', '2', '--batch-size', '64',
         '--train-fraction', '0.3']  # fmt: skip
ENV = {**os.environ, 'OMP_NUM_THREADS': '1'}


def command(out: Path) -> str:
    return shlex.join([sys.executable, str(ROOT / 'main.py'), *FLAGS, '--output_dir', str(out)])


@pytest.mark.parametrize(
    ('shell', 'warned'),
    [
        ('{ %s; echo $? > code; } 2> errors | head -n 1 > seen', True),
        ('%s >&- 2> errors; echo $? > code', False),
        ('%s >&- 2>&-; echo $? > code', False),
        ('{ %s 2>&1; echo $? > code; } | true', False),
        ('%s 2>&- > seen; echo $? > code', False),
        ('%s > /dev/full 2> errors; echo $? > code', False),
    ],
)
def test_a_run_outlives_its_console(shell: str, warned: bool, tmp_path: Path) -> None:
    text = shell.replace('%s', command(tmp_path / 'out'))
    done = subprocess.run(['bash', '-c', text], cwd=tmp_path, env=ENV, capture_output=True, text=True, timeout=120)
    errors = (tmp_path / 'errors').read_text() if (tmp_path / 'errors').exists() else ''
    assert (tmp_path / 'code').read_text() == '0\n', (done.stderr, errors)
    lines = [json.loads(line) for line in (tmp_path / 'out' / 'log.txt').read_text().splitlines()]
    assert [line['epoch'] for line in lines] == [0, 1] and (tmp_path / 'out' / 'checkpoint.pth').exists()
    assert 'Traceback' not in errors + done.stderr
    assert ('standard output is gone' in errors) == warned


@pytest.mark.parametrize('nohup', [False, True])
def test_a_terminal_that_hangs_up(nohup: bool, tmp_path: Path) -> None:
    """SIGHUP stops a run as SIGTERM does, with a checkpoint; under nohup it is ignored."""
    handler = signal.SIG_IGN if nohup else signal.SIG_DFL

    def train() -> None:
        signal.signal(signal.SIGHUP, handler)  # as nohup does
        main([*FLAGS, '--epochs', '40', '--output_dir', str(tmp_path / 'out')])

    with (tmp_path / 'seen').open('w') as seen:
        process = fork(train, seen.fileno(), seen.fileno())
    end = time.monotonic() + 60
    while not (tmp_path / 'out' / 'checkpoint.pth').exists() and time.monotonic() < end:
        time.sleep(0.05)
    os.kill(process, signal.SIGHUP)
    if nohup:
        time.sleep(0.5)
        assert os.waitpid(process, os.WNOHANG) == (0, 0)
        os.kill(process, signal.SIGTERM)
    (code,) = wait([process])
    text = (tmp_path / 'seen').read_text()
    assert code == (128 + (signal.SIGTERM if nohup else signal.SIGHUP)), text
    assert 'a checkpoint is written' in text and 'Traceback' not in text
