"""tools/benchmark.py: what it measures, what it makes of that, and how it refuses."""

from __future__ import annotations

import json
import os
import shlex
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from statistics import median
from typing import Any, ClassVar

import pytest
import timm
import torch

import models  # noqa: F401
from config.arguments import get_args_parser as get_flags
from models import dhvt
from tests.conftest import ROOT
from tools import benchmark, benchmark_augment, benchmark_worker
from tools.benchmark import Measured, Variant, make_memory_table, make_table, summarise
from utils import UsageError

SMALL = ['--model-kwargs', 'embed_dim=32', 'depth=1', 'num_heads=2', '--batch-size', '8', '--device', 'cpu']
SHORT = ['--rounds', '2', '--seconds', '0.1']


def has_git() -> bool:
    try:
        return bool(benchmark.git('rev-parse', 'HEAD'))
    except benchmark.InputError:
        return False


def test_variants() -> None:
    variant = Variant.parse(
        "LABEL:'deep one' timm:deit_tiny_cifar_patch4:depth=2,img_size=(24,32) --amp off ENV:A=b=c --worktree HEAD"
    )
    assert variant == Variant(
        'deep one',
        ['--model', 'deit_tiny_cifar_patch4', '--model-kwargs', 'depth=2', 'img_size=(24,32)', '--amp', 'off'],
        {'A': 'b=c'},
        'HEAD',
    )
    args = get_flags().parse_args(variant.flags)
    assert args.model_kwargs == [('depth', 2), ('img_size', (24, 32))]
    # A model of its own does not get arguments that count for all.
    args = get_flags().parse_args(['--model-kwargs', 'depth=3', *Variant.parse('timm:resnet18').flags])
    assert (args.model, args.model_kwargs) == ('resnet18', [])
    assert Variant.parse('').label == 'as it is'
    for text in ('ENV:A', "LABEL:'a", '--worktree'):
        with pytest.raises(UsageError):
            Variant.parse(text)


def test_environment_of_the_plain_baseline(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv('MALLOC_TRIM_THRESHOLD_', '1')
    assert Variant('').environment()['MALLOC_TRIM_THRESHOLD_'] == '1'
    env = Variant('', env={'MALLOC_ARENA_MAX': '2'}, plain=True).environment()
    assert {name for name in env if name.startswith('MALLOC_')} == {'MALLOC_ARENA_MAX', 'MALLOC_PERTURB_'}
    assert env['MALLOC_ARENA_MAX'] == '2' and env['PATH'] == os.environ['PATH']


@pytest.mark.parametrize('name', ['dhvt_tiny_cifar_patch4', 'dhvt_tiny_cifar_patch4_distilled'])
def test_plain_forward_is_the_same_function(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    torch.manual_seed(0)
    model = timm.create_model(name, embed_dim=32, depth=2, num_heads=2, num_classes=5).double()
    images = torch.randn(2, 3, 16, 32, dtype=torch.float64)

    def results() -> list[torch.Tensor]:
        model.load_state_dict(state)
        logits = model.train()(images)
        gradients = torch.autograd.grad(logits.square().sum(), list(model.parameters()))
        return [logits, *gradients, *model.buffers(), model.eval()(images)]

    state = {key: value.clone() for key, value in model.state_dict().items()}
    own = [value.clone() for value in results()]
    for kind in (dhvt.HeadInteractedAttention, dhvt.DynamicAggregationFeedForward):
        monkeypatch.setattr(kind, 'forward', kind.forward)  # puts it back afterwards
    before = dhvt.HeadInteractedAttention.forward
    benchmark_worker.make_plain()
    assert dhvt.HeadInteractedAttention.forward is not before
    for value, expected in zip(results(), own, strict=True):
        torch.testing.assert_close(value, expected, rtol=1e-9, atol=1e-11)


def measured(label: str, seconds: list[float], **facts: Any) -> Measured:
    samples = [
        {'images': 80, 'seconds': each, 'peak_memory_mib': 100 * number} for number, each in enumerate(seconds, 1)
    ]
    return Measured(Variant(label), None, facts, samples)


def test_arithmetic() -> None:
    facts = {'precision': 'float32', 'flop_per_image': 6e6, 'macs': 1e6}
    rows = summarise(
        [
            measured('a', [2.0, 1.0, 4.0], **facts, gemm_flops=1e9),
            measured('b|', [1.0, 1.0, 0.5], **facts, gemm_flops=2e9),
            measured('c', [1.0, 1.0, 1.0], **{**facts, 'precision': 'bfloat16'}, gemm_flops=4e9),
        ]
    )
    assert [row['images_per_second'] for row in rows] == [40, 80, 80]
    assert [row['ratio'] for row in rows] == [1, 2, 2]  # 40 is the median of 40, 80 and 20
    assert rows[1]['ratios'] == [2, 1, 8]
    # Of the peaks in one precision the best counts: 6e6 · 40 / 2e9.
    assert [row['utilisation'] for row in rows] == pytest.approx([0.12, 0.24, 0.12])
    assert rows[0]['peak_memory_mib'] == 300
    table = make_table('step', rows).splitlines()
    assert table[3] == '| b\\| | 80.0 (80.0–160.0) | 2.00 (1.00–8.00) | float32 | 24% | 0.29 |'
    one = measured('d', [4.0], precision='float32')
    one.samples[0] |= {'data_seconds': 1.0}
    (row,) = summarise([one])
    assert row['data_percent'] == 25 and '| 4.0 | 25.0% |' in make_table('epoch', [row])
    lost = Measured(Variant('e'), None, failure='out of memory')
    cells = make_memory_table(summarise([one, lost, one, one]), ['x', 'y'], [1, 2]).splitlines()[2:]
    assert cells == ['| x | 0.10 | too large |', '| y | 0.10 | 0.10 |']


def test_idle_time() -> None:
    busy, span, gaps = benchmark_worker.idle_time([(5.0, 6.0), (0.0, 2.0), (1.0, 1.5), (1.5, 3.0), (6.0, 8.0)])
    assert (busy, span, gaps) == (6.0, 8.0, [2.0])
    assert benchmark_worker.idle_time([]) == (0.0, 0.0, [])


def test_flags_that_an_older_commit_lacks() -> None:
    asked = shlex.split('--new off --amp off --batch-size 8 --other=3 --lone')
    _, unknown = get_flags().parse_known_args(asked)
    assert benchmark_worker._without(asked, unknown) == ['--amp', 'off', '--batch-size', '8']


def test_steps(tmp_path: Path, capsys: pytest.CaptureFixture) -> None:
    result, profiles = tmp_path / 'result.json', tmp_path / 'new' / 'profiles'
    older = 'LABEL:older --worktree HEAD --plain --flag-of-tomorrow on --amp off' if has_git() else '--plain --amp off'
    words = ['step', *SMALL, *SHORT, '--baseline', older, '--candidate', '--amp bf16 --no-model-ema ENV:DHVT_TEST=7']
    benchmark.main([*words, '--json', str(result), '--profile', str(profiles)])
    out = capsys.readouterr().out
    content = json.loads(result.read_text())
    base, new = content['variants']
    assert base['plain'] and not new['plain'] and new['env'] == {'DHVT_TEST': '7'}
    assert [row['precision'] for row in (base, new)] == ['float32', 'bfloat16']
    if has_git():
        assert base['flags_left_out'] == ['--flag-of-tomorrow', 'on'] and len(base['commit']) == 40
    assert content['what'] == 'step' and content['command'].startswith('python tools/benchmark.py step --model-kwargs')
    assert content['machine']['cores'] >= 1 and content['date'] and content['rounds'] == 2
    for row in (base, new):
        assert row['batch'] == 8 and row['torch'] == str(torch.__version__)
        assert row['threads'] == torch.get_num_threads() or 'OMP_NUM_THREADS' not in os.environ
        assert len(row['samples']) == 2 and all(sample['images'] == 8 * sample['units'] for sample in row['samples'])
        rates = [sample['images'] / sample['seconds'] for sample in row['samples']]
        assert row['rates'] == rates and row['images_per_second'] == median(rates)
        assert row['ratio'] == row['images_per_second'] / base['images_per_second']
        assert row['flop_per_image'] == 6 * row['macs'] > 0
        assert row['utilisation'] == row['flop_per_image'] * row['images_per_second'] / row['gemm_flops']
        assert row['peak_memory_mib'] is None or row['peak_memory_mib'] > 50
        assert f'| {row["label"]} | {median(rates):,.{1 if median(rates) < 1000 else 0}f} (' in out
    files = sorted(profiles.iterdir())
    assert [file.name[:7] for file in files] == ['step-0-', 'step-1-']
    assert all('convolution_backward' in file.read_text() for file in files)


def test_epoch(tmp_path: Path, capsys: pytest.CaptureFixture) -> None:
    result = tmp_path / 'result.json'
    flags = [*SMALL, '--num_workers', '0', '--images', '300', '--rounds', '1', '--json', str(result)]
    benchmark.main(['epoch', *flags, '--baseline', '--epochs 2 --warmup-epochs 0'])
    (row,) = json.loads(result.read_text())['variants']
    (sample,) = row['samples']
    assert sample['images'] == 256 and 0 < sample['seconds'] < sample['program_seconds']  # of one of the epochs
    assert row['data_percent'] == pytest.approx(100 * sample['data_seconds'] / sample['seconds'])
    assert f'| {row["data_percent"]:.1f}% |' in capsys.readouterr().out


class Script:
    """In place of the pipe to benchmark.py: asks for one measurement, and keeps the answers."""

    def __init__(self) -> None:
        self.answers: list[dict[str, Any]] = []

    def receive(self) -> dict[str, Any]:
        if len(self.answers) > 1:
            raise benchmark_worker.Finished
        return {}

    def send(self, answer: dict[str, Any]) -> None:
        self.answers.append(answer)


@pytest.fixture
def start_job(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Callable[..., benchmark_worker.Job]:
    """Makes a job in this process, which is left as it was afterwards."""

    def replace(old: Any, new: Any) -> None:
        for module in list(sys.modules.values()):
            if getattr(module, old.__name__, None) is old:
                monkeypatch.setattr(module, old.__name__, new)

    def start(what: str, flags: list[str], channel: Any = None) -> benchmark_worker.Job:
        return benchmark_worker.Job(
            channel,
            what=what,
            tree=str(ROOT),
            flags=flags,
            scratch=str(tmp_path),
            plain=False,
            tolerant=False,
            seconds=0.1,
            images=300,
            env=['PATH'],
        )

    monkeypatch.setattr(sys, 'path', list(sys.path))
    monkeypatch.setattr(benchmark_worker, '_replace', replace)
    monkeypatch.setattr(benchmark_worker, 'limit_memory', lambda: None)
    return start


@pytest.mark.parametrize('what', ['eval', 'loader', 'memory'])
def test_other_measurements(what: str, start_job: Callable[..., benchmark_worker.Job]) -> None:
    channel = Script()
    with pytest.raises(benchmark_worker.Finished):
        start_job(what, [*SMALL, '--num_workers', '0', '--amp', 'bf16'], channel).run()
    facts, sample = channel.answers
    assert facts['env'] == {'PATH': os.environ['PATH']} and facts['precision'] == 'bfloat16'
    if what == 'eval':
        assert facts['batch'] == 12 and sample['images'] == 12 * sample['units']  # 1.5 times as large
        assert facts['flop_per_image'] == 2 * facts['macs'] and facts['gemm_flops'] > 0
    elif what == 'loader':
        assert facts['batches'] == 256 // 8 and sample['images'] == 8 * facts['batches'] * sample['units']
    else:
        assert facts['batch'] == 8 and sample['images'] == 8 and 'gemm_flops' not in facts


def test_made_up_images_only(start_job: Callable[..., benchmark_worker.Job], capsys: pytest.CaptureFixture) -> None:
    for flags, message in (
        (['--data_path=x'], 'made-up images: leave out --data-path'),
        (['--nothing'], 'unrecognized arguments: --nothing'),
    ):
        with pytest.raises(SystemExit) as stop:
            start_job('step', flags)
        assert stop.value.code == 2 and message in capsys.readouterr().err


@pytest.mark.parametrize(
    ('argv', 'message', 'code'),
    [
        (['nothing'], 'invalid choice', 2),
        (['step', '--rounds', '0'], 'at least 1', 2),
        (['step', '--candidate', 'ENV:A'], 'ENV:NAME=VALUE', 2),
        (['step', '--baseline', '--worktree=no-such-commit'], 'no-such-commit', 2),
        (['loader', '--profile', 'x'], '--profile is for step and eval', 2),
        (['eval', '--model', 'nothing'], "timm's registry has no such model", 2),
        (['loader', '--data-set', 'FOLDER', '--data-path', 'no-such-folder'], 'no-such-folder', 1),
    ],
)
def test_bad_input(argv: list[str], message: str, code: int, capfd: pytest.CaptureFixture) -> None:
    with pytest.raises(SystemExit) as stop:
        benchmark.main([*argv, '--device', 'cpu'])
    err = capfd.readouterr().err
    assert stop.value.code == code and err.count('\n') == 1 and message in err, err


def test_memory_that_is_not_there(monkeypatch: pytest.MonkeyPatch) -> None:
    class Lost:
        facts: ClassVar[dict[str, Any]] = {}

        def __init__(self, *_: Any) -> None:
            pass

        def start(self, *_: Any, **__: Any) -> None:
            raise benchmark.InputError(message)

    monkeypatch.setattr(benchmark, 'Worker', Lost)
    options: dict[str, Any] = {'rounds': 1, 'seconds': 1.0, 'images': 1}
    message = 'a: out of GPU memory: lower --batch-size'
    (lost,) = benchmark.measure_apart('memory', [Variant('a')], [], **options)
    assert lost.failure == message and not lost.samples
    message = 'a: another error'
    with pytest.raises(benchmark.InputError, match='another'):
        benchmark.measure_apart('memory', [Variant('a')], [], **options)


@pytest.mark.parametrize('kind', ['cpu', 'gpu'])
def test_the_readmes_tables(kind: str, tmp_path: Path) -> None:
    done = subprocess.run(
        ['bash', str(ROOT / 'tools' / 'benchmarks.sh'), kind],
        env={**os.environ, 'DRY_RUN': '1', 'PYTHON': sys.executable, 'BASE': 'HEAD', 'DATA': str(tmp_path)},
        capture_output=True,
        text=True,
        check=True,
    )
    commands = [line for line in done.stdout.splitlines() if line.startswith('+ ')]
    assert len(commands) > 10
    kinds = set()
    for command in commands:
        words = shlex.split(command)[3:]
        kinds.add(words[0])
        if words[0] == 'augment':
            benchmark_augment.get_args_parser().parse_args(words[1:])
            continue
        args, common = benchmark.get_args_parser().parse_known_args(benchmark._joined(words))
        for text in (args.baseline, *args.candidate):
            variant = Variant.parse(text)
            if variant.revision is None:
                args = get_flags().parse_args([*common, *variant.flags])
                assert timm.is_model(args.model)
    assert kinds == {'step', 'eval', 'augment', 'loader', 'epoch', 'memory'}
