"""Who writes to a folder: one process at a time."""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

from training.checkpoint import remove_temporary
from utils import InputError, log

try:
    import fcntl
except ImportError:  # Windows
    fcntl = None  # type: ignore[assignment]

LOCK = '.lock'


def take_lock(folder: Path) -> int:
    """Locks a folder by a file in it, until the descriptor that this returns is closed or this process ends.

    Raises:
        InputError: if another process has it.
    """
    descriptor = os.open(folder / LOCK, os.O_RDWR | os.O_CREAT, 0o666)
    if fcntl is None:
        log(f'Note: this system has no file locks: nothing keeps a second process from writing to {folder}')
        return descriptor
    try:
        fcntl.lockf(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)  # ends with this process, however it ends
    except (BlockingIOError, PermissionError):
        os.close(descriptor)
        raise InputError(f'another process writes to {folder}: wait for it, or choose another folder') from None
    except OSError:
        pass  # some network file systems have no locks
    return descriptor


@contextmanager
def writing_to(folder: Path) -> Iterator[None]:
    """Holds a folder's lock while its body writes files there; first removes what killed writers left.

    Raises:
        InputError: if another process has it.
    """
    descriptor = take_lock(folder)
    try:
        remove_temporary(folder)
        yield
    finally:
        with suppress(OSError):
            (folder / LOCK).unlink()
        os.close(descriptor)
