"""Runs an ablation table of the DHVT paper, row after row, and prints it beside the paper's figures.

    python tools/ablate.py TABLE [--seeds 0 1 2] [--output DIR] [--nproc N] [further flags of main.py]

TABLE is 5, 6, 8, 9, 10, 11 or affines. Every row is a model of one class, made by `--model-kwargs`, and every run is a
call of main.py in its own folder, DIR/ROW/seedN, with `--auto-resume`: the same command again leaves finished runs as
they are and goes on with the one that was stopped. Flags are the paper's for its ablations: CIFAR-100, 300 epochs, a
total batch of 512, 10 epochs of warm-up, learning rate 1e-3, four seeds; further flags come after them and win.

After each run DIR/table.md, table.csv and table.png are written. A run counts with its best top-1, as the paper's do; a
row has the mean of its runs, their standard deviation (of a sample, n-1) and the best of them.

What the paper leaves open, and what is done here:

- The baseline, "DeiT-T with 4 heads", is ViT's stem, attention and feed-forward with DeiT's position embedding.
- Position embedding beside SOPE (table 5): DeiT's too, on class and patch tokens, after the stem.
- Head token on the baseline (table 6): the attention alone changes; position embedding, stem and feed-forward stay.
  Two rows of table 6, without head tokens, are table 5's, for comparison.
- Split class token (table 8): it passes by the feed-forward as it does in DAFF: the block adds its normed value to it.
- Average pooling (table 8): 3x3, stride 1, zero padding counted, between the two linear layers, where DAFF has its
  depthwise convolution, and with the shortcut that DAFF has around that; no aggregation.
- Aggregation on all tokens (table 9): the same channel weights multiply the class token and the patch tokens.
- Heads (table 10): "S" is trained with the paper's batch for S on CIFAR-100, 256.
- LayerNorm in SOPE or DAFF (table 11): over the channels of each position, eps 1e-6, in each norm's place. The learning
  rate is scaled with the batch, as always.
- Position embeddings are exempt from weight decay, as in DeiT.
"""

from __future__ import annotations

import csv
import io
import json
import os
import re
import shlex
import signal
import statistics
import subprocess
import sys
import threading
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from types import FrameType
from typing import Any, NamedTuple

import yaml

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from config.arguments import parse_args
from config.builders import build_model
from config.errors import one_line_errors
from config.flags import FROM_ONE, SEED, FlagParser
from datasets import DATA_SETS
from pipeline.workers import SIGNALS
from training import checkpoint as ckpt
from training.signals import Interrupted
from training.state import FREE_ARGUMENTS
from utils import InputError, UsageError, num_usable_cores

ROOT = Path(__file__).resolve().parent.parent
TINY, SMALL = 'dhvt_tiny_cifar_patch4', 'dhvt_small_cifar_patch4'
LOG = 'console.log'
RECIPE = [
    *('--data-set', 'CIFAR', '--data-path', 'data/cifar', '--input-size', '32', '--epochs', '300'),
    *('--warmup-epochs', '10', '--lr', '1e-3', '--dist-eval', '--checkpoint-every', '10m'),
]
OWN_FLAGS = {  # which this program gives main.py itself
    *('--output-dir', '--seed', '--auto-resume', '--no-auto-resume', '--resume', '--eval', '--only-test-speed'),
    *('--start-epoch', '--export-safetensors', '--model-kwargs'),
}


class Row(NamedTuple):
    """A model and how it is trained. `paper` is the published top-1 in percent, `batch` all processes' together."""

    name: str
    kwargs: Mapping[str, Any]
    paper: float
    model: str = TINY
    batch: int = 512


class Table(NamedTuple):
    title: str
    rows: tuple[Row, ...]
    fixed: tuple[str, ...] = ()  # flags that the rows differ in


class Result(NamedTuple):
    """What a row's finished runs gave."""

    parameters: int | None
    accuracies: Mapping[int, float]  # best top-1 in percent, by seed
    trained: str  # on what and for how long, for the table's heading

    @property
    def mean(self) -> float:
        return statistics.fmean(self.accuracies.values())

    @property
    def deviation(self) -> float | None:
        """Of a sample; None for a single run."""
        return statistics.stdev(self.accuracies.values()) if len(self.accuracies) > 1 else None

    @property
    def best(self) -> float:
        return max(self.accuracies.values())


VIT = {'stem': 'patch', 'attention': 'plain', 'feed_forward': 'mlp'}
DEIT = {**VIT, 'pos_embed': 'learn'}
PLAIN = {'attention': 'plain'}
SOPE, DAFF = {**PLAIN, 'feed_forward': 'mlp'}, {**PLAIN, 'stem': 'patch'}
APE = {'pos_embed': 'learn'}
NORM_NAMES = {'batch': 'BN', 'layer': 'LN'}
NORM_FIGURES = {  # at batch 128, 256, 512
    ('batch', 'batch'): (79.69, 80.31, 80.98),
    ('batch', 'layer'): (78.69, 79.55, 79.25),
    ('layer', 'batch'): (79.24, 80.02, 80.26),
    ('layer', 'layer'): (78.46, 79.09, 78.90),
}

TABLES = {
    '5': Table(
        'Table 5: position embedding, SOPE, DAFF',
        (
            Row('position embedding (DeiT-T, 4 heads)', DEIT, 67.59),
            Row('none of the three', VIT, 58.72),
            Row('position embedding + SOPE', {**SOPE, **APE}, 73.68),
            Row('SOPE', SOPE, 69.65),
            Row('position embedding + DAFF', {**DAFF, **APE}, 79.47),
            Row('DAFF', DAFF, 79.75),
            Row('position embedding + SOPE + DAFF', {**PLAIN, **APE}, 80.17),
            Row('SOPE + DAFF', PLAIN, 80.35),
        ),
    ),
    '6': Table(
        'Table 6: head tokens',
        (
            Row('DeiT-T, 4 heads', DEIT, 67.59),
            Row('DeiT-T, 4 heads + head tokens', {**DEIT, 'attention': 'head'}, 69.10),
            Row('SOPE + DAFF', PLAIN, 80.35),
            Row('SOPE + DAFF + head tokens (DHVT-T)', {}, 80.85),
        ),
    ),
    '8': Table(
        'Table 8: from ViT towards DAFF',
        (
            Row('split class token', {**DEIT, 'feed_forward': 'split'}, 68.76),
            Row('split + aggregation on class token', {**DEIT, 'feed_forward': 'split', 'aggregation': 'class'}, 69.34),
            Row('split + 3x3 average pooling', {**DEIT, 'feed_forward': 'pool'}, 70.48),
        ),
    ),
    '9': Table(
        'Table 9: the parts of DAFF',
        (
            Row('DHVT-T', {}, 80.85),
            Row('aggregation on all tokens', {'aggregation': 'all'}, 78.34),
            Row('no shortcut around the depthwise convolution', {'shortcut': False}, 80.14),
        ),
    ),
    '10': Table(
        'Table 10: heads',
        (
            Row('DHVT-T, 3 heads', {'num_heads': 3}, 80.92),
            Row('DHVT-T, 4 heads', {'num_heads': 4}, 80.98),
            Row('DHVT-S, 4 heads', {'num_heads': 4}, 82.27, SMALL, 256),
            Row('DHVT-S, 6 heads', {'num_heads': 6}, 82.59, SMALL, 256),
            Row('DHVT-S, 8 heads', {'num_heads': 8}, 82.82, SMALL, 256),
        ),
        fixed=('--model',),
    ),
    '11': Table(
        'Table 11: norm in SOPE - norm in DAFF',
        tuple(
            Row(
                f'{NORM_NAMES[stem]}-{NORM_NAMES[inside]}, batch {batch}',
                {'stem_norm': stem, 'feed_forward_norm': inside},
                figure,
                batch=batch,
            )
            for (stem, inside), figures in NORM_FIGURES.items()
            for batch, figure in zip((128, 256, 512), figures, strict=True)
        ),
        fixed=('--batch-size', '--accum-steps'),
    ),
    'affines': Table(
        'The affines of SOPE',
        (
            Row('with both affines (DHVT-T)', {}, 80.90),
            Row('without', {'stem': 'no-affine'}, 80.72),
        ),
    ),
}


def get_args_parser() -> FlagParser:
    parser = FlagParser(
        'ablate.py', description="Run a table of the paper's ablations. Further flags are main.py's, and win."
    )
    parser.add_argument('table', metavar='TABLE', choices=TABLES, help=', '.join(TABLES))
    parser.add_argument('--seeds', nargs='+', type=SEED, default=[0, 1, 2, 3], help='a run of each row for each')
    parser.add_argument('--output', type=Path, help='folder of the runs and the table (output/ablate/TABLE)')
    parser.add_argument('--nproc', type=FROM_ONE, default=1, help='processes that share the batch, by torchrun')
    parser.add_argument('--model-kwargs', nargs='*', default=[], metavar='KEY=VALUE', help="beside each row's own")
    parser.add_argument('--show', action='store_true', help='only print the table of the runs that are there')
    parser.add_argument('--dry-run', action='store_true', help='only print the commands')
    return parser


# Commands and folders


def row_folder(output: Path, table: Table, row: Row) -> Path:
    number = table.rows.index(row) + 1
    return output / f'{number}-{re.sub("[^a-z0-9]+", "-", row.name.lower()).strip("-")}'


def run_flags(
    row: Row, seed: int, *, folder: Path, nproc: int, further: Sequence[str], kwargs: Sequence[str]
) -> list[str]:
    """main.py's flags for one run.

    Raises:
        UsageError: if the processes cannot share the batch.
    """
    if row.batch % nproc:
        raise UsageError(f'--nproc {nproc} processes cannot share a total batch of {row.batch}')
    options = [*(f'{key}={value}' for key, value in row.kwargs.items()), *kwargs]
    return [
        *('--model', row.model, *RECIPE, '--batch-size', str(row.batch // nproc), *further),
        *(['--model-kwargs', *options] if options else []),
        *('--seed', str(seed), '--output_dir', str(folder), '--auto-resume'),
    ]


def command_of(flags: Sequence[str], nproc: int) -> list[str]:
    launcher = ['-m', 'torch.distributed.run', '--standalone', '--nproc_per_node', str(nproc)] if nproc > 1 else []
    return [sys.executable, *launcher, str(ROOT / 'main.py'), *flags]


def check_further(table: Table, further: Sequence[str], kwargs: Sequence[str]) -> None:
    """Refuses flags that would make the rows something else.

    Raises:
        UsageError: for one of them.
    """
    for arg in further:
        name = arg.partition('=')[0].replace('_', '-')
        if arg.startswith('--') and name in OWN_FLAGS:
            raise UsageError(f'{name} is set by ablate.py')
        if arg.startswith('--') and name in table.fixed:
            raise UsageError(f"{name} is what this table's rows differ in")
    taken = {key for row in table.rows for key in row.kwargs}
    for text in kwargs:
        if text.partition('=')[0] in taken:
            raise UsageError(f"--model-kwargs {text}: this is what this table's rows differ in")


def check_flags(flags: Sequence[str]) -> None:
    """Parses a run's flags and builds its model, before anything runs.

    Raises:
        UsageError: if something is refused.
    """
    args = parse_args(flags)
    build_model(args, args.nb_classes or DATA_SETS[args.data_set].num_classes)


# What is in the folders


def _lines(folder: Path) -> list[dict[str, Any]]:
    path = folder / 'log.txt'
    if not path.exists():
        return []
    try:
        return [json.loads(line) for line in path.read_text().splitlines()]
    except ValueError:
        raise InputError(f'{path} is damaged: move {folder} away to run it again') from None


def _settings(folder: Path) -> dict[str, Any]:
    """What a run wrote into args.yaml, empty if there is none."""
    path = folder / 'args.yaml'
    if not path.exists():
        return {}
    try:
        settings = yaml.safe_load(path.read_text())
    except (yaml.YAMLError, ValueError):
        settings = None
    if not isinstance(settings, dict):
        raise InputError(f'{path} is damaged: move {folder} away to run it again')
    return settings


def is_finished(folder: Path) -> bool:
    """Whether a run has had all its epochs."""
    lines, settings = _lines(folder), _settings(folder)
    return bool(lines and settings) and lines[-1]['epoch'] + 1 >= settings['epochs'] + settings['cooldown_epochs']


def check_same(folder: Path, flags: Sequence[str], nproc: int) -> None:
    """Refuses a folder whose run was started with other flags.

    Raises:
        InputError: with the flags that differ.
    """
    stored, own = _settings(folder), vars(parse_args(flags))
    if not stored:
        return
    differences = [
        f'--{name} was {json.dumps(stored[name], default=str)}, is {json.dumps(value, default=str)}'
        for name, value in own.items()
        if name in stored
        and name not in FREE_ARGUMENTS
        and json.dumps(stored[name], default=str) != json.dumps(value, default=str)
    ]
    batch, before = own['batch_size'] * own['accum_steps'] * nproc, stored.get('derived', {}).get('total_batch')
    if before is not None and before != batch:
        differences.append(f'the total batch was {before}, is {batch}')
    if differences:
        raise InputError(f'{folder} has a run that differs: {"; ".join(differences)}. Choose another --output')


def read_result(folder: Path) -> Result:
    """The finished runs in a row's folder."""
    accuracies: dict[int, float] = {}
    parameters, how = None, ''
    for run in sorted(folder.glob('seed*'), key=lambda path: int(path.name[4:])):
        if not is_finished(run):
            continue
        line, settings = _lines(run)[-1], _settings(run)
        accuracies[int(run.name[4:])] = float(line['max_accuracy'])
        parameters = int(line['n_parameters'])
        fraction = settings.get('train_fraction', 1)
        part = f' ({fraction:g} of it)' if fraction != 1 else ''
        epochs = settings['epochs']
        how = f'{settings["data_set"]}{part}, {epochs} epoch{"s" if epochs > 1 else ""}'
    return Result(parameters, accuracies, how)


# The table


def _heading(table: Table, results: Sequence[Result]) -> str:
    trained = sorted({result.trained for result in results if result.trained})
    return f'{table.title}. Here: {"; ".join(trained) or "no finished run yet"}.'


def _cells(row: Row, result: Result) -> list[str]:
    if not result.accuracies:
        return [row.name, '', '0', '', '', f'{row.paper:.2f}']
    spread = '' if result.deviation is None else f' ± {result.deviation:.2f}'
    return [
        row.name,
        f'{result.parameters:,}',
        str(len(result.accuracies)),
        f'{result.mean:.2f}{spread}',
        f'{result.best:.2f}',
        f'{row.paper:.2f}',
    ]


def to_markdown(table: Table, results: Sequence[Result]) -> str:
    header = ['row', 'parameters', 'runs', 'top-1, mean ± sd', 'best', 'paper (CIFAR-100, 300 epochs)']
    lines = [header, ['---'] * len(header), *(_cells(*pair) for pair in zip(table.rows, results, strict=True))]
    return '\n'.join([_heading(table, results), '', *(f'| {" | ".join(cells)} |' for cells in lines), ''])


def to_csv(table: Table, results: Sequence[Result]) -> str:
    file = io.StringIO()
    writer = csv.writer(file, lineterminator='\n')
    writer.writerow(['row', 'model', 'options', 'parameters', 'runs', 'mean', 'sd', 'best', 'paper', 'seeds'])
    for row, result in zip(table.rows, results, strict=True):
        options = ' '.join(f'{key}={value}' for key, value in row.kwargs.items())
        figures: list[Any] = ['', '', '']
        if result.accuracies:
            figures = [result.mean, '' if result.deviation is None else result.deviation, result.best]
        seeds = ' '.join(f'{seed}:{accuracy:.4f}' for seed, accuracy in result.accuracies.items())
        cells = [result.parameters or '', len(result.accuracies)]
        writer.writerow([row.name, row.model, options, *cells, *figures, row.paper, seeds])
    return file.getvalue()


def draw(table: Table, results: Sequence[Result], path: Path) -> None:
    """A bar for each row's mean, with its deviation, each run as a dot, and the paper's figure as a line."""
    import matplotlib

    matplotlib.use('Agg')
    from matplotlib import pyplot

    figures = [row.paper for row in table.rows] + [x for result in results for x in result.accuracies.values()]
    low = max(5 * ((min(figures) - 4) // 5), 0)
    figure, axes = pyplot.subplots(figsize=(8, 1.3 + 0.42 * len(table.rows)), layout='constrained')
    for place, (row, result) in enumerate(zip(table.rows, results, strict=True)):
        if result.accuracies:
            axes.barh(
                place, result.mean - low, left=low, height=0.6, color='#4c78a8', xerr=result.deviation,
                ecolor='black', capsize=3, label='mean ± sd here',
            )  # fmt: skip
            axes.plot(
                list(result.accuracies.values()), [place] * len(result.accuracies), 'o', color='white',
                markeredgecolor='black', markersize=4, label='a run',
            )  # fmt: skip
            axes.annotate(
                _cells(row, result)[3], (1.01, place), xycoords=('axes fraction', 'data'), va='center', fontsize=9
            )
        axes.plot([row.paper] * 2, [place - 0.36, place + 0.36], color='#f58518', linewidth=3, label='paper')
    axes.set_yticks(range(len(table.rows)), [row.name for row in table.rows])
    axes.invert_yaxis()
    axes.set_xlim(low, min(max(figures) + 2, 100.5))
    axes.set_xlabel(f'top-1, %{f" (the axis starts at {low:g})" if low else ""}')
    axes.set_title(_heading(table, results), fontsize=10, loc='left', x=0, wrap=True)
    unique = dict(zip(*reversed(axes.get_legend_handles_labels()), strict=True))
    figure.legend(unique.values(), unique.keys(), loc='outside lower right', ncols=3, fontsize=8, frameon=False)
    ckpt.write_file(path, lambda file: figure.savefig(file, format='png', dpi=120))
    pyplot.close(figure)


def write_table(table: Table, output: Path) -> str:
    """Writes table.md, table.csv and table.png from what is in the folders; returns the first one's text."""
    results = [read_result(row_folder(output, table, row)) for row in table.rows]
    text = to_markdown(table, results)
    ckpt.write_bytes(output / 'table.md', text.encode())
    ckpt.write_bytes(output / 'table.csv', to_csv(table, results).encode())
    draw(table, results, output / 'table.png')
    return text


# Runs


class Child:
    """Runs a program that gets the signals that this one gets, each once: it has its own process group, because a
    terminal sends Ctrl-C to a whole one, and main.py leaves without a checkpoint at the second signal."""

    def __init__(self) -> None:
        self.signal = 0
        self._process: subprocess.Popen | None = None
        self._understood: set[int] = set()

    def _handle(self, number: int, frame: FrameType | None) -> None:
        self.signal = self.signal or number
        self._pass_on(number)

    def _pass_on(self, number: int) -> None:
        if self._process is not None:
            self._process.send_signal(number if number in self._understood else signal.SIGTERM)

    @contextmanager
    def signals(self) -> Iterator[None]:
        """Passes signals on while its body runs, if this is the main thread."""
        if threading.current_thread() is not threading.main_thread():
            yield
            return
        ignored = signal.getsignal(signal.SIGHUP) == signal.SIG_IGN  # it is with nohup
        caught = [number for number in SIGNALS if number != signal.SIGHUP or not ignored]
        before = {number: signal.signal(number, self._handle) for number in caught}
        try:
            yield
        finally:
            for number, handler in before.items():
                signal.signal(number, handler)

    def run(self, command: Sequence[str], *, log: Path, env: Mapping[str, str], torchrun: bool) -> int:
        """Runs it to its end, with its output at the end of a file; returns the exit code, negative for a signal's."""
        self._understood = {signal.SIGTERM, signal.SIGINT} if torchrun else set(SIGNALS)
        with log.open('ab') as file, self.signals():
            self._process = subprocess.Popen(
                command, stdin=subprocess.DEVNULL, stdout=file, stderr=subprocess.STDOUT, env=env,
                start_new_session=True,
            )  # fmt: skip
            if self.signal:  # it came before there was a process
                self._pass_on(self.signal)
            code = self._process.wait()
            self._process = None
        return code


def last_line(path: Path) -> str:
    lines = [line.strip() for line in path.read_text(errors='replace').splitlines() if line.strip()]
    return lines[-1] if lines else 'nothing'


def run_one(what: str, flags: Sequence[str], *, folder: Path, nproc: int) -> float:
    """Runs main.py once; returns its best top-1 in percent.

    Raises:
        Interrupted: after a signal; main.py has then had it too.
        InputError: if main.py fails.
    """
    folder.mkdir(parents=True, exist_ok=True)
    log = folder / LOG
    env = dict(os.environ)
    if nproc > 1:
        env.setdefault('OMP_NUM_THREADS', str(max(num_usable_cores() // nproc, 1)))
    child = Child()
    code = child.run(command_of(flags, nproc), log=log, env=env, torchrun=nproc > 1)
    if child.signal:
        name = signal.Signals(child.signal).name
        raise Interrupted(child.signal, f'{name} in {what}; the same command goes on from there ({log})')
    if code or not is_finished(folder):
        raise InputError(
            f'{what} ended with exit code {code}: {last_line(log)!r}. Its log is {log}; once that is mended, the same '
            'command goes on from there'
        )
    return float(_lines(folder)[-1]['max_accuracy'])


def main(argv: Sequence[str] | None = None) -> None:
    """Runs the program.

    Raises:
        SystemExit: with 2 for wrong flags, 1 if a run fails or for anything else that cannot be used, 128 plus its
            number after a signal, each after one line that says so.
    """
    args, further = get_args_parser().parse_known_args(argv)
    with one_line_errors('ablate.py'):
        table: Table = TABLES[args.table]
        output: Path = args.output or Path('output') / 'ablate' / args.table
        if args.show:
            if not output.is_dir():
                raise InputError(f'{output}: no such folder; --output names it')
            print(write_table(table, output), end='')
            return
        check_further(table, further, args.model_kwargs)

        def flags(row: Row, seed: int) -> list[str]:
            folder = row_folder(output, table, row) / f'seed{seed}'
            return run_flags(row, seed, folder=folder, nproc=args.nproc, further=further, kwargs=args.model_kwargs)

        for row in table.rows:
            check_flags(flags(row, args.seeds[0]))
        runs = [(row, seed) for seed in dict.fromkeys(args.seeds) for row in table.rows]
        if args.dry_run:
            for row, seed in runs:
                print(shlex.join(command_of(flags(row, seed), args.nproc)))
            return
        for row in table.rows:
            for folder in row_folder(output, table, row).glob('seed*'):
                check_same(folder, flags(row, int(folder.name[4:])), args.nproc)
        output.mkdir(parents=True, exist_ok=True)
        for number, (row, seed) in enumerate(runs, 1):
            folder = row_folder(output, table, row) / f'seed{seed}'
            what = f'run {number} of {len(runs)}: {row.name}, seed {seed}'
            if is_finished(folder):
                print(f'{what}: finished before', flush=True)
                continue
            print(f'{what} … {folder / LOG}', flush=True)
            accuracy = run_one(what, flags(row, seed), folder=folder, nproc=args.nproc)
            print(f'{what}: best top-1 {accuracy:.2f}%', flush=True)
            write_table(table, output)
        print(write_table(table, output), end='')


if __name__ == '__main__':
    main()
