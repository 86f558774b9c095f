"""Distributed set-up, console output and small helpers that every other module may use."""

from __future__ import annotations

import errno
import io
import os
import random
import sys
import time
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager, suppress
from typing import Any, Generic, Protocol, TextIO, TypeVar

import numpy as np
import torch
import torch.distributed as dist
from timm.utils import distribute_bn
from torch import Tensor, nn
from tqdm import tqdm

T = TypeVar('T')


class InputError(Exception):
    """What the user gave cannot be used. Its text is one line: what is wrong, and what to do about it."""

    exit_code = 1
    label = 'error'


class UsageError(InputError):
    """Flags that are wrong in themselves, whatever lies on the disk."""

    exit_code = 2


def one_line(error: BaseException) -> str:
    """The text of an error as one line; of one that a loader process sent, the line after its traceback."""
    lines = [line.strip() for line in str(error).splitlines() if line.strip()]
    if not lines:
        return type(error).__name__
    if lines[0].startswith('Caught ') and len(lines) > 1:  # how torch wraps what a loader process raised
        return lines[-1].partition(': ')[2] or lines[-1]
    return lines[0]


# Random numbers


def seed_all(*numbers: int, devices: bool = True) -> None:
    """Seeds Python's, NumPy's and PyTorch's random numbers with whole numbers from 0 on, all of which count.

    What is drawn after it depends on nothing that came before it; so a run that goes on from a checkpoint needs no
    state of theirs, on however many processes.

    Args:
        numbers: mixed by NumPy's SeedSequence.
        devices: seed those of the GPUs too.
    """
    low, high = (int(part) for part in np.random.SeedSequence(numbers).generate_state(2))
    random.seed(low)
    np.random.seed(low)
    seed = low | (high >> 1) << 32  # below 2**63
    if devices:
        torch.manual_seed(seed)
    else:
        torch.default_generator.manual_seed(seed)


def is_distributed() -> bool:
    return dist.is_available() and dist.is_initialized()


def get_rank() -> int:
    return dist.get_rank() if is_distributed() else 0


def get_world_size() -> int:
    return dist.get_world_size() if is_distributed() else 1


def is_main_process() -> bool:
    return get_rank() == 0


def barrier() -> None:
    if is_distributed():
        dist.barrier()


def all_reduce_sum(values: Tensor) -> Tensor:
    """The sum over all processes of a tensor, on each of them."""
    if is_distributed():
        dist.all_reduce(values)
    return values


def all_reduce_max(values: Tensor) -> None:
    """Replaces a tensor by the largest values over all processes."""
    if is_distributed():
        dist.all_reduce(values, dist.ReduceOp.MAX)


def from_main_process(value: T) -> T:
    """The main process's value, on all of them; `value` is not looked at on the others."""
    if not is_distributed():
        return value
    values = [value]
    dist.broadcast_object_list(values, src=0, device=torch.device('cpu'))
    return values[0]


def share_batchnorm_statistics(model: nn.Module) -> None:
    """Gives every process the main one's running statistics, so that all evaluate the model that is saved."""
    if is_distributed():
        distribute_bn(model, get_world_size(), reduce=False)


# Console


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


def log(message: str) -> None:
    """Prints a line on the main process, above a progress bar if there is one."""
    if is_main_process():
        tqdm.write(message, file=sys.stdout)
        sys.stdout.flush()


class SizedLoader(Protocol):
    """Anything that has a length and can be iterated over."""

    def __len__(self) -> int: ...
    def __iter__(self) -> Iterator[Any]: ...


LoaderT = TypeVar('LoaderT', bound=SizedLoader)


class ProgressBar(Generic[LoaderT]):
    """Iterates over a loader and shows how far it is: a bar on a terminal, a plain line every few steps elsewhere.

    Args:
        loader: gives a batch for each step.
        header: what the line starts with.
        print_freq: steps between two lines or bar updates with values.
        first: the number of the first step, where an epoch goes on.
    """

    def __init__(self, loader: LoaderT, *, header: str, print_freq: int, first: int = 0) -> None:
        self.loader = loader
        self.header = header
        self.print_freq = print_freq
        self.first = first
        self.steps = first + len(loader)
        self.step = first
        self.images = 0  # that all processes have seen, counted by the loop
        self.data_time = 0.0  # seconds spent waiting for the loader
        self.start = time.perf_counter()
        self.bar: tqdm | None = None

    def __iter__(self) -> Iterator[Any]:
        if is_main_process() and sys.stdout.isatty():
            self.bar = tqdm(
                total=self.steps, initial=self.first, desc=self.header, file=sys.stdout, leave=False, dynamic_ncols=True
            )
        self.start = asked = time.perf_counter()
        try:
            for step, batch in enumerate(self.loader, start=self.first):
                self.step = step
                self.data_time += time.perf_counter() - asked
                yield batch
                if self.bar is not None:
                    self.bar.update()
                asked = time.perf_counter()
        finally:
            if self.bar is not None:
                self.bar.close()

    @property
    def seconds(self) -> float:
        return time.perf_counter() - self.start

    def due(self) -> bool:
        """Whether values are to be shown at this step."""
        return self.step % self.print_freq == 0 or self.step == self.steps - 1

    def show(self, values: Mapping[str, str]) -> None:
        """Shows values at this step, and images per second."""
        rate = self.images / max(self.seconds, 1e-9)
        text = '  '.join(f'{name} {value}' for name, value in values.items())
        if self.bar is not None:
            self.bar.set_postfix_str(f'{text}  {rate:.0f} images/s')
        elif is_main_process():
            left = self.seconds / (self.step + 1 - self.first) * (self.steps - self.step - 1)
            position = f'[{self.step + 1:{len(str(self.steps))}}/{self.steps}]'
            log(f'{self.header} {position}  {text}  {rate:.0f} images/s  {format_seconds(left)} left')


def format_seconds(seconds: float) -> str:
    """Seconds as h:mm:ss."""
    minutes, rest = divmod(round(seconds), 60)
    return f'{minutes // 60}:{minutes % 60:02d}:{rest:02d}'


def num_usable_cores() -> int:
    """The cores that this process may run on."""
    return len(os.sched_getaffinity(0)) if hasattr(os, 'sched_getaffinity') else os.cpu_count() or 1


def shorten(names: Iterable[str], *, most: int = 5) -> str:
    """'a, b, c, …': the first few names, for messages."""
    names = list(names)
    return ', '.join(names[:most]) + (', …' if len(names) > most else '')


def count(names: Iterable[str], noun: str) -> str:
    """'3 keys (a, b, c)', for messages."""
    names = list(names)
    return f'{len(names)} {noun}{"" if len(names) == 1 else "s"}' + (f' ({shorten(names)})' if names else '')
