"""Kills trainings with SIGKILL at random moments, starts them again, and compares them with ones left in peace.

    python tests/torture_resume.py --kills 20 --processes 1 2 --amp off bf16 --workers 0 2

Each run must end with the weights, moving average, optimizer, schedule and log.txt of an uninterrupted one, bit for
bit.
A training is the digits recipe's data with every augmentation, on a small model, with a checkpoint every other step.
Processes are forked from this one, which has imported everything, so that a start takes a tenth of a second.
"""

from __future__ import annotations

import argparse
import itertools
import os
import random
import shutil
import signal
import sys
import tempfile
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

sys.path[:0] = [str(Path(__file__).resolve().parent.parent)]

from main import main  # noqa: E402
from tests.processes import fork, group, wait  # noqa: E402
from training import checkpoint as ckpt  # noqa: E402

FLAGS = [
    *('--model', 'dhvt_tiny_cifar_patch4', '--model-kwargs', 'embed_dim=32', 'depth=2', 'num_heads=2'),
    *('--data-set', 'DIGITS', '--input-size', '16', '--lr', '8e-3', '--warmup-epochs', '0', '--drop', '0.1'),
    *('--model-ema-decay', '0.9', '--device', 'cpu', '--auto-resume', '--checkpoint-every', '2', '--dist-eval'),
    '--no-report',
    *('--timeout', '20'),  # a process that is killed before the group is made is waited for
]  # fmt: skip


@dataclass(frozen=True)
class Case:
    """One kind of training."""

    processes: int = 1
    amp: str = 'off'
    workers: int = 0
    augment: str = 'batched'  # in the loader processes only if 'pil'
    epochs: int = 2
    batch: int = 64  # in all

    def __str__(self) -> str:
        words = 'process' if self.processes == 1 else 'processes'
        how = self.augment if self.augment == 'batched' else f'{self.augment} in {self.workers} workers'
        return f'{self.processes} {words}, --amp {self.amp}, augmentation {how}'


def start(case: Case, folder: Path, *more: str, first: Callable[[], object] = int) -> list[int]:
    """Forks the processes of a training; returns their numbers. What they print goes to `<folder>.<process>.txt`.

    Args:
        case: the kind of training.
        folder: its output folder.
        more: further flags.
        first: called in each process before it begins.
    """
    flags = [*FLAGS, '--amp', case.amp, '--epochs', str(case.epochs), '--output_dir', str(folder)]
    flags += [
        '--num_workers',
        str(case.workers),
        '--augment',
        case.augment,
        '--batch-size',
        str(case.batch // case.processes),
        *more,
    ]
    variables = group(case.processes) if case.processes > 1 else [{}]
    children = []
    for rank, env in enumerate(variables):
        with open(folder.with_suffix(f'.{rank}.txt'), 'a') as file:
            children.append(fork(lambda: (first(), main(flags)), file.fileno(), file.fileno(), env))
    return children


def same(one: Any, other: Any) -> bool:
    """Whether two states are equal to the bit."""
    if isinstance(one, torch.Tensor):
        return one.dtype == other.dtype and torch.equal(
            one.contiguous().view(-1).view(torch.uint8), other.contiguous().view(-1).view(torch.uint8)
        )
    if isinstance(one, dict):
        return one.keys() == other.keys() and all(same(one[key], other[key]) for key in one)
    if isinstance(one, (list, tuple)):
        return len(one) == len(other) and all(map(same, one, other))
    return type(one) is type(other) and one == other


PARTS = ('model', 'model_ema', 'optimizer', 'lr_scheduler', 'scaler', 'epoch', 'max_accuracy', 'history', 'left_out')


def differences(folder: Path, reference: Path) -> list[str]:
    """The parts of two finished runs that are not equal."""
    one, other = (ckpt.load(str(path / 'checkpoint.pth')) for path in (folder, reference))
    found = [name for name in PARTS if not same(one[name], other[name])]
    best, other_best = (ckpt.load(str(path / 'best_checkpoint.pth')) for path in (folder, reference))
    if not (same(best['model'], other_best['model']) and best['epoch'] == other_best['epoch']):
        found.append('best_checkpoint.pth')
    if (folder / 'log.txt').read_bytes() != (reference / 'log.txt').read_bytes():
        found.append('log.txt')
    return found


def torture(case: Case, root: Path, *, kills: int, rng: random.Random) -> str:
    """Kills until it has killed often enough, and lets each run that it began end; returns what was found.

    Raises:
        AssertionError: if a run fails by itself, or ends otherwise than the one left in peace.
    """
    reference = root / 'reference'
    begun = time.perf_counter()
    assert set(wait(start(case, reference))) == {0}, reference.with_suffix('.0.txt').read_text()[-2000:]
    duration = time.perf_counter() - begun
    done, runs, starts = 0, 0, 0
    while done < kills:
        folder = root / f'run{runs}'
        runs += 1
        while True:
            children = start(case, folder)
            starts += 1
            ended = done >= kills
            if not ended:
                time.sleep(rng.uniform(0, 1.1) * duration)
                for child in children if rng.random() < 0.5 else [rng.choice(children)]:
                    os.kill(child, signal.SIGKILL)
            codes = wait(children)
            if set(codes) == {0}:
                break
            assert -signal.SIGKILL in codes, folder.with_suffix('.0.txt').read_text()[-2000:]
            done += 1
        found = differences(folder, reference)
        assert not found, f'{case}: {", ".join(found)} differ after {starts} starts: {folder}'
    return f'{case}: {done} kills, {starts} starts, {runs} runs, all equal to the bit'


def parse(argv: list[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    parser.add_argument('--kills', type=int, default=20, help='of each case')
    parser.add_argument('--processes', type=int, nargs='+', default=[1, 2])
    parser.add_argument('--amp', nargs='+', default=['off', 'bf16'])
    parser.add_argument('--workers', type=int, nargs='+', default=[0, 2])
    parser.add_argument('--augment', nargs='+', default=['pil', 'batched'], help='batched has no loader processes')
    parser.add_argument('--epochs', type=int, default=2)
    parser.add_argument('--seed', type=int, default=0)
    parser.add_argument('--keep', type=Path, help='work here, and keep the runs')
    return parser.parse_args(argv)


def run(argv: list[str] | None = None) -> None:
    args = parse(argv)
    rng = random.Random(args.seed)
    augmentations = [(how, n) for how in args.augment for n in (args.workers if how == 'pil' else [0])]
    for processes, amp, (augment, workers) in itertools.product(args.processes, args.amp, augmentations):
        case = Case(processes=processes, amp=amp, workers=workers, augment=augment, epochs=args.epochs)
        root = Path(tempfile.mkdtemp(dir=args.keep))
        print(torture(case, root, kills=args.kills, rng=rng), flush=True)
        if args.keep is None:
            shutil.rmtree(root)


if __name__ == '__main__':
    run()
