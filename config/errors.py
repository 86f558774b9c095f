"""Errors of one line, which every command ends with."""

from __future__ import annotations

import argparse
import errno
import os
import re
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from typing import NoReturn

import torch
import torch.distributed as dist

from training.distributed import find_failed_process
from utils import InputError, UsageError, get_rank, one_line, safe_console


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
            leave(program, f'{err.filename}: {err.strerror}' if err.filename and err.strerror else one_line(err), 1)
        except MemoryError:
            leave(program, 'out of memory: smaller batches, or fewer --num_workers, need less', 1)
        except KeyboardInterrupt:
            leave(program, 'interrupted', 130)


def explain(err: Exception, args: argparse.Namespace) -> InputError | None:
    """What the user can do about an error of PyTorch's, None for one that says nothing about what was given."""
    text = str(err)
    compiler = sys.modules.get('torch._dynamo.exc')  # not loaded where nothing is compiled
    if compiler is not None and isinstance(err, compiler.TorchDynamoException):
        return InputError(f'--compile {args.compile} failed: {one_line(err)}; go on with --compile off')
    if isinstance(err, torch.OutOfMemoryError) or "can't allocate memory" in text:
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
        return InputError(
            f'loader processes have no room in shared memory: {one_line(err)}; give /dev/shm more (docker run '
            '--shm-size), or fewer --num_workers'
        )
    if 'DataLoader worker' in text:
        return InputError(f'{one_line(err)}: was it short of memory? Fewer --num_workers need less')
    broken = re.search('gloo|nccl|pair closure|connection|timed out|timeout|broken pipe', text, re.IGNORECASE)
    if isinstance(err, dist.DistError) or (broken and dist.is_initialized()):
        # gloo and NCCL report a process that is gone from inside whatever collective the others were in.
        return InputError(find_failed_process(get_rank(), err))
    return None
