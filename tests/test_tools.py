"""The commands in tools/: what they draw and print."""

from __future__ import annotations

from importlib import import_module
from pathlib import Path

import numpy as np
import pytest
import timm
import torch
from PIL import Image

import models  # noqa: F401
from config.flags import FlagParser
from main import main as train
from tests.conftest import PLAIN, ROOT
from tests.test_deit_evit import EVIT
from tools import benchmark_data, visualize
from tools.visualize import DROPPED, FUSED, KEPT, find_states

TOOLS = [path for path in sorted((ROOT / 'tools').glob('*.py')) if path.stem not in ('__init__', 'check_env')]


@pytest.mark.parametrize(('fuse', 'taken'), [(True, FUSED), (False, DROPPED)])
def test_states_are_those_of_the_forward_pass(fuse: bool, taken: int) -> None:
    torch.manual_seed(0)
    model = timm.create_model(
        'deit_tiny_patch16_shrink_base', img_size=(24, 32), patch_size=4, embed_dim=48, depth=4, drop_loc=(1, 2),
        base_keep_rate=0.5, fuse_token=fuse,
    ).eval()  # fmt: skip
    image = torch.randn(1, 3, 24, 32)
    states = find_states(model, image)
    assert list(states) == [1, 2] and states[1].shape == (6, 8)
    assert (states[1] == KEPT).sum() == 24 and (states[1] == taken).sum() == 24
    _, kept = model.forward_kept(image)
    assert set(np.flatnonzero(states[1] == KEPT)) == set(kept[1].indices[0].tolist())
    # After the second block, a kept token is a patch kept by the first one, or its fused token.
    second = {int(kept[1].indices[0, token]) for token in kept[2].indices[0].tolist() if token < 24}
    assert set(np.flatnonzero(states[2] == KEPT)) == second
    assert np.all(states[2][states[1] != KEPT] == taken)


def test_evit_mask(tmp_path: Path, capsys: pytest.CaptureFixture) -> None:
    flags = [*PLAIN, '--data-set', 'DIGITS', '--batch-size', '128', *EVIT, '--base_keep_rate', '0.5', '--epochs', '1']
    flags += ['--shrink_start_epoch', '0']
    train([*flags, '--output_dir', str(tmp_path / 'run')])
    checkpoint = str(tmp_path / 'run' / 'checkpoint.pth')
    for number in range(3):
        pixels = np.random.default_rng(number).integers(100, 256, (20, 30, 3), dtype=np.uint8)
        Image.fromarray(pixels).save(tmp_path / f'{number}.png')
    names = [str(tmp_path / f'{number}.png') for number in range(3)]
    out = tmp_path / 'new' / 'mask.png'
    visualize.main(['evit-mask', checkpoint, *names, '--out', str(out)])
    assert 'blocks 1, 2' in capsys.readouterr().out
    with Image.open(out) as sheet:
        assert sheet.size == (3 * 22 + 6, 3 * (16 + 16 + 6) + 6)
        rows = np.asarray(sheet.convert('L')).astype(float)
    tops = [6 + row * 38 + 16 for row in range(3)]
    brightness = [rows[top : top + 16, 6:22].mean() for top in tops]
    assert brightness[0] > brightness[1] > brightness[2]  # each block takes some away
    dropped = [{1: np.full((4, 4), visualize.DROPPED)}]  # 4 patches of 4 pixels in 18
    pixels = np.asarray(visualize.draw([np.full((18, 18, 3), 255, np.uint8)], dropped, 4))[6 + 18 + 16 + 6 + 16 :, 6:]
    assert (pixels[:16, :16] < 100).all() and (pixels[16:18, 16:18] == 255).all()
    for argv, message, code in (
        ([checkpoint, str(tmp_path / 'absent.png')], 'absent.png: No such file', 1),
        ([checkpoint, checkpoint], 'cannot be read as an image', 1),
        ([names[0], names[0]], 'is damaged, or no checkpoint', 1),
        ([checkpoint, names[0], '--base_keep_rate', '1'], 'no block of this model drops tokens', 2),
    ):
        with pytest.raises(SystemExit) as stop:
            visualize.main(['evit-mask', *argv, '--out', str(out)])
        err = capsys.readouterr().err
        assert stop.value.code == code and err.count('\n') == 1 and message in err, err


def test_benchmark_of_data(  # type: ignore[no-untyped-def]
    make_folder, capsys: pytest.CaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    root = make_folder({'train': ['a', 'b'], 'val': ['a', 'b']}, images=8)
    benchmark_data.main(['speed', str(root), '--rounds', '1', '--workers', '1'])
    rows = [line for line in capsys.readouterr().out.splitlines() if '| 1 |' in line]
    assert len(rows) == 16 and sum('| ImageFolder |' in line for line in rows) == 4
    assert sum('| LMDB, --max-size 36 |' in line for line in rows) == 4
    assert sorted(path.name for path in root.iterdir()) == ['train', 'val']
    with pytest.raises(SystemExit) as stop:
        benchmark_data.main(['speed'])
    assert stop.value.code == 2
    monkeypatch.setattr(benchmark_data, 'READS', 2000)
    benchmark_data.main(['memory', '--images', '2000'])
    assert capsys.readouterr().out.count('| 2,000 |') == 12  # the small data set and the large one are the same here


@pytest.mark.parametrize('name', ['main', 'folder2lmdb', *(f'tools.{path.stem}' for path in TOOLS)])
def test_each_command_and_flag_has_a_help(
    name: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture
) -> None:
    parsers = []
    format_help = FlagParser.format_help

    def remember(parser: FlagParser) -> str:
        parsers.append(parser)
        return format_help(parser)

    monkeypatch.setattr(FlagParser, 'format_help', remember)
    with pytest.raises(SystemExit) as stop:
        import_module(name).main(['--help'])
    assert stop.value.code == 0 and capsys.readouterr().out.startswith('usage: ')
    assert parsers and not [action.dest for parser in parsers for action in parser._actions if not action.help]
