"""Signals that ask a run to stop, processes that fail, and what the others do about it."""

from __future__ import annotations

import os
import shutil
import signal
import subprocess
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from types import FrameType

import torch

from pipeline.workers import SIGNALS
from utils import InputError, all_reduce, log

GO_ON, SAVE, STOP = 0, 1, 2  # what processes agree on after a step; STOP plus a signal's number


class Interrupted(InputError):
    """A signal asked the run to stop. The exit code is 128 plus its number, as shells have it."""

    label = 'stopped'

    def __init__(self, number: int, message: str) -> None:
        super().__init__(message)
        self.exit_code = 128 + number


class Interrupts:
    """Turns the first of SIGNALS into a request to stop; another of its kind ends the process at once.

    A second one within a second is the same one: a terminal and torchrun both pass it on.
    """

    def __init__(self) -> None:
        self.signal = 0
        self._since = 0.0

    def _handle(self, number: int, frame: FrameType | None) -> None:
        if self.signal == number and time.monotonic() - self._since > 1:
            os._exit(128 + number)
        if not self.signal:
            self.signal, self._since = number, time.monotonic()

    @contextmanager
    def installed(self) -> Iterator[None]:
        """Catches the signals while its body runs, if this is the main thread."""
        if threading.current_thread() is not threading.main_thread():
            yield
            return
        wanted = [number for number in SIGNALS if number.name != 'SIGHUP' or signal.getsignal(number) != signal.SIG_IGN]
        before = {number: signal.signal(number, self._handle) for number in wanted}  # nohup's SIGHUP stays ignored
        try:
            yield
        finally:
            for number, handler in before.items():
                signal.signal(number, handler)

    def agree(self, *, save: bool) -> int:
        """What all processes do after this step: GO_ON, SAVE where one is for it, or STOP plus a signal's number."""
        own = STOP + self.signal if self.signal else SAVE if save else GO_ON
        return int(all_reduce(torch.tensor(own), largest=True))  # in host memory: the device goes on with its work


def requeue() -> None:
    """Asks SLURM to start this job again, if it is one; SIGUSR1 is what it sends before a job's time is over."""
    job = os.environ.get('SLURM_JOB_ID')
    if job is None or shutil.which('scontrol') is None:
        return
    array = os.environ.get('SLURM_ARRAY_JOB_ID'), os.environ.get('SLURM_ARRAY_TASK_ID')
    name = '_'.join(part for part in array if part) if all(array) else job
    done = subprocess.run(['scontrol', 'requeue', name], capture_output=True, text=True)
    failed = f'scontrol requeue {name}: {done.stderr.strip()}'
    log(failed if done.returncode else f'SLURM will start job {name} again')
