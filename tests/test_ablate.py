"""models/ablations.py, and tools/ablate.py, which runs the paper's tables."""

from __future__ import annotations

import csv
import json
import os
import shutil
import signal
import sys
import time
from contextlib import redirect_stderr, redirect_stdout
from pathlib import Path
from typing import Any

import pytest
import timm
import torch
from torch import nn

import models  # noqa: F401
from config.arguments import parse_args
from main import main as train
from models.ablations import create_model
from models.dhvt import DHVT
from tests.conftest import PLAIN, ROOT
from tests.processes import fork, wait
from tests.test_report import make_run
from tools import ablate
from tools.ablate import TABLES

TINY_RUN = [*PLAIN, '--data-set', 'DIGITS', '--epochs', '1', '--model-kwargs', 'embed_dim=16', 'depth=1', 'num_heads=2']
PAPER = ('5', '6', '8', '9', '10', '11', 'affines')  # tables with published figures
DEPTH, PATCHES, CLASSES = 12, 64, 100
VIT = {'stem': 'patch', 'attention': 'plain', 'feed_forward': 'mlp'}
DEIT = {**VIT, 'pos_embed': 'learn'}


def kwargs_of(row: ablate.Row) -> dict[str, Any]:
    return dict(parse_args(['--model-kwargs', *row.options.split()]).model_kwargs)


def small(**kwargs: Any) -> DHVT:
    defaults = {'embed_dim': 32, 'depth': 2, 'num_heads': 2, 'img_size': 16, 'num_classes': 7}
    return create_model('dhvt_tiny_cifar_patch4', **{**defaults, **kwargs})


def parameters(kwargs: dict[str, Any], *, width: int, heads: int) -> int:
    """Of a patch-4 model for 100 classes, from the shapes in the paper."""
    half, d, hidden, quarter = width // 2, width // heads, 4 * width, width // 4
    stem = 3 * half * 9 + 2 * half + half * width * 9 + 2 * width  # convolutions without biases, norms
    stem += 2 * 3 + 2 * width if kwargs.get('stem') != 'no-affine' else 0
    if kwargs.get('stem') == 'patch':
        stem = 3 * 16 * width + width
    attention = width * 3 * width + 3 * width + width * width + width
    if kwargs.get('attention') != 'plain':
        attention += d * width + width + 2 * d + heads * width
    kind = kwargs.get('feed_forward', 'daff')
    feed_forward = width * hidden + hidden + hidden * width + width
    if kind == 'daff':
        feed_forward += 9 * hidden + hidden + 2 * (hidden + hidden + width)  # depthwise convolution, norms
    if kwargs.get('aggregation', 'class' if kind == 'daff' else 'none') != 'none':
        feed_forward += width * quarter + quarter + quarter * width + width
    blocks = DEPTH * (attention + feed_forward + 4 * width)
    positions = (PATCHES + 1) * width if 'pos_embed' in kwargs else 0
    return stem + width + positions + blocks + 2 * width + width * CLASSES + CLASSES


@pytest.mark.parametrize('name', PAPER)
def test_parameters_of_each_row(name: str) -> None:
    table = TABLES[name]
    for row in table.rows:
        with torch.device('meta'):  # shapes alone
            model = create_model(row.model, **kwargs_of(row))
        width, heads = (192, 4) if 'tiny' in row.model else (384, 8)
        expected = parameters(kwargs_of(row), width=width, heads=kwargs_of(row).get('num_heads', heads))
        assert sum(p.numel() for p in model.parameters()) == expected, row.name
        assert 50 < row.paper < 90 and isinstance(model, DHVT)
    assert len({row.name for row in table.rows}) == len(table.rows)


def test_formulas_know_the_published_counts() -> None:
    assert parameters({}, width=192, heads=4) == 6_008_650
    assert parameters({}, width=384, heads=8) == 23_425_450
    deit = timm.create_model('deit_tiny_cifar_patch4')  # 5.4M, table 4
    assert parameters(dict(DEIT), width=192, heads=4) == sum(p.numel() for p in deit.parameters()) == 5_380_132


def test_number_of_rows() -> None:
    assert kwargs_of(TABLES['5'].rows[0]) == DEIT and kwargs_of(TABLES['10'].rows[3]) == {'num_heads': 6}
    assert kwargs_of(TABLES['9'].rows[2]) == {'shortcut': False}
    assert {name: len(TABLES[name].rows) for name in PAPER} == {
        '5': 8, '6': 4, '8': 3, '9': 3, '10': 5, '11': 12, 'affines': 2
    }  # fmt: skip
    assert [row.batch for row in TABLES['11'].rows] == [128, 256, 512] * 4


def test_the_baseline_is_deit() -> None:
    """Equal keys, outputs and gradients."""
    torch.manual_seed(0)
    sizes = {'embed_dim': 32, 'depth': 2, 'num_heads': 2, 'img_size': (16, 24), 'num_classes': 7}
    deit = timm.create_model('deit_tiny_cifar_patch4', **sizes).double().eval()
    for parameter in deit.parameters():
        nn.init.normal_(parameter, std=0.2)
    model = small(**DEIT, img_size=(16, 24)).double().eval()
    model.load_state_dict(deit.state_dict())
    images = torch.randn(2, 3, 16, 24, dtype=torch.float64)
    torch.testing.assert_close(model(images), deit(images), rtol=1e-9, atol=1e-9)
    for one in (model, deit):
        one(images).square().sum().backward()
    own = dict(model.named_parameters())
    for name, parameter in deit.named_parameters():
        torch.testing.assert_close(own[name].grad, parameter.grad, rtol=1e-7, atol=1e-9)
    with torch.no_grad():  # the fused kernel
        torch.testing.assert_close(model(images), deit(images), rtol=1e-9, atol=1e-9)


def test_spelling_the_defaults_out_changes_nothing() -> None:
    """Neither the keys nor the random draws of the initialisation nor the outputs."""
    spelt: dict[str, Any] = {
        'stem': 'sope',
        'stem_norm': 'batch',
        'attention': 'head',
        'feed_forward': 'daff',
        'aggregation': 'class',
    }
    spelt |= {'shortcut': True, 'feed_forward_norm': 'batch', 'pos_embed': 'none'}
    built = []
    for kwargs in ({}, spelt):
        torch.manual_seed(0)
        built.append(small(**kwargs).eval())
    first, second = (model.state_dict() for model in built)
    assert list(first) == list(second) and all(torch.equal(first[key], second[key]) for key in first)
    images = torch.randn(2, 3, 16, 16)
    assert torch.equal(built[0](images), built[1](images))


@pytest.mark.parametrize(
    ('kwargs', 'message'),
    [
        ({'stem': 'conv'}, "stem must be 'sope' or 'no-affine' or 'patch', not 'conv'"),
        ({'stem': 'patch', 'stem_norm': 'layer'}, "stem_norm='layer' needs stem='sope'"),
        ({'stem_norm': ''}, 'stem_norm must be'),
        ({'attention': True}, 'attention must be'),
        ({'feed_forward': 'conv'}, 'feed_forward must be'),
        ({'feed_forward': 'mlp', 'aggregation': 'class'}, "aggregation='class' needs the class token split off"),
        ({'feed_forward': 'split', 'shortcut': False}, "shortcut=False needs feed_forward='daff' or 'pool'"),
        ({'feed_forward': 'pool', 'feed_forward_norm': 'layer'}, "needs feed_forward='daff'"),
        ({'aggregation': 'patches'}, 'aggregation must be'),
        ({'shortcut': 'off'}, "shortcut must be True or False, not 'off'"),
        ({'shortcut': 0}, 'shortcut must be'),
        ({'pos_embed': 'sine'}, "pos_embed must be 'none' or 'learn'"),
        ({'stem': 'patch', 'img_size': 18}, 'not divisible by patch size 4'),
        ({'attention': 'plain', 'num_heads': 3}, 'not divisible by 3 heads'),
    ],
)
def test_options_that_make_no_model_are_refused(kwargs: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        small(**kwargs)


def test_position_embedding_refuses_another_grid() -> None:
    model = small(pos_embed='learn', img_size=(16, 24))
    assert 'pos_embed' in model.no_weight_decay() and model.pos_embed.shape == (1, 25, 32)
    assert model.pos_embed.std().item() == pytest.approx(0.02, rel=0.2)
    assert model(torch.randn(2, 3, 16, 24)).shape == (2, 7)
    for refuse in (lambda: model(torch.randn(2, 3, 24, 16)), lambda: model.set_input_size(32)):
        with pytest.raises(ValueError, match='position embedding is for 4x6 patches, not'):
            refuse()
    model.set_input_size((16, 24))
    distilled = create_model('dhvt_tiny_cifar_patch4_distilled', pos_embed='learn', **VIT)
    assert distilled.pos_embed.shape == (1, 66, 192) and distilled(torch.randn(1, 3, 32, 32)).shape == (1, 100)


def feed_forward(**kwargs: Any) -> nn.Module:
    torch.manual_seed(0)
    module = small(**kwargs).double().eval().blocks[0].mlp
    for parameter in module.parameters():
        nn.init.normal_(parameter, std=0.3)
    return module


def test_class_token_passes_by() -> None:
    tokens = torch.randn(2, 17, 32, dtype=torch.float64)
    for kwargs in ({'feed_forward': 'split'}, {'feed_forward': 'pool'}, {'aggregation': 'none'}):
        module = feed_forward(**kwargs)
        assert torch.equal(module(tokens, (4, 4))[:, 0], tokens[:, 0])
        assert not hasattr(module, 'excitation')
    split = feed_forward(feed_forward='split')
    hidden = nn.functional.gelu(tokens[:, 1:] @ split.fc1.weight.T + split.fc1.bias)
    torch.testing.assert_close(split(tokens, (4, 4))[:, 1:], hidden @ split.fc2.weight.T + split.fc2.bias)


@pytest.mark.parametrize('kind', ['daff', 'split', 'pool'])
def test_aggregation(kind: str) -> None:
    """The same channel weights, made from the patch tokens that leave, on nothing, the class token, or every token."""
    tokens = torch.randn(2, 17, 32, dtype=torch.float64)
    on_class = feed_forward(feed_forward=kind, aggregation='class')
    on_all, none = (feed_forward(feed_forward=kind, aggregation=target) for target in ('all', 'none'))
    on_all.load_state_dict(on_class.state_dict())
    none.load_state_dict(on_class.state_dict(), strict=False)
    plain = none(tokens, (4, 4))
    mean = plain[:, 1:].mean(dim=1)
    weight = on_class.excitation(nn.functional.gelu(on_class.compress(mean)))[:, None]
    torch.testing.assert_close(on_class(tokens, (4, 4)), torch.cat([plain[:, :1] * weight, plain[:, 1:]], dim=1))
    torch.testing.assert_close(on_all(tokens, (4, 4)), plain * weight)


def test_average_pooling_and_shortcuts() -> None:
    """What a patch's neighbours add: a ninth of each of the 3x3, between the layers."""
    tokens = torch.randn(2, 13, 32, dtype=torch.float64)
    with_it, without = (feed_forward(feed_forward='pool', shortcut=shortcut) for shortcut in (True, False))
    without.load_state_dict(with_it.state_dict())
    hidden = nn.functional.gelu(with_it.fc1(tokens[:, 1:])).reshape(2, 3, 4, 128)
    padded = nn.functional.pad(hidden, (0, 0, 1, 1, 1, 1))
    means = sum(padded[:, i : i + 3, j : j + 4] for i in range(3) for j in range(3)) / 9
    for module, x in ((with_it, hidden + means), (without, means)):
        torch.testing.assert_close(module(tokens, (3, 4))[:, 1:], with_it.fc2(x.reshape(2, 12, 128)))
    daff, cut = feed_forward(), feed_forward(shortcut=False)
    cut.load_state_dict(daff.state_dict())
    with torch.no_grad():
        for module in (daff, cut):
            module.conv2.weight.zero_()
            module.conv2.bias.zero_()
            module.bn2.bias.zero_()
    assert daff(tokens, (3, 4))[:, 1:].std(dim=1).min() > 0  # without the convolution nothing is left of the patches
    assert cut(tokens, (3, 4))[:, 1:].std(dim=1).max() < 1e-12


@pytest.mark.parametrize('options', [{'stem_norm': 'layer'}, {'feed_forward_norm': 'layer'}])
def test_layer_norm_is_by_position(options: dict[str, str]) -> None:
    """Nothing of another image or position enters a norm, and there is nothing to keep from batch to batch."""
    model = small(**options).train()
    part = model.patch_embed if 'stem_norm' in options else model.blocks[0].mlp
    assert not list(part.buffers())
    norms = [module for module in part.modules() if isinstance(module, nn.LayerNorm)]
    assert len(norms) == (2 if 'stem_norm' in options else 3) and all(norm.eps == 1e-6 for norm in norms)
    maps = torch.randn(2, norms[0].normalized_shape[0], 3, 3)
    result = norms[0](maps)
    torch.testing.assert_close(result.mean(dim=1), torch.zeros(2, 3, 3), atol=1e-5, rtol=0)
    torch.testing.assert_close(norms[0](maps[:1, :, :1, :1]), result[:1, :, :1, :1])
    assert model(torch.randn(2, 3, 16, 16)).shape == (2, 7)


def test_every_row_trains_every_parameter() -> None:
    for table in TABLES.values():
        for row in table.rows:
            model = small(**{**kwargs_of(row), 'num_heads': 2}).train()
            model.set_grad_checkpointing()
            model(torch.randn(4, 3, 16, 16)).square().mean().backward()
            idle = {name for name, p in model.named_parameters() if not p.grad.any()}
            # Without aggregation nothing leads from the last feed-forward on patch tokens to the class token.
            split = kwargs_of(row).get('feed_forward') in ('split', 'pool') and 'aggregation' not in kwargs_of(row)
            assert idle == (
                {f'blocks.1.mlp.fc{i}.{kind}' for i in (1, 2) for kind in ('weight', 'bias')} if split else set()
            )


# The program


def run(capsys: pytest.CaptureFixture, *argv: str) -> tuple[int, str, str]:
    code = 0
    try:
        ablate.main([str(arg) for arg in argv])
    except SystemExit as stop:
        code = int(stop.code or 0)
    captured = capsys.readouterr()
    return code, captured.out, captured.err


def test_flags(tmp_path: Path, capsys: pytest.CaptureFixture) -> None:
    code, out, _ = run(capsys, '11', '--seeds', '5', '--output', tmp_path, '--nproc', '2', '--dry-run', '--lr', '2e-3')
    commands = out.splitlines()
    assert code == 0 and len(commands) == 12 and all('--nproc_per_node 2' in command for command in commands)
    assert '--lr 1e-3' in commands[0] and commands[0].index('--lr 1e-3') < commands[0].index('--lr 2e-3')
    assert '--batch-size 64 ' in commands[0] and '--epochs 300' in commands[0] and '--warmup-epochs 10' in commands[0]
    assert '--model-kwargs stem_norm=layer feed_forward_norm=batch' in commands[6]
    for argv, message in (
        (['7'], 'invalid choice'),
        (['6', '--nproc', '3'], 'does not divide 512'),
        (['6', '--epoch', '1'], 'unrecognized arguments: --epoch 1'),
        (['6', '--seed', '1'], '--seed is set by ablate.py'),
        (['6', '--folds', '5', '--fold', '1'], '--fold is set by ablate.py'),
        (['6', '--folds', '1'], '--folds 1 leaves nothing to train with'),
        (['6', '--output_dir=x'], '--output_dir is set by ablate.py'),
        (['6', '-cother.yaml'], '-cother.yaml is set by ablate.py'),
        (['11', '--batch_size', '64'], "--batch_size is set by this table's rows"),
        (['10', '--model', 'dhvt_tiny_cifar_patch2'], "--model is set by this table's rows"),
        (['10', '--model-kwargs', 'num_heads=2'], "num_heads=2: this is set by this table's rows"),
        (['fast', '--model-kwargs', 'embed_dim=192'], "embed_dim=192: this is set by this table's rows"),
        (['fast', '--no-repeated-aug'], "--no-repeated-aug is set by this table's rows"),
        (['fast', '--sched_on_updates'], "--sched_on_updates is set by this table's rows"),
        (['6', '--show', '--outptu', 'x'], '--outptu changes nothing'),
        (['6', '--model-kwargs', 'heads=2'], 'refuses its arguments'),
    ):
        code, _, err = run(capsys, *argv, '--output', tmp_path / 'x')
        assert code == 2 and message in err and err.count('\n') == 1, err
    code, _, err = run(capsys, '6', '--show', '--output', tmp_path / 'x')
    assert code == 1 and 'no such folder' in err and not (tmp_path / 'x').exists()


def run_inside(self: ablate.Child, command: list[str], *, log: Path, **_: object) -> int:
    """main.py without a process of its own, which takes seconds to start."""
    assert command[1] == str(ROOT / 'main.py')
    with log.open('a') as file, redirect_stdout(file), redirect_stderr(file):
        if (log.parent / 'fail').exists():
            print('main.py: error: told to fail')
            return 1
        try:
            train(command[2:])
        except SystemExit as stop:
            return int(stop.code or 0)
    return 0


def test_a_table(tmp_path: Path, capsys: pytest.CaptureFixture, monkeypatch: pytest.MonkeyPatch) -> None:
    """Runs, does not repeat what is finished, names what fails, refuses other flags."""
    monkeypatch.setattr(ablate.Child, 'run', run_inside)
    output = tmp_path / 'table'
    argv = ['affines', '--output', output, *TINY_RUN]
    code, out, err = run(capsys, *argv, '--seeds', '0')
    assert code == 0, err
    folders = [output / '1-with-both-affines-dhvt-t', output / '2-without']
    lines = [json.loads((folder / 'seed0' / 'log.txt').read_text()) for folder in folders]
    assert lines[0]['n_parameters'] - lines[1]['n_parameters'] == 2 * (3 + 16)
    first = [(folder / 'seed0' / 'console.log').stat().st_mtime_ns for folder in folders]

    (folders[1] / 'seed1').mkdir()
    (folders[1] / 'seed1' / 'fail').touch()
    code, out, err = run(capsys, *argv, '--seeds', '0', '1')
    log = folders[1] / 'seed1' / 'console.log'
    assert code == 1 and 'run 4 of 4: without, seed 1 ended with exit code 1' in err and str(log) in err
    assert "'main.py: error: told to fail'" in err and err.count('\n') == 1
    (folders[1] / 'seed1' / 'checkpoint.pth').write_bytes(b'not one')
    code, _, err = run(capsys, *argv, '--seeds', '0', '1')
    assert code == 1 and 'seed1/checkpoint.pth' in err and err.count('\n') == 1
    shutil.rmtree(folders[1] / 'seed1')
    assert out.count('finished before') == 2
    assert first == [(folder / 'seed0' / 'console.log').stat().st_mtime_ns for folder in folders]

    shutil.copytree(folders[0] / 'seed0', folders[0] / 'seed0-old')  # a copy is no run of its own
    code, out, _ = run(capsys, 'affines', '--show', '--output', output)
    assert code == 0 and out == (output / 'table.md').read_text() and 'Here: DIGITS, 1 epoch.' in out
    own = [json.loads((folders[0] / f'seed{seed}' / 'log.txt').read_text())['max_accuracy'] for seed in (0, 1)]
    mean, spread = sum(own) / 2, abs(own[0] - own[1]) / 2**0.5
    assert f'| 2 | {mean:.2f} ± {spread:.2f} | {max(own):.2f} | 80.90 |' in out
    assert f'| 1 | {lines[1]["max_accuracy"]:.2f} | {lines[1]["max_accuracy"]:.2f} | 80.72 |' in out
    with (output / 'table.csv').open() as file:
        rows = list(csv.DictReader(file))
    assert [float(row['paper']) for row in rows] == [80.90, 80.72] and rows[1]['options'] == 'stem=no-affine'
    assert float(rows[0]['sd']) == pytest.approx(spread) and rows[1]['sd'] == ''
    assert all((output / name).read_bytes()[:4] == b'\x89PNG' for name in ('table.png', 'curves.png'))

    code, _, err = run(capsys, *argv, '--seeds', '0', '--epochs', '2')
    assert code == 1 and '--epochs was 1, is 2' in err and 'Choose another --output' in err


def test_folds(tmp_path: Path, capsys: pytest.CaptureFixture, monkeypatch: pytest.MonkeyPatch) -> None:
    """A run for each fold, each with its own part held out; they count with their accuracy on the test images."""
    monkeypatch.setattr(ablate.Child, 'run', run_inside)
    argv = ['affines', '--output', tmp_path, *TINY_RUN, '--batch-size', '256', '--seeds', '3', '--folds', '2']
    code, out, err = run(capsys, *argv)
    assert code == 0 and 'run 3 of 4: with both affines (DHVT-T), seed 3, fold 1 of 2' in out, err
    folders = [tmp_path / '1-with-both-affines-dhvt-t' / f'seed3-fold{fold}of2' for fold in range(2)]
    for fold, folder in enumerate(folders):
        settings = ablate.read_run(folder).args
        assert (settings['seed'], settings['fold'], settings['folds']) == (3, fold, 2)
    tested = [json.loads((folder / 'test.json').read_text())['acc1'] for folder in folders]
    mean, spread = sum(tested) / 2, abs(tested[0] - tested[1]) / 2**0.5
    assert f'| 2 | {mean:.2f} ± {spread:.2f} | {max(tested):.2f} |' in out and 'DIGITS, 1 epoch, 2 folds.' in out
    code, out, _ = run(capsys, *argv)
    assert code == 0 and out.count('finished before') == 4
    code, _, err = run(capsys, *argv[:-2])
    assert code == 1 and 'has a run of other folds' in err


def test_a_table_of_recipes(tmp_path: Path, capsys: pytest.CaptureFixture, monkeypatch: pytest.MonkeyPatch) -> None:
    """Rows that differ in flags of main.py, without published figures; each has what its runs cost."""
    table = ablate.read_table(
        'Recipes', ' '.join([*PLAIN, '--data-set DIGITS --epochs 1 --batch-size 7']), [{'name': 'slow', 'paper': None},
        {'name': 'fast', 'flags': '--epochs 2 --lr=2e-3', 'batch': 128}], fixed='--sched',
        model='dhvt_tiny_cifar_patch4', batch=256,
    )  # fmt: skip
    assert table.fixed == {'--epochs', '--lr', '--sched'}
    monkeypatch.setitem(TABLES, 'recipes', table)
    monkeypatch.setattr(ablate.Child, 'run', run_inside)
    argv = ['recipes', '--seeds', '0', '--output', tmp_path, '--model-kwargs', 'embed_dim=16', 'depth=1', 'num_heads=2']
    code, _, err = run(capsys, *argv, '--epochs', '3')
    assert code == 2 and "--epochs is set by this table's rows" in err
    code, out, err = run(capsys, *argv)
    assert code == 0 and 'paper' not in out and 'Here: DIGITS, 1 epoch; DIGITS, 2 epochs.' in out, err
    for number, name, epochs, batch, lr in ((1, 'slow', 1, 256, 5e-4), (2, 'fast', 2, 128, 2e-3)):
        folder = tmp_path / f'{number}-{name}' / 'seed0'
        args = ablate.read_run(folder).args
        assert (args['epochs'], args['batch_size'], args['lr']) == (epochs, batch, lr)
        timings = [json.loads(line) for line in (folder / 'timing.txt').read_text().splitlines()]
        images = sum(line['train_images'] for line in timings)
        seconds = round(sum(line['train_seconds'] + line['test_seconds'] for line in timings))
        assert images >= 1280 * epochs and f'| {images:,} | 0:00:{seconds:02d} |' in out
    with (tmp_path / 'table.csv').open() as file:
        rows = list(csv.DictReader(file))
    assert [row['flags'] for row in rows] == ['', '--epochs 2 --lr=2e-3'] and rows[1]['paper'] == ''
    assert float(rows[1]['images']) == images


def test_progress_of_the_run(tmp_path: Path, capsys: pytest.CaptureFixture, monkeypatch: pytest.MonkeyPatch) -> None:
    """What a run has behind it and what it printed last, while it runs; a log that is damaged by then does no harm."""
    lines = make_run(tmp_path / 'seed0', done=3)
    monkeypatch.setattr(ablate, 'LOOK_EVERY', 0.05)
    monkeypatch.setattr(ablate, 'LINE_EVERY', 0.0)
    script = 'import time; print("Epoch 3 [ 10/196]", flush=True); time.sleep(1); open("log.txt", "w").write("{"); '
    script = f'import os; os.chdir({str(tmp_path / "seed0")!r}); {script}time.sleep(0.3); exit(3)'
    monkeypatch.setattr(ablate, 'command_of', lambda *_: [sys.executable, '-c', script])
    with pytest.raises(ablate.InputError, match='run 1 of 2 ended with exit code 3'):
        ablate.run_one('run 1 of 2', [], folder=tmp_path / 'seed0', nproc=1)
    best = max(line['test_acc1'] for line in lines)
    expected = f'run 1 of 2: 3 of 12 epochs, best top-1 {best:.2f}%; Epoch 3 [ 10/196]'
    assert expected in capsys.readouterr().out.splitlines()


def test_the_papers_marks_are_for_the_papers_data(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    drawn: list[list[float]] = []
    draw = ablate.draw_rows

    def keep(title: str, bars: dict[str, list[float]], paper: list[float]) -> Any:
        drawn.append(paper)
        return draw(title, bars, paper)

    monkeypatch.setattr(ablate, 'draw_rows', keep)
    for data_set in ('CIFAR', 'CIFAR10'):
        folder = ablate.row_folder(tmp_path / data_set, TABLES['affines'], TABLES['affines'].rows[0])
        make_run(folder / 'seed0', data_set=data_set)
        text = ablate.write_table(TABLES['affines'], tmp_path / data_set)
        assert f'Here: {data_set}, 12 epochs.' in text and '| 80.90 |' in text
    assert drawn == [[80.90, 80.72], []]


def test_a_signal_reaches_the_run_once(
    tmp_path: Path, capsys: pytest.CaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Ctrl-C, which a terminal sends to the whole group: a checkpoint, exit code 130, and the same command goes on."""
    argv = ['affines', '--seeds', '0', '--output', str(tmp_path), *TINY_RUN]
    argv += ['--epochs', '2', '--checkpoint-every', '1', '--batch-size', '8', '--train-fraction', '0.4']
    errors = tmp_path / 'errors'

    def ablate_in_a_session() -> None:
        os.setsid()
        ablate.main(argv)

    with open(os.devnull, 'w') as null, errors.open('w') as file:
        process = fork(ablate_in_a_session, null.fileno(), file.fileno())
    run_folder = tmp_path / '1-with-both-affines-dhvt-t' / 'seed0'
    end = time.monotonic() + 120
    while not (run_folder / 'checkpoint.pth').exists() and time.monotonic() < end:
        time.sleep(0.05)
    os.killpg(process, signal.SIGINT)
    (code,), err = wait([process]), errors.read_text()
    assert code == 130 and err.count('\n') == 1, err
    assert 'SIGINT in run 1 of 2: with both affines' in err and 'the same command goes on from there' in err
    assert 'SIGINT in epoch' in (run_folder / 'console.log').read_text()
    assert not (tmp_path / '2-without').exists()
    monkeypatch.setattr(ablate.Child, 'run', run_inside)
    code, out, err = run(capsys, *argv)
    assert code == 0, err
    assert 'Resumed from' in (run_folder / 'console.log').read_text()
    assert len((run_folder / 'log.txt').read_text().splitlines()) == 2 and '2-without' in out
