"""tools/benchmark.py and benchmarks.sh: what they measure, what they make of it, and how they refuse."""

from __future__ import annotations

import shlex
import subprocess

import pytest

from config.arguments import parse_args
from tests.conftest import ROOT
from tools import benchmark, benchmark_augment, benchmark_data
from tools.benchmark import Variant, make_table, parse_variant

SMALL = ['--model-kwargs', 'embed_dim=32', 'depth=1', 'num_heads=2', '--batch-size', '8', '--device', 'cpu']
SHORT = ['--rounds', '2', '--seconds', '0.05']


def table(capsys: pytest.CaptureFixture[str]) -> list[list[str]]:
    rows = [line.strip('| ').split(' | ') for line in capsys.readouterr().out.splitlines() if line.startswith('| ')]
    assert rows[0] == ['variant', 'images/s', 'slowest to fastest', 'ratio', 'lowest to highest']
    return rows[1:]


@pytest.mark.parametrize('what', ['step', 'eval'])
def test_models_in_turn(what: str, capsys: pytest.CaptureFixture[str]) -> None:
    others = ['--candidate', '--amp bf16', '--candidate', '--model deit_tiny_cifar_patch4']
    benchmark.main([what, *SMALL, *SHORT, '--baseline', '--amp off', *others])
    rows = table(capsys)
    assert [row[0] for row in rows] == ['--amp off', '--amp bf16', '--model deit_tiny_cifar_patch4']
    assert all(float(row[1].replace(',', '')) > 0 for row in rows) and rows[0][3:] == ['1.00', '1.00 to 1.00']


def test_loader(capsys: pytest.CaptureFixture[str]) -> None:
    flags = ['--data-set', 'DIGITS', '--input-size', '16', '--num_workers', '0', '--nb-classes', '10']
    benchmark.main(['loader', *SMALL, *SHORT, *flags, '--baseline', '--augment pil', '--candidate', ''])
    assert [row[0] for row in table(capsys)] == ['--augment pil', 'as it is']


def test_rates_and_ratios() -> None:
    """The ratio is the median of the rounds' own, not of the medians."""
    rows = make_table([Variant('a', [], [100.0, 200.0, 300.0]), Variant('b', [], [150.0, 800.0, 330.0])]).splitlines()
    assert rows[2] == '| a | 200.0 | 100.0 to 300.0 | 1.00 | 1.00 to 1.00 |'
    assert rows[3] == '| b | 330.0 | 150.0 to 800.0 | 1.50 | 1.10 to 4.00 |'


def test_variants() -> None:
    variant = parse_variant("--model resnet18 --amp 'off'")
    assert variant.flags == ['--model', 'resnet18', '--amp', 'off'] and parse_variant('').label == 'as it is'
    with pytest.raises(benchmark.UsageError):
        parse_variant("'a")


@pytest.mark.parametrize(
    ('argv', 'code', 'word'),
    [
        (['step', '--baseline', '--amp half'], 2, 'invalid choice'),
        (['step', '--model', 'nothing'], 2, 'no such model'),
        (['step', '--distillation-type', 'hard'], 2, 'a step with a teacher is not measured'),
        (['loader', '--data-path', 'no-such-folder', '--data-set', 'FOLDER'], 1, 'no-such-folder'),
        (['speed'], 2, 'invalid choice'),
        (['loader', '--only_test_speed'], 2, 'benchmark.py eval measures the evaluation'),
        (['step', '--batch-size', '9' * 20], 2, 'at most'),
        (['step', '--rounds', '0'], 2, 'at least 1'),
    ],
)
def test_bad_input(argv: list[str], code: int, word: str, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as caught:
        benchmark.main([*argv, '--device', 'cpu'])
    error = capsys.readouterr().err
    assert caught.value.code == code and error.count('\n') == 1 and word in error


@pytest.mark.parametrize('kind', ['cpu', 'gpu'])
def test_commands_of_the_script(kind: str) -> None:
    done = subprocess.run(
        ['bash', str(ROOT / 'tools' / 'benchmarks.sh'), kind],
        capture_output=True, text=True, env={'PATH': '/usr/bin:/bin', 'DRY_RUN': '1', 'DATA': str(ROOT / 'docs')},
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    files = set()
    for line in done.stdout.splitlines():
        if not line.startswith('+ python'):
            continue
        _, _, file, *words = shlex.split(line)
        files.add(file)
        if file == 'tools/benchmark.py':
            flags = words[1:]
            variants = [
                flags.pop(i + 1) for i in reversed(range(len(flags))) if flags[i] in ('--baseline', '--candidate')
            ]
            common = [word for word in flags if word not in ('--baseline', '--candidate')]
            place = common.index('--rounds')
            for text in variants:
                parse_args([*common[:place], *common[place + 2 :], *parse_variant(text).flags])
        else:
            module = benchmark_augment if 'augment' in file else benchmark_data
            module.get_args_parser().parse_args(words)
    assert files == {f'tools/benchmark{end}.py' for end in ('', '_augment', '_data')}
