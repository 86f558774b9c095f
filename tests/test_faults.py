"""Each promise of docs/guarantees.md, with the fault that tests it made once or twice; faults.py does so more often."""

from __future__ import annotations

import random
from pathlib import Path

import pytest

from tests import torture_resume
from tests.faults import FAULTS, can_mount, evaluated, reference
from tests.torture_resume import Case, torture

TIMES = {'killed_save': 5, 'sigterm': 2}
ELSEWHERE = ('exact_evaluation', 'killed_rank')  # in part below; as with two agents
NEEDS_MOUNT = ('full_disk', 'full_disk_to_the_end', 'read_only_folder')


@pytest.mark.parametrize('name', [name for name in FAULTS if name not in ELSEWHERE])
def test_promise(name: str, tmp_path: Path) -> None:
    if name in NEEDS_MOUNT and not can_mount():
        pytest.skip('this user may not mount a small file system')
    rng = random.Random(name)
    for time in range(TIMES.get(name, 1)):
        (tmp_path / str(time)).mkdir()
        FAULTS[name](tmp_path / str(time), rng)


@pytest.mark.parametrize(('images', 'batch', 'processes'), [(12, 1, 2), (13, 6, 3), (16, 5, 3), (14, 3, 1)])
def test_evaluation_counts_each_image_once(images: int, batch: int, processes: int, tmp_path: Path) -> None:
    path = reference() / 'checkpoint.pth'
    found = evaluated(tmp_path, path, images=images, batch=batch, processes=processes)
    assert found == evaluated(tmp_path, path, images=images, batch=7, processes=1)


@pytest.mark.parametrize(
    'case', [Case(workers=2, amp='bf16', augment='pil', batch=128), Case(processes=2, batch=128)], ids=str
)
def test_killed_runs_end_as_others_do(case: Case, tmp_path: Path) -> None:
    assert 'all equal to the bit' in torture(case, tmp_path, kills=2, rng=random.Random(0))


def test_unequal_runs_are_found(tmp_path: Path) -> None:
    """The comparison can fail: another seed gives other weights."""
    folders = []
    for seed in ('0', '1'):
        folders.append(tmp_path / seed)
        children = torture_resume.start(Case(epochs=1, batch=256), folders[-1], '--seed', seed)
        assert torture_resume.wait(children) == [0]
    found = torture_resume.differences(*folders)
    assert {'model', 'model_ema', 'optimizer', 'history', 'log.txt'} <= set(found) and 'epoch' not in found
