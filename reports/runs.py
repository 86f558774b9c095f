"""Runs as their folders tell them, and beside each other: what report.py writes and draws."""

from __future__ import annotations

import json
import math
import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from matplotlib import colormaps
from matplotlib.colors import to_hex

from config.flags import read_mapping
from training import checkpoint as ckpt
from training.checkpoint import BEST, CHECKPOINT
from training.output import holds_run
from training.run import TEST_RESULT
from training.state import FREE_ARGUMENTS, MAX_EPOCHS
from training.weights import stored_args
from utils import InputError, UsageError

# Arguments that cannot change what a run comes to, and those of which `derived` has what they came to.
SEEN_IN_DERIVED = {'data_path', 'data_layout', 'use_lmdb', 'amp', 'train_mode'}
NO_MATTER = FREE_ARGUMENTS - {'finetune', 'batch_size', 'accum_steps'} - SEEN_IN_DERIVED
EXPLAINED = {  # derived values, and the arguments whose difference says theirs
    'total_batch': {'batch_size', 'accum_steps'},
    'precision': {'amp'},
    'data': {'data_set', 'data_path', 'data_layout', 'use_lmdb', 'train_fraction', 'inat_category',
             'val_fraction', 'val_seed', 'folds', 'fold'},
}  # fmt: skip
DERIVED = ('data', 'total_batch', 'precision', 'train_mode')  # that matter beside the arguments

MAX_LOG_BYTES, MAX_YAML_BYTES = 32 << 20, 256 << 10
MAX_IN_LINE = 100_000  # characters
MAX_VALUE = 1e100  # with larger ones figures have no axes


def printable(text: object) -> str:
    """Text for HTML and figures: names of files may hold bytes that are no characters."""
    return str(text).encode('utf-8', 'backslashreplace').decode()


def show_value(value: Any) -> str:
    """An argument as people write it."""
    if isinstance(value, (list, tuple)):
        shown = [
            f'{item[0]}={show_value(item[1])}'
            if isinstance(item, (list, tuple)) and len(item) == 2 and isinstance(item[0], str)
            else show_value(item)
            for item in value
        ]
        return ' '.join(shown) or 'none'
    if isinstance(value, float):  # 30.0 and 30 are the same
        return f'{value:.12g}'
    return printable('not given' if value is None else value if value != '' else 'none')


class EpochValue(NamedTuple):
    value: float
    epoch: int


@dataclass
class LoggedRun:
    """A run as its folder tells it.

    `args` are the flags and `derived` what was made of them, empty where the folder does not say. `lines` are those of
    log.txt and `timings` those of timing.txt, one an epoch that is whole; the latter have two numbers more,
    `images_per_second` of training and all processes, and `waiting`, the percentage of the training time that went by
    waiting for data. `test` is test.json, of a run that held images out. `color` and `label` are for figures of several
    runs.
    """

    folder: Path
    name: str
    args: dict[str, Any]
    derived: dict[str, Any]
    lines: list[dict[str, Any]]
    timings: list[dict[str, Any]]
    test: dict[str, Any] = field(default_factory=dict)
    color: str = ''
    label: str = ''

    @property
    def chosen_on(self) -> str:
        """Which images chose the best checkpoint, 'test' or 'held-out'; `test_acc1` and its like are theirs."""
        return 'held-out' if self.derived.get('best_chosen_on') == 'held-out images' else 'test'

    @property
    def average_is_best(self) -> bool | None:
        """Whether the best checkpoint has the moving average; None where that is not known."""
        return bool(self.lines[-1]['best_is_ema']) if self.lines and 'best_is_ema' in self.lines[-1] else None

    @property
    def best(self) -> EpochValue | None:
        """The accuracy, in percent, that chose the best checkpoint."""
        return self.result('ema_test_acc1' if self.average_is_best else 'test_acc1')

    @property
    def tested(self) -> EpochValue | None:
        """The best checkpoint's accuracy on the test images, in percent; None where they are to come."""
        if self.chosen_on == 'test':
            return self.best
        return EpochValue(self.test['acc1'], self.test['epoch']) if self.test else None

    @property
    def final(self) -> float | None:
        """What a finished run counts with, in percent; None of one that is not finished."""
        return self.tested.value if self.is_finished and self.tested is not None else None

    @property
    def planned(self) -> int | None:
        """Epochs that the run was to have."""
        epochs, more = self.args.get('epochs'), self.args.get('cooldown_epochs', 0)
        return epochs + more if isinstance(epochs, int) and isinstance(more, int) else None

    @property
    def done(self) -> int:
        return self.lines[-1]['epoch'] + 1 if self.lines else 0

    @property
    def is_finished(self) -> bool:
        return self.done > 0 and (self.planned is None or self.done >= self.planned)

    @property
    def status(self) -> str:
        if self.planned is None:
            return f'{self.done} epochs'
        if not self.done:
            return f'none of {self.planned} epochs is whole'
        return f'{self.done} of {self.planned} epochs'

    def series(self, name: str) -> tuple[list[int], list[float]]:
        """The epochs that have a value of this name, and the values."""
        pairs = [(line['epoch'], line[name]) for line in (*self.lines, *self.timings) if name in line]
        return [epoch for epoch, _ in pairs], [value for _, value in pairs]

    def total(self, *names: str) -> float:
        """The sum over the epochs of the values of these names."""
        return sum(value for name in names for value in self.series(name)[1] if math.isfinite(value))

    def result(self, name: str, *, best: bool = True) -> EpochValue | None:
        """The highest value of this name, the first of equals, or the last, and its epoch; None if there is none."""
        epochs, values = self.series(name)
        found = [EpochValue(value, epoch) for epoch, value in zip(epochs, values, strict=True) if math.isfinite(value)]
        if not found:
            return None
        return max(found, key=lambda entry: entry.value) if best else found[-1]


# Reading: whoever shares a run shares these files, so they may hold anything


def _check_file(path: Path, most: int) -> None:
    """Refuses a text file of more than so many bytes.

    Raises:
        InputError: if it is larger, or no file but a pipe, a device or a folder.
    """
    if not path.is_file():
        raise InputError(f'{path} is no file')
    if path.stat().st_size > most:
        raise InputError(f'{path} has {path.stat().st_size:,} bytes: a run writes no more than {most:,}')


def _number(value: Any) -> float:
    """A number of the log, whose infinities and NaNs are words."""
    if isinstance(value, bool) or not isinstance(value, (int, float, str)):
        raise ValueError
    if MAX_VALUE < abs(float(value)) < math.inf:
        raise ValueError
    return float(value) if isinstance(value, str) else value


def read_lines(path: Path) -> list[dict[str, Any]]:
    """The lines of log.txt or timing.txt in the order of their epochs; none if there is no such file.

    Raises:
        InputError: for a line that is no JSON object of numbers with an epoch.
    """
    if not path.exists():
        return []
    found: dict[int, dict[str, Any]] = {}
    _check_file(path, MAX_LOG_BYTES)
    with path.open(encoding='utf-8', errors='backslashreplace') as file:
        for number, text in enumerate(iter(lambda: file.readline(MAX_IN_LINE), ''), start=1):
            try:
                line = {name: _number(value) for name, value in json.loads(text).items()}
                if not isinstance(line['epoch'], int) or not 0 <= line['epoch'] < MAX_EPOCHS:
                    raise ValueError
            except (ValueError, KeyError, AttributeError, OverflowError, RecursionError):
                raise InputError(
                    f'{path}, line {number} is damaged: {text[:40]!r} is not the JSON of an epoch. Take the line out, '
                    'or start the run again with --auto-resume, which writes the file anew'
                ) from None
            found[int(line['epoch'])] = line
    return [found[epoch] for epoch in sorted(found)]


def _read_test(path: Path) -> dict[str, Any]:
    """What test.json says of the best checkpoint on the test images; empty if there is no such file.

    Raises:
        InputError: if it is damaged.
    """
    if not path.exists():
        return {}
    _check_file(path, MAX_IN_LINE)
    try:
        found = json.loads(path.read_bytes())
        numbers = {name: _number(found[name]) for name in ('epoch', 'acc1', 'images')}
        return {**numbers, 'epoch': int(numbers['epoch']), 'weights': str(found['weights'])}
    except (ValueError, KeyError, TypeError, OverflowError, RecursionError):
        raise InputError(f'{path} is damaged: the run started again with --auto-resume writes it anew') from None


def _read_timings(path: Path) -> list[dict[str, Any]]:
    timings = read_lines(path)
    for line in timings:
        seconds = line.get('train_seconds', 0)
        if seconds > 0 and line.get('train_images', 0) > 0:
            line['images_per_second'] = line['train_images'] / seconds
        if seconds > 0 and 'data_seconds' in line:
            line['waiting'] = 100 * line['data_seconds'] / seconds
    return timings


def _read_args(folder: Path) -> tuple[dict[str, Any], dict[str, Any]]:
    """A run's flags and what was derived of them: from args.yaml, else from a checkpoint, else empty."""
    path = folder / 'args.yaml'
    if not path.exists():
        for name in (BEST, CHECKPOINT):
            if (folder / name).exists():
                return dict(stored_args(ckpt.load(str(folder / name)))), {}
        return {}, {}
    _check_file(path, MAX_YAML_BYTES)
    try:
        args = read_mapping(str(path))
    except InputError as err:
        raise InputError(f'{path} is damaged: it {str(err).removeprefix(f"{path} ")}') from None
    ckpt.check_plain(args, str(path))  # whose numbers may be large
    derived = args.pop('derived', {})
    if not isinstance(derived, dict) or not all(isinstance(name, str) for name in (*args, *derived)):
        raise InputError(f'{path} is damaged: it does not hold the flags of a run')
    return args, derived


def read_run(folder: Path, name: str = '') -> LoggedRun:
    """Reads a run's folder.

    Raises:
        InputError: if what it holds is damaged.
    """
    args, derived = _read_args(folder)
    run = LoggedRun(folder, name, args, derived, read_lines(folder / 'log.txt'), _read_timings(folder / 'timing.txt'))
    if run.chosen_on != 'test':
        run.test = _read_test(folder / TEST_RESULT)
    return run


def read_runs(folders: Sequence[Path]) -> list[LoggedRun]:
    """Reads the folders of runs.

    Raises:
        UsageError: if one is given twice.
        InputError: if one holds no run, or a damaged one.
    """
    resolved = [folder.resolve() for folder in folders]
    for number, folder in enumerate(folders):
        if resolved[number] in resolved[:number]:
            raise UsageError(f'{folder} is given twice')
        if not folder.is_dir():
            raise InputError(f'{folder}: {"not a folder" if folder.exists() else "no such folder"}')
        if not (folder / 'args.yaml').is_file() and not holds_run(folder):
            raise InputError(f'{folder} holds no run: give the --output_dir of one')
    common = Path(os.path.commonpath(resolved)) if len(resolved) > 1 else resolved[0].parent
    return [
        read_run(folder, printable(whole.name if whole == common else whole.relative_to(common)))
        for folder, whole in zip(folders, resolved, strict=True)
    ]


# Beside each other


def _settings(run: LoggedRun) -> dict[str, str]:
    """What makes a run's results, apart from the seed, by name."""
    ignored = NO_MATTER | {'seed'} | (SEEN_IN_DERIVED if run.derived else set())
    found = {name: value for name, value in run.args.items() if name not in ignored}
    found |= {name: run.derived[name] for name in DERIVED if name in run.derived}
    return {name: show_value(value) for name, value in found.items()}


def _tell_apart(values: Sequence[str]) -> list[str]:
    """Paths without the parts that all of them have; other values as they are."""
    parts = {value: Path(value).parts for value in values if os.sep in value}
    common = set.intersection(*map(set, parts.values())) if parts else set()
    return [
        str(Path(*[part for part in parts[value] if part not in common] or parts[value][-1:]))
        if value in parts
        else value
        for value in values
    ]


def find_differences(runs: Sequence[LoggedRun]) -> dict[str, list[str]]:
    """What was varied: the arguments that are not the same for all runs, with their values, run by run.

    The total batch, the precision and the data are there where no argument says how they differ, the data by number.
    """
    sources = [{name: value for name, value in run.args.items() if name not in NO_MATTER} for run in runs]
    for name in EXPLAINED:
        values = [run.derived.get(name) for run in runs]
        for source, value in zip(sources, values, strict=True):
            source[name] = f'no. {values.index(value) + 1}' if name == 'data' else value
    names = dict.fromkeys(name for source in sources for name in source)
    shown = {name: [show_value(source[name]) if name in source else '–' for source in sources] for name in names}
    different = {name: _tell_apart(values) for name, values in shown.items() if len(set(values)) > 1}
    return {name: values for name, values in different.items() if not EXPLAINED.get(name, set()) & different.keys()}


def group_by_settings(runs: Sequence[LoggedRun]) -> dict[str, list[LoggedRun]]:
    """The runs that differ in nothing that counts but the seed, together, under what tells them from the others."""
    groups: dict[str, list[LoggedRun]] = {}
    for run in runs:
        groups.setdefault(json.dumps(_settings(run), sort_keys=True), []).append(run)
    firsts = [group[0] for group in groups.values()]
    counting = {name for run in firsts for name in _settings(run)}
    different = {name: values for name, values in find_differences(firsts).items() if name in counting}
    labels = [
        ', '.join(f'{name} {values[number]}' for name, values in different.items()) for number in range(len(firsts))
    ]
    labels = [label if label and labels.count(label) == 1 else first.name
              for label, first in zip(labels, firsts, strict=True)]  # fmt: skip
    return dict(zip(labels, groups.values(), strict=True))


def choose_colors(groups: Mapping[str, Sequence[LoggedRun]]) -> None:
    """Gives the runs of each group one colour, and its name as their label."""
    few = len(groups) <= 10
    palette = colormaps['tab10'](range(10)) if few else colormaps['turbo'](np.linspace(0.05, 0.95, len(groups)))
    for (label, group), color in zip(groups.items(), palette, strict=False):
        for run in group:
            run.color, run.label = to_hex(color), label
