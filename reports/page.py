"""One HTML page of runs, which needs no network, and its figures as PNGs."""

from __future__ import annotations

import math
import statistics
from collections.abc import Callable, Sequence
from datetime import datetime
from pathlib import Path
from typing import NamedTuple

from jinja2 import Environment, FileSystemLoader, StrictUndefined

from reports.figures import FIGURES, Picture, draw_log
from reports.predictions import Predictions, describe_predictions, find_cost, predict
from reports.runs import (
    EpochValue,
    LoggedRun,
    choose_colors,
    find_differences,
    group_by_settings,
    read_runs,
    show_value,
)
from reports.seeds import seed_statistics
from training import checkpoint as ckpt
from utils import InputError, format_seconds, log, one_line, shorten

TEMPLATES = Environment(
    loader=FileSystemLoader(Path(__file__).parent), autoescape=True, undefined=StrictUndefined, trim_blocks=True,
    lstrip_blocks=True
)  # fmt: skip


class Fact(NamedTuple):
    label: str
    value: str
    note: str = ''


def _percent(label: str, result: EpochValue | None, note: str = '') -> Fact:
    return Fact(label, '–') if result is None else Fact(label, f'{result.value:.2f}%', f'epoch {result.epoch}{note}')


def list_facts(run: LoggedRun, cost: tuple[int, int] | None) -> list[Fact]:
    """What a run came to: as many entries, in the same order, for each run.

    Args:
        cost: its model's parameters and multiply-adds, if they are known.
    """
    best, images = run.result('test_acc1'), run.chosen_on
    top5 = [line['test_acc5'] for line in run.lines if best and line['epoch'] == best.epoch and 'test_acc5' in line]
    few_classes = run.derived.get('nb_classes') in range(6)  # of which all are among five
    losses = [run.result(name, best=False) for name in ('train_loss', 'test_loss')]
    logged = run.result('n_parameters', best=False)
    parameters = cost[0] if cost else int(logged.value) if logged else None
    rates = [*filter(math.isfinite, run.series('images_per_second')[1])]
    waiting, train = run.total('data_seconds'), run.total('train_seconds')
    better = {True: '; the average was best', False: '; the model was best', None: ''}[run.average_is_best]
    of_average = '; the moving average' if run.test.get('weights') == 'model_ema' else ''
    return [
        _percent(f'best {images} accuracy', best),
        _percent('test accuracy', run.tested if images != 'test' else None, of_average),
        Fact('top-5 at that epoch', f'{top5[0]:.2f}%' if top5 and not few_classes else '–'),
        _percent(f'last {images} accuracy', run.result('test_acc1', best=False)),
        _percent('best moving average', run.result('ema_test_acc1'), better),
        Fact(f'last loss, train / {images}', ' / '.join(f'{loss.value:.4f}' if loss else '–' for loss in losses)),
        Fact('parameters', f'{parameters:,}' if parameters else '–'),
        Fact('multiply-adds an image', f'{cost[1] / 1e9:.4g} G' if cost else '–'),
        Fact('images a second, median', f'{statistics.median(rates):,.0f}' if rates else '–'),
        Fact(
            'training time lost to data', f'{waiting / train:.1%}' if train and run.series('data_seconds')[0] else '–'
        ),
        Fact('time, training and test', format_seconds(run.total('train_seconds', 'test_seconds')) if train else '–'),
    ]


def compare_facts(runs: Sequence[LoggedRun]) -> tuple[list[list[Fact]], list[str], list[str]]:
    """The facts of each run, without those that no run has; their labels; and notes on what could not be found."""
    facts, notes = [], []
    for run in runs:
        cost = None
        try:
            cost = find_cost(run)
        except InputError as err:
            notes.append(f'{run.name}: {one_line(err)}')
        facts.append(list_facts(run, cost))
    columns = [column for number, column in enumerate(zip(*facts, strict=True))
               if number == 0 or any(fact.value.strip('– /') for fact in column)]  # fmt: skip
    labels = [' / '.join(dict.fromkeys(fact.label for fact in column)) for column in columns]
    return [list(row) for row in zip(*columns, strict=True)], labels, notes


def _find_notes(runs: Sequence[LoggedRun]) -> list[str]:
    notes = []
    for run in runs:
        if not run.is_finished:
            notes.append(f'{run.name} is not finished: {run.status}')
        broken = len(list(run.folder.glob('non_finite_*.json')))
        if broken:
            what = 'steps whose loss or gradient was no finite number'
            notes.append(f'{run.name} has {broken} non_finite_….json: {what}')
        skipped = sum(run.series('train_skipped_steps')[1])
        if skipped:
            notes.append(f'the loss scaler left out {skipped:.0f} steps of {run.name}')
    held_out = [run.name for run in runs if run.chosen_on == 'held-out']
    if 0 < len(held_out) < len(runs):
        notes.append(f'the best epochs of {shorten(held_out)} are chosen on held-out images, of the other runs on the '
                     'test images: these accuracies are not comparable')  # fmt: skip
    return notes


def _write_figures(pictures: Sequence[Picture], folder: Path) -> None:
    """Writes pictures as PNGs, and removes those of an earlier report."""
    folder.mkdir(exist_ok=True)
    for picture in pictures:
        ckpt.write_bytes(folder / f'{picture.name}.png', picture.data)
    for name in {*FIGURES} - {picture.name for picture in pictures}:
        (folder / f'{name}.png').unlink(missing_ok=True)


def make(
    folders: Sequence[Path],
    *,
    out: Path | None = None,
    predictions: bool = True,
    mistakes: int = 24,
    data_path: str | None = None,
    device: str | None = None,
    num_workers: int | None = None,
    stop: Callable[[], bool] | None = None,
) -> Path:
    """Makes a report.

    Args:
        folders: of the runs.
        out: the HTML file; its figures go to a folder beside it. report.html by default, in the run's folder if it is
            one, else here.
        predictions: evaluate the best checkpoint of the best run.
        mistakes: how many of its most confident ones are shown.
        data_path, device, num_workers, stop: as for `predict`.

    Returns:
        The HTML file.

    Raises:
        InputError: for a folder without a run, or one whose files are damaged.
        OSError: if the report cannot be written.
    """
    runs = read_runs(folders)
    out = out or (folders[0] / 'report.html' if len(folders) == 1 else Path('report.html'))
    groups = group_by_settings(runs)
    # Runs of the same settings look the same, if there are several such groups.
    choose_colors(groups if 1 < len(groups) < len(runs) else {run.name: [run] for run in runs})
    facts, columns, unknown = compare_facts(runs)
    over_seeds, left_out = seed_statistics(groups)
    best = max(runs, key=lambda run: run.best.value if run.best is not None else -math.inf)
    found: Predictions | str = 'they were not asked for (--no-predictions)'
    if predictions:
        found = predict(best, data_path=data_path, device=device, num_workers=num_workers, stop=stop)
        if isinstance(found, str):
            log(f'Note: the report has no predictions: {found}')
    described = None if isinstance(found, str) else describe_predictions(found, mistakes)
    pictures = [*draw_log(runs)]
    page = TEMPLATES.get_template('page.html').render(
        title=runs[0].name if len(runs) == 1 else f'{len(runs)} runs: {shorten(run.name for run in runs)}',
        runs=runs,
        best=best,
        facts=facts,
        columns=columns,
        notes=[*_find_notes(runs), *unknown, *left_out, *([] if isinstance(found, str) else found.notes)],
        over_seeds=over_seeds,
        differences=find_differences(runs) if len(runs) > 1 else {},
        pictures=pictures,
        found=found,
        predictions=described,
        arguments=[(name, show_value(value)) for name, value in {**runs[0].args, **runs[0].derived}.items()],
        made=datetime.now().strftime('%Y-%m-%d %H:%M'),
    )
    out.parent.mkdir(parents=True, exist_ok=True)
    _write_figures([*pictures, *(described['pictures'] if described else ())], out.with_name(f'{out.stem}_figures'))
    ckpt.write_bytes(out, page.encode('utf-8', 'backslashreplace'))
    return out
