"""Loader processes: which signals they take, and that none is left behind."""

from __future__ import annotations

import multiprocessing
import os
import signal
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from multiprocessing.connection import Listener
from pathlib import Path
from types import FrameType

from utils import InputError

try:
    import resource
except ImportError:  # Windows has no such limits
    resource = None  # type: ignore[assignment]

# Which ask a run to stop; Windows has two of them.
SIGNALS = tuple(getattr(signal, name) for name in ('SIGTERM', 'SIGINT', 'SIGUSR1', 'SIGHUP') if hasattr(signal, name))


@contextmanager
def deadline(seconds: float, error: Callable[[], Exception]) -> Iterator[None]:
    """Raises an error in its body after so many seconds, also where that waits for another process without end.

    Does nothing outside the main thread, which alone can be interrupted, for 0 seconds, and on Windows.
    """
    if not seconds or not hasattr(signal, 'setitimer') or threading.current_thread() is not threading.main_thread():
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


def _make_room_for_files(needed: int) -> None:
    """Raises this process's limit on open files as far as it may itself, if it needs so many more.

    Raises:
        InputError: if that is not enough.
    """
    if resource is None or not Path('/proc/self/fd').is_dir():
        return
    needed += len(list(Path('/proc/self/fd').iterdir()))
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    if needed > soft != resource.RLIM_INFINITY:
        with suppress(OSError, ValueError):
            resource.setrlimit(resource.RLIMIT_NOFILE, (hard, hard))
        soft = resource.getrlimit(resource.RLIMIT_NOFILE)[0]
    if needed > soft != resource.RLIM_INFINITY:
        raise InputError(
            f'loader processes need {needed} open files, and {soft} are allowed: raise that limit (ulimit -n), or give '
            'fewer --num_workers'
        )


def check_loader_processes(workers: int) -> None:
    """Tries what loader processes need to hand batches over; else the first batch would be waited for in vain.

    Raises:
        InputError: with what is missing.
    """
    _make_room_for_files(6 * workers + 4)  # pipes, and a descriptor for each tensor on its way
    try:
        Listener(family='AF_UNIX' if hasattr(os, 'fork') else None).close()
    except OSError as err:
        raise InputError(
            f'loader processes cannot open a socket in the folder for temporary files ({err}): set TMPDIR to a shorter '
            'path, such as /tmp, or give --num_workers 0'
        ) from None


def ignore_signals(worker: int) -> None:
    """For loader processes: the signals are for the process that they work for, which may need their batches still.

    They end with it, also if it is killed.
    """
    for number in SIGNALS:
        signal.signal(number, signal.SIG_IGN)
    end_with_parent(worker)


def end_with_parent(worker: int) -> None:
    """For loader processes: ends this process after its parent, which a kill gave no time to tell it so."""
    parent = multiprocessing.parent_process()
    assert parent is not None

    def watch() -> None:
        parent.join()
        os._exit(1)  # the loader's own watch hangs where a batch waits in the pipe

    threading.Thread(target=watch, daemon=True).start()


@contextmanager
def no_children_left() -> Iterator[None]:
    """Kills the loader processes when its body ends: they take no signal, and one that hangs takes no word either."""
    try:
        yield
    finally:
        children = multiprocessing.active_children()
        in_main_thread = threading.current_thread() is threading.main_thread() and hasattr(signal, 'SIGCHLD')
        # PyTorch's handler takes their end for a failure.
        handler = signal.signal(signal.SIGCHLD, signal.SIG_DFL) if in_main_thread else None
        for child in children:
            child.kill()
        for child in children:
            child.join()
        if handler is not None:
            signal.signal(signal.SIGCHLD, handler)
