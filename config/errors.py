"""How every command ends: an error is one line, and a console that goes away is none."""

from __future__ import annotations

import argparse
import errno
import io
import os
import re
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from typing import Any, NoReturn, TextIO

import torch
import torch.distributed as dist

from training.distributed import find_failed_process
from utils import InputError, UsageError, get_rank, one_line


class LostStream:
    """Standard output or error that may go away (`| head`, a closed terminal, a full disk) without an error.

    Where its reader is gone, what is written is dropped from then on, after a warning on the other stream. On a full
    disk the text waits until there is room.

    Args:
        stream: what it stands for; None where the process was started without it.
        name: for the warning.
        warn: called with the warning.
    """

    def __init__(self, stream: TextIO | None, name: str, warn: Callable[[str], object]) -> None:
        self.stream = open(os.devnull, 'w') if stream is None else stream  # noqa: SIM115  stays open
        self._name = name
        self._warn = warn
        self._lost = False
        if isinstance(self.stream, io.TextIOWrapper):
            self.stream.reconfigure(errors='backslashreplace')  # names of files may be anything

    def __getattr__(self, name: str) -> Any:
        return getattr(self.stream, name)

    def write(self, text: str) -> int:
        self._try(lambda: self.stream.write(text))
        return len(text)

    def flush(self) -> None:
        self._try(self.stream.flush)

    def _try(self, call: Callable[[], object]) -> None:
        try:
            call()
        except (OSError, ValueError) as err:  # ValueError: the stream is closed
            if self._lost or (isinstance(err, OSError) and err.errno in (errno.ENOSPC, errno.EDQUOT)):
                return
            self._lost = True
            with suppress(OSError, ValueError):  # what the buffer still holds goes nowhere, without an error at exit
                os.dup2(os.open(os.devnull, os.O_WRONLY), self.stream.fileno())
            self._warn(f'Warning: {self._name} is gone ({one_line(err)}); the program goes on\n')


@contextmanager
def safe_console() -> Iterator[None]:
    """Lets its body outlive the standard streams: a program's work does not depend on who reads what it prints."""
    streams = sys.stdout, sys.stderr
    for descriptor in (0, 1, 2):  # else the next file that is opened would be taken for a closed one of these
        try:
            os.fstat(descriptor)
        except OSError:
            os.open(os.devnull, os.O_RDWR)
    sys.stdout = LostStream(streams[0], 'standard output', lambda text: sys.stderr.write(text))
    sys.stderr = LostStream(streams[1], 'standard error', lambda text: sys.stdout.write(text))
    try:
        yield
    finally:
        for stream in (sys.stdout, sys.stderr):
            stream.flush()
        sys.stdout, sys.stderr = streams


def leave(program: str, message: str, code: int, *, label: str = 'error') -> NoReturn:
    """Ends the program with a line on stderr."""
    rank = f' (process {get_rank()})' if get_rank() else ''
    sys.stderr.write(f'{program}{rank}: {label}: {message}\n')
    sys.exit(code)


@contextmanager
def one_line_errors(program: str) -> Iterator[None]:
    """Ends the program with a line, without a traceback, where its body fails on what the user gave.

    Raises:
        SystemExit: with 2 for wrong flags, 1 for anything else that cannot be used, 130 after Ctrl-C.
    """
    with safe_console():
        try:
            yield
        except InputError as err:
            leave(program, one_line(err), err.exit_code, label=err.label)
        except BrokenPipeError:  # whoever reads the results of `predict.py … | head` has enough
            os.dup2(os.open(os.devnull, os.O_WRONLY), 1)
            sys.exit(1)
        except OSError as err:
            if err.errno in (errno.EMFILE, errno.ENFILE, errno.EAGAIN, errno.ENOMEM):
                leave(program, f'{one_line(err)}: fewer --num_workers need less', 1)
            if isinstance(err, FileExistsError):
                leave(program, f'{err.filename} is a file, where a folder is to be: give another name', 1)
            leave(program, f'{err.filename}: {err.strerror}' if err.filename and err.strerror else one_line(err), 1)
        except (RuntimeError, MemoryError) as err:
            if _lacks_memory(err):
                leave(program, 'out of memory: smaller batches or images, or fewer --num_workers, need less', 1)
            if lost := _lost_worker(err):
                leave(program, lost, 1)
            raise
        except KeyboardInterrupt:
            leave(program, 'interrupted', 130)


def _lacks_memory(err: Exception) -> bool:
    return isinstance(err, (MemoryError, torch.OutOfMemoryError)) or "can't allocate memory" in str(err)


def _lost_worker(err: Exception) -> str | None:
    """What to say of a loader process that is gone, None for other errors."""
    hint = 'was it short of memory? Fewer --num_workers need less'
    return f'{one_line(err)}: {hint}' if 'DataLoader worker' in str(err) else None


def explain(err: Exception, args: argparse.Namespace) -> InputError | None:
    """What the user can do about an error of PyTorch's, None for one that says nothing about what was given."""
    text = str(err)
    compiler = sys.modules.get('torch._dynamo.exc')  # not loaded where nothing is compiled
    if compiler is not None and isinstance(err, compiler.TorchDynamoException):
        return InputError(f'--compile {args.compile} failed: {one_line(err)}; go on with --compile off')
    if _lacks_memory(err):
        where = 'GPU memory' if isinstance(err, torch.OutOfMemoryError) else 'memory'
        smaller = f'--batch-size {args.batch_size // 2} --accum-steps {2 * args.accum_steps} has the same total batch'
        hint = 'lower --batch-size' if args.batch_size % 2 else smaller
        further = '' if args.grad_checkpointing else '--grad-checkpointing or '
        return InputError(f'out of {where}: {hint}; {further}a lower --cache-gib needs less too')
    if 'more than 1 value per channel' in text:
        return UsageError('BatchNorm needs more than one value for each channel: raise --batch-size')
    if 'DataLoader timed out' in text:
        return InputError(f'a loader process gave no batch in {args.timeout:g} s (--timeout): it, or its disk, hangs')
    if 'shared memory' in text or '/torch_' in text:
        room = f'loader processes have no room in shared memory: {one_line(err)}'
        return InputError(f'{room}; give /dev/shm more (docker run --shm-size), or fewer --num_workers')
    if lost := _lost_worker(err):
        return InputError(lost)
    broken = re.search('gloo|nccl|pair closure|connection|timed out|timeout|broken pipe', text, re.IGNORECASE)
    if isinstance(err, dist.DistError) or (broken and dist.is_initialized()):
        # gloo and NCCL report a process that is gone from inside whatever collective the others were in.
        return InputError(find_failed_process(err))
    return None
