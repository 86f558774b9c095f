"""The figures of report.py, as PNGs in memory. No display is needed."""

from __future__ import annotations

import base64
import io
import math
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import cache
from itertools import pairwise
from textwrap import fill
from typing import Any, NamedTuple

import numpy as np
from matplotlib.axes import Axes
from matplotlib.colors import PowerNorm
from matplotlib.figure import Figure
from matplotlib.font_manager import fontManager, get_font
from matplotlib.lines import Line2D
from matplotlib.ticker import MaxNLocator

from reports.runs import LoggedRun
from reports.seeds import spread_of

FIGURES = ('accuracy', 'loss', 'learning_rate', 'grad_norm', 'keep_rate', 'throughput', 'time', 'confusion', 'classes')
BLUE, ORANGE, GREY, RED, LIGHT = '#1f5fae', '#d9741a', '#6f7782', '#b8352c', '#b9bfc7'
MAX_NAMES, MAX_COUNTS = 50, 20  # classes up to which figures have their names, and the confusion matrix numbers
FROM_ZERO = ('learning_rate', 'keep_rate', 'throughput', 'time')  # figures whose axis begins there
MAX_IN_LEGEND, LEGEND_WIDTH = 16, 34  # names, and letters in a line of one
FEW_EPOCHS = 25  # up to which each has a dot


class Spot(NamedTuple):
    """A part of a picture, in percent of its width and height, and the words that it shows under the pointer."""

    left: float
    top: float
    width: float
    height: float
    text: str


@dataclass
class Picture:
    """A PNG, or a JPEG of an image. `legend` says what the numbers in place of names stand for."""

    name: str
    title: str
    data: bytes
    kind: str = 'png'
    spots: Sequence[Spot] = ()
    legend: str = ''

    @property
    def uri(self) -> str:
        return f'data:image/{self.kind};base64,{base64.b64encode(self.data).decode()}'


class Curve(NamedTuple):
    """Values by epoch. A figure of one run names its curves by `kind`, one of several by the runs' labels too."""

    run: LoggedRun
    kind: str
    points: tuple[list[int], list[float]]
    color: str
    style: Any = '-'


def _figure(width: float, height: float) -> tuple[Figure, Axes]:
    figure = Figure(figsize=(width, height), layout='constrained')
    axes = figure.add_subplot()
    axes.spines[['top', 'right']].set_visible(False)
    return figure, axes


def _save(figure: Figure, name: str, title: str, legend: str = '', hover: Mapping[int, str] | None = None) -> Picture:
    """A figure as a PNG.

    Args:
        hover: what is shown under the pointer, by epoch.
    """
    set_fonts(figure)
    file = io.BytesIO()
    figure.savefig(file, format='png', dpi=150)
    spots = _epoch_spots(figure.axes[0], hover) if hover else []
    return Picture(name, title, file.getvalue(), spots=spots, legend=legend)


def set_fonts(figure: Figure) -> None:
    """Gives a figure's texts fonts that have their letters."""
    texts: list[Any] = figure.findobj(lambda artist: hasattr(artist, 'set_parse_math'))
    fonts, _ = find_fonts(frozenset(''.join(text.get_text() for text in texts)))
    for text in texts:
        text.set_parse_math(False)  # a dollar in a name is no formula
        text.set_fontfamily(fonts)


@cache
def find_fonts(letters: frozenset[str]) -> tuple[tuple[str, ...], frozenset[str]]:
    """Fonts of this machine that have the letters together, matplotlib's own first, and the letters that none has."""
    fonts, left = ['DejaVu Sans'], letters
    files = {font.name: font.fname for font in fontManager.ttflist if 'Last Resort' not in font.name}  # has but boxes
    for name in sorted(files, key=lambda name: (name != fonts[0], name)):
        if not left:
            break
        has = get_font(files[name]).get_char_index
        covered = {letter for letter in left if letter.isspace() or has(ord(letter))}
        fonts += [name] if covered and name != fonts[0] else []
        left = left - covered
    return tuple(fonts), frozenset(left)


def drawable(names: Sequence[str]) -> tuple[list[str], str]:
    """Names for a figure: those with letters that no font here has are numbers, which the second text explains."""
    lacking = find_fonts(frozenset(''.join(names)))[1]
    numbers = {number: name for number, name in enumerate(names) if lacking & set(name)}
    shown = [f'#{number}' if number in numbers else name for number, name in enumerate(names)]
    return shown, ', '.join(f'#{number} {name}' for number, name in numbers.items())


def _epoch_spots(axes: Axes, texts: Mapping[int, str]) -> list[Spot]:
    """A strip of the axes for each epoch, as wide as to the middle of the next."""
    box, (low, high) = axes.get_position(), axes.get_xlim()
    epochs = sorted(texts)
    edges = [low, *((one + two) / 2 for one, two in pairwise(epochs)), high]
    places = [100 * (box.x0 + box.width * (edge - low) / (high - low)) for edge in edges]
    return [
        Spot(left, 100 * (1 - box.y1), right - left, 100 * box.height, texts[epoch])
        for (left, right), epoch in zip(pairwise(places), epochs, strict=True)
    ]


def shorten_text(text: str, most: int) -> str:
    return text if len(text) <= most else f'{text[: most - 1]}…'


def _epoch_axis(axes: Axes, epochs: Iterable[int]) -> None:
    epochs = sorted(set(epochs))
    axes.set_xlabel('epoch')
    axes.xaxis.set_major_locator(MaxNLocator(integer=True))
    if len(epochs) == 1:
        axes.set_xlim(epochs[0] - 1, epochs[0] + 1)
        axes.set_xticks(epochs)


def _legend(axes: Axes, entries: Sequence[tuple[str, Line2D]]) -> str:
    """A legend inside the axes, or beside them if it is long. Entries whose names begin with _ are kept too.

    Returns:
        What the numbers stand for that it has in place of names.
    """
    beside = len(entries) > 4
    place: dict[str, Any] = {'loc': 'upper left', 'bbox_to_anchor': (1.01, 1)} if beside else {'loc': 'best'}
    shown, legend = drawable([name for name, _ in entries])
    lines = min(max(MAX_IN_LEGEND // len(entries), 1), 3)  # of a name
    names = [fill(shorten_text(name, lines * LEGEND_WIDTH), LEGEND_WIDTH, initial_indent=' ') for name in shown]
    axes.legend([line for _, line in entries], names, fontsize=8, frameon=False, **place)
    return legend


def draw_curves(name: str, title: str, unit: str, curves: Sequence[Curve]) -> Picture:
    """Curves by epoch, each with a point at least, in one figure. The best epoch of a single run is marked."""
    figure, axes = _figure(6.4, 3.5)
    for curve in curves:
        epochs, values = curve.points
        marker = 'o' if len(epochs) <= FEW_EPOCHS else ''
        size = 3.5 if len(epochs) > 1 else 6
        axes.plot(epochs, values, color=curve.color, linestyle=curve.style, linewidth=1.4, marker=marker, ms=size)
    values = [value for curve in curves for value in curve.points[1] if math.isfinite(value)]
    if name == 'grad_norm' and values and min(values) > 0 and max(values) > 30 * min(values):
        axes.set_yscale('log')
    else:
        axes.ticklabel_format(axis='y', scilimits=(-3, 5), useOffset=False)
    if name in FROM_ZERO and values:
        axes.set_ylim(0, max(*values, 1e-9) * 1.08)
    elif name == 'accuracy':
        axes.set_ylim(top=min(axes.get_ylim()[1], 101))
    axes.set_ylabel(unit)
    axes.grid(alpha=0.25)
    _epoch_axis(axes, (epoch for curve in curves for epoch in curve.points[0]))

    runs = {id(curve.run): curve.run for curve in curves}.values()
    if len(runs) == 1:
        entries = [(curve.kind, Line2D([], [], color=curve.color, linestyle=curve.style)) for curve in curves]
        best = next(iter(runs)).best
        if name == 'accuracy' and best is not None:
            star: dict[str, Any] = {'marker': '*', 'color': RED, 'markersize': 10, 'linestyle': ''}
            axes.plot(best.epoch, best.value, zorder=5, **star)
            entries.append((f'best: {best.value:.2f} at epoch {best.epoch}', Line2D([], [], **star)))
    else:
        colors = {run.color: run.label for run in runs}
        shown = colors if len(colors) <= MAX_IN_LEGEND else {}
        entries = [(label, Line2D([], [], color=color)) for color, label in shown.items()]
        kinds = {curve.kind: curve.style for curve in curves}
        if len(kinds) > 1:
            entries += [(kind, Line2D([], [], color=GREY, linestyle=style)) for kind, style in kinds.items()]
    legend = _legend(axes, entries) if len(entries) > 1 else ''
    hover: dict[int, str] = {}
    for curve in curves[:MAX_IN_LEGEND]:
        label = ', '.join(([curve.run.name] if len(runs) > 1 else []) + [curve.kind])
        for epoch, value in zip(*curve.points, strict=True):
            hover[epoch] = f'{hover.get(epoch, f"epoch {epoch}")}\n{label}: {value:.5g}'
    return _save(figure, name, title, legend, hover)


def draw_times(run: LoggedRun) -> Picture:
    """Where the seconds of each epoch of one run went, as bars on each other."""
    figure, axes = _figure(6.4, 3.5)
    epochs = [line['epoch'] for line in run.timings]
    train, waits, tests = (
        np.nan_to_num([line.get(name, 0.0) for line in run.timings], posinf=0.0, neginf=0.0)
        for name in ('train_seconds', 'data_seconds', 'test_seconds')
    )
    floor = np.zeros(len(epochs))
    for label, seconds, color in (
        ('training', np.maximum(train - waits, 0), BLUE),
        ('waiting for data', waits, RED),
        ('test, moving average', tests, LIGHT),
    ):
        axes.bar(epochs, seconds, width=0.8 if len(epochs) < 60 else 1.0, bottom=floor, color=color, label=label)
        floor = floor + seconds
    axes.set_ylabel('seconds')
    axes.set_ylim(0, max(floor.max() * 1.25, 1e-9))
    axes.legend(fontsize=8, frameon=False, ncols=3, loc='upper left')
    _epoch_axis(axes, epochs)
    rows = zip(epochs, train, waits, tests, strict=True)
    hover = {epoch: f'epoch {epoch}\ntraining: {a:.5g} s\nof that, waiting for data: {b:.5g} s\ntest: {c:.5g} s'
             for epoch, a, b, c in rows}  # fmt: skip
    return _save(figure, 'time', 'Seconds by epoch', hover=hover)


def draw_log(runs: Sequence[LoggedRun]) -> Iterator[Picture]:
    """The figures of log.txt and timing.txt for which there is something to draw, each drawn when it is asked for."""
    alone = len(runs) == 1
    images = ' or '.join(dict.fromkeys(run.chosen_on for run in runs))
    test, average, train = (images, BLUE, '-'), ('moving average', ORANGE, '--'), ('train', GREY, ':')
    only = ('train', BLUE, '-')
    share = f'% of {images} images'
    panels: list[tuple[str, str, str, dict[str, tuple[str, str, str]]]] = [
        ('accuracy', f'{images.capitalize()} accuracy', share, {'test_acc1': test, 'ema_test_acc1': average}),
        ('loss', 'Loss', 'cross-entropy', {'train_loss': train, 'test_loss': test, 'ema_test_loss': average}),
        ('learning_rate', 'Learning rate', 'after scaling', {'train_lr': only}),
        ('grad_norm', 'Gradient norm', 'mean, before clipping', {'train_grad_norm': only}),
        ('keep_rate', 'Keep rate', 'part of the tokens', {'keep_rate': only}),
        ('throughput', 'Training speed', 'images a second', {'images_per_second': only}),
        ('time', 'Waiting for data', '% of training time', {'waiting': only}),
    ]
    for name, title, unit, columns in panels:
        if alone and name == 'time':
            continue
        curves = []
        for run in runs:
            for column, (kind, color, style) in columns.items():
                points = run.series(column)
                if points[0]:
                    curves.append(Curve(run, kind, points, color if alone else run.color, '-' if alone else style))
        if curves:
            yield draw_curves(name, title, unit, curves)
    if alone and runs[0].timings:
        yield draw_times(runs[0])


def draw_confusion(matrix: np.ndarray, labels: Sequence[str]) -> Picture:
    """The confusion matrix, each row by its share of the class; names and counts where there is room for them."""
    size = len(labels)
    labels, legend = drawable(labels) if size <= MAX_NAMES else (labels, '')
    figure = Figure(figsize=(7.2, 6.4), layout='constrained')
    axes = figure.add_subplot()
    shares = matrix / np.maximum(matrix.sum(axis=1, keepdims=True), 1)
    # A root shows the few mistakes of a good model beside its diagonal.
    image = axes.imshow(100 * shares, cmap='Blues', norm=PowerNorm(0.5, 0, 100), interpolation='nearest')
    figure.colorbar(image, ax=axes, shrink=0.7, label='% of the class', ticks=[0, 1, 5, 20, 50, 100])
    if size <= MAX_NAMES:
        font = 9 if size <= 12 else 7 if size <= 30 else 5.5
        names = [shorten_text(label, 16) for label in labels]
        axes.set_xticks(range(size), names, rotation=90 if max(map(len, names)) > 3 else 0, fontsize=font)
        axes.set_yticks(range(size), names, fontsize=font)
    else:
        axes.xaxis.set_major_locator(MaxNLocator(8, integer=True))
        axes.yaxis.set_major_locator(MaxNLocator(8, integer=True))
    number = '' if size <= MAX_NAMES else ' (its number)'
    axes.set_xlabel(f'predicted class{number}')
    axes.set_ylabel(f'true class{number}')
    for row, column in np.argwhere(matrix > 0) if size <= MAX_COUNTS else ():
        color = 'white' if shares[row, column] > 0.3 else 'black'
        font = 8 if size <= 12 else 6
        axes.text(column, row, str(matrix[row, column]), ha='center', va='center', color=color, fontsize=font)
    return _save(figure, 'confusion', 'Confusion matrix', legend)


def draw_classes(accuracy: np.ndarray, labels: Sequence[str], mean: float) -> Picture:
    """Accuracy of each class with images, the worst first.

    Args:
        accuracy: in percent, NaN where there are no images.
        mean: of all images, in percent.
    """
    order = [int(number) for number in np.argsort(accuracy) if not math.isnan(accuracy[number])]
    named = len(order) <= MAX_NAMES
    labels, legend = drawable(labels) if named else (labels, '')
    figure, axes = _figure(7.2, 6.4 if len(order) > 4 else 3.5)
    names = [shorten_text(labels[number], 24) for number in order] if named else []
    axes.barh(range(len(order)), accuracy[order], color=BLUE, height=0.75 if named else 1.0)
    axes.set_yticks(range(len(names)), names, fontsize=9 if len(order) <= 20 else 6.5)
    axes.set_ylim(len(order) - 0.4, -0.6)
    axes.set_xlim(0, 100)
    axes.axvline(mean, color=RED, linewidth=1)
    axes.set_xlabel(f'% right; the line is all images, {mean:.1f}%')
    axes.set_ylabel('' if named else 'classes, the worst first')
    return _save(figure, 'classes', 'Accuracy by class', legend)


def draw_rows(title: str, rows: Mapping[str, Sequence[float]], paper: Sequence[float | None]) -> Picture:
    """A table of ablations: a bar for each row's mean, with its deviation (of a sample), and each run as a dot.

    Args:
        rows: the accuracies of a row's runs in percent, by the row's name.
        paper: the published ones, to mark beside them; none where they are of other data.
    """
    done = [(place, values) for place, values in enumerate(rows.values()) if values]
    dots = [(value, place) for place, values in done for value in values]
    marks = [(value, place) for place, value in enumerate(paper) if value is not None]
    shown = [value for value, _ in (*marks, *dots)] or [0.0]
    low = max(5 * ((min(shown) - 4) // 5), 0)
    figure, axes = _figure(8, 1.3 + 0.42 * len(rows))
    for place, values in done:
        spread = spread_of(values)
        axes.barh(place, spread.mean - low, 0.6, low, color=BLUE, xerr=spread.deviation, capsize=3)
        axes.annotate(str(spread), (1.01, place), xycoords=('axes fraction', 'data'), va='center', fontsize=9)
    for points, label, style in ((dots, 'a run', {'marker': 'o', 'color': 'white', 'mec': 'black', 'ms': 4}),
                                 (marks, 'paper', {'marker': '|', 'color': ORANGE, 'mew': 3, 'ms': 18})):  # fmt: skip
        if points:
            axes.plot(*zip(*points, strict=True), linestyle='', label=label, **style)  # type: ignore[arg-type]
    axes.set_yticks(range(len(rows)), list(rows))
    axes.set_ylim(len(rows) - 0.5, -0.5)
    axes.set_xlim(low, min(max(shown) + 2, 100.5))
    axes.set_xlabel(f'top-1, %, mean ± sd{f" (the axis starts at {low:g})" if low else ""}')
    axes.set_title(title, fontsize=10, loc='left', x=0, wrap=True)
    if dots or marks:
        figure.legend(loc='outside lower right', ncols=2, fontsize=8, frameon=False)
    return _save(figure, 'table', title)
