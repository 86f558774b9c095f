"""How fast training, evaluation and the input pipeline are, beside a baseline.

    python tools/benchmark.py step --baseline "--amp off" --candidate "--amp bf16" --candidate "--compile default"
    python tools/benchmark.py epoch --data-set FOLDER --data-path DATA --train-fraction 0.1 --baseline "" …

| step    | training steps by `engine.train_one_epoch`, on made-up images that lie on the device          |
| eval    | `engine.evaluate` likewise; its batches are 1.5 times --batch-size, as in every run            |
| loader  | epochs of the training loader alone                                                             |
| epoch   | whole runs of main.py: the training time of the last epoch, and its part spent waiting for data |
| memory  | peak memory of a training step, for each of --batch-sizes                                       |
| augment | tools/benchmark_augment.py, with all that follows                                               |

A variant is a text of main.py's flags. Flags that stand outside such a text count for all variants; without any the
model is DHVT-T/4 at 32 px with batch 128. Beside main.py's flags the text may hold

    timm:NAME[:KEY=VALUE,…]   a model of timm's registry, in place of --model and --model-kwargs
    ENV:NAME=VALUE            an environment variable
    LABEL:TEXT                what the table calls the variant
    --worktree REV            the code of another commit, with those of the flags that it knows
    --plain                   DHVT's published forward passes as they are written: contiguous (B, C, H, W) maps, three
                              convolutions, explicit attention; and the default allocator

Each variant has a process of its own, which builds everything through that commit's `main.main`. The processes are
asked in turn for one measurement, round after round, and sleep in between. Rates are medians over the rounds, ratios
quotients of medians, in brackets the lowest and the highest of the rounds' own. Utilisation is the model's work (two
operations a multiply-add, three times as many in training) for each second, as a part of the best rate of square matrix
products in the same precision and on as many threads.
"""

from __future__ import annotations

import argparse
import importlib
import io
import json
import os
import platform
import re
import shlex
import statistics
import subprocess
import sys
import tarfile
import tempfile
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager, suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from config.errors import one_line_errors
from config.flags import FROM_ONE, POSITIVE, FlagParser
from utils import InputError, UsageError, num_usable_cores

ROOT = Path(__file__).resolve().parent.parent
WORKER = ROOT / 'tools' / 'benchmark_worker.py'
ALLOCATOR = re.compile('MALLOC_.*|GLIBC_TUNABLES|LD_PRELOAD')
NO_MEMORY = re.compile("out of (gpu |cuda )?memory|can't allocate|cannot allocate|bad_alloc|MemoryError", re.IGNORECASE)
SETTLE = 0.3  # seconds, in which the threads of the process that was measured last go to sleep


def get_args_parser() -> FlagParser:
    parser = FlagParser('benchmark.py', description='Speed and memory of training, evaluation and the input pipeline, '
                        "beside a baseline. Further flags are main.py's, for all variants.")  # fmt: skip
    parser.add_argument('what', choices=('step', 'eval', 'augment', 'loader', 'epoch', 'memory'))
    parser.add_argument('--baseline', default='', metavar='FLAGS', help='the variant that the others are divided by')
    parser.add_argument('--candidate', default=[], action='append', metavar='FLAGS', help='another variant')
    parser.add_argument('--rounds', default=5, type=FROM_ONE, help='measurements of each variant, in turn')
    parser.add_argument('--seconds', default=2.0, type=POSITIVE, help='least length of a measurement')
    parser.add_argument('--images', default=2048, type=FROM_ONE, help='made-up training images (loader, epoch)')
    parser.add_argument('--batch-sizes', default=[32, 64, 128], nargs='+', type=FROM_ONE, help='(memory)')
    parser.add_argument('--json', metavar='FILE', type=os.path.abspath, help='write all that was measured')
    parser.add_argument('--profile', metavar='DIR', type=os.path.abspath, help='write operators, or on a GPU kernels '
                        'and the gaps between them, by time (step, eval)')  # fmt: skip
    return parser


@dataclass(frozen=True)
class Variant:
    """What is measured: flags of main.py, and where and how they are run."""

    label: str
    flags: list[str] = field(default_factory=list)
    env: dict[str, str] = field(default_factory=dict)
    revision: str | None = None
    plain: bool = False

    @classmethod
    def parse(cls, text: str) -> Variant:
        """A variant from the text on the command line.

        Raises:
            UsageError: if a part of it that is not main.py's cannot be read.
        """
        parser = argparse.ArgumentParser(add_help=False, allow_abbrev=False, exit_on_error=False)
        parser.add_argument('--worktree', metavar='REV')
        parser.add_argument('--plain', action='store_true')
        try:
            own, words = parser.parse_known_args(shlex.split(text))
        except (ValueError, argparse.ArgumentError) as err:
            raise UsageError(f'{text!r}: {err}') from None
        label, flags, env = text.strip() or 'as it is', [], {}
        for word in words:
            kind, _, rest = word.partition(':')
            if kind == 'timm':
                name, _, settings = rest.partition(':')
                flags += ['--model', name, '--model-kwargs']
                flags += filter(None, re.split(r',(?![^(\[]*[)\]])', settings))
            elif kind == 'ENV':
                key, equals, value = rest.partition('=')
                if not (key and equals):
                    raise UsageError(f'{word!r} is not of the form ENV:NAME=VALUE')
                env[key] = value
            elif kind == 'LABEL':
                label = rest
            else:
                flags.append(word)
        return cls(label, flags, env, own.worktree, own.plain)

    def environment(self) -> dict[str, str]:
        """The process's environment variables."""
        inherited: Mapping[str, str] = os.environ
        if self.plain:
            inherited = {name: value for name, value in inherited.items() if not ALLOCATOR.fullmatch(name)}
            # That is glibc's own default; main.py leaves an allocator alone that the environment configures.
            inherited = {**inherited, 'MALLOC_PERTURB_': '0', 'TIMM_FUSED_ATTN': '0'}
        return {**inherited, **self.env}


# Machine and code


def git(*args: str) -> bytes:
    """What git prints about this project.

    Raises:
        InputError: if there is no git here, or it refuses.
    """
    try:
        return subprocess.run(['git', '-C', str(ROOT), *args], capture_output=True, check=True).stdout
    except FileNotFoundError:
        raise InputError('git is not installed, which --worktree needs') from None
    except subprocess.CalledProcessError as err:
        raise InputError(f'git {args[0]}: {err.stderr.decode(errors="replace").strip().splitlines()[0]}') from None


def check_out(revision: str, folder: Path) -> str:
    """Writes a commit's files into a folder; returns its hash.

    Raises:
        UsageError: if there is no such commit.
    """
    try:
        commit = git('rev-parse', '--verify', '--quiet', f'{revision}^{{commit}}').decode().strip()
    except (InputError, IndexError):
        raise UsageError(f'--worktree {revision}: git knows no such commit in {ROOT}') from None
    safely: dict[str, Any] = {'filter': 'data'} if hasattr(tarfile, 'data_filter') else {}  # Python 3.11.4, 3.10.12
    with tarfile.open(fileobj=io.BytesIO(git('archive', commit))) as archive:
        archive.extractall(folder, **safely)
    return commit


def describe_code() -> str | None:
    """The commit, with a + if files differ from it; None outside of git."""
    try:
        commit = git('rev-parse', 'HEAD').decode().strip()
        return commit + ('+' if git('status', '--porcelain', '--untracked-files=no').strip() else '')
    except (InputError, IndexError):
        return None


def describe_machine() -> dict[str, Any]:
    cpuinfo = Path('/proc/cpuinfo')
    names = re.findall(r'model name\s*: (.*)', cpuinfo.read_text()) if cpuinfo.exists() else []
    return {
        'processor': names[0] if names else platform.processor() or platform.machine(),
        'cores': num_usable_cores(),
        'system': platform.platform(),
    }


# Processes


class Worker:
    """A variant's process, which waits for requests."""

    def __init__(self, variant: Variant, tree: Path, stack: ExitStack) -> None:
        self.variant = variant
        self._scratch = stack.enter_context(tempfile.TemporaryDirectory(ignore_cleanup_errors=True))
        self._log = Path(self._scratch, 'log')
        self._tree = tree
        with open(self._log, 'w') as log:
            self._process = subprocess.Popen(
                [sys.executable, str(WORKER)],
                stdin=subprocess.PIPE,
                stdout=subprocess.PIPE,
                stderr=log,
                env=variant.environment(),
                text=True,
            )
        stack.callback(self.close)
        self.facts: dict[str, Any] = {}

    def start(self, what: str, common: Sequence[str], *, seconds: float, images: int) -> None:
        """Builds everything, up to the first measurement."""
        self.facts = self.ask(
            {
                'what': what,
                'tree': str(self._tree),
                'flags': [*common, *self.variant.flags],
                'scratch': self._scratch,
                'plain': self.variant.plain,
                'tolerant': self.variant.revision is not None,
                'seconds': seconds,
                'images': images,
                'env': list(self.variant.env),
            }
        )

    def ask(self, request: dict[str, Any]) -> dict[str, Any]:
        """The answer to a request.

        Raises:
            UsageError: if main.py refuses the variant's flags.
            InputError: if the process ends for any other reason.
        """
        assert self._process.stdin is not None and self._process.stdout is not None
        with suppress(BrokenPipeError):
            self._process.stdin.write(json.dumps(request) + '\n')
            self._process.stdin.flush()
            if sent := self._process.stdout.readline():
                answer: dict[str, Any] = json.loads(sent)
                return answer
        code = self._process.wait()
        lines = [line.strip() for line in self._log.read_text(errors='replace').splitlines() if line.strip()]
        last = lines[-1].removeprefix('main.py: error: ') if lines else ''
        if code < 0:
            last = f'the process was ended by signal {-code}: out of memory?'
        kind = UsageError if code == UsageError.exit_code else InputError
        raise kind(f'{self.variant.label}: {last or f"the process ended with code {code}"}')

    def close(self) -> None:
        assert self._process.stdin is not None
        with suppress(BrokenPipeError):
            self._process.stdin.close()
        try:
            self._process.wait(5)
        except subprocess.TimeoutExpired:
            self._process.kill()
            self._process.wait()


@contextmanager
def trees(variants: Sequence[Variant]) -> Iterator[tuple[list[Path], list[str | None]]]:
    """The folder of each variant's code, and its commit."""
    with ExitStack() as stack:
        found: dict[str | None, tuple[Path, str | None]] = {None: (ROOT, describe_code())}
        for variant in variants:
            if variant.revision is not None and variant.revision not in found:
                folder = Path(stack.enter_context(tempfile.TemporaryDirectory(ignore_cleanup_errors=True)))
                found[variant.revision] = folder, check_out(variant.revision, folder)
        yield [found[variant.revision][0] for variant in variants], [found[v.revision][1] for v in variants]


# Measuring


@dataclass
class Measured:
    """A variant's facts and, of each round, its answer; `failure` says why there is none."""

    variant: Variant
    commit: str | None
    facts: dict[str, Any] = field(default_factory=dict)
    samples: list[dict[str, Any]] = field(default_factory=list)
    failure: str | None = None

    @property
    def rates(self) -> list[float]:
        return [sample['images'] / sample['seconds'] for sample in self.samples]


def measure_in_turn(
    what: str,
    variants: Sequence[Variant],
    common: Sequence[str],
    *,
    rounds: int,
    seconds: float,
    images: int,
    profile: str | None,
) -> list[Measured]:
    """Keeps a process for each variant and asks one after the other, round after round."""
    with trees(variants) as (folders, commits), ExitStack() as stack:
        measured = [Measured(variant, commit) for variant, commit in zip(variants, commits, strict=True)]
        workers = []
        for variant, folder, one in zip(variants, folders, measured, strict=True):
            workers.append(Worker(variant, folder, stack))
            workers[-1].start(what, common, seconds=seconds, images=images)
            one.facts = workers[-1].facts
        for _ in range(rounds):
            for worker, one in zip(workers, measured, strict=True):
                time.sleep(SETTLE)
                one.samples.append(worker.ask({}))
        for number, worker in enumerate(workers):
            if profile is not None:
                Path(profile).mkdir(parents=True, exist_ok=True)
                slug = re.sub(r'\W+', '-', worker.variant.label).strip('-')[:60]
                worker.ask({'profile': str(Path(profile, f'{what}-{number}-{slug}.txt'))})
        return measured


def measure_apart(
    what: str,
    variants: Sequence[Variant],
    common: Sequence[str],
    *,
    rounds: int,
    seconds: float,
    images: int,
) -> list[Measured]:
    """Starts a new process for each measurement, which ends before the next one starts.

    With `memory`, a variant that runs out of it is noted as such.
    """
    with trees(variants) as (folders, commits):
        measured = [Measured(variant, commit) for variant, commit in zip(variants, commits, strict=True)]
        for _ in range(rounds):
            for variant, folder, one in zip(variants, folders, measured, strict=True):
                with ExitStack() as stack:
                    worker = Worker(variant, folder, stack)
                    try:
                        worker.start(what, common, seconds=seconds, images=images)
                        one.samples.append(worker.ask({}))
                    except InputError as err:
                        if what != 'memory' or not NO_MEMORY.search(str(err)):
                            raise
                        one.failure = str(err)
                    one.facts = worker.facts or one.facts
        return measured


# Results


def summarise(measured: Sequence[Measured]) -> list[dict[str, Any]]:
    """For the JSON file: of each variant what it is, what was measured, and what follows from that.

    The first is the baseline. `ratio` is the quotient of the medians, `ratios` are those of the rounds;
    `gemm_flops` is the best that any of the processes found in that precision.
    """
    peaks: dict[str, float] = {}
    for one in measured:
        if 'gemm_flops' in one.facts:
            precision = one.facts['precision']
            peaks[precision] = max(peaks.get(precision, 0.0), one.facts['gemm_flops'])
    base = measured[0].rates
    rows = []
    for one in measured:
        row: dict[str, Any] = {
            'label': one.variant.label,
            'worktree': one.variant.revision,
            'plain': one.variant.plain,
            'commit': one.commit,
            **one.facts,
            'samples': one.samples,
            'failure': one.failure,
        }
        rates = one.rates
        if rates:
            row |= {'images_per_second': statistics.median(rates), 'rates': rates}
            if len(base) == len(rates):
                row['ratio'] = statistics.median(rates) / statistics.median(base)
                row['ratios'] = [rate / other for rate, other in zip(rates, base, strict=True)]
            known = [sample['peak_memory_mib'] for sample in one.samples if sample['peak_memory_mib'] is not None]
            row['peak_memory_mib'] = max(known, default=None)
        if rates and 'gemm_flops' in one.facts:
            row['gemm_flops'] = peaks[one.facts['precision']]
            row['utilisation'] = row['flop_per_image'] * row['images_per_second'] / row['gemm_flops']
        if rates and 'data_seconds' in one.samples[0]:
            waits = [sample['data_seconds'] for sample in one.samples]
            if None not in waits:
                parts = [100 * wait / sample['seconds'] for wait, sample in zip(waits, one.samples, strict=True)]
                row['data_percent'] = statistics.median(parts)
        rows.append(row)
    return rows


def _spread(values: Sequence[float], digits: int) -> str:
    return f'{min(values):.{digits}f}–{max(values):.{digits}f}'


def _rate(rates: Sequence[float]) -> str:
    middle = statistics.median(rates)
    digits = 1 if middle < 1000 else 0
    return f'{middle:,.{digits}f} ({min(rates):,.{digits}f}–{max(rates):,.{digits}f})'


def _memory(mib: float | None) -> str:
    return '' if mib is None else f'{mib / 1024:.2f}'


def make_table(what: str, rows: Sequence[dict[str, Any]]) -> str:
    """The Markdown table."""
    titles = ['', 'images/s', 'ratio']
    if what in ('step', 'eval'):
        titles += ['precision', 'utilisation']
    elif what == 'epoch':
        titles += ['seconds', 'waiting for data']
    lines = []
    for row in rows:
        cells = [row['label'], _rate(row['rates']), f'{row["ratio"]:.2f} ({_spread(row["ratios"], 2)})']
        if what in ('step', 'eval'):
            cells += [row['precision'], f'{row["utilisation"]:.0%}']
        elif what == 'epoch':
            cells.append(f'{statistics.median(sample["seconds"] for sample in row["samples"]):.1f}')
            cells.append(f'{row["data_percent"]:.1f}%' if 'data_percent' in row else '')
        lines.append([*cells, _memory(row['peak_memory_mib'])])
    return _markdown([*titles, 'peak memory, GiB'], lines)


def make_memory_table(rows: Sequence[dict[str, Any]], labels: Sequence[str], sizes: Sequence[int]) -> str:
    """A line for each variant and a column for each batch size; `rows` go through the sizes first."""
    cells = iter([_memory(row.get('peak_memory_mib')) if row['failure'] is None else 'too large' for row in rows])
    lines = [[label, *(next(cells) for _ in sizes)] for label in labels]
    return _markdown(['peak memory, GiB', *(f'batch {size}' for size in sizes)], lines)


def _markdown(titles: Sequence[str], lines: Sequence[Sequence[str]]) -> str:
    rows = [titles, ['---'] * len(titles), *lines]
    return '\n'.join('| ' + ' | '.join(cell.replace('|', '\\|') for cell in row) + ' |' for row in rows)


def _joined(argv: Sequence[str]) -> list[str]:
    """The command line with `--candidate --plain` as `--candidate=--plain`, which argparse takes for two flags."""
    joined: list[str] = []
    for word in argv:
        if joined and joined[-1] in ('--baseline', '--candidate'):
            joined[-1] += f'={word}'
        else:
            joined.append(word)
    return joined


def main(argv: Sequence[str] | None = None) -> None:
    """Runs the program.

    Raises:
        SystemExit: with 2 for wrong flags, 1 for anything else that cannot be used, after one line that says so.
    """
    words = list(sys.argv[1:] if argv is None else argv)
    if words[:1] == ['augment']:
        importlib.import_module('tools.benchmark_augment').main(words[1:])
        return
    parser = get_args_parser()
    args, common = parser.parse_known_args(_joined(words))
    with one_line_errors('benchmark.py'):
        if args.profile and args.what not in ('step', 'eval'):
            raise UsageError('--profile is for step and eval')
        variants = [Variant.parse(text) for text in (args.baseline, *args.candidate)]
        labels = [variant.label for variant in variants]
        options: dict[str, Any] = {'rounds': args.rounds, 'seconds': args.seconds, 'images': args.images}
        if args.what == 'memory':
            sizes = [
                Variant(f'{v.label}, batch {size}', [*v.flags, '--batch-size', f'{size}'], v.env, v.revision, v.plain)
                for v in variants
                for size in args.batch_sizes
            ]
            measured = measure_apart('memory', sizes, common, **{**options, 'rounds': 1})
        elif args.what == 'epoch':
            measured = measure_apart('epoch', variants, common, **options)
        else:
            measured = measure_in_turn(args.what, variants, common, **options, profile=args.profile)
        rows = summarise(measured)
        machine = describe_machine()
        command = shlex.join(['python', 'tools/benchmark.py', *words])
        facts: dict[str, Any] = next((one.facts for one in measured if one.facts), {})
        if args.json:
            content = {
                'command': command,
                'date': time.strftime('%Y-%m-%d %H:%M:%S %z'),
                'commit': describe_code(),
                'machine': machine,
                'python': platform.python_version(),
                'what': args.what,
                'rounds': args.rounds,
                'variants': rows,
            }
            Path(args.json).write_text(json.dumps(content, indent=1) + '\n')
        batches = {one.facts.get('batch') for one in measured} if args.what != 'memory' else set()
        print(
            f'{facts.get("device")}, {machine["processor"]}, {facts.get("threads")} threads, '
            f'torch {facts.get("torch")}, '
            + (f'batch {batches.pop()}, ' if len(batches) == 1 else '')
            + f'{len(measured[0].samples)} round{"s" if len(measured[0].samples) != 1 else ""}, '
            f'{time.strftime("%Y-%m-%d")}\n'
        )
        if args.what == 'memory':
            print(make_memory_table(rows, labels, args.batch_sizes))
        else:
            print(make_table(args.what, rows))


if __name__ == '__main__':
    main()
