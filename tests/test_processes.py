"""tests/processes.py ends as a program does, so that what is tested through it can fail."""

from __future__ import annotations

import os
import signal
import sys
from functools import partial

from tests.processes import group, run


def test_ends_of_forked_processes() -> None:
    def fail() -> None:
        raise ValueError('broken')

    def say() -> None:
        print(os.environ['RANK'], os.environ['WORLD_SIZE'])
        print('to the error', file=sys.stderr)

    ends = [partial(sys.exit, 3), sys.exit, partial(sys.exit, 'why'), fail, int]
    assert [process.returncode for process in run(*ends)] == [3, 0, 1, 1, 0]
    assert 'ValueError: broken' in run(fail)[0].stderr and run(partial(sys.exit, 'why'))[0].stderr == 'why\n'
    (killed,) = run(lambda: os.kill(os.getpid(), signal.SIGTERM))
    assert killed.returncode == -signal.SIGTERM
    assert [process.stdout for process in run(say, say, env=group(2))] == ['0 2\n', '1 2\n']
    assert run(say, env=group(1))[0].stderr == 'to the error\n'
