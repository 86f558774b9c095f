"""pipeline/workers.py: what loader processes need is tried before the first batch is waited for."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

from tests.conftest import PLAIN, ROOT, SMALL_MODEL

RUN = [*SMALL_MODEL, *PLAIN, '--data-set', 'DIGITS', '--num_workers', '2', '--augment', 'pil', '--epochs', '1']


@pytest.mark.parametrize(
    ('limit', 'folder', 'message'),
    [('-n 17', 'short', 'open files, and 17 are allowed'), ('-n 1000', 'x' * 100, 'set TMPDIR to a shorter path')],
)
def test_missing_room_is_named_at_once(limit: str, folder: str, message: str, tmp_path: Path) -> None:
    (tmp_path / folder).mkdir()
    done = subprocess.run(
        ['bash', '-c', f'ulimit {limit}; exec "$@"', 'bash', sys.executable, 'main.py', *RUN],
        cwd=ROOT, env={**os.environ, 'TMPDIR': str(tmp_path / folder), 'OMP_NUM_THREADS': '1'},
        capture_output=True, text=True, timeout=120,
    )  # fmt: skip
    assert done.returncode == 1 and done.stderr.count('\n') == 1 and message in done.stderr, done.stderr


def test_a_low_limit_is_raised_as_far_as_it_may() -> None:
    code = 'from pipeline.workers import check_loader_processes as check; check(9); print("right")'
    done = subprocess.run(
        ['bash', '-c', 'ulimit -Sn 24; exec "$@"', 'bash', sys.executable, '-c', code],
        cwd=ROOT, capture_output=True, text=True, timeout=120,
    )  # fmt: skip
    assert done.stdout == 'right\n', done.stderr
