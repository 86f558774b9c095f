"""Signals that ask a run to stop, processes that fail, and what the others do about it."""

from __future__ import annotations

import multiprocessing
import os
import shutil
import signal
import subprocess
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from types import FrameType

import torch
import torch.distributed as dist

from utils import InputError, get_store, get_world_size, is_distributed, log, one_line

SIGNALS = (signal.SIGTERM, signal.SIGINT, signal.SIGUSR1)
GO_ON, SAVE, STOP = 0, 1, 2  # what processes agree on after a step; STOP plus a signal's number


class Interrupted(InputError):
    """A signal asked the run to stop. The exit code is 128 plus its number, as shells have it."""

    label = 'stopped'

    def __init__(self, number: int, message: str) -> None:
        super().__init__(message)
        self.exit_code = 128 + number


class Interrupts:
    """Turns the first SIGTERM, SIGINT or SIGUSR1 into a request; a second one ends the process at once."""

    def __init__(self) -> None:
        self.signal = 0

    def _handle(self, number: int, frame: FrameType | None) -> None:
        if self.signal:
            os._exit(128 + number)
        self.signal = number

    @contextmanager
    def installed(self) -> Iterator[None]:
        """Catches the signals while its body runs, if this is the main thread."""
        if threading.current_thread() is not threading.main_thread():
            yield
            return
        before = {number: signal.signal(number, self._handle) for number in SIGNALS}
        try:
            yield
        finally:
            for number, handler in before.items():
                signal.signal(number, handler)

    def agree(self, *, save: bool) -> int:
        """What all processes do after this step: GO_ON, SAVE, or STOP plus a signal's number.

        Args:
            save: whether this process is for a checkpoint.
        """
        own = STOP + self.signal if self.signal else SAVE if save else GO_ON
        if not is_distributed():
            return own
        wish = torch.tensor(own)  # in host memory: the device goes on with its work
        dist.all_reduce(wish, dist.ReduceOp.MAX)
        return int(wish)


@contextmanager
def deadline(seconds: float, error: Callable[[], Exception]) -> Iterator[None]:
    """Raises an error in its body after so many seconds, also where that waits for another process without end.

    Does nothing outside the main thread, which alone can be interrupted, and for 0 seconds.
    """
    if not seconds or threading.current_thread() is not threading.main_thread():
        yield
        return

    def late(number: int, frame: FrameType | None) -> None:
        raise error()

    before = signal.signal(signal.SIGALRM, late)
    signal.setitimer(signal.ITIMER_REAL, seconds)
    try:
        yield
    finally:
        signal.setitimer(signal.ITIMER_REAL, 0)
        signal.signal(signal.SIGALRM, before)


def ignore_signals(worker: int) -> None:
    """For loader processes: the signals are for the process that they work for, which may need their batches still.

    They end with it, also if it is killed.
    """
    for number in SIGNALS:
        signal.signal(number, signal.SIG_IGN)
    end_with_parent(worker)


def end_with_parent(worker: int) -> None:
    """For loader processes: ends this process soon after its parent, which a kill gave no time to tell it so."""
    parent = os.getppid()

    def watch() -> None:
        while os.getppid() == parent:
            time.sleep(0.2)
        os._exit(1)  # the loader's own watch hangs where a batch waits in the pipe

    threading.Thread(target=watch, daemon=True).start()


@contextmanager
def no_children_left() -> Iterator[None]:
    """Kills the loader processes when its body ends: they take no signal, and one that hangs takes no word either."""
    try:
        yield
    finally:
        children = multiprocessing.active_children()
        handler = signal.getsignal(signal.SIGCHLD)
        in_main_thread = threading.current_thread() is threading.main_thread()
        if in_main_thread:
            signal.signal(signal.SIGCHLD, signal.SIG_DFL)  # PyTorch's takes their end for a failure
        for child in children:
            child.kill()
        for child in children:
            child.join()
        if in_main_thread and handler is not None:
            signal.signal(signal.SIGCHLD, handler)


def requeue() -> None:
    """Asks SLURM to start this job again, if it is one; SIGUSR1 is what it sends before a job's time is over."""
    job = os.environ.get('SLURM_JOB_ID')
    if job is None or shutil.which('scontrol') is None:
        return
    array = os.environ.get('SLURM_ARRAY_JOB_ID'), os.environ.get('SLURM_ARRAY_TASK_ID')
    name = '_'.join(part for part in array if part) if all(array) else job
    done = subprocess.run(['scontrol', 'requeue', name], capture_output=True, text=True)
    log(
        f'SLURM will start job {name} again'
        if done.returncode == 0
        else f'scontrol requeue {name}: {done.stderr.strip()}'
    )


# A group whose processes tell each other why they stopped


def _within(seconds: float, call: Callable[[], str]) -> str | None:
    """What a call gives, or None after so many seconds: the store's answers can be waited for without end, if the
    process that holds it hangs."""
    answers: list[str] = []
    thread = threading.Thread(target=lambda: answers.append(call()), daemon=True)
    thread.start()
    thread.join(seconds)
    return answers[0] if answers else None


def leave_word(rank: int, reason: str) -> None:
    """Tells the other processes why this one stops."""
    store = get_store()

    def tell() -> str:
        with suppress(Exception):  # the store may have gone with the process that held it
            assert store is not None
            store.set(f'stopped/{rank}', reason)
        return ''

    if store is not None:
        _within(2, tell)


def lost_contact(rank: int, error: BaseException, *, patience: float = 3.0) -> str:
    """Why a collective of this process failed: which of the others stopped, and what it said.

    Args:
        rank: this process's number.
        error: what the collective raised.
        patience: seconds that the others have to say something.
    """
    reason, store = one_line(error), get_store()
    if store is None:
        return f'the group is broken ({reason})'

    def ask() -> str:
        try:
            store.set(f'lost/{rank}', '1')
            others = [other for other in range(get_world_size()) if other != rank]
            end = time.monotonic() + patience
            silent = others
            while silent and time.monotonic() < end:
                for other in others:
                    if store.check([f'stopped/{other}']):
                        return f'process {other} has stopped: {store.get(f"stopped/{other}").decode()}'
                silent = [other for other in silent if not store.check([f'lost/{other}'])]
                time.sleep(0.1)
        except Exception:
            return f'process 0, which held the group together, has stopped ({reason})'
        if silent:
            return f'process {", ".join(map(str, silent))} was killed or hangs: it says nothing ({reason})'
        return f'the group is broken ({reason})'

    return _within(patience + 2, ask) or f'process 0, which holds the group together, hangs ({reason})'
