"""checkpoint.py: whole files or none, no code in them, one line for what does not fit."""

from __future__ import annotations

import argparse
import pickle
from pathlib import Path

import pytest
import torch
from torch import nn

from training import checkpoint as ckpt
from training.weights import load_fitting, load_whole, model_weights, stored_args
from utils import InputError


def test_round_trip(tmp_path: Path) -> None:
    state = {'model': {'weight': torch.arange(3)}, 'epoch': 4, 'args': {'lr': 1e-3, 'model_kwargs': [('depth', 2)]}}
    ckpt.write_bytes(tmp_path / 'a.pth', ckpt.to_bytes(state))
    loaded = ckpt.load(str(tmp_path / 'a.pth'))
    assert loaded['epoch'] == 4 and torch.equal(loaded['model']['weight'], torch.arange(3))
    assert stored_args(loaded) == state['args']
    assert [path.name for path in tmp_path.iterdir()] == ['a.pth']


def test_failed_write_keeps_the_old_file(tmp_path: Path) -> None:
    path = tmp_path / 'a.pth'
    torch.save({'epoch': 1}, path)

    def fail_half_way(file: object) -> None:
        file.write(b'half')  # type: ignore[attr-defined]
        raise OSError(28, 'No space left on device')

    with pytest.raises(OSError, match='No space'):
        ckpt.write_file(path, fail_half_way)
    assert ckpt.load(str(path)) == {'epoch': 1}
    assert [entry.name for entry in tmp_path.iterdir()] == ['a.pth']


def test_new_files_have_the_usual_permissions(tmp_path: Path) -> None:
    (tmp_path / 'plain').write_text('')
    ckpt.write_bytes(tmp_path / 'a.pth', ckpt.to_bytes({}))
    assert (tmp_path / 'a.pth').stat().st_mode == (tmp_path / 'plain').stat().st_mode


def test_published_namespace_is_accepted(tmp_path: Path) -> None:
    namespace = argparse.Namespace(model='dhvt_tiny_cifar_patch4', lr=1e-3, opt_betas=None)
    torch.save({'model': {}, 'args': namespace}, tmp_path / 'a.pth')
    assert stored_args(ckpt.load(str(tmp_path / 'a.pth')))['model'] == 'dhvt_tiny_cifar_patch4'


class Malicious:
    def __init__(self, marker: Path) -> None:
        self.marker = marker

    def __reduce__(self) -> tuple[object, tuple[object, ...]]:
        return Path.touch, (self.marker,)


def test_code_is_refused_and_not_run(tmp_path: Path) -> None:
    marker = tmp_path / 'marker'
    torch.save({'model': Malicious(marker)}, tmp_path / 'a.pth')
    with pytest.raises(InputError, match=r'refused, it holds .*(Path|getattr)'):
        ckpt.load(str(tmp_path / 'a.pth'))
    assert not marker.exists()


def test_whole_pickled_model_is_refused_by_name(tmp_path: Path) -> None:
    torch.save(nn.Linear(2, 2), tmp_path / 'a.pth')
    with pytest.raises(InputError, match=r'refused, it holds torch\.nn\.modules\.linear\.Linear'):
        ckpt.load(str(tmp_path / 'a.pth'))


@pytest.mark.parametrize('content', [b'', b'not a checkpoint', pickle.dumps([1, 2]), b'PK\x03\x04 cut off'])
def test_damaged_files(tmp_path: Path, content: bytes) -> None:
    (tmp_path / 'a.pth').write_bytes(content)
    with pytest.raises(InputError) as caught:
        ckpt.load(str(tmp_path / 'a.pth'))
    assert str(tmp_path / 'a.pth') in str(caught.value) and '\n' not in str(caught.value)


def test_truncated_checkpoint(tmp_path: Path) -> None:
    torch.save({'model': {'weight': torch.randn(1000)}}, tmp_path / 'a.pth')
    content = (tmp_path / 'a.pth').read_bytes()
    (tmp_path / 'a.pth').write_bytes(content[: len(content) // 2])
    with pytest.raises(InputError, match='is damaged'):
        ckpt.load(str(tmp_path / 'a.pth'))


def test_missing_file_and_other_content(tmp_path: Path) -> None:
    with pytest.raises(InputError, match='no such checkpoint file'):
        ckpt.load(str(tmp_path / 'nothing.pth'))
    with pytest.raises(InputError, match='is a folder without'):
        ckpt.load(str(tmp_path))
    torch.save([1, 2], tmp_path / 'list.pth')
    with pytest.raises(InputError, match='holds a list'):
        ckpt.load(str(tmp_path / 'list.pth'))
    with pytest.raises(InputError, match='no model weights'):
        model_weights({'epoch': 3}, 'a.pth')


def test_urls(tmp_path: Path, web_folder: tuple[Path, str], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv('TORCH_HOME', str(tmp_path / 'hub'))
    folder, url = web_folder
    for name, epoch in (('one', 1), ('two', 2)):
        (folder / name).mkdir()
        torch.save({'epoch': epoch}, folder / name / 'checkpoint.pth')
    for name, epoch in (('one', 1), ('two', 2)):  # the same file name is not the same file
        assert ckpt.load(f'{url}/{name}/checkpoint.pth')['epoch'] == epoch
    torch.save({'epoch': 5}, folder / 'one' / 'checkpoint.pth')
    assert ckpt.load(f'{url}/one/checkpoint.pth')['epoch'] == 1  # downloaded once
    assert ckpt.load((folder / 'one' / 'checkpoint.pth').as_uri())['epoch'] == 5  # a local file is read as it is
    with pytest.raises(InputError, match='cannot download'):
        ckpt.load(f'{url}/three.pth')
    with pytest.raises(InputError, match='no such checkpoint file'):
        ckpt.load((folder / 'three.pth').as_uri())


@pytest.mark.parametrize('args', [None, 'text', [1], 3])
def test_odd_arguments_of_foreign_checkpoints(args: object) -> None:
    assert stored_args({'args': args}) == {} == stored_args({})


def test_weights_under_other_names() -> None:
    tensors = {'weight': torch.ones(2)}
    for state in (
        {'model': tensors},
        {'state_dict': tensors},
        tensors,
        {'model': {'module._orig_mod.weight': tensors['weight']}},
    ):
        assert list(model_weights(state, 'a.pth')) == ['weight']


def test_whole_load_leaves_the_model_alone_if_it_fails() -> None:
    model = nn.Sequential(nn.Linear(2, 2), nn.Linear(2, 3))
    before = {key: value.clone() for key, value in model.state_dict().items()}
    weights = {
        '0.weight': torch.ones(2, 2),
        '0.bias': torch.ones(2),
        '1.weight': torch.ones(5, 2),
        'new': torch.ones(1),
    }
    with pytest.raises(
        InputError, match=r'1 other shape \(1\.weight \(5, 2\) for \(3, 2\)\); 1 missing key \(1\.bias\)'
    ):
        load_whole(model, weights, 'a.pth')
    assert all(torch.equal(value, before[key]) for key, value in model.state_dict().items())


def test_fitting_load_lists_the_rest(capsys: pytest.CaptureFixture[str]) -> None:
    model = nn.Sequential(nn.Linear(2, 2), nn.Linear(2, 3))
    weights = {
        '0.weight': torch.ones(2, 2),
        '1.weight': torch.ones(5, 2),
        '1.bias': torch.ones(5),
        'new': torch.ones(1),
    }
    with pytest.raises(InputError, match=r'loaded 1 of 4 tensors \(26.7% of the weights\).* --allow-partial'):
        load_fitting(model, weights, 'a.pth')
    assert not torch.equal(model[0].weight, torch.ones(2, 2))
    load_fitting(model, weights, 'a.pth', partial=True)
    assert capsys.readouterr().out == (
        'a.pth: loaded 1 of 4 tensors (26.7% of the weights); new: 0.bias, 1.weight, 1.bias; '
        'of other shape: 1.weight (5, 2) for (3, 2), 1.bias (5,) for (3,); not in the model: new\n'
    )
    assert torch.equal(model[0].weight, torch.ones(2, 2))
    with pytest.raises(InputError, match='nothing in it fits'):
        load_fitting(model, {'other': torch.ones(1)}, 'a.pth')
