"""Runs over their seeds: statistics for a report, and the lines of a table of ablations."""

from __future__ import annotations

import statistics
from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

from reports.runs import LoggedRun, show_value
from utils import format_seconds

RESULTS = {  # for the statistics over seeds: column of log.txt, and whether the best epoch counts or the last
    '{} accuracy, best epoch': ('test_acc1', True),
    '{} accuracy, last epoch': ('test_acc1', False),
    'moving average, best epoch': ('ema_test_acc1', True),
    'moving average, last epoch': ('ema_test_acc1', False),
}
COLUMNS = (  # of table.csv
    *('row', 'model', 'options', 'flags', 'parameters', 'runs', 'mean', 'sd', 'best', 'paper'),
    *('images', 'seconds', 'seeds'),
)


class Spread(NamedTuple):
    """Of a result of several runs, in percent. `deviation` is that of a sample (n - 1), None of one run."""

    mean: float
    deviation: float | None
    best: float
    worst: float

    def __str__(self) -> str:
        return f'{self.mean:.2f}' + ('' if self.deviation is None else f' ± {self.deviation:.2f}')


def spread_of(values: Sequence[float]) -> Spread:
    deviation = statistics.stdev(values) if len(values) > 1 else None
    return Spread(statistics.fmean(values), deviation, max(values), min(values))


def seed_statistics(
    groups: dict[str, list[LoggedRun]],
) -> tuple[list[tuple[str, str, list[str], Spread]], list[str]]:
    """Of each group whose finished runs have two seeds at least: its name, a result's, the seeds, and their results.

    Returns:
        These, and notes on what was left out.
    """
    found, notes = [], []
    for label, group in groups.items():
        counted: dict[str, LoggedRun] = {}
        for run in group if len(group) > 1 else ():
            seed = show_value(run.args.get('seed'))
            if not run.is_finished:
                notes.append(f'{run.name} is not counted over the seeds, as it is not finished')
            elif seed in counted:
                notes.append(f'{run.name} is not counted over the seeds: it is {counted[seed].name} once more')
            else:
                counted[seed] = run
        images = group[0].chosen_on
        results = {result.format(images): [run.result(name, best=best) for run in counted.values()]
                   for result, (name, best) in RESULTS.items()}  # fmt: skip
        if images != 'test':
            results = {'test accuracy': [run.tested for run in counted.values()], **results}
        for result, entries in results.items():
            values = [entry.value for entry in entries if entry is not None]
            if len(values) == len(counted) > 1:
                found.append((label, result, [*counted], spread_of(values)))
    return found, notes


# Tables of ablations


def describe_training(run: LoggedRun) -> str:
    """On what a run was trained, and for how long."""
    fraction, epochs, folds = run.args.get('train_fraction', 1), run.args.get('epochs'), run.args.get('folds')
    part = f' ({fraction} of it)' if fraction != 1 else ''
    split = f', {folds} folds' if folds else ''
    return f'{run.args.get("data_set")}{part}, {epochs} epoch{"" if epochs == 1 else "s"}{split}'


def summarize(runs: Mapping[str, tuple[float, LoggedRun]]) -> dict[str, Any]:
    """What finished runs came to, in `COLUMNS`. `images` seen in training and `seconds` are means over them.

    Args:
        runs: by seed and fold, with what they count with.
    """
    spread = spread_of([accuracy for accuracy, _ in runs.values()]) if runs else None
    parameters = {int(entry.value) for _, run in runs.values() if (entry := run.result('n_parameters')) is not None}
    images, seconds = (  # None of runs that have not logged them
        statistics.fmean(run.total(*names) for _, run in runs.values()) or None if runs else None
        for names in (('train_images',), ('train_seconds', 'test_seconds'))
    )
    return {
        'parameters': max(parameters, default=None),
        'runs': len(runs),
        'mean': spread and spread.mean,
        'sd': spread and spread.deviation,
        'best': spread and spread.best,
        'images': images,
        'seconds': seconds,
        'seeds': ' '.join(f'{name}:{accuracy:.4f}' for name, (accuracy, _) in runs.items()),
    }


def to_markdown(heading: str, lines: Sequence[Mapping[str, Any]]) -> str:
    """The table; without a column of the paper's where it has no figures."""

    def show(form: str, value: float | None) -> str:
        return '' if value is None else form.format(value)

    rows = []
    for line in lines:
        cells = {
            'row': line['row'],
            'parameters': show('{:,}', line['parameters']),
            'runs': str(line['runs']),
            'top-1, mean ± sd': show('{:.2f}', line['mean']) + show(' ± {:.2f}', line['sd']),
            'best': show('{:.2f}', line['best']),
            'paper (CIFAR-100, 300 epochs)': show('{:.2f}', line['paper']),
            'images seen': show('{:,.0f}', line['images']),
            'time, training and test': format_seconds(line['seconds']) if line['seconds'] else '',
        }
        if all(line['paper'] is None for line in lines):
            del cells['paper (CIFAR-100, 300 epochs)']
        rows.append(cells)
    texts = [[*rows[0]], ['---'] * len(rows[0]), *([*cells.values()] for cells in rows)]
    return '\n'.join([heading, '', *(f'| {" | ".join(cells)} |' for cells in texts), ''])
