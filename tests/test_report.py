"""tools/report.py: what the page shows is what the runs' files say and what their checkpoints answer."""

from __future__ import annotations

import base64
import io
import json
import os
import re
import shutil
import sys
import time
from collections.abc import Callable
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import yaml
from matplotlib.figure import Figure
from PIL import Image
from torch import nn

from config.arguments import parse_args
from datasets import load_digits
from engine import forward
from main import main as train
from pipeline.transforms import build_transform
from reports import figures as report_figures
from reports import predictions, runs
from reports.page import make as make_page
from tests.conftest import PLAIN, SMALL_MODEL
from tests.test_deit_evit import EVIT
from tests.test_engine import data, linear, loader
from tests.test_engine import train as train_linear
from tools import report
from training import checkpoint as ckpt
from utils import EpochSums

DIGITS = [*SMALL_MODEL, *PLAIN, '--data-set', 'DIGITS', '--batch-size', '64', '--lr', '8e-3', '--report']
VOID = {'meta', 'img', 'br'}


class Page(HTMLParser):
    """A report, parsed: its pictures, the text and the table rows of each section."""

    def __init__(self, path: Path) -> None:
        super().__init__()
        self.open: list[str] = []
        self.images: dict[str, Image.Image] = {}
        self.bytes: dict[str, bytes] = {}
        self.rows: dict[str, list[list[str]]] = {}
        self.words: dict[str, str] = {}
        self.section = 'head'
        self.source = path.read_text(encoding='utf-8')
        self.feed(self.source)
        self.close()
        assert not self.open

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        found = {name: value or '' for name, value in attrs}
        assert tag not in ('script', 'link', 'iframe', 'object', 'form') and 'href' not in found
        assert not any(name.startswith('on') for name in found)
        if tag not in VOID:
            self.open.append(tag)
        if tag == 'section':
            self.section = found['id']
        if tag == 'img':
            kind, _, text = found['src'].partition(';base64,')
            assert kind in ('data:image/png', 'data:image/jpeg')
            self.bytes[found['alt']] = base64.b64decode(text, validate=True)
            self.images[found['alt']] = Image.open(io.BytesIO(self.bytes[found['alt']])).convert('RGB')
        if tag == 'tr':
            self.rows.setdefault(self.section, []).append([])
        if tag in ('td', 'th'):
            self.rows[self.section][-1].append('')

    def handle_endtag(self, tag: str) -> None:
        assert self.open.pop() == tag

    def handle_data(self, text: str) -> None:
        if self.open and self.open[-1] == 'style':
            assert '@import' not in text and 'url(' not in text
            return
        self.words[self.section] = self.words.get(self.section, '') + text
        if {'td', 'th'} & set(self.open):
            self.rows[self.section][-1][-1] += text

    def tiles(self) -> dict[str, str]:
        lines = [line.strip() for line in self.words['summary'].splitlines()]
        labels = ('best test accuracy', 'last test accuracy', 'best moving average', 'last loss, train / test',
                  'parameters', 'images a second, median', 'training time lost to data')  # fmt: skip
        return {label: line.removeprefix(label) for label in labels for line in lines if line.startswith(label)}


def make_run(folder: Path, *, planned: int = 12, done: int | None = None, seed: int = 0, **args: Any) -> list[dict]:
    """The files of a run with made-up numbers; returns the lines of its log."""
    rng = np.random.default_rng([seed, planned, int(100 * args.get('lr', 0.5))])
    folder.mkdir(parents=True)
    settings = {'model': 'dhvt_tiny_cifar_patch4', 'model_kwargs': [['embed_dim', 32], ['depth', 1], ['num_heads', 2]],
                'input_size': 16, 'data_set': 'DIGITS', 'epochs': planned, 'cooldown_epochs': 0, 'lr': 0.5,
                'output_dir': str(folder), 'seed': seed, **args}  # fmt: skip
    derived = {'nb_classes': 10, 'data': 'a-b', 'total_batch': 64, 'precision': 'float32', 'train_mode': True}
    (folder / 'args.yaml').write_text(yaml.safe_dump({**settings, 'derived': {**derived, 'lr_scaled': 0.0625}}))
    lines, timings = [], []
    for epoch in range(planned if done is None else done):
        line = {f'{kind}_{name}': float(rng.uniform(0, high)) for kind in ('test', 'ema_test')
                for name, high in (('loss', 2), ('acc1', 90), ('acc5', 100))}  # fmt: skip
        line |= {'train_loss': float(rng.uniform(0, 3)), 'train_lr': 0.1, 'train_grad_norm': float(rng.uniform(1, 2))}
        lines.append({**line, 'epoch': epoch, 'n_parameters': 12345})
        seconds = float(rng.uniform(5, 9))
        timings.append({'epoch': epoch, 'train_images': 1408, 'train_seconds': seconds, 'data_seconds': seconds / 4,
                        'test_seconds': 1.0})  # fmt: skip
    for name, entries in (('log.txt', lines), ('timing.txt', timings)):
        (folder / name).write_text(''.join(json.dumps(entry) + '\n' for entry in entries))
    return lines


@pytest.fixture
def drawn(monkeypatch: pytest.MonkeyPatch) -> dict[str, Figure]:
    """The figures that are drawn from here on, by name."""
    figures: dict[str, Figure] = {}
    save = report_figures._save

    def keep(figure: Figure, name: str, *args: Any, **kwargs: Any) -> report_figures.Picture:
        figures[name] = figure
        return save(figure, name, *args, **kwargs)

    monkeypatch.setattr(report_figures, '_save', keep)
    return figures


def fails(argv: list[str], capsys: pytest.CaptureFixture[str]) -> tuple[int, str]:
    capsys.readouterr()
    with pytest.raises(SystemExit) as caught:
        report.main(argv)
    error = capsys.readouterr().err
    assert error.count('\n') == 1 and 'Traceback' not in error, error
    assert isinstance(caught.value.code, int)
    return caught.value.code, error


# Logs


def test_page_and_figures_are_the_logs(tmp_path: Path, drawn: dict[str, Figure]) -> None:
    lines = make_run(tmp_path / 'run')
    timings = [json.loads(line) for line in (tmp_path / 'run' / 'timing.txt').read_text().splitlines()]
    made = make_page([tmp_path / 'run'])
    assert made == tmp_path / 'run' / 'report.html'
    page = Page(made)
    accuracy, average = ([line[name] for line in lines] for name in ('test_acc1', 'ema_test_acc1'))
    rate = np.median([1408 / line['train_seconds'] for line in timings])
    tiles = page.tiles()
    assert tiles['best test accuracy'] == f'{max(accuracy):.2f}% epoch {np.argmax(accuracy)}'
    assert tiles['last test accuracy'] == f'{accuracy[-1]:.2f}% epoch 11'
    assert tiles['best moving average'] == f'{max(average):.2f}% epoch {np.argmax(average)}'
    assert tiles['last loss, train / test'] == f'{lines[-1]["train_loss"]:.4f} / {lines[-1]["test_loss"]:.4f}'
    assert tiles['images a second, median'] == f'{rate:,.0f}' and tiles['training time lost to data'] == '25.0%'
    assert 'not finished' not in page.source and 'has no best_checkpoint.pth' in page.words['predictions']
    markup = re.sub('data:[^"]*', '', page.source)
    assert 'http' not in markup and '//' not in markup and 'src=""' in markup

    for name, columns in (
        ('accuracy', ['test_acc1', 'ema_test_acc1']),
        ('loss', ['train_loss', 'test_loss', 'ema_test_loss']),
        ('learning_rate', ['train_lr']),
        ('grad_norm', ['train_grad_norm']),
    ):
        curves = drawn[name].axes[0].lines
        for column, curve in zip(columns, curves, strict=False):
            assert list(curve.get_xdata()) == list(range(12))
            assert list(curve.get_ydata()) == [line[column] for line in lines]
    assert list(drawn['accuracy'].axes[0].lines[2].get_ydata()) == [max(accuracy)]  # the star
    assert list(drawn['throughput'].axes[0].lines[0].get_ydata()) == [1408 / line['train_seconds'] for line in timings]
    heights = [bar.get_height() for bar in drawn['time'].axes[0].patches]
    assert sum(heights) == pytest.approx(sum(line['train_seconds'] + 1 for line in timings))
    assert sum(heights[12:24]) == pytest.approx(sum(line['data_seconds'] for line in timings))
    files = sorted(path.stem for path in (tmp_path / 'run' / 'report_figures').iterdir())
    assert files == sorted(drawn) == ['accuracy', 'grad_norm', 'learning_rate', 'loss', 'throughput', 'time']
    assert {(tmp_path / 'run/report_figures' / f'{name}.png').read_bytes() for name in files} == {*page.bytes.values()}


@pytest.mark.parametrize(('planned', 'done'), [(300, 0), (1, 1), (300, 37), (300, 300)])
def test_any_length(tmp_path: Path, drawn: dict[str, Figure], planned: int, done: int) -> None:
    make_run(tmp_path / 'run', planned=planned, done=done)
    if not done:
        (tmp_path / 'run' / 'log.txt').unlink()
    page = Page(make_page([tmp_path / 'run']))
    assert f'{done or "none"} of {planned} epochs' in page.words['head']
    assert ('not finished' in page.words['head']) == (done < planned)
    assert bool(drawn) == bool(done) and ('nothing to draw' in page.words['curves']) == (not done)
    for name in drawn:
        low, high = drawn[name].axes[0].get_xlim()
        assert low < 0 and high > done - 1 and high - low < 1.2 * done + 2
    assert ('%' in page.tiles()['best test accuracy']) == bool(done)
    assert len(page.images) == len(drawn)


def test_numbers_that_are_none(tmp_path: Path) -> None:
    """Words stand for infinity and NaN in the log; steps that were left out are named."""
    lines = make_run(tmp_path / 'run', planned=3)
    lines[1] |= {'train_grad_norm': 'inf', 'test_acc1': 'nan', 'train_skipped_steps': 7}
    (tmp_path / 'run' / 'log.txt').write_text(''.join(json.dumps(line) + '\n' for line in lines))
    (tmp_path / 'run' / 'non_finite_epoch1_step3.json').write_text('{}')
    page = Page(make_page([tmp_path / 'run']))
    best = max((lines[epoch]['test_acc1'], epoch) for epoch in (0, 2))
    assert page.tiles()['best test accuracy'] == f'{best[0]:.2f}% epoch {best[1]}'
    assert 'left out 7 steps' in page.words['head'] and '1 non_finite_' in page.words['head']


# Several runs


def test_statistics_over_seeds(tmp_path: Path, drawn: dict[str, Figure], monkeypatch: pytest.MonkeyPatch) -> None:
    logs = {f's{seed}': make_run(tmp_path / f's{seed}', seed=seed) for seed in range(5)}
    make_run(tmp_path / 'cut', seed=5, done=3)
    make_run(tmp_path / 'zagain', seed=0, output_dir='elsewhere', num_workers=3, device='cuda')
    logs |= {f'other{seed}': make_run(tmp_path / f'other{seed}', seed=seed, lr=0.25) for seed in range(2)}
    monkeypatch.chdir(tmp_path)
    report.main([*map(str, sorted(tmp_path.iterdir())), '--no-predictions'])
    page = Page(tmp_path / 'report.html')
    rows = page.rows['seeds'][1:]
    assert len(rows) == 8
    for group, label, seeds in (('s', 'lr 0.5', '0, 1, 2, 3, 4'), ('other', 'lr 0.25', '0, 1')):
        own = [log for name, log in logs.items() if name.startswith(group)]
        found = {row[1]: row for row in rows if row[0] == label}
        for name, values in (
            ('test accuracy, best epoch', [max(line['test_acc1'] for line in log) for log in own]),
            ('test accuracy, last epoch', [log[-1]['test_acc1'] for log in own]),
            ('moving average, best epoch', [max(line['ema_test_acc1'] for line in log) for log in own]),
            ('moving average, last epoch', [log[-1]['ema_test_acc1'] for log in own]),
        ):
            text = f'{np.mean(values):.2f} ± {np.std(values, ddof=1):.2f}'
            assert found[name][2:] == [f'{len(own)} ({seeds})', text, f'{max(values):.2f}', f'{min(values):.2f}']
    notes = page.words['head']
    assert 'cut is not counted over the seeds' in notes and ' once more' in notes
    header, *differences = page.rows['differences']
    assert header == ['run', 'lr', 'seed'] and ['other1', '0.25', '1'] in differences and len(differences) == 9
    folders = {path.name for path in tmp_path.iterdir() if path.is_dir()} - {'report_figures'}
    assert {row[0] for row in page.rows['summary'][1:]} == folders
    colors = {curve.get_color() for curve in drawn['learning_rate'].axes[0].lines}
    assert len(colors) == 2  # one a group
    assert [text.get_text().strip() for text in drawn['grad_norm'].axes[0].get_legend().texts] == ['lr 0.5', 'lr 0.25']
    best = max(logs, key=lambda name: max(line['test_acc1'] for line in logs[name]))
    assert f'The best is {best}.' in page.words['head']


def test_what_a_person_varied(tmp_path: Path) -> None:
    """No hashes, and of paths what tells them apart; derived values only where no argument explains them."""
    given = [{'finetune': f'/data/models/{name}/best_checkpoint.pth', 'batch_size': size} for name, size in
             (('a', 64), ('b', 64), ('b', 128))]  # fmt: skip
    for number, args in enumerate(given):
        make_run(tmp_path / f'run{number}', **args)
        settings = yaml.safe_load((tmp_path / f'run{number}' / 'args.yaml').read_text())
        settings['derived'] |= {'data': f'{number:040x}', 'total_batch': args['batch_size'], 'lr_scaled': number / 7}
        (tmp_path / f'run{number}' / 'args.yaml').write_text(yaml.safe_dump(settings))
    found = runs.read_runs([tmp_path / f'run{number}' for number in range(3)])
    assert runs.find_differences(found) == {
        'finetune': ['a', 'b', 'b'], 'batch_size': ['64', '64', '128'], 'data': ['no. 1', 'no. 2', 'no. 3'],
    }  # fmt: skip
    assert len(runs.group_by_settings(found)) == 3
    for one in found:
        one.args['data_path'] = f'/disks/{one.name}/images'
    assert 'data' not in runs.find_differences(found)
    for number, one in enumerate(found):
        one.args |= {'data_path': 'images', 'folds': 3, 'fold': number}
    assert 'data' not in runs.find_differences(found) and runs.find_differences(found)['fold'] == ['0', '1', '2']


def test_a_whole_number_is_the_same_setting_as_a_float(tmp_path: Path) -> None:
    """As args.yaml gives one back."""
    for name, epochs in (('a', 30), ('b', 30.0)):
        make_run(tmp_path / name, decay_epochs=epochs)
    found = runs.read_runs([tmp_path / 'a', tmp_path / 'b'])
    assert not runs.find_differences(found) and len(runs.group_by_settings(found)) == 1


def test_columns_that_no_run_has_are_left_out(tmp_path: Path) -> None:
    for number in range(2):
        lines = make_run(tmp_path / str(number), seed=number)
        kept = [{name: value for name, value in line.items() if 'ema' not in name} for line in lines]
        (tmp_path / str(number) / 'log.txt').write_text(''.join(json.dumps(line) + '\n' for line in kept))
    page = Page(make_page([tmp_path / '0']))
    assert 'best moving average' not in page.source and 'best test accuracy' in page.tiles()
    page = Page(make_page([tmp_path / '0', tmp_path / '1'], out=tmp_path / 'two.html'))
    assert 'best moving average' not in page.source and len({len(row) for row in page.rows['summary']}) == 1


def hold_out(folder: Path, acc1: float, *, average: bool | None = None) -> None:
    """Makes a made-up run one that chose its best epoch on held-out images."""
    settings = yaml.safe_load((folder / 'args.yaml').read_text())
    settings['derived']['best_chosen_on'] = 'held-out images'
    (folder / 'args.yaml').write_text(yaml.safe_dump({**settings, 'val_fraction': 0.1}))
    result = {'epoch': 4, 'weights': 'model_ema' if average else 'model', 'acc1': acc1, 'images': 360}
    (folder / 'test.json').write_text(json.dumps(result, indent=1))
    if average is not None:
        lines = [{**json.loads(line), 'best_is_ema': int(average)} for line in (folder / 'log.txt').open()]
        (folder / 'log.txt').write_text(''.join(json.dumps(line) + '\n' for line in lines))


def test_held_out_images(tmp_path: Path, drawn: dict[str, Figure], capsys: pytest.CaptureFixture[str]) -> None:
    """What chose the best epoch is named so, and the test accuracy is that of test.json; else all is as it was."""
    folders = [tmp_path / str(number) for number in range(3)]
    logs = [make_run(folder, seed=number) for number, folder in enumerate(folders)]
    (folders[2] / 'test.json').write_text('{"acc1": 1}')  # no run without a split has one, so nothing reads it
    for number, average in enumerate([True, False]):
        hold_out(folders[number], 12.5 + number, average=average)
    page = Page(make_page(folders[:1]))
    best = max(line['test_acc1'] for line in logs[0])
    words = ' '.join(page.words['summary'].split())
    assert f'best held-out accuracy{best:.2f}% epoch' in words and 'last held-out accuracy' in words
    assert 'test accuracy12.50% epoch 4; the moving average' in words and '; the average was best' in words
    assert 'train / held-out' in words and 'best test accuracy' not in page.source
    assert 'chosen on held-out images' in page.words['head'] and 'Held-out accuracy by epoch' in page.images
    star = drawn['accuracy'].axes[0].lines[2].get_ydata()
    assert list(star) == [max(line['ema_test_acc1'] for line in logs[0])]

    page = Page(make_page(folders[:2], out=tmp_path / 'two.html'))
    head, *rows = page.rows['summary']
    assert [row[head.index('test accuracy')][:6] for row in rows] == ['12.50%', '13.50%']
    assert '; the model was best' in rows[1][head.index('best moving average')]
    found = {row[1]: row[3] for row in page.rows['seeds'][1:]}
    assert found['test accuracy'] == '13.00 ± 0.71' and 'held-out accuracy, best epoch' in found
    assert 'not comparable' not in page.words['head']

    page = Page(make_page(folders, out=tmp_path / 'all.html'))
    assert 'best epochs of 0, 1 are chosen on held-out images' in page.words['head']
    assert 'best held-out accuracy / best test accuracy' in page.rows['summary'][0]
    (folders[0] / 'test.json').unlink()
    assert 'test accuracy' not in Page(make_page(folders[:1])).words['summary']
    for text in ('{"epoch": 4', '[]', '{"epoch": 4, "acc1": "x", "images": 1, "weights": "model"}', '[' * 9999):
        (folders[1] / 'test.json').write_text(text)
        code, error = fails([str(folders[1])], capsys)
        assert code == 1 and 'test.json is damaged' in error


def test_report_of_a_run_with_a_split(tmp_path: Path) -> None:
    """What main.py writes is what the report reads: its predictions are of the test images, as test.json is."""
    out = tmp_path / 'run'
    train([*DIGITS, '--epochs', '1', '--val-fraction', '0.2', '--batch-size', '256', '--output_dir', str(out)])
    page, result = Page(out / 'report.html'), json.loads((out / 'test.json').read_text())
    words = ' '.join(page.words['predictions'].split())
    assert f': {result["acc1"]:.2f}% of 360 test images' in words
    assert f'test.json has {result["acc1"]:.2f}%' in words
    assert f'test accuracy{result["acc1"]:.2f}% epoch 0' in page.words['summary'].replace('\n', '')


def test_points_can_be_read(tmp_path: Path, drawn: dict[str, Figure]) -> None:
    """A strip with the numbers of each epoch lies where that epoch is drawn."""
    lines = make_run(tmp_path / 'run')
    page = Page(make_page([tmp_path / 'run']))
    assert f'epoch 7\ntest: {lines[7]["test_acc1"]:.5g}\nmoving average: {lines[7]["ema_test_acc1"]:.5g}' in page.source
    axes = drawn['accuracy'].axes[0]
    spots = report_figures._epoch_spots(axes, dict.fromkeys(range(12), ''))
    for epoch, spot in enumerate(spots):
        x, y = axes.figure.transFigure.inverted().transform(
            axes.transData.transform((epoch, lines[epoch]['test_acc1']))
        )
        assert spot.left < 100 * x < spot.left + spot.width and spot.top < 100 * (1 - y) < spot.top + spot.height


def test_letters_of_any_script(tmp_path: Path, drawn: dict[str, Figure], monkeypatch: pytest.MonkeyPatch) -> None:
    """Names that no font can draw are numbers, with what they stand for below the figure; never boxes."""
    letter = '\U000f1234'  # of private use, which no font has
    names, legend = report_figures.drawable(['cat', f'{letter}x', 'é'])
    assert names == ['cat', '#1', 'é'] and legend == f'#1 {letter}x'
    picture = report_figures.draw_confusion(np.eye(3, dtype=int), ['cat', f'{letter}x', 'é'])
    ticks = [label.get_text() for label in drawn['confusion'].axes[0].get_yticklabels()]
    assert ticks == ['cat', '#1', 'é'] and picture.legend == legend
    assert report_figures.find_fonts(frozenset('aé'))[0] == ('DejaVu Sans',)


def test_runs_without_anything_in_common(tmp_path: Path, drawn: dict[str, Figure]) -> None:
    """A run of the published code, which has no args.yaml, beside one within its first epoch."""
    old = make_run(tmp_path / '_$old^', planned=2)
    for name in ('args.yaml', 'timing.txt'):
        (tmp_path / '_$old^' / name).unlink()
    make_run(tmp_path / 'new', done=0)
    page = Page(make_page([tmp_path / '_$old^', tmp_path / 'new'], out=tmp_path / 'a' / 'b.html'))
    summary = {row[0]: row for row in page.rows['summary']}
    best = max(old, key=lambda line: line['test_acc1'])
    assert summary['_$old^'][1:3] == ['2', f'{best["test_acc1"]:.2f}%epoch {best["epoch"]}']
    assert summary['new'][1:4] == ['0 of 12', '–', '–'] and 'seeds' not in page.words
    assert (tmp_path / 'a' / 'b_figures' / 'loss.png').is_file() and 'throughput' not in drawn


# Predictions


@pytest.fixture(scope='module')
def digits(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run on the digits, by main.py, which makes its report."""
    out = tmp_path_factory.mktemp('digits') / 'run'
    train([*DIGITS, '--epochs', '2', '--lr', '4e-3', '--output_dir', str(out)])
    return out


@torch.no_grad()
def answers(folder: Path) -> tuple[np.ndarray, np.ndarray, list[str]]:
    """Targets, probabilities (n, C) and names of the test images, made without report.py's functions."""
    state = ckpt.load(str(folder / 'best_checkpoint.pth'))
    from config.builders import build_model

    model = build_model(parse_args([*DIGITS]), 10).eval()
    model.load_state_dict(state['model'])
    images = load_digits(train=False, transform=build_transform(train=False, input_size=16))
    logits = torch.cat([model(images[number][0][None]) for number in range(len(images))])
    return images.targets, logits.softmax(dim=1).numpy(), [images.name(number) for number in range(len(images))]


def test_end_of_run_report(digits: Path) -> None:
    page = Page(digits / 'report.html')
    log = [json.loads(line) for line in (digits / 'log.txt').read_text().splitlines()]
    best = max(log, key=lambda line: line['test_acc1'])
    targets, probabilities, names = answers(digits)
    predicted = probabilities.argmax(axis=1)
    wrong = np.flatnonzero(predicted != targets)
    assert len(wrong) > 24
    words = ' '.join(page.words['predictions'].split())
    text = f'{best["test_acc1"]:.2f}% of 360 test images are right, {len(wrong)} are wrong. The log has '
    assert f'of epoch {best["epoch"]}: {text}{best["test_acc1"]:.2f}%' in words
    worst = wrong[np.argmax(probabilities[wrong].max(axis=1))]
    expected = f'{predicted[worst]} {100 * probabilities[worst].max():.1f}%is {targets[worst]}{names[worst]}'
    assert words.split('Most confident mistakes')[1].strip().startswith(expected)
    shown = [alt for alt in page.images if '/' in alt]
    assert shown[0] == names[worst] and len(shown) == 24 and set(shown) <= {names[number] for number in wrong}
    pixels = load_digits(train=False).load(int(worst))
    assert np.array_equal(np.asarray(page.images[names[worst]]), np.asarray(pixels))

    rows = page.rows['predictions']
    split = next(number for number, row in enumerate(rows) if row[0] == 'class' and row[1] == 'images')
    pairs, classes = rows[1:split], rows[split + 1 :]
    assert sum(int(row[1]) for row in classes) == 360 and len(classes) == 10
    for number, row in enumerate(classes):
        assert row[2] == f'{100 * (predicted[targets == number] == number).mean():.1f}%'
    counts = {(str(a), str(b)): int(((targets == a) & (predicted == b)).sum()) for a in range(10) for b in range(10)}
    assert [int(row[2]) for row in pairs] == sorted((n for (a, b), n in counts.items() if a != b), reverse=True)[:15]
    assert all(counts[row[0], row[1]] == int(row[2]) for row in pairs)
    assert {'Confusion matrix', 'Accuracy by class', 'Test accuracy by epoch'} <= set(page.images)
    assert page.tiles()['parameters'] == f'{log[-1]["n_parameters"]:,}'


def test_cost_of_a_model_without_drop_path(tmp_path: Path) -> None:
    make_run(tmp_path / 'run', done=1, model='vgg11', model_kwargs=[], input_size=32, drop_path=0.0)
    cost = predictions.find_cost(runs.read_run(tmp_path / 'run'))
    assert cost is not None and cost[0] > 10**8 and cost[1] > 10**8


def test_matrix_counts_every_image(digits: Path, drawn: dict[str, Figure], monkeypatch: pytest.MonkeyPatch) -> None:
    evaluated = []  # the model, folded and channels-last as in main.py's evaluation

    def spy(model: nn.Module, images: torch.Tensor, amp_dtype: torch.dtype | None) -> torch.Tensor:
        evaluated.append(model)
        return forward(model, images, amp_dtype)

    monkeypatch.setattr(predictions, 'forward', spy)
    run = runs.read_runs([digits])[0]
    found = predictions.predict(run, device='cpu', num_workers=0)
    assert not isinstance(found, str)
    modules = list(evaluated[0].modules())
    assert not any(isinstance(module, nn.BatchNorm2d) for module in modules)
    assert any(not module.weight.is_contiguous() for module in modules if isinstance(module, nn.Conv2d))
    targets, probabilities, _ = answers(digits)
    matrix = found.matrix()
    assert matrix.sum() == 360 and np.array_equal(matrix.sum(axis=1), np.bincount(targets))
    assert matrix[3, 5] == ((targets == 3) & (probabilities.argmax(axis=1) == 5)).sum()
    assert np.allclose(found.confidence, probabilities.max(axis=1), atol=1e-5)
    assert 100 * matrix.trace() / 360 == pytest.approx(found.accuracy)
    predictions.describe_predictions(found, 0)
    texts = {text.get_text() for text in drawn['confusion'].axes[0].texts}
    assert texts == {str(count) for count in matrix.flat if count}


def test_keep_rate_of_the_best_epoch(tmp_path: Path) -> None:
    """EViT is evaluated with the keep rate that its best epoch had."""
    flags = [*PLAIN, '--data-set', 'DIGITS', '--batch-size', '128', *EVIT, '--base_keep_rate', '0.3', '--lr', '8e-3']
    flags += ['--shrink_start_epoch', '0', '--shrink_epochs', '6', '--epochs', '2', '--report']
    out = tmp_path / 'run'
    train([*flags, '--output_dir', str(out)])
    words = Page(out / 'report.html').words['predictions']
    best = ckpt.load(str(out / 'best_checkpoint.pth'))
    assert 0.3 < best['keep_rate'] < 1
    assert f': {best["max_accuracy"]:.2f}% of 360' in words and f'The log has {best["max_accuracy"]:.2f}%' in words
    assert (out / 'report_figures' / 'keep_rate.png').is_file()


def test_odd_names_and_a_larger_head(make_folder: Callable[..., Path], tmp_path: Path) -> None:
    names = ['<b>$x^', '_{猫}', 'odd']
    root = make_folder({'train': names, 'val': names}, images=6)
    for split in ('train', 'val'):
        (root / split / 'odd').rename(root / split / os.fsdecode(b'\xff\xfe'))
    flags = [*SMALL_MODEL, *PLAIN, '--data-set', 'FOLDER', '--data-path', str(root), '--batch-size', '6', '--lr', '0']
    out = tmp_path / '<i>&$run^'
    train([*flags, '--nb-classes', '9', '--epochs', '1', '--output_dir', str(out), '--report'])
    page = Page(out / 'report.html')
    assert '<i>&$run^' in page.words['head'] and '<i>' not in page.source
    rows = page.rows['predictions']
    classes = {row[0]: int(row[1]) for row in rows if row[1].isdigit()}
    assert {'<b>$x^': 6, '_{猫}': 6, '\\udcff\\udcfe': 6}.items() <= classes.items() and sum(classes.values()) == 18
    shutil.rmtree(root)
    report.main([str(out)])
    page = Page(out / 'report.html')
    assert 'There are none: the images of FOLDER cannot be read' in page.words['predictions']
    assert not (out / 'report_figures' / 'confusion.png').exists()  # of the report before


@pytest.mark.parametrize('size', [2, 10, 50, 51, 345])
def test_figures_of_any_number_of_classes(drawn: dict[str, Figure], size: int) -> None:
    matrix = np.random.default_rng(0).integers(0, 9, (size, size))
    labels = [f'a class with a long name, number {number}' for number in range(size)]
    for picture in (
        report_figures.draw_confusion(matrix, labels),
        report_figures.draw_classes(np.where(np.arange(size) == 1, np.nan, 100 * np.random.rand(size)), labels, 50.0),
    ):
        with Image.open(io.BytesIO(picture.data)) as image:
            assert min(image.size) > 400
    ticks = [label.get_text() for label in drawn['confusion'].axes[0].get_yticklabels()]
    assert ticks.count('a class with a …') == (size if size <= 50 else 0)
    assert len(drawn['confusion'].axes[0].texts) == (np.count_nonzero(matrix) if size <= 20 else 0)
    assert len(drawn['classes'].axes[0].patches) == size - 1  # all but the class without images
    pairs = predictions.confused_pairs(matrix, labels)
    off = matrix[~np.eye(size, dtype=bool)]
    assert [pair[2] for pair in pairs] == sorted(off[off > 0].tolist(), reverse=True)[:15]


# What main.py does with it


@pytest.mark.parametrize('how', ['fails', 'absent'])
def test_no_report_loses_no_run(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch, how: str
) -> None:
    if how == 'absent':
        monkeypatch.setitem(sys.modules, 'reports.page', None)  # as without matplotlib
        monkeypatch.delattr('tools.report')
    else:
        (tmp_path / 'out' / 'report.html').mkdir(parents=True)
    line = train([*DIGITS, '--epochs', '1', '--output_dir', str(tmp_path / 'out'), '--batch-size', '256'])
    assert line['epoch'] == 0 and 'Note: there is no report (' in capsys.readouterr().out
    assert ckpt.load(str(tmp_path / 'out' / 'checkpoint.pth'))['epoch'] == 0


def test_no_report_flag(tmp_path: Path) -> None:
    train([*DIGITS, '--epochs', '1', '--batch-size', '256', '--output_dir', str(tmp_path / 'out'), '--no-report'])
    assert not (tmp_path / 'out' / 'report.html').exists()
    assert parse_args([]).report


def test_signal_leaves_the_predictions_out(digits: Path, tmp_path: Path) -> None:
    page = Page(make_page([digits], out=tmp_path / 'a.html', stop=lambda: True))
    assert 'There are none: a signal ended the evaluation' in page.words['predictions']


def test_seconds_of_waiting_go_on_with_the_epoch() -> None:
    sums = EpochSums(seconds=100.0, data_seconds=50.0)
    train_linear(linear().float(), loader(*data(8), 4), sums=sums)
    assert 50 < sums.data_seconds < sums.seconds - 50 < 100


# Bad input


def test_bad_input(digits: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    run = tmp_path / 'run'
    make_run(run)
    (tmp_path / 'empty').mkdir()
    for argv, code, message in (
        ([], 2, 'required: OUTPUT'),
        ([str(tmp_path / 'absent')], 1, 'absent: no such folder'),
        ([str(run / 'log.txt')], 1, 'not a folder'),
        ([str(tmp_path / 'empty')], 1, 'empty holds no run'),
        ([str(run), f'{run}/../run'], 2, 'given twice'),
        ([str(run), '--out', str(tmp_path / 'empty')], 2, 'empty is a folder: give the name'),
        ([str(run), '--out', str(run / 'log.txt')], 2, 'log.txt must be a file that ends in .html'),
        ([str(run), '--out', '/dev/null'], 2, '/dev/null must be a file that ends in .html'),
        ([str(digits), '--out', str(tmp_path / 'x.html'), '--device', 'cuda:99'], 2, '--device'),
    ):
        assert (found := fails(argv, capsys))[0] == code and message in found[1], found

    whole = (run / 'log.txt').read_text()
    first = json.loads(whole.splitlines()[0])
    for text in ('{"epoch": 3, "test_acc1"', '[1]', '{}', '{"epoch": -1}', '{"epoch": "1"}', '\x00', '[' * 9999,
                 json.dumps({**first, 'test_acc1': None}), json.dumps({**first, 'test_acc1': [1]})):  # fmt: skip
        (run / 'log.txt').write_text(f'{whole}{text}\n')
        code, error = fails([str(run)], capsys)
        assert code == 1 and 'log.txt, line 13 is damaged' in error, text
    (run / 'log.txt').write_text(whole)
    for text in ('a: [', '- 1', 'derived: 3', '1: 2', '!!python/object:os.system {}'):
        (run / 'args.yaml').write_text(text)
        code, error = fails([str(run)], capsys)
        assert code == 1 and 'args.yaml is damaged' in error, text


def yaml_bomb(first: str, nest: str) -> str:
    """Ten times the line before, nine times: 10**10 values for who follows every alias."""
    return f'a0: &a0 {first}\n' + ''.join(
        f'a{n}: &a{n} {nest.format(",".join([f"*a{n - 1}"] * 10))}\n' for n in range(1, 10)
    )


def test_files_that_are_more_than_they_look(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Aliases, cycles, depth, numbers, lines and holes: a line, at once and in little memory."""
    run = tmp_path / 'run'
    make_run(run)
    args, log = run / 'args.yaml', run / 'log.txt'
    whole = {path: path.read_bytes() for path in (args, log)}
    began = time.monotonic()
    for text, message in (
        (yaml_bomb('[x]', '[{}]'), 'args.yaml is damaged: it has an alias'),
        (yaml_bomb('{x: 1}', '{{<<: [{}]}}'), 'args.yaml is damaged: it has an alias'),
        ('a: &a [*a]', 'args.yaml is damaged: it has an alias'),
        ('&a {b: *a}', 'args.yaml is damaged: it has an alias'),
        ('a: ' + '[' * 100 + ']' * 100, 'args.yaml is damaged: it has more than 20 levels'),
        ('epochs: ' + '9' * 999, 'a number of too many digits'),
        ('epochs: 1' + ':1' * 99_999, 'args.yaml is damaged: it is not YAML of plain values'),
        ('#' * 300_000, 'a run writes no more than 262,144'),
    ):
        args.write_text(text)
        code, error = fails([str(run), '--no-predictions'], capsys)
        assert code == 1 and message in error and len(error) < 400, error
    args.write_bytes(whole[args])
    for text in ('{"epoch": 3, "a": 1e300}', '{"epoch": 3, "a": ' + '9' * 400 + '}', '{"epoch": 1000000000}',
                 '{"epoch": 3, "' + 'a' * 200_000 + '": 1}'):  # fmt: skip
        log.write_bytes(whole[log] + text.encode())
        code, error = fails([str(run), '--no-predictions'], capsys)
        assert code == 1 and 'log.txt, line 13 is damaged' in error and len(error) < 400, error
    for path in (args, log, run / 'timing.txt'):
        with path.open('ab') as file:
            file.truncate(1 << 40)  # a hole
        code, error = fails([str(run), '--no-predictions'], capsys)
        assert code == 1 and f'{path} has 1,099,511,627,776 bytes' in error, error
        path.unlink()
        os.mkfifo(path)
        code, error = fails([str(run), '--no-predictions'], capsys)
        assert code == 1 and f'{path} is no file' in error, error
        path.unlink()
        path.write_bytes(whole.get(path, b''))
    assert time.monotonic() - began < 60


@pytest.mark.parametrize('value', ['nan', 'inf', '-inf'])
def test_seconds_that_are_none(tmp_path: Path, value: str) -> None:
    make_run(tmp_path / 'run', planned=3)
    path = tmp_path / 'run' / 'timing.txt'
    first = {name: value for name in json.loads(path.read_text().splitlines()[0]) if name != 'epoch'}
    path.write_text(json.dumps({**first, 'epoch': 0}) + '\n' + ''.join(path.read_text().splitlines(True)[1:]))
    assert Page(make_page([tmp_path / 'run'])).tiles()['training time lost to data'] == '25.0%'


def test_bad_checkpoints(digits: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    run = tmp_path / 'run'
    shutil.copytree(digits, run)
    path = run / 'best_checkpoint.pth'
    whole = path.read_bytes()
    state = ckpt.load(str(path))
    for content, message in (
        (whole[:-100], 'is damaged'),
        ({'weight': torch.zeros(3)}, 'does not say its model and data set'),
        ({**state, 'args': {**state['args'], 'input_size': 'x'}}, 'flags that main.py refuses'),
        ({**state, 'model': {'weight': torch.zeros(3)}}, 'does not fit the model'),
        ({**state, 'model': {**state['model'], 'head.weight': torch.zeros(())}}, 'does not fit the model'),
    ):
        if isinstance(content, bytes):
            path.write_bytes(content)
        else:
            torch.save(content, path)
        code, error = fails([str(run)], capsys)
        assert code == 1 and message in error and '--no-predictions' in error, error
    torch.save({**state, 'epoch': 'x'}, path)  # which nothing is computed with
    report.main([str(run)])
    report.main([str(run), '--no-predictions'])
    assert 'were not asked for' in Page(run / 'report.html').words['predictions']
