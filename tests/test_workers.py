"""pipeline/workers.py: what loader processes need is tried before the first batch is waited for."""

from __future__ import annotations

import errno
import multiprocessing
import os
import select
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.utils.data import Dataset, get_worker_info

from datasets import DataSource, build_datasets
from pipeline.loaders import LoaderOptions, build_loaders
from pipeline.transforms import Augmentation
from pipeline.workers import end_with_parent, no_children_left
from samplers import TrainBatches
from tests.conftest import PLAIN, ROOT, SMALL_MODEL

RUN = [*SMALL_MODEL, *PLAIN, '--data-set', 'DIGITS', '--num_workers', '2', '--augment', 'pil', '--epochs', '1']


@pytest.mark.parametrize(
    ('limit', 'folder', 'message'),
    [('-n 17', 'short', 'open files, and 17 are allowed'), ('-n 1000', 'x' * 100, 'set TMPDIR to a shorter path')],
)
def test_missing_room_is_named_at_once(limit: str, folder: str, message: str, tmp_path: Path) -> None:
    (tmp_path / folder).mkdir()
    done = subprocess.run(
        ['bash', '-c', f'ulimit {limit}; exec "$@"', 'bash', sys.executable, 'main.py', *RUN],
        cwd=ROOT, env={**os.environ, 'TMPDIR': str(tmp_path / folder), 'OMP_NUM_THREADS': '1'},
        capture_output=True, text=True, timeout=120,
    )  # fmt: skip
    assert done.returncode == 1 and done.stderr.count('\n') == 1 and message in done.stderr, done.stderr


def test_a_low_limit_is_raised_as_far_as_it_may() -> None:
    code = 'from pipeline.workers import check_loader_processes as check; check(9); print("right")'
    done = subprocess.run(
        ['bash', '-c', 'ulimit -Sn 24; exec "$@"', 'bash', sys.executable, '-c', code],
        cwd=ROOT, capture_output=True, text=True, timeout=120,
    )  # fmt: skip
    assert done.stdout == 'right\n', done.stderr


class DyingSender:
    """What a loader process hands over; that process dies while the main one fetches it."""

    def __reduce__(self) -> Any:
        return kill_sender, (os.getpid(),)


def kill_sender(sender: int) -> None:
    os.kill(sender, signal.SIGKILL)
    raise ConnectionResetError(errno.ECONNRESET, os.strerror(errno.ECONNRESET))


class Unreachable(Dataset):
    """Its images lie behind a connection that breaks, while the loader processes live on."""

    def __len__(self) -> int:
        return 4

    def __getitem__(self, index: int) -> Tensor:
        raise ConnectionResetError('by the images')


def first_of(batch: list[Any]) -> Any:
    return batch[0]


def test_a_process_that_dies_while_it_hands_a_batch_over_is_named() -> None:
    options = LoaderOptions(device=torch.device('cpu'), workers=1)
    with no_children_left():
        loader = options.loader([DyingSender()] * 4, collate_fn=first_of)  # type: ignore[arg-type]
        with pytest.raises(RuntimeError, match=r'DataLoader worker .*(exited|killed)'):
            list(loader)
        with pytest.raises(ConnectionResetError, match='by the images'):
            list(options.loader(Unreachable()))


def put_together(collate: Callable[[Any], list[Tensor]], made: Tensor, samples: Any) -> list[Tensor]:
    """The loader's own collation, in a loader process."""
    batch = collate(samples)
    assert batch[0].is_shared(), 'the batch is copied again to be handed over'
    made[get_worker_info().id] += 1
    return batch


def end_with_parent_late(gone: Any) -> None:
    gone.wait()
    end_with_parent(0)
    time.sleep(60)


def kill_parent(gone: Any) -> None:
    multiprocessing.get_context('fork').Process(target=end_with_parent_late, args=(gone,)).start()
    os.kill(os.getpid(), signal.SIGKILL)


def test_a_process_ends_whose_parent_was_killed_before_it_could_look() -> None:
    context = multiprocessing.get_context('fork')
    held, inherited = os.pipe()  # open as long as a process has the other end
    gone = context.Event()
    parent = context.Process(target=kill_parent, args=(gone,))
    parent.start()
    os.close(inherited)
    parent.join()
    gone.set()
    assert select.select([held], [], [], 20)[0] and os.read(held, 1) == b''
    os.close(held)


def test_eight_processes_keep_ahead_of_a_slow_step(make_folder: Callable[..., Path]) -> None:
    """Batches are made in shared memory, and two for each process are ready before a slow step ends, not more."""
    workers, batch_size = 8, 4
    root = make_folder({'train': ['a', 'b'], 'val': ['a', 'b']}, images=60, size=40)
    splits = build_datasets(DataSource('FOLDER', str(root)))
    assert splits.train is not None
    augmented: Any = build_loaders(
        splits.train, splits.val, batches=TrainBatches(120, batch_size=batch_size), shard=range(len(splits.val)),
        eval_batch_size=8, augmentation=Augmentation(input_size=36), seed=0,
        options=LoaderOptions(device=torch.device('cpu'), workers=workers, augment='batched'),
    )[0]  # fmt: skip
    loader = augmented.loader
    made = torch.zeros(workers, dtype=torch.int64).share_memory_()
    loader.collate_fn = partial(put_together, loader.collate_fn, made)
    with no_children_left():
        for step, (images, _) in enumerate(loader):
            assert images.is_shared() and images.dtype == torch.uint8 and images.shape == (batch_size, 3, 36, 36)
            ready = min(step + 1 + 2 * workers, len(loader))
            late = time.monotonic() + 60
            while made.sum() < ready and time.monotonic() < late:  # the step
                time.sleep(0.01)
            assert made.sum() == ready
        assert step == 29
