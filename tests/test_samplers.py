"""samplers.py: the published sequence, and every image exactly once."""

from __future__ import annotations

import re
import zlib

import numpy as np
import pytest

from samplers import EvalSampler, RASampler
from tests import golden


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
    sampler = RASampler(range(1000))
    first = list(sampler)
    sampler.set_epoch(1)
    assert list(sampler) != first


@pytest.mark.parametrize('n', [1, 2, 360, 361])
@pytest.mark.parametrize('replicas', [1, 2, 3])
def test_evaluation_sees_each_image_once(n: int, replicas: int) -> None:
    samplers = [EvalSampler(range(n), num_replicas=replicas, rank=rank) for rank in range(replicas)]
    assert sorted(index for sampler in samplers for index in sampler) == list(range(n))
    assert [len(sampler) for sampler in samplers] == [len(list(sampler)) for sampler in samplers]
