"""What a checkpoint may hold: each field replaced by each of many wrong values ends in a line, or does no harm."""

from __future__ import annotations

import copy
import io
import json
import os
import zipfile
from collections.abc import Iterator
from contextlib import suppress
from pathlib import Path
from typing import Any

import pytest
import torch

from config.arguments import parse_args
from config.builders import build_model, build_optimizer, build_scheduler
from config.pretrained import load_trained, read_settings
from config.recall import stored_flags
from main import main
from tests.conftest import PLAIN
from training import checkpoint as ckpt
from training.ema import MovingAverage
from training.state import TrainState, compare, load_state
from training.weights import class_names, model_weights, stored_args
from utils import InputError, UsageError

FLAGS = [*PLAIN, '--model', 'dhvt_tiny_cifar_patch4', '--model-kwargs', 'embed_dim=8', 'depth=1', 'num_heads=2',
         '--data-set', 'DIGITS', '--batch-size', '256', '--epochs', '1', '--train-fraction', '0.2',
         '--model-ema']  # fmt: skip
CYCLE: list[Any] = []
CYCLE.append(CYCLE)
BOMB: list[Any] = ['x' * 100]
for _ in range(40):
    BOMB = [BOMB, BOMB]
WRONG: list[Any] = [
    *(None, True, -1, 10**9, 10**400, 2**63, float('inf'), float('nan'), -1e300, '', 'x', b'x', 'x' * 10**6),
    *([], {}, [1], {'a': 1}, {1: 'a'}, (1, 2, 3), ['a', None], CYCLE, BOMB),
    *(torch.zeros(()), torch.zeros(3), torch.zeros(2, 2), torch.zeros(3, dtype=torch.complex64)),
    *(torch.zeros(3, device='meta'), torch.eye(3).to_sparse(), torch.zeros(3, dtype=torch.bool)),
    torch.zeros(1).expand(10**12),
]  # fmt: skip


@pytest.fixture(scope='module')
def trained(tmp_path_factory: pytest.TempPathFactory) -> Path:
    out = tmp_path_factory.mktemp('trained') / 'out'
    main([*FLAGS, '--output_dir', str(out)])
    return out


def paths(value: Any, depth: int = 0) -> Iterator[tuple[Any, ...]]:
    """The ways to the parts of a value: all names, but of many like entries the first two."""
    if isinstance(value, dict):
        names = list(value)
        alike = depth and all(type(name) is int for name in names)
        for name in names[:2] if alike or depth > 1 or len(names) > 60 else names:
            yield (name,)
            yield from ((name, *way) for way in paths(value[name], depth + 1))
    elif isinstance(value, (list, tuple)):
        for number, part in enumerate(value[:1]):
            yield (number,)
            yield from ((number, *way) for way in paths(part, depth + 1))


def replaced(value: Any, way: tuple[Any, ...], new: Any) -> Any:
    if not way:
        return new
    changed = dict(value) if isinstance(value, dict) else list(value)
    changed[way[0]] = replaced(value[way[0]], way[1:], new)
    return changed


def make_parts() -> tuple[Any, TrainState]:
    args = parse_args(FLAGS)
    model = build_model(args, 10)
    optimizer = build_optimizer(args, model, args.lr, torch.device('cpu'))
    average = MovingAverage(model, decay=0.9)
    return args, TrainState(
        model, average, optimizer, build_scheduler(args, optimizer), torch.amp.GradScaler('cpu', enabled=False)
    )


def use(state: dict[str, Any], args: Any, parts: TrainState) -> None:
    """What a resumed run, an evaluation and an export do with a checkpoint, and the optimizer's next step."""
    state = ckpt.check_fields(state, 'a.pth')
    class_names(state, 'a.pth')
    ckpt.to_safetensors({}, ckpt.export_metadata(state))
    stored_flags(stored_args(state))
    with suppress(UsageError):
        read_settings(state, model_weights(state, 'a.pth'), 'a.pth')
    known = ('data', 'precision', 'train_mode', 'augment', 'total_batch', 'processes', 'threads', 'device', 'torch')
    compare(state, vars(args), dict.fromkeys(known, 'x'))
    progress = load_state(parts, state, 'a.pth')
    json.dumps(progress.history + progress.timings)
    for parameter in parts.model.parameters():
        parameter.grad = torch.zeros_like(parameter)
    parts.optimizer.step()
    parts.scheduler.step(progress.epoch, 0.0)


@pytest.mark.parametrize('part', range(4))
def test_each_field_by_each_wrong_value(part: int, trained: Path) -> None:
    good = ckpt.load(str(trained / 'checkpoint.pth'))
    args, parts = make_parts()
    use(good, args, parts)
    ways = list(paths(good))[part::4]
    assert len(ways) * len(WRONG) * 4 > 3000
    refused = 0
    for way in ways:
        for wrong in WRONG:
            try:
                use(replaced(good, way, wrong), args, parts)
            except InputError as err:
                refused += 1
                assert '\n' not in str(err) and ('a.pth' in str(err) or 'checkpoint' in str(err)), (way, str(err))
    assert refused > len(ways) * len(WRONG) // 3
    use(good, args, parts)


@pytest.mark.parametrize('wrong', WRONG[-7:], ids=range(7))
def test_tensors_of_other_kinds_are_refused_from_files(wrong: Any, trained: Path, tmp_path: Path) -> None:
    state = ckpt.load(str(trained / 'checkpoint.pth'))
    name = 'blocks.0.mlp.bn1.weight'
    for key in ('model', 'model_ema'):
        torch.save({**state, key: {**state[key], name: wrong}}, tmp_path / 'a.pth')
        with pytest.raises(InputError):
            load_trained(str(tmp_path / 'a.pth'), ema=key == 'model_ema')


def test_compressed_and_lying_archives(trained: Path, tmp_path: Path) -> None:
    """Neither takes memory: what a file declares is no more than the file."""
    path = tmp_path / 'a.pth'
    torch.save({'model': {'a': torch.zeros(10**6)}}, path)
    with zipfile.ZipFile(path) as archive, zipfile.ZipFile(tmp_path / 'b.pth', 'w', zipfile.ZIP_DEFLATED) as small:
        for member in archive.infolist():
            small.writestr(member.filename, archive.read(member))
    assert (tmp_path / 'b.pth').stat().st_size < 10**5
    with pytest.raises(InputError, match='it is compressed'):
        ckpt.load(str(tmp_path / 'b.pth'))
    data = path.read_bytes()
    place = data.rfind(b'PK\x01\x02', 0, data.rfind(b'PK\x01\x02', 0, data.rfind(b'archive/data/0')))
    for start in [at for at in range(place, len(data)) if data[at : at + 4] == b'PK\x01\x02']:
        lie = data[: start + 20] + (2**31 - 1).to_bytes(4, 'little') * 2 + data[start + 28 :]
        with pytest.raises(InputError, match='damaged'):
            ckpt.from_bytes(lie, 'a.pth')


def test_what_is_no_file_of_a_checkpoint(trained: Path, tmp_path: Path) -> None:
    with (tmp_path / 'sparse.pth').open('wb') as file:
        file.truncate(10**12)
    (tmp_path / 'folder.pth').mkdir()
    os.mkfifo(tmp_path / 'pipe.pth')
    begun = (trained / 'checkpoint.pth').read_bytes()
    with (tmp_path / 'grown.pth').open('wb') as file:
        file.write(begun)
        file.truncate(10**12)
    for name in ('sparse', 'folder', 'pipe', 'grown'):
        with pytest.raises(InputError, match=name):
            ckpt.load(str(tmp_path / f'{name}.pth'))


def test_a_pickle_that_says_more_than_the_file_holds() -> None:
    file = io.BytesIO()
    torch.save({'model': {'a': torch.arange(4.0)}}, file)
    with zipfile.ZipFile(file) as archive:
        members = {member.filename: archive.read(member) for member in archive.infolist()}
    out = io.BytesIO()
    with zipfile.ZipFile(out, 'w') as archive:
        for name, data in members.items():
            archive.writestr(name, data.replace(b'K\x04t', b'J\x00\x00\x00\x01t', 1))
    with pytest.raises(InputError, match='damaged'):
        ckpt.from_bytes(out.getvalue(), 'a.pth')


def test_the_first_state_stays_when_another_is_refused(trained: Path) -> None:
    good = ckpt.load(str(trained / 'checkpoint.pth'))
    _, parts = make_parts()
    before = copy.deepcopy(parts.model.state_dict())
    with pytest.raises(InputError, match='its epoch is impossible'):
        load_state(parts, {**good, 'epoch': 10**9}, 'a.pth')
    assert all(torch.equal(value, before[name]) for name, value in parts.model.state_dict().items())
