"""Errors, seeds, ranks, console output and small helpers that every other module may use."""

from __future__ import annotations

import math
import os
import random
import sys
import time
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from typing import Any, Protocol, TypeVar

import numpy as np
import torch
import torch.distributed as dist
from torch import Tensor
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


class NonFiniteError(InputError):
    """A loss or a gradient became infinite or NaN; `step` says where, for those that leave it out."""

    def __init__(self, *, skipped_in_a_row: int, **step: Any) -> None:
        self.step = step
        bad = [value for value in step['losses'] if not math.isfinite(value)]
        what = f'the loss is {bad[0]}' if bad else f'the norm of the gradient is {step["gradient_norm"]}'
        row = f' in {skipped_in_a_row} steps in a row,' if skipped_in_a_row > 1 else ''
        super().__init__(
            f'{what} at epoch {step["epoch"]}, step {step["batch"]} of {step["batches"]},{row} with learning rate '
            f'{step["learning_rate"]:.3g} and loss scale {step["loss_scale"]:g}'
        )


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


def all_reduce(values: Tensor, *, largest: bool = False) -> Tensor:
    """A tensor with the sums, or the largest, of all processes' values, on each of them and in place."""
    if is_distributed():
        dist.all_reduce(values, dist.ReduceOp.MAX if largest else dist.ReduceOp.SUM)
    return values


def broadcast_object(value: T) -> T:
    """The main process's value, on all of them; `value` is not looked at on the others."""
    if not is_distributed():
        return value
    values = [value]
    dist.broadcast_object_list(values, src=0, device=torch.device('cpu'))
    return values[0]


# Console


def log(message: str) -> None:
    """Prints a line on the main process, above a progress bar if there is one."""
    if is_main_process():
        tqdm.write(message, file=sys.stdout)
        sys.stdout.flush()


class SizedLoader(Protocol):
    """Anything that has a length and can be iterated over."""

    def __len__(self) -> int: ...
    def __iter__(self) -> Iterator[Any]: ...


@dataclass
class EpochSums:
    """Sums over the batches of an epoch; a checkpoint in the middle of the epoch holds them."""

    loss_sum: float = 0.0
    losses: int = 0
    norm_sum: float = 0.0
    norms: int = 0
    skipped: int = 0  # optimizer steps that the loss scaler left out
    skipped_in_a_row: int = 0
    lr: float = 0.0  # of the last step
    seconds: float = 0.0
    data_seconds: float = 0.0  # of these, spent waiting for the loader


class ProgressBar:
    """Iterates over a loader and shows how far it is: a bar on a terminal, a plain line every few steps elsewhere.

    Args:
        loader: gives a batch for each step.
        header: what the line starts with.
        print_freq: steps between two lines or bar updates with values.
        first: the number of the first step, where an epoch goes on.
    """

    bar: tqdm

    def __init__(self, loader: SizedLoader, *, header: str, print_freq: int = 10, first: int = 0) -> None:
        self.loader = loader
        self.header = header
        self.print_freq = print_freq
        self.first = self.step = first
        self.steps = first + len(loader)
        self.images = 0  # that all processes have seen, counted by the loop
        self.data_time = 0.0  # seconds spent waiting for the loader
        self.start = time.perf_counter()

    def __iter__(self) -> Iterator[Any]:
        with tqdm(
            desc=self.header,
            total=self.steps,
            initial=self.first,
            disable=None if is_main_process() else True,  # None: unless on a terminal
            file=sys.stdout,
            leave=False,
            dynamic_ncols=True,
        ) as self.bar:
            self.start = asked = time.perf_counter()
            for step, batch in enumerate(self.loader, start=self.first):
                self.step = step
                self.data_time += time.perf_counter() - asked
                yield batch
                self.bar.update()
                asked = time.perf_counter()

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
        if not self.bar.disable:
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
