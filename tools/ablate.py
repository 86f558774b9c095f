"""Runs a table of experiments, row after row, and prints it, an ablation of the DHVT paper beside the paper's figures.

    python tools/ablate.py TABLE [--seeds 0 1 2] [--folds K] [--output DIR] [--nproc N] [further flags of main.py]

TABLE is one of tools/ablations.yaml; docs/tools.md says what is done where the paper leaves something open. Every row
is a model of one class, made by `--model-kwargs`, and every run is a call of main.py in its own folder, DIR/ROW/seedN,
with `--auto-resume`: the same command again leaves finished runs as they are and goes on with the one that was stopped.
Flags are the table's, which for the paper's ablations are CIFAR-100, 300 epochs, a total batch of 512, 10 epochs of
warm-up, learning rate 1e-3 and four seeds; further flags win, but may not be those that the rows set.

After each run DIR/table.md, table.csv, table.png and curves.png are written. A run counts with its best top-1, as the
paper's do; one that holds images out, with its best checkpoint's on the test images. A row has the mean of its runs,
over seeds and folds, their standard deviation (of a sample, n-1) and the best of them.
"""

from __future__ import annotations

import argparse
import csv
import io
import math
import os
import re
import shlex
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from contextlib import suppress
from functools import partial
from pathlib import Path
from types import FrameType
from typing import Any, NamedTuple

import yaml
from tqdm import tqdm

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from config.arguments import parse_args
from config.builders import build_model
from config.errors import one_line_errors
from config.flags import FROM_ONE, SEED, FlagParser
from datasets import find_info
from reports.figures import draw_log, draw_rows
from reports.runs import LoggedRun, choose_colors, read_run
from reports.seeds import COLUMNS, describe_training, summarize, to_markdown
from training import checkpoint as ckpt
from training.signals import Interrupted, Interrupts
from training.state import different_arguments
from utils import InputError, UsageError, num_usable_cores

ROOT = Path(__file__).resolve().parent.parent
LOG = 'console.log'
LOOK_EVERY, LINE_EVERY = 5.0, 300.0  # seconds between looks at a run, and between lines where there is no terminal
OWN_FLAGS = {  # which this program gives main.py itself
    *('--output-dir', '--seed', '--auto-resume', '--resume', '--eval', '--only-test-speed', '--start-epoch'),
    *('--export-safetensors', '--model-kwargs', '--fold', '--config', '-c'),
}


class Row(NamedTuple):
    """A model and how it is trained. `batch` is all processes' together, `paper` the published top-1 in percent."""

    name: str
    model: str
    batch: int
    flags: str = ''  # of main.py, after the table's
    options: str = ''  # of --model-kwargs
    paper: float | None = None


class Table(NamedTuple):
    title: str
    flags: list[str]
    rows: list[Row]
    fixed: set[str]  # flags that the rows set


def flag_name(word: str) -> str:
    """A flag in one spelling, without its value or --no-."""
    return re.sub('^--no-', '--', word.partition('=')[0].replace('_', '-')) if word[:2] == '--' else word[:2]


def read_table(title: str, flags: str, rows: Sequence[dict[str, Any]], fixed: str = '', **common: Any) -> Table:
    """A table of ablations.yaml. `common` is what the rows have that do not say otherwise."""
    texts = [row.get('flags', '') for row in rows]
    joined = [text if isinstance(text, str) else ' '.join(text) for text in texts]
    found = [Row(**{**common, **row, 'flags': text}) for row, text in zip(rows, joined, strict=True)]
    words = [*fixed.split(), *(word for row in found for word in shlex.split(row.flags))]
    return Table(title, shlex.split(flags), found, {flag_name(word) for word in words if word.startswith('--')})


TABLES = {
    name: read_table(**table)
    for name, table in yaml.safe_load((ROOT / 'tools' / 'ablations.yaml').read_text())['tables'].items()
}


def get_args_parser() -> FlagParser:
    parser = FlagParser('ablate.py', description="Run a table of experiments. Further flags are main.py's.")
    parser.add_argument('table', metavar='TABLE', choices=TABLES, help=', '.join(TABLES))
    parser.add_argument('--seeds', nargs='+', type=SEED, default=[0, 1, 2, 3], help='a run of each row for each')
    parser.add_argument('--folds', type=FROM_ONE, help="cross-validation: main.py's, a run of each seed for each fold")
    parser.add_argument('--output', type=Path, help='folder of the runs and the table (output/ablate/TABLE)')
    parser.add_argument('--nproc', type=FROM_ONE, default=1, help='processes that share the batch, by torchrun')
    parser.add_argument('--accum-steps', type=FROM_ONE, default=1, help='batches of a step that share it, too')
    parser.add_argument('--model-kwargs', nargs='*', default=[], metavar='KEY=VALUE', help="beside each row's own")
    parser.add_argument('--show', action='store_true', help='only print the table of the runs that are there')
    parser.add_argument('--dry-run', action='store_true', help='only print the commands')
    return parser


# Commands and folders


def row_folder(output: Path, table: Table, row: Row) -> Path:
    return output / f'{table.rows.index(row) + 1}-{re.sub("[^a-z0-9]+", "-", row.name.lower()).strip("-")}'


def run_flags(table: Table, row: Row, folder: Path, args: argparse.Namespace, further: Sequence[str]) -> list[str]:
    """main.py's flags for one run, whose folder's name has the seed, and the fold if there are any.

    Raises:
        UsageError: if the batch cannot be shared out.
    """
    size, rest = divmod(row.batch, args.nproc * args.accum_steps)
    if rest:
        raise UsageError(f'--nproc {args.nproc} times --accum-steps {args.accum_steps} does not divide {row.batch}')
    options = [*row.options.split(), *args.model_kwargs]
    numbers = zip(('--seed', '--fold', '--folds'), re.findall(r'\d+', folder.name), strict=False)
    return [
        *('--model', row.model, *table.flags, '--batch-size', str(size), '--accum-steps', str(args.accum_steps)),
        *(*shlex.split(row.flags), *further),
        *(['--model-kwargs', *options] if options else []),
        *(part for pair in numbers for part in pair),
        *('--output_dir', str(folder), '--auto-resume'),
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
        if flag_name(arg) in {*OWN_FLAGS, *table.fixed}:
            own = flag_name(arg) in OWN_FLAGS
            owner = 'ablate.py, by --seeds, --folds and --output' if own else "this table's rows"
            raise UsageError(f'{arg.partition("=")[0]} is set by {owner}')
    taken = {option.partition('=')[0] for row in table.rows for option in row.options.split()}
    for text in kwargs:
        if text.partition('=')[0] in taken:
            raise UsageError(f"--model-kwargs {text}: this is set by this table's rows")


# What is in the folders


def run_folders(folder: Path) -> list[Path]:
    """The folders of a row's runs, by seed and fold; a copy under another name is none."""
    found = [path for path in folder.glob('seed*') if re.fullmatch(r'seed\d+(-fold\d+of\d+)?', path.name)]
    return sorted(found, key=lambda path: [int(number) for number in re.findall(r'\d+', path.name)])


def check_same(folder: Path, flags: Sequence[str], nproc: int) -> None:
    """Refuses a folder whose run was started with other flags.

    Raises:
        InputError: with the flags that differ.
    """
    run, own = read_run(folder), vars(parse_args(flags))
    differences = [*different_arguments(run.args, own).values()]
    batch, before = own['batch_size'] * own['accum_steps'] * nproc, run.derived.get('total_batch')
    if before not in (None, batch):
        differences.append(f'the total batch was {before}, is {batch}')
    if differences:
        raise InputError(f'{folder} has a run that differs: {"; ".join(differences)}. Choose another --output')


def write_table(table: Table, output: Path) -> str:
    """Writes the table and its pictures from what is in the folders; returns the text of table.md."""
    found: dict[Row, dict[str, tuple[float, LoggedRun]]] = {}  # finished, by seed and fold, with what they count with
    for row in table.rows:
        runs = [
            (path.name.removeprefix('seed'), read_run(path)) for path in run_folders(row_folder(output, table, row))
        ]
        found[row] = {name: (run.final, run) for name, run in runs if run.final is not None}
    lines = [{'row': row.name, **row._asdict(), **summarize(runs)} for row, runs in found.items()]
    finished = [run for runs in found.values() for _, run in runs.values()]
    trained = sorted({describe_training(run) for run in finished})
    heading = f'{table.title}. Here: {"; ".join(trained) or "no finished run yet"}.'
    text, file = to_markdown(heading, lines), io.StringIO()
    writer = csv.DictWriter(file, COLUMNS, extrasaction='ignore', lineterminator='\n')
    writer.writeheader()
    writer.writerows(lines)
    bars = {row.name: [accuracy for accuracy, _ in runs.values()] for row, runs in found.items()}
    of_cifar = all(run.args.get('data_set') == 'CIFAR' for run in finished)  # CIFAR-100, as the paper's figures
    picture = draw_rows(heading, bars, [row.paper for row in table.rows] if of_cifar else [])
    files = {'table.md': text.encode(), 'table.csv': file.getvalue().encode(), 'table.png': picture.data}
    if finished:
        choose_colors({row.name: [run for _, run in runs.values()] for row, runs in found.items() if runs})
        files['curves.png'] = next(draw_log(finished)).data  # the accuracy
    for name, data in files.items():
        ckpt.write_bytes(output / name, data)
    return text


# Runs


class Child(Interrupts):
    """Runs a program that gets the signals that this one gets, each once: it has its own process group, because a
    terminal sends Ctrl-C to a whole one, and main.py leaves without a checkpoint at the second signal."""

    _process: subprocess.Popen | None = None
    _torchrun = False

    def _handle(self, number: int, frame: FrameType | None) -> None:
        self.signal = self.signal or number
        if self._process is not None:
            self._process.send_signal(signal.SIGTERM if self._torchrun and number != signal.SIGINT else number)

    def run(
        self, command: Sequence[str], *, log: Path, env: Mapping[str, str], torchrun: bool, show: Callable[[], object]
    ) -> int:
        """Runs it to its end, with its output at the end of a file; returns the exit code, negative for a signal's.

        Args:
            show: called now and then, to show how far it is.
        """
        self._torchrun = torchrun  # which knows two signals only
        with log.open('ab') as file, self.installed():
            self._process = subprocess.Popen(
                command, stdin=subprocess.DEVNULL, stdout=file, stderr=subprocess.STDOUT, env=env,
                start_new_session=True,
            )  # fmt: skip
            if self.signal:  # it came before there was a process
                self._handle(self.signal, None)
            while True:
                with suppress(subprocess.TimeoutExpired):
                    return self._process.wait(timeout=LOOK_EVERY)
                show()


def last_line(path: Path) -> str:
    lines = [line.strip() for line in path.read_text(errors='replace').splitlines() if line.strip()]
    return lines[-1] if lines else 'nothing'


def describe_progress(folder: Path) -> str:
    """How far a run is: its whole epochs, its best top-1, and what it printed last."""
    run = read_run(folder)
    best = f', best top-1 {run.best.value:.2f}%' if run.best else ''
    return f'{run.status}{best}; ' * bool(run.args) + last_line(folder / LOG)


def run_one(what: str, flags: Sequence[str], *, folder: Path, nproc: int) -> float:
    """Runs main.py once; returns its best top-1 in percent.

    Raises:
        Interrupted: after a signal; main.py has then had it too.
        InputError: if main.py fails.
    """
    folder.mkdir(parents=True, exist_ok=True)
    log = folder / LOG
    threads = {'OMP_NUM_THREADS': str(max(num_usable_cores() // nproc, 1))} if nproc > 1 else {}
    env = {**threads, **os.environ}
    child, shown = Child(), -math.inf
    with tqdm(bar_format='{desc}', disable=None, file=sys.stdout, leave=False, dynamic_ncols=True) as line:
        line.set_description_str(what)

        def show() -> None:
            nonlocal shown
            with suppress(InputError, OSError):  # which are looked at once the run is over
                line.set_description_str(f'{what}: {describe_progress(folder)}')
            if line.disable and time.monotonic() - shown > LINE_EVERY:
                print(line.desc, flush=True)
                shown = time.monotonic()

        code = child.run(command_of(flags, nproc), log=log, env=env, torchrun=nproc > 1, show=show)
    if child.signal:
        name = signal.Signals(child.signal).name
        raise Interrupted(child.signal, f'{name} in {what}; the same command goes on from there ({log})')
    accuracy = None if code else read_run(folder).final
    if accuracy is None:
        raise InputError(
            f'{what} ended with exit code {code}: {last_line(log)!r}. Its log is {log}; once that is mended, the same '
            'command goes on from there'
        )
    return accuracy


def main(argv: Sequence[str] | None = None) -> None:
    """Runs the program; `one_line_errors` says how it ends. After a signal the exit code is 128 plus its number."""
    args, further = get_args_parser().parse_known_args(argv)
    with one_line_errors('ablate.py'):
        table: Table = TABLES[args.table]
        output: Path = args.output or Path('output') / 'ablate' / args.table
        if args.show:
            if further:
                raise UsageError(f'--show only reads what is there: {further[0]} changes nothing')
            if not output.is_dir():
                raise InputError(f'{output}: no such folder; --output names it')
            print(write_table(table, output), end='')
            return
        check_further(table, further, args.model_kwargs)
        names = [f'seed {seed}' + (f', fold {fold} of {args.folds}' if args.folds else '')
                 for seed in dict.fromkeys(args.seeds) for fold in range(args.folds or 1)]  # fmt: skip
        runs = [(row, name, row_folder(output, table, row) / name.replace(', ', '-').replace(' ', ''))
                for name in names for row in table.rows]  # fmt: skip
        flags_of = partial(run_flags, table, args=args, further=further)
        for row, _, folder in runs[: len(table.rows)]:  # before anything runs
            own = parse_args(flags_of(row, folder))
            build_model(own, own.nb_classes or find_info(own.data_set).num_classes)
        if args.dry_run:
            for row, _, folder in runs:
                print(shlex.join(command_of(flags_of(row, folder), args.nproc)))
            return
        for row in table.rows:
            for folder in run_folders(row_folder(output, table, row)):
                if folder.name.partition('of')[2] != str(args.folds or ''):
                    raise InputError(f'{folder} has a run of other folds. Choose another --output')
                check_same(folder, flags_of(row, folder), args.nproc)
        output.mkdir(parents=True, exist_ok=True)
        for number, (row, name, folder) in enumerate(runs, 1):
            what = f'run {number} of {len(runs)}: {row.name}, {name}'
            if read_run(folder).final is not None:
                print(f'{what}: finished before', flush=True)
                continue
            print(f'{what} … {folder / LOG}', flush=True)
            accuracy = run_one(what, flags_of(row, folder), folder=folder, nproc=args.nproc)
            print(f'{what}: best top-1 {accuracy:.2f}%', flush=True)
            write_table(table, output)
        print(write_table(table, output), end='')


if __name__ == '__main__':
    main()
