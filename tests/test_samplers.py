"""samplers.py: the published sequence, and every image exactly once."""

from __future__ import annotations

import re
import zlib
from typing import Any

import numpy as np
import pytest
from torch.utils.data import DistributedSampler

from samplers import Draw, RASampler, TrainBatches
from tests import golden
from training.state import TrainingProgress


@pytest.mark.parametrize('case', golden.RASAMPLER)
def test_published_sequence(case: str) -> None:
    n, replicas, rank, epoch = (int(number) for number in re.findall(r'=(\d+)', case))
    expected = golden.RASAMPLER[case]
    sampler = RASampler(range(n), num_replicas=replicas, rank=rank)
    sampler.set_epoch(epoch)
    indices = [int(index) for index in sampler]
    assert len(sampler) == len(indices) == expected['len']
    assert indices[:16] == expected['first16'] and indices[-4:] == expected['last4']
    assert zlib.crc32(np.array(indices, dtype='<i8').tobytes()) == expected['crc32_of_int64_le']


@pytest.mark.parametrize('n', [1, 3, 100, 255])
@pytest.mark.parametrize('replicas', [1, 2, 3])
def test_small_data_sets_are_not_empty(n: int, replicas: int) -> None:
    parts = [list(RASampler(range(n), num_replicas=replicas, rank=rank)) for rank in range(replicas)]
    assert {len(part) for part in parts} == {-(-n // replicas)}
    assert all(0 <= index < n for part in parts for index in part)


def test_epochs_differ() -> None:
    sampler = RASampler(range(1000), num_replicas=1, rank=0)
    first = list(sampler)
    sampler.set_epoch(1)
    assert list(sampler) != first


def all_batches(
    n: int, *, batch: int, replicas: int, start: dict | None = None, **kwargs: Any
) -> list[list[list[Draw]]]:
    """The batches of each process."""
    plans = [TrainBatches(n, batch_size=batch, num_replicas=replicas, rank=rank, **kwargs) for rank in range(replicas)]
    for plan in plans:
        plan.set_epoch(**(start or {'epoch': 3}))
    assert len({len(plan) for plan in plans}) == 1
    batches = [list(plan) for plan in plans]
    assert [len(plan) for plan in plans] == [len(own) for own in batches]
    for number in range(len(plans[0])):
        expected = [own[number] for own in batches]
        assert plans[0].draws(plans[0].first + number) == expected
    return batches


@pytest.mark.parametrize('n', [1000, 1024, 255, 257, 130])
@pytest.mark.parametrize('replicas', [1, 2, 3])
@pytest.mark.parametrize('repeated', [True, False])
def test_batches_are_the_published_ones(n: int, replicas: int, repeated: bool) -> None:
    """Those of a loader that drops the last incomplete batch of the published samplers' sequence."""
    for rank, own in enumerate(all_batches(n, batch=16, replicas=replicas, repeated=repeated)):
        cls: type = RASampler if repeated else DistributedSampler
        sampler = cls(range(n), num_replicas=replicas, rank=rank)
        sampler.set_epoch(3)
        indices = [int(index) for index in sampler]
        expected = [indices[i : i + 16] for i in range(0, len(indices) // 16 * 16, 16)]
        if repeated and n < 256:  # where the published one is empty
            assert len(own) == len(expected)
        else:
            assert [[draw.image for draw in batch] for batch in own] == expected


@pytest.mark.parametrize('repeated', [True, False])
def test_no_draw_stands_twice_in_an_epoch(repeated: bool) -> None:
    draws = [
        draw for own in all_batches(1001, batch=7, replicas=3, repeated=repeated) for batch in own for draw in batch
    ]
    assert len(set(draws)) == len(draws) and {draw.epoch for draw in draws} == {3}
    assert {draw.repeat for draw in draws} == ({0, 1, 2} if repeated else {0})


@pytest.mark.parametrize('even', [True, False])
@pytest.mark.parametrize(('replicas', 'batch'), [(1, 64), (2, 32), (2, 64), (3, 64), (5, 64), (7, 10), (4, 2)])
def test_an_epoch_goes_on_with_other_processes(replicas: int, batch: int, even: bool) -> None:
    """It began with one process and batches of 64: the rest of its draws, each once, in batches that can be mixed."""
    whole = [draw for own in all_batches(1437, batch=64, replicas=1, repeated=True)[0] for draw in own]
    for steps in (1, 7, 15, 18):
        start = {'epoch': 3, 'done': 64 * steps, 'num_draws': len(whole), 'first': steps}
        batches = all_batches(1437, batch=batch, replicas=replicas, repeated=True, even=even, start=start)
        seen = [draw for own in batches for part in own for draw in part]
        assert sorted(seen) == sorted(whole[64 * steps :])
        sizes = [len(part) for own in batches for part in own]
        assert min(sizes) > 0 and max(sizes) <= batch
        if even:
            assert all(size % 2 == 0 for size in sizes)


def test_draws_that_are_left_out_twice_count_once() -> None:
    progress = TrainingProgress(epoch=1, left_out=[(1, 32, 64), (1, 0, 77), (0, 0, 500)])
    assert progress.skipped_draws() == set(range(77))


def test_stretches_are_left_out() -> None:
    start = {'epoch': 3, 'left_out': [(32, 64), (128, 160)]}
    (own,) = all_batches(256, batch=32, replicas=1, start=start)
    (whole,) = all_batches(256, batch=32, replicas=1)
    assert own == [batch for number, batch in enumerate(whole) if number not in (1, 4)]
    plan = TrainBatches(256, batch_size=32)
    plan.set_epoch(**start)
    assert [plan.batch_range(number) for number in range(3)] == [(0, 32), (64, 96), (96, 128)]


def test_fewer_draws_than_processes_are_counted() -> None:
    plan = TrainBatches(256, batch_size=2, num_replicas=8)
    plan.set_epoch(0, done=250, num_draws=256)
    assert (len(plan), plan.unplaced, list(plan)) == (0, 6, [])


UNEQUAL = np.random.default_rng(0).permutation(np.repeat([0, 1, 3, 4], [700, 250, 48, 2]))


@pytest.mark.parametrize('repeated', [True, False])
@pytest.mark.parametrize('replicas', [1, 2, 3])
def test_balanced_batches(repeated: bool, replicas: int) -> None:
    """Each class equally often, in each epoch and seed in another order; no draw stands twice."""
    kwargs: dict[str, Any] = {'repeated': repeated, 'balanced': UNEQUAL}
    batches = all_batches(1000, batch=16, replicas=replicas, **kwargs)
    draws = [draw for own in batches for batch in own for draw in batch]
    assert len(draws) == 1000 // (16 * replicas) * 16 * replicas and len(set(draws)) == len(draws)
    counts = np.bincount(UNEQUAL[[draw.image for draw in draws]])[[0, 1, 3, 4]]
    assert counts.max() - counts.min() <= (3 if repeated else 1)
    shown = np.bincount([draw.image for draw in draws], minlength=1000)
    for target in (0, 1, 3, 4):  # its images in turn
        own = shown[target == UNEQUAL]
        assert own.max() - own.min() <= (3 if repeated else 1)
    assert batches == all_batches(1000, batch=16, replicas=replicas, **kwargs)
    for other in ({'seed': 1}, {'start': {'epoch': 4}}):
        others = all_batches(1000, batch=16, replicas=replicas, **kwargs, **other)
        assert [draw.image for own in others for batch in own for draw in batch] != [draw.image for draw in draws]


def test_a_balanced_epoch_goes_on_with_other_processes() -> None:
    (own,) = all_batches(1000, batch=50, replicas=1, balanced=UNEQUAL)
    whole = [draw for batch in own for draw in batch]
    start = {'epoch': 3, 'done': 350, 'num_draws': 1000, 'first': 7}
    assert all_batches(1000, batch=50, replicas=1, balanced=UNEQUAL, start=start)[0] == own[7:]
    rest = all_batches(1000, batch=25, replicas=2, balanced=UNEQUAL, start=start)
    assert sorted(draw for own in rest for batch in own for draw in batch) == sorted(whole[350:])


@pytest.mark.parametrize('repeated', [True, False])
def test_the_order_does_not_depend_on_the_seed(repeated: bool) -> None:
    """As published: it follows from the epoch alone."""
    one, other = (all_batches(600, batch=16, replicas=2, repeated=repeated, seed=seed) for seed in (0, 1))
    assert one == other
